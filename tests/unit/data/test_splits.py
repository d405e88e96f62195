"""The training and the validation set of a run: two splits or two parts of one, opened once."""

import gzip
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from ddpm_hf.config import DataConfig
from ddpm_hf.data import DataError, ImageSet, ImageStream, describe_sets, locations_of, open_sets, splits
from tests.conftest import DIGITS
from tests.unit.data.helpers import (
    RANDOM,
    RGB,
    digits_table,
    encode,
    open_source,
    pixels_of,
    refusal,
    write_files,
    write_parquet,
)


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def open_both(source: Path, cache_dir: Path, **settings: Any) -> tuple[ImageSet, ImageSet]:
    config = DataConfig(source=str(source), cache_dir=str(cache_dir), **settings)
    training, validation = open_sets(config, with_labels=True, seed=0, device=torch.device("cpu"))
    assert isinstance(training, ImageSet)
    return training, validation


def test_a_validation_split_is_opened_by_its_name(tmp_path: Path, cache_dir: Path) -> None:
    training, validation = open_both(DIGITS, cache_dir, split="train[:90%]", validation_split="train[90%:]")
    assert (len(training), len(validation)) == (1617, 180)
    whole = pixels_of(open_source(DIGITS, cache_dir))
    assert np.array_equal(np.concatenate([pixels_of(training), pixels_of(validation)]), whole)


@pytest.mark.parametrize("names", ["{}_images {}_labels", "x_{} y_{}"])
def test_the_parts_of_an_npz_file_are_splits(tmp_path: Path, cache_dir: Path, names: str) -> None:
    """As MedMNIST and Keras write them; labels may have one more axis."""
    arrays = {}
    for split, labels in (("train", [0, 1, 2, 2]), ("val", [2, 0])):
        images, targets = names.format(split, split).split()
        arrays |= {images: np.stack([RGB] * len(labels)), targets: np.array(labels, np.uint8)[:, None]}
    np.savez(tmp_path / "x.npz", **arrays)
    for opened, labels in zip(
        open_both(tmp_path / "x.npz", cache_dir, validation_split="val"), ([0, 1, 2, 2], [2, 0]), strict=True
    ):
        assert [opened.labels.tolist(), opened.class_names] == [labels, ("0", "1", "2")]
    assert "has no split 'test'; it has train, validation." in refusal(tmp_path / "x.npz", cache_dir, split="test")


def idx(array: np.ndarray) -> bytes:
    """Return an idx file of bytes, as MNIST has them."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def test_the_idx_files_of_mnist_are_splits(tmp_path: Path, cache_dir: Path) -> None:
    """Compressed or not; a file of images is read with the labels beside it."""
    pixels = np.arange(6 * 5 * 7, dtype=np.uint8).reshape(6, 5, 7)
    files = {
        "raw/train-images-idx3-ubyte": idx(pixels[:4]),
        "raw/train-images-idx3-ubyte.gz": gzip.compress(idx(pixels[:4])),  # as torchvision leaves them
        "raw/train-labels-idx1-ubyte.gz": gzip.compress(idx(np.array([0, 1, 2, 2], np.uint8))),
        "raw/t10k-images.idx3-ubyte": idx(pixels[4:]),  # as on Kaggle
        "raw/t10k-labels.idx1-ubyte": idx(np.array([2, 0], np.uint8)),
        "LICENSE": b"",
    }
    folder = write_files(tmp_path / "MNIST", files)
    both = open_both(folder, cache_dir, validation_split="test")
    for opened, images, labels in zip(both, (pixels[:4], pixels[4:]), ([0, 1, 2, 2], [2, 0]), strict=True):
        assert np.array_equal(pixels_of(opened)[..., 0], images)
        assert [opened.labels.tolist(), opened.class_names] == [labels, ("0", "1", "2")]
    single = open_source(folder / "raw/train-images-idx3-ubyte.gz", cache_dir, with_labels=True)
    assert (len(single), single.labels.tolist()) == (4, [0, 1, 2, 2])
    with pytest.raises(DataError, match=r"data\.streaming does not support idx files such as"):
        open_both(folder, cache_dir, streaming=True, resolution=4, num_channels=1)
    write_files(folder, {"raw/emnist-train-images-idx3-ubyte": idx(pixels)})
    assert "set data.source to one file of images." in refusal(folder, cache_dir)


def test_a_damaged_idx_file_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    whole = idx(np.zeros((2, 4, 4), np.uint8))
    huge = bytes([0, 0, 8, 3]) + b"\xff" * 12
    for content in (b"", whole[:3], whole[:9], whole[:-1], whole + b"x", b"\1" + whole[1:], huge):
        for suffix, stored in (("", content), (".gz", gzip.compress(content))):
            path = write_files(tmp_path / "x", {f"t10k-images-idx3-ubyte{suffix}": stored})
            assert "cannot be read as an idx file" in refusal(path / f"t10k-images-idx3-ubyte{suffix}", cache_dir)
    (tmp_path / "x/t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-12])
    assert "cannot be read as an idx file" in refusal(tmp_path / "x/t10k-images-idx3-ubyte.gz", cache_dir)


def test_a_validation_split_of_another_kind_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    files = {"train/cat/1.png": RGB, "train/cat/2.png": RGB, "test/cat/1.png": RGB[:4]}
    folder = write_files(tmp_path / "x", {name: encode(pixels) for name, pixels in files.items()})
    with pytest.raises(DataError, match=r"'test' of .* has images of 3x4x5, but 'train' has 3x6x5; set data.res"):
        open_both(folder, cache_dir, validation_split="test")
    renamed = digits_table().cast_column("label", datasets.ClassLabel(names=list("0123456798")))
    datasets.DatasetDict({"train": digits_table(), "test": renamed}).save_to_disk(tmp_path / "y")
    with pytest.raises(DataError, match=r"has the classes .*, 7, 9, 8, but 'train' has .*, 7, 8, 9; both need the"):
        open_both(tmp_path / "y", cache_dir, validation_split="test")


def test_a_validation_split_may_lack_the_last_of_numbered_classes(tmp_path: Path, cache_dir: Path) -> None:
    labels = datasets.Value("int64")
    write_parquet(tmp_path / "x" / "train-0.parquet", [encode(RGB)] * 3, [0, 1, 2], labels)
    write_parquet(tmp_path / "x" / "test-0.parquet", [encode(RGB)] * 2, [1, 0], labels)
    _, validation = open_both(tmp_path / "x", cache_dir, validation_split="test")
    assert validation.labels.tolist() == [1, 0]


def test_ignored_files_are_logged_once(tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {f"{split}/cat/{number}.png": encode(RGB) for split in ("train", "val") for number in range(3)}
    folder = write_files(tmp_path / "x", files | {"notes.txt": b""})
    open_both(folder, cache_dir, validation_split="val")
    assert caplog.text.count("ignored in") == 1
    assert f"1 file ignored in {folder} (not an image, hidden, a link, in no split or table). The first: notes.txt" in (
        caplog.text
    )


def test_a_validation_part_without_some_classes_is_a_warning(
    tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of a folder is its last class."""
    files = {f"{name}/{number}.png": encode(RGB) for name in ("cat", "dog", "emu") for number in range(4)}
    folder = write_files(tmp_path / "x", files)
    open_both(folder, cache_dir, split="train[:80%]", validation_split="train[80%:]")
    assert f"The validation set, split 'train[80%:]' of {folder}, lacks 2 of the 3 classes" in caplog.text
    caplog.clear()
    write_parquet(tmp_path / "y.parquet", [encode(RGB)] * 12, [0, 1] * 6)
    open_both(tmp_path / "y.parquet", cache_dir, split="train[:80%]", validation_split="train[80%:]")
    open_both(folder, cache_dir, validation_fraction=0.1)
    assert "lack" not in caplog.text


def test_a_single_training_image_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    folder = write_files(tmp_path / "x", {"cat/1.png": encode(RGB)})
    with pytest.raises(DataError, match=f"{folder} contains a single training image; at least two are required."):
        open_both(folder, cache_dir)


def test_the_sets_are_described_in_one_line(tmp_path: Path, cache_dir: Path) -> None:
    source = write_source(tmp_path, "folder")
    settings = {"on_bad_image": "skip", "max_bad_fraction": 0.2, "validation_split": "val"}
    assert describe_sets(*rank_0(source, cache_dir, **settings)) == (
        "10 training and 10 validation images of 3x6x5 (1 unreadable image replaced)"
    )
    streamed = {"streaming": True, "resolution": 5, "num_channels": 3}
    assert describe_sets(*rank_0(source, cache_dir, **streamed)) == (
        "streamed training and 0 validation images of 3x5x5"
    )


# ----------------------------------------------------------------------------------- opened by rank 0, mapped by others


def as_another_rank(
    source: Path, cache_dir: Path, opened: tuple[ImageSet | ImageStream, ImageSet], **settings: Any
) -> tuple[ImageSet | ImageStream, ImageSet]:
    """Open the sets with the locations that rank 0 sends, which travel as JSON."""
    config = DataConfig(source=str(source), cache_dir=str(cache_dir), **settings)
    locations = json.loads(json.dumps(locations_of(*opened)))
    return open_sets(
        config, with_labels=False, seed=3, rank=1, num_processes=2, device=torch.device("cpu"), locations=locations
    )


def rank_0(source: Path, cache_dir: Path, **settings: Any) -> tuple[ImageSet | ImageStream, ImageSet]:
    config = DataConfig(source=str(source), cache_dir=str(cache_dir), **settings)
    return open_sets(config, with_labels=False, seed=3, num_processes=2, device=torch.device("cpu"))


def write_source(folder: Path, kind: str) -> Path:
    pixels = RANDOM.integers(0, 256, (10, 6, 5, 3), dtype=np.uint8)
    if kind == "npy":
        np.save(folder / "x.npy", pixels)
        return folder / "x.npy"
    files = {
        f"{split}/{number}.png": encode(image) for split in ("train", "val") for number, image in enumerate(pixels)
    }
    return write_files(folder / "x", files | {"train/3.png": b"text"})


def assert_same_set(found: ImageSet | ImageStream, expected: ImageSet | ImageStream) -> None:
    assert isinstance(found, ImageSet)
    assert isinstance(expected, ImageSet)
    assert np.array_equal(pixels_of(found), pixels_of(expected))
    assert [found.digest, found.class_names, found.image_shape] == [
        expected.digest,
        expected.class_names,
        expected.image_shape,
    ]
    assert np.array_equal(found.indices, expected.indices)
    assert found.num_bad == expected.num_bad


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("npy", {"validation_fraction": 0.3}),
        ("npy", {"split": "train[2:9]", "resolution": 4, "resize_to": 0, "crop": "random"}),
        ("folder", {"validation_split": "val"}),
        ("folder", {"validation_fraction": 0.3, "resolution": 4}),
    ],
    ids=str,
)
def test_other_ranks_map_what_rank_0_opened(
    tmp_path: Path, cache_dir: Path, kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without searching, hashing or decoding anything again."""
    source = write_source(tmp_path, kind)
    settings |= {"on_bad_image": "skip", "max_bad_fraction": 0.2}
    opened = rank_0(source, cache_dir, **settings)
    monkeypatch.setattr(splits, "find_source", lambda *_: pytest.fail("searched the dataset again"))
    for found, expected in zip(as_another_rank(source, cache_dir, opened, **settings), opened, strict=True):
        assert_same_set(found, expected)


@pytest.mark.parametrize("kind", ["npy", "folder"])
def test_a_machine_with_its_own_copy_opens_it(tmp_path: Path, cache_dir: Path, kind: str) -> None:
    """Another cache folder, or a file with another modification time, and the same content."""
    source = write_source(tmp_path, kind)
    opened = rank_0(source, cache_dir, on_bad_image="skip", max_bad_fraction=0.2)
    shutil.rmtree(cache_dir, ignore_errors=True)
    os.utime(source, (1, 1))
    found = as_another_rank(source, tmp_path / "cache_2", opened, on_bad_image="skip", max_bad_fraction=0.2)
    if kind == "npy":
        assert_same_set(found[0], opened[0])
    assert isinstance(found[0], ImageSet)
    assert isinstance(opened[0], ImageSet)
    assert found[0].digest == opened[0].digest


@pytest.mark.parametrize("kind", ["npy", "folder"])
def test_a_machine_with_other_images_is_refused(tmp_path: Path, cache_dir: Path, kind: str) -> None:
    """A .npy file of the same size, or a folder of as many images."""
    source = write_source(tmp_path, kind)
    settings = {"on_bad_image": "skip", "max_bad_fraction": 0.2}
    opened = rank_0(source, cache_dir, **settings)
    shutil.rmtree(cache_dir, ignore_errors=True)
    source.unlink() if kind == "npy" else shutil.rmtree(source)  # a mapped file must not be overwritten
    write_source(tmp_path, kind)
    with pytest.raises(DataError, match=f"{source} has other images or labels here than on rank 0"):
        as_another_rank(source, cache_dir, opened, **settings)


def test_a_cache_with_other_images_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    """Files with the same names, sizes and times on two machines have the same cache key."""
    source = write_source(tmp_path, "folder")
    settings = {"on_bad_image": "skip", "max_bad_fraction": 0.2}
    training, validation = rank_0(source, cache_dir, **settings)
    assert isinstance(training, ImageSet)
    of_another_machine = replace(training, location=training.location | {"digest": "0" * 32})
    with pytest.raises(DataError, match=f"{source} has other images or labels here than on rank 0"):
        as_another_rank(source, cache_dir, (of_another_machine, validation), **settings)


def test_ranks_of_a_stream_map_the_validation_split(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path, "folder")
    settings = {"streaming": True, "resolution": 5, "num_channels": 3, "validation_split": "val"}
    opened = rank_0(source, cache_dir, **settings)
    monkeypatch.setattr(splits, "find_source", lambda *_: pytest.fail("searched the dataset again"))
    stream, validation = as_another_rank(source, cache_dir, opened, **settings)
    assert isinstance(stream, ImageStream)
    assert_same_set(validation, opened[1])
