"""A pipeline whose network is a formula: the best prediction for Gaussian data, and images drawn from such data."""

from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel

from ddpm_hf.data import ImageSet
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler

MEAN, DEVIATION = 0.1, 0.2


def best_x_0(x_t: Any, alpha_bar: Any) -> Any:
    """E[x_0 | x_t] for data N(MEAN, DEVIATION^2)."""
    gain = alpha_bar**0.5 * DEVIATION**2 / (alpha_bar * DEVIATION**2 + 1 - alpha_bar)
    return MEAN + gain * (x_t - alpha_bar**0.5 * MEAN)


class GaussianUnet(UNet2DModel):
    """Predicts the best x_0, epsilon or v, in float64, with OFFSET added to x_0, and V for a learned variance."""

    OFFSET = 0.02
    V = -0.4

    def __init__(self, scheduler: GaussianDiffusionScheduler, size: tuple[int, int]) -> None:
        learns = scheduler.variance_type.startswith("learned")
        super().__init__(
            sample_size=size, in_channels=1, out_channels=2 if learns else 1, block_out_channels=(2,),
            layers_per_block=1, norm_num_groups=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )  # fmt: skip
        self.learns, self.kind = learns, scheduler.config.prediction_type
        self.alpha_bars = scheduler.noise_schedule.alphas_cumprod
        self.double()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        alpha_bar = self.alpha_bars[timestep].view(-1, 1, 1, 1)
        x_0 = best_x_0(sample, alpha_bar) + self.OFFSET
        eps = (sample - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5
        v = alpha_bar**0.5 * eps - (1 - alpha_bar) ** 0.5 * x_0
        output = {"epsilon": eps, "sample": x_0, "v_prediction": v}[self.kind]
        return (torch.cat([output, torch.full_like(output, self.V)], 1) if self.learns else output,)


def gaussian_pipeline(size: tuple[int, int] = (1, 2), **options: Any) -> GaussianDiffusionPipeline:
    """A pipeline that samples (almost) the data of `gaussian_images`."""
    scheduler = GaussianDiffusionScheduler.create(**{"clip_sample": False} | options)
    return GaussianDiffusionPipeline(GaussianUnet(scheduler, size), scheduler)


def gaussian_images(count: int, size: tuple[int, int] = (1, 2)) -> ImageSet:
    """8-bit images of independent pixels N(MEAN, DEVIATION^2); the first are black and white."""
    values = np.random.default_rng(0).normal(MEAN, DEVIATION, (count, 1, *size))
    pixels = np.rint((values + 1) * 127.5).clip(0, 255).astype(np.uint8)
    pixels[0], pixels[1] = 0, 255
    return ImageSet(pixels, None, None, np.arange(count))
