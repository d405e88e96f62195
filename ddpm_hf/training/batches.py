"""This rank's part of each global batch: images, and every random number that the objective needs.

All of it is a function of (seed, step, position in the global batch), however the batch is split over ranks and micro
batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_hf.config import RunConfig
from ddpm_hf.data import ImageSet, SampleOrder, normalize
from ddpm_hf.rng import normal_by_position, numpy_generator


@dataclass(frozen=True)
class MicroBatch:
    """What one forward of one rank needs.

    Args:
        x_0: float32 images in [-1, 1], (batch, channels, height, width).
        noise: float32 standard normal, of the same shape.
        timesteps: int64 (batch,).
        class_labels: int64 (batch,), or None for an unconditional network.
        dropped: bool (batch,), whose label becomes the null label; None without label dropout.
        is_last: Whether the optimiser update follows.
    """

    x_0: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    class_labels: torch.Tensor | None
    dropped: torch.Tensor | None
    is_last: bool


class BatchSource:
    """Gives one rank its micro batches, in an order that is a closed form of the step.

    Args:
        config: The configuration of the run.
        images: The training images.
        rank: Which process this is.
        num_processes: How many there are; they share the global batch in equal, consecutive parts.
        micro_batch_size: Images of one forward.
        device: Where the batches are needed.
    """

    def __init__(
        self,
        config: RunConfig,
        images: ImageSet,
        *,
        rank: int,
        num_processes: int,
        micro_batch_size: int,
        device: torch.device,
    ) -> None:
        self._config = config
        self._images = images
        self._order = SampleOrder(len(images), config.training.seed)
        self._micro_batch_size = micro_batch_size
        self._device = device
        share = config.training.train_batch_size // num_processes
        self._positions = range(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        """Returns the number of images of this rank in a step."""
        return len(self._positions)

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Yields this rank's micro batches of optimiser step `step`, on the device."""
        config, seed, size = self._config, self._config.training.seed, self._config.training.train_batch_size
        timesteps = numpy_generator(seed, "timesteps", step).integers(
            0, config.diffusion.num_train_timesteps, size=size
        )
        dropped = numpy_generator(seed, "class_dropout", step).random(size) < config.objective.class_dropout
        mirrored = numpy_generator(seed, "flip", step).random(size) < 0.5
        for start in range(self._positions.start, self._positions.stop, self._micro_batch_size):
            positions = range(start, start + self._micro_batch_size)
            part = slice(positions.start, positions.stop)
            rows = self._order.positions(step * size + positions.start, step * size + positions.stop)
            pixels, labels = self._images.take(rows)
            x_0 = normalize(
                self._to_device(pixels), self._to_device(mirrored[part]) if config.data.random_flip else None
            )
            yield MicroBatch(
                x_0=x_0,
                noise=normal_by_position(seed, "noise", step, positions, x_0.shape[1:], self._device),
                timesteps=self._to_device(timesteps[part]),
                class_labels=self._to_device(labels) if config.model.class_conditional and labels is not None else None,
                dropped=self._to_device(dropped[part]) if config.objective.class_dropout > 0 else None,
                is_last=positions.stop == self._positions.stop,
            )

    def _to_device(self, array: NDArray[Any]) -> torch.Tensor:
        """Copies an array to the device without making the host wait."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)
