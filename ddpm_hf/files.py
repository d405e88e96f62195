"""Atomic files and folders: whole or absent, also after a crash."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all; the old one stays until then.

    Args:
        path: Where, in a folder that exists.
        write: Writes a new file at the path that it is given.

    Raises:
        OSError: It cannot be written; the error names the file, also where the disk is full.
    """
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, content: str) -> None:
    """Writes a text file whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("x", encoding="utf-8") as file:  # a new file, never one that a link leads to
            file.write(content)

    write_whole(path, write)


def replace_folder(path: Path, write_content: Callable[[Path], None]) -> None:
    """Writes a folder beside the old one and exchanges them when it is whole.

    A kill between the two renames leaves the old folder beside its place; the next call begins by putting it back.
    """
    temporary, old = path.with_name(f".{path.name}.writing"), path.with_name(f".{path.name}.old")
    _tidy_up(path, temporary, old)
    temporary.mkdir(parents=True)
    try:
        write_content(temporary)
        sync_tree(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync(path.parent)
    finally:
        _tidy_up(path, temporary, old)


def sync_tree(folder: Path) -> None:
    """Asks the disk to keep every file and folder."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Asks the disk to keep one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tidy_up(path: Path, temporary: Path, old: Path) -> None:
    """Puts the old folder back where no new one took its place, and removes the rest."""
    if old.exists() and not path.exists():
        old.rename(path)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)


def gib(num_bytes: int) -> str:
    """Says a number of bytes."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
