"""Folders that hold a model: what a path is, which weights it stands for, and whether a checkpoint is valid.

    outputs/digits/                          a run: its pipeline, or if it is not finished, its newest valid checkpoint
    outputs/digits/pipeline/                 a pipeline, as is any folder with a model_index.json
    outputs/digits/checkpoints/step_.../     a checkpoint: its EMA
    outputs/digits/checkpoints/step_.../ema  one network of a checkpoint; unet/ holds the weights without EMA

Commands, `GaussianDiffusionPipeline.from_pretrained` and `model.from_pretrained` all ask `find_model`. Needs no torch.
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from ddpm_hf.config import ConfigError, log_warning, read_config_dict
from ddpm_hf.files import (
    CHECKPOINTS_DIR,
    EMA_DIR,
    EMA_SNAPSHOTS_DIR,
    EVALUATIONS_DIR,
    HUB_DIR,
    MANIFEST,
    METRICS,
    MODEL_CONFIG,
    MODEL_INDEX,
    PIPELINE_DIR,
    RUN_CONFIG,
    SAMPLING_SETTINGS,
    TRAINER_STATE,
    TRAINING_SUMMARY,
    format_count,
    read_json,
    sha256_of_file,
)

CHECKPOINT_SCHEMA = 1
RUN_MARK = "# A run of ddpm_hf. `ddpm-hf train --config` of this file repeats it.\n"
STEP_NAME = re.compile(r"step_(\d{8,})")
_MAX_NAMED = 5  # runs or files in a message
_GIVE = "give the folder of a run, a checkpoint or a pipeline."

# What shells, schedulers, file managers and file systems put into a folder without being asked for.
_LOGS = ("*.log", "*.out", "*.err", "log.txt", "*.[eo][0-9]*")
_LITTER = (
    ".DS_Store", "._*", ".AppleDouble", ".Spotlight-V100", ".Trash*", ".fseventsd", "Thumbs.db", "desktop.ini",
    ".directory", ".nfs*", ".snapshot", "lost+found", ".gitkeep", ".keep", ".gitignore", ".ipynb_checkpoints",
    "__pycache__",
)  # fmt: skip


def is_litter(name: str) -> bool:
    """Return whether a file or folder of this name is left by a file manager, a notebook or a file system."""
    return any(fnmatchcase(name, pattern) for pattern in _LITTER)


def content_of(folder: Path) -> list[str]:
    """Return the names in a folder, without litter, files that hold redirected output, and `logs/` with only these."""
    return sorted(entry.name for entry in folder.iterdir() if not is_litter(entry.name) and not _holds_output(entry))


def _holds_output(path: Path) -> bool:
    if path.name in ("log", "logs") and path.is_dir() and not path.is_symlink():
        return all(is_litter(entry.name) or (_holds_output(entry) and entry.is_file()) for entry in path.iterdir())
    return any(fnmatchcase(path.name, pattern) for pattern in _LOGS) and not path.is_dir()


# ----------------------------------------------------------------------------------------------------- checkpoints


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Args:
        path: Its folder.
        step: Optimizer updates when it was written.
    """

    path: Path
    step: int


def verify_checkpoint(path: Path, *, any_name: bool = False) -> Checkpoint:
    """Check that a checkpoint has exactly the files of its manifest, unchanged.

    Args:
        path: Its folder.
        any_name: Accept a copy under another name, which no run would continue from.

    Raises:
        CheckpointError: The folder is not a checkpoint, or a file is missing, damaged, additional or a link.
        PermissionError: This user may not read it, which says nothing about its content.
    """
    if not any_name and STEP_NAME.fullmatch(path.name) is None:
        raise CheckpointError(f"{path.name} is not named like a checkpoint (step_00001000)")
    if path.is_symlink():
        raise CheckpointError(f"{path.name} is a link")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, step, files = manifest["schema_version"], manifest["step"], dict(manifest["files"])
        expected_name = f"step_{step:08d}"
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{MANIFEST} is missing or unreadable") from None
    if version != CHECKPOINT_SCHEMA:
        raise CheckpointError(f"it was written by another version (schema {version}, this is {CHECKPOINT_SCHEMA})")
    if path.name != expected_name and not any_name:
        raise CheckpointError(f"it was renamed: {MANIFEST} says step {step}")
    try:
        present = {str(file.relative_to(path)) for file in checkpoint_files(path)} - {MANIFEST}
    except PermissionError:
        raise
    except OSError as error:
        raise CheckpointError(f"its files cannot be listed ({error.strerror or error})") from None
    if missing := sorted(files.keys() - present):
        raise CheckpointError(f"{missing[0]} is missing")
    if additional := sorted(present - files.keys()):
        raise CheckpointError(f"{additional[0]} does not belong to it")
    for name, expected in sorted(files.items()):
        try:
            is_intact = describe_file(path / name) == expected
        except PermissionError:
            raise
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read ({error.strerror or error})") from None
        if not is_intact:
            raise CheckpointError(f"{name} is damaged (its sha256 is not the one in {MANIFEST})")
    return Checkpoint(path, step)


def describe_file(path: Path) -> dict[str, object]:
    """Return the entry of a file in a manifest."""
    return {"sha256": sha256_of_file(path), "size": path.stat().st_size}


def checkpoint_files(folder: Path) -> list[Path]:
    """Return all files below a folder except litter; refuse links, which may lead anywhere."""

    def refuse(error: OSError) -> None:
        raise error  # Path.rglob would skip a folder that cannot be listed

    found = []
    for parent, subfolders, names in os.walk(folder, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not is_litter(name)]
        for file in (Path(parent, name) for name in (*subfolders, *names) if not is_litter(name)):
            mode = file.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise CheckpointError(f"{file.relative_to(folder)} is a link")
            if stat.S_ISREG(mode):
                found.append(file)
    return sorted(found)


def find_latest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest valid checkpoint.

    Returns:
        The checkpoint, or None if there are none, and a line "name: reason" for each newer one that is damaged.

    Raises:
        CheckpointError: There are checkpoints, but none is valid.
    """
    candidates = checkpoint_folders(root)
    damaged: list[str] = []
    for path in reversed(candidates):
        try:
            return verify_checkpoint(path), damaged
        except CheckpointError as error:
            damaged.append(f"{path.name}: {error}")
    if candidates:
        raise CheckpointError(
            f"no checkpoint in {root} can be used ({'; '.join(damaged)}); restore one, or start again in another "
            "training.output_dir"
        )
    return None, damaged


def checkpoint_folders(root: Path) -> list[Path]:
    """Return the folders named like checkpoints by step. A root that cannot be listed is an error, not an empty one."""
    try:
        with os.scandir(root) as entries:
            found = [Path(entry.path) for entry in entries if STEP_NAME.fullmatch(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        if root.is_symlink():
            raise CheckpointError(f"{root} is a broken link; mount the disk that it points to") from None
        return []
    return sorted(found, key=step_of)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is kept but not found again."""
    target = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)
    return target


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(path.name.removeprefix("step_"))


# -------------------------------------------------------------------------------------------------- what a path is


@dataclass(frozen=True)
class ModelFolder:
    """A folder that holds a model.

    Args:
        kind: "pipeline"; "checkpoint"; "run", of which the newest valid checkpoint is meant; or "network", a
            UNet2DModel without a scheduler.
        path: The folder of the pipeline, checkpoint, run or network.
        network: For a checkpoint, the folder of the weights in it.
        run: The run that it belongs to, or None.
        step: Optimizer updates of a verified checkpoint, otherwise None.
    """

    kind: Literal["pipeline", "checkpoint", "run", "network"]
    path: Path
    network: str = EMA_DIR
    run: Path | None = None
    step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**vars(self), "path": str(self.path), "run": self.run and str(self.run)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelFolder":
        """Return what `to_dict` described."""
        run = values["run"]
        return cls(**{**values, "path": Path(values["path"]), "run": None if run is None else Path(run)})

    @property
    def weights(self) -> Path:
        """The folder of the weights of a checkpoint."""
        return self.path / self.network

    @property
    def evaluation(self) -> Path | None:
        """The folder for evaluations of this model: a pipeline's own, since nothing may be added to a checkpoint."""
        if self.kind == "pipeline":
            return self.path
        name = self.path.name if self.network == EMA_DIR else f"{self.path.name}_{self.network}"
        return self.run / EVALUATIONS_DIR / name if self.run else None

    @property
    def num_steps(self) -> int | None:
        """The length of the run, of a checkpoint."""
        value = settings_of(self.path)["training"].get("num_steps")
        return value if isinstance(value, int) else None

    @property
    def is_finished(self) -> bool:
        """Whether a checkpoint is the last one of its run."""
        return self.step is not None and self.step == self.num_steps

    @property
    def progress(self) -> str:
        """Return "step 3 of 6" for a checkpoint."""
        return f"step {self.step}{'' if self.num_steps is None else f' of {self.num_steps}'}"


def find_model(name: str | os.PathLike[str], *, accept_network: bool = False) -> ModelFolder:
    """Return the pipeline or the verified checkpoint that a path stands for.

    Warn if it is the checkpoint of a run that is not finished, if a newer one is damaged, and if a run has been trained
    on after its pipeline was saved.

    Args:
        name: The path.
        accept_network: Also accept a UNet2DModel without a scheduler.

    Raises:
        ConfigError: It holds no model, or one that is damaged; the message says what it holds.
        PermissionError: This user may not read it.
    """
    found = locate(name, accept_network=accept_network)
    if found.kind == "checkpoint":
        try:
            step = verify_checkpoint(found.path.resolve(), any_name=True).step
        except CheckpointError as error:
            rest = f"give {found.run}, whose newest valid checkpoint is used" if found.run else "restore it"
            raise ConfigError(f"{found.path} is not a valid checkpoint: {error}; {rest}.") from None
        return replace(found, step=step)
    if found.kind == "pipeline" and found.run is not None:
        _warn_of_newer_checkpoint(found.path, found.run)
    if found.kind != "run":
        return found
    try:
        latest, damaged = find_latest(found.path / CHECKPOINTS_DIR)
    except CheckpointError as error:
        raise ConfigError(f"{str(error).partition('; restore one')[0]}; restore one.") from None
    assert latest is not None, "`locate` has seen a checkpoint"
    for line in damaged:
        log_warning(f"Skipped a damaged checkpoint: {line}")
    model = ModelFolder("checkpoint", latest.path, run=found.path, step=latest.step)
    what = "has not saved its pipeline" if model.is_finished else "is not finished"
    log_warning(f"The run {found.path} {what}; using the EMA weights of {model.progress} ({model.weights}).")
    return model


def locate(name: str | os.PathLike[str], *, accept_network: bool = False) -> ModelFolder:
    """Return what a path is, without verifying checkpoints; arguments and errors are those of `find_model`."""
    given = Path(name or "an empty name").expanduser()
    if not given.is_dir():
        raise ConfigError(_describe_missing(given))
    for folder, run in ((given, None), (given / PIPELINE_DIR, given), (given / "run" / PIPELINE_DIR, given / "run")):
        if (folder / MODEL_INDEX).is_file() and not _is_ema_snapshot(folder):
            return ModelFolder("pipeline", folder, run=run)
    real = given.resolve()
    names_network = real.name == "unet" or real.name.startswith(EMA_DIR)
    for folder, network in ((real, EMA_DIR), *([(real.parent, real.name)] if names_network else [])):
        if _is_checkpoint(folder):
            run = _as_given(folder.parent.parent, given) if folder.parent.name == CHECKPOINTS_DIR else None
            return ModelFolder("checkpoint", _as_given(folder, given), network, run)
    for folder in (given, *([_as_given(real.parent, given)] if real.name == CHECKPOINTS_DIR else [])):
        if checkpoint_folders(folder / CHECKPOINTS_DIR):
            return ModelFolder("run", folder)
    if accept_network and any((folder / MODEL_CONFIG).is_file() for folder in (given, given / "unet")):
        return ModelFolder("network", given)
    raise ConfigError(f"{given} {_describe_folder(given)}")


def find_run(path: str | os.PathLike[str]) -> Path | None:
    """Return the run that a path is, or is in; None if there is none."""
    given = Path(path).expanduser()
    real = given.resolve()
    return next((_as_given(folder, given) for folder in (real, *real.parents[:4]) if _is_run(folder)), None)


def has_run_mark(folder: Path) -> bool:
    """Return whether a folder has the configuration of a run."""
    config = folder / RUN_CONFIG
    return config.is_file() and config.read_bytes().startswith(RUN_MARK.encode())


def _is_run(folder: Path) -> bool:
    return has_run_mark(folder) or ((folder / RUN_CONFIG).is_file() and (folder / CHECKPOINTS_DIR).is_dir())


def _is_checkpoint(folder: Path) -> bool:
    is_named = STEP_NAME.fullmatch(folder.name) is not None and folder.parent.name == CHECKPOINTS_DIR
    return is_named or all((folder / name).is_file() for name in (MANIFEST, TRAINER_STATE))


def _is_ema_snapshot(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and any(folder.glob(f"{EMA_DIR}_sigma_*.safetensors"))


def _as_given(path: Path, given: Path) -> Path:
    """Return an absolute path, relative to the working directory if the user gave a relative path."""
    return path if given.is_absolute() else Path(os.path.relpath(path))


def _warn_of_newer_checkpoint(pipeline: Path, run: Path) -> None:
    folders = checkpoint_folders(run / CHECKPOINTS_DIR)
    try:
        step = read_json(pipeline / TRAINING_SUMMARY)["step"]
        is_older = bool(folders) and step < step_of(folders[-1])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if is_older:
        log_warning(
            f"The run {run} has trained on since it saved its pipeline at step {step}, which is used; give "
            f"{folders[-1]} to use step {step_of(folders[-1])}."
        )


def _describe_missing(path: Path) -> str:
    """Return a sentence about a path that is not a folder."""
    if path.exists():
        if path.suffix in (".pt", ".pth", ".ckpt"):
            return (
                f"{path} is a checkpoint of another system; make a pipeline of it with ddpm-hf convert {path} FOLDER."
            )
        return f"{path} is a file; give its folder, or that of the run, the checkpoint or the pipeline that it is in."
    if path.is_symlink():
        return f"{path} is a broken link; mount the disk that it points to."
    for root in path.parents[:3]:
        if root.name == CHECKPOINTS_DIR and (folders := checkpoint_folders(root)):
            return f"{path} does not exist; {root} holds {_listed([folder.name for folder in folders])}."
    return (
        f"{path} is neither a local folder nor a valid repository id; give the folder of a run, a checkpoint or a "
        "pipeline, or an id such as google/ddpm-cifar10-32."
    )


def _describe_folder(folder: Path) -> str:
    """Return what a folder without a model holds, and what to give."""
    names = content_of(folder)
    real = folder.resolve()
    if real.parent.joinpath(MODEL_INDEX).is_file() and real.name in ("unet", "scheduler", "vae"):
        return f"is only the {real.name} of a pipeline; give {_as_given(real.parent, folder)}."
    if _is_run(folder):
        every = settings_of(folder)["training"].get("checkpoint_every_steps")
        return (
            f"holds a run without a checkpoint; wait for the first one (training.checkpoint_every_steps {every}), or "
            "stop the run with Ctrl-C, which saves one."
        )
    if any(map(_is_ema_snapshot, (folder, *_subfolders(folder)))):
        return f"holds stored EMAs; ddpm-hf ema {find_run(folder) or 'RUN'} --length 0.1 makes a pipeline of them."
    if (run := find_run(folder)) is not None and run.resolve() != real:
        return f"is a part of the run {run} that holds no pipeline ({MODEL_INDEX}) or checkpoint; give {run}."
    for noun, found in (
        ("run", [one for one in _subfolders(folder, depth=2) if _is_run(one)]),
        ("pipeline", [one for one in _subfolders(folder) if (one / MODEL_INDEX).is_file()]),
        ("checkpoint", [one for one in _subfolders(folder) if _is_checkpoint(one)]),
    ):
        if found:
            return f"holds {format_count(len(found), noun)}, {_listed(list(map(str, found)))}; give one of them."
    if any((one / SAMPLING_SETTINGS).is_file() for one in (folder, *_subfolders(folder))):
        return f"holds samples, not a model; {_GIVE}"
    if (folder / MODEL_CONFIG).is_file():
        return f"holds no pipeline ({MODEL_INDEX}), only a network ({MODEL_CONFIG}); {_GIVE}"
    if not names:
        return f"holds no pipeline ({MODEL_INDEX}), it is empty; {_GIVE}"
    return f"holds no pipeline ({MODEL_INDEX}), checkpoint or run, but {_listed(names)}; {_GIVE}"


def _subfolders(folder: Path, depth: int = 1) -> list[Path]:
    """Return the folders in a folder that can be read, to a depth, in order."""
    try:
        found = sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    except OSError:
        return []
    below = [two for one in found for two in _subfolders(one, depth - 1)] if depth > 1 else []
    return [*found, *below]


def _listed(names: Sequence[str]) -> str:
    """Return the first names of a list."""
    rest = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{', '.join(names[:_MAX_NAMED])}{rest}"


# --------------------------------------------------------------------------------- what a checkpoint says of its run


def settings_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the configuration beside a checkpoint, or of a run, with a section for each that its version lacked.

    Raises:
        ConfigError: It is missing, or it is not the configuration of a run.
    """
    path = folder / RUN_CONFIG
    if not path.is_file():
        raise ConfigError(f"{path} is missing; restore it.")
    return {section: {} for section in ("data", "diffusion", "model", "objective", "training")} | read_config_dict(path)


def class_names_of(model: ModelFolder) -> dict[str, str] | None:
    """Return the names of the classes, {"0": ...}, of the run of a checkpoint; None without classes or if unknown.

    A checkpoint of version 0.1 does not hold them; the run may have saved them with a pipeline or an EMA snapshot.
    """
    state = read_json(model.path / TRAINER_STATE)
    indices = []
    if "class_names" not in state and model.run is not None:
        places = (PIPELINE_DIR, f"{HUB_DIR}/run/{PIPELINE_DIR}", f"{EMA_SNAPSHOTS_DIR}/step_*")
        indices = [path for place in places for path in model.run.glob(f"{place}/{MODEL_INDEX}")]
    names = next((read_json(path).get("class_names") for path in indices), state.get("class_names"))
    return names if isinstance(names, dict) else None


def rows_until(model: ModelFolder) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl of the run of a checkpoint until its step."""
    if model.run is None or not (model.run / METRICS).is_file():
        return []
    rows = []
    for line in (model.run / METRICS).read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):  # the last line of a run that is being trained
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= (model.step or 0):
                rows.append(row)
    return rows


def summary_of(model: ModelFolder, num_parameters: int) -> dict[str, Any]:
    """Return what training_summary.json would say of a verified checkpoint."""
    settings, state, rows = settings_of(model.path), read_json(model.path / TRAINER_STATE), rows_until(model)
    data, training, base_model = settings["data"], settings["training"], settings["model"].get("from_pretrained")
    batch, names = training.get("train_batch_size"), class_names_of(model)
    timed, learned, scored = (_last(rows, name) for name in ("seconds", "loss", "score"))
    return {
        "step": model.step,
        "num_steps": training.get("num_steps"),
        "network": model.network,
        "num_images_seen": model.step * batch if model.step is not None and isinstance(batch, int) else None,
        "seconds": timed.get("seconds"),
        "num_processes": len(state.get("loss_sums") or ()) or None,
        "num_parameters": num_parameters,
        "base_model": base_model and name_or_id(str(base_model)),
        "data": {
            "source": data.get("source") and name_or_id(str(data["source"])),
            "num_images": state.get("num_images") or None,
            "num_classes": names and len(names),
        },
        "loss": learned.get("loss"),
        "score": {name: value for name, value in scored.items() if name.startswith("score")} or None,
    }


def _last(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next((row for row in reversed(rows) if row.get(name) is not None), {})


def name_or_id(source: str) -> str:
    """Return only the name of a local path, since readers of a model card need not know where it is; else a Hub id."""
    return Path(source).name if Path(source).expanduser().exists() else source
