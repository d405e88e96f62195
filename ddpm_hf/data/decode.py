"""One image: header, pixels, geometry and value range.

What is said of data that cannot be trained on.

Which part of an image is kept, and at what size: crop, resize with antialiasing, crop again.

Stored pixels to the network's range and back, on whatever device they are.

One encoded image to pixels, losing nothing in silence.
"""

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ddpm_hf.config import DataConfig


class DataError(ValueError):
    """Data that cannot be trained on; the message names the first offender and what to do."""


class BadImage(DataError):
    """One image that cannot be read, whatever the settings; data.on_bad_image says what follows."""


class UnreachableImage(BadImage):
    """One image that the system does not hand out, which may change without the image being written anew."""


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


_HALF_RANGE = {torch.uint8: 127.5, torch.uint16: 32767.5}


def normalize(images: torch.Tensor, mirrored: torch.Tensor | None = None) -> torch.Tensor:
    """Turns stored pixels into the network's range.

    Args:
        images: uint8 or uint16 (batch, channels, height, width).
        mirrored: bool (batch,), which images to flip left to right; None flips none.

    Returns:
        float32 in [-1, 1] of the same shape: 0 becomes -1, the highest value 1.
    """
    half_range = _HALF_RANGE[images.dtype]
    if mirrored is not None:  # while they are small
        bits = as_bits(images)
        images = torch.where(mirrored[:, None, None, None], bits.flip(-1), bits).view(images.dtype)
    return images.to(torch.float32).div_(half_range).sub_(1.0)


def as_bits(images: torch.Tensor) -> torch.Tensor:
    """Returns uint16 as int16 with the same bits, since torch can move uint16 about in few ways; others as they are."""
    return images.view(torch.int16) if images.dtype == torch.uint16 else images


def cut_out(images: torch.Tensor, origins: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Cuts a rectangle out of each image, without the host waiting for the device.

    Args:
        images: (batch, channels, height, width).
        origins: int64 (batch, 2), top and left of each rectangle.
        size: Height and width of the rectangles.

    Returns:
        (batch, channels, *size) of the same dtype.
    """
    rows = origins[:, 0, None] + torch.arange(size[0], device=images.device)
    columns = origins[:, 1, None] + torch.arange(size[1], device=images.device)
    batch = torch.arange(len(images), device=images.device)
    # Indices on both sides of the channels put them last.
    cut = images[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()


def to_uint8(pixels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Returns 16-bit pixels as the nearest of 8 bits, to be looked at or judged; 8-bit ones as they are."""
    if pixels.dtype == np.uint8:
        return pixels.view(np.uint8)
    return np.rint(pixels / 257).astype(np.uint8)


Pixels: TypeAlias = NDArray[np.integer]

MODE_OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
# What is read; nothing else is tried, since some of Pillow's other formats start programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
# Modes that hold the same picture in another coding, and the plain mode that keeps all of it.
_PLAIN_MODE = {
    "1": "L", "L": "L", "RGB": "RGB", "RGBA": "RGBA", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "LA": "RGBA",
    "PA": "RGBA", "RGBa": "RGBA", "La": "RGBA", "RGBX": "RGB",
}  # fmt: skip
_DEEP_GRAY = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_DEEP_CODING = re.compile(r"[A-Za-z]+;16[BLN]")
_TURNED_BY_EXIF = (5, 6, 7, 8)  # orientations that swap width and height
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Cell:
    """One image as its source holds it.

    Args:
        name: What to call it in a message: its row, and its file with the class folder.
        data: Encoded bytes, the path of a file, or pixels (height, width, channels).
        problem: Why there are no data, if so.
    """

    name: str
    data: bytes | Path | Pixels | None
    problem: str = "it is missing"

    @property
    def num_bytes(self) -> int:
        """How long the data are; 0 where there are none."""
        if isinstance(self.data, Path):
            try:
                return self.data.stat().st_size
            except OSError:
                return 0
        return 0 if self.data is None else len(self.data) if isinstance(self.data, bytes) else self.data.nbytes

    def read(self) -> bytes:
        """Returns the encoded bytes, or those of the pixels.

        Raises:
            BadImage: If there are none.
        """
        if self.data is None:
            raise BadImage(f"{self.name} cannot be read ({self.problem}).")
        if isinstance(self.data, np.ndarray):
            return self.data.tobytes()
        try:
            if isinstance(self.data, Path) and self.data.exists() and not self.data.is_file():
                raise BadImage(f"{self.name} cannot be read (it is no regular file).")
            data = self.data.read_bytes() if isinstance(self.data, Path) else self.data
        except OSError as error:
            raise UnreachableImage(f"{self.name} cannot be read ({error.strerror or error}).") from None
        if not data:
            raise BadImage(f"{self.name} is empty (0 bytes).")
        return data


@dataclass(frozen=True)
class Header:
    """What can be known of an image without decoding it.

    Args:
        stored_mode: How the file holds the pixels, in Pillow's words.
        mode: The plain mode that keeps all of it: L, RGB or RGBA; of an array the number of channels.
        is_deep: Whether it has 16 bits a channel.
        width: In pixels, as it is shown.
        height: In pixels, as it is shown.
        num_frames: More than 1 in an animation, of which the first frame is used.
    """

    stored_mode: str
    mode: str
    is_deep: bool
    width: int
    height: int
    num_frames: int


@dataclass(frozen=True)
class Target:
    """What every image of a set becomes.

    Args:
        num_channels: 1, 3 or 4, or any number that the arrays have.
        dtype: uint8 or uint16.
        background: Colour behind transparent pixels where there is no alpha channel; None refuses them.
        geometry: Crop and size.
    """

    num_channels: int
    dtype: np.dtype[Any]
    background: str | None
    geometry: Geometry


def read_header(cell: Cell) -> Header:
    """Reads the size and kind of an image.

    Raises:
        BadImage: If it is no image that can be decoded.
    """
    if isinstance(cell.data, np.ndarray):
        height, width, channels = cell.data.shape
        mode = MODE_OF_CHANNELS.get(channels, str(channels))
        return Header(str(cell.data.dtype), mode, cell.data.dtype == np.uint16, width, height, 1)
    with _opened(cell) as image:
        is_deep = image.mode in _DEEP_GRAY or _has_deep_colours(image)
        width, height = image.size
        # The tags of a PNG may lie behind its pixels; what is not seen here is seen when it is decoded. Pillow tells
        # the size of a TIFF as it is shown.
        has_tags = "exif" in image.info if image.format == "PNG" else image.format != "TIFF"
        if has_tags and _orientation(image) in _TURNED_BY_EXIF:
            width, height = height, width
        mode = "L" if image.mode in _DEEP_GRAY else _plain_mode(image)
        stored_mode = f"{image.mode};16" if is_deep and image.mode in ("RGB", "RGBA") else image.mode
        return Header(stored_mode, mode, is_deep, width, height, _num_frames(image))


def decode(cell: Cell, target: Target) -> Pixels:
    """Decodes one image.

    Args:
        cell: The image.
        target: What it becomes.

    Returns:
        Pixels (channels, height, width) of the target's dtype.

    Raises:
        BadImage: If the image cannot be decoded.
        DataError: If it does not fit the target without losing something.
    """
    pixels = cell.data if isinstance(cell.data, np.ndarray) else _pixels_of_file(cell)
    pixels = _convert(pixels, target, cell.name)
    if pixels.dtype != target.dtype:
        pixels = pixels.astype(np.uint16) * np.uint16(257)  # 255 becomes 65535
    pixels = target.geometry.apply(pixels, cell.name)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


@contextmanager
def _opened(cell: Cell) -> Iterator[Image.Image]:
    """Opens an image file that Pillow reads without danger; what goes wrong inside is told of the image."""
    source: io.BytesIO | Path
    if isinstance(cell.data, Path):
        source = cell.data
        if not source.is_file() or source.stat().st_size == 0:
            cell.read()
    else:
        source = io.BytesIO(cell.read())
    try:
        with Image.open(source, formats=_FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS  # Pillow warns above this, and raises above twice as many
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError
            # Whole numbers of 32 bits have a known range only where a format has no more than 16.
            is_gray = image.mode in _DEEP_GRAY and (image.mode != "I" or image.format in ("PNG", "PPM"))
            if image.mode not in _PLAIN_MODE and not is_gray:
                raise BadImage(f"{cell.name} has mode {image.mode}; convert it to 8 or 16 bits of L, RGB or RGBA.")
            yield image
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise BadImage(
            f"{cell.name} has more than the {Image.MAX_IMAGE_PIXELS:,} pixels from which on Pillow suspects a "
            "decompression bomb; make it smaller."
        ) from None
    except UnidentifiedImageError:
        raise BadImage(f"{cell.name} cannot be decoded (it is no image of a known format).") from None
    except Exception as error:  # Pillow raises many types for damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise UnreachableImage(f"{cell.name} cannot be read ({error.strerror}).") from None
        reason = " ".join(str(error).split()) or "no reason given"
        raise BadImage(f"{cell.name} cannot be decoded ({type(error).__name__}: {reason}).") from error


def _plain_mode(image: Image.Image) -> str:
    """Returns the plain mode that keeps all of an image of 8 bits."""
    return "RGBA" if image.has_transparency_data else _PLAIN_MODE[image.mode]


def _num_frames(image: Image.Image) -> int:
    """Returns the number of frames of an animation, or of pages."""
    # A photo may carry a small copy of itself as a second frame (MPO); that is no animation.
    return int(getattr(image, "n_frames", 1)) if image.format in ("GIF", "WEBP", "PNG", "TIFF", "AVIF") else 1


def _orientation(image: Image.Image) -> int:
    """Returns how a photo is to be turned; tags that cannot be read turn nothing."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        return 1


def _upright(image: Image.Image) -> Image.Image:
    """Turns a photo as its camera says."""
    image.load()
    return ImageOps.exif_transpose(image) if _orientation(image) in range(2, 9) else image


def _pixels_of_file(cell: Cell) -> Pixels:
    """Decodes an image file to (height, width, channels) with all its bits."""
    with _opened(cell) as image:
        if _has_deep_colours(image):
            return _deep_colours(cell, image)
        if image.mode in _DEEP_GRAY:
            return np.asarray(_upright(image)).astype(np.uint16)[..., None]
        mode = _plain_mode(image)
        upright = _upright(image)
        pixels = np.asarray(upright if upright.mode == mode else upright.convert(mode))
        return pixels[..., None] if pixels.ndim == 2 else pixels


def _has_deep_colours(image: Image.Image) -> bool:
    """Tells whether Pillow would cut colours of 16 bits down to 8."""
    return image.mode in ("RGB", "RGBA") and any(_DEEP_CODING.fullmatch(_coding(tile)) for tile in _tiles(image))


def _tiles(image: Image.Image) -> list[Any]:
    """Returns what Pillow is about to decode, and how."""
    return list(getattr(image, "tile", []))


def _coding(tile: Any) -> str:
    """Returns the name of the coding that Pillow reads, such as "RGB;16B" (two bytes a colour, the big end first)."""
    return str(tile.args if isinstance(tile.args, str) or not tile.args else tile.args[0])


def _deep_colours(cell: Cell, image: Image.Image) -> Pixels:
    """Decodes colours of 16 bits: Pillow gives the high byte of each, and the low one if told the other byte order."""
    with _opened(cell) as again:
        vars(again)["tile"] = [_in_other_byte_order(tile) for tile in _tiles(again)]
        high, low = np.asarray(_upright(image)), np.asarray(_upright(again))
    pixels: Pixels = high.astype(np.uint16) << np.uint16(8) | low
    return pixels


def _in_other_byte_order(tile: Any) -> Any:
    """Returns a tile as if its colours were stored the other way round."""
    coding = _coding(tile)
    is_big = coding[-1] == "B" or (coding[-1] == "N" and sys.byteorder == "big")
    other = coding[:-1] + ("L" if is_big else "B")
    return tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:]))


def _convert(pixels: Pixels, target: Target, name: str) -> Pixels:
    """Gives an image the channels of its data set where nothing is lost by it."""
    have, want = pixels.shape[2], target.num_channels
    highest = np.iinfo(pixels.dtype).max
    if have == want:
        return pixels
    if have not in MODE_OF_CHANNELS or want not in MODE_OF_CHANNELS:
        raise DataError(f"{name} has {have} channels where {want} are asked for; set data.num_channels to {have}.")
    if have == 4:
        colours, alpha = pixels[..., :3], pixels[..., 3:]
        if (alpha < highest).any():
            if target.background is None:
                raise DataError(
                    f"{name} has transparent pixels where {MODE_OF_CHANNELS[want]} is asked for; set data.num_channels "
                    "to 4, or data.background to white or black."
                )
            opacity = alpha.astype(np.float64) / highest
            behind = highest if target.background == "white" else 0
            colours = np.rint(colours * opacity + behind * (1 - opacity)).astype(pixels.dtype)
        pixels, have = colours, 3
    if have == 3 and want == 1:
        if (pixels != pixels[..., :1]).any():
            raise DataError(
                f"{name} has colours where gray (L) is asked for, which would lose channels; set data.num_channels to "
                "3 or convert the images."
            )
        return pixels[..., :1]
    if have == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    if want == 4:
        pixels = np.concatenate([pixels, np.full_like(pixels[..., :1], highest)], axis=2)
    return pixels


def num_threads() -> int:
    """Returns how many images are decoded at a time: as many as there are cores for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
