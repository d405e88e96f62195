"""What a saved pipeline consists of, whatever its files look like: the values of its tensors, and its settings.

A file that was written anew in another way has the same contents; any other weight or setting is a difference.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.redaction import reason_of

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
