"""What the documents say a reader may type, and whether the programs that they name would take it."""

import argparse
import configparser
import functools
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from pyarrow import parquet

from ddpm_hf.cli import main
from ddpm_hf.config import load_config, load_data_config
from tests.conftest import REPOSITORY

DOCUMENTS = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]
RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
# Programs and modules of others that are typed beside ours: what they are told is not looked at.
OTHER_PROGRAMS = {"cd", "diff", "git", "hf", "tar"}
OTHER_MODULES = {"build"}
# What a sentence names without telling it anything.
BARE_MENTIONS = (["accelerate", "launch"], ["torchrun"], ["pip"], ["python", "train_ddpm.py"])


class Refused(Exception):
    """Why a command would not do what the document says."""


class Command(NamedTuple):
    """A command, and where it is written."""

    where: str
    line: str


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """Returns the fenced blocks of a document in this language."""
    return [block for _, name, block in FENCED.findall(document) if name == language]


def commands_of_documents() -> Iterator[Command]:
    """Yields each command of each sh block, of each transcript that begins with $, and at the head of each recipe."""
    for path in DOCUMENTS:
        if path.name == "CHANGELOG.md":
            continue
        for block in blocks(text_of(path), "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if shlex.split(line, comments=True):
                    yield Command(path.name, line.strip())
        for block in blocks(text_of(path), ""):
            # What is refused on purpose has its own test, tests/unit/test_training_document.py.
            yield from (Command(path.name, line) for line in re.findall(r"^\$ (.*)\n(?!error: )", block, re.MULTILINE))
    for path in RECIPES:
        yield from (Command(path.name, line) for line in re.findall(r"^# Command: +(.*)$", text_of(path), re.MULTILINE))


def mentions_of_documents() -> Iterator[Command]:
    """Yields what stands in the sentences as code and begins with one of our programs."""
    for path in DOCUMENTS:
        if path.name != "CHANGELOG.md":
            for span in re.findall(r"`([^`]+)`", FENCED.sub("", text_of(path))):
                if re.match(r"(ddpm-hf|python|make|torchrun|accelerate|pip|pytest)\b(?!\.)", span):
                    yield Command(path.name, " ".join(span.split()))


def examples_of_help(help_text: str) -> list[str]:
    """Returns the commands in a help text that are not its usage; what they do may follow after two spaces."""
    pattern = r"^(?:examples?: +|  +)((?:ddpm-hf|accelerate|torchrun|python) .*?)(?:  .*)?$"
    return re.findall(pattern, help_text, re.MULTILINE | re.IGNORECASE)


def check(line: str) -> None:
    """Raises Refused, or what the parser of the program raises, if a command could not be typed like this."""
    words = shlex.split(line, comments=True)
    missing = [word for word in words if re.match(r"(benchmarks|configs|data|docs|tests)/\w", word) and not _is(word)]
    if missing:
        raise Refused(f"{line}: there is no {missing[0]}.")
    if words[0].startswith("--"):
        # A variation of a training run that the reader has.
        words = ["ddpm-hf", "train", "--config", "configs/cifar10_32.yaml", *words]
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        _check_one(words[:end])
        words = words[end + 1 :]


def check_mention(line: str) -> None:
    """Raises Refused if what a sentence mentions is unknown: a command of ours needs not be complete there."""
    words = shlex.split(line)
    if words[0] != "ddpm-hf":
        if words not in BARE_MENTIONS:
            check(line)
    elif words[1].isalpha():
        if words[1] not in main.COMMANDS:
            raise Refused(f"{line}: ddpm-hf has no command {words[1]}.")
        unknown = {word for word in words if word.startswith("--")} - set(re.findall(r"--[\w.]+", help_of(words[1])))
        if unknown:
            raise Refused(f"{line}: ddpm-hf {words[1]} --help does not know {', '.join(unknown)}.")
    else:
        check(line)


@functools.cache
def help_of(*words: str) -> str:
    """Returns what `ddpm-hf WORDS --help` prints, in lines of any length."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        printed: list[str] = []
        patch.setenv("COLUMNS", "10000")
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.setattr(argparse.ArgumentParser, "_print_message", lambda _, text, file=None: printed.append(text))
        main.main([*words, "--help"])
    assert left.value.code == 0
    return "".join(printed)


def parsed(run: Callable[[], object]) -> argparse.Namespace:
    """Runs a program until its own parser has read the command line, and returns what it read."""

    class Stop(BaseException):
        """Goes through every `except Exception`."""

    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(*arguments: Any) -> None:
        raise Stop(parse_args(*arguments))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop) as stopped:
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        run()
    options: argparse.Namespace = stopped.value.args[0]
    return options


def _is(path: str) -> bool:
    return (REPOSITORY / path).exists()


def _check_one(words: list[str]) -> None:
    """Finds out which program a command starts, past variables and launchers."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, *arguments = words
    if program in OTHER_PROGRAMS:
        return
    if program not in PROGRAMS:
        raise Refused(f"{shlex.join(words)}: nothing is known of {program}.")
    PROGRAMS[program](arguments)


def _check_ddpm_hf(arguments: list[str]) -> None:
    name, *rest = arguments
    if name in ("--help", "--version"):
        return
    if name not in main.COMMANDS:
        raise Refused(f"ddpm-hf has no command {name}.")
    CHECKS[name](rest)


def _check_evaluate(arguments: list[str]) -> None:
    from ddpm_hf.cli.evaluate import data_config, parse
    from ddpm_hf.evaluation.generate import scheduler_class
    from ddpm_hf.evaluation.metrics import OF_SAMPLES, _check_numbers, check_metrics

    options = parse(arguments)
    check_metrics(options.metrics)
    data_config(options, (8, 8), 1)
    # Of data that are no file of the repository there are as many as it takes.
    num_images = parquet.read_metadata(options.data).num_rows if _is(options.data) else 50_000
    num_features = 2048 if options.features == "inception" else 1
    of_samples = [name for name in options.metrics if name in OF_SAMPLES]
    _check_numbers(of_samples, num_features, options.num_samples or 50_000, num_images)
    if options.scheduler is not None:
        scheduler_class(options.scheduler)


def _by_parse_of(module: str) -> Callable[[list[str]], object]:
    """Returns a check by a module's own `parse`, which knows more than its parser."""
    return lambda arguments: importlib.import_module(f"ddpm_hf.cli.{module}").parse(arguments)


def _by_parser_of(name: str) -> Callable[[list[str]], object]:
    """Returns a check by the parser that a command makes for itself."""
    return lambda arguments: parsed(lambda: main.main([name, *arguments]))


def _check_python(arguments: list[str]) -> None:
    script, *rest = arguments
    if script == "-c":
        compile(rest[0], "-c", "exec")
    elif script == "-m":
        module, *rest = rest
        if module in OTHER_MODULES:
            return
        PROGRAMS[{"ddpm_hf": "ddpm-hf"}.get(module, module)](rest)
    elif script == "train_ddpm.py":
        load_config(rest)
    elif not _is(script):
        raise Refused(f"there is no {script}.")
    elif rest or "ArgumentParser" in text_of(REPOSITORY / script):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *rest])
            parsed(lambda: runpy.run_path(str(REPOSITORY / script), run_name="__main__"))


def _check_accelerate(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    if arguments[0] != "launch":
        raise Refused(f"nothing is known of accelerate {arguments[0]}.")
    _check_launched(launch_command_parser().parse_args(arguments[1:]))


def _check_torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    _check_launched(get_args_parser().parse_args(arguments))


def _check_launched(options: argparse.Namespace) -> None:
    module = ["-m"] if options.module else []
    _check_python([*module, options.training_script, *options.training_script_args])


def _check_make(arguments: list[str]) -> None:
    makefile = text_of(REPOSITORY / "Makefile")
    targets = re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)
    for word in arguments:
        name, is_variable, value = word.partition("=")
        if not is_variable and word not in targets:
            raise Refused(f"the Makefile has no target {word}.")
        if is_variable and not re.search(rf"^{name} \?=", makefile, re.MULTILINE):
            raise Refused(f"the Makefile has no variable {name}.")
        if name == "ARGS" and "train" in arguments:
            load_config(["--config", "configs/digits_8.yaml", *shlex.split(value)])


def _check_pip(arguments: list[str]) -> None:
    if arguments[0] != "install":
        raise Refused(f"nothing is known of pip {arguments[0]}.")
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    known = set(setup["options.extras_require"])
    for word in arguments[1:]:
        requirement = Requirement(re.sub(r"^\.(?=$|\[)", "ddpm_hf", word)) if not word.startswith("-") else None
        if requirement and requirement.name == "ddpm_hf" and requirement.extras - known:
            raise Refused(f"setup.cfg has no extra {', '.join(requirement.extras - known)}.")


def _check_pytest(arguments: list[str]) -> None:
    for word in arguments:
        if not word.startswith("-") and not _is(word.partition("::")[0]):
            raise Refused(f"there is no {word}.")


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "ddpm-hf": _check_ddpm_hf,
    "python": _check_python,
    "accelerate": _check_accelerate,
    "torchrun": _check_torchrun,
    "make": _check_make,
    "pip": _check_pip,
    "pytest": _check_pytest,
}
# How each command of `ddpm-hf` is tried without being carried out.
CHECKS: dict[str, Callable[[list[str]], object]] = {
    "data": load_data_config,
    "train": load_config,
    "ema": _by_parser_of("ema"),
    "sample": _by_parse_of("sample_flags"),
    "evaluate": _check_evaluate,
    "plot": _by_parser_of("plot"),
    "push": _by_parse_of("push"),
    "verify": _by_parser_of("verify"),
}
