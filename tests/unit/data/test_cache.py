"""Images are decoded once, by one process, and no process reads an incomplete cache."""

import builtins
import errno
import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from ddpm_hf.config import DataConfig
from ddpm_hf.data import ImageSet, cache
from tests.conftest import DIGITS
from tests.unit.data.helpers import GRAY, RGB, encode, open_source, pixels_of, refusal, write_files, write_parquet

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def caches_in(cache_dir: Path) -> list[Path]:
    """Return the caches, and assert that there are no other files."""
    entries = list(cache_dir.iterdir())
    assert all(entry.is_dir() and len(entry.name) == 32 for entry in entries), entries
    return entries


def state_of(folder: Path) -> list[tuple[int, int]]:
    return [(file.stat().st_ino, file.stat().st_mtime_ns) for file in sorted(folder.iterdir())]


def test_images_are_decoded_once(tmp_path: Path, cache_dir: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(RGB), encode(255 - RGB)], [0, 1])
    first = open_source(path, cache_dir, with_labels=True)
    (folder,) = caches_in(cache_dir)
    before = state_of(folder)
    second = open_source(path, cache_dir)
    assert state_of(folder) == before
    assert np.array_equal(pixels_of(first), pixels_of(second))


def test_a_cache_of_a_folder_that_cannot_be_written_to_is_used(tmp_path: Path, cache_dir: Path) -> None:
    """A shared disk may be read-only."""
    folder = write_files(tmp_path / "x", {"a.png": encode(RGB)})
    open_source(folder, cache_dir)
    cache_dir.rename(tmp_path / "real")
    (cache_dir).symlink_to(tmp_path / "real")
    before = os.stat(tmp_path / "real").st_mtime_ns
    open_source(folder, cache_dir)
    assert os.stat(tmp_path / "real").st_mtime_ns == before, "no lock is taken to read"


@pytest.mark.parametrize(
    "settings",
    [
        {"resolution": 4}, {"num_channels": 4}, {"crop_before_resize": 4}, {"resolution": 4, "resize_to": 5},
        {"resolution": 4, "resize_filter": "box"}, {"resolution": 4, "crop": "random"},
        {"num_channels": 3, "background": "white"}, {"resolution": [4, 5]},
    ],
    ids=str,
)  # fmt: skip
def test_preprocessing_settings_need_another_cache(tmp_path: Path, cache_dir: Path, settings: dict[str, Any]) -> None:
    folder = write_files(tmp_path / "x", {"a.png": encode(RGB), "b.png": encode(255 - RGB)})
    open_source(folder, cache_dir)
    open_source(folder, cache_dir, **settings)
    assert len(caches_in(cache_dir)) == 2


@pytest.mark.parametrize(
    "settings",
    [{"random_flip": True}, {"validation_fraction": 0.5}, {"device_resident": True}, {"on_bad_image": "skip"}],
    ids=str,
)
def test_other_settings_share_the_cache(tmp_path: Path, cache_dir: Path, settings: dict[str, Any]) -> None:
    folder = write_files(tmp_path / "x", {"a.png": encode(RGB), "b.png": encode(255 - RGB)})
    open_source(folder, cache_dir)
    open_source(folder, cache_dir, **settings)
    assert len(caches_in(cache_dir)) == 1


def test_changed_images_are_decoded_again(tmp_path: Path, cache_dir: Path) -> None:
    digests = set()
    for pixels in (RGB, 255 - RGB):
        folder = write_files(tmp_path / "x", {"a.png": encode(pixels)})
        path = write_parquet(tmp_path / "x.parquet", [encode(pixels)])
        for source in (folder, path):
            images = open_source(source, cache_dir)
            assert np.array_equal(pixels_of(images)[0], pixels), "the content counts, not the name"
            digests.add(images.digest)
    assert len(digests) == 2, "the digest depends only on the content"
    assert len(caches_in(cache_dir)) == 4


KEYS = {
    "8f1294a76e42620f163ce7f8f3cc7e41": {},
    "4225ae339154dc8087b97c5b8b6b14dd": {"resolution": 64, "crop": "random", "resize_to": 72},
    "785d5a2bd16242d82cf5d757723b2749": {
        "resolution": [6, 7],
        "resize_filter": "box",
        "crop_before_resize": [0, 0, 9, 9],
        "num_channels": 4,
    },
    "246ea402b53e45154ade167f9c147fa3": {"num_channels": 3, "background": "white"},
}


@pytest.mark.parametrize(("key", "settings"), KEYS.items())
def test_cache_keys_never_change(key: str, settings: dict[str, Any]) -> None:
    """Otherwise the caches of earlier versions would be decoded again."""
    labels = np.array([0, 1, 1], np.int64)
    source = cache.Source("photos", "folder", "fingerprint", 3, lambda rows: [], labels, ("cat", "dog"))
    assert cache.cache_key(source, DataConfig(**settings)) == key


def test_digests_never_change(tmp_path: Path, cache_dir: Path) -> None:
    """Otherwise runs of earlier versions would refuse to continue."""
    gif = b"GIF89a\x01\0\x01\0\x80\0\0\xff\xff\xff\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"
    folder = write_files(tmp_path / "x", {"cat/1.gif": gif, "dog/2.gif": gif})
    np.save(tmp_path / "x.npy", np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3))
    assert open_source(folder, cache_dir).digest == "59c64d86973222384117518c9f904846"
    assert open_source(tmp_path / "x.npy", cache_dir).digest == "707270bed69ce84e29b4699b8cca5098"


def test_labels_are_part_of_the_digest(tmp_path: Path, cache_dir: Path) -> None:
    images = {f"{name}.png": encode(RGB) for name in ("cat/1", "dog/2")}
    one = open_source(write_files(tmp_path / "x", images), cache_dir)
    images = {f"{name}.png": encode(RGB) for name in ("cat/1", "cat/2", "dog/0")}
    two = open_source(write_files(tmp_path / "y", images), cache_dir, split="train[:2]")
    assert one.digest != two.digest


def test_a_class_that_only_another_split_has_is_known(tmp_path: Path, cache_dir: Path) -> None:
    """The classes are those of all splits, so they may change without a change of this split."""
    files = {f"{split}/{name}/1.png": encode(RGB) for split in ("train", "test") for name in ("b", "c")}
    folder = write_files(tmp_path / "x", files)
    assert open_source(folder, cache_dir).class_names == ("b", "c")
    write_files(folder, {"test/a/1.png": encode(RGB)})
    images = open_source(folder, cache_dir, with_labels=True)
    assert [images.class_names, images.labels.tolist()] == [("a", "b", "c"), [1, 2]]


def test_a_part_of_a_split_has_its_own_cache(tmp_path: Path, cache_dir: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(GRAY + np.uint8(number)) for number in range(4)])
    for split, first, count in (("train", 0, 4), ("train[2:]", 2, 2), ("train[:1]", 0, 1)):
        images = open_source(path, cache_dir, split=split)
        assert len(images) == count
        assert np.array_equal(pixels_of(images)[0, ..., 0], GRAY + np.uint8(first))


# ------------------------------------------------------------------------------------------------------ repaired images


def open_twice(source: Path, cache_dir: Path, repair: Callable[[], object]) -> tuple[ImageSet, ImageSet]:
    settings: dict[str, Any] = {"on_bad_image": "skip", "max_bad_fraction": 0.5}
    before = open_source(source, cache_dir, **settings)
    repair()
    return before, open_source(source, cache_dir, **settings)


def test_an_unreachable_image_is_read_when_it_is_reachable_again(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example after a change of permissions: size and modification time stay the same."""
    folder = write_files(tmp_path / "x", {f"{number}.png": encode(RGB + np.uint8(number)) for number in range(4)})
    really_open = builtins.open

    def refuse(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file).endswith("1.png"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return really_open(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", refuse)  # root may read everything
    before, after = open_twice(folder, cache_dir, lambda: monkeypatch.setattr(builtins, "open", really_open))
    assert [before.num_bad, after.num_bad] == [1, 0]
    assert np.array_equal(pixels_of(after)[1], RGB + np.uint8(1))
    assert len(caches_in(cache_dir)) == 1, "the cache without the image is replaced"


def table_of_files(folder: Path) -> Path:
    """Write a table that refers to the images beside it."""
    paths = [str(folder / f"{number}.png") for number in range(4)]
    write_files(folder, {Path(path).name: encode(RGB) for path in paths})
    cells = [{"bytes": None, "path": path} for path in paths]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array(cells, kind)}), folder / "x.parquet")
    return folder / "x.parquet"


def test_a_missing_file_of_a_table_is_read_when_it_is_back(tmp_path: Path, cache_dir: Path) -> None:
    table = table_of_files(tmp_path / "x")
    (tmp_path / "x" / "2.png").rename(tmp_path / "away.png")
    before, after = open_twice(table, cache_dir, lambda: (tmp_path / "away.png").rename(tmp_path / "x" / "2.png"))
    assert [before.num_bad, after.num_bad] == [1, 0]


def test_a_modified_file_of_a_table_is_read_again(tmp_path: Path, cache_dir: Path) -> None:
    table, changed = table_of_files(tmp_path / "x"), tmp_path / "x" / "0.png"
    before, after = open_twice(table, cache_dir, lambda: changed.write_bytes(encode(255 - RGB)))
    assert np.array_equal(pixels_of(before)[0], RGB)
    assert np.array_equal(pixels_of(after)[0], 255 - RGB)


# ---------------------------------------------------------------------------------------------------- incomplete caches


def change_meta(folder: Path, **fields: object) -> None:
    content = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(content | fields))


def as_killed_build(folder: Path) -> None:
    (folder / "meta.json").unlink()
    folder.rename(folder.with_name(f"{folder.name}.building-0123456789abcdef"))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no meta.json": lambda folder: (folder / "meta.json").unlink(),
    "half a meta.json": lambda folder: os.truncate(folder / "meta.json", 50),
    "foreign meta.json": lambda folder: (folder / "meta.json").write_text("[1, 2]"),
    "pixels cut off": lambda folder: os.truncate(folder / "pixels.bin", 9 * GRAY.size - 1),
    "pixels too long": lambda folder: os.truncate(folder / "pixels.bin", 9 * GRAY.size + 1),
    "no pixels": lambda folder: (folder / "pixels.bin").unlink(),
    "no labels": lambda folder: (folder / "labels.npy").unlink(),
    "another version": lambda folder: change_meta(folder, version=1),
    "another key": lambda folder: change_meta(folder, key="x"),
    "a killed build": as_killed_build,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_an_incomplete_cache_is_rebuilt(tmp_path: Path, cache_dir: Path, kind: str) -> None:
    path = write_parquet(
        tmp_path / "x.parquet", [encode(GRAY + np.uint8(number)) for number in range(9)], [0, 1, 0] * 3
    )
    expected = pixels_of(open_source(path, cache_dir, with_labels=True)).copy()
    (folder,) = caches_in(cache_dir)
    DAMAGE[kind](folder)
    again = open_source(path, cache_dir, with_labels=True)
    assert np.array_equal(pixels_of(again), expected)
    assert again.labels.tolist() == [0, 1, 0] * 3
    assert caches_in(cache_dir) == [folder]


def test_a_failed_build_leaves_no_files(tmp_path: Path, cache_dir: Path) -> None:
    folder = write_files(tmp_path / "x", {"a.png": encode(RGB), "b.png": encode(RGB)[:-30]})
    assert "cannot be decoded" in refusal(folder, cache_dir)
    assert caches_in(cache_dir) == []


# --------------------------------------------------------------------------------------------------------- the disk


def test_the_default_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root(DataConfig()) == tmp_path / "xdg" / "ddpm_hf" / "images"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root(DataConfig()) == tmp_path / ".cache" / "ddpm_hf" / "images"
    assert cache.cache_root(DataConfig(cache_dir="~/x")) == tmp_path / "x"


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(DIGITS, tmp_path / "file" / "cache")
    assert "cannot be written" in message
    assert "set data.cache_dir to another folder" in message


def test_space_is_checked_before_anything_is_decoded(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoded images have 2 x 3 x 1000 x 1000 bytes."""
    folder = write_files(tmp_path / "x", {"a.png": encode(RGB), "b.png": encode(RGB)})
    usage = shutil.disk_usage(tmp_path)._replace(free=5 * 2**20)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(cache, "decode_all", lambda *_: pytest.fail("began to decode"))
    message = refusal(folder, cache_dir, resolution=1000)
    assert (
        f"the 2 decoded images need 6.0 MB, but {cache_dir} has 5.2 MB free; set data.cache_dir to another folder"
        in message
    )
    assert caches_in(cache_dir) == []


def test_a_full_disk_is_an_error_with_a_fix(tmp_path: Path, cache_dir: Path) -> None:
    """In a process that may write at most 1000 bytes to a file."""
    folder = write_files(tmp_path / "x", {f"{number}.png": encode(RGB) for number in range(40)})

    def attempt(messages: Any) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        messages.put(refusal(folder, cache_dir))

    messages = FORK.Queue()
    process = FORK.Process(target=attempt, args=(messages,))
    process.start()
    message = messages.get(timeout=600)
    process.join(timeout=600)
    assert (
        f"cannot be written to {cache_dir} ({os.strerror(errno.EFBIG)}); set data.cache_dir to another folder"
        in message
    )
    assert caches_in(cache_dir) == []


# ------------------------------------------------------------------------------------------------ several processes


class Builder:
    """A process that opens a dataset, and reports when it begins to decode and the sum of the pixels.

    Args:
        source: The dataset.
        cache_dir: Folder of the caches.
        host: The host name that the process uses.
        is_paused: Whether it waits for `resume` before it decodes.
        lease_seconds: Duration of a lease that is not renewed.
    """

    def __init__(
        self, source: Path, cache_dir: Path, *, host: str = "here", is_paused: bool = False, lease_seconds: float = 60.0
    ) -> None:
        self._events: Any = FORK.Queue()
        self._may_continue = FORK.Event()
        self._settings = source, cache_dir, host, is_paused, lease_seconds
        self.process: BaseProcess = FORK.Process(target=self._run, daemon=True)
        self.process.start()

    def _run(self) -> None:
        source, cache_dir, host, is_paused, lease_seconds = self._settings
        decode_all = cache.decode_all

        def report_and_decode(*arguments: Any) -> Any:
            self._events.put("decoding")
            if is_paused:
                self._may_continue.wait()
            return decode_all(*arguments)

        cache.decode_all = report_and_decode
        cache._LEASE_SECONDS = lease_seconds
        # Renewed often, so that a slow machine does not lose its lease.
        cache.SoftFileLease = partial(cache.SoftFileLease, heartbeat_interval=0.2)
        socket.gethostname = lambda: host
        self._events.put(int(pixels_of(open_source(source, cache_dir)).astype(int).sum()))

    def next(self, timeout: float = 600) -> object:
        """Return the next report."""
        return self._events.get(timeout=timeout)

    def has_no_report_for(self, seconds: float) -> bool:
        time.sleep(seconds)
        return bool(self._events.empty())

    def resume(self) -> None:
        self._may_continue.set()

    def join(self) -> None:
        self.process.join(timeout=600)
        assert self.process.exitcode == 0


@pytest.fixture
def many_images(tmp_path: Path) -> Path:
    return write_files(tmp_path / "x", {f"{number}.png": encode(GRAY + np.uint8(number)) for number in range(100)})


def sum_of(number: int = 100) -> int:
    return int(sum((GRAY + np.uint8(number)).astype(int).sum() for number in range(number)))


def test_two_processes_that_start_together_decode_once(many_images: Path, cache_dir: Path) -> None:
    builders = [Builder(many_images, cache_dir) for _ in range(2)]
    reports = [[builder.next()] for builder in builders]
    for builder, events in zip(builders, reports, strict=True):
        if events == ["decoding"]:
            events.append(builder.next())
        builder.join()
    assert sorted(map(len, reports)) == [1, 2], "only one of them decodes"
    assert [events[-1] for events in reports] == [sum_of(), sum_of()]
    assert len(caches_in(cache_dir)) == 1


def test_a_waiting_process_takes_over_from_a_killed_one(many_images: Path, cache_dir: Path) -> None:
    killed = Builder(many_images, cache_dir, is_paused=True)
    assert killed.next() == "decoding"
    waiting = Builder(many_images, cache_dir)
    assert waiting.has_no_report_for(0.5)
    killed.process.kill()
    killed.process.join()
    assert [waiting.next(), waiting.next()] == ["decoding", sum_of()]
    waiting.join()
    assert len(caches_in(cache_dir)) == 1, "the files of the killed process are removed"


def test_a_process_on_another_machine_loses_its_lease_when_it_is_suspended(many_images: Path, cache_dir: Path) -> None:
    """Only its lease shows whether it is running. When it continues, it uses the cache of its successor."""
    elsewhere = Builder(many_images, cache_dir, host="elsewhere", is_paused=True, lease_seconds=1)
    assert elsewhere.next() == "decoding"
    os.kill(elsewhere.process.pid or 0, signal.SIGSTOP)
    waiting = Builder(many_images, cache_dir, lease_seconds=1)
    assert [waiting.next(), waiting.next()] == ["decoding", sum_of()]
    waiting.join()
    before = [state_of(folder) for folder in cache_dir.iterdir() if len(folder.name) == 32]
    os.kill(elsewhere.process.pid or 0, signal.SIGCONT)
    elsewhere.resume()
    assert elsewhere.next() == sum_of()
    elsewhere.join()
    assert [state_of(folder) for folder in caches_in(cache_dir)] == before


@pytest.mark.slow
def test_a_process_on_another_machine_is_waited_for_while_it_renews_its_lease(
    many_images: Path, cache_dir: Path
) -> None:
    elsewhere = Builder(many_images, cache_dir, host="elsewhere", is_paused=True, lease_seconds=8)
    assert elsewhere.next() == "decoding"
    waiting = Builder(many_images, cache_dir, lease_seconds=8)
    assert waiting.has_no_report_for(12)
    elsewhere.resume()
    assert [elsewhere.next(), waiting.next()] == [sum_of(), sum_of()]
    elsewhere.join()
    waiting.join()


def test_a_waiting_process_logs_what_it_waits_for(
    many_images: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder continues only after the warning."""
    builder = Builder(many_images, cache_dir, is_paused=True)
    assert builder.next() == "decoding"
    logged: list[str] = []
    monkeypatch.setattr(cache, "_WAIT_SECONDS_BEFORE_WARNING", 0.1)
    monkeypatch.setattr(cache.logger, "warning", lambda text, *_: (logged.append(text), builder.resume()))
    open_source(many_images, cache_dir)
    assert logged == ["Waiting for another process that is preparing the same images in %s."]
    builder.join()


# ------------------------------------------------------------------------------------------------------- bad images


def with_bad_images(folder: Path, bad: set[int], number: int = 10) -> Path:
    files = {f"{row}.png": b"text" if row in bad else encode(np.full((4, 4), row, np.uint8)) for row in range(number)}
    return write_files(folder, files)


def test_a_bad_image_is_replaced_by_the_next_good_one(tmp_path: Path, cache_dir: Path) -> None:
    """Also the last one, and several in a row. The number of images does not change, so the order does not either."""
    folder = with_bad_images(tmp_path / "x", {0, 3, 4, 9})
    skipping = {"on_bad_image": "skip", "max_bad_fraction": 0.4}
    images = open_source(folder, cache_dir, **skipping)
    assert pixels_of(images)[:, 0, 0, 0].tolist() == [1, 1, 2, 5, 5, 5, 6, 7, 8, 1]
    assert [len(images), images.num_bad, images.bad_rows.tolist()] == [10, 4, [0, 3, 4, 9]]
    again = open_source(folder, cache_dir, **skipping)
    assert np.array_equal(pixels_of(again), pixels_of(images))


def test_a_replacement_keeps_its_label(tmp_path: Path, cache_dir: Path) -> None:
    files = {"cat/1.png": encode(RGB), "cat/2.png": b"text", "dog/1.png": encode(255 - RGB)}
    images = open_source(write_files(tmp_path / "x", files), cache_dir, on_bad_image="skip", max_bad_fraction=0.5)
    pixels, labels = images.take(np.array([1]))
    assert labels.tolist() == [1]
    assert np.array_equal(pixels[0].transpose(1, 2, 0), 255 - RGB)


def test_bad_images_are_counted_in_a_warning(tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = with_bad_images(tmp_path / "x", {3, 7})
    open_source(folder, cache_dir, on_bad_image="skip", max_bad_fraction=0.2)
    assert f"2 of 10 images cannot be read; each is replaced by the next good one. The first: image 3 of {folder}" in (
        caplog.text
    )


@pytest.mark.parametrize("is_cached", [False, True])
def test_too_many_bad_images_are_refused(tmp_path: Path, cache_dir: Path, *, is_cached: bool) -> None:
    folder = with_bad_images(tmp_path / "x", {3, 7})
    if is_cached:
        open_source(folder, cache_dir, on_bad_image="skip", max_bad_fraction=0.2)
    message = refusal(folder, cache_dir, on_bad_image="skip", max_bad_fraction=0.15)
    assert message.startswith("more than 1 of 10 images cannot be read, the limit set by data.max_bad_fraction 0.15")
    assert "; repair them, or set it to 0.2 or more; " in message
    assert f"the first: image 3 of {folder} (3.png) cannot be decoded" in message
    assert f"image 3 of {folder} (3.png) cannot be decoded" in refusal(folder, cache_dir, on_bad_image="error")
    message = refusal(folder, cache_dir, on_bad_image="skip")  # 1 % of 10 is none
    assert message.startswith("more than 0 of 10 images cannot be read, the limit set by data.max_bad_fraction 0.01")
    assert "data.on_bad_image" not in message, "it is already skip"


def test_the_fraction_of_bad_images_is_not_rounded_down() -> None:
    """0.29 * 100 is 28.999999999999996."""
    source = cache.Source("x", "x", "x", 100, lambda rows: [])
    allowed = [cache.allowed_bad(source, DataConfig(on_bad_image="skip", max_bad_fraction=n / 100)) for n in range(100)]
    assert allowed == list(range(100))


def test_a_dataset_of_bad_images_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    folder = with_bad_images(tmp_path / "x", set(range(10)))
    assert "none of the 10 images can be read; the first: image 0 of " in refusal(
        folder, cache_dir, on_bad_image="skip", max_bad_fraction=0.99
    )


def test_a_bad_image_is_replaced_from_its_own_set(tmp_path: Path, cache_dir: Path) -> None:
    """A validation image never replaces a training image, or vice versa."""
    folder = with_bad_images(tmp_path / "x", {0, 3, 4, 9}, number=40)
    images = open_source(folder, cache_dir, on_bad_image="skip", max_bad_fraction=0.4)
    training, validation = images.split(0.5, seed=0)
    shown = [set(pixels_of(part)[:, 0, 0, 0].tolist()) for part in (training, validation)]
    assert not shown[0] & shown[1]
    assert training.num_bad + validation.num_bad == 4


def test_bad_images_among_different_sizes_are_replaced(tmp_path: Path, cache_dir: Path) -> None:
    files = {"a.png": encode(RGB), "b.png": b"text", "c.png": encode(RGB[:, :4])}
    folder = write_files(tmp_path / "x", files)
    settings = {"resolution": 4, "resize_to": 0, "crop": "random", "on_bad_image": "skip", "max_bad_fraction": 0.5}
    images = open_source(folder, cache_dir, **settings)
    assert np.array_equal(pixels_of(images), [RGB[1:5, :4], RGB[1:5, :4], RGB[1:5, :4]])
