"""Which sample of a run comes when, and how it is mirrored and cropped: functions of (seed, epoch, index) alone.

Sample n of a run is position n mod N of epoch n // N, so batches straddle epochs and nothing is dropped. Each epoch is
a permutation of the N images; what happens to image `index` in it is drawn for that pair. Since n decides both, all of
it is a function of (seed, n) as well: of (seed, step, position in the global batch), whatever the batch size, and
however many processes share the batch.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.rng import numpy_generator

_Table = NDArray[Any]


class SampleOrder:
    """What each sample of a run is.

    Args:
        num_positions: Images in the set.
        seed: The seed of the run.
    """

    def __init__(self, num_positions: int, seed: int) -> None:
        self._num_positions = num_positions
        self._seed = seed
        self._tables: dict[tuple[str, int], _Table] = {}

    def positions(self, start: int, stop: int) -> NDArray[np.int64]:
        """Returns the positions in the set of samples start to stop - 1, int64 (number,)."""
        return self._look_up("order", _permutation, *self._places(start, stop))

    def is_mirrored(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Returns which of the samples start to stop - 1 are mirrored, each with a chance of one half."""
        epochs, _ = self._places(start, stop)
        return self._look_up("flip", _coins, epochs, self.positions(start, stop))

    def corners(self, start: int, stop: int) -> NDArray[np.float32]:
        """Returns where samples start to stop - 1 are cropped, uniform in [0, 1), (number, 2): vertical, horizontal."""
        epochs, _ = self._places(start, stop)
        return self._look_up("crop", _uniform_pairs, epochs, self.positions(start, stop))

    def _places(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns epoch and offset of each sample."""
        samples = np.arange(start, stop)
        return samples // self._num_positions, samples % self._num_positions

    def _look_up(
        self,
        stream: str,
        draw: Callable[[np.random.Generator, int], _Table],
        epochs: NDArray[np.int64],
        indices: NDArray[np.int64],
    ) -> _Table:
        """Returns what a table of each epoch, drawn whole, holds for its samples."""
        parts = [self._table(stream, draw, int(epoch))[indices[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(parts)

    def _table(self, stream: str, draw: Callable[[np.random.Generator, int], _Table], epoch: int) -> _Table:
        """Returns the table of one epoch, remembered while it is in use."""
        if (stream, epoch) not in self._tables:
            # Only the epoch before can still be asked for, by a batch that straddles the two.
            self._tables = {key: table for key, table in self._tables.items() if key[1] >= epoch - 1}
            generator = numpy_generator(self._seed, stream, epoch)
            self._tables[stream, epoch] = draw(generator, self._num_positions)
        return self._tables[stream, epoch]


def _permutation(generator: np.random.Generator, count: int) -> _Table:
    """Draws the order of an epoch."""
    return generator.permutation(count)


def _coins(generator: np.random.Generator, count: int) -> _Table:
    """Tosses a coin for each image."""
    return generator.integers(0, 2, count, dtype=np.bool_)


def _uniform_pairs(generator: np.random.Generator, count: int) -> _Table:
    """Draws two numbers in [0, 1) for each image."""
    return generator.random((count, 2), dtype=np.float32)
