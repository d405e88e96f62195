"""evaluation.json, evaluation.png and the small score during training.

Numbers that say how good a pipeline is, and all that is needed to measure them again.

Which real image a sample is nearest to, pixel by pixel: what a network that learned by heart would give away.

The picture of an evaluation: samples beside real images, and what the likelihood knows of every timestep.

Arrays in, a PNG out.

A score of few samples while training lasts: biased, cheap, and comparable within one run.
"""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_hf.config import RunConfig
from ddpm_hf.data import ImageSet, to_uint8
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.distributed import ALONE, Ranks
from ddpm_hf.evaluation.generate import Sampler, sample_images
from ddpm_hf.evaluation.likelihood import VariationalBound, variational_bound
from ddpm_hf.evaluation.metrics import BITS_PER_DIM, LOWER_IS_BETTER, SCHEMA_VERSION, Metric, measure_fidelity
from ddpm_hf.evaluation.recognition import pixel_rows, squared_distances
from ddpm_hf.plots import (
    LINE_COLOR,
    VALIDATION_COLOR,
    UInt8Array,
    bin_means,
    finish_axes,
    image_grid,
    new_figure,
    save_figure,
)
from ddpm_hf.rng import numpy_generator

_LIBRARIES = ("ddpm_hf", "torch", "diffusers", "numpy")


def fidelity(
    samples: NDArray[np.uint8],
    reference: ImageSet,
    metrics: Sequence[str],
    *,
    features: str,
    weights: Path | None = None,
    batch_size: int,
    device: Any,
    cache_dir: Path | None = None,
    seed: int,
    ranks: Ranks = ALONE,
) -> list[Metric]:
    """Collective: compares samples with real images in the features of a network, on rank 0.

    Args:
        samples: uint8 (number, height, width, channels), on rank 0.
        reference: The images that the network was trained on, as they are before any augmentation.
        metrics: Any of OF_SAMPLES.
        features: Name of the network that looks at the images.
        weights: File with its weights; None finds them by itself.
        batch_size: Images of one forward of it.
        device: Where it runs.
        cache_dir: Where the statistics of the reference are kept.
        seed: Of the subsets that some metrics draw.
        ranks: The processes.

    Returns:
        The metrics on rank 0, and none elsewhere.
    """
    metrics_on_rank_0: list[Metric] | None = ranks.on_rank_0(
        lambda: measure_fidelity(
            samples,
            reference,
            metrics=tuple(metrics),
            features=features,
            weights=weights,
            batch_size=batch_size,
            device=device,
            cache_dir=cache_dir,
            seed=seed,
        )
    )
    return metrics_on_rank_0 or []


def bits_per_dim(
    pipeline: GaussianDiffusionPipeline,
    images: ImageSet,
    *,
    seed: int,
    num_terms: int | None = None,
    timesteps: list[int] | None = None,
    batch_size: int = 64,
    ranks: Ranks = ALONE,
) -> tuple[Metric, VariationalBound]:
    """Collective: computes the variational bound of images; the arguments are those of `variational_bound`."""
    bound = variational_bound(
        pipeline,
        images,
        seed=seed,
        timesteps=timesteps,
        num_terms=num_terms,
        batch_size=batch_size,
        ranks=ranks,
    )
    error = bound.standard_error
    metric = Metric(
        name=BITS_PER_DIM,
        value=bound.bits_per_dim,
        standard_error=None if math.isnan(error) else error,
        features=None,
        num_samples=len(images),
        num_reference=0,
    )
    return metric, bound


def choose_images(images: ImageSet, num_images: int | None, seed: int) -> ImageSet:
    """Returns some images of a set, drawn by the seed and not the first ones, since many sets are sorted by class.

    Raises:
        ValueError: The set has fewer.
    """
    if num_images is None or num_images == len(images):
        return images
    if not 0 < num_images < len(images):
        raise ValueError(f"num_images is {num_images}, but there are {len(images)} images; ask for 1 to that many.")
    drawn = np.sort(numpy_generator(seed, "evaluation_images").permutation(len(images))[:num_images])
    return replace(images, indices=images.indices[drawn])


def as_json(
    metrics: Sequence[Metric],
    bound: VariationalBound | None,
    *,
    settings: dict[str, Any],
    data: dict[str, Any],
    bound_settings: dict[str, Any],
) -> str:
    """Returns the content of evaluation.json.

    Args:
        metrics: What was measured.
        bound: The terms behind bits per dimension, if these were measured.
        settings: What samples depend on, `samples.settings_of`.
        data: Source, fingerprint and number of the images.
        bound_settings: How bits per dimension were estimated.
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
        "bound": None if bound is None else _bound_as_dict(bound),
        "versions": {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
    }
    return json.dumps(content, indent=2) + "\n"


def _bound_as_dict(bound: VariationalBound) -> dict[str, Any]:
    """Returns a bound without the totals of single images."""
    names = ("terms", "x_0_mse", "eps_mse", "counts", "rate", "distortion")
    lists = {name: getattr(bound, name).tolist() for name in names}
    return {"timesteps": list(bound.timesteps), "prior": bound.prior, **lists}


def table(metrics: Sequence[Metric]) -> str:
    """Returns the metrics as a table for a person."""
    rows = [("metric", "value", "standard error", "images", "compared with", "features")]
    for metric in metrics:
        error = "" if metric.standard_error is None else f"{metric.standard_error:.2g}"
        reference = f"{metric.num_reference:,}" if metric.num_reference else ""
        features = metric.features or ""
        rows.append((metric.name, f"{metric.value:.4f}", error, f"{metric.num_samples:,}", reference, features))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


IMAGES_AT_ONCE = 1024


def nearest_images(
    samples: NDArray[np.uint8], images: ImageSet
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float64]]:
    """Finds the nearest image of a set for each sample.

    Args:
        samples: uint8 (number, height, width, channels).
        images: A set of images of that size, streamed over.

    Returns:
        The nearest images, like the samples; their positions in the set; their distances, root mean square over the
        values, in [0, 1].
    """
    rows = pixel_rows(samples)
    smallest = np.full(len(rows), np.inf)
    positions = np.zeros(len(rows), np.int64)
    for start in tqdm(range(0, len(images), IMAGES_AT_ONCE), "Nearest images", disable=None, leave=False):
        others = pixel_rows(real_images(images, images.positions[start : start + IMAGES_AT_ONCE]))
        squares = squared_distances(rows, others)
        best = squares.argmin(axis=1)
        found = squares[np.arange(len(rows)), best]
        is_nearer = found < smallest
        smallest[is_nearer], positions[is_nearer] = found[is_nearer], best[is_nearer] + start
    return real_images(images, positions), positions, np.sqrt(smallest / rows.shape[1]) / 255


def real_images(images: ImageSet, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Returns images of a set as samples are: uint8 (number, height, width, channels)."""
    return np.ascontiguousarray(to_uint8(images.take(positions)[0]).transpose(0, 2, 3, 1))


NUM_COLUMNS = 8
NUM_NEIGHBOURS = 4 * NUM_COLUMNS
NUM_BINS = 100
FAINT = 0.25


def draw_evaluation(
    path: Path,
    *,
    samples: UInt8Array,
    real: UInt8Array,
    neighbours: UInt8Array,
    distances: NDArray[np.float64],
    bound: VariationalBound | None,
    title: str,
) -> None:
    """Draws samples, real images and nearest ones in a row, and below it, where there is a bound, its curves.

    Args:
        path: Where to write a PNG.
        samples: uint8 (number, height, width, channels).
        real: Real images, drawn at random.
        neighbours: The nearest real image of each of the first samples.
        distances: How far these are, root mean square in [0, 1].
        bound: The variational bound.
        title: What was evaluated.
    """
    num_rows = 1 if bound is None else 2
    figure = new_figure(13, 4.6 * num_rows)
    figure.suptitle(title)
    axes = figure.subplots(num_rows, 3, squeeze=False)
    _show(axes[0, 0], samples, "samples, not selected")
    _show(axes[0, 1], real, "real images")
    reach = f"{distances.min():.3f} to {distances.max():.3f}"
    title_of_pairs = f"samples and, below each, the nearest real image\ndistance {reach}"
    _show(axes[0, 2], _in_pairs_of_rows(samples[: len(neighbours)], neighbours), title_of_pairs)
    if bound is not None:
        _draw_errors(axes[1, 0], bound)
        _draw_terms(axes[1, 1], bound)
        _draw_rate(axes[1, 2], bound)
    save_figure(figure, path)


def _in_pairs_of_rows(upper: UInt8Array, lower: UInt8Array) -> UInt8Array:
    """Returns images so that a grid shows a row of the one and below it a row of the other."""
    rows = [
        images[start : start + NUM_COLUMNS] for start in range(0, len(upper), NUM_COLUMNS) for images in (upper, lower)
    ]
    return np.concatenate(rows)


def _show(axes: Any, images: UInt8Array, title: str) -> None:
    """Shows a grid of images."""
    axes.imshow(np.asarray(image_grid(images, min(NUM_COLUMNS, len(images)))), interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.axis("off")


def binned(values: NDArray[np.float64], bound: VariationalBound) -> NDArray[np.float64]:
    """Returns means over at most NUM_BINS stretches of the chain, in its order, weighted by images.

    Of a bound that is estimated from a few terms an image, most steps have seen few images.
    """
    return bin_means(values, bound.counts, NUM_BINS)


def _draw_by_timestep(axes: Any, values: NDArray[np.float64], bound: VariationalBound, color: str, label: str) -> None:
    """Draws values over the timesteps: each faintly, their means in front."""
    is_known = bound.counts > 0
    timesteps = np.asarray(bound.timesteps, np.float64)
    axes.plot(timesteps[is_known], values[is_known], lw=0.8, color=color, alpha=FAINT)
    axes.plot(binned(timesteps, bound), binned(values, bound), lw=1.6, color=color, label=label)


def _draw_errors(axes: Any, bound: VariationalBound) -> None:
    """Draws the mean square errors over the timesteps; both have about the same range of values."""
    _draw_by_timestep(axes, bound.x_0_mse, bound, LINE_COLOR, "x0, values in [-1, 1]")
    _draw_by_timestep(axes, bound.eps_mse, bound, VALIDATION_COLOR, "eps")
    _finish(axes, "error by timestep", "timestep t", "mean square error")
    axes.set_yscale("log")
    axes.legend(frameon=False)


def _draw_terms(axes: Any, bound: VariationalBound) -> None:
    """Draws what each step costs; the last one is the decoder."""
    _draw_by_timestep(axes, bound.terms, bound, LINE_COLOR, "")
    _finish(axes, f"the bound, {bound.bits_per_dim:.3f} bits per dimension", "timestep t", "bits per dimension a step")
    axes.set_yscale("log")


def _draw_rate(axes: Any, bound: VariationalBound) -> None:
    """Draws the progressive code: the error left after so many bits. Fig. 5, Ho et al. 2020."""
    axes.plot(binned(bound.rate, bound), binned(bound.distortion, bound), lw=1.6, color=LINE_COLOR)
    _finish(axes, "rate and distortion", "bits per dimension sent", "root mean square error, 0 to 255")
    axes.set_ylim(bottom=0)


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    """Labels the axes and draws what helps to read them."""
    axes.set_title(title, fontsize=10)
    finish_axes(axes, x, y)


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
