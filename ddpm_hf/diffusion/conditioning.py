"""What a network is told beside x_t: class labels, and how strongly to be guided by them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

CORE_VERSION = "1.0.0"

ClassLabels = int | str | Iterable[int | str] | torch.Tensor


def label_numbers(
    class_labels: ClassLabels | None,
    batch_size: int,
    num_class_embeds: int | None,
    has_null_label: bool,
    class_names: Mapping[str, str] | None,
) -> list[int] | None:
    """Return one label for each image, None for an unconditional network.

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
    if isinstance(class_labels, torch.Tensor):
        class_labels = class_labels.tolist()
    given = [class_labels] * batch_size if isinstance(class_labels, int | str) else list(class_labels)
    if len(given) != batch_size:
        raise ValueError(f"class_labels has {len(given)} entries for batch_size {batch_size}; pass one for each image.")
    numbers = {name: int(number) for number, name in (class_names or {}).items()}
    labels = [numbers.get(label, -1) if isinstance(label, str) else int(label) for label in given]
    for label, number in zip(given, labels, strict=True):
        if not 0 <= number < num_class_embeds:
            null = f", {num_classes} for no class" if has_null_label else ""
            names = f", or a name: {', '.join(numbers)}" if numbers else ""
            raise ValueError(f"class_labels has {label!r}; a label is a number 0 to {num_classes - 1}{null}{names}.")
    return labels


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
        """Build the tensor of labels.

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
        """Eq. 6, Ho and Salimans 2022, as null + scale (conditional - null); rescaling: section 3.4, Lin et al. 2024."""
        guided = torch.lerp(null, conditional, self.guidance_scale)
        if self.guidance_rescale == 0:
            return guided
        dims = list(range(1, guided.ndim))
        ratio = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return guided * (self.guidance_rescale * ratio + (1 - self.guidance_rescale))
