"""Images and labels are found in folders, archives, tables, arrays and Hub datasets, or an error says what to do."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest

from ddpm_hf.config import DataConfig
from ddpm_hf.data.folders import Source, open_folder, open_tar, open_zip
from ddpm_hf.data.labels import class_order_of
from ddpm_hf.data.sources import find_source
from tests.conftest import DIGITS
from tests.unit.data.helpers import (
    GRAY,
    RANDOM,
    RGB,
    digits_table,
    encode,
    npy,
    open_source,
    pixels_of,
    refusal,
    write_files,
    write_parquet,
)

# ----------------------------------------------------------------------------------------------- datasets of every kind


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_the_embedded_digits_open_like_any_other_parquet(cache_dir: Path) -> None:
    images = open_source(DIGITS, cache_dir, with_labels=True)
    assert len(images) == 1797
    assert images.image_shape == (1, 8, 8)
    assert images.class_names == tuple("0123456789")
    assert np.bincount(images.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert isinstance(images.images, np.memmap), "decoded images are memory-mapped"


def test_a_folder_of_parquet_files_is_one_dataset(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "parts").mkdir()
    for number in range(3):
        write_parquet(tmp_path / "parts" / f"{number}.parquet", [encode(GRAY + np.uint8(number))] * 2, [0, 1])
    images = open_source(tmp_path / "parts", cache_dir, with_labels=True)
    assert [int(image[0, 0, 0]) for image in images.images] == [
        int(GRAY[0, 0]) + number for number in (0, 0, 1, 1, 2, 2)
    ]


def test_a_label_without_a_class_name_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    """A published ClassLabel column may contain labels out of range."""
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
    images = open_source(path, cache_dir, with_labels=True)
    assert [images.class_names, images.labels.tolist()] == [("0", "2"), [1, 0, 1]]
    assert images.labels.dtype == np.int64


@pytest.mark.parametrize("source", ["missing.parquet", "missing.npz", "/missing/folder", "./missing", "~/missing"])
def test_a_path_that_does_not_exist_is_named(cache_dir: Path, source: str) -> None:
    assert "does not exist; check the path" in refusal(source, cache_dir)


def test_no_source_is_not_the_working_directory(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, {"image.png": encode(GRAY)})
    monkeypatch.chdir(tmp_path)
    assert "data.source is not set" in refusal("", cache_dir)


def test_a_dataset_that_is_neither_local_nor_on_the_hub_is_named(cache_dir: Path) -> None:
    message = refusal("nobody/no-such-data-1.0", cache_dir)
    assert "nobody/no-such-data-1.0, which is not a local file or folder, cannot be opened" in message


def test_an_unsupported_file_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "notes.txt").write_text("no images")
    assert "has an unsupported type (.txt); use a folder or a .parquet" in refusal(tmp_path / "notes.txt", cache_dir)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    assert "cannot be opened" in refusal(tmp_path / "broken.parquet", cache_dir)


def test_a_dataset_without_images_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    assert "contains no images" in refusal(write_parquet(tmp_path / "x.parquet", []), cache_dir)
    (tmp_path / "empty").mkdir()
    assert "contains no images (split 'train'): it is empty" in refusal(tmp_path / "empty", cache_dir)
    (tmp_path / "empty" / "notes.txt").write_text("")
    assert "only 1 other file, such as notes.txt." in refusal(tmp_path / "empty", cache_dir)


def test_a_split_that_does_not_exist_is_named(cache_dir: Path) -> None:
    message = refusal(DIGITS, cache_dir, split="test")
    assert "cannot be opened (split 'test'): Unknown split" in message


def test_a_missing_column_is_refused_with_the_existing_ones(cache_dir: Path) -> None:
    assert "data.image_column 'picture' is not a column" in refusal(DIGITS, cache_dir, image_column="picture")
    message = refusal(DIGITS, cache_dir, label_column="class")
    assert "data.label_column 'class' is not a column" in message
    assert message.endswith("it has image, label.")


def test_columns_of_other_types_are_refused(tmp_path: Path, cache_dir: Path) -> None:
    assert "not images" in refusal(DIGITS, cache_dir, image_column="label")
    assert f"the labels in column 'image' of {DIGITS} contain <PIL.PngImage" in refusal(
        DIGITS, cache_dir, label_column="image"
    )
    path = write_parquet(tmp_path / "x.parquet", [encode(GRAY)] * 2, [0.5, 1.0], datasets.Value("float64"))
    message = f"the labels in column 'label' of {path} contain 0.5 (row 0); a label is a whole number, text, a boolean "
    assert refusal(path, cache_dir, label_column="label").startswith(message)
    needed = refusal(path, cache_dir, with_labels=True)
    assert needed.startswith(message)
    assert needed.endswith("; convert them, or set data.label_column to another column.")
    assert open_source(path, cache_dir).labels is None


def test_paths_of_images_are_relative_to_their_table(tmp_path: Path, cache_dir: Path) -> None:
    """And files elsewhere are not read."""
    folder = write_files(tmp_path / "x", {"a/1.png": encode(RGB), "2.png": encode(255 - RGB)})
    write_files(tmp_path, {"3.png": encode(RGB)})
    rows = pd.DataFrame({"path": ["a/1.png", "2.png"], "label": ["cat", "dog"]})
    rows.to_parquet(folder / "x.parquet")
    rows.to_csv(folder / "x.csv", index=False)
    rows.to_csv(folder / "x.tsv", index=False, sep="\t")
    rows.to_json(folder / "x.jsonl", orient="records", lines=True)
    rows.to_json(folder / "x.json", orient="records")
    rows.replace("a/1.png", "a\\1.png").to_csv(folder / "windows.csv", index=False, sep=";")
    for suffix in ("parquet", "csv", "tsv", "jsonl", "json"):
        images = open_source(folder / f"x.{suffix}", cache_dir, with_labels=True)
        assert np.array_equal(pixels_of(images), [RGB, 255 - RGB])
        assert [images.class_names, images.labels.tolist()] == [("cat", "dog"), [0, 1]]
    assert np.array_equal(pixels_of(open_source(folder / "windows.csv", cache_dir)), [RGB, 255 - RGB])
    pd.DataFrame({"id": ["a1"]}).to_csv(folder / "ids.csv", index=False)
    message = refusal(folder / "ids.csv", cache_dir, image_column="id")
    assert f"{folder / 'a1'} does not exist; give paths with folder and suffix" in message
    pd.DataFrame({"path": ["https://example.org/1.png"]}).to_csv(folder / "web.csv", index=False)
    assert "it is on the web; download the images" in refusal(folder / "web.csv", cache_dir)
    pd.DataFrame({"path": ["../3.png"]}).to_csv(folder / "y.csv", index=False)
    assert f"it is {tmp_path / '3.png'}, outside of the dataset" in refusal(folder / "y.csv", cache_dir)


def test_images_may_be_structs_with_other_fields(tmp_path: Path, cache_dir: Path) -> None:
    images = [encode(RGB), encode(255 - RGB)]
    for number, extra in enumerate(({}, {"width": 5}, {"path": "a.png", "width": 5})):
        path = tmp_path / f"{number}.parquet"
        columns = {"image": [{"bytes": image, **extra} for image in images]}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        assert np.array_equal(pixels_of(open_source(path, cache_dir)), [RGB, 255 - RGB])


def test_a_dataset_saved_with_a_format_keeps_all_columns(tmp_path: Path, cache_dir: Path) -> None:
    columns = {"image": [{"bytes": encode(RGB), "path": None}] * 2, "label": [1, 0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    dataset = datasets.Dataset.from_dict(columns, features=features)
    for number, options in enumerate(({"columns": ["image"]}, {"type": "torch", "columns": ["image"]})):
        dataset.with_format(**options).save_to_disk(tmp_path / str(number))
        images = open_source(tmp_path / str(number), cache_dir, with_labels=True)
        assert [images.class_names, images.labels.tolist()] == [("cat", "dog"), [1, 0]]


def test_one_of_several_image_columns_must_be_configured(tmp_path: Path, cache_dir: Path) -> None:
    columns = {"front": [{"bytes": encode(GRAY)}], "back": [{"bytes": encode(255 - GRAY)}], "size": [1]}
    features = {"front": datasets.Image(), "back": datasets.Image(), "size": datasets.Value("int64")}
    path = tmp_path / "x.parquet"
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    assert "has 2 image columns among front, back, size; set data.image_column to one of them" in refusal(
        path, cache_dir
    )
    for column, pixels in (("front", GRAY), ("back", 255 - GRAY)):
        assert np.array_equal(open_source(path, cache_dir, image_column=column).images[0, 0], pixels)
    assert "has no column of images or of their paths among size" in refusal(
        write_table(tmp_path / "y.parquet", {"size": [1]}), cache_dir
    )


def write_table(path: Path, columns: dict[str, list[object]]) -> Path:
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return path


@pytest.mark.parametrize(("labels", "found"), [([0, None, 1], "no label"), ([0, -1, 1], "no label")])
def test_a_missing_label_matters_only_to_class_conditional_networks(
    tmp_path: Path, cache_dir: Path, labels: list[int | None], found: str
) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(GRAY)] * 3, labels, datasets.Value("int64"))
    assert f"image 1 of {path} has {found}; every image needs one from 0 to 1." in refusal(
        path, cache_dir, with_labels=True
    )
    assert len(open_source(path, cache_dir)) == 3


@pytest.mark.parametrize("missing", [None, -1])
def test_labels_that_are_all_missing_are_no_labels(tmp_path: Path, cache_dir: Path, missing: int | None) -> None:
    path = write_parquet(tmp_path / "x.parquet", [encode(GRAY)] * 3, [missing] * 3, datasets.Value("int64"))
    assert f"{path} has no labels, but the network is class-conditional" in refusal(path, cache_dir, with_labels=True)
    assert open_source(path, cache_dir).labels is None


def test_labels_above_int64_are_classes(tmp_path: Path, cache_dir: Path) -> None:
    labels = pyarrow.array([0, 2**63 + 5], pyarrow.uint64())
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": [encode(GRAY)] * 2, "label": labels}), path)
    images = open_source(path, cache_dir, with_labels=True)
    assert [images.class_names, images.labels.tolist()] == [("0", "9223372036854775813"), [0, 1]]


@pytest.fixture
def hub_data_set() -> str:
    """Return the id of a Hub dataset in the cache of `datasets`, as after a download."""
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


def test_a_hub_dataset_opens_by_its_id(hub_data_set: str, cache_dir: Path) -> None:
    images = open_source(hub_data_set, cache_dir, with_labels=True, split="test[:100]")
    assert np.array_equal(pixels_of(images), pixels_of(open_source(DIGITS, cache_dir))[:100])
    assert images.class_names == tuple("0123456789")
    refused = refusal(hub_data_set, cache_dir, subset="large")
    assert "cannot be opened (split 'train'): Couldn't find cache for someone/digits for config 'large'" in refused


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"subset": "large"}, "data.subset does not apply to {}, which is not a Hub dataset; remove the setting"),
        ({"revision": "main"}, "data.revision does not apply to {}, which is not a Hub dataset; remove the setting"),
        ({"image_column": "a"}, "data.image_column does not apply to {}, which has class folders instead of columns"),
        ({"label_column": "a"}, "data.label_column does not apply to {}, which has class folders instead of columns"),
    ],
)
def test_settings_that_do_not_apply_to_a_folder_are_refused(
    tmp_path: Path, cache_dir: Path, setting: dict[str, str], sentence: str
) -> None:
    folder = write_files(tmp_path / "flat", {"a.png": encode(RGB)})
    assert sentence.format(folder) in refusal(folder, cache_dir, **setting)


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


def test_parquet_files_belong_to_splits_by_their_names(tmp_path: Path, cache_dir: Path) -> None:
    """As on the Hub, where the splits are in one folder."""
    write_parquet(tmp_path / "x" / "train-00000-of-00001.parquet", [encode(RGB)] * 3)
    write_parquet(tmp_path / "x" / "test-00000-of-00001.parquet", [encode(255 - RGB)] * 2)
    assert len(open_source(tmp_path / "x", cache_dir)) == 3
    assert np.array_equal(pixels_of(open_source(tmp_path / "x", cache_dir, split="test")), [255 - RGB] * 2)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            ["cats-train", "dogs"],
            "the name of cats-train.parquet in {} says split 'train', but dogs.parquet names no split",
        ),
        (["test/0", "x/train-0"], "the name of test/0.parquet in {} says split 'test', but x/train-0.parquet names no"),
    ],
)
def test_tables_of_which_only_some_are_named_after_splits_are_refused(
    tmp_path: Path, cache_dir: Path, names: list[str], sentence: str
) -> None:
    """No rows are silently ignored, and no test rows are used for training."""
    for name in names:
        write_parquet(tmp_path / "x" / f"{name}.parquet", [encode(RGB)] * 2)
    assert sentence.format(tmp_path / "x") in refusal(tmp_path / "x", cache_dir)


def test_the_name_of_the_dataset_folder_is_not_a_split(tmp_path: Path, cache_dir: Path) -> None:
    write_parquet(tmp_path / "test" / "cats.parquet", [encode(RGB)] * 2)
    assert len(open_source(tmp_path / "test", cache_dir)) == 2


def test_a_folder_with_metadata_uses_the_metadata(tmp_path: Path, cache_dir: Path) -> None:
    """As `imagefolder` of `datasets`."""
    files = {"a.png": encode(RGB), "b.png": encode(255 - RGB), "metadata.csv": b"file_name,age\na.png,1\nb.png,0\n"}
    images = open_source(write_files(tmp_path / "x", files), cache_dir, with_labels=True, label_column="age")
    assert [images.labels.tolist(), images.class_names] == [[1, 0], ("0", "1")]
    assert np.array_equal(pixels_of(images), [RGB, 255 - RGB])


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_captions_leave_the_class_folders(tmp_path: Path, cache_dir: Path, suffix: str) -> None:
    """Images that the table does not list are counted. In version 0.1 the classes vanished, and so did these images."""
    folder = write_files(tmp_path / "x", FILES | {"1.png": FILES["cat/1.png"]})
    rows = pd.DataFrame({"file_name": list(FILES)[1:], "text": ["a", "b", "c"]})
    {
        "csv": lambda path: rows.to_csv(path, index=False),
        "jsonl": lambda path: rows.to_json(path, orient="records", lines=True),
        "parquet": lambda path: rows.to_parquet(path),
    }[suffix](folder / f"metadata.{suffix}")
    images = open_source(folder, cache_dir, with_labels=True)
    assert [images.labels.tolist(), images.class_names] == [[0, 0, 1], ("cat", "dog")]
    source = find_source(DataConfig(source=str(folder)), "train[:1]")
    assert isinstance(source, Source)
    assert source.ignored_files == ("1.png (not in the metadata)", "cat/1.png (not in the metadata)")
    assert source.labels.tolist() == [0]
    assert open_source(folder, cache_dir, layout="flat").labels is None


def test_the_metadata_of_each_split_list_its_images(tmp_path: Path, cache_dir: Path) -> None:
    files = {f"{split}/{number}.png": encode(RGB) for split in ("train", "test") for number in range(3)}
    tables = {f"{split}/metadata.csv": b"file_name,label\n0.png,1\n1.png,0\n" for split in ("train", "test")}
    folder = write_files(tmp_path / "x", files | tables)
    for split in ("train", "test"):
        source = find_source(DataConfig(source=str(folder)), split)
        assert isinstance(source, Source)
        assert source.ignored_files == (f"{split}/2.png (not in the metadata)",)
        assert [source.labels.tolist(), source.class_names] == [[1, 0], ("0", "1")]
    assert "whose column 'label' contains the labels; remove" in refusal(folder, cache_dir, layout="flat")


def test_metadata_without_file_names_are_named(tmp_path: Path, cache_dir: Path) -> None:
    folder = write_files(tmp_path / "x", {"a.png": encode(RGB), "metadata.csv": b"id,age\n1,1\n2,0\n"})
    assert f"{folder / 'metadata.csv'} has no column file_name" in refusal(folder, cache_dir)


def test_a_table_among_images_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    """Neither is silently preferred."""
    folder = write_files(tmp_path / "x", {"cat/1.png": encode(RGB), "dog/1.png": encode(RGB)})
    assert len(open_source(folder, cache_dir)) == 2
    write_table(folder / "cat" / "stats.parquet", {"size": [1, 2]})
    assert source_of(folder).ignored_files == ("cat/stats.parquet",)
    write_table(folder / "cat" / "stats.parquet", {"path": ["1.png"]})
    message = refusal(folder, cache_dir)
    assert message.startswith(f"{folder} contains images such as ")
    assert message.endswith(
        "and the table cat/stats.parquet; set data.source to the table, or move one of them out of the folder."
    )


@pytest.mark.parametrize("name", ["notes.txt", "test.txt", "README.md", ".cache/a.png"])
def test_other_files_beside_tables_are_ignored(tmp_path: Path, cache_dir: Path, name: str) -> None:
    write_parquet(tmp_path / "x" / "0.parquet", [encode(RGB)] * 3)
    write_files(tmp_path / "x", {name: b"x"})
    assert len(open_source(tmp_path / "x", cache_dir)) == 3


@pytest.mark.parametrize("shape", ["bytes", "struct"])
def test_images_in_plain_binary_columns_are_found(tmp_path: Path, cache_dir: Path, shape: str) -> None:
    cells = [encode(RGB), encode(255 - RGB)]
    columns = {"jpg": cells if shape == "bytes" else [{"bytes": cell, "path": "x.png"} for cell in cells]}
    pyarrow.parquet.write_table(pyarrow.table(columns | {"label": [1, 0]}), tmp_path / "x.parquet")
    images = open_source(tmp_path / "x.parquet", cache_dir, with_labels=True)
    assert np.array_equal(pixels_of(images), [RGB, 255 - RGB])


# ------------------------------------------------------------------------------------------------- folders and archives


PETS = {"cat/1.png": 0, "cat/2.PNG": 1, "cat/deep/er.jpg": 2, "dog/1.png": 3}


IMAGES = {name: np.full((4, 3, 3), 60 * number, np.uint8) for name, number in PETS.items()}


FILES = {name: encode(image) for name, image in IMAGES.items()}


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """Write a zip, or a tar with the compression of its suffix, in the order of `files`."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    compression = path.suffix[1:].replace("tar", "").replace("tgz", "gz")
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def store(tmp_path: Path, name: str, files: dict[str, bytes]) -> Path:
    """Write files to a folder or an archive of that name."""
    return pack(tmp_path / name, files) if "." in name else write_files(tmp_path / name, files)


KINDS = ["pets", "pets.zip", "pets.tar", "pets.tar.gz", "pets.tgz", "pets.tar.bz2", "pets.tar.xz"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("root", ["", "./", "pets/", "a/b/pets/"])
def test_class_folders_are_labels_in_every_archive(tmp_path: Path, name: str, root: str) -> None:
    if "." not in name and root:
        pytest.skip("only archives have folders around everything")
    path = store(tmp_path, name, {root + file: data for file, data in FILES.items()})
    images = open_source(path, tmp_path / "cache", with_labels=True)
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 0, 1]
    assert np.array_equal(pixels_of(images), list(IMAGES.values()))


@pytest.mark.parametrize("name", KINDS[:3])
def test_a_flat_archive_has_no_labels(tmp_path: Path, name: str) -> None:
    path = store(tmp_path, name, {"1.png": FILES["cat/1.png"], "2.png": FILES["dog/1.png"]})
    assert open_source(path, tmp_path / "cache").labels is None
    if "." in name:
        packed = store(tmp_path, f"all{name}", {"images/1.png": FILES["cat/1.png"], "images/2.png": FILES["dog/1.png"]})
        assert open_source(packed, tmp_path / "cache").labels is None


@pytest.mark.parametrize("name", KINDS[:2])
def test_folders_and_zips_are_sorted_by_name(tmp_path: Path, name: str) -> None:
    shuffled = {name: FILES[name] for name in ("dog/1.png", "cat/2.PNG", "cat/deep/er.jpg", "cat/1.png")}
    images = open_source(store(tmp_path, name, shuffled), tmp_path / "cache", with_labels=True)
    assert np.array_equal(pixels_of(images), list(IMAGES.values()))


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".zip"])
def test_a_folder_may_be_named_like_a_file(tmp_path: Path, suffix: str) -> None:
    folder = write_files(tmp_path / f"pets{suffix}", FILES)
    assert open_source(folder, tmp_path / "cache", with_labels=True).class_names == ("cat", "dog")


def test_a_tar_keeps_its_order(tmp_path: Path) -> None:
    turned = dict(reversed(FILES.items()))
    images = open_source(pack(tmp_path / "x.tar.gz", turned), tmp_path / "cache", with_labels=True)
    assert images.labels.tolist() == [1, 0, 0, 0]
    assert np.array_equal(pixels_of(images), list(IMAGES.values())[::-1])


@pytest.mark.parametrize("name", KINDS[:3])
def test_files_of_operating_systems_are_ignored(tmp_path: Path, name: str) -> None:
    rubbish = {"__MACOSX/cat/._1.png": b"x", "cat/.DS_Store": b"x", ".git/a.png": b"x", "cat/Thumbs.db": b"x"}
    rubbish |= {"cat/@eaDir/1.png/THUMB_M.jpg": b"x", "$RECYCLE.BIN/1.png": b"x"}
    path = store(tmp_path, name, FILES | rubbish)
    images = open_source(path, tmp_path / "cache", with_labels=True)
    assert len(images) == 4
    assert images.class_names == ("cat", "dog")


def source_of(path: Path, split: str = "train") -> Source:
    opens = open_folder if path.is_dir() else open_zip if path.suffix == ".zip" else open_tar
    return opens(path, split)


@pytest.mark.parametrize("name", KINDS[:3])
def test_other_files_are_ignored_files_and_named(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    path = store(tmp_path, name, FILES | {"cat/photo.psd": b"x", "README.md": b"x"})
    assert set(source_of(path).ignored_files) == {"cat/photo.psd", "README.md"}
    open_source(path, tmp_path / "cache")
    assert f"2 files ignored in {path} (not an image, hidden, a link, in no split or table)" in caplog.text


@pytest.mark.parametrize("name", KINDS[:3])
def test_hidden_images_and_images_outside_of_the_archive_are_ignored(tmp_path: Path, name: str) -> None:
    """A class may be called __background__."""
    files = FILES | {"__background__/1.png": b"1", ".dog/1.png": b"2", "cat/.3.png": b"3"}
    outside = {"../up/1.png": b"4"} if "." in name else {}
    source = source_of(store(tmp_path, name, files | outside))
    assert source.class_names == ("__background__", "cat", "dog")
    named = {f"{file} (outside of the archive)" for file in outside}
    assert set(source.ignored_files) == {".dog/1.png (hidden)", "cat/.3.png (hidden)"} | named


@pytest.mark.parametrize("name", KINDS[:3])
def test_folders_named_after_splits_are_splits(tmp_path: Path, name: str) -> None:
    """They are not classes. All splits have the same classes, even if one of them lacks some."""
    files = {"train/cat/1.png": b"1", "train/dog/1.png": b"2", "train/dog/2.png": b"3", "val/dog/1.png": b"4"}
    path = store(tmp_path, name, {f"pets/{file}" if "." in name else file: data for file, data in files.items()})
    training, validation = source_of(path), source_of(path, "validation")
    assert [training.num_images, training.class_names] == [3, ("cat", "dog")]
    assert [validation.num_images, validation.class_names] == [1, ("cat", "dog")]
    assert validation.labels.tolist() == [1]
    assert source_of(path, "val").num_images == 1
    assert source_of(path, "train[1:]").num_images == 2
    assert "has no split 'test'; its folders are train, val." in refusal(path, tmp_path / "cache", split="test")


@pytest.mark.parametrize("name", ["vehicles", "vehicles.zip", "vehicles.tar"])
def test_a_class_named_like_a_split_needs_the_layout(tmp_path: Path, name: str) -> None:
    path = store(tmp_path, name, {"x/car/1.png": FILES["cat/1.png"], "x/test/1.png": FILES["cat/1.png"]})
    assert "set data.layout to classes if it is a class" in refusal(path, tmp_path / "cache")
    images = open_source(path, tmp_path / "cache", layout="classes")
    assert [len(images), images.class_names] == [2, ("car", "test")]


@pytest.mark.parametrize("names", [["x.tar"], ["x-0.tar", "x-1.tar"], ["train-0.tar", "train-1.tar", "test-0.tar"]])
def test_files_of_webdataset_are_read_with_their_labels(tmp_path: Path, names: list[str]) -> None:
    """Keys end at the first dot, and are the same in every shard."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, name in enumerate(names):
        classes = [b"dog", b"cat\n"] if number == 0 else [b"dog", b"owl"]
        files = {"0.rgb.png": FILES["cat/1.png"], "0.cls": classes[0], "0.json": b"{}", "1.cls": classes[1]}
        pack(folder / name, files | {"1.png": FILES["dog/1.png"]})
    source = folder / names[0] if len(names) == 1 else folder
    images = open_source(source, tmp_path / "cache", with_labels=True)
    assert images.class_names == (("cat", "dog") if len(names) == 1 else ("cat", "dog", "owl"))
    assert images.labels.tolist() == ([1, 0] if len(names) == 1 else [1, 0, 1, 2])
    shown = [IMAGES["cat/1.png"], IMAGES["dog/1.png"]] * len(images.labels[::2])
    assert np.array_equal(pixels_of(images), shown)
    found = find_source(DataConfig(source=str(source)), "train[:1]")
    assert isinstance(found, Source)
    assert [found.num_images, found.ignored_files[0]] == [1, "0.json"]
    if len(names) == 3:
        assert len(open_source(folder, tmp_path / "cache", split="test")) == 2
        assert len(open_source(folder, tmp_path / "cache", split="testing")) == 2
        assert "has no split 'val'; its shards are those of " in refusal(folder, tmp_path / "cache", split="val")


def test_labels_in_the_json_files_of_webdataset(tmp_path: Path) -> None:
    """The key is found, unless there are class folders, or it is data.label_column."""
    samples = {"0.png": FILES["cat/1.png"], "1.png": FILES["dog/1.png"]}
    files = samples | {"0.json": b'{"label": "dog", "kind": 7}', "1.json": b'{"label": "cat", "kind": 3}'}
    for folder in (".", "x"):
        path = pack(tmp_path / f"{folder}.tar", {f"{folder}/{name}": data for name, data in files.items()})
        source = source_of(path)
        assert source.class_names == (("cat", "dog") if folder == "." else None)
        assert bool(source.ignored_files) == (folder == "x")
        images = open_source(path, tmp_path / "cache", with_labels=True, label_column="kind")
        assert [images.class_names, images.labels.tolist()] == [("3", "7"), [1, 0]]
    assert "'size' is not in 0.json of" in refusal(path.with_name("..tar"), tmp_path / "cache", label_column="size")
    without = pack(tmp_path / "without.tar", samples)
    assert "is a key of .json files, which" in refusal(without, tmp_path / "cache", label_column="size")


def test_one_image_of_each_sample_of_webdataset_is_read(tmp_path: Path) -> None:
    """The one with a plain suffix, or data.image_column; with labels, or if all samples are alike."""
    image, mask, others = FILES["cat/1.png"], FILES["dog/1.png"], ("0.seg.png (another image)",)
    for number, more in enumerate(({"0.cls": b"1"}, {})):
        path = pack(tmp_path / f"{number}.tar", {"0.png": image, "0.seg.png": mask} | more)
        assert [source_of(path).num_images, source_of(path).ignored_files] == [1, others]
        chosen = open_source(path, tmp_path / "cache", image_column="seg.png", on_bad_image="error")
        assert np.array_equal(pixels_of(chosen), [IMAGES["dog/1.png"]])
        assert "'jpg' is not the suffix of an image" in refusal(path, tmp_path / "cache", image_column="jpg")
    unclear = pack(tmp_path / "unclear.tar", {"0.rgb.png": image, "0.seg.png": mask, "0.cls": b"1"})
    assert "(rgb.png, seg.png); set data.image_column to one of them." in refusal(unclear, tmp_path / "cache")
    assert source_of(pack(tmp_path / "plain.tar", {"cat.0.png": image, "cat.1.png": mask})).num_images == 2


def test_tables_that_only_describe_images_are_ignored(tmp_path: Path) -> None:
    """As those of img2dataset beside its shards or folders."""
    for name in ("shards", "folders"):
        folder = tmp_path / name
        write_files(
            folder, {"00000_stats.json": b"{}"} | ({"0/0.png": FILES["cat/1.png"]} if name == "folders" else {})
        )
        if name == "shards":
            pack(folder / "00000.tar", {"0.png": FILES["cat/1.png"], "0.txt": b"a cat"})
        pd.DataFrame({"url": ["https://example.org"], "caption": ["a cat"], "width": [3]}).to_parquet(
            folder / "0.parquet"
        )
        assert len(open_source(folder, tmp_path / "cache")) == 1


@pytest.mark.parametrize("name", ["edm", "edm.zip", "x/edm.zip"])
def test_labels_in_the_dataset_json_of_stylegan_and_edm(tmp_path: Path, name: str) -> None:
    """Numbers or one-hot vectors; null for none. Version 0.1 ignored them."""
    files = {"00000/0.png": FILES["cat/1.png"], "00000/1.png": FILES["dog/1.png"]}
    for number, (labels, found) in enumerate((([3, 1], [1, 0]), ([[0.0, 1.0], [1.0, 0.0]], [1, 0]), (None, None))):
        root = "edm/" if name.startswith("x/") else ""
        pairs = None if labels is None else list(zip(files, labels, strict=True))
        (tmp_path / str(number) / "x").mkdir(parents=True)
        content = files | {"dataset.json": json.dumps({"labels": pairs}).encode()}
        path = store(tmp_path / str(number), name, {f"{root}{file}": data for file, data in content.items()})
        source = source_of(path)
        assert (source.layout == "labels in dataset.json") == (found is not None)
        if found is not None:
            assert [source.labels.tolist(), source.ignored_files] == [found, ()]
    (tmp_path / "x").mkdir()
    path = store(tmp_path, name, files | {"dataset.json": json.dumps({"labels": [["00000/0.png", 1]]}).encode()})
    earlier = find_source(DataConfig(source=str(path)), "train", "text")
    assert isinstance(earlier, Source)
    assert earlier.ignored_files == ("dataset.json",)


def test_folders_of_one_split_that_may_differ_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_files(tmp_path / "x", {f"{name}/1.png": b"1" for name in ("trainA", "trainB", "testA", "testB")})
    assert source_of(folder, "trainB").num_images == 1
    assert caplog.text == ""
    assert source_of(folder).num_images == 2
    assert f"The folders trainA, trainB of {folder} are read together; set data.split to one of them" in caplog.text


SPLITS = ["train", "val", None, "train", "test", "extra", "Train "]


def write_splits(folder: Path, name: str) -> Path:
    """Write a table, or a folder with metadata, in which image i has the value i and the split SPLITS[i]."""
    images = [encode(np.full((4, 4), row, np.uint8)) for row in range(len(SPLITS))]
    if name == "x.parquet":
        cells = [{"bytes": data, "path": None} for data in images]
        return write_table(folder / name, {"image": cells, "split": SPLITS})
    source = write_files(folder / "x", {f"{row % 2}/{row}.png": data for row, data in enumerate(images)})
    rows = pd.DataFrame({"file_name": [f"{row % 2}/{row}.png" for row in range(len(SPLITS))], "split": SPLITS})
    rows.to_csv(source / name, index=False)
    return source if name == "metadata.csv" else source / name


@pytest.mark.parametrize("name", ["x.parquet", "x.csv", "metadata.csv"])
def test_a_column_of_splits_is_read_as_folders_of_splits(tmp_path: Path, cache_dir: Path, name: str) -> None:
    """Also other words for a split and parts of it. Version 0.1 used all rows."""
    source = write_splits(tmp_path, name)
    for split, rows in (
        ("train", [0, 3, 6]), ("validation", [1]), ("val", [1]), ("test", [4]), ("extra", [5]), ("train[1:]", [3, 6]),
    ):  # fmt: skip
        images = open_source(source, cache_dir, split=split)
        assert pixels_of(images)[:, 0, 0, 0].tolist() == rows
        assert (images.labels is None) or images.labels.tolist() == [row % 2 for row in rows]
    found = find_source(DataConfig(source=str(source)), "train")
    assert isinstance(found, Source)
    assert found.layout.endswith(
        "splits in column 'split': train (2), val (1), none (1), test (1), extra (1), Train  (1)"
    )
    assert "has no split 'holdout'; its column 'split' has train (2), " in refusal(source, cache_dir, split="holdout")
    of_version_0_1 = find_source(DataConfig(source=str(source)), "train", "text")
    assert isinstance(of_version_0_1, Source)
    assert of_version_0_1.num_images == len(SPLITS)


def test_a_column_without_the_word_train_contains_no_splits(tmp_path: Path, cache_dir: Path) -> None:
    cells = [{"bytes": encode(RGB), "path": None}] * 2
    source = write_table(tmp_path / "x.parquet", {"image": cells, "set": ["castle", "space"], "fold": ["0", "1"]})
    assert len(open_source(source, cache_dir)) == 2
    assert "cannot be opened (split 'test')" in refusal(source, cache_dir, split="test")


def test_ids_in_a_table_are_images_below_its_folder(tmp_path: Path, cache_dir: Path) -> None:
    """As in the tables of Kaggle: without folder or suffix, as text or numbers, if a single file matches."""
    files = {"train/a.png": RGB, "train/001.png": 255 - RGB, "x/b/10.png": RGB, "y/b/10.png": RGB, "test/a.png": GRAY}
    folder = write_files(tmp_path / "x", {name: encode(image) for name, image in files.items()})

    def table(name: str, column: str, ids: list[object]) -> Path:
        pd.DataFrame({column: ids, "breed": ["pug"] * len(ids)}).to_csv(folder / name, index=False)
        return folder / name

    for name, column, ids in (("train.csv", "id", ["a", "001.png"]), ("train.csv", "image", ["train/a", "001"])):
        images = open_source(table(name, column, ids), cache_dir, with_labels=True, label_column="breed")
        assert np.array_equal(pixels_of(images), [RGB, 255 - RGB])
    assert np.array_equal(pixels_of(open_source(table("n.csv", "id_code", [1]), cache_dir)), [255 - RGB])
    assert np.array_equal(pixels_of(open_source(table("n.csv", "id", ["x/b/10"]), cache_dir)), [RGB])
    message = refusal(table("n.csv", "id", ["a", "001"]), cache_dir)
    assert "it may be " in message and message.split("; ")[1] == "give paths with folder and suffix)"
    assert "10.png; give paths" in refusal(table("train.csv", "id", [10]), cache_dir)
    assert "y/a does not exist; give paths with folder" in refusal(table("n.csv", "id", ["y/a"]), cache_dir)


def test_text_tables_of_spreadsheets(tmp_path: Path, cache_dir: Path) -> None:
    """Spaces after commas and around labels; other encodings and patterns are explained."""
    folder = write_files(tmp_path / "x", {"1.png": encode(RGB), "2.png": encode(RGB)})
    write_files(
        folder, {"a.csv": b"image, label\n1.png, cat\n2.png,cat \n", "b.csv": "image\nB\u00e4r.png".encode("cp1252")}
    )
    images = open_source(folder / "a.csv", cache_dir, with_labels=True)
    assert [images.class_names, images.labels.tolist()] == [("cat",), [0, 0]]
    assert refusal(folder / "b.csv", cache_dir).endswith("; save the table as UTF-8.")
    assert "patterns are not read, so give the folder" in refusal(folder / "*.png", cache_dir)


def test_a_class_is_one_however_its_accents_are_written(tmp_path: Path) -> None:
    """macOS decomposes them."""
    folder = write_files(tmp_path / "x", {"train/caf\u00e9/1.png": FILES["cat/1.png"], "val/cafe\u0301/2.png": b"x"})
    assert [source_of(folder, split).class_names for split in ("train", "val")] == [("caf\u00e9",)] * 2
    assert source_of(folder, "val").labels.tolist() == [0]


def test_a_class_without_a_training_image_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"train/Cat/1.png": FILES["cat/1.png"], "train/dog/1.png": FILES["cat/1.png"], "val/cat/1.png": b"x"}
    open_source(write_files(tmp_path / "x", files), tmp_path / "cache", with_labels=True)
    assert "has no training image of the class cat, which cannot be learned" in caplog.text


def test_what_is_no_image_or_table_is_explained(tmp_path: Path, cache_dir: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    folder = write_files(tmp_path / "x", {"1.png": pointer, "2.png": pointer})
    assert "is a Git LFS pointer instead of an image; run git lfs pull" in refusal(folder, cache_dir)
    table = write_files(tmp_path / "tables", {"0.parquet": pointer})
    assert "contains a Git LFS pointer instead of a table; run git lfs pull" in refusal(table, cache_dir)
    assert "is a single image; set it to the folder" in refusal(folder / "1.png", cache_dir)
    packed = write_files(tmp_path / "packed", {"train.zip": b"", "test.zip": b""})
    assert refusal(packed, cache_dir).endswith("Unpack test.zip, or set data.source to it.")
    columns = {f"pixel{number}": [0] for number in range(64)}
    message = refusal(write_table(tmp_path / "pixels.parquet", columns), cache_dir)
    assert "has no column of images or of their paths among pixel0, " in message and "pixel19 and 44 more" in message


def test_class_folders_whose_names_are_not_utf_8(tmp_path: Path) -> None:
    """The names go into files in UTF-8."""
    folder = write_files(tmp_path / "x", {"caf\udce9/1.png": FILES["cat/1.png"], "été/2.png": FILES["dog/1.png"]})
    images = open_source(folder, tmp_path / "cache", with_labels=True)
    assert [images.class_names, images.labels.tolist()] == [("café", "été"), [0, 1]]


@pytest.mark.parametrize("name", KINDS[:3])
def test_each_array_of_a_folder_is_an_image(tmp_path: Path, name: str) -> None:
    """Unless there are images of other types. Arrays of other shapes are bad images."""
    files = {"cat/1.npy": npy(RGB), "dog/1.npy": npy(RGB.transpose(2, 0, 1)), "dog/2.npy": npy(GRAY > 127)}
    images = open_source(store(tmp_path, name, files), tmp_path / "cache", with_labels=True)
    assert [images.labels.tolist(), images.class_names] == [[0, 1, 1], ("cat", "dog")]
    masks = np.repeat(np.where(GRAY > 127, 255, 0)[..., None], 3, axis=-1)
    assert np.array_equal(pixels_of(images), [RGB, RGB, masks])
    (tmp_path / "bad").mkdir()
    bad = store(tmp_path / "bad", name, files | {"dog/3.npy": npy(np.zeros((2, 4, 4, 3)))})
    assert "contains float64 (2, 4, 4, 3); an image has numbers, and is (height" in refusal(bad, tmp_path / "cache")
    (tmp_path / "mixed").mkdir()
    mixed = store(tmp_path / "mixed", name, files | {"cat/1.png": encode(RGB)})
    assert source_of(mixed).num_images == 1


@pytest.mark.parametrize("name", KINDS[:3])
def test_class_folders_have_the_numbers_of_a_network(tmp_path: Path, name: str) -> None:
    """Also if some of its classes are missing."""
    path = store(tmp_path, name, {"dog/1.png": b"1", "owl/1.png": b"2"})
    for known, labels in ((("cat", "dog", "owl"), [1, 2]), (("owl", "dog"), [1, 0]), (("cat", "dog"), [0, 1])):
        source = find_source(DataConfig(source=str(path)), "train", known=known)
        assert isinstance(source, Source)
        assert source.labels.tolist() == labels
        assert source.class_names == (known if "owl" in known else ("dog", "owl"))


@pytest.mark.parametrize("name", KINDS[:3])
def test_images_in_no_split_are_named(tmp_path: Path, name: str) -> None:
    files = {"train/1.png": b"1", "test/1.png": b"2", "unlabeled/1.png": b"3"}
    source = source_of(store(tmp_path, name, {f"x/{file}": data for file, data in files.items()}))
    assert [source.num_images, source.class_names] == [1, None]
    assert source.ignored_files == ("x/unlabeled/1.png (in no split)",)
    assert source.layout == "splits test, train; left out: unlabeled"


def test_a_layout_of_anything_but_files_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 4), np.uint8))
    for path in (tmp_path / "x.npy", DIGITS):
        assert refusal(path, tmp_path / "cache", layout="flat") == (
            f"data.layout does not apply to {path}, which is no folder or archive of images; remove the setting."
        )


@pytest.mark.parametrize("name", KINDS[:3])
def test_class_folders_named_by_numbers_are_sorted_as_numbers(tmp_path: Path, name: str) -> None:
    """Others as text, also if they contain numbers. Version 0.1 sorted all of them as text."""
    numbers = {f"{number}/1.png": b"1" for number in range(12)}
    path = store(tmp_path, name, numbers)
    assert source_of(path).class_names == tuple(map(str, range(12)))
    earlier = find_source(DataConfig(source=str(path)), "train", "text")
    assert isinstance(earlier, Source)
    assert earlier.class_names == ("0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9")
    (tmp_path / "mixed").mkdir()
    mixed = store(tmp_path / "mixed", name, {"img10/1.png": b"1", "img2/1.png": b"2", "3/1.png": b"3"})
    assert source_of(mixed).class_names == ("3", "img10", "img2")


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["0", "1", "10", "2"], "text"),
        (["0", "1", "2", "10"], "numbers"),
        (["img10", "img2"], "numbers"),
        ([], "numbers"),
    ],
)
def test_the_order_of_class_folders_is_found_from_class_names(names: list[str], order: str) -> None:
    """Saved pipelines sort the keys as text."""
    by_number = {str(number): name for number, name in enumerate(names)}
    assert class_order_of(dict(sorted(by_number.items()))) == order


def test_a_class_named_like_a_split_stays_a_class(tmp_path: Path) -> None:
    files = {"car/1.png": b"1", "train/1.png": b"2"}
    source = source_of(write_files(tmp_path / "vehicles", files))
    assert [source.num_images, source.class_names] == [2, ("car", "train")]


@pytest.mark.parametrize(("split", "rows"), [("train[1:3]", [1, 2]), ("train[:50%]", [0, 1]), ("train[-1:]", [3])])
def test_a_part_of_a_split_is_a_part_of_the_files(tmp_path: Path, split: str, rows: list[int]) -> None:
    images = open_source(write_files(tmp_path / "pets", FILES), tmp_path / "cache", split=split)
    assert np.array_equal(pixels_of(images), [list(IMAGES.values())[row] for row in rows])


@pytest.mark.parametrize("split", ["test", "train[", "train[5:2:3]", "train[:x]"])
@pytest.mark.parametrize("kind", ["folder", "array", "saved"])
def test_an_invalid_part_of_a_split_is_refused(tmp_path: Path, kind: str, split: str) -> None:
    message = refusal(write_four_images(tmp_path, kind), tmp_path / "cache", split=split)
    assert ("has no split 'test', only 'train' and parts of it" if split == "test" else "is invalid") in message


@pytest.mark.parametrize("name", ["pets", "pets.tar", "x.npy", "x.npz", "saved", "x.parquet", "splits"])
def test_parts_of_a_split_can_be_combined(tmp_path: Path, name: str) -> None:
    """As in `datasets`, for every kind of source."""
    path, images = tmp_path / name, list(IMAGES.values())
    if name == "splits":
        write_files(path, {f"train/{file}": data for file, data in FILES.items()} | {"test/cat/9.png": encode(RGB)})
    elif name in ("pets", "pets.tar"):
        store(tmp_path, name, FILES)
    elif name == "x.npy":
        np.save(path, np.stack(images))
    elif name == "x.npz":
        np.savez(path, images=np.stack(images))
    else:
        write_parquet(tmp_path / "x.parquet", list(FILES.values()))
    if name == "saved":
        datasets.Dataset.from_parquet(str(tmp_path / "x.parquet")).save_to_disk(path)
    found = open_source(path, tmp_path / "cache", split="train[:1]+train[2:]")
    assert np.array_equal(pixels_of(found), [images[row] for row in (0, 2, 3)])


def test_parts_of_several_splits_are_refused(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "x", {"train/1.png": encode(RGB), "test/1.png": encode(RGB)})
    message = refusal(folder, tmp_path / "cache", split="train+test[:1]")
    assert message == f"split 'train+test[:1]' of {folder} combines train and test; use parts of one split."


def write_four_images(tmp_path: Path, kind: str) -> Path:
    if kind == "folder":
        return write_files(tmp_path / "pets", FILES)
    if kind == "array":
        np.savez(tmp_path / "x.npz", images=np.zeros((4, 6, 5), np.uint8))
        return tmp_path / "x.npz"
    datasets.Dataset.from_dict({"image": [0, 1, 2, 3]}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("split", ["train[4:]", "train[9:]", "train[:0]"])
@pytest.mark.parametrize("kind", ["folder", "array", "saved"])
def test_an_empty_part_of_a_split_is_refused(tmp_path: Path, kind: str, split: str) -> None:
    """With the same message for every kind of source."""
    source = write_four_images(tmp_path, kind)
    assert refusal(source, tmp_path / "cache", split=split) == (
        f"split {split!r} of {source} is empty; 'train' has 4 images."
    )


def test_an_image_without_class_folder_is_named_if_labels_are_needed(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "pets", FILES | {"stray.png": FILES["dog/1.png"]})
    assert open_source(folder, tmp_path / "cache").labels is not None
    message = refusal(folder, tmp_path / "cache", with_labels=True)
    assert message == f"image 4 of {folder} (stray.png) has no label; every image needs one from 0 to 1."


def test_links_are_followed_without_cycles(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", {"1.png": FILES["cat/1.png"]})
    folder = write_files(tmp_path / "pets", {"dog/1.png": FILES["dog/1.png"]})
    (folder / "cat").symlink_to(tmp_path / "elsewhere")
    (folder / "dog" / "again").symlink_to(folder)
    images = open_source(folder, tmp_path / "cache", with_labels=True)
    assert [images.class_names, len(images)] == [("cat", "dog"), 2]


def test_links_are_followed_in_the_order_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the order on the disk: of several links to a folder, the first by name is followed."""
    folder = write_files(tmp_path / "pets", {"dogs/all/1.png": FILES["dog/1.png"]})
    (folder / "links").symlink_to(folder / "dogs" / "all")
    (folder / "all").symlink_to(folder / "dogs" / "all")
    walk = os.walk

    def turned(*arguments: Any, **options: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for place, subfolders, names in walk(*arguments, **options):
            subfolders.sort(reverse=True)
            yield place, subfolders, names

    assert source_of(folder).class_names == ("all",)
    monkeypatch.setattr(os, "walk", turned)
    assert source_of(folder).class_names == ("all",)


def test_hard_links_in_a_tar_are_read(tmp_path: Path) -> None:
    """As tar stores a file with two names. Symbolic links are ignored."""
    folder = write_files(tmp_path / "pets", FILES)
    (folder / "bird").mkdir()
    os.link(folder / "cat" / "1.png", folder / "bird" / "1.png")
    (folder / "dog" / "2.png").symlink_to("1.png")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(folder, ".")
    source = source_of(tmp_path / "x.tar.gz")
    assert [source.num_images, source.class_names] == [5, ("bird", "cat", "dog")]
    assert source.ignored_files == ("dog/2.png (a link or a device)",)
    images = open_source(tmp_path / "x.tar.gz", tmp_path / "cache")
    (bird,) = np.flatnonzero(images.labels == 0)
    assert np.array_equal(pixels_of(images)[bird], IMAGES["cat/1.png"])


def test_a_hard_link_to_a_bomb_or_a_missing_file_is_a_bad_image(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, size, target in (("bomb", 2**25, ""), ("1.png", 0, "bomb"), ("2.png", 0, "gone")):
            member = tarfile.TarInfo(name)
            member.size, member.linkname = size, target
            member.type = tarfile.LNKTYPE if target else tarfile.REGTYPE
            archive.addfile(member, io.BytesIO(bytes(size)))
    bomb, nothing = source_of(path).read([0, 1])
    assert bomb.problem == "it would unpack to 33,554,432 bytes"
    assert nothing.problem == "it is a link to a file that is not in the archive"


def test_a_zip_with_backslashes_has_folders(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", {name.replace("/", "\\"): data for name, data in FILES.items()} | {"dog\\": b""})
    assert source_of(path).class_names == ("cat", "dog")
    assert source_of(path).ignored_files == ()


def test_a_dangling_link_is_a_bad_image(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "pets", {"cat/1.png": FILES["cat/1.png"]})
    (folder / "cat" / "2.png").symlink_to(folder / "gone.png")
    assert f"image 1 of {folder} (cat/2.png) cannot be read (No such file" in refusal(folder, tmp_path / "cache")


def test_a_pipe_is_a_bad_image(tmp_path: Path) -> None:
    """Reading it would block."""
    folder = write_files(tmp_path / "pets", {"cat/1.png": FILES["cat/1.png"]})
    os.mkfifo(folder / "cat" / "2.png")
    assert "(cat/2.png) cannot be read (it is not a regular file)" in refusal(folder, tmp_path / "cache")


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
@pytest.mark.parametrize("part", [0, 0.05, 1 / 3, 0.6])
def test_a_truncated_archive_is_refused(tmp_path: Path, name: str, part: float) -> None:
    """Also between two images, where only the end of a tar is missing: a third of it is ten images of 1024 bytes."""
    path = pack(tmp_path / name, {f"{number}.png": encode(RGB) for number in range(20)})
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    message = refusal(path, tmp_path / "cache")
    assert f"{path} cannot be read as a {'zip' if name == 'x.zip' else 'tar'} file" in message


def test_a_damaged_member_of_a_zip_is_a_bad_image(tmp_path: Path) -> None:
    """Its checksum is wrong, which an image decoder may not notice."""
    path = pack(tmp_path / "x.zip", {"a.png": encode(RGB), "b.png": encode(RGB)})
    data = bytearray(path.read_bytes())
    data[data.rindex(b"IDAT") + 5] ^= 1
    path.write_bytes(data)
    assert f"image 1 of {path} (b.png) cannot be read (BadZipFile: Bad CRC-32" in refusal(path, tmp_path / "cache")


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", {"a.png": encode(RGB)})
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert refusal(path, tmp_path / "cache") == f"{path} is encrypted; unpack it and set data.source to the folder."


def test_a_huge_member_is_a_bad_image(tmp_path: Path) -> None:
    """The directory of the zip declares 3 GiB."""
    path = pack(tmp_path / "x.zip", {"a.png": encode(RGB)})
    data = bytearray(path.read_bytes())
    start = data.rindex(b"PK\x01\x02") + 24
    data[start : start + 4] = (3 * 2**30).to_bytes(4, "little")
    path.write_bytes(data)
    assert "(a.png) cannot be read (it would unpack to 3,221,225,472 bytes)" in refusal(path, tmp_path / "cache")


@pytest.mark.parametrize("name", KINDS[:3])
def test_the_fingerprint_changes_with_every_file(tmp_path: Path, name: str) -> None:
    first = source_of(store(tmp_path, name, FILES)).fingerprint
    assert source_of(tmp_path / name).fingerprint == first
    seen = {first}
    for files in (
        FILES | {"dog/1.png": FILES["cat/1.png"]},
        {**FILES, "dog/2.png": FILES["dog/1.png"]},
        {file.replace("dog/1", "dog/3"): data for file, data in FILES.items()},
    ):
        (tmp_path / str(len(seen))).mkdir()
        seen.add(source_of(store(tmp_path / str(len(seen)), name, files)).fingerprint)
    assert len(seen) == 4


def test_an_unreadable_folder_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("nothing is forbidden to root")
    folder = write_files(tmp_path / "pets", FILES)
    (folder / "cat").chmod(0)
    try:
        assert f"{folder / 'cat'} cannot be read (Permission denied)" in refusal(folder, tmp_path / "cache")
    finally:
        (folder / "cat").chmod(0o755)


# --------------------------------------------------------------------------------------------------------------- arrays


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
def test_an_array_in_the_other_byte_order_keeps_every_bit(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    """As written on a machine with the other byte order."""
    pixels = RANDOM.integers(0, 65536, (4, 6, 5, 3), dtype=np.uint16)
    path = save(tmp_path / name, pixels.astype(pixels.dtype.newbyteorder()))
    images = open_source(path, tmp_path / "cache", **settings)
    assert images.images.dtype == np.uint16
    assert images.images.dtype.isnative
    assert np.array_equal(pixels_of(images)[..., :3], pixels)


def test_a_npy_file_without_preprocessing_is_not_copied(tmp_path: Path) -> None:
    images = open_source(save(tmp_path / "x.npy", PIXELS), tmp_path / "cache")
    assert isinstance(images.images.base, np.memmap)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("channels", [1, 2, 7, 12])
def test_an_array_may_have_data_num_channels_channels(tmp_path: Path, channels: int) -> None:
    pixels = RANDOM.integers(0, 256, (4, 6, 5, channels), dtype=np.uint8)
    path = save(tmp_path / "x.npy", pixels)
    assert np.array_equal(pixels_of(open_source(path, tmp_path / "cache", num_channels=channels)), pixels)
    assert open_source(path, tmp_path / "cache", num_channels=channels, resolution=4).image_shape == (channels, 4, 4)
    if channels != 1:
        assert "or data.num_channels of them" in refusal(path, tmp_path / "cache")


def test_images_without_a_channel_axis_are_gray(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", PIXELS[..., 0])
    assert np.array_equal(pixels_of(open_source(path, tmp_path / "cache")), PIXELS[..., :1])


def test_labels_of_an_npz_are_numbered_classes(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", PIXELS, labels=np.array([0, 1, 1, 2], dtype=np.uint8))
    images = open_source(path, tmp_path / "cache", with_labels=True, split="train[:3]")
    assert [images.class_names, images.labels.tolist()] == [("0", "1", "2"), [0, 1, 1]]
    assert "has no labels" in refusal(save(tmp_path / "y.npz", PIXELS), tmp_path / "cache", with_labels=True)
    np.savez(tmp_path / "guided_diffusion.npz", PIXELS, np.array([1, 0, 1, 1]))
    for other in (tmp_path / "guided_diffusion.npz", save(tmp_path / "z.npz", PIXELS, y=np.array([1, 0, 1, 1]))):
        assert open_source(other, tmp_path / "cache", with_labels=True).labels.tolist() == [1, 0, 1, 1]


def test_labels_may_be_called_labels_but_have_to_be_named_otherwise(tmp_path: Path) -> None:
    """Version 0.1 knew the column label only."""
    images = [{"bytes": encode(RGB), "path": None}] * 2
    path = write_table(tmp_path / "x.parquet", {"image": images, "labels": [7, 3], "kind": [1, 0]})
    assert open_source(path, tmp_path / "cache", with_labels=True).class_names == ("3", "7")
    earlier = find_source(DataConfig(source=str(path)), "train", "text")
    assert isinstance(earlier, Source)
    assert earlier.labels is None
    path = write_table(tmp_path / "y.parquet", {"image": images, "breed": ["b", "a"], "kind": [1, 0]})
    assert refusal(path, tmp_path / "cache", with_labels=True).endswith(
        "set data.label_column to one of breed, kind, or model.class_conditional to false."
    )


def test_arrays_are_detected_or_configured(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=PIXELS)
    assert np.array_equal(pixels_of(open_source(tmp_path / "x.npz", tmp_path / "cache")), PIXELS)
    np.savez(tmp_path / "y.npz", x=PIXELS, x_test=PIXELS[:2], y=np.arange(4), y_test=np.arange(2), z=PIXELS)
    message = refusal(tmp_path / "y.npz", tmp_path / "cache")
    assert message == f"{tmp_path / 'y.npz'} has no split 'train'; it has test."
    np.savez(tmp_path / "z.npz", a=PIXELS, b=PIXELS)
    message = refusal(tmp_path / "z.npz", tmp_path / "cache")
    assert "'images' is not an array of" in message
    assert "which contains a, b; set data.image_column to one of them." in message
    named = {"image_column": "x_test", "label_column": "y_test"}
    assert len(open_source(tmp_path / "y.npz", tmp_path / "cache", with_labels=True, **named)) == 2
    for setting in ("image_column", "label_column"):
        assert f"data.{setting} 'z' is not an array of" in refusal(
            tmp_path / "x.npz", tmp_path / "cache", **{setting: "z"}
        )


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_channels_may_come_first(tmp_path: Path, name: str) -> None:
    first = save(tmp_path / name, PIXELS.transpose(0, 3, 1, 2))
    assert np.array_equal(pixels_of(open_source(first, tmp_path / "cache")), PIXELS)
    assert len(open_source(first, tmp_path / "cache", split="train[1:]")) == 3
    wide = save(tmp_path / f"wide{name}", np.arange(2 * 5 * 6 * 7, dtype=np.uint8).reshape(2, 5, 6, 7))
    assert open_source(wide, tmp_path / "cache", num_channels=5).image_shape == (5, 6, 7)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_bool_is_black_and_white(tmp_path: Path, name: str) -> None:
    masks = PIXELS[..., 0] > 127
    images = open_source(save(tmp_path / name, masks), tmp_path / "cache")
    assert images.image_shape[0] == 1
    assert np.array_equal(pixels_of(images)[..., 0], np.where(masks, 255, 0))


def test_labels_that_are_no_classes_matter_only_to_class_conditional_networks(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", PIXELS, labels=np.ones((4, 3)))
    assert open_source(path, tmp_path / "cache").labels is None
    assert "contain [1.0, 1.0, 1.0] (row 0); a label is" in refusal(path, tmp_path / "cache", with_labels=True)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"images": np.zeros((2, 8, 8, 1), np.float32)}, "has float32 values, whose range is unknown; set data.value"),
        (
            {"images": np.zeros((2, 8, 8, 1), np.int64)},
            "has int64 values, whose range is unknown; set data.value_range",
        ),
        ({"images": np.zeros((8, 8), np.uint8)}, "it must be numbers (number, height, width, channels) or (number, "),
        ({"images": np.zeros((2, 5, 8, 8), np.uint8)}, "with 1, 3 or 4 channels or data.num_channels of them"),
        ({"images": np.zeros((0, 8, 8, 1), np.uint8)}, "contains no images"),
        ({"images": np.zeros((2, 8, 8, 1), np.uint8), "labels": np.zeros(3, np.int64)}, "but 3 labels; save one"),
        ({"images": np.array([{}])}, "cannot be read as a NumPy array"),
        ({}, "'images' is not an array of"),
    ],
)
def test_an_array_without_images_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    assert sentence in refusal(tmp_path / "x.npz", tmp_path)


@pytest.mark.parametrize("shape", [(32, 32, 3), (5, 6, 1), (5, 6, 4)])
def test_a_single_image_is_not_read_as_gray_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
    inside = ", ".join(map(str, shape))
    assert refusal(tmp_path / "x.npy", tmp_path / "cache").endswith(f"save it as (1, {inside}) or ({inside}, 1).")


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize("length", [0, 1, 50, -100])
def test_a_damaged_array_file_is_refused(tmp_path: Path, name: str, length: int) -> None:
    path = save(tmp_path / name, PIXELS)
    path.write_bytes(path.read_bytes()[:length])
    assert f"{name} cannot be read as a NumPy array" in refusal(path, tmp_path)


def test_a_compressed_array_with_a_damaged_byte_is_refused(tmp_path: Path) -> None:
    """At several places, because some are detected by the decompressor and some by the checksum."""
    np.savez_compressed(tmp_path / "x.npz", images=np.arange(4096, dtype=np.uint8).reshape(4, 32, 32, 1) % 251)
    whole = (tmp_path / "x.npz").read_bytes()
    for place in range(60, 300, 12):
        (tmp_path / "x.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        assert "x.npz cannot be read as a NumPy array" in refusal(tmp_path / "x.npz", tmp_path)


def test_labels_of_an_array_that_are_missing(tmp_path: Path) -> None:
    missing = save(tmp_path / "x.npz", PIXELS, labels=np.full(4, -1))
    assert open_source(missing, tmp_path / "cache").labels is None
    assert "has no labels, but the network is class-conditional" in refusal(missing, tmp_path, with_labels=True)


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
def test_an_array_is_preprocessed_like_any_other_images(
    tmp_path: Path, name: str, settings: dict[str, Any], shape: tuple[int, ...]
) -> None:
    images = open_source(save(tmp_path / name, PIXELS), tmp_path / "cache", **settings)
    assert images.image_shape == shape
    assert pixels_of(images).shape == (4, *shape[1:], shape[0])


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize("settings", [{}, {"resolution": 4}], ids=str)
def test_a_modified_array_has_another_digest(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    """Also if its size stays the same and a single value of a thousand images changes."""
    pixels = RANDOM.integers(0, 256, (1000, 4, 4, 1), dtype=np.uint8)
    before = open_source(save(tmp_path / name, pixels), tmp_path / "cache", **settings)
    assert open_source(tmp_path / name, tmp_path / "cache", **settings).digest == before.digest
    elsewhere = open_source(save(tmp_path / f"again_{name}", pixels), tmp_path / "cache", **settings)
    assert elsewhere.digest == before.digest, "the digest depends only on the content"
    pixels[2, 3, 3] ^= 255
    (tmp_path / name).unlink()  # a memory-mapped file must not be overwritten
    after = open_source(save(tmp_path / name, pixels), tmp_path / "cache", **settings)
    assert np.array_equal(pixels_of(after), pixels)
    assert after.digest != before.digest


def test_a_part_of_an_array_has_another_digest(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", PIXELS)
    digests = {
        open_source(path, tmp_path / "cache", split=split).digest for split in ("train", "train[:3]", "train[1:]")
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("feature", "dtype"),
    [
        (datasets.Array3D((3, 6, 5), "uint8"), np.uint8),
        (datasets.Array3D((3, 6, 5), "int16"), np.int16),
        (datasets.List(datasets.List(datasets.List(datasets.Value("float64")))), np.float32),
    ],
)
def test_arrays_in_a_table_are_images(tmp_path: Path, feature: object, dtype: type) -> None:
    """With the channels first or last. Arrays of 8 bits are pictures."""
    images = RGB.transpose(2, 0, 1)[None].repeat(2, axis=0).astype(dtype)
    columns = {"name": ["a", "b"], "x": [image.tolist() for image in images]}
    features = datasets.Features(name=datasets.Value("string"), x=feature)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "x.parquet")
    value_range = None if dtype == np.uint8 else [0, 255]
    found = open_source(tmp_path / "x.parquet", tmp_path / "cache", value_range=value_range)
    assert found.images.dtype == dtype
    assert np.array_equal(pixels_of(found), [RGB, RGB])


def test_arrays_with_labels_in_tar_files(tmp_path: Path) -> None:
    files = {"0.npy": npy(GRAY - 0.5), "0.cls": b"3", "1.npy": npy(GRAY / 2), "1.cls": b"1"}
    found = open_source(store(tmp_path, "pets.tar", files), tmp_path / "cache", with_labels=True, value_range="auto")
    assert [found.labels.tolist(), found.class_names] == [[1, 0], ("1", "3")]


def test_metadata_of_arrays_are_opened_as_a_table(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "x", {"0.npy": npy(GRAY), "metadata.csv": b"file_name,label\n0.npy,1\n"})
    assert refusal(folder, tmp_path / "cache") == (
        f"{folder} has metadata.csv but no pictures; set data.source to {folder / 'metadata.csv'}."
    )
    assert np.array_equal(pixels_of(open_source(folder / "metadata.csv", tmp_path / "cache"))[0, ..., 0], GRAY)
