"""Runs of a Trainer on images in memory: the same network as from files, exact resume, and what is recorded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from ddpm_hf.cli.main import data as data_command
from ddpm_hf.cli.main import evaluate, train
from ddpm_hf.config import EVAL_DATASET, TRAIN_DATASET, ConfigError, RunConfig, load_config, parse_command_line
from ddpm_hf.data import DataError
from ddpm_hf.distributed import TrainingStopped
from ddpm_hf.hub.card import make_card
from ddpm_hf.training.trainer import Trainer
from tests.conftest import run_arguments
from tests.distributed.ranks import two_ranks
from tests.runs import EVERYTHING_RANDOM, assert_same_run, loss_columns, metrics_of, stop_with_signal_after
from tests.unit.data.helpers import encode, write_files

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
# Twelve classes, in the order of the files in a folder of them: 0, 1, 10, 11, 2, ...
LABELS = sorted([row // 2 for row in range(24)], key=str)


def config_of(folder: Path, **changes: Any) -> RunConfig:
    config, _ = parse_command_line(run_arguments(folder, data__source="photos"), "test")
    settings = {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(config, {"data.source": ""} | settings)


def fit(folder: Path, dataset: Any, eval_dataset: Any = None, **changes: Any) -> Trainer:
    with Trainer(config_of(folder, **changes), train_dataset=dataset, eval_dataset=eval_dataset) as trainer:
        trainer.fit()
    return trainer


def write_folder(folder: Path, pixels: np.ndarray, labels: Sequence[int]) -> Path:
    files = {f"{label}/{row:02}.png": encode(pixels[row]) for row, label in enumerate(labels)}
    return write_files(folder, files)


def data_sets() -> dict[str, Any]:
    pictures = [Image.fromarray(image) for image in PIXELS]
    return {
        "array": (PIXELS, np.array(LABELS)),
        "tensors": TensorDataset(torch.from_numpy(PIXELS)[:, None] / 127.5 - 1, torch.tensor(LABELS)),
        "pictures": [(picture, str(label)) for picture, label in zip(pictures, LABELS, strict=True)],
        "datasets": datasets.Dataset.from_dict({"image": pictures, "label": LABELS}),
    }


def test_images_in_memory_train_the_same_network_as_a_folder_of_them(tmp_path: Path) -> None:
    """Bit for bit: order, flips, labels, the validation set and its loss depend only on the images."""
    source = write_folder(tmp_path / "x", PIXELS, LABELS)
    changes = EVERYTHING_RANDOM | {"data__validation_fraction": 0.25, "training__validate_every_steps": 3}
    assert train(run_arguments(tmp_path / "folder", **changes, data__source=source)) == 0
    expected = json.loads((tmp_path / "folder/pipeline/model_index.json").read_text())["class_names"]
    assert expected["10"] == "10"
    for kind, dataset in data_sets().items():
        trainer = fit(tmp_path / kind, dataset, **changes)
        assert trainer.class_names == expected
        assert_same_run(tmp_path / "folder", tmp_path / kind, 6)


def test_an_evaluation_set_gives_the_validation_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """That of the same images in the folder of a split."""
    for split, rows in (("train", slice(0, None, 2)), ("val", slice(1, None, 2))):
        write_folder(tmp_path / "x" / split, PIXELS[rows], LABELS[rows])
    validate = {"training__validate_every_steps": 3}
    source = {"data__source": tmp_path / "x", "data__validation_split": "validation"}
    assert train(run_arguments(tmp_path / "folder", **validate, **source)) == 0
    training, validation = ((PIXELS[start::2], np.array(LABELS[start::2])) for start in (0, 1))
    fit(tmp_path / "memory", training, validation, **validate)
    assert_same_run(tmp_path / "folder", tmp_path / "memory", 6)
    # Beside files, whose own validation set it replaces.
    fit(tmp_path / "mixed", None, validation, **validate, data__source=tmp_path / "x", data__validation_fraction=0.25)
    assert_same_run(tmp_path / "folder", tmp_path / "mixed", 6)
    assert "eval_dataset replaces data.validation_fraction 0.25." in caplog.text


def test_a_run_resumes_exactly_with_the_same_images_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = data_sets()["array"]
    fit(tmp_path / "whole", dataset, **EVERYTHING_RANDOM)
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_with_signal_after(3, patch)
        fit(tmp_path / "run", dataset, **EVERYTHING_RANDOM)
    files = {path.name for path in (tmp_path / "run").rglob("*")}
    fewer = (PIXELS[:-1], np.array(LABELS[:-1]))
    for other, sentence in (
        (
            fewer,
            f"train_dataset has 23 training images, but the run in {tmp_path / 'run'} started with 24; pass the same",
        ),
        ((PIXELS[::-1], np.array(LABELS)), "train_dataset has different images or labels, but the run in"),
        ((PIXELS, np.array(LABELS[::-1])), "train_dataset has different images or labels, but the run in"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            fit(tmp_path / "run", other, **EVERYTHING_RANDOM)
    with pytest.raises(ConfigError, match=r"data\.source is not set; set it, or pass the images as train_dataset"):
        fit(tmp_path / "run", None, **EVERYTHING_RANDOM)
    source = write_folder(tmp_path / "x", PIXELS, LABELS)
    with pytest.raises(ConfigError, match=f"data.source was '{TRAIN_DATASET}', is '{source}'"):
        fit(tmp_path / "run", None, **EVERYTHING_RANDOM, data__source=source)
    assert files == {path.name for path in (tmp_path / "run").rglob("*")}
    fit(tmp_path / "run", data_sets()["tensors"], **EVERYTHING_RANDOM)  # the same images in another type
    assert_same_run(tmp_path / "whole", tmp_path / "run", 6)


def test_the_images_replace_the_settings_of_other_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"data__split": "test", "data__streaming": True, "data__resolution": 8, "data__num_channels": 1}
    trainer = fit(tmp_path / "run", data_sets()["array"], **changes, data__source="photos")
    assert "train_dataset replaces data.source photos, data.split test, data.streaming true." in caplog.text
    assert [trainer.config.data.source, trainer.config.data.split] == [TRAIN_DATASET, "train"]
    assert len(trainer.images) == 24  # type: ignore[arg-type]
    caplog.clear()
    fit(tmp_path / "run", data_sets()["array"], training__num_steps=8, data__resolution=8, data__num_channels=1)
    assert "replaces" not in caplog.text


def test_a_configuration_of_a_run_in_memory_needs_its_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """On the command line too; the whole configuration can be read and used again."""
    training, validation = ((PIXELS[start::2], np.array(LABELS[start::2])) for start in (0, 1))
    fit(tmp_path / "run", training, validation, training__validate_every_steps=3)
    path = tmp_path / "run" / "config.yaml"
    for command in (train, data_command):
        assert command(["--config", str(path)]) == 2
        assert (
            f"the images of the run were in memory ({TRAIN_DATASET}); pass them to Trainer as train_dataset, or set"
            in (capsys.readouterr().err)
        )
    config = load_config(path, {"training.output_dir": str(tmp_path / "again")})
    for datasets_given in ({}, {"train_dataset": training}, {"eval_dataset": validation}):
        with pytest.raises(ConfigError, match="the images of the run were in memory"):
            Trainer(config, **datasets_given)
    caplog.clear()
    trainer = Trainer(config, train_dataset=training, eval_dataset=validation)
    trainer.fit()
    assert "replace" not in caplog.text
    assert_same_run(tmp_path / "run", tmp_path / "again", 6)


def test_a_run_in_memory_is_published_and_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The card names no data set; an evaluation is given the images as files."""
    training, validation = ((PIXELS[start::2], np.array(LABELS[start::2])) for start in (0, 1))
    fit(tmp_path / "run", training, validation)
    pipeline = tmp_path / "run" / "pipeline"
    summary = json.loads((pipeline / "training_summary.json").read_text())
    assert summary["data"] == {"source": TRAIN_DATASET, "num_images": 12, "num_classes": 12}
    card = make_card(pipeline, repo_id="user/model").text
    assert "12 images." in card
    assert "memory" not in card
    source = write_folder(tmp_path / "x", PIXELS[::2], LABELS[::2])
    bound = ["--metrics", "bits_per_dim", "--num_terms", "2", "--num_samples", "2", "--num_inference_steps", "2"]
    assert evaluate([str(tmp_path / "run"), "--data", str(source), *bound, "--cpu"]) == 0
    assert EVAL_DATASET not in capsys.readouterr().out
    assert evaluate([str(tmp_path / "run"), "--data", TRAIN_DATASET, *bound, "--cpu"]) == 2
    assert "the images of the run were in memory" in capsys.readouterr().err


def test_scores_are_measured_on_images_in_memory(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "evaluation__score_every_steps": 3,
        "evaluation__score_metric": "bits_per_dim",
        "evaluation__score_num_terms": 2,
        "model__class_conditional": False,
    }
    fit(tmp_path / "run", PIXELS[:12], PIXELS[12:], **changes)
    assert [row["step"] for row in metrics_of(tmp_path / "run") if "score" in row] == [3, 6]


def test_a_validation_loss_needs_a_validation_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pass eval_dataset, or set data"):
        fit(tmp_path / "run", PIXELS, training__validate_every_steps=3)


def test_images_that_cannot_be_used_leave_no_folder(tmp_path: Path) -> None:
    for dataset in ([], PIXELS.astype(np.int64), "photos", PIXELS[:1], (image for image in PIXELS)):
        with pytest.raises(DataError):
            Trainer(config_of(tmp_path / "run", model__class_conditional=False), train_dataset=dataset)
        assert not (tmp_path / "run").exists()


def train_in_memory(folder: str, kind: str) -> int:
    """A script of a user, on each rank."""
    fit(Path(folder), data_sets()[kind], training__validate_every_steps=3, data__validation_fraction=0.25)
    return 0


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["array", "pictures"])
def test_two_processes_have_the_loss_curve_of_one(tmp_path: Path, kind: str) -> None:
    train_in_memory(str(tmp_path / "one"), kind)
    with two_ranks(tmp_path, train_in_memory, str(tmp_path / "two"), kind) as processes:
        for process in processes:
            process.join(120)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "log_0.err").read_text()
    np.testing.assert_allclose(loss_columns(tmp_path / "one"), loss_columns(tmp_path / "two"), rtol=1e-5)
