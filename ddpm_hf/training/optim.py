"""The optimiser, and the learning rate as a closed form of the step."""

import math
from collections.abc import Iterable

import torch

from ddpm_hf.config import TrainingConfig


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """Builds AdamW with its fused update, which is one kernel and can skip an update without asking the host."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Returns the learning rate of optimiser step `step` (counted from 0).

    The first `learning_rate_warmup_steps` updates climb linearly, the last of them to the peak (Ho et al. 2020 warm up
    over 5000); cosine and linear then fall from the peak towards 0, which they would reach at step `num_steps`. Neither
    the number of processes nor gradient accumulation enters.
    """
    warmup = config.learning_rate_warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.num_steps - warmup)
    match config.learning_rate_schedule:
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return config.learning_rate * (1 - progress)
        case _:
            return config.learning_rate
