"""Compare what trainers reach with the same images and the same network: python benchmarks/digits_ladder.py.

Each trains an unconditional digits_8 network of 0.7 million parameters on the training images of configs/digits_8.yaml:
the loops of train_unconditional.py and ddpm-torch (peers.py) as shipped, and with a batch and a learning rate that suit
so short a run; ddpm_hf with the recipe, and with a half and a third of the images, also in smaller batches. All are
sampled alike, by UniPC in 20 network calls from the same noise. The Fréchet distance is to the training images, in
pixels, so it is not an FID.

Rows are kept in results/digits_ladder.json as they are measured, so that a measurement can be stopped and continued;
the table is results/digits_ladder.txt.
"""

import argparse
import dataclasses
import json
import math
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
for place in (REPOSITORY, REPOSITORY / "benchmarks"):  # works without installation
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
RESULTS = Path(__file__).resolve().parent / "results"
RECIPE = REPOSITORY / "configs" / "digits_8.yaml"

from diffusers import UNet2DModel
from peers import DDPM_TORCH, TRAIN_UNCONDITIONAL, DdpmTorch, TrainUnconditional, missing

from ddpm_hf.cli.main import main as ddpm_hf
from ddpm_hf.config import ModelConfig, RunConfig, read_config
from ddpm_hf.data import ImageSet, open_images, to_uint8
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.evaluation.features import moments_of
from ddpm_hf.evaluation.generate import Sampler, sample_images
from ddpm_hf.evaluation.metrics import frechet_distance
from ddpm_hf.evaluation.recognition import pixel_rows
from ddpm_hf.models import build_unet
from ddpm_hf.training.run_dir import device_name

SHORT = {"learning_rate": 1e-3, "warmup_steps": 100}
"""What suits a run of about a thousand updates, in place of the learning rate and the warm-up as shipped."""


def pixels_of(images: ImageSet) -> np.ndarray:
    """Return all images, uint8 (number, height, width, channels)."""
    return to_uint8(images.take(images.positions)[0]).transpose(0, 2, 3, 1)


@dataclass(frozen=True)
class Setup:
    """What a system gets.

    Args:
        config: The recipe.
        images: Training images, float32 in [-1, 1], (number, channels, height, width).
        num_images: Images that the training uses, with repetitions.
        seed: Seed of the initialization, the order and the noise.
        options: Further options of `ddpm-hf train`.
    """

    config: RunConfig
    images: torch.Tensor
    num_images: int
    seed: int
    options: list[str]

    def unet(self, initialization: Any) -> UNet2DModel:
        """Return the network, initialized."""
        torch.manual_seed(self.seed)
        shape = (self.images.shape[1], self.images.shape[2], self.images.shape[3])
        model = ModelConfig(
            preset=self.config.model.preset, overrides=self.config.model.overrides, initialization=initialization
        )
        return build_unet(model, shape, None).to(self.images.device)

    def batches(self, batch_size: int) -> list[torch.Tensor]:
        """Return the batches of the whole training, shuffled in each epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        epochs = math.ceil(self.num_images / len(self.images))
        order = torch.cat([torch.randperm(len(self.images), generator=generator) for _ in range(epochs)])
        whole = order[: self.num_images // batch_size * batch_size]
        return [self.images[indices] for indices in whole.to(self.images.device).split(batch_size)]


def stock_pipeline(unet: UNet2DModel) -> GaussianDiffusionPipeline:
    """Return a network of the peers with their noise schedule."""
    scheduler = GaussianDiffusionScheduler.create(beta_schedule="linear", prediction_type="epsilon")
    return GaussianDiffusionPipeline(unet.eval(), scheduler)


def train_unconditional(setup: Setup, batch_size: int, **options: Any) -> GaussianDiffusionPipeline:
    """Train with the loop of train_unconditional.py and return its EMA."""
    batches = setup.batches(batch_size)
    unet = setup.unet("torch")
    peer = TrainUnconditional(unet, batches, num_steps=len(batches), **options)
    for _ in batches:
        peer.step()
    peer.ema.copy_to(unet.parameters())
    return stock_pipeline(unet)


def ddpm_torch(setup: Setup, batch_size: int, **options: Any) -> GaussianDiffusionPipeline:
    """Train with the Trainer of ddpm-torch, whose initialization is that of the paper, and return its EMA."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = setup.unet("paper")

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.unet(x, t).sample
            return output

    batches = setup.batches(batch_size)
    network = Network()
    peer = DdpmTorch(network, batches, **options)
    for _ in batches:
        peer.step()
    peer.trainer.ema.apply()
    return stock_pipeline(network.unet)


def ours(setup: Setup, *options: str, batch_size: int = 64) -> GaussianDiffusionPipeline:
    """Train with `ddpm-hf train` and return the pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "data.source": REPOSITORY / str(setup.config.data.source),
            "model.class_conditional": "false",
            "training.num_steps": setup.num_images // batch_size,
            "training.train_batch_size": batch_size,
            "training.seed": setup.seed,
            "training.output_dir": f"{folder}/run",
            "preview.every_steps": 0,
            "evaluation.num_samples": 0,
            "evaluation.recognition": "false",
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        if ddpm_hf(["train", "--config", str(RECIPE), *words, *options, *setup.options]):
            raise SystemExit("The training failed.")
        pipeline: GaussianDiffusionPipeline = GaussianDiffusionPipeline.from_pretrained(f"{folder}/run/pipeline")
    return pipeline.to(setup.images.device)


@dataclass(frozen=True)
class System:
    """A trainer with its settings."""

    name: str
    share: float
    train: Callable[[Setup], GaussianDiffusionPipeline]


EPSILON = ("--diffusion.prediction_type", "epsilon", "--diffusion.beta_schedule", "linear")
SYSTEMS = [
    System("ddpm_hf", 1, ours),
    System("ddpm_hf, 1/2 of the images, batch 32", 1 / 2, lambda setup: ours(setup, batch_size=32)),
    System("ddpm_hf, 1/3 of the images, batch 16", 1 / 3, lambda setup: ours(setup, batch_size=16)),
    System("ddpm_hf, 1/3 of the images", 1 / 3, ours),
    System(f"{TRAIN_UNCONDITIONAL}, batch 64, rate 1e-3", 1, lambda setup: train_unconditional(setup, 64, **SHORT)),
    System(f"{DDPM_TORCH}, batch 64, rate 1e-3", 1, lambda setup: ddpm_torch(setup, 64, **SHORT)),
    System(f"{TRAIN_UNCONDITIONAL}, batch 16, rate 1e-3", 1, lambda setup: train_unconditional(setup, 16, **SHORT)),
    System(f"{TRAIN_UNCONDITIONAL}, as shipped", 1, lambda setup: train_unconditional(setup, 16)),
    System(f"{DDPM_TORCH}, as shipped", 1, lambda setup: ddpm_torch(setup, 128)),
    System("ddpm_hf, epsilon and linear betas", 1, lambda setup: ours(setup, *EPSILON)),
]


def training_images(config: RunConfig, seed: int) -> np.ndarray:
    """Return the training images of a seed, uint8 (number, height, width, channels)."""
    source = str(REPOSITORY / str(config.data.source))
    images = open_images(dataclasses.replace(config.data, source=source), with_labels=False)
    return pixels_of(images.split(config.data.validation_fraction, seed)[0])


def distance(images: np.ndarray, real: np.ndarray) -> float:
    """Return the Fréchet distance of two sets of images in pixels."""
    moments = [moments_of(pixel_rows(pixels) / 127.5 - 1) for pixels in (images, real)]
    return frechet_distance(*moments)


def measure(system: System, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, sample and return the row of the results."""
    config = read_config(RECIPE)
    real = training_images(config, seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensor = torch.from_numpy(real.transpose(0, 3, 1, 2)).to(device, torch.float32) / 127.5 - 1
    num_images = round(arguments.num_images * system.share)
    sampler = Sampler(scheduler="unipc", num_inference_steps=20, timestep_spacing="trailing")
    pipeline = sampler.prepare(system.train(Setup(config, tensor, num_images, seed, arguments.options)))
    samples = sample_images(pipeline, sampler, seed=0, indices=range(arguments.num_samples), batch_size=250)
    return {"system": system.name, "images": num_images, "seed": seed, "frechet": distance(samples, real)}


def table(content: dict[str, Any]) -> str:
    """Return the means over the seeds as text."""
    rows, num_samples = content["rows"], content["num_samples"]
    lines = [f"{content['command']}  ({content['machine']})", ""]
    lines.append(f"{num_samples:,} samples by UniPC in 20 calls; mean over the training seeds ± standard error")
    lines.append(f"{'':<46}{'images':>8}{'seeds':>7}{'Fréchet distance':>20}")
    for system in SYSTEMS:
        if values := [row["frechet"] for row in rows if row["system"] == system.name]:
            error = f"{statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else "-"
            images = next(row["images"] for row in rows if row["system"] == system.name)
            cell = f"{statistics.mean(values):.3f} ± {error:<5}"
            lines.append(f"{system.name:<46}{images:>8,}{len(values):>7}{cell:>20}")
    real = training_images(read_config(RECIPE), 0)
    drawn = np.random.default_rng(0).integers(len(real), size=num_samples)
    lines.append(f"{'training images, drawn with replacement':<61}{distance(real[drawn], real):>12.3f}")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [system.name for system in SYSTEMS]
    parser.add_argument("--systems", nargs="+", choices=names, default=names, metavar="NAME", help="; ".join(names))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", type=int, default=76_800, help="images of a whole training, with repetitions")
    parser.add_argument("--num_samples", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=RESULTS / "digits_ladder.json")
    parser.add_argument("--options", type=shlex.split, default=[], help="options of `ddpm-hf train`, in one word")
    return parser.parse_args()


def main() -> int:
    """Measure what is not in the result file yet, and print all of it."""
    arguments = parse()
    lacking = missing()
    content: dict[str, Any] = {
        "command": "python benchmarks/digits_ladder.py",
        "machine": f"{device_name(torch.device('cpu'))}, torch {torch.__version__}",
        "num_images": arguments.num_images,
        "num_samples": arguments.num_samples,
        "options": arguments.options,
        "rows": [],
    }
    if arguments.output.is_file():
        stored = json.loads(arguments.output.read_text(encoding="utf-8"))
        if any(stored[name] != content[name] for name in ("num_images", "num_samples", "options")):
            raise SystemExit(f"{arguments.output} was measured with other settings; choose another --output.")
        content = stored
    rows = content["rows"]
    for seed in arguments.seeds:
        for system in SYSTEMS:
            is_done = any((row["system"], row["seed"]) == (system.name, seed) for row in rows)
            if system.name not in arguments.systems or is_done:
                continue
            if reason := next((reason for name, reason in lacking.items() if system.name.startswith(name)), None):
                print(f"{system.name}: {reason}")
                continue
            rows.append(measure(system, seed, arguments))
            print(rows[-1], flush=True)
            arguments.output.parent.mkdir(exist_ok=True)
            arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    arguments.output.with_suffix(".txt").write_text(table(content), encoding="utf-8")
    print(table(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
