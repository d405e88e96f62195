"""DDPM training and sampling for Hugging Face diffusers.

Public names are imported when they are first used, so that `import ddpm_hf` is quick and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ddpm_hf.config import RunConfig, load_config
    from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
    from ddpm_hf.training.trainer import Trainer
else:
    _HOME_OF = {
        "GaussianDiffusionPipeline": "ddpm_hf.diffusion",
        "GaussianDiffusionScheduler": "ddpm_hf.diffusion",
        "RunConfig": "ddpm_hf.config",
        "Trainer": "ddpm_hf.training.trainer",
        "load_config": "ddpm_hf.config",
    }

    def __getattr__(name):
        """Imports a public name on first use."""
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOME_OF[name]), name)


__all__ = [
    "GaussianDiffusionPipeline",
    "GaussianDiffusionScheduler",
    "RunConfig",
    "Trainer",
    "__version__",
    "load_config",
]
