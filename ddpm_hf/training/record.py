"""training_summary.json: what a saved pipeline says of its training, for a model card."""

import platform
from collections.abc import Sized
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel

from ddpm_hf import __version__
from ddpm_hf.config import RunConfig
from ddpm_hf.data import ImageSet, ImageStream
from ddpm_hf.training.tracking import MetricsLog

FILE_NAME = "training_summary.json"
_SCORE = "score"


def summarize(
    config: RunConfig,
    step: int,
    *,
    images: ImageSet | ImageStream,
    unet: UNet2DModel,
    num_processes: int,
    metrics: MetricsLog,
) -> dict[str, Any]:
    """Returns how long a network was trained on what.

    Args:
        config: The configuration of the run.
        step: Optimiser updates done.
        images: The training images.
        unet: The network, on the device that it is trained on.
        num_processes: How many train it together.
        metrics: Its lines of metrics.

    Returns:
        Values that JSON can hold. The seconds are those of training itself, without validation, previews and saving.
    """
    source = config.data.source
    timed, learned, scored = (metrics.last(name) or {} for name in ("seconds", "loss", _SCORE))
    return {
        "step": step,
        "num_steps": config.training.num_steps,
        "num_images_seen": step * config.training.train_batch_size,
        "seconds": timed.get("seconds"),
        "device": device_name(unet.device),
        "num_processes": num_processes,
        "num_parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "data": {
            # Of a path the name is enough: where it lies is no matter of whoever reads a model card.
            "source": Path(source).name if Path(source).expanduser().exists() else source,
            "num_images": len(images) if isinstance(images, Sized) else None,
            "num_classes": unet.config.num_class_embeds and unet.config.num_class_embeds - _has_null_label(config),
        },
        "loss": learned.get("loss"),
        "score": {name: value for name, value in scored.items() if name.startswith(_SCORE)} or None,
        "versions": {"ddpm_hf": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def _has_null_label(config: RunConfig) -> bool:
    """Whether one of the network's labels means "no class"."""
    return config.objective.class_dropout > 0


def device_name(device: torch.device) -> str:
    """Returns what a device is called by those who sell it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
