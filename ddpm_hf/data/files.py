"""Image files in a folder, a zip or a tar: found by name, sorted, labelled by the folders they lie in."""

import hashlib
import json
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.data.decoding import Cell
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.source import NO_LABEL, Source, identity_of, name_of_split, rows_of_split

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
