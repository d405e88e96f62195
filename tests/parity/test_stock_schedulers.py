"""The scheduler against DDPMScheduler and DDIMScheduler, with float64 tables given to them, and as shipped.

With float64 tables the arithmetic of stock becomes float64, and the remaining differences are not rounding.
"""

import itertools
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.diffusion.schedule import spaced_timesteps

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
SPACINGS = ("leading", "trailing", "linspace")


def in_float64(stock: Any, native: GaussianDiffusionScheduler) -> Any:
    """Give a stock scheduler the float64 tables."""
    stock.betas = native.noise_schedule.betas
    stock.alphas = 1 - stock.betas
    stock.alphas_cumprod = native.noise_schedule.alphas_cumprod
    stock.one = stock.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return stock


def largest_difference(native: Any, stock: Any, dtype: torch.dtype, channels: int = 2, **stock_arguments: Any) -> float:
    """Over all steps except the last, each on new random inputs and the same noise."""
    largest = 0.0
    generator = torch.Generator().manual_seed(0)
    for t in native.timesteps[:-1].tolist():
        sample = torch.randn(1, 2, 4, 4, dtype=dtype, generator=generator)
        output = torch.randn(1, channels, 4, 4, dtype=dtype, generator=generator)
        output[:, 2:].clamp_(-1, 1)
        ours = native.step(output, t, sample, torch.Generator().manual_seed(t), **stock_arguments).prev_sample
        theirs = stock.step(
            output, t, sample, generator=torch.Generator().manual_seed(t), **stock_arguments
        ).prev_sample
        largest = max(largest, (ours - theirs).abs().max().item())
    return largest


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ancestral_steps_are_those_of_stock_in_float64(beta_schedule: str, prediction_type: str) -> None:
    """1e-10: float64 rounding, amplified by 1 / sqrt(alpha_bar) up to 20000 at the end of the cosine schedule.

    Stock clamps a variance at 1e-20, which no step but the last reaches.
    """
    variances = {"fixed_small": 2, "fixed_small_log": 2, "fixed_large": 2, "learned_range": 4}
    for (variance_type, channels), spacing in itertools.product(variances.items(), SPACINGS):
        config = {
            "beta_schedule": beta_schedule,
            "prediction_type": prediction_type,
            "variance_type": variance_type,
            "timestep_spacing": spacing,
        }
        native = GaussianDiffusionScheduler(**config)
        stock = in_float64(DDPMScheduler(**config), native)
        for scheduler in (native, stock):
            scheduler.set_timesteps(13)
        assert largest_difference(native, stock, torch.float64, channels) < 1e-10, (variance_type, spacing)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_step_of_the_full_chain_is_that_of_stock_in_float64(prediction_type: str) -> None:
    """1e-11: float64 rounding, amplified by 1 / sqrt(alpha_bar) = 157."""
    native = GaussianDiffusionScheduler(prediction_type=prediction_type)
    stock = in_float64(DDPMScheduler(prediction_type=prediction_type), native)
    assert largest_difference(native, stock, torch.float64) < 1e-11


@pytest.mark.parametrize(("prediction_type", "eta"), [("epsilon", 0.0), ("sample", 0.5), ("v_prediction", 1.0)])
def test_ddim_steps_are_those_of_stock_in_float64(prediction_type: str, eta: float) -> None:
    """For counts that divide T: elsewhere stock's previous timestep is wrong."""
    for spacing, beta_schedule, use_clipped in itertools.product(
        ("leading", "trailing"), BETA_SCHEDULES[:3], (True, False)
    ):
        config = {"prediction_type": prediction_type, "timestep_spacing": spacing, "beta_schedule": beta_schedule}
        native = GaussianDiffusionScheduler(**config)
        stock = in_float64(DDIMScheduler(**config), native)
        for scheduler in (native, stock):
            scheduler.set_timesteps(20)
        difference = largest_difference(native, stock, torch.float64, eta=eta, use_clipped_model_output=use_clipped)
        assert difference < 1e-10, (spacing, beta_schedule, use_clipped)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_respaced_steps_are_within_float32_tables_of_stock_as_shipped(prediction_type: str) -> None:
    """Stock's 1 - alpha_bar is off by 1.7e-4 relative at t = 0: up to 1e-4 in the step from t = 20, on values to 4."""
    for beta_schedule, spacing in itertools.product(BETA_SCHEDULES[:3], SPACINGS):
        config = {
            "prediction_type": prediction_type,
            "beta_schedule": beta_schedule,
            "timestep_spacing": spacing,
        }
        native, stock, ddim = (s(**config) for s in (GaussianDiffusionScheduler, DDPMScheduler, DDIMScheduler))
        for scheduler in (native, stock, ddim):
            scheduler.set_timesteps(50)
        assert largest_difference(native, stock, torch.float32) < 1.5e-4, (beta_schedule, spacing)
        if spacing != "linspace":
            difference = largest_difference(native, ddim, torch.float32, eta=0.0, use_clipped_model_output=True)
            assert difference < 1.5e-4, (beta_schedule, spacing)


def deterministic_sample(reverse: bool = False) -> torch.Tensor:
    """The sample, or with `reverse` the noise, of diffusers' own scheduler tests."""
    numbers = torch.arange(4 * 3 * 8 * 8)
    return ((numbers.flip(0) if reverse else numbers).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)


@pytest.mark.parametrize(
    ("config", "start", "expected_sum", "expected_mean"),
    [
        ({}, None, 258.9606, 0.3372),
        ({"prediction_type": "v_prediction"}, None, 202.0296, 0.2631),
        ({}, 998, 387.967, 0.5051),
    ],
)
def test_full_loops_reach_the_constants_of_diffusers_own_tests(
    config: dict[str, Any], start: int | None, expected_sum: float, expected_mean: float
) -> None:
    """Their tolerances, 1e-2 and 1e-3. The third sum is 387.9466 there, from float32 tables: ours is 0.02 above."""
    scheduler = GaussianDiffusionScheduler(**config)
    sample, generator = deterministic_sample(), torch.manual_seed(0)
    timesteps = scheduler.timesteps
    if start is not None:
        timesteps = timesteps[start:]
        sample = scheduler.add_noise(sample, deterministic_sample(reverse=True), timesteps[:1])
    for t in timesteps:
        output = sample * t / (t + 1)
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
    assert sample.abs().sum().item() == pytest.approx(expected_sum, abs=1e-2)
    assert sample.abs().mean().item() == pytest.approx(expected_mean, abs=1e-3)


def test_variances_are_the_constants_of_diffusers_own_tests() -> None:
    """Their tolerance, 1e-5."""
    scheduler = GaussianDiffusionScheduler()
    for t, variance in ((0, 0.0), (487, 0.00979), (999, 0.02)):
        assert scheduler._get_variance(t).item() == pytest.approx(variance, abs=1e-5)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_tables_are_those_of_stock_to_float32(beta_schedule: str) -> None:
    """Stock computes in float32: 3e-6 is the sum of 1000 roundings; near 0 that is all that its rescaled betas keep."""
    for rescale, num_train_timesteps in itertools.product((False, True), (100, 1000)):
        config = {
            "beta_schedule": beta_schedule,
            "rescale_betas_zero_snr": rescale,
            "num_train_timesteps": num_train_timesteps,
        }
        native, stock = GaussianDiffusionScheduler(**config), DDPMScheduler(**config)
        torch.testing.assert_close(native.alphas_cumprod, stock.alphas_cumprod, rtol=0, atol=3e-6)
        torch.testing.assert_close(native.betas[:-2], stock.betas[:-2], rtol=1e-3, atol=1e-6)
        assert (native.alphas_cumprod[-1].item() == 0) == rescale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noising_is_that_of_stock_except_for_its_tables(dtype: torch.dtype) -> None:
    """Exact given float64 tables; as shipped, stock's noise at t = 0 is off by 8.5e-5 of 0.01 relative: 5e-6 here."""
    native = GaussianDiffusionScheduler()
    stock = DDPMScheduler() if dtype == torch.float32 else in_float64(DDPMScheduler(), native)
    x_0, noise = torch.randn(2, 6, 2, 3, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 1, 10, 500, 998, 999])
    tolerance = 5e-6 if dtype == torch.float32 else 1e-14
    for name in ("add_noise", "get_velocity"):
        ours, theirs = (getattr(scheduler, name)(x_0, noise, timesteps) for scheduler in (native, stock))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_lists_of_timesteps_are_those_of_stock_wherever_stock_is_right(spacing: str, offset: int) -> None:
    """Stock is wrong where its trailing list has an entry too many, the last being -1, and where an offset leaves T."""
    stock = DDPMScheduler(timestep_spacing=spacing, steps_offset=offset)
    wrong = []
    for count in range(1, 1001):
        stock.set_timesteps(count)
        if stock.timesteps[0] > 999 or stock.timesteps[-1] < 0:
            wrong.append(count)
            continue
        assert spaced_timesteps(spacing, count, 1000, offset) == stock.timesteps.tolist(), count
    assert len(wrong) == {("leading", 0): 0, ("leading", 1): 1, ("linspace", 0): 0}.get(
        (spacing, offset), 62 if spacing == "trailing" else 0
    )
    for count in wrong if spacing == "trailing" else []:
        stock.set_timesteps(count)
        assert spaced_timesteps(spacing, count, 1000, offset) == stock.timesteps.tolist()[:-1]
