"""Betas, tables and timesteps, against 40-digit arithmetic, the published formulas and other code."""

import math

import numpy as np
import pytest
import torch

from ddpm_hf.diffusion import NoiseSchedule, make_betas
from ddpm_hf.diffusion.schedule import (
    BETA_RANGES,
    BETA_SCHEDULES,
    SMALLEST_BETA,
    InferenceTimesteps,
    rescale_to_zero_terminal_snr,
    scale_beta_range,
    spaced_timesteps,
    whole_number,
)

# 16 digits of 40-digit arithmetic: table -> timestep -> value.
LINEAR = {
    "betas": {0: 1e-4, 1: 1.199199199199199e-4, 999: 0.02},
    "alphas_cumprod": {
        0: 0.9999,
        250: 0.5214230306185273,
        500: 0.0777966583650239,
        750: 0.003300158361569431,
        999: 4.035829765375683e-05,
    },
    "snr": {0: 9999.0, 500: 0.08435954941032642, 999: 4.035992651168428e-05},
    "posterior_variance": {0: 0.0, 1: 5.453187661302605e-05, 487: 0.009791571985690043, 999: 0.01999998352656061},
    "posterior_log_variance": {0: -9.816725135295594, 1: -9.816725135295594},
    "posterior_mean_coef_x_0": {0: 1.0, 1: 0.5452914995102715, 999: 1.283514871722469e-04},
    "posterior_mean_coef_x_t": {0: 0.0, 1: 0.4547084989905647, 999: 0.9899486782675173},
    "log_betas": {0: -9.210340371976183},
}
COSINE = {
    "betas": {0: 4.12842248217778e-05, 1: 4.614175273669451e-05, 998: 0.749999392901162, 999: 0.999},
    "alphas_cumprod": {
        0: 0.9999587157751782,
        250: 0.8458879864968829,
        500: 0.4922851724488026,
        750: 0.1431786464260979,
        998: 2.428766907034468e-06,
        999: 2.428766907034468e-09,
    },
    "posterior_log_variance": {0: -10.73408253246637, 1: -10.73408253246637},
}
OTHERS = {
    "scaled_linear": {1: 1.02648364350834e-04, "500": 0.3312745795172555, "999": 7.334124595808149e-04},
    "sigmoid": {0: 1.49205200817032e-04, "500": 0.2988876278467589, "999": 3.968181990533208e-05},
    "laplace": {
        0: 0.02115375720041199,
        500: 2.500313829399931e-04,
        999: 0.8472526270584196,
        "500": 0.7072832705588378,
        "999": 0.03162277660168379,
    },
    "sigmoid_alpha_bar": {
        0: 3.00279199749186e-04,
        998: 0.5013569029181812,
        "500": 0.4983428178820696,
        "999": 3.00279199749186e-07,
    },
}


@pytest.mark.parametrize(("name", "tables"), [("linear", LINEAR), ("squaredcos_cap_v2", COSINE)])
def test_tables_are_those_of_40_digit_arithmetic(name: str, tables: dict[str, dict[int, float]]) -> None:
    """To 1e-12 of each value; 3e-16 is the rounding of 1 - x in a small beta."""
    schedule = NoiseSchedule.from_betas(make_betas(name))
    for table, values in tables.items():
        for t, value in values.items():
            assert getattr(schedule, table)[t].item() == pytest.approx(value, rel=1e-12, abs=3e-16), (table, t)


def test_other_schedules_are_those_of_40_digit_arithmetic() -> None:
    """To 1e-12 of each value; a string key is a timestep of alpha_bar, a number one of beta."""
    for name, values in OTHERS.items():
        schedule = NoiseSchedule.from_betas(make_betas(name))
        for t, value in values.items():
            table = schedule.alphas_cumprod if isinstance(t, str) else schedule.betas
            assert table[int(t)].item() == pytest.approx(value, rel=1e-12, abs=0), (name, t)


def test_facts_about_the_published_schedules() -> None:
    """Results of 40-digit arithmetic, rel 1e-9: the signal left at the end, where the SNR falls below 5 and 1."""

    def end(name: str, num_timesteps: int, *betas: float) -> float:
        return float(NoiseSchedule.from_betas(make_betas(name, num_timesteps, *betas)).alphas_cumprod[-1])

    linear = NoiseSchedule.from_betas(make_betas("linear"))
    assert linear.betas.sum().item() == pytest.approx(10.05, rel=1e-12)
    assert int((linear.snr < 5).nonzero()[0]) == 130
    assert int((linear.snr < 1).nonzero()[0]) == 259
    assert end("linear", 100) == pytest.approx(0.3635632480554919, rel=1e-9)
    assert end("linear", 4000) == pytest.approx(2.653232371823995e-18, rel=1e-9)
    assert end("cosine", 4000) == pytest.approx(1.517980468849563e-10, rel=1e-9)
    assert int((make_betas("cosine") == 0.999).sum()) == 1


def of_alpha_bar(alpha_bar):
    """Betas from T+1 values of alpha_bar divided by the first one, as most code outside diffusers computes them."""

    def betas(n: int) -> list[float]:
        points = np.array([alpha_bar(i / n) for i in range(n + 1)])
        points = points / points[0]
        return np.clip(1 - points[1:] / points[:-1], 0, 0.999).tolist()

    return betas


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def laplace(u: float) -> float:
    """Half the logit of the quantile function of a Laplace distribution, with the root and the 1e-6 of diffusers."""
    tail = math.log(2 * min(u, 1 - u) + 1e-6) / 2
    return logistic(tail if u > 0.5 else -tail) ** 0.5


FORMULAS = {
    "linear": lambda n: [1e-4 + (0.02 - 1e-4) * i / (n - 1) for i in range(n)],
    "scaled_linear": lambda n: [(0.01 + (0.02**0.5 - 0.01) * i / (n - 1)) ** 2 for i in range(n)],
    "sigmoid": lambda n: [1e-4 + (0.02 - 1e-4) * logistic(12 * i / (n - 1) - 6) for i in range(n)],
    "warmup10": lambda n: [min(0.02, 1e-4 + (0.02 - 1e-4) * i / (n // 10 - 1)) for i in range(n)],
    "warmup50": lambda n: [min(0.02, 1e-4 + (0.02 - 1e-4) * i / (n // 2 - 1)) for i in range(n)],
    "const": lambda n: [0.02] * n,
    "jsd": lambda n: [1 / (n - i) for i in range(n)],
    "squaredcos_cap_v2": of_alpha_bar(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2),
    "laplace": of_alpha_bar(laplace),
    "sigmoid_alpha_bar": of_alpha_bar(lambda u: (logistic(3) - logistic(6 * u - 3)) / (logistic(3) - logistic(-3))),
}


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_betas_follow_their_formula(name: str) -> None:
    """Written out a second time in Python floats: 1e-12, and 1e-15 for the rounding of 1 - x."""
    for num_timesteps in (20, 1000):
        expected = torch.tensor(FORMULAS[name](num_timesteps), dtype=torch.float64)
        torch.testing.assert_close(make_betas(name, num_timesteps), expected, rtol=1e-12, atol=1e-15)


def test_aliases_name_the_same_schedule() -> None:
    assert torch.equal(make_betas("cosine"), make_betas("squaredcos_cap_v2"))
    assert torch.equal(make_betas("quad"), make_betas("scaled_linear"))


@pytest.mark.parametrize("num_timesteps", [1, 2, 7, 4000])
def test_every_schedule_gives_a_process_of_any_length(num_timesteps: int) -> None:
    for name in BETA_SCHEDULES:
        schedule = NoiseSchedule.from_betas(make_betas(name, num_timesteps))
        assert len(schedule) == num_timesteps
        assert schedule.betas.dtype == torch.float64
        assert bool((schedule.alphas_cumprod.diff() <= 0).all())
        for table in vars(schedule).values():
            assert table.shape == (num_timesteps,)
            assert bool(table.isfinite().all()), name


# Betas for another length


@pytest.mark.parametrize("num_timesteps", [100, 4000])
def test_scaled_linear_betas_are_those_of_improved_ddpm(num_timesteps: int) -> None:
    """Its linspace(1000/T 1e-4, 1000/T 0.02, T): equal, and the signal at the end stays within a factor of 2.1."""
    beta_start, beta_end = scale_beta_range("linear", num_timesteps, 1e-4, 0.02)
    factor = 1000 / num_timesteps
    betas = make_betas("linear", num_timesteps, beta_start, beta_end)
    expected = np.linspace(factor * 1e-4, factor * 0.02, num_timesteps)
    torch.testing.assert_close(betas, torch.from_numpy(expected), rtol=1e-13, atol=0)
    left = (1 - betas).prod().item()
    assert 4.0358e-5 / 2.1 < left < 4.0358e-5 * 2.1


def test_scaling_a_range_multiplies_each_of_its_betas() -> None:
    """To float64 rounding."""
    assert scale_beta_range("linear", 1000, 1e-4, 0.02) == (1e-4, 0.02)
    for name in BETA_RANGES:
        scaled = make_betas(name, 50, *scale_beta_range(name, 50, 1e-4, 0.02))
        assert scaled.tolist() == pytest.approx((20 * make_betas(name, 50)).tolist(), rel=1e-13), name


def test_schedules_without_a_range_cannot_be_scaled() -> None:
    for name in set(BETA_SCHEDULES) - set(BETA_RANGES):
        with pytest.raises(ValueError, match=rf"does not apply to beta_schedule '{name}'.*linear, .*Leave it out\."):
            scale_beta_range(name, 100, 1e-4, 0.02)
        assert torch.equal(make_betas(name, 100), make_betas(name, 100, 1e-3, 0.5)), name


def test_too_few_timesteps_to_scale_are_rejected() -> None:
    """At T = 20 the last beta is 1, the largest possible."""
    assert scale_beta_range("linear", 20, 1e-4, 0.02) == (0.005, 1.0)
    with pytest.raises(ValueError, match="above 1; num_train_timesteps must be at least 20"):
        scale_beta_range("quad", 19, 1e-4, 0.02)


# Zero terminal SNR


def test_rescaling_ends_without_signal_and_keeps_the_first_step() -> None:
    """Algorithm 1 of Lin et al. 2024: the last value is 0 exactly, the first is kept, sqrt(alpha_bar) changes linearly.

    Float64 rounding, 1e-12, because alpha_bar is converted to betas and back; jsd ends at 0 already.
    """
    for name in BETA_SCHEDULES:
        betas = make_betas(name)
        before = torch.cumprod(1 - betas, 0).sqrt()
        after = torch.cumprod(1 - rescale_to_zero_terminal_snr(betas), 0).sqrt()
        expected = (before - before[-1]) * before[0] / (before[0] - before[-1])
        assert after[-1].item() == 0
        torch.testing.assert_close(after, expected, rtol=1e-12, atol=1e-12, msg=name)
        NoiseSchedule.from_betas(rescale_to_zero_terminal_snr(betas))


def test_rescaling_works_where_the_signal_has_ended_early() -> None:
    """0 / 0 between two states without signal: the step adds fresh noise."""
    betas = rescale_to_zero_terminal_snr(torch.tensor([0.5, 1.0, 0.5], dtype=torch.float64))
    assert betas.tolist() == pytest.approx([0.5, 1.0, 1.0], rel=1e-15)


def test_a_single_timestep_cannot_be_rescaled() -> None:
    with pytest.raises(ValueError, match="at least 2 timesteps; leave it out"):
        rescale_to_zero_terminal_snr(torch.tensor([0.5]))


# The tables


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2", "jsd"])
def test_posterior_carries_the_marginal_of_t_to_that_of_t_minus_1(name: str) -> None:
    """Averaging q(x_{t-1} | x_t, x_0) over q(x_t | x_0) gives q(x_{t-1} | x_0): exact, to float64 rounding."""
    schedule = NoiseSchedule.from_betas(make_betas(name))
    mean = schedule.posterior_mean_coef_x_0 + schedule.posterior_mean_coef_x_t * schedule.alphas_cumprod.sqrt()
    variance = schedule.posterior_mean_coef_x_t**2 * (1 - schedule.alphas_cumprod) + schedule.posterior_variance
    before = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod[:-1]])
    torch.testing.assert_close(mean, before.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(variance, 1 - before, rtol=1e-9, atol=1e-15)


def test_transitions_compose_the_steps_that_they_skip() -> None:
    """1 - beta of a long step is the product over the steps inside it, to float64 rounding.

    The two variances are those of diffusers' own tests of DDIM, to their 5 digits.
    """
    schedule = NoiseSchedule.from_betas(make_betas("linear"))
    run = InferenceTimesteps(schedule, [999, 500, 10])
    assert [row.previous_timestep for row in run.transitions] == [500, 10, -1]
    assert 1 - run.transitions[0].beta == pytest.approx((1 - schedule.betas[501:]).prod().item(), rel=1e-12)
    assert run.transitions[-1].alpha_bar_prev == 1
    assert run.transitions[-1].posterior_variance == 0
    for timesteps, variance in (([420, 400], 0.14771), ([980, 960], 0.32460)):
        assert schedule.transitions(timesteps)[0].posterior_variance == pytest.approx(variance, abs=1e-5)


def test_transitions_without_signal_are_finite() -> None:
    """Between two states of pure noise the step adds fresh noise: beta 1, posterior variance 1."""
    run = InferenceTimesteps(NoiseSchedule.from_betas([0.5, 1.0, 0.5]), [2, 1, 0])
    assert (run.transitions[0].beta, run.transitions[0].posterior_variance) == (1.0, 1.0)
    assert (run.transitions[1].beta, run.transitions[1].posterior_variance) == (1.0, 0.5)


def test_every_transition_has_a_variance_where_alpha_bar_underflows() -> None:
    """Alpha_bar reaches the smallest float64 numbers, whose ratios are meaningless: a beta of 0 would have no log."""
    schedule = NoiseSchedule.from_betas([0.3] * 3000)
    assert schedule.alphas_cumprod[-1].item() < 1e-300
    for row in schedule.transitions(range(3000)[::-1]):
        assert row.beta == pytest.approx(0.3, rel=1e-9) if row.alpha_bar_prev > 1e-300 else row.beta == 1
        assert row.posterior_variance > 0 or row.timestep == 0


# Errors


@pytest.mark.parametrize(
    ("betas", "sentence"),
    [
        ([0.1, 0.0], "timestep 1 is 0.0; every beta must lie between 1e-12 and 1"),
        ([0.1, -0.1], "timestep 1 is -0.1"),
        ([SMALLEST_BETA / 2], "timestep 0 is 5e-13"),
        ([1.5], "timestep 0 is 1.5"),
        ([0.1, float("nan")], "timestep 1 is nan"),
        ([], "non-empty"),
        ([[0.1]], "non-empty list of numbers"),
        (["a"], "one list of numbers"),
        ([0.1, [0.2]], "one list of numbers"),
        (None, "one list of numbers"),
    ],
)
def test_invalid_betas_are_rejected(betas, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        NoiseSchedule.from_betas(betas)


def test_the_smallest_beta_gives_finite_tables() -> None:
    for table in vars(NoiseSchedule.from_betas([SMALLEST_BETA] * 3)).values():
        assert bool(table.isfinite().all())


def test_unknown_schedules_and_lengths_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"'cosinus' is unknown; choose one of linear, .*, jsd, cosine, quad"):
        make_betas("cosinus")
    for length in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            make_betas("linear", length)
    with pytest.raises(ValueError, match=r"num_train_timesteps is 2.5; it must be a whole number"):
        make_betas("linear", 2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("beta_start", "beta_end"),
    [(0.02, 1e-4), (-0.1, 0.02), (0.0, 0.02), (1e-4, 1.5), (float("nan"), 0.02), (1e-4, float("nan")), ("a", 0.02)],
)
def test_invalid_ranges_of_betas_are_rejected(beta_start: float, beta_end: float) -> None:
    """A range increases, as in every paper; `const` has only an end."""
    for name in BETA_RANGES:
        if name == "const" and 0 < beta_end <= 1:
            assert make_betas(name, 10, beta_start, beta_end).tolist() == [beta_end] * 10
            continue
        with pytest.raises(ValueError, match=r"beta_start is .* and beta_end .*; they must be numbers with 0 < beta_"):
            make_betas(name, 10, beta_start, beta_end)


def test_whole_numbers_come_in_any_numeric_type() -> None:
    for value in (5, 5.0, np.int64(5), np.float32(5), torch.tensor(5), torch.tensor([5.0])):
        assert whole_number("n", value) == 5
    for value in (5.5, "5", None, True, float("nan"), float("inf"), [5], 5j, torch.tensor([5, 6])):
        with pytest.raises(ValueError, match=r"n is .*; it must be a whole number\."):
            whole_number("n", value)


# Timesteps

SPACINGS = ("leading", "trailing", "linspace", "quadratic")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_count_gives_as_many_descending_timesteps(spacing: str) -> None:
    """All counts up to 50 timesteps, and those of 1000 that round badly."""
    for length, counts in ((1, (1,)), (7, range(1, 8)), (50, range(1, 51)), (1000, (*range(1, 1000, 37), 999, 1000))):
        for count in counts:
            steps = spaced_timesteps(spacing, count, length)
            assert len(steps) == count
            assert 0 <= steps[-1] <= steps[0] <= length - 1
            assert all(np.diff(steps) < 0), (spacing, count)


def test_spacings_begin_and_end_where_their_paper_says() -> None:
    """Table 2 of Lin et al. 2024 for 10 of 1000 steps; the gaps of quadratic grow linearly."""
    assert spaced_timesteps("leading", 10, 1000) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert spaced_timesteps("leading", 10, 1000, offset=1)[-1] == 1
    assert spaced_timesteps("trailing", 10, 1000) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert spaced_timesteps("linspace", 10, 1000) == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert spaced_timesteps("quadratic", 10, 1000) == [999, 789, 604, 444, 308, 197, 111, 49, 12, 0]
    assert spaced_timesteps("quadratic", 1, 1000) == [999]
    assert spaced_timesteps("quadratic", 1000, 1000) == list(range(1000))[::-1]
    with pytest.raises(ValueError, match="'karras' is unknown"):
        spaced_timesteps("karras", 10, 1000)


def test_spacings_are_those_of_other_code_for_50_steps() -> None:
    """Improved DDPM calls linspace "50" and leading "ddim50"; denoising-diffusion-pytorch uses trailing."""
    fractional = [round(i * 999 / 49) for i in range(50)]
    assert fractional[:5] == [0, 20, 41, 61, 82]
    assert spaced_timesteps("linspace", 50, 1000) == fractional[::-1]
    assert spaced_timesteps("leading", 50, 1000) == list(range(0, 1000, 20))[::-1]
    assert spaced_timesteps("trailing", 50, 1000) == np.linspace(-1, 999, 51).astype(int)[:0:-1].tolist()


@pytest.mark.parametrize("timesteps", [None, 5, "51", [3, "2"], [3, None], [3, True], [3, float("nan")], [[3, 2]]])
def test_lists_of_anything_but_whole_numbers_are_rejected(timesteps) -> None:
    with pytest.raises(ValueError, match=r"whole number"):
        InferenceTimesteps(NoiseSchedule.from_betas([0.1] * 10), timesteps)


def test_whole_numbers_of_any_type_make_a_list() -> None:
    schedule = NoiseSchedule.from_betas([0.1] * 10)
    for given in ([9, 4, 0], (9.0, 4.0, 0.0), np.array([9, 4, 0]), iter([9, 4, 0])):
        assert InferenceTimesteps(schedule, given).timesteps.tolist() == [9, 4, 0]


@pytest.mark.parametrize("timestep", [None, "a", "9", 9.5, float("nan"), [9], True, 9j])
def test_timesteps_outside_the_list_are_rejected(timestep) -> None:
    run = InferenceTimesteps(NoiseSchedule.from_betas([0.1] * 10), [9, 4, 1])
    with pytest.raises(ValueError, match=r"is not in the list of 3 timesteps being run \(9 ... 1\)"):
        run.transition(timestep)
