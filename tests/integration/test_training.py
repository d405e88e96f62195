"""A training run from the command line to the saved pipeline, and runs that are continued."""

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from ddpm_hf import GaussianDiffusionPipeline
from ddpm_hf.cli.main import train
from ddpm_hf.config import parse_command_line
from ddpm_hf.data import DataError
from ddpm_hf.distributed import SharedOSError
from ddpm_hf.evaluation import generate
from ddpm_hf.training.batches import HISTORY_LENGTH, LossAwareTimesteps, UniformTimesteps
from ddpm_hf.training.loss import DenoisingLoss
from ddpm_hf.training.run_dir import RunLock
from ddpm_hf.training.trainer import Trainer, validation_loss
from tests.conftest import REPOSITORY, run_arguments
from tests.runs import (
    EVERYTHING_BUT_DROPOUT,
    EVERYTHING_RANDOM,
    assert_same_run,
    files_of,
    loss_columns,
    metrics_of,
    stop_with_signal_after,
    tensors_of,
)

HYBRID: dict[str, Any] = {
    "objective__loss": "hybrid",
    "diffusion__variance_type": "learned_range",
    "diffusion__beta_schedule": "linear",
    "objective__weighting": "min_snr",
    "objective__timestep_sampling": "antithetic",
}

# ------------------------------------------------------------------------------------------------- a finished run


def test_a_run_leaves_the_promised_files_and_metrics(finished_run: Path) -> None:
    assert {path.name for path in finished_run.iterdir()} == {
        *("README.md", "checkpoints", "config.yaml", "denoising.gif", "denoising.png", "ema_snapshots", "loss.png"),
        *("metrics.jsonl", "pipeline", "previews", "recognition.json", "samples.png", ".lock"),
    }
    previews = sorted(path.name for path in (finished_run / "previews").iterdir())
    assert previews == ["step_00000003.png", "step_00000006.png"]
    for folder in ("checkpoints", "ema_snapshots"):
        assert sorted(path.name for path in (finished_run / folder).iterdir()) == [
            f"step_{step:08d}" for step in (2, 4, 6)
        ]
    rows = metrics_of(finished_run)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6]
    document = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    columns = {name for line in (finished_run / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    first_cells = re.findall(r"^\| (`.*?) \|", document, re.M)
    documented = {*re.findall(r"`(\w+)`", " ".join(first_cells)), "loss_q1", "loss_q2"}
    assert columns <= documented


def test_the_saved_pipeline_holds_the_ema_weights(finished_run: Path) -> None:
    published = load_file(finished_run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    checkpoint = finished_run / "checkpoints" / "step_00000006"
    averaged = load_file(checkpoint / "ema" / "diffusion_pytorch_model.safetensors")
    trained = load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(published[key], averaged[key]) for key in averaged)
    assert any(not torch.equal(published[key], trained[key]) for key in trained)


def test_the_saved_pipeline_samples_classes_by_name_and_loads_in_stock_diffusers(finished_run: Path) -> None:
    pipeline = GaussianDiffusionPipeline.from_pretrained(finished_run / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, class_labels=["3", "7"], num_inference_steps=2, output_type="uint8").images
    assert images.shape == (2, 8, 8, 1)
    assert images.dtype == np.uint8
    assert type(DDPMPipeline.from_pretrained(finished_run / "pipeline")) is DDPMPipeline


def test_the_report_has_the_share_of_recognized_samples(finished_run: Path) -> None:
    recognition = json.loads((finished_run / "recognition.json").read_text())
    assert recognition["num_samples"] == 20
    assert 0.0 <= recognition["recognised"] <= 1.0
    assert "samples.png" in (finished_run / "README.md").read_text()


# ------------------------------------------------------------------------------------------ a run that is continued


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with everything random. Read only."""
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert train(run_arguments(run, **EVERYTHING_RANDOM)) == 0
    return run


@pytest.fixture
def run(uninterrupted_run: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    shutil.copytree(uninterrupted_run, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_continues_from_the_last_valid_checkpoint_when_the_newest_is_damaged(
    uninterrupted_run: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = run / "checkpoints" / "step_00000006" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert train(run_arguments(run, **EVERYTHING_RANDOM)) == 0
    assert "step_00000006: unet/diffusion_pytorch_model.safetensors is damaged" in caplog.text
    assert (run / "checkpoints" / "damaged-step_00000006").is_dir()
    assert_same_run(uninterrupted_run, run, 6)


def test_a_run_without_a_valid_checkpoint_is_not_started_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / "optimizer.safetensors").unlink()
    before = metrics_of(run)
    assert train(run_arguments(run, **EVERYTHING_RANDOM)) == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert metrics_of(run) == before


def test_a_finished_run_started_again_trains_no_step_and_keeps_its_evaluations(
    uninterrupted_run: Path, run: Path
) -> None:
    """When it then trains further, the numbers of the earlier model are kept beside the new pipeline."""
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
    assert_same_run(uninterrupted_run, run, 6)
    assert files_of(pipeline).keys() == before.keys()
    assert {name: files_of(pipeline)[name] for name in additions} == additions
    assert not (run / "evaluations").exists()

    assert train(run_arguments(run, **EVERYTHING_RANDOM, training__num_steps=7)) == 0
    assert files_of(pipeline).keys() == before.keys() - additions.keys()
    assert files_of(run / "evaluations") == {"step_00000006.json": b"{}", "step_00000006.png": b"picture"}


def test_a_command_that_contradicts_the_run_is_refused_and_changes_nothing(
    uninterrupted_run: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 2, with --dry_run too: another seed, fewer steps than done, a folder in use, or settings that
    would have mattered during the finished training."""
    before = (run / "config.yaml").read_text()
    contradictions: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"training__seed": 1}, ("training.seed was 0, is 1",)),
        ({"training__num_steps": 3}, ("is already at step 6, beyond training.num_steps 3; set at least 6",)),
        (
            {"training__learning_rate": 1.0},
            (
                "holds a finished run, which was trained with other settings (training.learning_rate was 0.001",
                "set a larger training.num_steps",
            ),
        ),
    ]
    for changes, messages in contradictions:
        for dry_run in ([], ["--dry_run"]):
            assert train([*run_arguments(run, **EVERYTHING_RANDOM, **changes), *dry_run]) == 2, changes
            error = capsys.readouterr().err
            assert [message for message in messages if message not in error] == []
    lock = RunLock(run)
    assert train(run_arguments(run, **EVERYTHING_RANDOM)) == 2
    assert "another Trainer of this process holds" in capsys.readouterr().err
    lock.release()
    assert train([*run_arguments(run, **EVERYTHING_RANDOM), "--dry_run"]) == 0
    assert (run / "config.yaml").read_text() == before
    assert_same_run(uninterrupted_run, run, 6)


def test_a_run_is_continued_with_settings_that_may_change_and_names_them(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harmless = {"training__cpu": True, "training__log_every_steps": 3, "preview__eta": 1.0}
    assert train(run_arguments(run, **(EVERYTHING_RANDOM | harmless))) == 0
    further = {"training__learning_rate": 1e-4, "training__num_steps": 7}
    assert train(run_arguments(run, **EVERYTHING_RANDOM, **further)) == 0
    assert "Continuing with a changed setting: training.num_steps was 6, is 7" in caplog.text
    assert "learning_rate: 0.0001\n" in (run / "config.yaml").read_text()
    assert metrics_of(run)[-1]["step"] == 7


def test_unlabeled_images_train_and_a_run_is_not_continued_on_another_number_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    changes = {"data__source": tmp_path / "images.npy", "model__class_conditional": False}
    assert train(run_arguments(tmp_path / "run", **changes)) == 0
    assert GaussianDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline").num_channels == 3
    np.save(tmp_path / "images.npy", images[:10])
    assert train(run_arguments(tmp_path / "run", **changes, training__num_steps=8)) == 2
    assert "has 10 training images, but the run in" in capsys.readouterr().err


def test_an_automatic_micro_batch_size_is_kept_when_a_run_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dropout depends on it: a run that began with 4 of 8 continues with 4, although 8 would fit."""

    def micro_batch_size(run: Path) -> int:
        newest = max((run / "checkpoints").iterdir())
        return int(json.loads((newest / "trainer_state.json").read_text())["micro_batch_size"])

    assert train(run_arguments(tmp_path / "run", training__micro_batch_size="auto", training__num_steps=2)) == 0
    assert "training.micro_batch_size auto: 8 images" in capsys.readouterr().out
    assert micro_batch_size(tmp_path / "run") == 8
    assert train(run_arguments(tmp_path / "small", training__micro_batch_size=4, training__num_steps=2)) == 0
    assert train(run_arguments(tmp_path / "small", training__micro_batch_size="auto", training__num_steps=3)) == 0
    assert "training.micro_batch_size auto: 4 images" in capsys.readouterr().out
    assert micro_batch_size(tmp_path / "small") == 4


# ------------------------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize("changes", [EVERYTHING_BUT_DROPOUT, HYBRID], ids=["everything", "hybrid"])
def test_the_loss_does_not_depend_on_how_the_batch_is_accumulated(changes: dict[str, Any], tmp_path: Path) -> None:
    """To 1e-5: only the order of float32 additions differs."""
    for micro_batch_size in (8, 1):
        run = tmp_path / f"run_{micro_batch_size}"
        assert train(run_arguments(run, **changes, training__micro_batch_size=micro_batch_size)) == 0
    whole, accumulated = (loss_columns(tmp_path / name) for name in ("run_8", "run_1"))
    np.testing.assert_allclose(accumulated, whole, rtol=1e-5, atol=1e-5)


def test_prefetched_batches_train_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit with everything random, micro batches and dropout; also if a run is stopped and goes on without."""
    changes = EVERYTHING_RANDOM | {"objective__timestep_sampling": "antithetic"}
    for prefetch_factor in (0, 1, 2):
        run = tmp_path / str(prefetch_factor)
        arguments = run_arguments(run, **changes, training__prefetch_factor=prefetch_factor)
        if prefetch_factor == 1:
            with monkeypatch.context() as patch:
                stop_with_signal_after(3, patch)
                assert train(run_arguments(run, **changes, training__prefetch_factor=2)) == 143
        assert train(arguments) == 0
        assert_same_run(tmp_path / "0", run, 6)


def test_the_losses_of_the_timestep_quartiles_add_up_to_the_loss(tmp_path: Path) -> None:
    """With four timesteps: their losses, weighted by how often each was drawn, are the loss."""
    changes = {"diffusion__num_train_timesteps": 4, "training__train_batch_size": 64, "training__num_steps": 2}
    changes |= {"preview__num_inference_steps": 4, "evaluation__num_inference_steps": 4}
    assert train(run_arguments(tmp_path / "run", **changes)) == 0
    for row in metrics_of(tmp_path / "run"):
        timesteps = UniformTimesteps(4, 64, seed=0).draw(row["step"] - 1).timesteps
        counts = np.bincount(timesteps, minlength=4)
        quartiles = [row[f"loss_q{quartile}"] for quartile in range(4)]
        assert np.dot(counts, quartiles) / 64 == pytest.approx(row["loss"], rel=1e-5)
        assert len(set(quartiles)) == 4


OBJECTIVES: dict[str, dict[str, Any]] = {
    "self-conditioned hybrid": HYBRID
    | {"objective__self_conditioning": 1.0, "objective__timestep_sampling": "loss_aware"},
    "vlb with a fixed variance": {"objective__loss": "vlb", "objective__timestep_sampling": "loss_aware"},
    "vlb with a learned variance": {"objective__loss": "vlb", "diffusion__variance_type": "learned"},
    "x_0 with zero terminal SNR": {
        "diffusion__prediction_type": "x0",
        "diffusion__rescale_betas_zero_snr": True,
        "objective__weighting": "truncated_snr",
    },
    "self-conditioned l1 with offset noise": {
        "diffusion__prediction_type": "eps",
        "objective__self_conditioning": 0.5,
        "objective__loss": "l1",
        "objective__offset_noise": 0.1,
        "objective__weighting": "snr",
    },
    "huber with immiscible noise": {
        "objective__loss": "huber",
        "objective__huber_delta": 0.2,
        "objective__immiscible_noise": True,
    },
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_previews_and_saves_a_pipeline_that_samples(name: str, tmp_path: Path) -> None:
    changes = OBJECTIVES[name] | {"training__num_steps": 3}
    changes |= {"preview__every_steps": 3, "preview__num_images": 2, "preview__num_inference_steps": 2}
    assert train(run_arguments(tmp_path / "run", **changes)) == 0
    assert np.isfinite([row["loss"] for row in metrics_of(tmp_path / "run")]).all()
    assert (tmp_path / "run" / "previews" / "step_00000003.png").is_file()
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
    is_loss_aware = "loss_aware" in changes.values()
    assert (tmp_path / "run/checkpoints/step_00000003/objective.safetensors").exists() is is_loss_aware


def test_a_learned_variance_is_resumed_bit_by_bit_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = OBJECTIVES["self-conditioned hybrid"] | {"training__num_steps": 4}
    assert train(run_arguments(tmp_path / "whole", **changes)) == 0
    with monkeypatch.context() as patch:
        stop_with_signal_after(3, patch)
        assert train(run_arguments(tmp_path / "run", **changes)) == 143
    assert train(run_arguments(tmp_path / "run", **changes)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run", 4)


def test_the_loss_is_weighted_by_importance_in_the_metrics_and_in_the_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a step is the mean of the losses that it added to the history, times their importance.

    To 1e-5, the order of float32 additions: the loss that is differentiated comes in two parts per step.
    """
    parts: list[float] = []
    backward = Accelerator.backward

    def noted(self: Accelerator, loss: torch.Tensor, **kwargs: object) -> None:
        parts.append(float(loss.detach()))
        backward(self, loss, **kwargs)

    monkeypatch.setattr(Accelerator, "backward", noted)
    changes = EVERYTHING_BUT_DROPOUT | {"training__checkpoint_every_steps": 1, "training__micro_batch_size": 4}
    assert train(run_arguments(tmp_path / "run", **changes)) == 0
    in_metrics = [row["loss"] for row in metrics_of(tmp_path / "run")]
    assert [sum(pair) for pair in zip(parts[::2], parts[1::2], strict=True)] == pytest.approx(in_metrics, rel=1e-5)

    before, after = (
        load_file(tmp_path / "run" / "checkpoints" / f"step_0000000{step}" / "objective.safetensors") for step in (5, 6)
    )
    sampler = LossAwareTimesteps(2, 8, seed=0)
    sampler.load_state_dict(before)
    timesteps, importance = sampler.draw(5)
    assert importance is not None
    assert len(set(importance.tolist())) == 2
    slots, losses = before["num_losses"].clone(), []
    for t in timesteps:
        losses.append(float(after["losses"][t, slots[t] % HISTORY_LENGTH]))
        slots[t] += 1
    expected = float((torch.tensor(losses) * torch.from_numpy(importance)).mean())
    assert in_metrics[-1] == pytest.approx(expected, rel=1e-5)


def test_validation_measures_the_ema_weights_and_does_not_change_training(tmp_path: Path) -> None:
    """Bit by bit: dropout, flips and label drops of training are the same without it.

    The value is that of the EMA weights of the checkpoint, computed here in one batch: to 1e-6, since the network adds
    in another order.
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
    config, _ = parse_command_line(arguments)
    trainer = Trainer(config)
    try:
        weights = load_file(tmp_path / "run/checkpoints/step_00000006/ema/diffusion_pytorch_model.safetensors")
        trainer.unet.load_state_dict(weights)
        alone = {"rank": 0, "num_processes": 1, "batch_size": 90}
        expected = validation_loss(trainer.unet, trainer.loss, trainer.validation_images, config, **alone)
    finally:
        trainer.folder.release()
    assert measured[6] == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------ errors


def fail_in_the_first_step(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: DenoisingLoss, *arguments: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(DenoisingLoss, "__call__", fail)


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
    fail_in_the_first_step(error, monkeypatch)
    assert train(run_arguments(tmp_path / "run")) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert line.startswith("error: out of memory (")
    assert "ried to allocate 2.00 GiB.); lower training.micro_batch_size" in line


@pytest.mark.parametrize(
    ("error", "exit_code", "printed"),
    [
        (DataError("an image is bad."), 2, ["error: rank 1: an image is bad."]),
        (OSError(errno.EIO, "Input/output error", "a.png"), 1, ["error: rank 1: Input/output error: a.png"]),
        (SharedOSError("the disk is full"), 1, []),
    ],
    ids=["data", "disk", "shared"],
)
def test_an_error_of_one_rank_is_printed_by_that_rank_and_a_shared_one_by_rank_0(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    exit_code: int,
    printed: list[str],
) -> None:
    def fail(self: DenoisingLoss, *arguments: Any) -> torch.Tensor:
        monkeypatch.setenv("RANK", "1")
        raise error

    monkeypatch.setattr(DenoisingLoss, "__call__", fail)
    assert train(run_arguments(tmp_path / "run")) == exit_code
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")] == printed


def test_a_bug_in_training_or_in_the_report_is_not_reported_as_a_users_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ValueError after the checks keeps its traceback; the trained pipeline is saved before the report."""
    with monkeypatch.context() as patch:
        fail_in_the_first_step(ValueError("a bug"), patch)
        with pytest.raises(RuntimeError, match="training failed"):
            train(run_arguments(tmp_path / "failed"))

    def fail(*arguments: Any, **settings: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(generate, "sample_images", fail)
    with pytest.raises(RuntimeError, match=r"the report failed; the trained pipeline is in .*run/pipeline"):
        train(run_arguments(tmp_path / "run", training__num_steps=1, evaluation__num_samples=2))
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()


def test_a_class_without_training_images_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    columns = {"image": list(map(Image.fromarray, pixels)), "label": [0, 2] * 10}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "owl"])})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "images.parquet")
    changes = {"data__source": tmp_path / "images.parquet", "data__validation_fraction": 0.2}
    changes |= {"evaluation__recognition": True, "evaluation__num_samples": 6}
    assert train(run_arguments(tmp_path / "run", **changes)) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------------- augmentation


def test_an_augmented_run_trains_an_embedding_and_saves_networks_without_it(tmp_path: Path) -> None:
    """What is saved is a plain UNet2DModel, whose loss without augmentation is the validation loss."""
    changes: dict[str, Any] = {
        "data__augmentation": 0.5,
        "data__validation_fraction": 0.1,
        "model__initialization": "torch",
        "training__validate_every_steps": 2,
        "training__posthoc_ema": True,
        "training__num_steps": 2,
    }
    config, _ = parse_command_line(run_arguments(tmp_path / "run", **changes))
    trainer = Trainer(config)
    trainer.fit()
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    left_out = load_file(checkpoint / "augmentation.safetensors")
    assert {name.partition(".time_embedding")[0] for name in left_out} == {"unet", *trainer.ema.names}
    assert all(weight.any() for weight in left_out.values())
    plain = UNet2DModel.from_config(trainer.unet.config)
    for network in (checkpoint / "unet", checkpoint / "ema", tmp_path / "run" / "pipeline" / "unet"):
        assert load_file(network / "diffusion_pytorch_model.safetensors").keys() == plain.state_dict().keys()
    for snapshot in (tmp_path / "run" / "ema_snapshots").rglob("*.safetensors"):
        assert load_file(snapshot).keys() == dict(plain.named_parameters()).keys()
    summary = json.loads((tmp_path / "run" / "pipeline" / "training_summary.json").read_text())
    assert summary["num_parameters"] == plain.num_parameters()
    alone = {"rank": 0, "num_processes": 1, "batch_size": 8}
    for unet in (trainer.pipeline.unet, UNet2DModel.from_pretrained(tmp_path / "run" / "pipeline" / "unet")):
        loss = validation_loss(unet, trainer.loss, trainer.validation_images, config, **alone)  # type: ignore[arg-type]
        assert loss == metrics_of(tmp_path / "run")[-1]["validation_loss"]


@pytest.mark.slow
def test_a_network_trained_on_mirrored_images_predicts_them_as_they_are(tmp_path: Path) -> None:
    """From pure noise it predicts their mean, which without conditioning would be that of both directions."""
    images = np.zeros((8, 8, 8), np.uint8)
    images[:, :, :4] = 255
    changes: dict[str, Any] = {
        "data__augmentation": 0.1,
        "data__augmentation_transforms": ["xflip"],
        "model__class_conditional": False,
        "model__initialization": "torch",
        "training__checkpoint_every_steps": 200,
        "training__ema_decay": 0.9,
        "training__learning_rate": 1e-2,
        "training__log_every_steps": 200,
        "training__num_steps": 200,
    }
    config, _ = parse_command_line(run_arguments(tmp_path / "run", **changes))
    trainer = Trainer(config, train_dataset=images)
    trainer.fit()
    noise = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = trainer.pipeline.unet(noise, config.diffusion.num_train_timesteps - 1).sample
    left, right = (-v).mean(dim=(0, 1, 2)).split(4)
    assert left.mean() - right.mean() > 1  # of 2
