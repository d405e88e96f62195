"""A folder, archive, table or array as a `Source` of encoded images.

What every kind of data set looks like to the rest: numbered images that can be read, and labels.

Image files in a folder, a zip or a tar: found by name, sorted, labelled by the folders they lie in.

Data sets that the `datasets` library opens: of the Hub, parquet and arrow files, folders with metadata.

NumPy arrays of images: a .npy file that needs nothing done to it is read where it lies.

Opens a data set by its name or path, whatever it is, decoded once to a memory-mapped cache.
"""

import glob
import hashlib
import json
import lzma
import os
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_hf.config import DataConfig
from ddpm_hf.data.decode import MODE_OF_CHANNELS, Cell, DataError, Geometry, num_threads
from ddpm_hf.data.image_set import ImageSet

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset


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


IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".j2k", ".ppm",
    ".pgm", ".pbm", ".pnm", ".tga", ".ico",
)  # fmt: skip
ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
SPLIT_NAMES = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
"""Split -> what folders and tables of it are called, as `datasets` and the Hub have it."""
_LARGEST_FILE = 2**30  # a larger one inside an archive is no image, but may be a bomb
# So may one that is packed to less than a hundredth, where it is large enough to matter; tiny raw images are, too.
_LARGEST_PACKING, _HARMLESS_SIZE = 100, 2**24
_LARGEST_TAR_HEADER = 2**20
_TAR_HEADERS_WITH_CONTENT = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


@dataclass(frozen=True)
class _File:
    """A file in a folder or an archive.

    Args:
        name: Path inside it, with forward slashes.
        identity: What changes when the file does.
        place: How to get at it.
    """

    name: str
    identity: Sequence[int]
    place: Path | zipfile.ZipInfo | tarfile.TarInfo


class _TarMember(tarfile.TarInfo):
    """A member of a tar file, whose names and notes are read into memory only if they are as short as names are."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_TarMember":
        member = super().frombuf(buf, encoding, errors)
        if member.type in _TAR_HEADERS_WITH_CONTENT and member.size > _LARGEST_TAR_HEADER:
            raise tarfile.ReadError(f"one of its headers has {member.size:,} bytes")
        return member


def open_folder(path: Path, split: str) -> Source:
    """Finds the images of a folder; class folders in it become labels.

    Raises:
        DataError: If there are none, or the split is not there.
    """
    files = [_File(place.relative_to(path).as_posix(), identity_of(place), place) for place in walk(path)]
    return _source(path, "folder", sorted(files, key=lambda file: file.name), split, _read_files)


def open_zip(path: Path, split: str) -> Source:
    """Finds the images of a zip file, which is not unpacked.

    Raises:
        DataError: If there are none, or the file is damaged or encrypted.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as a zip file ({error}).") from None
    # Some programs of Windows write names with backslashes.
    members = [(member.filename.replace("\\", "/"), member) for member in archive.infolist()]
    members = [(name, member) for name, member in members if not name.endswith("/")]
    if any(member.flag_bits & 1 for _, member in members):
        raise DataError(f"{path} is encrypted; unpack it and give the folder.")
    files = [_File(name, (member.file_size, member.CRC), member) for name, member in members]

    def read(name: str, file: _File) -> Cell:
        assert isinstance(file.place, zipfile.ZipInfo)
        if _is_bomb(file.place.file_size, file.place.file_size, file.place.compress_size):
            return Cell(name, None, f"it would unpack to {file.place.file_size:,} bytes")
        try:
            return Cell(name, archive.read(file.place))
        except Exception as error:  # a damaged archive raises whatever its decompressor does
            return Cell(name, None, f"{type(error).__name__}: {error}")

    return _source(path, "zip", sorted(files, key=lambda file: file.name), split, read)


def open_tar(path: Path, split: str) -> Source:
    """Finds the images of a tar file, compressed or not, in the order in which they lie in it.

    Raises:
        DataError: If there are none, or the file is damaged.
    """
    try:
        archive = tarfile.open(path, tarinfo=_TarMember)
        members = archive.getmembers()
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        is_whole = bool(archive.fileobj.read(1))  # a tar ends with empty blocks
    except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        raise DataError(f"{path} cannot be read as a tar file ({' '.join(str(error).split())}).") from None
    if not is_whole:
        raise DataError(f"{path} cannot be read as a tar file (its end is missing).")
    status = path.stat()
    unpacked = sum(member.size for member in members)
    whole = (status.st_size, status.st_mtime_ns)
    contents = _follow_hard_links(members)
    files = [_File(name, (content.size, *whole), content) for name, content in contents]
    others = [f"{_plain(member.name)} (a link or a device)" for member in members if not _is_file_or_folder(member)]

    def read(name: str, file: _File) -> Cell:
        assert isinstance(file.place, tarfile.TarInfo)
        if _is_bomb(file.place.size, unpacked, status.st_size):
            return Cell(name, None, f"it would unpack to {file.place.size:,} bytes")
        try:
            content = archive.extractfile(file.place)
            return Cell(name, content.read() if content else None)
        except Exception as error:  # a damaged archive raises whatever its decompressor does
            return Cell(name, None, f"{type(error).__name__}: {error}")

    return _source(path, "tar", files, split, read, others)


def _follow_hard_links(members: list[tarfile.TarInfo]) -> list[tuple[str, tarfile.TarInfo]]:
    """Returns the name of every file in a tar with the member that has its content.

    A hard link has that of an earlier member; one without is left as it is, and a bad image when it is read.
    """
    contents: dict[str, tarfile.TarInfo] = {}
    files = []
    for member in members:
        if member.isfile() or member.islnk():
            content = contents.get(_plain(member.linkname), member) if member.islnk() else member
            contents[_plain(member.name)] = content
            files.append((_plain(member.name), content))
    return files


def _is_file_or_folder(member: tarfile.TarInfo) -> bool:
    """Tells whether a member of a tar has a content or holds others; what links lead to may lie anywhere."""
    return member.isfile() or member.islnk() or member.isdir()


def _plain(name: str) -> str:
    """Returns a name in a tar without the folder in which it was packed."""
    return name.removeprefix("./")


def _is_bomb(size: int, unpacked: int, packed: int) -> bool:
    """Tells whether a file would take far more memory than an image or than its archive lets expect.

    Args:
        size: Bytes of the file.
        unpacked: Bytes of what is packed together with it, itself included.
        packed: To how many bytes that is packed.
    """
    return size > _LARGEST_FILE or (size > _HARMLESS_SIZE and unpacked > _LARGEST_PACKING * packed)


def _read_files(name: str, file: _File) -> Cell:
    """Returns the cell of a file in a folder, which is opened when it is decoded."""
    assert isinstance(file.place, Path)
    return Cell(name, file.place)


def walk(root: Path) -> Iterator[Path]:
    """Yields every file below a folder, through links but never in a circle.

    Raises:
        DataError: If a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}).")

    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        subfolders.sort()  # of several links to a folder the first is followed, on every disk
        if os.path.realpath(folder) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        yield from (Path(folder, name) for name in names)


def _source(
    path: Path,
    kind: str,
    files: list[_File],
    split: str,
    read: Callable[[str, _File], Cell],
    others: Sequence[str] = (),
) -> Source:
    """Makes a source of the files that are images by their names; others are what an archive has beside files."""
    reasons = [why_left_out(file.name) for file in files]
    images = [file for file, reason in zip(files, reasons, strict=True) if reason is None]
    left_out = (*filter(None, reasons), *others)
    depth = 0 if kind == "folder" else _depth_of_root([file.name for file in images])
    inside, depth = _choose_split(images, depth, name_of_split(split, str(path)), path)
    if not inside:
        found = f"{len(left_out):,} other files, the first of them {left_out[0]}" if left_out else "nothing"
        found = f"1 other file, {left_out[0]}" if len(left_out) == 1 else found
        raise DataError(f"{path} holds no images (split {split!r}), but {found}; images end in .png, .jpg and so on.")
    chosen = [inside[row] for row in rows_of_split(split, str(path), len(inside))]
    labels, class_names = _classes([file.name for file in chosen], [file.name for file in images], depth)
    identities = [[file.name, *file.identity] for file in chosen]
    return Source(
        name=str(path),
        kind=kind,
        fingerprint=hashlib.sha256(json.dumps(identities).encode()).hexdigest(),
        num_images=len(chosen),
        read=lambda rows: (read(f"image {row} of {path} ({chosen[row].name})", chosen[row]) for row in rows),
        labels=labels,
        class_names=class_names,
        left_out=left_out,
    )


def why_left_out(name: str) -> str | None:
    """Returns what is said of a file that is not read: None of an image, nothing of what systems leave behind."""
    parts = PurePosixPath(name).parts
    is_image = name.lower().endswith(IMAGE_SUFFIXES)
    if "__MACOSX" in parts or parts[-1].startswith("._"):  # of macOS, called like images but none
        return ""
    if ".." in parts:
        return f"{name} (outside of the archive)"
    if any(part.startswith(".") for part in parts):
        return f"{name} (hidden)" if is_image else ""
    return None if is_image else name


def _depth_of_root(names: Sequence[str]) -> int:
    """Returns how many folders lie around everything in an archive; the last of several may be classes."""
    folders = {PurePosixPath(name).parts[:-1] for name in names}
    depth = 0
    while len({folder[depth : depth + 1] for folder in folders}) == 1 and all(len(f) > depth for f in folders):
        depth += 1
    return depth - (len(folders) == 1 and depth > 1)


def _choose_split(images: list[_File], depth: int, wanted: str, path: Path) -> tuple[list[_File], int]:
    """Descends into the folder of a split where all folders are named after splits."""
    tops = {PurePosixPath(file.name).parts[depth] for file in images if len(PurePosixPath(file.name).parts) > depth + 1}
    is_split = {name: key for key, names in SPLIT_NAMES.items() for name in names}
    if not tops or any(name.lower() not in is_split for name in tops):
        if wanted != "train":
            raise DataError(f"{path} has no split {wanted!r}, only 'train' and parts of it such as 'train[:90%]'.")
        return images, depth
    chosen = {name for name in tops if wanted == name or is_split[name.lower()] == wanted}
    if not chosen:
        raise DataError(f"{path} has no split {wanted!r}; its folders are {', '.join(sorted(tops))}.")
    inside = [file for file in images if PurePosixPath(file.name).parts[depth] in chosen]
    return inside, depth + 1


def _classes(
    names: Sequence[str], all_names: Sequence[str], depth: int
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Labels files by the first folder they lie in, if any does; all splits together decide which classes there are."""

    def class_of(name: str) -> str | None:
        parts = PurePosixPath(name).parts
        return parts[depth] if len(parts) > depth + 1 else None

    class_names = tuple(sorted({name for name in map(class_of, all_names) if name is not None}))
    if not class_names:
        return None, None
    numbers = {name: number for number, name in enumerate(class_names)}
    found = [class_of(name) for name in names]
    return np.asarray([NO_LABEL if name is None else numbers[name] for name in found], np.int64), class_names


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


_LAYOUT = "(number, height, width, channels) with 1, 3 or 4 channels, or as many as data.num_channels says"
_BYTES_HASHED_AT_ONCE = 2**24


def open_array(path: Path, config: DataConfig, split: str) -> ImageSet | Source:
    """Opens uint8 or uint16 images (number, height, width, channels) from .npy, or with labels from .npz.

    Returns:
        The images themselves if they need no transform, otherwise where to find them.

    Raises:
        DataError: If the file holds no images.
    """
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = {"images": content} if isinstance(content, np.ndarray) else _unpack(content)
    except Exception as error:  # a damaged file raises whatever its decompressor and the reader of its header do
        raise DataError(f"{path} cannot be read as a NumPy array ({' '.join(str(error).split())}).") from None
    images, labels = _find_images(arrays, path, config), _find_labels(arrays, path, config)
    if len(images) == 0:
        raise DataError(f"{path} holds no images.")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise DataError(f"{path}: labels are {labels.dtype} {labels.shape}; they must be {len(images)} integers.")
    if (wanted := name_of_split(split, str(path))) != "train":
        raise DataError(f"{path} has no split {wanted!r}, only 'train' and parts of it such as 'train[:90%]'.")
    rows = rows_of_split(split, str(path), len(images))
    labels = None if labels is None else valid_labels(labels, str(path))
    names = None if labels is None else numbers_as_names(labels)
    labels = None if labels is None else labels[rows]
    if path.suffix == ".npy" and isinstance(rows, range) and not _needs_transform(images, config):
        images = images[rows.start : rows.stop]
        geometry = Geometry.of(config)
        crop = geometry.size if geometry.is_random_crop and geometry.size != images.shape[1:3] else None
        digest = _digest(images, str(path))
        return ImageSet(images.transpose(0, 3, 1, 2), labels, names, np.arange(len(images)), crop, digest=digest)

    def read(numbers: Sequence[int]) -> list[Cell]:
        native = images.dtype.newbyteorder("=")
        return [
            Cell(f"image {number} of {path}", images[rows[number]].astype(native, copy=False)) for number in numbers
        ]

    fingerprint = f"{identity_of(path)} {config.image_column} {rows} {images.dtype} {images.shape}"
    return Source(str(path), path.suffix[1:], fingerprint, len(rows), read, labels, names)


def _unpack(archive: Any) -> dict[str, NDArray[Any]]:
    """Reads the arrays of a .npz file, unless they cannot fit into the memory of this machine."""
    size = sum(member.file_size for member in archive.zip.infolist())
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise MemoryError(f"it would unpack to {size:,} bytes, more than this machine has memory")
    return dict(archive)


def _find_images(arrays: dict[str, NDArray[Any]], path: Path, config: DataConfig) -> NDArray[np.integer]:
    """Returns the images, with channels."""
    name = config.image_column
    if name is None:
        found = [name for name, array in arrays.items() if array.ndim >= 3 and array.dtype.kind in "iuf"]
        name = "images" if "images" in arrays or len(found) != 1 else found[0]
    if name not in arrays:
        setting = f"data.image_column {name!r} is" if config.image_column else "images is"
        raise DataError(
            f"{setting} not among the arrays of {path}, which are {', '.join(arrays) or 'none'}; name one with "
            "data.image_column."
        )
    images = arrays[name]
    if images.ndim == 3:
        images = images[..., None]
    is_readable = images.dtype.name in ("uint8", "uint16") and images.ndim == 4
    if not is_readable or images.shape[-1] not in (*MODE_OF_CHANNELS, config.num_channels):
        raise DataError(f"{path} holds {images.dtype} {images.shape}; it must be uint8 or uint16 {_LAYOUT}.")
    return images


def _find_labels(arrays: dict[str, NDArray[Any]], path: Path, config: DataConfig) -> NDArray[Any] | None:
    """Returns the labels, if there are any."""
    if config.label_column is not None and config.label_column not in arrays:
        raise DataError(
            f"data.label_column {config.label_column!r} is not among the arrays of {path}, which are "
            f"{', '.join(arrays)}."
        )
    return arrays.get(config.label_column or "labels")


def _needs_transform(images: NDArray[np.integer], config: DataConfig) -> bool:
    """Tells whether images must be cut, resized or given other channels or bytes before they are used."""
    _, height, width, channels = images.shape
    keeps_size = Geometry.of(config).size_after(width, height, "each image") == (height, width)
    return (
        not keeps_size
        or not images.dtype.isnative
        or config.crop_before_resize is not None
        or config.num_channels not in (None, channels)
    )


def _digest(images: NDArray[np.integer], name: str) -> str:
    """Tells arrays apart by all of their pixels, hashed by as many threads as there are cores; a .npy has no labels."""
    num_rows = max(1, _BYTES_HASHED_AT_ONCE // max(1, images[0].nbytes))
    starts = range(0, len(images), num_rows)
    part = lambda start: hashlib.sha256(np.ascontiguousarray(images[start : start + num_rows]).data).digest()  # noqa: E731
    digest = hashlib.sha256(f"{images.shape} {images.dtype}".encode())
    with ThreadPoolExecutor(num_threads()) as pool:
        # Said only where it takes longer than a moment.
        bar = tqdm(pool.map(part, starts), f"Hashing {name}", len(starts), delay=1.0, disable=None, leave=False)
        for part_digest in bar:
            digest.update(part_digest)
    return digest.hexdigest()[:32]


_FILES = ".parquet, .arrow, .zip, .tar, .npz or .npy file"


def find_source(config: DataConfig, split: str) -> Source | ImageSet:
    """Finds a data set without decoding it; arrays that are ready to be used are opened.

    Raises:
        DataError: If there is none, or it has no such split.
    """
    path = Path(config.source).expanduser()
    name = path.name.lower()
    if not path.exists():
        return open_table(config, split)
    refuse_settings(config, ("subset", "revision"), f"{path}, which is no data set of the Hub")
    if (path.is_dir() and is_table(path)) or name.endswith((".parquet", ".arrow")):
        return open_table(config, split)
    if name.endswith((".npz", ".npy")):
        return open_array(path, config, split)
    for opens, is_its_kind in (
        (open_folder, path.is_dir()),
        (open_zip, name.endswith(ZIP_SUFFIXES)),
        (open_tar, name.endswith(TAR_SUFFIXES)),
    ):
        if is_its_kind:
            refuse_settings(config, ("image_column", "label_column"), f"{path}, which has folders instead of columns")
            return opens(path, split)
    raise DataError(f"data.source {path} is a {path.suffix or 'nameless'} file; give a {_FILES}, or a folder.")
