"""`ddpm-hf timesteps` stores lists with the model, and commands use them by name."""

import json
import shutil
from pathlib import Path

import pytest

from ddpm_hf.cli.main import main
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation import timesteps
from ddpm_hf.model_folder import find_model
from ddpm_hf.models import save_optimized_timesteps

SMALL = ["--num_images", "2"]
UNIPC = "UniPCMultistepScheduler"


@pytest.fixture
def folder(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny pipeline in the working directory, with few candidates."""
    monkeypatch.setattr(timesteps, "NUM_CANDIDATES", 11)
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))


def test_the_lists_are_stored_and_used_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By `sample` with the sampler that they are for, and by `evaluate`; other lists are kept, and `verify` agrees."""
    assert main(["verify", "model", "--write"]) == 0
    assert main(["timesteps", "model", "--steps", "2", "--scheduler", "ddim", *SMALL]) == 0
    assert main(["timesteps", "model", "--steps", "3", *SMALL]) == 0
    assert "UniPCMultistepScheduler in 3 steps: [999, " in capsys.readouterr().out
    stored = json.loads((folder / "model_index.json").read_text())["optimized_timesteps"]
    assert {sampler: list(lists) for sampler, lists in stored.items()} == {
        "GaussianDiffusionScheduler(eta=0)": ["2"],
        UNIPC: ["3"],
    }
    assert main(["verify", "model"]) == 0
    for flags, sampler, number in (([], UNIPC, "3"), (["--eta", "0"], "GaussianDiffusionScheduler(eta=0)", "2")):
        words = ["--num_images", "1", "--timestep_spacing", "optimized", "--overwrite", *flags]
        assert main(["sample", "model", *words]) == 0
        settings = json.loads(Path("samples/settings.json").read_text())
        assert settings["timesteps"] == stored[sampler][number]
        assert (settings["scheduler"], settings["num_inference_steps"]) == (sampler.partition("(")[0], int(number))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--steps", "3", "--scheduler", "ddpm"], "which draws noise in each step"),
        (["--steps", "3", "--scheduler", "pndm"], "PNDMScheduler takes no timesteps"),
        (["--steps", "6"], "timesteps are chosen for at most 5 steps"),
        (["--steps", "3", "--guidance_scale", "2"], "no null label to guide against"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_the_network_is_called(
    folder: Path, flags: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timesteps, "follow_trajectories", None)
    before = (folder / "model_index.json").read_bytes()
    assert main(["timesteps", "model", *flags, *SMALL]) == 2
    assert sentence in capsys.readouterr().err
    assert (folder / "model_index.json").read_bytes() == before


def test_the_lists_of_a_checkpoint_are_kept_in_its_run(finished_run: Path, tmp_path: Path) -> None:
    """They are not used for other weights."""
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    newest = find_model(run / "checkpoints" / "step_00000006")
    file = save_optimized_timesteps(newest, UNIPC, {2: [9, 4]})
    save_optimized_timesteps(newest, UNIPC, {10: [*range(9, -1, -1)], 2: [9, 5]})
    assert file.parent == run / "evaluations" / "step_00000006"
    loaded = GaussianDiffusionPipeline.from_pretrained(newest.path)
    assert loaded.config["optimized_timesteps"] == {UNIPC: {"2": [9, 5], "10": [*range(9, -1, -1)]}}
    other = find_model(run / "checkpoints" / "step_00000006" / "unet")
    assert GaussianDiffusionPipeline.from_pretrained(other.weights).config.get("optimized_timesteps") is None
    file.write_text(file.read_text().replace('"weights_sha256": "', '"weights_sha256": "0'))
    assert GaussianDiffusionPipeline.from_pretrained(newest.path).config.get("optimized_timesteps") is None
