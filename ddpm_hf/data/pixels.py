"""Stored pixels to the network's range and back, on whatever device they are."""

import numpy as np
import torch
from numpy.typing import NDArray

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
