"""Checkpoints: format, write, prune, resume. `model_folder.py` finds and verifies them.

    checkpoints/step_00001000/
        unet/  ema/              networks in diffusers format; ema_sigma_*/ with training.posthoc_ema
        optimizer.safetensors    tensors of the optimizer, named parameter/key
        objective.safetensors    loss history of each timestep; with loss-aware timesteps
        augmentation.safetensors the embedding of data.augmentation and its EMAs, which the networks are saved without
        trainer_state.json       counters and other plain values
        config.yaml              the configuration of the run
        manifest.json            the step, and sha256 and size of every file above

A checkpoint is written to a temporary folder, every file and folder is synced, and the folder is renamed last: after a
kill or a power failure it is complete or absent. Older checkpoints are removed only after that. No file is a pickle.

With training.async_checkpoint the loop only copies the tensors to host memory, and a thread writes the copies. The next
save waits for it, as do the last save, a stop signal and an error in the loop. A checkpoint that must succeed, in the
last step or after a signal, is written from the live tensors before the call returns.

trainer_state.json is the union of the `state_dict` of the parts that `Checkpointer` is built with. To add a value,
return it there and restore it in `load_state_dict`; counts begin with num_ and must be non-negative integers.
"""

import json
import logging
import shutil
import stat
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.stateful import Stateful

from ddpm_hf import distributed
from ddpm_hf.config import TRAIN_DATASET, ConfigError, RunConfig, changed_settings, changed_too_late, read_config_dict
from ddpm_hf.config.launcher import PRECISIONS, Precision
from ddpm_hf.data import ClassOrder, ImageSet, ImageStream
from ddpm_hf.files import (
    MANIFEST,
    MODEL_CONFIG,
    RUN_CONFIG,
    TRAINER_STATE,
    format_bytes,
    format_count,
    read_json,
    sync,
    sync_tree,
)
from ddpm_hf.model_folder import (
    CHECKPOINT_SCHEMA,
    Checkpoint,
    CheckpointError,
    checkpoint_files,
    checkpoint_folders,
    describe_file,
    find_latest,
    set_aside,
    step_of,
    verify_checkpoint,
)
from ddpm_hf.models import saved_parameters
from ddpm_hf.training.batches import TimestepSampler
from ddpm_hf.training.ema import EMA, is_snapshot_due
from ddpm_hf.training.logging import MetricsLog, say
from ddpm_hf.training.optim import check_finite, load_optimizer_state, optimizer_state
from ddpm_hf.training.run_dir import RunFolder

logger = logging.getLogger(__name__)

_OPTIMIZER = "optimizer.safetensors"
_OBJECTIVE = "objective.safetensors"
_AUGMENTATION = "augmentation.safetensors"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_TEMPORARY_PREFIX = ".writing-"


# ----------------------------------------------------------------------------------------------------------- write


def write_checkpoint(root: Path, step: int, write_content: Callable[[Path], None]) -> Checkpoint:
    """Write one checkpoint completely or not at all.

    Args:
        root: The folder of all checkpoints.
        step: Optimizer updates so far.
        write_content: Write all files except the manifest into a folder.

    Returns:
        The checkpoint. A valid one of this step is kept as it is, because a step always gives the same content.
    """
    root.mkdir(parents=True, exist_ok=True)
    sync(root.parent)
    remove_unfinished(root)
    final = root / f"step_{step:08d}"
    if final.exists():
        try:
            return verify_checkpoint(final)
        except CheckpointError:
            set_aside(final)
    temporary = root / f"{_TEMPORARY_PREFIX}{final.name}"
    temporary.mkdir()
    try:
        write_content(temporary)
        write_manifest(temporary, step)
        sync_tree(temporary)
        temporary.rename(final)
        sync(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Checkpoint(final, step)


def write_manifest(folder: Path, step: int) -> None:
    """Write the manifest of a folder, and give its files the permissions of the umask (safetensors writes 0600)."""
    files = {str(file.relative_to(folder)): describe_file(file) for file in checkpoint_files(folder)}
    content = json.dumps({"schema_version": CHECKPOINT_SCHEMA, "step": step, "files": files}, indent=2)
    manifest = folder / MANIFEST
    manifest.write_text(content, encoding="utf-8")
    # The umask can only be read by changing it, which would affect files that other threads create.
    mode = stat.S_IMODE(manifest.stat().st_mode)
    for file in checkpoint_files(folder):
        file.chmod(mode)


# ----------------------------------------------------------------------------------------------------------- prune


def prune(root: Path, num_kept: int, best_step: int | None = None) -> None:
    """Remove all but the newest checkpoints and the best one; warn about one that cannot be removed."""
    try:
        old = checkpoint_folders(root)[:-num_kept]
    except OSError as error:
        logger.warning("Old checkpoints in %s could not be listed: %s", root, error)
        return
    for path in old:
        if step_of(path) == best_step:
            continue
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning("The old checkpoint %s could not be removed: %s", path, error)


def remove_after(root: Path, step: int) -> None:
    """Remove the folders of later steps, which the run is about to repeat."""
    for path in checkpoint_folders(root):
        if step_of(path) > step:
            shutil.rmtree(path)


def remove_unfinished(root: Path) -> None:
    """Remove temporary folders that a kill left behind."""
    for path in root.glob(f"{_TEMPORARY_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------- content


class CheckpointFiles(NamedTuple):
    """The files of a checkpoint except the manifest.

    Attributes:
        tensors: Path of each safetensors file -> its tensors by name.
        texts: Path of each other file -> its text.
    """

    tensors: dict[str, dict[str, torch.Tensor]]
    texts: dict[str, str]


def snapshot_files(
    unet: UNet2DModel,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    timestep_sampler: TimestepSampler,
    state: Mapping[str, Any],
    config_yaml: str,
) -> CheckpointFiles:
    """Return the files of a checkpoint. Their tensors are those of the run, not copies."""
    names = [name for name, _ in unet.named_parameters()]
    moments, scalars = optimizer_state(optimizer, names)
    weights = unet.state_dict()
    parameters = {"unet": list(unet.parameters())} | {name: ema.tensors(name) for name in ema.names}
    networks: dict[str, dict[str, torch.Tensor]] = {}
    left_out: dict[str, torch.Tensor] = {}
    for network, values in parameters.items():
        named = dict(zip(names, values, strict=True))
        networks[network] = weights | {name: value for name, value in named.items() if name in weights}
        left_out |= {f"{network}.{name}": value.detach() for name, value in named.items() if name not in weights}
    tensors = {f"{name}/{_WEIGHTS}": network for name, network in networks.items()} | {_OPTIMIZER: moments}
    if left_out:
        tensors[_AUGMENTATION] = left_out
    if learned := timestep_sampler.state_dict():
        tensors[_OBJECTIVE] = learned
    texts = {f"{name}/{MODEL_CONFIG}": unet.to_json_string() for name in networks}
    texts[TRAINER_STATE] = json.dumps({**state, "optimizer": scalars}, indent=2)
    texts[RUN_CONFIG] = config_yaml
    return CheckpointFiles(tensors, texts)


def write_files(folder: Path, files: CheckpointFiles) -> None:
    """Write the files of a checkpoint; a network has the files that diffusers' save_pretrained would write.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    for path in (*files.tensors, *files.texts):
        (folder / path).parent.mkdir(exist_ok=True)
    for path, text in files.texts.items():
        (folder / path).write_text(text, encoding="utf-8")
    try:
        for path, tensors in files.tensors.items():
            metadata = {"format": "pt"} if path.endswith(_WEIGHTS) else None
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


class Snapshot(NamedTuple):
    """The content of a checkpoint except the networks.

    Attributes:
        state: Content of trainer_state.json.
        optimizer: Tensors of the optimizer.
        learned: Tensors of the timestep sampler.
    """

    state: dict[str, Any]
    optimizer: dict[str, torch.Tensor]
    learned: dict[str, torch.Tensor]


def read_snapshot(folder: Path, unet: UNet2DModel, ema: EMA) -> Snapshot:
    """Read the content of a verified checkpoint; load the networks into `unet` and `ema`."""
    state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
    for name, value in state.items():
        is_count = name == "global_step" or name.startswith("num_")
        if is_count and (not isinstance(value, int) or value < 0):
            raise ValueError(f"{name} is {value!r}; it must be a non-negative integer")
    left_out = load_file(folder / _AUGMENTATION) if (folder / _AUGMENTATION).exists() else {}
    for name in ema.names:
        with ema.swapped_in(name):
            _load_network(unet, folder, name, left_out)
    _load_network(unet, folder, "unet", left_out)
    learned = load_file(folder / _OBJECTIVE) if (folder / _OBJECTIVE).exists() else {}
    return Snapshot(state, load_file(folder / _OPTIMIZER), learned)


@torch.no_grad()
def _load_network(unet: UNet2DModel, folder: Path, name: str, left_out: Mapping[str, torch.Tensor]) -> None:
    """Load the weights of a network, and its parameters that a saved network lacks."""
    unet.load_state_dict(load_file(folder / name / _WEIGHTS))
    for parameter_name in dict(unet.named_parameters()).keys() - saved_parameters(unet).keys():
        unet.get_parameter(parameter_name).copy_(left_out[f"{name}.{parameter_name}"])


class DataState:
    """The data in a checkpoint: the identity of the training set, or the position of each rank in its stream.

    Args:
        images: The training images.
        source: data.source, for messages.
        output_dir: The run folder, for messages.
        class_order: How its class folders are sorted.
    """

    def __init__(
        self, images: ImageSet | ImageStream, source: str, output_dir: Path, class_order: ClassOrder = "numbers"
    ) -> None:
        self._images, self._source, self._output_dir, self._class_order = images, source, output_dir, class_order

    def state_dict(self) -> dict[str, Any]:
        """Collective: return the values named as in trainer_state.json."""
        if isinstance(self._images, ImageStream):
            position = self._images.trained_position or self._images.position
            streams = distributed.gather_json(asdict(position))
            return {"num_images": 0, "data_digest": "", "streams": streams, "class_order": self._class_order}
        return {
            "num_images": len(self._images),
            "data_digest": self._images.digest,
            "streams": [],
            "class_order": self._class_order,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that the data are those of the checkpoint; continue a stream at its position.

        Decoded images come in the same order on any number of processes. Streams are different ones then, and restart
        the epoch that they were in.

        Raises:
            ConfigError: The data have changed.
        """
        rank, num_processes = distributed.rank(), distributed.world_size()
        if not isinstance(self._images, ImageStream):
            self._check_identity(state)
            num_before = len(state["loss_sums"])  # one list per process
            if num_before not in (0, num_processes) and rank == 0:
                logger.warning(
                    "The run used %s and now uses %d. It continues with the same images, noise and labels, each "
                    "exactly once, but weights agree to rounding only, and dropout uses other masks.",
                    format_count(num_before, "process"),
                    num_processes,
                )
            return
        streams = state["streams"]
        if len(streams) == num_processes:
            self._images.go_to(streams[rank])
            return
        epoch = min((stream["epoch"] for stream in streams), default=0)
        if rank == 0:
            logger.warning(
                "The stream was read by %s and is now read by %d. It restarts epoch %d, so samples of that epoch that "
                "were used before are repeated.",
                format_count(len(streams), "process"),
                num_processes,
                epoch,
            )
        self._images.go_to({"epoch": epoch})

    def _check_identity(self, state: Mapping[str, Any]) -> None:
        assert isinstance(self._images, ImageSet)
        num_images, digest = len(self._images), self._images.digest
        if state["num_images"] == num_images and state["data_digest"] in (digest, ""):  # "": before there were digests
            return
        has_other_number = state["num_images"] != num_images
        now = f"{num_images} training images" if has_other_number else "different images or labels"
        before = f"{state['num_images']}" if has_other_number else "others"
        is_in_memory = self._source == TRAIN_DATASET
        name = "train_dataset" if is_in_memory else f"data.source {self._source}"
        fix = "pass the same images in the same order" if is_in_memory else "restore the data"
        raise ConfigError(
            f"{name} has {now}, but the run in {self._output_dir} started with {before}; {fix}, or choose another "
            "training.output_dir."
        )


# ------------------------------------------------------------------------------------------------------ background


class HostCopy:
    """Host memory for the tensors of a checkpoint, allocated by the first copy and reused by the next ones.

    Tensors on a CUDA device get pinned memory. Their copies are queued on the current stream, where they come before
    the next update of the tensors, and the host does not wait for them.

    Args:
        keeps_reserve: Whether to leave half of the available memory unused.
    """

    def __init__(self, *, keeps_reserve: bool) -> None:
        self._keeps_reserve = keeps_reserve
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def copy(self, files: CheckpointFiles) -> CheckpointFiles:
        """Return the files with copies of the tensors, which are complete after `wait` and valid until the next copy.

        Raises:
            MemoryError: The host has no memory for the copies.
        """
        named = {(path, name): tensor for path, tensors in files.tensors.items() for name, tensor in tensors.items()}
        self._allocate({key: tensor for key, tensor in named.items() if not self._fits(key, tensor)})
        for key, tensor in named.items():
            self._buffers[key].copy_(tensor, non_blocking=tensor.is_cuda)
        device = next((tensor.device for tensor in named.values() if tensor.is_cuda), None)
        self._copied = None if device is None else torch.cuda.current_stream(device).record_event()
        copies = {path: {name: self._buffers[path, name] for name in files.tensors[path]} for path in files.tensors}
        return files._replace(tensors=copies)

    def wait(self) -> None:
        """Wait until the device has made the last copy; call it from any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _fits(self, key: tuple[str, str], tensor: torch.Tensor) -> bool:
        buffer = self._buffers.get(key)
        return buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype

    def _allocate(self, missing: Mapping[tuple[str, str], torch.Tensor]) -> None:
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in missing.values())
        available = available_memory()
        if self._keeps_reserve and num_bytes > available / 2:
            raise MemoryError(f"{format_bytes(num_bytes)} of {format_bytes(available)} available")
        try:
            for key, tensor in missing.items():
                self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        except RuntimeError as error:  # PyTorch's only type for this on the host
            raise MemoryError(str(error).splitlines()[0]) from error


def available_memory() -> float:
    """Return the bytes of host memory that are available without swapping; infinite if the system does not say."""
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text(encoding="utf-8").splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 2**10
    return float("inf")


class _Writing(threading.Thread):
    """Write one checkpoint. No daemon: at its exit, Python waits for the thread.

    Args:
        step: The step of the checkpoint.
        write: Returns whether the checkpoint was written.
    """

    def __init__(self, step: int, write: Callable[[], bool]) -> None:
        super().__init__(name=f"checkpoint of step {step}")
        self._write = write
        self._is_written = False
        self._error: BaseException | None = None

    def run(self) -> None:
        """Write, in the thread."""
        try:
            self._is_written = self._write()
        except BaseException as error:
            self._error = error

    def result(self) -> bool:
        """Wait for the thread and return whether the checkpoint was written; raise what it raised."""
        while self.is_alive():
            self.join(timeout=0.1)  # a signal that another thread received is handled between two calls
        if self._error is not None:
            raise self._error
        return self._is_written


# ------------------------------------------------------------------------------------------------- save and resume


def choose_checkpoint(folder: RunFolder, config: RunConfig, *, is_dry_run: bool = False) -> Checkpoint | None:
    """Return the newest valid checkpoint of a run, or None if it has none.

    Warn about newer checkpoints that are damaged and set them aside, except in a dry run; warn about changed settings.

    Raises:
        ValueError: All checkpoints are damaged, the run has other settings, or it is finished and a changed setting
            would come too late.
    """
    latest, damaged = find_latest(folder.checkpoints)
    for line in damaged:
        logger.warning("Skipped a damaged checkpoint: %s", line)
    if latest is None:
        return None
    fixed, free = changed_settings(_settings_of(latest), config)
    if fixed:
        raise ConfigError(
            f"{folder.path} holds a run with other settings ({'; '.join(fixed)}); restore them, or choose another "
            "training.output_dir."
        )
    if latest.step > config.training.num_steps:
        raise ConfigError(
            f"{folder.path} is already at step {latest.step}, beyond training.num_steps {config.training.num_steps}; "
            f"set at least {latest.step}, or choose another training.output_dir."
        )
    if latest.step == config.training.num_steps and (late := changed_too_late(free)):
        raise ConfigError(
            f"{folder.path} holds a finished run, which was trained with other settings ({'; '.join(late)}); restore "
            "them, set a larger training.num_steps to train on with these, or choose another training.output_dir."
        )
    for line in free:
        logger.warning("Continuing with a changed setting: %s", line)
    if not is_dry_run:
        for line in damaged:
            set_aside(folder.checkpoints / line.partition(":")[0])
    return latest


def stored_precision(root: Path) -> Precision | None:
    """Return training.mixed_precision of the newest checkpoint, which is not verified yet; None if there is none."""
    for path in (folder for folder in _newest_first(root) if (folder / RUN_CONFIG).is_file()):
        try:
            precision = _settings_of(Checkpoint(path, step_of(path)))["training"]["mixed_precision"]
        except (OSError, KeyError, CheckpointError):
            continue
        return next((known for known in PRECISIONS if known == precision), None)
    return None


def stored_class_order(root: Path) -> ClassOrder:
    """Return how a run sorts its class folders, according to its newest checkpoint, which is not verified yet.

    A checkpoint of version 0.1 does not say it, and sorts them as text.
    """
    for path in _newest_first(root):
        try:
            state = read_json(path / TRAINER_STATE)
        except (OSError, ValueError):
            continue
        return "numbers" if state.get("class_order") == "numbers" else "text"
    return "numbers"


def _newest_first(root: Path) -> list[Path]:
    """Return the folders of the checkpoints; none if they cannot be listed, which `choose_checkpoint` reports."""
    try:
        return checkpoint_folders(root)[::-1]
    except (OSError, CheckpointError):
        return []


def _settings_of(checkpoint: Checkpoint) -> dict[str, dict[str, object]]:
    """Return the configuration that a checkpoint was written with."""
    try:
        settings = read_config_dict(checkpoint.path / RUN_CONFIG)
    except (FileNotFoundError, UnicodeDecodeError, ConfigError):
        settings = None
    if not isinstance(settings, dict) or not all(isinstance(section, dict) for section in settings.values()):
        raise CheckpointError(
            f"{checkpoint.path} holds no configuration of a run; restore it, or choose another training.output_dir."
        )
    return settings


_TENSOR_HEADER_BYTES = 128
"""Size of the entry of one tensor in the header of a safetensors file, roughly."""


class Checkpointer:
    """Save and resume one run on all ranks. Rank 0 alone reads and writes the run folder and broadcasts what it reads.

    Used as a context manager around the loop, it waits at the end for a checkpoint that is being written.

    Args:
        config: The configuration of the run.
        folder: The run folder, locked by rank 0.
        metrics: Its log lines.
        unet: The network.
        ema: Its EMAs.
        optimizer: Its optimizer.
        timestep_sampler: Its timestep sampler.
        parts: Everything with plain values in trainer_state.json; their `state_dict` may be collective. One of them
            has "global_step" and "best".
        on_written: Called on rank 0, in any thread, with the step of a checkpoint that was written, and with the names
            of it and of the best one.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        metrics: MetricsLog,
        *,
        unet: UNet2DModel,
        ema: EMA,
        optimizer: torch.optim.Optimizer,
        timestep_sampler: TimestepSampler,
        parts: Sequence[Stateful],
        on_written: Callable[[int, Sequence[str]], None] | None = None,
    ) -> None:
        self._on_written = on_written
        self._config, self._config_yaml = config, config.to_yaml()
        self._folder = folder
        self._metrics = metrics
        self._unet, self._ema, self._optimizer = unet, ema, optimizer
        self._timestep_sampler = timestep_sampler
        self._parts = [*parts, ema]
        async_checkpoint = config.training.async_checkpoint
        self._host_copy = HostCopy(keeps_reserve=async_checkpoint == "auto") if async_checkpoint else None
        self._writing: _Writing | None = None  # on rank 0
        self._is_written = True  # on rank 0, of the last checkpoint that is not being written
        self._is_unconfirmed = False  # on all ranks

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writing is not None and self._writing.is_alive():
            say(f"Waiting until the {self._writing.name} is written ...")
        self.join()

    @property
    def checkpoint_bytes(self) -> int:
        """Approximate size of a checkpoint: the weights, their EMAs, and two moments of each weight."""
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self._unet.parameters())
        averages = sum(average.numel() * average.element_size() for average in self._ema.tensors())
        headers = 4 * _TENSOR_HEADER_BYTES * sum(1 for _ in self._unet.parameters())
        return int(3 * weights + averages + headers)

    @property
    def ema_snapshot_bytes(self) -> int:
        """Approximate size of a snapshot of posthoc_ema: two EMAs in float32."""
        return sum(2 * 4 * parameter.numel() + 2 * _TENSOR_HEADER_BYTES for parameter in self._unet.parameters())

    def num_ema_snapshots(self, after_step: int = 0) -> int:
        """Return the number of snapshots that the run stores after a step."""
        training = self._config.training
        if not training.posthoc_ema:
            return 0
        return sum(is_snapshot_due(step, training) for step in range(after_step + 1, training.num_steps + 1))

    def check(self) -> None:
        """Collective: raise what `resume` would raise about the run folder, without changing anything."""
        distributed.on_rank_0(lambda: self._check_space(choose_checkpoint(self._folder, self._config, is_dry_run=True)))

    def resume(self) -> None:
        """Collective: restore the newest valid checkpoint, if there is one, and prepare the run folder.

        Raises:
            ValueError: The checkpoints cannot be continued with this configuration, or the disk has too little space.
        """
        found = distributed.on_rank_0(self._read)
        step = 0
        if distributed.broadcast_json(found is not None):
            path, snapshot = found if found is not None else (Path(), None)
            path = Path(distributed.broadcast_json(str(path)))
            state = distributed.broadcast_json(snapshot and snapshot.state)
            distributed.broadcast_tensors([*self._unet.parameters(), *self._ema.tensors()])
            device = self._unet.device
            moments = distributed.broadcast_named_tensors(snapshot and snapshot.optimizer, device)
            learned = distributed.broadcast_named_tensors(snapshot and snapshot.learned, device)
            fresh = self._state_dict()
            distributed.on_every_rank(lambda: self._load(path, state, fresh, moments, learned))
            step = state["global_step"]
        distributed.on_rank_0(lambda: self._prepare_folder(step))

    def save(self, *, must_succeed: bool) -> None:
        """Collective: write a checkpoint on rank 0 and remove old ones; `wait` returns whether it was written.

        With training.async_checkpoint a thread writes it, unless it must succeed. Ranks other than 0 do not wait for
        the thread before their next save.

        Args:
            must_succeed: Whether a full disk is an error, because work would be lost; otherwise it is a warning.

        Raises:
            OSError: The checkpoint must succeed and cannot be written.
            ValueError: The run folder was replaced by something else.
            NonFiniteTraining: The weights are not finite.
            ProcessesDiffer: The processes do not hold the same weights.
        """
        distributed.check_same(self._named_weights())
        state = self._state_dict()
        check_finite([*self._unet.parameters(), *self._ema.tensors()], state["global_step"])
        distributed.on_rank_0(lambda: self._save(state, must_succeed))
        self._is_unconfirmed = True

    def wait(self) -> bool:
        """Collective: wait until the last checkpoint is written; return False if it could not be written."""
        if not self._is_unconfirmed:
            return True
        is_written = bool(distributed.broadcast_json(distributed.on_rank_0(self.join)))
        self._is_unconfirmed = False
        return is_written

    def join(self) -> bool:
        """Wait until this rank has written its last checkpoint; return False if it could not be written."""
        if self._writing is not None:
            self._is_written = self._writing.result()
            self._writing = None
        return self._is_written

    def _state_dict(self) -> dict[str, Any]:
        """Collective: return the union of the plain values of all parts."""
        state: dict[str, Any] = {}
        for part in self._parts:
            state |= part.state_dict()
        return state

    def _read(self) -> tuple[Path, Snapshot] | None:
        """Read the newest valid checkpoint."""
        latest = choose_checkpoint(self._folder, self._config)
        self._check_space(latest)
        if latest is None:
            return None
        say(f"Continuing from step {latest.step} of {self._config.training.num_steps} ({latest.path}).")
        with _resuming(latest.path):
            snapshot = read_snapshot(latest.path, self._unet, self._ema)
            if snapshot.state["global_step"] != latest.step:
                raise ValueError(f"its counters are those of step {snapshot.state['global_step']}")
        return latest.path, snapshot

    def _load(
        self,
        path: Path,
        state: dict[str, Any],
        fresh: dict[str, Any],
        moments: dict[str, torch.Tensor],
        learned: dict[str, torch.Tensor],
    ) -> None:
        """Restore everything except the networks; values that the checkpoint does not have stay as in a fresh run."""
        with _resuming(path):
            scalars = state.pop("optimizer", {})
            if unknown := sorted(state.keys() - fresh.keys()):
                raise ValueError(f"this version does not know {unknown[0]} in {TRAINER_STATE}")
            names = [name for name, _ in self._unet.named_parameters()]
            load_optimizer_state(self._optimizer, names, moments, scalars)
            self._timestep_sampler.load_state_dict(learned)
            for part in self._parts:
                part.load_state_dict(fresh | state)

    def _prepare_folder(self, step: int) -> None:
        """Write the configuration; cut metrics and EMA snapshots back to the checkpoint."""
        self._folder.write_config(self._config_yaml)
        remove_after(self._folder.ema_snapshots, step)
        self._metrics.cut_after(step)

    def _named_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights and all their EMAs."""
        weights: dict[str, torch.Tensor] = dict(self._unet.named_parameters())
        names = list(weights)
        for ema_name in self._ema.names:
            tensors = zip(names, self._ema.tensors(ema_name), strict=True)
            weights |= {f"{ema_name} of {name}": tensor for name, tensor in tensors}
        return weights

    def _save(self, state: dict[str, Any], must_succeed: bool) -> None:
        """Write a checkpoint on this rank, or start a thread that writes it."""
        self.join()
        step = state["global_step"]
        if not self._attempt(self._folder.ensure_held, step, must_succeed):
            self._is_written = False
            return
        files = snapshot_files(self._unet, self._ema, self._optimizer, self._timestep_sampler, state, self._config_yaml)
        copies = None if must_succeed else self._copy_to_host(files)
        if copies is None:
            self._is_written = self._attempt(lambda: self._write(files, state), step, must_succeed)
        else:
            self._writing = _Writing(step, lambda: self._attempt(lambda: self._write(copies, state), step, False))
            self._writing.start()

    def _attempt(self, action: Callable[[], object], step: int, must_succeed: bool) -> bool:
        """Return whether an action worked; a full disk is a warning, or an error if the checkpoint must succeed."""
        try:
            action()
        except OSError as error:
            message = f"The checkpoint of step {step} could not be written ({error.strerror or error})"
            if must_succeed:
                raise OSError(f"{message}; make room in {self._folder.path} and run the same command again.") from error
            logger.warning("%s; training continues, the older checkpoints are intact.", message)
            return False
        return True

    def _copy_to_host(self, files: CheckpointFiles) -> CheckpointFiles | None:
        """Return the files with copies of the tensors, or None if they are to be written without a copy."""
        if self._host_copy is None:
            return None
        try:
            return self._host_copy.copy(files)
        except MemoryError as error:
            self._host_copy = None
            logger.warning(
                "There is no host memory for a copy of the checkpoint (%s), so training waits while checkpoints are "
                "written, as with training.async_checkpoint false.",
                error,
            )
            return None

    def _write(self, files: CheckpointFiles, state: dict[str, Any]) -> None:
        """Write a checkpoint and prune old ones. Called in a thread, it only uses its arguments and the disk."""
        if self._host_copy is not None:
            self._host_copy.wait()
        write_checkpoint(self._folder.checkpoints, state["global_step"], lambda folder: write_files(folder, files))
        best_step = state["best"]["step"] if state["best"] else None
        prune(self._folder.checkpoints, self._config.training.num_checkpoints_kept, best_step)
        if self._on_written is not None:
            self._on_written(state["global_step"], self.names_of(state["global_step"], best_step))

    def names_of(self, step: int, best_step: int | None) -> list[str]:
        """Return the names of the checkpoints of a step and of the best one, as far as there is one."""
        folders = checkpoint_folders(self._folder.checkpoints)
        return [path.name for path in folders if step_of(path) in (step, best_step)]

    def _check_space(self, latest: Checkpoint | None) -> None:
        """Raise ConfigError unless the disk has space for two checkpoints, or for one more, and for EMA snapshots."""
        if latest is not None and latest.step == self._config.training.num_steps:
            return
        num_snapshots = self.num_ema_snapshots(0 if latest is None else latest.step)
        needed = self.checkpoint_bytes * (2 if latest is None else 1) + num_snapshots * self.ema_snapshot_bytes
        free = shutil.disk_usage(self._folder.path).free
        if free < needed:
            what, advice = "two checkpoints" if latest is None else "one more checkpoint", ""
            if num_snapshots:
                what = f"{what} and {format_count(num_snapshots, 'EMA snapshot')} (training.posthoc_ema)"
                advice = ", raise training.posthoc_ema_every_steps"
            raise ConfigError(
                f"training.output_dir {self._folder.path} has {format_bytes(free)} free, but needs "
                f"{format_bytes(needed)} for {what}; make room{advice}, or choose another folder."
            )


@contextmanager
def _resuming(path: Path) -> Iterator[None]:
    """Turn errors about the content of an intact checkpoint into CheckpointError."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, ConfigError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
        reason = textwrap.shorten(what or type(error).__name__, 200, placeholder=" ...")
        raise CheckpointError(
            f"{path} is intact, but this version cannot continue from it ({reason}); restore another one, use the "
            "version that wrote it, or choose another training.output_dir."
        ) from error
