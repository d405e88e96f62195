"""The layers that UNet2DModel and the networks of other systems share, and the tensors in them.

A family of networks has the same layers under other names, and holds the projections of an attention in another form.
`tensor_pairs` lists which tensor is which; the same list serves both directions, so that a way there and back returns
the same bits.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from diffusers import UNet2DModel

Place: TypeAlias = tuple[str | int, ...]
"""Where a layer is: ("down", level, index, "resnet"), ("up", level, "resample"), ("mid", 1), ("conv_in",), ..."""
Shapes: TypeAlias = Mapping[str, torch.Size]
AttentionOrder: TypeAlias = Literal["legacy", "new"]
"""Order of rows of joint projections: by head, then query, key and value (legacy), or the other way around (new)."""

_RESNET = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")


@dataclass(frozen=True)
class Architecture:
    """A U-Net of the kind that Ho et al. 2020 introduced, with one group of residual blocks per level.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; twice those of an image if the network predicts a variance.
        block_out_channels: Channels of each level, from the full resolution down.
        layers_per_block: Residual blocks of a level on the way down; one more on the way up.
        attention_levels: Levels whose residual blocks are followed by attention.
        time_embedding_dim: Channels of the time embedding.
        num_classes: Rows of the class embedding; None for an unconditional network.
        has_scale_shift: Whether the time embedding scales and shifts the second norm instead of being added.
        has_resnet_resampling: Whether residual blocks change the resolution instead of convolutions.
        num_timesteps: Rows of a stored table of time embeddings; None for sinusoids that are computed.
    """

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    attention_levels: frozenset[int]
    time_embedding_dim: int
    num_classes: int | None = None
    has_scale_shift: bool = False
    has_resnet_resampling: bool = False
    num_timesteps: int | None = None

    @property
    def attention_widths(self) -> list[int]:
        """The different numbers of channels of attention layers, that in the middle included."""
        return sorted(
            {self.block_out_channels[level] for level in self.attention_levels} | {self.block_out_channels[-1]}
        )

    @property
    def multipliers(self) -> tuple[float, ...]:
        """Channels of each level relative to the first."""
        return tuple(channels / self.block_out_channels[0] for channels in self.block_out_channels)

    def unet_config(self) -> dict[str, Any]:
        """Return the arguments of UNet2DModel that follow from the layers."""
        attends = [level in self.attention_levels for level in range(len(self.block_out_channels))]
        plain = (
            ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
            if self.has_resnet_resampling
            else ("DownBlock2D", "UpBlock2D")
        )
        resampling = "resnet" if self.has_resnet_resampling else "conv"
        is_usual = self.time_embedding_dim == 4 * self.block_out_channels[0]
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": list(self.block_out_channels),
            "layers_per_block": self.layers_per_block,
            "down_block_types": ["AttnDownBlock2D" if one else plain[0] for one in attends],
            "up_block_types": ["AttnUpBlock2D" if one else plain[1] for one in reversed(attends)],
            "downsample_type": resampling,
            "upsample_type": resampling,
            "time_embedding_dim": None if is_usual else self.time_embedding_dim,
            "num_class_embeds": self.num_classes,
            "resnet_time_scale_shift": "scale_shift" if self.has_scale_shift else "default",
            "attn_norm_num_groups": 32 if self.has_scale_shift else None,
            "norm_num_groups": 32,
            **({} if self.num_timesteps is None else {"time_embedding_type": "learned"}),
            **({} if self.num_timesteps is None else {"num_train_timesteps": self.num_timesteps}),
        }

    @classmethod
    def of_unet(cls, config: Mapping[str, Any], shapes: Shapes) -> "Architecture":
        """Return the layers of a UNet2DModel, given its configuration and the shapes of its weights."""
        blocks = list(config["down_block_types"])
        return cls(
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            block_out_channels=tuple(config["block_out_channels"]),
            layers_per_block=config["layers_per_block"],
            attention_levels=frozenset(level for level, block in enumerate(blocks) if block == "AttnDownBlock2D"),
            time_embedding_dim=shapes["time_embedding.linear_2.weight"][0],
            num_classes=config.get("num_class_embeds"),
            has_scale_shift=config.get("resnet_time_scale_shift") == "scale_shift",
            num_timesteps=shapes["time_proj.weight"][0] if "time_proj.weight" in shapes else None,
            has_resnet_resampling=config.get("downsample_type") == "resnet" or "ResnetDownsampleBlock2D" in blocks,
        )


@dataclass(frozen=True)
class LayerNames:
    """The names that a family gives to the layers.

    Args:
        name_of: The name of the layer at a place; there is none for a place that the family lacks.
        resnet: Names in a residual block, in the order of `norm1`, `conv1`, `time_emb_proj`, `norm2`, `conv2` and
            `conv_shortcut` of UNet2DModel.
        projections: Names of the layers for query, key and value: three, or one for all.
        attention_norm: Name of the norm of an attention.
        attention_output: Name of the output of an attention.
        attention_ndim: Dimensions of the weights of an attention: 4 for 2D convolutions, 3 for 1D convolutions.
    """

    name_of: Callable[[Place, Architecture], str]
    resnet: tuple[str, str, str, str, str, str]
    projections: tuple[str, ...]
    attention_norm: str
    attention_output: str
    attention_ndim: int


@dataclass(frozen=True)
class TensorPair:
    """A tensor of a family, and the tensors of UNet2DModel that it is.

    Args:
        theirs: Its name.
        ours: The name in UNet2DModel; three names for joint projections of query, key and value.
        ndim: Dimensions in the family.
        num_heads: Heads whose rows are sorted in legacy order; 1 if the order of rows is the same.
    """

    theirs: str
    ours: tuple[str, ...]
    ndim: int
    num_heads: int = 1

    def their_shape(self, shapes: Shapes) -> torch.Size:
        """Return the shape in the family, given those of UNet2DModel."""
        rows, *rest = shapes[self.ours[0]]
        return torch.Size([rows * len(self.ours), *rest, *([1] * (self.ndim - 1 - len(rest)))])

    def to_ours(self, tensor: torch.Tensor, shapes: Shapes) -> dict[str, torch.Tensor]:
        """Return the tensors of UNet2DModel."""
        rows, *rest = shapes[self.ours[0]]
        if self.num_heads > 1:  # (heads, 3, width, ...) -> (3, heads, width, ...)
            tensor = tensor.reshape(self.num_heads, len(self.ours), -1, *rest).transpose(0, 1)
        parts = tensor.reshape(len(self.ours), rows, *rest)
        return {name: part.clone() for name, part in zip(self.ours, parts, strict=True)}

    def to_theirs(self, state: Mapping[str, torch.Tensor], shapes: Shapes) -> torch.Tensor:
        """Return the tensor of the family."""
        tensor = torch.stack([state[name] for name in self.ours])
        if self.num_heads > 1:
            tensor = tensor.reshape(len(self.ours), self.num_heads, -1, *tensor.shape[2:]).transpose(0, 1)
        return tensor.reshape(self.their_shape(shapes)).contiguous()


def tensor_pairs(
    names: LayerNames,
    architecture: Architecture,
    shapes: Shapes,
    *,
    head_width: int | None,
    order: AttentionOrder = "new",
) -> list[TensorPair]:
    """Return all tensors of a network of a family with those of the UNet2DModel that it is.

    Args:
        names: Names of the family.
        architecture: The layers.
        shapes: Shapes of the weights of the UNet2DModel.
        head_width: Channels of an attention head; None for one head of full width.
        order: Order of the rows of joint projections.
    """
    pairs: list[TensorPair] = []

    def add(theirs: str, *ours: str, ndim: int | None = None, num_heads: int = 1) -> None:
        for kind in ("weight", "bias"):
            if (first := f"{ours[0]}.{kind}") in shapes:
                own = len(shapes[first])
                pairs.append(
                    TensorPair(
                        f"{theirs}.{kind}", tuple(f"{name}.{kind}" for name in ours),
                        own if ndim is None or own == 1 else ndim, num_heads,
                    )
                )  # fmt: skip

    for kind, place, ours in _layers(architecture):
        theirs = names.name_of(place, architecture)
        if kind == "plain":
            add(theirs, ours)
        elif kind == "resnet":
            for own, their in zip(_RESNET, names.resnet, strict=True):
                add(f"{theirs}.{their}", f"{ours}.{own}")
        else:
            channels = shapes[f"{ours}.to_q.weight"][0]
            num_heads = channels // head_width if head_width and order == "legacy" else 1
            add(f"{theirs}.{names.attention_norm}", f"{ours}.group_norm")
            queries = [f"{ours}.{name}" for name in ("to_q", "to_k", "to_v")]
            if len(names.projections) == 1:
                add(f"{theirs}.{names.projections[0]}", *queries, ndim=names.attention_ndim, num_heads=num_heads)
            else:
                for their, own in zip(names.projections, queries, strict=True):
                    add(f"{theirs}.{their}", own, ndim=names.attention_ndim)
            add(f"{theirs}.{names.attention_output}", f"{ours}.to_out.0", ndim=names.attention_ndim)
    return pairs


def unet_shapes(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Return the shapes of the weights of a UNet2DModel, without allocating them."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in UNet2DModel(**config).state_dict().items()}


def _layers(architecture: Architecture) -> Iterator[tuple[str, Place, str]]:
    """Yield the kind, the place, and the name in UNet2DModel of each layer."""
    levels, resampling = range(len(architecture.block_out_channels)), architecture.has_resnet_resampling
    kind, name = ("resnet", "") if resampling else ("plain", ".conv")
    yield "plain", ("conv_in",), "conv_in"
    if architecture.num_timesteps is not None:
        yield "plain", ("time_table",), "time_proj"
    yield "plain", ("time", 0), "time_embedding.linear_1"
    yield "plain", ("time", 1), "time_embedding.linear_2"
    if architecture.num_classes is not None:
        yield "plain", ("class",), "class_embedding"
    for level in levels:
        for index in range(architecture.layers_per_block):
            yield "resnet", ("down", level, index, "resnet"), f"down_blocks.{level}.resnets.{index}"
            if level in architecture.attention_levels:
                yield "attention", ("down", level, index, "attention"), f"down_blocks.{level}.attentions.{index}"
        if level != levels[-1]:
            yield kind, ("down", level, "resample"), f"down_blocks.{level}.downsamplers.0{name}"
    yield "resnet", ("mid", 0), "mid_block.resnets.0"
    yield "attention", ("mid", 1), "mid_block.attentions.0"
    yield "resnet", ("mid", 2), "mid_block.resnets.1"
    for level in reversed(levels):
        block = f"up_blocks.{levels[-1] - level}"
        for index in range(architecture.layers_per_block + 1):
            yield "resnet", ("up", level, index, "resnet"), f"{block}.resnets.{index}"
            if level in architecture.attention_levels:
                yield "attention", ("up", level, index, "attention"), f"{block}.attentions.{index}"
        if level != 0:
            yield kind, ("up", level, "resample"), f"{block}.upsamplers.0{name}"
    yield "plain", ("norm_out",), "conv_norm_out"
    yield "plain", ("conv_out",), "conv_out"
