"""`ddpm-hf data` describes what training would read, and refuses what training would refuse."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.cli.main import main
from ddpm_hf.config import DataConfig
from ddpm_hf.data import Augmentation, DataError, ImageLoader, ImageSet, open_sets, summarize
from tests.conftest import DIGITS
from tests.unit.data.helpers import RANDOM, RGB, encode, write_files


def show(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    """Return the exit code and the output."""
    code = main(["data", *arguments, "--data.cache_dir", str(tmp_path / "cache"), "--picture", str(tmp_path / "x.png")])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_a_dataset_is_described_in_lines_and_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, output, _ = show(capsys, tmp_path, str(DIGITS), "--data.validation_fraction", "0.1")
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in output.splitlines())
    (folder,) = (tmp_path / "cache").iterdir()
    size = sum(file.stat().st_size for file in folder.iterdir() if file.name != "meta.json")
    assert lines == {
        "source": f"{DIGITS} (dataset, split train)",
        "images": "1,797",
        "sizes": "all 8x8",
        "modes": "L (1,797)",
        "bad": "none",
        "pixels": "values from 0 to 255 of 0 to 255",
        "network": "sees 1x8x8 (channels, height, width)",
        "cache": f"{size / 1000:.1f} kB in {folder}",
        "classes": "10: 0 (178), 1 (182), 2 (177), 3 (183), 4 (181), 5 (182), 6 (181), 7 (179), 8 (174), 9 (180)",
        "training": "1,617 images, 180 for validation",
        "picture": f"the first 64 samples of a run are in {tmp_path / 'x.png'}",
    }
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (8 * 64 + 9 * 4, 8 * 64 + 9 * 4)


def test_unusual_images_are_counted(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    files = {"cat/1.png": RGB, "cat/2.png": RGB[:4], "dog/1.png": RGB[..., 0], "dog/2.png": RGB[:, :4]}
    encoded = {name: encode(pixels) for name, pixels in files.items()}
    encoded |= {"dog/3.png": b"text", "cat/4.png": b"", "cat/notes.txt": b"", "photo.psd": b""}
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    encoded["dog/4.gif"] = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    folder = write_files(tmp_path / "pets", encoded)
    code, output, errors = show(capsys, tmp_path, str(folder), "--data.resolution", "4")
    assert code == 2
    for line in (
        "images    7",
        "sizes     3 from 4x4 to 5x6, the most frequent 5x6 (3), 5x4 (1), 4x6 (1)",
        "modes     RGB (3), L (1), P (1)",
        "animated  1 image with several frames (only the first is used)",
        "ignored   2 files (not an image, hidden, a link, in no split or table): cat/notes.txt, photo.psd",
        "bad       2 cannot be read",
        f"          image 2 of {folder} (cat/4.png) is empty (0 bytes).",
        f"          image 5 of {folder} (dog/3.png) cannot be decoded (it is not an image in a supported format).",
        "classes   2: cat (2), dog (5)",
    ):
        assert line in output.splitlines()
    assert f"error: image 2 of {folder} (cat/4.png) is empty (0 bytes); repair or remove it, or set" in errors
    assert "replaced" not in output + caplog.text, "no image is replaced in a refused dataset"
    skipping = ("--data.on_bad_image", "skip", "--data.max_bad_fraction", "0.3")
    code, output, errors = show(capsys, tmp_path, str(folder), "--data.resolution", "4", *skipping)
    assert (code, errors) == (0, "")
    assert "training  7 images, 0 for validation, 2 unreadable images replaced" in output


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_arrays_are_described_too(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    pixels = RANDOM.integers(100, 4000, (5, 8, 9, 1), dtype=np.uint16)
    np.save(tmp_path / name, pixels) if name == "x.npy" else np.savez(tmp_path / name, images=pixels)
    code, output, _ = show(capsys, tmp_path, str(tmp_path / name))
    assert code == 0
    assert f"pixels    values from {pixels.min()} to {pixels.max()} of 0 to 65535" in output
    _, in_range, _ = show(capsys, tmp_path, str(tmp_path / name), "--data.value_range", "auto")
    ends = f"{pixels.min()} becomes -1 and {pixels.max()} becomes 1, as found in the data"
    assert f"pixels    values from {pixels.min()} to {pixels.max()}; {ends}" in in_range
    assert "sizes     all 9x8" in output
    assert "network   sees 1x8x9 (channels, height, width)" in output


def test_four_channels_with_a_value_range_are_drawn_as_planes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", RANDOM.standard_normal((3, 4, 8, 8)).astype(np.float32))
    show(capsys, tmp_path, str(tmp_path / "x.npy"), "--data.value_range", "[-4, 4]")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 2 * picture.height


def test_the_samples_are_the_first_ones_of_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Flipped as in training: an image with a white half appears in both orientations."""
    half = np.zeros((8, 8), np.uint8)
    half[:, :4] = 255
    folder = write_files(tmp_path / "x", {"a.png": encode(half), "b.png": encode(half)})
    show(capsys, tmp_path, str(folder), "--data.random_flip", "true")
    with Image.open(tmp_path / "x.png") as picture:
        tiles = np.asarray(picture)[4 + 32 :: 68, 4 + 8 :: 68, 0]
    assert set(np.unique(tiles)) == {0, 255}
    assert 16 < (tiles == 255).sum() < 48


@pytest.mark.parametrize("source", ["x.npy", "folder"])
def test_the_samples_are_the_first_ones_of_a_run_with_validation(tmp_path: Path, source: str) -> None:
    """In the same order, and without validation images."""
    pixels = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.full((1, 4, 4, 1), 12, np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    write_files(tmp_path / "folder", {f"{n:02}.png": encode(image[..., 0]) for n, image in enumerate(pixels)})
    config = DataConfig(source=str(tmp_path / source), validation_fraction=0.4, cache_dir=str(tmp_path / "cache"))
    cpu = torch.device("cpu")
    training, _ = open_sets(config, with_labels=False, seed=3, device=cpu)
    assert isinstance(training, ImageSet)
    samples, _ = ImageLoader(training, config, 3, cpu).samples(0, 30)
    shown = summarize(config, with_labels=False, seed=3, num_samples=30).samples
    assert np.array_equal(shown, ((samples + 1) * 127.5).round().numpy().transpose(0, 2, 3, 1))


def test_the_samples_are_augmented_as_in_a_run(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 6, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    config = DataConfig(source=str(tmp_path / "x.npy"), augmentation=0.5, augmentation_transforms=["xflip", "scale"])
    images, _ = open_sets(config, with_labels=False, seed=3, device=torch.device("cpu"))
    assert isinstance(images, ImageSet)
    samples, _ = ImageLoader(images, config, 3, torch.device("cpu")).samples(0, 30)
    expected, _ = Augmentation(config, (3, 4, 6), 3)(samples, 0)
    summary = summarize(config, with_labels=False, seed=3, num_samples=30)
    assert "augmented scale with probability 0.5; xflip with 0.5" in summary.lines
    assert np.array_equal(summary.samples, ((expected + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy())
    refused = dataclasses.replace(config, augmentation_transforms=["rotate_int"])
    problem = summarize(refused, with_labels=False, seed=3, num_samples=30).problem
    assert problem is not None and "rotate_int needs square images" in problem


def test_data_that_training_would_refuse_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one = write_files(tmp_path / "x", {"a.png": encode(RGB)})
    for arguments, sentence in (
        ((str(one),), "contains a single training image"),
        ((str(tmp_path / "missing.zip"),), "does not exist; check the path"),
        ((str(DIGITS), "--data.num_channels", "x"), "data.num_channels is x, but must be a whole number or null"),
        ((), "data.source is not set"),
    ):
        code, _, errors = show(capsys, tmp_path, *arguments)
        assert code == 2
        assert sentence in errors


def test_missing_labels_are_reported_if_training_needs_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Also of a stream."""
    folder = write_files(tmp_path / "x", {"a.png": encode(RGB), "cat/1.png": encode(RGB)})
    pixels = write_files(tmp_path / "flat", {"a.png": encode(RGB), "b.png": encode(RGB)})
    streamed = ("--data.streaming", "true", "--data.resolution", "4", "--data.num_channels", "3")
    for source, sentence in ((folder, f"image 0 of {folder} (a.png) has no label"), (pixels, "has no labels, but the")):
        assert show(capsys, tmp_path, str(source))[0] == 0
        code, output, errors = show(capsys, tmp_path, str(source), "--model.class_conditional", "true")
        assert code == 2
        assert sentence in errors
        assert "images    2" in output, "the description is printed nevertheless"
    code, _, errors = show(capsys, tmp_path, str(pixels), *streamed, "--model.class_conditional", "true")
    assert code == 2
    assert "has no class names" in errors


def test_a_source_must_not_be_given_twice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The command line overrides the source of a recipe, but two sources on the command line are an error."""
    (tmp_path / "recipe.yaml").write_text("data: {source: elsewhere}")
    assert show(capsys, tmp_path, str(DIGITS), "--config", str(tmp_path / "recipe.yaml"))[0] == 0
    for flag in (("--data.source", "elsewhere"), ("--data.source=elsewhere",)):
        code, _, errors = show(capsys, tmp_path, str(DIGITS), *flag)
        assert code == 2
        assert f"data.source is elsewhere, but SOURCE {DIGITS} is also given" in errors


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        ("x.txt", "has no image format that can be written; use .png."),
        ("missing/x.png", "cannot be written: there is no folder"),
        (".", "is a folder; add the name of a .png file."),
    ],
)
def test_the_picture_path_is_checked_before_decoding(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, picture: str, sentence: str
) -> None:
    arguments = [str(DIGITS), "--data.cache_dir", str(tmp_path / "cache"), "--picture", str(tmp_path / picture)]
    assert main(["data", *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_line_breaks_in_class_names_are_removed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, output, _ = show(
        capsys, tmp_path, str(write_files(tmp_path / "x", {f"a\nb/{n}.png": encode(RGB) for n in "12"}))
    )
    assert "classes   1: a b (2)" in output.splitlines()


def test_single_files_and_images_are_counted_in_the_singular(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One bad image without a class, one ignored file, and two good images."""
    files = {"a.png": b"", "cat/1.png": encode(RGB), "cat/2.png": encode(RGB), "cat/x.txt": b""}
    folder = write_files(tmp_path / "x", files)
    skipping = ("--data.on_bad_image", "skip", "--data.max_bad_fraction", "0.5")
    _, output, errors = show(capsys, tmp_path, str(folder), *skipping)
    for line in (
        "ignored   1 file (not an image, hidden, a link, in no split or table): cat/x.txt",
        "training  3 images, 0 for validation, 1 unreadable image replaced",
    ):
        assert line in output.splitlines(), output
    assert errors == ""


def test_the_help_names_the_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["data", "--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert "ddpm-hf data photos/ --data.resolution 64" in output
    assert "--data.crop_before_resize" in output


def test_a_reason_is_given_if_no_image_can_be_read(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "x", {"1.png": b"junk", "2.png": b"junk"})
    config = DataConfig(source=str(folder), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError) as caught:
        summarize(config, with_labels=False, seed=0, num_samples=1)
    assert str(caught.value) == (
        f"none of the 2 images of {folder} can be read; the first: image 0 of {folder} (1.png) cannot be decoded (it "
        "is not an image in a supported format)."
    )


def test_a_warning_is_printed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 8, 8), np.uint8) + 200, labels=[3, 7, 3, 7])
    config = DataConfig(source=str(tmp_path / "x.npz"), cache_dir=str(tmp_path / "cache"))
    summary = summarize(config, with_labels=True, seed=0, num_samples=1)
    assert "classes   2: 3 (2), 7 (2)" in summary.lines
    assert len([line for line in caplog.messages if "classes are numbered" in line]) == 1
