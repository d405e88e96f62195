"""The portable diffusion core: schedules, algebra, scheduler and pipeline. Needs torch and diffusers only."""

from .noise_schedule import NoiseSchedule, make_betas
from .pipeline import GaussianDiffusionPipeline, GaussianDiffusionPipelineOutput
from .scheduler import GaussianDiffusionScheduler, GaussianDiffusionSchedulerOutput

__all__ = [
    "GaussianDiffusionPipeline",
    "GaussianDiffusionPipelineOutput",
    "GaussianDiffusionScheduler",
    "GaussianDiffusionSchedulerOutput",
    "NoiseSchedule",
    "make_betas",
]
