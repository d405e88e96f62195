"""A preview shows the same noise every time, large enough to be seen, and leaves no trace in training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from ddpm_hf.config import PreviewConfig
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.training.trainer import blocks_of_rank, save_preview
from tests.conftest import tiny_unet

NAMES = {str(number): f"class {number}" for number in range(3)}


def unet(resolution: int = 8) -> UNet2DModel:
    unet = tiny_unet(3).train()
    unet.register_to_config(sample_size=resolution)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    return unet


def preview(path: Path, network: UNet2DModel, *, seed: int = 0) -> Path:
    config = PreviewConfig(num_images=6, num_inference_steps=2)
    is_drawn = save_preview(path, network, GaussianDiffusionScheduler(), config, seed, NAMES, has_null_label=False)
    assert is_drawn == path.exists()
    return path


@pytest.mark.parametrize(("resolution", "tile"), [(8, 64), (12, 60), (28, 56), (32, 64)])
def test_small_images_are_enlarged_without_smoothing(tmp_path: Path, resolution: int, tile: int) -> None:
    """By a whole factor, each pixel a square: 3 columns, one a class, and 2 rows, with gaps of 4 pixels."""
    with Image.open(preview(tmp_path / "grid.png", unet(resolution))) as grid:
        assert grid.size == (4 + 3 * (tile + 4), 4 + 2 * (tile + 4))
        pixels = np.asarray(grid)[4 : 4 + tile, 4 : 4 + tile]
    small = pixels[:: tile // resolution, :: tile // resolution]
    assert np.array_equal(pixels, small.repeat(tile // resolution, 0).repeat(tile // resolution, 1))


def test_a_preview_is_a_function_of_the_weights_and_the_seed(tmp_path: Path) -> None:
    network = unet()
    first, again, other = (
        preview(tmp_path / f"{name}.png", network, seed=seed).read_bytes()
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again
    assert first != other


def test_training_does_not_notice_a_preview(tmp_path: Path) -> None:
    network, before = unet(), torch.get_rng_state()
    preview(tmp_path / "new" / "grid.png", network)
    assert network.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_preview_without_memory_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = unet()

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    network.conv_out.register_forward_pre_hook(fail)
    assert not preview(tmp_path / "grid.png", network).exists()
    assert "No memory for the preview; training goes on." in caplog.text
    assert network.training, "the mode comes back after an error too"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_a_preview_that_finds_no_room_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "grid.png").symlink_to("/dev/full")
    config = PreviewConfig(num_images=2, num_inference_steps=1)
    assert not save_preview(tmp_path / "grid.png", unet(), GaussianDiffusionScheduler(), config, 0, NAMES, False)
    assert "could not be written (No space left on device); training goes on" in caplog.text


@pytest.mark.parametrize(("num_images", "num_processes"), [(64, 1), (64, 2), (20, 2), (20, 5), (3, 2), (1, 1), (65, 8)])
def test_every_image_is_sampled_once_in_the_same_company(num_images: int, num_processes: int) -> None:
    blocks = [block for rank in range(num_processes) for block in blocks_of_rank(num_images, rank, num_processes)]
    assert sorted((block.start, block.stop) for block in blocks) == [
        (block.start, block.stop) for block in blocks_of_rank(num_images, 0, 1)
    ]
    assert sorted(number for block in blocks for number in range(num_images)[block]) == list(range(num_images))


def test_images_that_are_not_square_are_drawn(tmp_path: Path) -> None:
    network = tiny_unet(3)
    network.register_to_config(sample_size=(8, 16))
    with Image.open(preview(tmp_path / "grid.png", network)) as grid:
        assert grid.size == (4 + 3 * (64 + 4), 4 + 2 * (32 + 4))
