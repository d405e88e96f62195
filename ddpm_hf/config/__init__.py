"""The configuration of a run: schema, validation and parsing. Needs no torch."""

from ddpm_hf.config.launcher import Launcher, read_launcher, take_launcher, warn_of_training_flags
from ddpm_hf.config.parse import load_config, load_data_config, parse_command_line, read_config, read_config_dict
from ddpm_hf.config.rules import ConfigError, changed_settings, changed_too_late, log_warning, refuse_secrets, validate
from ddpm_hf.config.schema import (
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    HubConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerOption,
    PreviewConfig,
    RunConfig,
    TrackingConfig,
    TrainingConfig,
    UNetOverride,
)

__all__ = [
    "ConfigError",
    "DataConfig",
    "DiffusionConfig",
    "EvaluationConfig",
    "HubConfig",
    "Launcher",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerOption",
    "PreviewConfig",
    "RunConfig",
    "TrackingConfig",
    "TrainingConfig",
    "UNetOverride",
    "changed_settings",
    "changed_too_late",
    "load_config",
    "load_data_config",
    "log_warning",
    "parse_command_line",
    "read_config",
    "read_config_dict",
    "read_launcher",
    "refuse_secrets",
    "take_launcher",
    "validate",
    "warn_of_training_flags",
]
