"""Runs that start from a pretrained network."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file

from ddpm_hf.cli.main import train
from tests.conftest import run_arguments
from tests.runs import assert_same_run, metrics_of, stop_with_signal_after, tensors_of

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run that others start from. Read only."""
    run = tmp_path_factory.mktemp("runs") / "base"
    assert train(run_arguments(run, training__num_steps=30, training__checkpoint_every_steps=30)) == 0
    return run


def fine_tuning(run: Path, source: Path, **changes: object) -> list[str]:
    """Return the command line of a run that starts from a network in `source` and keeps all its checkpoints."""
    settings: dict[str, object] = {
        "model__preset": None,
        "model__overrides": {},
        "model__from_pretrained": source,
        "training__checkpoint_every_steps": 1,
        "training__num_checkpoints_kept": 9,
        "training__seed": 5,
    }
    return run_arguments(run, **(settings | changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return float(sum((one[name] - other[name]).square().sum() for name in one).sqrt())  # type: ignore[union-attr]


def test_a_run_starts_from_the_pipeline_of_another(base: Path, tmp_path: Path) -> None:
    """After one step, network and EMA are one update away from the EMA weights of the pipeline."""
    assert train(fine_tuning(tmp_path / "run", base / "pipeline")) == 0
    start = weights(base / "pipeline" / "unet")
    assert all(
        torch.equal(start[name], value) for name, value in weights(base / "checkpoints/step_00000030/ema").items()
    )
    first = tmp_path / "run" / "checkpoints" / "step_00000001"
    # Half the learning rate in the first of two steps of warm-up, for each of 45,289 numbers at most.
    for folder in ("unet", "ema"):
        assert 0 < distance(weights(first / folder), start) <= 0.5e-3 * 45_289**0.5 * 1.001
    fresh = metrics_of(base)[0]["loss"]
    assert metrics_of(tmp_path / "run")[0]["loss"] < 0.95 * fresh


def test_the_network_of_the_folder_decides_and_overrides_change_it(base: Path, tmp_path: Path) -> None:
    assert train(fine_tuning(tmp_path / "run", base / "pipeline", model__overrides={"dropout": 0.25})) == 0
    before = json.loads((base / "pipeline" / "unet" / "config.json").read_text())
    after = json.loads((tmp_path / "run" / "pipeline" / "unet" / "config.json").read_text())
    assert after["dropout"] == 0.25
    assert after["block_out_channels"] == before["block_out_channels"] == [8, 16]


def test_stock_folders_and_networks_alone_start_the_same_run(base: Path, tmp_path: Path) -> None:
    """Bit for bit: other files in the folder change nothing."""
    unet = DDPMPipeline.from_pretrained(base / "pipeline").unet
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "stock")
    unet.save_pretrained(tmp_path / "alone")
    for name, source in (("1", base / "pipeline"), ("2", tmp_path / "stock"), ("3", tmp_path / "alone")):
        assert train(fine_tuning(tmp_path / "runs" / name, source, training__num_steps=3)) == 0
    assert_same_run(tmp_path / "runs" / "1", tmp_path / "runs" / "2", 3)
    assert_same_run(tmp_path / "runs" / "1", tmp_path / "runs" / "3", 3)


def test_a_resumed_run_does_not_read_the_pretrained_folder_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the run that was not stopped, although the folder was removed."""
    shutil.copytree(base / "pipeline", tmp_path / "source")
    arguments = fine_tuning(tmp_path / "run", tmp_path / "source", model__overrides={"dropout": 0.1})
    whole = fine_tuning(tmp_path / "whole", tmp_path / "source", model__overrides={"dropout": 0.1})
    assert train(whole) == 0
    with monkeypatch.context() as patch:
        stop_with_signal_after(3, patch)
        assert train(arguments) == 143
    shutil.rmtree(tmp_path / "source")
    assert train([*arguments, "--dry_run"]) == 0
    assert train(arguments) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run", 6)


def test_a_config_file_decides_the_network_and_not_the_weights(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run as with equal overrides of a preset; on resume the file may be missing."""
    source = tmp_path / "config.json"
    shutil.copy(base / "pipeline" / "unet" / "config.json", source)
    changes: dict[str, Any] = {"model__preset": None, "model__overrides": {}, "model__config_file": source}
    changes |= {"training__num_steps": 30, "training__checkpoint_every_steps": 30}
    with monkeypatch.context() as patch:
        stop_with_signal_after(3, patch)
        assert train(run_arguments(tmp_path / "run", **changes)) == 143
    source.unlink()
    assert train(run_arguments(tmp_path / "run", **changes)) == 0
    assert_same_run(base, tmp_path / "run", 30)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"diffusion__prediction_type": "epsilon"}, "predicts v_prediction, but diffusion.prediction_type is epsilon"),
        ({"model__class_conditional": False}, "has 10 labels, but this run needs none; set model.class_conditional"),
        ({"objective__class_dropout": 0.1}, "needs 11 (the null label included); set objective.class_dropout to 0"),
        ({"data__num_channels": 3}, "takes 1 channels, but this run needs 3; set data.num_channels"),
        ({"data__resolution": 9}, "divides height and width by 2, but 9x9 is not a multiple of 2; change"),
        ({"model__overrides": {"block_out_channels": [8, 24]}}, "weights of other shapes than model.overrides ask"),
        ({"model__from_pretrained": "/nowhere/at/all"}, "model.from_pretrained /nowhere/at/all does not exist; check"),
        ({"model__from_pretrained": "nobody/nothing"}, "is not a local folder and cannot be downloaded from the Hub ("),
    ],
)
def test_a_network_that_does_not_fit_is_refused_before_the_first_step(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], sentence: str
) -> None:
    assert train(fine_tuning(tmp_path / "run", base / "pipeline", **changes)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert sentence in line
    assert not (tmp_path / "run").exists()


def test_a_network_for_another_size_is_trained_on_this_one(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(fine_tuning(tmp_path / "run", base / "pipeline", data__resolution=16, training__num_steps=1)) == 0
    assert "was made for images of 8x8; it is now trained on 16x16." in caplog.text
    assert len(tensors_of(tmp_path / "run" / "checkpoints" / "step_00000001")) > 0
