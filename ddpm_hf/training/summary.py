"""What a run is about to do, in a few lines for a person."""

from ddpm_hf.data import ImageStream, describe_sets
from ddpm_hf.training.trainer import Trainer


def describe(trainer: Trainer) -> str:
    """Says what is trained on what, where, in which steps, and what it leaves on the disk."""
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
    return "\n".join(
        [
            f"{num_parameters:,} parameters, {describe_sets(trainer.images, trainer.held_out)}",
            steps,
            f"{trainer.device.type} x {num_processes}, {training.mixed_precision}, batch {batch} = {num_processes} x "
            f"{micro}",
            f"{_megabytes(trainer.saver.checkpoint_bytes)} a checkpoint, {training.num_checkpoints_kept} are kept in "
            f"{trainer.folder.path}",
        ]
    )


def _megabytes(num_bytes: int) -> str:
    """Says a size in megabytes."""
    return f"{num_bytes / 1e6:,.1f} MB"
