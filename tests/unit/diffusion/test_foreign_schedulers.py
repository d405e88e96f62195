"""Which schedulers of diffusers run the process that a network was trained on, told apart by what they sample."""

import itertools
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from oracles import GaussianData, seeded, tiny_unet

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.diffusion.forward_process import check_process

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

RUN_THIS_PROCESS = {
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
}


SIGMAS = GaussianDiffusionScheduler().noise_schedule.snr.numpy() ** -0.5


class PerfectNetwork(UNet2DModel):
    """Predicts the noise in Gaussian data; between two timesteps sigma / alpha is linear, as for k-diffusion."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: Any = None, return_dict: bool = True):
        data, sigma = GaussianData(), np.interp(float(timestep), np.arange(1000), SIGMAS)
        alpha = 1 / math.sqrt(1 + sigma**2)
        gain = alpha * data.deviation**2 / (alpha**2 * data.deviation**2 + 1 - alpha**2)
        x_0 = data.mean + gain * (sample - alpha * data.mean)
        return ((sample - alpha * x_0) / math.sqrt(1 - alpha**2),)


def moments(scheduler: Any, steps: int) -> tuple[float, float]:
    """Mean and deviation of 16 * 192 values that the pipeline draws with the perfect network."""
    pipe = GaussianDiffusionPipeline(PerfectNetwork(**tiny_unet().config), scheduler)
    pipe.set_progress_bar_config(disable=True)
    states: list[torch.Tensor] = []
    pipe(
        16,
        steps,
        seeded(),
        output_type="pt",
        callback_on_step_end=lambda p, i, t, tensors: states.append(tensors["sample"]),
    )
    return states[-1].mean().item(), states[-1].std().item()


def every_scheduler() -> dict[str, Any]:
    """One of each scheduler of diffusers that can be made from our configuration, most of them with a warning."""
    diffusers.logging.set_verbosity_error()
    config = GaussianDiffusionScheduler(clip_sample=False).config
    made: dict[str, Any] = {}
    for name in dir(diffusers):
        if not name.endswith("Scheduler") or name.startswith("Flax"):
            continue
        try:
            made[name] = getattr(diffusers, name).from_config(config)
        except (TypeError, ValueError, ImportError):  # it needs other arguments, or a library that is not installed
            continue
    diffusers.logging.set_verbosity_warning()
    return made


def accepted(scheduler: Any) -> bool:
    try:
        check_process(scheduler)
    except ValueError as error:
        assert str(error).startswith(f"{type(scheduler).__name__} ")
        assert str(error).endswith("trained with, or a pipeline made for this one.")
        return False
    return True


def test_the_schedulers_of_this_process_are_told_from_the_others() -> None:
    """Every scheduler of the installed diffusers that our configuration makes; about half are of another process."""
    schedulers = every_scheduler()
    assert {name for name, scheduler in schedulers.items() if accepted(scheduler)} - {
        "DPMSolverSDEScheduler"  # where torchsde is installed
    } == RUN_THIS_PROCESS
    assert len(schedulers) > 2 * len(RUN_THIS_PROCESS)
    assert accepted(GaussianDiffusionScheduler())


@pytest.mark.parametrize("name", sorted(RUN_THIS_PROCESS))
def test_the_schedulers_of_this_process_sample_the_data(name: str) -> None:
    """100 steps: a standard error of 0.01, and up to 0.03 of the schedulers' own error, most in the ancestral ones."""
    native = GaussianDiffusionScheduler(clip_sample=False)
    mean, deviation = moments(getattr(diffusers, name).from_config(native.config), 100)
    assert mean == pytest.approx(0.3, abs=0.04)
    assert deviation == pytest.approx(0.5, abs=0.04)


def test_other_options_of_a_process_are_accepted_where_it_stays_the_same() -> None:
    config = GaussianDiffusionScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).config
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        check_process(getattr(diffusers, name).from_config(config))
    check_process(diffusers.DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True))
    used = diffusers.PNDMScheduler()
    used.set_timesteps(10)
    check_process(used)


def test_another_process_is_refused_with_its_reason() -> None:
    for scheduler, reason in (
        (diffusers.EDMEulerScheduler(), "does not run a denoising diffusion process"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "does not run a denoising diffusion process"),
        (diffusers.LCMScheduler(), "does not run a denoising diffusion process"),
        (diffusers.DDIMInverseScheduler(), "does not run a denoising diffusion process"),
        (diffusers.DPMSolverMultistepInverseScheduler(), "goes from data to noise"),
        (diffusers.CogVideoXDDIMScheduler(), "changes the noise levels"),
        (
            diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            "has prediction_type 'flow_prediction'",
        ),
    ):
        with pytest.raises(ValueError, match=rf"{type(scheduler).__name__} {reason}"):
            check_process(scheduler)


@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing", "linspace"])
def test_heun_in_the_pipeline_is_the_method_of_heun(timestep_spacing: str) -> None:
    """Its deviation at 10 steps, 0.54 for 0.5, is its own error: the trapezoidal rule on the probability-flow ODE.

    Written out for Gaussian data, d x / d sigma = sigma x / (s^2 + sigma^2), whose slope averages two network calls a
    step and one in the last. Float32 noise of 3072 values: the mean of the squares is 1 only to 0.03.
    """
    native = GaussianDiffusionScheduler(clip_sample=False, timestep_spacing=timestep_spacing)
    heun = diffusers.HeunDiscreteScheduler.from_config(native.config)
    heun.set_timesteps(10)
    assert len(heun.timesteps) == 19
    levels = [sigma for i, sigma in enumerate(heun.sigmas.tolist()) if i == 0 or sigma != heun.sigmas[i - 1]]
    expected = float(heun.init_noise_sigma)
    for sigma, then in itertools.pairwise(levels):
        slope = sigma / (0.25 + sigma**2)
        at_the_end = then / (0.25 + then**2) * (1 + (then - sigma) * slope)
        expected *= 1 + (then - sigma) * (slope if then == 0 else (slope + at_the_end) / 2)
    _, deviation = moments(heun, 10)
    assert deviation == pytest.approx(expected, rel=0.03)
    assert abs(deviation - 0.5) > 0.02
    exact = float(heun.init_noise_sigma) * 0.5 / math.hypot(0.5, levels[0])
    assert exact == pytest.approx(0.5, rel=1e-3)
