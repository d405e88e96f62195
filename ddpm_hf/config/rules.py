"""Which settings can work together, and which a run can be continued with."""

from ddpm_hf.config.schema import DataConfig, RunConfig


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
    _check_data(data)
    holds_out = data.validation_fraction > 0 or data.validation_split is not None
    if evaluation.recognition and not (model.class_conditional and holds_out and not data.streaming):
        raise ConfigError(
            "evaluation.recognition asks for classes and real held-out images; set model.class_conditional to true, "
            "data.validation_fraction above 0 or data.validation_split, and data.streaming to false."
        )
    if config.diffusion.rescale_betas_zero_snr and config.diffusion.prediction_type in ("epsilon", "eps"):
        raise ConfigError(
            "diffusion.rescale_betas_zero_snr leaves no signal at the last timestep, where epsilon says nothing about "
            "x_0; set diffusion.prediction_type to v_prediction or sample."
        )
    micro, batch = training.micro_batch_size, training.train_batch_size
    if micro is not None and batch % micro:
        lower = batch // micro * micro
        raise ConfigError(
            f"training.train_batch_size {batch} is not a multiple of training.micro_batch_size {micro}; "
            f"use {f'{lower} or ' if lower else ''}{lower + micro}."
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


def _check_numbers(config: RunConfig) -> None:
    """Refuses numbers outside their range."""
    positive = (
        ("diffusion", "num_train_timesteps"), ("training", "num_steps"), ("training", "train_batch_size"),
        ("training", "micro_batch_size"), ("training", "checkpoint_every_steps"), ("training", "log_every_steps"),
        ("training", "max_consecutive_nonfinite"), ("training", "learning_rate"), ("training", "max_grad_norm"),
        ("training", "adam_epsilon"), ("data", "num_channels"), ("preview", "num_images"),
        ("preview", "num_inference_steps"), ("evaluation", "batch_size"), ("evaluation", "num_inference_steps"),
    )  # fmt: skip
    not_negative = (
        ("training", "learning_rate_warmup_steps"), ("training", "weight_decay"), ("training", "seed"),
        ("preview", "every_steps"), ("evaluation", "num_samples"), ("preview", "guidance_scale"),
        ("evaluation", "guidance_scale"),
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
            if value is not None and not accepts(value):  # type: ignore[operator]
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
_FREE_DATA = ("cache_dir", "device_resident")


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
