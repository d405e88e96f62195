"""Steps over the whole grid of options against diffusers as shipped, in float32, and whole trajectories from one seed.

Stock's tables are float32, so that its 1 - alpha_bar is off by up to 3e-4 relative near t = 0: 1e-3 for a step that
ends below t = 100, 1e-5 elsewhere. Larger tolerances, for the reason given:

- noise predictions without clipping: dividing by sqrt(alpha_bar) amplifies float32 rounding, by 20000 at the end of the
  cosine schedule: 5e-7 / sqrt(alpha_bar);
- zero terminal SNR: its betas are differences of float32 roots of alpha_bar: 2e-5.

Not compared, because stock is wrong there: the last step of DDPMScheduler where its timestep is not 0 (it draws noise),
counts for which its trailing list has an extra step, steps of DDIMScheduler that do not end at t - T // n (it goes
there all the same) or that begin where alpha_bar is 0 at eta = 1 (the root of -6e-8), the noise prediction where
alpha_bar is 0 (infinite), fixed_large_log and learned (not a number).

`make test` runs a part of the grid, `make test-slow` all of it.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ddpm_hf.diffusion import GaussianDiffusionScheduler

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
CLIPPING: tuple[dict[str, Any], ...] = (
    {},
    {"clip_sample_range": 0.5},
    {"thresholding": True, "sample_max_value": 1.5},
    {"clip_sample": False},
)
COUNTS = (1000, 50, 7)
GRID = tuple(itertools.product(CLIPPING, COUNTS, (False, True), ("leading", "trailing", "linspace")))

# Coprime to the sizes of the grid, so that every value of every option is compared with many values of the others.
part_and_all = pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.slow)])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(count: int) -> list[int]:
    """Some rows of a list of timesteps, most of them near its end."""
    return sorted({0, 1, count // 2, *(count - i for i in (100, 30, 6, 3, 2, 1) if i < count)})


def tolerance(native: GaussianDiffusionScheduler, t: int, previous: int) -> float:
    """The largest difference, for the reasons at the top of this file."""
    limit = 1e-3 if previous < 100 else 2e-5 if native.config.rescale_betas_zero_snr else 1e-5
    if native.config.prediction_type == "epsilon" and not native.config.clip_sample:
        limit += 5e-7 / math.sqrt(native.noise_schedule.alphas_cumprod[t].item())
    return limit


def compare(
    native: GaussianDiffusionScheduler, stock: Any, count: int, is_right: Callable[[int, int], bool], **arguments: Any
) -> int:
    """Steps of both from noised data, with a network that errs by 0.1; returns how many were compared."""
    native.set_timesteps(count)
    stock.set_timesteps(count)
    timesteps = native.timesteps.tolist()
    if stock.timesteps.tolist() != timesteps:
        assert native.config.timestep_spacing == "trailing"
        assert stock.timesteps.tolist() == [*timesteps, -1]
        return 0
    generator, compared = seeded(0), 0
    channels = 4 if native.config.variance_type == "learned_range" else 2
    eta = arguments.get("eta", 1.0)
    for row in rows_of(count):
        t, previous = timesteps[row], [*timesteps[1:], -1][row]
        no_signal = native.noise_schedule.alphas_cumprod[t] == 0
        if not is_right(t, previous) or (no_signal and native.config.prediction_type == "epsilon"):
            continue
        x_0 = torch.rand(1, 2, 4, 4, generator=generator) * 2 - 1
        eps = torch.randn(1, 2, 4, 4, generator=generator)
        error = 0.1 * torch.randn(1, 2, 4, 4, generator=generator)
        v = native.get_velocity(x_0, eps, t)
        output = {"epsilon": eps, "sample": x_0, "v_prediction": v}[native.config.prediction_type] + error
        output = torch.cat([output, torch.rand(1, channels - 2, 4, 4, generator=generator) * 2 - 1], dim=1)
        x_t = native.add_noise(x_0, eps, t)
        ours = native.step(output, t, x_t, seeded(t), eta=eta).prev_sample
        theirs = stock.step(output, t, x_t, generator=seeded(t), **arguments).prev_sample
        difference = (ours - theirs).abs().max().item()
        assert difference <= tolerance(native, t, previous), (t, previous, native.config)
        compared += 1
    return compared


@part_and_all
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_step_is_that_of_ddpm_scheduler_as_shipped(prediction_type: str, stride: int) -> None:
    variances = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
    compared = 0
    for beta_schedule, variance_type, (clipping, count, rescale, spacing) in itertools.islice(
        itertools.product(BETA_SCHEDULES, variances, GRID), 0, None, stride
    ):
        config = {
            "beta_schedule": beta_schedule,
            "prediction_type": prediction_type,
            "variance_type": variance_type,
            "rescale_betas_zero_snr": rescale,
            "timestep_spacing": spacing,
            **clipping,
        }
        native, stock = GaussianDiffusionScheduler(**config), DDPMScheduler(**config)
        compared += compare(native, stock, count, lambda t, previous: previous >= 0 or t == 0)
    assert compared > 8000 / stride


@part_and_all
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_step_is_that_of_ddim_scheduler_as_shipped(prediction_type: str, stride: int) -> None:
    """With its use_clipped_model_output, without which its direction does not follow the clipped x_0."""
    compared = 0
    for beta_schedule, eta, (clipping, count, rescale, spacing) in itertools.islice(
        itertools.product(BETA_SCHEDULES[:3], (0.0, 0.5, 1.0), GRID), 0, None, stride
    ):
        config = {
            "beta_schedule": beta_schedule,
            "prediction_type": prediction_type,
            "rescale_betas_zero_snr": rescale,
            "timestep_spacing": spacing,
            **clipping,
        }
        native, stock = GaussianDiffusionScheduler(**config), DDIMScheduler(**config)
        table, gap = native.noise_schedule.alphas_cumprod, 1000 // count

        def is_right(t: int, previous: int, gap: int = gap, table: torch.Tensor = table, eta: float = eta) -> bool:
            return previous == max(t - gap, -1) and (eta < 1 or bool(table[t] > 0))

        compared += compare(native, stock, count, is_right, eta=eta, use_clipped_model_output=True)
    assert compared > 2700 / stride


def network(x: torch.Tensor, t: int) -> torch.Tensor:
    """A smooth function of the state and the timestep."""
    return 0.8 * torch.tanh(x + 0.1 * x.roll(1, -1)) + 0.1 * math.cos(t / 100)


def trajectory(scheduler: Any, count: int, **arguments: Any) -> torch.Tensor:
    """Every state of a run, all noise from one seed."""
    generator = seeded(0)
    scheduler.set_timesteps(count)
    states = [torch.randn(2, 2, 4, 4, generator=generator)]
    for t in scheduler.timesteps:
        output = network(states[-1], int(t))
        states.append(scheduler.step(output, t, states[-1], generator=generator, **arguments).prev_sample)
    return torch.stack(states)


@pytest.mark.parametrize(
    ("beta_schedule", "prediction_type", "count"),
    [
        ("linear", "epsilon", 1000),
        ("linear", "sample", 20),
        ("linear", "v_prediction", 20),
        ("scaled_linear", "v_prediction", 20),
        ("squaredcos_cap_v2", "epsilon", 20),
        ("sigmoid", "epsilon", 20),
        ("laplace", "sample", 20),
    ],
)
def test_whole_trajectories_from_one_seed_are_those_of_ddpm_scheduler(
    beta_schedule: str, prediction_type: str, count: int
) -> None:
    """The differences of the single steps do not add up: 1e-3 in every state, with the leading list that ends at 0."""
    config = {"beta_schedule": beta_schedule, "prediction_type": prediction_type}
    native = trajectory(GaussianDiffusionScheduler(**config), count)
    stock = trajectory(DDPMScheduler(**config), count)
    torch.testing.assert_close(native, stock, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("beta_schedule", "prediction_type", "eta"),
    [
        ("linear", "epsilon", 0.0),
        ("linear", "v_prediction", 0.5),
        ("scaled_linear", "sample", 0.0),
        ("squaredcos_cap_v2", "epsilon", 1.0),
        ("squaredcos_cap_v2", "v_prediction", 0.0),
    ],
)
def test_whole_trajectories_from_one_seed_are_those_of_ddim_scheduler(
    beta_schedule: str, prediction_type: str, eta: float
) -> None:
    """As above, 1e-3."""
    for spacing in ("leading", "trailing"):
        config = {"beta_schedule": beta_schedule, "prediction_type": prediction_type, "timestep_spacing": spacing}
        native = trajectory(GaussianDiffusionScheduler(**config), 50, eta=eta)
        stock = trajectory(DDIMScheduler(**config), 50, eta=eta, use_clipped_model_output=True)
        torch.testing.assert_close(native, stock, rtol=0, atol=1e-3)
