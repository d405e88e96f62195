"""What every kind of data set looks like to the rest: numbered images that can be read, and labels."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.data.decoding import Cell
from ddpm_hf.data.errors import DataError

NO_LABEL = -1
"""What `datasets` itself puts where the label of an image is not known."""
MAX_CLASSES = 2**20
"""More without names are no classes, but something else that is numbered, and a list of them would fill the memory."""


@dataclass(frozen=True)
class Source:
    """A data set that has been found, but not decoded.

    Args:
        name: As its user wrote it.
        kind: What it is, in a word.
        fingerprint: Changes when the data do.
        num_images: Images of the split.
        read: Returns the cells of some rows, which are asked for in ascending order; an archive unpacks one at a time.
        labels: int64 (number,), or None.
        class_names: Names of the classes, or None.
        left_out: Files beside the images that are none.
    """

    name: str
    kind: str
    fingerprint: str
    num_images: int
    read: Callable[[Sequence[int]], Iterable[Cell]]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    left_out: tuple[str, ...] = ()


def identity_of(place: Path) -> tuple[int, int]:
    """Returns size and time of change of a file; a link that leads nowhere is a bad image, found when it is read."""
    try:
        status = place.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def valid_labels(labels: Sequence[int] | NDArray[np.integer], name: str) -> NDArray[np.int64] | None:
    """Returns labels as int64, or None where no image has one.

    Raises:
        DataError: If one is larger than any number of a class.
    """
    highest = int(max(labels))
    if highest > np.iinfo(np.int64).max:
        raise DataError(f"{name} has label {highest}, which numbers no class; name another data.label_column.")
    return np.asarray(labels).astype(np.int64) if highest >= 0 else None


def numbers_as_names(labels: NDArray[np.int64]) -> tuple[str, ...] | None:
    """Names classes by their numbers; None where the numbers are too large to be those of classes."""
    count = int(labels.max()) + 1
    return tuple(map(str, range(count))) if count <= MAX_CLASSES else None


def rows_of_split(split: str, name: str, num_images: int) -> range:
    """Returns the rows of a data set that has one split only, "train", or of a part of it such as "train[:90%]".

    Raises:
        DataError: If another split is asked for, or a part that is none.
    """
    if split == "train":
        return range(num_images)
    if split.split("[")[0] != "train":
        raise DataError(f"{name} has no split {split!r}, only 'train' and parts of it such as 'train[:90%]'.")
    import datasets

    try:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({"train": num_images})
    except (ValueError, AssertionError) as error:
        raise DataError(f"data.split {split!r} names no part of {name} ({error}).") from None
    return range(part.from_ or 0, num_images if part.to is None else part.to)
