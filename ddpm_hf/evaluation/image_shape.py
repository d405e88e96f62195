"""How large the images of a pipeline are."""

from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.diffusion.images import image_size


def image_shape(pipeline: GaussianDiffusionPipeline) -> tuple[int, int, int]:
    """Returns height, width and channels of the images that a pipeline samples.

    Raises:
        ValueError: The configuration of the network does not tell its size.
    """
    return (*image_size(pipeline.unet), pipeline.num_channels)
