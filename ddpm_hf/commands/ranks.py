"""The processes that Accelerate has started, as an evaluation wants to know them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.evaluation.ranks import Ranks
from ddpm_hf.training import processes


def started_ranks() -> Ranks:
    """Returns the processes; after `processes.start`."""
    return Ranks(processes.rank(), processes.world_size(), gather_rows, processes.on_rank_0)


def gather_rows(rows: NDArray[Any]) -> NDArray[Any]:
    """Collective: joins the arrays of all processes along the first axis, in the order of their ranks.

    Args:
        rows: Of the same type and, but for the first axis, shape on all processes.
    """
    counts = processes.gather_json(len(rows))
    start = sum(counts[: processes.rank()])
    joined = np.zeros((sum(counts), *rows.shape[1:]), np.uint8 if rows.dtype == bool else rows.dtype)
    joined[start : start + len(rows)] = rows
    processes.join_parts(joined)
    return joined.astype(rows.dtype, copy=False)
