"""Stored EMA snapshots are combined to an EMA of any length, or an error says why not."""

import json
import logging
import resource
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline

from ddpm_hf.cli.main import main
from ddpm_hf.config import ConfigError, TrainingConfig
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.training.checkpoint import remove_after
from ddpm_hf.training.ema import EMA, decay_schedules, is_snapshot_due
from ddpm_hf.training.posthoc_ema import reconstruct, store
from ddpm_hf.training.run_dir import EMA_SNAPSHOTS_DIR
from tests.conftest import tiny_unet

CONFIG = TrainingConfig(posthoc_ema=True, num_steps=20)
CLASS_NAMES = {str(number): f"digit {number}" for number in range(10)}


def train(run: Path, steps: int = 20, every: int = 2) -> EMA:
    """Train a tiny network by a random walk, store snapshots, and return its EMAs."""
    unet = tiny_unet(10)
    ema = EMA(unet, decay_schedules(CONFIG))
    scheduler = GaussianDiffusionScheduler.create(beta_schedule="cosine", prediction_type="v")
    pipeline = GaussianDiffusionPipeline(unet, scheduler, class_names=CLASS_NAMES)
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text("training: {}\n")
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        ema.update()
        if step % every == 0:
            store(run / EMA_SNAPSHOTS_DIR, step, ema, pipeline)
    return ema


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EMA]:
    run = tmp_path_factory.mktemp("runs") / "finished"
    return run, train(run)


def parameters(folder: Path) -> list[torch.Tensor]:
    return list(GaussianDiffusionPipeline.from_pretrained(folder).unet.parameters())


@pytest.mark.parametrize("length", [0.05, 0.10])
def test_a_stored_length_is_reconstructed(finished: tuple[Path, EMA], tmp_path: Path, length: float) -> None:
    """To 1e-6 of weights of order 5, the rounding of a system of 20 equations."""
    run, ema = finished
    rebuilt = reconstruct(run, length, None, tmp_path / "made")
    assert (rebuilt.step, rebuilt.num_stored) == (20, 20)
    assert rebuilt.relative_error < 1e-6
    for found, expected in zip(parameters(tmp_path / "made"), ema.tensors(f"ema_sigma_{length:.3f}"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_an_earlier_step_is_reconstructed_from_earlier_snapshots(finished: tuple[Path, EMA], tmp_path: Path) -> None:
    rebuilt = reconstruct(finished[0], 0.1, 12, tmp_path / "made")
    assert (rebuilt.step, rebuilt.num_stored) == (12, 12)
    again = train(tmp_path / "shorter", steps=12)
    for found, expected in zip(parameters(tmp_path / "made"), again.tensors("ema_sigma_0.100"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_result_is_a_complete_pipeline(finished: tuple[Path, EMA], tmp_path: Path) -> None:
    reconstruct(finished[0], 0.08, None, tmp_path / "made")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "made")) is DDPMPipeline
    pipeline = GaussianDiffusionPipeline.from_pretrained(tmp_path / "made")
    assert pipeline.config["class_names"] == CLASS_NAMES
    assert pipeline.scheduler.config["prediction_type"] == "v_prediction"
    assert (tmp_path / "made" / "pipeline.py").is_file()
    assert (tmp_path / "made" / "training_config.yaml").read_text() == "training: {}\n"
    content = json.loads((tmp_path / "made" / "posthoc_ema.json").read_text())
    assert (content["step"], content["sigma_rel"], content["num_stored"]) == (20, 0.08, 20)


def test_the_command_writes_the_pipeline_and_prints_the_error_of_the_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(run)
    assert main(["ema", str(run), "--length", "0.08"]) == 0
    assert (run / "pipeline_ema_0.080" / "model_index.json").is_file()
    said = capsys.readouterr().out
    assert "EMA of length 0.08 at step 20, reconstructed from 20 stored EMAs (error of the profile 0." in said
    assert main(["ema", str(run), "--length", "0.1", "--step", "10"]) == 0
    assert (run / "pipeline_ema_0.100_step_00000010" / "model_index.json").is_file()
    assert main(["ema", str(run), "--length", "0.08"]) == 2
    assert "pipeline_ema_0.080 already exists; remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("length", "step", "sentence"),
    [
        (0.3, None, "--length is 0.3, but must be between 0 and 0.289, the mean of all weights."),
        (0.0, None, "--length is 0, but must be between 0 and 0.289"),
        (-0.1, None, "--length is -0.1, but must be between 0 and 0.289"),
        (0.01, None, "--length 0.01 cannot be combined from the 20 EMAs stored until step 20"),
        (0.08, 7, "--step is 7, but there are snapshots of steps 2, 4, 6, ..., 16, 18, 20; choose one of these."),
    ],
)
def test_invalid_lengths_and_steps_are_refused(
    finished: tuple[Path, EMA], tmp_path: Path, length: float, step: int | None, sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        reconstruct(finished[0], length, step, tmp_path / "made")
    assert sentence in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_a_length_that_cannot_be_combined_names_the_range_that_can(finished: tuple[Path, EMA], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        reconstruct(finished[0], 0.02, None, tmp_path / "made")
    shortest, _, longest = str(caught.value).split("choose ")[1].split(",")[0].partition(" to ")
    for number, length in enumerate((float(shortest), float(longest))):
        assert reconstruct(finished[0], length, None, tmp_path / str(number)).relative_error <= 0.1


def test_a_folder_without_snapshots_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no ema_snapshots; give the folder of a run with training"):
        reconstruct(tmp_path, 0.1, None, tmp_path / "made")


def test_a_damaged_snapshot_is_named_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ema = train(tmp_path / "run")
    path = tmp_path / "run" / EMA_SNAPSHOTS_DIR / "step_00000010" / "ema_sigma_0.050.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        rebuilt = reconstruct(tmp_path / "run", 0.1, None, tmp_path / "made")
    assert "step_00000010 is ignored: ema_sigma_0.050.safetensors is damaged" in caplog.text
    assert rebuilt.num_stored == 18
    for found, expected in zip(parameters(tmp_path / "made"), ema.tensors("ema_sigma_0.100"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_snapshots_without_an_update_between_them_count_once(tmp_path: Path) -> None:
    """Two equal EMAs would make the system singular."""
    ema = train(tmp_path / "run")
    unet = tiny_unet(10)
    pipeline = GaussianDiffusionPipeline(unet, GaussianDiffusionScheduler.create(), class_names=CLASS_NAMES)
    store(tmp_path / "run" / EMA_SNAPSHOTS_DIR, 22, ema, pipeline)
    rebuilt = reconstruct(tmp_path / "run", 0.1, None, tmp_path / "made")
    assert (rebuilt.step, rebuilt.num_stored) == (22, 20)


def test_before_the_first_update_there_is_nothing_to_store(tmp_path: Path) -> None:
    unet = tiny_unet(10)
    store(
        tmp_path, 1, EMA(unet, decay_schedules(CONFIG)), GaussianDiffusionPipeline(unet, GaussianDiffusionScheduler())
    )
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_a_snapshot_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A limit on the size of files stands for the full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        train(tmp_path / "run", steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "The EMA snapshot of step 2 could not be stored (" in caplog.text
    assert list((tmp_path / "run" / EMA_SNAPSHOTS_DIR).iterdir()) == []


def test_later_snapshots_are_removed_and_earlier_ones_kept(tmp_path: Path) -> None:
    train(tmp_path / "run", steps=8)
    remove_after(tmp_path / "run" / EMA_SNAPSHOTS_DIR, 5)
    names = [path.name for path in sorted((tmp_path / "run" / EMA_SNAPSHOTS_DIR).iterdir())]
    assert names == ["step_00000002", "step_00000004"]
    remove_after(tmp_path / "nowhere", 5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_steps": 10, "posthoc_ema_every_steps": 4}, [4, 8, 10]),
        ({"num_steps": 8, "posthoc_ema_every_steps": 4}, [4, 8]),
        ({"num_steps": 3, "posthoc_ema_every_steps": 100}, [3]),
        ({"num_steps": 400}, list(range(10, 401, 10))),
        ({"num_steps": 5}, [1, 2, 3, 4, 5]),
    ],
)
def test_snapshots_are_stored_at_intervals_and_at_the_end(settings: dict[str, int], expected: list[int]) -> None:
    config = TrainingConfig(posthoc_ema=True, **settings)  # type: ignore[arg-type]
    assert [step for step in range(1, config.num_steps + 1) if is_snapshot_due(step, config)] == expected
    assert not any(is_snapshot_due(step, TrainingConfig(num_steps=5)) for step in range(1, 6))
