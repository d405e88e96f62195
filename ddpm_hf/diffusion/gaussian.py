"""The Gaussian algebra of diffusion: equations only, no state, no randomness, no choice of device or dtype.

Legend: x_0 is clean data, eps standard normal noise, alpha = sqrt(alpha_bar_t), sigma = sqrt(1 - alpha_bar_t), and
x_t = alpha x_0 + sigma eps. Samples are (batch, ...), coefficients numbers or (batch, 1, ...); what is returned has the
shape of the samples and the dtype that torch gives the operands: callers who want float32 pass float32.
"""

import math
from typing import TypeVar

import torch

from .noise_schedule import Transition

CORE_VERSION = "1.2.0"

LEARNED_VARIANCE_TYPES = ("learned", "learned_range")

Coefficient = float | torch.Tensor
LogVariance = TypeVar("LogVariance", float, torch.Tensor)


def _combine(a: Coefficient, x: torch.Tensor, b: Coefficient, y: torch.Tensor) -> torch.Tensor:
    """Sums a x + b y in two tensor operations."""
    if isinstance(b, torch.Tensor):
        return torch.addcmul(a * x, b, y)
    return torch.add(a * x, y, alpha=b)


def q_sample(x_0: torch.Tensor, eps: torch.Tensor, alpha: Coefficient, sigma: Coefficient) -> torch.Tensor:
    """Noised data x_t = alpha x_0 + sigma eps. Eq. 4, Ho et al. 2020."""
    return _combine(alpha, x_0, sigma, eps)


def velocity(x_0: torch.Tensor, eps: torch.Tensor, alpha: Coefficient, sigma: Coefficient) -> torch.Tensor:
    """Velocity v = alpha eps - sigma x_0. Appendix D, Salimans and Ho 2022."""
    return _combine(alpha, eps, -sigma, x_0)


def x_0_from_eps(x_t: torch.Tensor, eps: torch.Tensor, alpha: Coefficient, sigma: Coefficient) -> torch.Tensor:
    """Data x_0 = (x_t - sigma eps) / alpha. Eq. 15, Ho et al. 2020."""
    return _combine(1 / alpha, x_t, -sigma / alpha, eps)


def x_0_from_v(x_t: torch.Tensor, v: torch.Tensor, alpha: Coefficient, sigma: Coefficient) -> torch.Tensor:
    """Data x_0 = alpha x_t - sigma v. Appendix D, Salimans and Ho 2022."""
    return _combine(alpha, x_t, -sigma, v)


def eps_from_x_0(x_t: torch.Tensor, x_0: torch.Tensor, alpha: Coefficient, sigma: Coefficient) -> torch.Tensor:
    """Noise eps = (x_t - alpha x_0) / sigma."""
    return _combine(1 / sigma, x_t, -alpha / sigma, x_0)


def eps_from_v(x_t: torch.Tensor, v: torch.Tensor, alpha: Coefficient, sigma: Coefficient) -> torch.Tensor:
    """Noise eps = sigma x_t + alpha v."""
    return _combine(sigma, x_t, alpha, v)


def predict_x_0(
    prediction_type: str, output: torch.Tensor, x_t: torch.Tensor, alpha: Coefficient, sigma: Coefficient
) -> torch.Tensor:
    """x_0 according to a network's output of one of diffusers' prediction types."""
    if prediction_type == "epsilon":
        return x_0_from_eps(x_t, output, alpha, sigma)
    if prediction_type == "v_prediction":
        return x_0_from_v(x_t, output, alpha, sigma)
    return output


def predict_eps(
    prediction_type: str, output: torch.Tensor, x_t: torch.Tensor, alpha: Coefficient, sigma: Coefficient
) -> torch.Tensor:
    """The noise in x_t according to a network's output of one of diffusers' prediction types."""
    if prediction_type == "sample":
        return eps_from_x_0(x_t, output, alpha, sigma)
    if prediction_type == "v_prediction":
        return eps_from_v(x_t, output, alpha, sigma)
    return output


def dynamic_threshold(x_0: torch.Tensor, ratio: float, max_value: float) -> torch.Tensor:
    """Clips each sample to m and divides by m, its own quantile of |x_0|. Section 2.3, Saharia et al. 2022.

    Args:
        x_0: A prediction of clean data, (batch, ...).
        ratio: Which quantile, 0 to 1.
        max_value: The largest m; the smallest is 1, so that no sample within [-1, 1] changes.
    """
    limit = x_0.reshape(len(x_0), -1).abs().quantile(ratio, dim=1).clamp(min=1, max=max_value)
    limit = limit.view(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-limit, limit) / limit


def posterior_mean(x_0: torch.Tensor, x_t: torch.Tensor, coef_x_0: Coefficient, coef_x_t: Coefficient) -> torch.Tensor:
    """Mean coef_x_0 x_0 + coef_x_t x_t of q(x_{t-1} | x_t, x_0). Eq. 7, Ho et al. 2020.

    The mean of every reverse step, also of DDIM, is such a sum, with the factors of `reverse_mean_coefficients`.
    """
    return _combine(coef_x_0, x_0, coef_x_t, x_t)


def reverse_mean_coefficients(step: Transition, eta: float) -> tuple[float, float]:
    """Factors of x_0 and x_t in the mean of a reverse step, eps being derived from that same x_0.

    Eq. 12, Song et al. 2021, with sigma_t^2 = eta^2 times the posterior variance; eta = 1 is Eq. 7, Ho et al. 2020.
    """
    variance = eta**2 * step.posterior_variance
    direction = math.sqrt(max(1 - step.alpha_bar_prev - variance, 0.0))
    coef_x_t = direction / math.sqrt(1 - step.alpha_bar)
    coef_x_0 = math.sqrt(step.alpha_bar_prev) - coef_x_t * math.sqrt(step.alpha_bar)
    return coef_x_0, coef_x_t


def interpolated_log_variance(v: torch.Tensor, log_min: Coefficient, log_max: Coefficient) -> torch.Tensor:
    """Log-variance (1 - v) / 2 log_min + (1 + v) / 2 log_max, v in [-1, 1]. Eq. 15, Nichol and Dhariwal 2021."""
    return (log_max - log_min) / 2 * v + (log_min + log_max) / 2


def reverse_log_variance(
    variance_type: str, output: torch.Tensor | None, log_small: LogVariance, log_large: LogVariance
) -> LogVariance | torch.Tensor:
    """Log-variance of a reverse step at eta = 1, as `variance_type` says.

    Args:
        variance_type: `learned`, `learned_range`, `fixed_small`, `fixed_large`, or one of these two with `_log`.
        output: What the network says of the variance, in the shape of the samples; None where it is fixed.
        log_small: The logarithm of the posterior variance beta~.
        log_large: The logarithm of beta.
    """
    if output is not None:
        return output if variance_type == "learned" else interpolated_log_variance(output, log_small, log_large)
    return log_large if variance_type.startswith("fixed_large") else log_small


def add_learned_noise(
    mean: torch.Tensor, noise: torch.Tensor, v: torch.Tensor, log_min: float, log_max: float, eta: float
) -> torch.Tensor:
    """Returns mean + eta exp(log_variance / 2) noise, log_variance = `interpolated_log_variance(v, log_min, log_max)`.

    Args:
        mean: Mean of the reverse step.
        noise: Standard normal, in the shape of the mean.
        v: What the network says of the variance, in that shape; with a range of -1 to 1 it is the log-variance itself.
        log_min: Log-variance at v = -1.
        log_max: Log-variance at v = 1.
        eta: 0 (no noise) to 1 (DDPM).
    """
    # The two constants are numbers, so these are three tensor operations.
    deviation = torch.exp((log_max - log_min) / 4 * v)
    return torch.addcmul(mean, noise, deviation, value=eta * math.exp((log_min + log_max) / 4))


def normal_kl(
    mean_1: torch.Tensor, log_variance_1: torch.Tensor, mean_2: torch.Tensor, log_variance_2: torch.Tensor
) -> torch.Tensor:
    """KL(N_1 || N_2) of diagonal Gaussians, element by element, in nats.

    1/2 (log var_2 - log var_1 + var_1 / var_2 + (mean_1 - mean_2)^2 / var_2 - 1).
    """
    ratio = torch.exp(log_variance_1 - log_variance_2)
    distance = (mean_1 - mean_2) ** 2 * torch.exp(-log_variance_2)
    return 0.5 * (log_variance_2 - log_variance_1 + ratio + distance - 1)


def discretized_log_likelihood(x_0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Log-probability of 8-bit data under a Gaussian, element by element, in nats. Eq. 13, Ho et al. 2020.

    A value stands for the interval 1/255 to either side; -1 and 1 stand for the rest of the line too. The difference of
    two CDFs is formed from their logarithms, with the larger factored out, so neither it nor its gradient under- or
    overflows in float32 or float64.

    Args:
        x_0: Data in [-1, 1], -1 plus whole multiples of 2/255.
        mean: The Gaussian's mean.
        log_variance: Its log-variance.
    """
    inverse_deviation = torch.exp(-log_variance / 2)
    distance, half_bin = (x_0 - mean) * inverse_deviation, inverse_deviation / 255
    # By symmetry the interval may lie on the left: near is its edge on the side of the mean, far the other one.
    near, far = half_bin - distance.abs(), -half_bin - distance.abs()
    log_near = _log_normal_cdf(near)
    log_ratio = _log_normal_cdf(far) - log_near
    # Where rounding eats this difference: the slope of log CDF in the middle, phi / Phi, times the width.
    is_narrow = half_bin < torch.finfo(half_bin.dtype).eps ** (1 / 3)
    slope = math.sqrt(2 / math.pi) / torch.special.erfcx(distance.abs() / math.sqrt(2))
    log_ratio = torch.where(is_narrow, -2 * half_bin * slope, log_ratio)
    # So far out that even the edges are rounded to one, log CDF is all that counts.
    log_ratio = log_ratio.clamp(max=-torch.finfo(log_ratio.dtype).tiny)
    inside = log_near + torch.log(-torch.expm1(log_ratio))
    below, above = _log_normal_cdf(half_bin + distance), _log_normal_cdf(half_bin - distance)
    return torch.where(x_0 < -0.999, below, torch.where(x_0 > 0.999, above, inside))


def _log_normal_cdf(z: torch.Tensor) -> torch.Tensor:
    """Logarithm of Phi(z); far on the left the gradient of torch's own is wrong, in float32 from -1000 on."""
    left, right = z.clamp(max=0), z.clamp(min=0)
    on_the_left = torch.log(torch.special.erfcx(-left / math.sqrt(2)) / 2) - left**2 / 2
    return torch.where(z < 0, on_the_left, torch.log1p(-torch.erfc(right / math.sqrt(2)) / 2))
