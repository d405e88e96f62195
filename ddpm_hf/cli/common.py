"""What several commands share: errors, signals, folders, sampling flags.

How a command tells what went wrong: in one sentence, without secrets, once.

How a command ends at a signal: by an exception, so that what it was doing is tidied up.

The parser of every command but train, which has the one of its configuration.

The models that commands are pointed at: a folder of this machine or a repository of the Hub, found and loaded.

The flags that `ddpm-hf sample` and `ddpm-hf evaluate` share: which model, and how images are drawn.
"""

import csv
import errno
import inspect
import logging
import math
import os
import re
import signal
import socket
import ssl
import sys
import tempfile
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from ddpm_hf.config import ConfigError
from ddpm_hf.redaction import reason_of, redact

if TYPE_CHECKING:
    from ddpm_hf.diffusion import GaussianDiffusionPipeline


_ADVICE = {
    errno.ENOSPC: "make room, or write to another disk",
    errno.EDQUOT: "make room, or write to another disk",
    errno.EROFS: "write to a disk that is not read-only",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
}


class RankFailed(Exception):
    """This rank cannot go on, and the others need not know why: it tells the message itself.

    Args:
        message: What went wrong, and what to do.
        exit_code: The one that the command ends with.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OutOfMemory(RankFailed):
    """Memory ran out, on the device or on the host; the message says how to need less."""


def complain(message: str, *, of_this_rank: bool = False) -> None:
    """Prints an error on rank 0, since the other ranks have the same one, or on the only rank that has it."""
    rank = os.environ.get("RANK", "0")
    if of_this_rank or rank == "0":
        print(f"error: {f'rank {rank}: ' if rank != '0' else ''}{redact(message)}", file=sys.stderr, flush=True)


def sentence_of(error: OSError) -> str:
    """Returns what the system refused, of which file, and what to do about it."""
    what = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return f"{what}; {_ADVICE[error.errno]}." if error.errno in _ADVICE else what


@contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """Turns memory that runs out inside, on any device, into a sentence, which the command line prints.

    Args:
        advice: What to do, such as "lower --batch_size"; without a full stop.

    Raises:
        OutOfMemory: If memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch has a class of its own for GPUs alone; on a CPU only the words tell.
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        raise OutOfMemory(f"out of memory ({(str(error) or 'no memory').splitlines()[0]}); {advice}.") from error


# Ctrl-C raises KeyboardInterrupt as it is.
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Terminated(SystemExit):
    """A signal ends the command; not an Exception, so that nothing takes it for a failure of its own and goes on.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(143)
        self.name = signal.Signals(number).name


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Lets SIGTERM and SIGUSR1 end what is inside as Ctrl-C does, so that files, locks and processes are tidied up.

    Raises:
        Terminated: At such a signal, wherever the main thread is.
    """

    def end(number: int, _: FrameType | None) -> None:
        raise Terminated(number)

    old_handlers = {number: signal.signal(number, end) for number in _ENDING_SIGNALS}
    try:
        yield
    finally:
        _install(old_handlers)


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Makes a folder that goes away again, at whatever moment a signal comes; a second one ends the process at once.

    One that comes while the folder is made or removed waits until that is done. Python takes signals in the main thread
    alone: in another one this is a folder and nothing more.

    Args:
        prefix: How its name begins.

    Raises:
        Terminated: At SIGTERM and SIGUSR1.
        KeyboardInterrupt: At SIGINT.
    """
    is_ours, received = False, 0

    def end(number: int, _: FrameType | None) -> None:
        nonlocal received
        for each in taken:
            signal.signal(each, signal.SIG_DFL)
        received = number
        if is_ours:
            raise _exception_of(number)

    is_main_thread = threading.current_thread() is threading.main_thread()
    taken = [
        number
        for number in ((*_ENDING_SIGNALS, signal.SIGINT) if is_main_thread else ())
        if signal.getsignal(number) is not signal.SIG_IGN  # as shells let programs in the background ignore Ctrl-C
    ]
    old_handlers = {number: signal.signal(number, end) for number in taken}
    try:
        with tempfile.TemporaryDirectory(prefix=prefix) as folder:
            try:
                is_ours = True
                if received:
                    raise _exception_of(received)
                yield Path(folder)
            finally:
                is_ours = False
    finally:
        _install(old_handlers)
    if received:
        raise _exception_of(received)


def _exception_of(number: int) -> BaseException:
    """Returns what a signal raises."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)


def _install(handlers: Mapping[signal.Signals, Any]) -> None:
    """Puts handlers back; None stands for one that was not installed from Python, which Python cannot put back."""
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Parser(ArgumentParser):
    """Takes no abbreviations, which a further option would break, and repeats no secret when it complains."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        """Says what is wrong with the command line, and exits with 2."""
        super().error(redact(message))


# What is underneath whatever the client of the Hub calls it.
_UNREACHABLE = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
_MOST_HELD = 1000  # messages, of which loading has a few
_REPOSITORY_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+", re.ASCII)


def find_folder(name: str) -> Path | None:
    """Returns the folder of a pipeline, that inside a run folder included; None for a repository of the Hub.

    Raises:
        ConfigError: The folder holds no pipeline, or the name is neither that of a folder nor of a repository.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists() or name.startswith(("/", ".", "~")) or not _REPOSITORY_ID.fullmatch(name):
            raise ConfigError(
                f"{name} is no folder of this machine, and no repository of the Hub is called so; give the folder that "
                "training saved, or a name such as google/ddpm-cifar10-32."
            )
        return None
    for candidate in (folder, folder / "pipeline"):
        if (candidate / "model_index.json").is_file():
            return candidate
    if (folder / "checkpoints").is_dir():
        raise ConfigError(f"{folder} holds a run that is not finished; finish it with the command that began it.")
    raise ConfigError(f"{folder} holds no pipeline (model_index.json); give the folder that training saved.")


def find_model(name: str, revision: str | None) -> Path | None:
    """Returns what `find_folder` returns.

    Raises:
        ConfigError: As `find_folder`; also for a revision of a folder.
    """
    folder = find_folder(name)
    if folder is not None and revision is not None:
        raise ConfigError(f"--revision is for repositories of the Hub, and {name} is a folder; leave it out.")
    return folder


def load_pipeline(name: str, folder: Path | None, **options: Any) -> "GaussianDiffusionPipeline":
    """Loads what `find_folder` found.

    Args:
        name: As the user gave it.
        folder: What `find_folder` returned.
        **options: Keyword arguments of `from_pretrained`; those that are None are left out.

    Raises:
        ConfigError: It cannot be loaded; the sentence says why.
        ValueError: It has no safetensors, or its parts do not fit each other.
    """
    import torch
    from diffusers.utils.logging import disable_progress_bar

    from ddpm_hf.diffusion import GaussianDiffusionPipeline

    if not sys.stderr.isatty():
        disable_progress_bar()  # for each part that is loaded
    given = {key: value for key, value in options.items() if value is not None}
    try:
        with _told_if_it_loads():
            pipeline = GaussianDiffusionPipeline.from_pretrained(folder or name, **given)
    except (torch.OutOfMemoryError, MemoryError, ValueError):
        raise
    except Exception as error:  # diffusers, safetensors and httpx raise many types
        reason = _reason_here(error) if folder else _reason_of_hub(error, options.get("revision"))
        raise ConfigError(f"{name} {reason}") from error
    assert isinstance(pipeline, GaussianDiffusionPipeline)
    return pipeline


@contextmanager
def _told_if_it_loads() -> Iterator[None]:
    """Holds back what diffusers writes while it loads, and drops it for an error, whose one sentence says it all."""
    logger = logging.getLogger("diffusers")
    handlers, held = logger.handlers, MemoryHandler(_MOST_HELD, flushLevel=logging.CRITICAL + 1)
    logger.handlers = [held]
    try:
        yield
    finally:
        logger.handlers = handlers
    for record in held.buffer:
        logger.handle(record)


def download_folder(name: str, revision: str | None = None) -> Path:
    """Returns a local copy of a repository of the Hub, without what no pipeline of ours needs.

    Raises:
        ConfigError: It cannot be had; the sentence says why.
    """
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", "verification.json", "*.py", "unet/*", "scheduler/*"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=["*.bin"]))
    except Exception as error:  # the Hub's own errors, those of the network, and those of the disk
        raise ConfigError(f"{name} {_reason_of_hub(error, revision)}") from error
    if not (folder / "model_index.json").is_file():
        raise ConfigError(f"{name} is a repository without a pipeline (model_index.json); choose a DDPM.")
    return folder


def commit_of(pipeline: "GaussianDiffusionPipeline") -> str | None:
    """Returns the commit of the repository that a pipeline was loaded from; None for a folder."""
    match = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\]|$)", str(pipeline.unet.config.get("_name_or_path")))
    return match[1] if match else None


def _reason_here(error: Exception) -> str:
    """Says why a folder does not load."""
    return f"holds no pipeline that can be loaded: {reason_of(error)}."


def _reason_of_hub(error: Exception, revision: str | None) -> str:
    """Says why a repository does not load, and what to do."""
    from huggingface_hub import errors

    for kind, reason in (
        (errors.GatedRepoError, "is open only to whom its owner lets in; ask for access on its page, then log in with "
         "`hf auth login`."),
        (errors.RepositoryNotFoundError, "is no folder here and no repository of the Hub that you may read; check the "
         "name, or log in with `hf auth login` if it is private."),
        (errors.RevisionNotFoundError, f"has no revision {revision}; give a branch, a tag or a commit that it has."),
        (errors.OfflineModeIsEnabled, "is no folder here and not in the cache, and HF_HUB_OFFLINE forbids to ask the "
         "Hub; unset it, or give a folder."),
        (_UNREACHABLE, "is no folder here and not in the cache, and the Hub cannot be reached; check the connection, "
         "or give a folder."),
        (errors.EntryNotFoundError, "is a repository without a pipeline (model_index.json); choose a DDPM."),
    ):  # fmt: skip
        if any(isinstance(cause, kind) for cause in _causes(error)):
            return reason
    return f"is a repository that cannot be loaded: {reason_of(error)}."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


NATIVE_SCHEDULER = "GaussianDiffusionScheduler"
# Those of them that a call of the pipeline takes under the same name.
CALL_FLAGS = ("num_inference_steps", "eta", "timestep_spacing", "guidance_scale", "guidance_rescale")


def add_model_flags(parser: ArgumentParser) -> None:
    """Adds which model."""
    parser.add_argument("folder", help="folder of a pipeline or of a run, or a repository of the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of a repository of the Hub")
    parser.add_argument("--variant", help="weights of another kind that the model has beside its usual ones, as fp16")


def add_sampling_flags(add: Callable[..., Any], *, batch_size: int, turn: str) -> None:
    """Adds how images are drawn.

    Args:
        add: Takes a flag, as `add_argument` of a parser or a group.
        batch_size: The default.
        turn: Which image has which of the labels.
    """
    add("--labels", metavar="LIST",
        help=f"names or numbers of classes, with commas between them; by default all. {turn}; a name with a comma in "
        "it goes in double quotes, and where the first begins with a dash, it is --labels=LIST")  # fmt: skip
    add("--num_inference_steps", type=int, help="by default as many as in training")
    add("--scheduler", help="name of a scheduler of diffusers; by default that of the model")
    add("--eta", type=float, help="0 samples as DDIM, 1 as DDPM; by default what the scheduler does by itself")
    add("--timestep_spacing", choices=("leading", "trailing", "linspace", "quadratic"),
        help="by default that of the scheduler")  # fmt: skip
    add("--guidance_scale", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    add("--guidance_rescale", type=float, default=0.0, help="how far guidance keeps the contrast, 0 to 1; by default 0")
    add("--variance", choices=("trained", "analytic"), default="trained",
        help="analytic: the optimal one for the network (Bao et al. 2022); `ddpm-hf evaluate --estimate_variance` "
        "finds it")  # fmt: skip
    add("--batch_size", type=int, default=batch_size,
        help=f"images of one forward on one device; fewer need less memory. By default {batch_size}")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="precision of the network")


def check_sampling_flags(options: Namespace) -> None:
    """Refuses what those flags forbid by themselves or each other.

    Raises:
        ConfigError: With what to do.
    """
    check_ranges(options, {
        "batch_size": (1, math.inf), "num_inference_steps": (1, math.inf), "eta": (0, 1), "guidance_rescale": (0, 1),
    })  # fmt: skip
    if not (math.isfinite(options.guidance_scale) and options.guidance_scale >= 0):
        raise ConfigError(f"--guidance_scale is {options.guidance_scale}, but must be a number, at least 0.")
    if options.guidance_rescale and options.guidance_scale == 1:
        raise ConfigError("--guidance_rescale corrects guidance, and --guidance_scale is 1, none; give another scale.")
    if options.scheduler not in (None, NATIVE_SCHEDULER) and options.variance == "analytic":
        raise ConfigError(f"--variance analytic needs {NATIVE_SCHEDULER}; leave --scheduler out.")


def check_ranges(options: Namespace, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuses numbers outside their range, by the name of the flag.

    Raises:
        ConfigError: With the range.
    """
    for name, (lowest, highest) in ranges.items():
        value = getattr(options, name)
        if isinstance(value, int | float) and not lowest <= value <= highest:
            limits = f"at least {lowest}" if highest == math.inf else f"{lowest} to {highest}"
            raise ConfigError(f"--{name} is {value}, but must be {limits}.")


def check_scheduler(options: Namespace) -> None:
    """Refuses a scheduler that does not exist or has no eta, before a model is loaded; needs torch.

    Raises:
        ConfigError: With what to do.
        ValueError: With the name that may be meant.
    """
    from ddpm_hf.evaluation.generate import scheduler_class

    if options.scheduler is None:
        return
    steps = inspect.signature(scheduler_class(options.scheduler).step).parameters
    if options.eta is not None and "eta" not in steps:
        raise ConfigError(f"--eta is {options.eta}, but {options.scheduler} has no eta; leave one of them out.")


def label_list(text: str | None, pipeline: "GaussianDiffusionPipeline") -> list[int] | None:
    """Returns the numbers of the labels that go round; a word that is both is taken for a name.

    Args:
        text: What --labels says; None stands for all classes.
        pipeline: Whose classes.

    Returns:
        None for an unconditional network.

    Raises:
        ConfigError: There is no such label.
    """
    from ddpm_hf.diffusion.pipeline import label_numbers

    if text is None:
        return list(range(pipeline.num_classes)) or None
    class_names = pipeline.config.get("class_names") or {}
    known = set(class_names.values())
    words = [text] if text in known else [word.strip() for word in next(csv.reader([text], skipinitialspace=True), [])]
    if not words or not all(words):
        raise ConfigError(f"--labels is {text!r}; give names or numbers with commas between them.")
    given = [int(word) if word.isdecimal() and word not in known else word for word in words]
    num_labels, has_null_label = pipeline.unet.config.num_class_embeds, bool(pipeline.config.get("has_null_label"))
    try:
        return label_numbers(given, len(given), num_labels, has_null_label, class_names)
    except ValueError as error:
        raise ConfigError(str(error).replace("class_labels", "--labels", 1)) from None
