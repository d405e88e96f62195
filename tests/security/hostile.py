"""Hostile things that run code when they are taken for what they are: each would make the canary."""

import pickle
from pathlib import Path

import torch


class _Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self._canary), "w")


def pickle_that_runs(canary: Path) -> bytes:
    return pickle.dumps(_Bomb(canary))


def torch_file_that_runs(canary: Path, path: Path) -> None:
    """Writes what torch.load(weights_only=False) would run."""
    torch.save({"weights": _Bomb(canary)}, path)


def module_that_runs(canary: Path) -> str:
    """Returns the text of a module that runs when it is imported; it has every name that a loader may ask for."""
    return (
        f"open({str(canary)!r}, 'w').close()\n"
        "from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel\n"
        "class Hostile(DiffusionPipeline): pass\n"
        "GaussianDiffusionPipeline = GaussianDiffusionScheduler = Hostile\n"
    )
