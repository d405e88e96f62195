"""Feature networks, and the statistics of reference images in their features.

A feature network is opened by name: Inception as FID defines it, a vision model of transformers, or a module by import
path. Reference statistics are computed once and cached on disk. The name of a cache file is a digest of the pixels, the
network and the library versions; a checksum inside it detects damage.
"""

import difflib
import hashlib
import importlib
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn
from tqdm import tqdm

from ddpm_hf import distributed
from ddpm_hf.data import ImageSet
from ddpm_hf.files import atomic_write, sha256_of_file

logger = logging.getLogger(__name__)

Features = NDArray[np.float32]
FloatArray = NDArray[np.float64]
GetImages = Callable[[range], NDArray[np.uint8]]
"""Returns the images at some positions, uint8 (number, channels, height, width)."""

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_CACHE_VERSION = "1"
_PIXELS_CHUNK = 1024
_FEATURES_CHUNK = 4096
_NOTHING: dict[str, NDArray[Any]] = {
    "features": np.zeros((0, 0), np.float32), "mean": np.zeros(0), "covariance": np.zeros((0, 0))
}  # fmt: skip
_TRANSFORMERS_KINDS = ("dinov2", "transformers")
_FORMS = "inception, dinov2:FOLDER_OR_HUB_ID, transformers:FOLDER_OR_HUB_ID or package.module:factory"


@dataclass
class FeatureNetwork:
    """A network that maps images to features.

    Args:
        name: Name of the network in the names of metrics.
        description: Network, weights, resizing and library versions, for evaluation.json.
        digest: Changes with the weights, the preprocessing and the library versions.
        module: Maps uint8 images (number, 3, height, width) to features (number, d).
        device: Device of the module.
    """

    name: str
    description: str
    digest: str
    module: nn.Module
    device: torch.device
    _num_features: int = field(default=0, init=False, repr=False)

    def num_features(self, image_shape: tuple[int, int, int]) -> int:
        """Return the number of features d, found by one forward pass on a gray image (channels, height, width)."""
        if not self._num_features:
            gray = np.full((1, *image_shape), 128, np.uint8)
            self._num_features = self._features(range(1), lambda _: gray, 1, "samples").shape[1]
        return self._num_features

    def features_of(self, num_images: int, get_images: GetImages, batch_size: int, what: str) -> Features:
        """Collective: return the features of images; the processes share the images.

        Gray images are repeated to three channels.

        Args:
            num_images: Number of images.
            get_images: Returns the images of a batch.
            batch_size: Images per forward pass.
            what: Name of the images in the progress bar and in errors.

        Returns:
            float32 (num_images, d).

        Raises:
            ValueError: The network does not return one row of finite features per image.
        """
        mine = distributed.rank_range(num_images)
        return distributed.gather_rows(
            distributed.on_every_rank(lambda: self._features(mine, get_images, batch_size, what))
        )

    def features_of_images(self, images: NDArray[np.uint8], batch_size: int, what: str) -> Features:
        """Collective: return `features_of` images in the layout of samples (number, height, width, channels)."""
        return self.features_of(
            len(images), lambda rows: images[rows.start : rows.stop].transpose(0, 3, 1, 2), batch_size, what
        )

    @torch.no_grad()
    def _features(self, images: range, get_images: GetImages, batch_size: int, what: str) -> Features:
        """Return the features of some images."""
        parts = [] if len(images) else [np.zeros((0, self._num_features), np.float32)]
        with tqdm(total=len(images), desc=f"Features of {what}", unit="img", disable=None, leave=False) as bar:
            for start in range(images.start, images.stop, batch_size):
                positions = range(start, min(start + batch_size, images.stop))
                pixels = get_images(positions)
                rgb = np.repeat(pixels, 3, axis=1) if pixels.shape[1] == 1 else np.ascontiguousarray(pixels)
                output = self.module(torch.from_numpy(rgb).to(self.device))
                parts.append(self._check_output(output, positions, what))
                bar.update(len(positions))
        return np.concatenate(parts)

    def _check_output(self, output: object, positions: range, what: str) -> Features:
        if not isinstance(output, torch.Tensor) or output.ndim != 2 or len(output) != len(positions):
            shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ValueError(
                f"The feature network {self.name} returned {shape} for {len(positions)} images; it must return a "
                f"tensor [{len(positions)}, features]."
            )
        features: Features = output.float().cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(bad):
            raise ValueError(
                f"The features in {self.name} are not finite for {len(bad)} of the {len(positions)} images of the "
                f"{what} from number {positions.start} on; the first of them is number {positions[bad[0]]}."
            )
        return features


def open_features(features: str, weights: Path | None, device: torch.device) -> FeatureNetwork:
    """Open a feature network by its name.

    Args:
        features: `inception`; `dinov2:` or `transformers:` followed by a local folder or a Hub id; or
            `package.module:factory`, a callable without arguments that returns a module like `FeatureNetwork.module`.
            The last form imports that module, which runs its code.
        weights: File of the Inception weights, if it is not in torch's cache and cannot be downloaded.
        device: Device to run the network on.

    Raises:
        ImportError: A library is missing.
        ValueError: The name is unknown, or the network cannot be opened.
    """
    kind, _, rest = features.partition(":")
    if features == "inception":
        return _open_inception(weights, device)
    if weights is not None:
        raise ValueError(f"weights {weights} applies to features inception only; leave it out for {features}.")
    if kind in _TRANSFORMERS_KINDS and rest:
        return _open_transformers(features, device)
    is_import_path = all(name.isidentifier() for name in [*kind.split("."), *rest.split(".")])
    nearest = difflib.get_close_matches(kind, ["inception", *_TRANSFORMERS_KINDS], n=1)
    if not is_import_path or (nearest and "." not in kind):
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"features {features} is not known; it must be {_FORMS}.{hint}")
    return _open_factory(features, kind, rest, device)


# Inception of FID, KID and Inception Score: Szegedy et al. 2015, in the TensorFlow graph of 2015-12-05 that Heusel et
# al. 2017 used. torch-fidelity reproduces its bilinear resize to 299x299 and its poolings; scores of other ports of the
# network are not comparable.


class InceptionFeatures(nn.Module):
    """Maps uint8 images (number, 3, height, width) to the 2048 features before the last layer.

    Args:
        path: File of the weights.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 features (number, 2048)."""
        features: torch.Tensor = self.network(images)[0]
        return features

    def class_logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits that the Inception Score is defined with: the last layer without its bias."""
        logits: torch.Tensor = features @ self.network.fc.weight.T
        return logits


def _open_inception(weights: Path | None, device: torch.device) -> FeatureNetwork:
    """Open the Inception network of FID.

    Args:
        weights: File of the weights; None takes the one in torch's cache, after downloading it if needed.
        device: Device to run the network on.

    Raises:
        ImportError: torch-fidelity is not installed.
        ValueError: The file is missing, cannot be downloaded, or is a different file.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ImportError as error:
        raise ImportError(
            f"Inception features need torch-fidelity ({error}): pip install ddpm_hf[eval], or choose other features."
        ) from error
    path = weights if weights is not None else _download_inception(URL_INCEPTION_V3)
    if not path.is_file():
        raise ValueError(f"weights {path} is not a file; give the path of {Path(URL_INCEPTION_V3).name}.")
    # Scores with other weights could not be compared with published ones; and torch-fidelity unpickles the file.
    sha256 = sha256_of_file(path)
    if sha256 != INCEPTION_SHA256:
        raise ValueError(
            f"weights {path} has the sha256 {sha256[:12]}..., but that of the Inception network of FID begins with "
            f"{INCEPTION_SHA256[:12]}; get it from {URL_INCEPTION_V3}, or remove the damaged file."
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


def _download_inception(url: str) -> Path:
    """Return the weights in torch's cache, after downloading them if they are not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"The weights of the Inception network, {path.name}, are not in {path.parent} and cannot be downloaded "
                f"({error}); download them from {url} on another machine, and pass their path as weights."
            ) from error
    return path


class _TransformersFeatures(nn.Module):
    """A vision model with its image processor: uint8 images (number, 3, height, width) to image embeddings.

    Args:
        name: A local folder or a Hub id.
        keep_borders: Resize the whole image to the size that the processor would crop from the center of a larger one.
    """

    def __init__(self, name: str, *, keep_borders: bool) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        self.processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        if keep_borders and getattr(self.processor, "do_center_crop", False):
            size = self.processor.to_dict()["crop_size"]
            self.processor = AutoImageProcessor.from_pretrained(
                name, trust_remote_code=False, size=size, do_center_crop=False
            )
        self.model, loaded = AutoModel.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        missing = sorted(loaded["missing_keys"])
        # Many checkpoints lack the pooling layer, which transformers then initializes at random.
        self.has_pooler = not any(key.startswith("pooler.") for key in missing)
        if others := [key for key in missing if not key.startswith("pooler.")]:
            raise ValueError(f"it lacks weights of its own network: {', '.join(others[:3])}")
        if self.model.main_input_name != "pixel_values":
            raise ValueError(f"{type(self.model).__name__} is not an image model")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the pooled output, or the class token if there is no pooling layer."""
        pixels = list(images.permute(0, 2, 3, 1).cpu().numpy())
        inputs = self.processor(images=pixels, input_data_format="channels_last", return_tensors="pt")
        outputs = self.model(inputs["pixel_values"].to(images.device))
        pooled = getattr(outputs, "pooler_output", None) if self.has_pooler else None
        embedding: torch.Tensor = outputs.last_hidden_state[:, 0] if pooled is None else pooled
        return embedding.flatten(1)


def _open_transformers(features: str, device: torch.device) -> FeatureNetwork:
    """Open a vision model of transformers with its published preprocessing.

    Except for `dinov2`, whose processor would resize to 256 pixels and crop a border of 16, 23 % of the image: Stein et
    al. 2023 resize to 224 pixels, and so does this.
    """
    import transformers

    kind, _, name = features.partition(":")
    try:
        module = _TransformersFeatures(name, keep_borders=kind == "dinov2")
    except Exception as error:  # transformers, the Hub and safetensors raise many types
        raise ValueError(
            f"features {features} cannot be opened ({str(error).splitlines()[0]}); give a folder or a Hub id of a "
            "vision model with safetensors weights and a preprocessor_config.json."
        ) from error
    model_type = str(module.model.config.model_type)
    if kind == "dinov2" and not model_type.startswith("dinov2"):
        raise ValueError(f"features {features} is a model of type {model_type}; use transformers:{name}.")
    processor = module.processor.to_dict()
    keys = ("size", "crop_size", "resample") if processor.get("do_center_crop") else ("size", "resample")
    resizing = ", ".join(f"{key} {processor[key]}" for key in keys if processor.get(key) is not None)
    processor_name = type(module.processor).__name__
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    weights = digest_of(module.state_dict())
    return FeatureNetwork(
        name=features,
        description=f"{type(module.model).__name__} {name}, weights sha256 {weights[:12]}, {processor_name} with "
        f"{resizing}; {versions}",
        digest=digest_of(
            {
                "weights": weights,
                "processor": f"{processor_name} {module.processor.to_json_string()}",
                "type": model_type,
                "versions": versions,
            }
        ),
        module=module.eval().requires_grad_(False).to(device),
        device=device,
    )


def _open_factory(features: str, module_name: str, attribute: str, device: torch.device) -> FeatureNetwork:
    """Open the module that a callable returns."""
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features {features} cannot be imported ({error}); it must be {_FORMS}.") from error
    module = factory() if callable(factory) else None
    if not isinstance(module, nn.Module):
        raise ValueError(f"features {features} must be a callable that returns a torch.nn.Module.")
    # The weights alone do not determine how the module resizes and normalizes, so its source is part of the digest.
    source = Path(inspect.getfile(type(module))).read_bytes().hex()
    weights = digest_of(module.state_dict())
    return FeatureNetwork(
        name=features,
        description=f"{type(module).__name__} of {features}, weights sha256 {weights[:12]}, resized by itself; torch "
        f"{torch.__version__}",
        digest=digest_of({"weights": weights, "source": source, "name": features, "torch": torch.__version__}),
        module=module.eval().requires_grad_(False).to(device),
        device=device,
    )


def digest_of(parts: Mapping[str, str | NDArray[np.generic] | torch.Tensor]) -> str:
    """Return the sha256 of named texts and arrays, independent of their order."""
    digest = hashlib.sha256()
    for name, value in sorted(parts.items()):
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        data = value.encode() if isinstance(value, str) else np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        digest.update(f"{name} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) of the features of `num_images` images, float64."""

    mean: FloatArray
    covariance: FloatArray
    num_images: int


def moments_of(features: NDArray[np.floating]) -> Moments:
    """Return mean and unbiased covariance (divisor num_images - 1) of features (num_images, d).

    Raises:
        ValueError: There are not more images than features, so the covariance would be singular.
    """
    num_images, num_features = features.shape
    if num_images <= num_features:
        raise ValueError(
            f"A covariance of {num_features} features needs more than {num_features} images; there are {num_images}."
        )
    # Two passes: the difference of two large sums would cancel the digits of the covariance.
    chunks = [features[start : start + _FEATURES_CHUNK] for start in range(0, num_images, _FEATURES_CHUNK)]
    mean = np.sum([chunk.sum(axis=0, dtype=np.float64) for chunk in chunks], axis=0)
    mean /= num_images
    covariance = np.zeros((num_features, num_features))
    for chunk in chunks:
        centered = chunk - mean
        covariance += centered.T @ centered
    return Moments(mean, covariance / (num_images - 1), num_images)


class ReferenceStatistics:
    """Features of the reference images and their moments, read from the cache if they are known.

    Collective: the processes share the images, and rank 0 reads and writes the cache. Features and moments stay in
    memory, for scores that are measured repeatedly.

    Args:
        network: The feature network.
        images: Reference images without augmentation: `take` crops from the center and mirrors nothing.
        batch_size: Images per forward pass.
        cache_dir: Folder of the cache; None takes a folder in the user's cache.
    """

    def __init__(self, network: FeatureNetwork, images: ImageSet, batch_size: int, cache_dir: Path | None) -> None:
        self.network = network
        self.images = images
        self.batch_size = batch_size
        self.cache_dir = cache_dir if cache_dir is not None else _default_cache_dir()
        self._arrays: dict[str, dict[str, NDArray[Any]]] = {}

    @cached_property
    def key(self) -> str:
        """Name of the cache files."""
        parts = {"version": _CACHE_VERSION, "pixels": self._pixel_digest(), "network": self.network.digest}
        return digest_of(parts)[:32]

    def features(self) -> Features:
        """Collective: return all features (number, d); empty on other ranks than 0."""
        return self._known("features", self._extract)["features"]

    def moments(self) -> Moments:
        """Collective: return mean and covariance; empty on other ranks than 0."""
        moments = self._known("moments", self._compute_moments)
        return Moments(moments["mean"], moments["covariance"], len(self.images))

    def _extract(self) -> dict[str, NDArray[Any]]:
        return {"features": self.network.features_of(len(self.images), self._pixels, self.batch_size, "reference")}

    def _compute_moments(self) -> dict[str, NDArray[Any]]:
        features = (self._arrays.get("features") or self._extract())["features"]
        moments = distributed.on_rank_0(lambda: moments_of(features))
        return {} if moments is None else {"mean": moments.mean, "covariance": moments.covariance}

    def _pixels(self, positions: range) -> NDArray[np.uint8]:
        return self.images.pictures(np.asarray(positions))

    def _pixel_digest(self) -> str:
        """Return the sha256 of the images as they are compared: `images.digest` does not cover resizing and crops."""
        num_images = len(self.images)
        digest = hashlib.sha256(repr((num_images, self.images.image_shape)).encode())
        for start in range(0, num_images, _PIXELS_CHUNK):
            pixels = self._pixels(range(start, min(start + _PIXELS_CHUNK, num_images)))
            digest.update(np.ascontiguousarray(pixels).data)
        return digest.hexdigest()

    def _known(self, kind: str, compute: Callable[[], dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        """Return arrays from memory or from the cache, or compute and write them."""
        if kind not in self._arrays:
            arrays = distributed.on_rank_0(lambda: self._read(kind))
            if not distributed.broadcast_json(bool(arrays)):
                arrays = computed = compute()
                distributed.on_rank_0(lambda: self._write(kind, computed))
            self._arrays[kind] = arrays if arrays and distributed.rank() == 0 else _NOTHING
        return self._arrays[kind]

    def _read(self, kind: str) -> dict[str, NDArray[Any]]:
        """Read arrays from the cache; return none if they are not there or damaged."""
        path = self._path(kind)
        if not path.is_file():
            return {}
        try:
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}
                if (file.metadata() or {}).get("sha256") == digest_of(arrays):
                    return arrays
            problem: object = "its checksum is wrong"
        except (SafetensorError, OSError, ValueError) as error:
            problem = error
        logger.warning("The reference statistics in %s are damaged (%s) and are computed again.", path, problem)
        return {}

    def _write(self, kind: str, arrays: dict[str, NDArray[Any]]) -> None:
        path = self._path(kind)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = save(arrays, {"sha256": digest_of(arrays)})
            atomic_write(path, lambda temporary: temporary.write_bytes(content))
        except OSError as error:
            logger.warning("The reference statistics cannot be cached in %s (%s).", path.parent, error)

    def _path(self, kind: str) -> Path:
        return self.cache_dir / f"{self.key}.{kind}.safetensors"


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm_hf" / "features"
