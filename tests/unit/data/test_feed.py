"""What reaches the network: stored pixels in [-1, 1], mirrored and cropped, from the disk or from the device."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_hf.config import DataConfig
from ddpm_hf.data import DataError, ImageLoader, ImageSet, SampleOrder, normalize, to_uint8
from ddpm_hf.data.decode import cut_out
from tests.unit.data.helpers import RANDOM, SHAPES, encode, open_source, unequal, write_files

CPU = torch.device("cpu")


@pytest.mark.parametrize(("dtype", "count"), [(torch.uint8, 256), (torch.uint16, 65536)])
def test_normalize_maps_stored_pixels_exactly(dtype: torch.dtype, count: int) -> None:
    """To the rounding of float32 at 1: both ends are exact, every value keeps its own place."""
    pixels = torch.arange(count, dtype=torch.int32).to(dtype).reshape(1, 1, 16, -1)
    values = normalize(pixels)
    assert values.dtype == torch.float32
    assert (values.min(), values.max()) == (-1.0, 1.0)
    exact = torch.arange(count, dtype=torch.float64).reshape(1, 1, 16, -1) / ((count - 1) / 2) - 1
    assert (values.double() - exact).abs().max() <= 2**-23
    back = ((values.double() + 1) * ((count - 1) / 2)).round().to(torch.int32)
    assert torch.equal(back, pixels.to(torch.int32)), "nothing is lost on the way back"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_normalize_mirrors_only_the_chosen_images(dtype: torch.dtype) -> None:
    pixels = torch.arange(24, dtype=torch.int32).to(dtype).reshape(2, 3, 2, 2)
    plain = normalize(pixels)
    mirrored = normalize(pixels, torch.tensor([False, True]))
    assert torch.equal(mirrored[0], plain[0])
    assert torch.equal(mirrored[1], plain[1].flip(-1))


def test_normalize_leaves_what_it_is_given_alone() -> None:
    pixels = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    normalize(pixels, torch.tensor([True, True]))
    assert torch.equal(pixels, torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2))


def test_16_bits_are_shown_as_the_nearest_of_8() -> None:
    every = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(to_uint8(every), np.rint(every / 65535 * 255))
    assert np.array_equal(to_uint8(np.arange(256, dtype=np.uint8)), np.arange(256))


def test_rectangles_are_cut_out_on_the_device_as_on_the_host() -> None:
    images = RANDOM.integers(0, 256, (5, 3, 7, 9), dtype=np.uint8)
    origins = np.array([[0, 0], [3, 4], [1, 2], [2, 0], [0, 4]])
    cut = cut_out(torch.from_numpy(images), torch.from_numpy(origins), (4, 5))
    expected = [image[:, top : top + 4, left : left + 5] for image, (top, left) in zip(images, origins, strict=True)]
    assert np.array_equal(cut.numpy(), np.stack(expected))


def image_set(dtype: type, crop_size: tuple[int, int] | None) -> ImageSet:
    pixels = RANDOM.integers(0, np.iinfo(dtype).max, (30, 3, 6, 7), dtype=dtype, endpoint=True)
    bad = np.array([4, 5])
    return ImageSet(pixels, np.arange(30) % 3, ("a", "b", "c"), np.arange(30), crop_size, bad)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("crop_size", [None, (4, 5)])
@pytest.mark.parametrize("settings", [{}, {"random_flip": True}, {"crop": "random", "random_flip": True}], ids=str)
def test_the_same_samples_come_from_the_disk_and_from_the_device(
    dtype: type, crop_size: tuple[int, int] | None, settings: dict[str, Any]
) -> None:
    """Bit for bit, over the end of two epochs."""
    images = image_set(dtype, crop_size)
    feeds = [
        ImageLoader(images, DataConfig(device_resident=is_resident, **settings), 5, CPU)
        for is_resident in (False, True)
    ]
    assert [feed.is_resident for feed in feeds] == [False, True]
    for start, stop in ((0, 8), (25, 70)):
        (pixels, labels), (resident_pixels, resident_labels) = (feed.samples(start, stop) for feed in feeds)
        assert torch.equal(pixels, resident_pixels)
        assert labels is not None
        assert resident_labels is not None
        assert torch.equal(labels, resident_labels)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_sample_is_the_image_that_the_order_says_cropped_and_mirrored_as_it_says(crop: str) -> None:
    """Image by image, from the definition."""
    images, order = image_set(np.uint8, (4, 5)), SampleOrder(30, seed=5)
    assert isinstance(images.images, np.ndarray)
    feed = ImageLoader(images, DataConfig(crop=crop, random_flip=True), 5, CPU)  # type: ignore[arg-type]
    samples, labels = feed.samples(20, 50)
    assert labels is not None
    for number, sample in enumerate(range(20, 50)):
        (position,), (is_mirrored,), (corner,) = (
            ask(sample, sample + 1) for ask in (order.positions, order.is_mirrored, order.corners)
        )
        row = {4: 6, 5: 6}.get(int(position), int(position))
        top, left = (int(corner[0] * 3), int(corner[1] * 3)) if crop == "random" else (1, 1)
        image = images.images[row][:, top : top + 4, left : left + 5]
        expected = normalize(torch.from_numpy(image[None].copy()))[0]
        assert torch.equal(samples[number], expected.flip(-1) if is_mirrored else expected)
        assert labels[number] == row % 3


def test_unequal_images_are_fed_in_their_crops() -> None:
    images, _ = unequal(SHAPES)
    feed = ImageLoader(images, DataConfig(crop="random", random_flip=True), 0, CPU)
    samples, _ = feed.samples(0, 12)
    assert samples.shape == (12, 3, 4, 5)
    again, _ = ImageLoader(images, DataConfig(crop="random", random_flip=True), 0, CPU).samples(5, 7)
    assert torch.equal(samples[5:7], again)


def test_unequal_images_cannot_be_kept_on_the_device() -> None:
    images, _ = unequal(SHAPES)
    with pytest.raises(DataError, match=r"data\.device_resident needs images of one size, .*; set it to false"):
        ImageLoader(images, DataConfig(crop="random", device_resident=True), 0, CPU)
    assert not ImageLoader(images, DataConfig(crop="random"), 0, CPU).is_resident


def test_images_stay_in_their_file_on_the_cpu_unless_asked() -> None:
    assert not ImageLoader(image_set(np.uint8, None), DataConfig(), 0, CPU).is_resident


@pytest.mark.parametrize("bits", [8, 16])
def test_a_file_becomes_what_the_network_sees(tmp_path: Path, bits: int) -> None:
    """From a PNG to the network's range, through the cache: black is -1, white is 1."""
    white = np.full((4, 4), 2**bits - 1, np.uint8 if bits == 8 else np.uint16)
    folder = write_files(tmp_path / "x", {"a.png": encode(white), "b.png": encode(white * 0)})
    images = open_source(folder, tmp_path / "cache")
    samples, _ = ImageLoader(images, DataConfig(), 0, CPU).samples(0, 2)
    assert sorted(samples.unique().tolist()) == [-1.0, 1.0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("settings", [{}, {"crop": "random", "random_flip": True}], ids=str)
def test_a_gpu_is_fed_what_the_cpu_is(dtype: type, settings: dict[str, Any]) -> None:
    """From the disk and from its own memory, which "auto" chooses; to the rounding of a fused division."""
    images, gpu = image_set(dtype, (4, 5)), torch.device("cuda")
    expected, _ = ImageLoader(images, DataConfig(**settings), 5, CPU).samples(20, 50)
    for is_resident in ("auto", False):
        feed = ImageLoader(images, DataConfig(device_resident=is_resident, **settings), 5, gpu)  # type: ignore[arg-type]
        assert feed.is_resident == (is_resident == "auto")
        samples, labels = feed.samples(20, 50)
        assert labels is not None
        assert labels.device.type == "cuda"
        torch.testing.assert_close(samples.cpu(), expected, rtol=0, atol=2**-23)
