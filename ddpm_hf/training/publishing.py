"""What the trainer hands over to be published; how that is done is no matter of its own."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ddpm_hf.training.guard import NonFiniteTraining

logger = logging.getLogger(__name__)


class Publisher(Protocol):
    """Publishes a folder in the background, one at a time."""

    def is_free(self) -> bool:
        """Whether the one before is done; says how it went."""

    def start(self, folder: Path, step: int) -> None:
        """Begins to publish what lies in a folder, which stays as it is until it is done."""


def publish(publisher: Publisher, folder: Path, step: int, previews: Path, write: Callable[[Path], None]) -> None:
    """Hands the pipeline of a running training over, unless the one before is not done; never stops training.

    Args:
        publisher: What publishes it.
        folder: The folder to hand over, made anew.
        step: Updates done.
        previews: Folder of sample grids, the newest of which goes along.
        write: Writes the pipeline into a folder.
    """
    if not publisher.is_free():
        logger.warning("Step %d is not pushed to the Hub: the push before it is not done.", step)
        return
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder / "pipeline")
        for preview in sorted(previews.glob("step_*.png"))[-1:]:
            shutil.copyfile(preview, folder / "samples.png")
        publisher.start(folder, step)
    except (OSError, NonFiniteTraining) as error:
        logger.warning("Step %d is not pushed to the Hub (%s); training goes on.", step, error)
