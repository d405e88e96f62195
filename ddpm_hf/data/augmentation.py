"""Augmentation that does not leak into samples, because its parameters condition the network.

Karras et al. 2022, appendix F.2; transforms, magnitudes, order and parameters are those of their code. Random values
are drawn and turned into matrices on the host in float64, and images are transformed on their device in float32. All
sums have a fixed order, so an image does not depend on the batch that it is in.

There are two differences. The reflection at the border has no end, where their code continues with zeros beyond one
image size. Images without a geometric transform are not resampled, which would change nothing but the rounding.
"""

import math
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_hf.config import AugmentationTransform, ConfigError, DataConfig, log_warning
from ddpm_hf.data.loader import take_pixels, to_device
from ddpm_hf.rng import numpy_generator

# Magnitudes in the code of Karras et al. 2022; sizes are fractions of the image, angles are uniform over the circle.
TRANSLATE_INT_MAX = 0.125
SCALE_STD = 0.2  # log2
ANISO_STD = 0.2  # log2
ANISO_ROTATE_PROBABILITY = 0.5
TRANSLATE_FRAC_STD = 0.125
BRIGHTNESS_STD = 0.2
CONTRAST_STD = 0.5  # log2
SATURATION_STD = 1.0  # log2

COLOR_TRANSFORMS = ("brightness", "contrast", "lumaflip", "hue", "saturation")
_ORDER: tuple[AugmentationTransform, ...] = get_args(AugmentationTransform)
_TWO_PARAMETERS = ("rotate_int", "translate_int", "rotate_frac", "aniso", "translate_frac", "hue")

_BLOCK_SIZE = 32
"""Samples that share a generator of parameters."""
_MAX_RESAMPLED_VALUES = 2**24
"""Values at twice the resolution that are in memory at once; more images are resampled in parts."""

# Low-pass filter of the symlet of order 6.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip

Values = dict[str, NDArray[np.float64]]
"""Transform -> its random values, (number,) or (number, 2); 0 leaves an image as it is."""


class Augmentation:
    """The augmentation of a run.

    Args:
        config: Probability and names of the transforms.
        image_shape: (channels, height, width).
        seed: The seed of the run.

    Attributes:
        names: The transforms in the order in which they are applied.
        num_parameters: Number of parameters of an image.

    Raises:
        ConfigError: A transform cannot be applied to images of this shape.
    """

    def __init__(self, config: DataConfig, image_shape: tuple[int, int, int], seed: int) -> None:
        self._probability, self._seed = config.augmentation, seed
        self.names = [name for name in _ORDER if name in config.augmentation_transforms]
        self.num_parameters = sum(2 if name in _TWO_PARAMETERS else 1 for name in self.names)
        channels, height, width = image_shape
        if "rotate_int" in self.names and height != width:
            raise ConfigError(
                f"data.augmentation_transforms rotate_int needs square images, but these are {height}x{width}; "
                "remove it."
            )
        colors = [name for name in self.names if name in COLOR_TRANSFORMS]
        if colors and channels not in (1, 3):
            raise ConfigError(
                f"data.augmentation_transforms {', '.join(colors)} needs gray or RGB images, but these have {channels} "
                "channels; remove it, or set data.num_channels to 1 or 3."
            )
        if channels == 1 and (unused := [name for name in ("hue", "saturation") if name in colors]):
            log_warning(
                f"data.augmentation_transforms {' and '.join(unused)} {'has' if len(unused) == 1 else 'have'} no "
                "effect on gray images."
            )

    def __call__(self, images: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment consecutive samples of a run; an image depends on the seed and the number of its sample only.

        Args:
            images: float32 in [-1, 1], (batch, channels, height, width).
            start: Number of the first sample.

        Returns:
            The images, and float32 parameters (batch, num_parameters), 0 for images that are not augmented.
        """
        values = self.draw(start, start + len(images))
        parameters = parameters_of(values, *images.shape[2:])
        return transform(images, values), to_device(parameters, images.device)

    def draw(self, start: int, stop: int) -> Values:
        """Draw the random values of samples start to stop - 1.

        Each transform is applied with the probability of the configuration, `xflip` always: it mirrors half of the
        images.
        """
        first, end = start // _BLOCK_SIZE, -(-stop // _BLOCK_SIZE)
        blocks = [self._draw_block(block) for block in range(first, end)]
        part = slice(start - first * _BLOCK_SIZE, stop - first * _BLOCK_SIZE)
        return {name: np.concatenate([block[name] for block in blocks])[part] for name in self.names}

    def _draw_block(self, block: int) -> Values:
        generator = numpy_generator(self._seed, "augmentation_transforms", block)
        values: Values = {}
        for name in self.names:
            is_applied = generator.random(_BLOCK_SIZE) < (1 if name == "xflip" else self._probability)
            drawn = _draw(name, generator, _BLOCK_SIZE)
            values[name] = np.where(is_applied if drawn.ndim == 1 else is_applied[:, None], drawn, 0)
        return values


def _draw(name: AugmentationTransform, generator: np.random.Generator, number: int) -> NDArray[np.float64]:
    match name:
        case "xflip" | "yflip" | "lumaflip":
            return generator.integers(2, size=number).astype(float)
        case "rotate_int":  # quarter turns
            return generator.integers(4, size=number).astype(float)
        case "translate_int":
            return generator.uniform(-1, 1, (number, 2))
        case "rotate_frac" | "hue":
            return generator.uniform(-math.pi, math.pi, number)
        case "aniso":  # strength and direction
            direction = generator.uniform(-math.pi, math.pi, number)
            is_rotated = generator.random(number) < ANISO_ROTATE_PROBABILITY
            return np.stack([generator.standard_normal(number), np.where(is_rotated, direction, 0)], axis=1)
        case "translate_frac":
            return generator.standard_normal((number, 2))
        case _:
            return generator.standard_normal(number)


def parameters_of(values: Values, height: int, width: int) -> NDArray[np.float32]:
    """Return the parameters of images of a size, which condition the network, (number, num_parameters)."""
    columns: list[NDArray[Any]] = []
    for name, w in values.items():
        match name:
            case "rotate_int":
                columns += [(w == 1) | (w == 2), (w == 2) | (w == 3)]
            case "translate_int":
                shifts = _shifts(w, height, width)
                columns += [shifts[:, 0] / (width * TRANSLATE_INT_MAX), shifts[:, 1] / (height * TRANSLATE_INT_MAX)]
            case "rotate_frac" | "hue":
                columns += [np.cos(w) - 1, np.sin(w)]
            case "aniso":
                columns += [w[:, 0] * np.cos(w[:, 1]), w[:, 0] * np.sin(w[:, 1])]
            case "translate_frac":
                columns += [w[:, 0], w[:, 1]]
            case _:
                columns += [w]
    return np.stack(columns, axis=1).astype(np.float32)


def transform(images: torch.Tensor, values: Values) -> torch.Tensor:
    """Apply transforms, first of whole pixels, then geometric ones, then those of color.

    Args:
        images: float32 (batch, channels, height, width).
        values: The random values of each image.
    """
    images = _move_pixels(images, values)
    inverse = inverse_geometry(values, *images.shape[2:])
    rows = np.flatnonzero((inverse != np.eye(3)).any(axis=(1, 2)))
    if len(rows):
        on_device = to_device(rows, images.device)
        images = images.index_copy(0, on_device, resample(images.index_select(0, on_device), inverse[rows]))
    matrix = color_matrix(values)
    rows = np.flatnonzero((matrix != np.eye(4)).any(axis=(1, 2)))
    if len(rows):
        on_device = to_device(rows, images.device)
        images = images.index_copy(0, on_device, _transform_colors(images.index_select(0, on_device), matrix[rows]))
    return images


# ------------------------------------------------------------------------------------------------------ whole pixels


def _shifts(w: NDArray[np.float64], height: int, width: int) -> NDArray[np.int64]:
    """Return the shifts of translate_int in pixels, (number, 2): x, y."""
    return np.rint(w * (width, height) * TRANSLATE_INT_MAX).astype(np.int64)


def _reflect(index: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return the pixel at any index of a row that is reflected at the centers of its first and last pixel."""
    return size - 1 - np.abs(size - 1 - index % max(1, 2 * size - 2))


def _move_pixels(images: torch.Tensor, values: Values) -> torch.Tensor:
    """Apply xflip, yflip, rotate_int and translate_int, which move whole pixels."""

    def where(mask: NDArray[np.bool_], moved: torch.Tensor) -> torch.Tensor:
        return torch.where(to_device(mask, images.device)[:, None, None, None], moved, images)

    if "xflip" in values:
        images = where(values["xflip"] == 1, images.flip(3))
    if "yflip" in values:
        images = where(values["yflip"] == 1, images.flip(2))
    if "rotate_int" in values:
        w = values["rotate_int"]
        images = where((w == 1) | (w == 2), images.flip(3))
        images = where((w == 2) | (w == 3), images.flip(2))
        images = where((w == 1) | (w == 3), images.transpose(2, 3))
    if "translate_int" in values:
        height, width = images.shape[2:]
        shifts = _shifts(values["translate_int"], height, width)
        columns = _reflect(np.arange(width) - shifts[:, :1], width)
        rows = _reflect(np.arange(height) + shifts[:, 1:], height)
        images = take_pixels(images, to_device(rows, images.device), to_device(columns, images.device))
    return images


# ---------------------------------------------------------------------------------------------------------- geometry


def _matrices(*rows: list[Any]) -> NDArray[np.float64]:
    """Return matrices (number, size, size) of entries that are numbers or (number,)."""
    entries = np.broadcast_arrays(*(entry for row in rows for entry in row))
    return np.stack(entries, axis=-1).reshape(*entries[0].shape, len(rows), -1).astype(float)


def _rotation(angle: NDArray[np.float64]) -> NDArray[np.float64]:
    cosine, sine = np.cos(angle), np.sin(angle)
    return _matrices([cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1])


def _scaling(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return _matrices([x, 0, 0], [0, y, 0], [0, 0, 1])


def inverse_geometry(values: Values, height: int, width: int) -> NDArray[np.float64]:
    """Return the maps from places in the new images to places in the old ones, in pixels from the center.

    Returns:
        (number, 3, 3), on homogeneous coordinates (x, y, 1); the identity for images without a geometric transform.
    """
    number = len(next(iter(values.values())))
    inverse = np.broadcast_to(np.eye(3), (number, 3, 3))
    if "scale" in values:
        factor = np.exp2(-SCALE_STD * values["scale"])
        inverse = inverse @ _scaling(factor, factor)
    if "rotate_frac" in values:
        inverse = inverse @ _rotation(values["rotate_frac"])
    if "aniso" in values:
        strength, direction = values["aniso"].T
        factor = np.exp2(-ANISO_STD * strength)
        inverse = inverse @ _rotation(-direction) @ _scaling(factor, 1 / factor) @ _rotation(direction)
    if "translate_frac" in values:
        x, y = -TRANSLATE_FRAC_STD * values["translate_frac"].T
        inverse = inverse @ _matrices([1, 0, x * width], [0, 1, y * height], [0, 0, 1])
    return inverse


def resample(images: torch.Tensor, inverse: NDArray[np.float64]) -> torch.Tensor:
    """Transform images without aliasing: reflect, double the resolution, interpolate linearly, halve the resolution.

    Args:
        images: float32 (batch, channels, height, width).
        inverse: Returned by `inverse_geometry`, (batch, 3, 3).
    """
    _, channels, height, width = images.shape
    margins = _margins(inverse, height, width)
    num_values = channels * 4 * (width + 2 * margins[0]) * (height + 2 * margins[1])
    step = max(1, _MAX_RESAMPLED_VALUES // num_values)
    parts = range(0, len(images), step)
    return torch.cat([_resample(images[i : i + step], inverse[i : i + step], *margins) for i in parts])


def _places(size: int) -> NDArray[np.float64]:
    """Return where the new images are evaluated, in pixels from the center: twice per pixel, with a margin of five."""
    return np.arange(-5, 2 * size + 5) / 2 - (size - 1) / 2


def _margins(inverse: NDArray[np.float64], height: int, width: int) -> tuple[int, int]:
    """Return by how many pixels images are enlarged by reflection on each side, horizontally and vertically."""
    x, y = _places(width)[[0, -1]], _places(height)[[0, -1]]
    corners = np.array([[x[0], x[0], x[1], x[1]], [y[0], y[1], y[0], y[1]], [1, 1, 1, 1]])
    reach_x, reach_y = np.abs(inverse[:, :2] @ corners).max(axis=(0, 2)).tolist()
    # The filter reads three pixels on each side, and the interpolation the next value.
    return max(0, math.ceil(reach_x - (width - 1) / 2)) + 4, max(0, math.ceil(reach_y - (height - 1) / 2)) + 4


def _resample(images: torch.Tensor, inverse: NDArray[np.float64], margin_x: int, margin_y: int) -> torch.Tensor:
    height, width = images.shape[2:]
    device = images.device
    columns = to_device(_reflect(np.arange(-margin_x, width + margin_x), width), device)
    rows = to_device(_reflect(np.arange(-margin_y, height + margin_y), height), device)
    images = images.index_select(3, columns).index_select(2, rows)
    images = _upsample(_upsample(images).transpose(2, 3)).transpose(2, 3).contiguous()
    matrix = to_device(inverse[:, :2].astype(np.float32), device)[..., None, None]
    x = to_device(_places(width).astype(np.float32), device)
    y = to_device(_places(height).astype(np.float32), device)[:, None]
    # Twice the place in the old image, counted from its first pixel; margins only move the index of a value.
    x, y = (matrix[:, axis, 0] * x + matrix[:, axis, 1] * y + matrix[:, axis, 2] for axis in (0, 1))
    images = _interpolate(images, 2 * x + (width - 1), 2 * y + (height - 1), 2 * margin_x - 6, 2 * margin_y - 6)
    return _downsample(_downsample(images).transpose(2, 3)).transpose(2, 3).contiguous()


def _weighted_sum(weights: tuple[float, ...], tensors: list[torch.Tensor]) -> torch.Tensor:
    """Add products one after the other: the sums of a convolution depend on the batch."""
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def _upsample(images: torch.Tensor) -> torch.Tensor:
    """Double the width of images with a margin; the three pixels at each border, which lack neighbors, are left out.

    Value 2 q + i is the sum over d of SYM6[5 + i + 2 d] times pixel q - d.
    """
    stop = images.shape[3] - 3
    even, odd = (
        _weighted_sum(SYM6[5 + i - 2 * reach :: 2], [images[..., 3 - d : stop - d] for d in range(-reach, 6 - reach)])
        for i, reach in ((0, 2), (1, 3))
    )
    return torch.stack([even, odd], dim=4).flatten(3)


def _interpolate(images: torch.Tensor, x: torch.Tensor, y: torch.Tensor, offset_x: int, offset_y: int) -> torch.Tensor:
    """Interpolate linearly at places x - offset_x and y - offset_y, each (batch, rows, columns)."""
    left, top = x.floor(), y.floor()
    right_weight, lower_weight = (x - left)[:, None], (y - top)[:, None]
    width = images.shape[3]
    index = (top.long() + offset_y) * width + left.long() + offset_x
    shape = (*images.shape[:2], *index.shape[1:])
    values, index = images.flatten(2), index.flatten(1)[:, None].expand(-1, shape[1], -1)

    def row(index: torch.Tensor) -> torch.Tensor:
        left, right = (values.gather(2, place).reshape(shape) for place in (index, index + 1))
        return left * (1 - right_weight) + right * right_weight

    return row(index) * (1 - lower_weight) + row(index + width) * lower_weight


def _downsample(images: torch.Tensor) -> torch.Tensor:
    """Halve the width of images: value q is the sum over k of SYM6[k] times pixel 2 q + k."""
    length = images.shape[3] - len(SYM6) + 1
    return _weighted_sum(SYM6, [images[..., k : k + length : 2] for k in range(len(SYM6))])


# ------------------------------------------------------------------------------------------------------------- color


def color_matrix(values: Values) -> NDArray[np.float64]:
    """Return the maps of colors, (number, 4, 4), on homogeneous coordinates (red, green, blue, 1).

    Luma is the direction of gray: lumaflip mirrors along it, hue rotates around it, saturation stretches away from it.
    """
    number = len(next(iter(values.values())))
    matrix = identity = np.broadcast_to(np.eye(4), (number, 4, 4))
    axis = np.array([1, 1, 1, 0]) / math.sqrt(3)
    luma = np.outer(axis, axis)
    if "brightness" in values:
        shift = BRIGHTNESS_STD * values["brightness"]
        matrix = matrix + shift[:, None, None] * np.outer([1, 1, 1, 0], [0, 0, 0, 1])
    if "contrast" in values:
        factor = np.exp2(CONTRAST_STD * values["contrast"])
        matrix = (factor[:, None, None] * np.diag([1, 1, 1, 0]) + np.diag([0, 0, 0, 1])) @ matrix
    if "lumaflip" in values:
        matrix = (identity - 2 * luma * values["lumaflip"][:, None, None]) @ matrix
    if "hue" in values:
        # Rodrigues' formula.
        angle = values["hue"][:, None, None]
        cross = np.pad(np.cross(np.eye(3), axis[:3]), (0, 1))
        colors = np.diag([1.0, 1, 1, 0])
        matrix = (identity + np.sin(angle) * cross + (1 - np.cos(angle)) * (luma - colors)) @ matrix
    if "saturation" in values:
        factor = np.exp2(SATURATION_STD * values["saturation"])
        matrix = (luma + (identity - luma) * factor[:, None, None]) @ matrix
    return matrix


def _transform_colors(images: torch.Tensor, matrix: NDArray[np.float64]) -> torch.Tensor:
    """Apply matrices to RGB images; of gray ones, take the mean of the channels that would result."""
    linear, shift = matrix[:, :3, :3], matrix[:, :3, 3:]
    if images.shape[1] == 1:
        linear, shift = linear.sum(axis=2, keepdims=True).mean(axis=1, keepdims=True), shift.mean(axis=1, keepdims=True)
    weights = to_device(linear.astype(np.float32), images.device)[..., None, None]
    total = to_device(shift.astype(np.float32), images.device)[..., None]
    for channel in range(images.shape[1]):
        total = total + weights[:, :, channel] * images[:, channel, None]
    return total
