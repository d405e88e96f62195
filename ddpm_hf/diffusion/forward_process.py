"""The forward process on batches: noising, velocity, posterior, and the predictions that follow from them.

Per-sample timesteps lie on any device and are never read on the host. Arithmetic is float32, or float64 for float64
samples, from tables that were computed in float64; results have the dtype of the samples.
"""

from typing import Any, NamedTuple

import torch

from . import gaussian
from .noise_schedule import NoiseSchedule

CORE_VERSION = "1.0.0"

LEARNED_VARIANCE_TYPES = ("learned", "learned_range")


def compute_dtype(sample: torch.Tensor) -> torch.dtype:
    """Returns the dtype of all arithmetic on a sample: float64 if it is that, else float32."""
    return torch.float64 if sample.dtype == torch.float64 else torch.float32


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
        index = torch.as_tensor(timesteps, device=device).reshape(-1)
        if index.is_floating_point() or len(index) not in (1, len(like)):
            raise ValueError(f"timesteps must be 1 or {len(like)} integers, not {len(index)} of {index.dtype}.")
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
        """Draws x_t from q(x_t | x_0) with the given noise; float32 inside, in the dtype of the samples outside."""
        dtype = compute_dtype(original_samples)
        alpha, sigma = self._alpha_sigma(timesteps, original_samples)
        x_t = gaussian.q_sample(original_samples.to(dtype), noise.to(dtype), alpha, sigma)
        return x_t.to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor) -> torch.Tensor:
        """Returns the target of v-prediction for clean samples and their noise; float32 inside."""
        dtype = compute_dtype(sample)
        alpha, sigma = self._alpha_sigma(timesteps, sample)
        v = gaussian.velocity(sample.to(dtype), noise.to(dtype), alpha, sigma)
        return v.to(sample.dtype)

    def predict_original_sample(
        self, model_output: torch.Tensor, timesteps: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Returns x_0 as the network's output predicts it, not clipped, (batch, channels, ...)."""
        output, _ = self._split(model_output.to(compute_dtype(sample)), sample)
        x_t = sample.to(output.dtype)
        x_0 = gaussian.predict_x_0(self.config["prediction_type"], output, x_t, *self._alpha_sigma(timesteps, x_t))
        return x_0.to(sample.dtype)

    def predict_noise(
        self, model_output: torch.Tensor, timesteps: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Returns the noise in the sample as the network's output predicts it, (batch, channels, ...)."""
        output, _ = self._split(model_output.to(compute_dtype(sample)), sample)
        x_t = sample.to(output.dtype)
        eps = gaussian.predict_eps(self.config["prediction_type"], output, x_t, *self._alpha_sigma(timesteps, x_t))
        return eps.to(sample.dtype)

    def posterior(self, x_0: torch.Tensor, x_t: torch.Tensor, timesteps: int | torch.Tensor) -> Posterior:
        """Returns q(x_{t-1} | x_t, x_0) of the training chain. Eq. 6 and 7, Ho et al. 2020; float32 inside and out."""
        dtype = compute_dtype(x_t)
        coef_x_0 = self.gather("posterior_mean_coef_x_0", timesteps, x_t)
        coef_x_t = self.gather("posterior_mean_coef_x_t", timesteps, x_t)
        return Posterior(
            mean=gaussian.posterior_mean(x_0.to(dtype), x_t.to(dtype), coef_x_0, coef_x_t),
            variance=self.gather("posterior_variance", timesteps, x_t),
            log_variance=self.gather("posterior_log_variance", timesteps, x_t),
        )

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns the signal-to-noise ratio at each timestep, float32, in the shape and on the device of these."""
        like = torch.empty(timesteps.numel(), device=timesteps.device)
        return self.gather("snr", timesteps, like).view(timesteps.shape)

    def _split(self, model_output: torch.Tensor, x_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Separates prediction and variance, the two halves of the channels where the variance is learned."""
        learned = self.config["variance_type"] in LEARNED_VARIANCE_TYPES
        expected = x_t.shape[1] * (2 if learned else 1)
        if model_output.shape[1] != expected:
            raise ValueError(
                f"model_output has {model_output.shape[1]} channels for a sample of {x_t.shape[1]}; variance_type"
                f" {self.config['variance_type']} needs {expected}. Change variance_type or the network's out_channels."
            )
        if not learned:
            return model_output, None
        output, variance_output = model_output.chunk(2, dim=1)
        return output, variance_output
