"""Signals, the lock of the run folder, and the policy for gradients that are not finite."""

import fcntl
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ddpm_hf.training.optim import NonFiniteGuard, NonFiniteTraining, check_finite
from ddpm_hf.training.run_dir import RunLock

FINITE, NONFINITE = torch.tensor(False), torch.tensor(True)


def in_child(action: Callable[[], None]) -> int:
    """Runs an action in a child process; returns its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ----------------------------------------------------------------------------------------------------------- lock


def test_a_run_folder_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with pytest.raises(ValueError, match=r"another process is training in .*; wait for it, stop it, or choose another"):
        RunLock(tmp_path)
    lock.release()
    again = RunLock(tmp_path)
    again.release()


def test_a_process_that_ends_lets_go_of_its_folder(tmp_path: Path) -> None:
    def die() -> None:
        lock = RunLock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
        lock.release()

    assert in_child(die) == -signal.SIGKILL
    RunLock(tmp_path).release()


def test_another_process_is_refused(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)

    def enter() -> None:
        try:
            RunLock(tmp_path)
        except ValueError:
            os._exit(0)

    assert in_child(enter) == 0
    lock.release()


def test_a_lock_is_taken_on_the_file_that_others_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that leaves removes the file just after we opened it: the file we lock is then nobody's."""
    leaving, lock_file = RunLock(tmp_path), fcntl.flock

    def leave_then_lock(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        (tmp_path / ".lock").unlink()
        leaving.release()
        lock_file(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", leave_then_lock)
    lock = RunLock(tmp_path)
    assert lock.is_held()
    with pytest.raises(ValueError, match="another process is training in"):
        RunLock(tmp_path)
    lock.release()


def test_a_lock_knows_when_its_folder_is_gone_or_another(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lock = RunLock(run)
    assert lock.is_held()
    (run / ".lock").unlink()
    assert not lock.is_held()
    other = RunLock(run)
    assert other.is_held()
    assert not lock.is_held()
    shutil.rmtree(run)
    assert not other.is_held()
    run.write_text("a file")
    assert not other.is_held()
    lock.release()
    other.release()


def test_a_lock_is_never_a_file_that_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        RunLock(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"


# ----------------------------------------------------------------------------------------------------- non-finite


def test_updates_that_were_skipped_are_counted() -> None:
    watch = NonFiniteGuard(max_consecutive=3)
    applied = []
    for flag in (FINITE, NONFINITE, NONFINITE, FINITE, NONFINITE):
        watch.record(flag)
        applied.append(watch.was_applied())
    assert applied == [True, False, False, True, False]
    assert (watch.num_skipped, watch.num_consecutive) == (3, 1)


def test_an_update_is_told_once() -> None:
    """Otherwise the average would follow one update twice."""
    watch = NonFiniteGuard(max_consecutive=2)
    assert watch.was_applied() is None
    watch.record(NONFINITE)
    assert watch.was_applied() is False
    assert watch.was_applied() is None
    assert (watch.num_skipped, watch.num_consecutive) == (1, 1)


@pytest.mark.parametrize("max_consecutive", [1, 3])
def test_too_many_in_a_row_stop_the_run(max_consecutive: int) -> None:
    watch = NonFiniteGuard(max_consecutive)
    for _ in range(max_consecutive - 1):
        watch.record(NONFINITE)
        assert watch.was_applied() is False
    watch.record(NONFINITE)
    with pytest.raises(NonFiniteTraining) as caught:
        watch.was_applied()
    assert f"not finite in {max_consecutive} updates in a row (training.max_consecutive_nonfinite)" in str(caught.value)
    assert watch.num_skipped == max_consecutive


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_not_worth_saving(value: float) -> None:
    weights = [torch.ones(3, 2), torch.zeros(5)]
    check_finite(weights, step=7)
    weights[1][4] = value
    with pytest.raises(NonFiniteTraining, match=r"not finite after step 7, so they are not saved; .* are intact"):
        check_finite(weights, step=7)


def test_counts_that_a_checkpoint_restored_go_on() -> None:
    watch = NonFiniteGuard(max_consecutive=3)
    watch.num_skipped, watch.num_consecutive = 7, 2
    watch.record(NONFINITE)
    with pytest.raises(NonFiniteTraining):
        watch.was_applied()
    assert watch.num_skipped == 8


def test_skips_of_the_gradient_scaler_are_counted_apart_and_stop_no_run() -> None:
    watch = NonFiniteGuard(max_consecutive=2)
    for scale in (2.0**16, 2.0**15, 2.0**14, 2.0):
        watch.record(NONFINITE, torch.tensor(scale))
        assert watch.was_applied() is False
    assert (watch.num_scaler_skips, watch.num_skipped, watch.num_consecutive) == (4, 0, 0)
    watch.record(FINITE, torch.tensor(2.0))
    assert watch.was_applied() is True
    assert watch.num_scaler_skips == 4


def test_what_is_not_finite_without_scaling_is_not_the_scalers() -> None:
    watch = NonFiniteGuard(max_consecutive=2)
    for scale in (2.0, 1.0):
        watch.record(NONFINITE, torch.tensor(scale))
        assert watch.was_applied() is False
    assert (watch.num_scaler_skips, watch.num_skipped, watch.num_consecutive) == (1, 1, 1)
    watch.record(NONFINITE, torch.tensor(0.5))
    with pytest.raises(NonFiniteTraining):
        watch.was_applied()


def test_the_scale_counts_that_was_used() -> None:
    """The scaler halves its scale in place after the update, before the host looks."""
    watch = NonFiniteGuard(max_consecutive=2)
    scale = torch.tensor(2.0)
    watch.record(NONFINITE, scale)
    scale.mul_(0.5)
    assert watch.was_applied() is False
    assert (watch.num_scaler_skips, watch.num_skipped) == (1, 0)
