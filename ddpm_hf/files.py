"""Names of the files in runs and pipelines; atomic writing, checked reading, checksums and numbers as text."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A run folder (training.output_dir).
RUN_CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
CHECKPOINTS_DIR = "checkpoints"
PREVIEWS_DIR = "previews"
PIPELINE_DIR = "pipeline"
VAE_DIR = "vae"  # also of a pipeline
HUB_DIR = "hub"
EMA_SNAPSHOTS_DIR = "ema_snapshots"
EVALUATIONS_DIR = "evaluations"
TRACKERS = "trackers.json"
README = "README.md"  # also the model card of a published pipeline
SAMPLES_PICTURE = "samples.png"
DENOISING_STRIP = "denoising.png"
DENOISING_ANIMATION = "denoising.gif"
LOSS_PICTURE = "loss.png"
RECOGNITION = "recognition.json"

# A checkpoint.
EMA_DIR = "ema"
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"

# A pipeline folder.
MODEL_INDEX = "model_index.json"
MODEL_CONFIG = "config.json"
UNET_CONFIG = "unet/config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
TRAINING_CONFIG = "training_config.yaml"
TRAINING_SUMMARY = "training_summary.json"
VERIFICATION = "verification.json"
CONVERSION = "conversion.json"
EVALUATION = "evaluation.json"
EVALUATION_PICTURE = "evaluation.png"

# A folder of sampled images, of `ddpm-hf sample` and of an evaluation.
SAMPLING_SETTINGS = "settings.json"


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all; an existing file is kept until the new one is on disk.

    Args:
        path: The file, in an existing folder.
        write: Creates a file at the temporary path that it is called with.

    Raises:
        OSError: The file cannot be written. The error names `path`, also if the disk is full.
    """
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync(path.parent)


def save_array(path: Path, array: "NDArray[Any]") -> None:
    """Write an .npy file completely or not at all."""
    import numpy as np

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, NumPy would append .npy
            np.save(file, array)

    atomic_write(path, write)


def write_text(path: Path, content: str) -> None:
    """Write a UTF-8 text file with `atomic_write`; bytes of file names that are not UTF-8 become escapes."""

    def write(temporary: Path) -> None:
        # "x": never write through a symbolic link
        with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(content)

    atomic_write(path, write)


def write_json(path: Path, content: object) -> None:
    """Write indented JSON with `atomic_write`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def replace_folder(path: Path, write_content: Callable[[Path], object]) -> None:
    """Write a folder completely or not at all; an existing folder is kept until the new one is on disk.

    If the process is killed between the two renames, the next call first restores the old folder.

    Args:
        path: The folder; missing parents are created.
        write_content: Writes all files into the empty temporary folder that it is called with.

    Raises:
        OSError: The folder cannot be written.
    """
    temporary, old = path.with_name(f".{path.name}.writing"), path.with_name(f".{path.name}.old")
    _clean_up(path, temporary, old)
    temporary.mkdir(parents=True)
    try:
        write_content(temporary)
        sync_tree(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync(path.parent)
    finally:
        _clean_up(path, temporary, old)


def _clean_up(path: Path, temporary: Path, old: Path) -> None:
    if old.exists() and not path.exists():
        old.rename(path)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Flush one file or folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, fix: str = "restore or remove it") -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: The file.
        fix: What to do about an invalid file; ends the message.

    Raises:
        ValueError: The file is not valid JSON, or holds something other than an object.
        OSError: The file is missing or cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {fix}.") from None
    return _mapping(content, path, "a JSON object", fix)


def read_yaml(path: Path, fix: str = "restore or remove it") -> dict[str, Any]:
    """Read a YAML file that holds a mapping; arguments and errors are those of `read_json`."""
    try:
        content = yaml.safe_load(path.read_bytes())
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not valid YAML ({yaml_problem(error)}); {fix}.") from None
    return _mapping(content, path, "a YAML mapping", fix)


def _mapping(content: object, path: Path, expected: str, fix: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain {expected}, not {type(content).__name__}; {fix}.")
    return content


def yaml_problem(error: Exception) -> str:
    """Return where and why a YAML file is invalid, in one line without its content."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem or 'syntax error'}"
    return " ".join(str(error).split())


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def format_bytes(num_bytes: float) -> str:
    """Return a size in decimal units: "512 B", "1.2 kB", "35.7 MB", "80.0 GB"."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        num_bytes /= 1000
        if num_bytes < 999.95:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:,.1f} TB"


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units: "42 s", "3 min 5 s", "2 h 10 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun: "1 image", "1,234 images", "2 processes"."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural}"


def format_value(value: object, max_length: int = 50) -> str:
    """Return a setting as it is written in YAML or on the command line, shortened to `max_length` characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= max_length else f"{text[: max_length - 1]}…"
