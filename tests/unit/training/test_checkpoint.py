"""A checkpoint is whole or absent, whatever happens while it is written; one that was changed since is never used."""

import errno
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from ddpm_hf.config import TrainingConfig
from ddpm_hf.files import replace_folder, write_text
from ddpm_hf.training.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    TrainerState,
    find_latest,
    load_optimizer,
    prune,
    put_aside,
    read_snapshot,
    remove_unfinished,
    verify_checkpoint,
    write_checkpoint,
    write_snapshot,
)
from ddpm_hf.training.ema import EMA, decay_laws
from ddpm_hf.training.optim import build_optimizer
from tests.conftest import tiny_unet

FILES = {"unet/weights": b"w" * 5000, "unet/config.json": b"{}", "state.json": b"{}"}


def content(mark: str = "") -> Callable[[Path], None]:
    """Returns a writer of a few files in folders."""

    def write(folder: Path) -> None:
        for name, data in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data + mark.encode())

    return write


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------- whole or not at all

# Python announces under these names what it does to a file system; syncing has none.
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def run_until(action: Callable[[], object], stop_at: int, how: str) -> bool:
    """Runs an action in a child process and lets it fail at its n-th change to the file system.

    Args:
        action: What to run.
        stop_at: Which change fails; syncing a file or folder counts as one, and a file that could not be written is
            there but empty.
        how: "kill" ends the process before the change, "full disk" raises once in its place.

    Returns:
        Whether the action came to its end without reaching the change.
    """
    child = os.fork()
    if child == 0:
        _run_and_exit(action, stop_at, how)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def _run_and_exit(action: Callable[[], object], stop_at: int, how: str) -> None:
    """The child's part of `run_until`: never returns."""
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


HOWS = ["kill", "full disk"]


@pytest.mark.parametrize("how", HOWS)
def test_an_older_checkpoint_survives_whatever_stops_the_writing_of_the_next(tmp_path: Path, how: str) -> None:
    root = tmp_path / "checkpoints"
    write_checkpoint(root, 2, content("old"))
    old = tree(root / "step_00000002")
    for stop_at in range(1, 1000):
        is_done = run_until(lambda: write_checkpoint(root, 4, content("new")), stop_at, how)
        latest, skipped = find_latest(root)
        assert latest is not None
        assert not skipped, f"change {stop_at} left half a checkpoint behind"
        assert latest.step in (2, 4)
        assert tree(root / "step_00000002") == old
        if is_done:
            break
        again = write_checkpoint(root, 4, content("new"))
        assert find_latest(root) == (again, [])
        assert sorted(entry.name for entry in root.iterdir()) == ["step_00000002", "step_00000004"]
        shutil.rmtree(again.path)
    assert is_done
    assert stop_at > 10, "there is much to fail at"
    assert latest.step == 4


@pytest.mark.parametrize("how", HOWS)
def test_a_checkpoint_survives_whatever_stops_a_second_writing_of_the_same_step(tmp_path: Path, how: str) -> None:
    """A signal in the step that has just saved makes the run save once more."""
    write_checkpoint(tmp_path, 2, content())
    before = tree(tmp_path / "step_00000002")
    for stop_at in range(1, 1000):
        is_done = run_until(lambda: write_checkpoint(tmp_path, 2, content()), stop_at, how)
        assert find_latest(tmp_path) == (Checkpoint(tmp_path / "step_00000002", 2), [])
        if is_done:
            break
    assert is_done
    assert tree(tmp_path / "step_00000002") == before


@pytest.mark.parametrize("how", HOWS)
def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, how: str) -> None:
    """A kill between the two renames leaves no folder, but the next call begins by putting the old one back."""
    path, expected = tmp_path / "pipeline", {}
    for mark in ("old", "new"):
        replace_folder(path, content(mark))
        expected[mark] = tree(path)
    replace_folder(path, content("old"))

    def fail(_: Path) -> None:
        raise RuntimeError("nothing to write")

    for stop_at in range(1, 1000):
        is_done = run_until(lambda: replace_folder(path, content("new")), stop_at, how)
        with pytest.raises(RuntimeError, match="nothing to write"):
            replace_folder(path, fail)
        assert tree(path) in expected.values(), f"change {stop_at} lost both"
        assert [entry.name for entry in tmp_path.iterdir()] == ["pipeline"]
        if is_done:
            break
        replace_folder(path, content("old"))
    assert is_done
    assert tree(path) == expected["new"]


@pytest.mark.parametrize("how", HOWS)
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, how: str) -> None:
    path = tmp_path / "config.yaml"
    write_text(path, "old")
    for stop_at in range(1, 100):
        is_done = run_until(lambda: write_text(path, "new"), stop_at, how)
        assert path.read_text() in ("old", "new")
        if is_done:
            break
        write_text(path, "old")
        assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]
    assert is_done
    assert path.read_text() == "new"


def test_a_file_that_cannot_be_replaced_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_text(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_text(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("config.yaml", "old")]


def test_a_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    """Somebody else's folder may hold one at the place of the file that is written first."""
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("precious")
    for name in ("config.yaml", ".config.yaml.writing"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    write_text(tmp_path / "run" / "config.yaml", "new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert [(entry.name, entry.read_text()) for entry in (tmp_path / "run").iterdir()] == [("config.yaml", "new")]


def test_everything_is_synced_before_the_rename_that_makes_it_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut the name must not be there without the content, nor the content without the name."""
    log: list[object] = []
    sync, rename = os.fsync, Path.rename

    def logged_sync(descriptor: int) -> None:
        log.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def logged_rename(path: Path, target: Path) -> Path:
        log.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", logged_sync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    root = tmp_path / "checkpoints"
    path = write_checkpoint(root, 2, content()).path
    renamed_at = log.index("rename")
    assert log.count("rename") == 1
    everything = {entry.stat().st_ino for entry in (path, *path.rglob("*"))}
    assert len(everything) == 1 + 1 + len(FILES) + 1
    assert everything <= set(log[:renamed_at])
    assert root.stat().st_ino in log[renamed_at:]
    assert tmp_path.stat().st_ino in log, "the folder of all checkpoints is new, too"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_as_readable_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors makes files of mode 0600 whatever the umask."""

    def write(folder: Path) -> None:
        content()(folder)
        for file in folder.rglob("*"):
            if file.is_file():
                file.chmod(0o600)

    before = os.umask(umask)
    try:
        path = write_checkpoint(tmp_path, 2, write).path
    finally:
        assert os.umask(before) == umask, "the umask is as it was"
    assert {file.stat().st_mode & 0o777 for file in path.rglob("*") if file.is_file()} == {mode}


def test_a_failed_write_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        content()(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint(tmp_path, 2, write)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_of_the_same_step_is_put_aside_and_written_again(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 2, content("old")).path
    (path / "state.json").unlink()
    write_checkpoint(tmp_path, 2, content("new"))
    assert verify_checkpoint(path).step == 2
    assert (path / "unet" / "weights").read_bytes().endswith(b"new")
    assert (tmp_path / "damaged-step_00000002" / "unet" / "weights").exists()


# --------------------------------------------------------------------------------------------------------- verify


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "unet" / "weights").read_bytes())
    data[2500] ^= 1
    (path / "unet" / "weights").write_bytes(data)


def change_manifest(**changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps(manifest | changes))

    return change


def link_a_file(path: Path) -> None:
    (path / "unet" / "weights").rename(path.parent / "elsewhere")
    (path / "unet" / "weights").symlink_to(path.parent / "elsewhere")


def link_a_folder(path: Path) -> None:
    (path / "unet").rename(path.parent / "elsewhere")
    (path / "unet").symlink_to(path.parent / "elsewhere")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: os.truncate(path / "unet" / "weights", 4999), "unet/weights is damaged"),
    "emptied": (lambda path: os.truncate(path / "state.json", 0), "state.json is damaged"),
    "a flipped bit": (flip_a_bit, "unet/weights is damaged"),
    "a missing file": (lambda path: (path / "unet" / "config.json").unlink(), "unet/config.json is missing"),
    "a missing folder": (lambda path: shutil.rmtree(path / "unet"), "unet/config.json is missing"),
    "a foreign file": (lambda path: (path / "unet" / "x.pkl").write_bytes(b""), "unet/x.pkl does not belong to it"),
    "a linked file": (link_a_file, "unet/weights is a link"),
    "a linked folder": (link_a_folder, "unet is a link"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), f"{MANIFEST} is missing or unreadable"),
    "half a manifest": (lambda path: os.truncate(path / MANIFEST, 100), f"{MANIFEST} is missing or unreadable"),
    "a list as manifest": (lambda path: (path / MANIFEST).write_text("[]"), f"{MANIFEST} is missing or unreadable"),
    "binary manifest": (lambda path: (path / MANIFEST).write_bytes(b"\xff"), f"{MANIFEST} is missing or unreadable"),
    "a deep manifest": (
        lambda path: (path / MANIFEST).write_text("[" * 100_000),
        f"{MANIFEST} is missing or unreadable",
    ),
    "strange files": (change_manifest(files="abc"), f"{MANIFEST} is missing or unreadable"),
    "strange step": (change_manifest(step="two"), f"{MANIFEST} is missing or unreadable"),
    "other size": (change_manifest(files={}), "does not belong to it"),
    "another schema": (change_manifest(schema_version=99), "written by another version (schema 99, this is 1)"),
    "everything gone": (lambda path: [shutil.rmtree(path), path.mkdir()], f"{MANIFEST} is missing or unreadable"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_is_not_what_was_written_is_refused(tmp_path: Path, damage: str) -> None:
    path = write_checkpoint(tmp_path, 2, content()).path
    assert verify_checkpoint(path) == Checkpoint(path, 2)
    do_damage, reason = DAMAGE[damage]
    do_damage(path)
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(path)
    assert reason in str(caught.value)


def fail_to_read(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes one file of one checkpoint unreadable, as a bad sector or a foreign owner does."""
    open_path = Path.open

    def open_or_fail(path: Path, *arguments: Any, **settings: Any) -> Any:
        if str(path).endswith(name):
            raise OSError(number, os.strerror(number), str(path))
        return open_path(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", open_or_fail)


def test_a_checkpoint_on_a_bad_sector_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = write_steps(tmp_path, 2, 4)
    fail_to_read("step_00000004/unet/weights", errno.EIO, monkeypatch)
    latest, skipped = find_latest(tmp_path)
    assert latest == Checkpoint(one, 2)
    assert skipped == ["step_00000004: unet/weights cannot be read (Input/output error)"]


def test_a_checkpoint_that_this_user_may_not_read_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps would be lost for want of a chmod."""
    write_steps(tmp_path, 2, 4)
    fail_to_read("step_00000004/state.json", errno.EACCES, monkeypatch)
    with pytest.raises(PermissionError, match=r"step_00000004/state\.json"):
        find_latest(tmp_path)


def fail_to_list(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes one folder impossible to list; pathlib takes such a one for an empty one."""
    scandir = os.scandir

    def scandir_or_fail(path: Any = ".") -> Any:
        if str(path).endswith(name):
            raise OSError(number, os.strerror(number), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir_or_fail)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_checkpoints_that_cannot_be_listed_are_not_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Training would start over, and take their metrics with it."""
    write_steps(tmp_path / "checkpoints", 2, 4)
    fail_to_list("checkpoints", number, monkeypatch)
    with pytest.raises(OSError, match=os.strerror(number)):
        find_latest(tmp_path / "checkpoints")


def test_a_part_of_a_checkpoint_that_cannot_be_listed_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a chmod mends is not given up; a bad sector is."""
    one, _ = write_steps(tmp_path, 2, 4)
    with monkeypatch.context() as patch:
        fail_to_list("step_00000004/unet", errno.EACCES, patch)
        with pytest.raises(PermissionError, match="step_00000004/unet"):
            find_latest(tmp_path)
    fail_to_list("step_00000004/unet", errno.EIO, monkeypatch)
    latest, skipped = find_latest(tmp_path)
    assert latest == Checkpoint(one, 2)
    assert skipped == ["step_00000004: its files cannot be listed (Input/output error)"]


def test_checkpoints_on_a_disk_that_is_not_there_are_not_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "not mounted")
    with pytest.raises(CheckpointError, match="is a link that leads nowhere; mount the disk"):
        find_latest(tmp_path / "checkpoints")


def test_a_checkpoint_is_not_lost_where_old_ones_cannot_be_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_steps(tmp_path / "checkpoints", 2, 4)
    fail_to_list("checkpoints", errno.EIO, monkeypatch)
    prune(tmp_path / "checkpoints", num_kept=1)
    assert "could not be looked for: [Errno 5] Input/output error" in caplog.text


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    """Its weights would be taken for those of another step, and the data of the steps between for seen."""
    path = write_checkpoint(tmp_path, 2, content()).path
    with pytest.raises(CheckpointError, match=r"it was renamed: manifest\.json says step 2"):
        verify_checkpoint(path.rename(tmp_path / "step_00000005"))
    with pytest.raises(CheckpointError, match="is not named like a checkpoint"):
        verify_checkpoint((tmp_path / "step_00000005").rename(tmp_path / "best"))


def test_a_checkpoint_is_its_files_wherever_the_folder_lies(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "here", 123_456_789, content()).path
    shutil.copytree(path, tmp_path / "there" / path.name)
    assert verify_checkpoint(tmp_path / "there" / path.name).step == 123_456_789


# ---------------------------------------------------------------------------------------- find, put aside, prune


def write_steps(root: Path, *steps: int) -> list[Path]:
    return [write_checkpoint(root, step, content(str(step))).path for step in steps]


def test_the_newest_checkpoint_is_found_by_its_number(tmp_path: Path) -> None:
    *_, newest = write_steps(tmp_path, 8, 9, 10, 99_999_999, 100_000_000)
    assert find_latest(tmp_path) == (Checkpoint(newest, 100_000_000), [])


def test_where_there_is_no_checkpoint_none_is_found(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "missing") == (None, [])
    for name in ("best", "step_1", "step_0000000x", ".writing-step_00000004", "damaged-step_00000004", "last.ckpt"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000004").write_text("a file")
    assert find_latest(tmp_path) == (None, [])


def test_damaged_newer_checkpoints_are_passed_over_and_named(tmp_path: Path) -> None:
    one, two, three = write_steps(tmp_path, 2, 4, 6)
    flip_a_bit(three)
    (two / "state.json").unlink()
    latest, skipped = find_latest(tmp_path)
    assert latest == Checkpoint(one, 2)
    assert [line.partition(":")[0] for line in skipped] == ["step_00000006", "step_00000004"]
    assert "unet/weights is damaged" in skipped[0]
    assert "state.json is missing" in skipped[1]


def test_a_damaged_older_checkpoint_is_not_looked_at(tmp_path: Path) -> None:
    old, new = write_steps(tmp_path, 2, 4)
    flip_a_bit(old)
    assert find_latest(tmp_path) == (Checkpoint(new, 4), [])


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_zero(tmp_path: Path) -> None:
    for path in write_steps(tmp_path, 2, 4):
        flip_a_bit(path)
    with pytest.raises(CheckpointError) as caught:
        find_latest(tmp_path)
    message = str(caught.value)
    assert "step_00000004: unet/weights is damaged" in message
    assert "step_00000002: unet/weights is damaged" in message
    assert "restore one, or start anew in another training.output_dir" in message


def test_a_checkpoint_put_aside_is_kept_and_not_found_again(tmp_path: Path) -> None:
    one, two = write_steps(tmp_path, 2, 4)
    (tmp_path / "damaged-step_00000004").mkdir()
    target = put_aside(two)
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
    """Beside the newest, and also where it is one of them."""
    paths = write_steps(tmp_path, 2, 4, 6, 8)
    prune(tmp_path, 2, best_step=4)
    assert [path for path in paths if path.exists()] == paths[1:]
    prune(tmp_path, 2, best_step=8)
    assert [path for path in paths if path.exists()] == paths[2:]


def test_an_old_checkpoint_that_cannot_be_removed_is_named_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old, *_ = write_steps(tmp_path, 2, 4, 6)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rmdir", refuse)
    prune(tmp_path, 2)
    assert f"The old checkpoint {old} could not be removed" in caplog.text
    latest, _ = find_latest(tmp_path)
    assert latest is not None
    assert latest.step == 6


def test_what_a_kill_left_behind_is_removed(tmp_path: Path) -> None:
    (path,) = write_steps(tmp_path, 2)
    (tmp_path / ".writing-step_00000004").mkdir()
    content()(tmp_path / ".writing-step_00000004")
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    remove_unfinished(tmp_path / "missing")


# ------------------------------------------------------------------------------------------------------- snapshot


def trained(seed: int) -> tuple[UNet2DModel, EMA, torch.optim.Optimizer]:
    """Returns a tiny network after two updates, its average and its optimiser."""
    unet = tiny_unet(10)
    config = TrainingConfig(learning_rate=0.1, ema_decay=0.9, ema_warmup="none", posthoc_ema=True)
    ema = EMA(unet, decay_laws(config))
    optimizer = build_optimizer(unet.parameters(), config)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        for parameter in unet.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        ema.update(unet)
    return unet, ema, optimizer


def everything(unet: UNet2DModel, ema: EMA, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = dict(unet.named_parameters())
    names = list(tensors)
    for average in ema.names:
        tensors |= {f"{names[number]} {average}": tensor for number, tensor in enumerate(ema.tensors(average))}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{names[number]} {name}": moment for name, moment in moments.items()}
    assert len(tensors) == 7 * len(names)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_snapshot_gives_every_bit_back(tmp_path: Path) -> None:
    run = trained(0)
    state = TrainerState(
        global_step=7, num_ema_updates=2, num_skipped=5, num_consecutive_skipped=1, loss_sums=[[0.1, 3.0]]
    )
    expected = everything(*run)
    write_snapshot(tmp_path, *run, state, "training: {}\n")
    assert_equal(everything(*run), expected)

    unet, ema, optimizer = trained(1)
    found, tensors = read_snapshot(tmp_path, unet, ema)
    load_optimizer(optimizer, unet, tensors)
    assert found == state
    assert ema.num_updates == 2
    assert_equal(everything(unet, ema, optimizer), expected)


def test_a_run_goes_on_from_a_snapshot_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Bit for bit: the optimiser's step count and moments are what its next update depends on."""

    def one_more_update(unet: UNet2DModel, ema: EMA, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        for parameter in unet.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        ema.update(unet)
        return everything(unet, ema, optimizer)

    run = trained(0)
    write_snapshot(tmp_path, *run, TrainerState(num_ema_updates=2), "")
    unet, ema, optimizer = trained(1)
    load_optimizer(optimizer, unet, read_snapshot(tmp_path, unet, ema)[1])
    assert_equal(one_more_update(unet, ema, optimizer), one_more_update(*run))


def test_an_optimizer_that_never_stepped_is_restored_as_such(tmp_path: Path) -> None:
    """Every update so far may have been skipped."""
    unet = tiny_unet(10)
    config = TrainingConfig(posthoc_ema=True)
    ema, optimizer = EMA(unet, decay_laws(config)), build_optimizer(unet.parameters(), config)
    write_snapshot(tmp_path, unet, ema, optimizer, TrainerState(), "")
    other_unet, other_ema, other_optimizer = trained(0)
    load_optimizer(other_optimizer, other_unet, read_snapshot(tmp_path, other_unet, other_ema)[1])
    assert other_optimizer.state_dict()["state"] == {}


def test_a_disk_that_is_full_in_the_middle_of_a_tensor_is_an_os_error(tmp_path: Path) -> None:
    """safetensors has an error of its own for this; a limit on the size of files stands for the full disk."""
    run = trained(0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_checkpoint(tmp_path, 2, lambda folder: write_snapshot(folder, *run, TrainerState(), ""))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_nothing_in_a_snapshot_is_a_pickle(tmp_path: Path) -> None:
    write_snapshot(tmp_path, *trained(0), TrainerState(), "")
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json", ".yaml"}
    for path in tmp_path.rglob("*.safetensors"):
        assert path.read_bytes()[8:9] == b"{", "a safetensors file begins with the length of its JSON header"


def test_the_networks_of_a_snapshot_load_with_diffusers_alone(tmp_path: Path) -> None:
    unet, ema, optimizer = trained(0)
    write_snapshot(tmp_path, unet, ema, optimizer, TrainerState(), "")
    for folder, expected in (("unet", list(unet.parameters())), *((name, ema.tensors(name)) for name in ema.names)):
        loaded = UNet2DModel.from_pretrained(tmp_path, subfolder=folder, use_safetensors=True)
        assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), expected, strict=True))
