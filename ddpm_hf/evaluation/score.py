"""A score of few samples while training lasts: biased, cheap, and comparable within one run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpm_hf.config import RunConfig
from ddpm_hf.data import ImageSet
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation.evaluate import bits_per_dim, choose_images, fidelity
from ddpm_hf.evaluation.metrics import BITS_PER_DIM, LOWER_IS_BETTER, Metric
from ddpm_hf.evaluation.ranks import ALONE, Ranks
from ddpm_hf.evaluation.sampling import Sampler, sample_images


@dataclass(frozen=True, kw_only=True)
class SmallSampleScore:
    """A score and what it is a score of.

    Args:
        metric: One of metrics.METRICS.
        features: The network whose features are compared; None for bits per dimension.
        value: The number.
        standard_error: NaN where it is not known.
        num_samples: Samples drawn, or held-out images.
        num_steps: Sampling steps, or terms of the bound.
        seed: Of the samples, or of the noise.
        sampler: How the samples were drawn, setting by setting; None for bits per dimension.
    """

    metric: str
    features: str | None
    value: float
    standard_error: float
    num_samples: int
    num_steps: int
    seed: int
    sampler: Mapping[str, Any] | None

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower number is the better one."""
        return self.metric in LOWER_IS_BETTER

    @property
    def kind(self) -> str:
        """What was measured and how: all that the value depends on but the weights and the images."""
        features = "" if self.features is None else f" in the features of {self.features}"
        steps = "terms" if self.features is None else "steps"
        what = f"{self.metric}{features}, {self.num_samples} images, {self.num_steps} {steps}, seed {self.seed}"
        return ", ".join([what, *(f"{name} {value}" for name, value in (self.sampler or {}).items())])

    def row(self) -> dict[str, Any]:
        """Returns what metrics.jsonl says of it; numbers that are not finite are null."""
        numbers = {"score": self.value, "score_standard_error": self.standard_error}
        return {name: value if np.isfinite(value) else None for name, value in numbers.items()} | {
            "score_metric": self.metric,
            "score_features": self.features,
            "score_num_samples": self.num_samples,
            "score_num_steps": self.num_steps,
            "score_seed": self.seed,
        }


def small_sample_score(
    pipeline: GaussianDiffusionPipeline,
    training: ImageSet | Any,
    held_out: ImageSet,
    config: RunConfig,
    ranks: Ranks = ALONE,
) -> SmallSampleScore:
    """Collective: measures evaluation.score_metric, each process its part of the images.

    Args:
        pipeline: With the weights to judge; mode and scheduler are left as they are.
        training: What samples are compared with; unread for bits per dimension, and may then be a stream.
        held_out: What bits per dimension are of.
        config: The configuration of the run.
        ranks: The processes.
    """
    evaluation = config.evaluation
    sampler = Sampler(
        num_inference_steps=evaluation.num_inference_steps,
        eta=evaluation.eta,
        guidance_scale=evaluation.guidance_scale,
    )
    metric: Metric | None
    prepared, is_bound = sampler.prepare(pipeline), evaluation.score_metric == BITS_PER_DIM
    num_samples = min(evaluation.score_num_samples, len(held_out)) if is_bound else evaluation.score_num_samples
    if is_bound:
        metric = _bits_per_dim(prepared, held_out, num_samples, config, ranks)
    else:
        metric = _compare(prepared, sampler, training, num_samples, config, ranks)
    # Its labels are all that the network has.
    drawn = {name: value for name, value in sampler.to_dict(prepared).items() if name != "labels"}
    known = [] if metric is None else [(metric.value, metric.standard_error)]
    value, standard_error = ranks.gather(np.array(known, np.float64).reshape(-1, 2))[0].tolist()
    return SmallSampleScore(
        metric=evaluation.score_metric,
        features=None if is_bound else evaluation.score_features,
        value=value,
        standard_error=standard_error,
        num_samples=num_samples,
        num_steps=evaluation.score_num_terms if is_bound else evaluation.num_inference_steps,
        seed=config.training.seed,
        sampler=None if is_bound else drawn,
    )


def _bits_per_dim(
    pipeline: GaussianDiffusionPipeline, held_out: ImageSet, num_images: int, config: RunConfig, ranks: Ranks
) -> Metric:
    """Collective: computes the bound of some held-out images."""
    seed = config.training.seed
    metric, _ = bits_per_dim(
        pipeline,
        choose_images(held_out, num_images, seed),
        seed=seed,
        num_terms=config.evaluation.score_num_terms,
        batch_size=config.evaluation.batch_size,
        ranks=ranks,
    )
    return metric


def _compare(
    pipeline: GaussianDiffusionPipeline,
    sampler: Sampler,
    training: ImageSet,
    num_samples: int,
    config: RunConfig,
    ranks: Ranks,
) -> Metric | None:
    """Collective: draws samples, each process its part, and compares them on rank 0; None elsewhere."""
    evaluation, seed = config.evaluation, config.training.seed
    mine = sample_images(
        pipeline, sampler, seed=seed, indices=ranks.part(num_samples), batch_size=evaluation.batch_size
    )
    metrics = fidelity(
        ranks.gather(mine),
        training,
        [evaluation.score_metric],
        features=evaluation.score_features,
        batch_size=evaluation.batch_size,
        device=pipeline.device,
        seed=seed,
        ranks=ranks,
    )
    return metrics[0] if metrics else None
