"""How far images are from each other, pixel by pixel."""

import numpy as np
from numpy.typing import NDArray


def pixel_rows(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Returns one row of pixel values an image, in float64, in which sums of their squares are exact."""
    return images.reshape(len(images), -1).astype(np.float64)


def squared_distances(rows: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns all sums of squared differences of `pixel_rows`, (rows, others), exactly 0 for equal images."""
    squares: NDArray[np.float64] = (rows**2).sum(axis=1)[:, None] + (others**2).sum(axis=1) - 2 * rows @ others.T
    return squares
