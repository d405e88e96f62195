"""What folders mean: the folders of a few files -> split and class of each."""

from pathlib import PurePosixPath

import pytest

from ddpm_hf.data import DataError
from ddpm_hf.data.layout import Layout, read_layout

# Files -> "split/class", "-" for none.
FOLDERS: dict[str, dict[str, str]] = {
    "no folders": {"1.png": "train/-"},
    "classes": {"cat/1.png": "train/cat", "dog/1.png": "train/dog", "dog/deep/er/1.png": "train/dog"},
    "classes and images beside them": {"1.png": "train/-", "cat/1.png": "train/cat"},
    "one class": {"cat/1.png": "train/cat"},
    "one folder that is no class": {"JPEGImages/1.png": "train/-"},
    "folders around classes": {"a/images/cat/1.png": "train/cat", "a/images/dog/1.png": "train/dog"},
    "splits": {"train/1.png": "train/-", "val/1.png": "validation/-", "test/1.png": "test/-"},
    "a single split": {"train/cat/1.png": "train/cat", "train/dog/1.png": "train/dog"},
    "splits with years": {"train2014/1.png": "train/-", "train2017/1.png": "train/-", "val_2017/1.png": "validation/-"},
    "splits in other words": {"Training_Set/1.png": "train/-", "dev/1.png": "validation/-", "eval/1.png": "test/-"},
    "splits with a name": {"DIV2K_train_HR/1.png": "train/-", "DIV2K_valid_HR/1.png": "validation/-"},
    "splits with classes": {"train/cat/1.png": "train/cat", "valid/dog/1.png": "validation/dog"},
    "splits around images": {"train/images/1.png": "train/-", "val/images/1.png": "validation/-"},
    "splits around folders around classes": {
        "train/images/cat/1.png": "train/cat", "train/images/dog/1.png": "train/dog", "val/cat/1.png": "validation/cat",
    },
    "folders around splits": {"coco/images/train2017/1.png": "train/-", "coco/images/val2017/1.png": "validation/-"},
    "splits and others": {"train/1.png": "train/-", "test/1.png": "test/-", "mine/1.png": "-/-", "1.png": "-/-"},
    "a split and unlabeled images": {"train/a/1.png": "train/a", "train/b/1.png": "train/b", "unlabeled/1.png": "-/-"},
    "a class called like a split": {"car/1.png": "train/car", "train/1.png": "train/train"},
    "splits of CycleGAN": {
        "trainA/1.png": "train/-", "trainB/1.png": "train/-", "testA/1.png": "test/-", "testB/1.png": "test/-",
    },
    "images and masks": {"images/1.png": "train/-", "masks/1.png": "-/-"},
    "images and masks of one name": {"train_images/1.png": "train/-", "train_masks/1.png": "-/-"},
    "Pascal VOC": {"VOC/JPEGImages/1.png": "train/-", "VOC/SegmentationClass/1.png": "-/-"},
    "Oxford pets": {"images/1.png": "train/-", "annotations/trimaps/1.png": "-/-"},
    "images and masks in splits": {
        "train/images/1.png": "train/-", "train/masks/1.png": "-/-", "val/images/1.png": "validation/-",
        "val/masks/1.png": "-/-",
    },
    "masks of classes": {
        "images/cat/1.png": "train/cat", "images/dog/1.png": "train/dog", "labels/cat/1.png": "-/-",
    },
    "classes called images and labels": {
        "images/1.png": "train/images", "labels/1.png": "train/labels", "dogs/1.png": "train/dogs",
    },
    "a folder in a folder of the same name": {"img_celeba/img_celeba/1.png": "train/-"},
    "classes with a word in common": {"train_station/1.png": "train/train_station", "bus_stop/1.png": "train/bus_stop"},
}  # fmt: skip


def layout_of(files: dict[str, str], kind: str | None = None, *, is_archive: bool = False) -> Layout:
    return read_layout([parts(file) for file in files], "photos", kind, is_archive=is_archive)


def parts(file: str) -> tuple[str, ...]:
    return PurePosixPath(file).parts[:-1]


def meanings(layout: Layout, files: dict[str, str]) -> dict[str, str]:
    return {file: f"{layout.split_of(parts(file)) or '-'}/{layout.class_of(parts(file)) or '-'}" for file in files}


@pytest.mark.parametrize("is_archive", [False, True])
@pytest.mark.parametrize("name", FOLDERS)
def test_folders_mean_what_their_names_say(name: str, is_archive: bool) -> None:
    """An archive contains the dataset as one more folder."""
    files = {f"x/{file}" if is_archive else file: meaning for file, meaning in FOLDERS[name].items()}
    assert meanings(layout_of(files, is_archive=is_archive), files) == files


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("flat", {"car/a/1.png": "train/-", "train/a/1.png": "train/-", "train/b/1.png": "train/-"}),
        ("classes", {"car/a/1.png": "train/car", "train/a/1.png": "train/train", "train/b/1.png": "train/train"}),
        ("splits", {"car/a/1.png": "car/-", "train/a/1.png": "train/-", "train/b/1.png": "train/-"}),
        ("splits/classes", {"car/a/1.png": "car/a", "train/a/1.png": "train/a", "train/b/1.png": "train/b"}),
    ],
)
def test_the_setting_decides(kind: str, expected: dict[str, str]) -> None:
    assert meanings(layout_of(expected, kind), expected) == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["car/1.png", "val/1.png"], "photos has the folders car beside val, which is the name of a split; set "),
        (["cat/1.png", "dog/1.png", "test/1.png"], "photos has the folders cat, dog beside test, which is the name "),
        (["car/train/1.png", "car/test/1.png", "car/mask/1.png"], None),
        (
            ["car/train/1.png", "car/test/1.png", "bus/train/1.png", "bus/test/1.png", "bus/mask/1.png"],
            "photos has splits inside of its class folders (mask, test, train); move each class into the",
        ),
    ],
)
def test_ambiguous_folders_are_refused(files: list[str], message: str | None) -> None:
    folders = dict.fromkeys(files, "")
    if message is None:  # a single folder encloses everything
        assert layout_of(folders).left_out == ("mask",)
        return
    with pytest.raises(DataError) as caught:
        layout_of(folders)
    assert str(caught.value).startswith(message)
    assert "set data.layout to classes" in str(caught.value)


def test_a_class_called_like_a_split_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    layout_of(FOLDERS["a class called like a split"])
    assert caplog.messages == [
        "photos has the folders car beside train, which is the name of a split; all of them are classes. Set "
        "data.layout to classes if this is right, or to splits (splits/classes if they contain a folder for each "
        "class)."
    ]
    layout_of(FOLDERS["a class called like a split"], "classes")
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("wanted", "folders"),
    [
        ("train", {"train2014", "train2017"}),
        ("train2017", {"train2017"}),
        ("validation", {"val_2017"}),
        ("val", {"val_2017"}),
        ("test", set()),
    ],
)
def test_a_split_is_found_by_its_name_and_by_that_of_its_folder(wanted: str, folders: set[str]) -> None:
    assert layout_of(FOLDERS["splits with years"]).folders_of(wanted) == folders


def test_splits_need_folders() -> None:
    with pytest.raises(DataError, match="splits needs a folder for each split in photos, which has none"):
        layout_of({"1.png": ""}, "splits")


def test_the_setting_makes_masks_images() -> None:
    files = {"images/1.png": "train/images", "masks/1.png": "train/masks"}
    assert meanings(layout_of(files, "classes"), files) == files


@pytest.mark.parametrize(
    ("files", "is_doubtful"),
    [
        (["photo/cat/1.png", "photo/dog/1.png", "sketch/cat/1.png", "sketch/dog/1.png"], True),
        (["amazon/images/cat/1.png", "amazon/images/dog/1.png", "dslr/cat/1.png", "dslr/dog/1.png"], True),
        (["cat/images/1.png", "dog/images/1.png"], False),
        (["mammal/cat/1.png", "mammal/dog/1.png", "bird/owl/1.png", "bird/dog/1.png"], False),
    ],
)
def test_classes_that_contain_the_same_folders_are_doubtful(files: list[str], is_doubtful: bool) -> None:
    layout = layout_of(dict.fromkeys(files, ""))
    assert bool(layout.doubt) == is_doubtful
    if is_doubtful:
        assert "each of them contains cat, dog; if these are the classes, set data.source to one" in layout.doubt


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no folders", "images without classes"),
        ("classes", "a folder for each class"),
        ("splits and others", "splits test, train; left out: mine"),
        ("splits with years", "splits train2014 (train), train2017 (train), val_2017 (validation)"),
        ("images and masks in splits", "splits train, val (validation); left out: train/masks, val/masks"),
        ("splits with classes", "splits train, valid (validation), with a folder for each class"),
    ],
)
def test_a_layout_says_what_was_understood(name: str, text: str) -> None:
    assert str(layout_of(FOLDERS[name])) == text
