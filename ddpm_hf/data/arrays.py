"""All images as one array: of a .npy, .npz or idx file, or in memory.

Arrays that need no preprocessing are used as they are, others are decoded into the cache like the images of files.
"""

import gzip
import hashlib
import math
import os
import re
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_hf.config import DataConfig
from ddpm_hf.data.decode import (
    MODE_OF_CHANNELS,
    STORED_DTYPES,
    DataError,
    Geometry,
    Pixels,
    find_value_range,
    num_threads,
    unknown_range,
    warn_of_cubes,
)
from ddpm_hf.data.image_set import ImageSet
from ddpm_hf.data.layout import split_of_word

_BYTES_PER_TASK = 2**24
_IDX_NAME = re.compile(r"(.*?)([a-z0-9]+)[-_](images|labels)[-._]idx\d[-_]ubyte(?:\.gz)?")
_IDX_DTYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of a .npy file, which is memory-mapped, or an .npz file.

    Raises:
        DataError: It is damaged, contains Python objects, or would fill the memory.
    """
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"images": content}
        _check_memory(sum(member.file_size for member in content.zip.infolist()))
        return dict(content)
    except Exception as error:  # NumPy and its decompressors raise many types for damaged files
        raise DataError(f"{path} cannot be read as a NumPy array ({' '.join(str(error).split())}).") from None


def is_idx(name: str) -> bool:
    """Return whether a file is named as an idx file of MNIST and its relatives."""
    return _IDX_NAME.fullmatch(name.lower()) is not None


def find_idx(files: Iterable[Path]) -> dict[str, Path]:
    """Return the idx files among those of a folder by the names of their arrays: train_images, train_labels and so on.

    An unpacked file is preferred to one that is compressed.

    Raises:
        DataError: There are several files of the images or the labels of a split.
    """
    found: dict[str, tuple[str, Path]] = {}
    for path in sorted(files, key=lambda path: (path.suffix.lower() == ".gz", len(path.parts), path)):
        if (match := _IDX_NAME.fullmatch(path.name.lower())) is None or not path.is_file():
            continue
        dataset, word, kind = match.groups()
        split = "test" if word == "t10k" else split_of_word(word)
        first, other = found.setdefault(f"{split}_{kind}" if split else kind, (dataset, path))
        if first != dataset:
            raise DataError(
                f"{path.parent} contains {other.name} and {path.name}; set data.source to one file of images."
            )
    return {name: path for name, (_, path) in found.items()}


def idx_and_labels(path: Path) -> dict[str, Path]:
    """Return an idx file of images, and the file of its labels if there is one beside it."""
    name = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    labels = next((other for other in (path.with_name(name), path.with_name(f"{name}.gz")) if other.is_file()), path)
    return {"images": path} | ({} if labels == path else {"labels": labels})


def read_idx(path: Path) -> NDArray[Any]:
    """Read an idx file, the format of MNIST, which may be compressed by gzip.

    Raises:
        DataError: It is damaged, or would fill the memory.
    """
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _IDX_DTYPES:
                raise ValueError("it does not start as one")
            shape = np.frombuffer(file.read(4 * start[3]), ">u4").tolist()
            dtype = np.dtype(_IDX_DTYPES[start[2]])
            size = math.prod(shape) * dtype.itemsize
            _check_memory(size)
            content = file.read(size + 1)
        if len(shape) != start[3] or len(content) != size:
            raise ValueError(f"it has not the {size:,} bytes of its {' x '.join(map(str, shape))} values")
    except (ValueError, MemoryError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as an idx file ({' '.join(str(error).split())}).") from None
    values: NDArray[Any] = np.frombuffer(content, dtype).astype(dtype.newbyteorder("=")).reshape(shape)
    return values


def _check_memory(size: int) -> None:
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise MemoryError(f"it would unpack to {size:,} bytes, more than this machine has memory")


def splits_of_arrays(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return split -> "images" and "labels" -> array, as in MedMNIST (train_images) and Keras (x_train)."""
    splits: dict[str, dict[str, str]] = {}
    for name in names:
        words = name.lower().split("_")
        split = next(filter(None, map(split_of_word, words)), None) if len(words) == 2 else None
        for kind, others in (("images", {"images", "image", "x", "data"}), ("labels", {"labels", "label", "y"})):
            if split is not None and others.intersection(words):
                splits.setdefault(split, {})[kind] = name
    return {split: parts for split, parts in splits.items() if "images" in parts}


def find_images(arrays: dict[str, NDArray[Any]], source: str, config: DataConfig) -> Pixels:
    """Return the images, (number, height, width, channels) whatever the order of their axes in the file.

    Args:
        arrays: All arrays of the file.
        source: Its name.
        config: The array, `data.num_channels` and `data.value_range`.

    Raises:
        DataError: No array holds images, or several may.
    """
    name = config.image_column
    if name is None:
        found = [name for name, array in arrays.items() if array.ndim >= 3 and array.dtype.kind in "iufb"]
        name = "images" if "images" in arrays or len(found) != 1 else found[0]
    if name not in arrays:
        setting = f"data.image_column {name!r}" if config.image_column else "'images'"
        raise DataError(
            f"{setting} is not an array of {source}, which contains {', '.join(arrays) or 'none'}; set "
            "data.image_column to one of them."
        )
    images = arrays[name]
    if images.ndim == 3 and images.shape[-1] in MODE_OF_CHANNELS:
        sides = ", ".join(map(str, images.shape))
        raise DataError(
            f"{source} contains an array of shape ({sides}), which is a single image, or gray images "
            f"{images.shape[-1]} pixels wide; save it as (1, {sides}) or ({sides}, 1)."
        )
    channels: tuple[int | None, ...] = (*MODE_OF_CHANNELS, config.num_channels)
    dtype, shape = images.dtype, images.shape
    if images.ndim == 3:
        images = images[..., None]
    elif images.ndim == 4:
        wanted = (config.num_channels,) if config.num_channels in (shape[1], shape[-1]) else channels
        if shape[1] in wanted and shape[-1] not in wanted:
            images = np.moveaxis(images, 1, -1)
        elif shape[1] == shape[2] == shape[3]:
            warn_of_cubes(source, shape[1])
    if dtype.kind not in "buif" or images.ndim != 4 or images.shape[-1] not in channels:
        raise DataError(
            f"{source} contains {dtype} {shape}; it must be numbers (number, height, width, channels) or (number, "
            "channels, height, width), with 1, 3 or 4 channels or data.num_channels of them."
        )
    if config.value_range is None and dtype.name not in ("uint8", "uint16", "bool"):
        raise unknown_range(source, dtype)
    return images


def needs_preprocessing(images: Pixels, config: DataConfig) -> bool:
    """Return whether images must be cropped, resized or converted before they are used."""
    _, height, width, channels = images.shape
    keeps_size = Geometry.of(config).size_after(width, height, "each image") == (height, width)
    return (
        not keeps_size
        or not images.dtype.isnative
        or images.dtype.name not in STORED_DTYPES
        or config.crop_before_resize is not None
        or config.num_channels not in (None, channels)
    )


def map_array(location: dict[str, Any]) -> ImageSet | None:
    """Memory-map the .npy file that another process opened; return None if this machine has no such file."""
    path = Path(location["array"])
    status = path.stat() if path.is_file() else None
    if status is None or [status.st_size, status.st_mtime_ns] != location["file_identity"]:
        return None
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    if images.ndim == 3:
        images = images[..., None]
    elif list(images.shape[1:]) != location["shape"]:
        images = np.moveaxis(images, 1, -1)
    return _image_set(images[slice(*location["rows"])], location)


def image_set_of_array(
    images: Pixels, name: str, config: DataConfig, place: dict[str, Any], digest: str | None = None
) -> ImageSet | None:
    """Return an image set of an array (number, height, width, channels), which is not copied.

    Args:
        images: The images, which need no preprocessing.
        name: How messages refer to them.
        config: Crops and `data.value_range`.
        place: Where another process finds the array; empty if it is only in memory.
        digest: Digest of the images, if it is known.

    Returns:
        The image set, or None if values are not finite, so that images have to be replaced.
    """
    digest_of_pixels, pixel_range = _read(images, name, hashes=digest is None)
    if not all(map(math.isfinite, pixel_range)):
        return None
    geometry = Geometry.of(config)
    crops = geometry.is_random_crop and geometry.size != images.shape[1:3]
    location = place | {
        "shape": list(images.shape[1:]),
        "crop_size": geometry.size if crops else None,
        "digest": digest or digest_of_pixels,
        "pixel_range": pixel_range,
        "value_range": find_value_range(config, name, pixel_range),
    }
    return _image_set(images, location)


def _image_set(images: Pixels, location: dict[str, Any]) -> ImageSet:
    crop_size, value_range = location["crop_size"], location["value_range"]
    return ImageSet(
        images=images.transpose(0, 3, 1, 2),
        labels=None,
        class_names=None,
        indices=np.arange(len(images)),
        crop_size=None if crop_size is None else (crop_size[0], crop_size[1]),
        digest=location["digest"],
        location=location,
        value_range=None if value_range is None else (value_range[0], value_range[1]),
    )


def _read(images: Pixels, name: str, *, hashes: bool) -> tuple[str, tuple[float, float]]:
    """Return a digest of all pixels if it is needed, the smallest and the largest one, computed on all cores."""
    num_rows = max(1, _BYTES_PER_TASK // max(1, images[0].nbytes))
    starts = range(0, len(images), num_rows)

    def read(start: int) -> tuple[bytes, float, float]:
        rows = np.ascontiguousarray(images[start : start + num_rows])
        return hashlib.sha256(rows.data).digest() if hashes else b"", rows.min().item(), rows.max().item()

    digest = hashlib.sha256(f"{images.shape} {images.dtype}".encode())
    with ThreadPoolExecutor(num_threads()) as pool:
        parts = list(tqdm(pool.map(read, starts), f"Reading {name}", len(starts), delay=1.0, disable=None, leave=False))
    for part, _, _ in parts:
        digest.update(part)
    _, lowest, highest = zip(*parts, strict=True)
    return digest.hexdigest()[:32], (float(np.min(lowest)), float(np.max(highest)))
