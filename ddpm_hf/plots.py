"""Figures of images, runs and schedules.

What all figures share: colours, how they are saved, and axes that look alike.

Figures have an Agg canvas of their own and never touch pyplot, so a plot changes nothing in its caller's session.

Pictures of images: grids, strips, animations.

Images are uint8 in [0, 255], (number, height, width, channels), with 1 channel
(gray), 3 (RGB) or 4 (RGBA, shown on white). Other channels are shown side by side, each as a gray image.

Curves of runs: losses over the steps, runs side by side, losses by timestep.

Rows of metrics are those of metrics.jsonl: a mapping with the step and whatever was measured then, None where that was
not finite. Values that are no finite numbers are counted in the legend, not drawn. The loss of a quartile is None too
where none of its timesteps was drawn, which nobody counts: it is known by a loss of that step that is a number.

Pictures of noise schedules.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

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


UInt8Array: TypeAlias = npt.NDArray[np.uint8]
AnyFont: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

BACKGROUND = 255
LABEL_COLOR = (60, 60, 60)
LABEL_HEIGHT = 26
LARGEST_FONT, SMALLEST_FONT = 17, 8


def image_grid(
    images: UInt8Array,
    num_columns: int,
    *,
    enlarge_to: int = 64,
    gap: int = 4,
    column_labels: Sequence[str] | None = None,
) -> Image.Image:
    """Lays images out in rows, with gaps between them.

    Args:
        images: uint8, (number, height, width, channels).
        num_columns: Images in a row.
        enlarge_to: Images with a longer side below this are enlarged to about this many pixels, by a whole factor and
            without smoothing. Larger ones stay as they are.
        gap: Pixels between images and around the grid.
        column_labels: One word above each column.

    Returns:
        The picture, RGB.

    Raises:
        ValueError: If the images are not uint8 of that shape, or the number of labels is not that of the columns.
    """
    _check_images(images, "images", num_dimensions=4)
    if num_columns < 1:
        raise ValueError(f"num_columns is {num_columns}, but a grid has at least 1 column.")
    if column_labels is not None and len(column_labels) != num_columns:
        raise ValueError(f"There are {len(column_labels)} column_labels for {num_columns} columns; give one for each.")
    tiles = _enlarge(_to_rgb(images), enlarge_to)
    count, height, width, _ = tiles.shape
    num_rows = -(-count // num_columns)
    top = gap if column_labels is None else LABEL_HEIGHT
    shape = (top + num_rows * (height + gap), gap + num_columns * (width + gap), 3)
    canvas = np.full(shape, BACKGROUND, np.uint8)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, num_columns)
        y, x = top + row * (height + gap), gap + column * (width + gap)
        canvas[y : y + height, x : x + width] = tile
    picture = Image.fromarray(canvas)
    if column_labels is not None:
        centers = [gap + column * (width + gap) + width / 2 for column in range(num_columns)]
        _write_labels(picture, column_labels, centers, width)
    return picture


def denoising_strip(trajectory: UInt8Array, *, num_frames: int = 10, enlarge_to: int = 64, gap: int = 4) -> Image.Image:
    """Shows how images come out of noise: one row an image, time from left to right.

    Args:
        trajectory: uint8, (frames, number, height, width, channels), from noise to image.
        num_frames: Frames to show, evenly spaced, the first and the last among them; fewer if there are fewer.
        enlarge_to: As in `image_grid`.
        gap: As in `image_grid`.

    Returns:
        The picture, RGB.

    Raises:
        ValueError: If the trajectory is not uint8 of that shape, or num_frames is below 2.
    """
    _check_images(trajectory, "trajectory", num_dimensions=5)
    shown = trajectory[_spread(len(trajectory), num_frames)]
    rows = shown.swapaxes(0, 1).reshape(-1, *shown.shape[2:])
    labels = ["noise", *[""] * (len(shown) - 2), "image"] if len(shown) > 1 else None
    return image_grid(rows, len(shown), enlarge_to=enlarge_to, gap=gap, column_labels=labels)


def forward_strip(
    states: UInt8Array,
    timesteps: Sequence[int],
    snrs: Sequence[float],
    *,
    enlarge_to: int = 96,
    gap: int = 4,
) -> Image.Image:
    """Shows how the forward process turns an image into noise: one row, t above and the SNR below each state.

    Args:
        states: uint8, (number, height, width, channels), x_t at each of the timesteps.
        timesteps: t of each state.
        snrs: alpha_bar_t / (1 - alpha_bar_t) of each state.
        enlarge_to: As in `image_grid`.
        gap: As in `image_grid`.

    Returns:
        The picture, RGB.

    Raises:
        ValueError: If the states are not uint8 of that shape, or there is not one t and one SNR for each.
    """
    _check_images(states, "states", num_dimensions=4)
    if not len(states) == len(timesteps) == len(snrs):
        raise ValueError(
            f"There are {len(states)} states, {len(timesteps)} timesteps and {len(snrs)} snrs; give one of each."
        )
    grid = image_grid(
        states, len(states), enlarge_to=enlarge_to, gap=gap, column_labels=[f"t = {t}" for t in timesteps]
    )
    picture = Image.new("RGB", (grid.width, grid.height - gap + LABEL_HEIGHT), (BACKGROUND,) * 3)
    picture.paste(grid)
    width = (grid.width - gap) // len(states) - gap
    centers = [gap + column * (width + gap) + width / 2 for column in range(len(states))]
    _write_labels(picture, [f"SNR {_short(snr)}" for snr in snrs], centers, width, top=grid.height - gap)
    return picture


def save_animation(
    trajectory: UInt8Array,
    path: Path,
    *,
    num_columns: int,
    frame_milliseconds: int = 80,
    hold_last: int = 2500,
    max_frames: int = 40,
    enlarge_to: int = 48,
) -> None:
    """Writes an endless GIF of a grid of images that come out of noise.

    Args:
        trajectory: uint8, (frames, number, height, width, channels), from noise to image.
        path: Where to write.
        num_columns: Images in a row of the grid.
        frame_milliseconds: How long a frame is shown; GIF counts in steps of 10.
        hold_last: Milliseconds for which the finished images are shown.
        max_frames: Longer trajectories are thinned to this many frames.
        enlarge_to: As in `image_grid`.

    Raises:
        ValueError: If the trajectory is not uint8 of that shape, or max_frames is below 2.
    """
    _check_images(trajectory, "trajectory", num_dimensions=5)
    frames = [
        image_grid(trajectory[index], num_columns, enlarge_to=enlarge_to).quantize(256, dither=Image.Dither.NONE)
        for index in _spread(len(trajectory), max_frames)
    ]
    durations = [frame_milliseconds] * (len(frames) - 1) + [hold_last]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _check_images(images: UInt8Array, name: str, *, num_dimensions: int) -> None:
    """Refuses everything but non-empty uint8 arrays of the right number of dimensions."""
    if images.dtype != np.uint8 or images.ndim != num_dimensions or images.size == 0:
        axes = ("frames, " if num_dimensions == 5 else "") + "number, height, width, channels"
        raise ValueError(
            f"{name} must be a non-empty uint8 array ({axes}); got {images.dtype} of shape {tuple(images.shape)}."
        )


def _to_rgb(images: UInt8Array) -> UInt8Array:
    """Returns the images with 3 channels, (number, height, width, 3)."""
    channels = images.shape[-1]
    if channels == 3:
        return images
    if channels == 4:
        alpha = images[..., 3:].astype(np.uint16)
        on_white = images[..., :3] * alpha + BACKGROUND * (255 - alpha)
        return np.rint(on_white / 255).astype(np.uint8)
    side_by_side = np.concatenate(np.split(images, channels, axis=-1), axis=2)
    return np.repeat(side_by_side, 3, axis=-1)


def _enlarge(tiles: UInt8Array, target: int) -> UInt8Array:
    """Repeats pixels until the longer side is nearest to `target`; never makes a tile smaller."""
    factor = max(1, round(target / max(tiles.shape[1:3])))
    return tiles.repeat(factor, axis=1).repeat(factor, axis=2)


def _spread(length: int, count: int) -> list[int]:
    """Returns `count` indices into a list, evenly spaced from the first to the last; all if there are fewer."""
    if count < 2:
        raise ValueError(f"{count} frames cannot show a beginning and an end; ask for at least 2.")
    return [round(position) for position in np.linspace(0, length - 1, min(count, length)).tolist()]


def _short(number: float) -> str:
    """Writes a number of at least 0 with two digits or its whole part, and as a power of ten where it is far from 1."""
    if 100 <= number < 1e6:
        return f"{number:.0f}"
    return f"{number:.2g}" if 1e-3 <= number < 100 or number == 0 else f"{number:.1e}"


def _write_labels(
    picture: Image.Image, labels: Sequence[str], centers: Sequence[float], width: int, top: int = 0
) -> None:
    """Writes a word over each column, from `top` on LABEL_HEIGHT high.

    All have the largest size in which the longest one fits with the room of a letter to the next; where none does,
    words are cut. A name with line breaks is one line.
    """
    draw = ImageDraw.Draw(picture)
    lines = [" ".join(label.split()) for label in labels]
    for size in range(LARGEST_FONT, SMALLEST_FONT - 1, -1):
        font = ImageFont.load_default(size)
        room = width - draw.textlength("n", font)
        if max(draw.textlength(line, font) for line in lines) <= room:
            break
    for line, center in zip(lines, centers, strict=True):
        text = _fit(draw, line, font, room)
        draw.text((center, top + LABEL_HEIGHT / 2), text, LABEL_COLOR, font, anchor="mm")


def _fit(draw: ImageDraw.ImageDraw, text: str, font: AnyFont, width: float) -> str:
    """Cuts a word with an ellipsis so that it is at most `width` pixels long."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


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


_LETTERS_A_LINE = 80


def schedule_plot(
    schedules: Mapping[str, npt.NDArray[np.floating[Any]]],
    path: Path,
    *,
    loss_weights: Mapping[str, npt.NDArray[np.floating[Any]]] | None = None,
) -> None:
    """Draws beta_t, alpha_bar_t, the logarithm of the SNR and, where they are given, the weights of the loss.

    Schedules of one length are drawn over t, others over (t + 1) / T, where chains of one continuous alpha_bar lie on
    one curve. The name of a single schedule is the title, those of several are the legend.

    Args:
        schedules: alpha_bar_t of each, (T,) in [0, 1), as `NoiseSchedule.alphas_cumprod` has them; float32 holds too
            few digits for small betas. Names are shown as they are.
        path: Where to write a PNG.
        loss_weights: Factor on the squared error of the prediction at each t, (T,), of some or all of the schedules.

    Raises:
        ValueError: If there is no schedule, one is none, or weights belong to no schedule.
    """
    save_figure(_schedule_figure(schedules, loss_weights or {}), path)


def _schedule_figure(
    schedules: Mapping[str, npt.NDArray[np.floating[Any]]], loss_weights: Mapping[str, npt.NDArray[np.floating[Any]]]
) -> Any:
    """Returns the matplotlib figure of `schedule_plot`."""
    alpha_bars = {name: np.asarray(table, np.float64) for name, table in schedules.items()}
    weights = {name: np.asarray(table, np.float64) for name, table in loss_weights.items()}
    _check(alpha_bars, weights)
    num_rows, num_columns = (2, 2) if weights else (1, 3)
    figure = new_figure(7.6, 5.6) if weights else new_figure(10.4, 3.3)
    axes = figure.subplots(num_rows, num_columns).flatten()
    lengths = {len(table) for table in alpha_bars.values()}
    lines = []
    for index, (name, alpha_bar) in enumerate(alpha_bars.items()):
        t = np.arange(len(alpha_bar), dtype=np.float64)
        x = t if len(lengths) == 1 else (t + 1) / len(alpha_bar)
        style = {"color": COLORS[index % len(COLORS)], "ls": LINE_STYLES[index % len(LINE_STYLES)], "lw": 1.6}
        (line,) = axes[0].plot(x, betas_of(alpha_bar), **style)
        axes[1].plot(x, alpha_bar, **style)
        has_signal = alpha_bar > 0
        axes[2].plot(x[has_signal], log_snr_of(alpha_bar[has_signal]), **style)
        if name in weights:
            axes[3].plot(x, weights[name], **style)
        lines.append(line)
    _label(axes, r"timestep $t$" if len(lengths) == 1 else r"$(t + 1) / T$", alpha_bars, weights)
    if len(lines) == 1:
        figure.suptitle(shortened(*alpha_bars), fontsize=11, parse_math=False)
    else:
        longest = max(len(shortened(name)) for name in alpha_bars)
        num_columns = max(1, min(len(lines), _LETTERS_A_LINE // (longest + 8)))
        add_legend(figure, lines, list(alpha_bars), loc="outside lower center", ncols=num_columns)
    return figure


def _label(axes: Any, x: str, alpha_bars: Mapping[str, Float64Array], weights: Mapping[str, Float64Array]) -> None:
    """Says what each panel shows, and where there is no logarithm of the SNR to show."""
    axes[0].set_yscale("log")
    finish_axes(axes[0], x, r"$\beta_t$")
    finish_axes(axes[1], x, r"$\bar\alpha_t$")
    finish_axes(axes[2], x, r"$\log\,\mathrm{SNR}(t)$")
    num_without_signal = sum(1 for table in alpha_bars.values() if table[-1] == 0)
    if num_without_signal:
        of_how_many = f" for {num_without_signal} of {len(alpha_bars)}" if len(alpha_bars) > 1 else ""
        axes[2].text(0.04, 0.05, rf"$-\infty$ at the end{of_how_many}", transform=axes[2].transAxes, fontsize=9)
    if weights:
        use_log_axis_if_wide(axes[3], np.concatenate(list(weights.values())))
        finish_axes(axes[3], x, "loss weight")


def betas_of(alpha_bar: Float64Array) -> Float64Array:
    """Returns beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}; 1 where the signal had ended before."""
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    return np.asarray(1 - np.divide(alpha_bar, before, out=np.zeros_like(alpha_bar), where=before > 0))


def log_snr_of(alpha_bar: Float64Array) -> Float64Array:
    """Returns log(alpha_bar_t / (1 - alpha_bar_t)), for alpha_bar_t above 0."""
    return np.asarray(np.log(alpha_bar) - np.log1p(-alpha_bar))


def _check(alpha_bars: Mapping[str, Float64Array], weights: Mapping[str, Float64Array]) -> None:
    """Refuses tables that are no schedules, and weights that belong to none."""
    if not alpha_bars:
        raise ValueError("schedules is empty; give the alphas_cumprod of at least one.")
    for name, table in alpha_bars.items():
        is_in_range = table.ndim == 1 and table.size > 0 and bool(((table >= 0) & (table < 1)).all())
        if not is_in_range or (np.diff(table) > 0).any():
            raise ValueError(
                f"schedules[{name!r}] must be alphas_cumprod, one list of numbers that fall from below 1 to 0 or above."
            )
    for name, table in weights.items():
        if name not in alpha_bars or table.shape != alpha_bars[name].shape:
            raise ValueError(
                f"loss_weights[{name!r}] of shape {table.shape} must belong to one of the schedules and have its "
                "length; give one weight for each timestep."
            )
