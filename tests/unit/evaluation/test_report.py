"""evaluation.json, nearest images, and the score during training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_hf.config import EvaluationConfig, RunConfig, TrainingConfig
from ddpm_hf.data import ImageSet
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.evaluation import features as features_module
from ddpm_hf.evaluation import metrics
from ddpm_hf.evaluation.features import Moments, moments_of
from ddpm_hf.evaluation.generate import Sampler, sample_images
from ddpm_hf.evaluation.likelihood import ReverseProcess, variational_bound
from ddpm_hf.evaluation.metrics import Metric, frechet_distance
from ddpm_hf.evaluation.report import (
    SmallSampleScorer,
    as_json,
    choose_images,
    table,
)
from tests.conftest import tiny_unet
from tests.feature_networks import ChannelStatistics, pooled
from tests.unit.evaluation.gaussian_pipeline import gaussian_images, gaussian_pipeline


def random_images(count: int, shape: tuple[int, int, int] = (3, 4, 4), seed: int = 0) -> ImageSet:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)
    return ImageSet(pixels, None, None, np.arange(count))


def test_images_are_drawn_from_the_whole_set_by_the_seed() -> None:
    """Not the first ones, and never one twice; that none of the last 25 is drawn has odds of 1 in 10^9."""
    images = random_images(100)
    chosen = choose_images(images, 50, 0).indices
    assert len(set(chosen.tolist())) == 50
    assert chosen.max() >= 75
    np.testing.assert_array_equal(choose_images(images, 50, 0).indices, chosen)
    assert (choose_images(images, 50, 1).indices != chosen).any()
    assert choose_images(images, None, 0) is images
    with pytest.raises(ValueError, match="num_images is 101, but there are 100 images"):
        choose_images(images, 101, 0)


def test_the_table_and_evaluation_json_contain_a_metric() -> None:
    fid = Metric(name="fid", value=3.17, standard_error=None, features="inception", num_samples=50_000, num_reference=7)
    assert table([fid]).splitlines() == [
        "metric  value   standard error  images  compared with  features",
        "fid     3.1700                  50,000  7              inception",
    ]
    copies = Metric(
        name="memorization", value=0.02, standard_error=0.01, features="pixels", num_samples=100, num_reference=7,
        validation_value=0.0, num_validation=3,
    )  # fmt: skip
    assert table([fid, copies]).splitlines()[::2] == [
        "metric        value   standard error  images  compared with  of validation images  features",
        "memorization  0.0200  0.01            100     7              0.0000                pixels",
    ]
    settings = {"schema_version": 1, "seed": 5, "scheduler": "DDIMScheduler", "num_inference_steps": 9}
    content = json.loads(as_json([fid], None, settings=settings, data={"source": "x"}, bound_settings={}))
    (row,) = content["metrics"]
    assert "validation_value" not in row
    assert (row["value"], row["seed"], row["sampler"], row["num_inference_steps"]) == (3.17, 5, "DDIMScheduler", 9)
    assert content["schema_version"] == 1
    assert content["bound"] is None
    assert set(content["versions"]) == {"ddpm_hf", "torch", "diffusers", "numpy", "python"}


def score_config(**changes: Any) -> RunConfig:
    evaluation = {"score_every_steps": 1, "batch_size": 4, "num_inference_steps": 3, "score_num_samples": 6}
    return RunConfig(evaluation=EvaluationConfig(**evaluation | changes), training=TrainingConfig(seed=7))


def test_the_score_of_validation_images_is_their_bound() -> None:
    validation = gaussian_images(9)
    pipeline = gaussian_pipeline()
    pipeline.unet.train()
    config = score_config(score_metric="bits_per_dim", score_num_terms=4)
    score = SmallSampleScorer(config)(pipeline, None, validation)
    bound = variational_bound(ReverseProcess(pipeline), choose_images(validation, 6, 7), seed=7, num_terms=4)
    assert score.value == pytest.approx(bound.bits_per_dim, rel=1e-12)
    assert score.standard_error == pytest.approx(bound.standard_error, rel=1e-12)
    assert score.lower_is_better
    assert pipeline.unet.training
    assert score.row() == {
        "score": score.value, "score_standard_error": score.standard_error, "score_metric": "bits_per_dim",
        "score_features": None, "score_num_samples": 6, "score_num_steps": 4, "score_seed": 7,
    }  # fmt: skip


def test_the_score_in_features_compares_samples_with_training_images() -> None:
    training, size = gaussian_images(9, (4, 4)), (4, 4)
    config = score_config(score_metric="frechet_distance", score_features="tests.feature_networks:pooled")
    pipeline = gaussian_pipeline(size)
    score = SmallSampleScorer(config)(pipeline, training, training)
    sampler = Sampler(num_inference_steps=3, eta=config.evaluation.eta)
    samples = sample_images(sampler.prepare(pipeline), sampler, seed=7, indices=range(6), batch_size=100)

    def moments(images: np.ndarray) -> Moments:
        return moments_of(pooled()(torch.from_numpy(images)).numpy())

    expected = frechet_distance(moments(samples.transpose(0, 3, 1, 2)), moments(training.images))
    assert score.value == pytest.approx(expected, rel=1e-6)
    assert (score.lower_is_better, score.row()["score_standard_error"]) == (True, None)
    features = "tests.feature_networks:pooled"
    assert score.kind == (
        f"frechet_distance in the features of {features}, 6 images, 3 steps, seed 7, scheduler "
        "GaussianDiffusionScheduler, num_inference_steps 3, eta 0.0, timestep_spacing leading, guidance_scale 1.0, "
        "guidance_rescale 0.0, analytic_variance False"
    )


def test_later_scores_open_no_network_and_read_the_training_images_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their features stay in memory: the second score opens no file either."""
    monkeypatch.setattr(features_module, "_default_cache_dir", lambda: tmp_path)
    monkeypatch.setattr(ChannelStatistics, "num_images", 0)
    opened: list[int] = []
    opener = metrics.open_features
    monkeypatch.setattr(metrics, "open_features", lambda *arguments: opened.append(1) or opener(*arguments))
    training = gaussian_images(9, (4, 4))
    config = score_config(
        score_metric="frechet_distance", score_features="tests.feature_networks:ChannelStatistics", score_num_samples=8
    )
    scorer, pipeline = SmallSampleScorer(config), gaussian_pipeline((4, 4))
    scores = [scorer(pipeline, training, training).value]
    first = ChannelStatistics.num_images
    monkeypatch.setattr(ImageSet, "take", lambda *_: pytest.fail("the training images were read again"))
    scores.append(scorer(pipeline, training, training).value)
    assert scores[0] == scores[1]
    assert (first, ChannelStatistics.num_images - first, opened) == (9 + 8 + 1, 8, [1])


def test_scores_of_other_settings_are_of_another_kind() -> None:
    """Settings that do not affect a score do not change its kind."""
    training = gaussian_images(9, (8, 8))
    scheduler = GaussianDiffusionScheduler.create(num_train_timesteps=10, prediction_type="sample")
    pipeline = GaussianDiffusionPipeline(tiny_unet(num_class_embeds=3), scheduler, has_null_label=True)
    features = {"score_metric": "frechet_distance", "score_features": "tests.feature_networks:pooled"}

    def kind(scheduler: GaussianDiffusionScheduler = scheduler, **changes: Any) -> str:
        pipeline.scheduler = scheduler
        config = score_config(**features | {"num_inference_steps": 1, "score_num_samples": 5} | changes)
        return SmallSampleScorer(config)(pipeline, training, training).kind

    spaced = GaussianDiffusionScheduler.create(num_train_timesteps=10, timestep_spacing="trailing")
    kinds = [
        kind(),
        kind(num_inference_steps=2),
        kind(eta=1.0),
        kind(guidance_scale=1.5),
        kind(score_num_samples=6),
        kind(score_features="tests.feature_networks:pooled_again"),
        kind(spaced),
    ]
    assert len(set(kinds)) == len(kinds)
    assert kind(batch_size=2, num_samples=1, score_every_steps=2) == kinds[0]


def test_bounds_of_other_numbers_of_terms_are_of_another_kind() -> None:
    def kind(**changes: int) -> str:
        config = score_config(**{"score_metric": "bits_per_dim", "score_num_terms": 4} | changes)
        pipeline = gaussian_pipeline(num_train_timesteps=20)
        return SmallSampleScorer(config)(pipeline, None, gaussian_images(9)).kind

    assert kind() == "bits_per_dim, 6 images, 4 terms, seed 7"
    assert len({kind(), kind(score_num_terms=5), kind(score_num_samples=5)}) == 3
    assert kind(eta=1.0) == kind(), "no sample is drawn"
