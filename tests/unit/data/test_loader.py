"""A sample is a function of its number: its image, crop and flip, from the file or from device memory."""

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_hf.config import DataConfig
from ddpm_hf.data import DataError, ImageLoader, ImageSet, SampleOrder, normalize
from ddpm_hf.data import loader as loader_module
from ddpm_hf.data.loader import crop_batch
from ddpm_hf.rng import numpy_generator
from tests.unit.data.helpers import RANDOM, SHAPES, encode, open_source, unequal, write_files


@pytest.mark.parametrize("num_positions", [1, 3, 10, 64])
@pytest.mark.parametrize("batch", [1, 4, 7, 25])
def test_every_epoch_shows_every_image_once_for_any_batch_size(num_positions: int, batch: int) -> None:
    """Batches span epochs; no image is dropped or repeated."""
    order = SampleOrder(num_positions, seed=0)
    num_epochs = batch + 1
    stops = [*range(0, num_positions * num_epochs, batch), num_positions * num_epochs]
    samples = np.concatenate([order.positions(start, stop) for start, stop in itertools.pairwise(stops)])
    epochs = samples.reshape(num_epochs, num_positions)
    assert (np.sort(epochs, axis=1) == np.arange(num_positions)).all()
    if num_positions >= 10:
        assert len(np.unique(epochs, axis=0)) == num_epochs, "every epoch has its own order"


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
def test_the_ranks_together_see_the_global_batch(num_ranks: int) -> None:
    batch, share = 12, 12 // num_ranks
    whole, split = SampleOrder(17, seed=1), [SampleOrder(17, seed=1) for _ in range(num_ranks)]
    for step in range(10):
        first = step * batch
        parts = [order.positions(first + rank * share, first + (rank + 1) * share) for rank, order in enumerate(split)]
        assert np.array_equal(np.concatenate(parts), whole.positions(first, first + batch))


def test_sample_n_is_position_n_mod_n_of_epoch_n_div_n() -> None:
    """From the generators of the definition."""
    order, count = SampleOrder(11, seed=7), 11
    for sample in (0, 10, 11, 54, 55, 1000):
        epoch, offset = divmod(sample, count)
        index = numpy_generator(7, "order", epoch).permutation(count)[offset]
        assert order.positions(sample, sample + 1).tolist() == [index]
        coin = numpy_generator(7, "flip", epoch).integers(0, 2, count, dtype=bool)[index]
        assert order.is_mirrored(sample, sample + 1).tolist() == [coin]
        corner = numpy_generator(7, "crop", epoch).random((count, 2), dtype=np.float32)[index]
        assert order.corners(sample, sample + 1).tolist() == [corner.tolist()]


def test_augmentation_does_not_depend_on_the_batch_size() -> None:
    order = SampleOrder(17, seed=1)
    whole = order.is_mirrored(0, 120), order.corners(0, 120)
    for batch in (1, 7, 24):
        used = SampleOrder(17, seed=1)
        starts = range(0, 120, batch)
        flips = np.concatenate([used.is_mirrored(start, min(start + batch, 120)) for start in starts])
        corners = np.concatenate([used.corners(start, min(start + batch, 120)) for start in starts])
        assert np.array_equal(flips, whole[0])
        assert np.array_equal(corners, whole[1])


def test_augmentation_differs_between_epochs() -> None:
    """Five standard deviations of the mean of 20,000 samples are 0.018 for flips and 0.0102 for corners."""
    order = SampleOrder(100, seed=0)
    positions, flips, corners = (getattr(order, name)(0, 20_000) for name in ("positions", "is_mirrored", "corners"))
    by_image = flips[np.argsort(positions, kind="stable")].reshape(100, 200)
    assert abs(flips.mean() - 0.5) < 0.018
    assert (by_image.mean(axis=1) > 0.2).all()
    assert (by_image.mean(axis=1) < 0.8).all()
    assert corners.min() >= 0
    assert corners.max() < 1
    assert (abs(corners.mean(axis=0) - 0.5) < 0.0102).all()
    assert len(np.unique(corners, axis=0)) > 19_000


def test_the_order_is_a_closed_form_of_the_sample_number() -> None:
    """A resume at sample 10^15 needs no replay, which would not end."""
    start = 10**15 - 3
    fresh = SampleOrder(1000, seed=0).positions(start, start + 10)
    assert np.array_equal(SampleOrder(1000, seed=0).positions(start, start + 10), fresh)
    used = SampleOrder(1000, seed=0)
    for sample in (0, 5000, start - 5000, 70):
        used.positions(sample, sample + 1500)
        used.is_mirrored(sample, sample + 1500)
    assert np.array_equal(used.positions(start, start + 10), fresh), "earlier samples do not matter"


def test_memory_does_not_grow_with_the_epochs() -> None:
    order = SampleOrder(1000, seed=0)

    def size_after(start: int, stop: int) -> int:
        for sample in range(start, stop, 300):
            order.positions(sample, sample + 300)
            order.is_mirrored(sample, sample + 300)
        return len(pickle.dumps(order))

    assert size_after(0, 3000) == size_after(3000, 60_000)


@pytest.mark.parametrize("ask", [SampleOrder.positions, SampleOrder.is_mirrored, SampleOrder.corners])
def test_the_order_depends_on_the_seed(ask: object) -> None:
    answers = [ask(SampleOrder(100, seed), 0, 100) for seed in (0, 1)]  # type: ignore[operator]
    assert not np.array_equal(*answers)


# -------------------------------------------------------------------------------------------------------------- samples


CPU = torch.device("cpu")


def test_crop_batch_crops_each_image_at_its_own_place() -> None:
    images = RANDOM.integers(0, 256, (5, 3, 7, 9), dtype=np.uint8)
    origins = np.array([[0, 0], [3, 4], [1, 2], [2, 0], [0, 4]])
    cropped = crop_batch(torch.from_numpy(images), torch.from_numpy(origins), (4, 5))
    expected = [image[:, top : top + 4, left : left + 5] for image, (top, left) in zip(images, origins, strict=True)]
    assert np.array_equal(cropped.numpy(), np.stack(expected))


def image_set(dtype: type, crop_size: tuple[int, int] | None) -> ImageSet:
    pixels = RANDOM.integers(0, np.iinfo(dtype).max, (30, 3, 6, 7), dtype=dtype, endpoint=True)
    bad = np.array([4, 5])
    return ImageSet(pixels, np.arange(30) % 3, ("a", "b", "c"), np.arange(30), crop_size, bad)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("crop_size", [None, (4, 5)])
@pytest.mark.parametrize("settings", [{}, {"random_flip": True}, {"crop": "random", "random_flip": True}], ids=str)
def test_samples_from_the_file_and_from_the_device_are_equal(
    dtype: type, crop_size: tuple[int, int] | None, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, over the end of two epochs, though the images were copied to the device in parts of 4."""
    monkeypatch.setattr(loader_module, "_BYTES_PER_COPY", 4 * 3 * 6 * 7 * np.dtype(dtype).itemsize)
    images = image_set(dtype, crop_size)
    loaders = [
        ImageLoader(images, DataConfig(device_resident=is_resident, **settings), 5, CPU)
        for is_resident in (False, True)
    ]
    assert [loader.is_resident for loader in loaders] == [False, True]
    for start, stop in ((0, 8), (25, 70)):
        (pixels, labels), (resident_pixels, resident_labels) = (loader.samples(start, stop) for loader in loaders)
        assert torch.equal(pixels, resident_pixels)
        assert torch.equal(labels, resident_labels)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_sample_is_defined_by_the_order(crop: str) -> None:
    """Image by image."""
    images, order = image_set(np.uint8, (4, 5)), SampleOrder(30, seed=5)
    assert isinstance(images.images, np.ndarray)
    loader = ImageLoader(images, DataConfig(crop=crop, random_flip=True), 5, CPU)  # type: ignore[arg-type]
    samples, labels = loader.samples(20, 50)
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


def test_images_of_different_sizes_are_cropped() -> None:
    images, _ = unequal(SHAPES)
    loader = ImageLoader(images, DataConfig(crop="random", random_flip=True), 0, CPU)
    samples, _ = loader.samples(0, 12)
    assert samples.shape == (12, 3, 4, 5)
    again, _ = ImageLoader(images, DataConfig(crop="random", random_flip=True), 0, CPU).samples(5, 7)
    assert torch.equal(samples[5:7], again)


def test_images_of_different_sizes_cannot_be_device_resident() -> None:
    images, _ = unequal(SHAPES)
    with pytest.raises(DataError, match=r"data\.device_resident needs images of one size, .*; set it to false"):
        ImageLoader(images, DataConfig(crop="random", device_resident=True), 0, CPU)
    assert not ImageLoader(images, DataConfig(crop="random"), 0, CPU).is_resident


def test_device_resident_auto_keeps_the_file_on_a_cpu() -> None:
    assert not ImageLoader(image_set(np.uint8, None), DataConfig(), 0, CPU).is_resident


@pytest.mark.parametrize("bits", [8, 16])
def test_black_and_white_files_become_minus_1_and_1(tmp_path: Path, bits: int) -> None:
    """From a PNG to the range of the network, through the cache."""
    white = np.full((4, 4), 2**bits - 1, np.uint8 if bits == 8 else np.uint16)
    folder = write_files(tmp_path / "x", {"a.png": encode(white), "b.png": encode(white * 0)})
    images = open_source(folder, tmp_path / "cache")
    samples, _ = ImageLoader(images, DataConfig(), 0, CPU).samples(0, 2)
    assert sorted(samples.unique().tolist()) == [-1.0, 1.0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("settings", [{}, {"crop": "random", "random_flip": True}], ids=str)
def test_samples_on_a_gpu_equal_those_on_the_cpu(dtype: type, settings: dict[str, Any]) -> None:
    """From the file and from device memory, which "auto" selects; to the rounding of a fused division."""
    images, gpu = image_set(dtype, (4, 5)), torch.device("cuda")
    expected, _ = ImageLoader(images, DataConfig(**settings), 5, CPU).samples(20, 50)
    for is_resident in ("auto", False):
        loader = ImageLoader(images, DataConfig(device_resident=is_resident, **settings), 5, gpu)  # type: ignore[arg-type]
        assert loader.is_resident == (is_resident == "auto")
        samples, labels = loader.samples(20, 50)
        assert labels.device.type == "cuda"
        torch.testing.assert_close(samples.cpu(), expected, rtol=0, atol=2**-23)
