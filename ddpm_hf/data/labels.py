"""Labels of any type -> numbers and names of classes."""

import logging
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.data.decode import DataError

logger = logging.getLogger(__name__)

NO_LABEL = -1
"""Label of an image without one, as in `datasets`."""
MAX_CLASSES = 2**20
"""Labels with more values are assumed to be something else, such as ids."""
ClassOrder: TypeAlias = Literal["numbers", "text"]
"""How classes without a given order are numbered. "text" is that of version 0.1: class folders are sorted as text, even
if all are named by numbers, and whole numbers are the numbers of their classes, even if some have no image."""
Labels: TypeAlias = tuple[NDArray[np.int64] | None, tuple[str, ...] | None]
"""int64 (number,) and the names of the classes. None twice if no image has a label; no names if there are too many."""


def encode_labels(
    values: Sequence[Any] | NDArray[Any],
    source: str,
    *,
    class_names: tuple[str, ...] | None = None,
    known: tuple[str, ...] | None = None,
    class_order: ClassOrder = "numbers",
) -> Labels:
    """Number the classes of labels.

    Labels are whole numbers (also as floating-point numbers), booleans, text, lists of one of these, or one-hot
    vectors. None, NaN, -1 and empty text stand for none; spaces around text are removed. Classes without names are
    those of the labels that occur, in ascending order, and are named after them.

    Args:
        values: One label for each image.
        source: How messages refer to them.
        class_names: Names of the classes, if labels are their numbers or names.
        known: Names of the classes in another part of the dataset or of a network, whose numbers are kept. Whole
            numbers are names among names that are numbers, and otherwise the numbers themselves.
        class_order: How classes without names are numbered.

    Raises:
        DataError: A label is none of these, or numbers and text are mixed.
    """
    plain, class_names = _plain_labels(values, source, class_names)
    given = {value for value in plain if value not in (None, NO_LABEL)}
    if not given:
        return None, None
    if len({isinstance(value, str) for value in given}) == 2:
        text = next(value for value in given if isinstance(value, str))
        raise DataError(f"{source} are numbers and text, such as {text!r}; use one of them.")
    whole = {value for value in given if isinstance(value, int)}
    if whole and min(whole) < 0:
        raise DataError(f"{source} contain {min(whole)}; a class is a number of at least 0, and -1 stands for none.")
    if whole and class_names is None and known and not any(map(str.isdecimal, known)) and max(whole) < len(known):
        class_names = known
    if whole and class_names is None:
        class_names = _names_of_numbers(whole, source, known, class_order)
        if class_names is None or class_names == tuple(map(str, range(len(class_names)))):
            return np.asarray([NO_LABEL if value is None else value for value in plain], np.int64), class_names
    elif whole:
        return np.asarray([NO_LABEL if value is None else value for value in plain], np.int64), class_names
    texts = set(map(str, given))
    names = next((names for names in (class_names, known) if names and texts <= set(names)), None)
    names = names or tuple(sort_classes(texts) if class_order == "numbers" else sorted(texts))
    number_of = {name: number for number, name in enumerate(names)}
    numbered = [NO_LABEL if value in (None, NO_LABEL) else number_of[str(value)] for value in plain]
    return np.asarray(numbered, np.int64), names


def _plain_labels(
    values: Sequence[Any] | NDArray[Any], source: str, class_names: tuple[str, ...] | None
) -> tuple[list[int | str | None], tuple[str, ...] | None]:
    """Return labels as numbers, text or None, and the names of their numbers if their type has names."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu" and values.ndim == 1:
        return values.tolist(), class_names
    plain = []
    lengths = set()
    are_booleans = True
    for row, value in enumerate(values):
        label = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(label, list | tuple) and len(label) == 1:
            label = label[0]
        if isinstance(label, list | tuple) and set(label) == {0, 1} and sum(label) == 1:
            lengths.add(len(label))
            label = list(label).index(1)
        if isinstance(label, bytes):
            label = label.decode("utf-8", "replace")
        if isinstance(label, str):
            label = label.strip() or None
        if isinstance(label, float) and (label.is_integer() or math.isnan(label)):
            label = None if math.isnan(label) else int(label)
        if label is not None and not isinstance(label, str | numbers.Integral):
            shown = str(label) if len(str(label)) < 60 else f"{str(label)[:60]}..."
            raise DataError(
                f"{source} contain {shown} (row {row}); a label is a whole number, text, a boolean or a one-hot vector."
            )
        are_booleans &= label is None or isinstance(label, bool)
        plain.append(int(label) if isinstance(label, numbers.Integral) else label)
    if len(lengths) > 1:
        raise DataError(f"{source} are one-hot vectors of {' and '.join(map(str, sorted(lengths)))} numbers; use one.")
    if class_names is None and lengths and not are_booleans:
        class_names = tuple(map(str, range(lengths.pop())))
    if class_names is None and are_booleans:
        class_names = ("False", "True")
    return plain, class_names


def _names_of_numbers(
    labels: set[int], source: str, known: tuple[str, ...] | None, class_order: ClassOrder
) -> tuple[str, ...] | None:
    """Return the names of the classes of whole numbers; None if there are too many."""
    if known is not None and {str(label) for label in labels} <= set(known):
        return known
    if class_order == "text":
        return tuple(map(str, range(max(labels) + 1))) if max(labels) < MAX_CLASSES else None
    if len(labels) > MAX_CLASSES:
        return None
    names = tuple(map(str, sorted(labels)))
    if len(labels) <= max(labels):
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        logger.warning(
            "%s are %s: classes are numbered from 0 to %d and named after them.", source, listed, len(names) - 1
        )
    return names


def sort_classes(names: Iterable[str]) -> list[str]:
    """Sort class names: by value if all of them are numbers, otherwise as text."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isascii() and name.isdecimal() for name in names) else names


def class_order_of(class_names: Mapping[str, str]) -> ClassOrder:
    """Return how the class folders of a pipeline were sorted, given its class names by number."""
    names = [class_names[number] for number in sorted(class_names, key=int)]
    return "text" if names == sorted(names) != sort_classes(names) else "numbers"


def label_error(image: str, label: int | None, num_classes: int) -> DataError:
    """Return the error for an image without a label, or with one that is no class."""
    found = "no label" if label in (None, NO_LABEL) else f"label {label}"
    return DataError(f"{image} has {found}; every image needs one from 0 to {num_classes - 1}.")
