"""From the configuration to what is trained: the images of both splits, the forward process and the network."""

import torch
from diffusers import UNet2DModel

from ddpm_hf.config import ConfigError, DiffusionConfig, RunConfig
from ddpm_hf.data import ImageSet, open_images
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.rng import seed_global_generators
from ddpm_hf.training import processes
from ddpm_hf.unet import build_unet


def open_splits(config: RunConfig) -> tuple[ImageSet, ImageSet]:
    """Collective: opens the data; rank 0 decodes it, or says what is wrong with it, before the others look.

    Returns:
        The images to train on, and the held-out ones.

    Raises:
        ValueError: If the data cannot be trained on.
    """
    data, with_labels = config.data, config.model.class_conditional
    processes.on_rank_0(lambda: open_images(data, with_labels=with_labels))
    images = processes.on_every_rank(lambda: open_images(data, with_labels=with_labels))
    return images.split(data.validation_fraction, config.training.seed)


def class_names_of(images: ImageSet, config: RunConfig) -> dict[str, str] | None:
    """Returns class number to name, as a pipeline stores them; None for an unconditional network."""
    if not config.model.class_conditional or not images.class_names:
        return None
    return {str(number): name for number, name in enumerate(images.class_names)}


def build_scheduler(diffusion: DiffusionConfig) -> GaussianDiffusionScheduler:
    """Builds the forward process of the run.

    Raises:
        ConfigError: If the network would be asked what the last timestep cannot tell.
    """
    scheduler: GaussianDiffusionScheduler = GaussianDiffusionScheduler.create(
        num_train_timesteps=diffusion.num_train_timesteps,
        beta_schedule=diffusion.beta_schedule,
        beta_start=diffusion.beta_start,
        beta_end=diffusion.beta_end,
        prediction_type=diffusion.prediction_type,
        variance_type=diffusion.variance_type,
        clip_sample=diffusion.clip_sample,
        timestep_spacing=diffusion.timestep_spacing,
        rescale_betas_zero_snr=diffusion.rescale_betas_zero_snr,
    )
    if scheduler.config.prediction_type == "epsilon" and scheduler.noise_schedule.alphas_cumprod[-1] == 0:
        raise ConfigError(
            f"diffusion.beta_schedule {diffusion.beta_schedule} leaves no signal at the last timestep, where "
            "epsilon says nothing about x_0; set diffusion.prediction_type to v_prediction or sample."
        )
    return scheduler


def build_network(
    config: RunConfig, image_shape: tuple[int, int, int], num_classes: int | None, device: torch.device
) -> UNet2DModel:
    """Builds the network, initialised from the seed of the run alone, on the device.

    Raises:
        ConfigError: If the network does not fit the images.
    """
    has_null_label = config.objective.class_dropout > 0
    num_class_embeds = num_classes + has_null_label if num_classes else None
    seed_global_generators(config.training.seed, "initialization")
    self_conditioned, learned_variance = config.objective.self_conditioning > 0, config.diffusion.learns_variance
    return build_unet(
        config.model,
        image_shape,
        num_class_embeds,
        self_conditioned=self_conditioned,
        learned_variance=learned_variance,
    ).to(device)
