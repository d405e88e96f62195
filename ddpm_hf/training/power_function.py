"""Averages with a power-function profile, and how a few of them make another one. Equations only, in float64.

Legend: t, the number of weights averaged so far; gamma, the exponent of a profile; sigma_rel, the standard deviation of
a profile relative to t, which is how the length of such an average is told.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C.
"""

import math

import numpy as np
from numpy.typing import NDArray

LONGEST = 12.0**-0.5
"""sigma_rel of the plain mean of all weights; longer averages would prefer the oldest."""


def gamma_of(sigma_rel: float) -> float:
    """Returns the exponent whose profile has a relative deviation, 0 < sigma_rel < LONGEST.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic equation with one root above 0.
    """
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def decay_at(num_updates: int, gamma: float) -> float:
    """Returns the decay of the update that follows `num_updates` earlier ones: beta(t) = (1 - 1/t)^(gamma + 1).

    The first update takes the weights as they are. After t updates the weights of update s count
    (s^(gamma + 1) - (s - 1)^(gamma + 1)) / t^(gamma + 1), exactly the integral of the profile over ]s - 1, s].
    """
    return float((num_updates / (num_updates + 1)) ** (gamma + 1))


def profile_product(
    t: NDArray[np.float64], gamma: NDArray[np.float64], other_t: NDArray[np.float64], other_gamma: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Returns the inner product of two profiles p(s) = (gamma + 1) s^gamma / t^(gamma + 1) on [0, t].

    The integral of their product over [0, min] is elementary. Arguments broadcast.
    """
    early, late = np.minimum(t, other_t), np.maximum(t, other_t)
    gamma_of_late = np.where(t > other_t, gamma, other_gamma)
    factor = (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1)
    return np.asarray(factor * (early / late) ** gamma_of_late / late)


def combine(
    t: NDArray[np.float64], gamma: NDArray[np.float64], target_t: float, target_gamma: float
) -> tuple[NDArray[np.float64], float]:
    """Makes a profile out of stored ones, as near as the squared distance can be with weights that sum to 1.

    What never changed comes back as it was. The nearest of all sums would scale every parameter.

    Args:
        t: When each average was stored, (number,).
        gamma: Its exponent, (number,). No two may agree in both.
        target_t: Until when the wanted average goes.
        target_gamma: Its exponent.

    Returns:
        What each stored average counts, (number,), and the distance that is left, relative to the wanted profile.
    """
    products = profile_product(t[:, None], gamma[:, None], t[None], gamma[None])
    wanted = profile_product(t, gamma, np.float64(target_t), np.float64(target_gamma))
    # Profiles grow narrow near 0: with all of length 1 the system is as well conditioned as it can be.
    length = np.sqrt(np.diag(products))
    sides = np.stack([wanted, np.ones_like(wanted)], axis=1) / length[:, None]
    nearest, shift = (np.linalg.solve(products / np.outer(length, length), sides) / length[:, None]).T
    weights = nearest + (1 - nearest.sum()) / shift.sum() * shift  # the second term by Lagrange's multiplier
    whole = (target_gamma + 1) ** 2 / ((2 * target_gamma + 1) * target_t)
    distance = whole - 2 * wanted @ weights + weights @ products @ weights
    return weights, math.sqrt(max(0.0, float(distance)) / whole)
