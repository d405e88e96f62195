"""Train a recipe with and without single ingredients: python benchmarks/ingredients.py configs/digits_8.yaml.

Each variant is trained once for each seed, unless its run is there, and sampled by UniPC from the same noise.
Recognized is the share of the samples that a classifier, trained on real images, recognizes as the class asked for; the
Fréchet distance to the training images is in pixels, so it is not an FID. Numbers are means over the training seeds,
with their standard errors.
"""

import argparse
import math
import shlex
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # works without installation
RESULTS = Path(__file__).resolve().parent / "results"

from ddpm_hf.cli.main import main as ddpm_hf
from ddpm_hf.config import read_config
from ddpm_hf.data import ImageSet, open_images, to_uint8
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation.features import moments_of
from ddpm_hf.evaluation.generate import Sampler, sample_images
from ddpm_hf.evaluation.metrics import frechet_distance
from ddpm_hf.evaluation.recognition import pixel_rows, recognition_report
from ddpm_hf.training.run_dir import device_name

VARIANTS: dict[str, list[str]] = {
    "recipe": [],
    "input perturbation 0.1": ["--objective.input_perturbation", "0.1"],
    "inverse square root": [
        "--training.learning_rate_schedule", "inverse_sqrt", "--training.learning_rate_reference_steps", "300",
    ],
}  # fmt: skip


def pixels_of(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Return all images, uint8 (number, height, width, channels), and their labels."""
    pixels, labels = images.take(images.positions)
    assert labels is not None
    return to_uint8(pixels).transpose(0, 2, 3, 1), labels


def measure(recipe: str, variant: str, seed: int, arguments: argparse.Namespace) -> tuple[float, float]:
    """Train unless the run is there, sample, and return the share recognized and the Fréchet distance."""
    run = arguments.runs / f"{variant.replace(' ', '_')}_{seed}"
    options = [*VARIANTS[variant], "--training.seed", str(seed), "--training.output_dir", str(run)]
    if not (run / "pipeline").is_dir() and ddpm_hf(
        ["train", "--config", recipe, *options, "--evaluation.num_samples", "0", *arguments.options]
    ):
        raise SystemExit(f"{run} could not be trained.")
    config = read_config(run / "config.yaml")
    training, validation = open_images(config.data, with_labels=True).split(config.data.validation_fraction, seed)
    sampler = Sampler(scheduler="unipc", num_inference_steps=arguments.steps, timestep_spacing="trailing")
    pipeline = sampler.prepare(GaussianDiffusionPipeline.from_pretrained(run / "pipeline"))
    samples = sample_images(pipeline, sampler, seed=0, indices=range(arguments.num_samples), batch_size=50)
    labels = np.arange(len(samples)) % pipeline.num_classes
    real = pixels_of(training)
    report = recognition_report(*real, *pixels_of(validation), samples, labels)
    moments = [moments_of(pixel_rows(images) / 127.5 - 1) for images in (samples, real[0])]
    return report.recognised, frechet_distance(*moments)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="YAML of a class-conditional recipe with a validation_fraction")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20, help="network calls of a sample")
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--runs", type=Path, default=Path("outputs/ingredients"))
    parser.add_argument("--options", type=shlex.split, default=[], help="further options of all trainings, in one word")
    return parser.parse_args()


def main() -> int:
    """Measure, print and write the result file."""
    arguments = parse()
    name = Path(arguments.recipe).stem
    machine = device_name(torch.device("cpu"))
    lines = [f"python benchmarks/ingredients.py {shlex.join(sys.argv[1:])}  ({machine})", ""]
    seeds = ", ".join(map(str, arguments.seeds))
    lines.append(f"{arguments.num_samples} samples by UniPC in {arguments.steps} calls, training seeds {seeds}")
    lines.append(f"{'':<28}{'recognized':>20}{'Fréchet distance':>20}")
    for variant in arguments.variants:
        values = [measure(arguments.recipe, variant, seed, arguments) for seed in arguments.seeds]
        cells = []
        for column in zip(*values, strict=True):
            error = statistics.stdev(column) / math.sqrt(len(column)) if len(column) > 1 else math.nan
            cells.append(f"{statistics.mean(column):.4f} ± {error:.4f}")
        lines.append(f"{variant:<28}" + "".join(f"{cell:>20}" for cell in cells))
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"ingredients_{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
