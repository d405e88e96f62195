"""Sample grids during training, always of the same seeds and labels, so that progress is seen and not luck.

The images are sampled in blocks, each on one process and always of the same images, so the picture is the same bit by
bit however many processes share them.
"""

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from numpy.typing import NDArray

from ddpm_hf.config import PreviewConfig
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.diffusion.images import image_size
from ddpm_hf.plots import image_grid
from ddpm_hf.rng import sampling_generators
from ddpm_hf.training import processes

logger = logging.getLogger(__name__)

# Two forwards of the same images agree to the bit only if they are of one size.
BLOCK_SIZE = 8


def save_preview(
    path: Path,
    unet: UNet2DModel,
    scheduler: GaussianDiffusionScheduler,
    config: PreviewConfig,
    seed: int,
    class_names: dict[str, str] | None,
    has_null_label: bool,
    self_conditioned: bool = False,
) -> bool:
    """Collective: samples one grid, each rank its part, and writes it as PNG on rank 0.

    Where memory or the disk is full, it is a warning and training goes on. The network's mode is put back, and torch's
    global generators stay untouched.

    Args:
        path: The PNG file; its folder is made.
        unet: The network with the weights to look at, the same on all ranks.
        scheduler: The scheduler of the run; its timesteps are left as they are.
        config: How many images and how to sample them.
        seed: Seed of the run; image i is drawn from (seed, i).
        class_names: Class number to name of a class-conditional network, in turn over the images; None without classes.
        has_null_label: Whether the network was trained with label dropout.
        self_conditioned: Whether the network takes its last prediction of x_0.

    Returns:
        Whether this rank has written the file.
    """
    sampler = GaussianDiffusionScheduler.from_config(scheduler.config)
    pipeline = GaussianDiffusionPipeline(
        unet, sampler, class_names=class_names, has_null_label=has_null_label, self_conditioned=self_conditioned
    )
    pipeline.set_progress_bar_config(disable=True)
    images = _sample(pipeline, config, seed, preview_labels(config.num_images, class_names))
    if processes.rank() != 0:
        return False
    if images is None:
        logger.warning("No memory for the preview; training goes on. Lower preview.num_images.")
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        num_columns = len(class_names) if class_names and len(class_names) <= config.num_images else None
        image_grid(images, num_columns or round(config.num_images**0.5)).save(path)
        return True
    except OSError as error:
        logger.warning("The preview could not be written (%s); training goes on.", error.strerror or error)
    return False


def _sample(
    pipeline: GaussianDiffusionPipeline, config: PreviewConfig, seed: int, labels: torch.Tensor | None
) -> NDArray[np.uint8] | None:
    """Collective: returns the images of the grid, uint8 (number, height, width, channels); None without memory."""
    unet = pipeline.unet
    images = np.zeros((config.num_images, *image_size(unet), pipeline.num_channels), np.uint8)
    was_training = unet.training
    unet.eval()
    try:
        for block in blocks_of_rank(config.num_images, processes.rank(), processes.world_size()):
            images[block] = pipeline(
                batch_size=block.stop - block.start,
                num_inference_steps=config.num_inference_steps,
                eta=config.eta,
                guidance_scale=config.guidance_scale,
                class_labels=None if labels is None else labels[block],
                generator=sampling_generators(seed, "preview", range(block.start, block.stop), unet.device),
                output_type="uint8",
            ).images
        has_memory = True
    except torch.OutOfMemoryError:
        has_memory = False
    finally:
        unet.train(was_training)
    if not processes.reduce(has_memory, "min"):
        return None
    processes.join_parts(images)
    return images


def blocks_of_rank(num_images: int, rank: int, num_processes: int) -> list[slice]:
    """Returns the blocks of images that a rank samples; what is in a block does not depend on the number of ranks."""
    starts = range(0, num_images, BLOCK_SIZE)
    return [slice(start, min(start + BLOCK_SIZE, num_images)) for start in starts[rank::num_processes]]


def preview_labels(num_images: int, class_names: dict[str, str] | None) -> torch.Tensor | None:
    """Returns labels that go through the classes in turn, or None without classes."""
    return None if class_names is None else torch.arange(num_images) % len(class_names)
