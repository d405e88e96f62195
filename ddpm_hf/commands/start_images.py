"""Images that sampling starts from: read from files, and fitted to a network where nothing is lost by it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.config import ConfigError, DataConfig

Image: TypeAlias = NDArray[np.float32]


def read_images(paths: Sequence[Path]) -> list[Image]:
    """Reads image files, and .npy files (height, width, channels) for other channels than a picture has.

    Returns:
        float32 in [0, 1], (height, width, channels), with the channels and the precision of the file.

    Raises:
        ValueError: A file is missing, or is no image.
    """
    return [_read_array(path) if path.suffix.lower() == ".npy" else _read_picture(path) for path in paths]


def _read_picture(path: Path) -> Image:
    """Reads an image of 8 or 16 bits as it is shown."""
    from ddpm_hf.data.decoding import Cell, Target, decode, read_header
    from ddpm_hf.data.geometry import Geometry

    cell = Cell(str(path), path.expanduser())
    header = read_header(cell)
    dtype = np.dtype(np.uint16 if header.is_deep else np.uint8)
    geometry = Geometry.of(DataConfig(resolution=None))
    pixels = decode(cell, Target({"L": 1, "RGB": 3, "RGBA": 4}[header.mode], dtype, None, geometry))
    return _to_unit_range(pixels.transpose(1, 2, 0))


def _read_array(path: Path) -> Image:
    """Reads an array of 8 or 16 bits, or of floats in [0, 1]."""
    try:
        pixels = np.load(path.expanduser(), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read as an array ({error}).") from None
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    is_float = np.issubdtype(pixels.dtype, np.floating)
    if pixels.ndim != 3 or pixels.size == 0 or not (is_float or pixels.dtype in (np.uint8, np.uint16)):
        raise ConfigError(
            f"{path} has {pixels.dtype} of shape {pixels.shape}; an image is uint8, uint16 or float in [0, 1], (height,"
            " width, channels)."
        )
    if is_float and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ConfigError(f"{path} has values from {pixels.min():g} to {pixels.max():g}; floats must lie in [0, 1].")
    return pixels.astype(np.float32) if is_float else _to_unit_range(pixels)


def _to_unit_range(pixels: NDArray[np.integer]) -> Image:
    """Maps all of a type's values to [0, 1]."""
    scaled: Image = (pixels / np.float64(np.iinfo(pixels.dtype).max)).astype(np.float32)
    return scaled


def fit(image: Image, path: Path, shape: tuple[int, int, int]) -> Image:
    """Gives an image the channels of a network.

    Args:
        image: As read.
        path: Its file, for messages.
        shape: Height, width and channels of what the network makes.

    Raises:
        ConfigError: It has another size, or would lose colours or transparency.
    """
    height, width, want = shape
    if image.shape[:2] != (height, width):
        raise ConfigError(
            f"{path} is {image.shape[1]} pixels wide and {image.shape[0]} high, but the model makes {width} x {height};"
            " resize or crop it."
        )
    have = image.shape[2]
    if have == 4 and want in (1, 3) and (image[..., 3] == 1).all():
        image = image[..., :3]
    if image.shape[2] == 3 and want == 1 and (image == image[..., :1]).all():
        image = image[..., :1]
    if image.shape[2] == 1 and want in (3, 4):
        image = np.repeat(image, 3, axis=2)
    if image.shape[2] == 3 and want == 4:
        image = np.concatenate([image, np.ones_like(image[..., :1])], axis=2)
    if image.shape[2] != want:
        lost = {(4, 3): ", some of it transparent", (4, 1): ", some of it transparent", (3, 1): " of different values"}
        raise ConfigError(
            f"{path} has {have} channels{lost.get((have, want), '')}, but the model's images have {want}; convert it."
        )
    return image


def to_mask(image: Image, path: Path, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Returns where a mask is white, (height, width).

    Raises:
        ConfigError: It has another size than the images.
    """
    if image.shape[:2] != size:
        raise ConfigError(
            f"{path} is {image.shape[1]} pixels wide and {image.shape[0]} high, but the images are {size[1]} x "
            f"{size[0]}; draw it in their size."
        )
    if image.shape[2] == 4:  # what is transparent is not white
        image = image * image[..., -1:]
    white: NDArray[np.bool_] = image[..., :3].mean(axis=2) >= 0.5
    return white
