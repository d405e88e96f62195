"""A run whose machine is lost continues from the Hub with the same bits, and nothing on the Hub is ever half of it."""

import shutil
from pathlib import Path

import pytest

from ddpm_hf.cli.main import train
from ddpm_hf.config import parse_command_line
from ddpm_hf.hub import run_branch
from ddpm_hf.hub.access import HubFailed, HubRefused, Target
from ddpm_hf.hub.background import CheckpointPush
from ddpm_hf.model_folder import verify_checkpoint
from tests.conftest import FINISHED_RUN, run_arguments
from tests.integration.conftest import SECRET
from tests.loopback_hub import LoopbackHub, files_of
from tests.runs import assert_same_run, at_step

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ON_HUB: dict[str, object] = {"training__resume_from_hub": True, "hub__repo_id": "digits"}
RESUMED = FINISHED_RUN | ON_HUB | {"training__checkpoint_every_steps": 4, "evaluation__num_samples": 0}
REPOSITORY, BRANCH = "user/digits", "checkpoints"


class MachineLost(Exception):
    pass


def lose_machine() -> None:
    raise MachineLost


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training waits for each push of a checkpoint, so that the test knows what is on the Hub."""
    start = CheckpointPush.start

    def start_and_wait(self: CheckpointPush, *arguments: object) -> None:
        start(self, *arguments)  # type: ignore[arg-type]
        self._wait()

    monkeypatch.setattr(CheckpointPush, "start", start_and_wait)


@pytest.fixture
def staged(finished_run: Path, tmp_path: Path) -> dict[int, Path]:
    """What is pushed of a run at steps 4 and 6."""
    folders = {step: tmp_path / f"staged_{step}" for step in (4, 6)}
    for step, folder in folders.items():
        run_branch.stage(finished_run, [f"step_{step:08d}"], folder)
    return folders


def target(branch: str = BRANCH) -> Target:
    return Target(repo_id=REPOSITORY, branch=branch)


def steps_on(hub: LoopbackHub) -> set[str]:
    files = hub.repositories[REPOSITORY].files(BRANCH)
    return {name.split("/")[1] for name in files if name.startswith("checkpoints/")}


@pytest.mark.usefixtures("waiting")
def test_a_run_on_another_machine_continues_bit_identically(
    hub: LoopbackHub, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints, metrics, previews and EMA snapshots are those of a run that nothing happened to.

    The folder is lost in step 6, when the Hub has step 4. The repository also holds a model on its main branch.
    """
    hub.repository(REPOSITORY).commit({"README.md": b"a model"})
    arguments = run_arguments(tmp_path / "run", **RESUMED)
    with monkeypatch.context() as patch:
        at_step(6, lose_machine, patch)
        with pytest.raises(MachineLost):
            train(arguments)
    shutil.rmtree(tmp_path / "run")
    assert steps_on(hub) == {"step_00000004"}

    assert train([*arguments, "--dry_run"]) == 0
    assert not (tmp_path / "run").exists(), "a dry run downloads nothing"
    assert train(arguments) == 0
    assert_same_run(finished_run, tmp_path / "run", 6)
    for folder in ("previews", "ema_snapshots", "pipeline/unet"):
        assert files_of(tmp_path / "run" / folder) == files_of(finished_run / folder)
    assert steps_on(hub) == {"step_00000006"}
    assert hub.repositories[REPOSITORY].files() == {"README.md": b"a model"}
    assert len(hub.repositories[REPOSITORY].commits) == 2, "the history of the branch is squashed"
    assert SECRET.encode() not in hub.seen


@pytest.mark.parametrize("how", [500, "lost"])
def test_an_interrupted_push_leaves_the_checkpoint_before_or_the_new_one(
    hub: LoopbackHub, staged: dict[int, Path], tmp_path: Path, how: "int | str"
) -> None:
    run_branch.upload(staged[4], target())
    hub.fail(rf"POST .*/commit/{BRANCH}", how, times=20)  # type: ignore[arg-type]
    with pytest.raises(HubFailed, match="holds this checkpoint or the one before"):
        run_branch.upload(staged[6], target())
    hub.end_failures()
    remote = run_branch.find_remote(target())
    assert remote is not None
    assert remote.checkpoints == ("step_00000006" if how == "lost" else "step_00000004",)
    run_branch.download(remote, tmp_path)
    verify_checkpoint(tmp_path / "checkpoints" / remote.checkpoints[0])


def test_a_branch_with_something_else_and_a_later_step_are_left_untouched(
    hub: LoopbackHub, staged: dict[int, Path]
) -> None:
    hub.repository(REPOSITORY).commit({"notes.txt": b"mine"}, "notes")
    hub.repository(REPOSITORY).commit({"README.md": b"a model"})
    with pytest.raises(HubRefused, match="branch notes of user/digits holds something else than a run"):
        run_branch.upload(staged[4], target("notes"))
    run_branch.upload(staged[6], target())
    with pytest.raises(HubRefused, match="already holds step 6, so another machine has continued the run"):
        run_branch.upload(staged[4], target())
    assert hub.repositories[REPOSITORY].files("notes") == {"notes.txt": b"mine"}
    assert steps_on(hub) == {"step_00000006"}


def test_a_run_with_other_settings_or_without_resume_is_refused(
    hub: LoopbackHub, staged: dict[int, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_branch.upload(staged[4], target())
    changes = RESUMED | {"training__seed": 3}
    assert train(run_arguments(tmp_path / "run", **changes)) == 2
    assert "holds a run with other settings (training.seed was 0, is 3)" in capfd.readouterr().err
    assert train(run_arguments(tmp_path / "run", **RESUMED, training__resume="none")) == 2
    assert "set training.resume to auto to continue it, or hub.checkpoint_branch to" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_download_that_fails_leaves_the_run_folder_as_it_was(
    hub: LoopbackHub, staged: dict[int, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A connection that ends, then a checkpoint that is damaged on the Hub."""
    run_branch.upload(staged[4], target())
    arguments = run_arguments(tmp_path / "run", **RESUMED)
    hub.fail("GET .*/ema/diffusion_pytorch_model.safetensors", 500, times=50)
    assert train(arguments) == 1
    assert "the Hub had an error" in capfd.readouterr().err
    hub.end_failures()
    files = hub.repositories[REPOSITORY].files(BRANCH)
    files["checkpoints/step_00000004/trainer_state.json"] += b" "
    assert train(arguments) == 2
    assert "trainer_state.json is damaged" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_ahead_or_of_another_run_is_not_replaced(
    hub: LoopbackHub, staged: dict[int, Path], finished_run: Path, tmp_path: Path
) -> None:
    run_branch.upload(staged[4], target())
    remote = run_branch.find_remote(target())
    assert remote is not None
    configs = {seed: parse_command_line(run_arguments(tmp_path, **RESUMED, training__seed=seed))[0] for seed in (0, 3)}
    assert not run_branch.is_ahead(remote, finished_run, configs[0]), "it is at step 6"
    assert run_branch.is_ahead(remote, tmp_path, configs[0])
    shutil.copytree(finished_run / "checkpoints" / "step_00000002", tmp_path / "checkpoints" / "step_00000002")
    assert run_branch.is_ahead(remote, tmp_path, configs[0])
    assert not run_branch.is_ahead(remote, tmp_path, configs[3]), "its settings are those of another run"
