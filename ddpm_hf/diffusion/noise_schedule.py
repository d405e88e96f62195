"""The tables of a diffusion process, which follow from its betas; and betas by the name of their schedule.

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

CORE_VERSION = "1.2.0"

STOCK_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""The schedules that every scheduler of diffusers knows by name."""
LARGEST_BETA = 0.999
"""Of schedules by alpha_bar, as that may fall to 0, where no signal is left. Section 3.2, Nichol and Dhariwal 2021."""
SMALLEST_BETA = 1e-12
"""Float64 tells 1 - beta from 1 to four digits down to here."""


class Transition(NamedTuple):
    """One step from t to t', the next timestep of the list being run, as host floats: a step of a shorter chain.

    Attributes:
        timestep: t.
        previous_timestep: t', -1 for clean data.
        alpha_bar: alpha_bar_t.
        alpha_bar_prev: alpha_bar_t', 1 for clean data.
        beta: 1 - alpha_bar_t / alpha_bar_t', the beta of the shorter chain; beta_t only where t' = t-1.
        posterior_variance: beta (1 - alpha_bar_t') / (1 - alpha_bar_t), the beta~ of that chain; 0 for clean data.
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
        log_betas: log beta_t, the upper bound of the learned range.
        posterior_mean_coef_x_0: Eq. 7, Ho et al. 2020, factor of x_0.
        posterior_mean_coef_x_t: Eq. 7, Ho et al. 2020, factor of x_t.
        posterior_variance: Eq. 7, Ho et al. 2020; 0 at t = 0.
        posterior_log_variance: Its logarithm; at t = 0, where it would be -inf, that of t = 1, or, in a chain of one
            step, log beta_0.
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
        """Builds every table from the betas.

        Raises:
            ValueError: A beta is not a number from `SMALLEST_BETA` to 1.
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
        variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
        log_variance = variance.log()  # at t = 0 of 0, which no bound and no range of variances can take
        log_variance[0] = log_variance[1] if len(betas) > 1 else betas[0].log()
        return cls(
            betas=betas,
            alphas_cumprod=alpha_bar,
            sqrt_alphas_cumprod=alpha_bar.sqrt(),
            sqrt_one_minus_alphas_cumprod=(1 - alpha_bar).sqrt(),
            snr=alpha_bar / (1 - alpha_bar),
            log_betas=betas.log(),
            # Eq. 7: mu~_t = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x_0
            #             + sqrt(1 - beta_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t.
            posterior_mean_coef_x_0=alpha_bar_prev.sqrt() * betas / (1 - alpha_bar),
            posterior_mean_coef_x_t=(1 - betas).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar),
            posterior_variance=variance,
            posterior_log_variance=log_variance,
        )

    def __len__(self) -> int:
        """Returns T."""
        return len(self.betas)

    def transitions(self, timesteps: Sequence[int]) -> list[Transition]:
        """Returns one row for each step of a descending list of timesteps; the last one goes to alpha_bar = 1.

        From t to t', the next of the list (section 4, Nichol and Dhariwal 2021):
        beta = 1 - alpha_bar_t / alpha_bar_t' and beta~ = beta (1 - alpha_bar_t') / (1 - alpha_bar_t).
        """
        table: list[float] = self.alphas_cumprod.tolist()
        alpha_bar = [table[t] for t in timesteps]
        rows = zip(timesteps, [*timesteps[1:], -1], alpha_bar, [*alpha_bar[1:], 1.0], strict=True)
        transitions = []
        for t, previous, a, a_prev in rows:
            # Between two states without signal: fresh noise. Numbers near 1e-308 have too few digits for a ratio.
            beta = 1 - a / a_prev if a_prev > 1e-300 else 1.0
            posterior_variance = beta * (1 - a_prev) / (1 - a)
            transitions.append(Transition(t, previous, a, a_prev, beta, posterior_variance))
        return transitions


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
    """Betas of a continuous alpha_bar on [0, 1]: 1 - alpha_bar((i+1)/T) / alpha_bar(i/T), at most `LARGEST_BETA`."""
    points = [alpha_bar(i / num_timesteps) for i in range(num_timesteps + 1)]
    ratios = [after / before for before, after in itertools.pairwise(points)]
    return torch.tensor([min(1 - ratio, LARGEST_BETA) for ratio in ratios], dtype=torch.float64)


def cosine_alpha_bar(u: float) -> float:
    """cos^2(pi/2 (u + s) / (1 + s)), s = 0.008, up to a constant factor. Eq. 17, Nichol and Dhariwal 2021."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def laplace_alpha_bar(u: float) -> float:
    """sqrt(SNR / (1 + SNR)) with log SNR = -sign(1/2 - u) log(1 - 2 |1/2 - u|) / 2. Hang et al. 2024.

    The square root, which the paper does not take, and the 1e-6 that keeps it finite are those of diffusers.
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
"""The schedules that are a range of betas: multiplying beta_start and beta_end multiplies every beta."""


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
        ValueError: The name is unknown, T is no positive whole number, or 0 < beta_start <= beta_end <= 1 is not true.
    """
    name = BETA_SCHEDULE_ALIASES.get(str(beta_schedule), str(beta_schedule))
    if name not in BETA_SCHEDULES:
        names = ", ".join((*BETA_SCHEDULES, *BETA_SCHEDULE_ALIASES))
        raise ValueError(f"beta_schedule {beta_schedule!r} is unknown; choose one of {names}.")
    if whole_number("num_train_timesteps", num_timesteps) < 1:
        raise ValueError(f"num_train_timesteps is {num_timesteps}; it must be at least 1.")
    first = beta_end if name == "const" else beta_start
    numbers = isinstance(first, int | float) and isinstance(beta_end, int | float)
    if name in BETA_RANGES and not (numbers and 0 < first <= beta_end <= 1):
        raise ValueError(
            f"beta_start is {beta_start!r} and beta_end {beta_end!r}; they must be numbers with 0 < beta_start <="
            " beta_end <= 1. Betas that fall can be given as trained_betas."
        )
    return BETA_SCHEDULES[name](num_timesteps, beta_start, beta_end)


def scale_beta_range(beta_schedule: str, num_timesteps: int, beta_start: float, beta_end: float) -> tuple[float, float]:
    """Returns a range of betas, tuned to T = 1000, for another T: times 1000 / T, as the sum of the betas then stays.

    The code of Nichol and Dhariwal 2021 does so for `linear`; it means the same for every schedule in `BETA_RANGES`.

    Raises:
        ValueError: The schedule is no range, or T is so small that a beta would exceed 1.
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
    """Algorithm 1, Lin et al. 2024: shift and scale sqrt(alpha_bar) so that its last value is exactly 0.

    Raises:
        ValueError: There is only one beta: the first value cannot stay while the last becomes 0.
    """
    if len(betas) < 2:
        raise ValueError("rescale_betas_zero_snr needs at least 2 timesteps; leave it out.")
    sqrt_alpha_bar = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = sqrt_alpha_bar[0], sqrt_alpha_bar[-1]
    alpha_bar = ((sqrt_alpha_bar - last) * first / (first - last)) ** 2
    ratio = alpha_bar / torch.cat([torch.ones(1, dtype=betas.dtype), alpha_bar[:-1]])
    return 1 - ratio.nan_to_num()  # 0 / 0, where the signal had ended before: it stays away


def whole_number(name: str, value: object) -> int:
    """Returns a whole number of any numeric type as an int.

    Raises:
        ValueError: It is none; the sentence begins with `name`.
    """
    try:
        number = int(value)  # type: ignore[call-overload]
        is_whole = number == value and not isinstance(value, bool)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{name} is {value!r}; it must be a whole number.")
    return int(number)
