"""Recognition distinguishes good samples from bad ones on the real digits."""

import builtins
import json
from typing import Any

import numpy as np
import pytest

from ddpm_hf.evaluation.recognition import RecognitionReport, recognition_report

NUM_TRAIN, NUM_VALIDATION = 1200, 300
Digits = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def digits() -> Digits:
    """All digits in a shuffled but fixed order, so that every part has every class and every writer."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    original = load_digits()
    images = np.rint(original.images * (255 / 16)).astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    return images[order], original.target[order]


def judge(digits: Digits, samples: np.ndarray, labels: np.ndarray) -> RecognitionReport:
    images, targets = digits
    end = NUM_TRAIN + NUM_VALIDATION
    validation = images[NUM_TRAIN:end], targets[NUM_TRAIN:end]
    return recognition_report(images[:NUM_TRAIN], targets[:NUM_TRAIN], *validation, samples, labels)


@pytest.fixture(scope="module")
def unseen(digits: Digits) -> Digits:
    """Real digits in place of perfect samples."""
    return digits[0][NUM_TRAIN + NUM_VALIDATION :], digits[1][NUM_TRAIN + NUM_VALIDATION :]


def test_real_images_are_recognized_and_resemble_validation_images(digits: Digits, unseen: Digits) -> None:
    report = judge(digits, *unseen)
    assert report.num_samples == 297
    assert report.recognised > 0.97
    assert report.recognised_held_out > 0.97
    assert report.nearest_training_min > 0
    assert report.nearest_training_median == pytest.approx(report.held_out_nearest_training_median, rel=0.1)
    assert report.num_duplicates == 0
    assert report.sample_mean == pytest.approx(report.train_mean, rel=0.05)
    assert report.sample_std == pytest.approx(report.train_std, rel=0.05)


def test_the_recognized_fraction_counts_the_class_that_was_asked_for(digits: Digits, unseen: Digits) -> None:
    """Asking for the next class of every third sample loses exactly the ones that were recognized before."""
    samples, labels = unseen
    before = judge(digits, samples, labels)
    is_wrong = np.arange(len(labels)) % 3 == 0
    after = judge(digits, samples, np.where(is_wrong, (labels + 1) % 10, labels))
    kept = judge(digits, samples[~is_wrong], labels[~is_wrong])
    assert after.recognised * len(labels) >= kept.recognised * (~is_wrong).sum()
    assert after.recognised < before.recognised - 0.3
    assert after.recognised_held_out == before.recognised_held_out


def test_classes_are_reported_one_by_one(digits: Digits, unseen: Digits) -> None:
    samples, labels = unseen
    report = judge(digits, samples, labels)
    weights = np.bincount(labels)
    assert list(report.recognised_per_class) == list(range(10))
    assert np.dot(list(report.recognised_per_class.values()), weights) / len(labels) == pytest.approx(report.recognised)


def test_copies_of_training_images_are_seen(digits: Digits) -> None:
    images, labels = digits
    report = judge(digits, images[:50], labels[:50])
    assert (report.nearest_training_min, report.nearest_training_median) == (0.0, 0.0)
    assert report.held_out_nearest_training_min > 0


def test_samples_that_repeat_each_other_are_seen(digits: Digits, unseen: Digits) -> None:
    samples, labels = np.concatenate([unseen[0], unseen[0][:7]]), np.concatenate([unseen[1], unseen[1][:7]])
    report = judge(digits, samples, labels)
    assert (report.num_duplicates, report.nearest_sample_min) == (7, 0.0)


def test_the_same_picture_in_two_classes_is_no_duplicate(digits: Digits, unseen: Digits) -> None:
    report = judge(digits, np.repeat(unseen[0][:1], 2, axis=0), np.array([3, 5]))
    assert (report.num_duplicates, report.nearest_sample_min) == (0, None)
    assert "none" in "\n".join(report.lines())


def test_distances_are_root_mean_squares_of_pixels_from_0_to_1() -> None:
    """Black and white training images, samples 51 and 102 levels away: distances of exactly 0.2 and 0.4."""
    train = np.stack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)])
    samples = np.stack([np.full((4, 4, 3), 51, np.uint8), np.full((4, 4, 3), 255 - 102, np.uint8)])
    labels = np.array([0, 1])
    report = recognition_report(train, labels, train, labels, samples, labels)
    assert report.nearest_training_min == 0.2
    assert report.nearest_training_median == pytest.approx(0.3)
    assert report.held_out_nearest_training_min == 0.0
    assert (report.train_mean, report.train_std) == (0.5, 0.5)
    assert report.recognised == 1.0


def test_distances_do_not_depend_on_how_many_are_computed_at_once(
    digits: Digits, unseen: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of squared bytes are whole numbers that float64 holds exactly."""
    whole = judge(digits, *unseen)
    monkeypatch.setattr("ddpm_hf.evaluation.recognition._DISTANCE_ROWS", 7)
    assert judge(digits, *unseen) == whole


def test_the_report_has_short_lines_and_survives_json(digits: Digits, unseen: Digits) -> None:
    report = judge(digits, *unseen)
    lines = report.lines()
    assert lines[0].startswith(f"recognized as the class asked for: {report.recognised:.1%} of 297 samples")
    assert len(lines) == 5
    assert max(len(line) for line in lines) <= 120
    assert json.loads(json.dumps(report.to_dict()))["recognised_per_class"]["0"] == report.recognised_per_class[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": np.zeros((2, 8, 8), np.uint8)}, "sample images must be a non-empty uint8 array"),
        ({"samples": np.zeros((2, 8, 8, 1), np.float32)}, "got float32"),
        ({"samples": np.zeros((2, 4, 4, 1), np.uint8)}, r"sample images are \(4, 4, 1\), but the training images"),
        ({"validation_labels": np.zeros(3, np.int64)}, "validation labels must be 4 integers"),
        ({"sample_labels": np.zeros(2)}, "sample labels must be 2 integers, one per image; got float64"),
        ({"sample_labels": np.array([0, 7])}, "Class 7 was sampled"),
        ({"train_labels": np.zeros(4, np.int64)}, "all training images have the same label"),
    ],
)
def test_inconsistent_input_is_refused(change: dict[str, Any], words: str) -> None:
    images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 0, 1])
    arguments: dict[str, Any] = {
        "train_images": images, "train_labels": labels, "validation_images": images, "validation_labels": labels,
        "samples": images[:2], "sample_labels": labels[:2],
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        recognition_report(**(arguments | change))


def test_a_missing_scikit_learn_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = builtins.__import__

    def without_sklearn(name: str, *arguments: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return import_module(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    images, labels = np.zeros((2, 2, 2, 1), np.uint8), np.array([0, 1])
    with pytest.raises(ImportError, match=r"pip install ddpm_hf\[recognition\]"):
        recognition_report(images, labels, images, labels, images, labels)
