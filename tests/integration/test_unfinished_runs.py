"""A run that was stopped is a model: commands and Python load its newest checkpoint with the settings of the run."""

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from ddpm_hf.cli.main import main
from ddpm_hf.config import ConfigError, ModelConfig
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler, pipeline
from ddpm_hf.model_folder import find_model, verify_checkpoint
from ddpm_hf.models import load_model, load_pretrained, save_second_moments
from tests import version_0_1
from tests.conftest import DIGITS, run_arguments, tiny_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"
STEP = "checkpoints/step_00000004"
EVERYTHING: dict[str, Any] = {
    "training__num_steps": 4,
    "diffusion__num_train_timesteps": 60,
    "diffusion__beta_schedule": "jsd",
    "diffusion__prediction_type": "sample",
    "diffusion__clip_sample": False,
    "objective__class_dropout": 0.2,
    "objective__self_conditioning": 0.5,
    "training__posthoc_ema": True,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in which everything that a pipeline holds differs from its default."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", *run_arguments(run, **EVERYTHING)]) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The same run, stopped before it saved its pipeline."""
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(copy / "pipeline")
    shutil.rmtree(copy / "ema_snapshots")
    return copy


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of version 0.1 that stopped after step 3 of 6, beside its data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copy(DIGITS, tmp_path / "data")
    return Path(shutil.copytree(version_0_1.RUN, tmp_path / "run"))


def configs(loaded: GaussianDiffusionPipeline) -> list[dict[str, Any]]:
    """Return the settings of a pipeline and its parts, without notes such as where it was loaded from."""
    parts = (loaded.config, loaded.scheduler.config, loaded.unet.config)
    return [{name: value for name, value in part.items() if not name.startswith("_")} for part in parts]


def test_a_checkpoint_is_the_pipeline_that_the_run_saves(finished: Path, run: Path) -> None:
    """The last checkpoint and the finished pipeline hold the same model."""
    expected = GaussianDiffusionPipeline.from_pretrained(finished / "pipeline")
    assert expected.config.self_conditioned and expected.config.has_null_label
    for path in (str(run), run / "checkpoints", f"{run / STEP}/", run / STEP / "ema"):
        loaded = GaussianDiffusionPipeline.from_pretrained(path)
        assert configs(loaded) == configs(expected)
        for name, weight in expected.unet.state_dict().items():
            assert torch.equal(loaded.unet.state_dict()[name], weight)
        assert loaded.unet.config._name_or_path == str(run / STEP / "ema")


@pytest.mark.parametrize("network", ["unet", "ema_sigma_0.050"])
def test_another_network_of_a_checkpoint_is_loaded_by_its_path_or_as_subfolder(run: Path, network: str) -> None:
    expected = load_file(run / STEP / network / WEIGHTS)["conv_in.weight"]
    for loaded in (
        GaussianDiffusionPipeline.from_pretrained(run / STEP / network),
        GaussianDiffusionPipeline.from_pretrained(run / STEP, subfolder=network),
        GaussianDiffusionPipeline.from_pretrained(run, subfolder=f"{STEP}/{network}"),
    ):
        assert torch.equal(loaded.unet.conv_in.weight, expected)
    assert not torch.equal(expected, load_file(run / STEP / "ema" / WEIGHTS)["conv_in.weight"])


def test_keyword_arguments_mean_for_a_checkpoint_what_they_mean_for_a_pipeline(run: Path) -> None:
    load = GaussianDiffusionPipeline.from_pretrained
    assert load(run, torch_dtype=torch.float16).unet.dtype == load(run, dtype=torch.float16).unet.dtype == torch.float16
    unet = tiny_unet(11, self_conditioned=True)
    loaded = load(run, unet=unet, scheduler=DDIMScheduler(num_train_timesteps=7), class_names=None)
    assert loaded.unet is unet and len(loaded.scheduler) == 7 and "class_names" not in loaded.config
    assert load(run, device_map="cpu").hf_device_map == "cpu"
    with pytest.raises(ValueError, match="`variant=fp16`, but no such modeling files are available"):
        load(run, variant="fp16")
    with pytest.raises(ValueError, match=r"subfolder is 'x', but user/model is not a local folder"):
        load("user/model", subfolder="x")
    with pytest.raises(ConfigError, match="a/b/c is neither a local folder nor a valid repository id"):
        load("a/b/c")


def test_a_pipeline_of_a_checkpoint_is_saved_as_any_other(finished: Path, run: Path, tmp_path: Path) -> None:
    GaussianDiffusionPipeline.from_pretrained(run).save_pretrained(tmp_path / "saved")
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", f"unet/{WEIGHTS}"):
        assert (tmp_path / "saved" / name).read_bytes() == (finished / "pipeline" / name).read_bytes()


def test_a_checkpoint_of_version_0_1_has_the_settings_and_names_of_its_run(
    stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its checkpoints hold no class names; the run stored them with an EMA snapshot."""
    loaded = GaussianDiffusionPipeline.from_pretrained(stopped)
    expected = GaussianDiffusionPipeline.from_pretrained(version_0_1.SAVED)
    assert configs(loaded) == configs(expected)
    shutil.rmtree(stopped / "ema_snapshots")
    loaded = GaussianDiffusionPipeline.from_pretrained(stopped)
    assert "class_names" not in loaded.config and loaded.num_classes == 10
    assert caplog.messages[-1].endswith("does not hold the names of its 10 classes; give labels as numbers.")


def test_the_core_uses_the_package_only_for_folders_of_runs(
    finished: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code in a saved folder must run without ddpm_hf, so nothing else of it may be needed."""
    imported: list[str] = []
    monkeypatch.setattr(pipeline, "import_module", lambda name: imported.append(name) or importlib.import_module(name))
    GaussianDiffusionPipeline.from_pretrained(finished / "pipeline")
    assert imported == []
    GaussianDiffusionPipeline.from_pretrained(run)
    assert imported == ["ddpm_hf.models"]
    monkeypatch.setattr(pipeline, "__package__", "diffusers_modules.local")
    with pytest.raises(OSError, match="model_index"):
        GaussianDiffusionPipeline.from_pretrained(run)
    assert imported == ["ddpm_hf.models"]


def test_a_stopped_run_is_sampled_evaluated_and_stays_resumable(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampling = ["--num_images", "2", "--num_inference_steps", "2", "--overwrite"]
    flags = ["--data", "data/digits.parquet", "--metrics", "bits_per_dim", "--num_terms", "2", "--num_images", "8"]
    flags += ["--num_samples", "2", "--num_inference_steps", "2", "--estimate_variance", "1", "--cpu"]
    assert main(["sample", "run", *sampling]) == 0
    assert json.loads(Path("samples/settings.json").read_text())["step"] == 3
    assert main(["evaluate", "run", *flags]) == 0
    assert "Validation set of the run (config.yaml): --data.validation_fraction 0.1" in capsys.readouterr().out
    evaluation = stopped / "evaluations" / "step_00000003"
    assert {path.name for path in evaluation.iterdir()} >= {"evaluation.json", "evaluation.png"}
    assert main(["sample", "run", *sampling, "--variance", "analytic"]) == 0
    assert main(["verify", "run"]) == 0
    assert "step_00000003 holds the checkpoint of step 3 that was saved." in capsys.readouterr().out
    verify_checkpoint(stopped / "checkpoints" / "step_00000003")


def test_second_moments_of_other_weights_are_not_used(stopped: Path) -> None:
    model = find_model(stopped)
    scheduler = GaussianDiffusionScheduler(20)
    scheduler.eps_second_moments = torch.linspace(0, 1, 20)
    file = save_second_moments(model, scheduler)
    loaded = GaussianDiffusionPipeline.from_pretrained(stopped)
    assert torch.equal(loaded.scheduler.eps_second_moments, torch.linspace(0, 1, 20).double())
    assert GaussianDiffusionPipeline.from_pretrained(model.path / "unet").scheduler.eps_second_moments is None
    file.write_text(json.dumps(json.loads(file.read_text()) | {"weights_sha256": "0"}))
    assert GaussianDiffusionPipeline.from_pretrained(stopped).scheduler.eps_second_moments is None


def test_second_moments_of_a_pipeline_hold_for_the_checkpoint_with_its_weights(stopped: Path) -> None:
    ema = stopped / "checkpoints" / "step_00000003" / "ema" / WEIGHTS
    (stopped / "pipeline" / "scheduler").mkdir(parents=True)
    (stopped / "pipeline" / "unet").mkdir()
    shutil.copy(ema, stopped / "pipeline" / "unet")
    moments = {"eps_second_moments": [0.5] * 20}
    (stopped / "pipeline" / "scheduler" / "reverse_variance.json").write_text(json.dumps(moments))
    loaded = GaussianDiffusionPipeline.from_pretrained(ema.parent)
    assert loaded.scheduler.eps_second_moments is not None
    shutil.copy(ema.parents[1] / "unet" / WEIGHTS, stopped / "pipeline" / "unet")
    assert GaussianDiffusionPipeline.from_pretrained(ema.parent).scheduler.eps_second_moments is None


def test_a_checkpoint_that_training_removes_before_it_is_loaded_is_reported(stopped: Path) -> None:
    model = find_model(stopped)
    shutil.rmtree(model.path)
    with pytest.raises(ConfigError, match="step_00000003 was removed, as training does with old checkpoints; run the"):
        load_model(model, GaussianDiffusionPipeline.from_pretrained)


def test_verify_reports_every_damaged_checkpoint(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stopped / "checkpoints" / "step_00000003" / "ema" / WEIGHTS).write_bytes(b"x")
    for path in ("run", "run/checkpoints/step_00000003/unet"):
        assert main(["verify", path]) == 1
        out = capsys.readouterr().out
        assert "run/checkpoints/step_00000003 is NOT the checkpoint that was saved: ema/diffusion_pytorch_model" in out
    assert main(["verify", "run", "--write"]) == 2
    assert "--write needs the folder of a pipeline, but run is a run that is not finished" in capsys.readouterr().err


def test_pretrained_weights_of_a_run_bring_its_process_and_classes(run: Path) -> None:
    for path in (run, run / STEP, run / STEP / "ema"):
        pretrained = load_pretrained(ModelConfig(preset=None, from_pretrained=str(path)))
        assert pretrained.scheduler is not None
        assert pretrained.scheduler.config.prediction_type == "sample" and len(pretrained.scheduler) == 60
        assert pretrained.has_null_label and pretrained.class_names == {str(label): str(label) for label in range(10)}
        assert torch.equal(pretrained.unet.conv_in.weight, load_file(run / STEP / "ema" / WEIGHTS)["conv_in.weight"])


def test_fine_tuning_a_checkpoint_for_another_prediction_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = EVERYTHING | {"model__from_pretrained": run / STEP, "diffusion__prediction_type": "epsilon"}
    del changes["diffusion__beta_schedule"]
    changes |= {"model__preset": None, "model__overrides": {}}
    assert main(["train", *run_arguments(tmp_path / "new", **changes)]) == 2
    assert "predicts sample, but diffusion.prediction_type is epsilon; set it to sample" in capsys.readouterr().err


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Do not draw samples, which takes most of the time of a push."""
    from ddpm_hf.hub import push

    monkeypatch.setattr(push, "_draw_samples", lambda *_: None)
    yield


@pytest.mark.parametrize(("path", "weights"), [("run", "EMA weights"), (f"run/{STEP[:-1]}3/unet", "weights of `unet`")])
def test_the_card_of_a_run_that_is_not_finished_says_so(
    stopped: Path, pictures: None, path: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddpm_hf.hub import card, push

    cards: list[str] = []
    make_card = card.make_card

    def noted(folder: Path, **options: Any) -> card.Card:
        made = make_card(folder, **options)
        cards.append(made.text)
        return made

    monkeypatch.setattr(card, "make_card", noted)
    pushed = push.push(path, push.Target(repo_id="user/digits"), dry_run=True)
    assert {"training_config.yaml", "training_summary.json", "samples/loss.png"} <= pushed.sizes.keys()
    sentence = f"**The training run has not reached its last step**: these are the {weights} of step 3 of 6."
    assert sentence in cards[0]
    assert "| Training steps | 3 of 6 |" in cards[0]
