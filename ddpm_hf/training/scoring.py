"""The score that decides which checkpoint is the best one; how it is measured is no matter of the trainer's."""

import math
from collections.abc import Callable
from typing import Any, Protocol

from ddpm_hf.data import ImageSet, ImageStream
from ddpm_hf.diffusion import GaussianDiffusionPipeline


class Score(Protocol):
    """A number, the same on all ranks."""

    @property
    def kind(self) -> str:
        """What was measured and how; only scores of one kind can be compared."""

    @property
    def value(self) -> float:
        """The number."""

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower number is the better one."""

    def row(self) -> dict[str, Any]:
        """Returns what metrics.jsonl says of it."""


Scorer = Callable[[GaussianDiffusionPipeline, ImageSet | ImageStream, ImageSet], Score]
"""Collective: scores a pipeline by the training images or the held-out ones."""


def best_of(score: Score, step: int, best: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns what a checkpoint notes of a score that beats the best one so far; None for one that does not.

    A best one of another kind, as after a changed setting, is no rival.
    """
    if not math.isfinite(score.value):
        return None
    if best is not None and best["kind"] == score.kind:
        is_better = score.value < best["value"] if score.lower_is_better else score.value > best["value"]
        if not is_better:
            return None
    return {"step": step, "kind": score.kind, "value": score.value}
