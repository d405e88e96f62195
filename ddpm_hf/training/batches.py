"""This rank's part of each global batch: images, and every random number that the objective needs.

All of it is a function of (seed, step, position in the global batch), however the batch is split over ranks and micro
batches. What becomes of an image, flip and crop, is drawn for (seed, epoch, index), which follow from those.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_hf.config import ConfigError, RunConfig
from ddpm_hf.data import ImageFeed, ImageSet, ImageStream
from ddpm_hf.rng import normal_by_position, numpy_generator
from ddpm_hf.training import processes
from ddpm_hf.training.snapshot import TrainerState

logger = logging.getLogger(__name__)


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
        images: The training images, or this rank's stream of them.
        rank: Which process this is.
        num_processes: How many there are; they share the global batch in equal, consecutive parts.
        micro_batch_size: Images of one forward.
        device: Where the batches are needed.
    """

    def __init__(
        self,
        config: RunConfig,
        images: ImageSet | ImageStream,
        *,
        rank: int,
        num_processes: int,
        micro_batch_size: int,
        device: torch.device,
    ) -> None:
        self._config = config
        self._images = images
        self._rank, self._num_processes = rank, num_processes
        seed = config.training.seed
        self._feed = images if isinstance(images, ImageStream) else ImageFeed(images, config.data, seed, device)
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
        for start in range(self._positions.start, self._positions.stop, self._micro_batch_size):
            positions = range(start, start + self._micro_batch_size)
            part = slice(positions.start, positions.stop)
            x_0, labels = self._feed.samples(step * size + positions.start, step * size + positions.stop)
            yield MicroBatch(
                x_0=x_0,
                noise=normal_by_position(seed, "noise", step, positions, x_0.shape[1:], self._device),
                timesteps=self._to_device(timesteps[part]),
                class_labels=labels if config.model.class_conditional else None,
                dropped=self._to_device(dropped[part]) if config.objective.class_dropout > 0 else None,
                is_last=positions.stop == self._positions.stop,
            )

    def write_state(self, state: TrainerState) -> None:
        """Collective: notes what the run depends on in the data, and where every rank is in its stream."""
        if isinstance(self._images, ImageStream):
            state.streams = processes.gather_json(asdict(self._images.position))
        else:
            state.num_images, state.data_digest = len(self._images), self._images.digest

    def check_state(self, state: TrainerState, folder: Path) -> None:
        """Refuses to go on with other data than those the run began with.

        Raises:
            ConfigError: If the data have changed.
        """
        if isinstance(self._images, ImageStream):
            return
        before, now = (state.num_images, state.data_digest), (len(self._images), self._images.digest)
        if before == now or before == (len(self._images), ""):
            return
        what = f"{now[0]} training images" if before[0] != now[0] else "other images or labels than before"
        count = f"{before[0]}" if before[0] != now[0] else "those"
        raise ConfigError(
            f"{self._config.data.source} has {what}, but the run in {folder} began with {count}; restore the data, or "
            "choose another training.output_dir."
        )

    def go_to(self, state: TrainerState) -> None:
        """Goes on in the stream where the run stopped; other data need no such thing."""
        if not isinstance(self._images, ImageStream):
            return
        if len(state.streams) == self._num_processes:
            self._images.go_to(state.streams[self._rank])
            return
        epoch = min((stream["epoch"] for stream in state.streams), default=0)
        logger.warning(
            "The stream was shared by %d processes and is now by %d: it begins again with epoch %d, so the samples of "
            "that epoch which were already seen repeat.",
            len(state.streams), self._num_processes, epoch,
        )  # fmt: skip
        self._images.go_to({"epoch": epoch})

    def _to_device(self, array: NDArray[Any]) -> torch.Tensor:
        """Copies an array to the device without making the host wait."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)
