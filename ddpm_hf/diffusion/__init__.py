"""The portable diffusion core: schedules, equations, scheduler and pipeline. Imports torch and diffusers only."""

from .pipeline import GaussianDiffusionPipeline, GaussianDiffusionPipelineOutput
from .schedule import NoiseSchedule, make_betas
from .scheduler import GaussianDiffusionScheduler, GaussianDiffusionSchedulerOutput

__all__ = [
    "GaussianDiffusionPipeline",
    "GaussianDiffusionPipelineOutput",
    "GaussianDiffusionScheduler",
    "GaussianDiffusionSchedulerOutput",
    "NoiseSchedule",
    "make_betas",
]
