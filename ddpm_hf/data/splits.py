"""Open the images of a split, or the training and the validation set of a run."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ddpm_hf.config import EVAL_DATASET, TRAIN_DATASET, DataConfig
from ddpm_hf.data.arrays import map_array
from ddpm_hf.data.cache import map_cache, open_cache
from ddpm_hf.data.decode import DataError, warn_of_values
from ddpm_hf.data.folders import Source
from ddpm_hf.data.image_set import ImageSet
from ddpm_hf.data.labels import MAX_CLASSES, ClassOrder, label_error
from ddpm_hf.data.memory import find_in_memory
from ddpm_hf.data.sources import find_source
from ddpm_hf.data.streaming import ImageStream
from ddpm_hf.files import format_count

logger = logging.getLogger(__name__)

Location = dict[str, Any]
"""`ImageSet.location`: where the arrays of an image set are, as JSON."""


def open_images(
    config: DataConfig,
    *,
    with_labels: bool,
    split: str | None = None,
    location: Location | None = None,
    class_order: ClassOrder = "numbers",
    known: tuple[str, ...] | None = None,
    dataset: Any = None,
) -> ImageSet:
    """Open one split of a dataset; decode it first if necessary.

    Args:
        config: The dataset and its preprocessing.
        with_labels: Whether labels are needed.
        split: The split, or a part of it; None takes `data.split`.
        location: Where another process has already opened the same split. The dataset is then not searched again,
            unless this machine cannot read the arrays.
        class_order: As in `find_source`.
        known: As in `find_source`.
        dataset: The images of the split, if they are in memory.

    Returns:
        All images of the split.

    Raises:
        DataError: There are no images, an image does not fit the settings, labels are needed and missing, or the images
            differ from those at `location`.
    """
    found = None
    if location is not None and "cache" in location:
        found = map_cache(location)
    elif location is not None and "array" in location:
        found = map_array(location)
    if found is not None:
        return found
    name = config.source if dataset is None else in_words(split or config.source)
    if dataset is not None:
        source = find_in_memory(dataset, name, config, with_labels=with_labels, known=known)
    else:
        source = find_source(config, split or config.split, class_order, known)
    if isinstance(source, Source) and split not in (None, config.split):
        source = replace(source, ignored_files=())  # logged for the training split only
    if with_labels:
        check_labels(source, name)
        if split in (None, config.split) and known is None:
            warn_of_empty_classes(source, name)
    images = source if isinstance(source, ImageSet) else open_cache(source, config)
    if images.location is not None:
        warn_of_values(name, images.value_range, images.location["pixel_range"], images.images.dtype)
    if location is not None and images.digest != location["digest"]:
        raise DataError(f"{name} has other images or labels here than on rank 0; use the same data on both.")
    return images


def in_words(source: str) -> str:
    """Return how messages refer to data.source or data.validation_split: as "train_dataset" if it is in memory."""
    return source.removeprefix("memory:") if source in (TRAIN_DATASET, EVAL_DATASET) else source


def open_sets(
    config: DataConfig,
    *,
    with_labels: bool,
    seed: int,
    rank: int = 0,
    num_processes: int = 1,
    device: torch.device,
    locations: Sequence[Location | None] = (None, None),
    class_order: ClassOrder = "numbers",
    known: tuple[str, ...] | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
) -> tuple[ImageSet | ImageStream, ImageSet]:
    """Open the training and the validation set: two splits, or one split divided at random by the seed.

    Args:
        config: The dataset and its preprocessing.
        with_labels: Whether labels are needed.
        seed: The seed of the run.
        rank: Rank of this process; only a stream differs between processes.
        num_processes: Number of processes.
        device: Device of the samples of a stream.
        locations: `locations_of` the sets that rank 0 has opened, so that other ranks do not search the dataset again.
        class_order: As in `find_source`.
        known: As in `find_source`.
        train_dataset: The images that data.source stands for, if they are in memory.
        eval_dataset: The images that data.validation_split stands for, if they are in memory.

    Returns:
        The training set, or this process's stream of it, and the validation set, which may be empty.

    Raises:
        DataError: As `open_images`; or the two sets do not match; or there is a single training image.
    """
    training: ImageSet | ImageStream
    if config.streaming:
        training = ImageStream(
            config,
            with_labels=with_labels,
            seed=seed,
            rank=rank,
            num_processes=num_processes,
            device=device,
            class_order=class_order,
        )
        validation = ImageSet(np.zeros((1, *training.image_shape), np.uint8), None, None, np.zeros(0, np.int64))
    else:
        images = open_images(
            config,
            with_labels=with_labels,
            location=locations[0],
            class_order=class_order,
            known=known,
            dataset=train_dataset,
        )
        training, validation = images.split(config.validation_fraction, seed)
    if config.value_range == "auto" and training.value_range is not None:
        config = replace(config, value_range=list(training.value_range))
    if config.validation_split is not None:
        validation = open_images(
            config,
            with_labels=with_labels,
            split=config.validation_split,
            location=locations[1],
            class_order=class_order,
            known=training.class_names if with_labels else None,
            dataset=eval_dataset,
        )
        _check_same_kind(training, validation, config, with_labels=with_labels)
        if isinstance(training, ImageSet) and rank == 0:
            _warn_of_missing_classes(training, validation, config)
    if isinstance(training, ImageSet) and len(training) == 1:
        raise DataError(f"{in_words(config.source)} contains a single training image; at least two are required.")
    return training, validation


def locations_of(training: ImageSet | ImageStream, validation: ImageSet) -> list[Location | None]:
    """Return the argument `locations` with which `open_sets` opens the same sets in another process."""
    return [None if isinstance(training, ImageStream) else training.location, validation.location]


def describe_sets(training: ImageSet | ImageStream, validation: ImageSet) -> str:
    """Return one line with the number of images, their size, and the number of replacements."""
    number = "streamed" if isinstance(training, ImageStream) else f"{len(training):,}"
    num_bad = validation.num_bad + (0 if isinstance(training, ImageStream) else training.num_bad)
    note = f" ({format_count(num_bad, 'unreadable image')} replaced)" if num_bad else ""
    return f"{number} training and {len(validation):,} validation images of {_shape(training)}{note}"


def check_labels(source: Source | ImageSet, name: str) -> None:
    """Raise a DataError if a class-conditional network cannot be trained with the labels."""
    if source.labels is not None and source.class_names is None:
        raise DataError(
            f"{name} has more than {MAX_CLASSES:,} different labels, such as {source.labels.max()}, which cannot be "
            "classes; set data.label_column to the column of the classes."
        )
    if isinstance(source, Source) and source.labels_problem is not None:
        raise DataError(source.labels_problem)
    if isinstance(source, Source) and source.labels_doubt:
        logger.warning("%s", source.labels_doubt)
    if source.labels is None or source.class_names is None:
        is_in_memory = name in map(in_words, (TRAIN_DATASET, EVAL_DATASET))
        raise DataError(
            f"{name} has no labels, but the network is class-conditional; "
            f"{'pass pairs (image, label)' if is_in_memory else 'use one folder per class'}, set data.label_column, or "
            "set model.class_conditional to false."
        )
    num_classes = len(source.class_names)
    if num_classes == 1:
        logger.warning(
            "%s has a single class, %s, so that model.class_conditional has no effect; check the folders and "
            "data.layout, or set model.class_conditional to false.",
            name,
            source.class_names[0],
        )
    is_bad = (source.labels < 0) | (source.labels >= num_classes)
    if is_bad.any():
        row = int(np.argmax(is_bad))
        image = next(iter(source.read([row]))).name if isinstance(source, Source) else f"image {row} of {name}"
        raise label_error(image, int(source.labels[row]), num_classes)


def warn_of_empty_classes(training: Source | ImageSet, name: str) -> None:
    """Warn of classes without a training image, which may be a misspelled folder of another split."""
    if training.labels is None or training.class_names is None:
        return
    empty = [
        training.class_names[number]
        for number in sorted({*range(len(training.class_names))} - {*training.labels.tolist()})
    ]
    if empty:
        shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        logger.warning(
            "%s has no training image of the class%s %s, which cannot be learned; check its name.",
            name,
            "" if len(empty) == 1 else "es",
            shown,
        )


def _check_same_kind(
    training: ImageSet | ImageStream, validation: ImageSet, config: DataConfig, *, with_labels: bool
) -> None:
    """Raise a DataError if the validation split has other image shapes or classes than the training set."""
    if training.image_shape != validation.image_shape:
        raise DataError(
            f"{_validation_set(config)} has images of {_shape(validation)}, but {_training_set(config)} has "
            f"{_shape(training)}; set data.resolution and data.num_channels."
        )
    known, found = training.class_names or (), validation.class_names or ()
    if with_labels and found != known[: len(found)]:  # classes without names may end earlier in the smaller set
        raise DataError(
            f"{_validation_set(config)} has the classes {', '.join(found)}, but {_training_set(config)} has "
            f"{', '.join(known)}; both need the same classes."
        )


def _validation_set(config: DataConfig) -> str:
    split = config.validation_split
    return in_words(split) if split == EVAL_DATASET else f"split {split!r} of {config.source}"


def _training_set(config: DataConfig) -> str:
    return repr(config.split) if config.source != TRAIN_DATASET else in_words(config.source)


def _warn_of_missing_classes(training: ImageSet, validation: ImageSet, config: DataConfig) -> None:
    """Warn if a part of a split lacks classes, as the end of a folder does, which is sorted by class."""
    if training.labels is None or validation.labels is None or "[" not in (config.validation_split or ""):
        return
    trained_on = np.unique(training.labels[training.indices])
    missing = np.setdiff1d(trained_on, validation.labels[validation.indices])
    if len(missing):
        logger.warning(
            "The validation set, split %r of %s, lacks %d of the %d classes in the training set, probably because the "
            "images are sorted by class; data.validation_fraction selects images at random.",
            config.validation_split, config.source, len(missing), len(trained_on),
        )  # fmt: skip


def _shape(images: ImageSet | ImageStream) -> str:
    return "x".join(map(str, images.image_shape))
