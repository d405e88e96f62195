"""`ddpm-hf distill`: students are runs, and their folders load and sample with diffusers alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DModel
from huggingface_hub import constants

from ddpm_hf.cli.main import main
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from tests.conftest import TINY_RUN, tiny_unet
from tests.loopback_hub import LoopbackHub
from tests.runs import assert_same_run, stop_with_signal_after

TRAINING = [
    *("--training.num_steps", "4", "--training.checkpoint_every_steps", "2", "--training.validate_every_steps", "0"),
    *("--preview.every_steps", "0", "--evaluation.num_samples", "0"),
]


@pytest.fixture(scope="module")
def students(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The students of 4 and 2 steps of the tiny run. Read only."""
    output = tmp_path_factory.mktemp("runs") / "students"
    assert main(["distill", str(finished_run), "--steps", "4,2", "--output", str(output), *TRAINING]) == 0
    return output


def sample_alone(folder: Path, steps: int, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sample with the classes of diffusers."""
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(steps)
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


def test_a_student_says_its_steps_and_is_sampled_in_them(students: Path, tmp_path: Path) -> None:
    """Without a number of steps, in Python and on the command line; the images are those of diffusers alone."""
    noise, labels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
    for steps in (4, 2):
        folder = students / f"steps_{steps}" / "pipeline"
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert (config["_class_name"], config["default_num_inference_steps"]) == ("DDIMScheduler", steps)
        assert (config["clip_sample"], config["timestep_spacing"], config["set_alpha_to_one"]) == (
            False,
            "trailing",
            True,
        )
        summary = json.loads((folder / "training_summary.json").read_text())
        assert summary["distillation"]["num_inference_steps"] == steps
        for model in (students / f"steps_{steps}", students / f"steps_{steps}/checkpoints/step_00000004"):
            pipe = GaussianDiffusionPipeline.from_pretrained(model)
            pipe.set_progress_bar_config(disable=True)
            found = pipe(sample=noise, class_labels=labels, output_type="pt").images
            torch.testing.assert_close(found, sample_alone(folder, steps, noise, labels), rtol=0, atol=1e-6)
            assert len(pipe.scheduler.timesteps) == steps
        pipe.scheduler.register_to_config(default_num_inference_steps=2000)
        with pytest.raises(ValueError, match="num_inference_steps 2000 is not between 1 and 1000"):
            pipe.check_inputs(class_labels=0)
        pipe.scheduler.register_to_config(default_num_inference_steps=steps)
        with pytest.warns(UserWarning, match=f"has learned {steps} steps only"):
            pipe.check_inputs(class_labels=0, num_inference_steps=8)
        assert main(["sample", str(folder), "--num_images", "2", "--output", str(tmp_path / str(steps))]) == 0
        settings = json.loads((tmp_path / str(steps) / "settings.json").read_text())
        assert (settings["num_inference_steps"], settings["scheduler"]) == (steps, "DDIMScheduler")
        assert main(["verify", str(folder)]) == 0


def test_a_student_starts_from_its_teacher_and_has_its_data(students: Path, finished_run: Path) -> None:
    """The second student's teacher is the first; a repository of the teacher is not that of its students."""
    first, second = (yaml.safe_load((students / f"steps_{steps}" / "config.yaml").read_text()) for steps in (4, 2))
    assert first["distillation"]["teacher"] == first["model"]["from_pretrained"] == str(finished_run)
    assert second["distillation"]["teacher"] == str(students / "steps_4")
    teacher = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert first["data"] == second["data"] == teacher["data"]
    assert first["training"]["learning_rate"] == 0.5 * teacher["training"]["learning_rate"]


def test_a_stopped_student_continues_bit_by_bit_with_the_same_teacher(
    students: Path,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = tmp_path / "teacher"
    shutil.copytree(finished_run / "pipeline", teacher)
    command = ["distill", "teacher", "--steps", "4", "--output", "new", *TRAINING]
    with monkeypatch.context() as patch:
        stop_with_signal_after(3, patch)
        assert main(command) == 143
    shutil.move(teacher / "unet", tmp_path / "unet")
    shutil.copytree(students / "steps_2" / "pipeline" / "unet", teacher / "unet")
    capsys.readouterr()
    assert main(command) == 2
    assert "other weights than when this run began" in capsys.readouterr().err
    shutil.rmtree(teacher / "unet")
    shutil.move(tmp_path / "unet", teacher / "unet")
    assert main(command) == 0
    assert_same_run(students / "steps_4", tmp_path / "new" / "steps_4", 4)


def test_an_unconditional_student_loads_as_a_stock_pipeline(tmp_path: Path) -> None:
    """Its teacher is a folder without the settings of a run, which come from flags and from its scheduler."""
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path / "teacher")
    given = ["--data.num_channels", "1", "--training.train_batch_size", "8", "--data.source", TINY_RUN["data.source"]]
    output = tmp_path / "students"
    assert main(["distill", str(tmp_path / "teacher"), "--steps", "1", "--output", str(output), *TRAINING, *given]) == 0
    folder = output / "steps_1" / "pipeline"
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    images = []
    for kind in (DiffusionPipeline, DDIMPipeline, GaussianDiffusionPipeline):
        pipe = kind.from_pretrained(folder, use_safetensors=True)
        pipe.set_progress_bar_config(disable=True)
        options: dict[str, Any] = {} if kind is GaussianDiffusionPipeline else {"num_inference_steps": 1}
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(batch_size=1, generator=generator, output_type="np", **options).images)
    np.testing.assert_allclose(images, [images[0]] * 3, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "8,3"], "after 8 comes 4"),
        (["--steps", "3,1"], "3 is odd"),
        (["--steps", "none"], "separated by commas"),
        (["--training.output_dir", "x"], "set --output"),
        (["--guidance_scale", "2"], "needs a teacher that was also trained without labels"),
        (["--steps", "512"], "needs 1024 steps of the teacher"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml does not exist"),
    ],
)
def test_what_cannot_be_distilled_is_one_sentence(
    words: list[str], message: str, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distill", str(finished_run), "--output", str(tmp_path / "x"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert not (tmp_path / "x").exists()


def test_a_teacher_may_be_a_repository(
    finished_run: Path, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings name the data without their folder, so these are given; students lie in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert main(["push", str(finished_run), "user/digits", "--license", "mit"]) == 0
    given = [*TRAINING, "--data.source", TINY_RUN["data.source"]]
    assert main(["distill", "user/digits", "--steps", "1", *given]) == 0
    summary = json.loads((tmp_path / "digits_distilled/steps_1/pipeline/training_summary.json").read_text())
    assert summary["base_model"] == summary["distillation"]["teacher"] == "user/digits"
