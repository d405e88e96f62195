"""From the configuration to what is trained: the images of both splits and the forward process."""

import dataclasses

from ddpm_hf.config import ConfigError, DiffusionConfig, RunConfig
from ddpm_hf.data import ImageSet, open_images
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.training import processes


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
    scheduler: GaussianDiffusionScheduler = GaussianDiffusionScheduler.create(**dataclasses.asdict(diffusion))
    if scheduler.config.prediction_type == "epsilon" and scheduler.noise_schedule.alphas_cumprod[-1] == 0:
        raise ConfigError(
            f"diffusion.beta_schedule {diffusion.beta_schedule} leaves no signal at the last timestep, where "
            "epsilon says nothing about x_0; set diffusion.prediction_type to v_prediction or sample."
        )
    return scheduler
