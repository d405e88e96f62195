"""How a command tells what went wrong: in one sentence, without secrets, once."""

import os
import sys

from ddpm_hf.redaction import redact


def complain(message: str, *, of_this_rank: bool = False) -> None:
    """Prints an error on rank 0, since the other ranks have the same one, or on the only rank that has it."""
    rank = os.environ.get("RANK", "0")
    if of_this_rank or rank == "0":
        print(f"error: {f'rank {rank}: ' if rank != '0' else ''}{redact(message)}", file=sys.stderr, flush=True)
