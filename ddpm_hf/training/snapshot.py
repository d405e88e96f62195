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


@dataclass
class TrainerState:
    """The counters of a run; everything else in it is a tensor or a function of these.

    Args:
        global_step: Optimiser updates done, skipped ones included; the only clock.
        num_ema_updates: Updates of the average.
        num_skipped: Updates skipped because a gradient was not finite.
        num_consecutive_skipped: Those of them at the end.
        loss_sums: For each rank, sum and number of the losses since the last line of metrics.
        num_images: Images in the training set, whose order the run depends on; 0 when streaming.
        data_digest: What tells the data from others; empty when streaming.
        streams: Where each rank is in its stream; empty without one.
        scaler: State of the fp16 gradient scaler; None without one.
    """

    global_step: int = 0
    num_ema_updates: int = 0
    num_skipped: int = 0
    num_consecutive_skipped: int = 0
    loss_sums: list[list[float]] = field(default_factory=list)
    num_images: int = 0
    data_digest: str = ""
    streams: list[dict[str, Any]] = field(default_factory=list)
    scaler: dict[str, float | int] | None = None


def write_snapshot(
    folder: Path, unet: UNet2DModel, ema: EMA, optimizer: torch.optim.Optimizer, state: TrainerState, config_yaml: str
) -> None:
    """Writes everything a run needs to go on, in files that other programs can read too.

    Raises:
        OSError: If the disk does not take it.
    """
    try:
        unet.save_pretrained(folder / "unet")
        with ema.swapped_in(unet):
            unet.save_pretrained(folder / "ema")
        save_file(_optimizer_tensors(unet, optimizer), folder / "optimizer.safetensors")
    except SafetensorError as error:
        raise OSError(str(error)) from error
    (folder / "trainer_state.json").write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
    (folder / "config.yaml").write_text(config_yaml, encoding="utf-8")


def read_snapshot(folder: Path, unet: UNet2DModel, ema: EMA) -> tuple[TrainerState, dict[str, torch.Tensor]]:
    """Restores the networks from a verified folder.

    Returns:
        The counters of the run and the optimiser's named tensors, for `load_optimizer`.
    """
    state = TrainerState(**json.loads((folder / "trainer_state.json").read_text(encoding="utf-8")))
    _copy_weights(folder / "ema", unet)
    ema.load(unet, state.num_ema_updates)
    _copy_weights(folder / "unet", unet)
    return state, load_file(folder / "optimizer.safetensors")


def load_optimizer(optimizer: torch.optim.Optimizer, unet: UNet2DModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives an optimiser the tensors that `write_snapshot` named after the parameters."""
    state_dict = optimizer.state_dict()
    state_dict["state"] = {}
    for index, (name, _) in enumerate(unet.named_parameters()):
        prefix = f"{name}/"
        moments = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if moments:
            state_dict["state"][index] = moments
    optimizer.load_state_dict(state_dict)


def _optimizer_tensors(unet: UNet2DModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Names the optimiser's tensors after the parameters they belong to."""
    names = [name for name, _ in unet.named_parameters()]
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{key}": value.contiguous()
        for index, moments in state.items()
        for key, value in moments.items()
    }


def _copy_weights(folder: Path, unet: UNet2DModel) -> None:
    """Copies weights from a folder in diffusers format into a network of the same shape."""
    unet.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
