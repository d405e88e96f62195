"""The text of a card: `templates/card.md` filled with facts.

Whatever the template shows is escaped, so that the name of a class is read as a name and never as HTML or Markdown;
code alone is shown as it is.
"""

import functools
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ddpm_hf.hub.card_body import read_parts
from ddpm_hf.hub.card_evaluation import Measurement, command
from ddpm_hf.hub.card_facts import Facts, public_name
from ddpm_hf.hub.card_metadata import UNKNOWN_LICENSE

_TEMPLATE = Path(__file__).parent / "templates" / "card.md"
_MARKDOWN = re.compile(r"([\\`*_\[\]|#~$!])")
NUM_IMAGES, MOST_CLASSES = 4, 10
_KINDS = {1: "gray images", 3: "colour images", 4: "colour images with transparency"}
_PREDICTIONS = {
    "epsilon": "the noise ε that was added",
    "sample": "the clean image x₀",
    "v_prediction": "the velocity v = √ᾱ ε - √(1 - ᾱ) x₀",
}
_LOSSES = {
    "mse": "the mean square error",
    "l1": "the mean absolute error",
    "huber": "the Huber loss",
    "vlb": "the variational bound",
    "hybrid": "the mean square error plus the variational bound, which trains the variance alone",
}
_BETA_SCHEDULES = {"squaredcos_cap_v2": "cosine"}
# What the table of settings shows, and where it is found in training_config.yaml.
_SETTINGS = {
    "network": "model.preset",
    "initialization": "model.initialization",
    "weighting of the loss": "objective.weighting",
    "timesteps drawn": "objective.timestep_sampling",
    "self-conditioning": "objective.self_conditioning",
    "label dropout": "objective.class_dropout",
    "offset noise": "objective.offset_noise",
    "immiscible noise": "objective.immiscible_noise",
    "updates": "training.num_steps",
    "images an update": "training.train_batch_size",
    "optimizer": "training.optimizer",
    "learning rate": "training.learning_rate",
    "learning rate schedule": "training.learning_rate_schedule",
    "warm-up updates": "training.learning_rate_warmup_steps",
    "weight decay": "training.weight_decay",
    "largest gradient norm": "training.max_grad_norm",
    "decay of the averaged weights": "training.ema_decay",
    "precision": "training.mixed_precision",
    "mirrored at random": "data.random_flip",
    "seed": "training.seed",
}
# An address, or a file beside the card; what may end a link of Markdown is in neither.
_LINK = re.compile(r"https?://[\w.~%#?=&+:@,;/-]+|[\w.-]+(?:/[\w.-]+)*")
_HALF_PRECISION = "unet/diffusion_pytorch_model.fp16"
_OFF = (None, "", "none", False, 0)
_SHOWN_EVEN_IF_OFF = ("training.seed",)


class Code(str):
    """A text that is shown as it is."""

    __slots__ = ()


def license_text(data: Mapping[str, Any]) -> Code | None:
    """Returns what a card calls the license in its metadata, with a link where they have one.

    The Hub knows the name and the address of a license beside the identifier `other` alone.

    Returns:
        Markdown; None for a license that nobody has stated.
    """
    license = data.get("license", UNKNOWN_LICENSE)
    if license == UNKNOWN_LICENSE:
        return None
    name, link = (data.get(f"license_{part}") if license == "other" else None for part in ("name", "link"))
    shown = _shown(name or license)
    return Code(f"[{shown}]({link})" if isinstance(link, str) and _LINK.fullmatch(link) else shown)


def render(facts: Facts, *, license: Code | None) -> dict[str, str]:
    """Returns the content of all sections by name, in their order; of what is not known, an empty text.

    Args:
        facts: What the folder says.
        license: What `license_text` says of the metadata.
    """
    text = _template().render(
        facts=facts,
        license=license,
        images=_images(facts),
        classes=_classes(facts),
        repo=Code(json.dumps(facts.repo_id)),
        repo_id=Code(facts.repo_id),
        name=Code(facts.name),
        data_set=Code(facts.hub_data_set or ""),
        variant=Code(f', variant="{facts.variant}"' if facts.variant else ""),
        is_picture=facts.num_channels in _KINDS,
        stock_call=Code(f"batch_size={NUM_IMAGES}, num_inference_steps={facts.num_train_timesteps}"),
        native_call=Code(_native_call(facts)),
        row=_row,
        command=Code(_command(facts)),
        settings=_settings(facts),
        prediction=_PREDICTIONS.get(str(facts.scheduler.get("prediction_type", "epsilon")), "the noise"),
        loss=_LOSSES.get(str(facts.setting("objective.loss"))),
        beta_schedule=_beta_schedule(facts),
        base_model=_base_model(facts),
        has_half_precision=any(name.startswith(_HALF_PRECISION) for name in facts.files) and not facts.variant,
        epochs=_epochs(facts),
        duration=_duration(facts.measured("seconds")),
        score=_score(facts),
        ideas=_ideas(facts),
    )
    return {part.name: part.content for part in read_parts(text) if part.name}


@functools.cache
def _template() -> jinja2.Template:
    """Returns the template, which takes longer to compile than to fill."""
    # Autoescape knows HTML alone; `finalize` escapes Markdown too.
    environment = jinja2.Environment(  # noqa: S701
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _shown(value: Any) -> str:
    """Returns a value as text in which nothing is HTML or Markdown."""
    if isinstance(value, Code):
        return str(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    text = "".join(letter for letter in " ".join(str(value).split()) if letter.isprintable())
    return _MARKDOWN.sub(r"\\\1", html.escape(text, quote=False))


def _images(facts: Facts) -> str:
    """Says what kind of images the model draws."""
    kind = _KINDS.get(facts.num_channels, f"images of {facts.num_channels} channels")
    return kind if facts.size is None else f"{kind} of {facts.size[1]}x{facts.size[0]} pixels"


def _classes(facts: Facts) -> str:
    """Names the classes, or the first of them."""
    names = facts.class_names or [str(label) for label in range(facts.num_classes)]
    more = f", and {len(names) - MOST_CLASSES} more" if len(names) > MOST_CLASSES else ""
    return ", ".join(names[:MOST_CLASSES]) + more


def _native_call(facts: Facts) -> str:
    """Returns the arguments of a call of the native pipeline, as the pictures of the run were drawn."""
    words = [f"batch_size={NUM_IMAGES}"]
    if facts.num_classes:
        words[0] = f"class_labels={_labels(facts)}"
    steps, eta, guidance = (
        facts.setting(f"evaluation.{name}") for name in ("num_inference_steps", "eta", "guidance_scale")
    )
    if isinstance(steps, int) and 0 < steps <= facts.num_train_timesteps:
        words.append(f"num_inference_steps={steps}")
    if isinstance(eta, int | float) and facts.takes_eta:
        words.append(f"eta={eta!r}")
    if isinstance(guidance, int | float) and guidance != 1 and facts.index.get("has_null_label"):
        words.append(f"guidance_scale={guidance!r}")
    if facts.num_channels not in _KINDS:
        words.append('output_type="np"')
    return ", ".join(words)


def _labels(facts: Facts) -> str:
    """Returns a label for each of a few images: names where each means one class and can be read, else numbers."""
    count, names = min(facts.num_classes, NUM_IMAGES), facts.class_names
    are_words = all(name.isprintable() and len(name) < 40 and not name.isdigit() for name in names[:count])
    if len(set(names)) == len(names) == facts.num_classes and are_words:
        return json.dumps(names[:count], ensure_ascii=False)
    return json.dumps(list(range(count)))


def _row(one: Measurement) -> Code:
    """Returns a row of the table of measurements."""
    value = "not a number" if not one.is_finite else f"{one.value:.4g}"
    error = "" if one.standard_error is None or not one.is_finite else f"{one.standard_error:.2g}"
    reference = one.row.get("num_reference") or ""
    cells = [one.full_title, value, error, one.better, reference]
    return Code(f"| {' | '.join(map(_shown, cells))} |")


def _command(facts: Facts) -> str:
    """Returns the command that measures again what evaluation.json holds."""
    if facts.evaluation is None:
        return ""
    return command(
        facts.evaluation,
        repo_id=facts.repo_id,
        source=facts.measured_on or "DATA",
        spacing=facts.scheduler.get("timestep_spacing"),
        length=facts.num_train_timesteps,
        num_classes=facts.num_classes,
        config=facts.config,
    )


def _settings(facts: Facts) -> list[tuple[str, Any]]:
    """Returns the settings of the run that say something; those that are off say nothing."""
    found = [(label, name, facts.setting(name)) for label, name in _SETTINGS.items()]
    return [
        (label, value)
        for label, name, value in found
        if value not in _OFF or (name in _SHOWN_EVEN_IF_OFF and value is not None)
    ]


def _beta_schedule(facts: Facts) -> str:
    """Names the noise schedule."""
    name = str(facts.scheduler.get("beta_schedule", "linear"))
    if facts.scheduler.get("trained_betas"):
        return "its own (`trained_betas`)"
    return _BETA_SCHEDULES.get(name, name)


def _base_model(facts: Facts) -> str | None:
    """Names what the weights were before training, without the folders it lies in."""
    name = facts.setting("model.from_pretrained")
    return public_name(str(name), is_known=bool(facts.setting("model.revision"))) if name else None


def _epochs(facts: Facts) -> str:
    """Says how often the network saw an image, or how many of them it saw; nothing where that is not known."""
    seen, number = facts.measured("num_images_seen"), facts.measured("data.num_images")
    if not isinstance(seen, int) or not isinstance(number, int) or number <= 0:
        return ""
    if seen < number:
        return f"{100 * seen / number:.3g} % of the {number:,} there are"
    times = round(seen / number)
    return f"each of the {number:,} about {'once' if times == 1 else f'{times:,} times'}"


def _duration(seconds: Any) -> str | None:
    """Returns a time in the units that people use."""
    if not isinstance(seconds, int | float):
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _score(facts: Facts) -> str | None:
    """Says which score the run ended with."""
    score = facts.measured("score")
    if not isinstance(score, dict):
        return None
    known = {str(name).removeprefix("score_"): value for name, value in score.items()}
    metric, value = known.get("metric"), known.get("value", known.get("score"))
    if metric is None or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    features = f" in the features of {known['features']}" if known.get("features") else ""
    count = f" of {known['num_samples']:,} images" if isinstance(known.get("num_samples"), int) else ""
    return f"{metric}{features}{count}: {value:.4g}"


def _ideas(facts: Facts) -> Sequence[str]:
    """Returns the keys of the papers whose ideas the model uses."""
    scheduler, objective = facts.scheduler, facts.config.get("objective") or {}
    weighting, eta = objective.get("weighting"), facts.setting("evaluation.eta")
    learned = scheduler.get("variance_type") in ("learned", "learned_range")
    improved = scheduler.get("beta_schedule") == "squaredcos_cap_v2" or learned
    used = {
        "ho2020": True,
        "nichol2021": improved or objective.get("timestep_sampling") == "loss_aware",
        "song2021": eta == 0 and facts.takes_eta,
        "salimans2022": scheduler.get("prediction_type") == "v_prediction" or weighting in ("snr", "truncated_snr"),
        "hang2023": weighting == "min_snr",
        "choi2022": weighting == "p2",
        "ho2022": bool(facts.index.get("has_null_label")),
        "chen2023": bool(facts.index.get("self_conditioned")),
        "lin2024": bool(scheduler.get("rescale_betas_zero_snr")),
        "li2024": bool(objective.get("immiscible_noise")),
        "karras2024": bool(facts.setting("training.posthoc_ema")),
        "bao2022": "scheduler/reverse_variance.json" in facts.files,
    }
    return [key for key, is_used in used.items() if is_used]
