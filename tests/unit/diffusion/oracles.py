"""Data whose perfect network is a formula, a tiny network, and a counter of tensor operations."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf.diffusion import GaussianDiffusionScheduler

VIEWS = {"split", "select", "view", "slice", "unsqueeze", "expand", "_unsafe_view", "reshape", "alias", "detach"}
HOST_READS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal"}


@dataclass(frozen=True)
class GaussianData:
    """Data N(mean, deviation^2): the best prediction from x_t is linear in x_t; deviation 0 is a single point."""

    mean: float = 0.3
    deviation: float = 0.5

    def predict(self, scheduler: GaussianDiffusionScheduler, x_t: torch.Tensor, t: int) -> torch.Tensor:
        """The best output at timestep t for the scheduler's prediction type, in the dtype of x_t."""
        alpha_bar = scheduler.noise_schedule.alphas_cumprod[t].item()
        gain = alpha_bar**0.5 * self.deviation**2 / (alpha_bar * self.deviation**2 + 1 - alpha_bar)
        x_0 = self.mean + gain * (x_t - alpha_bar**0.5 * self.mean)
        eps = (x_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5
        v = alpha_bar**0.5 * eps - (1 - alpha_bar) ** 0.5 * x_0
        return {"epsilon": eps, "sample": x_0, "v_prediction": v}[scheduler.config.prediction_type]


class OperationCounter(TorchDispatchMode):
    """Counts what reaches the dispatcher while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def launched(self) -> int:
        """Operations that would launch a kernel on a GPU."""
        return sum(count for name, count in self.counts.items() if name not in VIEWS)

    @property
    def host_reads(self) -> int:
        """Operations that would make the host wait for a GPU."""
        return sum(count for name, count in self.counts.items() if name in HOST_READS)


def tiny_unet(seed: int = 0, **changes: Any) -> UNet2DModel:
    """A UNet of a few thousand parameters with random weights, in eval mode."""
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(**config | changes).eval()


def seeded(seed: int = 0) -> torch.Generator:
    """A fresh CPU generator."""
    return torch.Generator().manual_seed(seed)
