"""Samplers on data whose perfect network is known: every trajectory, and where it ends, can be computed by hand."""

import itertools
import math

import pytest
import torch
from oracles import GaussianData, seeded

from ddpm_hf.diffusion import GaussianDiffusionScheduler

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace", "quadratic")
FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")


def sample(scheduler: GaussianDiffusionScheduler, data: GaussianData, x: torch.Tensor, eta: float, seed: int = 1):
    """Run the reverse process with the perfect network."""
    generator = seeded(seed)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(data.predict(scheduler, x, t), t, x, generator=generator, eta=eta).prev_sample
    return x


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_trajectories_follow_the_recursion_of_the_papers(spacing: str, eta: float) -> None:
    """Eq. 12 of DDIM written out in Python floats, with the same noise; float64 on both sides, 13 steps: atol 1e-11."""
    data = GaussianData()
    start = torch.randn(2, 1, 3, dtype=torch.float64, generator=seeded())
    for prediction_type, variance_type in itertools.product(PREDICTION_TYPES, FIXED_VARIANCES):
        scheduler = GaussianDiffusionScheduler(
            prediction_type=prediction_type, variance_type=variance_type, clip_sample=False
        )
        scheduler.set_timesteps(13, timestep_spacing=spacing)
        steps = scheduler.timesteps.tolist()
        generator, x = seeded(1), start
        for t, previous in zip(steps, [*steps[1:], -1], strict=True):
            a = (1 - scheduler.noise_schedule.betas[: t + 1]).prod().item()
            a_prev = (1 - scheduler.noise_schedule.betas[: previous + 1]).prod().item()
            beta_tilde = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
            x_0 = data.mean + math.sqrt(a) * data.deviation**2 / (a * data.deviation**2 + 1 - a) * (
                x - math.sqrt(a) * data.mean
            )
            eps = (x - math.sqrt(a) * x_0) / math.sqrt(1 - a)
            x = math.sqrt(a_prev) * x_0 + math.sqrt(1 - a_prev - eta**2 * beta_tilde) * eps
            if eta > 0 and previous >= 0:
                variance = beta_tilde if "small" in variance_type else 1 - a / a_prev
                noise = torch.randn(x.shape, dtype=x.dtype, generator=generator)
                x = x + eta * math.sqrt(variance) * noise
        torch.testing.assert_close(sample(scheduler, data, start, eta), x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_full_length_samples_have_the_mean_and_deviation_of_the_data(beta_schedule: str, eta: float) -> None:
    """20000 samples: the standard errors are 0.0035 and 0.0025; 4 of them, and 0.003 for the finite step."""
    data = GaussianData()
    scheduler = GaussianDiffusionScheduler(beta_schedule=beta_schedule, clip_sample=False)
    x = sample(scheduler, data, torch.randn(20000, 1, generator=seeded()), eta)
    assert x.mean().item() == pytest.approx(data.mean, abs=0.017)
    assert x.std().item() == pytest.approx(data.deviation, abs=0.013)


@pytest.mark.parametrize("variance_type", FIXED_VARIANCES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_data_of_one_point_is_returned_exactly(variance_type: str, eta: float) -> None:
    """The perfect network always answers the point, and the last step adds no noise wherever it starts.

    Float64 rounding, amplified by 1 / alpha = 157 in the first step of the noise prediction.
    """
    point = GaussianData(mean=0.7, deviation=0.0)
    start = torch.randn(2, 1, 4, dtype=torch.float64, generator=seeded())
    for prediction_type, spacing, count in itertools.product(PREDICTION_TYPES, SPACINGS, (1, 2, 10)):
        scheduler = GaussianDiffusionScheduler(prediction_type=prediction_type, variance_type=variance_type)
        scheduler.set_timesteps(count, timestep_spacing=spacing)
        result = sample(scheduler, point, start, eta)
        torch.testing.assert_close(result, torch.full_like(start, 0.7), rtol=0, atol=1e-12)


def test_learned_variances_lie_between_the_fixed_ones_and_are_reached_at_the_ends() -> None:
    """learned_range at -1 and 1 is fixed_small and fixed_large; learned takes log-variances. Float64 rounding."""
    start = torch.randn(2, 1, 4, dtype=torch.float64, generator=seeded())
    output = torch.randn(2, 1, 4, dtype=torch.float64, generator=seeded(2))

    def step(variance_type: str, variance_output: float | None) -> torch.Tensor:
        scheduler = GaussianDiffusionScheduler(variance_type=variance_type)
        scheduler.set_timesteps(10)
        extra = [] if variance_output is None else [torch.full_like(output, variance_output)]
        return scheduler.step(torch.cat([output, *extra], 1), 500, start, generator=seeded(3)).prev_sample

    small, large = step("fixed_small", None), step("fixed_large", None)
    beta = GaussianDiffusionScheduler().noise_schedule.transitions([500, 400])[0].beta
    assert (large - small).abs().max().item() > 1e-3
    torch.testing.assert_close(step("learned_range", -1.0), small, rtol=0, atol=1e-11)
    torch.testing.assert_close(step("learned_range", 1.0), large, rtol=0, atol=1e-11)
    torch.testing.assert_close(step("learned", math.log(beta)), large, rtol=0, atol=1e-11)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_chains_without_terminal_signal_can_be_sampled(prediction_type: str) -> None:
    """Zero terminal SNR: 20000 samples, standard errors 0.0035 and 0.0025, 4 of them and 0.003 for the finite step."""
    data = GaussianData()
    scheduler = GaussianDiffusionScheduler(
        prediction_type=prediction_type,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(1000)
    for eta in (0.0, 1.0):
        x = sample(scheduler, data, torch.randn(20000, 1, generator=seeded()), eta)
        assert x.mean().item() == pytest.approx(data.mean, abs=0.017)
        assert x.std().item() == pytest.approx(data.deviation, abs=0.013)
