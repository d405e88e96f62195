"""A stream shows every image once per epoch, and continues after an interruption with the same images."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from ddpm_hf.config import DataConfig
from ddpm_hf.data import DataError, ImageSet, ImageStream, normalize, open_images, open_sets, summarize
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
    return stream


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


def test_streamed_images_are_augmented_in_every_epoch(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 240, 30, dtype=np.uint8), (8, 1))
    write_parquet(tmp_path / "x" / "0.parquet", [encode(ramp)] * 20, [0] * 20)
    stream = stream_of(tmp_path / "x", crop="random", random_flip=True, resize_to=0)
    pixels, _ = stream.samples(0, 200)
    steps = (pixels[:, 0, 0, 1] - pixels[:, 0, 0, 0]).sign()
    assert 60 < int((steps > 0).sum()) < 140, "half of them rise; seven standard deviations"
    assert pixels.shape == (200, 1, 4, 4)
    assert len(pixels[steps > 0][:, 0, 0, 0].unique()) == 5, "every crop position occurs"


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
