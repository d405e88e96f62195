"""Images in memory: the types of `train_dataset`, their pixels and labels, and data sets that are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split

from ddpm_hf.config import TRAIN_DATASET, DataConfig
from ddpm_hf.data import DataError, ImageSet, open_images, open_sets
from ddpm_hf.data import cache as cache_module
from tests.unit.data.helpers import DEEP_RGB, RGB, encode, encode_deep, write_files

NUMBER = 12
PIXELS = np.random.default_rng(0).integers(0, 256, (NUMBER, 8, 6, 3), dtype=np.uint8)
LABELS = [row % 3 for row in range(NUMBER)]
NAMES = ("cat", "dog", "owl")
TEXTS = [NAMES[label] for label in LABELS]
PICTURES = [Image.fromarray(image) for image in PIXELS]
CHANNELS_FIRST = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
UNIT = CHANNELS_FIRST.float() / 255  # as ToTensor returns it
SIGNED = (UNIT - 0.5) / 0.5  # as Normalize([0.5], [0.5]) does


class Photos(Dataset[Any]):
    """A data set as torchvision has them, with names of the classes."""

    classes: ClassVar = list(NAMES)

    def __init__(self, sample: Callable[[int], Any], number: int = NUMBER) -> None:
        self.sample, self.number = sample, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, row: int) -> Any:
        return self.sample(row)


def hub_dataset(**columns: Any) -> datasets.Dataset:
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(NAMES)))
    return datasets.Dataset.from_dict({"image": PICTURES, "label": LABELS} | columns, features)


def to_tensors(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """A transform as in the training example of diffusers."""
    images = [torch.from_numpy(np.asarray(image)).permute(2, 0, 1) / 127.5 - 1 for image in batch["image"]]
    return {"input": images, "label": batch["label"]}


def array_of(objects: list[Any]) -> np.ndarray:
    array = np.empty(len(objects), object)
    array[:] = objects
    return array


def open_memory(data: Any, folder: Path, *, with_labels: bool = False, **settings: Any) -> ImageSet:
    config = DataConfig(source=TRAIN_DATASET, cache_dir=str(folder / "cache"), **settings)
    return open_images(config, with_labels=with_labels, dataset=data)


def refusal(data: Any, folder: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as raised:
        open_memory(data, folder, **settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def pixels_of(images: ImageSet) -> np.ndarray:
    return images.take(images.positions)[0].transpose(0, 2, 3, 1)


# -------------------------------------------------------------------------------------------------------------- types

WITHOUT_LABELS: dict[str, Any] = {
    "array": PIXELS,
    "array, channels first": PIXELS.transpose(0, 3, 1, 2),
    "array of [0, 1]": PIXELS / 255,
    "tensor": CHANNELS_FIRST,
    "tensor, channels last": torch.from_numpy(PIXELS),
    "tensor of [0, 1]": UNIT,
    "tensor of [-1, 1] with a gradient": SIGNED.clone().requires_grad_(),
    "pictures": PICTURES,
    "array of pictures": array_of(PICTURES),
    "tuple of arrays": tuple(PIXELS),
    "two tensors": list(SIGNED),
    "bytes": [encode(image) for image in PIXELS],
    "dictionaries": [{"img": image} for image in PICTURES],
    "arrays in datasets": datasets.Dataset.from_dict({"image": list(PIXELS)}),
    "tensor data set": TensorDataset(SIGNED),
}
NUMBERED: dict[str, Any] = {
    "pair of arrays": (PIXELS, np.array(LABELS)),
    "pair of lists": [PIXELS, LABELS],
    "labels of Keras": (PIXELS, np.array(LABELS, np.uint8)[:, None]),
    "dictionary of arrays": {"images": PIXELS, "labels": np.array(LABELS)},
    "dictionary of lists": {"image": PICTURES, "label": LABELS},
    "tensor data set": TensorDataset(CHANNELS_FIRST, torch.tensor(LABELS)),
    "tensor data set of [-1, 1]": TensorDataset(SIGNED, torch.tensor(LABELS)),
    "pairs": list(zip(PICTURES, np.array(LABELS), strict=True)),
}
NAMED: dict[str, Any] = {
    "text": list(zip(PICTURES, TEXTS, strict=True)),
    "array of text": (PIXELS, np.array(TEXTS)),
    "datasets": hub_dataset(),
    "datasets with text": datasets.Dataset.from_dict({"image": PICTURES, "label": TEXTS}),
    "datasets with a format": hub_dataset().with_format("torch", columns=["image"]),
    "datasets with a transform": hub_dataset().with_transform(to_tensors),
    "pictures and numbers": Photos(lambda row: (PICTURES[row], LABELS[row])),
    "tensors and numbers": Photos(lambda row: (SIGNED[row], torch.tensor(LABELS[row]))),
    "dictionary": Photos(lambda row: {"pixel_values": UNIT[row], "label": np.int64(LABELS[row])}),
    "subset": Subset(Photos(lambda row: (UNIT[row], LABELS[row])), range(NUMBER)),
    "concatenation": ConcatDataset(
        [Subset(Photos(lambda row: (UNIT[row], LABELS[row])), rows) for rows in (range(5), range(5, NUMBER))]
    ),
}


@pytest.mark.parametrize("kind", WITHOUT_LABELS)
def test_images_of_every_type_are_the_same(tmp_path: Path, kind: str) -> None:
    assert np.array_equal(pixels_of(open_memory(WITHOUT_LABELS[kind], tmp_path)), PIXELS)


@pytest.mark.parametrize(
    ("kind", "has_names"), [*((kind, False) for kind in NUMBERED), *((kind, True) for kind in NAMED)]
)
def test_labels_of_every_type_are_the_same(tmp_path: Path, kind: str, has_names: bool) -> None:
    images = open_memory((NAMED if has_names else NUMBERED)[kind], tmp_path, with_labels=True)
    assert images.labels is not None
    assert np.array_equal(pixels_of(images), PIXELS)
    assert images.labels.tolist() == LABELS
    assert images.class_names == (NAMES if has_names else ("0", "1", "2"))


def test_an_array_that_needs_no_preprocessing_is_not_copied(tmp_path: Path) -> None:
    for data in (PIXELS, CHANNELS_FIRST, TensorDataset(CHANNELS_FIRST)):
        images = open_memory(data, tmp_path)
        assert isinstance(images.images, np.ndarray)
        assert np.shares_memory(images.images, PIXELS)
    crops = open_memory(PIXELS, tmp_path, resolution=4, crop="random", resize_to=0)
    assert crops.image_shape == (3, 4, 4)
    assert not (tmp_path / "cache").exists()


def test_images_are_read_twice_and_then_come_from_the_cache(tmp_path: Path) -> None:
    rows: list[int] = []

    def sample(row: int) -> Any:
        rows.append(row)
        return PICTURES[row], LABELS[row]

    first = open_memory(Photos(sample), tmp_path)
    assert len(rows) == 1 + 2 * NUMBER
    second = open_memory(Photos(sample), tmp_path)
    assert len(rows) == 2 + 3 * NUMBER
    assert first.location == second.location


def test_other_content_is_another_data_set(tmp_path: Path) -> None:
    changed = PIXELS.copy()
    changed[5, 0, 0, 0] ^= 1
    other_labels = (PIXELS, np.array(LABELS)[::-1])
    for one, others in (
        (PIXELS, (changed, PIXELS[::-1], PIXELS[:-1])),
        (list(PIXELS), (list(changed), list(PIXELS[::-1]), list(PIXELS[:-1]))),
        ((PIXELS, np.array(LABELS)), (other_labels,)),
        (list(zip(PICTURES, LABELS, strict=True)), (list(zip(PICTURES, LABELS[::-1], strict=True)),)),
    ):
        digest = open_memory(one, tmp_path).digest
        assert digest == open_memory(one, tmp_path).digest != ""
        assert digest not in {open_memory(other, tmp_path).digest for other in others}


# -------------------------------------------------------------------------------------------- the rules of image files


def test_images_are_preprocessed_as_files_are(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"resolution": 4, "crop_before_resize": 6, "num_channels": 3}
    folder = write_files(tmp_path / "x", {f"{row:02}.png": encode(image) for row, image in enumerate(PIXELS)})
    config = DataConfig(source=str(folder), cache_dir=str(tmp_path / "cache"), **settings)
    expected = pixels_of(open_images(config, with_labels=False))
    for data in (PIXELS, UNIT, PICTURES, Photos(lambda row: (SIGNED[row], 0))):
        assert np.array_equal(pixels_of(open_memory(data, tmp_path, **settings)), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_pictures_of_every_mode_are_those_of_files(tmp_path: Path, mode: str) -> None:
    gray = PIXELS[:2, ..., 0].astype(np.uint16) * 257 if mode == "I;16" else PIXELS[:2, ..., 0]
    color = [
        Image.fromarray(image) for image in (PIXELS[:2] if mode in ("P", "RGB", "RGBA", "CMYK", "YCbCr") else gray)
    ]
    pictures = color if mode == "I;16" else [picture.convert(mode) for picture in color]
    ending = "tif" if mode in ("CMYK", "YCbCr", "I;16") else "png"
    for row, picture in enumerate(pictures):
        (tmp_path / "x").mkdir(exist_ok=True)
        picture.save(tmp_path / "x" / f"{row}.{ending}")
    config = DataConfig(source=str(tmp_path / "x"), cache_dir=str(tmp_path / "cache"))
    expected = open_images(config, with_labels=False)
    for data in (
        pictures,
        [Image.open(path) for path in sorted((tmp_path / "x").iterdir())],
        sorted((tmp_path / "x").iterdir()),
    ):
        images = open_memory(data, tmp_path)
        assert images.images.dtype == expected.images.dtype
        assert np.array_equal(pixels_of(images), pixels_of(expected))


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(PIXELS[0]).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as picture:
        assert np.array_equal(pixels_of(open_memory([picture] * 2, tmp_path))[0], np.rot90(PIXELS[0], -1))


def test_pixels_that_are_no_8_bit_levels_keep_16_bits(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 2 * 8 * 8, dtype=np.float32).reshape(2, 8, 8)
    images = open_memory(values, tmp_path)
    assert images.images.dtype == np.uint16
    assert np.abs(pixels_of(images)[..., 0] / 65535 - values).max() < 1e-5
    half = open_memory(torch.from_numpy(PIXELS / 127.5 - 1).to(torch.bfloat16), tmp_path)
    assert np.abs(pixels_of(half) / np.iinfo(half.images.dtype).max * 255 - PIXELS).max() <= 1
    deep = open_memory(np.stack([DEEP_RGB, DEEP_RGB[::-1]]), tmp_path)
    assert deep.images.dtype == np.uint16
    masks = open_memory(PIXELS[..., 0] > 127, tmp_path)
    assert set(pixels_of(masks).flat) == {0, 255}


def test_unreadable_images_are_skipped_like_those_of_files(tmp_path: Path) -> None:
    def sample(row: int) -> Any:
        if row in (0, 4):
            raise OSError("truncated")
        return {"image": [PICTURES[0], None, b"no image"][row % 3], "label": 0}

    skip = {"on_bad_image": "skip", "max_bad_fraction": 0.9}
    images = open_memory(Photos(sample), tmp_path, **skip)
    assert images.bad_rows.tolist() == [0, 1, 2, 4, 5, 7, 8, 10, 11]
    assert "image 0 of train_dataset cannot be read (truncated); repair or remove it" in refusal(
        Photos(sample), tmp_path
    )


def test_the_same_content_is_the_same_data_set_in_another_type(tmp_path: Path) -> None:
    types = (PIXELS, CHANNELS_FIRST, UNIT, SIGNED, PICTURES, Photos(lambda row: SIGNED[row]))
    assert len({open_memory(data, tmp_path).digest for data in types}) == 1
    labeled = (
        (PIXELS, np.array(LABELS)),
        TensorDataset(UNIT, torch.tensor(LABELS)),
        list(zip(PICTURES, LABELS, strict=True)),
    )
    assert len({open_memory(data, tmp_path).digest for data in labeled}) == 1


def test_a_missing_image_at_another_place_is_another_data_set(tmp_path: Path) -> None:
    skip = {"on_bad_image": "skip", "max_bad_fraction": 0.5}
    for row in (0, 2, 1):
        data: list[Any] = [PICTURES[0], PICTURES[1]]
        data.insert(row, None)
        assert open_memory(data, tmp_path, **skip).bad_rows.tolist() == [row]


@pytest.mark.parametrize("with_labels", [False, True])
def test_labels_matter_only_to_a_class_conditional_network(tmp_path: Path, with_labels: bool) -> None:
    """Targets of other tasks, as boxes or masks, are no classes."""
    data = Photos(lambda row: (PICTURES[row], {"boxes": [1, 2]}))
    if with_labels:
        assert "the labels of train_dataset contain {'boxes'" in refusal(data, tmp_path, with_labels=True)
        assert (
            "train_dataset has no labels, but the network is class-conditional; pass pairs (image, label)"
            in refusal(PIXELS, tmp_path, with_labels=True)
        )
    else:
        assert open_memory(data, tmp_path).labels is None


def test_a_missing_label_and_one_that_is_no_class_are_refused_if_needed(tmp_path: Path) -> None:
    for label in (None, -1):
        data = list(zip(PICTURES, [0, label, *LABELS[2:]], strict=True))
        assert "image 1 of train_dataset has no label" in refusal(data, tmp_path, with_labels=True)
    data = Photos(lambda row: (PICTURES[row], row))
    assert "image 3 of train_dataset has label 3; every image needs one from 0 to 2" in refusal(
        data, tmp_path, with_labels=True
    )


def test_a_mode_that_datasets_converts_to_is_kept(tmp_path: Path) -> None:
    gray = hub_dataset().cast_column("image", datasets.Image(mode="L"))
    expected = np.stack([np.asarray(picture.convert("L")) for picture in PICTURES])
    assert np.array_equal(pixels_of(open_memory(gray, tmp_path, with_labels=True))[..., 0], expected)
    chosen = hub_dataset().shuffle(seed=0).select(range(5))
    assert np.array_equal(pixels_of(open_memory(chosen, tmp_path)), np.stack([np.asarray(x) for x in chosen["image"]]))


def test_columns_are_chosen_by_the_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"a": PICTURES[row], "b": PICTURES[0], "kind": LABELS[row]} for row in range(NUMBER)]
    images = open_memory(rows, tmp_path, with_labels=True, image_column="a", label_column="kind")
    assert np.array_equal(pixels_of(images), PIXELS)
    assert "data.label_column 'x' is not a column of train_dataset; it has a, b, kind." in refusal(
        rows, tmp_path, image_column="a", label_column="x"
    )
    open_memory(PICTURES, tmp_path, image_column="a")
    assert "data.image_column has no effect with train_dataset, whose samples have no columns." in caplog.text


def test_class_names_are_sorted_like_class_folders(tmp_path: Path) -> None:
    images = open_memory((PIXELS, [str(11 - row) for row in range(NUMBER)]), tmp_path, with_labels=True)
    assert images.class_names == tuple(map(str, range(12)))
    assert images.labels is not None
    assert images.labels.tolist() == list(range(11, -1, -1))


def test_classes_of_one_name_are_numbered(tmp_path: Path) -> None:
    """As in ImageNet of torchvision, where a class has several names and there are two cranes."""
    data = Photos(lambda row: (PICTURES[row], LABELS[row]))
    data.classes = [("tench", "Tinca tinca"), ("crane",), ("crane",)]  # type: ignore[list-item]
    assert open_memory(data, tmp_path).class_names == ("tench, Tinca tinca", "crane (1)", "crane (2)")


# ------------------------------------------------------------------------------------------------------------- refused

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "splits": (
        lambda: datasets.DatasetDict(train=hub_dataset(), test=hub_dataset()),
        "is a DatasetDict with the splits 'train', 'test'; pass one of them",
    ),
    "a stream": (
        lambda: hub_dataset().to_iterable_dataset(),
        "is an IterableDataset, whose images have no fixed order",
    ),
    "a generator": (lambda: (image for image in PIXELS), "is of type generator, whose images have no number"),
    "a loader": (lambda: DataLoader(TensorDataset(UNIT)), "is a DataLoader, but batches are formed by the Trainer"),
    "a path": (lambda: Path("photos"), "is the text 'photos'; set data.source to it"),
    "a picture": (lambda: PICTURES[0], "is a single image; pass a list"),
    "a table": (lambda: pandas.DataFrame({"a": [1]}), "is a DataFrame; convert it"),
    "a number": (lambda: 3, "is of type int; pass a datasets.Dataset"),
    "no images": (list, "contains no images"),
    "an empty array": (lambda: PIXELS[:0], "contains no images"),
    "an empty table": (lambda: hub_dataset().select([]), "contains no images"),
    "flat images": (lambda: PIXELS.reshape(NUMBER, -1), "has the shape (12, 144), but images are (number, height"),
    "two channels": (lambda: PIXELS[..., :2], "has the shape (12, 8, 6, 2); images are (height, width) or"),
    "0 to 255": (lambda: PIXELS.astype(np.float32), "has values from 0 to 249, but floating-point pixels must be in"),
    "not a number": (lambda: torch.full((2, 3, 8, 8), torch.nan), "has values from nan to nan"),
    "an unclear range": (lambda: UNIT - 0.1, "has values from -0.1 to 0.9"),
    "int64": (lambda: torch.from_numpy(PIXELS).long(), "has pixels of type int64, whose range is unknown"),
    "two sizes": (
        lambda: [PIXELS[0], PIXELS[1, :4]],
        "image 1 of train_dataset has 6x4 pixels, but the first image has",
    ),
    "alpha": (
        lambda: [PICTURES[0], Image.new("RGBA", (6, 8))],
        "image 1 of train_dataset has transparent pixels, but RGB is expected; set data.num_channels",
    ),
    "integer pictures": (lambda: [Image.new("I", (8, 8))], "has pixels of type int32, whose range is unknown"),
    "objects": (lambda: [object()], "image 0 of train_dataset is of type object; an image is"),
    "no image column": (lambda: [{"a": 1, "b": 2}], "has no column image, img or similar among a, b; set"),
    "other columns": (
        lambda: [{"image": PICTURES[0]}, {"img": PICTURES[0]}],
        "sample 1 of train_dataset lacks 'image'",
    ),
    "other labels": (lambda: (PIXELS, np.arange(5)), "has 12 images, but 5 labels"),
    "a random transform": (
        lambda: Photos(lambda row: torch.rand(3, 8, 8)),
        "image 0 of train_dataset is another one when it is read again, as with a random transform",
    ),
}


VALUES = np.random.default_rng(3).normal(0, 500, (4, 8, 6)).astype(np.float32)
KINDS_OF_VALUES: dict[str, Any] = {
    "array": VALUES,
    "float64": VALUES.astype(np.float64),
    "tensor": torch.from_numpy(VALUES),
    "pairs": [(value, 0) for value in VALUES],
    "pictures": [Image.fromarray(value) for value in VALUES],
    "dictionary": {"image": VALUES, "label": np.zeros(4, int)},
    "datasets": datasets.Dataset.from_dict(
        {"image": list(VALUES)}, features=datasets.Features(image=datasets.Array2D((8, 6), "float32"))
    ),
}


@pytest.mark.parametrize("kind", KINDS_OF_VALUES)
def test_values_of_a_range_are_kept(tmp_path: Path, kind: str) -> None:
    images = open_memory(KINDS_OF_VALUES[kind], tmp_path, value_range="auto")
    assert images.images.dtype == np.float32
    assert images.value_range == (VALUES.min(), VALUES.max())
    assert np.array_equal(images.take(images.positions)[0][:, 0], VALUES)


@pytest.mark.parametrize("dtype", [np.int16, np.int64])
def test_integers_of_a_range_are_kept(tmp_path: Path, dtype: type) -> None:
    images = open_memory(torch.from_numpy(VALUES.astype(dtype)), tmp_path, value_range=[-1000, 400])
    assert images.images.dtype == (np.int16 if dtype == np.int16 else np.float32)
    assert np.array_equal(images.take(images.positions)[0][:, 0], VALUES.astype(dtype))


def test_latents_in_memory_have_any_number_of_channels(tmp_path: Path) -> None:
    """The first axis of a tensor, also if the last one has as many values."""
    latents = torch.randn(3, 16, 8, 16, generator=torch.Generator().manual_seed(0)).half()
    images = open_memory(latents, tmp_path, value_range=[-6, 6], num_channels=16)
    assert images.images.dtype == np.float16
    assert np.array_equal(images.take(images.positions)[0], latents)


@pytest.mark.parametrize("kind", REFUSED)
def test_other_data_are_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    make, sentence = REFUSED[kind]
    message = refusal(make(), tmp_path)
    assert "train_dataset" in message
    assert sentence in message


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (np.ones((NUMBER, 3)), "the labels of train_dataset contain [1.0, 1.0, 1.0] (row 0); a label is"),
        ([0.5] * NUMBER, "the labels of train_dataset contain 0.5 (row 0); a label is a whole number, text, a boolean"),
        (["a"] + [1] * (NUMBER - 1), "the labels of train_dataset are numbers and text, such as 'a'; use one of them"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, labels: Any, sentence: str) -> None:
    pairs = list(zip(PICTURES, labels, strict=True))
    assert sentence in refusal(pairs, tmp_path, with_labels=True)


def test_color_with_16_bits_is_not_reduced(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encode_deep(DEEP_RGB))
    with Image.open(tmp_path / "x.png") as picture:
        assert "has 16-bit color, which Pillow reduces to 8 bits; pass the path" in refusal([picture], tmp_path)


# -------------------------------------------------------------------------------------------------------- two sets


def test_the_validation_set_may_be_in_memory_too(tmp_path: Path) -> None:
    training, validation = random_split(
        Photos(lambda row: (UNIT[row], LABELS[row])), [8, 4], torch.Generator().manual_seed(0)
    )
    config = DataConfig(source=TRAIN_DATASET, validation_split="memory:eval_dataset", cache_dir=str(tmp_path))
    options: dict[str, Any] = {"with_labels": True, "seed": 0, "device": torch.device("cpu")}
    sets = open_sets(config, train_dataset=training, eval_dataset=validation, **options)
    assert [len(images) for images in sets if isinstance(images, ImageSet)] == [8, 4]
    without_dog = [(PICTURES[2], "owl"), (PICTURES[0], "cat")]
    _, images = open_sets(config, train_dataset=training, eval_dataset=without_dog, **options)
    assert images.labels is not None
    assert images.labels.tolist() == [2, 0]
    for other, sentence in (
        (Photos(lambda row: (UNIT[row, :, :4], 0)), "eval_dataset has images of 3x4x6, but train_dataset has 3x8x6"),
        ([(PICTURES[0], "ant")] * 2, "eval_dataset has the classes ant, but train_dataset has cat, dog, owl"),
    ):
        with pytest.raises(DataError, match=sentence):
            open_sets(config, train_dataset=training, eval_dataset=other, **options)
    with pytest.raises(DataError, match="train_dataset contains a single training image"):
        open_sets(replace(config, validation_split=None), train_dataset=Subset(training, [0]), **options)


def test_another_process_uses_the_cache_or_checks_its_own_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(source=TRAIN_DATASET, cache_dir=str(tmp_path))
    cached = open_images(config, with_labels=False, dataset=PICTURES)
    monkeypatch.setattr(cache_module, "_build", lambda *_: pytest.fail("decoded again"))
    found = open_images(config, with_labels=False, dataset=object(), location=cached.location)
    assert np.array_equal(pixels_of(found), PIXELS)
    direct = open_images(config, with_labels=False, dataset=PIXELS)
    assert (
        open_images(config, with_labels=False, dataset=PIXELS.copy(), location=direct.location).digest == direct.digest
    )
    with pytest.raises(DataError, match="train_dataset has other images or labels here than on rank 0"):
        open_images(config, with_labels=False, dataset=PIXELS[::-1], location=direct.location)


def test_a_column_of_splits_in_memory_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All rows of a dataset that was passed are used."""
    rows = {"image": [{"bytes": encode(RGB), "path": None}] * 2, "split": ["train", "val"]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    config = DataConfig(source=TRAIN_DATASET, cache_dir=str(tmp_path))
    assert len(open_images(config, with_labels=False, dataset=dataset)) == 2
    assert "contains splits, but all rows are used" in caplog.text
