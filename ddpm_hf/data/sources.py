"""Opens a data set by its name or path and decodes it once to a memory-mapped array.

Images are stored as uint8 (number, channels, height, width) under a key made of the data's fingerprint and the
transform.
"""

import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_hf.config import DataConfig
from ddpm_hf.data.decoding import MODE_OF_CHANNELS, decode
from ddpm_hf.data.image_set import DataError, ImageSet

if TYPE_CHECKING:
    from datasets import Dataset

_CACHE_VERSION = 1
NO_LABEL = -1
"""What `datasets` itself puts where the label of an image is not known."""


def open_images(config: DataConfig, *, with_labels: bool) -> ImageSet:
    """Opens a data set, decoding it unless that was done before.

    Args:
        config: Where the images are and how to prepare them.
        with_labels: Whether labels are needed.

    Returns:
        All images of the split.

    Raises:
        DataError: If there are no images, or one cannot be read or batched, or labels are needed and missing.
    """
    if Path(config.source).suffix in (".npz", ".npy"):
        image_set = _open_array(Path(config.source).expanduser(), config)
    else:
        image_set = _open_dataset(config)
    if with_labels:
        _check_labels(image_set, config.source)
    return image_set


def _check_labels(image_set: ImageSet, source: str) -> None:
    """Refuses labels that no class-conditional network can be trained on."""
    if image_set.labels is None or image_set.class_names is None:
        raise DataError(
            f"{source} has no label column, but the network is class-conditional; name one with data.label_column or "
            "set model.class_conditional to false."
        )
    num_classes = len(image_set.class_names)
    is_bad = (image_set.labels < 0) | (image_set.labels >= num_classes)
    if is_bad.any():
        row = int(np.argmax(is_bad))
        found = "no label" if image_set.labels[row] == NO_LABEL else f"label {image_set.labels[row]}"
        raise DataError(f"row {row} of {source} has {found}; every image needs one from 0 to {num_classes - 1}.")


def _open_array(path: Path, config: DataConfig) -> ImageSet:
    """Opens uint8 images (number, height, width, channels) from .npy, or `images` and `labels` from .npz."""
    if not path.is_file():
        raise DataError(f"data.source {path} does not exist; check the path (here is {Path.cwd()}).")
    for setting in ("split", "image_column", "label_column", "resolution"):
        if getattr(config, setting) != getattr(DataConfig(), setting):
            raise DataError(
                f"data.{setting} does not apply to {path.name}, which is read as it is; leave the setting out and "
                "prepare the array."
            )
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = {"images": content} if isinstance(content, np.ndarray) else dict(content)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as a NumPy array ({error}).") from None
    images, labels = arrays.get("images"), arrays.get("labels")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        found = "no array called images" if images is None else f"{images.dtype} {images.shape}"
        raise DataError(f"{path} holds {found}; it must be uint8 (number, height, width, 1 or 3 or 4 channels).")
    if len(images) == 0:
        raise DataError(f"{path} holds no images.")
    if config.num_channels not in (None, images.shape[-1]):
        raise DataError(
            f"data.num_channels is {config.num_channels}, but the images in {path} have {images.shape[-1]}; they are "
            "read as they are, so set data.num_channels to that or leave it out."
        )
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise DataError(f"{path}: labels are {labels.dtype} {labels.shape}; they must be {len(images)} integers.")
    names = None if labels is None else tuple(str(label) for label in range(int(labels.max()) + 1))
    return ImageSet(
        images.transpose(0, 3, 1, 2), None if labels is None else labels.astype(np.int64), names, np.arange(len(images))
    )


def _open_dataset(config: DataConfig) -> ImageSet:
    """Opens the decoded cache of a data set, building it first where it is missing."""
    dataset = _load_dataset(config)
    if len(dataset) == 0:
        raise DataError(f"split {config.split!r} of {config.source} holds no images.")
    image_column, label_column = _find_columns(dataset, config)
    transform = [_CACHE_VERSION, image_column, label_column, config.resolution, config.num_channels]
    key = hashlib.sha256(json.dumps([dataset._fingerprint, *transform]).encode()).hexdigest()[:32]
    cache_dir = _cache_root(config) / key
    try:
        cache_dir.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cache_dir}.lock"):
            if not (cache_dir / "meta.json").is_file():
                _build_cache(dataset, cache_dir, image_column, label_column, config)
    except OSError as error:
        raise DataError(
            f"the decoded images cannot be written to {cache_dir.parent} ({error.strerror or error}); give another "
            "folder with data.cache_dir."
        ) from None
    meta = json.loads((cache_dir / "meta.json").read_text(encoding="utf-8"))
    images = np.load(cache_dir / "images.npy", mmap_mode="r", allow_pickle=False)
    labels = np.load(cache_dir / "labels.npy", allow_pickle=False) if label_column else None
    names = tuple(meta["class_names"]) if label_column else None
    return ImageSet(images, labels, names, np.arange(len(images)))


def _cache_root(config: DataConfig) -> Path:
    """Returns the folder of all decoded data sets."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm_hf" / "images"


def _load_dataset(config: DataConfig) -> "Dataset":
    """Loads a local file, a local folder or a data set of the Hub with the `datasets` library."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    path = Path(config.source).expanduser()
    arguments: dict[str, Any]
    if path.is_dir():
        parquet_files = sorted(str(file) for file in path.glob("*.parquet"))
        arguments = {"path": "parquet", "data_files": parquet_files} if parquet_files else {
            "path": "imagefolder", "data_dir": str(path)
        }  # fmt: skip
    elif path.is_file():
        if path.suffix != ".parquet":
            raise DataError(
                f"data.source {path} is a {path.suffix or 'nameless'} file; give .parquet, .npz, .npy or a folder."
            )
        arguments = {"path": "parquet", "data_files": str(path)}
    elif config.source.startswith((".", "~", "/")) or path.suffix[1:].isalpha() or config.source.count("/") > 1:
        raise DataError(f"data.source {config.source} does not exist; check the path (here is {Path.cwd()}).")
    else:
        arguments = {"path": config.source}
    try:
        return datasets.load_dataset(**arguments, split=config.split)
    except Exception as error:  # `datasets` raises its own and foreign types for every kind of unreadable data
        reason = " ".join(str(error).split()) or type(error).__name__
        if "corresponds to no data" in reason:
            raise DataError(f"split {config.split!r} of {config.source} holds no images.") from None
        where = "" if path.exists() else ", which is no file or folder here,"
        raise DataError(
            f"data.source {config.source}{where} cannot be opened (split {config.split!r}): {reason}"
        ) from error


def _find_columns(dataset: "Dataset", config: DataConfig) -> tuple[str, str | None]:
    """Returns the image column and the label column, named or found."""
    import datasets

    columns = ", ".join(dataset.column_names)
    for setting, column in (("image_column", config.image_column), ("label_column", config.label_column)):
        if column is not None and column not in dataset.column_names:
            raise DataError(f"data.{setting} {column!r} is not a column of {config.source}; it has {columns}.")
    features = dataset.features
    image_column = config.image_column
    if image_column is None:
        found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        if len(found) != 1:
            raise DataError(
                f"{config.source} has {len(found)} image columns among {columns}; name one with data.image_column."
            )
        image_column = found[0]
    if not isinstance(features[image_column], datasets.Image):
        raise DataError(f"column {image_column!r} of {config.source} holds {features[image_column]}, not images.")
    label_column = config.label_column
    if label_column is None:
        found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        found = found or [name for name in ("label",) if name in features]
        label_column = found[0] if len(found) == 1 and _is_integer(features[found[0]]) else None
    elif not _is_integer(features[label_column]):
        raise DataError(
            f"column {label_column!r} of {config.source} holds {features[label_column]}, not integer labels."
        )
    return image_column, label_column


def _is_integer(feature: Any) -> bool:
    """Tells whether a column of `datasets` holds integers."""
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint"))


def _build_cache(
    dataset: "Dataset", cache_dir: Path, image_column: str, label_column: str | None, config: DataConfig
) -> None:
    """Decodes every image into a folder that gets its final name only when it is whole."""
    building = cache_dir.with_name(f"{cache_dir.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        names: list[str] = []
        if label_column is not None:
            labels = _read_labels(dataset, label_column)
            np.save(building / "labels.npy", labels)
            names = list(getattr(dataset.features[label_column], "names", None) or map(str, range(labels.max() + 1)))
        pixels = _decode_all(dataset, image_column, config)
        first = next(pixels)
        images = np.lib.format.open_memmap(
            building / "images.npy", mode="w+", dtype=np.uint8, shape=(len(dataset), *first.shape)
        )
        images[0] = first
        for row, image in enumerate(pixels, start=1):
            images[row] = image
        images.flush()
        (building / "meta.json").write_text(json.dumps({"class_names": names}), encoding="utf-8")
        shutil.rmtree(cache_dir, ignore_errors=True)
        building.rename(cache_dir)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _read_labels(dataset: "Dataset", label_column: str) -> NDArray[np.int64]:
    """Reads a whole label column; a missing label is harmless until a network asks for it."""
    return np.asarray([NO_LABEL if label is None else label for label in dataset[label_column]], dtype=np.int64)


def _decode_all(dataset: "Dataset", image_column: str, config: DataConfig) -> Iterator[NDArray[np.uint8]]:
    """Yields every image as uint8 (channels, height, width), all of one shape."""
    import datasets

    encoded = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    mode = None if config.num_channels is None else MODE_OF_CHANNELS[config.num_channels]
    shape: Sequence[int] | None = None
    for row, example in enumerate(tqdm(encoded, desc="Decoding images", unit="img", disable=None, leave=False)):
        cell = example[image_column]
        if cell is None:
            raise DataError(f"row {row} of {config.source} has no image; remove the row.")
        name = f"image {row} of {config.source}" + (f" ({Path(cell['path']).name})" if cell["path"] else "")
        pixels = decode(cell, name, mode, config.resolution)
        mode = mode or MODE_OF_CHANNELS[len(pixels)]
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise DataError(
                f"{name} has {pixels.shape[2]}x{pixels.shape[1]} pixels where the first has {shape[2]}x{shape[1]}; set "
                "data.resolution to resize all images to one size."
            )
        yield pixels
