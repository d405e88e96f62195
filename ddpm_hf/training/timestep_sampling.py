"""Which timesteps a step trains at: uniform, in antithetic pairs, or where the loss is large.

The first two are functions of (seed, step, position in the global batch). The third is a function of the losses before
it as well; every rank keeps the same history of them, on the host, because what is drawn next depends on it: so the
host waits for the losses of a step, a copy of `train_batch_size` numbers, before it prepares the next one.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_hf.config import RunConfig
from ddpm_hf.rng import numpy_generator

# Nichol & Dhariwal 2021, section 3.3, and their code.
HISTORY_LENGTH = 10
UNIFORM_PROBABILITY = 0.001


class TimestepDraw(NamedTuple):
    """Timesteps of a global batch.

    Attributes:
        timesteps: int64 (batch,) in [0, T).
        importance: float32 (batch,) factors that make the mean loss that of uniform timesteps; None if all are 1.
    """

    timesteps: NDArray[np.int64]
    importance: NDArray[np.float32] | None


class TimestepSampler:
    """What draws the timesteps of a step, and may learn from its losses.

    Args:
        num_timesteps: Length T of the chain.
        batch_size: Images of a global batch.
        seed: Seed of the run.
    """

    learns = False

    def __init__(self, num_timesteps: int, batch_size: int, seed: int) -> None:
        self._num_timesteps, self._batch_size, self._seed = num_timesteps, batch_size, seed

    def draw(self, step: int) -> TimestepDraw:
        """Returns the timesteps of optimiser step `step`."""
        raise NotImplementedError

    def record(self, losses: torch.Tensor) -> None:
        """Learns from a global batch, if it `learns`: (batch, 2), timestep and loss of each sample, on any device."""

    def state(self) -> dict[str, torch.Tensor]:
        """Returns a copy of what was learned, for a checkpoint."""
        return {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes up what `state` returned, from any device."""


class UniformTimesteps(TimestepSampler):
    """Every timestep with the same probability."""

    def draw(self, step: int) -> TimestepDraw:
        """Returns the timesteps of optimiser step `step`."""
        generator = numpy_generator(self._seed, "timesteps", step)
        return TimestepDraw(generator.integers(0, self._num_timesteps, size=self._batch_size), None)


class AntitheticTimesteps(TimestepSampler):
    """Neighbours in the batch have t and T-1-t (code of Song et al. 2021); the last of an odd number has no partner."""

    def draw(self, step: int) -> TimestepDraw:
        """Returns the timesteps of optimiser step `step`."""
        num_pairs = (self._batch_size + 1) // 2
        first = numpy_generator(self._seed, "timesteps", step).integers(0, self._num_timesteps, size=num_pairs)
        pairs = np.stack([first, self._num_timesteps - 1 - first], axis=1)
        return TimestepDraw(pairs.reshape(-1)[: self._batch_size], None)


class LossAwareTimesteps(TimestepSampler):
    """Timesteps in proportion to the root mean square of their last losses. Eq. 18, Nichol & Dhariwal 2021.

    Uniform until every timestep has `HISTORY_LENGTH` losses.
    """

    learns = True

    def __init__(self, num_timesteps: int, batch_size: int, seed: int) -> None:
        super().__init__(num_timesteps, batch_size, seed)
        self._losses = np.zeros((num_timesteps, HISTORY_LENGTH))
        self._num_losses = np.zeros(num_timesteps, dtype=np.int64)

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """Probability of each timestep, float64 (T,)."""
        uniform = np.full(self._num_timesteps, 1 / self._num_timesteps)
        root_mean_square: NDArray[np.float64] = np.sqrt(np.mean(self._losses**2, axis=1))
        total = root_mean_square.sum()
        if self._num_losses.min() < HISTORY_LENGTH or total == 0:
            return uniform
        probabilities: NDArray[np.float64] = (1 - UNIFORM_PROBABILITY) * root_mean_square / total
        return probabilities + UNIFORM_PROBABILITY * uniform

    def draw(self, step: int) -> TimestepDraw:
        """Returns the timesteps of optimiser step `step` after the losses that were recorded so far."""
        p = self.probabilities
        ticks = np.cumsum(p)
        chance = numpy_generator(self._seed, "timesteps", step).random(self._batch_size)
        timesteps = np.searchsorted(ticks / ticks[-1], chance, side="right")
        return TimestepDraw(timesteps, (1 / (self._num_timesteps * p[timesteps])).astype(np.float32))

    def record(self, losses: torch.Tensor) -> None:
        """Puts a global batch into the history but for losses that are not finite: (batch, 2), timestep and loss."""
        rows = losses.cpu().double().numpy()
        rows = rows[np.isfinite(rows[:, 1])]
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        t, values = rows[:, 0].astype(np.int64), rows[:, 1]
        # A timestep that comes up several times fills as many slots; beyond a full round the later ones stay.
        repetition = np.arange(len(t)) - np.searchsorted(t, t)
        self._losses[t, (self._num_losses[t] + repetition) % HISTORY_LENGTH] = values
        self._num_losses += np.bincount(t, minlength=self._num_timesteps)

    def state(self) -> dict[str, torch.Tensor]:
        """Returns a copy of the history, for a checkpoint."""
        return {"losses": torch.tensor(self._losses), "num_losses": torch.tensor(self._num_losses)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes up the history that `state` returned, from any device."""
        if {name: tensor.shape for name, tensor in state.items()} != {
            "losses": self._losses.shape,
            "num_losses": self._num_losses.shape,
        }:
            raise ValueError(f"it must hold the last losses of {self._num_timesteps} timesteps")
        self._losses = state["losses"].cpu().numpy().copy()
        self._num_losses = state["num_losses"].cpu().numpy().copy()


def build_timestep_sampler(config: RunConfig) -> TimestepSampler:
    """Returns the sampler that `objective.timestep_sampling` names, at the start of a run."""
    kinds = {"uniform": UniformTimesteps, "antithetic": AntitheticTimesteps, "loss_aware": LossAwareTimesteps}
    kind = kinds[config.objective.timestep_sampling]
    return kind(config.diffusion.num_train_timesteps, config.training.train_batch_size, config.training.seed)
