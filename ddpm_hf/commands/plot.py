"""`ddpm-hf plot`: pictures of schedules, forward noising, runs and folders of images."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_hf.commands.parser import Parser
from ddpm_hf.config import DataConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ddpm_hf.commands.plot_inputs import Process
    from ddpm_hf.plots import UInt8Array

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

    from ddpm_hf.durable import write_whole

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
    from ddpm_hf.commands.plot_inputs import name_of_each, read_process
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
    from ddpm_hf.training.weighting import loss_weight

    if process.config is None or process.config.objective.loss == "vlb":
        return None
    snr = process.schedule.snr
    weight = loss_weight(process.config.objective, process.prediction_type, snr)
    table: NDArray[np.float64] = (snr.new_ones(len(snr)) if weight is None else weight).numpy()
    return table


def _noising(options: Namespace) -> _Drawing:
    """Draws an image on its way to noise."""
    from ddpm_hf.commands.plot_inputs import read_image, read_process
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
    from ddpm_hf.commands.plot_inputs import name_of_each, read_metrics
    from ddpm_hf.plots import training_curves

    names = name_of_each(options.runs)
    runs = {name: read_metrics(path) for name, path in zip(names, options.runs, strict=True)}
    return lambda path: training_curves(runs, path), f"losses of {', '.join(names)}"


def _timesteps(options: Namespace) -> _Drawing:
    """Draws the loss by quartile of the timesteps, and the errors and terms of an evaluated bound."""
    from ddpm_hf.commands.plot_inputs import EVALUATION, METRICS, read_json, read_metrics
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
    from ddpm_hf.commands.plot_inputs import read_folder
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
