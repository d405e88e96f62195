"""The overviews beside the pictures of `ddpm-hf sample`: a labelled grid, a strip and a film of the way from noise."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.commands.sample_pictures import Picture
from ddpm_hf.plots import UInt8Array, image_grid

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ddpm_hf.diffusion import GaussianDiffusionPipeline

MOST_IN_GRID, MOST_COLUMNS, MOST_ROWS = 100, 20, 10
NUM_FRAMES = 40
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


class Film:
    """Keeps some states of a run as 8-bit pictures, since all of them might not fit into memory."""

    def __init__(self, num_steps: int) -> None:
        count = min(num_steps + 1, NUM_FRAMES)
        self._wanted = {round(frame * num_steps / (count - 1)) for frame in range(count)}
        self._states: list[UInt8Array] = []

    def begin(self, pipeline: "GaussianDiffusionPipeline", generators: "list[torch.Generator]") -> "torch.Tensor":
        """Draws the start noise, as a call of the pipeline would, and returns it."""
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        from ddpm_hf.evaluation.sampling import image_shape

        height, width, channels = image_shape(pipeline)
        dtype = torch.promote_types(torch.float32, pipeline.unet.dtype)
        shape = (len(generators), channels, height, width)
        noise: torch.Tensor = randn_tensor(shape, generator=generators, device=pipeline.device, dtype=dtype)
        self._keep(noise)
        return noise

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: "dict[str, torch.Tensor]") -> dict[str, Any]:
        """Is called after each step of the run."""
        if step + 1 in self._wanted:
            self._keep(tensors["sample"])
        return {}

    def states(self) -> UInt8Array:
        """Returns what was kept, (frames, number, height, width, channels)."""
        return np.stack(self._states)

    def _keep(self, sample: "torch.Tensor") -> None:
        from ddpm_hf.diffusion.images import to_images

        self._states.append(to_images(sample, "uint8"))
