"""A training that pushes to the Hub while it runs does not depend on how the pushes go."""

import time
from pathlib import Path

import pytest

from ddpm_hf.cli.main import train
from ddpm_hf.config import HubConfig, parse_command_line
from ddpm_hf.hub import background
from ddpm_hf.hub.background import BackgroundPush
from ddpm_hf.training.trainer import Trainer
from tests.conftest import FINISHED_RUN, run_arguments
from tests.integration.conftest import SECRET
from tests.loopback_hub import LoopbackHub, files_of
from tests.saved_folders import make_pipeline

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

PUSHING = {"hub__push_to_hub": True, "hub__repo_id": "birds", "hub__push_every_steps": 4, "hub__license": "mit"}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.timeout(600)
def test_a_refused_push_is_reported_and_the_last_one_publishes_the_finished_model(
    hub: LoopbackHub,
    finished_run: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights are those of a run that pushes nothing, and the token is in no file of the run.

    The first process ends at once, as that of a refused push does; its imports would take longer than the training.
    """
    start = BackgroundPush.start

    def refused(self: BackgroundPush, folder: Path, step: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(background, "_PUSH", "raise SystemExit('error: you may not write to user/birds (403)')")
            start(self, folder, step)

    monkeypatch.setattr(BackgroundPush, "start", refused)
    assert train(run_arguments(tmp_path / "run", **FINISHED_RUN | PUSHING)) == 0
    printed = capfd.readouterr()
    assert "Will be pushed to user/birds." in printed.out + printed.err
    assert "The push of step 4 failed (error: you may not write to user/birds (403)" in caplog.text
    assert f"Pushed the finished run: {hub.endpoint}/user/birds" in printed.out + printed.err
    [upload] = hub.uploaded
    assert upload.message == "Push the finished run"
    published = hub.repositories["user/birds"].files()
    assert b'"step": 6' in published["training_summary.json"]
    assert published["samples/denoising.gif"] == (tmp_path / "run" / "denoising.gif").read_bytes()
    assert b"GAN-test accuracy" in published["README.md"]
    alone = (finished_run / "pipeline" / WEIGHTS).read_bytes()
    assert published[WEIGHTS] == (tmp_path / "run" / "pipeline" / WEIGHTS).read_bytes() == alone
    assert SECRET not in printed.out + printed.err + caplog.text
    assert SECRET.encode() not in hub.seen + b"".join(files_of(tmp_path).values())


def test_a_trainer_in_python_pushes_the_finished_run(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the command of the test above, which is printed here instead."""
    monkeypatch.setattr(background, "_PUSH", "import sys; print(*sys.argv[1:])")
    trainer = Trainer(parse_command_line(run_arguments(tmp_path / "run", **PUSHING))[0])
    assert hub.requests, "the Hub is asked before training"
    trainer.fit()
    trainer.folder.release()
    command = f"push {tmp_path / 'run'} birds --license mit --message Push the finished run"
    assert f"Pushed the finished run: {command}" in capfd.readouterr().out


def test_a_push_that_is_not_possible_is_reported_before_the_first_step(
    hub: LoopbackHub, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A license that is not valid, a token that may not write, a Hub that does not answer."""
    hub.repository("user/birds").commit({})
    assert train(run_arguments(tmp_path / "run", **PUSHING | {"hub__license": "MIT License"})) == 2
    assert "error: license is 'MIT License'; use an identifier" in capfd.readouterr().err
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", hub.reader_token)
    assert train(run_arguments(tmp_path / "run", **PUSHING)) == 2
    assert "error: you may not write to user/birds" in capfd.readouterr().err
    hub.fail("whoami", "cut", times=20)
    assert train(run_arguments(tmp_path / "run", **PUSHING)) == 1
    assert "error: the Hub could not be reached" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("waits", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_running_push_ends_with_the_training(
    hub: LoopbackHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, waits: bool
) -> None:
    """As after Ctrl-C, which the push does not receive itself; the temporary files that it made by then do not stay."""
    temporary = tmp_path / "hub" / "temporary"
    (temporary / "of a training that was killed").mkdir(parents=True)
    make_pipeline("plain").save_pretrained(tmp_path / "run" / "pipeline")
    with BackgroundPush(HubConfig(push_to_hub=True, repo_id="birds"), tmp_path / "hub") as pushing:
        pushing.start(tmp_path / "run", 7)
        assert list(temporary.iterdir()) == []
        if not waits:
            (temporary / "ddpm-hf-push-of-this-process").mkdir()
        while not list(temporary.glob("ddpm-hf-push-*")):
            assert not pushing.is_free()
            time.sleep(0.05)
    assert "The push of step 7 was stopped" in caplog.text
    assert pushing.is_free()
    assert hub.uploaded == []
    assert [path.name for path in (tmp_path / "hub").iterdir()] == ["push.log"]
    assert not list(tmp_path.rglob("ddpm-hf-push-*"))
