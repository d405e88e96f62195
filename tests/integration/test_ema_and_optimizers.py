"""Post-hoc EMA of a real run, and optimizers other than Adam, stopped and resumed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ddpm_hf import GaussianDiffusionPipeline
from ddpm_hf.cli.main import main, train
from ddpm_hf.config import TrainingConfig
from ddpm_hf.training import ema, posthoc_ema
from ddpm_hf.training.ema import decay_schedules
from ddpm_hf.training.optim import learning_rate_at
from tests.conftest import run_arguments
from tests.runs import (
    EVERYTHING_RANDOM,
    assert_same_run,
    metrics_of,
    poison_loss_at,
    stop_with_signal_after,
    tensors_of,
)
from tests.unit.training.optimizers import Watching

POSTHOC: dict[str, Any] = {"training__posthoc_ema": True, "training__posthoc_ema_every_steps": 2}


def snapshots_of(run: Path) -> dict[str, bytes]:
    """Return every file of the EMA snapshots."""
    root = run / "ema_snapshots"
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def ema_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped. Read only."""
    run = tmp_path_factory.mktemp("runs") / "ema"
    assert train(run_arguments(run, **EVERYTHING_RANDOM, **POSTHOC, training__num_steps=7)) == 0
    return run


def test_ema_snapshots_are_stored_at_intervals_and_at_the_end(ema_run: Path) -> None:
    names = sorted(path.name for path in (ema_run / "ema_snapshots").iterdir())
    assert names == ["step_00000002", "step_00000004", "step_00000006", "step_00000007"]
    for step in ("step_00000006", "step_00000007"):
        for name in ("ema_sigma_0.050", "ema_sigma_0.100"):
            path = ema_run / "checkpoints" / step / name / "diffusion_pytorch_model.safetensors"
            in_checkpoint = load_file(path)
            alone = load_file(ema_run / "ema_snapshots" / step / f"{name}.safetensors")
            assert in_checkpoint.keys() == alone.keys()
            assert all(torch.equal(alone[key], in_checkpoint[key]) for key in alone)


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_stores_the_same_snapshots(
    step: int, ema_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two snapshots, and on one whose checkpoint is then lost. Bit for bit."""
    run = tmp_path / "run"
    arguments = run_arguments(run, **EVERYTHING_RANDOM, **POSTHOC, training__num_steps=7)
    with monkeypatch.context() as patch:
        stop_with_signal_after(step, patch)
        assert train(arguments) == 143
    if step == 6:
        shutil.rmtree(run / "checkpoints" / "step_00000006")
        for path in (run / "ema_snapshots" / "step_00000006").glob("*.safetensors"):
            path.write_bytes(b"what another run of these steps would have stored")
    assert train(arguments) == 0
    assert_same_run(ema_run, run, 7)
    assert snapshots_of(run) == snapshots_of(ema_run)


def test_a_run_that_dies_while_it_stores_a_snapshot_stores_it_after_the_resume(
    ema_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot is stored before the checkpoint of its step, after which the step would not be repeated."""
    run = tmp_path / "run"
    arguments = run_arguments(run, **EVERYTHING_RANDOM, **POSTHOC, training__num_steps=7)

    def die(root: Path, step: int, *_: object) -> None:
        raise RuntimeError(f"power cut at step {step}")

    with monkeypatch.context() as patch:
        patch.setattr(posthoc_ema, "store", die)
        with pytest.raises(RuntimeError, match="power cut at step 2"):
            train(arguments)
    assert train(arguments) == 0
    assert snapshots_of(run) == snapshots_of(ema_run)


def test_a_reconstructed_ema_is_the_one_that_was_kept_during_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training of 120 steps that also keeps an EMA of length 0.075, and stores 20 snapshots of the two others.

    The weights differ by less than 1 % of the distance to either of the two stored lengths; the error of the profile,
    which the command prints, is 0.3 %.
    """

    def with_a_third(config: TrainingConfig) -> dict[str, Any]:
        gamma = ema.gamma_of(0.075)
        return decay_schedules(config) | {"ema_third": lambda number: ema.power_decay_at(number, gamma)}

    monkeypatch.setattr("ddpm_hf.training.trainer.decay_schedules", with_a_third)
    run = tmp_path / "run"
    changes: dict[str, Any] = {"training__posthoc_ema": True, "training__posthoc_ema_every_steps": 6}
    changes |= {"training__num_steps": 120, "training__checkpoint_every_steps": 120, "training__learning_rate": 5e-3}
    assert train(run_arguments(run, **changes)) == 0
    assert main(["ema", str(run), "--length", "0.075"]) == 0

    def weights(folder: Path) -> torch.Tensor:
        content = load_file(folder / "diffusion_pytorch_model.safetensors")
        return torch.cat([content[name].flatten().double() for name in sorted(content)])

    made = weights(run / "pipeline_ema_0.075" / "unet")
    last = run / "checkpoints" / "step_00000120"
    kept = weights(last / "ema_third")
    nearest = min(float((weights(last / f"ema_sigma_{name}") - kept).norm()) for name in ("0.050", "0.100"))
    assert nearest > 0.01
    assert float((made - kept).norm()) < 0.01 * nearest


def test_the_pipeline_of_another_length_samples(ema_run: Path, tmp_path: Path) -> None:
    assert main(["ema", str(ema_run), "--length", "0.1", "--output", str(tmp_path / "made")]) == 0
    pipeline = GaussianDiffusionPipeline.from_pretrained(tmp_path / "made")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, class_labels=["3", "7"], num_inference_steps=2, output_type="uint8").images
    assert images.shape == (2, 8, 8, 1)


# --------------------------------------------------------------------------------------------------------- optimizers

# It keeps state that is not a tensor, and cannot skip an update on the device. test_optim.py has many others.
COUNTING: dict[str, Any] = {"training__optimizer": "tests.unit.training.optimizers.Counting"}


def test_another_optimizer_is_stopped_and_resumed_bit_identically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(run_arguments(tmp_path / "whole", **EVERYTHING_RANDOM, **COUNTING)) == 0
    arguments = run_arguments(tmp_path / "run", **EVERYTHING_RANDOM, **COUNTING)
    with monkeypatch.context() as patch:
        stop_with_signal_after(3, patch)
        assert train(arguments) == 143
    assert train(arguments) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run", 6)


def test_another_optimizer_skips_a_non_finite_gradient_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, EMA and state after the poisoned step are those before it. Bit for bit."""
    poison_loss_at(3, monkeypatch)
    run = tmp_path / "run"
    changes = {"training__checkpoint_every_steps": 1, "training__num_checkpoints_kept": 9}
    assert train(run_arguments(run, **changes, **COUNTING)) == 0
    before, after = (tensors_of(run / "checkpoints" / f"step_0000000{step}") for step in (2, 3))
    assert not [key for key in before if not torch.equal(before[key], after[key])]
    assert [row["num_skipped_updates"] for row in metrics_of(run)] == [0, 0, 1, 1, 1, 1]


def test_a_run_cannot_be_resumed_with_another_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(run_arguments(tmp_path / "run", training__num_steps=2)) == 0
    assert train(run_arguments(tmp_path / "run", training__optimizer="adam")) == 2
    assert "training.optimizer was 'adamw', is 'adam'" in capsys.readouterr().err


@pytest.mark.parametrize(("schedule", "micro_batch_size"), [("linear", 8), ("cosine", 2)])
def test_every_update_has_the_learning_rate_of_its_step(schedule: str, micro_batch_size: int, tmp_path: Path) -> None:
    """Gradient accumulation does not advance the schedule."""
    Watching.seen.clear()
    changes: dict[str, Any] = {
        "training__optimizer": "tests.unit.training.optimizers.Watching",
        "training__learning_rate": 0.01,
        "training__learning_rate_schedule": schedule,
        "training__micro_batch_size": micro_batch_size,
        "training__num_steps": 6,
    }
    assert train(run_arguments(tmp_path / "run", **changes)) == 0
    config = TrainingConfig(
        learning_rate=0.01,
        learning_rate_warmup_steps=2,
        learning_rate_schedule=schedule,  # type: ignore[arg-type]
        num_steps=6,
    )
    expected = [learning_rate_at(step, config) for step in range(6)]
    # The check of build_optimizer takes three steps at the peak.
    assert [rate for rate, _ in Watching.seen] == pytest.approx([0.01] * 3 + expected)
    assert [row["learning_rate"] for row in metrics_of(tmp_path / "run")] == pytest.approx(expected)
