"""Draw docs/images/troubleshooting.png, symptoms of docs/troubleshooting.md: python docs/make_troubleshooting.py.

Each symptom is produced by a short training on the embedded digits or emoji, unless its run is there, and drawn beside
the same samples with one change.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # works without installation
PICTURE = REPOSITORY / "docs" / "images" / "troubleshooting.png"
NUM_IMAGES = 10

from ddpm_hf.cli.main import main as ddpm_hf
from ddpm_hf.config import read_config
from ddpm_hf.data import ImageSet, open_images
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation.generate import Images, Sampler, sample_images
from ddpm_hf.evaluation.memorization import nearest_images
from ddpm_hf.plots import image_grid, new_figure, save_figure

BRIEF: dict[str, Any] = {
    "training.num_steps": 400, "training.checkpoint_every_steps": 100, "training.num_checkpoints_kept": 4,
    "preview.every_steps": 0, "evaluation.num_samples": 0, "evaluation.recognition": "false",
}  # fmt: skip
SHORT_CHAIN = {"diffusion.num_train_timesteps": 50, "diffusion.beta_schedule": "linear"}
EPSILON = {"diffusion.prediction_type": "epsilon", "diffusion.beta_schedule": "linear"}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": ("digits_8", {"objective.class_dropout": 0.1}),
    "long_ema": ("digits_8", {"training.ema_decay": 0.9999, "training.ema_warmup": "none"}),
    "warmup": ("digits_8", {"training.learning_rate_warmup_steps": 100_000}),
    "short_chain": ("digits_8", SHORT_CHAIN),
    "short_chain_scaled": ("digits_8", SHORT_CHAIN | {"diffusion.scale_betas_to_timesteps": "true"}),
    "few_images": (
        "digits_8",
        {"data.validation_fraction": 0.98, "training.train_batch_size": 32, "training.num_steps": 1000},
    ),
    "epsilon": ("emoji_16", EPSILON),
    "v_prediction": ("emoji_16", {}),
}
"""Recipe of each run, and what is changed in it."""


def run_of(name: str, runs: Path) -> Path:
    """Return the folder of a run, which is trained unless it is there."""
    folder = runs / name
    if not (folder / "pipeline").is_dir() and ddpm_hf(["train", *options_of(name, runs)]):
        raise SystemExit(f"{folder} could not be trained.")
    return folder


def options_of(name: str, runs: Path) -> list[str]:
    """Return the options of `ddpm-hf train` for a run."""
    recipe, changes = RUNS[name]
    path = REPOSITORY / "configs" / f"{recipe}.yaml"
    settings = BRIEF | {"data.source": REPOSITORY / read_config(path).data.source} | changes
    options = [word for setting, value in settings.items() for word in (f"--{setting}", str(value))]
    return ["--config", str(path), *options, "--training.output_dir", str(runs / name)]


def samples(folder: Path, **settings: Any) -> Images:
    """Return samples of a run, a checkpoint or a network, one of each class, from the same noise."""
    sampler = Sampler(**{"scheduler": "unipc", "num_inference_steps": 20, **settings})
    pipeline = sampler.prepare(GaussianDiffusionPipeline.from_pretrained(folder))
    return sample_images(pipeline, sampler, seed=0, indices=range(NUM_IMAGES), batch_size=NUM_IMAGES)


def loss_at(run: Path, step: int) -> float:
    """Return the loss of the line of metrics of a step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float(next(row["loss"] for row in map(json.loads, lines) if row["step"] == step))


def training_images(run: Path) -> ImageSet:
    """Return the training images of a run."""
    config = read_config(run / "config.yaml")
    return open_images(config.data, with_labels=True).split(config.data.validation_fraction, config.training.seed)[0]


def pictures(runs: Path) -> Iterator[tuple[str, Images, str, Images]]:
    """Yield each symptom, its samples, what is changed, and the samples then."""
    digits, long_ema = run_of("digits", runs), run_of("long_ema", runs)
    good = samples(digits)
    last = long_ema / "checkpoints" / "step_00000400"
    yield "noise: the EMA is too long", samples(last), "the weights without EMA", samples(last / "unet")
    yield "noise: the learning rate is too low", samples(run_of("warmup", runs)), "a shorter warmup", good
    yield (
        "noisy fragments of a short chain", samples(run_of("short_chain", runs)),
        "scale_betas_to_timesteps", samples(run_of("short_chain_scaled", runs)),
    )  # fmt: skip
    yield (
        "saturated images: guidance_scale 20", samples(digits, guidance_scale=20.0),
        "guidance_scale 1.5", samples(digits, guidance_scale=1.5),
    )  # fmt: skip
    yield (
        "few steps: DDPM in 5", samples(digits, scheduler="DDPMScheduler", num_inference_steps=5),
        "UniPC in 5", samples(digits, num_inference_steps=5),
    )  # fmt: skip
    ancestral = {"scheduler": None, "eta": 1.0, "num_inference_steps": 250}
    yield (
        "a tint: few updates of epsilon with linear betas", samples(run_of("epsilon", runs), **ancestral),
        "v_prediction with cosine", samples(run_of("v_prediction", runs), **ancestral),
    )  # fmt: skip
    few = samples(run_of("few_images", runs))
    copied, _, _ = nearest_images(few, training_images(runs / "few_images"), torch.device("cpu"))
    yield "copies of 36 training images", few, "the nearest training images", copied
    early = samples(digits / "checkpoints" / "step_00000200")
    titles = [f"step {step}, loss {loss_at(digits, step):.2f}" for step in (200, 400)]
    yield f"a flat loss: {titles[0]}", early, titles[1], good


def main() -> int:
    """Train, sample and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("outputs/troubleshooting"))
    parser.add_argument("--output", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    rows = list(pictures(arguments.runs))
    figure = new_figure(9, 0.75 * len(rows))
    for axes, row in zip(figure.subplots(len(rows), 2), rows, strict=True):
        for axis, title, images in zip(axes, row[::2], row[1::2], strict=True):
            axis.imshow(image_grid(images, NUM_IMAGES, enlarge_to=48))
            axis.set_title(title, fontsize=9, loc="left")
            axis.axis("off")
    save_figure(figure, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
