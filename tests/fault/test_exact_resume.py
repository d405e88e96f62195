"""Stopping at any step, from anywhere in it, and starting the same command again gives the bits of never stopping."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm_hf.cli.main import train
from ddpm_hf.training import checkpoint, posthoc_ema, trainer
from ddpm_hf.training.trainer import Trainer
from tests.conftest import run_arguments
from tests.integration.test_training import EVERYTHING_RANDOM, assert_same_run

NUM_STEPS = 6


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that draws, learns, averages, measures or draws pictures, on 25 images of which 20 are trained on.

    With 8 images a step the first epoch ends inside of step 3 and the second with step 5. There is something to do in
    every step but the first: pictures in 2, 4 and 6, a validation in 3 and 6, checkpoints and averages in every second.
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
    """A run that is never stopped."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(run_arguments(run, **everything)) == 0
    return run


def pictures_of(run: Path) -> dict[str, bytes]:
    """Returns every file that is no checkpoint and must be the same, too."""
    roots = [run / "previews", run / "ema_snapshots", run / "pipeline" / "unet"]
    return {
        str(path.relative_to(run)): path.read_bytes() for root in roots for path in root.rglob("*") if path.is_file()
    }


def send_at(
    step: int, number: signal.Signals, owner: Any, name: str, patch: pytest.MonkeyPatch, is_late: bool = False
) -> None:
    """Lets a signal come in the middle of a step: just before (or after) something in it is done."""
    original: Callable[..., Any] = getattr(owner, name)
    train_step = Trainer._train_step
    current = 0

    def counted(self: Trainer, number: int) -> None:
        nonlocal current
        current = number + 1
        train_step(self, number)

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        if current == step and not is_late:
            os.kill(os.getpid(), number)
        result = original(*arguments, **settings)
        if current == step and is_late:
            os.kill(os.getpid(), number)
        return result

    patch.setattr(Trainer, "_train_step", counted)
    patch.setattr(owner, name, interrupted)


# Step, signal, and in the middle of what it comes.
INTERRUPTIONS = [
    (1, signal.SIGTERM, Trainer, "_update"),
    (2, signal.SIGINT, checkpoint, "write_snapshot"),
    (3, signal.SIGUSR1, trainer, "validation_loss"),
    (4, signal.SIGTERM, trainer, "save_preview"),
    (5, signal.SIGINT, Trainer, "_update"),
    (6, signal.SIGTERM, posthoc_ema, "store"),
]


@pytest.mark.parametrize("is_late", [False, True])
def test_a_run_that_is_stopped_in_every_step_is_bit_identical_to_one_that_never_stopped(
    whole_run: Path, everything: dict[str, Any], is_late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact: weights, averages, moments, history of the losses, metrics and pictures, after six stops in a row.

    The signals come in a step, while a checkpoint is written, while a picture is drawn, while the loss is validated and
    while averages are stored; the last one in the last step, so that only the pipeline is still to be written.
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
    """The weights stay float32; what is rounded is computed anew."""
    changes = everything | {"training__mixed_precision": "bf16", "training__num_steps": 4, "preview__every_steps": 0}
    for name in ("whole", "run"):
        with monkeypatch.context() as patch:
            if name == "run":
                send_at(3, signal.SIGTERM, Trainer, "_update", patch)
                assert train(run_arguments(tmp_path / name, **changes)) == 143
        assert train(run_arguments(tmp_path / name, **changes)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run", 4)
