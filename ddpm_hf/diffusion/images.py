"""Conversion between images (PIL, numpy, tensors in [0, 1] or the range of the data) and samples (in [-1, 1])."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from .schedule import whole_number

OUTPUT_TYPES = ("pil", "np", "pt", "uint8", "latent")
ImageInput: TypeAlias = Image.Image | Sequence[Image.Image] | np.ndarray[Any, Any] | torch.Tensor
ValueRange: TypeAlias = Sequence[float]
"""The two values of the data, low and high, that the samples -1 and 1 stand for."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def image_size(unet: Any) -> tuple[int, int]:
    """Return height and width of the images of a UNet2DModel.

    Raises:
        ValueError: If its configuration has no sample_size.
    """
    size = unet.config.sample_size
    if size is None:
        raise ValueError("The network has no sample_size; pass start noise as sample, or set it in unet/config.json.")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return whole_number("sample_size", height), whole_number("sample_size", width)


def to_unit_range(sample: torch.Tensor) -> torch.Tensor:
    """Map [-1, 1] to [0, 1], clipped, in float32."""
    return (sample / 2 + 0.5).clamp(0, 1).float()


def check_value_range(value_range: Any) -> list[float] | None:
    """Return a value range as floats, None for None; raise a ValueError if it is not two increasing numbers."""
    if value_range is None:
        return None
    try:
        low, high = map(float, value_range)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"value_range is {value_range!r}; it must be two numbers, [low, high], with low < high.")
    return [low, high]


def to_images(sample: torch.Tensor, output_type: str, value_range: ValueRange | None = None) -> Any:
    """Convert samples (batch, channels, height, width) in [-1, 1] to one of the pipeline's output types.

    `np` and `pt` are values in [0, 1], or in the value range if there is one.
    """
    images = to_unit_range(sample)
    if output_type in ("np", "pt"):
        if value_range is not None:
            low, high = value_range
            images = (images * (high - low) + low).clamp(low, high)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()
    images = images.permute(0, 2, 3, 1)
    pixels = (images * 255).round().to(torch.uint8).cpu().numpy()
    if output_type == "uint8":
        return pixels
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]


def from_images(
    images: ImageInput,
    num_channels: int,
    size_divisor: int,
    name: str = "image",
    value_range: ValueRange | None = None,
) -> torch.Tensor:
    """Convert images to samples; the inverse of `to_images`, also for single images.

    Args:
        images: A PIL image or a list of them; a numpy array (batch, height, width, channels) or without batch; a tensor
            (batch, channels, height, width) or without batch. uint8 in 0 ... 255 or floats in [0, 1]; with a value
            range, uint8 is a picture of it, and all other numbers are values in it.
        num_channels: Channels of the model's images.
        size_divisor: Height and width must be multiples of it.
        name: Name of the argument, for errors.
        value_range: The values of the data that become -1 and 1.

    Returns:
        float32, or float64 for float64, (batch, channels, height, width) in [-1, 1].

    Raises:
        ValueError: If the shape, the mode of a PIL image, or the range of the values does not fit.
    """
    x = _to_batch(images, num_channels, name, value_range)
    if x.ndim != 4 or x.shape[1] != num_channels or x.numel() == 0:
        raise ValueError(
            f"{name} is read as (batch, channels, height, width) = {tuple(x.shape)}, but the model's images have"
            f" {num_channels} channels; pass PIL images, an array (batch, height, width, channels) or a tensor (batch,"
            " channels, height, width)."
        )
    check_size(x.shape[2], x.shape[3], size_divisor, name)
    return x * 2 - 1


def from_mask(mask: ImageInput, image: torch.Tensor) -> torch.Tensor:
    """Convert a mask, white (1, 255 or True) where the image is to be filled, to bool (1 or batch, 1, height, width).

    Args:
        mask: One mask for all images or one for each.
        image: The samples, (batch, channels, height, width).

    Raises:
        ValueError: If the mask does not fit the images.
    """
    if not isinstance(mask, np.ndarray | torch.Tensor):
        mask = [one.convert("L") for one in _list_of_pil(mask, "mask")]
    elif mask.ndim == 2:
        mask = mask[None] if isinstance(mask, torch.Tensor) else mask[..., None]
    elif mask.ndim == 3 and isinstance(mask, np.ndarray) and mask.shape[-1] != 1:
        mask = mask[..., None]
    x = _to_batch(mask, 1, "mask")
    batch, _, height, width = image.shape
    if x.ndim != 4 or x.shape[0] not in (1, batch) or x.shape[1:] != (1, height, width):
        raise ValueError(
            f"mask is read as (batch, 1, height, width) = {tuple(x.shape)}; it must have the image's height {height}"
            f" and width {width}, one channel, and be one for all images or one for each of the {batch}."
        )
    return x >= 0.5


def check_size(height: int, width: int, divisor: int, name: str) -> None:
    """Raise a ValueError if a side is not a multiple of `divisor`."""
    if height % divisor or width % divisor:
        raise ValueError(
            f"{name} is {height} x {width} pixels, but the network needs multiples of {divisor}; resize or crop it."
        )


def _to_batch(images: ImageInput, num_channels: int, name: str, value_range: ValueRange | None = None) -> torch.Tensor:
    """Return images of any kind as floats in [0, 1], (batch, channels, height, width)."""
    if isinstance(images, torch.Tensor):
        x = images if images.ndim == 4 else images[None]
    elif isinstance(images, np.ndarray):
        try:
            x = torch.from_numpy(np.ascontiguousarray(images if images.ndim == 4 else images[None]))
        except TypeError as error:  # a dtype that torch does not have, such as object
            raise ValueError(
                f"{name} has dtype {images.dtype}; pass uint8 in 0 ... 255 or floats in [0, 1]."
            ) from error
        x = x.permute(0, 3, 1, 2) if x.ndim == 4 else x
    else:
        x = _from_pil(_list_of_pil(images, name), num_channels, name)
    if x.dtype in (torch.uint8, torch.bool):
        return x.float() / (255 if x.dtype == torch.uint8 else 1)
    if value_range is not None:
        return _from_value_range(x, value_range, name)
    if not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}; pass uint8 in 0 ... 255 or floats in [0, 1].")
    if x.numel() and not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(
            f"{name} has values from {x.min().item():g} to {x.max().item():g}; floats must lie in [0, 1]"
            " (for data in [-1, 1] pass image / 2 + 0.5)."
        )
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _from_value_range(x: torch.Tensor, value_range: ValueRange, name: str) -> torch.Tensor:
    """Map values of the range to [0, 1]; raise a ValueError for values outside of it."""
    low, high = value_range
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = (x - low) / (high - low)
    rounding = 1e-5  # of the ends of the range in float32
    if x.numel() and not (unit.min() >= -rounding and unit.max() <= 1 + rounding):
        raise ValueError(
            f"{name} has values from {x.min().item():g} to {x.max().item():g}; the model's images have values in"
            f" [{low:g}, {high:g}]. Clip them to this range, or pass uint8 in 0 ... 255, a picture of it."
        )
    return unit.clamp(0, 1)


def _list_of_pil(images: Any, name: str) -> list[Image.Image]:
    """Return a PIL image, or a list of them, as a list; raise a ValueError for anything else."""
    given = list(images) if isinstance(images, list | tuple) else [images]
    wrong = [type(image).__name__ for image in given if not isinstance(image, Image.Image)]
    if wrong or not given:
        kind = wrong[0] if wrong else "an empty list"
        raise ValueError(f"{name} must be PIL images, a numpy array or a tensor, not {kind}.")
    return given


def _from_pil(images: list[Image.Image], num_channels: int, name: str) -> torch.Tensor:
    """Stack PIL images of one size to uint8 (batch, channels, height, width)."""
    mode = _MODES.get(num_channels)
    for image in images:
        if image.mode != mode:
            raise ValueError(
                f"{name} has mode {image.mode}, but the model's images have {num_channels} channels;"
                f" {f'pass image.convert({mode!r})' if mode else 'pass an array'}."
            )
        if image.size != images[0].size:
            raise ValueError(f"{name} has sizes {images[0].size} and {image.size}; all must be of one size.")
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels[:, None] if num_channels == 1 else pixels.permute(0, 3, 1, 2)
