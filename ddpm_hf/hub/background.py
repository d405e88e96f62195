"""Push from a running training, in a separate process.

A slow network, a crash, or the memory of a second copy of the network does not affect the training, which only starts
the process and checks whether it has ended.
"""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from ddpm_hf.config import HubConfig
from ddpm_hf.hub.access import Target, check_access

logger = logging.getLogger(__name__)

_LOG, _TEMPORARY = "push.log", "temporary"
# At a lower priority than the training.
_CHILD = """
import os, sys
if hasattr(os, "nice"):
    os.nice(10)
from ddpm_hf.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
# With these variables the process would join the process group of the training.
_OF_THE_TRAINING = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class BackgroundPush:
    """Pushes the pipelines of one run, one at a time. As a context manager, it ends a push that is still running.

    Args:
        config: Where to push.
        folder: Folder for push.log, the output of the last push, and for its temporary files.
    """

    def __init__(self, config: HubConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._what = ""

    def __enter__(self) -> "BackgroundPush":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._process is not None and self._process.poll() is None:
            # SIGKILL is safe: a push is one commit, and its temporary files are removed here.
            self._process.kill()
            self._process.wait()
            shutil.rmtree(self._folder / _TEMPORARY, ignore_errors=True)
            logger.warning("The push of %s was stopped: either everything or nothing was published.", self._what)

    def check(self) -> None:
        """Ask the Hub, before training, whether the user may push.

        Raises:
            ValueError: The user is not logged in or may not push, or a setting of `hub` is not valid.
            OSError: The Hub cannot be reached.
        """
        config = self._config
        target = Target(
            repo_id=config.repo_id or "", private=config.private, branch=config.branch, license=config.license
        )
        tqdm.write(f"Will be pushed to {check_access(target)}.")

    def publish(self, step: int, write: Callable[[Path], None]) -> None:
        """Start to push what `write` puts into an empty folder, or warn if the previous push is still running."""
        if not self.is_free():
            logger.warning("Step %d is not pushed to the Hub: the previous push is still running.", step)
            return
        folder = self._folder / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder)
        self.start(folder, step)

    def is_free(self) -> bool:
        """Return whether no push is running, and report the last one."""
        if self._process is None:
            return True
        if self._process.poll() is None:
            return False
        self._report()
        return True

    def start(self, folder: Path, step: int) -> None:
        """Start to push a folder, which must not change until the push has ended."""
        self._start(folder, f"step {step}")

    def finish(self, folder: Path) -> bool:
        """Wait for a running push, push the finished run, and return whether that succeeded."""
        if self._process is not None:
            tqdm.write(f"Waiting for the push of {self._what} ...")
            self._process.wait()
            self._report()
        tqdm.write(f"Pushing {folder} to {self._config.repo_id} ...")
        self._start(folder, "the finished run").wait()
        return self._report()

    def _start(self, folder: Path, what: str) -> "subprocess.Popen[bytes]":
        """Start the process."""
        config = self._config
        flags = [*(["--private"] if config.private else []), *(["--fp16"] if config.fp16 else [])]
        for name in ("branch", "license"):
            if value := getattr(config, name):
                flags += [f"--{name}", value]
        command = ["push", str(folder), str(config.repo_id), *flags, "--message", f"Push {what}"]
        temporary = self._folder / _TEMPORARY
        shutil.rmtree(temporary, ignore_errors=True)  # of a training that was killed
        temporary.mkdir(parents=True)
        environment = {name: value for name, value in os.environ.items() if name not in _OF_THE_TRAINING}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary.resolve())}
        with (self._folder / _LOG).open("wb") as log:
            # In a new session, so that Ctrl-C reaches the training only, which then ends the push.
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-c", _CHILD, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._what = what
        return self._process

    def _report(self) -> bool:
        """Report how a push that has ended went, and return whether it succeeded."""
        assert self._process is not None
        exit_code, self._process = self._process.returncode, None
        shutil.rmtree(self._folder / _TEMPORARY, ignore_errors=True)
        log = self._folder / _LOG
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        last = next((line for line in reversed(lines) if line.strip()), "")
        if exit_code:
            logger.warning("The push of %s failed (%s); see %s.", self._what, last or exit_code, log)
        else:
            tqdm.write(f"Pushed {self._what}: {last}")
        return exit_code == 0
