"""Decodes a data set once to files that are mapped into memory.

A cache is a folder named by a key, made of the data's fingerprint and the transform: `pixels.bin` (all images, one
behind the other), `layout.npy` (only if their sizes differ), `labels.npy` (only if there are any) and `meta.json`. It
is built under another name and renamed when it is whole, so nobody sees half of one; a lease beside it keeps other
processes, on this machine or on another one that shares the disk, from building it at the same time.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import SoftFileLease, Timeout

from ddpm_hf.config import DataConfig
from ddpm_hf.data.build import BadImages, Survey, decode_all, survey
from ddpm_hf.data.decoding import Target
from ddpm_hf.data.errors import BadImage, DataError
from ddpm_hf.data.image_set import ImageSet, UnequalImages
from ddpm_hf.data.source import Source, animated_sentence, left_out_sentence
from ddpm_hf.durable import write_text

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


def gib(num_bytes: int) -> str:
    """Says a number of bytes."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


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
