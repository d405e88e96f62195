"""What an evaluation knows of the processes that share it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from numpy.typing import NDArray

Result = TypeVar("Result")


def _alone(work: Callable[[], Result]) -> Result | None:
    return work()


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, and what they do together; by default it is alone.

    Args:
        rank: Which process this is.
        num_processes: How many share the work.
        gather: Collective: joins the arrays of all processes along the first axis, in the order of their ranks.
        on_rank_0: Collective: calls a function on rank 0 only; a ValueError or OSError there is raised everywhere.
    """

    rank: int = 0
    num_processes: int = 1
    gather: Callable[[NDArray[Any]], NDArray[Any]] = lambda array: array
    on_rank_0: Callable[[Callable[[], Any]], Any] = _alone

    def part(self, num_items: int) -> range:
        """Returns the items of this process, a contiguous part."""
        first, stop = (num_items * (self.rank + side) // self.num_processes for side in (0, 1))
        return range(first, stop)


ALONE = Ranks()
