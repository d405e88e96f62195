"""The timesteps of a run: how they are spread over the chain, and where in the list a timestep stands.

A run is a strictly descending list of timesteps t = T-1 ... 0. Its last step goes to clean data, whatever its timestep.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from .noise_schedule import NoiseSchedule, whole_number

CORE_VERSION = "1.2.0"


def spaced_timesteps(spacing: str, num_inference_steps: int, num_train_timesteps: int, offset: int = 0) -> list[int]:
    """Returns exactly `num_inference_steps` descending timesteps.

    Args:
        spacing: `leading`, `trailing` and `linspace` are the three rows of Table 2, Lin et al. 2024, in the arithmetic
            of diffusers; `quadratic` puts more steps near t = 0 (Song et al. 2021, appendix D.2) and starts at T-1.
        num_inference_steps: Number n of steps, 1 ... T.
        num_train_timesteps: Length T of the chain.
        offset: Added to each timestep of `leading`.

    Raises:
        ValueError: The spacing is unknown.
    """
    n, total = num_inference_steps, num_train_timesteps
    if spacing == "leading":
        ascending = np.arange(n) * (total // n) + offset
    elif spacing == "trailing":
        # The floats of arange may yield one entry too many, and then it would be -1.
        ascending = np.round(np.arange(total, 0, -total / n))[:n][::-1] - 1
    elif spacing == "linspace":
        ascending = np.linspace(0, total - 1, n).round()
    elif spacing == "quadratic":
        ascending = np.round(np.linspace(0, 1, n) ** 2 * (total - 1)) if n > 1 else np.array([total - 1])
        # Rounding repeats small values: push each one above its predecessor; n <= T leaves room for all of them.
        ascending = np.maximum.accumulate(ascending - np.arange(n)) + np.arange(n)
    else:
        raise ValueError(
            f"timestep_spacing {spacing!r} is unknown; choose leading, trailing, linspace"
            " or, as an argument of set_timesteps or of the pipeline, quadratic."
        )
    return [int(t) for t in ascending[::-1]]


class SamplingRun:
    """A list of timesteps in use: the tensor that loops iterate over, and one row of host floats a step.

    Args:
        schedule: The tables.
        timesteps: Strictly descending, within the chain.
        device: Where the tensor shall lie.

    Raises:
        ValueError: The list is empty, unordered or out of range, or not of whole numbers.
    """

    def __init__(
        self, schedule: NoiseSchedule, timesteps: Iterable[int], device: str | torch.device | None = None
    ) -> None:
        try:
            timesteps = [whole_number("A timestep", t) for t in timesteps]
        except TypeError as error:
            raise ValueError(f"timesteps is {timesteps!r}; it must be a list of whole numbers.") from error
        if not timesteps:
            raise ValueError("timesteps is empty; a run needs at least one step.")
        if any(after >= before for before, after in itertools.pairwise(timesteps)):
            raise ValueError("timesteps must be strictly descending.")
        if timesteps[0] >= len(schedule) or timesteps[-1] < 0:
            raise ValueError(
                f"timesteps run from {timesteps[0]} to {timesteps[-1]}, outside 0 ... {len(schedule) - 1};"
                " lower num_inference_steps or steps_offset, or change the list."
            )
        self.transitions = schedule.transitions(timesteps)
        self._row_of = {t: row for row, t in enumerate(timesteps)}
        with torch.inference_mode(False):  # inference tensors have no version counter
            self.timesteps = torch.tensor(timesteps, dtype=torch.int64, device=device)
        self._version = self.timesteps._version

    def row(self, timestep: int | torch.Tensor) -> int:
        """Returns the row of a timestep, without a read from the device if it is an element of `self.timesteps`.

        Raises:
            ValueError: The timestep is not one number, or not in the list.
        """
        value: Any = timestep
        if isinstance(timestep, torch.Tensor):
            if timestep.numel() != 1:
                raise ValueError(f"timestep has shape {tuple(timestep.shape)}; a step takes one for the whole batch.")
            if self._owns(timestep):
                return int(timestep.storage_offset()) - int(self.timesteps.storage_offset())
            value = timestep.item()
        is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        row = self._row_of.get(value) if is_number else None
        if row is None:
            raise ValueError(
                f"timestep {value!r} is not in the list of {len(self.transitions)} timesteps being run"
                f" ({self.transitions[0].timestep} ... {self.transitions[-1].timestep}); call set_timesteps first."
            )
        return row

    def _owns(self, timestep: torch.Tensor) -> bool:
        """Whether a one-element tensor is a view of the list, of which nobody has changed a value."""
        run = self.timesteps
        return (
            timestep.device == run.device
            and timestep.dtype == run.dtype
            and timestep.untyped_storage().data_ptr() == run.untyped_storage().data_ptr()
            and run._version == self._version
            and 0 <= timestep.storage_offset() - run.storage_offset() < len(self.transitions)
        )
