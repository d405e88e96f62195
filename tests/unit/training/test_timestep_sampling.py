"""Where timesteps are drawn, and that no way of drawing them changes what is minimised."""

import numpy as np
import pytest
import torch

from ddpm_hf.config import DiffusionConfig, ObjectiveConfig, RunConfig, TrainingConfig
from ddpm_hf.training.batches import (
    HISTORY_LENGTH,
    AntitheticTimesteps,
    LossAwareTimesteps,
    UniformTimesteps,
    build_timestep_sampler,
)


def rows(timesteps: object, losses: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a trainer records: timestep and loss of each sample."""
    return torch.as_tensor(timesteps), torch.as_tensor(losses, dtype=torch.float32)


def warmed_up(losses: list[float], batch_size: int = 8, seed: int = 0) -> LossAwareTimesteps:
    """Returns a sampler that has seen each timestep's loss often enough."""
    sampler = LossAwareTimesteps(len(losses), batch_size, seed)
    for _ in range(HISTORY_LENGTH):
        sampler.record(*rows(range(len(losses)), losses))
    return sampler


@pytest.mark.parametrize("batch_size", [8, 9])
def test_antithetic_neighbours_mirror_each_other(batch_size: int) -> None:
    timesteps, importance = AntitheticTimesteps(1000, batch_size, 0).draw(3)
    assert importance is None
    assert len(timesteps) == batch_size
    assert (timesteps[0:8:2] + timesteps[1:8:2] == 999).all()
    assert timesteps.dtype == np.int64


@pytest.mark.parametrize("kind", [UniformTimesteps, AntitheticTimesteps, LossAwareTimesteps])
def test_every_timestep_is_drawn_as_often_as_the_others(kind: type[UniformTimesteps]) -> None:
    """40,000 draws of 10 timesteps: five standard deviations of a count are 7.5 %, in pairs too."""
    sampler = kind(10, 4000, 0)
    counts = np.bincount(np.concatenate([sampler.draw(step).timesteps for step in range(10)]), minlength=10)
    assert len(counts) == 10
    np.testing.assert_allclose(counts, 4000, rtol=0.075)


@pytest.mark.parametrize("kind", [UniformTimesteps, AntitheticTimesteps, LossAwareTimesteps])
def test_a_step_draws_the_same_whenever_it_is_asked_and_another_step_or_seed_does_not(
    kind: type[UniformTimesteps],
) -> None:
    sampler = kind(1000, 64, 5)
    first = sampler.draw(7).timesteps
    sampler.draw(8)
    assert np.array_equal(sampler.draw(7).timesteps, first)
    assert not np.array_equal(sampler.draw(8).timesteps, first)
    assert not np.array_equal(kind(1000, 64, 6).draw(7).timesteps, first)


def test_loss_aware_is_uniform_until_every_timestep_has_its_ten_losses() -> None:
    sampler = LossAwareTimesteps(4, 8, 0)
    for _ in range(HISTORY_LENGTH - 1):
        sampler.record(*rows([0, 1, 2, 3], [9.0, 1.0, 1.0, 1.0]))
    sampler.record(*rows([0, 1, 2], [9.0, 1.0, 1.0]))
    assert sampler.probabilities.tolist() == [0.25] * 4
    assert sampler.draw(0).importance is not None
    assert (sampler.draw(0).importance == 1).all()
    sampler.record(*rows([3], [1.0]))
    assert sampler.probabilities[0] == pytest.approx(0.999 * 0.75 + 0.00025)


def test_loss_aware_probabilities_are_the_root_mean_squares_of_the_last_ten_losses() -> None:
    """Eq. 18, Nichol & Dhariwal 2021, mixed with 0.001 of uniform; against a list of losses, in float64."""
    generator = np.random.default_rng(0)
    sampler, history = LossAwareTimesteps(5, 16, 0), [[] for _ in range(5)]  # type: ignore[var-annotated]
    for _ in range(30):
        timesteps = generator.integers(0, 5, size=16)
        losses = generator.gamma(1.0, 1.0 + timesteps).astype(np.float32)
        sampler.record(*rows(timesteps, losses))
        for t, loss in zip(timesteps, losses, strict=True):
            history[t].append(float(loss))
    root_mean_squares = np.array([np.sqrt(np.mean(np.square(losses[-10:]))) for losses in history])
    expected = 0.999 * root_mean_squares / root_mean_squares.sum() + 0.001 / 5
    np.testing.assert_allclose(sampler.probabilities, expected, rtol=1e-12)
    assert sampler.probabilities.sum() == pytest.approx(1.0, abs=1e-12)


def test_a_timestep_that_fills_its_history_at_once_keeps_the_last_losses() -> None:
    sampler = LossAwareTimesteps(2, 26, 0)
    sampler.record(*rows([0] * 13 + [1] * 13, [*range(13), *[1.0] * 13]))
    expected = np.sqrt(np.mean(np.square(np.arange(3.0, 13.0))))
    assert sampler.probabilities[0] == pytest.approx(0.999 * expected / (expected + 1) + 0.0005)


def test_loss_aware_probabilities_converge_to_the_root_mean_square_of_noisy_losses() -> None:
    """Each loss is (1 + t) times an exponential number, so E[L^2] = 2 (1 + t)^2.

    Averaged over 300 batches the probabilities have a relative standard error below 1 % (ten losses give 20 %, and
    batches ten losses apart are independent); the root of a mean of ten is 5 % low on average, alike at every t.
    """
    generator = np.random.default_rng(1)
    sampler, total = LossAwareTimesteps(4, 64, 3), np.zeros(4)
    for step in range(340):
        timesteps, _ = sampler.draw(step)
        sampler.record(*rows(timesteps, (1 + timesteps) * generator.exponential(size=64)))
        total += sampler.probabilities if step >= 40 else 0
    np.testing.assert_allclose(total / 300, 0.999 * np.array([1, 2, 3, 4]) / 10 + 0.00025, rtol=0.04)


def test_importance_keeps_the_mean_loss_that_uniform_timesteps_have() -> None:
    """200,000 draws with seed 0; the losses times their importance have a standard deviation of about 0.02."""
    losses = np.array([0.01, 5.0, 1.0, 0.3, 0.02, 0.7])
    sampler = warmed_up(losses.tolist(), batch_size=200_000)
    timesteps, importance = sampler.draw(0)
    assert importance is not None
    weighted = losses[timesteps] * importance
    standard_error = weighted.std() / np.sqrt(len(weighted))
    assert standard_error < 1e-4, "where the loss is large, it is drawn often: that is the point"
    assert abs(weighted.mean() - losses.mean()) < 4 * standard_error + 1e-6
    assert (np.bincount(timesteps, minlength=6) > 0).all()
    assert abs(losses[timesteps].mean() - losses.mean()) > 1.0, "without the importance it would be another loss"


def test_losses_that_are_not_finite_leave_no_trace() -> None:
    sampler = warmed_up([1.0, 2.0, 3.0])
    before = sampler.probabilities
    sampler.record(*rows([0, 1, 2, 2], [float("nan"), float("inf"), -float("inf"), 3.0]))
    assert np.array_equal(sampler.probabilities, before)


def test_losses_of_zero_are_drawn_like_all_others() -> None:
    assert warmed_up([0.0, 0.0]).probabilities.tolist() == [0.5, 0.5]
    assert warmed_up([0.0, 1.0]).probabilities[0] == pytest.approx(0.0005)


def test_a_restored_history_goes_on_bit_by_bit() -> None:
    generator = np.random.default_rng(0)
    sampler, restored = LossAwareTimesteps(7, 32, 0), LossAwareTimesteps(7, 32, 0)
    batches = [(generator.integers(0, 7, size=32), generator.random(32)) for _ in range(12)]
    for timesteps, losses in batches[:6]:
        sampler.record(*rows(timesteps, losses))
    state = sampler.state_dict()
    restored.load_state_dict(state)
    for step, (timesteps, losses) in enumerate(batches[6:]):
        for each in (sampler, restored):
            each.record(*rows(timesteps, losses))
        one, other = sampler.draw(step), restored.draw(step)
        assert np.array_equal(one.timesteps, other.timesteps)
        assert np.array_equal(one.importance, other.importance)  # type: ignore[arg-type]
    fresh = LossAwareTimesteps(7, 32, 0)
    fresh.load_state_dict(state)
    assert not np.array_equal(fresh.probabilities, restored.probabilities), "a state is a copy"


@pytest.mark.parametrize(
    ("name", "kind", "learns"),
    [
        ("uniform", UniformTimesteps, False),
        ("antithetic", AntitheticTimesteps, False),
        ("loss_aware", LossAwareTimesteps, True),
    ],
)
def test_the_configuration_names_the_sampler(name: str, kind: type[UniformTimesteps], learns: bool) -> None:
    config = RunConfig(
        objective=ObjectiveConfig(timestep_sampling=name),  # type: ignore[arg-type]
        diffusion=DiffusionConfig(num_train_timesteps=50),
        training=TrainingConfig(train_batch_size=40, seed=3),
    )
    sampler = build_timestep_sampler(config)
    assert type(sampler) is kind
    assert sampler.learns is learns
    assert bool(sampler.state_dict()) is learns
    assert np.array_equal(sampler.draw(5).timesteps, kind(50, 40, 3).draw(5).timesteps)
