"""Checkpoints: format, write, verify, prune and resume.

Checkpoints: written whole or not at all, verified before use, pruned only when a newer one is safe. Files only.

    checkpoints/step_00001000/
        unet/  ema/              networks in diffusers format; ema_sigma_*/ with training.posthoc_ema
        optimizer.safetensors    the optimiser's tensors, named like the parameters
        objective.safetensors    last losses at each timestep, where these are drawn by loss
        trainer_state.json       step, counters, gradient scaler, what the optimiser knows beside tensors
        config.yaml              the configuration of the run
        manifest.json            the step, and sha256 and size of every file above

A checkpoint is written under a temporary name, every file and folder is synced, and it is renamed last, so a kill or a
power cut at any moment leaves it whole or absent. No file of it is a pickle.

What a checkpoint holds: networks, the optimiser's moments and counters, to and from a folder.

What a checkpoint knows of the data: which they were, and where every rank was in its stream.

Which checkpoint a run goes on from, and whether it may with the configuration that is asked for.

What becomes of the pipeline that a run has already saved when the run saves its pipeline again.

What the trainer hands over to be published; how that is done is no matter of its own.

Saving and resuming on all ranks: rank 0 alone reads and writes the run folder, the others get what it read.

Every public function here is collective: all ranks must call it, in the same order.
"""

import dataclasses
import filecmp
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ddpm_hf import distributed
from ddpm_hf.config import ConfigError, RunConfig, changed_settings, changed_too_late, read_config_dict
from ddpm_hf.data import ImageSet, ImageStream
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation.verify import write_verification
from ddpm_hf.files import replace_folder, sync, sync_tree, write_whole
from ddpm_hf.training import ema, run_dir
from ddpm_hf.training.batches import TimestepSampler
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.logging import MetricsLog, say
from ddpm_hf.training.optim import NonFiniteTraining, Scalars, check_finite, pack, unpack
from ddpm_hf.training.run_dir import RunFolder

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_STEP_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY_PREFIX = ".writing-"
_DAMAGED_PREFIX = "damaged-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Args:
        path: Its folder.
        step: Optimiser updates done when it was written.
    """

    path: Path
    step: int


def write_checkpoint(root: Path, step: int, write_content: Callable[[Path], None]) -> Checkpoint:
    """Writes one checkpoint durably.

    Args:
        root: The folder of all checkpoints.
        step: Optimiser updates done.
        write_content: Writes all files but the manifest into the folder it is given.

    Returns:
        The checkpoint under its final name. A valid one of this step is left as it is, since a step is always the same.
    """
    root.mkdir(parents=True, exist_ok=True)
    sync(root.parent)
    remove_unfinished(root)
    final = root / _name(step)
    if final.exists():
        try:
            return verify_checkpoint(final)
        except CheckpointError:
            put_aside(final)
    temporary = root / f"{_TEMPORARY_PREFIX}{final.name}"
    temporary.mkdir()
    try:
        write_content(temporary)
        _write_manifest(temporary, step)
        sync_tree(temporary)
        temporary.rename(final)
        sync(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Checkpoint(final, step)


def verify_checkpoint(path: Path) -> Checkpoint:
    """Checks that every file of a checkpoint is there and is what was written.

    Raises:
        CheckpointError: If the folder is not a checkpoint or any file is missing, damaged, foreign or a link.
        PermissionError: If this user may not read it.
    """
    if _STEP_NAME.fullmatch(path.name) is None:
        raise CheckpointError(f"{path.name} is not named like a checkpoint (step_00001000)")
    if path.is_symlink():
        raise CheckpointError(f"{path.name} is a link")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if (version := manifest["schema_version"]) != SCHEMA_VERSION:
            raise CheckpointError(f"it was written by another version (schema {version}, this is {SCHEMA_VERSION})")
        step, name, files = manifest["step"], _name(manifest["step"]), dict(manifest["files"])
    except (CheckpointError, PermissionError):
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{MANIFEST} is missing or unreadable") from None
    if path.name != name:
        raise CheckpointError(f"it was renamed: {MANIFEST} says step {step}")
    try:
        present = {str(file.relative_to(path)) for file in _files(path)} - {MANIFEST}
    except PermissionError:
        raise  # that can be mended, and says nothing about the files
    except OSError as error:
        raise CheckpointError(f"its files cannot be listed ({error.strerror or error})") from None
    if missing := sorted(set(files) - present):
        raise CheckpointError(f"{missing[0]} is missing")
    if foreign := sorted(present - set(files)):
        raise CheckpointError(f"{foreign[0]} does not belong to it")
    for name, expected in sorted(files.items()):
        try:
            found = _describe(path / name)
        except PermissionError:
            raise
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read ({error.strerror or error})") from None
        if found != expected:
            raise CheckpointError(f"{name} is damaged (its sha256 is not the one in {MANIFEST})")
    return Checkpoint(path, step)


def find_latest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """Finds the newest valid checkpoint and reads nothing into memory.

    Returns:
        The checkpoint, or None where there is none, and one line for each newer one that was passed over.

    Raises:
        CheckpointError: If there are checkpoints but none is valid.
    """
    candidates = sorted(_checkpoint_dirs(root), key=_step_of, reverse=True)
    skipped: list[str] = []
    for path in candidates:
        try:
            return verify_checkpoint(path), skipped
        except CheckpointError as error:
            skipped.append(f"{path.name}: {error}")
    if candidates:
        raise CheckpointError(
            f"no checkpoint in {root} can be used ({'; '.join(skipped)}); restore one, or start anew in another "
            "training.output_dir"
        )
    return None, skipped


def put_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that it is kept for a look but never found again."""
    target = path.with_name(f"{_DAMAGED_PREFIX}{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)
    return target


def _name(step: int) -> str:
    """Returns the name of the folder of a step."""
    return f"step_{step:08d}"


def prune(root: Path, num_kept: int, best_step: int | None = None) -> None:
    """Removes all but the newest checkpoints and the best one; one that cannot be removed is named and left."""
    try:
        old = sorted(_checkpoint_dirs(root), key=_step_of)[:-num_kept]
    except OSError as error:
        logger.warning("Old checkpoints in %s could not be looked for: %s", root, error)
        return
    for path in old:
        if _step_of(path) == best_step:
            continue
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning("The old checkpoint %s could not be removed: %s", path, error)


def remove_after(root: Path, step: int) -> None:
    """Removes what later steps wrote, since the run is about to do them again."""
    for path in _checkpoint_dirs(root):
        if _step_of(path) > step:
            shutil.rmtree(path)


def remove_unfinished(root: Path) -> None:
    """Removes what a kill in the middle of writing left behind."""
    for path in root.glob(f"{_TEMPORARY_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def _checkpoint_dirs(root: Path) -> list[Path]:
    """Returns the folders named like checkpoints; what cannot be listed is no empty folder, and an error.

    Raises:
        CheckpointError: If the folder is a link that leads nowhere.
        OSError: If it cannot be read.
    """
    try:
        with os.scandir(root) as entries:
            return [Path(entry.path) for entry in entries if _STEP_NAME.fullmatch(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        if root.is_symlink():
            raise CheckpointError(f"{root} is a link that leads nowhere; mount the disk that it leads to") from None
        return []


def _step_of(path: Path) -> int:
    """Reads the step from a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def _files(path: Path) -> list[Path]:
    """Returns all files below a folder; a link is refused, since it can lead anywhere.

    Raises:
        OSError: If a folder cannot be listed; pathlib would take it for an empty one.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, subfolders, names in os.walk(path, onerror=refuse):
        for file in (Path(folder, name) for name in (*subfolders, *names)):
            mode = file.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise CheckpointError(f"{file.relative_to(path)} is a link")
            if stat.S_ISREG(mode):
                found.append(file)
    return sorted(found)


def _describe(path: Path) -> dict[str, object]:
    """Returns the size and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"sha256": digest.hexdigest(), "size": path.stat().st_size}


def _write_manifest(folder: Path, step: int) -> None:
    """Lists every file, readable by whoever the umask lets read (safetensors writes 0600)."""
    umask = os.umask(0)
    os.umask(umask)
    for file in _files(folder):
        file.chmod(0o666 & ~umask)
    files = {str(file.relative_to(folder)): _describe(file) for file in _files(folder)}
    content = json.dumps({"schema_version": SCHEMA_VERSION, "step": step, "files": files}, indent=2)
    (folder / MANIFEST).write_text(content, encoding="utf-8")


_COUNTS = ("global_step", "num_ema_updates", "num_skipped", "num_consecutive_skipped", "num_scaler_skips")
_OBJECTIVE_FILE = "objective.safetensors"


@dataclass
class TrainerState:
    """The counters of a run; everything else in it is a tensor or a function of these.

    Args:
        global_step: Optimiser updates done, skipped ones included; the only clock.
        num_ema_updates: Updates of the average.
        num_skipped: Updates skipped because a gradient was not finite.
        num_consecutive_skipped: Those of them at the end.
        num_scaler_skips: Updates skipped because the fp16 gradient scaler had scaled too far.
        loss_sums: For each rank, what its `LossMeter` summed up since the last line of metrics.
        num_images: Images in the training set, whose order the run depends on; 0 when streaming.
        data_digest: What tells the data from others; empty when streaming.
        streams: Where each rank is in its stream; empty without one.
        micro_batch_size: Images of one forward on one device, which "auto" stays at.
        scaler: State of the fp16 gradient scaler; None without one.
        optimizer: What an optimiser knows beside tensors; empty for Adam.
        best: Step, kind and value of the best score so far; None before the first.
    """

    global_step: int = 0
    num_ema_updates: int = 0
    num_skipped: int = 0
    num_consecutive_skipped: int = 0
    num_scaler_skips: int = 0
    loss_sums: list[list[float]] = field(default_factory=list)
    num_images: int = 0
    data_digest: str = ""
    streams: list[dict[str, Any]] = field(default_factory=list)
    micro_batch_size: int | None = None
    scaler: dict[str, float | int] | None = None
    optimizer: Scalars = field(default_factory=dict)
    best: dict[str, Any] | None = None


def write_snapshot(
    folder: Path, unet: UNet2DModel, ema: EMA, optimizer: torch.optim.Optimizer, state: TrainerState, config_yaml: str
) -> None:
    """Writes everything a run needs to go on, in files that other programs can read too.

    Raises:
        OSError: If the disk does not take it.
    """
    try:
        unet.save_pretrained(folder / "unet")
        for name in ema.names:
            with ema.swapped_in(unet, name):
                unet.save_pretrained(folder / name)
        tensors, scalars = pack(optimizer, _names(unet))
        save_file(tensors, folder / "optimizer.safetensors")
    except SafetensorError as error:
        raise OSError(str(error)) from error
    counters = json.dumps(asdict(state) | {"optimizer": scalars}, indent=2)
    (folder / "trainer_state.json").write_text(counters, encoding="utf-8")
    (folder / "config.yaml").write_text(config_yaml, encoding="utf-8")


def read_snapshot(folder: Path, unet: UNet2DModel, ema: EMA) -> tuple[TrainerState, dict[str, torch.Tensor]]:
    """Restores the networks from a verified folder.

    Returns:
        The counters of the run and the optimiser's named tensors, for `load_optimizer`.
    """
    state = TrainerState(**json.loads((folder / "trainer_state.json").read_text(encoding="utf-8")))
    _check_counters(state)
    for name in ema.names:
        _copy_weights(folder / name, unet)
        ema.load(unet, state.num_ema_updates, name)
    _copy_weights(folder / "unet", unet)
    return state, load_file(folder / "optimizer.safetensors")


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    unet: UNet2DModel,
    tensors: Mapping[str, torch.Tensor],
    scalars: Scalars | None = None,
) -> None:
    """Gives an optimiser what `write_snapshot` named after the parameters."""
    unpack(optimizer, _names(unet), tensors, scalars or {})


def write_objective(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes what the objective has learned, if it learns at all.

    Raises:
        OSError: If the disk does not take it.
    """
    if tensors:
        try:
            save_file(dict(tensors), folder / _OBJECTIVE_FILE)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_objective(folder: Path) -> dict[str, torch.Tensor]:
    """Returns what `write_objective` wrote; nothing for an objective that does not learn."""
    path = folder / _OBJECTIVE_FILE
    return load_file(path) if path.exists() else {}


def _check_counters(state: TrainerState) -> None:
    """Refuses counters that nothing could count on from."""
    for name in _COUNTS:
        if not isinstance(value := getattr(state, name), int) or value < 0:
            raise ValueError(f"{name} is {value!r}; it must be 0 or a larger integer")
    if state.micro_batch_size is not None and not isinstance(state.micro_batch_size, int):
        raise ValueError(f"micro_batch_size is {state.micro_batch_size!r}; it must be an integer")
    best = state.best
    if best is not None and not (
        set(best) == {"step", "kind", "value"}
        and isinstance(best["step"], int)
        and isinstance(best["kind"], str)
        and isinstance(best["value"], int | float)
    ):
        raise ValueError(f"best is {best!r}; it must hold the step, the kind and the value of a score")


def _names(unet: UNet2DModel) -> list[str]:
    """Returns the names of the parameters, in the order of the optimiser."""
    return [name for name, _ in unet.named_parameters()]


def _copy_weights(folder: Path, unet: UNet2DModel) -> None:
    """Copies weights from a folder in diffusers format into a network of the same shape."""
    unet.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))


def write_state(images: ImageSet | ImageStream, state: TrainerState) -> None:
    """Collective: notes what the run depends on in the data, and where every rank is in its stream."""
    if isinstance(images, ImageStream):
        state.streams = distributed.gather_json(dataclasses.asdict(images.position))
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


def choose_checkpoint(folder: RunFolder, config: RunConfig, *, is_dry_run: bool = False) -> Checkpoint | None:
    """Returns the newest valid checkpoint, or None for a run that starts at the beginning.

    Each newer one that is damaged is named with its reason and, except in a dry run, put aside; so is each setting that
    differs and may.

    Raises:
        ValueError: If there are checkpoints but none is valid, or one belongs to a run with other settings, or to a
            finished one that settings come too late for.
    """
    latest, skipped = find_latest(folder.checkpoints)
    for line in skipped:
        logger.warning("Passed over a checkpoint that cannot be used: %s", line)
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
        for line in skipped:
            put_aside(folder.checkpoints / line.split(":")[0])
    return latest


def _settings_of(found: Checkpoint) -> dict[str, dict[str, object]]:
    """Reads the configuration that a checkpoint was written with."""
    try:
        settings = read_config_dict(found.path / "config.yaml")
    except (FileNotFoundError, UnicodeDecodeError, ConfigError):
        settings = None
    if not isinstance(settings, dict) or not all(isinstance(section, dict) for section in settings.values()):
        raise CheckpointError(
            f"{found.path} holds no configuration of a run; restore it, or choose another training.output_dir."
        )
    return settings


# What decides which images a pipeline draws.
_MODEL = ("model_index.json", "unet", "scheduler/scheduler_config.json")
_MEASURED = ("evaluation.json", "evaluation.png")
_SUMMARY = "training_summary.json"


def keep_additions(old: Path, new: Path, evaluations: Path) -> None:
    """Keeps what was added to a saved pipeline since: an evaluation, its samples, estimated variances.

    If the model is the same, as after the command of a finished run was given again, all of it goes to the new folder.
    Numbers of another model would be wrong there, so they go to a folder of their own.

    Args:
        old: Folder of the pipeline that is about to be replaced; it need not exist.
        new: Folder of the new one, complete.
        evaluations: Where to keep what was measured of another model, as step_00001000.json and .png.
    """
    if _is_same_model(old, new):
        for path in sorted(old.rglob("*")):
            copy = new / path.relative_to(old)
            if path.is_symlink():
                continue
            if path.is_dir():
                copy.mkdir(exist_ok=True)
            elif not copy.exists():
                _link_or_copy(path, copy)
        return
    for path in (old / name for name in _MEASURED):
        if path.is_file():
            evaluations.mkdir(exist_ok=True)
            write_whole(evaluations / f"{_trained_steps(old)}{path.suffix}", partial(shutil.copyfile, path))


def _is_same_model(old: Path, new: Path) -> bool:
    """Tells whether both folders hold the same network and scheduler, to the bit."""
    names = [path.relative_to(new) for part in _MODEL for path in (*new.glob(part), *new.glob(f"{part}/*"))]
    files = [name for name in names if (new / name).is_file()]
    return all((old / name).is_file() and filecmp.cmp(old / name, new / name, shallow=False) for name in files)


def _link_or_copy(path: Path, copy: Path) -> None:
    """Gives a file a second name, which costs no room, or copies it where the disk has no such names."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copyfile(path, copy)


def _trained_steps(folder: Path) -> str:
    """Returns the name for what belongs to a saved pipeline, by its step."""
    try:
        return f"step_{json.loads((folder / _SUMMARY).read_text(encoding='utf-8'))['step']:08d}"
    except (OSError, ValueError, KeyError, TypeError):
        return "step_unknown"


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


_BYTES_OF_A_NAME = 128
"""What a tensor takes in the header of a safetensors file."""


class Saver:
    """Keeps the run folder of one run: checkpoints, configuration, metrics and, in the end, the pipeline.

    Args:
        config: The configuration of the run.
        folder: The run folder, held by this process.
        metrics: The lines of metrics in it.
        images: Training images, whose order the run depends on.
        unet: The network.
        ema: Its average.
        optimizer: Its optimiser.
        timestep_sampler: What draws its timesteps, and may have learned from them.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        metrics: MetricsLog,
        *,
        images: ImageSet | ImageStream,
        unet: UNet2DModel,
        ema: EMA,
        optimizer: torch.optim.Optimizer,
        timestep_sampler: TimestepSampler,
    ) -> None:
        self._config = config
        self._folder = folder
        self._metrics = metrics
        self._images = images
        self._unet, self._ema, self._optimizer = unet, ema, optimizer
        self._timestep_sampler = timestep_sampler

    @property
    def checkpoint_bytes(self) -> int:
        """About how large a checkpoint is: the weights, their average, and two moments of each weight."""
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self._unet.parameters())
        averages = sum(average.numel() * average.element_size() for average in self._ema.tensors())
        names = 4 * _BYTES_OF_A_NAME * sum(1 for _ in self._unet.parameters())
        return int(3 * weights + averages + names)

    @property
    def stored_average_bytes(self) -> int:
        """About how large one of the things is that posthoc_ema stores: a pair of averages in float32."""
        return sum(2 * 4 * parameter.numel() + 2 * _BYTES_OF_A_NAME for parameter in self._unet.parameters())

    def num_averages_stored(self, step: int = 0) -> int:
        """Returns how many such pairs the run stores after a step."""
        training = self._config.training
        if not training.posthoc_ema:
            return 0
        return sum(ema.is_due(number, training) for number in range(step + 1, training.num_steps + 1))

    def check(self) -> None:
        """Collective: raises what `resume` would raise about the run folder, and changes nothing."""

        def check() -> None:
            self._check_space(choose_checkpoint(self._folder, self._config, is_dry_run=True))

        distributed.on_rank_0(check)

    def resume(self, take_up: Callable[[TrainerState], None]) -> None:
        """Collective: takes up the newest valid checkpoint, read by rank 0 alone, and starts the run folder.

        Args:
            take_up: Gives the counters of a run that is continued to those who count.

        Raises:
            ValueError: If the checkpoints in the folder cannot be continued with this configuration, or there is no
                room for further ones.
        """
        found = distributed.on_rank_0(self._read_checkpoint)
        step = 0
        if distributed.broadcast_json(found is not None):
            path, counters, tensors, learned = found if found is not None else (Path(), TrainerState(), None, None)
            path = Path(distributed.broadcast_json(str(path)))
            state = TrainerState(**distributed.broadcast_json(vars(counters)))
            distributed.broadcast_tensors([*self._unet.parameters(), *self._ema.tensors()])
            tensors = distributed.broadcast_named_tensors(tensors, self._unet.device)
            learned = distributed.broadcast_named_tensors(learned, self._unet.device)
            with _going_on_from(path):
                load_optimizer(self._optimizer, self._unet, tensors, state.optimizer)
                self._timestep_sampler.load_state(learned)
                self._ema.num_updates = state.num_ema_updates
                take_up(state)
            step = state.global_step
        distributed.on_rank_0(lambda: self._start_folder(step))

    def save(self, state: TrainerState, *, must_succeed: bool) -> bool:
        """Collective: writes a checkpoint on rank 0 and removes old ones.

        Args:
            state: The counters of the run.
            must_succeed: Whether a full disk ends the run, since work would be lost; otherwise it is a warning.

        Returns:
            Whether it was written.

        Raises:
            OSError: If a checkpoint that must succeed cannot be written.
            ValueError: If something else has taken the place of the run folder.
            NonFiniteTraining: If the weights are not worth saving.
            ProcessesDiffer: If the processes no longer have the same weights.
        """
        distributed.check_same(self._weights())
        check_finite([*self._unet.parameters(), *self._ema.tensors()], state.global_step)
        state.num_ema_updates = self._ema.num_updates
        write_state(self._images, state)
        return bool(
            distributed.broadcast_json(distributed.on_rank_0(lambda: self._write_checkpoint(state, must_succeed)))
        )

    def save_pipeline(self, pipeline: GaussianDiffusionPipeline, step: int) -> None:
        """Collective: writes the finished pipeline with the averaged weights on rank 0, and keeps what lay in it."""

        def write(folder: Path) -> None:
            self._write_pipeline(folder, pipeline, step)
            write_verification(folder)
            keep_additions(self._folder.pipeline, folder, self._folder.evaluations)

        distributed.on_rank_0(lambda: replace_folder(self._folder.pipeline, write))

    def publish(self, publisher: Publisher, pipeline: GaussianDiffusionPipeline, step: int) -> None:
        """Collective: lets rank 0 publish the averaged weights while training goes on."""

        def write(folder: Path) -> None:
            check_finite([*self._unet.parameters(), *self._ema.tensors()], step)
            self._write_pipeline(folder, pipeline, step)

        handed_over, previews = self._folder.hub / "run", self._folder.previews
        distributed.on_rank_0(lambda: publish(publisher, handed_over, step, previews, write))

    def _write_pipeline(self, folder: Path, pipeline: GaussianDiffusionPipeline, step: int) -> None:
        """Writes the averaged weights and where they come from."""
        with self._ema.swapped_in(self._unet):
            pipeline.save_pretrained(folder)
        (folder / "training_config.yaml").write_text(self._config.to_yaml(), encoding="utf-8")
        summary = run_dir.summarize(
            self._config,
            step,
            images=self._images,
            unet=self._unet,
            num_processes=distributed.world_size(),
            metrics=self._metrics,
        )
        (folder / run_dir.FILE_NAME).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

    def _weights(self) -> dict[str, torch.Tensor]:
        """Returns the weights and all their averages, by name."""
        weights: dict[str, torch.Tensor] = dict(self._unet.named_parameters())
        names = list(weights)
        for average in self._ema.names:
            tensors = zip(names, self._ema.tensors(average), strict=True)
            weights |= {f"{average} of {name}": tensor for name, tensor in tensors}
        return weights

    def _write_checkpoint(self, state: TrainerState, must_succeed: bool) -> bool:
        """Writes and prunes checkpoints on rank 0, and says whether it could."""

        def write(folder: Path) -> None:
            write_snapshot(folder, self._unet, self._ema, self._optimizer, state, self._config.to_yaml())
            write_objective(folder, self._timestep_sampler.state())

        try:
            self._folder.hold()
            write_checkpoint(self._folder.checkpoints, state.global_step, write)
        except OSError as error:
            message = f"The checkpoint of step {state.global_step} could not be written ({error.strerror or error})"
            if must_succeed:
                raise OSError(f"{message}; make room in {self._folder.path} and run the same command again.") from error
            logger.warning("%s; training goes on, the older checkpoints are intact.", message)
            return False
        best_step = state.best["step"] if state.best else None
        prune(self._folder.checkpoints, self._config.training.num_checkpoints_kept, best_step)
        return True

    def _check_space(self, latest: Checkpoint | None) -> None:
        """Refuses a disk that has no room for two checkpoints, or for one more, and for what posthoc_ema will store.

        A finished run needs none.
        """
        num_steps = self._config.training.num_steps
        if latest is not None and latest.step == num_steps:
            return
        num_stored = self.num_averages_stored(0 if latest is None else latest.step)
        needed = self.checkpoint_bytes * (2 if latest is None else 1) + num_stored * self.stored_average_bytes
        free = shutil.disk_usage(self._folder.path).free
        if free < needed:
            what, advice = "two checkpoints" if latest is None else "one more checkpoint", ""
            if num_stored:
                what = f"{what} and {num_stored} pairs of averages (training.posthoc_ema)"
                advice = ", raise training.posthoc_ema_every_steps"
            raise ConfigError(
                f"training.output_dir {self._folder.path} has {free / 1e6:,.1f} MB free, but needs "
                f"{needed / 1e6:,.1f} MB for {what}; make room{advice}, or choose another folder."
            )

    def _read_checkpoint(self) -> tuple[Path, TrainerState, dict[str, torch.Tensor], dict[str, torch.Tensor]] | None:
        """Reads the newest valid checkpoint on rank 0."""
        latest = choose_checkpoint(self._folder, self._config)
        self._check_space(latest)
        if latest is None:
            return None
        say(f"Continuing from step {latest.step} of {self._config.training.num_steps} ({latest.path}).")
        with _going_on_from(latest.path):
            state, tensors = read_snapshot(latest.path, self._unet, self._ema)
            if state.global_step != latest.step:
                raise ValueError(f"its counters are those of step {state.global_step}")
            learned = read_objective(latest.path)
        check_state(self._images, state, self._config.data.source, self._folder.path)
        return latest.path, state, tensors, learned

    def _start_folder(self, step: int) -> None:
        """Writes the configuration and cuts metrics and stored averages back to the checkpoint."""
        self._folder.write_config(self._config.to_yaml())
        remove_after(self._folder.ema_snapshots, step)
        self._metrics.cut_after(step)


@contextmanager
def _going_on_from(path: Path) -> Iterator[None]:
    """Refuses a checkpoint whose files are those of its manifest: whoever wrote it decided what is in them."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
        reason = textwrap.shorten(what or type(error).__name__, 200, placeholder=" ...")
        raise CheckpointError(
            f"{path} is whole, but this version cannot go on from it ({reason}); restore another one, use the version "
            "that wrote it, or choose another training.output_dir."
        ) from error
