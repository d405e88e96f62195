"""One scheduler from ancestral DDPM (eta = 1) to deterministic DDIM (eta = 0), with the configuration of DDPMScheduler.

Tables are float64 and become host floats once per run; `step` reads no device tensor and computes in float32, or in
float64 for a float64 sample, whatever the dtype of the network's output. `docs/compatibility.md` of ddpm_hf lists every
difference from diffusers.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from . import gaussian
from .forward_process import ForwardProcess, check_options, check_signal, compute_dtype
from .noise_schedule import (
    BETA_SCHEDULE_ALIASES,
    STOCK_BETA_SCHEDULES,
    NoiseSchedule,
    Transition,
    make_betas,
    rescale_to_zero_terminal_snr,
    scale_beta_range,
    whole_number,
)
from .reverse_variance import ReverseVariance
from .timesteps import SamplingRun, spaced_timesteps

CORE_VERSION = "1.2.0"

PREDICTION_TYPE_ALIASES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@dataclass
class GaussianDiffusionSchedulerOutput(BaseOutput):
    """What `step` returns.

    Attributes:
        prev_sample: x at the previous timestep, in the dtype of the sample.
        pred_original_sample: The prediction of x_0, clipped if the scheduler clips, in the dtype of the sample.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class GaussianDiffusionScheduler(ForwardProcess, ReverseVariance, SchedulerMixin, ConfigMixin):
    """Noises training data and runs the reverse process.

    The configuration has the keys, values and defaults of `diffusers.DDPMScheduler`, so each class reads the other's
    `scheduler_config.json`. The constructor is as strict as the file format; `create` also takes the common aliases and
    the schedules that diffusers lacks.

    Args:
        num_train_timesteps: Length T of the chain.
        beta_start: First beta of a range.
        beta_end: Last beta of a range.
        beta_schedule: `linear`, `scaled_linear`, `squaredcos_cap_v2`, `sigmoid` or `laplace`.
        trained_betas: T betas that replace the schedule.
        variance_type: `fixed_small` (posterior variance), `fixed_large` (beta), each also as `_log` with the same
            meaning, `learned` (the network's second half is a log-variance) or `learned_range` (it interpolates).
        clip_sample: Clip the prediction of x_0 in every step.
        prediction_type: `epsilon`, `sample` (x_0) or `v_prediction`.
        thresholding: Dynamic thresholding (Saharia et al. 2022) instead of clipping.
        dynamic_thresholding_ratio: Quantile of |x_0| that becomes the threshold.
        clip_sample_range: Clip to [-range, range].
        sample_max_value: Upper limit of the dynamic threshold.
        timestep_spacing: `leading`, `trailing` or `linspace`.
        steps_offset: Added to the timesteps of `leading`.
        rescale_betas_zero_snr: Rescale the betas so that x_T holds no signal (Lin et al. 2024).

    Raises:
        ValueError: An option is unknown or out of its range, or the betas are not T numbers in (0, 1].
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
        # Values that were left at their defaults must survive a swap in memory as they survive a save:
        # from_config of another class would otherwise drop them and take its own defaults.
        self._internal_dict = FrozenDict({k: v for k, v in self.config.items() if k != "_use_default_values"})
        check_options(self.config)
        named = (beta_schedule, num_train_timesteps, beta_start, beta_end)
        schedule = NoiseSchedule.from_betas(make_betas(*named) if trained_betas is None else trained_betas)
        if rescale_betas_zero_snr:
            schedule = NoiseSchedule.from_betas(rescale_to_zero_terminal_snr(schedule.betas))
        self.noise_schedule = schedule
        self.betas = self.noise_schedule.betas.float()
        self.alphas = (1 - self.noise_schedule.betas).float()
        self.alphas_cumprod = self.noise_schedule.alphas_cumprod.float()
        self._device_tables = {}
        # Nothing here reads these three: code written for DDPMScheduler does.
        self.one = torch.tensor(1.0)
        self.custom_timesteps = False
        self.num_inference_steps: int | None = None
        self._run = SamplingRun(self.noise_schedule, range(num_train_timesteps)[::-1])

    @classmethod
    def create(
        cls,
        *,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        scale_betas_to_timesteps: bool = False,
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        **options: Any,
    ) -> "GaussianDiffusionScheduler":
        """Builds a scheduler whose configuration every scheduler of diffusers can read.

        Aliases (`cosine`, `quad`, `eps`, `x0`, `v`) are stored under the names of diffusers, `fixed_large_log` as
        `fixed_large`, and a schedule that some scheduler of diffusers lacks (`sigmoid`, `laplace`, `sigmoid_alpha_bar`,
        `warmup10`, `warmup50`, `const`, `jsd`) as `trained_betas`.

        Args:
            num_train_timesteps: Length T of the chain.
            beta_schedule: A key of `BETA_SCHEDULES`, or an alias.
            beta_start: First beta of a range.
            beta_end: Last beta of a range.
            scale_betas_to_timesteps: Multiply the range of betas by 1000 / T, so that a chain of any length ends with
                about the same signal; stored as the product. See `scale_beta_range`.
            trained_betas: T betas instead of a schedule.
            prediction_type: `epsilon` (`eps`), `sample` (`x0`) or `v_prediction` (`v`).
            variance_type: As in the constructor.
            **options: Any other option of the constructor.

        Raises:
            ValueError: An option is unknown, out of its range, or without effect beside another.
        """
        beta_schedule = BETA_SCHEDULE_ALIASES.get(str(beta_schedule), beta_schedule)
        if trained_betas is not None and (beta_schedule != "linear" or scale_betas_to_timesteps):
            raise ValueError("trained_betas replaces beta_schedule and scale_betas_to_timesteps; leave these out.")
        if scale_betas_to_timesteps:
            beta_start, beta_end = scale_beta_range(beta_schedule, num_train_timesteps, beta_start, beta_end)
        if beta_schedule not in STOCK_BETA_SCHEDULES:
            trained_betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end).tolist()
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
        """Builds a scheduler from the configuration of this or another class; see `SchedulerMixin`.

        What the other one left at its default, or was given by position, is kept as after a save; diffusers would drop
        it for a default of this class. Only a None, which DPM-Solver has as variance_type, becomes that default.
        """
        if isinstance(config, Mapping):
            config = {k: v for k, v in config.items() if k != "_use_default_values" and v is not None}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        """Returns the length of the training chain."""
        return len(self.noise_schedule)

    @property
    def variance_type(self) -> str:
        """The configured variance type."""
        return str(self.config["variance_type"])

    @property
    def timesteps(self) -> torch.Tensor:
        """The list being run, int64 and descending; assigning another list runs that one."""
        return self._run.timesteps

    @timesteps.setter
    def timesteps(self, timesteps: torch.Tensor) -> None:
        self._run = SamplingRun(self.noise_schedule, timesteps.tolist(), timesteps.device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Accepted for pipelines that call it: here the row follows from the timestep, in any order of calls."""

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns the sample: this process needs no scaling."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
        *,
        timestep_spacing: str | None = None,
    ) -> None:
        """Chooses the timesteps of a run.

        Args:
            num_inference_steps: Number of steps, spaced by `timestep_spacing`.
            device: Where `timesteps` shall lie; the device of the samples avoids a copy in every step.
            timesteps: A custom strictly descending list, instead of a number.
            timestep_spacing: Overrides the configured spacing for this run; may also be `quadratic`.

        Raises:
            ValueError: Both or neither of number and list are given, or they do not fit the training chain.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Pass either num_inference_steps or timesteps, not both and not neither.")
        if timesteps is not None and timestep_spacing is not None:
            raise ValueError("timestep_spacing does not apply to a custom list of timesteps; drop one of the two.")
        if timesteps is None:
            count = whole_number("num_inference_steps", num_inference_steps)
            if not 1 <= count <= len(self):
                raise ValueError(f"num_inference_steps {count} is not between 1 and {len(self)}.")
            spacing = self.config["timestep_spacing"] if timestep_spacing is None else timestep_spacing
            chosen = spaced_timesteps(spacing, count, len(self), self.config["steps_offset"])
        self._run = SamplingRun(self.noise_schedule, chosen if timesteps is None else timesteps, device)
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(self._run.transitions)

    def previous_timestep(self, timestep: int | torch.Tensor) -> torch.Tensor:
        """Returns the next timestep of the list being run, -1 after the last: a tensor of the same shape on the CPU.

        A timestep for each sample is read on the host.
        """
        if isinstance(timestep, torch.Tensor) and timestep.numel() != 1:
            previous = [self._run.transitions[self._run.row(t)].previous_timestep for t in timestep.flatten().tolist()]
            return torch.tensor(previous).view(timestep.shape)
        return torch.tensor(self._run.transitions[self._run.row(timestep)].previous_timestep)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        eta: float = 1.0,
    ) -> GaussianDiffusionSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Goes from x_t to x at the next timestep of the list, or to x_0 after the last.

        Eq. 12, Song et al. 2021, with eps re-derived from the clipped x_0; for eta = 1 it is Eq. 7, Ho et al. 2020.
        The last step draws no noise.

        Args:
            model_output: Prediction of the network, (batch, channels, ...), twice the channels for a learned variance.
            timestep: An element of `timesteps`, or its value; under torch.compile pass the int.
            sample: x_t, (batch, channels, ...).
            generator: Source of the noise, or one for each sample.
            return_dict: Return an output object instead of the tuple (prev_sample, pred_original_sample).
            eta: From 0, deterministic, to 1, ancestral.

        Raises:
            ValueError: The timestep is not in the list, eta is outside [0, 1], the channels do not fit variance_type,
                or noise was predicted where the sample holds no signal.
        """
        row = self._run.row(timestep)
        transition = self._run.transitions[row]
        if not (isinstance(eta, int | float | np.number) and 0 <= eta <= 1):
            raise ValueError(f"eta is {eta!r}; it must be a number between 0 (deterministic) and 1 (ancestral).")
        check_signal(transition, self.config["prediction_type"])
        dtype = compute_dtype(sample)
        x_t = sample.to(dtype)
        output, variance_output = self.split_variance(model_output.to(dtype), x_t)
        alpha, sigma = math.sqrt(transition.alpha_bar), math.sqrt(1 - transition.alpha_bar)
        # 1. Predict x_0, which is (x_t - sigma eps) / alpha for epsilon. Eq. 15, Ho et al. 2020.
        x_0 = gaussian.predict_x_0(self.config["prediction_type"], output, x_t, alpha, sigma)
        # 2. Clip it.
        x_0 = self.clip(x_0)
        # 3. The mean, a sum of x_0 and x_t. Eq. 7, Ho et al. 2020; Eq. 12, Song et al. 2021.
        x_prev = gaussian.posterior_mean(x_0, x_t, *gaussian.reverse_mean_coefficients(transition, float(eta)))
        # 4. Noise, but for the last step.
        if (eta > 0 or self.analytic_variance) and transition.previous_timestep >= 0:
            x_prev = self._add_reverse_noise(x_prev, transition, variance_output, generator, float(eta))
        x_prev, x_0 = x_prev.to(sample.dtype), x_0.to(sample.dtype)
        if not return_dict:
            return x_prev, x_0
        return GaussianDiffusionSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_0)

    def clip(self, x_0: torch.Tensor) -> torch.Tensor:
        """Thresholds or clips a prediction of x_0 as configured."""
        if self.config["thresholding"]:
            ratio, max_value = self.config["dynamic_thresholding_ratio"], self.config["sample_max_value"]
            return gaussian.dynamic_threshold(x_0, ratio, max_value)
        if self.config["clip_sample"]:
            return x_0.clamp(-self.config["clip_sample_range"], self.config["clip_sample_range"])
        return x_0

    def _add_reverse_noise(
        self,
        mean: torch.Tensor,
        transition: Transition,
        variance_output: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        eta: float,
    ) -> torch.Tensor:
        """Adds eta times a standard deviation of noise to the mean of a reverse step."""
        if isinstance(generator, list) and len(generator) != len(mean):
            raise ValueError(f"generator is a list of {len(generator)} for a batch of {len(mean)}; pass one for each.")
        noise = randn_tensor(tuple(mean.shape), generator=generator, device=mean.device, dtype=mean.dtype)
        if variance_output is None:
            variance = self.sampling_variance(transition, self._run.transitions[-1].timestep, eta)
            return torch.add(mean, noise, alpha=math.sqrt(variance))
        # learned: between these two the interpolation gives the output itself, so its noise has exp(output / 2).
        log_min, log_max = -1.0, 1.0
        if self.config["variance_type"] == "learned_range":
            log_min, log_max = math.log(transition.posterior_variance), math.log(transition.beta)
        return gaussian.add_learned_noise(mean, noise, variance_output, log_min, log_max, eta)

    def _get_variance(self, t: int) -> torch.Tensor:
        """Fixed variance of the step from t, by the name that diffusers' own tests of DDPMScheduler call."""
        transitions = self._run.transitions
        return torch.tensor(self.sampling_variance(transitions[self._run.row(t)], transitions[-1].timestep))

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes the configuration, and the second moments of the analytic variance if they are known."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.save_second_moments(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
