"""Training runs in a process of their own that is killed at a chosen moment."""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ddpm_hf import distributed, model_folder
from ddpm_hf.cli.main import train
from ddpm_hf.training import checkpoint
from ddpm_hf.training.trainer import Trainer
from tests import forked

# The names of Python's audit events for changes to the file system; syncing has none.
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def start(
    arguments: Sequence[str], log: Path, kill_at: int | None = None, kill_in: tuple[str, int] | None = None
) -> BaseProcess:
    """Start a run.

    Args:
        arguments: Its command line.
        log: The file for what it prints and, at the end, the number of its changes to the file system.
        kill_at: Kill it before this change; None never kills it.
        kill_in: Kill it in a call of a function of `checkpoint` or `model_folder`, counted from 1, by the thread that
            writes the checkpoint of step 4, when step 6 begins.
    """
    return forked.start(_train, list(arguments), kill_at, kill_in, log=log)


def start_interrupted(arguments: Sequence[str], log: Path) -> BaseProcess:
    """Start a run that gets two signals while it waits for the checkpoint of step 4, which is never complete."""
    return forked.start(_train_interrupted, list(arguments), log=log)


def _train_interrupted(arguments: list[str]) -> int:
    is_waiting, is_handled, never = threading.Event(), threading.Event(), threading.Event()
    join, handle = checkpoint.Checkpointer.join, distributed.StopWatcher._handle
    write_files = checkpoint.write_files

    def noted_join(self: checkpoint.Checkpointer) -> bool:
        if self._writing is not None and self._writing.name == "checkpoint of step 4":
            is_waiting.set()
        return join(self)

    def noted_handle(self: distributed.StopWatcher, number: int, frame: Any) -> None:
        handle(self, number, frame)
        is_handled.set()

    def write(folder: Path, files: checkpoint.CheckpointFiles) -> None:
        write_files(folder, files)
        if threading.current_thread().name == "checkpoint of step 4":
            is_waiting.wait()
            os.kill(os.getpid(), signal.SIGINT)
            is_handled.wait()
            os.kill(os.getpid(), signal.SIGINT)
            never.wait()

    distributed._SAME_REQUEST_SECONDS = 0.0
    checkpoint.Checkpointer.join = noted_join  # type: ignore[method-assign]
    distributed.StopWatcher._handle = noted_handle  # type: ignore[method-assign]
    checkpoint.write_files = write
    return train(arguments)


def _kill_in_background(name: str, call: int) -> None:
    """Replace a function by one that ends the process in a call by the thread of step 4."""
    owner = checkpoint if hasattr(checkpoint, name) else model_folder
    original, train_step = getattr(owner, name), Trainer._train_step
    has_gone_on = threading.Event()
    calls = iter(range(1, 1000))

    def noted(self: Trainer, step: int) -> None:
        if step + 1 == 6:
            has_gone_on.set()
        train_step(self, step)

    def killed(*arguments: Any) -> Any:
        if threading.current_thread().name == "checkpoint of step 4" and next(calls) == call:
            has_gone_on.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    Trainer._train_step = noted  # type: ignore[method-assign]
    setattr(owner, name, killed)


def _train(arguments: list[str], kill_at: int | None, kill_in: tuple[str, int] | None) -> int:
    if kill_in is not None:
        _kill_in_background(*kill_in)
    num_changes = 0

    def change() -> None:
        nonlocal num_changes
        num_changes += 1
        if num_changes == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, details: Sequence[Any]) -> None:
        if event in CHANGES or (event == "open" and details[2] & WRITES):
            change()

    sync = os.fsync
    os.fsync = lambda descriptor: (change(), sync(descriptor))[1]  # type: ignore[assignment]
    sys.addaudithook(audit)
    code = train(arguments)
    print(f"\n{num_changes}", flush=True)
    return code
