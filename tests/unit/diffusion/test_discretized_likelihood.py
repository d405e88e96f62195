"""The probability of an 8-bit value under a Gaussian is the integral over its interval, far into both tails."""

import itertools
import math
from typing import Any

import mpmath
import pytest
import torch
from scipy import integrate, stats

from ddpm_hf.diffusion.gaussian import discretized_log_likelihood

PIXELS = [-1.0, -1 + 2 / 255, -0.5019607843137255, 0.00392156862745098, 1 - 2 / 255, 1.0]
MEANS = [-30.0, -4.0, -1.2, -0.5, 0.0, 0.6, 1.0001, 7.0]
# Standard deviations from 4.5e-5, a hundredth of an interval, to 5e8.
LOG_VARIANCES = [-20.0, -14.0, -9.8, -7.0, -4.0, -1.0, 0.0, 3.0, 10.4, 11.0, 18.0, 40.0]


def reference(pixel: Any, mean: Any, log_variance: Any) -> Any:
    """Eq. 13, Ho et al. 2020, with 80 digits."""
    deviation, half_bin = mpmath.exp(log_variance / 2), mpmath.mpf(1) / 255

    def cdf(edge: Any) -> Any:
        return mpmath.erfc((mean - edge) / deviation / mpmath.sqrt(2)) / 2

    if pixel < -0.999:
        return mpmath.log(cdf(pixel + half_bin))
    if pixel > 0.999:  # 1 - cdf
        return mpmath.log(mpmath.erfc((pixel - half_bin - mean) / deviation / mpmath.sqrt(2)) / 2)
    mirrored = 2 * mean - pixel if pixel > mean else pixel  # on the left no difference of two ones is formed
    return mpmath.log(cdf(mirrored + half_bin) - cdf(mirrored - half_bin))


@pytest.mark.parametrize(("dtype", "value_error", "slope_error"), [
    (torch.float32, 3e-5, 1e-4),
    (torch.float64, 1e-10, 1e-9),
])  # fmt: skip
def test_value_and_gradient_are_those_of_eighty_digits(
    dtype: torch.dtype, value_error: float, slope_error: float
) -> None:
    """Relative to the larger of the number and 1.

    Rounding an edge by one part in 2^24 (2^53) moves the logarithm by some 300 times that where the interval is narrow
    against the distance; in float64 the slope that stands in for a difference is exact to eps^(2/3) = 4e-11.
    """
    grid = list(itertools.product(PIXELS, MEANS, LOG_VARIANCES))
    pixel, mean, log_variance = (torch.tensor(column, dtype=dtype) for column in zip(*grid, strict=True))
    mean.requires_grad_(True)
    log_variance.requires_grad_(True)
    values = discretized_log_likelihood(pixel, mean, log_variance)
    slopes = torch.autograd.grad(values.sum(), (mean, log_variance))
    assert torch.isfinite(torch.stack([values, *slopes])).all()

    step = mpmath.mpf(10) ** -25
    columns = [column.tolist() for column in (pixel, mean, log_variance)]
    with mpmath.workdps(80):
        for row, numbers in enumerate(zip(*columns, strict=True)):
            x, m, s = map(mpmath.mpf, numbers)
            expected = reference(x, m, s)
            by_mean = (reference(x, m + step, s) - reference(x, m - step, s)) / (2 * step)
            by_variance = (reference(x, m, s + step) - reference(x, m, s - step)) / (2 * step)
            assert abs(values[row].item() - expected) <= value_error * max(1, abs(expected)), numbers
            for slope, exact in ((slopes[0], by_mean), (slopes[1], by_variance)):
                assert abs(slope[row].item() - exact) <= slope_error * max(1, abs(exact)), numbers


@pytest.mark.parametrize(("pixel", "low", "high"), [
    (-1.0, -math.inf, -1 + 1 / 255),
    (-1 + 2 / 255, -1 + 1 / 255, -1 + 3 / 255),
    (0.2, 0.2 - 1 / 255, 0.2 + 1 / 255),
    (1.0, 1 - 1 / 255, math.inf),
])  # fmt: skip
def test_a_probability_is_the_integral_of_the_density_over_the_interval(pixel: float, low: float, high: float) -> None:
    """Quadrature to 1e-10."""
    mean, deviation = 0.1, 0.7
    expected, _ = integrate.quad(stats.norm(mean, deviation).pdf, low, high, epsabs=1e-12)
    found = discretized_log_likelihood(*torch.tensor([[pixel], [mean], [2 * math.log(deviation)]], dtype=torch.float64))
    assert math.exp(found.item()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("log_variance", [-46.0, -12.0, -6.0, 0.0, 6.0])
@pytest.mark.parametrize("mean", [-1.5, -1.0, 0.3, 0.99])
def test_the_probabilities_of_all_256_values_sum_to_one(mean: float, log_variance: float) -> None:
    """The intervals cover the line once; float64 rounding, and 1e-8 where an edge of the narrowest is rounded."""
    pixels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    values = discretized_log_likelihood(pixels, torch.full_like(pixels, mean), torch.full_like(pixels, log_variance))
    assert values.exp().sum().item() == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [0.0, 1e-3, 1.0, 1e4, 1e7])
@pytest.mark.parametrize("log_variance", [-46.0, -30.0, 0.0, 60.0])
def test_nothing_is_ever_infinite_or_not_a_number(dtype: torch.dtype, distance: float, log_variance: float) -> None:
    """The smallest variance that appears anywhere is 1e-20, the clamp of the posterior of the code of Ho et al."""
    pixel = torch.tensor([-1.0, 0.2, 1.0], dtype=dtype).repeat(2)
    mean = (pixel + torch.tensor([distance, -distance], dtype=dtype).repeat_interleave(3)).requires_grad_(True)
    variance = torch.full_like(pixel, log_variance).requires_grad_(True)
    values = discretized_log_likelihood(pixel, mean, variance)
    assert values.dtype == dtype
    slopes = torch.autograd.grad(values.sum(), (mean, variance))
    assert all(torch.isfinite(part).all() for part in (values, *slopes))
    assert (values <= 0).all()
