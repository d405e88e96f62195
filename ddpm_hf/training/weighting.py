"""How much a timestep counts: factors on the mean square error of a prediction, as functions of the SNR.

Legend: snr is alpha_bar_t / (1 - alpha_bar_t). The weightings of x_0 are written for the other predictions with
||eps - eps'||^2 = snr ||x_0 - x_0'||^2 and ||v - v'||^2 = (snr + 1) ||x_0 - x_0'||^2 (Salimans & Ho 2022, section 4).
Where the SNR is 0 (betas with zero terminal SNR) these weights are 1, as in the code of Hang et al. 2023: 0 would leave
the first step of sampling untrained.
"""

import torch

from ddpm_hf.config import ObjectiveConfig


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
