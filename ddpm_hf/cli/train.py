"""`ddpm-hf train`: trains, samples, judges the samples and writes the report."""

import importlib.util
import shlex
import sys
from collections.abc import Sequence, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_hf.cli.common import RankError, format_os_error, out_of_memory_advice, print_error, raise_on_signals
from ddpm_hf.config import ConfigError, RunConfig, load_config

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ddpm_hf.data import ImageSet, ImageStream
    from ddpm_hf.hub.background import BackgroundPush
    from ddpm_hf.training.trainer import Scorer, Trainer


def train(arguments: Sequence[str] | None, prog: str = "ddpm-hf train") -> int:
    """Trains, and returns the exit code; training saves at a signal, and what comes before and after ends at it."""
    with raise_on_signals():
        return _train(arguments, prog)


def _train(arguments: Sequence[str] | None, prog: str) -> int:
    """Builds a trainer, lets it train, writes the report, and returns the exit code."""
    config, is_dry_run = load_config(arguments, prog)
    needs_sklearn = config.evaluation.recognition and config.evaluation.num_samples
    if needs_sklearn and importlib.util.find_spec("sklearn") is None:
        raise ConfigError('evaluation.recognition needs scikit-learn; install it with pip install "ddpm_hf[demo]".')

    from diffusers.utils import logging

    from ddpm_hf.training.trainer import Trainer

    logging.disable_progress_bar()  # for each part of a saved pipeline that is loaded
    program = f"python {prog}" if prog.endswith(".py") else prog
    command = f"{program} {shlex.join(sys.argv[1:] if arguments is None else arguments)}"
    advice = "lower training.micro_batch_size, or evaluation.batch_size if it was while sampling the report"
    with out_of_memory_advice(advice), _publisher(config) or nullcontext() as publisher:
        trainer = Trainer(config, _scorer(config), publisher)
        try:
            exit_code = _run(trainer, publisher, command, is_dry_run=is_dry_run)
        finally:
            trainer.folder.release()
    trainer.leave_the_others()
    return exit_code


def _run(trainer: "Trainer", publisher: "BackgroundPush | None", command: str, *, is_dry_run: bool) -> int:
    """Collective: checks, trains, reports, publishes, and returns the exit code."""
    from ddpm_hf import distributed
    from ddpm_hf.training.trainer import describe

    _check_classes(trainer)
    _check_score(trainer)
    if publisher is not None:
        distributed.on_rank_0(publisher.check)
    if trainer.is_main_process:
        print(f"{describe(trainer)}\n\n{trainer.config.to_yaml()}", flush=True)
    if is_dry_run:
        trainer.saver.check()
        if trainer.is_main_process:
            print("Everything fits together; without --dry_run this would train.")
        return 0
    exit_code = _fit(trainer)
    if exit_code or not trainer.is_main_process:
        return exit_code
    if trainer.config.evaluation.num_samples:
        _report(trainer, command)
    if publisher is not None and not publisher.finish(trainer.folder.path):
        print_error(
            f"the trained pipeline is not on the Hub; it is in {trainer.folder.pipeline}, and the same command tries "
            "again."
        )
        return 1
    return 0


def _publisher(config: RunConfig) -> "BackgroundPush | None":
    """Returns what pushes the pipelines of the run, if they are to be pushed."""
    if not config.hub.push_to_hub:
        return None

    from ddpm_hf.hub.background import BackgroundPush

    return BackgroundPush(config.hub, Path(config.training.output_dir).expanduser() / "hub")


def _scorer(config: RunConfig) -> "Scorer | None":
    """Returns what measures the score of the run, if it is to have one."""
    from ddpm_hf.evaluation.report import small_sample_score

    return small_sample_score(config) if config.evaluation.score_every_steps else None


def _check_score(trainer: "Trainer") -> None:
    """Collective: refuses, before training, a score that could not be measured."""
    from ddpm_hf import distributed
    from ddpm_hf.evaluation.metrics import SAMPLE_METRICS, open_network_for

    evaluation = trainer.config.evaluation
    if evaluation.score_every_steps and evaluation.score_metric in SAMPLE_METRICS:
        distributed.on_rank_0(
            lambda: open_network_for(
                [evaluation.score_metric],
                trainer.images.image_shape,
                evaluation.score_num_samples,
                len(trainer.images) if isinstance(trainer.images, Sized) else 0,
                features=evaluation.score_features,
                device=trainer.device,
            )
        )


def _fit(trainer: "Trainer") -> int:
    """Trains and returns the exit code; a bug is not taken for a mistake of the user.

    What all ranks raise together is told once; what one of them meets alone, in its images, it tells itself.
    """
    from ddpm_hf.data import DataError
    from ddpm_hf.distributed import ProcessesDiffer, SharedOSError, TrainingStopped
    from ddpm_hf.training.checkpoint import CheckpointError
    from ddpm_hf.training.optim import NonFiniteTraining

    try:
        trainer.fit()
    except TrainingStopped as stop:
        return stop.exit_code
    except NonFiniteTraining as error:
        print_error(str(error))
        return 3
    except ProcessesDiffer as error:
        print_error(str(error))
        return 1
    except (ConfigError, CheckpointError, SharedOSError, BrokenPipeError):
        raise
    except DataError as error:
        raise RankError(str(error), 2) from error
    except OSError as error:
        raise RankError(format_os_error(error)) from error
    except ValueError as error:
        raise RuntimeError("training failed") from error
    return 0


def _report(trainer: "Trainer", command: str) -> None:
    """Writes the report; what goes wrong there is no bad input any more, and takes nothing away from the training."""
    try:
        _write_report(trainer, command)
    except ValueError as error:
        raise RuntimeError(f"the report failed; the trained pipeline is in {trainer.folder.pipeline}") from error


def _check_classes(trainer: "Trainer") -> None:
    """Refuses, before training, a question about classes that the report could not answer."""
    from ddpm_hf.evaluation.recognition import check_classes

    evaluation = trainer.config.evaluation
    if not evaluation.recognition or not evaluation.num_samples:
        return
    _, labels = _as_arrays(trainer.images)
    check_classes(labels, _labels_in_turn(evaluation.num_samples, len(trainer.class_names or ())))


def _write_report(trainer: "Trainer", command: str) -> None:
    """Samples from the saved pipeline, judges the samples if asked, and writes pictures and README."""
    from ddpm_hf.diffusion import GaussianDiffusionPipeline
    from ddpm_hf.evaluation.generate import Sampler, sample_images, sample_trajectory
    from ddpm_hf.evaluation.recognition import recognition_report
    from ddpm_hf.run_report import loading_lines, write_report

    config, evaluation, output_dir = trainer.config, trainer.config.evaluation, trainer.folder.path
    print(f"Sampling {evaluation.num_samples} images from {output_dir / 'pipeline'} ...", flush=True)
    pipeline = GaussianDiffusionPipeline.from_pretrained(output_dir / "pipeline").to(trainer.device)
    names = list(trainer.class_names.values()) if trainer.class_names else None
    labels = _labels_in_turn(evaluation.num_samples, len(names)) if names else None
    sampler = Sampler.from_config(evaluation)
    samples = sample_images(
        pipeline,
        sampler,
        seed=config.training.seed,
        indices=range(evaluation.num_samples),
        batch_size=evaluation.batch_size,
    )
    num_shown = min(evaluation.num_samples, 4 * len(names) if names and len(names) <= 10 else 16)
    trajectory = sample_trajectory(
        pipeline, sampler, seed=config.training.seed, num_images=num_shown, batch_size=evaluation.batch_size
    )
    recognition = None
    if evaluation.recognition and labels is not None:
        recognition = recognition_report(*_as_arrays(trainer.images), *_as_arrays(trainer.held_out), samples, labels)
    write_report(
        output_dir,
        samples=samples,
        sample_labels=labels,
        class_names=names,
        trajectory=trajectory,
        metrics=trainer.metrics.rows(),
        step=trainer.state.global_step,
        recognition=recognition,
        title=f"A DDPM trained on {Path(config.data.source).name}",
        command=command,
        settings=_main_settings(config),
        sampler=sampler,
    )
    if recognition is not None:
        print("\n".join(recognition.lines()))
        print(f"recognised={recognition.recognised:.3f}")
    print(f"\nEverything is in {output_dir}: look at samples.png, denoising.gif and README.md.")
    print(f"Load the trained pipeline with\n\n{loading_lines(output_dir / 'pipeline', names, sampler)}")


def _labels_in_turn(num_samples: int, num_classes: int) -> "NDArray[np.int64]":
    """Returns labels that go through the classes in turn."""
    import numpy as np

    return np.arange(num_samples, dtype=np.int64) % num_classes


def _as_arrays(images: "ImageSet | ImageStream") -> "tuple[NDArray[np.uint8], NDArray[np.int64]]":
    """Returns all images of a set, 8 bits, channels last, and their labels."""
    from ddpm_hf.data import ImageSet, to_uint8

    assert isinstance(images, ImageSet)
    pixels, labels = images.take(images.positions)
    assert labels is not None
    return to_uint8(pixels).transpose(0, 2, 3, 1), labels


def _main_settings(config: RunConfig) -> dict[str, str]:
    """Returns what a reader of the report wants to know first."""
    diffusion, training = config.diffusion, config.training
    return {
        "data": f"{config.data.source} (split {config.data.split})",
        "network": config.model.from_pretrained or config.model.config_file or str(config.model.preset),
        "beta schedule, T": f"{diffusion.beta_schedule}, {diffusion.num_train_timesteps}",
        "prediction": diffusion.prediction_type,
        "steps x global batch": f"{training.num_steps:,} x {training.train_batch_size}",
        "learning rate": f"{training.learning_rate:g}, {training.learning_rate_schedule}",
        "EMA decay": f"{training.ema_decay:g}",
        "precision": training.mixed_precision,
        "seed": str(training.seed),
    }
