"""The report of a finished run: pictures, recognition.json and README.md.

Takes arrays and writes files; it does not sample. Each file is written atomically.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpm_hf.evaluation.recognition import LabelArray, RecognitionReport
from ddpm_hf.files import (
    CHECKPOINTS_DIR,
    DENOISING_ANIMATION,
    DENOISING_STRIP,
    HUB_DIR,
    LOSS_PICTURE,
    METRICS,
    PIPELINE_DIR,
    PREVIEWS_DIR,
    README,
    RECOGNITION,
    RUN_CONFIG,
    SAMPLES_PICTURE,
    VAE_DIR,
    atomic_write,
    write_json,
    write_text,
)
from ddpm_hf.plots import UInt8Array, denoising_strip, image_grid, points, save_animation, training_curves
from ddpm_hf.redaction import redact

if TYPE_CHECKING:
    from ddpm_hf.evaluation.generate import Sampler

MAX_COLUMNS, MAX_ROWS = 10, 10
# Noise does not compress: an animation of many large images would take tens of megabytes.
MAX_ANIMATED_PIXELS = 1 << 14
MIN_STRIP_ROWS = 3

# What the README says of each file or folder that exists.
_CONTENTS = {
    (f"{PIPELINE_DIR}/",): "the trained pipeline, for `from_pretrained`",
    (f"{VAE_DIR}/",): "the VAE whose latents the network has learned",
    (SAMPLES_PICTURE,): "samples of the finished model",
    (DENOISING_ANIMATION, DENOISING_STRIP): "the denoising process",
    (LOSS_PICTURE,): "the training loss",
    (RECOGNITION,): "the numbers above",
    (METRICS,): "one row of metrics per log interval",
    ("tensorboard/",): "the same for TensorBoard",
    ("wandb/",): "the same for W&B",
    (RUN_CONFIG,): "every setting of the run; `--config` reads it",
    (f"{PREVIEWS_DIR}/",): "samples from the same noise during training",
    (f"{HUB_DIR}/",): "the last push during training and its output",
    ("ema_snapshots/",): "EMA weights, from which `ddpm-hf ema` makes an EMA of any length",
    ("evaluations/",): "evaluations of checkpoints, and of pipelines that the run replaced",
    (f"{CHECKPOINTS_DIR}/",): "checkpoints; the same command continues from the newest one",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportPaths:
    """The files of a report; None for a file that was not written."""

    samples: Path
    denoising: Path
    animation: Path
    loss: Path | None
    recognition: Path | None
    readme: Path


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
    sampler: "Sampler",
    step: int | None = None,
    has_vae: bool = False,
) -> ReportPaths:
    """Write the pictures, recognition.json and README.md of a run into its folder, replacing an earlier report.

    Args:
        output_dir: The run folder.
        samples: uint8 (number, height, width, channels).
        sample_labels: The class of each sample; None for an unconditional model.
        class_names: The name of each class; None names them by number.
        trajectory: uint8 (frames, number, height, width, channels), noise first; if class-conditional, the classes in
            turn.
        metrics: Rows of metrics.jsonl.
        recognition: The recognition report of the samples, if there is one.
        title: Heading of the README.
        command: Command line of the run.
        settings: The main settings, for a table in the README.
        sampler: How the samples were drawn.
        step: Training step of the pipeline, for recognition.json.
        has_vae: Whether the network is one of latents.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    caption = draw_samples(output_dir, samples, sample_labels, class_names, trajectory)
    steps, losses, _ = points(metrics, "loss")
    paths = ReportPaths(
        samples=output_dir / SAMPLES_PICTURE,
        denoising=output_dir / DENOISING_STRIP,
        animation=output_dir / DENOISING_ANIMATION,
        loss=output_dir / LOSS_PICTURE if losses.size else None,
        recognition=output_dir / RECOGNITION if recognition else None,
        readme=output_dir / README,
    )
    if paths.loss:
        atomic_write(paths.loss, lambda path: training_curves({"": metrics}, path))
    if recognition and paths.recognition:
        write_json(paths.recognition, recognition.to_dict() | ({} if step is None else {"step": step}))
    quality = [
        *(recognition.lines() if recognition else []),
        *_score_lines(metrics),
        *([f"loss {losses[-1]:.4f} at step {steps[-1]:,.0f}"] if losses.size else []),
    ]
    names = _class_names(sample_labels, class_names)
    contents = {
        ", ".join(f"`{name}`" for name in files): meaning
        for files, meaning in _CONTENTS.items()
        if all((output_dir / name).exists() for name in files)
    }
    lines = loading_lines(Path(PIPELINE_DIR), names, sampler, has_vae)
    sections = [
        f"# {title}\n\n![samples]({SAMPLES_PICTURE})\n\n{caption}",
        "## Quality\n\n" + "\n".join(f"- {line}" for line in quality) if quality else "",
        f"## Denoising process\n\n![denoising]({DENOISING_ANIMATION})\n\n![denoising steps]({DENOISING_STRIP})",
        f"## Loss\n\n![training loss]({LOSS_PICTURE})" if paths.loss else "",
        f"## How to use\n\nFrom this folder:\n\n```python\n{lines}\n```",
        f"## Training\n\n```sh\n{command}\n```" + _table(("setting", "value"), settings),
        "## Files" + _table(("file", "content"), contents),
    ]
    write_text(paths.readme, redact("\n\n".join(section for section in sections if section) + "\n"))
    return paths


def draw_samples(
    output_dir: Path,
    samples: UInt8Array,
    labels: LabelArray | None,
    class_names: Sequence[str] | None,
    trajectory: UInt8Array,
) -> str:
    """Draw samples.png, denoising.png and denoising.gif of the arrays of `write_report`, and return a caption."""
    if labels is None:
        num_columns = max(1, min(MAX_COLUMNS, math.isqrt(len(samples))))
        grid = image_grid(samples[: num_columns**2], num_columns)
        caption = "Samples, not selected."
    else:
        if labels.shape != (len(samples),):
            raise ValueError(
                f"There are {len(samples)} samples but labels of shape {labels.shape}; give one label per sample."
            )
        names = _class_names(labels, class_names) or []
        classes = np.unique(labels)[:MAX_COLUMNS]
        by_class = [np.flatnonzero(labels == label) for label in classes]
        num_columns, num_rows = len(classes), min(MAX_ROWS, *(len(indices) for indices in by_class))
        order = np.stack([indices[:num_rows] for indices in by_class], axis=1).reshape(-1)
        grid = image_grid(samples[order], num_columns, column_labels=[names[label] for label in classes])
        caption = "Samples, not selected. Each column shows one class."
    atomic_write(output_dir / SAMPLES_PICTURE, lambda path: grid.save(path, "PNG"))
    # Whole rows of images in the animation, or a part of one row if the images are large.
    count, height, width = trajectory.shape[1:4]
    num_animated = min(count, max(1, MAX_ANIMATED_PIXELS // (height * width)))
    num_columns = min(num_columns, num_animated)
    animated = trajectory[:, : num_animated // num_columns * num_columns]
    strip = denoising_strip(trajectory[:, : max(num_columns, MIN_STRIP_ROWS)])
    atomic_write(output_dir / DENOISING_STRIP, lambda path: strip.save(path, "PNG"))
    atomic_write(output_dir / DENOISING_ANIMATION, lambda path: save_animation(animated, path, num_columns=num_columns))
    return caption


def _class_names(labels: LabelArray | None, class_names: Sequence[str] | None) -> Sequence[str] | None:
    """Return a name for each class; None for an unconditional model."""
    if labels is None:
        return None
    count = int(labels.max()) + 1
    if class_names is not None and len(class_names) < count:
        raise ValueError(
            f"There are {len(class_names)} class_names, but a sample of class {count - 1}; name every class."
        )
    return class_names if class_names is not None else [str(label) for label in range(count)]


def loading_lines(
    pipeline_dir: Path, class_names: Sequence[str] | None, sampler: "Sampler", has_vae: bool = False
) -> str:
    """Return Python code that loads a saved pipeline and samples from it.

    Args:
        pipeline_dir: The folder of the pipeline, as the reader would name it.
        class_names: The classes of a class-conditional pipeline; None for an unconditional one.
        sampler: How to sample.
        has_vae: Whether the network is one of latents, which the stock pipeline does not decode.
    """
    folder = json.dumps(pipeline_dir.as_posix(), ensure_ascii=False)
    arguments = "".join(f", {name}={value!r}" for name, value in sampler.call_arguments().items())
    if class_names is None and not has_vae:
        return (
            "# With diffusers alone:\n"
            "from diffusers import DiffusionPipeline\n\n"
            f"pipeline = DiffusionPipeline.from_pretrained({folder})\n"
            "images = pipeline(batch_size=16).images\n\n"
            "# With ddpm_hf, with the sampling settings of these pictures:\n"
            "from ddpm_hf import GaussianDiffusionPipeline\n\n"
            f"pipeline = GaussianDiffusionPipeline.from_pretrained({folder})\n"
            f"images = pipeline(batch_size=16{arguments}).images"
        )
    if class_names is None:
        images = "batch_size=16"
    else:
        count = len(class_names)
        is_named_by_others = any(name.isdecimal() and name != str(number) for number, name in enumerate(class_names))
        labels = repr(list(class_names)) if is_named_by_others else f"list(range({count}))"
        images = f"batch_size={count}, class_labels={labels}"
    return (
        "from ddpm_hf import GaussianDiffusionPipeline\n\n"
        f"pipeline = GaussianDiffusionPipeline.from_pretrained({folder})\n"
        f"images = pipeline({images}{arguments}).images\n\n"
        "# Without ddpm_hf, with the code in the folder; trust_remote_code=True is your consent to run it:\n"
        "from diffusers import DiffusionPipeline\n\n"
        f"folder = {folder}\n"
        "pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)"
    )


def _score_lines(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe the last score of the run."""
    rows = [row for row in metrics if row.get("score") is not None]
    if not rows:
        return []
    last = rows[-1]
    features = f" in the features of {last['score_features']}" if last["score_features"] else ""
    return [
        f"{last['score_metric']}{features} {last['score']:.4f} at step {last['step']:,}: "
        f"{last['score_num_samples']:,} images, {last['score_num_steps']} steps, seed {last['score_seed']}"
    ]


def _table(header: tuple[str, str], rows: Mapping[str, str]) -> str:
    """Return a Markdown table after an empty line; nothing if there are no rows."""
    if not rows:
        return ""
    pipe = r"\|"
    lines = [f"| {key} | {value.replace('|', pipe)} |" for key, value in rows.items()]
    return "\n\n" + "\n".join([f"| {header[0]} | {header[1]} |", "| --- | --- |", *lines])
