"""The command line: find the command, and turn errors into one sentence and an exit code.

Exit codes: 0 done, 1 failed while running, 2 bad input, 3 training was not finite, 130 / 143 stopped by a signal; in
training after saving.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType

from ddpm_hf import __version__
from ddpm_hf.cli.common import RankError, Terminated, format_os_error, print_error
from ddpm_hf.redaction import redact


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `ddpm-hf <command> ...` and returns the exit code."""
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if command == "--version":
        print(f"ddpm-hf {__version__}")
        return 0
    if command in COMMANDS:
        run, _ = COMMANDS[command]
        return run(rest[:-1])
    print("usage: ddpm-hf <command> ...\n\ncommands:")
    for name, (_, purpose) in COMMANDS.items():
        print(f"  {name:<9}{purpose}; see ddpm-hf {name} --help")
    if command in ("-h", "--help"):
        return 0
    problem = f"unknown command {command!r}" if command else "no command"
    *names, last = COMMANDS
    print(redact(f"ddpm-hf: {problem}; choose {', '.join(names)} or {last}."), file=sys.stderr)
    return 2


def data(arguments: Sequence[str]) -> int:
    """Shows what a run would read, and returns the exit code."""
    from ddpm_hf.cli.data import data as command

    return _exit_code(lambda: command(arguments))


def train(arguments: Sequence[str] | None = None, prog: str = "ddpm-hf train") -> int:
    """Trains as the command line and its configuration say, and returns the exit code."""
    from ddpm_hf.cli.train import train as command

    return _exit_code(lambda: command(arguments, prog))


def ema(arguments: Sequence[str]) -> int:
    """Makes a pipeline with an average of any length out of those that a run stored, and returns the exit code."""
    from ddpm_hf.cli.ema import ema as command

    return _exit_code(lambda: command(arguments))


def sample(arguments: Sequence[str]) -> int:
    """Draws images from a pipeline into a folder, and returns the exit code."""
    from ddpm_hf.cli.sample import sample as command

    return _exit_code(lambda: command(arguments))


def evaluate(arguments: Sequence[str]) -> int:
    """Measures how good a pipeline is, and returns the exit code."""
    from ddpm_hf.cli.evaluate import evaluate as command

    return _exit_code(lambda: command(arguments))


def plot(arguments: Sequence[str]) -> int:
    """Draws a picture, and returns the exit code."""
    from ddpm_hf.cli.plot import plot as command

    return _exit_code(lambda: command(arguments))


def verify(arguments: Sequence[str]) -> int:
    """Tells whether a saved pipeline is what was saved, and returns the exit code."""
    from ddpm_hf.cli.verify import verify as command

    return _exit_code(lambda: command(arguments))


def push(arguments: Sequence[str]) -> int:
    """Publishes a trained pipeline on the Hub, and returns the exit code."""
    from ddpm_hf.cli.push import push as command

    return _exit_code(lambda: command(arguments))


# The order is that of the help.
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "data": (data, "show what a run would read"),
    "train": (train, "train a DDPM"),
    "ema": (ema, "make a pipeline with an average of any length"),
    "sample": (sample, "draw images from a pipeline"),
    "evaluate": (evaluate, "measure how good a pipeline is"),
    "plot": (plot, "draw schedules, noising, curves of runs, grids"),
    "push": (push, "publish a pipeline on the Hub"),
    "verify": (verify, "tell whether a saved pipeline is what was saved"),
}


def _exit_code(command: Callable[[], int]) -> int:
    """Runs a command; what a user can cause is told in one sentence, once, and a bug by a traceback.

    What all ranks have is told by rank 0, and what one rank meets alone by that rank.
    """
    sys.excepthook = _print_traceback
    try:
        return command()
    except ValueError as error:
        print_error(str(error))
        return 2
    except BrokenPipeError:  # whoever read what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except RankError as error:
        print_error(str(error), of_this_rank=True)
        return error.exit_code
    except MemoryError as error:
        print_error(f"out of memory ({error}); ask for less." if str(error) else "out of memory; ask for less.")
        return 1
    except OSError as error:
        print_error(format_os_error(error))
        return 1
    except Terminated as error:
        print_error(f"ended by {error.name}; the same command begins this part again.")
        return 143
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints a traceback as Python does, without secrets: libraries put what they were given into their errors."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)
