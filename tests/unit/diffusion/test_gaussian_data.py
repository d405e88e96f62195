"""Samplers on data whose perfect network is known: every step, and where it ends, can be computed by hand."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from oracles import GaussianData, seeded

from ddpm_hf.diffusion import GaussianDiffusionScheduler

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace", "quadratic", "custom")
FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
VARIANCES = (*FIXED_VARIANCES, "learned_range", "learned")
V = -0.4
"""What a network with a learned variance says of it here, in every step."""


def start(spacing: str, count: int, **config) -> GaussianDiffusionScheduler:
    """A scheduler with its run."""
    scheduler = GaussianDiffusionScheduler(**config)
    if spacing == "custom":
        length = len(scheduler)
        steps = sorted({0, 3, length - 1, *(round(length * u**3) for u in torch.linspace(0.3, 0.9, count).tolist())})
        scheduler.set_timesteps(timesteps=steps[::-1][:count])
    else:
        scheduler.set_timesteps(count, timestep_spacing=spacing)
    return scheduler


def predict(scheduler: GaussianDiffusionScheduler, data: GaussianData, x: torch.Tensor, t: int) -> torch.Tensor:
    """The perfect network, with V in as many channels more if the variance is learned."""
    output = data.predict(scheduler, x, t)
    return torch.cat([output, torch.full_like(x, V)], 1) if "learned" in scheduler.variance_type else output


def sample(scheduler: GaussianDiffusionScheduler, data: GaussianData, x: torch.Tensor, eta: float, seed: int = 1):
    """Run the reverse process with the perfect network."""
    generator = seeded(seed)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(predict(scheduler, data, x, t), t, x, generator=generator, eta=eta).prev_sample
    return x


def alpha_bars(scheduler: GaussianDiffusionScheduler) -> list[float]:
    """The products of 1 - beta up to each t in Python floats; the last, at t = -1, is 1."""
    alphas = [1 - beta for beta in scheduler.noise_schedule.betas.tolist()]
    return [*itertools.accumulate(alphas, lambda a, b: a * b), 1.0]


def recursion(scheduler: GaussianDiffusionScheduler, data: GaussianData, eta: float) -> Iterator[tuple[float, ...]]:
    """For each step t and the a, b, c of x' = a x + b + c z: Eq. 12 of DDIM with the perfect x_0, written out.

    The variance is that of section 3.2 of DDPM, Eq. 15 of improved DDPM, or exp(V).
    """
    steps, table = scheduler.timesteps.tolist(), alpha_bars(scheduler)
    for t, previous in zip(steps, [*steps[1:], -1], strict=True):
        now, then = table[t], table[previous]
        beta = 1 - now / then
        beta_tilde = (1 - then) / (1 - now) * beta
        gain = math.sqrt(now) * data.deviation**2 / (now * data.deviation**2 + 1 - now)
        x_0 = (gain, data.mean - gain * math.sqrt(now) * data.mean)  # x_0 = x_0[0] x + x_0[1]
        eps = ((1 - math.sqrt(now) * x_0[0]) / math.sqrt(1 - now), -math.sqrt(now) * x_0[1] / math.sqrt(1 - now))
        direction = math.sqrt(1 - then - eta**2 * beta_tilde)
        if previous < 0:
            variance = 0.0
        elif scheduler.variance_type == "learned":
            variance = math.exp(V)
        elif scheduler.variance_type == "learned_range":
            variance = math.exp((V + 1) / 2 * math.log(beta) + (1 - V) / 2 * math.log(beta_tilde))
        else:
            variance = beta_tilde if "small" in scheduler.variance_type else beta
        a, b = (math.sqrt(then) * x_0[i] + direction * eps[i] for i in range(2))
        yield t, a, b, eta * math.sqrt(variance)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2", "zero_snr"])
def test_every_step_has_the_mean_and_variance_of_the_recursion_of_the_papers(
    betas: str, spacing: str, eta: float
) -> None:
    """For all variance and prediction types: the affine map of each step, and the moments that it carries from N(0, 1).

    The map is read off three samples. Float64, whose rounding 1 / sqrt(alpha_bar) amplifies by up to 160 on the linear
    schedule, 1e-10; by 20000 at the end of the cosine schedule, 1e-9.
    """
    schedule = {"rescale_betas_zero_snr": True} if betas == "zero_snr" else {"beta_schedule": betas}
    data, x = GaussianData(), torch.tensor([[[0.0]], [[1.0]], [[0.0]]], dtype=torch.float64)
    for prediction_type, variance_type in itertools.product(PREDICTION_TYPES, VARIANCES):
        if betas == "zero_snr" and prediction_type == "epsilon" and spacing != "leading":
            continue  # refused: no prediction of the noise says anything of x_0 where no signal is left
        scheduler = start(
            spacing, 13, prediction_type=prediction_type, variance_type=variance_type, clip_sample=False, **schedule
        )
        mean = expected_mean = 0.0
        variance = expected_variance = 1.0
        for t, *expected in recursion(scheduler, data, eta):
            output = predict(scheduler, data, x, t)
            y = scheduler.step(output, t, x, generator=seeded(t), eta=eta).prev_sample.flatten()
            z = torch.randn(3, 1, 1, dtype=torch.float64, generator=seeded(t)).flatten()
            c = ((y[2] - y[0]) / (z[2] - z[0])).item()
            b = (y[0] - c * z[0]).item()
            a = (y[1] - c * z[1]).item() - b
            assert [a, b, c] == pytest.approx(expected, rel=1e-9, abs=1e-9), (prediction_type, variance_type, t)
            mean, variance = a * mean + b, a**2 * variance + c**2
            expected_mean = expected[0] * expected_mean + expected[1]
            expected_variance = expected[0] ** 2 * expected_variance + expected[2] ** 2
            assert mean == pytest.approx(expected_mean, abs=1e-10 if betas == "linear" else 1e-9)
            assert variance == pytest.approx(expected_variance, abs=1e-10 if betas == "linear" else 1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_full_length_samples_have_the_mean_and_deviation_of_the_data(beta_schedule: str, eta: float) -> None:
    """20000 samples: the standard errors are 0.0035 and 0.0025; 4 of them, and 0.003 for the finite step."""
    data = GaussianData()
    scheduler = GaussianDiffusionScheduler(beta_schedule=beta_schedule, clip_sample=False)
    x = sample(scheduler, data, torch.randn(20000, 1, generator=seeded()), eta)
    assert x.mean().item() == pytest.approx(data.mean, abs=0.017)
    assert x.std().item() == pytest.approx(data.deviation, abs=0.013)


@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_data_of_one_point_is_returned_exactly(variance_type: str, eta: float) -> None:
    """The perfect network always answers the point, and the last step adds no noise wherever it starts.

    Float64 rounding, amplified by 1 / alpha = 157 in the first step of the noise prediction.
    """
    point = GaussianData(mean=0.7, deviation=0.0)
    noise = torch.randn(2, 1, 4, dtype=torch.float64, generator=seeded())
    for prediction_type, spacing, count in itertools.product(PREDICTION_TYPES, SPACINGS, (1, 2, 6)):
        for rescale in (False, True) if prediction_type != "epsilon" else (False,):
            scheduler = start(
                spacing,
                count,
                prediction_type=prediction_type,
                variance_type=variance_type,
                rescale_betas_zero_snr=rescale,
            )
            result = sample(scheduler, point, noise, eta)
            torch.testing.assert_close(result, torch.full_like(noise, 0.7), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_the_posterior_chain_reproduces_the_forward_marginals(beta_schedule: str) -> None:
    """From x_{T-1} of the forward process down to x_0, drawing from q(x_{t-1} | x_t, x_0) with the true x_0.

    Mean and variance of every x_t are those of q(x_t | x_0), to float64 rounding over 1000 steps: 1e-10.
    """
    scheduler = GaussianDiffusionScheduler(beta_schedule=beta_schedule)
    x_0 = torch.tensor(0.6, dtype=torch.float64).expand(1000, 2)
    probes = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(1000, 2)
    posterior = scheduler.posterior(x_0, probes, torch.arange(1000))
    offsets, slopes = posterior.mean[:, 0], posterior.mean[:, 1] - posterior.mean[:, 0]
    table = alpha_bars(scheduler)
    mean, variance = math.sqrt(table[999]) * 0.6, 1 - table[999]
    for t in range(999, 0, -1):
        mean = slopes[t].item() * mean + offsets[t].item()
        variance = slopes[t].item() ** 2 * variance + posterior.variance[t].item()
        assert mean == pytest.approx(math.sqrt(table[t - 1]) * 0.6, rel=1e-10)
        assert variance == pytest.approx(1 - table[t - 1], rel=1e-9)
    assert (slopes[0].item(), offsets[0].item()) == pytest.approx((0.0, 0.6), abs=1e-12), "the last step gives x_0"


def test_learned_variances_lie_between_the_fixed_ones_and_are_reached_at_the_ends() -> None:
    """learned_range at -1 and 1 is fixed_small and fixed_large; learned takes log-variances. Float64 rounding."""
    noise = torch.randn(2, 1, 4, dtype=torch.float64, generator=seeded())
    output = torch.randn(2, 1, 4, dtype=torch.float64, generator=seeded(2))

    def step(variance_type: str, variance_output: float | None) -> torch.Tensor:
        scheduler = GaussianDiffusionScheduler(variance_type=variance_type)
        scheduler.set_timesteps(10)
        extra = [] if variance_output is None else [torch.full_like(output, variance_output)]
        return scheduler.step(torch.cat([output, *extra], 1), 500, noise, generator=seeded(3)).prev_sample

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
