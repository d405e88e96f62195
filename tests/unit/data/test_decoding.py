"""Images of every kind are decoded without loss, or refused with a sentence that names the first offender."""

import io
import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.unit.data.helpers import (
    DEEP_GRAY,
    DEEP_RGB,
    DEEP_RGBA,
    GRAY,
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
    """Pillow gives 8 bits of colours that have 16."""
    found = open_one(tmp_path, encode_deep(pixels.squeeze()))
    assert found.dtype == np.uint16
    assert np.array_equal(found, pixels)


def tiff_of_16_bit_colours(pixels: np.ndarray, byte_order: str) -> bytes:
    """Returns an uncompressed TIFF, which Pillow cannot write; `byte_order` is "<" (II) or ">" (MM)."""
    height, width, channels = pixels.shape
    data = pixels.astype(f"{byte_order}u2").tobytes()
    mark = np.dtype(f"{byte_order}u2"), np.dtype(f"{byte_order}u4")
    short, long = (lambda value: np.array(value, mark[0]).tobytes()), (lambda value: np.array(value, mark[1]).tobytes())
    bits_at = 8 + len(data)
    directory_at = bits_at + 2 * channels
    tags = [
        (256, 3, 1, short([width, 0])), (257, 3, 1, short([height, 0])), (258, 3, channels, long(bits_at)),
        (259, 3, 1, short([1, 0])), (262, 3, 1, short([2, 0])), (273, 4, 1, long(8)),
        (277, 3, 1, short([channels, 0])), (278, 3, 1, short([height, 0])), (279, 4, 1, long(len(data))),
    ]  # fmt: skip
    head = (b"II" if byte_order == "<" else b"MM") + short(42) + long(directory_at)
    entries = b"".join(short([number, kind]) + long(count) + value for number, kind, count, value in tags)
    return head + data + short([16] * channels) + short(len(tags)) + entries + long(0)


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_a_tiff_of_16_bit_colours_keeps_every_bit(tmp_path: Path, byte_order: str) -> None:
    assert np.array_equal(open_one(tmp_path, tiff_of_16_bit_colours(DEEP_RGB, byte_order)), DEEP_RGB)


@pytest.mark.parametrize("compression", ["raw", "tiff_adobe_deflate", "tiff_lzw"])
def test_a_gray_tiff_of_16_bits_keeps_every_bit(tmp_path: Path, compression: str) -> None:
    data = encode(DEEP_GRAY, "TIFF", compression=compression)
    assert np.array_equal(open_one(tmp_path, data)[..., 0], DEEP_GRAY)


def test_8_bits_among_16_are_stretched_exactly(tmp_path: Path) -> None:
    """255 is 65535 and 0 is 0, in all of them alike: 257 times the value."""
    folder = write_files(tmp_path / "x", {"a.png": encode(GRAY), "b.png": encode_deep(DEEP_GRAY)})
    images = open_source(folder, tmp_path / "cache")
    assert np.array_equal(pixels_of(images)[..., 0], [GRAY.astype(np.uint16) * 257, DEEP_GRAY])


def test_a_16_bit_gray_image_with_transparency_is_refused(tmp_path: Path) -> None:
    """Nothing we know reads it; it must not lose half of its bits in silence."""
    data = encode_deep(DEEP_RGB[..., :2])
    folder = write_files(tmp_path / "x", {"a.png": data})
    assert f"image 0 of {folder} (a.png) cannot be decoded" in refusal(folder, tmp_path / "cache")


def test_a_palette_image_becomes_the_colours_it_shows(tmp_path: Path) -> None:
    assert np.array_equal(open_one(tmp_path, encode(PALETTE)), np.asarray(PALETTE.convert("RGB")))
    assert np.array_equal(open_one(tmp_path / "gif", encode(PALETTE, "GIF")), np.asarray(PALETTE.convert("RGB")))


def test_a_palette_with_transparency_keeps_it(tmp_path: Path) -> None:
    data = encode(PALETTE, transparency=bytes([0, 128] + [255] * 6))
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    assert len(np.unique(shown[..., 3])) > 1
    assert np.array_equal(open_one(tmp_path, data), shown)


@pytest.mark.parametrize(("image", "colour"), [(GRAY, int(GRAY[0, 0])), (RGB, tuple(RGB[0, 0].tolist()))])
def test_a_colour_that_is_declared_transparent_is(tmp_path: Path, image: np.ndarray, colour: Any) -> None:
    found = open_one(tmp_path, encode(image, transparency=colour))
    assert [found.shape, found[0, 0, 3], found[1, 1, 3]] == [(6, 5, 4), 0, 255]


def test_a_one_bit_image_becomes_black_and_white(tmp_path: Path) -> None:
    bits = GRAY > 127
    assert np.array_equal(open_one(tmp_path, encode(Image.fromarray(bits)))[..., 0], np.where(bits, 255, 0))


@pytest.mark.parametrize("image_format", ["TIFF", "JPEG"])
def test_a_cmyk_image_becomes_rgb(tmp_path: Path, image_format: str) -> None:
    data = encode(Image.fromarray(RGB).convert("CMYK"), image_format)
    assert np.array_equal(open_one(tmp_path, data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_gray_with_transparency_becomes_rgba(tmp_path: Path) -> None:
    gray_and_alpha = RGBA[..., 2:]
    found = open_one(tmp_path, encode(Image.fromarray(gray_and_alpha, "LA")))
    assert np.array_equal(found, gray_and_alpha[..., [0, 0, 0, 1]])


ORIENTATIONS = {
    2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 5: RGB.transpose(1, 0, 2), 6: np.rot90(RGB, -1), 8: np.rot90(RGB)
}  # fmt: skip


def with_orientation(number: int, image_format: str = "PNG", **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return encode(RGB, image_format, exif=exif, **options)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_photo_is_turned_as_its_camera_says(tmp_path: Path, orientation: int, image_format: str) -> None:
    """Once, also without data.resolution, where all images must have one size; JPEG keeps the shape, not the bits."""
    options = {"lossless": True} if image_format == "WEBP" else {}
    pixels = open_one(tmp_path, with_orientation(orientation, image_format, **options))
    assert pixels.shape == ORIENTATIONS[orientation].shape
    assert image_format == "JPEG" or np.array_equal(pixels, ORIENTATIONS[orientation])


def test_a_deep_photo_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    plain = encode_deep(DEEP_RGB)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = plain[:33] + chunk(b"eXIf", exif.tobytes()[6:]) + plain[33:]
    assert np.array_equal(open_one(tmp_path, turned), np.rot90(DEEP_RGB, -1))


def test_turned_and_upright_photos_of_one_size_go_together(tmp_path: Path) -> None:
    """The size that counts is the one that is shown: a 6x5 photo on its side is 5x6."""
    upright = encode(np.ascontiguousarray(ORIENTATIONS[6]))
    folder = write_files(tmp_path / "x", {"a.png": upright, "b.png": with_orientation(6)})
    assert len(open_source(folder, tmp_path / "cache")) == 2


def test_an_orientation_behind_the_pixels_is_not_overlooked(tmp_path: Path) -> None:
    """A PNG may end with its tags, which are not read until it is decoded: by then the sizes are known to differ."""
    plain = encode(RGB)
    exif = Image.Exif()
    exif[0x0112] = 6
    late = plain[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + plain[-12:]
    assert np.array_equal(open_one(tmp_path, late, resolution=5), ORIENTATIONS[6][:, :5])
    folder = write_files(tmp_path / "x", {"a.png": plain, "b.png": late})
    assert "(b.png) has 6x5 pixels where the first has 5x6" in refusal(folder, tmp_path / "cache")


@pytest.mark.parametrize("tags", [b"MM\x00*garbage", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63"])
def test_tags_that_cannot_be_read_do_no_harm(tmp_path: Path, tags: bytes, recwarn: pytest.WarningsRecorder) -> None:
    data = encode(RGB, "JPEG", exif=tags)
    shown = np.asarray(Image.open(io.BytesIO(data)))
    recwarn.clear()
    assert np.array_equal(open_one(tmp_path, data), shown)
    assert not [warning for warning in recwarn if "EXIF" in str(warning.message)]


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation_is_used_and_said(
    tmp_path: Path, image_format: str, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("RGB", (8, 8), (0, 0, 200 if number else 100)) for number in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, image_format, save_all=True, append_images=frames[1:], lossless=True)
    found = open_one(tmp_path, buffer.getvalue())
    assert found.shape == (8, 8, 3)
    assert abs(found[..., 2].astype(int) - 100).max() <= 3, "AVIF is not exact"
    assert "1 image has several frames; the first is used." in caplog.text


@pytest.mark.parametrize(
    ("image", "mode"),
    [
        (Image.fromarray(GRAY.astype(np.int32)), "I"),
        (Image.fromarray(GRAY.astype(np.float32)), "F"),
        (Image.fromarray(RGB).convert("LAB"), "LAB"),
    ],
    ids=["I", "F", "LAB"],
)
def test_pixels_of_an_unknown_range_are_refused(tmp_path: Path, image: Image.Image, mode: str) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(image, "TIFF")])
    message = refusal(path, tmp_path / "cache")
    assert message.startswith(f"image 0 of {path} has mode {mode}; convert it to 8 or 16 bits of L, RGB or RGBA")


# ------------------------------------------------------------------------------------------------------- channels


def test_more_channels_than_asked_for_are_refused(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "x", {"a.png": encode(RGB), "cat/b.png": encode(RGBA)})
    message = refusal(folder, tmp_path / "cache", num_channels=3)
    assert f"image 1 of {folder} (cat/b.png) has transparent pixels where RGB is asked for" in message
    assert "set data.num_channels to 4, or data.background to white or black" in message
    message = refusal(folder, tmp_path / "cache", num_channels=1)
    assert f"image 0 of {folder} (a.png) has colours where gray (L) is asked for" in message


def test_channels_that_say_nothing_may_go(tmp_path: Path) -> None:
    opaque = np.concatenate([RGB, np.full((6, 5, 1), 255, np.uint8)], axis=2)
    assert np.array_equal(open_one(tmp_path / "a", encode(opaque), num_channels=3), RGB)
    gray = np.repeat(GRAY[..., None], 3, axis=2)
    assert np.array_equal(open_one(tmp_path / "b", encode(gray), num_channels=1), gray[..., :1])
    assert np.array_equal(
        open_one(tmp_path / "c", encode_deep(DEEP_RGB * 0 + 7), num_channels=1), DEEP_RGB[..., :1] * 0 + 7
    )


@pytest.mark.parametrize(("pixels", "full"), [(RGBA, 255), (DEEP_RGBA, 65535)], ids=["8", "16"])
@pytest.mark.parametrize(("background", "behind"), [("white", 1), ("black", 0)])
def test_transparent_pixels_show_the_background(
    tmp_path: Path, pixels: np.ndarray, full: int, background: str, behind: int
) -> None:
    data = encode(pixels) if full == 255 else encode_deep(pixels)
    opacity = pixels[..., 3:] / full
    expected = np.rint(pixels[..., :3] * opacity + behind * full * (1 - opacity))
    assert np.array_equal(open_one(tmp_path, data, num_channels=3, background=background), expected)


def test_fewer_channels_than_asked_for_are_filled_without_loss(tmp_path: Path) -> None:
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


def test_a_few_images_with_transparency_are_asked_about(tmp_path: Path) -> None:
    """One of them must not make a whole data set RGBA; if its alpha channel is empty it does not matter."""
    opaque = np.concatenate([RGB, np.full((6, 5, 1), 255, np.uint8)], axis=2)
    harmless = write_files(tmp_path / "x", {"a.png": encode(RGB), "b.png": encode(opaque)})
    assert open_source(harmless, tmp_path / "cache").image_shape == (3, 6, 5)
    mixed = write_files(tmp_path / "y", {"a.png": encode(RGB), "b.png": encode(RGBA)})
    assert "(b.png) has transparent pixels where RGB is asked for" in refusal(mixed, tmp_path / "cache")


# ------------------------------------------------------------------------------------------------------ bad images


def announced(side: int) -> bytes:
    """Returns a PNG that says how large it is, and holds nothing."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


BOMB = "has more than the 89,478,485 pixels from which on Pillow suspects a decompression bomb"
UNKNOWN = "cannot be decoded (it is no image of a known format)"
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
    assert not [entry for entry in (tmp_path / "cache").iterdir()], "no half of a data set is left"


def test_a_bad_image_of_a_table_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(RGB), b"text"], names=["good.png", "bad.png"])
    assert f"image 1 of {path} (bad.png) cannot be decoded" in refusal(path, tmp_path / "cache")


def test_a_row_without_an_image_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(RGB), None])
    assert f"image 1 of {path} cannot be read (it is missing)" in refusal(path, tmp_path / "cache")


def test_the_first_bad_image_is_named_though_others_are_found_earlier(tmp_path: Path) -> None:
    """In the order in which they are noticed: what the header says comes before what decoding says."""
    files = {"a.png": encode(RGB), "b.png": b"text", "c.png": b"text"}
    folder = write_files(tmp_path / "x", files)
    assert "(b.png) cannot be decoded" in refusal(folder, tmp_path / "cache")


def test_pixels_that_use_little_of_their_range_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """12 bits in files of 16, as medical images often are; masks of 0 and 1; the network would see no contrast."""
    caplog.set_level(logging.WARNING)
    open_one(tmp_path, encode_deep(DEEP_GRAY // 16))
    assert "use only the values" in caplog.text
    assert "of 0 to 65535, so the network sees little contrast" in caplog.text
    caplog.clear()
    open_one(tmp_path / "full", encode_deep(DEEP_GRAY))
    assert "contrast" not in caplog.text
