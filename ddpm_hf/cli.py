"""The command line: parse, call, and turn what goes wrong into one sentence and an exit code.

Exit codes: 0 done, 1 failed while running, 2 bad input, 3 training was not finite, 130 / 143 stopped by a signal after
saving.
"""

import importlib.util
import os
import shlex
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ddpm_hf import __version__
from ddpm_hf.config import ConfigError, RunConfig, load_config, load_data_config
from ddpm_hf.redaction import redact

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ddpm_hf.data import ImageSet, ImageStream
    from ddpm_hf.training.trainer import Trainer

_USAGE = """usage: ddpm-hf <command> ...

commands:
  data     show what a run would read; see ddpm-hf data --help
  train    train a DDPM; see ddpm-hf train --help
  verify   tell whether a saved pipeline is what was saved; see ddpm-hf verify --help
  ema      make a pipeline with an average of any length; see ddpm-hf ema --help
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `ddpm-hf <command> ...` and returns the exit code."""
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if command == "--version":
        print(f"ddpm-hf {__version__}")
        return 0
    commands = {"data": data, "train": train, "ema": ema, "verify": verify}
    if command in commands:
        return commands[command](rest[:-1])
    print(_USAGE, end="")
    if command in ("-h", "--help"):
        return 0
    problem = f"unknown command {command!r}" if command else "no command"
    print(redact(f"ddpm-hf: {problem}; choose data, train, ema or verify."), file=sys.stderr)
    return 2


def data(arguments: Sequence[str]) -> int:
    """Shows what a run would read, and returns the exit code."""
    return _exit_code(lambda: _show_data(arguments))


def train(arguments: Sequence[str] | None = None, prog: str = "ddpm-hf train") -> int:
    """Trains as the command line and its configuration say, and returns the exit code."""
    return _exit_code(lambda: _train(arguments, prog))


def verify(arguments: Sequence[str]) -> int:
    """Tells whether a saved pipeline is what was saved, and returns the exit code."""
    from ddpm_hf.commands.verify import verify as command

    return _exit_code(lambda: command(arguments))


def ema(arguments: Sequence[str] | None = None) -> int:
    """Makes a pipeline with an average of any length out of those that a run stored, and returns the exit code."""
    parser = ArgumentParser(
        prog="ddpm-hf ema",
        description="Make a pipeline with an average of any length, out of those that a run with training.posthoc_ema "
        "stored (Karras et al. 2024).",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="folder of the run")
    parser.add_argument(
        "--length",
        type=float,
        required=True,
        help="length of the average relative to the training: 0.05 is short, 0.10 usual, 0.25 very long",
    )
    parser.add_argument("--step", type=int, help="step whose averages were stored; by default the last")
    parser.add_argument("--output", type=Path, help="new folder; by default pipeline_ema_LENGTH in the run's folder")
    options = parser.parse_args(arguments)
    return _exit_code(lambda: _ema(options.folder, options.length, options.step, options.output))


def _ema(folder: Path, length: float, step: int | None, output: Path | None) -> int:
    """Writes the pipeline and says how exact it is."""
    from ddpm_hf.training.posthoc_ema import rebuild

    if output is None:
        output = folder / f"pipeline_ema_{length:.3f}{'' if step is None else f'_step_{step:08d}'}"
    rebuilt = rebuild(folder, length, step, output)
    print(
        f"{output}: average of length {length:g} at step {rebuilt.step}, made of {rebuilt.num_stored} stored ones "
        f"(its profile is off by {rebuilt.relative_error:.2%})."
    )
    return 0


def _exit_code(command: Callable[[], int]) -> int:
    """Runs a command; what a user can cause is told in one sentence, once, by rank 0, and a bug by a traceback."""
    sys.excepthook = _print_traceback
    try:
        return command()
    except ValueError as error:
        _complain(str(error))
        return 2
    except OSError as error:
        _complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints a traceback as Python does, without secrets: libraries put what they were given into their errors."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)


def _complain(message: str, *, of_this_rank: bool = False) -> None:
    """Prints an error on rank 0, since the other ranks have the same one, or on the only rank that has it."""
    rank = os.environ.get("RANK", "0")
    if of_this_rank or rank == "0":
        print(f"error: {f'rank {rank}: ' if rank != '0' else ''}{redact(message)}", file=sys.stderr, flush=True)


def _train(arguments: Sequence[str] | None, prog: str) -> int:
    """Builds a trainer, lets it train, and writes the report."""
    config, is_dry_run = load_config(arguments, prog)
    if config.evaluation.recognition and importlib.util.find_spec("sklearn") is None:
        raise ConfigError('evaluation.recognition needs scikit-learn; install it with pip install "ddpm_hf[demo]".')

    import torch

    from ddpm_hf.training.summary import describe
    from ddpm_hf.training.trainer import Trainer

    try:
        trainer = Trainer(config)
        try:
            _check_classes(trainer)
            if trainer.is_main_process:
                print(f"{describe(trainer)}\n\n{config.to_yaml()}", flush=True)
            if is_dry_run:
                trainer.saver.check()
                if trainer.is_main_process:
                    print("Everything fits together; without --dry_run this would train.")
                exit_code = 0
            else:
                exit_code = _fit(trainer)
            if exit_code == 0 and not is_dry_run and trainer.is_main_process and config.evaluation.num_samples:
                program = f"python {prog}" if prog.endswith(".py") else prog
                _report(trainer, f"{program} {shlex.join(sys.argv[1:] if arguments is None else arguments)}")
        finally:
            trainer.folder.release()
    except torch.OutOfMemoryError as error:
        _complain(
            f"the device ran out of memory ({str(error).splitlines()[0]}); lower training.micro_batch_size, or "
            "evaluation.batch_size if it was while sampling the report.",
            of_this_rank=True,
        )
        return 1
    trainer.leave_the_others()
    return exit_code


def _show_data(arguments: Sequence[str]) -> int:
    """Says what a run would read, and draws its first samples."""
    config, picture = load_data_config(arguments)

    from ddpm_hf.data import DataError, summarize
    from ddpm_hf.plots import image_grid

    summary = summarize(config.data, seed=config.training.seed, num_samples=64)
    print("\n".join(summary.lines))
    image_grid(summary.samples, 8).save(picture)
    print(f"{'picture':<10}the first {len(summary.samples)} samples of a run are in {picture}")
    if summary.problem is not None:
        raise DataError(summary.problem)
    return 0


def _fit(trainer: "Trainer") -> int:
    """Trains and returns the exit code; a bug is not taken for a mistake of the user."""
    from ddpm_hf.data import DataError
    from ddpm_hf.training.checkpoint import CheckpointError
    from ddpm_hf.training.guard import NonFiniteTraining, TrainingStopped
    from ddpm_hf.training.processes import ProcessesDiffer

    try:
        trainer.fit()
    except TrainingStopped as stop:
        return stop.exit_code
    except NonFiniteTraining as error:
        _complain(str(error))
        return 3
    except ProcessesDiffer as error:
        _complain(str(error))
        return 1
    except (ConfigError, DataError, CheckpointError):
        raise
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
    from diffusers.utils import logging

    from ddpm_hf.diffusion import GaussianDiffusionPipeline
    from ddpm_hf.evaluation.recognition import recognition_report
    from ddpm_hf.evaluation.sampling import sample_images, sample_trajectory
    from ddpm_hf.report import SamplingSettings, loading_lines, write_report

    config, evaluation, output_dir = trainer.config, trainer.config.evaluation, trainer.folder.path
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    print(f"Sampling {evaluation.num_samples} images from {output_dir / 'pipeline'} ...", flush=True)
    pipeline = GaussianDiffusionPipeline.from_pretrained(output_dir / "pipeline").to(trainer.device)
    names = list(trainer.class_names.values()) if trainer.class_names else None
    labels = _labels_in_turn(evaluation.num_samples, len(names)) if names else None
    samples = sample_images(pipeline, evaluation, config.training.seed, labels)
    num_shown = min(evaluation.num_samples, 4 * len(names) if names and len(names) <= 10 else 16)
    trajectory = sample_trajectory(pipeline, evaluation, config.training.seed, num_shown, labels)
    recognition = None
    if evaluation.recognition and labels is not None:
        recognition = recognition_report(*_as_arrays(trainer.images), *_as_arrays(trainer.held_out), samples, labels)
    sampling = SamplingSettings(
        num_inference_steps=evaluation.num_inference_steps,
        eta=evaluation.eta,
        guidance_scale=evaluation.guidance_scale if evaluation.guidance_scale != 1 else None,
    )
    write_report(
        output_dir,
        samples=samples,
        sample_labels=labels,
        class_names=names,
        trajectory=trajectory,
        metrics=trainer.metrics.rows(),
        recognition=recognition,
        title=f"A DDPM trained on {Path(config.data.source).name}",
        command=command,
        settings=_main_settings(config),
        sampling=sampling,
    )
    if recognition is not None:
        print("\n".join(recognition.lines()))
        print(f"recognised={recognition.recognised:.3f}")
    print(f"\nEverything is in {output_dir}: look at samples.png, denoising.gif and README.md.")
    print(f"Load the trained pipeline with\n\n{loading_lines(output_dir / 'pipeline', names, sampling=sampling)}")


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
