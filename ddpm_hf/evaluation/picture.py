"""The picture of an evaluation: samples beside real images, and what the likelihood knows of every timestep.

Arrays in, a PNG out.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.evaluation.likelihood import VariationalBound
from ddpm_hf.plots import LINE_COLOR, VALIDATION_COLOR, UInt8Array, image_grid

NUM_COLUMNS = 8
NUM_NEIGHBOURS = 8
DPI = 130


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_rows = 1 if bound is None else 2
    figure = Figure(figsize=(13, 4.6 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(num_rows, 3, squeeze=False)
    _show(axes[0, 0], samples, "samples, not selected")
    _show(axes[0, 1], real, "real images")
    count = min(NUM_NEIGHBOURS, len(neighbours))
    shown = distances[:count]
    pairs = np.concatenate([samples[:count], neighbours[:count]])
    _show(
        axes[0, 2],
        pairs,
        f"samples (top) and their nearest real images\ndistance {shown.min():.3f} to {shown.max():.3f}",
        num_columns=count,
    )
    if bound is not None:
        _draw_errors(axes[1, 0], bound)
        _draw_terms(axes[1, 1], bound)
        _draw_rate(axes[1, 2], bound)
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


def _show(axes: Any, images: UInt8Array, title: str, num_columns: int = NUM_COLUMNS) -> None:
    """Shows a grid of images."""
    axes.imshow(np.asarray(image_grid(images, min(num_columns, len(images)))), interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.axis("off")


def _draw_errors(axes: Any, bound: VariationalBound) -> None:
    """Draws the mean square errors over the timesteps; both have about the same range of values."""
    is_known = bound.counts > 0
    timesteps = np.asarray(bound.timesteps)[is_known]
    axes.plot(timesteps, bound.x_0_mse[is_known], lw=1.4, color=LINE_COLOR, label=r"$x_0$, values in [-1, 1]")
    axes.plot(timesteps, bound.eps_mse[is_known], lw=1.4, color=VALIDATION_COLOR, label=r"$\epsilon$")
    _finish(axes, "error by timestep", "timestep t", "mean square error")
    axes.legend(frameon=False)
    axes.set_yscale("log")


def _draw_terms(axes: Any, bound: VariationalBound) -> None:
    """Draws what each step costs; the last one is the decoder."""
    is_known = (bound.counts > 0) & (bound.terms > 0)
    axes.plot(np.asarray(bound.timesteps)[is_known], bound.terms[is_known], lw=1.4, color=LINE_COLOR)
    _finish(axes, f"the bound, {bound.bits_per_dim:.3f} bits per dimension", "timestep t", "bits per dimension")
    axes.set_yscale("log")


def _draw_rate(axes: Any, bound: VariationalBound) -> None:
    """Draws the progressive code: the error left after so many bits. Fig. 5, Ho et al. 2020."""
    is_known = bound.counts > 0
    axes.plot(bound.rate[is_known], bound.distortion[is_known], lw=1.4, color=LINE_COLOR)
    _finish(axes, "rate and distortion", "bits per dimension sent", "root mean square error, 0 to 255")
    axes.set_ylim(bottom=0)


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    """Labels the axes and draws what helps to read them."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
