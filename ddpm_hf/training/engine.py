"""How the network runs on its device: compiled or eager, in which memory format, with which kernels of cuDNN.

None of this changes what is computed except for rounding, and with compilation the masks of dropout.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ddpm_hf import distributed
from ddpm_hf.config import ConfigError, TrainingConfig, log_warning
from ddpm_hf.diffusion.compiled import (
    INDUCTOR,
    CompileError,
    check_compiler,
    compile_network,
    reason_of,
    uncompile,
    uses_cuda_graphs,
)
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.logging import say

_NHWC_GROUP_NORM = (2, 15)
"""The version of torch since which GroupNorm on CUDA keeps the memory format channels_last."""


@dataclass(frozen=True)
class Engine:
    """What the settings of the engine mean on this device.

    Args:
        is_compiled: Whether the network is compiled.
        mode: Mode of inductor.
        backend: Backend of torch.compile.
        channels_last: Whether the weights are in the memory format channels_last.
    """

    is_compiled: bool
    mode: str
    backend: str
    channels_last: bool

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether tensors that a call of the network returns are overwritten by the next call."""
        return self.is_compiled and uses_cuda_graphs(self.mode, self.backend)

    def __str__(self) -> str:
        mode = f", {self.mode}" if self.backend == INDUCTOR else ""
        run = f"compiled ({self.backend}{mode})" if self.is_compiled else "eager"
        return f"{run}, channels_last" if self.channels_last else run


def start_engine(training: TrainingConfig, device: torch.device) -> Engine:
    """Collective: decide how the network runs on this device, and choose how cuDNN finds its kernels.

    Returns:
        The engine, the same on all ranks.

    Raises:
        ConfigError: The network is to be compiled, and the backend or its compiler is missing.
    """
    is_cuda = device.type == "cuda"
    if is_cuda:
        wanted = training.cudnn_benchmark
        torch.backends.cudnn.benchmark = not training.deterministic if wanted == "auto" else wanted
    is_compiled = is_cuda if training.compile == "auto" else training.compile
    changed = [f"training.{name}" for name in ("compile_mode", "compile_backend") if _is_changed(training, name)]
    if training.compile == "auto" and not is_cuda and changed:
        log_warning(
            f"{' and '.join(changed)} has no effect: training.compile auto compiles on CUDA GPUs only; set it to true."
        )
    if is_compiled:
        is_compiled = _try(training, lambda: check_compiler(training.compile_backend, device))
    has_fast_norm = tuple(map(int, torch.__version__.split(".")[:2])) >= _NHWC_GROUP_NORM
    use_channels_last = is_cuda and (is_compiled or has_fast_norm)
    return Engine(
        is_compiled=is_compiled,
        mode=training.compile_mode,
        backend=training.compile_backend,
        channels_last=use_channels_last if training.channels_last == "auto" else training.channels_last,
    )


def _is_changed(training: TrainingConfig, name: str) -> bool:
    return bool(getattr(training, name) != getattr(TrainingConfig(), name))


def _try(training: TrainingConfig, action: Callable[[], object]) -> bool:
    """Collective: return whether an action succeeds on all ranks.

    A failure is a warning with training.compile auto, and raises ConfigError with true.
    """
    reason = None
    try:
        action()
    except CompileError as error:
        reason = str(error)
    reasons = [found for found in distributed.gather_json(reason) if found is not None]
    if reasons and training.compile is True:
        raise ConfigError(f"training.compile is true, but {reasons[0]}; set training.compile to false.")
    if reasons:
        log_warning(f"The network is not compiled, and trains more slowly: {reasons[0]}.")
    return not reasons


def compile_for_training(
    unet: nn.Module,
    engine: Engine,
    training: TrainingConfig,
    train_once: Callable[[], object],
    frozen: Sequence[nn.Module] = (),
) -> Engine:
    """Collective: compile the network in place for training steps, before the first one.

    Args:
        unet: The network in training mode, as Accelerate left it.
        engine: Returned by `start_engine`.
        training: The settings.
        train_once: Call the network forward and backward like a training step, on zeros; the first steps then find the
            kernels compiled.
        frozen: Further networks that a step calls without gradients, such as a teacher.

    Returns:
        The engine, which with training.compile auto is eager if the network cannot be compiled.

    Raises:
        ConfigError: The network cannot be compiled, and training.compile is true.
    """
    if not engine.is_compiled:
        return engine
    if distributed.rank() == 0:
        say(f"Compiling the network for training ({engine}); this can take minutes.")

    def compile_and_try() -> None:
        for network in (unet, *frozen):
            compile_network(network, mode=engine.mode, backend=engine.backend)
        try:
            train_once()
        except (CompileError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a backend that compiles the backward pass late may raise anything
            raise CompileError(f"the network cannot be compiled ({reason_of(error)})") from error

    if _try(training, compile_and_try):
        return engine
    for network in (unet, *frozen):
        uncompile(network)
    return dataclasses.replace(engine, is_compiled=False)


@torch.no_grad()
def use_channels_last(unet: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> None:
    """Convert the weights, and everything that is combined with them value by value, to channels_last.

    Kernels over lists of tensors are fast, and fused optimizers correct, only where all of them have the same strides.
    """
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name in ema.names:
        pairs += zip(ema.tensors(name), unet.parameters(), strict=True)
    for parameter, state in optimizer.state.items():
        moments = [value for value in state.values() if isinstance(value, torch.Tensor)]
        pairs += [(moment, parameter) for moment in moments if moment.shape == parameter.shape]
    for tensor, parameter in pairs:
        tensor.data = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
