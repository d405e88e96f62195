"""A checkpoint that is whole, but that this run cannot go on from, is refused with a sentence; nothing is changed."""

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_hf.cli.main import train
from ddpm_hf.config import load_config
from ddpm_hf.training import checkpoint
from ddpm_hf.training.trainer import Trainer
from tests.conftest import run_arguments
from tests.integration.test_training import EVERYTHING_RANDOM, metrics_of

WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    run = tmp_path_factory.mktemp("runs") / "source"
    assert train(run_arguments(run, **EVERYTHING_RANDOM, training__num_steps=2, training__posthoc_ema=True)) == 0
    return run


def sign_again(folder: Path, step: int = 2) -> None:
    """Makes a manifest that fits what the folder holds, as whoever makes a hostile checkpoint would."""
    (folder / checkpoint.MANIFEST).unlink()
    checkpoint.write_manifest(folder, step)


def change_json(name: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return change


def other_network(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({name: torch.zeros([*weight.shape, 2]) for name, weight in weights.items()}, folder / WEIGHTS)


def pickle_in_place_of_weights(folder: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, buffer)
    (folder / WEIGHTS).write_bytes(buffer.getvalue())


def no_moments_of_some(folder: Path) -> None:
    tensors = load_file(folder / "optimizer.safetensors")
    del tensors["conv_out.bias/exp_avg_sq"]
    save_file(tensors, folder / "optimizer.safetensors")


def moments_of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "optimizer.safetensors")
    tensors["conv_out.bias/exp_avg"] = torch.zeros(7)
    save_file(tensors, folder / "optimizer.safetensors")


def losses_of_other_timesteps(folder: Path) -> None:
    save_file({"losses": torch.zeros(3, 10), "num_losses": torch.zeros(3)}, folder / "objective.safetensors")


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "counters of a newer version": (change_json("trainer_state.json", phase_of_the_moon=1), "phase_of_the_moon"),
    "a best score without its step": (change_json("trainer_state.json", best={"kind": "fid"}), "best is"),
    "counters that are no JSON": (lambda folder: (folder / "trainer_state.json").write_text("{"), "Expecting"),
    "counters that are a list": (
        lambda folder: (folder / "trainer_state.json").write_text("[]"),
        "cannot continue from",
    ),
    "another network": (other_network, "size mismatch"),
    "a pickle that is called safetensors": (pickle_in_place_of_weights, "header"),
    "no average": (lambda folder: shutil.rmtree(folder / "ema"), "cannot continue from it"),
    "moments of some weights": (no_moments_of_some, "exp_avg_sq of conv_out.bias is missing"),
    "moments of another shape": (
        moments_of_another_shape,
        "exp_avg of conv_out.bias is missing or has the wrong shape",
    ),
    "no history of losses": (lambda folder: (folder / "objective.safetensors").unlink(), "last losses of 2 timesteps"),
    "a history of other timesteps": (losses_of_other_timesteps, "last losses of 2 timesteps"),
    "counters of another step": (change_json("trainer_state.json", global_step=1), "those of step 1"),
    "counters that do not count": (change_json("trainer_state.json", num_skipped="x"), "num_skipped is 'x'"),
    "a micro batch of no number": (change_json("trainer_state.json", micro_batch_size=[]), "micro_batch_size is []"),
    "a best score without a number": (
        change_json("trainer_state.json", best={"step": 1, "kind": "fid", "value": []}),
        "best is",
    ),
    "sums that are none": (change_json("trainer_state.json", loss_sums=["x"]), "cannot continue from it"),
    "sums of more than there is": (
        change_json("trainer_state.json", loss_sums=[[1.0] * 99]),
        "cannot continue from it",
    ),
    "no moments": (lambda folder: (folder / "optimizer.safetensors").unlink(), "cannot continue from it"),
    "no configuration": (lambda folder: (folder / "config.yaml").unlink(), "holds no configuration of a run"),
    "a configuration with a tag": (
        lambda folder: (folder / "config.yaml").write_text("training: !!python/object/apply:os.system [touch x]"),
        "holds no configuration of a run",
    ),
    "a configuration that is a list": (
        lambda folder: (folder / "config.yaml").write_text("[training]"),
        "holds no configuration of a run",
    ),
    "a configuration of other sections": (
        lambda folder: (folder / "config.yaml").write_text("training: 3"),
        "holds no configuration of a run",
    ),
}


@pytest.fixture
def trainer(source: Path, tmp_path: Path) -> Iterator[Trainer]:
    """A trainer about to continue a copy of the run."""
    shutil.copytree(source, tmp_path / "run")
    changes = EVERYTHING_RANDOM | {"training__num_steps": 4, "training__posthoc_ema": True}
    config, _ = load_config(run_arguments(tmp_path / "run", **changes))
    trainer = Trainer(config)
    yield trainer
    trainer.folder.release()


def test_a_foreign_checkpoint_is_refused_in_one_sentence_and_left_as_it_is(
    source: Path, trainer: Trainer, tmp_path: Path
) -> None:
    """All of them on one trainer, since each is refused before anything is written or trained."""
    path = tmp_path / "run" / "checkpoints" / "step_00000002"
    for name, (change, reason) in FOREIGN.items():
        shutil.rmtree(path)
        shutil.copytree(source / "checkpoints" / "step_00000002", path)
        change(path)
        sign_again(path)
        checkpoint.verify_checkpoint(path)
        with pytest.raises(checkpoint.CheckpointError) as caught:
            trainer.checkpointer.resume()
        assert reason in str(caught.value), name
        assert str(path) in str(caught.value), name
        assert "\n" not in str(caught.value), name
        assert checkpoint.verify_checkpoint(path).step == 2, "it is not put aside: another version may read it"
    assert metrics_of(tmp_path / "run") == metrics_of(source)
    assert not Path("x").exists()


def test_a_run_goes_on_at_a_million_steps_as_soon_as_at_two(source: Path, tmp_path: Path) -> None:
    """Within a second, although 500,000 lines of metrics lie before it: nothing is done again, nothing is read again.

    Both times are taken in one process after a first resume has loaded what is loaded once; they are 0.1 to 0.4 s here.
    What others do on the machine does not count.
    """
    changes = EVERYTHING_RANDOM | {"training__posthoc_ema": True, "training__posthoc_ema_every_steps": 500_000}

    def resume_at(step: int) -> float:
        run = tmp_path / f"run_{step}_{time.monotonic_ns()}"
        shutil.copytree(source, run)
        path = run / "checkpoints" / "step_00000002"
        change_json("trainer_state.json", global_step=step)(path)
        (path / "config.yaml").write_text(
            (path / "config.yaml").read_text().replace("num_steps: 2", f"num_steps: {step}")
        )
        sign_again(path, step)
        path.rename(path.with_name(f"step_{step:08d}"))
        (run / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": 0.1}) + "\n")
        (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() * min(step, 500_000))
        began = time.process_time()
        assert train(run_arguments(run, **changes, training__num_steps=step + 1)) == 0
        seconds = time.process_time() - began
        with (run / "metrics.jsonl").open() as file:
            assert json.loads(file.readlines()[-1])["step"] == step + 1
        return seconds

    resume_at(2)
    early, late = resume_at(2), resume_at(1_000_000)
    assert late < early + 1.0


def test_what_says_nothing_is_no_hindrance(source: Path, tmp_path: Path) -> None:
    """No sums of the losses are zeros, and a line of metrics without a step is none."""
    run = tmp_path / "run"
    shutil.copytree(source, run)
    path = run / "checkpoints" / "step_00000002"
    change_json("trainer_state.json", loss_sums=[])(path)
    sign_again(path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": null}\n{"step": "a", "loss": 1}\n')
    assert train(run_arguments(run, **EVERYTHING_RANDOM, training__num_steps=3, training__posthoc_ema=True)) == 0
    assert [row["step"] for row in metrics_of(run)] == [*(row["step"] for row in metrics_of(source)), 3]
