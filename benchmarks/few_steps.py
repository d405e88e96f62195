"""Measure the cost of few sampling steps: python benchmarks/few_steps.py PIPELINE --data SOURCE.

First, bits per dimension of validation images for reverse processes of few steps with three variances: the posterior
variance (fixed_small), beta (fixed_large), and the optimal variance (Bao et al. 2022), whose second moments are
estimated from the training images. Second, samplers with equal numbers of network calls, by the Fréchet distance to the
training images in pixels: small images need no feature network, and the number is not an FID. Everything is repeated
for several sampling seeds of the one network. A standard error is that of the mean over these seeds; it does not cover
other trainings, and for bits per dimension not other images, because all seeds use the same ones.

The distance of few images is large for any images, so the same number of real images is measured beside the samples:
validation images; training images drawn with replacement, like perfect samples of the training set; and without. Below
the first of these numbers, the distance between two samplers tells at most which one is nearer to the training images,
not which one has better quality.
"""

import argparse
import copy
import functools
import itertools
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # works without installation
RESULTS = Path(__file__).resolve().parent / "results"

import diffusers

from ddpm_hf.config import DataConfig
from ddpm_hf.data import ImageSet, open_images
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation.features import moments_of
from ddpm_hf.evaluation.likelihood import ReverseProcess, estimate_second_moments, variational_bound
from ddpm_hf.evaluation.metrics import frechet_distance
from ddpm_hf.rng import numpy_generator, sampling_generators
from ddpm_hf.training.run_dir import device_name

REAL_DRAWS = 20
BATCH_SIZE = 45  # fastest for a small network on one core

SAMPLERS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "DDPM, fixed_small": (None, {"eta": 1.0}),
    "DDPM, analytic": (None, {"eta": 1.0, "analytic": True}),
    "DDIM, uniform": (None, {"eta": 0.0}),
    "DDIM, quadratic": (None, {"eta": 0.0, "timestep_spacing": "quadratic"}),
    "DDIM, analytic": (None, {"eta": 0.0, "analytic": True}),
    "DPM-Solver++ (2M)": ("DPMSolverMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}


def pixels_of(images: ImageSet) -> NDArray[np.float64]:
    """Return the pixels of all images, (number, values), in [-1, 1]."""
    pixels, _ = images.take(images.positions)
    return pixels.reshape(len(pixels), -1) / 127.5 - 1


def real_lines(training: NDArray[np.float64], validation: NDArray[np.float64], count: int) -> Iterator[str]:
    """Yield the distances of `count` real images to the training images."""
    reference = moments_of(training)
    for name, images, replace in (
        ("validation images", validation, False),
        ("training images, drawn with replacement", training, True),
        ("training images, drawn without", training, False),
    ):
        number = min(count, len(images))
        distances = []
        for draw in range(REAL_DRAWS if number < len(images) else 1):
            rows = numpy_generator(draw, "few_steps").choice(len(images), number, replace=replace)
            distances.append(frechet_distance(moments_of(images[rows]), reference))
        spread = (
            f", {min(distances):.3f} to {max(distances):.3f} in {len(distances)} draws" if len(distances) > 1 else ""
        )
        yield f"{f'{number} {name}':<44}{statistics.mean(distances):.3f}{spread}"


def sample(pipeline: GaussianDiffusionPipeline, sampler: str, steps: int, count: int, seed: int) -> NDArray[np.float64]:
    """Return the pixels of samples; every sampler starts from the same noise."""
    name, options = SAMPLERS[sampler]
    scheduler = copy.deepcopy(pipeline.scheduler)
    options = dict(options)
    if name is None:
        scheduler.analytic_variance = bool(options.pop("analytic", False))
        options.setdefault("timestep_spacing", "linspace")
    else:
        scheduler = getattr(diffusers, name).from_config(scheduler.config, timestep_spacing="linspace")
    ours, pipeline.scheduler = pipeline.scheduler, scheduler
    parts = []
    try:
        for start in range(0, count, BATCH_SIZE):
            numbers = range(start, min(start + BATCH_SIZE, count))
            part = pipeline(
                batch_size=len(numbers),
                num_inference_steps=steps,
                generator=sampling_generators(seed, "few_steps", numbers, pipeline.device),
                class_labels=[i % pipeline.num_classes for i in numbers] if pipeline.num_classes else None,
                output_type="uint8",
                **options,
            )
            parts.append(part.images)
    finally:
        pipeline.scheduler = ours
    images = np.concatenate(parts)
    return images.transpose(0, 3, 1, 2).reshape(count, -1) / 127.5 - 1


def over_seeds(measure: Callable[[int], float], seeds: int) -> str:
    """Return mean and standard error."""
    values = [measure(seed) for seed in range(seeds)]
    error = statistics.stdev(values) / math.sqrt(seeds) if seeds > 1 else math.nan
    return f"{statistics.mean(values):>9.3f} ± {error:.3f}"


def bits_table(
    pipeline: GaussianDiffusionPipeline, judged: ImageSet, moments: torch.Tensor, steps: list[int], seeds: int
) -> Iterator[str]:
    """Yield bits per dimension for few reverse steps, one line per variance."""
    yield f"bits per dimension of the same {len(judged)} validation images, mean ± standard error over {seeds} seeds"
    yield f"{'':<20}" + "".join(f"{f'{number} steps':>18}" for number in steps)
    for kind in ("fixed_small", "fixed_large", "analytic"):
        variant = copy.copy(pipeline.scheduler.config) | {
            "variance_type": "fixed_large" if kind == "fixed_large" else "fixed_small"
        }
        ours, pipeline.scheduler = pipeline.scheduler, type(pipeline.scheduler).from_config(variant)
        if kind == "analytic":
            pipeline.scheduler.eps_second_moments = moments
            pipeline.scheduler.analytic_variance = True
        cells = []
        for number in steps:
            timesteps = np.linspace(0, len(ours) - 1, number).round().astype(int)[::-1].tolist()
            bound = functools.partial(variational_bound, ReverseProcess(pipeline, timesteps), judged)
            cells.append(over_seeds(lambda seed, bound=bound: bound(seed=seed).bits_per_dim, seeds))
        yield f"{kind:<20}" + "".join(f"{cell:>18}" for cell in cells)
        pipeline.scheduler = ours


def distance_table(
    pipeline: GaussianDiffusionPipeline,
    training: ImageSet,
    validation: ImageSet,
    steps: list[int],
    seeds: int,
    num_samples: int,
) -> Iterator[str]:
    """Yield the distance of samples to the training images, one line per sampler."""
    real = pixels_of(training)
    reference = moments_of(real)
    yield f"\nFréchet distance in pixels to all {len(training)} training images"
    yield from real_lines(real, pixels_of(validation), num_samples)
    yield f"{num_samples} samples of one network, mean ± its standard error over {seeds} sampling seeds:"
    yield f"{'':<20}" + "".join(f"{f'{number} calls':>18}" for number in steps)
    for sampler in SAMPLERS:
        cells = []
        for number in steps:
            draw = functools.partial(sample, pipeline, sampler, number, num_samples)
            distance = lambda seed, draw=draw: frechet_distance(moments_of(draw(seed)), reference)  # noqa: E731
            cells.append(over_seeds(distance, seeds))
        yield f"{sampler:<20}" + "".join(f"{cell:>18}" for cell in cells)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--data", required=True, help="what the pipeline was trained on")
    parser.add_argument("--held_out", type=float, default=0.15, help="validation_fraction of the training")
    parser.add_argument("--data_seed", type=int, default=0, help="training.seed of the training")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_samples", type=int, help="by default as many as there are validation images")
    parser.add_argument("--num_images", type=int, default=100, help="validation images for the bits")
    parser.add_argument("--num_for_moments", type=int, default=8, help="training images per timestep")
    parser.add_argument("--name", default="few_steps", help="name of the result file")
    return parser.parse_args()


def main() -> int:
    """Measure, print and write the result file."""
    arguments = parse()
    pipeline = GaussianDiffusionPipeline.from_pretrained(arguments.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    size = np.broadcast_to(pipeline.unet.config.sample_size, 2).tolist()
    config = DataConfig(source=arguments.data, resolution=size, num_channels=pipeline.num_channels)
    training, validation = open_images(config, with_labels=pipeline.num_classes > 0).split(
        arguments.held_out, arguments.data_seed
    )
    num_samples = arguments.num_samples or len(validation)
    judged = validation.split(1 - arguments.num_images / len(validation), 0)[0]
    moments = estimate_second_moments(pipeline, training, seed=0, num_images=arguments.num_for_moments)
    steps, seeds = arguments.steps, arguments.seeds
    lines = [
        f"command: {shlex.join(['python', 'benchmarks/few_steps.py', *sys.argv[1:]])}",
        f"machine: {device_name(pipeline.device)}, torch {torch.__version__}",
    ]
    print("\n".join(lines), flush=True)
    pipeline.scheduler.eps_second_moments = moments
    for line in itertools.chain(
        bits_table(pipeline, judged, moments, steps, seeds),
        distance_table(pipeline, training, validation, steps, seeds, num_samples),
    ):
        lines.append(line)
        print(line, flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
