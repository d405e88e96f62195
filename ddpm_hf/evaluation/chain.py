"""A trained network on a chain of timesteps, as a likelihood needs it: what it predicts, and each step's Gaussians."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_hf.data import ImageSet, normalize
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler, gaussian
from ddpm_hf.diffusion.forward_process import check_signal
from ddpm_hf.diffusion.noise_schedule import Transition

SMALLEST_DECODER_VARIANCE = (0.1 / 255) ** 2
"""An analytic variance may be estimated as 0; a tenth of a gray level is as good, and finite."""


@dataclass(frozen=True)
class Prediction:
    """What a network says of x_t.

    Args:
        x_0: As the reverse process uses it, clipped if the scheduler clips.
        eps: The noise, of the prediction that is not clipped.
        variance: The half of the channels that tells the variance; None where it is fixed.
    """

    x_0: torch.Tensor
    eps: torch.Tensor
    variance: torch.Tensor | None


class Chain:
    """The reverse process of a pipeline on a list of timesteps, ancestral (eta = 1).

    A self-conditioned network is called twice for each prediction, the second time with its own first one: then each
    step depends on x_t alone, as a Markov chain must.

    Args:
        pipeline: The network, with a GaussianDiffusionScheduler.
        timesteps: Descending; None takes the whole training chain.

    Raises:
        ValueError: The scheduler is another one, the timesteps do not fit it, or noise is predicted where the first of
            them holds no signal.
    """

    def __init__(self, pipeline: GaussianDiffusionPipeline, timesteps: list[int] | None = None) -> None:
        scheduler = pipeline.scheduler
        if not isinstance(scheduler, GaussianDiffusionScheduler):
            raise ValueError(
                f"the likelihood needs the chain of a GaussianDiffusionScheduler, not {type(scheduler).__name__}."
            )
        chosen = list(range(len(scheduler)))[::-1] if timesteps is None else timesteps
        scheduler.set_timesteps(timesteps=chosen)
        self.scheduler = scheduler
        self.transitions: list[Transition] = scheduler.noise_schedule.transitions(chosen)
        check_signal(self.transitions[0], scheduler.config.prediction_type)
        self.device: torch.device = pipeline.unet.device
        self.dtype = torch.promote_types(torch.float32, pipeline.unet.dtype)
        self._unet = pipeline.unet
        self._is_self_conditioned = bool(pipeline.config.get("self_conditioned"))

    def __len__(self) -> int:
        return len(self.transitions)

    def noised(self, x_0: torch.Tensor, noise: torch.Tensor, step: Transition) -> torch.Tensor:
        """x_t of q(x_t | x_0)."""
        return gaussian.q_sample(x_0, noise, math.sqrt(step.alpha_bar), math.sqrt(1 - step.alpha_bar))

    def predict(self, x_t: torch.Tensor, step: Transition, class_labels: torch.Tensor | None) -> Prediction:
        """Calls the network on states (batch, channels, height, width) of one timestep."""
        x_0 = torch.zeros_like(x_t)
        if self._is_self_conditioned:
            x_0 = self._predict(torch.cat([x_t, x_0], dim=1), x_t, step, class_labels).x_0
            return self._predict(torch.cat([x_t, x_0], dim=1), x_t, step, class_labels)
        return self._predict(x_t, x_t, step, class_labels)

    def _predict(
        self, network_input: torch.Tensor, x_t: torch.Tensor, step: Transition, class_labels: torch.Tensor | None
    ) -> Prediction:
        timesteps = torch.full((len(x_t),), step.timestep, device=x_t.device)
        output: Any = self._unet(
            network_input.to(self._unet.dtype), timesteps, class_labels=class_labels, return_dict=False
        )[0]
        prediction, variance = self.scheduler.split_variance(output.to(x_t.dtype), x_t)
        kind, alpha, sigma = (
            self.scheduler.config.prediction_type,
            math.sqrt(step.alpha_bar),
            math.sqrt(1 - step.alpha_bar),
        )
        x_0 = self.scheduler.clip(gaussian.predict_x_0(kind, prediction, x_t, alpha, sigma))
        return Prediction(x_0, gaussian.predict_eps(kind, prediction, x_t, alpha, sigma), variance)

    def term(self, x_0: torch.Tensor, x_t: torch.Tensor, prediction: Prediction, row: int) -> torch.Tensor:
        """One term of the bound in nats, element by element: L_{t-1}, or L_0 in the last step.

        Eq. 5, 7 and 13, Ho et al. 2020, for any two timesteps. The prediction of x_0 is clipped as in sampling, whose
        chain this is the bound of; that of training (training/objective.py) is not.
        """
        step = self.transitions[row]
        log_variance = self._log_variance(row, prediction.variance, x_t)
        coefficients = gaussian.reverse_mean_coefficients(step, 1.0)
        mean = gaussian.posterior_mean(prediction.x_0, x_t, *coefficients)
        if step.previous_timestep < 0:
            return -gaussian.discretized_log_likelihood(x_0, mean, log_variance)
        true_mean = gaussian.posterior_mean(x_0, x_t, *coefficients)
        true_log_variance = torch.full_like(log_variance, math.log(step.posterior_variance))
        return gaussian.normal_kl(true_mean, true_log_variance, mean, log_variance)

    def prior(self, x_0: torch.Tensor) -> torch.Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) in nats, element by element: what no network changes."""
        alpha_bar = torch.tensor(self.transitions[0].alpha_bar, dtype=x_0.dtype, device=x_0.device)
        return gaussian.normal_kl(
            alpha_bar.sqrt() * x_0, torch.log1p(-alpha_bar), torch.zeros_like(x_0), torch.zeros_like(x_0)
        )

    def _log_variance(self, row: int, learned: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Log-variance of the reverse step; in the last one, whose posterior variance is 0, that of the step before.

        An analytic variance needs no such replacement.
        """
        step, kind = self.transitions[row], self.scheduler.variance_type
        is_last = step.previous_timestep < 0
        small = self.transitions[row - 1].posterior_variance if is_last and row > 0 else step.posterior_variance
        log_small, log_large = math.log(small or step.beta), math.log(step.beta)  # a chain of one step has none before
        if self.scheduler.analytic_variance:
            variance = self.scheduler.fixed_variance(step)
            return torch.full_like(like, math.log(max(variance, SMALLEST_DECODER_VARIANCE) if is_last else variance))
        if learned is None and is_last:
            return torch.full_like(like, log_small)
        log_variance = gaussian.reverse_log_variance(kind, learned, log_small, log_large)
        return log_variance if isinstance(log_variance, torch.Tensor) else torch.full_like(like, log_variance)


def check_labels(images: ImageSet, num_classes: int) -> None:
    """Refuses images without the labels that a class-conditional network needs.

    Raises:
        ValueError: With what to do.
    """
    if num_classes and (images.labels is None or images.labels[images.rows].max() >= num_classes):
        raise ValueError(
            f"the network has {num_classes} classes, so each image needs a label from 0 to {num_classes - 1}; name "
            "their column with data.label_column."
        )


def load_images(
    images: ImageSet, positions: Sequence[int] | NDArray[np.int64], chain: Chain, *, with_labels: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns images of a set in [-1, 1] and, where the network needs them, labels, on the device of the network."""
    pixels, labels = images.take(np.asarray(positions))
    x_0 = normalize(torch.from_numpy(pixels).to(chain.device)).to(chain.dtype)
    return x_0, torch.from_numpy(labels).to(chain.device) if with_labels and labels is not None else None


def batches_of(images: range, batch_size: int) -> Iterator[range]:
    """Yields the images in batches."""
    for start in range(images.start, images.stop, batch_size):
        yield range(start, min(start + batch_size, images.stop))
