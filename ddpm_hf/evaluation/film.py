"""The way from noise, kept as 8-bit pictures of some states while images are drawn."""

from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.diffusion.images import to_images
from ddpm_hf.evaluation.image_shape import image_shape
from ddpm_hf.plots import UInt8Array

NUM_FRAMES = 40


class Film:
    """Keeps some states of a run as 8-bit pictures, since all of them might not fit into memory."""

    def __init__(self, num_steps: int) -> None:
        count = min(num_steps + 1, NUM_FRAMES)
        self._wanted = {round(frame * num_steps / (count - 1)) for frame in range(count)}
        self._states: list[UInt8Array] = []

    def begin(self, pipeline: GaussianDiffusionPipeline, generators: list[torch.Generator]) -> torch.Tensor:
        """Draws the start noise, as a call of the pipeline would, and returns it."""
        height, width, channels = image_shape(pipeline)
        dtype = torch.promote_types(torch.float32, pipeline.unet.dtype)
        shape = (len(generators), channels, height, width)
        noise: torch.Tensor = randn_tensor(shape, generator=generators, device=pipeline.device, dtype=dtype)
        self._keep(noise)
        return noise

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Is called after each step of the run."""
        if step + 1 in self._wanted:
            self._keep(tensors["sample"])
        return {}

    def states(self) -> UInt8Array:
        """Returns what was kept, (frames, number, height, width, channels)."""
        return np.stack(self._states)

    def _keep(self, sample: torch.Tensor) -> None:
        self._states.append(to_images(sample, "uint8"))
