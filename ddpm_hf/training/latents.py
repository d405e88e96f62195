"""The latents of a run's images: encoded once by all processes, sampled again in every epoch.

A VAE gives each image the mean and the standard deviation of its latent. They are cached beside the decoded
images, in a folder named by a key of the images and the VAE:

    moments.bin   float32 (images, 1 or 2 with flipped ones, 1 or 2 with deviations, channels, height, width)
    meta.json     shape, mean and standard deviation of each channel, size of the file
"""

import hashlib
import json
import math
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, ModelMixin
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_hf import distributed
from ddpm_hf.config import ConfigError, DataConfig, RunConfig, log_warning
from ddpm_hf.data import DataError, ImageSet, SampleOrder, normalize
from ddpm_hf.data.cache import cache_lease, cache_root, read_meta
from ddpm_hf.data.loader import copy_to_device, to_device
from ddpm_hf.diffusion import latents
from ddpm_hf.files import MODEL_CONFIG, format_bytes, replace_folder, sync, write_text
from ddpm_hf.model_folder import find_latest
from ddpm_hf.models import LatentStatistics, build_vae, load_vae, vae_config, vae_sha256
from ddpm_hf.rng import normal_by_pair, normal_by_position
from ddpm_hf.training.run_dir import RunFolder

_VERSION = 1
_MAX_BATCH_SIZE = 64
"""Of small images that are encoded at once; latents.MAX_PIXELS limits large ones."""
_ROWS_PER_SUM = 256
_USUAL_DEVIATIONS = (0.5, 2.0)
_MOMENTS = "moments.bin"


@dataclass(frozen=True)
class Autoencoder:
    """The VAE of a run, the same on all ranks.

    Args:
        vae: The network: frozen, float32.
        setting: The setting that names it.
        sha256: Digest of its weights and its configuration.
        is_kept: Whether it was read from the run folder.
    """

    vae: ModelMixin
    setting: Literal["data.vae", "model.vae"]
    sha256: str
    is_kept: bool

    def shape_of_samples(self, data_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return channels, height and width of the latents of images, or of data that are latents.

        Raises:
            ConfigError: The VAE does not encode such images, or decode such latents.
        """
        channels, height, width = data_shape
        if self.setting == "model.vae":
            if (needed := latents.latent_channels(self.vae)) != channels:
                raise ConfigError(
                    f"model.vae decodes latents of {needed} channels, but those of data.source have {channels}; set "
                    "model.vae to the VAE that encoded them."
                )
            return data_shape
        if (needed := int(self.vae.config["in_channels"])) != channels:
            raise ConfigError(
                f"data.vae encodes images of {needed} channels, but those of this run have {channels}; set "
                f"data.num_channels to {needed}, or choose another VAE."
            )
        factor = latents.downsampling_factor(self.vae)
        if height % factor or width % factor:
            raise ConfigError(
                f"data.vae divides images by {factor}, but {height}x{width} is not a multiple of {factor}; set "
                "data.resolution to one."
            )
        return latents.latent_channels(self.vae), height // factor, width // factor


def describe_latents(config: RunConfig, image_shape: tuple[int, int, int]) -> str:
    """Return what the network sees of data with data.vae or model.vae.

    Raises:
        ConfigError: The VAE cannot be loaded, or does not fit the data.
    """
    autoencoder = open_autoencoder(config, None, torch.device("cpu"))
    assert autoencoder is not None
    shape = "x".join(map(str, autoencoder.shape_of_samples(image_shape)))
    encoded = "encoded when training starts" if config.data.vae is not None else "as given"
    kind, source = type(autoencoder.vae).__name__, config.data.vae or config.model.vae
    return f"{shape} of the {kind} {source}, {encoded}"


def open_autoencoder(config: RunConfig, folder: RunFolder | None, device: torch.device) -> Autoencoder | None:
    """Collective: load the VAE of data.vae or model.vae; rank 0 alone reads files and the Hub.

    A run that is continued uses the copy in its folder.

    Raises:
        ValueError: It cannot be loaded.
    """
    source = config.data.vae or config.model.vae
    if source is None:
        return None
    setting: Literal["data.vae", "model.vae"] = "data.vae" if config.data.vae else "model.vae"

    def read() -> tuple[ModelMixin, bool]:
        has_run = folder is not None and find_latest(folder.checkpoints)[0] is not None
        if folder is not None and has_run and (folder.vae / MODEL_CONFIG).is_file():
            return load_vae(setting, str(folder.vae), None), True
        return load_vae(setting, source, config.data.vae_revision), False

    found = distributed.on_rank_0(read)
    vae, is_kept = found or (None, False)
    facts = None if vae is None else [type(vae).__name__, vae_config(vae), vae_sha256(vae)]
    kind, settings, sha256 = distributed.broadcast_json(facts)
    if vae is None:
        vae = build_vae(kind, settings).to_empty(device="cpu")
    vae.to(device)
    distributed.broadcast_tensors(vae.state_dict().values())
    return Autoencoder(vae, setting, sha256, is_kept)


def keep_autoencoder(autoencoder: Autoencoder, folder: RunFolder) -> None:
    """Write the VAE into the run folder, unless it is from there."""
    if not autoencoder.is_kept:
        replace_folder(folder.vae, autoencoder.vae.save_pretrained)


@dataclass(frozen=True)
class LatentSet:
    """The latents of a set of images.

    Args:
        images: The images, with their labels and the rows that are used.
        moments: float32 (rows, 1 or 2 with flipped images, 1 or 2 with deviations, channels, height, width), usually
            memory-mapped.
        autoencoder: Has encoded them.
        normalization: What becomes 0 and 1 in each channel; None takes that of the VAE.
    """

    images: ImageSet
    moments: NDArray[np.float32]
    autoencoder: Autoencoder
    normalization: LatentStatistics | None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        _, _, _, channels, height, width = self.moments.shape
        return channels, height, width

    @property
    def are_random(self) -> bool:
        """Whether the VAE gives a distribution of latents."""
        return bool(self.moments.shape[2] == 2)

    @cached_property
    def statistics(self) -> latents.Statistics:
        """What becomes 0 and 1 in each channel, on the device of the VAE."""
        vae = self.autoencoder.vae
        mean, std = latents.statistics(vae, *(self.normalization or (None, None)))
        return mean.to(vae.device), std.to(vae.device)

    def states(self, moments: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Return latents as the network is trained on them.

        Args:
            moments: float32 (batch, 1 or 2, channels, height, width).
            noise: Standard normal noise that draws the latents, (batch, channels, height, width); None if they are not
                random.

        Returns:
            float32 (batch, channels, height, width).
        """
        z = moments[:, 0] if noise is None else moments[:, 0] + moments[:, 1] * noise
        return latents.normalize(z, self.statistics)

    def validation_samples(
        self, positions: NDArray[np.int64], seed: int, device: torch.device
    ) -> tuple[torch.Tensor, NDArray[np.int64] | None]:
        """Return latents of images that are not flipped, a function of seed and position, and labels if any."""
        rows = self.images.rows[positions]
        moments = to_device(self.moments[rows, 0], device)
        noise = None
        if self.are_random:
            steps = np.zeros_like(positions)
            noise = normal_by_pair(seed, "validation_latents", steps, positions, self.shape, device)
        return self.states(moments, noise), None if self.images.labels is None else self.images.labels[rows]


class LatentLoader:
    """Load the latents of any consecutive samples of a run, as `ImageLoader` loads images.

    The latent of sample n is drawn by a function of (seed, n), so that each epoch has others.

    Args:
        latents: The training set.
        config: Flips, and whether to keep the moments in device memory.
        seed: The seed of the run.
        device: Device of the samples.

    Raises:
        DataError: The moments do not fit into the memory of the device.
    """

    def __init__(self, latents: LatentSet, config: DataConfig, seed: int, device: torch.device) -> None:
        self._latents, self._seed, self._device, self._flips = latents, seed, device, config.random_flip
        self._order = SampleOrder(len(latents), seed)
        self._resident = copy_to_device(latents.moments, config, device)

    @property
    def is_resident(self) -> bool:
        """Whether all moments are in device memory."""
        return self._resident is not None

    def samples(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return samples start to stop - 1 of the run.

        Returns:
            float32 latents, (number, channels, height, width), and int64 labels if there are any.
        """
        images, rows = self._latents.images, self.numbers(start, stop)
        flips = self._order.is_mirrored(start, stop).astype(np.int64) if self._flips else np.zeros_like(rows)
        if self._resident is None:
            moments = to_device(self._latents.moments[rows, flips], self._device)
        else:
            moments = self._resident[to_device(rows, self._device), to_device(flips, self._device)]
        noise = None
        if self._latents.are_random:
            samples, shape = range(start, stop), self._latents.shape
            noise = normal_by_position(self._seed, "latents", 0, samples, shape, self._device)
        labels = None if images.labels is None else to_device(images.labels[rows], self._device)
        return self._latents.states(moments, noise), labels

    def numbers(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the rows in the dataset of samples start to stop - 1, int64 (number,)."""
        numbers: NDArray[np.int64] = self._latents.images.rows[self._order.positions(start, stop)]
        return numbers


# ------------------------------------------------------------------------------------------------------------ encoding


def encode_images(
    images: ImageSet,
    autoencoder: Autoencoder,
    config: DataConfig,
    device: torch.device,
    *,
    is_local_main_process: bool,
    training: LatentSet | None = None,
) -> LatentSet:
    """Collective: open the latents of images; encode them first if necessary, each rank a part.

    Args:
        images: All images of a split, or a part of them.
        autoencoder: Encodes them.
        config: Flips, the normalization, and the folder of the cache.
        device: Device of the VAE.
        is_local_main_process: Whether this process writes the cache of its machine.
        training: The training set, of which a validation set has the normalization.

    Raises:
        ValueError: The latents are not finite, or constant.
        OSError: The cache cannot be written.
    """
    folder = cache_root(config) / _cache_key(images, autoencoder, config)

    def is_cached() -> bool:
        return bool(distributed.reduce(read_meta(folder, _VERSION) is not None, "min"))

    if not is_cached():
        with ExitStack() as stack:
            distributed.on_rank_0(partial(_hold_lease, folder, stack))
            if not is_cached():  # another run may have encoded the images
                writes = is_local_main_process and read_meta(folder, _VERSION) is None
                _encode(images, autoencoder, config, device, folder if writes else None)
    meta = distributed.on_every_rank(lambda: _checked(read_meta(folder, _VERSION), folder, autoencoder.setting))
    normalization = (meta["mean"], meta["std"]) if config.latent_normalization == "measured" else None
    if training is not None:
        normalization = training.normalization
    found = LatentSet(images, _map_moments(folder, meta["shape"]), autoencoder, normalization)
    if training is None and normalization is None:
        _warn_of_scale(found, meta)
    return found


def _cache_key(images: ImageSet, autoencoder: Autoencoder, config: DataConfig) -> str:
    """Return the name of a cache: a digest of pixels, VAE and flips."""
    pixels = Path((images.location or {}).get("cache", "")).name  # covers how they were decoded
    key = [_VERSION, images.digest, pixels, images.image_shape, images.value_range, autoencoder.sha256]
    return hashlib.sha256(json.dumps([*key, config.random_flip]).encode()).hexdigest()[:32]


@contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the latents cannot be written to {folder.parent} ({error.strerror or error}); set data.cache_dir to "
            "another folder."
        ) from None


def _hold_lease(folder: Path, stack: ExitStack) -> None:
    with _named_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(cache_lease(folder))


@torch.no_grad()
def _encode(
    images: ImageSet, autoencoder: Autoencoder, config: DataConfig, device: torch.device, folder: Path | None
) -> None:
    """Collective: encode all images in batches, each rank every num_processes-th, and write them on some ranks.

    A batch has the same images on any number of processes. The cache is renamed when it is complete, under which name
    another process may have completed it.

    Args:
        images: The images.
        autoencoder: Encodes them.
        config: Flips.
        device: Device of the VAE.
        folder: The cache, on the ranks that write it.
    """
    rank, num_processes = distributed.rank(), distributed.world_size()
    stored, vae = images.images, autoencoder.vae
    assert isinstance(stored, np.ndarray)  # config/rules.py refuses random crops
    flips = [False, True] if config.random_flip else [False]
    num_kinds = 2 if isinstance(vae, AutoencoderKL) else 1
    shape = (len(stored), len(flips), num_kinds, *autoencoder.shape_of_samples(images.image_shape))
    _, height, width = images.image_shape
    size = min(max(latents.MAX_PIXELS // (height * width), 1), _MAX_BATCH_SIZE)

    num_bytes = 4 * math.prod(shape)

    def encode(first: int) -> NDArray[np.float32]:
        rows = np.arange(first, min(first + size, len(stored)))
        if not len(rows):
            return np.zeros((0, *shape[1:]), np.float32)
        pixels = to_device(stored[rows], device)
        moments = []
        for is_flipped in flips:
            mirrored = torch.full((len(rows),), is_flipped, device=device)
            x = normalize(pixels, mirrored, images.value_range)
            moments.append(torch.stack(latents.encode_moments(vae, x)[:num_kinds], 1))
        encoded: NDArray[np.float32] = torch.stack(moments, 1).float().cpu().numpy()
        return encoded

    bar = tqdm(total=len(stored), desc="Encoding images", unit="img", disable=None if rank == 0 else True, leave=False)
    with ExitStack() as stack:
        building = distributed.on_every_rank(lambda: folder and _start_building(folder, num_bytes, stack))
        stack.enter_context(bar)
        for start in range(0, len(stored), size * num_processes):
            moments = distributed.on_every_rank(partial(encode, start + rank * size))
            if num_processes > 1:
                moments = distributed.gather_rows(moments)
            distributed.on_every_rank(partial(_append, building, moments))
            bar.update(len(moments))
        distributed.on_every_rank(partial(_finish, building, folder, shape, images))


def _start_building(folder: Path, num_bytes: int, stack: ExitStack) -> Path:
    """Make the folder in which a cache is built, and which is removed at the end."""
    with _named_errors(folder):
        free = shutil.disk_usage(folder.parent).free
        if num_bytes > free:
            raise DataError(
                f"the latents need {format_bytes(num_bytes)}, but {folder.parent} has {format_bytes(free)} free; set "
                "data.cache_dir to another folder."
            )
        for leftover in folder.parent.glob(f"{folder.name}.building-*"):  # from processes that were killed
            shutil.rmtree(leftover, ignore_errors=True)
        building = folder.with_name(f"{folder.name}.building-{secrets.token_hex(8)}")
        stack.callback(shutil.rmtree, building, ignore_errors=True)
        building.mkdir()
    return building


def _append(building: Path | None, moments: NDArray[np.float32]) -> None:
    """Append moments to the file of a cache that this rank writes."""
    if building is not None:
        with _named_errors(building), (building / _MOMENTS).open("ab") as file:
            file.write(np.ascontiguousarray(moments).data)


def _finish(building: Path | None, folder: Path | None, shape: tuple[int, ...], images: ImageSet) -> None:
    """Write the metadata of a cache that this rank writes, and give it its name."""
    if building is None or folder is None:
        return
    mean, std = _statistics(_map_moments(building, shape), images)
    with _named_errors(folder):
        sync(building / _MOMENTS)
        size = (building / _MOMENTS).stat().st_size
        meta = {"version": _VERSION, "key": folder.name, "shape": shape, "mean": mean, "std": std}
        write_text(building / "meta.json", json.dumps(meta | {"files": {_MOMENTS: size}}, indent=1))
        if read_meta(folder, _VERSION) is None:
            shutil.rmtree(folder, ignore_errors=True)  # incomplete
            with suppress(OSError):  # another process has completed it meanwhile
                building.rename(folder)


def _map_moments(folder: Path, shape: Sequence[int]) -> NDArray[np.float32]:
    return np.memmap(folder / _MOMENTS, np.float32, "r", shape=tuple(shape))


def _statistics(moments: NDArray[np.float32], images: ImageSet) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of the latents, in float64, without unreadable images."""
    good = np.setdiff1d(np.arange(len(moments)), images.bad_rows)
    num_channels = moments.shape[3]
    first, second, count = np.zeros(num_channels), np.zeros(num_channels), 0
    for start in range(0, len(good), _ROWS_PER_SUM):
        part = moments[good[start : start + _ROWS_PER_SUM]].astype(np.float64)
        first += part[:, :, 0].sum((0, 1, 3, 4))
        second += np.square(part).sum((0, 1, 2, 4, 5))  # E[z^2] is mean^2 + std^2
        count += part[:, :, 0].size // num_channels
    mean, mean_square = first / max(count, 1), second / max(count, 1)
    return mean.tolist(), np.sqrt(np.maximum(mean_square - mean**2, 0)).tolist()


def _checked(meta: dict[str, Any] | None, folder: Path, setting: str) -> dict[str, Any]:
    """Return the metadata of a cache; raise DataError if there is none, or the latents cannot be trained on."""
    if meta is None:
        raise DataError(f"the latents in {folder} were removed meanwhile; run the same command again.")
    for channel, std in enumerate(meta["std"]):
        if not 0 < std < math.inf:
            is_constant = "constant" if std == 0 else "not finite"
            raise DataError(f"the latents of {setting} are {is_constant} in channel {channel}; check the VAE.")
    return meta


def _warn_of_scale(found: LatentSet, meta: dict[str, Any]) -> None:
    """Warn if the scaling factor of a VAE does not give latents of the scale that diffusion expects."""
    zero, one = (values.flatten().double().cpu().numpy() for values in found.statistics)
    mean_squares = (np.square(meta["std"]) + np.square(meta["mean"] - zero)) / one**2
    deviation = math.sqrt(mean_squares.mean())
    low, high = _USUAL_DEVIATIONS
    if not low <= deviation <= high:
        log_warning(
            f"the latents have a standard deviation of {deviation:.3g} with the scaling_factor of data.vae, but "
            "diffusion expects about 1; set data.latent_normalization to measured."
        )
