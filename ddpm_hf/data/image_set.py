"""A set of decoded images, which sample of a run comes when, and pixels in the network's range."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_hf.rng import numpy_generator


class DataError(ValueError):
    """Data that cannot be trained on; the message names the first offender and what to do."""


@dataclass(frozen=True)
class ImageSet:
    """Decoded images and their labels.

    Args:
        images: uint8 (number, channels, height, width), memory-mapped.
        labels: int64 (number,), or None where the data has none.
        class_names: Names of the classes, or None where there are no labels.
        indices: Rows of `images` that belong to this set.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def positions(self) -> NDArray[np.int64]:
        """All positions of this set."""
        return np.arange(len(self))

    def take(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
        """Returns the images and labels at positions of this set."""
        rows = self.indices[positions]
        return self.images[rows], None if self.labels is None else self.labels[rows]

    def split(self, held_out_fraction: float, seed: int) -> tuple["ImageSet", "ImageSet"]:
        """Splits into a training and a held-out set, always the same for one seed.

        Raises:
            DataError: If a positive fraction leaves one of the two sets empty.
        """
        num_held_out = round(len(self) * held_out_fraction)
        if held_out_fraction > 0 and not 0 < num_held_out < len(self):
            raise DataError(
                f"data.validation_fraction {held_out_fraction:g} of {len(self)} images leaves {num_held_out} held out "
                f"and {len(self) - num_held_out} to train on; choose a fraction that leaves some on both sides."
            )
        shuffled = numpy_generator(seed, "held_out").permutation(len(self))
        held_out, training = np.sort(shuffled[:num_held_out]), np.sort(shuffled[num_held_out:])
        return replace(self, indices=self.indices[training]), replace(self, indices=self.indices[held_out])


class SampleOrder:
    """Which position of the data set each sample of a run comes from."""

    def __init__(self, num_positions: int, seed: int) -> None:
        self._num_positions = num_positions
        self._seed = seed
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def positions(self, start: int, stop: int) -> NDArray[np.int64]:
        """Returns the positions of samples start to stop - 1; a batch may straddle epochs."""
        samples = np.arange(start, stop)
        epochs, offsets = samples // self._num_positions, samples % self._num_positions
        parts = [self._permutation(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """Returns the order of one epoch, remembered while it is in use."""
        if epoch not in self._permutations:
            self._permutations = {kept: order for kept, order in self._permutations.items() if kept >= epoch - 1}
            self._permutations[epoch] = numpy_generator(self._seed, "order", epoch).permutation(self._num_positions)
        return self._permutations[epoch]


def normalize(images: torch.Tensor, mirrored: torch.Tensor | None = None) -> torch.Tensor:
    """Turns stored pixels into the network's range, on the device they are on.

    Args:
        images: uint8 (batch, channels, height, width).
        mirrored: bool (batch,), which images to flip left to right; None flips none.

    Returns:
        float32 in [-1, 1] of the same shape.
    """
    pixels = images.to(torch.float32) / 127.5 - 1.0
    if mirrored is None:
        return pixels
    return torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
