"""Pictures of images: grids, strips, animations.

Images are uint8 in [0, 255], (number, height, width, channels), with 1 channel
(gray), 3 (RGB) or 4 (RGBA, shown on white). Other channels are shown side by side, each as a gray image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

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
