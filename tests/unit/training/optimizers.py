"""Optimizers that keep their state in unusual places; tests name them by import path."""

from typing import Any, ClassVar

import torch


class Counting(torch.optim.SGD):
    """SGD that slows down by counts that are not tensors: one for each parameter and one for the group."""

    def __init__(self, params: Any, lr: float = 0.1, slowness: float = 0.5) -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        self.defaults |= {"slowness": slowness, "num_steps": 0}
        self.param_groups[0] |= {"slowness": slowness, "num_steps": 0}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        group["num_steps"] += 1
        for parameter in group["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                state["scale"] = state.get("scale", 1.0) / (1 + group["slowness"] * group["num_steps"])
                parameter.grad.mul_(state["scale"])
        super().step()


class KeepingLists(torch.optim.SGD):
    """Keep gradients in a list."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].setdefault("history", []).append(parameter.grad)
        super().step()


class Hiding(torch.optim.SGD):
    """Count outside of the state_dict."""

    num_steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.num_steps += 1
        for parameter in self.param_groups[0]["params"]:
            parameter.grad /= self.num_steps
        super().step()


class KeepingHalf(torch.optim.SGD):
    """Keep integers, which torch converts to the dtype of the parameter on load."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["signs"] = torch.sign(parameter.grad).to(torch.int8)


class Watching(torch.optim.SGD):
    """SGD that records the learning rate of each step and the first value of its gradient."""

    seen: ClassVar[list[tuple[float, float]]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        self.seen.append((group["lr"], float(group["params"][0].grad.flatten()[0])))
        super().step()


def not_a_class() -> None:
    """Something that can be imported and is not an optimizer."""
