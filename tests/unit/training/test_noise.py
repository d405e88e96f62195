"""Noise with an offset has the moments it should; exchanged noise is the same noise, nearer to its images."""

import itertools

import pytest
import torch

from ddpm_hf.config import ObjectiveConfig
from ddpm_hf.rng import normal_by_position
from ddpm_hf.training.loss import assign_noise, draw_noise

SHAPE, CPU = torch.Size([2, 4, 4]), torch.device("cpu")


def test_without_an_offset_noise_is_what_it_always_was() -> None:
    noise = draw_noise(ObjectiveConfig(), 3, 7, range(5, 40), SHAPE, CPU)
    assert torch.equal(noise, normal_by_position(3, "noise", 7, range(5, 40), SHAPE, CPU))


def test_an_offset_is_one_number_a_channel_of_an_image_of_the_strength_asked_for() -> None:
    """40,000 numbers: five standard deviations of their variance are 3.5 %, 0.025 of their mean."""
    plain = draw_noise(ObjectiveConfig(), 3, 7, range(20_000), SHAPE, CPU)
    shifted = draw_noise(ObjectiveConfig(offset_noise=0.3), 3, 7, range(20_000), SHAPE, CPU)
    offset = shifted - plain
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset), rtol=0, atol=1e-6)  # rounding
    numbers = offset[:, :, 0, 0]
    assert float(numbers.square().mean()) == pytest.approx(0.3**2, rel=0.035)
    assert abs(float(numbers.mean())) < 0.3 * 0.025
    assert abs(float((numbers[:, 0] * numbers[:, 1]).mean())) < 0.3**2 * 5 / 20_000**0.5, "channels are independent"
    assert abs(float((numbers * plain.mean(dim=(2, 3))).mean())) < 0.3 * 5 / (16 * 40_000) ** 0.5, "and of the noise"
    first = plain[:32].flatten()[:64]
    assert float((first - numbers[:32].flatten() / 0.3).abs().mean()) > 0.5, "which has a stream of its own"


def test_an_offset_belongs_to_its_position() -> None:
    config = ObjectiveConfig(offset_noise=0.3)
    whole = draw_noise(config, 3, 7, range(80), SHAPE, CPU)
    assert torch.equal(draw_noise(config, 3, 7, range(30, 50), SHAPE, CPU), whole[30:50])
    assert not torch.equal(draw_noise(config, 3, 8, range(80), SHAPE, CPU), whole)


def test_exchanged_noise_is_the_assignment_with_the_least_sum_of_distances() -> None:
    """Against all 720 assignments of six images; distances as in Li et al. 2024, not squared."""
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(6, *SHAPE, generator=generator) for _ in range(2))
    distances = torch.stack([(image - noise).flatten(1).norm(dim=1) for image in x_0]).double()
    best = min(itertools.permutations(range(6)), key=lambda order: float(distances[range(6), order].sum()))
    assert best != tuple(range(6))
    assert torch.equal(assign_noise(x_0, noise), noise[list(best)])


def test_noise_is_exchanged_within_blocks_only_and_none_is_lost() -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(80, *SHAPE, generator=generator) for _ in range(2))
    exchanged = assign_noise(x_0, noise)
    assert not torch.equal(exchanged, noise)
    for start, stop in ((0, 32), (32, 64), (64, 80)):
        before, after = (sorted(part[start:stop, 0, 0, 0].tolist()) for part in (noise, exchanged))
        assert before == after
    assert torch.equal(assign_noise(x_0[32:64], noise[32:64]), exchanged[32:64])
    apart, before = ((x_0 - part).flatten(1).norm(dim=1).sum() for part in (exchanged, noise))
    assert apart < before
