"""Conversion between images and samples."""

import pytest
import torch
from oracles import seeded

from ddpm_hf.diffusion.images import from_images, to_images


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_returned_images_can_be_converted_back(channels: int) -> None:
    """Exact for floats, half a step of 255 for pixels; PIL has no images of 5 channels."""
    x = torch.rand(2, channels, 4, 8, generator=seeded()) * 2 - 1
    for output_type in ("pil", "np", "pt", "uint8")[channels == 5 :]:
        images = to_images(x, output_type)
        for batch in (images, images[0]):
            back = from_images(batch, channels, 4)
            tolerance = 2 / 255 if output_type in ("pil", "uint8") else 1e-6
            torch.testing.assert_close(back, x[: len(back)], rtol=0, atol=tolerance)
