"""`from_config` to and from other schedulers of diffusers keeps the process, in memory as through a saved folder."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_hf.diffusion import GaussianDiffusionScheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SWAPS = {
    "DDIMScheduler": "epsilon",
    "DDPMScheduler": "sample",
    "DEISMultistepScheduler": "v_prediction",
    "DPMSolverMultistepScheduler": "v_prediction",
    "DPMSolverSinglestepScheduler": "sample",
    "EulerAncestralDiscreteScheduler": "epsilon",
    "EulerDiscreteScheduler": "v_prediction",
    "HeunDiscreteScheduler": "sample",
    "LMSDiscreteScheduler": "v_prediction",
    "PNDMScheduler": "v_prediction",
    "UniPCMultistepScheduler": "sample",
}
CONVERTED = ("sigmoid", "laplace", "sigmoid_alpha_bar", "warmup10", "warmup50", "const", "jsd")


def of_this_class(config: Any) -> dict[str, Any]:
    """The options of DDPMScheduler in a configuration that may have more."""
    return {key: config[key] for key in GaussianDiffusionScheduler().config if not key.startswith("_")}


def saved_and_loaded(scheduler: Any, scheduler_class: type, folder: Path) -> Any:
    """A scheduler of another class, from the folder that this one saves."""
    scheduler.save_pretrained(folder)
    return scheduler_class.from_pretrained(folder)


@pytest.mark.parametrize(("name", "prediction_type"), SWAPS.items())
def test_a_swap_in_memory_is_the_swap_of_a_stock_folder(tmp_path: Path, name: str, prediction_type: str) -> None:
    """Default values too: configuration, betas and timesteps are those after a save of a DDPMScheduler."""
    other = getattr(diffusers, name)
    from_stock_folder = saved_and_loaded(DDPMScheduler(prediction_type=prediction_type), other, tmp_path / "stock")
    native = GaussianDiffusionScheduler(prediction_type=prediction_type)
    in_memory = other.from_config(native.config)
    from_native_folder = saved_and_loaded(native, other, tmp_path / "native")
    for swapped in (from_stock_folder, in_memory, from_native_folder):
        swapped.set_timesteps(10)
        assert swapped.config["prediction_type"] == prediction_type
        assert swapped.config["timestep_spacing"] == "leading"
        assert torch.equal(torch.as_tensor(swapped.timesteps), torch.as_tensor(from_stock_folder.timesteps))
        assert np.array_equal(swapped.betas, from_stock_folder.betas)


@pytest.mark.parametrize(("name", "prediction_type"), SWAPS.items())
def test_a_swap_there_and_back_keeps_every_option(tmp_path: Path, name: str, prediction_type: str) -> None:
    """In memory, with a save of either, and with a save of both; no option has its default value."""
    native = GaussianDiffusionScheduler(
        num_train_timesteps=200,
        beta_start=0.001,
        beta_end=0.05,
        beta_schedule="scaled_linear",
        variance_type="fixed_large",
        clip_sample=False,
        prediction_type=prediction_type,
        dynamic_thresholding_ratio=0.9,
        clip_sample_range=2.0,
        sample_max_value=3.0,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    other = getattr(diffusers, name)
    there = (other.from_config(native.config), saved_and_loaded(native, other, tmp_path / "there"))
    for i, swapped in enumerate(there):
        np.testing.assert_allclose(swapped.betas, native.betas, rtol=1e-5)
        back = (
            GaussianDiffusionScheduler.from_config(swapped.config),
            saved_and_loaded(swapped, GaussianDiffusionScheduler, tmp_path / f"back {i}"),
        )
        for scheduler in back:
            assert of_this_class(scheduler.config) == of_this_class(native.config)
            assert torch.equal(scheduler.betas, native.betas)


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "SASolverScheduler"],
)
def test_from_config_keeps_the_process_of_another_scheduler(tmp_path: Path, name: str) -> None:
    """Its own defaults (Heun has other betas, DPM-Solver has no variance_type), and positional arguments.

    Diffusers loses both in memory and takes those of the new class. Betas are float32 there: rtol 1e-5.
    """
    other = getattr(diffusers, name)
    for i, foreign in enumerate((other(), other(200, 0.001, 0.01), other(prediction_type="v_prediction"))):
        in_memory = GaussianDiffusionScheduler.from_config(foreign.config)
        from_folder = saved_and_loaded(foreign, GaussianDiffusionScheduler, tmp_path / str(i))
        for native in (in_memory, from_folder):
            assert len(native) == len(foreign.betas)
            np.testing.assert_allclose(native.betas, foreign.betas, rtol=1e-5)
            for option in ("prediction_type", "timestep_spacing", "steps_offset"):
                assert native.config[option] == foreign.config.get(option, native.config[option]), option
        assert of_this_class(in_memory.config) == of_this_class(from_folder.config)


def test_positional_arguments_survive_a_swap(tmp_path: Path) -> None:
    """Diffusers takes them for defaults and loses them in memory."""
    native = GaussianDiffusionScheduler(200, 0.001, 0.01, "scaled_linear")
    for other in (diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler):
        for swapped in (other.from_config(native.config), saved_and_loaded(native, other, tmp_path)):
            assert swapped.config["num_train_timesteps"] == 200
            np.testing.assert_allclose(swapped.betas, native.betas, rtol=1e-5)


def test_schedules_that_stock_lacks_survive_every_swap(tmp_path: Path) -> None:
    """They are stored as betas; equal after rounding to float32, there and back."""
    cases = [("jsd", name) for name in SWAPS] + [(schedule, "DDIMScheduler") for schedule in CONVERTED]
    for beta_schedule, name in cases:
        native = GaussianDiffusionScheduler.create(
            beta_schedule=beta_schedule, prediction_type=SWAPS[name], num_train_timesteps=50
        )
        other = getattr(diffusers, name)
        for swapped in (other.from_config(native.config), saved_and_loaded(native, other, tmp_path)):
            assert torch.equal(torch.as_tensor(swapped.betas), native.betas), name
            back = GaussianDiffusionScheduler.from_config(swapped.config)
            assert torch.equal(back.noise_schedule.betas, native.noise_schedule.betas), name
