"""What would be read, in lines and in pixels: for `ddpm-hf data`."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_hf.config import DataConfig
from ddpm_hf.data.cache import allowed_bad, cache_key, cache_root, open_cache, read_meta
from ddpm_hf.data.decode import DataError
from ddpm_hf.data.image_set import ImageSet
from ddpm_hf.data.loader import ImageFeed, ImageStream, open_sets
from ddpm_hf.data.sources import Source, animated_sentence, counted, find_source, left_out_reason, stand_in
from ddpm_hf.files import gib

_NUM_SHOWN = 20


@dataclass(frozen=True)
class Summary:
    """What `summarize` found.

    Args:
        lines: To be printed.
        samples: The first samples of a run as the network sees them, uint8 (number, height, width, channels).
        problem: Why training would refuse the data, in a sentence; None if it would not.
    """

    lines: list[str]
    samples: NDArray[np.uint8]
    problem: str | None


def summarize(config: DataConfig, *, with_labels: bool, seed: int, num_samples: int) -> Summary:
    """Reads a data set as training would, decoding it to its cache, and says what it holds.

    Args:
        config: Where the images are and how to prepare them.
        with_labels: Whether the network needs labels.
        seed: The seed of the run, which decides order and augmentation.
        num_samples: Samples to show.

    Raises:
        DataError: If it cannot be read at all.
    """
    cpu = torch.device("cpu")
    if config.streaming:
        stream, _ = open_sets(config, with_labels=with_labels, seed=seed, rank=0, num_processes=1, device=cpu)
        assert isinstance(stream, ImageStream)
        lines = _aligned([("source", f"{config.source}, streamed: nothing is counted or decoded before")])
        return Summary(lines, _as_shown(stream.samples(0, num_samples)[0]), None)
    source = find_source(config, config.split)
    if isinstance(source, ImageSet):
        images, facts, problem = source, _facts_of_array(source, config), None
    else:
        images = open_cache(source, config, max_bad=source.num_images)
        facts = list(_facts_of_cache(source, config, images))
        problem = _problem(source, config)
    facts.append(("classes", _classes(images)))
    shown = images
    if problem is None:
        try:
            training, held_out = open_sets(
                config, with_labels=with_labels, seed=seed, rank=0, num_processes=1, device=cpu
            )
            assert isinstance(training, ImageSet)
            shown = training
            num_bad = training.num_bad + held_out.num_bad
            note = f", {stand_in(num_bad)}" if num_bad else ""
            facts.append(("training", f"{counted(len(training), 'image')}, {len(held_out):,} held out{note}"))
        except DataError as error:
            problem = str(error)
    samples, _ = ImageFeed(shown, config, seed, cpu).samples(0, num_samples)
    return Summary(_aligned(facts), _as_shown(samples), problem)


def _facts_of_cache(source: Source, config: DataConfig, images: ImageSet) -> Iterator[tuple[str, str]]:
    """Yields what the cache knows of its images."""
    folder = cache_root(config) / cache_key(source, config)
    meta = read_meta(folder)
    assert meta is not None
    yield "source", f"{source.name} ({source.kind}, split {config.split})"
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
        yield "animated", animated_sentence(meta["num_animated"])
    if source.left_out:
        number = len(source.left_out)
        yield "left out", f"{counted(number, 'file')}, {left_out_reason(number)}: {_some(source.left_out)}"
    bad = list(meta["bad"].values())
    yield "bad", f"{len(bad):,} cannot be read" if bad else "none"
    for reason in bad[:_NUM_SHOWN]:
        yield "", reason
    if len(bad) > _NUM_SHOWN:
        yield "", f"and {len(bad) - _NUM_SHOWN:,} more"
    low, high = meta["pixel_range"]
    yield "pixels", f"values from {low} to {high} of 0 to {np.iinfo(meta['dtype']).max}"
    yield "network", f"sees {'x'.join(map(str, images.image_shape))} (channels, height, width)"
    yield "cache", f"{gib(sum(meta['files'].values()))} in {folder}"


def _facts_of_array(images: ImageSet, config: DataConfig) -> list[tuple[str, str]]:
    """Returns what an array that is read where it lies tells of itself."""
    assert isinstance(images.images, np.ndarray)
    number, channels, height, width = images.images.shape
    lowest = min(int(images.images[row].min()) for row in range(number))
    highest = max(int(images.images[row].max()) for row in range(number))
    return [
        ("source", f"{config.source} (array, split {config.split}), read where it lies"),
        ("images", f"{number:,}"),
        ("sizes", f"all {width}x{height}"),
        ("modes", f"{images.images.dtype} with {channels} channels"),
        ("pixels", f"values from {lowest} to {highest} of 0 to {np.iinfo(images.images.dtype).max}"),
        ("network", f"sees {'x'.join(map(str, images.image_shape))} (channels, height, width)"),
    ]


def _problem(source: Source, config: DataConfig) -> str | None:
    """Returns what training would say of the bad images."""
    try:
        open_cache(source, config, max_bad=allowed_bad(source, config))
    except DataError as error:
        return str(error)
    return None


def _classes(images: ImageSet) -> str:
    """Says which classes there are, and how many images of each."""
    if images.labels is None or images.class_names is None:
        return "none"
    labels, names = images.labels[images.rows], images.class_names
    # A name may hold line breaks.
    shown = [" ".join(name.split()) for name in names[:_NUM_SHOWN]]
    counts = [f"{name} ({int((labels == number).sum()):,})" for number, name in enumerate(shown)]
    more = f", and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    num_without = int(((labels < 0) | (labels >= len(names))).sum())
    without = f"; {counted(num_without, 'image')} without" if num_without else ""
    return f"{len(names)}: {', '.join(counts)}{more}{without}"


def _some(names: tuple[str, ...]) -> str:
    """Names the first few."""
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _as_shown(samples: torch.Tensor) -> NDArray[np.uint8]:
    """Returns samples of the network's range as pictures."""
    pixels = ((samples + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()


def _aligned(facts: list[tuple[str, str]]) -> list[str]:
    """Puts names and values in two columns."""
    return [f"{name:<10}{value}" for name, value in facts]
