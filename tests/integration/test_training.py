"""A run from the command line to the saved pipeline, and a run that is stopped and continued."""

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline
from safetensors.torch import load_file

from ddpm_hf import GaussianDiffusionPipeline
from ddpm_hf.cli.main import train
from ddpm_hf.config import load_config
from ddpm_hf.data import DataError
from ddpm_hf.distributed import SharedOSError
from ddpm_hf.evaluation import generate
from ddpm_hf.training import checkpoint
from ddpm_hf.training.batches import HISTORY_LENGTH, LossAwareTimesteps, UniformTimesteps
from ddpm_hf.training.checkpoint import find_latest
from ddpm_hf.training.loss import DenoisingLoss
from ddpm_hf.training.optim import NonFiniteTraining
from ddpm_hf.training.run_dir import RunLock
from ddpm_hf.training.trainer import Trainer, validation_loss
from tests.conftest import REPOSITORY, run_arguments

# Everything that draws random numbers or learns, but for dropout, which alone depends on how the batch is split. With
# two timesteps the history of the losses is full after three steps.
EVERYTHING_BUT_DROPOUT = {
    "objective__class_dropout": 0.2,
    "objective__weighting": "p2",
    "objective__timestep_sampling": "loss_aware",
    "objective__self_conditioning": 0.5,
    "objective__offset_noise": 0.1,
    "objective__immiscible_noise": True,
    "data__random_flip": True,
    "diffusion__num_train_timesteps": 2,
    "preview__num_inference_steps": 2,
    "evaluation__num_inference_steps": 2,
}
# So that a resume has to get all of it right.
EVERYTHING_RANDOM = EVERYTHING_BUT_DROPOUT | {
    "model__overrides": {
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "dropout": 0.1,
    },
    "training__micro_batch_size": 4,
    "training__log_every_steps": 4,
}


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Returns every tensor of a checkpoint, named by file and key."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{file.relative_to(checkpoint)}:{key}": value for file in files for key, value in load_file(file).items()}


TIME_AND_MEMORY = ("images_per_second", "seconds", "peak_memory_mib")


def metrics_of(output_dir: Path) -> list[dict[str, Any]]:
    """Returns the metrics without the columns that tell time and memory, which differ between two equal runs."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in TIME_AND_MEMORY} for row in rows]


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Compares two runs bit by bit."""
    expected, found = (tensors_of(path / "checkpoints" / f"step_{step:08d}") for path in (one, other))
    assert expected.keys() == found.keys()
    different = [key for key in expected if not torch.equal(expected[key], found[key])]
    assert not different
    assert metrics_of(one) == metrics_of(other)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny run with preview, evaluation and report."""
    output_dir = tmp_path_factory.mktemp("runs") / "finished"
    arguments = run_arguments(
        output_dir,
        data__validation_fraction=0.1,
        preview__every_steps=3,
        preview__num_images=20,
        preview__num_inference_steps=2,
        evaluation__num_samples=20,
        evaluation__num_inference_steps=3,
        evaluation__recognition=True,
    )
    assert train(arguments) == 0
    return output_dir


def test_a_run_leaves_everything_it_promises(finished_run: Path) -> None:
    expected = {
        *("README.md", "checkpoints", "config.yaml", "denoising.gif", "denoising.png", "loss.png"),
        *("metrics.jsonl", "pipeline", "previews", "recognition.json", "samples.png", ".lock"),
    }
    assert {path.name for path in finished_run.iterdir()} == expected
    assert sorted(path.name for path in (finished_run / "previews").iterdir()) == [
        "step_00000003.png",
        "step_00000006.png",
    ]
    assert sorted(path.name for path in (finished_run / "checkpoints").iterdir()) == [
        "step_00000002",
        "step_00000004",
        "step_00000006",
    ]
    assert [row["step"] for row in metrics_of(finished_run)] == [1, 2, 3, 4, 5, 6]


def test_every_metric_is_documented(finished_run: Path) -> None:
    document = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    lines = (finished_run / "metrics.jsonl").read_text().splitlines()
    assert {name for line in lines for name in json.loads(line)} <= set(re.findall(r"^\| `(\w+)` \|", document, re.M))


def test_the_saved_pipeline_holds_the_averaged_weights(finished_run: Path) -> None:
    published = load_file(finished_run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    checkpoint = finished_run / "checkpoints" / "step_00000006"
    averaged = load_file(checkpoint / "ema" / "diffusion_pytorch_model.safetensors")
    trained = load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(published[key], averaged[key]) for key in averaged)
    assert any(not torch.equal(published[key], trained[key]) for key in trained)


def test_the_saved_pipeline_samples_the_classes_by_name(finished_run: Path) -> None:
    pipeline = GaussianDiffusionPipeline.from_pretrained(finished_run / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, class_labels=["3", "7"], num_inference_steps=2, output_type="uint8").images
    assert images.shape == (2, 8, 8, 1)
    assert images.dtype == np.uint8


def test_the_saved_pipeline_is_a_stock_pipeline_to_diffusers(finished_run: Path) -> None:
    assert type(DDPMPipeline.from_pretrained(finished_run / "pipeline")) is DDPMPipeline


def test_the_report_says_how_many_samples_were_recognised(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recognition = json.loads((finished_run / "recognition.json").read_text())
    assert recognition["num_samples"] == 20
    assert 0.0 <= recognition["recognised"] <= 1.0
    assert "samples.png" in (finished_run / "README.md").read_text()


def stop_with_signal_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the process receive SIGTERM in the middle of optimiser step `step` (counted from 1)."""
    train_step = Trainer._train_step

    def train_step_with_signal(self: Trainer, current: int) -> None:
        if current + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        train_step(self, current)

    monkeypatch.setattr(Trainer, "_train_step", train_step_with_signal)


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the stopped ones are compared with."""
    output_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert train(run_arguments(output_dir, **EVERYTHING_RANDOM)) == 0
    return output_dir


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_stopped_and_continued_run_is_bit_identical_to_one_that_never_stopped(
    step: int, uninterrupted_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact: weights, average, optimiser, history of the losses and metrics, with everything random switched on.

    The steps lie on a checkpoint, between checkpoints and between two lines of metrics, before and after the history is
    full.
    """
    arguments = run_arguments(tmp_path / "run", **EVERYTHING_RANDOM)
    with monkeypatch.context() as patch:
        stop_with_signal_after(step, patch)
        assert train(arguments) == 143
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert newest.name == f"step_{step:08d}"
    assert train(arguments) == 0
    assert_same_run(uninterrupted_run, tmp_path / "run", 6)


def test_a_run_continues_from_the_last_valid_checkpoint_when_the_newest_is_damaged(
    uninterrupted_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted_run, run)
    weights = run / "checkpoints" / "step_00000006" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert train(run_arguments(run, **EVERYTHING_RANDOM)) == 0
    assert "step_00000006: unet/diffusion_pytorch_model.safetensors is damaged" in caplog.text
    assert (run / "checkpoints" / "damaged-step_00000006").is_dir()
    assert_same_run(uninterrupted_run, run, 6)


def test_a_run_refuses_to_start_over_when_no_checkpoint_is_valid(
    uninterrupted_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted_run, run)
    for folder in (run / "checkpoints").iterdir():
        (folder / "optimizer.safetensors").unlink()
    before = metrics_of(run)
    assert train(run_arguments(run, **EVERYTHING_RANDOM)) == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert metrics_of(run) == before


def test_a_finished_run_started_again_trains_no_step(uninterrupted_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted_run, run)
    assert train(run_arguments(run, **EVERYTHING_RANDOM)) == 0
    assert_same_run(uninterrupted_run, run, 6)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_measured_of_a_finished_run_stays_when_it_is_started_again(
    uninterrupted_run: Path, tmp_path: Path
) -> None:
    """As after a push that failed; and when it trains on, the numbers of the model before stay beside the new one."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted_run, run)
    pipeline = run / "pipeline"
    additions = {
        "evaluation.json": b"{}",
        "evaluation.png": b"picture",
        "evaluation_samples/samples.npy": b"samples",
        "scheduler/reverse_variance.json": json.dumps({"eps_second_moments": [1.0] * 1000}).encode(),
    }
    for name, content in additions.items():
        (pipeline / name).parent.mkdir(exist_ok=True)
        (pipeline / name).write_bytes(content)
    before = files_of(pipeline)
    assert train(run_arguments(run, **EVERYTHING_RANDOM)) == 0
    assert files_of(pipeline).keys() == before.keys()
    assert {name: files_of(pipeline)[name] for name in additions} == additions
    assert not (run / "evaluations").exists()

    assert train(run_arguments(run, **EVERYTHING_RANDOM, training__num_steps=7)) == 0
    assert files_of(pipeline).keys() == before.keys() - additions.keys()
    assert files_of(run / "evaluations") == {"step_00000006.json": b"{}", "step_00000006.png": b"picture"}


def test_a_finished_run_is_not_said_to_be_trained_with_what_comes_too_late(
    uninterrupted_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted_run, run)
    before = (run / "config.yaml").read_text()
    for dry_run in ([], ["--dry_run"]):
        assert train([*run_arguments(run, **EVERYTHING_RANDOM, training__learning_rate=1.0), *dry_run]) == 2
        message = capsys.readouterr().err
        assert (
            "holds a finished run, which was trained with other settings (training.learning_rate was 0.001" in message
        )
        assert "set a larger training.num_steps" in message
    assert (run / "config.yaml").read_text() == before
    harmless = {"training__cpu": True, "training__log_every_steps": 3, "preview__eta": 1.0}
    assert train(run_arguments(run, **(EVERYTHING_RANDOM | harmless))) == 0
    further = {"training__learning_rate": 1e-4, "training__num_steps": 7}
    assert train(run_arguments(run, **EVERYTHING_RANDOM, **further)) == 0
    assert "learning_rate: 0.0001\n" in (run / "config.yaml").read_text()


def test_a_report_that_fails_is_a_failure_and_no_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong then cannot be found by checks before training."""

    def fail(*arguments: Any, **settings: Any) -> None:
        raise ValueError("a bug of ours")

    monkeypatch.setattr(generate, "sample_images", fail)
    with pytest.raises(RuntimeError, match=r"the report failed; the trained pipeline is in .*run/pipeline"):
        train(run_arguments(tmp_path / "run", evaluation__num_samples=2))
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()


def test_a_run_is_not_continued_with_settings_that_its_checkpoint_contradicts(
    uninterrupted_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted_run, run)
    assert train(run_arguments(run, **EVERYTHING_RANDOM, training__seed=1)) == 2
    assert "training.seed was 0, is 1" in capsys.readouterr().err


def test_a_dry_run_tells_what_the_checkpoint_contradicts_and_changes_nothing(
    uninterrupted_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted_run, run)
    assert train([*run_arguments(run, **EVERYTHING_RANDOM, training__seed=1), "--dry_run"]) == 2
    assert "training.seed was 0, is 1" in capsys.readouterr().err
    assert train([*run_arguments(run, **EVERYTHING_RANDOM), "--dry_run"]) == 0
    assert_same_run(uninterrupted_run, run, 6)


def test_a_run_that_is_already_further_than_asked_for_is_left_alone(
    uninterrupted_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted_run, run)
    assert train(run_arguments(run, **EVERYTHING_RANDOM, training__num_steps=3)) == 2
    assert "is already at step 6, beyond training.num_steps 3; set at least 6" in capsys.readouterr().err
    assert_same_run(uninterrupted_run, run, 6)


def test_a_run_is_not_continued_on_data_of_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    changes = {"data__source": tmp_path / "images.npy", "model__class_conditional": False}
    assert train(run_arguments(tmp_path / "run", **changes)) == 0
    np.save(tmp_path / "images.npy", images[:10])
    assert train(run_arguments(tmp_path / "run", **changes, training__num_steps=8)) == 2
    assert "has 10 training images, but the run in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2.00 GiB."),
        MemoryError("Tried to allocate 2.00 GiB."),
    ],
    ids=["gpu", "cpu", "host"],
)
def test_running_out_of_memory_names_the_setting_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def run_out(self: DenoisingLoss, *arguments: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(DenoisingLoss, "__call__", run_out)
    assert train(run_arguments(tmp_path / "run")) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert line.startswith("error: out of memory (")
    assert "ried to allocate 2.00 GiB.); lower training.micro_batch_size" in line


@pytest.mark.parametrize(
    ("error", "exit_code", "told"),
    [
        (DataError("an image is bad."), 2, ["error: rank 1: an image is bad."]),
        (OSError(errno.EIO, "Input/output error", "a.png"), 1, ["error: rank 1: Input/output error: a.png"]),
        (SharedOSError("the disk is full"), 1, []),
    ],
    ids=["data", "disk", "shared"],
)
def test_what_one_rank_meets_alone_in_a_step_it_tells_itself(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    exit_code: int,
    told: list[str],
) -> None:
    """What all ranks share is for rank 0 to tell."""

    def fail(self: DenoisingLoss, *arguments: Any) -> torch.Tensor:
        monkeypatch.setenv("RANK", "1")
        raise error

    monkeypatch.setattr(DenoisingLoss, "__call__", fail)
    assert train(run_arguments(tmp_path / "run")) == exit_code
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")] == told


def test_a_changed_setting_that_can_be_continued_with_is_named(
    uninterrupted_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted_run, run)
    assert train(run_arguments(run, **EVERYTHING_RANDOM, training__num_steps=7)) == 0
    assert "Continuing with a changed setting: training.num_steps was 6, is 7" in caplog.text
    assert metrics_of(run)[-1]["step"] == 7


HYBRID = {
    "objective__loss": "hybrid",
    "diffusion__variance_type": "learned_range",
    "diffusion__beta_schedule": "linear",
    "objective__weighting": "min_snr",
    "objective__timestep_sampling": "antithetic",
}


@pytest.mark.parametrize("changes", [{}, EVERYTHING_BUT_DROPOUT, HYBRID], ids=["plain", "everything", "hybrid"])
def test_the_loss_does_not_depend_on_how_the_batch_is_accumulated(changes: dict[str, object], tmp_path: Path) -> None:
    """To 1e-5: only the order of float32 additions differs."""
    losses = {}
    for micro_batch_size in (8, 4, 1):
        run = tmp_path / f"run_{micro_batch_size}"
        assert train(run_arguments(run, **changes, training__micro_batch_size=micro_batch_size)) == 0
        losses[micro_batch_size] = loss_columns(run)
    np.testing.assert_allclose(losses[4], losses[8], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(losses[1], losses[8], rtol=1e-5, atol=1e-5)


def loss_columns(output_dir: Path) -> list[list[float]]:
    """Returns the loss and that of each quartile of every line of metrics; NaN where no timestep was of a quartile."""
    names = ("loss", "loss_q0", "loss_q1", "loss_q2", "loss_q3")
    rows = [row for row in metrics_of(output_dir) if "loss" in row]
    return [[float("nan") if row[name] is None else row[name] for name in names] for row in rows]


def test_the_loss_is_told_by_quartile_of_the_timesteps(tmp_path: Path) -> None:
    """All of a chain of four timesteps: their losses, weighed with how often each was drawn, are the loss."""
    changes = {"diffusion__num_train_timesteps": 4, "training__train_batch_size": 64}
    changes |= {"preview__num_inference_steps": 4, "evaluation__num_inference_steps": 4}
    assert train(run_arguments(tmp_path / "run", **changes)) == 0
    for row in metrics_of(tmp_path / "run"):
        timesteps = UniformTimesteps(4, 64, seed=0).draw(row["step"] - 1).timesteps
        counts = np.bincount(timesteps, minlength=4)
        quartiles = [row[f"loss_q{quartile}"] for quartile in range(4)]
        assert np.dot(counts, quartiles) / 64 == pytest.approx(row["loss"], rel=1e-5)
        assert len(set(quartiles)) == 4


OBJECTIVES: dict[str, dict[str, object]] = {
    "hybrid": HYBRID | {"objective__timestep_sampling": "loss_aware"},
    "vlb with a fixed variance": {"objective__loss": "vlb", "objective__timestep_sampling": "loss_aware"},
    "vlb with a learned variance": {"objective__loss": "vlb", "diffusion__variance_type": "learned"},
    "x_0 without signal at the end": {
        "diffusion__prediction_type": "x0",
        "diffusion__rescale_betas_zero_snr": True,
        "objective__weighting": "truncated_snr",
    },
    "self-conditioned epsilon": {"diffusion__prediction_type": "eps", "objective__self_conditioning": 0.5},
    "self-conditioned hybrid": HYBRID | {"objective__self_conditioning": 1.0},
    "l1 with an offset": {"objective__loss": "l1", "objective__offset_noise": 0.1, "objective__weighting": "snr"},
    "huber": {"objective__loss": "huber", "objective__huber_delta": 0.2, "objective__immiscible_noise": True},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_previews_and_saves_a_pipeline_that_samples(name: str, tmp_path: Path) -> None:
    changes = OBJECTIVES[name]
    previews = {"preview__every_steps": 3, "preview__num_images": 10, "preview__num_inference_steps": 2}
    assert train(run_arguments(tmp_path / "run", **changes, **previews)) == 0
    assert np.isfinite([row["loss"] for row in metrics_of(tmp_path / "run")]).all()
    assert (tmp_path / "run" / "previews" / "step_00000006.png").is_file()
    pipeline = GaussianDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    is_self_conditioned = "objective__self_conditioning" in changes
    learns_variance = str(changes.get("diffusion__variance_type", "")).startswith("learned")
    assert bool(pipeline.config.get("self_conditioned")) is is_self_conditioned
    assert pipeline.unet.config.in_channels == 1 + is_self_conditioned
    assert pipeline.unet.config.out_channels == 1 + learns_variance
    images = pipeline(batch_size=2, class_labels=[3, 7], num_inference_steps=2, eta=1.0, output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    assert torch.isfinite(images).all()
    learns = "loss_aware" in changes.values()
    assert (tmp_path / "run" / "checkpoints" / "step_00000006" / "objective.safetensors").exists() is learns


@pytest.mark.parametrize("name", ["hybrid", "self-conditioned hybrid"])
def test_a_learned_variance_is_resumed_bit_by_bit_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = OBJECTIVES[name]
    assert train(run_arguments(tmp_path / "whole", **changes)) == 0
    with monkeypatch.context() as patch:
        stop_with_signal_after(3, patch)
        assert train(run_arguments(tmp_path / "run", **changes)) == 143
    assert train(run_arguments(tmp_path / "run", **changes)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run", 6)


def test_losses_drawn_more_often_count_for_less(tmp_path: Path) -> None:
    """The loss of the last step is the mean of the losses that it put into the history, times their importance."""
    changes = EVERYTHING_BUT_DROPOUT | {"training__checkpoint_every_steps": 1}
    assert train(run_arguments(tmp_path / "run", **changes)) == 0
    before, after = (
        load_file(tmp_path / "run" / "checkpoints" / f"step_0000000{step}" / "objective.safetensors") for step in (5, 6)
    )
    sampler = LossAwareTimesteps(2, 8, seed=0)
    sampler.load_state(before)
    timesteps, importance = sampler.draw(5)
    assert importance is not None
    assert len(set(importance.tolist())) == 2
    slots, losses = before["num_losses"].clone(), []
    for t in timesteps:
        losses.append(float(after["losses"][t, slots[t] % HISTORY_LENGTH]))
        slots[t] += 1
    expected = float((torch.tensor(losses) * torch.from_numpy(importance)).mean())
    assert metrics_of(tmp_path / "run")[-1]["loss"] == pytest.approx(expected, rel=1e-5)


def test_what_is_differentiated_is_the_loss_that_the_metrics_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its importance, in two parts a step; to 1e-5, which is the order of float32 additions."""
    parts: list[float] = []
    backward = Accelerator.backward

    def noted(self: Accelerator, loss: torch.Tensor, **kwargs: object) -> None:
        parts.append(float(loss.detach()))
        backward(self, loss, **kwargs)

    monkeypatch.setattr(Accelerator, "backward", noted)
    assert train(run_arguments(tmp_path / "run", **EVERYTHING_BUT_DROPOUT, training__micro_batch_size=4)) == 0
    differentiated = [sum(pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
    assert differentiated == pytest.approx([row["loss"] for row in metrics_of(tmp_path / "run")], rel=1e-5)


def test_a_history_of_losses_was_full_and_in_use(uninterrupted_run: Path) -> None:
    """Otherwise the exact resume above would not have to restore it."""
    history = load_file(uninterrupted_run / "checkpoints" / "step_00000004" / "objective.safetensors")
    assert int(history["num_losses"].sum()) == 4 * 8
    assert int(history["num_losses"].min()) >= HISTORY_LENGTH
    assert history["losses"].all()


def test_validation_measures_the_averaged_weights_and_leaves_training_alone(
    uninterrupted_run: Path, tmp_path: Path
) -> None:
    """Bit by bit: dropout, flips and label drops of training are what they are without it.

    The value is that of the averaged weights of the checkpoint, computed here in one batch: to 1e-6, since the network
    adds in another order.
    """
    arguments = run_arguments(tmp_path / "plain", **EVERYTHING_RANDOM, data__validation_fraction=0.05)
    assert train(arguments) == 0
    arguments = run_arguments(tmp_path / "run", **EVERYTHING_RANDOM, data__validation_fraction=0.05)
    assert train([*arguments, "--training.validate_every_steps", "4"]) == 0
    plain, run = (tensors_of(tmp_path / name / "checkpoints" / "step_00000006") for name in ("plain", "run"))
    assert not [key for key in plain if not torch.equal(plain[key], run[key])]
    rows = metrics_of(tmp_path / "run")
    assert [row for row in rows if "loss" in row] == metrics_of(tmp_path / "plain")
    measured = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert measured.keys() == {4, 6}
    config, _ = load_config(arguments)
    trainer = Trainer(config)
    try:
        weights = load_file(tmp_path / "run/checkpoints/step_00000006/ema/diffusion_pytorch_model.safetensors")
        trainer.unet.load_state_dict(weights)
        alone = {"rank": 0, "num_processes": 1, "batch_size": 90}
        expected = validation_loss(trainer.unet, trainer.loss, trainer.validation_images, config, **alone)
    finally:
        trainer.folder.release()
    assert measured[6] == pytest.approx(expected, abs=1e-6)


def test_an_automatic_micro_batch_is_kept_for_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that began with 4 of 8 goes on with 4, although 8 would fit."""
    arguments = run_arguments(tmp_path / "run", training__micro_batch_size="auto")
    assert train([*arguments, "--training.num_steps", "2"]) == 0
    assert "training.micro_batch_size auto: 8 images, the whole per-rank batch" in capsys.readouterr().out
    state = tmp_path / "run/checkpoints/step_00000002/trainer_state.json"
    assert json.loads(state.read_text())["micro_batch_size"] == 8
    assert train(run_arguments(tmp_path / "small", training__micro_batch_size=4, training__num_steps=2)) == 0
    capsys.readouterr()
    assert train(run_arguments(tmp_path / "small", training__micro_batch_size="auto")) == 0
    assert "training.micro_batch_size auto: 4 images, as when the run began." in capsys.readouterr().out
    assert train(run_arguments(tmp_path / "four", training__micro_batch_size=4)) == 0
    assert_same_run(tmp_path / "four", tmp_path / "small", 6)


def test_a_non_finite_gradient_skips_the_update_and_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit: weights, average and moments after the poisoned step are those before it."""
    poison_loss_at(3, monkeypatch)
    run = tmp_path / "run"
    arguments = run_arguments(run, training__checkpoint_every_steps=1, training__num_checkpoints_kept=9)
    assert train(arguments) == 0
    before, after = (tensors_of(run / "checkpoints" / f"step_0000000{step}") for step in (2, 3))
    assert not [key for key in before if not torch.equal(before[key], after[key])]
    assert [row["num_skipped_updates"] for row in metrics_of(run)] == [0, 0, 1, 1, 1, 1]
    assert metrics_of(run)[2]["loss"] is None


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


def use_gradient_scaler(trainer: Trainer, init_scale: float, backoff_factor: float = 0.5) -> None:
    """Makes Accelerate do on the CPU what it does for fp16 on a GPU: autocast to fp16, scale, unscale, skip."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, backoff_factor=backoff_factor)
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"


@pytest.mark.usefixtures("fresh_accelerate")
def test_skips_by_which_the_fp16_scaler_finds_its_scale_are_counted_apart(tmp_path: Path) -> None:
    """Bit by bit: while the scaled gradients overflow nothing moves; and however many there are, they stop no run.

    Scales of 2**60, 2**44 and 2**28 overflow fp16 for certain, 2**12 does not.
    """
    changes = {"training__checkpoint_every_steps": 1, "training__num_checkpoints_kept": 9}
    config, _ = load_config(run_arguments(tmp_path / "run", **changes, training__max_consecutive_nonfinite=2))
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
    """From a scale of 4: two skips of the scaler, and from 1 on three that are nobody's overflow."""
    poison_loss_at(range(1, 99), monkeypatch)
    config, _ = load_config(run_arguments(tmp_path / "run", training__max_consecutive_nonfinite=3))
    trainer = Trainer(config)
    use_gradient_scaler(trainer, 4.0)
    try:
        with pytest.raises(NonFiniteTraining):
            trainer.fit()
    finally:
        trainer.folder.release()
    assert (trainer.guard.num_scaler_skips, trainer.guard.num_skipped) == (2, 3)


def poison_loss_at(steps: int | range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the loss NaN in some optimiser steps (counted from 1)."""
    loss = DenoisingLoss.__call__
    calls = iter(range(1, 100))

    def poisoned(self: DenoisingLoss, *arguments: Any) -> torch.Tensor:
        is_poisoned = next(calls) in ([steps] if isinstance(steps, int) else steps)
        return loss(self, *arguments) * (float("nan") if is_poisoned else 1.0)

    monkeypatch.setattr(DenoisingLoss, "__call__", poisoned)


def test_a_full_disk_leaves_the_older_checkpoints_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = checkpoint.write_snapshot

    def write_or_fail(folder: Path, *arguments: Any) -> None:
        write(folder, *arguments)
        if folder.name.endswith("step_00000004"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_snapshot", write_or_fail)
    run = tmp_path / "run"
    assert train(run_arguments(run)) == 0
    assert "step 4 could not be written (No space left on device)" in caplog.text
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000002", "step_00000006"]


def test_a_disk_without_room_for_checkpoints_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fresh run needs room for two, a continued one for one more, a finished one for none; sizes are to 10 %.

    What posthoc_ema stores until the end comes on top.
    """
    run = tmp_path / "run"
    assert train(run_arguments(run)) == 0
    (checkpoint, *_) = (run / "checkpoints").iterdir()
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    usage = shutil.disk_usage(tmp_path)

    def with_free(free: float, output_dir: Path, **changes: object) -> int:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(free)))
        return train([*run_arguments(output_dir, **changes), "--dry_run"])

    assert with_free(2.2 * size, tmp_path / "other") == 0
    assert with_free(1.8 * size, tmp_path / "other") == 2
    message = capsys.readouterr().err
    assert f"training.output_dir {tmp_path / 'other'} has {1.8 * size / 1e6:.1f} MB free, but needs" in message
    assert "for two checkpoints; make room, or choose another folder" in message
    assert not (tmp_path / "other").exists()
    assert with_free(1.1 * size, run, training__num_steps=9) == 0
    assert with_free(0.9 * size, run, training__num_steps=9) == 2
    assert "for one more checkpoint; make room, or choose another folder" in capsys.readouterr().err
    assert with_free(0, run) == 0
    assert train(run_arguments(run, training__num_steps=9)) == 2
    assert "for one more checkpoint" in capsys.readouterr().err
    # Two averages more in a checkpoint of four tensors a weight, and a pair of them after each of six steps.
    assert with_free(6.6 * size, tmp_path / "posthoc", training__posthoc_ema=True) == 0
    assert "of EMA snapshots in 6 parts (posthoc_ema); " in capsys.readouterr().out
    assert with_free(5.4 * size, tmp_path / "posthoc", training__posthoc_ema=True) == 2
    assert "for two checkpoints and 6 EMA snapshots (training.posthoc_ema); make room" in capsys.readouterr().err


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(run_arguments(run)) == 0
    lock = RunLock(run)
    assert train(run_arguments(run)) == 2
    assert "another process is training" in capsys.readouterr().err
    lock.release()


def test_unconditional_training_needs_no_labels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    changes = {"data__source": tmp_path / "images.npy", "model__class_conditional": False}
    assert train(run_arguments(tmp_path / "run", **changes)) == 0
    assert GaussianDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline").num_channels == 3


def test_a_class_without_training_images_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(20) % 2 * 2)
    changes = {"data__source": tmp_path / "images.npz", "data__validation_fraction": 0.2}
    changes |= {"evaluation__recognition": True, "evaluation__num_samples": 6}
    assert train(run_arguments(tmp_path / "run", **changes)) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_bug_in_training_is_not_taken_for_a_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: DenoisingLoss, *arguments: Any) -> torch.Tensor:
        raise ValueError("a bug of ours")

    monkeypatch.setattr(DenoisingLoss, "__call__", fail)
    with pytest.raises(RuntimeError, match="training failed"):
        train(run_arguments(tmp_path / "run"))
