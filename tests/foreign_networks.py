"""Networks of other systems, written from the layers that their repositories define, with their parameter names.

`tests/unit/test_convert.py` converts them. If the environment variable DDPM_HF_PEERS names a folder with checkouts of
the repositories, it also compares them with their own code.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoids(timesteps: Tensor, channels: int, *, cosine_first: bool, divisor: int) -> Tensor:
    """Return (batch, channels) sinusoids whose frequencies fall from 1 to 1/10000 in half of the channels."""
    half = channels // 2
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) / divisor * torch.arange(half).float())
    parts = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend over the positions of (batch, channels, positions)."""
    weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(q.shape[1]), dim=-1)
    return torch.einsum("bts,bcs->bct", weights, v)


def randomize(network: nn.Module) -> nn.Module:
    """Draw all parameters, so that no layer is without effect, and return the network in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in filter(lambda one: one.requires_grad, network.parameters()):
            scale = 0.2 if parameter.ndim == 1 else 1 / math.sqrt(parameter[0].numel())
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return network.eval()


# ------------------------------------------------------------------------- pesser/pytorch_diffusion, ermongroup/ddim


def paper_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class PesserBlock(nn.Module):
    def __init__(self, ins: int, outs: int, emb: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = paper_norm(ins), nn.Conv2d(ins, outs, 3, padding=1)
        self.temb_proj = nn.Linear(emb, outs)
        self.norm2, self.conv2 = paper_norm(outs), nn.Conv2d(outs, outs, 3, padding=1)
        if ins != outs:
            self.nin_shortcut = nn.Conv2d(ins, outs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PesserAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = paper_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        return x + self.proj_out(attend(q, k, v).reshape(x.shape))


class PesserUNet(nn.Module):
    def __init__(self, ch: int, multipliers: Sequence[int], layers: int, attention: Sequence[int]) -> None:
        super().__init__()
        self.ch, self.layers, self.levels = ch, layers, range(len(multipliers))
        widths = [ch * factor for factor in multipliers]
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)])
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down, self.mid, self.up = nn.ModuleList(), nn.Module(), nn.ModuleList()
        skips = [ch]
        for level, width in enumerate(widths):
            part = nn.Module()
            part.block = nn.ModuleList(
                PesserBlock(skips[-1] if not index else width, width, 4 * ch) for index in range(layers)
            )
            part.attn = nn.ModuleList(PesserAttention(width) for _ in range(layers * (level in attention)))
            skips += [width] * layers
            if level != self.levels[-1]:
                part.downsample = nn.Module()
                part.downsample.conv = nn.Conv2d(width, width, 3, stride=2)
                skips.append(width)
            self.down.append(part)
        self.mid.block_1 = PesserBlock(width, width, 4 * ch)
        self.mid.attn_1 = PesserAttention(width)
        self.mid.block_2 = PesserBlock(width, width, 4 * ch)
        before = width
        for level in reversed(self.levels):
            part, width = nn.Module(), widths[level]
            part.block, part.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(layers + 1):
                part.block.append(PesserBlock(before + skips.pop(), width, 4 * ch))
                before = width
            part.attn.extend(PesserAttention(width) for _ in range((layers + 1) * (level in attention)))
            if level:
                part.upsample = nn.Module()
                part.upsample.conv = nn.Conv2d(width, width, 3, padding=1)
            self.up.insert(0, part)
        self.norm_out, self.conv_out = paper_norm(ch), nn.Conv2d(ch, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.temb.dense[0](sinusoids(t, self.ch, cosine_first=False, divisor=self.ch // 2 - 1))
        emb = self.temb.dense[1](F.silu(emb))
        h = self.conv_in(x)
        skips = [h]
        for level in self.levels:
            part = self.down[level]
            for index in range(self.layers):
                h = part.block[index](h, emb)
                h = part.attn[index](h) if len(part.attn) else h
                skips.append(h)
            if level != self.levels[-1]:
                h = part.downsample.conv(F.pad(h, (0, 1, 0, 1)))
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, emb)), emb)
        for level in reversed(self.levels):
            part = self.up[level]
            for index in range(self.layers + 1):
                h = part.block[index](torch.cat([h, skips.pop()], dim=1), emb)
                h = part.attn[index](h) if len(part.attn) else h
            if level:
                h = part.upsample.conv(F.interpolate(h, scale_factor=2.0))
        return self.conv_out(F.silu(self.norm_out(h)))


# ------------------------------------------------------------------------------------------------- tqch/ddpm-torch


class DDPMTorchBlock(nn.Module):
    def __init__(self, ins: int, outs: int, emb: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = paper_norm(ins), nn.Conv2d(ins, outs, 3, padding=1)
        self.fc = nn.Linear(emb, outs)
        self.norm2, self.conv2 = paper_norm(outs), nn.Conv2d(outs, outs, 3, padding=1)
        self.skip = nn.Identity() if ins == outs else nn.Conv2d(ins, outs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.fc(F.silu(emb))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class DDPMTorchAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = paper_norm(channels)
        self.project_in, self.project_out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        q, k, v = self.project_in(self.norm(x)).flatten(2).chunk(3, dim=1)
        return x + self.project_out(attend(q, k, v).reshape(x.shape))


class Embedded(nn.Sequential):
    """Layers that take the time embedding, and layers that do not."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            takes_embedding = isinstance(layer, DDPMTorchBlock | DDPMTorchAttention | OpenAIBlock)
            x = layer(x, emb) if takes_embedding else layer(x)
        return x


class DDPMTorchUNet(nn.Module):
    def __init__(self, ch: int, multipliers: Sequence[int], layers: int, attention: Sequence[int]) -> None:
        super().__init__()
        self.ch, widths = ch, [ch * factor for factor in multipliers]
        self.levels = range(len(widths))

        def block(level: int, ins: int) -> nn.Module:
            outs = widths[level]
            resnet = DDPMTorchBlock(ins, outs, 4 * ch)
            return Embedded(resnet, DDPMTorchAttention(outs)) if level in attention else resnet

        self.embed = nn.Sequential(nn.Linear(ch, 4 * ch), nn.SiLU(), nn.Linear(4 * ch, 4 * ch))
        self.in_conv = nn.Conv2d(3, ch, 3, padding=1)
        self.downsamples, self.upsamples = nn.ModuleDict(), nn.ModuleDict()
        skips = [ch]
        for level, width in enumerate(widths):
            parts = [block(level, skips[-1] if not index else width) for index in range(layers)]
            skips += [width] * layers
            if level != self.levels[-1]:
                parts.append(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2)))
                skips.append(width)
            self.downsamples[f"level_{level}"] = nn.ModuleList(parts)
        last = widths[-1]
        self.middle = Embedded(
            DDPMTorchBlock(last, last, 4 * ch), DDPMTorchAttention(last), DDPMTorchBlock(last, last, 4 * ch)
        )
        ups, before = {}, last
        for level in reversed(self.levels):
            parts = []
            for _ in range(layers + 1):
                parts.append(block(level, before + skips.pop()))
                before = widths[level]
            if level:
                parts.append(nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(before, before, 3, padding=1)))
            ups[level] = nn.ModuleList(parts)
        for level in self.levels:
            self.upsamples[f"level_{level}"] = ups[level]
        self.out_conv = nn.Sequential(paper_norm(ch), nn.SiLU(), nn.Conv2d(ch, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.embed(sinusoids(t, self.ch, cosine_first=False, divisor=self.ch // 2 - 1))
        h = self.in_conv(x)
        skips = [h]
        for level in self.levels:
            for layer in self.downsamples[f"level_{level}"]:
                h = layer(h, emb) if isinstance(layer, Embedded | DDPMTorchBlock) else layer(h)
                skips.append(h)
        h = self.middle(h, emb)
        for level in reversed(self.levels):
            for layer in self.upsamples[f"level_{level}"]:
                if isinstance(layer, Embedded | DDPMTorchBlock):
                    h = layer(torch.cat([h, skips.pop()], dim=1), emb)
                else:
                    h = layer(h)
        return self.out_conv(h)


# ---------------------------------------------------------------- openai/improved-diffusion, openai/guided-diffusion


class OpenAIBlock(nn.Module):
    def __init__(self, ins: int, outs: int, emb: int, scale_shift: bool, resample: str = "") -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, ins), nn.SiLU(), nn.Conv2d(ins, outs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, outs * (1 + scale_shift)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outs), nn.SiLU(), nn.Dropout(), nn.Conv2d(outs, outs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if ins == outs else nn.Conv2d(ins, outs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        h = activation(norm(x))
        if self.resample == "up":
            h, x = F.interpolate(h, scale_factor=2.0), F.interpolate(x, scale_factor=2.0)
        elif self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        h, emb = convolution(h), self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + emb)
        return self.skip_connection(x) + self.out_layers[1:](h)


class OpenAIAttention(nn.Module):
    def __init__(self, channels: int, num_heads: int, new_order: bool) -> None:
        super().__init__()
        self.num_heads, self.new_order = num_heads, new_order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *_ = x.shape
        qkv, width = self.qkv(self.norm(x).flatten(2)), channels // self.num_heads
        if self.new_order:
            q, k, v = (part.reshape(batch * self.num_heads, width, -1) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(batch * self.num_heads, 3 * width, -1).chunk(3, dim=1)
        return x + self.proj_out(attend(q, k, v).reshape(batch, channels, -1)).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


class OpenAIUNet(nn.Module):
    def __init__(
        self,
        ch: int,
        multipliers: Sequence[int],
        layers: int,
        attention: Sequence[int],
        *,
        head_width: int | None = None,
        num_heads: int = 1,
        new_order: bool = False,
        outs: int = 3,
        num_classes: int | None = None,
        scale_shift: bool = True,
        resnet_resampling: bool = True,
    ) -> None:
        super().__init__()
        self.ch, widths, emb = ch, [ch * factor for factor in multipliers], 4 * ch

        def attended(width: int) -> nn.Module:
            return OpenAIAttention(width, num_heads if head_width is None else width // head_width, new_order)

        def resampled(width: int, way: str) -> nn.Module:
            if resnet_resampling:
                return OpenAIBlock(width, width, emb, scale_shift, way)
            return Upsample(width) if way == "up" else Downsample(width)

        self.time_embed = nn.Sequential(nn.Linear(ch, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)
        self.input_blocks = nn.ModuleList([Embedded(nn.Conv2d(3, ch, 3, padding=1))])
        skips, before = [ch], ch
        for level, width in enumerate(widths):
            for _ in range(layers):
                parts = [OpenAIBlock(before, width, emb, scale_shift)]
                self.input_blocks.append(Embedded(*parts, *([attended(width)] if level in attention else [])))
                before = width
                skips.append(width)
            if level != len(widths) - 1:
                self.input_blocks.append(Embedded(resampled(width, "down")))
                skips.append(width)
        self.middle_block = Embedded(
            OpenAIBlock(width, width, emb, scale_shift), attended(width), OpenAIBlock(width, width, emb, scale_shift)
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            width = widths[level]
            for index in range(layers + 1):
                parts = [OpenAIBlock(before + skips.pop(), width, emb, scale_shift)]
                parts += [attended(width)] if level in attention else []  # type: ignore[list-item]
                parts += [resampled(width, "up")] if level and index == layers else []  # type: ignore[list-item]
                self.output_blocks.append(Embedded(*parts))
                before = width
        self.out = nn.Sequential(nn.GroupNorm(32, ch), nn.SiLU(), nn.Conv2d(ch, outs, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time_embed(sinusoids(t, self.ch, cosine_first=True, divisor=self.ch // 2))
        emb = emb if y is None else emb + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            x = block(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
        return self.out(x)


# ------------------------------------------------------------------------- abarankab/DDPM, bubbliiiing/ddpm-pytorch


class AbarankabBlock(nn.Module):
    def __init__(self, ins: int, outs: int, emb: int, attends: bool) -> None:
        super().__init__()
        self.norm_1, self.conv_1 = nn.GroupNorm(32, ins), nn.Conv2d(ins, outs, 3, padding=1)
        self.norm_2, self.time_bias = nn.GroupNorm(32, outs), nn.Linear(emb, outs)
        self.conv_2 = nn.Sequential(nn.Dropout(), nn.Conv2d(outs, outs, 3, padding=1))
        self.residual_connection = nn.Identity() if ins == outs else nn.Conv2d(ins, outs, 1)
        self.attention = AbarankabAttention(outs) if attends else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x))) + self.time_bias(F.silu(emb))[:, :, None, None]
        return self.attention(self.conv_2(F.silu(self.norm_2(h))) + self.residual_connection(x))


class AbarankabAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.to_qkv, self.to_out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        return x + self.to_out(attend(q, k, v).reshape(x.shape))


class AbarankabResampling(nn.Module):
    def __init__(self, channels: int, way: str) -> None:
        super().__init__()
        if way == "down":
            self.downsample = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        else:
            self.upsample = nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.downsample(x) if hasattr(self, "downsample") else self.upsample(x)


class AbarankabUNet(nn.Module):
    def __init__(self, ch: int, multipliers: Sequence[int], layers: int, attention: Sequence[int]) -> None:
        super().__init__()
        self.ch, widths, emb = ch, [ch * factor for factor in multipliers], 4 * ch
        self.time_mlp = nn.Sequential(nn.Identity(), nn.Linear(ch, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.init_conv = nn.Conv2d(3, ch, 3, padding=1)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        skips, before = [ch], ch
        for level, width in enumerate(widths):
            for _ in range(layers):
                self.downs.append(AbarankabBlock(before, width, emb, level in attention))
                before = width
                skips.append(width)
            if level != len(widths) - 1:
                self.downs.append(AbarankabResampling(width, "down"))
                skips.append(width)
        self.mid = nn.ModuleList(AbarankabBlock(before, before, emb, attends) for attends in (True, False))
        for level in reversed(range(len(widths))):
            for _ in range(layers + 1):
                self.ups.append(AbarankabBlock(before + skips.pop(), widths[level], emb, level in attention))
                before = widths[level]
            if level:
                self.ups.append(AbarankabResampling(before, "up"))
        self.out_norm, self.out_conv = nn.GroupNorm(32, ch), nn.Conv2d(ch, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time_mlp(sinusoids(t, self.ch, cosine_first=False, divisor=self.ch // 2))
        h = self.init_conv(x)
        skips = [h]
        for layer in self.downs:
            h = layer(h, emb)
            skips.append(h)
        for layer in self.mid:
            h = layer(h, emb)
        for layer in self.ups:
            h = torch.cat([h, skips.pop()], dim=1) if isinstance(layer, AbarankabBlock) else h
            h = layer(h, emb)
        return self.out_conv(F.silu(self.out_norm(h)))


# ---------------------------------------------------------------------------------------------- w86763777/pytorch-ddpm


class PytorchDDPMBlock(nn.Module):
    def __init__(self, ins: int, outs: int, emb: int, attends: bool) -> None:
        super().__init__()
        self.block1 = nn.Sequential(nn.GroupNorm(32, ins), nn.SiLU(), nn.Conv2d(ins, outs, 3, padding=1))
        self.temb_proj = nn.Sequential(nn.SiLU(), nn.Linear(emb, outs))
        self.block2 = nn.Sequential(
            nn.GroupNorm(32, outs), nn.SiLU(), nn.Dropout(), nn.Conv2d(outs, outs, 3, padding=1)
        )
        self.shortcut = nn.Identity() if ins == outs else nn.Conv2d(ins, outs, 1)
        self.attn = PytorchDDPMAttention(outs) if attends else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.block2(self.block1(x) + self.temb_proj(emb)[:, :, None, None])
        return self.attn(h + self.shortcut(x))


class PytorchDDPMAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(32, channels)
        self.proj_q, self.proj_k, self.proj_v, self.proj = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.proj_q, self.proj_k, self.proj_v))
        return x + self.proj(attend(q, k, v).reshape(x.shape))


class PytorchDDPMResampling(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.main(x if self.main.stride == (2, 2) else F.interpolate(x, scale_factor=2.0))


class PytorchDDPMUNet(nn.Module):
    def __init__(
        self, num_timesteps: int, ch: int, multipliers: Sequence[int], layers: int, attention: Sequence[int]
    ) -> None:
        super().__init__()
        widths, emb = [ch * factor for factor in multipliers], 4 * ch
        frequencies = torch.exp(-torch.arange(0, ch, 2) / ch * math.log(10000))
        angles = torch.arange(num_timesteps).float()[:, None] * frequencies
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        self.time_embedding = nn.Module()
        self.time_embedding.timembedding = nn.Sequential(
            nn.Embedding.from_pretrained(table), nn.Linear(ch, emb), nn.SiLU(), nn.Linear(emb, emb)
        )
        self.head = nn.Conv2d(3, ch, 3, padding=1)
        self.downblocks, self.upblocks = nn.ModuleList(), nn.ModuleList()
        skips, before = [ch], ch
        for level, width in enumerate(widths):
            for _ in range(layers):
                self.downblocks.append(PytorchDDPMBlock(before, width, emb, level in attention))
                before = width
                skips.append(width)
            if level != len(widths) - 1:
                self.downblocks.append(PytorchDDPMResampling(width, 2))
                skips.append(width)
        self.middleblocks = nn.ModuleList(PytorchDDPMBlock(before, before, emb, attends) for attends in (True, False))
        for level in reversed(range(len(widths))):
            for _ in range(layers + 1):
                self.upblocks.append(PytorchDDPMBlock(before + skips.pop(), widths[level], emb, level in attention))
                before = widths[level]
            if level:
                self.upblocks.append(PytorchDDPMResampling(before, 1))
        self.tail = nn.Sequential(nn.GroupNorm(32, ch), nn.SiLU(), nn.Conv2d(ch, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time_embedding.timembedding(t)
        h = self.head(x)
        skips = [h]
        for layer in self.downblocks:
            h = layer(h, emb)
            skips.append(h)
        for layer in self.middleblocks:
            h = layer(h, emb)
        for layer in self.upblocks:
            h = torch.cat([h, skips.pop()], dim=1) if isinstance(layer, PytorchDDPMBlock) else h
            h = layer(h, emb)
        return self.tail(h)
