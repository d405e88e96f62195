"""Data loading: which sample comes when, and the sample itself on the device.

Sample n of a run is position n mod N of epoch n // N, so batches may span two epochs and nothing is dropped. The order
and the augmentation of an epoch are functions of (seed, epoch, image). A sample is therefore a function of (seed, n):
it does not depend on the batch size, on the number of processes, or on what was loaded before.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_hf.config import DataConfig
from ddpm_hf.data.decode import DataError, as_bits, normalize
from ddpm_hf.data.image_set import ImageSet, UnequalImages
from ddpm_hf.files import format_bytes
from ddpm_hf.rng import numpy_generator

_MAX_AUTO_FRACTION_OF_DEVICE = 0.1
"""`data.device_resident` auto keeps the images on a GPU if they need at most this fraction of its memory."""
_BYTES_PER_COPY = 2**28


class SampleOrder:
    """Order and augmentation of the samples of a run.

    Args:
        num_images: Number of training images.
        seed: The seed of the run.
    """

    def __init__(self, num_images: int, seed: int) -> None:
        self._num_images = num_images
        self._seed = seed
        self._tables: dict[tuple[str, int], NDArray[Any]] = {}

    def positions(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the positions in the training set of samples start to stop - 1, int64 (number,)."""
        samples = np.arange(start, stop)
        return self._look_up(
            "order",
            lambda generator: generator.permutation(self._num_images),
            samples // self._num_images,
            samples % self._num_images,
        )

    def is_mirrored(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return which of the samples start to stop - 1 are flipped, each with probability 1/2."""
        return self._look_up(
            "flip",
            lambda generator: generator.integers(0, 2, self._num_images, dtype=np.bool_),
            np.arange(start, stop) // self._num_images,
            self.positions(start, stop),
        )

    def corners(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return the relative crop positions of samples start to stop - 1, uniform in [0, 1), (number, 2): y, x."""
        return self._look_up(
            "crop",
            lambda generator: generator.random((self._num_images, 2), dtype=np.float32),
            np.arange(start, stop) // self._num_images,
            self.positions(start, stop),
        )

    def _look_up(
        self,
        stream: str,
        draw: Callable[[np.random.Generator], NDArray[Any]],
        epochs: NDArray[np.int64],
        indices: NDArray[np.int64],
    ) -> NDArray[Any]:
        """Return the values of samples from the tables of their epochs."""
        parts = []
        for epoch in np.unique(epochs).tolist():
            table = self._tables.get((stream, epoch))
            if table is None:
                table = draw(numpy_generator(self._seed, stream, epoch))
                # A batch may span two epochs, so the previous one is still needed. The dictionary is replaced and not
                # changed: a prefetch thread may read it at the same time.
                kept = {key: kept for key, kept in self._tables.items() if key[1] >= epoch - 1}
                self._tables = kept | {(stream, epoch): table}
            parts.append(table[indices[epochs == epoch]])
        return np.concatenate(parts)


class ImageLoader:
    """Load any consecutive samples of a run.

    Args:
        images: The training set.
        config: Augmentation, and whether to keep the images in device memory.
        seed: The seed of the run.
        device: Device of the samples.

    Raises:
        DataError: The images do not fit into the memory of the device.
    """

    def __init__(self, images: ImageSet, config: DataConfig, seed: int, device: torch.device) -> None:
        self._images = images
        self._order = SampleOrder(len(images), seed)
        self._device = device
        self._flips = config.random_flip
        self._crops = config.crop == "random" and images.crop_size is not None
        self._resident = copy_to_device(images.images, config, device)

    @property
    def is_resident(self) -> bool:
        """Whether all images are in device memory."""
        return self._resident is not None

    def samples(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return samples start to stop - 1 of the run.

        Returns:
            float32 images in [-1, 1], (number, channels, height, width), and int64 labels if there are any.
        """
        positions = self._order.positions(start, stop)
        corners = self._order.corners(start, stop) if self._crops else None
        mirrored = to_device(self._order.is_mirrored(start, stop), self._device) if self._flips else None
        if self._resident is None:
            pixels, labels = self._images.take(positions, corners)
            stored = to_device(pixels, self._device)
        else:
            stored, labels = self._take_on_device(self._resident, positions, corners)
        images = normalize(stored, mirrored, self._images.value_range)
        return images, None if labels is None else to_device(labels, self._device)

    def numbers(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the rows in the dataset of samples start to stop - 1, int64 (number,)."""
        numbers: NDArray[np.int64] = self._images.rows[self._order.positions(start, stop)]
        return numbers

    def _take_on_device(
        self, resident: torch.Tensor, positions: NDArray[np.int64], corners: NDArray[np.float32] | None
    ) -> tuple[torch.Tensor, NDArray[np.int64] | None]:
        """Do what `ImageSet.take` does on the device; only indices are transferred."""
        rows = self._images.rows[positions]
        labels = None if self._images.labels is None else self._images.labels[rows]
        stored = as_bits(resident).index_select(0, to_device(rows, self._device))
        if self._images.crop_size is not None:
            origins = to_device(self._images.crop_origins(positions, corners), self._device)
            stored = crop_batch(stored, origins, self._images.crop_size)
        return stored.view(resident.dtype), labels


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to a device without synchronizing."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def crop_batch(images: torch.Tensor, origins: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Crop each image of a batch at its own place, without synchronizing.

    Args:
        images: (batch, channels, height, width).
        origins: int64 (batch, 2), top and left of each crop.
        size: Height and width of the crops.

    Returns:
        (batch, channels, *size) of the same dtype.
    """
    rows = origins[:, 0, None] + torch.arange(size[0], device=images.device)
    columns = origins[:, 1, None] + torch.arange(size[1], device=images.device)
    return take_pixels(images, rows, columns)


def take_pixels(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Take some rows and columns of each image of a batch, without synchronizing.

    Args:
        images: (batch, channels, height, width).
        rows: int64 (batch, new height).
        columns: int64 (batch, new width).

    Returns:
        (batch, channels, new height, new width) of the same dtype.
    """
    batch = torch.arange(len(images), device=images.device)
    # Index tensors on both sides of a slice move the sliced dimension to the end.
    taken = images[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return taken.permute(0, 3, 1, 2).contiguous()


def copy_to_device(
    stored: NDArray[Any] | UnequalImages, config: DataConfig, device: torch.device
) -> torch.Tensor | None:
    """Copy all stored images, or their latents, to the device, or return None if they stay in their file.

    Raises:
        DataError: They do not fit into the memory of the device, or have different sizes.
    """
    wanted = config.device_resident
    if wanted is False or (wanted == "auto" and device.type != "cuda"):
        return None
    if isinstance(stored, UnequalImages):
        if wanted is True:
            raise DataError(
                "data.device_resident needs images of one size, but data.crop random keeps their sizes; set it to "
                "false, or data.crop to center."
            )
        return None
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if wanted == "auto" and stored.nbytes > _MAX_AUTO_FRACTION_OF_DEVICE * total:
            return None
        if stored.nbytes > free:
            raise DataError(
                f"data.device_resident needs {format_bytes(stored.nbytes)} for the images, but {device} has "
                f"{format_bytes(free)} free; set it to false."
            )
    # In parts, so that the images are never all in host memory.
    dtype = torch.from_numpy(np.empty(0, stored.dtype)).dtype
    resident = torch.empty(stored.shape, dtype=dtype, device=device)
    num_rows = max(1, _BYTES_PER_COPY // max(1, stored[:1].nbytes))
    for start in range(0, len(stored), num_rows):
        resident[start : start + num_rows] = torch.from_numpy(np.array(stored[start : start + num_rows]))
    return resident
