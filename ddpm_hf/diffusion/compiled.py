"""The network compiled in place with torch.compile.

`compile_network` compiles the call of a UNet2DModel and leaves the module itself as it is: class, state dict, saving,
weights replaced in place and DistributedDataParallel around it work as before. Every call of a compiled network goes
through `CompiledCall`, which gives the compiler one form of its inputs, so that the number of compilations is small:
one for each batch size with and without gradients.
"""

import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

logger = logging.getLogger(__name__)

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
_CAN_ISOLATE = "isolate_recompiles" in inspect.signature(torch.compile).parameters
_ISOLATED: dict[str, Any] = {"isolate_recompiles": True} if _CAN_ISOLATE else {}
INDUCTOR = "inductor"
"""The backend of torch.compile that generates C++ for the CPU and Triton for GPUs."""


class CompileError(ValueError):
    """The network cannot be compiled here; the message is the reason, without a period."""


class CompiledCall:
    """The call of a network, compiled.

    The arguments become contiguous tensors of one memory format with one timestep per image, as otherwise equal calls
    would be compiled several times. With CUDA graphs the output of a call lies in memory that the next call overwrites,
    so it is copied.

    Args:
        unet: The network.
        mode: Mode of inductor; other backends ignore it.
        backend: Name of a backend of torch.compile.
    """

    def __init__(self, unet: torch.nn.Module, mode: str, backend: str) -> None:
        self.mode, self.backend = mode, backend
        self.batch_size: int | None = None  # see `full_batches`
        self._has_cuda_graphs = uses_cuda_graphs(mode, backend)
        self._compiling, self._compiled = threading.RLock(), set[tuple[object, ...]]()
        self._call_eagerly: Callable[..., Any] = unet._call_impl
        # Static shapes: each batch size has its own kernels, and no call changes those of another. torch limits the
        # number of compilations, for all networks of the process together unless it can count those of each.
        self._call = torch.compile(
            self._call_eagerly,
            fullgraph=True,
            dynamic=False,
            backend=backend,
            mode=mode if backend == INDUCTOR else None,
            **_ISOLATED,
        )

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Call the network; see `UNet2DModel.forward`.

        Raises:
            CompileError: The network cannot be compiled.
        """
        num_images = len(sample)
        size = -(-num_images // self.batch_size) * self.batch_size if self.batch_size else num_images
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(num_images)
        inputs = [_in_one_format(_pad(sample, size)), _pad(timesteps, size).contiguous()]
        inputs += [] if class_labels is None else [_pad(class_labels, size).contiguous()]
        if self._has_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        output = self._evaluate(*inputs)
        if self._has_cuda_graphs:
            output = output.clone()
        output = output[:num_images] if size > num_images else output
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _evaluate(self, *inputs: torch.Tensor) -> torch.Tensor:
        form = (torch.is_grad_enabled(), *((x.shape, x.dtype, x.device) for x in inputs))
        try:
            # Threads that meet a new batch size at once would each compile it.
            with nullcontext() if form in self._compiled else self._compiling:
                output: torch.Tensor = self._call(*inputs, return_dict=False)[0]
            self._compiled.add(form)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            logger.warning(
                "The network was called with too many different batch sizes, so %d images are not compiled.",
                len(inputs[0]),
            )
            output = self._call_eagerly(*inputs, return_dict=False)[0]
        except torch._dynamo.exc.TorchDynamoException as error:
            raise CompileError(f"the network cannot be compiled ({reason_of(error)})") from error
        return output


def compile_network(unet: torch.nn.Module, *, mode: str = "default", backend: str = INDUCTOR) -> CompiledCall:
    """Compile a network in place; a second call with the same settings changes nothing.

    Compilation happens in the first call of the network for each batch size, with and without gradients.

    Args:
        unet: The network, on its device.
        mode: `default`, `reduce-overhead` (CUDA graphs), `max-autotune` or `max-autotune-no-cudagraphs`.
        backend: Name of a backend of torch.compile.

    Raises:
        CompileError: The backend does not exist, or needs a compiler that this machine does not have.
    """
    compiled = compiled_call(unet)
    if compiled is None or (compiled.mode, compiled.backend) != (mode, backend):
        check_compiler(backend, next(unet.parameters()).device)
        # diffusers asks for the version of torch, which is the same in every trace.
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        compiled = CompiledCall(unet, mode, backend)
        # What nn.Module.compile() sets: the module's call, which is not part of its state.
        unet._compiled_call_impl = compiled
    return compiled


def uncompile(unet: torch.nn.Module) -> None:
    """Let a network run without compilation again."""
    unet._compiled_call_impl = None


def compiled_call(unet: torch.nn.Module) -> CompiledCall | None:
    """Return the compiled call of a network, or None if `compile_network` has not compiled it."""
    call = getattr(unet, "_compiled_call_impl", None)
    return call if isinstance(call, CompiledCall) else None


@contextmanager
def full_batches(unet: torch.nn.Module, batch_size: int) -> Iterator[None]:
    """Pad the batches of a compiled network to multiples of `batch_size` inside the context.

    The last, smaller batch of a data set then needs no compilation of its own. A network that is not compiled is called
    with the batches as they are.
    """
    compiled = compiled_call(unet)
    if compiled is None:
        yield
        return
    before, compiled.batch_size = compiled.batch_size, batch_size
    try:
        yield
    finally:
        compiled.batch_size = before


def uses_cuda_graphs(mode: str, backend: str) -> bool:
    """Return whether a mode replays CUDA graphs on a GPU, whose outputs the next replay overwrites."""
    return backend == INDUCTOR and mode in ("reduce-overhead", "max-autotune")


def check_compiler(backend: str, device: torch.device) -> None:
    """Check that a backend exists and that the machine has the compiler which inductor needs.

    Raises:
        CompileError: One of them is missing.
    """
    if backend not in torch._dynamo.list_backends(exclude_tags=()):
        known = ", ".join(torch._dynamo.list_backends())
        raise CompileError(f"{backend} is not a backend of torch.compile; available are {known}")
    if backend != INDUCTOR:
        return
    if device.type == "cuda":
        from torch.utils._triton import has_triton_package

        capability = torch.cuda.get_device_capability(device)
        if capability < (7, 0):
            raise CompileError(
                f"inductor needs a GPU of compute capability 7.0, but this one has {capability[0]}.{capability[1]}"
            )
        if not has_triton_package():
            raise CompileError("inductor needs Triton on a GPU, which is not installed; run pip install triton")
    elif device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:  # the class depends on the system
            raise CompileError(
                "inductor needs a C++ compiler on the CPU, and none was found; install g++, or set CXX to one"
            ) from error


def reason_of(error: BaseException) -> str:
    """Return why a compilation failed, in one line: the graph break and its place, or the error of the backend."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    found = [first or type(error).__name__]
    found += [line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")][:1]
    if places := [line for line in lines if line.startswith('File "')]:
        found.append(places[-1].replace('"', ""))
    return "; ".join(part.rstrip(".;") for part in found)


def _pad(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Repeat the last row of a batch until it has `size` rows."""
    num_missing = size - len(tensor)
    return torch.cat([tensor, tensor[-1:].expand(num_missing, *tensor.shape[1:])]) if num_missing else tensor


def _in_one_format(sample: torch.Tensor) -> torch.Tensor:
    """Return a batch with the strides of a new contiguous tensor: of one channel there are several contiguous ones."""
    _, channels, height, width = sample.shape
    strides = (channels * height * width, height * width, width, 1)
    return sample if sample.stride() == strides else sample.clone(memory_format=torch.contiguous_format)
