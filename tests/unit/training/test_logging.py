"""metrics.jsonl is complete after any kill and is truncated on resume; trackers never stop a run; the progress bar.

W&B and Trackio need processes of their own: integration/test_trackers.py.
"""

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator
from torch.utils.tensorboard import SummaryWriter

from ddpm_hf.config import ConfigError, TrackingConfig
from ddpm_hf.training.logging import MetricsLog, Progress, Trackers, say

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


def test_rows_are_read_as_they_were_written(log: MetricsLog, path: Path) -> None:
    assert log.rows() == ROWS
    assert MetricsLog(path).rows() == ROWS
    assert path.read_text().count("\n") == len(ROWS)


def test_the_last_line_with_a_column_is_found(path: Path) -> None:
    """Lines without it, without a value, or torn may follow."""
    path.unlink(missing_ok=True)
    log = MetricsLog(path)
    assert log.last("loss") is None
    for row in (
        {"step": 1, "loss": 0.3},
        {"step": 2, "loss": 0.2},
        {"step": 3, "loss": None},
        {"step": 3, "loss_q0": 9},
    ):
        log.append(row)
    with path.open("a") as file:
        file.write('{"step": 4, "loss": 0.')
    assert log.last("loss") == {"step": 2, "loss": 0.2}
    assert log.last("loss_q0") == {"step": 3, "loss_q0": 9}
    assert log.last("score") is None


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


def test_a_first_start_creates_an_empty_log(path: Path) -> None:
    MetricsLog(path).cut_after(0)
    assert path.read_text() == ""


def test_a_line_that_cannot_be_written_does_not_damage_the_next(
    log: MetricsLog, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Full in the middle of a line, and free again before the next."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
    try:
        log.append({"step": 6, "loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "A line of metrics could not be written: [Errno 27] File too large" in caplog.text
    log.append({"step": 7})
    assert log.rows() == [*ROWS, {"step": 7}]
    assert path.read_text().count("\n") == len(ROWS) + 1


@pytest.mark.parametrize("tail", [b"\0" * 9, b"\xff\xfe\n", b"17\n", b"{}\n", b"\n"])
def test_what_a_power_failure_left_at_the_end_is_not_a_line(log: MetricsLog, path: Path, tail: bytes) -> None:
    with path.open("ab") as file:
        file.write(tail)
    assert log.rows() == ROWS
    log.cut_after(99)
    log.append({"step": 6})
    assert path.read_text().splitlines()[-2:] == [json.dumps(ROWS[-1]), '{"step": 6}']


def test_a_last_line_without_newline_is_kept_and_terminated(log: MetricsLog, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    log.cut_after(5)
    log.append({"step": 6})
    assert log.rows() == [*ROWS, {"step": 6}]


def test_only_the_end_of_a_long_log_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a million steps starts as soon as one of ten."""
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(10_000)))
    num_read, load = 0, json.loads

    def counted(line: bytes) -> object:
        nonlocal num_read
        num_read += 1
        return load(line)

    monkeypatch.setattr(json, "loads", counted)
    MetricsLog(path).cut_after(9_997)
    assert num_read == 3
    assert path.read_text().endswith('{"step": 9996}\n{"step": 9997}\n')


def test_a_log_is_never_cut_through_a_link(tmp_path: Path, path: Path) -> None:
    """It is cut in place, and the content of another file may not look like metrics."""
    (tmp_path / "precious").write_text("precious")
    path.symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        MetricsLog(path).cut_after(0)
    assert (tmp_path / "precious").read_text() == "precious"


# ------------------------------------------------------------------------------------------------------- trackers

SETTINGS = {"training": {"num_steps": 6, "learning_rate": 1e-3, "max_grad_norm": None}, "data": {"source": "x"}}


def tensorboard_run(output_dir: Path, first_step: int, num_steps: int) -> None:
    """Log some steps of a run, with the step as the loss."""
    with Trackers(TrackingConfig(trackers=["tensorboard"]), output_dir) as trackers:
        trackers.check()
        trackers.start(first_step, SETTINGS)
        for step in range(first_step + 1, num_steps + 1):
            trackers.log({"step": step, "loss": float(step), "grad_norm": None if step == 2 else 1.0})
        Image.fromarray(np.full((5, 7, 3), 200, np.uint8)).save(output_dir / "grid.png")
        trackers.log_preview(num_steps, output_dir / "grid.png")


def read_tensorboard(output_dir: Path) -> Any:
    accumulator = event_accumulator.EventAccumulator(str(output_dir / "tensorboard"))
    accumulator.Reload()
    return accumulator


@pytest.mark.usefixtures("fresh_accelerate")
def test_tensorboard_gets_metrics_settings_and_previews(tmp_path: Path) -> None:
    tensorboard_run(tmp_path, 0, 3)
    events = read_tensorboard(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [event.step for event in events.Scalars("grad_norm")] == [1, 3]
    assert "step" not in events.Tags()["scalars"]
    (preview,) = events.Images("preview")
    assert (preview.step, preview.height, preview.width) == (3, 5, 7)
    (settings,) = (tmp_path / "tensorboard").rglob("hparams.yml")
    assert yaml.safe_load(settings.read_text()) == {
        "training/num_steps": 6,
        "training/learning_rate": 1e-3,
        "training/max_grad_norm": "null",
        "data/source": "x",
    }


@pytest.mark.usefixtures("fresh_accelerate")
def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path) -> None:
    """Steps 3 and 4 were logged and lost; the curve has each step once."""
    tensorboard_run(tmp_path, 0, 4)
    # TensorBoard orders the files of one second by a count as text, "10" before "9"; no run is resumed that fast.
    time.sleep(1)
    tensorboard_run(tmp_path, 2, 5)
    events = read_tensorboard(tmp_path)
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert len(list((tmp_path / "tensorboard").rglob("hparams.yml"))) == 1


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_tracker_that_fails_is_dropped_and_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorBoard's writer fails as on a full disk, with a key in the message, which must not be printed."""
    monkeypatch.setenv("SOME_API_KEY", "canary-0123456789")
    num_calls = 0

    def fail(*arguments: object, **settings: object) -> None:
        nonlocal num_calls
        num_calls += 1
        raise OSError("no room for canary-0123456789")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    with Trackers(TrackingConfig(trackers=["tensorboard"]), tmp_path) as trackers:
        trackers.start(0, SETTINGS)
        for step in range(1, 4):
            trackers.log({"step": step, "loss": 1.0})
    assert num_calls == 1
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "tensorboard failed (no room for $SOME_API_KEY) and is dropped; training and metrics.jsonl" in warning


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_tracker_that_fails_to_start_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"tracking.trackers: tensorboard failed to start \(.*\); fix it, or"):
        Trackers(TrackingConfig(trackers=["tensorboard"]), tmp_path).start(0, SETTINGS)


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name in the working directory, which W&B creates, is not an installation."""
    monkeypatch.setitem(sys.modules, "trackio", None)
    sentence = r'names trackio, which is not installed; pip install "ddpm_hf\[trackers\]", or remove trackio from'
    with pytest.raises(ConfigError, match=sentence):
        Trackers(TrackingConfig(trackers=["tensorboard", "trackio"]), tmp_path).check()
    (tmp_path / "nowhere").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="names nowhere, which is not installed"):
        Trackers(TrackingConfig(trackers=["nowhere"]), tmp_path).check()  # type: ignore[list-item]


def test_without_trackers_nothing_is_written_or_imported(tmp_path: Path) -> None:
    with Trackers(TrackingConfig(), tmp_path) as trackers:
        trackers.check()
        trackers.start(0, SETTINGS)
        trackers.log({"step": 1, "loss": 1.0})
        trackers.log_preview(1, tmp_path / "grid.png")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- progress


def test_the_bar_shows_what_training_waits_for(
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


@pytest.mark.parametrize("kind", ["closed", "full", "pipe", "missing"])
def test_nothing_that_is_printed_stops_a_run(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed stream, a full disk, a pipe that nobody reads, and a process without stdout."""
    reading, writing = os.pipe()
    os.close(reading)
    streams = {
        "closed": lambda: open(os.devnull, "w"),
        "full": lambda: open("/dev/full", "w"),
        "pipe": lambda: os.fdopen(os.dup(writing), "w"),
        "missing": lambda: None,
    }
    stream = streams[kind]()
    if kind == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    say("lost")
    say("lost, too")
    monkeypatch.undo()
    os.close(writing)
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.close()
