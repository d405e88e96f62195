"""The equations invert each other, for float and tensor coefficients, and match other code and exact arithmetic."""

import itertools
import math
from typing import Any

import mpmath
import pytest
import torch
from oracles import seeded
from scipy import integrate, stats

from ddpm_hf.diffusion import gaussian
from ddpm_hf.diffusion.gaussian import discretized_log_likelihood
from ddpm_hf.diffusion.schedule import NoiseSchedule, make_betas

ALPHA_BARS = (0.9999, 0.5, 4e-5)
PRIOR_BITS = 1.164553065516922e-5
BOUND_WEIGHTS = {
    1: 0.2726920842780397,
    10: 0.06822398899051094,
    100: 0.0099962302264614,
    500: 0.005509734533430372,
    999: 0.01020449346863787,
}


def pair(alpha_bar: float, as_tensor: bool):
    """(alpha, sigma) as floats or as tensors that broadcast."""
    alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    if not as_tensor:
        return alpha, sigma
    return torch.full((4, 1, 1), alpha, dtype=torch.float64), torch.full((4, 1, 1), sigma, dtype=torch.float64)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape, dtype=torch.float64, generator=seeded())


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("alpha_bar", ALPHA_BARS)
def test_conversions_recover_data_and_noise(alpha_bar: float, as_tensor: bool) -> None:
    """Float64 rounding, amplified by 1 / alpha <= 160."""
    x_0, eps = draw(4, 3, 3)
    coefficients = pair(alpha_bar, as_tensor)
    x_t = gaussian.q_sample(x_0, eps, *coefficients)
    v = gaussian.velocity(x_0, eps, *coefficients)
    torch.testing.assert_close(gaussian.x_0_from_eps(x_t, eps, *coefficients), x_0, rtol=0, atol=1e-12)
    torch.testing.assert_close(gaussian.x_0_from_v(x_t, v, *coefficients), x_0, rtol=0, atol=1e-12)
    torch.testing.assert_close(gaussian.eps_from_x_0(x_t, x_0, *coefficients), eps, rtol=0, atol=1e-12)
    torch.testing.assert_close(gaussian.eps_from_v(x_t, v, *coefficients), eps, rtol=0, atol=1e-12)
    for prediction_type, output in (("epsilon", eps), ("sample", x_0), ("v_prediction", v)):
        recovered_x_0 = gaussian.predict_x_0(prediction_type, output, x_t, *coefficients)
        recovered_eps = gaussian.predict_eps(prediction_type, output, x_t, *coefficients)
        torch.testing.assert_close(recovered_x_0, x_0, rtol=0, atol=1e-12)
        torch.testing.assert_close(recovered_eps, eps, rtol=0, atol=1e-12)


def test_velocity_is_the_derivative_of_x_t_along_the_angle() -> None:
    """With alpha = cos(phi), sigma = sin(phi), v = d x_t / d phi (Salimans and Ho 2022); central difference, O(h^2)."""
    x_0, eps = draw(4)
    phi, h = 0.7, 1e-5
    after, before = (gaussian.q_sample(x_0, eps, math.cos(p), math.sin(p)) for p in (phi + h, phi - h))
    v = gaussian.velocity(x_0, eps, math.cos(phi), math.sin(phi))
    torch.testing.assert_close((after - before) / (2 * h), v, rtol=0, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_reverse_mean_is_equation_12_of_ddim_and_at_eta_1_equation_7_of_ddpm(eta: float) -> None:
    """Float64 rounding."""
    schedule = NoiseSchedule.from_betas(make_betas("linear"))
    x_0, eps = draw(4)
    for step in schedule.transitions([999, 600, 3, 2, 0]):
        alpha, sigma = math.sqrt(step.alpha_bar), math.sqrt(1 - step.alpha_bar)
        x_t = gaussian.q_sample(x_0, eps, alpha, sigma)
        mean = gaussian.posterior_mean(x_0, x_t, *gaussian.reverse_mean_coefficients(step, eta))
        deviation = eta**2 * step.posterior_variance
        expected = math.sqrt(step.alpha_bar_prev) * x_0 + math.sqrt(1 - step.alpha_bar_prev - deviation) * eps
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)
    for t in (1, 2, 500, 999):
        step = schedule.transitions([t, t - 1])[0]
        coef_x_0, coef_x_t = gaussian.reverse_mean_coefficients(step, 1.0)
        assert coef_x_0 == pytest.approx(schedule.posterior_mean_coef_x_0[t].item(), rel=1e-8)
        assert coef_x_t == pytest.approx(schedule.posterior_mean_coef_x_t[t].item(), rel=1e-8)


def test_kl_is_that_of_torch_distributions() -> None:
    """Float64 rounding; 0 for equal Gaussians exactly."""
    mean_1, mean_2 = draw(5)
    log_variance_1, log_variance_2 = draw(5) - 1
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean_1, torch.exp(log_variance_1 / 2)),
        torch.distributions.Normal(mean_2, torch.exp(log_variance_2 / 2)),
    )
    torch.testing.assert_close(gaussian.normal_kl(mean_1, log_variance_1, mean_2, log_variance_2), expected)
    assert gaussian.normal_kl(mean_1, log_variance_1, mean_1, log_variance_1).abs().max().item() == 0


def test_a_constant_prediction_is_guided_without_rescaling() -> None:
    """The output of a fresh network, whose last layer is zeros; the other image of the batch is rescaled."""
    conditional, null = torch.randn(2, 2, 3, 8, 8, generator=seeded())
    conditional[0], null[0] = 0.5, 0.25
    guided = gaussian.classifier_free_guidance(conditional, null, 3.0, 0.7)
    assert torch.equal(guided[0], torch.ones(3, 8, 8))
    assert torch.equal(guided[1:], gaussian.classifier_free_guidance(conditional[1:], null[1:], 3.0, 0.7))
    plain = null[1] + 3 * (conditional[1] - null[1])
    expected = plain * (0.7 * conditional[1].std() / plain.std() + 0.3)
    torch.testing.assert_close(guided[1], expected)


def test_the_prior_term_of_the_bound_is_that_of_the_paper() -> None:
    """Section 4, Ho et al. 2020: x_T is N(0, 1) to about 1e-5 bits a dimension; E[x_0^2] = 0.4 here.

    16 digits of 40-digit arithmetic; log and exp near 1 lose five of them.
    """
    alpha_bar = NoiseSchedule.from_betas(make_betas("linear")).alphas_cumprod[-1]
    zero = torch.zeros(1, dtype=torch.float64)
    kl = gaussian.normal_kl((0.4 * alpha_bar).sqrt(), torch.log1p(-alpha_bar), zero, zero)
    assert kl.item() / math.log(2) == pytest.approx(PRIOR_BITS, rel=1e-10)


def test_the_weights_of_the_bound_are_those_of_the_paper() -> None:
    """Eq. 12, Ho et al. 2020: an error of 1 in the noise moves the posterior mean by sqrt(2 beta_t weight_t).

    With the variance beta_t; 16 digits of 40-digit arithmetic, of which 1 - alpha_bar near t = 0 loses four.
    """
    schedule = NoiseSchedule.from_betas(make_betas("linear"))
    x_t, eps = draw(1)
    for t, weight in BOUND_WEIGHTS.items():
        alpha, sigma = schedule.sqrt_alphas_cumprod[t].item(), schedule.sqrt_one_minus_alphas_cumprod[t].item()
        coefficients = schedule.posterior_mean_coef_x_0[t].item(), schedule.posterior_mean_coef_x_t[t].item()
        means = [
            gaussian.posterior_mean(gaussian.x_0_from_eps(x_t, noise, alpha, sigma), x_t, *coefficients)
            for noise in (eps, eps + 1)
        ]
        moved = (means[1] - means[0]).item()
        assert moved**2 / (2 * schedule.betas[t].item()) == pytest.approx(weight, rel=1e-10), t


def test_learned_range_interpolates_between_its_bounds() -> None:
    """Ends exact up to float64 rounding."""
    v = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    log_variance = gaussian.interpolated_log_variance(v, -9.0, -3.0)
    assert log_variance.tolist() == pytest.approx([-9.0, -6.0, -3.0], rel=1e-15)
    mean, noise = draw(3)
    noisy = gaussian.add_learned_noise(mean, noise, v, -9.0, -3.0, eta=0.5)
    torch.testing.assert_close(noisy, mean + 0.5 * torch.exp(log_variance / 2) * noise)


def test_the_log_variance_follows_the_variance_type() -> None:
    for variance_type in ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"):
        expected = -3.0 if "large" in variance_type else -9.0
        assert gaussian.reverse_log_variance(variance_type, None, -9.0, -3.0) == expected
    output = torch.tensor([-1.0, 0.0, 1.0])
    assert torch.equal(gaussian.reverse_log_variance("learned", output, -9.0, -3.0), output)
    assert gaussian.reverse_log_variance("learned_range", output, -9.0, -3.0).tolist() == [-9.0, -6.0, -3.0]


def test_dynamic_threshold_scales_each_sample_by_its_own_quantile() -> None:
    """A sample inside [-1, 1] is left alone; one outside is clipped to and divided by its quantile, at most 2."""
    inside, outside = torch.linspace(-0.5, 0.5, 101), torch.linspace(-4, 4, 101)
    result = gaussian.dynamic_threshold(torch.stack([inside, outside]), ratio=0.9, max_value=2.0)
    torch.testing.assert_close(result[0], inside, rtol=0, atol=0)
    torch.testing.assert_close(result[1], outside.clamp(-2, 2) / 2, rtol=0, atol=0)
    limit = outside.abs().quantile(0.9)
    unlimited = gaussian.dynamic_threshold(outside[None], ratio=0.9, max_value=10.0)[0]
    torch.testing.assert_close(unlimited, outside.clamp(-limit, limit) / limit)


# The discretized likelihood

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


def test_the_probabilities_of_all_256_values_sum_to_one() -> None:
    """The intervals cover the line once; float64 rounding, and 1e-8 where an edge of the narrowest is rounded."""
    pixels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, log_variance in itertools.product((-1.5, -1.0, 0.3, 0.99), (-46.0, -12.0, -6.0, 0.0, 6.0)):
        parameters = (torch.full_like(pixels, value) for value in (mean, log_variance))
        total = discretized_log_likelihood(pixels, *parameters).exp().sum().item()
        assert total == pytest.approx(1.0, abs=1e-8), (mean, log_variance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_likelihoods_and_their_gradients_are_always_finite(dtype: torch.dtype) -> None:
    """The smallest variance is 1e-20, the clamp of the posterior in the code of Ho et al."""
    grid = itertools.product((-1.0, 0.2, 1.0), (0.0, 1e-3, 1.0, 1e4, 1e7), (1, -1), (-46.0, -30.0, 0.0, 60.0))
    pixel, distance, sign, log_variance = (torch.tensor(column, dtype=dtype) for column in zip(*grid, strict=True))
    mean = (pixel + sign * distance).requires_grad_(True)
    log_variance.requires_grad_(True)
    values = discretized_log_likelihood(pixel, mean, log_variance)
    assert values.dtype == dtype
    slopes = torch.autograd.grad(values.sum(), (mean, log_variance))
    assert all(torch.isfinite(part).all() for part in (values, *slopes))
    assert (values <= 0).all()
