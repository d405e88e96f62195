"""NumPy arrays of images: a .npy file that needs nothing done to it is read where it lies."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_hf.config import DataConfig
from ddpm_hf.data.build import num_threads
from ddpm_hf.data.decoding import MODE_OF_CHANNELS, Cell
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.geometry import Geometry
from ddpm_hf.data.image_set import ImageSet
from ddpm_hf.data.source import Source, identity_of, name_of_split, numbers_as_names, rows_of_split, valid_labels

_LAYOUT = "(number, height, width, channels) with 1, 3 or 4 channels, or as many as data.num_channels says"
_BYTES_HASHED_AT_ONCE = 2**24


def open_array(path: Path, config: DataConfig, split: str) -> ImageSet | Source:
    """Opens uint8 or uint16 images (number, height, width, channels) from .npy, or with labels from .npz.

    Returns:
        The images themselves if they need no transform, otherwise where to find them.

    Raises:
        DataError: If the file holds no images.
    """
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = {"images": content} if isinstance(content, np.ndarray) else _unpack(content)
    except Exception as error:  # a damaged file raises whatever its decompressor and the reader of its header do
        raise DataError(f"{path} cannot be read as a NumPy array ({' '.join(str(error).split())}).") from None
    images, labels = _find_images(arrays, path, config), _find_labels(arrays, path, config)
    if len(images) == 0:
        raise DataError(f"{path} holds no images.")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise DataError(f"{path}: labels are {labels.dtype} {labels.shape}; they must be {len(images)} integers.")
    if (wanted := name_of_split(split, str(path))) != "train":
        raise DataError(f"{path} has no split {wanted!r}, only 'train' and parts of it such as 'train[:90%]'.")
    rows = rows_of_split(split, str(path), len(images))
    labels = None if labels is None else valid_labels(labels, str(path))
    names = None if labels is None else numbers_as_names(labels)
    labels = None if labels is None else labels[rows]
    if path.suffix == ".npy" and isinstance(rows, range) and not _needs_transform(images, config):
        images = images[rows.start : rows.stop]
        geometry = Geometry.of(config)
        crop = geometry.size if geometry.is_random_crop and geometry.size != images.shape[1:3] else None
        digest = _digest(images, str(path))
        return ImageSet(images.transpose(0, 3, 1, 2), labels, names, np.arange(len(images)), crop, digest=digest)

    def read(numbers: Sequence[int]) -> list[Cell]:
        native = images.dtype.newbyteorder("=")
        return [
            Cell(f"image {number} of {path}", images[rows[number]].astype(native, copy=False)) for number in numbers
        ]

    fingerprint = f"{identity_of(path)} {config.image_column} {rows} {images.dtype} {images.shape}"
    return Source(str(path), path.suffix[1:], fingerprint, len(rows), read, labels, names)


def _unpack(archive: Any) -> dict[str, NDArray[Any]]:
    """Reads the arrays of a .npz file, unless they cannot fit into the memory of this machine."""
    size = sum(member.file_size for member in archive.zip.infolist())
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise MemoryError(f"it would unpack to {size:,} bytes, more than this machine has memory")
    return dict(archive)


def _find_images(arrays: dict[str, NDArray[Any]], path: Path, config: DataConfig) -> NDArray[np.integer]:
    """Returns the images, with channels."""
    name = config.image_column
    if name is None:
        found = [name for name, array in arrays.items() if array.ndim >= 3 and array.dtype.kind in "iuf"]
        name = "images" if "images" in arrays or len(found) != 1 else found[0]
    if name not in arrays:
        setting = f"data.image_column {name!r} is" if config.image_column else "images is"
        raise DataError(
            f"{setting} not among the arrays of {path}, which are {', '.join(arrays) or 'none'}; name one with "
            "data.image_column."
        )
    images = arrays[name]
    if images.ndim == 3:
        images = images[..., None]
    is_readable = images.dtype.name in ("uint8", "uint16") and images.ndim == 4
    if not is_readable or images.shape[-1] not in (*MODE_OF_CHANNELS, config.num_channels):
        raise DataError(f"{path} holds {images.dtype} {images.shape}; it must be uint8 or uint16 {_LAYOUT}.")
    return images


def _find_labels(arrays: dict[str, NDArray[Any]], path: Path, config: DataConfig) -> NDArray[Any] | None:
    """Returns the labels, if there are any."""
    if config.label_column is not None and config.label_column not in arrays:
        raise DataError(
            f"data.label_column {config.label_column!r} is not among the arrays of {path}, which are "
            f"{', '.join(arrays)}."
        )
    return arrays.get(config.label_column or "labels")


def _needs_transform(images: NDArray[np.integer], config: DataConfig) -> bool:
    """Tells whether images must be cut, resized or given other channels or bytes before they are used."""
    _, height, width, channels = images.shape
    keeps_size = Geometry.of(config).size_after(width, height, "each image") == (height, width)
    return (
        not keeps_size
        or not images.dtype.isnative
        or config.crop_before_resize is not None
        or config.num_channels not in (None, channels)
    )


def _digest(images: NDArray[np.integer], name: str) -> str:
    """Tells arrays apart by all of their pixels, hashed by as many threads as there are cores; a .npy has no labels."""
    num_rows = max(1, _BYTES_HASHED_AT_ONCE // max(1, images[0].nbytes))
    starts = range(0, len(images), num_rows)
    part = lambda start: hashlib.sha256(np.ascontiguousarray(images[start : start + num_rows]).data).digest()  # noqa: E731
    digest = hashlib.sha256(f"{images.shape} {images.dtype}".encode())
    with ThreadPoolExecutor(num_threads()) as pool:
        # Said only where it takes longer than a moment.
        bar = tqdm(pool.map(part, starts), f"Hashing {name}", len(starts), delay=1.0, disable=None, leave=False)
        for part_digest in bar:
            digest.update(part_digest)
    return digest.hexdigest()[:32]
