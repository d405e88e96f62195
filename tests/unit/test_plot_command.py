"""`ddpm-hf plot` draws the content of files: each picture equals, byte for byte, one drawn from the tables."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.cli import main
from ddpm_hf.cli.plot import Process, noise_image
from ddpm_hf.config import DiffusionConfig, ObjectiveConfig, RunConfig
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.diffusion.schedule import NoiseSchedule, make_betas
from ddpm_hf.plots import forward_strip, image_grid, schedule_plot, timestep_curves, training_curves
from ddpm_hf.rng import torch_generator
from ddpm_hf.training.loss import min_snr_weight
from tests.conftest import REPOSITORY

ROWS = [{"step": 10 * k, "loss": 1 / k, "loss_q0": 2 / k, "loss_q1": 1 / k, "loss_q2": 0.5 / k, "loss_q3": 0.1 / k}
        for k in range(1, 31)]  # fmt: skip
BOUND = {"timesteps": [2, 1, 0], "x_0_mse": [0.3, 0.2, 0.1], "eps_mse": [0.1, 0.2, 0.3], "terms": [0.1, 0.2, 3.0],
         "counts": [4, 4, 4]}  # fmt: skip


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --output, pictures are written to the working directory."""
    monkeypatch.chdir(tmp_path)


def png(draw: Any) -> bytes:
    """Return the bytes that a function writes to a path."""
    path = Path("expected.png")
    draw(path)
    content = path.read_bytes()
    path.unlink()
    return content


def write_run(folder: Path, rows: list[dict[str, Any]] = ROWS, tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def write_config(path: Path, **diffusion: object) -> Path:
    """Write the configuration of a run with 100 timesteps."""
    config = RunConfig(diffusion=DiffusionConfig(num_train_timesteps=100, **diffusion))
    data = dataclasses.replace(config.data, source="images", num_channels=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dataclasses.replace(config, data=data).to_yaml())
    return path


def write_image(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG")
    return path


def pixels_of(seed: int, *shape: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed)).integers(0, 256, shape, np.uint8)


def alphas_cumprod(name: str, num_timesteps: int, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    return NoiseSchedule.from_betas(make_betas(name, num_timesteps, start, end)).alphas_cumprod.numpy()


# ---------------------------------------------------------------------------------------------------------- schedules


def test_schedules_are_read_from_recipes_runs_and_pipelines(capsys: pytest.CaptureFixture[str]) -> None:
    write_config(Path("run/config.yaml"), beta_schedule="linear", beta_start=1e-3, beta_end=0.3)
    GaussianDiffusionScheduler.create(beta_schedule="jsd", num_train_timesteps=30, prediction_type="v").save_pretrained(
        "made/pipeline/scheduler"
    )
    recipe = REPOSITORY / "configs" / "mnist_28.yaml"
    file = Path("made/pipeline/scheduler/scheduler_config.json").rename("sohl_dickstein.json")
    stock = {"_class_name": "DDIMScheduler", "num_train_timesteps": 10, "beta_schedule": "scaled_linear"}
    Path("made/pipeline/scheduler/scheduler_config.json").write_text(json.dumps(stock))
    assert main.main(["plot", "schedule", str(recipe), "run", str(file), "made/pipeline"]) == 0
    expected = {
        "mnist_28": alphas_cumprod("cosine", 1000),
        "run": alphas_cumprod("linear", 100, 1e-3, 0.3),
        "sohl_dickstein": alphas_cumprod("jsd", 30),
        "made/pipeline": alphas_cumprod("scaled_linear", 10),
    }
    assert Path("schedule.png").read_bytes() == png(lambda path: schedule_plot(expected, path))
    printed = capsys.readouterr()
    assert printed.out == "schedule.png: beta, alpha_bar and log SNR of mnist_28, run, sohl_dickstein, made/pipeline.\n"
    assert sorted(path.name for path in Path().iterdir()) == ["made", "run", "schedule.png", "sohl_dickstein.json"]


def test_loss_weights_are_those_of_the_objective() -> None:
    plain, weighted = write_config(Path("plain.yaml")), Path("weighted.yaml")
    text = plain.read_text().replace("weighting: none", "weighting: min_snr").replace("gamma: 5.0", "gamma: 3.0")
    weighted.write_text(text)
    assert main.main(["plot", "schedule", str(plain), str(weighted)]) == 0
    schedule = NoiseSchedule.from_betas(make_betas("linear", 100))
    table = schedule.alphas_cumprod.numpy()
    weights = {"plain": np.ones(100), "weighted": min_snr_weight(schedule.snr, "epsilon", 3.0).numpy()}
    expected = png(lambda path: schedule_plot({"plain": table, "weighted": table}, path, loss_weights=weights))
    assert Path("schedule.png").read_bytes() == expected
    assert ObjectiveConfig().min_snr_gamma == 5.0


def test_inputs_of_the_same_name_are_labeled_by_path(capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        write_run(Path(folder, "run"))
    assert main.main(["plot", "loss", "a/run", "b/run/metrics.jsonl"]) == 0
    assert capsys.readouterr().out == "loss.png: losses of a/run, b/run/metrics.jsonl.\n"
    assert main.main(["plot", "loss", "a/run", "a/../a/run"]) == 2
    assert capsys.readouterr().err == "error: a/../a/run is given twice; give it once.\n"


# ------------------------------------------------------------------------------------------------------------ noising


def test_an_image_is_noised_as_in_training() -> None:
    """Float32 may round a value that lies between two of 256 levels to the other one, so one level is allowed."""
    image = pixels_of(1, 6, 5, 3)
    process = Process(NoiseSchedule.from_betas(make_betas("linear", 20, 1e-3, 0.3)), "epsilon", None)
    states = noise_image(image, process, [0, 7, 19], seed=3)
    assert (states.dtype, states.shape) == (np.uint8, (3, 6, 5, 3))
    generator = torch_generator("cpu", 3, "plot_noising")
    eps = torch.randn(1, 3, 6, 5, generator=generator).double().permute(0, 2, 3, 1)[0].numpy()
    for state, t in zip(states, (0, 7, 19), strict=True):
        alpha_bar = process.schedule.alphas_cumprod[t].item()
        x_t = alpha_bar**0.5 * (image / 127.5 - 1) + (1 - alpha_bar) ** 0.5 * eps
        assert np.abs(np.clip(x_t, -1, 1) * 127.5 + 127.5 - state).max() <= 0.5 + 1e-4
    assert (states != noise_image(image, process, [0, 7, 19], seed=4)).any()


@pytest.mark.parametrize("gray", [False, True])
def test_the_image_is_read_as_in_a_run(gray: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """A gray image is read with the three channels that the configuration asks for, and cropped in the center."""
    config = write_config(Path("run/config.yaml"), beta_schedule="cosine")
    pixels = pixels_of(2, 12, 16) if gray else pixels_of(2, 12, 16, 3)
    write_image(Path("photo.png"), pixels)
    arguments = ["plot", "noising", "photo.png", "--config", str(config), "--timesteps", "0", "9", "99"]
    assert main.main([*arguments, "--resolution", "12"]) == 0
    image = np.repeat(pixels[..., None], 3, axis=2) if gray else pixels
    process = Process(NoiseSchedule.from_betas(make_betas("cosine", 100)), "epsilon", None)
    states = noise_image(image[:, 2:14], process, [0, 9, 99], seed=0)
    strip = forward_strip(states, [0, 9, 99], process.schedule.snr[[0, 9, 99]].tolist())
    with Image.open("noising.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(strip))
    assert capsys.readouterr().out == "noising.png: x_t at t = [0, 9, 99].\n"


def test_eight_evenly_spaced_timesteps_are_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    write_image(Path("photo.png"), pixels_of(3, 8, 8, 3))
    for num_timesteps, expected in ((1000, [0, 143, 285, 428, 571, 714, 856, 999]), (3, [0, 1, 2]), (1, [0])):
        GaussianDiffusionScheduler(num_timesteps).save_pretrained("scheduler")
        assert main.main(["plot", "noising", "photo.png", "--config", "scheduler"]) == 0
        assert capsys.readouterr().out == f"noising.png: x_t at t = {expected}.\n"


# --------------------------------------------------------------------------------------------------------------- runs


def test_curves_leave_out_an_incomplete_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("runs/one"), tail='{"step": 310, "lo')
    write_run(Path("runs/two"), [{"step": 5, "loss": 0.7}, {"step": 6, "validation_loss": 0.8}])
    assert main.main(["plot", "loss", "runs/one", "runs/two", "--output", "runs/curves.PNG"]) == 0
    expected = {"one": ROWS, "two": [{"step": 5, "loss": 0.7}, {"step": 6, "validation_loss": 0.8}]}
    assert Path("runs/curves.PNG").read_bytes() == png(lambda path: training_curves(expected, path))
    assert capsys.readouterr().out == "runs/curves.PNG: losses of one, two.\n"


@pytest.mark.parametrize("where", ["run", "run/pipeline"])
def test_losses_by_timestep_are_read_from_metrics_and_evaluation(where: str) -> None:
    write_run(Path("run"))
    assert main.main(["plot", "timesteps", "run"]) == 0
    assert Path("timesteps.png").read_bytes() == png(lambda path: timestep_curves(path, metrics=ROWS))
    Path(where).mkdir(exist_ok=True)
    Path(where, "evaluation.json").write_text(json.dumps({"bound": BOUND}))
    assert main.main(["plot", "timesteps", "run"]) == 0
    assert Path("timesteps.png").read_bytes() == png(lambda path: timestep_curves(path, metrics=ROWS, bound=BOUND))
    Path("run/metrics.jsonl").unlink()
    assert main.main(["plot", "timesteps", where]) == 0
    assert Path("timesteps.png").read_bytes() == png(lambda path: timestep_curves(path, bound=BOUND))


# -------------------------------------------------------------------------------------------------------------- grids


def test_a_grid_has_a_labeled_column_for_each_subfolder(capsys: pytest.CaptureFixture[str]) -> None:
    images = {name: [pixels_of(index, 4, 4, 3) for index in indices] for name, indices in
              {"cat": (1, 2, 3), "dog": (4, 5), "emu": (6, 7)}.items()}  # fmt: skip
    for name, of_class in images.items():
        for index, image in enumerate(of_class):
            write_image(Path("photos", name, f"{index}.png"), image)
    assert main.main(["plot", "grid", "photos", "--columns", "2"]) == 0
    rows = [images[name][row] for row in range(2) for name in ("cat", "dog")]
    with Image.open("grid.png") as picture:
        expected = image_grid(np.stack(rows), 2, column_labels=["cat", "dog"])
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))
    assert capsys.readouterr().out == "grid.png: 2 images of each of 2 of 3 folders.\n"


def test_a_grid_of_samples_leaves_out_the_overviews(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The settings.json of another program does not count."""
    for name, color in {"grid.png": 9, "seed_000001.png": 1, "seed_000002.png": 2}.items():
        write_image(Path("drawn", name), pixels_of(color, 4, 4, 3))
    settings = {"files": ["seed_000001.png", "seed_000002.png", "grid.png"]}
    for images, expected in (([{"file": name} for name in settings["files"][:2]], "2 of 2"), (None, "3 of 3")):
        Path("drawn/settings.json").write_text(json.dumps(settings | ({"images": images} if images else {})))
        assert main.main(["plot", "grid", "drawn"]) == 0
        assert capsys.readouterr().out == f"grid.png: {expected} images.\n"


def test_a_grid_of_a_flat_folder_shows_its_first_images(capsys: pytest.CaptureFixture[str]) -> None:
    """Gray and color images get the same number of channels, as in training."""
    write_image(Path("photos/a.png"), pixels_of(1, 4, 4))
    write_image(Path("photos/b.png"), pixels_of(2, 4, 4, 3))
    write_image(Path("photos/c.png"), pixels_of(3, 4, 4, 3))
    assert main.main(["plot", "grid", "photos", "--columns", "2", "--rows", "1"]) == 0
    rows = [np.repeat(pixels_of(1, 4, 4)[..., None], 3, axis=2), pixels_of(2, 4, 4, 3)]
    with Image.open("grid.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(image_grid(np.stack(rows), 2)))
    assert capsys.readouterr().out == "grid.png: 2 of 3 images.\n"


# -------------------------------------------------------------------------------------------------------- invalid input


@pytest.fixture
def bad_inputs() -> None:
    """Write one of each invalid input."""
    write_config(Path("good.yaml"))
    Path("typo.yaml").write_text("data: {source: x}\ndiffusion: {beta_scedule: linear}\n")
    Path("unet.json").write_text('{"_class_name": "UNet2DModel"}')
    Path("list.json").write_text("[]")
    Path("torn.json").write_text('{"num_train')
    Path("bad.json").write_text('{"num_train_timesteps": 10, "beta_schedule": "zigzag"}')
    Path("absurd.json").write_text('{"num_train_timesteps": 1000000000000, "beta_schedule": "linear"}')
    Path("empty").mkdir()
    write_run(Path("new"), [])
    write_run(Path("other"), [{"step": 1, "grad_norm": 0.5}])
    write_run(Path("broken"))
    Path("broken/evaluation.json").write_text("{")
    write_run(Path("halved"))
    Path("halved/evaluation.json").write_text(json.dumps({"bound": BOUND | {"terms": [1.0]}}))
    write_image(Path("photo.png"), pixels_of(1, 8, 8, 3))
    write_image(Path("clear.png"), pixels_of(1, 8, 8, 4))
    write_image(Path("deep.png"), pixels_of(1, 8, 8).astype(np.uint16) * 257)
    write_image(Path("wide.png"), np.zeros((1, 9000), np.uint8))
    Path("text.png").write_text("hello")
    write_image(Path("sizes/a.png"), pixels_of(1, 8, 8))
    write_image(Path("sizes/b.png"), pixels_of(1, 9, 8))
    Path("folder.png").mkdir()
    Path("gray.yaml").write_text(Path("good.yaml").read_text().replace("num_channels: 3", "num_channels: 1"))


@pytest.mark.usefixtures("bad_inputs")
@pytest.mark.parametrize(
    ("arguments", "exit_code", "sentence"),
    [
        ("schedule nowhere", 2, "nowhere does not exist; give a YAML file, or the folder of a run, checkpoint"),
        ("schedule empty", 2, "empty holds no schedule: it has no scheduler/scheduler_config.json, "),
        ("schedule typo.yaml", 2, "typo.yaml is not the configuration of a run: there is no setting diffusion.beta_sc"),
        ("schedule photo.png", 2, "photo.png is not the configuration of a run: "),
        ("schedule unet.json", 2, "unet.json is not the configuration of a scheduler with betas: it has no num_train_"),
        ("schedule list.json", 2, "list.json must contain a JSON object, not list"),
        ("schedule torn.json", 2, "torn.json is not valid JSON ("),
        ("schedule bad.json", 2, "'zigzag' is not one of linear, "),
        ("loss nowhere", 2, "nowhere does not exist; give the folder of a run, which holds metrics.jsonl."),
        ("loss empty", 2, "empty/metrics.jsonl does not exist; give the folder of a run"),
        ("loss new", 2, "new/metrics.jsonl has no complete line of metrics; "),
        ("loss broken other", 2, "The metrics of other contain no finite loss, validation_loss or score"),
        ("timesteps photo.png", 2, "photo.png is not a folder; "),
        ("timesteps other", 2, "other has no loss by timestep: "),
        ("timesteps broken", 2, "broken/evaluation.json is not valid JSON ("),
        ("timesteps halved", 2, "bound must have timesteps, x_0_mse, eps_mse, terms, counts, one number per reverse"),
        ("schedule absurd.json", 2, "absurd.json is not the configuration of a scheduler with betas: "),
        ("noising nowhere.png --config good.yaml", 2, "nowhere.png is not a file; give an image file."),
        ("noising text.png --config good.yaml", 2, "text.png cannot be decoded"),
        ("noising photo.png --config gray.yaml", 2, "photo.png is a color image, but gray (L) is expected"),
        ("noising clear.png --config good.yaml", 2, "clear.png has transparent pixels, but RGB is expected"),
        ("noising deep.png --config good.yaml", 2, "deep.png has 16 bits per channel, but PNG plots have 8; "),
        ("noising wide.png --config good.yaml", 2, "8 images of 9000 pixels are too wide; give --resolution."),
        ("noising photo.png --config good.yaml --timesteps -1", 2, "--timesteps -1 is out of range; give 0 to"),
        ("noising photo.png --config good.yaml --timesteps 5 100", 2, "--timesteps 100 is out of range; give"),
        ("grid nowhere", 2, "nowhere is not a folder; give a folder of images."),
        ("grid empty", 2, "empty contains no images"),
        ("grid sizes", 2, "has 8x9 pixels where the first has 8x8; give --resolution."),
        ("loss broken --output loss.jpg", 2, "--output loss.jpg must end in .png, the format that is written."),
        ("loss broken --output folder.png", 2, "--output folder.png is a folder; give a file name."),
        ("loss broken --output nowhere/x.png", 1, "--output: there is no folder nowhere"),
        ("loss broken --output photo.png/x.png", 1, "--output: there is no folder photo.png"),
    ],
)  # fmt: skip
def test_invalid_input_is_refused_in_one_sentence_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], arguments: str, exit_code: int, sentence: str
) -> None:
    Path(f"{arguments.split()[0]}.png").write_text("an earlier picture")
    before = {path: path.read_bytes() if path.is_file() else b"" for path in Path().rglob("*")}
    assert main.main(["plot", *arguments.split()]) == exit_code
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert sentence in line
    assert line.startswith("error: ")
    assert printed.out == ""
    assert {path: path.read_bytes() if path.is_file() else b"" for path in Path().rglob("*")} == before


def test_an_output_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A name too long for the file system is only found when writing."""
    write_run(Path("run"))
    assert main.main(["plot", "loss", "run", "--output", f"{'x' * 250}.png"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: File name too long: ")
    assert [path.name for path in Path().iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: KIND"),
        (["pie"], "invalid choice: 'pie'"),
        (["schedule"], "required: SOURCE"),
        (["noising", "photo.png"], "required: --config"),
        (["grid", "photos", "--columns", "0"], "0 is not a whole number of at least 1"),
        (["loss", "run", "--out", "x.png"], "unrecognized arguments: --out x.png"),
    ],
)
def test_an_invalid_command_line_is_refused_with_the_usage(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["plot", *arguments])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["", "schedule", "noising", "loss", "timesteps", "grid"])
def test_help_has_valid_examples(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    from ddpm_hf.cli.plot import _parser

    with pytest.raises(SystemExit) as caught:
        main.main(["plot", *([kind] if kind else []), "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    examples = text.partition("example")[2].split("ddpm-hf plot ")[1:]
    assert len(examples) == (1 if kind else 5)
    for example in examples:
        assert kind in _parser().parse_args(example.split()).kind


def test_help_and_curves_of_runs_need_no_torch() -> None:
    write_run(Path("run"))
    code = (
        "import io, sys\nfrom contextlib import redirect_stdout\nfrom ddpm_hf.cli import main as cli\n"
        "try:\n    with redirect_stdout(io.StringIO()): cli.main(['plot', 'schedule', '--help'])\n"
        "except SystemExit: pass\nprint(sorted({'torch', 'diffusers', 'matplotlib'} & set(sys.modules)))\n"
        "assert cli.main(['plot', 'loss', 'run']) == 0\nprint(sorted({'torch', 'diffusers'} & set(sys.modules)))\n"
        "assert cli.main(['plot', 'timesteps', 'run']) == 0\nprint(sorted({'torch', 'diffusers'} & set(sys.modules)))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line for line in io.StringIO(answer.stdout) if line.startswith("[")]
    assert lines == ["[]\n"] * 3
