"""A set of decoded images: selection, crops, replacements and the validation split."""

import numpy as np
import pytest

from ddpm_hf.data import DataError, ImageSet
from tests.unit.data.helpers import SHAPES, numbered, pixels_of, unequal


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.95])
def test_a_split_is_disjoint_complete_and_reproducible(fraction: float) -> None:
    training, validation = numbered(101).split(fraction, seed=3)
    assert len(validation) == round(101 * fraction)
    assert sorted([*training.indices, *validation.indices]) == list(range(101))
    again, _ = numbered(101).split(fraction, seed=3)
    assert np.array_equal(training.indices, again.indices)
    pixels, labels = validation.take(validation.positions)
    assert labels is not None
    assert np.array_equal(pixels[:, 0, 0, 0], labels)
    if fraction:
        assert not np.array_equal(training.indices, numbered(101).split(fraction, seed=4)[0].indices)


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_split_with_an_empty_set_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match=f"data.validation_fraction {fraction} of 10 images leaves"):
        numbered(10).split(fraction, seed=0)


def test_a_set_of_bad_images_is_refused() -> None:
    """The only validation image is a bad one."""
    images = numbered(10)
    _, validation = images.split(0.1, seed=0)
    _, spoilt = numbered(10, bad_rows=validation.indices).split(0.1, seed=0)
    with pytest.raises(DataError, match="none of the 1 images of the training or validation set can be read"):
        pixels_of(spoilt)


def test_images_of_different_sizes_are_cropped_at_the_given_corners() -> None:
    images, originals = unequal(SHAPES)
    assert images.image_shape == (3, 4, 5)
    corners = np.array([[0.0, 0.5], [0.99, 0.0], [0.4, 0.99999], [0.5, 0.5]], np.float32)
    origins = [(0, 2), (3, 0), (1, 3), (0, 0)]
    pixels, labels = images.take(images.positions, corners)
    assert labels is not None
    for found, image, (top, left) in zip(pixels, originals, origins, strict=True):
        assert np.array_equal(found, image[:, top : top + 4, left : left + 5])


def test_without_corners_the_center_is_cropped() -> None:
    images, originals = unequal(SHAPES)
    pixels, _ = images.take(np.array([2, 0]))
    assert np.array_equal(pixels[0], originals[2][:, 1:5, 1:6])
    assert np.array_equal(pixels[1], originals[0][:, :, 2:7])


def test_crop_origins_are_uniform_and_inside() -> None:
    """In float32, the largest number below 1 times 1001 rounds to 1001, which would be outside."""
    images = ImageSet(np.zeros((1, 1, 1004, 4), np.uint8), None, None, np.zeros(4, np.int64), (4, 4))
    largest = np.nextafter(np.float32(1), np.float32(0))
    corners = np.array([[0, 0], [0.0009, 0], [0.001, 0], [largest, 0]], np.float32)
    assert images.crop_origins(images.positions, corners)[:, 0].tolist() == [0, 0, 1, 1000]
    grid = (np.arange(10_010, dtype=np.float32)[:, None] + 0.5) / 10_010
    places = images.crop_origins(np.zeros(10_010, np.int64), np.repeat(grid, 2, axis=1))[:, 0]
    assert (np.bincount(places) == 10).all()


def test_larger_images_of_one_size_are_cropped() -> None:
    images = numbered(3, size=6, crop_size=(2, 4))
    assert images.image_shape == (1, 2, 4)
    assert pixels_of(images).shape == (3, 2, 4, 1)
