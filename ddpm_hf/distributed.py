"""Processes: start Accelerate, collectives, and agreement on stop signals.

What the processes of a run do together: start, agree, share a state that only rank 0 has read, and compare theirs.

Every public function but `rank` and `world_size` is collective: all ranks must call it, in the same order.

Hosts agree in a gloo group of their own, on CPU tensors: there the others wait for hours while rank 0 decodes the data
or writes the report, and a process that has died is noticed at once, since its connections are closed. Gradients and
weights go through the default group, nccl on GPUs, where nobody waits for long.

What an evaluation knows of the processes that share it.

The processes that Accelerate has started, as an evaluation wants to know them.
"""

import functools
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from numpy.typing import NDArray

from ddpm_hf.config import ConfigError, TrainingConfig

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# A machine that has gone without closing its connections is given up after these.
_LONGEST_STEP = timedelta(minutes=30)
_LONGEST_WORK_OF_ONE_RANK = timedelta(hours=12)
_VALUES_AT_A_TIME = 1 << 20
_ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class ProcessesDiffer(Exception):
    """The processes no longer have the same weights; the message names one and says what to do."""


class SharedOSError(OSError):
    """What the system refused to one rank, raised on every rank."""


def start(config: TrainingConfig) -> Accelerator:
    """Collective: joins the processes and picks the device and the precision.

    Raises:
        ConfigError: If the precision does not work here, or the launcher was told another one.
    """
    _check_launcher(config)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(
        # Without this, Accelerate starts several processes on a machine without a GPU as if each were alone.
        cpu=config.cpu or not torch.accelerator.is_available(),
        mixed_precision=_ACCELERATE_NAMES[config.mixed_precision],
        # The trainer accumulates by itself, so that the loss is a mean over the global batch however it is split.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=_LONGEST_STEP),
        ],
    )
    if config.mixed_precision == "fp16" and accelerator.device.type != "cuda":
        raise ConfigError(
            f"training.mixed_precision fp16 needs a CUDA GPU for its loss scaling, but the device is "
            f"{accelerator.device.type}; use bf16 or fp32."
        )
    if config.mixed_precision == "bf16" and accelerator.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("training.mixed_precision bf16 is not supported by this GPU; use fp16 or fp32.")
    if config.mixed_precision == "bf16" and accelerator.device.type == "cpu" and _cpu_emulates_bf16():
        logger.warning(
            "This CPU has no bf16 instructions and emulates them, many times slower than fp32; "
            "training.mixed_precision fp32 is the better choice here."
        )
    if accelerator.device.type == "cuda":
        set_tf32(config.tf32)
    return accelerator


def set_tf32(is_allowed: bool) -> None:
    """Lets NVIDIA GPUs round the factors of float32 products and convolutions to TF32, or keeps them from it.

    After the start of Accelerate, which switches it on when it compiles.
    """
    torch.set_float32_matmul_precision("high" if is_allowed else "highest")
    torch.backends.cudnn.allow_tf32 = is_allowed


def _cpu_emulates_bf16() -> bool:
    """Tells whether the vector units are older than those that came with bf16."""
    return torch.backends.cpu.get_cpu_capability() in ("NO AVX", "DEFAULT", "AVX2")


def _check_launcher(config: TrainingConfig) -> None:
    """Refuses a launcher setting that contradicts the configuration."""
    # "no" and 1 are what the launcher passes on when it was told nothing.
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", _ACCELERATE_NAMES[config.mixed_precision]):
        raise ConfigError(
            f"accelerate launch was told --mixed_precision {precision}, but training.mixed_precision is "
            f"{config.mixed_precision}; give both the same value, or leave it to the configuration."
        )
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise ConfigError(
            f"accelerate launch was told --gradient_accumulation_steps {accumulation}, but accumulation follows from "
            f"training.train_batch_size {config.train_batch_size} and training.micro_batch_size "
            f"{config.micro_batch_size}; set those instead."
        )


def on_rank_0(function: Callable[[], Result]) -> Result | None:
    """Collective: calls a function on rank 0 only; if it raises ValueError or OSError there, every rank does.

    Returns:
        What the function returned on rank 0, None elsewhere.
    """
    return on_every_rank(lambda: function() if rank() == 0 else None)


def on_every_rank(function: Callable[[], Result]) -> Result:
    """Collective: calls a function on every rank; if it raises ValueError or OSError on one, every rank does.

    Returns:
        What the function returned on this rank.
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
    dist.all_reduce(has_failed, group=_hosts())
    if has_failed.any():
        is_system_error, message = share_json(failure, source=int(has_failed.argmax()))
        raise SharedOSError(message) if is_system_error else ConfigError(message)
    return result


def wait() -> None:
    """Collective: waits until all ranks are here, also for the hours that rank 0 takes over the report."""
    on_every_rank(lambda: None)


def share_json(value: Any, source: int = 0) -> Any:
    """Collective: returns one rank's value, which must be plain JSON, on every rank."""
    if world_size() == 1:
        return value
    encoded = json.dumps(value).encode() if rank() == source else b""
    length = torch.tensor(len(encoded))
    dist.broadcast(length, source, group=_hosts())
    content = torch.zeros(int(length), dtype=torch.uint8)
    if rank() == source:
        content.copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
    dist.broadcast(content, source, group=_hosts())
    return json.loads(bytes(content.tolist()))


def gather_json(value: Any) -> list[Any]:
    """Collective: returns every rank's value, which must be plain JSON, on every rank."""
    return [share_json(value, source) for source in range(world_size())]


def reduce(value: float, operation: Literal["sum", "min"]) -> float:
    """Collective: returns the sum or the smallest of the numbers of all ranks, in float64."""
    if world_size() == 1:
        return value
    result = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(result, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN}[operation], group=_hosts())
    return float(result)


def join_parts(array: NDArray[Any]) -> None:
    """Collective: fills an array that every rank has filled in part, with zeros elsewhere, with the parts of all."""
    if world_size() > 1:
        dist.all_reduce(torch.from_numpy(array), group=_hosts())


def check_same(tensors: Mapping[str, torch.Tensor]) -> None:
    """Collective: makes sure that all ranks hold the same tensors, bit by bit.

    Every rank sends 8 bytes a tensor. A single value that differs is always found, several but for one case in 2^64.

    Args:
        tensors: float32, of the same names and shapes on all ranks.

    Raises:
        ProcessesDiffer: On every rank, if a tensor differs on one.
    """
    if world_size() == 1:
        return
    sums = torch.stack([_fingerprint(tensor.detach()) for tensor in tensors.values()]).cpu()
    smallest = torch.stack([sums, ~sums])  # of the complements the smallest belongs to the largest sum
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group=_hosts())
    is_different = (smallest[0] != ~smallest[1]).tolist()
    if any(is_different):
        names = [name for name, differs in zip(tensors, is_different, strict=True) if differs]
        raise ProcessesDiffer(
            f"the {world_size()} processes no longer have the same weights ({names[0]}"
            f"{f' and {len(names) - 1} more' if names[1:] else ''}), so no checkpoint was written; the earlier ones "
            "are intact, and the same command goes on from them. If it happens again, a GPU or its memory is at fault."
        )


def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the sum of the bits of each value times its place, modulo 2^64."""
    bits = tensor.contiguous().view(torch.int32).flatten()
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _VALUES_AT_A_TIME):
        some = bits[start : start + _VALUES_AT_A_TIME]
        total += (some * torch.arange(start + 1, start + 1 + len(some), device=tensor.device)).sum()
    return total


def share_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Collective: overwrites tensors with rank 0's."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def share_named_tensors(tensors: dict[str, torch.Tensor] | None, device: torch.device) -> dict[str, torch.Tensor]:
    """Collective: returns rank 0's named tensors on every rank; other ranks give None."""
    if world_size() == 1:
        return tensors or {}
    layout = share_json({name: [list(t.shape), str(t.dtype)] for name, t in (tensors or {}).items()})
    shared = {}
    for name, (shape, dtype) in layout.items():
        if tensors is not None:
            shared[name] = tensors[name].to(device)
        else:
            shared[name] = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)
    share_tensors(shared.values())
    return shared


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns which process this is."""
    return dist.get_rank() if world_size() > 1 else 0


def _hosts() -> dist.ProcessGroup:
    """Collective when first called: returns the group in which the hosts agree."""
    return _gloo_beside(dist.group.WORLD)


@functools.cache
def _gloo_beside(_: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Makes a group of all ranks, once for each default group."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_LONGEST_WORK_OF_ONE_RANK)
    return group


def _alone(work: Callable[[], Result]) -> Result | None:
    return work()


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, and what they do together; by default it is alone.

    Args:
        rank: Which process this is.
        num_processes: How many share the work.
        gather: Collective: joins the arrays of all processes along the first axis, in the order of their ranks.
        on_rank_0: Collective: calls a function on rank 0 only; a ValueError or OSError there is raised everywhere.
    """

    rank: int = 0
    num_processes: int = 1
    gather: Callable[[NDArray[Any]], NDArray[Any]] = lambda array: array
    on_rank_0: Callable[[Callable[[], Any]], Any] = _alone

    def part(self, num_items: int) -> range:
        """Returns the items of this process, a contiguous part."""
        first, stop = (num_items * (self.rank + side) // self.num_processes for side in (0, 1))
        return range(first, stop)


ALONE = Ranks()


def started_ranks() -> Ranks:
    """Returns the processes; after `processes.start`."""
    return Ranks(rank(), world_size(), gather_rows, on_rank_0)


def gather_rows(rows: NDArray[Any]) -> NDArray[Any]:
    """Collective: joins the arrays of all processes along the first axis, in the order of their ranks.

    Args:
        rows: Of the same type and, but for the first axis, shape on all processes.
    """
    counts = gather_json(len(rows))
    start = sum(counts[: rank()])
    joined = np.zeros((sum(counts), *rows.shape[1:]), np.uint8 if rows.dtype == bool else rows.dtype)
    joined[start : start + len(rows)] = rows
    join_parts(joined)
    return joined.astype(rows.dtype, copy=False)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A terminal's Ctrl-C reaches the workers directly and once more through torchrun; that is one request, not two.
_SAME_REQUEST_SECONDS = 2.0
# As early as possible: while the data are decoded, a launcher may go away too.
_PARENT_AT_START = os.getppid()


class TrainingStopped(Exception):
    """Training was stopped by a signal after saving.

    Args:
        exit_code: 130 for SIGINT, 143 for the others and for a launcher that went away.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"stopped by a signal (exit code {exit_code})")
        self.exit_code = exit_code


class StopWatcher:
    """Turns signals into a stop that all ranks agree on, one step later and without waiting for the device.

    A second signal ends the process at once. A launcher that died without a word (accelerate launch does not pass
    SIGTERM on) counts as SIGTERM. Use it as a context manager on every rank: leaving it restores the old handlers, and
    leaves to them a signal that came when nobody was going to ask any more.
    """

    def __init__(self) -> None:
        self._requested = 0
        self._requested_at = 0.0
        self._was_asked_since = False
        self._launcher = _PARENT_AT_START if {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys() else None
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None
        self._old_handlers: dict[int, object] = {}

    def __enter__(self) -> "StopWatcher":
        for number in STOP_SIGNALS:
            self._old_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error on this rank alone, the others may never answer.
        if kind is None or issubclass(kind, TrainingStopped):
            self.agreed()
        for number, handler in self._old_handlers.items():
            # None stands for a handler that was not installed from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        if kind is None and self._requested and not self._was_asked_since:
            signal.raise_signal(self._requested)

    def _handle(self, number: int, _: FrameType | None) -> None:
        """Notes the first signal; obeys a later one at once."""
        if self._requested and time.monotonic() - self._requested_at > _SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self._requested:
            self._requested, self._requested_at = number, time.monotonic()

    def exit_code_if_stopped(self) -> int:
        """Collective: call on every rank, once a step.

        Returns:
            The exit code all ranks should end with, or 0 to go on. With several ranks it is what was known a step ago.
        """
        if self._launcher is not None and os.getppid() != self._launcher:
            self._requested = self._requested or signal.SIGTERM
        self._was_asked_since = bool(self._requested)
        exit_code = {0: 0, signal.SIGINT: 130}.get(self._requested, 143)
        if self._group is None:
            return exit_code
        agreed = self.agreed()
        mine = torch.tensor(exit_code)
        self._pending = (mine, dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._group, async_op=True))
        return agreed

    def agreed(self) -> int:
        """Collective: returns the exit code that several ranks agreed on when they last asked; 0 without others."""
        if self._pending is None:
            return 0
        agreed, work = self._pending
        if work is not None:
            work.wait()
        return int(agreed)
