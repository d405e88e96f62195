"""Curves of runs: losses over the steps, runs side by side, losses by timestep.

Rows of metrics are those of metrics.jsonl: a mapping with the step and whatever was measured then, None where that was
not finite. Values that are no finite numbers are counted in the legend, not drawn. The loss of a quartile is None too
where none of its timesteps was drawn, which nobody counts: it is known by a loss of that step that is a number.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ddpm_hf.plots.figures import (
    COLORS,
    LINE_COLOR,
    LINE_STYLES,
    VALIDATION_COLOR,
    Float64Array,
    add_legend,
    bin_means,
    count_steps,
    finish_axes,
    moving_average,
    new_figure,
    save_figure,
    use_log_axis_if_wide,
)

Rows: TypeAlias = Sequence[Mapping[str, Any]]

FEWEST_TO_SMOOTH = 20
NUM_BINS = 100
FAINT = 0.3
KEY_COLOR = "#555555"
# From data to noise, dark to light.
QUARTILE_COLORS = ("#0d2f52", "#2a6aa8", "#5fa3cf", "#e0a12e")
QUARTILES = (r"$t < T/4$", r"$T/4 \leq t < T/2$", r"$T/2 \leq t < 3T/4$", r"$3T/4 \leq t$")


def loss_curve(
    steps: Sequence[int],
    losses: Sequence[float],
    path: Path,
    *,
    validation_steps: Sequence[int] = (),
    validation_losses: Sequence[float] = (),
) -> None:
    """Draws the training loss over the steps: every value faintly, a moving average in front.

    Args:
        steps: Optimiser steps, ascending.
        losses: The loss of each of these steps; values that are not finite are counted in the legend, not drawn.
        path: Where to write a PNG.
        validation_steps: Steps at which the validation loss was measured.
        validation_losses: The validation loss of each of these steps.

    Raises:
        ValueError: If there is no loss, or not one for each step.
    """
    if not losses or len(steps) != len(losses) or len(validation_steps) != len(validation_losses):
        raise ValueError(
            f"A loss curve needs one loss a step; got {len(steps)} steps with {len(losses)} losses and "
            f"{len(validation_steps)} validation steps with {len(validation_losses)} losses."
        )
    figure = _loss_figure(steps, losses, validation_steps, validation_losses)
    save_figure(figure, path)


def training_curves(runs: Mapping[str, Rows], path: Path) -> None:
    """Draws the losses of several runs on one axis, and below it each kind of score that one of them has.

    A run has a colour: its training loss is a faint line with its moving average in front, its validation loss dashed
    with a mark at each measurement. Runs need not have the same columns or steps.

    Args:
        runs: The rows of metrics of each run. Names are shown as they are.
        path: Where to write a PNG.

    Raises:
        ValueError: If there is no run, or one has none of loss, validation_loss and score.
    """
    save_figure(_training_figure(runs), path)


def timestep_curves(path: Path, *, metrics: Rows = (), bound: Mapping[str, Any] | None = None) -> None:
    """Draws what one run says of its loss at different timesteps, a panel for each of these that is known.

    The loss in each quartile of the timesteps over the optimiser steps; the mean square errors of x_0 and of epsilon
    over the timesteps; and the terms of the variational bound.

    Args:
        path: Where to write a PNG.
        metrics: The rows of metrics, of which `loss_q0` to `loss_q3` are shown.
        bound: What evaluation.json holds under that name: `timesteps`, `x_0_mse`, `eps_mse`, `terms` and `counts`, one
            number for each step of the chain.

    Raises:
        ValueError: If nothing is known, or the bound has not one number for each of its timesteps.
    """
    save_figure(_timestep_figure(metrics, bound), path)


def points(rows: Rows, name: str) -> tuple[Float64Array, Float64Array, int]:
    """Returns the steps and values of a metric where it is a finite number, and how often it was anything else."""
    measured = [(row["step"], row[name]) for row in rows if name in row]
    pairs = [pair for pair in measured if all(_is_finite(number) for number in pair)]
    table = np.asarray(pairs, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1], len(measured) - len(pairs)


def _quartile_points(rows: Rows, name: str) -> tuple[Float64Array, Float64Array, int]:
    """Returns the same for the loss of a quartile, leaving out uncounted where none of its timesteps was drawn."""
    return points([row for row in rows if row.get(name) is not None or not _is_finite(row.get("loss"))], name)


def _is_finite(value: object) -> bool:
    """Says whether a value of JSON is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _loss_figure(
    steps: Sequence[int], losses: Sequence[float], validation_steps: Sequence[int], validation_losses: Sequence[float]
) -> Any:
    """Returns the matplotlib figure of `loss_curve`."""
    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    values = np.asarray(losses, np.float64)
    finite = np.isfinite(values)
    raw, average = _draw_smoothed(axes, np.asarray(steps)[finite], values[finite], LINE_COLOR)
    num_left_out = int((~finite).sum())
    raw.set_label(f"training loss{f' ({num_left_out} not finite)' if num_left_out else ''}")
    if average is not raw:
        average.set_label("moving average")
    if validation_steps:
        axes.plot(
            validation_steps, validation_losses, "o-", ms=4, lw=1.5, color=VALIDATION_COLOR, label="validation loss"
        )
    known = np.asarray([*losses, *validation_losses], np.float64)
    _finish_curves(axes, known, "loss")
    # The place of a single point says how large its loss is.
    if (known := known[np.isfinite(known)]).size == 1:
        axes.set_ylim(bottom=min(0.0, known[0]))
    axes.legend(frameon=False)
    return figure


def _draw_smoothed(
    axes: Any, steps: Float64Array, values: Float64Array, color: str, style: str = "-"
) -> tuple[Any, Any]:
    """Draws values faintly and their moving average, over about a fiftieth of the curve, in front; few as they are.

    Returns:
        The line of the values and the line in front, which are the same where there are few.
    """
    if values.size < FEWEST_TO_SMOOTH:
        (line,) = axes.plot(steps, values, "o", ls=style, ms=3, lw=1.5, color=color)
        return line, line
    (raw,) = axes.plot(steps, values, lw=0.8, color=color, alpha=FAINT, zorder=1.9)
    smooth = moving_average(values, max(3, values.size // 50))
    (average,) = axes.plot(steps, smooth, ls=style, lw=1.8, color=color)
    return raw, average


def _finish_curves(axes: Any, values: Float64Array, y: str) -> None:
    """Labels the axes of curves over the steps, logarithmic if they span a wide range."""
    use_log_axis_if_wide(axes, values)
    finish_axes(axes, "optimiser step", y)
    count_steps(axes)


def _training_figure(runs: Mapping[str, Rows]) -> Any:
    """Returns the matplotlib figure of `training_curves`."""
    if not runs:
        raise ValueError("runs is empty; give the rows of metrics of at least one.")
    for name, rows in runs.items():
        if not any(points(rows, column)[0].size for column in ("loss", "validation_loss", "score")):
            raise ValueError(
                f"The metrics of {name} hold no loss, validation_loss or score that is a finite number; give those of "
                "a run that went well."
            )
    kinds = sorted({kind for rows in runs.values() for row in rows if (kind := _score_kind(row)) is not None})
    figure = new_figure(7.2, 4.2 + 2.6 * len(kinds))
    heights = [4.2, *[2.6] * len(kinds)]
    panels = figure.subplots(len(heights), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    _draw_runs(panels[0], runs)
    for axes, kind in zip(panels[1:], kinds, strict=True):
        _draw_scores(axes, runs, kind)
    for axes in panels[:-1]:
        axes.set_xlabel("")
    return figure


def _style_of_run(index: int) -> tuple[str, str]:
    """Returns a colour, and a style of lines that changes when all colours are in use."""
    return COLORS[index % len(COLORS)], LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)]


def _draw_runs(axes: Any, runs: Mapping[str, Rows]) -> None:
    """Draws the losses of all runs, and a legend with the runs and, where both are there, the two kinds of loss."""
    from matplotlib.lines import Line2D

    lines, names, drawn, has_validation = [], [], [], False
    for index, (name, rows) in enumerate(runs.items()):
        color, style = _style_of_run(index)
        steps, losses, num_left_out = points(rows, "loss")
        _draw_smoothed(axes, steps, losses, color, style)
        validation_steps, validation_losses, num_more = points(rows, "validation_loss")
        if validation_steps.size:
            axes.plot(validation_steps, validation_losses, "o", ls="--", ms=4, lw=1.2, color=color, mfc="white")
            has_validation = True
        note = f" ({num_left_out + num_more} not finite)" if num_left_out + num_more else ""
        lines.append(Line2D([], [], color=color, ls=style, lw=1.8))
        names.append(f"{name}{note}")
        drawn += [losses, validation_losses]
    if has_validation:
        lines += [
            Line2D([], [], color=KEY_COLOR, lw=1.8),
            Line2D([], [], color=KEY_COLOR, lw=1.2, ls="--", marker="o", ms=4, mfc="white"),
        ]
        names += ["training loss, moving average", "validation loss"]
    _finish_curves(axes, np.concatenate(drawn), "loss")
    add_legend(axes, lines, names)


def _score_kind(row: Mapping[str, Any]) -> str | None:
    """Says what the score of a row is a score of; None for a row without one."""
    if "score" not in row:
        return None
    features = row.get("score_features")
    return f"{row.get('score_metric', 'score')}{f', {features}' if features else ''}"


def _draw_scores(axes: Any, runs: Mapping[str, Rows], kind: str) -> None:
    """Draws one kind of score of all runs that have it."""
    drawn = []
    for index, rows in enumerate(runs.values()):
        color, style = _style_of_run(index)
        steps, scores, _ = points([row for row in rows if _score_kind(row) == kind], "score")
        axes.plot(steps, scores, "o", ls=style, ms=4, lw=1.5, color=color)
        drawn.append(scores)
    _finish_curves(axes, np.concatenate(drawn), "score")
    axes.set_title(kind, fontsize=10, parse_math=False)


def _timestep_figure(metrics: Rows, bound: Mapping[str, Any] | None) -> Any:
    """Returns the matplotlib figure of `timestep_curves`."""
    quartiles = [_quartile_points(metrics, f"loss_q{quartile}") for quartile in range(len(QUARTILES))]
    has_quartiles = any(steps.size for steps, _, _ in quartiles)
    if not has_quartiles and bound is None:
        raise ValueError("metrics hold no loss_q0 to loss_q3, and there is no bound; give at least one of them.")
    columns = None if bound is None else _columns_of(bound)
    num_panels = has_quartiles + 2 * (columns is not None)
    figure = new_figure(7.2 if num_panels == 1 else 5.2 * num_panels, 4.2)
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    if has_quartiles:
        _draw_quartiles(panels[0], quartiles)
        count_steps(panels[0], num_ticks=7 if num_panels == 1 else 5)
    if columns is not None:
        _draw_errors(panels[-2], columns)
        _draw_terms(panels[-1], columns)
    return figure


def _draw_quartiles(axes: Any, quartiles: Sequence[tuple[Float64Array, Float64Array, int]]) -> None:
    """Draws the loss in each quartile of the timesteps over the optimiser steps."""
    lines, names = [], []
    for (steps, losses, num_left_out), color, label in zip(quartiles, QUARTILE_COLORS, QUARTILES, strict=True):
        _, line = _draw_smoothed(axes, steps, losses, color)
        lines.append(line)
        names.append(f"{label}{f' ({num_left_out} not finite)' if num_left_out else ''}")
    _finish_curves(axes, np.concatenate([losses for _, losses, _ in quartiles]), "training loss")
    axes.legend(lines, names, frameon=False)


def _columns_of(bound: Mapping[str, Any]) -> dict[str, Float64Array]:
    """Returns the numbers of a bound for each step of the chain; NaN where they are not known."""
    names = ("timesteps", "x_0_mse", "eps_mse", "terms", "counts")
    try:
        columns = {name: np.asarray(bound[name], np.float64) for name in names}
    except (KeyError, TypeError, ValueError):
        columns = {}
    shapes = {column.shape for column in columns.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 1 or not shape[0] or not (columns["counts"] > 0).any():
        raise ValueError(
            f"bound must have {', '.join(names)}, one number for each step of the chain, some counts not 0."
        )
    return columns


def _draw_by_timestep(axes: Any, columns: Mapping[str, Float64Array], name: str, color: str, label: str) -> None:
    """Draws a column over the timesteps: each number faintly, their means, weighted by the counts, in front."""
    counts = columns["counts"]
    is_known = counts > 0
    axes.plot(columns["timesteps"][is_known], columns[name][is_known], lw=0.8, color=color, alpha=FAINT)
    x, y = (bin_means(columns[which], counts, NUM_BINS) for which in ("timesteps", name))
    axes.plot(x, y, lw=1.8, color=color, label=label)


def _draw_errors(axes: Any, columns: Mapping[str, Float64Array]) -> None:
    """Draws the mean square errors of what the network says of data and of noise."""
    _draw_by_timestep(axes, columns, "eps_mse", LINE_COLOR, r"of $\epsilon$")
    _draw_by_timestep(axes, columns, "x_0_mse", VALIDATION_COLOR, r"of $x_0$, values in $[-1, 1]$")
    axes.set_yscale("log")
    finish_axes(axes, r"timestep $t$", "mean square error")
    axes.legend(frameon=False)


def _draw_terms(axes: Any, columns: Mapping[str, Float64Array]) -> None:
    """Draws what each step costs in the variational bound; that of t = 0 is the decoder's."""
    _draw_by_timestep(axes, columns, "terms", LINE_COLOR, "")
    axes.set_yscale("log")
    finish_axes(axes, r"timestep $t$", r"$L_t$, bits per dimension")
