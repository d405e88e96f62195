"""`ddpm-hf sample` on tiny pipelines."""

import io
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel, UniPCMultistepScheduler
from huggingface_hub import constants
from huggingface_hub.utils import _http
from PIL import Image

from ddpm_hf import distributed, files
from ddpm_hf.cli import main
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.plots import denoising_strip, image_grid
from tests import forked
from tests.integration.conftest import logged_in
from tests.loopback_hub import files_of
from tests.saved_folders import save_early_folder
from tests.unit.diffusion.oracles import tiny_unet

ANIMALS = {"0": "cat", "1": "dog", "2": "sea lion, young"}


def save(folder: Path, class_names: dict[str, str] | None = None, **unet: Any) -> Path:
    """Save a pipeline with 12 timesteps."""
    scheduler = GaussianDiffusionScheduler.create(num_train_timesteps=12)
    labels = {"num_class_embeds": len(class_names) + 1} if class_names else {}
    GaussianDiffusionPipeline(
        tiny_unet(**labels, **unet), scheduler, class_names=class_names, has_null_label=bool(class_names)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a pipeline of three classes and the null label."""
    return save(tmp_path_factory.mktemp("run") / "pipeline", ANIMALS).parent


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional pipeline."""
    return save(tmp_path_factory.mktemp("plain"))


def load(folder: Path) -> GaussianDiffusionPipeline:
    found = folder / "pipeline" if (folder / "pipeline").is_dir() else folder
    pipeline = GaussianDiffusionPipeline.from_pretrained(found)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, GaussianDiffusionPipeline)
    return pipeline


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(model: object, output: Path, *flags: object, quiet: pytest.CaptureFixture[str] | None = None) -> Path:
    """Run the command and return its folder."""
    assert main.main(["sample", str(model), "--output", str(output), *map(str, flags)]) == 0
    if quiet is not None:
        assert quiet.readouterr().err == ""
    assert json.loads((output / "settings.json").read_text())["finished"] is True
    return output


def error_of(capsys: pytest.CaptureFixture[str], model: object, output: Path, *flags: object, code: int = 2) -> str:
    """Run an invalid command and return its error message."""
    capsys.readouterr()
    assert main.main(["sample", str(model), "--output", str(output), *map(str, flags)]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# ------------------------------------------------------------------------------------------------------- seeds, labels


def test_a_seed_gives_the_image_that_python_gives(
    animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exactly. Nothing is printed on stderr, which is not a terminal here."""
    steps = ("--num_inference_steps", 6, "--eta", 0.5, "--timestep_spacing", "trailing")
    guidance = ("--labels", "dog", "--guidance_scale", 2, "--guidance_rescale", 0.5)
    output = draw(animals, tmp_path / "a", "--seeds", 7, *steps, *guidance, quiet=capsys)
    image = load(animals)(
        generator=seeded(7), class_labels=["dog"], num_inference_steps=6, eta=0.5, timestep_spacing="trailing",
        guidance_scale=2.0, guidance_rescale=0.5,
    ).images[0]  # fmt: skip
    np.testing.assert_array_equal(pixels(output / "seed_000007_dog.png"), np.asarray(image))


def test_images_are_sampled_by_unipc_unless_told_otherwise(plain: Path, tmp_path: Path) -> None:
    """In 20 steps, here in all 12."""
    output = draw(plain, tmp_path / "a", "--seeds", 7)
    pipeline = load(plain)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    image = pipeline(generator=seeded(7), num_inference_steps=12).images[0]
    np.testing.assert_array_equal(pixels(output / "seed_000007.png"), np.asarray(image))
    settings = json.loads((output / "settings.json").read_text())
    assert (settings["scheduler"], settings["timestep_spacing"]) == ("UniPCMultistepScheduler", "trailing")


def test_the_guide_and_the_interval_are_those_of_python(plain: Path, tmp_path: Path) -> None:
    """The settings identify the guide."""
    guide = save(tmp_path / "guide", seed=1)
    flags = ("--guide", guide, "--guidance_scale", 2, "--guidance_interval", "0.25,0.75", "--scheduler", "ddim")
    output = draw(plain, tmp_path / "a", "--seeds", 7, *flags)
    image = load(plain)(
        generator=seeded(7), eta=0.0, guide=load(guide), guidance_scale=2.0, guidance_interval=(0.25, 0.75)
    ).images[0]
    np.testing.assert_array_equal(pixels(output / "seed_000007.png"), np.asarray(image))
    settings = json.loads((output / "settings.json").read_text())
    assert (settings["guide"], settings["guidance_interval"]) == (str(guide), [0.25, 0.75])
    assert settings["guide_sha256"] != settings["sha256"]


def test_sampling_on_the_cpu_keeps_freed_memory(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(distributed, "keep_freed_memory", lambda: calls.append(None))
    draw(plain, tmp_path / "a", "--num_inference_steps", 1, "--device", "cpu")
    assert len(calls) == 1


def test_a_seed_gives_one_image_in_any_batch_number_and_order(animals: Path, tmp_path: Path) -> None:
    """To one gray level: rounding in the network depends on the batch size."""
    steps = ("--num_inference_steps", 4)
    whole = draw(animals, tmp_path / "whole", "--num_images", 7, "--batch_size", 3, *steps)
    names = {path.name for path in whole.glob("seed_*.png")}
    assert names == {f"seed_{seed:06d}_{('cat', 'dog', 'sea_lion_young')[seed % 3]}.png" for seed in range(7)}
    for flags in (("--seeds", "5,3,0"), ("--seeds", "2-6", "--batch_size", 1), ("--seed", 4, "--num_images", 1)):
        part = draw(animals, tmp_path / "part", *flags, *steps, "--overwrite")
        found = sorted(part.glob("seed_*.png"))
        assert len(found) in (1, 3, 5)
        for path in found:
            difference = pixels(path).astype(int) - pixels(whole / path.name)
            assert np.abs(difference).max() <= 1, path.name
    first, second = (pixels(whole / f"seed_{seed:06d}_cat.png").astype(int) for seed in (0, 3))
    assert np.abs(first - second).max() > 50


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ("cat", ["cat", "cat", "cat", "cat"]),
        ("1,cat", ["dog", "cat", "dog", "cat"]),
        ("sea lion, young", ["sea_lion_young"] * 4),
        ('"sea lion, young", 0,dog', ["sea_lion_young", "cat", "dog", "sea_lion_young"]),
        ("3", ["no_class"] * 4),
    ],
)
def test_labels_are_names_or_numbers_chosen_by_the_seed(
    animals: Path, tmp_path: Path, labels: str, classes: list[str]
) -> None:
    output = draw(animals, tmp_path / "a", "--num_images", 4, "--labels", labels, "--num_inference_steps", 1)
    expected = [f"seed_{seed:06d}_{name}.png" for seed, name in enumerate(classes)]
    assert sorted(path.name for path in output.glob("seed_*.png")) == expected
    images = json.loads((output / "settings.json").read_text())["images"]
    numbers = {"cat": 0, "dog": 1, "sea_lion_young": 2, "no_class": 3}
    assert [image["label"] for image in images] == [numbers[name] for name in classes]


def test_labels_without_a_seed_are_named(animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(animals, tmp_path / "a", "--seeds", "0,2", "--labels", "cat,dog", "--num_inference_steps", 1)
    assert "note: no seed has label dog; seed s has label s modulo 2" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- overviews


def test_the_grid_has_columns_of_classes(animals: Path, tmp_path: Path) -> None:
    """Seeds 0, 1, 3, 4, 6 of two labels: two columns each, with white cells for missing images."""
    output = draw(animals, tmp_path / "a", "--seeds", "6,0,1,3,4", "--labels", "dog,cat", "--num_inference_steps", 1)
    dog, cat = (
        [pixels(output / f"seed_{seed:06d}_{name}.png") for seed in seeds]
        for name, seeds in (("dog", (6, 0, 4)), ("cat", (1, 3)))
    )
    white = np.full_like(dog[0], 255)
    cells = np.stack([cat[0], cat[1], dog[0], dog[1], white, white, dog[2], white])
    expected = image_grid(cells, 4, column_labels=["cat", "cat", "dog", "dog"])
    np.testing.assert_array_equal(pixels(output / "grid.png"), np.asarray(expected))


def test_strip_and_animation_show_the_trajectory_of_the_images_and_change_none(plain: Path, tmp_path: Path) -> None:
    """The trajectory has 13 states, so all are kept before the strip chooses; batches are joined."""
    flags = ("--num_images", 4, "--batch_size", 3, "--scheduler", "ddpm")
    without = draw(plain, tmp_path / "without", *flags)
    output = draw(plain, tmp_path / "with", *flags, "--strip", "--animation")
    for path in without.glob("*.png"):
        assert path.read_bytes() == (output / path.name).read_bytes()
    pipeline, parts = load(plain), []
    for seeds in ((0, 1, 2), (3,)):
        way = pipeline(generator=seeded(*seeds), return_trajectory=True, output_type="uint8").trajectory
        parts.append((way * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).numpy())
    expected = denoising_strip(np.concatenate(parts, axis=1))
    np.testing.assert_array_equal(pixels(output / "strip.png"), np.asarray(expected))
    with Image.open(output / "animation.gif") as animation:
        assert animation.n_frames == 13  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------------- editing


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two images and a mask of their left half."""
    folder = tmp_path_factory.mktemp("given")
    for name, image in zip(("a", "b"), np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8), strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def test_images_are_edited_as_by_denoise_from(animals: Path, given: Path, tmp_path: Path) -> None:
    flags = ("--image", given / "a.png", given / "b.png", "--strength", 0.5, "--labels", "cat", "--seeds", "4,2")
    output = draw(animals, tmp_path / "a", *flags)
    start = [Image.open(given / f"{name}.png") for name in ("a", "a", "b", "b")]
    generator = seeded(4, 2, 4, 2)
    images = load(animals).denoise_from(start, 0.5, generator=generator, class_labels="cat", eta=0.0).images
    names = [f"{name}_seed_{seed:06d}_cat.png" for name in "ab" for seed in (4, 2)]
    for name, image in zip(names, images, strict=True):
        np.testing.assert_array_equal(pixels(output / name), np.asarray(image))
    cells = [start[0], *images[:2], start[2], *images[2:]]
    expected = image_grid(
        np.stack([np.asarray(cell) for cell in cells]), 3, column_labels=["given", "seed 4", "seed 2"]
    )
    np.testing.assert_array_equal(pixels(output / "grid.png"), np.asarray(expected))


def test_masked_images_are_edited_as_by_inpaint(animals: Path, given: Path, tmp_path: Path) -> None:
    flags = ("--image", given / "a.png", "--mask", given / "mask.png", "--labels", "dog", "--seeds", 3)
    output = draw(animals, tmp_path / "a", *flags, "--num_resamples", 2, "--jump_length", 3)
    image, mask = Image.open(given / "a.png"), Image.open(given / "mask.png")
    options: dict[str, Any] = {"generator": seeded(3), "class_labels": ["dog"]}
    expected = load(animals).inpaint(image, mask, 2, 3, **options).images[0]
    found = pixels(output / "a_seed_000003_dog.png")
    np.testing.assert_array_equal(found, np.asarray(expected))
    np.testing.assert_array_equal(found[:, 4:], np.asarray(image)[:, 4:])
    settings = json.loads((output / "settings.json").read_text())
    assert (settings["num_resamples"], settings["jump_length"], settings["num_inference_steps"]) == (2, 3, 12)
    shown = pixels(output / "grid.png")
    assert (shown[30:90, 6:30] == 127).all()


# ------------------------------------------------------------------------------------------- settings, other channels


def test_settings_record_all_that_the_images_depend_on(plain: Path, tmp_path: Path) -> None:
    scheduler = ("--scheduler", "UniPCMultistepScheduler", "--num_inference_steps", 3, "--dtype", "bfloat16")
    output = draw(plain, tmp_path / "a", "--seeds", "8,5", *scheduler, "--device", "cpu")
    settings = json.loads((output / "settings.json").read_text())
    assert set(settings.pop("versions")) == {"python", "ddpm_hf", "torch", "diffusers", "numpy", "pillow"}
    assert len(settings.pop("sha256")) == 64
    assert settings == {
        "schema_version": 1, "finished": True, "model": str(plain), "revision": None, "variant": None, "commit": None,
        "scheduler": "UniPCMultistepScheduler", "num_inference_steps": 3, "eta": None, "timestep_spacing": "leading",
        "guidance_scale": 1.0, "guidance_rescale": 0.0, "guidance_interval": [0.0, 1.0], "variance": "trained",
        "dtype": "bfloat16", "device": "cpu",
        "batch_size": 16, "compile": None, "channels_last": False,
        "images": [{"file": f"seed_00000{seed}.png", "seed": seed} for seed in (8, 5)],
        "files": ["seed_000008.png", "seed_000005.png", "grid.png"],
    }  # fmt: skip
    assert sorted(path.name for path in output.iterdir()) == sorted([*settings["files"], "settings.json"])


@pytest.mark.parametrize(("channels", "ending"), [(1, "png"), (4, "png"), (5, "npy")])
def test_images_of_any_channels_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], channels: int, ending: str
) -> None:
    model = save(tmp_path / "model", in_channels=channels, out_channels=channels)
    output = draw(model, tmp_path / "a", "--seeds", 1, "--num_inference_steps", 2, "--eta", 1)
    expected = load(model)(generator=seeded(1), num_inference_steps=2, output_type="uint8").images[0]
    path = output / f"seed_000001.{ending}"
    found = np.load(path) if ending == "npy" else pixels(path).reshape(8, 8, channels)
    np.testing.assert_array_equal(found, expected)
    assert (output / "grid.png").exists()
    said = "PNG cannot hold 5 channels" in capsys.readouterr().out
    assert said == (ending == "npy")


def test_values_are_written_and_edited_in_the_range_of_the_model(plain: Path, tmp_path: Path) -> None:
    """As pictures by default, as arrays on request or if PNG has no such channels."""
    model = load(plain)
    ranged = GaussianDiffusionPipeline(model.unet, model.scheduler, value_range=[-1000, 400])
    ranged.save_pretrained(tmp_path / "model")
    few = ("--seeds", 1, "--num_inference_steps", 2, "--eta", 1)
    output = draw(tmp_path / "model", tmp_path / "a", *few, "--format", "npy")
    values = np.load(output / "seed_000001.npy")
    expected = ranged(generator=seeded(1), num_inference_steps=2, output_type="np").images[0]
    np.testing.assert_array_equal(values, expected)
    shown = draw(tmp_path / "model", tmp_path / "b", *few)
    assert np.abs(pixels(shown / "seed_000001.png") / 255 * 1400 - 1000 - values).max() < 1400 / 255
    np.testing.assert_array_equal(pixels(shown / "grid.png"), pixels(output / "grid.png"))
    edit = ("--image", output / "seed_000001.npy", "--strength", 0.5)
    edited = np.load(
        draw(tmp_path / "model", tmp_path / "c", *few, *edit, "--format", "npy") / "seed_000001_seed_000001.npy"
    )
    again = ranged.denoise_from(values, 0.5, generator=seeded(1), num_inference_steps=2, output_type="np").images[0]
    np.testing.assert_allclose(edited, again, atol=1e-2)
    latents = save(tmp_path / "latents", in_channels=4, out_channels=4)
    GaussianDiffusionPipeline(load(latents).unet, model.scheduler, value_range=[-4, 4]).save_pretrained(latents)
    output = draw(latents, tmp_path / "d", *few)
    assert (output / "seed_000001.npy").exists()
    height, width, _ = pixels(output / "grid.png").shape
    assert width > 2 * height, "four planes, not color and transparency"


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("model", "flags", "sentence"),
    [
        (
            "animals",
            "--labels dgo",
            "--labels has 'dgo' (did you mean 'dog'?); a label is a whole number 0 to 2, 3 for no",
        ),
        ("animals", "--labels 4", "--labels has 4; a label is a whole number 0 to 2, 3 for no class"),
        ("animals", "--labels cat,,dog", "--labels is 'cat,,dog'; give names or numbers"),
        ("plain", "--labels 1", "--labels are given, but the model is unconditional; leave them out."),
        ("plain", "--guidance_scale 2", "no null label to guide against"),
        (
            "plain",
            "--scheduler unip",
            "--scheduler is unip, which is no scheduler (did you mean 'unipc'?); give one of",
        ),
        ("plain", "--scheduler ddpm --eta 0", "--scheduler ddpm samples with eta 1, but eta is 0; remove one of them."),
        ("plain", "--scheduler unipc --timestep_spacing quadratic", "which UniPCMultistepScheduler does not have"),
        ("plain", "--guide ./nowhere --guidance_scale 2", "--guide nowhere is neither a local folder nor"),
        (
            "plain",
            "--guidance_interval 0.8,0.2",
            "--guidance_interval is 0.8,0.2, but must be start,stop with 0 <= start",
        ),
        ("plain", "--scheduler ScoreSdeVeScheduler", "does not run a denoising diffusion process"),
        ("plain", "--scheduler DPMSolverMultistepScheduler --eta 0", "DPMSolverMultistepScheduler has no eta"),
        ("plain", "--variance analytic", "analytic_variance needs the second moments"),
        ("plain", "--num_inference_steps 13", "num_inference_steps 13 is not between 1 and 12"),
        ("plain", "--device tpu", "--device is tpu, but must be cpu, cuda, cuda:1 or mps."),
        ("plain", "--device cuda:99", "--device is cuda:99, but this machine has"),
        ("plain", "--variant fp16", "variant=fp16"),
        ("plain", "--image given/a.png --strength 0.01", "strength 0.01 of 12 steps is none"),
        ("user/model", "", "is neither a local folder nor in the cache, and HF_HUB_OFFLINE is set"),
    ],
)
def test_invalid_input_is_refused_before_anything_is_written(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: Path,
    model: str,
    flags: str,
    sentence: str,
) -> None:
    folder = model if "/" in model else request.getfixturevalue(model)
    assert sentence in error_of(capsys, folder, tmp_path / "a", *flags.replace("given", str(given)).split())
    assert not (tmp_path / "a").exists()


def test_messages_of_diffusers_are_dropped_after_an_error_and_kept_otherwise(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers logs a paragraph of its own about a repository that cannot be found."""
    messages = io.StringIO()
    logger = logging.getLogger("diffusers")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(messages)])
    assert "HF_HUB_OFFLINE is set" in error_of(capsys, "user/model", tmp_path / "a")
    assert messages.getvalue() == ""
    index = json.loads((plain / "model_index.json").read_text()) | {"unknown_setting": True}
    changed = Path(shutil.copytree(plain, tmp_path / "changed"))
    (changed / "model_index.json").write_text(json.dumps(index))
    draw(changed, tmp_path / "a", "--seeds", 1, "--num_inference_steps", 2)
    assert "unknown_setting" in messages.getvalue()
    assert len(logger.handlers) == 1


def test_only_pickles_and_broken_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_early_folder(tmp_path / "pickled", pickled=True)
    assert "has no weights in the safetensors format" in error_of(capsys, tmp_path / "pickled", tmp_path / "a")
    broken = save(tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    assert f"{broken} holds no pipeline that can be loaded: " in error_of(capsys, broken, tmp_path / "a")
    assert "holds 2 pipelines, " in error_of(capsys, tmp_path, tmp_path / "a")


def test_a_stock_folder_of_an_early_release_is_sampled(tmp_path: Path) -> None:
    save_early_folder(tmp_path / "early")
    output = draw(tmp_path / "early", tmp_path / "a", "--seeds", 3, "--num_inference_steps", 2)
    assert pixels(output / "seed_000003.png").shape == (32, 32, 3)


def test_a_target_that_cannot_be_written_is_exit_code_1(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert "file/a" in error_of(capsys, plain, tmp_path / "file" / "a", "--seeds", 1, code=1)


# ------------------------------------------------------------------------------------------------- memory, interruption


def failing_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int, error: BaseException) -> None:
    """Make a function of a library fail after some calls."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = iter(range(count))

    def function(*arguments: Any, **keywords: Any) -> Any:
        if next(calls, None) is None:
            raise error
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_batch_size(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failing_after(monkeypatch, UNet2DModel, "forward", 0, error)
    sentence = error_of(capsys, plain, tmp_path / "a", "--seeds", 1, "--batch_size", 9, code=1)
    assert sentence.startswith("out of memory (")
    assert sentence.endswith("; lower --batch_size, which is 9.")


def test_another_runtime_error_is_not_out_of_memory(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_after(monkeypatch, UNet2DModel, "forward", 0, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main.main(["sample", str(plain), "--output", str(tmp_path / "a"), "--seeds", "1"])


def test_an_interrupt_during_the_sync_of_an_image_counts_it(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has its final name, and only its folder is not synced yet."""
    sync = files.sync

    def interrupted(path: Path) -> None:
        sync(path)
        if (tmp_path / "a" / "seed_000001.png").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "sync", interrupted)
    flags = ("--num_images", 3, "--batch_size", 3, "--num_inference_steps", 1)
    sentence = error_of(capsys, plain, tmp_path / "a", *flags, code=130)
    assert sentence == f"interrupted; 2 of 3 images are in {tmp_path / 'a'}."


def test_an_interrupted_call_leaves_whole_files_and_says_how_many(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt arrives in the second batch; --overwrite replaces the files of the interrupted call."""
    with monkeypatch.context() as patch:
        failing_after(patch, UNet2DModel, "forward", 3, KeyboardInterrupt())
        flags = ("--num_images", 5, "--batch_size", 2, "--num_inference_steps", 2)
        sentence = error_of(capsys, plain, tmp_path / "a", *flags, code=130)
    assert sentence == f"interrupted; 2 of 5 images are in {tmp_path / 'a'}."
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "seed_000000.png", "seed_000001.png", "settings.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["finished"] is False
    draw(plain, tmp_path / "a", "--seeds", 9, "--num_inference_steps", 1, "--overwrite")
    assert not (tmp_path / "a" / "seed_000000.png").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_ends_the_process_with_130_and_whole_files(plain: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "a", tmp_path / "log"
    command = ["sample", str(plain), "--output", str(output), "--num_images", "100000", "--batch_size", "1"]
    process = forked.start(main.main, command, log=log)
    while process.is_alive() and not (output / "seed_000003.png").exists():
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    written = list(output.glob("*.png"))
    assert Path(f"{log}.err").read_text() == f"error: interrupted; {len(written)} of 100000 images are in {output}.\n"
    for path in written:
        assert pixels(path).shape == (8, 8, 3)
    assert not list(output.glob(".*"))


# ---------------------------------------------------------------------------------------------------------------- Hub


@pytest.mark.timeout(300)
def test_hub_repositories_are_sampled_also_from_the_cache_and_refused_in_one_sentence(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    save_early_folder(tmp_path / "pickled", pickled=True)
    flags = ("--revision", "v1", "--seeds", 1, "--num_inference_steps", 2)
    with logged_in() as hub:
        monkeypatch.delenv("HF_TOKEN")
        repository = hub.repository("user/model")
        repository.tags["v1"] = first = repository.commit(files_of(plain))
        repository.commit(files_of(plain) | {"README.md": b"# New\n"})
        hub.repository("user/private").commit(files_of(plain))
        hub.repository("user/private").private = True
        hub.repository("user/data").commit({"README.md": b"# Data\n"})
        hub.repository("user/pickled").commit(files_of(tmp_path / "pickled"))
        draw("user/model", tmp_path / "a", *flags)
        cannot_read = "is neither a local folder nor a repository that you can read"
        for name, more, sentence in (
            ("user/nothing", (), cannot_read),
            ("user/private", (), cannot_read),
            ("user/data", (), "is a repository without a pipeline"),
            ("user/pickled", (), "has no weights in the safetensors format"),
            ("user/model", ("--revision", "v2"), "has no revision v2"),
        ):
            assert error_of(capsys, name, tmp_path / "b", *more).startswith(f"{name} {sentence}")
        endpoint = hub.endpoint
    assert not (tmp_path / "b").exists()
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["commit"] == first
    with monkeypatch.context() as patch:  # the Hub is gone
        for name, value in (("ENDPOINT", endpoint), ("HF_HUB_OFFLINE", False)):
            patch.setattr(constants, name, value)
        _http.close_session()
        draw("user/model", tmp_path / "c", *flags)
        assert "Hub cannot be reached" in error_of(capsys, "user/nothing", tmp_path / "b")
    _http.close_session()
    assert "HF_HUB_OFFLINE is set" in error_of(capsys, "user/nothing", tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").glob("*.png"))
    assert names == ["grid.png", "seed_000001.png"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
