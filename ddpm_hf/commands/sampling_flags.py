"""The flags that `ddpm-hf sample` and `ddpm-hf evaluate` share: which model, and how images are drawn."""

import csv
import inspect
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ddpm_hf.config import ConfigError

if TYPE_CHECKING:
    from ddpm_hf.diffusion import GaussianDiffusionPipeline

NATIVE_SCHEDULER = "GaussianDiffusionScheduler"
# Those of them that a call of the pipeline takes under the same name.
CALL_FLAGS = ("num_inference_steps", "eta", "timestep_spacing", "guidance_scale", "guidance_rescale")


def add_model_flags(parser: ArgumentParser) -> None:
    """Adds which model."""
    parser.add_argument("folder", help="folder of a pipeline or of a run, or a repository of the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of a repository of the Hub")
    parser.add_argument("--variant", help="weights of another kind that the model has beside its usual ones, as fp16")


def add_sampling_flags(add: Callable[..., Any], *, batch_size: int, turn: str) -> None:
    """Adds how images are drawn.

    Args:
        add: Takes a flag, as `add_argument` of a parser or a group.
        batch_size: The default.
        turn: Which image has which of the labels.
    """
    add("--labels", metavar="LIST",
        help=f"names or numbers of classes, with commas between them; by default all. {turn}; a name with a comma in "
        "it goes in double quotes, and where the first begins with a dash, it is --labels=LIST")  # fmt: skip
    add("--num_inference_steps", type=int, help="by default as many as in training")
    add("--scheduler", help="name of a scheduler of diffusers; by default that of the model")
    add("--eta", type=float, help="0 samples as DDIM, 1 as DDPM; by default what the scheduler does by itself")
    add("--timestep_spacing", choices=("leading", "trailing", "linspace", "quadratic"),
        help="by default that of the scheduler")  # fmt: skip
    add("--guidance_scale", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    add("--guidance_rescale", type=float, default=0.0, help="how far guidance keeps the contrast, 0 to 1; by default 0")
    add("--variance", choices=("trained", "analytic"), default="trained",
        help="analytic: the optimal one for the network (Bao et al. 2022); `ddpm-hf evaluate --estimate_variance` "
        "finds it")  # fmt: skip
    add("--batch_size", type=int, default=batch_size,
        help=f"images of one forward on one device; fewer need less memory. By default {batch_size}")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="precision of the network")


def check_sampling_flags(options: Namespace) -> None:
    """Refuses what those flags forbid by themselves or each other.

    Raises:
        ConfigError: With what to do.
    """
    check_ranges(options, {
        "batch_size": (1, math.inf), "num_inference_steps": (1, math.inf), "eta": (0, 1), "guidance_rescale": (0, 1),
    })  # fmt: skip
    if not (math.isfinite(options.guidance_scale) and options.guidance_scale >= 0):
        raise ConfigError(f"--guidance_scale is {options.guidance_scale}, but must be a number, at least 0.")
    if options.guidance_rescale and options.guidance_scale == 1:
        raise ConfigError("--guidance_rescale corrects guidance, and --guidance_scale is 1, none; give another scale.")
    if options.scheduler not in (None, NATIVE_SCHEDULER) and options.variance == "analytic":
        raise ConfigError(f"--variance analytic needs {NATIVE_SCHEDULER}; leave --scheduler out.")


def check_ranges(options: Namespace, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuses numbers outside their range, by the name of the flag.

    Raises:
        ConfigError: With the range.
    """
    for name, (lowest, highest) in ranges.items():
        value = getattr(options, name)
        if isinstance(value, int | float) and not lowest <= value <= highest:
            limits = f"at least {lowest}" if highest == math.inf else f"{lowest} to {highest}"
            raise ConfigError(f"--{name} is {value}, but must be {limits}.")


def check_scheduler(options: Namespace) -> None:
    """Refuses a scheduler that does not exist or has no eta, before a model is loaded; needs torch.

    Raises:
        ConfigError: With what to do.
        ValueError: With the name that may be meant.
    """
    from ddpm_hf.evaluation.sampling import scheduler_class

    if options.scheduler is None:
        return
    steps = inspect.signature(scheduler_class(options.scheduler).step).parameters
    if options.eta is not None and "eta" not in steps:
        raise ConfigError(f"--eta is {options.eta}, but {options.scheduler} has no eta; leave one of them out.")


def label_list(text: str | None, pipeline: "GaussianDiffusionPipeline") -> list[int] | None:
    """Returns the numbers of the labels that go round; a word that is both is taken for a name.

    Args:
        text: What --labels says; None stands for all classes.
        pipeline: Whose classes.

    Returns:
        None for an unconditional network.

    Raises:
        ConfigError: There is no such label.
    """
    from ddpm_hf.diffusion.sampling import label_numbers

    if text is None:
        return list(range(pipeline.num_classes)) or None
    class_names = pipeline.config.get("class_names") or {}
    known = set(class_names.values())
    words = [text] if text in known else [word.strip() for word in next(csv.reader([text], skipinitialspace=True), [])]
    if not words or not all(words):
        raise ConfigError(f"--labels is {text!r}; give names or numbers with commas between them.")
    given = [int(word) if word.isdecimal() and word not in known else word for word in words]
    num_labels, has_null_label = pipeline.unet.config.num_class_embeds, bool(pipeline.config.get("has_null_label"))
    try:
        return label_numbers(given, len(given), num_labels, has_null_label, class_names)
    except ValueError as error:
        raise ConfigError(str(error).replace("class_labels", "--labels", 1)) from None
