"""What a pipeline says of its training is what happened, and nothing of the machine's folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DModel

from ddpm_hf.config import DataConfig, ObjectiveConfig, RunConfig, TrainingConfig
from ddpm_hf.training.record import summarize
from tests.conftest import tiny_unet

ROWS = [
    {"step": 10, "num_images": 80, "loss": 0.9, "images_per_second": 40.0},
    {"step": 10, "num_images": 80, "score_metric": "fid", "score": 30.0},
    {"step": 25, "num_images": 200, "loss": 0.5, "images_per_second": 60.0},
    {"step": 25, "num_images": 200, "validation_loss": 0.6},
]


class Images:
    """A training set of three images."""

    def __len__(self) -> int:
        return 3


def summary(source: str, metrics: list[Mapping[str, Any]], unet: UNet2DModel | None = None, **objective: float) -> Any:
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


def test_counts_and_times_are_those_of_the_metrics() -> None:
    """80 images at 40 a second and 120 at 60; the lines of scores and validation are no training."""
    content = summary("user/images", ROWS)
    assert content["seconds"] == 80 / 40 + 120 / 60
    assert (content["step"], content["num_steps"], content["num_images_seen"]) == (25, 100, 200)
    assert content["loss"] == 0.5
    assert content["score"] == {"score_metric": "fid", "score": 30.0}
    assert content["num_parameters"] == sum(parameter.numel() for parameter in tiny_unet().parameters())
    assert content["device"]


def test_a_run_without_a_line_of_metrics_says_so() -> None:
    content = summary("user/images", [])
    assert (content["seconds"], content["loss"], content["score"]) == (0, None, None)


@pytest.mark.parametrize(("dropout", "num_classes"), [(0.0, 4), (0.1, 3)])
def test_the_null_label_is_no_class(dropout: float, num_classes: int) -> None:
    assert (
        summary("x/y", [], tiny_unet(num_class_embeds=4), class_dropout=dropout)["data"]["num_classes"] == num_classes
    )


def test_of_a_path_only_the_name_is_told(tmp_path: Path) -> None:
    source = tmp_path / "holiday"
    source.mkdir()
    assert summary(str(source), [])["data"] == {"source": "holiday", "num_images": 3, "num_classes": None}
    assert summary("user/images", [])["data"]["source"] == "user/images"
