"""Which settings are read only beside another one: without it they would do nothing, in silence."""

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from ddpm_hf.config.hub import HubConfig
from ddpm_hf.config.schema import RunConfig

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
