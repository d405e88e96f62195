"""The training and the validation set of a run: two splits or two parts of one, opened once."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from ddpm_hf.config import DataConfig
from ddpm_hf.data import DataError, ImageSet, open_sets
from tests.conftest import DIGITS
from tests.unit.data.helpers import RGB, encode, open_source, pixels_of, write_files, write_parquet


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def digits_table() -> datasets.Dataset:
    return datasets.load_dataset("parquet", data_files=str(DIGITS), split="train[:20]")


def open_both(source: Path, cache_dir: Path, **settings: object) -> tuple[ImageSet, ImageSet]:
    config = DataConfig(source=str(source), cache_dir=str(cache_dir), **settings)  # type: ignore[arg-type]
    training, held_out = open_sets(
        config, with_labels=True, seed=0, rank=0, num_processes=1, device=torch.device("cpu")
    )
    assert isinstance(training, ImageSet)
    return training, held_out


def test_a_validation_split_is_opened_by_its_name(tmp_path: Path, cache_dir: Path) -> None:
    training, held_out = open_both(DIGITS, cache_dir, split="train[:90%]", validation_split="train[90%:]")
    assert (len(training), len(held_out)) == (1617, 180)
    whole = pixels_of(open_source(DIGITS, cache_dir))
    assert np.array_equal(np.concatenate([pixels_of(training), pixels_of(held_out)]), whole)


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
    _, held_out = open_both(tmp_path / "x", cache_dir, validation_split="test")
    assert held_out.labels is not None
    assert held_out.labels.tolist() == [1, 0]


def test_ignored_files_are_logged_once(tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {f"{split}/cat/{number}.png": encode(RGB) for split in ("train", "val") for number in range(3)}
    folder = write_files(tmp_path / "x", files | {"notes.txt": b""})
    open_both(folder, cache_dir, validation_split="val")
    assert caplog.text.count("ignored in") == 1
    assert f"1 file ignored in {folder} (not an image, hidden, or a link). The first: notes.txt" in (caplog.text)


def test_a_validation_part_without_some_classes_is_a_warning(
    tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of a folder is the end of its last class; parts of mixed images have all of them."""
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
