"""The folder of a saved pipeline, which loads with and without this code.

model_index.json names classes of diffusers wherever these sample correctly. The code that wrote the folder is saved
beside it. No local path is stored.
"""

import inspect
import json
import sys
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import try_to_load_from_cache

from .scheduler import NATIVE_SCHEDULER, SECOND_MOMENTS_FILE, splits_variance

CORE_VERSION = "1.3.0"
"""Version of the code in a saved folder, for bug reports. The code of ddpm_hf 0.1 is 1.2.0."""
PORTABLE_FILES = (
    "pipeline.py",
    "compiled.py",
    "editing.py",
    "images.py",
    "latents.py",
    "saved_folder.py",
    "scheduler.py",
    "gaussian.py",
    "guidance.py",
    "schedule.py",
)
_FILES_OF_VERSION_1_2 = (
    "denoising.py",
    "sampling.py",
    "folder.py",
    "reverse_variance.py",
    "forward_process.py",
    "timesteps.py",
    "noise_schedule.py",
)
LIST_FORM = ["pipeline", "GaussianDiffusionPipeline"]
"""The class name in an index that makes diffusers ask for consent to run the code in the folder."""


# Saving


def stock_pipeline_samples(pipeline: DiffusionPipeline) -> bool:
    """Return whether a stock DDPMPipeline samples correctly from these parts, or fails only for lack of class labels.

    It does not support latents, self-conditioning, scaled model inputs or ignored variance channels, and DDPMScheduler
    takes the log-variance of `learned` for a variance.
    """
    scheduler, unet = pipeline.scheduler, pipeline.unet.config
    return (
        pipeline.vae is None
        and not pipeline.config.get("self_conditioned")
        and not (splits_variance(scheduler) and scheduler.config["variance_type"] == "learned")
        and unet.out_channels == unet.in_channels * (2 if splits_variance(scheduler) else 1)
        and "generator" in inspect.signature(scheduler.step).parameters
        and float(scheduler.init_noise_sigma) == 1.0
    )


def write_code(folder: Path, code: Mapping[str, str]) -> None:
    """Write the files of the core, {name: text}, and remove the files that only version 1.2 of the core has."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES_OF_VERSION_1_2:
        if (folder / name).is_file() and 'CORE_VERSION = "1.' in (folder / name).read_text(encoding="utf-8"):
            (folder / name).unlink()
    for name, text in code.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def clean_network_config(folder: Path) -> None:
    """Remove the paths that the network and the VAE were loaded from."""
    for path in filter(Path.is_file, (folder / part / "config.json" for part in ("unet", "vae"))):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_index(path: Path, pipeline: DiffusionPipeline) -> None:
    """Write model_index.json with the names that a loader without this code can resolve."""
    full = json.loads(pipeline.to_json_string())
    index = {key: value for key, value in full.items() if not key.startswith("_")}
    index["_class_name"] = "DDPMPipeline" if stock_pipeline_samples(pipeline) else LIST_FORM
    index["_diffusers_version"] = full["_diffusers_version"]
    if pipeline.vae is None:
        index.pop("vae", None)
    if type(pipeline.scheduler).__name__ == NATIVE_SCHEDULER:
        index["scheduler"] = ["diffusers", "DDPMScheduler"]
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# Loading


def without_list_form(content: dict[str, Any]) -> dict[str, Any]:
    """Replace the list form of the class name in an index by the plain name, for which this class is used."""
    if content.get("_class_name") == LIST_FORM:
        content["_class_name"] = LIST_FORM[1]
    return content


def check_parts(index: Mapping[str, Any]) -> None:
    """Raise a ValueError if an index names a module that is not loaded; diffusers below 0.42 would import it."""
    for part, value in index.items():
        if not isinstance(value, list) or part.startswith("_") or not isinstance(value[0], str):
            continue  # a setting, such as value_range
        if value[0] and value[0] not in sys.modules:
            raise ValueError(f"model_index.json names {value} for {part}, which is not a class of diffusers.")


def check_shards(folder: Path) -> None:
    """Raise a ValueError if an index of sharded safetensors weights names other files.

    diffusers chooses the format of a shard by its name, regardless of `use_safetensors`: it reads .bin as a pickle.

    Args:
        folder: Folder of a pipeline or of one of its parts.
    """
    for index in sorted([*folder.glob("*safetensors.index*.json"), *folder.glob("*/*safetensors.index*.json")]):
        for shard in sorted(map(str, json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())):
            if not shard.endswith(".safetensors") or Path(shard).name != shard:
                raise ValueError(f"{index} names {shard!r}, which is not a safetensors file beside it.")


def second_moments_file(folder: str | PathLike[str]) -> Path:
    """Return the path of the second moments in a saved pipeline, beside the configuration of the scheduler.

    In a folder without `scheduler/`, such as the google/ddpm-* repositories, both are at the top.
    """
    nested = Path(folder) / "scheduler"
    return (nested if nested.is_dir() else Path(folder)) / SECOND_MOMENTS_FILE


def find_second_moments(name_or_path: str | PathLike[str], options: Mapping[str, Any]) -> Path | None:
    """Return the file of second moments of a pipeline that was just loaded, or None; arguments as in `find_file`."""
    if Path(name_or_path).is_dir():
        file = second_moments_file(name_or_path)
        return file if file.is_file() else None
    return find_file(name_or_path, f"scheduler/{SECOND_MOMENTS_FILE}", options)


def find_file(name_or_path: str | PathLike[str], file: str, options: Mapping[str, Any]) -> Path | None:
    """Return a file of a pipeline that was just loaded, or None.

    Args:
        name_or_path: Folder or repository of the pipeline.
        file: Its path in the folder.
        options: The keyword arguments of `from_pretrained`.
    """
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / file
        return path if path.is_file() else None
    place = {name: options.get(name) for name in ("cache_dir", "revision")}
    cached = try_to_load_from_cache(str(name_or_path), file, **place)
    return Path(cached) if isinstance(cached, str) else None
