"""EMA of the weights, and EMAs with power-function profiles.

Legend: t, the number of weights averaged so far; gamma, the exponent of a profile; sigma_rel, the standard deviation of
a profile relative to t, which measures the length of an EMA. Karras et al. 2024, "Analyzing and Improving the Training
Dynamics of Diffusion Models", section 3 and appendix C. Profiles are computed in float64.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ddpm_hf.config import TrainingConfig
from ddpm_hf.files import EMA_DIR

MAX_SIGMA_REL = 12.0**-0.5
"""sigma_rel of the plain mean of all weights; longer EMAs would weigh the oldest most."""


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of the profile with 0 < sigma_rel < MAX_SIGMA_REL.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic equation with one positive root.
    """
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def power_decay_at(num_updates: int, gamma: float) -> float:
    """Return the decay of the update after `num_updates` earlier ones: beta(t) = (1 - 1/t)^(gamma + 1).

    The first update copies the weights. After t updates the weights of update s count
    (s^(gamma + 1) - (s - 1)^(gamma + 1)) / t^(gamma + 1), exactly the integral of the profile over ]s - 1, s].
    """
    return float((num_updates / (num_updates + 1)) ** (gamma + 1))


def profile_product(
    t: NDArray[np.float64], gamma: NDArray[np.float64], other_t: NDArray[np.float64], other_gamma: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the inner products of profiles p(s) = (gamma + 1) s^gamma / t^(gamma + 1) on [0, t].

    The integral over [0, min(t, other_t)] has a closed form. Arguments broadcast.
    """
    early, late = np.minimum(t, other_t), np.maximum(t, other_t)
    gamma_of_late = np.where(t > other_t, gamma, other_gamma)
    factor = (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1)
    return np.asarray(factor * (early / late) ** gamma_of_late / late)


def combine(
    t: NDArray[np.float64], gamma: NDArray[np.float64], target_t: float, target_gamma: float
) -> tuple[NDArray[np.float64], float]:
    """Find the combination of stored profiles nearest to a target, with coefficients that sum to 1.

    The constraint keeps parameters that never changed as they are; without it all parameters would be scaled.

    Args:
        t: Number of updates when each EMA was stored, (number,).
        gamma: Their exponents, (number,). No two pairs (t, gamma) may be equal.
        target_t: Number of updates of the target.
        target_gamma: Exponent of the target.

    Returns:
        The coefficients, (number,), and the remaining L2 distance relative to the norm of the target profile.
    """
    products = profile_product(t[:, None], gamma[:, None], t[None], gamma[None])
    wanted = profile_product(t, gamma, np.float64(target_t), np.float64(target_gamma))
    # Early profiles are narrow and high: normalizing all to length 1 gives the best condition number.
    length = np.sqrt(np.diag(products))
    sides = np.stack([wanted, np.ones_like(wanted)], axis=1) / length[:, None]
    nearest, shift = (np.linalg.solve(products / np.outer(length, length), sides) / length[:, None]).T
    weights = nearest + (1 - nearest.sum()) / shift.sum() * shift  # the second term by Lagrange's multiplier
    whole = (target_gamma + 1) ** 2 / ((2 * target_gamma + 1) * target_t)
    distance = whole - 2 * wanted @ weights + weights @ products @ weights
    return weights, math.sqrt(max(0.0, float(distance)) / whole)


EMA_NAME = EMA_DIR
"""The EMA that is sampled and saved; also its folder in a checkpoint."""

POSTHOC_SIGMA_RELS = (0.05, 0.10)
"""Lengths of the two EMAs from which others are reconstructed after training, as in Karras et al. 2024."""

DecaySchedule: TypeAlias = Callable[[int], float]
"""Number of earlier updates -> decay of the next one; 1 leaves the EMA unchanged."""


def decay_schedules(config: TrainingConfig) -> dict[str, DecaySchedule]:
    """Return the EMAs of a run by name: EMA_NAME, and with `posthoc_ema` one for each of POSTHOC_SIGMA_RELS."""
    schedules: dict[str, DecaySchedule] = {EMA_NAME: partial(decay_at, config=config)}
    if config.posthoc_ema:
        for sigma_rel in POSTHOC_SIGMA_RELS:
            schedules[posthoc_name(sigma_rel)] = partial(power_decay_at, gamma=gamma_of(sigma_rel))
    return schedules


def posthoc_name(sigma_rel: float) -> str:
    """Return the name in checkpoints of an EMA of POSTHOC_SIGMA_RELS."""
    return f"ema_sigma_{sigma_rel:.3f}"


def decay_at(num_updates: int, config: TrainingConfig) -> float:
    """Return the decay of the update after `num_updates` earlier ones.

    With `ema_every_steps` k every k-th update has the product of k decays, and the updates between have decay 1.
    """
    interval = config.ema_every_steps
    if (num_updates + 1) % interval:
        return 1.0
    return math.prod(_decay_of_step(number, config) for number in range(num_updates + 1 - interval, num_updates + 1))


def _decay_of_step(num_updates: int, config: TrainingConfig) -> float:
    n = num_updates - config.ema_start_step
    if n < 0:
        return 0.0  # the EMA is a copy of the weights
    match config.ema_warmup:
        case "ramp":
            return min(config.ema_decay, (1 + n) / (10 + n))
        case "power":
            return min(config.ema_decay, 1 - math.pow(1 + n / config.ema_inv_gamma, -config.ema_power))
        case _:
            return config.ema_decay


_TABLE_LENGTH = 1024


class EMA:
    """Keep float32 exponential moving averages of a model's parameters on their device, one for each decay schedule.

    Whether an optimizer step was skipped is only known on the device, and the decay depends on the number of steps that
    were not. So the device counts them, and looks the weight of each update up in a table that the host computes every
    1024 updates. A skipped step has weight 0, which leaves an EMA unchanged bit by bit.

    The host reads the count when it computes a table, and with `ema_every_steps` once per interval, because only the
    host can save the cost of the updates between.

    Args:
        model: The model to follow, without a wrapper such as DDP; each EMA starts at its weights.
        decay: The decay of one EMA, with the warmup of training.ema_warmup "ramp"; or name -> decay schedule of several
            EMAs, as `decay_schedules` returns them.
    """

    def __init__(self, model: nn.Module, decay: float | Mapping[str, DecaySchedule] = 0.9999) -> None:
        schedules = decay if isinstance(decay, Mapping) else decay_schedules(TrainingConfig(ema_decay=decay))
        self._schedules = dict(schedules)
        self._parameters: list[torch.Tensor] = list(model.parameters())
        self._averages = {
            name: [parameter.detach().to(torch.float32, copy=True) for parameter in self._parameters]
            for name in schedules
        }
        # Held while the averages change, so that other threads copy one state of them.
        self._lock = threading.Lock()
        self._swapped: str | None = None
        self._position = torch.zeros(1, dtype=torch.int64, device=self._parameters[0].device)
        self._start_at(0)

    def _start_at(self, num_updates: int) -> None:
        """Set the number of updates; the next one computes a table that starts there."""
        self._table: list[list[float]] = []
        self._start = num_updates
        # The row of the next update: on the device, and on the host as if nothing was skipped since it was read.
        self._position.zero_()
        self._latest = 0

    @property
    def names(self) -> list[str]:
        """The names of the EMAs."""
        return list(self._schedules)

    @property
    def num_updates(self) -> int:
        """Updates so far, not counting skipped ones; the host waits for the device."""
        return self._start + (int(self._position) if self._latest else 0)

    @torch.no_grad()
    def update(self, is_skipped: torch.Tensor | None = None) -> None:
        """Update each EMA: m <- decay * m + (1 - decay) * w.

        Args:
            is_skipped: bool (), on the device: whether the optimizer step was skipped. None means that it was not.
        """
        with self._lock:
            self._update(is_skipped)

    def _update(self, is_skipped: torch.Tensor | None) -> None:
        if self._latest == len(self._table):
            self._compute_table()
        weights = self._weights.index_select(0, self._position)[0]
        if is_skipped is None:
            self._position += 1
        else:
            is_applied = ~is_skipped
            weights *= is_applied
            self._position += is_applied
        must_read = False
        for column, averages in enumerate(self._averages.values()):
            if self._table[self._latest][column] > 0:
                _lerp_(averages, self._parameters, weights[column])
                must_read |= self._has_pauses[column]
        self._latest += 1
        if must_read:
            self._latest = int(self._position)

    def _compute_table(self) -> None:
        """Compute the weights of the next updates of each EMA."""
        self._start_at(self.num_updates)
        numbers = range(self._start, self._start + _TABLE_LENGTH)
        self._table = [[1.0 - decay_of(number) for decay_of in self._schedules.values()] for number in numbers]
        self._has_pauses = [0.0 in column for column in zip(*self._table, strict=True)]
        self._weights = torch.tensor(self._table, dtype=torch.float32, device=self._position.device)

    @contextmanager
    def swapped_in(self, name: str = EMA_NAME) -> Iterator[None]:
        """Exchange the weights of the model and an EMA inside the context; both are restored even after an error."""
        self._swap(name)
        try:
            yield
        finally:
            self._swap(name)

    def copy(self, name: str = EMA_NAME) -> list[torch.Tensor]:
        """Return copies of an EMA's tensors in the order of the model's parameters, at any time and in any thread."""
        with self._lock:
            tensors = self._parameters if self._swapped == name else self._averages[name]
            return [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def _swap(self, name: str) -> None:
        # In place, so that DDP and compiled graphs keep their storage.
        with self._lock:
            for average, parameter in zip(self._averages[name], self._parameters, strict=True):
                weight = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(weight)
            self._swapped = None if self._swapped == name else name

    def tensors(self, *names: str) -> list[torch.Tensor]:
        """Return the tensors of some EMAs, or of all, each in the order of the model's parameters."""
        return [tensor for name in names or self._schedules for tensor in self._averages[name]]

    def state_dict(self) -> dict[str, int]:
        """Return the number of updates, named as in trainer_state.json; a checkpoint holds the tensors as networks."""
        return {"num_ema_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the number of updates."""
        self._start_at(state["num_ema_updates"])


def _lerp_(averages: list[torch.Tensor], parameters: list[torch.Tensor], weight: torch.Tensor) -> None:
    """Update averages: m <- m + weight * (w - m), with a weight () on the device."""
    if weight.is_cpu:
        torch._foreach_lerp_(averages, parameters, [weight] * len(averages))
    else:  # with weights of one element, _foreach_lerp_ launches a kernel for each tensor
        differences = torch._foreach_sub(parameters, averages)
        torch._foreach_mul_(differences, weight)
        torch._foreach_add_(averages, differences)


_NUM_SNAPSHOTS = 40


def is_snapshot_due(step: int, config: TrainingConfig) -> bool:
    """Return whether the EMAs of `posthoc_ema` are stored after `step` optimizer updates."""
    every_steps = config.posthoc_ema_every_steps or max(1, config.num_steps // _NUM_SNAPSHOTS)
    return config.posthoc_ema and (step % every_steps == 0 or step == config.num_steps)
