"""Samples of a run, by their number, on the device and in the network's range."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_hf.config import DataConfig
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.image_set import ImageSet, UnequalImages
from ddpm_hf.data.order import SampleOrder
from ddpm_hf.data.pixels import as_bits, cut_out, normalize

AUTO_SHARE_OF_DEVICE = 0.1
"""Share of a GPU's memory that images may take without being asked to."""


class ImageFeed:
    """Gives any consecutive samples of a run; what was asked for before makes no difference.

    Args:
        images: The training images.
        config: Whether to mirror, to crop at random, and to keep the images on the device.
        seed: The seed of the run.
        device: Where the samples are needed.

    Raises:
        DataError: If the images are to be kept on a device that has no room for them.
    """

    def __init__(self, images: ImageSet, config: DataConfig, seed: int, device: torch.device) -> None:
        self._images = images
        self._order = SampleOrder(len(images), seed)
        self._device = device
        self._flips = config.random_flip
        self._crops = config.crop == "random" and images.crop_size is not None
        self._resident = _move_to_device(images, config, device)

    @property
    def is_resident(self) -> bool:
        """Whether all images are in the memory of the device."""
        return self._resident is not None

    def samples(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns samples start to stop - 1 of the run.

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
            stored, labels = self._pick(positions, corners)
        return normalize(stored, mirrored), None if labels is None else to_device(labels, self._device)

    def numbers(self, start: int, stop: int) -> NDArray[np.int64]:
        """Returns which images of the data set samples start to stop - 1 are, int64 (number,)."""
        numbers: NDArray[np.int64] = self._images.rows[self._order.positions(start, stop)]
        return numbers

    def _pick(
        self, positions: NDArray[np.int64], corners: NDArray[np.float32] | None
    ) -> tuple[torch.Tensor, NDArray[np.int64] | None]:
        """Does what `ImageSet.take` does where the images already are; only indices are moved."""
        assert self._resident is not None
        rows = self._images.rows[positions]
        labels = None if self._images.labels is None else self._images.labels[rows]
        stored = as_bits(self._resident).index_select(0, to_device(rows, self._device))
        if self._images.crop_size is not None:
            origins = to_device(self._images.crop_origins(positions, corners), self._device)
            stored = cut_out(stored, origins, self._images.crop_size)
        return stored.view(self._resident.dtype), labels


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copies an array to the device without making the host wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _move_to_device(images: ImageSet, config: DataConfig, device: torch.device) -> torch.Tensor | None:
    """Returns all images on the device, or None where they stay in their file."""
    wanted = config.device_resident
    if wanted is False or (wanted == "auto" and device.type != "cuda"):
        return None
    stored = images.images
    if isinstance(stored, UnequalImages):
        if wanted is True:
            raise DataError(
                "data.device_resident needs images of one size, but data.crop random keeps them as they are; set it "
                "to false, or data.crop to center."
            )
        return None
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if wanted == "auto" and stored.nbytes > AUTO_SHARE_OF_DEVICE * total:
            return None
        if stored.nbytes > free:
            raise DataError(
                f"data.device_resident asks for {stored.nbytes / 2**30:.1f} GiB of images on the device, which has "
                f"{free / 2**30:.1f} GiB free; set it to false."
            )
    return torch.from_numpy(np.array(stored)).to(device)
