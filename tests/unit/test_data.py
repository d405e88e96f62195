"""Images of every kind are decoded without loss or refused with a sentence, and come in a reproducible order."""

import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from ddpm_hf.config import DataConfig
from ddpm_hf.data import DataError, ImageSet, SampleOrder, normalize, open_images
from tests.conftest import DIGITS

RANDOM = np.random.default_rng(0)
GRAY = RANDOM.integers(0, 256, (6, 5), dtype=np.uint8)
RGB = RANDOM.integers(0, 256, (6, 5, 3), dtype=np.uint8)
RGBA = RANDOM.integers(0, 256, (6, 5, 4), dtype=np.uint8)


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def encode(image: Image.Image | np.ndarray, image_format: str = "PNG", **options: Any) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[object] | None = None,
    label_feature: object = None,
    names: Sequence[str] | None = None,
) -> Path:
    """Writes a data set as people publish it, from encoded images."""
    cells = [None if data is None else {"bytes": data, "path": None} for data in images]
    columns: dict[str, list[object]] = {"image": cells}
    features: dict[str, object] = {"image": datasets.Image()}
    if names is not None:
        columns["image"] = [{"bytes": data, "path": name} for data, name in zip(images, names, strict=True)]
    if labels is not None:
        columns["label"] = list(labels)
        features["label"] = label_feature or datasets.ClassLabel(names=["cat", "dog"])
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return path


def open_one(tmp_path: Path, data: bytes, **settings: Any) -> np.ndarray:
    """Returns the pixels of the only image of a data set, channels last."""
    config = DataConfig(
        source=str(write_parquet(tmp_path / "one.parquet", [data])), cache_dir=str(tmp_path), **settings
    )
    images = open_images(config, with_labels=False)
    assert len(images) == 1
    return images.images[0].transpose(1, 2, 0)


def refusal(source: Path | str, cache_dir: Path, *, with_labels: bool = False, **settings: Any) -> str:
    """Returns the sentence with which a data set is refused."""
    with pytest.raises(DataError) as caught:
        open_images(DataConfig(source=str(source), cache_dir=str(cache_dir), **settings), with_labels=with_labels)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- where from


def test_the_embedded_digits_open_like_any_other_parquet(cache_dir: Path) -> None:
    images = open_images(DataConfig(source=str(DIGITS), cache_dir=str(cache_dir)), with_labels=True)
    assert len(images) == 1797
    assert images.image_shape == (1, 8, 8)
    assert images.class_names == tuple("0123456789")
    assert images.labels is not None
    assert np.bincount(images.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert isinstance(images.images, np.memmap), "decoded images stay on the disk"


def test_a_folder_of_images_opens_with_its_class_folders_as_labels(tmp_path: Path, cache_dir: Path) -> None:
    for name, pixels in (("dog/1.png", RGB), ("cat/1.png", 255 - RGB), ("dog/2.png", RGB // 2)):
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / name).write_bytes(encode(pixels))
    images = open_images(DataConfig(source=str(tmp_path / "pets"), cache_dir=str(cache_dir)), with_labels=True)
    assert images.class_names == ("cat", "dog")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 1]
    assert np.array_equal(images.images[0].transpose(1, 2, 0), 255 - RGB)


def test_a_flat_folder_of_images_has_no_labels(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "flat").mkdir()
    for name in ("b.png", "a.png"):
        (tmp_path / "flat" / name).write_bytes(encode(RGB if name == "a.png" else 255 - RGB))
    images = open_images(DataConfig(source=str(tmp_path / "flat"), cache_dir=str(cache_dir)), with_labels=False)
    assert images.labels is None
    assert images.class_names is None
    assert np.array_equal(images.images[0].transpose(1, 2, 0), RGB)
    assert "has no label column" in refusal(tmp_path / "flat", cache_dir, with_labels=True)


def test_a_folder_of_parquet_files_opens_as_one_data_set(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "parts").mkdir()
    for number in range(3):
        write_parquet(tmp_path / "parts" / f"{number}.parquet", [encode(GRAY + np.uint8(number))] * 2, [0, 1])
    images = open_images(DataConfig(source=str(tmp_path / "parts"), cache_dir=str(cache_dir)), with_labels=True)
    assert [int(image[0, 0, 0]) for image in images.images] == [
        int(GRAY[0, 0]) + number for number in (0, 0, 1, 1, 2, 2)
    ]


def test_a_label_without_a_class_name_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    """Nothing checks labels when a data set is published; the network has no embedding for this one."""
    path = write_parquet(tmp_path / "x.parquet", [encode(GRAY)] * 2, [1, 7], datasets.Value("int64"))
    columns = pyarrow.parquet.read_table(path)
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(columns.replace_schema_metadata(metadata), path)
    assert f"row 1 of {path} has label 7; every image needs one from 0 to 1." in refusal(
        path, cache_dir, with_labels=True
    )


def test_integer_labels_are_named_by_their_numbers(tmp_path: Path, cache_dir: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(GRAY)] * 3, [2, 0, 2], datasets.Value("int32"))
    images = open_images(DataConfig(source=str(path), cache_dir=str(cache_dir)), with_labels=True)
    assert images.class_names == ("0", "1", "2")
    assert images.labels is not None
    assert images.labels.dtype == np.int64


@pytest.mark.parametrize("name", ["images.npy", "images.npz"])
def test_an_array_file_is_read_as_it_is(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = RANDOM.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    if name == "images.npy":
        np.save(tmp_path / name, pixels)
    else:
        np.savez(tmp_path / name, images=pixels, labels=np.array([0, 1, 1, 2], dtype=np.uint8))
    monkeypatch.setenv("HOME", str(tmp_path))
    images = open_images(DataConfig(source=f"~/{name}"), with_labels=name == "images.npz")
    assert images.image_shape == (3, 6, 5)
    assert np.array_equal(images.take(np.array([2]))[0][0], pixels[2].transpose(2, 0, 1))
    assert (images.class_names, None if images.labels is None else images.labels.tolist()) == (
        (None, None) if name == "images.npy" else (("0", "1", "2"), [0, 1, 1, 2])
    )


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"pictures": np.zeros((2, 8, 8, 1), np.uint8)}, "holds no array called images"),
        ({"images": np.zeros((2, 8, 8, 1), np.float32)}, "holds float32 (2, 8, 8, 1); it must be uint8"),
        ({"images": np.zeros((2, 8, 8), np.uint8)}, "it must be uint8 (number, height, width, 1 or 3 or 4 channels)"),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, "it must be uint8"),
        ({"images": np.zeros((0, 8, 8, 1), np.uint8)}, "holds no images"),
        ({"images": np.zeros((2, 8, 8, 1), np.uint8), "labels": np.zeros(3, np.int64)}, "they must be 2 integers"),
        ({"images": np.zeros((2, 8, 8, 1), np.uint8), "labels": np.zeros(2)}, "they must be 2 integers"),
        ({"images": np.array([{}])}, "cannot be read as a NumPy array"),
    ],
)
def test_an_array_that_holds_no_images_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    assert sentence in refusal(tmp_path / "x.npz", tmp_path)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize("length", [0, 1, 50, -100])
def test_a_damaged_array_file_is_refused(tmp_path: Path, name: str, length: int) -> None:
    pixels = RANDOM.integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    np.save(tmp_path / name, pixels) if name == "x.npy" else np.savez(tmp_path / name, images=pixels)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:length])
    assert f"{name} cannot be read as a NumPy array" in refusal(tmp_path / name, tmp_path)


@pytest.mark.parametrize(
    "settings", [{"resolution": 16}, {"image_column": "image"}, {"label_column": "label"}, {"split": "test"}]
)
def test_a_setting_that_an_array_file_cannot_follow_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8, 1), np.uint8))
    assert f"data.{next(iter(settings))} does not apply" in refusal(tmp_path / "x.npy", tmp_path, **settings)


def test_an_array_file_of_other_channels_than_asked_for_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8, 1), np.uint8))
    assert "data.num_channels is 3, but the images" in refusal(tmp_path / "x.npy", tmp_path, num_channels=3)
    open_images(DataConfig(source=str(tmp_path / "x.npy"), num_channels=1), with_labels=False)


@pytest.mark.parametrize("source", ["missing.parquet", "missing.npz", "/missing/folder", "./missing", "~/missing"])
def test_a_path_that_does_not_exist_is_named(cache_dir: Path, source: str) -> None:
    assert "does not exist; check the path" in refusal(source, cache_dir)


def test_a_name_that_is_neither_here_nor_on_the_hub_says_so(cache_dir: Path) -> None:
    message = refusal("nobody/no-such-data-1.0", cache_dir)
    assert "nobody/no-such-data-1.0, which is no file or folder here, cannot be opened" in message


def test_a_file_of_another_kind_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "notes.txt").write_text("no images")
    assert "is a .txt file; give .parquet" in refusal(tmp_path / "notes.txt", cache_dir)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    assert "cannot be opened" in refusal(tmp_path / "broken.parquet", cache_dir)


def test_a_data_set_without_images_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    assert "holds no images" in refusal(write_parquet(tmp_path / "x.parquet", []), cache_dir)
    (tmp_path / "empty").mkdir()
    assert "cannot be opened" in refusal(tmp_path / "empty", cache_dir)
    (tmp_path / "empty" / "notes.txt").write_text("")
    assert "split 'train' of" in refusal(tmp_path / "empty", cache_dir)


def test_a_split_that_does_not_exist_is_named(cache_dir: Path) -> None:
    message = refusal(DIGITS, cache_dir, split="test")
    assert "cannot be opened (split 'test'): Unknown split" in message


# ------------------------------------------------------------------------------------------------------- columns


def test_a_column_that_does_not_exist_is_refused_with_those_that_do(cache_dir: Path) -> None:
    assert "data.image_column 'picture' is not a column" in refusal(DIGITS, cache_dir, image_column="picture")
    message = refusal(DIGITS, cache_dir, label_column="class")
    assert "data.label_column 'class' is not a column" in message
    assert message.endswith("it has image, label.")


def test_columns_that_hold_something_else_are_refused(tmp_path: Path, cache_dir: Path) -> None:
    assert "not images" in refusal(DIGITS, cache_dir, image_column="label")
    assert "not integer labels" in refusal(DIGITS, cache_dir, label_column="image")
    path = write_parquet(tmp_path / "x.parquet", [encode(GRAY)] * 2, ["a", "b"], datasets.Value("string"))
    assert "not integer labels" in refusal(path, cache_dir, label_column="label")
    assert "has no label column" in refusal(path, cache_dir, with_labels=True)
    assert open_images(DataConfig(source=str(path), cache_dir=str(cache_dir)), with_labels=False).labels is None


def test_one_of_several_image_columns_must_be_named(tmp_path: Path, cache_dir: Path) -> None:
    columns = {"front": [{"bytes": encode(GRAY)}], "back": [{"bytes": encode(255 - GRAY)}], "size": [1]}
    features = {"front": datasets.Image(), "back": datasets.Image(), "size": datasets.Value("int64")}
    path = tmp_path / "x.parquet"
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    assert "has 2 image columns among front, back, size; name one with data.image_column" in refusal(path, cache_dir)
    for column, pixels in (("front", GRAY), ("back", 255 - GRAY)):
        config = DataConfig(source=str(path), cache_dir=str(cache_dir), image_column=column)
        assert np.array_equal(open_images(config, with_labels=False).images[0, 0], pixels)
    assert "has 0 image columns" in refusal(write_table(tmp_path / "y.parquet", {"size": [1]}), cache_dir)


def write_table(path: Path, columns: dict[str, list[object]]) -> Path:
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("labels", "found"), [([0, None, 1], "no label"), ([0, -1, 1], "no label"), ([0, -3, 1], "label -3")]
)
def test_a_missing_label_matters_only_to_a_network_with_classes(
    tmp_path: Path, cache_dir: Path, labels: list[int | None], found: str
) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(GRAY)] * 3, labels, datasets.Value("int64"))
    assert f"row 1 of {path} has {found}; every image needs one from 0 to 1." in refusal(
        path, cache_dir, with_labels=True
    )
    assert len(open_images(DataConfig(source=str(path), cache_dir=str(cache_dir)), with_labels=False)) == 3


# ------------------------------------------------------------------------------------------------ kinds of images


@pytest.mark.parametrize("pixels", [GRAY[..., None], RGB, RGBA], ids=["L", "RGB", "RGBA"])
def test_plain_images_keep_every_bit(tmp_path: Path, pixels: np.ndarray) -> None:
    assert np.array_equal(open_one(tmp_path, encode(pixels.squeeze())), pixels)


def test_a_palette_image_becomes_the_colours_it_shows(tmp_path: Path) -> None:
    image = Image.fromarray(RGB).quantize(8)
    assert np.array_equal(open_one(tmp_path, encode(image)), np.asarray(image.convert("RGB")))


def test_a_palette_with_transparency_keeps_it(tmp_path: Path) -> None:
    image = Image.fromarray(RGB).quantize(8)
    data = encode(image, transparency=bytes([0, 128] + [255] * 6))
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    assert len(np.unique(shown[..., 3])) > 1
    assert np.array_equal(open_one(tmp_path, data), shown)
    assert "set data.num_channels to 4" in refusal(
        write_parquet(tmp_path / "x.parquet", [data]), tmp_path, num_channels=3
    )


def test_a_one_bit_image_becomes_black_and_white(tmp_path: Path) -> None:
    bits = GRAY > 127
    assert np.array_equal(open_one(tmp_path, encode(Image.fromarray(bits)))[..., 0], np.where(bits, 255, 0))


def test_a_cmyk_image_becomes_rgb(tmp_path: Path) -> None:
    image = Image.fromarray(RGB).convert("CMYK")
    assert np.array_equal(open_one(tmp_path, encode(image, "TIFF")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_a_photo_is_turned_as_its_camera_says(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 6: np.rot90(RGB, -1), 8: np.rot90(RGB)}[orientation]
    assert np.array_equal(open_one(tmp_path, encode(RGB, exif=exif)), upright)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GRAY.astype(np.uint16) * 257),
        Image.fromarray(GRAY.astype(np.int32)),
        Image.fromarray(GRAY.astype(np.float32)),
        Image.fromarray(RGBA).convert("LA"),
    ],
    ids=lambda image: image.mode,
)
def test_pixels_that_would_lose_something_are_refused(tmp_path: Path, cache_dir: Path, image: Image.Image) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(image, "TIFF")])
    message = refusal(path, cache_dir)
    assert message.startswith(f"image 0 of {path} has mode {image.mode}"[:-1])
    assert message.endswith("convert it to 8-bit gray (L), RGB or RGBA.")


def test_more_channels_than_asked_for_are_refused(tmp_path: Path, cache_dir: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(RGB), encode(RGBA)])
    message = refusal(path, cache_dir, num_channels=3)
    assert f"image 1 of {path} has mode RGBA where RGB is asked for" in message
    assert "set data.num_channels to 4" in message
    assert "mode RGB where L is asked for" in refusal(path, cache_dir, num_channels=1)


def test_fewer_channels_than_asked_for_are_filled_without_loss(tmp_path: Path) -> None:
    assert np.array_equal(open_one(tmp_path, encode(GRAY), num_channels=3), np.repeat(GRAY[..., None], 3, axis=2))
    opaque = np.concatenate([RGB, np.full((6, 5, 1), 255, np.uint8)], axis=2)
    assert np.array_equal(open_one(tmp_path, encode(RGB), num_channels=4), opaque)


def test_the_first_image_decides_the_channels(tmp_path: Path, cache_dir: Path) -> None:
    mixed = write_parquet(tmp_path / "x.parquet", [encode(RGB), encode(GRAY)])
    images = open_images(DataConfig(source=str(mixed), cache_dir=str(cache_dir)), with_labels=False)
    assert images.image_shape == (3, 6, 5)
    turned = write_parquet(tmp_path / "y.parquet", [encode(GRAY), encode(RGB)])
    assert f"image 1 of {turned} has mode RGB where L is asked for" in refusal(turned, cache_dir)


@pytest.mark.parametrize("data", [encode(RGB)[:-30], b"not an image", encode(RGB, "JPEG")[:300]])
def test_a_damaged_image_is_named(tmp_path: Path, cache_dir: Path, data: bytes) -> None:
    names = ["good.png", "bad.png"]
    path = write_parquet(tmp_path / "x.parquet", [encode(RGB), data], names=names)
    assert f"image 1 of {path} (bad.png) cannot be decoded" in refusal(path, cache_dir)
    assert not [entry for entry in cache_dir.iterdir() if entry.is_dir()], "no half of a data set is left"


def test_a_damaged_file_in_a_folder_is_named(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(encode(RGB))
    (tmp_path / "flat" / "b.png").write_bytes(encode(RGB)[:60])
    assert f"image 1 of {tmp_path / 'flat'} (b.png) cannot be decoded" in refusal(tmp_path / "flat", cache_dir)


def test_a_row_without_an_image_is_named(tmp_path: Path, cache_dir: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(RGB), None])
    assert refusal(path, cache_dir) == f"row 1 of {path} has no image; remove the row."


# ---------------------------------------------------------------------------------------------------------- sizes


def test_unequal_sizes_are_refused_until_a_resolution_is_set(tmp_path: Path, cache_dir: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(RGB), encode(RGB), encode(RGB[:, :4])])
    message = refusal(path, cache_dir)
    assert f"image 2 of {path} has 4x6 pixels where the first has 5x6; set data.resolution" in message
    config = DataConfig(source=str(path), cache_dir=str(cache_dir), resolution=4)
    assert open_images(config, with_labels=False).images.shape == (3, 3, 4, 4)


def test_an_image_of_the_right_size_is_not_resampled(tmp_path: Path) -> None:
    square = RGB[:5]
    assert np.array_equal(open_one(tmp_path, encode(square), resolution=5), square)


def test_resizing_takes_the_centre(tmp_path: Path) -> None:
    """Off by one where the whole image, resized and rounded first, gives the other neighbour."""
    wide = RANDOM.integers(0, 256, (8, 24, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(wide).resize((12, 4), Image.Resampling.LANCZOS))[:, 4:8].astype(int)
    assert abs(open_one(tmp_path, encode(wide), resolution=4) - expected).max() <= 1
    high = wide.transpose(1, 0, 2)
    assert np.array_equal(open_one(tmp_path, encode(high), resolution=8), high[8:16])


def test_making_images_smaller_does_not_alias(tmp_path: Path) -> None:
    """A checkerboard of single pixels is gray from afar; without antialiasing it stays black and white."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = open_one(tmp_path, encode(board), resolution=8)
    assert small.shape == (8, 8, 1)
    assert abs(small.astype(int) - 127).max() <= 8


# ---------------------------------------------------------------------------------------------------------- cache


def decoded_dirs(cache_dir: Path) -> list[Path]:
    return [path for path in cache_dir.iterdir() if path.is_dir()]


def test_images_are_decoded_once(tmp_path: Path, cache_dir: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(RGB), encode(255 - RGB)], [0, 1])
    config = DataConfig(source=str(path), cache_dir=str(cache_dir))
    first = open_images(config, with_labels=True)
    (folder,) = decoded_dirs(cache_dir)
    before = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in sorted(folder.iterdir())]
    second = open_images(config, with_labels=False)
    assert [(file.stat().st_ino, file.stat().st_mtime_ns) for file in sorted(folder.iterdir())] == before
    assert np.array_equal(first.images, second.images)


def test_other_data_or_another_transform_is_decoded_anew(tmp_path: Path, cache_dir: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(RGB)])
    shapes = []
    for settings in ({}, {"resolution": 4}, {"num_channels": 4}):
        config = DataConfig(source=str(path), cache_dir=str(cache_dir), **settings)
        shapes.append(open_images(config, with_labels=False).image_shape)
    assert shapes == [(3, 6, 5), (3, 4, 4), (4, 6, 5)]
    changed = open_images(
        DataConfig(source=str(write_parquet(path, [encode(255 - RGB)])), cache_dir=str(cache_dir)), with_labels=False
    )
    assert np.array_equal(changed.images[0].transpose(1, 2, 0), 255 - RGB), "the file's content counts, not its name"
    assert len(decoded_dirs(cache_dir)) == 4


def test_a_changed_file_in_a_folder_is_noticed(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "flat").mkdir()
    config = DataConfig(source=str(tmp_path / "flat"), cache_dir=str(cache_dir))
    for pixels in (RGB, 255 - RGB):
        (tmp_path / "flat" / "a.png").write_bytes(encode(pixels))
        assert np.array_equal(open_images(config, with_labels=False).images[0].transpose(1, 2, 0), pixels)


def test_a_part_of_a_split_has_a_cache_of_its_own(tmp_path: Path, cache_dir: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(GRAY + np.uint8(number)) for number in range(4)])
    for split, first, count in (("train", 0, 4), ("train[2:]", 2, 2), ("train[:1]", 0, 1)):
        config = DataConfig(source=str(path), cache_dir=str(cache_dir), split=split)
        images = open_images(config, with_labels=False)
        assert len(images) == count
        assert np.array_equal(images.images[0, 0], GRAY + np.uint8(first))


@pytest.mark.parametrize("leftover", ["building", "without meta.json"])
def test_a_cache_that_a_kill_left_half_built_is_built_again(tmp_path: Path, cache_dir: Path, leftover: str) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(GRAY)] * 50, [0, 1] * 25)
    config = DataConfig(source=str(path), cache_dir=str(cache_dir))
    expected = np.array(open_images(config, with_labels=True).images)
    (folder,) = decoded_dirs(cache_dir)
    (folder / "meta.json").unlink()
    (folder / "images.npy").write_bytes((folder / "images.npy").read_bytes()[:1000])
    if leftover == "building":
        folder.rename(folder.with_name(f"{folder.name}.building"))
    assert np.array_equal(open_images(config, with_labels=True).images, expected)
    assert decoded_dirs(cache_dir) == [folder]


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = write_parquet(tmp_path / "x.parquet", [encode(GRAY)])
    open_images(DataConfig(source=str(path)), with_labels=False)
    assert decoded_dirs(tmp_path / "xdg" / "ddpm_hf" / "images")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(DIGITS, tmp_path / "file" / "cache")
    assert "cannot be written" in message
    assert "give another folder with data.cache_dir" in message


# ----------------------------------------------------------------------------------------------- sets and order


def numbered(count: int) -> ImageSet:
    """A data set whose image i is i everywhere and has the label i."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 1, 2, 2))
    return ImageSet(images, np.arange(count), None, np.arange(count))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.95])
def test_a_split_is_disjoint_and_complete_and_always_the_same(fraction: float) -> None:
    training, held_out = numbered(101).split(fraction, seed=3)
    assert len(held_out) == round(101 * fraction)
    assert sorted([*training.indices, *held_out.indices]) == list(range(101))
    again, _ = numbered(101).split(fraction, seed=3)
    assert np.array_equal(training.indices, again.indices)
    pixels, labels = held_out.take(held_out.positions)
    assert labels is not None
    assert np.array_equal(pixels[:, 0, 0, 0], labels)
    if fraction:
        assert not np.array_equal(training.indices, numbered(101).split(fraction, seed=4)[0].indices)


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_split_that_leaves_a_side_empty_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match=f"data.validation_fraction {fraction} of 10 images leaves"):
        numbered(10).split(fraction, seed=0)


@pytest.mark.parametrize("num_positions", [1, 3, 10, 64])
@pytest.mark.parametrize("batch", [1, 4, 7, 25])
def test_every_epoch_shows_every_image_once_whatever_the_batch(num_positions: int, batch: int) -> None:
    """Batches straddle epochs: nothing is dropped, nothing comes twice."""
    order = SampleOrder(num_positions, seed=0)
    num_epochs = batch + 1
    stops = [*range(0, num_positions * num_epochs, batch), num_positions * num_epochs]
    samples = np.concatenate([order.positions(start, stop) for start, stop in itertools.pairwise(stops)])
    epochs = samples.reshape(num_epochs, num_positions)
    assert (np.sort(epochs, axis=1) == np.arange(num_positions)).all()
    if num_positions >= 10:
        assert len(np.unique(epochs, axis=0)) == num_epochs, "every epoch has its own order"


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
def test_the_ranks_together_see_the_global_batch(num_ranks: int) -> None:
    batch, share = 12, 12 // num_ranks
    whole, split = SampleOrder(17, seed=1), [SampleOrder(17, seed=1) for _ in range(num_ranks)]
    for step in range(10):
        first = step * batch
        parts = [order.positions(first + rank * share, first + (rank + 1) * share) for rank, order in enumerate(split)]
        assert np.array_equal(np.concatenate(parts), whole.positions(first, first + batch))


def test_the_order_is_a_closed_form_of_the_sample_number() -> None:
    """A resume at sample 10^15 is as quick as a start: if it walked through those before, this would not end."""
    start = 10**15 - 3
    fresh = SampleOrder(1000, seed=0).positions(start, start + 10)
    assert np.array_equal(SampleOrder(1000, seed=0).positions(start, start + 10), fresh)
    used = SampleOrder(1000, seed=0)
    for sample in (0, 5000, start - 5000, 70):
        used.positions(sample, sample + 1500)
    assert np.array_equal(used.positions(start, start + 10), fresh), "what was asked before does not matter"


def test_another_seed_gives_another_order() -> None:
    assert not np.array_equal(SampleOrder(100, seed=0).positions(0, 100), SampleOrder(100, seed=1).positions(0, 100))


def test_normalize_maps_stored_pixels_exactly() -> None:
    """Multiples of 1/127.5 in float32; both ends and the 0.5 between them are exact or rounded once."""
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    values = normalize(pixels)
    assert values.dtype == torch.float32
    assert (values.min(), values.max()) == (-1.0, 1.0)
    exact = torch.arange(256, dtype=torch.float64).reshape(1, 1, 16, 16) / 127.5 - 1
    assert (values.double() - exact).abs().max() <= 2**-23
    assert torch.equal(((values + 1) * 127.5).round().to(torch.uint8), pixels), "nothing is lost on the way back"


def test_normalize_mirrors_only_the_chosen_images() -> None:
    pixels = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    plain = normalize(pixels)
    mirrored = normalize(pixels, torch.tensor([False, True]))
    assert torch.equal(mirrored[0], plain[0])
    assert torch.equal(mirrored[1], plain[1].flip(-1))
