"""The noise of a batch: standard normal, offset by a constant over each channel, exchanged among the images.

All of it is a function of (seed, step, position in the global batch) and, where it is exchanged, of the images of a
block of positions, however the batch is split.
"""

import torch

from ddpm_hf.config import ObjectiveConfig
from ddpm_hf.rng import NOISE_BLOCK_SIZE, normal_by_position


def draw_noise(
    config: ObjectiveConfig, seed: int, step: int, positions: range, shape: torch.Size, device: torch.device
) -> torch.Tensor:
    """Draws the noise of some positions of the global batch.

    Args:
        config: How strong the offset is.
        seed: Seed of the run.
        step: The optimiser step.
        positions: Consecutive positions in the global batch.
        shape: Channels, height and width of an image.
        device: Where to draw.

    Returns:
        float32 (len(positions), *shape), standard normal or, with an offset s, of variance 1 + s^2.
    """
    noise = normal_by_position(seed, "noise", step, positions, shape, device)
    if config.offset_noise > 0:
        offset = normal_by_position(seed, "offset_noise", step, positions, (shape[0], 1, 1), device)
        noise = noise + config.offset_noise * offset
    return noise


def whole_blocks(positions: range, batch_size: int) -> range:
    """Returns the positions of all blocks of the global batch that some positions touch."""
    start = positions.start // NOISE_BLOCK_SIZE * NOISE_BLOCK_SIZE
    stop = -(-positions.stop // NOISE_BLOCK_SIZE) * NOISE_BLOCK_SIZE
    return range(start, min(stop, batch_size))


def exchange_noise(x_0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Gives each image noise near to it: in each block the assignment with the least sum of distances (Li et al. 2024).

    The assignment is found on the host, which waits for the images and the noise.

    Args:
        x_0: Images (batch, channels, height, width), from the beginning of a block on.
        noise: Noise of the same shape.

    Returns:
        The noise in another order.
    """
    from scipy.optimize import linear_sum_assignment

    exchanged = []
    for images, block in zip(x_0.split(NOISE_BLOCK_SIZE), noise.split(NOISE_BLOCK_SIZE), strict=True):
        distances = torch.cdist(images.flatten(1), block.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        _, columns = linear_sum_assignment(distances.cpu().numpy())
        exchanged.append(block[torch.from_numpy(columns).to(block.device)])
    return torch.cat(exchanged)
