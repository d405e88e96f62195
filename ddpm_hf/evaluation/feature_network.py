"""A network whose features images are compared in, with all that tells it from others."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

Features = NDArray[np.float32]
Take = Callable[[range], NDArray[np.uint8]]
"""Returns the images of some positions, uint8 (number, channels, height, width)."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A network, ready to run.

    Args:
        name: What it is called in the names of metrics.
        description: Network, weights, resize and versions of libraries, for a reader.
        digest: Changes with the weights, the preprocessing and the libraries.
        module: Maps uint8 images (number, 3, height, width) to features (number, d).
        device: Where it runs.
    """

    name: str
    description: str
    digest: str
    module: nn.Module
    device: torch.device

    @torch.no_grad()
    def features_of(self, num_images: int, take: Take, batch_size: int, what: str) -> Features:
        """Returns the features of images, (num_images, d); gray images are repeated to three channels.

        Args:
            num_images: How many there are.
            take: Gives them.
            batch_size: Images of one forward.
            what: What they are called, for the progress bar and for errors.

        Raises:
            ValueError: What the network returns are not finite features, one row an image.
        """
        parts = []
        with tqdm(total=num_images, desc=f"Features of {what}", unit="img", disable=None, leave=False) as bar:
            for start in range(0, num_images, batch_size):
                positions = range(start, min(start + batch_size, num_images))
                pixels = take(positions)
                rgb = np.repeat(pixels, 3, axis=1) if pixels.shape[1] == 1 else np.ascontiguousarray(pixels)
                output = self.module(torch.from_numpy(rgb).to(self.device))
                parts.append(self._checked(output, positions, what))
                bar.update(len(positions))
        return np.concatenate(parts)

    def _checked(self, output: object, positions: range, what: str) -> Features:
        """Returns the features of a batch as an array, if that is what they are."""
        if not isinstance(output, torch.Tensor) or output.ndim != 2 or len(output) != len(positions):
            shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ValueError(
                f"The network of features {self.name} returned {shape} for {len(positions)} images; it must return a "
                f"tensor [{len(positions)}, features]."
            )
        features: Features = output.float().cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(bad):
            raise ValueError(
                f"{len(bad)} of the {len(positions)} images of the {what} from number {positions.start} on have "
                f"features in {self.name} that are not finite; the first is number {positions[bad[0]]}."
            )
        return features


def digest_of(parts: Mapping[str, str | NDArray[np.generic] | torch.Tensor]) -> str:
    """Returns the sha256 of named texts and arrays."""
    digest = hashlib.sha256()
    for name, value in sorted(parts.items()):
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        data = value.encode() if isinstance(value, str) else np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        digest.update(f"{name} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()
