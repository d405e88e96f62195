"""Micro batches of each global batch, a thread that prepares them ahead, timestep samplers, and the micro-batch size.

A micro batch holds images and every random number that the objective needs. All of it is a function of (seed, step,
position in the global batch), however the batch is split over ranks and micro batches; flips and crops are functions of
(seed, epoch, image index), which follow from these. There are two exceptions: loss-aware timesteps also depend on the
losses before them, and a stream gives each process the images that it reads next.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from diffusers import UNet2DModel
from numpy.typing import NDArray

from ddpm_hf import distributed
from ddpm_hf.config import ConfigError, RunConfig, TrainingConfig
from ddpm_hf.data import Augmentation, ImageLoader, ImageStream
from ddpm_hf.data.loader import to_device
from ddpm_hf.data.streaming import StreamPosition
from ddpm_hf.diffusion.schedule import spaced_timesteps
from ddpm_hf.rng import NOISE_BLOCK_SIZE, numpy_generator
from ddpm_hf.training.latents import LatentLoader
from ddpm_hf.training.logging import say
from ddpm_hf.training.loss import DenoisingLoss, assign_noise, draw_noise, draw_perturbation

# Nichol & Dhariwal 2021, section 3.3, and their code.
HISTORY_LENGTH = 10
UNIFORM_PROBABILITY = 0.001


class TimestepDraw(NamedTuple):
    """Timesteps of a global batch.

    Attributes:
        timesteps: int64 (batch,) in [0, T).
        importance: float32 (batch,) importance weights 1 / (T p_t); None for uniform timesteps.
    """

    timesteps: NDArray[np.int64]
    importance: NDArray[np.float32] | None


class TimestepSampler:
    """Base class of timestep samplers.

    Args:
        num_timesteps: Number of timesteps T.
        batch_size: Images of a global batch.
        seed: Seed of the run.

    Attributes:
        learns: Whether the sampler needs `record` after each step.
    """

    learns = False

    def __init__(self, num_timesteps: int, batch_size: int, seed: int) -> None:
        self._num_timesteps, self._batch_size, self._seed = num_timesteps, batch_size, seed

    def draw(self, step: int) -> TimestepDraw:
        """Return the timesteps of optimizer step `step`."""
        raise NotImplementedError

    def record(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Learn from the losses (batch,) of a global batch at its timesteps, on any device."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return a copy of what was learned."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned, from any device."""


class UniformTimesteps(TimestepSampler):
    """Draw every timestep with the same probability."""

    def draw(self, step: int) -> TimestepDraw:
        """Return the timesteps of optimizer step `step`."""
        generator = numpy_generator(self._seed, "timesteps", step)
        return TimestepDraw(generator.integers(0, self._num_timesteps, size=self._batch_size), None)


class AntitheticTimesteps(TimestepSampler):
    """Draw neighbors in the batch as pairs t and T-1-t (code of Song et al. 2021)."""

    def draw(self, step: int) -> TimestepDraw:
        """Return the timesteps of optimizer step `step`."""
        num_pairs = (self._batch_size + 1) // 2
        first = numpy_generator(self._seed, "timesteps", step).integers(0, self._num_timesteps, size=num_pairs)
        pairs = np.stack([first, self._num_timesteps - 1 - first], axis=1)
        return TimestepDraw(pairs.reshape(-1)[: self._batch_size], None)


class LossAwareTimesteps(TimestepSampler):
    """Draw timesteps in proportion to the root mean square of their last losses. Eq. 18, Nichol & Dhariwal 2021.

    Timesteps are uniform until each has `HISTORY_LENGTH` losses. Every rank keeps the same history on the host, so the
    host waits for the losses of a step before it prepares the next one.
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
        """Return the timesteps of optimizer step `step`, given the losses recorded so far."""
        p = self.probabilities
        cumulative = np.cumsum(p)
        uniform = numpy_generator(self._seed, "timesteps", step).random(self._batch_size)
        timesteps = np.searchsorted(cumulative / cumulative[-1], uniform, side="right")
        return TimestepDraw(timesteps, (1 / (self._num_timesteps * p[timesteps])).astype(np.float32))

    def record(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Add the losses of a global batch to the history; non-finite losses are ignored."""
        t, values = timesteps.cpu().numpy(), losses.cpu().double().numpy()
        order = np.argsort(t, kind="stable")
        order = order[np.isfinite(values[order])]
        t, values = t[order], values[order]
        # A timestep that occurs k times fills k slots of its ring buffer, in the order of the batch.
        repetition = np.arange(len(t)) - np.searchsorted(t, t)
        self._losses[t, (self._num_losses[t] + repetition) % HISTORY_LENGTH] = values
        self._num_losses += np.bincount(t, minlength=self._num_timesteps)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return a copy of the history."""
        return {"losses": torch.tensor(self._losses), "num_losses": torch.tensor(self._num_losses)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the history that `state_dict` returned, from any device."""
        if {name: tensor.shape for name, tensor in state.items()} != {
            "losses": self._losses.shape,
            "num_losses": self._num_losses.shape,
        }:
            raise ValueError(f"it must hold the last losses of {self._num_timesteps} timesteps")
        self._losses = state["losses"].cpu().numpy().copy()
        self._num_losses = state["num_losses"].cpu().numpy().copy()


class ListedTimesteps(TimestepSampler):
    """Draw from a list of timesteps, of which another sampler draws the positions.

    Args:
        timesteps: Ascending timesteps.
        positions: A sampler of len(timesteps) timesteps.
    """

    def __init__(self, timesteps: Sequence[int], positions: TimestepSampler) -> None:
        self._timesteps, self._positions = np.array(timesteps, np.int64), positions
        self.learns = positions.learns

    def draw(self, step: int) -> TimestepDraw:
        """Return the timesteps of optimizer step `step`."""
        draw = self._positions.draw(step)
        return draw._replace(timesteps=self._timesteps[draw.timesteps])

    def record(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Learn from the losses (batch,) of a global batch at its timesteps, on any device."""
        self._positions.record(torch.from_numpy(np.searchsorted(self._timesteps, timesteps.cpu().numpy())), losses)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return a copy of what was learned."""
        return self._positions.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned, from any device."""
        self._positions.load_state_dict(state)


def build_timestep_sampler(config: RunConfig) -> TimestepSampler:
    """Return the sampler of objective.timestep_sampling, for a student over its own timesteps."""
    kinds = {"uniform": UniformTimesteps, "antithetic": AntitheticTimesteps, "loss_aware": LossAwareTimesteps}
    kind = kinds[config.objective.timestep_sampling]
    timesteps = trained_timesteps(config)
    sampler = kind(len(timesteps), config.training.train_batch_size, config.training.seed)
    return sampler if config.distillation.teacher is None else ListedTimesteps(timesteps, sampler)


def trained_timesteps(config: RunConfig) -> Sequence[int]:
    """Return the timesteps at which a network is trained, ascending: all, or those in which a student is sampled."""
    num_timesteps = config.diffusion.num_train_timesteps
    if config.distillation.teacher is None:
        return range(num_timesteps)
    return spaced_timesteps("trailing", config.distillation.num_inference_steps, num_timesteps)[::-1]


_NUM_NAMED_IMAGES = 32


@dataclass(frozen=True)
class MicroBatch:
    """The inputs of one forward pass on one rank.

    Args:
        x_0: float32 images in [-1, 1] or latents, (batch, channels, height, width).
        noise: float32 noise of the same shape.
        timesteps: int64 (batch,).
        importance: float32 (batch,), importance weights of the losses; None for uniform timesteps.
        class_labels: int64 (batch,), or None for an unconditional network.
        dropped: bool (batch,), which labels become the null label; None without label dropout.
        use_self_cond: Whether a self-conditioned network sees its own prediction; the same for the whole step.
        is_last: Whether the optimizer update follows.
        augmentation: float32 (batch, parameters), the parameters of the augmentation; None without one.
        perturbation: float32 noise of the shape of the images, which only the input gets; None without it.
    """

    x_0: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    importance: torch.Tensor | None
    class_labels: torch.Tensor | None
    dropped: torch.Tensor | None
    use_self_cond: bool
    is_last: bool
    augmentation: torch.Tensor | None = None
    perturbation: torch.Tensor | None = None


_Loaded: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class BatchSource:
    """Give one rank its micro batches.

    Args:
        config: The configuration of the run.
        loader: The samples of the run, or the stream of this rank.
        rank: Index of this process.
        num_processes: Number of processes; each takes an equal, consecutive part of the global batch.
        micro_batch_size: Images of one forward pass.
        device: Device of the batches.
        timestep_sampler: Draws the timesteps.
        augmentation: The augmentation of the images; None for none.
    """

    def __init__(
        self,
        config: RunConfig,
        loader: ImageLoader | LatentLoader | ImageStream,
        *,
        rank: int,
        num_processes: int,
        micro_batch_size: int,
        device: torch.device,
        timestep_sampler: TimestepSampler,
        augmentation: Augmentation | None = None,
    ) -> None:
        self._config = config
        self.loader = loader
        self._micro_batch_size = micro_batch_size
        self.device = device
        self._timestep_sampler = timestep_sampler
        self._augmentation = augmentation
        per_rank = config.training.train_batch_size // num_processes
        self._positions = range(rank * per_rank, (rank + 1) * per_rank)

    def __len__(self) -> int:
        """Return the number of images of this rank in a step."""
        return len(self._positions)

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Yield the micro batches of this rank in optimizer step `step`, on the device."""
        objective, seed = self._config.objective, self._config.training.seed
        batch_size = self._config.training.train_batch_size
        timesteps, importance = self._timestep_sampler.draw(step)
        dropped = numpy_generator(seed, "class_dropout", step).random(batch_size) < objective.class_dropout
        use_self_cond = numpy_generator(seed, "self_conditioning", step).random() < objective.self_conditioning
        load = functools.partial(self._load, step)
        if objective.immiscible_noise:
            load = functools.partial(self._load_blocks, functools.lru_cache(maxsize=1)(load))
        for start in range(self._positions.start, self._positions.stop, self._micro_batch_size):
            positions = range(start, start + self._micro_batch_size)
            part = slice(positions.start, positions.stop)
            x_0, noise, labels, augmentation = load(positions)
            yield MicroBatch(
                x_0=x_0,
                noise=noise,
                timesteps=to_device(timesteps[part], self.device),
                importance=None if importance is None else to_device(importance[part], self.device),
                class_labels=labels if self._config.model.class_conditional else None,
                dropped=to_device(dropped[part], self.device) if objective.class_dropout > 0 else None,
                use_self_cond=use_self_cond,
                is_last=positions.stop == self._positions.stop,
                augmentation=augmentation,
                perturbation=draw_perturbation(objective, seed, step, positions, x_0.shape[1:], self.device),
            )

    def _load(self, step: int, positions: range) -> _Loaded:
        """Return images, noise, labels and parameters of the augmentation of some positions of the global batch."""
        objective, training = self._config.objective, self._config.training
        first = step * training.train_batch_size
        x_0, labels = self.loader.samples(first + positions.start, first + positions.stop)
        augmentation = None
        if self._augmentation is not None:
            x_0, augmentation = self._augmentation(x_0, first + positions.start)
        noise = draw_noise(objective, training.seed, step, positions, x_0.shape[1:], self.device)
        if objective.immiscible_noise:
            noise = assign_noise(x_0, noise)
        return x_0, noise, labels, augmentation

    def _load_blocks(self, load: Callable[[range], _Loaded], positions: range) -> _Loaded:
        """Return what `load` returns, loading whole noise blocks: noise is assigned among all images of a block.

        `load` remembers the last block, in which the next micro batch may begin.
        """
        batch_size, parts = self._config.training.train_batch_size, []
        for start in range(positions.start // NOISE_BLOCK_SIZE * NOISE_BLOCK_SIZE, positions.stop, NOISE_BLOCK_SIZE):
            block = range(start, min(start + NOISE_BLOCK_SIZE, batch_size))
            part = slice(max(positions.start - start, 0), positions.stop - start)
            parts.append([None if tensor is None else tensor[part] for tensor in load(block)])
        columns = ([tensor for tensor in column if tensor is not None] for column in zip(*parts, strict=True))
        x_0, noise, labels, augmentation = (torch.cat(column) if column else None for column in columns)
        assert x_0 is not None and noise is not None
        return x_0, noise, labels, augmentation

    def describe_images(self, step: int) -> str:
        """Return a sentence that names the images of a step on all ranks; empty for a stream."""
        if isinstance(self.loader, ImageStream):
            return ""
        size = self._config.training.train_batch_size
        numbers = self.loader.numbers(step * size, (step + 1) * size).tolist()
        more = ", ..." if size > _NUM_NAMED_IMAGES else ""
        return f" Its images were {', '.join(map(str, numbers[:_NUM_NAMED_IMAGES]))}{more}."


@dataclass(frozen=True)
class _PreparedStep:
    """The micro batches of one step.

    Args:
        batches: In order.
        position: Position of the stream after these images; None without a stream.
        ready: Recorded on CUDA after the last operation on `batches`.
    """

    batches: list[MicroBatch]
    position: StreamPosition | None
    ready: torch.cuda.Event | None


class Prefetcher:
    """Prepare the micro batches of the next steps in a thread while the device trains.

    A batch is a function of the step, so it does not matter when it is prepared. An error of a step is raised when its
    batches are asked for. On CUDA the thread works on a stream of its own, and never more than `num_steps_ahead` + 1
    steps ahead of the device. Use it as a context manager, which ends the thread.

    Args:
        source: Prepares the batches.
        num_steps_ahead: The result of `resolve_prefetch_factor`; 0 starts no thread.
        end_step: The step after the last one that is prepared.
    """

    def __init__(self, source: BatchSource, num_steps_ahead: int, end_step: int) -> None:
        self._source, self._num_steps_ahead, self._end_step = source, num_steps_ahead, end_step
        self._pool: ThreadPoolExecutor | None = None
        self._prepared: deque[Future[_PreparedStep]] = deque()
        self._stream: torch.cuda.Stream | None = None

    def __enter__(self) -> "Prefetcher":
        if self._num_steps_ahead:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
            if self._source.device.type == "cuda":
                self._stream = torch.cuda.Stream(self._source.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            self._prepared.clear()

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Yield the micro batches of an optimizer step; every call asks for the step after that of the call before."""
        if self._pool is None:
            yield from self._source.micro_batches(step)
            return
        done = None
        if self._stream is not None:
            # The step before; a blocking event, so that the thread sleeps while it waits.
            done = torch.cuda.Event(blocking=True)
            done.record(torch.cuda.current_stream(self._source.device))
        stop = min(step + self._num_steps_ahead + 1, self._end_step)
        for coming in range(step + len(self._prepared), stop):
            self._prepared.append(self._pool.submit(self._prepare, coming, done))
        prepared = self._prepared.popleft().result()
        if prepared.ready is not None:
            _hand_over(prepared.batches, prepared.ready, self._source.device)
        if isinstance(stream := self._source.loader, ImageStream):
            stream.trained_position = prepared.position
        while prepared.batches:  # a micro batch is freed when the next one is asked for
            yield prepared.batches.pop(0)

    def _prepare(self, step: int, done: torch.cuda.Event | None) -> _PreparedStep:
        """Prepare a step, in the thread."""
        if done is not None:
            done.synchronize()  # the host may be many steps ahead of the device, and each step needs memory
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            batches = list(self._source.micro_batches(step))
            ready = None if self._stream is None else self._stream.record_event()
        stream = self._source.loader
        return _PreparedStep(batches, stream.position if isinstance(stream, ImageStream) else None, ready)


def _hand_over(batches: list[MicroBatch], ready: torch.cuda.Event, device: torch.device) -> None:
    """Let the current stream of a CUDA device use batches that another stream has prepared, without synchronizing."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(ready)
    for batch in batches:
        for name in fields(batch):
            if isinstance(tensor := getattr(batch, name.name), torch.Tensor):
                tensor.record_stream(stream)  # its memory is not reused while this stream reads it


def resolve_prefetch_factor(config: RunConfig, device: torch.device) -> int:
    """Return the steps to prepare ahead: training.prefetch_factor, or for null 2 on CUDA and 0 elsewhere.

    It is 0 for loss-aware timesteps, which depend on the losses of the step before.
    """
    if config.objective.timestep_sampling == "loss_aware":
        return 0
    factor = config.training.prefetch_factor
    return factor if factor is not None else 2 if device.type == "cuda" else 0


def largest_micro_batch_size(config: TrainingConfig, num_processes: int) -> int:
    """Return training.micro_batch_size, or the per-rank batch if it is null or "auto".

    Raises:
        ConfigError: The global batch cannot be divided among the processes.
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


def resolve_micro_batch_size(
    config: TrainingConfig, largest: int, stored: int | None, probe: Callable[[int], None] | None
) -> int:
    """Collective: return the images of one forward pass, and print the value of "auto".

    Args:
        config: The configuration of the run.
        largest: The result of `largest_micro_batch_size`.
        stored: The value of "auto" when the run began; used again as long as it divides the per-rank batch.
        probe: Use the memory that a micro batch of some size needs, or raise torch.OutOfMemoryError; None if memory
            cannot be probed.

    Returns:
        The size, the same on all ranks.

    Raises:
        ConfigError: Not even one image fits on one of the ranks.
    """
    if config.micro_batch_size != "auto":
        return largest
    if stored is not None and largest % stored == 0:
        size, reason = stored, "as when the run began"
    elif probe is None:
        size, reason = largest, "the whole per-rank batch, since only the memory of a CUDA GPU can be probed"
    else:
        fitting = distributed.on_every_rank(lambda: largest_that_fits(largest, probe))
        size, reason = int(distributed.reduce(fitting, "min")), f"the largest part of {largest} that fits into memory"
    distributed.on_rank_0(lambda: say(f"training.micro_batch_size auto: {size} images, {reason}."))
    return size


def largest_that_fits(batch_size: int, probe: Callable[[int], None]) -> int:
    """Halve a per-rank batch until it fits into memory; every size that is tried divides it.

    Raises:
        ConfigError: Not even one image fits.
    """
    size = batch_size
    while True:
        try:
            probe(size)
            return size
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        if size == 1:
            raise ConfigError(
                f"training.micro_batch_size auto: not even one image fits ({reason}); use a smaller network or a "
                "smaller data.resolution."
            )
        size = max(divisor for divisor in range(1, size // 2 + 1) if batch_size % divisor == 0)


def make_memory_probe(
    unet: UNet2DModel,
    loss: DenoisingLoss,
    image_shape: tuple[int, int, int],
    autocast: Callable[[], AbstractContextManager[Any]],
    num_prefetched: int = 0,
) -> Callable[[int], None]:
    """Return a probe that uses the memory of a training step: activations, gradients and the two moments of AdamW.

    Call the probe before the network is wrapped in DDP, whose buckets later take the place of the gradients.

    Args:
        unet: The network, on its device.
        loss: The objective of the run.
        image_shape: (channels, height, width).
        autocast: Return the autocast context of the run.
        num_prefetched: Images that are prepared ahead, with their noise.
    """

    def probe(size: int) -> None:
        if unet.device.type == "cuda":
            torch.cuda.empty_cache()
        labels = None if unet.class_embedding is None else torch.zeros(size, dtype=torch.int64, device=unet.device)
        x_0 = torch.zeros(size, *image_shape, device=unet.device)
        timesteps = torch.zeros(size, dtype=torch.int64, device=unet.device)
        kept = [torch.empty_like(parameter) for parameter in unet.parameters() for _ in range(2)]
        kept.append(torch.empty(2, num_prefetched, *image_shape, device=unet.device))
        try:
            with autocast():
                losses = loss(unet, x_0, torch.zeros_like(x_0), timesteps, labels)
            losses.mean().backward()
        finally:
            unet.zero_grad(set_to_none=True)
            del kept

    return probe
