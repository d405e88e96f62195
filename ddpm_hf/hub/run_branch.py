"""A branch of a Hub repository that holds a run folder, so that another machine continues the run.

    config.yaml  metrics.jsonl  trackers.json  previews/  ema_snapshots/  vae/
    checkpoints/step_00001000/       the newest checkpoint, and the best one if scores are measured

The files are those of the run folder (training/run_dir.py), so `hf download` of the branch gives a run folder, too.
Each push is one commit: the branch holds this checkpoint or the one before, never a part of it. The history is squashed
after each push, because checkpoints that no commit names need no storage. Needs no torch.
"""

import os
import re
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ddpm_hf.config import ConfigError, RunConfig, changed_settings, read_config_dict
from ddpm_hf.files import (
    CHECKPOINTS_DIR,
    EMA_SNAPSHOTS_DIR,
    MANIFEST,
    METRICS,
    PREVIEWS_DIR,
    RUN_CONFIG,
    TRACKERS,
    VAE_DIR,
)
from ddpm_hf.hub.access import HubFailed, HubRefused, Target, hub_errors
from ddpm_hf.model_folder import (
    RUN_MARK,
    CheckpointError,
    find_latest,
    has_run_mark,
    set_aside,
    step_of,
    verify_checkpoint,
)
from ddpm_hf.redaction import redact

_CONTENT = (RUN_CONFIG, METRICS, TRACKERS, PREVIEWS_DIR, EMA_SNAPSHOTS_DIR, VAE_DIR)
_CHECKPOINT = re.compile(rf"{CHECKPOINTS_DIR}/(step_\d{{8,}})/{MANIFEST}")
_DOWNLOAD = ".download"
_OF_THE_HUB = ".gitattributes"  # says which files are large ones


@dataclass(frozen=True)
class RemoteRun:
    """A run on a branch.

    Args:
        target: Its repository, with the full id, and its branch.
        commit: The commit that was read.
        checkpoints: Names of its checkpoints, by step.
    """

    target: Target
    commit: str
    checkpoints: tuple[str, ...]

    @property
    def step(self) -> int:
        """Optimizer updates of the newest checkpoint."""
        return step_of(Path(self.checkpoints[-1]))

    def __str__(self) -> str:
        return f"{self.target.repo_id}, branch {self.target.branch}"


# ----------------------------------------------------------------------------------------------------------- push


def stage(run: Path, checkpoints: Collection[str], folder: Path) -> None:
    """Copy what is pushed of a run into a new folder, so that the run may go on and remove its checkpoints.

    Args:
        run: The run folder.
        checkpoints: Names of complete checkpoints.
        folder: The new folder, on the same file system: tensors are linked, not copied.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    folder.mkdir(parents=True)
    for name in (*_CONTENT, *(f"{CHECKPOINTS_DIR}/{name}" for name in checkpoints)):
        path = run / name
        if path.is_dir():
            hidden = shutil.ignore_patterns(".*")  # of a snapshot that is being written
            shutil.copytree(path, folder / name, copy_function=_link_tensors, ignore=hidden)
        elif path.is_file():
            shutil.copyfile(path, folder / name)


def _link_tensors(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        try:
            return os.link(source, target)
        except OSError:  # a file system without links
            pass
    shutil.copyfile(source, target)


def upload(folder: Path, target: Target) -> str:
    """Make a staged folder the content of a branch, in one commit.

    Args:
        folder: Result of `stage`.
        target: Repository and branch, which are created if they do not exist.

    Returns:
        The address of the branch.

    Raises:
        HubRefused: The user may not push, or the branch holds something else or a later step.
        HubFailed: The connection or the Hub failed.
    """
    api, branch = HfApi(), target.revision
    step = max(step_of(path) for path in (folder / CHECKPOINTS_DIR).iterdir())
    with hub_errors(target.repo_id, "the branch holds this checkpoint or the one before"):
        try:
            parent = api.repo_info(target.repo_id, revision=branch).sha
        except RepositoryNotFoundError:
            api.create_repo(target.repo_id, private=target.private or None, exist_ok=True)
            parent = None
        except RevisionNotFoundError:
            parent = None
        if parent is None:
            api.create_branch(target.repo_id, branch=branch, exist_ok=True)
            parent = api.repo_info(target.repo_id, revision=branch).sha
        existing = api.list_repo_files(target.repo_id, revision=parent)
        there = _run_of(target, str(parent), existing)
        if there is not None and there.step > step:
            raise HubRefused(
                f"{there} already holds step {there.step}, so another machine has continued the run; stop one of them."
            )
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        outdated = set(existing) - files.keys() - {_OF_THE_HUB}
        commit = api.create_commit(
            target.repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in files.items()),
                *(CommitOperationDelete(name) for name in sorted(outdated)),
            ],
            commit_message=f"Checkpoint of step {step}",
            revision=branch,
            parent_commit=parent,
        )
        if commit.oid != parent:
            try:
                with hub_errors(target.repo_id, "the checkpoint is pushed"):
                    api.super_squash_history(target.repo_id, branch=branch, commit_message=f"Checkpoint of step {step}")
            except (HubRefused, HubFailed) as error:
                print(f"The history of {branch} was not squashed: {redact(str(error))}")
    return f"{api.endpoint}/{target.repo_id}/tree/{branch}"


def main(arguments: Sequence[str]) -> int:
    """Push a staged folder, print the address or one error, and return the exit code: the process of a training."""
    folder, repo_id, branch, privacy = arguments
    try:
        print(upload(Path(folder), Target(repo_id=repo_id, branch=branch, private=privacy == "private")))
    except (ValueError, OSError) as error:
        print(f"error: {redact(str(error))}")
        return 1
    return 0


# -------------------------------------------------------------------------------------------------------- continue


def find_remote(target: Target) -> RemoteRun | None:
    """Return the run on a branch; None if there is no repository, no branch, or nothing on it yet.

    Raises:
        HubRefused: The branch holds something else, or the user may not read it.
        HubFailed: The Hub cannot be reached.
    """
    api = HfApi()
    with hub_errors(target.repo_id, "nothing was changed"):
        try:
            commit = str(api.repo_info(target.repo_id, revision=target.revision).sha)
            return _run_of(target, commit, api.list_repo_files(target.repo_id, revision=commit))
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None


def _run_of(target: Target, commit: str, files: Collection[str]) -> RemoteRun | None:
    """Return the run in a commit; None if the commit is part of the main branch, where a new branch begins.

    Raises:
        HubRefused: It holds something else.
    """
    api = HfApi()
    steps = {found[1] for name in files if (found := _CHECKPOINT.fullmatch(name))}
    if steps and RUN_CONFIG in files:
        path = api.hf_hub_download(target.repo_id, RUN_CONFIG, revision=commit)
        if Path(path).read_text(encoding="utf-8", errors="replace").startswith(RUN_MARK):
            return RemoteRun(target, commit, tuple(sorted(steps, key=lambda name: step_of(Path(name)))))
    if any(one.commit_id == commit for one in api.list_repo_commits(target.repo_id)):
        return None
    raise HubRefused(
        f"branch {target.branch} of {target.repo_id} holds something else than a run, which is left untouched; set "
        "hub.checkpoint_branch to a new branch."
    )


def check_settings(remote: RemoteRun, config: RunConfig) -> None:
    """Refuse to continue, and to replace, a run with other settings.

    Raises:
        ConfigError: A setting that cannot change has another value, or training.resume is none.
        HubFailed: The Hub cannot be reached.
    """
    if config.training.resume == "none":
        raise ConfigError(
            f"{remote} holds a run; set training.resume to auto to continue it, or hub.checkpoint_branch to another "
            "branch."
        )
    with hub_errors(remote.target.repo_id, "nothing was changed"):
        name = f"{CHECKPOINTS_DIR}/{remote.checkpoints[-1]}/{RUN_CONFIG}"
        path = HfApi().hf_hub_download(remote.target.repo_id, name, revision=remote.commit)
    fixed, _ = changed_settings(read_config_dict(Path(path)), config)
    if fixed:
        raise ConfigError(
            f"{remote} holds a run with other settings ({'; '.join(fixed)}); restore them, or set "
            "hub.checkpoint_branch to another branch."
        )


def is_ahead(remote: RemoteRun, run: Path, config: RunConfig) -> bool:
    """Return whether the Hub has a later step than a run folder, which holds the same run or nothing."""
    try:
        latest, _ = find_latest(run / CHECKPOINTS_DIR)
    except CheckpointError:  # all are damaged
        return True
    if latest is None:
        return True
    is_same = not changed_settings(read_config_dict(latest.path / RUN_CONFIG), config)[0]
    return is_same and latest.step < remote.step


def download(remote: RemoteRun, run: Path) -> None:
    """Put a run of the Hub into a run folder, the newest checkpoint last.

    An interruption at any moment leaves a folder where the same call starts again; checkpoints that are there stay.

    Args:
        remote: The run.
        run: The run folder, which may hold an earlier state of the same run.

    Raises:
        HubFailed: The Hub cannot be reached.
        CheckpointError: A checkpoint on the branch is damaged.
        OSError: The disk is full or cannot be written.
    """
    is_new, temporary = not has_run_mark(run), run / _DOWNLOAD
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if is_new:  # a folder with the mark of a run is one that training continues in
            (run / RUN_CONFIG).write_text(RUN_MARK, encoding="utf-8")
        with hub_errors(remote.target.repo_id, f"{run} is as it was"):
            wanted = [pattern for name in (*_CONTENT, CHECKPOINTS_DIR) for pattern in (name, f"{name}/**")]
            snapshot_download(remote.target.repo_id, revision=remote.commit, local_dir=temporary, allow_patterns=wanted)
        for name in remote.checkpoints:
            try:
                verify_checkpoint(temporary / CHECKPOINTS_DIR / name)
            except CheckpointError as error:
                raise CheckpointError(
                    f"the checkpoint of {remote} cannot be used: {error}; set training.resume_from_hub to false, or "
                    "hub.checkpoint_branch to another branch."
                ) from None
        for name in _CONTENT:
            if (temporary / name).exists():
                _replace(temporary / name, run / name)
        (run / CHECKPOINTS_DIR).mkdir(exist_ok=True)
        for name in remote.checkpoints:
            target = run / CHECKPOINTS_DIR / name
            if target.exists():
                set_aside(target)
            (temporary / CHECKPOINTS_DIR / name).rename(target)
    except BaseException:
        if is_new and not (run / CHECKPOINTS_DIR).exists():
            for name in _CONTENT:
                _remove(run / name)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(source: Path, target: Path) -> None:
    _remove(target)
    source.rename(target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
