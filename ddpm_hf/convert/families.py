"""Families of networks: how they name their layers, what their shapes do not tell, and which ones were published.

The names and values are those of the source code, the documentation and the configurations of each repository.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ddpm_hf.config import ConfigError
from ddpm_hf.convert.layers import Architecture, LayerNames, Place, Shapes

# UNet2DModel settings of the paper's network (TensorFlow), and of its successors (PyTorch).
_PAPER = {"norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}
_OPENAI = {"norm_eps": 1e-5, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0}
_ABARANKAB = {"norm_eps": 1e-5, "downsample_padding": 1, "flip_sin_to_cos": False, "freq_shift": 0}


@dataclass(frozen=True)
class Published:
    """A network that was published, recognized by its shapes.

    Args:
        name: Its name.
        channels: Channels of the first level.
        multipliers: Channels of each level relative to the first.
        layers: Residual blocks per level.
        attention: Levels with attention.
        settings: What its shapes do not tell.
        scale_shift: Whether the time embedding scales and shifts.
        learned: Whether it predicts a variance.
    """

    name: str
    channels: int
    multipliers: tuple[int, ...]
    layers: int
    attention: frozenset[int]
    settings: Mapping[str, Any]
    scale_shift: bool = False
    learned: bool = False

    def matches(self, architecture: Architecture) -> bool:
        """Return whether an architecture is the published one, for any number of classes."""
        return (
            architecture.block_out_channels == tuple(self.channels * factor for factor in self.multipliers)
            and architecture.layers_per_block == self.layers
            and architecture.attention_levels == self.attention
            and architecture.has_scale_shift == self.scale_shift
            and (architecture.out_channels == 2 * architecture.in_channels) == self.learned
        )


@dataclass(frozen=True)
class Family:
    """A family of networks that UNet2DModel can express.

    Args:
        name: Value of `--family`.
        title: Repository.
        markers: Parameters that every network of the family has.
        names: Names of the layers.
        infer: Returns the layers, given the shapes of all parameters.
        unet: UNet2DModel settings that all networks of the family have.
        defaults: What shapes do not tell, by the family's training script.
        published: Networks that were published.
        has_heads: Whether attention may have several heads.
    """

    name: str
    title: str
    markers: tuple[str, ...]
    names: LayerNames
    infer: Callable[[Shapes], Architecture]
    unet: Mapping[str, Any]
    defaults: Mapping[str, Any]
    published: tuple[Published, ...]
    has_heads: bool = False

    def matches(self, keys: Collection[str]) -> bool:
        """Return whether parameters are those of a network of the family, or of a part of one."""
        return sum(marker in keys for marker in self.markers) >= 2


@dataclass(frozen=True)
class Unsupported:
    """A family that UNet2DModel cannot express.

    Args:
        title: Repository or kind of network.
        pattern: Regular expression for the names of layers that only this family has.
        reason: The layer that differs, a part of a sentence.
        instead: What to do instead, a sentence.
    """

    title: str
    pattern: str
    reason: str
    instead: str = "Use its own code to sample from it, or train a network here on the same images."

    def layer(self, keys: Collection[str]) -> str | None:
        """Return the first parameter of the layer that differs, or None for a network of another family."""
        return next((key for key in keys if re.search(self.pattern, key)), None)


def channels_of(shapes: Shapes, name: str, axis: int = 0) -> int:
    """Return a dimension of a parameter.

    Raises:
        ConfigError: The parameter is missing.
    """
    if name not in shapes:
        raise ConfigError(f"the parameter {name} is missing; this is only a part of a checkpoint.")
    return int(shapes[name][axis])


def _count(shapes: Shapes, pattern: str) -> int:
    """Return the number of layers in a list, given a pattern with the index as its group."""
    found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


# ------------------------------------------------------------------------------------------- pesser/pytorch_diffusion


def _pesser_name(place: Place, architecture: Architecture) -> str:
    match place:
        case ("time", index):
            return f"temb.dense.{index}"
        case ("down" | "up" as way, level, index, kind):
            return f"{way}.{level}.{'attn' if kind == 'attention' else 'block'}.{index}"
        case ("down" | "up" as way, level, "resample"):
            return f"{way}.{level}.{way}sample.conv"
        case ("mid", index):
            return f"mid.{('block_1', 'attn_1', 'block_2')[int(index)]}"
        case _:
            return str(place[0])


def _infer_pesser(shapes: Shapes) -> Architecture:
    levels = range(_count(shapes, r"down\.(\d+)\."))
    return Architecture(
        in_channels=channels_of(shapes, "conv_in.weight", 1),
        out_channels=channels_of(shapes, "conv_out.weight"),
        block_out_channels=tuple(channels_of(shapes, f"down.{level}.block.0.conv1.weight") for level in levels),
        layers_per_block=_count(shapes, r"down\.0\.block\.(\d+)\."),
        attention_levels=frozenset(level for level in levels if f"down.{level}.attn.0.norm.weight" in shapes),
        time_embedding_dim=channels_of(shapes, "temb.dense.1.weight"),
    )


# --------------------------------------------------------------------------------------------------- tqch/ddpm-torch


def _ddpm_torch_name(place: Place, architecture: Architecture) -> str:
    match place:
        case ("time", index):
            return f"embed.{2 * int(index)}"
        case ("down" | "up" as way, int(level), index, kind):
            part = {"resnet": ".0", "attention": ".1"}[str(kind)] if level in architecture.attention_levels else ""
            return f"{way}samples.level_{level}.{index}{part}"
        case ("down" | "up" as way, level, "resample"):
            return f"{way}samples.level_{level}.{architecture.layers_per_block + (way == 'up')}.1"
        case ("mid", index):
            return f"middle.{index}"
        case _:
            return {"conv_in": "in_conv", "norm_out": "out_conv.0", "conv_out": "out_conv.2"}[str(place[0])]


def _infer_ddpm_torch(shapes: Shapes) -> Architecture:
    levels = range(_count(shapes, r"downsamples\.level_(\d+)\."))
    attends = frozenset(level for level in levels if f"downsamples.level_{level}.0.1.norm.weight" in shapes)
    convolutions = [f"downsamples.level_{level}.0.{'0.' if level in attends else ''}conv1.weight" for level in levels]
    return Architecture(
        in_channels=channels_of(shapes, "in_conv.weight", 1),
        out_channels=channels_of(shapes, "out_conv.2.weight"),
        block_out_channels=tuple(channels_of(shapes, name) for name in convolutions),
        # The last level does not end in a resampling.
        layers_per_block=_count(shapes, rf"downsamples\.level_{len(levels) - 1}\.(\d+)\."),
        attention_levels=attends,
        time_embedding_dim=channels_of(shapes, "embed.2.weight"),
    )


# --------------------------------------------------------------- openai/improved-diffusion and openai/guided-diffusion


def _openai_name(place: Place, architecture: Architecture) -> str:
    size, num_levels = architecture.layers_per_block + 1, len(architecture.block_out_channels)
    suffix = "" if architecture.has_resnet_resampling else ".op"
    match place:
        case ("time", index):
            return f"time_embed.{2 * int(index)}"
        case ("class",):
            return "label_emb"
        case ("conv_in",):
            return "input_blocks.0.0"
        case ("norm_out",):
            return "out.0"
        case ("conv_out",):
            return "out.2"
        case ("mid", index):
            return f"middle_block.{index}"
        case ("down", int(level), int(index), kind):
            return f"input_blocks.{1 + level * size + index}.{int(kind == 'attention')}"
        case ("down", int(level), "resample"):
            return f"input_blocks.{(level + 1) * size}.0{suffix}"
        case ("up", int(level), int(index), kind):
            return f"output_blocks.{(num_levels - 1 - level) * size + index}.{int(kind == 'attention')}"
        case ("up", int(level), "resample"):
            block = (num_levels - level) * size - 1
            suffix = "" if architecture.has_resnet_resampling else ".conv"
            return f"output_blocks.{block}.{1 + (level in architecture.attention_levels)}{suffix}"
    raise AssertionError(place)


def _infer_openai(shapes: Shapes) -> Architecture:
    resnets = {match[1] for name in shapes if (match := re.match(r"output_blocks\.(\d+)\.[12]\.in_layers\.", name))}
    upsamplers = {match[1] for name in shapes if (match := re.match(r"output_blocks\.(\d+)\.[12]\.conv\.", name))}
    num_blocks, num_levels = _count(shapes, r"input_blocks\.(\d+)\."), len(resnets | upsamplers) + 1
    for block in range(num_blocks):
        if not any(name.startswith(f"input_blocks.{block}.") for name in shapes):
            raise ConfigError(
                f"input_blocks.{block} has no parameters: it averages pixels to halve the resolution, where "
                "UNet2DModel has a convolution or a residual block, so that it cannot express this network."
            )
    size = max(1, num_blocks // num_levels)
    first = [1 + level * size for level in range(num_levels)]
    channels = tuple(channels_of(shapes, f"input_blocks.{block}.0.out_layers.3.weight") for block in first)
    return Architecture(
        in_channels=channels_of(shapes, "input_blocks.0.0.weight", 1),
        out_channels=channels_of(shapes, "out.2.weight"),
        block_out_channels=channels,
        layers_per_block=size - 1,
        attention_levels=frozenset(
            level for level, block in enumerate(first) if f"input_blocks.{block}.1.qkv.weight" in shapes
        ),
        time_embedding_dim=channels_of(shapes, "time_embed.2.weight"),
        num_classes=channels_of(shapes, "label_emb.weight") if "label_emb.weight" in shapes else None,
        has_scale_shift=channels_of(shapes, "input_blocks.1.0.emb_layers.1.weight") == 2 * channels[0],
        has_resnet_resampling=bool(resnets),
    )


# --------------------------------------- abarankab/DDPM and bubbliiiing/ddpm-pytorch, and w86763777/pytorch-ddpm


@dataclass(frozen=True)
class Numbered:
    """Names of a system that numbers its blocks through all levels: layers and resampling in one list a side.

    Attributes:
        time: Prefix of the layers of the time embedding.
        mid: List of the middle blocks, of which the first has attention.
        down: List of the blocks of the encoder.
        up: List of the blocks of the decoder.
        attention: Name of the attention in a block.
        downsample: Name of the convolution in a block that halves the resolution.
        upsample: Name of the convolution in a block that doubles it.
        first_convolution: Name of the first convolution in a block.
        query: Name of a projection of attention.
        outside: Names of the layers outside the blocks.
        time_table: Name of the table of time embeddings; None if they are computed.
    """

    time: str
    mid: str
    down: str
    up: str
    attention: str
    downsample: str
    upsample: str
    first_convolution: str
    query: str
    outside: Mapping[str, str]
    time_table: str | None = None

    def name(self, place: Place, architecture: Architecture) -> str:
        """Return the name of a layer."""
        layers, num_levels = architecture.layers_per_block, len(architecture.block_out_channels)
        match place:
            case ("time_table",) if self.time_table is not None:
                return self.time_table
            case ("time", index):
                return f"{self.time}.{1 + 2 * int(index)}"
            case ("mid", index):
                return (f"{self.mid}.0", f"{self.mid}.0.{self.attention}", f"{self.mid}.1")[int(index)]
            case ("down", int(level), "resample"):
                return f"{self.down}.{level * (layers + 1) + layers}.{self.downsample}"
            case ("down", int(level), int(index), kind):
                suffix = f".{self.attention}" if kind == "attention" else ""
                return f"{self.down}.{level * (layers + 1) + index}{suffix}"
            case ("up", int(level), "resample"):
                return f"{self.up}.{(num_levels - 1 - level) * (layers + 2) + layers + 1}.{self.upsample}"
            case ("up", int(level), int(index), kind):
                suffix = f".{self.attention}" if kind == "attention" else ""
                return f"{self.up}.{(num_levels - 1 - level) * (layers + 2) + index}{suffix}"
            case _:
                return self.outside[str(place[0])]

    def infer(self, shapes: Shapes) -> Architecture:
        """Return the architecture of a checkpoint."""
        resampling = rf"{self.down}\.\d+\.{self.downsample}\.weight"
        num_levels = sum(bool(re.fullmatch(resampling, name)) for name in shapes) + 1
        layers = (_count(shapes, rf"{self.down}\.(\d+)\.") - num_levels + 1) // num_levels
        first = [f"{self.down}.{level * (layers + 1)}" for level in range(num_levels)]
        return Architecture(
            in_channels=channels_of(shapes, f"{self.outside['conv_in']}.weight", 1),
            out_channels=channels_of(shapes, f"{self.outside['conv_out']}.weight"),
            block_out_channels=tuple(
                channels_of(shapes, f"{block}.{self.first_convolution}.weight") for block in first
            ),
            layers_per_block=layers,
            attention_levels=frozenset(
                level for level, block in enumerate(first) if f"{block}.{self.attention}.{self.query}.weight" in shapes
            ),
            time_embedding_dim=channels_of(shapes, f"{self.time}.3.weight"),
            num_timesteps=channels_of(shapes, f"{self.time_table}.weight") if self.time_table else None,
        )


_ABARANKAB_LAYERS = Numbered(
    "time_mlp", "mid", "downs", "ups", "attention", "downsample", "upsample.1", "conv_1", "to_qkv",
    {"conv_in": "init_conv", "norm_out": "out_norm", "conv_out": "out_conv"},
)  # fmt: skip
_PYTORCH_DDPM_LAYERS = Numbered(
    "time_embedding.timembedding", "middleblocks", "downblocks", "upblocks", "attn", "main", "main", "block1.2",
    "proj_q", {"conv_in": "head", "norm_out": "tail.0", "conv_out": "tail.2"}, "time_embedding.timembedding.0",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- all families

_FIXED = {"num_train_timesteps": 1000, "schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
_DEFAULTS: dict[str, Any] = {
    **_FIXED, "prediction_type": "epsilon", "dropout": 0.0, "clip_sample": True, "scale_betas": False,
    "rescale_timesteps": False, "timestep_spacing": "leading", "variance_type": "fixed_small",
}  # fmt: skip
_OPENAI_DEFAULTS = {
    **_DEFAULTS, "scale_betas": True, "variance_type": "fixed_large", "timestep_spacing": "linspace",
}  # fmt: skip
_OPENAI_NAMES = LayerNames(
    _openai_name,
    ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"),
    ("qkv",), "norm", "proj_out", 3,
)  # fmt: skip
_OPENAI_MARKERS = ("time_embed.0.weight", "time_embed.2.weight", "input_blocks.0.0.weight", "out.2.weight")
_SMALL, _LARGE = (1, 2, 2, 2), (1, 1, 2, 2, 4, 4)
_CIFAR = {"image_size": 32, "dropout": 0.1, "variance_type": "fixed_large"}

PESSER = Family(
    "pesser",
    "pesser/pytorch_diffusion or ermongroup/ddim",
    ("temb.dense.0.weight", "temb.dense.1.weight", "down.0.block.0.conv1.weight", "mid.attn_1.q.weight"),
    LayerNames(
        _pesser_name,
        ("norm1", "conv1", "temb_proj", "norm2", "conv2", "nin_shortcut"),
        ("q", "k", "v"), "norm", "proj_out", 4,
    ),
    _infer_pesser,
    _PAPER,
    _DEFAULTS,
    (
        Published("CIFAR-10 of Ho et al. 2020", 128, _SMALL, 2, frozenset({1}), _CIFAR),
        Published("CelebA of Song et al. 2021", 128, (1, 2, 2, 2, 4), 2, frozenset({2}), _CIFAR | {"image_size": 64}),
        Published("LSUN and CelebA-HQ of Ho et al. 2020", 128, _LARGE, 2, frozenset({4}), {"image_size": 256}),
    ),
)  # fmt: skip
DDPM_TORCH = Family(
    "ddpm_torch",
    "tqch/ddpm-torch",
    ("embed.0.weight", "embed.2.weight", "in_conv.weight", "out_conv.2.weight"),
    LayerNames(
        _ddpm_torch_name, ("norm1", "conv1", "fc", "norm2", "conv2", "skip"), ("project_in",), "norm", "project_out", 4,
    ),
    _infer_ddpm_torch,
    _PAPER,
    _DEFAULTS,
    (
        Published("cifar10", 128, _SMALL, 2, frozenset({1}), _CIFAR),
        Published("celeba", 128, _SMALL, 2, frozenset({2}), {"image_size": 64}),
        Published("celebahq", 128, _LARGE, 2, frozenset({4}), {"image_size": 256}),
    ),
)  # fmt: skip
IMPROVED = Family(
    "improved_diffusion",
    "openai/improved-diffusion",
    _OPENAI_MARKERS,
    _OPENAI_NAMES,
    _infer_openai,
    _OPENAI,
    _OPENAI_DEFAULTS | {"rescale_timesteps": True},
    (
        Published(
            "cifar10_uncond_50M", 128, _SMALL, 3, frozenset({1, 2}),
            {"image_size": 32, "num_heads": 4, "num_train_timesteps": 4000, "schedule": "cosine", "dropout": 0.3},
            scale_shift=True, learned=True,
        ),
        Published(
            "lsun_uncond_100M", 128, _LARGE, 2, frozenset({4}),
            {"image_size": 256, "num_heads": 1, "rescale_timesteps": False}, learned=True,
        ),
        *(
            Published(
                name, channels, (1, 2, 3, 4), 3, frozenset({2, 3}),
                {"image_size": 64, "num_heads": 4, "num_train_timesteps": 4000, "schedule": "cosine"},
                scale_shift=True, learned=True,
            )
            for name, channels in (("imagenet64_uncond_100M", 128), ("imagenet64_cond_270M", 192))
        ),
    ),
    has_heads=True,
)  # fmt: skip
_HEADS_64 = {"num_head_channels": 64, "attention_order": "legacy"}
_NEW_ORDER = {"num_head_channels": 64, "attention_order": "new", "schedule": "cosine", "dropout": 0.1}
GUIDED = Family(
    "guided_diffusion",
    "openai/guided-diffusion",
    _OPENAI_MARKERS,
    _OPENAI_NAMES,
    _infer_openai,
    _OPENAI,
    _OPENAI_DEFAULTS,
    tuple(
        Published(name, channels, multipliers, layers, frozenset(attention), settings, scale_shift=True, learned=True)
        for name, channels, multipliers, layers, attention, settings in (
            ("64x64_diffusion, or 64x64 of DDPM-IP", 192, (1, 2, 3, 4), 3, {1, 2, 3}, {"image_size": 64, **_NEW_ORDER}),
            ("128x128_diffusion", 256, (1, 1, 2, 3, 4), 2, {2, 3, 4}, {"image_size": 128, "num_heads": 4}),
            ("256x256_diffusion, LSUN or RePaint", 256, _LARGE, 2, {3, 4, 5}, {"image_size": 256, **_HEADS_64}),
            ("256x256 of DPS and P2-weighting", 128, _LARGE, 1, {4}, {"image_size": 256, **_HEADS_64}),
            (
                "32x32 of DDPM-IP", 128, _SMALL, 3, {1, 2},
                {"image_size": 32, **_NEW_ORDER, "num_head_channels": 32, "dropout": 0.3},
            ),
            ("128x128 of DDPM-IP", 256, (1, 1, 2, 3, 4), 3, {2, 3, 4}, {"image_size": 128, **_NEW_ORDER}),
        )
    ),
    has_heads=True,
)  # fmt: skip
ABARANKAB = Family(
    "abarankab",
    "abarankab/DDPM or bubbliiiing/ddpm-pytorch",
    ("time_mlp.1.weight", "downs.0.conv_1.weight", "downs.0.conv_2.1.weight", "downs.0.time_bias.weight"),
    LayerNames(
        _ABARANKAB_LAYERS.name,
        ("norm_1", "conv_1", "time_bias", "norm_2", "conv_2.1", "residual_connection"),
        ("to_qkv",), "norm", "to_out", 4,
    ),
    _ABARANKAB_LAYERS.infer,
    _ABARANKAB,
    _DEFAULTS | {
        "scale_betas": True, "variance_type": "fixed_large", "clip_sample": False, "dropout": 0.1, "activation": "silu",
    },
    (
        Published("CIFAR-10 of abarankab", 128, _SMALL, 2, frozenset({1}), {"image_size": 32}),
        Published("the default network of bubbliiiing", 128, (1, 2, 4, 8), 3, frozenset({1}), {"image_size": 32}),
    ),
)  # fmt: skip
PYTORCH_DDPM = Family(
    "pytorch_ddpm",
    "w86763777/pytorch-ddpm",
    (
        "time_embedding.timembedding.0.weight", "time_embedding.timembedding.1.weight", "downblocks.0.block1.2.weight",
        "tail.2.weight",
    ),
    LayerNames(
        _PYTORCH_DDPM_LAYERS.name, ("block1.0", "block1.2", "temb_proj.1", "block2.0", "block2.3", "shortcut"),
        ("proj_q", "proj_k", "proj_v"), "group_norm", "proj", 4,
    ),
    _PYTORCH_DDPM_LAYERS.infer,
    # The sinusoids are a stored table, in which sine and cosine alternate.
    {"norm_eps": 1e-5, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0},
    _DEFAULTS | {"variance_type": "fixed_large", "dropout": 0.1},
    (Published("CIFAR-10", 128, _SMALL, 2, frozenset({1}), {"image_size": 32}),),
)  # fmt: skip
FAMILIES = {family.name: family for family in (PESSER, DDPM_TORCH, IMPROVED, GUIDED, ABARANKAB, PYTORCH_DDPM)}

LUCIDRAINS = "lucidrains/denoising-diffusion-pytorch"
_RECIPE = "Train the same recipe here: ddpm-hf convert {path} recipe.yaml --recipe_only writes its configuration."
UNSUPPORTED = (
    Unsupported(
        LUCIDRAINS,
        r"^(downs\.\d+\.\d+\.|mid_block1\.|final_res_block\.)",
        "convolves the input with a 7x7 kernel, normalizes by root mean square, halves the resolution by moving pixels "
        "into channels, and attends linearly, none of which UNet2DModel does",
        _RECIPE,
    ),
    Unsupported(
        "tqch/ddpm-torch with block_size",
        r"^(module\.)?_model\.(embed|in_conv)\.",
        "moves blocks of pixels into channels before the network and back after it, which UNet2DModel does not",
    ),
    Unsupported(
        "NVlabs/edm2",
        r"(^|\.)(emb_fourier|emb_noise|out_gain|logvar_fourier)\b",
        "scales the input, the noise level and the output (EDM preconditioning), and its layers preserve magnitudes, "
        "which UNet2DModel does not",
    ),
    Unsupported(
        "NVlabs/edm",
        r"(^|\.)(map_layer0|map_augment|(enc|dec)\.\d+x\d+_)",
        "scales the input, the noise level and the output (EDM preconditioning) and the sum in each residual block, "
        "which UNet2DModel does not",
    ),
    Unsupported(
        "crowsonkb/k-diffusion",
        r"(^|\.)(u_net\.(d|u)_blocks|timestep_embed\.weight|mapping\.|down_levels\.\d+|time_emb\.weight)",
        "embeds the noise level by Fourier features and normalizes adaptively, which UNet2DModel does not",
    ),
    Unsupported(
        "yang-song/score_sde",
        r"(^|\.)all_modules\.\d+\.",
        "numbers its layers without their meaning; the NCSN++ networks in it filter when they resample and add the "
        "input at each resolution",
        "diffusers has scripts/convert_ncsnpp_original_checkpoint_to_diffusers.py for it.",
    ),
    Unsupported(
        "CompVis/latent-diffusion",
        r"(^|\.)(first_stage_model\.|cond_stage_model\.|transformer_blocks\.)",
        "denoises the latents of an autoencoder, or is conditioned on text",
        "diffusers converts it with scripts/conversion_ldm_uncond.py or StableDiffusionPipeline.from_single_file.",
    ),
    Unsupported(
        "a classifier of openai/guided-diffusion",
        r"^out\.2\.(positional_embedding|qkv_proj|c_proj)",
        "has no output blocks: it classifies noisy images and does not denoise them",
        "Give the diffusion model; classifier guidance is not supported here.",
    ),
    Unsupported(
        "facebookresearch/DiT or another transformer",
        r"(^|\.)(x_embedder\.|adaLN_modulation|pos_embed$)",
        "is a transformer, not a U-Net",
        "diffusers has DiTPipeline for it.",
    ),
)
