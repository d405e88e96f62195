"""What becomes of the pipeline that a run has already saved when the run saves its pipeline again."""

import filecmp
import json
import os
import shutil
from functools import partial
from pathlib import Path

from ddpm_hf.durable import write_whole

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
            write_whole(evaluations / f"{_step_of(old)}{path.suffix}", partial(shutil.copyfile, path))


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


def _step_of(folder: Path) -> str:
    """Returns the name for what belongs to a saved pipeline, by its step."""
    try:
        return f"step_{json.loads((folder / _SUMMARY).read_text(encoding='utf-8'))['step']:08d}"
    except (OSError, ValueError, KeyError, TypeError):
        return "step_unknown"
