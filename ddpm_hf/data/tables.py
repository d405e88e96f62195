"""Data sets that the `datasets` library opens: of the Hub, parquet and arrow files, folders with metadata."""

import glob
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_hf.config import DataConfig
from ddpm_hf.data.decoding import Cell
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.files import SPLIT_NAMES, walk, why_left_out
from ddpm_hf.data.source import (
    NO_LABEL,
    Source,
    identity_of,
    name_of_split,
    numbers_as_names,
    rows_of_split,
    valid_labels,
)

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

_SAVED_TO_DISK = ("state.json", "dataset_dict.json")
_TABLE_SUFFIXES = (".parquet", ".arrow")
_TABLES_OF_IMAGES = ("metadata.csv", "metadata.jsonl")


def open_table(config: DataConfig, split: str) -> Source:
    """Finds the images and labels of a data set in rows and columns.

    Raises:
        DataError: If it cannot be opened, or has no such split or columns.
    """
    dataset = load_table(config, split)
    if len(dataset) == 0:
        raise DataError(f"split {split!r} of {config.source} holds no images.")
    image_column, label_column = find_columns(dataset.features, config)
    encoded = encoded_images(dataset, image_column)
    labels, class_names = None, None
    if label_column is not None:
        # A missing label is harmless until a network asks for it.
        cells = [NO_LABEL if label is None else label for label in dataset[label_column]]
        labels = valid_labels(cells, config.source)
    if label_column is not None and labels is not None:
        class_names = class_names_of(dataset.features, label_column) or numbers_as_names(labels)

    def read(rows: Sequence[int]) -> list[Cell]:
        images = encoded[list(rows)][image_column]
        names = [f"image {row} of {config.source}" for row in rows]
        return [as_cell(name, config, image) for name, image in zip(names, images, strict=True)]

    return Source(
        name=config.source,
        kind="data set",
        fingerprint=f"{dataset._fingerprint} {image_column} {label_column} {_identity_of_files(encoded, image_column)}",
        num_images=len(dataset),
        read=read,
        labels=labels,
        class_names=class_names,
    )


def _identity_of_files(encoded: "Dataset", image_column: str) -> str:
    """Returns what changes when an image file that a table only names is written anew, or put where it was missing."""
    identities = []
    for images in encoded.data.column(image_column).chunks:
        paths = images.field("path").filter(images.field("bytes").is_null()).to_pylist()
        identities += [identity_of(Path(path)) for path in paths if path is not None]
    return hashlib.sha256(json.dumps(identities).encode()).hexdigest()


def as_cell(name: str, config: DataConfig, image: dict[str, Any] | None) -> Cell:
    """Returns the image of a row, named also by its file, if it has one.

    A file is read only where the data set lies: the rows of somebody else's could name any picture on this machine,
    and a network learns what it is shown.
    """
    if image is None or (image["bytes"] is None and image["path"] is None):
        return Cell(name, None)
    if image["path"]:
        name += f" ({Path(image['path']).name})"
    if image["bytes"] is not None:
        return Cell(name, image["bytes"])
    path = Path(os.path.abspath(image["path"]))
    if not any(path.is_relative_to(folder) for folder in _folders_of(config)):
        return Cell(name, None, f"it is {path}, outside of the data set")
    return Cell(name, path)


def _folders_of(config: DataConfig) -> list[str]:
    """Returns where the image files of a data set may lie: beside it, or where `datasets` puts what it downloads."""
    import datasets
    from huggingface_hub import constants

    source = Path(config.source).expanduser()
    if source.exists():
        return [os.path.abspath(source if source.is_dir() else source.parent)]
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    return [os.path.abspath(folder) for folder in caches]


def load_table(config: DataConfig, split: str, *, is_streaming: bool = False) -> "Any":
    """Loads one split with the `datasets` library.

    Raises:
        DataError: If it cannot be opened.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    path = Path(config.source).expanduser()
    try:
        is_saved = path.is_dir() and any((path / name).is_file() for name in _SAVED_TO_DISK)
        if is_saved and not is_streaming:
            return _part_of_saved(path, split)
        arguments = _files_of_saved(path) if is_saved else _arguments(path, config)
        return datasets.load_dataset(**arguments, split=split, streaming=is_streaming)
    except DataError:
        raise
    except Exception as error:  # `datasets` raises its own and foreign types for every kind of unreadable data
        # What it says itself is only that there was an error.
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = " ".join(str(cause or error).split()) or type(error).__name__
        if "corresponds to no data" in reason:
            raise DataError(f"split {split!r} of {config.source} holds no images.") from None
        if "must be present as dictionary key" in reason and (table := next(path.rglob("metadata.*"), None)):
            raise DataError(
                f"{table} has no column file_name, which says whose each row is; add it, or call the table otherwise."
            ) from None
        where = "" if path.exists() else ", which is no file or folder here,"
        raise DataError(f"data.source {config.source}{where} cannot be opened (split {split!r}): {reason}") from error


def _arguments(path: Path, config: DataConfig) -> dict[str, Any]:
    """Returns what tells `datasets` where the data are."""
    if path.is_file():
        kind = path.suffix[1:].lower()
        if kind not in ("parquet", "arrow"):
            raise DataError(f"a {path.suffix} file such as {path} is not streamed; set data.streaming to false.")
        return {"path": kind, "data_files": _escaped(path)}
    if path.is_dir():
        return _tables_of_folder(path)
    if path.suffix[1:].isalpha() or config.source.startswith((".", "~", "/")) or config.source.count("/") > 1:
        raise DataError(f"data.source {config.source} does not exist; check the path (here is {Path.cwd()}).")
    return {"path": config.source, "name": config.subset, "revision": config.revision}


def is_table(folder: Path) -> bool:
    """Tells whether a folder holds tables, or images with a table beside them, rather than images alone."""
    return any(
        file.suffix in _TABLE_SUFFIXES or file.name in _TABLES_OF_IMAGES or file.name == "dataset_dict.json"
        for file in _visible(folder)
    )


def _visible(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder that are no images, through links, without hidden ones."""
    for file in walk(folder):
        name = file.relative_to(folder).as_posix()
        if why_left_out(name) == name:
            yield file


def _tables_of_folder(folder: Path) -> dict[str, Any]:
    """Returns what tells `datasets` which tables of a folder belong to which split.

    Raises:
        DataError: If there are images beside them, or only some belong to a split.
    """
    tables = sorted(_visible(folder))
    for suffix in _TABLE_SUFFIXES:
        if chosen := [file for file in tables if file.suffix == suffix]:
            _refuse_images_beside(chosen[0], folder)
            return {"path": suffix[1:], "data_files": _by_split(chosen, folder)}
    # `datasets` finds the images by these tables; shown the images, it would take some for splits by their names.
    chosen = [file for file in tables if file.name in _TABLES_OF_IMAGES]
    return {"path": "imagefolder", "data_files": _by_split(chosen, folder)}


def _escaped(path: Path) -> str:
    """Returns a path in which `datasets` finds no patterns."""
    return glob.escape(os.path.abspath(path))


def _by_split(tables: list[Path], folder: Path) -> dict[str, list[str]]:
    """Returns the tables of each split, told as on the Hub: by their numbered names, their folders, or words in names.

    Raises:
        DataError: If only some of them can be told.
    """
    for split_of in (_split_of_number, _split_of_folders, _split_of_words):
        found = {file: split_of(file, folder) for file in tables}
        without = [file for file, split in found.items() if split is None]
        if len(without) == len(tables):
            continue
        if without:
            named = next(file for file, split in found.items() if split is not None)
            raise DataError(
                f"{named.relative_to(folder)} in {folder} belongs to split {found[named]!r} by its name, but "
                f"{without[0].relative_to(folder)} to none; name all tables after splits, or none of them."
            )
        splits: dict[str, list[str]] = {}
        for file, split in found.items():
            splits.setdefault(str(split), []).append(_escaped(file))
        return splits
    return {"train": list(map(_escaped, tables))}


def _split_of_number(table: Path, folder: Path) -> str | None:
    """Returns the split of a table called "data/SPLIT-00000-of-00001", whatever it is called."""
    match = re.match(r"data/(\w+)-\d{5}-of-\d{5}", table.relative_to(folder).as_posix())
    return match and match[1]


def _split_of_folders(table: Path, folder: Path) -> str | None:
    """Returns the split that a folder of a table is named after, the outermost first."""
    return next(filter(None, map(_split_of_name, table.relative_to(folder).parts[:-1])), None)


def _split_of_words(table: Path, folder: Path) -> str | None:
    """Returns the split that a table is named after."""
    return _split_of_name(table.name)


def _split_of_name(name: str) -> str | None:
    """Returns the first split that a word of a name stands for."""
    words = re.split("[-._ 0-9]", name)
    return next((split for word in words for split, names in SPLIT_NAMES.items() if word in names), None)


def _refuse_images_beside(table: Path, folder: Path) -> None:
    """Refuses a folder that holds images and a table, since nobody says which of them is meant."""
    for file in walk(folder):
        if why_left_out(file.relative_to(folder).as_posix()) is None and file.is_file():
            raise DataError(
                f"{folder} holds images such as {file.relative_to(folder)} and the table {table.relative_to(folder)}; "
                "give the table itself as data.source, or take one of them out of the folder."
            )


def _part_of_saved(path: Path, split: str) -> "Dataset":
    """Opens a folder that `save_to_disk` wrote."""
    import datasets

    saved = datasets.load_from_disk(os.fspath(path))
    name = name_of_split(split, str(path))
    if isinstance(saved, datasets.DatasetDict):
        if name not in saved:
            raise DataError(f"{path} has no split {name!r}; it has {', '.join(saved)}.")
        saved = saved[name]
    elif name != "train":
        raise DataError(f"{path} has no split {name!r}, only 'train'.")
    return saved if split == name else saved.select(rows_of_split(split, str(path), len(saved)))


def _files_of_saved(path: Path) -> dict[str, Any]:
    """Returns what tells `datasets` which tables `save_to_disk` wrote for which split."""
    names = path / "dataset_dict.json"
    splits = json.loads(names.read_text())["splits"] if names.is_file() else None
    folders = {"train": path} if splits is None else {split: path / split for split in splits}
    states = {split: json.loads((folder / "state.json").read_text()) for split, folder in folders.items()}
    files = {
        split: [_escaped(folders[split] / file["filename"]) for file in state["_data_files"]]
        for split, state in states.items()
    }
    return {"path": "arrow", "data_files": files}


def find_columns(features: "Features", config: DataConfig) -> tuple[str, str | None]:
    """Returns the image column and the label column, named or found.

    Raises:
        DataError: If one that is named does not exist or holds something else, or images are not found.
    """
    import datasets

    columns = ", ".join(features)
    for setting, column in (("image_column", config.image_column), ("label_column", config.label_column)):
        if column is not None and column not in features:
            raise DataError(f"data.{setting} {column!r} is not a column of {config.source}; it has {columns}.")
    image_column = config.image_column
    if image_column is None:
        found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        found = found or [name for name, feature in features.items() if _may_hold_images(feature)]
        if len(found) != 1:
            raise DataError(
                f"{config.source} has {len(found)} image columns among {columns}; name one with data.image_column."
            )
        image_column = found[0]
    if not _may_hold_images(features[image_column]):
        raise DataError(f"column {image_column!r} of {config.source} holds {features[image_column]}, not images.")
    label_column = config.label_column
    if label_column is None:
        found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        found = found or [name for name in ("label",) if name in features]
        label_column = found[0] if len(found) == 1 and _is_integer(features[found[0]]) else None
    elif not _is_integer(features[label_column]):
        raise DataError(
            f"column {label_column!r} of {config.source} holds {features[label_column]}, not integer labels."
        )
    return image_column, label_column


def encoded_images(dataset: "Dataset | IterableDataset", image_column: str) -> Any:
    """Returns the images of a data set as files, not yet decoded."""
    import datasets

    return dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))


def class_names_of(features: "Features", label_column: str) -> tuple[str, ...] | None:
    """Returns the names of the classes, if the data set knows them."""
    names = getattr(features[label_column], "names", None)
    return tuple(names) if names else None


def _may_hold_images(feature: Any) -> bool:
    """Tells whether a column holds images, or files that may be images."""
    import datasets

    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")


def _is_integer(feature: Any) -> bool:
    """Tells whether a column of `datasets` holds integers."""
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint"))
