"""evaluation.json, the table of metrics, and the score that is measured during training."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_hf import distributed
from ddpm_hf.config import RunConfig
from ddpm_hf.data import ImageSet
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation.features import FeatureNetwork, ReferenceStatistics
from ddpm_hf.evaluation.generate import Images, Sampler, sample_images
from ddpm_hf.evaluation.likelihood import ReverseProcess, VariationalBound, variational_bound
from ddpm_hf.evaluation.metrics import (
    BITS_PER_DIM,
    LOWER_IS_BETTER,
    SCHEMA_VERSION,
    Metric,
    measure_fidelity,
    open_network_for,
)
from ddpm_hf.rng import numpy_generator

_OF_VALIDATION = ("validation_value", "num_validation")
_LIBRARIES = ("ddpm_hf", "torch", "diffusers", "numpy")


def as_json(
    metrics: Sequence[Metric],
    bound: VariationalBound | None,
    *,
    settings: dict[str, Any],
    data: dict[str, Any],
    bound_settings: dict[str, Any],
    flags: Sequence[str] = (),
    memorization: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the content of evaluation.json.

    Args:
        metrics: The measured metrics.
        bound: The terms behind bits per dimension, if they were measured.
        settings: Everything the samples depend on; see `generate.settings_of`.
        data: Source, fingerprint and number of the images.
        bound_settings: How bits per dimension were computed.
        flags: Command-line flags of the evaluation, without local paths.
        memorization: What memorization found, in pixels and in features.
    """
    sampling = {"seed": settings["seed"], "sampler": settings["scheduler"]}
    sampling["num_inference_steps"] = settings["num_inference_steps"]
    rows = [
        {name: value for name, value in asdict(metric).items() if value is not None or name not in _OF_VALIDATION}
        | ({"seed": settings["seed"], **bound_settings} if metric.name == BITS_PER_DIM else sampling)
        for metric in metrics
    ]
    content = {
        "schema_version": SCHEMA_VERSION,
        "metrics": rows,
        "data": data,
        "sampling": {name: value for name, value in settings.items() if name != "schema_version"},
        "flags": list(flags),
        "bound": None if bound is None else bound.to_dict(),
        **({"memorization": list(memorization)} if memorization else {}),
        "versions": {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
    }
    return json.dumps(content, indent=2) + "\n"


def table(metrics: Sequence[Metric]) -> str:
    """Return the metrics as a text table."""
    rows: list[tuple[str, ...]] = [
        ("metric", "value", "standard error", "images", "compared with", "of validation images", "features")
    ]
    for metric in metrics:
        error = "" if metric.standard_error is None else f"{metric.standard_error:.2g}"
        reference = f"{metric.num_reference:,}" if metric.num_reference else ""
        validation = "" if metric.validation_value is None else f"{metric.validation_value:.4f}"
        numbers = (f"{metric.value:.4f}", error, f"{metric.num_samples:,}", reference, validation)
        rows.append((metric.name, *numbers, metric.features or ""))
    if not any(row[5] for row in rows[1:]):
        rows = [row[:5] + row[6:] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def choose_images(images: ImageSet, num_images: int | None, seed: int) -> ImageSet:
    """Return a random subset of a set of images; None takes all. Not the first ones: many sets are sorted by class.

    Raises:
        ValueError: The set has fewer images.
    """
    if num_images is None or num_images == len(images):
        return images
    if not 0 < num_images < len(images):
        raise ValueError(f"num_images is {num_images}, but there are {len(images)} images; use 1 to {len(images)}.")
    drawn = np.sort(numpy_generator(seed, "evaluation_images").permutation(len(images))[:num_images])
    return replace(images, indices=images.indices[drawn])


def real_images(images: ImageSet, positions: NDArray[np.int64]) -> Images:
    """Return images of a set in the layout of samples: uint8 (number, height, width, channels)."""
    return np.ascontiguousarray(images.pictures(positions).transpose(0, 2, 3, 1))


@dataclass(frozen=True, kw_only=True)
class SmallSampleScore:
    """A score of few images, measured during training: biased, cheap, and comparable within one run.

    Args:
        metric: Name from metrics.METRICS.
        features: Feature network; None for bits per dimension.
        value: The score.
        standard_error: NaN if it is unknown.
        num_samples: Number of samples, or of validation images.
        num_steps: Number of sampling steps, or of terms of the bound.
        seed: Seed of the samples, or of the noise.
        sampler: The sampling settings; None for bits per dimension.
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
        """Whether a lower score is better."""
        return self.metric in LOWER_IS_BETTER

    @property
    def kind(self) -> str:
        """Everything the score depends on except the weights and the images; only scores of one kind are compared."""
        features = "" if self.features is None else f" in the features of {self.features}"
        steps = "terms" if self.features is None else "steps"
        what = f"{self.metric}{features}, {self.num_samples} images, {self.num_steps} {steps}, seed {self.seed}"
        return ", ".join([what, *(f"{name} {value}" for name, value in (self.sampler or {}).items())])

    def row(self) -> dict[str, Any]:
        """Return the row of metrics.jsonl; numbers that are not finite become null."""
        numbers = {"score": self.value, "score_standard_error": self.standard_error}
        return {name: value if np.isfinite(value) else None for name, value in numbers.items()} | {
            "score_metric": self.metric,
            "score_features": self.features,
            "score_num_samples": self.num_samples,
            "score_num_steps": self.num_steps,
            "score_seed": self.seed,
        }


class SmallSampleScorer:
    """Measures `evaluation.score_metric` of a training run, again and again.

    The feature network and the statistics of the training images stay in memory.

    Args:
        config: Configuration of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config, self._seed = config.evaluation, config.training.seed
        self._sampler = Sampler.from_config(config.evaluation)
        self._network: FeatureNetwork | None = None
        self._statistics: ReferenceStatistics | None = None

    def open_network(
        self, image_shape: tuple[int, int, int], num_training: int, device: torch.device
    ) -> FeatureNetwork:
        """Collective: return the feature network, opened by the first call.

        Args:
            image_shape: (channels, height, width) of the images.
            num_training: Number of training images.
            device: Device to run the network on.

        Raises:
            ValueError: The score cannot be measured.
        """
        if self._network is None:
            self._network = open_network_for(
                [self._config.score_metric],
                image_shape,
                self._config.score_num_samples,
                num_training,
                features=self._config.score_features,
                device=device,
            )
        return self._network

    def __call__(self, pipeline: GaussianDiffusionPipeline, training: Any, validation: ImageSet) -> SmallSampleScore:
        """Collective: return the score; the processes share the images.

        Args:
            pipeline: Has the weights to score; its mode and its scheduler are left unchanged.
            training: The training images; not used for bits per dimension, for which they may be a stream.
            validation: The validation images.
        """
        is_bound = self._config.score_metric == BITS_PER_DIM
        return self._bits_per_dim(pipeline, validation) if is_bound else self._fidelity(pipeline, training)

    def _bits_per_dim(self, pipeline: GaussianDiffusionPipeline, validation: ImageSet) -> SmallSampleScore:
        config = self._config
        images = choose_images(validation, min(config.score_num_samples, len(validation)), self._seed)
        bound = variational_bound(
            ReverseProcess(self._sampler.prepare(pipeline)),
            images,
            seed=self._seed,
            num_terms=config.score_num_terms,
            batch_size=config.batch_size,
        )
        return SmallSampleScore(
            metric=BITS_PER_DIM,
            features=None,
            value=bound.bits_per_dim,
            standard_error=bound.standard_error,
            num_samples=len(images),
            num_steps=config.score_num_terms,
            seed=self._seed,
            sampler=None,
        )

    def _fidelity(self, pipeline: GaussianDiffusionPipeline, training: ImageSet) -> SmallSampleScore:
        config, sampler = self._config, self._sampler
        network = self.open_network(training.image_shape, len(training), pipeline.device)
        if self._statistics is None or self._statistics.images is not training:
            self._statistics = ReferenceStatistics(network, training, config.batch_size, None)
        prepared, num_samples = sampler.prepare(pipeline), config.score_num_samples
        indices = distributed.rank_range(num_samples)
        samples = distributed.gather_rows(
            sample_images(prepared, sampler, seed=self._seed, indices=indices, batch_size=config.batch_size)
        )
        measured = measure_fidelity(
            samples,
            training,
            network,
            metrics=[config.score_metric],
            batch_size=config.batch_size,
            seed=self._seed,
            statistics=self._statistics,
        )
        known = [(metric.value, metric.standard_error) for metric in measured]  # on rank 0
        value, error = distributed.gather_rows(np.array(known, np.float64).reshape(-1, 2))[0].tolist()
        settings = sampler.to_dict(prepared)
        del settings["labels"]  # always all labels of the network
        return SmallSampleScore(
            metric=config.score_metric,
            features=config.score_features,
            value=value,
            standard_error=error,
            num_samples=num_samples,
            num_steps=config.num_inference_steps,
            seed=self._seed,
            sampler=settings,
        )
