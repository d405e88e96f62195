"""The portable diffusion core: schedules, algebra, scheduler and pipeline. Needs torch and diffusers only."""

from .denoising import GaussianDiffusionPipelineOutput
from .noise_schedule import NoiseSchedule, make_betas
from .pipeline import GaussianDiffusionPipeline
from .scheduler import GaussianDiffusionScheduler, GaussianDiffusionSchedulerOutput

__all__ = [
    "GaussianDiffusionPipeline",
    "GaussianDiffusionPipelineOutput",
    "GaussianDiffusionScheduler",
    "GaussianDiffusionSchedulerOutput",
    "NoiseSchedule",
    "make_betas",
]
