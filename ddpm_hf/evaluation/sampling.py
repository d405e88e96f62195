"""Images from a pipeline, one seed an image, so that image i is the same in any batch."""

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_hf.config import EvaluationConfig
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionPipelineOutput
from ddpm_hf.rng import sampling_generators


def sample_images(
    pipeline: GaussianDiffusionPipeline, config: EvaluationConfig, seed: int, labels: NDArray[np.int64] | None
) -> NDArray[np.uint8]:
    """Samples `config.num_samples` images in batches.

    Args:
        pipeline: Where they come from.
        config: How many, and how to sample.
        seed: Seed of the run; image i is drawn from (seed, i).
        labels: The class of each image; None for an unconditional network.

    Returns:
        uint8 images (number, height, width, channels).
    """
    starts = range(0, config.num_samples, config.batch_size)
    batches = [range(start, min(start + config.batch_size, config.num_samples)) for start in starts]
    return np.concatenate([_sample(pipeline, config, seed, indices, labels).images for indices in batches])


def sample_trajectory(
    pipeline: GaussianDiffusionPipeline,
    config: EvaluationConfig,
    seed: int,
    num_images: int,
    labels: NDArray[np.int64] | None,
) -> NDArray[np.uint8]:
    """Samples the first images once more and returns every state on the way from noise.

    Returns:
        uint8 states (steps + 1, number, height, width, channels).
    """
    output = _sample(pipeline, config, seed, range(num_images), labels, return_trajectory=True)
    states = torch.as_tensor(output.trajectory).clamp(0, 1).mul(255).round().to(torch.uint8)
    return states.permute(0, 1, 3, 4, 2).cpu().numpy()


def _sample(
    pipeline: GaussianDiffusionPipeline,
    config: EvaluationConfig,
    seed: int,
    indices: range,
    labels: NDArray[np.int64] | None,
    *,
    return_trajectory: bool = False,
) -> GaussianDiffusionPipelineOutput:
    """Samples the images of some indices, each from its own seed."""
    pipeline.set_progress_bar_config(desc=f"Sampling {len(indices)} images", disable=None, leave=False)
    output = pipeline(
        batch_size=len(indices),
        num_inference_steps=config.num_inference_steps,
        eta=config.eta,
        guidance_scale=config.guidance_scale,
        class_labels=None if labels is None else labels[indices.start : indices.stop].tolist(),
        generator=sampling_generators(seed, "evaluation", indices, pipeline.device),
        output_type="uint8",
        return_trajectory=return_trajectory,
    )
    assert isinstance(output, GaussianDiffusionPipelineOutput)
    return output
