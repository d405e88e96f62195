"""How large the images of a network are."""

from typing import Any

from ddpm_hf.diffusion import GaussianDiffusionPipeline


def image_size(unet: Any) -> tuple[int, int]:
    """Returns height and width of the images of a network.

    Raises:
        ValueError: Its configuration does not tell.
    """
    size = unet.config.sample_size
    if size is None:
        raise ValueError("the network's configuration has no sample_size; set it in unet/config.json.")
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def image_shape(pipeline: GaussianDiffusionPipeline) -> tuple[int, int, int]:
    """Returns height, width and channels of the images that a pipeline samples.

    Raises:
        ValueError: The configuration of the network does not tell its size.
    """
    return (*image_size(pipeline.unet), pipeline.num_channels)
