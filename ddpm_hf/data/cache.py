"""Decode a dataset once into memory-mapped arrays on disk.

A cache is a folder named by a key, which is derived from the fingerprint of the data and the preprocessing settings:

    pixels.bin    all images, one after the other
    layout.npy    offset, height and width of each image, only if the sizes differ
    labels.npy    only if there are labels
    meta.json     shapes, digest, statistics, unreadable images, size of each file

It is built under another name and renamed when it is complete, so no process reads a partial cache. A lease file beside
it keeps other processes, also on other machines that share the disk, from building the same cache.
"""

import functools
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import warnings
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from filelock import SoftFileLease, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_hf.config import DataConfig
from ddpm_hf.data.decode import (
    STORED_DTYPES,
    BadImage,
    DataError,
    EncodedImage,
    Geometry,
    Header,
    OutputFormat,
    Pixels,
    UnreachableImage,
    ValueRange,
    bad_image_error,
    decode,
    find_value_range,
    num_threads,
    read_header,
    unknown_range,
    warn_of_cubes,
)
from ddpm_hf.data.folders import Source, log_ignored_files
from ddpm_hf.data.image_set import ImageSet, UnequalImages
from ddpm_hf.files import format_bytes, format_count, write_text

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_VERSION = 3
_PREPROCESSING_SETTINGS = (
    "crop_before_resize", "resolution", "resize_to", "resize_filter", "crop", "num_channels", "background",
)  # fmt: skip
_LEASE_SECONDS = 60.0
"""A builder that does not renew its lease for this long has died or was suspended, and another process takes over."""
_WAIT_SECONDS_BEFORE_WARNING = 2.0
_NUM_SIZES_KEPT = 20


def open_cache(source: Source, config: DataConfig, *, max_bad: int | None = None) -> ImageSet:
    """Open the decoded images of a source; decode them first if necessary.

    Args:
        source: The encoded images.
        config: The preprocessing settings.
        max_bad: Number of images that may be unreadable; None takes `allowed_bad`.

    Raises:
        DataError: Too many images are unreadable, an image does not fit the others, or the cache cannot be written.
    """
    folder = cache_root(config) / cache_key(source, config)
    max_bad = allowed_bad(source, config) if max_bad is None else max_bad
    bad = BadImages(max_bad, source.num_images, config.max_bad_fraction if config.on_bad_image == "skip" else None)
    meta = _read_valid_meta(folder, source)
    if meta is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with cache_lease(folder):
                meta = _read_valid_meta(folder, source) or _build(source, config, folder, bad)
        except OSError as error:
            raise DataError(
                f"the decoded images cannot be written to {folder.parent} ({error.strerror or error}); set "
                "data.cache_dir to another folder."
            ) from None
    bad.reasons = {int(row): reason for row, reason in meta["bad"].items()}
    bad.check()
    is_empty = len(bad.reasons) == source.num_images
    return _map(folder, meta, None if is_empty else find_value_range(config, source.name, meta["pixel_range"]))


def map_cache(location: dict[str, Any]) -> ImageSet | None:
    """Memory-map the cache that another process opened; return None if this machine has no such cache."""
    folder = Path(location["cache"])
    meta = read_meta(folder)
    if meta is None or meta["digest"] != location["digest"]:
        return None
    value_range = location["value_range"]
    return _map(folder, meta, value_range and (value_range[0], value_range[1]))


def allowed_bad(source: Source, config: DataConfig) -> int:
    """Return how many unreadable images `data.on_bad_image` and `data.max_bad_fraction` allow."""
    if config.on_bad_image != "skip":
        return 0
    return int(round(config.max_bad_fraction * source.num_images, 6))  # 0.29 * 100 is 28.999999999999996


def cache_root(config: DataConfig) -> Path:
    """Return the folder of all caches."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm_hf" / "images"


def cache_key(source: Source, config: DataConfig) -> str:
    """Return the name of a cache: a digest of the data and of every setting that changes stored pixels.

    Labels and class names are included, because files of other splits can change the classes of this one.
    """
    settings = [getattr(config, name) for name in _PREPROCESSING_SETTINGS]
    if config.value_range is not None:
        settings.append("values")  # in any range, which is applied later
    labels = None if source.labels is None else hashlib.sha256(source.labels.tobytes()).hexdigest()
    key = json.dumps([_VERSION, source.fingerprint, source.num_images, labels, source.class_names, *settings])
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def read_meta(folder: Path, version: int = _VERSION) -> dict[str, Any] | None:
    """Return the content of meta.json, or None if there is no complete cache of this version."""
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        is_ours = meta["version"] == version and meta["key"] == folder.name
        is_complete = is_ours and all((folder / name).stat().st_size == size for name, size in meta["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return meta if is_complete else None


def _read_valid_meta(folder: Path, source: Source) -> dict[str, Any] | None:
    """Return `read_meta`, or None if an image that was unreachable when the cache was built can be read now."""
    meta = read_meta(folder)
    if meta is None or not meta["unreachable"]:
        return meta
    for image in source.read(meta["unreachable"]):
        with suppress(BadImage):
            image.read()
            return None
    return meta


def _map(folder: Path, meta: dict[str, Any], value_range: ValueRange | None) -> ImageSet:
    """Memory-map a cache."""
    flat = np.memmap(folder / "pixels.bin", np.dtype(meta["dtype"]), mode="r")
    num_images, crop_size, class_names = meta["num_images"], meta["crop_size"], meta["class_names"]
    images: Pixels | UnequalImages
    if meta["shape"] is None:
        images = UnequalImages(flat, np.load(folder / "layout.npy", allow_pickle=False), meta["num_channels"])
    else:
        images = flat.reshape(num_images, *meta["shape"])
    return ImageSet(
        images=images,
        labels=None if class_names is None else np.load(folder / "labels.npy", allow_pickle=False),
        class_names=None if class_names is None else tuple(class_names),
        indices=np.arange(num_images),
        crop_size=None if crop_size is None else (crop_size[0], crop_size[1]),
        bad_rows=np.asarray(sorted(map(int, meta["bad"])), np.int64),
        digest=meta["digest"],
        location={
            "cache": os.path.abspath(folder),
            "digest": meta["digest"],
            "pixel_range": meta["pixel_range"],
            "value_range": value_range,
        },
        value_range=value_range,
    )


# ---------------------------------------------------------------------------------------------------- building a cache


@contextmanager
def cache_lease(folder: Path) -> Iterator[None]:
    """Hold the exclusive right to build a cache. A process that dies loses it."""
    lease = SoftFileLease(f"{folder}.lock", lease_duration=_LEASE_SECONDS, poll_interval=0.2)
    try:
        lease.acquire(timeout=_WAIT_SECONDS_BEFORE_WARNING)
    except Timeout:
        logger.warning("Waiting for another process that is preparing the same images in %s.", folder)
        lease.acquire()
    try:
        yield
    finally:
        lease.release()


def _build(source: Source, config: DataConfig, folder: Path, bad: "BadImages") -> dict[str, Any]:
    """Build a cache, rename it when it is complete, and return its metadata.

    The temporary name is unique: after losing its lease, a builder may still be running beside its successor.
    """
    for leftover in folder.parent.glob(f"{folder.name}.building-*"):  # from builders that were killed
        shutil.rmtree(leftover, ignore_errors=True)
    building = folder.with_name(f"{folder.name}.building-{secrets.token_hex(8)}")
    building.mkdir()
    try:
        meta = _decode_into(building, source, config, bad) | {"version": _VERSION, "key": folder.name}
        write_text(building / "meta.json", json.dumps(meta, indent=1))
        if (existing := _read_valid_meta(folder, source)) is None:
            shutil.rmtree(folder, ignore_errors=True)  # incomplete, or without an image that is readable now
            building.rename(folder)
    except OSError:
        # If this process lost its lease, another one may have removed the files and completed the cache.
        if (existing := _read_valid_meta(folder, source)) is None:
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return existing or meta


def _decode_into(building: Path, source: Source, config: DataConfig, bad: "BadImages") -> dict[str, Any]:
    """Decode all images into a folder and return the metadata."""
    statistics = HeaderStatistics()
    for row, name, header in _headers_of(source, config):
        if isinstance(header, BadImage):
            bad.add(row, header)
        else:
            statistics.add(header, name)
    if not statistics.sizes:
        first = bad.reasons[min(bad.reasons)]
        raise DataError(f"none of the {source.num_images} images of {source.name} can be read; the first: {first}")
    output = statistics.output_format(config)
    if set(statistics.sizes) == {(output.num_channels, output.num_channels)}:
        warn_of_cubes(source.name, output.num_channels)
    sizes = statistics.sizes_after(output.geometry)
    shape = (output.num_channels, *next(iter(sizes))) if len(sizes) == 1 else None
    num_pixels = sum(height * width * count for (height, width), count in sizes.items())
    if shape:
        num_pixels = math.prod(shape[1:]) * source.num_images  # unreadable images are stored as zeros
    num_bytes = num_pixels * output.num_channels * output.dtype.itemsize
    free = shutil.disk_usage(building).free
    if num_bytes > free:
        raise DataError(
            f"the {source.num_images:,} decoded images need {format_bytes(num_bytes)}, but {building.parent} has "
            f"{format_bytes(free)} free; set data.cache_dir to another folder, lower data.resolution, or set "
            "data.streaming to true."
        )
    with (building / "pixels.bin").open("wb") as file:
        decoded = decode_all(source, output, bad, file, shape)
        file.flush()
        os.fsync(file.fileno())
    if shape is None:
        np.save(building / "layout.npy", decoded.layout)
    if source.labels is not None:
        np.save(building / "labels.npy", source.labels)
    if bad.reasons and config.on_bad_image == "skip" and len(bad.reasons) <= allowed_bad(source, config):
        logger.warning(
            "%d of %d images cannot be read; each is replaced by the next good one. The first: %s",
            len(bad.reasons), source.num_images, bad.reasons[min(bad.reasons)],
        )  # fmt: skip
    if statistics.num_animated:
        logger.warning(
            "%s with several frames: only the first frame is used.", format_count(statistics.num_animated, "image")
        )
    if source.ignored_files:
        log_ignored_files(source)
    widths, heights = zip(*statistics.sizes, strict=True)
    crop_size = output.geometry.size if output.geometry.is_random_crop else None
    return {
        "source": source.name,
        "kind": source.kind,
        "num_images": source.num_images,
        "dtype": output.dtype.name,
        "num_channels": output.num_channels,
        "shape": shape,
        "crop_size": crop_size if shape is None or shape[1:] != crop_size else None,
        "class_names": source.class_names,
        "digest": decoded.digest,
        "pixel_range": [decoded.lowest, decoded.highest],
        "modes": dict(statistics.modes.most_common()),
        "sizes": [[*size, count] for size, count in statistics.sizes.most_common(_NUM_SIZES_KEPT)],
        "num_sizes": len(statistics.sizes),
        "smallest": [min(widths), min(heights)],
        "largest": [max(widths), max(heights)],
        "num_animated": statistics.num_animated,
        "bad": {str(row): reason for row, reason in sorted(bad.reasons.items())},
        "unreachable": sorted(bad.unreachable),
        "files": {path.name: path.stat().st_size for path in sorted(building.iterdir())},
    }


def _headers_of(source: Source, config: DataConfig) -> Iterator[tuple[int, str, Header | BadImage]]:
    """Yield row, name and header of all images in order, for a bad image its error."""
    if source.headers is None:
        read = functools.partial(read_header, num_channels=config.num_channels)
        yield from _map_images(source, read, "Reading image headers")
    else:
        yield from ((row, f"image {row} of {source.name}", header) for row, header in enumerate(source.headers))


@dataclass
class BadImages:
    """Images that could not be decoded, and how many of them are allowed.

    Args:
        limit: Number of unreadable images that are allowed.
        num_images: Number of images in the dataset.
        fraction: `data.max_bad_fraction`; None if `data.on_bad_image` is error.
        reasons: Row -> message.
        unreachable: Rows that the operating system could not read.
    """

    limit: int
    num_images: int
    fraction: float | None
    reasons: dict[int, str] = field(default_factory=dict)
    unreachable: set[int] = field(default_factory=set)

    def add(self, row: int, error: BadImage) -> None:
        """Record an unreadable image; raise a DataError if there are more than allowed."""
        self.reasons[row] = str(error)
        if isinstance(error, UnreachableImage):
            self.unreachable.add(row)
        self.check()

    def check(self) -> None:
        """Raise a DataError if there are more than allowed."""
        if len(self.reasons) <= self.limit:
            return
        first = self.reasons[min(self.reasons)]
        if self.fraction is None:
            raise bad_image_error(first)
        if len(self.reasons) == self.num_images:
            raise DataError(f"none of the {self.num_images} images can be read; the first: {first}")
        enough = math.ceil(len(self.reasons) / self.num_images * 10_000) / 10_000
        raise DataError(
            f"more than {self.limit} of {self.num_images} images cannot be read, the limit set by "
            f"data.max_bad_fraction {self.fraction:g}; repair them, or set it to {enough:g} or more; the first: {first}"
        )


@dataclass
class HeaderStatistics:
    """Statistics of the headers of a dataset.

    Args:
        modes: Number of images per stored mode, see `Header.stored_mode`.
        canonical_modes: Every `Header.mode`.
        sizes: Number of images per size (width, height).
        first_of_size: Name of the first image of each size, in order of appearance.
        first_of_dtype: Name of the first image with each type of values.
        num_animated: Number of images with several frames.
    """

    modes: Counter[str] = field(default_factory=Counter)
    canonical_modes: set[str] = field(default_factory=set)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    first_of_size: dict[tuple[int, int], str] = field(default_factory=dict)
    first_of_dtype: dict[str, str] = field(default_factory=dict)
    num_animated: int = 0

    def add(self, header: Header, name: str) -> None:
        """Count an image."""
        self.modes[header.stored_mode] += 1
        self.canonical_modes.add(header.mode)
        self.sizes[header.width, header.height] += 1
        self.first_of_size.setdefault((header.width, header.height), name)
        self.first_of_dtype.setdefault(header.dtype, name)
        self.num_animated += header.num_frames > 1

    def output_format(self, config: DataConfig) -> OutputFormat:
        """Return the format that keeps everything of every image, unless `config` asks for another one."""
        num_channels = config.num_channels
        if num_channels is None:
            # If only some images have an alpha channel, it may be opaque. If it is not, decoding raises.
            num_channels = 1 if self.canonical_modes == {"L"} else 4 if self.canonical_modes == {"RGBA"} else 3
        geometry, keeps_values = Geometry.of(config), config.value_range is not None
        dtype = self._stored_dtype(geometry, keeps_values=keeps_values)
        return OutputFormat(num_channels, dtype, config.background, geometry, keeps_values)

    def _stored_dtype(self, geometry: Geometry, *, keeps_values: bool) -> np.dtype[Any]:
        """Return the smallest type that holds all values: exactly, except that float32 is the largest one."""
        if not keeps_values:
            for dtype, name in self.first_of_dtype.items():
                if dtype not in ("uint8", "uint16"):
                    raise unknown_range(name, dtype)
        common = np.result_type(*self.first_of_dtype)
        if common == np.float16 and any(geometry.resizes(*size, name) for size, name in self.first_of_size.items()):
            return np.dtype(np.float32)
        return np.dtype(next((stored for stored in STORED_DTYPES if np.can_cast(common, stored)), np.float32))

    def sizes_after(self, geometry: Geometry) -> Counter[tuple[int, int]]:
        """Return the number of images per size (height, width) in the cache."""
        after: Counter[tuple[int, int]] = Counter()
        for (width, height), name in self.first_of_size.items():
            size = geometry.size_after(width, height, name)
            after[size] += self.sizes[width, height]
            if len(after) > 1 and geometry.size is None:
                raise _different_size(name, size, next(iter(after)))
        return after


def _different_size(name: str, size: tuple[int, int], first: tuple[int, int]) -> DataError:
    return DataError(
        f"{name} has {size[1]}x{size[0]} pixels, but the first image has {first[1]}x{first[0]}; set data.resolution to "
        "resize all images to one size."
    )


@dataclass
class Decoded:
    """Properties of a decoded dataset.

    Args:
        layout: int64 (number, 3): offset, height and width of each image; height and width of bad images are 0.
        digest: Identifies the encoded images and the labels.
        lowest: Smallest pixel value.
        highest: Largest pixel value.
    """

    layout: NDArray[np.int64]
    digest: str
    lowest: float
    highest: float


def decode_all(
    source: Source, output: OutputFormat, bad: BadImages, file: BinaryIO, shape: tuple[int, int, int] | None
) -> Decoded:
    """Decode all images into a file, one after the other.

    Args:
        source: The encoded images.
        output: The format of the decoded images.
        bad: Images known to be unreadable, which are skipped; others are added.
        file: The file to write to.
        shape: Expected (channels, height, width), for which bad images are written as zeros; None allows any size.

    Raises:
        DataError: Too many images are unreadable, or an image has another shape.
        OSError: The file cannot be written.
    """

    def decode_and_digest(image: EncodedImage) -> tuple[Pixels, bytes]:
        image = image.in_memory()
        return decode(image, output), hashlib.blake2b(image.read(), digest_size=16).digest()

    digest = hashlib.blake2b(digest_size=16)
    layout = np.zeros((source.num_images, 3), np.int64)
    offset, lowest, highest = 0, math.inf, -math.inf
    gap = bytes(math.prod(shape) * output.dtype.itemsize) if shape else b""
    for row, name, result in _map_images(source, decode_and_digest, "Decoding images", bad.reasons):
        layout[row, 0] = offset
        if isinstance(result, BadImage):
            if row not in bad.reasons:
                bad.add(row, result)
            file.write(gap)
            offset += len(gap) // output.dtype.itemsize
            continue
        pixels, image_digest = result
        if shape and pixels.shape != shape:
            raise _different_size(name, pixels.shape[1:], shape[1:])
        digest.update(row.to_bytes(8, "little") + image_digest)
        layout[row, 1:] = pixels.shape[1:]
        lowest, highest = min(lowest, pixels.min().item()), max(highest, pixels.max().item())
        file.write(pixels.data)
        offset += pixels.size
    digest.update(b"" if source.labels is None else source.labels.tobytes())
    if lowest > highest:  # no image can be read
        lowest = highest = 0
    return Decoded(layout, digest.hexdigest(), lowest, highest)


_IMAGES_PER_READ = 64
_MAX_IMAGES_PER_TASK, _MAX_BYTES_PER_TASK = 8, 64 * 1024
"""Small images are decoded several at a time, because starting a task takes longer than decoding one of them."""


def _map_images(
    source: Source, function: Callable[[EncodedImage], Result], description: str, skip: Container[int] = ()
) -> Iterator[tuple[int, str, Result | BadImage]]:
    """Apply a function to all images with threads; yield row, name and result in order, for a bad image its error."""

    def apply(row: int, image: EncodedImage) -> Result | BadImage:
        try:
            return function(EncodedImage(image.name, None) if row in skip else image)
        except BadImage as error:
            return error

    def run(task: list[tuple[int, EncodedImage]]) -> list[tuple[int, str, Result | BadImage]]:
        return [(row, image.name, apply(row, image)) for row, image in task]

    bar = tqdm(total=source.num_images, desc=description, unit="img", disable=None, leave=False)
    # Pillow warns about damaged tags, which are harmless, and about large images, which raise an error here.
    with warnings.catch_warnings(), ThreadPoolExecutor(num_threads()) as pool, bar:
        warnings.simplefilter("ignore")
        futures = (pool.submit(run, task) for task in _tasks(source))
        pending: deque[Future[list[tuple[int, str, Result | BadImage]]]] = deque(islice(futures, 4 * num_threads()))
        try:
            while pending:
                results = pending.popleft().result()
                yield from results
                pending.extend(islice(futures, 1))
                bar.update(len(results))
        finally:
            for future in pending:
                future.cancel()


def _tasks(source: Source) -> Iterator[list[tuple[int, EncodedImage]]]:
    """Yield all images with their rows, small ones several together."""
    task: list[tuple[int, EncodedImage]] = []
    num_bytes = 0
    for start in range(0, source.num_images, _IMAGES_PER_READ):
        rows = range(start, min(start + _IMAGES_PER_READ, source.num_images))
        for row, image in zip(rows, source.read(rows), strict=True):
            if task and (len(task) == _MAX_IMAGES_PER_TASK or num_bytes + image.num_bytes > _MAX_BYTES_PER_TASK):
                yield task
                task, num_bytes = [], 0
            task.append((row, image))
            num_bytes += image.num_bytes
    if task:
        yield task
