"""The embedded data sets match the scripts that make them, and open with datasets."""

import importlib.util
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

DATA_DIR = Path(__file__).parents[2] / "data"
DIGITS_PATH = DATA_DIR / "digits.parquet"
EMOJI_PATH = DATA_DIR / "emoji_16.parquet"


def script(name: str) -> ModuleType:
    """Import a script from its file, because it is not part of the package."""
    spec = importlib.util.spec_from_file_location(name, DATA_DIR / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_digits() -> ModuleType:
    pytest.importorskip("sklearn")
    return script("make_digits")


def test_the_file_contains_what_the_script_makes(make_digits: ModuleType) -> None:
    """Compare PNG bytes, names, labels and feature types. The PNG files are uncompressed, so zlib does not matter."""
    assert pq.read_table(DIGITS_PATH).equals(make_digits.digits_table(), check_metadata=True)


def test_the_script_writes_the_same_bytes_again(make_digits: ModuleType, tmp_path: Path) -> None:
    """Other versions of pyarrow may write other bytes, so the committed file is compared only under its own version."""
    for name in ("one", "two"):
        make_digits.write_digits(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    if pq.read_metadata(DIGITS_PATH).created_by.endswith(pa.__version__):
        assert (tmp_path / "one").read_bytes() == DIGITS_PATH.read_bytes()


def test_the_file_opens_with_datasets_and_decodes_to_the_original_digits(tmp_path: Path) -> None:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    digits = datasets.load_dataset("parquet", data_files=str(DIGITS_PATH), split="train", cache_dir=str(tmp_path))
    assert digits.features == datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(digit) for digit in range(10)])
    )
    assert {image.mode for image in digits["image"]} == {"L"}
    pixels = np.stack([np.asarray(image) for image in digits["image"]])
    original = load_digits()
    assert pixels.dtype == np.uint8
    assert (pixels.min(), pixels.max()) == (0, 255)
    np.testing.assert_array_equal(np.rint(pixels * (16 / 255)), original.images)
    np.testing.assert_array_equal(digits["label"], original.target)


def test_the_emoji_open_with_datasets(tmp_path: Path) -> None:
    emoji = datasets.load_dataset("parquet", data_files=str(EMOJI_PATH), split="train", cache_dir=str(tmp_path))
    groups = emoji.features["label"].names
    assert (len(emoji), len(groups), groups[2]) == (1870, 9, "Flags")
    assert {(image.mode, image.size) for image in emoji["image"]} == {("RGB", (16, 16))}
    flags = {name for name, label in zip(emoji["name"], emoji["label"], strict=True) if label == 2}
    assert len(set(emoji["name"])) == 1870
    assert {"flag: Germany", "pirate flag"} <= flags


def test_the_emoji_file_contains_what_the_script_makes() -> None:
    """Other versions of the font, of Unicode and of Pillow may draw other pixels, so names and groups are compared."""
    make_emoji = script("make_emoji")
    if not (make_emoji.FONT.is_file() and make_emoji.LIST.is_file()):
        pytest.skip("needs the font Noto Color Emoji and the emoji list of Unicode")
    made = make_emoji.emoji_table(make_emoji.FONT, make_emoji.LIST).to_pylist()
    groups = {row["name"]: row["label"] for row in made}
    stored = pq.read_table(EMOJI_PATH).to_pylist()
    assert sum(groups.get(row["name"]) == row["label"] for row in stored) > 1800
