"""Optimizers, the learning rate, and the policy for non-finite gradients.

A checkpoint holds the state of an optimizer without pickle: tensors, named parameter/key, in optimizer.safetensors, and
plain values in trainer_state.json.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from safetensors.torch import load, save

from ddpm_hf.config import ConfigError, TrainingConfig
from ddpm_hf.redaction import reason_of

Scalars: TypeAlias = dict[str, dict[str, Any]]
"""What an optimizer keeps besides tensors: "state" (parameter -> key -> value) and "group" (changed settings)."""

_ADAMS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """Build the optimizer of training.optimizer; Adam and AdamW are fused if the device supports it.

    Args:
        parameters: The parameters to update, all on one device.
        config: Name or import path, and arguments.

    Raises:
        ConfigError: The optimizer cannot be imported or built, or does not continue exactly from a checkpoint.
    """
    parameters = list(parameters)
    device = parameters[0].device
    name = f"training.optimizer {config.optimizer}"
    arguments: dict[str, Any] = {"lr": config.learning_rate}
    if config.optimizer in _ADAMS:
        kind: type[torch.optim.Optimizer] = _ADAMS[config.optimizer]
        arguments |= {
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_epsilon,
            "weight_decay": config.weight_decay,
        }
        fused = {"fused": True} if _can_fuse(device) and "foreach" not in config.optimizer_kwargs else {}
    else:
        kind, fused = _import_optimizer(config.optimizer), {}
    if conflicts := sorted({"params", *arguments} & config.optimizer_kwargs.keys()):
        raise ConfigError(
            f"training.optimizer_kwargs has {conflicts[0]}, which other settings of training decide; remove it."
        )
    arguments |= fused | config.optimizer_kwargs

    def build(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        try:
            optimizer = kind(parameters, **arguments)
        except Exception as error:  # optimizers by import path may raise anything
            raise ConfigError(
                f"{name} cannot be built ({type(error).__name__}: {reason_of(error)}); change "
                "training.optimizer_kwargs."
            ) from error
        if kind not in _ADAMS.values():
            # torch's fused SGD claims to support skipped updates, but then uses a momentum buffer that a skipped first
            # update has left uninitialized.
            vars(optimizer).pop("_step_supports_amp_scaling", None)
        return optimizer

    if device.type != "meta":
        _check_that_it_resumes(build, name, device)
    return build(parameters)


def _can_fuse(device: torch.device) -> bool:
    probe = torch.nn.Parameter(torch.zeros(1, device=device))
    probe.grad = torch.zeros_like(probe)
    try:
        torch.optim.Adam([probe], fused=True).step()
    except RuntimeError:
        return False
    return True


def _import_optimizer(path: str) -> type[torch.optim.Optimizer]:
    module_name, _, class_name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"training.optimizer {path} cannot be imported ({error}); check the path and that its package is installed."
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ConfigError(f"training.optimizer {path} is not a torch.optim.Optimizer; give the path of one.")
    return kind


def _check_that_it_resumes(
    build: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], name: str, device: torch.device
) -> None:
    """Store and restore a small optimizer between two steps; raise ConfigError if that changes anything."""
    # 64 x 64 because some optimizers treat tensors of fewer than 4096 values differently.
    values = [torch.linspace(-1, 1, math.prod(shape)).reshape(shape) for shape in ((8,), (64, 64), (8, 4, 3, 3))]
    names = [f"parameter_{index}" for index in range(len(values))]

    def step(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.grad = value.flip(0).to(device)
        try:
            optimizer.step()
        except Exception as error:  # optimizers by import path may raise anything
            raise ConfigError(
                f"{name} cannot take a step ({type(error).__name__}: {reason_of(error)}); choose another optimizer or "
                "other training.optimizer_kwargs."
            ) from error

    first = [torch.nn.Parameter(value.to(device, copy=True)) for value in values]
    optimizer = build(first)
    step(optimizer, first)
    try:
        tensors, scalars = optimizer_state(optimizer, names)
        stored = load(save(tensors))
    except (ConfigError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{name} cannot be stored in a checkpoint ({reason_of(error)}); choose another optimizer."
        ) from None
    second = [torch.nn.Parameter(parameter.detach().clone()) for parameter in first]
    restored = build(second)
    load_optimizer_state(restored, names, stored, scalars)
    is_restored = _are_equal(optimizer_state(restored, names), (stored, scalars))
    step(optimizer, first)
    step(restored, second)
    is_continued = _are_equal(optimizer_state(optimizer, names), optimizer_state(restored, names))
    if not (is_restored and is_continued and all(map(torch.equal, first, second))):
        raise ConfigError(
            f"{name} does not continue exactly from a checkpoint: it keeps state outside its state_dict, converts it, "
            "or is random; choose another optimizer."
        )


def _are_equal(one: tuple[dict[str, torch.Tensor], Scalars], other: tuple[dict[str, torch.Tensor], Scalars]) -> bool:
    """Compare two results of `optimizer_state`, bit by bit and with dtypes."""
    (tensors, scalars), (other_tensors, other_scalars) = one, other
    return (
        scalars == other_scalars
        and tensors.keys() == other_tensors.keys()
        and all(
            tensors[name].dtype == other_tensors[name].dtype
            and torch.equal(tensors[name].cpu(), other_tensors[name].cpu())
            for name in tensors
        )
    )


def optimizer_state(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> tuple[dict[str, torch.Tensor], Scalars]:
    """Return the state of an optimizer with one parameter group, without pickle.

    Args:
        optimizer: The optimizer.
        names: Names of its parameters, in order.

    Returns:
        Tensors named parameter/key, and everything else. Of the group only what changed since it was built is included;
        the rest comes from the configuration, where it may be changed before a resume.

    Raises:
        ConfigError: Something is neither a tensor nor a JSON value.
    """
    content = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: Scalars = {"state": {}, "group": {}}
    for index, moments in content["state"].items():
        for key, value in moments.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{names[index]}/{key}"] = value.contiguous()
            else:
                scalars["state"].setdefault(names[index], {})[key] = _json_value(value, key)
    (group,) = content["param_groups"]
    for key, value in group.items():
        # The trainer sets the learning rate in every step.
        if key in ("params", "param_names", "lr"):
            continue
        if key not in optimizer.defaults or value != optimizer.defaults[key]:
            scalars["group"][key] = _json_value(value, key)
    return tensors, {kind: values for kind, values in scalars.items() if values}


def _json_value(value: object, key: str) -> object:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise ConfigError(f"its state {key} is a {type(value).__name__}, not a tensor, number, string, true, false or null")


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, torch.Tensor], scalars: Scalars
) -> None:
    """Restore what `optimizer_state` returned.

    Raises:
        ValueError: Moments of Adam are missing or have another shape than the parameter. Of other optimizers the
            expected state is not known.
    """
    content = optimizer.state_dict()
    content["state"] = {}
    for index, name in enumerate(names):
        prefix = f"{name}/"
        moments = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        moments |= scalars.get("state", {}).get(name, {})
        if moments:
            content["state"][index] = moments
    content["param_groups"][0] |= scalars.get("group", {})
    optimizer.load_state_dict(content)
    if optimizer.state and isinstance(optimizer, torch.optim.Adam):
        for name, parameter in zip(names, optimizer.param_groups[0]["params"], strict=True):
            moments = optimizer.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key not in moments or "step" not in moments or moments[key].shape != parameter.shape:
                    raise ValueError(f"{key} of {name} is missing or has the wrong shape")


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    The first `learning_rate_warmup_steps` updates increase it linearly to the peak (5000 in Ho et al. 2020); cosine and
    linear then decrease it towards 0, which they would reach at step `num_steps`; inverse_sqrt decreases it after
    `learning_rate_reference_steps`. It does not depend on the number of processes or on gradient accumulation.
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
        case "inverse_sqrt":
            # alpha_ref / sqrt(max(t / t_ref, 1)), code of Karras et al. 2024
            return config.learning_rate / math.sqrt(max(step / (config.learning_rate_reference_steps or warmup), 1))
        case _:
            return config.learning_rate


def clip_grad_norm_(gradients: list[torch.Tensor], max_norm: float | None) -> torch.Tensor:
    """Scale gradients in place to a global norm of at most `max_norm`.

    The arithmetic of torch.nn.utils.clip_grad_norm_, without the time that it takes to group many small tensors by
    device and dtype.

    Args:
        gradients: Tensors of one device and dtype.
        max_norm: None does not scale them.

    Returns:
        The norm before, () on the device.
    """
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0)))
    if max_norm is not None:
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def arm_found_inf(optimizer: torch.optim.Optimizer, is_nonfinite: torch.Tensor) -> bool:
    """Make sure that a non-finite gradient changes nothing.

    Args:
        optimizer: The optimizer, before its `step`.
        is_nonfinite: bool on the device, whether the gradient is not finite.

    Returns:
        Whether to call `step`. A fused optimizer reads the flag on the device; for any other the host waits for it.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        vars(optimizer)["found_inf"] = is_nonfinite.to(torch.float32)
        return True
    return not bool(is_nonfinite)


class NonFiniteTraining(Exception):
    """Gradients or weights are not finite; the message says since when and what to do."""


def check_finite(tensors: Iterable[torch.Tensor], step: int) -> None:
    """Raise NonFiniteTraining if any weight is not finite; a run could not recover from such a checkpoint."""
    tensors = [tensor.detach() for tensor in tensors]
    # A sum is not finite if a value is not. It may also overflow, so then the values decide.
    has_finite_sums = torch.stack([tensor.sum() for tensor in tensors]).isfinite().all()
    if not has_finite_sums and not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
        raise NonFiniteTraining(
            f"the weights or their EMA are not finite after step {step}, so they are not saved; earlier checkpoints "
            "are intact. Lower training.learning_rate, or choose another training.optimizer."
        )


class NonFiniteGuard:
    """Count skipped updates, and stop a run after too many in a row.

    `record` keeps what happened on the device; `read` makes the host wait and brings the counts up to date.

    Gradients are averaged over ranks before their norm is taken, so every rank sees the same flags. With fp16 an update
    is also skipped if the scaled gradients overflow, which is how the gradient scaler finds its scale; these skips are
    counted separately and never stop the run. At a scale of 1 scaling cannot be the reason.

    Args:
        max_consecutive: Stop after this many consecutive skipped updates, not counting those of the scaler.

    Attributes:
        num_skipped: Updates skipped because of a non-finite gradient.
        num_consecutive: Consecutive ones of them at the end.
        num_scaler_skips: Updates skipped because of the gradient scaler.
    """

    def __init__(self, max_consecutive: int) -> None:
        self.num_skipped = 0
        self.num_consecutive = 0
        self.num_scaler_skips = 0
        self._max_consecutive = max_consecutive
        self._recorded: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    @property
    def num_recorded(self) -> int:
        """Number of updates that were not read yet."""
        return len(self._recorded)

    def record(self, step: int, is_nonfinite: torch.Tensor, loss_scale: torch.Tensor | None = None) -> None:
        """Keep on the device whether an update is skipped, and why.

        Args:
            step: Optimizer step, counted from 0.
            is_nonfinite: bool (), whether the norm of the gradient is not finite.
            loss_scale: Scale of the gradient scaler in this update; None without one.
        """
        counts = is_nonfinite if loss_scale is None else is_nonfinite & (loss_scale <= 1)
        self._recorded.append((step, is_nonfinite, counts))

    def read(self, warn: Callable[[int], None]) -> None:
        """Count the recorded updates; the host waits for the device.

        Args:
            warn: Called with the first step of each series of skipped updates.

        Raises:
            NonFiniteTraining: Too many consecutive updates were skipped, at any time since the last call.
        """
        if not self._recorded:
            return
        steps, *flags = zip(*self._recorded, strict=True)
        self._recorded = []
        is_nonfinite, counts = torch.stack([torch.stack(column) for column in flags]).tolist()
        for step, is_skipped, is_counted in zip(steps, is_nonfinite, counts, strict=True):
            if not is_skipped:
                self.num_consecutive = 0
            elif not is_counted:
                self.num_scaler_skips += 1
            else:
                self.num_skipped += 1
                self.num_consecutive += 1
                if self.num_consecutive == 1:
                    warn(step)
                if self.num_consecutive >= self._max_consecutive:
                    raise NonFiniteTraining(
                        f"the gradient was not finite in {self.num_consecutive} updates in a row (training."
                        "max_consecutive_nonfinite); the checkpoints before them are intact. Lower "
                        "training.learning_rate, use bf16 or fp32 instead of fp16, or check the images."
                    )

    def state_dict(self) -> dict[str, int]:
        """Return the counts, named as in trainer_state.json."""
        return {
            "num_skipped": self.num_skipped,
            "num_consecutive_skipped": self.num_consecutive,
            "num_scaler_skips": self.num_scaler_skips,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the counts."""
        self.num_skipped = state["num_skipped"]
        self.num_consecutive = state["num_consecutive_skipped"]
        self.num_scaler_skips = state["num_scaler_skips"]
