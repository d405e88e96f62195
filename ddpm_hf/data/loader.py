"""The order of samples, and the loaders: decoded images or a stream.

Which sample of a run comes when, and how it is mirrored and cropped: functions of (seed, epoch, index) alone.

Sample n of a run is position n mod N of epoch n // N, so batches straddle epochs and nothing is dropped. Each epoch is
a permutation of the N images; what happens to image `index` in it is drawn for that pair. Since n decides both, all of
it is a function of (seed, n) as well: of (seed, step, position in the global batch), whatever the batch size, and
however many processes share the batch.

Samples of a run, by their number, on the device and in the network's range.

Images decoded while training, for data sets that do not fit on the disk.

The files of a data set are dealt out to the processes; each reads its own in an order drawn for (seed, epoch), and
mixes the images a buffer at a time. A position is the place in the files where the buffer begins and how many of its
images were used, so a run that goes on reads that buffer again and continues with the images it would have seen.
"""

import atexit
import gc
import itertools
import logging
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_hf.config import DataConfig
from ddpm_hf.data.cache import allowed_bad, open_cache
from ddpm_hf.data.decode import (
    BadImage,
    Cell,
    DataError,
    Geometry,
    Pixels,
    Target,
    as_bits,
    cut_out,
    decode,
    normalize,
    num_threads,
    read_header,
)
from ddpm_hf.data.image_set import ImageSet, UnequalImages
from ddpm_hf.data.sources import (
    MAX_CLASSES,
    NO_LABEL,
    Source,
    as_cell,
    class_names_of,
    find_columns,
    find_source,
    is_table,
    left_out_sentence,
    load_table,
    open_folder,
    refuse_settings,
    stand_in,
)
from ddpm_hf.rng import numpy_generator

if TYPE_CHECKING:
    from datasets import IterableDataset


_Table = NDArray[Any]


class SampleOrder:
    """What each sample of a run is.

    Args:
        num_positions: Images in the set.
        seed: The seed of the run.
    """

    def __init__(self, num_positions: int, seed: int) -> None:
        self._num_positions = num_positions
        self._seed = seed
        self._tables: dict[tuple[str, int], _Table] = {}

    def positions(self, start: int, stop: int) -> NDArray[np.int64]:
        """Returns the positions in the set of samples start to stop - 1, int64 (number,)."""
        return self._look_up("order", _permutation, *self._places(start, stop))

    def is_mirrored(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Returns which of the samples start to stop - 1 are mirrored, each with a chance of one half."""
        epochs, _ = self._places(start, stop)
        return self._look_up("flip", _coins, epochs, self.positions(start, stop))

    def corners(self, start: int, stop: int) -> NDArray[np.float32]:
        """Returns where samples start to stop - 1 are cropped, uniform in [0, 1), (number, 2): vertical, horizontal."""
        epochs, _ = self._places(start, stop)
        return self._look_up("crop", _uniform_pairs, epochs, self.positions(start, stop))

    def _places(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns epoch and offset of each sample."""
        samples = np.arange(start, stop)
        return samples // self._num_positions, samples % self._num_positions

    def _look_up(
        self,
        stream: str,
        draw: Callable[[np.random.Generator, int], _Table],
        epochs: NDArray[np.int64],
        indices: NDArray[np.int64],
    ) -> _Table:
        """Returns what a table of each epoch, drawn whole, holds for its samples."""
        parts = [self._table(stream, draw, int(epoch))[indices[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(parts)

    def _table(self, stream: str, draw: Callable[[np.random.Generator, int], _Table], epoch: int) -> _Table:
        """Returns the table of one epoch, remembered while it is in use."""
        if (stream, epoch) not in self._tables:
            # Only the epoch before can still be asked for, by a batch that straddles the two.
            self._tables = {key: table for key, table in self._tables.items() if key[1] >= epoch - 1}
            generator = numpy_generator(self._seed, stream, epoch)
            self._tables[stream, epoch] = draw(generator, self._num_positions)
        return self._tables[stream, epoch]


def _permutation(generator: np.random.Generator, count: int) -> _Table:
    """Draws the order of an epoch."""
    return generator.permutation(count)


def _coins(generator: np.random.Generator, count: int) -> _Table:
    """Tosses a coin for each image."""
    return generator.integers(0, 2, count, dtype=np.bool_)


def _uniform_pairs(generator: np.random.Generator, count: int) -> _Table:
    """Draws two numbers in [0, 1) for each image."""
    return generator.random((count, 2), dtype=np.float32)


AUTO_SHARE_OF_DEVICE = 0.1
"""Share of a GPU's memory that images may take without being asked to."""


class ImageFeed:
    """Gives any consecutive samples of a run; what was asked for before makes no difference.

    Args:
        images: The training images.
        config: Whether to mirror, to crop at random, and to keep the images on the device.
        seed: The seed of the run.
        device: Where the samples are needed.

    Raises:
        DataError: If the images are to be kept on a device that has no room for them.
    """

    def __init__(self, images: ImageSet, config: DataConfig, seed: int, device: torch.device) -> None:
        self._images = images
        self._order = SampleOrder(len(images), seed)
        self._device = device
        self._flips = config.random_flip
        self._crops = config.crop == "random" and images.crop_size is not None
        self._resident = _move_to_device(images, config, device)

    @property
    def is_resident(self) -> bool:
        """Whether all images are in the memory of the device."""
        return self._resident is not None

    def samples(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns samples start to stop - 1 of the run.

        Returns:
            float32 images in [-1, 1], (number, channels, height, width), and int64 labels if there are any.
        """
        positions = self._order.positions(start, stop)
        corners = self._order.corners(start, stop) if self._crops else None
        mirrored = to_device(self._order.is_mirrored(start, stop), self._device) if self._flips else None
        if self._resident is None:
            pixels, labels = self._images.take(positions, corners)
            stored = to_device(pixels, self._device)
        else:
            stored, labels = self._pick(positions, corners)
        return normalize(stored, mirrored), None if labels is None else to_device(labels, self._device)

    def numbers(self, start: int, stop: int) -> NDArray[np.int64]:
        """Returns which images of the data set samples start to stop - 1 are, int64 (number,)."""
        numbers: NDArray[np.int64] = self._images.rows[self._order.positions(start, stop)]
        return numbers

    def _pick(
        self, positions: NDArray[np.int64], corners: NDArray[np.float32] | None
    ) -> tuple[torch.Tensor, NDArray[np.int64] | None]:
        """Does what `ImageSet.take` does where the images already are; only indices are moved."""
        assert self._resident is not None
        rows = self._images.rows[positions]
        labels = None if self._images.labels is None else self._images.labels[rows]
        stored = as_bits(self._resident).index_select(0, to_device(rows, self._device))
        if self._images.crop_size is not None:
            origins = to_device(self._images.crop_origins(positions, corners), self._device)
            stored = cut_out(stored, origins, self._images.crop_size)
        return stored.view(self._resident.dtype), labels


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copies an array to the device without making the host wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _move_to_device(images: ImageSet, config: DataConfig, device: torch.device) -> torch.Tensor | None:
    """Returns all images on the device, or None where they stay in their file."""
    wanted = config.device_resident
    if wanted is False or (wanted == "auto" and device.type != "cuda"):
        return None
    stored = images.images
    if isinstance(stored, UnequalImages):
        if wanted is True:
            raise DataError(
                "data.device_resident needs images of one size, but data.crop random keeps them as they are; set it "
                "to false, or data.crop to center."
            )
        return None
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if wanted == "auto" and stored.nbytes > AUTO_SHARE_OF_DEVICE * total:
            return None
        if stored.nbytes > free:
            raise DataError(
                f"data.device_resident asks for {stored.nbytes / 2**30:.1f} GiB of images on the device, which has "
                f"{free / 2**30:.1f} GiB free; set it to false."
            )
    return torch.from_numpy(np.array(stored)).to(device)


logger = logging.getLogger(__name__)

_BAD_IMAGES_ALWAYS_ALLOWED = 10  # a fraction of what was seen says little at the beginning


@dataclass
class StreamPosition:
    """Where a process is in its stream.

    Args:
        epoch: How often it has gone through all of its images.
        file: Number of its current file in the order of the epoch, where the buffer begins.
        place: State of the reader of that file, where the buffer begins; None at the beginning of the file.
        row: How many rows of that file the process has read before the buffer.
        buffer: Number of the buffer in the epoch.
        used: How many images of the buffer are used up.
        number: How many images of the epoch are used up.
        num_used: Images used up since the run began.
        num_bad: Those of them that could not be read.
    """

    epoch: int = 0
    file: int = 0
    place: dict[str, Any] | None = None
    row: int = 0
    buffer: int = 0
    used: int = 0
    number: int = 0
    num_used: int = 0
    num_bad: int = 0


@dataclass(frozen=True)
class _Example:
    """A row of a streamed file.

    Args:
        columns: What is in it.
        name: Where it is, as far as `datasets` tells.
        file: Number of its file in the order of the epoch.
        place: State of the reader behind it.
        row: How many rows of the file the process has read then.
    """

    columns: dict[str, Any]
    name: str
    file: int
    place: dict[str, Any]
    row: int


class ImageStream:
    """The part of a streamed data set that one process trains on.

    Args:
        config: Where the images are and how to prepare them; data.resolution and data.num_channels are set.
        with_labels: Whether labels are needed.
        seed: The seed of the run.
        rank: Which process this is.
        num_processes: How many share the images.
        device: Where the samples are needed.

    Raises:
        DataError: If the data set cannot be opened or streamed.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        with_labels: bool,
        seed: int,
        rank: int,
        num_processes: int,
        device: torch.device,
    ) -> None:
        import datasets

        self._config, self._seed, self._rank, self._device = config, seed, rank, device
        geometry = Geometry.of(config)
        assert geometry.size is not None and config.num_channels is not None
        self.image_shape = (config.num_channels, *geometry.size)
        self._size = geometry.size
        self._target = Target(config.num_channels, np.dtype(np.uint8), config.background, geometry)
        stream = _open(config, is_first=rank == 0)
        if stream.features is None:
            raise DataError(f"{config.source} does not say which columns it has; set data.streaming to false.")
        self._image_column, label_column = find_columns(stream.features, config)
        self._label_column = label_column if with_labels else None
        self.class_names = class_names_of(stream.features, label_column) if with_labels and label_column else None
        if with_labels and self.class_names is None:
            raise DataError(
                f"{config.source} does not name its classes, so it cannot be streamed for a class-conditional network; "
                "set data.streaming to false, or model.class_conditional to false."
            )
        columns = [name for name in (self._image_column, self._label_column) if name is not None]
        stream = stream.select_columns(columns).cast_column(self._image_column, datasets.Image(decode=False))
        # Whole files where they can be dealt out evenly; otherwise all read every file and keep their share of it.
        self._share = None if stream.num_shards % num_processes == 0 else (rank, num_processes)
        self._stream = stream.shard(num_processes, rank) if self._share is None else stream
        self.position = StreamPosition()
        self._examples: Generator[tuple[_Example, StreamPosition], None, None] | None = None
        # A reader that is still open when Python ends can abort the process (apache/arrow issue 45214).
        atexit.register(self.close)

    def close(self) -> None:
        """Closes the files; what is asked for next opens them again."""
        if self._examples is not None:
            self._examples.close()
            self._examples = None
            gc.collect()

    def go_to(self, position: dict[str, Any]) -> None:
        """Goes on from a position that `asdict(stream.position)` gave."""
        self.close()
        self.position = StreamPosition(**position)

    def samples(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the next stop - start images of this process.

        Returns:
            float32 images in [-1, 1], (number, channels, height, width), and int64 labels if they are needed.

        Raises:
            DataError: If an image cannot be read, or too many, or one has no label.
        """
        pixels: list[Pixels] = []
        labels: list[int] = []
        coins: list[bool] = []
        while missing := stop - start - len(pixels):
            for image, label, is_mirrored in self._next(missing):
                pixels.append(image)
                labels.append(label)
                coins.append(is_mirrored)
        mirrored = to_device(np.asarray(coins), self._device) if self._config.random_flip else None
        images = normalize(to_device(np.stack(pixels), self._device), mirrored)
        return images, None if self._label_column is None else to_device(np.asarray(labels), self._device)

    def _next(self, count: int) -> Iterator[tuple[Pixels, int, bool]]:
        """Yields those of the next `count` images that can be read, each with its label and the toss of a coin."""
        if self._examples is None:
            self._examples = self._read(self.position)
        taken = list(itertools.islice(self._examples, count))
        image_column = self._image_column
        cells = [as_cell(example.name, self._config, example.columns[image_column]) for example, _ in taken]
        with warnings.catch_warnings(), ThreadPoolExecutor(num_threads()) as pool:
            warnings.simplefilter("ignore")
            decoded = list(pool.map(self._decode, cells))
        for (example, position), cell, image in zip(taken, cells, decoded, strict=True):
            self.position = replace(position, num_bad=self.position.num_bad)
            if isinstance(image, BadImage):
                self._count_bad(image)
                continue
            generator = numpy_generator(self._seed, "augmentation", self._rank, position.epoch, position.number)
            yield self._cut(image, generator), self._label(example, cell), bool(generator.integers(2))

    def _decode(self, cell: Cell) -> Pixels | BadImage:
        """Decodes an image; one that cannot be is returned as its error."""
        try:
            if read_header(cell).is_deep:
                raise DataError(f"{cell.name} has 16 bits, which are not streamed; set data.streaming to false.")
            return decode(cell, self._target)
        except BadImage as error:
            return error

    def _cut(self, image: Pixels, generator: np.random.Generator) -> Pixels:
        """Cuts the size that is needed out of an image, at random if there is room."""
        rooms = np.asarray(image.shape[1:]) - self._size
        top, left = (generator.random(2) * (rooms + 1)).astype(int).tolist()
        return image[:, top : top + self._size[0], left : left + self._size[1]]

    def _label(self, example: _Example, cell: Cell) -> int:
        """Returns the label of an example."""
        if self._label_column is None or self.class_names is None:
            return 0
        label = example.columns[self._label_column]
        if label is None or not 0 <= label < len(self.class_names):
            found = "no label" if label in (None, NO_LABEL) else f"label {label}"
            raise DataError(f"{cell.name} has {found}; every image needs one from 0 to {len(self.class_names) - 1}.")
        return int(label)

    def _count_bad(self, error: BadImage) -> None:
        """Passes over a bad image, unless the settings forbid it."""
        self.position.num_bad += 1
        if self._config.on_bad_image == "error":
            raise DataError(f"{str(error)[:-1]}; repair or remove it, or set data.on_bad_image to skip.") from error
        logger.warning("Passed over an image: %s", error)
        limit = max(self._config.max_bad_fraction * self.position.num_used, _BAD_IMAGES_ALWAYS_ALLOWED)
        if self.position.num_bad > limit:
            raise DataError(
                f"{self.position.num_bad} of {self.position.num_used} images cannot be read, more than "
                f"data.max_bad_fraction {self._config.max_bad_fraction:g} allows; the last: {error}"
            )

    def _read(self, position: StreamPosition) -> Generator[tuple[_Example, StreamPosition], None, None]:
        """Yields the examples from a position on, for ever, each with the position behind it."""
        while True:
            examples = self._epoch(position)
            num_read = 0
            while buffer := list(itertools.islice(examples, self._config.shuffle_buffer_size)):
                num_read += len(buffer)
                generator = numpy_generator(self._seed, "buffer", self._rank, position.epoch, position.buffer)
                for number in generator.permutation(len(buffer))[position.used :].tolist():
                    position = replace(
                        position, used=position.used + 1, number=position.number + 1, num_used=position.num_used + 1
                    )
                    yield buffer[number], position
                last = buffer[-1]
                position = replace(
                    position, file=last.file, place=last.place, row=last.row, buffer=position.buffer + 1, used=0
                )
            if num_read == 0 and position.buffer == 0:
                raise DataError(f"split {self._config.split!r} of {self._config.source} holds no images.")
            position = StreamPosition(epoch=position.epoch + 1, num_used=position.num_used)

    def _epoch(self, position: StreamPosition) -> Iterator[_Example]:
        """Yields the rest of an epoch."""
        from datasets.distributed import split_dataset_by_node

        num_files = self._stream.num_shards
        order = numpy_generator(self._seed, "files", position.epoch).permutation(num_files)
        for number in range(position.file, num_files):
            file = self._stream.shard(num_files, int(order[number]))
            rank, num_sharing = self._share or (0, 1)
            name, num_before = _file_name(file), 0
            if self._share is not None:
                file = split_dataset_by_node(file, *self._share)
            if number == position.file and position.place is not None:
                file.load_state_dict(position.place)
                num_before = position.row
            for count, columns in enumerate(file, num_before):
                where = f"row {count * num_sharing + rank} of {name}the stream of {self._config.source}"
                yield _Example(columns, where, number, file.state_dict(), count + 1)


def _open(config: DataConfig, *, is_first: bool) -> "IterableDataset":
    """Opens the rows of the training split: those that would be decoded if it were not streamed."""
    path = Path(config.source).expanduser()
    if path.exists():
        refuse_settings(config, ("subset", "revision"), f"{path}, which is no data set of the Hub")
    if path.is_dir() and not is_table(path):
        refuse_settings(config, ("image_column", "label_column"), f"{path}, which has folders instead of columns")
        folder = open_folder(path, config.split)
        if folder.left_out and is_first:
            logger.warning("%s", left_out_sentence(folder))
        return _images_of(folder)
    stream: IterableDataset = load_table(config, config.split, is_streaming=True)
    return stream


def _images_of(folder: Source) -> "IterableDataset":
    """Returns the images of a folder as rows in one stream, in the order of their names."""
    import datasets

    features: dict[str, Any] = {"image": datasets.Image()}
    if folder.class_names is not None:
        features["label"] = datasets.ClassLabel(names=list(folder.class_names))
    # One string and one array, since `datasets` hashes what it is given, which takes long for a million strings.
    paths = "\0".join(str(cell.data) for cell in folder.read(range(folder.num_images)))
    rows = {"paths": paths, "labels": folder.labels}
    return datasets.IterableDataset.from_generator(_rows, features=datasets.Features(features), gen_kwargs=rows)


def _rows(paths: str, labels: NDArray[np.int64] | None) -> Iterator[dict[str, Any]]:
    """Yields the rows of image files, each read when it is decoded."""
    for number, path in enumerate(paths.split("\0")):
        row: dict[str, Any] = {"image": {"path": path, "bytes": None}}
        yield row if labels is None else row | {"label": int(labels[number])}


def _file_name(stream: "IterableDataset") -> str:
    """Returns "NAME of " for the only file of a stream where `datasets` tells it, otherwise nothing."""
    examples = stream._ex_iterable
    while hasattr(examples, "ex_iterable"):
        examples = examples.ex_iterable
    files = getattr(examples, "kwargs", {}).get("files")
    first = files[0] if files else None
    if isinstance(first, Iterable) and not isinstance(first, str):  # in `datasets` 4.0: files, one after the other
        first = next(iter(first), None)
    return f"{Path(first).name} of " if isinstance(first, str) else ""


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
