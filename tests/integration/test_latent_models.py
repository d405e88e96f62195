"""The commands on a saved pipeline of latents of a VAE: images of 8x8 and latents of 2x4x4."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ddpm_hf.cli.common import load_pipeline
from ddpm_hf.cli.main import main
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation import timesteps
from ddpm_hf.evaluation.generate import Sampler, fingerprint
from ddpm_hf.evaluation.verify import write_verification
from ddpm_hf.hub.card import make_card
from ddpm_hf.hub.push import assemble
from ddpm_hf.model_folder import find_model
from tests.saved_folders import make_pipeline

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent") / "pipeline"
    make_pipeline("latent").save_pretrained(folder)
    write_verification(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8))
    return path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_sample_writes_decoded_images_and_states(saved: Path, tmp_path: Path) -> None:
    output, call = tmp_path / "samples", {"num_inference_steps": 3, "eta": 0.0}
    flags = ["--num_inference_steps", 3, "--eta", 0.0, "--num_images", 2, "--strip"]
    assert run("sample", saved, "--output", output, *flags) == 0
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    expected = make_pipeline("latent")(generator=generators, output_type="uint8", **call).images
    for number in range(2):
        found = pixels(output / f"seed_{number:06d}.png").astype(int)
        assert abs(found - expected[number]).max() <= 1
    assert (output / "strip.png").is_file()


def test_commands_decode_in_float32_in_any_precision_of_the_network(saved: Path) -> None:
    pipeline = load_pipeline(str(saved), find_model(saved), dtype=torch.float16)
    assert (pipeline.unet.dtype, pipeline.vae.dtype) == (torch.float16, torch.float32)


def test_sample_fills_images_and_keeps_the_rest(saved: Path, tmp_path: Path) -> None:
    given = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[3:6, 1:4] = 255
    Image.fromarray(given).save(tmp_path / "given.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = ["--num_inference_steps", 2, "--num_images", 1, "--num_resamples", 1]
    edits = ["--image", tmp_path / "given.png", "--mask", tmp_path / "mask.png", "--output", tmp_path / "edited"]
    assert run("sample", saved, *flags, *edits) == 0
    found = pixels(tmp_path / "edited" / "given_seed_000000.png")
    np.testing.assert_array_equal(found[mask == 0], given[mask == 0])
    assert (found[mask > 0] != given[mask > 0]).any()


def test_evaluate_compares_decoded_images_and_labels_bits_as_of_latents(
    saved: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", data, "--cpu", "--num_inference_steps", 2, "--num_samples", 4, "--num_terms", 2]
    output = tmp_path / "evaluation"
    assert run("evaluate", saved, *flags, "--metrics", "memorization,bits_per_dim", "--output", output) == 0
    assert "bits_per_dim is of latents" in capsys.readouterr().out
    samples = np.load(output / "evaluation_samples" / "samples.npy")
    assert samples.shape == (4, 8, 8, 3)
    content = json.loads((output / "evaluation.json").read_text())
    memorization, bits = content["metrics"]
    assert (memorization["features"], bits["of"], content["bound"]["of"]) == ("pixels", "latents", "latents")


def test_verify_detects_another_vae(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", saved) == 0
    shutil.copytree(saved, tmp_path / "other")
    vae = AutoencoderKL.from_pretrained(saved / "vae")
    vae.decoder.conv_out.bias.data += 0.1
    vae.save_pretrained(tmp_path / "other" / "vae")
    assert run("verify", tmp_path / "other") == 1
    assert "have other values (vae.decoder.conv_out.bias)" in capsys.readouterr().out


def test_samples_depend_on_the_vae_and_the_scale_of_its_latents() -> None:
    pipeline = make_pipeline("latent")
    before = Sampler().prepare(pipeline)
    assert before.vae is pipeline.vae
    prints = {fingerprint(before)}
    pipeline.register_to_config(latents_std=[0.5, 2.5])
    prints.add(fingerprint(Sampler().prepare(pipeline)))
    pipeline.vae.decoder.conv_out.bias.data += 0.1
    prints.add(fingerprint(Sampler().prepare(pipeline)))
    assert len(prints) == 3


def test_timesteps_are_chosen_by_decoded_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timesteps, "NUM_CANDIDATES", 8)
    folder = tmp_path / "pipeline"
    make_pipeline("latent").save_pretrained(folder)
    assert run("timesteps", folder, "--steps", 2, "--num_images", 1) == 0
    assert "optimized_timesteps" in json.loads((folder / "model_index.json").read_text())


def test_a_student_learns_on_the_latents_of_its_teacher(saved: Path, data: Path, tmp_path: Path) -> None:
    """Of a folder without settings; the latents of other images have another mean."""
    flags = ["--data.source", data, "--output", tmp_path / "students", "--data.cache_dir", tmp_path / "cache"]
    flags += ["--training.num_steps", 1, "--training.train_batch_size", 2, "--preview.every_steps", 0]
    flags += ["--evaluation.num_samples", 0]
    assert run("distill", saved, "--steps", 2, *flags) == 2
    statistics = {"latents_mean": None, "latents_std": None}
    folder = tmp_path / "scaled"
    pipeline = make_pipeline("latent")
    GaussianDiffusionPipeline(pipeline.unet, pipeline.scheduler, vae=pipeline.vae, **statistics).save_pretrained(folder)
    assert run("distill", folder, "--steps", 2, *flags) == 0
    student = GaussianDiffusionPipeline.from_pretrained(tmp_path / "students" / "steps_2" / "pipeline")
    assert student.image_shape == (3, 8, 8)
    for name, weight in pipeline.vae.state_dict().items():
        assert student.vae.state_dict()[name].equal(weight)


def test_a_published_model_has_its_vae_and_says_so(saved: Path, tmp_path: Path) -> None:
    assert find_model(saved).kind == "pipeline"
    assemble(saved, tmp_path / "repository", fp16=True)
    names = {path.name for path in (tmp_path / "repository" / "vae").iterdir()}
    assert names == {"config.json", *(f"diffusion_pytorch_model{kind}.safetensors" for kind in ("", ".fp16"))}
    text = make_card(tmp_path / "repository", repo_id="user/model").text
    assert "generates 8x8 RGB images" in text
    assert "latent DDPM" in text
    assert "does not decode latents" in text
    assert "on the latents of an `AutoencoderKL`" in text


def test_the_page_samples_morphs_and_edits_decoded_images(monkeypatch: pytest.MonkeyPatch) -> None:
    slider: Any = lambda *args, **options: SimpleNamespace(args=args, **options)  # noqa: E731
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(Error=ValueError, Slider=slider, Blocks=object))
    monkeypatch.delitem(sys.modules, "ddpm_hf.demo", raising=False)
    page = importlib.import_module("ddpm_hf.demo").Page(make_pipeline("latent"))
    sys.modules.pop("ddpm_hf.demo")
    assert (page.width, page.height) == (8, 8)
    for picture, frames, _ in (page.sample(0, 1, "any", 1.0, 2, "UniPC"), page.morph(0, 1, "any", 1.0, 2)):
        assert picture.mode == "RGB"
        assert frames[0].shape[1:] == (8, 8, 3)
    page.vary(Image.new("RGB", (20, 10)), 0.05, 0, 1, "any", 1.0)
