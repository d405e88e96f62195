"""Measure what data.augmentation gains on 500 images: python benchmarks/augmentation.py.

The recipe configs/emoji_500_16.yaml is trained with several probabilities of the augmentation, and nothing else
differs. The table has the validation loss by step, and the Fréchet distance of samples to the validation images, which
are not used in training, in pixels: small images need no feature network, and the number is not an FID. The distance of
as many training images, drawn with replacement, is that of a network which repeats its data.

Start it in the repository. A run that was stopped continues when the script is started again, so the runs of several
probabilities can also be made by several processes first.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # works without installation
RESULTS = Path(__file__).resolve().parent / "results"

from ddpm_hf import Trainer, load_config
from ddpm_hf.data import ImageSet
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation.features import moments_of
from ddpm_hf.evaluation.metrics import frechet_distance
from ddpm_hf.rng import numpy_generator, sampling_generators
from ddpm_hf.training.run_dir import device_name

BATCH_SIZE = 137


def pixels_of(images: ImageSet) -> NDArray[np.float64]:
    """Return the pixels of all images, (number, values), in [-1, 1]."""
    pixels, _ = images.take(images.positions)
    return pixels.reshape(len(pixels), -1) / 127.5 - 1


def sample(pipeline: GaussianDiffusionPipeline, count: int, steps: int) -> NDArray[np.float64]:
    """Return the pixels of samples by DDIM, from the same noise for every network."""
    parts = []
    for start in range(0, count, BATCH_SIZE):
        numbers = range(start, min(start + BATCH_SIZE, count))
        generators = sampling_generators(0, "augmentation", numbers, pipeline.device)
        output = pipeline(len(numbers), generators, num_inference_steps=steps, eta=0.0, output_type="uint8")
        parts.append(output.images)
    images = np.concatenate(parts)
    return images.transpose(0, 3, 1, 2).reshape(count, -1) / 127.5 - 1


def train(arguments: argparse.Namespace, probability: float) -> tuple[dict[int, float], Trainer]:
    """Train a run to its end; return its validation loss by step."""
    config = load_config(REPOSITORY / "configs" / "emoji_500_16.yaml")
    data = dataclasses.replace(config.data, augmentation=probability)
    changes: dict[str, Any] = {
        "output_dir": str(arguments.output / f"augmentation_{probability:g}"),
        "num_steps": arguments.steps,
        "mixed_precision": arguments.mixed_precision,
    }
    trainer = Trainer(dataclasses.replace(config, data=data, training=dataclasses.replace(config.training, **changes)))
    trainer.fit()
    rows = [json.loads(line) for line in trainer.folder.metrics.read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}, trainer


def table(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of the result."""
    losses, distances, reference, repeated = {}, {}, None, 0.0
    for probability in arguments.probabilities:
        losses[probability], trainer = train(arguments, probability)
        assert isinstance(trainer.images, ImageSet)
        num_samples = arguments.num_samples or len(trainer.validation_images)
        if reference is None:
            reference = moments_of(pixels_of(trainer.validation_images))
            rows = numpy_generator(0, "augmentation").integers(len(trainer.images), size=num_samples)
            repeated = frechet_distance(moments_of(pixels_of(trainer.images)[rows]), reference)
            yield f"{len(trainer.images)} training images, {len(trainer.validation_images)} validation images"
            yield f"network: {sum(parameter.numel() for parameter in trainer.pipeline.unet.parameters()):,} parameters"
        pipeline = trainer.pipeline
        pipeline.set_progress_bar_config(disable=True)
        samples = sample(pipeline, num_samples, arguments.sampling_steps)
        distances[probability] = frechet_distance(moments_of(samples), reference)
    yield f"\n{'validation loss, step':<36}" + "".join(f"{f'p = {p:g}':>12}" for p in arguments.probabilities)
    for step in sorted(set.intersection(*(set(column) for column in losses.values()))):
        yield f"{step:>21,}{'':<15}" + "".join(f"{losses[p][step]:>12.4f}" for p in arguments.probabilities)
    yield f"{'lowest of the run':<36}" + "".join(f"{min(losses[p].values()):>12.4f}" for p in arguments.probabilities)
    yield f"\n{'Fréchet distance of the samples':<36}" + "".join(
        f"{distances[p]:>12.3f}" for p in arguments.probabilities
    )
    yield f"{'of training images':<36}{repeated:>12.3f}"


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/augmentation"), help="folder of the runs")
    parser.add_argument("--probabilities", type=float, nargs="+", default=[0.0, 0.12])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--sampling_steps", type=int, default=25)
    parser.add_argument("--num_samples", type=int, help="by default as many as there are validation images")
    parser.add_argument("--name", default="augmentation_emoji", help="name of the result file")
    return parser.parse_args()


def main() -> int:
    """Measure, print and write the result file."""
    arguments = parse()
    lines = [f"command: {shlex.join(['python', 'benchmarks/augmentation.py', *sys.argv[1:]])}"]
    for line in table(arguments):
        lines.append(line)
        print(line, flush=True)
    lines.insert(
        1,
        f"machine: {device_name(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}, "
        f"torch {torch.__version__}",
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
