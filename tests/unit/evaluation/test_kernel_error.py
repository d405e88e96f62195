"""The variance of a kernel distance that one data set tells is that over many."""

import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_hf.evaluation import metrics
from ddpm_hf.evaluation.metrics import kernel_distance_variance


def distance(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    """The unbiased squared maximum mean discrepancy, Eq. 4 of Binkowski et al. 2018, with all pairs."""
    xx, yy, xy = ((a @ b.T / 3 + 1.0) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return float(within - 2 * xy.mean())


def data_set(seed: int, n: int, m: int, shift: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    return (random.normal(shift, 1, (n, 3)).astype(np.float32), random.normal(0, 1, (m, 3)).astype(np.float32))


@pytest.mark.parametrize(("n", "m"), [(60, 60), (30, 300)])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_error_is_the_spread_over_data_sets(n: int, m: int, shift: float) -> None:
    """300 of them tell it to 7 %, three of which are allowed; alike ones are told up to 16 % more, as none is below 0.

    The spread of subsets as if the images differed would be 2.5 and 3.1 times that of alike ones.
    """
    data_sets = [data_set(seed, n, m, shift) for seed in range(300)]
    spread = float(np.std([distance(x, y) for x, y in data_sets], ddof=1))
    told = float(np.mean([np.sqrt(kernel_distance_variance(x, y)) for x, y in data_sets]))
    assert 0.79 * spread < told < (1.21 if shift else 1.4) * spread


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the rounding of a product in float32."""
    x, y = data_set(0, 50, 70, 0.5)
    whole = kernel_distance_variance(x, y)
    monkeypatch.setattr(metrics, "_ROWS_AT_ONCE", 16)
    assert kernel_distance_variance(x, y) == pytest.approx(whole, rel=1e-5)


def test_of_many_images_the_first_tell_the_variance_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A half of them, to the 40 % that 200 images tell it here; of the half alone it would be twice as large."""
    x, y = data_set(0, 400, 400, 0.5)
    whole = kernel_distance_variance(x, y)
    monkeypatch.setattr(metrics, "MOST_IMAGES", 200)
    assert kernel_distance_variance(x, y) == pytest.approx(whole, rel=0.4)
