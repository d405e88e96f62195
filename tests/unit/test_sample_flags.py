"""`ddpm-hf sample` before it needs a model: its flags, the pictures that it draws, its folder, and given images."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.cli import main
from ddpm_hf.cli.common import find_folder
from ddpm_hf.cli.sample import PictureFolder, fit, parse, read_images, to_mask
from ddpm_hf.config import ConfigError
from ddpm_hf.diffusion.pipeline import label_numbers
from ddpm_hf.evaluation.generate import Film
from tests.conftest import REPOSITORY

GRAY = (8, 8, 1)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--mask m.png", "--mask is given without --image; give --image too"),
        ("--strength 0.5", "--strength is given without --image"),
        ("--image i.png --num_resamples 3", "--num_resamples is given without --mask"),
        ("--image i.png --jump_length 3", "--jump_length is given without --mask"),
        ("--image i.png --mask m.png --strength 0.5", "--strength and --mask do not go together"),
        ("--image i.png j.png k.png --mask m.png n.png", "--mask names 2 files for 3 images"),
        ("--image i.png --strip", "--strip and --image do not go together"),
        ("--image i.png --animation", "--animation and --image do not go together"),
        ("--image i.png --scheduler DDIMScheduler", "--image needs GaussianDiffusionScheduler"),
        ("--variance analytic --scheduler DDIMScheduler", "--variance analytic needs GaussianDiffusionScheduler"),
        ("--seeds 1,2 --seed 1", "--seeds and --seed do not go together"),
        ("--seeds 1,2 --seed 0", "--seeds and --seed do not go together"),
        ("--seeds 1,2 --num_images 2", "--seeds and --num_images do not go together"),
        ("--guidance_rescale 0.5", "--guidance_rescale corrects guidance, and --guidance_scale is 1"),
        ("--strength 0 --image i.png", "--strength is 0.0, but must be above 0"),
        ("--eta 1.5", "--eta is 1.5, but must be 0 to 1."),
        ("--eta nan", "--eta is nan, but must be 0 to 1."),
        ("--batch_size 0", "--batch_size is 0, but must be at least 1."),
        ("--guidance_scale -1", "--guidance_scale is -1.0"),
        ("--guidance_scale nan", "--guidance_scale is nan"),
        ("--seed -1", "--seed is -1, but must be 0 to 18446744073709551615."),
        ("--seed 18446744073709551615 --num_images 2", "goes beyond the largest seed"),
        ("--seeds 3,4,3", "--seeds has 3 twice"),
        ("--seeds 0-5,5", "--seeds has 5 twice"),
        ("--seeds 5-3", "--seeds has '5-3'; a range goes upwards"),
        ("--seeds 0-99999999999", "at most 1,000,000 seeds"),
        ("--seeds 1,,2", "--seeds has ''; give whole numbers"),
        ("--seeds cat", "--seeds has 'cat'; give whole numbers"),
    ],
)
def test_flags_that_contradict_each_other_are_refused_before_anything_is_read(
    capsys: pytest.CaptureFixture[str], flags: str, sentence: str
) -> None:
    """The model and the images do not exist: a later complaint would be about them."""
    assert main.main(["sample", "./nowhere", *flags.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert sentence in line


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--variance analytic --scheduler DDIMScheduler", "--variance analytic needs GaussianDiffusionScheduler"),
        ("--guidance_rescale 0.5", "--guidance_rescale corrects guidance, and --guidance_scale is 1"),
        ("--guidance_scale nan", "--guidance_scale is nan"),
        ("--eta 7", "--eta is 7.0, but must be 0 to 1."),
        ("--batch_size 0", "--batch_size is 0, but must be at least 1."),
    ],
)
def test_evaluate_refuses_the_same_flags_of_drawing(
    capsys: pytest.CaptureFixture[str], flags: str, sentence: str
) -> None:
    for command in (["sample", "./nowhere"], ["evaluate", "./nowhere", "--data", "./nothing"]):
        assert main.main([*command, *flags.split()]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "seeds"),
    [
        ("--seeds 9,7,8", [9, 7, 8]),
        ("--seeds 0-3,9,5-6", [0, 1, 2, 3, 9, 5, 6]),
        ("--seed 3 --num_images 2", [3, 4]),
        ("--num_images 2", [0, 1]),
        ("", list(range(16))),
        ("--image i.png", [0]),
        ("--seeds 18446744073709551615", [2**64 - 1]),
    ],
)
def test_seeds_are_lists_and_ranges_in_the_order_given(flags: str, seeds: list[int]) -> None:
    assert parse(["user/model", *flags.split()]).seeds == seeds


def test_help_needs_no_torch_and_shows_examples() -> None:
    code = (
        "import sys\nfrom ddpm_hf.cli import main as cli\ntry: cli.main(['sample', '--help'])\n"
        "finally: print({'torch', 'diffusers', 'datasets'} & sys.modules.keys(), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count("\n  ddpm-hf sample ") == 5
    assert done.stderr == "set()\n"


# ------------------------------------------------------------------------------------------------------------ the model


def test_a_run_folder_stands_for_the_pipeline_in_it(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").touch()
    assert find_folder(str(tmp_path)) == find_folder(str(tmp_path / "pipeline")) == tmp_path / "pipeline"
    assert find_folder("google/ddpm-cifar10-32") is None
    assert find_folder("gpt2.5-model_x") is None


@pytest.mark.parametrize("name", ["./nowhere", "outputs/digits/pipeline", "user/no thing", "/nowhere", "~/nowhere"])
def test_a_name_that_is_neither_folder_nor_repository_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the repository may have an outputs/digits
    with pytest.raises(ConfigError, match="is no folder of this machine, and no repository of the Hub is called so"):
        find_folder(name)


@pytest.mark.parametrize(
    ("label", "question"),
    [
        ("golfish", " (did you mean 'Goldfish'?)"),
        ("shark", " (did you mean 'Shark, white'?)"),
        ("x", ""),
        (4, ""),
    ],
)
def test_an_unknown_label_is_answered_with_the_nearest_name(label: str | int, question: str) -> None:
    with pytest.raises(ValueError, match="class_labels has") as refusal:
        label_numbers(label, 1, 3, False, {"0": "Goldfish", "1": "Shark, white", "2": "4"})
    assert str(refusal.value).startswith(f"class_labels has {label!r}{question}; a label is a number 0 to 2, or a name")


# ----------------------------------------------------------------------------------------------------------- the folder


def write_one(path: Path, overwrites: bool, name: str = "seed_000000.png", value: int = 0) -> None:
    folder = PictureFolder(path, overwrites)
    folder.begin({"seed": 0}, [name])
    folder.write_pixels(name, np.full((8, 8, 1), value, np.uint8))
    folder.finish()


def test_a_folder_with_anything_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").touch()
    with pytest.raises(ConfigError, match="is not empty; choose another folder, or give --overwrite"):
        PictureFolder(tmp_path, overwrites=False)
    with pytest.raises(ConfigError, match="holds something else than the pictures of an earlier call"):
        PictureFolder(tmp_path, overwrites=True)
    with pytest.raises(ConfigError, match="is a file"):
        PictureFolder(tmp_path / "holiday.png", overwrites=True)


def test_overwriting_replaces_the_files_of_the_earlier_call_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "samples"
    write_one(path, False)
    (path / "mine.txt").write_text("keep")
    write_one(path, True, "seed_000001.png", 9)
    assert sorted(file.name for file in path.iterdir()) == ["mine.txt", "seed_000001.png", "settings.json"]
    content = json.loads((path / "settings.json").read_text())
    assert content == {"schema_version": 1, "finished": True, "seed": 0, "files": ["seed_000001.png"]}
    assert np.asarray(Image.open(path / "seed_000001.png")).max() == 9


def test_a_file_of_another_origin_is_not_overwritten_whatever_its_name(tmp_path: Path) -> None:
    write_one(tmp_path, False)
    (tmp_path / "grid.png").write_text("painted by hand")
    with pytest.raises(ConfigError, match=r"grid\.png is in the way and not of an earlier call"):
        write_one(tmp_path, True, "grid.png")
    assert (tmp_path / "grid.png").read_text() == "painted by hand"
    assert (tmp_path / "seed_000000.png").exists()


def test_settings_that_name_files_elsewhere_remove_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "mine.txt").touch()
    names = ["../mine.txt", str(tmp_path / "mine.txt")]
    (tmp_path / "samples" / "settings.json").write_text(json.dumps({"files": names}))
    write_one(tmp_path / "samples", True)
    assert (tmp_path / "mine.txt").exists()


def test_a_write_that_fails_leaves_neither_file_nor_part_of_it(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path, False)

    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.write("grid.png", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_film_of_many_steps_keeps_states_evenly_spaced_and_the_last() -> None:
    """To half a gray level, the rounding; the noise itself is not shown to a callback, and is missing here."""
    film = Film(100)
    for step in range(100):
        film(None, step, None, {"sample": torch.full((2, 1, 8, 8), (step + 1) / 50 - 1)})
    states = film.states()
    assert states.shape == (39, 2, 8, 8, 1)
    levels = [round(frame * 100 / 39) for frame in range(1, 40)]
    np.testing.assert_allclose(states[:, 0, 0, 0, 0], [2.55 * level for level in levels], atol=0.51, rtol=0)


# --------------------------------------------------------------------------------------------------------- given images


def test_images_of_8_and_16_bits_and_arrays_are_read_exactly(tmp_path: Path) -> None:
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    Image.fromarray(deep).save(tmp_path / "deep.png")
    flat = (deep // 257).astype(np.uint8)
    Image.fromarray(flat).save(tmp_path / "flat.png")
    many = np.random.default_rng(0).random((8, 8, 5)).astype(np.float32)
    np.save(tmp_path / "many.npy", many)
    np.save(tmp_path / "flat.npy", flat)
    paths = [tmp_path / name for name in ("deep.png", "flat.png", "many.npy", "flat.npy")]
    read = read_images(paths)
    np.testing.assert_array_equal(read[0][..., 0], (deep / 65535).astype(np.float32))
    np.testing.assert_array_equal(read[1][..., 0], (flat / 255).astype(np.float32))
    np.testing.assert_array_equal(read[2], many)
    np.testing.assert_array_equal(read[3], read[1])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.png", None, "cannot be read"),
        ("text.png", b"hello", "is no image of a known format"),
        ("text.npy", b"hello", "cannot be read as an array"),
        ("none.npy", None, "cannot be read as an array"),
        ("words.npy", np.array(["a"]), "an image is uint8, uint16 or float"),
        ("range.npy", np.full(GRAY, -1.0), "has values from -1 to -1; floats must lie in [0, 1]"),
        ("nan.npy", np.full(GRAY, np.nan), "has values from nan to nan"),
    ],
)
def test_a_file_that_is_no_image_is_named(tmp_path: Path, name: str, content: object, sentence: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    with pytest.raises(ValueError) as refusal:
        read_images([path])
    assert str(path) in str(refusal.value)
    assert sentence in str(refusal.value)


def test_channels_are_changed_only_where_nothing_is_lost() -> None:
    gray = np.random.default_rng(0).random(GRAY).astype(np.float32)
    rgb, path = np.repeat(gray, 3, axis=2), Path("i.png")
    rgba = np.concatenate([rgb, np.ones(GRAY, np.float32)], axis=2)
    for image in (gray, rgb, rgba):
        np.testing.assert_array_equal(fit(image, path, (8, 8, 1)), gray)
        np.testing.assert_array_equal(fit(image, path, (8, 8, 3)), rgb)
        np.testing.assert_array_equal(fit(image, path, (8, 8, 4)), rgba)
    colours, glass = rgb * [1, 0.5, 0], rgba * 0.5
    for image, channels, sentence in (
        (colours, 1, r"i\.png has 3 channels of different values, but the model's images have 1"),
        (glass, 3, r"i\.png has 4 channels, some of it transparent, but the model's images have 3"),
        (gray, 5, r"i\.png has 1 channels, but the model's images have 5"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            fit(image, path, (8, 8, channels))
    with pytest.raises(ConfigError, match=r"i\.png is 8 pixels wide and 8 high, but the model makes 32 x 16"):
        fit(gray, path, (16, 32, 1))


def test_a_mask_fills_what_is_white_and_not_transparent() -> None:
    pixels = np.zeros((2, 2, 4), np.float32)
    pixels[0, 0], pixels[0, 1], pixels[1, 0] = 1, (1, 1, 1, 0), (0, 0, 0, 1)
    assert to_mask(pixels, Path("m.png"), (2, 2)).tolist() == [[True, False], [False, False]]
    with pytest.raises(ConfigError, match=r"m\.png is 2 pixels wide and 2 high, but the images are 4 x 2"):
        to_mask(pixels, Path("m.png"), (2, 4))


def test_a_label_with_a_dash_before_it_is_given_as_the_help_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["model", "--labels=-dash,cat"]).labels == "-dash,cat"
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "it is --labels=LIST" in " ".join(capsys.readouterr().out.split())
