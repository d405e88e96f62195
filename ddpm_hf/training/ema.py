"""Exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """Keeps float32 averages of a network's parameters on their device.

    Args:
        model: The network to follow; the average starts at its weights.
        decay: Weight of the past in one update.
        warmup: Use min(decay, (1 + n) / (10 + n)) at update n, as TensorFlow does.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool) -> None:
        self.num_updates = 0
        self._decay = decay
        self._warmup = warmup
        self._averages = [parameter.detach().to(torch.float32, copy=True) for parameter in model.parameters()]

    def decay_at(self, num_updates: int) -> float:
        """Returns the decay of the update that follows `num_updates` earlier ones."""
        return min(self._decay, (1 + num_updates) / (10 + num_updates)) if self._warmup else self._decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the averages towards the network's weights: m <- decay * m + (1 - decay) * w."""
        weights = [parameter.detach() for parameter in model.parameters()]
        torch._foreach_lerp_(self._averages, weights, 1.0 - self.decay_at(self.num_updates))
        self.num_updates += 1

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Puts the averages into the network for a while; the weights come back even after an error."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        """Exchanges averages and weights in place, so that graphs and wrappers keep their storage."""
        for average, parameter in zip(self._averages, model.parameters(), strict=True):
            weight = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weight)

    @torch.no_grad()
    def load(self, averaged: nn.Module, num_updates: int) -> None:
        """Takes the averages from a network that holds them, as a checkpoint does."""
        for average, parameter in zip(self._averages, averaged.parameters(), strict=True):
            average.copy_(parameter)
        self.num_updates = num_updates

    def tensors(self) -> list[torch.Tensor]:
        """Returns the averages, in the order of the network's parameters."""
        return self._averages
