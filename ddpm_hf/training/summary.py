"""What a run is about to do, in a few lines for a person."""

import math
from collections.abc import Iterator

from ddpm_hf.config import ModelConfig, RunConfig
from ddpm_hf.data import ImageStream, describe_sets
from ddpm_hf.training.optim import learning_rate_at
from ddpm_hf.training.trainer import Trainer
from ddpm_hf.unet import PRESETS


def describe(trainer: Trainer) -> str:
    """Says what is trained on what, where, in which steps, what it leaves on the disk, and what may be a mistake."""
    training, num_processes = trainer.config.training, trainer.accelerator.num_processes
    batch = training.train_batch_size
    steps = f"{training.num_steps:,} steps of {batch:,} images"
    if not isinstance(trainer.images, ImageStream):  # whose end nobody knows
        steps += f", {training.num_steps * batch / len(trainer.images):,.1f} epochs"
    num_parameters = sum(parameter.numel() for parameter in trainer.unet.parameters())
    if training.micro_batch_size == "auto":
        micro = f"auto (at most {trainer.micro_batch_size})"
    else:
        micro = f"{trainer.micro_batch_size} x {batch // (trainer.micro_batch_size * num_processes)} accumulated"
    kept = f"{_megabytes(trainer.saver.checkpoint_bytes)} a checkpoint, {training.num_checkpoints_kept} are kept in "
    if num_stored := trainer.saver.num_averages_stored():
        total = _megabytes(num_stored * trainer.saver.stored_average_bytes)
        kept = f"{total} of averages in {num_stored} parts (posthoc_ema); {kept}"
    return "\n".join(
        [
            f"{num_parameters:,} parameters, {describe_sets(trainer.images, trainer.held_out)}",
            steps,
            f"{trainer.device.type} x {num_processes}, {training.mixed_precision}, batch {batch} = {num_processes} x "
            f"{micro}",
            f"{kept}{trainer.folder.path}",
            *(f"warning: {sentence}" for sentence in warnings(trainer.config, trainer.images.image_shape)),
        ]
    )


def warnings(config: RunConfig, image_shape: tuple[int, int, int]) -> Iterator[str]:
    """Yields a sentence for each setting that can be meant, but is more likely a default that nobody thought of."""
    training = config.training
    num_steps, num_warmup = training.num_steps, training.learning_rate_warmup_steps
    if num_warmup > num_steps:
        reached = learning_rate_at(num_steps - 1, training) / training.learning_rate
        yield (
            f"training.learning_rate_warmup_steps {num_warmup:,} is more than training.num_steps {num_steps:,}: the "
            f"run ends at {reached:.0%} of training.learning_rate; lower it unless the run is to be continued."
        )
    nearest = nearest_preset(config.model, image_shape)
    if nearest is not None:
        _, height, width = image_shape
        yield (
            f"model.preset {config.model.preset} is made for images of another size than {height}x{width}; "
            f"{nearest} is nearer."
        )


def nearest_preset(model: ModelConfig, image_shape: tuple[int, int, int]) -> str | None:
    """Returns a preset made for images of about this size, where that of the run is off by a factor of two or more.

    Of presets for one size, it is that of the same source. None where the network is not a preset's, or none is nearer.
    """
    if model.config_file or model.from_pretrained or model.preset is None or "block_out_channels" in model.overrides:
        return None
    preset, side = model.preset, max(image_shape[1:])

    def octaves(name: str) -> float:
        return abs(math.log2(int(name.rpartition("_")[2]) / side))

    nearest = min(PRESETS, key=lambda name: (octaves(name), name.partition("_")[0] != preset.partition("_")[0]))
    return nearest if octaves(preset) >= 1 and octaves(nearest) < octaves(preset) else None


def _megabytes(num_bytes: int) -> str:
    """Says a size in megabytes."""
    return f"{num_bytes / 1e6:,.1f} MB"
