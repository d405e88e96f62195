"""The parts of a sampling call before its loop: labels and guidance, arguments for any scheduler."""

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

CORE_VERSION = "1.2.0"

ClassLabels = int | str | Iterable[int | str] | torch.Tensor


def number_of_images(
    batch_size: int | None, class_labels: ClassLabels | None, generator: Any, sample: torch.Tensor | None
) -> int:
    """Returns the batch size; if it is None, how many labels, generators or start states there are, 1 without any."""
    if batch_size is not None:
        return batch_size
    for given in (class_labels, generator, sample):
        is_one = isinstance(given, str) or (isinstance(given, torch.Tensor) and given.ndim == 0)
        if isinstance(given, Sized) and not is_one:
            return len(given)
    return 1


def label_numbers(
    class_labels: ClassLabels | None,
    batch_size: int,
    num_class_embeds: int | None,
    has_null_label: bool,
    class_names: Mapping[str, str] | None,
) -> list[int] | None:
    """Returns one label for each image, None for an unconditional network.

    Args:
        class_labels: One for all images or one for each: numbers, or names from `class_names`.
        batch_size: Number of images.
        num_class_embeds: Labels that the network knows, the null label included.
        has_null_label: Whether the last of them means "no class".
        class_names: Names by number, {"0": ...}.

    Raises:
        ValueError: The labels are missing, superfluous, too few or many, or unknown.
    """
    if num_class_embeds is None:
        if class_labels is not None:
            raise ValueError("class_labels are given, but the model is unconditional; leave them out.")
        return None
    num_classes = num_class_embeds - has_null_label
    if class_labels is None:
        raise ValueError(f"The model is class-conditional: pass class_labels, numbers from 0 to {num_classes - 1}.")
    if isinstance(class_labels, torch.Tensor | np.ndarray | np.generic):
        class_labels = class_labels.tolist()
    given = [class_labels] * batch_size if isinstance(class_labels, int | str) else list(class_labels)
    if len(given) != batch_size:
        raise ValueError(f"class_labels has {len(given)} entries for batch_size {batch_size}; pass one for each image.")
    numbers = {name: int(number) for number, name in (class_names or {}).items()}
    labels = [numbers.get(label, -1) if isinstance(label, str) else int(label) for label in given]
    for label, number in zip(given, labels, strict=True):
        if not 0 <= number < num_class_embeds or isinstance(label, bool) or label not in (number, *numbers):
            null = f", {num_classes} for no class" if has_null_label else ""
            names = f", or a name: {', '.join(numbers)}" if numbers else ""
            raise ValueError(
                f"class_labels has {label!r}{nearest(label, numbers)}; a label is a number 0 to {num_classes - 1}{null}"
                f"{names}."
            )
    return labels


def nearest(given: int | str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns a question about the name that may be meant, the shortest that goes on so or the most similar, or ""."""
    if not given or not isinstance(given, str):
        return ""
    folded = {name.casefold(): name for name in names}
    longer = sorted((name for name in folded if name.startswith(given.casefold())), key=len)
    found = longer or difflib.get_close_matches(given.casefold(), folded, n=1, cutoff=cutoff)
    return f" (did you mean {folded[found[0]]!r}?)" if found else ""


@dataclass(frozen=True)
class Condition:
    """Labels, (batch,) or, where guided, (2 batch,) with the null label in the second half, and the guidance."""

    labels: torch.Tensor | None
    guidance_scale: float
    guidance_rescale: float

    @classmethod
    def make(
        cls,
        labels: list[int] | None,
        null_label: int | None,
        guidance_scale: float,
        guidance_rescale: float,
        device: torch.device,
    ) -> "Condition":
        """Builds the tensor of labels.

        Raises:
            ValueError: Guidance is asked of a model without a null label, or its rescaling is outside [0, 1].
        """
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale is {guidance_rescale}; it must lie between 0 and 1.")
        if guidance_scale != 1.0:
            if labels is None or null_label is None:
                raise ValueError(
                    f"guidance_scale is {guidance_scale}, but the model has no null label to guide against; use 1.0,"
                    " or a model trained with label dropout."
                )
            labels = labels + [null_label] * len(labels)
        tensor = None if labels is None else torch.tensor(labels, device=device)
        return cls(tensor, guidance_scale, guidance_rescale)

    @property
    def is_guided(self) -> bool:
        """Whether each step needs the network's opinion without the label too."""
        return self.guidance_scale != 1.0

    def guide(self, conditional: torch.Tensor, null: torch.Tensor) -> torch.Tensor:
        """Eq. 6, Ho and Salimans 2022: null + scale (conditional - null); rescaling: section 3.4, Lin et al. 2024."""
        guided = torch.lerp(null, conditional, self.guidance_scale)
        if self.guidance_rescale == 0:
            return guided
        dims = list(range(1, guided.ndim))
        deviation = guided.std(dims, keepdim=True)
        ratio = conditional.std(dims, keepdim=True) / deviation
        ratio = torch.where(deviation > 0, ratio, 1.0)  # a constant prediction has no deviation to be kept
        return guided * (self.guidance_rescale * ratio + (1 - self.guidance_rescale))


def step_arguments(
    scheduler: Any, generator: torch.Generator | list[torch.Generator] | None, eta: float | None
) -> dict[str, Any]:
    """Returns the keyword arguments that this scheduler's `step` takes.

    Raises:
        ValueError: An eta is given and the scheduler has none.
    """
    accepted = inspect.signature(scheduler.step).parameters
    arguments: dict[str, Any] = {"generator": generator} if "generator" in accepted else {}
    if eta is not None:
        if "eta" not in accepted:
            raise ValueError(f"eta is {eta}, but {type(scheduler).__name__} has no eta; leave it out.")
        arguments["eta"] = eta
    return arguments


def start_run(
    scheduler: Any,
    device: torch.device,
    num_inference_steps: int | None,
    timesteps: list[int] | None,
    timestep_spacing: str | None,
) -> None:
    """Sets the scheduler's timesteps, as many as in training unless told otherwise.

    Raises:
        ValueError: The scheduler does not take what is asked for.
    """
    if num_inference_steps is None and timesteps is None:
        num_inference_steps = scheduler.config["num_train_timesteps"]
    requested = {
        "num_inference_steps": num_inference_steps,
        "timesteps": timesteps,
        "timestep_spacing": timestep_spacing,
    }
    arguments = {name: value for name, value in requested.items() if value is not None}
    unknown = arguments.keys() - inspect.signature(scheduler.set_timesteps).parameters.keys()
    if unknown:
        raise ValueError(
            f"{type(scheduler).__name__} takes no {' and no '.join(sorted(unknown))}; leave it out, or use"
            " GaussianDiffusionScheduler.from_config(pipe.scheduler.config)."
        )
    scheduler.set_timesteps(device=device, **arguments)
