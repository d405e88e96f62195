"""Runs that are killed: each a process of its own, forked off one that has imported everything and done nothing."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import ddpm_hf.training.trainer  # imported once, before the fork  # noqa: F401
from ddpm_hf.cli.main import train

# Python announces under these names what it does to a file system; syncing has none.
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def start(arguments: Sequence[str], log: Path, kill_at: int | None = None) -> BaseProcess:
    """Starts a run.

    Args:
        arguments: Its command line.
        log: Where it writes what it says and, at the end, the number of its changes to the file system.
        kill_at: Before which of these changes it is killed; None lets it live.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run, args=(list(arguments), str(log), kill_at))
    process.start()
    return process


def _run(arguments: list[str], log: str, kill_at: int | None) -> None:
    """The life of the process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(descriptor, number)
    torch.set_num_threads(1)
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
    sys.exit(code)
