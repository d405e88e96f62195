"""Decode a source once into memory-mapped arrays on disk.

Goes through a source twice: for the headers, which say what all images become, and for the pixels, to store them.

Decodes a data set once to files that are mapped into memory.

A cache is a folder named by a key, made of the data's fingerprint and the transform: `pixels.bin` (all images, one
behind the other), `layout.npy` (only if their sizes differ), `labels.npy` (only if there are any) and `meta.json`. It
is built under another name and renamed when it is whole, so nobody sees half of one; a lease beside it keeps other
processes, on this machine or on another one that shares the disk, from building it at the same time.
"""

import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
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
    BadImage,
    Cell,
    DataError,
    Geometry,
    Header,
    Pixels,
    Target,
    UnreachableImage,
    decode,
    num_threads,
    read_header,
)
from ddpm_hf.data.image_set import ImageSet, UnequalImages
from ddpm_hf.data.sources import Source, animated_sentence, left_out_sentence
from ddpm_hf.files import gib, write_text

Result = TypeVar("Result")

_CELLS_READ_AT_ONCE = 64
_CELLS_WORKED_AT_ONCE = 8
_BYTES_WORKED_AT_ONCE = 64 * 1024
"""Handing small images to a thread one by one takes longer than decoding them."""


@dataclass
class BadImages:
    """Images that could not be read, and how many of them may be.

    Args:
        limit: One more than this is refused.
        num_images: Of the whole set.
        fraction: What data.max_bad_fraction says; None where data.on_bad_image allows none.
        reasons: Row -> sentence.
        unreachable: Those rows that the system did not hand out.
    """

    limit: int
    num_images: int
    fraction: float | None
    reasons: dict[int, str] = field(default_factory=dict)
    unreachable: set[int] = field(default_factory=set)

    def add(self, row: int, error: BadImage) -> None:
        """Counts a bad image.

        Raises:
            DataError: If it is one too many.
        """
        self.reasons[row] = str(error)
        if isinstance(error, UnreachableImage):
            self.unreachable.add(row)
        self.check()

    def check(self) -> None:
        """Raises a DataError if there are more than allowed."""
        if len(self.reasons) <= self.limit:
            return
        first = self.reasons[min(self.reasons)]
        if self.fraction is None:
            raise DataError(f"{first.removesuffix('.')}; repair or remove it, or set data.on_bad_image to skip.")
        if len(self.reasons) == self.num_images:
            raise DataError(f"none of the {self.num_images} images can be read; the first: {first}")
        enough = math.ceil(len(self.reasons) / self.num_images * 10_000) / 10_000
        raise DataError(
            f"more than {self.limit} of {self.num_images} images cannot be read, which is all that "
            f"data.max_bad_fraction {self.fraction:g} allows; repair them, or set it to {enough:g} or more; the first: "
            f"{first}"
        )


@dataclass
class Survey:
    """What the headers of a data set say.

    Args:
        modes: How many images are stored in which mode, in Pillow's words.
        plain_modes: How many need which plain mode: L, RGB, RGBA, or the number of channels of an array.
        sizes: How many are of which size (width, height).
        first_of_size: Name of the first image of each size, in the order in which they come.
        num_deep: How many have 16 bits a channel.
        num_animated: How many have several frames; the first is used.
    """

    modes: Counter[str] = field(default_factory=Counter)
    plain_modes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    first_of_size: dict[tuple[int, int], str] = field(default_factory=dict)
    num_deep: int = 0
    num_animated: int = 0

    def add(self, header: Header, name: str) -> None:
        """Counts an image."""
        self.modes[header.stored_mode] += 1
        self.plain_modes[header.mode] += 1
        self.sizes[header.width, header.height] += 1
        self.first_of_size.setdefault((header.width, header.height), name)
        self.num_deep += header.is_deep
        self.num_animated += header.num_frames > 1

    def target(self, config: DataConfig) -> Target:
        """Returns what every image becomes: what loses nothing of any, unless the settings say otherwise."""
        if config.num_channels is not None:
            num_channels = config.num_channels
        elif numbers := [int(mode) for mode in self.plain_modes if mode.isdigit()]:
            num_channels = numbers[0]
        elif set(self.plain_modes) == {"RGBA"}:
            num_channels = 4
        else:
            # Where only some have an alpha channel, it may be opaque; if not, decoding asks what to do.
            num_channels = 1 if set(self.plain_modes) == {"L"} else 3
        dtype = np.dtype(np.uint16 if self.num_deep else np.uint8)
        return Target(num_channels, dtype, config.background, Geometry.of(config))

    def sizes_after(self, geometry: Geometry) -> Counter[tuple[int, int]]:
        """Returns how many images will have which size (height, width) in the cache.

        Raises:
            DataError: If they cannot be put into batches, or a crop does not fit; the first such image is named.
        """
        after: Counter[tuple[int, int]] = Counter()
        for (width, height), name in self.first_of_size.items():
            size = geometry.size_after(width, height, name)
            after[size] += self.sizes[width, height]
            if len(after) > 1 and geometry.size is None:
                raise unequal(name, size, next(iter(after)))
        return after


def unequal(name: str, size: tuple[int, int], first: tuple[int, int]) -> DataError:
    """Returns what is said of an image of another size (height, width) than the first."""
    return DataError(
        f"{name} has {size[1]}x{size[0]} pixels where the first has {first[1]}x{first[0]}; set data.resolution to "
        "resize all images to one size."
    )


def survey(source: Source, bad: BadImages) -> Survey:
    """Reads the headers of all images.

    Raises:
        DataError: If too many cannot be read.
    """
    found = Survey()
    for row, name, header in _each(source, read_header, "Looking at images", skip=set()):
        if isinstance(header, BadImage):
            bad.add(row, header)
        else:
            found.add(header, name)
    return found


@dataclass
class Decoded:
    """What is known of a data set once it is decoded.

    Args:
        layout: int64 (number, 3): where each image begins, height and width; those of bad images are 0.
        digest: What tells the encoded data from others.
        lowest: Lowest value of a pixel.
        highest: Highest value of a pixel.
    """

    layout: NDArray[np.int64]
    digest: str
    lowest: int
    highest: int


def decode_all(
    source: Source, target: Target, bad: BadImages, file: BinaryIO, shape: tuple[int, int, int] | None
) -> Decoded:
    """Decodes all images into a file, one behind the other.

    Args:
        source: Where they are.
        target: What they become.
        bad: Images known to be bad, which are left out; others are added.
        file: Where to write.
        shape: What every image must have as (channels, height, width), a bad one being all 0; None allows any.

    Raises:
        DataError: If too many cannot be read, or one does not fit the others.
        OSError: If the disk does not take it.
    """
    digest = hashlib.blake2b(digest_size=16)
    layout = np.zeros((source.num_images, 3), np.int64)
    start, lowest, highest = 0, np.iinfo(target.dtype).max, 0
    gap = bytes(int(np.prod(shape)) * target.dtype.itemsize) if shape else b""
    work = lambda cell: _decode_and_digest(cell, target)  # noqa: E731
    for row, name, result in _each(source, work, "Decoding images", skip=set(bad.reasons)):
        layout[row, 0] = start
        if isinstance(result, BadImage):
            if row not in bad.reasons:
                bad.add(row, result)
            file.write(gap)
            start += len(gap) // target.dtype.itemsize
            continue
        pixels, cell_digest = result
        if shape and pixels.shape != shape:
            raise unequal(name, pixels.shape[1:], shape[1:])
        digest.update(row.to_bytes(8, "little") + cell_digest)
        layout[row, 1:] = pixels.shape[1:]
        lowest, highest = min(lowest, int(pixels.min())), max(highest, int(pixels.max()))
        file.write(pixels.data)
        start += pixels.size
    digest.update(b"" if source.labels is None else source.labels.tobytes())
    return Decoded(layout, digest.hexdigest(), lowest, highest)


def _decode_and_digest(cell: Cell, target: Target) -> tuple[Pixels, bytes]:
    """Decodes an image, reading its file once."""
    data = cell.read()
    loaded = cell if isinstance(cell.data, np.ndarray) else Cell(cell.name, data)
    return decode(loaded, target), hashlib.blake2b(data, digest_size=16).digest()


def _each(
    source: Source, work: Callable[[Cell], Result], description: str, skip: set[int]
) -> Iterator[tuple[int, str, Result | BadImage]]:
    """Yields row, name and result of every image in order, worked at by threads; a bad image's result is its error."""

    def caught(cell: Cell) -> Result | BadImage:
        try:
            return work(cell)
        except BadImage as error:
            return error

    def work_on(part: list[tuple[int, Cell]]) -> list[tuple[int, str, Result | BadImage]]:
        return [(row, cell.name, caught(Cell(cell.name, None) if row in skip else cell)) for row, cell in part]

    bar = tqdm(total=source.num_images, desc=description, unit="img", disable=None, leave=False)
    # Pillow warns of damaged tags, which do no harm, and of large images, which are refused.
    with warnings.catch_warnings(), ThreadPoolExecutor(num_threads()) as pool, bar:
        warnings.simplefilter("ignore")
        submitted = (pool.submit(work_on, part) for part in _parts(source))
        pending: deque[Future[Any]] = deque(islice(submitted, 4 * num_threads()))
        try:
            while pending:
                results = pending.popleft().result()
                yield from results
                pending.extend(islice(submitted, 1))
                bar.update(len(results))
        finally:
            for future in pending:
                future.cancel()


def _parts(source: Source) -> Iterator[list[tuple[int, Cell]]]:
    """Yields all images with their rows: large ones by themselves, small ones several together."""
    part: list[tuple[int, Cell]] = []
    num_bytes = 0
    for start in range(0, source.num_images, _CELLS_READ_AT_ONCE):
        rows = range(start, min(start + _CELLS_READ_AT_ONCE, source.num_images))
        for row, cell in zip(rows, source.read(rows), strict=True):
            if part and (len(part) == _CELLS_WORKED_AT_ONCE or num_bytes + cell.num_bytes > _BYTES_WORKED_AT_ONCE):
                yield part
                part, num_bytes = [], 0
            part.append((row, cell))
            num_bytes += cell.num_bytes
    if part:
        yield part


logger = logging.getLogger(__name__)

_VERSION = 3
_TRANSFORM = (
    "crop_before_resize", "resolution", "resize_to", "resize_filter", "crop", "num_channels", "background",
)  # fmt: skip
_LEASE_SECONDS = 60.0
"""A builder without a sign of life for so long is dead or stopped, and another one takes over."""
_SILENT_SECONDS = 2.0
"""Waiting for another process is said only if it takes longer."""
_NUM_SIZES_KEPT = 20


def open_cache(source: Source, config: DataConfig, *, max_bad: int) -> ImageSet:
    """Opens the decoded images of a source, decoding them first where that was not done before.

    Args:
        source: Where the images are.
        config: How to prepare them.
        max_bad: How many images may be bad.

    Raises:
        DataError: If an image cannot be read or batched, or there is no room to write the cache.
    """
    folder = cache_root(config) / cache_key(source, config)
    bad = BadImages(max_bad, source.num_images, config.max_bad_fraction if config.on_bad_image == "skip" else None)
    meta = _read_valid(folder, source)
    if meta is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lease(folder):
                meta = _read_valid(folder, source) or _build(source, config, folder, bad)
        except OSError as error:
            raise DataError(
                f"the decoded images cannot be written to {folder.parent} ({error.strerror or error}); give another "
                "folder with data.cache_dir."
            ) from None
    bad.reasons = {int(row): reason for row, reason in meta["bad"].items()}
    bad.check()
    return _open(folder, meta, config)


def allowed_bad(source: Source, config: DataConfig) -> int:
    """Returns how many bad images the settings allow."""
    if config.on_bad_image != "skip":
        return 0
    return int(round(config.max_bad_fraction * source.num_images, 6))  # 0.29 * 100 is 28.999999999999996


def cache_root(config: DataConfig) -> Path:
    """Returns the folder of all decoded data sets."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm_hf" / "images"


def cache_key(source: Source, config: DataConfig) -> str:
    """Returns what a cache is called: it changes with the data and with every setting that changes a stored pixel.

    The classes of a split are named by all splits together, so they may change where its images do not.
    """
    transform = [getattr(config, name) for name in _TRANSFORM]
    labels = None if source.labels is None else hashlib.sha256(source.labels.tobytes()).hexdigest()
    key = json.dumps([_VERSION, source.fingerprint, source.num_images, labels, source.class_names, *transform])
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Returns what a cache says of itself, or None if there is none that is whole and ours."""
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        is_ours = meta["version"] == _VERSION and meta["key"] == folder.name
        is_whole = is_ours and all((folder / name).stat().st_size == size for name, size in meta["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return meta if is_whole else None


def _read_valid(folder: Path, source: Source) -> dict[str, Any] | None:
    """Returns what a cache says of itself, unless the system now hands out an image that it did not then."""
    meta = read_meta(folder)
    if meta is None or not meta["unreachable"]:
        return meta
    for cell in source.read(meta["unreachable"]):
        with suppress(BadImage):
            cell.read()
            return None
    return meta


def _open(folder: Path, meta: dict[str, Any], config: DataConfig) -> ImageSet:
    """Maps a cache into memory."""
    flat = np.memmap(folder / "pixels.bin", np.dtype(meta["dtype"]), mode="r")
    num_images, geometry_size = meta["num_images"], meta["crop_size"]
    images: Any
    if meta["shape"] is None:
        images = UnequalImages(flat, np.load(folder / "layout.npy", allow_pickle=False), meta["num_channels"])
    else:
        images = flat.reshape(num_images, *meta["shape"])
    names = meta["class_names"]
    return ImageSet(
        images=images,
        labels=None if names is None else np.load(folder / "labels.npy", allow_pickle=False),
        class_names=None if names is None else tuple(names),
        indices=np.arange(num_images),
        crop_size=None if geometry_size is None else (geometry_size[0], geometry_size[1]),
        bad_rows=np.asarray(sorted(map(int, meta["bad"])), np.int64),
        digest=meta["digest"],
    )


@contextmanager
def _lease(folder: Path) -> Iterator[None]:
    """Keeps all other processes from building the same cache; one that dies loses its lease."""
    lease = SoftFileLease(f"{folder}.lock", lease_duration=_LEASE_SECONDS, poll_interval=0.2)
    try:
        lease.acquire(timeout=_SILENT_SECONDS)
    except Timeout:
        logger.warning("Another process is decoding the same images into %s; waiting for it.", folder)
        lease.acquire()
    try:
        yield
    finally:
        lease.release()


def _build(source: Source, config: DataConfig, folder: Path, bad: BadImages) -> dict[str, Any]:
    """Builds a cache and gives it its name when it is whole."""
    for leftover in folder.parent.glob(f"{folder.name}.building-*"):  # of builders that were killed
        shutil.rmtree(leftover, ignore_errors=True)
    building = folder.with_name(f"{folder.name}.building-{secrets.token_hex(8)}")
    building.mkdir()
    try:
        meta = _fill(source, config, building, bad) | {"version": _VERSION, "key": folder.name}
        write_text(building / "meta.json", json.dumps(meta, indent=1))
        if (theirs := _read_valid(folder, source)) is None:
            shutil.rmtree(folder, ignore_errors=True)  # one that is not whole, or lacks an image
            building.rename(folder)
    except OSError:
        # A process that is stopped for long loses its lease: another one cleared its files away and was faster.
        if (theirs := _read_valid(folder, source)) is None:
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return theirs or meta


def _fill(source: Source, config: DataConfig, building: Path, bad: BadImages) -> dict[str, Any]:
    """Decodes all images into a folder and returns what is to be known of them."""
    found = survey(source, bad)
    if not found.sizes:
        raise DataError(f"none of the {source.num_images} images of {source.name} can be read.")
    target = found.target(config)
    sizes = found.sizes_after(target.geometry)
    shape = (target.num_channels, *next(iter(sizes))) if len(sizes) == 1 else None
    num_values = target.num_channels * sum(height * width * count for (height, width), count in sizes.items())
    if shape:
        num_values = int(np.prod(shape)) * source.num_images
    _check_space(num_values * target.dtype.itemsize, building, source)
    with (building / "pixels.bin").open("wb") as file:
        decoded = decode_all(source, target, bad, file, shape)
        file.flush()
        os.fsync(file.fileno())
    if shape is None:
        np.save(building / "layout.npy", decoded.layout)
    if source.labels is not None:
        np.save(building / "labels.npy", source.labels)
    _tell(source, config, found, bad, decoded.lowest, decoded.highest, target)
    size = target.geometry.size
    return {
        "source": source.name,
        "kind": source.kind,
        "num_images": source.num_images,
        "dtype": target.dtype.name,
        "num_channels": target.num_channels,
        "shape": shape,
        "crop_size": size if target.geometry.is_random_crop and size and (not shape or shape[1:] != size) else None,
        "class_names": source.class_names,
        "digest": decoded.digest,
        "pixel_range": [decoded.lowest, decoded.highest],
        "modes": dict(found.modes.most_common()),
        "sizes": [[*size, count] for size, count in found.sizes.most_common(_NUM_SIZES_KEPT)],
        "num_sizes": len(found.sizes),
        "smallest": [min(width for width, _ in found.sizes), min(height for _, height in found.sizes)],
        "largest": [max(width for width, _ in found.sizes), max(height for _, height in found.sizes)],
        "num_animated": found.num_animated,
        "bad": {str(row): reason for row, reason in sorted(bad.reasons.items())},
        "unreachable": sorted(bad.unreachable),
        "files": {path.name: path.stat().st_size for path in sorted(building.iterdir())},
    }


def _check_space(num_bytes: int, building: Path, source: Source) -> None:
    """Refuses to begin what the disk has no room for."""
    free = shutil.disk_usage(building).free
    if num_bytes > free:
        raise DataError(
            f"the {source.num_images:,} decoded images need {gib(num_bytes)}, but {building.parent} has {gib(free)} "
            "free; give another folder with data.cache_dir, lower data.resolution, or set data.streaming to true."
        )


def _tell(
    source: Source, config: DataConfig, found: Survey, bad: BadImages, lowest: int, highest: int, target: Target
) -> None:
    """Says once, when the images are decoded, what a reader of them should know."""
    if bad.reasons and config.on_bad_image == "skip" and len(bad.reasons) <= allowed_bad(source, config):
        row = min(bad.reasons)
        logger.warning(
            "%d of %d images cannot be read, the next good one stands in for each; the first: %s",
            len(bad.reasons), source.num_images, bad.reasons[row],
        )  # fmt: skip
    if found.num_animated:
        logger.warning("%s.", animated_sentence(found.num_animated))
    if source.left_out:
        logger.warning("%s", left_out_sentence(source))
    full = np.iinfo(target.dtype).max
    if highest - lowest < full / 4:
        logger.warning(
            "The pixels of %s use only the values %d to %d of 0 to %d, so the network sees little contrast; stretch "
            "them if that is not what they show.",
            source.name, lowest, highest, full,
        )  # fmt: skip
