"""The folders of image files: which enclose everything, which are splits, and which are classes."""

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from ddpm_hf.data.decode import DataError

logger = logging.getLogger(__name__)

SPLIT_NAMES = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
"""Split -> names of its folders and tables, as in `datasets`."""
_SPLIT_OF_WORD = {word: split for split, words in SPLIT_NAMES.items() for word in words}
_FILLERS = {"images", "image", "imgs", "img", "set", "data", "dataset", "split"}
"""Words beside the name of a split."""
_UNUSED = {"unlabeled", "unlabelled", "unsupervised", "extra", "raw"}
"""Words for images that are in no split."""
_ANNOTATIONS = {
    "annotation", "annotations", "depth", "groundtruth", "gt", "label", "labels", "mask", "masks", "matte", "mattes",
    "segmentation", "segmentationclass", "segmentationobject", "segmentations", "trimap", "trimaps",
}  # fmt: skip
"""Words for pictures that describe the images in a folder beside them."""
_CONTAINERS = {*_FILLERS, "imagefolder", "jpegimages", "jpg", "jpeg", "png", "photos", "pictures", "pics"}
"""Names of a single folder that are no class."""

Kind: TypeAlias = Literal["flat", "classes", "splits", "splits/classes"]
Folders: TypeAlias = tuple[str, ...]
"""The folders that contain a file, outermost first."""


@dataclass(frozen=True)
class Layout:
    """The meaning of folders.

    Args:
        kind: What the folders below the enclosing ones are (data.layout).
        depth: Number of folders that enclose everything.
        splits: Folder -> split.
        class_depths: Folder of a split -> position of the class among the folders; without splits, "" is the key.
        left_out: Folders that are in no split, or contain annotations such as masks.
        annotations: The folders of annotations.
        doubt: Why the classes may be others; "" without a doubt.
    """

    kind: Kind
    depth: int = 0
    splits: dict[str, str] = field(default_factory=dict)
    class_depths: dict[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    annotations: frozenset[Folders] = frozenset()
    doubt: str = ""

    def is_annotation(self, folders: Folders) -> bool:
        """Return whether a file is an annotation of an image."""
        return any(folders[:depth] in self.annotations for depth in range(1, len(folders) + 1))

    def split_of(self, folders: Folders) -> str | None:
        """Return the split of a file, None if it is in none."""
        if self.is_annotation(folders):
            return None
        if not self.splits:
            return "train"
        return self.splits.get(folders[self.depth]) if len(folders) > self.depth else None

    def folders_of(self, wanted: str) -> set[str]:
        """Return the folders of a split, given its name, the name of a folder, or another word for it, such as val."""
        if wanted in self.splits and wanted not in SPLIT_NAMES:
            return {wanted}
        split = split_of_word(wanted) or wanted
        return {name for name, found in self.splits.items() if found == split}

    def class_of(self, folders: Folders) -> str | None:
        """Return the name of the class of a file, None if it has none."""
        if self.is_annotation(folders):
            return None
        top = "".join(folders[self.depth : self.depth + 1]) if self.splits else ""
        depth = self.class_depths.get(top)
        return folders[depth] if depth is not None and len(folders) > depth else None

    def __str__(self) -> str:
        classes = ", with a folder for each class" if self.kind == "splits/classes" else ""
        folders = ", ".join(name if name == split else f"{name} ({split})" for name, split in self.splits.items())
        found = {"flat": "images without classes", "classes": "a folder for each class"}.get(
            self.kind, f"splits {folders}{classes}"
        )
        return found + (f"; left out: {', '.join(self.left_out)}" if self.left_out else "")


def are_of_one_kind(names: Iterable[str]) -> bool:
    """Return whether names of splits have the same other words, which train_HR and train_LR do not."""
    return len({mark[1] for name in names if (mark := _mark(name)) is not None}) < 2


def are_of_one_split(one: str, other: str) -> bool:
    """Return whether two names contain a split, and the same one, as train and train_images do."""
    marks = _mark(one), _mark(other)
    return marks[0] is not None and marks[1] is not None and marks[0][0] == marks[1][0]


def split_of_word(word: str) -> str | None:
    """Return the split that a word such as val stands for, None if there is none."""
    return _SPLIT_OF_WORD.get(word.lower())


def read_layout(
    files: Collection[Folders],
    source: str,
    kind: Kind | None = None,
    *,
    is_archive: bool,
    with_annotations: bool = False,
) -> Layout:
    """Find out what folders mean.

    Folders that enclose everything have no meaning. The folders in them are splits if all are named after splits, such
    as train2017 and val2017, or if train and another split are among them; the others are then left out. Any other
    folder is a class, also one called train beside other names, about which a warning is printed. Beside a folder of
    images, a folder of masks or other annotations is left out.

    Args:
        files: The folders of each image.
        source: Name of the dataset in errors.
        kind: data.layout; None decides by the names.
        is_archive: Whether a single outermost folder stands for the dataset, and is not a class.
        with_annotations: Take annotations for images, as version 0.1 did.

    Raises:
        DataError: The names are ambiguous, or contradict `kind`.
    """
    if not with_annotations and kind not in ("flat", "classes") and (annotations := _annotations(files)):
        unused = Layout("flat", annotations=annotations)
        images = [folders for folders in files if not unused.is_annotation(folders)]
        layout = read_layout(images, source, kind, is_archive=is_archive, with_annotations=True)
        names = sorted("/".join(folders) for folders in annotations)
        return replace(layout, annotations=annotations, left_out=(*layout.left_out, *names))
    depth = _num_enclosing(set(files), 1 if is_archive else 0)
    tops = {folders[depth] for folders in files if len(folders) > depth}
    splits = {} if kind in ("flat", "classes") else _splits_among(tops, source, is_certain=kind is not None)
    if kind in ("splits", "splits/classes"):
        if not tops:
            raise DataError(f"data.layout {kind} needs a folder for each split in {source}, which has none.")
        splits = {top: splits.get(top, top) for top in sorted(tops)}
    if not splits:
        if kind == "flat" or not tops:
            return Layout("flat", depth)
        if kind is None:
            _check_no_splits_in_classes(files, depth, source)
        doubt = "" if kind is not None else _doubt_of_classes(set(files), depth, source)
        return Layout("classes", depth, class_depths={"": depth}, doubt=doubt)
    class_depths = {}
    for top in splits:
        inside = {folders for folders in files if folders[depth : depth + 1] == (top,)}
        first = _num_enclosing(inside, 0, depth + 1)
        if kind != "splits" and any(len(folders) > first for folders in inside):
            class_depths[top] = first
    left_out = tuple(sorted(tops - splits.keys()))
    return Layout("splits/classes" if class_depths else "splits", depth, splits, class_depths, left_out)


def _num_enclosing(files: set[Folders], num_of_dataset: int, first: int = 0) -> int:
    """Return how many folders enclose all files, at least `first`.

    A split is not counted, nor is a single folder that holds all files, if it may be a class.

    Args:
        files: The folders of each image.
        num_of_dataset: Number of enclosing folders that are no class in any case.
        first: Number of folders that are known to be none.
    """
    depth = first
    while all(len(folders) > depth for folders in files) and len({folders[depth] for folders in files}) == 1:
        mark = _mark(next(iter(files))[depth])
        if mark is not None and not mark[1]:
            return depth
        depth += 1
    if len(files) > 1 or depth <= first + num_of_dataset:
        return depth
    *outer, name = next(iter(files))[:depth]
    return depth - (name.lower() not in _CONTAINERS and name not in outer)


def _mark(name: str) -> tuple[str, Folders] | None:
    """Return the split that a name contains and its other words, None unless it contains a single one."""
    separated = re.sub("(?<=[a-z])(?=[A-Z])", " ", name)  # trainA, as in CycleGAN
    words = [word for word in re.split("[^a-z]+", separated.lower()) if word]
    found = [word for word in words if word in _SPLIT_OF_WORD]
    if len(found) != 1:
        return None
    return _SPLIT_OF_WORD[found[0]], tuple(word for word in words if word not in {found[0], *_FILLERS})


def _splits_among(names: Iterable[str], source: str, *, is_certain: bool) -> dict[str, str]:
    """Return name -> split of the folders that are named after splits; nothing if the folders are classes.

    Names with other words, such as photos_train and photos_test, count if two splits have the same words.
    """
    names = sorted(names)
    marks = {name: mark for name in names if (mark := _mark(name)) is not None}
    splits_of_words: dict[Folders, set[str]] = defaultdict(set)
    for split, words in marks.values():
        splits_of_words[words].add(split)
    splits = {name: split for name, (split, words) in marks.items() if not words or len(splits_of_words[words]) > 1}
    others = [name for name in names if name not in splits]
    found = set(splits.values())
    is_unused = all(re.sub("[^a-z]", "", name.lower()) in _UNUSED or _is_annotation(name) for name in others)
    if not splits or is_certain or is_unused or ("train" in found and len(found) > 1):
        return splits
    beside = (
        f"{source} has the folders {_listed(others)} beside {_listed(list(splits))}, which is the name of a split; "
    )
    if found == {"train"}:  # a class of vehicles, too
        logger.warning(
            "%sall of them are classes. Set data.layout to classes if this is right, or to splits (splits/classes if "
            "they contain a folder for each class).",
            beside,
        )
        return {}
    raise DataError(
        f"{beside}set data.layout to classes if it is a class, or to splits if all are splits (splits/classes if they "
        "contain a folder for each class)."
    )


def _is_annotation(name: str) -> bool:
    return not _ANNOTATIONS.isdisjoint(re.split("[^a-z]+", name.lower()))


def _annotations(files: Iterable[Folders]) -> frozenset[Folders]:
    """Return the folders of annotations that lie beside folders of images, and beside nothing else."""
    names: dict[Folders, set[str]] = defaultdict(set)
    for folders in set(files):
        for depth, name in enumerate(folders):
            names[folders[:depth]].add(name)
    found = set()
    for parent, inside in names.items():
        images = {name for name in inside if not _CONTAINERS.isdisjoint(re.split("[^a-z]+", name.lower()))}
        others = {name for name in inside - images if _is_annotation(name)}
        if images and images | others == inside:
            found |= {(*parent, name) for name in others}
    return frozenset(found)


def _doubt_of_classes(files: set[Folders], depth: int, source: str) -> str:
    """Return a sentence if all class folders contain folders of the same names, which may be the classes."""
    inside: dict[str, set[Folders]] = defaultdict(set)
    for folders in files:
        if len(folders) > depth:
            inside[folders[depth]].add(folders)
    common: set[str] | None = None
    for found in inside.values():
        first = _num_enclosing(found, 0, depth + 1)
        names = {folders[first] for folders in found if len(folders) > first}
        common = names if common is None else common & names
    if common is None or len(common) < 2 or len(inside) == 1:
        return ""
    return (
        f"{source} has the folders {_listed(sorted(inside))}, which are taken for classes, although each of them "
        f"contains {_listed(sorted(common))}; if these are the classes, set data.source to one of the former."
    )


def _check_no_splits_in_classes(files: Iterable[Folders], depth: int, source: str) -> None:
    """Raise a DataError if every class folder contains a folder named train and one named after another split."""
    inside: dict[Folders, set[str]] = defaultdict(set)
    for folders in files:
        inside[folders[depth : depth + 1]].update(folders[depth + 1 : depth + 2])
    for names in inside.values():
        splits = {mark[0] for name in names if (mark := _mark(name)) is not None and not mark[1]}
        if "train" not in splits or len(splits) == 1:
            return
    raise DataError(
        f"{source} has splits inside of its class folders ({_listed(sorted(names))}); move each class into the folder "
        "of its split, or set data.layout to classes to train on all of them."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
