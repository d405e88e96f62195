"""`ddpm-hf evaluate` on a tiny pipeline and the digits."""

import json
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from torch.distributed import TCPStore

from ddpm_hf.cli import main
from ddpm_hf.config import DataConfig, RunConfig, TrainingConfig
from ddpm_hf.data import open_images
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.evaluation.features import moments_of
from ddpm_hf.evaluation.likelihood import ReverseProcess, variational_bound
from ddpm_hf.evaluation.metrics import frechet_distance
from ddpm_hf.evaluation.report import choose_images
from tests import forked
from tests.conftest import DIGITS, REPOSITORY, tiny_unet
from tests.feature_networks import pooled

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_NAMES = {str(digit): word for digit, word in enumerate(WORDS)}
QUICK = ["--data", str(DIGITS), "--cpu", "--num_inference_steps", "2", "--num_samples", "16"]
BOUND = ["--metrics", "bits_per_dim", "--num_images", "5", "--num_terms", "3"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a class-conditional pipeline with 20 timesteps."""
    folder = tmp_path_factory.mktemp("run") / "pipeline"
    scheduler = GaussianDiffusionScheduler.create(num_train_timesteps=20, variance_type="fixed_small")
    GaussianDiffusionPipeline(tiny_unet(num_class_embeds=10), scheduler, class_names=DIGIT_NAMES).save_pretrained(
        folder
    )
    return folder


def evaluate(*arguments: object) -> int:
    return main.main(["evaluate", *map(str, arguments)])


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run an invalid command and return its error message."""
    capsys.readouterr()
    assert evaluate(*arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def test_bits_per_dimension_are_printed_and_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, saved: Path
) -> None:
    """From the run folder, with a validation set, the analytic variance and 10 timesteps, spaced as for sampling."""
    shorter = ["--likelihood_steps", "10", "--timestep_spacing", "trailing"]
    held_out = ["--data.validation_fraction", "0.1", "--estimate_variance", "2", "--variance", "analytic"]
    assert evaluate(saved.parent, *QUICK, *BOUND, *held_out, *shorter, "--output", tmp_path) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "evaluation.json").read_text())
    (metric,) = report["metrics"]
    assert f"bits_per_dim  {metric['value']:.4f}" in printed
    assert metric["standard_error"] > 0
    del metric["value"], metric["standard_error"]
    assert metric == {
        "name": "bits_per_dim", "features": None, "num_samples": 5, "num_reference": 0, "seed": 0,
        "images": "held out", "conditional": True, "num_steps": 10, "num_terms": 3, "variance": "analytic",
        "timestep_spacing": "trailing",
    }  # fmt: skip
    assert report["bound"]["timesteps"] == list(range(19, 0, -2))
    assert report["sampling"]["timestep_spacing"] == "trailing"
    assert "bits_per_dim is given the class of each image; encoding the class would add up to 0.052." in printed
    assert "of training images" not in printed
    assert report["schema_version"] == 1
    assert report["data"]["source"] == "digits.parquet"
    assert report["data"]["num_held_out_images"] == 180
    assert len(report["data"]["fingerprint"]) == 32
    assert report["sampling"]["analytic_variance"] is True
    assert len(report["bound"]["terms"]) == 10
    assert report["versions"]["torch"] == metadata.version("torch")
    width, height = Image.open(tmp_path / "evaluation.png").size
    assert width > height > 1000
    assert np.load(tmp_path / "evaluation_picture" / "samples.npy").shape == (16, 8, 8, 1)
    moments = saved / "scheduler" / "reverse_variance.json"
    assert GaussianDiffusionPipeline.from_pretrained(saved).scheduler.eps_second_moments.shape == (20,)
    moments.unlink()


def test_in_a_folder_without_subfolders_the_variance_is_saved_beside_the_scheduler(tmp_path: Path, saved: Path) -> None:
    """As google/ddpm-* repositories are laid out."""
    flat = tmp_path / "flat"
    flat.mkdir()
    files = ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json")
    for name in (*files, "model_index.json"):
        shutil.copy(saved / name, flat)
    assert evaluate(flat, *QUICK, *BOUND, "--estimate_variance", "1", "--variance", "analytic") == 0
    assert (flat / "reverse_variance.json").is_file()
    assert GaussianDiffusionPipeline.from_pretrained(flat).scheduler.eps_second_moments.shape == (20,)


def test_samples_for_the_picture_alone_take_few_steps_in_a_folder_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by `ddpm-hf sample`; metrics sample into another folder."""
    unet = tiny_unet(num_class_embeds=10)
    scheduler = GaussianDiffusionScheduler.create(num_train_timesteps=60)
    GaussianDiffusionPipeline(unet, scheduler, class_names=DIGIT_NAMES).save_pretrained(tmp_path / "long")
    data = ["--data", str(DIGITS), "--cpu", "--num_samples", "4"]
    assert evaluate(tmp_path / "long", *data, *BOUND) == 0
    report = json.loads((tmp_path / "long" / "evaluation.json").read_text())
    assert report["sampling"]["num_inference_steps"] == 20
    assert report["sampling"]["scheduler"] == "UniPCMultistepScheduler"
    assert "bits_per_dim is of training images and may be lower than on others" in capsys.readouterr().out
    assert not (tmp_path / "long" / "evaluation_samples").exists()


def test_the_validation_set_of_the_run_is_measured_and_not_part_of_the_reference(
    tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a flag, from training_config.yaml in the folder."""
    shutil.copytree(saved, tmp_path / "run" / "pipeline")
    config = RunConfig(data=DataConfig(source=str(DIGITS), validation_fraction=0.1), training=TrainingConfig(seed=5))
    (tmp_path / "run" / "pipeline" / "training_config.yaml").write_text(config.to_yaml())
    metrics = ["--metrics", "bits_per_dim,frechet_distance", *IN_FEATURES[2:], *BOUND[2:]]
    assert evaluate(tmp_path / "run", *QUICK, *metrics, "--output", tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Validation set of the run (training_config.yaml): --split_seed 5 --data.valid")
    assert "of training images" not in printed
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert {metric["num_reference"] for metric in report["metrics"]} == {0, 1617}
    assert (report["data"]["validation_fraction"], report["data"]["split_seed"]) == (0.1, 5)
    _, held_out = open_images(config.data, with_labels=False).split(0.1, 5)
    process = ReverseProcess(GaussianDiffusionPipeline.from_pretrained(saved))
    bound = variational_bound(process, choose_images(held_out, 5, 0), seed=0, num_terms=3)
    assert report["metrics"][-1]["value"] == pytest.approx(bound.bits_per_dim, rel=1e-6)


def test_fidelity_compares_samples_with_training_images(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, saved: Path
) -> None:
    """Nothing is printed on stderr, which is not a terminal here."""
    features = "tests.feature_networks:pooled"
    options = ["--metrics", "frechet_distance", "--features", features, "--seed", "3", "--format", "png"]
    options += ["--labels", "eight,three"]
    assert evaluate(saved, *QUICK, "--data.validation_fraction", "0.1", *options, "--output", tmp_path) == 0
    samples = np.load(tmp_path / "evaluation_samples" / "samples.npy")
    assert len(list((tmp_path / "evaluation_samples" / "png").iterdir())) == 16
    training, _ = open_images(DataConfig(source=str(DIGITS)), with_labels=False).split(0.1, 0)
    pixels, _ = training.take(training.positions)
    moments = [moments_of(pooled()(torch.from_numpy(x)).numpy()) for x in (samples.transpose(0, 3, 1, 2), pixels)]
    (metric,) = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    assert metric.pop("value") == pytest.approx(frechet_distance(*moments), rel=1e-6)
    assert features in metric.pop("features")
    assert metric == {
        "name": f"frechet_distance[{features}]", "standard_error": None, "num_samples": 16,
        "num_reference": 1617, "seed": 3, "sampler": "GaussianDiffusionScheduler", "num_inference_steps": 2,
    }  # fmt: skip
    printed = capsys.readouterr()
    assert f"frechet_distance[{features}]" in printed.out
    assert printed.err == ""
    assert json.loads((tmp_path / "evaluation_samples" / "settings.json").read_text())["labels"] == [8, 3]
    options[options.index("3")] = "4"
    changed = error_of(capsys, saved, *QUICK, *options, "--output", tmp_path)
    assert "holds samples of other settings (seed was 3, is 4)" in changed


def test_values_are_compared_as_pictures_of_the_range_of_the_model(tmp_path: Path, saved: Path) -> None:
    model = GaussianDiffusionPipeline.from_pretrained(saved)
    ranged = GaussianDiffusionPipeline(model.unet, model.scheduler, class_names=DIGIT_NAMES, value_range=[-1000, 400])
    ranged.save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8)).astype(np.uint8)
    np.save(tmp_path / "values.npy", pixels.astype(np.float64) / 255 * 1400 - 1000)
    np.save(tmp_path / "pictures.npy", pixels)
    features = ("--metrics", "frechet_distance", "--features", "tests.feature_networks:pooled")
    rows = []
    for folder, data in ((tmp_path / "model", "values.npy"), (saved, "pictures.npy")):
        options = (*QUICK, "--data", tmp_path / data, *features, "--output", tmp_path / f"of {data}")
        assert evaluate(folder, *options) == 0
        rows.append(json.loads((tmp_path / f"of {data}" / "evaluation.json").read_text())["metrics"])
    assert rows[0] == rows[1]


def test_copies_of_training_images_are_counted_and_compared_with_the_validation_set(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, saved: Path
) -> None:
    """Of a run with random flips, with copies in place of its samples; no feature network is needed for pixels."""
    shutil.copytree(saved, tmp_path / "run" / "pipeline")
    data = DataConfig(source=str(DIGITS), validation_fraction=0.1, random_flip=True)
    (tmp_path / "run" / "pipeline" / "training_config.yaml").write_text(RunConfig(data=data).to_yaml())
    options = [tmp_path / "run", *QUICK, "--metrics", "memorization", "--output", tmp_path]
    assert evaluate(*options) == 0
    training, _ = open_images(data, with_labels=False).split(0.1, 0)
    samples = np.load(tmp_path / "evaluation_samples" / "samples.npy")
    samples[:4] = training.take(np.arange(4))[0].transpose(0, 2, 3, 1)[:, :, ::-1]
    np.save(tmp_path / "evaluation_samples" / "samples.npy", samples)
    capsys.readouterr()
    assert evaluate(*options, "--features", "tests.feature_networks:pooled") == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    pixels, features = report["metrics"]
    assert features["name"] == "memorization[tests.feature_networks:pooled]"
    assert (pixels["name"], pixels["value"], pixels["num_validation"]) == ("memorization", 0.25, 180)
    assert 0 <= pixels["validation_value"] < 0.02 and pixels["num_reference"] <= 1617
    assert [found["mirrored"] for found in report["memorization"]] == [True, True]
    assert {one["training_image"] for one in report["memorization"][0]["closest"][:4]} == set(
        training.rows[:4].tolist()
    )
    printed = capsys.readouterr().out
    assert "memorization: 4 of 16 samples (25.0%) are less than a third as far from one training image" in printed
    assert "of validation images" in printed


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--metrics", "fid", "--features", "tests.feature_networks:pooled"], "use frechet_distance"),
        (["--metrics", "frechet_distance", "--features", "tests.feature_networks:nothing"], "cannot be imported"),
        (["--metrics", "frechet_distance", "--features", "tests.feature_networks:pooled", "--num_samples", "4"],
         "frechet_distance needs at least 5 images"),
    ],
)  # fmt: skip
def test_metrics_that_cannot_be_measured_are_refused_before_sampling(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, saved: Path, options: list[str], sentence: str
) -> None:
    assert sentence in error_of(capsys, saved, *QUICK, *options, "--output", tmp_path)
    assert not (tmp_path / "evaluation_samples").exists()


ESTIMATE = ["--estimate_variance", "2"]
IN_FEATURES = ["--metrics", "frechet_distance", "--features", "tests.feature_networks:pooled"]


@pytest.mark.parametrize(
    ("variance_type", "options", "sentence"),
    [
        ("fixed_small", [*ESTIMATE, *IN_FEATURES, "--num_samples", "4"], "needs at least 5 images"),
        ("fixed_small", [*ESTIMATE, *BOUND, "--num_inference_steps", "21"], "num_inference_steps 21 is not between"),
        ("fixed_small", [*ESTIMATE, *BOUND, "--likelihood_steps", "21"], "num_inference_steps 21 is not between"),
        ("fixed_small", [*ESTIMATE, *BOUND, "--guidance_scale", "2"], "no null label to guide against"),
        (
            "fixed_small",
            [*ESTIMATE, *BOUND, "--variance", "analytic", "--samples_dir", str(REPOSITORY / "tests")],
            "is not a folder of samples",
        ),
        ("fixed_small", [*IN_FEATURES, "--scheduler", "DPMSolverMultistepScheduler", "--eta", "0"], "has no eta"),
        ("learned_range", [*ESTIMATE, *BOUND], "the analytic one replaces a fixed one only"),
    ],
)
def test_everything_is_checked_before_the_network_runs_and_a_folder_is_created(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    variance_type: str,
    options: list[str],
    sentence: str,
) -> None:
    """A folder of samples from a refused command would make the corrected one fail."""
    config = saved / "scheduler" / "scheduler_config.json"
    original = config.read_text()
    config.write_text(json.dumps(json.loads(original) | {"variance_type": variance_type}))
    monkeypatch.setattr(UNet2DModel, "forward", lambda *_, **__: pytest.fail("the network was called"))
    before = sorted(saved.rglob("*"))
    try:
        assert sentence in error_of(capsys, saved, *QUICK, *options, "--output", tmp_path / "out")
    finally:
        config.write_text(original)
    assert sorted(saved.rglob("*")) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--metrics", "fid,lpips"], "metrics contains 'lpips', which is unknown; choose from fid, kid,"),
        ([*BOUND, "--data.resolution", "16"], "digits.parquet has images of 1x16x16 and the network makes 1x8x8"),
        ([*BOUND, "--data.num_channels", "3"], "has images of 3x8x8 and the network makes 1x8x8"),
        ([*BOUND, "--num_images", "1798"], "num_images is 1798, but there are 1797 images"),
        ([*BOUND, "--labels", "10"], "--labels has 10; a label is a whole number 0 to 9"),
        ([*BOUND, "--labels", "eigth"], "--labels has 'eigth' (did you mean 'eight'?)"),
        ([*BOUND, "--scheduler", "UniPCMultistepScheduler", "--eta", "0"], "UniPCMultistepScheduler has no eta"),
        ([*BOUND, "--scheduler", "Fancy"], "--scheduler is Fancy, which is no scheduler"),
        ([*BOUND, "--variance", "analytic"], "analytic_variance needs the second moments"),
        ([*BOUND, "--data.split", "test"], "test"),
    ],
)
def test_invalid_input_is_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, saved: Path, arguments: list[str], sentence: str
) -> None:
    assert sentence in error_of(capsys, saved, *QUICK, *arguments, "--output", tmp_path)


def test_out_of_memory_names_the_batch_size(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(UNet2DModel, "forward", fail)
    assert evaluate(saved, *QUICK, *BOUND, "--batch_size", "7", "--output", tmp_path) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line == (
        "error: out of memory (DefaultCPUAllocator: can't allocate memory); lower --batch_size, which is 7."
    )


def test_a_conditional_network_needs_labels_for_its_bound(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, saved: Path
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8), np.uint8))
    arguments = [*QUICK, *BOUND, "--data", tmp_path / "x.npy", "--output", tmp_path / "out"]
    assert "has no labels, but the network is class-conditional" in error_of(capsys, saved, *arguments)


def test_a_folder_without_a_pipeline_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert f"{tmp_path} holds no pipeline (model_index.json)" in error_of(capsys, tmp_path, *QUICK)
    assert "is not a local folder; give --output" in error_of(capsys, "user/model", *QUICK)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path, saved: Path) -> None:
    """The samples exactly; the bound to 1e-12, the order of additions."""
    arguments = ["evaluate", str(saved), *QUICK, *BOUND, "--batch_size", "3", "--output"]
    alone = forked.run_command(*arguments, tmp_path / "one")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    world["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    logs = [tmp_path / f"log_{rank}" for rank in (0, 1)]
    ranks = [
        forked.start(main.main, [*arguments, str(tmp_path / "two")], log=log, RANK=rank, LOCAL_RANK=rank, **world)
        for rank, log in zip("01", logs, strict=True)
    ]
    for process in ranks:
        process.join()
    assert [alone.returncode, *(process.exitcode for process in ranks)] == [0, 0, 0], alone.stderr
    assert logs[0].read_text().endswith(alone.stdout.replace("/one", "/two"))  # gloo may print a line before
    assert "Everything is in" not in logs[1].read_text()
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert one["metrics"][0]["value"] == pytest.approx(two["metrics"][0]["value"], rel=1e-12)
    assert one["sampling"] == two["sampling"]
    samples = [np.load(tmp_path / name / "evaluation_picture" / "samples.npy") for name in ("one", "two")]
    np.testing.assert_array_equal(*samples)
