"""Which settings are valid, which work together, and with which a run can continue.

Which settings are read only beside another one: without it they would do nothing, in silence.

Which settings can work together, and which a run can be continued with.
"""

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from ddpm_hf.config.schema import DataConfig, HubConfig, ModelConfig, RunConfig, TrainingConfig
from ddpm_hf.redaction import find_secret

Settings: TypeAlias = Mapping[str, Mapping[str, object]]
"""What `RunConfig.to_dict` returns."""

_RANGES = ("linear", "scaled_linear", "quad", "sigmoid", "warmup10", "warmup50")
_SCORES_OF_SAMPLES = ("fid", "kid", "inception_score", "frechet_distance", "kernel_distance", "precision", "recall")
_ANY = ()
"""Anything that switches it on."""

# A setting, the one that decides whether it is read, and the values with which it is. How previews and the samples of
# the report are drawn is not among them: a recipe whose previews or report are switched off need not be rewritten.
_READ_ONLY_WITH: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("data.resize_filter", "data.resolution", _ANY),
    ("data.max_bad_fraction", "data.on_bad_image", ("skip",)),
    ("data.shuffle_buffer_size", "data.streaming", (True,)),
    ("diffusion.beta_start", "diffusion.beta_schedule", _RANGES),
    ("diffusion.beta_end", "diffusion.beta_schedule", (*_RANGES, "const")),
    ("diffusion.scale_betas_to_timesteps", "diffusion.beta_schedule", (*_RANGES, "const")),
    ("objective.huber_delta", "objective.loss", ("huber",)),
    ("objective.vlb_weight", "objective.loss", ("hybrid",)),
    ("objective.min_snr_gamma", "objective.weighting", ("min_snr",)),
    ("objective.p2_gamma", "objective.weighting", ("p2",)),
    ("objective.p2_k", "objective.weighting", ("p2",)),
    ("training.ema_inv_gamma", "training.ema_warmup", ("power",)),
    ("training.ema_power", "training.ema_warmup", ("power",)),
    ("training.posthoc_ema_every_steps", "training.posthoc_ema", (True,)),
    ("evaluation.recognition", "evaluation.num_samples", _ANY),
    ("evaluation.score_metric", "evaluation.score_every_steps", _ANY),
    ("evaluation.score_features", "evaluation.score_every_steps", _ANY),
    ("evaluation.score_features", "evaluation.score_metric", _SCORES_OF_SAMPLES),
    ("evaluation.score_num_samples", "evaluation.score_every_steps", _ANY),
    ("evaluation.score_num_terms", "evaluation.score_every_steps", _ANY),
    ("evaluation.score_num_terms", "evaluation.score_metric", ("bits_per_dim",)),
    ("tracking.project", "tracking.trackers", _ANY),
    ("tracking.run_name", "tracking.trackers", _ANY),
    *((f"hub.{name}", "hub.push_to_hub", (True,)) for name in HubConfig.__dataclass_fields__ if name != "push_to_hub"),
)


def find_without_effect(config: RunConfig) -> str | None:
    """Returns a sentence about the first setting that differs from its default and that nothing would read."""
    settings, default = config.to_dict(), RunConfig().to_dict()
    for name, choice, values in _unread(settings):
        value, chosen = _value_of(settings, name), _value_of(settings, choice)
        if value != _value_of(default, name):
            needed = f" to {' or '.join(_shown(value) for value in values)}" if values else ""
            return (
                f"{name} {_shown(value)} has no effect with {choice} {_shown(chosen)}; leave it out, or set "
                f"{choice}{needed}."
            )
    return None


def names_without_effect(settings: Settings) -> set[str]:
    """Returns the full names of the settings that nothing reads, whatever their values."""
    return {name for name, _, _ in _unread(settings)}


def _unread(settings: Settings) -> Iterator[tuple[str, str, tuple[object, ...]]]:
    """Yields the rows of the table whose setting is not read."""
    for name, choice, values in _READ_ONLY_WITH:
        chosen = _value_of(settings, choice)
        if not (chosen in values if values else chosen):
            yield name, choice, values


def _value_of(settings: Settings, name: str) -> object:
    """Returns a setting by its full name."""
    section, setting = name.split(".")
    return settings[section][setting]


def _shown(value: object) -> str:
    """Writes a value as it is given on a command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


class ConfigError(ValueError):
    """A setting that cannot work; the message is one sentence that says what to do."""


def validate(config: RunConfig) -> None:
    """Refuses settings that cannot work, before any of them costs time.

    Raises:
        ConfigError: With one sentence that names the setting, its value and what to do.
    """
    refuse_secrets(config)
    _check_numbers(config)
    data, model, training, evaluation = config.data, config.model, config.training, config.evaluation
    if not data.source:
        raise ConfigError("data.source is not set; give a parquet file, an image folder or a data set id of the Hub.")
    if not training.output_dir:
        raise ConfigError("training.output_dir is not set; give a new folder for this run.")
    if config.objective.class_dropout > 0 and not model.class_conditional:
        raise ConfigError("objective.class_dropout needs labels to drop; set model.class_conditional to true.")
    for name, guidance_scale in (("preview", config.preview.guidance_scale), ("evaluation", evaluation.guidance_scale)):
        if guidance_scale != 1.0 and config.objective.class_dropout == 0:
            raise ConfigError(
                f"{name}.guidance_scale {guidance_scale:g} needs a network that was trained without labels too; set "
                "objective.class_dropout, for example to 0.1."
            )
    _check_data(data)
    holds_out = data.validation_fraction > 0 or data.validation_split is not None
    if evaluation.recognition and not (model.class_conditional and holds_out and not data.streaming):
        raise ConfigError(
            "evaluation.recognition asks for classes and real held-out images; set model.class_conditional to true, "
            "data.validation_fraction above 0 or data.validation_split, and data.streaming to false."
        )
    _check_score(config, holds_out=holds_out)
    if not config.tracking.project:
        raise ConfigError("tracking.project is empty; give the project a name.")
    if training.validate_every_steps > 0 and not holds_out:
        which = "data.validation_split" if data.streaming else "data.validation_fraction, for example to 0.05"
        raise ConfigError(
            f"training.validate_every_steps {training.validate_every_steps} needs held-out images; set {which}."
        )
    if config.objective.immiscible_noise and data.streaming:
        raise ConfigError(
            "objective.immiscible_noise exchanges noise among images that other processes train on too, which "
            "data.streaming gives to one process alone; set one of them to false."
        )
    if config.diffusion.rescale_betas_zero_snr and config.diffusion.prediction_type in ("epsilon", "eps"):
        raise ConfigError(
            "diffusion.rescale_betas_zero_snr leaves no signal at the last timestep, where epsilon says nothing about "
            "x_0; set diffusion.prediction_type to v_prediction or sample."
        )
    _check_hub(config.hub)
    _check_objective(config)
    _check_network(model)
    _check_optimizer(training)
    micro, batch = training.micro_batch_size, training.train_batch_size
    if isinstance(micro, int) and batch % micro:
        lower = batch // micro * micro
        raise ConfigError(
            f"training.train_batch_size {batch} is not a multiple of training.micro_batch_size {micro}; "
            f"use {f'{lower} or ' if lower else ''}{lower + micro}."
        )
    if (sentence := find_without_effect(config)) is not None:
        raise ConfigError(sentence)


# One more than Inception has features, whose covariance FID takes; a hundred in each split of the Inception Score.
_LEAST_SAMPLES = {"fid": 2049, "inception_score": 1000}


def _check_score(config: RunConfig, *, holds_out: bool) -> None:
    """Refuses a score that has nothing to compare with."""
    evaluation = config.evaluation
    is_bound = evaluation.score_metric == "bits_per_dim"
    if evaluation.score_every_steps == 0:
        return
    if is_bound and not holds_out:
        raise ConfigError(
            "evaluation.score_metric bits_per_dim needs held-out images; set data.validation_fraction, for example to "
            "0.05, or data.validation_split."
        )
    if is_bound and not 2 <= evaluation.score_num_terms <= config.diffusion.num_train_timesteps:
        raise ConfigError(
            f"evaluation.score_num_terms is {evaluation.score_num_terms}, but must be between 2 and "
            f"diffusion.num_train_timesteps, {config.diffusion.num_train_timesteps}."
        )
    least = _LEAST_SAMPLES.get(evaluation.score_metric, 1)
    if evaluation.score_num_samples < least:
        raise ConfigError(
            f"evaluation.score_num_samples is {evaluation.score_num_samples}, and evaluation.score_metric "
            f"{evaluation.score_metric} needs at least {least}; set that, or evaluation.score_metric to kid."
        )
    if not is_bound and config.data.streaming:
        raise ConfigError(
            f"evaluation.score_metric {evaluation.score_metric} compares with all training images, and data.streaming "
            "keeps none; set evaluation.score_metric to bits_per_dim, or data.streaming to false."
        )


def _check_hub(hub: HubConfig) -> None:
    """Refuses a push to nowhere."""
    if hub.push_to_hub and not hub.repo_id:
        raise ConfigError('hub.push_to_hub needs to know where; set hub.repo_id, for example to "user/name".')


def refuse_secrets(config: RunConfig) -> None:
    """Refuses a configuration with a secret in it, since it goes into files, logs and trackers; the secret is not told.

    Raises:
        ConfigError: With one sentence that names the setting.
    """
    for section, settings in config.to_dict().items():
        for name, value in settings.items():
            if (found := find_secret(str(value))) is not None:
                raise ConfigError(
                    f"{section}.{name} holds {found}, and settings are written to many places; leave it out, and log "
                    "in with `hf auth login` or set HF_TOKEN."
                )


def _check_data(data: DataConfig) -> None:
    """Refuses settings of the data that contradict each other."""
    if data.validation_split is not None and data.validation_fraction > 0:
        raise ConfigError(
            f"data.validation_split {data.validation_split} and data.validation_fraction {data.validation_fraction:g} "
            "both hold out images; give one of them."
        )
    for name, number, lowest in (
        ("resolution", data.resolution, 1), ("crop_before_resize", data.crop_before_resize, 1),
        ("resize_to", data.resize_to, 0), ("shuffle_buffer_size", data.shuffle_buffer_size, 1),
    ):  # fmt: skip
        if isinstance(number, int) and number < lowest:
            raise ConfigError(f"data.{name} is {number}, but must be {'greater than 0' if lowest else '0 or more'}.")
    if not 0 <= data.max_bad_fraction < 1:
        raise ConfigError(f"data.max_bad_fraction is {data.max_bad_fraction}, but must be at least 0 and below 1.")
    if isinstance(data.resolution, list) and (len(data.resolution) != 2 or min(data.resolution) < 1):
        raise ConfigError(f"data.resolution is {data.resolution}, but a list must be [height, width] in pixels.")
    box = data.crop_before_resize
    if isinstance(box, list) and (len(box) != 4 or min(box) < 0 or box[0] >= box[2] or box[1] >= box[3]):
        raise ConfigError(f"data.crop_before_resize is {box}, but a list must be [left, top, right, bottom] in pixels.")
    for name, value, default in (("resize_to", data.resize_to, None), ("crop", data.crop, "center")):
        if value != default and data.resolution is None:
            raise ConfigError(f"data.{name} {value} needs the size to cut out; set data.resolution.")
    shorter = min(data.resolution) if isinstance(data.resolution, list) else data.resolution
    if data.resize_to and shorter and data.resize_to < shorter:
        raise ConfigError(f"data.resize_to {data.resize_to} is less than data.resolution {shorter}; set at least that.")
    if data.streaming and (data.resolution is None or data.num_channels not in (1, 3, 4)):
        raise ConfigError(
            "data.streaming cannot look at all images first; set data.resolution, and data.num_channels to 1, 3 or 4."
        )
    if data.streaming and data.validation_fraction > 0:
        raise ConfigError("data.streaming knows no number of images to hold out a fraction of; set validation_split.")
    if data.streaming and data.device_resident is True:
        raise ConfigError("data.streaming and data.device_resident exclude each other; set one of them to false.")


def _check_objective(config: RunConfig) -> None:
    """Refuses a loss that cannot train what it is asked to."""
    objective, diffusion = config.objective, config.diffusion
    loss, variance_type = objective.loss, diffusion.variance_type
    if diffusion.learns_variance and loss not in ("hybrid", "vlb"):
        raise ConfigError(
            f"diffusion.variance_type {variance_type} needs a loss that trains a variance, and objective.loss {loss} "
            "does not; set objective.loss to hybrid or vlb, or diffusion.variance_type to fixed_small or fixed_large."
        )
    if loss == "hybrid" and not diffusion.learns_variance:
        raise ConfigError(
            f"objective.loss hybrid is mse plus the bound of a learned variance, and diffusion.variance_type is "
            f"{variance_type}; set diffusion.variance_type to learned_range, or objective.loss to mse."
        )
    if loss == "vlb" and objective.weighting != "none":
        raise ConfigError(
            f"objective.weighting {objective.weighting} would make objective.loss vlb a bound no more; set "
            "objective.weighting to none, or objective.loss to mse or hybrid."
        )
    if objective.weighting == "truncated_snr" and diffusion.prediction_type in ("epsilon", "eps"):
        raise ConfigError(
            f"objective.weighting truncated_snr grows beyond all bounds towards pure noise with "
            f"diffusion.prediction_type {diffusion.prediction_type}; set diffusion.prediction_type to v_prediction or "
            "sample, or objective.weighting to min_snr."
        )
    for name, value in (("offset_noise", objective.offset_noise), ("immiscible_noise", objective.immiscible_noise)):
        if value and loss in ("vlb", "hybrid"):
            raise ConfigError(
                f"objective.{name} {str(value).lower()} draws other noise than the bound in objective.loss {loss} is "
                f"made for; leave objective.{name} out, or set objective.loss to mse."
            )


def _check_network(model: ModelConfig) -> None:
    """Refuses two answers to the question where the network comes from."""
    sources = {"model.config_file": model.config_file, "model.from_pretrained": model.from_pretrained}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) == 2:
        raise ConfigError("model.config_file and model.from_pretrained both name a network; set one of them to null.")
    if given and model.preset not in (None, ModelConfig().preset):
        raise ConfigError(f"model.preset {model.preset} and {given[0]} both name a network; set one of them to null.")
    if not given and model.preset is None:
        raise ConfigError("model.preset is null; name a preset, or give model.config_file or model.from_pretrained.")
    if model.revision is not None and not given:
        raise ConfigError(
            f"model.revision {model.revision} needs a repository; set model.from_pretrained or model.config_file."
        )
    if model.from_pretrained is not None and model.initialization != ModelConfig().initialization:
        raise ConfigError(
            f"model.initialization {model.initialization} does not apply to a network from model.from_pretrained; "
            "leave it out."
        )


def _check_optimizer(training: TrainingConfig) -> None:
    """Refuses settings of an optimiser that would do nothing."""
    optimizer, default = training.optimizer, TrainingConfig()
    if optimizer not in ("adamw", "adam"):
        if not all(part.isidentifier() for part in optimizer.split(".")) or "." not in optimizer:
            raise ConfigError(
                f"training.optimizer {optimizer} is unknown; use adamw, adam or an import path such as torch.optim.SGD."
            )
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"):
            if getattr(training, name) != getattr(default, name):
                raise ConfigError(
                    f"training.{name} applies to adamw and adam only; tell {optimizer} by training.optimizer_kwargs."
                )


def _check_numbers(config: RunConfig) -> None:
    """Refuses numbers outside their range."""
    positive = (
        ("diffusion", "num_train_timesteps"), ("training", "num_steps"), ("training", "train_batch_size"),
        ("training", "micro_batch_size"), ("training", "checkpoint_every_steps"), ("training", "log_every_steps"),
        ("training", "max_consecutive_nonfinite"), ("training", "learning_rate"), ("training", "max_grad_norm"),
        ("training", "adam_epsilon"), ("training", "ema_inv_gamma"), ("training", "ema_power"),
        ("training", "ema_every_steps"), ("training", "posthoc_ema_every_steps"),
        ("data", "num_channels"), ("preview", "num_images"),
        ("preview", "num_inference_steps"), ("evaluation", "batch_size"), ("evaluation", "num_inference_steps"),
        ("evaluation", "score_num_samples"), ("objective", "huber_delta"), ("objective", "vlb_weight"),
        ("objective", "min_snr_gamma"), ("objective", "p2_k"),
    )  # fmt: skip
    not_negative = (
        ("training", "learning_rate_warmup_steps"), ("training", "weight_decay"), ("training", "seed"),
        ("training", "validate_every_steps"), ("preview", "every_steps"), ("preview", "guidance_scale"),
        ("evaluation", "num_samples"), ("evaluation", "guidance_scale"), ("evaluation", "score_every_steps"),
        ("objective", "p2_gamma"), ("objective", "offset_noise"), ("hub", "push_every_steps"),
        ("training", "ema_start_step"),
    )  # fmt: skip
    below_one = (
        ("data", "validation_fraction"), ("objective", "class_dropout"), ("training", "adam_beta1"),
        ("training", "adam_beta2"), ("training", "ema_decay"),
    )  # fmt: skip
    at_most_one = (("preview", "eta"), ("evaluation", "eta"), ("objective", "self_conditioning"))
    limit = config.diffusion.num_train_timesteps

    def check(names: tuple[tuple[str, str], ...], accepts: object, requirement: str) -> None:
        for section, name in names:
            value = getattr(getattr(config, section), name)
            if isinstance(value, int | float) and not accepts(value):  # type: ignore[operator]
                raise ConfigError(f"{section}.{name} is {value}, but must be {requirement}.")

    check(positive, lambda value: 0 < value < float("inf"), "greater than 0")
    check(not_negative, lambda value: 0 <= value < float("inf"), "0 or more")
    check(below_one, lambda value: 0 <= value < 1, "at least 0 and below 1")
    check(at_most_one, lambda value: 0 <= value <= 1, "between 0 and 1")
    steps = (("preview", "num_inference_steps"), ("evaluation", "num_inference_steps"))
    check(steps, lambda value: value <= limit, f"at most diffusion.num_train_timesteps, {limit}")
    kept = config.training.num_checkpoints_kept
    if kept < 2:
        raise ConfigError(
            f"training.num_checkpoints_kept is {kept}, but must be at least 2: the newest may be damaged when it is "
            "needed."
        )


# Settings that a checkpoint's tensors, data order or noise depend on: a run cannot be continued with others.
_FIXED_SECTIONS = ("data", "model", "diffusion", "objective")
_FIXED_TRAINING = ("seed", "train_batch_size", "optimizer", "optimizer_kwargs", "posthoc_ema")
_FREE = (("data", "cache_dir"), ("data", "device_resident"), ("model", "gradient_checkpointing"))
# The others of training shape the weights, so a run that has nothing left to train can no longer follow them.
_WITHOUT_EFFECT_ON_WEIGHTS = (
    "output_dir", "num_steps", "checkpoint_every_steps", "num_checkpoints_kept", "log_every_steps",
    "validate_every_steps", "resume", "cpu",
)  # fmt: skip


def changed_settings(old: dict[str, dict[str, object]], new: RunConfig) -> tuple[list[str], list[str]]:
    """Compares the configuration of a checkpoint with the one asked for; what nothing read or reads is free.

    Returns:
        One line for each change that a run cannot be continued with, and one for each that it can.
    """
    fixed: list[str] = []
    free: list[str] = []
    # What a checkpoint does not know of yet was as it still is by default.
    was = {section: settings | old.get(section, {}) for section, settings in RunConfig().to_dict().items()}
    unread = names_without_effect(was) & names_without_effect(new.to_dict())
    for section, settings in new.to_dict().items():
        for name, value in settings.items():
            before = was[section][name]
            if before == value or (section, name) == ("training", "output_dir"):
                continue
            is_fixed = section in _FIXED_SECTIONS and (section, name) not in _FREE
            is_fixed |= section == "training" and name in _FIXED_TRAINING
            is_fixed &= f"{section}.{name}" not in unread
            (fixed if is_fixed else free).append(f"{section}.{name} was {before!r}, is {value!r}")
    return fixed, free


def changed_too_late(free: list[str]) -> list[str]:
    """Returns those of the free changes that a finished run would have had to know before."""
    harmless = {f"training.{name}" for name in _WITHOUT_EFFECT_ON_WEIGHTS}
    return [line for line in free if line.startswith("training.") and line.split()[0] not in harmless]
