"""Reads a configuration from YAML and the command line."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from ddpm_hf.config.rules import ConfigError, validate
from ddpm_hf.config.schema import RunConfig


def load_config(arguments: Sequence[str] | None = None, prog: str = "ddpm-hf train") -> tuple[RunConfig, bool]:
    """Reads `--config FILE` and overriding flags.

    Args:
        arguments: The command line without the program; None reads sys.argv.
        prog: The program's name in `--help`.

    Returns:
        The checked configuration, and whether `--dry_run` was given.

    Raises:
        ConfigError: If a key is unknown, a value has the wrong type or settings contradict each other.
    """
    parser = _parser(prog)
    try:
        namespace = parser.instantiate(parser.parse_args(None if arguments is None else list(arguments)))
    except ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from None
    sections = {section.name: namespace[section.name] for section in dataclasses.fields(RunConfig)}
    config = RunConfig(**sections)
    validate(config)
    return config, bool(namespace.dry_run)


def _parser(prog: str) -> ArgumentParser:
    """Builds the command line out of the dataclasses."""
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        description="Train a DDPM. Run the same command again to continue a run that was stopped.",
        epilog="Example: accelerate launch train_ddpm.py --config configs/digits_8.yaml --training.seed 1",
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the settings below; flags override it."
    )
    parser.add_argument("--dry_run", action="store_true", help="Check everything, print the configuration and stop.")
    for section in dataclasses.fields(RunConfig):
        parser.add_class_arguments(section.default_factory, section.name)  # type: ignore[arg-type]
    return parser


def read_config_dict(path: Path) -> dict[str, dict[str, object]]:
    """Reads a resolved configuration that `RunConfig.to_yaml` wrote."""
    content: dict[str, dict[str, object]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content
