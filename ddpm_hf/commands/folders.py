"""The models that commands are pointed at: a folder of this machine or a repository of the Hub, found and loaded."""

import logging
import re
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_hf.config import ConfigError
from ddpm_hf.redaction import reason_of

if TYPE_CHECKING:
    from ddpm_hf.diffusion import GaussianDiffusionPipeline

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
