"""NumPy arrays are read where they lie, or through the cache where something must be done to them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data.helpers import RANDOM, open_source, pixels_of, refusal

PIXELS = RANDOM.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **others: np.ndarray) -> Path:
    np.save(path, pixels) if path.suffix == ".npy" else np.savez(path, images=pixels, **others)
    return path


@pytest.mark.parametrize("name", ["images.npy", "images.npz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_array_keeps_every_bit(tmp_path: Path, name: str, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = RANDOM.integers(0, np.iinfo(dtype).max, (4, 6, 5, 3), dtype=dtype)
    save(tmp_path / name, pixels)
    monkeypatch.setenv("HOME", str(tmp_path))
    images = open_source(f"~/{name}", tmp_path / "cache")
    assert images.image_shape == (3, 6, 5)
    assert images.images.dtype == dtype
    assert np.array_equal(pixels_of(images), pixels)


@pytest.mark.parametrize("name", ["images.npy", "images.npz"])
@pytest.mark.parametrize("settings", [{}, {"resolution": [6, 5]}, {"num_channels": 4}], ids=str)
def test_an_array_of_another_machine_keeps_every_bit(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    """Its numbers have their bytes the other way round."""
    pixels = RANDOM.integers(0, 65536, (4, 6, 5, 3), dtype=np.uint16)
    path = save(tmp_path / name, pixels.astype(pixels.dtype.newbyteorder()))
    images = open_source(path, tmp_path / "cache", **settings)
    assert images.images.dtype == np.uint16
    assert images.images.dtype.isnative
    assert np.array_equal(pixels_of(images)[..., :3], pixels)


def test_a_npy_file_that_is_ready_is_not_copied(tmp_path: Path) -> None:
    images = open_source(save(tmp_path / "x.npy", PIXELS), tmp_path / "cache")
    assert isinstance(images.images.base, np.memmap)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("channels", [1, 2, 7, 12])
def test_any_number_of_channels_can_be_asked_for(tmp_path: Path, channels: int) -> None:
    pixels = RANDOM.integers(0, 256, (4, 6, 5, channels), dtype=np.uint8)
    path = save(tmp_path / "x.npy", pixels)
    assert np.array_equal(pixels_of(open_source(path, tmp_path / "cache", num_channels=channels)), pixels)
    assert open_source(path, tmp_path / "cache", num_channels=channels, resolution=4).image_shape == (channels, 4, 4)
    if channels != 1:
        assert "as many as data.num_channels says" in refusal(path, tmp_path / "cache")


def test_images_without_a_channel_axis_are_gray(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", PIXELS[..., 0])
    assert np.array_equal(pixels_of(open_source(path, tmp_path / "cache")), PIXELS[..., :1])


def test_labels_of_an_npz_are_numbered_classes(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", PIXELS, labels=np.array([0, 1, 1, 2], dtype=np.uint8))
    images = open_source(path, tmp_path / "cache", with_labels=True, split="train[:3]")
    assert images.labels is not None
    assert [images.class_names, images.labels.tolist()] == [("0", "1", "2"), [0, 1, 1]]
    assert "has no labels" in refusal(save(tmp_path / "y.npz", PIXELS), tmp_path / "cache", with_labels=True)


def test_arrays_are_found_or_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=PIXELS)
    assert np.array_equal(pixels_of(open_source(tmp_path / "x.npz", tmp_path / "cache")), PIXELS)
    np.savez(tmp_path / "y.npz", x_train=PIXELS, x_test=PIXELS[:2], y_train=np.arange(4), y_test=np.arange(2))
    message = refusal(tmp_path / "y.npz", tmp_path / "cache")
    assert "images is not among the arrays of" in message
    assert "which are x_train, x_test, y_train, y_test; name one with data.image_column." in message
    named = {"image_column": "x_test", "label_column": "y_test"}
    assert len(open_source(tmp_path / "y.npz", tmp_path / "cache", with_labels=True, **named)) == 2
    for setting in ("image_column", "label_column"):
        assert f"data.{setting} 'z' is not among" in refusal(tmp_path / "x.npz", tmp_path / "cache", **{setting: "z"})


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"images": np.zeros((2, 8, 8, 1), np.float32)}, "holds float32 (2, 8, 8, 1); it must be uint8 or uint16"),
        ({"images": np.zeros((2, 8, 8, 1), np.int64)}, "holds int64 (2, 8, 8, 1); it must be uint8 or uint16"),
        ({"images": np.zeros((8, 8), np.uint8)}, "it must be uint8 or uint16 (number, height, width, channels)"),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, "with 1, 3 or 4 channels, or as many as data.num_channels says"),
        ({"images": np.zeros((0, 8, 8, 1), np.uint8)}, "holds no images"),
        ({"images": np.zeros((2, 8, 8, 1), np.uint8), "labels": np.zeros(3, np.int64)}, "they must be 2 integers"),
        ({"images": np.zeros((2, 8, 8, 1), np.uint8), "labels": np.zeros(2)}, "they must be 2 integers"),
        ({"images": np.array([{}])}, "cannot be read as a NumPy array"),
        ({}, "images is not among the arrays of"),
    ],
)
def test_an_array_that_holds_no_images_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    assert sentence in refusal(tmp_path / "x.npz", tmp_path)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize("length", [0, 1, 50, -100])
def test_a_damaged_array_file_is_refused(tmp_path: Path, name: str, length: int) -> None:
    path = save(tmp_path / name, PIXELS)
    path.write_bytes(path.read_bytes()[:length])
    assert f"{name} cannot be read as a NumPy array" in refusal(path, tmp_path)


def test_a_compressed_array_with_a_damaged_byte_is_refused(tmp_path: Path) -> None:
    """One behind another, since not every one is noticed in the same way: by the decompressor or by a checksum."""
    np.savez_compressed(tmp_path / "x.npz", images=np.arange(4096, dtype=np.uint8).reshape(4, 32, 32, 1) % 251)
    whole = (tmp_path / "x.npz").read_bytes()
    for place in range(60, 300, 12):
        (tmp_path / "x.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        assert "x.npz cannot be read as a NumPy array" in refusal(tmp_path / "x.npz", tmp_path)


def test_labels_that_number_no_class_are_none_or_refused(tmp_path: Path) -> None:
    missing = save(tmp_path / "x.npz", PIXELS, labels=np.full(4, -1))
    assert open_source(missing, tmp_path / "cache").labels is None
    assert "has no labels, but the network is class-conditional" in refusal(missing, tmp_path, with_labels=True)
    huge = save(tmp_path / "y.npz", PIXELS, labels=np.array([0, 1, 2**63 + 5, 1], np.uint64))
    assert "has label 9223372036854775813, which numbers no class" in refusal(huge, tmp_path)


@pytest.mark.parametrize("split", ["test", "train[9:]"])
def test_a_part_that_an_array_does_not_have_is_refused(tmp_path: Path, split: str) -> None:
    message = refusal(save(tmp_path / "x.npy", PIXELS), tmp_path, split=split)
    assert "has no split 'test'" in message or "split 'train[9:]'" in message


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"resolution": 4}, (3, 4, 4)),
        ({"crop_before_resize": 5}, (3, 5, 5)),
        ({"num_channels": 4}, (4, 6, 5)),
        ({"resolution": 4, "resize_to": 0, "crop": "random"}, (3, 4, 4)),
        ({"resolution": [6, 5]}, (3, 6, 5)),
    ],
)
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_an_array_is_transformed_like_any_other_images(
    tmp_path: Path, name: str, settings: dict[str, Any], shape: tuple[int, ...]
) -> None:
    images = open_source(save(tmp_path / name, PIXELS), tmp_path / "cache", **settings)
    assert images.image_shape == shape
    assert pixels_of(images).shape == (4, *shape[1:], shape[0])


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize("settings", [{}, {"resolution": 4}], ids=str)
def test_an_array_written_anew_is_read_anew(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    """Also where one value of one image of a thousand changed: a run must not go on with it, nor see what was there."""
    pixels = RANDOM.integers(0, 256, (1000, 4, 4, 1), dtype=np.uint8)
    before = open_source(save(tmp_path / name, pixels), tmp_path / "cache", **settings)
    assert open_source(tmp_path / name, tmp_path / "cache", **settings).digest == before.digest
    elsewhere = open_source(save(tmp_path / f"again_{name}", pixels), tmp_path / "cache", **settings)
    assert elsewhere.digest == before.digest, "what is in it counts, not where it lies"
    pixels[2, 3, 3] ^= 255
    (tmp_path / name).unlink()  # what is mapped into memory is not written to
    after = open_source(save(tmp_path / name, pixels), tmp_path / "cache", **settings)
    assert np.array_equal(pixels_of(after), pixels)
    assert after.digest != before.digest


def test_a_part_of_an_array_has_another_digest(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", PIXELS)
    digests = {
        open_source(path, tmp_path / "cache", split=split).digest for split in ("train", "train[:3]", "train[1:]")
    }
    assert len(digests) == 3
