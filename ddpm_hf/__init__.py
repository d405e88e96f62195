"""DDPM training and sampling for Hugging Face diffusers.

Public names are imported on first use, so that `import ddpm_hf` is quick and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from ddpm_hf.config import ObjectiveConfig, RunConfig, load_config
    from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
    from ddpm_hf.training.callbacks import TrainerCallback, TrainerControl, TrainerState
    from ddpm_hf.training.ema import EMA
    from ddpm_hf.training.loss import DenoisingLoss
    from ddpm_hf.training.trainer import Trainer
else:
    _MODULE_OF = {
        "EMA": "ddpm_hf.training.ema",
        "DenoisingLoss": "ddpm_hf.training.loss",
        "GaussianDiffusionPipeline": "ddpm_hf.diffusion",
        "GaussianDiffusionScheduler": "ddpm_hf.diffusion",
        "ObjectiveConfig": "ddpm_hf.config",
        "RunConfig": "ddpm_hf.config",
        "Trainer": "ddpm_hf.training.trainer",
        "TrainerCallback": "ddpm_hf.training.callbacks",
        "TrainerControl": "ddpm_hf.training.callbacks",
        "TrainerState": "ddpm_hf.training.callbacks",
        "load_config": "ddpm_hf.config",
    }

    def __dir__():
        return sorted([*globals(), *_MODULE_OF])

    def __getattr__(name):
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULE_OF[name]), name)


__all__ = [
    "EMA",
    "DenoisingLoss",
    "GaussianDiffusionPipeline",
    "GaussianDiffusionScheduler",
    "ObjectiveConfig",
    "RunConfig",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "__version__",
    "load_config",
]
