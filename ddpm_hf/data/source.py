"""What every kind of data set looks like to the rest: numbered images that can be read, and labels."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.config import DataConfig
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


def counted(number: int, noun: str) -> str:
    """Returns "1 image" or "1,234 images"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def stand_in(num_bad: int) -> str:
    """Says how many images replace bad ones."""
    return (
        "1 stands in for an image that cannot be read"
        if num_bad == 1
        else (f"{num_bad:,} stand in for images that cannot be read")
    )


def animated_sentence(number: int) -> str:
    """Says what becomes of animations."""
    return f"{counted(number, 'image')} {'has' if number == 1 else 'have'} several frames; the first is used"


def left_out_reason(number: int) -> str:
    """Says why so many files are left out."""
    return "no image by its name, hidden or a link" if number == 1 else "no images by their names, hidden or links"


def left_out_sentence(source: Source) -> str:
    """Says which files beside the images are not read."""
    number = len(source.left_out)
    return (
        f"{counted(number, 'file')} in {source.name} {'is' if number == 1 else 'are'} left out, being "
        f"{left_out_reason(number)}; the first: {source.left_out[0]}"
    )


def refuse_settings(config: DataConfig, settings: tuple[str, ...], where: str) -> None:
    """Refuses settings that a kind of data set cannot follow.

    Raises:
        DataError: If one of them is set.
    """
    for setting in settings:
        if getattr(config, setting) is not None:
            raise DataError(f"data.{setting} does not apply to {where}; leave the setting out.")


def name_of_split(split: str, name: str) -> str:
    """Returns which split of a data set is meant by a split, a part such as "train[:90%]" or a sum of its parts.

    Raises:
        DataError: If there are parts of several.
    """
    names = list(dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")))
    if len(names) > 1:
        raise DataError(f"split {split!r} of {name} adds parts of {' and '.join(names)}; give parts of one of them.")
    return names[0]


def rows_of_split(split: str, name: str, num_images: int) -> Sequence[int]:
    """Returns the rows of a part such as "train[:90%]" or "train[:3]+train[5:9]", written as `datasets` does.

    Args:
        split: What is asked for, of one split.
        name: Of the data set.
        num_images: Of that split.

    Raises:
        DataError: If it is no part, or one without images.
    """
    wanted = name_of_split(split, name)
    if split == wanted:
        return range(num_images)
    import datasets

    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({wanted: num_images})
    except (ValueError, AssertionError) as error:
        raise DataError(f"split {split!r} names no part of {name} ({' '.join(str(error).split())}).") from None
    ranges = [range(part.from_ or 0, num_images if part.to is None else part.to) for part in parts]
    rows = ranges[0] if len(ranges) == 1 else [row for rows in ranges for row in rows]
    if not rows:
        raise DataError(
            f"split {split!r} of {name} is empty, though {wanted!r} has {num_images:,} images; ask for more."
        )
    return rows
