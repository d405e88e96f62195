"""`ddpm-hf plot`: plots of noise schedules, the forward process, runs and folders of images, read from files."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ddpm_hf.cli.flags import Parser
from ddpm_hf.cli.sample import overviews_in
from ddpm_hf.config import ConfigError, DataConfig, RunConfig, read_config
from ddpm_hf.files import (
    EVALUATION,
    EVALUATIONS_DIR,
    METRICS,
    PIPELINE_DIR,
    RUN_CONFIG,
    SCHEDULER_CONFIG,
    TRAINING_CONFIG,
    atomic_write,
    read_json,
)
from ddpm_hf.model_folder import find_run
from ddpm_hf.redaction import reason_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ddpm_hf.data.decode import EncodedImage
    from ddpm_hf.diffusion.schedule import NoiseSchedule
    from ddpm_hf.plots import UInt8Array


Plot: TypeAlias = tuple[Callable[[Path], object], str]
"""A function that writes the picture to a path, and a description of its content."""

MAX_WIDTH = 16_384  # of a picture, in pixels
# These names say nothing about the content, so the folder around them is used in legends.
_GENERIC_FILES = (RUN_CONFIG, METRICS, EVALUATION, SCHEDULER_CONFIG, TRAINING_CONFIG)
_GENERIC_FOLDERS = (PIPELINE_DIR, "scheduler")

_EXAMPLES = """examples:
  ddpm-hf plot schedule configs/cifar10_32.yaml configs/mnist_28.yaml
  ddpm-hf plot noising photo.png --config configs/cifar10_32.yaml --resolution 128
  ddpm-hf plot loss outputs/run1 outputs/run2 --output loss.png
  ddpm-hf plot timesteps outputs/run1
  ddpm-hf plot grid photos/"""


def plot(arguments: Sequence[str]) -> int:
    """Draw a picture, print where it is, and return the exit code."""
    options = _parser().parse_args(arguments)
    output: Path = options.output
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output {output} must end in .png, the format that is written.")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; give a file name.")
    if not output.parent.is_dir():
        raise NotADirectoryError(f"--output: there is no folder {output.parent}")
    write, content = options.draw(options)
    atomic_write(output, write)
    print(f"{output}: {content}.")
    return 0


def _parser() -> ArgumentParser:
    parser = Parser(
        prog="ddpm-hf plot", description="Draw a picture as PNG. Each kind has its own --help.", epilog=_EXAMPLES
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", title="kinds")

    def add_kind(name: str, draw: Callable[[Namespace], Plot], description: str) -> ArgumentParser:
        example = next(line for line in _EXAMPLES.splitlines() if f" plot {name} " in line).strip()
        kind = kinds.add_parser(name, help=description, description=description, epilog=f"example: {example}")
        kind.add_argument("--output", type=_path, default=Path(f"{name}.png"), help="(default: %(default)s)")
        kind.set_defaults(draw=draw)
        return kind

    def add_resolution(kind: ArgumentParser, default: str) -> None:
        text = f"resize the shorter side to this, and crop a centered square; by default {default}"
        kind.add_argument("--resolution", type=_positive_int, help=text)

    source_of_schedule = "YAML of a run, folder of a run, checkpoint or pipeline, or scheduler_config.json"
    kind = add_kind("schedule", _plot_schedules, "betas, alpha_bar, log SNR and loss weights of noise schedules")
    kind.add_argument("sources", nargs="+", type=_path, metavar="SOURCE", help=source_of_schedule)

    kind = add_kind("noising", _plot_noising, "the forward process on an image, with t and SNR")
    kind.add_argument("image", type=_path, metavar="IMAGE", help="image file")
    kind.add_argument("--config", type=_path, required=True, metavar="SOURCE", help=source_of_schedule)
    kind.add_argument("--timesteps", type=int, nargs="+", metavar="T", help="by default 8, evenly spaced")
    add_resolution(kind, "that of the configuration, or the size of the image")
    kind.add_argument("--seed", type=int, default=0, help="seed of the noise, which is the same at each t")

    kind = add_kind("loss", _plot_losses, "losses and scores of one or more runs")
    kind.add_argument("runs", nargs="+", type=_path, metavar="RUN", help="run folder, or a metrics.jsonl")

    kind = add_kind("timesteps", _plot_timesteps, "loss by timestep of a run or an evaluation")
    kind.add_argument("run", type=_path, metavar="RUN", help="run folder, or a folder with an evaluation.json")

    kind = add_kind("grid", _plot_grid, "images of a folder, with a column for each subfolder")
    kind.add_argument("folder", type=_path, metavar="FOLDER", help="folder of images")
    kind.add_argument("--columns", type=_positive_int, default=10, help="largest number (default: %(default)s)")
    kind.add_argument("--rows", type=_positive_int, default=8, help="largest number (default: %(default)s)")
    add_resolution(kind, "the size of the images")
    return parser


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return the name of each input for a legend, or its path if several have the same name."""
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise ValueError(f"{paths[index]} is given twice; give it once.")
    names = []
    for path in resolved:
        folder = path.parent if path.name in _GENERIC_FILES else path
        stem = folder.stem if folder.suffix in (".yaml", ".yml", ".json") else folder.name
        names.append(f"{folder.parent.name}/{folder.name}" if folder.name in _GENERIC_FOLDERS else stem)
    return [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]


# ---------------------------------------------------------------------------------- schedules and the forward process


@dataclass(frozen=True)
class Process:
    """A forward process, and the configuration of its run if it was read from one."""

    schedule: "NoiseSchedule"
    prediction_type: str
    config: RunConfig | None


def read_process(path: Path) -> Process:
    """Read a forward process from a YAML file, a scheduler_config.json, or the folder of a run or model."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a YAML file, or the folder of a run, checkpoint or pipeline.")
    file = path
    if path.is_dir():
        candidates = [path / "scheduler" / SCHEDULER_CONFIG, path / SCHEDULER_CONFIG, path / RUN_CONFIG]
        if (run := find_run(path)) is not None:  # of a network in a checkpoint
            candidates.append(run / RUN_CONFIG)
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise ValueError(
                f"{path} holds no schedule: it has no scheduler/{SCHEDULER_CONFIG}, {SCHEDULER_CONFIG} or {RUN_CONFIG}."
            )
        file = found
    from ddpm_hf.diffusion import GaussianDiffusionScheduler

    config = None
    if file.suffix == ".json":
        content = read_json(file)
        for name in ("num_train_timesteps", "beta_schedule"):
            if name not in content:
                raise ValueError(f"{file} is not the configuration of a scheduler with betas: it has no {name}.")
        try:
            scheduler = GaussianDiffusionScheduler.from_config(content)
        except Exception as error:  # torch raises several types for tables that are too large
            reason = reason_of(error)
            raise ValueError(f"{file} is not the configuration of a scheduler with betas: {reason}.") from error
    else:
        try:
            config = read_config(file)
        except ConfigError as error:
            raise ConfigError(f"{file} is not the configuration of a run: {error}") from None
        scheduler = GaussianDiffusionScheduler.create(**config.diffusion.scheduler_options())
    return Process(scheduler.noise_schedule, scheduler.config["prediction_type"], config)


def _plot_schedules(options: Namespace) -> Plot:
    from ddpm_hf.plots import schedule_plot

    names = names_of(options.sources)
    processes = {name: read_process(path) for name, path in zip(names, options.sources, strict=True)}
    schedules = {name: process.schedule.alphas_cumprod.numpy() for name, process in processes.items()}
    weights = {name: weight for name, process in processes.items() if (weight := _loss_weight(process)) is not None}
    is_weighted = any((weight != 1).any() for weight in weights.values())
    panels = f"beta, alpha_bar{', log SNR and loss weight' if is_weighted else ' and log SNR'} of {', '.join(names)}"
    return lambda path: schedule_plot(schedules, path, loss_weights=weights if is_weighted else None), panels


def _loss_weight(process: Process) -> "NDArray[np.float64] | None":
    """Return the loss weight at each timestep; None if the objective is unknown, or the bound alone."""
    from ddpm_hf.training.loss import loss_weight

    if process.config is None or process.config.objective.loss == "vlb":
        return None
    snr = process.schedule.snr
    weight = loss_weight(process.config.objective, process.prediction_type, snr)
    table: NDArray[np.float64] = (snr.new_ones(len(snr)) if weight is None else weight).numpy()
    return table


def _plot_noising(options: Namespace) -> Plot:
    from ddpm_hf.plots import forward_strip

    process = read_process(options.config)
    num_timesteps = len(process.schedule)
    count = min(8, num_timesteps)
    timesteps = options.timesteps or [round(index * (num_timesteps - 1) / max(count - 1, 1)) for index in range(count)]
    for t in timesteps:
        if not 0 <= t < num_timesteps:
            raise ValueError(f"--timesteps {t} is out of range; give 0 to {num_timesteps - 1}.")
    data = process.config.data if process.config else DataConfig()
    image = read_image(options.image, replace(data, resolution=options.resolution or data.resolution))
    if image.shape[1] * len(timesteps) > MAX_WIDTH:
        raise ValueError(f"{len(timesteps)} images of {image.shape[1]} pixels are too wide; give --resolution.")
    states = noise_image(image, process, timesteps, options.seed)
    snrs = process.schedule.snr[timesteps].tolist()
    return lambda path: forward_strip(states, timesteps, snrs).save(path, "PNG"), f"x_t at t = {timesteps}"


def noise_image(image: "UInt8Array", process: Process, timesteps: Sequence[int], seed: int) -> "UInt8Array":
    """Add the same noise to an image (height, width, channels) at several timesteps, in float32.

    Returns:
        uint8 (len(timesteps), height, width, channels): x_t, clipped to [-1, 1].
    """
    import torch

    from ddpm_hf.data import normalize
    from ddpm_hf.diffusion.gaussian import q_sample
    from ddpm_hf.diffusion.images import to_images
    from ddpm_hf.rng import torch_generator

    x_0 = normalize(torch.tensor(image).permute(2, 0, 1)[None])
    eps = torch.randn(x_0.shape, generator=torch_generator("cpu", seed, "plot_noising"))
    alpha = process.schedule.sqrt_alphas_cumprod[timesteps].float().view(-1, 1, 1, 1)
    sigma = process.schedule.sqrt_one_minus_alphas_cumprod[timesteps].float().view(-1, 1, 1, 1)
    states: UInt8Array = to_images(q_sample(x_0, eps, alpha, sigma), "uint8")
    return states


# ---------------------------------------------------------------------------------------------------------------- runs


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run folder or a metrics.jsonl, without an incomplete last line."""
    from ddpm_hf.training.logging import MetricsLog

    if path.is_dir() and not (path / METRICS).exists():
        path = find_run(path) or path
    file = path / METRICS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give the folder of a run, which holds {METRICS}.")
    rows = MetricsLog(file).rows()
    if not rows:
        raise ValueError(
            f"{file} has no complete line of metrics; wait for training.log_every_steps if the run has just started."
        )
    return rows


def _plot_losses(options: Namespace) -> Plot:
    from ddpm_hf.plots import training_curves

    names = names_of(options.runs)
    runs = {name: read_metrics(path) for name, path in zip(names, options.runs, strict=True)}
    return lambda path: training_curves(runs, path), f"losses of {', '.join(names)}"


def _plot_timesteps(options: Namespace) -> Plot:
    """Plot the loss by quartile of the timesteps, and the errors and terms of an evaluated bound."""
    from ddpm_hf.plots import timestep_curves

    run: Path = options.run
    if run.is_dir() and not any((run / name).exists() for name in (METRICS, EVALUATION)):
        run = find_run(run) or run
    if not run.is_dir():
        raise ValueError(f"{run} is not a folder; give that of a run, or one with an {EVALUATION}.")
    rows = read_metrics(run) if (run / METRICS).exists() else []
    of_checkpoints = sorted(run.glob(f"{EVALUATIONS_DIR}/step_*/{EVALUATION}"), reverse=True)
    places = (run / EVALUATION, run / PIPELINE_DIR / EVALUATION, *of_checkpoints)
    evaluations = [path for path in places if path.is_file()]
    bounds = {path: bound for path in evaluations if (bound := read_json(path).get("bound")) is not None}
    path_of_bound, bound = next(iter(bounds.items()), (None, None))
    found = [f"loss by quartile in {run / METRICS}"] if any("loss_q0" in row for row in rows) else []
    found += [f"error by timestep in {path_of_bound}"] if path_of_bound else []
    if not found:
        raise ValueError(
            f"{run} has no loss by timestep: no loss_q0 in {METRICS}, and no {EVALUATION} with a bound; run `ddpm-hf "
            "evaluate` with --metrics bits_per_dim."
        )
    return lambda path: timestep_curves(path, metrics=rows, bound=bound), " and ".join(found)


# -------------------------------------------------------------------------------------------------------------- images


def read_image(file: Path, data: DataConfig) -> "UInt8Array":
    """Read an image with the data settings of a run, but a center crop; uint8 (height, width, channels)."""
    from ddpm_hf.data.decode import EncodedImage

    if not file.is_file():
        raise ValueError(f"{file} is not a file; give an image file.")
    (image,) = _decode([EncodedImage(str(file), file)], data)
    return image


def read_folder(folder: Path, data: DataConfig, num_columns: int, num_rows: int) -> tuple["UInt8Array", list[str], str]:
    """Read the first images of a folder, or of each of its subfolders, without the overviews of `ddpm-hf sample`.

    Returns:
        uint8 (number, height, width, channels) in the order of a grid; column labels, none without subfolders; and a
        description.
    """
    import numpy as np

    from ddpm_hf.data.folders import open_folder

    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a folder of images.")
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


def _decode(cells: "Sequence[EncodedImage]", data: DataConfig) -> "list[UInt8Array]":
    """Decode images to 8 bits, with the channels of the settings, or the smallest number that fits all images."""
    import numpy as np

    from ddpm_hf.data.decode import MODE_OF_CHANNELS, Geometry, OutputFormat, decode, read_header

    headers = [read_header(cell) for cell in cells]
    for cell, header in zip(cells, headers, strict=True):
        if header.dtype != "uint8":
            values = "16 bits per channel" if header.dtype == "uint16" else f"{header.dtype} values"
            raise ValueError(f"{cell.name} has {values}, but PNG plots have 8; convert it first.")
    geometry = Geometry.of(replace(data, crop="center"))
    channels_of_mode = {mode: channels for channels, mode in MODE_OF_CHANNELS.items()}
    num_channels = data.num_channels or max(channels_of_mode[header.mode] for header in headers)
    target = OutputFormat(num_channels, np.dtype(np.uint8), data.background, geometry)
    images = [decode(cell, target).transpose(1, 2, 0) for cell in cells]
    for cell, image in zip(cells, images, strict=True):
        if image.shape != images[0].shape:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (image.shape, images[0].shape)]
            raise ValueError(f"{cell.name} has {sizes[0]} pixels where the first has {sizes[1]}; give --resolution.")
    return images


def _plot_grid(options: Namespace) -> Plot:
    from ddpm_hf.plots import image_grid

    data = DataConfig(resolution=options.resolution)
    images, labels, content = read_folder(options.folder, data, options.columns, options.rows)
    num_columns = len(labels) or min(options.columns, len(images))
    if images.shape[2] * num_columns > MAX_WIDTH:
        raise ValueError(f"{num_columns} images of {images.shape[2]} pixels are too wide; give --resolution.")
    return lambda path: image_grid(images, num_columns, column_labels=labels or None).save(path, "PNG"), content
