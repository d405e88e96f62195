"""A whole checkpoint that this run cannot continue from is refused in one sentence, and nothing is changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_hf.cli.main import train
from ddpm_hf.training.checkpoint import verify_checkpoint
from ddpm_hf.training.loss import DenoisingLoss
from tests.conftest import run_arguments
from tests.runs import EVERYTHING_RANDOM, files_of, metrics_of, sign

SETTINGS = EVERYTHING_RANDOM | {"training__posthoc_ema": True, "training__posthoc_ema_every_steps": 500_000}
WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps. Read only."""
    run = tmp_path_factory.mktemp("runs") / "source"
    assert train(run_arguments(run, **SETTINGS, training__num_steps=2)) == 0
    return run


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    shutil.copytree(source, tmp_path / "run")
    return tmp_path / "run"


def change_json(name: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return change


def weights_of_another_network(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({name: torch.zeros([*weight.shape, 2]) for name, weight in weights.items()}, folder / WEIGHTS)


def moments_of_another_network(folder: Path) -> None:
    tensors = load_file(folder / "optimizer.safetensors")
    tensors["conv_out.bias/exp_avg"] = torch.zeros(7)
    save_file(tensors, folder / "optimizer.safetensors")


def loss_history_of_other_timesteps(folder: Path) -> None:
    save_file({"losses": torch.zeros(3, 10), "num_losses": torch.zeros(3)}, folder / "objective.safetensors")


# What a newer version, a copy of single files from another run, or an incomplete copy leaves.
FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a counter of a newer version": (change_json("trainer_state.json", new_counter=1), "new_counter"),
    "weights of another network": (weights_of_another_network, "size mismatch"),
    "moments of another network": (
        moments_of_another_network,
        "exp_avg of conv_out.bias is missing or has the wrong shape",
    ),
    "a loss history of other timesteps": (loss_history_of_other_timesteps, "last losses of 2 timesteps"),
    "no EMA": (lambda folder: shutil.rmtree(folder / "ema"), "step_00000002"),
    "no configuration": (lambda folder: (folder / "config.yaml").unlink(), "configuration"),
}


def test_a_foreign_checkpoint_is_refused_in_one_sentence_and_left_as_it_is(
    source: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not put aside as damaged: another version may read it."""
    path = run / "checkpoints" / "step_00000002"
    for name, (change, reason) in FOREIGN.items():
        shutil.rmtree(path)
        shutil.copytree(source / "checkpoints" / "step_00000002", path)
        change(path)
        sign(path)
        before = files_of(run)
        assert train(run_arguments(run, **SETTINGS, training__num_steps=4)) == 2, name
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and reason in error and str(path) in error, (name, error)
        assert files_of(run) == before, name
        assert verify_checkpoint(path).step == 2


def test_a_resume_at_step_one_million_replays_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step is computed, and the earlier rows of metrics are not read: here they are not even JSON."""
    step = 1_000_000
    path = run / "checkpoints" / "step_00000002"
    change_json("trainer_state.json", global_step=step)(path)
    config = path / "config.yaml"
    config.write_text(config.read_text().replace("num_steps: 2", f"num_steps: {step}"))
    sign(path, step)
    path.rename(path.with_name(f"step_{step:08d}"))
    earlier = b"not a row\n" * 1000
    (run / "metrics.jsonl").write_bytes(earlier + b'{"step": 1000000, "loss": 0.1}\n')
    call, num_images = DenoisingLoss.__call__, []

    def counted(self: DenoisingLoss, model: Any, x_0: torch.Tensor, *arguments: Any) -> torch.Tensor:
        num_images.append(len(x_0))
        return call(self, model, x_0, *arguments)

    monkeypatch.setattr(DenoisingLoss, "__call__", counted)
    assert train(run_arguments(run, **SETTINGS, training__num_steps=step + 1)) == 0
    assert num_images == [4, 4]
    content = (run / "metrics.jsonl").read_bytes()
    assert content.startswith(earlier)
    assert [json.loads(line)["step"] for line in content.removeprefix(earlier).splitlines()] == [step, step + 1]


def test_empty_sums_and_rows_without_a_step_do_not_prevent_a_resume(source: Path, run: Path) -> None:
    path = run / "checkpoints" / "step_00000002"
    change_json("trainer_state.json", loss_sums=[])(path)
    sign(path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": null}\n{"step": "a", "loss": 1}\n')
    assert train(run_arguments(run, **SETTINGS, training__num_steps=3)) == 0
    assert [row["step"] for row in metrics_of(run)] == [*(row["step"] for row in metrics_of(source)), 3]
