"""Pushes from a running training, each in a process of its own.

What happens there - a slow network, a crash, gigabytes of a second copy of the network - does not touch the training,
which only starts the process and looks whether it has ended.
"""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from ddpm_hf.config import HubConfig
from ddpm_hf.hub.push import Target, check_access, check_license

logger = logging.getLogger(__name__)

_LOG, _TEMPORARY = "push.log", "temporary"
# Politely: below the priority of the training.
_CHILD = """
import os, sys
if hasattr(os, "nice"):
    os.nice(10)
from ddpm_hf.cli import main
sys.exit(main(sys.argv[1:]))
"""
# What would make it believe that it is one of the processes of the training.
_OF_THE_TRAINING = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class BackgroundPush:
    """Publishes the pipelines of one run, one at a time; a context manager that leaves no process behind.

    Args:
        config: Where to.
        folder: Where the output of the pushes is kept, as push.log, and what is put together while one lasts.
    """

    def __init__(self, config: HubConfig, folder: Path) -> None:
        assert config.repo_id is not None
        self._config = config
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._what = ""

    def __enter__(self) -> "BackgroundPush":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._process is not None and self._process.poll() is None:
            # Not asked to end, since it may wait for an upload: nothing is visible before the last request of a push,
            # all of it after it, and what it leaves on the disk is removed here.
            self._process.kill()
            self._process.wait()
            shutil.rmtree(self._folder / _TEMPORARY, ignore_errors=True)
            logger.warning("The push of %s was stopped: all of it was published, or nothing.", self._what)

    def check(self) -> None:
        """Asks, before training, whether this user may push there.

        Raises:
            ValueError: Nobody is logged in, this user may not, or the licence is no identifier.
            OSError: The Hub cannot be asked.
        """
        check_license(self._config.license)
        config = self._config
        name = check_access(Target(repo_id=str(config.repo_id), private=config.private, branch=config.branch))
        tqdm.write(f"Will be pushed to {name}.")

    def is_free(self) -> bool:
        """Whether there is no push under way; says how the last one went."""
        if self._process is None:
            return True
        if self._process.poll() is None:
            return False
        self._settle()
        return True

    def start(self, folder: Path, step: int) -> None:
        """Begins to push a folder, which must stay as it is until the push is done."""
        self._start(folder, f"step {step}")

    def finish(self, folder: Path) -> bool:
        """Waits for the push that is under way, pushes the finished run, and says whether that went well."""
        if self._process is not None:
            tqdm.write(f"Waiting for the push of {self._what} ...")
            self._process.wait()
            self._settle()
        tqdm.write(f"Pushing {folder} to {self._config.repo_id} ...")
        self._start(folder, "the finished run")
        assert self._process is not None
        self._process.wait()
        return self._settle()

    def _start(self, folder: Path, what: str) -> None:
        """Starts the process."""
        config = self._config
        flags = [*(["--private"] if config.private else []), *(["--fp16"] if config.fp16 else [])]
        for name in ("branch", "license"):
            if value := getattr(config, name):
                flags += [f"--{name}", value]
        command = ["push", str(folder), str(config.repo_id), *flags, "--message", f"Push {what}"]
        environment = {name: value for name, value in os.environ.items() if name not in _OF_THE_TRAINING}
        temporary = self._folder / _TEMPORARY
        shutil.rmtree(temporary, ignore_errors=True)  # of a training that was killed
        temporary.mkdir(parents=True)
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary.resolve())}
        with (self._folder / _LOG).open("wb") as log:
            # In a session of its own, so that Ctrl-C reaches the training alone, which stops it in its turn.
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-c", _CHILD, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._what = what

    def _settle(self) -> bool:
        """Says how a push that has ended went, and forgets it."""
        assert self._process is not None
        exit_code, self._process = self._process.returncode, None
        shutil.rmtree(self._folder / _TEMPORARY, ignore_errors=True)
        log = self._folder / _LOG
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        last = next((line for line in reversed(lines) if line.strip()), "")
        if exit_code:
            logger.warning("The push of %s failed (%s); %s has the rest.", self._what, last or exit_code, log)
        else:
            tqdm.write(f"Pushed {self._what}: {last}")
        return exit_code == 0
