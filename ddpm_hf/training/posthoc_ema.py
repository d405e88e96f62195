"""Post-hoc EMA: reconstruct an EMA of any length after training from stored snapshots (Karras et al. 2024, section 3).

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
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ddpm_hf.config import ConfigError
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation.verify import write_verification
from ddpm_hf.files import EMA_SNAPSHOTS_DIR, RUN_CONFIG, TRAINING_CONFIG, VAE_DIR, replace_folder, write_json
from ddpm_hf.model_folder import CheckpointError, verify_checkpoint
from ddpm_hf.models import load_vae, saved_parameters
from ddpm_hf.training import checkpoint
from ddpm_hf.training.ema import EMA, MAX_SIGMA_REL, POSTHOC_SIGMA_RELS, combine, gamma_of, posthoc_name

logger = logging.getLogger(__name__)

# With 40 snapshots the error of profiles of length 0.02 to 0.25 is at most 3 %, of length 0.04 to 0.15 at most 0.2 %.
_MAX_ERROR = 0.1


@dataclass(frozen=True)
class StoredEMA:
    """One EMA of a snapshot.

    Args:
        path: Its file.
        step: Optimizer updates when it was stored.
        num_updates: EMA updates when it was stored; skipped optimizer updates are not counted.
        sigma_rel: Its length.
    """

    path: Path
    step: int
    num_updates: int
    sigma_rel: float


@dataclass(frozen=True)
class Reconstruction:
    """The result of `reconstruct`.

    Args:
        step: The optimizer step of the EMA.
        sigma_rel: Its length.
        num_stored: Number of stored EMAs that it was combined from.
        relative_error: L2 distance of its profile from the exact one, relative to the norm of that.
    """

    step: int
    sigma_rel: float
    num_stored: int
    relative_error: float


def store(root: Path, step: int, ema: EMA, pipeline: GaussianDiffusionPipeline) -> None:
    """Store a snapshot; on a full disk print a warning instead.

    Args:
        root: The folder of all snapshots.
        step: Optimizer updates so far.
        ema: The EMAs.
        pipeline: The pipeline they belong to.
    """
    if ema.num_updates == 0:
        return
    names = [name for name, _ in pipeline.unet.named_parameters()]
    saved = saved_parameters(pipeline.unet).keys()

    def write(folder: Path) -> None:
        pipeline.unet.save_config(folder / "unet")
        pipeline.scheduler.save_config(folder / "scheduler")
        pipeline.save_config(folder)
        for sigma_rel in POSTHOC_SIGMA_RELS:
            name = posthoc_name(sigma_rel)
            # One entry: safetensors writes several in any order, and a resumed run must repeat every bit.
            metadata = {"average": json.dumps({"num_updates": ema.num_updates, "sigma_rel": sigma_rel})}
            tensors = {key: tensor for key, tensor in zip(names, ema.tensors(name), strict=True) if key in saved}
            save_file(tensors, folder / f"{name}.safetensors", metadata)

    try:
        checkpoint.write_checkpoint(root, step, write)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        logger.warning("The EMA snapshot of step %d could not be stored (%s); training continues.", step, reason)


def reconstruct(run: Path, sigma_rel: float, step: int | None, output: Path) -> Reconstruction:
    """Write a pipeline whose weights are an EMA of any length.

    Args:
        run: The folder of a run with training.posthoc_ema.
        sigma_rel: Length of the EMA: the standard deviation of its profile, relative to the training until `step`.
        step: A step with a snapshot; None for the last.
        output: The new folder.

    Raises:
        ConfigError: Snapshots are missing, or cannot be combined to this length.
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise ConfigError(
            f"--length is {sigma_rel:g}, but must be between 0 and {MAX_SIGMA_REL:.3f}, the mean of all weights."
        )
    if output.exists():
        raise ConfigError(f"--output {output} already exists; remove it, or choose another folder.")
    stored = _find(run)
    steps = sorted({each.step for each in stored})
    if step is None:
        step = steps[-1]
    if step not in steps:
        shown = ", ".join(map(str, steps if len(steps) <= 8 else [*steps[:3], "...", *steps[-3:]]))
        raise ConfigError(f"--step is {step}, but there are snapshots of steps {shown}; choose one of these.")
    # Two snapshots without an update between them are equal.
    distinct = {(each.num_updates, each.sigma_rel): each for each in stored if each.step <= step}
    chosen = list(distinct.values())
    weights, error = _combine(chosen, sigma_rel)
    if error > _MAX_ERROR:
        candidates = np.arange(0.005, MAX_SIGMA_REL, 0.005)
        possible = [other for other in candidates if _combine(chosen, other)[1] <= _MAX_ERROR]
        raise ConfigError(
            f"--length {sigma_rel:g} cannot be combined from the {len(chosen)} EMAs stored until step {step} (its "
            f"profile would be off by {error:.0%}); "
            + (f"choose {possible[0]:.3f} to {possible[-1]:.3f}" if possible else "choose a later --step")
            + ", or lower training.posthoc_ema_every_steps."
        )
    result = Reconstruction(step, sigma_rel, len(chosen), error)
    if (run / RUN_CONFIG).is_symlink():
        raise ConfigError(f"{run / RUN_CONFIG} is a link; replace it by the file, which is copied to --output.")
    pipeline = _pipeline(chosen[-1].path.parent, _weighted_sum(chosen, weights))

    def write(folder: Path) -> None:
        pipeline.save_pretrained(folder)
        write_verification(folder)
        shutil.copyfile(run / RUN_CONFIG, folder / TRAINING_CONFIG)
        write_json(folder / "posthoc_ema.json", asdict(result))

    replace_folder(output, write)
    return result


def _find(run: Path) -> list[StoredEMA]:
    """Return all stored EMAs in the order of their steps; warn about damaged ones."""
    found: list[StoredEMA] = []
    for folder in sorted((run / EMA_SNAPSHOTS_DIR).glob("step_*")):
        try:
            step = verify_checkpoint(folder).step
        except CheckpointError as error:
            logger.warning("%s is ignored: %s.", folder, error)
            continue
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    average = json.loads(file.metadata()["average"])
                found.append(StoredEMA(path, step, **average))
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                logger.warning("%s is ignored: it is not a stored EMA (%s).", path, error)
    if not found:
        raise ConfigError(f"{run} has no {EMA_SNAPSHOTS_DIR}; give the folder of a run with training.posthoc_ema.")
    return found


def _combine(stored: list[StoredEMA], sigma_rel: float) -> tuple[NDArray[np.float64], float]:
    """Return the coefficients of stored EMAs for another length at the last step, and the error."""
    t = np.array([float(each.num_updates) for each in stored])
    gamma = np.array([gamma_of(each.sigma_rel) for each in stored])
    return combine(t, gamma, float(t.max()), gamma_of(sigma_rel))


def _weighted_sum(stored: list[StoredEMA], weights: NDArray[np.float64]) -> dict[str, torch.Tensor]:
    """Return the weighted sum of stored EMAs, in float64."""
    total: dict[str, torch.Tensor] = {}
    for each, weight in zip(stored, weights.tolist(), strict=True):
        with safe_open(each.path, framework="pt") as file:
            for name in file.keys():
                value = weight * file.get_tensor(name).double()
                total[name] = total[name] + value if name in total else value
    return total


def _pipeline(folder: Path, parameters: dict[str, torch.Tensor]) -> GaussianDiffusionPipeline:
    """Return the pipeline of a snapshot with these parameters."""
    unet = UNet2DModel.from_config(UNet2DModel.load_config(folder / "unet"))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter.copy_(parameters[name])
    parts: dict[str, Any] = {"unet": unet}
    if (vae := folder.parents[1] / VAE_DIR).is_dir():
        parts["vae"] = load_vae("the run", str(vae), None)
    try:
        pipeline: GaussianDiffusionPipeline = GaussianDiffusionPipeline.from_pretrained(folder, **parts)
    except Exception as error:  # diffusers raises many types for an index that names something else
        raise ConfigError(f"{folder} is not a pipeline ({' '.join(str(error).split())[:200]}).") from error
    return pipeline
