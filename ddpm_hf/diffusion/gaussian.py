"""The equations of Gaussian diffusion, without state, randomness or choice of device and dtype.

| symbol     | meaning                                                                                      |
|------------|----------------------------------------------------------------------------------------------|
| x_0        | clean data                                                                                   |
| x_t        | noised data at timestep t                                                                    |
| eps        | standard normal noise                                                                        |
| v          | velocity                                                                                     |
| alpha_bar  | product of 1 - beta_s over s <= t                                                            |
| alpha      | sqrt(alpha_bar), the factor of x_0 in x_t (alpha_t of Salimans and Ho 2022, not of Ho et al.) |
| sigma      | sqrt(1 - alpha_bar), the factor of eps in x_t                                                |
| eta        | 0 for DDIM, 1 for DDPM                                                                       |

Samples have shape (batch, ...), coefficients are floats or tensors of shape (batch, 1, ...). Results have the shape of
the samples and the dtype to which torch promotes the operands.
"""

import math
from typing import TypeVar

import numpy as np
import torch

from .schedule import Transition

LEARNED_VARIANCE_TYPES = ("learned", "learned_range")

Coefficient = float | torch.Tensor
LogVariance = TypeVar("LogVariance", float, torch.Tensor)


def weighted_sum(a: Coefficient, x: torch.Tensor, b: Coefficient, y: torch.Tensor) -> torch.Tensor:
    """Return a x + b y in two tensor operations."""
    if isinstance(b, torch.Tensor):
        return torch.addcmul(a * x, b, y)
    return torch.add(torch.mul(x, a), y, alpha=b)  # a * x would take longer: Python first asks the float


# The forward process


def q_sample(x_0: torch.Tensor, eps: torch.Tensor, alpha: Coefficient, sigma: Coefficient) -> torch.Tensor:
    """Return x_t = alpha x_0 + sigma eps."""
    # Eq. 4, Ho et al. 2020
    return weighted_sum(alpha, x_0, sigma, eps)


def velocity(x_0: torch.Tensor, eps: torch.Tensor, alpha: Coefficient, sigma: Coefficient) -> torch.Tensor:
    """Return v = alpha eps - sigma x_0."""
    # Appendix D, Salimans and Ho 2022
    return weighted_sum(alpha, eps, -sigma, x_0)


# Conversions between predictions


def x_0_from_eps(x_t: torch.Tensor, eps: torch.Tensor, alpha: Coefficient, sigma: Coefficient) -> torch.Tensor:
    """Return x_0 = (x_t - sigma eps) / alpha."""
    # Eq. 15, Ho et al. 2020
    return weighted_sum(1 / alpha, x_t, -sigma / alpha, eps)


def x_0_from_v(x_t: torch.Tensor, v: torch.Tensor, alpha: Coefficient, sigma: Coefficient) -> torch.Tensor:
    """Return x_0 = alpha x_t - sigma v."""
    # Appendix D, Salimans and Ho 2022
    return weighted_sum(alpha, x_t, -sigma, v)


def eps_from_x_0(x_t: torch.Tensor, x_0: torch.Tensor, alpha: Coefficient, sigma: Coefficient) -> torch.Tensor:
    """Return eps = (x_t - alpha x_0) / sigma."""
    # Eq. 4, Ho et al. 2020, solved for eps
    return weighted_sum(1 / sigma, x_t, -alpha / sigma, x_0)


def eps_from_v(x_t: torch.Tensor, v: torch.Tensor, alpha: Coefficient, sigma: Coefficient) -> torch.Tensor:
    """Return eps = sigma x_t + alpha v."""
    # Appendix D, Salimans and Ho 2022
    return weighted_sum(sigma, x_t, alpha, v)


def predict_x_0(
    prediction_type: str, output: torch.Tensor, x_t: torch.Tensor, alpha: Coefficient, sigma: Coefficient
) -> torch.Tensor:
    """Return x_0 given the output of a network trained for one of diffusers' prediction types."""
    if prediction_type == "epsilon":
        return x_0_from_eps(x_t, output, alpha, sigma)
    if prediction_type == "v_prediction":
        return x_0_from_v(x_t, output, alpha, sigma)
    return output


def predict_eps(
    prediction_type: str, output: torch.Tensor, x_t: torch.Tensor, alpha: Coefficient, sigma: Coefficient
) -> torch.Tensor:
    """Return eps given the output of a network trained for one of diffusers' prediction types."""
    if prediction_type == "sample":
        return eps_from_x_0(x_t, output, alpha, sigma)
    if prediction_type == "v_prediction":
        return eps_from_v(x_t, output, alpha, sigma)
    return output


def classifier_free_guidance(
    conditional: torch.Tensor, null: torch.Tensor, scale: float, rescale: float
) -> torch.Tensor:
    """Return null + scale (conditional - null), with its standard deviation rescaled towards that of `conditional`.

    Args:
        conditional: Predictions with labels, (batch, ...).
        null: Predictions with the null label, or those of the guide of autoguidance, in the same shape.
        scale: Guidance scale; 1 returns `conditional`.
        rescale: Factor phi of the rescaling; 0 leaves it out.
    """
    # Eq. 6, Ho and Salimans 2022; Eq. 3, Karras et al. 2024
    guided = torch.lerp(null, conditional, scale)
    if rescale == 0:
        return guided
    # Section 3.4, Lin et al. 2024
    dims = list(range(1, guided.ndim))
    deviation = guided.std(dims, keepdim=True)
    ratio = conditional.std(dims, keepdim=True) / deviation
    ratio = torch.where(deviation > 0, ratio, 1.0)  # a constant prediction has no deviation
    return guided * (rescale * ratio + (1 - rescale))


def dynamic_threshold(x_0: torch.Tensor, ratio: float, max_value: float) -> torch.Tensor:
    """Clip each sample to [-s, s] and divide it by s, its quantile of |x_0|.

    Args:
        x_0: A prediction of clean data, (batch, ...).
        ratio: The quantile, 0 to 1.
        max_value: Upper limit of s. The lower limit is 1, so samples within [-1, 1] do not change.
    """
    # Section 2.3, Saharia et al. 2022
    s = x_0.reshape(len(x_0), -1).abs().quantile(ratio, dim=1).clamp(min=1, max=max_value)
    s = s.view(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-s, s) / s


# The reverse process


def posterior_mean(x_0: torch.Tensor, x_t: torch.Tensor, coef_x_0: Coefficient, coef_x_t: Coefficient) -> torch.Tensor:
    """Return the mean of q(x_{t-1} | x_t, x_0), or of any reverse step with its own coefficients."""
    # Eq. 7, Ho et al. 2020
    return weighted_sum(coef_x_0, x_0, coef_x_t, x_t)


def noise_direction(step: Transition, eta: float) -> float:
    """Return the factor of eps in the mean of a reverse step, sqrt(alpha_bar_prev) x_0 + direction eps.

    This and the next function also take all steps of a run in one, and then return arrays.
    """
    # Eq. 12, Song et al. 2021, with sigma_t^2 = eta^2 posterior_variance
    direction: float = np.sqrt(np.maximum(1 - step.alpha_bar_prev - eta**2 * step.posterior_variance, 0.0))
    return direction


def reverse_mean_coefficients(step: Transition, eta: float) -> tuple[float, float]:
    """Return the factors of x_0 and x_t in the mean of a reverse step from DDIM (eta = 0) to DDPM (eta = 1).

    The mean is that of `noise_direction` with eps = (x_t - alpha x_0) / sigma.
    """
    coef_x_t = noise_direction(step, eta) / np.sqrt(1 - step.alpha_bar)
    coef_x_0 = np.sqrt(step.alpha_bar_prev) - coef_x_t * np.sqrt(step.alpha_bar)
    return coef_x_0, coef_x_t


def optimal_variance(step: Transition, eta: float, eps_second_moment: float) -> float:
    """Return the variance of a reverse step that is optimal for a trained network (Analytic-DPM).

    It is eta^2 times the posterior variance plus coef_x_0^2 Var(x_0 | x_t), because x_0 is only predicted. The variance
    of data in [-1, 1] is at most 1.

    Args:
        step: The step, between any two timesteps.
        eta: 0 (DDIM) to 1 (DDPM).
        eps_second_moment: Gamma_t = E |eps(x_t)|^2 / d, the second moment of the predicted noise; at most 1 is used.
    """
    # Theorem 1, Bao et al. 2022
    coef_x_0, _ = reverse_mean_coefficients(step, eta)
    unexplained = (1 - step.alpha_bar) * max(1 - eps_second_moment, 0.0)
    variance_of_x_0 = unexplained / step.alpha_bar if unexplained < step.alpha_bar else 1.0
    return eta**2 * step.posterior_variance + coef_x_0**2 * variance_of_x_0


def interpolated_log_variance(v: torch.Tensor, log_min: Coefficient, log_max: Coefficient) -> torch.Tensor:
    """Return (1 - v) / 2 log_min + (1 + v) / 2 log_max for v in [-1, 1]."""
    # Eq. 15, Nichol and Dhariwal 2021
    return (log_max - log_min) / 2 * v + (log_min + log_max) / 2


def reverse_log_variance(
    variance_type: str, output: torch.Tensor | None, log_small: LogVariance, log_large: LogVariance
) -> LogVariance | torch.Tensor:
    """Return the log-variance of a reverse step at eta = 1.

    Args:
        variance_type: `learned`, `learned_range`, `fixed_small`, `fixed_large`, or one of the last two with `_log`.
        output: The variance channels of the network, in the shape of the samples; None for a fixed variance.
        log_small: Logarithm of the posterior variance.
        log_large: Logarithm of beta.
    """
    if output is not None:
        return output if variance_type == "learned" else interpolated_log_variance(output, log_small, log_large)
    return log_large if variance_type.startswith("fixed_large") else log_small


def add_learned_noise(
    mean: torch.Tensor, noise: torch.Tensor, v: torch.Tensor, log_min: float, log_max: float, eta: float
) -> torch.Tensor:
    """Return mean + eta exp(log_variance / 2) noise, log_variance = `interpolated_log_variance(v, log_min, log_max)`.

    Args:
        mean: Mean of the reverse step.
        noise: Standard normal noise in the shape of the mean.
        v: The variance channels of the network in the shape of the mean.
        log_min: Log-variance at v = -1.
        log_max: Log-variance at v = 1.
        eta: 0 (no noise) to 1 (DDPM).
    """
    # Factored so that it takes three tensor operations.
    deviation = torch.exp((log_max - log_min) / 4 * v)
    return torch.addcmul(mean, noise, deviation, value=eta * math.exp((log_min + log_max) / 4))


# The variational bound


def normal_kl(
    mean_1: torch.Tensor, log_variance_1: torch.Tensor, mean_2: torch.Tensor, log_variance_2: torch.Tensor
) -> torch.Tensor:
    """Return KL(N_1 || N_2) of diagonal Gaussians, elementwise, in nats."""
    # 1/2 (log var_2 - log var_1 + var_1 / var_2 + (mean_1 - mean_2)^2 / var_2 - 1)
    ratio = torch.exp(log_variance_1 - log_variance_2)
    distance = (mean_1 - mean_2) ** 2 * torch.exp(-log_variance_2)
    return 0.5 * (log_variance_2 - log_variance_1 + ratio + distance - 1)


def normal_log_density(x: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the density of a normal distribution, elementwise, in nats."""
    return -0.5 * (math.log(2 * math.pi) + log_variance + (x - mean) ** 2 * torch.exp(-log_variance))


def discretized_log_likelihood(x_0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of 8-bit data under a Gaussian, elementwise, in nats.

    A value stands for the interval from 1/255 below to 1/255 above it; the intervals of -1 and 1 extend to infinity.
    The difference of two CDFs is computed from their logarithms, with the larger one factored out, so that neither it
    nor its gradient underflows or overflows in float32 or float64.

    Args:
        x_0: Data in [-1, 1], -1 plus whole multiples of 2/255.
        mean: Mean of the Gaussian.
        log_variance: Log-variance of the Gaussian.
    """
    # Eq. 13, Ho et al. 2020
    inverse_deviation = torch.exp(-log_variance / 2)
    distance, half_bin = (x_0 - mean) * inverse_deviation, inverse_deviation / 255
    # By symmetry, take the interval on the left of the mean: near is its edge closer to the mean.
    near, far = half_bin - distance.abs(), -half_bin - distance.abs()
    log_near = _log_normal_cdf(near)
    log_ratio = _log_normal_cdf(far) - log_near
    # A narrow interval, where the difference would be lost to rounding: its width times phi / Phi at its center.
    is_narrow = half_bin < torch.finfo(half_bin.dtype).eps ** (1 / 3)
    slope = math.sqrt(2 / math.pi) / torch.special.erfcx(distance.abs() / math.sqrt(2))
    log_ratio = torch.where(is_narrow, -2 * half_bin * slope, log_ratio)
    # Far from the mean both edges round to the same number, and only log_near matters.
    log_ratio = log_ratio.clamp(max=-torch.finfo(log_ratio.dtype).tiny)
    inside = log_near + torch.log(-torch.expm1(log_ratio))
    below, above = _log_normal_cdf(half_bin + distance), _log_normal_cdf(half_bin - distance)
    return torch.where(x_0 < -0.999, below, torch.where(x_0 > 0.999, above, inside))


def _log_normal_cdf(z: torch.Tensor) -> torch.Tensor:
    """Return log Phi(z) with correct gradients, unlike torch.special.log_ndtr below about -1000 in float32."""
    left, right = z.clamp(max=0), z.clamp(min=0)
    on_the_left = torch.log(torch.special.erfcx(-left / math.sqrt(2)) / 2) - left**2 / 2
    return torch.where(z < 0, on_the_left, torch.log1p(-torch.erfc(right / math.sqrt(2)) / 2))
