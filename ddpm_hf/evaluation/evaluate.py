"""Numbers that say how good a pipeline is, and all that is needed to measure them again."""

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_hf.data import ImageSet
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation.fidelity import measure_fidelity
from ddpm_hf.evaluation.likelihood import VariationalBound, variational_bound
from ddpm_hf.evaluation.metrics import BITS_PER_DIM, SCHEMA_VERSION, Metric
from ddpm_hf.evaluation.ranks import ALONE, Ranks
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
