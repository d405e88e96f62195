"""What `ddpm-hf plot` draws, read from files: schedules, metrics, evaluations, images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_hf.commands.picture_folder import overviews_in
from ddpm_hf.config import ConfigError, DataConfig, RunConfig, read_config
from ddpm_hf.redaction import reason_of

if TYPE_CHECKING:
    from ddpm_hf.data.decoding import Cell
    from ddpm_hf.diffusion.noise_schedule import NoiseSchedule
    from ddpm_hf.plots import UInt8Array

CONFIG, METRICS, EVALUATION = "config.yaml", "metrics.jsonl", "evaluation.json"
SCHEDULER = "scheduler_config.json"
# Names that say nothing of what is inside: the folder around them does.
_FILE_NAMES = (CONFIG, METRICS, EVALUATION, SCHEDULER, "training_config.yaml")
_FOLDER_NAMES = ("pipeline", "scheduler")


@dataclass(frozen=True)
class Process:
    """A forward process, and the configuration of the run that has it, if it was read from one."""

    schedule: "NoiseSchedule"
    prediction_type: str
    config: RunConfig | None


def name_of_each(paths: Sequence[Path]) -> list[str]:
    """Returns what each input is called in a legend: its name, or as it was given where two have the same.

    Raises:
        ValueError: If one is given twice.
    """
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise ValueError(f"{paths[index]} is given twice; give it once.")
    names = [_name(path) for path in resolved]
    return [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]


def _name(path: Path) -> str:
    """Returns the name of a recipe or of a folder."""
    if path.name in _FILE_NAMES:
        path = path.parent
    if path.name in _FOLDER_NAMES:
        return f"{path.parent.name}/{path.name}"
    return path.stem if path.suffix in (".yaml", ".yml", ".json") else path.name


def read_process(path: Path) -> Process:
    """Reads a forward process from a recipe, a run folder, a pipeline folder or a scheduler_config.json.

    Raises:
        ValueError: If there is none.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a YAML file, a run folder or a pipeline folder.")
    file = path
    if path.is_dir():
        candidates = (path / "scheduler" / SCHEDULER, path / SCHEDULER, path / CONFIG)
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise ValueError(f"{path} holds no schedule: there is no scheduler/{SCHEDULER}, {SCHEDULER} or {CONFIG}.")
        file = found[0]
    return _read_scheduler(file) if file.suffix == ".json" else _read_config(file)


def _read_config(file: Path) -> Process:
    """Reads the forward process of a run."""
    from ddpm_hf.diffusion import GaussianDiffusionScheduler

    try:
        config = read_config(file)
    except ConfigError as error:
        raise ConfigError(f"{file} is not the configuration of a run: {error}") from None
    settings = {name: getattr(config.diffusion, name) for name in config.diffusion.__dataclass_fields__}
    scheduler = GaussianDiffusionScheduler.create(**settings)
    return Process(scheduler.noise_schedule, scheduler.config["prediction_type"], config)


def _read_scheduler(file: Path) -> Process:
    """Reads the forward process of a saved pipeline, which may be that of any scheduler with betas."""
    content = read_json(file)
    missing = [name for name in ("num_train_timesteps", "beta_schedule") if name not in content]
    if missing:
        raise ValueError(f"{file} is not the configuration of a scheduler with betas: it has no {missing[0]}.")
    from ddpm_hf.diffusion import GaussianDiffusionScheduler

    try:
        scheduler = GaussianDiffusionScheduler.from_config(content)
    except Exception as error:  # whatever torch raises for tables of an absurd size
        raise ValueError(f"{file} is not the configuration of a scheduler with betas: {reason_of(error)}.") from error
    return Process(scheduler.noise_schedule, scheduler.config["prediction_type"], None)


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: If the file holds something else.
    """
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(content).__name__}.")
    return content


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the metrics of a run folder, or a metrics.jsonl; a last line that is being written is left out.

    Raises:
        ValueError: If there are none.
    """
    from ddpm_hf.training.tracking import MetricsLog

    file = path / METRICS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give the folder of a run, which holds {METRICS}.")
    rows = MetricsLog(file).rows()
    if not rows:
        raise ValueError(
            f"{file} holds no whole line of metrics; wait for training.log_every_steps if the run has just begun, or "
            "give another run."
        )
    return rows


def read_image(file: Path, data: DataConfig) -> "UInt8Array":
    """Reads an image as a run with these settings would, but cropped in the centre; uint8 (height, width, channels).

    Raises:
        ValueError: If it cannot be read, or has other channels than the settings ask for.
    """
    from ddpm_hf.data.decoding import Cell

    if not file.is_file():
        raise ValueError(f"{file} is no file; give that of an image.")
    (image,) = _decode([Cell(str(file), file)], data)
    return image


def read_folder(folder: Path, data: DataConfig, num_columns: int, num_rows: int) -> tuple["UInt8Array", list[str], str]:
    """Reads the first images of a folder, or the first ones of each of its sub folders.

    Of a folder that `ddpm-hf sample` drew, the grid, the strip and the animation are none of them.

    Returns:
        uint8 (number, height, width, channels) in the order of a grid; the label of each column, none without sub
        folders; and what they are, in words.

    Raises:
        ValueError: If there are none, or they are not of one size.
    """
    import numpy as np

    from ddpm_hf.data.files import open_folder

    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give a folder of images.")
    source = open_folder(folder, "train")
    if source.labels is None or source.class_names is None:
        overviews = {folder / name for name in overviews_in(folder)}
        cells = source.read(range(source.num_images))
        pictures = [row for row, cell in enumerate(cells) if cell.data not in overviews]
        order = pictures[: num_columns * num_rows]
        names, words = [], f"{len(order)} of {len(pictures)} images"
    else:
        present = np.unique(source.labels[source.labels >= 0]).tolist()
        of_each = [np.flatnonzero(source.labels == label) for label in present[:num_columns]]
        num_rows = min(num_rows, *map(len, of_each)) if len(of_each) > 1 else min(num_rows, len(of_each[0]))
        order = np.stack([rows[:num_rows] for rows in of_each], axis=1).reshape(-1).tolist()
        names = [source.class_names[label] for label in present[:num_columns]]
        words = f"{num_rows} images of each of {len(of_each)} of {len(present)} folders"
    images = dict(zip(sorted(order), _decode(list(source.read(sorted(order))), data), strict=True))
    return np.stack([images[row] for row in order]), names, words


def _decode(cells: "Sequence[Cell]", data: DataConfig) -> "list[UInt8Array]":
    """Decodes images to 8 bits, with the channels that the settings ask for or that hold every one of them."""
    import numpy as np

    from ddpm_hf.data.decoding import MODE_OF_CHANNELS, Target, decode, read_header
    from ddpm_hf.data.geometry import Geometry

    headers = [read_header(cell) for cell in cells]
    for cell, header in zip(cells, headers, strict=True):
        if header.is_deep:
            raise ValueError(f"{cell.name} has 16 bits a channel, and pictures have 8; convert it first.")
    geometry = Geometry.of(replace(data, crop="center"))
    channels_of_mode = {mode: channels for channels, mode in MODE_OF_CHANNELS.items()}
    num_channels = data.num_channels or max(channels_of_mode[header.mode] for header in headers)
    target = Target(num_channels, np.dtype(np.uint8), data.background, geometry)
    images = [decode(cell, target).transpose(1, 2, 0) for cell in cells]
    for cell, image in zip(cells, images, strict=True):
        if image.shape != images[0].shape:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (image.shape, images[0].shape)]
            raise ValueError(f"{cell.name} has {sizes[0]} pixels where the first has {sizes[1]}; give --resolution.")
    return images
