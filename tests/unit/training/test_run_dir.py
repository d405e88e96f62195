"""A run folder is used only if it is empty or a run, by one process at a time; the record in its pipelines."""

import fcntl
import json
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DModel

from ddpm_hf.config import ConfigError, DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainingConfig
from ddpm_hf.training.logging import MetricsLog
from ddpm_hf.training.run_dir import RunFolder, RunLock, carry_over_additions, summarize
from tests.conftest import tiny_unet
from tests.runs import exit_code_of_child


def refusal(path: Path, resume: str = "auto") -> str:
    with pytest.raises(ValueError, match=str(path)) as caught:
        RunFolder(path).acquire(resume)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def begin(path: Path) -> RunFolder:
    """Return the folder of a started run."""
    folder = RunFolder(path)
    folder.acquire("auto")
    folder.write_config("training: {}\n")
    return folder


def test_a_new_or_empty_folder_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "new", tmp_path / "deep" / "er"):
        begin(path).release()
        assert (path / "config.yaml").read_text().endswith("\ntraining: {}\n")


def test_a_run_is_continued_unless_resume_is_none(tmp_path: Path) -> None:
    begin(tmp_path / "run").release()
    again = RunFolder(tmp_path / "run")
    again.acquire("auto")
    again.release()
    assert "holds a run; set training.resume to auto to continue it" in refusal(tmp_path / "run", resume="none")
    assert (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("thesis.tex", b"precious"),
        ("config.yaml", b"somebody: else\n"),
        ("config.yaml", b"\xff\xfe not text"),
        (".hidden", b""),
    ],
)
def test_a_folder_that_holds_something_else_is_refused_and_untouched(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert f"holds something else ({name}); choose an empty or a new folder" in refusal(tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, data)]


LEFT_BY_OTHERS = (
    ".DS_Store", "._train.log", ".gitkeep", ".gitignore", ".ipynb_checkpoints/run-checkpoint.ipynb", "Thumbs.db",
    "desktop.ini", ".nfs00000001", "lost+found/x", "train.log", "train.err", "nohup.out", "slurm-12345.out",
    "train.sh.o12345", "train.sh.e12345", "log.txt", "logs/0.out", "logs/.gitkeep",
)  # fmt: skip


@pytest.mark.parametrize("name", LEFT_BY_OTHERS)
def test_a_folder_that_holds_only_redirected_output_or_litter_is_new(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    folder = RunFolder(tmp_path)
    folder.acquire("none")
    folder.release()
    assert (tmp_path / name).read_text() == "mine"
    begin(tmp_path).release()
    assert "holds a run; set training.resume" in refusal(tmp_path, resume="none")


@pytest.mark.parametrize("name", ["logs/notes.md", "logs/old/a.log", "train.log/part", "weights.pt", "out"])
def test_other_files_among_redirected_output_are_something_else(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    (tmp_path / "nohup.out").touch()
    assert f"holds something else ({Path(name).parts[0]}); choose an empty or a new folder" in refusal(tmp_path)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    assert "another Trainer of this process holds" in refusal(tmp_path)
    folder.release()
    begin(tmp_path).release()


@pytest.mark.parametrize("place", ["file", "file/run", "file/deep/run"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(tmp_path / place)
    assert f"training.output_dir {tmp_path / place} cannot be written (" in message
    assert message.endswith("choose another folder.")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written (Permission denied)" in refusal(tmp_path / "run")


@pytest.mark.parametrize("place", ["run", "deep/er/run"])
def test_a_folder_that_nothing_was_written_to_is_removed(tmp_path: Path, place: str) -> None:
    folder = RunFolder(tmp_path / place)
    folder.acquire("auto")
    folder.release()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_that_existed_before_is_kept(tmp_path: Path) -> None:
    """It may be a mounted disk."""
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run")
    folder.acquire("auto")
    folder.release()
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]
    assert list((tmp_path / "run").iterdir()) == []


def test_other_folders_in_the_same_parent_are_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "outputs" / "one")
    folder.acquire("auto")
    (tmp_path / "outputs" / "two").mkdir()
    folder.release()
    assert list((tmp_path / "outputs").iterdir()) == [tmp_path / "outputs" / "two"]


@pytest.mark.parametrize("leftover", [".lock", ".config.yaml.writing"])
def test_files_of_a_killed_start_are_ignored(tmp_path: Path, leftover: str) -> None:
    (tmp_path / leftover).write_text("half")
    begin(tmp_path).release()
    assert (tmp_path / "config.yaml").exists()


def test_release_without_acquire_does_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_removed_during_training_is_created_and_locked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = begin(tmp_path / "run")
    folder.ensure_held()
    assert caplog.text == ""
    shutil.rmtree(tmp_path / "run")
    folder.ensure_held()
    assert f"training.output_dir {tmp_path / 'run'} was removed during training; it is created again." in caplog.text
    assert "another Trainer of this process holds" in refusal(tmp_path / "run")
    folder.release()
    begin(tmp_path / "run").release()


def test_a_removed_lock_file_is_locked_again(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".lock").unlink()
    folder.ensure_held()
    assert "another Trainer of this process holds" in refusal(tmp_path)
    folder.release()


@pytest.mark.parametrize("name", ["theirs", "config.yaml"])
def test_a_folder_replaced_by_other_files_is_not_touched(tmp_path: Path, name: str) -> None:
    folder = begin(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("precious")
    with pytest.raises(ValueError, match=rf"was removed during training and now holds something else \({name}\)"):
        folder.ensure_held()
    folder.release()
    assert [(path.name, path.read_text()) for path in (tmp_path / "run").iterdir()] == [(name, "precious")]


def test_a_folder_replaced_by_another_run_is_not_touched(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    lock = RunLock(tmp_path / "run")
    with pytest.raises(ConfigError, match="and now another Trainer of this process holds"):
        folder.ensure_held()
    folder.release()
    assert lock.is_held()
    assert (tmp_path / "run" / ".lock").exists()
    lock.release()


def test_a_folder_that_was_removed_can_be_released(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.acquire("auto")
    shutil.rmtree(tmp_path / "deep")
    folder.release()
    folder.release()


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    assert "cannot be written (Too many levels of symbolic links)" in refusal(tmp_path / "run")
    assert not (tmp_path / "precious").exists()


# ----------------------------------------------------------------------------------------------------------- lock


def test_a_run_folder_belongs_to_one_trainer_at_a_time(tmp_path: Path) -> None:
    """Another one of the same process is told which one to close."""
    lock = RunLock(tmp_path, "`trainer = Trainer(config)`")
    with pytest.raises(
        ValueError, match=r"another Trainer of this process holds .* \(`trainer = Trainer\(config\)`\); call its close"
    ):
        RunLock(tmp_path)
    lock.release()
    lock.release()
    RunLock(tmp_path).release()


def test_a_lock_that_nothing_refers_to_is_released(tmp_path: Path) -> None:
    """Also one in a cycle of references, as of a Trainer."""
    lock = RunLock(tmp_path)
    lock.cycle = [lock]  # type: ignore[attr-defined]
    del lock
    RunLock(tmp_path).release()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    def die() -> None:
        lock = RunLock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
        lock.release()

    assert exit_code_of_child(die) == -signal.SIGKILL
    RunLock(tmp_path).release()


def test_another_process_is_refused_and_told_who_holds_the_lock(tmp_path: Path) -> None:
    holder = f"another process (pid {os.getpid()} on {socket.gethostname()}) is training in {tmp_path}; wait for it"
    lock = RunLock(tmp_path)

    def enter() -> None:
        try:
            RunLock(tmp_path)
        except ValueError as error:
            os._exit(0 if holder in str(error) else 1)

    assert exit_code_of_child(enter) == 0
    lock.release()


def test_a_forked_process_neither_keeps_nor_releases_the_lock_of_its_parent(tmp_path: Path) -> None:
    lock, folder = RunLock(tmp_path), begin(tmp_path / "run")
    (started, start), (ended, end) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        lock.release()
        folder.release()
        os.write(start, b"1")
        os.read(ended, 1)
        os._exit(0)
    try:
        os.read(started, 1)
        assert lock.is_held()
        for path in (tmp_path, tmp_path / "run"):
            with pytest.raises(ValueError, match="another Trainer of this process holds"):
                RunLock(path)
        assert lock._release.detach() is not None
        os.close(lock._descriptor)  # as the end of this process would
        RunLock(tmp_path).release()
    finally:
        os.write(end, b"1")
        os.waitpid(child, 0)
        for descriptor in (started, start, ended, end):
            os.close(descriptor)
    folder.release()


def test_a_lock_is_taken_on_the_file_that_others_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that exits removes the file just after we opened it, so that we lock a file without a name."""
    leaving, lock_file = RunLock(tmp_path), fcntl.flock

    def leave_then_lock(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        (tmp_path / ".lock").unlink()
        leaving.release()
        lock_file(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", leave_then_lock)
    lock = RunLock(tmp_path)
    assert lock.is_held()
    with pytest.raises(ValueError, match="another Trainer of this process holds"):
        RunLock(tmp_path)
    lock.release()


def test_a_lock_is_not_held_if_its_file_was_removed_or_replaced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lock = RunLock(run)
    assert lock.is_held()
    (run / ".lock").unlink()
    assert not lock.is_held()
    other = RunLock(run)
    assert other.is_held()
    assert not lock.is_held()
    shutil.rmtree(run)
    assert not other.is_held()
    run.write_text("a file")
    assert not other.is_held()
    lock.release()
    other.release()


def test_a_lock_never_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        RunLock(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"


# --------------------------------------------------------------------------------------------------------- record

ROWS: list[dict[str, Any]] = [
    {"step": 10, "num_images": 80, "loss": 0.9, "seconds": 2.0},
    {"step": 10, "num_images": 80, "score_metric": "fid", "score": 30.0},
    {"step": 25, "num_images": 200, "loss": 0.5, "seconds": 4.5},
    {"step": 25, "num_images": 200, "validation_loss": 0.6},
]


class Images:
    """A training set of three images."""

    def __len__(self) -> int:
        return 3


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    return MetricsLog(tmp_path / "metrics.jsonl")


def summary(
    source: str, metrics: MetricsLog, unet: UNet2DModel | None = None, base_model: str | None = None, **objective: float
) -> Any:
    config = RunConfig(
        data=DataConfig(source=source),
        model=ModelConfig(from_pretrained=base_model),
        objective=ObjectiveConfig(**objective),
        training=TrainingConfig(num_steps=100, train_batch_size=8),
    )
    content = summarize(
        config,
        25,
        images=Images(),  # type: ignore[arg-type]
        unet=unet or tiny_unet(),
        num_processes=2,
        metrics=metrics,
        engine="eager",
    )
    return json.loads(json.dumps(content, allow_nan=False))


def test_counts_and_times_are_those_of_the_metrics(log: MetricsLog) -> None:
    for row in ROWS:
        log.append(row)
    content = summary("user/images", log)
    assert content["seconds"] == 4.5
    assert (content["step"], content["num_steps"], content["num_images_seen"]) == (25, 100, 200)
    assert content["loss"] == 0.5
    assert content["score"] == {"score_metric": "fid", "score": 30.0}
    assert content["num_parameters"] == sum(parameter.numel() for parameter in tiny_unet().parameters())
    assert content["device"]


def test_without_metrics_the_values_are_null(log: MetricsLog) -> None:
    content = summary("user/images", log)
    assert (content["seconds"], content["loss"], content["score"]) == (None, None, None)


@pytest.mark.parametrize(("dropout", "num_classes"), [(0.0, 4), (0.1, 3)])
def test_the_null_label_is_not_counted_as_a_class(log: MetricsLog, dropout: float, num_classes: int) -> None:
    assert (
        summary("x/y", log, tiny_unet(num_class_embeds=4), class_dropout=dropout)["data"]["num_classes"] == num_classes
    )


def test_only_the_name_of_a_local_path_is_recorded(log: MetricsLog, tmp_path: Path) -> None:
    source = tmp_path / "holiday"
    source.mkdir()
    assert summary(str(source), log)["data"] == {"source": "holiday", "num_images": 3, "num_classes": None}
    assert summary("user/images", log)["data"]["source"] == "user/images"


def test_a_base_model_is_its_hub_id_or_the_name_of_its_folder(log: MetricsLog, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    assert summary("x/y", log)["base_model"] is None
    assert summary("x/y", log, base_model="google/ddpm-cifar10-32")["base_model"] == "google/ddpm-cifar10-32"
    assert summary("x/y", log, base_model=str(tmp_path / "old"))["base_model"] == "old"


# ------------------------------------------------------------------------------------------- additions to a pipeline


def write_pipeline(folder: Path, weights: str, step: int) -> None:
    files = {"model_index.json": "{}", "unet/config.json": "{}", "unet/weights": weights, "scheduler/x.json": "{}"}
    for name, content in (files | {"training_summary.json": json.dumps({"step": step})}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_additions_to_a_pipeline_stay_with_the_same_weights(tmp_path: Path) -> None:
    old, new, evaluations = tmp_path / "old", tmp_path / "new", tmp_path / "evaluations"
    write_pipeline(old, "w", 5)
    write_pipeline(new, "w", 6)
    (old / "samples").mkdir()
    (old / "samples" / "0.png").write_text("picture")
    (old / "evaluation.json").write_text("{}")
    (old / "link").symlink_to(tmp_path)
    before = files_of(new)
    carry_over_additions(old, new, evaluations)
    assert files_of(new) == before | {"samples/0.png": "picture", "evaluation.json": "{}"}
    assert not (new / "link").exists()
    assert not evaluations.exists()


@pytest.mark.parametrize("changed", ["unet/weights", "model_index.json"])
def test_evaluations_of_other_weights_are_kept_beside_the_pipeline(tmp_path: Path, changed: str) -> None:
    old, new, evaluations = tmp_path / "old", tmp_path / "new", tmp_path / "evaluations"
    write_pipeline(old, "w", 5)
    write_pipeline(new, "w", 6)
    (new / changed).write_text("other")
    (old / "evaluation.json").write_text("{}")
    (old / "evaluation.png").write_text("picture")
    before = files_of(new)
    carry_over_additions(old, new, evaluations)
    assert files_of(new) == before
    assert files_of(evaluations) == {"step_00000005.json": "{}", "step_00000005.png": "picture"}
    (old / "training_summary.json").write_text("[]")
    carry_over_additions(old, new, evaluations)
    assert "step_unknown.json" in files_of(evaluations)
    carry_over_additions(tmp_path / "missing", new, tmp_path / "none")
    assert not (tmp_path / "none").exists()
