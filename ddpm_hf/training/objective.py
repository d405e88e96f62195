"""The training loss as a callable object: noising, target, distance and bound, in float32 outside autocast.

Legend: as in diffusion/gaussian.py; T is the length of the chain, t = 0 ... T-1, and L_t the term of the variational
bound at t (Ho et al. 2020, Eq. 5, counts it as t+1).
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F

from ddpm_hf.config import ObjectiveConfig
from ddpm_hf.diffusion import GaussianDiffusionScheduler, gaussian
from ddpm_hf.training.weighting import loss_weight


class Denoiser(Protocol):
    """A network (x_t, t, class_labels) -> (prediction,), as UNet2DModel is with return_dict=False."""

    def __call__(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None, *, return_dict: bool
    ) -> tuple[torch.Tensor, ...]:
        """Predicts epsilon, x_0 or v for each sample, and a variance in a second half of the channels if it learns it.

        A self-conditioned network takes a prediction of x_0 as a second half of the channels of `sample`.
        """
        ...


class DenoisingLoss:
    """L_simple and its relatives, the variational bound, and their sum.

    Args:
        scheduler: The forward process, the prediction type and the variance of the reverse process.
        config: Which loss, how weighted, and whether the network is self-conditioned.
        null_label: The label that stands for "no label"; None for a network without one.
    """

    def __init__(
        self,
        scheduler: GaussianDiffusionScheduler,
        config: ObjectiveConfig | None = None,
        null_label: int | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._config = config or ObjectiveConfig()
        self._null_label = null_label

    def __call__(
        self,
        model: Denoiser,
        x_0: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        dropped: torch.Tensor | None = None,
        feeds_back: bool = False,
    ) -> torch.Tensor:
        """Returns the loss of each sample.

        Args:
            model: The network; it alone may run under autocast.
            x_0: float32 images in [-1, 1], (batch, channels, height, width).
            noise: float32 noise of the same shape, standard normal for the bound.
            timesteps: int64 (batch,) in [0, T).
            class_labels: int64 (batch,), or None for an unconditional network.
            dropped: bool (batch,), samples whose label is replaced by the null label.
            feeds_back: Whether a self-conditioned network sees its own prediction of x_0 instead of zeros.

        Returns:
            float32 losses (batch,), each a mean over the pixels; those of the bound in bits per dimension, times T.
        """
        if dropped is not None and class_labels is not None:
            assert self._null_label is not None, "only a network with a null label has labels to drop"
            class_labels = class_labels.masked_fill(dropped, self._null_label)
        x_t = self._scheduler.add_noise(x_0, noise, timesteps)
        output = self._predict(model, x_t, timesteps, class_labels, feeds_back)
        prediction, variance = self._scheduler.split_variance(output, x_t)
        if self._config.loss == "vlb":
            return self._bound(prediction, variance, x_0, x_t, timesteps)
        l_simple = self._simple(prediction, self._target(x_0, noise, timesteps), timesteps)
        if self._config.loss != "hybrid":
            return l_simple
        # L_hybrid = L_simple + lambda L_vlb, which shall not reach the mean. Eq. 16, Nichol & Dhariwal 2021.
        l_vlb = self._bound(prediction.detach(), variance, x_0, x_t, timesteps)
        return l_simple + self._config.vlb_weight * l_vlb

    def _target(self, x_0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns what the network should have predicted. v: Appendix D, Salimans & Ho 2022."""
        match self._scheduler.config.prediction_type:
            case "epsilon":
                return noise
            case "sample":
                return x_0
            case _:
                return self._scheduler.get_velocity(x_0, noise, timesteps)

    def _simple(self, prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """L_simple (Eq. 14, Ho et al. 2020) or another distance, weighted; (batch,)."""
        match self._config.loss:
            case "l1":
                distance = F.l1_loss(prediction, target, reduction="none")
            case "huber":
                distance = F.huber_loss(prediction, target, reduction="none", delta=self._config.huber_delta)
            case _:
                distance = F.mse_loss(prediction, target, reduction="none")
        loss = distance.flatten(1).mean(dim=1)
        weight = loss_weight(self._config, self._scheduler.config.prediction_type, self._scheduler.snr(timesteps))
        return loss if weight is None else weight * loss

    def _predict(
        self,
        model: Denoiser,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None,
        feeds_back: bool,
    ) -> torch.Tensor:
        """Calls the network, twice where its own prediction is fed back to it. Chen et al. 2022, Algorithm 1."""

        def output_of(sample: torch.Tensor) -> torch.Tensor:
            return model(sample, timesteps, class_labels, return_dict=False)[0].to(torch.float32)

        if self._config.self_conditioning == 0:
            return output_of(x_t)
        x_0 = torch.zeros_like(x_t)
        if feeds_back:
            with torch.no_grad():
                output = output_of(torch.cat([x_t, x_0], dim=1))
                # As sampling feeds it back.
                x_0 = self._scheduler.clip(self._scheduler.predict_original_sample(output, timesteps, x_t))
        return output_of(torch.cat([x_t, x_0], dim=1))

    def _bound(
        self,
        prediction: torch.Tensor,
        variance: torch.Tensor | None,
        x_0: torch.Tensor,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """T L_t in bits per dimension, (batch,): its mean over t is the bound, but for the prior term.

        The prediction of x_0 is not clipped, which would leave the network no gradient there; evaluation/chain.py clips
        it as sampling does.
        """
        scheduler = self._scheduler
        is_first = (timesteps == 0).view(-1, 1, 1, 1)
        # q(x_{t-1} | x_t, x_0). Eq. 6 and 7, Ho et al. 2020; its variance is 0 at t = 0, where that of t = 1 stands in.
        true = scheduler.posterior(x_0, x_t, timesteps)
        alpha = scheduler.gather("sqrt_alphas_cumprod", timesteps, x_t)
        sigma = scheduler.gather("sqrt_one_minus_alphas_cumprod", timesteps, x_t)
        predicted_x_0 = gaussian.predict_x_0(scheduler.config.prediction_type, prediction, x_t, alpha, sigma)
        mean = scheduler.posterior(predicted_x_0, x_t, timesteps).mean
        log_beta = scheduler.gather("log_betas", timesteps, x_t)
        log_variance = gaussian.reverse_log_variance(scheduler.variance_type, variance, true.log_variance, log_beta)
        if variance is None:  # at t = 0 always the small one, as in their code, which makes the data more probable
            log_variance = torch.where(is_first, true.log_variance, log_variance)
        # L_{t-1} and L_0. Eq. 5 and 13, Ho et al. 2020.
        divergence = gaussian.normal_kl(true.mean, true.log_variance, mean, log_variance)
        surprise = -gaussian.discretized_log_likelihood(x_0, mean, log_variance)
        nats = torch.where(is_first, surprise, divergence).flatten(1).mean(dim=1)
        return len(scheduler) * nats / math.log(2)
