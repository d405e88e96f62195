"""A step does not depend on how its batch is split; timestep samplers keep the expected loss; the micro-batch size."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf.config import (
    ConfigError,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TrainingConfig,
)
from ddpm_hf.data import ImageLoader, ImageSet, SampleOrder, normalize
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.rng import normal_by_position
from ddpm_hf.training import batches as batches_module
from ddpm_hf.training.batches import (
    HISTORY_LENGTH,
    AntitheticTimesteps,
    BatchSource,
    LossAwareTimesteps,
    MicroBatch,
    Prefetcher,
    TimestepSampler,
    UniformTimesteps,
    build_timestep_sampler,
    largest_micro_batch_size,
    largest_that_fits,
    make_memory_probe,
    resolve_micro_batch_size,
    resolve_prefetch_factor,
)
from ddpm_hf.training.loss import DenoisingLoss
from tests.conftest import tiny_unet

NUM_IMAGES = 100


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """Distinct images that differ from their mirror images."""
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 1, 4, 4), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(NUM_IMAGES)
    return ImageSet(pixels, np.arange(NUM_IMAGES) % 10, tuple("0123456789"), np.arange(NUM_IMAGES))


def config_of(batch: int = 48, **changes: Any) -> RunConfig:
    config = RunConfig(
        data=DataConfig(source="x", random_flip=True),
        model=ModelConfig(class_conditional=True),
        objective=ObjectiveConfig(class_dropout=0.25),
        training=TrainingConfig(train_batch_size=batch, seed=5),
    )
    return dataclasses.replace(config, **changes)


def source_of(
    images: ImageSet,
    config: RunConfig,
    rank: int = 0,
    num_processes: int = 1,
    micro_batch_size: int | None = None,
    timestep_sampler: TimestepSampler | None = None,
) -> BatchSource:
    """Return the batches of one process; by default one micro batch per step."""
    return BatchSource(
        config,
        ImageLoader(images, config.data, config.training.seed, torch.device("cpu")),
        rank=rank,
        num_processes=num_processes,
        micro_batch_size=micro_batch_size or config.training.train_batch_size // num_processes,
        device=torch.device("cpu"),
        timestep_sampler=timestep_sampler or build_timestep_sampler(config),
    )


def step_of(
    images: ImageSet, config: RunConfig, step: int, num_processes: int = 1, micro_batch_size: int | None = None
) -> list[list[MicroBatch]]:
    """Return the micro batches of every process."""
    sources = [source_of(images, config, rank, num_processes, micro_batch_size) for rank in range(num_processes)]
    assert {len(source) for source in sources} == {config.training.train_batch_size // num_processes}
    return [list(source.micro_batches(step)) for source in sources]


def joined(parts: list[list[MicroBatch]]) -> dict[str, torch.Tensor]:
    """Concatenate a global batch."""
    batches = [batch for part in parts for batch in part]
    names = ["x_0", "noise", "timesteps", "class_labels", "dropped"]
    names += ["perturbation"] * (batches[0].perturbation is not None)
    return {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}


LOSS_AWARE = ObjectiveConfig(timestep_sampling="loss_aware")
EVERYTHING = ObjectiveConfig(
    class_dropout=0.25,
    timestep_sampling="antithetic",
    self_conditioning=0.5,
    offset_noise=0.1,
    input_perturbation=0.1,
    immiscible_noise=True,
)


@pytest.mark.parametrize("objective", [config_of().objective, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("batch", [48, 96])
@pytest.mark.parametrize(("num_processes", "micro_batch_size"), [(1, 24), (1, 1), (3, 4), (4, 12), (48, None)])
def test_every_split_of_the_batch_is_the_same_batch(
    images: ImageSet, batch: int, num_processes: int, micro_batch_size: int | None, objective: ObjectiveConfig
) -> None:
    """Bit for bit: images, noise, timesteps, labels, flips and drops. Step 2 straddles two epochs."""
    config = config_of(batch, objective=objective)
    for step in (0, 2, 1000):
        whole = joined(step_of(images, config, step))
        split = joined(step_of(images, config, step, num_processes, micro_batch_size))
        assert {name for name in whole if not torch.equal(whole[name], split[name])} == set()


@pytest.mark.parametrize("micro_batch_size", [1, 4, 12, 48])
def test_immiscible_noise_loads_each_image_once_per_step(images: ImageSet, micro_batch_size: int) -> None:
    """Noise is assigned among all images of a block of 32; a rank loads the blocks that its positions touch."""
    loaded: list[int] = []

    class CountingLoader(ImageLoader):
        def samples(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
            loaded.extend(range(start, stop))
            return super().samples(start, stop)

    config = config_of(96, objective=EVERYTHING)
    source = BatchSource(
        config,
        CountingLoader(images, config.data, 5, torch.device("cpu")),
        rank=0,
        num_processes=2,
        micro_batch_size=micro_batch_size,
        device=torch.device("cpu"),
        timestep_sampler=build_timestep_sampler(config),
    )
    assert len(list(source.micro_batches(1))) == 48 // micro_batch_size
    assert loaded == list(range(96, 96 + 64))


def test_a_batch_has_the_documented_content(images: ImageSet) -> None:
    config = config_of()
    step, size = 3, config.training.train_batch_size
    batch = joined(step_of(images, config, step))
    rows = SampleOrder(NUM_IMAGES, seed=5).positions(step * size, (step + 1) * size)
    plain = normalize(torch.from_numpy(images.images[rows]))
    as_it_is = (batch["x_0"] == plain).flatten(1).all(dim=1)
    as_mirror_image = (batch["x_0"] == plain.flip(-1)).flatten(1).all(dim=1)
    assert (as_it_is ^ as_mirror_image).all()
    assert 0 < int(as_it_is.sum()) < size
    assert torch.equal(batch["class_labels"], torch.from_numpy(rows % 10))
    assert torch.equal(batch["noise"], normal_by_position(5, "noise", step, range(size), (1, 4, 4), "cpu"))
    assert batch["timesteps"].dtype == torch.int64
    assert batch["dropped"].dtype == torch.bool


def test_a_step_is_the_same_in_any_order(images: ImageSet) -> None:
    source = source_of(images, config_of())
    first = joined([list(source.micro_batches(7))])
    for step in (0, 500, 2):
        list(source.micro_batches(step))
    again = joined([list(source.micro_batches(7))])
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_other_steps_and_seeds_have_other_content(images: ImageSet) -> None:
    base = joined(step_of(images, config_of(), 0))
    reseeded = dataclasses.replace(config_of().training, seed=6)
    for other in (
        joined(step_of(images, config_of(), 1)),
        joined(step_of(images, config_of(training=reseeded), 0)),
    ):
        assert all(not torch.equal(base[name], other[name]) for name in base)


def test_timesteps_flips_and_drops_have_their_probabilities(images: ImageSet) -> None:
    """48,000 draws: five standard deviations are 0.0114 for a half, 0.0099 for a quarter, 6.6 for the mean timestep."""
    config = config_of(4800)
    batches = [joined(step_of(images, config, step)) for step in range(10)]
    timesteps = torch.cat([batch["timesteps"] for batch in batches])
    dropped = torch.cat([batch["dropped"] for batch in batches])
    assert (int(timesteps.min()), int(timesteps.max())) == (0, 999)
    assert abs(float(timesteps.double().mean()) - 499.5) < 6.6
    assert len(timesteps.unique()) == 1000
    assert abs(float(dropped.double().mean()) - 0.25) < 0.0099
    size, mirrored = config.training.train_batch_size, 0
    for step, batch in enumerate(batches):
        rows = SampleOrder(NUM_IMAGES, seed=5).positions(step * size, (step + 1) * size)
        plain = normalize(torch.from_numpy(images.images[rows]))
        mirrored += int((batch["x_0"] != plain).flatten(1).any(dim=1).sum())
    assert abs(mirrored / 48_000 - 0.5) < 0.0114


def test_every_image_is_seen_once_an_epoch(images: ImageSet) -> None:
    config = config_of(24, data=DataConfig(source="x"))
    first_pixels = torch.cat([joined(step_of(images, config, step, 2, 4))["x_0"][:, 0, 0, 0] for step in range(25)])
    seen = ((first_pixels + 1) * 127.5).round().int().reshape(6, NUM_IMAGES)
    assert (seen.sort(dim=1).values == torch.arange(NUM_IMAGES)).all()


def test_images_on_the_device_make_the_same_batches(images: ImageSet) -> None:
    """Bit for bit, where a batch straddles two epochs."""
    base = config_of()
    resident = config_of(data=dataclasses.replace(base.data, device_resident=True))
    batches = [joined(step_of(images, config, 2, 2, 8)) for config in (base, resident)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_flips_do_not_depend_on_the_batch_size(images: ImageSet) -> None:
    """They belong to image and epoch: 12 steps of 16 are 4 steps of 48."""
    shown = [
        torch.cat([joined(step_of(images, config_of(batch), step))["x_0"] for step in range(192 // batch)])
        for batch in (16, 48)
    ]
    assert torch.equal(*shown)


@pytest.mark.parametrize("micro_batch_size", [12, 24, 48])
def test_only_the_last_micro_batch_updates(images: ImageSet, micro_batch_size: int) -> None:
    for part in step_of(images, config_of(96), 0, 2, micro_batch_size):
        assert [batch.is_last for batch in part] == [False] * (len(part) - 1) + [True]
        assert {len(batch.x_0) for batch in part} == {micro_batch_size}


def test_an_unconditional_run_has_no_labels_drops_or_flips(images: ImageSet) -> None:
    config = config_of(data=DataConfig(source="x"), model=ModelConfig(), objective=ObjectiveConfig())
    ((batch,),) = step_of(images, config, 0)
    assert batch.class_labels is None
    assert batch.dropped is None
    rows = SampleOrder(NUM_IMAGES, seed=5).positions(0, 48)
    assert torch.equal(batch.x_0, normalize(torch.from_numpy(images.images[rows])))


def test_timesteps_stay_below_num_train_timesteps(images: ImageSet) -> None:
    config = config_of(480, diffusion=DiffusionConfig(num_train_timesteps=3))
    assert set(joined(step_of(images, config, 0))["timesteps"].tolist()) == {0, 1, 2}


def test_self_conditioning_is_decided_once_per_step_for_all_processes(images: ImageSet) -> None:
    """400 tosses: five standard deviations are 0.11 for a chance of 0.3."""
    config = config_of(8, objective=ObjectiveConfig(self_conditioning=0.3))
    tosses = []
    for step in range(400):
        (toss,) = {batch.use_self_cond for part in step_of(images, config, step, 2, 2) for batch in part}
        tosses.append(toss)
    assert abs(sum(tosses) / 400 - 0.3) < 0.11
    never, always = (config_of(8, objective=ObjectiveConfig(self_conditioning=chance)) for chance in (0.0, 1.0))
    assert not any(step_of(images, never, step)[0][0].use_self_cond for step in range(20))
    assert all(step_of(images, always, step)[0][0].use_self_cond for step in range(20))


def test_importance_comes_with_the_timesteps_it_belongs_to(images: ImageSet) -> None:
    config = config_of(48, diffusion=DiffusionConfig(num_train_timesteps=4), objective=LOSS_AWARE)
    sampler = build_timestep_sampler(config)
    timesteps = torch.arange(400) % 4
    sampler.record(timesteps, 1.0 + timesteps)
    source = source_of(images, config, 1, 2, 4, sampler)
    probabilities = (torch.tensor([1.0, 2, 3, 4]) / 10 * 0.999 + 0.001 / 4).float()
    batches = list(source.micro_batches(3))
    assert len(batches) == 6
    for batch in batches:
        assert batch.importance is not None
        torch.testing.assert_close(batch.importance, 1 / (4 * probabilities[batch.timesteps]))
    assert len(torch.cat([batch.timesteps for batch in batches]).unique()) == 4
    ((plain,),) = step_of(images, config_of(), 0)
    assert plain.importance is None


# ------------------------------------------------------------------------------------------------------------- prefetch


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("objective", [config_of().objective, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize(("num_steps_ahead", "micro_batch_size"), [(0, 12), (1, 48), (2, 12), (9, 4)])
def test_prefetched_batches_are_the_same_bit_for_bit_and_global_generators_are_not_used(
    images: ImageSet, objective: ObjectiveConfig, num_steps_ahead: int, micro_batch_size: int
) -> None:
    """Steps 2 and 4 straddle two epochs."""
    config = config_of(objective=objective)
    expected = [list(source_of(images, config, 0, 1, micro_batch_size).micro_batches(step)) for step in range(6)]
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with Prefetcher(source_of(images, config, 0, 1, micro_batch_size), num_steps_ahead, 6) as prefetcher:
        assert prefetch_threads() == []
        found = [list(prefetcher.micro_batches(step)) for step in range(6)]
        assert len(prefetch_threads()) == (num_steps_ahead > 0)
    assert prefetch_threads() == []
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert [len(step) for step in found] == [48 // micro_batch_size] * 6
    for step, batches in enumerate(found):
        one, other = joined([expected[step]]), joined([batches])
        assert {name for name in one if not torch.equal(one[name], other[name])} == set()
        assert [batch.is_last for batch in batches] == [batch.is_last for batch in expected[step]]
        assert [batch.use_self_cond for batch in batches] == [batch.use_self_cond for batch in expected[step]]


class RecordingLoader(ImageLoader):
    """Record the first sample of each request, and fail at one of them."""

    fails_at: int | None = None

    def samples(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.requests: list[int]
        if start == self.fails_at:
            raise OSError(f"sample {start}")
        self.requests.append(start)
        if start == 96:
            self.step_2_is_prepared.set()
        return super().samples(start, stop)


def recording_source(images: ImageSet) -> tuple[BatchSource, RecordingLoader]:
    """Return a source of 48 images per step, and its loader."""
    source = source_of(images, config_of())
    loader = RecordingLoader(images, DataConfig(source="x"), 5, torch.device("cpu"))
    loader.requests, loader.step_2_is_prepared = [], threading.Event()
    source.loader = loader
    return source, loader


def test_as_many_steps_are_prepared_ahead_as_asked_for_and_none_beyond_the_end(images: ImageSet) -> None:
    source, loader = recording_source(images)
    with Prefetcher(source, 2, end_step=5) as prefetcher:
        list(prefetcher.micro_batches(0))
        assert loader.step_2_is_prepared.wait(600), "steps 1 and 2 are prepared without being asked for"
        assert loader.requests == [0, 48, 96]
        for step in (1, 2, 3, 4):
            list(prefetcher.micro_batches(step))
    assert loader.requests == [0, 48, 96, 144, 192]


@pytest.mark.parametrize("num_steps_ahead", [0, 1, 3])
def test_an_error_is_raised_in_its_step_and_the_thread_ends(images: ImageSet, num_steps_ahead: int) -> None:
    source, loader = recording_source(images)
    loader.fails_at = 2 * 48
    with pytest.raises(OSError, match="sample 96"), Prefetcher(source, num_steps_ahead, 100) as prefetcher:
        for step in range(100):
            list(prefetcher.micro_batches(step))
    assert step == 2
    assert prefetch_threads() == []


def test_on_cuda_the_thread_has_its_own_stream_and_the_loop_waits_for_no_device(monkeypatch: Any) -> None:
    """With fake streams and events: which thread does what, and in which order."""
    log: list[str] = []
    current = threading.local()

    def note(what: str) -> None:
        log.append(f"{'loop' if threading.current_thread() is threading.main_thread() else 'thread'}: {what}")

    class Event:
        def __init__(self, name: str = "done", blocking: bool = False) -> None:
            self.name = name

        def record(self, stream: "Stream") -> None:
            note(f"record {self.name} on {stream.name}")

        def synchronize(self) -> None:
            note(f"wait on the host for {self.name}")

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_event(self, event: Event) -> None:
            note(f"{self.name} waits for {event.name}")

        def record_event(self) -> Event:
            note(f"record ready on {self.name}")
            return Event("ready")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.stream = stream
        yield
        del current.stream

    default = Stream("default")

    def batch_of(step: int) -> Iterator[MicroBatch]:
        note(f"prepare step {step} on {getattr(current, 'stream', default).name}")
        x = torch.zeros(2)
        yield MicroBatch(x, x, x, None, x, None, use_self_cond=False, is_last=True)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: default)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: note(f"keep for {stream.name}"))
    source: Any = SimpleNamespace(device=torch.device("cuda"), loader=None, micro_batches=batch_of)
    with Prefetcher(source, 1, 3) as prefetcher:
        for step in range(3):
            list(prefetcher.micro_batches(step))
    side = [line.removeprefix("thread: ") for line in log if line.startswith("thread: ")]
    assert side == [
        line
        for step in range(3)
        for line in ("wait on the host for done", f"prepare step {step} on side", "record ready on side")
    ]
    loop = [line.removeprefix("loop: ") for line in log if line.startswith("loop: ")]
    assert loop == ["record done on default", "default waits for ready", *["keep for default"] * 4] * 3


class CountCopies(TorchDispatchMode):
    """Count the bytes that are copied to another device."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device != result.device:
            self.num_bytes += args[0].nbytes
        return result


@pytest.mark.parametrize("is_resident", [False, True])
def test_images_travel_as_bytes(images: ImageSet, is_resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step sends uint8 images or their int64 row numbers, int64 timesteps and labels, flips and drops; no noise."""
    meta = torch.device("meta")
    monkeypatch.setattr(
        batches_module,
        "draw_noise",
        lambda config, seed, step, positions, shape, device: torch.empty(len(positions), *shape, device=device),
    )
    config = config_of()
    data = dataclasses.replace(config.data, device_resident=is_resident)
    source = BatchSource(
        config,
        ImageLoader(images, data, 5, meta),
        rank=0,
        num_processes=1,
        micro_batch_size=12,
        device=meta,
        timestep_sampler=build_timestep_sampler(config),
    )
    with CountCopies() as copies:
        (*_, last) = source.micro_batches(0)
    assert last.x_0.dtype == torch.float32 and last.x_0.device == meta
    assert copies.num_bytes == 48 * ((8 if is_resident else 1 * 4 * 4) + 8 + 8 + 1 + 1)


@pytest.mark.parametrize(
    ("prefetch_factor", "device", "timestep_sampling", "expected"),
    [
        (None, "cpu", "uniform", 0),
        (None, "cuda", "uniform", 2),
        (0, "cuda", "antithetic", 0),
        (3, "cpu", "antithetic", 3),
        (3, "cuda", "loss_aware", 0),
    ],
)
def test_steps_prepared_ahead_follow_the_setting_the_device_and_the_timesteps(
    prefetch_factor: int | None, device: str, timestep_sampling: Any, expected: int
) -> None:
    config = config_of(
        training=TrainingConfig(prefetch_factor=prefetch_factor),
        objective=ObjectiveConfig(timestep_sampling=timestep_sampling),
    )
    assert resolve_prefetch_factor(config, torch.device(device)) == expected


# ---------------------------------------------------------------------------------------------------- timestep samplers


def rows(timesteps: object, losses: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a trainer records: timestep and loss of each sample."""
    return torch.as_tensor(timesteps), torch.as_tensor(losses, dtype=torch.float32)


def warmed_up(losses: list[float], batch_size: int = 8, seed: int = 0) -> LossAwareTimesteps:
    """Return a sampler with a full history."""
    sampler = LossAwareTimesteps(len(losses), batch_size, seed)
    for _ in range(HISTORY_LENGTH):
        sampler.record(*rows(range(len(losses)), losses))
    return sampler


@pytest.mark.parametrize("batch_size", [8, 9])
def test_antithetic_neighbors_are_t_and_its_mirror(batch_size: int) -> None:
    timesteps, importance = AntitheticTimesteps(1000, batch_size, 0).draw(3)
    assert importance is None
    assert len(timesteps) == batch_size
    assert (timesteps[0:8:2] + timesteps[1:8:2] == 999).all()
    assert timesteps.dtype == np.int64


@pytest.mark.parametrize("kind", [UniformTimesteps, AntitheticTimesteps, LossAwareTimesteps])
def test_every_timestep_is_drawn_as_often_as_the_others(kind: type[UniformTimesteps]) -> None:
    """40,000 draws of 10 timesteps: five standard deviations of a count are 7.5 %, in pairs too."""
    sampler = kind(10, 4000, 0)
    counts = np.bincount(np.concatenate([sampler.draw(step).timesteps for step in range(10)]), minlength=10)
    assert len(counts) == 10
    np.testing.assert_allclose(counts, 4000, rtol=0.075)


@pytest.mark.parametrize("kind", [UniformTimesteps, AntitheticTimesteps, LossAwareTimesteps])
def test_a_draw_is_a_function_of_step_and_seed(
    kind: type[UniformTimesteps],
) -> None:
    sampler = kind(1000, 64, 5)
    first = sampler.draw(7).timesteps
    sampler.draw(8)
    assert np.array_equal(sampler.draw(7).timesteps, first)
    assert not np.array_equal(sampler.draw(8).timesteps, first)
    assert not np.array_equal(kind(1000, 64, 6).draw(7).timesteps, first)


def test_loss_aware_is_uniform_until_every_timestep_has_its_ten_losses() -> None:
    sampler = LossAwareTimesteps(4, 8, 0)
    for _ in range(HISTORY_LENGTH - 1):
        sampler.record(*rows([0, 1, 2, 3], [9.0, 1.0, 1.0, 1.0]))
    sampler.record(*rows([0, 1, 2], [9.0, 1.0, 1.0]))
    assert sampler.probabilities.tolist() == [0.25] * 4
    assert sampler.draw(0).importance is not None
    assert (sampler.draw(0).importance == 1).all()
    sampler.record(*rows([3], [1.0]))
    assert sampler.probabilities[0] == pytest.approx(0.999 * 0.75 + 0.00025)


def test_loss_aware_probabilities_are_the_root_mean_squares_of_the_last_ten_losses() -> None:
    """Eq. 18, Nichol & Dhariwal 2021, mixed with 0.001 of uniform; against a list of losses, in float64."""
    generator = np.random.default_rng(0)
    sampler, history = LossAwareTimesteps(5, 16, 0), [[] for _ in range(5)]  # type: ignore[var-annotated]
    for _ in range(30):
        timesteps = generator.integers(0, 5, size=16)
        losses = generator.gamma(1.0, 1.0 + timesteps).astype(np.float32)
        sampler.record(*rows(timesteps, losses))
        for t, loss in zip(timesteps, losses, strict=True):
            history[t].append(float(loss))
    root_mean_squares = np.array([np.sqrt(np.mean(np.square(losses[-10:]))) for losses in history])
    expected = 0.999 * root_mean_squares / root_mean_squares.sum() + 0.001 / 5
    np.testing.assert_allclose(sampler.probabilities, expected, rtol=1e-12)
    assert sampler.probabilities.sum() == pytest.approx(1.0, abs=1e-12)


def test_a_timestep_that_fills_its_history_at_once_keeps_the_last_losses() -> None:
    sampler = LossAwareTimesteps(2, 26, 0)
    sampler.record(*rows([0] * 13 + [1] * 13, [*range(13), *[1.0] * 13]))
    expected = np.sqrt(np.mean(np.square(np.arange(3.0, 13.0))))
    assert sampler.probabilities[0] == pytest.approx(0.999 * expected / (expected + 1) + 0.0005)


def test_importance_keeps_the_mean_loss_that_uniform_timesteps_have() -> None:
    """200,000 draws with seed 0; the losses times their importance have a standard deviation of about 0.02."""
    losses = np.array([0.01, 5.0, 1.0, 0.3, 0.02, 0.7])
    sampler = warmed_up(losses.tolist(), batch_size=200_000)
    timesteps, importance = sampler.draw(0)
    assert importance is not None
    weighted = losses[timesteps] * importance
    standard_error = weighted.std() / np.sqrt(len(weighted))
    assert standard_error < 1e-4, "large losses are drawn often"
    assert abs(weighted.mean() - losses.mean()) < 4 * standard_error + 1e-6
    assert (np.bincount(timesteps, minlength=6) > 0).all()
    assert abs(losses[timesteps].mean() - losses.mean()) > 1.0, "without the importance it would be another loss"


def test_non_finite_losses_are_ignored() -> None:
    sampler = warmed_up([1.0, 2.0, 3.0])
    before = sampler.probabilities
    sampler.record(*rows([0, 1, 2, 2], [float("nan"), float("inf"), -float("inf"), 3.0]))
    assert np.array_equal(sampler.probabilities, before)


def test_timesteps_with_zero_loss_are_still_drawn() -> None:
    assert warmed_up([0.0, 0.0]).probabilities.tolist() == [0.5, 0.5]
    assert warmed_up([0.0, 1.0]).probabilities[0] == pytest.approx(0.0005)


def test_a_restored_history_continues_bit_identically() -> None:
    generator = np.random.default_rng(0)
    sampler, restored = LossAwareTimesteps(7, 32, 0), LossAwareTimesteps(7, 32, 0)
    batches = [(generator.integers(0, 7, size=32), generator.random(32)) for _ in range(12)]
    for timesteps, losses in batches[:6]:
        sampler.record(*rows(timesteps, losses))
    state = sampler.state_dict()
    restored.load_state_dict(state)
    for step, (timesteps, losses) in enumerate(batches[6:]):
        for each in (sampler, restored):
            each.record(*rows(timesteps, losses))
        one, other = sampler.draw(step), restored.draw(step)
        assert np.array_equal(one.timesteps, other.timesteps)
        assert np.array_equal(one.importance, other.importance)  # type: ignore[arg-type]
    fresh = LossAwareTimesteps(7, 32, 0)
    fresh.load_state_dict(state)
    assert not np.array_equal(fresh.probabilities, restored.probabilities), "a state is a copy"


@pytest.mark.parametrize(
    ("name", "kind", "learns"),
    [
        ("uniform", UniformTimesteps, False),
        ("antithetic", AntitheticTimesteps, False),
        ("loss_aware", LossAwareTimesteps, True),
    ],
)
def test_the_configuration_names_the_sampler(name: str, kind: type[UniformTimesteps], learns: bool) -> None:
    config = RunConfig(
        objective=ObjectiveConfig(timestep_sampling=name),  # type: ignore[arg-type]
        diffusion=DiffusionConfig(num_train_timesteps=50),
        training=TrainingConfig(train_batch_size=40, seed=3),
    )
    sampler = build_timestep_sampler(config)
    assert type(sampler) is kind
    assert sampler.learns is learns
    assert bool(sampler.state_dict()) is learns
    assert np.array_equal(sampler.draw(5).timesteps, kind(50, 40, 3).draw(5).timesteps)


# ----------------------------------------------------------------------------------------------------- micro-batch size

AUTO = TrainingConfig(micro_batch_size="auto")


def memory_for(num_images: int, tried: list[int]) -> Callable[[int], None]:
    """Return a probe of a device that runs out of memory above some size."""

    def probe(size: int) -> None:
        tried.append(size)
        if size > num_images:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {size} images.\nMore lines.")

    return probe


@pytest.mark.parametrize(
    ("batch", "micro", "num_processes", "expected"),
    [(64, None, 1, 64), (64, None, 4, 16), (64, 8, 1, 8), (64, 8, 4, 8), (64, "auto", 4, 16), (1, None, 1, 1)],
)
def test_a_micro_batch_is_the_per_rank_batch_by_default(
    batch: int, micro: Any, num_processes: int, expected: int
) -> None:
    config = TrainingConfig(train_batch_size=batch, micro_batch_size=micro)
    assert largest_micro_batch_size(config, num_processes) == expected


@pytest.mark.parametrize(
    ("batch", "micro", "num_processes", "sentence"),
    [
        (100, 16, 3, "train_batch_size 100 is not a multiple of 3 processes x micro_batch_size 16; use 96 or 144."),
        (64, None, 3, "train_batch_size 64 is not a multiple of 3 processes; use 63 or 66."),
        (64, "auto", 3, "train_batch_size 64 is not a multiple of 3 processes; use 63 or 66."),
        (2, None, 4, "train_batch_size 2 is not a multiple of 4 processes; use 4."),
        (64, 64, 2, "train_batch_size 64 is not a multiple of 2 processes x micro_batch_size 64; use 128."),
    ],
)
def test_a_batch_that_cannot_be_divided_names_the_nearest_ones(
    batch: int, micro: Any, num_processes: int, sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        largest_micro_batch_size(TrainingConfig(train_batch_size=batch, micro_batch_size=micro), num_processes)
    assert str(caught.value) == f"training.{sentence}"


@pytest.mark.parametrize(
    ("batch_size", "room", "expected"),
    [
        (128, 999, [128]),
        (128, 100, [128, 64]),
        (128, 1, [128, 64, 32, 16, 8, 4, 2, 1]),
        (6, 2, [6, 3, 1]),
        (15, 7, [15, 5]),
        (7, 3, [7, 1]),
        (1, 1, [1]),
    ],
)
def test_the_per_rank_batch_is_halved_until_it_fits_and_every_size_divides_it(
    batch_size: int, room: int, expected: list[int]
) -> None:
    tried: list[int] = []
    assert largest_that_fits(batch_size, memory_for(room, tried)) == expected[-1]
    assert tried == expected
    assert all(batch_size % size == 0 for size in tried)


def test_a_network_that_is_too_large_for_one_image_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        largest_that_fits(4, memory_for(0, []))
    sentence = "training.micro_batch_size auto: not even one image fits (CUDA out of memory: 1 images.); use a smaller"
    assert str(caught.value).startswith(sentence)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def fail(size: int) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        largest_that_fits(4, fail)


@pytest.mark.parametrize(
    ("stored", "room", "expected", "printed"),
    [
        (None, 20, 16, "auto: 16 images, the largest part of 64 that fits into memory."),
        (
            None,
            None,
            64,
            "auto: 64 images, the whole per-rank batch, since only the memory of a CUDA GPU can be probed.",
        ),
        (8, 20, 8, "auto: 8 images, as when the run began."),
        (8, None, 8, "auto: 8 images, as when the run began."),
        (48, 20, 16, "auto: 16 images, the largest part of 64 that fits into memory."),
    ],
)
def test_the_value_of_auto_is_printed_and_kept(
    capsys: pytest.CaptureFixture[str], stored: int | None, room: int | None, expected: int, printed: str
) -> None:
    """A resumed run uses it again unless it no longer divides the per-rank batch."""
    probe = None if room is None else memory_for(room, [])
    assert resolve_micro_batch_size(AUTO, 64, stored, probe) == expected
    assert capsys.readouterr().out == f"training.micro_batch_size {printed}\n"


def test_a_size_that_was_given_is_not_probed(capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[int] = []
    assert resolve_micro_batch_size(TrainingConfig(micro_batch_size=8), 8, 4, memory_for(1, tried)) == 8
    assert resolve_micro_batch_size(TrainingConfig(), 64, 4, memory_for(1, tried)) == 64
    assert tried == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("num_classes", [None, 10])
def test_a_probe_is_a_step_that_changes_nothing(num_classes: int | None) -> None:
    unet = tiny_unet(num_classes)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    gradients: list[torch.Tensor] = []
    unet.conv_in.weight.register_post_accumulate_grad_hook(lambda weight: gradients.append(weight.grad.clone()))
    probe = make_memory_probe(unet, DenoisingLoss(GaussianDiffusionScheduler()), (1, 8, 8), nullcontext)
    probe(3)
    assert len(gradients) == 1
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


def test_the_memory_probe_reserves_images_and_noise_of_prefetched_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, reserved = torch.empty, []
    unet = tiny_unet()
    probe = make_memory_probe(unet, DenoisingLoss(GaussianDiffusionScheduler()), (1, 8, 8), nullcontext, 7)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: reserved.append(shape) or empty(*shape, **options))
    probe(3)
    assert (2, 7, 1, 8, 8) in reserved
