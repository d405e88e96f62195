"""The scheduler's contract: configuration, forward process, timesteps, steps on data whose best prediction is known,
cost of a step, and what it rejects.

The fuzz tests use the same examples in every run; DDPM_HF_FUZZ_EXAMPLES=20000 runs more, from other seeds.
"""

import copy
import inspect
import itertools
import json
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils import BaseOutput
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracles import GaussianData, OperationCounter, seeded
from torch.utils._pytree import tree_flatten, tree_unflatten

from ddpm_hf.diffusion import GaussianDiffusionScheduler, gaussian
from ddpm_hf.diffusion.gaussian import LEARNED_VARIANCE_TYPES
from ddpm_hf.diffusion.schedule import (
    BETA_RANGES,
    BETA_SCHEDULE_ALIASES,
    BETA_SCHEDULES,
    SMALLEST_ALPHA_BAR,
    SMALLEST_BETA,
)
from ddpm_hf.diffusion.scheduler import PREDICTION_TYPE_ALIASES, GaussianDiffusionSchedulerOutput

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Model output and sample."""
    output, sample = torch.randn(2, *shape, dtype=torch.float64, generator=seeded()).to(dtype)
    return output, sample


def started(count: int = 10, **config) -> GaussianDiffusionScheduler:
    scheduler = GaussianDiffusionScheduler(**config)
    scheduler.set_timesteps(count)
    return scheduler


# Configuration


def test_configuration_has_the_keys_and_defaults_of_ddpm_scheduler() -> None:
    stock = {key: value for key, value in DDPMScheduler().config.items() if not key.startswith("_")}
    assert dict(GaussianDiffusionScheduler().config) == stock


def test_attributes_that_other_code_reads_are_those_of_ddpm_scheduler() -> None:
    ours, stock = GaussianDiffusionScheduler(variance_type="fixed_large"), DDPMScheduler(variance_type="fixed_large")
    for name in ("init_noise_sigma", "order", "variance_type", "custom_timesteps", "num_inference_steps", "one"):
        assert getattr(ours, name) == getattr(stock, name), name
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert len(ours) == len(stock)
    sample = torch.zeros(1)
    assert ours.scale_model_input(sample, 5) is sample


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta_schedule": "sigmoid", "variance_type": "learned_range", "timestep_spacing": "trailing"},
        {"trained_betas": [0.1, 0.2], "num_train_timesteps": 2, "prediction_type": "v_prediction"},
        {"variance_type": "fixed_large_log", "steps_offset": 1},
    ],
)
def test_stock_configuration_survives_a_round_trip_byte_for_byte(tmp_path: Path, changes: dict) -> None:
    DDPMScheduler(**changes).save_pretrained(tmp_path / "stock")
    GaussianDiffusionScheduler.from_pretrained(tmp_path / "stock").save_pretrained(tmp_path / "ours")
    stock, ours = ((tmp_path / name / "scheduler_config.json").read_text() for name in ("stock", "ours"))
    assert ours == stock
    again = GaussianDiffusionScheduler.from_pretrained(tmp_path / "ours")
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "scheduler_config.json").read_text() == ours


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({"beta_schedule": "cosine"}, {"beta_schedule": "squaredcos_cap_v2", "trained_betas": None}),
        ({"beta_schedule": "quad"}, {"beta_schedule": "scaled_linear", "trained_betas": None}),
        ({"prediction_type": "eps"}, {"prediction_type": "epsilon"}),
        ({"prediction_type": "x0"}, {"prediction_type": "sample"}),
        ({"prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ({"variance_type": "fixed_large_log"}, {"variance_type": "fixed_large"}),
    ],
)
def test_create_stores_aliases_under_the_names_of_diffusers(given: dict, stored: dict) -> None:
    config = GaussianDiffusionScheduler.create(**given).config
    assert {key: config[key] for key in stored} == stored


def test_create_stores_other_schedules_as_betas_that_survive_json() -> None:
    for name in ("sigmoid", "laplace", "sigmoid_alpha_bar", "warmup10", "warmup50", "const", "jsd"):
        created = GaussianDiffusionScheduler.create(beta_schedule=name, num_train_timesteps=20, prediction_type="v")
        assert created.config.beta_schedule == "linear"
        reloaded = GaussianDiffusionScheduler.from_config(json.loads(created.to_json_string()))
        assert torch.equal(created.noise_schedule.betas, reloaded.noise_schedule.betas)
        assert DDPMScheduler.from_config(created.config).betas.tolist() == created.betas.tolist()


def test_options_that_stock_accepts_silently_are_rejected() -> None:
    rejected = {
        "'cosine' is not one of linear.*create also takes aliases": {"beta_schedule": "cosine"},
        "'warmup10' is not one of linear.*every schedule": {"beta_schedule": "warmup10"},
        "'v' is not one of epsilon, sample, v_prediction": {"prediction_type": "v"},
        "'other' is not one of fixed_small": {"variance_type": "other"},
        "Pass quadratic to set_timesteps": {"timestep_spacing": "quadratic"},
        "beta_start is 0.0001 and beta_end 2.0": {"beta_end": 2.0},
        "beta_start is 0.1 and beta_end 0.02.*trained_betas": {"beta_start": 0.1},
        "2 values, num_train_timesteps is 1000": {"trained_betas": [0.1, 0.2]},
        r"pass betas.tolist\(\)": {"trained_betas": torch.tensor([0.1] * 1000)},
        "trained_betas is 0.1; it must be a list of 1000 numbers": {"trained_betas": 0.1},
        "num_train_timesteps is 0; it must be a whole number": {"num_train_timesteps": 0},
        "num_train_timesteps is 10.0; it must be a whole number": {"num_train_timesteps": 10.0},
        "num_train_timesteps is True": {"num_train_timesteps": True},
        "steps_offset is -1; it must be a whole number of at least 0": {"steps_offset": -1},
        "clip_sample_range is 0; it must be a number above 0": {"clip_sample_range": 0},
        "clip_sample_range is nan": {"clip_sample_range": float("nan")},
        "sample_max_value is '1'; it must be a number above 0": {"sample_max_value": "1"},
        "dynamic_thresholding_ratio is 1.5; it must be a number between 0 and 1": {"dynamic_thresholding_ratio": 1.5},
        "clip_sample 'no' is not one of True, False": {"clip_sample": "no"},
        "thresholding 'off' is not one of True, False": {"thresholding": "off"},
        "rescale_betas_zero_snr needs at least 2 timesteps": {"num_train_timesteps": 1, "rescale_betas_zero_snr": True},
    }
    for sentence, config in rejected.items():
        with pytest.raises(ValueError, match=sentence):
            GaussianDiffusionScheduler(**config)
    with pytest.raises(ValueError, match="Pass quadratic to set_timesteps"):
        GaussianDiffusionScheduler.create(timestep_spacing="quadratic")
    with pytest.raises(ValueError, match=r"'cosinus' is unknown; choose one of .*sigmoid_alpha_bar, .*cosine, quad"):
        GaussianDiffusionScheduler.create(beta_schedule="cosinus")


def test_ranges_of_betas_are_ignored_where_they_have_no_effect() -> None:
    """As in diffusers, whose saved configurations always contain them."""
    for config in ({"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": [0.1, 0.2], "num_train_timesteps": 2}):
        betas = GaussianDiffusionScheduler(**config, beta_start=0.5, beta_end=0.1).betas
        assert torch.equal(betas, GaussianDiffusionScheduler(**config).betas)


def test_create_takes_every_option_of_the_constructor() -> None:
    options = {
        "num_train_timesteps": 100,
        "beta_start": 0.001,
        "beta_end": 0.2,
        "beta_schedule": "scaled_linear",
        "variance_type": "learned_range",
        "clip_sample": False,
        "prediction_type": "sample",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.9,
        "clip_sample_range": 2.0,
        "sample_max_value": 3.0,
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "rescale_betas_zero_snr": True,
    }
    parameters = set(inspect.signature(GaussianDiffusionScheduler.__init__).parameters) - {"self"}
    assert set(options) | {"trained_betas"} == parameters
    assert dict(GaussianDiffusionScheduler.create(**options).config) == options | {"trained_betas": None}
    created = GaussianDiffusionScheduler.create(num_train_timesteps=2, trained_betas=[0.2, 0.1])
    assert created.config.trained_betas == [0.2, 0.1]
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta_stop'"):
        GaussianDiffusionScheduler.create(beta_stop=0.1)


def test_betas_scaled_with_the_length_are_stored_as_plain_betas() -> None:
    """Every scheduler can read them; a schedule that stock lacks is stored as betas. Stock's tables are float32."""
    created = GaussianDiffusionScheduler.create(num_train_timesteps=100, scale_betas_to_timesteps=True)
    assert (created.config.beta_start, created.config.beta_end) == (0.001, 0.2)
    assert created.config.trained_betas is None
    assert "scale_betas_to_timesteps" not in created.config
    torch.testing.assert_close(DDPMScheduler.from_config(created.config).betas, created.betas)
    warmup = GaussianDiffusionScheduler.create(
        num_train_timesteps=100, scale_betas_to_timesteps=True, beta_schedule="warmup50"
    )
    assert warmup.config.trained_betas[0] == pytest.approx(0.001, rel=1e-15)
    assert warmup.config.trained_betas[-1] == pytest.approx(0.2, rel=1e-15)
    plain = GaussianDiffusionScheduler.create(num_train_timesteps=100)
    assert (plain.config.beta_start, plain.config.beta_end) == (0.0001, 0.02)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2", "jsd"])
def test_a_shift_lowers_log_snr_by_twice_its_logarithm_and_is_stored_as_betas(beta_schedule: str) -> None:
    """Section 3.1, Hoogeboom et al. 2023: log SNR(64) + 2 log(64 / resolution)."""
    plain = GaussianDiffusionScheduler.create(beta_schedule=beta_schedule)
    shifted = GaussianDiffusionScheduler.create(beta_schedule=beta_schedule, schedule_shift=256 / 64)
    expected = plain.noise_schedule.snr * (64 / 256) ** 2
    torch.testing.assert_close(shifted.noise_schedule.snr, expected, rtol=1e-9, atol=0)
    assert "schedule_shift" not in shifted.config
    stock = DDPMScheduler.from_config(shifted.config)
    torch.testing.assert_close(stock.alphas_cumprod, shifted.alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert GaussianDiffusionScheduler.create(schedule_shift=1).config.trained_betas is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scale_betas_to_timesteps": True, "beta_schedule": "cosine"}, "does not apply to beta_schedule"),
        ({"scale_betas_to_timesteps": True, "beta_schedule": "jsd"}, "does not apply to beta_schedule"),
        ({"scale_betas_to_timesteps": True, "num_train_timesteps": 19}, "must be at least 20"),
        ({"scale_betas_to_timesteps": True, "trained_betas": [0.1] * 1000}, "leave these out"),
        ({"beta_schedule": "cosine", "trained_betas": [0.1] * 1000}, "leave these out"),
    ],
)
def test_options_of_create_without_effect_are_rejected(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GaussianDiffusionScheduler.create(**options)


def test_scheduler_survives_copy_and_pickle() -> None:
    """Needed by workers of data loaders and by deepcopy of a pipeline."""
    scheduler = started()
    output, sample = tensors(1, 1, 2, 2)
    expected = scheduler.step(output, scheduler.timesteps[3], sample, generator=seeded()).prev_sample
    for twin in (copy.copy(scheduler), copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):  # noqa: S301
        assert type(twin) is GaussianDiffusionScheduler
        for t in (scheduler.timesteps[3], twin.timesteps[3], 600):
            assert torch.equal(twin.step(output, t, sample, generator=seeded()).prev_sample, expected)


# The forward process

TIMESTEPS = torch.tensor([0, 5, 499, 999])


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Data and noise, (4, 2, 3, 3)."""
    x_0, noise = torch.randn(2, 4, 2, 3, 3, dtype=torch.float64, generator=seeded()).to(dtype)
    return x_0.clamp(-1, 1), noise


def test_each_sample_is_noised_at_its_own_timestep() -> None:
    """Two float32 products and a sum of values below 5: atol 1e-6."""
    scheduler = GaussianDiffusionScheduler()
    x_0, noise = batch()
    x_t = scheduler.add_noise(x_0, noise, TIMESTEPS)
    v = scheduler.get_velocity(x_0, noise, TIMESTEPS)
    for i, t in enumerate(TIMESTEPS.tolist()):
        alpha_bar = scheduler.noise_schedule.alphas_cumprod[t]
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        clean, eps = x_0[i].double(), noise[i].double()
        torch.testing.assert_close(x_t[i].double(), alpha * clean + sigma * eps, rtol=0, atol=1e-6)
        torch.testing.assert_close(v[i].double(), alpha * eps - sigma * clean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_samples_get_noise_at_every_timestep(dtype: torch.dtype) -> None:
    """The result is the float32 result rounded once; a table in half precision would add no noise at t = 0."""
    scheduler, reference = GaussianDiffusionScheduler(), GaussianDiffusionScheduler()
    x_0, noise = batch(dtype)
    x_t = scheduler.add_noise(x_0, noise, TIMESTEPS)
    v = scheduler.get_velocity(x_0, noise, TIMESTEPS)
    assert torch.equal(x_t, reference.add_noise(x_0.float(), noise.float(), TIMESTEPS).to(dtype))
    assert torch.equal(v, reference.get_velocity(x_0.float(), noise.float(), TIMESTEPS).to(dtype))
    only_noise = scheduler.add_noise(torch.zeros_like(x_0), noise, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(only_noise, noise * 0.01, rtol=0.01, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_predictions_recover_data_and_noise(prediction_type: str, variance_type: str) -> None:
    """Float64 rounding, amplified by 1 / alpha = 157 at t = 999."""
    scheduler = GaussianDiffusionScheduler(prediction_type=prediction_type, variance_type=variance_type)
    x_0, noise = batch(torch.float64)
    x_t = scheduler.add_noise(x_0, noise, TIMESTEPS)
    output = {
        "epsilon": noise,
        "sample": x_0,
        "v_prediction": scheduler.get_velocity(x_0, noise, TIMESTEPS),
    }[prediction_type]
    if variance_type == "learned_range":
        output = torch.cat([output, torch.zeros_like(output)], dim=1)
    predicted = scheduler.predict_original_sample(output, TIMESTEPS, x_t)
    torch.testing.assert_close(predicted, x_0, rtol=0, atol=1e-10)
    torch.testing.assert_close(scheduler.predict_noise(output, TIMESTEPS, x_t), noise, rtol=0, atol=1e-10)


def test_posterior_is_equation_7_at_each_timestep() -> None:
    """Float64 rounding; the log-variance at t = 0 is that of t = 1, the variance is 0."""
    scheduler = GaussianDiffusionScheduler()
    x_0, x_t = batch(torch.float64)
    posterior = scheduler.posterior(x_0, x_t, TIMESTEPS)
    for i, t in enumerate(TIMESTEPS.tolist()):
        beta = scheduler.noise_schedule.betas[t].item()
        alpha_bar = (1 - scheduler.noise_schedule.betas[: t + 1]).prod().item()
        alpha_bar_prev = (1 - scheduler.noise_schedule.betas[:t]).prod().item()
        mean = alpha_bar_prev**0.5 * beta * x_0[i] + (1 - beta) ** 0.5 * (1 - alpha_bar_prev) * x_t[i]
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
        torch.testing.assert_close(posterior.mean[i], mean / (1 - alpha_bar), rtol=1e-9, atol=1e-12)
        assert posterior.variance[i].item() == pytest.approx(variance, rel=1e-9)
        if t > 0:
            assert posterior.log_variance[i].exp().item() == pytest.approx(variance, rel=1e-9)
    assert posterior.log_variance[0].item() == pytest.approx(-9.81672513529567, rel=1e-9)
    assert posterior.variance.shape == (4, 1, 1, 1)


def test_snr_keeps_the_shape_of_the_timesteps() -> None:
    """Float32 rounding."""
    snr = GaussianDiffusionScheduler().snr(TIMESTEPS.view(2, 2))
    assert snr.shape == (2, 2)
    assert snr.dtype == torch.float32
    assert snr.flatten()[0].item() == pytest.approx(9999, rel=1e-6)
    assert snr.flatten()[-1].item() == pytest.approx(4.03599265e-05, rel=1e-6)


def test_every_method_treats_each_sample_as_if_it_were_alone() -> None:
    """One timestep for each sample, in any order: equal."""
    scheduler = GaussianDiffusionScheduler(prediction_type="v_prediction")
    x_0, noise = batch()
    methods = {
        "add_noise": lambda i, t: scheduler.add_noise(x_0[i], noise[i], t),
        "get_velocity": lambda i, t: scheduler.get_velocity(x_0[i], noise[i], t),
        "predict_original_sample": lambda i, t: scheduler.predict_original_sample(noise[i], t, x_0[i]),
        "predict_noise": lambda i, t: scheduler.predict_noise(noise[i], t, x_0[i]),
        "posterior mean": lambda i, t: scheduler.posterior(x_0[i], noise[i], t).mean,
        "posterior variance": lambda i, t: scheduler.posterior(x_0[i], noise[i], t).variance,
        "snr": lambda i, t: scheduler.snr(t),
        "previous_timestep": lambda i, t: scheduler.previous_timestep(t),
    }
    timesteps = torch.tensor([999, 0, 5, 5])
    for name, method in methods.items():
        together = method(slice(None), timesteps)
        for i in range(4):
            alone = method(slice(i, i + 1), timesteps[i : i + 1])
            assert torch.equal(together[i : i + 1], alone.view_as(together[i : i + 1])), name
        assert torch.equal(method(slice(None), timesteps.int()), together), name


def test_snr_of_one_timestep_is_one_number() -> None:
    """Float32 rounding."""
    assert GaussianDiffusionScheduler().snr(0).item() == pytest.approx(9999, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_samples_that_are_not_floating_point_are_rejected(dtype: torch.dtype) -> None:
    """The result has the dtype of the samples: as integers, only 0 and 1 would be left."""
    scheduler = GaussianDiffusionScheduler()
    images, noise = torch.ones(4, 2, 3, 3).to(dtype), torch.zeros(4, 2, 3, 3)
    calls = {
        "add_noise": lambda: scheduler.add_noise(images, noise, TIMESTEPS),
        "get_velocity": lambda: scheduler.get_velocity(images, noise, TIMESTEPS),
        "predict_original_sample": lambda: scheduler.predict_original_sample(noise, TIMESTEPS, images),
        "predict_noise": lambda: scheduler.predict_noise(noise, TIMESTEPS, images),
        "posterior": lambda: scheduler.posterior(noise, images, TIMESTEPS),
        "step": lambda: scheduler.step(noise, 5, images),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=f"samples are {dtype}; scale images to floating-point"):
            call()


def test_one_timestep_applies_to_the_whole_batch() -> None:
    scheduler = GaussianDiffusionScheduler()
    x_0, noise = batch()
    expected = scheduler.add_noise(x_0, noise, torch.full((4,), 499))
    for t in (499, torch.tensor(499), torch.tensor([499])):
        assert torch.equal(scheduler.add_noise(x_0, noise, t), expected)


def test_one_sample_is_noised_at_many_timesteps() -> None:
    """As in DDPMScheduler: a row of the result for each timestep."""
    x_0, noise = (x[:1] for x in batch())
    scheduler = GaussianDiffusionScheduler()
    many = scheduler.add_noise(x_0, noise, TIMESTEPS)
    assert many.shape == (4, 2, 3, 3)
    for row, t in enumerate(TIMESTEPS):
        assert torch.equal(many[row : row + 1], scheduler.add_noise(x_0, noise, t))
    with pytest.raises(ValueError, match="There are 4 timesteps for 3 samples"):
        scheduler.add_noise(x_0.expand(3, -1, -1, -1), noise, TIMESTEPS)


def test_samples_of_any_rank_are_noised() -> None:
    scheduler = GaussianDiffusionScheduler()
    for shape in ((4,), (4, 7), (4, 2, 3, 3, 3)):
        noise = torch.randn(shape, generator=seeded())
        x_t = scheduler.add_noise(torch.zeros(shape), noise, TIMESTEPS)
        assert torch.equal(x_t, noise * scheduler.gather("sqrt_one_minus_alphas_cumprod", TIMESTEPS, noise))


def test_noising_takes_few_operations_and_never_reads_a_tensor_on_the_host() -> None:
    """Two look-ups, two sums; counts are exact. The first call also copies the tables to the device."""
    scheduler = GaussianDiffusionScheduler()
    x_0, noise = batch()
    scheduler.add_noise(x_0, noise, TIMESTEPS)
    calls = {
        "add_noise": lambda: scheduler.add_noise(x_0, noise, TIMESTEPS),
        "predict_original_sample": lambda: scheduler.predict_original_sample(noise, TIMESTEPS, x_0),
        "posterior": lambda: scheduler.posterior(x_0, noise, TIMESTEPS),
        "snr": lambda: scheduler.snr(TIMESTEPS),
    }
    launched = {}
    for name, call in calls.items():
        call()
        with OperationCounter() as counter:
            call()
        assert counter.host_reads == 0, (name, counter.counts)
        launched[name] = counter.launched
    assert launched["add_noise"] == 4


def test_public_tables_are_float32_and_stay_where_they_are() -> None:
    """Float64 tables would turn losses into float64; rounded once from float64 they are off by half a unit."""
    scheduler = GaussianDiffusionScheduler()
    before = scheduler.alphas_cumprod
    scheduler.add_noise(*batch(torch.float64), TIMESTEPS)
    assert scheduler.alphas_cumprod is before
    for name in ("betas", "alphas", "alphas_cumprod"):
        assert getattr(scheduler, name).dtype == torch.float32
    assert torch.equal(scheduler.alphas_cumprod, scheduler.noise_schedule.alphas_cumprod.float())
    assert torch.equal(scheduler.alphas, (1 - scheduler.noise_schedule.betas).float())


def zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """The fix that training scripts carry with them, in float32 (Algorithm 1, Lin et al. 2024)."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    alphas_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - torch.cat([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])


@pytest.mark.parametrize("names", [("betas",), ("alphas",), ("alphas_cumprod",), ("betas", "alphas", "alphas_cumprod")])
def test_assigned_tables_are_followed(names: tuple[str, ...], tmp_path: Path) -> None:
    """By noising, steps, copies, saves and swaps. Float32 tables: 1e-3 of alpha_bar, and of the samples."""
    expected = GaussianDiffusionScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    scheduler = started(prediction_type="v_prediction", timestep_spacing="trailing")
    betas = zero_terminal_snr(scheduler.betas)
    tables = {"betas": betas, "alphas": 1 - betas, "alphas_cumprod": torch.cumprod(1 - betas, dim=0)}
    for name in names:
        setattr(scheduler, name, tables[name])
    scheduler.save_pretrained(tmp_path)
    saved, stock = (kind.from_pretrained(tmp_path) for kind in (GaussianDiffusionScheduler, DDPMScheduler))
    swapped = DDPMScheduler.from_config(scheduler.config)
    x_0, noise = batch()
    for each in (scheduler, saved, stock, swapped, copy.deepcopy(scheduler)):
        torch.testing.assert_close(each.alphas_cumprod, expected.alphas_cumprod, rtol=0, atol=1e-3)
        assert each.alphas_cumprod[-1].item() == 0
        assert torch.equal(each.add_noise(x_0, noise, TIMESTEPS)[3], noise[3])
    expected.set_timesteps(10, timesteps=None, timestep_spacing="trailing")
    assert torch.equal(scheduler.timesteps, expected.timesteps)
    for t in scheduler.timesteps:
        results = [each.step(noise, t, x_0, seeded()).prev_sample for each in (scheduler, expected)]
        torch.testing.assert_close(*results, rtol=0, atol=1e-3)


def test_tables_that_are_moved_or_rounded_do_not_change_the_process() -> None:
    """As in `scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)`, and recomputed from assigned betas."""
    scheduler = GaussianDiffusionScheduler()
    before, config = scheduler.noise_schedule, dict(scheduler.config)
    scheduler.eps_second_moments = torch.ones(1000)
    for name in ("betas", "alphas", "alphas_cumprod"):
        table = getattr(scheduler, name)
        for moved in (table.half(), table.double(), table.clone()):
            setattr(scheduler, name, moved)
            assert getattr(scheduler, name) is moved
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas, dim=0)
    scheduler.one = scheduler.one.to(torch.float64)
    scheduler.num_train_timesteps = 1000
    assert scheduler.noise_schedule is before
    assert dict(scheduler.config) == config
    assert scheduler.eps_second_moments is not None
    scheduler.betas = scheduler.betas * 1.01
    assert scheduler.eps_second_moments is None


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("betas", [2.0] * 1000, "betas cannot be assigned: beta at timestep 0 is 2.0"),
        (
            "alphas",
            torch.full((10,), 0.9),
            "alphas cannot be assigned: There are 10 values for 1000 training timesteps",
        ),
        ("alphas_cumprod", torch.linspace(0.1, 0.9, 1000), "alphas_cumprod cannot be assigned: beta at timestep 1"),
        ("alphas_cumprod", torch.ones(2, 500), "alphas_cumprod cannot be assigned: betas must be one"),
        ("one", 0.5, "cannot be 0.5"),
        ("num_train_timesteps", 500, r"from_config\(scheduler.config, num_train_timesteps=500\)"),
    ],
)
def test_tables_that_are_none_are_rejected(name: str, value: Any, sentence: str) -> None:
    scheduler = GaussianDiffusionScheduler()
    before = scheduler.noise_schedule
    with pytest.raises(ValueError, match=sentence):
        setattr(scheduler, name, value)
    assert scheduler.noise_schedule is before


def test_options_changed_later_are_followed_or_rejected() -> None:
    scheduler = started()
    output, sample = tensors(1, 1, 2, 2)
    scheduler.register_to_config(prediction_type="v_prediction", num_train_timesteps=1000)
    expected = started(prediction_type="v_prediction").step(output, 500, sample, seeded()).prev_sample
    assert torch.equal(scheduler.step(output, 500, sample, seeded()).prev_sample, expected)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr of a scheduler cannot be changed; create another one"):
        scheduler.register_to_config(rescale_betas_zero_snr=True)
    scheduler.register_to_config(prediction_type="v")
    with pytest.raises(ValueError, match="prediction_type 'v' is not one of"):
        scheduler.step(output, 500, sample)


def test_options_of_foreign_configurations_are_those_of_ddpm_scheduler(tmp_path: Path) -> None:
    """No clipping for "clip_sample": null; set_alpha_to_one has no effect; numbers of numpy are saved as numbers."""
    DDIMScheduler(clip_sample=None, set_alpha_to_one=False).save_pretrained(tmp_path / "ddim")
    scheduler = GaussianDiffusionScheduler.from_pretrained(tmp_path / "ddim")
    stock = DDPMScheduler.from_pretrained(tmp_path / "ddim")
    output, sample = tensors(1, 1, 2, 2)
    for each in (scheduler, stock):
        each.set_timesteps(10)
    for t in scheduler.timesteps:
        results = [each.step(output, t, sample, generator=seeded()).prev_sample for each in (scheduler, stock)]
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    options = {
        "num_train_timesteps": np.int64(10),
        "beta_end": np.float64(0.5),
        "clip_sample": np.False_,
        "clip_sample_range": torch.tensor(2.0),
    }
    GaussianDiffusionScheduler(**options).save_pretrained(tmp_path / "numpy")
    saved = json.loads((tmp_path / "numpy" / "scheduler_config.json").read_text())
    assert {name: saved[name] for name in options} == {name: value.item() for name, value in options.items()}


def test_tables_first_used_in_inference_mode_can_be_used_in_training() -> None:
    """Backward raises if it needs an inference tensor."""
    scheduler = GaussianDiffusionScheduler()
    x_0, noise = batch()
    with torch.inference_mode():
        scheduler.predict_original_sample(noise, TIMESTEPS, x_0)
        scheduler.predict_original_sample(noise, 5, x_0)
    output = noise.clone().requires_grad_()
    (scheduler.predict_original_sample(output, TIMESTEPS, x_0) ** 2).sum().backward()
    (scheduler.predict_original_sample(output, 5, x_0) ** 2).sum().backward()
    assert output.grad is not None
    assert bool((output.grad != 0).all())


@pytest.mark.parametrize(
    ("timesteps", "sentence"),
    [
        (torch.tensor([0, 1]), "2 timesteps for 4 samples; pass one for all or for each"),
        (torch.tensor([0.0, 1.0, 2.0, 3.0]), "torch.float32; they must be whole numbers"),
        (torch.tensor([True, False, True, False]), "torch.bool; they must be whole numbers"),
        (torch.tensor([], dtype=torch.int64), "0 timesteps for 4 samples"),
        (None, "timesteps is None; it must be a whole number"),
        ("a", "timesteps is 'a'; it must be a whole number"),
        (1.0, "torch.float32; they must be whole numbers"),
        (torch.tensor([0, 1, 2, 1000]), "outside 0 ... 999"),
        (torch.tensor([0, 1, 2, -1]), "outside 0 ... 999"),
        (-1, "outside 0 ... 999"),
    ],
)
def test_invalid_timesteps_of_a_batch_are_rejected(timesteps: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GaussianDiffusionScheduler().add_noise(*batch(), timesteps)


# Timesteps


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quadratic"])
def test_previous_timestep_is_the_next_of_the_list_whatever_the_spacing(spacing: str) -> None:
    scheduler = GaussianDiffusionScheduler()
    for count in (1, 7, 61, 1000):
        scheduler.set_timesteps(count, timestep_spacing=spacing)
        steps = scheduler.timesteps.tolist()
        assert len(steps) == scheduler.num_inference_steps == count
        assert [scheduler.previous_timestep(t).item() for t in steps] == [*steps[1:], -1]


def test_previous_timestep_is_t_minus_1_before_set_timesteps() -> None:
    scheduler = GaussianDiffusionScheduler()
    assert [scheduler.previous_timestep(t).item() for t in (999, 500, 0)] == [998, 499, -1]
    assert scheduler.num_inference_steps is None
    assert len(scheduler) == 1000


def test_custom_timesteps_come_as_any_sequence_of_integers() -> None:
    steps = [100, 87, 50, 1, 0]
    for sequence in (steps, tuple(steps), np.array(steps), torch.tensor(steps)):
        scheduler = GaussianDiffusionScheduler()
        scheduler.set_timesteps(timesteps=sequence)
        assert scheduler.timesteps.tolist() == steps
        assert scheduler.custom_timesteps
        assert [scheduler.previous_timestep(t).item() for t in steps] == [87, 50, 1, 0, -1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "either num_inference_steps or timesteps"),
        ({"num_inference_steps": 5, "timesteps": [3, 2]}, "either num_inference_steps or timesteps"),
        ({"num_inference_steps": 0}, "0 is not between 1 and 1000"),
        ({"num_inference_steps": 1001}, "1001 is not between 1 and 1000"),
        ({"timesteps": []}, "empty"),
        ({"timesteps": [1, 2]}, "strictly descending"),
        ({"timesteps": [2, 2]}, "strictly descending"),
        ({"timesteps": [1000, 2]}, "from 1000 to 2, outside 0 ... 999"),
        ({"timesteps": [2, -1]}, "from 2 to -1, outside 0 ... 999"),
        ({"timesteps": [2.5, 1]}, "A timestep is 2.5; it must be a whole number"),
        ({"timesteps": ["a"]}, "A timestep is 'a'; it must be a whole number"),
        ({"timesteps": [2, True]}, "A timestep is True; it must be a whole number"),
        ({"timesteps": 5}, "timesteps is 5; it must be a list of whole numbers"),
        ({"num_inference_steps": "a"}, "num_inference_steps is 'a'; it must be a whole number"),
        ({"num_inference_steps": 1.5}, "num_inference_steps is 1.5; it must be a whole number"),
        ({"num_inference_steps": True}, "num_inference_steps is True; it must be a whole number"),
        ({"num_inference_steps": [5]}, r"num_inference_steps is \[5\]; it must be a whole number"),
        ({"num_inference_steps": float("nan")}, "num_inference_steps is nan; it must be a whole number"),
        ({"num_inference_steps": -5}, "-5 is not between 1 and 1000"),
        ({"timesteps": [2, 1], "timestep_spacing": "leading"}, "does not apply to a custom list"),
        ({"num_inference_steps": 5, "timestep_spacing": "karras"}, "'karras' is unknown"),
        ({"num_inference_steps": 5, "timestep_spacing": ""}, "'' is unknown"),
    ],
)
def test_invalid_timesteps_are_rejected(arguments: dict, sentence: str) -> None:
    """The timesteps set before stay in place."""
    scheduler = started(10)
    with pytest.raises(ValueError, match=sentence):
        scheduler.set_timesteps(**arguments)
    assert (scheduler.num_inference_steps, scheduler.custom_timesteps) == (10, False)
    assert len(scheduler.timesteps) == 10


def test_an_offset_beyond_the_training_timesteps_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"from 1000 to 1, outside.*; lower num_inference_steps or steps_offset"):
        GaussianDiffusionScheduler(steps_offset=1).set_timesteps(1000)


def test_every_way_to_name_a_timestep_is_the_same_step() -> None:
    """Views of the list are recognized by their memory, everything else by value."""
    scheduler = started(10)
    output, sample = tensors(1, 1, 2, 2)
    run = scheduler.timesteps
    for row, t in enumerate(run.tolist()):
        expected = scheduler.step(output, t, sample, generator=seeded()).prev_sample
        ways = {
            "element": run[row],
            "iteration": list(run)[row],
            "of a slice": run[row:][0],
            "of a reversal": run.flip(0)[9 - row],
            "of a strided slice": run[row % 2 :: 2][row // 2],
            "one-element slice": run[row : row + 1],
            "column": run.view(5, 2)[row // 2, row % 2],
            "copy": run[row].clone(),
            "other list": torch.tensor([7, t, 9])[1],
            "int32": run[row].int(),
            "low word of the same storage": run.view(torch.int32)[2 * row],
            "float": run[row].float(),
            "numpy": np.int64(t),
            "numpy array": np.array(t),
        }
        for way, timestep in ways.items():
            result = scheduler.step(output, timestep, sample, generator=seeded()).prev_sample
            assert torch.equal(result, expected), (way, t)


def test_previous_timesteps_of_a_batch_keep_its_shape() -> None:
    scheduler = started(10)
    timesteps = torch.tensor([[900, 0], [100, 500]])
    assert scheduler.previous_timestep(timesteps).tolist() == [[800, -1], [0, 400]]
    assert scheduler.previous_timestep(timesteps[:0]).shape == (0, 2)
    with pytest.raises(ValueError, match="timestep 50 is not in the list"):
        scheduler.previous_timestep(torch.tensor([900, 50]))


def test_elements_of_an_earlier_list_are_read_by_value() -> None:
    """The same position in another list is another timestep."""
    scheduler = started(10)
    earlier = list(scheduler.timesteps)
    scheduler.set_timesteps(20)
    assert scheduler.previous_timestep(earlier[3]).item() == 550
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="timestep 600 is not in the list of 3 timesteps"):
        scheduler.previous_timestep(earlier[3])


def test_a_list_changed_in_place_is_read_by_value() -> None:
    scheduler = started(10)
    scheduler.timesteps[0] = 300
    assert scheduler.previous_timestep(scheduler.timesteps[0]).item() == 200


def test_timesteps_can_be_assigned() -> None:
    """Image-to-image pipelines assign the tail of the list."""
    scheduler = started(10)
    scheduler.timesteps = scheduler.timesteps[7:]
    assert scheduler.timesteps.tolist() == [200, 100, 0]
    assert [scheduler.previous_timestep(t).item() for t in scheduler.timesteps] == [100, 0, -1]
    for assigned in ([200, 50], np.array([200, 50]), torch.tensor([200, 50])):
        scheduler.timesteps = assigned
        assert scheduler.timesteps.tolist() == [200, 50]
    assert scheduler.previous_timestep(scheduler.timesteps[0]).item() == 50


def test_steps_may_be_called_in_any_order() -> None:
    """A repeated or skipped step gives the same result as in order."""
    scheduler = started(10)
    output, sample = tensors(2, 1, 2, 2)
    in_order = [scheduler.step(output, t, sample, generator=seeded()).prev_sample for t in scheduler.timesteps]
    for row in (9, 0, 5, 5, 2):
        result = scheduler.step(output, scheduler.timesteps[row], sample, generator=seeded()).prev_sample
        assert torch.equal(result, in_order[row])


@pytest.mark.parametrize(
    "timestep", [901, -1, 1000, 900.5, None, "900", True, [900], torch.tensor(901), torch.tensor(900.5)]
)
def test_a_timestep_outside_the_list_is_rejected(timestep: float | torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"is not in the list of 10 timesteps being run \(900 ... 0\)"):
        started(10).step(torch.zeros(1, 1, 2, 2), timestep, torch.zeros(1, 1, 2, 2))


# The step


@pytest.mark.parametrize("sample_dtype", DTYPES)
def test_a_step_computes_in_float32_or_float64_and_returns_the_dtype_of_the_sample(sample_dtype: torch.dtype) -> None:
    """Equal to the step on widened inputs, rounded once."""
    wide = torch.float64 if sample_dtype == torch.float64 else torch.float32
    for prediction_type, output_dtype in itertools.product(PREDICTION_TYPES, DTYPES):
        output, sample = tensors(2, 2, 3, 3)
        output, sample = output.to(output_dtype), sample.to(sample_dtype)
        scheduler = started(prediction_type=prediction_type)
        result = scheduler.step(output, 500, sample, generator=seeded())
        expected = scheduler.step(output.to(wide), 500, sample.to(wide), generator=seeded())
        assert result.prev_sample.dtype == result.pred_original_sample.dtype == sample_dtype
        assert torch.equal(result.prev_sample, expected.prev_sample.to(sample_dtype))
        assert torch.equal(result.pred_original_sample, expected.pred_original_sample.to(sample_dtype))


def test_the_output_of_a_step_is_an_output_object_of_diffusers() -> None:
    """Items, attributes, positions, assignment and copies agree, as in every BaseOutput."""
    x, y = tensors(1, 1, 2, 2)
    output = GaussianDiffusionSchedulerOutput(prev_sample=x, pred_original_sample=y)
    stock = DDPMSchedulerOutput(prev_sample=x, pred_original_sample=y)
    assert isinstance(output, BaseOutput)
    assert list(output) == list(stock) == ["prev_sample", "pred_original_sample"]
    assert output.to_tuple()[0] is output[0] is output["prev_sample"] is output.prev_sample is x
    assert output.to_tuple()[1] is output[1] is output["pred_original_sample"] is output.pred_original_sample is y
    output.prev_sample = y
    assert output["prev_sample"] is y
    for again in (copy.copy(output), copy.deepcopy(output)):
        assert type(again) is GaussianDiffusionSchedulerOutput
        assert torch.equal(again.prev_sample, y)
        assert torch.equal(again["pred_original_sample"], y)
    leaves, spec = tree_flatten(output)
    assert len(leaves) == 2
    assert tree_unflatten(leaves, spec).prev_sample is y


MOST_OPERATIONS = {"fixed_small": 7, "fixed_large": 7, "learned_range": 9, "learned": 10}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", MOST_OPERATIONS)
def test_a_step_launches_few_operations_and_never_reads_a_tensor_on_the_host(
    variance_type: str, prediction_type: str
) -> None:
    """Counts of what reaches the dispatcher, views left out: exact on any machine."""
    scheduler = started(prediction_type=prediction_type, variance_type=variance_type)
    channels = 2 if "learned" in variance_type else 1
    output, sample = torch.randn(2, channels, 4, 4), torch.randn(2, 1, 4, 4)
    for timestep, eta in itertools.product((500, scheduler.timesteps[4]), (1.0, 0.5)):
        with OperationCounter() as counter:
            scheduler.step(output, timestep, sample, generator=seeded(), eta=eta)
        assert counter.host_reads == 0, counter.counts
        assert counter.launched <= MOST_OPERATIONS[variance_type], counter.counts
    with OperationCounter() as counter:
        scheduler.step(output, scheduler.timesteps[4], sample, eta=0.0)
    assert counter.host_reads == 0, counter.counts
    assert counter.launched <= 5, counter.counts
    half_sample = sample.half()
    with OperationCounter() as counter:
        scheduler.step(output, 500, half_sample, generator=seeded())
    assert counter.counts["_to_copy"] == 3
    with OperationCounter() as counter:
        scheduler.step(output, 500, sample, generator=[seeded(0), seeded(1)])
    assert counter.launched <= MOST_OPERATIONS[variance_type] + 2


def test_predictions_of_x_0_are_clipped_and_the_direction_follows_the_clipped_one() -> None:
    """eta = 0: x_prev = sqrt(a_prev) x_0 + sqrt(1 - a_prev) (x_t - sqrt(a) x_0) / sqrt(1 - a). Float64 rounding."""
    output, sample = tensors(2, 1, 3, 3, dtype=torch.float64)
    for limit in (1.0, 0.25):
        scheduler = started(clip_sample_range=limit)
        step = scheduler.noise_schedule.transitions([500, 400])[0]
        a, a_prev = step.alpha_bar, step.alpha_bar_prev
        x_0 = ((sample - (1 - a) ** 0.5 * output) / a**0.5).clamp(-limit, limit)
        assert bool((x_0.abs() == limit).any())
        eps = (sample - a**0.5 * x_0) / (1 - a) ** 0.5
        result = scheduler.step(output, 500, sample, eta=0.0)
        torch.testing.assert_close(result.pred_original_sample, x_0, rtol=0, atol=1e-12)
        expected = a_prev**0.5 * x_0 + (1 - a_prev) ** 0.5 * eps
        torch.testing.assert_close(result.prev_sample, expected, rtol=0, atol=1e-12)
    unclipped = started(clip_sample=False).step(output, 500, sample, eta=0.0).pred_original_sample
    assert unclipped.abs().max().item() > 1


def test_dynamic_thresholding_is_that_of_ddpm_scheduler() -> None:
    """Float32: the same operations on predictions that differ by 1e-6 relative."""
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0}
    output, sample = tensors(2, 1, 8, 8)
    ours, stock = started(**config), DDPMScheduler(**config)
    stock.set_timesteps(10)
    expected = stock.step(output, 500, sample, generator=seeded()).pred_original_sample
    result = ours.step(output, 500, sample, generator=seeded()).pred_original_sample
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_thresholding_and_clipping_take_samples_of_any_rank() -> None:
    for config in ({"thresholding": True, "sample_max_value": 2.0}, {}, {"clip_sample": False}):
        scheduler = started(**config)
        image, sample = tensors(2, 1, 3, 4)
        expected = scheduler.step(image, 500, sample, eta=0.0).prev_sample
        for shape in ((2, 12), (2, 1, 1, 3, 4), (2, 3, 4)):
            result = scheduler.step(image.reshape(shape), 500, sample.reshape(shape), eta=0.0).prev_sample
            assert torch.equal(result, expected.reshape(shape))
        flat, start = tensors(12)
        assert scheduler.step(flat, 500, start, seeded()).prev_sample.shape == (12,)


@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing"])
def test_the_last_step_draws_no_noise_whatever_its_timestep(timestep_spacing: str) -> None:
    scheduler = started(timestep_spacing=timestep_spacing, variance_type="fixed_large")
    output, sample = tensors(1, 1, 2, 2)
    generator = seeded()
    before = generator.get_state()
    result = scheduler.step(output, scheduler.timesteps[-1], sample, generator=generator)
    assert torch.equal(generator.get_state(), before)
    torch.testing.assert_close(result.prev_sample, result.pred_original_sample, rtol=0, atol=0)


def test_a_generator_for_each_sample_makes_it_independent_of_its_batch() -> None:
    scheduler = started()
    output, sample = tensors(3, 1, 4, 4)
    together = scheduler.step(output, 500, sample, generator=[seeded(i) for i in range(3)]).prev_sample
    for i in range(3):
        alone = scheduler.step(output[i : i + 1], 500, sample[i : i + 1], generator=[seeded(i)]).prev_sample
        assert torch.equal(together[i : i + 1], alone)


def test_a_step_returns_an_object_or_a_tuple() -> None:
    scheduler = started()
    output, sample = tensors(1, 1, 2, 2)
    result = scheduler.step(output, 500, sample, generator=seeded())
    prev_sample, pred_original_sample = scheduler.step(output, 500, sample, generator=seeded(), return_dict=False)
    assert torch.equal(result.prev_sample, prev_sample)
    assert torch.equal(result["pred_original_sample"], pred_original_sample)
    assert torch.equal(result[0], prev_sample)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), float("inf"), "x", None, [0.5], torch.tensor(0.5)])
def test_an_eta_outside_0_and_1_is_rejected(eta: float) -> None:
    """A tensor too: reading it would make the host wait."""
    output, sample = tensors(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"eta is .*; it must be a number between 0 \(deterministic\) and 1"):
        started().step(output, 500, sample, eta=eta)


def test_an_eta_may_be_a_number_of_any_type() -> None:
    output, sample = tensors(1, 1, 2, 2)
    expected = started().step(output, 500, sample, seeded(), eta=0.5).prev_sample
    for eta in (np.float64(0.5), np.float32(0.5)):
        assert torch.equal(started().step(output, 500, sample, seeded(), eta=eta).prev_sample, expected)


def test_eta_and_convention_of_a_run_are_those_of_each_step() -> None:
    """A step may override them; the next run begins with the defaults, those of DDPMScheduler."""
    output, sample = tensors(2, 1, 3, 3)
    plain, run = started(), GaussianDiffusionScheduler()
    results = []
    for options in ({}, {"eta": 0.0}, {"eta": 0.5}, {"eta": 0.5, "use_clipped_model_output": False}):
        run.set_timesteps(10, **options)
        for t in (900, 500, 0):
            expected = plain.step(output, t, sample, seeded(), **options).prev_sample
            assert torch.equal(run.step(output, t, sample, seeded()).prev_sample, expected)
            back = run.step(output, t, sample, seeded(), eta=1.0, use_clipped_model_output=True).prev_sample
            assert torch.equal(back, plain.step(output, t, sample, seeded()).prev_sample)
        results.append(run.step(output, 500, sample, seeded()).prev_sample)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(results, 2))
    run.timesteps = run.timesteps[5:]
    assert torch.equal(
        run.step(output, 400, sample, seeded()).prev_sample,
        plain.step(output, 400, sample, seeded(), **options).prev_sample,
    )
    with pytest.raises(ValueError, match="eta is 2"):
        run.set_timesteps(5, eta=2)
    assert len(run.timesteps) == 5
    run.set_timesteps(10)
    assert torch.equal(run.step(output, 500, sample, seeded()).prev_sample, results[0])


def test_a_step_computes_no_coefficients(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are rows of the run, computed once; again after a change of the configuration, as SD pipelines make one."""
    calls = []
    for name in ("reverse_mean_coefficients", "noise_direction"):
        function = getattr(gaussian, name)
        monkeypatch.setattr(gaussian, name, lambda *a, f=function: calls.append(a) or f(*a))
    scheduler = started()
    output, sample = tensors(1, 1, 2, 2)
    calls.clear()
    for t in (900, 500, 500):
        scheduler.step(output, t, sample)
    assert not calls
    for t in (900, 500, 500):
        scheduler.step(output, t, sample, eta=0.0)
    assert len(calls) == 2
    scheduler._internal_dict = FrozenDict({**scheduler.config, "variance_type": "fixed_large"})
    large = scheduler.step(output, 500, sample, seeded()).prev_sample
    assert torch.equal(large, started(variance_type="fixed_large").step(output, 500, sample, seeded()).prev_sample)


def test_options_of_a_step_that_do_not_exist_are_rejected() -> None:
    output, sample = tensors(1, 1, 2, 2)
    with pytest.raises(TypeError, match="unexpected keyword arguments: variance_noise"):
        started().step(output, 500, sample, eta=0.0, variance_noise=sample)


def test_outputs_that_do_not_fit_are_rejected() -> None:
    output, sample = torch.zeros(2, 2, 4, 4), torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 4\) for .*; variance_type fixed_small needs \(2, 1, 4, 4\)"):
        started().step(output, 500, sample)
    with pytest.raises(ValueError, match=r"variance_type learned_range needs \(2, 2, 4, 4\)"):
        started(variance_type="learned_range").step(sample, 500, sample)
    for other in (sample[:1], sample[:, :, :1], sample[..., 0]):
        with pytest.raises(ValueError, match=r"needs \(2, 1, 4, 4\)"):
            started().step(other, 500, sample)
    with pytest.raises(ValueError, match="generator is a list of 3 for a batch of 2"):
        started().step(sample, 500, sample, generator=[seeded()] * 3)
    for generator in (0.5, [seeded(), 0], (seeded(), seeded())):  # DDIMScheduler has eta in its place
        with pytest.raises(ValueError, match=r"pass a torch.Generator, or a list.* eta is a keyword"):
            started().step(sample, 500, sample, generator)
    with pytest.raises(ValueError, match="takes one for the whole batch"):
        started().step(sample, torch.tensor([500, 400]), sample)


def test_noise_predictions_are_rejected_only_where_no_signal_is_left() -> None:
    scheduler = started(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    output, sample = tensors(1, 1, 2, 2)
    with pytest.raises(ValueError, match="x_999 holds no signal"):
        scheduler.step(output, 999, sample)
    assert bool(scheduler.step(output, 899, sample).prev_sample.isfinite().all())


def test_noise_predictions_are_rejected_where_float32_cannot_represent_the_signal() -> None:
    """Alpha_bar falls to 1e-43 here."""
    scheduler = GaussianDiffusionScheduler(beta_start=0.1, beta_end=0.1)
    output, sample = tensors(1, 1, 2, 2)
    assert 0 < scheduler.noise_schedule.alphas_cumprod[940].item() < 1e-42
    with pytest.raises(ValueError, match="x_940 holds no signal"):
        scheduler.step(output, 940, sample)
    assert bool(scheduler.step(output, 800, sample).prev_sample.isfinite().all())
    other = GaussianDiffusionScheduler(beta_start=0.1, beta_end=0.1, prediction_type="v_prediction")
    assert bool(other.step(output, 940, sample).prev_sample.isfinite().all())


def test_timesteps_set_in_inference_mode_work_outside() -> None:
    scheduler = GaussianDiffusionScheduler()
    with torch.inference_mode():
        scheduler.set_timesteps(10)
    output, sample = tensors(1, 1, 2, 2)
    with OperationCounter() as counter:
        scheduler.step(output, scheduler.timesteps[3], sample)
    assert counter.host_reads == 0


# Data whose best prediction is a formula: every step, and the final samples, can be computed by hand

SPACINGS = ("leading", "trailing", "linspace", "quadratic", "custom")
FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
VARIANCES = (*FIXED_VARIANCES, "learned_range", "learned")
V = -0.4
"""The variance output of the network, in every step."""


def spaced(spacing: str, count: int, **config) -> GaussianDiffusionScheduler:
    """A scheduler with its timesteps set."""
    scheduler = GaussianDiffusionScheduler(**config)
    if spacing == "custom":
        length = len(scheduler)
        steps = sorted({0, 3, length - 1, *(round(length * u**3) for u in torch.linspace(0.3, 0.9, count).tolist())})
        scheduler.set_timesteps(timesteps=steps[::-1][:count])
    else:
        scheduler.set_timesteps(count, timestep_spacing=spacing)
    return scheduler


def predict(scheduler: GaussianDiffusionScheduler, data: GaussianData, x: torch.Tensor, t: int) -> torch.Tensor:
    """The output of the perfect network, with V in the variance channels if there are any."""
    output = data.predict(scheduler, x, t)
    return torch.cat([output, torch.full_like(x, V)], 1) if "learned" in scheduler.variance_type else output


def sample(scheduler: GaussianDiffusionScheduler, data: GaussianData, x: torch.Tensor, eta: float) -> torch.Tensor:
    """Run the reverse process with the perfect network."""
    generator = seeded(1)
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


@pytest.mark.parametrize(("spacing", "eta"), [*zip(SPACINGS, (0.4, 1.0, 1.0, 0.0, 0.4), strict=True), ("leading", 1.0)])
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
            continue  # rejected: a prediction of the noise does not determine x_0 where no signal is left
        scheduler = spaced(
            spacing, 7, prediction_type=prediction_type, variance_type=variance_type, clip_sample=False, **schedule
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


@pytest.mark.parametrize(("beta_schedule", "eta"), [("linear", 0.5), ("linear", 1.0), ("squaredcos_cap_v2", 0.0)])
def test_full_length_samples_have_the_mean_and_deviation_of_the_data(beta_schedule: str, eta: float) -> None:
    """20000 samples: the standard errors are 0.0035 and 0.0025; 4 of them, and 0.003 for the finite step."""
    data = GaussianData()
    scheduler = GaussianDiffusionScheduler(beta_schedule=beta_schedule, clip_sample=False)
    x = sample(scheduler, data, torch.randn(20000, 1, generator=seeded()), eta)
    assert x.mean().item() == pytest.approx(data.mean, abs=0.017)
    assert x.std().item() == pytest.approx(data.deviation, abs=0.013)


@pytest.mark.parametrize(
    ("variance_type", "eta"),
    [
        ("fixed_small", 1.0),
        ("fixed_large_log", 0.5),
        ("learned_range", 1.0),
        ("learned", 0.5),
        ("fixed_small_log", 0.0),
    ],
)
def test_data_of_one_point_is_returned_exactly(variance_type: str, eta: float) -> None:
    """The perfect network always predicts the point, and the last step adds no noise wherever it starts.

    Float64 rounding, amplified by 1 / alpha = 157 in the first step of the noise prediction.
    """
    point = GaussianData(mean=0.7, deviation=0.0)
    noise = torch.randn(2, 1, 4, dtype=torch.float64, generator=seeded())
    for prediction_type, spacing, count in itertools.product(PREDICTION_TYPES, SPACINGS, (1, 5)):
        for rescale in (False, True) if prediction_type != "epsilon" else (False,):
            scheduler = spaced(
                spacing,
                count,
                prediction_type=prediction_type,
                variance_type=variance_type,
                rescale_betas_zero_snr=rescale,
            )
            result = sample(scheduler, point, noise, eta)
            torch.testing.assert_close(result, torch.full_like(noise, 0.7), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_sampling_from_the_posterior_reproduces_the_forward_marginals(beta_schedule: str) -> None:
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
def test_a_process_without_terminal_signal_can_be_sampled(prediction_type: str) -> None:
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


# Reads on the host. On the meta device tensors have no values, so any read raises

CHANNELS = {"fixed_small": 1, "fixed_large": 1, "learned_range": 2, "learned": 2}
WAYS: dict[str, Callable[[torch.Tensor, int], int | torch.Tensor]] = {
    "int": lambda run, row: (900, 800, 700, 600, 500, 400, 300, 200, 100, 0)[row],
    "CPU tensor": lambda run, row: torch.tensor((900, 800, 700, 600, 500, 400, 300, 200, 100, 0)[row]),
    "element": lambda run, row: run[row],
    "iteration": lambda run, row: list(run)[row],
    "slice of one": lambda run, row: run[row : row + 1],
    "of a slice": lambda run, row: run[row:][0],
    "of a strided slice": lambda run, row: run[row % 2 :: 2][row // 2],
}


def scheduler_on(device: str, **config: object) -> GaussianDiffusionScheduler:
    """A run of 10 steps whose list lies on the device."""
    scheduler = GaussianDiffusionScheduler(**config)
    scheduler.set_timesteps(10, device=device)
    return scheduler


def every_step(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """For each way to name a timestep, and each kind of step, a name and a call."""
    for prediction_type, variance_type in itertools.product(PREDICTION_TYPES, CHANNELS):
        scheduler = scheduler_on(device, prediction_type=prediction_type, variance_type=variance_type)
        output = torch.zeros(2, CHANNELS[variance_type], 4, 4, device=device)
        sample = torch.zeros(2, 1, 4, 4, device=device)
        for (way, name_of), (row, eta) in itertools.product(WAYS.items(), ((4, 1.0), (9, 0.0))):
            timestep = name_of(scheduler.timesteps, row)

            def call(scheduler=scheduler, output=output, timestep=timestep, sample=sample, eta=eta) -> object:
                return scheduler.step(output, timestep, sample, eta=eta)

            yield f"{prediction_type}, {variance_type}, {way} {row}, eta {eta}", call


def every_batch(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The methods for training, with one timestep for each sample on the device."""
    scheduler = scheduler_on(device, prediction_type="v_prediction")
    x, timesteps = torch.zeros(4, 1, 2, 2, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    yield "add_noise", lambda: scheduler.add_noise(x, x, timesteps)
    yield "get_velocity", lambda: scheduler.get_velocity(x, x, timesteps)
    yield "predict_original_sample", lambda: scheduler.predict_original_sample(x, timesteps, x)
    yield "predict_noise", lambda: scheduler.predict_noise(x, timesteps, x)
    yield "posterior", lambda: scheduler.posterior(x, x, timesteps)
    yield "snr", lambda: scheduler.snr(timesteps)


def test_steps_on_the_meta_device_read_no_values() -> None:
    for name, call in every_step("meta"):
        assert call().prev_sample.device.type == "meta", name


def test_training_methods_on_the_meta_device_read_no_values() -> None:
    for name, call in every_batch("meta"):
        assert call() is not None, name


def test_another_tensor_on_the_meta_device_has_to_be_read() -> None:
    """So the tests above would notice a read."""
    scheduler = scheduler_on("meta")
    sample = torch.zeros(2, 1, 4, 4, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        scheduler.step(sample, scheduler.timesteps[3].int(), sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_thresholding_reads_no_values(dtype: torch.dtype) -> None:
    scheduler = scheduler_on("meta", thresholding=True)
    sample = torch.zeros(2, 1, 4, 4, device="meta", dtype=dtype)
    assert scheduler.step(sample, scheduler.timesteps[3], sample).prev_sample.dtype == dtype


def test_set_timesteps_costs_the_same_for_any_number_of_steps() -> None:
    """It creates one tensor and reads the table once; counts of operations, exact on any machine."""
    scheduler = GaussianDiffusionScheduler()
    counts = []
    for spacing, number in itertools.product(("leading", "trailing", "linspace", "quadratic"), (1, 10, 1000)):
        with OperationCounter() as counter:
            scheduler.set_timesteps(number, timestep_spacing=spacing)
        counts.append(dict(counter.counts))
    assert all(count == counts[0] for count in counts)
    assert sum(counts[0].values()) <= 2, counts[0]


@contextmanager
def no_host_waits() -> Iterator[None]:
    """Raise an error if the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("calls", [every_step, every_batch])
def test_the_host_never_waits_for_the_gpu(calls: Callable[[str], Iterator[tuple[str, Callable[[], object]]]]) -> None:
    """Except in the first call, which copies tables to the device and initializes its generator."""
    for name, call in calls("cuda"):
        call()
        with no_host_waits():
            assert call() is not None, name


# Any configuration: a valid one gives samples that end at a clean image, an invalid one a message

EXAMPLES = os.environ.get("DDPM_HF_FUZZ_EXAMPLES")
fuzz = settings(
    max_examples=int(EXAMPLES or 100),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

CONFIGURED_SPACINGS = ["leading", "trailing", "linspace"]
BETAS = st.floats(SMALLEST_BETA, 1)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Valid options of `create`."""
    length = draw(st.integers(1, 60) | st.sampled_from([1000, 4000]))
    options: dict[str, Any] = {
        "num_train_timesteps": length,
        "prediction_type": draw(st.sampled_from([*PREDICTION_TYPES, *PREDICTION_TYPE_ALIASES])),
        "variance_type": draw(st.sampled_from(VARIANCES)),
        "clip_sample": draw(st.booleans()),
        "clip_sample_range": draw(st.floats(1e-3, 1e3)),
        "thresholding": draw(st.booleans()),
        "dynamic_thresholding_ratio": draw(st.floats(0, 1)),
        "sample_max_value": draw(st.floats(1e-3, 1e3)),
        "timestep_spacing": draw(st.sampled_from(CONFIGURED_SPACINGS)),
        "steps_offset": draw(st.integers(0, 3)),
        "rescale_betas_zero_snr": length > 1 and draw(st.booleans()),
    }
    if length <= 60 and draw(st.booleans()):
        return options | {"trained_betas": draw(st.lists(BETAS, min_size=length, max_size=length))}
    name = draw(st.sampled_from([*BETA_SCHEDULES, *BETA_SCHEDULE_ALIASES]))
    start, end = sorted((draw(BETAS), draw(BETAS)))
    options |= {"beta_schedule": name, "beta_start": start, "beta_end": end}
    if BETA_SCHEDULE_ALIASES.get(name, name) in BETA_RANGES and length >= 1000 * end:
        scaled = draw(st.booleans()) and start * 1000 / length >= SMALLEST_BETA
        options["scale_betas_to_timesteps"] = scaled
    return options


@st.composite
def timestep_arguments(draw: st.DrawFn, length: int) -> dict[str, Any]:
    """Valid arguments of `set_timesteps`."""
    if draw(st.booleans()):
        steps = draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=8))
        return {"timesteps": sorted(steps, reverse=True)}
    spacing = draw(st.sampled_from([None, *CONFIGURED_SPACINGS, "quadratic"]))
    count = draw(st.integers(1, min(length, 8)) | st.just(min(length, 60)))
    return {"num_inference_steps": count, "timestep_spacing": spacing}


def is_message(error: BaseException) -> bool:
    return re.fullmatch(r"[A-Za-z_][^\n]* [^\n]*[^\n .]\.", str(error)) is not None


def is_about_the_combination(error: ValueError) -> bool:
    """Whether options that are valid alone were rejected together: betas too small to rescale, an offset too large."""
    reasons = (
        r"beta at timestep \d+ is .*; every beta must lie between 1e-12 and 1\.",
        r"timesteps run from \d+ to \d+, outside .*; lower num_inference_steps or steps_offset, or change the list\.",
    )
    return any(re.fullmatch(reason, str(error)) for reason in reasons)


@fuzz
@given(st.data(), configurations())
def test_a_valid_configuration_gives_finite_samples_and_ends_at_a_clean_image(
    data: st.DataObject, options: dict[str, Any]
) -> None:
    """Any step count, eta, shape and dtype; float16 only where clipping keeps x_0 inside its range."""
    try:
        scheduler = GaussianDiffusionScheduler.create(**options)
        scheduler.set_timesteps(**data.draw(timestep_arguments(len(scheduler))))
    except ValueError as error:
        assert is_about_the_combination(error)
        return
    assert set(json.loads(scheduler.to_json_string())) >= set(scheduler.config) - {"_use_default_values"}
    timesteps = scheduler.timesteps.tolist()
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert 0 <= timesteps[-1] <= timesteps[0] < len(scheduler)
    for table in vars(scheduler.noise_schedule).values():
        assert bool(table.isfinite().all())

    clipped = options["clip_sample"] or options["thresholding"]
    dtypes = [torch.float32, torch.float64, torch.bfloat16, *([torch.float16] if clipped else [])]
    dtype = data.draw(st.sampled_from(dtypes))
    shape = (2, 1, *data.draw(st.lists(st.integers(1, 3), max_size=3)))
    eta = data.draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1))
    learned = scheduler.variance_type in LEARNED_VARIANCE_TYPES
    generator = seeded(data.draw(st.integers(0, 100)))
    sample = torch.randn(shape, generator=generator).to(dtype)
    for t in timesteps:
        output = torch.randn(shape, generator=generator).to(dtype)
        if learned:
            output = torch.cat([output, output.clamp(-1, 1)], dim=1)
        no_signal = scheduler.noise_schedule.alphas_cumprod[t].item() < SMALLEST_ALPHA_BAR
        before = generator.get_state()
        try:
            result = scheduler.step(output, t, sample, generator, eta=eta)
        except ValueError as error:
            assert no_signal
            assert scheduler.config.prediction_type == "epsilon"
            assert is_message(error)
            return
        for tensor in result.values():
            assert tensor.shape == shape
            assert tensor.dtype == dtype
            assert bool(tensor.isfinite().all()), (t, eta)
        last = t == timesteps[-1]
        assert torch.equal(generator.get_state(), before) == (last or eta == 0), "wrong number of draws"
        if last:
            torch.testing.assert_close(result.prev_sample, result.pred_original_sample, rtol=0, atol=0)
        sample = result.prev_sample


ANYTHING = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.floats(), max_size=3)
)
OPTIONS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "variance_type",
    "clip_sample",
    "prediction_type",
    "thresholding",
    "dynamic_thresholding_ratio",
    "clip_sample_range",
    "sample_max_value",
    "timestep_spacing",
    "steps_offset",
    "rescale_betas_zero_snr",
)


@fuzz
@given(
    st.dictionaries(st.sampled_from(OPTIONS), ANYTHING, min_size=1, max_size=3),
    st.booleans(),
)
@example({"num_train_timesteps": 10**9}, False)
def test_any_other_option_is_accepted_or_rejected_with_a_message(options: dict[str, Any], create: bool) -> None:
    """The message names an option that was given."""
    if isinstance(options.get("num_train_timesteps"), int) and options["num_train_timesteps"] > 10_000:
        return  # valid, and only memory limits it
    make = GaussianDiffusionScheduler.create if create else GaussianDiffusionScheduler
    try:
        scheduler = make(**options)
    except ValueError as error:
        assert is_message(error), error
        assert any(name in str(error) for name in (*options, "beta")), error
        return
    assert bool(scheduler.noise_schedule.alphas_cumprod.isfinite().all())
    assert math.isfinite(scheduler.noise_schedule.posterior_log_variance.sum())


@fuzz
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "num_inference_steps": ANYTHING,
            "timesteps": ANYTHING | st.lists(ANYTHING, max_size=3) | st.lists(st.integers(-2, 12), max_size=4),
            "timestep_spacing": ANYTHING | st.sampled_from([*CONFIGURED_SPACINGS, "quadratic"]),
        },
    )
)
def test_any_arguments_of_set_timesteps_give_descending_timesteps_or_a_message(arguments: dict[str, Any]) -> None:
    scheduler = GaussianDiffusionScheduler(num_train_timesteps=10)
    try:
        scheduler.set_timesteps(**arguments)
    except ValueError as error:
        assert is_message(error), error
        return
    timesteps = scheduler.timesteps.tolist()
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert 0 <= timesteps[-1] <= timesteps[0] < 10
    if "timesteps" in arguments and arguments["timesteps"] is not None:
        assert timesteps == arguments["timesteps"]
    else:
        assert len(timesteps) == arguments["num_inference_steps"]


@fuzz
@given(
    ANYTHING | st.integers(-2, 12),
    ANYTHING | st.floats(0, 1),
    st.sampled_from(["step", "previous_timestep", "add_noise", "snr", "posterior"]),
)
def test_any_timestep_and_eta_give_a_result_or_a_message(timestep: Any, eta: Any, method: str) -> None:
    scheduler = GaussianDiffusionScheduler(num_train_timesteps=10)
    x = torch.zeros(2, 1, 2, 2)
    calls = {
        "step": lambda: scheduler.step(x, timestep, x, eta=eta).prev_sample,
        "previous_timestep": lambda: scheduler.previous_timestep(timestep),
        "add_noise": lambda: scheduler.add_noise(x, x, timestep),
        "snr": lambda: scheduler.snr(timestep),
        "posterior": lambda: scheduler.posterior(x, x, timestep).mean,
    }
    try:
        result = calls[method]()
    except ValueError as error:
        assert is_message(error), error
        return
    assert bool(result.isfinite().all())
    assert not isinstance(timestep, str | None | np.ndarray)
