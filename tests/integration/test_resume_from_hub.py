"""A run whose machine is lost continues from the Hub with the same bits, and nothing on the Hub is ever half of it."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from ddpm_hf.cli.main import train
from ddpm_hf.config import parse_command_line
from ddpm_hf.hub import run_branch
from ddpm_hf.hub.access import HubFailed, HubRefused, Target
from ddpm_hf.hub.background import CheckpointPush
from ddpm_hf.model_folder import verify_checkpoint
from tests.conftest import run_arguments
from tests.integration.conftest import SECRET
from tests.loopback_hub import LoopbackHub, files_of
from tests.runs import assert_same_run, at_step

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SETTINGS: dict[str, object] = {
    "training__num_steps": 4,
    "training__posthoc_ema": True,
    "training__posthoc_ema_every_steps": 2,
    "preview__every_steps": 2,
    "preview__num_images": 4,
    "preview__num_inference_steps": 2,
}
ON_HUB = SETTINGS | {"training__resume_from_hub": True, "hub__repo_id": "digits"}
REPOSITORY, BRANCH = "user/digits", "checkpoints"


class MachineLost(Exception):
    pass


def lose_machine() -> None:
    raise MachineLost


def push_here(self: CheckpointPush, code: str, arguments: Sequence[str], what: str) -> None:
    """Push in this process, and before training goes on, so that the test knows what is on the Hub."""
    exit_code = run_branch.main(arguments)
    self._process = SimpleNamespace(returncode=exit_code, poll=lambda: exit_code, wait=lambda: exit_code)  # type: ignore[assignment]
    self._what = what


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to. Read only."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(run_arguments(run, **SETTINGS)) == 0
    return run


@pytest.fixture
def staged(whole_run: Path, tmp_path: Path) -> dict[int, Path]:
    """What is pushed of a run at steps 2 and 4."""
    folders = {step: tmp_path / f"staged_{step}" for step in (2, 4)}
    for step, folder in folders.items():
        run_branch.stage(whole_run, [f"step_{step:08d}"], folder)
    return folders


def target(branch: str = BRANCH) -> Target:
    return Target(repo_id=REPOSITORY, branch=branch)


def steps_on(hub: LoopbackHub) -> set[str]:
    files = hub.repositories[REPOSITORY].files(BRANCH)
    return {name.split("/")[1] for name in files if name.startswith("checkpoints/")}


def test_a_run_on_another_machine_continues_bit_identically(
    hub: LoopbackHub, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints, metrics, previews and EMA snapshots are those of a run that nothing happened to.

    The folder is lost in step 4, when the Hub has step 2. The repository also holds a model on its main branch. The
    last push is made by the process of a real run.
    """
    hub.repository(REPOSITORY).commit({"README.md": b"a model"})
    arguments = run_arguments(tmp_path / "run", **ON_HUB)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointPush, "_start", push_here)
        at_step(4, lose_machine, patch)
        with pytest.raises(MachineLost):
            train(arguments)
    shutil.rmtree(tmp_path / "run")
    assert steps_on(hub) == {"step_00000002"}

    assert train([*arguments, "--dry_run"]) == 0
    assert not (tmp_path / "run").exists(), "a dry run downloads nothing"
    assert train(arguments) == 0
    assert_same_run(whole_run, tmp_path / "run", 4)
    for folder in ("previews", "ema_snapshots", "pipeline/unet"):
        assert files_of(tmp_path / "run" / folder) == files_of(whole_run / folder)
    assert steps_on(hub) == {"step_00000004"}
    assert hub.repositories[REPOSITORY].files() == {"README.md": b"a model"}
    assert len(hub.repositories[REPOSITORY].commits) == 2, "the history of the branch is squashed"
    assert SECRET.encode() not in hub.seen


@pytest.mark.parametrize("how", [500, "lost"])
def test_an_interrupted_push_leaves_the_checkpoint_before_or_the_new_one(
    hub: LoopbackHub, staged: dict[int, Path], tmp_path: Path, how: "int | str"
) -> None:
    run_branch.upload(staged[2], target())
    hub.fail(rf"POST .*/commit/{BRANCH}", how, times=20)  # type: ignore[arg-type]
    with pytest.raises(HubFailed, match="holds this checkpoint or the one before"):
        run_branch.upload(staged[4], target())
    hub.end_failures()
    remote = run_branch.find_remote(target())
    assert remote is not None
    assert remote.checkpoints == ("step_00000004" if how == "lost" else "step_00000002",)
    run_branch.download(remote, tmp_path)
    verify_checkpoint(tmp_path / "checkpoints" / remote.checkpoints[0])


@pytest.mark.parametrize("how", [500, "lost"])
def test_a_checkpoint_is_pushed_even_if_its_history_cannot_be_squashed(
    hub: LoopbackHub, staged: dict[int, Path], capsys: pytest.CaptureFixture[str], how: "int | str"
) -> None:
    hub.fail("POST .*/super-squash/", how, times=20)  # type: ignore[arg-type]
    assert run_branch.main([str(staged[2]), REPOSITORY, BRANCH, "public"]) == 0
    assert "The history of checkpoints was not squashed" in capsys.readouterr().out
    assert steps_on(hub) == {"step_00000002"}


def test_a_branch_with_something_else_and_a_later_step_are_left_untouched(
    hub: LoopbackHub, staged: dict[int, Path]
) -> None:
    hub.repository(REPOSITORY).commit({"notes.txt": b"mine"}, "notes")
    hub.repository(REPOSITORY).commit({"README.md": b"a model"})
    with pytest.raises(HubRefused, match="branch notes of user/digits holds something else than a run"):
        run_branch.upload(staged[2], target("notes"))
    run_branch.upload(staged[4], target())
    with pytest.raises(HubRefused, match="already holds step 4, so another machine has continued the run"):
        run_branch.upload(staged[2], target())
    assert hub.repositories[REPOSITORY].files("notes") == {"notes.txt": b"mine"}
    assert steps_on(hub) == {"step_00000004"}


def test_a_run_with_other_settings_or_without_resume_is_refused(
    hub: LoopbackHub, staged: dict[int, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_branch.upload(staged[2], target())
    changes = ON_HUB | {"training__seed": 3}
    assert train(run_arguments(tmp_path / "run", **changes)) == 2
    assert "holds a run with other settings (training.seed was 0, is 3)" in capfd.readouterr().err
    assert train(run_arguments(tmp_path / "run", **ON_HUB, training__resume="none")) == 2
    assert "set training.resume to auto to continue it, or hub.checkpoint_branch to" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_download_that_fails_leaves_the_run_folder_as_it_was(
    hub: LoopbackHub, staged: dict[int, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A connection that ends, then a checkpoint that is damaged on the Hub."""
    run_branch.upload(staged[2], target())
    arguments = run_arguments(tmp_path / "run", **ON_HUB)
    hub.fail("GET .*/ema/diffusion_pytorch_model.safetensors", 500, times=50)
    assert train(arguments) == 1
    assert "the Hub had an error" in capfd.readouterr().err
    hub.end_failures()
    files = hub.repositories[REPOSITORY].files(BRANCH)
    files["checkpoints/step_00000002/trainer_state.json"] += b" "
    assert train(arguments) == 2
    assert "trainer_state.json is damaged" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_ahead_or_of_another_run_is_not_replaced(
    hub: LoopbackHub, staged: dict[int, Path], whole_run: Path, tmp_path: Path
) -> None:
    remotes = {}
    for step, folder in staged.items():
        run_branch.upload(folder, target())
        remotes[step] = run_branch.find_remote(target())
    early, late = remotes[2], remotes[4]
    assert early is not None
    assert late is not None
    configs = {seed: parse_command_line(run_arguments(tmp_path, **ON_HUB, training__seed=seed))[0] for seed in (0, 3)}
    assert not run_branch.is_ahead(early, whole_run, configs[0]), "it is at step 4"
    assert run_branch.is_ahead(early, tmp_path, configs[0])
    shutil.copytree(whole_run / "checkpoints" / "step_00000002", tmp_path / "checkpoints" / "step_00000002")
    assert run_branch.is_ahead(late, tmp_path, configs[0])
    assert not run_branch.is_ahead(late, tmp_path, configs[3]), "its settings are those of another run"
