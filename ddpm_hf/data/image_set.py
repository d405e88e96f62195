"""A set of decoded images and labels: selection, replacement of unreadable images, crops, and the validation split."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.data.decode import DataError, Pixels, ValueRange, to_uint8
from ddpm_hf.rng import numpy_generator


@dataclass(frozen=True)
class UnequalImages:
    """Images of different sizes, stored one after the other.

    Args:
        flat: All pixels; each image is (channels, height, width).
        layout: int64 (number, 3): offset, height and width of each image.
        num_channels: Channels of every image.
    """

    flat: Pixels
    layout: NDArray[np.int64]
    num_channels: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the pixels."""
        return self.flat.dtype

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, row: int) -> Pixels:
        """Return one image (channels, height, width)."""
        start, height, width = self.layout[row].tolist()
        return self.flat[start : start + self.num_channels * height * width].reshape(-1, height, width)


@dataclass(frozen=True)
class ImageSet:
    """Decoded images and their labels.

    Args:
        images: uint8, uint16, int16, float16 or float32 (number, channels, height, width), usually memory-mapped.
        labels: int64 (number,), or None if the data have none.
        class_names: Names of the classes, or None if there are no labels.
        indices: Rows of `images` in this set.
        crop_size: Height and width of the crop of each image; None if the images are used as they are.
        bad_rows: Rows of `images` that could not be decoded, in ascending order.
        digest: Identifies the data; empty if unknown.
        location: Where another process finds the same arrays, as JSON; None if they are only in memory.
        value_range: The values that become -1 and 1; None for 0 and the largest value of the type.
    """

    images: Pixels | UnequalImages
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None
    indices: NDArray[np.int64]
    crop_size: tuple[int, int] | None = None
    bad_rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    digest: str = ""
    location: dict[str, Any] | None = None
    value_range: ValueRange | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image after cropping."""
        if isinstance(self.images, UnequalImages):
            assert self.crop_size is not None
            return self.images.num_channels, *self.crop_size
        _, channels, height, width = self.images.shape
        return channels, *(self.crop_size or (height, width))

    @property
    def positions(self) -> NDArray[np.int64]:
        """All positions of this set, int64 (len(self),)."""
        return np.arange(len(self))

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Row of `images` at each position; a bad row is replaced by the next good one of this set."""
        if not len(self.bad_rows):
            return self.indices
        good = np.flatnonzero(~np.isin(self.indices, self.bad_rows))
        if not len(good):
            raise DataError(
                f"none of the {len(self)} images of the training or validation set can be read; repair them."
            )
        next_good = good[np.searchsorted(good, np.arange(len(self))) % len(good)]
        return self.indices[next_good]

    @property
    def num_bad(self) -> int:
        """Number of positions with a replacement."""
        return int(np.isin(self.indices, self.bad_rows).sum())

    def take(
        self, positions: NDArray[np.int64], corners: NDArray[np.float32] | None = None
    ) -> tuple[Pixels, NDArray[np.int64] | None]:
        """Return images and labels.

        Args:
            positions: Positions in this set, int64 (number,).
            corners: float32 (number, 2) in [0, 1): relative vertical and horizontal position of each crop; None crops
                from the center.

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

    def pictures(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return images, cropped from the center, as 8-bit pictures (number, channels, height, width)."""
        return to_uint8(self.take(positions)[0], self.value_range)

    def crop_origins(
        self, positions: NDArray[np.int64], corners: NDArray[np.float32] | None = None
    ) -> NDArray[np.int64]:
        """Return top and left of the crops of `take`, int64 (number, 2)."""
        assert self.crop_size is not None
        if isinstance(self.images, UnequalImages):
            sizes = self.images.layout[self.rows[positions], 1:]
        else:
            sizes = np.broadcast_to(self.images.shape[2:], (len(positions), 2))
        margins: NDArray[np.int64] = sizes - np.asarray(self.crop_size)
        centers: NDArray[np.int64] = margins // 2
        # In float64: in float32, the largest number below 1 times (margin + 1) may round up to margin + 1.
        return centers if corners is None else (corners.astype(np.float64) * (margins + 1)).astype(np.int64)

    def split(self, validation_fraction: float, seed: int) -> tuple["ImageSet", "ImageSet"]:
        """Split into a training set and a validation set, chosen by the seed.

        Raises:
            DataError: A positive fraction leaves one of the sets empty.
        """
        num_validation = round(len(self) * validation_fraction)
        if validation_fraction > 0 and not 0 < num_validation < len(self):
            raise DataError(
                f"data.validation_fraction {validation_fraction:g} of {len(self)} images leaves "
                f"{len(self) - num_validation} for training and {num_validation} for validation; choose a fraction "
                "that leaves some for both."
            )
        # The name of the stream is that of version 0.1, so that the sets stay the same.
        shuffled = numpy_generator(seed, "held_out").permutation(len(self))
        validation, training = np.sort(shuffled[:num_validation]), np.sort(shuffled[num_validation:])
        return replace(self, indices=self.indices[training]), replace(self, indices=self.indices[validation])
