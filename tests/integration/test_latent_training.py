"""From images to a VAE, a model of its latents and decoded samples that are recognized."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from ddpm_hf.cli.main import train
from ddpm_hf.config import load_config
from ddpm_hf.data import normalize, open_images
from tests.conftest import DIGITS, REPOSITORY

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

RECIPE = REPOSITORY / "configs" / "digits_8.yaml"


def train_vae(folder: Path, num_steps: int) -> float:
    """Save an AutoencoderKL of the digits, with latents of 4x4x4, and return its mean squared error in [-1, 1]."""
    torch.manual_seed(0)
    images = open_images(load_config(RECIPE, {"data.source": str(DIGITS)}).data, with_labels=False)
    x_0 = normalize(torch.from_numpy(images.take(images.positions)[0]))
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=8,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.Adam(vae.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, num_steps)
    for _ in range(num_steps):
        batch = x_0[torch.randint(len(x_0), (64,))]
        latents = vae.encode(batch).latent_dist
        loss = ((vae.decode(latents.sample()).sample - batch) ** 2).mean() + 1e-6 * latents.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    vae.save_pretrained(folder)
    return float(((vae.decode(vae.encode(x_0).latent_dist.mean).sample - x_0) ** 2).mean())


@pytest.mark.slow
def test_samples_of_a_model_of_latents_are_recognized(tmp_path: Path) -> None:
    """A noisy image has an error of about 0.5; a classifier that guesses recognizes 10 %."""
    error = train_vae(tmp_path / "vae", 600)
    assert error < 0.05
    run = tmp_path / "run"
    settings = {
        "data.source": DIGITS,
        "data.vae": tmp_path / "vae",
        "data.latent_normalization": "measured",
        "data.cache_dir": tmp_path / "cache",
        "diffusion.clip_sample": "false",
        "training.num_steps": 400,
        "training.output_dir": run,
        "evaluation.num_samples": 100,
        "evaluation.batch_size": 50,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert train(["--config", str(RECIPE), *words]) == 0
    report = json.loads((run / "recognition.json").read_text(encoding="utf-8"))
    assert report["recognised"] > 0.8
