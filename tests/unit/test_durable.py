"""What is written is whole or absent: the old stays until the new is there, and an error names the file."""

import errno
import os
from pathlib import Path

import pytest

from ddpm_hf.files import replace_folder, write_text, write_whole


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_keeps_the_old_file_and_is_told_with_the_name_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_text(path, "old")

    def fill_the_disk(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left on device") as caught:
        write_whole(path, fill_the_disk)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert (names_in(tmp_path), path.read_text()) == (["report.json"], "old")


def test_an_error_names_the_file_and_not_the_one_that_was_to_become_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_text(tmp_path / "nowhere" / "a", "")
    assert caught.value.filename == str(tmp_path / "nowhere" / "a")


def test_an_error_that_names_another_file_is_passed_on_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(tmp_path / "a", lambda _: (tmp_path / "missing").read_text())
    assert caught.value.filename == str(tmp_path / "missing")


@pytest.mark.parametrize("is_killed_between", [False, True])
def test_a_folder_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, is_killed_between: bool) -> None:
    """Also where the call before was killed between its two renames."""
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
