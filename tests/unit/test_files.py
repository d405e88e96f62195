"""Files are whole or absent, and what cannot be read is named with its place."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddpm_hf.files import (
    atomic_write,
    format_bytes,
    format_count,
    format_duration,
    format_value,
    read_json,
    read_yaml,
    replace_folder,
    sha256_of_file,
    write_json,
    write_text,
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_keeps_the_old_file_and_the_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_text(path, "old")

    def fill_the_disk(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left on device") as caught:
        atomic_write(path, fill_the_disk)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert (names_in(tmp_path), path.read_text()) == (["report.json"], "old")


def test_an_error_names_the_file_and_not_its_temporary_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_text(tmp_path / "nowhere" / "a", "")
    assert caught.value.filename == str(tmp_path / "nowhere" / "a")


def test_an_error_about_another_file_is_raised_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        atomic_write(tmp_path / "a", lambda _: (tmp_path / "missing").read_text())
    assert caught.value.filename == str(tmp_path / "missing")


@pytest.mark.parametrize("is_killed_between", [False, True])
def test_a_folder_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, is_killed_between: bool) -> None:
    """Also after an earlier call was killed between its two renames."""
    path = tmp_path / "samples"
    path.mkdir()
    (path / "old").touch()
    if is_killed_between:
        path.rename(tmp_path / ".samples.old")

    def fail(folder: Path) -> None:
        (folder / "new").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left on device"):
        replace_folder(path, fail)
    assert (names_in(tmp_path), names_in(path)) == (["samples"], ["old"])
    replace_folder(path, lambda folder: (folder / "new").touch())
    assert (names_in(tmp_path), names_in(path)) == (["samples"], ["new"])


@pytest.mark.parametrize(
    ("read", "content", "problem"),
    [
        (read_json, b'{"a": ', "is not valid JSON"),
        (read_json, b"[" * 100_000, "is not valid JSON"),
        (read_json, b"\xff\xfe\xff", "is not valid JSON"),
        (read_json, b"[1]", "must contain a JSON object, not list"),
        (read_yaml, b"a: [1,\nb", "is not valid YAML (line 2, column 2"),
        (read_yaml, b"", "must contain a YAML mapping, not NoneType"),
    ],
)
def test_an_unreadable_file_is_named_with_the_reason_and_the_fix(
    tmp_path: Path, read: Callable[..., Any], content: bytes, problem: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"; write it again\.$") as caught:
        read(path, "write it again")
    assert str(caught.value).startswith(f"{path} {problem}")


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    content = {"name": "größe", "values": [1, 0.1, None, True]}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content == read_yaml(tmp_path / "a.json")


def test_a_checksum_is_that_of_the_whole_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(content)
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_bytes(0), "0 B"), (format_bytes(999), "999 B"), (format_bytes(1234), "1.2 kB"),
        (format_bytes(999_960), "1.0 MB"), (format_bytes(80e9), "80.0 GB"), (format_bytes(2.5e15), "2,500.0 TB"),
        (format_duration(41.7), "42 s"), (format_duration(185), "3 min 5 s"), (format_duration(7800), "2 h 10 min"),
        (format_count(1, "image"), "1 image"), (format_count(1234, "image"), "1,234 images"),
        (format_count(2, "process"), "2 processes"),
        (format_value(None), "null"), (format_value(True), "true"), (format_value("a b"), "a b"),
        (format_value([1, 2]), "[1, 2]"), (format_value("x" * 60), "x" * 49 + "…"),
    ],
)  # fmt: skip
def test_numbers_and_settings_as_text(text: str, expected: str) -> None:
    assert text == expected
