"""The training objective: loss weighting, noise, and the loss of each sample.

Noising, target, distance and bound are computed in float32; only the network runs under autocast.

Legend: as in diffusion/gaussian.py; T = num_train_timesteps, t = 0 ... T-1; L_t, the term of the variational bound at t
(Ho et al. 2020, Eq. 5, counts it as t+1); snr = alpha_bar_t / (1 - alpha_bar_t).
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from ddpm_hf.config import ObjectiveConfig
from ddpm_hf.diffusion import GaussianDiffusionScheduler, gaussian
from ddpm_hf.rng import NOISE_BLOCK_SIZE, normal_by_position

Denoiser: TypeAlias = Callable[..., tuple[torch.Tensor, ...]]
"""A network called as UNet2DModel is: (sample, timestep, class_labels, return_dict=False) -> (prediction,)."""


# The weightings below are defined on the mean square error of x_0 and rewritten for the other predictions with
# ||eps - eps'||^2 = snr ||x_0 - x_0'||^2 and ||v - v'||^2 = (snr + 1) ||x_0 - x_0'||^2 (Salimans & Ho 2022, section 4).


def snr_weight(snr: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """Return weight snr on x_0, which is weight 1 on epsilon. Section 4, Salimans & Ho 2022."""
    match prediction_type:
        case "epsilon":
            weight = torch.ones_like(snr)
        case "sample":
            weight = snr
        case _:
            weight = snr / (snr + 1)
    return _one_without_signal(weight, snr)


def truncated_snr_weight(snr: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """Return weight max(snr, 1) on x_0. Section 4, Salimans & Ho 2022.

    On epsilon it grows like 1 / snr towards pure noise, so config/rules.py does not allow that combination.
    """
    match prediction_type:
        case "epsilon":
            weight = snr.clamp(min=1) / snr
        case "sample":
            weight = snr.clamp(min=1)
        case _:
            weight = snr.clamp(min=1) / (snr + 1)
    return _one_without_signal(weight, snr)


def min_snr_weight(snr: torch.Tensor, prediction_type: str, gamma: float) -> torch.Tensor:
    """Return weight min(snr, gamma) on x_0. Hang et al. 2023."""
    match prediction_type:
        case "epsilon":
            weight = snr.clamp(max=gamma) / snr
        case "sample":
            weight = snr.clamp(max=gamma)
        case _:
            weight = snr.clamp(max=gamma) / (snr + 1)
    return _one_without_signal(weight, snr)


def p2_weight(snr: torch.Tensor, gamma: float, k: float) -> torch.Tensor:
    """Return weight (k + snr)^-gamma on any prediction. Choi et al. 2022 for epsilon, their code for the others."""
    return (k + snr) ** -gamma


def loss_weight(config: ObjectiveConfig, prediction_type: str, snr: torch.Tensor) -> torch.Tensor | None:
    """Return the factor on the loss of each sample, or None for weighting "none".

    Args:
        config: The weighting and its constants.
        prediction_type: "epsilon", "sample" or "v_prediction".
        snr: Signal-to-noise ratios, any shape.
    """
    match config.weighting:
        case "none":
            return None
        case "snr":
            return snr_weight(snr, prediction_type)
        case "truncated_snr":
            return truncated_snr_weight(snr, prediction_type)
        case "min_snr":
            return min_snr_weight(snr, prediction_type, config.min_snr_gamma)
        case "p2":
            return p2_weight(snr, config.p2_gamma, config.p2_k)


def _one_without_signal(weight: torch.Tensor, snr: torch.Tensor) -> torch.Tensor:
    """Replace weights at an SNR of 0 (zero terminal SNR), NaN and infinity included, by 1 as in the code of Hang et al.

    A weight of 0 would leave the first step of sampling untrained.
    """
    return torch.where(snr == 0, 1.0, weight)


def draw_noise(
    config: ObjectiveConfig, seed: int, step: int, positions: range, shape: torch.Size, device: torch.device
) -> torch.Tensor:
    """Draw the noise of some positions of the global batch.

    Args:
        config: Strength s of the offset noise (objective.offset_noise).
        seed: Seed of the run.
        step: The optimizer step.
        positions: Consecutive positions in the global batch.
        shape: (channels, height, width) of an image.
        device: Device to draw on.

    Returns:
        float32 (len(positions), *shape), standard normal; with an offset of variance 1 + s^2, where the offset is one
        number per image and channel.
    """
    noise = normal_by_position(seed, "noise", step, positions, shape, device)
    if config.offset_noise > 0:
        offset = normal_by_position(seed, "offset_noise", step, positions, (shape[0], 1, 1), device)
        noise = noise + config.offset_noise * offset
    return noise


def draw_perturbation(
    config: ObjectiveConfig, seed: int, step: int, positions: range, shape: torch.Size, device: torch.device
) -> torch.Tensor | None:
    """Draw the perturbation of the inputs (objective.input_perturbation), as `draw_noise`; None if it is off."""
    if config.input_perturbation == 0:
        return None
    return config.input_perturbation * normal_by_position(seed, "input_perturbation", step, positions, shape, device)


def assign_noise(x_0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Permute noise within each block of NOISE_BLOCK_SIZE images to minimize the sum of distances (Li et al. 2024).

    The assignment is computed on the host, which waits for both tensors.

    Args:
        x_0: Images (batch, channels, height, width); the first is the first of a block.
        noise: Noise of the same shape.
    """
    from scipy.optimize import linear_sum_assignment

    assigned = []
    for images, block in zip(x_0.split(NOISE_BLOCK_SIZE), noise.split(NOISE_BLOCK_SIZE), strict=True):
        distances = torch.cdist(images.flatten(1), block.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        _, columns = linear_sum_assignment(distances.cpu().numpy())
        assigned.append(block[torch.from_numpy(columns).to(block.device)])
    return torch.cat(assigned)


class DenoisingLoss:
    """L_simple and its variants, the variational bound, and their sum.

    Args:
        scheduler: The forward process, the prediction type and the variance of the reverse process.
        config: The loss, its weighting, and whether the network is self-conditioned.
        null_label: The label that means "no class"; None for a network without one.
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

    @property
    def frozen(self) -> list[UNet2DModel]:
        """Networks that the loss calls without gradients."""
        return []

    def __call__(
        self,
        model: Denoiser,
        x_0: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        dropped: torch.Tensor | None = None,
        use_self_cond: bool = False,
        perturbation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss of each sample.

        Args:
            model: The network.
            x_0: float32 images in [-1, 1], (batch, channels, height, width).
            noise: float32 noise of the same shape, standard normal for the bound.
            timesteps: int64 (batch,) in [0, T).
            class_labels: int64 (batch,), or None for an unconditional network.
            dropped: bool (batch,), which labels to replace by the null label; None for none.
            use_self_cond: Whether a self-conditioned network sees its own prediction of x_0 instead of zeros.
            perturbation: float32 noise of the same shape that is added to that of the input and not to the target, of
                standard deviation objective.input_perturbation (Ning et al. 2023); None for none.

        Returns:
            float32 losses (batch,), each a mean over the pixels; those of the bound in bits per dimension, times T.
        """
        if dropped is not None and class_labels is not None:
            assert self._null_label is not None, "only a network with a null label has labels to drop"
            class_labels = class_labels.masked_fill(dropped, self._null_label)
        # Algorithm 1, Ning et al. 2023
        x_t = self._scheduler.add_noise(x_0, noise if perturbation is None else noise + perturbation, timesteps)
        # First: with CUDA graphs, no other graph may run between the forward and the backward pass of the network.
        target = None if self._config.loss == "vlb" else self._target(x_0, noise, x_t, timesteps, class_labels)
        output = self._predict(model, x_t, timesteps, class_labels, use_self_cond)
        prediction, variance = self._scheduler.split_variance(output, x_t)
        if target is None:
            return self._bound(prediction, variance, x_0, x_t, timesteps)
        l_simple = self._simple(prediction, target, timesteps)
        if self._config.loss != "hybrid":
            return l_simple
        # L_hybrid = L_simple + lambda L_vlb, whose gradient does not reach the mean. Eq. 16, Nichol & Dhariwal 2021.
        l_vlb = self._bound(prediction.detach(), variance, x_0, x_t, timesteps)
        return l_simple + self._config.vlb_weight * l_vlb

    def _predict(
        self,
        model: Denoiser,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None,
        use_self_cond: bool,
    ) -> torch.Tensor:
        """Evaluate the network, twice with self-conditioning. Algorithm 1, Chen et al. 2022."""

        def evaluate(sample: torch.Tensor) -> torch.Tensor:
            return model(sample, timesteps, class_labels, return_dict=False)[0].to(torch.float32)

        if self._config.self_conditioning == 0:
            return evaluate(x_t)
        x_0 = torch.zeros_like(x_t)
        if use_self_cond:
            with torch.no_grad():
                output = evaluate(torch.cat([x_t, x_0], dim=1))
                # Clipped as in sampling.
                x_0 = self._scheduler.clip(self._scheduler.predict_original_sample(output, timesteps, x_t))
        return evaluate(torch.cat([x_t, x_0], dim=1))

    def _target(
        self,
        x_0: torch.Tensor,
        noise: torch.Tensor,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the target of the prediction. v: Appendix D, Salimans & Ho 2022."""
        match self._scheduler.config.prediction_type:
            case "epsilon":
                return noise
            case "sample":
                return x_0
            case _:
                return self._scheduler.get_velocity(x_0, noise, timesteps)

    def _simple(self, prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return L_simple (Eq. 14, Ho et al. 2020) or another distance, weighted; (batch,)."""
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

    def _bound(
        self,
        prediction: torch.Tensor,
        variance: torch.Tensor | None,
        x_0: torch.Tensor,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """Return T L_t in bits per dimension, (batch,): its mean over t is the bound without the prior term.

        The prediction of x_0 is not clipped, because clipped values have no gradient; evaluation/likelihood.py clips it
        as sampling does.
        """
        scheduler = self._scheduler
        is_first = (timesteps == 0).view(-1, 1, 1, 1)
        # q(x_{t-1} | x_t, x_0), whose variance at t = 0 is replaced by that of t = 1. Eq. 6 and 7, Ho et al. 2020.
        true = scheduler.posterior(x_0, x_t, timesteps)
        alpha = scheduler.gather("sqrt_alphas_cumprod", timesteps, x_t)
        sigma = scheduler.gather("sqrt_one_minus_alphas_cumprod", timesteps, x_t)
        predicted_x_0 = gaussian.predict_x_0(scheduler.config.prediction_type, prediction, x_t, alpha, sigma)
        mean = scheduler.posterior(predicted_x_0, x_t, timesteps).mean
        log_beta = scheduler.gather("log_betas", timesteps, x_t)
        log_variance = gaussian.reverse_log_variance(scheduler.variance_type, variance, true.log_variance, log_beta)
        if variance is None:  # at t = 0 always the small one, as in the code of Ho et al.: the data are more probable
            log_variance = torch.where(is_first, true.log_variance, log_variance)
        # L_{t-1} and L_0. Eq. 5 and 13, Ho et al. 2020.
        divergence = gaussian.normal_kl(true.mean, true.log_variance, mean, log_variance)
        surprise = -gaussian.discretized_log_likelihood(x_0, mean, log_variance)
        nats = torch.where(is_first, surprise, divergence).flatten(1).mean(dim=1)
        return len(scheduler) * nats / math.log(2)
