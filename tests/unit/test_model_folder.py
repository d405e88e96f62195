"""What a path is: every place of a run that stands for a model, and a sentence for every place that does not."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm_hf.config import ConfigError
from ddpm_hf.model_folder import ModelFolder, find_latest, find_model, find_run
from tests import version_0_1

STEP = "checkpoints/step_00000003"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of version 0.1 that stopped after step 3 of 6; the working directory holds it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(version_0_1.RUN, "run")
    return Path("run")


def save_pipeline(folder: Path, step: int = 3) -> None:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "training_summary.json").write_text(json.dumps({"step": step}))


def add_checkpoint(run: Path, step: int) -> Path:
    """Copy the checkpoint of step 3 under the name of another step."""
    copy = run / "checkpoints" / f"step_{step:08d}"
    shutil.copytree(run / STEP, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"step": step}))
    return copy


def test_a_run_that_is_not_finished_stands_for_the_ema_of_its_checkpoint_and_says_so(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = ModelFolder("checkpoint", run / STEP, "ema", run, 3)
    assert find_model(run) == expected
    assert caplog.messages == [f"The run run is not finished; using the EMA weights of step 3 of 6 (run/{STEP}/ema)."]
    for name in ("run/", "./run", "run/checkpoints", "run/checkpoints/"):
        assert find_model(name) == expected


@pytest.mark.parametrize("end", ["", "/"])
@pytest.mark.parametrize("network", ["", "ema", "unet", "ema_sigma_0.050"])
def test_a_checkpoint_stands_for_its_ema_and_each_network_for_itself(
    run: Path, network: str, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"run/{STEP}/{network}".rstrip("/") + end
    expected = ModelFolder("checkpoint", run / STEP, network or "ema", run, 3)
    assert find_model(name) == expected
    absolute = ModelFolder("checkpoint", Path.cwd() / run / STEP, network or "ema", Path.cwd() / run, 3)
    assert find_model(f"~/{name}") == find_model(Path(name).absolute()) == absolute
    Path("link").symlink_to(Path(name).absolute())
    assert find_model("link") == expected
    assert caplog.messages == []


def test_the_working_directory_may_be_in_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / STEP)
    assert find_model(".").weights.samefile("ema")
    assert find_model("..").step == find_model("../..").step == 3
    assert find_model("unet").network == "unet"


def test_a_copied_checkpoint_needs_neither_its_name_nor_its_run(run: Path) -> None:
    shutil.copytree(run / STEP, "best")
    assert find_model("best") == ModelFolder("checkpoint", Path("best"), "ema", None, 3)
    assert find_model("best").evaluation is None


@pytest.mark.parametrize("name", ["run", "run/", "run/pipeline", "run/pipeline/"])
def test_a_run_with_a_pipeline_stands_for_it(run: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    save_pipeline(run / "pipeline")
    assert find_model(name).path == run / "pipeline"
    assert caplog.messages == []


def test_a_run_that_was_trained_on_stands_for_its_pipeline_and_names_the_newer_checkpoint(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_pipeline(run / "pipeline", step=2)
    assert find_model(run).path == run / "pipeline"
    assert caplog.messages == [
        "The run run has trained on since it saved its pipeline at step 2, which is used; give "
        f"run/{STEP} to use step 3."
    ]


@pytest.mark.parametrize("name", ["run/hub", "run/hub/run", "run/hub/run/pipeline"])
def test_the_folder_that_was_pushed_during_training_stands_for_its_pipeline(run: Path, name: str) -> None:
    save_pipeline(run / "hub" / "run" / "pipeline")
    assert find_model(name).path == run / "hub" / "run" / "pipeline"


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (add_checkpoint(run, 5) / "unet" / "config.json").write_text("{}")
    add_checkpoint(run, 4)
    assert find_model(run).step == 4
    assert caplog.messages[0].startswith("Skipped a damaged checkpoint: step_00000005: unet/config.json is damaged")
    assert (run / "checkpoints" / "step_00000005").exists()  # only training sets it aside
    with pytest.raises(ConfigError, match=r"step_00000005 is not a valid checkpoint: unet/config.json .*; give run,"):
        find_model(run / "checkpoints" / "step_00000005" / "ema")
    for step in (3, 4):
        (run / "checkpoints" / f"step_{step:08d}" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"^no checkpoint in run/checkpoints can be used \(.*\); restore one\.$"):
        find_model(run)


def test_files_of_file_managers_and_notebooks_do_not_invalidate_a_checkpoint(run: Path) -> None:
    for name in (".DS_Store", "ema/.DS_Store", "ema/._config.json", "Thumbs.db", ".ipynb_checkpoints/config.yaml"):
        (run / STEP / name).parent.mkdir(exist_ok=True)
        (run / STEP / name).touch()
    assert find_model(run).step == 3
    assert find_latest(run / "checkpoints")[1] == []
    (run / STEP / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"notes.txt does not belong to it"):
        find_model(run / STEP)


def empty(folder: Path) -> None:
    folder.mkdir()


def samples(folder: Path) -> None:
    folder.mkdir()
    (folder / "settings.json").write_text("{}")


def several_runs(folder: Path) -> None:
    for name in ("a", "b", "sweep/c"):
        (folder / name / "checkpoints").mkdir(parents=True)
        (folder / name / "config.yaml").touch()


def several_pipelines(folder: Path) -> None:
    save_pipeline(folder / "a")
    save_pipeline(folder / "b")


def new_run(folder: Path) -> None:
    folder.mkdir()
    text = (
        "# A run of ddpm_hf. `ddpm-hf train --config` of this file repeats it.\ntraining: {checkpoint_every_steps: 7}"
    )
    (folder / "config.yaml").write_text(text)


def unrelated(folder: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.pt").touch()


def pipeline(folder: Path) -> None:
    save_pipeline(folder)
    (folder / "unet").mkdir()


@pytest.mark.parametrize(
    ("make", "place", "sentence"),
    [
        (empty, "", "holds no pipeline (model_index.json), it is empty; give the folder of a run, a checkpoint or a"),
        (samples, "", "holds samples, not a model; give the folder of a run"),
        (several_runs, "", "holds 3 runs, given/a, given/b, given/sweep/c; give one of them."),
        (several_pipelines, "", "holds 2 pipelines, given/a, given/b; give one of them."),
        (new_run, "", "holds a run without a checkpoint; wait for the first one (training.checkpoint_every_steps 7)"),
        (unrelated, "", "holds no pipeline (model_index.json), checkpoint or run, but a.txt, b.txt; give the folder"),
        (unrelated, "/a.txt", "is a file; give its folder"),
        (foreign, "/a.pt", "is a checkpoint of another system; make a pipeline of it with ddpm-hf convert given/a.pt"),
        (pipeline, "/unet", "is only the unet of a pipeline; give given."),
    ],
)
def test_a_folder_without_a_model_is_described(
    make: Callable[[Path], None], place: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("given"))
    with pytest.raises(ConfigError) as error:
        find_model(f"given{place}")
    assert str(error.value).startswith(f"given{place} {sentence}")
    assert str(error.value).count(";") <= 1


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("run/ema_snapshots", "holds stored EMAs; ddpm-hf ema run --length 0.1 makes a pipeline of them."),
        ("run/ema_snapshots/step_00000003", "holds stored EMAs; ddpm-hf ema run --length 0.1"),
        ("run/previews", "is a part of the run run that holds no pipeline (model_index.json) or checkpoint; give run."),
        ("run/checkpoints/step_00000009", "does not exist; run/checkpoints holds step_00000003."),
        ("run/checkpoints/step_00000009/ema", "does not exist; run/checkpoints holds step_00000003."),
        ("broken", "is a broken link; mount the disk that it points to."),
    ],
)
def test_other_places_of_a_run_name_what_to_give(run: Path, name: str, sentence: str) -> None:
    (run / "previews").mkdir()
    Path("broken").symlink_to("gone")
    with pytest.raises(ConfigError) as error:
        find_model(name)
    assert str(error.value).startswith(f"{name} {sentence}")


def test_every_place_in_a_run_leads_to_the_run(run: Path) -> None:
    for name in ("run", "run/checkpoints", f"run/{STEP}", f"run/{STEP}/ema/", "run/ema_snapshots"):
        assert find_run(name) == run
    assert find_run(os.getcwd()) is None
