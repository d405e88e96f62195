"""Helpers of the data tests: a few images, ways to store them, and the error message of a refused dataset."""

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from ddpm_hf.config import DataConfig
from ddpm_hf.data import DataError, ImageSet, open_images
from ddpm_hf.data.image_set import UnequalImages
from tests.conftest import DIGITS

RANDOM = np.random.default_rng(0)
GRAY = RANDOM.integers(0, 256, (6, 5), dtype=np.uint8)
RGB = RANDOM.integers(0, 256, (6, 5, 3), dtype=np.uint8)
RGBA = RANDOM.integers(0, 256, (6, 5, 4), dtype=np.uint8)
RGBA[0, 0, 3] = 17  # some pixel is transparent
DEEP_GRAY = RANDOM.integers(0, 65536, (6, 5), dtype=np.uint16)
DEEP_RGB = RANDOM.integers(0, 65536, (6, 5, 3), dtype=np.uint16)
DEEP_RGBA = RANDOM.integers(0, 65536, (6, 5, 4), dtype=np.uint16)


def encode(image: Image.Image | np.ndarray, image_format: str = "PNG", **options: Any) -> bytes:
    """Return an encoded image."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    """Return the content of a .npy file."""
    np.save(content := io.BytesIO(), array)
    return content.getvalue()


def encode_deep(pixels: np.ndarray) -> bytes:
    """Return a PNG with 16 bits per channel, which Pillow cannot write for color. Its rows are filtered.

    The filters refer to the pixel on the left (1) and above (2), so a decoder that counts bytes wrongly shows.
    """
    height, width, *channels = pixels.shape
    num_channels = channels[0] if channels else 1
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8).reshape(height, -1)
    filtered = b""
    for number, row in enumerate(rows):
        left = np.concatenate([np.zeros(2 * num_channels, np.uint8), row[: -2 * num_channels]])
        above = rows[number - 1] if number else np.zeros_like(row)
        kind = number % 3
        filtered += bytes([kind]) + (row - (0, left, above)[kind]).astype(np.uint8).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[num_channels], 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Write a folder of files."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[object] | None = None,
    label_feature: object = None,
    names: Sequence[str] | None = None,
) -> Path:
    """Write encoded images to a parquet file, as on the Hub."""
    cells = [None if data is None else {"bytes": data, "path": None} for data in images]
    columns: dict[str, list[object]] = {"image": cells}
    features: dict[str, object] = {"image": datasets.Image()}
    if names is not None:
        columns["image"] = [{"bytes": data, "path": name} for data, name in zip(images, names, strict=True)]
    if labels is not None:
        columns["label"] = list(labels)
        features["label"] = label_feature or datasets.ClassLabel(names=["cat", "dog"])
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return path


def digits_table() -> datasets.Dataset:
    """Return the first 20 of the embedded digits."""
    return datasets.load_dataset("parquet", data_files=str(DIGITS), split="train[:20]")


def open_source(source: Path | str, cache_dir: Path, *, with_labels: bool = False, **settings: Any) -> ImageSet:
    """Open a dataset."""
    return open_images(DataConfig(source=str(source), cache_dir=str(cache_dir), **settings), with_labels=with_labels)


def open_one(folder: Path, data: bytes, **settings: Any) -> np.ndarray:
    """Return the decoded pixels of one encoded image, channels last."""
    images = open_source(write_files(folder / "one", {"only.png": data}), folder / "cache", **settings)
    assert len(images) == 1
    pixels, _ = images.take(images.positions)
    return pixels[0].transpose(1, 2, 0)


def refusal(source: Path | str, cache_dir: Path, *, with_labels: bool = False, **settings: Any) -> str:
    """Return the error message of a dataset that is refused."""
    with pytest.raises(DataError) as caught:
        open_source(source, cache_dir, with_labels=with_labels, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels_of(images: ImageSet) -> np.ndarray:
    """Return all pixels of a set, channels last."""
    return images.take(images.positions)[0].transpose(0, 2, 3, 1)


def numbered(count: int, size: int = 2, **fields: Any) -> ImageSet:
    """Return a set in which image i has the value and the label i."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 1, size, size))
    return ImageSet(images, np.arange(count), None, np.arange(count), **fields)


SHAPES = [(4, 9), (7, 5), (6, 8), (4, 5)]


def unequal(shapes: list[tuple[int, int]]) -> tuple[ImageSet, list[np.ndarray]]:
    """Return a set of random images of these sizes, cropped to 4x5, and the images."""
    originals = [RANDOM.integers(0, 256, (3, *shape), dtype=np.uint8) for shape in shapes]
    starts = np.cumsum([0, *[image.size for image in originals]])[:-1]
    layout = np.array([[start, *shape] for start, shape in zip(starts, shapes, strict=True)])
    flat = np.concatenate([image.ravel() for image in originals])
    count = len(shapes)
    return ImageSet(UnequalImages(flat, layout, 3), np.arange(count), None, np.arange(count), (4, 5)), originals
