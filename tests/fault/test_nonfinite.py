"""A value that is not finite costs its own update and nothing else, and never becomes part of a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_hf.cli.main import train
from ddpm_hf.config import parse_command_line
from ddpm_hf.data.loader import SampleOrder
from ddpm_hf.training.checkpoint import find_latest
from ddpm_hf.training.loss import DenoisingLoss
from ddpm_hf.training.optim import NonFiniteGuard, NonFiniteTraining
from ddpm_hf.training.trainer import Trainer
from tests.conftest import run_arguments
from tests.runs import (
    EVERYTHING_RANDOM,
    assert_same_run,
    metrics_of,
    poison_loss_at,
    tensors_of,
    use_gradient_scaler,
)

EVERY_STEP: dict[str, Any] = {"training__checkpoint_every_steps": 1, "training__num_checkpoints_kept": 9}


def poison_an_image(step: int, patch: pytest.MonkeyPatch) -> None:
    """Make one pixel of one image NaN, in the second micro batch of a step."""
    call, calls = DenoisingLoss.__call__, iter(range(2, 99))

    def poisoned(self: DenoisingLoss, model: Any, x_0: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if divmod(next(calls), 2) == (step, 1):
            x_0[1, 0, 3, 4] = float("nan")
        return call(self, model, x_0, *arguments)

    patch.setattr(DenoisingLoss, "__call__", poisoned)


def inf_at_first(gradient: torch.Tensor) -> torch.Tensor:
    infinite = torch.zeros_like(gradient)
    infinite.view(-1)[0] = float("inf")
    return infinite


def poison_a_gradient(step: int, patch: pytest.MonkeyPatch) -> None:
    """Make one value of one gradient infinite, while the loss is finite."""
    call, calls = DenoisingLoss.__call__, iter(range(2, 99))

    def poisoned(self: DenoisingLoss, model: Any, *arguments: Any) -> torch.Tensor:
        if divmod(next(calls), 2) == (step, 1):
            weight = list(model.parameters())[7]
            hook = weight.register_hook(lambda gradient: (hook.remove(), gradient + inf_at_first(gradient))[1])
        return call(self, model, *arguments)

    patch.setattr(DenoisingLoss, "__call__", poisoned)


@pytest.mark.parametrize("poison", [poison_an_image, poison_a_gradient])
def test_one_non_finite_value_costs_one_update(
    poison: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit by bit: weights, EMA and moments after it are those before it; the step and its images are named."""
    poison(3, monkeypatch)
    arguments = run_arguments(tmp_path / "run", **EVERYTHING_RANDOM | EVERY_STEP | {"training__log_every_steps": 1})
    assert train(arguments) == 0
    before, after, later = (tensors_of(tmp_path / "run/checkpoints" / f"step_0000000{step}") for step in (2, 3, 4))
    kept = [key for key in before if not key.startswith("objective")]
    assert not [key for key in kept if not torch.equal(before[key], after[key])]
    assert [key for key in kept if not torch.equal(after[key], later[key])]
    assert all(torch.isfinite(value).all() for value in later.values()), "the loss history stays finite too"
    rows = metrics_of(tmp_path / "run")
    assert [row["num_skipped_updates"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert [row["loss"] is None for row in rows] == [False, False, True, False, False, False]
    config, _ = parse_command_line(arguments)
    images = SampleOrder(1797, config.training.seed).positions(16, 24).tolist()
    sentence = f"of step 3 was not finite, so its update was skipped. Its images were {', '.join(map(str, images))}."
    assert sentence in caplog.text


def test_training_that_stays_non_finite_stops_with_code_3_and_keeps_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison_loss_at(range(3, 99), monkeypatch)
    run = tmp_path / "run"
    assert train(run_arguments(run, training__num_steps=20, training__max_consecutive_nonfinite=3)) == 3
    assert "not finite in 3 updates in a row" in capsys.readouterr().err
    latest, skipped = find_latest(run / "checkpoints")
    assert latest is not None
    assert not skipped
    assert all(torch.isfinite(value).all() for value in tensors_of(latest.path).values())


@pytest.mark.parametrize("later", ["log_every_steps", "checkpoint_every_steps"])
def test_a_series_between_two_log_lines_is_named_and_stops_the_run_at_the_next_one_or_checkpoint(
    later: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if the updates after it were applied; nothing is read, logged or saved before."""
    poison_loss_at((2, 4, 5), monkeypatch)
    run = tmp_path / "run"
    events = {"training__log_every_steps": 99, "training__checkpoint_every_steps": 99, f"training__{later}": 7}
    changes = events | {"training__num_steps": 20, "training__max_consecutive_nonfinite": 2}
    read_at: list[int] = []
    read = NonFiniteGuard.read
    monkeypatch.setattr(
        NonFiniteGuard, "read", lambda self, warn: (read_at.append(self.num_recorded), read(self, warn))
    )
    assert train(run_arguments(run, **changes)) == 3
    assert read_at == [7]
    for step in (2, 4):
        assert f"The gradient of step {step} was not finite, so its update was skipped. Its images were" in caplog.text
    assert "of step 5 was" not in caplog.text
    assert not list(run.glob("checkpoints/step_*"))


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finite gradient may still blow them up; the run continues from the last good ones as if it never happened."""
    train_step = Trainer._train_step

    def blow_up(self: Trainer, current: int) -> None:
        train_step(self, current)
        if current + 1 == 4:
            with torch.no_grad():
                next(self.unet.parameters()).view(-1)[0] = float("inf")

    arguments = run_arguments(tmp_path / "run", **EVERYTHING_RANDOM, **EVERY_STEP)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", blow_up)
        assert train(arguments) == 3
    assert "not finite after step 4, so they are not saved" in capsys.readouterr().err
    latest, skipped = find_latest(tmp_path / "run" / "checkpoints")
    assert latest is not None
    assert (latest.step, skipped) == (3, [])
    assert not (tmp_path / "run" / "pipeline").exists()
    assert train(arguments) == 0
    assert train(run_arguments(tmp_path / "whole", **EVERYTHING_RANDOM, **EVERY_STEP)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run", 6)


# -------------------------------------------------------------------------------------------------------------- fp16


@pytest.mark.usefixtures("fresh_accelerate")
def test_skips_by_which_the_fp16_scaler_finds_its_scale_are_counted_apart(tmp_path: Path) -> None:
    """Bit by bit: while the scaled gradients overflow nothing changes, and no number of these skips stops a run.

    Scales of 2**60, 2**44 and 2**28 overflow fp16 for certain, 2**12 does not.
    """
    config, _ = parse_command_line(run_arguments(tmp_path / "run", **EVERY_STEP, training__max_consecutive_nonfinite=2))
    trainer = Trainer(config)
    use_gradient_scaler(trainer, 2.0**60, 2.0**-16)
    initial = [parameter.detach().clone() for parameter in trainer.unet.parameters()]
    try:
        trainer.fit()
    finally:
        trainer.folder.release()
    rows = metrics_of(tmp_path / "run")
    assert [row["num_scaler_skips"] for row in rows] == [1, 2, 3, 3, 3, 3]
    assert [row["num_skipped_updates"] for row in rows] == [0] * 6
    assert [row["loss"] is None for row in rows] == [True] * 3 + [False] * 3
    third, fourth = (tensors_of(tmp_path / "run/checkpoints" / f"step_0000000{step}") for step in (3, 4))
    weights = dict(trainer.unet.named_parameters())
    for (name, _), before in zip(weights.items(), initial, strict=True):
        assert torch.equal(third[f"unet/diffusion_pytorch_model.safetensors:{name}"], before)
        assert torch.equal(third[f"ema/diffusion_pytorch_model.safetensors:{name}"], before)
    assert any(not torch.equal(third[key], fourth[key]) for key in third)
    state = json.loads((tmp_path / "run/checkpoints/step_00000003/trainer_state.json").read_text())
    assert (state["num_scaler_skips"], state["num_skipped"], state["num_ema_updates"]) == (3, 0, 0)


@pytest.mark.usefixtures("fresh_accelerate")
def test_gradients_that_no_scale_makes_finite_stop_an_fp16_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a scale of 4: two skips of the scaler, and at a scale of 1 three skips that count as non-finite."""
    poison_loss_at(range(1, 99), monkeypatch)
    config, _ = parse_command_line(run_arguments(tmp_path / "run", training__max_consecutive_nonfinite=3))
    trainer = Trainer(config)
    use_gradient_scaler(trainer, 4.0)
    try:
        with pytest.raises(NonFiniteTraining):
            trainer.fit()
    finally:
        trainer.folder.release()
    assert (trainer.guard.num_scaler_skips, trainer.guard.num_skipped) == (2, 3)
