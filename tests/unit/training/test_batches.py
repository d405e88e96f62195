"""What a step trains on does not depend on how its batch is split over processes and forwards."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_hf.config import DataConfig, DiffusionConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainingConfig
from ddpm_hf.data import ImageLoader, ImageSet, SampleOrder, normalize
from ddpm_hf.rng import normal_by_position
from ddpm_hf.training.batches import BatchSource, MicroBatch, build_timestep_sampler

NUM_IMAGES = 100


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """Images that can be told apart, and whose mirror images can be told from them."""
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
    images: ImageSet, config: RunConfig, rank: int = 0, num_processes: int = 1, micro_batch_size: int | None = None
) -> BatchSource:
    """Returns the batches of one process, of its whole share unless told otherwise."""
    return BatchSource(
        config,
        ImageLoader(images, config.data, config.training.seed, torch.device("cpu")),
        rank=rank,
        num_processes=num_processes,
        micro_batch_size=micro_batch_size or config.training.train_batch_size // num_processes,
        device=torch.device("cpu"),
        timestep_sampler=build_timestep_sampler(config),
    )


def step_of(
    images: ImageSet, config: RunConfig, step: int, num_processes: int = 1, micro_batch_size: int | None = None
) -> list[list[MicroBatch]]:
    """Returns the micro batches of every process."""
    sources = [source_of(images, config, rank, num_processes, micro_batch_size) for rank in range(num_processes)]
    assert {len(source) for source in sources} == {config.training.train_batch_size // num_processes}
    return [list(source.micro_batches(step)) for source in sources]


def joined(parts: list[list[MicroBatch]]) -> dict[str, torch.Tensor]:
    """Puts a global batch together."""
    batches = [batch for part in parts for batch in part]
    names = ("x_0", "noise", "timesteps", "class_labels", "dropped")
    return {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}


LOSS_AWARE = ObjectiveConfig(timestep_sampling="loss_aware")
EVERYTHING = ObjectiveConfig(
    class_dropout=0.25,
    timestep_sampling="antithetic",
    self_conditioning=0.5,
    offset_noise=0.1,
    immiscible_noise=True,
)


@pytest.mark.parametrize("objective", [config_of().objective, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("batch", [48, 96])
@pytest.mark.parametrize(
    ("num_processes", "micro_batch_size"), [(1, 24), (1, 1), (2, None), (3, 4), (4, 12), (8, 3), (48, None)]
)
def test_every_split_of_the_batch_is_the_same_batch(
    images: ImageSet, batch: int, num_processes: int, micro_batch_size: int | None, objective: ObjectiveConfig
) -> None:
    """Bit for bit: images, noise, timesteps, labels, flips and drops. Step 2 straddles two epochs."""
    config = config_of(batch, objective=objective)
    for step in (0, 2, 1000):
        whole = joined(step_of(images, config, step))
        split = joined(step_of(images, config, step, num_processes, micro_batch_size))
        assert {name for name in whole if not torch.equal(whole[name], split[name])} == set()


def test_a_batch_is_what_its_parts_say(images: ImageSet) -> None:
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


def test_a_step_is_the_same_whenever_it_is_asked_for(images: ImageSet) -> None:
    source = source_of(images, config_of())
    first = joined([list(source.micro_batches(7))])
    for step in (0, 500, 2):
        list(source.micro_batches(step))
    again = joined([list(source.micro_batches(7))])
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_steps_and_seeds_draw_other_numbers(images: ImageSet) -> None:
    base = joined(step_of(images, config_of(), 0))
    reseeded = dataclasses.replace(config_of().training, seed=6)
    for other in (
        joined(step_of(images, config_of(), 1)),
        joined(step_of(images, config_of(training=reseeded), 0)),
    ):
        assert all(not torch.equal(base[name], other[name]) for name in base)


def test_timesteps_flips_and_drops_have_the_chances_they_should(images: ImageSet) -> None:
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
    """They belong to the image and the epoch: 12 steps of 16 show what 4 steps of 48 do."""
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


def test_what_is_not_asked_for_is_not_drawn(images: ImageSet) -> None:
    config = config_of(data=DataConfig(source="x"), model=ModelConfig(), objective=ObjectiveConfig())
    ((batch,),) = step_of(images, config, 0)
    assert batch.class_labels is None
    assert batch.dropped is None
    rows = SampleOrder(NUM_IMAGES, seed=5).positions(0, 48)
    assert torch.equal(batch.x_0, normalize(torch.from_numpy(images.images[rows])))


def test_timesteps_stay_inside_a_short_chain(images: ImageSet) -> None:
    config = config_of(480, diffusion=DiffusionConfig(num_train_timesteps=3))
    assert set(joined(step_of(images, config, 0))["timesteps"].tolist()) == {0, 1, 2}


def test_one_coin_of_self_conditioning_is_for_the_whole_step_on_every_process(images: ImageSet) -> None:
    """400 tosses: five standard deviations are 0.11 for a chance of 0.3."""
    config = config_of(8, objective=ObjectiveConfig(self_conditioning=0.3))
    tosses = []
    for step in range(400):
        (toss,) = {batch.feeds_back for part in step_of(images, config, step, 2, 2) for batch in part}
        tosses.append(toss)
    assert abs(sum(tosses) / 400 - 0.3) < 0.11
    never, always = (config_of(8, objective=ObjectiveConfig(self_conditioning=chance)) for chance in (0.0, 1.0))
    assert not any(step_of(images, never, step)[0][0].feeds_back for step in range(20))
    assert all(step_of(images, always, step)[0][0].feeds_back for step in range(20))


def test_importance_comes_with_the_timesteps_it_belongs_to(images: ImageSet) -> None:
    config = config_of(48, diffusion=DiffusionConfig(num_train_timesteps=4), objective=LOSS_AWARE)
    source = source_of(images, config, 1, 2, 4)
    rows = torch.arange(400) % 4
    source._timestep_sampler.record(torch.stack([rows, 1.0 + rows], dim=1))
    probabilities = (torch.tensor([1.0, 2, 3, 4]) / 10 * 0.999 + 0.001 / 4).float()
    batches = list(source.micro_batches(3))
    assert len(batches) == 6
    for batch in batches:
        assert batch.importance is not None
        torch.testing.assert_close(batch.importance, 1 / (4 * probabilities[batch.timesteps]))
    assert len(torch.cat([batch.timesteps for batch in batches]).unique()) == 4
    ((plain,),) = step_of(images, config_of(), 0)
    assert plain.importance is None
