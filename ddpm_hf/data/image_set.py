"""A set of decoded images: what is where, which are held out, and what stands in for those that cannot be read."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.data.decode import DataError
from ddpm_hf.rng import numpy_generator


@dataclass(frozen=True)
class UnequalImages:
    """Images of several sizes, one behind the other.

    Args:
        flat: All pixels, each image as (channels, height, width).
        layout: int64 (number, 3): where each image begins, its height and its width.
        num_channels: Of every image.
    """

    flat: NDArray[np.integer]
    layout: NDArray[np.int64]
    num_channels: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the pixels."""
        return self.flat.dtype

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, row: int) -> NDArray[np.integer]:
        """Returns one image (channels, height, width)."""
        start, height, width = self.layout[row].tolist()
        return self.flat[start : start + self.num_channels * height * width].reshape(-1, height, width)


@dataclass(frozen=True)
class ImageSet:
    """Decoded images and their labels.

    Args:
        images: uint8 or uint16 (number, channels, height, width), memory-mapped.
        labels: int64 (number,), or None where the data has none.
        class_names: Names of the classes, or None where there are no labels.
        indices: Rows of `images` that belong to this set.
        crop_size: Height and width to cut out of each image; None where the images are as they are needed.
        bad_rows: Rows of `images` that could not be read, in ascending order.
        digest: What tells the data from others; empty where it is not known.
    """

    images: NDArray[np.integer] | UnequalImages
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None
    indices: NDArray[np.int64]
    crop_size: tuple[int, int] | None = None
    bad_rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    digest: str = ""

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        if isinstance(self.images, UnequalImages):
            assert self.crop_size is not None
            return self.images.num_channels, *self.crop_size
        _, channels, height, width = self.images.shape
        return channels, *(self.crop_size or (height, width))

    @property
    def positions(self) -> NDArray[np.int64]:
        """All positions of this set."""
        return np.arange(len(self))

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Rows of `images` behind each position; the next good image stands in for one that could not be read."""
        if not len(self.bad_rows):
            return self.indices
        is_good = ~np.isin(self.indices, self.bad_rows)
        good = np.flatnonzero(is_good)
        if not len(good):
            raise DataError(f"None of the {len(self)} images of one part of the data can be read; repair them.")
        next_good = good[np.searchsorted(good, np.arange(len(self))) % len(good)]
        return self.indices[next_good]

    @property
    def num_bad(self) -> int:
        """Positions at which another image stands in."""
        return int(np.isin(self.indices, self.bad_rows).sum())

    def take(
        self, positions: NDArray[np.int64], corners: NDArray[np.float32] | None = None
    ) -> tuple[NDArray[np.integer], NDArray[np.int64] | None]:
        """Returns the images and labels at positions of this set.

        Args:
            positions: Which ones.
            corners: float32 (number, 2) in [0, 1): where each crop lies between top and bottom, left and right; None
                takes the centres.

        Returns:
            Pixels (number, channels, height, width), and labels if there are any.
        """
        rows = self.rows[positions]
        labels = None if self.labels is None else self.labels[rows]
        if self.crop_size is None:
            assert not isinstance(self.images, UnequalImages)
            return self.images[rows], labels
        pixels = np.empty((len(rows), *self.image_shape), self.images.dtype)
        height, width = self.crop_size
        origins = self.crop_origins(positions, corners)
        for number, (row, (top, left)) in enumerate(zip(rows.tolist(), origins.tolist(), strict=True)):
            pixels[number] = self.images[row][:, top : top + height, left : left + width]
        return pixels, labels

    def crop_origins(
        self, positions: NDArray[np.int64], corners: NDArray[np.float32] | None = None
    ) -> NDArray[np.int64]:
        """Returns top and left of the crops that `take` cuts out, int64 (number, 2)."""
        assert self.crop_size is not None
        if isinstance(self.images, UnequalImages):
            sizes = self.images.layout[self.rows[positions], 1:]
        else:
            sizes = np.broadcast_to(self.images.shape[2:], (len(positions), 2))
        rooms: NDArray[np.int64] = sizes - np.asarray(self.crop_size)
        centers: NDArray[np.int64] = rooms // 2
        # In float64, since the largest float32 below 1 times the number of places may round up to it.
        return centers if corners is None else (corners.astype(np.float64) * (rooms + 1)).astype(np.int64)

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
