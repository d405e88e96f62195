"""Noise schedules and timesteps: betas, their tables in float64, timestep spacing and the transitions of a run.

Symbols follow Ho et al. 2020 with t = 0 ... T-1: beta_t is the variance added at step t,
alpha_bar_t = prod_{s <= t} (1 - beta_s), and alpha_bar_{-1} = 1 is clean data. All tables are float64 on the CPU.
"""

import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

STOCK_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""The schedules that every scheduler of diffusers supports by name."""
LARGEST_BETA = 0.999
"""Limit for schedules defined by alpha_bar, which may fall to 0. Section 3.2, Nichol and Dhariwal 2021."""
SMALLEST_BETA = 1e-12
"""Below this, float64 keeps fewer than four digits of beta in 1 - beta."""
SMALLEST_ALPHA_BAR = 1e-38
"""Below this, x_t contains no signal in float32: dividing by sqrt(alpha_bar) could overflow."""


class Transition(NamedTuple):
    """One reverse step from timestep t to the next timestep t' of the list, in Python floats.

    `NoiseSchedule.transition_columns` returns all steps of a list in one, each attribute a float64 array.

    Attributes:
        timestep: t.
        previous_timestep: t', or -1 for clean data.
        alpha_bar: alpha_bar_t.
        alpha_bar_prev: alpha_bar_t', 1 for clean data.
        beta: 1 - alpha_bar_t / alpha_bar_t', the variance added between t' and t; beta_t if t' = t-1.
        posterior_variance: beta (1 - alpha_bar_t') / (1 - alpha_bar_t); 0 for clean data.
    """

    timestep: int
    previous_timestep: int
    alpha_bar: float
    alpha_bar_prev: float
    beta: float
    posterior_variance: float


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The tables of a diffusion process, each a float64 CPU tensor of shape (T,).

    Attributes:
        betas: beta_t.
        alphas_cumprod: alpha_bar_t.
        sqrt_alphas_cumprod: The factor of x_0 in x_t.
        sqrt_one_minus_alphas_cumprod: The factor of the noise in x_t.
        snr: alpha_bar_t / (1 - alpha_bar_t).
        log_betas: log beta_t, the upper bound of a learned variance.
        posterior_mean_coef_x_0: Factor of x_0 in the posterior mean. Eq. 7, Ho et al. 2020.
        posterior_mean_coef_x_t: Factor of x_t in the posterior mean. Eq. 7, Ho et al. 2020.
        posterior_variance: Eq. 7, Ho et al. 2020; 0 at t = 0.
        posterior_log_variance: Its logarithm, with the value of t = 1 at t = 0 (log beta_0 if T = 1).
    """

    betas: torch.Tensor
    alphas_cumprod: torch.Tensor
    sqrt_alphas_cumprod: torch.Tensor
    sqrt_one_minus_alphas_cumprod: torch.Tensor
    snr: torch.Tensor
    log_betas: torch.Tensor
    posterior_mean_coef_x_0: torch.Tensor
    posterior_mean_coef_x_t: torch.Tensor
    posterior_variance: torch.Tensor
    posterior_log_variance: torch.Tensor

    @classmethod
    def from_betas(cls, betas: torch.Tensor | np.ndarray | Sequence[float]) -> "NoiseSchedule":
        """Compute all tables from the betas.

        Raises:
            ValueError: If a beta is not a number between `SMALLEST_BETA` and 1.
        """
        try:
            betas = torch.as_tensor(betas, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError("betas must be one list of numbers.") from error
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas must be one non-empty list of numbers, not of shape {tuple(betas.shape)}.")
        bad = ~((betas >= SMALLEST_BETA) & (betas <= 1))
        if bad.any():
            t = int(bad.nonzero()[0])
            raise ValueError(
                f"beta at timestep {t} is {betas[t].item()}; every beta must lie between {SMALLEST_BETA} and 1."
            )
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        posterior_variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
        posterior_log_variance = posterior_variance.log()  # -inf at t = 0
        posterior_log_variance[0] = posterior_log_variance[1] if len(betas) > 1 else betas[0].log()
        return cls(
            betas=betas,
            alphas_cumprod=alpha_bar,
            sqrt_alphas_cumprod=alpha_bar.sqrt(),
            sqrt_one_minus_alphas_cumprod=(1 - alpha_bar).sqrt(),
            snr=alpha_bar / (1 - alpha_bar),
            log_betas=betas.log(),
            # Eq. 7, Ho et al. 2020
            posterior_mean_coef_x_0=alpha_bar_prev.sqrt() * betas / (1 - alpha_bar),
            posterior_mean_coef_x_t=(1 - betas).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar),
            posterior_variance=posterior_variance,
            posterior_log_variance=posterior_log_variance,
        )

    def __len__(self) -> int:
        """Return T."""
        return len(self.betas)

    def transition_columns(self, timesteps: Sequence[int]) -> Transition:
        """Return the reverse steps from the timesteps of a descending list; the last one leads to clean data."""
        t = np.array(timesteps, dtype=np.int64)
        a = np.array(self.alphas_cumprod.tolist())[t]
        a_prev = np.append(a[1:], 1.0)
        # Section 4, Nichol and Dhariwal 2021. The ratio of two numbers near 1e-308 has too few digits; there, neither
        # state contains any signal, and the step adds fresh noise.
        has_ratio = a_prev > 1e-300
        beta = np.where(has_ratio, 1 - a / np.where(has_ratio, a_prev, 1.0), 1.0)
        columns: Any = (t, np.append(t[1:], -1), a, a_prev, beta, beta * (1 - a_prev) / (1 - a))
        return Transition(*columns)

    def transitions(self, timesteps: Sequence[int]) -> list[Transition]:
        """Return the reverse step from each timestep of a descending list; the last one leads to clean data."""
        return rows_of(self.transition_columns(timesteps))


def rows_of(columns: Transition) -> list[Transition]:
    """Return each of the steps that `NoiseSchedule.transition_columns` returns in one."""
    arrays: Any = columns
    return [Transition(*row) for row in zip(*(column.tolist() for column in arrays), strict=True)]


# Beta schedules


def linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """beta_t = beta_start + (beta_end - beta_start) t / (T-1). Section 4, Ho et al. 2020."""
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def scaled_linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """sqrt(beta_t) evenly spaced: `quad` in the code of Ho et al. 2020; the schedule of Rombach et al. 2022."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2


def sigmoid_betas(num_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """beta_t = beta_start + (beta_end - beta_start) / (1 + exp(6 - 12 t / (T-1))). Code of GeoDiff, Xu et al. 2022."""
    return torch.linspace(-6, 6, num_timesteps, dtype=torch.float64).sigmoid() * (beta_end - beta_start) + beta_start


def warmup_betas(num_timesteps: int, beta_start: float, beta_end: float, fraction: float) -> torch.Tensor:
    """Linear over the first floor(fraction T) steps, then beta_end. Code of Ho et al. 2020."""
    betas = constant_betas(num_timesteps, beta_start, beta_end)
    num_warmup = int(num_timesteps * fraction)
    betas[:num_warmup] = linear_betas(num_warmup, beta_start, beta_end)
    return betas


def constant_betas(num_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """beta_t = beta_end. Code of Ho et al. 2020."""
    return torch.full((num_timesteps,), beta_end, dtype=torch.float64)


def jsd_betas(num_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """beta_t = 1 / (T-t), so the last step destroys all signal. Section 2.4.1, Sohl-Dickstein et al. 2015."""
    return 1 / torch.linspace(num_timesteps, 1, num_timesteps, dtype=torch.float64)


def betas_from_alpha_bar(num_timesteps: int, alpha_bar: Callable[[float], float]) -> torch.Tensor:
    """beta_t = min(1 - alpha_bar((t+1)/T) / alpha_bar(t/T), `LARGEST_BETA`) for a function alpha_bar on [0, 1]."""
    points = [alpha_bar(i / num_timesteps) for i in range(num_timesteps + 1)]
    ratios = [after / before for before, after in itertools.pairwise(points)]
    return torch.tensor([min(1 - ratio, LARGEST_BETA) for ratio in ratios], dtype=torch.float64)


def cosine_alpha_bar(u: float) -> float:
    """cos^2(pi/2 (u + s) / (1 + s)), s = 0.008, up to a constant factor. Eq. 17, Nichol and Dhariwal 2021."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def laplace_alpha_bar(u: float) -> float:
    """sqrt(SNR / (1 + SNR)) with log SNR = -sign(1/2 - u) log(1 - 2 |1/2 - u|) / 2. Hang et al. 2024.

    The square root, which is not in the paper, and the 1e-6 that keeps it finite follow diffusers.
    """
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    return math.sqrt(math.exp(log_snr) / (1 + math.exp(log_snr)))


def sigmoid_alpha_bar(u: float) -> float:
    """(sigmoid(3) - sigmoid(6u - 3)) / (sigmoid(3) - sigmoid(-3)). Algorithm 1, Jabri et al. 2022, tau = 1."""
    low, high, here = (1 / (1 + math.exp(-x)) for x in (-3.0, 3.0, 6.0 * u - 3.0))
    return (high - here) / (high - low)


BETA_SCHEDULES: dict[str, Callable[[int, float, float], torch.Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": lambda n, beta_start, beta_end: betas_from_alpha_bar(n, cosine_alpha_bar),
    "sigmoid": sigmoid_betas,
    "laplace": lambda n, beta_start, beta_end: betas_from_alpha_bar(n, laplace_alpha_bar),
    "sigmoid_alpha_bar": lambda n, beta_start, beta_end: betas_from_alpha_bar(n, sigmoid_alpha_bar),
    "warmup10": lambda n, beta_start, beta_end: warmup_betas(n, beta_start, beta_end, 0.1),
    "warmup50": lambda n, beta_start, beta_end: warmup_betas(n, beta_start, beta_end, 0.5),
    "const": constant_betas,
    "jsd": jsd_betas,
}
BETA_SCHEDULE_ALIASES = {"cosine": "squaredcos_cap_v2", "quad": "scaled_linear"}
BETA_RANGES = ("linear", "scaled_linear", "sigmoid", "warmup10", "warmup50", "const")
"""The schedules between beta_start and beta_end: multiplying both multiplies every beta."""


def make_betas(
    beta_schedule: str, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> torch.Tensor:
    """Return the betas of a named schedule.

    Args:
        beta_schedule: A key of `BETA_SCHEDULES`, or its alias `cosine` or `quad`.
        num_timesteps: Number T of timesteps.
        beta_start: First beta of a schedule in `BETA_RANGES`; the others ignore it.
        beta_end: Last beta of a schedule in `BETA_RANGES`; the others ignore it.

    Returns:
        float64 tensor of shape (T,).

    Raises:
        ValueError: If the name is unknown, T < 1, or not 0 < beta_start <= beta_end <= 1.
    """
    name = BETA_SCHEDULE_ALIASES.get(str(beta_schedule), str(beta_schedule))
    if name not in BETA_SCHEDULES:
        names = ", ".join((*BETA_SCHEDULES, *BETA_SCHEDULE_ALIASES))
        raise ValueError(f"beta_schedule {beta_schedule!r} is unknown; choose one of {names}.")
    if whole_number("num_train_timesteps", num_timesteps) < 1:
        raise ValueError(f"num_train_timesteps is {num_timesteps}; it must be at least 1.")
    first = beta_end if name == "const" else beta_start
    are_numbers = isinstance(first, int | float) and isinstance(beta_end, int | float)
    if name in BETA_RANGES and not (are_numbers and 0 < first <= beta_end <= 1):
        raise ValueError(
            f"beta_start is {beta_start!r} and beta_end {beta_end!r}; they must be numbers with 0 < beta_start <="
            " beta_end <= 1. Pass decreasing betas as trained_betas."
        )
    return BETA_SCHEDULES[name](num_timesteps, beta_start, beta_end)


def scale_beta_range(beta_schedule: str, num_timesteps: int, beta_start: float, beta_end: float) -> tuple[float, float]:
    """Multiply beta_start and beta_end, tuned for T = 1000, by 1000 / T, which keeps the sum of the betas.

    The code of Nichol and Dhariwal 2021 does this for `linear`.

    Raises:
        ValueError: If the schedule is not in `BETA_RANGES`, or T is so small that a beta would exceed 1.
    """
    if BETA_SCHEDULE_ALIASES.get(beta_schedule, beta_schedule) not in BETA_RANGES:
        raise ValueError(
            f"scale_betas_to_timesteps does not apply to beta_schedule {beta_schedule!r}, only to a range of betas:"
            f" {', '.join(BETA_RANGES)}. Leave it out."
        )
    factor = 1000 / whole_number("num_train_timesteps", num_timesteps)
    if beta_end * factor > 1:
        raise ValueError(
            f"beta_end {beta_end} scaled by 1000 / {num_timesteps} is above 1; num_train_timesteps must be at least"
            f" {math.ceil(1000 * beta_end)}, or beta_end lower."
        )
    return beta_start * factor, beta_end * factor


def rescale_to_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Shift and scale sqrt(alpha_bar) so that its last value is exactly 0. Algorithm 1, Lin et al. 2024.

    Raises:
        ValueError: If there is only one beta.
    """
    if len(betas) < 2:
        raise ValueError("rescale_betas_zero_snr needs at least 2 timesteps; leave it out.")
    sqrt_alpha_bar = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = sqrt_alpha_bar[0], sqrt_alpha_bar[-1]
    alpha_bar = ((sqrt_alpha_bar - last) * first / (first - last)) ** 2
    ratio = alpha_bar / torch.cat([torch.ones(1, dtype=betas.dtype), alpha_bar[:-1]])
    return 1 - ratio.nan_to_num()  # 0 / 0 after the signal has reached 0


def shift_betas(betas: torch.Tensor, shift: float) -> torch.Tensor:
    """Multiply sqrt(1 - alpha_bar) / sqrt(alpha_bar) by `shift` at every timestep: log SNR falls by 2 log(shift).

    Section 3.1, Hoogeboom et al. 2023, where shift = resolution / 64.

    Raises:
        ValueError: If `shift` is not a positive number.
    """
    if real_number("schedule_shift", shift) <= 0:
        raise ValueError(f"schedule_shift is {shift}; it must be greater than 0, for example resolution / 64.")
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    shifted = alpha_bar / (alpha_bar + shift**2 * (1 - alpha_bar))
    before = torch.cat([torch.ones(1, dtype=betas.dtype), shifted[:-1]])
    return torch.where(before > 0, 1 - shifted / before, 1.0)


# Timesteps


def spaced_timesteps(spacing: str, num_inference_steps: int, num_train_timesteps: int, offset: int = 0) -> list[int]:
    """Return `num_inference_steps` descending timesteps.

    Args:
        spacing: `leading`, `trailing` or `linspace` (Table 2, Lin et al. 2024, in the arithmetic of diffusers), or
            `quadratic`, which puts more steps near t = 0 (appendix D.2, Song et al. 2021) and starts at T-1.
        num_inference_steps: Number n of steps, 1 ... T.
        num_train_timesteps: Number T of training timesteps.
        offset: Added to each timestep of `leading`.

    Raises:
        ValueError: If the spacing is unknown.
    """
    n, total = num_inference_steps, num_train_timesteps
    if spacing == "leading":
        ascending = np.arange(n) * (total // n) + offset
    elif spacing == "trailing":
        # arange with a float step may return one entry too many, which would be -1.
        ascending = np.round(np.arange(total, 0, -total / n))[:n][::-1] - 1
    elif spacing == "linspace":
        ascending = np.linspace(0, total - 1, n).round()
    elif spacing == "quadratic":
        ascending = np.round(np.linspace(0, 1, n) ** 2 * (total - 1)) if n > 1 else np.array([total - 1])
        # Rounding repeats small values: raise each one above its predecessor.
        ascending = np.maximum.accumulate(ascending - np.arange(n)) + np.arange(n)
    else:
        raise ValueError(
            f"timestep_spacing {spacing!r} is unknown; choose leading, trailing, linspace"
            " or, as an argument of set_timesteps or of the pipeline, quadratic; optimized is one of the pipeline only."
        )
    return [int(t) for t in ascending[::-1]]


def descending_timesteps(timesteps: Iterable[int], num_train_timesteps: int) -> list[int]:
    """Return timesteps of any kind as a list of ints.

    Raises:
        ValueError: If the list is empty, not strictly descending, outside 0 ... T-1, or not of whole numbers.
    """
    timesteps = timesteps.tolist() if isinstance(timesteps, torch.Tensor) else timesteps
    try:
        descending = [t if type(t) is int else whole_number("A timestep", t) for t in timesteps]
    except TypeError as error:
        raise ValueError(f"timesteps is {timesteps!r}; it must be a list of whole numbers.") from error
    if not descending:
        raise ValueError("timesteps is empty; at least one step is needed.")
    if descending != sorted(set(descending), reverse=True):
        raise ValueError("timesteps must be strictly descending.")
    if descending[0] >= num_train_timesteps or descending[-1] < 0:
        raise ValueError(
            f"timesteps run from {descending[0]} to {descending[-1]}, outside 0 ... {num_train_timesteps - 1};"
            " lower num_inference_steps or steps_offset, or change the list."
        )
    return descending


class InferenceTimesteps:
    """A descending list of timesteps: the tensor that a sampling loop iterates over, and the transition of each step.

    Args:
        schedule: The tables.
        timesteps: Strictly descending, each in 0 ... T-1.
        device: Device of the tensor.

    Raises:
        ValueError: If the list is empty, not strictly descending, out of range, or not of whole numbers.
    """

    def __init__(
        self, schedule: NoiseSchedule, timesteps: Iterable[int], device: str | torch.device | None = None
    ) -> None:
        timesteps = descending_timesteps(timesteps, len(schedule))
        self.columns = schedule.transition_columns(timesteps)
        self._row_of = {t: row for row, t in enumerate(timesteps)}
        with torch.inference_mode(False):  # inference tensors have no version counter
            self.timesteps = torch.tensor(timesteps, dtype=torch.int64, device=device)
        self._version = self.timesteps._version

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._row_of)

    @cached_property
    def transitions(self) -> list[Transition]:
        """The steps."""
        return rows_of(self.columns)

    def row(self, timestep: int | torch.Tensor) -> int:
        """Return the position of a timestep, without reading from the device if it is an element of `self.timesteps`.

        Raises:
            ValueError: If the timestep is not one number of the list.
        """
        value: Any = timestep
        if isinstance(timestep, torch.Tensor):
            if timestep.numel() != 1:
                raise ValueError(f"timestep has shape {tuple(timestep.shape)}; a step takes one for the whole batch.")
            offset = int(timestep.storage_offset()) - int(self.timesteps.storage_offset())
            is_element = (
                timestep.device == self.timesteps.device
                and timestep.dtype == self.timesteps.dtype
                and timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr()
                and self.timesteps._version == self._version  # no value was changed in place
                and 0 <= offset < len(self)
            )
            if is_element:
                return offset
            value = timestep.item()
        elif isinstance(value, np.ndarray) and value.ndim == 0:
            value = value.item()
        is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not is_number or value not in self._row_of:
            raise ValueError(
                f"timestep {value!r} is not in the list of {len(self)} timesteps being run"
                f" ({self.transitions[0].timestep} ... {self.transitions[-1].timestep}); call set_timesteps first."
            )
        return self._row_of[value]

    def transition(self, timestep: int | torch.Tensor) -> Transition:
        """Return the step from a timestep; see `row`."""
        return self.transitions[self.row(timestep)]


def whole_number(name: str, value: object) -> int:
    """Return a whole number of any numeric type as an int.

    Raises:
        ValueError: If it is not a whole number; the message begins with `name`.
    """
    try:
        number = int(value)  # type: ignore[call-overload]
        is_whole = number == value and not is_bool(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{name} is {value!r}; it must be a whole number.")
    return int(number)


def positive_number(name: str, value: object) -> int:
    """Return a whole number of at least 1 of any numeric type as an int.

    Raises:
        ValueError: If it is not; the message begins with `name`.
    """
    number = whole_number(name, value)
    if number < 1:
        raise ValueError(f"{name} is {number}; it must be a whole number, at least 1.")
    return number


def real_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """Return a finite number of any numeric type as a float.

    Raises:
        ValueError: If it is not a number from `low` to `high`; the message begins with `name`.
    """
    number = value.item() if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0 else value
    is_real = isinstance(number, numbers.Real) and not is_bool(number)
    if not (is_real and math.isfinite(number) and low <= number <= high):  # type: ignore[arg-type,operator]
        limits = "a finite number" if high == math.inf else f"a number from {low:g} to {high:g}"
        raise ValueError(f"{name} is {value!r}; it must be {limits}.")
    return float(number)  # type: ignore[arg-type]


def is_bool(value: object) -> bool:
    """Return whether a value, a scalar of numpy or a tensor is True or False, which would count as a number."""
    return isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) in (torch.bool, np.bool_)
