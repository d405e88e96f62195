"""The report of a finished run: pictures and numbers.

Arrays in, files out: this module samples nothing and knows neither torch nor diffusers. Every file is written under a
temporary name and renamed, so a reader never finds half of one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from ddpm_hf.evaluation.recognition import LabelArray, RecognitionReport
from ddpm_hf.files import write_text, write_whole
from ddpm_hf.plots import UInt8Array, denoising_strip, image_grid, loss_curve, save_animation
from ddpm_hf.redaction import redact

PIPELINE_DIR = "pipeline"
SAMPLES, STRIP, ANIMATION = "samples.png", "denoising.png", "denoising.gif"
MAX_COLUMNS, MAX_ROWS = 10, 10
# Noise cannot be compressed: an animation of many large images would be tens of megabytes.
MAX_ANIMATED_PIXELS = 1 << 14
MIN_STRIP_ROWS = 3

_FILES = {
    "pipeline/": "the trained pipeline, for `from_pretrained`",
    "samples.png": "samples of the finished model",
    "denoising.gif, denoising.png": "how they come out of noise",
    "loss.png": "the training loss",
    "recognition.json": "the numbers above",
    "metrics.jsonl": "one line of metrics a log interval",
    "tensorboard/": "the same for TensorBoard",
    "wandb/": "the same for W&B",
    "config.yaml": "every setting of the run; `--config` reads it",
    "previews/": "samples of the same noise during training",
    "hub/": "what was pushed last while training, and what the push said",
    "ema_snapshots/": "averages of the weights, of which `ddpm-hf ema` makes one of any length",
    "evaluations/": "what was measured of pipelines that the run replaced",
    "checkpoints/": "what the same command continues from",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportPaths:
    """The files of a report; None where there was nothing to show."""

    samples: Path
    denoising: Path
    animation: Path
    loss: Path | None
    recognition: Path | None
    readme: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSettings:
    """How the samples of a report were drawn; None stands for the pipeline's own default."""

    num_inference_steps: int | None = None
    eta: float | None = None
    guidance_scale: float | None = None

    def arguments(self) -> str:
        """Returns the settings as arguments of a call, with a comma before each."""
        values = {name: getattr(self, name) for name in ("num_inference_steps", "eta", "guidance_scale")}
        return "".join(f", {name}={value!r}" for name, value in values.items() if value is not None)


DEFAULT_SAMPLING = SamplingSettings()


def write_report(
    output_dir: Path,
    *,
    samples: UInt8Array,
    sample_labels: LabelArray | None,
    class_names: Sequence[str] | None,
    trajectory: UInt8Array,
    metrics: Sequence[Mapping[str, Any]],
    recognition: RecognitionReport | None,
    title: str,
    command: str,
    settings: Mapping[str, str],
    sampling: SamplingSettings = DEFAULT_SAMPLING,
) -> ReportPaths:
    """Writes the pictures, recognition.json and README.md of a run into its folder, over those of an earlier report.

    Args:
        output_dir: The run folder.
        samples: uint8, (number, height, width, channels).
        sample_labels: The class of each sample, or None for an unconditional model.
        class_names: The name of each class; None names them by number.
        trajectory: uint8, (frames, number, height, width, channels), noise first; with classes, one of each in turns.
        metrics: Rows with `step`, and with `loss` or `validation_loss` where these were measured.
        recognition: What the samples were found to be, if that was asked.
        title: Heading of the README.
        command: The command line of the run.
        settings: What the README lists as the main settings.
        sampling: How the samples were drawn.

    Raises:
        ValueError: If the samples and their labels do not fit together.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    caption = draw_samples(output_dir, samples, sample_labels, class_names, trajectory)
    training, validation = _points(metrics, "loss"), _points(metrics, "validation_loss")
    paths = ReportPaths(
        samples=output_dir / SAMPLES,
        denoising=output_dir / STRIP,
        animation=output_dir / ANIMATION,
        loss=output_dir / "loss.png" if training else None,
        recognition=output_dir / "recognition.json" if recognition else None,
        readme=output_dir / "README.md",
    )
    if paths.loss:
        write_whole(paths.loss, lambda path: _draw_losses(training, validation, path))
    if recognition and paths.recognition:
        write_text(paths.recognition, json.dumps(recognition.to_dict(), indent=2) + "\n")
    readme = _readme(
        heading=f"# {title}\n\n![samples](samples.png)\n\n{caption}",
        quality=_quality_section(training, recognition, _score_lines(metrics)),
        loss="## Loss\n\n![training loss](loss.png)" if paths.loss else "",
        loading=loading_lines(Path(PIPELINE_DIR), _names(sample_labels, class_names), sampling=sampling),
        origin=f"```sh\n{command}\n```" + _table(("setting", "value"), settings),
        files=_files_in(output_dir),
    )
    write_text(paths.readme, redact(readme))
    return paths


def draw_samples(
    output_dir: Path,
    samples: UInt8Array,
    labels: LabelArray | None,
    class_names: Sequence[str] | None,
    trajectory: UInt8Array,
) -> str:
    """Draws samples.png, and denoising.png and denoising.gif, which show how samples come out of noise.

    Args:
        output_dir: A folder that exists.
        samples: uint8, (number, height, width, channels).
        labels: The class of each sample, or None for an unconditional model.
        class_names: The name of each class; None names them by number.
        trajectory: uint8, (frames, number, height, width, channels), noise first; with classes, one of each in turns.

    Returns:
        A sentence about samples.png.

    Raises:
        ValueError: If the samples and their labels do not fit together.
    """
    grid, caption, num_columns = _choose_samples(samples, labels, class_names)
    write_whole(output_dir / SAMPLES, lambda path: grid.save(path, "PNG"))
    _show_denoising(trajectory, num_columns, output_dir)
    return caption


def loading_lines(
    pipeline_dir: Path, class_names: Sequence[str] | None = None, *, sampling: SamplingSettings = DEFAULT_SAMPLING
) -> str:
    """Returns Python that loads a saved pipeline and samples from it.

    Args:
        pipeline_dir: The folder, as the reader would name it.
        class_names: The classes of a class-conditional pipeline.
        sampling: How to sample.
    """
    folder = json.dumps(pipeline_dir.as_posix(), ensure_ascii=False)
    if class_names is None:
        return (
            "# With diffusers alone:\n"
            "from diffusers import DiffusionPipeline\n\n"
            f"pipeline = DiffusionPipeline.from_pretrained({folder})\n"
            "images = pipeline(batch_size=16).images\n\n"
            "# With ddpm_hf, as the pictures of this run were drawn:\n"
            "from ddpm_hf import GaussianDiffusionPipeline\n\n"
            f"pipeline = GaussianDiffusionPipeline.from_pretrained({folder})\n"
            f"images = pipeline(batch_size=16{sampling.arguments()}).images"
        )
    count = len(class_names)
    return (
        "from ddpm_hf import GaussianDiffusionPipeline\n\n"
        f"pipeline = GaussianDiffusionPipeline.from_pretrained({folder})\n"
        f"images = pipeline(batch_size={count}, class_labels=list(range({count})){sampling.arguments()}).images\n\n"
        "# Where ddpm_hf is not installed, the folder brings the code; trust_remote_code is your consent to run it.\n"
        "from diffusers import DiffusionPipeline\n\n"
        f"folder = {folder}\n"
        "pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)"
    )


def _choose_samples(
    samples: UInt8Array, labels: LabelArray | None, class_names: Sequence[str] | None
) -> tuple[Image, str, int]:
    """Returns the grid of samples.png, a sentence about it, and the number of its columns."""
    if labels is None:
        side = max(1, min(MAX_COLUMNS, math.isqrt(len(samples))))
        return image_grid(samples[: side**2], side), "Samples, not selected.", side
    if labels.shape != (len(samples),):
        raise ValueError(
            f"There are {len(samples)} samples but labels of shape {labels.shape}; give one for each sample."
        )
    classes = np.unique(labels)[:MAX_COLUMNS]
    by_class = [np.flatnonzero(labels == label) for label in classes]
    num_rows = min(MAX_ROWS, *(len(indices) for indices in by_class))
    order = np.stack([indices[:num_rows] for indices in by_class], axis=1).reshape(-1)
    names = _names(labels, class_names) or []
    grid = image_grid(samples[order], len(classes), column_labels=[names[label] for label in classes])
    return grid, "Samples, not selected. Each column shows one class.", len(classes)


def _names(labels: LabelArray | None, class_names: Sequence[str] | None) -> Sequence[str] | None:
    """Returns a name for each class, or None for an unconditional model."""
    if labels is None:
        return None
    count = int(labels.max()) + 1
    if class_names is not None and len(class_names) < count:
        raise ValueError(
            f"There are {len(class_names)} class_names, but a sample of class {count - 1}; name every class."
        )
    return class_names if class_names is not None else [str(label) for label in range(count)]


def _show_denoising(trajectory: UInt8Array, num_columns: int, output_dir: Path) -> None:
    """Draws the strip and the animation, of whole rows of images, or of part of one where the images are large."""
    count, height, width = trajectory.shape[1:4]
    num_fitting = min(count, max(1, MAX_ANIMATED_PIXELS // (height * width)))
    num_columns = min(num_columns, num_fitting)
    animated = trajectory[:, : num_fitting // num_columns * num_columns]
    num_strip_rows = max(num_columns, MIN_STRIP_ROWS)
    strip = denoising_strip(trajectory[:, :num_strip_rows])
    write_whole(output_dir / STRIP, lambda path: strip.save(path, "PNG"))
    write_whole(output_dir / ANIMATION, lambda path: save_animation(animated, path, num_columns=num_columns))


def _points(metrics: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Returns the step and the value of one metric where it was measured."""
    return [(row["step"], row[name]) for row in metrics if row.get(name) is not None]


def _draw_losses(training: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]], path: Path) -> None:
    """Draws the loss, and the validation loss where there is one."""
    loss_curve(
        [step for step, _ in training],
        [loss for _, loss in training],
        path,
        validation_steps=[step for step, _ in validation],
        validation_losses=[loss for _, loss in validation],
    )


def _quality_section(
    training: Sequence[tuple[int, float]], recognition: RecognitionReport | None, scores: Sequence[str]
) -> str:
    """Says in a few lines how good the samples are and how far the loss came."""
    lines = list(recognition.lines()) if recognition else []
    lines += scores
    lines += [f"loss {loss:.4f} at step {step:,}" for step, loss in training[-1:]]
    return "## How good it is\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


def _score_lines(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says which score the run ended with, and what it is a score of."""
    rows = [row for row in metrics if row.get("score") is not None]
    if not rows:
        return []
    last = rows[-1]
    features = f" in the features of {last['score_features']}" if last["score_features"] else ""
    return [
        f"{last['score_metric']}{features} {last['score']:.4f} at step {last['step']:,}: "
        f"{last['score_num_samples']:,} images, {last['score_num_steps']} steps, seed {last['score_seed']}"
    ]


def _readme(*, heading: str, quality: str, loss: str, loading: str, origin: str, files: Mapping[str, str]) -> str:
    """Puts the README of a run together; empty sections are left out."""
    sections = [
        heading,
        quality,
        "## From noise to image\n\n![samples coming out of noise](denoising.gif)\n\n![steps](denoising.png)",
        loss,
        f"## Load it\n\nFrom this folder:\n\n```python\n{loading}\n```",
        f"## How it was made\n\n{origin}",
        "## Files" + _table(("file", "what it holds"), files),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _files_in(output_dir: Path) -> dict[str, str]:
    """Returns what there is in the run folder, with a word on each."""
    return {
        ", ".join(f"`{name}`" for name in names.split(", ")): meaning
        for names, meaning in _FILES.items()
        if all((output_dir / name).exists() for name in names.split(", "))
    }


def _table(header: tuple[str, str], rows: Mapping[str, str]) -> str:
    """Returns a Markdown table after an empty line; nothing if it has no rows."""
    if not rows:
        return ""
    pipe = r"\|"
    lines = [f"| {key} | {value.replace('|', pipe)} |" for key, value in rows.items()]
    return "\n\n" + "\n".join([f"| {header[0]} | {header[1]} |", "| --- | --- |", *lines])
