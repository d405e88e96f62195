"""Checkpoints: written whole or not at all, verified before use, pruned only when a newer one is safe. Files only.

    checkpoints/step_00001000/
        unet/  ema/              networks in diffusers format; ema_sigma_*/ with training.posthoc_ema
        optimizer.safetensors    the optimiser's tensors, named like the parameters
        objective.safetensors    last losses at each timestep, where these are drawn by loss
        trainer_state.json       step, counters, gradient scaler, what the optimiser knows beside tensors
        config.yaml              the configuration of the run
        manifest.json            the step, and sha256 and size of every file above

A checkpoint is written under a temporary name, every file and folder is synced, and it is renamed last, so a kill or a
power cut at any moment leaves it whole or absent. No file of it is a pickle.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ddpm_hf.durable import sync, sync_tree

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_STEP_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY_PREFIX = ".writing-"
_DAMAGED_PREFIX = "damaged-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Args:
        path: Its folder.
        step: Optimiser updates done when it was written.
    """

    path: Path
    step: int


def write_checkpoint(root: Path, step: int, write_content: Callable[[Path], None]) -> Checkpoint:
    """Writes one checkpoint durably.

    Args:
        root: The folder of all checkpoints.
        step: Optimiser updates done.
        write_content: Writes all files but the manifest into the folder it is given.

    Returns:
        The checkpoint under its final name. A valid one of this step is left as it is, since a step is always the same.
    """
    root.mkdir(parents=True, exist_ok=True)
    sync(root.parent)
    remove_unfinished(root)
    final = root / _name(step)
    if final.exists():
        try:
            return verify_checkpoint(final)
        except CheckpointError:
            put_aside(final)
    temporary = root / f"{_TEMPORARY_PREFIX}{final.name}"
    temporary.mkdir()
    try:
        write_content(temporary)
        _write_manifest(temporary, step)
        sync_tree(temporary)
        temporary.rename(final)
        sync(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Checkpoint(final, step)


def verify_checkpoint(path: Path) -> Checkpoint:
    """Checks that every file of a checkpoint is there and is what was written.

    Raises:
        CheckpointError: If the folder is not a checkpoint or any file is missing, damaged, foreign or a link.
        PermissionError: If this user may not read it.
    """
    if _STEP_NAME.fullmatch(path.name) is None:
        raise CheckpointError(f"{path.name} is not named like a checkpoint (step_00001000)")
    if path.is_symlink():
        raise CheckpointError(f"{path.name} is a link")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if (version := manifest["schema_version"]) != SCHEMA_VERSION:
            raise CheckpointError(f"it was written by another version (schema {version}, this is {SCHEMA_VERSION})")
        step, name, files = manifest["step"], _name(manifest["step"]), dict(manifest["files"])
    except (CheckpointError, PermissionError):
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{MANIFEST} is missing or unreadable") from None
    if path.name != name:
        raise CheckpointError(f"it was renamed: {MANIFEST} says step {step}")
    try:
        present = {str(file.relative_to(path)) for file in _files(path)} - {MANIFEST}
    except PermissionError:
        raise  # that can be mended, and says nothing about the files
    except OSError as error:
        raise CheckpointError(f"its files cannot be listed ({error.strerror or error})") from None
    if missing := sorted(set(files) - present):
        raise CheckpointError(f"{missing[0]} is missing")
    if foreign := sorted(present - set(files)):
        raise CheckpointError(f"{foreign[0]} does not belong to it")
    for name, expected in sorted(files.items()):
        try:
            found = _describe(path / name)
        except PermissionError:
            raise
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read ({error.strerror or error})") from None
        if found != expected:
            raise CheckpointError(f"{name} is damaged (its sha256 is not the one in {MANIFEST})")
    return Checkpoint(path, step)


def find_latest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """Finds the newest valid checkpoint and reads nothing into memory.

    Returns:
        The checkpoint, or None where there is none, and one line for each newer one that was passed over.

    Raises:
        CheckpointError: If there are checkpoints but none is valid.
    """
    candidates = sorted(_checkpoint_dirs(root), key=_step_of, reverse=True)
    skipped: list[str] = []
    for path in candidates:
        try:
            return verify_checkpoint(path), skipped
        except CheckpointError as error:
            skipped.append(f"{path.name}: {error}")
    if candidates:
        raise CheckpointError(
            f"no checkpoint in {root} can be used ({'; '.join(skipped)}); restore one, or start anew in another "
            "training.output_dir"
        )
    return None, skipped


def put_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that it is kept for a look but never found again."""
    target = path.with_name(f"{_DAMAGED_PREFIX}{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)
    return target


def _name(step: int) -> str:
    """Returns the name of the folder of a step."""
    return f"step_{step:08d}"


def prune(root: Path, num_kept: int, best_step: int | None = None) -> None:
    """Removes all but the newest checkpoints and the best one; one that cannot be removed is named and left."""
    try:
        old = sorted(_checkpoint_dirs(root), key=_step_of)[:-num_kept]
    except OSError as error:
        logger.warning("Old checkpoints in %s could not be looked for: %s", root, error)
        return
    for path in old:
        if _step_of(path) == best_step:
            continue
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning("The old checkpoint %s could not be removed: %s", path, error)


def remove_after(root: Path, step: int) -> None:
    """Removes what later steps wrote, since the run is about to do them again."""
    for path in _checkpoint_dirs(root):
        if _step_of(path) > step:
            shutil.rmtree(path)


def remove_unfinished(root: Path) -> None:
    """Removes what a kill in the middle of writing left behind."""
    for path in root.glob(f"{_TEMPORARY_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def _checkpoint_dirs(root: Path) -> list[Path]:
    """Returns the folders named like checkpoints; what cannot be listed is no empty folder, and an error.

    Raises:
        CheckpointError: If the folder is a link that leads nowhere.
        OSError: If it cannot be read.
    """
    try:
        with os.scandir(root) as entries:
            return [Path(entry.path) for entry in entries if _STEP_NAME.fullmatch(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        if root.is_symlink():
            raise CheckpointError(f"{root} is a link that leads nowhere; mount the disk that it leads to") from None
        return []


def _step_of(path: Path) -> int:
    """Reads the step from a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def _files(path: Path) -> list[Path]:
    """Returns all files below a folder; a link is refused, since it can lead anywhere.

    Raises:
        OSError: If a folder cannot be listed; pathlib would take it for an empty one.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, subfolders, names in os.walk(path, onerror=refuse):
        for file in (Path(folder, name) for name in (*subfolders, *names)):
            mode = file.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise CheckpointError(f"{file.relative_to(path)} is a link")
            if stat.S_ISREG(mode):
                found.append(file)
    return sorted(found)


def _describe(path: Path) -> dict[str, object]:
    """Returns the size and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"sha256": digest.hexdigest(), "size": path.stat().st_size}


def _write_manifest(folder: Path, step: int) -> None:
    """Lists every file, readable by whoever the umask lets read (safetensors writes 0600)."""
    umask = os.umask(0)
    os.umask(umask)
    for file in _files(folder):
        file.chmod(0o666 & ~umask)
    files = {str(file.relative_to(folder)): _describe(file) for file in _files(folder)}
    content = json.dumps({"schema_version": SCHEMA_VERSION, "step": step, "files": files}, indent=2)
    (folder / MANIFEST).write_text(content, encoding="utf-8")
