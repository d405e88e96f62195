"""Reads a configuration from YAML and the command line."""

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

from ddpm_hf.config.rules import ConfigError, validate
from ddpm_hf.config.schema import RunConfig

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
    """Reads `--config FILE` and overriding flags.

    Args:
        arguments: The command line without the program; None reads sys.argv.
        prog: The program's name in `--help`.

    Returns:
        The checked configuration, and whether `--dry_run` was given.

    Raises:
        ConfigError: If a key is unknown, a value has the wrong type or settings contradict each other.
    """
    config, namespace = _parse(_parser(prog), arguments)
    validate(config)
    return config, bool(namespace.dry_run)


def read_config(path: Path) -> RunConfig:
    """Reads a YAML file with any of the settings, and does not ask whether a run could be made of them.

    Raises:
        ConfigError: If it is no YAML, a key is unknown or a value has the wrong type.
    """
    return _parse(_parser("ddpm-hf"), ["--config", str(path)])[0]


def load_data_config(arguments: Sequence[str], prog: str = "ddpm-hf data") -> tuple[RunConfig, Path]:
    """Reads `SOURCE --picture FILE` and any flags of `ddpm-hf train`, of which those of the data count.

    Returns:
        The checked configuration, and where the picture goes.

    Raises:
        ConfigError: As `load_config`.
    """
    parser = _parser(prog)
    parser.description = "Show what a run would read: how many images, of which kind, and the first 64 samples."
    parser.epilog = "Example: ddpm-hf data photos/ --data.resolution 64 --data.random_flip true"
    parser.add_argument("source", nargs="?", help="Stands for --data.source.")
    parser.add_argument("--picture", default="data.png", help="Where to write the samples; what was there is replaced.")
    config, namespace = _parse(parser, arguments)
    if namespace.source is not None:
        if any(argument.split("=")[0] == "--data.source" for argument in arguments):
            raise ConfigError(
                f"data.source is {config.data.source}, but {namespace.source} is given as well; leave out one of them."
            )
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=namespace.source))
    validate(config)
    return config, Path(namespace.picture)


def _parse(parser: ArgumentParser, arguments: Sequence[str] | None) -> tuple[RunConfig, Namespace]:
    """Reads a command line with the settings of a run."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        parsed = parser.parse_args(arguments)
        _check_nulls(parsed)
        namespace = parser.instantiate(parsed)
    except (ArgumentError, UnicodeDecodeError) as error:
        raise ConfigError(_what_is_no_yaml(arguments) or _sentence(str(error))) from None
    return RunConfig(**{section: namespace[section] for section in _SECTIONS}), namespace


def _parser(prog: str) -> ArgumentParser:
    """Builds the command line out of the dataclasses.

    A value that names an import path in the place of a section would be imported, which runs it, before it is refused.
    """
    set_parsing_settings(import_path_denylist=["*"])
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a DDPM. Run the same command again to continue a run that was stopped.",
        epilog="Example: accelerate launch train_ddpm.py --config configs/digits_8.yaml --training.seed 1",
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the settings below; flags override it."
    )
    parser.add_argument("--dry_run", action="store_true", help="Check everything, print the configuration and stop.")
    for section in dataclasses.fields(RunConfig):
        parser.add_class_arguments(section.default_factory, section.name)
    return parser


def _check_nulls(parsed: Namespace) -> None:
    """Refuses nulls, and other things in the place of a section, which the parser lets through."""
    for section in _SECTIONS:
        if not isinstance(found := parsed[section], Namespace):
            shown = "null" if found is None else found
            raise ConfigError(f"{section} is {shown}, but must be a section of settings; see --help.")
    for key, hint in _TYPES.items():
        if parsed[key] is None and type(None) not in typing.get_args(hint):
            raise ConfigError(f"{key} is null, but must be {describe_type(hint)}.")


def _what_is_no_yaml(arguments: Sequence[str]) -> str | None:
    """Names the first file of --config that is not YAML, and where it stops being so; the parser names no file."""
    names = [name for option, name in itertools.pairwise(arguments) if option == "--config"]
    names += [word.removeprefix("--config=") for word in arguments if word.startswith("--config=")]
    for path in map(Path, names):
        try:
            yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            mark, problem = error.problem_mark, error.problem or "it cannot be read"
            where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            return f"--config {path}{where}: {problem}; mend the YAML there."
        except UnicodeDecodeError:
            return f"--config {path} is not text in UTF-8; save it as such."
        except (OSError, yaml.YAMLError):
            continue
    return None


def _sentence(message: str) -> str:
    """Says what the parser found wrong in the words of the configuration."""
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
    """Says that there is no such setting, and which one may have been meant."""
    close = difflib.get_close_matches(key, _TYPES, n=1)
    return f"there is no setting {key}; {f'did you mean {close[0]}?' if close else '--help lists all of them.'}"


def describe_type(hint: object) -> str:
    """Says what a setting accepts."""
    *words, last = _words(hint)
    return f"{', '.join(words)} or {last}" if words else last


def _words(hint: object) -> list[str]:
    """Names everything that a setting accepts."""
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
    """Reads a resolved configuration that `RunConfig.to_yaml` wrote.

    Raises:
        ConfigError: If it holds something else.
    """
    try:
        content: dict[str, dict[str, object]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path} is no configuration of a run ({' '.join(str(error).split())}); restore it."
        ) from None
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise ConfigError(f"{path} is no configuration of a run; restore it.")
    return content
