"""FID, KID, Inception Score, precision and recall.

FID, KID and Inception Score are defined with Inception features. The same distances in the features of another network
are called `frechet_distance[NETWORK]` and `kernel_distance[NETWORK]`. Images are compared as uint8, as they would be
saved. Published numbers use 50,000 samples and all training images: a Fréchet distance has a bias of order 1 / number
of images, a kernel distance has none.
"""

import difflib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_hf import distributed
from ddpm_hf.data import ImageSet
from ddpm_hf.data.image_set import UnequalImages
from ddpm_hf.evaluation.features import (
    FeatureNetwork,
    Features,
    FloatArray,
    InceptionFeatures,
    Moments,
    ReferenceStatistics,
    moments_of,
    open_features,
)
from ddpm_hf.rng import derive_seed

SCHEMA_VERSION = 1
"""Version of evaluation.json."""

BITS_PER_DIM = "bits_per_dim"
MEMORIZATION = "memorization"
# Title of each metric, and which direction is better.
TITLES = {
    "fid": ("FID", "lower"),
    "kid": ("KID", "lower"),
    "inception_score": ("Inception Score", "higher"),
    "frechet_distance": ("Fréchet distance", "lower"),
    "kernel_distance": ("kernel distance", "lower"),
    "precision": ("precision", "higher"),
    "recall": ("recall", "higher"),
    MEMORIZATION: ("memorization", "lower"),
    BITS_PER_DIM: ("bits per dimension", "lower"),
}
METRICS = tuple(TITLES)
SAMPLE_METRICS = tuple(name for name in METRICS if name not in (MEMORIZATION, BITS_PER_DIM))
"""The metrics of `measure_fidelity`."""
LOWER_IS_BETTER = tuple(name for name, (_, better) in TITLES.items() if better == "lower")
# Metrics that are defined with Inception features, and their names with other features.
_INCEPTION_METRICS = {"fid": "frechet_distance", "kid": "kernel_distance", "inception_score": None}
_FRECHET, _KERNEL = {"fid", "frechet_distance"}, {"kid", "kernel_distance"}

KERNEL_SUBSETS = 100
KERNEL_SUBSET_SIZE = 1000
KERNEL_SUBSET_DIVISOR = 10
"""Of fewer than ten times KERNEL_SUBSET_SIZE images, a subset is a tenth; an unbiased estimate needs two per side."""
MAX_KERNEL_IMAGES = 10_000
"""Images per side that the variance of a kernel distance is estimated from; the work grows with their square."""
_KERNEL_ROWS = 1000
INCEPTION_SCORE_SPLITS = 10
MIN_SPLIT_SIZE = 100
"""An Inception Score is at most the number of images in a split: of one image it is 1, whatever the image shows."""
NEIGHBORS = 3
"""Neighbors of precision and recall, as in Kynkäänniemi et al. 2019."""
_MAX_ROUNDING = 1e-10
"""Largest rounding error of an eigenvalue, relative to the largest eigenvalue; float64 stays a hundred times below."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One measured number.

    Args:
        name: Name of the metric, with the feature network in brackets unless it is the one the metric is defined with.
        value: The number.
        standard_error: Standard error over the choice of images; None if it is unknown.
        features: Feature network, weights, resizing and library versions; None if there is no network.
        num_samples: Number of samples; for bits per dimension, of real images.
        num_reference: Number of reference images; 0 if there are none.
        validation_value: The same number for validation images in place of samples; None if it is not measured.
        num_validation: Number of these validation images.
    """

    name: str
    value: float
    standard_error: float | None
    features: str | None
    num_samples: int
    num_reference: int
    validation_value: float | None = None
    num_validation: int | None = None


def check_metrics(metrics: Sequence[str], known: Sequence[str] = METRICS) -> None:
    """Raise ValueError if a metric is unknown, or if there is none."""
    if not metrics:
        raise ValueError(f"metrics is empty; choose from {', '.join(known)}.")
    for metric in metrics:
        if metric not in known:
            nearest = difflib.get_close_matches(metric, known, n=1)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise ValueError(f"metrics contains {metric!r}, which is unknown{hint}; choose from {', '.join(known)}.")


def open_network_for(
    metrics: Sequence[str],
    image_shape: tuple[int, int, int],
    num_samples: int,
    num_reference: int,
    *,
    features: str = "inception",
    weights: Path | None = None,
    device: torch.device,
) -> FeatureNetwork:
    """Collective: open the feature network of metrics on every rank, after checking that they can be measured.

    Call it before sampling. Rank 0 opens the network first, and downloads it if needed.

    Args:
        metrics: Names from SAMPLE_METRICS; may be empty if only the features are needed.
        image_shape: (channels, height, width) of the samples.
        num_samples: Samples that will be drawn.
        num_reference: Number of reference images.
        features: Name of the network; see `open_features`.
        weights: File of the Inception weights; see `open_features`.
        device: Device to run the network on.

    Raises:
        ValueError: A metric is unknown or does not fit the features, a library is missing, or there are too few images.
    """
    if metrics:
        _check_features(metrics, features)
    if set(metrics) - _FRECHET and importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError(f'{", ".join(metrics)} need torch-fidelity; install it with pip install "ddpm_hf[eval]".')

    def open_network() -> FeatureNetwork:
        try:
            return open_features(features, weights, device)
        except ImportError as error:
            raise ValueError(str(error)) from error

    on_rank_0 = distributed.on_rank_0(open_network)
    network = distributed.on_every_rank(lambda: on_rank_0 or open_network())
    _check_numbers(metrics, network.num_features(image_shape), num_samples, num_reference)
    return network


def measure_fidelity(
    samples: NDArray[np.uint8],
    reference: ImageSet,
    network: FeatureNetwork,
    *,
    metrics: Sequence[str],
    batch_size: int = 64,
    cache_dir: Path | None = None,
    seed: int = 0,
    statistics: ReferenceStatistics | None = None,
    sample_features: Features | None = None,
) -> list[Metric]:
    """Collective: compare samples with real images in the features of a network.

    The processes share the images; rank 0 computes the metrics from their features.

    Args:
        samples: uint8 (number, height, width, channels), in memory or memory-mapped; the same on all ranks.
        reference: Real images of the same size without augmentation; for published numbers, all training images.
        network: The feature network.
        metrics: Names from SAMPLE_METRICS.
        batch_size: Images per forward pass.
        cache_dir: Folder for the reference statistics; None takes a folder in the user's cache.
        seed: Seed of the subsets of kernel distances and the splits of the Inception Score.
        statistics: Statistics of `reference` that were used before; None opens them.
        sample_features: Features of `samples` that were computed before.

    Returns:
        The metrics, in the order of `metrics`; none on other ranks than 0.

    Raises:
        ImportError: torch-fidelity is missing.
        ValueError: Metrics, network and images do not fit each other, or there are too few images.
    """
    _check_features(metrics, network.name)
    _check_images(samples, reference)
    _check_numbers(metrics, network.num_features(reference.image_shape), len(samples), len(reference))
    statistics = statistics or ReferenceStatistics(network, reference, batch_size, cache_dir)
    if sample_features is None:
        sample_features = network.features_of_images(samples, batch_size, "samples")
    wanted = set(metrics)
    # Features before moments, so that the moments are computed from these features.
    features = statistics.features() if wanted & (_KERNEL | {"precision", "recall"}) else None
    moments = statistics.moments() if wanted & _FRECHET else None

    def measure() -> dict[str, tuple[float, float | None]]:
        """Return value and standard error of each metric."""
        values: dict[str, tuple[float, float | None]] = {}
        if features is not None and wanted & _KERNEL:
            values["kid"] = values["kernel_distance"] = kernel_distance(sample_features, features, seed)
        if features is not None and wanted & {"precision", "recall"}:
            precision, recall = precision_and_recall(sample_features, features, network.device)
            values["precision"], values["recall"] = (precision, None), (recall, None)
        if moments is not None:
            values["fid"] = values["frechet_distance"] = frechet_distance(moments_of(sample_features), moments), None
        if "inception_score" in wanted:
            values["inception_score"] = inception_score(network, sample_features, seed)
        return values

    values = distributed.on_rank_0(measure)
    if values is None:
        return []
    return [
        Metric(
            name=_full_name(metric, network.name),
            value=values[metric][0],
            standard_error=values[metric][1],
            features=network.description,
            num_samples=len(samples),
            num_reference=0 if metric == "inception_score" else len(reference),
        )
        for metric in metrics
    ]


def _full_name(metric: str, features: str) -> str:
    is_plain = metric in _INCEPTION_METRICS or (features == "inception" and metric in {"precision", "recall"})
    return metric if is_plain else f"{metric}[{features}]"


def _check_features(metrics: Sequence[str], features: str) -> None:
    check_metrics(metrics, SAMPLE_METRICS)
    for metric in metrics:
        if metric in _INCEPTION_METRICS and features != "inception":
            other = _INCEPTION_METRICS[metric]
            raise ValueError(
                f"metrics contains {metric}, which is defined with Inception features, but features is {features}; "
                + (f"use {other} instead." if other else "remove it.")
            )


def _check_images(samples: NDArray[np.uint8], reference: ImageSet) -> None:
    if not isinstance(samples, np.ndarray) or samples.dtype != np.uint8 or samples.ndim != 4:
        given = f"{samples.dtype} {samples.shape}" if isinstance(samples, np.ndarray) else type(samples).__name__
        raise ValueError(
            f"samples must be one uint8 array (number, height, width, channels), all of one size; got {given}."
        )
    if len(reference) == 0 or len(samples) == 0:
        raise ValueError(
            f"There are {len(samples)} samples and {len(reference)} reference images; at least one of each is required."
        )
    check_reference(reference)
    _, height, width, channels = samples.shape
    expected = reference.image_shape
    if (channels, height, width) != expected:
        raise ValueError(
            f"The samples have {width}x{height} pixels and {channels} channels, the reference images "
            f"{expected[2]}x{expected[1]} and {expected[0]}; open the reference with the resolution and channels of "
            "the samples."
        )


def check_reference(reference: ImageSet) -> None:
    """Raise ValueError unless the reference images have 8 bits or a value range, one size, and 1 or 3 channels."""
    if reference.images.dtype != np.uint8 and reference.value_range is None:
        raise ValueError(f"The reference images are {reference.images.dtype}; metrics are defined for 8 bits a value.")
    if isinstance(reference.images, UnequalImages) and reference.crop_size is None:
        raise ValueError("The reference images have different sizes; set data.resolution.")
    channels = reference.image_shape[0]
    if channels not in {1, 3}:
        raise ValueError(f"The images have {channels} channels; feature networks take gray (1) or RGB (3).")


def min_images(metric: str, num_features: int) -> int:
    """Return the number of images (samples, and reference images unless the metric has none) that a metric needs."""
    if metric in _FRECHET:
        return num_features + 1
    if metric in _KERNEL:
        return 2 * KERNEL_SUBSET_DIVISOR
    return INCEPTION_SCORE_SPLITS * MIN_SPLIT_SIZE if metric == "inception_score" else NEIGHBORS + 1


def _check_numbers(metrics: Sequence[str], num_features: int, num_samples: int, num_reference: int) -> None:
    for metric in metrics:
        fewest = num_samples if metric == "inception_score" else min(num_samples, num_reference)
        if fewest < (least := min_images(metric, num_features)):
            why = f", one more than the features whose covariance it takes ({num_features})"
            what = "samples" if metric == "inception_score" else "images on each side"
            raise ValueError(
                f"{metric} needs at least {least} {what}{why if metric in _FRECHET else ''}; there are {num_samples} "
                f"samples and {num_reference} reference images. Use more images"
                + (", or use kernel_distance." if metric in _FRECHET else ".")
            )


def frechet_distance(first: Moments, second: Moments) -> float:
    """Return |mu_1 - mu_2|² + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2), in float64. Eq. 6, Heusel et al. 2017.

    The eigenvalues of S_1 S_2 are those of A Aᵀ with A = S_1^(1/2) S_2^(1/2), so the last trace is the sum of the
    singular values of A. Only roots of symmetric matrices are taken: none can turn complex, and directions with almost
    no variance add rounding errors of 1e-16, where the root of an eigenvalue of the product adds 1e-8.

    Raises:
        ValueError: The numbers of features differ, or a covariance is invalid.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"{len(first.mean)} features cannot be compared with {len(second.mean)}.")
    difference = first.mean - second.mean
    roots = _square_root(first), _square_root(second)
    shared = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    distance = difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * shared
    return max(0.0, float(distance))  # equal moments give 0 except for rounding


def _square_root(moments: Moments) -> FloatArray:
    """Return the symmetric square root of a covariance."""
    if not (np.isfinite(moments.mean).all() and np.isfinite(moments.covariance).all()):
        raise ValueError(f"Mean or covariance of the features of {moments.num_images} images is not finite.")
    eigenvalues, vectors = np.linalg.eigh(moments.covariance)
    if eigenvalues[0] < -_MAX_ROUNDING * eigenvalues[-1]:
        raise ValueError(
            f"The covariance of the features of {moments.num_images} images has the eigenvalue {eigenvalues[0]:.3g}; "
            "eigenvalues of a covariance are not negative."
        )
    root: FloatArray = (vectors * np.sqrt(np.maximum(eigenvalues, 0))) @ vectors.T
    return root


def kernel_distance(samples: Features, reference: Features, seed: int) -> tuple[float, float]:
    """Return the squared MMD with the cubic kernel (Binkowski et al. 2018) and its standard error.

    The value is the mean over random subsets, which scatters around the estimate from all pairs; that estimate scatters
    over data sets. The error covers both.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    num_images = min(len(samples), len(reference))
    result = kid_features_to_metric(
        torch.from_numpy(samples),
        torch.from_numpy(reference),
        kid_subsets=KERNEL_SUBSETS,
        kid_subset_size=min(KERNEL_SUBSET_SIZE, num_images // KERNEL_SUBSET_DIVISOR),
        rng_seed=numpy_seed(seed),
        verbose=False,
    )
    variance = kernel_distance_variance(samples, reference) + result[KEY_METRIC_KID_STD] ** 2 / KERNEL_SUBSETS
    return result[KEY_METRIC_KID_MEAN], math.sqrt(variance)


def kernel_distance_variance(samples: Features, reference: Features) -> float:
    """Estimate the variance over data sets of the unbiased squared MMD with the cubic kernel.

    For n samples x and m reference images y, k(x, y) splits into a part of x, a part of y, and an interaction of
    variance c (Hoeffding 1948). With the witness w(x) = E_x' k(x, x') - E_y k(x, y), and likewise of y, the variance is

        4 Var w(x) / n + 4 Var w(y) / m  +  2 c_xx / n^2 + 2 c_yy / m^2 + 4 c_xy / (n m).

    The first two terms dominate where the distributions differ; where they are equal, w is constant and they are 0.

    Args:
        samples: Features (n, d), n at least 4.
        reference: Features (m, d), m at least 4. Of both, the first MAX_KERNEL_IMAGES are used.
    """
    n, m = len(samples), len(reference)
    x, y = samples[:MAX_KERNEL_IMAGES], reference[:MAX_KERNEL_IMAGES]
    mean_xx, c_xx = _kernel_within(x)
    mean_yy, c_yy = _kernel_within(y)
    mean_xy, mean_yx, c_xy = _kernel_between(x, y)
    # Means over few images vary by chance, too. The difference may be negative; the variance is not.
    var_x = float(np.var(mean_xx - mean_xy, ddof=1)) - c_xx / len(x) - c_xy / len(y)
    var_y = float(np.var(mean_yy - mean_yx, ddof=1)) - c_yy / len(y) - c_xy / len(x)
    interaction = 2 * c_xx / n**2 + 2 * c_yy / m**2 + 4 * c_xy / (n * m)
    return max(4 * var_x / n + 4 * var_y / m, 0.0) + interaction


def _kernel_within(x: Features) -> tuple[FloatArray, float]:
    """Return the mean of k(x_i, x_j) over j != i, and an unbiased c_xx (U-centering; Székely and Rizzo 2014)."""
    n, sums, squares = len(x), np.zeros(len(x)), 0.0
    for rows, kernel in _kernel_rows(x, x):
        kernel[np.arange(len(kernel)), np.arange(rows.start, rows.stop)] = 0
        sums[rows] = kernel.sum(axis=1)
        squares += float((kernel**2).sum())
    rest = squares - 2 * float((sums**2).sum()) / (n - 2) + sums.sum() ** 2 / ((n - 1) * (n - 2))
    return sums / (n - 1), float(rest / (n * (n - 3)))


def _kernel_between(x: Features, y: Features) -> tuple[FloatArray, FloatArray, float]:
    """Return the means of k(x_i, y_j) over j, those over i, and an unbiased c_xy (residual of a two-way table)."""
    n, m, over_y, over_x, squares = len(x), len(y), np.zeros(len(x)), np.zeros(len(y)), 0.0
    for rows, kernel in _kernel_rows(x, y):
        over_y[rows] = kernel.mean(axis=1)
        over_x += kernel.sum(axis=0) / n
        squares += float((kernel**2).sum())
    rest = squares - m * (over_y**2).sum() - n * (over_x**2).sum() + n * m * over_y.mean() ** 2
    return over_y, over_x, float(rest / ((n - 1) * (m - 1)))


def _kernel_rows(x: Features, y: Features) -> Iterator[tuple[slice, FloatArray]]:
    """Yield rows of the cubic kernel (x.y / d + 1)^3 in float64. Binkowski et al. 2018."""
    for start in range(0, len(x), _KERNEL_ROWS):
        rows = slice(start, min(start + _KERNEL_ROWS, len(x)))
        yield rows, ((x[rows] @ y.T).astype(np.float64) / x.shape[1] + 1) ** 3


def precision_and_recall(samples: Features, reference: Features, device: torch.device) -> tuple[float, float]:
    """Return the fraction of samples near real images, and the fraction of real images near samples.

    Kynkäänniemi et al. 2019, with VGG-16 features; Dhariwal and Nichol 2021 use Inception features.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    # torch-fidelity computes distances as |x|^2 + |y|^2 - 2 x.y in float32; a large mean would cancel all digits.
    mean = reference.mean(axis=0, dtype=np.float64).astype(np.float32)
    result = prc_features_to_metric(
        torch.from_numpy(samples - mean).to(device),
        torch.from_numpy(reference - mean).to(device),
        prc_neighborhood=NEIGHBORS,
        save_cpu_ram=True,  # in blocks: all distances of 50,000 images are 10 GB
        verbose=False,
    )
    return result["precision"], result["recall"]


def inception_score(network: FeatureNetwork, samples: Features, seed: int) -> tuple[float, float]:
    """Return exp E KL(p(y|x) || p(y)), mean over ten splits of the samples, and its error. Salimans et al. 2016."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    assert isinstance(network.module, InceptionFeatures)
    with torch.no_grad():
        logits = network.module.class_logits(torch.from_numpy(samples).to(network.device)).cpu()
    result = isc_features_to_metric(logits, splits=INCEPTION_SCORE_SPLITS, rng_seed=numpy_seed(seed))
    return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD] / math.sqrt(INCEPTION_SCORE_SPLITS - 1)


def numpy_seed(seed: int) -> int:
    """Return the seed of NumPy's legacy generators, which torch-fidelity uses."""
    return derive_seed(seed, "fidelity") % 2**32
