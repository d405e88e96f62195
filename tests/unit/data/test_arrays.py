"""Arrays of numbers of any type: what is used without a copy, what is stored, and the values that become -1 and 1."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_hf.config import DataConfig
from ddpm_hf.data import ImageSet, normalize, open_images, open_sets
from ddpm_hf.data.arrays import map_array
from ddpm_hf.data.cache import map_cache
from ddpm_hf.data.loader import ImageLoader
from tests.unit.data.helpers import open_source, pixels_of, refusal

RANDOM = np.random.default_rng(2)
VALUES = RANDOM.normal(0, 500, (4, 6, 5)).astype(np.float32)
CPU = torch.device("cpu")


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


@pytest.mark.parametrize(
    ("dtype", "stored", "is_copied"),
    [
        (np.int8, np.int16, True),
        (np.uint8, np.uint8, False),
        (np.int16, np.int16, False),
        (">i2", np.int16, True),
        (np.float16, np.float16, False),
        (np.int32, np.float32, True),
        (np.float32, np.float32, False),
        (np.float64, np.float32, True),
    ],
)
def test_values_are_stored_in_the_smallest_type_that_holds_them(
    tmp_path: Path, dtype: str, stored: type, is_copied: bool
) -> None:
    array = (VALUES / 20).clip(0 if np.dtype(dtype).kind == "u" else -128, 127).astype(dtype)
    found = open_source(save(tmp_path / "x.npy", array), tmp_path / "cache", value_range=[-150, 150])
    assert [found.images.dtype, "cache" in found.location] == [stored, is_copied]
    assert np.array_equal(pixels_of(found)[..., 0], array.astype(stored))


def test_resized_float16_is_stored_as_float32(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", VALUES.astype(np.float16))
    assert open_source(path, tmp_path / "cache", value_range="auto", resolution=4).images.dtype == np.float32
    assert open_source(path, tmp_path / "cache", value_range="auto", resolution=[6, 5]).images.dtype == np.float16


def test_resizing_keeps_the_range_of_each_image_and_does_not_mix_channels(tmp_path: Path) -> None:
    """Filters overshoot at edges, and a fourth channel of numbers is not transparency."""
    step = np.zeros((1, 16, 16, 4), np.float32)
    step[:, :, 8:, :3], step[..., 3] = 700, -5
    found = open_source(save(tmp_path / "x.npy", step), tmp_path / "cache", value_range="auto", resolution=8)
    assert found.value_range == (-5, 700)
    assert np.array_equal(pixels_of(found)[..., 3], np.full((1, 8, 8), -5))
    assert np.array_equal(np.unique(pixels_of(found)[0, :, -1, 0]), [700])


def test_latents_with_channels_first_are_used_without_a_copy(tmp_path: Path) -> None:
    """And by another process, which maps the same file."""
    latents = RANDOM.normal(size=(4, 16, 8, 4)).astype(np.float16)
    found = open_source(save(tmp_path / "x.npy", latents), tmp_path, value_range=[-6, 6], num_channels=16)
    again = map_array(found.location)
    for images in (found, again):
        assert np.array_equal(images.take(images.positions)[0], latents)
        assert images.value_range == (-6, 6)


@pytest.mark.parametrize("value_range", ["auto", [-1000.0, 400.0]])
@pytest.mark.parametrize("is_resident", [True, False])
def test_the_ends_of_the_range_become_minus_1_and_1(
    tmp_path: Path, value_range: str | list[float], is_resident: bool
) -> None:
    """Values outside are clipped, and the stored values do not change. All is float32."""
    low, high = (VALUES.min(), VALUES.max()) if value_range == "auto" else value_range
    config = DataConfig(value_range=value_range, random_flip=True, device_resident=is_resident)
    images = open_images(replace(config, source=str(save(tmp_path / "x.npy", VALUES))), with_labels=False)
    loader = ImageLoader(images, config, 0, CPU)
    expected = ((VALUES.astype(np.float64) - low) / (high - low) * 2 - 1).clip(-1, 1)
    for _ in range(2):
        samples, _ = loader.samples(0, 4)
        assert samples.dtype == torch.float32
        order, mirrored = loader._order.positions(0, 4), loader._order.is_mirrored(0, 4)
        rows = np.where(mirrored[:, None, None], expected[order][..., ::-1], expected[order])
        np.testing.assert_allclose(samples[:, 0], rows, atol=1e-6)
    assert np.array_equal(pixels_of(images)[..., 0], VALUES)


def test_the_range_of_8_bits_is_the_one_without_a_range(tmp_path: Path) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(normalize(pixels), normalize(pixels, value_range=(0, 255)))


def test_normalizing_leaves_values_as_they_are() -> None:
    values = torch.full((1, 1, 2, 2), 3.0)
    assert normalize(values, value_range=(1, 3)).unique().tolist() == [1]
    assert values.unique().tolist() == [3]


def test_pictures_show_the_range_from_0_to_255(tmp_path: Path) -> None:
    array = np.array([[[-2000, -1000], [-300, 400]]], np.int16)
    found = open_source(save(tmp_path / "x.npy", array), tmp_path, value_range=[-1000, 400])
    assert found.pictures(found.positions).ravel().tolist() == [0, 0, 128, 255]


def test_the_validation_set_has_the_range_of_the_training_set(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", train_images=VALUES, val_images=VALUES / 10)
    config = DataConfig(source=str(tmp_path / "x.npz"), cache_dir=str(tmp_path), value_range="auto")
    training, validation = open_sets(
        replace(config, validation_split="validation"), with_labels=False, seed=0, device=CPU
    )
    assert isinstance(training, ImageSet)
    assert training.value_range == validation.value_range == (VALUES.min(), VALUES.max())
    assert map_cache(validation.location).value_range == training.value_range


@pytest.mark.parametrize(
    ("array", "value_range", "sentence"),
    [
        (np.ones((2, 5, 5), np.float32), "auto", "are 1, which is no range; set data.value_range to [low, high]."),
        (VALUES, [1e5, 2e5], "which data.value_range [100000, 200000] does not contain; change it, or set it to auto."),
        (VALUES.astype(np.complex64), "auto", "contains complex64 (4, 6, 5); it must be numbers"),
        (VALUES, None, "has float32 values, whose range is unknown; set data.value_range to [low, high], the values"),
    ],
)
def test_values_without_a_range_are_refused(
    tmp_path: Path, array: np.ndarray, value_range: str | list[float] | None, sentence: str
) -> None:
    assert sentence in refusal(save(tmp_path / "x.npy", array), tmp_path, value_range=value_range)


@pytest.mark.parametrize(
    ("array", "value_range", "sentence"),
    [
        (VALUES, [-500, 500], "those outside of data.value_range [-500, 500] are clipped"),
        (VALUES, [-5000, 5000], "so the contrast is low; set data.value_range to their range or auto"),
        (VALUES.astype(np.float64) + 1e9, "auto", "are stored as float32, in steps of 64; subtract their mean"),
    ],
)
def test_values_that_are_lost_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, array: np.ndarray, value_range: str | list[float], sentence: str
) -> None:
    open_source(save(tmp_path / "x.npy", array), tmp_path / "cache", value_range=value_range)
    assert sentence in caplog.text
