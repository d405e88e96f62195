"""An image of any kind is decoded without loss, cropped, resized and scaled; or an error names it."""

import io
import logging
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ddpm_hf.config import DataConfig
from ddpm_hf.data import DataError, normalize, to_uint8
from ddpm_hf.data.decode import EncodedImage, Geometry, read_header
from tests.unit.data.helpers import (
    DEEP_GRAY,
    DEEP_RGB,
    DEEP_RGBA,
    GRAY,
    RANDOM,
    RGB,
    RGBA,
    chunk,
    encode,
    encode_deep,
    open_one,
    open_source,
    pixels_of,
    refusal,
    write_files,
    write_parquet,
)

PALETTE = Image.fromarray(RGB).quantize(8)


@pytest.mark.parametrize("pixels", [GRAY[..., None], RGB, RGBA], ids=["L", "RGB", "RGBA"])
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP", "BMP", "TGA", "PPM"])
def test_plain_images_keep_every_bit(tmp_path: Path, pixels: np.ndarray, image_format: str) -> None:
    if image_format in ("BMP", "PPM") and pixels.shape[2] == 4:
        pytest.skip("Pillow writes no alpha channel in this format")
    if image_format == "WEBP" and pixels.shape[2] == 1:
        pytest.skip("WebP has no gray")
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    assert np.array_equal(open_one(tmp_path, encode(pixels.squeeze(), image_format, **options)), pixels)


@pytest.mark.parametrize("pixels", [DEEP_GRAY[..., None], DEEP_RGB, DEEP_RGBA], ids=["L", "RGB", "RGBA"])
def test_16_bits_keep_every_bit(tmp_path: Path, pixels: np.ndarray) -> None:
    """Pillow reduces 16-bit color to 8 bits."""
    found = open_one(tmp_path, encode_deep(pixels.squeeze()))
    assert found.dtype == np.uint16
    assert np.array_equal(found, pixels)


def write_16_bit_tiff(pixels: np.ndarray, byte_order: str, **tags: int) -> bytes:
    """Return an uncompressed TIFF of 16-bit color, which Pillow cannot write; `byte_order` is "<" (II) or ">" (MM)."""
    height, width, channels = pixels.shape
    data = pixels.astype(f"{byte_order}u2").tobytes()

    def short(*values: int) -> bytes:
        return np.array(values, f"{byte_order}u2").tobytes()

    def long(value: int) -> bytes:
        return np.array(value, f"{byte_order}u4").tobytes()

    bits_offset = 8 + len(data)
    directory_offset = bits_offset + 2 * channels
    numbers = {"orientation": 274, "planar_configuration": 284, "extra_samples": 338}
    directory = [
        (256, 3, 1, short(width, 0)), (257, 3, 1, short(height, 0)), (258, 3, channels, long(bits_offset)),
        (259, 3, 1, short(1, 0)), (262, 3, 1, short(2, 0)), (273, 4, 1, long(8)),
        (277, 3, 1, short(channels, 0)), (278, 3, 1, short(height, 0)), (279, 4, 1, long(len(data))),
        *((numbers[name], 3, 1, short(value, 0)) for name, value in tags.items()),
    ]  # fmt: skip
    head = (b"II" if byte_order == "<" else b"MM") + short(42) + long(directory_offset)
    entries = b"".join(short(number, kind) + long(count) + value for number, kind, count, value in sorted(directory))
    return head + data + short(*[16] * channels) + short(len(directory)) + entries + long(0)


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_16_bit_color_of_a_tiff_keeps_every_bit(tmp_path: Path, byte_order: str) -> None:
    assert np.array_equal(open_one(tmp_path / "RGB", write_16_bit_tiff(DEEP_RGB, byte_order)), DEEP_RGB)
    rgba = write_16_bit_tiff(DEEP_RGBA, byte_order, extra_samples=2)
    assert np.array_equal(open_one(tmp_path / "RGBA", rgba), DEEP_RGBA)
    rgbx = write_16_bit_tiff(DEEP_RGBA, byte_order, extra_samples=0)
    assert np.array_equal(open_one(tmp_path / "RGBX", rgbx), DEEP_RGBA[..., :3])


@pytest.mark.parametrize("tags", [{"extra_samples": 1}, {"extra_samples": 2, "planar_configuration": 2}], ids=str)
def test_16_bit_color_in_an_unusual_layout_is_refused(tmp_path: Path, tags: dict[str, int]) -> None:
    folder = write_files(tmp_path / "x", {"a.tif": write_16_bit_tiff(DEEP_RGBA, "<", **tags)})
    assert "(a.tif) has 16-bit color in separate planes or with premultiplied alpha" in refusal(folder, tmp_path)


def test_16_bit_color_without_opencv_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with data.on_bad_image skip: the images are not damaged."""
    folder = write_files(tmp_path / "x", {"a.png": encode_deep(DEEP_RGB), "b.png": encode_deep(DEEP_GRAY)})
    monkeypatch.setitem(sys.modules, "cv2", None)
    message = refusal(folder, tmp_path, on_bad_image="skip", max_bad_fraction=0.9)
    assert message.startswith(f"image 0 of {folder} (a.png) has 16-bit color, which needs OpenCV")
    assert 'pip install "ddpm_hf[deep-color]"' in message
    assert np.array_equal(open_one(tmp_path / "gray", encode_deep(DEEP_GRAY))[..., 0], DEEP_GRAY)


@pytest.mark.parametrize("num_missing", [20, 60])
def test_truncated_16_bit_color_is_a_bad_image(tmp_path: Path, num_missing: int) -> None:
    files = {"a.png": encode_deep(DEEP_RGB)[:-num_missing], "b.tif": write_16_bit_tiff(DEEP_RGB, "<")}
    folder = write_files(tmp_path / "x", files)
    message = refusal(folder, tmp_path)
    assert f"image 0 of {folder} (a.png) cannot be decoded (" in message
    if num_missing == 60:
        assert "OSError: image file is truncated" in message


@pytest.mark.parametrize("compression", ["raw", "tiff_adobe_deflate", "tiff_lzw"])
def test_16_bit_gray_of_a_tiff_keeps_every_bit(tmp_path: Path, compression: str) -> None:
    data = encode(DEEP_GRAY, "TIFF", compression=compression)
    assert np.array_equal(open_one(tmp_path, data)[..., 0], DEEP_GRAY)


def test_8_bit_images_among_16_bit_ones_are_scaled_exactly(tmp_path: Path) -> None:
    """255 becomes 65535: 257 times the value."""
    folder = write_files(tmp_path / "x", {"a.png": encode(GRAY), "b.png": encode_deep(DEEP_GRAY)})
    images = open_source(folder, tmp_path / "cache")
    assert np.array_equal(pixels_of(images)[..., 0], [GRAY.astype(np.uint16) * 257, DEEP_GRAY])


def test_a_palette_image_becomes_rgb(tmp_path: Path) -> None:
    assert np.array_equal(open_one(tmp_path, encode(PALETTE)), np.asarray(PALETTE.convert("RGB")))
    assert np.array_equal(open_one(tmp_path / "gif", encode(PALETTE, "GIF")), np.asarray(PALETTE.convert("RGB")))


def test_a_palette_with_transparency_keeps_it(tmp_path: Path) -> None:
    data = encode(PALETTE, transparency=bytes([0, 128] + [255] * 6))
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    assert len(np.unique(shown[..., 3])) > 1
    assert np.array_equal(open_one(tmp_path, data), shown)


@pytest.mark.parametrize(("image", "color"), [(GRAY, int(GRAY[0, 0])), (RGB, tuple(RGB[0, 0].tolist()))])
def test_a_transparent_color_is_transparent(tmp_path: Path, image: np.ndarray, color: Any) -> None:
    found = open_one(tmp_path, encode(image, transparency=color))
    assert [found.shape, found[0, 0, 3], found[1, 1, 3]] == [(6, 5, 4), 0, 255]


def test_a_one_bit_image_becomes_black_and_white(tmp_path: Path) -> None:
    bits = GRAY > 127
    assert np.array_equal(open_one(tmp_path, encode(Image.fromarray(bits)))[..., 0], np.where(bits, 255, 0))


@pytest.mark.parametrize("image_format", ["TIFF", "JPEG"])
def test_a_cmyk_image_becomes_rgb(tmp_path: Path, image_format: str) -> None:
    data = encode(Image.fromarray(RGB).convert("CMYK"), image_format)
    assert np.array_equal(open_one(tmp_path, data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_gray_with_transparency_becomes_rgba(tmp_path: Path) -> None:
    plain, deep = encode(Image.fromarray(RGBA[..., 2:], "LA")), encode_deep(DEEP_RGBA[..., 2:])
    assert np.array_equal(open_one(tmp_path / "8", plain), RGBA[..., [2, 2, 2, 3]])
    assert np.array_equal(open_one(tmp_path / "16", deep), DEEP_RGBA[..., [2, 2, 2, 3]])


ORIENTATIONS = range(2, 9)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return an image as the EXIF orientation says it is shown."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def with_orientation(number: int, image_format: str = "PNG", **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return encode(RGB, image_format, exif=exif, **options)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_exif_orientation_is_applied(tmp_path: Path, orientation: int, image_format: str) -> None:
    """JPEG is lossy, so only the shape is compared."""
    options = {"lossless": True} if image_format == "WEBP" else {}
    pixels = open_one(tmp_path, with_orientation(orientation, image_format, **options))
    assert pixels.shape == upright(RGB, orientation).shape
    assert image_format == "JPEG" or np.array_equal(pixels, upright(RGB, orientation))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_exif_orientation_of_16_bit_color_is_applied(tmp_path: Path, orientation: int) -> None:
    plain = encode_deep(DEEP_RGB)
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = upright(DEEP_RGB, orientation)
    for place in (33, len(plain) - 12):  # before and after the pixels
        png = plain[:place] + chunk(b"eXIf", exif.tobytes()[6:]) + plain[place:]
        if place == 33 or expected.shape == DEEP_RGB.shape:
            assert np.array_equal(open_one(tmp_path / str(place), png), expected)
    tiff = write_16_bit_tiff(DEEP_RGB, ">", orientation=orientation)
    assert np.array_equal(open_one(tmp_path / "tiff", tiff), expected)


def test_the_size_that_counts_is_the_upright_one(tmp_path: Path) -> None:
    """A 6x5 photo with a rotated orientation is 5x6."""
    turned = encode(np.ascontiguousarray(upright(RGB, 6)))
    folder = write_files(tmp_path / "x", {"a.png": turned, "b.png": with_orientation(6)})
    assert len(open_source(folder, tmp_path / "cache")) == 2


def test_exif_tags_behind_the_pixels_are_read(tmp_path: Path) -> None:
    """The tags of a PNG may follow its pixels, where the header does not show them."""
    plain = encode(RGB)
    exif = Image.Exif()
    exif[0x0112] = 6
    late = plain[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + plain[-12:]
    assert np.array_equal(open_one(tmp_path, late, resolution=5), upright(RGB, 6)[:, :5])
    folder = write_files(tmp_path / "x", {"a.png": plain, "b.png": late})
    assert "(b.png) has 6x5 pixels, but the first image has 5x6" in refusal(folder, tmp_path / "cache")


@pytest.mark.parametrize("tags", [b"MM\x00*garbage", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63"])
def test_damaged_exif_tags_are_ignored(tmp_path: Path, tags: bytes, recwarn: pytest.WarningsRecorder) -> None:
    data = encode(RGB, "JPEG", exif=tags)
    shown = np.asarray(Image.open(io.BytesIO(data)))
    recwarn.clear()
    assert np.array_equal(open_one(tmp_path, data), shown)
    assert not [warning for warning in recwarn if "EXIF" in str(warning.message)]


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation_is_used_with_a_warning(
    tmp_path: Path, image_format: str, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("RGB", (8, 8), (0, 0, 200 if number else 100)) for number in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, image_format, save_all=True, append_images=frames[1:], lossless=True)
    found = open_one(tmp_path, buffer.getvalue())
    assert found.shape == (8, 8, 3)
    assert abs(found[..., 2].astype(int) - 100).max() <= 3, "AVIF is not exact"
    assert "1 image with several frames: only the first frame is used." in caplog.text


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(GRAY.astype(np.int32)), "int32 values, whose range is unknown; set data.value_range to"),
        (Image.fromarray(GRAY.astype(np.float32)), "float32 values, whose range is unknown; set data.value_range to"),
        (Image.fromarray(RGB).convert("LAB"), "mode LAB; convert it to L, RGB or RGBA with 8 or 16 bits"),
    ],
    ids=["I", "F", "LAB"],
)
def test_pixels_of_an_unknown_range_are_refused(tmp_path: Path, image: Image.Image, reason: str) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(image, "TIFF")])
    assert refusal(path, tmp_path / "cache").startswith(f"image 0 of {path} has {reason}")


def test_more_channels_than_expected_are_refused(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "x", {"a.png": encode(RGB), "cat/b.png": encode(RGBA)})
    message = refusal(folder, tmp_path / "cache", num_channels=3)
    assert f"image 1 of {folder} (cat/b.png) has transparent pixels, but RGB is expected" in message
    assert "set data.num_channels to 4, or data.background to white or black" in message
    message = refusal(folder, tmp_path / "cache", num_channels=1)
    assert f"image 0 of {folder} (a.png) is a color image, but gray (L) is expected" in message


def test_channels_without_information_are_dropped(tmp_path: Path) -> None:
    opaque = np.concatenate([RGB, np.full((6, 5, 1), 255, np.uint8)], axis=2)
    assert np.array_equal(open_one(tmp_path / "a", encode(opaque), num_channels=3), RGB)
    gray = np.repeat(GRAY[..., None], 3, axis=2)
    assert np.array_equal(open_one(tmp_path / "b", encode(gray), num_channels=1), gray[..., :1])
    assert np.array_equal(
        open_one(tmp_path / "c", encode_deep(DEEP_RGB * 0 + 7), num_channels=1), DEEP_RGB[..., :1] * 0 + 7
    )


@pytest.mark.parametrize(("pixels", "full"), [(RGBA, 255), (DEEP_RGBA, 65535)], ids=["8", "16"])
@pytest.mark.parametrize(("background", "behind"), [("white", 1), ("black", 0)])
def test_transparent_pixels_are_composited_on_the_background(
    tmp_path: Path, pixels: np.ndarray, full: int, background: str, behind: int
) -> None:
    data = encode(pixels) if full == 255 else encode_deep(pixels)
    opacity = pixels[..., 3:] / full
    expected = np.rint(pixels[..., :3] * opacity + behind * full * (1 - opacity))
    assert np.array_equal(open_one(tmp_path, data, num_channels=3, background=background), expected)


def test_missing_channels_are_added(tmp_path: Path) -> None:
    assert np.array_equal(open_one(tmp_path, encode(GRAY), num_channels=3), np.repeat(GRAY[..., None], 3, axis=2))
    opaque = np.concatenate([RGB, np.full((6, 5, 1), 255, np.uint8)], axis=2)
    assert np.array_equal(open_one(tmp_path, encode(RGB), num_channels=4), opaque)
    assert (open_one(tmp_path, encode_deep(DEEP_RGB), num_channels=4)[..., 3] == 65535).all()


@pytest.mark.parametrize(
    ("kinds", "channels"),
    [([GRAY, GRAY], 1), ([GRAY, RGB], 3), ([RGB, GRAY], 3), ([RGBA, RGBA], 4)],
    ids=["L", "L RGB", "RGB L", "RGBA"],
)
def test_the_channels_hold_every_image(tmp_path: Path, kinds: list[np.ndarray], channels: int) -> None:
    folder = write_files(tmp_path / "x", {f"{number}.png": encode(image) for number, image in enumerate(kinds)})
    images = open_source(folder, tmp_path / "cache")
    assert images.image_shape == (channels, 6, 5)


def test_a_few_transparent_images_are_refused(tmp_path: Path) -> None:
    """They do not make the dataset RGBA. Opaque alpha channels are dropped."""
    opaque = np.concatenate([RGB, np.full((6, 5, 1), 255, np.uint8)], axis=2)
    harmless = write_files(tmp_path / "x", {"a.png": encode(RGB), "b.png": encode(opaque)})
    assert open_source(harmless, tmp_path / "cache").image_shape == (3, 6, 5)
    mixed = write_files(tmp_path / "y", {"a.png": encode(RGB), "b.png": encode(RGBA)})
    assert "(b.png) has transparent pixels, but RGB is expected" in refusal(mixed, tmp_path / "cache")


def announced(side: int) -> bytes:
    """Return a PNG with a size in its header, but without pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


BOMB = "has more than 89,478,485 pixels, Pillow's limit against decompression bombs"
UNKNOWN = "cannot be decoded (it is not an image in a supported format)"
BAD_IMAGES = {
    "truncated PNG": (encode(RGB)[:-30], "cannot be decoded (OSError: "),
    "truncated JPEG header": (encode(RGB, "JPEG")[:300], "cannot be decoded ("),
    "truncated JPEG": (encode(np.tile(RGB, (20, 20, 1)), "JPEG")[:-800], "cannot be decoded (OSError: image file is"),
    "text": (b"this is not an image", UNKNOWN),
    "web page": (b"<html>404</html>", UNKNOWN),
    "program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\n", UNKNOWN),
    "empty": (b"", "is empty (0 bytes)"),
    "large": (announced(10_000), BOMB),
    "huge": (announced(30_000), BOMB),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_named_with_its_class_folder(tmp_path: Path, kind: str) -> None:
    data, reason = BAD_IMAGES[kind]
    folder = write_files(tmp_path / "pets", {"cat/1.png": encode(RGB), "cat/2.png": data, "dog/3.png": data})
    message = refusal(folder, tmp_path / "cache", resolution=5)
    assert message.startswith(f"image 1 of {folder} (cat/2.png) {reason}")
    assert message.endswith("; repair or remove it, or set data.on_bad_image to skip.")
    assert not [entry for entry in (tmp_path / "cache").iterdir()], "no partial cache is left"


def test_a_bad_image_of_a_table_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(RGB), b"text"], names=["good.png", "bad.png"])
    assert f"image 1 of {path} (bad.png) cannot be decoded" in refusal(path, tmp_path / "cache")
    path = write_parquet(tmp_path / "y.parquet", [encode(RGB), None])
    assert f"image 1 of {path} cannot be read (it is missing)" in refusal(path, tmp_path / "cache")


def test_a_small_value_range_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For example 12-bit images in 16-bit files."""
    caplog.set_level(logging.WARNING)
    open_one(tmp_path, encode_deep(DEEP_GRAY // 16))
    assert "use only the values" in caplog.text
    assert "of 0 to 65535, so the contrast is low" in caplog.text
    caplog.clear()
    open_one(tmp_path / "full", encode_deep(DEEP_GRAY))
    assert "contrast" not in caplog.text


# ------------------------------------------------------------------------------------------------------------- geometry


WIDE = RANDOM.integers(0, 256, (8, 24, 3), dtype=np.uint8)


def place(pixels: np.ndarray, **settings: object) -> np.ndarray:
    """Return the preprocessed image (height, width, channels)."""
    return Geometry.of(DataConfig(**settings)).apply(pixels, "the image")  # type: ignore[arg-type]


def test_different_sizes_need_a_resolution(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(RGB), encode(RGB), encode(RGB[:, :4])])
    message = refusal(path, tmp_path / "cache")
    assert message == (
        f"image 2 of {path} has 4x6 pixels, but the first image has 5x6; set data.resolution to resize all images to "
        "one size."
    )
    assert open_source(path, tmp_path / "cache", resolution=4).images.shape == (3, 3, 4, 4)


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    assert np.array_equal(place(RGB[:5], resolution=5), RGB[:5])
    assert np.array_equal(place(RGB, resolution=[6, 5]), RGB)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (9, 24), (31, 17)])
@pytest.mark.parametrize("size", [(4, 4), (3, 7), (16, 16)])
def test_the_shorter_side_is_resized_and_the_center_cropped(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """Exactly as ImageOps.fit of Pillow."""
    pixels = RANDOM.integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = ImageOps.fit(Image.fromarray(pixels), size[::-1], Image.Resampling.LANCZOS)
    assert np.array_equal(place(pixels, resolution=list(size)), np.asarray(expected))


@pytest.mark.parametrize(
    "settings",
    [{"resolution": 32}, {"resolution": 64}, {"resolution": [48, 100]}, {"resolution": 256, "resize_to": 292}],
    ids=str,
)
def test_the_box_never_exceeds_the_image(settings: dict[str, Any]) -> None:
    """Pillow refuses a box outside of the image; sides such as 49 and 98 are rounded up on the way."""
    geometry = Geometry.of(DataConfig(resize_filter="nearest", **settings))
    canvas = np.zeros((3000, 3000, 1), np.uint8)
    for side in [*range(1, 300), *range(300, 3001, 11)]:
        for width, height in ((side, 135), (135, side), (side, side // 40 + 1), (side // 40 + 1, side)):
            found = geometry.apply(canvas[:height, :width], f"{width}x{height}")
            assert found.shape[:2] == geometry.size_after(width, height, "the image")


def test_a_rounded_box_is_resized_like_its_neighbors() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (135, 98, 3), dtype=np.uint8)
    expected = ImageOps.fit(Image.fromarray(pixels), (64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(place(pixels, resolution=64), np.asarray(expected))


def test_an_image_that_cannot_be_resized_is_named() -> None:
    geometry = Geometry(None, (0, 4), 1.0, "lanczos", is_random_crop=False)
    with pytest.raises(DataError, match=r"photo 7 has 24x8 pixels and cannot be resized \(.*\)"):
        geometry.apply(WIDE, "photo 7")


def test_crops_without_resizing_keep_whole_pixels() -> None:
    """An odd margin would shift the image by half a pixel, and blur it."""
    assert np.array_equal(place(WIDE[:, :13], resolution=8), WIDE[:, 2:10])


def test_downsampling_does_not_alias(tmp_path: Path) -> None:
    """A checkerboard of single pixels becomes gray; without antialiasing it stays black and white."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    for name in ("lanczos", "bicubic", "bilinear", "hamming", "box"):
        small = open_one(tmp_path / name, encode(board), resolution=8, resize_filter=name)
        assert abs(small.astype(int) - 127).max() <= 8, name
    assert set(np.unique(open_one(tmp_path, encode(board), resolution=8, resize_filter="nearest"))) <= {0, 255}


@pytest.mark.parametrize("name", ["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"])
def test_filters_are_those_of_pillow(name: str) -> None:
    expected = Image.fromarray(WIDE).resize((12, 4), Image.Resampling[name.upper()], box=(0, 0, 24, 8))
    assert np.array_equal(place(WIDE, resolution=[4, 12], resize_filter=name), np.asarray(expected))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_16_bits_and_many_channels_are_resized_like_8_bits(channels: int) -> None:
    """With 8 bits, Pillow rounds after the horizontal and after the vertical pass.

    The second pass weighs the error of the first, up to 1/2, with Lanczos coefficients, whose absolute values add up to
    1.38 here, and adds another 1/2: 1.19 in all. Where the first pass leaves the range it is cut, with 8 bits alone, so
    the values here are such that it does not.
    """
    pixels = RANDOM.integers(64, 192, (30, 21, channels), dtype=np.uint8)
    planes = [place(pixels[..., [number]], resolution=8)[..., 0] for number in range(channels)]
    deep = place(pixels.astype(np.uint16) * 257, resolution=8)
    assert deep.dtype == np.uint16
    assert abs(deep / 257 - np.stack(planes, axis=-1)).max() <= 1.2


def test_resizing_keeps_16_bits() -> None:
    """A ramp that 8 bits cannot represent stays a ramp."""
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8, 1)
    expected = np.rint(ramp.reshape(4, 2, 4, 2).mean((1, 3)))
    assert np.array_equal(place(ramp, resolution=4, resize_filter="box")[..., 0], expected)


@pytest.mark.parametrize("factor", [1, 257])
def test_transparent_pixels_do_not_bleed_into_visible_ones(factor: int) -> None:
    """In a red image with a transparent green half, every visible pixel stays red."""
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


def test_resizing_sees_nothing_outside_of_the_first_crop() -> None:
    """White pixels outside do not brighten the edge."""
    pixels = np.full((20, 20, 3), 255, np.uint8)
    pixels[5:15, 5:15] = 0
    assert place(pixels, crop_before_resize=10, resolution=4).max() == 0


@pytest.mark.parametrize("first", [9, [0, 0, 25, 8], [0, 1, 24, 9]])
def test_a_first_crop_larger_than_the_image_is_refused(tmp_path: Path, first: int | list[int]) -> None:
    folder = write_files(tmp_path / "x", {"cat/a.png": encode(WIDE)})
    message = refusal(folder, tmp_path / "cache", crop_before_resize=first)
    assert (
        f"image 0 of {folder} (cat/a.png) has 24x8 pixels, fewer than data.crop_before_resize {first} needs" in message
    )


def test_random_crops_keep_the_whole_image() -> None:
    assert place(WIDE, resolution=4, crop="random").shape == (4, 12, 3)
    assert place(WIDE, resolution=4, resize_to=6, crop="random").shape == (6, 18, 3)
    assert np.array_equal(place(WIDE, resolution=4, resize_to=0, crop="random"), WIDE)


def test_resize_to_0_crops_the_center(tmp_path: Path) -> None:
    assert np.array_equal(place(WIDE, resolution=[4, 6], resize_to=0), WIDE[2:6, 9:15])
    folder = write_files(tmp_path / "x", {"a.png": encode(WIDE), "b.png": encode(WIDE[:5])})
    message = refusal(folder, tmp_path / "cache", resolution=6, resize_to=0)
    assert f"image 1 of {folder} (b.png) has 24x5 pixels, too few for a crop of 6x6" in message


def test_a_larger_resize_to_keeps_a_smaller_part() -> None:
    """Resized to 8, cropped to 4: the middle half of the image."""
    found = place(WIDE[:, :8], resolution=4, resize_to=8)
    assert np.array_equal(found, WIDE[2:6, 2:6])


# ---------------------------------------------------------------------------------------------------------- value range


@pytest.mark.parametrize(("dtype", "count"), [(torch.uint8, 256), (torch.uint16, 65536)])
def test_normalize_maps_stored_pixels_exactly(dtype: torch.dtype, count: int) -> None:
    """Both ends are exact, and the others are to the rounding of float32."""
    pixels = torch.arange(count, dtype=torch.int32).to(dtype).reshape(1, 1, 16, -1)
    values = normalize(pixels)
    assert values.dtype == torch.float32
    assert (values.min(), values.max()) == (-1.0, 1.0)
    exact = torch.arange(count, dtype=torch.float64).reshape(1, 1, 16, -1) / ((count - 1) / 2) - 1
    assert (values.double() - exact).abs().max() <= 2**-23
    back = ((values.double() + 1) * ((count - 1) / 2)).round().to(torch.int32)
    assert torch.equal(back, pixels.to(torch.int32)), "nothing is lost on the way back"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_normalize_mirrors_only_the_chosen_images(dtype: torch.dtype) -> None:
    pixels = torch.arange(24, dtype=torch.int32).to(dtype).reshape(2, 3, 2, 2)
    plain = normalize(pixels)
    mirrored = normalize(pixels, torch.tensor([False, True]))
    assert torch.equal(mirrored[0], plain[0])
    assert torch.equal(mirrored[1], plain[1].flip(-1))


def test_normalize_does_not_modify_its_input() -> None:
    pixels = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    normalize(pixels, torch.tensor([True, True]))
    assert torch.equal(pixels, torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2))


def test_to_uint8_rounds_to_the_nearest_value() -> None:
    every = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(to_uint8(every), np.rint(every / 65535 * 255))
    assert np.array_equal(to_uint8(np.arange(256, dtype=np.uint8)), np.arange(256))


@pytest.mark.parametrize("as_file", [True, False])
def test_heic_needs_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_file: bool) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "x.heic"
    pillow_heif.from_pillow(Image.new("RGB", (16, 8), (255, 0, 0))).save(path)
    image = EncodedImage("x.heic", path if as_file else path.read_bytes())
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(DataError, match=r'x.heic is a HEIC or HEIF image; run pip install "ddpm_hf\[heif\]"'):
            read_header(image)
    header = read_header(image)
    assert (header.width, header.height, header.mode) == (16, 8, "RGB")
