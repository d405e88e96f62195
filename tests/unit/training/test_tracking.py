"""metrics.jsonl is whole after any kill and goes back to the checkpoint on resume."""

import sys
from pathlib import Path

import pytest

from ddpm_hf.training.tracking import MetricsLog, Progress

ROWS = [{"step": step, "loss": 1 / step, "grad_norm": None} for step in range(1, 6)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def log(path: Path) -> MetricsLog:
    log = MetricsLog(path)
    for row in ROWS:
        log.append(row)
    return log


def test_rows_come_back_as_they_were(log: MetricsLog, path: Path) -> None:
    assert log.rows() == ROWS
    assert MetricsLog(path).rows() == ROWS
    assert path.read_text().count("\n") == len(ROWS)


def test_a_log_that_does_not_exist_is_empty(path: Path) -> None:
    assert MetricsLog(path).rows() == []


def test_a_line_is_there_for_others_at_once(log: MetricsLog, path: Path) -> None:
    log.append({"step": 6})
    assert path.read_text().splitlines()[-1] == '{"step": 6}'


def test_a_line_torn_anywhere_is_left_out_and_the_rest_is_kept(log: MetricsLog, path: Path) -> None:
    whole = path.read_bytes()
    start_of_last = whole.rindex(b"\n", 0, -1) + 1
    for length in range(start_of_last, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert log.rows() == ROWS[:-1]
    path.write_bytes(whole[:-1])
    assert log.rows() == ROWS, "all of it but the end of the line"


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("step", [0, 3, 5, 99])
def test_a_resumed_run_writes_each_step_once(log: MetricsLog, path: Path, step: int, torn: bool) -> None:
    if torn:
        path.write_bytes(path.read_bytes()[:-7])
    log.cut_after(step)
    kept = [row for row in ROWS[: 4 if torn else 5] if row["step"] <= step]
    assert log.rows() == kept
    log.append({"step": step + 1})
    assert log.rows() == [*kept, {"step": step + 1}]
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_first_start_makes_an_empty_log(path: Path) -> None:
    MetricsLog(path).cut_after(0)
    assert path.read_text() == ""


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
