"""`ddpm-hf distill`: distill a trained model into students that sample in few steps."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_hf.cli.common import download_folder, find_folder, is_repository_id, paused_garbage_collection
from ddpm_hf.cli.train import run
from ddpm_hf.config import ConfigError, RunConfig, read_config, read_config_dict
from ddpm_hf.config.parse import DistillCommand, parse_distill_command
from ddpm_hf.files import (
    MODEL_INDEX,
    RUN_CONFIG,
    SCHEDULER_CONFIG,
    TRAINING_CONFIG,
    UNET_CONFIG,
    format_count,
    read_json,
)
from ddpm_hf.signals import raise_on_signals

if TYPE_CHECKING:
    from ddpm_hf.model_folder import ModelFolder

Sections = dict[str, dict[str, Any]]

LEARNING_RATE = 0.5
"""Relative to the run of the teacher."""


def share_of_updates(steps: int) -> float:
    """Return the updates of a student relative to the run of its teacher: the last students learn the longest steps."""
    return 0.5 if steps <= 2 else 0.25


@raise_on_signals()
def distill(arguments: Sequence[str]) -> int:
    """Train one student after the other and return the exit code."""
    command = parse_distill_command(arguments)
    teacher = find_teacher(command)
    output = command.output or default_output(command.teacher, teacher)
    settings = teacher_settings(command, teacher)
    with paused_garbage_collection():
        from ddpm_hf.training.logging import say

    exit_code, trainer, source = 0, None, command.teacher
    for index, steps in enumerate(command.steps):
        folder = output.expanduser() / f"steps_{steps}"
        sections = student_settings(settings, steps, command.guidance_scale)
        sections["distillation"] |= {"teacher": source, "revision": None if index else command.revision}
        sections["model"] |= {"from_pretrained": source, "revision": None if index else command.revision}
        sections["training"]["output_dir"] = str(folder)
        exit_code, trainer = run(
            command.config(sections), f"ddpm-hf distill {shlex.join(arguments)}", is_dry_run=command.is_dry_run
        )
        if exit_code or command.is_dry_run:
            break
        if trainer.is_main_process:
            say(f"The student of {format_count(steps, 'step')} is in {folder}.")
        source = str(folder)
    assert trainer is not None
    trainer.shutdown()
    return exit_code


def find_teacher(command: DistillCommand) -> "ModelFolder":
    """Return the local folder of the teacher, or a local copy of the settings of a Hub repository.

    Raises:
        ConfigError: It holds no model.
    """
    found = find_folder(command.teacher, command.revision)
    if found is not None:
        return found

    from ddpm_hf.model_folder import ModelFolder

    return ModelFolder("pipeline", download_folder(command.teacher, command.revision))


def default_output(name: str, teacher: "ModelFolder") -> Path:
    """Return the folder of the students if --output is not given: beside the run or the pipeline of the teacher."""
    if is_repository_id(name):
        return Path(f"{name.rpartition('/')[2]}_distilled")
    folder = teacher.run or teacher.path
    return folder.with_name(f"{folder.resolve().name}_distilled")


def teacher_settings(command: DistillCommand, teacher: "ModelFolder") -> Sections:
    """Return the settings of the teacher's run, as far as they are known.

    The process, the prediction and the classes are those of its folder also if the settings of its run are unknown.
    """
    if command.teacher_config is not None:
        path = command.teacher_config.expanduser()
        if not path.is_file():
            raise ConfigError(f"--config {path} does not exist; give a YAML file.")
        known: Mapping[str, Mapping[str, Any]] = read_config(path).to_dict()
    else:
        path = teacher.path / (RUN_CONFIG if teacher.kind == "checkpoint" else TRAINING_CONFIG)
        known = read_config_dict(path) if path.is_file() else {}
    default = RunConfig().to_dict()
    settings = {
        section: values | {name: value for name, value in known.get(section, {}).items() if name in values}
        for section, values in default.items()
    }
    if not known:
        _take_process(settings, teacher)
    for section in ("data", "model"):
        if settings[section]["vae"] is not None:  # the VAE of the teacher, wherever that of its run was
            is_local = not is_repository_id(command.teacher)
            settings[section]["vae"] = str(teacher.run or teacher.path) if is_local else command.teacher
            settings["data"]["vae_revision"] = None if is_local else command.revision
    return settings


def _take_process(settings: Sections, teacher: "ModelFolder") -> None:
    """Take the forward process, the prediction and the classes from the files of a pipeline."""
    unet, index = read_json(teacher.path / UNET_CONFIG), read_json(teacher.path / MODEL_INDEX)
    path = next(
        (
            path
            for path in (teacher.path / "scheduler" / SCHEDULER_CONFIG, teacher.path / SCHEDULER_CONFIG)
            if path.is_file()
        ),
        None,
    )
    scheduler = {} if path is None else read_json(path)
    if scheduler.get("trained_betas") is not None:
        raise ConfigError(
            f"{teacher.path} has betas that no setting names (trained_betas); give the settings of its run with "
            "--config, or those of its schedule, for example --diffusion.beta_schedule sigmoid."
        )
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
    settings["diffusion"] |= {name: scheduler[name] for name in names if name in scheduler}
    settings["diffusion"]["rescale_betas_zero_snr"] = bool(scheduler.get("rescale_betas_zero_snr"))
    settings["model"]["class_conditional"] = unet.get("num_class_embeds") is not None
    settings["objective"]["class_dropout"] = 0.1 if index.get("has_null_label") else 0.0
    settings["data"]["value_range"] = index.get("value_range")
    if "vae" in index:
        settings["data"]["vae"] = str(teacher.path)
        settings["data"]["latent_normalization"] = "measured" if index.get("latents_mean") else "scaling_factor"


def student_settings(
    settings: Mapping[str, Mapping[str, Any]], steps: int, guidance_scale: float | None = None
) -> Sections:
    """Return the settings of a student, given those of its teacher's run.

    It has the data, the schedule and the classes of the teacher, and learns one step of DDIM with trailing timesteps.
    What changes the noise or the images of a run is left out, because the teacher is asked about states of its own
    process.

    Args:
        settings: Those of the run of the teacher, which may be a student itself.
        steps: Sampling steps of the student.
        guidance_scale: Classifier-free guidance scale of the teacher; None takes that of a student, or 1.
    """
    student = {section: dict(values) for section, values in settings.items()}
    default, training, distillation = RunConfig().to_dict(), student["training"], student["distillation"]
    share, factor = share_of_updates(steps), LEARNING_RATE
    if distillation["teacher"] is not None:
        share, factor = share / share_of_updates(distillation["num_inference_steps"]), 1.0
    if guidance_scale is None:
        guidance_scale = distillation["guidance_scale"]
    predicts_x_0 = settings["diffusion"]["prediction_type"] in ("sample", "x0")
    class_dropout = settings["objective"]["class_dropout"] if guidance_scale == 1 else 0.0
    sampling: dict[str, Any] = {"num_inference_steps": steps, "eta": 0.0}
    if not class_dropout:
        sampling |= {name: default["preview"][name] for name in ("guidance_scale", "guidance_interval")}
    student["diffusion"] |= {
        "prediction_type": "sample" if predicts_x_0 else "v_prediction",
        "variance_type": "fixed_small",
        "clip_sample": False,
        "timestep_spacing": "trailing",
    }
    student["data"] |= {name: default["data"][name] for name in ("augmentation", "augmentation_transforms")}
    # The error of v is that of x_0 with weight snr + 1. Section 4, Salimans & Ho 2022.
    student["objective"] = default["objective"] | {
        "class_dropout": class_dropout,
        "timestep_sampling": settings["objective"]["timestep_sampling"],
        "weighting": "truncated_snr" if predicts_x_0 else "none",
    }
    student["distillation"] |= {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    student["model"] |= {"preset": None, "config_file": None, "overrides": {"dropout": 0.0}}
    student["training"] |= {
        "num_steps": max(1, round(share * training["num_steps"])),
        "learning_rate": factor * training["learning_rate"],
        "learning_rate_warmup_steps": 0,
        "learning_rate_schedule": "linear",
        "ema_start_step": 0,
        "posthoc_ema": False,
        "posthoc_ema_every_steps": None,
        "resume": "auto",
    }
    student["preview"] |= sampling | {"scheduler": None}
    student["evaluation"] |= sampling
    if student["evaluation"]["score_metric"] == "bits_per_dim":
        student["evaluation"] |= {
            name: value for name, value in default["evaluation"].items() if name.startswith("score_")
        }
    student["tracking"]["run_name"] = None
    student["hub"] = dict(default["hub"])  # not into the repository of the teacher
    return student
