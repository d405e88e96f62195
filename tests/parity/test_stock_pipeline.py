"""The pipeline against the stock pipelines, on the same weights and seed."""

import os

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    LDMSuperResolutionPipeline,
    UNet2DModel,
    VQModel,
)

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from tests.conftest import tiny_vae


def unet(sample_size: int | tuple[int, int] = 8, channels: int = 3, out_channels: int = 3) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=out_channels,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def images(pipe, **arguments) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=2, num_inference_steps=20, generator=generator, output_type="pt", **arguments).images


@pytest.mark.parametrize(
    ("prediction_type", "variance_type"),
    [("epsilon", "learned_range"), ("sample", "fixed_small"), ("v_prediction", "fixed_large")],
)
def test_ancestral_images_are_those_of_the_stock_pipeline(prediction_type: str, variance_type: str) -> None:
    """Float32 tables of stock: 1e-5 a step, 20 steps, and the network between them; 1e-3 of the range."""
    network = unet(out_channels=6 if variance_type == "learned_range" else 3)
    scheduler = DDPMScheduler(prediction_type=prediction_type, variance_type=variance_type)
    stock = images(DDPMPipeline(network, DDPMScheduler.from_config(scheduler.config)))
    native = images(GaussianDiffusionPipeline(network, scheduler))
    torch.testing.assert_close(native, stock, rtol=0, atol=1e-3)


def test_deterministic_images_are_those_of_the_stock_ddim_pipeline() -> None:
    """Its images come as numpy. Float32 tables as above; 1e-3 of the range."""
    network = unet()
    stock = DDIMPipeline(network, DDIMScheduler())
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    expected = stock(2, generator, 0.0, 20, use_clipped_model_output=True, output_type="np").images
    native = images(GaussianDiffusionPipeline(network, DDPMScheduler()), eta=0.0)
    torch.testing.assert_close(native.permute(0, 2, 3, 1), torch.from_numpy(expected), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_deterministic_images_of_latents_are_those_of_the_stock_ldm_pipeline(kind: str) -> None:
    """The same scheduler and the scaling factor of the VAE; rounding only."""
    vae = tiny_vae(kind, num_channels=3).eval()
    channels = 3 if kind == "VQModel" else 2
    network, scheduler = unet(channels=channels, out_channels=channels), DDIMScheduler(clip_sample=False)
    stock = LDMPipeline(vae, network, scheduler)
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    expected = stock(2, generator, num_inference_steps=20, output_type="np").images
    native = images(GaussianDiffusionPipeline(network, scheduler, vae=vae))
    torch.testing.assert_close(native.permute(0, 2, 3, 1), torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_the_stock_ldm_pipeline_does_not_give_its_generator_to_the_steps() -> None:
    """Why a folder of latents does not name it: ancestral images of one seed differ from call to call."""
    stock = LDMPipeline(tiny_vae(num_channels=3).eval(), unet(channels=2, out_channels=2), DDPMScheduler())
    stock.set_progress_bar_config(disable=True)
    first, second = (
        stock(1, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np").images for _ in range(2)
    )
    assert abs(first - second).max() > 0.05


def test_the_two_conventions_of_ddim_differ_as_documented() -> None:
    """DDPM_HF_DIGITS names the pipeline of the quickstart. Twice the documented differences at most, half at least."""
    folder = os.environ.get("DDPM_HF_DIGITS")
    if not folder:
        pytest.skip("DDPM_HF_DIGITS does not name the pipeline of the digits model")
    pipe = GaussianDiffusionPipeline.from_pretrained(folder)
    results = []
    for scheduler in (pipe.scheduler, DDIMScheduler.from_config(pipe.scheduler.config)):
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in range(100)]
        labels = [seed % 10 for seed in range(100)]
        results.append(
            pipe(class_labels=labels, generator=generators, num_inference_steps=50, eta=0.0, output_type="pt").images
        )
    difference = (results[0] - results[1]).abs()
    print(f"mean {difference.mean():.4f}, max {difference.max():.4f}")
    assert 0.0065 < difference.mean().item() < 0.026
    assert 0.08 < difference.max().item() < 0.32


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_pipelines_that_look_for_eta_sample_as_with_ddpm_scheduler(eta: float) -> None:
    """They pass their eta, 0 by default, to a scheduler whose step names it. As above, 1e-3 of the range."""
    decoder = VQModel(block_out_channels=(4,), latent_channels=3, num_vq_embeddings=4, norm_num_groups=2).eval()
    results = []
    for scheduler in (DDPMScheduler(), GaussianDiffusionScheduler()):
        pipe = LDMSuperResolutionPipeline(decoder, unet(channels=6), scheduler)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        low = torch.zeros(1, 3, 8, 8)
        results.append(pipe(low, num_inference_steps=10, eta=eta, generator=generator, output_type="np").images)
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-3)


def test_oblong_grayscale_images_are_those_of_the_stock_pipeline() -> None:
    """As above, 1e-3 of the range."""
    network = unet(sample_size=(8, 12), channels=1, out_channels=1)
    stock = images(DDPMPipeline(network, DDPMScheduler()))
    native = images(GaussianDiffusionPipeline(network, DDPMScheduler()))
    assert native.shape == (2, 1, 8, 12)
    torch.testing.assert_close(native, stock, rtol=0, atol=1e-3)


def test_a_list_of_generators_draws_what_the_stock_pipeline_draws() -> None:
    """As above, 1e-3 of the range."""
    network = unet()
    results = []
    for pipe in (DDPMPipeline(network, DDPMScheduler()), GaussianDiffusionPipeline(network, DDPMScheduler())):
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 3)]
        results.append(pipe(2, num_inference_steps=10, generator=generators, output_type="pt").images)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-3)
