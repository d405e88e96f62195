"""The scheduler: ancestral DDPM (eta = 1) to deterministic DDIM (eta = 0), with the configuration of DDPMScheduler.

Tables are float64. A step reads no device tensor and computes in float32, or in float64 for a float64 sample, whatever
the dtype of the model output. `docs/compatibility.md` of ddpm_hf lists every difference from diffusers.
"""

import inspect
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from . import gaussian
from .gaussian import LEARNED_VARIANCE_TYPES
from .schedule import (
    BETA_SCHEDULE_ALIASES,
    SMALLEST_ALPHA_BAR,
    STOCK_BETA_SCHEDULES,
    InferenceTimesteps,
    NoiseSchedule,
    Transition,
    make_betas,
    rescale_to_zero_terminal_snr,
    scale_beta_range,
    shift_betas,
    spaced_timesteps,
    whole_number,
)

PREDICTION_TYPE_ALIASES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
CHOICES: dict[str, tuple[str | bool, ...]] = {
    "beta_schedule": (*STOCK_BETA_SCHEDULES, "sigmoid", "laplace"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", *LEARNED_VARIANCE_TYPES),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "clip_sample": (True, False),
    "thresholding": (True, False),
    "rescale_betas_zero_snr": (True, False),
}
_SWITCHES = tuple(name for name, choices in CHOICES.items() if choices == (True, False))
_PROCESS_OPTIONS = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
}
_CREATE = " GaussianDiffusionScheduler.create also takes aliases and every schedule in schedule.py."
_HINTS = {
    "beta_schedule": _CREATE,
    "prediction_type": _CREATE,
    "timestep_spacing": " Pass quadratic to set_timesteps instead.",
}
_RANGES: dict[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {
    "num_train_timesteps": ((int,), lambda value: value >= 1, "a whole number of at least 1"),
    "steps_offset": ((int,), lambda value: value >= 0, "a whole number of at least 0"),
    "clip_sample_range": ((int, float), lambda value: value > 0, "a number above 0"),
    "sample_max_value": ((int, float), lambda value: value > 0, "a number above 0"),
    "dynamic_thresholding_ratio": ((int, float), lambda value: 0 <= value <= 1, "a number between 0 and 1"),
}

VISIBLE_NOISE = 2 / 255 * math.sqrt(math.pi / 2)
"""Standard deviation of noise that changes a pixel by one of 256 gray levels on average: E |N(0, 1)| = sqrt(2 / pi)."""
SECOND_MOMENTS_FILE = "reverse_variance.json"
"""Stored beside the scheduler's configuration. Not a safetensors file: if there were one in `scheduler/`, diffusers
would skip the weights of the network in a download."""
SECOND_MOMENTS_KEY = "eps_second_moments"
_SMALLEST_ALPHA = math.sqrt(SMALLEST_ALPHA_BAR)
NATIVE_SCHEDULER = "GaussianDiffusionScheduler"
DEFAULT_STEPS = "default_num_inference_steps"
"""Key in the configuration of any scheduler: steps of a pipeline call that is given none, of a distilled model."""
DISTILLED_GUIDANCE = "distilled_guidance_scale"
"""Key in the configuration of any scheduler: guidance scale of the teacher of a distilled model."""


def _is_other_warning(record: logging.LogRecord) -> bool:
    """Return False for the warning of diffusers that a scheduler ignores the keys above, which a pipeline reads."""
    ignored = re.match(r"The config attributes \{(.*)\} were passed to", record.getMessage())
    names = re.findall(r"'(\w+)':", ignored[1]) if ignored else []
    return not names or not set(names) <= {DEFAULT_STEPS, DISTILLED_GUIDANCE}


logging.getLogger("diffusers.configuration_utils").addFilter(_is_other_warning)


@dataclass(init=False)
class GaussianDiffusionSchedulerOutput(BaseOutput):
    """Output of `step`.

    Attributes:
        prev_sample: x at the previous timestep, in the dtype of the sample.
        pred_original_sample: The predicted x_0, clipped if the scheduler clips, in the dtype of the sample.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor

    def __init__(self, prev_sample: torch.Tensor, pred_original_sample: torch.Tensor) -> None:
        # BaseOutput looks up the fields of every object, which takes as long as two of the seven tensor operations.
        self["prev_sample"] = prev_sample
        self["pred_original_sample"] = pred_original_sample


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0): the mean has the shape of the samples, the other two broadcast to it."""

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor


class ReverseStep(NamedTuple):
    """The coefficients of one step of a run, in Python floats.

    Attributes:
        alpha: Factor of x_0 in x_t.
        sigma: Factor of the noise in x_t.
        coef_x_0: Factor of x_0 in the mean of the previous sample.
        coef_x_t: Factor of x_t in it, or of the predicted noise without `use_clipped_model_output`.
        deviation: Standard deviation of the noise, unless the network predicts it.
        log_variances: Log-variance of a learned variance at the outputs -1 and 1.
        adds_noise: Whether the step draws noise.
        eta: 0 (DDIM) to 1 (DDPM).
        use_clipped_model_output: Whether the noise in the mean is that of the clipped x_0.
    """

    alpha: float
    sigma: float
    coef_x_0: float
    coef_x_t: float
    deviation: float
    log_variances: tuple[float, float]
    adds_noise: bool
    eta: float
    use_clipped_model_output: bool


class GaussianDiffusionScheduler(SchedulerMixin, ConfigMixin):
    """Forward and reverse process of a DDPM.

    The configuration has the keys, values and defaults of `diffusers.DDPMScheduler`, so each class reads the
    `scheduler_config.json` of the other. `create` also accepts the common aliases and the schedules that diffusers
    lacks.

    Args:
        num_train_timesteps: Number T of training timesteps.
        beta_start: First beta of `linear`, `scaled_linear` and `sigmoid`.
        beta_end: Last beta of `linear`, `scaled_linear` and `sigmoid`.
        beta_schedule: `linear`, `scaled_linear`, `squaredcos_cap_v2`, `sigmoid` or `laplace`.
        trained_betas: T betas that replace the schedule.
        variance_type: `fixed_small` (posterior variance) or `fixed_large` (beta), each also as `_log` with the same
            meaning; `learned` (the second half of the output channels is a log-variance) or `learned_range` (it
            interpolates between the two fixed ones).
        clip_sample: Clip the predicted x_0 in every step.
        prediction_type: `epsilon`, `sample` (x_0) or `v_prediction`.
        thresholding: Use dynamic thresholding (Saharia et al. 2022) instead of clipping.
        dynamic_thresholding_ratio: Quantile of |x_0| that becomes the threshold.
        clip_sample_range: Clip to [-range, range].
        sample_max_value: Upper limit of the dynamic threshold.
        timestep_spacing: `leading`, `trailing` or `linspace`.
        steps_offset: Added to the timesteps of `leading`.
        rescale_betas_zero_snr: Rescale the betas so that x_T contains no signal (Lin et al. 2024).

    Raises:
        ValueError: If an option is unknown or out of range, or the betas are not T numbers in (0, 1].
    """

    _compatibles: ClassVar[list[str]] = [e.name for e in KarrasDiffusionSchedulers]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        # from_config of another class drops values recorded as defaults and takes its own instead. Without the record,
        # a swap in memory keeps them, as a swap through a saved folder does.
        config = {name: _as_json(name, value) for name, value in self.config.items() if name != "_use_default_values"}
        self._internal_dict = FrozenDict(config)
        _check_config(config)
        named = [config[name] for name in ("beta_schedule", "num_train_timesteps", "beta_start", "beta_end")]
        schedule = NoiseSchedule.from_betas(make_betas(*named) if trained_betas is None else trained_betas)
        if config["rescale_betas_zero_snr"]:
            schedule = NoiseSchedule.from_betas(rescale_to_zero_terminal_snr(schedule.betas))
        self._eta, self._use_clipped_model_output = 1.0, True
        self._set_noise_schedule(schedule, range(len(schedule))[::-1])
        # Read by code written for DDPMScheduler, not here.
        self.custom_timesteps = False
        self.num_inference_steps: int | None = None

        # A pipeline of diffusers saves a part as [library of part.__module__, part.__class__.__name__]. Here, these are
        # the stock scheduler's, which every process can load; `type` still returns this class. Exceptions are
        # subclasses, and `learned`, with which the stock scheduler cannot sample.
        if type(self) is GaussianDiffusionScheduler and variance_type != "learned":
            self.__module__ = "diffusers"

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class under whose name diffusers saves this scheduler; calling it creates a native one."""
        return _SavedAsStock if "__module__" in vars(self) else type(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by type, which the default requires to be `__class__`."""
        return object.__new__, (type(self),), vars(self)

    @classmethod
    def create(
        cls,
        *,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        scale_betas_to_timesteps: bool = False,
        schedule_shift: float = 1.0,
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        **options: Any,
    ) -> "GaussianDiffusionScheduler":
        """Create a scheduler whose configuration every scheduler of diffusers can read.

        Aliases (`cosine`, `quad`, `eps`, `x0`, `v`) are stored under the names of diffusers, `fixed_large_log` as
        `fixed_large`, and a schedule that some scheduler of diffusers lacks (`sigmoid`, `laplace`, `sigmoid_alpha_bar`,
        `warmup10`, `warmup50`, `const`, `jsd`) as `trained_betas`.

        Args:
            num_train_timesteps: Number T of training timesteps.
            beta_schedule: A key of `BETA_SCHEDULES`, or an alias.
            beta_start: First beta of a schedule in `BETA_RANGES`.
            beta_end: Last beta of a schedule in `BETA_RANGES`.
            scale_betas_to_timesteps: Multiply beta_start and beta_end by 1000 / T, so that about the same signal is
                left at the last timestep for any T. The product is stored. See `scale_beta_range`.
            schedule_shift: Factor of the noise-to-signal ratio sqrt(1 - alpha_bar) / sqrt(alpha_bar), such as
                resolution / 64 (Hoogeboom et al. 2023). Other values than 1 are stored as `trained_betas`.
            trained_betas: T betas instead of a schedule.
            prediction_type: `epsilon` (`eps`), `sample` (`x0`) or `v_prediction` (`v`).
            variance_type: As in the constructor.
            **options: Any other option of the constructor.

        Raises:
            ValueError: If an option is unknown, out of range, or has no effect beside another one.
        """
        beta_schedule = BETA_SCHEDULE_ALIASES.get(str(beta_schedule), beta_schedule)
        is_shifted = schedule_shift != 1
        if trained_betas is not None and (beta_schedule != "linear" or scale_betas_to_timesteps or is_shifted):
            raise ValueError(
                "trained_betas replaces beta_schedule, scale_betas_to_timesteps and schedule_shift; leave these out."
            )
        if scale_betas_to_timesteps:
            beta_start, beta_end = scale_beta_range(beta_schedule, num_train_timesteps, beta_start, beta_end)
        if beta_schedule not in STOCK_BETA_SCHEDULES or is_shifted:
            betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
            trained_betas = (shift_betas(betas, schedule_shift) if is_shifted else betas).tolist()
            beta_schedule = "linear"
        scheduler: GaussianDiffusionScheduler = cls(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            prediction_type=PREDICTION_TYPE_ALIASES.get(str(prediction_type), prediction_type),
            variance_type="fixed_large" if variance_type == "fixed_large_log" else variance_type,
            **options,
        )
        return scheduler

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Create a scheduler from the configuration of this or another class; see `SchedulerMixin`.

        Defaults of the other class and its positional arguments are kept, as they are after a save; diffusers would
        replace them by the defaults of this class. None becomes the default, as for the variance_type of DPM-Solver,
        and False for `clip_sample`, `thresholding` and `rescale_betas_zero_snr`.
        """
        if isinstance(config, Mapping):
            kept = (name for name in config if name in _SWITCHES or config[name] is not None)
            config = {name: config[name] for name in kept if name != "_use_default_values"}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def register_to_config(self, **options: Any) -> None:
        """Change options of the configuration; see `ConfigMixin`.

        Raises:
            ValueError: If the betas would be others, which the tables of a scheduler do not follow.
        """
        if "noise_schedule" in vars(self):
            for name in _PROCESS_OPTIONS & options.keys():
                if not np.array_equal(_as_json(name, options[name]), self.config[name]):
                    raise ValueError(
                        f"{name} of a scheduler cannot be changed; create another one with"
                        f" from_config(scheduler.config, {name}=...)."
                    )
        super().register_to_config(**options)

    def __len__(self) -> int:
        """Return the number of training timesteps."""
        return len(self.noise_schedule)

    @property
    def variance_type(self) -> str:
        """The configured variance type."""
        return str(self.config["variance_type"])

    # The public tables of DDPMScheduler. Code assigns them: moved to another device, or those of another process.

    @property
    def betas(self) -> torch.Tensor:
        """beta_t, float32 (T,). Assigning other values than the present ones changes the process.

        This also holds for `alphas` and `alphas_cumprod`. The others follow, and the configuration gets the new
        `trained_betas`, so that a save or a swap keeps them. Second moments are dropped: they are those of the former
        process.

        Raises:
            ValueError: If they are not T numbers that give betas in (0, 1].
        """
        return self._public_tables["betas"]

    @betas.setter
    def betas(self, values: torch.Tensor) -> None:
        self._assign_table("betas", values)

    @property
    def alphas(self) -> torch.Tensor:
        """1 - beta_t, float32 (T,). May be assigned; see `betas`."""
        return self._public_tables["alphas"]

    @alphas.setter
    def alphas(self, values: torch.Tensor) -> None:
        self._assign_table("alphas", values)

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """alpha_bar_t, float32 (T,). May be assigned; see `betas`."""
        return self._public_tables["alphas_cumprod"]

    @alphas_cumprod.setter
    def alphas_cumprod(self, values: torch.Tensor) -> None:
        self._assign_table("alphas_cumprod", values)

    @property
    def one(self) -> torch.Tensor:
        """alpha_bar of clean data, which is 1."""
        return torch.tensor(1.0)

    @one.setter
    def one(self, value: float | torch.Tensor) -> None:
        if value != 1:
            raise ValueError(f"one is alpha_bar after the last step, which leads to clean data; it cannot be {value}.")

    @property
    def num_train_timesteps(self) -> int:
        """Number T of training timesteps."""
        return len(self)

    @num_train_timesteps.setter
    def num_train_timesteps(self, value: int) -> None:
        if value != len(self):
            raise ValueError(
                f"num_train_timesteps cannot be changed from {len(self)} to {value!r}; create another scheduler with"
                f" from_config(scheduler.config, num_train_timesteps={value!r})."
            )

    def _set_noise_schedule(self, schedule: NoiseSchedule, timesteps: Iterable[int], device: Any = None) -> None:
        """Take the tables of a process, and begin a run of it."""
        self.noise_schedule = schedule
        self._public_tables = {
            "betas": schedule.betas.float(),
            "alphas": (1 - schedule.betas).float(),
            "alphas_cumprod": schedule.alphas_cumprod.float(),
        }
        self._device_tables: dict[tuple[str, torch.device, torch.dtype], torch.Tensor] = {}
        self._eps_second_moments: torch.Tensor | None = None
        self._analytic_variance = False
        self._begin_run(InferenceTimesteps(schedule, timesteps, device))

    def _assign_table(self, name: str, values: torch.Tensor) -> None:
        """Replace a public table, and the process if the values are others. See `betas`."""
        values = torch.as_tensor(values)
        table = values.detach().to("cpu", torch.float64)
        exact = {
            "betas": self.noise_schedule.betas,
            "alphas": 1 - self.noise_schedule.betas,
            "alphas_cumprod": self.noise_schedule.alphas_cumprod,
        }[name]
        # The present table in half precision or float32, or a float32 product of as many factors.
        dtype = values.dtype if values.is_floating_point() else torch.float32
        rounding = max(
            torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * len(exact) ** (name == "alphas_cumprod")
        )
        if table.shape != exact.shape or not bool(((table - exact).abs() <= rounding * exact).all()):
            if name == "alphas_cumprod" and table.ndim == 1:
                before = torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
                betas = torch.where(before > 0, 1 - table / before, 1.0)
            else:
                betas = table if name == "betas" else 1 - table
            try:
                schedule = NoiseSchedule.from_betas(betas)
                if len(schedule) != len(self):
                    raise ValueError(f"There are {len(schedule)} values for {len(self)} training timesteps.")
            except ValueError as error:
                raise ValueError(f"{name} cannot be assigned: {error}") from error
            super().register_to_config(trained_betas=schedule.betas.tolist(), rescale_betas_zero_snr=False)
            self._set_noise_schedule(schedule, self.timesteps.tolist(), self.timesteps.device)
        self._public_tables[name] = values

    # Tables for batches: each sample has its own timestep, which is never read on the host.

    def gather(self, name: str, timesteps: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Look up a table for each sample.

        Args:
            name: A table of `NoiseSchedule`, for example `snr`.
            timesteps: (batch,), or one timestep for all samples; integers on any device. A single sample may have many.
            like: Samples (batch, ...) to which the result broadcasts.

        Returns:
            (batch, 1, ...) on the device of `like`, float32, or float64 if `like` is.

        Raises:
            ValueError: If the timesteps are not integers, or neither one nor one per sample. On the CPU also if one is
                out of range; on a GPU that is a device-side assertion.
        """
        device, dtype = like.device, compute_dtype(like)
        table = self._device_tables.get((name, device, dtype))
        if table is None:
            table = getattr(self.noise_schedule, name).to(device, dtype)
            self._device_tables[name, device, dtype] = table
        index = _as_index(timesteps, device).reshape(-1)
        if len(index) != len(like) and 1 not in (len(index), len(like)):
            raise ValueError(f"There are {len(index)} timesteps for {len(like)} samples; pass one for all or for each.")
        try:
            return table.index_select(0, index).view(-1, *[1] * (like.ndim - 1))
        except IndexError as error:
            raise ValueError(f"A timestep is outside 0 ... {len(self) - 1}.") from error

    def snr(self, timesteps: int | torch.Tensor) -> torch.Tensor:
        """Return the signal-to-noise ratio alpha_bar / (1 - alpha_bar), float32, in the shape of the timesteps."""
        index = _as_index(timesteps)
        return self.gather("snr", index, torch.empty(index.numel(), device=index.device)).view(index.shape)

    def _alpha_sigma(self, timesteps: int | torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha = self.gather("sqrt_alphas_cumprod", timesteps, like)
        return alpha, self.gather("sqrt_one_minus_alphas_cumprod", timesteps, like)

    # The forward process

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        """Return x_t of q(x_t | x_0) for the given noise.

        Args:
            original_samples: x_0 in [-1, 1], (batch, ...), of any floating-point dtype.
            noise: Standard normal noise in the shape of the samples.
            timesteps: (batch,), or one for all samples; integers in [0, T) on any device.

        Returns:
            x_t in shape, dtype and device of the samples, computed in float32, or in float64 for float64 samples.

        Raises:
            ValueError: If the samples are not floating-point, or the timesteps do not fit; see `gather`.
        """
        dtype = compute_dtype(original_samples)
        alpha, sigma = self._alpha_sigma(timesteps, original_samples)
        x_t = gaussian.q_sample(original_samples.to(dtype), noise.to(dtype), alpha, sigma)
        return x_t.to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor) -> torch.Tensor:
        """Return the target of v-prediction, with x_0 as `sample`; arguments and result as in `add_noise`."""
        dtype = compute_dtype(sample)
        alpha, sigma = self._alpha_sigma(timesteps, sample)
        v = gaussian.velocity(sample.to(dtype), noise.to(dtype), alpha, sigma)
        return v.to(sample.dtype)

    def posterior(self, x_0: torch.Tensor, x_t: torch.Tensor, timesteps: int | torch.Tensor) -> Posterior:
        """Return q(x_{t-1} | x_t, x_0) between consecutive training timesteps. Eq. 6 and 7, Ho et al. 2020.

        Args:
            x_0: Clean samples, or a prediction of them, (batch, ...).
            x_t: Noised samples in the same shape, of any floating-point dtype.
            timesteps: (batch,), or one for all samples; integers in [0, T) on any device.

        Returns:
            Mean in the shape of x_t, variance and log-variance in (batch, 1, ...), all in float32, or in float64 for a
            float64 x_t. At t = 0 the variance is 0; see `NoiseSchedule.posterior_log_variance` for its logarithm.

        Raises:
            ValueError: If x_t is not floating-point, or the timesteps do not fit; see `gather`.
        """
        dtype = compute_dtype(x_t)
        coef_x_0 = self.gather("posterior_mean_coef_x_0", timesteps, x_t)
        coef_x_t = self.gather("posterior_mean_coef_x_t", timesteps, x_t)
        return Posterior(
            mean=gaussian.posterior_mean(x_0.to(dtype), x_t.to(dtype), coef_x_0, coef_x_t),
            variance=self.gather("posterior_variance", timesteps, x_t),
            log_variance=self.gather("posterior_log_variance", timesteps, x_t),
        )

    # Predictions of the network

    def split_variance(self, model_output: torch.Tensor, x_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Split a model output into prediction and variance channels; the latter are None for a fixed variance.

        Args:
            model_output: (batch, channels, ...), with twice the channels of x_t for a learned variance.
            x_t: Input samples of the network, (batch, channels, ...); only their shape is used.

        Raises:
            ValueError: If the output does not have the shape that variance_type needs.
        """
        learned = self.config["variance_type"] in LEARNED_VARIANCE_TYPES
        expected = x_t.shape
        if learned:
            expected = torch.Size([*expected[:1], *(2 * channels for channels in expected[1:2]), *expected[2:]])
        if model_output.shape != expected:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)} for a sample of {tuple(x_t.shape)}; variance_type"
                f" {self.config['variance_type']} needs {tuple(expected)}. Change variance_type, or the network's"
                " out_channels."
            )
        if not learned:
            return model_output, None
        output, variance_output = model_output.chunk(2, dim=1)
        return output, variance_output

    def predict_original_sample(
        self, model_output: torch.Tensor, timesteps: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Return the predicted x_0, without clipping.

        Args:
            model_output: (batch, channels, ...), with twice the channels for a learned variance, which is ignored.
            timesteps: (batch,), or one for all samples; integers in [0, T) on any device.
            sample: x_t, (batch, channels, ...), of any floating-point dtype.

        Returns:
            x_0 in shape, dtype and device of the sample, computed in float32, or in float64 for a float64 sample. Not
            finite for `epsilon` at a timestep without signal.

        Raises:
            ValueError: If the output has the wrong shape, the sample is not floating-point, or the timesteps do not
                fit; see `gather`.
        """
        output, _ = self.split_variance(model_output.to(compute_dtype(sample)), sample)
        x_t = sample.to(output.dtype)
        x_0 = gaussian.predict_x_0(self.config["prediction_type"], output, x_t, *self._alpha_sigma(timesteps, x_t))
        return x_0.to(sample.dtype)

    def predict_noise(
        self, model_output: torch.Tensor, timesteps: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Return the predicted noise; arguments and dtypes as in `predict_original_sample`."""
        output, _ = self.split_variance(model_output.to(compute_dtype(sample)), sample)
        x_t = sample.to(output.dtype)
        eps = gaussian.predict_eps(self.config["prediction_type"], output, x_t, *self._alpha_sigma(timesteps, x_t))
        return eps.to(sample.dtype)

    def clip(self, x_0: torch.Tensor) -> torch.Tensor:
        """Threshold or clip a predicted x_0 as configured."""
        if self.config["thresholding"]:
            ratio, max_value = self.config["dynamic_thresholding_ratio"], self.config["sample_max_value"]
            return gaussian.dynamic_threshold(x_0, ratio, max_value)
        if self.config["clip_sample"]:
            return x_0.clamp(-self.config["clip_sample_range"], self.config["clip_sample_range"])
        return x_0

    # Timesteps of the reverse process

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
        *,
        timestep_spacing: str | None = None,
        eta: float = 1.0,
        use_clipped_model_output: bool = True,
    ) -> None:
        """Set the timesteps of the reverse process, and what kind of process it is.

        Args:
            num_inference_steps: Number of steps, spaced by `timestep_spacing`.
            device: Device of `timesteps`; the device of the samples avoids a copy in every step.
            timesteps: A custom strictly descending list, instead of a number.
            timestep_spacing: Overrides the configured spacing; may also be `quadratic`.
            eta: From 0 (deterministic, DDIM) to 1 (ancestral, DDPM).
            use_clipped_model_output: Whether the noise in the mean of a step is that of the clipped x_0, as in DDPM.
                False takes the noise that the network predicts, as `DDIMScheduler` does by default. Without clipping
                both are equal.

        Raises:
            ValueError: If both or neither of number and list are given, they do not fit the training timesteps, or eta
                is outside [0, 1].
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Pass either num_inference_steps or timesteps, not both and not neither.")
        if timesteps is not None and timestep_spacing is not None:
            raise ValueError("timestep_spacing does not apply to a custom list of timesteps; drop one of the two.")
        chosen = timesteps
        if chosen is None:
            count = whole_number("num_inference_steps", num_inference_steps)
            if not 1 <= count <= len(self):
                raise ValueError(f"num_inference_steps {count} is not between 1 and {len(self)}.")
            spacing = self.config["timestep_spacing"] if timestep_spacing is None else timestep_spacing
            chosen = spaced_timesteps(spacing, count, len(self), self.config["steps_offset"])
        run = InferenceTimesteps(self.noise_schedule, chosen, device)
        self._eta, self._use_clipped_model_output = _check_eta(eta), bool(use_clipped_model_output)
        self._begin_run(run)
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(run)

    def _begin_run(self, run: InferenceTimesteps) -> None:
        self._inference = run
        self._compute_rows()

    def _compute_rows(self) -> None:
        """Compute the coefficients of the steps of the run, which depend on the configuration."""
        _check_config(self._internal_dict)
        self._rows = self._make_rows(self._eta, self._use_clipped_model_output)
        self._other_rows: tuple[tuple[float, bool], list[ReverseStep]] | None = None
        self._config_of_rows = self._internal_dict

    @property
    def timesteps(self) -> torch.Tensor:
        """The timesteps of the reverse process, int64 and descending. May be assigned."""
        return self._inference.timesteps

    @timesteps.setter
    def timesteps(self, timesteps: torch.Tensor | list[int]) -> None:
        device = timesteps.device if isinstance(timesteps, torch.Tensor) else None
        chosen = timesteps.tolist() if isinstance(timesteps, torch.Tensor) else timesteps
        self._begin_run(InferenceTimesteps(self.noise_schedule, chosen, device))

    def previous_timestep(self, timestep: int | torch.Tensor) -> torch.Tensor:
        """Return the next timestep of the list, -1 after the last, as a CPU tensor in the shape of the argument."""
        transition = self._inference.transition
        if isinstance(timestep, torch.Tensor) and timestep.numel() != 1:
            previous = [transition(t).previous_timestep for t in timestep.flatten().tolist()]
            return torch.tensor(previous).view(timestep.shape)
        return torch.tensor(transition(timestep).previous_timestep)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Do nothing: steps may be called in any order. Some pipelines of diffusers call this."""

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Return the sample unchanged."""
        return sample

    # The reverse process

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> GaussianDiffusionSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Go from x_t to x at the next timestep of the list, or to x_0 after the last. The last step adds no noise.

        Pipelines of diffusers look for `eta` among the named arguments of `step`, and pass their default 0 to a
        scheduler that has it. As DDPMScheduler has none, it is not named here.

        Args:
            model_output: Output of the network, (batch, channels, ...), twice the channels for a learned variance.
            timestep: An element of `timesteps`, or its value; pass the int under torch.compile.
            sample: x_t, (batch, channels, ...).
            generator: Source of the noise, or one for each sample.
            return_dict: Return an output object instead of the tuple (prev_sample, pred_original_sample).
            **options: `eta` and `use_clipped_model_output` override those of `set_timesteps` for this step.

        Raises:
            ValueError: If the timestep is not in the list, eta is outside [0, 1], the channels do not fit
                variance_type, or the network predicts noise and x_t contains no signal.
        """
        row = self._inference.row(timestep)
        if self._config_of_rows is not self._internal_dict:
            self._compute_rows()
        step = (self._rows_with(options) if options else self._rows)[row]
        if step.alpha <= _SMALLEST_ALPHA:
            self.check_signal(self._inference.transitions[row])
        dtype = compute_dtype(sample)
        x_t = _cast(sample, dtype)
        output, variance_output = self.split_variance(_cast(model_output, dtype), x_t)
        prediction_type = self._internal_dict["prediction_type"]
        # 1. Predict x_0. Eq. 15, Ho et al. 2020
        x_0 = gaussian.predict_x_0(prediction_type, output, x_t, step.alpha, step.sigma)
        # 2. Clip it
        x_0 = self.clip(x_0)
        # 3. Mean of the previous sample. Eq. 7, Ho et al. 2020; Eq. 12, Song et al. 2021
        if not step.use_clipped_model_output:
            x_t = gaussian.predict_eps(prediction_type, output, x_t, step.alpha, step.sigma)
        x_prev = gaussian.posterior_mean(x_0, x_t, step.coef_x_0, step.coef_x_t)
        # 4. Add noise
        if step.adds_noise:
            x_prev = self._add_reverse_noise(x_prev, step, variance_output, generator)
        x_prev, x_0 = _cast(x_prev, sample.dtype), _cast(x_0, sample.dtype)
        if not return_dict:
            return x_prev, x_0
        return GaussianDiffusionSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_0)

    def _rows_with(self, options: dict[str, Any]) -> list[ReverseStep]:
        """Return the coefficients of the run with options of a step that are not those of the run."""
        if unknown := options.keys() - {"eta", "use_clipped_model_output"}:
            raise TypeError(f"step() got unexpected keyword arguments: {', '.join(sorted(unknown))}")
        eta = _check_eta(options.get("eta", self._eta))
        use_clipped = options.get("use_clipped_model_output")
        key = eta, self._use_clipped_model_output if use_clipped is None else bool(use_clipped)
        if self._other_rows is None or self._other_rows[0] != key:
            self._other_rows = key, self._make_rows(*key)
        return self._other_rows[1]

    def _make_rows(self, eta: float, use_clipped_model_output: bool) -> list[ReverseStep]:
        run, steps = self._inference, self._inference.columns
        if use_clipped_model_output:
            coef_x_0, coef_x_t = gaussian.reverse_mean_coefficients(steps, eta)
        else:
            coef_x_0, coef_x_t = np.sqrt(steps.alpha_bar_prev), gaussian.noise_direction(steps, eta)
        # For `learned`, the range from -1 to 1 makes the interpolated log-variance equal to the output.
        log_variances = [(-1.0, 1.0)] * len(run)
        if self.config["variance_type"] == "learned_range":
            # The last step adds no noise, and the logarithm of its variance is not finite.
            log_variances[:-1] = [
                (math.log(step.posterior_variance), math.log(step.beta)) for step in run.transitions[:-1]
            ]
        if self._analytic_variance:
            variances: Any = np.array([self.sampling_variance(step, eta) for step in run.transitions])
        else:
            variances = self.sampling_variance(steps, eta)
        columns: Any = (np.sqrt(steps.alpha_bar), np.sqrt(1 - steps.alpha_bar), coef_x_0, coef_x_t, np.sqrt(variances))
        adds_noise = [eta > 0 or self._analytic_variance] * (len(run) - 1) + [False]
        options = [eta] * len(run), [use_clipped_model_output] * len(run)
        rows = zip(*(column.tolist() for column in columns), log_variances, adds_noise, *options, strict=True)
        return list(map(ReverseStep._make, rows))

    def check_signal(self, transition: Transition) -> None:
        """Raise a ValueError if the network predicts noise and x_t contains no signal to recover x_0 from."""
        if transition.alpha_bar < SMALLEST_ALPHA_BAR and self.config["prediction_type"] == "epsilon":
            raise ValueError(
                f"x_{transition.timestep} holds no signal, so x_0 cannot be recovered from a prediction of the noise;"
                " use prediction_type v_prediction or sample, or betas below 1 without rescale_betas_zero_snr."
            )

    def _add_reverse_noise(
        self,
        mean: torch.Tensor,
        step: ReverseStep,
        variance_output: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        if isinstance(generator, list) and len(generator) != len(mean):
            raise ValueError(f"generator is a list of {len(generator)} for a batch of {len(mean)}; pass one for each.")
        if generator is None or (isinstance(generator, torch.Generator) and generator.device == mean.device):
            # The same numbers as below, where the choice of device takes as long as drawing a small image.
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        else:
            given = generator if isinstance(generator, list) else [generator]
            if not all(isinstance(one, torch.Generator) for one in given):
                raise ValueError(
                    f"generator is {generator!r}; pass a torch.Generator, or a list of one for each sample. eta is a"
                    " keyword of set_timesteps and of step."
                )
            noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        if variance_output is None:
            return mean.add_(noise, alpha=step.deviation)
        return gaussian.add_learned_noise(mean, noise, variance_output, *step.log_variances, step.eta)

    # The variance of a reverse step that the network does not predict

    def fixed_variance(self, transition: Transition, eta: float = 1.0) -> float:
        """Return the analytic variance of a step, or eta^2 times the fixed one (section 3.2, Ho et al. 2020)."""
        if self._analytic_variance:
            assert self._eps_second_moments is not None
            second_moment = float(self._eps_second_moments[transition.timestep])
            return gaussian.optimal_variance(transition, eta, second_moment)
        small = self.config["variance_type"] in ("fixed_small", "fixed_small_log")
        return eta**2 * (transition.posterior_variance if small else transition.beta)

    def sampling_variance(self, transition: Transition, eta: float = 1.0) -> float:
        """Return the variance of the noise that `step` adds: `fixed_variance`, or a limit before the last step.

        The analytic variance is limited: only the last step removes the noise added before it, and it removes no more
        than its input contains by the forward process; the rest would be visible in the image. Bao et al. 2022 limit
        that noise to one gray level (y = 1 in their code). Here the limit is one gray level or what the input of the
        last step contains, whichever is larger, because a list that ends well before t = 0 needs its noise.
        """
        variance = self.fixed_variance(transition, eta)
        if self._analytic_variance and transition.previous_timestep == self._inference.transitions[-1].timestep:
            return min(variance, max(VISIBLE_NOISE**2, 1 - transition.alpha_bar_prev))
        return variance

    def _get_variance(self, t: int) -> torch.Tensor:
        """Return the variance of the step from t, under the name in DDPMScheduler that diffusers' tests call."""
        return torch.tensor(self.sampling_variance(self._inference.transition(t)))

    @property
    def analytic_variance(self) -> bool:
        """Whether steps use the optimal variance of Analytic-DPM (Bao et al. 2022), which adds noise at eta = 0 too.

        Setting it to True raises a ValueError if `eps_second_moments` is None.
        """
        return self._analytic_variance

    @analytic_variance.setter
    def analytic_variance(self, value: bool) -> None:
        if value and self._eps_second_moments is None:
            raise ValueError(
                "analytic_variance needs the second moments of the network's prediction: ddpm-hf evaluate estimates"
                " them with --estimate_variance, or set eps_second_moments."
            )
        self._analytic_variance = bool(value)
        self._compute_rows()

    @property
    def eps_second_moments(self) -> torch.Tensor | None:
        """Gamma_t = E |eps(x_t)|^2 / d of the network, float64 (T,) on the CPU, or None if it was never estimated."""
        return self._eps_second_moments

    @eps_second_moments.setter
    def eps_second_moments(self, moments: torch.Tensor | None) -> None:
        if moments is None:
            self._eps_second_moments, self._analytic_variance = None, False
            self._compute_rows()
            return
        moments = torch.as_tensor(moments).detach().to("cpu", torch.float64)
        if moments.shape != (len(self),) or not bool((moments.isfinite() & (moments >= 0)).all()):
            raise ValueError(
                f"eps_second_moments has shape {tuple(moments.shape)}; it must be {len(self)} finite"
                " numbers of at least 0, one for each training timestep."
            )
        if self.config["variance_type"] in LEARNED_VARIANCE_TYPES:
            raise ValueError(
                f"variance_type is {self.config['variance_type']}: the network predicts its own variance; the analytic"
                " one replaces a fixed one only."
            )
        self._eps_second_moments = moments
        self._compute_rows()

    # Files

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration, and `eps_second_moments` beside it if they are known; see `SchedulerMixin`."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.save_second_moments(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def save_second_moments(self, folder: str | os.PathLike[str]) -> None:
        """Write `eps_second_moments` to a folder, atomically; do nothing if they are None."""
        if self._eps_second_moments is None:
            return
        temporary = Path(folder) / f".{SECOND_MOMENTS_FILE}.writing"
        temporary.unlink(missing_ok=True)
        try:
            with temporary.open("x", encoding="utf-8") as file:  # mode x does not follow a link
                file.write(json.dumps({SECOND_MOMENTS_KEY: self._eps_second_moments.tolist()}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(Path(folder) / SECOND_MOMENTS_FILE)
        finally:
            temporary.unlink(missing_ok=True)

    def load_second_moments(self, file: str | os.PathLike[str]) -> None:
        """Read `eps_second_moments` from a file.

        Raises:
            ValueError: If the file is damaged, or belongs to a scheduler with another number of timesteps.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            moments = torch.tensor(content[SECOND_MOMENTS_KEY], dtype=torch.float64)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{file} cannot be read ({error!r}); remove it and estimate it again.") from error
        self.eps_second_moments = moments


class _SavedAsStock(GaussianDiffusionScheduler):
    def __new__(cls, *args: Any, **options: Any) -> Any:
        return GaussianDiffusionScheduler(*args, **options)


_SavedAsStock.__name__ = "DDPMScheduler"


def _as_json(name: str, value: Any) -> Any:
    """Return an option in the form that a JSON file has: numbers of numpy as Python's, None of a switch as False."""
    if value is None and name in _SWITCHES:
        return False
    is_number = isinstance(value, np.generic) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 0)
    return value.item() if is_number else value


def _check_config(config: Mapping[str, Any]) -> None:
    """Raise a ValueError if an option is unknown or out of range; `NoiseSchedule` checks the betas."""
    for name, choices in CHOICES.items():
        if config[name] not in choices:
            names = ", ".join(map(str, choices))
            raise ValueError(f"{name} {config[name]!r} is not one of {names}.{_HINTS.get(name, '')}")
    for name, (types, accepts, requirement) in _RANGES.items():
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, types) or not accepts(value):
            raise ValueError(f"{name} is {value!r}; it must be {requirement}.")
    trained_betas, num_timesteps = config["trained_betas"], config["num_train_timesteps"]
    if isinstance(trained_betas, torch.Tensor):
        raise ValueError("trained_betas is a tensor, which no scheduler_config.json can hold; pass betas.tolist().")
    if trained_betas is not None and not isinstance(trained_betas, list | tuple | np.ndarray):
        raise ValueError(f"trained_betas is {trained_betas!r}; it must be a list of {num_timesteps} numbers.")
    if trained_betas is not None and len(trained_betas) != num_timesteps:
        raise ValueError(f"trained_betas has {len(trained_betas)} values, num_train_timesteps is {num_timesteps}.")


def _check_eta(eta: object) -> float:
    """Return eta as a float; raise a ValueError if it is not a number in [0, 1]. A tensor would have to be read."""
    if not (isinstance(eta, int | float | np.number) and 0 <= eta <= 1):
        raise ValueError(f"eta is {eta!r}; it must be a number between 0 (deterministic) and 1 (ancestral).")
    return float(eta)


def splits_variance(scheduler: Any) -> bool:
    """Return whether `step` of this or a stock scheduler expects the variance channels of the network.

    Schedulers are compared by name, because a class loaded from the code in a folder is another object.
    """
    learned = scheduler.config.get("variance_type") in LEARNED_VARIANCE_TYPES
    return learned and type(scheduler).__name__ in (NATIVE_SCHEDULER, "DDPMScheduler", "DDPMParallelScheduler")


def takes_eta(scheduler: Any) -> bool:
    """Return whether a scheduler, or a class of them, has an eta: of the run, or of each step as in stock ones."""
    return any("eta" in inspect.signature(f).parameters for f in (scheduler.set_timesteps, scheduler.step))


def default_num_inference_steps(scheduler: Any, default: int | None = None) -> int:
    """Return the steps of a distilled model, else `default`, but at most those of training, or if it is None all."""
    num_train_timesteps: int = scheduler.config["num_train_timesteps"]
    return int(scheduler.config.get(DEFAULT_STEPS) or min(default or num_train_timesteps, num_train_timesteps))


def compute_dtype(sample: torch.Tensor) -> torch.dtype:
    """Return float64 for a float64 sample, otherwise float32: the dtype of all arithmetic on it.

    Raises:
        ValueError: If the sample is not floating-point, so that rounding would destroy every result.
    """
    if not sample.is_floating_point():
        raise ValueError(f"The samples are {sample.dtype}; scale images to floating-point numbers in [-1, 1] first.")
    return torch.float64 if sample.dtype == torch.float64 else torch.float32


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x in a dtype. `x.to` of an unchanged dtype takes a microsecond, of which a step has five."""
    return x if x.dtype == dtype else x.to(dtype)


def _as_index(timesteps: int | torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    try:
        index = torch.as_tensor(timesteps, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"timesteps is {timesteps!r}; it must be a whole number or a tensor of them.") from error
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"timesteps are {index.dtype}; they must be whole numbers, int64 or int32.")
    return index
