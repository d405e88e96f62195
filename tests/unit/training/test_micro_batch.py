"""How many images one forward takes: what divides the batch, and what fits."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from ddpm_hf.config import ConfigError, TrainingConfig
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.training.batches import (
    largest_micro_batch_size,
    largest_that_fits,
    make_memory_probe,
    resolve_micro_batch_size,
)
from ddpm_hf.training.loss import DenoisingLoss
from tests.conftest import tiny_unet

AUTO = TrainingConfig(micro_batch_size="auto")


def memory_for(num_images: int, tried: list[int]) -> Callable[[int], None]:
    """Returns an attempt on a device that runs out of memory above some size."""

    def attempt(size: int) -> None:
        tried.append(size)
        if size > num_images:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {size} images.\nMore lines.")

    return attempt


@pytest.mark.parametrize(
    ("batch", "micro", "num_processes", "expected"),
    [(64, None, 1, 64), (64, None, 4, 16), (64, 8, 1, 8), (64, 8, 4, 8), (64, "auto", 4, 16), (1, None, 1, 1)],
)
def test_a_process_takes_its_share_in_one_forward_unless_told_otherwise(
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
def test_a_batch_that_cannot_be_shared_comes_with_one_that_can(
    batch: int, micro: Any, num_processes: int, sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        largest_micro_batch_size(TrainingConfig(train_batch_size=batch, micro_batch_size=micro), num_processes)
    assert str(caught.value) == f"training.{sentence}"


@pytest.mark.parametrize(
    ("share", "room", "expected"),
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
def test_the_share_is_halved_until_it_fits_and_every_size_divides_it(
    share: int, room: int, expected: list[int]
) -> None:
    tried: list[int] = []
    assert largest_that_fits(share, memory_for(room, tried)) == expected[-1]
    assert tried == expected
    assert all(share % size == 0 for size in tried)


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
    ("stored", "room", "expected", "told"),
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
def test_what_auto_stands_for_is_told_and_stays(
    capsys: pytest.CaptureFixture[str], stored: int | None, room: int | None, expected: int, told: str
) -> None:
    """A run that is continued never changes it, except where it no longer divides the share."""
    attempt = None if room is None else memory_for(room, [])
    assert resolve_micro_batch_size(AUTO, 64, stored, attempt) == expected
    assert capsys.readouterr().out == f"training.micro_batch_size {told}\n"


def test_a_size_that_was_given_is_not_probed(capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[int] = []
    assert resolve_micro_batch_size(TrainingConfig(micro_batch_size=8), 8, 4, memory_for(1, tried)) == 8
    assert resolve_micro_batch_size(TrainingConfig(), 64, 4, memory_for(1, tried)) == 64
    assert tried == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("num_classes", [None, 10])
def test_an_attempt_is_a_step_that_leaves_nothing_behind(num_classes: int | None) -> None:
    unet = tiny_unet(num_classes)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    gradients: list[torch.Tensor] = []
    unet.conv_in.weight.register_post_accumulate_grad_hook(lambda weight: gradients.append(weight.grad.clone()))
    attempt = make_memory_probe(unet, DenoisingLoss(GaussianDiffusionScheduler()), (1, 8, 8), nullcontext)
    attempt(3)
    assert len(gradients) == 1
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
