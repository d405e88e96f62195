"""W&B offline and Trackio on the local disk, in processes of their own."""

import json
import os
import sqlite3
from pathlib import Path

import pytest

from tests.conftest import run_arguments, run_process

KEY = "canary7890123456789012345678901234567890"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without any login."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TRACKIO_DIR", str(home / "trackio"))
    return home


def arguments(run: Path, trackers: list[str], **changes: object) -> list[str]:
    preview = {"preview__every_steps": 2, "preview__num_images": 2, "preview__num_inference_steps": 1}
    return ["train_ddpm.py", *run_arguments(run, tracking__trackers=trackers, **preview, **changes)]


@pytest.mark.slow
def test_wandb_without_a_login_is_refused_before_training(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    result = run_process([*arguments(tmp_path / "run", ["wandb"]), "--dry_run"])
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1] == (
        "error: tracking.trackers names wandb, but there is no login; run `wandb login`, set WANDB_API_KEY, or set "
        "WANDB_MODE to offline."
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_wandb_offline_continues_one_run_and_stores_no_key(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run = tmp_path / "run"
    for num_steps in (4, 6):
        result = run_process(arguments(run, ["wandb"], training__num_steps=num_steps))
        assert result.returncode == 0, result.stderr
    run_id = json.loads((run / "trackers.json").read_text())["id"]
    folders = sorted((run / "wandb").glob(f"offline-run-*-{run_id}"))
    assert len(folders) == 2
    # In the file that W&B uploads, keys and values are text, each after a byte with its length.
    contents = [path.read_bytes() for folder in folders for path in folder.glob("run-*.wandb")]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        content = contents[row["step"] > 4]
        assert json.dumps(row["loss"]).encode() in content
        assert b"images_per_second" in content
        # The step is a value: W&B would drop a row with a step of its own that it has seen.
        assert b"\x04step\x82\x01\x01" + json.dumps(row["step"]).encode() in content
    assert len(list((run / "wandb").rglob("media/images/preview_*.png"))) == 3
    written = [path for folder in (run, home) for path in folder.rglob("*") if path.is_file()]
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []
    assert KEY not in result.stdout + result.stderr


@pytest.mark.slow
def test_trackio_continues_one_run(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    run = tmp_path / "run"
    for num_steps in (4, 6):
        result = run_process(arguments(run, ["trackio"], training__num_steps=num_steps, tracking__run_name="digits"))
        assert result.returncode == 0, result.stderr
    run_id = json.loads((run / "trackers.json").read_text())["id"]
    with sqlite3.connect(home / "trackio" / "ddpm_hf.db") as database:
        rows = database.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
    assert {name for _, name, _, _ in rows} == {f"digits-{run_id}"}
    assert len({identity for identity, _, _, _ in rows}) == 1
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {step: json.loads(values)["loss"] for _, _, step, values in rows if "loss" in json.loads(values)}
    assert losses == {row["step"]: row["loss"] for row in metrics}
    assert sorted(step for _, _, step, values in rows if "preview" in json.loads(values)) == [2, 4, 6]
