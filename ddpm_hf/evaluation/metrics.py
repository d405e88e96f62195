"""FID, KID, inception score, precision and recall.

What can be measured, and how a number is kept; knows neither torch nor diffusers.

The Fréchet distance between two sets of features, each taken for a Gaussian, in float64.

Legend: mu mean, S covariance, d number of features. Dowson and Landau 1982; for images Heusel et al. 2017.

How far a kernel distance (KID) of these images may be from that of all images: its variance over data sets.

How close samples are to real images: FID, KID, Inception Score, precision and recall, and their kin.

FID, KID and Inception Score are names for Inception features alone; the same distances in the features of another
network are called `frechet_distance[NETWORK]` and `kernel_distance[NETWORK]`. Images are compared as uint8, as they
would be saved; published numbers are of 50,000 samples against all training images. A Fréchet distance falls with the
number of images (its bias goes with 1 / number), a kernel distance does not.
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

from ddpm_hf.data import ImageSet
from ddpm_hf.data.image_set import UnequalImages
from ddpm_hf.evaluation.features import (
    Array,
    FeatureNetwork,
    Features,
    InceptionFeatures,
    Moments,
    ReferenceStatistics,
    moments_of,
    open_features,
)
from ddpm_hf.rng import derive_seed

SCHEMA_VERSION = 1
"""Of evaluation.json."""

BITS_PER_DIM = "bits_per_dim"
# What a reader knows each metric as, and which way is better.
TITLES = {
    "fid": ("FID", "lower"),
    "kid": ("KID", "lower"),
    "inception_score": ("Inception Score", "higher"),
    "frechet_distance": ("Fréchet distance", "lower"),
    "kernel_distance": ("kernel distance", "lower"),
    "precision": ("precision", "higher"),
    "recall": ("recall", "higher"),
    BITS_PER_DIM: ("bits per dimension", "lower"),
}
METRICS = tuple(TITLES)
OF_SAMPLES = tuple(name for name in METRICS if name != BITS_PER_DIM)
LOWER_IS_BETTER = tuple(name for name, (_, better) in TITLES.items() if better == "lower")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number with what is needed to compare it.

    Args:
        name: What was measured, with the network in brackets where it is not the one that the metric is known by.
        value: The number.
        standard_error: Of the number, over the choice of images; None where it is not known.
        features: The network, its weights and resize, and the versions of the libraries; None where there is none.
        num_samples: Samples that were judged; of bits per dimension, real images.
        num_reference: Real images that they were compared with; 0 if with none.
    """

    name: str
    value: float
    standard_error: float | None
    features: str | None
    num_samples: int
    num_reference: int


def check_metrics(metrics: Sequence[str], known: Sequence[str] = METRICS) -> None:
    """Refuses metrics that do not exist, and none at all.

    Raises:
        ValueError: With the names that do.
    """
    if not metrics:
        raise ValueError(f"metrics is empty; choose from {', '.join(known)}.")
    for metric in metrics:
        if metric not in known:
            nearest = difflib.get_close_matches(metric, known, n=1)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise ValueError(f"metrics has {metric!r}, which is none{hint}; choose from {', '.join(known)}.")


_LARGEST_ROUNDING = 1e-10
"""Of an eigenvalue, relative to the largest one; float64 and 2048 features stay a hundred times below."""


def frechet_distance(first: Moments, second: Moments) -> float:
    """Returns |mu_1 - mu_2|² + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2). Eq. 6, Heusel et al. 2017.

    The eigenvalues of S_1 S_2 are those of A Aᵀ with A = S_1^(1/2) S_2^(1/2), so the last trace is the sum of the
    singular values of A. Roots are taken of symmetric matrices only: none can turn complex, and directions in which a
    covariance is almost zero add rounding errors of 1e-16, where the root of an eigenvalue of the product adds 1e-8.

    Raises:
        ValueError: The features differ in number, or a covariance is not one.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"{len(first.mean)} features cannot be compared with {len(second.mean)}.")
    difference = first.mean - second.mean
    roots = _square_root(first), _square_root(second)
    shared = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    distance = difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * shared
    return max(0.0, float(distance))  # equal moments give 0 but for rounding


def _square_root(moments: Moments) -> Array:
    """Returns the symmetric square root of a covariance."""
    if not (np.isfinite(moments.mean).all() and np.isfinite(moments.covariance).all()):
        raise ValueError(f"Mean or covariance of the features of {moments.num_images} images is not finite.")
    eigenvalues, vectors = np.linalg.eigh(moments.covariance)
    if eigenvalues[0] < -_LARGEST_ROUNDING * eigenvalues[-1]:
        raise ValueError(
            f"The covariance of the features of {moments.num_images} images has the eigenvalue {eigenvalues[0]:.3g}; "
            "a covariance has none below 0."
        )
    root: Array = (vectors * np.sqrt(np.maximum(eigenvalues, 0))) @ vectors.T
    return root


FloatArray = NDArray[np.float64]

MOST_IMAGES = 10_000
"""Of a side. More tell little, and the work grows with the square of their number."""
_ROWS_AT_ONCE = 1000


def kernel_distance_variance(samples: Features, reference: Features) -> float:
    """Estimates the variance of the squared maximum mean discrepancy with the cubic kernel, unbiased, of all images.

    Of n samples x and m reference images y, k(x, y) splits into what x tells, what y tells, and what both tell only
    together, of variance c (Hoeffding 1948). With the witness w(x) = E_x' k(x, x') - E_y k(x, y), likewise of y, it is

        4 Var w(x) / n + 4 Var w(y) / m  +  2 c_xx / n^2 + 2 c_yy / m^2 + 4 c_xy / (n m).

    The first two terms count where the images differ; where they do not, w is constant, and the others are all.

    Args:
        samples: Features (n, d), n at least 4.
        reference: Features (m, d), m at least 4; of either the first MOST_IMAGES are looked at.
    """
    n, m = len(samples), len(reference)
    x, y = samples[:MOST_IMAGES], reference[:MOST_IMAGES]
    of_x, c_xx = _within(x)
    of_y, c_yy = _within(y)
    between_x, between_y, c_xy = _between(x, y)
    # Means over few images vary by chance, too; less than nothing, which that may leave, is nothing.
    var_x = float(np.var(of_x - between_x, ddof=1)) - c_xx / len(x) - c_xy / len(y)
    var_y = float(np.var(of_y - between_y, ddof=1)) - c_yy / len(y) - c_xy / len(x)
    together = 2 * c_xx / n**2 + 2 * c_yy / m**2 + 4 * c_xy / (n * m)
    return max(4 * var_x / n + 4 * var_y / m, 0.0) + together


def _within(x: Features) -> tuple[FloatArray, float]:
    """Returns the mean of k(x_i, x_j) over all j but i, and an unbiased c_xx (U-centring; Székely and Rizzo 2014)."""
    n, sums, squares = len(x), np.zeros(len(x)), 0.0
    for rows, kernel in _blocks(x, x):
        kernel[np.arange(len(kernel)), np.arange(rows.start, rows.stop)] = 0
        sums[rows] = kernel.sum(axis=1)
        squares += float((kernel**2).sum())
    left = squares - 2 * float((sums**2).sum()) / (n - 2) + sums.sum() ** 2 / ((n - 1) * (n - 2))
    return sums / (n - 1), float(left / (n * (n - 3)))


def _between(x: Features, y: Features) -> tuple[FloatArray, FloatArray, float]:
    """Returns the means of k(x_i, y_j) over j, those over i, and an unbiased c_xy (what two-way tables leave over)."""
    n, m, of_x, of_y, squares = len(x), len(y), np.zeros(len(x)), np.zeros(len(y)), 0.0
    for rows, kernel in _blocks(x, y):
        of_x[rows] = kernel.mean(axis=1)
        of_y += kernel.sum(axis=0) / n
        squares += float((kernel**2).sum())
    left = squares - m * (of_x**2).sum() - n * (of_y**2).sum() + n * m * of_x.mean() ** 2
    return of_x, of_y, float(left / ((n - 1) * (m - 1)))


def _blocks(x: Features, y: Features) -> Iterator[tuple[slice, FloatArray]]:
    """Yields rows of the cubic kernel of Binkowski et al. 2018, (x.y / d + 1)^3, in float64."""
    for start in range(0, len(x), _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, len(x)))
        yield rows, ((x[rows] @ y.T).astype(np.float64) / x.shape[1] + 1) ** 3


# What Inception alone may be asked for, and what the same is called with other features.
_OF_INCEPTION = {"fid": "frechet_distance", "kid": "kernel_distance", "inception_score": None}

KERNEL_SUBSETS = 100
KERNEL_SUBSET_SIZE = 1000
KERNEL_SUBSET_PART = 10
"""Of fewer images than ten times that many, a subset is a tenth; it needs two on each side to be without bias."""
INCEPTION_SCORE_SPLITS = 10
LEAST_IN_A_SPLIT = 100
"""Of the Inception Score, which is at most the number of images in a split: of one image it is 1, whatever it shows."""
NEIGHBOURS = 3
"""Of precision and recall; Kynkäänniemi et al. 2019."""


def measure_fidelity(
    samples: NDArray[np.uint8],
    reference: ImageSet,
    *,
    metrics: Sequence[str] = ("fid", "kid", "inception_score", "precision", "recall"),
    features: str = "inception",
    weights: Path | None = None,
    batch_size: int = 64,
    device: torch.device,
    cache_dir: Path | None = None,
    seed: int = 0,
) -> list[Metric]:
    """Compares samples with real images.

    Args:
        samples: uint8 (number, height, width, channels), an array in memory or on the disk.
        reference: Real images of the same size, un-augmented; for published numbers, all that the network trained on.
        metrics: Names from OF_SAMPLES.
        features: The network; see `open_features`.
        weights: The file of the weights of Inception, where it is not in torch's cache and cannot be downloaded.
        batch_size: Images of one forward.
        device: Where the network runs.
        cache_dir: Where statistics of the reference are kept; None takes a folder in the cache of the user.
        seed: Of the subsets of kernel distances and the splits of the Inception Score.

    Returns:
        The scores, in the order of `metrics`.

    Raises:
        ImportError: A library is missing.
        ValueError: Metrics, features and images do not fit together, or there are too few images.
    """
    _check_metrics(metrics, features)
    _check_images(samples, reference)
    network = open_features(features, weights, device)
    take = lambda positions: samples[positions.start : positions.stop].transpose(0, 3, 1, 2)  # noqa: E731
    dimension = network.features_of(1, take, 1, "samples").shape[1]
    _check_numbers(metrics, dimension, len(samples), len(reference))
    statistics = ReferenceStatistics(network, reference, batch_size, cache_dir)
    of_samples = network.features_of(len(samples), take, batch_size, "samples")
    values = _values(set(metrics), network, of_samples, statistics, seed)
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


def _values(
    metrics: set[str], network: FeatureNetwork, samples: Features, reference: ReferenceStatistics, seed: int
) -> dict[str, tuple[float, float | None]]:
    """Returns value and standard error of metrics, each under all its names."""
    values: dict[str, tuple[float, float | None]] = {}
    # Features before moments, which then need not be computed from features of their own.
    if metrics & {"kid", "kernel_distance"}:
        values["kid"] = values["kernel_distance"] = _kernel_distance(samples, reference.features(), seed)
    if metrics & {"precision", "recall"}:
        values |= _precision_and_recall(samples, reference.features(), network.device)
    if metrics & {"fid", "frechet_distance"}:
        distance = frechet_distance(moments_of(samples), reference.moments())
        values["fid"] = values["frechet_distance"] = distance, None
    if "inception_score" in metrics:
        values["inception_score"] = _inception_score(network, samples, seed)
    return values


def check_fidelity(
    metrics: Sequence[str],
    image_shape: tuple[int, int, int],
    num_samples: int,
    num_reference: int,
    *,
    features: str = "inception",
    weights: Path | None = None,
    device: torch.device,
) -> None:
    """Refuses what `measure_fidelity` would refuse, before any sample is drawn; opens the network for it.

    Args:
        metrics: As in `measure_fidelity`.
        image_shape: Channels, height and width of the samples.
        num_samples: Samples that will be drawn.
        num_reference: Real images.
        features: As in `measure_fidelity`.
        weights: As in `measure_fidelity`.
        device: As in `measure_fidelity`.

    Raises:
        ValueError: As `measure_fidelity`; also where a library is missing.
    """
    _check_metrics(metrics, features)
    if set(metrics) - {"fid", "frechet_distance"} and importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError(f'{", ".join(metrics)} need torch-fidelity; install it with pip install "ddpm_hf[eval]".')
    try:
        network = open_features(features, weights, device)
    except ImportError as error:
        raise ValueError(str(error)) from error
    gray = np.full((1, *image_shape), 128, np.uint8)
    dimension = network.features_of(1, lambda _: gray, 1, "samples").shape[1]
    _check_numbers(metrics, dimension, num_samples, num_reference)


def _full_name(metric: str, features: str) -> str:
    """Returns the name of a metric, which tells its network unless it is Inception's own."""
    is_plain = metric in _OF_INCEPTION or (features == "inception" and metric in {"precision", "recall"})
    return metric if is_plain else f"{metric}[{features}]"


def _check_metrics(metrics: Sequence[str], features: str) -> None:
    """Refuses unknown metrics, and names of Inception's own with other features."""
    check_metrics(metrics, OF_SAMPLES)
    for metric in metrics:
        if metric in _OF_INCEPTION and features != "inception":
            other = _OF_INCEPTION[metric]
            raise ValueError(
                f"metrics has {metric}, which is defined with Inception features, but features is {features}; "
                + (f"ask for {other}." if other else "leave it out.")
            )


def _check_images(samples: NDArray[np.uint8], reference: ImageSet) -> None:
    """Refuses images that are not 8 bits of one size, gray or RGB, on both sides."""
    if not isinstance(samples, np.ndarray) or samples.dtype != np.uint8 or samples.ndim != 4:
        given = f"{samples.dtype} {samples.shape}" if isinstance(samples, np.ndarray) else type(samples).__name__
        raise ValueError(
            f"samples must be one uint8 array (number, height, width, channels), all of one size; got {given}."
        )
    if len(reference) == 0 or len(samples) == 0:
        raise ValueError(f"There are {len(samples)} samples and {len(reference)} reference images; give some of both.")
    check_reference(reference)
    _, height, width, channels = samples.shape
    theirs = reference.image_shape
    if (channels, height, width) != theirs:
        raise ValueError(
            f"The samples have {width}x{height} pixels and {channels} channels, the reference images "
            f"{theirs[2]}x{theirs[1]} and {theirs[0]}; open the reference with the resolution and channels of the "
            "samples."
        )


def check_reference(reference: ImageSet) -> None:
    """Refuses real images that no network for features sees: they have 8 bits, one size, and are gray or RGB.

    Raises:
        ValueError: With what to do.
    """
    if reference.images.dtype != np.uint8:
        raise ValueError(f"The reference images are {reference.images.dtype}; metrics are defined for 8 bits a value.")
    if isinstance(reference.images, UnequalImages) and reference.crop_size is None:
        raise ValueError("The reference images are of several sizes; open them with data.resolution.")
    channels = reference.image_shape[0]
    if channels not in {1, 3}:
        raise ValueError(f"The images have {channels} channels; networks for features see gray (1) or RGB (3).")


def _check_numbers(metrics: Sequence[str], dimension: int, num_samples: int, num_reference: int) -> None:
    """Refuses fewer images than a metric needs, before the work begins."""
    frechet, kernel = {"fid", "frechet_distance"}, {"kid", "kernel_distance"}
    least = {name: dimension + 1 for name in frechet} | {name: 2 * KERNEL_SUBSET_PART for name in kernel}
    least |= {"precision": NEIGHBOURS + 1, "recall": NEIGHBOURS + 1}
    least |= {"inception_score": INCEPTION_SCORE_SPLITS * LEAST_IN_A_SPLIT}
    for metric in metrics:
        fewest = num_samples if metric == "inception_score" else min(num_samples, num_reference)
        if fewest < least[metric]:
            why = f", one more than the features whose covariance it takes ({dimension})" if metric in frechet else ""
            what = "samples" if metric == "inception_score" else "images on each side"
            raise ValueError(
                f"{metric} needs at least {least[metric]} {what}{why}; there are {num_samples} samples "
                f"and {num_reference} reference images. Take more images"
                + (", or ask for kernel_distance." if metric in frechet else ".")
            )


def _kernel_distance(samples: Features, reference: Features, seed: int) -> tuple[float, float]:
    """Returns the squared maximum mean discrepancy with the cubic kernel (Binkowski et al. 2018), and its error.

    It is the mean over random subsets of 1000 images, or of a tenth of fewer, whose means scatter about that of all
    subsets; and that one, which uses all pairs, scatters over data sets.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    fewest = min(len(samples), len(reference))
    size = min(KERNEL_SUBSET_SIZE, fewest // KERNEL_SUBSET_PART)
    result = kid_features_to_metric(
        torch.from_numpy(samples),
        torch.from_numpy(reference),
        kid_subsets=KERNEL_SUBSETS,
        kid_subset_size=size,
        rng_seed=_numpy_seed(seed),
        verbose=False,
    )
    variance = kernel_distance_variance(samples, reference) + result[KEY_METRIC_KID_STD] ** 2 / KERNEL_SUBSETS
    return result[KEY_METRIC_KID_MEAN], math.sqrt(variance)


def _precision_and_recall(
    samples: Features, reference: Features, device: torch.device
) -> dict[str, tuple[float, None]]:
    """Returns which part of the samples lies among the real images, and the reverse.

    Kynkäänniemi et al. 2019, who take features of VGG-16; those of Inception are what Dhariwal and Nichol 2021 take.
    The library computes distances as |x|^2 + |y|^2 - 2 x.y in float32, which a large mean of the features would drown.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    mean = reference.mean(axis=0, dtype=np.float64).astype(np.float32)
    result = prc_features_to_metric(
        torch.from_numpy(samples - mean).to(device),
        torch.from_numpy(reference - mean).to(device),
        prc_neighborhood=NEIGHBOURS,
        save_cpu_ram=True,  # blocks, not all distances at once, which are 10 GB for 50,000 images
        verbose=False,
    )
    return {name: (result[name], None) for name in ("precision", "recall")}


def _inception_score(network: FeatureNetwork, samples: Features, seed: int) -> tuple[float, float]:
    """Returns exp E KL(p(y|x) || p(y)), mean over ten parts of the samples, and its error. Salimans et al. 2016."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    assert isinstance(network.module, InceptionFeatures)
    with torch.no_grad():
        logits = network.module.class_logits(torch.from_numpy(samples).to(network.device)).cpu()
    result = isc_features_to_metric(logits, splits=INCEPTION_SCORE_SPLITS, rng_seed=_numpy_seed(seed))
    return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD] / math.sqrt(INCEPTION_SCORE_SPLITS - 1)


def _numpy_seed(seed: int) -> int:
    """Returns a seed that NumPy's older generators take."""
    return derive_seed(seed, "fidelity") % 2**32
