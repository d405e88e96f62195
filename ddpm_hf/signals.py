"""Signals that stop a run, and what they do where no step can be finished first.

During training `distributed.StopWatcher` finishes the step and saves. Everywhere else a signal raises an exception, so
that context managers clean up. Python handles signals in the main thread only; another thread receives none.
"""

import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Sent by schedulers and `kill`, by Ctrl-C and notebooks, by schedulers that are asked to, and by a lost terminal."""


def exit_code_of(number: int) -> int:
    """Return the exit code of a process that a signal stopped: 129, 130 or 143; SIGUSR1 counts as SIGTERM."""
    return 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)


class Terminated(SystemExit):
    """Raised by a signal. Not an Exception, so that no `except Exception` catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(exit_code_of(number))
        self.exit_code = exit_code_of(number)
        self.name = signal.Signals(number).name


def is_main_thread() -> bool:
    """Return whether this thread may handle signals."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def raise_on_signals(numbers: Collection[signal.Signals] = STOP_SIGNALS) -> Iterator[None]:
    """Raise `Terminated`, or KeyboardInterrupt at SIGINT, so that context managers clean up."""

    def handle(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    with _signal_handler(handle, numbers):
        yield


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Let signals wait until the end; a signal blocked by its mask would reach another thread of the process."""
    received: list[int] = []
    try:
        with _signal_handler(lambda number, _: received.append(number), STOP_SIGNALS):
            yield
    finally:
        if received:
            signal.raise_signal(received[0])


@contextmanager
def _signal_handler(
    handle: Callable[[int, FrameType | None], object], numbers: Collection[signal.Signals]
) -> Iterator[None]:
    """Handle signals in the main thread, except those that are ignored, as SIGHUP is under nohup."""
    handled = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN] if is_main_thread() else []
    old = {number: signal.signal(number, handle) for number in handled}
    try:
        yield
    finally:
        restore_handlers(old)


def restore_handlers(old: Mapping[signal.Signals, object]) -> None:
    """Install the handlers that `signal.signal` returned."""
    for number, handler in old.items():
        # None stands for a handler that was not installed from Python, which Python cannot restore.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
