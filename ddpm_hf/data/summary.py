"""The summary of a dataset that `ddpm-hf data` prints: its images, and the first samples of a run."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_hf.config import ConfigError, DataConfig
from ddpm_hf.data.augmentation import Augmentation
from ddpm_hf.data.cache import open_cache, read_meta
from ddpm_hf.data.decode import DataError
from ddpm_hf.data.folders import Source
from ddpm_hf.data.image_set import ImageSet
from ddpm_hf.data.loader import ImageLoader
from ddpm_hf.data.sources import find_source
from ddpm_hf.data.splits import check_labels, open_sets, warn_of_empty_classes
from ddpm_hf.data.streaming import ImageStream
from ddpm_hf.files import format_bytes, format_count

_MAX_LISTED = 20


@dataclass(frozen=True)
class Summary:
    """Result of `summarize`.

    Args:
        lines: Lines to print.
        samples: The first samples of a run as the network sees them, uint8 (number, height, width, channels).
        problem: Why training would refuse the data; None if it would not.
    """

    lines: list[str]
    samples: NDArray[np.uint8]
    problem: str | None


def summarize(config: DataConfig, *, with_labels: bool, seed: int, num_samples: int) -> Summary:
    """Open a dataset as training would, and describe it.

    Args:
        config: The dataset and its preprocessing.
        with_labels: Whether the network needs labels.
        seed: The seed of the run, which decides order and augmentation.
        num_samples: Number of samples to return.

    Raises:
        DataError: The dataset cannot be opened at all.
    """
    cpu = torch.device("cpu")
    if config.streaming:
        stream, _ = open_sets(config, with_labels=with_labels, seed=seed, device=cpu)
        assert isinstance(stream, ImageStream)
        facts = [("source", f"{config.source}, streamed: images are not counted or decoded in advance")]
        samples, _ = stream.samples(0, num_samples)
        stream.close()
        samples, problem = _augment(samples, config, seed, facts)
        return Summary(_aligned(facts), _as_uint8(samples), problem)
    source = find_source(config, config.split)
    problem = None
    if isinstance(source, ImageSet):
        images, facts = source, _facts_of_array(source, config)
    else:
        images = open_cache(source, config, max_bad=source.num_images)
        facts = list(_facts_of_cache(source, config, images))
        try:
            open_cache(source, config)
        except DataError as error:
            problem = str(error)
    facts.append(("classes", _classes(images)))
    shown = images
    if problem is None:
        try:
            if with_labels:  # as when a dataset is searched, which it is not again
                check_labels(source, config.source)
                warn_of_empty_classes(source, config.source)
            training, validation = open_sets(
                config, with_labels=with_labels, seed=seed, device=cpu, locations=(images.location, None)
            )
            assert isinstance(training, ImageSet)
            shown = training
            num_bad = training.num_bad + validation.num_bad
            note = f", {format_count(num_bad, 'unreadable image')} replaced" if num_bad else ""
            facts.append(
                ("training", f"{format_count(len(training), 'image')}, {len(validation):,} for validation{note}")
            )
        except DataError as error:
            problem = str(error)
    samples, augmentation_problem = _augment(
        ImageLoader(shown, config, seed, cpu).samples(0, num_samples)[0], config, seed, facts
    )
    return Summary(_aligned(facts), _as_uint8(samples), problem or augmentation_problem)


def _augment(
    samples: torch.Tensor, config: DataConfig, seed: int, facts: list[tuple[str, str]]
) -> tuple[torch.Tensor, str | None]:
    """Augment the first samples of a run as training would and add a fact; also return why training would refuse to."""
    if config.augmentation == 0:
        return samples, None
    channels, height, width = samples.shape[1:]
    try:
        augmentation = Augmentation(config, (channels, height, width), seed)
    except ConfigError as error:
        return samples, str(error)
    names = ", ".join(name for name in augmentation.names if name != "xflip")
    transforms = [f"{names} with probability {config.augmentation:g}"] if names else []
    transforms += ["xflip with 0.5"] if "xflip" in augmentation.names else []
    facts.append(("augmented", "; ".join(transforms)))
    return augmentation(samples, 0)[0], None


def _facts_of_cache(source: Source, config: DataConfig, images: ImageSet) -> Iterator[tuple[str, str]]:
    """Yield what the metadata of the cache say about the images."""
    assert images.location is not None
    folder = Path(images.location["cache"])
    meta = read_meta(folder)
    assert meta is not None
    yield "source", f"{source.name} ({source.kind}, split {config.split})"
    if source.layout:
        yield "layout", source.layout
    yield "images", f"{source.num_images:,}"
    if meta["num_sizes"] == 1:
        (width, height, _), *_ = meta["sizes"]
        yield "sizes", f"all {width}x{height}"
    else:
        frequent = ", ".join(f"{width}x{height} ({count:,})" for width, height, count in meta["sizes"][:5])
        smallest, largest = ("x".join(map(str, meta[name])) for name in ("smallest", "largest"))
        yield "sizes", f"{meta['num_sizes']:,} from {smallest} to {largest}, the most frequent {frequent}"
    yield "modes", ", ".join(f"{mode} ({count:,})" for mode, count in meta["modes"].items())
    if meta["num_animated"]:
        yield "animated", f"{format_count(meta['num_animated'], 'image')} with several frames (only the first is used)"
    if source.ignored_files:
        names = ", ".join(source.ignored_files[:3]) + (" ..." if len(source.ignored_files) > 3 else "")
        number = format_count(len(source.ignored_files), "file")
        yield "ignored", f"{number} (not an image, hidden, a link, in no split or table): {names}"
    bad = list(meta["bad"].values())
    yield "bad", f"{len(bad):,} cannot be read" if bad else "none"
    for reason in bad[:_MAX_LISTED]:
        yield "", reason
    if len(bad) > _MAX_LISTED:
        yield "", f"and {len(bad) - _MAX_LISTED:,} more"
    yield "pixels", _values(images, config)
    yield _shape(images, config)
    yield "cache", f"{format_bytes(sum(meta['files'].values()))} in {folder}"


def _facts_of_array(images: ImageSet, config: DataConfig) -> list[tuple[str, str]]:
    """Return the facts of a .npy file that is used without a cache."""
    assert isinstance(images.images, np.ndarray)
    number, channels, height, width = images.images.shape
    return [
        ("source", f"{config.source} (array, split {config.split}), used without a cache"),
        ("images", f"{number:,}"),
        ("sizes", f"all {width}x{height}"),
        ("modes", f"{images.images.dtype} with {channels} channels"),
        ("pixels", _values(images, config)),
        _shape(images, config),
    ]


def _shape(images: ImageSet, config: DataConfig) -> tuple[str, str]:
    """Return what sees the images: the network, or the VAE of data.vae."""
    shape = "x".join(map(str, images.image_shape))
    return "network" if config.vae is None else "encoder", f"sees {shape} (channels, height, width)"


def _values(images: ImageSet, config: DataConfig) -> str:
    """Return the smallest and the largest value, and the values that become -1 and 1."""
    assert images.location is not None
    low, high = images.location["pixel_range"]
    values = f"values from {low:.9g} to {high:.9g}"
    if images.value_range is None:
        return f"{values} of 0 to {np.iinfo(images.images.dtype.name).max}"
    found = ", as found in the data" if config.value_range == "auto" else ""
    return f"{values}; {images.value_range[0]:.9g} becomes -1 and {images.value_range[1]:.9g} becomes 1{found}"


def _classes(images: ImageSet) -> str:
    """Return the classes and the number of images in each."""
    if images.labels is None or images.class_names is None:
        return "none"
    labels, names = images.labels[images.rows], images.class_names
    listed = [" ".join(name.split()) for name in names[:_MAX_LISTED]]  # a name may contain line breaks
    counts = [f"{name} ({int((labels == number).sum()):,})" for number, name in enumerate(listed)]
    more = f", and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    num_without = int(((labels < 0) | (labels >= len(names))).sum())
    without = f"; {format_count(num_without, 'image')} without" if num_without else ""
    return f"{len(names)}: {', '.join(counts)}{more}{without}"


def _as_uint8(samples: torch.Tensor) -> NDArray[np.uint8]:
    """Convert samples of the network's range to 8-bit pictures, channels last."""
    pixels = ((samples + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()


def _aligned(facts: list[tuple[str, str]]) -> list[str]:
    return [f"{name:<10}{value}" for name, value in facts]
