"""A run folder is taken only where it is ours or empty, and what is somebody else's stays as it is."""

import os
import shutil
from pathlib import Path

import pytest

from ddpm_hf.config import ConfigError
from ddpm_hf.training.run_dir import RunFolder, RunLock


def refusal(path: Path, resume: str = "auto") -> str:
    with pytest.raises(ValueError, match=str(path)) as caught:
        RunFolder(path).check(resume)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def begin(path: Path) -> RunFolder:
    """Returns the folder of a run that has begun."""
    folder = RunFolder(path)
    folder.check("auto")
    folder.write_config("training: {}\n")
    return folder


def test_a_new_or_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "new", tmp_path / "deep" / "er"):
        begin(path).release()
        assert (path / "config.yaml").read_text().endswith("\ntraining: {}\n")


def test_a_run_is_continued_unless_that_was_not_wanted(tmp_path: Path) -> None:
    begin(tmp_path / "run").release()
    again = RunFolder(tmp_path / "run")
    again.check("auto")
    again.release()
    assert "holds a run; set training.resume to auto to continue it" in refusal(tmp_path / "run", resume="none")
    assert (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("thesis.tex", b"precious"),
        ("config.yaml", b"somebody: else\n"),
        ("config.yaml", b"\xff\xfe not text"),
        (".hidden", b""),
    ],
)
def test_a_folder_that_holds_something_else_is_refused_and_untouched(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert f"holds something else ({name}); choose an empty or a new folder" in refusal(tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, data)]


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    assert "another process is training in" in refusal(tmp_path)
    folder.release()
    begin(tmp_path).release()


@pytest.mark.parametrize("place", ["file", "file/run", "file/deep/run"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(tmp_path / place)
    assert f"training.output_dir {tmp_path / place} cannot be written (" in message
    assert message.endswith("choose another folder.")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written (Permission denied)" in refusal(tmp_path / "run")


@pytest.mark.parametrize("place", ["run", "deep/er/run"])
def test_a_folder_that_nothing_was_written_to_goes_away_again(tmp_path: Path, place: str) -> None:
    folder = RunFolder(tmp_path / place)
    folder.check("auto")
    folder.release()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_that_was_there_before_stays(tmp_path: Path) -> None:
    """It may be a mounted disk."""
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run")
    folder.check("auto")
    folder.release()
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_beside_others_leaves_them_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "outputs" / "one")
    folder.check("auto")
    (tmp_path / "outputs" / "two").mkdir()
    folder.release()
    assert list((tmp_path / "outputs").iterdir()) == [tmp_path / "outputs" / "two"]


@pytest.mark.parametrize("leftover", [".lock", ".config.yaml.writing"])
def test_a_start_that_was_killed_is_no_obstacle(tmp_path: Path, leftover: str) -> None:
    (tmp_path / leftover).write_text("half")
    begin(tmp_path).release()
    assert (tmp_path / "config.yaml").exists()


def test_a_folder_that_was_never_taken_has_nothing_to_release(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_removed_in_the_middle_is_made_again_and_still_held(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = begin(tmp_path / "run")
    folder.hold()
    assert caplog.text == ""
    shutil.rmtree(tmp_path / "run")
    folder.hold()
    assert f"training.output_dir {tmp_path / 'run'} was removed while training; it is made again." in caplog.text
    assert "another process is training in" in refusal(tmp_path / "run")
    folder.release()
    begin(tmp_path / "run").release()


def test_a_lock_that_was_removed_is_taken_again(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".lock").unlink()
    folder.hold()
    assert "another process is training in" in refusal(tmp_path)
    folder.release()


@pytest.mark.parametrize("name", ["theirs", "config.yaml"])
def test_a_folder_whose_place_was_taken_is_left_alone(tmp_path: Path, name: str) -> None:
    folder = begin(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("precious")
    with pytest.raises(ValueError, match=rf"was removed while training, and holds something else now \({name}\)"):
        folder.hold()
    folder.release()
    assert [(path.name, path.read_text()) for path in (tmp_path / "run").iterdir()] == [(name, "precious")]


def test_a_folder_whose_place_another_run_has_taken_is_left_to_it(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    lock = RunLock(tmp_path / "run")
    with pytest.raises(ConfigError, match="and now another process is training in"):
        folder.hold()
    folder.release()
    assert lock.is_held()
    assert (tmp_path / "run" / ".lock").exists()
    lock.release()


def test_a_folder_that_was_removed_can_be_released(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.check("auto")
    shutil.rmtree(tmp_path / "deep")
    folder.release()
    folder.release()


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    assert "cannot be written (Too many levels of symbolic links)" in refusal(tmp_path / "run")
    assert not (tmp_path / "precious").exists()
