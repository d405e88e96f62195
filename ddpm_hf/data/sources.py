"""Find the images and labels of a folder, archive, table or array.

`find_source` returns a `Source`: numbered encoded images that can be read in order, their labels, and a fingerprint
that changes with the data. Only a .npy file that needs no preprocessing is opened directly, as an `ImageSet`.

Data and settings that cannot be used raise a `DataError`.
"""

import functools
import glob
import hashlib
import json
import logging
import lzma
import os
import re
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.config import DataConfig
from ddpm_hf.data.arrays import (
    find_idx,
    find_images,
    idx_and_labels,
    image_set_of_array,
    is_idx,
    needs_preprocessing,
    read_arrays,
    read_idx,
    splits_of_arrays,
)
from ddpm_hf.data.decode import (
    LFS_POINTER,
    BadImage,
    DataError,
    EncodedImage,
    Header,
    as_native,
    image_of_array,
    is_dicom_image,
)
from ddpm_hf.data.image_set import ImageSet
from ddpm_hf.data.labels import NO_LABEL, ClassOrder, Labels, encode_labels, sort_classes
from ddpm_hf.data.layout import (
    SPLIT_NAMES,
    Kind,
    Layout,
    are_of_one_kind,
    are_of_one_split,
    read_layout,
    split_of_word,
)
from ddpm_hf.files import format_count

if TYPE_CHECKING:
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A dataset that has been found, but not decoded.

    Args:
        name: `data.source`.
        kind: "folder", "zip", "tar", "dataset", "npy", "npz", "idx" or "memory", for messages.
        fingerprint: Changes when the data change.
        num_images: Number of images in the split.
        read: Return the encoded images of rows given in ascending order. Archives decompress one image at a time.
        labels: int64 (number,), or None.
        class_names: Names of the classes, or None.
        ignored_files: Names of files that are not read as images, with the reason.
        layout: What the folders mean, for messages; "" without folders.
        archive_starts: First row of each tar archive of several that are one dataset; 0 for any other source.
        labels_problem: Why a class-conditional network cannot be trained with the labels that were found, and the fix.
        labels_doubt: Why the classes may be others.
        headers: The header of each image, or the error of a bad one, if all images have already been read.
    """

    name: str
    kind: str
    fingerprint: str
    num_images: int
    read: Callable[[Sequence[int]], Iterable[EncodedImage]]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    ignored_files: tuple[str, ...] = ()
    layout: str = ""
    archive_starts: tuple[int, ...] = (0,)
    labels_problem: str | None = None
    labels_doubt: str = ""
    headers: Sequence[Header | BadImage] | None = None


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
    if path.is_dir() and (idx := _idx_of_folder(path, list(_walk(path)))):
        return _open_array(path, config, split, class_order, known, idx)
    if path.is_dir() or not path.exists() or name.endswith((*_TABLE_SUFFIXES, *TEXT_TABLES)):
        return _open_table(config, split, class_order, known)
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
        _check_unset(config, ("subset", "revision"), f"{path}, which is not a Hub dataset")
    if path.is_file() and name.endswith((*ZIP_SUFFIXES, *TAR_SUFFIXES)):
        if name.endswith(ZIP_SUFFIXES):
            _check_no_columns(config, path)
            source = open_zip(path, split, config.layout, class_order)
        else:
            source = open_tar(path, split, config.layout, class_order, None, *columns)
        return _with_known_classes(source, known)
    if not path.is_dir():
        return None
    files = list(_walk(path))
    if _is_table(path, files) or _idx_of_folder(path, files):
        return None
    shards = _shards(path, files)
    if shards is not None:
        name = _name_of_split(split, config.source)
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
    shards = [file for file in _visible_other_files(folder, files) if file.name.lower().endswith(TAR_SUFFIXES)]
    has_images = any(_why_ignored(file.relative_to(folder).as_posix()) is None for file in files)
    return _tables_by_split(sorted(shards), folder) if shards and not has_images else None


def _check_no_columns(config: DataConfig, path: Path) -> None:
    _check_unset(config, ("image_column", "label_column"), f"{path}, which has class folders instead of columns")


def _check_unset(config: DataConfig, settings: tuple[str, ...], where: str) -> None:
    for setting in settings:
        if getattr(config, setting) is not None:
            raise DataError(f"data.{setting} does not apply to {where}; remove the setting.")


def log_ignored_files(source: Source) -> None:
    """Warn about files that are not read as images."""
    logger.warning(
        "%s ignored in %s (not an image, hidden, a link, in no split or table). The first: %s",
        format_count(len(source.ignored_files), "file"), source.name, source.ignored_files[0],
    )  # fmt: skip


def file_identity(path: Path) -> tuple[int, int]:
    """Return size and modification time of a file; zeros if it is unreachable, which is noticed when it is read."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


# ------------------------------------------------------------------------------------------------- splits and labels


def _name_of_split(split: str, source: str) -> str:
    """Return the split that a part such as "train[:90%]", or a sum of parts, belongs to."""
    names = list(dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")))
    if len(names) > 1:
        raise DataError(f"split {split!r} of {source} combines {' and '.join(names)}; use parts of one split.")
    return names[0]


def _rows_of_split(split: str, source: str, num_images: int) -> Sequence[int]:
    """Return the rows of a part such as "train[:90%]" or "train[:3]+train[5:9]" of a split with `num_images` images."""
    name = _name_of_split(split, source)
    if split == name:
        return range(num_images)
    import datasets

    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: num_images})
    except (ValueError, AssertionError) as error:
        raise DataError(f"split {split!r} of {source} is invalid ({' '.join(str(error).split())}).") from None
    ranges = [range(part.from_ or 0, num_images if part.to is None else part.to) for part in parts]
    rows = ranges[0] if len(ranges) == 1 else [row for rows in ranges for row in rows]
    if not rows:
        raise DataError(f"split {split!r} of {source} is empty; {name!r} has {num_images:,} images.")
    return rows


# ---------------------------------------------------------------------------------------------- folders and archives

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic",
    ".heif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".ico", ".dcm", ".dicom",
)  # fmt: skip
ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# Limits against decompression bombs. The ratio applies only to files above _HARMLESS_SIZE, because raw images of one
# color compress well.
_MAX_MEMBER_SIZE, _HARMLESS_SIZE, _MAX_COMPRESSION_RATIO = 2**30, 2**24, 100
_MAX_TAR_HEADER_SIZE = 2**20
_TAR_HEADERS_WITH_CONTENT = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


@dataclass(frozen=True)
class _File:
    """A file in a folder or an archive, named by its path inside of it, with forward slashes."""

    name: str
    identity: Sequence[int]  # changes when the file does; part of the fingerprint
    handle: Any  # its path or archive member

    @functools.cached_property
    def folders(self) -> tuple[str, ...]:
        """The folders that contain it, outermost first."""
        return PurePosixPath(self.name).parts[:-1]


def open_folder(
    path: Path,
    split: str,
    layout: Kind | None = None,
    class_order: ClassOrder = "numbers",
    files: Iterable[Path] | None = None,
) -> Source:
    """Find the images of a folder; class folders become labels.

    Args:
        path: The folder.
        split: The split, or a part of it.
        layout: data.layout.
        files: All files below the folder, if the caller has already walked it.
        class_order: As in `find_source`.
    """
    found = [
        _File(file.relative_to(path).as_posix(), file_identity(file), file)
        for file in (_walk(path) if files is None else files)
    ]
    found.sort(key=lambda file: file.name)

    def read(name: str, file: _File) -> EncodedImage:
        return EncodedImage(name, file.handle)

    return _source_of_files(path, "folder", found, split, layout, class_order, read)


def open_zip(path: Path, split: str, layout: Kind | None = None, class_order: ClassOrder = "numbers") -> Source:
    """Find the images of a zip file, without unpacking it."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as a zip file ({error}).") from None
    # Some Windows programs write names with backslashes.
    members = ((member.filename.replace("\\", "/"), member) for member in archive.infolist())
    files = [_File(name, (info.file_size, info.CRC), info) for name, info in members if not name.endswith("/")]
    files.sort(key=lambda file: file.name)
    if any(file.handle.flag_bits & 1 for file in files):
        raise DataError(f"{path} is encrypted; unpack it and set data.source to the folder.")

    def read(name: str, file: _File) -> EncodedImage:
        member: zipfile.ZipInfo = file.handle
        sizes = member.file_size, member.file_size, member.compress_size
        return _read_member(name, *sizes, lambda: archive.read(member))

    return _source_of_files(path, "zip", files, split, layout, class_order, read)


class _TarMember(tarfile.TarInfo):
    """A tar member whose extended header must be small, because tarfile reads it into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_TarMember":
        member = super().frombuf(buf, encoding, errors)
        if member.type in _TAR_HEADERS_WITH_CONTENT and member.size > _MAX_TAR_HEADER_SIZE:
            raise tarfile.ReadError(f"one of its headers has {member.size:,} bytes")
        return member


def open_tar(
    path: Path,
    split: str,
    layout: Kind | None = None,
    class_order: ClassOrder = "numbers",
    shards: Sequence[Path] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """Find the images of a tar file, compressed or not, in the order of the archive.

    Files that are named like the images and end in .cls or .json contain their labels, as in WebDataset. Of several
    images in each sample, such as 0.jpg and 0.seg.png, only the one named by a plain suffix is read.

    Args:
        path: The file, or the folder of the shards.
        split: The split, or a part of it.
        layout: data.layout.
        class_order: As in `find_source`.
        shards: Several files that are one dataset.
        image_column: Suffix of the image in each sample, without its first dot.
        label_column: Key of the label in the .json files.
    """
    files: list[_File] = []
    others: list[str] = []
    archives = _TarFiles()
    for shard in shards or [path]:
        found, ignored = _members_of_tar(shard, archives)
        files += found
        others += ignored
    images = [file for file in files if _why_ignored(file.name) is None] or [f for f in files if _is_array(f.name)]
    label_files, read_label = _labels_of_webdataset(files, images, path, label_column, class_order)
    files, more = _one_image_per_sample(files, images, path, image_column, has_labels=read_label is not None)
    used = set(map(id, label_files))
    files = [file for file in files if id(file) not in used]

    def read(name: str, file: _File) -> EncodedImage:
        image: EncodedImage = file.handle.read(name)
        return image

    return _source_of_files(path, "tar", files, split, layout, class_order, read, [*others, *more], read_label)


_KEYS_OF_LABELS = ("label", "labels", "cls", "class")
"""Keys of the label in the .json files of a WebDataset."""


def _labels_of_webdataset(
    files: list[_File], images: list[_File], path: Path, key: str | None, class_order: ClassOrder
) -> tuple[list[_File], Callable[[_File], Any] | None]:
    """Return the files that contain the labels of images, and a function that reads them; None without labels.

    Labels are the content of .cls files, or a value in .json files, unless class folders contain the labels. Which one
    is decided by the first .json file.

    Args:
        files: All files.
        images: Those that are images.
        path: Name of the dataset in errors.
        key: The key in the .json files; None finds it.
        class_order: As in `find_source`; version 0.1 did not read .json files.
    """
    keys = {(file.handle.path, _key(file)) for file in images}

    def find(suffix: str) -> dict[tuple[Path, str], _File]:
        found = {(file.handle.path, _key(file)): file for file in files if file.name.endswith(suffix)}
        return {key: file for key, file in found.items() if key in keys}

    label_files = find(".cls") if key is None else {}
    is_json = not label_files and class_order != "text" and (key is not None or not any(f.folders for f in images))
    if is_json and (label_files := find(".json")):
        first = next(iter(label_files.values()))
        content = _read_json(first)
        key = next((name for name in _KEYS_OF_LABELS if name in content), None) if key is None else key
        if key is None:
            return [], None
        if key not in content:
            raise DataError(
                f"data.label_column {key!r} is not in {first.name} of {path}, which has "
                f"{_shortened(content) or 'no keys'}."
            )
    elif key is not None:
        raise DataError(f"data.label_column {key!r} is a key of .json files, which {path} does not have; remove it.")

    def read_label(image: _File) -> Any:
        file = label_files.get((image.handle.path, _key(image)))
        if file is None:
            return None
        if key is not None:
            return _read_json(file).get(key)
        content = file.handle.read(file.name).data
        return None if content is None else content.decode("utf-8", "replace").strip()

    return [*label_files.values()], read_label if label_files else None


def _read_json(file: _File) -> dict[str, Any]:
    """Return the content of a .json file in an archive; nothing if it is no object."""
    try:
        content = json.loads(file.handle.read(file.name).read())
    except (BadImage, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


_LABELS_OF_STYLEGAN = "dataset.json"


def _key(file: _File) -> str:
    """Return the name up to the first dot of the file name, which the files of a sample share in WebDataset."""
    folder, _, name = file.name.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _one_image_per_sample(
    files: list[_File], images: list[_File], path: Path, image_column: str | None, *, has_labels: bool
) -> tuple[list[_File], list[str]]:
    """Return the files without other images of the samples of a WebDataset, and the names of these."""
    suffix_of = {id(file): file.name.rpartition("/")[2].partition(".")[2] for file in images}
    suffixes = sorted(set(suffix_of.values()))
    if image_column is None:
        if len(suffixes) < 2:
            return files, []
        samples: dict[tuple[Path, str], set[str]] = {}
        for file in images:
            samples.setdefault((file.handle.path, _key(file)), set()).add(suffix_of[id(file)])
        are_alike = len(set(map(frozenset, samples.values()))) == 1
        plain = [suffix for suffix in suffixes if "." not in suffix]
        is_webdataset = has_labels or (are_alike and plain)
        if not is_webdataset or max(map(len, samples.values())) == 1:
            return files, []
        if len(plain) != 1:
            raise DataError(
                f"{path} has several images in each sample ({', '.join(suffixes)}); set data.image_column to one of "
                "them."
            )
        image_column = plain[0]
    elif image_column not in suffixes:
        raise DataError(
            f"data.image_column {image_column!r} is not the suffix of an image of {path}, which has "
            f"{', '.join(suffixes) or 'none'}."
        )
    others = [file for file in files if suffix_of.get(id(file), image_column) != image_column]
    unused = set(map(id, others))
    return [file for file in files if id(file) not in unused], [f"{file.name} (another image)" for file in others]


class _TarFiles:
    """Tar archives of which one is open at a time, because a dataset may have more of them than a process may open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._archive: tarfile.TarFile | None = None

    def open(self, path: Path) -> tarfile.TarFile:
        """Return an open archive."""
        if self._archive is None or path != self._path:
            if self._archive is not None:
                self._archive.close()
            self._archive, self._path = tarfile.open(path, tarinfo=_TarMember), path
        return self._archive


class _TarFile(NamedTuple):
    """A file in a tar archive.

    Attributes:
        archives: Opens the archive.
        path: Path of the archive.
        offset: Where its content begins; None for a link to a file that is not in the archive.
        size: Bytes of its content.
        sparse: `TarInfo.sparse`.
        sizes: Bytes of the whole archive, unpacked and packed.
    """

    archives: _TarFiles
    path: Path
    offset: int | None
    size: int
    sparse: Any
    sizes: tuple[int, int]

    def read(self, name: str) -> EncodedImage:
        """Unpack it, unless it is suspiciously well compressed; `name` is for messages."""
        if self.offset is None:
            return EncodedImage(name, None, "it is a link to a file that is not in the archive")
        member = tarfile.TarInfo(name)
        member.offset_data, member.size, member.sparse = self.offset, self.size, self.sparse

        def read_content() -> bytes | None:
            content = self.archives.open(self.path).extractfile(member)
            return content.read() if content else None

        return _read_member(name, self.size, *self.sizes, read_content)


def _members_of_tar(path: Path, archives: _TarFiles) -> tuple[list[_File], list[str]]:
    """Return the files of a tar archive, and the names of its members that are not files."""
    try:
        with tarfile.open(path, tarinfo=_TarMember) as archive:
            members = archive.getmembers()
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            is_complete = bool(archive.fileobj.read(1))  # a tar file ends with empty blocks
    except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        raise DataError(f"{path} cannot be read as a tar file ({' '.join(str(error).split())}).") from None
    if not is_complete:
        raise DataError(f"{path} cannot be read as a tar file (its end is missing).")
    identity = file_identity(path)
    sizes = sum(member.size for member in members), identity[0]
    # A hard link has the content of an earlier member. If there is none, it is a bad image.
    contents: dict[str, tarfile.TarInfo] = {}
    files, others = [], []
    for member in members:
        name = member.name.removeprefix("./")
        if member.isfile() or member.islnk():
            content = contents.get(member.linkname.removeprefix("./"), member) if member.islnk() else member
            contents[name] = content
            offset = None if content.islnk() else content.offset_data
            handle = _TarFile(archives, path, offset, content.size, content.sparse, sizes)
            files.append(_File(name, (content.size, *identity), handle))
        elif not member.isdir():  # the target of a symbolic link may be anywhere
            others.append(f"{name} (a link or a device)")
    return files, others


def _read_member(
    name: str, size: int, unpacked_size: int, packed_size: int, read: Callable[[], bytes | None]
) -> EncodedImage:
    """Read a member of an archive, unless it is too large for an image or suspiciously well compressed.

    Args:
        name: How messages refer to it.
        size: Bytes of the member.
        unpacked_size: Bytes of everything that is compressed together with it.
        packed_size: Bytes of the same after compression.
        read: Decompress the member.
    """
    is_well_compressed = size > _HARMLESS_SIZE and unpacked_size > _MAX_COMPRESSION_RATIO * packed_size
    if size > _MAX_MEMBER_SIZE or is_well_compressed:
        return EncodedImage(name, None, f"it would unpack to {size:,} bytes")
    try:
        return EncodedImage(name, read())
    except Exception as error:  # decompressors raise many types for damaged archives
        return EncodedImage(name, None, f"{type(error).__name__}: {error}")


def _walk(root: Path) -> Iterator[Path]:
    """Yield every file below a folder. Links to folders are followed, but each folder is visited once."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}).")

    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        subfolders.sort()  # so that the order on the disk does not decide which of several links is followed
        if os.path.realpath(folder) in visited:
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        yield from (Path(folder, name) for name in names)


_SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN"}
"""Folders of macOS, Synology (thumbnails) and Windows."""


def _why_ignored(name: str) -> str | None:
    """Return None for an image, "" for files that operating systems create, and for others the name with a reason."""
    parts = PurePosixPath(name).parts
    is_image = name.lower().endswith(IMAGE_SUFFIXES)
    if parts[-1].startswith("._") or not _SYSTEM_FOLDERS.isdisjoint(parts):  # ._1.png is metadata of macOS
        return ""
    if ".." in parts:
        return f"{name} (outside of the archive)"
    if any(part.startswith(".") for part in parts):
        return f"{name} (hidden)" if is_image else ""
    return None if is_image else name


def _is_array(name: str) -> bool:
    """Return whether a file is an array of NumPy, which is an image if there are no others."""
    return name.lower().endswith((".npy", ".npz")) and _why_ignored(name) == name


def _may_be_dicom(file: _File) -> bool:
    """Return whether a file has no suffix, as DICOM files often have none, and is not the list of them."""
    name = PurePosixPath(file.name).name
    return "." not in name and name != "DICOMDIR" and _why_ignored(file.name) == file.name


def _source_of_files(
    path: Path,
    kind: str,
    files: list[_File],
    split: str,
    layout: Kind | None,
    class_order: ClassOrder,
    read: Callable[[str, _File], EncodedImage],
    others: Sequence[str] = (),
    read_label: Callable[[_File], Any] | None = None,
) -> Source:
    """Return the source of a folder or an archive.

    Args:
        path: The folder or the archive.
        kind: "folder", "zip" or "tar".
        files: All its files.
        split: The split, or a part of it.
        layout: data.layout.
        class_order: As in `find_source`.
        read: Read an image, given its name for messages.
        others: Names of members that are not files.
        read_label: Return the label of an image, None if it has none; labels are those of the folders otherwise.
    """
    reasons = [_why_ignored(file.name) for file in files]
    images = [file for file, reason in zip(files, reasons, strict=True) if reason is None]
    if not images:
        names = {file.name for file in files if _is_array(file.name)}
        names = names or {file.name for file in files if _may_be_dicom(file) and is_dicom_image(read(file.name, file))}
        images = [file for file in files if file.name in names]
        reasons = [None if file.name in names else reason for file, reason in zip(files, reasons, strict=True)]
    ignored = (*filter(None, reasons), *others)
    found = read_layout(
        [file.folders for file in images],
        str(path),
        layout,
        is_archive=kind != "folder",
        with_annotations=class_order == "text",
    )
    inside = _files_of_split(images, found, _name_of_split(split, str(path)), path) if images else []
    if not inside:
        rest = f"only {format_count(len(ignored), 'other file')}, such as {ignored[0]}" if ignored else "it is empty"
        advice = "Images end in .png, .jpg and so on."
        if archive := next((name for name in ignored if name.lower().endswith((*ZIP_SUFFIXES, *TAR_SUFFIXES))), None):
            advice = f"Unpack {archive}{', or set data.source to it' if kind == 'folder' else ''}."
        raise DataError(f"{path} contains no images (split {split!r}): {rest}. {advice}")
    left_out = tuple(
        f"{file.name} ({'an annotation' if found.is_annotation(file.folders) else 'in no split'})"
        for file in images
        if found.split_of(file.folders) is None
    )
    chosen = [inside[row] for row in _rows_of_split(split, str(path), len(inside))]
    described = str(found) if read_label is None else ""
    if read_label is None and class_order != "text":  # version 0.1 ignored dataset.json
        read_label = _labels_of_json(files, read)
        if read_label is not None:
            described = f"labels in {_LABELS_OF_STYLEGAN}"
            ignored = tuple(name for name in ignored if name.rpartition("/")[2] != _LABELS_OF_STYLEGAN)
    if read_label is None:
        labels, class_names = _class_folders(chosen, images, found, class_order)
    else:
        labels, class_names = encode_labels([read_label(file) for file in chosen], f"the labels of {path}")

    def read_image(row: int) -> EncodedImage:
        return read(f"image {row} of {path} ({chosen[row].name})", chosen[row])

    identities = [[file.name, *file.identity] for file in chosen]
    archives = [file.handle.path for file in chosen] if kind == "tar" else []
    later_archives = (row for row, (before, path) in enumerate(pairwise(archives), 1) if path != before)
    return Source(
        name=str(path),
        kind=kind,
        fingerprint=hashlib.sha256(json.dumps(identities).encode()).hexdigest(),
        num_images=len(chosen),
        read=lambda rows: map(read_image, rows),
        labels=labels,
        class_names=class_names,
        ignored_files=(*ignored, *left_out),
        layout=described,
        archive_starts=(0, *later_archives),
        labels_doubt="" if read_label else found.doubt,
    )


def _labels_of_json(files: list[_File], read: Callable[[str, _File], EncodedImage]) -> Callable[[_File], Any] | None:
    """Return the labels in dataset.json, as StyleGAN and EDM store them; None without such a file."""
    found = [file for file in files if file.name.rpartition("/")[2] == _LABELS_OF_STYLEGAN]
    if len(found) != 1:
        return None
    (file,) = found
    folder = file.name.removesuffix(_LABELS_OF_STYLEGAN)
    try:
        labels = dict(json.loads(read(file.name, file).read())["labels"])
    except (DataError, ValueError, KeyError, TypeError):
        return None  # something else
    return lambda image: labels.get(image.name.removeprefix(folder))


def _files_of_split(images: list[_File], layout: Layout, wanted: str, path: Path) -> list[_File]:
    """Return the files of a split, named by its folder or as in `datasets`."""
    if not layout.splits and wanted != "train":
        raise _no_such_split(path, wanted)
    folders = layout.folders_of(wanted)
    if layout.splits and not folders:
        raise DataError(f"{path} has no split {wanted!r}; its folders are {', '.join(layout.splits)}.")
    if not are_of_one_kind(folders):
        listed = ", ".join(sorted(folders))
        logger.warning(
            "The folders %s of %s are read together; set data.split to one of them if they differ.", listed, path
        )
    depth = layout.depth
    return [
        file
        for file in images
        if not layout.is_annotation(file.folders)
        and (not layout.splits or folders.intersection(file.folders[depth : depth + 1]))
    ]


def _no_such_split(path: Path, wanted: str) -> DataError:
    return DataError(f"{path} has no split {wanted!r}, only 'train' and parts of it such as 'train[:90%]'.")


def _class_folders(
    files: list[_File], files_of_all_splits: list[_File], layout: Layout, class_order: ClassOrder
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Label files by their class folder; classes are those of all splits."""
    in_splits = [file.folders for file in files_of_all_splits if layout.split_of(file.folders) is not None]
    found = {name for folders in in_splits if (name := layout.class_of(folders)) is not None}
    if not found:
        return None, None
    # macOS decomposes accents: the same name may be written in two ways.
    composed = {name: unicodedata.normalize("NFC", name) for name in found}
    if class_order == "text" or len(set(composed.values())) == len(found):
        composed = {name: name for name in found}
    names = set(composed.values())
    class_names = sort_classes(names) if class_order == "numbers" else sorted(names)
    number_of = {name: number for number, name in enumerate(class_names)}
    numbers: dict[str | None, int] = {name: number_of[one] for name, one in composed.items()}
    labels = [numbers.get(layout.class_of(file.folders), NO_LABEL) for file in files]
    return np.asarray(labels, np.int64), tuple(map(_as_unicode, class_names))


def _as_unicode(name: str) -> str:
    """Return the name of a folder; bytes that are not UTF-8 are read as Latin-1, which older systems used."""
    content = os.fsencode(name)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


# ------------------------------------------------------------------------------------------------------------ tables

_TABLE_SUFFIXES = (".parquet", ".arrow")
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


def _is_table(folder: Path, files: Iterable[Path]) -> bool:
    """Return whether a folder, with these files below it, contains tables rather than only images."""
    files = list(files)
    others = list(_visible_other_files(folder, files))
    if any(file.name in _METADATA_NAMES or file.name == "dataset_dict.json" for file in others):
        return True
    tables = [file for file in others if file.suffix in _TABLE_SUFFIXES]
    has_images = any(
        file.name.lower().endswith(TAR_SUFFIXES) or _why_ignored(file.relative_to(folder).as_posix()) is None
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
    files = list(_walk(folder))
    tables = sorted(_visible_other_files(folder, files))
    metadata = [file for file in tables if file.name in _METADATA_NAMES]
    has_others = any(file.suffix in _TABLE_SUFFIXES and file.name not in _METADATA_NAMES for file in tables)
    has_images = any(_why_ignored(file.relative_to(folder).as_posix()) is None for file in files)
    return {} if has_others or not has_images or not metadata else _tables_by_split(metadata, folder)


def _visible_other_files(folder: Path, files: Iterable[Path]) -> Iterator[Path]:
    """Yield the files that are neither images nor hidden."""
    for file in files:
        name = file.relative_to(folder).as_posix()
        if _why_ignored(name) == name:
            yield file


def _open_table(config: DataConfig, split: str, class_order: ClassOrder, known: tuple[str, ...] | None) -> Source:
    """Find the images and labels of a dataset with rows and columns."""
    name = _name_of_split(split, config.source)
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
    listed = [_File(file, (), None) for file in _files_of_rows(whole, image_column, of.folder)]
    ignored = _unlisted(of.folder, {file.name for file in listed}, of.tables, of.split)
    source = replace(source, ignored_files=ignored)
    if label_column is not None:
        _check_unset(config, ("layout",), f"{config.source}, whose column {label_column!r} contains the labels")
        return source
    if class_order == "text":  # version 0.1 ignored the folders
        return source
    layout = read_layout([file.folders for file in listed], config.source, config.layout, is_archive=False)
    chosen = [_File(file, (), None) for file in _files_of_rows(dataset, image_column, of.folder)]
    labels, class_names = _class_folders(chosen, listed, layout, class_order)
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
    name = _name_of_split(split, source.name)
    counts = Counter("none" if value is None else value for value in values)
    listed = ", ".join(f"{value} ({count:,})" for value, count in counts.most_common(_MAX_LISTED_SPLITS))
    rows = [row for row, value in enumerate(values) if is_in_split(value, name)]
    if not rows:
        raise DataError(f"{source.name} has no split {name!r}; its column {column!r} has {listed}.")
    rows = [rows[row] for row in _rows_of_split(split, source.name, len(rows))]
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
            f"{_shortened(others)}, or model.class_conditional to false."
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
    names = [file.relative_to(folder) for file in _walk(folder)]
    return tuple(
        f"{name.as_posix()} (not in the metadata)"
        for name in sorted(names)
        if _why_ignored(name.as_posix()) is None
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
        for file in _walk(self._folder):
            if _why_ignored(file.relative_to(self._folder).as_posix()) is None:
                number = file.stem.lstrip("0") or "0"
                for name in {file.name, file.stem, number if number.isdecimal() else file.stem}:
                    names.setdefault(name, []).append(file)
        return names


def load_table(config: DataConfig, split: str, *, is_streaming: bool = False) -> Any:
    """Load one split with the `datasets` library."""
    import datasets

    path = Path(config.source).expanduser()
    if is_streaming or not path.is_dir() or not _metadata_of(path):
        _check_unset(config, ("layout",), f"{config.source}, which is no folder or archive of images")
    try:
        is_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        if is_saved and not is_streaming:
            return _load_saved(path, split)
        arguments: dict[str, Any]
        if path.is_dir():
            if is_streaming and _idx_of_folder(path, list(_walk(path))):
                raise DataError(f"data.streaming does not support idx files such as those of {path}; set it to false.")
            arguments = _tables_of_saved(path) if is_saved else _tables_of_folder(path)
        elif path.is_file():
            suffix = path.suffix.lower()
            if suffix not in (*_TABLE_SUFFIXES, *TEXT_TABLES):
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
    name = _name_of_split(split, str(path))
    if isinstance(saved, datasets.DatasetDict):
        if name not in saved:
            raise DataError(f"{path} has no split {name!r}; it has {', '.join(saved)}.")
        saved = saved[name]
    elif name != "train":
        raise _no_such_split(path, name)
    saved = saved.with_format(None)  # it may have been saved with some of its columns only
    return saved if split == name else saved.select(_rows_of_split(split, str(path), len(saved)))


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
        files = list(_walk(folder))
        for suffix in _TABLE_SUFFIXES:
            chosen = sorted(file for file in _visible_other_files(folder, files) if file.suffix == suffix)
            if not chosen:
                continue
            for file in files:
                name = file.relative_to(folder)
                if _why_ignored(name.as_posix()) is None and file.is_file():
                    raise DataError(
                        f"{folder} contains images such as {name} and the table {chosen[0].relative_to(folder)}; set "
                        "data.source to the table, or move one of them out of the folder."
                    )
            kind, tables = suffix[1:], _tables_by_split(chosen, folder)
            break
    if not tables:
        table = next(file for file in _visible_other_files(folder, _walk(folder)) if file.name in _METADATA_NAMES)
        raise DataError(f"{folder} has {table.name} but no pictures; set data.source to {table}.")
    data_files = {split: list(map(_without_patterns, group)) for split, group in tables.items()}
    return {"path": kind, "data_files": data_files}


def _tables_by_split(tables: list[Path], folder: Path) -> dict[str, list[Path]]:
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


def _shortened(names: Collection[str]) -> str:
    """Return names, but not those of a thousand columns."""
    return ", ".join([*names][:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


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

    columns = _shortened(features)
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


# ------------------------------------------------------------------------------------------------------------ arrays


def _idx_of_folder(folder: Path, files: list[Path]) -> dict[str, Path]:
    """Return the idx files of a folder without images, by the names of their arrays."""
    has_images = any(_why_ignored(file.relative_to(folder).as_posix()) is None for file in files)
    return {} if has_images else find_idx(files)


def _open_array(
    path: Path,
    config: DataConfig,
    split: str,
    class_order: ClassOrder,
    known: tuple[str, ...] | None,
    idx: Mapping[str, Path] | None = None,
) -> ImageSet | Source:
    """Open the images of a .npy file, or images and labels of an .npz file or of idx files, by the names of arrays."""
    _check_unset(config, ("layout",), f"{path}, which is no folder or archive of images")
    arrays = read_arrays(path) if idx is None else {name: read_idx(file) for name, file in idx.items()}
    wanted = _name_of_split(split, str(path))
    splits = {} if config.image_column or "images" in arrays else splits_of_arrays(arrays)
    if splits:
        if (parts := splits.get(split_of_word(wanted) or wanted)) is None:
            raise DataError(f"{path} has no split {wanted!r}; it has {', '.join(splits)}.")
        arrays = {name: arrays[part] for name, part in parts.items()} | arrays
    elif wanted != "train":
        raise _no_such_split(path, wanted)
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
    rows = _rows_of_split(split, str(path), len(images))
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
