"""Parsing of YAML files and command-line flags into a `RunConfig`, with errors in the words of the settings."""

import builtins
import dataclasses
import difflib
import itertools
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from ddpm_hf.config.rules import ConfigError, join_or, validate
from ddpm_hf.config.schema import RunConfig
from ddpm_hf.files import read_yaml, yaml_problem

_SECTIONS: dict[str, type] = typing.get_type_hints(RunConfig)
_TYPES = {
    f"{section}.{name}": hint
    for section, kind in _SECTIONS.items()
    for name, hint in typing.get_type_hints(kind).items()
}
_TYPE_NAMES: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def load_config(arguments: Sequence[str] | None = None, prog: str = "ddpm-hf train") -> tuple[RunConfig, bool]:
    """Parse and validate a training command line: `--config FILE` and flags that override it.

    Args:
        arguments: Arguments without the program name; None reads sys.argv.
        prog: Program name for `--help`.

    Returns:
        The configuration, and whether `--dry_run` was given.

    Raises:
        ConfigError: A key is unknown, a value has the wrong type, or settings contradict each other.
    """
    config, namespace = _parse(_parser(prog), arguments)
    validate(config)
    return config, bool(namespace.dry_run)


def read_config(path: Path) -> RunConfig:
    """Parse a YAML file with any of the settings, without validating combinations.

    Raises:
        ConfigError: The file is not valid YAML, a key is unknown, or a value has the wrong type.
    """
    return _parse(_parser("ddpm-hf"), ["--config", str(path)])[0]


def load_data_config(arguments: Sequence[str], prog: str = "ddpm-hf data") -> tuple[RunConfig, Path]:
    """Parse and validate the command line of `ddpm-hf data`: `SOURCE --picture FILE` and any flags of `ddpm-hf train`.

    Returns:
        The configuration, and the path of the picture.

    Raises:
        ConfigError: As `load_config`.
    """
    parser = _parser(prog)
    parser.description = "Show what a run would read: number and kind of the images, and the first 64 samples."
    parser.epilog = "Example: ddpm-hf data photos/ --data.resolution 64 --data.random_flip true"
    parser.add_argument("source", nargs="?", help="Same as --data.source.")
    parser.add_argument("--picture", default="data.png", help="PNG file for the samples; an existing one is replaced.")
    config, namespace = _parse(parser, arguments)
    if namespace.source is not None:
        if any(argument.split("=")[0] == "--data.source" for argument in arguments):
            raise ConfigError(
                f"data.source is {config.data.source}, but SOURCE {namespace.source} is also given; give one of them."
            )
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=namespace.source))
    validate(config)
    return config, Path(namespace.picture)


def _parse(parser: ArgumentParser, arguments: Sequence[str] | None) -> tuple[RunConfig, Namespace]:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        parsed = parser.parse_args(arguments)
        _check_nulls(parsed)
        namespace = parser.instantiate(parsed)
    except (ArgumentError, UnicodeDecodeError) as error:
        raise ConfigError(_invalid_yaml(arguments) or _sentence(str(error))) from None
    return RunConfig(**{section: namespace[section] for section in _SECTIONS}), namespace


def _parser(prog: str) -> ArgumentParser:
    # jsonargparse would import a class path given in place of a section before refusing it.
    set_parsing_settings(import_path_denylist=["*"])
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a DDPM. The same command resumes a run that was stopped.",
        epilog="Example: accelerate launch train_ddpm.py --config configs/digits_8.yaml --training.seed 1",
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the settings below; flags override it."
    )
    parser.add_argument("--dry_run", action="store_true", help="Check everything, print the configuration and exit.")
    for section in dataclasses.fields(RunConfig):
        parser.add_class_arguments(section.default_factory, section.name)
    return parser


def _check_nulls(parsed: Namespace) -> None:
    """Refuse null and other non-sections in place of a section, and null values, which jsonargparse accepts."""
    for section in _SECTIONS:
        if not isinstance(found := parsed[section], Namespace):
            shown = "null" if found is None else found
            raise ConfigError(f"{section} is {shown}, but must be a section of settings; see --help.")
    for key, hint in _TYPES.items():
        if parsed[key] is None and type(None) not in typing.get_args(hint):
            raise ConfigError(f"{key} is null, but must be {describe_type(hint)}.")


def _invalid_yaml(arguments: Sequence[str]) -> str | None:
    """Return which --config file is not valid YAML and where; jsonargparse does not name the file."""
    names = [name for option, name in itertools.pairwise(arguments) if option == "--config"]
    names += [word.removeprefix("--config=") for word in arguments if word.startswith("--config=")]
    for path in map(Path, names):
        try:
            yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            return f"--config {path} is not valid YAML ({yaml_problem(error)}); correct it there."
        except UnicodeDecodeError:
            return f"--config {path} is not UTF-8 text; save it as UTF-8."
        except (OSError, yaml.YAMLError):
            continue
    return None


def _sentence(message: str) -> str:
    """Return an error of jsonargparse in the words of the settings."""
    message = " ".join(message.split())
    if match := re.match(r'Parser key "(\w+\.\w+)[\w.]*": .*(?:Got value|Given value): (.*)', message):
        key, value = match.groups()
        if key not in _TYPES:
            return message
        advice = ""
        if "a whole number" in _words(_TYPES[key]) and re.fullmatch(r"-?\d+\.0|\d+e\+\d+", value):
            advice = f"; write {int(float(value))}"
        return f"{key} is {value}, but must be {describe_type(_TYPES[key])}{advice}."
    if match := re.match(r"Group '(\w+)' does not accept option '(\w+)", message):
        return _unknown(f"{match[1]}.{match[2]}")
    if match := re.match(r"(?:Option '|unrecognized arguments: --)([\w.]+)", message):
        return _unknown(match[1])
    if match := re.match(r"Unexpected config: ?(.*)", message):
        return f"--config must name a YAML file with sections of settings, but it holds {match[1] or 'nothing'}."
    return message.replace('Parser key "config":', "--config:")


def _unknown(key: str) -> str:
    close = difflib.get_close_matches(key, _TYPES, n=1)
    return f"there is no setting {key}; {f'did you mean {close[0]}?' if close else '--help lists all settings.'}"


def describe_type(hint: object) -> str:
    """Return the values that a setting accepts, in words."""
    return join_or(_words(hint))


def _words(hint: object) -> list[str]:
    parts = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Union | types.UnionType:
            return [word for part in parts for word in _words(part)]
        case typing.Literal:
            return [str(part) for part in parts]
        case builtins.list if parts == (int,):
            return ["a list of whole numbers"]
        case builtins.list:
            return [f"a list of {describe_type(parts[0])}, like [{_words(parts[0])[0]}]"]
        case _:
            return [_TYPE_NAMES.get(hint, "a mapping")]


def read_config_dict(path: Path) -> dict[str, dict[str, object]]:
    """Read a configuration that `RunConfig.to_yaml` wrote, possibly by another version.

    Raises:
        ConfigError: The file contains something else.
    """
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not all(isinstance(section, dict) for section in content.values()):
        raise ConfigError(f"{path} is not the configuration of a run; restore or remove it.")
    return content
