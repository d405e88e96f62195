"""Processes: start Accelerate, collective operations, and agreement on stop signals.

All public functions except `rank`, `world_size` and `rank_range` are collective: every rank must call them in the same
order. Without a process group they work on one process.

Gradients and weights travel in the default process group (NCCL on GPUs, 30 minutes timeout). Errors, small values and
arrays travel in a second group, Gloo on CPU tensors with 12 hours timeout: ranks may wait for hours while rank 0
decodes the data or writes the report, and a process that died is noticed at once, because its connections are closed.
"""

import ctypes
import functools
import inspect
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DynamoBackend,
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
)
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from torch.nn.parallel import DistributedDataParallel

from ddpm_hf.config import ConfigError, Launcher, log_warning, read_launcher
from ddpm_hf.rng import global_generator_states, restore_global_generators
from ddpm_hf.signals import STOP_SIGNALS, exit_code_of, is_main_thread, restore_handlers

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_STEP_TIMEOUT = timedelta(minutes=30)
_RANK_0_TIMEOUT = timedelta(hours=12)
_CHECKSUM_CHUNK = 1 << 20
_ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
# torch 2.13 can copy the gradients of a bucket by one kernel instead of one for each parameter.
_CAN_BATCH_GRAD_COPY = "batched_grad_copy" in inspect.signature(DistributedDataParallel).parameters


@dataclass
class _DDPKwargs(DistributedDataParallelKwargs):  # type: ignore[misc]
    """Settings of DDP, with one that Accelerate does not pass on.

    `static_graph` would save nothing, because every parameter has a gradient in every step, and fails if gradients are
    accumulated in the first step.
    """

    batched_grad_copy: bool = False


class ProcessesDiffer(Exception):
    """The processes no longer hold the same weights; the message names a tensor and says what to do."""


class SharedOSError(OSError):
    """An OSError of one rank, raised on every rank."""


def join(*, cpu: bool = False) -> Launcher:
    """Collective: join the process group and choose the device.

    Args:
        cpu: Use the CPU even if there is a GPU.

    Returns:
        What `accelerate launch` was given.

    Raises:
        ConfigError: The launcher or the machine asks for something that is not supported.
    """
    launcher = read_launcher()
    # Without cpu=True, Accelerate starts several processes on a machine without a GPU as unrelated ones.
    cpu = cpu or launcher.cpu or not torch.accelerator.is_available()
    device = PartialState(cpu=cpu, timeout=_STEP_TIMEOUT).device
    if _is_forked and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        log_warning(
            "This process was forked, so it computes on one thread of the CPU: OpenMP hangs on more if the parent used "
            "them. Start it with spawn, or with torchrun, for more."
        )
    if device.type == "xla":
        raise ConfigError(
            "this process runs on a TPU, which is not supported; use GPUs, or a CPU with accelerate launch --cpu."
        )
    return launcher


def start(
    *,
    mixed_precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    is_from_launcher: bool = False,
    cpu: bool = False,
    tf32: bool = False,
    deterministic: bool = False,
) -> Accelerator:
    """Collective: join the process group unless that is done, and start Accelerate.

    Args:
        mixed_precision: Precision of the forward and backward pass (training.mixed_precision).
        is_from_launcher: Whether `accelerate launch` chose the precision; errors name its flag then.
        cpu: Use the CPU even if there is a GPU.
        tf32: Round the factors of float32 products and convolutions to TF32 on NVIDIA GPUs.
        deterministic: Use deterministic kernels only.

    Returns:
        An accelerator with gradient accumulation of 1: the trainer accumulates itself, so that the loss is a mean over
        the global batch however it is split.

    Raises:
        ConfigError: The device does not support the precision, or as `join`.
    """
    join(cpu=cpu)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(
        cpu=PartialState().device.type == "cpu",  # as `join` has decided
        mixed_precision=_ACCELERATE_PRECISION[mixed_precision],
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # The trainer compiles the network; without this, Accelerate would do so again when the launcher asks for it.
        dynamo_plugin=TorchDynamoPlugin(backend=DynamoBackend.NO),
    )
    accelerator.ddp_handler = _DDPKwargs(gradient_as_bucket_view=True, batched_grad_copy=_CAN_BATCH_GRAD_COPY)
    device_type = accelerator.device.type
    setting, fp32 = ("training.mixed_precision", "fp32")
    if is_from_launcher:
        setting, fp32 = ("accelerate launch --mixed_precision", "no")
    if mixed_precision == "fp16" and device_type != "cuda":
        raise ConfigError(
            f"{setting} fp16 needs a CUDA GPU for its loss scaling, but the device is {device_type}; use bf16 or "
            f"{fp32}."
        )
    if mixed_precision == "bf16" and device_type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"{setting} bf16 is not supported by this GPU; use fp16 or {fp32}.")
    if mixed_precision == "bf16" and device_type == "cpu" and _cpu_emulates_bf16():
        logger.warning(
            "This CPU has no bf16 instructions and emulates them, many times slower than fp32; use %s %s.",
            setting,
            fp32,
        )
    if device_type == "cuda":
        set_tf32(tf32)  # after Accelerate, which enables TF32 if it compiles
    if device_type == "cpu":
        keep_freed_memory()
    return accelerator


_ENVIRONMENT = ("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ENABLE_MPS_FALLBACK")  # Accelerate sets the latter
_SINGLETONS = (PartialState, AcceleratorState, GradientState)
_Values: TypeAlias = dict[str, Any]


class ProcessSettings:
    """What a run sets for its whole process: set inside the context, put back after it. Re-entrant.

    These are flags of torch, its global generators and number of threads, environment variables, the singletons of
    Accelerate, the progress bars of diffusers, and on a CPU the memory that the C library keeps. The run takes its
    values along from one context to the next, so several runs of a process may be built and trained in any order. The
    process group stays, because it belongs to the processes, which cannot join it twice.
    """

    _entered: ClassVar[list[tuple["ProcessSettings", int]]] = []
    """The contexts that are entered, from outer to inner, each with its thread."""
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self._of_run: _Values | None = None
        self._of_process: list[_Values] = []

    def __enter__(self) -> "ProcessSettings":
        thread = threading.get_ident()
        with self._lock:
            settings, owner = self._entered[-1] if self._entered else (self, thread)
            if settings is not self and owner != thread:
                raise ConfigError(
                    "another Trainer of this process is at work in another thread, and precision, determinism and "
                    "random numbers belong to the whole process; train after it, or in a process of its own."
                )
            self._entered.append((self, thread))
        self._of_process.append(_read_settings())
        if self._of_run is None:
            for singleton in _SINGLETONS:
                singleton._shared_state = {}
        else:
            _write_settings(self._of_run)
        return self

    def __exit__(self, *_: object) -> None:
        self._of_run = _read_settings()
        _write_settings(self._of_process.pop())
        with self._lock:
            self._entered.pop()

    @classmethod
    def _after_fork(cls) -> None:
        """Forget the threads of the parent, which a forked process does not have."""
        global _is_forked
        _is_forked = True
        cls._entered, cls._lock = [], threading.Lock()


_is_forked = False
os.register_at_fork(after_in_child=ProcessSettings._after_fork)


def _read_settings() -> _Values:
    """Return the values of everything that a run may change."""
    return {
        "deterministic": torch.get_deterministic_debug_mode(),
        # These raise an error after the precision of one backend was set, which is restored below.
        "matmul_precision": _unless_mixed(torch.get_float32_matmul_precision),
        "cudnn_tf32": _unless_mixed(torch._C._get_cudnn_allow_tf32),
        "precisions": [backend.fp32_precision for backend in _fp32_backends()],
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "num_threads": torch.get_num_threads(),
        "generators": global_generator_states(),
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
        "singletons": [vars(singleton)["_shared_state"] for singleton in _SINGLETONS],
        "progress_bars": diffusers_logging.is_progress_bar_enabled(),
        "keeps_freed_memory": _keeps_freed_memory,
    }


def _write_settings(values: _Values) -> None:
    """Restore values that `_read_settings` returned."""
    torch.set_deterministic_debug_mode(values["deterministic"])
    if values["matmul_precision"] is not None:
        torch.set_float32_matmul_precision(values["matmul_precision"])
    if values["cudnn_tf32"] is not None:
        torch.backends.cudnn.allow_tf32 = values["cudnn_tf32"]
    for backend, precision in zip(_fp32_backends(), values["precisions"], strict=True):
        if backend.fp32_precision != precision:
            backend.fp32_precision = precision
    torch.backends.cudnn.benchmark = values["cudnn_benchmark"]
    if values["num_threads"] != torch.get_num_threads():
        torch.set_num_threads(values["num_threads"])
    restore_global_generators(values["generators"])
    for name, value in values["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    for singleton, state in zip(_SINGLETONS, values["singletons"], strict=True):
        singleton._shared_state = state
    if values["progress_bars"]:
        diffusers_logging.enable_progress_bar()
    else:
        diffusers_logging.disable_progress_bar()
    if values["keeps_freed_memory"] != _keeps_freed_memory:
        keep_freed_memory() if values["keeps_freed_memory"] else return_freed_memory()


def _fp32_backends() -> tuple[Any, ...]:
    """Return the backends of torch with a precision of float32 products of their own."""
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul


def _unless_mixed(read: Callable[[], Result]) -> Result | None:
    try:
        return read()
    except RuntimeError:
        return None


def set_tf32(is_allowed: bool) -> None:
    """Allow or forbid TF32 in float32 products and convolutions on NVIDIA GPUs."""
    torch.set_float32_matmul_precision("high" if is_allowed else "highest")
    torch.backends.cudnn.allow_tf32 = is_allowed


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_keeps_freed_memory = False


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next allocation instead of returning it to the system.

    A step on the CPU frees its activations and allocates them again, and the system clears every returned page. Up to
    1 GiB is kept. Does nothing if the environment sets a threshold (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`
    or `GLIBC_TUNABLES`), or without glibc 2.35 or later. No result changes.
    """
    global _keeps_freed_memory
    is_set = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys()
    if sys.platform != "linux" or is_set or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt, size = getattr(ctypes.CDLL(None), "mallopt", None), 2**30
    if mallopt is not None and mallopt(_M_MMAP_THRESHOLD, size):  # earlier versions accept at most 32 MiB
        mallopt(_M_TRIM_THRESHOLD, size)
        _keeps_freed_memory = True


def return_freed_memory() -> None:
    """Undo `keep_freed_memory`.

    The thresholds cannot be read, and the C library no longer adapts them once they were set: they become the largest
    ones that it would have chosen itself. What is free now is returned to the system.
    """
    global _keeps_freed_memory
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
    library.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)
    library.malloc_trim(0)
    _keeps_freed_memory = False


def _cpu_emulates_bf16() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("NO AVX", "DEFAULT", "AVX2")


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def rank_range(num_items: int) -> range:
    """Return the contiguous part of range(num_items) that belongs to this rank."""
    first, stop = (num_items * (rank() + side) // world_size() for side in (0, 1))
    return range(first, stop)


def _cpu_group() -> dist.ProcessGroup:
    """Collective on its first call: return the Gloo group."""
    return _new_cpu_group(dist.group.WORLD)


@functools.cache
def _new_cpu_group(_: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Create one Gloo group for each default group."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_RANK_0_TIMEOUT)
    return group


def on_rank_0(function: Callable[[], Result]) -> Result | None:
    """Collective: call a function on rank 0 only; a ValueError or OSError there is raised on every rank.

    Returns:
        The result on rank 0, None on the other ranks.
    """
    return on_every_rank(lambda: function() if rank() == 0 else None)


def on_every_rank(function: Callable[[], Result]) -> Result:
    """Collective: call a function on every rank; a ValueError or OSError of one rank is raised on every rank.

    Returns:
        The result on this rank.

    Raises:
        ConfigError: A ValueError was raised on a rank.
        SharedOSError: An OSError was raised on a rank.
    """
    if world_size() == 1:
        return function()
    failure = None
    try:
        result = function()
    except (ValueError, OSError) as error:
        failure = [isinstance(error, OSError), str(error) or type(error).__name__]
    has_failed = torch.zeros(world_size())
    has_failed[rank()] = float(failure is not None)
    dist.all_reduce(has_failed, group=_cpu_group())
    if has_failed.any():
        is_os_error, message = broadcast_json(failure, source=int(has_failed.argmax()))
        raise SharedOSError(message) if is_os_error else ConfigError(message)
    return result


def barrier() -> None:
    """Collective: wait for all ranks, for up to 12 hours."""
    on_every_rank(lambda: None)


def broadcast_json(value: Any, source: int = 0) -> Any:
    """Collective: return the JSON-serializable value of one rank on every rank."""
    if world_size() == 1:
        return value
    encoded = json.dumps(value).encode() if rank() == source else b""
    length = torch.tensor(len(encoded))
    dist.broadcast(length, source, group=_cpu_group())
    content = torch.zeros(int(length), dtype=torch.uint8)
    if rank() == source:
        content.copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
    dist.broadcast(content, source, group=_cpu_group())
    return json.loads(bytes(content.tolist()))


def gather_json(value: Any) -> list[Any]:
    """Collective: return the JSON-serializable values of all ranks, in order, on every rank."""
    return [broadcast_json(value, source) for source in range(world_size())]


def gather_rows(rows: NDArray[Any]) -> NDArray[Any]:
    """Collective: return the arrays of all ranks, concatenated along the first axis, on every rank.

    Args:
        rows: The same dtype and trailing shape on all ranks; lengths may differ.
    """
    counts = gather_json(len(rows))
    start = sum(counts[: rank()])
    joined = np.zeros((sum(counts), *rows.shape[1:]), np.uint8 if rows.dtype == bool else rows.dtype)
    joined[start : start + len(rows)] = rows
    sum_arrays(joined)
    return joined.astype(rows.dtype, copy=False)


def reduce(value: float, operation: Literal["sum", "min"]) -> float:
    """Collective: return the sum or the minimum over all ranks, in float64."""
    if world_size() == 1:
        return value
    result = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(result, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN}[operation], group=_cpu_group())
    return float(result)


def sum_arrays(array: NDArray[Any]) -> None:
    """Collective: overwrite an array with the sum over all ranks."""
    if world_size() > 1:
        dist.all_reduce(torch.from_numpy(array), group=_cpu_group())


def broadcast_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Collective: overwrite tensors with those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def broadcast_named_tensors(tensors: dict[str, torch.Tensor] | None, device: torch.device) -> dict[str, torch.Tensor]:
    """Collective: return the named tensors of rank 0 on every rank; the other ranks pass None."""
    if world_size() == 1:
        return tensors or {}
    layout = broadcast_json({name: [list(t.shape), str(t.dtype)] for name, t in (tensors or {}).items()})
    received = {}
    for name, (shape, dtype) in layout.items():
        if tensors is not None:
            received[name] = tensors[name].to(device)
        else:
            received[name] = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)
    broadcast_tensors(received.values())
    return received


def check_same(tensors: Mapping[str, torch.Tensor]) -> None:
    """Collective: check that all ranks hold the same bits.

    Each rank sends a checksum of 8 bytes per tensor. A single differing value is always found, several ones except with
    probability 2^-64.

    Args:
        tensors: float32, with the same names and shapes on all ranks.

    Raises:
        ProcessesDiffer: On every rank, if a tensor differs on one.
    """
    if world_size() == 1:
        return
    checksums = torch.stack([_checksum(tensor.detach()) for tensor in tensors.values()]).cpu()
    # The complement of the minimum of the complements is the maximum.
    smallest = torch.stack([checksums, ~checksums])
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group=_cpu_group())
    is_different = (smallest[0] != ~smallest[1]).tolist()
    if any(is_different):
        names = [name for name, differs in zip(tensors, is_different, strict=True) if differs]
        raise ProcessesDiffer(
            f"the {world_size()} processes no longer have the same weights ({names[0]}"
            f"{f' and {len(names) - 1} more' if names[1:] else ''}), so no checkpoint was written; the earlier ones "
            "are intact, and the same command continues from them. If it happens again, check the GPUs and their "
            "memory."
        )


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of the bit patterns of all values, each times its position, modulo 2^64."""
    bits = tensor.contiguous().view(torch.int32).flatten()
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _CHECKSUM_CHUNK):
        chunk = bits[start : start + _CHECKSUM_CHUNK]
        total += (chunk * torch.arange(start + 1, start + 1 + len(chunk), device=tensor.device)).sum()
    return total


# A terminal's Ctrl-C reaches the workers directly and once more through torchrun; both are one request.
_SAME_REQUEST_SECONDS = 2.0


class Agreement:
    """Numbers that all ranks agree on while they go on, without waiting for the device. Collective: create it together.

    Args:
        num_values: How many numbers there are.
    """

    def __init__(self, num_values: int) -> None:
        self._group = dist.new_group(backend="gloo")
        self._agreed = torch.zeros(num_values, dtype=torch.int64)
        self._work: dist.Work | None = None

    def send(self, values: Sequence[int]) -> None:
        """Collective: pass on the numbers of this rank."""
        self.receive()
        self._agreed = torch.tensor(values)
        self._work = dist.all_reduce(self._agreed, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def receive(self) -> list[int]:
        """Collective: return the maxima over all ranks of what was sent last, or zeros."""
        if self._work is not None:
            self._work.wait()
        return [int(value) for value in self._agreed]

    def close(self) -> None:
        """Collective: wait for what was sent last, and destroy the group."""
        self.receive()
        dist.destroy_process_group(self._group)


class TrainingStopped(BaseException):
    """Training was stopped, after saving a checkpoint. No Exception, so that no `except Exception` goes on after it.

    `TrainingStopped.of(exit_code)` is a KeyboardInterrupt after SIGINT, otherwise a SystemExit, so that a script that
    does not catch it ends with the exit code.

    Attributes:
        exit_code: 130 for SIGINT, 129 for SIGHUP, 143 for other signals and for a launcher that exited.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"training was stopped and saved (exit code {exit_code})")
        self.exit_code = exit_code

    @staticmethod
    def of(exit_code: int) -> "TrainingStopped":
        """Return the exception for an exit code."""
        is_interrupt = exit_code == exit_code_of(signal.SIGINT)
        return (_TrainingInterrupted if is_interrupt else _TrainingTerminated)(exit_code)


class _TrainingInterrupted(TrainingStopped, KeyboardInterrupt):
    pass


class _TrainingTerminated(TrainingStopped, SystemExit):
    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.code = exit_code


class StopWatcher:
    """Turn signals into a stop that all ranks agree on, one step later and without waiting for the device.

    A second signal ends the process immediately; a second SIGINT raises KeyboardInterrupt where it would have without
    this class, as in a notebook. A launcher that exited counts as SIGTERM, because `accelerate launch` does not pass
    SIGTERM on. Use it as a context manager on every rank: leaving it restores the previous signal handlers and
    re-raises a signal that arrived after the last check. In another thread than the main one, which receives no
    signals, only `request` and the launcher stop a run.

    Args:
        parent: The parent process when the run was built, as the launcher may exit while the data are decoded.
    """

    def __init__(self, parent: int) -> None:
        self._requested = 0
        self._requested_at = 0.0
        self._is_handled = False
        self._launcher = parent if {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys() else None
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None
        self._old_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopWatcher":
        for number in STOP_SIGNALS if is_main_thread() else ():
            # nohup ignores SIGHUP. torchrun does not: it passes SIGHUP on and kills its workers half a minute later.
            is_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not is_nohup or "TORCHELASTIC_RUN_ID" in os.environ:
                self._old_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error on this rank alone, the others may never answer.
        if kind is None or issubclass(kind, TrainingStopped):
            self.agreed()
            if self._group is not None:
                dist.destroy_process_group(self._group)
        restore_handlers(self._old_handlers)
        if kind is None and self._requested_at and not self._is_handled:
            signal.raise_signal(self._requested)

    def request(self) -> None:
        """Stop as after SIGTERM; may be called in any thread."""
        self._requested = self._requested or signal.SIGTERM

    def _handle(self, number: int, _: FrameType | None) -> None:
        """Remember the first signal; let a later one end the process."""
        if self._requested and time.monotonic() - self._requested_at > _SAME_REQUEST_SECONDS:
            if self._old_handlers[signal.Signals(number)] is signal.default_int_handler:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self._requested:
            self._requested, self._requested_at = number, time.monotonic()

    def exit_code_if_stopped(self) -> int:
        """Collective: call once per step.

        Returns:
            The exit code to end with, or 0 to continue. With several ranks it is the state of the previous call.
        """
        if self._launcher is not None and os.getppid() != self._launcher:
            self.request()
        self._is_handled = bool(self._requested)
        exit_code = exit_code_of(self._requested) if self._requested else 0
        if self._group is None:
            return exit_code
        agreed = self.agreed()
        mine = torch.tensor(exit_code)
        self._pending = (mine, dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._group, async_op=True))
        return agreed

    def agreed(self) -> int:
        """Collective: return the exit code of the previous call of `exit_code_if_stopped`; 0 on a single process."""
        if self._pending is None:
            return 0
        agreed, work = self._pending
        if work is not None:
            work.wait()
        return int(agreed)
