"""What a checkpoint holds: networks, the optimiser's moments and counters, to and from a folder."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ddpm_hf.training.ema import EMA
from ddpm_hf.training.optimizer_state import Scalars, pack, unpack

_COUNTS = ("global_step", "num_ema_updates", "num_skipped", "num_consecutive_skipped", "num_scaler_skips")
_OBJECTIVE_FILE = "objective.safetensors"


@dataclass
class TrainerState:
    """The counters of a run; everything else in it is a tensor or a function of these.

    Args:
        global_step: Optimiser updates done, skipped ones included; the only clock.
        num_ema_updates: Updates of the average.
        num_skipped: Updates skipped because a gradient was not finite.
        num_consecutive_skipped: Those of them at the end.
        num_scaler_skips: Updates skipped because the fp16 gradient scaler had scaled too far.
        loss_sums: For each rank, what its `LossMeter` summed up since the last line of metrics.
        num_images: Images in the training set, whose order the run depends on; 0 when streaming.
        data_digest: What tells the data from others; empty when streaming.
        streams: Where each rank is in its stream; empty without one.
        micro_batch_size: Images of one forward on one device, which "auto" stays at.
        scaler: State of the fp16 gradient scaler; None without one.
        optimizer: What an optimiser knows beside tensors; empty for Adam.
        best: Step, kind and value of the best score so far; None before the first.
    """

    global_step: int = 0
    num_ema_updates: int = 0
    num_skipped: int = 0
    num_consecutive_skipped: int = 0
    num_scaler_skips: int = 0
    loss_sums: list[list[float]] = field(default_factory=list)
    num_images: int = 0
    data_digest: str = ""
    streams: list[dict[str, Any]] = field(default_factory=list)
    micro_batch_size: int | None = None
    scaler: dict[str, float | int] | None = None
    optimizer: Scalars = field(default_factory=dict)
    best: dict[str, Any] | None = None


def write_snapshot(
    folder: Path, unet: UNet2DModel, ema: EMA, optimizer: torch.optim.Optimizer, state: TrainerState, config_yaml: str
) -> None:
    """Writes everything a run needs to go on, in files that other programs can read too.

    Raises:
        OSError: If the disk does not take it.
    """
    try:
        unet.save_pretrained(folder / "unet")
        for name in ema.names:
            with ema.swapped_in(unet, name):
                unet.save_pretrained(folder / name)
        tensors, scalars = pack(optimizer, _names(unet))
        save_file(tensors, folder / "optimizer.safetensors")
    except SafetensorError as error:
        raise OSError(str(error)) from error
    counters = json.dumps(asdict(state) | {"optimizer": scalars}, indent=2)
    (folder / "trainer_state.json").write_text(counters, encoding="utf-8")
    (folder / "config.yaml").write_text(config_yaml, encoding="utf-8")


def read_snapshot(folder: Path, unet: UNet2DModel, ema: EMA) -> tuple[TrainerState, dict[str, torch.Tensor]]:
    """Restores the networks from a verified folder.

    Returns:
        The counters of the run and the optimiser's named tensors, for `load_optimizer`.
    """
    state = TrainerState(**json.loads((folder / "trainer_state.json").read_text(encoding="utf-8")))
    _check_counters(state)
    for name in ema.names:
        _copy_weights(folder / name, unet)
        ema.load(unet, state.num_ema_updates, name)
    _copy_weights(folder / "unet", unet)
    return state, load_file(folder / "optimizer.safetensors")


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    unet: UNet2DModel,
    tensors: Mapping[str, torch.Tensor],
    scalars: Scalars | None = None,
) -> None:
    """Gives an optimiser what `write_snapshot` named after the parameters."""
    unpack(optimizer, _names(unet), tensors, scalars or {})


def write_objective(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes what the objective has learned, if it learns at all.

    Raises:
        OSError: If the disk does not take it.
    """
    if tensors:
        try:
            save_file(dict(tensors), folder / _OBJECTIVE_FILE)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_objective(folder: Path) -> dict[str, torch.Tensor]:
    """Returns what `write_objective` wrote; nothing for an objective that does not learn."""
    path = folder / _OBJECTIVE_FILE
    return load_file(path) if path.exists() else {}


def _check_counters(state: TrainerState) -> None:
    """Refuses counters that nothing could count on from."""
    for name in _COUNTS:
        if not isinstance(value := getattr(state, name), int) or value < 0:
            raise ValueError(f"{name} is {value!r}; it must be 0 or a larger integer")
    if state.micro_batch_size is not None and not isinstance(state.micro_batch_size, int):
        raise ValueError(f"micro_batch_size is {state.micro_batch_size!r}; it must be an integer")
    best = state.best
    if best is not None and not (
        set(best) == {"step", "kind", "value"}
        and isinstance(best["step"], int)
        and isinstance(best["kind"], str)
        and isinstance(best["value"], int | float)
    ):
        raise ValueError(f"best is {best!r}; it must hold the step, the kind and the value of a score")


def _names(unet: UNet2DModel) -> list[str]:
    """Returns the names of the parameters, in the order of the optimiser."""
    return [name for name, _ in unet.named_parameters()]


def _copy_weights(folder: Path, unet: UNet2DModel) -> None:
    """Copies weights from a folder in diffusers format into a network of the same shape."""
    unet.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
