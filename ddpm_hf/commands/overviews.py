"""The overviews beside the pictures of `ddpm-hf sample`: a labelled grid, a strip and a film of the way from noise."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.commands.sample_pictures import Picture
from ddpm_hf.plots import UInt8Array, image_grid

if TYPE_CHECKING:
    from PIL import Image

MOST_IN_GRID, MOST_COLUMNS, MOST_ROWS = 100, 20, 10
COVERED = 127  # what a mask covers is shown gray


def in_grid(pictures: Sequence[Picture]) -> list[Picture]:
    """Returns those that a grid shows: the first ones, or the first seeds of the first given images."""
    if pictures[0].source is None:
        return list(pictures[:MOST_IN_GRID])
    seeds = [picture.seed for picture in pictures if picture.source == 0][: MOST_COLUMNS - 1]
    return [picture for picture in pictures if (picture.source or 0) < MOST_ROWS and picture.seed in seeds]


def grid(images: Mapping[Picture, UInt8Array]) -> "Image.Image":
    """Shows images with the names of their classes above the columns, as far as these are few.

    Args:
        images: uint8 (height, width, channels) each.
    """
    by_label: dict[int | None, list[UInt8Array]] = {}
    names = {}
    for picture, image in sorted(images.items(), key=lambda item: -1 if item[0].label is None else item[0].label):
        by_label.setdefault(picture.label, []).append(image)
        names[picture.label] = picture.class_name or ("" if picture.label is None else f"label {picture.label}")
    if len(by_label) > MOST_COLUMNS:
        by_label, names = {None: list(images.values())}, {None: ""}
    # A label has as many columns as make the whole about square.
    width = max(1, math.ceil(math.sqrt(len(images)) / len(by_label)))
    width = min(width, max(map(len, by_label.values())))
    num_rows = max(-(-len(column) // width) for column in by_label.values())
    blank = np.full_like(next(iter(images.values())), 255)
    blocks = [column + [blank] * (num_rows * width - len(column)) for column in by_label.values()]
    cells = [block[row * width + place] for row in range(num_rows) for block in blocks for place in range(width)]
    labels = [names[label] for label in by_label for _ in range(width)]
    return image_grid(np.stack(cells), len(labels), column_labels=labels if any(labels) else None)


def grid_of_edits(
    images: Mapping[Picture, UInt8Array], starts: NDArray[np.float32], masks: NDArray[np.bool_] | None
) -> "Image.Image":
    """Shows each given image in a row with what became of it.

    Args:
        images: uint8 (height, width, channels) each; of each given image the same seeds, in one order.
        starts: The given images, (number, height, width, channels) in [0, 1].
        masks: Where they were filled, one for all or one for each, (number, height, width).
    """
    seeds = list(dict.fromkeys(picture.seed for picture in images))
    drawn = iter(images.values())
    cells = []
    for index, start in enumerate(starts[: len(images) // len(seeds)]):
        given = np.rint(start * 255).astype(np.uint8)
        if masks is not None:
            given = np.where(masks[index % len(masks), ..., None], np.uint8(COVERED), given)
        cells += [given, *(next(drawn) for _ in seeds)]
    return image_grid(np.stack(cells), len(seeds) + 1, column_labels=["given", *(f"seed {seed}" for seed in seeds)])
