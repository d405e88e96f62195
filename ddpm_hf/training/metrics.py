"""What a run measures of itself: sums on the device, read by the host once a log interval, and the time they took."""

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from ddpm_hf.training.loss_meter import LossMeter


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
