"""What a run measures of itself: sums on the device, read by the host once a log interval, and the time they took."""

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator


def finite_or_none(value: float) -> float | None:
    """Returns a number that JSON can hold."""
    return value if math.isfinite(value) else None


def peak_memory_mib(device: torch.device) -> float:
    """Returns the most memory that this process has held, in MiB: its tensors on a CUDA device, all of it on others."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB on Linux


class Meter:
    """Sums the losses of this rank between two lines of metrics, and tells how fast training is.

    Args:
        accelerator: Where the sums live, and with whom they are added up.
        train_batch_size: Images of a step, over all processes.
    """

    def __init__(self, accelerator: Accelerator, train_batch_size: int) -> None:
        self._accelerator = accelerator
        self._train_batch_size = train_batch_size
        # Sum of this rank's mean losses, number of updates in it.
        self._loss_sum = torch.zeros(2, device=accelerator.device)

    def start(self, step: int) -> None:
        """Starts the clock at a step."""
        self._logged_step, self._logged_at = step, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of what is not training, so that images/s are those of training alone."""
        paused_at = time.monotonic()
        yield
        self._logged_at += time.monotonic() - paused_at

    def add(self, loss: torch.Tensor, is_nonfinite: torch.Tensor) -> None:
        """Adds the loss of one update, unless its gradient was not finite; reads nothing from the device."""
        finite_loss = torch.where(is_nonfinite, 0.0, loss)
        self._loss_sum += torch.stack([finite_loss, (~is_nonfinite).to(torch.float32)])

    def take(self, step: int) -> dict[str, float | int | None]:
        """Collective: ends an interval and begins the next.

        Args:
            step: Updates done.

        Returns:
            The beginning of a line of metrics; `loss` is the mean since the line before, None if no update was finite.
        """
        loss_sum, num_losses = self._accelerator.reduce(self._loss_sum.clone(), reduction="sum").tolist()
        now = time.monotonic()
        num_images = (step - self._logged_step) * self._train_batch_size
        images_per_second = num_images / max(now - self._logged_at, 1e-9)
        self._logged_step, self._logged_at = step, now
        self._loss_sum.zero_()
        return {
            "step": step,
            "num_images": step * self._train_batch_size,
            "loss": loss_sum / num_losses if num_losses else None,
            "images_per_second": round(images_per_second, 2),
            "peak_memory_mib": round(peak_memory_mib(self._accelerator.device), 1),
        }

    def gather(self) -> list[list[float]]:
        """Collective: returns the sums of every rank, for a checkpoint between two lines."""
        sums: list[list[float]] = self._accelerator.gather(self._loss_sum[None]).tolist()
        return sums

    def restore(self, sums: list[list[float]]) -> None:
        """Takes up what `gather` returned, on as many processes or on others."""
        if len(sums) == self._accelerator.num_processes:
            self._loss_sum.copy_(torch.tensor(sums[self._accelerator.process_index]))
        else:
            self._loss_sum.copy_(torch.tensor(sums).mean(dim=0))
