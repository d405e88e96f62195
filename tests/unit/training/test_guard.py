"""Signals, the lock of the run folder, and the policy for gradients that are not finite."""

import fcntl
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ddpm_hf import distributed
from ddpm_hf.distributed import StopWatcher
from ddpm_hf.training.optim import NonFiniteGuard, NonFiniteTraining, check_finite
from ddpm_hf.training.run_dir import RunLock

FINITE, NONFINITE = torch.tensor(False), torch.tensor(True)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


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


# -------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_a_signal_is_noted_and_the_step_goes_on(number: signal.Signals, exit_code: int) -> None:
    with StopWatcher() as watcher:
        assert watcher.exit_code_if_stopped() == 0
        os.kill(os.getpid(), number)
        assert watcher.exit_code_if_stopped() == exit_code
        assert watcher.exit_code_if_stopped() == exit_code, "it stays noted"


def test_the_first_signal_decides_the_exit_code() -> None:
    with StopWatcher() as watcher:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert watcher.exit_code_if_stopped() == 130


def test_the_old_handlers_come_back_even_after_an_error() -> None:
    before = {number: signal.getsignal(number) for number in distributed.STOP_SIGNALS}
    with pytest.raises(RuntimeError, match="in a step"), StopWatcher():
        assert all(signal.getsignal(number) != before[number] for number in before)
        raise RuntimeError("in a step")
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long enough after the first; sooner it is the same request, which a launcher has passed on once more."""

    def send_two(pause: float) -> None:
        monkeypatch.setattr(distributed, "_SAME_REQUEST_SECONDS", pause)
        with StopWatcher() as watcher:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(watcher.exit_code_if_stopped())

    assert in_child(lambda: send_two(pause=-1)) == -signal.SIGTERM
    assert in_child(lambda: send_two(pause=100)) == 143


@pytest.mark.parametrize("name", ["LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"])
def test_a_launcher_that_went_away_stops_the_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """accelerate launch does not pass SIGTERM on; what is left is a child without a parent."""
    monkeypatch.setenv(name, "0")
    with StopWatcher() as watcher:
        assert watcher.exit_code_if_stopped() == 0
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert watcher.exit_code_if_stopped() == 143


def test_a_launcher_that_went_away_while_the_data_were_decoded_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is before the first step, so before anything watches."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with StopWatcher() as watcher:
        assert watcher.exit_code_if_stopped() == 143


def test_without_a_launcher_a_parent_that_went_away_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what nohup and a closed terminal look like."""
    with StopWatcher() as watcher:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert watcher.exit_code_if_stopped() == 0


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
