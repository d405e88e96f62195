"""What an optimiser knows, as tensors and plain numbers that a checkpoint can hold without pickle."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from safetensors.torch import load, save

from ddpm_hf.config import ConfigError
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
