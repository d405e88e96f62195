"""verification.json: what a saved pipeline contains and computes, so that a damaged or changed copy is detected.

It holds a digest of the values of each tensor and all settings, which identify the pipeline: a file that was only saved
again has the same contents. For one seed, in float32 on a CPU, it holds statistics of the output of the network for
noise, for up to 16 labels and the null label, and of the image that four ancestral steps sample, decoded by the VAE if
there is one; these detect an environment that computes something else. It also holds the sha256 of the files.
"""

import functools
import hashlib
import inspect
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from safetensors.torch import load_file

import ddpm_hf.diffusion
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.diffusion.images import image_size
from ddpm_hf.diffusion.saved_folder import LIST_FORM, PORTABLE_FILES, stock_pipeline_samples
from ddpm_hf.diffusion.scheduler import NATIVE_SCHEDULER, default_num_inference_steps
from ddpm_hf.files import MODEL_INDEX, VERIFICATION, format_value, read_json, sha256_of_file, write_json
from ddpm_hf.redaction import reason_of
from ddpm_hf.rng import torch_generator

SCHEMA = 3
SEED = 0
NUM_STEPS = 4
TIMESTEP_SPACING = "leading"
"""Its timesteps end at t = 0, so that the stock scheduler adds no noise in the last step."""
MAX_LABELS = 16
MAX_NOISE_SIZE = 32
"""Height and width of the noise that the network is evaluated on; the sampled image has the full size."""
CORNER_SIZE = 8
TOLERANCE = 1e-3
"""In units of the image range: a quarter of a gray level. Processors and versions of torch differ by less."""

_SECOND_MOMENTS = "eps_second_moments"
# Optimized timesteps are chosen after the pipeline was saved, and used by name only.
_IGNORED_SETTINGS = ("_diffusers_version", "_name_or_path", "_use_default_values", "optimized_timesteps")
_FILES = ("unet/config.json", "scheduler/scheduler_config.json", "vae/config.json", MODEL_INDEX)
_LOCAL_CODE = "diffusers_modules.local"
# Digest of the code that version 0.1 wrote into saved folders.
_CODE_OF_0_1 = "aed3a15462357904b7c564789fa2d0dd5179324116085b05423b1d41466800a8"


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Args:
        way: The file, the part or the way of loading that was checked.
        problem: What is different, or why it was not checked; empty if nothing is different.
        is_bad: Whether the pipeline is not the one that was saved.
        difference: For a way of loading, the largest difference of its outputs in units of the image range; None if
            nothing was computed.
        is_other_file: Whether a file has other bytes, which may hold the same values.
        is_open: Whether it remains unknown if this is what was saved.
    """

    way: str
    problem: str = ""
    is_bad: bool = False
    difference: float | None = None
    is_other_file: bool = False
    is_open: bool = False


def write_verification(folder: Path) -> None:
    """Load a saved pipeline in float32 on the CPU, and write verification.json into its folder.

    Raises:
        ValueError: The folder holds no pipeline, or its network has no size.
    """
    pipeline = GaussianDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    files = [name for name in _FILES if (folder / name).is_file()]
    files += sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.safetensors"))
    content = {
        "schema": SCHEMA,
        "seed": SEED,
        "num_inference_steps": default_num_inference_steps(pipeline.scheduler, NUM_STEPS),
        "timestep_spacing": TIMESTEP_SPACING,
        "labels": _labels(pipeline),
        "tensors": _tensor_digests(pipeline),
        "settings": _settings(pipeline, folder),
        **_compute(pipeline),
        "files": {name: sha256_of_file(folder / name) for name in files},
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
    }
    write_json(folder / VERIFICATION, content)


def verify(folder: Path, *, run_code: bool = False) -> list[Finding]:
    """Compare a saved pipeline with its verification.json, and compute the same outputs in each way of loading it.

    Args:
        folder: A saved pipeline with verification.json.
        run_code: Run the code in the folder even if it is neither that of the installed ddpm_hf nor that of 0.1.

    Raises:
        ValueError: verification.json is missing, damaged or of another version.
    """
    expected = _read(folder)
    findings = list(_compare_files(folder, expected["files"]))
    try:
        pipeline = GaussianDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        return [*findings, Finding("with ddpm_hf", f"does not load: {reason_of(error)}", is_bad=True)]
    findings += _compare_contents(folder, pipeline, expected)
    findings.append(_compare_outputs("with ddpm_hf", lambda: pipeline, expected))

    way = "with diffusers alone"
    load = functools.partial(DiffusionPipeline.from_pretrained, folder, dtype=torch.float32, use_safetensors=True)
    if pipeline.num_classes:
        findings.append(Finding(way, "the stock pipeline does not support classes"))
    elif not stock_pipeline_samples(pipeline):
        findings.append(Finding(way, "the stock pipeline cannot sample from it"))
    else:
        findings.append(_compare_outputs(way, load, expected))

    way = "with the code in the folder"
    if not any(folder.rglob("*.py")):
        findings.append(Finding(way, "there is no code in it"))
    elif run_code or _is_own_code(folder):
        load = functools.partial(load, custom_pipeline=str(folder), trust_remote_code=True)
        with _without_local_code():
            findings.append(_compare_outputs(way, load, expected))
    else:
        problem = "it differs from the code of ddpm_hf; read it, then pass --trust_remote_code to run it"
        findings.append(Finding(way, problem, is_open=True))
    return findings


def verify_contents(folder: Path, pipeline: GaussianDiffusionPipeline) -> list[Finding]:
    """Compare the weights and settings of a pipeline that was loaded from a folder with its verification.json.

    Raises:
        ValueError: verification.json is missing, damaged or of another version.
    """
    return list(_compare_contents(folder, pipeline, _read(folder)))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / VERIFICATION
    if not path.is_file():
        raise ValueError(f"{folder} has no {VERIFICATION}; write one with ddpm-hf verify {folder} --write.")
    fix = f"if you know that the folder is what was saved, write it again with ddpm-hf verify {folder} --write"
    content = read_json(path, fix)
    if (schema := content.get("schema")) != SCHEMA or content.get("seed") != SEED:
        raise ValueError(f"{path} was written by another version of ddpm_hf (schema {schema!r}, not {SCHEMA}); {fix}.")
    try:
        corners = [np.asarray(content[name]["corner"], dtype=float) for name in ("network", "image")]
        mappings = [content["files"], content["tensors"], *content["settings"].values()]
        is_valid = all(corner.size for corner in corners) and all(isinstance(mapping, dict) for mapping in mappings)
    except (ValueError, KeyError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise ValueError(f"{path} is incomplete; {fix}.")
    return content


def _compare_files(folder: Path, expected: Mapping[str, str]) -> Iterator[Finding]:
    for name, sha256 in expected.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not path.is_file():
            yield Finding(name, "is missing", is_bad=True)
        elif sha256_of_file(path) != sha256:
            yield Finding(name, "has other bytes than were saved", is_other_file=True)


def _compare_contents(
    folder: Path, pipeline: GaussianDiffusionPipeline, expected: Mapping[str, Any]
) -> Iterator[Finding]:
    yield from _compare_tensors(_tensor_digests(pipeline), expected["tensors"])
    yield from _compare_settings(pipeline, _settings(pipeline, folder), expected["settings"])
    yield from _compare_variants(folder, "unet", pipeline.unet.state_dict())
    if pipeline.vae is not None:
        yield from _compare_variants(folder, "vae", pipeline.vae.state_dict())


def _tensor_digests(pipeline: GaussianDiffusionPipeline) -> dict[str, str]:
    """Return, for each weight and for known second moments, 16 digits of the sha256 of its shape and float32 values."""
    tensors = dict(pipeline.unet.state_dict())
    if pipeline.vae is not None:
        tensors |= {f"vae.{name}": tensor for name, tensor in pipeline.vae.state_dict().items()}
    moments = getattr(pipeline.scheduler, _SECOND_MOMENTS, None)
    if moments is not None:
        tensors[_SECOND_MOMENTS] = moments
    digests = {}
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest = hashlib.sha256(str(tuple(values.shape)).encode())
        digest.update(values.numpy().tobytes())
        digests[name] = digest.hexdigest()[:16]
    return digests


def _compare_tensors(found: Mapping[str, str], expected: Mapping[str, str]) -> Iterator[Finding]:
    # Second moments that were estimated later are not a difference: they are not used by default.
    is_later_estimate = _SECOND_MOMENTS in found and _SECOND_MOMENTS not in expected
    names = {*found, *expected} - ({_SECOND_MOMENTS} if is_later_estimate else set())
    if different := sorted(name for name in names if found.get(name) != expected.get(name)):
        yield Finding("the weights", f"have other values ({_summarize(different)})", is_bad=True)
    if is_later_estimate:
        problem = f"were estimated after {VERIFICATION} was written and are not verified"
        yield Finding("second moments", problem, is_open=True)


def _settings(pipeline: GaussianDiffusionPipeline, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of the index, of the network, of the scheduler and of a VAE, with defaults filled in."""
    configs = {
        MODEL_INDEX: read_json(folder / MODEL_INDEX),
        "the network": json.loads(pipeline.unet.to_json_string()),
        "the scheduler": json.loads(pipeline.scheduler.to_json_string()),
    }
    if pipeline.vae is not None:
        configs["the VAE"] = json.loads(pipeline.vae.to_json_string())
    return {
        part: {name: value for name, value in config.items() if name not in _IGNORED_SETTINGS}
        for part, config in configs.items()
    }


def _compare_settings(
    pipeline: GaussianDiffusionPipeline, found: Mapping[str, Any], expected: Mapping[str, Any]
) -> Iterator[Finding]:
    """Compare settings; one that is missing on one side, as in other versions of diffusers, has its default there."""
    parts = {"the network": pipeline.unet, "the scheduler": pipeline.scheduler, "the VAE": pipeline.vae}
    components = {name: type(part) for name, part in parts.items()}
    for part, new in found.items():
        old, defaults = dict(expected.get(part, {})), {}
        if old.get("_class_name") == NATIVE_SCHEDULER:  # the name that earlier versions recorded
            old["_class_name"] = DDPMScheduler.__name__
        if part in components:
            parameters = inspect.signature(components[part]).parameters.values()
            defaults = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
            defaults = json.loads(json.dumps(defaults, default=str))
        changes = [
            f"{name} was {format_value(before, 40)}, is {format_value(now, 40)}"
            for name in sorted({*new, *old})
            if (before := old.get(name, defaults.get(name))) != (now := new.get(name, defaults.get(name)))
        ]
        if changes:
            yield Finding(f"settings of {part}", "; ".join(changes), is_bad=True)


def _compare_variants(folder: Path, part: str, weights: Mapping[str, torch.Tensor]) -> Iterator[Finding]:
    """Check that variants of the weights of a part, such as fp16, are the float32 weights in lower precision.

    A variant in full precision may hold other weights on purpose, such as those without EMA.
    """
    paths = sorted((folder / part).glob("*.*.safetensors"))
    for variant, shards in groupby(paths, lambda path: path.name.split(".")[1].partition("-")[0]):
        files = f"{part}/*.{variant}.safetensors"
        try:
            tensors = {name: tensor for path in shards for name, tensor in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            yield Finding(files, f"cannot be read ({reason_of(error)})", is_bad=True)
            continue
        different = [
            name
            for name in sorted({*tensors, *weights})
            if name not in tensors
            or name not in weights
            or not tensors[name].equal(weights[name].to(tensors[name].dtype))
        ]
        if different:
            problem = f"holds other weights ({_summarize(different)})"
            if all(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors.values()):
                yield Finding(files, problem, is_bad=True)
            else:
                yield Finding(files, f"{problem}, which {VERIFICATION} does not cover", is_open=True)


def _summarize(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _compare_outputs(way: str, load: Callable[[], Any], expected: Mapping[str, Any]) -> Finding:
    """Load a pipeline and compare its outputs with the saved ones; any exception is a finding."""
    try:
        pipeline = load()
    except Exception as error:
        return Finding(way, f"does not load: {reason_of(error)}", is_bad=True)
    try:
        found = _compute(pipeline)
    except Exception as error:
        return Finding(way, f"does not sample: {reason_of(error)}", is_bad=True)
    largest, problem = 0.0, ""
    for name, what in (("network", "the network's output"), ("image", "the sampled image")):
        for part in ("mean", "deviation", "corner"):
            saved, now = np.asarray(expected[name][part]), np.asarray(found[name][part])
            difference = float(np.abs(saved - now).max()) if saved.shape == now.shape else np.inf
            difference = np.inf if np.isnan(difference) else difference
            largest = max(largest, difference)
            if difference > TOLERANCE and not problem:
                problem = f"{what} differs: its {part} by {difference:.2g}, more than {TOLERANCE:g}"
    return Finding(way, problem, is_bad=bool(problem), difference=largest)


@torch.no_grad()
def _compute(pipeline: Any) -> dict[str, Any]:
    """Evaluate the network on one noise with each label, and sample one image in a few steps, in float32 on the CPU."""
    pipeline = pipeline.to("cpu")
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.scheduler.config
    spacing = {"timestep_spacing": TIMESTEP_SPACING} if "timestep_spacing" in config else {}
    pipeline.scheduler = type(pipeline.scheduler).from_config(config, **spacing)
    unet = pipeline.unet.eval()
    labels, names = _labels(pipeline), pipeline.config.get("class_names") or {}
    shape = (1, unet.config.in_channels, *image_size(unet))
    x_t = randn_tensor(shape, generator=torch_generator("cpu", SEED, "verification"))
    size = max(MAX_NOISE_SIZE, 2 ** (len(unet.config.block_out_channels) - 1))
    x_t = x_t[:, :, :size, :size].repeat(len(labels or [0]), 1, 1, 1)
    with _one_thread():
        output = unet(
            x_t,
            torch.tensor(len(pipeline.scheduler) // 2),
            class_labels=None if labels is None else torch.tensor(labels),
            return_dict=False,
        )[0]
        image = pipeline(
            batch_size=1,
            num_inference_steps=default_num_inference_steps(pipeline.scheduler, NUM_STEPS),
            generator=torch_generator("cpu", SEED, "verification"),
            output_type="np",
            **({} if labels is None else {"class_labels": [names.get("0", 0)]}),
        ).images
    return {"network": _statistics(output), "image": _statistics(torch.from_numpy(image).permute(0, 3, 1, 2))}


def _labels(pipeline: Any) -> list[int] | None:
    """Return the first labels of a network and the last one, which may be the null label; None without labels."""
    count = pipeline.unet.config.num_class_embeds
    return None if count is None else sorted({*range(min(count, MAX_LABELS)), count - 1})


def _statistics(values: torch.Tensor) -> dict[str, Any]:
    """Return mean and standard deviation of each image, and the upper left corner of its first channel."""
    values = values.double()
    return {
        "shape": list(values.shape),
        "mean": values.flatten(1).mean(dim=1).tolist(),
        "deviation": values.flatten(1).std(dim=1).tolist(),
        "corner": values[:, 0, :CORNER_SIZE, :CORNER_SIZE].numpy().round(6).tolist(),
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, so that the order of additions does not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _without_local_code() -> Iterator[None]:
    """Set aside the code of other folders that diffusers loaded: it uses one module name for all local folders."""
    saved = {name: module for name, module in sys.modules.items() if name.startswith(_LOCAL_CODE)}
    for name in saved:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith(_LOCAL_CODE)]:
            del sys.modules[name]
        sys.modules.update(saved)


def _is_own_code(folder: Path) -> bool:
    """Tell whether a folder has the code of the installed ddpm_hf or of 0.1, and its index names no other code."""
    installed = Path(ddpm_hf.diffusion.__file__).parent
    known = {_code_digest(installed, PORTABLE_FILES), _CODE_OF_0_1}
    index = read_json(folder / MODEL_INDEX)
    components = [
        value
        for key, value in index.items()
        if isinstance(value, list) and key != "_class_name" and not all(isinstance(x, int | float) for x in value)
    ]
    return (
        _code_digest(folder, [path.relative_to(folder).as_posix() for path in folder.rglob("*.py")]) in known
        and index.get("_class_name") in (LIST_FORM, "DDPMPipeline")
        and all(component[:1] == ["diffusers"] for component in components)
    )


def _code_digest(folder: Path, names: Iterable[str]) -> str:
    lines = [f"{sha256_of_file(folder / name)}  {name}\n" for name in sorted(names)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
