"""Saved folders, loaded in three ways, each way in a process of its own with empty caches and no network.

The processes that must not know ddpm_hf are given a `sys.modules` that refuses it, and start in another folder. Loading
a process's libraries takes seconds, so each of the three processes loads all folders that its way is about.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler

REPOSITORY = Path(__file__).parents[2]
WITHOUT_DDPM_HF = "import sys\nsys.modules['ddpm_hf'] = None\n"
PREAMBLE = """
import json, diffusers, torch
results, said = {}, {}
def sample(name, load, **arguments):
    try:
        pipe = load(name)
    except (ValueError, ImportError) as error:
        said[name] = f"{type(error).__name__}: {error}"
        return
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    results[name] = pipe(
        batch_size=2, num_inference_steps=10, generator=generator, output_type="pt", **arguments
    ).images
    return pipe
"""
GUIDED_CALL = "class_labels=['dog', 'cat'], guidance_scale=2.0, eta=0.0"
WAY_1 = """
load = diffusers.DiffusionPipeline.from_pretrained
assert type(sample("plain", load)) is diffusers.DDPMPipeline
sample("stock", load)
sample("self_conditioned", load)
"""
WAY_2 = f"""
def load(name):
    return diffusers.DiffusionPipeline.from_pretrained(name, custom_pipeline=name, trust_remote_code=True)
pipe = sample("plain", load)
assert type(pipe).__module__ == "diffusers_modules.local.pipeline"
assert type(pipe.scheduler).__name__ == "GaussianDiffusionScheduler"
pipe.save_pretrained("plain_again")
sample("guided", load, {GUIDED_CALL}).save_pretrained("guided_again")
sample("self_conditioned", load).save_pretrained("self_conditioned_again")
sample("newer", load)
"""
WAY_3 = f"""
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
load = GaussianDiffusionPipeline.from_pretrained
for name in ("plain", "stock", "self_conditioned", "newer"):
    pipe = sample(name, load)
    assert type(pipe) is GaussianDiffusionPipeline and type(pipe.scheduler) is GaussianDiffusionScheduler
sample("guided", load, {GUIDED_CALL})
"""


class Loaded(NamedTuple):
    """The folders, and by way and folder the images or the sentence of the refusal."""

    folder: Path
    images: dict[str, dict[str, torch.Tensor]]
    said: dict[str, dict[str, str]]


def tiny_unet(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**config | changes).eval()


def save_folders(folder: Path) -> None:
    """Plain; guided; self-conditioned, which stock would sample wrongly; newer code; and one by stock itself."""
    cosine = GaussianDiffusionScheduler.create(beta_schedule="cosine", prediction_type="v")
    plain = GaussianDiffusionPipeline(tiny_unet(), cosine)
    plain.save_pretrained(folder / "plain")
    plain.save_pretrained(folder / "newer")
    for path in (folder / "newer").glob("*.py"):
        path.write_text(path.read_text().replace('CORE_VERSION = "', 'CORE_VERSION = "9.'))
    GaussianDiffusionPipeline(
        tiny_unet(num_class_embeds=3), cosine, class_names={"0": "cat", "1": "dog"}, has_null_label=True
    ).save_pretrained(folder / "guided")
    GaussianDiffusionPipeline(tiny_unet(in_channels=6), cosine, self_conditioned=True).save_pretrained(
        folder / "self_conditioned"
    )
    # As the google/ddpm-* repositories, whose files are older and know fewer options.
    network = tiny_unet(flip_sin_to_cos=False, freq_shift=1, downsample_padding=0, norm_eps=1e-6)
    DDPMPipeline(network, DDPMScheduler(variance_type="fixed_large")).save_pretrained(folder / "stock")
    path = folder / "stock" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    for key in ("timestep_spacing", "steps_offset", "rescale_betas_zero_snr", "thresholding", "prediction_type"):
        del config[key]
    path.write_text(json.dumps(config))


def run(way: str, code: str, folder: Path, home: Path, with_ddpm_hf: bool) -> None:
    """Execute code in a fresh process that leaves its results in the folder."""
    home.mkdir()
    finish = f"\ntorch.save(results, {way + '.pt'!r})\nopen({way + '.json'!r}, 'w').write(json.dumps(said))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if with_ddpm_hf:
        environment["PYTHONPATH"] = str(REPOSITORY)
    process = subprocess.run(
        [sys.executable, "-c", ("" if with_ddpm_hf else WITHOUT_DDPM_HF) + PREAMBLE + code + finish],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder, homes = tmp_path_factory.mktemp("folders"), tmp_path_factory.mktemp("homes")
    save_folders(folder)
    ways = {"stock": (WAY_1, False), "consent": (WAY_2, False), "installed": (WAY_3, True)}
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(run, way, code, folder, homes / way, known) for way, (code, known) in ways.items()]
        for finished in runs:
            finished.result()
    images = {way: torch.load(folder / f"{way}.pt", weights_only=True) for way in ways}
    return Loaded(folder, images, {way: json.loads((folder / f"{way}.json").read_text()) for way in ways})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_folder_gives_the_same_images_in_all_three_ways(loaded: Loaded) -> None:
    """Native ways agree exactly; stock differs by its float32 tables, 10 steps of 1e-5 with the network between."""
    stock, consent, installed = (loaded.images[way]["plain"] for way in ("stock", "consent", "installed"))
    assert torch.equal(consent, installed)
    torch.testing.assert_close(stock, installed, rtol=0, atol=1e-3)
    assert (installed[0] - installed[1]).abs().max().item() > 0.1


@pytest.mark.parametrize("name", ["plain", "guided", "self_conditioned"])
def test_a_folder_loaded_without_ddpm_hf_saves_itself_again(loaded: Loaded, name: str) -> None:
    assert contents(loaded.folder / name) == contents(loaded.folder / f"{name}_again")


def test_labels_names_and_guidance_work_without_ddpm_hf(loaded: Loaded) -> None:
    assert torch.equal(loaded.images["consent"]["guided"], loaded.images["installed"]["guided"])


def test_a_folder_that_stock_would_sample_wrongly_is_refused_without_consent_except_by_the_installed_class(
    loaded: Loaded,
) -> None:
    """The sentence is that of diffusers."""
    sentence = loaded.said["stock"]["self_conditioned"]
    assert sentence.startswith("ValueError")
    assert "contains custom code in pipeline.py which must be executed" in sentence
    assert "Pass `trust_remote_code=True`" in sentence
    assert torch.equal(loaded.images["consent"]["self_conditioned"], loaded.images["installed"]["self_conditioned"])


def test_a_second_folder_in_one_process_is_refused_if_its_code_is_of_another_version(loaded: Loaded) -> None:
    """Diffusers executes only the second folder's pipeline.py, beside the first one's files.

    The installed class has its own files, so it loads both.
    """
    assert loaded.said["consent"]["newer"].startswith("ImportError: pipeline.py has version 9.")
    assert "Restart Python before loading this one, or install ddpm_hf" in loaded.said["consent"]["newer"]
    assert torch.equal(loaded.images["installed"]["newer"], loaded.images["installed"]["plain"])
    assert loaded.said["installed"] == {}


def test_a_folder_of_the_stock_pipeline_samples_the_same_as_stock(loaded: Loaded) -> None:
    """1e-3: float32 tables of stock, as above."""
    torch.testing.assert_close(loaded.images["installed"]["stock"], loaded.images["stock"]["stock"], rtol=0, atol=1e-3)
