"""evaluation.json, the nearest real images of samples, and the score that is measured during training."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_hf import distributed
from ddpm_hf.config import RunConfig
from ddpm_hf.data import ImageSet, to_uint8
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation.features import FloatArray
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
from ddpm_hf.evaluation.recognition import pixel_rows, squared_distances
from ddpm_hf.rng import numpy_generator

_LIBRARIES = ("ddpm_hf", "torch", "diffusers", "numpy")
_NEIGHBOR_CHUNK_BYTES = 1 << 26


def as_json(
    metrics: Sequence[Metric],
    bound: VariationalBound | None,
    *,
    settings: dict[str, Any],
    data: dict[str, Any],
    bound_settings: dict[str, Any],
    flags: Sequence[str] = (),
) -> str:
    """Return the content of evaluation.json.

    Args:
        metrics: The measured metrics.
        bound: The terms behind bits per dimension, if they were measured.
        settings: Everything the samples depend on; see `generate.settings_of`.
        data: Source, fingerprint and number of the images.
        bound_settings: How bits per dimension were computed.
        flags: Command-line flags of the evaluation, without local paths.
    """
    sampling = {"seed": settings["seed"], "sampler": settings["scheduler"]}
    sampling["num_inference_steps"] = settings["num_inference_steps"]
    rows = [
        asdict(metric) | ({"seed": settings["seed"], **bound_settings} if metric.name == BITS_PER_DIM else sampling)
        for metric in metrics
    ]
    content = {
        "schema_version": SCHEMA_VERSION,
        "metrics": rows,
        "data": data,
        "sampling": {name: value for name, value in settings.items() if name != "schema_version"},
        "flags": list(flags),
        "bound": None if bound is None else bound.to_dict(),
        "versions": {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
    }
    return json.dumps(content, indent=2) + "\n"


def table(metrics: Sequence[Metric]) -> str:
    """Return the metrics as a text table."""
    rows = [("metric", "value", "standard error", "images", "compared with", "features")]
    for metric in metrics:
        error = "" if metric.standard_error is None else f"{metric.standard_error:.2g}"
        reference = f"{metric.num_reference:,}" if metric.num_reference else ""
        features = metric.features or ""
        rows.append((metric.name, f"{metric.value:.4f}", error, f"{metric.num_samples:,}", reference, features))
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
    return np.ascontiguousarray(to_uint8(images.take(positions)[0]).transpose(0, 2, 3, 1))


def nearest_images(samples: Images, images: ImageSet) -> tuple[Images, NDArray[np.int64], FloatArray]:
    """Find the nearest image of a set for each sample, pixel by pixel: a network that memorized images would copy them.

    Args:
        samples: uint8 (number, height, width, channels).
        images: Images of the same size; read in chunks.

    Returns:
        The nearest images, like the samples; their positions in the set; their distances, root mean square over the
        values, in [0, 1].
    """
    rows = pixel_rows(samples)
    smallest = np.full(len(rows), np.inf)
    positions = np.zeros(len(rows), np.int64)
    chunk_size = max(1, _NEIGHBOR_CHUNK_BYTES // rows[0].nbytes)
    for start in tqdm(range(0, len(images), chunk_size), "Nearest images", disable=None, leave=False):
        others = pixel_rows(real_images(images, images.positions[start : start + chunk_size]))
        squares = squared_distances(rows, others)
        best = squares.argmin(axis=1)
        distances = squares[np.arange(len(rows)), best]
        is_nearer = distances < smallest
        smallest[is_nearer], positions[is_nearer] = distances[is_nearer], best[is_nearer] + start
    return real_images(images, positions), positions, np.sqrt(smallest / rows.shape[1]) / 255


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


def small_sample_score(config: RunConfig) -> Callable[[GaussianDiffusionPipeline, Any, ImageSet], SmallSampleScore]:
    """Return the function that measures `evaluation.score_metric` for a training run.

    Args:
        config: Configuration of the run.

    Returns:
        A function of the pipeline with the weights to score, the training images (not used for bits per dimension, for
        which they may be a stream) and the validation images. It is collective: the processes share the images. It
        leaves the mode and the scheduler of the pipeline unchanged.
    """
    evaluation, seed = config.evaluation, config.training.seed
    sampler = Sampler.from_config(evaluation)

    def bits_per_dim(pipeline: GaussianDiffusionPipeline, training: Any, validation: ImageSet) -> SmallSampleScore:
        images = choose_images(validation, min(evaluation.score_num_samples, len(validation)), seed)
        bound = variational_bound(
            ReverseProcess(sampler.prepare(pipeline)),
            images,
            seed=seed,
            num_terms=evaluation.score_num_terms,
            batch_size=evaluation.batch_size,
        )
        return SmallSampleScore(
            metric=BITS_PER_DIM,
            features=None,
            value=bound.bits_per_dim,
            standard_error=bound.standard_error,
            num_samples=len(images),
            num_steps=evaluation.score_num_terms,
            seed=seed,
            sampler=None,
        )

    def fidelity(pipeline: GaussianDiffusionPipeline, training: ImageSet, validation: ImageSet) -> SmallSampleScore:
        prepared, num_samples = sampler.prepare(pipeline), evaluation.score_num_samples
        indices = distributed.rank_range(num_samples)
        samples = distributed.gather_rows(
            sample_images(prepared, sampler, seed=seed, indices=indices, batch_size=evaluation.batch_size)
        )

        def measure() -> Metric:
            network = open_network_for(
                [evaluation.score_metric],
                training.image_shape,
                num_samples,
                len(training),
                features=evaluation.score_features,
                device=pipeline.device,
            )
            (metric,) = measure_fidelity(
                samples,
                training,
                network,
                metrics=[evaluation.score_metric],
                batch_size=evaluation.batch_size,
                seed=seed,
            )
            return metric

        metric = distributed.on_rank_0(measure)
        known = [] if metric is None else [(metric.value, metric.standard_error)]
        value, error = distributed.gather_rows(np.array(known, np.float64).reshape(-1, 2))[0].tolist()
        settings = sampler.to_dict(prepared)
        del settings["labels"]  # always all labels of the network
        return SmallSampleScore(
            metric=evaluation.score_metric,
            features=evaluation.score_features,
            value=value,
            standard_error=error,
            num_samples=num_samples,
            num_steps=evaluation.num_inference_steps,
            seed=seed,
            sampler=settings,
        )

    return bits_per_dim if evaluation.score_metric == BITS_PER_DIM else fidelity
