"""Images decoded during training, for datasets that are too large for the cache (`data.streaming`).

The files of a dataset are distributed over the processes. Each process reads its files in an order drawn for (seed,
epoch) and shuffles the images in a buffer. A checkpoint stores where the current buffer begins in the files and how
many of its images were used; a resumed run reads that buffer again and continues with the same images.

One thread reads the next buffer while the images of the current one are used, and other threads decode the next images.
How far they are ahead changes nothing.
"""

import atexit
import gc
import logging
import math
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
    decode_interleaved,
    normalize,
    num_threads,
    read_header,
)
from ddpm_hf.data.folders import Source, log_ignored_files
from ddpm_hf.data.labels import ClassOrder, label_error
from ddpm_hf.data.layout import SPLIT_NAMES
from ddpm_hf.data.loader import to_device
from ddpm_hf.data.sources import find_files, find_source
from ddpm_hf.data.tables import (
    TEXT_TABLES,
    TableFiles,
    as_encoded_column,
    as_encoded_image,
    class_names_of,
    columns_of_splits,
    dtype_of_arrays,
    find_columns,
    is_in_split,
    load_rows,
)
from ddpm_hf.rng import first_draws, numpy_generator

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

# As `warnings.filterwarnings` adds it: of Pillow about damaged tags, while a stream is read.
_IGNORED_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\.|ddpm_hf\.data\.decode"), 0)

_NUM_BAD_ALWAYS_ALLOWED = 10
"""Early in a stream, `data.max_bad_fraction` of the images so far is less than one image."""
_ROWS_PER_READ = 64
_READ_AHEAD = 1 / 4
"""Part of the next buffer that is read before images of the current one are used. Each used image is replaced by a row
of the next buffer, so that not more than 5/4 buffers are in memory."""
_BYTES_PER_TASK, _MAX_IMAGES_PER_TASK = 2**17, 32
"""A decoding thread takes several images at a time if they are small, since the threads would mostly wait for each
other otherwise."""
_IMAGES_PER_DRAW = 256


@dataclass
class StreamPosition:
    """Where a process is in its stream. Stored in checkpoints, so the names of the fields must not change.

    Args:
        epoch: Number of completed epochs.
        file: Index of the file in the order of the epoch in which the buffer begins.
        place: Unused; version 0.1 stored the state of a reader.
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
class _Files:
    """The files of a dataset, which are distributed over the processes.

    Args:
        number: Number of files.
        read: Yield the images and labels of the rows start, start + step, ... of a file, given (file, start, step).
        class_names: Names of the classes, or None.
    """

    number: int
    read: Callable[[int, int, int], Iterator[tuple[EncodedImage, int | None]]]
    class_names: tuple[str, ...] | None


class _Row(NamedTuple):
    """A row that was read.

    Attributes:
        image: Its image.
        label: Its label, as in the dataset.
        epoch: The epoch in which it was read.
        file: Index of its file in the order of the epoch.
        num_read: Number of rows of the file that this process has read, this one included.
    """

    image: EncodedImage
    label: int | None
    epoch: int
    file: int
    num_read: int


class _Augmentation(NamedTuple):
    """The random crop and flip of an image.

    Attributes:
        down: Vertical position of the crop, from 0 to 1.
        right: Horizontal position of the crop, from 0 to 1.
        is_mirrored: Whether the image is flipped, with data.random_flip.
    """

    down: float
    right: float
    is_mirrored: bool


class _Task(NamedTuple):
    """Rows that are being decoded.

    Attributes:
        rows: The rows, in the order in which they are used.
        start: The position at the beginning of their buffer, or the one from which a run continues in it.
        offset: Number of rows between `start` and the first of these.
        results: For each row the pixels after crop and flip, or why it cannot be used.
    """

    rows: list[_Row]
    start: StreamPosition
    offset: int
    results: Future[list[Pixels | DataError]]


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
        self._config, self._seed, self._rank, self._device = config, seed, rank, device
        geometry = Geometry.of(config)
        assert geometry.size is not None and config.num_channels is not None
        self._size = geometry.size
        self._is_augmented = config.random_flip or geometry.is_random_crop
        keeps_values = config.value_range is not None
        dtype = np.dtype(np.float32 if keeps_values else np.uint8)
        self._output = OutputFormat(config.num_channels, dtype, config.background, geometry, keeps_values)
        self.image_shape = (config.num_channels, *geometry.size)
        self.value_range: ValueRange | None = None
        if isinstance(config.value_range, list):
            self.value_range = (config.value_range[0], config.value_range[1])
        self._files = _open(config, rank, class_order, with_labels=with_labels)
        self.class_names = self._files.class_names if with_labels else None
        if with_labels and self.class_names is None:
            raise DataError(
                f"{config.source} has no class names, which streaming needs for a class-conditional network; set "
                "data.streaming to false, or model.class_conditional to false."
            )
        # Distribute whole files if they divide evenly. Otherwise every process reads all files and skips the rows of
        # the others.
        per_process, rest = divmod(self._files.number, num_processes)
        self._own_files = range(self._files.number) if rest else range(rank * per_process, (rank + 1) * per_process)
        self._first_row, self._row_step = (rank, num_processes) if rest else (0, 1)
        self._num_threads = num_threads(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        num_bytes = math.prod(self.image_shape) * dtype.itemsize
        self._images_per_task = max(1, min(_MAX_IMAGES_PER_TASK, _BYTES_PER_TASK // num_bytes))
        # The position of training while batches are prepared ahead of it; None if it is `position`.
        self.trained_position: StreamPosition | None = None
        # The position of `samples` is `_num_taken` images after `_start`.
        self._start, self._num_taken, self._num_bad = StreamPosition(), 0, 0
        self._images: Iterator[tuple[_Row, Pixels | DataError]] | None = None  # None while closed
        self._num_ahead = 0  # images that are decoded ahead
        self._rows: Generator[list[_Row], None, None]
        self._reader: ThreadPoolExecutor
        self._decoders: ThreadPoolExecutor

    @property
    def position(self) -> StreamPosition:
        """The position after the images that `samples` returned."""
        start, count = self._start, self._num_taken
        return replace(
            start,
            used=start.used + count,
            number=start.number + count,
            num_used=start.num_used + count,
            num_bad=self._num_bad,
        )

    def close(self) -> None:
        """Stop the threads and close the files. The next call of `samples` continues at the same position."""
        if self._images is None:
            return
        self._start, self._num_taken, self._images = self.position, 0, None
        self._reader.shutdown(cancel_futures=True)
        self._decoders.shutdown(cancel_futures=True)
        atexit.unregister(self.close)
        if _IGNORED_WARNINGS in warnings.filters:
            warnings.filters.remove(_IGNORED_WARNINGS)  # type: ignore[attr-defined]
        self._rows.close()
        gc.collect()

    def go_to(self, position: dict[str, Any]) -> None:
        """Continue from a position, given as the dictionary that `asdict(stream.position)` returned."""
        self.close()
        self._start, self._num_taken, self.trained_position = StreamPosition(**position | {"place": None}), 0, None
        self._num_bad = self._start.num_bad

    def samples(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the next stop - start images of this process, whatever `start` is.

        Returns:
            float32 images in [-1, 1], (number, channels, height, width), and int64 labels if they are needed.

        Raises:
            DataError: As `take`.
        """
        stored, labels = self.take(stop - start)
        images = normalize(stored.to(self._device, non_blocking=True), value_range=self.value_range)
        return images, None if labels is None else to_device(labels, self._device)

    def take(self, count: int) -> tuple[torch.Tensor, NDArray[np.int64] | None]:
        """Return the next images of this process as they are stored, in memory of the host.

        Returns:
            Pixels (count, channels, height, width), in pinned memory for a GPU, and int64 labels if they are needed.

        Raises:
            DataError: An image is unreadable or has no label, or too many images are unreadable.
        """
        pixels: list[Pixels] = []
        labels: list[int] = []
        try:
            images = self._images or self._open_images()
            self._num_ahead = max(count, 2 * self._num_threads * self._images_per_task)
            while len(pixels) < count:
                row, result = next(images)
                if isinstance(result, BadImage):
                    self._skip(result)
                elif isinstance(result, DataError):
                    raise result
                else:
                    pixels.append(result)
                    labels.append(self._label(row))
        except BaseException:
            self.close()
            raise
        dtype = torch.from_numpy(np.empty(0, self._output.dtype)).dtype
        stored = torch.empty(count, *self.image_shape, dtype=dtype, pin_memory=self._device.type == "cuda")
        np.stack(pixels, out=stored.numpy())
        return stored, None if self.class_names is None else np.asarray(labels, np.int64)

    def _label(self, row: _Row) -> int:
        if self.class_names is None:
            return 0
        if row.label is None or not 0 <= row.label < len(self.class_names):
            raise label_error(row.image.name, row.label, len(self.class_names))
        return row.label

    def _skip(self, error: BadImage) -> None:
        """Skip an unreadable image, or raise a DataError if the settings do not allow it."""
        self._num_bad += 1
        if self._config.on_bad_image == "error":
            raise bad_image_error(str(error)) from error
        logger.warning("Skipped an unreadable image: %s", error)
        num_used = self.position.num_used
        if self._num_bad > max(self._config.max_bad_fraction * num_used, _NUM_BAD_ALWAYS_ALLOWED):
            raise DataError(
                f"{self._num_bad} of {num_used} images cannot be read, more than data.max_bad_fraction "
                f"{self._config.max_bad_fraction:g} allows; repair them, or raise it; the last: {error}"
            )

    # ------------------------------------------------------------------------------------------------- decoding ahead

    def _open_images(self) -> Iterator[tuple[_Row, Pixels | DataError]]:
        """Start the threads at the current position."""
        # Not catch_warnings around each batch: it changes the filters of all threads, and a thread reads batches.
        if _IGNORED_WARNINGS not in warnings.filters:
            warnings.filters.insert(0, _IGNORED_WARNINGS)  # type: ignore[attr-defined]
        # A parquet reader that is still open at exit can abort the process (apache/arrow issue 45214).
        atexit.register(self.close)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="stream-reader")
        self._decoders = ThreadPoolExecutor(self._num_threads, thread_name_prefix="stream-decoder")
        num_reads, last = divmod(self._config.shuffle_buffer_size, _ROWS_PER_READ)
        sizes = [_ROWS_PER_READ] * num_reads + [last] * (last > 0)
        self._rows = self._read(self.position, sizes)
        self._images = self._decode_ahead(self._submit(self.position, sizes))
        return self._images

    def _decode_ahead(
        self, submitted: Iterator[_Task | Future[list[_Row]]]
    ) -> Iterator[tuple[_Row, Pixels | DataError]]:
        """Yield each row with its result and set the position after it; keep `_num_ahead` images submitted."""
        tasks: deque[_Task] = deque()
        num_submitted = 0
        while True:
            while num_submitted < self._num_ahead:
                task = next(submitted)
                if isinstance(task, _Task):
                    tasks.append(task)
                    num_submitted += len(task.rows)
                elif tasks:
                    break  # use what is decoded while the next buffer is read
                else:
                    task.result()  # wait, or raise the error of the reader
            task = tasks.popleft()
            for num_taken, result in enumerate(zip(task.rows, task.results.result(), strict=True), task.offset + 1):
                num_submitted -= 1
                self._start, self._num_taken = task.start, num_taken
                yield result

    def _submit(self, start: StreamPosition, sizes: list[int]) -> Iterator[_Task | Future[list[_Row]]]:
        """Shuffle each buffer and submit its rows to the decoders, without end.

        Args:
            start: The position in the first buffer.
            sizes: Numbers of rows that are read at a time, in sum those of a buffer.

        Yields:
            The next task, or the part of the next buffer that is not read yet or cannot be read.
        """
        num_rows, parts = sum(sizes), deque[Future[list[_Row]]]()

        def read_ahead(count: int) -> None:
            """Let the reader read that many rows of the next buffer."""
            while sum(sizes[: len(parts)]) < min(count, num_rows):
                parts.append(self._reader.submit(next, self._rows))

        while True:
            read_ahead(num_rows)
            for part in parts:
                while not part.done() or part.exception():
                    yield part
            buffer = [row for part in parts for row in part.result()]
            parts.clear()
            if buffer[0].epoch != start.epoch:
                start = StreamPosition(epoch=buffer[0].epoch, num_used=start.num_used)
            generator = numpy_generator(self._seed, "buffer", self._rank, start.epoch, start.buffer)
            order = generator.permutation(len(buffer))[start.used :].tolist()
            last, num_left = buffer[-1], len(order)
            rows = [buffer[number] for number in reversed(order)]
            del buffer  # so that each row is freed after its use
            augmentations = self._augmentations(start.epoch, range(start.number + 1, start.number + num_left + 1))
            while rows:
                chosen = rows[: -self._images_per_task - 1 : -1]
                del rows[-self._images_per_task :]
                offset = num_left - len(rows) - len(chosen)
                results = self._decoders.submit(self._decode_rows, chosen, [*islice(augmentations, len(chosen))])
                read_ahead(int(_READ_AHEAD * num_rows) + start.used + offset + len(chosen))
                yield _Task(chosen, start, offset, results)
            start = replace(
                start,
                file=last.file,
                row=last.num_read,
                buffer=start.buffer + 1,
                used=0,
                number=start.number + num_left,
                num_used=start.num_used + num_left,
            )

    def _augmentations(self, epoch: int, numbers: range) -> Iterator[_Augmentation | None]:
        """Yield the crop and flip of each image by its number in an epoch."""
        if not self._is_augmented:
            yield from repeat(None, len(numbers))
            return
        for start in range(0, len(numbers), _IMAGES_PER_DRAW):
            drawn = numbers[start : start + _IMAGES_PER_DRAW]
            places, flips = first_draws(self._seed, "augmentation", self._rank, epoch, numbers=drawn)
            yield from map(_Augmentation, *places.T.tolist(), flips.tolist())

    def _decode_rows(
        self, rows: Sequence[_Row], augmentations: Sequence[_Augmentation | None]
    ) -> list[Pixels | DataError]:
        results: list[Pixels | DataError] = []
        for row, augmentation in zip(rows, augmentations, strict=True):
            try:
                results.append(self._augment(self._decode(row.image), augmentation))
            except DataError as error:
                results.append(error)
        return results

    def _decode(self, image: EncodedImage) -> Pixels:
        image = image.in_memory()
        try:
            pixels = decode_interleaved(image, self._output)
            if pixels.dtype == self._output.dtype:
                return pixels
        except BadImage:
            raise
        except DataError:
            if self._output.keeps_values or read_header(image).dtype == "uint8":
                raise
        dtype = read_header(image).dtype
        values, low_high = ("16 bits", "[0, 65535]") if dtype == "uint16" else (f"{dtype} values", "[low, high]")
        raise DataError(
            f"{image.name} has {values}, which cannot be streamed without a range; set data.value_range to {low_high}, "
            "or data.streaming to false."
        )

    def _augment(self, pixels: Pixels, augmentation: _Augmentation | None) -> Pixels:
        """Crop, flip and transpose (height, width, channels)."""
        if augmentation is not None:
            height, width = self._size
            top = int(augmentation.down * (len(pixels) - height + 1))
            left = int(augmentation.right * (pixels.shape[1] - width + 1))
            pixels = pixels[top : top + height, left : left + width]
            if augmentation.is_mirrored and self._config.random_flip:
                pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    # -------------------------------------------------------------------------------------------------------- reading

    def _read(self, position: StreamPosition, sizes: list[int]) -> Generator[list[_Row], None, None]:
        """Yield the rows of each buffer in parts of these sizes, without end; at the end of an epoch they are shorter.

        Args:
            position: Where the first buffer begins.
            sizes: Number of rows of each part.
        """
        while True:
            rows, is_empty = self._rows_of_epoch(position), position.buffer == 0
            while part := list(islice(rows, sizes[0])):
                is_empty = False
                yield part
                for size in sizes[1:]:
                    yield list(islice(rows, size))
            if is_empty:
                raise DataError(f"split {self._config.split!r} of {self._config.source} contains no images.")
            position = StreamPosition(epoch=position.epoch + 1)

    def _rows_of_epoch(self, position: StreamPosition) -> Iterator[_Row]:
        """Yield the rows of an epoch from the beginning of a buffer on."""
        order = numpy_generator(self._seed, "files", position.epoch).permutation(len(self._own_files))
        for index in range(position.file, len(order)):
            num_before = position.row if index == position.file else 0
            first = self._first_row + num_before * self._row_step
            rows = self._files.read(self._own_files[int(order[index])], first, self._row_step)
            for num_read, (image, label) in enumerate(rows, num_before + 1):
                yield _Row(image, label, position.epoch, index, num_read)


def _open(config: DataConfig, rank: int, class_order: ClassOrder, *, with_labels: bool) -> _Files:
    """Open the rows of the training split, the same ones that would be decoded without streaming."""
    if config.source.lower().endswith(tuple(TEXT_TABLES)):  # a list of image files, which is small
        source = find_source(config, config.split, class_order)
        assert isinstance(source, Source)
    elif (found := find_files(config, config.split, class_order)) is not None:
        source = found
    else:
        _, rows = load_rows(config, config.split, class_order, is_streaming=True)
        return _files_of_table(rows, config, class_order, with_labels=with_labels)
    if source.ignored_files and rank == 0:
        log_ignored_files(source)
    return _files_of_source(source)


def _files_of_source(source: Source) -> _Files:
    """Return the files of a folder, which are one file here, or the archives of a dataset."""
    starts = (*source.archive_starts, source.num_images)

    def read(file: int, start: int, step: int) -> Iterator[tuple[EncodedImage, int | None]]:
        rows = range(starts[file] + start, starts[file + 1], step)
        for first in range(0, len(rows), _ROWS_PER_READ):
            part = rows[first : first + _ROWS_PER_READ]
            for row, image in zip(part, source.read(part), strict=True):
                yield image, None if source.labels is None else int(source.labels[row])

    return _Files(len(source.archive_starts), read, source.class_names)


def _files_of_table(
    stream: "IterableDataset", config: DataConfig, class_order: ClassOrder, *, with_labels: bool
) -> _Files:
    """Return the files of a table."""
    if stream.features is None:
        raise DataError(f"{config.source} does not declare its columns; set data.streaming to false.")
    image_column, label_column = find_columns(stream.features, config)
    class_names = class_names_of(stream.features, label_column) if label_column else None
    label_column = label_column if with_labels else None
    split_column = None if class_order == "text" else _column_of_splits(stream, config)
    dtype, files = dtype_of_arrays(stream.features[image_column]), TableFiles(config)
    columns = [image_column, label_column, split_column]
    stream = as_encoded_column(
        stream.select_columns([column for column in columns if column is not None]), image_column
    )
    number = stream.num_shards

    def is_used(value: str | None) -> bool:
        return is_in_split(value, config.split)

    def read(file: int, start: int, step: int) -> Iterator[tuple[EncodedImage, int | None]]:
        reader = stream.shard(number, file)
        place = f"{_file_name(reader)}the stream of {config.source}"
        for row, columns in _rows_of_table(reader, start, step, split_column, is_used):
            image = as_encoded_image(f"row {row} of {place}", config, columns[image_column], files, dtype=dtype)
            yield image, None if label_column is None else columns[label_column]

    return _Files(number, read, class_names)


def _column_of_splits(stream: "IterableDataset", config: DataConfig) -> str | None:
    """Return the column that contains the split of each row, as its first values say; None without one."""
    for name in columns_of_splits(stream.features, config):
        values = [row[name] for row in stream.select_columns([name]).take(_ROWS_PER_READ)]
        if any(is_in_split(value, split) for value in values for split in SPLIT_NAMES):
            return name
    return None


def _rows_of_table(
    reader: "IterableDataset", start: int, step: int, column: str | None, is_used: Callable[[Any], bool]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows start, start + step, ... of those in a file that are used, as the values of a column say."""
    if reader._ex_iterable.iter_arrow is None:
        rows = ((row, columns) for row, columns in enumerate(reader) if column is None or is_used(columns[column]))
        yield from islice(rows, start, None, step)
        return
    # Row by row, `datasets` would make a table of each row and store the state of the reader for it.
    first = num_used = 0
    for table in reader.with_format("arrow").iter(_ROWS_PER_READ):
        values = None if column is None else table[column].to_pylist()
        used = [row for row in range(len(table)) if values is None or is_used(values[row])]
        chosen = used[max(start - num_used, (start - num_used) % step) :: step]
        if chosen:
            rows = table if len(chosen) == len(table) else table.take(chosen)
            yield from zip((first + row for row in chosen), rows.to_pylist(), strict=True)
        first, num_used = first + len(table), num_used + len(used)


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
