"""The Fréchet distance between two sets of features, each taken for a Gaussian, in float64.

Legend: mu mean, S covariance, d number of features. Dowson and Landau 1982; for images Heusel et al. 2017.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_ROWS_AT_ONCE = 4096
_LARGEST_ROUNDING = 1e-10
"""Of an eigenvalue, relative to the largest one; float64 and 2048 features stay a hundred times below."""


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) of the features of `num_images` images."""

    mean: Array
    covariance: Array
    num_images: int


def moments_of(features: NDArray[np.floating]) -> Moments:
    """Returns mean and covariance (with num_images - 1) of features (num_images, d).

    Raises:
        ValueError: There are not more images than features, so that the covariance would have no full rank.
    """
    num_images, dimension = features.shape
    if num_images <= dimension:
        raise ValueError(
            f"A covariance of {dimension} features needs more than {dimension} images; there are {num_images}."
        )
    # Twice through the features: the difference of two large sums would lose what is left of the digits.
    parts = range(0, num_images, _ROWS_AT_ONCE)
    mean = np.sum([features[row : row + _ROWS_AT_ONCE].sum(axis=0, dtype=np.float64) for row in parts], axis=0)
    mean /= num_images
    covariance = np.zeros((dimension, dimension))
    for row in parts:
        centered = features[row : row + _ROWS_AT_ONCE] - mean
        covariance += centered.T @ centered
    return Moments(mean, covariance / (num_images - 1), num_images)


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
