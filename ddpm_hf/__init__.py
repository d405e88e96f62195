"""DDPM training and sampling for Hugging Face diffusers.

Public names are imported on first use, so that `import ddpm_hf` is quick and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ddpm_hf.config import RunConfig, load_config
    from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
    from ddpm_hf.training.trainer import Trainer
else:
    _MODULE_OF = {
        "GaussianDiffusionPipeline": "ddpm_hf.diffusion",
        "GaussianDiffusionScheduler": "ddpm_hf.diffusion",
        "RunConfig": "ddpm_hf.config",
        "Trainer": "ddpm_hf.training.trainer",
        "load_config": "ddpm_hf.config",
    }

    def __getattr__(name):
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULE_OF[name]), name)


__all__ = [
    "GaussianDiffusionPipeline",
    "GaussianDiffusionScheduler",
    "RunConfig",
    "Trainer",
    "__version__",
    "load_config",
]
