"""Run folders and saved folders of version 0.1 keep working."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddpm_hf.cli.main import ema, train, verify
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.hub.publish import publish
from ddpm_hf.hub.push import Target
from ddpm_hf.training.trainer import Trainer
from tests import version_0_1
from tests.conftest import DIGITS
from tests.runs import metrics_of

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def continued_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of 0.1, continued to step 6."""
    folder = tmp_path_factory.mktemp("earlier")
    shutil.copytree(version_0_1.RUN, folder / "run")
    (folder / "data").mkdir()
    shutil.copy(DIGITS, folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train(["--config", "run/config.yaml"]) == 0
    return folder / "run"


def test_a_run_of_0_1_continues_as_0_1_continued_it(continued_run: Path) -> None:
    """To 1e-5, since processors round differently; on the processor that made the fixture the two are identical."""
    expected = load_file(version_0_1.SAVED / WEIGHTS)
    actual = load_file(continued_run / "pipeline" / WEIGHTS)
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    (continued_run / "expected").mkdir(exist_ok=True)
    shutil.copy(version_0_1.METRICS, continued_run / "expected" / "metrics.jsonl")
    for row, expected_row in zip(metrics_of(continued_run), metrics_of(continued_run / "expected"), strict=True):
        assert row.keys() == expected_row.keys()
        for name, value in expected_row.items():
            assert row[name] == (value if value is None else pytest.approx(value, rel=1e-4)), name


def test_the_stored_averages_of_0_1_can_be_combined(continued_run: Path, tmp_path: Path) -> None:
    assert ema([str(continued_run), "--length", "0.07", "--output", str(tmp_path / "pipeline")]) == 0
    assert GaussianDiffusionPipeline.from_pretrained(tmp_path / "pipeline").unet.num_parameters() == 11797


def test_a_saved_folder_of_0_1_verifies(tmp_path: Path) -> None:
    folder = shutil.copytree(version_0_1.SAVED, tmp_path / "pipeline")
    assert verify([str(folder)]) == 0


def test_former_names_still_work_with_a_warning(continued_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    monkeypatch.setattr("ddpm_hf.hub.publish.push", lambda *arguments, **options: pushed.append((arguments, options)))
    with pytest.warns(DeprecationWarning, match=r"ddpm_hf\.hub\.push\.push"):
        publish(continued_run / "pipeline", Target(repo_id="user/model"), run=continued_run, license="mit", fp16=True)
    assert pushed == [((continued_run, Target(repo_id="user/model", license="mit")), {"fp16": True})]
    shut_down = []
    monkeypatch.setattr(Trainer, "shutdown", lambda trainer: shut_down.append(trainer))
    trainer = Trainer.__new__(Trainer)
    with pytest.warns(DeprecationWarning, match=r"Trainer\.shutdown"):
        trainer.leave_the_others()
    assert shut_down == [trainer]
