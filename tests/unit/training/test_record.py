"""What a pipeline says of its training is what happened, and nothing of the machine's folders."""

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DModel

from ddpm_hf.config import DataConfig, ObjectiveConfig, RunConfig, TrainingConfig
from ddpm_hf.training.logging import MetricsLog
from ddpm_hf.training.run_dir import summarize
from tests.conftest import tiny_unet

ROWS: list[dict[str, Any]] = [
    {"step": 10, "num_images": 80, "loss": 0.9, "seconds": 2.0},
    {"step": 10, "num_images": 80, "score_metric": "fid", "score": 30.0},
    {"step": 25, "num_images": 200, "loss": 0.5, "seconds": 4.5},
    {"step": 25, "num_images": 200, "validation_loss": 0.6},
]


class Images:
    """A training set of three images."""

    def __len__(self) -> int:
        return 3


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    return MetricsLog(tmp_path / "metrics.jsonl")


def summary(source: str, metrics: MetricsLog, unet: UNet2DModel | None = None, **objective: float) -> Any:
    config = RunConfig(
        data=DataConfig(source=source),
        objective=ObjectiveConfig(**objective),
        training=TrainingConfig(num_steps=100, train_batch_size=8),
    )
    content = summarize(
        config,
        25,
        images=Images(),  # type: ignore[arg-type]
        unet=unet or tiny_unet(),
        num_processes=2,
        metrics=metrics,
    )
    return json.loads(json.dumps(content, allow_nan=False))


def test_counts_and_times_are_those_of_the_metrics(log: MetricsLog) -> None:
    for row in ROWS:
        log.append(row)
    content = summary("user/images", log)
    assert content["seconds"] == 4.5
    assert (content["step"], content["num_steps"], content["num_images_seen"]) == (25, 100, 200)
    assert content["loss"] == 0.5
    assert content["score"] == {"score_metric": "fid", "score": 30.0}
    assert content["num_parameters"] == sum(parameter.numel() for parameter in tiny_unet().parameters())
    assert content["device"]


def test_a_run_without_a_line_of_metrics_says_so(log: MetricsLog) -> None:
    content = summary("user/images", log)
    assert (content["seconds"], content["loss"], content["score"]) == (None, None, None)


@pytest.mark.parametrize(("dropout", "num_classes"), [(0.0, 4), (0.1, 3)])
def test_the_null_label_is_no_class(log: MetricsLog, dropout: float, num_classes: int) -> None:
    assert (
        summary("x/y", log, tiny_unet(num_class_embeds=4), class_dropout=dropout)["data"]["num_classes"] == num_classes
    )


def test_of_a_path_only_the_name_is_told(log: MetricsLog, tmp_path: Path) -> None:
    source = tmp_path / "holiday"
    source.mkdir()
    assert summary(str(source), log)["data"] == {"source": "holiday", "num_images": 3, "num_classes": None}
    assert summary("user/images", log)["data"]["source"] == "user/images"
