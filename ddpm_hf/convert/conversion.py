"""Convert a checkpoint of another system to a UNet2DModel with its scheduler, and back.

Layers and sizes follow from the names and shapes of the parameters. What shapes do not tell, such as the number of
attention heads, is that of the published network with these shapes, or of the family's training script, or is asked
for. The result has every parameter of the checkpoint, and no other.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding

from ddpm_hf.config import ConfigError
from ddpm_hf.convert.checkpoint import Checkpoint, is_ema
from ddpm_hf.convert.families import (
    ABARANKAB,
    FAMILIES,
    GUIDED,
    IMPROVED,
    PYTORCH_DDPM,
    UNSUPPORTED,
    Family,
    Published,
    Unsupported,
)
from ddpm_hf.convert.layers import Architecture, AttentionOrder, Shapes, TensorPair, tensor_pairs, unet_shapes
from ddpm_hf.convert.options import ConversionOptions
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.diffusion.schedule import make_betas
from ddpm_hf.files import format_count
from ddpm_hf.redaction import reason_of

_NUM_NAMED = 3
_INSTEAD = "Use its own code to sample from it, or train the same recipe here: --recipe_only writes a configuration."
_TIME_TABLE = "time_proj.weight"
_RESAMPLING = re.compile(r"(sample\.conv|samples\.level_\d+\.\d+\.1|\.op|\.conv)\.(weight|bias)$")
_SCHEDULES = ("linear", "cosine", "scaled_linear", "sigmoid_alpha_bar", "warmup10", "warmup50", "const", "jsd")


@dataclass(frozen=True)
class Found:
    """The network in a checkpoint.

    Args:
        place: Where it is in the file; empty if the file is a state dict.
        family: Its family.
        tensors: Its parameters.
    """

    place: str
    family: Family | Unsupported
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Conversion:
    """A converted network.

    Args:
        unet: The network, float32, in evaluation mode.
        scheduler: Its process.
        family: The family that it comes from.
        published: The published network with the same shapes, or None.
        place: Where its weights were in the file.
        settings: What the shapes did not tell.
        assumed: The settings that neither the user nor the checkpoint gave.
        dtypes: Names of the parameters that were not float32, by dtype.
    """

    unet: UNet2DModel
    scheduler: GaussianDiffusionScheduler
    family: Family
    published: Published | None
    place: str
    settings: Mapping[str, Any]
    assumed: Collection[str]
    dtypes: Mapping[str, list[str]]

    def record(self) -> dict[str, Any]:
        """Return what a conversion back needs, and the card shows, as JSON values."""
        return {
            "family": self.family.name,
            "repository": self.family.title,
            "network": self.published and self.published.name,
            "weights": self.place,
            "is_ema": is_ema(self.place) or None,
            "settings": dict(self.settings),
            "dtypes": dict(self.dtypes),
        }


def find_network(checkpoint: Checkpoint, options: ConversionOptions) -> Found:
    """Return the network in a checkpoint: the EMA weights if there are any.

    Raises:
        ConfigError: There is none of a known family, or several.
    """
    found = []
    for place, tensors in checkpoint.networks().items():
        if (family := _family_of(tensors, options.family)) is not None:
            found.append(Found(place, family, tensors))
    # `ema` beside `ema.shadow` of the same tensors: the place without its wrapper counts.
    found = [one for one in found if not any(other is not one and _is_inside(other, one) for other in found)]
    if not found:
        if options.family is not None and (other := find_network(checkpoint, replace(options, family=None))):
            name = other.family.name if isinstance(other.family, Family) else other.family.title
            raise ConfigError(f"--family is {options.family}, but {checkpoint.path} is a network of {name}; remove it.")
        raise ConfigError(_describe_unknown(checkpoint))
    averaged, raw = ([one for one in found if is_ema(one.place) == wanted] for wanted in (True, False))
    names = ", ".join(one.place or "the state dict itself" for one in found)
    if options.ema in (None, "none"):
        candidates = raw if options.ema == "none" else averaged or raw
        if not candidates:
            raise ConfigError(f"--ema is none, but {checkpoint.path} holds only EMA weights ({names}); remove --ema.")
        if len(candidates) > 1:
            raise ConfigError(f"{checkpoint.path} holds several networks ({names}); choose one with --ema NAME.")
        return candidates[0]
    for one in found:
        if one.place == options.ema:
            return one
    raise ConfigError(f"--ema is {options.ema!r}, but {checkpoint.path} holds {names}; give one of them, or none.")


def convert(checkpoint: Checkpoint, options: ConversionOptions) -> Conversion:
    """Convert the network in a checkpoint.

    Raises:
        ConfigError: It is not of a family that UNet2DModel can express, it is incomplete, or a setting is missing.
    """
    found = find_network(checkpoint, options)
    family, path = found.family, checkpoint.path
    if isinstance(family, Unsupported):
        raise ConfigError(
            f"{path} is a network of {family.title} ({family.layer(found.tensors)}), which UNet2DModel cannot express: "
            f"it {family.reason}. {family.instead.format(path=path)}"
        )
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    architecture, published, settings = describe(path, family, shapes, options)
    config, pairs = match(path, family, shapes, architecture, settings)
    expected = unet_shapes(config)
    state: dict[str, torch.Tensor] = {}
    for pair in pairs:
        tensor = found.tensors[pair.theirs]
        if not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"{path} has NaN or infinite values in {pair.theirs}; use an earlier checkpoint.")
        state |= pair.to_ours(tensor.float(), expected)
    if (num_timesteps := settings["num_train_timesteps"]) != 1000 and settings["rescale_timesteps"]:
        config |= {"time_embedding_type": "learned", "num_train_timesteps": num_timesteps}
        state[_TIME_TABLE] = rescaled_time_table(num_timesteps, architecture.block_out_channels[0])
    with torch.device("meta"):
        unet = UNet2DModel(**config)
    unet.load_state_dict(state, assign=True)
    dtypes: dict[str, list[str]] = {}
    for pair in pairs:
        if (dtype := found.tensors[pair.theirs].dtype) != torch.float32:
            dtypes.setdefault(str(dtype).removeprefix("torch."), []).append(pair.theirs)
    scheduler = _scheduler(checkpoint, settings, options)
    assumed = _assumed(settings, options, family, has_betas=checkpoint.betas() is not None)
    return Conversion(unet.eval(), scheduler, family, published, found.place, settings, assumed, dtypes)


def _assumed(settings: Mapping[str, Any], options: ConversionOptions, family: Family, *, has_betas: bool) -> list[str]:
    """Return the settings that matter, and that neither the user nor the checkpoint gave."""
    names = ["image_size", "num_heads", "num_head_channels", "attention_order", "prediction_type", "activation"]
    if not settings["variance_type"].startswith("learned"):
        names.append("variance_type")
    if not has_betas:
        names += ["num_train_timesteps", "schedule"]
        names += ["beta_start", "beta_end"] if settings["schedule"] != "cosine" else []
    if family.has_heads and settings["num_train_timesteps"] != 1000:
        names.append("rescale_timesteps")
    if family is PYTORCH_DDPM:
        names.remove("num_train_timesteps")  # the number of rows of its table
    return [name for name in names if name in settings and name not in options.given()]


def match(
    path: Path, family: Family, shapes: Shapes, architecture: Architecture, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[TensorPair]]:
    """Return the configuration of the UNet2DModel that a network is, and which tensor is which.

    Raises:
        ConfigError: UNet2DModel cannot express it, or it lacks parameters.
    """
    what, config = f"{path} ({family.name})", {**architecture.unet_config(), **family.unet}
    try:
        expected = unet_shapes(config | {"attention_head_dim": None})  # heads do not change shapes
    except Exception as error:  # diffusers raises many types for settings that do not fit together
        raise ConfigError(f"{path} has layers that do not make a UNet2DModel ({reason_of(error)}).") from None
    _check_tensors(path, tensor_pairs(family.names, architecture, expected, head_width=None), shapes, expected)
    head_width = _head_width(settings, architecture, family, what) if family.has_heads else None
    if (size := settings.get("image_size")) is None:
        raise ConfigError(
            f"{what} does not tell the size of its images, because its layers take any; add --image_size N, as in its "
            "training command."
        )
    factor = 2 ** (len(architecture.block_out_channels) - 1)
    if any(side % factor for side in (size if isinstance(size, list) else [size])):
        raise ConfigError(
            f"--image_size is {size}, but {what} has {factor.bit_length()} levels, each of half the size of the one "
            f"before; give a multiple of {factor}."
        )
    config |= {"attention_head_dim": head_width, "sample_size": size, "dropout": settings["dropout"]}
    order: AttentionOrder = settings.get("attention_order", "new")
    return config, tensor_pairs(family.names, architecture, expected, head_width=head_width, order=order)


def rescaled_time_table(num_timesteps: int, channels: int) -> torch.Tensor:
    """Return the sinusoids of t * 1000 / T for each timestep, as a table for `time_embedding_type` "learned".

    The code of Nichol & Dhariwal 2021 scales timesteps to 0 ... 1000; UNet2DModel has no scale for them.
    """
    timesteps = torch.arange(num_timesteps).float() * (1000.0 / num_timesteps)
    table: torch.Tensor = get_timestep_embedding(timesteps, channels, flip_sin_to_cos=True, downscale_freq_shift=0)
    return table


def describe(
    path: Path, family: Family, shapes: Shapes, options: ConversionOptions
) -> tuple[Architecture, Published | None, dict[str, Any]]:
    """Return the layers of a network, the published network with the same, and what shapes do not tell.

    Raises:
        ConfigError: The checkpoint is incomplete, or a setting is missing or contradicts it.
    """
    try:
        architecture = family.infer(shapes)
    except ConfigError as error:
        raise ConfigError(f"{path} ({family.name}): {error}") from None
    except (IndexError, ZeroDivisionError):
        raise ConfigError(f"{path} is only a part of a network of {family.title}; copy it again.") from None
    given = options.given()
    published = next((one for one in family.published if one.matches(architecture)), None)
    settings = {**family.defaults, **(published.settings if published else {})}
    learned = architecture.out_channels == 2 * architecture.in_channels
    if learned:
        settings["variance_type"] = "learned_range"
    if (num_timesteps := architecture.num_timesteps) is not None:
        settings["num_train_timesteps"] = num_timesteps
        if given.get("num_train_timesteps", num_timesteps) != num_timesteps:
            raise ConfigError(f"--num_train_timesteps is told by {path}, which has {num_timesteps}; remove it.")
    if "num_head_channels" in given:
        settings.pop("num_heads", None)
    elif "num_heads" in given:
        settings.pop("num_head_channels", None)
    settings |= given
    what = f"{path} ({family.name})"
    if not family.has_heads:
        for name in ("num_heads", "num_head_channels", "attention_order", "rescale_timesteps"):
            if name in given:
                why = "timesteps are not scaled" if name == "rescale_timesteps" else "attention has one head"
                raise ConfigError(f"--{name} is given, but in {family.title} {why}; remove it.")
    if "activation" in given and family is not ABARANKAB:
        raise ConfigError(f"--activation is given, but all networks of {family.title} have SiLU; remove it.")
    if settings.get("activation", "silu") != "silu":
        raise ConfigError(
            f"{what} has activation {settings['activation']} before out_conv, where UNet2DModel always has silu, so "
            f"that it cannot express this network. {_INSTEAD}"
        )
    if family.has_heads and "attention_order" not in settings:
        settings["attention_order"] = "legacy"
    if learned != (settings["variance_type"] in ("learned", "learned_range")):
        ins, outs = architecture.in_channels, architecture.out_channels
        raise ConfigError(
            f"{what} takes {ins} channels and returns {outs}: it "
            + (f"predicts a variance, unlike --variance_type {settings['variance_type']}; remove it."
               if learned else f"predicts no variance, unlike --variance_type {settings['variance_type']}; remove it.")
        )  # fmt: skip
    if architecture.out_channels not in (architecture.in_channels, 2 * architecture.in_channels) or (
        family in (IMPROVED, GUIDED) and architecture.in_channels == 6
    ):
        raise ConfigError(
            f"{what} takes {architecture.in_channels} channels and returns {architecture.out_channels}: it also takes "
            "a smaller image (super-resolution), for which there is no pipeline here; give the base model."
        )
    return architecture, published, settings


def _head_width(settings: Mapping[str, Any], architecture: Architecture, family: Family, what: str) -> int | None:
    """Return the width of all attention heads; None for one head of full width.

    Raises:
        ConfigError: It is not known, or the heads have different widths.
    """
    widths = architecture.attention_widths
    if (width := settings.get("num_head_channels")) is not None:
        if bad := [channels for channels in widths if channels % width]:
            raise ConfigError(
                f"--num_head_channels is {width}, but {what} attends with {bad[0]} channels; give a divisor."
            )
        return int(width)
    if (num_heads := settings.get("num_heads")) is None:
        raise ConfigError(
            f"{what} does not tell its attention heads, because any number has the same shapes; add --num_heads N or "
            "--num_head_channels N, as in its training command (--num_heads 4 is the default of its script)."
        )
    if num_heads == 1:
        return None
    if bad := [channels for channels in widths if channels % num_heads]:
        raise ConfigError(f"--num_heads is {num_heads}, but {what} attends with {bad[0]} channels; give a divisor.")
    if len(widths) > 1:
        levels = [*sorted(architecture.attention_levels), len(architecture.block_out_channels) - 1]
        layers = {
            architecture.block_out_channels[level]: family.names.name_of(("mid", 1), architecture) for level in levels
        }
        for level in sorted(architecture.attention_levels, reverse=True):
            place = ("down", level, 0, "attention")
            layers[architecture.block_out_channels[level]] = family.names.name_of(place, architecture)
        heads = ", ".join(f"{channels // num_heads} channels in {layers[channels]}" for channels in widths)
        raise ConfigError(
            f"{what} has {num_heads} attention heads at each level, of {heads}, but UNet2DModel has one width for all "
            f"heads, so that it cannot express this network. {_INSTEAD}"
        )
    return widths[0] // int(num_heads)


def _scheduler(
    checkpoint: Checkpoint, settings: dict[str, Any], options: ConversionOptions
) -> GaussianDiffusionScheduler:
    """Return the process of a network, with the betas in its checkpoint if there are any."""
    if (betas := checkpoint.betas()) is not None:
        given = {"schedule", "beta_start", "beta_end", "num_train_timesteps"} & options.given().keys()
        if given:
            raise ConfigError(f"--{min(given)} is given, but {checkpoint.path} holds its betas; remove it.")
        settings |= schedule_of(betas)
    names = ("num_train_timesteps", "prediction_type", "variance_type", "clip_sample", "timestep_spacing")
    process = {name: settings[name] for name in names}
    if (trained := settings.pop("trained_betas", None)) is not None:
        settings["schedule"] = "the betas in the checkpoint"
        process["trained_betas"] = trained
    else:
        process |= {
            "beta_schedule": settings["schedule"],
            "beta_start": settings["beta_start"],
            "beta_end": settings["beta_end"],
            "scale_betas_to_timesteps": settings["scale_betas"] and settings["schedule"] == "linear",
        }
    try:
        scheduler: GaussianDiffusionScheduler = GaussianDiffusionScheduler.create(**process)
    except ValueError as error:
        raise ConfigError(f"{checkpoint.path}: {error}") from None
    return scheduler


def schedule_of(betas: torch.Tensor) -> dict[str, Any]:
    """Return the name of the schedule of float32 betas, or the betas as `trained_betas`."""
    num_timesteps = len(betas)
    for schedule in _SCHEDULES:
        first, last = 1e-4, 0.02
        if schedule in ("linear", "scaled_linear", "warmup10", "warmup50", "const"):
            first, last = float(betas[0]), float(betas[-1])
        try:
            # Named schedules begin and end at round numbers, which float32 does not hold.
            first, last = (float(f"{value:.6g}") for value in (first, last))
            expected = make_betas(schedule, num_timesteps, first, last)
        except ValueError:
            continue
        if torch.allclose(expected, betas.cpu(), rtol=1e-4, atol=1e-9):
            return {
                "num_train_timesteps": num_timesteps, "schedule": schedule, "beta_start": first, "beta_end": last,
                "scale_betas": False,
            }  # fmt: skip
    return {"num_train_timesteps": num_timesteps, "trained_betas": betas.tolist()}


def _check_tensors(path: Path, pairs: Collection[TensorPair], shapes: Shapes, expected: Shapes) -> None:
    """Raise a ConfigError unless a checkpoint has exactly the parameters of the network, in these shapes."""
    names = {pair.theirs for pair in pairs}
    missing, surplus = sorted(names - shapes.keys()), sorted(shapes.keys() - names)
    if missing and all(_RESAMPLING.search(name) for name in missing):
        raise ConfigError(
            f"{path} lacks {_listed(missing)}: it changes the resolution without convolutions, where UNet2DModel has "
            f"one, so that it cannot express this network. {_INSTEAD}"
        )
    if missing:
        count = format_count(len(missing), "parameter")
        raise ConfigError(f"{path} lacks {count} of its own network ({_listed(missing)}); copy it again.")
    if surplus:
        count = format_count(len(surplus), "parameter")
        raise ConfigError(
            f"{path} has {count} that UNet2DModel has no layer for ({_listed(surplus)}), so that it "
            f"cannot express this network. {_INSTEAD}"
        )
    for pair in pairs:
        theirs, ours = tuple(shapes[pair.theirs]), tuple(pair.their_shape(expected))
        if theirs != ours:
            raise ConfigError(
                f"{path} has {pair.theirs} of shape {theirs}, where the same layer of UNet2DModel has {ours}, so that "
                f"it cannot express this network{_why(pair, theirs, ours)}. {_INSTEAD}"
            )


def _why(pair: TensorPair, theirs: tuple[int, ...], ours: tuple[int, ...]) -> str:
    if pair.ours[0] == "time_embedding.linear_1.weight":
        return f" (it embeds timesteps in {theirs[1]} channels, and its first level has {ours[1]})"
    if "conv_shortcut" in pair.ours[0] and math.prod(theirs[2:]) > 1:
        return " (its shortcuts are 3x3 convolutions)"
    return ""


def _listed(names: Collection[str]) -> str:
    first = ", ".join(list(names)[:_NUM_NAMED])
    return f"{first}, ..." if len(names) > _NUM_NAMED else first


def _family_of(tensors: Mapping[str, torch.Tensor], name: str | None) -> Family | Unsupported | None:
    """Return the family of a network, or None if it is of no known one."""
    for unsupported in UNSUPPORTED:
        if unsupported.layer(tensors) is not None:
            return unsupported
    matching = [family for family in FAMILIES.values() if family.matches(tensors)]
    if name is not None:
        return next((family for family in matching if family.name == name), None)
    if GUIDED in matching:  # improved-diffusion has the same names, but no residual blocks that change the resolution
        has_resnets = any(
            "in_layers" in key and key.split(".")[2] in "12" for key in tensors if key.startswith("output_b")
        )
        return GUIDED if has_resnets else IMPROVED
    return matching[0] if matching else None


def _is_inside(inner: Found, outer: Found) -> bool:
    """Return whether a network is the same as another one, found below a further prefix."""
    rest = inner.place.removeprefix(outer.place)
    is_below = rest != inner.place or not outer.place
    return is_below and rest != "" and (not outer.place or outer.place.endswith(".") or rest[0] in ".:")


def _describe_unknown(checkpoint: Checkpoint) -> str:
    """Return a sentence about a checkpoint without a known network."""
    networks = checkpoint.networks()
    known = f"{', '.join(FAMILIES)}, and folders of diffusers and ddpm_hf"
    if not networks:
        content = checkpoint.content
        held = f"{_listed([str(key) for key in content])}" if isinstance(content, Mapping) else type(content).__name__
        return f"{checkpoint.path} holds no weights of a network ({held}); supported are {known}."
    first = max(networks.values(), key=len)
    if any(key.endswith("down_blocks.0.resnets.0.conv1.weight") for key in first):
        return (
            f"{checkpoint.path} is a network of diffusers, whose config.json must be beside it in a folder; give that "
            "folder."
        )
    return (
        f"{checkpoint.path} is of an unknown family: {_listed(list(first))} are parameters of none of {known}; give "
        "another file, or use the program that wrote it."
    )


# --------------------------------------------------------------------------------------------------------------- back


def convert_back(unet: UNet2DModel, family: Family, record: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
    """Return the state dict of a UNet2DModel in a family, bit-identical to the one that it was converted from.

    Args:
        unet: The network.
        family: The family.
        record: `Conversion.record` of the conversion that the network comes from, or an empty mapping.
        where: The folder, for messages.

    Raises:
        ConfigError: The family does not have such a network.
    """
    config, state = unet.config, dict(unet.state_dict())
    shapes = {name: tensor.shape for name, tensor in state.items()}
    is_rescaled = family in (IMPROVED, GUIDED) and _TIME_TABLE in state
    if is_rescaled:
        if not _is_rescaled(unet):
            raise ConfigError(f"{where} has a trained time embedding, which networks of {family.title} lack.")
        del state[_TIME_TABLE], shapes[_TIME_TABLE]
    architecture = Architecture.of_unet(config, shapes)
    wanted = {**architecture.unet_config(), **family.unet, "act_fn": "silu", "center_input_sample": False}
    wanted |= {"mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2D", "add_attention": True}
    if not family.has_heads:
        wanted |= {"attention_head_dim": None, "num_class_embeds": None, "resnet_time_scale_shift": "default"}
        wanted |= {"downsample_type": "conv"}
    if not is_rescaled:
        wanted["time_embedding_type"] = "learned" if family is PYTORCH_DDPM else "positional"
    for name, value in wanted.items():
        if name == "attn_norm_num_groups" and not architecture.has_scale_shift:
            continue
        own = config.get(name)
        if (list(own) if isinstance(own, tuple) else own) != value:
            raise ConfigError(
                f"{where} has {name} {own!r}, but networks of {family.title} have {value!r}; choose another family."
            )
    order: AttentionOrder = record.get("settings", {}).get("attention_order") or "legacy"
    pairs = tensor_pairs(family.names, architecture, shapes, head_width=config.attention_head_dim, order=order)
    if rest := sorted(state.keys() - {name for pair in pairs for name in pair.ours}):
        raise ConfigError(f"{where} has parameters that networks of {family.title} lack ({_listed(rest)}).")
    dtypes = {name: getattr(torch, dtype) for dtype, names in record.get("dtypes", {}).items() for name in names}
    return {pair.theirs: pair.to_theirs(state, shapes).to(dtypes.get(pair.theirs, torch.float32)) for pair in pairs}


def _is_rescaled(unet: UNet2DModel) -> bool:
    """Return whether the table of time embeddings is that of rescaled timesteps, and was not trained."""
    table = unet.state_dict()[_TIME_TABLE]
    return torch.equal(table.float().cpu(), rescaled_time_table(*table.shape))
