"""Random number generators as functions of counters. No other module derives a seed.

Every random number of a run is a function of (seed, stream, counters): the stream names its use, and the counters are
the step, epoch, position or rank. No generator state is stored, and no number depends on the ones drawn before it.
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

NOISE_BLOCK_SIZE = 32
"""Positions of the global batch that share a generator of noise. A rank draws only the blocks of its own positions."""


def derive_seed(seed: int, stream: str, *counters: int) -> int:
    """Derive an independent seed for one use of randomness.

    Args:
        seed: The seed of the run.
        stream: Name of the use, for example "noise" or "timesteps".
        *counters: Step, epoch, position, rank.

    Returns:
        An integer in [0, 2**63), the same on every machine and in every version of Python, NumPy and torch.
    """
    key = ",".join([str(seed), stream, *map(str, counters)]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def numpy_generator(seed: int, stream: str, *counters: int) -> np.random.Generator:
    """Return a NumPy generator at the start of a stream."""
    return np.random.Generator(np.random.Philox(derive_seed(seed, stream, *counters)))


def first_draws(
    seed: int, stream: str, *counters: int, numbers: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return what `numpy_generator(seed, stream, *counters, number)` draws first, for many numbers at once.

    In arrays, because making a generator takes as long as decoding a part of a small image.

    Args:
        seed: The seed of the run.
        stream: Name of the use.
        *counters: The counters before the last one.
        numbers: The last counter of each.

    Returns:
        float64 (number, 2) as drawn by `random(2)`, and bool (number,) as drawn by `integers(2)` after it.
    """
    seeds = np.asarray([derive_seed(seed, stream, *counters, number) for number in numbers], np.uint64)
    words = _philox(_philox_keys(seeds))
    return (words[:2] >> np.uint64(11)).T * 2.0**-53, words[2] & np.uint64(2**31) != 0


def _philox_keys(seeds: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the keys (2, number) of `numpy.random.Philox`: SeedSequence(seed).generate_state(2, np.uint64)."""
    multiplier = 0x43B0D7E5

    def hashed(words: NDArray[np.uint32], factor: int) -> NDArray[np.uint32]:
        nonlocal multiplier
        words = words ^ np.uint32(multiplier)
        multiplier = multiplier * factor % 2**32
        words *= np.uint32(multiplier)
        words ^= words >> np.uint32(16)
        return words

    words = (seeds % np.uint64(2**32), seeds >> np.uint64(32), np.zeros_like(seeds), np.zeros_like(seeds))
    pool = [hashed(word.astype(np.uint32), 0x931E8875) for word in words]
    for source in range(4):
        for target in (target for target in range(4) if target != source):
            mixed = np.uint32(0xCA01F9DD) * pool[target]
            mixed -= np.uint32(0x4973F715) * hashed(pool[source], 0x931E8875)
            pool[target] = mixed ^ mixed >> np.uint32(16)
    multiplier = 0x8B51F9DD
    state = np.stack([hashed(word, 0x58F38DED) for word in pool]).astype(np.uint64)
    keys: NDArray[np.uint64] = state[::2] | state[1::2] << np.uint64(32)
    return keys


def _philox(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the first words (4, number) of Philox-4x64-10 (Salmon et al. 2011) with keys (2, number)."""
    factors = np.asarray([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], np.uint64)
    steps = np.asarray([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], np.uint64)
    even, odd = np.zeros_like(keys), np.zeros_like(keys)  # words 0 and 2, words 1 and 3
    even[0] = 1
    for _ in range(10):
        even, odd = _high_word(even, factors)[::-1] ^ odd ^ keys, (even * factors)[::-1]
        keys = keys + steps
    return np.stack([even[0], odd[0], even[1], odd[1]])


def _high_word(values: NDArray[np.uint64], factors: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the upper 64 bits of values * factors."""
    half, mask = np.uint64(32), np.uint64(2**32 - 1)
    low, high = values & mask, values >> half
    factor_low, factor_high = factors & mask, factors >> half
    middle = high * factor_low + (low * factor_low >> half)
    word: NDArray[np.uint64] = high * factor_high + (middle >> half) + ((middle & mask) + low * factor_high >> half)
    return word


def torch_generator(device: torch.device | str, seed: int, stream: str, *counters: int) -> torch.Generator:
    """Return a torch generator on `device` at the start of a stream."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, stream, *counters))


def seed_global_generators(seed: int, stream: str, *counters: int) -> None:
    """Seed the global torch generators of all devices, which only dropout and initialization use."""
    torch.manual_seed(derive_seed(seed, stream, *counters))


def global_generator_states() -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """Return the states of torch's global generators: of the CPU, and of all GPUs if CUDA was used."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None


def restore_global_generators(states: tuple[torch.Tensor, list[torch.Tensor] | None]) -> None:
    """Restore states that `global_generator_states` returned."""
    of_cpu, of_gpus = states
    torch.set_rng_state(of_cpu)
    if of_gpus is not None:
        torch.cuda.set_rng_state_all(of_gpus)
    elif torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(torch.initial_seed())  # as its first use would have seeded them


def normal_by_position(
    seed: int, stream: str, step: int, positions: range, shape: Sequence[int], device: torch.device | str
) -> torch.Tensor:
    """Draw standard normal noise for positions of the global batch, the same for every split of the batch over ranks.

    Args:
        seed: The seed of the run.
        stream: Name of the use.
        step: The optimizer step.
        positions: Consecutive positions in the global batch.
        shape: Shape of one sample.
        device: Device of the noise; a CPU and a GPU draw different numbers.

    Returns:
        float32 noise (len(positions), *shape).
    """
    first_block, end_block = positions.start // NOISE_BLOCK_SIZE, -(-positions.stop // NOISE_BLOCK_SIZE)
    blocks = torch.empty((end_block - first_block) * NOISE_BLOCK_SIZE, *shape, device=device)
    for index, block in enumerate(blocks.split(NOISE_BLOCK_SIZE)):
        block.normal_(generator=torch_generator(device, seed, stream, step, first_block + index))
    offset = positions.start - first_block * NOISE_BLOCK_SIZE
    return blocks[offset : offset + len(positions)]


def normal_by_pair(
    seed: int,
    stream: str,
    steps: NDArray[np.int64],
    positions: NDArray[np.int64],
    shape: Sequence[int],
    device: torch.device | str,
) -> torch.Tensor:
    """Draw the noise of `normal_by_position` for any pairs of step and position.

    Neighboring pairs of one step and one block of positions share a draw, so sorted pairs cost the least.

    Args:
        seed: The seed of the run.
        stream: Name of the use.
        steps: int64 (pairs,).
        positions: int64 (pairs,).
        shape: Shape of one sample.
        device: Device of the noise; a CPU and a GPU draw different numbers.

    Returns:
        float32 noise (pairs, *shape).
    """
    noise = torch.empty(len(positions), *shape, device=device)
    block = torch.empty(NOISE_BLOCK_SIZE, *shape, device=device)
    generator = torch.Generator(device=device)
    numbers, offsets = np.divmod(positions, NOISE_BLOCK_SIZE)
    is_first = np.ones(len(positions), bool)
    is_first[1:] = (np.diff(steps) != 0) | (np.diff(numbers) != 0)
    starts = np.flatnonzero(is_first).tolist()
    for start, stop in pairwise([*starts, len(positions)]):
        block.normal_(
            generator=generator.manual_seed(derive_seed(seed, stream, int(steps[start]), int(numbers[start])))
        )
        # Not by an index tensor: copying one to a GPU waits for the GPU.
        torch.stack([block[offset] for offset in offsets[start:stop].tolist()], out=noise[start:stop])
    return noise


def sampling_generators(
    seed: int, stream: str, indices: Sequence[int], device: torch.device | str
) -> list[torch.Generator]:
    """Return one generator per image, so that image i does not depend on the batch or the process."""
    return [torch_generator(device, seed, stream, index) for index in indices]


def plain_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return CPU generators with the given seeds, as users create them for pipelines."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
