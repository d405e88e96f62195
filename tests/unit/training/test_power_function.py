"""The closed forms of post-hoc averaging against numbers that nobody had to integrate by hand."""

import itertools

import numpy as np
import pytest
from numpy.polynomial.legendre import leggauss
from numpy.typing import NDArray

from ddpm_hf.training.ema import MAX_SIGMA_REL, combine, gamma_of, power_decay_at, profile_product

NODES, WEIGHTS = leggauss(200)


def integral(values: object, end: float) -> float:
    """Integrates a function from 0 to `end` by Gauss-Legendre quadrature, exact for polynomials up to degree 399."""
    return float(end / 2 * (WEIGHTS * values(end / 2 * (NODES + 1))).sum())  # type: ignore[operator]


def profile(s: NDArray[np.float64], t: float, gamma: float) -> NDArray[np.float64]:
    """The averaging profile at time t, Karras et al. 2024, Eq. 3: normalised power function on [0, t]."""
    return np.where(s <= t, (gamma + 1) * s**gamma / t ** (gamma + 1), 0.0)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_the_published_ones(sigma_rel: float, gamma: float) -> None:
    """To the two decimals of Karras et al. 2024, section 3.1."""
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_length_is_the_relative_deviation_of_the_profile(sigma_rel: float) -> None:
    """By quadrature; 1e-6 is what it leaves for exponents that are no whole numbers."""
    gamma, t = gamma_of(sigma_rel), 3.0
    assert gamma > 0
    mean = integral(lambda s: s * profile(s, t, gamma), t)
    variance = integral(lambda s: (s - mean) ** 2 * profile(s, t, gamma), t)
    assert integral(lambda s: profile(s, t, gamma), t) == pytest.approx(1.0, rel=1e-6)
    assert variance**0.5 / t == pytest.approx(sigma_rel, rel=1e-6)


def test_the_longest_average_is_the_plain_mean() -> None:
    assert gamma_of(MAX_SIGMA_REL * (1 - 1e-12)) == pytest.approx(0.0, abs=1e-6)
    assert [power_decay_at(number, 0.0) for number in range(4)] == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4])


@pytest.mark.parametrize("gamma", [0.0, 2.5, 6.94, 16.97])
def test_an_average_is_the_integral_of_its_profile(gamma: float) -> None:
    """Weights that stay the same between two updates: each counts what the profile has between them."""
    counts = np.zeros(0)
    for number in range(12):
        decay = power_decay_at(number, gamma)
        counts = np.append(counts * decay, 1 - decay)
    edges = np.arange(13) / 12
    expected = edges[1:] ** (gamma + 1) - edges[:-1] ** (gamma + 1)
    np.testing.assert_allclose(counts, expected, rtol=1e-9)


@pytest.mark.parametrize("one", [(1.0, 16.97), (3.0, 6.94), (3.0, 0.5), (2.0, 6.94)])
@pytest.mark.parametrize("other", [(1.0, 6.94), (3.0, 16.97), (3.0, 6.94), (2.5, 40.0)])
def test_inner_products_of_profiles_are_those_of_quadrature(
    one: tuple[float, float], other: tuple[float, float]
) -> None:
    """1e-6 is what the quadrature leaves for exponents that are no whole numbers."""
    expected = integral(lambda s: profile(s, *one) * profile(s, *other), min(one[0], other[0]))
    found = profile_product(*(np.array(value) for value in (*one, *other)))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def stored(num: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns times and exponents of averages stored at equal intervals, as a run stores them."""
    t = np.repeat(np.arange(1, num + 1) * 1000.0, 2)
    return t, np.tile([gamma_of(0.05), gamma_of(0.10)], num)


@pytest.mark.parametrize("num", [1, 10, 40, 400])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.10])
def test_a_stored_average_is_found_again_alone(num: int, sigma_rel: float) -> None:
    """The system grows as ill-conditioned as 1e8 with 400 intervals, of which float64 leaves 1e-8."""
    t, gamma = stored(num)
    weights, error = combine(t, gamma, t[-1], gamma_of(sigma_rel))
    expected = np.zeros(2 * num)
    expected[-2 if sigma_rel == 0.05 else -1] = 1.0
    np.testing.assert_allclose(weights, expected, atol=1e-7)
    assert error < 1e-7


@pytest.mark.parametrize(
    ("num", "sigma_rel", "largest"), [(10, 0.08, 0.01), (40, 0.04, 0.002), (40, 0.08, 0.0006), (40, 0.15, 0.002)]
)
def test_the_combination_is_as_near_as_it_says(num: int, sigma_rel: float, largest: float) -> None:
    """The error by quadrature over each interval between stored averages, where all profiles are smooth."""
    t, gamma = stored(num)
    target = gamma_of(sigma_rel)
    weights, error = combine(t, gamma, t[-1], target)
    assert error < largest
    distance = whole = 0.0
    for start, end in zip([0.0, *t[:-2:2]], t[::2], strict=True):
        s = (start + end) / 2 + (end - start) / 2 * NODES
        wanted = profile(s, t[-1], target)
        made = (weights[:, None] * profile(s[None], t[:, None], gamma[:, None])).sum(axis=0)
        distance += float((WEIGHTS * (made - wanted) ** 2).sum())
        whole += float((WEIGHTS * wanted**2).sum())
    assert (distance / whole) ** 0.5 == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(("num", "sigma_rel"), [(5, 0.15), (3, 0.07), (20, 0.25), (40, 0.25), (40, 0.1)])
def test_what_never_changed_comes_back_as_it_was(num: int, sigma_rel: float) -> None:
    """Stored averages of equal weights are these weights, and so must be what is made of them; 1e-9 is rounding."""
    t, gamma = stored(num)
    weights, _ = combine(t, gamma, t[-1], gamma_of(sigma_rel))
    assert weights.sum() == pytest.approx(1.0, abs=1e-9)


def test_no_other_combination_is_nearer() -> None:
    """Least squares: a small step in any direction that keeps the sum of 1 makes the squared distance larger."""
    t, gamma = stored(10)
    target = gamma_of(0.07)
    weights, error = combine(t, gamma, t[-1], target)
    products = profile_product(t[:, None], gamma[:, None], t[None], gamma[None])
    wanted = profile_product(t, gamma, np.float64(t[-1]), np.float64(target))
    whole = float(profile_product(*(np.array(value) for value in (t[-1], target, t[-1], target))))

    def distance(counts: NDArray[np.float64]) -> float:
        return float(whole - 2 * wanted @ counts + counts @ products @ counts)

    assert distance(weights) == pytest.approx(error**2 * whole, rel=1e-6)
    identity = np.eye(len(t))
    for one, other in itertools.permutations(range(len(t)), 2):
        assert distance(weights + 1e-3 * (identity[one] - identity[other])) > distance(weights)
