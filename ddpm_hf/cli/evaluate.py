"""The flags of `ddpm-hf evaluate`.

Which images a run held out: `ddpm-hf evaluate` of its folder holds out the same unless its flags say otherwise.

`ddpm-hf evaluate`: measures how good a pipeline is, prints a table, writes evaluation.json and a picture.
"""

import math
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_hf.cli.common import (
    CALL_FLAGS,
    Parser,
    add_model_flags,
    add_sampling_flags,
    check_ranges,
    check_sampling_flags,
    check_scheduler,
    find_model,
    label_list,
    load_pipeline,
    out_of_memory,
)
from ddpm_hf.config import ConfigError, DataConfig, ModelConfig, RunConfig, TrainingConfig, read_config_dict, validate

if TYPE_CHECKING:
    import torch

    from ddpm_hf.data import ImageSet
    from ddpm_hf.diffusion import GaussianDiffusionPipeline
    from ddpm_hf.evaluation.features import FeatureNetwork
    from ddpm_hf.evaluation.generate import Images, Sampler
    from ddpm_hf.evaluation.likelihood import ReverseProcess, VariationalBound
    from ddpm_hf.evaluation.metrics import Metric


def parse(arguments: Sequence[str]) -> Namespace:
    """Reads the command line.

    Raises:
        ConfigError: A number is outside its range, or settings contradict each other.
    """
    parser = Parser(
        prog="ddpm-hf evaluate",
        description="Measure how good a pipeline is: a table, evaluation.json and evaluation.png. Run the same command "
        "again to go on with one that was stopped.",
        epilog="Example: ddpm-hf evaluate outputs/digits --data data/digits.parquet --metrics bits_per_dim",
    )
    add_model_flags(parser)
    parser.add_argument("--data", required=True, help="the images that it was trained on, as data.source of training")
    for name, (kind, help_text) in _DATA_FLAGS.items():
        default = None if name in SPLIT_FLAGS else getattr(DataConfig(), name)
        parser.add_argument(f"--data.{name}", dest=f"data_{name}", type=kind, default=default, help=help_text)
    parser.add_argument("--data.streaming", dest="data_streaming", nargs="?", const="true", help=SUPPRESS)
    _add_measuring(parser)
    _add_sampling(parser)
    options = parser.parse_args(arguments)
    _check_flags(options)
    if options.metrics is None:
        distances = ["fid", "kid"] if options.features == "inception" else ["frechet_distance", "kernel_distance"]
        options.metrics = [*distances, "precision", "recall", "bits_per_dim"]
    return options


def _add_measuring(parser: ArgumentParser) -> None:
    """Adds what is measured, and where the results go."""
    add = parser.add_argument
    add("--split_seed", type=int,
        help="training.seed of the run, which chose its held-out images; by default the folder's, or 0")  # fmt: skip
    add("--metrics", type=_comma_separated,
        help="comma-separated: fid, kid, inception_score (in Inception features), frechet_distance, kernel_distance "
        "(in any), precision, recall, bits_per_dim")  # fmt: skip
    add("--features", default="inception",
        help="network whose features are compared: inception, dinov2:facebook/dinov2-base or another vision model of "
        "transformers, or package.module:factory, which is imported")  # fmt: skip
    add("--weights", type=Path, help="file with its weights; by default they are found or downloaded")
    add("--num_images", type=int, help="images for bits_per_dim; by default all that are held out, or all")
    add("--num_terms", type=_int_or("all"), default=50, help="terms of the bound for each of them, or all")
    add("--likelihood_steps", type=int, help="length of the chain for bits_per_dim; by default that of training")
    add("--estimate_variance", type=int, default=0, metavar="N",
        help="first estimate the analytic variance on N training images a timestep, and save it in folder")  # fmt: skip
    add("--output", type=Path, help="folder for evaluation.json and evaluation.png; by default that of the pipeline")
    add("--cpu", action="store_true", help="use the CPU even where there is a GPU")


def _add_sampling(parser: ArgumentParser) -> None:
    """Adds how samples are drawn."""
    add = parser.add_argument
    add("--num_samples", type=int, help="by default 50000; 64 for the picture, in 50 steps, where no metric needs any")
    add("--seed", type=int, default=0, help="image i is a function of (seed, i)")
    add_sampling_flags(add, batch_size=64, turn="The images have them in turn")
    add("--samples_dir", type=Path, help="folder for the samples; by default evaluation_samples beside the results")
    add("--format", choices=("npy", "png"), default="npy", help="png writes each image as a file too")


def _comma_separated(text: str) -> list[str]:
    """Reads words with commas between them."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _int_or(word: str) -> Callable[[str], int | str]:
    """Returns a reader of a whole number or a word."""

    def read(text: str) -> int | str:
        if text != word and not text.lstrip("-").isdigit():
            raise ArgumentTypeError(f"{text!r} is neither a whole number nor {word}")
        return word if text == word else int(text)

    return read


def _side_or(number: int) -> Callable[[str], int | list[int]]:
    """Returns a reader of one whole number, or of so many in a list."""

    def read(text: str) -> int | list[int]:
        values = [int(part) for part in text.strip("[]").split(",")]
        if len(values) not in (1, number):
            raise ArgumentTypeError(f"{text!r} is neither one whole number nor {number} with commas between them")
        return values[0] if len(values) == 1 else values

    return read


# Which images were held out; None is what the run says, see evaluate_split.py.
SPLIT_FLAGS = ("validation_split", "validation_fraction")
_DATA_FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "subset": (str, "configuration of a Hub data set that has several"),
    "revision": (str, "branch, tag or commit of a Hub data set"),
    "split": (str, "split to compare with, or a part of it"),
    "validation_split": (str, "split that was held out; by default that of the folder's run"),
    "validation_fraction": (
        float,
        "fraction that was held out, chosen by --split_seed; by default that of the folder's run",
    ),
    "image_column": (str, "column or array with the images"),
    "label_column": (str, "column or array with the labels"),
    "crop_before_resize": (_side_or(4), "side of a square in the centre, or left,top,right,bottom"),
    "resolution": (_side_or(2), "side, or height,width; by default those of the network"),
    "resize_to": (int, "shorter side before the crop"),
    "resize_filter": (str, "Pillow's filter"),
    "num_channels": (int, "by default those of the network"),
    "background": (str, "white or black behind transparent pixels"),
    "on_bad_image": (str, "error, or skip"),
    "max_bad_fraction": (float, "how many images may be unreadable"),
    "cache_dir": (str, "folder for decoded images"),
}


def _check_flags(options: Namespace) -> None:
    """Refuses numbers outside their range, and a stream."""
    if options.data_streaming is not None and options.data_streaming != "false":
        raise ConfigError(
            "data.streaming keeps no images to compare with, and an evaluation needs all of them, the same each time; "
            "leave it out, and set --data.cache_dir to a disk with room for them."
        )
    check_ranges(options, {
        "num_samples": (1, math.inf), "num_images": (1, math.inf), "likelihood_steps": (1, math.inf),
        "num_terms": (2, math.inf), "estimate_variance": (0, math.inf), "seed": (0, math.inf),
    })  # fmt: skip
    check_sampling_flags(options)


def data_config(options: Namespace, size: tuple[int, int], num_channels: int) -> DataConfig:
    """Returns which images to compare with; size and channels are those of the network unless told otherwise.

    Raises:
        ConfigError: The settings contradict each other.
    """
    given = {name: getattr(options, f"data_{name}") for name in _DATA_FLAGS}
    defaults = {"resolution": list(size), "num_channels": num_channels, "validation_fraction": 0.0}
    filled = given | {name: default for name, default in defaults.items() if given[name] is None}
    config = DataConfig(source=options.data, **filled)
    validate(RunConfig(data=config))
    return config


CONFIGURATION = "training_config.yaml"
# A fraction chosen by a seed holds out the same images only of the same data.
_WHICH_DATA = ("source", "subset", "revision", "split")


def take_split_of_run(options: Namespace, folder: Path | None) -> str | None:
    """Fills in the flags about held-out images that were not given: from the run where it trained on the same data.

    Args:
        options: The flags; changed.
        folder: The pipeline, whose training_config.yaml is read; None for a repository of the Hub.

    Returns:
        A line that says what was taken, or what has to be given where the data are named otherwise; None for neither.

    Raises:
        ConfigError: The file is no configuration of a run.
    """
    path = None if folder is None else folder / CONFIGURATION
    line = _take(options, path) if path is not None and path.is_file() else None
    if options.split_seed is None:
        options.split_seed = 0
    return line


def _take(options: Namespace, path: Path) -> str | None:
    """Fills in what the run says, and returns the line about it."""
    data, seed = _read(path)
    run = {"split_seed": seed} | {f"data_{name}": data[name] for name in SPLIT_FLAGS}
    if any(getattr(options, f"data_{name}") is not None for name in SPLIT_FLAGS):
        run = {"split_seed": seed}  # the two exclude each other, so one that is given stands for both
    if not (options.data_validation_fraction or run.get("data_validation_fraction")):
        del run["split_seed"]  # which chooses a fraction and nothing else
    run = {name: value for name, value in run.items() if value and getattr(options, name) is None}
    if not run:
        return None
    flags = " ".join(f"--{name.replace('data_', 'data.')} {value}" for name, value in run.items())
    if not all(_is_same(name, data[name], options) for name in _WHICH_DATA):
        known = ", ".join(f"data.{name} {data[name]}" for name in _WHICH_DATA if data[name])
        return (
            f"The run was trained on {known}, which may be other images; if they are these, hold out its own: {flags}"
        )
    for name, value in run.items():
        setattr(options, name, value)
    return f"Held out as in training, which {CONFIGURATION} tells: {flags}"


def _is_same(name: str, before: Any, options: Namespace) -> bool:
    """Whether a setting of the run names the data of the flags, a file by whatever path."""
    now = options.data if name == "source" else getattr(options, f"data_{name}")
    if name == "source":
        return bool(before == now or Path(before).expanduser().resolve() == Path(now).expanduser().resolve())
    return bool(before == now)


def _read(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the settings of a run's data and its seed; what an older version did not know is the default.

    Raises:
        ConfigError: They are none.
    """
    content = read_config_dict(path)
    data = {name: getattr(DataConfig(), name) for name in (*_WHICH_DATA, *SPLIT_FLAGS)}
    data |= {name: value for name, value in content.get("data", {}).items() if name in data}
    fraction, seed = data.pop("validation_fraction"), content.get("training", {}).get("seed", 0)
    are_names = all(isinstance(value, str | None) for value in data.values())
    if not (are_names and isinstance(data["source"], str) and isinstance(fraction, int | float) and type(seed) is int):
        raise ConfigError(f"{path} is no configuration of a run; restore it, or move it away.")
    return data | {"validation_fraction": fraction}, seed


REPORT, PICTURE, SAMPLES = "evaluation.json", "evaluation.png", "evaluation_samples"
# A few samples in few steps, where nothing but the picture needs any.
SHOWN_SAMPLES, NUM_SHOWN, NUM_SHOWN_STEPS, NUM_NEIGHBORS = "evaluation_picture", 64, 50, 32


def evaluate(arguments: Sequence[str]) -> int:
    """Evaluates a pipeline and returns the exit code."""
    options = parse(arguments)

    with out_of_memory(f"lower --batch_size, which is {options.batch_size}"):
        _evaluate(options)
    return 0


@dataclass(frozen=True)
class _Work:
    """What is evaluated, on what and by whom.

    Attributes:
        measured: The images for bits per dimension.
        of_samples: The metrics that look at samples.
        process: The reverse process for bits per dimension; None if they are not measured.
        num_terms: Of its terms, how many for each image; None is all.
    """

    options: Namespace
    folder: Path | None
    output: Path
    pipeline: "GaussianDiffusionPipeline"
    sampler: "Sampler"
    training: "ImageSet"
    held_out: "ImageSet"
    measured: "ImageSet"
    of_samples: list[str]
    num_samples: int
    samples_dir: Path
    process: "ReverseProcess | None"
    num_terms: int | None
    device: "torch.device"


def _evaluate(options: Namespace) -> None:
    """Collective: does everything that was asked for."""
    from ddpm_hf import distributed
    from ddpm_hf.evaluation.generate import sample_to_folder, settings_of
    from ddpm_hf.evaluation.metrics import BITS_PER_DIM, check_metrics, measure_fidelity
    from ddpm_hf.evaluation.report import as_json, table

    check_metrics(options.metrics)
    work = _prepare(options)
    settings, network = _check(work)
    distributed.on_rank_0(lambda: work.output.mkdir(parents=True, exist_ok=True))
    if options.estimate_variance:
        _estimate_variance(work)
    sampler = work.sampler
    sampling = sampler.prepare(work.pipeline)
    if settings is None:
        settings = settings_of(sampling, sampler, options.seed, options.batch_size)
    samples = sample_to_folder(
        sampling,
        sampler,
        work.samples_dir,
        settings,
        num_images=work.num_samples,
        batch_size=options.batch_size,
        as_png=options.format == "png",
    )
    metrics: list[Metric] = []
    if work.of_samples:

        def measure() -> list[Metric]:
            assert network is not None  # on rank 0
            return measure_fidelity(
                samples,
                work.training,
                network,
                metrics=work.of_samples,
                batch_size=options.batch_size,
                cache_dir=Path(options.data_cache_dir) if options.data_cache_dir else None,
                seed=options.seed,
            )

        metrics += distributed.on_rank_0(measure) or []
    bound: VariationalBound | None = None
    bound_settings: dict[str, Any] = {}
    if BITS_PER_DIM in options.metrics:
        bound, bound_settings = _bits_per_dim(work)
        metrics.append(bound.metric)
    if distributed.rank() == 0:
        content = as_json(
            metrics,
            bound,
            settings=settings,
            data=_describe_data(work),
            bound_settings=bound_settings,
        )
        _write(work, content, samples, bound)
        print("\n".join([table(metrics), *_notes(work, bound), ""]))
        print(f"Everything is in {work.output}: look at {REPORT} and {PICTURE}.")


def _notes(work: _Work, bound: "VariationalBound | None") -> list[str]:
    """Returns what has to be known to compare bits per dimension with those of others."""
    notes, num_classes = [], work.pipeline.num_classes
    if bound is not None and not len(work.held_out):
        notes.append("bits_per_dim is of training images, on which it may be lower than on others; none are held out.")
    if bound is not None and num_classes:
        label = math.log2(num_classes) / math.prod(work.training.image_shape)
        notes.append(f"bits_per_dim is given the class of each image, which costs up to {label:.3f} more to tell.")
    return notes


def _prepare(options: Namespace) -> _Work:
    """Collective: joins the processes, loads the pipeline and opens the data."""
    import torch

    from ddpm_hf import distributed
    from ddpm_hf.data import ImageSet
    from ddpm_hf.evaluation.generate import image_shape
    from ddpm_hf.evaluation.likelihood import ReverseProcess
    from ddpm_hf.evaluation.metrics import BITS_PER_DIM, SAMPLE_METRICS
    from ddpm_hf.evaluation.report import choose_images
    from ddpm_hf.training.trainer import open_splits

    accelerator = distributed.start(cpu=options.cpu)
    folder = find_model(options.folder, options.revision)
    check_scheduler(options)
    output = options.output or folder
    if output is None or (folder is None and options.estimate_variance):
        raise ConfigError(
            f"{options.folder} is no folder of this machine; give --output for what is written, and a local folder for "
            "--estimate_variance."
        )
    dtype = getattr(torch, options.dtype)
    pipeline = load_pipeline(
        options.folder, folder, dtype=dtype, revision=options.revision, variant=options.variant
    ).to(accelerator.device)
    height, width, num_channels = image_shape(pipeline)
    needs_labels = pipeline.num_classes > 0 and (BITS_PER_DIM in options.metrics or options.estimate_variance > 0)
    if (line := take_split_of_run(options, folder)) and accelerator.is_main_process:
        print(line)
    config = RunConfig(
        data=data_config(options, (height, width), num_channels),
        model=ModelConfig(class_conditional=needs_labels),
        training=TrainingConfig(seed=options.split_seed),
    )
    training, held_out = open_splits(config, accelerator)
    assert isinstance(training, ImageSet)
    if training.image_shape != (num_channels, height, width):
        raise ConfigError(
            f"{config.data.source} has images of {'x'.join(map(str, training.image_shape))} and the network makes "
            f"{num_channels}x{height}x{width}; leave --data.resolution and --data.num_channels out, or give others."
        )
    of_samples = [name for name in options.metrics if name in SAMPLE_METRICS]
    timesteps, num_terms = _chain(options, pipeline)
    return _Work(
        options=options,
        folder=folder,
        output=output,
        pipeline=pipeline,
        sampler=_sampler(options, pipeline, for_the_picture=not of_samples),
        training=training,
        held_out=held_out,
        measured=choose_images(held_out if len(held_out) else training, options.num_images, options.seed),
        of_samples=of_samples,
        num_samples=options.num_samples or (50_000 if of_samples else NUM_SHOWN),
        samples_dir=options.samples_dir or output / (SAMPLES if of_samples else SHOWN_SAMPLES),
        process=ReverseProcess(pipeline, timesteps) if BITS_PER_DIM in options.metrics else None,
        num_terms=num_terms,
        device=accelerator.device,
    )


def _sampler(options: Namespace, pipeline: "GaussianDiffusionPipeline", *, for_the_picture: bool) -> "Sampler":
    """Returns how samples are drawn: for the picture alone in few steps, unless told otherwise."""
    from ddpm_hf.evaluation.generate import Sampler

    settings = {name: getattr(options, name) for name in ("scheduler", *CALL_FLAGS)}
    if for_the_picture and options.num_inference_steps is None:
        settings["num_inference_steps"] = min(NUM_SHOWN_STEPS, len(pipeline.scheduler))
    labels = None if options.labels is None else tuple(label_list(options.labels, pipeline) or ())
    return Sampler(**settings, labels=labels, analytic_variance=options.variance == "analytic")


def _chain(options: Namespace, pipeline: "GaussianDiffusionPipeline") -> tuple[list[int] | None, int | None]:
    """Returns the chain for bits per dimension, and how many of its terms each image has; None for all.

    Another scheduler than ours has no such chain, which `check_bound` says.
    """
    from ddpm_hf.diffusion import GaussianDiffusionScheduler

    timesteps, num_steps = None, len(pipeline.scheduler)
    if options.likelihood_steps is not None and isinstance(pipeline.scheduler, GaussianDiffusionScheduler):
        pipeline.scheduler.set_timesteps(options.likelihood_steps, timestep_spacing=options.timestep_spacing)
        timesteps = pipeline.scheduler.timesteps.tolist()
        num_steps = len(timesteps)
    return timesteps, None if options.num_terms == "all" or options.num_terms >= num_steps else options.num_terms


def _check(work: _Work) -> "tuple[dict[str, Any] | None, FeatureNetwork | None]":
    """Collective: raise all errors that could come later, before the network is called or a folder is made.

    Returns:
        The settings of the samples, None if they depend on moments that are to be estimated; and the feature network,
        on rank 0 if a metric needs one.
    """
    from ddpm_hf import distributed
    from ddpm_hf.evaluation.generate import check_channels, check_folder, image_shape, settings_of
    from ddpm_hf.evaluation.likelihood import check_bound, check_second_moments
    from ddpm_hf.evaluation.metrics import check_reference, open_network_for

    options, pipeline, sampler = work.options, work.pipeline, work.sampler
    unknown: tuple[str, ...] = ()
    if options.estimate_variance:
        check_second_moments(pipeline, work.training)
        if sampler.analytic_variance:  # by moments that are not there yet
            sampler, unknown = replace(sampler, analytic_variance=False), ("pipeline", "analytic_variance")
    sampling = sampler.prepare(pipeline)
    sampler.check(sampling)
    if work.process is not None:
        check_bound(work.process, work.measured, work.num_terms)
    check_channels(image_shape(pipeline), as_png=options.format == "png")
    settings = settings_of(sampling, sampler, options.seed, options.batch_size)
    distributed.on_rank_0(lambda: check_folder(work.samples_dir, settings, unknown=unknown))
    network = None
    if work.of_samples:
        check_reference(work.training)
        network = distributed.on_rank_0(
            lambda: open_network_for(
                work.of_samples,
                work.training.image_shape,
                work.num_samples,
                len(work.training),
                features=options.features,
                weights=options.weights,
                device=work.device,
            )
        )
    return None if unknown else settings, network


def _estimate_variance(work: _Work) -> None:
    """Collective: estimates the second moments and keeps them beside the scheduler's configuration."""
    from ddpm_hf import distributed
    from ddpm_hf.diffusion.saved_folder import second_moments_file
    from ddpm_hf.evaluation.likelihood import estimate_second_moments

    options, scheduler = work.options, work.pipeline.scheduler
    assert work.folder is not None
    folder = second_moments_file(work.folder).parent
    scheduler.eps_second_moments = estimate_second_moments(
        work.pipeline,
        work.training,
        seed=options.seed,
        num_images=options.estimate_variance,
        batch_size=options.batch_size,
    )
    distributed.on_rank_0(lambda: scheduler.save_second_moments(folder))


def _bits_per_dim(work: _Work) -> "tuple[VariationalBound, dict[str, Any]]":
    """Collective: computes the bound of the held-out images, or of all where none are held out."""
    from ddpm_hf.evaluation.likelihood import variational_bound

    options, scheduler = work.options, work.pipeline.scheduler
    if options.variance == "analytic":
        scheduler.analytic_variance = True
    assert work.process is not None
    bound = variational_bound(
        work.process, work.measured, seed=options.seed, num_terms=work.num_terms, batch_size=options.batch_size
    )
    spacing = (
        None if options.likelihood_steps is None else options.timestep_spacing or scheduler.config["timestep_spacing"]
    )
    settings = {
        "images": "held out" if len(work.held_out) else "all",
        "conditional": work.pipeline.num_classes > 0,
        "num_steps": len(bound.timesteps),
        "num_terms": work.num_terms or len(bound.timesteps),
        "timestep_spacing": spacing,
        "variance": "analytic" if options.variance == "analytic" else scheduler.config["variance_type"],
    }
    return bound, settings


def _describe_data(work: _Work) -> dict[str, Any]:
    """Says which images these were."""
    options = work.options
    return {
        "source": Path(options.data).name if Path(options.data).exists() else options.data,
        "split": options.data_split,
        "fingerprint": work.training.digest or None,
        "num_training_images": len(work.training),
        "num_held_out_images": len(work.held_out),
        "validation_split": options.data_validation_split,
        "validation_fraction": options.data_validation_fraction or 0.0,
        "split_seed": options.split_seed,
    }


def _write(work: _Work, content: str, samples: "Images", bound: "VariationalBound | None") -> None:
    """Writes evaluation.json and the picture on rank 0."""
    from ddpm_hf.evaluation.report import choose_images, nearest_images, real_images
    from ddpm_hf.files import atomic_write, write_text
    from ddpm_hf.plots import evaluation_plot

    title = f"{Path(work.options.folder).name}, {Path(work.options.data).name}"
    if bound is not None:
        title += f": {bound.bits_per_dim:.3f} bits per dimension"
    shown = choose_images(work.training, min(NUM_SHOWN, len(work.training)), work.options.seed)
    neighbors, _, distances = nearest_images(samples[:NUM_NEIGHBORS], work.training)
    atomic_write(
        work.output / PICTURE,
        lambda path: evaluation_plot(
            path,
            samples=samples[:NUM_SHOWN],
            real=real_images(shown, shown.positions),
            neighbors=neighbors,
            distances=distances,
            bound=None if bound is None else bound.to_dict(),
            title=title,
        ),
    )
    write_text(work.output / REPORT, content)
