"""Feature networks and the reference statistics of real images.

A network whose features images are compared in, with all that tells it from others.

The Inception network of FID, KID and Inception Score, through torch-fidelity: weights of 2015-12-05, 2048 features.

Szegedy et al. 2015, as Heusel et al. 2017 used it: TensorFlow's graph, whose own bilinear resize to 299x299 and
whose poolings torch-fidelity reproduces; scores of other ports of the network are not comparable.

Networks for features by name: Inception, any vision model of transformers, any module by import path.

What metrics need of the reference images, computed once and kept on the disk.

A file is named by a fingerprint of the pixels, the network and the libraries; it is written under another name and
renamed, and holds a checksum. One that is damaged is computed anew.
"""

import difflib
import hashlib
import importlib
import inspect
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

from ddpm_hf.data import ImageSet

Array = NDArray[np.float64]
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) of the features of `num_images` images."""

    mean: Array
    covariance: Array
    num_images: int


def moments_of(features: NDArray[np.floating]) -> Moments:
    """Returns mean and covariance (with num_images - 1) of features (num_images, d).

    Raises:
        ValueError: There are not more images than features, so that the covariance would have no full rank.
    """
    num_images, dimension = features.shape
    if num_images <= dimension:
        raise ValueError(
            f"A covariance of {dimension} features needs more than {dimension} images; there are {num_images}."
        )
    # Twice through the features: the difference of two large sums would lose what is left of the digits.
    parts = range(0, num_images, _ROWS_AT_ONCE)
    mean = np.sum([features[row : row + _ROWS_AT_ONCE].sum(axis=0, dtype=np.float64) for row in parts], axis=0)
    mean /= num_images
    covariance = np.zeros((dimension, dimension))
    for row in parts:
        centered = features[row : row + _ROWS_AT_ONCE] - mean
        covariance += centered.T @ centered
    return Moments(mean, covariance / (num_images - 1), num_images)


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


_KINDS = ("dinov2", "transformers")
_FORMS = "inception, dinov2:FOLDER_OR_HUB_ID, transformers:FOLDER_OR_HUB_ID or package.module:factory"


def open_features(features: str, weights: Path | None, device: torch.device) -> FeatureNetwork:
    """Opens the network that a name stands for.

    Args:
        features: `inception`; `dinov2:` or `transformers:` with a local folder or an id on the Hub; or
            `package.module:factory`, a callable without arguments that returns a module as FeatureNetwork has it. That
            module is imported, which runs its code.
        weights: The weights of Inception; the others know where theirs are.
        device: Where to run it.

    Raises:
        ImportError: A library is missing.
        ValueError: The name stands for nothing, or what it stands for cannot be opened.
    """
    kind, _, rest = features.partition(":")
    if features == "inception":
        return open_inception(weights, device)
    if weights is not None:
        raise ValueError(f"weights {weights} is for features inception; {features} finds its own.")
    if kind in _KINDS and rest:
        return _open_transformers(features, device)
    is_path = all(name.isidentifier() for name in [*kind.split("."), *rest.split(".")])
    nearest = difflib.get_close_matches(kind, ["inception", *_KINDS], n=1)
    if not is_path or (nearest and "." not in kind):
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"features {features} is not known; it must be {_FORMS}.{hint}")
    return _open_factory(features, kind, rest, device)


class _TransformersFeatures(nn.Module):
    """A vision model and its image processor: uint8 images (number, 3, height, width) to its image embedding.

    Args:
        name: A local folder or an id on the Hub.
        sees_borders: Resize the whole image to what the processor would crop out of the middle of a larger one.
    """

    def __init__(self, name: str, *, sees_borders: bool) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        self.processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        if sees_borders and getattr(self.processor, "do_center_crop", False):
            size = self.processor.to_dict()["crop_size"]
            self.processor = AutoImageProcessor.from_pretrained(
                name, trust_remote_code=False, size=size, do_center_crop=False
            )
        self.model, loaded = AutoModel.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        missing = sorted(loaded["missing_keys"])
        # Many checkpoints come without the pooling layer, which then has random weights.
        self.has_pooler = not any(key.startswith("pooler.") for key in missing)
        if others := [key for key in missing if not key.startswith("pooler.")]:
            raise ValueError(f"it lacks weights of its own network: {', '.join(others[:3])}")
        if self.model.main_input_name != "pixel_values":
            raise ValueError(f"{type(self.model).__name__} is no model of images alone")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the pooled output, or the class token where there is none."""
        pixels = list(images.permute(0, 2, 3, 1).cpu().numpy())
        inputs = self.processor(images=pixels, input_data_format="channels_last", return_tensors="pt")
        outputs = self.model(inputs["pixel_values"].to(images.device))
        pooled = getattr(outputs, "pooler_output", None) if self.has_pooler else None
        embedding: torch.Tensor = outputs.last_hidden_state[:, 0] if pooled is None else pooled
        return embedding.flatten(1)


def _open_transformers(features: str, device: torch.device) -> FeatureNetwork:
    """Opens a vision model of transformers with the preprocessing that it was published with.

    But for `dinov2`, whose processor would resize to 256 pixels and cut a border of 16 off, 23 % of the image: the code
    of Stein et al. 2023 resizes to 224 pixels, and so does this.
    """
    import transformers

    kind, _, name = features.partition(":")
    try:
        module = _TransformersFeatures(name, sees_borders=kind == "dinov2")
    except Exception as error:  # transformers, the Hub and safetensors raise many types
        raise ValueError(
            f"features {features} cannot be opened ({str(error).splitlines()[0]}); give a folder or an id on the Hub "
            "of a vision model with safetensors weights and a preprocessor_config.json."
        ) from error
    model_type = str(module.model.config.model_type)
    if kind == "dinov2" and not model_type.startswith("dinov2"):
        raise ValueError(f"features {features} is a model of type {model_type}; say transformers:{name}.")
    processor = f"{type(module.processor).__name__} {module.processor.to_json_string()}"
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    weights = digest_of(module.state_dict())
    return FeatureNetwork(
        name=features,
        description=f"{type(module.model).__name__} {name}, weights sha256 {weights[:12]}, {_resize(module)}; "
        f"{versions}",
        digest=digest_of({"weights": weights, "processor": processor, "type": model_type, "versions": versions}),
        module=module.eval().requires_grad_(False).to(device),
        device=device,
    )


def _resize(module: _TransformersFeatures) -> str:
    """Says what a processor does to the size of images."""
    settings = module.processor.to_dict()
    keys = ("size", "crop_size", "resample") if settings.get("do_center_crop") else ("size", "resample")
    named = {key: settings[key] for key in keys if settings.get(key) is not None}
    return f"{type(module.processor).__name__} with " + ", ".join(f"{key} {value}" for key, value in named.items())


def _open_factory(features: str, module_name: str, attribute: str, device: torch.device) -> FeatureNetwork:
    """Opens the module that a callable returns."""
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features {features} cannot be imported ({error}); it must be {_FORMS}.") from error
    module = factory() if callable(factory) else None
    if not isinstance(module, nn.Module):
        raise ValueError(f"features {features} must be a callable that returns a torch.nn.Module.")
    # The weights alone do not tell how the module resizes and normalises, so its source counts too.
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
