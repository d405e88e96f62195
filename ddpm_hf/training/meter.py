"""Measurements of a run: time, memory, and losses by quartile of the timesteps.

Losses are summed on the device; the host reads the sums once per log interval.
"""

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

_NUM_QUARTILES = 4
# Columns of the sums: two over all samples, then losses and sample counts of each quartile.
_LOSSES, _COUNTS = slice(2, 2 + _NUM_QUARTILES), slice(2 + _NUM_QUARTILES, 2 + 2 * _NUM_QUARTILES)


class LossMeter:
    """Sum the losses of this rank since the last log line; skipped updates are not counted.

    Args:
        num_timesteps: Number of timesteps T.
        batch_size: Images of this rank in a step.
        device: Device of the losses.

    Attributes:
        sums: float32 (10,): the mean losses of the updates, the number of updates, and for each quartile of the
            timesteps the losses and the number of samples, both times the importance weights.
    """

    def __init__(self, num_timesteps: int, batch_size: int, device: torch.device) -> None:
        self._num_timesteps, self._batch_size = num_timesteps, batch_size
        self._quartiles = torch.arange(_NUM_QUARTILES, device=device)[:, None]
        self.sums = torch.zeros(_COUNTS.stop, device=device)
        self._step_sums = torch.zeros_like(self.sums)

    def add(self, losses: torch.Tensor, timesteps: torch.Tensor, importance: torch.Tensor | None) -> None:
        """Add the losses of one forward pass.

        Args:
            losses: (batch,), detached, without importance weights.
            timesteps: int64 (batch,).
            importance: float32 (batch,), or None for weights of 1.
        """
        factors = torch.ones_like(losses) if importance is None else importance
        weighted = factors * losses
        is_in = self._quartiles == timesteps * _NUM_QUARTILES // self._num_timesteps
        self._step_sums[0].add_(weighted.sum() / self._batch_size)
        self._step_sums[_LOSSES].add_((is_in * weighted).sum(dim=1))
        self._step_sums[_COUNTS].add_((is_in * factors).sum(dim=1))

    def end_step(self, is_nonfinite: torch.Tensor) -> None:
        """Count the step unless its update is skipped."""
        self._step_sums[1].add_(1)
        self.sums += self._step_sums.masked_fill_(is_nonfinite, 0.0)  # not 0 times a loss that may be NaN
        self._step_sums.zero_()

    def load(self, sums_of_ranks: Sequence[Sequence[float]], rank: int, num_processes: int) -> None:
        """Restore the sums of a checkpoint; an empty list means zeros.

        With another number of ranks each takes an equal part of the samples and the mean of the updates, which every
        rank counts.
        """
        if not sums_of_ranks:
            self.sums.zero_()
            return
        sums = torch.tensor(sums_of_ranks)
        if len(sums) == num_processes:
            mine = sums[rank]
        else:
            mine = sums.sum(dim=0) / num_processes
            mine[: _LOSSES.start] = sums[:, : _LOSSES.start].mean(dim=0)
        self.sums[: len(mine)] = mine  # early checkpoints hold two sums, without quartiles

    @staticmethod
    def columns(sums: Sequence[float]) -> dict[str, float | None]:
        """Return the columns of a log line from the sums over all ranks; None where nothing was counted."""
        totals, counts = [sums[0], *sums[_LOSSES]], [sums[1], *sums[_COUNTS]]
        names = ["loss", *(f"loss_q{quartile}" for quartile in range(_NUM_QUARTILES))]
        means = [total / count if count else None for total, count in zip(totals, counts, strict=True)]
        return dict(zip(names, means, strict=True))


def finite_or_none(value: float) -> float | None:
    """Return a number, or None if JSON cannot hold it."""
    return value if math.isfinite(value) else None


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: its tensors on a CUDA device, resident memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # On Linux ru_maxrss includes the memory of the process that started this one; VmHWM does not.
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB elsewhere


class Meter:
    """Make the log lines and measure the speed of training.

    Args:
        accelerator: Device and processes.
        train_batch_size: Images of a step on all processes.
        num_timesteps: Number of timesteps T.

    Attributes:
        losses: The losses of this rank since the last log line.
    """

    def __init__(self, accelerator: Accelerator, train_batch_size: int, num_timesteps: int) -> None:
        self._accelerator = accelerator
        self._train_batch_size = train_batch_size
        self.losses = LossMeter(num_timesteps, train_batch_size // accelerator.num_processes, accelerator.device)

    def start(self, step: int, seconds: float = 0.0) -> None:
        """Start the clock at a step that training reached after `seconds`."""
        self._logged_step, self._logged_at, self._seconds = step, time.monotonic(), seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent in the context from the speed of training."""
        paused_at = time.monotonic()
        yield
        self._logged_at += time.monotonic() - paused_at

    def take(self, step: int) -> dict[str, float | int | None]:
        """Collective: end a log interval and start the next.

        Args:
            step: Optimizer updates so far.

        Returns:
            Columns of a log line; losses are means since the previous line, None if there were none.
        """
        sums = self._accelerator.reduce(self.losses.sums.clone(), reduction="sum").tolist()
        now = time.monotonic()
        num_images = (step - self._logged_step) * self._train_batch_size
        images_per_second = num_images / max(now - self._logged_at, 1e-9)
        self._seconds += now - self._logged_at
        self._logged_step, self._logged_at = step, now
        self.losses.sums.zero_()
        return {
            "step": step,
            "num_images": step * self._train_batch_size,
            **LossMeter.columns(sums),
            "images_per_second": round(images_per_second, 2),
            "seconds": round(self._seconds, 1),
            "peak_memory_mib": round(peak_memory_mib(self._accelerator.device), 1),
        }

    def state_dict(self) -> dict[str, list[list[float]]]:
        """Collective: return the sums of every rank, named as in trainer_state.json."""
        return {"loss_sums": self._accelerator.gather(self.losses.sums[None]).tolist()}

    def load_state_dict(self, state: Mapping[str, list[list[float]]]) -> None:
        """Restore the sums, on any number of processes."""
        self.losses.load(state["loss_sums"], self._accelerator.process_index, self._accelerator.num_processes)
