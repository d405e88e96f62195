"""The run folder: ownership, lock and record.

The folder of one run: whose it is, what lies where, and that nothing of anybody else's is overwritten.

outputs/digits/
    config.yaml      the resolved configuration; its first line marks the folder as a run
    checkpoints/     see checkpoint.py
    ema_snapshots/   see posthoc_ema.py; with training.posthoc_ema
    metrics.jsonl    one line a log interval
    trackers.json    the id of the run in its trackers, where it has some
    previews/        sample grids during training
    hub/             what is being pushed while training lasts; with hub.push_to_hub
    pipeline/        the trained pipeline, for DiffusionPipeline.from_pretrained

training_summary.json: what a saved pipeline says of its training, for a model card.
"""

import errno
import fcntl
import logging
import os
import platform
from collections.abc import Sized
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel

from ddpm_hf import __version__
from ddpm_hf.config import ConfigError, RunConfig
from ddpm_hf.data import ImageSet, ImageStream
from ddpm_hf.files import write_text
from ddpm_hf.training.logging import MetricsLog

_NUM_ATTEMPTS = 10


class RunLock:
    """Holds a run folder for one process; the system lets go of it when the process ends, however that happens."""

    def __init__(self, output_dir: Path) -> None:
        self._path = output_dir / ".lock"
        for _ in range(_NUM_ATTEMPTS):
            self._take()
            if self.is_held():
                return
            # A process that leaves removes the file of a folder it wrote nothing to. It did so after we had opened the
            # file, so that we hold one that nobody else will ever see.
            self.release()
        raise OSError(errno.ESTALE, "its lock file is another one whenever it is looked at", str(self._path))

    def _take(self) -> None:
        """Opens and locks the file, which must not be a link to somebody else's."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(
                f"another process is training in {self._path.parent}; wait for it, stop it, or choose another "
                "training.output_dir."
            ) from None

    def is_held(self) -> bool:
        """Tells whether the folder still has the file that was locked, so that others are kept out."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def release(self) -> None:
        """Lets go of the folder."""
        os.close(self._descriptor)


logger = logging.getLogger(__name__)

_MARK = "# A run of ddpm_hf. `ddpm-hf train --config` of this file repeats it.\n"
# Ours, but no sign that a run was begun: the lock, and a configuration that a kill left half written.
_TRACES = (".lock", ".config.yaml.writing")


class RunFolder:
    """Paths and ownership of a run folder.

    Args:
        path: training.output_dir.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.ema_snapshots = path / "ema_snapshots"
        self.pipeline = path / "pipeline"
        self.evaluations = path / "evaluations"
        self.previews = path / "previews"
        self.hub = path / "hub"
        self._lock: RunLock | None = None
        self._config = ""
        self._made: list[Path] = []

    def check(self, resume: str) -> None:
        """Makes the folder, makes sure that it is ours or empty, and holds it for this process.

        Args:
            resume: "auto" accepts a folder that holds a run, "none" does not.

        Raises:
            ValueError: If it cannot be written, is in use, or holds something else.
        """
        try:
            self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            content = self._content()
            if content and not self._is_run():
                raise ConfigError(
                    f"training.output_dir {self.path} holds something else ({sorted(content)[0]}); choose an empty or "
                    "a new folder."
                )
            if content and resume == "none":
                raise ConfigError(
                    f"training.output_dir {self.path} holds a run; set training.resume to auto to continue it, or "
                    "choose another folder."
                )
            self._lock = RunLock(self.path)
        except OSError as error:
            raise ConfigError(
                f"training.output_dir {self.path} cannot be written ({error.strerror or error}); choose another folder."
            ) from None

    def hold(self) -> None:
        """Makes sure, before a checkpoint is written, that the folder is there and belongs to this process.

        One that was removed in the middle of a run is made again, so that what the process knows is not lost.

        Raises:
            ValueError: If another process or something else has taken its place.
            OSError: If it cannot be made again.
        """
        if self._lock is None or self._lock.is_held():
            return
        config_path = self.path / "config.yaml"
        is_other = self.path.exists() and bool(self._content())
        if is_other and not (config_path.is_file() and config_path.read_text(encoding="utf-8") == self._config):
            raise ConfigError(
                f"training.output_dir {self.path} was removed while training, and holds something else now "
                f"({sorted(self._content())[0]}); training stops, so that this is left alone."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            lock = RunLock(self.path)
        except ValueError as error:
            raise ConfigError(f"training.output_dir was removed while training, and now {error}") from None
        logger.warning("training.output_dir %s was removed while training; it is made again.", self.path)
        self._lock.release()
        self._lock = lock
        write_text(config_path, self._config)

    def release(self) -> None:
        """Lets other processes use the folder; folders that nothing was written to go away again."""
        if self._lock is None:
            return
        if self._lock.is_held() and not self._content():
            for name in _TRACES:
                (self.path / name).unlink(missing_ok=True)
        self._lock.release()
        self._lock = None
        for folder in self._made:
            with suppress(OSError):  # it is in use, or gone
                folder.rmdir()

    def write_config(self, content: str) -> None:
        """Writes the resolved configuration, which also marks the folder as a run."""
        self._config = _MARK + content
        write_text(self.path / "config.yaml", self._config)

    def _is_run(self) -> bool:
        """Tells whether the folder was begun by `write_config`."""
        config_path = self.path / "config.yaml"
        return config_path.is_file() and config_path.read_bytes().startswith(_MARK.encode())

    def _content(self) -> list[str]:
        """Returns what is in the folder beside traces of a start."""
        return [entry.name for entry in self.path.iterdir() if entry.name not in _TRACES]


FILE_NAME = "training_summary.json"
_SCORE = "score"


def summarize(
    config: RunConfig,
    step: int,
    *,
    images: ImageSet | ImageStream,
    unet: UNet2DModel,
    num_processes: int,
    metrics: MetricsLog,
) -> dict[str, Any]:
    """Returns how long a network was trained on what.

    Args:
        config: The configuration of the run.
        step: Optimiser updates done.
        images: The training images.
        unet: The network, on the device that it is trained on.
        num_processes: How many train it together.
        metrics: Its lines of metrics.

    Returns:
        Values that JSON can hold. The seconds are those of training itself, without validation, previews and saving.
    """
    source = config.data.source
    timed, learned, scored = (metrics.last(name) or {} for name in ("seconds", "loss", _SCORE))
    return {
        "step": step,
        "num_steps": config.training.num_steps,
        "num_images_seen": step * config.training.train_batch_size,
        "seconds": timed.get("seconds"),
        "device": device_name(unet.device),
        "num_processes": num_processes,
        "num_parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "data": {
            # Of a path the name is enough: where it lies is no matter of whoever reads a model card.
            "source": Path(source).name if Path(source).expanduser().exists() else source,
            "num_images": len(images) if isinstance(images, Sized) else None,
            "num_classes": unet.config.num_class_embeds and unet.config.num_class_embeds - _has_null_label(config),
        },
        "loss": learned.get("loss"),
        "score": {name: value for name, value in scored.items() if name.startswith(_SCORE)} or None,
        "versions": {"ddpm_hf": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def _has_null_label(config: RunConfig) -> bool:
    """Whether one of the network's labels means "no class"."""
    return config.objective.class_dropout > 0


def device_name(device: torch.device) -> str:
    """Returns what a device is called by those who sell it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
