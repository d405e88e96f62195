"""Scores are those of other implementations, carry what names them, and refuse what cannot be compared."""

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from torch import nn

from ddpm_hf.data import ImageSet
from ddpm_hf.data.image_set import UnequalImages
from ddpm_hf.evaluation.metrics import OF_SAMPLES, Metric, _check_numbers, measure_fidelity

CPU = torch.device("cpu")
Images = NDArray[np.uint8]


class Statistics(nn.Module):
    """Six features of an image: mean and spread of each channel. Counts the images that it sees."""

    seen = 0

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale / 255))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        type(self).seen += len(images)
        pixels = images.float() * self.scale
        return torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], dim=1)


def twice() -> nn.Module:
    return Statistics(2.0)


FEATURES = f"{__name__}:Statistics"


def images_of(num_images: int, seed: int, channels: int = 3, low: int = 0) -> Images:
    """Returns noise whose level differs from image to image, (number, 8, 8, channels)."""
    random = np.random.default_rng(seed)
    levels = random.integers(low + 1, 256, (num_images, 1, 1, channels))
    return random.integers(low, levels, (num_images, 8, 8, channels), dtype=np.uint8)


def image_set(images: Images, **fields: Any) -> ImageSet:
    """Returns a data set of images (number, height, width, channels)."""
    return ImageSet(images.transpose(0, 3, 1, 2), None, None, np.arange(len(images)), **fields)


SAMPLES, REFERENCE = images_of(40, 1, low=20), images_of(60, 2)


def frechet(folder: Path, samples: Images = SAMPLES, reference: ImageSet | None = None, **options: Any) -> Metric:
    options = {"features": FEATURES, "metrics": ["frechet_distance"]} | options
    reference = image_set(REFERENCE) if reference is None else reference
    (score,) = measure_fidelity(samples, reference, device=CPU, cache_dir=folder, **options)
    return score


def by_hand(samples: Images, reference: Images) -> float:
    """Returns the distance by a matrix root of scipy, with features in float64."""
    both = []
    for images in (samples, reference):
        pixels = images / 255
        features = np.concatenate([pixels.mean((1, 2)), pixels.reshape(len(images), 64, 3).std(1, ddof=1)], axis=1)
        both.append((features.mean(0), np.cov(features, rowvar=False)))
    (mean, covariance), (other_mean, other_covariance) = both
    root = sqrtm(covariance @ other_covariance).real
    return float(np.sum((mean - other_mean) ** 2) + np.trace(covariance + other_covariance - 2 * root))


def test_the_distance_is_that_of_the_images_and_says_of_what(tmp_path: Path) -> None:
    """Features are float32, so the distance has six digits."""
    score = frechet(tmp_path)
    assert score.value == pytest.approx(by_hand(SAMPLES, REFERENCE), rel=1e-5)
    assert score.name == f"frechet_distance[{FEATURES}]"
    assert (score.num_samples, score.num_reference, score.standard_error) == (40, 60, None)
    assert score.features.startswith(f"Statistics of {FEATURES}, weights sha256 ")
    assert f"torch {torch.__version__}" in score.features


def test_batches_and_files_change_nothing(tmp_path: Path) -> None:
    """Batches of other sizes may round the last digit of a feature."""
    whole = frechet(tmp_path / "a").value
    np.save(tmp_path / "samples.npy", SAMPLES)
    mapped = np.load(tmp_path / "samples.npy", mmap_mode="r")
    assert frechet(tmp_path / "b", mapped, batch_size=7).value == pytest.approx(whole, rel=1e-6)


def test_gray_images_count_as_three_equal_channels(tmp_path: Path) -> None:
    """Only one of three equal channels has variance of its own, which a distance of covariances can bear."""
    gray, other = images_of(40, 3, channels=1), images_of(40, 4, channels=1)
    expected = frechet(tmp_path, np.repeat(gray, 3, axis=3), image_set(np.repeat(other, 3, axis=3)))
    assert frechet(tmp_path / "gray", gray, image_set(other)).value == pytest.approx(expected.value, rel=1e-6)


def test_the_reference_is_what_the_set_gives_cropped_in_the_centre(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (60, 8, 12, 3), dtype=np.uint8)
    chosen = np.arange(5, 50)
    cropped = replace(image_set(wide, crop_size=(8, 8)), indices=chosen)
    assert frechet(tmp_path, reference=cropped).value == pytest.approx(
        by_hand(SAMPLES, wide[chosen, :, 2:10]), rel=1e-5
    )


@pytest.fixture
def seen() -> Iterator[type[Statistics]]:
    Statistics.seen = 0
    yield Statistics


def test_the_reference_is_seen_once(tmp_path: Path, seen: type[Statistics]) -> None:
    first = frechet(tmp_path)
    assert seen.seen == 1 + 40 + 60  # one image tells the number of features
    assert frechet(tmp_path) == first
    assert seen.seen == 2 * (1 + 40) + 60


@pytest.mark.parametrize("change", ["pixel", "order of crops", "weights", "number"])
def test_statistics_of_another_reference_or_network_are_not_used(
    tmp_path: Path, seen: type[Statistics], change: str
) -> None:
    frechet(tmp_path)
    seen.seen = 0
    other = REFERENCE.copy()
    other[7, 3, 3, 1] ^= 1
    wide = np.pad(REFERENCE, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    reference = {
        "pixel": image_set(other),
        "order of crops": image_set(np.roll(wide, 1, axis=1), crop_size=(8, 8)),
        "weights": image_set(REFERENCE),
        "number": replace(image_set(REFERENCE), indices=np.arange(59)),
    }[change]
    features = f"{__name__}:twice" if change == "weights" else FEATURES
    frechet(tmp_path, reference=reference, features=features)
    assert seen.seen == 1 + 40 + len(reference)


@pytest.mark.parametrize("damage", ["a flipped bit", "a cut file", "an empty file", "a file of something else"])
def test_damaged_statistics_are_named_and_computed_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seen: type[Statistics], damage: str
) -> None:
    expected = frechet(tmp_path)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    changed = {
        "a flipped bit": data,
        "a cut file": data[:-9],
        "an empty file": b"",
        "a file of something else": b"x" * 99,
    }
    file.write_bytes(changed[damage])
    with caplog.at_level(logging.WARNING):
        assert frechet(tmp_path) == expected
    assert f"The statistics in {file} are damaged" in caplog.text
    seen.seen = 0
    assert frechet(tmp_path) == expected
    assert seen.seen == 1 + 40  # the file is whole again
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_folder_that_takes_no_files_costs_a_warning_not_the_score(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert frechet(tmp_path / "file" / "cache").value == frechet(tmp_path).value
    assert "cannot be kept in" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metrics": []}, "metrics is empty; choose from fid, kid"),
        ({"metrics": ["frechet"]}, r"metrics has 'frechet', which is none \(did you mean 'frechet_distance'\?\)"),
        ({"metrics": ["fid"]}, "fid, which is defined with Inception features, but .*; ask for frechet_distance"),
        ({"metrics": ["inception_score"]}, "inception_score, .* leave it out"),
        ({"samples": list(SAMPLES)}, "one uint8 array .*, all of one size; got list"),
        ({"samples": SAMPLES / 255}, r"got float64 \(40, 8, 8, 3\)"),
        ({"samples": SAMPLES[..., 0]}, r"got uint8 \(40, 8, 8\)"),
        ({"samples": SAMPLES[:0]}, "There are 0 samples and 60 reference images"),
        ({"reference": image_set(REFERENCE[:0])}, "There are 40 samples and 0 reference images"),
        ({"reference": image_set(REFERENCE[:, :6])}, "samples have 8x8 pixels and 3 channels, .* 8x6 and 3"),
        ({"reference": image_set(REFERENCE[..., :1])}, "8x8 pixels and 3 channels, the reference images 8x8 and 1"),
        ({"reference": image_set(REFERENCE.astype(np.uint16))}, "are uint16; metrics are defined for 8 bits"),
        ({"samples": np.tile(SAMPLES, 2)[..., :4], "reference": image_set(np.tile(REFERENCE, 2)[..., :4])},
         "The images have 4 channels"),
        ({"samples": SAMPLES[:6]}, r"frechet_distance needs at least 7 images on each side, one more than the features "
         r"whose covariance it takes \(6\); there are 6 samples and 60 .* ask for kernel_distance"),
        ({"reference": image_set(REFERENCE[:6])}, "there are 40 samples and 6 reference images"),
        ({"metrics": ["kernel_distance"], "samples": SAMPLES[:19]}, "kernel_distance needs at least 20 images"),
        ({"metrics": ["recall"], "samples": SAMPLES[:3]}, "recall needs at least 4 images on each side"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_with_a_sentence(
    tmp_path: Path, seen: type[Statistics], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        frechet(tmp_path, **change)
    assert "\n" not in str(caught.value)
    assert seen.seen <= 1  # before the work


def test_an_inception_score_needs_100_samples_a_split_and_no_reference() -> None:
    """Ten images in ten splits would score exactly 1, whatever they show."""
    _check_numbers(["inception_score"], 2048, num_samples=1000, num_reference=1)
    with pytest.raises(ValueError, match="inception_score needs at least 1000 samples; there are 999 samples"):
        _check_numbers(["inception_score"], 2048, num_samples=999, num_reference=50_000)


def test_a_reference_of_unequal_images_without_a_crop_is_refused(tmp_path: Path) -> None:
    layout = np.array([[0, 8, 8], [192, 8, 9]])
    unequal = ImageSet(UnequalImages(np.zeros(408, np.uint8), layout, 3), None, None, np.arange(2))
    with pytest.raises(ValueError, match=r"The reference images are of several sizes; open them with data\.resolution"):
        frechet(tmp_path, reference=unequal)


def test_inception_without_torch_fidelity_is_refused_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch_fidelity.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"pip install ddpm_hf\[eval\]"):
        frechet(tmp_path, metrics=["fid"], features="inception")


def test_every_metric_is_named() -> None:
    assert OF_SAMPLES == (
        "fid", "kid", "inception_score", "frechet_distance", "kernel_distance", "precision", "recall",
    )  # fmt: skip
