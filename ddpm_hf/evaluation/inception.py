"""The Inception network of FID, KID and Inception Score, through torch-fidelity: weights of 2015-12-05, 2048 features.

Szegedy et al. 2015, as Heusel et al. 2017 used it: TensorFlow's graph, whose own bilinear resize to 299x299 and
whose poolings torch-fidelity reproduces; scores of other ports of the network are not comparable.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from ddpm_hf.evaluation.feature_network import FeatureNetwork, digest_of

STANDARD_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class InceptionFeatures(nn.Module):
    """Maps uint8 images (number, 3, height, width) to the 2048 features before the last layer.

    Args:
        path: The weights.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the features, float32."""
        features: torch.Tensor = self.network(images)[0]
        return features

    def class_logits(self, features: torch.Tensor) -> torch.Tensor:
        """Returns the logits that the Inception Score is defined with: the last layer without its bias."""
        logits: torch.Tensor = features @ self.network.fc.weight.T
        return logits


def open_inception(weights: Path | None, device: torch.device) -> FeatureNetwork:
    """Opens the network.

    Args:
        weights: The file of its weights; None takes the one in torch's cache, downloading it where it is not there yet.
        device: Where to run it.

    Raises:
        ImportError: torch-fidelity is not installed.
        ValueError: The file cannot be found or downloaded, or is another one.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ImportError as error:
        raise ImportError(
            f"Inception features need torch-fidelity ({error}): pip install ddpm_hf[eval], or choose other features."
        ) from error
    path = weights if weights is not None else _standard_file(URL_INCEPTION_V3)
    if not path.is_file():
        raise ValueError(f"weights {path} is no file; give the path of {Path(URL_INCEPTION_V3).name}.")
    # Scores of other weights could not be compared with published ones; and torch-fidelity unpickles what it is given.
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 != STANDARD_SHA256:
        raise ValueError(
            f"weights {path} has the sha256 {sha256[:12]}..., but that of the Inception network of FID begins with "
            f"{STANDARD_SHA256[:12]}; get it from {URL_INCEPTION_V3}, or remove a damaged file."
        )
    versions = f"torch-fidelity {version('torch-fidelity')}, torch {torch.__version__}"
    return FeatureNetwork(
        name="inception",
        description=f"Inception-v3 of 2015-12-05, 2048 features, weights sha256 {sha256[:12]}, images resized to "
        f"299x299 as by TensorFlow 1; {versions}",
        digest=digest_of({"weights": sha256, "versions": versions}),
        module=InceptionFeatures(path).to(device),
        device=device,
    )


def _standard_file(url: str) -> Path:
    """Returns the weights in torch's own cache, downloading them into it if they are not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=STANDARD_SHA256)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"The weights of the Inception network, {path.name}, are not in {path.parent} and cannot be downloaded "
                f"({error}); get them from {url} where there is a network, and give their path as weights."
            ) from error
    return path
