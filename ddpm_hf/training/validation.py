"""The loss on held-out images, always at the same timesteps and noise, so that any two measurements can be compared."""

import numpy as np
import torch
from diffusers import UNet2DModel
from numpy.typing import NDArray

from ddpm_hf.config import RunConfig
from ddpm_hf.data import ImageSet, normalize
from ddpm_hf.rng import normal_by_position, numpy_generator
from ddpm_hf.training import processes
from ddpm_hf.training.objective import DenoisingLoss

NUM_TIMESTEPS_PER_IMAGE = 4


def validation_timesteps(num_images: int, num_train_timesteps: int, seed: int) -> NDArray[np.int64]:
    """Spreads the timesteps of all images evenly over the chain, which a mean over few images needs.

    Each image has one timestep in each quarter of the chain, and within a quarter those of the images are an even grid.

    Returns:
        int64 (NUM_TIMESTEPS_PER_IMAGE, num_images) in [0, T); a function of the arguments alone.
    """
    place = (numpy_generator(seed, "validation_timesteps").permutation(num_images) + 0.5) / num_images
    quarter = np.arange(NUM_TIMESTEPS_PER_IMAGE)[:, None]
    return ((quarter + place) / NUM_TIMESTEPS_PER_IMAGE * num_train_timesteps).astype(np.int64)


@torch.no_grad()
def validation_loss(
    unet: UNet2DModel,
    loss: DenoisingLoss,
    images: ImageSet,
    config: RunConfig,
    *,
    rank: int,
    num_processes: int,
    batch_size: int,
) -> float:
    """Collective: returns the mean loss over the held-out images, each rank computing its part of them.

    The noise belongs to the image, so neither the number of processes nor the batch size enters, except for the order
    of float32 additions in the network; the mean is taken in float64. Images are cropped in the centre, never
    mirrored. The network's mode is put back, and nothing is drawn from torch's global generators.

    Args:
        unet: The network with the weights to judge.
        loss: The objective of the run.
        images: The held-out images.
        config: The configuration of the run. No label is dropped here.
        rank: Which process this is.
        num_processes: How many share the images.
        batch_size: Images of one forward.
    """
    seed, with_labels = config.training.seed, config.model.class_conditional
    timesteps = validation_timesteps(len(images), config.diffusion.num_train_timesteps, seed)
    first, stop = (len(images) * (rank + side) // num_processes for side in (0, 1))
    total = 0.0
    was_training = unet.training
    unet.eval()
    try:
        for start in range(first, stop, batch_size):
            positions = range(start, min(start + batch_size, stop))
            pixels, labels = images.take(np.asarray(positions))
            x_0 = normalize(torch.from_numpy(pixels).to(unet.device))
            class_labels = torch.from_numpy(labels).to(unet.device) if with_labels and labels is not None else None
            for draw, drawn in enumerate(torch.from_numpy(timesteps[:, positions.start : positions.stop])):
                noise = normal_by_position(seed, "validation_noise", draw, positions, x_0.shape[1:], unet.device)
                losses = loss(unet, x_0, noise, drawn.to(unet.device), class_labels)
                total += float(losses.cpu().to(torch.float64).sum())
    finally:
        unet.train(was_training)
    return processes.reduce(total, "sum") / timesteps.size
