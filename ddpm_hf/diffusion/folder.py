"""The folder of a saved pipeline, written so that it loads with and without this code.

model_index.json names classes of diffusers wherever these sample correctly; the code that wrote the folder lies beside
it; no local path is left in it.
"""

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

CORE_VERSION = "1.2.0"

LIST_FORM = ["pipeline", "GaussianDiffusionPipeline"]
NATIVE_SCHEDULER = "GaussianDiffusionScheduler"
VARIANCE_SPLITTING_SCHEDULERS = (NATIVE_SCHEDULER, "DDPMScheduler", "DDPMParallelScheduler")


def splits_variance(scheduler: Any) -> bool:
    """Whether `step` takes 2C channels. By name, since classes loaded anew from a folder are other classes."""
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    return learned and type(scheduler).__name__ in VARIANCE_SPLITTING_SCHEDULERS


def stock_pipeline_samples(pipeline: DiffusionPipeline) -> bool:
    """Whether a stock DDPMPipeline would sample correctly from these parts, or refuse for want of labels.

    It neither feeds back predictions, nor scales, nor drops a variance, and DDPMScheduler takes a learned log-variance
    for a variance.
    """
    scheduler, unet = pipeline.scheduler, pipeline.unet.config
    return (
        not pipeline.config.get("self_conditioned")
        and not (splits_variance(scheduler) and scheduler.config["variance_type"] == "learned")
        and unet.out_channels == unet.in_channels * (2 if splits_variance(scheduler) else 1)
        and "generator" in inspect.signature(scheduler.step).parameters
        and float(scheduler.init_noise_sigma) == 1.0
    )


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        edit(content)
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_code(folder: Path, code: Mapping[str, str]) -> None:
    """Puts the files of the core, {name: text}, beside the index."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in code.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def clean_component_configs(folder: Path, scheduler: Any) -> None:
    """Names the stock scheduler for the native one, and drops the path that the network was loaded from."""
    _edit_json(folder / "unet" / "config.json", lambda config: config.pop("_name_or_path", None))
    if type(scheduler).__name__ == NATIVE_SCHEDULER:
        scheduler_config = folder / "scheduler" / "scheduler_config.json"
        _edit_json(scheduler_config, lambda config: config.update(_class_name="DDPMScheduler"))


def write_index(path: Path, pipeline: DiffusionPipeline) -> None:
    """Writes model_index.json with the names that a loader without this code can resolve."""
    full = json.loads(pipeline.to_json_string())
    index = {key: value for key, value in full.items() if not key.startswith("_")}
    index["_class_name"] = "DDPMPipeline" if stock_pipeline_samples(pipeline) else LIST_FORM
    index["_diffusers_version"] = full["_diffusers_version"]
    if type(pipeline.scheduler).__name__ == NATIVE_SCHEDULER:
        index["scheduler"] = ["diffusers", "DDPMScheduler"]
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def without_list_form(content: dict[str, Any]) -> dict[str, Any]:
    """Turns the list form of the index, which asks for the code in the folder, into the plain class name."""
    if content.get("_class_name") == LIST_FORM:
        content["_class_name"] = LIST_FORM[1]
    return content


def check_parts(index: Mapping[str, Any]) -> None:
    """Refuses an index whose parts are of modules that nobody has imported: diffusers below 0.42 would import them.

    Raises:
        ValueError: There is such a part.
    """
    for part, value in index.items():
        if isinstance(value, list) and not part.startswith("_") and value[0] and value[0] not in sys.modules:
            raise ValueError(f"model_index.json says that {part} is {value}, which is no class of diffusers.")


def check_shards(folder: Path) -> None:
    """Refuses indices of sharded weights that name other files than safetensors.

    diffusers reads a shard as what its name says it is, whatever `use_safetensors` says of the index: as a pickle, if
    it ends in .bin.

    Args:
        folder: The folder of a pipeline or of one of its parts.

    Raises:
        ValueError: There is such an index.
    """
    for index in sorted([*folder.glob("*safetensors.index*.json"), *folder.glob("*/*safetensors.index*.json")]):
        for shard in sorted(map(str, json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())):
            if not shard.endswith(".safetensors") or Path(shard).name != shard:
                raise ValueError(f"{index} names {shard!r}, which is no safetensors file beside it.")
