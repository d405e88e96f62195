"""The variance of a reverse step: fixed, or optimal for a trained network (Analytic-DPM), without training it again.

The optimum needs one number for each timestep of the training chain, Gamma_t = E |eps(x_t)|^2 / d, the second moment of
the network's prediction of the noise. They lie beside the scheduler's configuration as `reverse_variance.json`: beside
a safetensors file there, diffusers would take the whole repository for one without safetensors and not download its
weights. The configuration itself stays that of a fixed variance, which every scheduler of diffusers reads.
"""

import json
import math
import os
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from .gaussian import LEARNED_VARIANCE_TYPES, reverse_mean_coefficients
from .noise_schedule import NoiseSchedule, Transition

CORE_VERSION = "1.2.0"

VISIBLE_NOISE = 2 / 255 * math.sqrt(math.pi / 2)
"""Standard deviation of noise that changes a pixel by one of 256 gray levels on average: E |N(0, 1)| = sqrt(2 / pi)."""

FILE_NAME = "reverse_variance.json"
KEY = "eps_second_moments"


def analytic_variance(step: Transition, eta: float, second_moment: float) -> float:
    """Optimal variance of a reverse step. Theorem 1, Bao et al. 2022, for any two timesteps and eta.

    It is eta^2 times the posterior variance and, since x_0 is only predicted, the square of its factor in the mean
    times the variance that is left of x_0: (1 - alpha_bar) / alpha_bar (1 - Gamma), and at most 1, as data in [-1, 1]
    have.

    Args:
        step: The step.
        eta: 0 (DDIM) to 1 (DDPM).
        second_moment: Gamma_t; 1 is a network that knows the noise exactly, and so is what an estimate has above it.
    """
    coef_x_0, _ = reverse_mean_coefficients(step, eta)
    unexplained = max(1 - second_moment, 0.0)
    left = (1 - step.alpha_bar) * unexplained
    variance_of_x_0 = left / step.alpha_bar if left < step.alpha_bar else 1.0
    return eta**2 * step.posterior_variance + coef_x_0**2 * variance_of_x_0


class ReverseVariance:
    """The part of the scheduler that says how much noise a reverse step adds where the network does not.

    Attributes:
        analytic_variance: Whether the variance is the optimal one; False until it is set. With it a run of eta 0 adds
            noise too.
    """

    config: Any
    noise_schedule: NoiseSchedule
    _second_moments: torch.Tensor | None = None
    _uses_analytic = False

    @property
    def eps_second_moments(self) -> torch.Tensor | None:
        """Gamma_t of the network, float64 (T,) on the CPU, or None where it was never estimated."""
        return self._second_moments

    @eps_second_moments.setter
    def eps_second_moments(self, moments: torch.Tensor | None) -> None:
        if moments is None:
            self._second_moments, self._uses_analytic = None, False
            return
        moments = torch.as_tensor(moments).detach().to("cpu", torch.float64)
        if moments.shape != (len(self.noise_schedule),) or not bool((moments.isfinite() & (moments >= 0)).all()):
            raise ValueError(
                f"eps_second_moments has shape {tuple(moments.shape)}; it must be {len(self.noise_schedule)} finite"
                " numbers of at least 0, one for each timestep of the training chain."
            )
        if self.config["variance_type"] in LEARNED_VARIANCE_TYPES:
            raise ValueError(
                f"variance_type is {self.config['variance_type']}: the network says its own variance; the analytic one"
                " replaces a fixed one only."
            )
        self._second_moments = moments

    @property
    def analytic_variance(self) -> bool:
        """Whether the variance of a reverse step is the optimal one for the network."""
        return self._uses_analytic

    @analytic_variance.setter
    def analytic_variance(self, value: bool) -> None:
        if value and self._second_moments is None:
            raise ValueError(
                "analytic_variance needs the second moments of the network's prediction: ddpm-hf evaluate estimates"
                " them with --estimate_variance, or set eps_second_moments."
            )
        self._uses_analytic = bool(value)

    def fixed_variance(self, transition: Transition, eta: float = 1.0) -> float:
        """Variance of a reverse step that the network does not predict.

        Section 3.2, Ho et al. 2020, times eta^2; or the optimal one.
        """
        if self._uses_analytic:
            assert self._second_moments is not None
            return analytic_variance(transition, eta, float(self._second_moments[transition.timestep]))
        small = self.config["variance_type"] in ("fixed_small", "fixed_small_log")
        return eta**2 * (transition.posterior_variance if small else transition.beta)

    def sampling_variance(self, transition: Transition, last_timestep: int, eta: float = 1.0) -> float:
        """Variance of the noise that sampling adds: the fixed one, but an analytic one that would be seen is cut.

        What the step to the last timestep adds is left to one more step, which removes no more noise than x there
        holds by the forward process: more is seen in the image. Bao et al. 2022 therefore add at most a gray level
        there (y = 1 in their code); here the limit is that or what x holds, whichever is more, since a list that
        ends long before t = 0 needs its noise.

        Args:
            transition: The step.
            last_timestep: The last one of the list being run.
            eta: 0 (DDIM) to 1 (DDPM).
        """
        variance = self.fixed_variance(transition, eta)
        if self._uses_analytic and transition.previous_timestep == last_timestep:
            return min(variance, max(VISIBLE_NOISE**2, 1 - transition.alpha_bar_prev))
        return variance

    def save_second_moments(self, folder: str | PathLike[str]) -> None:
        """Writes Gamma beside the configuration, if it is known: the whole file or, where it is cut off, none of it."""
        if self._second_moments is None:
            return
        temporary = Path(folder) / f".{FILE_NAME}.writing"
        temporary.unlink(missing_ok=True)
        try:
            with temporary.open("x", encoding="utf-8") as file:  # a new file, never one that a link leads to
                file.write(json.dumps({KEY: self._second_moments.tolist()}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(Path(folder) / FILE_NAME)
        finally:
            temporary.unlink(missing_ok=True)

    def load_second_moments(self, file: str | PathLike[str]) -> None:
        """Reads Gamma.

        Raises:
            ValueError: The file is damaged, or of another chain.
        """
        try:
            moments = torch.tensor(json.loads(Path(file).read_text(encoding="utf-8"))[KEY], dtype=torch.float64)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{file} cannot be read ({error!r}); remove it and estimate it again.") from error
        self.eps_second_moments = moments


def second_moments_file(folder: str | PathLike[str]) -> Path:
    """Returns where Gamma lies in a saved pipeline: beside the scheduler's configuration.

    A folder without `scheduler/`, as the google/ddpm-* repositories are, has that at its top, as diffusers takes it.
    """
    nested = Path(folder) / "scheduler"
    return (nested if nested.is_dir() else Path(folder)) / FILE_NAME


def find_second_moments(name_or_path: str | PathLike[str], options: dict[str, Any]) -> Path | None:
    """Returns the file in a saved pipeline, or in the cache where a repository was just loaded from, if there is one.

    Args:
        name_or_path: Of the pipeline.
        options: The keyword arguments that it was loaded with.
    """
    if Path(name_or_path).is_dir():
        file = second_moments_file(name_or_path)
        return file if file.is_file() else None
    cached = try_to_load_from_cache(
        str(name_or_path),
        f"scheduler/{FILE_NAME}",
        cache_dir=options.get("cache_dir"),
        revision=options.get("revision"),
    )
    return Path(cached) if isinstance(cached, str) else None
