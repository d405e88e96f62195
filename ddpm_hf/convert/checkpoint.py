"""Checkpoint files of other systems: tensors and plain values only, no code.

This is the one place where ddpm_hf reads pickles, with `weights_only=True`: torch then builds tensors, numbers, texts
and containers, and refuses everything else.
"""

import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ddpm_hf.config import ConfigError
from ddpm_hf.redaction import reason_of

# What wraps a network in other trainers: parallel and compiled modules, diffusion modules, EMA modules.
_WRAPPERS = (
    "module.", "_orig_mod.", "model.", "ema_model.", "online_model.", "diffusion_model.", "denoise_fn.", "network.",
    "net.", "unet.", "ema.", "model_ema.",
)  # fmt: skip
# A file of torch.save before version 1.6 begins with this number, pickled.
_LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_MIN_TENSORS = 8
_MAX_DEPTH = 4
_EMA = re.compile(r"ema|shadow|averag", re.IGNORECASE)
# A checkpoint of ermongroup/ddim is a list.
_NAMES_OF_A_LIST = ("model", "optimizer", "epoch", "step", "ema")
# Metrics in a checkpoint are often numbers of numpy, under the module name of numpy 1 or 2. They hold no code.
_NUMPY: list[Any] = [
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file.

    Args:
        path: The file.
        content: What it holds: tensors, numbers, texts, dictionaries and lists.
    """

    path: Path
    content: Any

    def networks(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return everything that may be the weights of a network, by its place in the file.

        A place is a path such as `ema.shadow`, or with the prefix of a wrapper `model:module.`; that of a file which is
        a state dict is empty.
        """
        found = {place: tensors for place, tensors in _networks("", self.content, 0)}
        for name, value in _walk(self.content, 0):
            # torch_ema and diffusers store averages as a list, in the order of the parameters.
            if name.endswith("shadow_params") and isinstance(value, list):
                for tensors in list(found.values()):
                    if [one.shape for one in tensors.values()] == [getattr(one, "shape", None) for one in value]:
                        found[name] = dict(zip(tensors, value, strict=True))
        return found

    def betas(self) -> torch.Tensor | None:
        """Return the betas that a diffusion module stored beside its network, float64 (T,), or None."""
        for name, value in _walk(self.content, 0):
            if name.rpartition(".")[2] == "betas" and isinstance(value, torch.Tensor) and value.ndim == 1:
                return value.double()
        return None

    def buffer(self, name: str) -> torch.Tensor | None:
        """Return the first tensor whose name ends in `name`, or None."""
        found = (value for key, value in _walk(self.content, 0) if key.rpartition(".")[2] == name)
        return next((value for value in found if isinstance(value, torch.Tensor)), None)

    def optimizer(self) -> Mapping[str, Any]:
        """Return the options of the first parameter group of a stored optimizer, or an empty mapping."""
        values = self.content.values() if isinstance(self.content, Mapping) else self.content
        for value in values if isinstance(self.content, Mapping | list | tuple) else ():
            groups = value.get("param_groups") if isinstance(value, Mapping) else None
            if isinstance(groups, list) and groups and isinstance(groups[0], Mapping):
                return groups[0]
        return {}


def is_ema(place: str) -> bool:
    """Return whether a place in a checkpoint is that of averaged weights."""
    return _EMA.search(place) is not None and "online_model." not in place


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of `torch.save` or safetensors without running code.

    Raises:
        ConfigError: It is incomplete, contains code, or is another kind of file.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"version https://git-lfs"):
        raise ConfigError(f"{path} is a pointer of Git LFS, not the file; run git lfs pull.")
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise ConfigError(f"{path} is a web page, not a checkpoint; download the file itself.")
    if path.suffix == ".safetensors":
        try:
            return Checkpoint(path, load_file(path))
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{path} is not a complete safetensors file ({reason_of(error)}); copy it again."
            ) from None
    is_zip = head.startswith(b"PK\x03\x04")
    if not is_zip and not head.startswith(b"\x80"):
        raise ConfigError(
            f"{path} is neither a file of torch.save nor of safetensors; give a .pt, .pth, .ckpt or .safetensors."
        )
    if not is_zip and _LEGACY_MAGIC not in head:
        raise ConfigError(
            f"{path} is a pickle of Python objects, which could run code, and is not opened. Save the weights alone: "
            "torch.save(model.state_dict(), PATH). A pickle of NVlabs/edm holds a network that UNet2DModel cannot "
            "express: it scales the input, the noise level and the output."
        )
    if is_zip and not zipfile.is_zipfile(path):
        raise ConfigError(f"{path} is incomplete: the directory at the end of the archive is missing; copy it again.")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_NUMPY):
            warnings.simplefilter("ignore")  # about formats, of which errors tell more
            return Checkpoint(path, torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None))
    except Exception as error:  # torch raises many types for files that are not its own
        raise ConfigError(_describe(path, error)) from None


def _describe(path: Path, error: Exception) -> str:
    """Return a sentence about a file that torch refuses to read."""
    text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"{path} contains more than tensors ({found[1]}), which could run code, and is not opened. If you trust "
            "it, load it once with the program that wrote it, and save the weights alone: "
            "torch.save(model.state_dict(), PATH)."
        )
    if "TorchScript" in text:
        return f"{path} is a TorchScript program; save its weights alone: torch.save(module.state_dict(), PATH)."
    if isinstance(error, EOFError | RuntimeError) or "truncated" in text:
        return f"{path} is damaged or incomplete ({reason_of(error)}); copy it again."
    return f"{path} cannot be read as tensors alone ({reason_of(error)}); save the state dict alone with torch.save."


def _walk(content: Any, depth: int, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all values in nested containers, with their places."""
    if depth > _MAX_DEPTH:
        return
    if isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(key, str):
                yield f"{place}{key}", value
                yield from _walk(value, depth + 1, f"{place}{key}.")
    elif isinstance(content, list | tuple) and len(content) <= len(_NAMES_OF_A_LIST):
        for name, value in zip(_NAMES_OF_A_LIST, content, strict=False):
            yield f"{place}{name}", value
            yield from _walk(value, depth + 1, f"{place}{name}.")


def _networks(place: str, content: Any, depth: int) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield each mapping of names to tensors in a content, and those below a prefix that a wrapper added."""
    candidates = [(place, content), *_walk(content, 0, f"{place}." if place else "")]
    for name, value in candidates:
        if isinstance(value, Mapping):
            tensors = {key: one for key, one in value.items() if isinstance(key, str) and isinstance(one, torch.Tensor)}
            if len(tensors) >= _MIN_TENSORS:
                yield from _unwrapped(name, tensors, depth)


def _unwrapped(
    place: str, tensors: dict[str, torch.Tensor], depth: int
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    yield place, tensors
    if depth >= _MAX_DEPTH:
        return
    for wrapper in _WRAPPERS:
        inner = {key.removeprefix(wrapper): one for key, one in tensors.items() if key.startswith(wrapper)}
        if len(inner) >= _MIN_TENSORS:
            separator = "" if ":" in place or not place else ":"
            yield from _unwrapped(f"{place}{separator}{wrapper}", inner, depth + 1)
