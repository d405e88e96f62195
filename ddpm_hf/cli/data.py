"""`ddpm-hf data`: show what a run would read."""

from collections.abc import Sequence
from pathlib import Path

from ddpm_hf.config import ConfigError, load_data_config

NUM_SAMPLES, NUM_COLUMNS = 64, 8


def data(arguments: Sequence[str]) -> int:
    """Print a summary of the images, draw the first samples, and return the exit code."""
    config, picture = load_data_config(arguments)
    _check_picture(picture)

    from ddpm_hf.data import DataError, summarize
    from ddpm_hf.plots import as_drawn, image_grid

    summary = summarize(
        config.data, with_labels=config.model.class_conditional, seed=config.training.seed, num_samples=NUM_SAMPLES
    )
    lines, problem = summary.lines, summary.problem
    if config.data.vae is not None or config.model.vae is not None:
        from ddpm_hf.training.latents import describe_latents

        _, height, width, channels = summary.samples.shape
        try:
            lines = [*lines, f"{'latents':<10}{describe_latents(config, (channels, height, width))}"]
        except ConfigError as error:
            problem = problem or str(error)
    print("\n".join(lines))
    image_grid(as_drawn(summary.samples, config.data.value_range), NUM_COLUMNS).save(picture)
    print(f"{'picture':<10}the first {len(summary.samples)} samples of a run are in {picture}")
    if problem is not None:
        raise DataError(problem)
    return 0


def _check_picture(picture: Path) -> None:
    """Refuse a path that cannot be written, before images are decoded."""
    from PIL import Image

    if picture.is_dir():
        raise ConfigError(f"--picture {picture} is a folder; add the name of a .png file.")
    if Image.registered_extensions().get(picture.suffix.lower()) not in Image.SAVE:
        raise ConfigError(f"--picture {picture} has no image format that can be written; use .png.")
    if not picture.parent.is_dir():
        raise ConfigError(f"--picture {picture} cannot be written: there is no folder {picture.parent}.")
