"""A pipeline of a network on the latents of a VAE."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LDMPipeline

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler, latents
from tests.conftest import tiny_vae
from tests.unit.diffusion.oracles import seeded, tiny_unet

KINDS = ("AutoencoderKL", "AutoencoderTiny", "VQModel")
MASK = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
MASK[..., 3:10, 5:11] = True


def make_pipeline(kind: str = "AutoencoderKL", **settings: Any) -> GaussianDiffusionPipeline:
    """Return a pipeline of RGB images of 16x16 and latents of 8x8."""
    vae = tiny_vae(kind, num_channels=3).eval()
    channels = latents.latent_channels(vae)
    unet = tiny_unet(in_channels=channels, out_channels=channels)
    pipeline = GaussianDiffusionPipeline(
        unet, GaussianDiffusionScheduler.create(clip_sample=False), vae=vae, **settings
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reconstruction(pipeline: GaussianDiffusionPipeline, images: torch.Tensor) -> torch.Tensor:
    """Encode and decode images in [0, 1] by the VAE alone."""
    with torch.no_grad():
        encoded = pipeline.vae.encode(images * 2 - 1)
        z = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
        decoded: torch.Tensor = pipeline.vae.decode(z).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_decoded_latents_in_the_scale_of_the_vae(kind: str) -> None:
    pipeline = make_pipeline(kind)
    call = {"num_inference_steps": 3, "batch_size": 2, "return_trajectory": True}
    state, states = pipeline(**call, generator=seeded(), output_type="latent", return_dict=False)
    output = pipeline(**call, generator=seeded(), output_type="pt")
    assert state.shape[1:] == pipeline.sample_shape
    with torch.no_grad():
        decoded = pipeline.vae.decode(state / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(output.images, (decoded / 2 + 0.5).clamp(0, 1))
    assert output.images.shape[1:] == pipeline.image_shape == (3, 16, 16)
    assert (states.shape[1:], output.trajectory.shape[1:]) == (state.shape, output.images.shape)
    torch.testing.assert_close(output.trajectory[-1], output.images)


def test_latents_are_normalized_as_the_vae_says_unless_they_were_measured() -> None:
    vae, z = tiny_vae(), torch.randn(2, 2, 4, 4)
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    torch.testing.assert_close(latents.normalize(z, latents.statistics(vae, None, None)), (z - 0.25) * 0.5)
    vae.register_to_config(latents_mean=[1.0, 2.0], latents_std=[3.0, 4.0])
    mean, std = (torch.tensor(values).view(2, 1, 1) for values in ([1.0, 2.0], [3.0, 4.0]))
    torch.testing.assert_close(latents.normalize(z, latents.statistics(vae, None, None)), (z - mean) * 0.5 / std)
    measured = latents.statistics(vae, [5.0, 6.0], [7.0, 8.0])
    mean, std = (torch.tensor(values).view(2, 1, 1) for values in ([5.0, 6.0], [7.0, 8.0]))
    torch.testing.assert_close(latents.normalize(z, measured), (z - mean) / std)
    torch.testing.assert_close(latents.denormalize(latents.normalize(z, measured), measured), z)


def test_editing_takes_and_returns_images() -> None:
    pipeline = make_pipeline(latents_mean=[0.1, 0.2], latents_std=[0.5, 1.0])
    images = torch.rand(2, 3, 16, 16, generator=seeded())
    call: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt"}
    filled = pipeline.inpaint(images, MASK, num_resamples=1, **call, generator=seeded()).images
    is_filled = MASK.expand_as(filled)
    assert filled[~is_filled].equal(images[~is_filled])
    assert not filled[is_filled].allclose(images[is_filled], atol=0.1)
    # The last step, with noise of deviation 0.01 on the latents of the image
    same = pipeline.denoise_from(images, 0.25, **call, timestep_spacing="leading", generator=seeded()).images
    torch.testing.assert_close(same, reconstruction(pipeline, images), atol=0.03, rtol=0)
    mixed = pipeline.interpolate(images[:1], images[1:], [0.0, 1.0], 0.25, **call, timestep_spacing="leading").images
    torch.testing.assert_close(mixed, same, atol=0.06, rtol=0)
    assert pipeline.encode(images, num_iterations=1, num_inference_steps=2).shape[1:] == pipeline.sample_shape


@pytest.mark.parametrize("kind", ["AutoencoderTiny", "VQModel"])
def test_autoencoders_without_a_distribution_have_one_latent_for_an_image(kind: str) -> None:
    pipeline = make_pipeline(kind)
    images = torch.rand(2, 3, 16, 16)
    mean, std = latents.encode_moments(pipeline.vae, images * 2 - 1)
    assert not std.any()
    decoded = latents.decode(pipeline.vae, mean)
    assert (decoded / 2 + 0.5).clamp(0, 1).allclose(reconstruction(pipeline, images), atol=1e-5)


def test_a_latent_is_filled_if_the_mask_touches_any_of_its_pixels() -> None:
    mask = latents.mask_of_latents(MASK, tiny_vae())
    assert mask[0, 0].nonzero().tolist() == [[row, column] for row in range(1, 5) for column in range(2, 6)]


def test_a_vae_works_on_a_bounded_number_of_pixels_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "MAX_PIXELS", 2 * 16 * 16)
    vae, sizes = tiny_vae(num_channels=3).eval(), []
    for module in (vae.encoder, vae.decoder):
        module.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    images = torch.rand(5, 3, 16, 16)
    mean, std = latents.encode_moments(vae, images)
    decoded = latents.decode(vae, mean)
    assert sizes == [2, 2, 1, 2, 2, 1]
    with torch.no_grad():
        assert mean.allclose(vae.encode(images).latent_dist.mean, atol=1e-5)
        assert std.allclose(vae.encode(images).latent_dist.std, atol=1e-5)
        assert decoded.allclose(vae.decode(mean).sample, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": tiny_vae("VQModel")}, "vae has latents of 3 channels, but unet generates 2; pass the VAE"),
        ({"vae": tiny_unet()}, "vae is a UNet2DModel; it must be an AutoencoderKL"),
        ({"vae": tiny_vae(), "latents_mean": [0.0, 0.0]}, "belong together"),
        ({"vae": tiny_vae(), "latents_mean": [0.0, 0.0], "latents_std": [1.0, 0.0]}, "positive in latents_std"),
        ({"vae": tiny_vae(), "latents_mean": [0.0], "latents_std": [1.0]}, "have 2 channels; give one for each"),
    ],
)
def test_a_vae_that_does_not_fit_is_a_sentence(changes: dict[str, Any], message: str) -> None:
    unet = tiny_unet(in_channels=2, out_channels=2)
    with pytest.raises(ValueError, match=message):
        GaussianDiffusionPipeline(unet, GaussianDiffusionScheduler(), **changes)


def test_an_overflow_of_half_precision_is_a_sentence() -> None:
    pipeline = make_pipeline()
    pipeline.vae.decoder.conv_out.weight.data.fill_(1e6)
    pipeline.vae.half()
    with pytest.raises(ValueError, match=r"overflows in float16; convert it by pipe.vae.to\(torch.float32\)"):
        pipeline(num_inference_steps=1)


def test_a_guide_of_another_scale_of_latents_is_rejected() -> None:
    guide = make_pipeline(latents_mean=[0.0, 0.0], latents_std=[1.0, 1.0])
    with pytest.raises(ValueError, match="latents of another scale"):
        make_pipeline()(guide=guide, guidance_scale=2.0, num_inference_steps=1)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_a_folder_of_ldm_pipeline_loads_with_its_vae(kind: str, tmp_path: Path) -> None:
    pipeline = make_pipeline(kind)
    LDMPipeline(pipeline.vae, pipeline.unet, pipeline.scheduler).save_pretrained(tmp_path)
    loaded = GaussianDiffusionPipeline.from_pretrained(tmp_path)
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    assert loaded(**call, generator=seeded()).images.equal(pipeline(**call, generator=seeded()).images)
    loaded.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again" / "vae").iterdir()} >= {"config.json"}
