"""Copies of training images are found, against brute force, and validation images are the control."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ddpm_hf.data import ImageSet
from ddpm_hf.evaluation import memorization as module
from ddpm_hf.evaluation.features import open_features
from ddpm_hf.evaluation.memorization import Memorization, measure_memorization, nearest_images

CPU = torch.device("cpu")
Images = NDArray[np.uint8]


def noise(count: int, seed: int, shape: tuple[int, int, int] = (4, 5, 3)) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def image_set(images: Images, **fields: Any) -> ImageSet:
    """Return a set of images (number, height, width, channels)."""
    return ImageSet(images.transpose(0, 3, 1, 2), None, None, np.arange(len(images)), **fields)


def measure(samples: Images, training: Images, validation: Images, **options: Any) -> Memorization:
    found = measure_memorization(samples, image_set(training), image_set(validation), device=CPU, **options)
    assert found is not None
    return found


def brute_force(samples: Images, training: Images) -> NDArray[np.float64]:
    """Return the ratio of the two smallest distances of each sample."""
    differences = samples[:, None].astype(float) - training[None].astype(float)
    nearest, second = np.sort(np.sqrt((differences**2).sum(axis=(2, 3, 4))), axis=1)[:, :2].T
    return nearest / second


def test_ratios_are_those_of_all_distances_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 7 * 8 * 60)
    training, validation, samples = noise(30, 0), noise(8, 1), noise(10, 2)
    samples[4] = np.clip(training[13].astype(int) + noise(1, 3)[0] % 9 - 4, 0, 255)
    samples[7] = training[21]
    found = measure(samples, training, validation)
    np.testing.assert_allclose(found.ratios, brute_force(samples, training), rtol=1e-12)
    np.testing.assert_allclose(found.validation_ratios, brute_force(validation, training), rtol=1e-12)
    metric = found.metric
    assert (metric.name, metric.value, metric.validation_value) == ("memorization", 0.2, 0.0)
    assert (metric.num_samples, metric.num_reference, metric.num_validation) == (10, 30, 8)
    assert metric.standard_error == pytest.approx(np.sqrt(0.2 * 0.8 / 10))
    assert [(one.sample, one.training_image) for one in found.closest[:2]] == [(7, 21), (4, 13)]
    distance = np.sqrt(((samples[4].astype(float) - training[13]) ** 2).mean()) / 255
    assert found.closest[1].distance == pytest.approx(distance, rel=1e-12)
    assert "2 of 10 samples (20.0%)" in found.sentence() and "0 of 8" in found.sentence()


def test_a_copy_of_an_image_that_the_data_hold_twice_is_found() -> None:
    """Both would be at distance 0, a ratio of 1."""
    training = noise(6, 0)
    training[5] = training[2]
    found = measure(training[2:3], training, noise(0, 1))
    assert (found.metric.value, found.metric.num_reference) == (1.0, 5)
    assert (found.metric.validation_value, found.metric.num_validation) == (None, None)
    assert "no validation set" in found.sentence()


def test_mirror_images_are_copies_only_of_networks_trained_with_flips() -> None:
    """An image beside its own mirror image counts once."""
    training = noise(6, 0)
    training[5] = training[2, :, ::-1]
    samples = training[[0, 2], :, ::-1]
    assert measure(samples, training, training[:1]).metric.value == 0.5
    found = measure(samples, training, noise(2, 1), is_mirrored=True)
    assert (found.metric.value, found.metric.num_reference, found.metric.validation_value) == (1.0, 5, 0.0)


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_distances_are_those_of_the_features(is_mirrored: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given or computed here; images with equal features have the ratio 1."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    network = open_features("tests.feature_networks:pooled", None, CPU)
    training, samples = noise(9, 0, (4, 4, 3)), noise(5, 1, (4, 4, 3))

    def features(images: Images) -> NDArray[np.float64]:
        return network.module(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))).double().numpy()

    views = [samples, samples[:, :, ::-1]] if is_mirrored else [samples]
    distances = [np.linalg.norm(features(view)[:, None] - features(training)[None], axis=2) for view in views]
    nearest, second = np.sort(np.min(distances, axis=0), axis=1)[:, :2].T
    for known in (None, network.features_of_images(samples, 2, "samples")):
        found = measure(samples, training, training, network=network, is_mirrored=is_mirrored, sample_features=known)
        np.testing.assert_allclose(found.ratios, nearest / second, rtol=1e-6)
        assert found.metric.name == "memorization[tests.feature_networks:pooled]"
        assert found.metric.validation_value == 1.0
    gray = np.full((2, 4, 4, 3), 9, np.uint8)
    gray[1, 0, 0, 1] = 8  # a channel that the features ignore
    assert measure(gray, gray, gray, network=network).ratios.tolist() == [1.0, 1.0]


def test_one_training_image_has_no_second_nearest() -> None:
    with pytest.raises(ValueError, match="there is 1 different one"):
        measure(noise(2, 0), np.repeat(noise(1, 1), 3, axis=0), noise(1, 2))


def test_the_nearest_image_is_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all distances, in several parts; a copy is found at distance 0."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", 7 * 8 * 60)
    images, samples = noise(30, 0), noise(5, 1)
    samples[2] = images[13]
    found, positions, distances = nearest_images(samples, image_set(images), CPU)
    all_distances = np.sqrt(((samples[:, None].astype(float) - images[None]) ** 2).mean(axis=(2, 3, 4))) / 255
    np.testing.assert_array_equal(positions, all_distances.argmin(axis=1))
    np.testing.assert_allclose(distances, all_distances.min(axis=1), rtol=1e-12)
    assert (positions[2], distances[2]) == (13, 0)
    np.testing.assert_array_equal(found[2], samples[2])
