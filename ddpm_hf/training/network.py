"""The network of a run, the same on every rank: from a preset, a file, a pretrained folder or the run's checkpoint."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from ddpm_hf.config import ModelConfig, RunConfig
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.pretrained import Pretrained, load_pretrained, read_config_file, take_weights
from ddpm_hf.training import processes
from ddpm_hf.training.checkpoint import find_latest
from ddpm_hf.unet import build_unet


def make_network(
    config: RunConfig,
    image_shape: tuple[int, int, int],
    class_names: dict[str, str] | None,
    scheduler: GaussianDiffusionScheduler,
    checkpoints: Path,
    device: torch.device,
) -> UNet2DModel:
    """Collective: builds the network of a run; rank 0 alone reads files and the Hub.

    Where the run has a checkpoint, that decides the network: neither model.config_file nor model.from_pretrained is
    looked at again, and the weights are still to be taken from the checkpoint.

    Args:
        config: Where the network comes from, and whether one label more means "no class".
        image_shape: Channels, height and width of the images.
        class_names: The classes of a class-conditional network.
        scheduler: The forward process of the run.
        checkpoints: The folder of the run's checkpoints.
        device: Where the network is wanted.

    Returns:
        The network in training mode, float32.

    Raises:
        ValueError: If the network cannot be had or does not fit the run.
    """
    model, has_null_label = config.model, config.objective.class_dropout > 0
    num_class_embeds = len(class_names) + has_null_label if class_names else None
    build = partial(
        build_unet,
        model,
        image_shape,
        num_class_embeds,
        self_conditioned=config.objective.self_conditioning > 0,
        learned_variance=config.diffusion.learns_variance,
    )
    if model.config_file is None and model.from_pretrained is None:
        return build().to(device)
    found = processes.on_rank_0(lambda: _read(model, checkpoints))
    file_config, pretrained = found if found is not None else (None, None)
    unet = build(processes.share_json(file_config))

    def take() -> None:
        if pretrained is not None:
            take_weights(unet, pretrained, scheduler, class_names, has_null_label)

    processes.on_rank_0(take)
    unet.to(device)
    processes.share_tensors(unet.parameters())
    return unet


def _read(model: ModelConfig, checkpoints: Path) -> tuple[dict[str, Any], Pretrained | None]:
    """Returns the network's configuration and, for a run that begins with one, the network to go on from."""
    latest, _ = find_latest(checkpoints)
    if latest is not None:
        return json.loads((latest.path / "unet" / "config.json").read_text(encoding="utf-8")), None
    if model.config_file is not None:
        return read_config_file(model), None
    pretrained = load_pretrained(model)
    # Names with an underscore are notes of diffusers, among them the path.
    return {name: value for name, value in pretrained.unet.config.items() if not name.startswith("_")}, pretrained
