"""`ddpm-hf <command>`: run a command, and turn its errors into one message and an exit code.

Exit codes: 0 success, 1 failure while running, 2 invalid input, 3 training became non-finite, 130 / 143 stopped by a
signal (training saves a checkpoint first).
"""

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType

from ddpm_hf import __version__
from ddpm_hf.cli.common import RankError, format_os_error, print_error
from ddpm_hf.redaction import redact
from ddpm_hf.signals import Terminated, exit_code_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ddpm-hf <command> ...`, and return the exit code."""
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if command == "--version":
        print(f"ddpm-hf {__version__}")
        return 0
    if command in COMMANDS:
        run, _ = COMMANDS[command]
        return run(rest[:-1])
    print("usage: ddpm-hf <command> ...\n\ncommands:")
    for name, (_, purpose) in COMMANDS.items():
        print(f"  {name:<10}{purpose}; see ddpm-hf {name} --help")
    if command in ("-h", "--help"):
        return 0
    problem = f"unknown command {command!r}" if command else "no command"
    *names, last = COMMANDS
    print(redact(f"ddpm-hf: {problem}; choose {', '.join(names)} or {last}."), file=sys.stderr)
    return 2


# Commands are imported when they run, so that --help is quick.


def data(arguments: Sequence[str]) -> int:
    """Run `ddpm-hf data`, and return the exit code."""
    from ddpm_hf.cli.data import data as command

    return _exit_code(lambda: command(arguments))


def train(arguments: Sequence[str] | None = None, prog: str = "ddpm-hf train") -> int:
    """Run `ddpm-hf train`, and return the exit code."""
    from ddpm_hf.cli.train import train as command

    return _exit_code(lambda: command(arguments, prog))


def distill(arguments: Sequence[str]) -> int:
    """Run `ddpm-hf distill`, and return the exit code."""
    from ddpm_hf.cli.distill import distill as command

    return _exit_code(lambda: command(arguments))


def ema(arguments: Sequence[str]) -> int:
    """Run `ddpm-hf ema`, and return the exit code."""
    from ddpm_hf.cli.ema import ema as command

    return _exit_code(lambda: command(arguments))


def sample(arguments: Sequence[str]) -> int:
    """Run `ddpm-hf sample`, and return the exit code."""
    from ddpm_hf.cli.sample import sample as command

    return _exit_code(lambda: command(arguments))


def evaluate(arguments: Sequence[str]) -> int:
    """Run `ddpm-hf evaluate`, and return the exit code."""
    from ddpm_hf.cli.evaluate import evaluate as command

    return _exit_code(lambda: command(arguments))


def plot(arguments: Sequence[str]) -> int:
    """Run `ddpm-hf plot`, and return the exit code."""
    from ddpm_hf.cli.plot import plot as command

    return _exit_code(lambda: command(arguments))


def demo(arguments: Sequence[str]) -> int:
    """Run `ddpm-hf demo`, and return the exit code."""
    from ddpm_hf.cli.demo import demo as command

    return _exit_code(lambda: command(arguments))


def push(arguments: Sequence[str]) -> int:
    """Run `ddpm-hf push`, and return the exit code."""
    from ddpm_hf.cli.push import push as command

    return _exit_code(lambda: command(arguments))


def timesteps(arguments: Sequence[str]) -> int:
    """Run `ddpm-hf timesteps`, and return the exit code."""
    from ddpm_hf.cli.timesteps import timesteps as command

    return _exit_code(lambda: command(arguments))


def verify(arguments: Sequence[str]) -> int:
    """Run `ddpm-hf verify`, and return the exit code."""
    from ddpm_hf.cli.verify import verify as command

    return _exit_code(lambda: command(arguments))


def convert(arguments: Sequence[str]) -> int:
    """Run `ddpm-hf convert`, and return the exit code."""
    from ddpm_hf.cli.convert import convert as command

    return _exit_code(lambda: command(arguments))


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "data": (data, "show what a run would read"),
    "train": (train, "train a DDPM"),
    "distill": (distill, "distill a trained DDPM into students of few sampling steps"),
    "ema": (ema, "reconstruct an EMA of any length"),
    "sample": (sample, "sample images from a pipeline"),
    "evaluate": (evaluate, "measure how good a pipeline is"),
    "timesteps": (timesteps, "choose the timesteps of few sampling steps"),
    "plot": (plot, "plot schedules, the forward process, runs and images"),
    "demo": (demo, "open a page that samples, morphs and inpaints"),
    "convert": (convert, "convert a checkpoint of another system, and back"),
    "push": (push, "publish a pipeline on the Hub"),
    "verify": (verify, "check a saved pipeline against what was saved"),
}
"""Commands in the order of the help."""


def _exit_code(command: Callable[[], int]) -> int:
    """Run a command; print errors that a user can cause as one message, and others as a traceback without secrets.

    Errors of all ranks are printed by rank 0, and `RankError` by the rank that raises it.
    """
    sys.excepthook = _print_traceback
    for stream in (sys.stdout, sys.stderr):  # a name of a file or class may not exist in the encoding of the terminal
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        exit_code = _run(command)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # a closed terminal or pipe; Python would report it at the exit with a code of its own
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return exit_code


def _run(command: Callable[[], int]) -> int:
    """Run a command and return its exit code."""
    try:
        return command()
    except ValueError as error:
        print_error(str(error))
        return 2
    except BrokenPipeError:  # as in `ddpm-hf ... | head`
        return 141
    except RankError as error:
        print_error(str(error), of_this_rank=True)
        return error.exit_code
    except MemoryError as error:
        print_error(f"out of memory{f' ({error})' if str(error) else ''}; reduce the size of the task.")
        return 1
    except OSError as error:
        print_error(format_os_error(error))
        return 1
    except Terminated as error:
        print_error(f"ended by {error.name}; the same command repeats this part.")
        return error.exit_code
    except KeyboardInterrupt:
        print_error("interrupted")
        return exit_code_of(signal.SIGINT)


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)
