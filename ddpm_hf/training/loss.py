"""The training objective: weighting, noise, and the loss of each sample.

How much a timestep counts: factors on the mean square error of a prediction, as functions of the SNR.

Legend: snr is alpha_bar_t / (1 - alpha_bar_t). The weightings of x_0 are written for the other predictions with
||eps - eps'||^2 = snr ||x_0 - x_0'||^2 and ||v - v'||^2 = (snr + 1) ||x_0 - x_0'||^2 (Salimans & Ho 2022, section 4).
Where the SNR is 0 (betas with zero terminal SNR) these weights are 1, as in the code of Hang et al. 2023: 0 would leave
the first step of sampling untrained.

The noise of a batch: standard normal, offset by a constant over each channel, exchanged among the images.

All of it is a function of (seed, step, position in the global batch) and, where it is exchanged, of the images of a
block of positions, however the batch is split.

The training loss as a callable object: noising, target, distance and bound, in float32 outside autocast.

Legend: as in diffusion/gaussian.py; T is the length of the chain, t = 0 ... T-1, and L_t the term of the variational
bound at t (Ho et al. 2020, Eq. 5, counts it as t+1).
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F

from ddpm_hf.config import ObjectiveConfig
from ddpm_hf.diffusion import GaussianDiffusionScheduler, gaussian
from ddpm_hf.rng import NOISE_BLOCK_SIZE, normal_by_position


def snr_weight(snr: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """Weight snr on x_0, which is weight 1 on epsilon. Section 4, Salimans & Ho 2022."""
    match prediction_type:
        case "epsilon":
            weight = torch.ones_like(snr)
        case "sample":
            weight = snr
        case _:
            weight = snr / (snr + 1)
    return _one_without_signal(weight, snr)


def truncated_snr_weight(snr: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """Weight max(snr, 1) on x_0. Section 4, Salimans & Ho 2022.

    Raises:
        ValueError: Epsilon is predicted, on which the weight would grow like 1 / snr towards pure noise.
    """
    match prediction_type:
        case "epsilon":
            raise ValueError(
                "weighting truncated_snr grows beyond all bounds towards pure noise with prediction_type epsilon; "
                "predict v_prediction or sample, or take min_snr."
            )
        case "sample":
            weight = snr.clamp(min=1)
        case _:
            weight = snr.clamp(min=1) / (snr + 1)
    return _one_without_signal(weight, snr)


def min_snr_weight(snr: torch.Tensor, prediction_type: str, gamma: float) -> torch.Tensor:
    """Weight min(snr, gamma) on x_0. Hang et al. 2023."""
    match prediction_type:
        case "epsilon":
            weight = snr.clamp(max=gamma) / snr
        case "sample":
            weight = snr.clamp(max=gamma)
        case _:
            weight = snr.clamp(max=gamma) / (snr + 1)
    return _one_without_signal(weight, snr)


def p2_weight(snr: torch.Tensor, gamma: float, k: float) -> torch.Tensor:
    """Weight (k + snr)^-gamma on whatever is predicted. Choi et al. 2022 for epsilon, their code for the others."""
    return (k + snr) ** -gamma


def loss_weight(config: ObjectiveConfig, prediction_type: str, snr: torch.Tensor) -> torch.Tensor | None:
    """Returns the factor on the loss of each sample, or None where there is none.

    Args:
        config: Which weighting.
        prediction_type: What the network predicts: epsilon, sample or v_prediction.
        snr: Signal-to-noise ratio of each sample, (batch,).

    Raises:
        ValueError: The weighting is truncated_snr, and epsilon is predicted.
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
    """Replaces the weights where the SNR is 0, NaN and infinity included, by 1."""
    return torch.where(snr == 0, 1.0, weight)


def draw_noise(
    config: ObjectiveConfig, seed: int, step: int, positions: range, shape: torch.Size, device: torch.device
) -> torch.Tensor:
    """Draws the noise of some positions of the global batch.

    Args:
        config: How strong the offset is.
        seed: Seed of the run.
        step: The optimiser step.
        positions: Consecutive positions in the global batch.
        shape: Channels, height and width of an image.
        device: Where to draw.

    Returns:
        float32 (len(positions), *shape), standard normal or, with an offset s, of variance 1 + s^2.
    """
    noise = normal_by_position(seed, "noise", step, positions, shape, device)
    if config.offset_noise > 0:
        offset = normal_by_position(seed, "offset_noise", step, positions, (shape[0], 1, 1), device)
        noise = noise + config.offset_noise * offset
    return noise


def whole_blocks(positions: range, batch_size: int) -> range:
    """Returns the positions of all blocks of the global batch that some positions touch."""
    start = positions.start // NOISE_BLOCK_SIZE * NOISE_BLOCK_SIZE
    stop = -(-positions.stop // NOISE_BLOCK_SIZE) * NOISE_BLOCK_SIZE
    return range(start, min(stop, batch_size))


def exchange_noise(x_0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Gives each image noise near to it: in each block the assignment with the least sum of distances (Li et al. 2024).

    The assignment is found on the host, which waits for the images and the noise.

    Args:
        x_0: Images (batch, channels, height, width), from the beginning of a block on.
        noise: Noise of the same shape.

    Returns:
        The noise in another order.
    """
    from scipy.optimize import linear_sum_assignment

    exchanged = []
    for images, block in zip(x_0.split(NOISE_BLOCK_SIZE), noise.split(NOISE_BLOCK_SIZE), strict=True):
        distances = torch.cdist(images.flatten(1), block.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        _, columns = linear_sum_assignment(distances.cpu().numpy())
        exchanged.append(block[torch.from_numpy(columns).to(block.device)])
    return torch.cat(exchanged)


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
