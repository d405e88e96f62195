"""Every random number of a run is a function of (seed, stream, counters)."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf.rng import (
    NOISE_BLOCK_SIZE,
    derive_seed,
    first_draws,
    normal_by_pair,
    normal_by_position,
    numpy_generator,
    sampling_generators,
    seed_global_generators,
    torch_generator,
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, "noise"), 3741718446620197569),
        ((0, "noise", 0), 713458078847530580),
        ((0, "noise", 0, 0), 3838737549185257812),
        ((0, "noise", 1), 5108404213588929715),
        ((0, "timesteps", 0), 1225349117038688703),
        ((1, "noise", 0), 3494747373669545480),
        ((2**40, "order", 12345, 7), 2772820380071448449),
    ],
)
def test_a_derived_seed_never_changes(arguments: tuple[int, str, int], expected: int) -> None:
    """Another value would change every run that is resumed."""
    assert derive_seed(*arguments) == expected


def test_derived_seeds_fit_every_generator_and_are_distinct() -> None:
    seeds = [
        derive_seed(seed, stream, step, position)
        for seed in (0, 1)
        for stream in ("noise", "timesteps")
        for step in range(50)
        for position in range(50)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "noise", 1, 12) != derive_seed(0, "noise", 11, 2), "counters are separated"


def test_neighboring_streams_are_independent() -> None:
    """The standard deviation of a correlation of 10,000 numbers is 0.01; the limit is five of them."""
    draws = [torch.randn(10_000, generator=torch_generator("cpu", 0, "noise", step)) for step in range(4)]
    draws += [torch.from_numpy(numpy_generator(0, "noise", step).standard_normal(10_000)).float() for step in range(4)]
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(8)
    assert correlations.abs().max() < 0.05


def test_a_generator_is_a_function_of_its_arguments() -> None:
    assert np.array_equal(numpy_generator(3, "flip", 5).random(8), numpy_generator(3, "flip", 5).random(8))
    one, other = (torch.randn(8, generator=torch_generator("cpu", 3, "noise", 5)) for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize(("seed", "counters"), [(0, (1, 7)), (2**40, ())])
def test_first_draws_are_those_of_the_generators_of_numpy(seed: int, counters: tuple[int, ...]) -> None:
    numbers = [*range(500), 2**33, 10**15]
    generators = [numpy_generator(seed, "augmentation", *counters, number) for number in numbers]
    uniform, bits = first_draws(seed, "augmentation", *counters, numbers=numbers)
    assert np.array_equal(uniform, [generator.random(2) for generator in generators])
    assert np.array_equal(bits, [generator.integers(2) for generator in generators])


def test_global_generators_are_seeded_for_dropout() -> None:
    def draw(step: int) -> torch.Tensor:
        seed_global_generators(0, "dropout", step)
        return torch.nn.functional.dropout(torch.ones(64))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize(
    "cuts", [(0, 80), (0, 40, 80), (0, 1, 80), (0, 31, 32, 33, 80), (0, 10, 70, 80), tuple(range(0, 81, 5))]
)
def test_a_row_of_noise_is_the_same_in_every_split_of_the_batch(cuts: tuple[int, ...]) -> None:
    """Some parts begin or end inside a block, some span several."""
    whole = normal_by_position(7, "noise", 3, range(80), (2, 4, 4), "cpu")
    pieces = [
        normal_by_position(7, "noise", 3, range(start, stop), (2, 4, 4), "cpu")
        for start, stop in itertools.pairwise(cuts)
    ]
    assert whole.shape == (80, 2, 4, 4)
    assert whole.dtype == torch.float32
    assert torch.equal(torch.cat(pieces), whole)


def test_the_noise_of_pairs_is_that_of_their_positions() -> None:
    """In any order; sorted pairs of one step and one block share a draw."""
    steps = np.array([3, 3, 3, 3, 3, 8, 8, 3])
    positions = np.array([0, 31, 30, 32, 33, 32, 500, 1])
    draws = 0

    class Draws(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal draws
            draws += func is torch.ops.aten.normal_.default
            return func(*args, **(kwargs or {}))

    with Draws():
        noise = normal_by_pair(7, "noise", steps, positions, (2, 3), "cpu")
    expected = [
        normal_by_position(7, "noise", step, range(position, position + 1), (2, 3), "cpu")
        for step, position in zip(steps.tolist(), positions.tolist(), strict=True)
    ]
    assert torch.equal(noise, torch.cat(expected))
    assert draws == 5


def test_a_row_of_noise_does_not_depend_on_the_batch_size() -> None:
    late = NOISE_BLOCK_SIZE * 3 + 5
    alone = normal_by_position(0, "noise", 0, range(late, late + 1), (8,), "cpu")
    assert torch.equal(alone, normal_by_position(0, "noise", 0, range(1000), (8,), "cpu")[late : late + 1])


def test_noise_differs_between_rows_steps_streams_and_seeds() -> None:
    base = normal_by_position(0, "noise", 0, range(64), (4,), "cpu")
    assert len(base.unique(dim=0)) == 64
    for seed, stream, step in ((0, "noise", 1), (0, "other", 0), (1, "noise", 0)):
        assert not (base == normal_by_position(seed, stream, step, range(64), (4,), "cpu")).any()


def test_noise_is_standard_normal() -> None:
    """Mean and variance of 131,072 numbers have standard deviations of 0.0028 and 0.0039; limits are five of them."""
    noise = normal_by_position(0, "noise", 0, range(512), (1, 16, 16), "cpu")
    assert abs(float(noise.mean())) < 0.014
    assert abs(float(noise.var()) - 1) < 0.02
    assert abs(float((noise.abs() < 1).float().mean()) - 0.6827) < 0.007
    of_rows = noise.flatten(1).mean(dim=1)
    assert abs(float(of_rows.std()) - 1 / 16) < 0.01, "rows are independent"


def test_drawing_noise_does_not_change_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    normal_by_position(0, "noise", 0, range(64), (4,), "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sampled_image_has_its_own_generator_in_any_batch() -> None:
    def draw(generators: list[torch.Generator]) -> list[list[float]]:
        return [torch.randn(3, generator=generator).tolist() for generator in generators]

    together = draw(sampling_generators(0, "evaluation", range(4), "cpu"))
    alone = draw(sampling_generators(0, "evaluation", [2], "cpu"))
    assert together[2] == alone[0]
    assert len({tuple(row) for row in together}) == 4
