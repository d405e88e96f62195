"""Goes through a source twice: for the headers, which say what all images become, and for the pixels, to store them."""

import hashlib
import math
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_hf.config import DataConfig
from ddpm_hf.data.decoding import Cell, Header, Pixels, Target, decode, read_header
from ddpm_hf.data.errors import BadImage, DataError, UnreachableImage
from ddpm_hf.data.geometry import Geometry
from ddpm_hf.data.source import Source

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


def num_threads() -> int:
    """Returns how many images are decoded at a time: as many as there are cores for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
