"""One image: header, pixels, geometry and value range.

`read_header` returns the properties of an `EncodedImage` without decoding it, `decode` returns its pixels in an
`OutputFormat`, and `normalize` maps stored pixels to the range of the network. Nothing is lost silently: an image that
does not fit the output format is an error.
"""

import io
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ddpm_hf.config import DataConfig
from ddpm_hf.data.numeric import File, MissingLibraryError, Numbers, is_dicom, open_numbers

logger = logging.getLogger(__name__)

Pixels: TypeAlias = NDArray[np.integer | np.floating]
ValueRange: TypeAlias = tuple[float, float]
"""The values that become -1 and 1."""


class DataError(ValueError):
    """Data that cannot be used for training. The message names the first affected image or setting, and the fix."""


class BadImage(DataError):
    """An image that cannot be decoded with any settings; `data.on_bad_image` decides what happens."""


def bad_image_error(message: str) -> DataError:
    """Return the error for a `BadImage` with this message if `data.on_bad_image` is error."""
    return DataError(f"{message.removesuffix('.')}; repair or remove it, or set data.on_bad_image to skip.")


def unknown_range(name: str, dtype: object) -> DataError:
    """Return the error for values whose range no type says."""
    return DataError(
        f"{name} has {dtype} values, whose range is unknown; set data.value_range to [low, high], the values that "
        "become -1 and 1, or to auto."
    )


class UnreachableImage(BadImage):
    """An image that the operating system could not read. It may become readable without being modified."""


STORED_DTYPES = ("uint8", "uint16", "int16", "float16", "float32")
"""Types of decoded images. Other values are stored in the first one that holds all of them, at most float32."""
MODE_OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
# Pillow opens no other formats, because some of its plugins start external programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
LFS_POINTER = b"version https://git-lfs"
"""Start of the file that a repository contains in place of a large one."""
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
# 8-bit modes and the mode that they convert to without loss.
_CANONICAL_MODE = {
    "1": "L", "L": "L", "RGB": "RGB", "RGBA": "RGBA", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "LA": "RGBA",
    "PA": "RGBA", "RGBa": "RGBA", "La": "RGBA", "RGBX": "RGB",
}  # fmt: skip
_GRAY_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"""Modes of one channel with more than 8 bits."""
_COLOR_16_BIT_CODING = re.compile(r"[A-Za-z]+;16[BLN]")
_TIFF_BITS_PER_SAMPLE, _EXIF_ORIENTATION, _TIFF_PLANAR_CONFIGURATION, _TIFF_SAMPLE_FORMAT = 258, 274, 284, 339
_MAX_CHANNELS = 4
"""An array may have as many values as the largest picture."""
_FEWEST_STEPS = 2**12
"""A warning is printed if float32 has fewer steps in the value range."""
_SUFFIXES_OF_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_STARTS_OF_PICTURES = (b"\x89PNG", b"\xff\xd8\xff")
"""Those of the frequent files that are pictures in any case."""
_ORIENTATIONS_THAT_SWAP_SIDES = (5, 6, 7, 8)


@dataclass(frozen=True)
class EncodedImage:
    """One image as stored in its source.

    Args:
        name: How messages refer to it: its row, and its file with the class folder.
        data: Encoded bytes, the path of a file, or pixels (height, width, channels).
        problem: The reason if `data` is None.
    """

    name: str
    data: bytes | Path | Pixels | None
    problem: str = "it is missing"

    @property
    def num_bytes(self) -> int:
        """Size of the data in bytes, 0 if there are none."""
        if isinstance(self.data, Path):
            try:
                return self.data.stat().st_size
            except OSError:
                return 0
        return 0 if self.data is None else len(self.data) if isinstance(self.data, bytes) else self.data.nbytes

    def read(self) -> bytes:
        """Return the encoded bytes, or the bytes of the pixels.

        Raises:
            BadImage: The data are missing, empty or unreadable.
        """
        if self.data is None:
            raise BadImage(f"{self.name} cannot be read ({self.problem}).")
        if isinstance(self.data, np.ndarray):
            return self.data.tobytes()
        try:
            if isinstance(self.data, Path) and self.data.exists() and not self.data.is_file():
                raise BadImage(f"{self.name} cannot be read (it is not a regular file).")
            data = self.data.read_bytes() if isinstance(self.data, Path) else self.data
        except OSError as error:
            raise UnreachableImage(f"{self.name} cannot be read ({error.strerror or error}).") from None
        if not data:
            raise BadImage(f"{self.name} is empty (0 bytes).")
        return data

    def in_memory(self) -> "EncodedImage":
        """Return the image with the content of its file instead of the path.

        Raises:
            BadImage: As `read`.
        """
        return self if isinstance(self.data, np.ndarray) else EncodedImage(self.name, self.read())


@dataclass(frozen=True)
class Header:
    """Properties of an image that are known without decoding it.

    Args:
        stored_mode: Pillow mode of the file, with ";16" appended for 16-bit color; the dtype of an array.
        mode: The mode that keeps everything: L, RGB or RGBA; for an array with other channels, their number.
        dtype: Name of the type of its values.
        width: In pixels, after applying the EXIF orientation.
        height: In pixels, after applying the EXIF orientation.
        num_frames: More than 1 for an animation or a multi-page file, of which the first frame is used.
    """

    stored_mode: str
    mode: str
    dtype: str
    width: int
    height: int
    num_frames: int


@dataclass(frozen=True)
class OutputFormat:
    """What every image of a dataset is converted to.

    Args:
        num_channels: 1, 3 or 4, or the number of channels of the arrays.
        dtype: Type of the pixels.
        background: `data.background`: color behind transparent pixels if there is no alpha channel; None refuses them.
        geometry: Crops and size.
        keeps_values: Whether values stay as they are, with `data.value_range`; if not, 8-bit pixels are scaled to 16
            bits if these are expected, and a fourth channel is transparency.
    """

    num_channels: int
    dtype: np.dtype[Any]
    background: str | None
    geometry: "Geometry"
    keeps_values: bool = False


def read_header(image: EncodedImage, num_channels: int | None = None) -> Header:
    """Read the size and the mode of an image.

    Args:
        image: The image.
        num_channels: `data.num_channels`, to find the axis of the channels in an array.

    Raises:
        BadImage: The image cannot be decoded.
    """
    numbers = None if isinstance(image.data, np.ndarray) else _numbers_of(image, num_channels)
    if isinstance(image.data, np.ndarray):
        height, width, channels = image.data.shape
        return Header(image.data.dtype.name, _mode_of(channels), image.data.dtype.name, width, height, 1)
    if numbers is not None:
        shape = [*numbers.shape, 1] if len(numbers.shape) == 2 else list(numbers.shape)
        channels = shape.pop(_channel_axis(numbers, num_channels, image.name))
        dtype = "uint8" if numbers.dtype == bool else numbers.dtype.name
        stored_mode = f"{numbers.dtype.name} {numbers.kind}"
        return Header(stored_mode, _mode_of(channels), dtype, shape[1], shape[0], numbers.num_frames)
    with _open(image) as opened:
        has_16_bit_color = _has_16_bit_color(opened)
        width, height = opened.size
        # The EXIF tags of a PNG may follow its pixels, and then only `decode` sees them. Pillow has already applied
        # the orientation to the size of a TIFF.
        has_exif = "exif" in opened.info if opened.format == "PNG" else opened.format != "TIFF"
        if has_exif and _orientation(opened) in _ORIENTATIONS_THAT_SWAP_SIDES:
            width, height = height, width
        # A photo may contain a thumbnail as a second frame (MPO), which is not an animation.
        has_frames = opened.format in ("GIF", "WEBP", "PNG", "TIFF", "AVIF")
        return Header(
            stored_mode=f"{opened.mode};16" if has_16_bit_color else opened.mode,
            mode=_canonical_mode(opened),
            dtype="uint16" if has_16_bit_color else _dtype_of(opened),
            width=width,
            height=height,
            num_frames=int(getattr(opened, "n_frames", 1)) if has_frames else 1,
        )


def decode(image: EncodedImage, output: OutputFormat) -> Pixels:
    """Decode one image.

    Returns:
        Pixels (channels, height, width) of `output.dtype`.

    Raises:
        BadImage: The image cannot be decoded.
        DataError: The image does not fit `output` without losing information.
    """
    return np.ascontiguousarray(decode_interleaved(image, output).transpose(2, 0, 1))


def decode_interleaved(image: EncodedImage, output: OutputFormat) -> Pixels:
    """Decode one image as `decode` does, but to (height, width, channels)."""
    pixels = image.data if isinstance(image.data, np.ndarray) else _decode_file(image, output.num_channels)
    pixels = _convert_channels(pixels, output, image.name)
    if pixels.dtype != output.dtype:
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite
            converted = pixels.astype(output.dtype)
        pixels = converted if output.keeps_values else converted * np.uint16(257)  # 255 becomes 65535
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise BadImage(f"{image.name} has values that are not finite (NaN or infinite); replace them.")
    return output.geometry.apply(pixels, image.name, has_alpha=not output.keeps_values)


def _mode_of(num_channels: int) -> str:
    return MODE_OF_CHANNELS.get(num_channels, str(num_channels))


def _file_of(image: EncodedImage) -> File:
    """Return the path of an image, if it has one that can be opened, or else its content."""
    if isinstance(image.data, Path) and image.data.is_file() and image.num_bytes:
        return image.data
    return io.BytesIO(image.read())


def is_dicom_image(image: EncodedImage) -> bool:
    """Return whether an image is a DICOM file, whatever its name."""
    try:
        return is_dicom(_file_of(image))
    except (BadImage, OSError):
        return False


def _numbers_of(image: EncodedImage, num_channels: int | None) -> Numbers | None:
    """Open an image that is not a picture; return None for one that Pillow decodes."""
    if isinstance(image.data, Path) and image.data.suffix.lower() in _SUFFIXES_OF_PICTURES:
        return None
    if isinstance(image.data, bytes) and image.data.startswith(_STARTS_OF_PICTURES):
        return None
    file = _file_of(image)
    with _named_errors(image.name):
        numbers = open_numbers(file, num_channels)
    if numbers is None:
        return None
    _check_numbers(numbers, image.name)
    return numbers


def image_of_array(array: NDArray[Any], name: str, num_channels: int | None) -> EncodedImage:
    """Return an array of a table, (height, width) or with one more axis for channels, as an image."""
    numbers = Numbers("array", array.dtype, array.shape, lambda: array)
    try:
        _check_numbers(numbers, name)
        axis = _channel_axis(numbers, num_channels, name)
    except BadImage as error:
        return EncodedImage(name, None, str(error))
    return EncodedImage(name, as_native(array[..., None] if array.ndim == 2 else np.moveaxis(array, axis, -1)))


def _too_large(name: str) -> BadImage:
    return BadImage(
        f"{name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit against decompression bombs; make it "
        "smaller."
    )


def _check_numbers(numbers: Numbers, name: str) -> None:
    if numbers.dtype.kind not in "buif" or len(numbers.shape) not in (2, 3) or not math.prod(numbers.shape):
        raise BadImage(
            f"{name} contains {numbers.dtype} {numbers.shape}; an image has numbers, and is (height, width) or has one "
            "more axis for channels."
        )
    if Image.MAX_IMAGE_PIXELS is not None and math.prod(numbers.shape) > _MAX_CHANNELS * Image.MAX_IMAGE_PIXELS:
        raise _too_large(name)


def _channel_axis(numbers: Numbers, num_channels: int | None, name: str) -> int:
    """Return the axis of the channels, which is the last one if both the last and the first can be."""
    if len(numbers.shape) == 2 or numbers.is_channels_last:
        return -1
    for sizes in ((num_channels,), MODE_OF_CHANNELS):
        for axis in (-1, 0):
            if numbers.shape[axis] in sizes:
                return axis
    raise BadImage(
        f"{name} has the shape {numbers.shape}; its first or last axis must be 1, 3 or 4 channels, or "
        "data.num_channels of them."
    )


def warn_of_cubes(name: str, side: int) -> None:
    """Warn that the axis of the channels of an array is unclear."""
    logger.warning(
        "The images of %s are %dx%dx%d, so that each axis may be that of the channels; the last one is used. Transpose "
        "them to (height, width, channels) if it is another one.",
        name, side, side, side,
    )  # fmt: skip


def as_native(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return pixels in the byte order of this machine; those of a bool array are black and white."""
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    native: NDArray[Any] = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    return native


@contextmanager
def _open(image: EncodedImage) -> Iterator[Image.Image]:
    """Open an image file with Pillow; errors in the `with` block become errors that name the image."""
    with _named_errors(image.name), _open_file(_file_of(image), image.name) as opened:
        limit = Image.MAX_IMAGE_PIXELS  # Pillow only warns up to twice as many
        if limit is not None and opened.width * opened.height > limit:
            raise Image.DecompressionBombError
        _check_mode(opened, image.name)
        yield opened


def _open_file(source: File, name: str) -> Image.Image:
    """Open a file, also a HEIC or HEIF photo, which pillow-heif decodes."""
    try:
        return Image.open(source, formats=_FORMATS)
    except UnidentifiedImageError:
        with source.open("rb") if isinstance(source, Path) else io.BytesIO(source.getvalue()) as file:
            start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise BadImage(
                f"{name} is a Git LFS pointer instead of an image; run git lfs pull in its repository."
            ) from None
        if start[4:8] != b"ftyp" or start[8:12] not in _HEIF_BRANDS:
            raise
    try:
        import pillow_heif
    except ImportError:
        raise DataError(f'{name} is a HEIC or HEIF image; run pip install "ddpm_hf[heif]" to read it.') from None
    pillow_heif.register_heif_opener()
    return Image.open(source, formats=("HEIF",))


def _check_mode(opened: Image.Image, name: str) -> None:
    if opened.mode not in _CANONICAL_MODE and opened.mode not in _GRAY_MODES:
        raise BadImage(f"{name} has mode {opened.mode}; convert it to L, RGB or RGBA with 8 or 16 bits.")


def _dtype_of(opened: Image.Image) -> str:
    """Return the type of the values of an image, except for 16-bit color."""
    if opened.mode not in _GRAY_MODES:
        return "uint8"
    if opened.mode == "F":
        return "float32"
    if opened.mode != "I" or opened.format in ("PNG", "PPM"):
        return "uint16"
    if opened.format != "TIFF":
        return "int32"
    tags = opened.tag_v2  # type: ignore[attr-defined]
    sign = "u" if tags.get(_TIFF_SAMPLE_FORMAT, (1,))[0] == 1 else ""
    return f"{sign}int{tags.get(_TIFF_BITS_PER_SAMPLE, (32,))[0]}"


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Turn the errors of Pillow into errors that name the image."""
    try:
        yield
    except DataError:
        raise
    except MissingLibraryError as error:
        raise DataError(f"{name} {error}") from None
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except UnidentifiedImageError:
        raise BadImage(f"{name} cannot be decoded (it is not an image in a supported format).") from None
    except Exception as error:  # Pillow raises many types for damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise UnreachableImage(f"{name} cannot be read ({error.strerror}).") from None
        reason = " ".join(str(error).split()) or "no reason given"
        raise BadImage(f"{name} cannot be decoded ({type(error).__name__}: {reason}).") from error


def _canonical_mode(opened: Image.Image) -> str:
    if opened.mode in _GRAY_MODES:
        return "L"
    return "RGBA" if opened.has_transparency_data else _CANONICAL_MODE[opened.mode]


def _orientation(opened: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) if the tags are unreadable."""
    try:
        return int(opened.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        return 1


def _decode_file(image: EncodedImage, num_channels: int) -> Pixels:
    """Decode an image file to (height, width, channels) with all its bits, upright."""
    if (numbers := _numbers_of(image, num_channels)) is not None:
        axis = _channel_axis(numbers, num_channels, image.name)
        with _named_errors(image.name):
            pixels = as_native(numbers.read())
        return pixels[..., None] if pixels.ndim == 2 else np.moveaxis(pixels, axis, -1)
    with _open(image) as opened:
        if _has_16_bit_color(opened):
            return _decode_16_bit_color(image, opened)
        return _decode_opened(opened)


def decode_picture(picture: Image.Image, name: str) -> Pixels:
    """Return the pixels of a Pillow image as those of a file, (height, width, channels).

    Raises:
        BadImage: It cannot be decoded, or has another mode.
        DataError: It was opened from a file with 16-bit color, which Pillow would reduce to 8 bits.
    """
    with _named_errors(name):
        _check_mode(picture, name)
        if _has_16_bit_color(picture):
            raise DataError(f"{name} has 16-bit color, which Pillow reduces to 8 bits; pass the path of its file.")
        return _decode_opened(picture)


def _decode_opened(opened: Image.Image) -> Pixels:
    mode, dtype = _canonical_mode(opened), _dtype_of(opened)
    opened.load()  # also reads EXIF tags behind the pixels
    upright = ImageOps.exif_transpose(opened) if _orientation(opened) in range(2, 9) else opened
    if dtype != "uint8":
        return np.asarray(upright).astype(dtype)[..., None]
    pixels = np.asarray(upright if upright.mode == mode else upright.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _has_16_bit_color(opened: Image.Image) -> bool:
    """Return whether Pillow would reduce 16-bit color to 8 bits."""
    if opened.mode not in ("RGB", "RGBA"):
        return False
    if opened.format == "TIFF":
        return 16 in opened.tag_v2.get(_TIFF_BITS_PER_SAMPLE, ())  # type: ignore[attr-defined]
    # The parts that Pillow would decode, each with its coding, such as "RGB;16B" (16 bits, big-endian).
    tiles = getattr(opened, "tile", [])
    codings = [tile.args if isinstance(tile.args, str) else (tile.args or [""])[0] for tile in tiles]
    return any(_COLOR_16_BIT_CODING.fullmatch(str(coding)) for coding in codings)


def _decode_16_bit_color(image: EncodedImage, opened: Image.Image) -> Pixels:
    """Decode 16-bit RGB or RGBA with OpenCV."""
    try:
        import cv2
    except ImportError:
        raise DataError(
            f"{image.name} has 16-bit color, which needs OpenCV; install it with "
            'pip install "ddpm_hf[deep-color]", or convert the images to 8 bits.'
        ) from None
    num_channels = 4 if opened.has_transparency_data else 3
    is_premultiplied = any("RGBa" in str(tile.args) for tile in getattr(opened, "tile", []))
    if opened.format == "TIFF" and (is_premultiplied or opened.tag_v2.get(_TIFF_PLANAR_CONFIGURATION) == 2):  # type: ignore[attr-defined]
        raise BadImage(
            f"{image.name} has 16-bit color in separate planes or with premultiplied alpha; convert it to interleaved "
            "RGB or RGBA."
        )
    opened.load()  # raises with a reason if the file is damaged; OpenCV only writes it to stderr
    pixels: NDArray[np.uint16] | None = cv2.imdecode(np.frombuffer(image.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3 or pixels.shape[2] < num_channels:
        raise BadImage(f"{image.name} cannot be decoded (for OpenCV, it is damaged or unsupported).")
    pixels = pixels[..., [2, 1, 0, 3][:num_channels]]  # from BGR
    # OpenCV applies the orientation of a TIFF, but not that of a PNG.
    orientation = _orientation(opened) if opened.format == "PNG" else 1
    if orientation in _ORIENTATIONS_THAT_SWAP_SIDES:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _convert_channels(pixels: Pixels, output: OutputFormat, name: str) -> Pixels:
    """Convert an image to the number of channels of its dataset, if nothing is lost."""
    have, want = pixels.shape[2], output.num_channels
    if have == want:
        return pixels
    may_have_alpha = pixels.dtype in (np.uint8, np.uint16)
    if not {have, want} <= MODE_OF_CHANNELS.keys() or (4 in (have, want) and not may_have_alpha):
        raise DataError(f"{name} has {have} channels, but {want} are expected; set data.num_channels to {have}.")
    if have == 4:
        color, alpha = pixels[..., :3], pixels[..., 3:]
        highest = np.iinfo(pixels.dtype.name).max
        if (alpha < highest).any():
            if output.background is None:
                raise DataError(
                    f"{name} has transparent pixels, but {MODE_OF_CHANNELS[want]} is expected; set data.num_channels "
                    "to 4, or data.background to white or black."
                )
            opacity = alpha.astype(np.float64) / highest
            behind = highest if output.background == "white" else 0
            color = np.rint(color * opacity + behind * (1 - opacity)).astype(pixels.dtype)
        pixels, have = color, 3
    if have == 3 and want == 1:
        if (pixels != pixels[..., :1]).any():
            raise DataError(
                f"{name} is a color image, but gray (L) is expected; set data.num_channels to 3, or convert the images."
            )
        return pixels[..., :1]
    if have == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    if want == 4:
        opaque = np.full_like(pixels[..., :1], np.iinfo(pixels.dtype.name).max)
        pixels = np.concatenate([pixels, opaque], axis=2)
    return pixels


# --------------------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class Geometry:
    """Crop, resize, crop: the part of the preprocessing that is applied before caching. Random crops are not.

    Args:
        first_crop: Side of a centered square, or (left, top, right, bottom), cropped before anything else.
        size: Height and width of the network's input; None keeps the size of the image.
        scale: Ratio of the size that images are resized to and `size`; None does not resize.
        resize_filter: Name of a Pillow filter.
        is_random_crop: Whether `size` is cropped at random during training instead of from the center here.
    """

    first_crop: int | tuple[int, ...] | None
    size: tuple[int, int] | None
    scale: float | None
    resize_filter: str
    is_random_crop: bool

    @classmethod
    def of(cls, config: DataConfig) -> "Geometry":
        """Return the geometry of a configuration."""
        resolution, first_crop = config.resolution, config.crop_before_resize
        sides = [resolution, resolution] if isinstance(resolution, int) else resolution
        size = (sides[0], sides[1]) if sides else None
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
        """Return the height and width of an image after the transform.

        Raises:
            DataError: A crop is larger than the image.
        """
        left, top, right, bottom = self._first_box(width, height, name)
        _, (new_width, new_height) = self._box_and_size(right - left, bottom - top, name)
        return new_height, new_width

    def resizes(self, width: int, height: int, name: str) -> bool:
        """Return whether an image is resized, and not only cropped."""
        left, top, right, bottom = self._first_box(width, height, name)
        box, size = self._box_and_size(right - left, bottom - top, name)
        return (box[2] - box[0], box[3] - box[1]) != size

    def apply(self, pixels: Pixels, name: str, *, has_alpha: bool = True) -> Pixels:
        """Crop and resize an image (height, width, channels); `has_alpha`: a fourth channel is transparency.

        Raises:
            DataError: A crop is larger than the image, or the image cannot be resized.
        """
        height, width, _ = pixels.shape
        left, top, right, bottom = self._first_box(width, height, name)
        # Crop before resizing, so that the filter does not see pixels outside.
        pixels = pixels[top:bottom, left:right]
        box, size = self._box_and_size(right - left, bottom - top, name)
        if box[2] - box[0] == size[0] and box[3] - box[1] == size[1]:
            left, top = round(box[0]), round(box[1])
            return pixels[top : top + size[1], left : left + size[0]]
        try:
            return _resize(pixels, box, size, Image.Resampling[self.resize_filter.upper()], has_alpha=has_alpha)
        except ValueError as error:
            raise DataError(f"{name} has {width}x{height} pixels and cannot be resized ({error}).") from error

    def _first_box(self, width: int, height: int, name: str) -> tuple[int, int, int, int]:
        """Return (left, top, right, bottom) of the first crop."""
        if self.first_crop is None:
            return 0, 0, width, height
        if isinstance(self.first_crop, int):
            left, top = (width - self.first_crop) // 2, (height - self.first_crop) // 2
            right, bottom = left + self.first_crop, top + self.first_crop
        else:
            left, top, right, bottom = self.first_crop
        if left < 0 or top < 0 or right > width or bottom > height:
            crop = list(self.first_crop) if isinstance(self.first_crop, tuple) else self.first_crop
            raise DataError(
                f"{name} has {width}x{height} pixels, fewer than data.crop_before_resize {crop} needs; choose a "
                "smaller crop."
            )
        return left, top, right, bottom

    def _box_and_size(
        self, width: int, height: int, name: str
    ) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
        """Return the box (left, top, right, bottom) to resize, and the resulting (width, height)."""
        if self.size is None:
            return (0, 0, width, height), (width, height)
        target_height, target_width = self.size
        if self.scale is None and (width < target_width or height < target_height):
            raise DataError(
                f"{name} has {width}x{height} pixels, too few for a crop of {target_width}x{target_height}; lower "
                "data.resolution, or remove data.resize_to so that images are resized."
            )
        ratio = 1.0 if self.scale is None else self.scale * max(target_width / width, target_height / height)
        if self.is_random_crop:
            size = max(round(width * ratio), target_width), max(round(height * ratio), target_height)
            return (0, 0, width, height), size
        box_width, box_height = target_width / ratio, target_height / ratio
        # Rounding may make the box exceed the image in the last digit.
        left, top = max((width - box_width) / 2, 0.0), max((height - box_height) / 2, 0.0)
        if ratio == 1:  # crop whole pixels instead of interpolating between two
            left, top = left // 1, top // 1
        right, bottom = min(left + box_width, width), min(top + box_height, height)
        return (left, top, right, bottom), (target_width, target_height)


def _resize(
    pixels: Pixels,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    resize_filter: Image.Resampling,
    *,
    has_alpha: bool = True,
) -> Pixels:
    """Resize a box of an image (height, width, channels) of any depth and number of channels."""
    channels = pixels.shape[2]
    has_alpha &= channels == 4
    if pixels.dtype == np.uint8 and (channels in (1, 3) or has_alpha):
        # Pillow weights the color of RGBA by its alpha.
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels).resize(size, resize_filter, box)
        return np.asarray(image).reshape(size[1], size[0], channels)
    values = pixels.astype(np.float32)  # represents 16 bits exactly
    if has_alpha:
        values[..., :3] *= values[..., 3:]
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(values, -1, 0)]
    values = np.stack([np.asarray(plane.resize(size, resize_filter, box)) for plane in planes], axis=-1)
    if has_alpha:
        values[..., :3] /= np.maximum(values[..., 3:], 1e-6)
    if pixels.dtype.kind == "f":  # the filters overshoot at edges
        return values.clip(pixels.min(), pixels.max()).astype(pixels.dtype)
    limits = np.iinfo(pixels.dtype.name)
    return np.rint(values).clip(limits.min, limits.max).astype(pixels.dtype)


# ------------------------------------------------------------------------------------------------------ value range


def normalize(
    images: torch.Tensor, mirrored: torch.Tensor | None = None, value_range: ValueRange | None = None
) -> torch.Tensor:
    """Scale stored pixels to [-1, 1], on any device.

    Args:
        images: Stored pixels (batch, channels, height, width).
        mirrored: bool (batch,), which images to flip horizontally; None flips none.
        value_range: The values that become -1 and 1; those outside are clipped. None for 0 and 255 (65535 for uint16).

    Returns:
        float32 of the same shape.
    """
    low, high = (0, torch.iinfo(images.dtype).max) if value_range is None else value_range
    if mirrored is not None:
        bits = as_bits(images)
        images = torch.where(mirrored[:, None, None, None], bits.flip(-1), bits).view(images.dtype)
    values = images.to(torch.float32, copy=True)
    if low:
        values.sub_(low)
    values.div_((high - low) / 2).sub_(1.0)
    return values if value_range is None else values.clamp_(-1, 1)


def as_bits(images: torch.Tensor) -> torch.Tensor:
    """View uint16 as int16, because torch implements few operations for uint16; return other types unchanged."""
    return images.view(torch.int16) if images.dtype == torch.uint16 else images


def to_uint8(pixels: Pixels, value_range: ValueRange | None = None) -> NDArray[np.uint8]:
    """Scale pixels to the nearest 8-bit value; return 8-bit pixels without a value range unchanged."""
    if value_range is not None:
        low, high = value_range
        unit = ((pixels.astype(np.float64) - low) / (high - low)).clip(0, 1)
        rounded: NDArray[np.uint8] = np.rint(unit * 255).astype(np.uint8)
        return rounded
    if pixels.dtype == np.uint8:
        return pixels.view(np.uint8)
    rounded = np.rint(pixels / 257).astype(np.uint8)
    return rounded


def find_value_range(config: DataConfig, name: str, pixels: Sequence[float]) -> ValueRange | None:
    """Return the values that become -1 and 1; None without `data.value_range`.

    Args:
        config: The settings.
        name: How messages refer to the data set.
        pixels: The smallest and the largest value of the data.

    Raises:
        DataError: The data have no value in the range, or only one if it is that of the data.
    """
    lowest, highest = pixels
    if config.value_range is None:
        return None
    if config.value_range == "auto":
        if lowest == highest:
            raise DataError(
                f"all values of {name} are {lowest:g}, which is no range; set data.value_range to [low, high]."
            )
        return float(lowest), float(highest)
    low, high = config.value_range
    if highest <= low or lowest >= high:
        raise DataError(
            f"{name} has values from {lowest:g} to {highest:g}, which data.value_range [{low:g}, {high:g}] does not "
            "contain; change it, or set it to auto."
        )
    return low, high


def warn_of_values(name: str, value_range: ValueRange | None, pixels: Sequence[float], dtype: np.dtype[Any]) -> None:
    """Warn if a data set uses less than a quarter of its range, has values outside of it, or too few steps in it.

    Args:
        name: How messages refer to the data set.
        value_range: The values that become -1 and 1.
        pixels: The smallest and the largest value of the data.
        dtype: Type of the stored pixels.
    """
    lowest, highest = pixels
    low, high = (0.0, float(np.iinfo(dtype.name).max)) if value_range is None else value_range
    if lowest < low or highest > high:
        logger.warning(
            "%s has values from %g to %g; those outside of data.value_range [%g, %g] are clipped.",
            name, lowest, highest, low, high,
        )  # fmt: skip
    elif highest - lowest < (high - low) / 4:
        logger.warning(
            "The pixels of %s use only the values %g to %g of %g to %g, so the contrast is low; set data.value_range "
            "to their range or auto if that is not intended.",
            name, lowest, highest, low, high,
        )  # fmt: skip
    step = float(np.spacing(np.float32(max(abs(low), abs(high)))))
    if dtype == np.float32 and step > (high - low) / _FEWEST_STEPS:
        logger.warning(
            "The values of %s, %g to %g, are stored as float32, in steps of %g; subtract their mean to keep smaller "
            "differences.",
            name, lowest, highest, step,
        )  # fmt: skip


def num_threads(num_processes: int = 1) -> int:
    """Return the number of decoding threads: the cores of this process, shared with other processes of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_processes)
