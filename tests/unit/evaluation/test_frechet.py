"""The Fréchet distance against other ways to compute it, at the edge of what covariances are, and beyond it."""

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from ddpm_hf.evaluation import metrics
from ddpm_hf.evaluation.features import Moments, moments_of
from ddpm_hf.evaluation.metrics import frechet_distance

RANDOM = np.random.default_rng(0)


def features(num_images: int, dimension: int, seed: int) -> NDArray[np.float64]:
    """Returns correlated features around a mean that is not 0."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(dimension, dimension))
    return random.normal(size=(num_images, dimension)) @ mixing + random.normal(size=dimension)


def rotation(dimension: int) -> NDArray[np.float64]:
    return np.linalg.qr(np.random.default_rng(7).normal(size=(dimension, dimension)))[0]


def exact_distance(first: Moments, second: Moments) -> float:
    """Returns the formula of the paper by eigenvalues of S_1 S_2, in numbers of 60 digits."""
    with mpmath.workdps(60):
        product = mpmath.matrix(first.covariance.tolist()) * mpmath.matrix(second.covariance.tolist())
        eigenvalues = mpmath.eig(product, left=False, right=False)
        root = sum(mpmath.re(mpmath.sqrt(value)) for value in eigenvalues)
        traces = mpmath.mpf(float(np.trace(first.covariance))) + float(np.trace(second.covariance))
        difference = [mpmath.mpf(a) - b for a, b in zip(first.mean.tolist(), second.mean.tolist(), strict=True)]
        return float(sum(value * value for value in difference) + traces - 2 * root)


def test_the_distance_is_that_of_the_paper_to_twelve_digits() -> None:
    """float64 of 12 features: the last digits are lost to rounding."""
    first, second = moments_of(features(50, 12, 1)), moments_of(features(80, 12, 2))
    distance = frechet_distance(first, second)
    assert distance == pytest.approx(exact_distance(first, second), rel=1e-12)
    root = sqrtm(first.covariance @ second.covariance)
    plain = np.sum((first.mean - second.mean) ** 2) + np.trace(first.covariance + second.covariance - 2 * root.real)
    assert distance == pytest.approx(plain, rel=1e-10)
    assert distance == pytest.approx(frechet_distance(second, first), rel=1e-13)


@pytest.mark.parametrize("smallest", [1e-6, 1e-14, 0.0])
def test_directions_without_variance_cost_no_precision(smallest: float) -> None:
    """Covariances that commute have a closed form; its roots are of 1e-14 where rounding is 1e-16 of the largest."""
    dimension = 64
    turn = rotation(dimension)
    ours = np.concatenate([np.full(32, smallest), RANDOM.uniform(0.1, 4.0, 32)])
    theirs = np.concatenate([np.full(16, smallest), RANDOM.uniform(0.1, 4.0, 48)])
    first, second = (Moments(np.zeros(dimension), (turn * values) @ turn.T, 1000) for values in (ours, theirs))
    exact = float(np.sum((np.sqrt(ours) - np.sqrt(theirs)) ** 2))
    # A root of 1e-16, which rounding makes of 0, times a root of 1 in each of 16 directions.
    assert frechet_distance(first, second) == pytest.approx(exact, abs=16 * 2 * 3e-8)
    # In directions that are almost empty on both sides, no root of rounding is left.
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


def test_equal_features_are_at_no_distance_and_shifted_ones_at_their_shift_squared() -> None:
    values = features(100, 8, 3)
    assert frechet_distance(moments_of(values), moments_of(values)) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(moments_of(values), moments_of(values + 2.0)) == pytest.approx(8 * 4, rel=1e-12)


def test_moments_are_those_of_numpy_in_float64_whatever_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 features far from 0, where sums in float32 or of squares lose all digits of the covariance."""
    values = (features(1000, 5, 4) + 3e4).astype(np.float32)
    whole = moments_of(values)
    np.testing.assert_allclose(whole.mean, values.astype(np.float64).mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(whole.covariance, np.cov(values.astype(np.float64), rowvar=False), rtol=1e-11)
    monkeypatch.setattr(metrics, "_ROWS_AT_ONCE", 7)
    np.testing.assert_allclose(moments_of(values).covariance, whole.covariance, rtol=1e-11)
    assert whole.num_images == 1000


def test_a_covariance_of_too_few_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"A covariance of 8 features needs more than 8 images; there are 8\."):
        moments_of(features(8, 8, 0))


@pytest.mark.parametrize(
    ("covariance", "words"),
    [
        (np.diag([1.0, np.nan]), "of the features of 10 images is not finite"),
        (np.diag([1.0, np.inf]), "is not finite"),
        (np.diag([1.0, -0.01]), "has the eigenvalue -0.01; a covariance has none below 0"),
        (np.eye(3), "2 features cannot be compared with 3"),
    ],
)
def test_what_is_no_covariance_is_refused(covariance: NDArray[np.float64], words: str) -> None:
    good, bad = Moments(np.zeros(2), np.eye(2), 10), Moments(np.zeros(len(covariance)), covariance, 10)
    with pytest.raises(ValueError, match=words):
        frechet_distance(good, bad)
