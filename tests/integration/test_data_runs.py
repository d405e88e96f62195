"""Training runs on every kind of data source, on changed data, on streams, and on invalid data."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from ddpm_hf.cli.main import evaluate, train
from ddpm_hf.data import cache, folders
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.training.checkpoint import DataState
from tests.conftest import DIGITS, run_arguments
from tests.runs import (
    EVERYTHING_RANDOM,
    assert_same_run,
    metrics_of,
    stop_with_signal_after,
    tensors_of,
)
from tests.unit.data.helpers import encode, encode_deep, write_files, write_parquet


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, list[int]]:
    """Return the first hundred digits, sorted by class like a folder."""
    table = datasets.load_dataset("parquet", data_files=str(DIGITS), split="train[:100]").with_format("numpy")
    order = np.argsort(table["label"], kind="stable")
    return np.stack(table["image"])[order], np.asarray(table["label"])[order].tolist()


def store(folder: Path, kind: str, images: np.ndarray, labels: list[int]) -> Path:
    """Write digits as a source of the given kind."""
    pairs = enumerate(zip(images, labels, strict=True))
    files = {f"{label}/{number:03}.png": encode(image) for number, (image, label) in pairs}
    if kind == "parquet":
        feature = datasets.ClassLabel(names=list("0123456789"))
        return write_parquet(folder / "x.parquet", list(files.values()), labels, feature)
    if kind == "npz":
        np.savez(folder / "x.npz", images=images, labels=np.asarray(labels))
        return folder / "x.npz"
    write_files(folder / "x", files)
    return folder / "x"


def test_the_same_images_train_the_same_network_from_every_format(
    tmp_path: Path, digits: tuple[np.ndarray, list[int]]
) -> None:
    """Bit for bit: order, flips and labels depend only on the images."""
    runs = []
    for kind in ("folder", "parquet", "npz"):
        (tmp_path / kind).mkdir()
        source = store(tmp_path / kind, kind, *digits)
        runs.append(tmp_path / f"run_{kind}")
        assert train(run_arguments(runs[-1], **EVERYTHING_RANDOM, data__source=source)) == 0
    for run in runs[1:]:
        assert_same_run(runs[0], run, 6)


def test_16_bit_images_train_a_network(tmp_path: Path, digits: tuple[np.ndarray, list[int]]) -> None:
    """Scaled from 8 bits they are the same images, so the first loss is the same to the rounding of float32."""
    images, labels = digits
    for bits in (8, 16):
        encoded = [encode(image) if bits == 8 else encode_deep(image.astype(np.uint16) * 257) for image in images]
        pairs = enumerate(zip(encoded, labels, strict=True))
        files = {f"{label}/{number:03}.png": data for number, (data, label) in pairs}
        folder = write_files(tmp_path / str(bits), files)
        assert train(run_arguments(tmp_path / f"run_{bits}", data__source=folder)) == 0
    losses = [metrics_of(tmp_path / f"run_{bits}")[0]["loss"] for bits in (8, 16)]
    assert abs(losses[0] - losses[1]) < 1e-6


def test_images_of_different_sizes_train_a_network_on_random_crops(tmp_path: Path) -> None:
    shapes = [(8, 12), (9, 9), (20, 10)] * 4
    random = np.random.default_rng(0)
    files = {f"{n}.png": encode(random.integers(0, 256, shape, dtype=np.uint8)) for n, shape in enumerate(shapes)}
    crops = {"data__resolution": 8, "data__crop": "random", "data__random_flip": True}
    folder = write_files(tmp_path / "x", files)
    arguments = run_arguments(tmp_path / "run", data__source=folder, model__class_conditional=False, **crops)
    assert train(arguments) == 0
    assert np.isfinite([row["loss"] for row in metrics_of(tmp_path / "run")]).all()


def test_values_of_a_range_train_the_network_of_the_same_pictures(
    tmp_path: Path, digits: tuple[np.ndarray, list[int]]
) -> None:
    """Stored as float32; the range is in the pipeline of the run and of its checkpoint."""
    images, labels = digits
    np.savez(tmp_path / "8.npz", images=images, labels=labels)
    np.savez(tmp_path / "x.npz", images=images.astype(np.float32) * 4 - 1000, labels=labels)
    cache_dir = {"data__cache_dir": tmp_path / "cache", "training__num_steps": 2}
    for name, settings in {"8": cache_dir, "x": cache_dir | {"data__value_range": "auto"}}.items():
        assert train(run_arguments(tmp_path / name, **settings, data__source=tmp_path / f"{name}.npz")) == 0
    losses = [[row["loss"] for row in metrics_of(tmp_path / name) if "loss" in row] for name in ("8", "x")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    checkpoint = tmp_path / "x" / "checkpoints" / "step_00000002"
    value_range = [images.min() * 4.0 - 1000, images.max() * 4.0 - 1000]
    for folder in (tmp_path / "x" / "pipeline", checkpoint):
        assert GaussianDiffusionPipeline.from_pretrained(folder).config.value_range == value_range
    longer = settings | {"training__num_steps": 4}
    assert train(run_arguments(tmp_path / "x", **longer, data__source=tmp_path / "x.npz")) == 0, "it continues"


# --------------------------------------------------------------------------------------------- data that have changed


def test_a_run_does_not_continue_on_changed_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The number of images stays the same."""
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    source = write_files(tmp_path / "x", {f"{number}.png": encode(image) for number, image in enumerate(images)})
    changes = {"data__source": source, "model__class_conditional": False}
    assert train(run_arguments(tmp_path / "run", **changes)) == 0
    before = tensors_of(tmp_path / "run" / "checkpoints" / "step_00000006")
    (source / "5.png").write_bytes(encode(255 - images[5]))
    assert train(run_arguments(tmp_path / "run", **changes, training__num_steps=8)) == 2
    error = capsys.readouterr().err
    assert str(source) in error
    assert "restore the data, or choose another training.output_dir" in error
    (source / "5.png").write_bytes(encode(images[5]))
    assert train(run_arguments(tmp_path / "run", **changes, training__num_steps=8)) == 0
    assert before.keys() == tensors_of(tmp_path / "run" / "checkpoints" / "step_00000008").keys()


def test_a_run_continues_without_its_cache(tmp_path: Path) -> None:
    """And with rewritten image files, as on another machine: only the content counts."""
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    changes: dict[str, Any] = {"data__source": tmp_path / "x", "model__class_conditional": False}
    for num_steps in (4, 6):
        write_files(tmp_path / "x", {f"{number}.png": encode(image) for number, image in enumerate(images)})
        changes["data__cache_dir"] = tmp_path / f"cache_{num_steps}"
        assert train(run_arguments(tmp_path / "run", **changes, training__num_steps=num_steps)) == 0
    assert train(run_arguments(tmp_path / "whole", **changes)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run", 6)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_of_0_1_keeps_the_order_of_its_classes(tmp_path: Path, streaming: bool) -> None:
    """Which was that of their names as text."""
    random = np.random.default_rng(0)
    files = {f"{number}/1.png": encode(random.integers(0, 256, (8, 8), dtype=np.uint8)) for number in range(12)}
    source = write_files(tmp_path / "x", files)
    changes: dict[str, Any] = {"data__source": source}
    if streaming:
        changes |= {"data__streaming": True, "data__resolution": 8, "data__num_channels": 1}

    def as_0_1(folder: str, num_steps: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folders, "sort_classes", sorted)
            state_dict = DataState.state_dict
            patch.setattr(
                DataState,
                "state_dict",
                lambda state: {key: value for key, value in state_dict(state).items() if key != "class_order"},
            )
            assert train(run_arguments(tmp_path / folder, **changes, training__num_steps=num_steps)) == 0

    as_0_1("whole", 6)
    as_0_1("run", 2)
    for num_steps in (4, 6):
        assert train(run_arguments(tmp_path / "run", **changes, training__num_steps=num_steps)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run", 6)
    names = json.loads((tmp_path / "run/pipeline/model_index.json").read_text())["class_names"]
    assert [names[str(number)] for number in range(5)] == ["0", "1", "10", "11", "2"]
    # An evaluation of its pipeline keeps it too: labels are the names of its classes.
    names = sorted(map(str, range(12)))
    pixels = [np.asarray(Image.open(source / name / "1.png")) for name in names]
    np.savez(tmp_path / "x.npz", images=np.stack(pixels), labels=np.array(names, np.int64))
    values = []
    for data in (source, tmp_path / "x.npz"):
        bound = ["--metrics", "bits_per_dim", "--num_terms", "2", "--num_samples", "1", "--num_inference_steps", "1"]
        output = tmp_path / f"evaluation_{data.name}"
        assert evaluate([str(tmp_path / "run"), "--data", str(data), "--output", str(output), *bound]) == 0
        values += [row["value"] for row in json.loads((output / "evaluation.json").read_text())["metrics"]]
    assert values[0] == values[1]
    assert train(run_arguments(tmp_path / "new", **changes)) == 0
    names = json.loads((tmp_path / "new/pipeline/model_index.json").read_text())["class_names"]
    assert names == {str(number): str(number) for number in range(12)}


# ------------------------------------------------------------------------------------------------------- streaming

STREAMED = {
    "data__streaming": True,
    "data__resolution": 8,
    "data__num_channels": 1,
    "data__shuffle_buffer_size": 16,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, list[int]]) -> Path:
    """Return the digits in four parquet files."""
    folder, (images, labels) = tmp_path_factory.mktemp("shards"), digits
    feature = datasets.ClassLabel(names=list("0123456789"))
    for number in range(4):
        part = slice(25 * number, 25 * (number + 1))
        encoded = [encode(image) for image in images[part]]
        write_parquet(folder / f"train-{number:05}-of-00004.parquet", encoded, labels[part], feature)
    return folder


@pytest.mark.parametrize("prefetch_factor", [0, 2])
def test_a_stopped_streamed_run_continues_bit_exactly(
    tmp_path: Path, shards: Path, prefetch_factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each epoch has 100 images and each step 8, so step 13 ends an epoch.

    A checkpoint has the position of the images that were trained on, not of those that were read ahead.
    """
    changes = EVERYTHING_RANDOM | STREAMED | {"data__source": shards, "training__num_steps": 15}
    changes["objective__immiscible_noise"] = False  # needs images of other processes, which a stream does not have
    if prefetch_factor:
        changes["objective__timestep_sampling"] = "antithetic"  # loss-aware timesteps are not prepared ahead
    assert train(run_arguments(tmp_path / "whole", **changes)) == 0
    changes["training__prefetch_factor"] = prefetch_factor
    with monkeypatch.context() as patch:
        stop_with_signal_after(5, patch)
        assert train(run_arguments(tmp_path / "run", **changes)) == 143
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    assert train(run_arguments(tmp_path / "run", **changes)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run", 15)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000015" / "trainer_state.json").read_text())
    assert [stream["num_used"] for stream in state["streams"]] == [120]
    assert state["streams"][0]["epoch"] == 1


def test_a_streamed_run_validates_on_its_validation_split(tmp_path: Path, shards: Path, digits: Any) -> None:
    """The validation split is decoded to the cache."""
    images, labels = digits
    folder = shutil.copytree(shards, tmp_path / "x")
    feature = datasets.ClassLabel(names=list("0123456789"))
    write_parquet(
        folder / "test-00000-of-00001.parquet", [encode(image) for image in images[::9]], labels[::9], feature
    )
    changes = STREAMED | {
        "data__source": folder,
        "data__validation_split": "test",
        "data__validation_fraction": 0.0,
        "training__validate_every_steps": 3,
    }
    assert train(run_arguments(tmp_path / "run", **changes)) == 0
    losses = [row["validation_loss"] for row in metrics_of(tmp_path / "run") if "validation_loss" in row]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("prefetch_factor", [0, 2])
def test_an_unreadable_image_stops_the_step_that_needs_it(
    tmp_path: Path, digits: Any, prefetch_factor: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Image 20 belongs to step 3; the checkpoint of step 2 is written before."""
    images, labels = digits
    encoded = [encode(image) for image in images[:40]]
    encoded[20] = b"text"
    feature = datasets.ClassLabel(names=list("0123456789"))
    write_parquet(tmp_path / "x" / "train-00000-of-00001.parquet", encoded, labels[:40], feature)
    changes = STREAMED | {"data__source": tmp_path / "x", "data__shuffle_buffer_size": 1}
    capsys.readouterr()  # what writing the dataset printed
    assert train(run_arguments(tmp_path / "run", **changes, training__prefetch_factor=prefetch_factor)) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert error.startswith("error: row 20 of train-00000-of-00001.parquet of the stream of ")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


# ------------------------------------------------------------------------------------------------------- bad input


def bad_input(tmp_path: Path, kind: str) -> tuple[Path, dict[str, object], str]:
    """Return a dataset that cannot be used for training, settings, and the beginning of the message."""
    image = encode(np.zeros((8, 8), np.uint8))
    folder, table = tmp_path / "x", tmp_path / "x.parquet"
    match kind:
        case "no images":
            return write_files(folder, {"notes.txt": b""}), {}, f"{folder} contains no images (split 'train')"
        case "one image":
            return write_files(folder, {"cat/a.png": image}), {}, f"{folder} contains a single training image"
        case "a column that is not images":
            write_parquet(table, [image] * 2, [0, 1])
            return table, {"data__image_column": "label"}, f"column 'label' of {table} contains ClassLabel"
        case "a column of other bytes":
            datasets.Dataset.from_dict({"text": [b"a", b"b"], "label": [0, 1]}).to_parquet(table)
            return table, {}, f"image 0 of {table} cannot be decoded (it is not an image in a supported format)"
        case "labels missing":
            write_parquet(table, [image] * 3, [0, None, 1])
            return table, {}, f"image 1 of {table} has no label; every image needs one from 0 to 1."
        case "no labels":
            return write_files(folder, {"a.png": image, "b.png": image}), {}, f"{folder} has no labels, but the network"
        case "labels that are no classes":
            write_parquet(table, [image] * 2, [0.5, 1.0], datasets.Value("float64"))
            return table, {}, f"the labels in column 'label' of {table} contain 0.5 (row 0); a label is a whole number,"
        case "sizes that cannot be batched":
            wide = encode(np.zeros((8, 9), np.uint8))
            folder = write_files(folder, {"cat/a.png": image, "dog/b.png": wide})
            return folder, {}, f"image 1 of {folder} (dog/b.png) has 9x8 pixels, but the first image has 8x8; set data."
        case "more channels than asked":
            red = encode(Image.new("RGB", (8, 8), "red"))
            folder = write_files(folder, {"cat/a.png": image, "dog/b.png": red})
            return folder, {"data__num_channels": 1}, f"image 1 of {folder} (dog/b.png) is a color image, but gray (L)"
        case "no space":
            return (
                write_files(folder, {"cat/a.png": image, "dog/b.png": image}),
                {},
                "the 2 decoded images need 128 B",
            )
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "no images", "one image", "a column that is not images", "a column of other bytes", "labels missing",
        "no labels", "labels that are no classes", "sizes that cannot be batched", "more channels than asked",
        "no space",
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, settings, sentence = bad_input(tmp_path, kind)
    if kind == "no space":
        usage = shutil.disk_usage(tmp_path)._replace(free=100)
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    capsys.readouterr()  # what writing the dataset printed
    assert train(run_arguments(tmp_path / "run", data__source=source, **settings)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {sentence}"), line
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("[!.]*")), "no run was started"
