"""Post-hoc EMA: weights with an EMA of any length, made after training from stored snapshots.

outputs/run/ema_snapshots/step_00020000/
    ema_sigma_0.050.safetensors  ema_sigma_0.100.safetensors    float32, named like the parameters
    model_index.json  unet/config.json  scheduler/  *.py        the pipeline they belong to, without weights
    manifest.json                                               as in a checkpoint
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ddpm_hf.config import ConfigError
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation.verify import write_verification
from ddpm_hf.files import replace_folder
from ddpm_hf.training import checkpoint
from ddpm_hf.training.ema import EMA, LONGEST, POSTHOC_LENGTHS, combine, gamma_of, posthoc_name

logger = logging.getLogger(__name__)

SNAPSHOTS = "ema_snapshots"
# With 40 pairs the profiles of lengths from 0.02 to 0.25 are off by 3 % at most, those from 0.04 to 0.15 by 0.2 %.
_LARGEST_ERROR = 0.1


@dataclass(frozen=True)
class Stored:
    """One stored average.

    Args:
        path: Its file.
        step: Optimiser updates done when it was stored.
        num_updates: Weights averaged until then; skipped updates gave none.
        sigma_rel: Its length.
    """

    path: Path
    step: int
    num_updates: int
    sigma_rel: float


@dataclass(frozen=True)
class Rebuilt:
    """What `rebuild` made.

    Args:
        step: The optimiser step whose average it is.
        sigma_rel: Its length.
        num_stored: Stored averages that it was made of.
        relative_error: Distance of its profile from the wanted one, relative to that.
    """

    step: int
    sigma_rel: float
    num_stored: int
    relative_error: float


def store(root: Path, step: int, ema: EMA, pipeline: GaussianDiffusionPipeline) -> None:
    """Stores the averages of a step; where the disk is full, training goes on without.

    Args:
        root: The folder of all stored averages.
        step: Optimiser updates done.
        ema: The averages.
        pipeline: The pipeline they belong to.
    """
    if ema.num_updates == 0:
        return
    names = [name for name, _ in pipeline.unet.named_parameters()]

    def write(folder: Path) -> None:
        pipeline.unet.save_config(folder / "unet")
        pipeline.scheduler.save_config(folder / "scheduler")
        pipeline.save_config(folder)
        for length in POSTHOC_LENGTHS:
            name = posthoc_name(length)
            # One entry, since safetensors writes several in any order, and a resumed run repeats every bit.
            metadata = {"average": json.dumps({"num_updates": ema.num_updates, "sigma_rel": length})}
            save_file(dict(zip(names, ema.tensors(name), strict=True)), folder / f"{name}.safetensors", metadata)

    try:
        checkpoint.write_checkpoint(root, step, write)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        logger.warning("The averages of step %d could not be stored (%s); training goes on.", step, reason)


def rebuild(run: Path, length: float, step: int | None, output: Path) -> Rebuilt:
    """Writes a pipeline whose weights are an average of any length.

    Args:
        run: The folder of a run with training.posthoc_ema.
        length: sigma_rel of the average: the standard deviation of its profile, relative to the training until `step`.
        step: A step whose averages were stored; None takes the last.
        output: The new folder.

    Returns:
        What was made, and how exactly.

    Raises:
        ConfigError: If the averages are missing or cannot make this length.
    """
    if not 0 < length < LONGEST:
        raise ConfigError(f"--length is {length:g}, but must be between 0 and {LONGEST:.3f}, the mean of all weights.")
    if output.exists():
        raise ConfigError(f"--output {output} is already there; remove it, or choose another folder.")
    stored = _find(run)
    steps = sorted({each.step for each in stored})
    if step is None:
        step = steps[-1]
    if step not in steps:
        shown = ", ".join(map(str, steps if len(steps) <= 8 else [*steps[:3], "...", *steps[-3:]]))
        raise ConfigError(f"--step is {step}, but averages were stored after {shown}; choose one of these.")
    # Steps without an update in between stored the same average twice.
    distinct = {(each.num_updates, each.sigma_rel): each for each in stored if each.step <= step}
    chosen = list(distinct.values())
    weights, error = _combine(chosen, length)
    if error > _LARGEST_ERROR:
        possible = [other for other in np.arange(0.005, LONGEST, 0.005) if _combine(chosen, other)[1] <= _LARGEST_ERROR]
        raise ConfigError(
            f"--length {length:g} cannot be made of the {len(chosen)} averages stored until step {step} (its profile "
            f"would be off by {error:.0%}); "
            + (f"choose {possible[0]:.3f} to {possible[-1]:.3f}" if possible else "choose a later --step")
            + ", or store them more often (training.posthoc_ema_every_steps)."
        )
    rebuilt = Rebuilt(step, length, len(chosen), error)
    if (run / "config.yaml").is_symlink():
        raise ConfigError(f"{run / 'config.yaml'} is a link, and what it leads to would go into the new folder.")
    pipeline = _pipeline(chosen[-1].path.parent, _sum(chosen, weights))

    def write(folder: Path) -> None:
        pipeline.save_pretrained(folder)
        write_verification(folder)
        shutil.copyfile(run / "config.yaml", folder / "training_config.yaml")
        (folder / "posthoc_ema.json").write_text(json.dumps(asdict(rebuilt), indent=2) + "\n", encoding="utf-8")

    replace_folder(output, write)
    return rebuilt


def _find(run: Path) -> list[Stored]:
    """Returns all stored averages in the order of their steps; damaged ones are named and left out."""
    found: list[Stored] = []
    for folder in sorted((run / SNAPSHOTS).glob("step_*")):
        try:
            step = checkpoint.verify_checkpoint(folder).step
        except checkpoint.CheckpointError as error:
            logger.warning("%s is left out: %s.", folder, error)
            continue
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    average = json.loads(file.metadata()["average"])
                found.append(Stored(path, step, **average))
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                logger.warning("%s is left out: it holds no average (%s).", path, error)
    if not found:
        raise ConfigError(f"{run} holds no {SNAPSHOTS}; give the folder of a run with training.posthoc_ema.")
    return found


def _combine(stored: list[Stored], length: float) -> tuple[NDArray[np.float64], float]:
    """Returns what each stored average counts in one of another length at the last step, and the error."""
    t = np.array([float(each.num_updates) for each in stored])
    gamma = np.array([gamma_of(each.sigma_rel) for each in stored])
    return combine(t, gamma, float(t.max()), gamma_of(length))


def _sum(stored: list[Stored], weights: NDArray[np.float64]) -> dict[str, torch.Tensor]:
    """Adds stored averages up in float64."""
    total: dict[str, torch.Tensor] = {}
    for each, weight in zip(stored, weights.tolist(), strict=True):
        with safe_open(each.path, framework="pt") as file:
            for name in file.keys():
                value = weight * file.get_tensor(name).double()
                total[name] = total[name] + value if name in total else value
    return total


def _pipeline(folder: Path, parameters: dict[str, torch.Tensor]) -> GaussianDiffusionPipeline:
    """Puts parameters into the pipeline that a folder of stored averages describes."""
    unet = UNet2DModel.from_config(UNet2DModel.load_config(folder / "unet"))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter.copy_(parameters[name])
    try:
        pipeline: GaussianDiffusionPipeline = GaussianDiffusionPipeline.from_pretrained(folder, unet=unet)
    except Exception as error:  # diffusers raises many types for an index that names something else
        raise ConfigError(f"{folder} holds no pipeline ({' '.join(str(error).split())[:200]}).") from error
    return pipeline
