"""Micro batches of each global batch, timestep samplers and the micro-batch size.

Which timesteps a step trains at: uniform, in antithetic pairs, or where the loss is large.

The first two are functions of (seed, step, position in the global batch). The third is a function of the losses before
it as well; every rank keeps the same history of them, on the host, because what is drawn next depends on it: so the
host waits for the losses of a step, a copy of `train_batch_size` numbers, before it prepares the next one.

This rank's part of each global batch: images, and every random number that the objective needs.

All of it is a function of (seed, step, position in the global batch), however the batch is split over ranks and micro
batches; timesteps that follow the losses are a function of those too. What becomes of an image, flip and crop, is drawn
for (seed, epoch, index), which follow from those. A stream is the exception: it gives each process the images it has
next, so which these are depends on the number of processes.

How many images one forward on one device takes: as told, or as many as fit.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from diffusers import UNet2DModel
from numpy.typing import NDArray

from ddpm_hf import distributed
from ddpm_hf.config import ConfigError, RunConfig, TrainingConfig
from ddpm_hf.data import ImageLoader, ImageStream
from ddpm_hf.data.loader import to_device
from ddpm_hf.rng import numpy_generator
from ddpm_hf.training.logging import say
from ddpm_hf.training.loss import DenoisingLoss, draw_noise, exchange_noise, whole_blocks

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


_NUM_NAMED_IMAGES = 32


@dataclass(frozen=True)
class MicroBatch:
    """What one forward of one rank needs.

    Args:
        x_0: float32 images in [-1, 1], (batch, channels, height, width).
        noise: float32 noise of the same shape.
        timesteps: int64 (batch,).
        importance: float32 (batch,), factors on the losses where timesteps are not uniform; None where they are.
        class_labels: int64 (batch,), or None for an unconditional network.
        dropped: bool (batch,), whose label becomes the null label; None without label dropout.
        feeds_back: Whether a self-conditioned network sees its own prediction; the same for the whole step.
        is_last: Whether the optimiser update follows.
    """

    x_0: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    importance: torch.Tensor | None
    class_labels: torch.Tensor | None
    dropped: torch.Tensor | None
    feeds_back: bool
    is_last: bool

    @property
    def loss_arguments(self) -> tuple[Any, ...]:
        """What the loss takes after the network."""
        return self.x_0, self.noise, self.timesteps, self.class_labels, self.dropped, self.feeds_back


class BatchSource:
    """Gives one rank its micro batches, in an order that is a closed form of the step.

    Args:
        config: The configuration of the run.
        feed: The samples of the run, or this rank's stream of images.
        rank: Which process this is.
        num_processes: How many there are; they share the global batch in equal, consecutive parts.
        micro_batch_size: Images of one forward.
        device: Where the batches are needed.
        timestep_sampler: What draws the timesteps.
    """

    def __init__(
        self,
        config: RunConfig,
        feed: ImageLoader | ImageStream,
        *,
        rank: int,
        num_processes: int,
        micro_batch_size: int,
        device: torch.device,
        timestep_sampler: TimestepSampler,
    ) -> None:
        self._config = config
        self._feed = feed
        self._micro_batch_size = micro_batch_size
        self._device = device
        self._timestep_sampler = timestep_sampler
        share = config.training.train_batch_size // num_processes
        self._positions = range(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        """Returns the number of images of this rank in a step."""
        return len(self._positions)

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Yields this rank's micro batches of optimiser step `step`, on the device."""
        config, seed, size = self._config, self._config.training.seed, self._config.training.train_batch_size
        objective, first = config.objective, step * size
        timesteps, importance = self._timestep_sampler.draw(step)
        dropped = numpy_generator(seed, "class_dropout", step).random(size) < objective.class_dropout
        feeds_back = numpy_generator(seed, "self_conditioning", step).random() < objective.self_conditioning
        for start in range(self._positions.start, self._positions.stop, self._micro_batch_size):
            positions = range(start, start + self._micro_batch_size)
            part = slice(positions.start, positions.stop)
            # Noise is exchanged among the images of a block, so all of them are needed, also where the batch cuts it.
            drawn = whole_blocks(positions, size) if objective.immiscible_noise else positions
            x_0, labels = self._feed.samples(first + drawn.start, first + drawn.stop)
            noise = draw_noise(objective, seed, step, drawn, x_0.shape[1:], self._device)
            if objective.immiscible_noise:
                noise = exchange_noise(x_0, noise)
            mine = slice(positions.start - drawn.start, positions.stop - drawn.start)
            yield MicroBatch(
                x_0=x_0[mine],
                noise=noise[mine],
                timesteps=to_device(timesteps[part], self._device),
                importance=None if importance is None else to_device(importance[part], self._device),
                class_labels=labels[mine] if config.model.class_conditional and labels is not None else None,
                dropped=to_device(dropped[part], self._device) if objective.class_dropout > 0 else None,
                feeds_back=feeds_back,
                is_last=positions.stop == self._positions.stop,
            )

    def images_of(self, step: int) -> str:
        """Returns a sentence that names the images of a step, of all ranks; nothing where they have no numbers."""
        if not isinstance(self._feed, ImageLoader):
            return ""
        size = self._config.training.train_batch_size
        numbers = self._feed.numbers(step * size, (step + 1) * size).tolist()
        more = ", ..." if size > _NUM_NAMED_IMAGES else ""
        return f" Its images were {', '.join(map(str, numbers[:_NUM_NAMED_IMAGES]))}{more}."


AutocastContext: TypeAlias = AbstractContextManager[Any]


def largest_micro_batch_size(config: TrainingConfig, num_processes: int) -> int:
    """Returns the images of one forward on one device; for "auto" the share of a process, which may prove too large.

    Raises:
        ConfigError: If the global batch cannot be divided among the processes.
    """
    micro = config.micro_batch_size if isinstance(config.micro_batch_size, int) else None
    unit = num_processes * (micro or 1)
    if config.train_batch_size % unit:
        lower = config.train_batch_size // unit * unit
        product = f"{num_processes} processes" + (f" x micro_batch_size {micro}" if micro else "")
        raise ConfigError(
            f"training.train_batch_size {config.train_batch_size} is not a multiple of {product}; use "
            f"{f'{lower} or ' if lower else ''}{lower + unit}."
        )
    return micro or config.train_batch_size // num_processes


def largest_that_fits(share: int, attempt: Callable[[int], None]) -> int:
    """Halves the share of a process until it fits into the memory.

    Args:
        share: Images of a process in a step; every size that is tried divides it.
        attempt: Uses the memory that a micro batch of some size needs, or raises torch.OutOfMemoryError.

    Raises:
        ConfigError: If not even one image fits.
    """
    size = share
    while True:
        try:
            attempt(size)
            return size
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        if size == 1:
            raise ConfigError(
                f"training.micro_batch_size auto: not even one image fits ({reason}); use a smaller network or a "
                "smaller data.resolution."
            )
        size = max(divisor for divisor in range(1, size // 2 + 1) if share % divisor == 0)


def settle(config: TrainingConfig, share: int, stored: int | None, attempt: Callable[[int], None] | None) -> int:
    """Collective: decides how many images one forward takes in this run, and says so if that was left open.

    Args:
        config: The configuration of the run.
        share: What `largest_micro_batch_size` returned.
        stored: What "auto" stood for when the run began; it stays so where it still divides the share.
        attempt: As in `largest_that_fits`; None where memory cannot be probed.

    Returns:
        The size, which is the same on all ranks.

    Raises:
        ConfigError: On every rank, if not even one image fits on one of them.
    """
    if config.micro_batch_size != "auto":
        return share
    if stored is not None and share % stored == 0:
        size, reason = stored, "as when the run began"
    elif attempt is None:
        size, reason = share, "the whole share, since only the memory of a CUDA GPU can be probed"
    else:
        fitting = distributed.on_every_rank(lambda: largest_that_fits(share, attempt))
        size, reason = int(distributed.reduce(fitting, "min")), f"of {share}: that fits"
    distributed.on_rank_0(lambda: say(f"training.micro_batch_size auto: {size} images, {reason}."))
    return size


def step_on_gpu(
    unet: UNet2DModel, loss: DenoisingLoss, image_shape: tuple[int, int, int], autocast: Callable[[], AutocastContext]
) -> Callable[[int], None] | None:
    """Returns the attempt of a network on a CUDA GPU; None elsewhere, where running out of memory is no exception."""
    return forward_and_backward(unet, loss, image_shape, autocast) if unet.device.type == "cuda" else None


def forward_and_backward(
    unet: UNet2DModel, loss: DenoisingLoss, image_shape: tuple[int, int, int], autocast: Callable[[], AutocastContext]
) -> Callable[[int], None]:
    """Returns an attempt that holds what a step does: activations, gradients and the two moments of AdamW.

    It leaves no gradient behind. Call it before the network is wrapped for several processes, whose buckets then take
    the place of the gradients.

    Args:
        unet: The network, on its device.
        loss: The objective of the run.
        image_shape: Channels, height and width.
        autocast: Makes the context of the run's precision.
    """

    def attempt(size: int) -> None:
        if unet.device.type == "cuda":
            torch.cuda.empty_cache()  # what a larger attempt left
        labels = None if unet.class_embedding is None else torch.zeros(size, dtype=torch.int64, device=unet.device)
        x_0 = torch.zeros(size, *image_shape, device=unet.device)
        timesteps = torch.zeros(size, dtype=torch.int64, device=unet.device)
        moments = [torch.empty_like(parameter) for parameter in unet.parameters() for _ in range(2)]
        try:
            with autocast():
                losses = loss(unet, x_0, torch.zeros_like(x_0), timesteps, labels)
            losses.mean().backward()
        finally:
            unet.zero_grad(set_to_none=True)
            del moments

    return attempt
