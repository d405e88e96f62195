"""Signals before the first step, in the last one and after it: one sentence, an exit code, and a run to continue."""

import fcntl
import os
import pty
import signal
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import ddpm_hf.cli.train as command
from ddpm_hf import distributed
from ddpm_hf.cli.main import train
from ddpm_hf.training import trainer
from tests.conftest import run_arguments
from tests.runs import at_step


@pytest.fixture(autouse=True)
def _old_handlers() -> Iterator[None]:
    """Let a signal without a handler fail the test instead of ending the test session.

    SIGINT interrupts, also where a shell started the tests in the background, which makes them ignore it.
    """

    def fail(number: int, _: object) -> None:
        raise AssertionError(f"{signal.Signals(number).name} arrived where no handler was installed")

    before = {number: signal.signal(number, fail) for number in (signal.SIGTERM, signal.SIGUSR1)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def signal_after(patch: pytest.MonkeyPatch, owner: Any, name: str, number: signal.Signals) -> None:
    """Send a signal when a function returns."""
    original: Callable[..., Any] = getattr(owner, name)

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        result = original(*arguments, **settings)
        signal.raise_signal(number)
        return result

    patch.setattr(owner, name, interrupted)


def test_a_signal_before_or_after_the_steps_exits_cleanly_and_the_run_can_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When the data are decoded, when the trackers close, while the pipeline is written, and in the report."""
    run = tmp_path / "run"
    arguments = run_arguments(run, training__num_steps=2, evaluation__num_samples=2, evaluation__num_inference_steps=2)
    for owner, name, number in (
        (trainer, "open_splits", signal.SIGUSR1),
        (trainer.Trackers, "__exit__", signal.SIGTERM),
        (trainer, "write_verification", signal.SIGTERM),
        (command, "_write_report", signal.SIGINT),
        (command, "_write_report", signal.SIGUSR1),
    ):
        with monkeypatch.context() as patch:
            signal_after(patch, owner, name, number)
            exit_code = train(arguments)
        printed = capsys.readouterr().err
        assert exit_code == (130 if number == signal.SIGINT else 143), (name, printed)
        sentence = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
        said = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and said[0].startswith(f"error: {sentence}"), (name, printed)
        assert (run / "pipeline").exists() == (owner is command)
        assert not list(tmp_path.rglob("*.writing")), name
    assert train(arguments) == 0


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_signal_in_the_last_step_of_several_processes_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks agree on a stop one step later, but there is no step after the last. A group of one agrees the same way."""
    arguments = run_arguments(tmp_path / "run", training__num_steps=2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: 2)
        at_step(2, lambda: signal.raise_signal(signal.SIGTERM), patch)
        assert train(arguments) == 143
    assert not dist.is_initialized(), "a command leaves the group at its end"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    assert not (tmp_path / "run" / "pipeline").exists()
    assert train(arguments) == 0
    assert (tmp_path / "run" / "pipeline").exists()


@pytest.mark.parametrize("is_nohup", [False, True])
def test_a_closed_terminal_saves_and_ends_the_run_unless_it_ignores_sighup(tmp_path: Path, is_nohup: bool) -> None:
    """As when an ssh session ends. What is printed afterwards cannot be written, which changes nothing."""
    num_steps = 20 if is_nohup else 100_000
    arguments = run_arguments(
        tmp_path / "run",
        training__num_steps=num_steps,
        training__checkpoint_every_steps=num_steps,
        evaluation__num_samples=2,
        evaluation__num_inference_steps=1,
    )
    child, terminal = pty.fork()
    if child == 0:
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
        signal.signal(signal.SIGHUP, signal.SIG_IGN if is_nohup else signal.SIG_DFL)
        os._exit(train(arguments))
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    printed = b""
    while b"images/s" not in printed:
        printed += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if is_nohup else 129)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    assert (tmp_path / "run" / "samples.png").exists() == is_nohup
