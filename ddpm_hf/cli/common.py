"""What several commands share: error messages, signals, temporary folders, and finding and loading a model."""

import errno
import gc
import logging
import os
import re
import socket
import ssl
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_hf.config import ConfigError
from ddpm_hf.files import MODEL_INDEX, TRAINING_CONFIG, VERIFICATION, format_count
from ddpm_hf.redaction import reason_of, redact
from ddpm_hf.signals import deferred_signals, raise_on_signals

if TYPE_CHECKING:
    import torch

    from ddpm_hf.diffusion import GaussianDiffusionPipeline
    from ddpm_hf.model_folder import ModelFolder

_DISK_ADVICE = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EROFS: "write to a disk that is not read-only",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
}
_UNREACHABLE = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
_REPOSITORY_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+", re.ASCII)


class RankError(Exception):
    """An error of this rank only, which prints its message itself, and the exit code of the command."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def print_error(message: str, *, of_this_rank: bool = False) -> None:
    """Print an error without secrets: on rank 0, or on the only rank that has it."""
    rank = os.environ.get("RANK", "0")
    if of_this_rank or rank == "0":
        with suppress(OSError):  # a closed terminal
            print(f"error: {f'rank {rank}: ' if rank != '0' else ''}{redact(message)}", file=sys.stderr, flush=True)


def format_os_error(error: OSError) -> str:
    """Return the reason, the file, and advice if there is any."""
    reason = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return f"{reason}; {_DISK_ADVICE[error.errno]}." if error.errno in _DISK_ADVICE else reason


@contextmanager
def out_of_memory_advice(advice: str) -> Iterator[None]:
    """Turn running out of memory, on any device, into a `RankError` with advice, such as "lower --batch_size"."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On the CPU, PyTorch raises a plain RuntimeError.
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        raise RankError(f"out of memory ({(str(error) or 'no memory').splitlines()[0]}); {advice}.") from error


@contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector during the first import of torch and diffusers, and exempt their objects from it.

    The collector would walk over all of these objects several times during the import, and find nothing to free.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Create a folder that is removed at the end, also if signals arrive at any moment; see `raise_on_signals`."""
    folder = None
    with raise_on_signals():
        try:
            with deferred_signals():
                folder = tempfile.TemporaryDirectory(prefix=prefix)
            yield Path(folder.name)
        finally:
            with deferred_signals():
                if folder is not None:
                    folder.cleanup()


def find_device(name: str | None) -> "torch.device":
    """Return a device by its name, by default a GPU if there is one.

    Raises:
        ConfigError: The name is unknown, or this machine has no such device.
    """
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if name is None:
        return torch.device("cuda" if num_gpus else "mps" if has_mps else "cpu")
    match = re.fullmatch(r"cpu|mps|cuda(?::(\d{1,3}))?", name)
    if match is None:
        raise ConfigError(f"--device is {name}, but must be cpu, cuda, cuda:1 or mps.")
    if (name == "mps" and not has_mps) or (name.startswith("cuda") and int(match[1] or 0) >= num_gpus):
        gpus = format_count(num_gpus, "CUDA GPU") if num_gpus else "no CUDA GPU that torch can use"
        found = "no Apple GPU (mps) that torch can use" if name == "mps" else gpus
        raise ConfigError(f"--device is {name}, but this machine has {found}; give another device, or remove it.")
    return torch.device(name)


def find_folder(name: str, revision: str | None = None) -> "ModelFolder | None":
    """Return the local pipeline or verified checkpoint that a path stands for; None for a Hub repository.

    Raises:
        ConfigError: The path holds no model, or is neither a folder nor a valid repository id.
    """
    from ddpm_hf.model_folder import find_model

    if is_repository_id(name):
        return None
    if revision is not None:
        raise ConfigError(f"--revision is for Hub repositories, but {name} is a local folder; remove it.")
    return find_model(name)


def is_repository_id(name: str) -> bool:
    """Return whether a name is that of a Hub repository, and not an existing path or one that cannot be an id."""
    exists = os.path.lexists(Path(name).expanduser())  # also of an empty name
    return not exists and not name.startswith(("/", ".", "~")) and _REPOSITORY_ID.fullmatch(name) is not None


def load_pipeline(name: str, model: "ModelFolder | None", **options: Any) -> "GaussianDiffusionPipeline":
    """Load a pipeline from a folder or from the Hub.

    Args:
        name: Folder or repository id, as given by the user.
        model: The result of `find_folder`.
        **options: Arguments of `from_pretrained`; None stands for the default. `dtype` is that of the network: a VAE
            decodes in float32, because some overflow in float16.
    """
    import torch
    from diffusers.utils.logging import disable_progress_bar

    from ddpm_hf.diffusion import GaussianDiffusionPipeline
    from ddpm_hf.models import load_model

    if not sys.stderr.isatty():
        disable_progress_bar()
    given = {key: value for key, value in options.items() if value is not None}
    if "dtype" in given:
        given["dtype"] = {"unet": given["dtype"], "default": torch.float32}
    try:
        with _diffusers_messages_on_success():
            if model is None:
                pipeline = GaussianDiffusionPipeline.from_pretrained(name, **given)
            else:
                pipeline = load_model(model, partial(GaussianDiffusionPipeline.from_pretrained, **given))
    except (torch.OutOfMemoryError, MemoryError, ValueError):
        raise
    except Exception as error:  # diffusers, safetensors and httpx raise many types
        if model is None:
            raise ConfigError(f"{name} {_hub_reason(error, options.get('revision'))}") from error
        raise ConfigError(f"{name} holds no pipeline that can be loaded: {reason_of(error)}.") from error
    assert isinstance(pipeline, GaussianDiffusionPipeline)
    return pipeline


@contextmanager
def _diffusers_messages_on_success() -> Iterator[None]:
    """Hold log messages of diffusers back, and drop them after an error, whose own message is complete."""
    logger = logging.getLogger("diffusers")
    handlers, buffer = logger.handlers, MemoryHandler(1000, flushLevel=logging.CRITICAL + 1)
    logger.handlers = [buffer]
    try:
        yield
    finally:
        logger.handlers = handlers
    for record in buffer.buffer:
        logger.handle(record)


def download_folder(name: str, revision: str | None = None) -> Path:
    """Return a local copy of the files of a pipeline on the Hub."""
    from huggingface_hub import snapshot_download

    try:
        files = [MODEL_INDEX, TRAINING_CONFIG, VERIFICATION, "*.py", "unet/*", "scheduler/*", "vae/*"]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=["*.bin"]))
    except Exception as error:  # errors of the Hub, the network and the disk
        raise ConfigError(f"{name} {_hub_reason(error, revision)}") from error
    if not (folder / MODEL_INDEX).is_file():
        raise ConfigError(f"{name} is a repository without a pipeline ({MODEL_INDEX}); choose a DDPM.")
    return folder


def commit_of(pipeline: "GaussianDiffusionPipeline") -> str | None:
    """Return the Hub commit that a pipeline was loaded from; None for a local folder."""
    match = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\]|$)", str(pipeline.unet.config.get("_name_or_path")))
    return match[1] if match else None


def _hub_reason(error: Exception, revision: str | None) -> str:
    """Return why a repository cannot be loaded, and the fix."""
    from huggingface_hub import errors

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for kind, reason in (
        (errors.GatedRepoError, "is a gated repository; request access on its page, then run `hf auth login`."),
        (errors.RepositoryNotFoundError, "is neither a local folder nor a repository that you can read; check the "
         "name, or run `hf auth login` if it is private."),
        (errors.RevisionNotFoundError, f"has no revision {revision}; give an existing branch, tag or commit."),
        (errors.OfflineModeIsEnabled, "is neither a local folder nor in the cache, and HF_HUB_OFFLINE is set; unset "
         "it, or give a folder."),
        (_UNREACHABLE, "is neither a local folder nor in the cache, and the Hub cannot be reached; check the "
         "connection, or give a folder."),
        (errors.EntryNotFoundError, f"is a repository without a pipeline ({MODEL_INDEX}); choose a DDPM."),
    ):  # fmt: skip
        if any(isinstance(cause, kind) for cause in causes):
            return reason
    return f"is a repository that cannot be loaded: {reason_of(error)}."
