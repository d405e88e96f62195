"""A temporary folder is removed at the end, also if signals arrive at any moment."""

import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ddpm_hf.cli.common import temporary_folder
from ddpm_hf.signals import Terminated

ENDING = {signal.SIGTERM: Terminated, signal.SIGUSR1: Terminated, signal.SIGINT: KeyboardInterrupt}
PARTS = ("created", "used", "removed", "removed after a second signal")


@pytest.fixture(autouse=True)
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[signal.Signals, Any]]:
    """Handlers that fail the test if a signal reaches them, and a place for the folders."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail(number: int, _: object) -> None:
        raise AssertionError(f"{signal.Signals(number).name} arrived where no handler was installed")

    old_handlers = {number: signal.signal(number, fail) for number in ENDING}
    yield dict.fromkeys(ENDING, fail)
    for number, handler in old_handlers.items():
        signal.signal(number, handler)


def signal_in(patch: pytest.MonkeyPatch, part: str, number: signal.Signals) -> None:
    """Raise a signal when the folder has just been created, or is about to be removed."""
    owner, name = (tempfile, "mkdtemp") if part == "created" else (tempfile.TemporaryDirectory, "cleanup")
    original: Callable[..., Any] = getattr(owner, name)

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        if part != "created":
            signal.raise_signal(number)
        result = original(*arguments, **settings)
        if part == "created":
            signal.raise_signal(number)
        return result

    patch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("part", PARTS)
def test_a_signal_at_any_moment_leaves_nothing_behind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: dict[signal.Signals, Any],
    part: str,
    number: signal.Signals,
) -> None:
    was_used = False
    with monkeypatch.context() as patch, pytest.raises(ENDING[number]):
        if part != "used":
            signal_in(patch, part, number)
        with temporary_folder("mine-") as folder:
            was_used = True
            assert folder.parent == tmp_path and folder.name.startswith("mine-")
            (folder / "large.bin").write_bytes(b"x")
            if part in ("used", "removed after a second signal"):
                signal.raise_signal(number)
    assert was_used == (part != "created")
    assert list(tmp_path.iterdir()) == []
    assert {each: signal.getsignal(each) for each in ENDING} == before


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """Programs that a shell starts in the background ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with temporary_folder("mine-"):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert list(tmp_path.iterdir()) == []


def test_in_another_thread_signal_handlers_stay(tmp_path: Path, before: dict[signal.Signals, Any]) -> None:
    seen = []

    def use() -> None:
        with temporary_folder("mine-") as folder:
            seen.append((folder.is_dir(), {each: signal.getsignal(each) for each in ENDING}))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [(True, before)]
    assert list(tmp_path.iterdir()) == []
