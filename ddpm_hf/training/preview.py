"""Sample grids during training, always of the same seeds and labels, so that progress is seen and not luck."""

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from numpy.typing import NDArray

from ddpm_hf.config import PreviewConfig
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.plots import image_grid
from ddpm_hf.rng import sampling_generators

logger = logging.getLogger(__name__)


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
    """Samples one grid and writes it as PNG; where memory or the disk is full, it is a warning and training goes on.

    The network's mode is put back, and torch's global generators stay untouched.

    Args:
        path: The PNG file; its folder is made.
        unet: The network with the weights to look at.
        scheduler: The scheduler of the run; its timesteps are left as they are.
        config: How many images and how to sample them.
        seed: Seed of the run.
        class_names: Class number to name of a class-conditional network, in turn over the images; None without classes.
        has_null_label: Whether the network was trained with label dropout.
        self_conditioned: Whether the network takes its last prediction of x_0.

    Returns:
        Whether the file was written.
    """
    try:
        images = _sample(unet, scheduler, config, seed, class_names, has_null_label, self_conditioned)
        path.parent.mkdir(parents=True, exist_ok=True)
        num_columns = len(class_names) if class_names and len(class_names) <= config.num_images else None
        image_grid(images, num_columns or round(config.num_images**0.5)).save(path)
        return True
    except torch.OutOfMemoryError:
        logger.warning("No memory for the preview; training goes on. Lower preview.num_images.")
    except OSError as error:
        logger.warning("The preview could not be written (%s); training goes on.", error.strerror or error)
    return False


def _sample(
    unet: UNet2DModel,
    scheduler: GaussianDiffusionScheduler,
    config: PreviewConfig,
    seed: int,
    class_names: dict[str, str] | None,
    has_null_label: bool,
    self_conditioned: bool,
) -> NDArray[np.uint8]:
    """Returns the images of the grid, uint8 (number, height, width, channels)."""
    sampler = GaussianDiffusionScheduler.from_config(scheduler.config)
    pipeline = GaussianDiffusionPipeline(
        unet, sampler, class_names=class_names, has_null_label=has_null_label, self_conditioned=self_conditioned
    )
    pipeline.set_progress_bar_config(disable=True)
    was_training = unet.training
    unet.eval()
    try:
        images = pipeline(
            batch_size=config.num_images,
            num_inference_steps=config.num_inference_steps,
            eta=config.eta,
            guidance_scale=config.guidance_scale,
            class_labels=preview_labels(config.num_images, class_names),
            generator=sampling_generators(seed, "preview", range(config.num_images), unet.device),
            output_type="uint8",
        ).images
    finally:
        unet.train(was_training)
    return np.asarray(images)


def preview_labels(num_images: int, class_names: dict[str, str] | None) -> torch.Tensor | None:
    """Returns labels that go through the classes in turn, or None without classes."""
    return None if class_names is None else torch.arange(num_images) % len(class_names)
