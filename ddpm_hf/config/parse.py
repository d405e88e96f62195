"""Files, command lines and Python values -> RunConfig, with errors in the words of the settings.

jsonargparse parses files and command lines. Python values have types already, which are compared with the schema.
"""

import builtins
import dataclasses
import difflib
import functools
import itertools
import os
import re
import sys
import threading
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from jsonargparse._common import parsing_settings

from ddpm_hf.config.rules import ConfigError, check, join_or, validate
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
_SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_PARSING = threading.Lock()


def load_config(
    config: str | os.PathLike[str] | Mapping[str, Any] | RunConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Return the configuration of a run, checked as that of a command line.

    Values that change the meaning of nothing are accepted: numpy numbers and arrays, tuples for lists, paths for text.

    Args:
        config: A YAML file, a mapping of sections, another configuration, or None for the defaults.
        overrides: Settings that replace those of `config`. Like a mapping for `config`, it has dotted names
            (`{"training.num_steps": 200}`), sections (`{"training": {"num_steps": 200}}`), or both. One key of a
            setting that is a mapping has a name of its own (`{"model.overrides.dropout": 0.1}`).

    Returns:
        A new configuration that shares nothing with the arguments. It may lack data.source, which is not needed for
        images in memory.

    Raises:
        ConfigError: A setting is unknown, a value has the wrong type or is out of range, or settings contradict each
            other.
    """
    match config:
        case None | RunConfig() | Mapping():
            settings = _values_of(RunConfig())
            _set(settings, config if isinstance(config, Mapping) else _sections_of(config or RunConfig()))
        case str() | os.PathLike():
            settings = _values_of(_read_file(Path(config).expanduser()))
        case _:
            raise ConfigError(
                f"load_config was given a {type(config).__name__}; give the path of a YAML file, a dictionary or a "
                "RunConfig. parse_command_line in ddpm_hf.config takes the arguments of a command line."
            )
    if not isinstance(overrides, Mapping | None):
        raise ConfigError(
            f'overrides is a {type(overrides).__name__}; give a dictionary such as {{"training.num_steps": 200}}.'
        )
    _set(settings, overrides or {})
    sections: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    for name, value in settings.items():
        section, setting = name.split(".")
        sections[section][setting] = _convert(name, _TYPES[name], value)
    loaded = RunConfig(**{section: _SECTIONS[section](**values) for section, values in sections.items()})
    check(loaded, has_train_dataset=True, has_eval_dataset=True)
    return loaded


def _read_file(path: Path) -> RunConfig:
    """Parse a YAML file, with errors that name the file instead of a flag."""
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {path}; give the path of a YAML file.")
    try:
        return read_config(path)
    except ConfigError as error:
        words = str(error).replace("--config must name a YAML file", f"{path} must be a YAML file")
        raise ConfigError(words.removeprefix("--config ")) from None


def _sections_of(config: RunConfig) -> dict[str, Any]:
    """Return the sections of a configuration, in which Python code may have put anything."""
    return {section: getattr(config, section) for section in _SECTIONS}


def _values_of(config: RunConfig) -> dict[str, Any]:
    """Return dotted name -> value."""
    return {name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in _TYPES}


def _set(settings: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Set the values of a mapping of sections and dotted names."""
    seen: set[str] = set()
    for name, value in _named_values(given):
        setting, key = ".".join(name.split(".")[:2]), ".".join(name.split(".")[2:])
        is_mapping = typing.get_origin(_TYPES.get(setting)) is dict
        if setting not in _TYPES or (key and not is_mapping):
            raise ConfigError(_unknown(name))
        if name in seen:
            raise ConfigError(f"{name} is given twice; give it once.")
        seen.add(name)
        settings[setting] = {**settings[setting], key: value} if key else value


def _named_values(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each setting."""
    for name, value in given.items():
        if dataclasses.is_dataclass(value) and isinstance(value, _SECTIONS.get(name, ())):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if "." in str(name):
            yield name, value
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{setting}", one) for setting, one in value.items())
        elif name in _SECTIONS:
            raise ConfigError(
                f"{name} is {'null' if value is None else value}, but must be a section of settings; see --help."
            )
        else:
            raise ConfigError(_unknown(str(name)))


def _convert(name: str, hint: object, value: object) -> object:
    """Return a Python value as the schema holds it.

    Raises:
        ConfigError: It has another type.
    """
    value = _plain(value)
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        return {str(key): _convert(f"{name}.{key}", typing.get_args(hint)[1], one) for key, one in value.items()}
    try:
        return _fit(value, hint)
    except TypeError:
        shown = repr(value) if isinstance(value, str) else "null" if value is None else value
        raise ConfigError(_wrong_type(name, hint, shown, str(value))) from None


def _plain(value: Any) -> Any:
    """Return the value in Python's own types: numbers and arrays of numpy, paths, tuples and strings of subclasses."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _fit(value: Any, hint: object) -> Any:
    """Return a plain value as a type of the schema, or raise TypeError."""
    parts = typing.get_args(hint)
    is_scientific = isinstance(value, str) and _SCIENTIFIC.fullmatch(value) is not None  # PyYAML reads 1e-4 as text
    match typing.get_origin(hint):
        case typing.Union | types.UnionType:
            best = float if is_scientific else type(value)  # 3 is an integer before it is a float
            for part in sorted(parts, key=lambda part: part is not best):
                with suppress(TypeError):
                    return _fit(value, part)
        case typing.Literal:
            if any(part == value and type(part) is type(value) for part in parts):
                return value
        case builtins.list:
            if isinstance(value, list):
                return [_fit(item, parts[0]) for item in value]
        case _:
            if hint is float and (type(value) in (int, float) or is_scientific):
                return float(value)
            if type(value) is hint:
                return value
    raise TypeError


def parse_command_line(arguments: Sequence[str] | None = None, prog: str = "ddpm-hf train") -> tuple[RunConfig, bool]:
    """Parse and check a training command line: `--config FILE` and flags that override it.

    Args:
        arguments: Arguments without the program name; None reads sys.argv.
        prog: Program name for `--help`.

    Returns:
        The configuration, and whether `--dry_run` was given.

    Raises:
        ConfigError: A key is unknown, a value has the wrong type, or settings contradict each other.
    """
    config, namespace = _parse(_shared_parser(prog), arguments)
    check(config)
    return config, bool(namespace.dry_run)


def read_config(path: Path) -> RunConfig:
    """Parse a YAML file with any of the settings, without validating combinations.

    Raises:
        ConfigError: The file is not valid YAML, a key is unknown, or a value has the wrong type.
    """
    return _parse(_shared_parser("ddpm-hf"), ["--config", str(path)])[0]


def load_data_config(arguments: Sequence[str], prog: str = "ddpm-hf data") -> tuple[RunConfig, Path]:
    """Parse and validate the command line of `ddpm-hf data`: `SOURCE --picture FILE` and any flags of `ddpm-hf train`.

    Returns:
        The configuration, and the path of the picture.

    Raises:
        ConfigError: As `parse_command_line`.
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
    if config.data.vae is not None:  # which needs a sampler that does not clip
        config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, clip_sample=False))
    validate(config)
    return config, Path(namespace.picture)


@dataclasses.dataclass(frozen=True)
class DistillCommand:
    """A command line of `ddpm-hf distill`.

    Args:
        teacher: Run, checkpoint, pipeline or Hub repository.
        teacher_config: YAML file with the settings of its run; None for those in its folder.
        revision: Branch, tag or commit of the Hub repository; None for the default branch.
        steps: Sampling steps of each student, each half of those before.
        guidance_scale: Classifier-free guidance scale of the teacher.
        output: Folder of the students; None for the default.
        is_dry_run: Whether to check only.
        arguments: All arguments, also the settings of the training.
    """

    teacher: str
    teacher_config: Path | None
    revision: str | None
    steps: tuple[int, ...]
    guidance_scale: float | None
    output: Path | None
    is_dry_run: bool
    arguments: tuple[str, ...]

    def config(self, settings: Mapping[str, Mapping[str, Any]]) -> RunConfig:
        """Return the configuration of a student: settings that flags of the command line override.

        Raises:
            ConfigError: As `parse_command_line`.
        """
        config, _ = _parse(_distill_parser(settings), self.arguments)
        check(config)
        return config


def parse_distill_command(arguments: Sequence[str], prog: str = "ddpm-hf distill") -> DistillCommand:
    """Parse and check a command line of `ddpm-hf distill`, except the settings of the training.

    Raises:
        ConfigError: As `parse_command_line`, or the steps do not halve, or a setting is given that the command decides.
    """
    _, namespace = _parse(_distill_parser({}, prog), arguments)
    for flag, fix in _DECIDED_BY_DISTILL.items():
        if any(argument.split("=")[0] == f"--{flag}" for argument in arguments):
            raise ConfigError(f"--{flag} is decided by ddpm-hf distill; {fix}.")
    if not namespace.teacher:
        raise ConfigError("no teacher is given; give the folder of a run, a checkpoint or a pipeline.")
    words = str(namespace.steps).split(",")
    steps = tuple(int(word) for word in words if word.strip().isdecimal())
    if len(steps) != len(words) or 0 in steps:
        raise ConfigError(f"--steps is {namespace.steps}; give numbers of steps separated by commas, such as 8,4,2,1.")
    for before, after in itertools.pairwise(steps):
        if before != 2 * after:
            expected = f"after {before} comes {before // 2}" if before % 2 == 0 else f"{before} is odd"
            raise ConfigError(
                f"--steps is {namespace.steps}, but a student has half as many steps as its teacher, and {expected}; "
                "give numbers that halve, such as 8,4,2,1."
            )
    return DistillCommand(
        teacher=namespace.teacher,
        teacher_config=None if namespace.config is None else Path(namespace.config),
        revision=namespace.revision,
        steps=steps,
        guidance_scale=namespace.guidance_scale,
        output=None if namespace.output is None else Path(namespace.output),
        is_dry_run=bool(namespace.dry_run),
        arguments=tuple(arguments),
    )


_DECIDED_BY_DISTILL = {
    "training.output_dir": "set --output",
    "distillation.teacher": "give the teacher without a flag",
    "distillation.revision": "set --revision",
    "distillation.num_inference_steps": "set --steps",
    "distillation.guidance_scale": "set --guidance_scale",
    "model.from_pretrained": "a student starts from its teacher",
    "model.config_file": "a student has the network of its teacher",
    "model.preset": "a student has the network of its teacher",
    "hub.push_to_hub": "push a student with ddpm-hf push",
}


def _distill_parser(settings: Mapping[str, Mapping[str, Any]], prog: str = "ddpm-hf distill") -> ArgumentParser:
    parser = _parser(prog, reads_config=False)
    parser.description = (
        "Distill a trained model into students that sample in few steps (Salimans & Ho 2022). Each learns two DDIM "
        "steps of the one before it as one of its own. The same command resumes a run that was stopped."
    )
    parser.usage = (
        f"{prog} TEACHER [--steps 8,4,2,1] [--output PATH] [--guidance_scale X] [--revision REVISION] [--config FILE]\n"
        "       [--dry_run] [settings of ddpm-hf train]"
    )
    parser.epilog = "Example: ddpm-hf distill outputs/digits --steps 8,4,2,1 --output outputs/digits_distilled"
    parser.add_argument("teacher", nargs="?", help="Folder of a run, a checkpoint or a pipeline, or a Hub repository.")
    parser.add_argument("--steps", default="8,4,2,1", help="Sampling steps of the students, each half of those before.")
    parser.add_argument(
        "--guidance_scale", type=float, help="Classifier-free guidance scale of the teacher; 1 disables guidance."
    )
    parser.add_argument("--output", help="Folder of the students; by default that of the teacher with _distilled.")
    parser.add_argument("--revision", help="Branch, tag or commit of the Hub repository.")
    parser.add_argument("--config", help="YAML file with the settings of the teacher's run, if its folder has none.")
    parser.set_defaults(
        {f"{section}.{name}": value for section in settings for name, value in settings[section].items()}
    )
    return parser


def _parse(parser: ArgumentParser, arguments: Sequence[str] | None) -> tuple[RunConfig, Namespace]:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _no_imports():
            parsed = parser.parse_args(arguments)
            _check_nulls(parsed)
            namespace = parser.instantiate(parsed)
    except (ArgumentError, UnicodeDecodeError) as error:
        raise ConfigError(_invalid_yaml(arguments) or _sentence(str(error))) from None
    return RunConfig(**{section: namespace[section] for section in _SECTIONS}), namespace


@contextmanager
def _no_imports() -> Iterator[None]:
    """Keep jsonargparse from importing a class path given in place of a section before refusing it.

    Its settings are those of the whole process, which may have parsers of its own, so one thread parses at a time.
    """
    with _PARSING:
        before = dict(parsing_settings)
        set_parsing_settings(import_path_denylist=["*"])
        try:
            yield
        finally:
            parsing_settings.update(before)


@functools.cache
def _shared_parser(prog: str) -> ArgumentParser:
    """Build a parser once: that takes longer than its use, which does not change it."""
    return _parser(prog)


def _parser(prog: str, *, reads_config: bool = True) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a DDPM. The same command resumes a run that was stopped.",
        epilog="Example: accelerate launch train_ddpm.py --config configs/digits_8.yaml --training.seed 1",
    )
    if reads_config:
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
    if match := re.match(r'Parser key "(\w+\.\w+)[\w.]*": .*(?:Got value|Given value): ?(.*)', message):
        key, value = match.groups()
        return _wrong_type(key, _TYPES[key], value or "empty", value) if key in _TYPES else message
    if match := re.match(r"Group '(\w+)' does not accept option '(\w+)", message):
        return _unknown(f"{match[1]}.{match[2]}")
    if match := re.match(r"(?:Option '|unrecognized arguments: --)([\w.]+)", message):
        return _unknown(match[1])
    if match := re.match(r"Unexpected config: ?(.*)", message):
        return f"--config must name a YAML file with sections of settings, but it holds {match[1] or 'nothing'}."
    return message.replace('Parser key "config":', "--config:")


def _wrong_type(name: str, hint: object, shown: object, text: str) -> str:
    """Return the sentence for a value of the wrong type."""
    is_whole = "a whole number" in _words(hint) and re.fullmatch(r"-?\d+\.0|\d+e\+\d+|-?\d+", text)
    return f"{name} is {shown}, but must be {describe_type(hint)}{f'; write {int(float(text))}' if is_whole else ''}."


def _unknown(key: str) -> str:
    same = [name for name in _TYPES if name.split(".")[1] == key]
    close = same or difflib.get_close_matches(key, _TYPES, n=1)
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
