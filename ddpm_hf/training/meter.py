"""What a run measures: time, memory, and losses by quartile of the timesteps, summed on the device."""

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

_NUM_QUARTILES = 4
_LOSSES, _NUMBERS = slice(2, 2 + _NUM_QUARTILES), slice(2 + _NUM_QUARTILES, 2 + 2 * _NUM_QUARTILES)


class LossMeter:
    """Sums up this rank's losses since the last line of metrics; a skipped update leaves no trace in them.

    `sums` holds the mean losses of the updates, their number, and for each quartile of the timesteps the losses and the
    number of samples, both times the samples' importance.

    Args:
        num_timesteps: Length T of the chain.
        share: Images of this rank in a step.
        device: Where the losses are.
    """

    def __init__(self, num_timesteps: int, share: int, device: torch.device) -> None:
        self._num_timesteps, self._share = num_timesteps, share
        self._quartiles = torch.arange(_NUM_QUARTILES, device=device)[:, None]
        self.sums = torch.zeros(_NUMBERS.stop, device=device)
        self._step_sums = torch.zeros_like(self.sums)

    def add(self, losses: torch.Tensor, timesteps: torch.Tensor, importance: torch.Tensor | None) -> None:
        """Counts the losses of one forward.

        Args:
            losses: (batch,), not yet multiplied by their importance, without a graph.
            timesteps: int64 (batch,).
            importance: float32 (batch,), or None if it is 1 for all.
        """
        factors = torch.ones_like(losses) if importance is None else importance
        weighted = factors * losses
        is_in = self._quartiles == timesteps * _NUM_QUARTILES // self._num_timesteps
        self._step_sums[0] += weighted.sum() / self._share
        self._step_sums[_LOSSES] += (is_in * weighted).sum(dim=1)
        self._step_sums[_NUMBERS] += (is_in * factors).sum(dim=1)

    def end_step(self, is_nonfinite: torch.Tensor) -> None:
        """Counts the step, unless its update is skipped, and makes room for the next one."""
        self._step_sums[1] += 1
        self.sums += torch.where(is_nonfinite, 0.0, self._step_sums)
        self._step_sums.zero_()

    def load(self, sums_of_ranks: Sequence[Sequence[float]], rank: int, num_processes: int) -> None:
        """Goes on from the sums of a checkpoint; where there were more or fewer ranks, each takes its part.

        Of samples that is an equal part of all, of updates, which every rank counts, the mean. Without ranks there is
        nothing to go on from.
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
        self.sums[: len(mine)] = mine  # those of a checkpoint that knew no quartiles are two

    @staticmethod
    def columns(sums: Sequence[float]) -> dict[str, float | None]:
        """Returns the columns of a line of metrics from the sums over all ranks; null where there was nothing."""
        totals, numbers = [sums[0], *sums[_LOSSES]], [sums[1], *sums[_NUMBERS]]
        names = ["loss", *(f"loss_q{quartile}" for quartile in range(_NUM_QUARTILES))]
        means = [total / number if number else None for total, number in zip(totals, numbers, strict=True)]
        return dict(zip(names, means, strict=True))


def finite_or_none(value: float) -> float | None:
    """Returns a number that JSON can hold."""
    return value if math.isfinite(value) else None


def peak_memory_mib(device: torch.device) -> float:
    """Returns the most memory that this process has held, in MiB: its tensors on a CUDA device, all of it on others."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # ru_maxrss is, on Linux, also what the process had that started this one
    for line in status.read_text(encoding="utf-8").splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


class Meter:
    """Makes the lines of metrics, and tells how fast training is.

    Args:
        accelerator: Where the sums live, and with whom they are added up.
        train_batch_size: Images of a step, over all processes.
        num_timesteps: Length T of the chain.

    Attributes:
        losses: This rank's losses since the last line.
    """

    def __init__(self, accelerator: Accelerator, train_batch_size: int, num_timesteps: int) -> None:
        self._accelerator = accelerator
        self._train_batch_size = train_batch_size
        self.losses = LossMeter(num_timesteps, train_batch_size // accelerator.num_processes, accelerator.device)

    def start(self, step: int, seconds: float = 0.0) -> None:
        """Starts the clock at a step, to which training has taken so many seconds."""
        self._logged_step, self._logged_at, self._seconds = step, time.monotonic(), seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of what is not training, so that images/s are those of training alone."""
        paused_at = time.monotonic()
        yield
        self._logged_at += time.monotonic() - paused_at

    def take(self, step: int) -> dict[str, float | int | None]:
        """Collective: ends an interval and begins the next.

        Args:
            step: Updates done.

        Returns:
            The beginning of a line of metrics; the losses are means since the line before, None where there were none.
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

    def gather(self) -> list[list[float]]:
        """Collective: returns the sums of every rank, for a checkpoint between two lines."""
        sums: list[list[float]] = self._accelerator.gather(self.losses.sums[None]).tolist()
        return sums

    def restore(self, sums: list[list[float]]) -> None:
        """Takes up what `gather` returned, on as many processes or on others."""
        self.losses.load(sums, self._accelerator.process_index, self._accelerator.num_processes)
