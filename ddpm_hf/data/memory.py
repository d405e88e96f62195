"""Images in memory: the `train_dataset` and `eval_dataset` of a Trainer.

`find_in_memory` returns what `find_source` returns for files: a `Source`, whose images are decoded into the cache as
those of files are, or an `ImageSet` of an array that needs no preprocessing, which is used without a copy.
"""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset
from tqdm import tqdm

from ddpm_hf.config import DataConfig, log_warning
from ddpm_hf.data.arrays import image_set_of_array, needs_preprocessing
from ddpm_hf.data.decode import (
    MODE_OF_CHANNELS,
    BadImage,
    DataError,
    EncodedImage,
    Header,
    Pixels,
    as_native,
    decode_picture,
    num_threads,
    read_header,
)
from ddpm_hf.data.folders import Source
from ddpm_hf.data.image_set import ImageSet
from ddpm_hf.data.labels import Labels, encode_labels
from ddpm_hf.data.tables import dtype_of_arrays, find_columns, source_of_table

IMAGE_KEYS = ("image", "images", "img", "pixel_values", "input", "inputs", "x", "jpg", "png")
"""Keys of the image in samples that are mappings, the first one that exists; data.image_column names another one."""
LABEL_KEYS = ("label", "labels", "class", "class_label", "class_labels", "target", "y", "cls")
"""The same for the label and data.label_column."""
_KINDS = (
    "a datasets.Dataset, a torch Dataset with a length, an array or tensor of images, or a list of images or of pairs "
    "(image, label)"
)
# Floating-point values that are 8-bit levels to this accuracy become 8-bit images, others 16-bit images.
_LEVEL_TOLERANCE = 0.02
# The largest minimum of images in [-1, 1]. Images in [0, 1] may be slightly negative after resizing.
_HIGHEST_MINIMUM = -0.5
_BYTES_PER_TASK = 2**24


@dataclass(frozen=True)
class _Samples:
    """Numbered samples of any data set.

    Args:
        number: How many there are.
        read: Return image and label, None if there is none, of rows; both as the data set returns them.
        class_names: Names of integer labels, None if unknown.
    """

    number: int
    read: Callable[[Sequence[int]], Iterable[tuple[Any, Any]]]
    class_names: tuple[str, ...] | None = None


def find_in_memory(
    data: Any, name: str, config: DataConfig, *, with_labels: bool, known: tuple[str, ...] | None = None
) -> Source | ImageSet:
    """Find the images and labels of a data set in memory.

    Args:
        data: The data set.
        name: How messages refer to it.
        config: The preprocessing, and the names of columns.
        with_labels: Whether labels are needed; if not, labels of unknown types are ignored.
        known: Names of the classes in another part of the data.

    Raises:
        DataError: The type is not supported, there are no images, or a sample cannot be used.
    """
    _refuse_other_types(data, name)
    library = _datasets()
    if library and isinstance(data, library.Dataset) and data.format["type"] != "custom":
        data = data.with_format(None)
        if len(data) and _has_image_files(data, config):
            return source_of_table(data, replace(config, source=name), known=known, is_trusted=True)
    arrays = _arrays_of(data, name, config)
    samples = _samples_of(data, name, config) if arrays is None else arrays.samples()
    if not samples.number:
        raise DataError(f"{name} contains no images.")
    if arrays is not None and (arrays.are_integers or config.value_range is not None):
        pixels = _channels_last(arrays.images, name, config, is_batch=True)
        if not needs_preprocessing(pixels, config):
            images = _image_set(pixels, arrays.labels, name, config, known, with_labels=with_labels)
            if images is not None:
                return images
    return _scan(samples, name, config, known, with_labels=with_labels)


def _datasets() -> ModuleType | None:
    """Return the library `datasets` if it is imported, as it is if there is a data set of it."""
    return sys.modules.get("datasets")


def _refuse_other_types(data: Any, name: str) -> None:
    """Raise a DataError for a data set that cannot be read by row, or that is not one."""
    kind, library = type(data).__name__, _datasets()
    if library and isinstance(data, library.DatasetDict | library.IterableDatasetDict):
        splits = ", ".join(map(repr, data))
        raise DataError(f"{name} is a {kind} with the splits {splits}; pass one of them, as dataset[split].")
    if library and isinstance(data, library.IterableDataset):
        raise DataError(
            f"{name} is an IterableDataset, whose images have no fixed order; pass a datasets.Dataset, or set "
            "data.source and data.streaming to stream files."
        )
    if isinstance(data, DataLoader):
        raise DataError(
            f"{name} is a DataLoader, but batches are formed by the Trainer; pass its data set, loader.dataset."
        )
    if isinstance(data, str | Path):
        raise DataError(f"{name} is the text {str(data)!r}; set data.source to it to read files.")
    if isinstance(data, Image.Image):
        raise DataError(f"{name} is a single image; pass a list of images.")
    if type(data).__module__.partition(".")[0] in ("pandas", "polars"):
        raise DataError(f"{name} is a {kind}; convert it, for example with datasets.Dataset.from_pandas.")
    if isinstance(data, IterableDataset) or (isinstance(data, Iterable) and not hasattr(data, "__getitem__")):
        raise DataError(
            f"{name} is of type {kind}, whose images have no number and no fixed order; pass a list of them, or a data "
            "set with __len__ and __getitem__."
        )
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(data, bytes):
        raise DataError(f"{name} is of type {kind}; pass {_KINDS}.")


def _has_image_files(table: Any, config: DataConfig) -> bool:
    """Return whether a `datasets.Dataset` holds encoded images and integer labels, or no labels."""
    try:
        image_column, label_column = find_columns(table.features, config)
    except DataError:
        return False
    if getattr(table.features[image_column], "mode", None) is not None:  # `datasets` converts to it
        return False
    if dtype_of_arrays(table.features[image_column]) is not None:
        return False
    return label_column is not None or not any(key in table.features for key in LABEL_KEYS)


# ------------------------------------------------------------------------------------------------------------ samples


@dataclass(frozen=True)
class _Arrays:
    """Images and labels as one array or tensor each.

    Args:
        images: (number, height, width), with one more axis if there are channels.
        labels: (number,), or None.
    """

    images: NDArray[Any] | torch.Tensor
    labels: NDArray[Any] | None

    @property
    def are_integers(self) -> bool:
        """Whether the pixels can be used as they are, without `data.value_range`."""
        return str(self.images.dtype).removeprefix("torch.") in ("uint8", "uint16")

    def samples(self) -> _Samples:
        """Return the rows as samples."""
        labels = [None] * len(self.images) if self.labels is None else self.labels
        return _Samples(len(self.images), lambda rows: ((self.images[row], labels[row]) for row in rows))


def _arrays_of(data: Any, name: str, config: DataConfig) -> _Arrays | None:
    """Return the arrays of a data set that consists of them; None for any other one."""
    labels: Any = None
    if isinstance(data, TensorDataset):
        images, labels = (*data.tensors, None)[:2]
    elif isinstance(data, Mapping):
        image_key, label_key = _keys_of(data, name, config)
        images, labels = data[image_key], None if label_key is None else data[label_key]
    elif _is_pair_of_arrays(data):
        images, labels = data
    else:
        images = data
    if not isinstance(images, np.ndarray | torch.Tensor) or str(images.dtype)[:2] in ("ob", "<U"):
        return None
    if len(images) == 0:
        raise DataError(f"{name} contains no images.")
    if images.ndim not in (3, 4):
        raise DataError(
            f"{name} has the shape {tuple(images.shape)}, but images are (number, height, width) or have one more axis "
            "for channels; reshape it."
        )
    if labels is not None:
        labels = labels.numpy(force=True) if isinstance(labels, torch.Tensor) else np.asarray(labels)
        labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
        if len(labels) != len(images):
            raise DataError(
                f"{name} has {len(images)} images, but {len(labels)} labels; pass one label for each image."
            )
    return _Arrays(images.detach().cpu() if isinstance(images, torch.Tensor) else images, labels)


def _is_pair_of_arrays(data: Any) -> bool:
    """Return whether a tuple or list holds all images and all labels, rather than two images."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    images, labels = data
    if not isinstance(images, np.ndarray | torch.Tensor) or images.ndim < 3:
        return False
    if not isinstance(labels, np.ndarray | torch.Tensor):
        return isinstance(labels, list | tuple | range) and all(
            isinstance(label, int | str | np.generic) for label in labels
        )
    return labels.ndim == 1 or (labels.ndim == 2 and len(labels) == len(images))


def _samples_of(data: Any, name: str, config: DataConfig) -> _Samples:
    """Return the samples of a data set that is indexed by row."""
    if isinstance(data, Mapping):  # of lists
        image_key, label_key = _keys_of(data, name, config)
        images = data[image_key]
        labels = [None] * len(images) if label_key is None else data[label_key]
        return _Samples(len(images), lambda rows: ((images[row], labels[row]) for row in rows))
    number = len(data)
    if not number:
        return _Samples(0, lambda rows: ())

    def get(row: int) -> Any:
        try:
            return data[row]
        except OSError as error:  # a damaged file; errors of other types are mistakes in the data set
            return BadImage(f"image {row} of {name} cannot be read ({error}).")

    first = next((item for item in map(get, range(number)) if not isinstance(item, BadImage)), None)
    keys = _keys_of(first, name, config) if isinstance(first, Mapping) else None
    if keys is None:
        for setting in ("image_column", "label_column"):
            if getattr(config, setting) is not None:
                log_warning(f"data.{setting} has no effect with {name}, whose samples have no columns.")
    library = _datasets()
    if keys and library and isinstance(data, library.Dataset) and data.format["type"] != "custom":
        if isinstance(image := data.features[keys[0]], library.Image) and image.mode is None:
            data = data.cast_column(keys[0], library.Image(decode=False))
        elif not isinstance(image, library.Image):
            # Without a format, the rows of an array are lists. With one, all integers would be int64.
            feature = data.features[keys[0]]
            while hasattr(feature, "feature"):
                feature = feature.feature
            data = data.with_format("numpy", [keys[0]], output_all_columns=True, dtype=getattr(feature, "dtype", None))

    def sample(row: int) -> tuple[Any, Any]:
        item = get(row)
        if isinstance(item, BadImage):
            return item, None
        if keys is not None:
            if not isinstance(item, Mapping) or keys[0] not in item:
                raise DataError(f"sample {row} of {name} lacks {keys[0]!r}, which others have; return the same keys.")
            return item[keys[0]], None if keys[1] is None else item.get(keys[1])
        if isinstance(item, tuple | list):
            return item[0] if len(item) else None, item[1] if len(item) > 1 else None
        return item, None

    return _Samples(number, lambda rows: map(sample, rows), _class_names_of(data, keys[1] if keys else None))


def _keys_of(sample: Mapping[str, Any], name: str, config: DataConfig) -> tuple[str, str | None]:
    """Return the keys of image and label in a mapping; the second is None if it has no label."""
    listed = ", ".join(map(str, sample))
    for setting in ("image_column", "label_column"):
        if (key := getattr(config, setting)) is not None and key not in sample:
            raise DataError(f"data.{setting} {key!r} is not a column of {name}; it has {listed}.")
    image_key = config.image_column or next((key for key in IMAGE_KEYS if key in sample), None)
    if image_key is None:
        raise DataError(
            f"{name} has no column image, img or similar among {listed}; set data.image_column to one of them."
        )
    return image_key, config.label_column or next(
        (key for key in LABEL_KEYS if key in sample and key != image_key), None
    )


def _class_names_of(data: Any, label_key: str | None) -> tuple[str, ...] | None:
    """Return the names that a data set gives to its integer labels, as torchvision and `datasets` do."""
    if isinstance(data, Subset):
        return _class_names_of(data.dataset, label_key)
    if isinstance(data, ConcatDataset):
        found = {_class_names_of(part, label_key) for part in data.datasets}
        return found.pop() if len(found) == 1 else None
    names = getattr(data, "classes", None)
    if isinstance(features := getattr(data, "features", None), Mapping):
        labels = [key for key, feature in features.items() if isinstance(getattr(feature, "names", None), list)]
        key = label_key if label_key in labels else labels[0] if len(labels) == 1 else None
        names = features[key].names if key is not None else None
    if not isinstance(names, list | tuple) or not names:
        return None
    texts = [", ".join(map(str, name)) if isinstance(name, list | tuple) else str(name) for name in names]
    return tuple(text if texts.count(text) == 1 else f"{text} ({number})" for number, text in enumerate(texts))


# ------------------------------------------------------------------------------------------------------------- pixels


def _channels_last(images: Any, name: str, config: DataConfig, *, is_batch: bool = False) -> NDArray[Any]:
    """Return an array or tensor with its channels on the last axis, added if there is none.

    The first axis may be that of the channels, too. If both can be, it is the first one in a tensor, as in torchvision,
    and the last one in an array, as in Pillow.
    """
    is_tensor = isinstance(images, torch.Tensor)
    array: NDArray[Any] = images
    if is_tensor:
        array = (images.float() if images.dtype == torch.bfloat16 else images).numpy(force=True)
    if array.ndim == 2 + is_batch:
        return array[..., None]
    axes = (int(is_batch), -1) if is_tensor else (-1, int(is_batch))
    for sizes in ((config.num_channels,), MODE_OF_CHANNELS):
        for axis in axes if array.ndim == 3 + is_batch else ():
            if array.shape[axis] in sizes:
                return np.moveaxis(array, axis, -1)
    raise DataError(
        f"{name} has the shape {tuple(array.shape)}; images are (height, width) or have one more axis of 1, 3 or 4 "
        "channels, or data.num_channels of them."
    )


def _encoded(value: Any, name: str, config: DataConfig) -> EncodedImage:
    """Return an image as it is stored; without `data.value_range`, `_Levels` converts floating-point pixels later.

    Raises:
        BadImage: It cannot be decoded.
        DataError: It is no image.
    """
    if isinstance(value, BadImage):
        raise value
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:  # of `datasets`
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if value is None or isinstance(value, bytes):
        return EncodedImage(name, value)
    if isinstance(value, str | Path):
        return EncodedImage(f"{name} ({Path(value).name})", Path(value).expanduser())
    if isinstance(value, Image.Image):
        pixels = decode_picture(value, name)
    else:
        is_array = isinstance(value, torch.Tensor | list) or hasattr(value, "__array__")
        if isinstance(value, list) or (is_array and not isinstance(value, torch.Tensor)):
            try:
                value = np.asarray(value)
            except ValueError:  # rows of different lengths
                is_array = False
        if not is_array:
            kind = type(value).__name__
            raise DataError(f"{name} is of type {kind}; an image is a Pillow image, an array or a tensor.")
        pixels = as_native(_channels_last(value, name, config))
    is_number = pixels.dtype.kind in "uif" and config.value_range is not None
    if pixels.dtype.kind != "f" and pixels.dtype.name not in ("uint8", "uint16") and not is_number:
        raise DataError(
            f"{name} has pixels of type {pixels.dtype}, whose range is unknown; set data.value_range to [low, high] or "
            "auto, or convert them to uint8, uint16, or floating point in [0, 1] or [-1, 1]."
        )
    if not pixels.size:
        raise DataError(f"{name} has the shape {pixels.shape}, which has no pixels; remove it.")
    return EncodedImage(name, pixels)


@dataclass
class _Levels:
    """The range of floating-point pixels in [0, 1] or [-1, 1], found from all images, and their conversion.

    Args:
        name: How messages refer to the data set.
        lowest: The smallest value.
        highest: The largest value.
        are_8_bit: Whether all values are 8-bit levels of [0, 1], and of [-1, 1].
    """

    name: str
    lowest: float = 0.0
    highest: float = 0.0
    are_8_bit: list[bool] = field(default_factory=lambda: [True, True])

    def add(self, pixels: NDArray[np.floating], image: str) -> None:
        """Note the values of an image; raise a DataError if they are out of range."""
        lowest, highest = float(pixels.min()), float(pixels.max())
        if not (lowest >= -1 and highest <= 1):
            raise DataError(
                f"{image} has values from {lowest:g} to {highest:g}, but floating-point pixels must be in [0, 1] or "
                "[-1, 1] without data.value_range; set it to [low, high] or auto."
            )
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
        for index, levels in enumerate((pixels * 255.0, (pixels + 1.0) * 127.5)):
            self.are_8_bit[index] &= bool((np.abs(levels - np.rint(levels)) < _LEVEL_TOLERANCE).all())

    @property
    def is_signed(self) -> bool:
        """Whether the range is [-1, 1]."""
        return self.lowest < 0

    @property
    def dtype(self) -> type[np.integer]:
        """The type of the converted pixels."""
        return np.uint8 if self.are_8_bit[self.is_signed] else np.uint16

    def check(self) -> None:
        """Raise a DataError if the range is unclear."""
        if _HIGHEST_MINIMUM < self.lowest < 0:
            raise DataError(
                f"{self.name} has values from {self.lowest:g} to {self.highest:g}, so they may be in "
                "[0, 1] or in [-1, 1]; set data.value_range to [0, 1] or [-1, 1]."
            )

    def convert(self, pixels: NDArray[np.floating]) -> Pixels:
        """Round to the nearest level."""
        unit = (pixels.astype(np.float64) + 1) / 2 if self.is_signed else pixels.astype(np.float64)
        return np.rint(unit * np.iinfo(self.dtype).max).astype(self.dtype)


def _image_set(
    pixels: Pixels,
    labels: NDArray[Any] | None,
    name: str,
    config: DataConfig,
    known: tuple[str, ...] | None,
    *,
    with_labels: bool,
) -> ImageSet | None:
    """Return the images of an array (number, height, width, channels) without a copy, None if some are not finite."""
    values, class_names = _labels_of([] if labels is None else labels, name, None, known, with_labels=with_labels)
    digest = _content_digest(pixels, values, name)
    images = image_set_of_array(pixels, name, config, {}, digest)
    if images is None:
        return None
    images = replace(images, labels=values, class_names=class_names)
    if pixels.shape[-1] > 1:
        return images
    # torch chooses kernels by strides, also by the one of the only channel: make it that of images from files.
    return replace(images, images=pixels[..., 0].reshape(len(pixels), 1, *pixels.shape[1:3]))


def _content_digest(pixels: Pixels, labels: NDArray[np.int64] | None, name: str) -> str:
    """Return the digest that the cache of the same images has, see `decode_all`; computed on all cores."""
    num_rows = max(1, _BYTES_PER_TASK // pixels[0].nbytes)
    starts = range(0, len(pixels), num_rows)

    def digests_of(start: int) -> bytes:
        digests = (hashlib.blake2b(image.tobytes(), digest_size=16) for image in pixels[start : start + num_rows])
        return b"".join(row.to_bytes(8, "little") + digest.digest() for row, digest in enumerate(digests, start))

    digest = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor(num_threads()) as pool:
        parts = pool.map(digests_of, starts)
        for part in tqdm(parts, f"Hashing {name}", len(starts), delay=1.0, disable=None, leave=False):
            digest.update(part)
    digest.update(b"" if labels is None else labels.tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------------- scan


def _scan(
    samples: _Samples, name: str, config: DataConfig, known: tuple[str, ...] | None, *, with_labels: bool
) -> Source:
    """Read all samples once, for their labels, the headers of their images and a digest of their content.

    The images are read again when they are decoded, unless the cache has them, so that they are never all in memory.
    """
    levels = _Levels(name)
    labels: list[Any] = []
    headers: list[Header | BadImage] = []
    digests: list[bytes] = []
    distinct: dict[Header, Header] = {}  # so that equal headers are one object
    with tqdm(total=samples.number, desc=f"Reading {name}", unit="img", delay=1.0, disable=None, leave=False) as bar:
        for row, (value, label) in enumerate(samples.read(range(samples.number))):
            labels.append(label)
            digest = _NO_DIGEST
            try:
                image = _encoded(value, f"image {row} of {name}", config)
                header = read_header(image, config.num_channels)
                digest = _digest(image)
                headers.append(distinct.setdefault(header, header))
                if config.value_range is None and (pixels := _float_pixels(image)) is not None:
                    levels.add(pixels, image.name)
            except BadImage as error:
                headers.append(error)
            digests.append(digest)
            bar.update()
    levels.check()
    final: dict[Header, Header] = {}
    if config.value_range is None:
        converted = np.dtype(levels.dtype).name
        final = {header: replace(header, dtype=converted) for header in distinct if _is_float_array(header)}
    values, class_names = _labels_of(labels, name, samples.class_names, known, with_labels=with_labels)

    def read(rows: Sequence[int]) -> Iterator[EncodedImage]:
        for row, (value, _) in zip(rows, samples.read(rows), strict=True):
            image = EncodedImage(f"image {row} of {name}", None)
            with suppress(BadImage):
                image = _encoded(value, image.name, config)
                if _digest(image) != digests[row] != _NO_DIGEST:
                    raise DataError(
                        f"{image.name} is another one when it is read again, as with a random transform; remove random "
                        "transforms, and set data.random_flip, or data.crop to random."
                    )
            pixels = _float_pixels(image) if config.value_range is None else None
            yield image if pixels is None else EncodedImage(image.name, levels.convert(pixels))

    content = b"".join(digests)
    return Source(
        name=name,
        kind="memory",
        fingerprint=f"{hashlib.sha256(content).hexdigest()} {levels.is_signed} {levels.dtype.__name__}",
        num_images=samples.number,
        read=read,
        labels=values,
        class_names=class_names,
        headers=[header if isinstance(header, BadImage) else final.get(header, header) for header in headers],
    )


_NO_DIGEST = bytes(16)
"""Of an image that cannot be read."""


def _is_float_array(header: Header) -> bool:
    """Return whether a header is that of an array of floating-point numbers, and not of a file."""
    return header.dtype.startswith("f") and header.stored_mode == header.dtype


def _float_pixels(image: EncodedImage) -> NDArray[Any] | None:
    """Return the pixels of an image if they are floating-point numbers."""
    pixels: Any = image.data
    return pixels if isinstance(pixels, np.ndarray) and pixels.dtype.kind == "f" else None


def _digest(image: EncodedImage) -> bytes:
    """Return a digest of the content of an image."""
    digest = hashlib.blake2b(image.read(), digest_size=16)
    if isinstance(image.data, np.ndarray):
        digest.update(f"{image.data.dtype} {image.data.shape}".encode())
    return digest.digest()


def _labels_of(
    labels: Sequence[Any] | NDArray[Any],
    name: str,
    class_names: tuple[str, ...] | None,
    known: tuple[str, ...] | None,
    *,
    with_labels: bool,
) -> Labels:
    """Number the classes of labels, which may be of other types if they are not needed."""
    try:
        return encode_labels(labels, f"the labels of {name}", class_names=class_names, known=known)
    except DataError:
        if with_labels:
            raise
        return None, None
