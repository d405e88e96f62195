"""The optimiser, and the learning rate as a closed form of the step."""

import importlib
import math
from collections.abc import Iterable
from typing import Any

import torch

from ddpm_hf.config import ConfigError, TrainingConfig
from ddpm_hf.training.optimizer_state import check_that_it_continues

_ADAMS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """Builds the optimiser, Adam and AdamW fused into one kernel where the device can.

    A small one of its kind is tried first, so that one that cannot be stored and continued fails before training.

    Args:
        parameters: What it updates, all on one device.
        config: Which one, and its arguments.

    Raises:
        ConfigError: If there is no such optimiser, it refuses its arguments or could not be continued exactly.
    """
    parameters = list(parameters)
    device = parameters[0].device
    name = f"training.optimizer {config.optimizer}"
    if config.optimizer in _ADAMS:
        kind: type[torch.optim.Optimizer] = _ADAMS[config.optimizer]
        arguments: dict[str, Any] = {
            "lr": config.learning_rate,
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_epsilon,
            "weight_decay": config.weight_decay,
        }
        fused = {"fused": True} if _can_fuse(device) and "foreach" not in config.optimizer_kwargs else {}
    else:
        kind, arguments, fused = _imported(config.optimizer), {"lr": config.learning_rate}, {}
    if decided := sorted({"params", *arguments} & config.optimizer_kwargs.keys()):
        raise ConfigError(f"training.optimizer_kwargs has {decided[0]}, which other settings of training decide.")
    arguments |= fused | config.optimizer_kwargs

    def build(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        try:
            optimizer = kind(parameters, **arguments)
        except Exception as error:  # whatever an optimiser that is not ours may raise
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{name} cannot be made ({type(error).__name__}: {reason}); see training.optimizer_kwargs."
            ) from error
        if kind not in _ADAMS.values():
            # Others may say that they can skip an update, but torch's fused SGD then goes on with a momentum that was
            # never written if the first one is skipped.
            vars(optimizer).pop("_step_supports_amp_scaling", None)
        return optimizer

    if device.type != "meta":
        check_that_it_continues(build, name, device)
    return build(parameters)


def _can_fuse(device: torch.device) -> bool:
    """Tries whether there is a fused Adam for a device."""
    probe = torch.nn.Parameter(torch.zeros(1, device=device))
    probe.grad = torch.zeros_like(probe)
    try:
        torch.optim.Adam([probe], fused=True).step()
    except RuntimeError:
        return False
    return True


def _imported(path: str) -> type[torch.optim.Optimizer]:
    """Imports an optimiser by its path."""
    module_name, _, class_name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"training.optimizer {path} cannot be imported ({error}); check the path and that its package is installed."
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ConfigError(f"training.optimizer {path} is no torch.optim.Optimizer; give the path of one.")
    return kind


def may_step(optimizer: torch.optim.Optimizer, is_nonfinite: torch.Tensor) -> bool:
    """Makes sure that a non-finite gradient changes nothing.

    Args:
        optimizer: Whose `step` comes next.
        is_nonfinite: Whether its gradient is not finite; a bool on the device.

    Returns:
        Whether to call `step`. A fused optimiser skips the update itself, so the host need not wait to know whether it
        will; any other makes the host wait for the flag.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        vars(optimizer)["found_inf"] = is_nonfinite.to(torch.float32)
        return True
    return not bool(is_nonfinite)


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
