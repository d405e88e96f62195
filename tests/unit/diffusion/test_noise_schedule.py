"""Betas and tables against constants that were computed in plain Python, and against the published formulas."""

import math

import numpy as np
import pytest
import torch

from ddpm_hf.diffusion import NoiseSchedule, make_betas
from ddpm_hf.diffusion.noise_schedule import (
    BETA_SCHEDULES,
    SamplingRun,
    rescale_to_zero_terminal_snr,
    spaced_timesteps,
)

SPACINGS = ("leading", "trailing", "linspace", "quadratic")


def test_linear_tables_are_the_published_constants() -> None:
    """Constants have 10 digits or more, hence rel 1e-9."""
    schedule = NoiseSchedule.from_betas(make_betas("linear"))
    expected = {
        "betas": {0: 1e-4, 1: 1.1991991992e-4, 999: 0.02},
        "alphas_cumprod": {0: 0.9999, 250: 0.521423030619, 500: 0.077796658365, 999: 4.03582976538e-05},
        "alphas_cumprod_prev": {0: 1.0, 1: 0.9999},
        "snr": {0: 9999.0},
        "posterior_variance": {0: 0.0, 1: 5.453187661e-5, 487: 0.00979157198569, 999: 0.01999998353},
        "posterior_log_variance": {0: -9.81672513529567, 1: -9.81672513529567},
        "posterior_mean_coef_x_0": {0: 1.0, 1: 0.5452914995, 999: 1.283514872e-4},
        "posterior_mean_coef_x_t": {0: 0.0, 1: 0.454708499, 999: 0.9899486783},
        "log_betas": {0: -9.210340371976},
    }
    for name, values in expected.items():
        for t, value in values.items():
            assert getattr(schedule, name)[t].item() == pytest.approx(value, rel=1e-9), (name, t)
    assert schedule.betas.sum().item() == pytest.approx(10.05, rel=1e-12)
    assert int((schedule.snr < 5).nonzero()[0]) == 130
    assert int((schedule.snr < 1).nonzero()[0]) == 259


def test_cosine_tables_are_the_published_constants() -> None:
    """Constants have 10 digits or more, hence rel 1e-9; alpha_bar is that of the capped betas."""
    schedule = NoiseSchedule.from_betas(make_betas("cosine"))
    expected = {
        "betas": {0: 4.1284224822e-05, 1: 4.61417527367e-05, 999: 0.999},
        "alphas_cumprod": {
            0: 0.999958715775,
            250: 0.845887986497,
            500: 0.492285172449,
            998: 2.42876690703e-06,
            999: 2.42876690703e-09,
        },
        "posterior_log_variance": {0: -10.734082532465},
    }
    for name, values in expected.items():
        for t, value in values.items():
            assert getattr(schedule, name)[t].item() == pytest.approx(value, rel=1e-9), (name, t)
    assert make_betas("cosine", 4000).neg().add(1).prod().item() == pytest.approx(1.51798e-10, rel=1e-5)


def test_sigmoid_alpha_bar_is_the_published_constants() -> None:
    """Constants have 6 to 12 digits, hence rel 1e-6."""
    schedule = NoiseSchedule.from_betas(make_betas("sigmoid_alpha_bar"))
    assert schedule.betas[0].item() == pytest.approx(3.00279199749e-4, rel=1e-9)
    assert schedule.alphas_cumprod[500].item() == pytest.approx(0.498342817882, rel=1e-9)
    assert schedule.alphas_cumprod[999].item() == pytest.approx(3.00279e-07, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("linear", lambda i, n: 1e-4 + (0.02 - 1e-4) * i / (n - 1)),
        ("scaled_linear", lambda i, n: (0.01 + (0.02**0.5 - 0.01) * i / (n - 1)) ** 2),
        ("quad", lambda i, n: (0.01 + (0.02**0.5 - 0.01) * i / (n - 1)) ** 2),
        ("sigmoid", lambda i, n: 1e-4 + (0.02 - 1e-4) / (1 + math.exp(6 - 12 * i / (n - 1)))),
        ("warmup10", lambda i, n: min(0.02, 1e-4 + (0.02 - 1e-4) * i / (n // 10 - 1))),
        ("warmup50", lambda i, n: min(0.02, 1e-4 + (0.02 - 1e-4) * i / (n // 2 - 1))),
        ("const", lambda i, n: 0.02),
        ("jsd", lambda i, n: 1 / (n - i)),
    ],
)
@pytest.mark.parametrize("num_timesteps", [20, 1000])
def test_betas_follow_their_formula(name: str, formula, num_timesteps: int) -> None:
    """Exact up to rounding in float64."""
    expected = [formula(i, num_timesteps) for i in range(num_timesteps)]
    assert make_betas(name, num_timesteps).tolist() == pytest.approx(expected, rel=1e-12)


def test_laplace_alpha_bar_is_symmetric_in_log_snr() -> None:
    """alpha_bar(u) = sqrt(s / (1 + s)) and log s is odd around u = 1/2, so the squares of mirrored values sum to 1.

    Up to the constant 1e-6 in the logarithm, which moves the middle by 2.5e-7.
    """
    betas = make_betas("laplace", 1000)
    snr_at_start = 1e-6**-0.5
    alpha_bar_squared = snr_at_start / (1 + snr_at_start) * torch.cumprod(1 - betas, 0) ** 2
    assert (alpha_bar_squared[:-1] + alpha_bar_squared[:-1].flip(0)).tolist() == pytest.approx([1.0] * 999, abs=3e-7)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [1, 2, 7, 4000])
def test_every_schedule_gives_a_process_of_any_length(name: str, num_timesteps: int) -> None:
    schedule = NoiseSchedule.from_betas(make_betas(name, num_timesteps))
    assert len(schedule) == num_timesteps
    assert schedule.betas.dtype == torch.float64
    assert bool((schedule.alphas_cumprod.diff() <= 0).all())
    for table in vars(schedule).values():
        assert table.shape == (num_timesteps,)
        assert bool(table.isfinite().all())


def test_rescaling_ends_without_signal_and_keeps_the_first_step() -> None:
    """Algorithm 1: the last value is 0 exactly, the first is kept up to rounding, the shape is affine in sqrt."""
    betas = make_betas("linear")
    before = torch.cumprod(1 - betas, 0).sqrt()
    after = torch.cumprod(1 - rescale_to_zero_terminal_snr(betas), 0).sqrt()
    assert after[-1].item() == 0
    assert after[0].item() == pytest.approx(before[0].item(), rel=1e-14)
    slope = (after[:-1] - after[1:]) / (before[:-1] - before[1:])
    assert slope.tolist() == pytest.approx([(before[0] / (before[0] - before[-1])).item()] * 999, rel=1e-9)


def test_posterior_carries_the_marginal_of_t_to_that_of_t_minus_1() -> None:
    """Averaging q(x_{t-1} | x_t, x_0) over q(x_t | x_0) gives q(x_{t-1} | x_0): exact, to float64 rounding."""
    schedule = NoiseSchedule.from_betas(make_betas("linear"))
    mean = schedule.posterior_mean_coef_x_0 + schedule.posterior_mean_coef_x_t * schedule.alphas_cumprod.sqrt()
    variance = schedule.posterior_mean_coef_x_t**2 * (1 - schedule.alphas_cumprod) + schedule.posterior_variance
    assert mean.tolist() == pytest.approx(schedule.alphas_cumprod_prev.sqrt().tolist(), rel=1e-12)
    assert variance.tolist() == pytest.approx((1 - schedule.alphas_cumprod_prev).tolist(), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(
    ("betas", "sentence"),
    [
        ([0.1, 0.0], "timestep 1 is 0.0"),
        ([0.1, -0.1], "timestep 1 is -0.1"),
        ([1.5], "timestep 0 is 1.5"),
        ([0.1, float("nan")], "timestep 1 is nan"),
        ([], "non-empty"),
        ([[0.1]], "non-empty list of numbers"),
    ],
)
def test_impossible_betas_are_refused(betas: list[float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        NoiseSchedule.from_betas(betas)


def test_unknown_schedules_and_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="'cosinus' is unknown; choose one of linear"):
        make_betas("cosinus")
    with pytest.raises(ValueError, match="at least 1"):
        make_betas("linear", 0)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_count_gives_as_many_descending_steps_inside_the_chain(spacing: str) -> None:
    for count in range(1, 1001):
        steps = spaced_timesteps(spacing, count, 1000)
        assert len(steps) == count
        assert steps[0] <= 999
        assert steps[-1] >= 0
        assert all(np.diff(steps) < 0), (spacing, count)


def test_spacings_begin_and_end_where_their_paper_says() -> None:
    """Table 2 of Lin et al. 2024 for 10 of 1000 steps; quadratic has its gaps grow linearly."""
    assert spaced_timesteps("leading", 10, 1000) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert spaced_timesteps("leading", 10, 1000, offset=1)[-1] == 1
    assert spaced_timesteps("trailing", 10, 1000) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert spaced_timesteps("linspace", 10, 1000) == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert spaced_timesteps("quadratic", 10, 1000) == [999, 789, 604, 444, 308, 197, 111, 49, 12, 0]
    assert spaced_timesteps("quadratic", 1, 1000) == [999]
    assert spaced_timesteps("quadratic", 1000, 1000) == list(range(1000))[::-1]
    with pytest.raises(ValueError, match="'karras' is unknown"):
        spaced_timesteps("karras", 10, 1000)


def test_transitions_compose_the_steps_that_they_skip() -> None:
    """1 - beta of a long step is the product over the steps inside it, to float64 rounding."""
    schedule = NoiseSchedule.from_betas(make_betas("linear"))
    run = SamplingRun(schedule, [999, 500, 10])
    assert [row.previous_timestep for row in run.transitions] == [500, 10, -1]
    assert 1 - run.transitions[0].beta == pytest.approx((1 - schedule.betas[501:]).prod().item(), rel=1e-12)
    assert run.transitions[-1].alpha_bar_prev == 1
    assert run.transitions[-1].posterior_variance == 0


def test_chains_that_lose_all_signal_early_stay_finite() -> None:
    """Between two states of pure noise the step is fresh noise: beta 1, posterior variance 1."""
    run = SamplingRun(NoiseSchedule.from_betas([0.5, 1.0, 0.5]), [2, 1, 0])
    assert (run.transitions[0].beta, run.transitions[0].posterior_variance) == (1.0, 1.0)
    assert (run.transitions[1].beta, run.transitions[1].posterior_variance) == (1.0, 0.5)
