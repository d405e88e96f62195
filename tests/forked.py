"""Processes that start in a second: forked from a server that imported the libraries and did nothing else.

For promises about a process of its own: exit codes, signals, kills, several ranks. A promise about what an import does,
or about variables that a library reads while it is imported, needs `tests.conftest.run_process`.
"""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Imported once, before the fork, with the parts that a training run imports on their first use. The package itself is
# imported afterwards, because one of its modules records the parent process.
import accelerate  # noqa: F401
import datasets  # noqa: F401
import diffusers
import jsonargparse  # noqa: F401
import pytest
import torch
import torch._dynamo  # by the first step of an optimizer

diffusers.DDPMPipeline, diffusers.UNet2DModel  # noqa: B018 - imported by their first use
gc.freeze()  # these objects are never garbage, and a collection after the fork would copy their memory
_CONTEXT = multiprocessing.get_context("forkserver")


def start(target: Callable[..., Any], *arguments: Any, log: Path, **environment: str) -> BaseProcess:
    """Start a process and return it; `process.exitcode` is that of a command.

    Args:
        target: A function of a module; the process exits with what it returns.
        *arguments: Its arguments.
        log: The file for stdout; stderr goes to the file of the same name with `.err` added.
        **environment: Variables in addition to those of this process.
    """
    _start_server()
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}
    process = _CONTEXT.Process(target=_live, args=(target, arguments, str(log), variables))
    process.start()
    return process


def _start_server() -> None:
    """Start the server unless it runs. It looks for this module on its own path, and is silent without it."""
    _CONTEXT.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        forkserver.ensure_running()


def _live(target: Callable[..., Any], arguments: tuple[Any, ...], log: str, variables: Mapping[str, str]) -> None:
    for number, path in ((1, log), (2, f"{log}.err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    sys.exit(target(*arguments))


def wait_for_line(process: BaseProcess, log: Path, beginning: str) -> None:
    """Wait until the process printed a line that begins so; fail as soon as it ends without one."""
    while True:
        is_alive = process.is_alive()
        text = log.read_text(encoding="utf-8") if log.exists() else ""
        if any(line.startswith(beginning) for line in text.splitlines()):
            return
        assert is_alive, f"{beginning!r} was not printed:\n{text}\n{Path(f'{log}.err').read_text(encoding='utf-8')}"
        time.sleep(0.02)


def run_command(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `ddpm-hf ARGUMENTS` in a forked process and return its exit code and what it printed."""
    from ddpm_hf.cli.main import main

    command = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "stdout")
        process = start(main, command, log=log, **environment)
        process.join()
        assert process.exitcode is not None
        printed = (path.read_text(encoding="utf-8") for path in (log, Path(f"{log}.err")))
        return subprocess.CompletedProcess(command, process.exitcode, *printed)
