"""Optimisers that keep their state in unusual places; tests name them by import path."""

from typing import Any, ClassVar

import torch


class Counting(torch.optim.SGD):
    """SGD that slows down by a count of its own, not in a tensor: for each parameter and for all."""

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
    """Remembers gradients in a list."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].setdefault("history", []).append(parameter.grad)
        super().step()


class Hiding(torch.optim.SGD):
    """Counts where no state_dict looks."""

    num_steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.num_steps += 1
        for parameter in self.param_groups[0]["params"]:
            parameter.grad /= self.num_steps
        super().step()


class KeepingHalf(torch.optim.SGD):
    """Keeps whole numbers, which torch turns into those of the parameter when it loads them."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["signs"] = torch.sign(parameter.grad).to(torch.int8)


class Watching(torch.optim.SGD):
    """SGD that writes down the learning rate of each of its steps, and the first number of its gradient."""

    seen: ClassVar[list[tuple[float, float]]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        self.seen.append((group["lr"], float(group["params"][0].grad.flatten()[0])))
        super().step()


def not_a_class() -> None:
    """Something that can be imported and is no optimiser."""
