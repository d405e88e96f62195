"""Data sets of every kind open by their name or path, with their labels, or are refused with a sentence."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch

from ddpm_hf.config import DataConfig
from ddpm_hf.data import DataError, ImageSet, open_images, open_sets
from tests.conftest import DIGITS
from tests.unit.data.helpers import GRAY, RGB, encode, open_source, pixels_of, refusal, write_files, write_parquet


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


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
    assert "has no labels" in refusal(tmp_path / "flat", cache_dir, with_labels=True)


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
    assert f"image 1 of {path} has label 7; every image needs one from 0 to 1." in refusal(
        path, cache_dir, with_labels=True
    )


def test_integer_labels_are_named_by_their_numbers(tmp_path: Path, cache_dir: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(GRAY)] * 3, [2, 0, 2], datasets.Value("int32"))
    images = open_images(DataConfig(source=str(path), cache_dir=str(cache_dir)), with_labels=True)
    assert images.class_names == ("0", "1", "2")
    assert images.labels is not None
    assert images.labels.dtype == np.int64


@pytest.mark.parametrize("source", ["missing.parquet", "missing.npz", "/missing/folder", "./missing", "~/missing"])
def test_a_path_that_does_not_exist_is_named(cache_dir: Path, source: str) -> None:
    assert "does not exist; check the path" in refusal(source, cache_dir)


def test_a_name_that_is_neither_here_nor_on_the_hub_says_so(cache_dir: Path) -> None:
    message = refusal("nobody/no-such-data-1.0", cache_dir)
    assert "nobody/no-such-data-1.0, which is no file or folder here, cannot be opened" in message


def test_a_file_of_another_kind_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "notes.txt").write_text("no images")
    assert "is a .txt file; give a .parquet" in refusal(tmp_path / "notes.txt", cache_dir)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    assert "cannot be opened" in refusal(tmp_path / "broken.parquet", cache_dir)


def test_a_data_set_without_images_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    assert "holds no images" in refusal(write_parquet(tmp_path / "x.parquet", []), cache_dir)
    (tmp_path / "empty").mkdir()
    assert "holds no images (split 'train'), but nothing" in refusal(tmp_path / "empty", cache_dir)
    (tmp_path / "empty" / "notes.txt").write_text("")
    assert "but 1 other file, notes.txt;" in refusal(tmp_path / "empty", cache_dir)


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
    assert "has no labels" in refusal(path, cache_dir, with_labels=True)
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
    assert f"image 1 of {path} has {found}; every image needs one from 0 to 1." in refusal(
        path, cache_dir, with_labels=True
    )
    assert len(open_images(DataConfig(source=str(path), cache_dir=str(cache_dir)), with_labels=False)) == 3


@pytest.mark.parametrize("missing", [None, -1])
def test_labels_that_are_all_missing_are_no_labels(tmp_path: Path, cache_dir: Path, missing: int | None) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(GRAY)] * 3, [missing] * 3, datasets.Value("int64"))
    assert f"{path} has no labels, but the network is class-conditional" in refusal(path, cache_dir, with_labels=True)
    assert open_images(DataConfig(source=str(path), cache_dir=str(cache_dir)), with_labels=False).labels is None


def test_a_label_that_is_too_large_to_be_counted_is_named(tmp_path: Path, cache_dir: Path) -> None:
    labels = pyarrow.array([0, 2**63 + 5], pyarrow.uint64())
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": [encode(GRAY)] * 2, "label": labels}), path)
    assert f"{path} has label 9223372036854775813, which numbers no class" in refusal(path, cache_dir)


@pytest.fixture
def hub_data_set() -> str:
    """The id of a data set of the Hub that is in the cache of `datasets`, as after a first download."""
    root = Path(datasets.config.HF_DATASETS_CACHE)
    target = root / "someone___digits" / "default" / "0.0.0"
    if not target.exists():
        files = {"train": str(DIGITS), "test": str(DIGITS)}
        datasets.load_dataset("parquet", data_files=files, cache_dir=str(root / "build"))
        target.parent.mkdir(parents=True)
        (built,) = (root / "build" / "parquet").glob("*/*")
        built.rename(target)
        for file in target.glob("*/parquet-*.arrow"):
            file.rename(file.with_name(file.name.replace("parquet-", "digits-")))
    return "someone/digits"


def test_a_data_set_of_the_hub_opens_by_its_id(hub_data_set: str, cache_dir: Path) -> None:
    images = open_source(hub_data_set, cache_dir, with_labels=True, split="test[:100]")
    assert np.array_equal(pixels_of(images), pixels_of(open_source(DIGITS, cache_dir))[:100])
    assert images.class_names == tuple("0123456789")
    refused = refusal(hub_data_set, cache_dir, subset="large")
    assert "cannot be opened (split 'train'): Couldn't find cache for someone/digits for config 'large'" in refused


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"subset": "large"}, "data.subset does not apply to {}, which is no data set of the Hub; leave it out"),
        ({"revision": "main"}, "data.revision does not apply to {}, which is no data set of the Hub; leave it out"),
        ({"image_column": "a"}, "data.image_column does not apply to {}, which has folders instead of columns"),
        ({"label_column": "a"}, "data.label_column does not apply to {}, which has folders instead of columns"),
    ],
)
def test_a_setting_that_a_folder_cannot_follow_is_refused(
    tmp_path: Path, cache_dir: Path, setting: dict[str, str], sentence: str
) -> None:
    folder = write_files(tmp_path / "flat", {"a.png": encode(RGB)})
    assert sentence.format(folder).replace("it out", "the setting out") in refusal(folder, cache_dir, **setting)


# ------------------------------------------------------------------------------------- tables on the local machine


def digits_table() -> datasets.Dataset:
    return datasets.load_dataset("parquet", data_files=str(DIGITS), split="train[:20]")


@pytest.mark.parametrize("kind", ["file", "folder", "save_to_disk", "save_to_disk with splits"])
def test_arrow_opens_like_the_parquet_it_came_from(tmp_path: Path, cache_dir: Path, kind: str) -> None:
    table, target = digits_table(), tmp_path / "digits"
    if kind == "save_to_disk":
        table.save_to_disk(target)
    elif kind == "save_to_disk with splits":
        datasets.DatasetDict({"train": table, "test": table.select(range(5))}).save_to_disk(target)
    else:
        table.save_to_disk(tmp_path / "saved")
        (file,) = (tmp_path / "saved").glob("*.arrow")
        target = target if kind == "folder" else target.with_suffix(".arrow")
        (target / "1.arrow" if kind == "folder" else target).parent.mkdir(exist_ok=True)
        file.rename(target / "1.arrow" if kind == "folder" else target)
    images = open_source(target, cache_dir, with_labels=True)
    assert np.array_equal(pixels_of(images), pixels_of(open_source(DIGITS, cache_dir))[:20])
    assert images.class_names == tuple("0123456789")
    assert len(open_source(target, cache_dir, split="train[5:]")) == 15
    if "splits" in kind:
        assert len(open_source(target, cache_dir, split="test")) == 5
        assert "has no split 'dev'; it has train, test." in refusal(target, cache_dir, split="dev")


def test_splits_of_a_folder_of_parquet_are_told_by_their_names(tmp_path: Path, cache_dir: Path) -> None:
    """As the Hub stores them: train and test lie in one folder and must not be mixed."""
    write_parquet(tmp_path / "x" / "train-00000-of-00001.parquet", [encode(RGB)] * 3)
    write_parquet(tmp_path / "x" / "test-00000-of-00001.parquet", [encode(255 - RGB)] * 2)
    assert len(open_source(tmp_path / "x", cache_dir)) == 3
    assert np.array_equal(pixels_of(open_source(tmp_path / "x", cache_dir, split="test")), [255 - RGB] * 2)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            ["cats-train", "dogs"],
            "cats-train.parquet in {} belongs to split 'train' by its name, but dogs.parquet to none",
        ),
        (["test/0", "x/train-0"], "test/0.parquet in {} belongs to split 'test' by its name, but x/train-0.parquet to"),
    ],
)
def test_tables_of_which_only_some_are_called_like_splits_are_refused(
    tmp_path: Path, cache_dir: Path, names: list[str], sentence: str
) -> None:
    """Neither are rows left out in silence nor are those to be held out trained on."""
    for name in names:
        write_parquet(tmp_path / "x" / f"{name}.parquet", [encode(RGB)] * 2)
    assert sentence.format(tmp_path / "x") in refusal(tmp_path / "x", cache_dir)


def test_a_folder_called_like_a_split_around_a_data_set_says_nothing(tmp_path: Path, cache_dir: Path) -> None:
    write_parquet(tmp_path / "test" / "cats.parquet", [encode(RGB)] * 2)
    assert len(open_source(tmp_path / "test", cache_dir)) == 2


def test_a_folder_with_a_table_of_labels_follows_the_table(tmp_path: Path, cache_dir: Path) -> None:
    """The imagefolder of `datasets`: metadata.csv beside the images."""
    files = {"a.png": encode(RGB), "b.png": encode(255 - RGB), "metadata.csv": b"file_name,age\na.png,1\nb.png,0\n"}
    images = open_source(write_files(tmp_path / "x", files), cache_dir, with_labels=True, label_column="age")
    assert images.labels is not None
    assert [images.labels.tolist(), images.class_names] == [[1, 0], ("0", "1")]
    assert np.array_equal(pixels_of(images), [RGB, 255 - RGB])


def test_a_table_that_does_not_name_its_images_is_named(tmp_path: Path, cache_dir: Path) -> None:
    folder = write_files(tmp_path / "x", {"a.png": encode(RGB), "metadata.csv": b"id,age\n1,1\n2,0\n"})
    assert f"{folder / 'metadata.csv'} has no column file_name" in refusal(folder, cache_dir)


def test_a_table_among_images_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    """Neither takes the place of the other in silence."""
    folder = write_files(tmp_path / "x", {"cat/1.png": encode(RGB), "dog/1.png": encode(RGB)})
    assert len(open_source(folder, cache_dir)) == 2
    write_table(folder / "cat" / "stats.parquet", {"size": [1, 2]})
    message = refusal(folder, cache_dir)
    assert message.startswith(f"{folder} holds images such as ")
    assert message.endswith(
        "and the table cat/stats.parquet; give the table itself as data.source, or take one of them out of the folder."
    )


@pytest.mark.parametrize("name", ["notes.txt", "test.txt", "README.md", ".cache/a.png"])
def test_other_files_beside_tables_are_no_tables(tmp_path: Path, cache_dir: Path, name: str) -> None:
    write_parquet(tmp_path / "x" / "0.parquet", [encode(RGB)] * 3)
    write_files(tmp_path / "x", {name: b"x"})
    assert len(open_source(tmp_path / "x", cache_dir)) == 3


@pytest.mark.parametrize("shape", ["bytes", "struct"])
def test_images_that_another_program_stored_as_bytes_are_found(tmp_path: Path, cache_dir: Path, shape: str) -> None:
    cells = [encode(RGB), encode(255 - RGB)]
    columns = {"jpg": cells if shape == "bytes" else [{"bytes": cell, "path": "x.png"} for cell in cells]}
    pyarrow.parquet.write_table(pyarrow.table(columns | {"label": [1, 0]}), tmp_path / "x.parquet")
    images = open_source(tmp_path / "x.parquet", cache_dir, with_labels=True)
    assert np.array_equal(pixels_of(images), [RGB, 255 - RGB])


# --------------------------------------------------------------------------------------------- training and held out


def open_both(source: Path, cache_dir: Path, **settings: object) -> tuple[ImageSet, ImageSet]:
    config = DataConfig(source=str(source), cache_dir=str(cache_dir), **settings)  # type: ignore[arg-type]
    training, held_out = open_sets(
        config, with_labels=True, seed=0, rank=0, num_processes=1, device=torch.device("cpu")
    )
    assert isinstance(training, ImageSet)
    return training, held_out


def test_a_validation_split_is_held_out_by_its_name(tmp_path: Path, cache_dir: Path) -> None:
    training, held_out = open_both(DIGITS, cache_dir, split="train[:90%]", validation_split="train[90%:]")
    assert (len(training), len(held_out)) == (1617, 180)
    whole = pixels_of(open_source(DIGITS, cache_dir))
    assert np.array_equal(np.concatenate([pixels_of(training), pixels_of(held_out)]), whole)


def test_a_validation_split_of_another_kind_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    files = {"train/cat/1.png": RGB, "train/cat/2.png": RGB, "test/cat/1.png": RGB[:4]}
    folder = write_files(tmp_path / "x", {name: encode(pixels) for name, pixels in files.items()})
    with pytest.raises(DataError, match=r"'test' of .* has images of 3x4x5 where 'train' has 3x6x5; set data.res"):
        open_both(folder, cache_dir, validation_split="test")
    renamed = digits_table().cast_column("label", datasets.ClassLabel(names=list("0123456798")))
    datasets.DatasetDict({"train": digits_table(), "test": renamed}).save_to_disk(tmp_path / "y")
    with pytest.raises(DataError, match=r"has the classes .*, 7, 9, 8 where 'train' has .*, 7, 8, 9; give both the"):
        open_both(tmp_path / "y", cache_dir, validation_split="test")


def test_a_validation_split_may_lack_the_last_of_numbered_classes(tmp_path: Path, cache_dir: Path) -> None:
    labels = datasets.Value("int64")
    write_parquet(tmp_path / "x" / "train-0.parquet", [encode(RGB)] * 3, [0, 1, 2], labels)
    write_parquet(tmp_path / "x" / "test-0.parquet", [encode(RGB)] * 2, [1, 0], labels)
    _, held_out = open_both(tmp_path / "x", cache_dir, validation_split="test")
    assert held_out.labels is not None
    assert held_out.labels.tolist() == [1, 0]


def test_what_is_left_out_of_a_folder_is_said_once(
    tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {f"{split}/cat/{number}.png": encode(RGB) for split in ("train", "val") for number in range(3)}
    folder = write_files(tmp_path / "x", files | {"notes.txt": b""})
    open_both(folder, cache_dir, validation_split="val")
    assert caplog.text.count("left out") == 1
    assert f"1 file in {folder} is left out, being no image by its name, hidden or a link; the first: notes.txt" in (
        caplog.text
    )


def test_a_part_held_out_that_lacks_classes_is_said(
    tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of a folder is the end of its last class; parts of mixed images have all of them."""
    files = {f"{name}/{number}.png": encode(RGB) for name in ("cat", "dog", "emu") for number in range(4)}
    folder = write_files(tmp_path / "x", files)
    open_both(folder, cache_dir, split="train[:80%]", validation_split="train[80%:]")
    assert f"The held-out images, split 'train[80%:]' of {folder}, lack 2 of the 3 classes that are" in caplog.text
    caplog.clear()
    write_parquet(tmp_path / "y.parquet", [encode(RGB)] * 12, [0, 1] * 6)
    open_both(tmp_path / "y.parquet", cache_dir, split="train[:80%]", validation_split="train[80%:]")
    open_both(folder, cache_dir, validation_fraction=0.1)
    assert "lack" not in caplog.text


def test_one_image_is_not_trained_on(tmp_path: Path, cache_dir: Path) -> None:
    folder = write_files(tmp_path / "x", {"cat/1.png": encode(RGB)})
    with pytest.raises(DataError, match=f"{folder} has one image to train on, .*; give at least two."):
        open_both(folder, cache_dir)
