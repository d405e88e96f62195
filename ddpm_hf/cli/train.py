"""`ddpm-hf train`: train, sample, evaluate the samples and write the report."""

import importlib.util
import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_hf.cli.common import (
    RankError,
    format_os_error,
    out_of_memory_advice,
    paused_garbage_collection,
    print_error,
)
from ddpm_hf.config import ConfigError, RunConfig, parse_command_line
from ddpm_hf.files import HUB_DIR
from ddpm_hf.signals import raise_on_signals

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ddpm_hf.data import ImageSet, ImageStream
    from ddpm_hf.hub.background import BackgroundPush
    from ddpm_hf.training.trainer import Trainer

logger = logging.getLogger(__name__)


@raise_on_signals()
def train(arguments: Sequence[str] | None, prog: str = "ddpm-hf train") -> int:
    """Train as the command line says and return the exit code.

    During training a signal saves a checkpoint; before and after, it ends the command.
    """
    config, is_dry_run = parse_command_line(arguments, prog)
    program = f"python {prog}" if prog.endswith(".py") else prog
    command = f"{program} {shlex.join(sys.argv[1:] if arguments is None else arguments)}"
    exit_code, trainer = run(config, command, is_dry_run=is_dry_run)
    trainer.shutdown()
    return exit_code


def run(config: RunConfig, command: str, *, is_dry_run: bool) -> "tuple[int, Trainer]":
    """Collective: train, report and publish a run; return the exit code and the trainer, which is closed.

    Args:
        config: The configuration.
        command: The command line, for the report.
        is_dry_run: Whether to check only.
    """
    needs_sklearn = config.evaluation.recognition and config.evaluation.num_samples
    if needs_sklearn and importlib.util.find_spec("sklearn") is None:
        raise ConfigError(
            'evaluation.recognition needs scikit-learn; install it with pip install "ddpm_hf[recognition]".'
        )

    with paused_garbage_collection():
        from ddpm_hf.training.trainer import Trainer

    advice = "lower training.micro_batch_size, or evaluation.batch_size if it was while sampling the report"
    push = None
    if config.hub.push_to_hub:
        from ddpm_hf.hub.background import BackgroundPush

        push = BackgroundPush(config.hub, Path(config.training.output_dir).expanduser() / HUB_DIR)
    with out_of_memory_advice(advice), push or nullcontext():
        # This command publishes the finished run, with its report, which is sampled with the settings of the run.
        publisher = None if push is None else push.publish
        with Trainer(config, publisher=publisher, restore=not is_dry_run) as trainer, trainer.process_settings:
            exit_code = _run(trainer, push, command, is_dry_run=is_dry_run)
    return exit_code, trainer


def _run(
    trainer: "Trainer",
    push: "BackgroundPush | None",
    command: str,
    *,
    is_dry_run: bool,
) -> int:
    """Collective: check, train, report, publish, and return the exit code."""
    from ddpm_hf import distributed
    from ddpm_hf.training.trainer import describe

    _check_classes(trainer)
    if push is not None:
        distributed.on_rank_0(push.check)
    if trainer.is_main_process:
        print(f"{describe(trainer)}\n\n{trainer.config.to_yaml()}", flush=True)
    if is_dry_run:
        trainer.checkpointer.check()
        if trainer.is_main_process:
            print("Everything fits together; without --dry_run this would train.")
        return 0
    exit_code = _fit(trainer)
    if exit_code or not trainer.is_main_process:
        return exit_code
    if trainer.config.evaluation.num_samples:
        try:
            _write_report(trainer, command)
        except ValueError as error:  # not a mistake of the user here, and the trained pipeline is not affected
            raise RuntimeError(f"the report failed; the trained pipeline is in {trainer.folder.pipeline}") from error
    if push is not None and not push.finish(trainer.folder.path):
        print_error(
            f"the trained pipeline is not on the Hub; it is in {trainer.folder.pipeline}, and the same command tries "
            "again."
        )
        return 1
    return int(trainer.is_behind_on_hub)


def _fit(trainer: "Trainer") -> int:
    """Train and return the exit code.

    Errors that all ranks raise together are printed once; an error of one rank alone, such as an image that cannot be
    read, is printed by that rank. Any other ValueError is a bug, not a mistake of the user.
    """
    from ddpm_hf.data import DataError
    from ddpm_hf.distributed import ProcessesDiffer, SharedOSError, TrainingStopped
    from ddpm_hf.model_folder import CheckpointError
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


def _check_classes(trainer: "Trainer") -> None:
    """Raise before training if the report could not evaluate the classes of its samples."""
    evaluation = trainer.config.evaluation
    if not evaluation.recognition or not evaluation.num_samples:
        return

    from ddpm_hf.evaluation.recognition import check_classes

    _, labels = _as_arrays(trainer.images)
    check_classes(labels, _labels_in_turn(evaluation.num_samples, len(trainer.class_names or ())))


def _write_report(trainer: "Trainer", command: str) -> None:
    """Sample from the saved pipeline, evaluate the samples if configured, and write pictures and README."""
    from ddpm_hf.diffusion import GaussianDiffusionPipeline
    from ddpm_hf.evaluation.generate import Sampler, sample_images, sample_trajectory
    from ddpm_hf.evaluation.recognition import recognition_report
    from ddpm_hf.plots import as_drawn
    from ddpm_hf.run_report import loading_lines, write_report
    from ddpm_hf.training.logging import say

    config, evaluation, output_dir = trainer.config, trainer.config.evaluation, trainer.folder.path
    say(f"Sampling {evaluation.num_samples} images from {output_dir / 'pipeline'} ...")
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
        real = (*_as_arrays(trainer.images), *_as_arrays(trainer.validation_images))
        recognition = recognition_report(*real, samples, labels)
    write_report(
        output_dir,
        samples=as_drawn(samples, pipeline.config.get("value_range")),
        sample_labels=labels,
        class_names=names,
        trajectory=as_drawn(trajectory, pipeline.config.get("value_range")),
        metrics=trainer.metrics.rows(),
        step=trainer.global_step,
        recognition=recognition,
        title=f"A DDPM trained on {Path(config.data.source).name}",
        command=command,
        settings=_main_settings(config),
        sampler=sampler,
        has_vae=pipeline.vae is not None,
    )
    if recognition is not None:
        say("\n".join(recognition.lines()))
        say(f"recognised={recognition.recognised:.3f}")
    say(f"\nEverything is in {output_dir}: look at samples.png, denoising.gif and README.md.")
    lines = loading_lines(output_dir / "pipeline", names, sampler, has_vae=pipeline.vae is not None)
    say(f"Load the trained pipeline with\n\n{lines}")


def _labels_in_turn(num_samples: int, num_classes: int) -> "NDArray[np.int64]":
    """Return labels that cycle through the classes."""
    import numpy as np

    return np.arange(num_samples, dtype=np.int64) % num_classes


def _as_arrays(images: "ImageSet | ImageStream") -> "tuple[NDArray[np.uint8], NDArray[np.int64]]":
    """Return all images of a set as uint8 (number, height, width, channels), and their labels."""
    from ddpm_hf.data import ImageSet

    assert isinstance(images, ImageSet)
    labels = images.take(images.positions)[1]
    assert labels is not None
    return images.pictures(images.positions).transpose(0, 2, 3, 1), labels


def _main_settings(config: RunConfig) -> dict[str, str]:
    """Return the settings at the top of the report."""
    diffusion, training = config.diffusion, config.training
    return {
        "data": f"{config.data.source} (split {config.data.split})",
        **({} if not (vae := config.data.vae or config.model.vae) else {"VAE": vae}),
        "network": config.model.from_pretrained or config.model.config_file or str(config.model.preset),
        "beta schedule, T": f"{diffusion.beta_schedule}, {diffusion.num_train_timesteps}",
        "prediction": diffusion.prediction_type,
        **({} if config.distillation.teacher is None else {"distilled from": config.distillation.teacher}),
        "steps x global batch": f"{training.num_steps:,} x {training.train_batch_size}",
        "learning rate": f"{training.learning_rate:g}, {training.learning_rate_schedule}",
        "EMA decay": f"{training.ema_decay:g}",
        "precision": str(training.mixed_precision),
        "seed": str(training.seed),
    }
