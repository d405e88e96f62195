"""How many images one forward on one device takes: as told, or as many as fit."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DModel

from ddpm_hf.config import ConfigError, TrainingConfig
from ddpm_hf.training import processes
from ddpm_hf.training.objective import DenoisingLoss
from ddpm_hf.training.progress import say

AutocastContext: TypeAlias = AbstractContextManager[Any]


def largest_micro_batch_size(config: TrainingConfig, num_processes: int) -> int:
    """Returns the images of one forward on one device; for "auto" the share of a process, which may prove too large.

    Raises:
        ConfigError: If the global batch cannot be divided among the processes.
    """
    micro = config.micro_batch_size if isinstance(config.micro_batch_size, int) else None
    unit = num_processes * (micro or 1)
    if config.train_batch_size % unit:
        lower = config.train_batch_size // unit * unit
        product = f"{num_processes} processes" + (f" x micro_batch_size {micro}" if micro else "")
        raise ConfigError(
            f"training.train_batch_size {config.train_batch_size} is not a multiple of {product}; use "
            f"{f'{lower} or ' if lower else ''}{lower + unit}."
        )
    return micro or config.train_batch_size // num_processes


def largest_that_fits(share: int, attempt: Callable[[int], None]) -> int:
    """Halves the share of a process until it fits into the memory.

    Args:
        share: Images of a process in a step; every size that is tried divides it.
        attempt: Uses the memory that a micro batch of some size needs, or raises torch.OutOfMemoryError.

    Raises:
        ConfigError: If not even one image fits.
    """
    size = share
    while True:
        try:
            attempt(size)
            return size
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        if size == 1:
            raise ConfigError(
                f"training.micro_batch_size auto: not even one image fits ({reason}); use a smaller network or a "
                "smaller data.resolution."
            )
        size = max(divisor for divisor in range(1, size // 2 + 1) if share % divisor == 0)


def settle(config: TrainingConfig, share: int, stored: int | None, attempt: Callable[[int], None] | None) -> int:
    """Collective: decides how many images one forward takes in this run, and says so if that was left open.

    Args:
        config: The configuration of the run.
        share: What `largest_micro_batch_size` returned.
        stored: What "auto" stood for when the run began; it stays so where it still divides the share.
        attempt: As in `largest_that_fits`; None where memory cannot be probed.

    Returns:
        The size, which is the same on all ranks.

    Raises:
        ConfigError: On every rank, if not even one image fits on one of them.
    """
    if config.micro_batch_size != "auto":
        return share
    if stored is not None and share % stored == 0:
        size, reason = stored, "as when the run began"
    elif attempt is None:
        size, reason = share, "the whole share, since only the memory of a CUDA GPU can be probed"
    else:
        fitting = processes.on_every_rank(lambda: largest_that_fits(share, attempt))
        size, reason = int(processes.reduce(fitting, "min")), f"of {share}: that fits"
    processes.on_rank_0(lambda: say(f"training.micro_batch_size auto: {size} images, {reason}."))
    return size


def step_on_gpu(
    unet: UNet2DModel, loss: DenoisingLoss, image_shape: tuple[int, int, int], autocast: Callable[[], AutocastContext]
) -> Callable[[int], None] | None:
    """Returns the attempt of a network on a CUDA GPU; None elsewhere, where running out of memory is no exception."""
    return forward_and_backward(unet, loss, image_shape, autocast) if unet.device.type == "cuda" else None


def forward_and_backward(
    unet: UNet2DModel, loss: DenoisingLoss, image_shape: tuple[int, int, int], autocast: Callable[[], AutocastContext]
) -> Callable[[int], None]:
    """Returns an attempt that holds what a step does: activations, gradients and the two moments of AdamW.

    It leaves no gradient behind. Call it before the network is wrapped for several processes, whose buckets then take
    the place of the gradients.

    Args:
        unet: The network, on its device.
        loss: The objective of the run.
        image_shape: Channels, height and width.
        autocast: Makes the context of the run's precision.
    """

    def attempt(size: int) -> None:
        if unet.device.type == "cuda":
            torch.cuda.empty_cache()  # what a larger attempt left
        labels = None if unet.class_embedding is None else torch.zeros(size, dtype=torch.int64, device=unet.device)
        x_0 = torch.zeros(size, *image_shape, device=unet.device)
        timesteps = torch.zeros(size, dtype=torch.int64, device=unet.device)
        moments = [torch.empty_like(parameter) for parameter in unet.parameters() for _ in range(2)]
        try:
            with autocast():
                losses = loss(unet, x_0, torch.zeros_like(x_0), timesteps, labels)
            losses.mean().backward()
        finally:
            unet.zero_grad(set_to_none=True)
            del moments

    return attempt
