"""From the configuration to what is trained: the images of both splits, the samples, and the forward process."""

import dataclasses

import torch
from accelerate import Accelerator

from ddpm_hf.config import ConfigError, DiffusionConfig, RunConfig
from ddpm_hf.data import ImageFeed, ImageSet, ImageStream, open_sets
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.diffusion.forward_process import SMALLEST_ALPHA_BAR
from ddpm_hf.diffusion.noise_schedule import BETA_RANGES, BETA_SCHEDULE_ALIASES
from ddpm_hf.training import processes


def open_splits(config: RunConfig, accelerator: Accelerator) -> tuple[ImageSet | ImageStream, ImageSet]:
    """Collective: opens the data; rank 0 decodes it, or says what is wrong with it, before the others look.

    Returns:
        The images to train on, or this process's stream of them, and the held-out ones.

    Raises:
        ValueError: If the data cannot be trained on.
    """

    def open_both() -> tuple[ImageSet | ImageStream, ImageSet]:
        return open_sets(
            config.data,
            with_labels=config.model.class_conditional,
            seed=config.training.seed,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            device=accelerator.device,
        )

    processes.on_rank_0(open_both)
    return processes.on_every_rank(open_both)


def build_feed(config: RunConfig, images: ImageSet | ImageStream, device: torch.device) -> ImageFeed | ImageStream:
    """Collective: makes what gives the samples of the run; images that stay on the device go there now.

    Raises:
        ValueError: If the images are to be kept on a device that has no room for them.
    """
    if isinstance(images, ImageStream):
        return images
    return processes.on_every_rank(lambda: ImageFeed(images, config.data, config.training.seed, device))


def class_names_of(images: ImageSet | ImageStream, config: RunConfig) -> dict[str, str] | None:
    """Returns class number to name, as a pipeline stores them; None for an unconditional network."""
    if not config.model.class_conditional or not images.class_names:
        return None
    return {str(number): name for number, name in enumerate(images.class_names)}


def build_scheduler(diffusion: DiffusionConfig) -> GaussianDiffusionScheduler:
    """Builds the forward process of the run.

    Raises:
        ConfigError: If there is no such process, or the network would be asked what its last timestep cannot tell.
    """
    try:
        scheduler: GaussianDiffusionScheduler = GaussianDiffusionScheduler.create(**dataclasses.asdict(diffusion))
    except ValueError as error:
        raise ConfigError(f"diffusion: {error}") from error
    no_signal = scheduler.noise_schedule.alphas_cumprod[-1] < SMALLEST_ALPHA_BAR
    if scheduler.config.prediction_type == "epsilon" and no_signal:
        name, num_timesteps = diffusion.beta_schedule, diffusion.num_train_timesteps
        is_range = BETA_SCHEDULE_ALIASES.get(name, name) in BETA_RANGES
        lower = ", diffusion.scale_betas_to_timesteps to true for a long chain, or diffusion.beta_end lower"
        raise ConfigError(
            f"diffusion.beta_schedule {name} leaves no signal at the last timestep of {num_timesteps}, where epsilon "
            "says nothing about x_0; set diffusion.prediction_type to v_prediction or sample"
            f"{lower if is_range else ''}."
        )
    return scheduler
