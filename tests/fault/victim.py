"""Training runs in a process of their own that is killed at a chosen change to the file system."""

import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ddpm_hf.cli.main import train
from tests import forked

# The names of Python's audit events for changes to the file system; syncing has none.
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def start(arguments: Sequence[str], log: Path, kill_at: int | None = None) -> BaseProcess:
    """Start a run.

    Args:
        arguments: Its command line.
        log: The file for what it prints and, at the end, the number of its changes to the file system.
        kill_at: Kill it before this change; None never kills it.
    """
    return forked.start(_train, list(arguments), kill_at, log=log)


def _train(arguments: list[str], kill_at: int | None) -> int:
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
