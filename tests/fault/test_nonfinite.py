"""What is not finite costs its own update and nothing else, and never becomes part of a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_hf.cli.main import train
from ddpm_hf.config import load_config
from ddpm_hf.data.loader import SampleOrder
from ddpm_hf.training.checkpoint import find_latest
from ddpm_hf.training.loss import DenoisingLoss
from ddpm_hf.training.trainer import Trainer
from tests.conftest import run_arguments
from tests.integration.test_training import EVERYTHING_RANDOM, assert_same_run, metrics_of, tensors_of

EVERY_STEP: dict[str, Any] = {"training__checkpoint_every_steps": 1, "training__num_checkpoints_kept": 9}


def poison_an_image(step: int, patch: pytest.MonkeyPatch) -> None:
    """Makes one pixel of one image NaN, in the second micro batch of a step."""
    call, calls = DenoisingLoss.__call__, iter(range(2, 99))

    def poisoned(self: DenoisingLoss, model: Any, x_0: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if divmod(next(calls), 2) == (step, 1):
            x_0[1, 0, 3, 4] = float("nan")
        return call(self, model, x_0, *arguments)

    patch.setattr(DenoisingLoss, "__call__", poisoned)


def poison_a_gradient(step: int, patch: pytest.MonkeyPatch) -> None:
    """Makes one number of one gradient infinite, while the loss is as it should be."""
    update = Trainer._update

    def poisoned(self: Trainer, current: int) -> None:
        if current + 1 == step:
            gradient = list(self.unet.parameters())[7].grad
            assert gradient is not None
            gradient.view(-1)[0] = float("inf")
        update(self, current)

    patch.setattr(Trainer, "_update", poisoned)


@pytest.mark.parametrize("poison", [poison_an_image, poison_a_gradient])
def test_one_number_that_is_not_finite_costs_one_update(
    poison: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit by bit: weights, averages and moments after it are those before it; the step and its images are named."""
    poison(3, monkeypatch)
    arguments = run_arguments(tmp_path / "run", **EVERYTHING_RANDOM, **EVERY_STEP)
    assert train(arguments) == 0
    before, after, later = (tensors_of(tmp_path / "run/checkpoints" / f"step_0000000{step}") for step in (2, 3, 4))
    kept = [key for key in before if not key.startswith("objective")]
    assert not [key for key in kept if not torch.equal(before[key], after[key])]
    assert [key for key in kept if not torch.equal(after[key], later[key])]
    assert all(torch.isfinite(value).all() for value in later.values()), "neither is what was learned of the losses"
    assert metrics_of(tmp_path / "run")[-1]["num_skipped_updates"] == 1
    config, _ = load_config(arguments)
    images = SampleOrder(1797, config.training.seed).positions(16, 24).tolist()
    sentence = f"of step 3 was not finite, so its update was skipped. Its images were {', '.join(map(str, images))}."
    assert sentence in caplog.text


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finite gradient may still blow them up; the run goes on from the last good ones, as if nothing had been."""
    update = Trainer._update

    def blow_up(self: Trainer, current: int) -> None:
        update(self, current)
        if current + 1 == 4:
            with torch.no_grad():
                next(self.unet.parameters()).view(-1)[0] = float("inf")

    arguments = run_arguments(tmp_path / "run", **EVERYTHING_RANDOM, **EVERY_STEP)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", blow_up)
        assert train(arguments) == 3
    assert "the weights or their EMA are not finite after step 4, so they are not saved" in capsys.readouterr().err
    latest, skipped = find_latest(tmp_path / "run" / "checkpoints")
    assert latest is not None
    assert (latest.step, skipped) == (3, [])
    assert not (tmp_path / "run" / "pipeline").exists()
    assert train(arguments) == 0
    assert train(run_arguments(tmp_path / "whole", **EVERYTHING_RANDOM, **EVERY_STEP)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run", 6)
