"""Hostile inputs that run code when they are unpickled or imported: each would make the canary."""

import pickle
from pathlib import Path

import torch


class _Bomb:
    """Make a file when unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self._canary), "w")


def pickle_that_runs(canary: Path) -> bytes:
    return pickle.dumps(_Bomb(canary))


def torch_file_that_runs(canary: Path, path: Path) -> None:
    """Write a file whose code torch.load(weights_only=False) would run."""
    torch.save({"weights": _Bomb(canary)}, path)


def module_that_runs(canary: Path) -> str:
    """Return a module that makes the canary when imported and defines every name that a loader may ask for."""
    return (
        f"open({str(canary)!r}, 'w').close()\n"
        "from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel\n"
        "class Hostile(DiffusionPipeline): pass\n"
        "GaussianDiffusionPipeline = GaussianDiffusionScheduler = Hostile\n"
    )
