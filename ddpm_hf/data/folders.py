"""Find the images and labels of a folder or an archive.

A `Source` is the result for any kind of dataset: numbered encoded images that can be read in order, their labels, and a
fingerprint that changes with the data. Data and settings that cannot be used raise a `DataError`.
"""

import functools
import hashlib
import json
import logging
import lzma
import os
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.config import DataConfig
from ddpm_hf.data.arrays import find_idx
from ddpm_hf.data.decode import BadImage, DataError, EncodedImage, Header, is_dicom_image
from ddpm_hf.data.labels import NO_LABEL, ClassOrder, encode_labels, sort_classes
from ddpm_hf.data.layout import Kind, Layout, are_of_one_kind, read_layout
from ddpm_hf.files import format_count

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


def check_unset(config: DataConfig, settings: tuple[str, ...], where: str) -> None:
    """Raise a DataError if a setting of the data is set that does not apply."""
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


def name_of_split(split: str, source: str) -> str:
    """Return the split that a part such as "train[:90%]", or a sum of parts, belongs to."""
    names = list(dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")))
    if len(names) > 1:
        raise DataError(f"split {split!r} of {source} combines {' and '.join(names)}; use parts of one split.")
    return names[0]


def rows_of_split(split: str, source: str, num_images: int) -> Sequence[int]:
    """Return the rows of a part such as "train[:90%]" or "train[:3]+train[5:9]" of a split with `num_images` images."""
    name = name_of_split(split, source)
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
class File:
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
        File(file.relative_to(path).as_posix(), file_identity(file), file)
        for file in (walk(path) if files is None else files)
    ]
    found.sort(key=lambda file: file.name)

    def read(name: str, file: File) -> EncodedImage:
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
    files = [File(name, (info.file_size, info.CRC), info) for name, info in members if not name.endswith("/")]
    files.sort(key=lambda file: file.name)
    if any(file.handle.flag_bits & 1 for file in files):
        raise DataError(f"{path} is encrypted; unpack it and set data.source to the folder.")

    def read(name: str, file: File) -> EncodedImage:
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
    files: list[File] = []
    others: list[str] = []
    archives = _TarFiles()
    for shard in shards or [path]:
        found, ignored = _members_of_tar(shard, archives)
        files += found
        others += ignored
    images = [file for file in files if why_ignored(file.name) is None] or [f for f in files if _is_array(f.name)]
    label_files, read_label = _labels_of_webdataset(files, images, path, label_column, class_order)
    files, more = _one_image_per_sample(files, images, path, image_column, has_labels=read_label is not None)
    used = set(map(id, label_files))
    files = [file for file in files if id(file) not in used]

    def read(name: str, file: File) -> EncodedImage:
        image: EncodedImage = file.handle.read(name)
        return image

    return _source_of_files(path, "tar", files, split, layout, class_order, read, [*others, *more], read_label)


_KEYS_OF_LABELS = ("label", "labels", "cls", "class")
"""Keys of the label in the .json files of a WebDataset."""


def _labels_of_webdataset(
    files: list[File], images: list[File], path: Path, key: str | None, class_order: ClassOrder
) -> tuple[list[File], Callable[[File], Any] | None]:
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

    def find(suffix: str) -> dict[tuple[Path, str], File]:
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
                f"{shortened(content) or 'no keys'}."
            )
    elif key is not None:
        raise DataError(f"data.label_column {key!r} is a key of .json files, which {path} does not have; remove it.")

    def read_label(image: File) -> Any:
        file = label_files.get((image.handle.path, _key(image)))
        if file is None:
            return None
        if key is not None:
            return _read_json(file).get(key)
        content = file.handle.read(file.name).data
        return None if content is None else content.decode("utf-8", "replace").strip()

    return [*label_files.values()], read_label if label_files else None


def _read_json(file: File) -> dict[str, Any]:
    """Return the content of a .json file in an archive; nothing if it is no object."""
    try:
        content = json.loads(file.handle.read(file.name).read())
    except (BadImage, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


_LABELS_OF_STYLEGAN = "dataset.json"


def _key(file: File) -> str:
    """Return the name up to the first dot of the file name, which the files of a sample share in WebDataset."""
    folder, _, name = file.name.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _one_image_per_sample(
    files: list[File], images: list[File], path: Path, image_column: str | None, *, has_labels: bool
) -> tuple[list[File], list[str]]:
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


def _members_of_tar(path: Path, archives: _TarFiles) -> tuple[list[File], list[str]]:
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
            files.append(File(name, (content.size, *identity), handle))
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


def walk(root: Path) -> Iterator[Path]:
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


def why_ignored(name: str) -> str | None:
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
    return name.lower().endswith((".npy", ".npz")) and why_ignored(name) == name


def _may_be_dicom(file: File) -> bool:
    """Return whether a file has no suffix, as DICOM files often have none, and is not the list of them."""
    name = PurePosixPath(file.name).name
    return "." not in name and name != "DICOMDIR" and why_ignored(file.name) == file.name


def _source_of_files(
    path: Path,
    kind: str,
    files: list[File],
    split: str,
    layout: Kind | None,
    class_order: ClassOrder,
    read: Callable[[str, File], EncodedImage],
    others: Sequence[str] = (),
    read_label: Callable[[File], Any] | None = None,
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
    reasons = [why_ignored(file.name) for file in files]
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
    inside = _files_of_split(images, found, name_of_split(split, str(path)), path) if images else []
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
    chosen = [inside[row] for row in rows_of_split(split, str(path), len(inside))]
    described = str(found) if read_label is None else ""
    if read_label is None and class_order != "text":  # version 0.1 ignored dataset.json
        read_label = _labels_of_json(files, read)
        if read_label is not None:
            described = f"labels in {_LABELS_OF_STYLEGAN}"
            ignored = tuple(name for name in ignored if name.rpartition("/")[2] != _LABELS_OF_STYLEGAN)
    if read_label is None:
        labels, class_names = class_folders(chosen, images, found, class_order)
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


def _labels_of_json(files: list[File], read: Callable[[str, File], EncodedImage]) -> Callable[[File], Any] | None:
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


def _files_of_split(images: list[File], layout: Layout, wanted: str, path: Path) -> list[File]:
    """Return the files of a split, named by its folder or as in `datasets`."""
    if not layout.splits and wanted != "train":
        raise no_such_split(path, wanted)
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


def no_such_split(path: Path, wanted: str) -> DataError:
    """Return the error for another split of a source without splits."""
    return DataError(f"{path} has no split {wanted!r}, only 'train' and parts of it such as 'train[:90%]'.")


def class_folders(
    files: list[File], files_of_all_splits: list[File], layout: Layout, class_order: ClassOrder
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


def visible_other_files(folder: Path, files: Iterable[Path]) -> Iterator[Path]:
    """Yield the files that are neither images nor hidden."""
    for file in files:
        name = file.relative_to(folder).as_posix()
        if why_ignored(name) == name:
            yield file


def idx_of_folder(folder: Path, files: list[Path]) -> dict[str, Path]:
    """Return the idx files of a folder without images, by the names of their arrays."""
    has_images = any(why_ignored(file.relative_to(folder).as_posix()) is None for file in files)
    return {} if has_images else find_idx(files)


def shortened(names: Collection[str]) -> str:
    """Return names, but not those of a thousand columns."""
    return ", ".join([*names][:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
