"""The recipe of a checkpoint as a configuration: layers, process, objective and optimizer, for a training from scratch.

It also exists for networks that UNet2DModel cannot express; their recipe has the nearest layers.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
import yaml

from ddpm_hf.config import ConfigError
from ddpm_hf.convert.checkpoint import Checkpoint
from ddpm_hf.convert.conversion import describe, find_network, schedule_of
from ddpm_hf.convert.families import ABARANKAB, LUCIDRAINS, Family, channels_of
from ddpm_hf.convert.layers import Shapes
from ddpm_hf.convert.options import ConversionOptions

_EMA_DECAY = {
    "pesser": 0.9999, "ddpm_torch": 0.9999, "improved_diffusion": 0.9999, "guided_diffusion": 0.9999,
    "abarankab": 0.9999, "pytorch_ddpm": 0.9999,
}  # fmt: skip


def recipe(checkpoint: Checkpoint, options: ConversionOptions) -> str:
    """Return the configuration that trains the same recipe, as YAML with comments; it lacks the data.

    Raises:
        ConfigError: The checkpoint is of a family without a recipe, or a setting is missing.
    """
    found = find_network(checkpoint, options)
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    if isinstance(found.family, Family):
        settings, notes = _of_family(checkpoint, found.family, shapes, options)
    elif found.family.title == LUCIDRAINS:
        settings, notes = _of_lucidrains(checkpoint, shapes, options)
    else:
        raise ConfigError(
            f"{checkpoint.path} is a network of {found.family.title} ({found.family.layer(found.tensors)}), which has "
            f"no recipe here: it {found.family.reason}."
        )
    settings.setdefault("training", {}).update(_optimizer(checkpoint))
    if found.place:
        notes.insert(0, f"Read from {checkpoint.path.name}, {found.place.rstrip('.')}.")
    comments = "".join(f"# {note}\n" for note in notes)
    content = yaml.safe_dump(settings, sort_keys=False)
    return f"{comments}# Set data.source to the images, and training.output_dir.\n{content}"


def _of_family(
    checkpoint: Checkpoint, family: Family, shapes: Shapes, options: ConversionOptions
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    architecture, published, found = describe(checkpoint.path, family, shapes, options)
    notes = [f"A network of {family.title}{f': {published.name}' if published else ''}."]
    if (betas := checkpoint.betas()) is not None:
        found |= schedule_of(betas)
    width = found.get("num_head_channels")
    if width is None and (num_heads := found.get("num_heads")) not in (None, 1):
        widths = architecture.attention_widths
        width = max(widths) // num_heads
        if len(widths) > 1:
            notes.append(f"It has {num_heads} heads at every level; here all heads have {width} channels.")
            if any(channels % width for channels in widths):
                width = min(widths) // num_heads
    overrides = architecture.unet_config()
    for name in ("in_channels", "out_channels", "num_class_embeds", "num_train_timesteps", "time_embedding_type"):
        overrides.pop(name, None)
    overrides |= {**family.unet, "attention_head_dim": width, "dropout": found["dropout"]}
    has_classes = architecture.num_classes is not None or any("class_bias" in name for name in shapes)
    learned = architecture.out_channels == 2 * architecture.in_channels
    settings: dict[str, dict[str, Any]] = {
        **({"data": {"resolution": found["image_size"]}} if found.get("image_size") else {}),
        "model": {
            "preset": "ddpm_32", "overrides": overrides, "class_conditional": has_classes,
        },
        "diffusion": _process(found, notes) | {
            "prediction_type": found["prediction_type"], "variance_type": found["variance_type"],
            "clip_sample": found["clip_sample"], "timestep_spacing": found["timestep_spacing"],
        },
        "objective": {"loss": "hybrid" if learned else "mse"},
        "training": {"ema_decay": _EMA_DECAY[family.name]},
    }  # fmt: skip
    if found["rescale_timesteps"] and found["num_train_timesteps"] != 1000:
        notes.append("Its timesteps are scaled to 0 ... 1000; here the network is given the timesteps themselves.")
    if family is ABARANKAB:
        settings["training"] |= {"ema_start_step": 2000, "ema_warmup": "none"}
    return settings, notes


def _of_lucidrains(
    checkpoint: Checkpoint, shapes: Shapes, options: ConversionOptions
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    levels = sorted({int(match[1]) for name in shapes if (match := re.match(r"downs\.(\d+)\.", name))})
    channels = []
    for level in levels:
        last = [name for name in shapes if re.match(rf"downs\.{level}\.3\.(\d\.)?weight", name)]
        channels.append(channels_of(shapes, last[0] if last else f"downs.{level}.3.weight"))
    betas, weight = checkpoint.betas(), checkpoint.buffer("loss_weight")
    out_channels = channels_of(shapes, "final_conv.weight")
    in_channels = channels_of(shapes, "init_conv.weight", 1)
    notes = [
        f"The recipe of a network of {LUCIDRAINS}, with the layers of",
        "UNet2DModel that are nearest: other norms, attention at the lowest level only, and strided convolutions.",
    ]
    found = schedule_of(betas) if betas is not None else {"num_train_timesteps": 1000, "schedule": "sigmoid_alpha_bar"}
    if betas is None:
        notes.append("The file holds no betas; the schedule is the default of its GaussianDiffusion.")
    prediction_type, objective, is_known = _objective(betas, weight)
    if not is_known:
        notes.append("The file does not tell the objective; v_prediction is the default of its GaussianDiffusion.")
    if in_channels == 2 * out_channels:
        objective["self_conditioning"] = 0.5
    if options.image_size is None:
        notes.append("The file does not tell the size of the images; set data.resolution to it.")
    settings: dict[str, dict[str, Any]] = {
        **({"data": {"resolution": options.image_size, "random_flip": True}} if options.image_size else {}),
        "model": {
            "preset": "ddpm_32",
            "overrides": {
                "block_out_channels": channels,
                "down_block_types": ["DownBlock2D"] * (len(channels) - 1) + ["AttnDownBlock2D"],
                "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * (len(channels) - 1),
                "resnet_time_scale_shift": "scale_shift",
                "attn_norm_num_groups": 8,
                "norm_num_groups": 8,
                "attention_head_dim": 32,
                "dropout": 0.0,
            },
        },
        "diffusion": _process(found, notes) | {
            "prediction_type": options.prediction_type or prediction_type, "variance_type": "fixed_small",
        },
        "objective": objective,
        # Its EMA moves by 0.005 in every tenth step; a decay is per step here.
        "training": {"optimizer": "adam", "ema_decay": round(0.995**0.1, 6), "ema_every_steps": 10},
    }  # fmt: skip
    return settings, notes


def _objective(betas: torch.Tensor | None, weight: torch.Tensor | None) -> tuple[str, dict[str, Any], bool]:
    """Return the prediction type and the loss weighting, which the stored weights of the loss determine.

    They are 1, SNR and SNR / (SNR + 1) for epsilon, sample and v_prediction, with SNR clipped by min-SNR weighting.
    """
    if betas is None or weight is None or weight.shape != betas.shape:
        return "v_prediction", {}, False
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    for prediction_type, divisor in (("epsilon", snr), ("sample", torch.ones_like(snr)), ("v_prediction", snr + 1)):
        clipped = weight.double() * divisor
        # At the last timestep the SNR may be 0 in float32.
        rows = snr > 1e-3
        if torch.allclose(clipped[rows], snr[rows], rtol=1e-2):
            is_uniform = prediction_type == "epsilon"
            return prediction_type, {} if is_uniform else {"weighting": "snr"}, True
        gamma = float(clipped.max())
        if gamma > 0 and torch.allclose(clipped[rows], snr[rows].clamp(max=gamma), rtol=1e-2):
            return prediction_type, {"weighting": "min_snr", "min_snr_gamma": round(gamma, 3)}, True
    return "v_prediction", {}, False


def _process(found: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the settings of diffusion for a schedule."""
    if "trained_betas" in found:
        notes.append("Its betas are those of no named schedule; diffusion.beta_schedule below is only the default.")
        return {"num_train_timesteps": found["num_train_timesteps"]}
    settings = {"num_train_timesteps": found["num_train_timesteps"], "beta_schedule": found["schedule"]}
    if found["schedule"] in ("linear", "scaled_linear", "warmup10", "warmup50", "const"):
        settings |= {"beta_start": found["beta_start"], "beta_end": found["beta_end"]}
        if found.get("scale_betas") and found["schedule"] == "linear" and found["num_train_timesteps"] != 1000:
            settings["scale_betas_to_timesteps"] = True
    return settings


def _optimizer(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings of training for the optimizer in a checkpoint."""
    options = checkpoint.optimizer()
    settings: dict[str, Any] = {}
    if isinstance(rate := options.get("initial_lr", options.get("lr")), int | float):
        settings["learning_rate"] = float(rate)
    if isinstance(betas := options.get("betas"), list | tuple) and len(betas) == 2:
        settings |= {"adam_beta1": float(betas[0]), "adam_beta2": float(betas[1])}
    if isinstance(epsilon := options.get("eps"), float):
        settings["adam_epsilon"] = epsilon
    if isinstance(decay := options.get("weight_decay"), int | float):
        settings["weight_decay"] = float(decay)
    return settings
