"""The picture of an evaluation: samples beside real images, and what the likelihood knows of every timestep.

Arrays in, a PNG out.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.evaluation.likelihood import VariationalBound
from ddpm_hf.plots import LINE_COLOR, VALIDATION_COLOR, UInt8Array, image_grid
from ddpm_hf.plots.figures import bin_means, finish_axes, new_figure, save_figure

NUM_COLUMNS = 8
NUM_NEIGHBOURS = 4 * NUM_COLUMNS
NUM_BINS = 100
FAINT = 0.25


def draw_evaluation(
    path: Path,
    *,
    samples: UInt8Array,
    real: UInt8Array,
    neighbours: UInt8Array,
    distances: NDArray[np.float64],
    bound: VariationalBound | None,
    title: str,
) -> None:
    """Draws samples, real images and nearest ones in a row, and below it, where there is a bound, its curves.

    Args:
        path: Where to write a PNG.
        samples: uint8 (number, height, width, channels).
        real: Real images, drawn at random.
        neighbours: The nearest real image of each of the first samples.
        distances: How far these are, root mean square in [0, 1].
        bound: The variational bound.
        title: What was evaluated.
    """
    num_rows = 1 if bound is None else 2
    figure = new_figure(13, 4.6 * num_rows)
    figure.suptitle(title)
    axes = figure.subplots(num_rows, 3, squeeze=False)
    _show(axes[0, 0], samples, "samples, not selected")
    _show(axes[0, 1], real, "real images")
    reach = f"{distances.min():.3f} to {distances.max():.3f}"
    title_of_pairs = f"samples and, below each, the nearest real image\ndistance {reach}"
    _show(axes[0, 2], _in_pairs_of_rows(samples[: len(neighbours)], neighbours), title_of_pairs)
    if bound is not None:
        _draw_errors(axes[1, 0], bound)
        _draw_terms(axes[1, 1], bound)
        _draw_rate(axes[1, 2], bound)
    save_figure(figure, path)


def _in_pairs_of_rows(upper: UInt8Array, lower: UInt8Array) -> UInt8Array:
    """Returns images so that a grid shows a row of the one and below it a row of the other."""
    rows = [
        images[start : start + NUM_COLUMNS] for start in range(0, len(upper), NUM_COLUMNS) for images in (upper, lower)
    ]
    return np.concatenate(rows)


def _show(axes: Any, images: UInt8Array, title: str) -> None:
    """Shows a grid of images."""
    axes.imshow(np.asarray(image_grid(images, min(NUM_COLUMNS, len(images)))), interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.axis("off")


def binned(values: NDArray[np.float64], bound: VariationalBound) -> NDArray[np.float64]:
    """Returns means over at most NUM_BINS stretches of the chain, in its order, weighted by images.

    Of a bound that is estimated from a few terms an image, most steps have seen few images.
    """
    return bin_means(values, bound.counts, NUM_BINS)


def _draw_by_timestep(axes: Any, values: NDArray[np.float64], bound: VariationalBound, color: str, label: str) -> None:
    """Draws values over the timesteps: each faintly, their means in front."""
    is_known = bound.counts > 0
    timesteps = np.asarray(bound.timesteps, np.float64)
    axes.plot(timesteps[is_known], values[is_known], lw=0.8, color=color, alpha=FAINT)
    axes.plot(binned(timesteps, bound), binned(values, bound), lw=1.6, color=color, label=label)


def _draw_errors(axes: Any, bound: VariationalBound) -> None:
    """Draws the mean square errors over the timesteps; both have about the same range of values."""
    _draw_by_timestep(axes, bound.x_0_mse, bound, LINE_COLOR, "x0, values in [-1, 1]")
    _draw_by_timestep(axes, bound.eps_mse, bound, VALIDATION_COLOR, "eps")
    _finish(axes, "error by timestep", "timestep t", "mean square error")
    axes.set_yscale("log")
    axes.legend(frameon=False)


def _draw_terms(axes: Any, bound: VariationalBound) -> None:
    """Draws what each step costs; the last one is the decoder."""
    _draw_by_timestep(axes, bound.terms, bound, LINE_COLOR, "")
    _finish(axes, f"the bound, {bound.bits_per_dim:.3f} bits per dimension", "timestep t", "bits per dimension a step")
    axes.set_yscale("log")


def _draw_rate(axes: Any, bound: VariationalBound) -> None:
    """Draws the progressive code: the error left after so many bits. Fig. 5, Ho et al. 2020."""
    axes.plot(binned(bound.rate, bound), binned(bound.distortion, bound), lw=1.6, color=LINE_COLOR)
    _finish(axes, "rate and distortion", "bits per dimension sent", "root mean square error, 0 to 255")
    axes.set_ylim(bottom=0)


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    """Labels the axes and draws what helps to read them."""
    axes.set_title(title, fontsize=10)
    finish_axes(axes, x, y)
