"""Opens a data set by its name or path, whatever it is, decoded once to a memory-mapped cache."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ddpm_hf.config import DataConfig
from ddpm_hf.data.arrays import open_array
from ddpm_hf.data.cache import allowed_bad, open_cache
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.files import TAR_SUFFIXES, ZIP_SUFFIXES, open_folder, open_tar, open_zip
from ddpm_hf.data.image_set import ImageSet
from ddpm_hf.data.source import MAX_CLASSES, NO_LABEL, Source, refuse_settings, stand_in
from ddpm_hf.data.streaming import ImageStream
from ddpm_hf.data.tables import is_table, open_table

logger = logging.getLogger(__name__)

_FILES = ".parquet, .arrow, .zip, .tar, .npz or .npy file"


def open_images(config: DataConfig, *, with_labels: bool, split: str | None = None) -> ImageSet:
    """Opens one split of a data set, decoding it unless that was done before.

    Args:
        config: Where the images are and how to prepare them.
        with_labels: Whether labels are needed.
        split: Which split; None takes data.split.

    Returns:
        All images of the split.

    Raises:
        DataError: If there are no images, or one cannot be read or batched, or labels are needed and missing.
    """
    source = find_source(config, split or config.split)
    if isinstance(source, Source) and split not in (None, config.split):
        source = replace(source, left_out=())  # of the whole folder, and said for the split of the settings
    if with_labels:
        _check_labels(source, config.source)
    if isinstance(source, ImageSet):
        return source
    return open_cache(source, config, max_bad=allowed_bad(source, config))


def open_sets(
    config: DataConfig, *, with_labels: bool, seed: int, rank: int, num_processes: int, device: torch.device
) -> tuple[ImageSet | ImageStream, ImageSet]:
    """Opens the images to train on and those held out: another split, or a fraction chosen by the seed.

    Args:
        config: Where the images are and how to prepare them.
        with_labels: Whether labels are needed.
        seed: The seed of the run.
        rank: Which process this is; only a stream differs between them.
        num_processes: How many there are.
        device: Where the samples of a stream are needed.

    Raises:
        DataError: As `open_images`, or if the two do not go together, or there is only one image to train on.
    """
    training: ImageSet | ImageStream
    if config.streaming:
        training = ImageStream(
            config, with_labels=with_labels, seed=seed, rank=rank, num_processes=num_processes, device=device
        )
        held_out = ImageSet(np.zeros((1, *training.image_shape), np.uint8), None, None, np.zeros(0, np.int64))
    else:
        training, held_out = open_images(config, with_labels=with_labels).split(config.validation_fraction, seed)
    if config.validation_split is not None:
        held_out = open_images(config, with_labels=with_labels, split=config.validation_split)
        _check_same_kind(training, held_out, config, with_labels=with_labels)
        if isinstance(training, ImageSet) and rank == 0:
            _tell_missing_classes(training, held_out, config)
    if isinstance(training, ImageSet) and len(training) == 1:
        raise DataError(
            f"{config.source} has one image to train on, which a network can only learn by heart; give at least two."
        )
    return training, held_out


def find_source(config: DataConfig, split: str) -> Source | ImageSet:
    """Finds a data set without decoding it; arrays that are ready to be used are opened.

    Raises:
        DataError: If there is none, or it has no such split.
    """
    path = Path(config.source).expanduser()
    name = path.name.lower()
    if not path.exists():
        return open_table(config, split)
    refuse_settings(config, ("subset", "revision"), f"{path}, which is no data set of the Hub")
    if (path.is_dir() and is_table(path)) or name.endswith((".parquet", ".arrow")):
        return open_table(config, split)
    if name.endswith((".npz", ".npy")):
        return open_array(path, config, split)
    for opens, is_its_kind in (
        (open_folder, path.is_dir()),
        (open_zip, name.endswith(ZIP_SUFFIXES)),
        (open_tar, name.endswith(TAR_SUFFIXES)),
    ):
        if is_its_kind:
            refuse_settings(config, ("image_column", "label_column"), f"{path}, which has folders instead of columns")
            return opens(path, split)
    raise DataError(f"data.source {path} is a {path.suffix or 'nameless'} file; give a {_FILES}, or a folder.")


def _check_labels(source: Source | ImageSet, name: str) -> None:
    """Refuses labels that no class-conditional network can be trained on."""
    if source.labels is not None and source.class_names is None:
        raise DataError(
            f"{name} has label {source.labels.max()}, but classes are numbered from 0 and there are at most "
            f"{MAX_CLASSES:,}; name the column with the classes with data.label_column."
        )
    if source.labels is None or source.class_names is None:
        raise DataError(
            f"{name} has no labels, but the network is class-conditional; name their column with data.label_column, "
            "give each class a folder, or set model.class_conditional to false."
        )
    num_classes = len(source.class_names)
    is_bad = (source.labels < 0) | (source.labels >= num_classes)
    if is_bad.any():
        row = int(np.argmax(is_bad))
        found = "no label" if source.labels[row] == NO_LABEL else f"label {source.labels[row]}"
        image = next(iter(source.read([row]))).name if isinstance(source, Source) else f"image {row} of {name}"
        raise DataError(f"{image} has {found}; every image needs one from 0 to {num_classes - 1}.")


def _check_same_kind(
    training: ImageSet | ImageStream, held_out: ImageSet, config: DataConfig, *, with_labels: bool
) -> None:
    """Refuses a validation split of other images or classes than those trained on."""
    if training.image_shape != held_out.image_shape:
        raise DataError(
            f"split {config.validation_split!r} of {config.source} has images of {_shape(held_out)} where "
            f"{config.split!r} has {_shape(training)}; set data.resolution and data.num_channels."
        )
    known, found = training.class_names or (), held_out.class_names or ()
    if with_labels and found != known[: len(found)]:  # numbers without names may end earlier in the smaller set
        raise DataError(
            f"split {config.validation_split!r} of {config.source} has the classes {', '.join(found)} where "
            f"{config.split!r} has {', '.join(known)}; give both the same."
        )


def _tell_missing_classes(training: ImageSet, held_out: ImageSet, config: DataConfig) -> None:
    """Warns of a part held out that lacks classes, as the end of a folder does, which is sorted by them."""
    if training.labels is None or held_out.labels is None or "[" not in (config.validation_split or ""):
        return
    trained_on = np.unique(training.labels[training.indices])
    missing = np.setdiff1d(trained_on, held_out.labels[held_out.indices])
    if len(missing):
        logger.warning(
            "The held-out images, split %r of %s, lack %d of the %d classes that are trained on, perhaps since the "
            "images are sorted by class; data.validation_fraction holds out some of everywhere.",
            config.validation_split, config.source, len(missing), len(trained_on),
        )  # fmt: skip


def describe_sets(training: ImageSet | ImageStream, held_out: ImageSet) -> str:
    """Says in a line what is trained on, and how many images stand in for others."""
    number = "streamed" if isinstance(training, ImageStream) else f"{len(training):,}"
    num_bad = held_out.num_bad + (0 if isinstance(training, ImageStream) else training.num_bad)
    note = f" ({stand_in(num_bad)})" if num_bad else ""
    return f"{number} training and {len(held_out):,} held-out images of {_shape(training)}{note}"


def _shape(images: ImageSet | ImageStream) -> str:
    """Says how large images are."""
    return "x".join(map(str, images.image_shape))
