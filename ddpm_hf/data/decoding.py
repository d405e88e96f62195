"""One encoded image to pixels, losing nothing in silence."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ddpm_hf.data.image_set import DataError

MODE_OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
# Modes that hold the same picture in another coding, and the plain mode that keeps all of it.
_PLAIN_MODE = {"1": "L", "L": "L", "RGB": "RGB", "RGBA": "RGBA", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}


def decode(cell: dict[str, Any], name: str, mode: str | None, resolution: int | None) -> NDArray[np.uint8]:
    """Decodes one image.

    Args:
        cell: `bytes` of an encoded image, or the `path` of its file.
        name: What to call it in a message.
        mode: "L", "RGB" or "RGBA"; None keeps the image's own.
        resolution: Side length to resize and crop to, or None.

    Returns:
        uint8 pixels (channels, height, width).

    Raises:
        DataError: If the image is damaged or does not fit the mode without losing channels.
    """
    image = _plain_image(cell, name)
    pixels = np.asarray(_resize(_convert(image, mode or image.mode, name), resolution))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _plain_image(cell: dict[str, Any], name: str) -> Image.Image:
    """Decodes one image, upright, to mode L, RGB or RGBA."""
    try:
        image: Image.Image = Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"])
        image = ImageOps.exif_transpose(image)
        if image.mode not in _PLAIN_MODE:
            raise DataError(f"{name} has mode {image.mode}; convert it to 8-bit gray (L), RGB or RGBA.")
        has_alpha = image.mode == "P" and "transparency" in image.info
        return image.convert("RGBA" if has_alpha else _PLAIN_MODE[image.mode])
    except DataError:
        raise
    except Exception as error:  # Pillow raises many types for damaged files
        raise DataError(f"{name} cannot be decoded ({type(error).__name__}: {error}).") from error


def _convert(image: Image.Image, mode: str, name: str) -> Image.Image:
    """Converts to the mode of the data set where nothing is lost by it."""
    if len(image.getbands()) > len(mode):
        raise DataError(
            f"{name} has mode {image.mode} where {mode} is asked for, which would lose channels; set "
            f"data.num_channels to {len(image.getbands())} or convert the images."
        )
    return image.convert(mode)


def _resize(image: Image.Image, resolution: int | None) -> Image.Image:
    """Resizes the shorter side, antialiased, and cuts out the centre."""
    if resolution is None or image.size == (resolution, resolution):
        return image
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
