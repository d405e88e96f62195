"""Settings of tiny training runs, ways to disturb one, and what two runs are compared by."""

import hashlib
import json
import os
import signal
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ddpm_hf.training.loss import DenoisingLoss
from ddpm_hf.training.trainer import Trainer

# Everything that draws random numbers or learns, except dropout, the only part that depends on how the batch is split.
# With two timesteps the loss history is full after three steps.
EVERYTHING_BUT_DROPOUT: dict[str, Any] = {
    "objective__class_dropout": 0.2,
    "objective__weighting": "p2",
    "objective__timestep_sampling": "loss_aware",
    "objective__self_conditioning": 0.5,
    "objective__offset_noise": 0.1,
    "objective__input_perturbation": 0.1,
    "objective__immiscible_noise": True,
    "data__random_flip": True,
    "data__augmentation": 0.3,
    "diffusion__num_train_timesteps": 2,
    "preview__num_inference_steps": 2,
    "evaluation__num_inference_steps": 2,
}
# An exact resume has to restore all of it.
EVERYTHING_RANDOM: dict[str, Any] = EVERYTHING_BUT_DROPOUT | {
    "model__overrides": {
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "dropout": 0.1,
    },
    "training__micro_batch_size": 4,
    "training__log_every_steps": 4,
}
TIME_AND_MEMORY = ("images_per_second", "seconds", "peak_memory_mib")


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, named by file and key."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{file.relative_to(checkpoint)}:{key}": value for file in files for key, value in load_file(file).items()}


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without the columns of time and memory, which differ between equal runs."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in TIME_AND_MEMORY} for row in rows]


def loss_columns(run: Path) -> list[list[float]]:
    """Return the loss and the losses of the timestep quartiles of each row; NaN where a quartile has no timestep."""
    names = ("loss", "loss_q0", "loss_q1", "loss_q2", "loss_q3")
    rows = [row for row in metrics_of(run) if "loss" in row]
    return [[float("nan") if row[name] is None else row[name] for name in names] for row in rows]


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sign(checkpoint: Path, step: int | None = None) -> None:
    """Rewrite the manifest of a checkpoint so that it fits the files, whatever was done to them."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        for name, content in files_of(checkpoint).items()
        if name != "manifest.json"
    }
    manifest["step"] = manifest["step"] if step is None else step
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Compare the checkpoints of a step and the metrics of two runs bit by bit."""
    expected, found = (tensors_of(path / "checkpoints" / f"step_{step:08d}") for path in (one, other))
    assert expected.keys() == found.keys()
    assert not [key for key in expected if not torch.equal(expected[key], found[key])]
    assert metrics_of(one) == metrics_of(other)


def at_step(step: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something at the beginning of optimizer step `step`, counted from 1, when all checkpoints are written."""
    train_step = Trainer._train_step

    def train_step_with_action(self: Trainer, current: int) -> None:
        if current + 1 == step:
            self.checkpointer.join()
            action()
        train_step(self, current)

    monkeypatch.setattr(Trainer, "_train_step", train_step_with_action)


def stop_with_signal_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM to this process in the middle of optimizer step `step`, counted from 1."""
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)


def poison_loss_at(steps: int | Container[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loss NaN in some forward passes, counted from 1; without accumulation these are optimizer steps."""
    loss = DenoisingLoss.__call__
    poisoned_calls = [steps] if isinstance(steps, int) else steps
    calls = iter(range(1, 1000))

    def poisoned(self: DenoisingLoss, *arguments: Any) -> torch.Tensor:
        return loss(self, *arguments) * (float("nan") if next(calls) in poisoned_calls else 1.0)

    monkeypatch.setattr(DenoisingLoss, "__call__", poisoned)


def use_gradient_scaler(trainer: Trainer, init_scale: float, backoff_factor: float = 0.5) -> None:
    """Make Accelerate do on the CPU what it does for fp16 on a GPU: autocast to fp16, scale, unscale, skip."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, backoff_factor=backoff_factor)
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"


def exit_code_of_child(action: Callable[[], None]) -> int:
    """Run an action in a child process; return its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
