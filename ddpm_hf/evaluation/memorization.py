"""Memorization: which samples are copies of training images.

A sample counts as memorized if its distance to the nearest training image is less than a third of its distance to the
second nearest (Yoon et al. 2023, Diffusion probabilistic models generalize when they fail to memorize). The same
fraction of the validation images, which the network has not seen, is the control.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_hf import distributed
from ddpm_hf.data import ImageSet
from ddpm_hf.evaluation.features import FeatureNetwork, Features, FloatArray, ReferenceStatistics
from ddpm_hf.evaluation.generate import Images
from ddpm_hf.evaluation.metrics import MEMORIZATION, Metric
from ddpm_hf.evaluation.report import real_images

MAX_RATIO = 1 / 3
"""Largest ratio of the nearest to the second nearest distance of a memorized sample, as in Yoon et al. 2023."""
NUM_CLOSEST = 32
"""Number of samples that evaluation.json and evaluation.png show."""
PIXELS = "pixels"
_CHUNK_BYTES = 1 << 26
_IMAGES_CHUNK = 1024

GetRows = Callable[[NDArray[np.int64]], NDArray[Any]]
"""Returns the rows (number, d) at some positions."""


@dataclass(frozen=True)
class Closest:
    """A sample and the training image nearest to it.

    Args:
        sample: Number of the sample.
        training_image: Number of the image in the data, counted from 0.
        ratio: Distance to it divided by the distance to the second nearest.
        distance: Distance to it; in pixels the root mean square in [0, 1].
    """

    sample: int
    training_image: int
    ratio: float
    distance: float


@dataclass(frozen=True, kw_only=True)
class Memorization:
    """Memorization in pixels or in the features of a network.

    Args:
        metric: The fraction of memorized samples, with that of validation images.
        space: `pixels`, or the name of the feature network.
        ratios: Ratio of the nearest to the second nearest distance of each sample, in [0, 1].
        validation_ratios: The same of each validation image; empty if there are none.
        positions: Position of the nearest training image of each sample in the training set.
        closest: The samples with the smallest ratios, in ascending order.
        is_mirrored: Whether the mirrored training images count as well.
    """

    metric: Metric
    space: str
    ratios: FloatArray
    validation_ratios: FloatArray
    positions: NDArray[np.int64]
    closest: Sequence[Closest]
    is_mirrored: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of evaluation.json."""
        medians = [float(np.median(one)) if len(one) else None for one in (self.ratios, self.validation_ratios)]
        return {
            "features": self.space,
            "max_ratio": MAX_RATIO,
            "mirrored": self.is_mirrored,
            "median_ratio": medians[0],
            "validation_median_ratio": medians[1],
            "closest": [asdict(one) for one in self.closest],
        }

    def sentence(self) -> str:
        """Return the result in words."""
        num_memorized = int((self.ratios < MAX_RATIO).sum())
        sentence = (
            f"{self.metric.name}: {num_memorized:,} of {len(self.ratios):,} samples ({self.metric.value:.1%}) are "
            "less than a third as far from one training image as from any other"
        )
        if not len(self.validation_ratios):
            return f"{sentence}; there is no validation set to compare with."
        num_validation = int((self.validation_ratios < MAX_RATIO).sum())
        return f"{sentence}; of the validation images {num_validation:,} of {len(self.validation_ratios):,}."


def measure_memorization(
    samples: Images,
    training: ImageSet,
    validation: ImageSet,
    *,
    device: torch.device,
    is_mirrored: bool = False,
    network: FeatureNetwork | None = None,
    statistics: ReferenceStatistics | None = None,
    sample_features: Features | None = None,
    batch_size: int = 64,
) -> Memorization | None:
    """Collective: measure the fraction of memorized samples; rank 0 computes it.

    Equal training images count once: a copy of one of them would have two nearest training images at distance 0.

    Args:
        samples: uint8 (number, height, width, channels).
        training: Training images of the same size; at least two different ones.
        validation: Real images that the network was not trained on; may be empty.
        device: Device for the distances, which are computed in float64.
        is_mirrored: Count a sample as a copy if it is close to a mirrored training image, too; for networks that were
            trained with data.random_flip.
        network: Compare features of this network instead of pixels.
        statistics: Features of `training` that were used before.
        sample_features: Features of `samples` that were computed before.
        batch_size: Images per forward pass of the network.

    Returns:
        The result; None on other ranks than 0.

    Raises:
        ValueError: There are fewer than two different training images.
    """
    check_training_images(len(training))
    if network is not None:
        statistics = statistics or ReferenceStatistics(network, training, batch_size, None)
        reference = statistics.features()

    def rows_of(images: Images, known: Features | None = None) -> list[NDArray[Any]]:
        """Return the rows of images, and those of their mirror images if they count."""
        views = [images, images[:, :, ::-1]] if is_mirrored else [images]
        if network is None:
            return [view.reshape(len(view), -1) for view in views]
        rows = [] if known is None else [known]
        return rows + [network.features_of_images(view, batch_size, "images") for view in views[len(rows) :]]

    def get_rows(positions: NDArray[np.int64]) -> NDArray[Any]:
        if network is not None:
            return reference[positions]
        return real_images(training, positions).reshape(len(positions), -1)

    rows = rows_of(samples, sample_features)
    validation_rows = rows_of(real_images(validation, validation.positions)) if len(validation) else None

    def measure() -> Memorization:
        distinct = distinct_images(training, is_mirrored=is_mirrored)
        check_training_images(len(distinct))
        positions, squares = two_nearest(rows, distinct, get_rows, device)
        ratios, validation_ratios = _ratios(squares), np.zeros(0)
        if validation_rows is not None:
            validation_ratios = _ratios(two_nearest(validation_rows, distinct, get_rows, device)[1])
        fraction = float((ratios < MAX_RATIO).mean())
        name = PIXELS if network is None else network.name
        scale = 255 * math.sqrt(samples[0].size) if network is None else 1.0
        order = np.argsort(ratios, kind="stable")[:NUM_CLOSEST].tolist()
        return Memorization(
            metric=Metric(
                name=MEMORIZATION if network is None else f"{MEMORIZATION}[{name}]",
                value=fraction,
                standard_error=math.sqrt(fraction * (1 - fraction) / len(samples)),
                features=PIXELS if network is None else network.description,
                num_samples=len(samples),
                num_reference=len(distinct),
                validation_value=float((validation_ratios < MAX_RATIO).mean()) if len(validation) else None,
                num_validation=len(validation) or None,
            ),
            space=name,
            ratios=ratios,
            validation_ratios=validation_ratios,
            positions=positions,
            closest=[
                Closest(
                    sample=sample,
                    training_image=int(training.rows[positions[sample]]),
                    ratio=float(ratios[sample]),
                    distance=math.sqrt(squares[sample, 0]) / scale,
                )
                for sample in order
            ],
            is_mirrored=is_mirrored,
        )

    return distributed.on_rank_0(measure)


def check_training_images(number: int) -> None:
    """Raise ValueError if there are too few different training images for a second nearest one."""
    if number < 2:
        raise ValueError(
            f"{MEMORIZATION} compares with the two nearest training images, but there is {number} different one; use "
            "more training images, or another metric."
        )


def distinct_images(images: ImageSet, *, is_mirrored: bool = False) -> NDArray[np.int64]:
    """Return the positions of all images that equal no earlier one in every pixel.

    Args:
        images: The images.
        is_mirrored: Take an image and its mirror image for equal.
    """
    first: dict[bytes, int] = {}
    for start in range(0, len(images), _IMAGES_CHUNK):
        chunk = images.positions[start : start + _IMAGES_CHUNK]
        for position, image in zip(chunk.tolist(), real_images(images, chunk), strict=True):
            views = [image, image[:, ::-1]] if is_mirrored else [image]
            first.setdefault(min(hashlib.sha256(view.tobytes()).digest() for view in views), position)
    return np.array(list(first.values()), np.int64)


def two_nearest(
    views: Sequence[NDArray[Any]], positions: NDArray[np.int64], get_rows: GetRows, device: torch.device
) -> tuple[NDArray[np.int64], FloatArray]:
    """Find the two nearest of some rows for each query, in float64, where distances of uint8 values are exact.

    Args:
        views: Queries (number, d), and further views of each, such as its mirror image; the nearest view counts.
        positions: Positions of the rows to search.
        get_rows: Returns rows (number, d); each is read once.
        device: Device to compute on.

    Returns:
        The position of the nearest row of each query, and the squared distances of the two nearest, float64 (number,
        2), in ascending order; infinity if there is only one row.
    """
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    num_queries = len(views[0])
    best = torch.full((num_queries, 2), math.inf, dtype=torch.float64, device=device)
    nearest = torch.zeros((num_queries, 2), dtype=torch.int64, device=device)
    chunk_size = max(1, _CHUNK_BYTES // (8 * views[0].shape[1]))
    for start in tqdm(range(0, len(positions), chunk_size), "Nearest images", disable=None, leave=False):
        chunk = positions[start : start + chunk_size]
        others, numbers = _float64(get_rows(chunk), device), torch.from_numpy(chunk).to(device)
        for first in range(0, num_queries, chunk_size):
            queries = slice(first, min(first + chunk_size, num_queries))
            squares = _squared_distances(_float64(views[0][queries], device), others)
            for view in views[1:]:
                squares = torch.minimum(squares, _squared_distances(_float64(view[queries], device), others))
            found, columns = squares.topk(min(2, len(chunk)), dim=1, largest=False)
            candidates = torch.cat([best[queries], found], dim=1)
            order = candidates.argsort(dim=1, stable=True)[:, :2]
            best[queries] = candidates.gather(1, order)
            nearest[queries] = torch.cat([nearest[queries], numbers[columns]], dim=1).gather(1, order)
    return nearest[:, 0].cpu().numpy(), best.cpu().numpy()


def _float64(rows: NDArray[Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.require(rows, requirements=["C", "W"])).to(device).to(torch.float64)


def _squared_distances(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return all sums of squared differences (rows, others)."""
    squares = (rows**2).sum(1)[:, None] + (others**2).sum(1) - 2 * rows @ others.T
    return squares.clamp_(min=0)  # rounding, of features


def _ratios(squares: FloatArray) -> FloatArray:
    """Return the nearest distance divided by the second nearest; 1 if both are 0."""
    nearest, second = np.sqrt(squares).T
    ratios: FloatArray = np.divide(nearest, second, out=np.ones_like(nearest), where=second > 0)
    return ratios


def nearest_images(
    samples: Images, images: ImageSet, device: torch.device
) -> tuple[Images, NDArray[np.int64], FloatArray]:
    """Find the nearest image of a set for each sample, pixel by pixel.

    Args:
        samples: uint8 (number, height, width, channels).
        images: Images of the same size; read in chunks.
        device: Device to compute on.

    Returns:
        The nearest images, like the samples; their positions in the set; their distances, root mean square over the
        values, in [0, 1].
    """
    rows = samples.reshape(len(samples), -1)
    positions, squares = two_nearest(
        [rows], images.positions, lambda chunk: real_images(images, chunk).reshape(len(chunk), -1), device
    )
    return real_images(images, positions), positions, np.sqrt(squares[:, 0] / rows.shape[1]) / 255
