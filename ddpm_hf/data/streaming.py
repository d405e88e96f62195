"""Images decoded during training, for datasets that are too large for the cache (`data.streaming`).

The files of a dataset are distributed over the processes. Each process reads its files in an order drawn for (seed,
epoch) and shuffles the images in a buffer. A checkpoint stores where the current buffer begins in the files and how
many of its images were used; a resumed run reads that buffer again and continues with the same images.
"""

import atexit
import gc
import itertools
import logging
import os
import re
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
from ddpm_hf.data.decode import (
    BadImage,
    DataError,
    EncodedImage,
    Geometry,
    OutputFormat,
    Pixels,
    ValueRange,
    bad_image_error,
    decode,
    normalize,
    num_threads,
    read_header,
)
from ddpm_hf.data.labels import ClassOrder, label_error
from ddpm_hf.data.loader import to_device
from ddpm_hf.data.sources import (
    Source,
    as_encoded_image,
    class_names_of,
    dtype_of_arrays,
    find_columns,
    find_folder,
    load_table,
    log_ignored_files,
)
from ddpm_hf.rng import numpy_generator

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

# As `warnings.filterwarnings` adds it: of Pillow about damaged tags, while a stream is read.
_IGNORED_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\.|ddpm_hf\.data\.decode"), 0)

_NUM_BAD_ALWAYS_ALLOWED = 10
"""Early in a stream, `data.max_bad_fraction` of the images so far is less than one image."""


@dataclass
class StreamPosition:
    """Where a process is in its stream. Stored in checkpoints, so the names of the fields must not change.

    Args:
        epoch: Number of completed epochs.
        file: Index of the file in the order of the epoch in which the buffer begins.
        place: State of the `datasets` reader of that file at the beginning of the buffer; None at the first row.
        row: Number of rows of that file that this process read before the buffer.
        buffer: Index of the buffer in the epoch.
        used: Number of images of the buffer that were used.
        number: Number of images of the epoch that were used.
        num_used: Number of images that were used since the run began.
        num_bad: Number of unreadable images among them.
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
class _Row:
    """A row of a streamed file."""

    columns: dict[str, Any]
    name: str
    reader: "IterableDataset"  # its state is that after this row until another row is read
    file: int  # index in the order of the epoch
    num_read: int  # rows of the file that this process has read, this one included


class ImageStream:
    """The part of a streamed dataset that one process trains on.

    Args:
        config: The dataset and its preprocessing; `data.resolution` and `data.num_channels` are set.
        with_labels: Whether labels are needed.
        seed: The seed of the run.
        rank: Rank of this process.
        num_processes: Number of processes that share the images.
        device: Device of the samples.
        class_order: As in `find_source`.

    Raises:
        DataError: The dataset cannot be opened or streamed.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        with_labels: bool,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
        device: torch.device,
        class_order: ClassOrder = "numbers",
    ) -> None:
        import datasets

        self._config, self._seed, self._rank, self._device = config, seed, rank, device
        geometry = Geometry.of(config)
        assert geometry.size is not None and config.num_channels is not None
        self._size = geometry.size
        keeps_values = config.value_range is not None
        dtype = np.dtype(np.float32 if keeps_values else np.uint8)
        self._output = OutputFormat(config.num_channels, dtype, config.background, geometry, keeps_values)
        self.image_shape = (config.num_channels, *geometry.size)
        self.value_range: ValueRange | None = None
        if isinstance(config.value_range, list):
            self.value_range = (config.value_range[0], config.value_range[1])
        stream = _open(config, rank, class_order)
        if stream.features is None:
            raise DataError(f"{config.source} does not declare its columns; set data.streaming to false.")
        self._image_column, label_column = find_columns(stream.features, config)
        self._label_column = label_column if with_labels else None
        self.class_names = class_names_of(stream.features, label_column) if with_labels and label_column else None
        if with_labels and self.class_names is None:
            raise DataError(
                f"{config.source} has no class names, which streaming needs for a class-conditional network; set "
                "data.streaming to false, or model.class_conditional to false."
            )
        columns = [name for name in (self._image_column, self._label_column) if name is not None]
        stream = stream.select_columns(columns)
        self._dtype = dtype_of_arrays(stream.features[self._image_column])
        if self._dtype is None:
            stream = stream.cast_column(self._image_column, datasets.Image(decode=False))
        # Distribute whole files if they divide evenly. Otherwise every process reads all files and skips the rows of
        # the others.
        self._shared_rows = None if stream.num_shards % num_processes == 0 else (rank, num_processes)
        self._stream = stream.shard(num_processes, rank) if self._shared_rows is None else stream
        self.position = StreamPosition()
        # The position of training while batches are prepared ahead of it; None if it is `position`.
        self.trained_position: StreamPosition | None = None
        self._rows: Generator[tuple[_Row, StreamPosition], None, None] | None = None
        self._pool: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """Close the files. The next call of `samples` opens them again."""
        if self._rows is not None:
            atexit.unregister(self.close)
            if _IGNORED_WARNINGS in warnings.filters:
                warnings.filters.remove(_IGNORED_WARNINGS)  # type: ignore[attr-defined]
            self._rows.close()
            self._rows = None
            gc.collect()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def go_to(self, position: dict[str, Any]) -> None:
        """Continue from a position, given as the dictionary that `asdict(stream.position)` returned."""
        self.close()
        self.position, self.trained_position = StreamPosition(**position), None

    def samples(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the next stop - start images of this process, whatever `start` is.

        Returns:
            float32 images in [-1, 1], (number, channels, height, width), and int64 labels if they are needed.

        Raises:
            DataError: An image is unreadable or has no label, or too many images are unreadable.
        """
        taken: list[tuple[Pixels, int, bool]] = []
        while missing := stop - start - len(taken):
            taken += self._next(missing)
        pixels, labels, is_mirrored = zip(*taken, strict=True)
        mirrored = to_device(np.asarray(is_mirrored), self._device) if self._config.random_flip else None
        images = normalize(to_device(np.stack(pixels), self._device), mirrored, self.value_range)
        return images, None if self._label_column is None else to_device(np.asarray(labels), self._device)

    def _next(self, count: int) -> Iterator[tuple[Pixels, int, bool]]:
        """Decode the next `count` rows; yield (pixels, label, flip) and skip unreadable ones."""
        if self._rows is None:
            self._rows = self._read(self.position)
            # Not catch_warnings around each batch: it changes the filters of all threads, and a thread reads batches.
            if _IGNORED_WARNINGS not in warnings.filters:
                warnings.filters.insert(0, _IGNORED_WARNINGS)  # type: ignore[attr-defined]
            # A parquet reader that is still open at exit can abort the process (apache/arrow issue 45214).
            atexit.register(self.close)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(num_threads(int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        taken = list(itertools.islice(self._rows, count))
        images = [
            as_encoded_image(row.name, self._config, row.columns[self._image_column], dtype=self._dtype)
            for row, _ in taken
        ]
        decoded = list(self._pool.map(self._decode, images))
        for (row, position), image, pixels in zip(taken, images, decoded, strict=True):
            self.position = replace(position, num_bad=self.position.num_bad)
            if isinstance(pixels, BadImage):
                self._count_bad(pixels)
                continue
            generator = numpy_generator(self._seed, "augmentation", self._rank, position.epoch, position.number)
            margins = np.asarray(pixels.shape[1:]) - self._size
            top, left = (generator.random(2) * (margins + 1)).astype(int).tolist()
            crop = pixels[:, top : top + self._size[0], left : left + self._size[1]]
            yield crop, self._label(row, image), bool(generator.integers(2))

    def _decode(self, image: EncodedImage) -> Pixels | BadImage:
        try:
            image = image.in_memory()
            if not self._output.keeps_values and (dtype := read_header(image).dtype) != "uint8":
                values, low_high = (
                    ("16 bits", "[0, 65535]") if dtype == "uint16" else (f"{dtype} values", "[low, high]")
                )
                raise DataError(
                    f"{image.name} has {values}, which cannot be streamed without a range; set data.value_range to "
                    f"{low_high}, or data.streaming to false."
                )
            return decode(image, self._output)
        except BadImage as error:
            return error

    def _label(self, row: _Row, image: EncodedImage) -> int:
        if self._label_column is None or self.class_names is None:
            return 0
        label = row.columns[self._label_column]
        if label is None or not 0 <= label < len(self.class_names):
            raise label_error(image.name, label, len(self.class_names))
        return int(label)

    def _count_bad(self, error: BadImage) -> None:
        """Skip an unreadable image, or raise a DataError if the settings do not allow it."""
        self.position.num_bad += 1
        if self._config.on_bad_image == "error":
            raise bad_image_error(str(error)) from error
        logger.warning("Skipped an unreadable image: %s", error)
        limit = max(self._config.max_bad_fraction * self.position.num_used, _NUM_BAD_ALWAYS_ALLOWED)
        if self.position.num_bad > limit:
            raise DataError(
                f"{self.position.num_bad} of {self.position.num_used} images cannot be read, more than "
                f"data.max_bad_fraction {self._config.max_bad_fraction:g} allows; repair them, or raise it; the last: "
                f"{error}"
            )

    def _read(self, position: StreamPosition) -> Generator[tuple[_Row, StreamPosition], None, None]:
        """Yield rows from a position on, without end, each with the position after it."""
        while True:
            rows = self._rows_of_epoch(position)
            num_read = 0
            while buffer := list(itertools.islice(rows, self._config.shuffle_buffer_size)):
                num_read += len(buffer)
                last = buffer[-1]
                place = last.reader.state_dict()
                generator = numpy_generator(self._seed, "buffer", self._rank, position.epoch, position.buffer)
                for number in generator.permutation(len(buffer))[position.used :].tolist():
                    position = replace(
                        position, used=position.used + 1, number=position.number + 1, num_used=position.num_used + 1
                    )
                    yield buffer[number], position
                position = replace(
                    position, file=last.file, place=place, row=last.num_read, buffer=position.buffer + 1, used=0
                )
            if num_read == 0 and position.buffer == 0:
                raise DataError(f"split {self._config.split!r} of {self._config.source} contains no images.")
            position = StreamPosition(epoch=position.epoch + 1, num_used=position.num_used)

    def _rows_of_epoch(self, position: StreamPosition) -> Iterator[_Row]:
        """Yield the rows of an epoch from the beginning of the buffer on."""
        from datasets.distributed import split_dataset_by_node

        num_files = self._stream.num_shards
        order = numpy_generator(self._seed, "files", position.epoch).permutation(num_files)
        rank, num_sharing = self._shared_rows or (0, 1)
        for index in range(position.file, num_files):
            reader = self._stream.shard(num_files, int(order[index]))
            file_name, num_before = _file_name(reader), 0
            if self._shared_rows is not None:
                reader = split_dataset_by_node(reader, *self._shared_rows)
            if index == position.file and position.place is not None:
                reader.load_state_dict(position.place)
                num_before = position.row
            for count, columns in enumerate(reader, num_before):
                name = f"row {count * num_sharing + rank} of {file_name}the stream of {self._config.source}"
                yield _Row(columns, name, reader, index, count + 1)


def _open(config: DataConfig, rank: int, class_order: ClassOrder) -> "IterableDataset":
    """Open the rows of the training split, the same ones that would be decoded without streaming."""
    folder = find_folder(config, config.split, class_order)
    if folder is None:
        stream: IterableDataset = load_table(config, config.split, is_streaming=True)
        return stream
    if folder.kind != "folder":
        raise DataError(f"data.streaming does not support tar files such as those in {folder.name}; set it to false.")
    if folder.ignored_files and rank == 0:
        log_ignored_files(folder)
    return _stream_of_folder(folder)


def _stream_of_folder(folder: Source) -> "IterableDataset":
    """Return the images of a folder as a stream of one shard, in the order of their names."""
    import datasets

    features = datasets.Features(image=datasets.Image())
    if folder.class_names is not None:
        features["label"] = datasets.ClassLabel(names=list(folder.class_names))
    # One string and one array, because `datasets` hashes its arguments, which is slow for a list of many strings.
    paths = "\0".join(str(image.data) for image in folder.read(range(folder.num_images)))
    arguments = {"paths": paths, "labels": folder.labels}
    return datasets.IterableDataset.from_generator(_folder_rows, features=features, gen_kwargs=arguments)


def _folder_rows(paths: str, labels: NDArray[np.int64] | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of image files, which are read when they are decoded."""
    for number, path in enumerate(paths.split("\0")):
        row: dict[str, Any] = {"image": {"path": path, "bytes": None}}
        yield row if labels is None else row | {"label": int(labels[number])}


def _file_name(stream: "IterableDataset") -> str:
    """Return "NAME of " for a stream of one file, or "" if `datasets` does not know the file."""
    examples = stream._ex_iterable
    while hasattr(examples, "ex_iterable"):
        examples = examples.ex_iterable
    files = getattr(examples, "kwargs", {}).get("files")
    first = files[0] if files else None
    if isinstance(first, Iterable) and not isinstance(first, str):  # `datasets` 4.0 has iterables of files
        first = next(iter(first), None)
    return f"{Path(first).name} of " if isinstance(first, str) else ""
