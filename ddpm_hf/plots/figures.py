"""What all figures share: colours, how they are saved, and axes that look alike.

Figures have an Agg canvas of their own and never touch pyplot, so a plot changes nothing in its caller's session.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Float64Array: TypeAlias = npt.NDArray[np.float64]

LINE_COLOR, VALIDATION_COLOR = "#1f5a94", "#c4541b"
COLORS = (LINE_COLOR, VALIDATION_COLOR, "#2f8f5b", "#8a4fa3", "#b08a1e", "#c2517c", "#3ba0b8", "#666666")
LINE_STYLES = ("-", "--", "-.", ":")
DPI = 130
LONGEST_NAME = 40


def new_figure(width: float, height: float) -> Any:
    """Returns an empty matplotlib figure.

    Args:
        width: In inches, of DPI pixels each.
        height: Likewise.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Writes a PNG that depends on the figure alone, not on the version of matplotlib that its metadata would name."""
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


def finish_axes(axes: Any, x: str, y: str) -> None:
    """Labels the axes and draws what helps to read them."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def count_steps(axes: Any, num_ticks: int = 7) -> None:
    """Makes the x axis one of optimiser steps from 0 on: the place of a few points then says how far a run was."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=num_ticks, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(left=0)


def use_log_axis_if_wide(axes: Any, values: npt.ArrayLike) -> None:
    """Makes the y axis logarithmic where the finite values are positive and the largest is over 5 times the smallest.

    Within three decades the ticks are plain numbers at 1, 2 and 5; beyond them powers of ten.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    if not known.size or not 0 < 5 * known.min() < known.max():
        return
    axes.set_yscale("log")
    if known.max() < 1000 * known.min():
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())


def add_legend(owner: Any, lines: Sequence[Any], names: Sequence[str], **options: Any) -> None:
    """Names lines, as they are: no dollar sign is mathematics, no underscore hides a name, a long one loses its middle.

    Args:
        owner: Axes or a figure.
        lines: What to name.
        names: One for each.
        **options: Of matplotlib's legend.
    """
    legend = owner.legend(lines, [str(number) for number in range(len(lines))], frameon=False, **options)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(shortened(name))


def shortened(name: str) -> str:
    """Cuts the middle out of a name that is too long for a legend."""
    if len(name) <= LONGEST_NAME:
        return name
    half = LONGEST_NAME // 2
    return f"{name[: half - 1]}…{name[-half:]}"


def moving_average(values: Float64Array, width: int) -> Float64Array:
    """Averages each value with up to `width` neighbours on each side, never more after it than before it.

    So the steep beginning is not averaged away, and the last values are not followed one by one.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    before = np.minimum(width, index)
    after = np.minimum(before, len(values) - 1 - index)
    averages: Float64Array = (sums[index + after + 1] - sums[index - before]) / (before + after + 1)
    return averages


def bin_means(values: npt.ArrayLike, counts: npt.ArrayLike, num_bins: int) -> Float64Array:
    """Returns means over neighbouring values, weighted by how many images each was computed for.

    Args:
        values: One for each step of a chain; of no meaning where the count is 0.
        counts: As many.
        num_bins: At most this many means; bins without an image are left out.
    """
    weights = np.asarray(counts, np.float64)
    known = np.where(weights > 0, np.asarray(values, np.float64), 0.0)
    bins = np.arange(len(weights)) * min(num_bins, len(weights)) // len(weights)
    totals, sums = np.bincount(bins, weights), np.bincount(bins, weights * known)
    return np.asarray(sums[totals > 0] / totals[totals > 0])
