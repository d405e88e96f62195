"""How a command ends at a signal: by an exception, so that what it was doing is tidied up."""

import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

# Ctrl-C raises KeyboardInterrupt as it is.
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Terminated(SystemExit):
    """A signal ends the command; not an Exception, so that nothing takes it for a failure of its own and goes on.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(143)
        self.name = signal.Signals(number).name


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Lets SIGTERM and SIGUSR1 end what is inside as Ctrl-C does, so that files, locks and processes are tidied up.

    Raises:
        Terminated: At such a signal, wherever the main thread is.
    """

    def end(number: int, _: FrameType | None) -> None:
        raise Terminated(number)

    old_handlers = {number: signal.signal(number, end) for number in _ENDING_SIGNALS}
    try:
        yield
    finally:
        _install(old_handlers)


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Makes a folder that goes away again, at whatever moment a signal comes; a second one ends the process at once.

    One that comes while the folder is made or removed waits until that is done. Python takes signals in the main thread
    alone: in another one this is a folder and nothing more.

    Args:
        prefix: How its name begins.

    Raises:
        Terminated: At SIGTERM and SIGUSR1.
        KeyboardInterrupt: At SIGINT.
    """
    is_ours, received = False, 0

    def end(number: int, _: FrameType | None) -> None:
        nonlocal received
        for each in taken:
            signal.signal(each, signal.SIG_DFL)
        received = number
        if is_ours:
            raise _exception_of(number)

    is_main_thread = threading.current_thread() is threading.main_thread()
    taken = [
        number
        for number in ((*_ENDING_SIGNALS, signal.SIGINT) if is_main_thread else ())
        if signal.getsignal(number) is not signal.SIG_IGN  # as shells let programs in the background ignore Ctrl-C
    ]
    old_handlers = {number: signal.signal(number, end) for number in taken}
    try:
        with tempfile.TemporaryDirectory(prefix=prefix) as folder:
            try:
                is_ours = True
                if received:
                    raise _exception_of(received)
                yield Path(folder)
            finally:
                is_ours = False
    finally:
        _install(old_handlers)
    if received:
        raise _exception_of(received)


def _exception_of(number: int) -> BaseException:
    """Returns what a signal raises."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)


def _install(handlers: Mapping[signal.Signals, Any]) -> None:
    """Puts handlers back; None stands for one that was not installed from Python, which Python cannot put back."""
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
