"""Whether a saved pipeline still computes what it computed when it was saved.

What a saved pipeline consists of, whatever its files look like: the values of its tensors, and its settings.

A file that was written anew in another way has the same contents; any other weight or setting is a difference.

What a saved pipeline is and computed when it was saved, so that anyone can tell a damaged or drifted copy of it.

`verification.json` holds a digest of the values of each tensor and all settings, which tell another pipeline; for one
seed in float32 on a CPU, statistics and a corner of what the network says of noise, for up to 16 labels and the null
label, and of the image that four ancestral steps make, which tell an environment that computes something else; and the
sha256 of the files.
"""

import functools
import hashlib
import inspect
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from safetensors.torch import load_file

from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.diffusion.images import image_size
from ddpm_hf.diffusion.saved_folder import LIST_FORM, PORTABLE_FILES, stock_pipeline_samples
from ddpm_hf.files import write_text
from ddpm_hf.redaction import reason_of
from ddpm_hf.rng import torch_generator

MOMENTS = "eps_second_moments"
_DIGITS = 16
_LONGEST_SHOWN = 40
_NOT_SETTINGS = ("_diffusers_version", "_name_or_path", "_use_default_values")


def contents_of(pipeline: GaussianDiffusionPipeline, folder: Path) -> dict[str, Any]:
    """Returns the contents of a pipeline that was loaded from a folder in float32, as JSON can hold them.

    Returns:
        `tensors`: for each weight, and for the second moments of the analytic variance where they are known, the first
        16 hexadecimal digits of the sha256 of its shape and its float32 values; `settings`: those of the index, of the
        network and of the scheduler, with the defaults of what their files do not say.
    """
    tensors = dict(pipeline.unet.state_dict())
    moments = getattr(pipeline.scheduler, MOMENTS, None)
    if moments is not None:
        tensors[MOMENTS] = moments
    return {
        "tensors": {name: _digest(tensor) for name, tensor in sorted(tensors.items())},
        "settings": {
            "model_index.json": _settings(json.loads((folder / "model_index.json").read_text(encoding="utf-8"))),
            "the network": _settings(json.loads(pipeline.unet.to_json_string())),
            "the scheduler": _settings(json.loads(pipeline.scheduler.to_json_string())),
        },
    }


def differing_tensors(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Returns the names of the tensors that have other values, are missing, or should not be there.

    Second moments that were estimated later are no difference, since nothing uses them unless it is asked to.
    """
    names = set(found) | set(expected)
    if MOMENTS not in expected:
        names.discard(MOMENTS)
    return sorted(name for name in names if found.get(name) != expected.get(name))


def differing_settings(
    pipeline: GaussianDiffusionPipeline, found: Mapping[str, Any], expected: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yields which part has other settings, and which these are, old and new.

    A setting that one side does not know, as another version of diffusers wrote it, has its default there.
    """
    kinds: dict[str, Any] = {"the network": type(pipeline.unet), "the scheduler": type(pipeline.scheduler)}
    for part, settings in found.items():
        before = expected.get(part, {})
        defaults = _defaults(kinds[part]) if part in kinds else {}
        changes = [
            f"{name} was {_shown(old)}, is {_shown(new)}"
            for name in sorted({*settings, *before})
            if (old := before.get(name, defaults.get(name))) != (new := settings.get(name, defaults.get(name)))
        ]
        if changes:
            yield part, "; ".join(changes)


def differing_variants(folder: Path, weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str, bool]]:
    """Yields the variants of the weights that are not these weights in lower precision.

    Args:
        folder: A saved pipeline.
        weights: float32, those without a variant.

    Yields:
        The pattern of the files, what is wrong, and whether it is known to be wrong: a variant in full precision may
        hold other weights by intention.
    """
    files = sorted(folder.glob("unet/*.*.safetensors"))
    for variant, paths in groupby(files, lambda path: path.name.split(".")[1].partition("-")[0]):
        try:
            tensors = {name: tensor for path in paths for name, tensor in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            yield f"unet/*.{variant}.safetensors", f"cannot be read ({reason_of(error)})", True
            continue
        wrong = [
            name
            for name in sorted({*tensors, *weights})
            if name not in tensors
            or name not in weights
            or not tensors[name].equal(weights[name].to(tensors[name].dtype))
        ]
        if wrong:
            is_half = all(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors.values())
            yield f"unet/*.{variant}.safetensors", f"holds other weights ({some_of(wrong)})", is_half


def some_of(names: list[str]) -> str:
    """Returns the first of some names, and how many there are besides."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _digest(tensor: torch.Tensor) -> str:
    """Returns the beginning of the sha256 of a tensor's shape and float32 values."""
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    digest = hashlib.sha256(str(tuple(values.shape)).encode())
    digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration without what does not change what is computed."""
    return {name: value for name, value in config.items() if name not in _NOT_SETTINGS}


def _defaults(kind: type) -> dict[str, Any]:
    """Returns the defaults of a constructor, as JSON has them."""
    parameters = inspect.signature(kind).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    return dict(json.loads(json.dumps(defaults, default=str)))


def _shown(value: object) -> str:
    """Returns a setting as a person wants to see it."""
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


FILE_NAME = "verification.json"
SCHEMA = 3
SEED = 0
NUM_STEPS = 4
SPACING = "leading"
"""It ends at t = 0, as a list must for the stock scheduler to add no noise in the last step."""
MOST_LABELS = 16
LARGEST_SIDE = 32
"""Of the noise that the network sees with each label; the sampled image has the full size."""
CORNER = 8
TOLERANCE = 1e-3
"""Of the range of an image: a quarter of a gray level. Processors and versions of torch differ by less."""
_OTHER_BYTES = "has other bytes than were saved"
_LOCAL_CODE = "diffusers_modules.local"
_FILES = ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json")


@dataclass(frozen=True)
class Finding:
    """How one way of loading went.

    Args:
        way: What was done.
        difference: Largest difference from what was saved, as a share of the range; None where it was not tried.
        problem: What differs, or why it was not tried, in a sentence; empty where all is well.
        is_open: Whether it says that something cannot be told.
    """

    way: str
    difference: float | None
    problem: str = ""
    is_open: bool = False

    @property
    def is_other_file(self) -> bool:
        """Whether it is about a file with other bytes, which may mean the same."""
        return self.problem == _OTHER_BYTES

    @property
    def is_bad(self) -> bool:
        """Whether the folder is not what was saved."""
        return bool(self.problem) and self.difference is not None


def write_verification(folder: Path) -> None:
    """Loads a saved pipeline as float32 on the CPU, and writes what it computes into its folder.

    Raises:
        ValueError: The folder holds no pipeline, or one whose network does not tell the size of its images.
    """
    pipeline = GaussianDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    content = {
        "schema": SCHEMA,
        "seed": SEED,
        "num_inference_steps": min(NUM_STEPS, len(pipeline.scheduler)),
        "timestep_spacing": SPACING,
        "labels": _labels(pipeline),
        **contents_of(pipeline, folder),
        **_compute(pipeline, GaussianDiffusionPipeline),
        "files": {name: _sha256(folder / name) for name in _file_names(folder)},
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
    }
    write_text(folder / FILE_NAME, json.dumps(content, indent=1) + "\n")


def verify(folder: Path, *, runs_its_code: bool = False) -> list[Finding]:
    """Compares weights and settings with those that were saved, and computes the same again in each way of loading.

    Args:
        folder: A saved pipeline with verification.json.
        runs_its_code: Run the code in the folder although it is not the installed one, which is consent.

    Raises:
        ValueError: There is no verification.json, or it is damaged or of a newer version.
    """
    expected = _read(folder)
    findings = list(_compare_files(folder, expected))
    try:
        pipeline = GaussianDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        return [*findings, Finding("with ddpm_hf", 1.0, f"does not load: {reason_of(error)}")]
    findings.extend(_compare_contents(folder, pipeline, expected))
    findings.append(_compare("with ddpm_hf", pipeline, GaussianDiffusionPipeline, expected))
    if pipeline.num_classes or not stock_pipeline_samples(pipeline):
        why = (
            "the stock pipeline knows no classes"
            if pipeline.num_classes
            else "the stock pipeline cannot sample from it"
        )
        findings.append(Finding("with diffusers alone", None, why))
    else:
        load = functools.partial(DiffusionPipeline.from_pretrained, folder)
        findings.append(_load_and_compare("with diffusers alone", load, expected))
    if not any(folder.rglob("*.py")):
        findings.append(Finding("with the code in the folder", None, "there is no code in it"))
    elif runs_its_code or _has_installed_code(folder):
        load = functools.partial(
            DiffusionPipeline.from_pretrained, folder, custom_pipeline=str(folder), trust_remote_code=True
        )
        with _no_other_local_code():
            findings.append(_load_and_compare("with the code in the folder", load, expected))
    else:
        why = "it differs from the installed one; read it, then pass --trust_remote_code to run it"
        findings.append(Finding("with the code in the folder", None, why, is_open=True))
    return findings


def verify_contents(folder: Path, pipeline: GaussianDiffusionPipeline) -> list[Finding]:
    """Compare the weights and settings of a pipeline that was loaded from a folder with its verification.json.

    Raises:
        ValueError: There is no verification.json, or it is damaged or of a newer version.
    """
    return list(_compare_contents(folder, pipeline, _read(folder)))


def _read(folder: Path) -> dict[str, Any]:
    """Reads verification.json."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {FILE_NAME}; write one with ddpm-hf verify {folder} --write.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema, seed = content["schema"], content["seed"]
        corners = [content[name]["corner"] for name in ("network", "image")]
        mappings = [content["files"], content["tensors"], *content["settings"].values()] if schema == SCHEMA else []
        is_whole = all(np.asarray(corner, dtype=float).size for corner in corners) and all(
            isinstance(mapping, dict) for mapping in mappings
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({reason_of(error)}); write it anew with --write.") from None
    if not is_whole or (schema, seed) != (SCHEMA, SEED):
        raise ValueError(
            f"{path} was written by another version of ddpm_hf (schema {schema!r}, not {SCHEMA}); if you know that the "
            f"folder is what was saved, write it anew with ddpm-hf verify {folder} --write."
        )
    return dict(content)


def _compare_files(folder: Path, expected: dict[str, Any]) -> Iterator[Finding]:
    """Yields a finding for every file that is missing or has other bytes; other bytes alone may mean the same."""
    for name, digest in expected["files"].items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not path.is_file():
            yield Finding(name, 1.0, "is missing")
        elif _sha256(path) != digest:
            yield Finding(name, None, _OTHER_BYTES)


def _compare_contents(folder: Path, pipeline: GaussianDiffusionPipeline, expected: dict[str, Any]) -> Iterator[Finding]:
    """Yields a finding for weights, settings and variants of the weights that are not those that were saved."""
    found = contents_of(pipeline, folder)
    if names := differing_tensors(found["tensors"], expected["tensors"]):
        yield Finding("the weights", 1.0, f"have other values ({some_of(names)})")
    for part, problem in differing_settings(pipeline, found["settings"], expected["settings"]):
        yield Finding(f"settings of {part}", 1.0, problem)
    for files, problem, is_wrong in differing_variants(folder, pipeline.unet.state_dict()):
        if is_wrong:
            yield Finding(files, 1.0, problem)
        else:
            yield Finding(files, None, f"{problem}, of which {FILE_NAME} says nothing", is_open=True)
    if MOMENTS in found["tensors"] and MOMENTS not in expected["tensors"]:
        why = f"were estimated after {FILE_NAME} was written, which says nothing of them"
        yield Finding("second moments", None, why, is_open=True)


def _load_and_compare(way: str, load: Callable[..., Any], expected: dict[str, Any]) -> Finding:
    """Loads as a user of diffusers would; whatever is raised there is a finding."""
    try:
        pipeline = load(dtype=torch.float32, use_safetensors=True)
    except Exception as error:
        return Finding(way, 1.0, f"does not load: {reason_of(error)}")
    return _compare(way, pipeline, type(pipeline), expected)


def _compare(way: str, pipeline: Any, kind: type, expected: dict[str, Any]) -> Finding:
    """Compares what a pipeline computes with what was saved."""
    try:
        found = _compute(pipeline, kind)
    except Exception as error:
        return Finding(way, 1.0, f"does not sample: {reason_of(error)}")
    largest, problem = 0.0, ""
    for name, what in (("network", "the network's output"), ("image", "the sampled image")):
        for part in ("mean", "deviation", "corner"):
            saved, now = np.asarray(expected[name][part]), np.asarray(found[name][part])
            difference = float(np.abs(saved - now).max()) if saved.shape == now.shape else np.inf
            difference = np.inf if np.isnan(difference) else difference
            largest = max(largest, difference)
            if difference > TOLERANCE and not problem:
                problem = f"{what} differs: its {part} by {difference:.2g}, more than {TOLERANCE:g}"
    return Finding(way, largest, problem)


@torch.no_grad()
def _compute(pipeline: Any, kind: type) -> dict[str, Any]:
    """Runs the network once, on one noise with each label, and the pipeline for a few steps, in float32 on the CPU."""
    pipeline = pipeline.to("cpu")
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.scheduler.config
    spaced = {"timestep_spacing": SPACING} if "timestep_spacing" in config else {}
    pipeline.scheduler = type(pipeline.scheduler).from_config(config, **spaced)
    unet = pipeline.unet.eval()
    shape = (1, unet.config.in_channels, *image_size(unet))
    x_t = randn_tensor(shape, generator=torch_generator("cpu", SEED, "verification"))
    numbers = _labels(pipeline)
    labels = None if numbers is None else torch.tensor(numbers)
    side = max(LARGEST_SIDE, 2 ** (len(unet.config.block_out_channels) - 1))
    x_t = x_t[:, :, :side, :side].repeat(len(numbers or [0]), 1, 1, 1)
    with _one_thread():
        timestep = torch.tensor(len(pipeline.scheduler) // 2)
        output = unet(x_t, timestep, class_labels=labels, return_dict=False)[0]
        arguments = {} if labels is None else {"class_labels": [0]}
        image = pipeline(
            batch_size=1,
            num_inference_steps=min(NUM_STEPS, len(pipeline.scheduler)),
            generator=torch_generator("cpu", SEED, "verification"),
            output_type="np",
            **arguments,
        ).images
    return {"network": _statistics(output), "image": _statistics(torch.from_numpy(image).permute(0, 3, 1, 2))}


def _labels(pipeline: Any) -> list[int] | None:
    """Returns the first labels of a network and the last one, which may be the null label; None without labels."""
    count = pipeline.unet.config.num_class_embeds
    return None if count is None else sorted({*range(min(count, MOST_LABELS)), count - 1})


@contextmanager
def _no_other_local_code() -> Iterator[None]:
    """Sets aside what diffusers loaded from other folders: it gives the code of every local folder one module name."""
    aside = {name: module for name, module in sys.modules.items() if name.startswith(_LOCAL_CODE)}
    for name in aside:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith(_LOCAL_CODE)]:
            del sys.modules[name]
        sys.modules.update(aside)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, however many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _statistics(values: torch.Tensor) -> dict[str, Any]:
    """Returns mean and deviation of each image, and the upper left corner of its first channel."""
    values = values.double()
    return {
        "shape": list(values.shape),
        "mean": values.flatten(1).mean(dim=1).tolist(),
        "deviation": values.flatten(1).std(dim=1).tolist(),
        "corner": values[:, 0, :CORNER, :CORNER].numpy().round(6).tolist(),
    }


def _file_names(folder: Path) -> list[str]:
    """Returns weights and configurations of a saved pipeline."""
    weights = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.safetensors"))
    return [*(name for name in _FILES if (folder / name).is_file()), *weights]


def _has_installed_code(folder: Path) -> bool:
    """Tells whether the code in the folder is the installed one, byte by byte, and the index names no other."""
    own = Path(__file__).parents[1] / "diffusion"
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = [value for key, value in index.items() if isinstance(value, list) and key != "_class_name"]
    return (
        sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py")) == sorted(PORTABLE_FILES)
        and all(_sha256(folder / name) == _sha256(own / name) for name in PORTABLE_FILES)
        and index.get("_class_name") in (LIST_FORM, "DDPMPipeline")
        and all(part[:1] == ["diffusers"] for part in parts)
    )


def _sha256(path: Path) -> str:
    """Returns the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
