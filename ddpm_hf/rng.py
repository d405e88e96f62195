"""The only place where a seed is made.

Everything random in a run is a function of (seed, stream, counters): the stream says what is drawn, the counters say
for which step, epoch, position or rank. Nothing random is ever stored, and nothing depends on what was drawn before.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

# Noise is drawn for whole blocks of positions, so that a rank draws only the blocks that its own positions touch.
NOISE_BLOCK_SIZE = 32


def derive_seed(seed: int, stream: str, *counters: int) -> int:
    """Derives an independent seed for one use of randomness.

    Args:
        seed: The seed of the run.
        stream: What is drawn, for example "noise" or "timesteps".
        *counters: Where it is drawn: step, epoch, position, rank.

    Returns:
        An integer in [0, 2**63), the same on every machine and in every version of Python, NumPy and torch.
    """
    key = ",".join([str(seed), stream, *map(str, counters)]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def numpy_generator(seed: int, stream: str, *counters: int) -> np.random.Generator:
    """Returns a NumPy generator at the start of one stream."""
    return np.random.Generator(np.random.Philox(derive_seed(seed, stream, *counters)))


def torch_generator(device: torch.device | str, seed: int, stream: str, *counters: int) -> torch.Generator:
    """Returns a torch generator on `device` at the start of one stream."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, stream, *counters))


def seed_global_generators(seed: int, stream: str, *counters: int) -> None:
    """Seeds torch's global generators of all devices, which only dropout and initialisation draw from."""
    torch.manual_seed(derive_seed(seed, stream, *counters))


def normal_by_position(
    seed: int, stream: str, step: int, positions: range, shape: Sequence[int], device: torch.device | str
) -> torch.Tensor:
    """Draws standard normal noise that belongs to positions of the global batch, whoever computes them.

    Args:
        seed: The seed of the run.
        stream: What is drawn.
        step: The optimiser step.
        positions: Consecutive positions in the global batch.
        shape: The shape of one sample.
        device: Where to draw; a CPU and a GPU draw different numbers.

    Returns:
        float32 noise of shape (len(positions), *shape); row i is the same in every split of the batch.
    """
    first_block, end_block = positions.start // NOISE_BLOCK_SIZE, -(-positions.stop // NOISE_BLOCK_SIZE)
    blocks = torch.empty((end_block - first_block) * NOISE_BLOCK_SIZE, *shape, device=device)
    for index, block in enumerate(blocks.split(NOISE_BLOCK_SIZE)):
        block.normal_(generator=torch_generator(device, seed, stream, step, first_block + index))
    offset = positions.start - first_block * NOISE_BLOCK_SIZE
    return blocks[offset : offset + len(positions)]


def sampling_generators(
    seed: int, stream: str, indices: Sequence[int], device: torch.device | str
) -> list[torch.Generator]:
    """Returns one generator an image, so that image i is the same in any batch and on any process."""
    return [torch_generator(device, seed, stream, index) for index in indices]


def plain_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Returns generators as users make them: on the CPU, which draws the same numbers for every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
