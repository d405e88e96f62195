"""The options that a process can have, and the forward process on batches: noising, velocity, posterior, predictions.

Per-sample timesteps lie on any device and are never read on the host. Arithmetic is float32, or float64 for float64
samples, from tables that were computed in float64; results have the dtype of the samples.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from . import gaussian
from .gaussian import LEARNED_VARIANCE_TYPES
from .noise_schedule import STOCK_BETA_SCHEDULES, NoiseSchedule, Transition

CORE_VERSION = "1.2.0"

SMALLEST_ALPHA_BAR = 1e-38
"""Below it float32 holds no alpha_bar, and dividing by its root could overflow."""

CHOICES: dict[str, tuple[str | bool, ...]] = {
    "beta_schedule": (*STOCK_BETA_SCHEDULES, "sigmoid", "laplace"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", *LEARNED_VARIANCE_TYPES),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "clip_sample": (True, False),
    "thresholding": (True, False),
    "rescale_betas_zero_snr": (True, False),
}
_CREATE = " GaussianDiffusionScheduler.create also takes aliases and every schedule of noise_schedule.py."
_HINTS = {
    "beta_schedule": _CREATE,
    "prediction_type": _CREATE,
    "timestep_spacing": " Pass quadratic to set_timesteps instead.",
}
_NUMBERS: dict[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {
    "num_train_timesteps": ((int,), lambda value: value >= 1, "a whole number of at least 1"),
    "steps_offset": ((int,), lambda value: value >= 0, "a whole number of at least 0"),
    "clip_sample_range": ((int, float), lambda value: value > 0, "a number above 0"),
    "sample_max_value": ((int, float), lambda value: value > 0, "a number above 0"),
    "dynamic_thresholding_ratio": ((int, float), lambda value: 0 <= value <= 1, "a number between 0 and 1"),
}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses a configuration that no process has; the betas are checked where they are made.

    Args:
        options: Every option of the scheduler's constructor.

    Raises:
        ValueError: One is unknown or out of its range; the sentence names it and what it can be.
    """
    for name, choices in CHOICES.items():
        value = options[name]
        if value not in choices:
            names = ", ".join(map(str, choices))
            raise ValueError(f"{name} {value!r} is not one of {names}.{_HINTS.get(name, '')}")
    for name, (types, accepts, requirement) in _NUMBERS.items():
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, types) or not accepts(value):
            raise ValueError(f"{name} is {value!r}; it must be {requirement}.")
    trained_betas, length = options["trained_betas"], options["num_train_timesteps"]
    if isinstance(trained_betas, torch.Tensor):
        raise ValueError("trained_betas is a tensor, which no scheduler_config.json can hold; pass betas.tolist().")
    if trained_betas is not None and not isinstance(trained_betas, list | tuple | np.ndarray):
        raise ValueError(f"trained_betas is {trained_betas!r}; it must be a list of {length} numbers.")
    if trained_betas is not None and len(trained_betas) != length:
        raise ValueError(f"trained_betas has {len(trained_betas)} values, num_train_timesteps is {length}.")


def check_signal(transition: Transition, prediction_type: str) -> None:
    """Refuses a step from where the sample holds no signal, if the network predicts the noise.

    Args:
        transition: The step.
        prediction_type: What the network predicts.

    Raises:
        ValueError: x_0 cannot be recovered there.
    """
    if transition.alpha_bar < SMALLEST_ALPHA_BAR and prediction_type == "epsilon":
        raise ValueError(
            f"x_{transition.timestep} holds no signal, so x_0 cannot be recovered from a prediction of the noise;"
            " use prediction_type v_prediction or sample, or betas below 1 without rescale_betas_zero_snr."
        )


def check_process(scheduler: Any) -> None:
    """Refuses a scheduler of diffusers that runs another process than the one a network here was trained on.

    EDM, flow matching, consistency models and score SDEs have other noise levels or draw other steps, and would make
    pictures that are wrong in silence; so would an inverse scheduler.

    Raises:
        ValueError: It does not say that DDPMScheduler can stand in its place, its alpha_bar is not the product of
            1 - beta, its timesteps rise, or its prediction_type is not one of ours.
    """
    name = type(scheduler).__name__
    remedy = "take the scheduler that the network was trained with, or a pipeline made for this one."
    if "DDPMScheduler" not in getattr(scheduler, "_compatibles", ()):
        raise ValueError(f"{name} does not run a denoising diffusion process (DDPM); {remedy}")
    alpha_bar = torch.as_tensor(scheduler.alphas_cumprod).double().cpu()
    expected = torch.cumprod(1 - torch.as_tensor(scheduler.betas).double().cpu(), dim=0)
    if (alpha_bar - expected).abs().max() > 1e-3:  # float32 sums, and the 2^-24 that some put where it is 0
        raise ValueError(f"{name} changes the noise levels that its betas stand for; {remedy}")
    if scheduler.timesteps is not None and scheduler.timesteps[0] < scheduler.timesteps[-1]:
        raise ValueError(f"{name} goes from data to noise; {remedy}")
    prediction_type = scheduler.config.get("prediction_type")
    if prediction_type not in CHOICES["prediction_type"]:
        names = ", ".join(map(str, CHOICES["prediction_type"]))
        raise ValueError(f"{name} has prediction_type {prediction_type!r}, which is not one of {names}; {remedy}")


def compute_dtype(sample: torch.Tensor) -> torch.dtype:
    """Returns the dtype of all arithmetic on a sample: float64 if it is that, else float32.

    Raises:
        ValueError: The sample is not of a floating-point dtype, which every result would be rounded to.
    """
    if not sample.is_floating_point():
        raise ValueError(f"The samples are {sample.dtype}; scale images to floating-point numbers in [-1, 1] first.")
    return torch.float64 if sample.dtype == torch.float64 else torch.float32


def _as_index(timesteps: int | torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """Returns timesteps as a tensor that a table can be indexed with."""
    try:
        index = torch.as_tensor(timesteps, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"timesteps is {timesteps!r}; it must be a whole number or a tensor of them.") from error
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"timesteps are {index.dtype}; they must be whole numbers, int64 or int32.")
    return index


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0): the mean has the shape of the samples, the other two broadcast against it."""

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor


class ForwardProcess:
    """Methods of the scheduler that need its tables and its configuration, but no run.

    Attributes:
        noise_schedule: The tables in float64.
        config: At least `prediction_type` and `variance_type`.
    """

    noise_schedule: NoiseSchedule
    config: Any
    _device_tables: dict[tuple[str, torch.device, torch.dtype], torch.Tensor]

    def gather(self, name: str, timesteps: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Looks up a table for each sample, without a read from the device.

        Args:
            name: The table, for example `snr`.
            timesteps: (batch,), or one timestep for all samples; integers on any device.
            like: Samples (batch, ...) that the result shall broadcast against.

        Returns:
            (batch, 1, ...) on the device of `like`, float32, or float64 if `like` is.

        Raises:
            ValueError: The timesteps are no integers, or as many as neither one nor the batch. On the CPU also when one
                is out of range; on a GPU that is a device-side assertion.
        """
        device, dtype = like.device, compute_dtype(like)
        table = self._device_tables.get((name, device, dtype))
        if table is None:
            table = getattr(self.noise_schedule, name).to(device, dtype)
            self._device_tables[name, device, dtype] = table
        index = _as_index(timesteps, device).reshape(-1)
        if len(index) not in (1, len(like)):
            raise ValueError(f"There are {len(index)} timesteps for {len(like)} samples; pass one for all or for each.")
        try:
            return table.index_select(0, index).view(-1, *[1] * (like.ndim - 1))
        except IndexError as error:
            raise ValueError(f"A timestep is outside 0 ... {len(self.noise_schedule) - 1}.") from error

    def _alpha_sigma(self, timesteps: int | torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of signal and noise in x_t, for each sample."""
        alpha = self.gather("sqrt_alphas_cumprod", timesteps, like)
        return alpha, self.gather("sqrt_one_minus_alphas_cumprod", timesteps, like)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        """Draws x_t from q(x_t | x_0) with the given noise. Eq. 4, Ho et al. 2020.

        Args:
            original_samples: x_0 in [-1, 1], (batch, ...), of any floating-point dtype.
            noise: Standard normal, in the shape of the samples.
            timesteps: (batch,), or one for all samples; integers in [0, T) on any device.

        Returns:
            x_t in shape, dtype and device of the samples, computed in float32, or in float64 for float64 samples.

        Raises:
            ValueError: The samples are no floating-point numbers, or the timesteps do not fit; see `gather`.
        """
        dtype = compute_dtype(original_samples)
        alpha, sigma = self._alpha_sigma(timesteps, original_samples)
        x_t = gaussian.q_sample(original_samples.to(dtype), noise.to(dtype), alpha, sigma)
        return x_t.to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor) -> torch.Tensor:
        """Returns the target of v-prediction, alpha eps - sigma x_0. Appendix D, Salimans & Ho 2022.

        Args:
            sample: x_0 in [-1, 1], (batch, ...), of any floating-point dtype; not x_t.
            noise: What x_t is made with, in the shape of the sample.
            timesteps: (batch,), or one for all samples; integers in [0, T) on any device.

        Returns:
            v in shape, dtype and device of the sample, computed in float32, or in float64 for a float64 sample.

        Raises:
            ValueError: The sample is no floating-point numbers, or the timesteps do not fit; see `gather`.
        """
        dtype = compute_dtype(sample)
        alpha, sigma = self._alpha_sigma(timesteps, sample)
        v = gaussian.velocity(sample.to(dtype), noise.to(dtype), alpha, sigma)
        return v.to(sample.dtype)

    def predict_original_sample(
        self, model_output: torch.Tensor, timesteps: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Returns x_0 as the network's output predicts it, not clipped. Eq. 15, Ho et al. 2020, for epsilon.

        Args:
            model_output: (batch, channels, ...), twice the channels for a learned variance, whose half is left out.
            timesteps: (batch,), or one for all samples; integers in [0, T) on any device.
            sample: x_t, (batch, channels, ...), of any floating-point dtype.

        Returns:
            x_0 in shape, dtype and device of the sample, computed in float32, or in float64 for a float64 sample. Where
            the sample holds no signal, a prediction of the noise gives no finite one.

        Raises:
            ValueError: The output has another shape than the sample needs, the sample is no floating-point numbers, or
                the timesteps do not fit; see `gather`.
        """
        output, _ = self.split_variance(model_output.to(compute_dtype(sample)), sample)
        x_t = sample.to(output.dtype)
        x_0 = gaussian.predict_x_0(self.config["prediction_type"], output, x_t, *self._alpha_sigma(timesteps, x_t))
        return x_0.to(sample.dtype)

    def predict_noise(
        self, model_output: torch.Tensor, timesteps: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Returns the noise in the sample as the network's output predicts it.

        Args:
            model_output: (batch, channels, ...), twice the channels for a learned variance, whose half is left out.
            timesteps: (batch,), or one for all samples; integers in [0, T) on any device.
            sample: x_t, (batch, channels, ...), of any floating-point dtype.

        Returns:
            The noise in shape, dtype and device of the sample, computed in float32, or in float64 for a float64 sample.

        Raises:
            ValueError: The output has another shape than the sample needs, the sample is no floating-point numbers, or
                the timesteps do not fit; see `gather`.
        """
        output, _ = self.split_variance(model_output.to(compute_dtype(sample)), sample)
        x_t = sample.to(output.dtype)
        eps = gaussian.predict_eps(self.config["prediction_type"], output, x_t, *self._alpha_sigma(timesteps, x_t))
        return eps.to(sample.dtype)

    def posterior(self, x_0: torch.Tensor, x_t: torch.Tensor, timesteps: int | torch.Tensor) -> Posterior:
        """Returns q(x_{t-1} | x_t, x_0) of the training chain. Eq. 6 and 7, Ho et al. 2020.

        Args:
            x_0: Clean samples, or a prediction of them, (batch, ...).
            x_t: Noised samples, in the same shape, of any floating-point dtype.
            timesteps: (batch,), or one for all samples; integers in [0, T) on any device.

        Returns:
            The mean in the shape of x_t, variance and log-variance in (batch, 1, ...): float32 whatever the dtype of
            x_t, or float64 if it is that. At t = 0 the variance is 0, and the log-variance that of t = 1, or log beta
            in a chain of one step.

        Raises:
            ValueError: x_t is no floating-point numbers, or the timesteps do not fit; see `gather`.
        """
        dtype = compute_dtype(x_t)
        coef_x_0 = self.gather("posterior_mean_coef_x_0", timesteps, x_t)
        coef_x_t = self.gather("posterior_mean_coef_x_t", timesteps, x_t)
        return Posterior(
            mean=gaussian.posterior_mean(x_0.to(dtype), x_t.to(dtype), coef_x_0, coef_x_t),
            variance=self.gather("posterior_variance", timesteps, x_t),
            log_variance=self.gather("posterior_log_variance", timesteps, x_t),
        )

    def snr(self, timesteps: int | torch.Tensor) -> torch.Tensor:
        """Returns the signal-to-noise ratio at each timestep.

        Args:
            timesteps: Integers in [0, T), of any shape and on any device.

        Returns:
            alpha_bar / (1 - alpha_bar), float32, in shape and device of the timesteps.

        Raises:
            ValueError: The timesteps are no integers, or, on the CPU, one is out of range.
        """
        index = _as_index(timesteps)
        like = torch.empty(index.numel(), device=index.device)
        return self.gather("snr", index, like).view(index.shape)

    def split_variance(self, model_output: torch.Tensor, x_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Separates prediction and variance, the two halves of the channels where the variance is learned.

        Args:
            model_output: (batch, channels, ...), twice the channels for a learned variance.
            x_t: The samples that the network was shown, (batch, channels, ...); only their shape is looked at.

        Returns:
            The prediction in the shape of x_t, and what the network says of the variance in that shape: a log-variance
            (`learned`), or where it lies in the range, -1 to 1 (`learned_range`). None where it is fixed.

        Raises:
            ValueError: The output has another shape than variance_type needs.
        """
        learned = self.config["variance_type"] in LEARNED_VARIANCE_TYPES
        expected = list(x_t.shape)
        if learned:
            expected[1:2] = [2 * channels for channels in expected[1:2]]
        if list(model_output.shape) != expected:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)} for a sample of {tuple(x_t.shape)}; variance_type"
                f" {self.config['variance_type']} needs {tuple(expected)}. Change variance_type, or the network's"
                " out_channels."
            )
        if not learned:
            return model_output, None
        output, variance_output = model_output.chunk(2, dim=1)
        return output, variance_output
