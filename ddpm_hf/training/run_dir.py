"""The run folder: ownership, lock, and the record of a run in a saved pipeline.

outputs/digits/
    config.yaml      the resolved configuration; its first line marks the folder as a run
    checkpoints/     see checkpoint.py
    ema_snapshots/   see posthoc_ema.py; with training.posthoc_ema
    metrics.jsonl    one line per log interval
    trackers.json    id of the run in its trackers
    previews/        sample grids during training
    vae/             the VAE of a run on latents
    hub/             what is pushed during training; with hub.push_to_hub
    pipeline/        the trained pipeline, for DiffusionPipeline.from_pretrained
    evaluations/     evaluations of earlier pipelines of the run
"""

import errno
import fcntl
import filecmp
import gc
import logging
import os
import platform
import shutil
import socket
import weakref
from collections.abc import Sized
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import UNet2DModel

from ddpm_hf import __version__
from ddpm_hf.config import ConfigError, DistillationConfig, RunConfig
from ddpm_hf.data import ImageSet, ImageStream
from ddpm_hf.files import (
    CHECKPOINTS_DIR,
    EMA_SNAPSHOTS_DIR,
    EVALUATION,
    EVALUATION_PICTURE,
    EVALUATIONS_DIR,
    HUB_DIR,
    METRICS,
    MODEL_INDEX,
    PIPELINE_DIR,
    PREVIEWS_DIR,
    RUN_CONFIG,
    SCHEDULER_CONFIG,
    TRAINING_SUMMARY,
    VAE_DIR,
    atomic_write,
    read_json,
    write_text,
)
from ddpm_hf.model_folder import RUN_MARK, content_of, has_run_mark, name_or_id
from ddpm_hf.models import saved_parameters
from ddpm_hf.training.logging import MetricsLog

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_NUM_LOCK_ATTEMPTS = 10
# Files of ours in a folder where no run was started: the lock, and a configuration that a kill left half written.
_NOT_CONTENT = (_LOCK, f".{RUN_CONFIG}.writing")


class RunLock:
    """Lock a run folder for one process; the system releases the lock when the process ends.

    A lock that is not used any more is released with the object. A forked process does not inherit it.

    Args:
        output_dir: The folder.
        holder: What holds the lock, for another Trainer of this process that is refused.

    Raises:
        ValueError: This or another process holds the lock.
        OSError: The lock file cannot be opened, or is a link.
    """

    _held: ClassVar["weakref.WeakSet[RunLock]"] = weakref.WeakSet()
    """The locks of this process."""

    def __init__(self, output_dir: Path, holder: str = "") -> None:
        self._path, self._holder = output_dir / _LOCK, holder
        for _ in range(_NUM_LOCK_ATTEMPTS):
            self._acquire()
            if self.is_held():
                break
            # Another process removed the file after we had opened it, so nobody else will see the file that we locked.
            self.release()
        else:
            raise OSError(errno.ESTALE, "its lock file keeps being replaced", str(self._path))
        with suppress(OSError):  # a full disk
            os.truncate(self._descriptor, 0)
            os.write(self._descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())

    def _acquire(self) -> None:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            if not _lock(descriptor):
                gc.collect()  # a Trainer of this process that nothing refers to any more
                if not _lock(descriptor):
                    raise ValueError(self._refusal(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        self._release = weakref.finalize(self, _unlock, descriptor)
        self._held.add(self)

    def _refusal(self, descriptor: int) -> str:
        """Return who holds the lock of a file, and what to do."""
        for lock in self._held:
            if os.path.sameopenfile(lock._descriptor, descriptor):
                holder = f" ({lock._holder})" if lock._holder else ""
                return (
                    f"another Trainer of this process holds {self._path.parent}{holder}; call its close() first, or "
                    "choose another training.output_dir."
                )
        pid, _, host = os.read(descriptor, 300).decode(errors="replace").strip().partition(" ")
        who = f"another process (pid {pid} on {host})" if pid.isdecimal() and host else "another process"
        return f"{who} is training in {self._path.parent}; wait for it, stop it, or choose another training.output_dir."

    def is_held(self) -> bool:
        """Return whether the locked file is still the lock file of the folder."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def is_own(self) -> bool:
        """Return whether this process holds the lock, and not its parent."""
        return self._release.alive

    def release(self) -> None:
        """Release the lock."""
        self._held.discard(self)
        self._release()

    @classmethod
    def _after_fork(cls) -> None:
        """Leave the locks to the parent, which releases them at its end although this process goes on."""
        for lock in list(cls._held):
            lock._release.detach()
            os.close(lock._descriptor)
        cls._held.clear()


os.register_at_fork(after_in_child=RunLock._after_fork)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked without Python still has the file open
    os.close(descriptor)


class RunFolder:
    """Paths and ownership of a run folder.

    Args:
        path: training.output_dir.
        holder: See `RunLock`.
    """

    def __init__(self, path: Path, holder: str = "") -> None:
        self.path, self._holder = path, holder
        self.config = path / RUN_CONFIG
        self.checkpoints = path / CHECKPOINTS_DIR
        self.ema_snapshots = path / EMA_SNAPSHOTS_DIR
        self.metrics = path / METRICS
        self.pipeline = path / PIPELINE_DIR
        self.evaluations = path / EVALUATIONS_DIR
        self.previews = path / PREVIEWS_DIR
        self.vae = path / VAE_DIR
        self.hub = path / HUB_DIR
        self._lock: RunLock | None = None
        self._config_text = ""
        self._created: list[Path] = []

    def acquire(self, resume: str) -> None:
        """Create the folder, check that it is empty or a run, and lock it, unless that is done.

        Args:
            resume: "auto" accepts a folder that holds a run, "none" does not.

        Raises:
            ValueError: The folder cannot be written, is in use, or holds something else.
        """
        if self._lock is not None:
            return
        try:
            self._created = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            content = self._content()
            if content and not has_run_mark(self.path):
                raise ConfigError(
                    f"training.output_dir {self.path} holds something else ({content[0]}); choose an empty or "
                    "a new folder."
                )
            if content and resume == "none":
                raise ConfigError(
                    f"training.output_dir {self.path} holds a run; set training.resume to auto to continue it, or "
                    "choose another folder."
                )
            self._lock = RunLock(self.path, self._holder)
        except OSError as error:
            raise ConfigError(
                f"training.output_dir {self.path} cannot be written ({error.strerror or error}); choose another folder."
            ) from None

    def ensure_held(self) -> None:
        """Check before a checkpoint is written that the folder still belongs to this process.

        A folder that was removed during training is created again.

        Raises:
            ValueError: Another process or other files have taken its place.
            OSError: It cannot be created.
        """
        if self._lock is None or self._lock.is_held():
            return
        has_content = self.path.exists() and bool(self._content())
        if has_content and not (self.config.is_file() and self.config.read_text(encoding="utf-8") == self._config_text):
            raise ConfigError(
                f"training.output_dir {self.path} was removed during training and now holds something else "
                f"({self._content()[0]}), which is left untouched; start again in another folder."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            lock = RunLock(self.path, self._holder)
        except ValueError as error:
            raise ConfigError(f"training.output_dir was removed during training, and now {error}") from None
        logger.warning("training.output_dir %s was removed during training; it is created again.", self.path)
        self._lock.release()
        self._lock = lock
        write_text(self.config, self._config_text)

    def release(self) -> None:
        """Release the lock; remove folders that this process created and wrote nothing to."""
        if self._lock is None or not self._lock.is_own():
            return
        if self._lock.is_held() and not self._content():
            for name in _NOT_CONTENT:
                (self.path / name).unlink(missing_ok=True)
        self._lock.release()
        self._lock = None
        for folder in self._created:
            with suppress(OSError):  # not empty, or gone
                folder.rmdir()

    def write_config(self, content: str) -> None:
        """Write the resolved configuration, which marks the folder as a run."""
        self._config_text = RUN_MARK + content
        write_text(self.config, self._config_text)

    def _content(self) -> list[str]:
        return [name for name in content_of(self.path) if name not in _NOT_CONTENT]


def summarize(
    config: RunConfig,
    step: int,
    *,
    images: ImageSet | ImageStream,
    unet: UNet2DModel,
    num_processes: int,
    metrics: MetricsLog,
    engine: str,
    latents: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of training_summary.json, which a model card shows.

    Args:
        config: The configuration of the run.
        step: Optimizer updates so far.
        images: The training images.
        unet: The network, on its training device.
        num_processes: Number of processes.
        metrics: The log lines of the run.
        engine: Whether the network is compiled, and its memory format.
        latents: Facts about the latents of a run on latents.

    Returns:
        JSON values. The seconds are those of training, without validation, previews and saving.
    """
    timed, learned, scored = (metrics.last(name) or {} for name in ("seconds", "loss", "score"))
    has_null_label = config.objective.class_dropout > 0
    return {
        "step": step,
        "num_steps": config.training.num_steps,
        "num_images_seen": step * config.training.train_batch_size,
        "seconds": timed.get("seconds"),
        "device": device_name(unet.device),
        "num_processes": num_processes,
        "engine": engine,
        "num_parameters": sum(parameter.numel() for parameter in saved_parameters(unet).values()),
        "base_model": name_or_id(config.model.from_pretrained) if config.model.from_pretrained else None,
        "data": {
            "source": name_or_id(config.data.source),
            "num_images": len(images) if isinstance(images, Sized) else None,
            "num_classes": unet.config.num_class_embeds and unet.config.num_class_embeds - has_null_label,
        },
        **({} if latents is None else {"latents": latents}),
        "distillation": summarize_distillation(config.distillation),
        "loss": learned.get("loss"),
        "score": {name: value for name, value in scored.items() if name.startswith("score")} or None,
        "versions": {"ddpm_hf": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def summarize_distillation(distillation: DistillationConfig) -> dict[str, Any] | None:
    """Return teacher, steps and guidance of a student; None for a run without a teacher."""
    if distillation.teacher is None:
        return None
    return {
        "teacher": name_or_id(distillation.teacher),
        "num_inference_steps": distillation.num_inference_steps,
        "guidance_scale": distillation.guidance_scale,
    }


def device_name(device: torch.device) -> str:
    """Return the product name of a GPU or of the CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def carry_over_additions(old: Path, new: Path, evaluations: Path) -> None:
    """Keep files that were added to a saved pipeline, such as evaluations, when the run saves its pipeline again.

    If network and scheduler are the same to the bit, all additional files are hard-linked or copied. Otherwise they are
    about another model: evaluation.json and evaluation.png go to `evaluations`, named by the step.

    Args:
        old: The pipeline that is about to be replaced; it need not exist.
        new: The complete new pipeline.
        evaluations: Folder of evaluations of earlier pipelines.
    """
    patterns = (MODEL_INDEX, f"scheduler/{SCHEDULER_CONFIG}", "unet/*")
    model = [path.relative_to(new) for pattern in patterns for path in new.glob(pattern) if path.is_file()]
    if all((old / name).is_file() and filecmp.cmp(old / name, new / name, shallow=False) for name in model):
        shutil.copytree(old, new, copy_function=_link_if_missing, dirs_exist_ok=True, ignore=_links)
        return
    for path in (old / EVALUATION, old / EVALUATION_PICTURE):
        if path.is_file():
            try:
                name = f"step_{read_json(old / TRAINING_SUMMARY)['step']:08d}"
            except (OSError, ValueError, KeyError, TypeError):
                name = "step_unknown"
            evaluations.mkdir(exist_ok=True)
            atomic_write(evaluations / f"{name}{path.suffix}", partial(shutil.copyfile, path))


def _links(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_symlink()]


def _link_if_missing(source: str, target: str) -> None:
    if os.path.exists(target):
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
