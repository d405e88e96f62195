"""Which real image a sample is nearest to, pixel by pixel: what a network that learned by heart would give away."""

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_hf.data import ImageSet, to_uint8
from ddpm_hf.evaluation.pixel_distance import pixel_rows, squared_distances

IMAGES_AT_ONCE = 1024


def nearest_images(
    samples: NDArray[np.uint8], images: ImageSet
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float64]]:
    """Finds the nearest image of a set for each sample.

    Args:
        samples: uint8 (number, height, width, channels).
        images: A set of images of that size, streamed over.

    Returns:
        The nearest images, like the samples; their positions in the set; their distances, root mean square over the
        values, in [0, 1].
    """
    rows = pixel_rows(samples)
    smallest = np.full(len(rows), np.inf)
    positions = np.zeros(len(rows), np.int64)
    for start in tqdm(range(0, len(images), IMAGES_AT_ONCE), "Nearest images", disable=None, leave=False):
        others = pixel_rows(real_images(images, images.positions[start : start + IMAGES_AT_ONCE]))
        squares = squared_distances(rows, others)
        best = squares.argmin(axis=1)
        found = squares[np.arange(len(rows)), best]
        is_nearer = found < smallest
        smallest[is_nearer], positions[is_nearer] = found[is_nearer], best[is_nearer] + start
    return real_images(images, positions), positions, np.sqrt(smallest / rows.shape[1]) / 255


def real_images(images: ImageSet, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Returns images of a set as samples are: uint8 (number, height, width, channels)."""
    return np.ascontiguousarray(to_uint8(images.take(positions)[0]).transpose(0, 2, 3, 1))
