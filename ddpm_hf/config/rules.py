"""Which settings can work together, and which a run can be continued with."""

from ddpm_hf.config.schema import RunConfig


class ConfigError(ValueError):
    """A setting that cannot work; the message is one sentence that says what to do."""


def validate(config: RunConfig) -> None:
    """Refuses settings that cannot work, before any of them costs time.

    Raises:
        ConfigError: With one sentence that names the setting, its value and what to do.
    """
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
    if evaluation.recognition and not (model.class_conditional and data.validation_fraction > 0):
        raise ConfigError(
            "evaluation.recognition asks for classes and real held-out images; set model.class_conditional to true and "
            "data.validation_fraction above 0."
        )
    if not config.tracking.project:
        raise ConfigError("tracking.project is empty; give the project a name.")
    if training.validate_every_steps > 0 and data.validation_fraction == 0:
        raise ConfigError(
            f"training.validate_every_steps {training.validate_every_steps} needs held-out images; set "
            "data.validation_fraction, for example to 0.05."
        )
    if config.diffusion.rescale_betas_zero_snr and config.diffusion.prediction_type in ("epsilon", "eps"):
        raise ConfigError(
            "diffusion.rescale_betas_zero_snr leaves no signal at the last timestep, where epsilon says nothing about "
            "x_0; set diffusion.prediction_type to v_prediction or sample."
        )
    micro, batch = training.micro_batch_size, training.train_batch_size
    if isinstance(micro, int) and batch % micro:
        lower = batch // micro * micro
        raise ConfigError(
            f"training.train_batch_size {batch} is not a multiple of training.micro_batch_size {micro}; "
            f"use {f'{lower} or ' if lower else ''}{lower + micro}."
        )


def _check_numbers(config: RunConfig) -> None:
    """Refuses numbers outside their range."""
    positive = (
        ("diffusion", "num_train_timesteps"), ("training", "num_steps"), ("training", "train_batch_size"),
        ("training", "micro_batch_size"), ("training", "checkpoint_every_steps"), ("training", "log_every_steps"),
        ("training", "max_consecutive_nonfinite"), ("training", "learning_rate"), ("training", "max_grad_norm"),
        ("training", "adam_epsilon"), ("data", "resolution"), ("preview", "num_images"),
        ("preview", "num_inference_steps"), ("evaluation", "batch_size"), ("evaluation", "num_inference_steps"),
    )  # fmt: skip
    not_negative = (
        ("training", "learning_rate_warmup_steps"), ("training", "weight_decay"), ("training", "seed"),
        ("training", "validate_every_steps"), ("preview", "every_steps"), ("preview", "guidance_scale"),
        ("evaluation", "num_samples"), ("evaluation", "guidance_scale"),
    )  # fmt: skip
    below_one = (
        ("data", "validation_fraction"), ("objective", "class_dropout"), ("training", "adam_beta1"),
        ("training", "adam_beta2"), ("training", "ema_decay"),
    )  # fmt: skip
    at_most_one = (("preview", "eta"), ("evaluation", "eta"))
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
_FIXED_TRAINING = ("seed", "train_batch_size")
_FREE_DATA = ("cache_dir",)
# These have no effect on the weights. The other free settings have one, so that a run with nothing left to train can no
# longer follow them.
_SECTIONS_BESIDE_TRAINING = ("preview", "evaluation", "tracking")
_TRAINING_BESIDE_WEIGHTS = (
    "output_dir", "num_steps", "checkpoint_every_steps", "num_checkpoints_kept", "log_every_steps",
    "validate_every_steps", "resume", "cpu",
)  # fmt: skip


def changed_settings(old: dict[str, dict[str, object]], new: RunConfig) -> tuple[list[str], list[str]]:
    """Compares the configuration of a checkpoint with the one asked for.

    Returns:
        One line for each change that a run cannot be continued with, and one for each that it can.
    """
    fixed: list[str] = []
    free: list[str] = []
    for section, settings in new.to_dict().items():
        for name, value in settings.items():
            before = old.get(section, {}).get(name, value)
            if before == value or (section, name) == ("training", "output_dir"):
                continue
            is_fixed = section in _FIXED_SECTIONS and name not in _FREE_DATA
            is_fixed |= section == "training" and name in _FIXED_TRAINING
            (fixed if is_fixed else free).append(f"{section}.{name} was {before!r}, is {value!r}")
    return fixed, free


def changed_too_late(free: list[str]) -> list[str]:
    """Returns those of the free changes that a finished run would have had to know before."""
    harmless = {f"training.{name}" for name in _TRAINING_BESIDE_WEIGHTS} | {f"data.{name}" for name in _FREE_DATA}
    names = {line: line.split()[0] for line in free}
    return [
        line
        for line, name in names.items()
        if name not in harmless and name.split(".")[0] not in _SECTIONS_BESIDE_TRAINING
    ]
