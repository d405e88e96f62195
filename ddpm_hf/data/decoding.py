"""One encoded image to pixels, losing nothing in silence."""

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ddpm_hf.data.errors import BadImage, DataError, UnreachableImage
from ddpm_hf.data.geometry import Geometry

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
