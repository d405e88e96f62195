"""What a checkpoint knows of the data: which they were, and where every rank was in its stream."""

import dataclasses
import logging
from pathlib import Path

from ddpm_hf.config import ConfigError
from ddpm_hf.data import ImageSet, ImageStream
from ddpm_hf.training import processes
from ddpm_hf.training.snapshot import TrainerState

logger = logging.getLogger(__name__)


def write_state(images: ImageSet | ImageStream, state: TrainerState) -> None:
    """Collective: notes what the run depends on in the data, and where every rank is in its stream."""
    if isinstance(images, ImageStream):
        state.streams = processes.gather_json(dataclasses.asdict(images.position))
    else:
        state.num_images, state.data_digest = len(images), images.digest


def check_state(images: ImageSet | ImageStream, state: TrainerState, source: str, folder: Path) -> None:
    """Refuses to go on with other data than those the run began with.

    Args:
        images: The training images; of a stream nothing is known that could be compared.
        state: What the checkpoint says.
        source: Where the images come from.
        folder: The folder of the run.

    Raises:
        ConfigError: If the data have changed.
    """
    if isinstance(images, ImageStream):
        return
    before, now = (state.num_images, state.data_digest), (len(images), images.digest)
    if before == now or before == (len(images), ""):  # a checkpoint of before there were digests
        return
    what = f"{now[0]} training images" if before[0] != now[0] else "other images or labels than before"
    count = f"{before[0]}" if before[0] != now[0] else "those"
    raise ConfigError(
        f"{source} has {what}, but the run in {folder} began with {count}; restore the data, or choose another "
        "training.output_dir."
    )


def go_to(images: ImageSet | ImageStream, state: TrainerState, rank: int, num_processes: int) -> None:
    """Goes on in the data where the run stopped, and says what another number of processes changes.

    Decoded images come in the same order on any number of processes. Streams are other ones then, and begin again with
    the epoch they were in.
    """
    num_before = len(state.loss_sums)  # one list a process
    if not isinstance(images, ImageStream):
        if num_before not in (0, num_processes) and rank == 0:
            logger.warning(
                "The run was on %s and is now on %d: it goes on with the same images, noise and labels, none left out "
                "and none repeated, but the weights are the same to rounding only, and dropout draws other masks.",
                _processes(num_before), num_processes,
            )  # fmt: skip
        return
    if len(state.streams) == num_processes:
        images.go_to(state.streams[rank])
        return
    epoch = min((stream["epoch"] for stream in state.streams), default=0)
    if rank == 0:
        logger.warning(
            "The stream was shared by %s and is now by %d: it begins again with epoch %d, so the samples of that epoch "
            "which were already seen repeat.",
            _processes(len(state.streams)), num_processes, epoch,
        )  # fmt: skip
    images.go_to({"epoch": epoch})


def _processes(number: int) -> str:
    """Returns a number of processes in words."""
    return f"{number} process{'es' if number > 1 else ''}"
