"""A disk that is full, read-only or gone costs the checkpoints that it cannot hold and nothing else."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_hf.cli.main import train
from ddpm_hf.training.checkpoint import find_latest
from ddpm_hf.training.run_dir import RunLock
from tests.conftest import REPOSITORY, process_environment, run_arguments
from tests.runs import EVERYTHING_RANDOM, assert_same_run, at_step, tensors_of


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on a good disk; it also leaves the decoded data in the cache. Read only."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(run_arguments(run, **EVERYTHING_RANDOM)) == 0
    return run


@contextmanager
def full_disk(size: int = 20_000) -> Iterator[None]:
    """Let no file grow beyond a size: a real system error in the middle of a write, in Python and in Rust."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def leftovers(run: Path) -> list[str]:
    """Return the temporary files and folders that were never renamed."""
    return [path.name for path in run.rglob("*") if path.name.startswith(".") and path.name != ".lock"]


def test_a_disk_that_fills_up_costs_only_the_new_checkpoints(
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Full from step 3: the checkpoint of step 4 costs a warning, the last one an error; with room the run finishes."""
    run, limit = tmp_path / "run", full_disk()
    arguments = run_arguments(run, **EVERYTHING_RANDOM)
    with monkeypatch.context() as patch:
        at_step(3, limit.__enter__, patch)
        try:
            assert train(arguments) == 1
        finally:
            limit.__exit__(None, None, None)
    assert "checkpoint of step 4 could not be written (" in caplog.text
    assert "training continues, the older checkpoints are intact" in caplog.text
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "checkpoint of step 6 could not be written (" in line
    assert f"make room in {run} and run the same command again" in line
    latest, skipped = find_latest(run / "checkpoints")
    assert latest is not None
    assert (latest.step, skipped, leftovers(run)) == (2, [], [])
    assert train(arguments) == 0
    assert_same_run(whole_run, run, 6)


def test_a_disk_that_can_no_longer_be_written_does_not_stop_training(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Read-only after an error, as ext4 does it. Root may write everywhere, so the system call itself is replaced."""
    run, mkdir = tmp_path / "run", os.mkdir

    def refuse(path: Any, *arguments: Any, **settings: Any) -> None:
        if run in Path(path).parents:
            raise OSError(errno.EROFS, "Read-only file system")
        mkdir(path, *arguments, **settings)

    arguments = run_arguments(run, **EVERYTHING_RANDOM)
    with monkeypatch.context() as patch:
        at_step(3, lambda: patch.setattr(os, "mkdir", refuse), patch)
        assert train(arguments) == 1
    assert "checkpoint of step 4 could not be written (Read-only file system); training continues" in caplog.text
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]
    assert train(arguments) == 0
    assert_same_run(whole_run, run, 6)


def test_a_run_whose_folder_was_removed_is_saved_in_a_new_one(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The training state in memory is not lost: the next checkpoint is whole, and the new folder can be continued."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(3, lambda: shutil.rmtree(run), patch)
        assert train(run_arguments(run, **EVERYTHING_RANDOM)) == 0
    assert f"training.output_dir {run} was removed during training; it is created again." in caplog.text
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000004", "step_00000006"]
    assert train(run_arguments(run, **EVERYTHING_RANDOM)) == 0
    expected, found = (tensors_of(path / "checkpoints" / "step_00000006") for path in (whole_run, run))
    assert not [key for key in expected if not torch.equal(expected[key], found[key])]


@pytest.mark.parametrize("is_running", [True, False])
def test_a_run_does_not_touch_its_folder_after_another_run_took_it_over(
    is_running: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, locks = tmp_path / "run", []

    def take_its_place() -> None:
        shutil.rmtree(run)
        run.mkdir()
        (run / "theirs").write_text("precious")
        if is_running:
            (run / "theirs").unlink()
            locks.append(RunLock(run))

    at_step(3, take_its_place, monkeypatch)
    assert train(run_arguments(run, training__log_every_steps=100)) == 2
    expected = (
        "another Trainer of this process holds"
        if is_running
        else "now holds something else (theirs), which is left untouched"
    )
    assert expected in capsys.readouterr().err
    assert {path.name for path in run.iterdir()} == ({".lock"} if is_running else {"theirs"})
    for lock in locks:
        lock.release()


def test_a_disk_without_room_for_checkpoints_is_refused_before_training(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new run needs room for two checkpoints, a continued one for one more, a finished one for none; sizes to 10 %.

    The snapshots that posthoc_ema stores until the end are added.
    """
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    (checkpoint, *_) = (run / "checkpoints").iterdir()
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    usage = shutil.disk_usage(tmp_path)

    def with_free(free: float, output_dir: Path, *options: str, **changes: object) -> int:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(free)))
        return train([*run_arguments(output_dir, **EVERYTHING_RANDOM, **changes), *options])

    other = tmp_path / "other"
    assert with_free(2.2 * size, other, "--dry_run") == 0
    assert with_free(1.8 * size, other, "--dry_run") == 2
    message = capsys.readouterr().err
    assert f"training.output_dir {other} has {1.8 * size / 1e6:.1f} MB free, but needs" in message
    assert "for two checkpoints; make room, or choose another folder" in message
    assert not other.exists()
    assert with_free(1.1 * size, run, "--dry_run", training__num_steps=9) == 0
    for option in (["--dry_run"], []):
        assert with_free(0.9 * size, run, *option, training__num_steps=9) == 2
        assert "for one more checkpoint; make room, or choose another folder" in capsys.readouterr().err
    assert with_free(0, run, "--dry_run") == 0
    # Two more EMAs in a checkpoint of four tensors a weight, and a pair of them after each of six steps.
    assert with_free(6.6 * size, other, "--dry_run", training__posthoc_ema=True) == 0
    assert with_free(5.4 * size, other, "--dry_run", training__posthoc_ema=True) == 2
    assert "for two checkpoints and 6 EMA snapshots (training.posthoc_ema); make room" in capsys.readouterr().err


SMALL_DISK = """
import os, subprocess, sys
from pathlib import Path
from ddpm_hf.cli.main import train
from ddpm_hf.training.checkpoint import find_latest
from tests.conftest import run_arguments
disk, num_kept = Path(sys.argv[1]), sys.argv[2]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
settings = {"num_steps": 9, "checkpoint_every_steps": 1, "num_checkpoints_kept": num_kept}
settings = {f"training__{name}": value for name, value in settings.items()}
code = train(run_arguments(disk / "run", **settings))
latest, skipped = find_latest(disk / "run" / "checkpoints")
print("latest", latest.step, skipped, len(os.listdir(disk / "run" / "checkpoints")))
sys.exit(code)
"""


def may_mount() -> bool:
    """Return whether a process in a namespace of its own may mount a disk."""
    command = ["unshare", "--map-root-user", "--mount", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_run_on_a_disk_of_a_few_megabytes(tmp_path: Path) -> None:
    """If the checkpoints fit, the run finishes; if not, the old ones stay whole and an error says so.

    `test_a_disk_that_fills_up_costs_only_the_new_checkpoints` is fast and limits the size of files instead.
    """
    if not may_mount():
        pytest.skip("may not mount a disk")
    for num_kept, exit_code in ((2, 0), (99, 1)):
        (tmp_path / f"{num_kept}").mkdir()
        command = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", SMALL_DISK]
        result = subprocess.run(
            [*command, str(tmp_path / f"{num_kept}"), str(num_kept)],
            cwd=REPOSITORY, env=process_environment(), capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == exit_code, result.stderr
        assert ("No space left on device" in result.stderr) is bool(exit_code)
        step, skipped, num_left = result.stdout.splitlines()[-1].removeprefix("latest ").split(" ")
        assert skipped == "[]"
        assert (int(step), int(num_left)) == (9, 2) if exit_code == 0 else int(step) == int(num_left) < 9
