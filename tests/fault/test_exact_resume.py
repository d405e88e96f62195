"""A run that is stopped anywhere in any step and started again has the same bits as one that never stopped."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from ddpm_hf.cli.main import train
from ddpm_hf.training import checkpoint, posthoc_ema, trainer
from ddpm_hf.training.batches import HISTORY_LENGTH
from ddpm_hf.training.loss import DenoisingLoss
from tests.conftest import run_arguments
from tests.runs import EVERYTHING_RANDOM, assert_same_run, at_step, files_of

NUM_STEPS = 6


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every source of randomness, every EMA, validation and previews, on 25 images of which 20 are for training.

    With 8 images a step the first epoch ends inside step 3 and the second with step 5. Previews are due in steps 2, 4
    and 6, validation in 3 and 6, checkpoints and EMA snapshots in every second step.
    """
    random = np.random.default_rng(0)
    source = tmp_path_factory.mktemp("data") / "images.npz"
    images = random.integers(0, 256, (25, 11, 12, 3), dtype=np.uint8)
    np.savez(source, images=images, labels=np.arange(25) % 5)
    return EVERYTHING_RANDOM | {
        "data__source": source,
        "data__resolution": 8,
        "data__resize_to": 0,
        "data__crop": "random",
        "data__validation_fraction": 0.2,
        "training__num_steps": NUM_STEPS,
        "training__posthoc_ema": True,
        "training__posthoc_ema_every_steps": 2,
        "training__validate_every_steps": 3,
        "preview__every_steps": 2,
        "preview__num_images": 5,
    }


@pytest.fixture(scope="module")
def whole_run(everything: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is never stopped. Read only."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(run_arguments(run, **everything)) == 0
    history = load_file(run / "checkpoints" / "step_00000004" / "objective.safetensors")
    assert int(history["num_losses"].min()) >= HISTORY_LENGTH, "the loss history is full, so a resume has to restore it"
    return run


def pictures_of(run: Path) -> dict[str, bytes]:
    """Return the files outside of checkpoints that must be the same, too."""
    names = ("previews", "ema_snapshots", "pipeline/unet")
    return {f"{name}/{path}": content for name in names for path, content in files_of(run / name).items()}


def send_at(
    step: int, number: signal.Signals, owner: Any, name: str, patch: pytest.MonkeyPatch, is_late: bool = False
) -> None:
    """Send a signal in the middle of a step, just before a function is called in it (or just after, if `is_late`)."""
    original: Callable[..., Any] = getattr(owner, name)
    is_due: list[bool] = []

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        sends = bool(is_due)
        is_due.clear()
        if sends and not is_late:
            os.kill(os.getpid(), number)
        result = original(*arguments, **settings)
        if sends and is_late:
            os.kill(os.getpid(), number)
        return result

    at_step(step, lambda: is_due.append(True), patch)
    patch.setattr(owner, name, interrupted)


# Step, signal, and the function that it interrupts.
INTERRUPTIONS = [
    (1, signal.SIGTERM, DenoisingLoss, "__call__"),
    (2, signal.SIGINT, checkpoint, "snapshot_files"),
    (3, signal.SIGUSR1, trainer, "validation_loss"),
    (4, signal.SIGTERM, trainer, "save_preview"),
    (5, signal.SIGINT, DenoisingLoss, "__call__"),
    (6, signal.SIGTERM, posthoc_ema, "store"),
]


@pytest.mark.parametrize("is_late", [False, True])
def test_a_run_that_is_stopped_in_every_step_is_bit_identical_to_one_that_never_stopped(
    whole_run: Path, everything: dict[str, Any], is_late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact: weights, EMA, moments, loss history, metrics and previews, after six stops in a row.

    The signals arrive in a step, while a checkpoint is written, a preview is drawn, the validation loss is computed and
    EMA snapshots are stored; the last one in the last step, so that only the pipeline remains to be written.
    """
    arguments = run_arguments(tmp_path / "run", **everything)
    for step, number, owner, name in INTERRUPTIONS:
        with monkeypatch.context() as patch:
            send_at(step, number, owner, name, patch, is_late)
            assert train(arguments) == (130 if number == signal.SIGINT else 143)
        assert max((tmp_path / "run" / "checkpoints").iterdir()).name == f"step_{step:08d}"
    assert not (tmp_path / "run" / "pipeline").exists()
    assert train(arguments) == 0
    assert_same_run(whole_run, tmp_path / "run", NUM_STEPS)
    assert pictures_of(tmp_path / "run") == pictures_of(whole_run)
    assert len(pictures_of(whole_run)) > 10


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_in_bf16_is_stopped_and_continued_bit_identically(
    everything: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights stay in float32; everything in bf16 is recomputed."""
    changes = everything | {"training__mixed_precision": "bf16", "training__num_steps": 4, "preview__every_steps": 0}
    for name in ("whole", "run"):
        with monkeypatch.context() as patch:
            if name == "run":
                send_at(3, signal.SIGTERM, DenoisingLoss, "__call__", patch)
                assert train(run_arguments(tmp_path / name, **changes)) == 143
        assert train(run_arguments(tmp_path / name, **changes)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run", 4)
