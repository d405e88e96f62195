"""Figures of images, runs, noise schedules and evaluations.

All functions take NumPy arrays or plain mappings and need no torch. Figures have their own Agg canvas and never use
pyplot, so a plot does not change the caller's matplotlib session.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
FloatArray: TypeAlias = npt.NDArray[np.float64]
Rows: TypeAlias = Sequence[Mapping[str, Any]]
"""Rows of metrics.jsonl: the step and what was measured at it, None if that was not finite."""

LINE_COLOR, VALIDATION_COLOR = "#1f5a94", "#c4541b"
COLORS = (LINE_COLOR, VALIDATION_COLOR, "#2f8f5b", "#8a4fa3", "#b08a1e", "#c2517c", "#3ba0b8", "#666666")
LINE_STYLES = ("-", "--", "-.", ":")
KEY_COLOR = "#555555"
FAINT = 0.3
# Quarters of the timesteps from data to noise, dark to light.
QUARTILE_COLORS = ("#0d2f52", "#2a6aa8", "#5fa3cf", "#e0a12e")
QUARTILES = (r"$t < T/4$", r"$T/4 \leq t < T/2$", r"$T/2 \leq t < 3T/4$", r"$3T/4 \leq t$")
DPI = 130
MAX_NAME_LENGTH = 40
MAX_LEGEND_LINE = 80
MIN_SMOOTHED = 20
NUM_BINS = 100
EVALUATION_COLUMNS = 8

BACKGROUND = 255
LABEL_COLOR = (60, 60, 60)
LABEL_HEIGHT = 26
GAP = 4  # between images and around a grid
STRIP_FRAMES, ANIMATION_FRAMES = 10, 40
FRAME_MILLISECONDS, LAST_FRAME_MILLISECONDS = 80, 2500  # GIF has a resolution of 10 ms
MAX_FONT_SIZE, MIN_FONT_SIZE = 17, 8


# Images are uint8 in [0, 255], (number, height, width, channels), with 1 channel (gray), 3 (RGB) or 4 (RGBA, drawn on
# white). Other channels are drawn side by side, each as a gray image.


def as_drawn(images: UInt8Array, value_range: Sequence[float] | str | None) -> UInt8Array:
    """Return images as they are drawn: four channels of data with a value range are no colors, and become gray planes.

    Args:
        images: uint8, (..., height, width, channels).
        value_range: `data.value_range`, or that of the pipeline; None if four channels are color and transparency.

    Returns:
        The same, or uint8 (..., height, 4 * width, 1).
    """
    if value_range is None or images.shape[-1] != 4:
        return images
    return np.moveaxis(images, -1, -2).reshape(*images.shape[:-2], -1, 1)


def image_grid(
    images: UInt8Array,
    num_columns: int,
    *,
    enlarge_to: int = 64,
    column_labels: Sequence[str] | None = None,
) -> Image.Image:
    """Arrange images in rows, with gaps between them, as an RGB picture.

    Args:
        images: uint8, (number, height, width, channels).
        num_columns: Images in a row.
        enlarge_to: Smaller images are enlarged to about this many pixels on the longer side, by an integer factor and
            without smoothing. Larger images keep their size.
        column_labels: One word above each column.
    """
    _check_images(images, "images", num_dimensions=4)
    if num_columns < 1:
        raise ValueError(f"num_columns is {num_columns}; a grid needs at least 1 column.")
    if column_labels is not None and len(column_labels) != num_columns:
        raise ValueError(f"There are {len(column_labels)} column_labels for {num_columns} columns; give one each.")
    tiles = _to_rgb(images)
    factor = max(1, round(enlarge_to / max(tiles.shape[1:3])))
    tiles = tiles.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, _ = tiles.shape
    num_rows = -(-count // num_columns)
    top = GAP if column_labels is None else LABEL_HEIGHT
    shape = (top + num_rows * (height + GAP), GAP + num_columns * (width + GAP), 3)
    canvas = np.full(shape, BACKGROUND, np.uint8)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, num_columns)
        y, x = top + row * (height + GAP), GAP + column * (width + GAP)
        canvas[y : y + height, x : x + width] = tile
    picture = Image.fromarray(canvas)
    if column_labels is not None:
        centers = [GAP + column * (width + GAP) + width / 2 for column in range(num_columns)]
        _write_labels(picture, column_labels, centers, width)
    return picture


def denoising_strip(trajectory: UInt8Array) -> Image.Image:
    """Draw a denoising trajectory: one row per image, from noise on the left to the image on the right.

    Args:
        trajectory: uint8, (frames, number, height, width, channels), from noise to image; at most STRIP_FRAMES of the
            frames are drawn, evenly spaced.
    """
    _check_images(trajectory, "trajectory", num_dimensions=5)
    shown = trajectory[_spread(len(trajectory), STRIP_FRAMES)]
    rows = shown.swapaxes(0, 1).reshape(-1, *shown.shape[2:])
    labels = ["noise", *[""] * (len(shown) - 2), "image"] if len(shown) > 1 else None
    return image_grid(rows, len(shown), column_labels=labels)


def forward_strip(states: UInt8Array, timesteps: Sequence[int], snrs: Sequence[float]) -> Image.Image:
    """Draw states of the forward process in one row, with t above and the SNR below each state.

    Args:
        states: uint8, (number, height, width, channels), x_t at each of the timesteps.
        timesteps: t of each state.
        snrs: alpha_bar_t / (1 - alpha_bar_t) of each state.
    """
    if not len(states) == len(timesteps) == len(snrs):
        raise ValueError(
            f"There are {len(states)} states, {len(timesteps)} timesteps and {len(snrs)} snrs; give one per state."
        )
    grid = image_grid(states, len(states), enlarge_to=96, column_labels=[f"t = {t}" for t in timesteps])
    picture = Image.new("RGB", (grid.width, grid.height - GAP + LABEL_HEIGHT), (BACKGROUND,) * 3)
    picture.paste(grid)
    width = (grid.width - GAP) // len(states) - GAP
    centers = [GAP + column * (width + GAP) + width / 2 for column in range(len(states))]
    _write_labels(picture, [f"SNR {_format_snr(snr)}" for snr in snrs], centers, width, top=grid.height - GAP)
    return picture


def save_animation(trajectory: UInt8Array, path: Path, *, num_columns: int) -> None:
    """Write a looping GIF of a denoising trajectory, as a grid of images, which holds the last frame.

    Args:
        trajectory: uint8, (frames, number, height, width, channels), from noise to image; at most ANIMATION_FRAMES of
            the frames are drawn, evenly spaced.
        path: The file.
        num_columns: Images in a row of the grid.
    """
    _check_images(trajectory, "trajectory", num_dimensions=5)
    frames = [
        image_grid(trajectory[index], num_columns, enlarge_to=48).quantize(256, dither=Image.Dither.NONE)
        for index in _spread(len(trajectory), ANIMATION_FRAMES)
    ]
    durations = [FRAME_MILLISECONDS] * (len(frames) - 1) + [LAST_FRAME_MILLISECONDS]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _check_images(images: UInt8Array, name: str, *, num_dimensions: int) -> None:
    if images.dtype != np.uint8 or images.ndim != num_dimensions or images.size == 0:
        axes = ("frames, " if num_dimensions == 5 else "") + "number, height, width, channels"
        raise ValueError(
            f"{name} must be a non-empty uint8 array ({axes}); got {images.dtype} of shape {tuple(images.shape)}."
        )


def _to_rgb(images: UInt8Array) -> UInt8Array:
    """Return RGB images (number, height, width, 3)."""
    channels = images.shape[-1]
    if channels == 3:
        return images
    if channels == 4:
        alpha = images[..., 3:].astype(np.uint16)
        on_white = images[..., :3] * alpha + BACKGROUND * (255 - alpha)
        return np.rint(on_white / 255).astype(np.uint8)
    side_by_side = np.concatenate(np.split(images, channels, axis=-1), axis=2)
    return np.repeat(side_by_side, 3, axis=-1)


def _spread(length: int, count: int) -> list[int]:
    """Return `count` indices into a list, evenly spaced from the first to the last; all if there are fewer."""
    return [round(position) for position in np.linspace(0, length - 1, min(count, length)).tolist()]


def _format_snr(number: float) -> str:
    """Format an SNR with two digits or its integer part, and with an exponent if it is far from 1."""
    if 100 <= number < 1e6:
        return f"{number:.0f}"
    return f"{number:.2g}" if 1e-3 <= number < 100 or number == 0 else f"{number:.1e}"


def _write_labels(
    picture: Image.Image, labels: Sequence[str], centers: Sequence[float], width: int, top: int = 0
) -> None:
    """Write one label per column, in the LABEL_HEIGHT pixels below `top`.

    The font size is the largest at which the longest label fits with a letter of space; if none fits, labels are cut.
    Line breaks in a label become spaces.
    """
    draw = ImageDraw.Draw(picture)
    lines = [" ".join(label.split()) for label in labels]
    for size in range(MAX_FONT_SIZE, MIN_FONT_SIZE - 1, -1):
        font = ImageFont.load_default(size)
        room = width - draw.textlength("n", font)
        if max(draw.textlength(line, font) for line in lines) <= room:
            break
    for line, center in zip(lines, centers, strict=True):
        text = line
        while line and draw.textlength(text, font) > room:
            line = line[:-1]
            text = line + "…"
        draw.text((center, top + LABEL_HEIGHT / 2), text, LABEL_COLOR, font, anchor="mm")


def training_curves(runs: Mapping[str, Rows], path: Path) -> None:
    """Draw the losses of one or several runs, and one panel below for each kind of score in them.

    Each run has a color: its training loss is a faint line with a moving average in front, its validation loss is
    dashed with a marker at each measurement. Runs need not have the same metrics or steps. Values that are not finite
    are not drawn; the legend counts them.

    Args:
        runs: Rows of metrics.jsonl of each run by name. A single run may have the name "".
        path: The PNG file.
    """
    from matplotlib.lines import Line2D

    if not runs:
        raise ValueError("runs is empty; give the rows of metrics of at least one run.")
    for name, rows in runs.items():
        if not any(points(rows, column)[0].size for column in ("loss", "validation_loss", "score")):
            raise ValueError(
                f"The metrics of {name} contain no finite loss, validation_loss or score; give those of a run that "
                "logged at least one."
            )
    kinds = sorted({kind for rows in runs.values() for row in rows if (kind := _score_kind(row)) is not None})
    heights = [4.2, *[2.6] * len(kinds)]
    figure = new_figure(7.2, sum(heights))
    loss_axes, *score_axes = figure.subplots(
        len(heights), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    lines, names, drawn, has_validation = [], [], [], False
    drawn_scores: dict[str, list[FloatArray]] = {kind: [] for kind in kinds}
    for index, (name, rows) in enumerate(runs.items()):
        color, style = COLORS[index % len(COLORS)], LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)]
        steps, losses, num_skipped = points(rows, "loss")
        _draw_smoothed(loss_axes, steps, losses, color, style)
        validation_steps, validation_losses, num_more = points(rows, "validation_loss")
        if validation_steps.size:
            loss_axes.plot(validation_steps, validation_losses, "o", ls="--", ms=4, lw=1.2, color=color, mfc="white")
            has_validation = True
        drawn += [losses, validation_losses]
        note = f"({num_skipped + num_more} not finite)" if num_skipped + num_more else ""
        if label := f"{name} {note}".strip():
            lines.append(Line2D([], [], color=color, ls=style, lw=1.8))
            names.append(label)
        for axes, kind in zip(score_axes, kinds, strict=True):
            steps, scores, _ = points([row for row in rows if _score_kind(row) == kind], "score")
            axes.plot(steps, scores, "o", ls=style, ms=4, lw=1.5, color=color)
            drawn_scores[kind].append(scores)
    if has_validation or "" in runs:
        lines.append(Line2D([], [], color=KEY_COLOR, lw=1.8))
        names.append("training loss, moving average")
    if has_validation:
        lines.append(Line2D([], [], color=KEY_COLOR, lw=1.2, ls="--", marker="o", ms=4, mfc="white"))
        names.append("validation loss")
    _finish_curves(loss_axes, np.concatenate(drawn), "loss")
    _add_legend(loss_axes, lines, names)
    for axes, kind in zip(score_axes, kinds, strict=True):
        _finish_curves(axes, np.concatenate(drawn_scores[kind]), "score")
        axes.set_title(kind, fontsize=10, parse_math=False)
    for axes in [loss_axes, *score_axes][:-1]:
        axes.set_xlabel("")
    save_figure(figure, path)


def timestep_curves(path: Path, *, metrics: Rows = (), bound: Mapping[str, Any] | None = None) -> None:
    """Draw the loss of a run at different timesteps, one panel for each of these that is known.

    The loss in each quarter of the timesteps over the optimizer steps; the mean squared errors of x_0 and of epsilon
    over the timesteps; and the terms of the variational bound.

    Args:
        path: The PNG file.
        metrics: Rows of metrics.jsonl, of which `loss_q0` to `loss_q3` are drawn.
        bound: The entry `bound` of an evaluation.json: `timesteps`, `x_0_mse`, `eps_mse`, `terms` and `counts`, one
            number per reverse step.
    """
    quartiles = []
    for quartile in range(len(QUARTILES)):
        # The loss of a quartile is also None if none of its timesteps was drawn, in a step whose loss is finite.
        name = f"loss_q{quartile}"
        rows = [row for row in metrics if row.get(name) is not None or not _is_finite(row.get("loss"))]
        quartiles.append(points(rows, name))
    has_quartiles = any(steps.size for steps, _, _ in quartiles)
    if not has_quartiles and bound is None:
        raise ValueError("metrics contain no loss_q0 to loss_q3, and there is no bound; give at least one of them.")
    columns = None if bound is None else _bound_columns(bound)
    num_panels = has_quartiles + 2 * (columns is not None)
    figure = new_figure(7.2 if num_panels == 1 else 5.2 * num_panels, 4.2)
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    if has_quartiles:
        lines, names = [], []
        for (steps, losses, num_skipped), color, label in zip(quartiles, QUARTILE_COLORS, QUARTILES, strict=True):
            lines.append(_draw_smoothed(panels[0], steps, losses, color))
            names.append(f"{label}{f' ({num_skipped} not finite)' if num_skipped else ''}")
        _finish_curves(panels[0], np.concatenate([losses for _, losses, _ in quartiles]), "training loss")
        _count_steps(panels[0], num_ticks=7 if num_panels == 1 else 5)
        panels[0].legend(lines, names, frameon=False)
    if bound is not None and columns is not None:
        _draw_errors(panels[-2], columns, _is_of_latents(bound))
        _draw_terms(panels[-1], columns, _is_of_latents(bound))
    save_figure(figure, path)


def points(rows: Rows, name: str) -> tuple[FloatArray, FloatArray, int]:
    """Return steps and values of a metric where it is finite, and the number of measurements that are not."""
    measured = [(row["step"], row[name]) for row in rows if name in row]
    pairs = [pair for pair in measured if all(_is_finite(number) for number in pair)]
    table = np.asarray(pairs, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1], len(measured) - len(pairs)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _score_kind(row: Mapping[str, Any]) -> str | None:
    """Return the metric and the features of the score in a row; None for a row without a score."""
    if "score" not in row:
        return None
    features = row.get("score_features")
    return f"{row.get('score_metric', 'score')}{f', {features}' if features else ''}"


def _draw_smoothed(axes: Any, steps: FloatArray, values: FloatArray, color: str, style: str = "-") -> Any:
    """Draw values faintly, and return the line in front: their moving average, or the values if they are few."""
    if values.size < MIN_SMOOTHED:
        (line,) = axes.plot(steps, values, "o", ls=style, ms=3, lw=1.5, color=color)
        return line
    axes.plot(steps, values, lw=0.8, color=color, alpha=FAINT, zorder=1.9)
    (line,) = axes.plot(steps, moving_average(values, max(3, values.size // 50)), ls=style, lw=1.8, color=color)
    return line


def moving_average(values: FloatArray, width: int) -> FloatArray:
    """Average each value with up to `width` values before it, and at most as many after it.

    So the steep beginning of a loss curve is not averaged away.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    before = np.minimum(width, index)
    after = np.minimum(before, len(values) - 1 - index)
    averages: FloatArray = (sums[index + after + 1] - sums[index - before]) / (before + after + 1)
    return averages


def _finish_curves(axes: Any, values: FloatArray, y: str) -> None:
    """Label the axes of curves over optimizer steps."""
    _use_log_axis_if_wide(axes, values)
    if values.size == 1:  # so that the position of a single point shows its value
        axes.set_ylim(bottom=min(0.0, values[0]))
    _finish_axes(axes, "optimizer step", y)
    _count_steps(axes)


def _count_steps(axes: Any, num_ticks: int = 7) -> None:
    """Start the x axis at step 0 and label it with whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=num_ticks, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(left=0)


def _is_of_latents(bound: Mapping[str, Any]) -> bool:
    """Return whether a bound is of latents, whose decoder term is a density and may be negative."""
    return bound.get("of") == "latents"


def _bound_columns(bound: Mapping[str, Any]) -> dict[str, FloatArray]:
    """Return the numbers of a bound per reverse step as arrays; NaN if they are unknown."""
    names = ("timesteps", "x_0_mse", "eps_mse", "terms", "counts")
    try:
        columns = {name: np.asarray(bound[name], np.float64) for name in names}
    except (KeyError, TypeError, ValueError):
        columns = {}
    shapes = {column.shape for column in columns.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 1 or not shape[0] or not (columns["counts"] > 0).any():
        raise ValueError(
            f"bound must have {', '.join(names)}, one number per reverse step, with at least one count above 0."
        )
    return columns


def _draw_by_timestep(axes: Any, columns: Mapping[str, FloatArray], name: str, color: str, label: str = "") -> None:
    """Draw a column of a bound over the timesteps: each number faintly, means weighted by the counts in front."""
    counts = columns["counts"]
    is_known = counts > 0
    axes.plot(columns["timesteps"][is_known], columns[name][is_known], lw=0.8, color=color, alpha=FAINT)
    x, y = (bin_means(columns[column], counts) for column in ("timesteps", name))
    axes.plot(x, y, lw=1.8, color=color, label=label)


def bin_means(values: npt.ArrayLike, counts: npt.ArrayLike, num_bins: int = NUM_BINS) -> FloatArray:
    """Return means over neighboring reverse steps, weighted by `counts`, the images each value was computed for.

    In a bound estimated from a few terms per image, most steps have seen few images; bins without any are left out.
    """
    weights = np.asarray(counts, np.float64)
    known = np.where(weights > 0, np.asarray(values, np.float64), 0.0)
    bins = np.arange(len(weights)) * min(num_bins, len(weights)) // len(weights)
    totals, sums = np.bincount(bins, weights), np.bincount(bins, weights * known)
    return np.asarray(sums[totals > 0] / totals[totals > 0])


def _draw_errors(axes: Any, columns: Mapping[str, FloatArray], is_of_latents: bool) -> None:
    """Draw the mean squared errors of the predicted noise and of the predicted x_0."""
    _draw_by_timestep(axes, columns, "eps_mse", LINE_COLOR, r"of $\epsilon$")
    scale = "normalized latents" if is_of_latents else "values in $[-1, 1]$"
    _draw_by_timestep(axes, columns, "x_0_mse", VALIDATION_COLOR, f"of $x_0$, {scale}")
    axes.set_yscale("log")
    _finish_axes(axes, r"timestep $t$", "mean squared error")
    axes.legend(frameon=False)


def _draw_terms(axes: Any, columns: Mapping[str, FloatArray], is_of_latents: bool) -> None:
    """Draw the terms of the variational bound; the term at t = 0 is that of the decoder, left out for latents."""
    if is_of_latents and (columns["counts"][:-1] > 0).any():
        columns = {name: column[:-1] for name, column in columns.items()}
    _draw_by_timestep(axes, columns, "terms", LINE_COLOR)
    axes.set_yscale("log")
    _finish_axes(axes, r"timestep $t$", r"$L_t$, bits per dimension")


class Ratios(NamedTuple):
    """Ratios of the nearest to the second nearest distance to training images, in [0, 1].

    Args:
        name: What the distances were measured in.
        samples: Ratio of each sample.
        validation: Ratio of each validation image; may be empty.
        threshold: Ratio below which a sample counts as a copy.
    """

    name: str
    samples: FloatArray
    validation: FloatArray
    threshold: float


def evaluation_plot(
    path: Path,
    *,
    samples: UInt8Array,
    real: UInt8Array,
    compared: UInt8Array,
    neighbors: UInt8Array,
    distances: npt.NDArray[np.float64],
    bound: Mapping[str, Any] | None,
    memorization: Sequence[Ratios] = (),
    title: str,
) -> None:
    """Draw samples, real images and nearest neighbors in one row, and curves in further rows.

    Args:
        path: The PNG file.
        samples: uint8 (number, height, width, channels), as `real`, `compared` and `neighbors`.
        real: Real images, drawn at random.
        compared: Samples that are shown with their nearest real image.
        neighbors: The nearest real image of each of them.
        distances: Distances of these, root mean square in [0, 1].
        bound: The entry `bound` of evaluation.json, if there is one.
        memorization: Ratios of distances, at most three; they get a row.
        title: Title of the figure.
    """
    num_rows = 1 + (bound is not None) + bool(memorization)
    figure = new_figure(13, 4.6 * num_rows)
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(num_rows, 3, squeeze=False)
    pairs = [
        images[start : start + EVALUATION_COLUMNS]
        for start in range(0, len(neighbors), EVALUATION_COLUMNS)
        for images in (compared, neighbors)
    ]
    grids = {
        "samples, not selected": samples,
        "real images": real,
        f"{'possible copies' if memorization else 'samples'} and, below each, the nearest real image\n"
        f"distance {distances.min():.3f} to {distances.max():.3f}": np.concatenate(pairs),
    }
    for panel, (label, images) in zip(axes[0], grids.items(), strict=True):
        grid = image_grid(images, min(EVALUATION_COLUMNS, len(images)))
        panel.imshow(np.asarray(grid), interpolation="nearest")
        panel.set_title(label, fontsize=10)
        panel.axis("off")
    if bound is not None:
        columns = _bound_columns(bound)
        is_of_latents = _is_of_latents(bound)
        _draw_errors(axes[1, 0], columns, is_of_latents)
        axes[1, 0].set_title("error by timestep", fontsize=10)
        _draw_terms(axes[1, 1], columns, is_of_latents)
        axes[1, 1].set_title("terms of the variational bound", fontsize=10)
        # The progressive code: the error that is left after so many bits. Fig. 5, Ho et al. 2020.
        rate, distortion = (bin_means(bound[name], columns["counts"]) for name in ("rate", "distortion"))
        axes[1, 2].plot(rate, distortion, lw=1.6, color=LINE_COLOR)
        scale = "of latents" if is_of_latents else "0 to 255"
        _finish_axes(axes[1, 2], "bits per dimension sent", f"root mean squared error, {scale}")
        axes[1, 2].set_ylim(bottom=0)
        axes[1, 2].set_title("rate and distortion", fontsize=10)
    for panel, ratios in zip(axes[-1], memorization, strict=False):
        _draw_ratios(panel, ratios)
    for panel in axes[-1, len(memorization) :] if memorization else ():
        panel.axis("off")
    save_figure(figure, path)


def _draw_ratios(axes: Any, ratios: Ratios) -> None:
    """Draw the cumulative distribution of ratios of samples and validation images."""
    curves = {"samples": (ratios.samples, LINE_COLOR), "validation images": (ratios.validation, VALIDATION_COLOR)}
    for label, (values, color) in curves.items():
        if len(values):
            label += f", {(values < ratios.threshold).mean():.1%} memorized"
            axes.ecdf(values, lw=1.6, color=color, label=label)
    axes.axvline(ratios.threshold, lw=1, ls="--", color=KEY_COLOR)
    _finish_axes(axes, "nearest / second nearest distance", "fraction")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    axes.set_title(f"distances to training images in {_shorten(ratios.name)}", fontsize=10, parse_math=False)


def schedule_plot(
    schedules: Mapping[str, npt.NDArray[np.floating[Any]]],
    path: Path,
    *,
    loss_weights: Mapping[str, npt.NDArray[np.floating[Any]]] | None = None,
) -> None:
    """Draw beta_t, alpha_bar_t, log SNR(t) and, if given, the loss weights.

    Schedules of the same length are drawn over t, others over (t + 1) / T, where schedules of the same continuous
    alpha_bar share a curve. The name of a single schedule is the title, those of several are the legend.

    Args:
        schedules: alpha_bar_t of each schedule by name, (T,) in [0, 1), as in `NoiseSchedule.alphas_cumprod`; float32
            has too few digits for small betas.
        path: The PNG file.
        loss_weights: Factor on the squared error of the prediction at each t, (T,), for some or all schedules.
    """
    alpha_bars = {name: np.asarray(table, np.float64) for name, table in schedules.items()}
    weights = {name: np.asarray(table, np.float64) for name, table in (loss_weights or {}).items()}
    _check_schedules(alpha_bars, weights)
    figure = new_figure(7.6, 5.6) if weights else new_figure(10.4, 3.3)
    axes = figure.subplots(*((2, 2) if weights else (1, 3))).flatten()
    has_one_length = len({len(table) for table in alpha_bars.values()}) == 1
    lines = []
    for index, (name, alpha_bar) in enumerate(alpha_bars.items()):
        t = np.arange(len(alpha_bar), dtype=np.float64)
        x = t if has_one_length else (t + 1) / len(alpha_bar)
        style = {"color": COLORS[index % len(COLORS)], "ls": LINE_STYLES[index % len(LINE_STYLES)], "lw": 1.6}
        lines += axes[0].plot(x, betas_of(alpha_bar), **style)
        axes[1].plot(x, alpha_bar, **style)
        has_signal = alpha_bar > 0
        axes[2].plot(x[has_signal], np.log(alpha_bar[has_signal]) - np.log1p(-alpha_bar[has_signal]), **style)
        if name in weights:
            axes[3].plot(x, weights[name], **style)
    x_label = r"timestep $t$" if has_one_length else r"$(t + 1) / T$"
    axes[0].set_yscale("log")
    _finish_axes(axes[0], x_label, r"$\beta_t$")
    _finish_axes(axes[1], x_label, r"$\bar\alpha_t$")
    _finish_axes(axes[2], x_label, r"$\log\,\mathrm{SNR}(t)$")
    num_without_signal = sum(1 for table in alpha_bars.values() if table[-1] == 0)
    if num_without_signal:
        share = f" for {num_without_signal} of {len(alpha_bars)}" if len(alpha_bars) > 1 else ""
        axes[2].text(0.04, 0.05, rf"$-\infty$ at the end{share}", transform=axes[2].transAxes, fontsize=9)
    if weights:
        _use_log_axis_if_wide(axes[3], np.concatenate(list(weights.values())))
        _finish_axes(axes[3], x_label, "loss weight")
    if len(lines) == 1:
        figure.suptitle(_shorten(*alpha_bars), fontsize=11, parse_math=False)
    else:
        longest = max(len(_shorten(name)) for name in alpha_bars)
        num_columns = max(1, min(len(lines), MAX_LEGEND_LINE // (longest + 8)))
        _add_legend(figure, lines, list(alpha_bars), loc="outside lower center", ncols=num_columns)
    save_figure(figure, path)


def _check_schedules(alpha_bars: Mapping[str, FloatArray], weights: Mapping[str, FloatArray]) -> None:
    if not alpha_bars:
        raise ValueError("schedules is empty; give the alphas_cumprod of at least one schedule.")
    for name, table in alpha_bars.items():
        is_in_range = table.ndim == 1 and table.size > 0 and bool(((table >= 0) & (table < 1)).all())
        if not is_in_range or (np.diff(table) > 0).any():
            raise ValueError(
                f"schedules[{name!r}] must be alphas_cumprod, a list of numbers that fall from below 1 to 0 or above."
            )
    for name, table in weights.items():
        if name not in alpha_bars or table.shape != alpha_bars[name].shape:
            raise ValueError(
                f"loss_weights[{name!r}] of shape {table.shape} must have the name and the length of a schedule; give "
                "one weight per timestep."
            )


def betas_of(alpha_bar: FloatArray) -> FloatArray:
    """Return beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}; 1 if alpha_bar_{t-1} is 0."""
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    return np.asarray(1 - np.divide(alpha_bar, before, out=np.zeros_like(alpha_bar), where=before > 0))


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of a size in inches, of DPI pixels each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG without the version of matplotlib in its metadata, so that equal figures are equal files."""
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


def _finish_axes(axes: Any, x: str, y: str) -> None:
    """Label the axes and draw a grid."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def _use_log_axis_if_wide(axes: Any, values: FloatArray) -> None:
    """Make the y axis logarithmic if all values are positive and the largest is over 5 times the smallest.

    Up to three decades, ticks are plain numbers at 1, 2 and 5; beyond, powers of ten.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    known = values[np.isfinite(values)]
    if not known.size or not 0 < 5 * known.min() < known.max():
        return
    axes.set_yscale("log")
    if known.max() < 1000 * known.min():
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())


def _add_legend(owner: Any, lines: Sequence[Any], names: Sequence[str], **options: Any) -> None:
    """Add a legend with literal names: matplotlib would read dollar signs as math and hide names with an underscore."""
    legend = owner.legend(lines, [str(number) for number in range(len(lines))], frameon=False, **options)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(_shorten(name))


def _shorten(name: str) -> str:
    """Remove the middle of a name that is too long for a legend."""
    if len(name) <= MAX_NAME_LENGTH:
        return name
    half = MAX_NAME_LENGTH // 2
    return f"{name[: half - 1]}…{name[-half:]}"
