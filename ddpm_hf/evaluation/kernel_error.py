"""How far a kernel distance (KID) of these images may be from that of all images: its variance over data sets."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.evaluation.feature_network import Features

Array = NDArray[np.float64]

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


def _within(x: Features) -> tuple[Array, float]:
    """Returns the mean of k(x_i, x_j) over all j but i, and an unbiased c_xx (U-centring; Székely and Rizzo 2014)."""
    n, sums, squares = len(x), np.zeros(len(x)), 0.0
    for rows, kernel in _blocks(x, x):
        kernel[np.arange(len(kernel)), np.arange(rows.start, rows.stop)] = 0
        sums[rows] = kernel.sum(axis=1)
        squares += float((kernel**2).sum())
    left = squares - 2 * float((sums**2).sum()) / (n - 2) + sums.sum() ** 2 / ((n - 1) * (n - 2))
    return sums / (n - 1), float(left / (n * (n - 3)))


def _between(x: Features, y: Features) -> tuple[Array, Array, float]:
    """Returns the means of k(x_i, y_j) over j, those over i, and an unbiased c_xy (what two-way tables leave over)."""
    n, m, of_x, of_y, squares = len(x), len(y), np.zeros(len(x)), np.zeros(len(y)), 0.0
    for rows, kernel in _blocks(x, y):
        of_x[rows] = kernel.mean(axis=1)
        of_y += kernel.sum(axis=0) / n
        squares += float((kernel**2).sum())
    left = squares - m * (of_x**2).sum() - n * (of_y**2).sum() + n * m * of_x.mean() ** 2
    return of_x, of_y, float(left / ((n - 1) * (m - 1)))


def _blocks(x: Features, y: Features) -> Iterator[tuple[slice, Array]]:
    """Yields rows of the cubic kernel of Binkowski et al. 2018, (x.y / d + 1)^3, in float64."""
    for start in range(0, len(x), _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, len(x)))
        yield rows, ((x[rows] @ y.T).astype(np.float64) / x.shape[1] + 1) ** 3
