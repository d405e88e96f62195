"""Exponential moving averages of the weights."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import torch
from torch import nn

from ddpm_hf.config import TrainingConfig
from ddpm_hf.training import power_function

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
            laws[posthoc_name(length)] = partial(power_function.decay_at, gamma=power_function.gamma_of(length))
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
