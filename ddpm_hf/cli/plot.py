"""What `ddpm-hf plot` draws, read from files: schedules, metrics, evaluations, images.

`ddpm-hf plot`: pictures of schedules, forward noising, runs and folders of images.
"""

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_hf.cli.flags import Parser
from ddpm_hf.cli.sample import overviews_in
from ddpm_hf.config import ConfigError, DataConfig, RunConfig, read_config
from ddpm_hf.redaction import reason_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ddpm_hf.data.decode import EncodedImage
    from ddpm_hf.diffusion.schedule import NoiseSchedule
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
    from ddpm_hf.training.logging import MetricsLog

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
    from ddpm_hf.data.decode import EncodedImage

    if not file.is_file():
        raise ValueError(f"{file} is no file; give that of an image.")
    (image,) = _decode([EncodedImage(str(file), file)], data)
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

    from ddpm_hf.data.sources import open_folder

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


def _decode(cells: "Sequence[EncodedImage]", data: DataConfig) -> "list[UInt8Array]":
    """Decodes images to 8 bits, with the channels that the settings ask for or that hold every one of them."""
    import numpy as np

    from ddpm_hf.data.decode import MODE_OF_CHANNELS, Geometry, OutputFormat, decode, read_header

    headers = [read_header(cell) for cell in cells]
    for cell, header in zip(cells, headers, strict=True):
        if header.is_16_bit:
            raise ValueError(f"{cell.name} has 16 bits a channel, and pictures have 8; convert it first.")
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


_Drawing = tuple[Callable[[Path], object], str]
"""What writes the picture, and what is in it."""

MOST_PIXELS_WIDE = 16_384

_EXAMPLES = """examples:
  ddpm-hf plot schedule configs/cifar10_32.yaml configs/mnist_28.yaml
  ddpm-hf plot noising photo.png --config configs/cifar10_32.yaml --resolution 128
  ddpm-hf plot loss outputs/run1 outputs/run2 --output loss.png
  ddpm-hf plot timesteps outputs/run1
  ddpm-hf plot grid photos/"""


def plot(arguments: Sequence[str]) -> int:
    """Draws a picture, says where it is, and returns the exit code."""
    options = _parser().parse_args(arguments)
    output: Path = options.output
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output {output} must end in .png, since that is what is written.")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; name a file.")
    if not output.parent.is_dir():
        raise NotADirectoryError(f"--output: there is no folder {output.parent}")
    write, words = options.draw(options)

    from ddpm_hf.files import write_whole

    write_whole(output, write)
    print(f"{output}: {words}.")
    return 0


def _parser() -> ArgumentParser:
    """Builds the command line."""
    parser = Parser(
        prog="ddpm-hf plot",
        description="Draw a picture as a PNG. Each kind has a --help of its own.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", title="kinds")

    def add_kind(name: str, draw: Callable[[Namespace], Any], description: str) -> ArgumentParser:
        example = next(line for line in _EXAMPLES.splitlines() if f" plot {name} " in line).strip()
        kind = kinds.add_parser(name, help=description, description=description, epilog=f"example: {example}")
        kind.add_argument("--output", type=Path, default=Path(f"{name}.png"), help="by default %(default)s, here")
        kind.set_defaults(draw=draw)
        return kind

    source_of_schedule = "YAML of a run, run folder, pipeline folder or scheduler_config.json"
    kind = add_kind("schedule", _schedule, "betas, alpha_bar, log SNR and loss weights of one or more schedules")
    kind.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help=source_of_schedule)

    kind = add_kind("noising", _noising, "an image on its way to noise, with t and SNR")
    kind.add_argument("image", type=Path, metavar="IMAGE", help="any image file")
    kind.add_argument("--config", type=Path, required=True, metavar="SOURCE", help=source_of_schedule)
    kind.add_argument("--timesteps", type=int, nargs="+", metavar="T", help="by default 8 over the whole chain")
    _add_resolution(kind, "that of the configuration, or else the image's")
    kind.add_argument("--seed", type=int, default=0, help="of the noise, which is the same at each t")

    kind = add_kind("loss", _loss, "losses and scores of one or more runs on one axis")
    kind.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or a metrics.jsonl")

    kind = add_kind("timesteps", _timesteps, "what a run, or an evaluation, says of the loss at different timesteps")
    kind.add_argument("run", type=Path, metavar="RUN", help="run folder, or a folder with an evaluation.json")

    kind = add_kind("grid", _grid, "the images of a folder, a column for each of its sub folders")
    kind.add_argument("folder", type=Path, metavar="FOLDER", help="folder of images")
    kind.add_argument("--columns", type=_at_least_1, default=10, help="at most this many (default: %(default)s)")
    kind.add_argument("--rows", type=_at_least_1, default=8, help="at most this many (default: %(default)s)")
    _add_resolution(kind, "that of the images")
    return parser


def _add_resolution(kind: ArgumentParser, default: str) -> None:
    """Adds the size that images are brought to."""
    kind.add_argument(
        "--resolution",
        type=_at_least_1,
        help=f"resize the shorter side to this and cut out a square; by default {default}",
    )


def _at_least_1(text: str) -> int:
    """Reads a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def _schedule(options: Namespace) -> _Drawing:
    """Draws schedules, and the weights of their losses if any run weights its loss."""
    from ddpm_hf.plots import schedule_plot

    names = name_of_each(options.sources)
    processes = {name: read_process(path) for name, path in zip(names, options.sources, strict=True)}
    schedules = {name: process.schedule.alphas_cumprod.numpy() for name, process in processes.items()}
    weights = {name: weight for name, process in processes.items() if (weight := _weights(process)) is not None}
    is_weighted = any((weight != 1).any() for weight in weights.values())
    words = f"beta, alpha_bar{', log SNR and loss weight' if is_weighted else ' and log SNR'} of {', '.join(names)}"
    return lambda path: schedule_plot(schedules, path, loss_weights=weights if is_weighted else None), words


def _weights(process: "Process") -> "NDArray[np.float64] | None":
    """Returns the factor on the error at each timestep; None where no simple loss is known to be trained."""
    from ddpm_hf.training.loss import loss_weight

    if process.config is None or process.config.objective.loss == "vlb":
        return None
    snr = process.schedule.snr
    weight = loss_weight(process.config.objective, process.prediction_type, snr)
    table: NDArray[np.float64] = (snr.new_ones(len(snr)) if weight is None else weight).numpy()
    return table


def _noising(options: Namespace) -> _Drawing:
    """Draws an image on its way to noise."""
    from ddpm_hf.plots import forward_strip

    process = read_process(options.config)
    num_timesteps = len(process.schedule)
    timesteps = options.timesteps or _evenly_spaced(num_timesteps, 8)
    for t in timesteps:
        if not 0 <= t < num_timesteps:
            raise ValueError(f"--timesteps {t} is not one of the chain; give 0 to {num_timesteps - 1}.")
    data = process.config.data if process.config else DataConfig()
    image = read_image(options.image, _with_resolution(data, options.resolution))
    if image.shape[1] * len(timesteps) > MOST_PIXELS_WIDE:
        raise ValueError(f"{len(timesteps)} images of {image.shape[1]} pixels are too wide; give --resolution.")
    states = noised(image, process, timesteps, options.seed)
    snrs = process.schedule.snr[timesteps].tolist()
    return lambda path: forward_strip(states, timesteps, snrs).save(path, "PNG"), f"x_t at t = {timesteps}"


def _evenly_spaced(length: int, count: int) -> list[int]:
    """Returns `count` timesteps from 0 to the last one, fewer in a shorter chain."""
    count = min(count, length)
    return [round(index * (length - 1) / max(count - 1, 1)) for index in range(count)]


def noised(image: "UInt8Array", process: "Process", timesteps: Sequence[int], seed: int) -> "UInt8Array":
    """Noises an image in float32, with the same noise at each timestep.

    Args:
        image: uint8 (height, width, channels).
        process: The forward process.
        timesteps: Where to.
        seed: Of the noise.

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


def _loss(options: Namespace) -> _Drawing:
    """Draws the curves of runs."""
    from ddpm_hf.plots import training_curves

    names = name_of_each(options.runs)
    runs = {name: read_metrics(path) for name, path in zip(names, options.runs, strict=True)}
    return lambda path: training_curves(runs, path), f"losses of {', '.join(names)}"


def _timesteps(options: Namespace) -> _Drawing:
    """Draws the loss by quartile of the timesteps, and the errors and terms of an evaluated bound."""
    from ddpm_hf.plots import timestep_curves

    run: Path = options.run
    if not run.is_dir():
        raise ValueError(f"{run} is no folder; give that of a run, or one with an {EVALUATION}.")
    rows = read_metrics(run) if (run / METRICS).exists() else []
    evaluations = [path for path in (run / EVALUATION, run / "pipeline" / EVALUATION) if path.is_file()]
    bounds = {path: bound for path in evaluations if (bound := read_json(path).get("bound")) is not None}
    path_of_bound = next(iter(bounds), None)
    found = [f"loss by quartile in {run / METRICS}"] if any("loss_q0" in row for row in rows) else []
    found += [f"error by timestep in {path_of_bound}"] if path_of_bound else []
    if not found:
        raise ValueError(
            f"{run} says nothing of the loss by timestep: {METRICS} has no loss_q0, and there is no {EVALUATION} with "
            "a bound; run `ddpm-hf evaluate` with --metrics bits_per_dim."
        )
    bound = bounds[path_of_bound] if path_of_bound else None
    return lambda path: timestep_curves(path, metrics=rows, bound=bound), " and ".join(found)


def _grid(options: Namespace) -> _Drawing:
    """Draws the images of a folder."""
    from ddpm_hf.plots import image_grid

    data = _with_resolution(DataConfig(), options.resolution)
    images, labels, words = read_folder(options.folder, data, options.columns, options.rows)
    num_columns = len(labels) or min(options.columns, len(images))
    if images.shape[2] * num_columns > MOST_PIXELS_WIDE:
        raise ValueError(f"{num_columns} images of {images.shape[2]} pixels are too wide; give --resolution.")
    return lambda path: image_grid(images, num_columns, column_labels=labels or None).save(path, "PNG"), words


def _with_resolution(data: DataConfig, resolution: int | None) -> DataConfig:
    """Returns the settings of the data with another resolution, if one is asked for."""
    return data if resolution is None else replace(data, resolution=resolution)
