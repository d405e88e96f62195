"""What metrics need of the reference images, computed once and kept on the disk.

A file is named by a fingerprint of the pixels, the network and the libraries; it is written under another name and
renamed, and holds a checksum. One that is damaged is computed anew.
"""

import hashlib
import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ddpm_hf.data import ImageSet
from ddpm_hf.evaluation.feature_network import FeatureNetwork, Features, digest_of
from ddpm_hf.evaluation.frechet import Moments, moments_of

logger = logging.getLogger(__name__)

_VERSION = "1"
_IMAGES_AT_ONCE = 1024
Arrays = dict[str, NDArray[Any]]


class ReferenceStatistics:
    """Features of the reference images and their moments, from the disk where they are known.

    Args:
        network: Gives the features.
        images: The reference, un-augmented: `take` cuts its crops from the centre and mirrors nothing.
        batch_size: Images of one forward.
        cache_dir: Where files are kept; None takes a folder in the cache of the user.
    """

    def __init__(self, network: FeatureNetwork, images: ImageSet, batch_size: int, cache_dir: Path | None) -> None:
        self.network = network
        self.images = images
        self.batch_size = batch_size
        self.folder = cache_dir if cache_dir is not None else _default_folder()
        self.key = digest_of({"version": _VERSION, "pixels": _pixel_digest(images), "network": network.digest})[:32]
        self._features: Features | None = None

    def features(self) -> Features:
        """Returns all features (number, d), and keeps them."""
        if self._features is None:
            self._features = _cached(self.folder / f"{self.key}.features.safetensors", self._extract)["features"]
        return self._features

    def moments(self) -> Moments:
        """Returns mean and covariance, and keeps them; the features are computed only if they have to be."""
        stored = _cached(self.folder / f"{self.key}.moments.safetensors", self._compute_moments)
        return Moments(stored["mean"], stored["covariance"], len(self.images))

    def _extract(self) -> Arrays:
        take = lambda positions: _pixels(self.images, positions)  # noqa: E731
        return {"features": self.network.features_of(len(self.images), take, self.batch_size, "reference")}

    def _compute_moments(self) -> Arrays:
        features = self._features if self._features is not None else self._extract()["features"]
        moments = moments_of(features)
        return {"mean": moments.mean, "covariance": moments.covariance}


def _pixels(images: ImageSet, positions: range) -> NDArray[np.uint8]:
    """Returns images, uint8 (number, channels, height, width)."""
    return images.take(np.asarray(positions))[0].astype(np.uint8, copy=False)


def _pixel_digest(images: ImageSet) -> str:
    """Returns the sha256 of the images as they are compared.

    The digest of the set tells the encoded data from others, not how they were resized and cropped.
    """
    digest = hashlib.sha256(repr((len(images), images.image_shape)).encode())
    for start in range(0, len(images), _IMAGES_AT_ONCE):
        stop = min(start + _IMAGES_AT_ONCE, len(images))
        digest.update(np.ascontiguousarray(_pixels(images, range(start, stop))).data)
    return digest.hexdigest()


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm_hf" / "features"


def _read(path: Path) -> Arrays:
    """Returns the arrays of a file, if they are as they were written."""
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}
        if (file.metadata() or {}).get("sha256") != digest_of(arrays):
            raise ValueError("its checksum is wrong")
    return arrays


def _cached(path: Path, compute: Callable[[], Arrays]) -> Arrays:
    """Returns the arrays of a file, or computes and writes them."""
    if path.is_file():
        try:
            return _read(path)
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning("The statistics in %s are damaged (%s) and are computed anew.", path, error)
    arrays = compute()
    building = path.with_name(f"{path.name}.building-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with building.open("wb") as stream:
            stream.write(save(arrays, metadata={"sha256": digest_of(arrays)}))
            stream.flush()
            os.fsync(stream.fileno())
        building.replace(path)
    except OSError as error:
        if building.is_file():
            building.unlink()
        logger.warning(
            "The statistics of the reference cannot be kept in %s (%s) and will be computed again.", path.parent, error
        )
    return arrays
