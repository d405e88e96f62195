"""How a command tells what went wrong: in one sentence, without secrets, once."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ddpm_hf.redaction import redact

_ADVICE = {
    errno.ENOSPC: "make room, or write to another disk",
    errno.EDQUOT: "make room, or write to another disk",
    errno.EROFS: "write to a disk that is not read-only",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
}


class RankFailed(Exception):
    """This rank cannot go on, and the others need not know why: it tells the message itself.

    Args:
        message: What went wrong, and what to do.
        exit_code: The one that the command ends with.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OutOfMemory(RankFailed):
    """Memory ran out, on the device or on the host; the message says how to need less."""


def complain(message: str, *, of_this_rank: bool = False) -> None:
    """Prints an error on rank 0, since the other ranks have the same one, or on the only rank that has it."""
    rank = os.environ.get("RANK", "0")
    if of_this_rank or rank == "0":
        print(f"error: {f'rank {rank}: ' if rank != '0' else ''}{redact(message)}", file=sys.stderr, flush=True)


def sentence_of(error: OSError) -> str:
    """Returns what the system refused, of which file, and what to do about it."""
    what = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return f"{what}; {_ADVICE[error.errno]}." if error.errno in _ADVICE else what


@contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """Turns memory that runs out inside, on any device, into a sentence, which the command line prints.

    Args:
        advice: What to do, such as "lower --batch_size"; without a full stop.

    Raises:
        OutOfMemory: If memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch has a class of its own for GPUs alone; on a CPU only the words tell.
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        raise OutOfMemory(f"out of memory ({(str(error) or 'no memory').splitlines()[0]}); {advice}.") from error
