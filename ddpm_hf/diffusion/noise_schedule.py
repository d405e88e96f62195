"""Noise schedules: betas by name, and the tables that follow from them.

Everything here is float64 on the CPU and has no state. Legend, in the notation of Ho et al. 2020 with t = 0 ... T-1:
beta_t is the variance added at step t, alpha_bar_t = prod_{s <= t} (1 - beta_s), and alpha_bar_{-1} = 1 is clean data.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

CORE_VERSION = "1.0.0"

STOCK_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""The schedules that every scheduler of diffusers knows by name."""


def linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """Betas evenly spaced (Ho et al. 2020, section 4)."""
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def scaled_linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """Square roots of betas evenly spaced; `quad` in the code of Ho et al. 2020."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2


def sigmoid_betas(num_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """Betas on a sigmoid over [-6, 6] (Xu et al. 2022, GeoDiff)."""
    return torch.linspace(-6, 6, num_timesteps, dtype=torch.float64).sigmoid() * (beta_end - beta_start) + beta_start


def warmup_betas(num_timesteps: int, beta_start: float, beta_end: float, fraction: float) -> torch.Tensor:
    """Linear over the first `fraction` of the steps, then constant (code of Ho et al. 2020)."""
    betas = constant_betas(num_timesteps, beta_start, beta_end)
    num_warmup = int(num_timesteps * fraction)
    betas[:num_warmup] = linear_betas(num_warmup, beta_start, beta_end)
    return betas


def constant_betas(num_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """Every beta equal to `beta_end`."""
    return torch.full((num_timesteps,), beta_end, dtype=torch.float64)


def jsd_betas(num_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """1/T, 1/(T-1), ..., 1 (Sohl-Dickstein et al. 2015); the last step destroys all signal."""
    return 1 / torch.linspace(num_timesteps, 1, num_timesteps, dtype=torch.float64)


def betas_from_alpha_bar(
    num_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> torch.Tensor:
    """Betas of a continuous alpha_bar on [0, 1]: 1 - alpha_bar((i+1)/T) / alpha_bar(i/T), at most `max_beta`."""
    points = [alpha_bar(i / num_timesteps) for i in range(num_timesteps + 1)]
    ratios = [after / before for before, after in itertools.pairwise(points)]
    return torch.tensor([min(1 - ratio, max_beta) for ratio in ratios], dtype=torch.float64)


def cosine_alpha_bar(u: float) -> float:
    """Eq. 17, Nichol and Dhariwal 2021, up to a constant factor."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def laplace_alpha_bar(u: float) -> float:
    """Laplace noise schedule (Hang et al. 2024), with the clamping constant of diffusers."""
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    return math.sqrt(math.exp(log_snr) / (1 + math.exp(log_snr)))


def sigmoid_alpha_bar(u: float) -> float:
    """Sigmoid schedule of Jabri et al. 2022 (start -3, end 3, tau 1): exactly 1 at u = 0 and 0 at u = 1."""
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


def make_betas(
    beta_schedule: str, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> torch.Tensor:
    """Returns the betas of a named schedule.

    Args:
        beta_schedule: A key of `BETA_SCHEDULES`, or its alias `cosine` or `quad`.
        num_timesteps: Length T of the chain.
        beta_start: First beta, for the schedules that are a range of betas; ignored by those with a fixed formula.
        beta_end: Last beta, likewise.

    Returns:
        float64 tensor of shape (T,).

    Raises:
        ValueError: The name is unknown or T is not positive.
    """
    name = BETA_SCHEDULE_ALIASES.get(beta_schedule, beta_schedule)
    if name not in BETA_SCHEDULES:
        raise ValueError(f"beta_schedule {beta_schedule!r} is unknown; choose one of {', '.join(BETA_SCHEDULES)}.")
    if num_timesteps < 1:
        raise ValueError(f"num_train_timesteps is {num_timesteps}; it must be at least 1.")
    return BETA_SCHEDULES[name](num_timesteps, beta_start, beta_end)


def rescale_to_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Algorithm 1, Lin et al. 2024: shift and scale sqrt(alpha_bar) so that its last value is exactly 0."""
    sqrt_alpha_bar = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = sqrt_alpha_bar[0], sqrt_alpha_bar[-1]
    alpha_bar = ((sqrt_alpha_bar - last) * first / (first - last)) ** 2
    return 1 - alpha_bar / torch.cat([torch.ones(1, dtype=betas.dtype), alpha_bar[:-1]])


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


class Transition(NamedTuple):
    """One step x_t -> x_prev of a sampling run, as host floats."""

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
        alphas_cumprod_prev: alpha_bar_{t-1}, 1 at t = 0.
        sqrt_alphas_cumprod: The factor of x_0 in x_t.
        sqrt_one_minus_alphas_cumprod: The factor of the noise in x_t.
        snr: alpha_bar_t / (1 - alpha_bar_t).
        log_betas: log beta_t, the upper bound of the learned range.
        posterior_mean_coef_x_0: Eq. 7, Ho et al. 2020, factor of x_0.
        posterior_mean_coef_x_t: Eq. 7, Ho et al. 2020, factor of x_t.
        posterior_variance: Eq. 7, Ho et al. 2020; 0 at t = 0.
        posterior_log_variance: Its logarithm, with the value of t = 1 at t = 0, where it would be -inf.
    """

    betas: torch.Tensor
    alphas_cumprod: torch.Tensor
    alphas_cumprod_prev: torch.Tensor
    sqrt_alphas_cumprod: torch.Tensor
    sqrt_one_minus_alphas_cumprod: torch.Tensor
    snr: torch.Tensor
    log_betas: torch.Tensor
    posterior_mean_coef_x_0: torch.Tensor
    posterior_mean_coef_x_t: torch.Tensor
    posterior_variance: torch.Tensor
    posterior_log_variance: torch.Tensor

    @classmethod
    def from_betas(cls, betas: torch.Tensor | Sequence[float]) -> "NoiseSchedule":
        """Builds every table from the betas.

        Raises:
            ValueError: A beta is outside (0, 1] or not a number.
        """
        betas = torch.as_tensor(betas, dtype=torch.float64)
        bad = ~((betas > 0) & (betas <= 1))
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas must be one non-empty list of numbers, not of shape {tuple(betas.shape)}.")
        if bad.any():
            t = int(bad.nonzero()[0])
            raise ValueError(f"beta at timestep {t} is {betas[t].item()}; every beta must be above 0 and at most 1.")
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
        log_variance = variance.clamp(min=1e-20).log()
        log_variance[0] = log_variance[min(1, len(betas) - 1)]
        return cls(
            betas=betas,
            alphas_cumprod=alpha_bar,
            alphas_cumprod_prev=alpha_bar_prev,
            sqrt_alphas_cumprod=alpha_bar.sqrt(),
            sqrt_one_minus_alphas_cumprod=(1 - alpha_bar).sqrt(),
            snr=alpha_bar / (1 - alpha_bar),
            log_betas=betas.log(),
            posterior_mean_coef_x_0=alpha_bar_prev.sqrt() * betas / (1 - alpha_bar),
            posterior_mean_coef_x_t=(1 - betas).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar),
            posterior_variance=variance,
            posterior_log_variance=log_variance,
        )

    def __len__(self) -> int:
        """Returns T."""
        return len(self.betas)

    def transitions(self, timesteps: Sequence[int]) -> list[Transition]:
        """Returns one row for each step of a descending list of timesteps; the last one goes to alpha_bar = 1."""
        table: list[float] = self.alphas_cumprod.tolist()
        alpha_bar = [table[t] for t in timesteps]
        rows = zip(timesteps, [*timesteps[1:], -1], alpha_bar, [*alpha_bar[1:], 1.0], strict=True)
        transitions = []
        for t, previous, a, a_prev in rows:
            beta = 1 - a / a_prev if a_prev > 0 else 1.0  # between two states without signal: fresh noise
            transitions.append(Transition(t, previous, a, a_prev, beta, beta * (1 - a_prev) / (1 - a)))
        return transitions


class SamplingRun:
    """A list of timesteps in use: the tensor that loops iterate over, and one row of host floats a step.

    Args:
        schedule: The tables.
        timesteps: Strictly descending, within the chain.
        device: Where the tensor shall lie.

    Raises:
        ValueError: The list is empty, unordered or out of range.
    """

    def __init__(
        self, schedule: NoiseSchedule, timesteps: Sequence[int], device: str | torch.device | None = None
    ) -> None:
        if len(timesteps) == 0:
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
        if isinstance(timestep, torch.Tensor):
            if timestep.numel() != 1:
                raise ValueError(f"timestep has shape {tuple(timestep.shape)}; a step takes one for the whole batch.")
            if self._owns(timestep):
                return int(timestep.storage_offset()) - int(self.timesteps.storage_offset())
            timestep = timestep.item()  # type: ignore[assignment]
        row = self._row_of.get(int(timestep)) if timestep == int(timestep) else None
        if row is None:
            raise ValueError(
                f"timestep {timestep} is not in the list of {len(self.transitions)} timesteps being run"
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
