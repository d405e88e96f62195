"""What tells a pipeline from others: a hash of everything that its samples depend on."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from ddpm_hf.diffusion import GaussianDiffusionPipeline


def fingerprint(pipeline: GaussianDiffusionPipeline) -> str:
    """Returns the sha256 of weights and configurations, and of second moments that are in use.

    It is the same on any device, before and after saving, and another one in another precision.
    """
    digest = hashlib.sha256()
    scheduler = pipeline.scheduler
    own = {name: pipeline.config.get(name) or None for name in ("class_names", "has_null_label", "self_conditioned")}
    for config in (pipeline.unet.config, scheduler.config, own, {"scheduler": type(scheduler).__name__}):
        digest.update(_as_json(config))
    tensors = dict(pipeline.unet.state_dict())
    if getattr(scheduler, "analytic_variance", False):
        tensors["eps_second_moments"] = scheduler.eps_second_moments
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _as_json(config: Mapping[str, Any]) -> bytes:
    """Returns the settings of a configuration without the names and versions that diffusers adds."""
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    return json.dumps(settings, sort_keys=True, default=str).encode()
