"""A stream shows every image once per epoch, and continues after an interruption with the same images."""

import hashlib
import io
import json
import tarfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.config import DataConfig
from ddpm_hf.data import (
    DataError,
    ImageSet,
    ImageStream,
    normalize,
    open_images,
    open_sets,
    streaming,
    summarize,
)
from ddpm_hf.rng import numpy_generator
from tests.conftest import run_process
from tests.unit.data.helpers import GRAY, encode, encode_deep, write_files, write_parquet


def write_shards(folder: Path, sizes: list[int], bad: set[int] | None = None) -> Path:
    """Write parquet files of these numbers of images. Image i has the value i and the label i mod 2."""
    start = 0
    for number, size in enumerate(sizes):
        rows = range(start, start + size)
        images = [b"text" if row in (bad or set()) else encode(np.full((4, 4), row, np.uint8)) for row in rows]
        write_parquet(folder / f"train-{number:05}.parquet", images, [row % 2 for row in rows])
        start += size
    return folder


def stream_of(source: Path, *, rank: int = 0, num_processes: int = 1, **settings: Any) -> ImageStream:
    config = DataConfig(
        source=str(source),
        **{"streaming": True, "resolution": 4, "num_channels": 1, "shuffle_buffer_size": 5} | settings,
    )
    stream, validation = open_sets(
        config, with_labels=True, seed=3, rank=rank, num_processes=num_processes, device=torch.device("cpu")
    )
    assert isinstance(stream, ImageStream)
    assert isinstance(validation, ImageSet)
    _STREAMS.append(stream)
    return stream


CPU = torch.device("cpu")
_STREAMS: list[ImageStream] = []


@pytest.fixture(autouse=True)
def _close_streams() -> Iterator[None]:
    """End the threads of a test before the next one."""
    yield
    while _STREAMS:
        _STREAMS.pop().close()


def take(stream: ImageStream, count: int) -> list[int]:
    """Return the numbers of the next images, after checking their labels."""
    pixels, labels = stream.samples(0, count)
    numbers = ((pixels[:, 0, 0, 0] + 1) * 127.5).round().int()
    assert torch.equal(labels, numbers.long() % 2)
    return [int(number) for number in numbers]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", [7, 4, 9, 3])


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_every_epoch_shows_every_image_once(shards: Path, batch: int) -> None:
    stream = stream_of(shards)
    seen = [number for _ in range(-(-69 // batch)) for number in take(stream, batch)][:69]
    epochs = [seen[start : start + 23] for start in (0, 23, 46)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(23))] * 3
    assert epochs[0] != epochs[1] != epochs[2], "every epoch has its own order"
    again = stream_of(shards)
    assert [number for _ in range(-(-69 // batch)) for number in take(again, batch)][:69] == seen


@pytest.mark.parametrize("num_processes", [2, 3, 4])
def test_the_processes_share_the_images(shards: Path, num_processes: int) -> None:
    """Whole files if the four files divide evenly, otherwise every n-th row."""
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for rank in range(num_processes):
        stream = stream_of(shards, rank=rank, num_processes=num_processes)
        while stream.position.epoch < 2:
            (number,) = take(stream, 1)
            seen[stream.position.epoch].append(number)
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(23))


@pytest.mark.parametrize("stop", [1, 5, 6, 23, 40])
@pytest.mark.parametrize(("rank", "num_processes"), [(0, 1), (1, 2), (2, 3)])
def test_a_resumed_stream_continues_with_the_same_images(
    shards: Path, stop: int, rank: int, num_processes: int
) -> None:
    """Through JSON, as in a checkpoint: inside a buffer, at its ends, and at the end of an epoch."""
    stream = stream_of(shards, rank=rank, num_processes=num_processes, random_flip=True)
    take(stream, stop)
    state = json.dumps(asdict(stream.position))
    expected = [stream.samples(0, count)[0] for count in (3, 8, 30)]
    resumed = stream_of(shards, rank=rank, num_processes=num_processes, random_flip=True)
    resumed.go_to(json.loads(state))
    assert all(torch.equal(batch, resumed.samples(0, len(batch))[0]) for batch in expected)
    assert resumed.position == stream.position


def test_a_resumed_stream_reads_one_buffer_again(shards: Path) -> None:
    """Not the whole epoch."""
    stream = stream_of(shards)
    take(stream, 18)
    position = stream.position
    assert (position.number, position.buffer, position.used) == (18, 3, 3)
    assert position.file > 0, "earlier files are not opened again"


def test_a_position_of_version_0_1_continues_with_the_same_images(shards: Path) -> None:
    """Version 0.1 stored the state of a reader of `datasets`, whose content its versions changed."""
    place = {"examples_iterable": {"shard_idx": 0, "shard_example_idx": 8}, "epoch": 0}
    used = {"used": 3, "number": 18, "num_used": 18, "num_bad": 0}
    stream = stream_of(shards)
    stream.go_to({"epoch": 0, "file": 2, "place": place, "row": 8, "buffer": 3} | used)
    assert take(stream, 9) == [1, 0, 5, 6, 4, 12, 15, 11, 14]


def write_archive(path: Path, rows: range) -> None:
    """Write images with these numbers and their labels as WebDataset, or to class folders in a zip file."""
    images = {row: encode(np.full((4, 4), row, np.uint8)) for row in rows}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for row, data in images.items():
                archive.writestr(f"{row % 2}/{row}.png", data)
        return
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for row, data in images.items():
            for suffix, content in ((".png", data), (".cls", str(row % 2).encode())):
                member = tarfile.TarInfo(f"{row:03}{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("names", "num_processes"),
    [
        (["0.tar", "1.tar", "2.tar", "3.tar"], 2),
        (["0.tar.gz", "1.tar.gz", "2.tar.gz"], 2),
        (["0.zip"], 2),
        (["list.csv"], 1),
    ],
)
def test_archives_and_lists_of_files_are_streamed_and_shared(
    tmp_path: Path, names: list[str], num_processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole archives if they divide evenly. At most one of them is open, and a resumed stream continues in it."""
    folder = tmp_path / "x"
    folder.mkdir()
    if names == ["list.csv"]:
        write_files(folder, {f"{row}.png": encode(np.full((4, 4), row, np.uint8)) for row in range(12)})
        (folder / names[0]).write_text("path,label\n" + "".join(f"{row}.png,{'ab'[row % 2]}\n" for row in range(12)))
    else:
        for number, rows in enumerate(np.array_split(np.arange(12), len(names))):
            write_archive(folder / names[number], range(rows[0], rows[-1] + 1))
    source = folder if len(names) > 1 else folder / names[0]
    opened: list[tarfile.TarFile] = []
    open_tar = tarfile.open

    def recorded(*arguments: Any, **settings: Any) -> tarfile.TarFile:
        opened.append(open_tar(*arguments, **settings))
        return opened[-1]

    monkeypatch.setattr(tarfile, "open", recorded)
    shown = []
    for rank in range(num_processes):
        stream = stream_of(source, rank=rank, num_processes=num_processes)
        shown.append(take(stream, 12 // num_processes))
        assert (stream.position.epoch, stream.position.number) == (0, 12 // num_processes)
        take(stream, 5)
        state, expected = json.dumps(asdict(stream.position)), take(stream, 20)
        assert sum(not archive.closed for archive in opened) <= 1
        stream.go_to(json.loads(state))
        assert take(stream, 20) == expected
        stream.close()
        opened.clear()
    assert sorted(row for part in shown for row in part) == list(range(12))
    if len(names) == 4:
        assert [sorted(part) for part in shown] == [list(range(6)), list(range(6, 12))]


def wait_until(is_true: Callable[[], bool]) -> None:
    """Wait for another thread."""
    while not is_true():
        time.sleep(0.001)


def test_one_thread_reads_the_next_buffer_while_images_of_the_current_one_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the next buffer at once, and then as many rows as images are used; 64 rows at a time."""
    write_archive(tmp_path / "x.tar", range(255))
    stream, threads = stream_of(tmp_path / "x.tar", shuffle_buffer_size=128), []
    others = set(threading.enumerate())
    read = tarfile.TarFile.extractfile

    def counted(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return read(*arguments)

    monkeypatch.setattr(tarfile.TarFile, "extractfile", counted)
    monkeypatch.setattr(stream, "_num_threads", 1)
    monkeypatch.setattr(stream, "_images_per_task", 1)  # two images are decoded ahead
    for num_used, num_read in ((1, 192), (30, 192), (32, 255), (126, 255), (128, 255 + 64)):
        while stream.position.num_used < num_used:
            take(stream, 1)
        wait_until(lambda num_read=num_read: len(threads) >= num_read)
        assert len(threads) == num_read
    assert {name.partition("_")[0] for name in threads} == {"stream-reader"}
    stream.close()
    assert set(threading.enumerate()) <= others


def test_rows_are_read_in_tables_and_each_image_is_opened_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` makes a table of each row, and a copy of its state, if it is asked for rows or for states."""
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **settings: Any) -> Any:
            counts[name] += 1
            return original(*arguments, **settings)

        monkeypatch.setattr(owner, name, counted)

    for name in ("__iter__", "state_dict", "load_state_dict", "iter"):
        count(datasets.IterableDataset, name)
    for owner, name in ((streaming, "decode_interleaved"), (Image, "open"), (streaming, "ThreadPoolExecutor")):
        count(owner, name)
    stream = stream_of(shards, shuffle_buffer_size=23)
    for _ in range(23):
        take(stream, 1)
    stream.close()
    assert counts["open"] == counts["decode_interleaved"] >= 23
    assert counts["ThreadPoolExecutor"] == 2, "the threads are kept from batch to batch"
    assert counts["iter"] >= 4, "once for each of the four files, and again for the next epoch"
    assert not {"__iter__", "state_dict", "load_state_dict"} & counts.keys()


def test_an_error_of_the_reader_is_raised_at_the_image_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that were read before it are used, and the next call tries again."""
    write_archive(tmp_path / "x.tar", range(12))
    stream = stream_of(tmp_path / "x.tar")
    expected = take(stream, 12)
    stream.go_to({})
    files, is_broken = stream._files, True

    def fails(file: int, start: int, step: int) -> Any:
        for number, row in enumerate(files.read(file, start, step), start):
            if number == 7 and is_broken:
                raise OSError("the disk is gone")
            yield row

    monkeypatch.setattr(stream, "_files", replace(files, read=fails))
    assert take(stream, 5) == expected[:5]
    with pytest.raises(OSError, match="the disk is gone"):
        take(stream, 1)
    is_broken = False
    assert take(stream, 7) == expected[5:]


def test_streamed_images_are_augmented_in_every_epoch(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 240, 30, dtype=np.uint8), (8, 1))
    write_parquet(tmp_path / "x" / "0.parquet", [encode(ramp)] * 20, [0] * 20)
    stream = stream_of(tmp_path / "x", crop="random", random_flip=True, resize_to=0)
    pixels, _ = stream.samples(0, 200)
    steps = (pixels[:, 0, 0, 1] - pixels[:, 0, 0, 0]).sign()
    assert 60 < int((steps > 0).sum()) < 140, "half of them rise; seven standard deviations"
    assert pixels.shape == (200, 1, 4, 4)
    assert len(pixels[steps > 0][:, 0, 0, 0].unique()) == 5, "every crop position occurs"


def test_crops_and_flips_of_a_stream_never_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned to those of version 0.1, which made a generator for each image."""
    ramp = np.add.outer(np.arange(6), np.arange(6)).astype(np.uint8) * 9
    for number in range(2):
        images = [encode(ramp + row) for row in range(number, 40, 2)]
        write_parquet(tmp_path / "x" / f"{number}.parquet", images, [row % 2 for row in range(20)])
    generators = []

    def counted(*arguments: Any) -> np.random.Generator:
        generators.append(arguments[1])
        return numpy_generator(*arguments)

    monkeypatch.setattr(streaming, "numpy_generator", counted)
    settings = {"crop": "random", "random_flip": True, "resize_to": 0, "shuffle_buffer_size": 10}
    for rank, digest in enumerate(("a4c421930dcf67d3", "e47978f3be6f71d5")):
        stream = stream_of(tmp_path / "x", rank=rank, num_processes=2, **settings)
        pixels, labels = stream.take(50)
        assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16] == digest
        assert labels is not None
        stream.close()
    assert set(generators) == {"files", "buffer"}, "none for each image"


def test_a_bad_image_stops_a_stream_or_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_shards(tmp_path / "x", [10, 10], bad={3, 14})
    with pytest.raises(
        DataError, match=r"row [34] of train-0000[01].parquet of the stream of .* cannot be decoded .*skip"
    ):
        take(stream_of(folder), 20)
    stream = stream_of(folder, on_bad_image="skip")
    assert sorted(take(stream, 18)) == [number for number in range(20) if number not in (3, 14)]
    assert stream.position.num_bad == 2
    for row, number in ((3, 0), (4, 1)):
        assert (
            f"Skipped an unreadable image: row {row} of train-{number:05}.parquet of the stream of {folder}"
            in caplog.text
        )


@pytest.mark.parametrize(("rank", "num_processes"), [(0, 1), (1, 2)])
def test_a_bad_image_is_named_by_its_row_after_a_resume_and_in_shared_files(
    tmp_path: Path, rank: int, num_processes: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_shards(tmp_path / "x", [21], bad={17})
    settings: dict[str, Any] = {"rank": rank, "num_processes": num_processes, "on_bad_image": "skip"}
    before = stream_of(folder, **settings)
    take(before, 7)
    stream = stream_of(folder, **settings)
    stream.go_to(json.loads(json.dumps(asdict(before.position))))
    take(stream, 20 // num_processes - 7 - (rank == 1))
    assert f"row 17 of train-00000.parquet of the stream of {folder} cannot be decoded" in caplog.text


def test_a_stream_reads_the_rows_of_its_split_and_resumes_in_them(tmp_path: Path) -> None:
    """A column names the split of each row. Bad images are named by their rows in the file."""
    splits = ["val", *["train", "test", "train"] * 60]
    images = [encode(np.full((4, 4), row, np.uint8)) for row in range(len(splits))]
    cells = [{"bytes": data, "path": None} for data in [*images[:-1], b"text"]]
    (tmp_path / "x").mkdir()
    datasets.Dataset.from_dict({"image": cells, "Split": splits}).to_parquet(tmp_path / "x" / "0.parquet")
    used = [row for row, split in enumerate(splits) if split == "train"]

    def stream_of_split(rank: int = 0, num_processes: int = 1, split: str = "train") -> ImageStream:
        config = DataConfig(
            source=str(tmp_path / "x"), streaming=True, resolution=4, num_channels=1, shuffle_buffer_size=9
        )
        config = replace(config, split=split, on_bad_image="skip")
        _STREAMS.append(
            ImageStream(config, with_labels=False, seed=3, rank=rank, num_processes=num_processes, device=CPU)
        )
        return _STREAMS[-1]

    def rows(stream: ImageStream, count: int) -> list[int]:
        return stream.take(count)[0][:, 0, 0, 0].tolist()

    seen = [row for rank, count in ((0, 60), (1, 59)) for row in rows(stream_of_split(rank, 2), count)]
    assert sorted(seen) == used[:-1]
    stream = stream_of_split()
    before = rows(stream, 50)
    resumed = stream_of_split()
    resumed.go_to(asdict(stream.position))
    after = rows(resumed, 69)
    assert sorted(before + after) == used[:-1]
    assert rows(stream, 69) == after
    assert rows(stream_of_split(split="validation"), 1) == [0]


@pytest.mark.gpu
def test_a_stream_copies_stored_pixels_to_a_gpu(shards: Path) -> None:
    config = DataConfig(source=str(shards), streaming=True, resolution=4, num_channels=1, shuffle_buffer_size=5)
    for device in (CPU, torch.device("cuda")):
        _STREAMS.append(ImageStream(config, with_labels=True, seed=3, device=device))
    stored, labels = _STREAMS[-1].take(20)
    assert stored.is_pinned() and stored.dtype == torch.uint8 and labels is not None
    _STREAMS[-1].go_to({})
    samples, _ = _STREAMS[-1].samples(0, 20)
    assert samples.device.type == "cuda"
    torch.testing.assert_close(samples.cpu(), _STREAMS[-2].samples(0, 20)[0], rtol=0, atol=2**-23)


def test_too_many_bad_images_stop_a_stream(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "x", [40], bad=set(range(20)))
    with pytest.raises(DataError, match=r"11 of \d+ images cannot be read, more than data.max_bad_fraction 0.1 allows"):
        take(stream_of(folder, on_bad_image="skip", max_bad_fraction=0.1), 40)


@pytest.mark.parametrize(
    ("cells", "labels", "feature", "sentence"),
    [
        ([encode(GRAY)], [None], None, "of the stream of .* has no label; every image needs one from 0 to 1"),
        ([encode(GRAY)], [0], datasets.Value("int64"), "has no class names, which streaming needs"),
        ([encode_deep(GRAY.astype(np.uint16))], [0], None, "has 16 bits, which cannot be streamed"),
    ],
)
def test_images_and_labels_that_cannot_be_streamed_are_refused(
    tmp_path: Path, cells: list[bytes], labels: list[object], feature: object, sentence: str
) -> None:
    write_parquet(tmp_path / "x" / "0.parquet", cells, labels, feature)
    with pytest.raises(DataError, match=sentence):
        take(stream_of(tmp_path / "x"), 1)


def test_a_stream_without_images_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x" / "0.parquet", [], [])
    with pytest.raises(DataError, match="contains no images"):
        take(stream_of(tmp_path / "x"), 1)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_files_that_cannot_be_streamed_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        DataError, match=rf"data.streaming does not support \{Path(name).suffix} files such as .*; set it to false"
    ):
        stream_of(tmp_path / name)


@pytest.mark.parametrize(("split", "numbers"), [("train", list(range(9))), ("train[3:7]", [1, 3, 6, 8])])
def test_a_folder_of_images_is_streamed(tmp_path: Path, split: str, numbers: list[int]) -> None:
    files = {f"{'even' if n % 2 == 0 else 'odd'}/{n}.png": encode(np.full((4, 4), n, np.uint8)) for n in range(9)}
    stream = stream_of(write_files(tmp_path / "x", files), split=split)
    assert stream.class_names == ("even", "odd")
    assert sorted(take(stream, len(numbers))) == numbers


LAYOUTS = {
    "class folders called like splits": (["train/{}.png", "car/{}.png", "plane/{}.png"], 12),
    "files called like splits": (["train {}.png", "x{}.png", "test-{}.png"], 12),
    "several folders deep": (["cat/a/{}.png", "cat/{}.png", "dog/b/c/{}.png"], 12),
    "splits": (["train/cat/{}.png", "train/dog/{}.png", "val/cat/{}.png"], 8),
    "strange names": (["c[1]/*{}.png", "c?/{}.JPE", ".hidden/{}.png"], 8),
    "a link to a folder": (["a/{}.png", "b/{}.png", "link"], 12),
    "a table of images called like splits": (["train {}.png", "dog {}.png", "test {}.png", "metadata.csv"], 12),
    "tables in folders of splits": (["train/a{}.png", "train/metadata.csv", "test/b{}.png", "test/metadata.csv"], 4),
    "tables far below": (["default/train/{}.parquet", "default/test/{}.parquet"], 4),
    "numbered splits": (["data/odd-0000{}-of-00004.parquet", "data/train-0000{}-of-00004.parquet"], 4),
    "a hidden folder of tables": (["cat/{}.png", "dog/{}.png", ".cache/{}.parquet"], 8),
    "a link to tables": (["{}.parquet", "link"], 8),
    "saved": (["saved"], 3),
}


def write_layout(folder: Path, names: list[str]) -> Path:
    """Write four images, or four tables of one image, for each name; a metadata.csv lists the images beside it."""
    places = [name.format(place) for name in names if "{}" in name for place in range(4)]
    images = {name: encode(np.full((4, 4), number, np.uint8)) for number, name in enumerate(places)}
    write_files(folder, {name: data for name, data in images.items() if not name.endswith(".parquet")})
    for number, name in enumerate(images):
        if name.endswith(".parquet"):
            write_parquet(folder / name, [images[name]], [number % 2])
    for table in (folder / name for name in names if name.endswith(".csv")):
        rows = [f"{image.name},{number}\n" for number, image in enumerate(sorted(table.parent.glob("*.png")))]
        table.write_text("file_name,label\n" + "".join(rows))
    if "link" in names:
        (folder / "link").symlink_to(write_layout(folder.parent / "elsewhere", names[:1]))
    if names == ["saved"]:
        rows = datasets.Dataset.from_parquet(str(write_parquet(folder.parent / "x.parquet", [encode(GRAY)] * 3)))
        datasets.DatasetDict({"train": rows, "mine": rows.select([1])}).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stream_has_the_images_splits_and_classes_of_the_cache(tmp_path: Path, layout: str) -> None:
    names, num_images = LAYOUTS[layout]
    folder, cpu = write_layout(tmp_path / "x", names), torch.device("cpu")
    for split in ("train", "mine") if layout == "saved" else ("train",):
        config = DataConfig(
            source=str(folder), split=split, resolution=4, num_channels=1, cache_dir=str(tmp_path / "cache")
        )
        decoded = open_images(config, with_labels=False)
        assert len(decoded) == (1 if split == "mine" else num_images)
        with_labels = decoded.class_names is not None and "metadata.csv" not in names[-1]  # numbers are not streamed
        streamed = replace(config, streaming=True)
        stream = ImageStream(streamed, with_labels=with_labels, seed=0, device=cpu)
        pixels, labels = stream.samples(0, len(decoded))
        assert (stream.position.epoch, stream.position.number) == (0, len(decoded))
        stored, numbers = decoded.take(decoded.positions)
        shown = ((pixels[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        if not with_labels:
            assert sorted(shown) == sorted(stored[:, 0, 0, 0].tolist())
            continue
        assert stream.class_names == decoded.class_names
        expected = zip(stored[:, 0, 0, 0].tolist(), numbers.tolist(), strict=True)
        assert sorted(zip(shown, labels.tolist(), strict=True)) == sorted(expected)


@pytest.mark.parametrize(
    ("setting", "sentence"), [("subset", "not a Hub dataset"), ("label_column", "has class folders")]
)
def test_settings_that_do_not_apply_to_a_streamed_folder_are_refused(
    tmp_path: Path, setting: str, sentence: str
) -> None:
    folder = write_files(tmp_path / "x", {"cat/1.png": encode(GRAY)})
    with pytest.raises(DataError, match=f"data.{setting} does not apply to {folder}, which .*{sentence}"):
        stream_of(folder, **{setting: "x"})


def test_the_validation_split_of_a_stream_is_decoded_to_the_cache(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "x", [10])
    write_parquet(folder / "test-0.parquet", [encode(GRAY)] * 3, [0, 1, 0])
    settings = {"streaming": True, "resolution": 4, "num_channels": 1, "cache_dir": str(tmp_path / "cache")}
    config = DataConfig(source=str(folder), validation_split="test", **settings)
    stream, validation = open_sets(config, with_labels=True, seed=0, device=torch.device("cpu"))
    assert isinstance(stream, ImageStream)
    assert len(validation) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1, "only the validation images are decoded"


def test_a_stream_can_be_summarized(shards: Path) -> None:
    config = DataConfig(source=str(shards), streaming=True, resolution=4, num_channels=1)
    summary = summarize(config, with_labels=False, seed=0, num_samples=6)
    assert summary.samples.shape == (6, 4, 4, 1)
    assert "streamed: images are not counted or decoded in advance" in summary.lines[0]


def test_a_process_with_an_open_stream_exits_with_0(shards: Path) -> None:
    """A parquet reader that is open at exit would abort it with exit code 134."""
    code = f"""
import torch
from ddpm_hf.config import DataConfig
from ddpm_hf.data import ImageStream
config = DataConfig(source={str(shards)!r}, streaming=True, resolution=4, num_channels=1, shuffle_buffer_size=5)
stream = ImageStream(config, with_labels=True, seed=0, rank=0, num_processes=1, device=torch.device("cpu"))
stream.samples(0, 3)
"""
    result = run_process(["-c", code])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("kind", ["table", "folder"])
def test_values_are_streamed_as_they_are_decoded_in_advance(tmp_path: Path, kind: str) -> None:
    """Arrays in a table, and files of them."""
    values = np.random.default_rng(0).normal(0, 500, (9, 4, 4)).astype(np.float32)
    if kind == "table":
        features = datasets.Features(
            {"x": datasets.Array2D((4, 4), "float32"), "label": datasets.ClassLabel(names=["a"])}
        )
        source = tmp_path / "x.parquet"
        datasets.Dataset.from_dict({"x": list(values), "label": [0] * 9}, features=features).to_parquet(source)
    else:
        source = tmp_path / "x"
        for number, value in enumerate(values):
            (source / "a").mkdir(parents=True, exist_ok=True)
            np.save(source / "a" / f"{number}.npy", value)
    settings = {"value_range": [-1000.0, 2000.0], "resolution": 4, "num_channels": 1}
    samples, _ = stream_of(source, **settings).samples(0, 9)
    images = open_images(DataConfig(source=str(source), cache_dir=str(tmp_path), **settings), with_labels=False)
    decoded = normalize(torch.from_numpy(np.array(images.take(images.positions)[0])), value_range=images.value_range)
    assert samples.dtype == torch.float32

    def sort(x: torch.Tensor) -> list[list[float]]:
        return sorted(x.flatten(1).tolist())

    assert sort(samples) == sort(decoded)
    with pytest.raises(DataError, match="has float32 values, which cannot be streamed without a range"):
        stream_of(source).samples(0, 1)
