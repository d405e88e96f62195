"""Find the images and labels of a folder, archive, table or array.

`find_source` returns a `Source` of encoded images. Only a .npy file that needs no preprocessing is opened directly, as
an `ImageSet`. Data and settings that cannot be used raise a `DataError`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ddpm_hf.config import DataConfig
from ddpm_hf.data.arrays import (
    find_images,
    idx_and_labels,
    image_set_of_array,
    is_idx,
    needs_preprocessing,
    read_arrays,
    read_idx,
    splits_of_arrays,
)
from ddpm_hf.data.decode import DataError, EncodedImage, as_native
from ddpm_hf.data.folders import (
    IMAGE_SUFFIXES,
    TAR_SUFFIXES,
    ZIP_SUFFIXES,
    Source,
    check_unset,
    file_identity,
    idx_of_folder,
    name_of_split,
    no_such_split,
    open_folder,
    open_tar,
    open_zip,
    rows_of_split,
    visible_other_files,
    walk,
    why_ignored,
)
from ddpm_hf.data.image_set import ImageSet
from ddpm_hf.data.labels import NO_LABEL, ClassOrder, encode_labels
from ddpm_hf.data.layout import split_of_word
from ddpm_hf.data.tables import TABLE_SUFFIXES, TEXT_TABLES, is_table, open_table, tables_by_split


def find_source(
    config: DataConfig, split: str, class_order: ClassOrder = "numbers", known: tuple[str, ...] | None = None
) -> Source | ImageSet:
    """Find one split of a dataset.

    Args:
        config: The dataset.
        split: The split, or a part of it.
        class_order: How classes are numbered, "text" for a run or pipeline of version 0.1.
        known: Names of the classes in another split or of a network, whose numbers are kept if they contain all.

    Returns:
        The encoded images, or the images themselves if they are a .npy file that needs no preprocessing.
    """
    files = find_files(config, split, class_order, known)
    if files is not None:
        return files
    path = Path(config.source).expanduser()
    name = path.name.lower()
    if is_idx(name) and path.is_file():
        return _open_array(path, config, split, class_order, known, idx_and_labels(path))
    if path.is_dir() and (idx := idx_of_folder(path, list(walk(path)))):
        return _open_array(path, config, split, class_order, known, idx)
    if path.is_dir() or not path.exists() or name.endswith((*TABLE_SUFFIXES, *TEXT_TABLES)):
        return open_table(config, split, class_order, known)
    if name.endswith((".npz", ".npy")):
        return _open_array(path, config, split, class_order, known)
    if name.endswith(IMAGE_SUFFIXES):
        raise DataError(f"data.source {path} is a single image; set it to the folder of the images.")
    raise DataError(
        f"data.source {path} has an unsupported type ({path.suffix or 'no suffix'}); use a folder or a .parquet, "
        ".arrow, .csv, .tsv, .json, .jsonl, .zip, .tar, .npz, .npy or idx file."
    )


def find_files(
    config: DataConfig, split: str, class_order: ClassOrder = "numbers", known: tuple[str, ...] | None = None
) -> Source | None:
    """Find the images of a local folder or archive; return None for a folder of tables or idx files, and for others."""
    if not config.source:  # a path of no name is the working directory
        raise DataError("data.source is not set; give an image folder, a parquet file or a Hub dataset id.")
    path = Path(config.source).expanduser()
    name, columns = path.name.lower(), (config.image_column, config.label_column)
    if path.exists():
        check_unset(config, ("subset", "revision"), f"{path}, which is not a Hub dataset")
    if path.is_file() and name.endswith((*ZIP_SUFFIXES, *TAR_SUFFIXES)):
        if name.endswith(ZIP_SUFFIXES):
            _check_no_columns(config, path)
            source = open_zip(path, split, config.layout, class_order)
        else:
            source = open_tar(path, split, config.layout, class_order, None, *columns)
        return _with_known_classes(source, known)
    if not path.is_dir():
        return None
    files = list(walk(path))
    if is_table(path, files) or idx_of_folder(path, files):
        return None
    shards = _shards(path, files)
    if shards is not None:
        name = name_of_split(split, config.source)
        found = name if name in shards else split_of_word(name)
        if found not in shards:
            raise DataError(f"{path} has no split {name!r}; its shards are those of {', '.join(shards)}.")
        split = split.replace(name, "train")
        source = open_tar(path, split, config.layout, class_order, shards[found], *columns)
        return _with_known_classes(source, known)
    _check_no_columns(config, path)
    return _with_known_classes(open_folder(path, split, config.layout, class_order, files), known)


def _with_known_classes(source: Source, known: tuple[str, ...] | None) -> Source:
    """Number the classes of a folder or an archive as they are in another split or a network, if it has all of them."""
    if (
        known is None
        or source.labels is None
        or source.class_names is None
        or not set(source.class_names) <= set(known)
    ):
        return source
    numbers = np.asarray([*map(known.index, source.class_names), NO_LABEL], np.int64)  # NO_LABEL is the last row
    return replace(source, labels=numbers[source.labels], class_names=known)


def _shards(folder: Path, files: Iterable[Path]) -> dict[str, list[Path]] | None:
    """Return split -> tar files of a folder, with these files below it, that contains no other images."""
    shards = [file for file in visible_other_files(folder, files) if file.name.lower().endswith(TAR_SUFFIXES)]
    has_images = any(why_ignored(file.relative_to(folder).as_posix()) is None for file in files)
    return tables_by_split(sorted(shards), folder) if shards and not has_images else None


def _check_no_columns(config: DataConfig, path: Path) -> None:
    check_unset(config, ("image_column", "label_column"), f"{path}, which has class folders instead of columns")


def _open_array(
    path: Path,
    config: DataConfig,
    split: str,
    class_order: ClassOrder,
    known: tuple[str, ...] | None,
    idx: Mapping[str, Path] | None = None,
) -> ImageSet | Source:
    """Open the images of a .npy file, or images and labels of an .npz file or of idx files, by the names of arrays."""
    check_unset(config, ("layout",), f"{path}, which is no folder or archive of images")
    arrays = read_arrays(path) if idx is None else {name: read_idx(file) for name, file in idx.items()}
    wanted = name_of_split(split, str(path))
    splits = {} if config.image_column or "images" in arrays else splits_of_arrays(arrays)
    if splits:
        if (parts := splits.get(split_of_word(wanted) or wanted)) is None:
            raise DataError(f"{path} has no split {wanted!r}; it has {', '.join(splits)}.")
        arrays = {name: arrays[part] for name, part in parts.items()} | arrays
    elif wanted != "train":
        raise no_such_split(path, wanted)
    images = find_images(arrays, str(path), config)
    if config.label_column is not None and config.label_column not in arrays:
        raise DataError(
            f"data.label_column {config.label_column!r} is not an array of {path}, which contains {', '.join(arrays)}."
        )
    # arr_1 is the second array of numpy.savez, as in the samples of guided-diffusion; version 0.1 ignored others.
    names = ("labels",) if class_order == "text" else ("labels", "label", "y", "arr_1")
    labels = next((arrays[name] for name in names if name in arrays), None)
    labels = labels if config.label_column is None else arrays[config.label_column]
    if len(images) == 0:
        raise DataError(f"{path} contains no images.")
    if labels is not None and len(labels) != len(images):
        raise DataError(f"{path} has {len(images)} images, but {len(labels)} labels; save one label for each image.")
    rows = rows_of_split(split, str(path), len(images))
    class_names, problem = None, None
    if labels is not None:
        try:
            labels, class_names = encode_labels(labels, f"the labels of {path}", known=known, class_order=class_order)
        except DataError as error:
            if config.label_column is not None:
                raise
            labels, problem = None, f"{str(error)[:-1]}; convert them, or set data.label_column to another column."
    labels = None if labels is None else labels[rows]
    if path.suffix == ".npy" and isinstance(rows, range) and not needs_preprocessing(images, config):
        place = {"array": os.path.abspath(path), "file_identity": list(file_identity(path))}
        place["rows"] = [rows.start, rows.stop]
        if (mapped := image_set_of_array(images[rows.start : rows.stop], str(path), config, place)) is not None:
            return mapped

    def read(numbers: Sequence[int]) -> list[EncodedImage]:
        return [EncodedImage(f"image {number} of {path}", as_native(images[rows[number]])) for number in numbers]

    identity = file_identity(path) if idx is None else [file_identity(file) for file in idx.values()]
    fingerprint = f"{identity} {config.image_column} {rows} {images.dtype} {images.shape}"
    fingerprint += f" {wanted}" if splits else ""
    kind = path.suffix[1:] if idx is None else "idx"
    source = Source(str(path), kind, fingerprint, len(rows), read, labels, class_names)
    return replace(source, labels_problem=problem)
