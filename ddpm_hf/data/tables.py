"""Find the images and labels of a table: parquet, arrow, CSV, JSON, metadata of a folder, or a dataset of the Hub.

Data and settings that cannot be used raise a `DataError`.
"""

import functools
import glob
import hashlib
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ddpm_hf.config import DataConfig
from ddpm_hf.data.decode import LFS_POINTER, DataError, EncodedImage, image_of_array
from ddpm_hf.data.folders import (
    TAR_SUFFIXES,
    File,
    Source,
    check_unset,
    class_folders,
    file_identity,
    idx_of_folder,
    name_of_split,
    no_such_split,
    rows_of_split,
    shortened,
    visible_other_files,
    walk,
    why_ignored,
)
from ddpm_hf.data.labels import ClassOrder, Labels, encode_labels
from ddpm_hf.data.layout import SPLIT_NAMES, are_of_one_split, read_layout, split_of_word

if TYPE_CHECKING:
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)

TABLE_SUFFIXES = (".parquet", ".arrow")
TEXT_TABLES: dict[str, dict[str, Any]] = {
    ".csv": {"path": "csv", "skipinitialspace": True},
    ".tsv": {"path": "csv", "sep": "\t"},
    ".jsonl": {"path": "json"},
    ".json": {"path": "json"},
}
"""Suffix -> arguments of `load_dataset`."""
_PATH_COLUMNS = ("image", "img", "file_name", "filename", "file", "path", "image_path", "filepath", "file_path")
"""Names of columns that contain paths of images, if their values are text."""
_ID_COLUMNS = ("image_id", "image_name", "img_id", "id_code", "id")
"""Names of columns of a file that contain names of images without folder or suffix, as in the tables of Kaggle."""
_MAX_LISTED_SPLITS = 10
_METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def is_table(folder: Path, files: Iterable[Path]) -> bool:
    """Return whether a folder, with these files below it, contains tables rather than only images."""
    files = list(files)
    others = list(visible_other_files(folder, files))
    if any(file.name in _METADATA_NAMES or file.name == "dataset_dict.json" for file in others):
        return True
    tables = [file for file in others if file.suffix in TABLE_SUFFIXES]
    has_images = any(
        file.name.lower().endswith(TAR_SUFFIXES) or why_ignored(file.relative_to(folder).as_posix()) is None
        for file in files
    )
    return bool(tables) and not (has_images and all(map(_only_describes_images, tables)))


def _only_describes_images(table: Path) -> bool:
    """Return whether a table has no column that may contain images or their paths, as those of img2dataset."""
    import pyarrow
    from pyarrow import parquet, types

    try:
        schema = parquet.read_schema(table)
    except (OSError, pyarrow.ArrowException):  # also a table of another type
        return False
    is_plain = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return all(
        any(test(field.type) for test in (*is_plain, types.is_null, types.is_temporal))
        and field.name not in _PATH_COLUMNS
        for field in schema
    )


def _metadata_of(folder: Path) -> dict[str, list[Path]]:
    """Return split -> tables that name the images of a folder; nothing if it has other tables or no images."""
    files = list(walk(folder))
    tables = sorted(visible_other_files(folder, files))
    metadata = [file for file in tables if file.name in _METADATA_NAMES]
    has_others = any(file.suffix in TABLE_SUFFIXES and file.name not in _METADATA_NAMES for file in tables)
    has_images = any(why_ignored(file.relative_to(folder).as_posix()) is None for file in files)
    return {} if has_others or not has_images or not metadata else tables_by_split(metadata, folder)


def open_table(config: DataConfig, split: str, class_order: ClassOrder, known: tuple[str, ...] | None) -> Source:
    """Find the images and labels of a dataset with rows and columns."""
    name = name_of_split(split, config.source)
    loaded, whole = load_rows(config, name, class_order)
    column = None if class_order == "text" else _splits_in_column(whole, config)
    if column is None and loaded != name:
        load_table(config, name)  # raises the reason
    dataset = whole if column is not None or split == name else load_table(config, split)
    if len(dataset) == 0:
        raise DataError(f"split {split!r} of {config.source} contains no images.")
    source = source_of_table(dataset, config, class_order=class_order, known=known)
    path = Path(config.source).expanduser()
    if tables := _metadata_of(path) if path.is_dir() else {}:
        source = _with_folders(source, dataset, whole, config, class_order, _Metadata(path, tables, loaded))
    return source if column is None else _in_split(source, *column, split)


class _Metadata(NamedTuple):
    """The tables that name the images of a folder.

    Attributes:
        folder: The folder.
        tables: Split -> tables.
        split: The split that is read.
    """

    folder: Path
    tables: dict[str, list[Path]]
    split: str


def _with_folders(
    source: Source, dataset: "Dataset", whole: "Dataset", config: DataConfig, class_order: ClassOrder, of: _Metadata
) -> Source:
    """Return the source of a folder with metadata, with the class folders if there are no labels in a column."""
    image_column, label_column = find_columns(dataset.features, config)
    listed = [File(file, (), None) for file in _files_of_rows(whole, image_column, of.folder)]
    ignored = _unlisted(of.folder, {file.name for file in listed}, of.tables, of.split)
    source = replace(source, ignored_files=ignored)
    if label_column is not None:
        check_unset(config, ("layout",), f"{config.source}, whose column {label_column!r} contains the labels")
        return source
    if class_order == "text":  # version 0.1 ignored the folders
        return source
    layout = read_layout([file.folders for file in listed], config.source, config.layout, is_archive=False)
    chosen = [File(file, (), None) for file in _files_of_rows(dataset, image_column, of.folder)]
    labels, class_names = class_folders(chosen, listed, layout, class_order)
    problem = source.labels_problem if labels is None else None
    return replace(source, labels=labels, class_names=class_names, layout=str(layout), labels_problem=problem)


_SPLIT_COLUMNS = ("split", "subset", "partition", "set", "usage", "fold")
"""Names of columns that contain the split of each row, if one of their values is train or training."""


def load_rows(
    config: DataConfig, split: str, class_order: ClassOrder, *, is_streaming: bool = False
) -> tuple[str, Any]:
    """Load a split; or the split train, if there is no such split, but a column that may name the split of each row.

    Returns:
        The split, and its rows.
    """
    try:
        return split, load_table(config, split, is_streaming=is_streaming)
    except DataError:
        if split == "train" or class_order == "text":
            raise
        try:
            rows = load_table(config, "train", is_streaming=is_streaming)
        except DataError:
            rows = None
        if rows is None or not columns_of_splits(rows.features, config):
            raise
    return "train", rows


def columns_of_splits(features: "Features | None", config: DataConfig) -> list[str]:
    """Return the columns that may contain the split of each row."""
    others = (config.image_column, config.label_column)
    text = {
        name.lower(): name
        for name, feature in (features or {}).items()
        if getattr(feature, "dtype", "") in ("string", "large_string") and name not in others
    }
    return [text[name] for name in _SPLIT_COLUMNS if name in text]


def is_in_split(value: str | None, split: str) -> bool:
    """Return whether a value of such a column stands for a split."""
    found = (value or "").strip()
    return bool(found) and (found == split or split_of_word(found) == (split_of_word(split) or split))


def _splits_in_column(dataset: "Dataset", config: DataConfig) -> tuple[str, list[str | None]] | None:
    """Return the column that contains the split of each row, and its values; None without one."""
    for name in columns_of_splits(dataset.features, config):
        values = list(dataset.with_format(None)[name])
        if any(is_in_split(value, "train") for value in set(values)):
            return name, values
    return None


def _in_split(source: Source, column: str, values: list[str | None], split: str) -> Source:
    """Return the rows of a source that a column assigns to a split, or a part of them."""
    name = name_of_split(split, source.name)
    counts = Counter("none" if value is None else value for value in values)
    listed = ", ".join(f"{value} ({count:,})" for value, count in counts.most_common(_MAX_LISTED_SPLITS))
    rows = [row for row, value in enumerate(values) if is_in_split(value, name)]
    if not rows:
        raise DataError(f"{source.name} has no split {name!r}; its column {column!r} has {listed}.")
    rows = [rows[row] for row in rows_of_split(split, source.name, len(rows))]
    return replace(
        source,
        fingerprint=f"{source.fingerprint} {split} of {column}",
        num_images=len(rows),
        read=lambda numbers: source.read([rows[number] for number in numbers]),
        labels=None if source.labels is None else source.labels[rows],
        layout="; ".join(filter(None, (source.layout, f"splits in column {column!r}: {listed}"))),
    )


def source_of_table(
    dataset: "Dataset",
    config: DataConfig,
    *,
    class_order: ClassOrder = "numbers",
    known: tuple[str, ...] | None = None,
    is_trusted: bool = False,
) -> Source:
    """Return the images and labels of a loaded dataset.

    Args:
        dataset: The dataset.
        config: Its name for messages, and its columns.
        class_order: As in `find_source`.
        known: As in `find_source`.
        is_trusted: Whether its rows may refer to any image file.
    """
    image_column, label_column = find_columns(dataset.features, config, class_order)
    files = TableFiles(config)
    encoded = as_encoded_column(dataset.select_columns([image_column]), image_column)
    dtype = dtype_of_arrays(dataset.features[image_column])
    if dtype is not None:
        encoded = encoded.with_format(None)
    labels: Labels = None, None
    problem = None
    if class_order == "text" and label_column is not None:  # version 0.1 ignored other columns
        is_integer = str(getattr(dataset.features[label_column], "dtype", "")).startswith(("int", "uint"))
        label_column = label_column if is_integer else None
    if label_column is not None:
        where = f"the labels in column {label_column!r} of {config.source}"
        names = class_names_of(dataset.features, label_column)
        values = dataset.with_format(None)[label_column]
        try:
            labels = encode_labels(list(values), where, class_names=names, known=known, class_order=class_order)
        except DataError as error:
            if config.label_column is not None:
                raise
            problem = f"{str(error)[:-1]}; convert them, or set data.label_column to another column."
    elif others := [name for name in dataset.features if name != image_column]:
        problem = (
            f"{config.source} has no labels, but the network is class-conditional; set data.label_column to one of "
            f"{shortened(others)}, or model.class_conditional to false."
        )

    if is_trusted and (column := _splits_in_column(dataset, config)) is not None:
        logger.warning(
            "The column %r of %s contains splits, but all rows are used; pass those of one split only.",
            column[0], config.source,
        )  # fmt: skip

    def read(rows: Sequence[int]) -> list[EncodedImage]:
        values = zip(rows, encoded[list(rows)][image_column], strict=True)
        return [
            as_encoded_image(
                f"image {row} of {config.source}", config, value, files, is_trusted=is_trusted, dtype=dtype
            )
            for row, value in values
        ]

    identity = "" if dtype is not None else _identity_of_files(encoded, image_column, files)
    return Source(
        name=config.source,
        kind="dataset",
        fingerprint=f"{dataset._fingerprint} {image_column} {label_column} {identity}",
        num_images=len(dataset),
        read=read,
        labels=labels[0],
        class_names=labels[1],
        labels_problem=problem,
    )


def _files_of_rows(dataset: "Dataset", image_column: str, folder: Path) -> list[str]:
    """Return the image file of each row, relative to the folder."""
    root = os.path.abspath(folder)
    chunks = dataset.data.column(image_column).chunks
    return [
        Path(os.path.relpath(path, root)).as_posix() for chunk in chunks for path in chunk.field("path").to_pylist()
    ]


def _unlisted(folder: Path, listed: Collection[str], tables: Mapping[str, list[Path]], split: str) -> tuple[str, ...]:
    """Return the images that the metadata do not list, except beside the metadata of another split."""
    splits = {table.parent.relative_to(folder): name for name, group in tables.items() for table in group}
    names = [file.relative_to(folder) for file in walk(folder)]
    return tuple(
        f"{name.as_posix()} (not in the metadata)"
        for name in sorted(names)
        if why_ignored(name.as_posix()) is None
        and name.as_posix() not in listed
        and next((splits[parent] for parent in name.parents if parent in splits), split) == split
    )


def _identity_of_files(encoded: "Dataset", image_column: str, files: "TableFiles") -> str:
    """Return a digest that changes with the image files that a table refers to."""
    identities = []
    for images in encoded.data.column(image_column).chunks:
        if images.type.get_field_index("path") >= 0:
            paths = images.field("path").filter(images.field("bytes").is_null()).to_pylist()
            identities += [file_identity(files.find(path)[0]) for path in paths if path is not None]
    return hashlib.sha256(json.dumps(identities).encode()).hexdigest()


class TableFiles:
    """The image files that a table refers to by their paths, names or ids, relative to the folder of the table.

    Args:
        config: The table.
    """

    def __init__(self, config: DataConfig) -> None:
        source = Path(config.source).expanduser()
        self._folder = source if source.is_dir() else source.parent
        self._table = source if source.is_file() else None

    def find(self, path: str) -> list[Path]:
        """Return the file of a path; the files that it may stand for if it is a part of their paths without suffix."""
        if "\\" in path and not (self._folder / path).exists():  # written on Windows
            path = path.replace("\\", "/")
        file = Path(os.path.abspath(self._folder / path))
        if self._table is None or file.exists():
            return [file]
        parts = PurePosixPath(path).parts
        found = [
            file
            for file in self._by_name.get(parts[-1] if parts else "", ())
            if file.relative_to(self._folder).parts[-len(parts) : -1] == parts[:-1]
        ]
        in_split = [
            file for file in found if are_of_one_split(self._table.stem, file.relative_to(self._folder).parts[0])
        ]
        found = in_split if len(in_split) == 1 else found
        return [Path(os.path.abspath(file)) for file in found] or [file]

    @functools.cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        """The images below the folder by their names, without suffix, and without leading zeros."""
        names: dict[str, list[Path]] = {}
        for file in walk(self._folder):
            if why_ignored(file.relative_to(self._folder).as_posix()) is None:
                number = file.stem.lstrip("0") or "0"
                for name in {file.name, file.stem, number if number.isdecimal() else file.stem}:
                    names.setdefault(name, []).append(file)
        return names


def load_table(config: DataConfig, split: str, *, is_streaming: bool = False) -> Any:
    """Load one split with the `datasets` library."""
    import datasets

    path = Path(config.source).expanduser()
    if is_streaming or not path.is_dir() or not _metadata_of(path):
        check_unset(config, ("layout",), f"{config.source}, which is no folder or archive of images")
    try:
        is_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        if is_saved and not is_streaming:
            return _load_saved(path, split)
        arguments: dict[str, Any]
        if path.is_dir():
            if is_streaming and idx_of_folder(path, list(walk(path))):
                raise DataError(f"data.streaming does not support idx files such as those of {path}; set it to false.")
            arguments = _tables_of_saved(path) if is_saved else _tables_of_folder(path)
        elif path.is_file():
            suffix = path.suffix.lower()
            if suffix not in (*TABLE_SUFFIXES, *TEXT_TABLES):
                raise DataError(f"data.streaming does not support {path.suffix} files such as {path}; set it to false.")
            arguments = {"path": suffix[1:]} | TEXT_TABLES.get(suffix, {}) | {"data_files": _without_patterns(path)}
            if suffix == ".csv" and _has_semicolons(path):
                arguments["sep"] = ";"
        elif path.suffix[1:].isalpha() or config.source.startswith((".", "~", "/")) or config.source.count("/") > 1:
            raise DataError(
                f"data.source {config.source} does not exist; "
                f"{'patterns are not read, so give the folder' if glob.has_magic(config.source) else 'check the path'} "
                f"(working directory {Path.cwd()})."
            )
        else:
            arguments = {"path": config.source, "name": config.subset, "revision": config.revision}
        with _bars_on_terminals():
            return datasets.load_dataset(**arguments, split=split, streaming=is_streaming)
    except DataError:
        raise
    except Exception as error:  # `datasets` raises many types for unreadable data
        # The message of a DatasetGenerationError contains nothing but "an error occurred".
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = " ".join(str(cause or error).split()) or type(error).__name__
        if isinstance(cause or error, UnicodeDecodeError):
            raise DataError(f"data.source {config.source} is not UTF-8 ({reason}); save the table as UTF-8.") from None
        if "corresponds to no data" in reason:
            raise DataError(f"split {split!r} of {config.source} contains no images.") from None
        if "must be present as dictionary key" in reason and (table := next(path.rglob("metadata.*"), None)):
            raise DataError(
                f"{table} has no column file_name, which names the image of each row; add it, or rename the table."
            ) from None
        if "magic bytes" in reason and any(map(_is_lfs_pointer, [path] if path.is_file() else path.rglob("*.parquet"))):
            raise DataError(
                f"data.source {path} contains a Git LFS pointer instead of a table; run git lfs pull in its repository."
            ) from None
        where = "" if path.exists() else ", which is not a local file or folder,"
        raise DataError(f"data.source {config.source}{where} cannot be opened (split {split!r}): {reason}") from error


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _has_semicolons(path: Path) -> bool:
    """Return whether the columns of a .csv file are separated by semicolons, as where the comma is a decimal point."""
    with path.open("rb") as file:
        header = file.readline(2**16)
    return b";" in header and b"," not in header


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Hide the progress bars of `datasets` where stderr is no terminal."""
    import datasets

    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _load_saved(path: Path, split: str) -> "Dataset":
    """Load a split of a folder that `save_to_disk` wrote."""
    import datasets

    saved = datasets.load_from_disk(os.fspath(path))
    name = name_of_split(split, str(path))
    if isinstance(saved, datasets.DatasetDict):
        if name not in saved:
            raise DataError(f"{path} has no split {name!r}; it has {', '.join(saved)}.")
        saved = saved[name]
    elif name != "train":
        raise no_such_split(path, name)
    saved = saved.with_format(None)  # it may have been saved with some of its columns only
    return saved if split == name else saved.select(rows_of_split(split, str(path), len(saved)))


def _tables_of_saved(path: Path) -> dict[str, Any]:
    """Return the arguments with which `load_dataset` streams a folder that `save_to_disk` wrote."""
    names = path / "dataset_dict.json"
    splits = json.loads(names.read_text())["splits"] if names.is_file() else None
    folders = {"train": path} if splits is None else {split: path / split for split in splits}
    files = {}
    for split, folder in folders.items():
        state = json.loads((folder / "state.json").read_text())
        files[split] = [_without_patterns(folder / file["filename"]) for file in state["_data_files"]]
    return {"path": "arrow", "data_files": files}


def _without_patterns(path: Path) -> str:
    """Return an absolute path in which `datasets` finds no glob patterns."""
    return glob.escape(os.path.abspath(path))


def _tables_of_folder(folder: Path) -> dict[str, Any]:
    """Return the arguments of `load_dataset` for the tables in a folder."""
    # Only the metadata are listed: `datasets` finds the images through them, and would derive splits from image names.
    kind, tables = "imagefolder", _metadata_of(folder)
    if not tables:
        files = list(walk(folder))
        for suffix in TABLE_SUFFIXES:
            chosen = sorted(file for file in visible_other_files(folder, files) if file.suffix == suffix)
            if not chosen:
                continue
            for file in files:
                name = file.relative_to(folder)
                if why_ignored(name.as_posix()) is None and file.is_file():
                    raise DataError(
                        f"{folder} contains images such as {name} and the table {chosen[0].relative_to(folder)}; set "
                        "data.source to the table, or move one of them out of the folder."
                    )
            kind, tables = suffix[1:], tables_by_split(chosen, folder)
            break
    if not tables:
        table = next(file for file in visible_other_files(folder, walk(folder)) if file.name in _METADATA_NAMES)
        raise DataError(f"{folder} has {table.name} but no pictures; set data.source to {table}.")
    data_files = {split: list(map(_without_patterns, group)) for split, group in tables.items()}
    return {"path": kind, "data_files": data_files}


def tables_by_split(tables: list[Path], folder: Path) -> dict[str, list[Path]]:
    """Group tables by split as the Hub does: by "data/SPLIT-00000-of-00001", by folder, or by words in the name."""

    def split_in(name: str) -> str | None:
        words = re.split("[-._ 0-9]", name)
        return next((split for word in words for split, names in SPLIT_NAMES.items() if word in names), None)

    def by_number(table: Path) -> str | None:
        match = re.match(r"data/(\w+)-\d{5}-of-\d{5}", table.relative_to(folder).as_posix())
        return match and match[1]

    def by_folders(table: Path) -> str | None:
        return next(filter(None, map(split_in, table.relative_to(folder).parts[:-1])), None)

    for split_of in (by_number, by_folders, lambda table: split_in(table.name)):
        splits: dict[str | None, list[Path]] = {}
        for table in tables:
            splits.setdefault(split_of(table), []).append(table)
        without = splits.pop(None, [])
        if not splits:
            continue
        if without:
            split, (named, *_) = next(iter(splits.items()))
            raise DataError(
                f"the name of {named.relative_to(folder)} in {folder} says split {split!r}, but "
                f"{without[0].relative_to(folder)} names no split; name all tables after splits, or none of them."
            )
        return {str(split): group for split, group in splits.items()}
    return {"train": tables}


def find_columns(
    features: "Features", config: DataConfig, class_order: ClassOrder = "numbers"
) -> tuple[str, str | None]:
    """Return the image column and the label column, configured or detected."""
    import datasets

    def may_hold_images(feature: Any) -> bool:
        if isinstance(feature, dict):
            return "bytes" in feature and getattr(feature["bytes"], "dtype", "") in ("binary", "large_binary")
        return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")

    def is_text(feature: Any) -> bool:
        return getattr(feature, "dtype", "") in ("string", "large_string")

    def is_id(feature: Any) -> bool:
        is_number = str(getattr(feature, "dtype", "")).startswith(("int", "uint"))
        return is_text(feature) or (is_number and not isinstance(feature, datasets.ClassLabel))

    def holds_arrays(feature: Any) -> bool:
        return dtype_of_arrays(feature) is not None

    columns = shortened(features)
    for setting, column in (("image_column", config.image_column), ("label_column", config.label_column)):
        if column is not None and column not in features:
            raise DataError(f"data.{setting} {column!r} is not a column of {config.source}; it has {columns}.")
    image_column = config.image_column
    if image_column is None:
        found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        found = found or [name for name, feature in features.items() if may_hold_images(feature)]
        found = found or [name for name in _PATH_COLUMNS if is_text(features.get(name))]
        found = found or [name for name, feature in features.items() if holds_arrays(feature)]
        if Path(config.source).expanduser().is_file():
            found = found or [name for name in _ID_COLUMNS if is_id(features.get(name))][:1]
        if not found:
            raise DataError(
                f"{config.source} has no column of images or of their paths among {columns}; set data.image_column to "
                "the column of the paths, relative to the table."
            )
        if len(found) != 1:
            raise DataError(
                f"{config.source} has {len(found)} image columns among {columns}; set data.image_column to one of them."
            )
        image_column = found[0]
    if not any(is_kind(features[image_column]) for is_kind in (may_hold_images, is_id, holds_arrays)):
        raise DataError(
            f"column {image_column!r} of {config.source} contains {features[image_column]}, not images; set "
            "data.image_column to another one."
        )
    label_column = config.label_column
    if label_column is None:
        found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        names = ("label",) if class_order == "text" else ("label", "labels")
        found = found or [name for name in names if name in features][:1]
        label_column = found[0] if len(found) == 1 else None
    return image_column, label_column


def dtype_of_arrays(feature: Any) -> str | None:
    """Return the type of the numbers in a column of arrays with two or three axes; None for any other column."""
    num_axes = len(getattr(feature, "shape", ()))
    while hasattr(feature, "feature"):
        feature, num_axes = feature.feature, num_axes + 1
    dtype = str(getattr(feature, "dtype", ""))
    return dtype if num_axes in (2, 3) and dtype.startswith(("float", "int", "uint", "bool")) else None


def class_names_of(features: "Features", label_column: str) -> tuple[str, ...] | None:
    """Return the class names of a ClassLabel column, None for plain integers."""
    names = getattr(features[label_column], "names", None)
    return tuple(names) if names else None


def as_encoded_column(dataset: Any, column: str) -> Any:
    """Return a table, or a stream of one, whose images are not decoded and whose paths are those of images."""
    import datasets

    feature = dataset.features[column]
    if isinstance(feature, dict) or dtype_of_arrays(feature) is not None:
        return dataset
    if str(getattr(feature, "dtype", "")).startswith(("int", "uint")):  # ids
        dataset = dataset.cast_column(column, datasets.Value("string"))
    return dataset.cast_column(column, datasets.Image(decode=False))


def as_encoded_image(
    name: str,
    config: DataConfig,
    value: Any,
    files: TableFiles,
    *,
    is_trusted: bool = False,
    dtype: str | None = None,
) -> EncodedImage:
    """Return the image of a row, an array or a path in it, with its file name, if it has one.

    Files are read only beside the dataset and in the caches of `datasets` and the Hub. Otherwise, a downloaded table
    could make a network learn any image file of this machine.
    """
    if dtype is not None and value is not None:
        try:
            return image_of_array(np.asarray(value, dtype), name, config.num_channels)
        except ValueError as error:  # rows of different lengths, or None among the numbers
            return EncodedImage(name, None, str(error))
    content, file = (None, None) if value is None else (value.get("bytes"), value.get("path"))
    if file:
        name += f" ({Path(file).name})"
    if content is not None or not file:
        return EncodedImage(name, content)
    if file.startswith(("http://", "https://")):
        return EncodedImage(name, None, "it is on the web; download the images, and give their paths")
    path, *others = files.find(file)
    if others:
        return EncodedImage(name, None, f"it may be {path} or {others[0]}; give paths with folder and suffix")
    if not is_trusted and not any(path.is_relative_to(folder) for folder in _allowed_folders(config)):
        return EncodedImage(name, None, f"it is {path}, outside of the dataset; give paths relative to the table")
    if not path.suffix and not path.exists():  # an id, as in the tables of Kaggle
        return EncodedImage(name, None, f"{path} does not exist; give paths with folder and suffix, such as a/1.png")
    return EncodedImage(name, path)


def _allowed_folders(config: DataConfig) -> list[str]:
    """Return the folders in which the image files of a table may be."""
    import datasets
    from huggingface_hub import constants

    source = Path(config.source).expanduser()
    if source.exists():
        return [os.path.abspath(source if source.is_dir() else source.parent)]
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    return [os.path.abspath(folder) for folder in caches]
