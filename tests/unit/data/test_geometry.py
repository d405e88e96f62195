"""What is cut out of an image, and how it is resized."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from ddpm_hf.config import DataConfig
from ddpm_hf.data import DataError
from ddpm_hf.data.decode import Geometry
from tests.unit.data.helpers import RANDOM, RGB, encode, open_one, open_source, refusal, write_files, write_parquet

WIDE = RANDOM.integers(0, 256, (8, 24, 3), dtype=np.uint8)


def place(pixels: np.ndarray, **settings: object) -> np.ndarray:
    """Returns what is stored of an image (height, width, channels)."""
    return Geometry.of(DataConfig(**settings)).apply(pixels, "the image")  # type: ignore[arg-type]


def test_unequal_sizes_are_refused_until_a_resolution_is_set(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(RGB), encode(RGB), encode(RGB[:, :4])])
    message = refusal(path, tmp_path / "cache")
    assert message == (
        f"image 2 of {path} has 4x6 pixels where the first has 5x6; set data.resolution to resize all images to one "
        "size."
    )
    assert open_source(path, tmp_path / "cache", resolution=4).images.shape == (3, 3, 4, 4)


def test_an_image_of_the_right_size_is_not_resampled(tmp_path: Path) -> None:
    assert np.array_equal(open_one(tmp_path, encode(RGB[:5]), resolution=5), RGB[:5])


def test_an_oblong_size_can_be_asked_for(tmp_path: Path) -> None:
    assert np.array_equal(open_one(tmp_path, encode(RGB), resolution=[6, 5]), RGB)
    assert open_one(tmp_path, encode(WIDE), resolution=[4, 10]).shape == (4, 10, 3)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (9, 24), (31, 17)])
@pytest.mark.parametrize("size", [(4, 4), (3, 7), (16, 16)])
def test_the_shorter_side_is_resized_and_the_centre_cut_out(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """To the value, what Pillow's own ImageOps.fit does."""
    pixels = RANDOM.integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = ImageOps.fit(Image.fromarray(pixels), size[::-1], Image.Resampling.LANCZOS)
    assert np.array_equal(place(pixels, resolution=list(size)), np.asarray(expected))


@pytest.mark.parametrize(
    "settings",
    [{"resolution": 32}, {"resolution": 64}, {"resolution": [48, 100]}, {"resolution": 256, "resize_to": 292}],
    ids=str,
)
def test_no_image_is_asked_for_more_than_it_has(settings: dict[str, Any]) -> None:
    """For every side up to 3000, upright and lying: sides such as 49 and 98 are rounded up on the way."""
    geometry = Geometry.of(DataConfig(**settings))
    for side in range(1, 3001):
        for width, height in ((side, 2 * side), (2 * side, side), (side, 135), (side, side)):
            (left, top, right, bottom), _ = geometry._box_and_size(width, height, "the image")
            assert 0 <= left < right <= width, (width, height)
            assert 0 <= top < bottom <= height, (width, height)


def test_an_image_whose_box_is_rounded_is_resized_like_its_neighbours() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (135, 98, 3), dtype=np.uint8)
    expected = ImageOps.fit(Image.fromarray(pixels), (64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(place(pixels, resolution=64), np.asarray(expected))


def test_what_cannot_be_resized_is_named() -> None:
    geometry = Geometry(None, (0, 4), 1.0, "lanczos", is_random_crop=False)
    with pytest.raises(DataError, match=r"photo 7 has 24x8 pixels and cannot be resized \(.*\)"):
        geometry.apply(WIDE, "photo 7")


def test_whole_pixels_are_cut_out_where_nothing_is_resized() -> None:
    """An odd margin would otherwise shift the image by half a pixel, and blur it."""
    assert np.array_equal(place(WIDE[:, :13], resolution=8), WIDE[:, 2:10])


def test_making_images_smaller_does_not_alias(tmp_path: Path) -> None:
    """A checkerboard of single pixels is gray from afar; without antialiasing it stays black and white."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    for name in ("lanczos", "bicubic", "bilinear", "hamming", "box"):
        small = open_one(tmp_path / name, encode(board), resolution=8, resize_filter=name)
        assert abs(small.astype(int) - 127).max() <= 8, name
    assert set(np.unique(open_one(tmp_path, encode(board), resolution=8, resize_filter="nearest"))) <= {0, 255}


@pytest.mark.parametrize("name", ["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"])
def test_every_filter_is_the_one_of_pillow(name: str) -> None:
    expected = Image.fromarray(WIDE).resize((12, 4), Image.Resampling[name.upper()], box=(0, 0, 24, 8))
    assert np.array_equal(place(WIDE, resolution=[4, 12], resize_filter=name), np.asarray(expected))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_16_bits_and_many_channels_are_resized_like_8_bits(channels: int) -> None:
    """With 8 bits Pillow rounds after the horizontal and again after the vertical pass.

    The second pass weighs the error of the first, up to 1/2, with Lanczos coefficients, whose absolute values add up to
    1.38 here, and adds another 1/2: 1.19 in all. Where the first pass leaves the range it is cut, with 8 bits alone, so
    the values here are such that it does not.
    """
    pixels = RANDOM.integers(64, 192, (30, 21, channels), dtype=np.uint8)
    planes = [place(pixels[..., [number]], resolution=8)[..., 0] for number in range(channels)]
    deep = place(pixels.astype(np.uint16) * 257, resolution=8)
    assert deep.dtype == np.uint16
    assert abs(deep / 257 - np.stack(planes, axis=-1)).max() <= 1.2


def test_16_bits_are_resized_with_all_of_them() -> None:
    """A ramp that lies within one value of 8 bits stays a ramp."""
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8, 1)
    expected = np.rint(ramp.reshape(4, 2, 4, 2).mean((1, 3)))
    assert np.array_equal(place(ramp, resolution=4, resize_filter="box")[..., 0], expected)


@pytest.mark.parametrize("factor", [1, 257])
def test_what_cannot_be_seen_does_not_bleed_into_what_can(factor: int) -> None:
    """A red image whose right half is transparent green: resized, every visible pixel is red."""
    pixels = np.zeros((16, 16, 4), np.uint8 if factor == 1 else np.uint16)
    pixels[:, :8], pixels[:, 8:] = (255 * factor, 0, 0, 255 * factor), (0, 255 * factor, 0, 0)
    small = place(pixels, resolution=5) // factor
    visible = small[small[..., 3] > 4]
    assert (visible[..., 0] >= 250).all()
    assert (visible[..., 1] <= 5).all()


@pytest.mark.parametrize("first", [4, [10, 2, 14, 6]])
def test_a_crop_before_resizing_is_exact(first: int | list[int]) -> None:
    expected = WIDE[2:6, 10:14]
    assert np.array_equal(place(WIDE, crop_before_resize=first), expected)
    resized = Image.fromarray(np.ascontiguousarray(expected)).resize((2, 2), Image.Resampling.LANCZOS)
    assert np.array_equal(place(WIDE, crop_before_resize=first, resolution=2), np.asarray(resized))


def test_nothing_outside_of_the_first_crop_is_seen() -> None:
    """Filters look beyond the pixel they make; white all around must not brighten the edge."""
    pixels = np.full((20, 20, 3), 255, np.uint8)
    pixels[5:15, 5:15] = 0
    assert place(pixels, crop_before_resize=10, resolution=4).max() == 0


@pytest.mark.parametrize("first", [9, [0, 0, 25, 8], [0, 1, 24, 9]])
def test_a_first_crop_that_does_not_fit_is_refused(tmp_path: Path, first: int | list[int]) -> None:
    folder = write_files(tmp_path / "x", {"cat/a.png": encode(WIDE)})
    message = refusal(folder, tmp_path / "cache", crop_before_resize=first)
    assert f"image 0 of {folder} (cat/a.png) has 24x8 pixels, too few for data.crop_before_resize {first}" in message


def test_room_is_left_for_random_crops() -> None:
    assert place(WIDE, resolution=4, crop="random").shape == (4, 12, 3)
    assert place(WIDE, resolution=4, resize_to=6, crop="random").shape == (6, 18, 3)
    assert np.array_equal(place(WIDE, resolution=4, resize_to=0, crop="random"), WIDE)


def test_without_resizing_the_centre_is_cut_out_as_it_is(tmp_path: Path) -> None:
    assert np.array_equal(place(WIDE, resolution=[4, 6], resize_to=0), WIDE[2:6, 9:15])
    folder = write_files(tmp_path / "x", {"a.png": encode(WIDE), "b.png": encode(WIDE[:5])})
    message = refusal(folder, tmp_path / "cache", resolution=6, resize_to=0)
    assert f"image 1 of {folder} (b.png) has 24x5 pixels, too few to cut 6x6 out of it" in message


def test_larger_than_needed_means_a_smaller_part() -> None:
    """Resized to 8 of which 4 are kept: the middle half of the image."""
    found = place(WIDE[:, :8], resolution=4, resize_to=8)
    assert np.array_equal(found, WIDE[2:6, 2:6])
