"""Any configuration: a valid one gives a process that ends at a clean image, an invalid one a sentence.

The examples are the same in every run. Many more, from other seeds: DDPM_HF_FUZZ_EXAMPLES=20000.
"""

import json
import math
import os
import re
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracles import seeded

from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.diffusion.forward_process import LEARNED_VARIANCE_TYPES, SMALLEST_ALPHA_BAR
from ddpm_hf.diffusion.noise_schedule import BETA_RANGES, BETA_SCHEDULE_ALIASES, BETA_SCHEDULES, SMALLEST_BETA
from ddpm_hf.diffusion.scheduler import PREDICTION_TYPE_ALIASES

EXAMPLES = os.environ.get("DDPM_HF_FUZZ_EXAMPLES")
fuzz = settings(
    max_examples=int(EXAMPLES or 100),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

PREDICTION_TYPES = ["epsilon", "sample", "v_prediction", *PREDICTION_TYPE_ALIASES]
VARIANCE_TYPES = ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", *LEARNED_VARIANCE_TYPES]
SPACINGS = ["leading", "trailing", "linspace"]
BETAS = st.floats(SMALLEST_BETA, 1)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Options of `create` that make a process."""
    length = draw(st.integers(1, 60) | st.sampled_from([1000, 4000]))
    options: dict[str, Any] = {
        "num_train_timesteps": length,
        "prediction_type": draw(st.sampled_from(PREDICTION_TYPES)),
        "variance_type": draw(st.sampled_from(VARIANCE_TYPES)),
        "clip_sample": draw(st.booleans()),
        "clip_sample_range": draw(st.floats(1e-3, 1e3)),
        "thresholding": draw(st.booleans()),
        "dynamic_thresholding_ratio": draw(st.floats(0, 1)),
        "sample_max_value": draw(st.floats(1e-3, 1e3)),
        "timestep_spacing": draw(st.sampled_from(SPACINGS)),
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


def choose_run(draw: st.DrawFn, length: int, offset: int) -> dict[str, Any]:
    """Arguments of `set_timesteps` that fit the chain."""
    if draw(st.booleans()):
        steps = draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=8))
        return {"timesteps": sorted(steps, reverse=True)}
    spacing = draw(st.sampled_from([None, *SPACINGS, "quadratic"]))
    count = draw(st.integers(1, min(length, 8)) | st.just(min(length, 60)))
    return {"num_inference_steps": count, "timestep_spacing": spacing}


def is_sentence(error: BaseException) -> bool:
    return re.fullmatch(r"[A-Za-z_][^\n]* [^\n]*[^\n .]\.", str(error)) is not None


def is_about_the_combination(error: ValueError) -> bool:
    """Whether options that are valid alone were refused together: betas too small to rescale, an offset too large."""
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
        scheduler.set_timesteps(**data.draw(st.composite(choose_run)(len(scheduler), options["steps_offset"])))
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
            assert is_sentence(error)
            return
        for tensor in result.values():
            assert tensor.shape == shape
            assert tensor.dtype == dtype
            assert bool(tensor.isfinite().all()), (t, eta)
        last = t == timesteps[-1]
        assert torch.equal(generator.get_state(), before) == (last or eta == 0), "noise where there is none, or none"
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
def test_any_other_option_gives_a_process_or_a_sentence(options: dict[str, Any], create: bool) -> None:
    """The sentence names an option that was given."""
    if isinstance(options.get("num_train_timesteps"), int) and options["num_train_timesteps"] > 10_000:
        return  # valid, and only memory limits it
    make = GaussianDiffusionScheduler.create if create else GaussianDiffusionScheduler
    try:
        scheduler = make(**options)
    except ValueError as error:
        assert is_sentence(error), error
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
            "timestep_spacing": ANYTHING | st.sampled_from([*SPACINGS, "quadratic"]),
        },
    )
)
def test_any_run_gives_descending_timesteps_or_a_sentence(arguments: dict[str, Any]) -> None:
    scheduler = GaussianDiffusionScheduler(num_train_timesteps=10)
    try:
        scheduler.set_timesteps(**arguments)
    except ValueError as error:
        assert is_sentence(error), error
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
def test_any_timestep_and_eta_give_a_result_or_a_sentence(timestep: Any, eta: Any, method: str) -> None:
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
        assert is_sentence(error), error
        return
    assert bool(result.isfinite().all())
    assert not isinstance(timestep, str | None | np.ndarray)
