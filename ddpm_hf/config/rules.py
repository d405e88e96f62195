"""Checks of a configuration: valid values, valid combinations, and changes a run can be resumed with.

Contradictions raise `ConfigError`. A setting that has no effect beside another one is a warning.
"""

import dataclasses
import difflib
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from math import isfinite, nan
from pathlib import Path
from typing import Any, TypeAlias

from ddpm_hf.config.schema import (
    BETA_RANGES,
    DIFFUSION_ALIASES,
    EVAL_DATASET,
    NATIVE_SCHEDULER,
    SCHEDULERS,
    SCHEDULERS_WITH_ETA,
    TRAIN_DATASET,
    DataConfig,
    HubConfig,
    ModelConfig,
    RunConfig,
)
from ddpm_hf.files import format_value
from ddpm_hf.redaction import find_secret

logger = logging.getLogger(__name__)

Settings: TypeAlias = Mapping[str, Mapping[str, object]]
"""The type of `RunConfig.to_dict()`."""

_ADAM = ("adamw", "adam")
_SAMPLE_METRICS = ("fid", "kid", "inception_score", "frechet_distance", "kernel_distance", "precision", "recall")
# Minimum number of samples: one more than the 2048 Inception features; a hundred per split of the Inception Score.
_MIN_SAMPLES = {"fid": 2049, "inception_score": 1000}

_HUB = ("push_to_hub", "repo_id", "private", "checkpoint_branch")
_DISTILLATION = ("revision", "num_inference_steps", "guidance_scale")

# (setting, the setting that it depends on, the values of that one for which it is used; () stands for any true value).
# Settings of previews and the report are not listed: recipes may keep them when previews or the report are off.
_USED_ONLY_WITH: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("data.crop", "data.resolution", ()),
    ("data.resize_to", "data.resolution", ()),
    ("data.resize_filter", "data.resolution", ()),
    ("data.augmentation_transforms", "data.augmentation", ()),
    ("data.max_bad_fraction", "data.on_bad_image", ("skip",)),
    ("data.shuffle_buffer_size", "data.streaming", ()),
    ("data.vae_revision", "data.vae or model.vae", ()),
    ("data.latent_normalization", "data.vae", ()),
    ("model.revision", "model.from_pretrained or model.config_file", ()),
    ("model.initialization", "model.from_pretrained", (None,)),
    ("diffusion.beta_start", "diffusion.beta_schedule", BETA_RANGES[:-1]),
    ("diffusion.beta_end", "diffusion.beta_schedule", BETA_RANGES),
    ("diffusion.scale_betas_to_timesteps", "diffusion.beta_schedule", BETA_RANGES),
    ("objective.huber_delta", "objective.loss", ("huber",)),
    ("objective.vlb_weight", "objective.loss", ("hybrid",)),
    ("objective.min_snr_gamma", "objective.weighting", ("min_snr",)),
    ("objective.p2_gamma", "objective.weighting", ("p2",)),
    ("objective.p2_k", "objective.weighting", ("p2",)),
    *((f"training.{name}", "training.optimizer", _ADAM) for name in ("adam_beta1", "adam_beta2", "adam_epsilon")),
    ("training.weight_decay", "training.optimizer", _ADAM),
    *((f"distillation.{name}", "distillation.teacher", ()) for name in _DISTILLATION),
    ("training.prefetch_factor", "objective.timestep_sampling", ("uniform", "antithetic")),
    ("training.learning_rate_reference_steps", "training.learning_rate_schedule", ("inverse_sqrt",)),
    ("training.ema_inv_gamma", "training.ema_warmup", ("power",)),
    ("training.ema_power", "training.ema_warmup", ("power",)),
    ("training.posthoc_ema_every_steps", "training.posthoc_ema", ()),
    ("training.compile_mode", "training.compile", ()),
    ("training.compile_mode", "training.compile_backend", ("inductor",)),
    ("training.compile_backend", "training.compile", ()),
    ("evaluation.recognition", "evaluation.num_samples", ()),
    ("evaluation.score_metric", "evaluation.score_every_steps", ()),
    ("evaluation.score_features", "evaluation.score_every_steps", ()),
    ("evaluation.score_features", "evaluation.score_metric", _SAMPLE_METRICS),
    ("evaluation.score_num_samples", "evaluation.score_every_steps", ()),
    ("evaluation.score_num_terms", "evaluation.score_every_steps", ()),
    ("evaluation.score_num_terms", "evaluation.score_metric", ("bits_per_dim",)),
    ("tracking.project", "tracking.trackers", ()),
    ("tracking.run_name", "tracking.trackers", ()),
    *((f"hub.{name}", "hub.push_to_hub", ()) for name in HubConfig.__dataclass_fields__ if name not in _HUB),
    *((f"hub.{name}", "hub.push_to_hub or training.resume_from_hub", ()) for name in ("repo_id", "private")),
    ("hub.checkpoint_branch", "training.resume_from_hub", ()),
)


class ConfigError(ValueError):
    """A setting that cannot work. The message is one sentence that names the setting, its value and the fix."""


def log_warning(message: str) -> None:
    """Log a warning on rank 0; the other ranks have the same settings."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)


def validate(config: RunConfig, *, has_train_dataset: bool = False, has_eval_dataset: bool = False) -> None:
    """Refuse settings that contradict each other, and warn about settings without effect.

    Args:
        config: A configuration with values of the right types.
        has_train_dataset: Whether the training images are in memory instead of data.source.
        has_eval_dataset: Whether the validation images are in memory.

    Raises:
        ConfigError: A value is out of range, a required setting is missing, or settings contradict each other.
    """
    check(config, has_train_dataset=has_train_dataset, has_eval_dataset=has_eval_dataset)
    _warn_without_effect(config)


def check(config: RunConfig, *, has_train_dataset: bool = False, has_eval_dataset: bool = False) -> None:
    """Refuse settings as `validate` does, without warnings."""
    refuse_secrets(config)
    _check_ranges(config)
    _check_data(config.data, has_train_dataset, has_eval_dataset)
    has_validation_set = has_eval_dataset or _has_validation_set(config.data)
    _check_model(config.model)
    _check_latents(config)
    _check_objective(config)
    _check_distillation(config)
    _check_training(config, has_validation_set)
    _check_evaluation(config, has_validation_set)
    _check_sampling(config)
    hub, resumes_from_hub = config.hub, config.training.resume_from_hub
    if (hub.push_to_hub or resumes_from_hub) and not hub.repo_id:
        name = "hub.push_to_hub" if hub.push_to_hub else "training.resume_from_hub"
        raise ConfigError(f'{name} needs a repository; set hub.repo_id, for example to "user/name".')
    if resumes_from_hub and hub.checkpoint_branch in ("", "main", hub.branch):
        raise ConfigError(
            f"hub.checkpoint_branch is {format_value(hub.checkpoint_branch)}, but checkpoints replace all that a "
            "branch holds; set it to a branch of their own, such as checkpoints."
        )
    if not config.tracking.project:
        raise ConfigError("tracking.project is empty; set a project name.")


def refuse_secrets(config: RunConfig) -> None:
    """Refuse a configuration that contains a secret, since it is written to files, logs and trackers.

    Raises:
        ConfigError: Names the setting, not the secret.
    """
    for section, settings in config.to_dict().items():
        for name, value in settings.items():
            if (found := find_secret(str(value))) is not None:
                raise ConfigError(
                    f"{section}.{name} holds {found}, and settings are written to files and logs; remove it, and "
                    "log in with `hf auth login` or set HF_TOKEN."
                )


def _check_ranges(config: RunConfig) -> None:
    positive = (
        "diffusion.num_train_timesteps", "diffusion.schedule_shift", "training.num_steps", "training.train_batch_size",
        "training.micro_batch_size", "training.checkpoint_every_steps", "training.log_every_steps",
        "training.max_consecutive_nonfinite", "training.learning_rate", "training.max_grad_norm",
        "training.learning_rate_reference_steps",
        "training.adam_epsilon", "training.ema_inv_gamma", "training.ema_power", "training.ema_every_steps",
        "training.posthoc_ema_every_steps", "data.num_channels", "data.resolution", "data.crop_before_resize",
        "data.shuffle_buffer_size", "preview.num_images", "preview.num_inference_steps", "evaluation.batch_size",
        "evaluation.num_inference_steps", "evaluation.score_num_samples", "objective.huber_delta",
        "objective.vlb_weight", "objective.min_snr_gamma", "objective.p2_k", "distillation.num_inference_steps",
    )  # fmt: skip
    not_negative = (
        "training.learning_rate_warmup_steps", "training.prefetch_factor", "training.weight_decay", "training.seed",
        "training.validate_every_steps", "training.ema_start_step", "data.resize_to", "preview.every_steps",
        "preview.guidance_scale", "evaluation.num_samples", "evaluation.guidance_scale",
        "evaluation.score_every_steps", "objective.p2_gamma", "objective.offset_noise", "objective.input_perturbation",
        "hub.push_every_steps",
        "distillation.guidance_scale",
    )  # fmt: skip
    below_one = (
        "data.validation_fraction", "data.max_bad_fraction", "objective.class_dropout", "training.adam_beta1",
        "training.adam_beta2", "training.ema_decay",
    )  # fmt: skip
    at_most_one = ("data.augmentation", "preview.eta", "evaluation.eta", "objective.self_conditioning")
    num_timesteps = config.diffusion.num_train_timesteps
    settings = config.to_dict()

    def check(names: tuple[str, ...], is_valid: Callable[[float], bool], requirement: str) -> None:
        for name in names:
            value = _value_of(settings, name)
            if isinstance(value, int | float) and not is_valid(value):
                raise ConfigError(f"{name} is {value}, but must be {requirement}.")

    check(positive, lambda value: 0 < value < float("inf"), "greater than 0")
    check(not_negative, lambda value: 0 <= value < float("inf"), "0 or more")
    check(below_one, lambda value: 0 <= value < 1, "at least 0 and below 1")
    check(at_most_one, lambda value: 0 <= value <= 1, "between 0 and 1")
    check(
        ("preview.num_inference_steps", "evaluation.num_inference_steps"),
        lambda value: value <= num_timesteps,
        f"at most diffusion.num_train_timesteps, {num_timesteps}",
    )
    if config.training.num_checkpoints_kept < 2:
        raise ConfigError(
            f"training.num_checkpoints_kept is {config.training.num_checkpoints_kept}, but must be at least 2: the "
            "newest checkpoint may be damaged."
        )


def use_datasets(config: RunConfig, *, has_train_dataset: bool, has_eval_dataset: bool) -> RunConfig:
    """Return the configuration of a run on images in memory, which replace the settings of where images are.

    Raises:
        ConfigError: There are neither images nor data.source.
    """
    if not config.data.source and not has_train_dataset:
        raise ConfigError("data.source is not set; set it, or pass the images as train_dataset.")
    data, default = config.data, DataConfig()
    replaced: dict[str, Any] = {}
    if has_train_dataset:
        names = ("subset", "revision", "split", "validation_split", "layout", "streaming")
        replaced = {"source": TRAIN_DATASET} | {name: getattr(default, name) for name in names}
        if data.validation_split == EVAL_DATASET:
            del replaced["validation_split"]
    if has_eval_dataset:
        replaced |= {"validation_split": EVAL_DATASET, "validation_fraction": 0.0}
    unused = [
        f"data.{name} {format_value(value)}"
        for name, new in replaced.items()
        if (value := getattr(data, name)) not in (new, getattr(default, name))
    ]
    if unused:
        given = ["train_dataset"] * has_train_dataset + ["eval_dataset"] * has_eval_dataset
        log_warning(f"{' and '.join(given)} {'replaces' if len(given) == 1 else 'replace'} {', '.join(unused)}.")
    return dataclasses.replace(config, data=dataclasses.replace(data, **replaced))


def _check_data(data: DataConfig, has_train_dataset: bool, has_eval_dataset: bool) -> None:
    for name, argument, is_given in (
        (data.source, TRAIN_DATASET, has_train_dataset),
        (data.validation_split, EVAL_DATASET, has_eval_dataset),
    ):
        if name == argument and not is_given:
            raise ConfigError(
                f"the images of the run were in memory ({name}); pass them to Trainer as "
                f"{argument.removeprefix('memory:')}, or set data.source."
            )
    if not data.source and not has_train_dataset:
        raise ConfigError("data.source is not set; give an image folder, a parquet file or a Hub dataset id.")
    if data.validation_split is not None and data.validation_fraction > 0:
        raise ConfigError(
            f"data.validation_split {data.validation_split} and data.validation_fraction {data.validation_fraction:g} "
            "both define the validation set; set one of them."
        )
    if data.cache_dir == "":  # a path of no name is the working directory
        raise ConfigError("data.cache_dir is empty; give a folder, or set it to null.")
    resolution, box = data.resolution, data.crop_before_resize
    if isinstance(resolution, list) and (len(resolution) != 2 or min(resolution) < 1):
        raise ConfigError(f"data.resolution is {resolution}, but a list must be [height, width] in pixels.")
    if isinstance(box, list) and (len(box) != 4 or min(box) < 0 or box[0] >= box[2] or box[1] >= box[3]):
        raise ConfigError(f"data.crop_before_resize is {box}, but a list must be [left, top, right, bottom] in pixels.")
    shorter = min(resolution) if isinstance(resolution, list) else resolution
    if data.resize_to and shorter and data.resize_to < shorter:
        raise ConfigError(f"data.resize_to {data.resize_to} is less than data.resolution {shorter}; increase it.")
    if isinstance(data.value_range, list):
        low, high = (*data.value_range, nan, nan)[:2]
        if len(data.value_range) != 2 or not (isfinite(low) and isfinite(high) and low < high):
            raise ConfigError(
                f"data.value_range is {data.value_range}, but must be [low, high] with low < high, or auto."
            )
    if data.augmentation > 0 and not data.augmentation_transforms:
        raise ConfigError(
            f"data.augmentation_transforms is empty, but data.augmentation is {data.augmentation:g}; name transforms, "
            "or set data.augmentation to 0."
        )
    if not data.streaming:
        return
    if data.value_range == "auto":
        raise ConfigError(
            "data.value_range auto takes the range from all images, which data.streaming does not read in advance; set "
            "data.value_range to [low, high]."
        )
    has_channels = data.num_channels in (1, 3, 4) or (data.num_channels is not None and data.value_range is not None)
    if resolution is None or not has_channels:
        raise ConfigError(
            "data.streaming does not inspect the images before training; set data.resolution, and data.num_channels to "
            "1, 3 or 4."
        )
    if data.validation_fraction > 0:
        raise ConfigError(
            f"data.validation_fraction {data.validation_fraction:g} needs the number of images, which data.streaming "
            "does not know; set data.validation_split instead."
        )
    if data.device_resident is True:
        raise ConfigError("data.streaming and data.device_resident exclude each other; set one of them to false.")


def _check_model(model: ModelConfig) -> None:
    given = [name for name in ("config_file", "from_pretrained") if getattr(model, name) is not None]
    for name in given:
        if not getattr(model, name):
            raise ConfigError(f"model.{name} is empty; give a path, or set it to null.")
    if len(given) == 2:
        raise ConfigError("model.config_file and model.from_pretrained both define the network; set one of them.")
    if given and model.preset not in (None, ModelConfig().preset):
        raise ConfigError(
            f"model.preset {model.preset} and model.{given[0]} both define the network; set one of them to null."
        )
    if not given and model.preset is None:
        raise ConfigError("model.preset is null; set it, or model.config_file or model.from_pretrained.")


def _check_latents(config: RunConfig) -> None:
    """Refuse what does not fit latents, which are of no fixed range and are not transformed like pixels."""
    data, model = config.data, config.model
    for name, value in (("data.vae", data.vae), ("model.vae", model.vae)):
        if value == "":
            raise ConfigError(f"{name} is empty; give a folder or a Hub repository, or set it to null.")
    if data.vae is not None and model.vae is not None:
        raise ConfigError(
            "data.vae encodes images and also decodes samples, and model.vae decodes samples of data that are latents; "
            "set one of them to null."
        )
    if data.vae is not None:
        fixes = (
            ("data.streaming", data.streaming, "encodes every image once", "set it to false"),
            ("data.crop", data.crop == "random", "encodes every image once", "set it to center"),
            ("data.augmentation", data.augmentation > 0, "encodes every image once", "set it to 0"),
            ("diffusion.clip_sample", config.diffusion.clip_sample, "makes latents beyond [-1, 1]", "set it to false"),
        )
    elif model.vae is not None:
        if data.value_range is None:
            raise ConfigError(
                "model.vae decodes latents, whose range is not known; set data.value_range to [low, high], the values "
                "that become -1 and 1, or to auto."
            )
        evaluation = config.evaluation
        no_images = "leaves no images to compare samples with"
        scores = evaluation.score_every_steps > 0 and evaluation.score_metric != "bits_per_dim"
        recognizes = evaluation.recognition and evaluation.num_samples > 0
        fixes = (
            ("data.random_flip", data.random_flip, "needs latents of flipped images", "set it to false"),
            ("data.augmentation", data.augmentation > 0, "needs latents of augmented images", "set it to 0"),
            ("evaluation.score_every_steps", scores, no_images, "set it to 0"),
            ("evaluation.recognition", recognizes, no_images, "set it to false"),
        )
    else:
        return
    settings, vae = config.to_dict(), "model.vae" if data.vae is None else "data.vae"
    for name, is_given, reason, fix in fixes:
        if is_given:
            raise ConfigError(
                f"{name} {format_value(_value_of(settings, name))} cannot be used with {vae}, which {reason}; {fix}."
            )


def _check_objective(config: RunConfig) -> None:
    objective, diffusion = config.objective, config.diffusion
    loss, variance_type = objective.loss, diffusion.variance_type
    if diffusion.learns_variance and loss not in ("hybrid", "vlb"):
        raise ConfigError(
            f"diffusion.variance_type {variance_type} is learned, but objective.loss {loss} does not train a variance; "
            "set objective.loss to hybrid or vlb, or diffusion.variance_type to fixed_small or fixed_large."
        )
    if loss == "hybrid" and not diffusion.learns_variance:
        raise ConfigError(
            f"objective.loss hybrid trains a learned variance, but diffusion.variance_type is {variance_type}; set "
            "diffusion.variance_type to learned_range, or objective.loss to mse."
        )
    if loss == "vlb" and objective.weighting != "none":
        raise ConfigError(
            f"objective.weighting {objective.weighting} cannot be combined with objective.loss vlb, which would no "
            "longer be a bound; set objective.weighting to none, or objective.loss to mse or hybrid."
        )
    if objective.weighting == "truncated_snr" and diffusion.prediction_type == "epsilon":
        raise ConfigError(
            "objective.weighting truncated_snr is unbounded near pure noise with diffusion.prediction_type epsilon; "
            "set diffusion.prediction_type to v_prediction or sample, or objective.weighting to min_snr."
        )
    for name, value in (("offset_noise", objective.offset_noise), ("immiscible_noise", objective.immiscible_noise)):
        if value and loss in ("vlb", "hybrid"):
            raise ConfigError(
                f"objective.{name} {format_value(value)} changes the noise distribution that objective.loss {loss} "
                f"assumes; remove objective.{name}, or set objective.loss to mse."
            )
    if objective.input_perturbation and loss == "vlb":
        raise ConfigError(
            f"objective.input_perturbation {objective.input_perturbation:g} changes the input that objective.loss vlb "
            "assumes, which would no longer be a bound; remove it, or set objective.loss to mse or hybrid."
        )
    if objective.immiscible_noise and config.data.streaming:
        raise ConfigError(
            "objective.immiscible_noise assigns noise across the images of all processes, which data.streaming does "
            "not share; set one of them to false."
        )
    if objective.class_dropout > 0 and not config.model.class_conditional:
        raise ConfigError(
            f"objective.class_dropout {objective.class_dropout:g} needs labels; set model.class_conditional to true."
        )
    for section, scale in (
        ("preview", config.preview.guidance_scale),
        ("evaluation", config.evaluation.guidance_scale),
    ):
        if scale != 1 and objective.class_dropout == 0:
            raise ConfigError(
                f"{section}.guidance_scale {scale:g} needs a network that was also trained without labels; set "
                "objective.class_dropout, for example to 0.1."
            )


def _check_distillation(config: RunConfig) -> None:
    """Refuse what a student cannot learn, and a sampler that is not its own."""
    distillation, objective, diffusion = config.distillation, config.objective, config.diffusion
    if distillation.teacher is None:
        return
    if not distillation.teacher:
        raise ConfigError("distillation.teacher is empty; give a path, or set it to null.")
    num_steps = distillation.num_inference_steps
    if 2 * num_steps > diffusion.num_train_timesteps:
        raise ConfigError(
            f"distillation.num_inference_steps {num_steps} needs {2 * num_steps} steps of the teacher, but "
            f"diffusion.num_train_timesteps is {diffusion.num_train_timesteps}; lower it."
        )
    if diffusion.prediction_type == "epsilon":
        raise ConfigError(
            "diffusion.prediction_type epsilon cannot be distilled, because x_0 cannot be recovered from it near pure "
            "noise; set diffusion.prediction_type to v_prediction or sample, also if the teacher predicts epsilon."
        )
    # What a student learns is one step of DDIM with trailing timesteps, of the prediction alone.
    needed: dict[str, object] = {
        "data.augmentation": 0.0,  # the teacher predicts images as they are
        "diffusion.clip_sample": False,
        "diffusion.timestep_spacing": "trailing",
        "objective.self_conditioning": 0.0,
    }
    if config.preview.every_steps:
        needed |= {"preview.num_inference_steps": num_steps, "preview.eta": 0.0, "preview.scheduler": None}
    if config.evaluation.num_samples or config.evaluation.score_every_steps:
        needed |= {"evaluation.num_inference_steps": num_steps, "evaluation.eta": 0.0}
    settings = config.to_dict()
    for name, value in needed.items():
        if (given := _value_of(settings, name)) != value:
            raise ConfigError(
                f"{name} is {format_value(given)}, but a student of distillation.num_inference_steps {num_steps} needs "
                f"{format_value(value)}; set it to {format_value(value)}."
            )
    if diffusion.learns_variance or objective.loss in ("vlb", "hybrid"):
        name, value = ("diffusion.variance_type", diffusion.variance_type)
        if not diffusion.learns_variance:
            name, value = ("objective.loss", objective.loss)
        raise ConfigError(
            f"{name} {value} trains a variance, which sampling with DDIM does not use; set diffusion.variance_type to "
            "fixed_small and objective.loss to mse."
        )
    if distillation.guidance_scale != 1 and objective.class_dropout > 0:
        raise ConfigError(
            f"distillation.guidance_scale {distillation.guidance_scale:g} makes a student that cannot be guided again; "
            "set objective.class_dropout to 0."
        )
    if distillation.guidance_scale != 1 and not config.model.class_conditional:
        raise ConfigError(
            f"distillation.guidance_scale {distillation.guidance_scale:g} needs labels; set model.class_conditional to "
            "true."
        )
    if config.evaluation.score_every_steps and config.evaluation.score_metric == "bits_per_dim":
        raise ConfigError(
            "evaluation.score_metric bits_per_dim does not apply to a student, which is no model of all timesteps; set "
            "evaluation.score_metric to kid, or evaluation.score_every_steps to 0."
        )


def _check_training(config: RunConfig, has_validation_set: bool) -> None:
    training = config.training
    if not training.output_dir:
        raise ConfigError("training.output_dir is not set; give a new folder for this run.")
    is_path = "." in training.optimizer and all(part.isidentifier() for part in training.optimizer.split("."))
    if training.optimizer not in _ADAM and not is_path:
        raise ConfigError(
            f"training.optimizer {training.optimizer} is unknown; use adamw, adam or an import path such as "
            "torch.optim.SGD."
        )
    if training.validate_every_steps > 0 and not has_validation_set:
        fix = (
            "set data.validation_split"
            if config.data.streaming
            else "set data.validation_fraction, for example to 0.05"
        )
        if config.data.source == TRAIN_DATASET:
            fix = f"pass eval_dataset, or {fix}"
        raise ConfigError(
            f"training.validate_every_steps {training.validate_every_steps} needs a validation set; {fix}."
        )
    if training.cudnn_benchmark is True and training.deterministic:
        raise ConfigError(
            "training.cudnn_benchmark true lets time decide which kernel runs, but training.deterministic is true; set "
            "one of them to false."
        )
    if training.learning_rate_schedule == "inverse_sqrt":
        warmup, reference = training.learning_rate_warmup_steps, training.learning_rate_reference_steps
        if not (warmup or reference):
            raise ConfigError(
                "training.learning_rate_schedule inverse_sqrt needs the steps after which it decreases; set "
                "training.learning_rate_reference_steps, or training.learning_rate_warmup_steps above 0."
            )
        if reference is not None and reference < warmup:
            raise ConfigError(
                f"training.learning_rate_reference_steps {reference} is less than training.learning_rate_warmup_steps "
                f"{warmup}; increase it, or shorten the warmup."
            )
    micro, batch = training.micro_batch_size, training.train_batch_size
    if isinstance(micro, int) and batch % micro:
        lower = batch // micro * micro
        raise ConfigError(
            f"training.train_batch_size {batch} is not a multiple of training.micro_batch_size {micro}; "
            f"use {f'{lower} or ' if lower else ''}{lower + micro}."
        )


def _check_evaluation(config: RunConfig, has_validation_set: bool) -> None:
    evaluation, data = config.evaluation, config.data
    if evaluation.recognition and evaluation.num_samples:
        if not (config.model.class_conditional and has_validation_set and not data.streaming):
            raise ConfigError(
                "evaluation.recognition needs classes and a validation set; set model.class_conditional to true, "
                "data.validation_fraction above 0 or data.validation_split, and data.streaming to false."
            )
    if evaluation.score_every_steps == 0:
        return
    metric, num_timesteps = evaluation.score_metric, config.diffusion.num_train_timesteps
    if metric == "bits_per_dim":
        if not has_validation_set:
            raise ConfigError(
                "evaluation.score_metric bits_per_dim needs a validation set; set data.validation_fraction, for "
                "example to 0.05, or data.validation_split."
            )
        if data.value_range is not None:
            raise ConfigError(
                f"evaluation.score_metric bits_per_dim is that of 8-bit images, but data.value_range is "
                f"{data.value_range}; set evaluation.score_metric to kernel_distance."
            )
        if not 2 <= evaluation.score_num_terms <= num_timesteps:
            raise ConfigError(
                f"evaluation.score_num_terms is {evaluation.score_num_terms}, but must be between 2 and "
                f"diffusion.num_train_timesteps, {num_timesteps}."
            )
    elif data.streaming:
        raise ConfigError(
            f"evaluation.score_metric {metric} compares with all training images, which data.streaming does not keep; "
            "set evaluation.score_metric to bits_per_dim, or data.streaming to false."
        )
    if evaluation.score_num_samples < (minimum := _MIN_SAMPLES.get(metric, 1)):
        raise ConfigError(
            f"evaluation.score_num_samples is {evaluation.score_num_samples}, but evaluation.score_metric {metric} "
            f"needs at least {minimum}; increase it, or set evaluation.score_metric to kid."
        )


def scheduler_and_eta(setting: str, name: str, eta: float | None) -> tuple[str, float | None]:
    """Return the class and eta that the name of a scheduler stands for; imports neither torch nor diffusers.

    Args:
        setting: What the name is called in messages, such as "--scheduler".
        name: A short name, or that of a class.
        eta: The given eta; None if there is none.

    Raises:
        ConfigError: There is no such scheduler, or it has another eta than the given one.
    """
    if (short := name.lower()) in SCHEDULERS:
        if short == "ddpm" and eta not in (None, 1):
            raise ConfigError(f"{setting} ddpm samples with eta 1, but eta is {eta:g}; remove one of them.")
        return SCHEDULERS[short], {"ddim": 0.0, "ddpm": 1.0}.get(short) if eta is None else eta
    classes = _scheduler_classes()
    if name not in classes:
        stems = {known.lower().removesuffix("scheduler"): known for known in (*classes, *SCHEDULERS)}
        close = difflib.get_close_matches(short.removesuffix("scheduler"), stems, n=1, cutoff=0.7)
        hint = f" (did you mean {stems[close[0]]!r}?)" if close else ""
        raise ConfigError(
            f"{setting} is {name}, which is no scheduler{hint}; give one of {', '.join(SCHEDULERS)}, or the name of a "
            "class of diffusers."
        )
    return name, eta


@functools.cache
def _scheduler_classes() -> tuple[str, ...]:
    """Return the names of all schedulers of the installed diffusers, read from its list of lazy imports."""
    spec = find_spec("diffusers")
    text = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    return (NATIVE_SCHEDULER, *sorted(set(re.findall(r'"(\w+Scheduler)"', text))))


def check_interval(setting: str, interval: Sequence[float]) -> None:
    """Raise ConfigError if a guidance interval is not two ascending fractions."""
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        given = ",".join(f"{value:g}" for value in interval)
        raise ConfigError(f"{setting} is {given}, but must be start,stop with 0 <= start < stop <= 1.")


def _check_sampling(config: RunConfig) -> None:
    for section in (config.preview, config.evaluation):
        name = "preview" if section is config.preview else "evaluation"
        check_interval(f"{name}.guidance_interval", section.guidance_interval)
    preview = config.preview
    if preview.scheduler is not None:
        found, eta = scheduler_and_eta("preview.scheduler", preview.scheduler, preview.eta)
        if eta is not None and found not in SCHEDULERS_WITH_ETA:
            raise ConfigError(
                f"preview.eta is {eta:g}, but preview.scheduler {preview.scheduler} has no eta; set one to null."
            )


def _has_validation_set(data: DataConfig) -> bool:
    return data.validation_fraction > 0 or data.validation_split is not None


def _warn_without_effect(config: RunConfig) -> None:
    """Log one warning for each setting that leaves others, which differ from their defaults, without effect."""
    settings, default = config.to_dict(), RunConfig().to_dict()
    if config.data.augmentation > 0 and config.data.random_flip and "xflip" in config.data.augmentation_transforms:
        log_warning(
            "data.augmentation_transforms xflip has no effect with data.random_flip true, which mirrors images without "
            "conditioning the network; set data.random_flip to false, unless samples may be mirrored."
        )
    unused: dict[str, dict[str, tuple[object, ...]]] = {}
    for name, choice, values in _unused_rows(settings):
        is_listed = any(name in names for names in unused.values())
        if not is_listed and _value_of(settings, name) != _value_of(default, name):
            unused.setdefault(choice, {})[name] = values
    for choice, names in unused.items():
        listed = ", ".join(f"{name} {format_value(_value_of(settings, name))}" for name in names)
        chosen = [_value_of(settings, one) for one in choice.split(" or ")]
        needed = [*dict.fromkeys(format_value(value) for values in names.values() for value in values)]
        value = "true" if chosen[0] is False else join_or(needed)
        log_warning(
            f"{listed} {'has' if len(names) == 1 else 'have'} no effect with {choice} {format_value(chosen[0])}; "
            f"set {choice}{f' to {value}' if value else ''} to use {'it' if len(names) == 1 else 'them'}."
        )


def join_or(words: list[str]) -> str:
    """Return "a, b or c"."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _unused_rows(settings: Settings) -> Iterator[tuple[str, str, tuple[object, ...]]]:
    for name, choice, values in _USED_ONLY_WITH:
        chosen = [_value_of(settings, one) for one in choice.split(" or ")]
        if not any(value in values if values else value for value in chosen):
            yield name, choice, values


def _value_of(settings: Settings, name: str) -> object:
    section, setting = name.split(".")
    return settings[section][setting]


# A checkpoint's tensors, data order or noise depend on these settings: a run cannot be resumed with other values.
_FIXED_SECTIONS = ("data", "model", "diffusion", "objective", "distillation")
_FIXED_TRAINING = ("seed", "train_batch_size", "optimizer", "optimizer_kwargs", "posthoc_ema")
_FREE = ("data.cache_dir", "data.device_resident", "model.gradient_checkpointing")
# Other settings of training change the weights, so a finished run cannot be resumed with another value of them.
_WITHOUT_EFFECT_ON_WEIGHTS = (
    "output_dir", "num_steps", "checkpoint_every_steps", "num_checkpoints_kept", "async_checkpoint", "log_every_steps",
    "validate_every_steps", "prefetch_factor", "resume", "cpu", "compile", "compile_mode", "compile_backend",
    "channels_last", "cudnn_benchmark", "resume_from_hub",
)  # fmt: skip


def changed_settings(old: Settings, new: RunConfig) -> tuple[list[str], list[str]]:
    """Compare the configuration of a checkpoint with a new one.

    Aliases are equal to the name that they stand for, a missing setting to its default, and settings without effect in
    both configurations may differ.

    Args:
        old: Sections of settings, as `read_config_dict` returns them.
        new: The new configuration.

    Returns:
        One line for each change that prevents resuming, and one for each change that does not.
    """
    fixed: list[str] = []
    free: list[str] = []
    was = {section: settings | dict(old.get(section, {})) for section, settings in RunConfig().to_dict().items()}
    for name, aliases in DIFFUSION_ALIASES.items():
        was["diffusion"][name] = aliases.get(str(was["diffusion"][name]), was["diffusion"][name])
    now = new.to_dict()
    unused = {name for name, _, _ in _unused_rows(was)} & {name for name, _, _ in _unused_rows(now)}
    for section, settings in now.items():
        for setting, value in settings.items():
            name, before = f"{section}.{setting}", was[section][setting]
            if before == value or name == "training.output_dir":
                continue
            is_fixed = section in _FIXED_SECTIONS or (section == "training" and setting in _FIXED_TRAINING)
            is_fixed &= name not in _FREE and name not in unused
            # Whether the images and labels are the same is known from their digest, which a stream lacks.
            is_fixed &= name != "data.layout" or new.data.streaming
            (fixed if is_fixed else free).append(f"{name} was {before!r}, is {value!r}")
    return fixed, free


def changed_too_late(free: list[str]) -> list[str]:
    """Return those changes of `changed_settings` that a finished run can no longer apply to its weights."""
    harmless = {f"training.{name}" for name in _WITHOUT_EFFECT_ON_WEIGHTS}
    return [line for line in free if line.startswith("training.") and line.split()[0] not in harmless]
