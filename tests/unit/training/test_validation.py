"""The validation loss is one number of the weights: no luck, no batch size, no process and no mode enters."""

import dataclasses

import numpy as np
import pytest
import torch

from ddpm_hf.config import ModelConfig, RunConfig, TrainingConfig
from ddpm_hf.data import ImageSet
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.training.loss import DenoisingLoss
from ddpm_hf.training.trainer import NUM_TIMESTEPS_PER_IMAGE, validation_loss, validation_timesteps
from tests.conftest import tiny_unet

NUM_IMAGES = 9


@pytest.fixture
def images() -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8), dtype=np.uint8)
    return ImageSet(pixels, np.arange(30) % 10, None, np.arange(4, 4 + NUM_IMAGES))


def run(*, seed: int = 0, class_conditional: bool = True) -> RunConfig:
    return RunConfig(training=TrainingConfig(seed=seed), model=ModelConfig(class_conditional=class_conditional))


def measure(images: ImageSet, *, seed: int = 0, num_processes: int = 1, batch_size: int = NUM_IMAGES) -> float:
    """Adds up what each of the processes would compute, here one after the other; their sum is tested in distributed/.

    The network has dropout, which must be off, and an output layer that lets it be seen.
    """
    unet = tiny_unet(10, dropout=0.5).train()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    loss = DenoisingLoss(GaussianDiffusionScheduler())
    parts = [
        validation_loss(
            unet,
            loss,
            images,
            run(seed=seed),
            rank=rank,
            num_processes=num_processes,
            batch_size=batch_size,
        )
        for rank in range(num_processes)
    ]
    assert unet.training, "the mode comes back"
    return sum(parts)


@pytest.mark.parametrize(("num_images", "num_train_timesteps"), [(250, 1000), (1, 1000), (7, 1000), (500, 10), (3, 2)])
def test_the_timesteps_are_an_even_grid(num_images: int, num_train_timesteps: int) -> None:
    timesteps = validation_timesteps(num_images, num_train_timesteps, seed=0)
    assert timesteps.shape == (NUM_TIMESTEPS_PER_IMAGE, num_images)
    for quarter, row in enumerate(timesteps):
        assert row.min() >= quarter * num_train_timesteps // NUM_TIMESTEPS_PER_IMAGE
        assert row.max() <= (quarter + 1) * num_train_timesteps / NUM_TIMESTEPS_PER_IMAGE
    counts = np.bincount(timesteps.ravel(), minlength=num_train_timesteps)
    assert len(counts) == num_train_timesteps
    assert counts.max() - counts.min() <= (2 if timesteps.size % num_train_timesteps else 0)


def test_the_timesteps_depend_on_the_seed_alone() -> None:
    first, again, other = (validation_timesteps(50, 1000, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], np.sort(first[0])), "the order of the images says nothing about the timestep"


@pytest.mark.parametrize(("num_processes", "batch_size"), [(1, 1), (2, 4), (4, 9), (12, 2)])
def test_the_loss_does_not_depend_on_processes_or_batch_size(
    images: ImageSet, num_processes: int, batch_size: int
) -> None:
    """To 1e-6: only the order of float32 additions in the network differs; the mean is taken in float64."""
    found = measure(images, num_processes=num_processes, batch_size=batch_size)
    assert found == pytest.approx(measure(images), abs=1e-6)


@pytest.mark.parametrize(("num_processes", "batch_size"), [(1, 9), (2, 4)])
def test_deep_and_larger_images_are_judged_by_their_centres(
    images: ImageSet, num_processes: int, batch_size: int
) -> None:
    """To 1e-6: 16 bits that were stretched from 8 are the same images to the rounding of float32."""
    deep = np.random.default_rng(1).integers(0, 1 << 16, (30, 1, 12, 10), dtype=np.uint16)
    deep[:, :, 2:10, 1:9] = images.images.astype(np.uint16) * 257
    larger = dataclasses.replace(images, images=deep, crop_size=(8, 8))
    found = measure(larger, num_processes=num_processes, batch_size=batch_size)
    assert found == pytest.approx(measure(images), abs=1e-6)


def test_the_loss_is_the_same_every_time_and_another_for_another_seed(images: ImageSet) -> None:
    assert measure(images) == measure(images)
    assert abs(measure(images, seed=1) - measure(images)) > 1e-4


def test_the_loss_is_the_mean_over_images_and_timesteps(images: ImageSet) -> None:
    """A network that predicts no noise leaves the noise itself: its mean square is 1 up to sampling error.

    36 draws of 64 pixels have a standard error of sqrt(2 / 2304) = 0.029, and the noise is always the same.
    """

    class Silent(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, sample: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
            return (torch.zeros_like(sample),)

    loss = validation_loss(
        Silent(),  # type: ignore[arg-type]
        DenoisingLoss(GaussianDiffusionScheduler()),
        images,
        run(class_conditional=False),
        rank=0,
        num_processes=1,
        batch_size=5,
    )
    assert loss == pytest.approx(1.0, abs=0.06)


def test_nothing_is_drawn_from_the_global_generator(images: ImageSet) -> None:
    unet, loss = tiny_unet(10, dropout=0.5), DenoisingLoss(GaussianDiffusionScheduler())
    before = torch.get_rng_state()
    validation_loss(unet, loss, images, run(), rank=0, num_processes=1, batch_size=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in unet.parameters())
