"""Images decoded while training, for data sets that do not fit on the disk.

The files of a data set are dealt out to the processes; each reads its own in an order drawn for (seed, epoch), and
mixes the images a buffer at a time. A position is the place in the files where the buffer begins and how many of its
images were used, so a run that goes on reads that buffer again and continues with the images it would have seen.
"""

import atexit
import gc
import itertools
import logging
import warnings
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_hf.config import DataConfig
from ddpm_hf.data.build import num_threads
from ddpm_hf.data.decoding import Cell, Pixels, Target, decode, read_header
from ddpm_hf.data.errors import BadImage, DataError
from ddpm_hf.data.feed import to_device
from ddpm_hf.data.files import open_folder
from ddpm_hf.data.geometry import Geometry
from ddpm_hf.data.pixels import normalize
from ddpm_hf.data.source import NO_LABEL, Source, left_out_sentence, refuse_settings
from ddpm_hf.data.tables import as_cell, class_names_of, find_columns, is_table, load_table
from ddpm_hf.rng import numpy_generator

if TYPE_CHECKING:
    from datasets import IterableDataset

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
