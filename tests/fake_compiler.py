"""A fake of torch.compile, for tests of what a compiler would see."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


class FakeCompiler:
    """Stands in for torch.compile: runs the function, and records every form of input that would be compiled.

    With CUDA graphs, the output of a call lies in memory that the next one overwrites.
    """

    def __init__(self) -> None:
        self.forms: set[tuple[object, ...]] = set()
        self.options: dict[str, Any] = {}
        self.num_marks = 0
        self.num_calls = 0
        self.has_gradients: list[bool] = []
        self._static: dict[torch.Size, torch.Tensor] = {}

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        self.options = options

        def call(*inputs: torch.Tensor, **others: Any) -> Any:
            self.num_calls += 1
            self.has_gradients.append(torch.is_grad_enabled())
            form = tuple((tuple(one.shape), one.stride(), one.dtype) for one in inputs)
            self.forms.add((torch.is_grad_enabled(), function.__self__.training, *form))  # type: ignore[attr-defined]
            (output,) = function(*inputs, **others)
            if options["mode"] == "reduce-overhead":
                static = self._static.setdefault(output.shape, output.detach().clone())
                output = _Replayed.apply(output, static)
            return (output,)

        return call

    def mark(self) -> None:
        self.num_marks += 1


class _Replayed(torch.autograd.Function):
    """The output of a replayed graph: a tensor that the next replay overwrites."""

    @staticmethod
    def forward(_: Any, output: torch.Tensor, static: torch.Tensor) -> torch.Tensor:
        static.copy_(output)
        return static.detach()

    @staticmethod
    def backward(_: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    """Put a fake in place of torch.compile."""
    fake = FakeCompiler()
    monkeypatch.setattr(torch, "compile", fake.compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", fake.mark)
    return fake
