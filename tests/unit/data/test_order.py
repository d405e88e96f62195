"""Which sample comes when, and what becomes of it, is a closed form of its number."""

import itertools
import time

import numpy as np
import pytest

from ddpm_hf.data import SampleOrder
from ddpm_hf.rng import numpy_generator


@pytest.mark.parametrize("num_positions", [1, 3, 10, 64])
@pytest.mark.parametrize("batch", [1, 4, 7, 25])
def test_every_epoch_shows_every_image_once_whatever_the_batch(num_positions: int, batch: int) -> None:
    """Batches straddle epochs: nothing is dropped, nothing comes twice."""
    order = SampleOrder(num_positions, seed=0)
    num_epochs = batch + 1
    stops = [*range(0, num_positions * num_epochs, batch), num_positions * num_epochs]
    samples = np.concatenate([order.positions(start, stop) for start, stop in itertools.pairwise(stops)])
    epochs = samples.reshape(num_epochs, num_positions)
    assert (np.sort(epochs, axis=1) == np.arange(num_positions)).all()
    if num_positions >= 10:
        assert len(np.unique(epochs, axis=0)) == num_epochs, "every epoch has its own order"


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
def test_the_ranks_together_see_the_global_batch(num_ranks: int) -> None:
    batch, share = 12, 12 // num_ranks
    whole, split = SampleOrder(17, seed=1), [SampleOrder(17, seed=1) for _ in range(num_ranks)]
    for step in range(10):
        first = step * batch
        parts = [order.positions(first + rank * share, first + (rank + 1) * share) for rank, order in enumerate(split)]
        assert np.array_equal(np.concatenate(parts), whole.positions(first, first + batch))


def test_sample_n_is_position_n_mod_n_of_epoch_n_div_n() -> None:
    """The definition, from the generator of the stream itself."""
    order, count = SampleOrder(11, seed=7), 11
    for sample in (0, 10, 11, 54, 55, 1000):
        epoch, offset = divmod(sample, count)
        index = numpy_generator(7, "order", epoch).permutation(count)[offset]
        assert order.positions(sample, sample + 1).tolist() == [index]
        coin = numpy_generator(7, "flip", epoch).integers(0, 2, count, dtype=bool)[index]
        assert order.is_mirrored(sample, sample + 1).tolist() == [coin]
        corner = numpy_generator(7, "crop", epoch).random((count, 2), dtype=np.float32)[index]
        assert order.corners(sample, sample + 1).tolist() == [corner.tolist()]


def test_what_becomes_of_an_image_does_not_depend_on_the_batch() -> None:
    order = SampleOrder(17, seed=1)
    whole = order.is_mirrored(0, 120), order.corners(0, 120)
    for batch in (1, 7, 24):
        used = SampleOrder(17, seed=1)
        starts = range(0, 120, batch)
        flips = np.concatenate([used.is_mirrored(start, min(start + batch, 120)) for start in starts])
        corners = np.concatenate([used.corners(start, min(start + batch, 120)) for start in starts])
        assert np.array_equal(flips, whole[0])
        assert np.array_equal(corners, whole[1])


def test_an_image_is_mirrored_and_cropped_anew_in_every_epoch() -> None:
    """Half of the time, and evenly: five standard deviations of 20,000 coins are 0.018, of as many means 0.0102."""
    order = SampleOrder(100, seed=0)
    positions, flips, corners = (getattr(order, name)(0, 20_000) for name in ("positions", "is_mirrored", "corners"))
    by_image = flips[np.argsort(positions, kind="stable")].reshape(100, 200)
    assert abs(flips.mean() - 0.5) < 0.018
    assert (by_image.mean(axis=1) > 0.2).all()
    assert (by_image.mean(axis=1) < 0.8).all()
    assert corners.min() >= 0
    assert corners.max() < 1
    assert (abs(corners.mean(axis=0) - 0.5) < 0.0102).all()
    assert len(np.unique(corners, axis=0)) > 19_000


def test_the_order_is_a_closed_form_of_the_sample_number() -> None:
    """A resume at sample 10^15 is as quick as a start: if it walked through those before, this would not end."""
    start = 10**15 - 3
    fresh = SampleOrder(1000, seed=0).positions(start, start + 10)
    assert np.array_equal(SampleOrder(1000, seed=0).positions(start, start + 10), fresh)
    used = SampleOrder(1000, seed=0)
    for sample in (0, 5000, start - 5000, 70):
        used.positions(sample, sample + 1500)
        used.is_mirrored(sample, sample + 1500)
    assert np.array_equal(used.positions(start, start + 10), fresh), "what was asked before does not matter"


def test_resuming_at_step_1_000_000_takes_under_a_second() -> None:
    """One table of each kind is drawn, those of the epoch that the step is in, whatever came before.

    The bound is loose: for CIFAR-10 it takes a few milliseconds. What others do on the machine does not count.
    """
    batch, started = 128, time.process_time()
    order = SampleOrder(50_000, seed=0)
    first = 1_000_000 * batch
    assert len(order.positions(first, first + batch)) == len(order.is_mirrored(first, first + batch)) == batch
    assert time.process_time() - started < 1
    assert sorted(order._tables) == [("flip", 2560), ("order", 2560)]


def test_only_the_tables_in_use_are_kept() -> None:
    """Two epochs, while a batch straddles them; not all that ever were."""
    order = SampleOrder(10, seed=0)
    for start in range(0, 1000, 4):
        order.positions(start, start + 4)
        order.is_mirrored(start, start + 4)
        assert len(order._tables) <= 4


@pytest.mark.parametrize("ask", [SampleOrder.positions, SampleOrder.is_mirrored, SampleOrder.corners])
def test_another_seed_gives_another_order(ask: object) -> None:
    answers = [ask(SampleOrder(100, seed), 0, 100) for seed in (0, 1)]  # type: ignore[operator]
    assert not np.array_equal(*answers)
