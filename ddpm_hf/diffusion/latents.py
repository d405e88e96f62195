"""Latents: images as a VAE of diffusers encodes them, of which a network then generates new ones.

Legend:
    images  (batch, channels, f height, f width) in [-1, 1]; f is the downsampling factor of the VAE
    z       latents of the VAE, (batch, latent channels, height, width)
    state   (z - mean) / std per channel: what the diffusion process noises and denoises, about standard normal

Every function takes an AutoencoderKL, an AutoencoderTiny or a VQModel. Nothing here is differentiated.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

from .schedule import real_number

CLASSES = {one.__name__: one for one in (AutoencoderKL, AutoencoderTiny, VQModel)}
MAX_PIXELS = 2**20
"""Pixels that the VAE encodes or decodes at once: 16 images of 256x256. The network takes far more latents at once."""

Statistics: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Mean and standard deviation of z per channel, float32 (latent channels, 1, 1)."""


def check_vae(vae: Any) -> None:
    """Raise a ValueError if an object is no VAE that encodes and decodes images."""
    if not all(hasattr(vae, name) for name in ("config", "encode", "decode")):
        raise ValueError(
            f"vae is a {type(vae).__name__}; it must be an AutoencoderKL, an AutoencoderTiny or a VQModel of diffusers."
        )


def load_vae(folder: Path, dtype: torch.dtype, *, use_safetensors: bool) -> Any:
    """Load the VAE in a folder of an LDMPipeline, which it calls `vqvae`.

    Raises:
        ValueError: If it is none of the three classes.
    """
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"{folder} is a {name}; a VAE must be one of {', '.join(CLASSES)}.")
    return CLASSES[name].from_pretrained(folder, torch_dtype=dtype, use_safetensors=use_safetensors)


def latent_channels(vae: Any) -> int:
    """Return the channels of z."""
    config = vae.config
    return int(config.get("vq_embed_dim") or config["latent_channels"])


def image_channels(vae: Any) -> int:
    """Return the channels of the images."""
    return int(vae.config["out_channels"])


def downsampling_factor(vae: Any) -> int:
    """Return how many times the height of an image is that of z: a VAE halves it once between two blocks.

    Args:
        vae: The VAE, or anything else with its `config`.
    """
    config = vae.config
    blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return int(2 ** (len(blocks) - 1))


def check_statistics(mean: Any, std: Any) -> tuple[list[float] | None, list[float] | None]:
    """Return the given means and standard deviations of z as lists of floats; None for both if there are none.

    Raises:
        ValueError: If only one is given, they differ in length, or hold anything else than numbers, positive for std.
    """
    if mean is None and std is None:
        return None, None
    if mean is None or std is None:
        raise ValueError("latents_mean and latents_std belong together; give both, or none.")
    try:
        means = [real_number("latents_mean", value) for value in mean]
        stds = [real_number("latents_std", value) for value in std]
    except TypeError as error:
        raise ValueError("latents_mean and latents_std must be lists of one number for each channel.") from error
    if len(means) != len(stds) or not all(value > 0 for value in stds):
        raise ValueError(
            f"latents_mean is {means} and latents_std {stds}; give one number per channel, positive in latents_std."
        )
    return means, stds


def statistics(vae: Any, latents_mean: Sequence[float] | None, latents_std: Sequence[float] | None) -> Statistics:
    """Return the mean and the standard deviation that `normalize` uses.

    Args:
        vae: The VAE.
        latents_mean: Measured means of z per channel. Without them, those of the VAE's configuration hold:
            state = (z - shift_factor) * scaling_factor, or with means in it, (z - mean) * scaling_factor / std.
        latents_std: Measured standard deviations of z per channel.

    Raises:
        ValueError: If there is not one for each channel of z.
    """
    config, channels = vae.config, latent_channels(vae)
    scale = 1.0
    if latents_mean is None or latents_std is None:
        scale = 1 / float(config.get("scaling_factor") or 1.0)
        latents_mean, latents_std = config.get("latents_mean"), config.get("latents_std")
    if latents_mean is None or latents_std is None:
        latents_mean, latents_std = [float(config.get("shift_factor") or 0.0)] * channels, [1.0] * channels
    if not len(latents_mean) == len(latents_std) == channels:
        raise ValueError(
            f"latents_mean has {len(latents_mean)} and latents_std {len(latents_std)} numbers, but the latents of the"
            f" vae have {channels} channels; give one for each."
        )
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (latents_mean, latents_std))
    return mean, std * scale


def normalize(z: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """Return the states of latents."""
    mean, std = (value.to(z.device) for value in statistics)
    return (z - mean) / std


def denormalize(state: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """Return the latents of states."""
    mean, std = (value.to(state.device) for value in statistics)
    return state * std + mean


@torch.no_grad()
def encode_moments(vae: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the standard deviation of z given images, each float32 (batch, channels, height, width).

    z is normal for an AutoencoderKL; the others have one z for an image, and a standard deviation of 0.

    Args:
        vae: The VAE.
        images: (batch, channels, height, width) in [-1, 1], multiples of the downsampling factor, on its device.

    Raises:
        ValueError: If a value overflows in float16.
    """
    moments = []
    for part in images.split(_images_at_once(images.shape[2] * images.shape[3])):
        encoded = vae.encode(part.to(vae.dtype))
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:
            mean = encoded.latents if hasattr(encoded, "latents") else encoded.latent
            std = torch.zeros_like(mean)
        _check_overflow(vae, mean)
        moments.append((mean.float(), std.float()))
    means, stds = zip(*moments, strict=True)
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def decode(vae: Any, z: torch.Tensor) -> torch.Tensor:
    """Return the images of latents: float32 (batch, channels, height, width) in [-1, 1], not clipped.

    Raises:
        ValueError: If a value overflows in float16.
    """
    images = []
    for part in z.split(_images_at_once(z.shape[2] * z.shape[3] * downsampling_factor(vae) ** 2)):
        decoded = vae.decode(part.to(vae.dtype), return_dict=False)[0]
        _check_overflow(vae, decoded)
        images.append(decoded.float())
    return torch.cat(images)


def mask_of_latents(mask: torch.Tensor, vae: Any) -> torch.Tensor:
    """Return for each position of z whether any of its pixels is in a mask, bool (batch, 1, height, width)."""
    return F.max_pool2d(mask.float(), downsampling_factor(vae)) > 0


def _images_at_once(num_pixels: int) -> int:
    return max(1, MAX_PIXELS // num_pixels)


def _check_overflow(vae: Any, values: torch.Tensor) -> None:
    if vae.dtype == torch.float16 and not values.isfinite().all():
        raise ValueError("The vae overflows in float16; convert it by pipe.vae.to(torch.float32), or load bfloat16.")
