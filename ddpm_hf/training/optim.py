"""Optimizers, the learning rate, and what happens to gradients that are not finite.

What an optimiser knows, as tensors and plain numbers that a checkpoint can hold without pickle.

The optimiser, and the learning rate as a closed form of the step.

What keeps a run from being lost: signals, the run folder's lock, and the policy for non-finite gradients.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from safetensors.torch import load, save

from ddpm_hf.config import ConfigError, TrainingConfig
from ddpm_hf.redaction import reason_of

Scalar: TypeAlias = str | int | float | bool | None
# "state": parameter -> key -> value; "group": what changed in the group of all parameters since it was made.
Scalars: TypeAlias = dict[str, dict[str, Any]]

# The trainer sets the learning rate anew in every step.
_NOT_STORED = ("params", "param_names", "lr")


def pack(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> tuple[dict[str, torch.Tensor], Scalars]:
    """Names everything that an optimiser with one group of parameters remembers.

    Args:
        optimizer: Which one.
        names: Names of the parameters, in its order.

    Returns:
        Tensors called parameter/key, and what is no tensor.

    Raises:
        ConfigError: If something is neither a tensor nor a number, text, true, false or null.
    """
    content = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: Scalars = {"state": {}, "group": {}}
    for index, moments in content["state"].items():
        for key, value in moments.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{names[index]}/{key}"] = value.contiguous()
            else:
                scalars["state"].setdefault(names[index], {})[key] = _checked(value, key)
    (group,) = content["param_groups"]
    for key, value in group.items():
        # What is still as it was made comes from the configuration, so that it can be changed there.
        if key not in _NOT_STORED and (key not in optimizer.defaults or value != optimizer.defaults[key]):
            scalars["group"][key] = _checked(value, key)
    return tensors, {kind: values for kind, values in scalars.items() if values}


def unpack(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, torch.Tensor], scalars: Scalars
) -> None:
    """Gives an optimiser back what `pack` named.

    Raises:
        ValueError: If Adam's moments of some parameters are missing or of another shape. Of other optimisers it is not
            known what they keep.
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
                    raise ValueError(f"there is no {key} for {name}, or it does not fit")


def check_that_it_continues(
    build: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], name: str, device: torch.device
) -> None:
    """Lets an optimiser of a few numbers take a step, be stored, be taken up and take another.

    Args:
        build: Makes the optimiser.
        name: What to call it in messages.
        device: Where it will work.

    Raises:
        ConfigError: If it cannot take a step, cannot be stored, or does not go on exactly where it stood.
    """
    # 4096 numbers, since there are optimisers that keep less for small tensors.
    shapes = ((8,), (64, 64), (8, 4, 3, 3))
    names = [f"parameter_{number}" for number in range(len(shapes))]
    first = [torch.nn.Parameter(_numbers(shape, device)) for shape in shapes]
    optimizer = build(first)
    _step(optimizer, first, name)
    try:
        tensors, scalars = pack(optimizer, names)
        content = load(save(tensors))
    except (ConfigError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{name} cannot be stored in a checkpoint ({reason_of(error)}); choose another optimiser."
        ) from None
    second = [torch.nn.Parameter(parameter.detach().clone()) for parameter in first]
    again = build(second)
    unpack(again, names, content, scalars)
    is_restored = _are_equal(pack(again, names), (content, scalars))
    _step(optimizer, first, name)
    _step(again, second, name)
    weights = [dict(zip(names, parameters, strict=True)) for parameters in (first, second)]
    goes_on = _are_equal((weights[0], {}), (weights[1], {})) and _are_equal(pack(optimizer, names), pack(again, names))
    if not (is_restored and goes_on):
        raise ConfigError(
            f"{name} does not go on exactly where a checkpoint left it, since its state is more than its state_dict "
            "says, or is random; choose another optimiser."
        )


def _step(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter], name: str) -> None:
    """Takes one step with gradients of both signs."""
    for parameter in parameters:
        parameter.grad = _numbers(parameter.shape, parameter.device).flip(0)
    try:
        optimizer.step()
    except Exception as error:  # whatever an optimiser that is not ours may raise
        raise ConfigError(
            f"{name} cannot take a step ({type(error).__name__}: {reason_of(error)}); choose "
            "another optimiser or other training.optimizer_kwargs."
        ) from error


def _numbers(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Returns numbers between -1 and 1."""
    size = torch.Size(shape)
    return torch.linspace(-1, 1, size.numel(), device=device).reshape(size)


def _are_equal(
    one: tuple[Mapping[str, torch.Tensor], Scalars], other: tuple[Mapping[str, torch.Tensor], Scalars]
) -> bool:
    """Compares what `pack` returned, bit by bit and kinds included."""
    (tensors, scalars), (others, other_scalars) = one, other
    return (
        scalars == other_scalars
        and tensors.keys() == others.keys()
        and all(
            tensors[name].dtype == others[name].dtype
            and torch.equal(tensors[name], others[name].to(tensors[name].device))
            for name in tensors
        )
    )


def _checked(value: object, key: str) -> Scalar:
    """Returns a value that JSON can hold."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise ConfigError(f"it keeps {key} as {type(value).__name__}, which is no tensor, number, text, true or false")


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


class NonFiniteTraining(Exception):
    """The gradient or the weights are no longer finite; the message says since when and what to do."""


def check_finite(tensors: Iterable[torch.Tensor], step: int) -> None:
    """Makes sure that weights are worth saving: a run that goes on from others could never recover.

    Raises:
        NonFiniteTraining: If any number is not finite.
    """
    if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
        raise NonFiniteTraining(
            f"the weights or their averages are not finite after step {step}, so they are not saved; the checkpoints "
            "before it are intact. Lower training.learning_rate, or choose another training.optimizer."
        )


class NonFiniteGuard:
    """Counts skipped updates without making the host wait for the device.

    Gradients are reduced over ranks before their norm is taken, so every rank sees the same flags. With fp16 an update
    is also skipped when the scaled gradients overflow, which is how the scaler finds its scale: that is counted apart
    and never stops the run. Where the scale is down to 1 it is not the scaling that is at fault.

    Args:
        max_consecutive: Stop after this many skipped updates in a row, those of the scaler left out.
    """

    def __init__(self, max_consecutive: int) -> None:
        self.num_skipped = 0
        self.num_consecutive = 0
        self.num_scaler_skips = 0
        self._max_consecutive = max_consecutive
        self._flags: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def record(self, is_nonfinite: torch.Tensor, loss_scale: torch.Tensor | None = None) -> None:
        """Starts copying to the host whether an update will be skipped, and for whose sake.

        Args:
            is_nonfinite: bool, whether the norm of the gradient is not finite.
            loss_scale: The scale of the gradient scaler in this update; None without one.
        """
        is_overflow = is_nonfinite & (loss_scale > 1) if loss_scale is not None else torch.zeros_like(is_nonfinite)
        self._flags = torch.stack([is_nonfinite, is_overflow])
        if self._flags.device.type == "cuda":
            on_device = self._flags
            self._flags = torch.empty_like(on_device, device="cpu", pin_memory=True)
            self._flags.copy_(on_device, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def was_applied(self) -> bool | None:
        """Tells once whether the recorded update changed the weights; None if there is nothing to tell.

        Raises:
            NonFiniteTraining: If too many updates in a row were skipped.
        """
        if self._flags is None:
            return None
        if self._copied is not None:
            self._copied.synchronize()
        is_nonfinite, is_overflow = self._flags.tolist()
        self._flags = self._copied = None
        if not is_nonfinite:
            self.num_consecutive = 0
            return True
        if is_overflow:
            self.num_scaler_skips += 1
            return False
        self.num_skipped += 1
        self.num_consecutive += 1
        if self.num_consecutive >= self._max_consecutive:
            raise NonFiniteTraining(
                f"the gradient was not finite in {self.num_consecutive} updates in a row (training."
                "max_consecutive_nonfinite); the checkpoints before them are intact. Lower training.learning_rate, "
                "use bf16 or fp32 instead of fp16, or look at the images."
            )
        return False
