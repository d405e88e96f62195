"""How a command tells what went wrong: in one sentence, without secrets, once."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ddpm_hf.redaction import redact


class OutOfMemory(Exception):
    """Memory ran out, on the device or on the host; the message says how to need less."""


def complain(message: str, *, of_this_rank: bool = False) -> None:
    """Prints an error on rank 0, since the other ranks have the same one, or on the only rank that has it."""
    rank = os.environ.get("RANK", "0")
    if of_this_rank or rank == "0":
        print(f"error: {f'rank {rank}: ' if rank != '0' else ''}{redact(message)}", file=sys.stderr, flush=True)


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
