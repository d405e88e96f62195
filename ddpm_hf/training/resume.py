"""Which checkpoint a run goes on from, and whether it may with the configuration that is asked for."""

import logging

from ddpm_hf.config import ConfigError, RunConfig, changed_settings, changed_too_late, read_config_dict
from ddpm_hf.training import checkpoint
from ddpm_hf.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


def choose_checkpoint(
    folder: RunFolder, config: RunConfig, *, is_dry_run: bool = False
) -> checkpoint.Checkpoint | None:
    """Returns the newest valid checkpoint, or None for a run that starts at the beginning.

    Each newer one that is damaged is named with its reason and, except in a dry run, put aside; so is each setting that
    differs and may.

    Raises:
        ValueError: If there are checkpoints but none is valid, or one belongs to a run with other settings, or to a
            finished one that settings come too late for.
    """
    latest, skipped = checkpoint.find_latest(folder.checkpoints)
    for line in skipped:
        logger.warning("Passed over a checkpoint that cannot be used: %s", line)
    if latest is None:
        return None
    fixed, free = changed_settings(_settings_of(latest), config)
    if fixed:
        raise ConfigError(
            f"{folder.path} holds a run with other settings ({'; '.join(fixed)}); restore them, or choose another "
            "training.output_dir."
        )
    if latest.step > config.training.num_steps:
        raise ConfigError(
            f"{folder.path} is already at step {latest.step}, beyond training.num_steps {config.training.num_steps}; "
            f"set at least {latest.step}, or choose another training.output_dir."
        )
    if latest.step == config.training.num_steps and (late := changed_too_late(free)):
        raise ConfigError(
            f"{folder.path} holds a finished run, which was trained with other settings ({'; '.join(late)}); restore "
            "them, set a larger training.num_steps to train on with these, or choose another training.output_dir."
        )
    for line in free:
        logger.warning("Continuing with a changed setting: %s", line)
    if not is_dry_run:
        for line in skipped:
            checkpoint.put_aside(folder.checkpoints / line.split(":")[0])
    return latest


def _settings_of(found: checkpoint.Checkpoint) -> dict[str, dict[str, object]]:
    """Reads the configuration that a checkpoint was written with."""
    try:
        settings = read_config_dict(found.path / "config.yaml")
    except (FileNotFoundError, UnicodeDecodeError, ConfigError):
        settings = None
    if not isinstance(settings, dict) or not all(isinstance(section, dict) for section in settings.values()):
        raise checkpoint.CheckpointError(
            f"{found.path} holds no configuration of a run; restore it, or choose another training.output_dir."
        )
    return settings
