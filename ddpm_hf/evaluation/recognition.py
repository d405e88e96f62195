"""Whether a classifier recognizes the samples as the class that was asked for.

How far images are from each other, pixel by pixel.

Are class-conditional samples recognised as what was asked for, and are they more than copies?

The recognition rate is the "GAN-test" of Shmelkov, Schmid and Alahari 2018, How good is my GAN?: a classifier is
trained on real images and tested on samples. The distances and pixel statistics beside it show what that number alone
cannot: whether the samples repeat each other or the training set. Needs scikit-learn; meant for small images.
"""

from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray


def pixel_rows(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Returns one row of pixel values an image, in float64, in which sums of their squares are exact."""
    return images.reshape(len(images), -1).astype(np.float64)


def squared_distances(rows: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns all sums of squared differences of `pixel_rows`, (rows, others), exactly 0 for equal images."""
    squares: NDArray[np.float64] = (rows**2).sum(axis=1)[:, None] + (others**2).sum(axis=1) - 2 * rows @ others.T
    return squares


UInt8Array: TypeAlias = npt.NDArray[np.uint8]
LabelArray: TypeAlias = npt.NDArray[np.int64]
FloatRows: TypeAlias = npt.NDArray[np.float64]

# A support vector machine on raw pixels recognises 99 % of held-out digits with any penalty from 3 to 100.
SVC_PENALTY = 10.0
ROWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class RecognitionReport:
    """What the samples were found to be. Distances are root mean square per pixel value, values being in [0, 1].

    Args:
        num_samples: Samples that were judged.
        recognised: Fraction of the samples that are recognised as the class asked for.
        recognised_held_out: The same for real images that the classifier did not see.
        recognised_per_class: The same for the samples of each class.
        nearest_training_median: Median distance of a sample to its nearest training image.
        nearest_training_min: Smallest such distance; 0 means that a training image was copied.
        held_out_nearest_training_median: The median for real held-out images.
        held_out_nearest_training_min: The smallest for real held-out images.
        nearest_sample_min: Smallest distance between two samples of one class; None if no class has two.
        num_duplicates: Samples that equal an earlier sample of their class in every pixel.
        sample_mean: Mean of the pixels of all samples.
        sample_std: Their standard deviation.
        train_mean: Mean of the pixels of all training images.
        train_std: Their standard deviation.
    """

    num_samples: int
    recognised: float
    recognised_held_out: float
    recognised_per_class: dict[int, float]
    nearest_training_median: float
    nearest_training_min: float
    held_out_nearest_training_median: float
    held_out_nearest_training_min: float
    nearest_sample_min: float | None
    num_duplicates: int
    sample_mean: float
    sample_std: float
    train_mean: float
    train_std: float

    def to_dict(self) -> dict[str, object]:
        """Returns the report as JSON can hold it."""
        return asdict(self) | {"recognised_per_class": {str(k): v for k, v in self.recognised_per_class.items()}}

    def lines(self) -> list[str]:
        """Returns the report as a few short lines for a person."""
        weakest = min(self.recognised_per_class, key=self.recognised_per_class.__getitem__)
        smallest = "none" if self.nearest_sample_min is None else f"{self.nearest_sample_min:.3f}"
        return [
            f"recognised as the class asked for: {self.recognised:.1%} of {self.num_samples} samples "
            f"(real held-out images: {self.recognised_held_out:.1%})",
            f"weakest class: {weakest}, {self.recognised_per_class[weakest]:.1%}",
            f"distance to the nearest training image: median {self.nearest_training_median:.3f}, "
            f"smallest {self.nearest_training_min:.3f} (real held-out images: "
            f"{self.held_out_nearest_training_median:.3f}, {self.held_out_nearest_training_min:.3f})",
            f"smallest distance between two samples of one class: {smallest}; exact duplicates: {self.num_duplicates}",
            f"pixels: mean {self.sample_mean:.3f}, standard deviation {self.sample_std:.3f} "
            f"(real: {self.train_mean:.3f}, {self.train_std:.3f})",
        ]


def recognition_report(
    train_images: UInt8Array,
    train_labels: LabelArray,
    held_out_images: UInt8Array,
    held_out_labels: LabelArray,
    samples: UInt8Array,
    sample_labels: LabelArray,
) -> RecognitionReport:
    """Judges class-conditional samples by a classifier and by distances to real images.

    Args:
        train_images: uint8, (number, height, width, channels): what the generative model was trained on.
        train_labels: Integer labels, (number,).
        held_out_images: Real images that the model was not trained on, of the same size.
        held_out_labels: Their labels.
        samples: Generated images of the same size.
        sample_labels: The class that was asked for, for each sample.

    Raises:
        ValueError: If images and labels do not fit together, or a class is asked for that has no training image.
        ImportError: If scikit-learn is not installed.
    """
    pairs = {
        "train": (train_images, train_labels),
        "held_out": (held_out_images, held_out_labels),
        "sample": (samples, sample_labels),
    }
    for name, (images, labels) in pairs.items():
        _check_pair(name, images, labels, image_shape=train_images.shape[1:])
    check_classes(train_labels, sample_labels)
    train, held_out, generated = (pixel_rows(images) for images in (train_images, held_out_images, samples))
    predicted, predicted_held_out = _classify(train, train_labels, generated, held_out)
    is_recognised = predicted == sample_labels
    to_training, held_out_to_training = _nearest(generated, train), _nearest(held_out, train)
    classes = np.unique(sample_labels).tolist()
    within_class = np.concatenate([_nearest_other(generated[sample_labels == label]) for label in classes])
    return RecognitionReport(
        num_samples=len(samples),
        recognised=float(is_recognised.mean()),
        recognised_held_out=float((predicted_held_out == held_out_labels).mean()),
        recognised_per_class={label: float(is_recognised[sample_labels == label].mean()) for label in classes},
        nearest_training_median=float(np.median(to_training)),
        nearest_training_min=float(to_training.min()),
        held_out_nearest_training_median=float(np.median(held_out_to_training)),
        held_out_nearest_training_min=float(held_out_to_training.min()),
        nearest_sample_min=float(within_class.min()) if within_class.size else None,
        num_duplicates=_num_duplicates(samples, sample_labels),
        sample_mean=float(generated.mean() / 255),
        sample_std=float(generated.std() / 255),
        train_mean=float(train.mean() / 255),
        train_std=float(train.std() / 255),
    )


def _classify(
    train: FloatRows, train_labels: LabelArray, generated: FloatRows, held_out: FloatRows
) -> tuple[LabelArray, LabelArray]:
    """Trains the classifier on the real images and returns what it takes the others for."""
    try:
        from sklearn.svm import SVC
    except ImportError:
        raise ImportError("Recognition needs scikit-learn: pip install ddpm_hf[demo]") from None

    classifier = SVC(C=SVC_PENALTY, kernel="rbf", gamma="scale").fit(train / 255, train_labels)
    return classifier.predict(generated / 255), classifier.predict(held_out / 255)


def _distances(rows: FloatRows, others: FloatRows) -> FloatRows:
    """Returns all root mean square distances, (rows, others), exactly 0 for equal images."""
    distances: FloatRows = np.sqrt(squared_distances(rows, others) / rows.shape[1]) / 255
    return distances


def _nearest(rows: FloatRows, others: FloatRows) -> FloatRows:
    """Returns the distance of each row to the nearest of the others."""
    starts = range(0, len(rows), ROWS_AT_ONCE)
    return np.concatenate([_distances(rows[start : start + ROWS_AT_ONCE], others).min(axis=1) for start in starts])


def _nearest_other(rows: FloatRows) -> FloatRows:
    """Returns the distance of each row to the nearest one after it; none for the last."""
    return np.array([_distances(rows[index : index + 1], rows[index + 1 :]).min() for index in range(len(rows) - 1)])


def _num_duplicates(samples: UInt8Array, labels: LabelArray) -> int:
    """Counts the samples that equal an earlier sample of their class."""
    seen = {(label, image.tobytes()) for label, image in zip(labels.tolist(), samples, strict=True)}
    return len(samples) - len(seen)


def _check_pair(name: str, images: UInt8Array, labels: LabelArray, *, image_shape: tuple[int, ...]) -> None:
    """Refuses images and labels that do not fit together or are of another size than the training images."""
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"The {name} images must be a non-empty uint8 array (number, height, width, channels); got {images.dtype} "
            f"of shape {tuple(images.shape)}."
        )
    if images.shape[1:] != image_shape:
        raise ValueError(f"The {name} images are {images.shape[1:]}, but the training images are {image_shape}.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(images),):
        raise ValueError(
            f"The {name} labels must be {len(images)} integers, one an image; got {labels.dtype} of shape "
            f"{labels.shape}."
        )


def check_classes(train_labels: LabelArray, sample_labels: LabelArray) -> None:
    """Refuses labels that no classifier could have learned."""
    known, asked = set(train_labels.tolist()), set(sample_labels.tolist())
    if len(known) < 2:
        raise ValueError("Recognition tells classes apart, but the training images are all of one class.")
    if not asked <= known:
        raise ValueError(f"Class {min(asked - known)} was sampled, but no training image is of that class.")
