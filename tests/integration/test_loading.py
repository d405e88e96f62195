"""One saved folder, loaded in three ways, each in a process of its own with empty caches and no network.

The processes that must not know ddpm_hf are given a `sys.modules` that refuses it, and start in another folder.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler

REPOSITORY = Path(__file__).parents[2]
SAMPLE = """
import torch
def sample(pipe, **arguments):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=2, num_inference_steps=10, generator=generator, output_type="pt", **arguments).images
"""
WAY_1 = """
pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
assert type(pipe) is diffusers.DDPMPipeline, type(pipe)
"""
WAY_2 = """
pipe = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
assert type(pipe).__module__ == "diffusers_modules.local.pipeline", type(pipe)
assert type(pipe.scheduler).__name__ == "GaussianDiffusionScheduler", type(pipe.scheduler)
"""
WAY_3 = """
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
pipe = GaussianDiffusionPipeline.from_pretrained(folder)
assert type(pipe) is GaussianDiffusionPipeline and type(pipe.scheduler) is GaussianDiffusionScheduler
"""


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


def run(tmp_path: Path, folder: Path, code: str, with_ddpm_hf: bool) -> subprocess.CompletedProcess[str]:
    """Execute code that finds `folder`, `result`, a path for tensors, and `sample` in a fresh process."""
    home = tmp_path / f"home_{len(list(tmp_path.iterdir()))}"
    home.mkdir()
    preamble = "" if with_ddpm_hf else "import sys; sys.modules['ddpm_hf'] = None\n"
    preamble += f"import diffusers\nfolder, result = {str(folder)!r}, {str(tmp_path / 'result.pt')!r}\n{SAMPLE}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    kept |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if with_ddpm_hf:
        kept["PYTHONPATH"] = str(REPOSITORY)
    return subprocess.run(
        [sys.executable, "-c", preamble + code], cwd=home, env=kept, capture_output=True, text=True, timeout=240
    )


def images(tmp_path: Path, folder: Path, code: str, with_ddpm_hf: bool, call: str = "sample(pipe)") -> torch.Tensor:
    """What a fresh process samples from the folder."""
    process = run(tmp_path, folder, f"{code}\ntorch.save({call}, result)", with_ddpm_hf)
    assert process.returncode == 0, process.stderr
    return torch.load(tmp_path / "result.pt", weights_only=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_folder_gives_the_same_images_in_all_three_ways_and_saves_itself_again(tmp_path: Path) -> None:
    """Native ways agree exactly; stock differs by its float32 tables, 10 steps of 1e-5 and the network between: 1e-3."""
    folder = tmp_path / "model"
    scheduler = GaussianDiffusionScheduler.create(beta_schedule="cosine", prediction_type="v")
    GaussianDiffusionPipeline(tiny_unet(), scheduler).save_pretrained(folder)
    stock = images(tmp_path, folder, WAY_1, with_ddpm_hf=False)
    resave = "\npipe.save_pretrained(folder + '_again')"
    consented = images(tmp_path, folder, WAY_2 + resave, with_ddpm_hf=False)
    installed = images(tmp_path, folder, WAY_3, with_ddpm_hf=True)
    assert torch.equal(consented, installed)
    torch.testing.assert_close(stock, installed, rtol=0, atol=1e-3)
    assert (installed[0] - installed[1]).abs().max().item() > 0.1
    assert contents(folder) == contents(tmp_path / "model_again")


def test_a_guided_folder_gives_the_same_images_without_ddpm_hf(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    names = {"0": "cat", "1": "dog"}
    GaussianDiffusionPipeline(
        tiny_unet(num_class_embeds=3), GaussianDiffusionScheduler(), class_names=names, has_null_label=True
    ).save_pretrained(folder)
    call = "sample(pipe, class_labels=['dog', 'cat'], guidance_scale=2.0, eta=0.0)"
    consented = images(tmp_path, folder, WAY_2, with_ddpm_hf=False, call=call)
    installed = images(tmp_path, folder, WAY_3, with_ddpm_hf=True, call=call)
    assert torch.equal(consented, installed)


def test_a_folder_that_stock_would_sample_wrongly_needs_consent_and_is_refused_with_a_sentence(tmp_path: Path) -> None:
    """The sentence is that of diffusers; the installed class needs no consent."""
    folder = tmp_path / "model"
    GaussianDiffusionPipeline(
        tiny_unet(in_channels=6), GaussianDiffusionScheduler(), self_conditioned=True
    ).save_pretrained(folder)
    refused = run(tmp_path, folder, WAY_1, with_ddpm_hf=False)
    assert refused.returncode == 1
    assert "contains custom code in pipeline.py which must be executed" in refused.stderr
    assert "Pass `trust_remote_code=True`" in refused.stderr
    consented = images(tmp_path, folder, WAY_2 + "\npipe.save_pretrained(folder + '_again')", with_ddpm_hf=False)
    assert torch.equal(consented, images(tmp_path, folder, WAY_3, with_ddpm_hf=True))
    assert contents(folder) == contents(tmp_path / "model_again")


def test_two_folders_load_in_one_process_unless_their_code_differs(tmp_path: Path) -> None:
    """Diffusers executes only the second pipeline.py, beside the first folder's files."""
    pipe = GaussianDiffusionPipeline(tiny_unet(), GaussianDiffusionScheduler())
    for name in ("first", "same", "newer"):
        pipe.save_pretrained(tmp_path / name)
    for path in (tmp_path / "newer").glob("*.py"):
        path.write_text(path.read_text().replace('CORE_VERSION = "', 'CORE_VERSION = "9.'))
    code = f"""
def load(name):
    folder = {str(tmp_path)!r} + "/" + name
    return diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
first, same = load("first"), load("same")
torch.save(torch.stack([sample(first), sample(same)]), result)
try:
    load("newer")
except ImportError as error:
    print(error)
"""
    process = run(tmp_path, tmp_path / "first", code, with_ddpm_hf=False)
    assert process.returncode == 0, process.stderr
    both = torch.load(tmp_path / "result.pt", weights_only=True)
    assert torch.equal(both[0], both[1])
    assert "Restart Python before loading this one, or install ddpm_hf" in process.stdout


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_a_folder_of_the_stock_pipeline_samples_the_same_as_stock(tmp_path: Path, variance_type: str) -> None:
    """Laid out as the google/ddpm-* repositories, whose older files know fewer options. 1e-3: float32 tables of stock."""
    network = tiny_unet(flip_sin_to_cos=False, freq_shift=1, downsample_padding=0, norm_eps=1e-6)
    DDPMPipeline(network, DDPMScheduler(variance_type=variance_type)).save_pretrained(tmp_path / "stock")
    path = tmp_path / "stock" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    for key in ("timestep_spacing", "steps_offset", "rescale_betas_zero_snr", "thresholding", "prediction_type"):
        del config[key]
    path.write_text(json.dumps(config))
    stock = images(tmp_path, tmp_path / "stock", WAY_1, with_ddpm_hf=False)
    native = images(tmp_path, tmp_path / "stock", WAY_3, with_ddpm_hf=True)
    torch.testing.assert_close(native, stock, rtol=0, atol=1e-3)
