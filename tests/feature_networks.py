"""Feature networks for tests, opened by import path."""

from pathlib import Path

import pytest
import torch
from torch import nn

INCEPTION_SIZE = 75


class Pooled(nn.Module):
    """Four features of an image: the mean of each quarter of its first channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (number, 4) for uint8 (number, 3, height, width)."""
        return nn.functional.adaptive_avg_pool2d(images[:, :1].float(), 2).flatten(1)


def pooled() -> nn.Module:
    """Return the network."""
    return Pooled()


def pooled_again() -> nn.Module:
    """Return the same network under another name."""
    return Pooled()


class ChannelStatistics(nn.Module):
    """Six features of an image: mean and standard deviation of each channel. Counts the images of all instances."""

    num_images = 0

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale / 255))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (number, 6) for uint8 (number, 3, height, width)."""
        ChannelStatistics.num_images += len(images)
        pixels = images.float() * self.scale
        return torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], dim=1)


def doubled_statistics() -> nn.Module:
    """Return ChannelStatistics with other weights."""
    return ChannelStatistics(2.0)


class Pixels(nn.Module):
    """Three features of an image: its first pixel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (number, 3) for uint8 (number, 3, height, width)."""
        return images[..., 0, 0].float() / 64 - 2


def random_inception_weights(folder: Path) -> Path:
    """Write a file with random weights of the Inception network of FID."""
    from torch_fidelity import feature_extractor_inceptionv3

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    # With the initial scale of the layers, all images would have almost equal features.
    weights = network.state_dict()
    path = folder / "random.pth"
    torch.save({name: value * 2.5 if name.endswith("conv.weight") else value for name, value in weights.items()}, path)
    return path
