"""The portable diffusion core: schedules, algebra, scheduler and pipeline. It needs torch and diffusers, nothing else."""

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
