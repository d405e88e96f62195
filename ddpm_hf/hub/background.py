"""Push from a running training, in a separate process.

A slow network, a crash, or the memory of a second copy of the network does not affect the training, which only starts
the process and checks whether it has ended.
"""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from tqdm import tqdm
from typing_extensions import Self

from ddpm_hf.config import HubConfig, RunConfig
from ddpm_hf.hub import run_branch
from ddpm_hf.hub.access import Target, check_access

logger = logging.getLogger(__name__)

_LOG, _TEMPORARY, _STAGED = "push.log", "temporary", "run"
# At a lower priority than the training.
_START = """
import os, sys
if hasattr(os, "nice"):
    os.nice(10)
from {module} import main
sys.exit(main(sys.argv[1:]))
"""
_PUSH, _UPLOAD = _START.format(module="ddpm_hf.cli.main"), _START.format(module="ddpm_hf.hub.run_branch")
# With these variables the process would join the process group of the training.
_OF_THE_TRAINING = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class _Background:
    """One process at a time that pushes. As a context manager, it ends a push that is still running.

    Args:
        folder: Folder for push.log, the output of the last push, and for its temporary files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._what = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._process is not None and self._process.poll() is None:
            # SIGKILL is safe: a push is one commit, and its temporary files are removed here.
            self._process.kill()
            self._process.wait()
            self._clean_up()
            logger.warning("The push of %s was stopped: either everything or nothing was published.", self._what)

    def is_free(self) -> bool:
        """Return whether no push is running, and report the last one."""
        if self._process is None:
            return True
        if self._process.poll() is None:
            return False
        self._report()
        return True

    def _wait(self) -> None:
        """Wait for a running push and report it."""
        if self._process is not None:
            if self._process.poll() is None:
                tqdm.write(f"Waiting for the push of {self._what} ...")
            self._process.wait()
            self._report()

    def _start(self, code: str, arguments: Sequence[str], what: str) -> "subprocess.Popen[bytes]":
        """Start the process."""
        temporary = self._folder / _TEMPORARY
        shutil.rmtree(temporary, ignore_errors=True)  # of a training that was killed
        temporary.mkdir(parents=True)
        environment = {name: value for name, value in os.environ.items() if name not in _OF_THE_TRAINING}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary.resolve())}
        with (self._folder / _LOG).open("wb") as log:
            # In a new session, so that Ctrl-C reaches the training only, which then ends the push.
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-c", code, *arguments],
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
        self._clean_up()
        log = self._folder / _LOG
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        last = next((line for line in reversed(lines) if line.strip()), "")
        if exit_code:
            logger.warning("The push of %s failed (%s); see %s.", self._what, last or exit_code, log)
        else:
            tqdm.write(f"Pushed {self._what}: {last}")
        return exit_code == 0

    def _clean_up(self) -> None:
        shutil.rmtree(self._folder / _TEMPORARY, ignore_errors=True)


class BackgroundPush(_Background):
    """Pushes the pipelines of one run, one at a time. As a context manager, it ends a push that is still running.

    Args:
        config: Where to push.
        folder: Folder for push.log, the output of the last push, and for its temporary files.
    """

    def __init__(self, config: HubConfig, folder: Path) -> None:
        super().__init__(folder)
        self._config = config

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
        folder = self._folder / _STAGED
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder)
        self.start(folder, step)

    def start(self, folder: Path, step: int) -> None:
        """Start to push a folder, which must not change until the push has ended."""
        self._push(folder, f"step {step}")

    def finish(self, folder: Path) -> bool:
        """Wait for a running push, push the finished run, and return whether that succeeded."""
        self._wait()
        tqdm.write(f"Pushing {folder} to {self._config.repo_id} ...")
        self._push(folder, "the finished run").wait()
        return self._report()

    def _push(self, folder: Path, what: str) -> "subprocess.Popen[bytes]":
        config = self._config
        flags = [*(["--private"] if config.private else []), *(["--fp16"] if config.fp16 else [])]
        for name in ("branch", "license"):
            if value := getattr(config, name):
                flags += [f"--{name}", value]
        return self._start(_PUSH, ["push", str(folder), str(config.repo_id), *flags, "--message", f"Push {what}"], what)


class CheckpointPush(_Background):
    """Pushes the newest checkpoint of one run to a branch, and downloads it on another machine; see run_branch.py.

    Args:
        config: The configuration of the run, with training.resume_from_hub.
        run: The run folder.
        folder: Folder for push.log and temporary files, in the run folder.
    """

    def __init__(self, config: RunConfig, run: Path, folder: Path) -> None:
        super().__init__(folder)
        self._config, self._run = config, run
        hub = config.hub
        self._target = Target(repo_id=hub.repo_id or "", private=hub.private, branch=hub.checkpoint_branch)
        self._step_of_push = self._step_on_hub = 0

    def check(self) -> run_branch.RemoteRun | None:
        """Ask the Hub whether the user may push, and return the run that is on the branch.

        Raises:
            ValueError: The user is not logged in or may not push, or the branch holds something else, or a run with
                other settings.
            OSError: The Hub cannot be reached.
        """
        config = self._config.hub
        target = self._target
        self._target = Target(repo_id=check_access(target), private=config.private, branch=config.checkpoint_branch)
        remote = run_branch.find_remote(self._target)
        if remote is not None:
            run_branch.check_settings(remote, self._config)
            self._step_on_hub = remote.step
        return remote

    def restore(self, remote: run_branch.RemoteRun) -> None:
        """Download a run unless the run folder has a later step of it.

        Raises:
            ValueError: The checkpoint on the Hub is damaged.
            OSError: The Hub cannot be reached, or the disk cannot be written.
        """
        if run_branch.is_ahead(remote, self._run, self._config):
            tqdm.write(f"Downloading step {remote.step} of {remote} ...")
            run_branch.download(remote, self._run)

    def start(self, step: int, checkpoints: Sequence[str]) -> None:
        """Start to push a checkpoint, or warn that the previous push is still running. Called in any thread.

        Args:
            step: Its step.
            checkpoints: Its name and that of the best checkpoint.
        """
        if not self.is_free():
            logger.warning("The push of %s is still running, so step %d is not pushed yet.", self._what, step)
            return
        self._push(step, checkpoints)

    def finish(self, step: int, checkpoints: Sequence[str]) -> bool:
        """Wait until a checkpoint is on the Hub, and return whether it is; arguments as in `start`."""
        self._wait()
        if self._step_on_hub != step:
            self._push(step, checkpoints)
            self._wait()
        return self._step_on_hub == step

    def _push(self, step: int, checkpoints: Sequence[str]) -> None:
        staged, target = self._folder / _STAGED, self._target
        shutil.rmtree(staged, ignore_errors=True)
        try:
            run_branch.stage(self._run, checkpoints, staged)
            privacy = "private" if target.private else "public"
            arguments = [str(staged), target.repo_id, str(target.branch), privacy]
            self._start(_UPLOAD, arguments, f"the checkpoint of step {step}")
        except OSError as error:
            logger.warning("The checkpoint of step %d is not pushed (%s); training continues.", step, error)
        self._step_of_push = step

    def _report(self) -> bool:
        is_pushed = super()._report()
        if is_pushed:
            self._step_on_hub = self._step_of_push
        return is_pushed

    def _clean_up(self) -> None:
        super()._clean_up()
        shutil.rmtree(self._folder / _STAGED, ignore_errors=True)
