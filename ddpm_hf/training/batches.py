"""This rank's part of each global batch: images, and every random number that the objective needs.

All of it is a function of (seed, step, position in the global batch), however the batch is split over ranks and micro
batches; timesteps that follow the losses are a function of those too. What becomes of an image, flip and crop, is drawn
for (seed, epoch, index), which follow from those. A stream is the exception: it gives each process the images it has
next, so which these are depends on the number of processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ddpm_hf.config import RunConfig
from ddpm_hf.data import ImageFeed, ImageStream
from ddpm_hf.data.feed import to_device
from ddpm_hf.rng import numpy_generator
from ddpm_hf.training.noise import draw_noise, exchange_noise, whole_blocks
from ddpm_hf.training.timestep_sampling import TimestepSampler

_NUM_NAMED_IMAGES = 32


@dataclass(frozen=True)
class MicroBatch:
    """What one forward of one rank needs.

    Args:
        x_0: float32 images in [-1, 1], (batch, channels, height, width).
        noise: float32 noise of the same shape.
        timesteps: int64 (batch,).
        importance: float32 (batch,), factors on the losses where timesteps are not uniform; None where they are.
        class_labels: int64 (batch,), or None for an unconditional network.
        dropped: bool (batch,), whose label becomes the null label; None without label dropout.
        feeds_back: Whether a self-conditioned network sees its own prediction; the same for the whole step.
        is_last: Whether the optimiser update follows.
    """

    x_0: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    importance: torch.Tensor | None
    class_labels: torch.Tensor | None
    dropped: torch.Tensor | None
    feeds_back: bool
    is_last: bool

    @property
    def loss_arguments(self) -> tuple[Any, ...]:
        """What the loss takes after the network."""
        return self.x_0, self.noise, self.timesteps, self.class_labels, self.dropped, self.feeds_back


class BatchSource:
    """Gives one rank its micro batches, in an order that is a closed form of the step.

    Args:
        config: The configuration of the run.
        feed: The samples of the run, or this rank's stream of images.
        rank: Which process this is.
        num_processes: How many there are; they share the global batch in equal, consecutive parts.
        micro_batch_size: Images of one forward.
        device: Where the batches are needed.
        timestep_sampler: What draws the timesteps.
    """

    def __init__(
        self,
        config: RunConfig,
        feed: ImageFeed | ImageStream,
        *,
        rank: int,
        num_processes: int,
        micro_batch_size: int,
        device: torch.device,
        timestep_sampler: TimestepSampler,
    ) -> None:
        self._config = config
        self._feed = feed
        self._micro_batch_size = micro_batch_size
        self._device = device
        self._timestep_sampler = timestep_sampler
        share = config.training.train_batch_size // num_processes
        self._positions = range(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        """Returns the number of images of this rank in a step."""
        return len(self._positions)

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Yields this rank's micro batches of optimiser step `step`, on the device."""
        config, seed, size = self._config, self._config.training.seed, self._config.training.train_batch_size
        objective, first = config.objective, step * size
        timesteps, importance = self._timestep_sampler.draw(step)
        dropped = numpy_generator(seed, "class_dropout", step).random(size) < objective.class_dropout
        feeds_back = numpy_generator(seed, "self_conditioning", step).random() < objective.self_conditioning
        for start in range(self._positions.start, self._positions.stop, self._micro_batch_size):
            positions = range(start, start + self._micro_batch_size)
            part = slice(positions.start, positions.stop)
            # Noise is exchanged among the images of a block, so all of them are needed, also where the batch cuts it.
            drawn = whole_blocks(positions, size) if objective.immiscible_noise else positions
            x_0, labels = self._feed.samples(first + drawn.start, first + drawn.stop)
            noise = draw_noise(objective, seed, step, drawn, x_0.shape[1:], self._device)
            if objective.immiscible_noise:
                noise = exchange_noise(x_0, noise)
            mine = slice(positions.start - drawn.start, positions.stop - drawn.start)
            yield MicroBatch(
                x_0=x_0[mine],
                noise=noise[mine],
                timesteps=to_device(timesteps[part], self._device),
                importance=None if importance is None else to_device(importance[part], self._device),
                class_labels=labels[mine] if config.model.class_conditional and labels is not None else None,
                dropped=to_device(dropped[part], self._device) if objective.class_dropout > 0 else None,
                feeds_back=feeds_back,
                is_last=positions.stop == self._positions.stop,
            )

    def images_of(self, step: int) -> str:
        """Returns a sentence that names the images of a step, of all ranks; nothing where they have no numbers."""
        if not isinstance(self._feed, ImageFeed):
            return ""
        size = self._config.training.train_batch_size
        numbers = self._feed.numbers(step * size, (step + 1) * size).tolist()
        more = ", ..." if size > _NUM_NAMED_IMAGES else ""
        return f" Its images were {', '.join(map(str, numbers[:_NUM_NAMED_IMAGES]))}{more}."
