"""Which part of an image is kept, and at what size: crop, resize with antialiasing, crop again."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm_hf.config import DataConfig
from ddpm_hf.data.errors import DataError


@dataclass(frozen=True)
class Geometry:
    """The part of the transform that comes before the cache; random crops come after it.

    Args:
        first_crop: Side of a square in the centre, or (left, top, right, bottom), cut out before anything else.
        size: Height and width of what the network sees; None keeps the image as it is.
        scale: How much larger than `size` images are resized to; None does not resize.
        resize_filter: Name of Pillow's filter.
        is_random_crop: Whether `size` is cut out later, at random, instead of here, out of the centre.
    """

    first_crop: int | tuple[int, ...] | None
    size: tuple[int, int] | None
    scale: float | None
    resize_filter: str
    is_random_crop: bool

    @classmethod
    def of(cls, config: DataConfig) -> "Geometry":
        """Returns the geometry that the settings ask for."""
        resolution, first_crop = config.resolution, config.crop_before_resize
        height_and_width = [resolution, resolution] if isinstance(resolution, int) else resolution
        size = None if height_and_width is None else (height_and_width[0], height_and_width[1])
        scale: float | None = 1.0
        if config.resize_to == 0:
            scale = None
        elif config.resize_to is not None and size:
            scale = config.resize_to / min(size)
        return cls(
            first_crop=tuple(first_crop) if isinstance(first_crop, list) else first_crop,
            size=size,
            scale=scale,
            resize_filter=config.resize_filter,
            is_random_crop=config.crop == "random",
        )

    def size_after(self, width: int, height: int, name: str) -> tuple[int, int]:
        """Returns the height and width that an image will have.

        Raises:
            DataError: If a crop does not fit into the image.
        """
        left, top, right, bottom = self._first_box(width, height, name)
        _, (new_width, new_height) = self._box_and_size(right - left, bottom - top, name)
        return new_height, new_width

    def _box_and_size(
        self, width: int, height: int, name: str
    ) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
        """Returns which box (left, top, right, bottom) of an image becomes an image of which width and height."""
        if self.size is None:
            return (0, 0, width, height), (width, height)
        target_height, target_width = self.size
        if self.scale is None and (width < target_width or height < target_height):
            raise DataError(
                f"{name} has {width}x{height} pixels, too few to cut {target_width}x{target_height} out of it; lower "
                "data.resolution, or let images be resized by leaving data.resize_to out."
            )
        ratio = 1.0 if self.scale is None else self.scale * max(target_width / width, target_height / height)
        if self.is_random_crop:
            size = max(round(width * ratio), target_width), max(round(height * ratio), target_height)
            return (0, 0, width, height), size
        box_width, box_height = target_width / ratio, target_height / ratio
        # A quotient of rounded numbers may exceed the side by its last digit.
        left, top = max((width - box_width) / 2, 0.0), max((height - box_height) / 2, 0.0)
        if ratio == 1:  # whole pixels are cut out, never blurred by half a pixel
            left, top = left // 1, top // 1
        right, bottom = min(left + box_width, width), min(top + box_height, height)
        return (left, top, right, bottom), (target_width, target_height)

    def apply(self, pixels: NDArray[np.integer], name: str) -> NDArray[np.integer]:
        """Crops and resizes an image of shape (height, width, channels).

        Raises:
            DataError: If a crop does not fit into the image, or it cannot be resized.
        """
        height, width, _ = pixels.shape
        left, top, right, bottom = self._first_box(width, height, name)
        # Cut before it is resized, so that no filter sees what lies outside.
        pixels = pixels[top:bottom, left:right]
        box, size = self._box_and_size(right - left, bottom - top, name)
        if box[2] - box[0] == size[0] and box[3] - box[1] == size[1]:
            left, top = round(box[0]), round(box[1])
            return pixels[top : top + size[1], left : left + size[0]]
        try:
            return _resample(pixels, box, size, Image.Resampling[self.resize_filter.upper()])
        except ValueError as error:
            raise DataError(f"{name} has {width}x{height} pixels and cannot be resized ({error}).") from error

    def _first_box(self, width: int, height: int, name: str) -> tuple[int, int, int, int]:
        """Returns what is cut out before anything else."""
        if self.first_crop is None:
            return 0, 0, width, height
        if isinstance(self.first_crop, int):
            side = self.first_crop
            left, top = (width - side) // 2, (height - side) // 2
            box = (left, top, left + side, top + side)
        else:
            box = (self.first_crop[0], self.first_crop[1], self.first_crop[2], self.first_crop[3])
        if box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height:
            raise DataError(
                f"{name} has {width}x{height} pixels, too few for data.crop_before_resize "
                f"{list(self.first_crop) if isinstance(self.first_crop, tuple) else self.first_crop}; choose a smaller "
                "crop."
            )
        return box


def _resample(
    pixels: NDArray[np.integer],
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    resize_filter: Image.Resampling,
) -> NDArray[np.integer]:
    """Resizes a box of an image (height, width, channels) of any depth and number of channels."""
    channels = pixels.shape[2]
    if pixels.dtype == np.uint8 and channels in (1, 3, 4):
        # Pillow weighs the colours of RGBA by their opacity, so that what cannot be seen does not bleed in.
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels).resize(size, resize_filter, box)
        return np.asarray(image).reshape(size[1], size[0], channels)
    # Float planes hold 16 bits exactly.
    values = pixels.astype(np.float32)
    if channels == 4:
        values[..., :3] *= values[..., 3:]
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(values, -1, 0)]
    values = np.stack([np.asarray(plane.resize(size, resize_filter, box)) for plane in planes], axis=-1)
    if channels == 4:
        values[..., :3] /= np.maximum(values[..., 3:], 1e-6)
    highest = np.iinfo(pixels.dtype).max
    return np.rint(values).clip(0, highest).astype(pixels.dtype)
