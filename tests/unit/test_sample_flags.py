"""`ddpm-hf sample` before it loads a model: flags, output folder and given images."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.cli import main
from ddpm_hf.cli.common import find_folder
from ddpm_hf.cli.sample import OutputFolder, fit, parse, read_images, to_mask, to_unit_range
from ddpm_hf.config import ConfigError
from tests.conftest import REPOSITORY

GRAY = (8, 8, 1)
SHARED = [
    ("--variance analytic --scheduler DDIMScheduler", "--variance analytic needs GaussianDiffusionScheduler"),
    ("--guidance_scale nan", "--guidance_scale is nan"),
    ("--guidance_scale inf", "--guidance_scale is inf"),
    ("--guidance_scale -1", "--guidance_scale is -1.0, but must be at least 0."),
    ("--eta 1.5", "--eta is 1.5, but must be 0 to 1."),
    ("--batch_size 0", "--batch_size is 0, but must be at least 1."),
]
OF_SAMPLE = [
    ("--mask m.png", "--mask needs an image"),
    ("--image i.png j.png k.png --mask m.png n.png", "--mask names 2 files for 3 images"),
    ("--image i.png --strip", "--strip shows sampling from noise"),
    ("--image i.png --animation", "--animation shows sampling from noise"),
    ("--image i.png --scheduler DDIMScheduler", "--image needs GaussianDiffusionScheduler"),
    ("--seeds 1,2 --seed 0", "--seeds and --seed both set the seeds"),
    ("--seeds 1,2 --num_images 2", "--seeds and --num_images both set the seeds"),
    ("--strength 0 --image i.png", "--strength is 0.0, but must be above 0"),
    ("--seed -1", "--seed is -1, but must be 0 to 18446744073709551615."),
    ("--seed 18446744073709551615 --num_images 2", "exceeds the largest seed"),
    ("--seeds 3,4,3", "--seeds has 3 twice"),
    ("--seeds 0-5,5", "--seeds has 5 twice"),
    ("--seeds 5-3", "--seeds has '5-3'; ranges must increase"),
    ("--seeds 0-99999999999", "at most 1,000,000 seeds"),
    ("--seeds 1,,2", "--seeds has ''; give whole numbers"),
    ("--seeds cat", "--seeds has 'cat'; give whole numbers"),
]


def test_words_of_a_command_in_python_may_be_numbers_and_paths(tmp_path: Path) -> None:
    flags = parse([tmp_path, "--num_images", np.int64(3), "--eta", 0.5, "--num_inference_steps", 20])
    assert (flags.folder, flags.num_images, flags.eta, flags.num_inference_steps) == (str(tmp_path), 3, 0.5, 20)


@pytest.mark.parametrize(
    ("command", "flags", "sentence"),
    [
        *(("sample ./nowhere", *case) for case in (*SHARED, *OF_SAMPLE)),
        *(("evaluate ./nowhere --data ./nothing", *case) for case in SHARED),
        ("evaluate ./nowhere --data ./nothing", "--num_terms 1", "--num_terms is 1, but must be at least 2."),
        ("evaluate ./nowhere --data ./nothing", "--data.streaming true", "--data.streaming true keeps no images"),
    ],
)
def test_contradictions_are_refused_before_anything_is_read(
    capsys: pytest.CaptureFixture[str], command: str, flags: str, sentence: str
) -> None:
    """The model, the images and the data do not exist: a later error would be about them."""
    assert main.main([*command.split(), *flags.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert sentence in line


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        ("--strength 0.5", "--strength 0.5 has no effect without --image."),
        ("--image i.png --mask m.png --strength 0.5", "--strength 0.5 has no effect with --mask."),
        ("--image i.png --num_resamples 3", "--num_resamples 3 has no effect without --mask."),
        ("--image i.png --jump_length 3", "--jump_length 3 has no effect without --mask."),
        (
            "--guidance_rescale 0.5",
            "--guidance_rescale 0.5 has no effect with --guidance_scale 1; set --guidance_scale",
        ),
        ("--guidance_interval 0,0.5", "--guidance_interval 0,0.5 has no effect with --guidance_scale 1"),
        ("--guide runs/early", "--guide runs/early has no effect with --guidance_scale 1"),
    ],
)
def test_a_flag_without_effect_is_a_warning(caplog: pytest.LogCaptureFixture, flags: str, warning: str) -> None:
    parse(["model", *flags.split()])
    (line,) = caplog.messages
    assert line.startswith(warning)


@pytest.mark.parametrize(
    ("words", "scheduler", "eta"),
    [
        ("unipc", "UniPCMultistepScheduler", None),
        ("DPM++", "DPMSolverMultistepScheduler", None),
        ("ddim", "GaussianDiffusionScheduler", 0.0),
        ("ddim --eta 0.5", "GaussianDiffusionScheduler", 0.5),
        ("ddpm", "GaussianDiffusionScheduler", 1.0),
        ("DDIMScheduler", "DDIMScheduler", None),
    ],
)
def test_a_scheduler_has_a_short_name_or_that_of_its_class(words: str, scheduler: str, eta: float | None) -> None:
    flags = parse(["model", "--scheduler", *words.split()])
    assert (flags.scheduler, flags.eta) == (scheduler, eta)


def test_a_wrong_scheduler_is_refused_without_importing_torch_or_diffusers() -> None:
    code = (
        "import sys; from ddpm_hf.cli import main; code = main.main(['sample', 'user/model', '--scheduler', 'fancy'])\n"
        "print(code, {'torch', 'diffusers'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert run.stdout == "2 set()\n"
    assert "--scheduler is fancy, which is no scheduler; give one of unipc, dpm++, ddim, ddpm" in run.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "the following arguments are required: folder"),
        ("model --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("model --num_images many", "argument --num_images: invalid int value: 'many'"),
        ("model --num_image 3", "unrecognized arguments: --num_image 3"),
    ],
)
def test_an_invalid_command_line_is_refused_with_the_usage(
    capsys: pytest.CaptureFixture[str], flags: str, words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["sample", *flags.split()])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: ddpm-hf sample ")
    assert words in error


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
    assert parse(["user/model", *flags.split()]).seed_list() == seeds


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_help_imports_no_torch_and_lists_flags_with_defaults(command: str) -> None:
    code = (
        f"import sys\nfrom ddpm_hf.cli import main as cli\ntry: cli.main(['{command}', '--help'])\n"
        "finally: print({'torch', 'diffusers', 'datasets'} & sys.modules.keys(), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == "set()\n"
    text = " ".join(done.stdout.split())
    assert "write --labels=LIST" in text
    assert f"(default: {16 if command == 'sample' else 64})" in text
    assert text.count(f"ddpm-hf {command} ") >= (6 if command == "sample" else 2)


def test_a_label_that_begins_with_a_dash_is_given_as_the_help_says() -> None:
    assert parse(["model", "--labels=-dash,cat"]).labels == "-dash,cat"


# ----------------------------------------------------------------------------------------------------------- the model


def test_the_folder_of_a_run_is_that_of_its_pipeline(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").touch()
    for folder in (tmp_path, tmp_path / "pipeline"):
        model = find_folder(str(folder))
        assert model is not None and model.path == tmp_path / "pipeline"
    assert find_folder("google/ddpm-cifar10-32", "main") is None
    assert find_folder("gpt2.5-model_x") is None
    with pytest.raises(ConfigError, match="--revision is for Hub repositories"):
        find_folder(str(tmp_path), "main")


@pytest.mark.parametrize("name", ["./nowhere", "outputs/digits/pipeline", "user/no thing", "/nowhere", "~/nowhere", ""])
def test_a_name_that_is_neither_folder_nor_repository_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the repository may have an outputs/digits
    with pytest.raises(ConfigError, match="is neither a local folder nor a valid repository id"):
        find_folder(name)


# ----------------------------------------------------------------------------------------------------------- the folder


def write_one(path: Path, overwrite: bool, name: str = "seed_000000.png", value: int = 0) -> None:
    folder = OutputFolder(path, overwrite)
    folder.begin({"seed": 0}, [name])
    folder.write_pixels(name, np.full((8, 8, 1), value, np.uint8))
    folder.finish()


def test_a_folder_with_anything_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").touch()
    with pytest.raises(ConfigError, match="is not empty; choose another folder, or give --overwrite"):
        OutputFolder(tmp_path, overwrite=False)
    with pytest.raises(ConfigError, match="contains files of another origin"):
        OutputFolder(tmp_path, overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        OutputFolder(tmp_path / "holiday.png", overwrite=True)


def test_overwriting_replaces_the_files_of_the_earlier_call_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "samples"
    write_one(path, False)
    (path / "mine.txt").write_text("keep")
    write_one(path, True, "seed_000001.png", 9)
    assert sorted(file.name for file in path.iterdir()) == ["mine.txt", "seed_000001.png", "settings.json"]
    content = json.loads((path / "settings.json").read_text())
    assert content == {"schema_version": 1, "finished": True, "seed": 0, "files": ["seed_000001.png"]}
    assert np.asarray(Image.open(path / "seed_000001.png")).max() == 9


def test_a_file_of_another_origin_is_not_overwritten(tmp_path: Path) -> None:
    write_one(tmp_path, False)
    (tmp_path / "grid.png").write_text("painted by hand")
    with pytest.raises(ConfigError, match=r"grid\.png is not from an earlier call"):
        write_one(tmp_path, True, "grid.png")
    assert (tmp_path / "grid.png").read_text() == "painted by hand"
    assert (tmp_path / "seed_000000.png").exists()


def test_no_file_outside_the_folder_is_removed(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "mine.txt").touch()
    names = ["../mine.txt", str(tmp_path / "mine.txt")]
    (tmp_path / "samples" / "settings.json").write_text(json.dumps({"files": names}))
    write_one(tmp_path / "samples", True)
    assert (tmp_path / "mine.txt").exists()


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path, False)

    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.write("grid.png", fail)
    assert list(tmp_path.iterdir()) == []


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
    read = [to_unit_range(image, path) for image, path in zip(read_images(paths), paths, strict=True)]
    np.testing.assert_array_equal(read[0][..., 0], (deep / 65535).astype(np.float32))
    np.testing.assert_array_equal(read[1][..., 0], (flat / 255).astype(np.float32))
    np.testing.assert_array_equal(read[2], many)
    np.testing.assert_array_equal(read[3], read[1])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.png", None, "cannot be read"),
        ("text.png", b"hello", "is not an image in a supported format"),
        ("text.npy", b"hello", "cannot be read as an array"),
        ("none.npy", None, "cannot be read as an array"),
        ("words.npy", np.array(["a"]), "an image must be numbers of shape"),
        ("signed.npy", np.zeros(GRAY, np.int16), "has int16 values, but an image must be uint8, uint16 or float in"),
        ("range.npy", np.full(GRAY, -1.0), "has values from -1 to -1, but floats must be in [0, 1]"),
        ("nan.npy", np.full(GRAY, np.nan), "has values from nan to nan"),
    ],
)
def test_a_file_that_is_not_an_image_is_named(tmp_path: Path, name: str, content: object, sentence: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    with pytest.raises(ValueError) as refusal:
        to_unit_range(*read_images([path]), path)
    assert str(path) in str(refusal.value)
    assert sentence in str(refusal.value)


def test_channels_are_converted_only_without_loss() -> None:
    gray = np.random.default_rng(0).random(GRAY).astype(np.float32)
    rgb, path = np.repeat(gray, 3, axis=2), Path("i.png")
    rgba = np.concatenate([rgb, np.ones(GRAY, np.float32)], axis=2)
    for image in (gray, rgb, rgba):
        np.testing.assert_array_equal(fit(image, path, (8, 8, 1)), gray)
        np.testing.assert_array_equal(fit(image, path, (8, 8, 3)), rgb)
        np.testing.assert_array_equal(fit(image, path, (8, 8, 4)), rgba)
    colors, glass = rgb * [1, 0.5, 0], rgba * 0.5
    for image, channels, sentence in (
        (colors, 1, r"i\.png has 3 channels with colors, but the model has 1"),
        (glass, 3, r"i\.png has 4 channels, partly transparent, but the model has 3"),
        (gray, 5, r"i\.png has 1 channel, but the model has 5"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            fit(image, path, (8, 8, channels))
    with pytest.raises(ConfigError, match=r"i\.png has 8x8 pixels, but the model has 32x16"):
        fit(gray, path, (16, 32, 1))


def test_a_mask_fills_what_is_white_and_not_transparent() -> None:
    pixels = np.zeros((2, 2, 4), np.float32)
    pixels[0, 0], pixels[0, 1], pixels[1, 0] = 1, (1, 1, 1, 0), (0, 0, 0, 1)
    assert to_mask(pixels, Path("m.png"), (2, 2)).tolist() == [[True, False], [False, False]]
    with pytest.raises(ConfigError, match=r"m\.png has 2x2 pixels, but the images have 4x2"):
        to_mask(pixels, Path("m.png"), (2, 4))
