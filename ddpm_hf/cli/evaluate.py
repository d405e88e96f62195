"""`ddpm-hf evaluate`: measure how good a pipeline is; print a table, and write evaluation.json and a picture."""

import dataclasses
import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddpm_hf.cli.common import find_folder, load_pipeline, out_of_memory_advice
from ddpm_hf.cli.flags import CALL_FLAGS, CompilationFlags, ModelFlags, Parser, SamplingFlags, flag, read_flags
from ddpm_hf.config import (
    EVAL_DATASET,
    ConfigError,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    read_config_dict,
    validate,
    warn_of_training_flags,
)
from ddpm_hf.files import (
    EVALUATION,
    EVALUATION_PICTURE,
    RUN_CONFIG,
    TRAINING_CONFIG,
    atomic_write,
    format_count,
    write_text,
)

if TYPE_CHECKING:
    import torch

    from ddpm_hf.data import ImageSet
    from ddpm_hf.diffusion import GaussianDiffusionPipeline
    from ddpm_hf.evaluation.features import FeatureNetwork
    from ddpm_hf.evaluation.generate import Images, Sampler
    from ddpm_hf.evaluation.likelihood import ReverseProcess, VariationalBound
    from ddpm_hf.evaluation.memorization import Memorization
    from ddpm_hf.evaluation.metrics import Metric
    from ddpm_hf.model_folder import ModelFolder

SAMPLES = "evaluation_samples"
# If no metric needs samples, a few are sampled for the picture.
PICTURE_SAMPLES, NUM_PICTURE_SAMPLES = "evaluation_picture", 64
NUM_SAMPLES, NUM_NEIGHBORS = 50_000, 32
# Flags that another copy of the model does not need; a variance that was estimated is saved with the model.
LOCAL_FLAGS = ("folder", "revision", "variant", "data_cache_dir", "estimate_variance")

# Settings that identify the data: the validation set of a run is used only for the same data.
_WHICH_DATA = ("source", "subset", "revision", "split")
_VALIDATION = ("validation_split", "validation_fraction")


def _int_or_all(text: str) -> int | str:
    if text != "all" and not text.lstrip("-").isdigit():
        raise ArgumentTypeError(f"{text!r} is neither a whole number nor all")
    return text if text == "all" else int(text)


def _int_or(number: int) -> Callable[[str], int | list[int]]:
    """Return a parser of one whole number, or of a list of `number` of them."""

    def parse_numbers(text: str) -> int | list[int]:
        try:
            values = [int(part) for part in text.strip("[]").split(",")]
        except ValueError:
            values = []
        if len(values) not in (1, number):
            raise ArgumentTypeError(f"{text!r} is neither a whole number nor {number} of them separated by commas")
        return values[0] if len(values) == 1 else values

    return parse_numbers


_DATA = DataConfig()


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Images to compare with.

    Args:
        data: The training images, as data.source of training.
        data_subset: Configuration name of a Hub dataset.
        data_revision: Branch, tag or commit of a Hub dataset.
        data_split: Split to compare with, or a part of it.
        data_validation_split: Split of the validation set; by default that of the run.
        data_validation_fraction: Fraction in the validation set, chosen by --split_seed; by default that of the run.
        data_image_column: Column or array of the images.
        data_label_column: Column or array of the labels.
        data_crop_before_resize: Side of a centered square, or left,top,right,bottom.
        data_resolution: Side, or height,width; by default that of the network.
        data_resize_to: Shorter side before the crop.
        data_resize_filter: Pillow filter.
        data_num_channels: By default that of the network.
        data_background: white or black behind transparent pixels.
        data_on_bad_image: error or skip.
        data_max_bad_fraction: Largest fraction of unreadable images.
        data_cache_dir: Folder for decoded images.
        data_streaming: Must be false, since an evaluation needs all images.
        split_seed: training.seed of the run, which chose its validation set; by default that of the run, or 0.
    """

    data: str = flag()
    data_subset: str | None = None
    data_revision: str | None = None
    data_split: str = _DATA.split
    data_validation_split: str | None = None
    data_validation_fraction: float | None = None
    data_image_column: str | None = None
    data_label_column: str | None = None
    data_crop_before_resize: int | list[int] | None = flag(None, parse=_int_or(4))
    data_resolution: int | list[int] | None = flag(None, parse=_int_or(2))
    data_resize_to: int | None = None
    data_resize_filter: str = _DATA.resize_filter
    data_num_channels: int | None = None
    data_background: str | None = None
    data_on_bad_image: str = _DATA.on_bad_image
    data_max_bad_fraction: float = _DATA.max_bad_fraction
    data_cache_dir: str | None = None
    data_streaming: Literal["true", "false"] = "false"
    split_seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class MeasuringFlags:
    """Metrics and output.

    Args:
        metrics: Separated by commas: fid, kid, inception_score (Inception features), frechet_distance, kernel_distance
            (any features), precision, recall, memorization (pixels, and the features of --features if given),
            bits_per_dim.
        features: Feature network: inception (the default), dinov2:facebook/dinov2-base or another vision model of
            transformers, or package.module:factory, which is imported.
        weights: File with the weights of Inception; by default they are found or downloaded.
        num_images: Images for bits_per_dim; by default the whole validation set, or all images without one.
        num_terms: Timesteps of the bound per image, or all.
        likelihood_steps: Number of timesteps for bits_per_dim; by default as in training.
        estimate_variance: First estimate the analytic variance on this many training images per timestep, and save it
            with the model.
        output: Folder for evaluation.json and evaluation.png; by default that of the pipeline, or for a checkpoint a
            folder in evaluations/ of its run.
        cpu: Use the CPU even if there is a GPU.
    """

    metrics: list[str] | None = flag(
        None, parse=lambda text: [word.strip() for word in text.split(",") if word.strip()]
    )
    features: str | None = None
    weights: Path | None = None
    num_images: int | None = flag(None, minimum=1)
    num_terms: int | str = flag(50, minimum=2, parse=_int_or_all)
    likelihood_steps: int | None = flag(None, minimum=1)
    estimate_variance: int = flag(0, minimum=0)
    output: Path | None = None
    cpu: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(ModelFlags, DataFlags, MeasuringFlags, SamplingFlags, CompilationFlags):
    """Samples.

    Args:
        num_samples: Number of samples; by default 50000, or 64 as by `ddpm-hf sample` if only the picture needs them.
        seed: Image i depends on (seed, i).
        samples_dir: Folder for the samples; by default evaluation_samples beside the results.
        format: png also writes each image as a file.
    """

    num_samples: int | None = flag(None, minimum=1)
    seed: int = flag(0, minimum=0)
    batch_size: int = flag(64, minimum=1)
    samples_dir: Path | None = None
    format: Literal["npy", "png"] = "npy"

    def metric_names(self, *, has_bits: bool = True) -> list[str]:
        """Return the metrics, by default all that the features allow, and bits_per_dim if the model has it."""
        if self.metrics is not None:
            return self.metrics
        distances = ["fid", "kid"] if self.features in (None, "inception") else ["frechet_distance", "kernel_distance"]
        return [*distances, "precision", "recall", *(["bits_per_dim"] if has_bits else [])]

    def data_config(
        self, size: tuple[int, int], num_channels: int, value_range: Sequence[float] | None = None
    ) -> DataConfig:
        """Return the settings of the images; size, channels and value range are by default those of the model."""
        defaults = {"resolution": list(size), "num_channels": num_channels, "validation_fraction": 0.0}
        given = {
            field.name.removeprefix("data_"): getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name.startswith("data_") and field.name != "data_streaming"
        }
        given |= {name: default for name, default in defaults.items() if given[name] is None}
        given["value_range"] = None if value_range is None else list(value_range)
        config = DataConfig(source=self.data, **given)
        validate(RunConfig(data=config))
        return config


def parse(arguments: Sequence[str]) -> EvaluateFlags:
    """Parse and check the command line."""
    parser = Parser(
        prog="ddpm-hf evaluate",
        description="Measure how good a pipeline is: a table, evaluation.json and evaluation.png. The same command\n"
        "resumes an evaluation that was stopped.",
        epilog="Example: ddpm-hf evaluate outputs/digits --data data/digits.parquet --metrics bits_per_dim",
    )
    flags = read_flags(parser, EvaluateFlags, arguments)
    if flags.data_streaming == "true":
        raise ConfigError(
            "--data.streaming true keeps no images to compare with; remove it, and set --data.cache_dir to a disk with "
            "room for all of them."
        )
    flags.check_compilation()
    return flags.checked_sampling()


def use_validation_set_of_run(flags: EvaluateFlags, config: Path | None) -> tuple[EvaluateFlags, str | None]:
    """Set flags about the validation set that were not given to those of the run, if it used the same data.

    Args:
        flags: The flags.
        config: The configuration of the run.

    Returns:
        The flags with a split seed, and a line about what was set, or what to give if the data may differ.
    """
    line = None
    if config is not None and config.is_file():
        data, seed = _read_data_settings(config)
        run = {"split_seed": seed} | {f"data_{name}": data[name] for name in _VALIDATION}
        if any(getattr(flags, f"data_{name}") is not None for name in _VALIDATION):
            run = {"split_seed": seed}  # the split and the fraction exclude each other
        if not (flags.data_validation_fraction or run.get("data_validation_fraction")):
            del run["split_seed"]  # which only chooses a fraction
        run = {name: value for name, value in run.items() if value and getattr(flags, name) is None}
        shown = " ".join(f"--{name.replace('data_', 'data.')} {value}" for name, value in run.items())
        is_same = {name: data[name] == getattr(flags, f"data_{name}", None) for name in _WHICH_DATA[1:]}
        is_same["source"] = Path(data["source"]).expanduser().resolve() == Path(flags.data).expanduser().resolve()
        if run and all(is_same.values()):
            flags = replace(flags, **run)
            line = f"Validation set of the run ({config.name}): {shown}"
        elif run:
            known = ", ".join(f"data.{name} {data[name]}" for name in _WHICH_DATA if data[name])
            line = f"The run was trained on {known}. If these are the same images, give its validation set: {shown}"
    return (flags if flags.split_seed is not None else replace(flags, split_seed=0)), line


def _read_data_settings(path: Path) -> tuple[dict[str, Any], int]:
    """Return the data settings of a run, with defaults for settings that its version lacked, and its seed."""
    content = read_config_dict(path)
    data: dict[str, Any] = {name: getattr(_DATA, name) for name in (*_WHICH_DATA, *_VALIDATION)}
    data |= {name: value for name, value in content.get("data", {}).items() if name in data}
    if data["validation_split"] == EVAL_DATASET:  # no files of this name exist
        data["validation_split"] = None
    fraction, seed = data["validation_fraction"], content.get("training", {}).get("seed", 0)
    names_are_text = all(isinstance(data[name], str | None) for name in (*_WHICH_DATA, "validation_split"))
    is_valid = names_are_text and isinstance(data["source"], str) and isinstance(fraction, int | float)
    if not is_valid or not isinstance(seed, int):
        raise ConfigError(f"{path} is not the configuration of a run; restore or remove it.")
    return data, seed


def evaluate(arguments: Sequence[str]) -> int:
    """Evaluate a pipeline, and return the exit code."""
    flags = parse(arguments)
    with out_of_memory_advice(f"lower --batch_size, which is {flags.batch_size}"):
        _evaluate(flags)
    return 0


@dataclass(frozen=True)
class _Work:
    """What is evaluated, and on which images."""

    flags: EvaluateFlags
    model: "ModelFolder | None"
    output: Path
    device: "torch.device"
    pipeline: "GaussianDiffusionPipeline"
    sampler: "Sampler"
    num_samples: int
    samples_dir: Path
    training: "ImageSet"
    validation: "ImageSet"
    measured: "ImageSet"  # for bits per dimension
    sample_metrics: list[str]  # the metrics that need samples
    is_mirrored: bool  # whether the network was trained with random flips
    process: "ReverseProcess | None"  # for bits per dimension; None if they are not measured
    num_terms: int | None  # of the bound per image; None computes all


def _evaluate(flags: EvaluateFlags) -> None:
    """Collective: measure everything that the flags ask for, and write and print the results."""
    from ddpm_hf import distributed
    from ddpm_hf.evaluation.generate import sample_to_folder, settings_of
    from ddpm_hf.evaluation.likelihood import estimate_second_moments, variational_bound
    from ddpm_hf.evaluation.metrics import check_metrics
    from ddpm_hf.evaluation.report import as_json, table
    from ddpm_hf.models import save_second_moments

    check_metrics(flags.metric_names())
    work = _prepare(flags)
    flags = work.flags  # with the validation set of the run
    settings, network = _check(work)
    sampler = replace(work.sampler, analytic_variance=False)  # its second moments may not be estimated yet
    full_batch = range(min(flags.batch_size, work.num_samples))
    prepared = sampler.prepare(work.pipeline)
    flags.compile_network(prepared, len(full_batch), sampler.call(prepared, flags.seed, full_batch))
    distributed.on_rank_0(lambda: work.output.mkdir(parents=True, exist_ok=True))
    if flags.estimate_variance:
        scheduler, model = work.pipeline.scheduler, work.model
        scheduler.eps_second_moments = estimate_second_moments(
            work.pipeline,
            work.training,
            seed=flags.seed,
            num_images=flags.estimate_variance,
            batch_size=flags.batch_size,
        )
        assert model is not None
        distributed.on_rank_0(lambda: save_second_moments(model, scheduler))
    pipeline = work.sampler.prepare(work.pipeline)
    if settings is None:
        settings = settings_of(pipeline, work.sampler, flags.seed, flags.batch_size)
    samples = sample_to_folder(
        pipeline,
        work.sampler,
        work.samples_dir,
        settings,
        num_images=work.num_samples,
        batch_size=flags.batch_size,
        as_png=flags.format == "png",
    )

    metrics, memorization = _measure_samples(work, samples, network)
    bound = None
    if work.process is not None:
        if flags.variance == "analytic":
            work.process.scheduler.analytic_variance = True
        bound = variational_bound(
            work.process, work.measured, seed=flags.seed, num_terms=work.num_terms, batch_size=flags.batch_size
        )
        metrics.append(bound.metric)
    if distributed.rank() == 0:
        content = as_json(
            metrics,
            bound,
            settings=settings,
            data={
                "source": _data_name(flags),
                "split": flags.data_split,
                "fingerprint": work.training.digest or None,
                "num_training_images": len(work.training),
                "num_held_out_images": len(work.validation),
                "validation_split": flags.data_validation_split,
                "validation_fraction": flags.data_validation_fraction or 0.0,
                "split_seed": flags.split_seed,
            },
            bound_settings=_describe_bound(work, bound),
            flags=given_flags(flags),
            memorization=[found.to_dict() for found in memorization],
        )
        write_text(work.output / EVALUATION, content)
        _draw(work, samples, bound, memorization)
        notes = [*(found.sentence() for found in memorization), *_notes(work, bound)]
        print("\n".join([table(metrics), *notes, ""]))
        print(f"Everything is in {work.output}: look at {EVALUATION} and {EVALUATION_PICTURE}.")


def _measure_samples(
    work: _Work, samples: "Images", network: "FeatureNetwork | None"
) -> "tuple[list[Metric], list[Memorization]]":
    """Collective: return the metrics of samples, and the details of memorization; both are empty on other ranks."""
    from ddpm_hf.evaluation.features import ReferenceStatistics
    from ddpm_hf.evaluation.memorization import measure_memorization
    from ddpm_hf.evaluation.metrics import MEMORIZATION, measure_fidelity

    flags, metrics, found = work.flags, [], []
    statistics = features = None
    if network is not None:
        cache_dir = Path(flags.data_cache_dir) if flags.data_cache_dir else None
        statistics = ReferenceStatistics(network, work.training, flags.batch_size, cache_dir)
        features = network.features_of_images(samples, flags.batch_size, "samples")
        fidelity = [name for name in work.sample_metrics if name != MEMORIZATION]
        if fidelity:
            metrics = measure_fidelity(
                samples,
                work.training,
                network,
                metrics=fidelity,
                batch_size=flags.batch_size,
                seed=flags.seed,
                statistics=statistics,
                sample_features=features,
            )
    if MEMORIZATION in work.sample_metrics:
        for space in [None] if flags.features is None else [None, network]:
            memorization = measure_memorization(
                samples,
                work.training,
                work.validation,
                device=work.device,
                is_mirrored=work.is_mirrored,
                network=space,
                statistics=statistics,
                sample_features=features,
                batch_size=flags.batch_size,
            )
            found += [] if memorization is None else [memorization]
    return metrics + [memorization.metric for memorization in found], found


def _prepare(flags: EvaluateFlags) -> _Work:
    """Collective: start the processes, load the pipeline and open the data."""
    import torch

    from ddpm_hf import distributed
    from ddpm_hf.data import ImageSet, class_order_of
    from ddpm_hf.diffusion import GaussianDiffusionScheduler
    from ddpm_hf.diffusion.scheduler import DEFAULT_STEPS
    from ddpm_hf.evaluation.generate import Sampler, default_sampling, image_shape
    from ddpm_hf.evaluation.likelihood import ReverseProcess
    from ddpm_hf.evaluation.metrics import BITS_PER_DIM
    from ddpm_hf.evaluation.report import choose_images
    from ddpm_hf.training.trainer import open_splits

    warn_of_training_flags(distributed.join(cpu=flags.cpu))
    accelerator = distributed.start(cpu=flags.cpu)
    model = _find_model(flags)
    flags.check_scheduler()
    place = None if model is None else model.evaluation
    output = flags.output or place
    if output is None or (place is None and flags.estimate_variance):
        what = "not a local folder" if model is None else "a checkpoint outside of a run"
        raise ConfigError(
            f"{flags.folder} is {what}; give --output for the results, and a local pipeline or run for "
            "--estimate_variance."
        )
    dtype = getattr(torch, flags.dtype)
    pipeline = load_pipeline(flags.folder, model, dtype=dtype, revision=flags.revision, variant=flags.variant).to(
        accelerator.device
    )
    flags.set_up_network(pipeline)
    height, width, num_channels = image_shape(pipeline)
    value_range = pipeline.config.get("value_range")
    is_student = DEFAULT_STEPS in pipeline.scheduler.config
    has_bits = pipeline.vae is not None or not value_range
    metrics = flags.metric_names(has_bits=has_bits and not is_student)
    if is_student and (BITS_PER_DIM in metrics or flags.estimate_variance):
        flag = f"--metrics {BITS_PER_DIM}" if BITS_PER_DIM in metrics else "--estimate_variance"
        raise ConfigError(
            f"{flag} needs a model of all timesteps, but {flags.folder} was distilled for "
            f"{format_count(pipeline.scheduler.config[DEFAULT_STEPS], 'step')}; evaluate its teacher, or remove it."
        )
    needs_labels = pipeline.num_classes > 0 and (BITS_PER_DIM in metrics or flags.estimate_variance > 0)
    flags, line = use_validation_set_of_run(flags, _config_of(model))
    if line and accelerator.is_main_process:
        print(line)
    config = RunConfig(
        data=flags.data_config((height, width), num_channels, value_range),
        model=ModelConfig(class_conditional=needs_labels),
        training=TrainingConfig(seed=flags.split_seed or 0),
    )
    class_names = pipeline.config.get("class_names") or {}
    known = tuple(class_names[number] for number in sorted(class_names, key=int)) or None
    training, validation = open_splits(config, accelerator, class_order_of(class_names), known=known)
    assert isinstance(training, ImageSet)
    if training.image_shape != (num_channels, height, width):
        raise ConfigError(
            f"{config.data.source} has images of {'x'.join(map(str, training.image_shape))} and the network makes "
            f"{num_channels}x{height}x{width}; remove --data.resolution and --data.num_channels, or change them."
        )
    sample_metrics = [name for name in metrics if name != BITS_PER_DIM]
    settings = {name: getattr(flags, name) for name in ("scheduler", *CALL_FLAGS)}
    if not sample_metrics or flags.timestep_spacing == "optimized":  # or the samples are for the picture only
        names = ("scheduler", "num_inference_steps", "eta", "timestep_spacing")
        given = {name: settings[name] for name in names}
        settings |= default_sampling(pipeline, **given, needs_native=flags.variance == "analytic")
    labels = None if flags.labels is None else tuple(flags.label_list(pipeline) or ())
    process = None
    if BITS_PER_DIM in metrics:
        timesteps = None  # all of training
        if flags.likelihood_steps is not None and isinstance(pipeline.scheduler, GaussianDiffusionScheduler):
            pipeline.scheduler.set_timesteps(flags.likelihood_steps, timestep_spacing=flags.timestep_spacing)
            timesteps = pipeline.scheduler.timesteps.tolist()
        process = ReverseProcess(pipeline, timesteps)
    num_terms = None if isinstance(flags.num_terms, str) else flags.num_terms
    return _Work(
        flags=flags,
        model=model,
        output=output,
        device=accelerator.device,
        pipeline=pipeline,
        sampler=Sampler(
            **settings,
            labels=labels,
            guide=flags.load_guide(pipeline),
            analytic_variance=flags.variance == "analytic",
        ),
        num_samples=flags.num_samples or (NUM_SAMPLES if sample_metrics else NUM_PICTURE_SAMPLES),
        samples_dir=flags.samples_dir or output / (SAMPLES if sample_metrics else PICTURE_SAMPLES),
        training=training,
        validation=validation,
        measured=choose_images(validation if len(validation) else training, flags.num_images, flags.seed),
        sample_metrics=sample_metrics,
        is_mirrored=_has_random_flips(_config_of(model)),
        process=process,
        num_terms=num_terms if process is None or (num_terms or 0) < len(process) else None,
    )


def _find_model(flags: EvaluateFlags) -> "ModelFolder | None":
    """Collective: find the model on rank 0, because a run that is being trained may have a newer checkpoint later."""
    from ddpm_hf import distributed
    from ddpm_hf.model_folder import ModelFolder

    found = distributed.on_rank_0(lambda: find_folder(flags.folder, flags.revision))
    values = distributed.broadcast_json(found and found.to_dict())
    return None if values is None else ModelFolder.from_dict(values)


def _config_of(model: "ModelFolder | None") -> Path | None:
    """Return the file with the configuration that a model was trained with, which may not exist."""
    if model is None:
        return None
    return model.path / (RUN_CONFIG if model.kind == "checkpoint" else TRAINING_CONFIG)


def _has_random_flips(config: Path | None) -> bool:
    """Tell whether a run was trained with data.random_flip."""
    data = read_config_dict(config).get("data", {}) if config is not None and config.is_file() else {}
    return data.get("random_flip", _DATA.random_flip) is True


def _check(work: _Work) -> "tuple[dict[str, Any] | None, FeatureNetwork | None]":
    """Collective: raise errors that would come later, before the network is called or a folder is created.

    Returns:
        The settings that the samples depend on, or None if they depend on second moments that will be estimated; and
        the feature network if a metric needs it.
    """
    from ddpm_hf import distributed
    from ddpm_hf.evaluation.generate import check_channels, check_folder, image_shape, settings_of
    from ddpm_hf.evaluation.likelihood import check_bound, check_second_moments
    from ddpm_hf.evaluation.memorization import check_training_images
    from ddpm_hf.evaluation.metrics import MEMORIZATION, check_reference, open_network_for

    flags, sampler = work.flags, work.sampler
    unknown: tuple[str, ...] = ()
    if flags.estimate_variance:
        check_second_moments(work.pipeline, work.training)
        if sampler.analytic_variance:
            sampler, unknown = replace(sampler, analytic_variance=False), ("pipeline", "analytic_variance")
    pipeline = sampler.prepare(work.pipeline)
    sampler.check(pipeline)
    if work.process is not None:
        check_bound(work.process, work.measured, work.num_terms)
    check_channels(image_shape(pipeline), as_png=flags.format == "png")
    settings = settings_of(pipeline, sampler, flags.seed, flags.batch_size)
    distributed.on_rank_0(lambda: check_folder(work.samples_dir, settings, unknown=unknown))
    if MEMORIZATION in work.sample_metrics:
        check_training_images(len(work.training))
    network = None
    fidelity = [name for name in work.sample_metrics if name != MEMORIZATION]
    if fidelity or (work.sample_metrics and flags.features is not None):
        check_reference(work.training)
        network = open_network_for(
            fidelity,
            work.training.image_shape,
            work.num_samples,
            len(work.training),
            features=flags.features or "inception",
            weights=flags.weights,
            device=work.device,
        )
    return None if unknown else settings, network


def given_flags(flags: EvaluateFlags) -> list[str]:
    """Return the flags that differ from their defaults, without the model and with data and guide by name only."""
    guide = Path(flags.guide).name if flags.guide is not None and Path(flags.guide).exists() else flags.guide
    flags = replace(flags, data=_data_name(flags), guide=guide)
    words = []
    for field in dataclasses.fields(flags):
        name, value = field.name, getattr(flags, field.name)
        if value == field.default or name in LOCAL_FLAGS or isinstance(value, Path):
            continue
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
        words.append(f"--{name.replace('data_', 'data.')}" + ("" if value is True else f"={text}"))
    return words


def _data_name(flags: EvaluateFlags) -> str:
    return Path(flags.data).name if Path(flags.data).exists() else flags.data


def _describe_bound(work: _Work, bound: "VariationalBound | None") -> dict[str, Any]:
    """Return how bits per dimension were computed; empty if they were not."""
    if bound is None:
        return {}
    flags, config = work.flags, work.pipeline.scheduler.config
    return {
        "images": "held out" if len(work.validation) else "all",
        "conditional": work.pipeline.num_classes > 0,
        "num_steps": len(bound.timesteps),
        "num_terms": work.num_terms or len(bound.timesteps),
        "timestep_spacing": (flags.timestep_spacing or config["timestep_spacing"]) if flags.likelihood_steps else None,
        "variance": "analytic" if flags.variance == "analytic" else config["variance_type"],
    } | ({"of": "latents"} if bound.is_of_latents else {})


def _notes(work: _Work, bound: "VariationalBound | None") -> list[str]:
    """Return notes for comparing bits per dimension with those of other models."""
    notes, num_classes = [], work.pipeline.num_classes
    if bound is not None and bound.is_of_latents:
        notes.append(
            "bits_per_dim is of latents, whose density it bounds: compare it only with models on latents of the same "
            "VAE, not with bits of pixels."
        )
    if bound is not None and not len(work.validation):
        notes.append("bits_per_dim is of training images and may be lower than on others; there is no validation set.")
    if bound is not None and num_classes:
        label = math.log2(num_classes) / math.prod(work.pipeline.sample_shape)
        notes.append(f"bits_per_dim is given the class of each image; encoding the class would add up to {label:.3f}.")
    return notes


def _draw(work: _Work, samples: "Images", bound: "VariationalBound | None", memorization: "list[Memorization]") -> None:
    """Draw evaluation.png."""
    from ddpm_hf.evaluation.memorization import MAX_RATIO, nearest_images
    from ddpm_hf.evaluation.report import choose_images, real_images
    from ddpm_hf.plots import Ratios, as_drawn, evaluation_plot

    shown = choose_images(work.training, min(NUM_PICTURE_SAMPLES, len(work.training)), work.flags.seed)
    compared = samples[:NUM_NEIGHBORS]
    if memorization:  # in pixels, the samples that may be copies
        compared = samples[[one.sample for one in memorization[0].closest]]
    neighbors, _, distances = nearest_images(compared, work.training, work.device)
    drawn = partial(as_drawn, value_range=work.pipeline.config.get("value_range"))
    step = f" at {work.model.progress}" if work.model is not None and work.model.kind == "checkpoint" else ""
    title = f"{Path(work.flags.folder).resolve().name}{step}, {Path(work.flags.data).name}"
    if bound is not None:
        title += f": {bound.bits_per_dim:.3f} bits per dimension{' of latents' if bound.is_of_latents else ''}"
    atomic_write(
        work.output / EVALUATION_PICTURE,
        lambda path: evaluation_plot(
            path,
            samples=drawn(samples[:NUM_PICTURE_SAMPLES]),
            real=drawn(real_images(shown, shown.positions)),
            compared=drawn(compared),
            neighbors=drawn(neighbors),
            distances=distances,
            bound=None if bound is None else bound.to_dict(),
            memorization=[
                Ratios(found.space, found.ratios, found.validation_ratios, MAX_RATIO) for found in memorization
            ],
            title=title,
        ),
    )
