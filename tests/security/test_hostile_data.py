"""A hostile dataset runs no code, writes no files, reads no other files and does not exhaust the memory.

Memory is what Python and NumPy allocate while the dataset is opened, decoded and drawn.
"""

import gzip
import io
import json
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from ddpm_hf.cli import main
from tests.security.conftest import Watch
from tests.security.hostile import module_that_runs, pickle_that_runs

MIB = 2**20
# More than a tiny dataset needs, and less than any of the bombs.
MOST_MEMORY = 64 * MIB
SECRET = 77


def png(value: int = 1, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def announced(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes that declares a large size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def npy_header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def folder_with_a_bomb(path: Path) -> Path:
    path.mkdir()
    (path / "1.png").write_bytes(announced(60_000, 60_000))
    return path


def zip_bomb(path: Path) -> Path:
    """Two members of 128 MiB of zeros, compressed 1000 to 1."""
    with zipfile.ZipFile(path := path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("1.png", "2.png"):
            with archive.open(name, "w") as file:
                for _ in range(8):
                    file.write(bytes(16 * MIB))
    return path


def tar_bomb(path: Path) -> Path:
    with tarfile.open(path := path.with_suffix(".tar.gz"), "w:gz", compresslevel=1) as archive:
        member = tarfile.TarInfo("1.png")
        member.size = 128 * MIB
        archive.addfile(member, gzip.open(io.BytesIO(gzip.compress(bytes(128 * MIB), 1))))
    return path


def tar_with_a_header_of_gigabytes(path: Path) -> Path:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2**33 - 1
    with gzip.open(path := path.with_suffix(".tar.gz"), "wb", 1) as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT) + bytes(64 * MIB))
    return path


def npy_of_petabytes(path: Path) -> Path:
    path.with_suffix(".npy").write_bytes(npy_header((10**11, 100, 100, 3)) + bytes(100))
    return path.with_suffix(".npy")


def npz_of_petabytes(path: Path) -> Path:
    with zipfile.ZipFile(path := path.with_suffix(".npz"), "w") as archive:
        archive.writestr("images.npy", npy_header((10**11, 100, 100, 3)))
    return path


def npz_larger_than_the_memory(path: Path) -> Path:
    """Its directory declares a member of a petabyte."""
    with zipfile.ZipFile(path := path.with_suffix(".npz"), "w") as archive:
        archive.writestr("images.npy", npy_header((2, 8, 8, 3)) + bytes(384))
        archive.filelist[0].file_size = 2**50
    return path


def objects(path: Path) -> Path:
    array = np.empty(2, object)
    array[:] = [{}, []]
    np.save(path, array, allow_pickle=True)
    return path.with_suffix(".npy")


def objects_in_an_archive(path: Path) -> Path:
    array = np.empty(2, object)
    array[:] = [{}, []]
    np.savez(path, images=array, allow_pickle=True)
    return path.with_suffix(".npz")


def pickle_called_npy(path: Path) -> Path:
    path.with_suffix(".npy").write_bytes(pickle_that_runs(path.parent / "canary"))
    return path.with_suffix(".npy")


def pickle_called_parquet(path: Path) -> Path:
    path.with_suffix(".parquet").write_bytes(pickle_that_runs(path.parent / "canary"))
    return path.with_suffix(".parquet")


def metadata(name: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        (path.parent / "secret.png").write_bytes(png(SECRET))
        path.mkdir()
        (path / "1.png").write_bytes(png())
        names = ["1.png", name.replace("HERE", str(path.parent))]
        (path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": name}) + "\n" for name in names))
        return path

    return make


def table(name: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        (path.parent / "secret.png").write_bytes(png(SECRET))
        path.mkdir()
        cells = [{"bytes": png(), "path": None}]
        cells += [{"bytes": None, "path": name.replace("HERE", str(path.parent)).replace("SET", str(path))}]
        pyarrow.parquet.write_table(pyarrow.table({"image": cells}), path / "table.parquet")
        return path / "table.parquet"

    return make


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Import libraries before memory is traced, which makes imports slow."""
    import datasets  # noqa: F401

    import ddpm_hf.training.trainer  # noqa: F401


# Dataset -> part of the error message.
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "an image of 60000x60000": (folder_with_a_bomb, "none of the 1 images"),
    "a zip bomb": (zip_bomb, "can be read"),
    "a tar bomb": (tar_bomb, "can be read"),
    "a tar with a header of gigabytes": (tar_with_a_header_of_gigabytes, "one of its headers has 8,589,934,591 bytes"),
    "a npy of petabytes": (npy_of_petabytes, "cannot be read as a NumPy array"),
    "a npz of petabytes": (npz_of_petabytes, "cannot be read as a NumPy array"),
    "a npz larger than the memory": (npz_larger_than_the_memory, "more than this machine has memory"),
    "objects in a npy": (objects, "cannot be read as a NumPy array"),
    "objects in a npz": (objects_in_an_archive, "cannot be read as a NumPy array"),
    "a pickle called npy": (pickle_called_npy, "cannot be read as a NumPy array"),
    "a pickle called parquet": (pickle_called_parquet, "cannot be opened"),
    "metadata above the folder": (metadata("../secret.png"), "traversal|outside of the dataset"),
    "metadata at an absolute path": (metadata("HERE/secret.png"), "Absolute paths|outside of the dataset"),
    "a table with an absolute path": (table("HERE/secret.png"), "secret.png, outside of the dataset"),
    "a table that leads upwards": (table("SET/../secret.png"), "secret.png, outside of the dataset"),
    "a table with another relative path": (table("secret.png"), "(secret.png) cannot be read (No such file"),
    "a table with a device": (table("/dev/zero"), "/dev/zero, outside of the dataset"),
}

BOMBS = list(REFUSED)[:7]


def show(source: Path, folder: Path, *, is_measured: bool = False) -> tuple[int, int]:
    """Run `ddpm-hf data`; return the exit code and the peak memory, whose measurement is slow."""
    if is_measured:
        tracemalloc.start()
    try:
        exit_code = main.data([str(source), "--picture", str(folder / "picture.png")])
        return exit_code, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_data_are_refused_with_a_sentence(watch: Watch, capsys: pytest.CaptureFixture[str], name: str) -> None:
    make, sentence = REFUSED[name]
    source = make(watch.folder / "data")
    exit_code, memory = show(source, watch.folder, is_measured=name in BOMBS)
    error = capsys.readouterr().err
    assert exit_code == 2, error
    assert any(one in error for one in sentence.split("|"))  # of `datasets` from 4.1 on, or ours
    assert "Traceback" not in error
    # NumPy counts failed allocations: the system refused a petabyte.
    assert memory < MOST_MEMORY or memory > 2**50


@pytest.mark.parametrize("kind", [".zip", ".tar"])
def test_members_are_never_written_whatever_their_names(watch: Watch, kind: str) -> None:
    """Members with absolute paths or paths outside of the archive are read inside of it."""
    names = ["1.png", "../../ddpm_hf-escaped.png", "/tmp/ddpm_hf-escaped.png"]
    source = watch.folder / f"data{kind}"
    if kind == ".zip":
        with zipfile.ZipFile(source, "w") as archive:
            for name in names:
                archive.writestr(name, png())
            archive.writestr("code.py", module_that_runs(watch.canary))
    else:
        with tarfile.open(source, "w") as tar:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = len(png())
                tar.addfile(member, io.BytesIO(png()))
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    assert show(source, watch.folder)[0] == 0


def test_files_beside_a_table_are_read(watch: Watch) -> None:
    """A table may refer to files beside it."""
    source = table("SET/images/1.png")(watch.folder / "data")
    (watch.folder / "data" / "images").mkdir()
    (watch.folder / "data" / "images" / "1.png").write_bytes(png(5))
    assert show(source, watch.folder)[0] == 0


def test_code_beside_a_dataset_is_not_run(watch: Watch) -> None:
    """Old versions of `datasets` ran a script with the name of its folder."""
    folder = watch.folder / "data"
    folder.mkdir()
    for name in ("data.py", "__init__.py", "dataset.py"):
        (folder / name).write_text(module_that_runs(watch.canary))
    (folder / "1.png").write_bytes(png())
    (folder / "2.png").write_bytes(png(2))
    assert show(folder, watch.folder)[0] == 0


@pytest.mark.parametrize("label", [2**40, 2**62])
def test_large_labels_do_not_fill_the_memory(watch: Watch, caplog: pytest.LogCaptureFixture, label: int) -> None:
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.full((4, 8, 8, 3), 60, np.uint8)
    np.savez(watch.folder / "data.npz", images=images, labels=np.array([0, 1, 2, label]))
    exit_code, memory = show(watch.folder / "data.npz", watch.folder, is_measured=True)
    assert (exit_code, memory < MOST_MEMORY) == (0, True)
    run = ["--data.source", str(watch.folder / "data.npz"), "--training.output_dir", str(watch.folder / "run")]
    assert main.train([*run, "--model.class_conditional", "true", "--model.preset", "digits_8", "--dry_run"]) == 0
    assert f"are 0, 1, 2, {label}: classes are numbered from 0 to 3" in caplog.text
