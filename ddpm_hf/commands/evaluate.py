"""`ddpm-hf evaluate`: measures how good a pipeline is, prints a table, writes evaluation.json and a picture."""

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_hf.commands.complaints import out_of_memory
from ddpm_hf.commands.evaluate_flags import data_config, parse
from ddpm_hf.commands.evaluate_split import take_split_of_run
from ddpm_hf.commands.folders import find_model, load_pipeline
from ddpm_hf.commands.sampling_flags import CALL_FLAGS, check_scheduler, label_list
from ddpm_hf.config import ConfigError, ModelConfig, RunConfig, TrainingConfig

if TYPE_CHECKING:
    import torch

    from ddpm_hf.data import ImageSet
    from ddpm_hf.diffusion import GaussianDiffusionPipeline
    from ddpm_hf.evaluation.likelihood import VariationalBound
    from ddpm_hf.evaluation.metrics import Metric
    from ddpm_hf.evaluation.ranks import Ranks
    from ddpm_hf.evaluation.sampling import Images, Sampler

REPORT, PICTURE, SAMPLES = "evaluation.json", "evaluation.png", "evaluation_samples"
# A few samples in few steps, where nothing but the picture needs any.
SHOWN_SAMPLES, NUM_SHOWN, NUM_SHOWN_STEPS = "evaluation_picture", 64, 50


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
        timesteps: The chain for bits per dimension; None is that of training.
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
    timesteps: list[int] | None
    num_terms: int | None
    ranks: "Ranks"
    device: "torch.device"


def _evaluate(options: Namespace) -> None:
    """Collective: does everything that was asked for."""
    from ddpm_hf.evaluation.evaluate import as_json, fidelity, table
    from ddpm_hf.evaluation.metrics import BITS_PER_DIM, check_metrics
    from ddpm_hf.evaluation.samples import sample_to_folder, settings_of

    check_metrics(options.metrics)
    work = _prepare(options)
    _check(work)
    work.ranks.on_rank_0(lambda: work.output.mkdir(parents=True, exist_ok=True))
    if options.estimate_variance:
        _estimate_variance(work)
    sampler = work.sampler
    sampling = sampler.prepare(work.pipeline)
    samples = sample_to_folder(
        sampling,
        sampler,
        work.samples_dir,
        seed=options.seed,
        num_images=work.num_samples,
        batch_size=options.batch_size,
        as_png=options.format == "png",
        ranks=work.ranks,
    )
    metrics: list[Metric] = []
    if work.of_samples:
        metrics += fidelity(
            samples,
            work.training,
            work.of_samples,
            features=options.features,
            weights=options.weights,
            batch_size=options.batch_size,
            device=work.device,
            cache_dir=Path(options.data_cache_dir) if options.data_cache_dir else None,
            seed=options.seed,
            ranks=work.ranks,
        )
    bound: VariationalBound | None = None
    bound_settings: dict[str, Any] = {}
    if BITS_PER_DIM in options.metrics:
        metric, bound, bound_settings = _bits_per_dim(work)
        metrics.append(metric)
    if work.ranks.rank == 0:
        content = as_json(
            metrics,
            bound,
            settings=settings_of(sampling, sampler, options.seed, options.batch_size),
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

    from ddpm_hf.commands.ranks import started_ranks
    from ddpm_hf.data import ImageSet
    from ddpm_hf.evaluation.evaluate import choose_images
    from ddpm_hf.evaluation.image_shape import image_shape
    from ddpm_hf.evaluation.metrics import BITS_PER_DIM, OF_SAMPLES
    from ddpm_hf.training import processes
    from ddpm_hf.training.setup import open_splits

    accelerator = processes.start(TrainingConfig(cpu=options.cpu, tf32=False))
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
    of_samples = [name for name in options.metrics if name in OF_SAMPLES]
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
        timesteps=timesteps,
        num_terms=num_terms,
        ranks=started_ranks(),
        device=accelerator.device,
    )


def _sampler(options: Namespace, pipeline: "GaussianDiffusionPipeline", *, for_the_picture: bool) -> "Sampler":
    """Returns how samples are drawn: for the picture alone in few steps, unless told otherwise."""
    from ddpm_hf.evaluation.sampling import Sampler

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


def _check(work: _Work) -> None:
    """Collective: refuses all that could be refused later, before the network is called or a folder is made."""
    from ddpm_hf.evaluation.fidelity import check_fidelity, check_reference
    from ddpm_hf.evaluation.image_shape import image_shape
    from ddpm_hf.evaluation.likelihood import check_bound
    from ddpm_hf.evaluation.metrics import BITS_PER_DIM
    from ddpm_hf.evaluation.samples import check_channels, check_folder, settings_of
    from ddpm_hf.evaluation.second_moments import check_second_moments

    options, pipeline, sampler = work.options, work.pipeline, work.sampler
    undecided: tuple[str, ...] = ()
    if options.estimate_variance:
        check_second_moments(pipeline, work.training)
        if sampler.analytic_variance:  # by moments that are not there yet
            sampler, undecided = replace(sampler, analytic_variance=False), ("pipeline", "analytic_variance")
    sampling = sampler.prepare(pipeline)
    sampler.check(sampling)
    if BITS_PER_DIM in options.metrics:
        check_bound(pipeline, work.measured, work.timesteps, work.num_terms)
    check_channels(image_shape(pipeline), as_png=options.format == "png")
    settings = settings_of(sampling, sampler, options.seed, options.batch_size)
    work.ranks.on_rank_0(lambda: check_folder(work.samples_dir, settings, undecided=undecided))
    if work.of_samples:
        check_reference(work.training)
        work.ranks.on_rank_0(
            lambda: check_fidelity(
                work.of_samples,
                work.training.image_shape,
                work.num_samples,
                len(work.training),
                features=options.features,
                weights=options.weights,
                device=work.device,
            )
        )


def _estimate_variance(work: _Work) -> None:
    """Collective: estimates the second moments and keeps them beside the scheduler's configuration."""
    from ddpm_hf.diffusion.reverse_variance import second_moments_file
    from ddpm_hf.evaluation.second_moments import estimate_second_moments

    options, scheduler = work.options, work.pipeline.scheduler
    assert work.folder is not None
    folder = second_moments_file(work.folder).parent
    scheduler.eps_second_moments = estimate_second_moments(
        work.pipeline,
        work.training,
        seed=options.seed,
        num_images=options.estimate_variance,
        batch_size=options.batch_size,
        ranks=work.ranks,
    )
    work.ranks.on_rank_0(lambda: scheduler.save_second_moments(folder))


def _bits_per_dim(work: _Work) -> "tuple[Metric, VariationalBound, dict[str, Any]]":
    """Collective: computes the bound of the held-out images, or of all where none are held out."""
    from ddpm_hf.evaluation.evaluate import bits_per_dim

    options, scheduler = work.options, work.pipeline.scheduler
    if options.variance == "analytic":
        scheduler.analytic_variance = True
    metric, bound = bits_per_dim(
        work.pipeline,
        work.measured,
        seed=options.seed,
        num_terms=work.num_terms,
        timesteps=work.timesteps,
        batch_size=options.batch_size,
        ranks=work.ranks,
    )
    spacing = None if work.timesteps is None else options.timestep_spacing or scheduler.config["timestep_spacing"]
    settings = {
        "images": "held out" if len(work.held_out) else "all",
        "conditional": work.pipeline.num_classes > 0,
        "num_steps": len(bound.timesteps),
        "num_terms": work.num_terms or len(bound.timesteps),
        "timestep_spacing": spacing,
        "variance": "analytic" if options.variance == "analytic" else scheduler.config["variance_type"],
    }
    return metric, bound, settings


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
    from ddpm_hf.durable import write_text, write_whole
    from ddpm_hf.evaluation.evaluate import choose_images
    from ddpm_hf.evaluation.neighbours import nearest_images, real_images
    from ddpm_hf.evaluation.picture import NUM_NEIGHBOURS, draw_evaluation

    shown = choose_images(work.training, min(NUM_SHOWN, len(work.training)), work.options.seed)
    neighbours, _, distances = nearest_images(samples[:NUM_NEIGHBOURS], work.training)
    write_whole(
        work.output / PICTURE,
        lambda path: draw_evaluation(
            path,
            samples=samples[:NUM_SHOWN],
            real=real_images(shown, shown.positions),
            neighbours=neighbours,
            distances=distances,
            bound=bound,
            title=f"{Path(work.options.folder).name}, {Path(work.options.data).name}",
        ),
    )
    write_text(work.output / REPORT, content)
