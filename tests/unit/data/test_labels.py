"""Labels of every type, as numbers and names of classes."""

from typing import Any

import numpy as np
import pytest

from ddpm_hf.data import DataError
from ddpm_hf.data.labels import encode_labels


@pytest.mark.parametrize(
    ("values", "numbers", "names"),
    [
        ([1, 0, 1], [1, 0, 1], "0 1"),
        ([5, 3, 1], [2, 1, 0], "1 3 5"),
        ([3, 50, 7, 3], [0, 2, 1, 0], "3 7 50"),
        (np.array([10, 2], np.uint8), [1, 0], "2 10"),
        ([1.0, 0.0], [1, 0], "0 1"),
        (np.array([[1], [0]]), [1, 0], "0 1"),
        ([[2], [4]], [0, 1], "2 4"),
        ([True, False], [1, 0], "False True"),
        (np.array([True, True]), [1, 1], "False True"),
        (["dog", "cat", "dog"], [1, 0, 1], "cat dog"),
        (["10", "9"], [1, 0], "9 10"),
        ([b"dog", b"cat"], [1, 0], "cat dog"),
        (np.array(["b", "a"]), [1, 0], "a b"),
        ([[0, 0, 1], [1, 0, 0]], [2, 0], "0 1 2"),
        (np.eye(3, dtype=np.float32), [0, 1, 2], "0 1 2"),
        ([None, 4, float("nan"), -1, 6], [-1, 0, -1, -1, 1], "4 6"),
        (["cat ", "", " cat", " "], [0, -1, 0, -1], "cat"),
        (["x", None, -1], [0, -1, -1], "x"),
    ],
)
def test_labels_become_numbers_and_names(values: Any, numbers: list[int], names: str) -> None:
    """Each class of numbers has an image."""
    labels, class_names = encode_labels(values, "the labels")
    assert labels is not None and class_names is not None
    assert (labels.tolist(), " ".join(class_names)) == (numbers, names)
    assert labels.dtype == np.int64


@pytest.mark.parametrize("values", [[], [None], [-1, -1], [float("nan")]])
def test_labels_that_are_all_missing_are_none(values: list[Any]) -> None:
    assert encode_labels(values, "the labels") == (None, None)


def test_labels_with_gaps_are_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    encode_labels([3, 7, 50], "the labels of x")
    assert caplog.messages == ["the labels of x are 3, 7, 50: classes are numbered from 0 to 2 and named after them."]
    encode_labels([0, 1, 2], "the labels of x")
    assert len(caplog.messages) == 1


def test_numbers_are_those_of_given_names() -> None:
    for values in ([2, 0], ["c", "a"]):
        labels, names = encode_labels(values, "the labels", class_names=("a", "b", "c"))
        assert (labels.tolist(), names) == ([2, 0], ("a", "b", "c"))


@pytest.mark.parametrize(("values", "known"), [([7, 50], ("3", "7", "50")), (["c", "b"], ("a", "b", "c"))])
def test_the_classes_of_another_part_keep_their_numbers(values: list[Any], known: tuple[str, ...]) -> None:
    labels, names = encode_labels(values, "the labels", known=known)
    assert names == known
    assert [known[number] for number in labels.tolist()] == list(map(str, values))


def test_whole_numbers_are_the_numbers_of_known_classes_with_other_names() -> None:
    labels, names = encode_labels([2, 1], "the labels", known=("a", "b", "c"))
    assert (labels.tolist(), names) == ([2, 1], ("a", "b", "c"))


def test_version_0_1_numbered_classes_by_their_labels() -> None:
    labels, names = encode_labels([3, 1], "the labels", class_order="text")
    assert (labels.tolist(), names) == ([3, 1], ("0", "1", "2", "3"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 0.5], "the labels contain 0.5 (row 1); a label is a whole number, text, a boolean or a one-hot vector."),
        ([[1, 1]], "the labels contain [1, 1] (row 0); a label is "),
        ([{"a": 1}], "the labels contain {'a': 1} (row 0); a label is "),
        ([1, "a"], "the labels are numbers and text, such as 'a'; use one of them."),
        ([[1, 0], [0, 0, 1]], "the labels are one-hot vectors of 2 and 3 numbers; use one."),
        ([0, -3], "the labels contain -3; a class is a number of at least 0, and -1 stands for none."),
    ],
)
def test_labels_of_other_types_are_named(values: list[Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        encode_labels(values, "the labels")
    assert str(caught.value).startswith(message)
