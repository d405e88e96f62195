"""A person always sees what a run is doing, and a log file is not filled with bars."""

import sys

import pytest

from ddpm_hf.training.logging import Progress


def test_the_bar_says_what_training_waits_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    with Progress(2, 9, is_main_process=True) as progress:
        capsys.readouterr()
        with progress.doing("Drawing a preview"):
            assert "Drawing a preview" in capsys.readouterr().err
        assert "Training" in capsys.readouterr().err
        with pytest.raises(OSError), progress.doing("Saving"):
            raise OSError
        assert capsys.readouterr().err.rstrip().split("\r")[-1].startswith("Training")


def test_without_a_terminal_nothing_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(0, 9, is_main_process=True) as progress, progress.doing("Drawing a preview"):
        progress.update()
    assert capsys.readouterr().err == ""
