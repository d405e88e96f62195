"""Checkpoints that a thread writes: what the loop does meanwhile, and what stops, kills and errors leave behind."""

import errno
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddpm_hf.cli.main import train
from ddpm_hf.config import parse_command_line
from ddpm_hf.training import checkpoint
from ddpm_hf.training.checkpoint import Checkpointer, HostCopy, find_latest, verify_checkpoint
from ddpm_hf.training.trainer import Score, Trainer
from tests.conftest import run_arguments
from tests.fault import victim
from tests.runs import EVERYTHING_RANDOM, assert_same_run, files_of, metrics_of

# Far more than any of these steps takes, and only waited for by a test that fails.
SECONDS = 600
EVERYTHING: dict[str, Any] = EVERYTHING_RANDOM | {"training__posthoc_ema": True, "training__log_every_steps": 1}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose loop waits for each of its checkpoints, which are those of steps 2, 4 and 6. Read only."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(run_arguments(run, **EVERYTHING, training__async_checkpoint=False)) == 0
    return run


def step_of_thread() -> int | None:
    """Return the step whose checkpoint this thread writes in the background; None in the main thread."""
    name = threading.current_thread().name
    return int(name.removeprefix("checkpoint of step ")) if name.startswith("checkpoint of step ") else None


def before_writing(step: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something in the thread that writes the checkpoint of a step, before its first file."""
    write_files = checkpoint.write_files

    def write(folder: Path, files: checkpoint.CheckpointFiles) -> None:
        if step_of_thread() == step:
            action()
        write_files(folder, files)

    monkeypatch.setattr(checkpoint, "write_files", write)


def until_waited_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that blocks a writing thread until the main thread waits for it."""
    is_waited_for = threading.Event()
    join = Checkpointer.join

    def noted(self: Checkpointer) -> bool:
        if self._writing is not None:
            is_waited_for.set()
        return join(self)

    def block() -> None:
        assert is_waited_for.wait(SECONDS), "nothing waits for the thread"

    monkeypatch.setattr(Checkpointer, "join", noted)
    return block


def fit(folder: Path, *scores: float, **changes: object) -> Trainer:
    """Train a tiny run and return its trainer. The values are the scores of its steps, the lowest is the best."""
    values = iter(scores)
    config, _ = parse_command_line(run_arguments(folder, **changes))
    trainer = Trainer(config, scorer=lambda *_: Score(next(values), "test", True, {}))
    try:
        trainer.fit()
    finally:
        trainer.folder.release()
    return trainer


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_training_goes_on_during_a_write_of_the_checkpoint_as_it_was_at_its_step(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that writes the checkpoint of step 2 is held back until step 4 begins, in which it is waited for.

    Every file has the bytes of the run that waits, except for the setting itself.
    """
    run, steps, has_gone_on = tmp_path / "run", list[int](), threading.Event()
    train_step = Trainer._train_step

    def noted(self: Trainer, step: int) -> None:
        steps.append(step + 1)
        if step + 1 == 4:
            has_gone_on.set()
        train_step(self, step)

    def hold() -> None:
        assert metrics_of(run)[-1]["step"] >= 2, "metrics of a step are on disk before its checkpoint"
        assert has_gone_on.wait(SECONDS), "training waits for the checkpoint"
        assert steps == [1, 2, 3, 4]
        assert not (run / "checkpoints" / "step_00000002").exists()

    monkeypatch.setattr(Trainer, "_train_step", noted)
    before_writing(2, hold, monkeypatch)
    assert train(run_arguments(run, **EVERYTHING)) == 0
    assert_same_run(whole_run, run, 6)
    for step in (2, 4, 6):
        folders = (path / "checkpoints" / f"step_{step:08d}" for path in (whole_run, run))
        expected, found = ({name: data for name, data in files_of(folder).items()} for folder in folders)
        for files in (expected, found):
            del files["config.yaml"], files["manifest.json"]
        assert found == expected
    assert threads() == []


def test_the_next_save_waits_for_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it reads a tensor: two threads must never write, and the memory of the copies is reused."""
    snapshot_files, existed, run = checkpoint.snapshot_files, list[list[str]](), tmp_path / "run"

    def noted(*arguments: Any) -> checkpoint.CheckpointFiles:
        existed.append(sorted(path.name for path in run.glob("checkpoints/step_*")))
        return snapshot_files(*arguments)

    monkeypatch.setattr(checkpoint, "snapshot_files", noted)
    before_writing(2, until_waited_for(monkeypatch), monkeypatch)
    fit(run)
    assert existed == [[], ["step_00000002"], ["step_00000002", "step_00000004"]]


def test_the_last_checkpoint_and_that_of_a_signal_are_written_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the main thread, which can raise what goes wrong."""
    writers: list[int | None] = []
    write_files, train_step = checkpoint.write_files, Trainer._train_step

    def noted(folder: Path, files: checkpoint.CheckpointFiles) -> None:
        writers.append(step_of_thread())
        write_files(folder, files)

    def stopped(self: Trainer, step: int) -> None:
        if step + 1 == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        train_step(self, step)

    monkeypatch.setattr(checkpoint, "write_files", noted)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopped)
        assert train(run_arguments(tmp_path / "run")) == 143
    assert writers == [2, None]
    assert train(run_arguments(tmp_path / "run")) == 0
    assert writers == [2, None, 4, None]


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("is_async", [True, False])
def test_a_best_checkpoint_that_cannot_be_written_is_not_the_best(
    is_async: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The write of step 4 fails while the next score is compared, which is the best of those that exist.

    The older best checkpoint is kept until a better one is complete.
    """
    write_checkpoint, run = checkpoint.write_checkpoint, tmp_path / "run"
    block = until_waited_for(monkeypatch)

    def write(root: Path, step: int, content: Callable[[Path], None]) -> checkpoint.Checkpoint:
        if step == 4:
            if is_async:
                block()
            assert (root / "step_00000002").exists()
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_checkpoint(root, step, content)

    monkeypatch.setattr(checkpoint, "write_checkpoint", write)
    changes = {"training__checkpoint_every_steps": 100, "training__num_checkpoints_kept": 2}
    changes |= {"training__num_steps": 8, "evaluation__score_every_steps": 2}
    trainer = fit(run, 3.0, 1.0, 2.0, 9.0, training__async_checkpoint=is_async, **changes)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000006", "step_00000008"]
    state = json.loads((run / "checkpoints" / "step_00000008" / "trainer_state.json").read_text())
    assert state["best"] == trainer.best == {"step": 6, "kind": "test", "value": 2.0}
    assert caplog.text.count("The checkpoint of step 4 could not be written (No space left on device)") == 1


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_unexpected_error_of_the_thread_is_raised_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    before_writing(2, fail, monkeypatch)
    with pytest.raises(RuntimeError, match="a bug"):
        fit(tmp_path / "run")
    assert metrics_of(tmp_path / "run")[-1]["step"] == 4
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("error", [RuntimeError("an error"), SystemExit(7)])
def test_an_error_in_the_loop_waits_for_the_checkpoint_and_the_same_process_continues_from_it(
    error: BaseException, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder stays locked until the checkpoint is complete, because the trainer waits before it leaves `fit`."""
    run, train_step = tmp_path / "run", Trainer._train_step

    def fail(self: Trainer, step: int) -> None:
        if step + 1 == 3:
            raise error
        train_step(self, step)

    with monkeypatch.context() as patch:
        before_writing(2, until_waited_for(patch), patch)
        patch.setattr(Trainer, "_train_step", fail)
        with pytest.raises(type(error)):
            fit(run, **EVERYTHING)
        assert threads() == []
        assert verify_checkpoint(run / "checkpoints" / "step_00000002").step == 2
    fit(run, **EVERYTHING)
    assert_same_run(whole_run, run, 6)


@pytest.mark.usefixtures("fresh_accelerate")
def test_without_memory_for_the_copy_the_loop_waits(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: HostCopy, files: checkpoint.CheckpointFiles) -> None:
        raise MemoryError("1.0 GB of 1.5 GB available")

    monkeypatch.setattr(HostCopy, "copy", refuse)
    monkeypatch.setattr(checkpoint._Writing, "start", lambda self: pytest.fail("a thread was started"))
    fit(tmp_path / "run", **EVERYTHING)
    assert caplog.text.count("no host memory for a copy of the checkpoint (1.0 GB of 1.5 GB available)") == 1
    assert_same_run(whole_run, tmp_path / "run", 6)


# -------------------------------------------------------------------------------------------------- kill and interrupt


@pytest.mark.parametrize(
    ("function", "call", "newest"),
    [("save_file", 2, 2), ("sha256_of_file", 3, 2), ("sync_tree", 1, 2), ("prune", 1, 4)],
)
def test_a_kill_during_a_write_in_the_background_loses_nothing(
    function: str, call: int, newest: int, whole_run: Path, tmp_path: Path
) -> None:
    """In the middle of the tensors, of the hashes, before the rename, and after it: training is a step further."""
    run, log = tmp_path / "run", tmp_path / "log"
    process = victim.start(run_arguments(run, **EVERYTHING), log, kill_in=(function, call))
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    assert metrics_of(run)[-1]["step"] == 5
    latest, damaged = find_latest(run / "checkpoints")
    assert latest is not None
    assert (latest.step, damaged) == (newest, [])
    assert bool(list(run.glob("checkpoints/.writing-*"))) == (newest == 2)
    assert train(run_arguments(run, **EVERYTHING)) == 0
    assert_same_run(whole_run, run, 6)
    assert not list(run.glob("checkpoints/.writing-*"))


def test_a_second_signal_ends_the_process_at_once_while_it_waits_for_a_checkpoint(
    whole_run: Path, tmp_path: Path
) -> None:
    """The thread writes forever. The first signal is for the next step, which is never reached."""
    run, log = tmp_path / "run", tmp_path / "log"
    process = victim.start_interrupted(run_arguments(run, **EVERYTHING), log)
    process.join()
    assert process.exitcode == -signal.SIGINT, log.read_text()
    assert find_latest(run / "checkpoints") == (checkpoint.Checkpoint(run / "checkpoints" / "step_00000002", 2), [])
    assert train(run_arguments(run, **EVERYTHING)) == 0
    assert_same_run(whole_run, run, 6)
