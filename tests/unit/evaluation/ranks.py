"""Ranks as threads of one process, for tests of collective functions."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ddpm_hf import distributed


class Ranks:
    """Runs a function on several ranks at once.

    Args:
        monkeypatch: Replaces the collectives of ddpm_hf.distributed.
        num_ranks: Number of ranks.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=200)
        self._local = threading.local()
        self._parts: dict[int, np.ndarray] = {}
        replacements = {
            "rank": lambda: getattr(self._local, "rank", 0),
            "world_size": lambda: num_ranks if hasattr(self._local, "rank") else 1,
            "gather_rows": self._gather_rows,
            "on_rank_0": self._on_rank_0,
            "on_every_rank": lambda function: function(),
            "broadcast_json": lambda value: self._gather_rows(np.array([value], object))[0],
            "barrier": self._barrier.wait,
        }
        for name, replacement in replacements.items():
            monkeypatch.setattr(distributed, name, replacement)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Return the result of each rank."""
        results: dict[int, Any] = {}

        def work(rank: int) -> None:
            self._local.rank = rank
            try:
                results[rank] = function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self._num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[rank] for rank in range(self._num_ranks)]

    def _gather_rows(self, rows: np.ndarray) -> np.ndarray:
        self._parts[self._local.rank] = rows
        self._barrier.wait()
        joined = np.concatenate([self._parts[rank] for rank in range(self._num_ranks)])
        self._barrier.wait()
        return joined

    def _on_rank_0(self, function: Callable[[], Any]) -> Any:
        result = function() if self._local.rank == 0 else None
        self._barrier.wait()
        return result
