"""EMA of the weights, and power-function EMA profiles.

Averages with a power-function profile, and how a few of them make another one. Equations only, in float64.

Legend: t, the number of weights averaged so far; gamma, the exponent of a profile; sigma_rel, the standard deviation of
a profile relative to t, which is how the length of such an average is told.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C.

Exponential moving averages of the weights.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ddpm_hf.config import TrainingConfig

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


MAIN = "ema"
"""The average that is sampled and saved."""

POSTHOC_LENGTHS = (0.05, 0.10)
"""sigma_rel of the two averages that others are made of after training, as in Karras et al. 2024."""

DecayLaw: TypeAlias = Callable[[int], float]
"""Number of earlier updates -> weight of the past in the next one; 1 leaves the average as it is."""


def decay_laws(config: TrainingConfig) -> dict[str, DecayLaw]:
    """Returns the averages of a run: MAIN, and with `posthoc_ema` one more for each of POSTHOC_LENGTHS."""
    laws: dict[str, DecayLaw] = {MAIN: partial(main_decay_at, config=config)}
    if config.posthoc_ema:
        for length in POSTHOC_LENGTHS:
            laws[posthoc_name(length)] = partial(decay_at, gamma=gamma_of(length))
    return laws


def posthoc_name(length: float) -> str:
    """Returns what an average of POSTHOC_LENGTHS is called in checkpoints."""
    return f"ema_sigma_{length:.3f}"


def main_decay_at(num_updates: int, config: TrainingConfig) -> float:
    """Returns the decay of the update that follows `num_updates` earlier ones.

    With an interval of k every k-th update forgets as much as k single ones, and those between leave the average alone.
    """
    interval = config.ema_every_steps
    if (num_updates + 1) % interval:
        return 1.0
    return math.prod(_decay_of_a_step(number, config) for number in range(num_updates + 1 - interval, num_updates + 1))


def _decay_of_a_step(num_updates: int, config: TrainingConfig) -> float:
    """Returns the decay of one step; 0 makes the average a copy of the weights."""
    n = num_updates - config.ema_start_step
    if n < 0:
        return 0.0
    match config.ema_warmup:
        case "ramp":
            return min(config.ema_decay, (1 + n) / (10 + n))
        case "power":
            return min(config.ema_decay, 1 - math.pow(1 + n / config.ema_inv_gamma, -config.ema_power))
        case _:
            return config.ema_decay


class EMA:
    """Keeps float32 averages of a network's parameters on their device, one for each law.

    Args:
        model: The network to follow; every average starts at its weights.
        laws: Name -> how the average forgets; see `decay_laws`.
    """

    def __init__(self, model: nn.Module, laws: Mapping[str, DecayLaw]) -> None:
        self.num_updates = 0
        self._laws = dict(laws)
        self._averages = {
            name: [parameter.detach().to(torch.float32, copy=True) for parameter in model.parameters()] for name in laws
        }

    @property
    def names(self) -> list[str]:
        """The names of the averages."""
        return list(self._laws)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the averages towards the network's weights: m <- decay * m + (1 - decay) * w."""
        weights = [parameter.detach() for parameter in model.parameters()]
        for name, law in self._laws.items():
            if (decay := law(self.num_updates)) < 1:
                torch._foreach_lerp_(self._averages[name], weights, 1.0 - decay)
        self.num_updates += 1

    @contextmanager
    def swapped_in(self, model: nn.Module, name: str = MAIN) -> Iterator[None]:
        """Puts an average into the network for a while; the weights come back even after an error."""
        self._swap(model, name)
        try:
            yield
        finally:
            self._swap(model, name)

    @torch.no_grad()
    def _swap(self, model: nn.Module, name: str) -> None:
        """Exchanges averages and weights in place, so that graphs and wrappers keep their storage."""
        for average, parameter in zip(self._averages[name], model.parameters(), strict=True):
            weight = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weight)

    @torch.no_grad()
    def load(self, averaged: nn.Module, num_updates: int, name: str = MAIN) -> None:
        """Takes an average from a network that holds it, as a checkpoint does."""
        for average, parameter in zip(self._averages[name], averaged.parameters(), strict=True):
            average.copy_(parameter)
        self.num_updates = num_updates

    def tensors(self, *names: str) -> list[torch.Tensor]:
        """Returns the averages, all or some, each in the order of the network's parameters."""
        return [tensor for name in names or self._laws for tensor in self._averages[name]]


_NUM_SNAPSHOTS = 40


def is_due(step: int, config: TrainingConfig) -> bool:
    """Says whether the averages are to be stored after `step` optimiser updates."""
    every_steps = config.posthoc_ema_every_steps or max(1, config.num_steps // _NUM_SNAPSHOTS)
    return config.posthoc_ema and (step % every_steps == 0 or step == config.num_steps)
