"""Pictures of images and losses: grids, denoising strips, animations, loss curves.

Arrays in, pictures out; no torch. Images are uint8 in [0, 255], (number, height, width, channels), with 1 channel
(gray), 3 (RGB) or 4 (RGBA, shown on white). Other channels are shown side by side, each as a gray image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
AnyFont: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

BACKGROUND = 255
LABEL_COLOR = (60, 60, 60)
LABEL_HEIGHT = 26
LARGEST_FONT, SMALLEST_FONT = 17, 8
LINE_COLOR, VALIDATION_COLOR = "#1f5a94", "#c4541b"


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
    figure.savefig(path, format="png", dpi=130, metadata={"Software": None})


def _loss_figure(
    steps: Sequence[int], losses: Sequence[float], validation_steps: Sequence[int], validation_losses: Sequence[float]
) -> Any:
    """Returns the matplotlib figure of `loss_curve`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_losses(axes, np.asarray(steps), np.asarray(losses, np.float64))
    if validation_steps:
        axes.plot(
            validation_steps, validation_losses, "o-", ms=4, lw=1.5, color=VALIDATION_COLOR, label="validation loss"
        )
    _style_axes(axes, np.asarray([*losses, *validation_losses], np.float64))
    return figure


def _draw_losses(axes: Any, steps: npt.NDArray[Any], losses: npt.NDArray[np.float64]) -> None:
    """Draws the raw losses and their moving average, over about a fiftieth of the curve."""
    finite = np.isfinite(losses)
    steps, num_left_out = steps[finite], int((~finite).sum())
    losses = losses[finite]
    note = f" ({num_left_out} not finite)" if num_left_out else ""
    if losses.size < 20:
        axes.plot(steps, losses, "o-", ms=3, lw=1.5, color=LINE_COLOR, label=f"training loss{note}")
        return
    axes.plot(steps, losses, lw=0.8, color=LINE_COLOR, alpha=0.3, label=f"training loss{note}")
    smooth = _moving_average(losses, max(3, losses.size // 50))
    axes.plot(steps, smooth, lw=1.8, color=LINE_COLOR, label="moving average")


def _style_axes(axes: Any, losses: npt.NDArray[np.float64]) -> None:
    """Labels the axes of a loss curve, logarithmic if it spans a wide range, and draws what helps to read it."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

    finite = losses[np.isfinite(losses)]
    if finite.size and 0 < 5 * finite.min() < finite.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    # So that the place of a few points says how far the run was, and that of a single one how large its loss is.
    axes.set_xlim(left=0)
    if finite.size == 1:
        axes.set_ylim(bottom=min(0.0, finite[0]))
    axes.legend(frameon=False)


def _moving_average(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """Averages each value with up to `width` neighbours on each side, never more after it than before it.

    So the steep beginning is not averaged away, and the last values are not followed one by one.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    before = np.minimum(width, index)
    after = np.minimum(before, len(values) - 1 - index)
    averages: npt.NDArray[np.float64] = (sums[index + after + 1] - sums[index - before]) / (before + after + 1)
    return averages


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


def _write_labels(picture: Image.Image, labels: Sequence[str], centers: Sequence[float], width: int) -> None:
    """Writes a word above each column, all in the largest size in which the longest one fits, cut if none does."""
    draw = ImageDraw.Draw(picture)
    for size in range(LARGEST_FONT, SMALLEST_FONT - 1, -1):
        font = ImageFont.load_default(size)
        if max(draw.textlength(label, font) for label in labels) <= width:
            break
    for label, center in zip(labels, centers, strict=True):
        text = _fit(draw, label, font, width)
        draw.text((center, LABEL_HEIGHT / 2), text, LABEL_COLOR, font, anchor="mm")


def _fit(draw: ImageDraw.ImageDraw, text: str, font: AnyFont, width: int) -> str:
    """Cuts a word with an ellipsis so that it is at most `width` pixels long."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
