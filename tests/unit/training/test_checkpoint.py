"""A checkpoint is complete or absent, whatever happens while it is written; one that was changed is never used."""

import errno
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf.config import ConfigError, DataConfig, TrainingConfig
from ddpm_hf.data import ImageSet, ImageStream
from ddpm_hf.files import MANIFEST, replace_folder, write_text
from ddpm_hf.training import checkpoint
from ddpm_hf.training.batches import LossAwareTimesteps, UniformTimesteps
from ddpm_hf.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointFiles,
    DataState,
    HostCopy,
    find_latest,
    prune,
    read_snapshot,
    remove_after,
    remove_unfinished,
    set_aside,
    snapshot_files,
    verify_checkpoint,
    write_checkpoint,
    write_files,
)
from ddpm_hf.training.ema import EMA, decay_schedules
from ddpm_hf.training.optim import build_optimizer, load_optimizer_state
from tests.conftest import tiny_unet
from tests.unit.data.helpers import encode, write_parquet

FILES = {"unet/weights": b"w" * 5000, "unet/config.json": b"{}", "state.json": b"{}"}


def content(mark: str = "") -> Callable[[Path], None]:
    """Return a function that writes a few files into a folder."""

    def write(folder: Path) -> None:
        for name, data in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data + mark.encode())

    return write


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_steps(root: Path, *steps: int) -> list[Path]:
    return [write_checkpoint(root, step, content(str(step))).path for step in steps]


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# ----------------------------------------------------------------------------------------------- complete or absent

# Audit events of changes to the file system. fsync has none.
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
HOWS = ["kill", "full disk"]


def run_until(action: Callable[[], object], stop_at: int, how: str) -> bool:
    """Run an action in a child process and fail at its n-th change to the file system.

    Args:
        action: What to run.
        stop_at: Which change fails; an fsync counts as one, and a file that could not be written exists, but is empty.
        how: "kill" ends the process before the change, "full disk" raises once instead of it.

    Returns:
        Whether the action finished without reaching the change.
    """
    child = os.fork()
    if child == 0:
        _run_and_exit(action, stop_at, how)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def _run_and_exit(action: Callable[[], object], stop_at: int, how: str) -> None:
    count = 0

    def change(begin: Callable[[], object] = lambda: None) -> None:
        nonlocal count
        count += 1
        if count == stop_at:
            begin()
            if how == "kill":
                os._exit(9)
            raise OSError(errno.ENOSPC, "No space left on device")

    def audit(event: str, arguments: Sequence[Any]) -> None:
        if event == "open" and arguments[2] & WRITES:
            change(lambda: os.close(os.open(arguments[0], arguments[2] & ~os.O_EXCL, 0o600)))
        elif event in CHANGES:
            change()

    sync = os.fsync
    os.fsync = lambda descriptor: (change(), sync(descriptor))[1]  # type: ignore[assignment]
    sys.addaudithook(audit)
    try:
        action()
    except OSError:
        os._exit(1)
    except BaseException:
        os._exit(2)
    os._exit(0 if count < stop_at else 1)


@pytest.mark.parametrize("how", HOWS)
def test_an_older_checkpoint_survives_whatever_stops_the_writing_of_the_next(tmp_path: Path, how: str) -> None:
    root = tmp_path / "checkpoints"
    old = tree(write_checkpoint(root, 2, content("old")).path)
    for stop_at in range(1, 1000):
        is_done = run_until(lambda: write_checkpoint(root, 4, content("new")), stop_at, how)
        latest, damaged = find_latest(root)
        assert not damaged, f"change {stop_at} left half a checkpoint behind"
        assert latest is not None
        assert latest.step in (2, 4)
        assert tree(root / "step_00000002") == old
        if is_done:
            break
        again = write_checkpoint(root, 4, content("new"))
        assert find_latest(root) == (again, [])
        assert names_in(root) == ["step_00000002", "step_00000004"]
        shutil.rmtree(again.path)
    assert is_done
    assert stop_at > 10
    assert latest.step == 4


@pytest.mark.parametrize("how", HOWS)
def test_a_checkpoint_survives_whatever_stops_a_second_writing_of_the_same_step(tmp_path: Path, how: str) -> None:
    """A signal in a step that has just saved makes the run save again."""
    before = tree(write_checkpoint(tmp_path, 2, content("first")).path)
    for stop_at in range(1, 1000):
        is_done = run_until(lambda: write_checkpoint(tmp_path, 2, content("second")), stop_at, how)
        assert find_latest(tmp_path) == (Checkpoint(tmp_path / "step_00000002", 2), [])
        if is_done:
            break
    assert is_done
    assert tree(tmp_path / "step_00000002") == before


@pytest.mark.parametrize("how", HOWS)
def test_a_folder_is_replaced_completely_or_not_at_all(tmp_path: Path, how: str) -> None:
    """A kill between the two renames leaves no folder, but the next call first restores the old one."""
    path, expected = tmp_path / "pipeline", {}
    for mark in ("new", "old"):
        replace_folder(path, content(mark))
        expected[mark] = tree(path)

    def fail(_: Path) -> None:
        raise RuntimeError("nothing to write")

    for stop_at in range(1, 1000):
        is_done = run_until(lambda: replace_folder(path, content("new")), stop_at, how)
        with pytest.raises(RuntimeError, match="nothing to write"):
            replace_folder(path, fail)
        assert tree(path) in expected.values(), f"change {stop_at} lost both"
        assert names_in(tmp_path) == ["pipeline"]
        if is_done:
            break
        replace_folder(path, content("old"))
    assert is_done
    assert tree(path) == expected["new"]


@pytest.mark.parametrize("how", HOWS)
def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path, how: str) -> None:
    path = tmp_path / "config.yaml"
    write_text(path, "old")
    for stop_at in range(1, 100):
        is_done = run_until(lambda: write_text(path, "new"), stop_at, how)
        assert path.read_text() in ("old", "new")
        if is_done:
            break
        write_text(path, "old")
        assert names_in(tmp_path) == ["config.yaml"]
    assert is_done
    assert path.read_text() == "new"


def test_a_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    """Neither through one at its own place nor through one at that of its temporary file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("precious")
    for name in ("config.yaml", ".config.yaml.writing"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    write_text(tmp_path / "run" / "config.yaml", "new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert tree(tmp_path / "run") == {"config.yaml": b"new"}


def test_everything_is_synced_before_the_rename_that_makes_it_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power failure the name must not exist without the content, nor the content without the name."""
    log: list[object] = []
    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (log.append(os.fstat(descriptor).st_ino), sync(descriptor)))
    monkeypatch.setattr(Path, "rename", lambda path, target: (log.append("rename"), rename(path, target))[1])
    root = tmp_path / "checkpoints"
    path = write_checkpoint(root, 2, content()).path
    renamed_at = log.index("rename")
    assert log.count("rename") == 1
    everything = {entry.stat().st_ino for entry in (path, *path.rglob("*"))}
    assert len(everything) == 1 + 1 + len(FILES) + 1
    assert everything <= set(log[:renamed_at])
    assert root.stat().st_ino in log[renamed_at:]
    assert tmp_path.stat().st_ino in log, "the folder of all checkpoints is new, too"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_permissions_of_the_umask(
    tmp_path: Path, umask: int, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors creates files of mode 0600 whatever the umask, which a thread must not change to read it."""

    def write(folder: Path) -> None:
        content()(folder)
        for file in folder.rglob("*"):
            if file.is_file():
                file.chmod(0o600)

    before = os.umask(umask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("the umask of all threads is changed"))
            path = write_checkpoint(tmp_path, 2, write).path
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.rglob("*") if file.is_file()} == {mode}


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        content()(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint(tmp_path, 2, write)
    assert names_in(tmp_path) == []


def test_a_damaged_checkpoint_of_the_same_step_is_set_aside_and_written_again(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 2, content("old")).path
    (path / "state.json").unlink()
    write_checkpoint(tmp_path, 2, content("new"))
    assert verify_checkpoint(path).step == 2
    assert (path / "unet" / "weights").read_bytes().endswith(b"new")
    assert (tmp_path / "damaged-step_00000002" / "unet" / "weights").exists()


# ---------------------------------------------------------------------------------------------------------- verify


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "unet" / "weights").read_bytes())
    data[2500] ^= 1
    (path / "unet" / "weights").write_bytes(data)


def change_manifest(**changes: object) -> Callable[[Path], object]:
    return lambda path: (path / MANIFEST).write_text(json.dumps(json.loads((path / MANIFEST).read_text()) | changes))


def replace_by_link(name: str) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        (path / name).rename(path.parent / "elsewhere")
        (path / name).symlink_to(path.parent / "elsewhere")

    return change


def link_to_itself(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


UNREADABLE = f"{MANIFEST} is missing or unreadable"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: os.truncate(path / "unet" / "weights", 4999), "unet/weights is damaged"),
    "a flipped bit": (flip_a_bit, "unet/weights is damaged"),
    "a missing file": (lambda path: (path / "unet" / "config.json").unlink(), "unet/config.json is missing"),
    "an additional file": (lambda path: (path / "unet" / "x.pkl").write_bytes(b""), "unet/x.pkl does not belong to it"),
    "a linked file": (replace_by_link("unet/weights"), "unet/weights is a link"),
    "a linked folder": (replace_by_link("unet"), "unet is a link"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), UNREADABLE),
    "half a manifest": (lambda path: os.truncate(path / MANIFEST, 100), UNREADABLE),
    "a list as manifest": (lambda path: (path / MANIFEST).write_text("[]"), UNREADABLE),
    "a binary manifest": (lambda path: (path / MANIFEST).write_bytes(b"\xff"), UNREADABLE),
    "a deeply nested manifest": (lambda path: (path / MANIFEST).write_text("[" * 100_000), UNREADABLE),
    "files of another type": (change_manifest(files="abc"), UNREADABLE),
    "a step of another type": (change_manifest(step="two"), UNREADABLE),
    "no files in the manifest": (change_manifest(files={}), "does not belong to it"),
    "another schema": (change_manifest(schema_version=99), "written by another version (schema 99, this is 1)"),
    "another step": (lambda path: path.rename(path.with_name("step_00000005")), f"renamed: {MANIFEST} says step 2"),
    "another name": (lambda path: path.rename(path.with_name("best")), "is not named like a checkpoint"),
    "a link to the checkpoint": (link_to_itself, "step_00000002 is a link"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_is_not_what_was_written_is_refused(tmp_path: Path, damage: str) -> None:
    path = write_checkpoint(tmp_path / "root", 2, content()).path
    assert verify_checkpoint(path) == Checkpoint(path, 2)
    change, reason = DAMAGE[damage]
    result = change(path)
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(result if isinstance(result, Path) else path)
    assert reason in str(caught.value)


def test_a_checkpoint_may_be_moved_to_another_folder(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "here", 123_456_789, content()).path
    shutil.copytree(path, tmp_path / "there" / path.name)
    assert verify_checkpoint(tmp_path / "there" / path.name).step == 123_456_789


def fail_at(owner: Any, function: str, ending: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a function fail for paths with an ending, as on a bad sector or without permission."""
    original = getattr(owner, function)

    def call_or_fail(path: Any, *arguments: Any, **settings: Any) -> Any:
        if str(path).endswith(ending):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *arguments, **settings)

    monkeypatch.setattr(owner, function, call_or_fail)


@pytest.mark.parametrize(
    ("owner", "function", "ending", "reason"),
    [
        (Path, "open", "step_00000004/unet/weights", "unet/weights cannot be read (Input/output error)"),
        (os, "scandir", "step_00000004/unet", "its files cannot be listed (Input/output error)"),
    ],
)
def test_a_checkpoint_on_a_bad_sector_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, function: str, ending: str, reason: str
) -> None:
    one, _ = write_steps(tmp_path, 2, 4)
    fail_at(owner, function, ending, errno.EIO, monkeypatch)
    assert find_latest(tmp_path) == (Checkpoint(one, 2), [f"step_00000004: {reason}"])


@pytest.mark.parametrize(
    ("owner", "function", "ending"),
    [(Path, "open", "state.json"), (Path, "open", MANIFEST), (os, "scandir", "step_00000004/unet")],
)
def test_a_checkpoint_without_permission_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, function: str, ending: str
) -> None:
    """It is not skipped: a chmod would save its steps."""
    write_steps(tmp_path, 2, 4)
    fail_at(owner, function, ending, errno.EACCES, monkeypatch)
    with pytest.raises(PermissionError, match=ending):
        find_latest(tmp_path)


# ------------------------------------------------------------------------------------------ find, set aside, prune


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_checkpoints_that_cannot_be_listed_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """Training would start from zero otherwise. After a save, they only cannot be pruned."""
    root = tmp_path / "checkpoints"
    write_steps(root, 2, 4)
    fail_at(os, "scandir", "checkpoints", number, monkeypatch)
    with pytest.raises(OSError, match=os.strerror(number)):
        find_latest(root)
    prune(root, num_kept=1)
    assert os.strerror(number) in caplog.text


def test_checkpoints_on_a_disk_that_is_not_mounted_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "not mounted")
    with pytest.raises(CheckpointError, match="mount the disk"):
        find_latest(tmp_path / "checkpoints")


def test_the_newest_checkpoint_is_found_by_its_number(tmp_path: Path) -> None:
    *_, newest = write_steps(tmp_path, 8, 9, 10, 99_999_999, 100_000_000)
    assert find_latest(tmp_path) == (Checkpoint(newest, 100_000_000), [])


def test_other_folders_are_not_checkpoints(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "missing") == (None, [])
    for name in ("best", "step_1", "step_0000000x", ".writing-step_00000004", "damaged-step_00000004", "last.ckpt"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000004").write_text("a file")
    assert find_latest(tmp_path) == (None, [])


def test_damaged_newer_checkpoints_are_named_and_older_ones_not_read(tmp_path: Path) -> None:
    oldest, valid, two, three = write_steps(tmp_path, 1, 2, 4, 6)
    flip_a_bit(three)
    (two / "state.json").unlink()
    flip_a_bit(oldest)
    latest, damaged = find_latest(tmp_path)
    assert latest == Checkpoint(valid, 2)
    assert [line.partition(":")[0] for line in damaged] == ["step_00000006", "step_00000004"]
    assert "unet/weights is damaged" in damaged[0]
    assert "state.json is missing" in damaged[1]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_zero(tmp_path: Path) -> None:
    for path in write_steps(tmp_path, 2, 4):
        flip_a_bit(path)
    with pytest.raises(CheckpointError, match=r"step_00000004: unet/weights is.*; step_00000002: unet/weights is"):
        find_latest(tmp_path)


def test_a_checkpoint_set_aside_is_kept_and_not_found_again(tmp_path: Path) -> None:
    one, two = write_steps(tmp_path, 2, 4)
    (tmp_path / "damaged-step_00000004").mkdir()
    target = set_aside(two)
    assert tree(target)
    assert not two.exists()
    assert find_latest(tmp_path) == (Checkpoint(one, 2), [])


@pytest.mark.parametrize("num_kept", [2, 3, 10])
def test_pruning_keeps_the_newest(tmp_path: Path, num_kept: int) -> None:
    paths = write_steps(tmp_path, 2, 4, 6, 8)
    (tmp_path / "step_of_someone").mkdir()
    prune(tmp_path, num_kept)
    assert [path for path in paths if path.exists()] == paths[-num_kept:]
    assert (tmp_path / "step_of_someone").exists()


def test_pruning_keeps_the_best(tmp_path: Path) -> None:
    """In addition to the newest, or as one of them."""
    paths = write_steps(tmp_path, 2, 4, 6, 8)
    prune(tmp_path, 2, best_step=4)
    assert [path for path in paths if path.exists()] == paths[1:]
    prune(tmp_path, 2, best_step=8)
    assert [path for path in paths if path.exists()] == paths[2:]


def test_an_old_checkpoint_that_cannot_be_removed_is_named_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old, *_, newest = write_steps(tmp_path, 2, 4, 6)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rmdir", refuse)
    prune(tmp_path, 2)
    assert str(old) in caplog.text
    assert find_latest(tmp_path) == (Checkpoint(newest, 6), [])


def test_later_and_unfinished_folders_are_removed(tmp_path: Path) -> None:
    write_steps(tmp_path, 2, 4, 6)
    (tmp_path / ".writing-step_00000008").mkdir()
    content()(tmp_path / ".writing-step_00000008")
    remove_unfinished(tmp_path)
    remove_after(tmp_path, 4)
    assert names_in(tmp_path) == ["step_00000002", "step_00000004"]
    remove_unfinished(tmp_path / "missing")
    remove_after(tmp_path / "missing", 5)


# --------------------------------------------------------------------------------------------------------- content

NAMES = [name for name, _ in tiny_unet(10).named_parameters()]
SAMPLER = UniformTimesteps(10, 8, seed=0)
Run = tuple[UNet2DModel, EMA, torch.optim.Optimizer]


def trained(seed: int, num_updates: int = 2) -> Run:
    """Return a tiny network after a few updates, its EMAs and its optimizer."""
    unet = tiny_unet(10)
    config = TrainingConfig(learning_rate=0.1, ema_decay=0.9, ema_warmup="none", posthoc_ema=True)
    ema = EMA(unet, decay_schedules(config))
    optimizer = build_optimizer(unet.parameters(), config)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_updates):
        update((unet, ema, optimizer), generator)
    return unet, ema, optimizer


def update(run: Run, generator: torch.Generator) -> None:
    unet, ema, optimizer = run
    for parameter in unet.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    ema.update()


def write_snapshot(folder: Path, *arguments: Any) -> None:
    write_files(folder, snapshot_files(*arguments))


def everything(run: Run) -> dict[str, torch.Tensor]:
    unet, ema, optimizer = run
    tensors = dict(unet.named_parameters())
    for name in ema.names:
        tensors |= {f"{NAMES[number]} {name}": tensor for number, tensor in enumerate(ema.tensors(name))}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{NAMES[number]} {name}": moment for name, moment in moments.items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def restore(folder: Path, run: Run) -> dict[str, Any]:
    unet, ema, optimizer = run
    snapshot = read_snapshot(folder, unet, ema)
    load_optimizer_state(optimizer, NAMES, snapshot.optimizer, snapshot.state["optimizer"])
    ema.load_state_dict(snapshot.state)
    return snapshot.state


def test_a_snapshot_restores_every_bit_and_training_continues_bit_identically(tmp_path: Path) -> None:
    """Weights, EMAs, moments and step counts; the next update depends on all of them."""
    run, state = trained(0), {"global_step": 7, "num_ema_updates": 2, "loss_sums": [[0.1, 3.0]]}
    expected = everything(run)
    assert len(expected) == 7 * len(NAMES)
    write_snapshot(tmp_path, *run, SAMPLER, state, "training: {}\n")
    assert_equal(everything(run), expected)
    restored = trained(1, num_updates=3)
    assert restore(tmp_path, restored) == state | {"optimizer": {}}
    assert restored[1].num_updates == 2
    assert_equal(everything(restored), expected)
    for each in (run, restored):
        update(each, torch.Generator().manual_seed(2))
    assert_equal(everything(restored), everything(run))
    assert (tmp_path / "config.yaml").read_text() == "training: {}\n"


def test_an_optimizer_that_never_stepped_is_restored_as_such(tmp_path: Path) -> None:
    """All updates so far may have been skipped."""
    write_snapshot(tmp_path, *trained(0, num_updates=0), SAMPLER, {"num_ema_updates": 0}, "")
    restored = trained(0)
    restore(tmp_path, restored)
    assert restored[2].state_dict()["state"] == {}


def test_the_history_of_a_timestep_sampler_is_stored(tmp_path: Path) -> None:
    sampler = LossAwareTimesteps(4, 8, seed=0)
    sampler.record(torch.tensor([0, 3, 3]), torch.tensor([1.0, 2.0, 3.0]))
    unet, ema, optimizer = trained(0)
    write_snapshot(tmp_path, unet, ema, optimizer, sampler, {}, "")
    assert_equal(read_snapshot(tmp_path, unet, ema).learned, sampler.state_dict())


@pytest.mark.parametrize(("name", "value"), [("global_step", "x"), ("num_skipped", -1), ("num_images", 0.5)])
def test_counts_must_be_non_negative_integers(tmp_path: Path, name: str, value: object) -> None:
    run = trained(0)
    write_snapshot(tmp_path, *run, SAMPLER, {name: value}, "")
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        read_snapshot(tmp_path, run[0], run[1])


def test_a_disk_that_is_full_in_the_middle_of_a_tensor_is_an_os_error(tmp_path: Path) -> None:
    """safetensors has an error of its own for this; a limit on the size of files stands for the full disk."""
    run = trained(0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_checkpoint(tmp_path, 2, lambda folder: write_snapshot(folder, *run, SAMPLER, {}, ""))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names_in(tmp_path) == []


def test_no_file_is_a_pickle_and_diffusers_alone_loads_the_networks(tmp_path: Path) -> None:
    unet, ema, optimizer = trained(0)
    write_snapshot(tmp_path, unet, ema, optimizer, SAMPLER, {}, "")
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json", ".yaml"}
    for path in tmp_path.rglob("*.safetensors"):
        assert path.read_bytes()[8:9] == b"{", "a safetensors file begins with the length of its JSON header"
    for folder, expected in (("unet", list(unet.parameters())), *((name, ema.tensors(name)) for name in ema.names)):
        loaded = UNet2DModel.from_pretrained(tmp_path, subfolder=folder, use_safetensors=True)
        assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), expected, strict=True))


def test_the_networks_of_a_checkpoint_are_those_that_diffusers_would_save(tmp_path: Path) -> None:
    """The weights and every EMA, byte for byte, without touching the network."""
    unet, ema, optimizer = trained(0)
    unet.to(memory_format=torch.channels_last)
    before = [parameter._version for parameter in unet.parameters()]
    (tmp_path / "checkpoint").mkdir()
    write_snapshot(tmp_path / "checkpoint", unet, ema, optimizer, SAMPLER, {}, "")
    assert [parameter._version for parameter in unet.parameters()] == before
    unet.save_pretrained(tmp_path / "unet")
    for name in ema.names:
        with ema.swapped_in(name):
            unet.save_pretrained(tmp_path / name)
    assert len(ema.names) == 3
    for name in ("unet", *ema.names):
        assert tree(tmp_path / "checkpoint" / name) == tree(tmp_path / name)


# ------------------------------------------------------------------------------------------------------- host copy


def test_a_copy_is_written_byte_for_byte_as_the_run_was(tmp_path: Path) -> None:
    """After a later update of the run; the memory of the first copy is used again for the second."""
    run, host = trained(0), HostCopy(keeps_reserve=True)
    memory: list[set[int]] = []
    for step in (1, 2):
        files = snapshot_files(*run, SAMPLER, {"global_step": step}, "training: {}")
        write_checkpoint(tmp_path / "live", step, lambda folder: write_files(folder, files))  # noqa: B023
        copies = host.copy(files)
        update(run, torch.Generator().manual_seed(step))
        host.wait()
        write_checkpoint(tmp_path / "copied", step, lambda folder: write_files(folder, copies))  # noqa: B023
        memory.append({tensor.data_ptr() for tensors in copies.tensors.values() for tensor in tensors.values()})
    assert tree(tmp_path / "copied") == tree(tmp_path / "live")
    assert memory[0] == memory[1]
    assert len(memory[0]) == 7 * len(NAMES)


def some_files(device: str = "cpu") -> CheckpointFiles:
    weights = {"a": torch.ones(4, 2, device=device), "b": torch.ones(8, device=device)}
    return CheckpointFiles({"unet": weights, "optimizer": {"step": torch.ones(())}}, {})


def test_a_tensor_of_another_shape_or_type_gets_other_memory() -> None:
    host = HostCopy(keeps_reserve=False)
    for tensor in (torch.ones(4), torch.ones(5), torch.ones(5, dtype=torch.int64)):
        copied = host.copy(CheckpointFiles({"optimizer": {"x": tensor}}, {})).tensors["optimizer"]["x"]
        assert torch.equal(copied, tensor)
        assert copied.dtype == tensor.dtype


@pytest.mark.parametrize(("available", "is_enough"), [(99.0, False), (100.0, False), (200.0, True)])
def test_a_copy_leaves_half_of_the_available_memory(
    available: float, is_enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a copy of 68 bytes, but only if it was not asked for; memory that is there already is not counted."""
    monkeypatch.setattr(checkpoint, "available_memory", lambda: available)
    host = HostCopy(keeps_reserve=False)
    host.copy(some_files())
    careful = HostCopy(keeps_reserve=True)
    if not is_enough:
        with pytest.raises(MemoryError, match=rf"68 B of {available:.0f} B available"):
            careful.copy(some_files())
        return
    careful.copy(some_files())
    monkeypatch.setattr(checkpoint, "available_memory", lambda: 0.0)
    careful.copy(some_files())


def test_memory_that_cannot_be_allocated_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch raises a RuntimeError."""
    monkeypatch.setattr(checkpoint, "available_memory", lambda: float("inf"))
    with FakeTensorMode():
        huge = torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(MemoryError, match=r"can't allocate memory|not enough memory|out of memory"):
        HostCopy(keeps_reserve=True).copy(CheckpointFiles({"unet": {"x": huge}}, {}))


def test_the_system_says_how_much_memory_is_available() -> None:
    assert 1e6 < checkpoint.available_memory() < 1e15 or not Path("/proc/meminfo").exists()


class Recorder(TorchDispatchMode):
    """Records the copies, and everything for which the host waits for a device."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self._log = log

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name == "copy_":
            target, source, *rest = arguments
            is_async = bool(rest and rest[0]) or bool((settings or {}).get("non_blocking"))
            self._log.append(f"{source.device.type} to {target.device.type}{' without waiting' if is_async else ''}")
        elif name in ("_local_scalar_dense", "_to_copy"):
            self._log.append(name)
        return function(*arguments, **(settings or {}))


@pytest.fixture
def cuda_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fake tensors on a GPU; what is copied from them, which memory is pinned, and which events there are."""
    log: list[str] = []

    class Event:
        def synchronize(self) -> None:
            log.append("wait for the event")

    class Stream:
        def record_event(self) -> Event:
            log.append("event")
            return Event()

    empty = torch.empty

    def noted(*arguments: Any, pin_memory: bool = False, **settings: Any) -> torch.Tensor:
        log.append("pinned" if pin_memory else "pageable")
        return empty(*arguments, **settings)

    monkeypatch.setattr(torch, "empty", noted)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    with FakeTensorMode(), Recorder(log):
        yield log


def test_on_a_gpu_the_copies_are_queued_and_only_the_thread_waits_for_them(cuda_log: list[str]) -> None:
    """Pinned memory, asynchronous copies, one event behind them; a step count on the host is copied at once."""
    files, host = some_files("cuda"), HostCopy(keeps_reserve=False)
    cuda_log.clear()
    host.copy(files)
    copies = ["cuda to cpu without waiting"] * 2 + ["cpu to cpu", "event"]
    assert cuda_log == ["pinned", "pinned", "pageable", *copies]
    host.wait()
    assert cuda_log[-1] == "wait for the event"
    cuda_log.clear()
    host.copy(files)
    assert cuda_log == copies


# ------------------------------------------------------------------------------------------------------------ data


def image_set(num_images: int = 4, digest: str = "abc") -> ImageSet:
    return ImageSet(np.zeros((num_images, 1, 2, 2), np.uint8), None, None, np.arange(num_images), digest=digest)


def data_state(images: ImageSet | ImageStream) -> DataState:
    return DataState(images, "photos", Path("run"))


@pytest.fixture
def stream(tmp_path: Path) -> ImageStream:
    """A stream of twelve images for one process."""
    images = [encode(np.full((4, 4), number, np.uint8)) for number in range(12)]
    path = write_parquet(tmp_path / "x.parquet", images, [0] * 12, datasets.ClassLabel(names=["cat"]))
    config = DataConfig(source=str(path), streaming=True, resolution=4, num_channels=1, shuffle_buffer_size=4)
    return ImageStream(config, with_labels=False, seed=0, rank=0, num_processes=1, device=torch.device("cpu"))


def test_a_run_continues_with_the_same_data_only() -> None:
    """A checkpoint without a digest is compared by the number of images."""
    state = data_state(image_set()).state_dict() | {"loss_sums": []}
    assert state == {"num_images": 4, "data_digest": "abc", "streams": [], "class_order": "numbers", "loss_sums": []}
    for stored in (state, state | {"data_digest": ""}):
        data_state(image_set()).load_state_dict(stored)
        with pytest.raises(ConfigError, match="photos has 5 training images, but the run in run started with 4"):
            data_state(image_set(5)).load_state_dict(stored)
    with pytest.raises(ConfigError, match="photos has different images or labels"):
        data_state(image_set(digest="xyz")).load_state_dict(state)


def test_a_stream_continues_at_its_position(stream: ImageStream) -> None:
    stream.samples(0, 14)
    state = data_state(stream).state_dict()
    assert (state["num_images"], state["data_digest"]) == (0, "")
    expected, _ = stream.samples(14, 20)
    data_state(stream).load_state_dict(state)
    assert torch.equal(stream.samples(14, 20)[0], expected)


def test_a_stream_of_another_number_of_processes_restarts_its_epoch(
    stream: ImageStream, caplog: pytest.LogCaptureFixture
) -> None:
    """The earliest epoch of all processes."""
    stream.samples(0, 12)
    expected, _ = stream.samples(12, 18)
    data_state(stream).load_state_dict({"streams": [{"epoch": 2, "number": 3}, {"epoch": 1, "number": 5}]})
    assert torch.equal(stream.samples(0, 6)[0], expected)
    assert "by 2 processes and is now read by 1. It restarts epoch 1," in caplog.text


@pytest.mark.parametrize(("before", "is_warned"), [(0, False), (1, False), (2, True)])
def test_another_number_of_processes_is_a_warning(
    caplog: pytest.LogCaptureFixture, before: int, is_warned: bool
) -> None:
    state = data_state(image_set()).state_dict() | {"loss_sums": [[0.0, 0.0]] * before}
    data_state(image_set()).load_state_dict(state)
    assert ("The run used 2 processes and now uses 1." in caplog.text) is is_warned
    assert len(caplog.records) == is_warned
