"""Converted networks compute what the networks of other systems compute, and go back bit-identically.

The published networks are compared by digests of the names and shapes of their parameters, which their own code has in
the published configurations.
"""

import hashlib
import importlib.util
import json
import os
import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import nn

from ddpm_hf.cli.main import main
from ddpm_hf.config import ConfigError, ModelConfig, load_config
from ddpm_hf.convert.checkpoint import Checkpoint
from ddpm_hf.convert.conversion import convert, convert_back, describe, match
from ddpm_hf.convert.families import FAMILIES
from ddpm_hf.convert.layers import Architecture, tensor_pairs, unet_shapes
from ddpm_hf.convert.options import ConversionOptions
from ddpm_hf.convert.recipe import recipe
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.models import Pretrained, build_unet, take_weights
from tests.conftest import tiny_unet
from tests.foreign_networks import AbarankabUNet, DDPMTorchUNet, OpenAIUNet, PesserUNet, PytorchDDPMUNet, randomize

SIZE = 16


def options(**values: Any) -> ConversionOptions:
    return ConversionOptions(**{"image_size": SIZE, **values})


def converted(network: nn.Module | Mapping[str, Any], **values: Any) -> Any:
    content = network.state_dict() if isinstance(network, nn.Module) else network
    return convert(Checkpoint(Path("model.pt"), content), options(**values))


# Name -> network, options of the conversion, labels, scale of the timesteps.
Case = tuple[Callable[[], nn.Module], dict[str, Any], list[int] | None, float]
NETWORKS: dict[str, Case] = {
    "pesser": (lambda: PesserUNet(32, (1, 2), 2, (1,)), {}, None, 1),
    "ddpm_torch": (lambda: DDPMTorchUNet(32, (1, 2, 2), 1, (0, 1)), {}, None, 1),
    "guided_diffusion legacy order, learned variance": (
        lambda: OpenAIUNet(32, (1, 2), 1, (0, 1), head_width=16, outs=6), {"num_head_channels": 16}, None, 1,
    ),
    "guided_diffusion new order, classes": (
        lambda: OpenAIUNet(32, (1, 2), 1, (1,), num_heads=4, new_order=True, num_classes=5),
        {"num_heads": 4, "attention_order": "new"}, [4, 0], 1,
    ),
    "improved_diffusion rescaled timesteps": (
        lambda: OpenAIUNet(32, (1, 2), 1, (1,), num_heads=4, outs=6, resnet_resampling=False),
        {"num_heads": 4, "num_train_timesteps": 4000, "schedule": "cosine"}, None, 1000 / 4000,
    ),
    "improved_diffusion one head": (
        lambda: OpenAIUNet(32, (1, 1, 2), 1, (1,), scale_shift=False, resnet_resampling=False),
        {"num_heads": 1}, None, 1,
    ),
    "abarankab": (lambda: AbarankabUNet(32, (1, 2), 1, (1,)), {}, None, 1),
    "pytorch_ddpm": (lambda: PytorchDDPMUNet(50, 32, (1, 2), 1, (0,)), {}, None, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_a_converted_network_computes_the_same_and_goes_back_bit_identically(name: str) -> None:
    make, settings, labels, scale = NETWORKS[name]
    network = randomize(make())
    conversion = converted(network, **settings)
    assert conversion.family.name == name.split()[0]
    last = len(conversion.scheduler) - 1
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    classes = None if labels is None else torch.tensor(labels)
    for t in (0, 1, last // 3, last // 2, last):
        timesteps = torch.full((2,), t)
        with torch.no_grad():
            theirs = network(images, timesteps * scale, *([] if classes is None else [classes]))
            ours = conversion.unet(images, timesteps, classes).sample
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))

    record = json.loads(json.dumps(conversion.record()))
    back = convert_back(conversion.unet, conversion.family, record, "folder")
    state = network.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_half_precision_weights_go_back_in_half_precision() -> None:
    state = randomize(OpenAIUNet(32, (1, 2), 1, (1,), head_width=16)).state_dict()
    state = {name: tensor if name.startswith("out.") else tensor.half() for name, tensor in state.items()}
    conversion = converted(state, num_head_channels=16)
    assert {tensor.dtype for tensor in conversion.unet.state_dict().values()} == {torch.float32}
    back = convert_back(conversion.unet, conversion.family, conversion.record(), "folder")
    assert all(torch.equal(back[name], state[name]) and back[name].dtype == state[name].dtype for name in state)


def reference_trajectory(
    network: nn.Module, betas: np.ndarray, x: torch.Tensor, scale: float, variance: str, generator: torch.Generator
) -> torch.Tensor:
    """Sample by Algorithm 2 of Ho et al. 2020 and Eq. 15 of Nichol & Dhariwal 2021, with float64 coefficients."""
    alpha_bar = np.cumprod(1 - betas)
    before = np.append(1.0, alpha_bar[:-1])
    posterior = betas * (1 - before) / (1 - alpha_bar)
    for t in range(len(betas))[::-1]:
        with torch.no_grad():
            output = network(x, torch.full((len(x),), t) * scale)
        eps, *learned = output.split(3, dim=1)
        x_0 = ((x - np.sqrt(1 - alpha_bar[t]) * eps) / np.sqrt(alpha_bar[t])).clamp(-1, 1)
        mean = betas[t] * np.sqrt(before[t]) / (1 - alpha_bar[t]) * x_0
        mean = mean + (1 - before[t]) * np.sqrt(1 - betas[t]) / (1 - alpha_bar[t]) * x
        if t == 0:
            return mean
        log_variance: Any = np.log({"fixed_small": posterior, "fixed_large": betas}.get(variance, posterior)[t])
        if variance == "learned_range":
            share = (learned[0] + 1) / 2
            log_variance = share * np.log(betas[t]) + (1 - share) * log_variance
        deviation = torch.exp(0.5 * torch.as_tensor(log_variance)).float()
        x = mean + deviation * torch.randn(x.shape, generator=generator)
    raise AssertionError


@pytest.mark.parametrize(
    ("name", "settings", "betas"),
    [
        ("pesser", {"variance_type": "fixed_large"}, lambda n: np.linspace(1e-4, 0.02, n)),
        ("pesser", {"variance_type": "fixed_small"}, lambda n: np.linspace(1e-4, 0.02, n)),
        (
            "guided_diffusion legacy order, learned variance", {},
            lambda n: np.linspace(0.1 / n, 20 / n, n),
        ),
        (
            "improved_diffusion rescaled timesteps", {},
            lambda n: np.array([
                min(1 - np.cos(((i + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
                    / np.cos((i / n + 0.008) / 1.008 * np.pi / 2) ** 2, 0.999) for i in range(n)
            ]),
        ),
    ],
)  # fmt: skip
def test_the_whole_trajectory_is_that_of_the_family(
    name: str, settings: dict[str, Any], betas: Callable[[int], np.ndarray]
) -> None:
    make, own, _, _ = NETWORKS[name]
    network, num_timesteps = randomize(make()), 25
    conversion = converted(network, **{**own, **settings, "num_train_timesteps": num_timesteps})
    pipeline = GaussianDiffusionPipeline(conversion.unet, conversion.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    scale = 1000 / num_timesteps if "rescaled" in name else 1
    variance = conversion.scheduler.variance_type
    theirs = reference_trajectory(network, betas(num_timesteps), x, scale, variance, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    ours = pipeline(sample=x, generator=generator, output_type="pt").images
    torch.testing.assert_close(ours, (theirs.clamp(-1, 1) + 1) / 2, rtol=0, atol=1e-5)


# The published networks: family, layers, number of tensors and parameters, digest of names and shapes, settings.
SMALL, LARGE = (1, 2, 2, 2), (1, 1, 2, 2, 4, 4)


def layers(ch: int, multipliers: tuple[int, ...], count: int, attention: set[int], **rest: Any) -> Architecture:
    widths = tuple(ch * factor for factor in multipliers)
    rest = {"in_channels": 3, "out_channels": 3, "time_embedding_dim": 4 * ch, **rest}
    return Architecture(
        block_out_channels=widths, layers_per_block=count, attention_levels=frozenset(attention), **rest
    )


LEARNED = {"out_channels": 6, "has_scale_shift": True}
GUIDED = {**LEARNED, "has_resnet_resampling": True}
PUBLISHED: dict[str, tuple[str, Architecture, int, int, str, dict[str, Any]]] = {
    "pesser ema_cifar10": (
        "pesser", layers(128, SMALL, 2, {1}), 328, 35_746_307, "5b8505047443ff13",
        {"image_size": 32, "variance_type": "fixed_large"},
    ),
    "pesser ema_lsun_bedroom, ema_lsun_cat, ema_lsun_church; CelebA-HQ": (
        "pesser", layers(128, LARGE, 2, {4}), 450, 113_673_219, "dd620a5e91b68ae8",
        {"image_size": 256, "variance_type": "fixed_small"},
    ),
    "ddim celeba": (
        "pesser", layers(128, (1, 2, 2, 2, 4), 2, {2}), 390, 78_700_803, "815ebf44ef6c3978", {"image_size": 64},
    ),
    "ddpm_torch cifar10_2040": (
        "ddpm_torch", layers(128, SMALL, 2, {1}), 304, 35_746_307, "e1e0389afb430978",
        {"image_size": 32, "variance_type": "fixed_large"},
    ),
    "ddpm_torch celeba_600": (
        "ddpm_torch", layers(128, SMALL, 2, {2}), 304, 35_746_307, "861029de9126964a",
        {"image_size": 64, "variance_type": "fixed_small"},
    ),
    "ddpm_torch celebahq_1200": (
        "ddpm_torch", layers(128, LARGE, 2, {4}), 426, 113_673_219, "3d4cff2eed221c96", {"image_size": 256},
    ),
    "improved_diffusion cifar10_uncond_50M_500K, cifar10_uncond_vlb_50M_500K": (
        "improved_diffusion", layers(128, SMALL, 3, {1, 2}, **LEARNED), 446, 52_546_438, "001b621871f3fa9d",
        {"image_size": 32, "num_train_timesteps": 4000, "rescale_timesteps": True, "num_heads": 4, "dropout": 0.3},
    ),
    "improved_diffusion lsun_uncond_100M_1200K_bs128": (
        "improved_diffusion", layers(128, LARGE, 2, {4}, out_channels=6), 426, 113_676_678, "0313288a27e5d1d5",
        {"image_size": 256, "num_train_timesteps": 1000, "num_heads": 1, "variance_type": "learned_range"},
    ),
    "guided_diffusion 64x64_diffusion": (
        "guided_diffusion",
        layers(192, (1, 2, 3, 4), 3, {1, 2, 3}, num_classes=1000, **GUIDED), 541, 295_904_454, "b879ba9ed4fe94bb",
        {"image_size": 64, "num_head_channels": 64, "attention_order": "new", "schedule": "cosine"},
    ),
    "guided_diffusion 256x256_diffusion": (
        "guided_diffusion",
        layers(256, LARGE, 2, {3, 4, 5}, num_classes=1000, **GUIDED), 567, 553_838_086, "408c4d65687d2b6d",
        {"image_size": 256, "num_head_channels": 64, "attention_order": "legacy", "schedule": "linear"},
    ),
    "guided_diffusion 256x256_diffusion_uncond, lsun_*; RePaint celeba256_250000, places256": (
        "guided_diffusion",
        layers(256, LARGE, 2, {3, 4, 5}, **GUIDED), 566, 552_814_086, "b9c90be1570d1541",
        {"image_size": 256, "num_head_channels": 64, "attention_order": "legacy", "schedule": "linear"},
    ),
    "DPS ffhq_10m; P2-weighting ffhq_p2": (
        "guided_diffusion",
        layers(128, LARGE, 1, {4}, **GUIDED), 362, 93_563_910, "47cc71b580397ca5",
        {"image_size": 256, "num_head_channels": 64, "attention_order": "legacy"},
    ),
    "DDPM-IP cifar10": (
        "guided_diffusion",
        layers(128, SMALL, 3, {1, 2}, **GUIDED), 494, 57_094_662, "7a6a0bb16bfc35b3",
        {"image_size": 32, "num_head_channels": 32, "attention_order": "new", "schedule": "cosine"},
    ),
    "DDPM-IP ffhq128": (
        "guided_diffusion",
        layers(256, (1, 1, 2, 3, 4), 3, {2, 3, 4}, **GUIDED), 638, 542_811_398, "7270dbca40ad7800",
        {"image_size": 128, "num_head_channels": 64, "attention_order": "new"},
    ),
    "abarankab cifar10": (
        "abarankab", layers(128, SMALL, 2, {1}), 304, 35_746_307, "6425f86eb189e9ce", {"clip_sample": False},
    ),
    "pytorch_ddpm DDPM_CIFAR10_EPS": (
        "pytorch_ddpm", layers(128, SMALL, 2, {1}, num_timesteps=1000), 329, 35_874_307, "abf545d82c874320",
        {"image_size": 32, "variance_type": "fixed_large"},
    ),
    "bubbliiiing": (
        "abarankab", layers(128, (1, 2, 4, 8), 3, {1}), 408, 295_480_963, "2f5f3fecbd64057d", {"image_size": 32},
    ),
}  # fmt: skip
# Published networks with heads of different widths: the layer that the message names.
DIFFERENT_HEADS = {
    "improved_diffusion imagenet64_uncond_100M_1500K": (
        "improved_diffusion", layers(128, (1, 2, 3, 4), 3, {2, 3}, **LEARNED), "5a42ef114f79713a",
        "96 channels in input_blocks.9.1, 128 channels in input_blocks.13.1",
    ),
    "guided_diffusion 128x128_diffusion": (
        "guided_diffusion",
        layers(256, (1, 1, 2, 3, 4), 2, {2, 3, 4}, num_classes=1000, **GUIDED), "d91b9be2449a697e",
        "128 channels in input_blocks.7.1, 192 channels in input_blocks.10.1, 256 channels in input_blocks.13.1",
    ),
}  # fmt: skip


def shapes_of(family: str, architecture: Architecture) -> dict[str, torch.Size]:
    """Return the names and shapes of the parameters of a network of a family."""
    names = FAMILIES[family].names
    ours = unet_shapes(architecture.unet_config() | {"attention_head_dim": None})
    pairs = tensor_pairs(names, architecture, ours, head_width=None)
    assert sorted(name for pair in pairs for name in pair.ours) == sorted(ours)
    return {pair.theirs: pair.their_shape(ours) for pair in pairs}


def digest(shapes: Mapping[str, torch.Size]) -> str:
    text = "\n".join(f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_map_without_a_rest(name: str) -> None:
    family, architecture, num_tensors, num_parameters, expected, settings = PUBLISHED[name]
    shapes = shapes_of(family, architecture)
    assert (len(shapes), sum(shape.numel() for shape in shapes.values())) == (num_tensors, num_parameters)
    assert digest(shapes) == expected
    found, published, told = describe(Path("model.pt"), FAMILIES[family], shapes, ConversionOptions())
    assert found == architecture
    assert published is not None
    assert {key: told[key] for key in settings} == settings
    config, _ = match(Path("model.pt"), FAMILIES[family], shapes, found, told)
    assert config["attention_head_dim"] == told.get("num_head_channels", 64 if told.get("num_heads") == 4 else None)


@pytest.mark.parametrize("name", DIFFERENT_HEADS)
def test_published_checkpoints_with_heads_of_different_widths_are_refused(name: str) -> None:
    family, architecture, expected, message = DIFFERENT_HEADS[name]
    shapes = shapes_of(family, architecture)
    assert digest(shapes) == expected
    found, _, told = describe(Path("model.pt"), FAMILIES[family], shapes, ConversionOptions())
    with pytest.raises(ConfigError, match=message):
        match(Path("model.pt"), FAMILIES[family], shapes, found, told)


PESSER = randomize(PesserUNet(32, (1, 2), 1, (1,))).state_dict()
OPENAI = randomize(OpenAIUNet(32, (1, 2), 1, (1,), outs=6)).state_dict()


def without(state: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if part not in name}


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (without(PESSER, "mid.attn_1.k.bias"), {}, r"lacks 1 parameter of its own network \(mid.attn_1.k.bias\)"),
        (without(PESSER, "up."), {}, r"lacks \d+ parameters of its own network \(up.0.block.0.conv1.bias"),
        (without(PESSER, "conv_out"), {}, "conv_out.weight is missing; this is only a part"),
        (without(PESSER, "sample.conv"), {}, "downsample.conv.bias, .* changes the resolution without"),
        (
            without(DDPMTorchUNet(32, (1, 2), 1, ()).state_dict(), ".1.1."), {},
            "level_0.1.1.bias, .* changes the resolution without",
        ),
        (PESSER | {"extra.weight": torch.zeros(1)}, {}, r"1 parameter that UNet2DModel has no layer for \(extra"),
        (PESSER | {"conv_in.bias": torch.full((32,), torch.nan)}, {}, "NaN or infinite values in conv_in.bias"),
        (
            PESSER | {"down.1.block.0.nin_shortcut.weight": torch.zeros(64, 32, 3, 3)}, {},
            r"nin_shortcut.weight of shape .* \(its shortcuts are 3x3 convolutions\)",
        ),
        ({f"layer_{index}.weight": torch.zeros(1) for index in range(9)}, {}, "unknown family: layer_0.weight, layer"),
        ({"step": 5}, {}, r"holds no weights of a network \(step\)"),
        (PESSER, {"image_size": None}, "add --image_size N"),
        (PESSER, {"image_size": 17}, "give a multiple of 2"),
        (PESSER, {"num_heads": 2}, "attention has one head; remove it"),
        (PESSER, {"rescale_timesteps": "true"}, "timesteps are not scaled; remove it"),
        (PESSER, {"family": "ddpm_torch"}, "--family is ddpm_torch, but model.pt is a network of pesser"),
        (PESSER, {"ema": "ema"}, "--ema is 'ema', but model.pt holds the state dict itself"),
        (PESSER, {"variance_type": "learned_range"}, "predicts no variance, unlike --variance_type learned_range"),
        (PESSER, {"beta_start": 0.5}, "beta_start is 0.5 and beta_end 0.02"),
        (OPENAI, {}, "add --num_heads N or --num_head_channels N"),
        (OPENAI, {"num_heads": 3}, "--num_heads is 3, but .* attends with 64 channels"),
        (OPENAI, {"num_heads": 1, "variance_type": "fixed_small"}, "it predicts a variance, unlike"),
        (
            randomize(OpenAIUNet(32, (1, 2), 1, (0, 1))).state_dict(), {"num_heads": 4},
            "4 attention heads at each level, of 8 channels in input_blocks.1.1, 16 channels in input_blocks.3.1",
        ),
        (
            OPENAI | {"time_embed.0.weight": torch.zeros(128, 64)}, {"num_heads": 1},
            "time_embed.0.weight of shape .* embeds timesteps in 64 channels, and its first level has 32",
        ),
        (
            without(randomize(OpenAIUNet(32, (1, 2), 1, (), resnet_resampling=False)).state_dict(), ".op."),
            {"num_heads": 1}, "input_blocks.2 has no parameters: it averages pixels",
        ),
        (AbarankabUNet(32, (1, 2), 1, ()).state_dict(), {"activation": "relu"}, "activation relu before out_conv"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_with_the_layer_or_the_flag(
    content: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        converted(content, **settings)


@pytest.mark.parametrize(
    ("names", "title"),
    [
        (["downs.0.0.block1.proj.weight", "init_conv.weight"], "lucidrains/denoising-diffusion-pytorch"),
        (["model.map_layer0.weight", "model.enc.32x32_conv.weight"], "NVlabs/edm"),
        (["unet.emb_fourier.freqs", "unet.enc.64x64_conv.weight", "unet.out_gain"], "NVlabs/edm2"),
        (
            ["inner_model.u_net.d_blocks.0.0.main.0.weight", "inner_model.timestep_embed.weight"],
            "crowsonkb/k-diffusion",
        ),
        (["all_modules.0.weight"], "yang-song/score_sde"),
        (["first_stage_model.encoder.conv_in.weight", "model.diffusion_model.time_embed.0.weight"], "CompVis"),
        (["time_embed.0.weight", "out.2.positional_embedding"], "a classifier of openai/guided-diffusion"),
        (["blocks.0.adaLN_modulation.1.weight"], "facebookresearch/DiT"),
    ],
)
def test_other_families_are_refused_by_name(names: list[str], title: str) -> None:
    names += [f"other.{index}.weight" for index in range(8)]
    with pytest.raises(ConfigError, match=rf"is a network of {title}.*which UNet2DModel cannot express: it "):
        converted({name: torch.zeros(1) for name in names})


def below(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


RAW, EMA = ({name: tensor + shift for name, tensor in PESSER.items()} for shift in (0, 1))
CONTAINERS: dict[str, tuple[Any, str]] = {
    "ddpm_torch": ({"model": RAW, "ema": {"decay": 0.9, "shadow": EMA}, "fid": np.float64(3.2)}, "ema.shadow"),
    "ddim": ([below("module.", RAW), {}, 1, 2, below("module.", EMA)], "ema:module."),
    "abarankab": (below("model.", RAW) | below("ema_model.", EMA), "ema_model."),
    "lucidrains": (
        {
            "model": below("model.", RAW),
            "ema": below("online_model.model.", RAW) | below("ema_model.model.", EMA),
        },
        "ema:ema_model.model.",
    ),
    "torch_ema": ({"ema": {"decay": 0.9, "shadow_params": [*EMA.values()]}, "net": RAW}, "ema.shadow_params"),
    "compiled": ({"state_dict": below("_orig_mod.", RAW), "model_ema": EMA}, "model_ema"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_ema_weights_are_preferred_and_others_can_be_asked_for(name: str) -> None:
    content, place = CONTAINERS[name]
    conversion = converted(content)
    assert (conversion.place, conversion.record()["is_ema"]) == (place, True)
    assert torch.equal(conversion.unet.conv_in.weight, EMA["conv_in.weight"])
    if name != "lucidrains":
        assert torch.equal(converted(content, ema="none").unet.conv_in.weight, RAW["conv_in.weight"])
    assert torch.equal(converted(content, ema=place).unet.conv_in.weight, EMA["conv_in.weight"])


def test_betas_in_a_checkpoint_are_the_process() -> None:
    network = randomize(AbarankabUNet(32, (1, 2), 1, ())).state_dict()
    betas = torch.linspace(5e-4, 0.1, 200, dtype=torch.float64).float()
    content = {"betas": betas, **{f"model.{name}": tensor for name, tensor in network.items()}}
    config = converted(content).scheduler.config
    assert (config.num_train_timesteps, config.beta_schedule, config.beta_end, config.clip_sample) == (
        200, "linear", 0.1, False,
    )  # fmt: skip
    irregular = betas * torch.linspace(1, 1.5, 200)
    table = converted(content | {"betas": irregular}).scheduler.betas
    torch.testing.assert_close(table, irregular)
    with pytest.raises(ConfigError, match=r"--schedule is given, but .* holds its betas"):
        converted(content, schedule="cosine")


# ------------------------------------------------------------------------------------------------------- the command


def test_a_checkpoint_becomes_a_folder_that_loads_in_three_ways_and_goes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    network = randomize(OpenAIUNet(32, (1, 2), 1, (1,), head_width=16, outs=6)).state_dict()
    source, folder, back = tmp_path / "model000100.pt", tmp_path / "faces", tmp_path / "back.pt"
    torch.save(network, source)
    torch.save(network, tmp_path / "ema_0.9999_000100.pt")
    arguments = [
        "--image_size",
        "16",
        "--num_head_channels",
        "16",
        "--license",
        "mit",
        "--source",
        "https://example.org",
    ]
    assert main(["convert", str(source), str(folder), *arguments]) == 0
    output = capsys.readouterr()
    assert "By its training script: attention_order legacy" in output.out
    assert "ema_0.9999_000100.pt holds the EMA weights of the same step" in output.out
    assert "unlike a trained epsilon network" in caplog.text
    assert main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out.count("the same, to") == 3
    assert type(DDPMPipeline.from_pretrained(folder)) is DDPMPipeline
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card
    assert "model000100.pt, a checkpoint of openai/guided-diffusion; source: https://example.org" in card

    assert main(["convert", str(folder), str(back), "--to", "guided_diffusion"]) == 0
    state = torch.load(back, weights_only=True)
    assert state.keys() == network.keys()
    assert all(torch.equal(state[name], network[name]) for name in network)
    assert main(["convert", str(folder), str(tmp_path / "other.pt"), "--to", "pesser"]) == 2
    assert main(["convert", str(source), str(folder), *arguments]) == 2  # it exists
    assert "faces exists; give a new name" in capsys.readouterr().err


def test_classes_get_names_and_images_may_be_wider_than_high(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(randomize(OpenAIUNet(32, (1, 2), 1, (), num_classes=3)).state_dict(), "pets.pt")
    torch.save(PESSER, "unconditional.pt")
    names = ["cat", "dog", "tench, Tinca tinca"]
    Path("numbers.json").write_text(json.dumps({"2": names[2], "0": "cat", "1": "dog"}), encoding="utf-8")
    Path("names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    Path("gap.json").write_text(json.dumps({"0": "cat", "1": "dog", "3": "fish"}), encoding="utf-8")
    flags = ["--image_size", "16,24", "--num_heads", "1", "--class_names"]
    for number, given in enumerate(["numbers.json", "names.txt", 'cat, dog, "tench, Tinca tinca"']):
        assert main(["convert", "pets.pt", f"pets_{number}", *flags, given]) == 0, given
        pipeline = GaussianDiffusionPipeline.from_pretrained(f"pets_{number}")
        assert list(pipeline.config["class_names"].values()) == names, given
    image = pipeline(class_labels=["dog"], num_inference_steps=1).images[0]
    assert image.size == (24, 16)
    capsys.readouterr()
    for source, given, message in (
        ("pets.pt", "cat,dog", "--class_names has 2 names, but pets.pt has 3 classes"),
        ("pets.pt", "gap.json", "has 2 names"),
        ("pets.pt", "cat,dog,cat", "calls classes 0 and 2 'cat'"),
        ("pets.pt", "missing.txt", "does not exist"),
        ("pets_0", "a,b,c", "has names of its classes"),
        ("unconditional.pt", "cat,dog", "is an unconditional network"),
    ):
        size = flags[:2] if source != "pets_0" else []
        heads = flags[2:4] if source == "pets.pt" else []
        assert main(["convert", source, "out", *size, *heads, "--class_names", given]) == 2
        assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_nothing_is_written_for_a_file_that_cannot_be_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(PESSER, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    torch.save(PESSER, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pt").read_bytes()
    torch.save(PESSER, tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "a") as archive:
        archive.writestr("script/constants.pkl", b"")
    files = {
        "half.pt": (content[: len(content) // 2], "is incomplete"),
        "half_of_old.pt": (old[: len(old) // 2], "is damaged or incomplete"),
        "half.safetensors": (b"\x08\x00\x00\x00\x00\x00\x00\x00{}", "is not a complete safetensors file"),
        "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        "page.pt": (b"<!DOCTYPE html><html></html>", "is a web page"),
        "array.pt": (b"\x93NUMPY", "is neither a file of torch.save nor of safetensors"),
        "network.pkl": (b"\x80\x04\x95", "is a pickle of Python objects"),
        "script.pt": ((tmp_path / "script.pt").read_bytes(), "is a TorchScript program"),
    }
    for name, (data, message) in files.items():
        (tmp_path / name).write_bytes(data)
        assert main(["convert", str(tmp_path / name), str(tmp_path / "out"), "--image_size", "16"]) == 2
        assert message in capsys.readouterr().err, name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({*files, "whole.pt", "old.pt"})
    assert main(["convert", str(tmp_path / "old.pt"), str(tmp_path / "out"), "--image_size", "16"]) == 0


def test_a_checkpoint_of_train_unconditional_is_converted_with_its_ema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its EMA has further keys in config.json, and a process only if the run has finished."""
    unet = tiny_unet()
    ema = EMAModel(unet.parameters(), model_cls=UNet2DModel, model_config=unet.config)
    ema.shadow_params = [parameter + 1 for parameter in ema.shadow_params]
    for step in (2, 10):
        unet.save_pretrained(tmp_path / "run" / f"checkpoint-{step}" / "unet")
        ema.save_pretrained(tmp_path / "run" / f"checkpoint-{step}" / "unet_ema")
    arguments = ["--num_train_timesteps", "50", "--prediction_type", "sample"]
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), *arguments]) == 0
    assert "checkpoint-10/unet_ema: a network of diffusers without a process" in capsys.readouterr().out
    pipeline = GaussianDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(pipeline.unet.conv_in.weight, unet.conv_in.weight + 1)
    assert (len(pipeline.scheduler), pipeline.scheduler.config.prediction_type) == (50, "sample")
    assert "inv_gamma" not in json.loads((tmp_path / "out" / "unet" / "config.json").read_text())

    raw, process = tmp_path / "run" / "checkpoint-2", GaussianDiffusionScheduler(num_train_timesteps=20)
    process.save_pretrained(tmp_path / "run" / "scheduler")
    assert main(["convert", str(raw), str(tmp_path / "raw"), "--ema", "none"]) == 0
    pipeline = GaussianDiffusionPipeline.from_pretrained(tmp_path / "raw")
    assert torch.equal(pipeline.unet.conv_in.weight, unet.conv_in.weight)
    assert len(pipeline.scheduler) == 20


def test_a_checkpoint_of_a_run_becomes_a_pipeline_with_its_records(finished_run: Path, tmp_path: Path) -> None:
    source = finished_run / "checkpoints" / "step_00000004"
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    theirs, ours = (GaussianDiffusionPipeline.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    assert all(torch.equal(tensor, ours.unet.state_dict()[name]) for name, tensor in theirs.unet.state_dict().items())
    assert ours.config["class_names"] == theirs.config["class_names"]
    assert json.loads((tmp_path / "out" / "training_summary.json").read_text())["step"] == 4


# ----------------------------------------------------------------------------------------------------------- recipes


def lucidrains(
    prediction_type: str, *, gamma: float | None = None, betas: torch.Tensor | None = None
) -> dict[str, Any]:
    """Return what the trainer of lucidrains saves, with few layers."""
    betas = torch.linspace(0.1 / 250, 20 / 250, 250) if betas is None else betas
    alphas_cumprod = torch.cumprod(1 - betas.double(), 0)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    clipped = snr.clamp(max=gamma) if gamma else snr
    weight = clipped / {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[prediction_type]
    network = {
        "init_conv.weight": torch.zeros(32, 6, 7, 7), "final_conv.weight": torch.zeros(3, 32, 1, 1),
        "downs.0.3.1.weight": torch.zeros(64, 128, 1, 1), "downs.1.3.weight": torch.zeros(128, 64, 3, 3),
        **{f"mid_block1.block{index}.proj.weight": torch.zeros(1) for index in range(8)},
    }  # fmt: skip
    buffers = {"betas": betas.float(), "loss_weight": weight.float()}
    adam = {"state": {}, "param_groups": [{"lr": 8e-5, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0}]}
    return {"step": 1, "model": buffers | {f"model.{name}": one for name, one in network.items()}, "opt": adam}


@pytest.mark.parametrize(
    ("prediction_type", "gamma", "objective"),
    [
        ("epsilon", None, {}),
        ("sample", 5.0, {"weighting": "min_snr", "min_snr_gamma": 5.0}),
        ("v_prediction", None, {"weighting": "snr"}),
    ],
)
def test_the_recipe_of_lucidrains_is_read_from_its_checkpoint(
    prediction_type: str, gamma: float | None, objective: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(Checkpoint(Path("model.pt"), lucidrains(prediction_type, gamma=gamma)), options()))
    config = load_config(path, {"data.source": "images"})
    assert config.diffusion.prediction_type == prediction_type
    assert (config.diffusion.beta_schedule, config.diffusion.beta_end) == ("linear", 0.08)
    assert config.objective.self_conditioning == 0.5
    assert all(getattr(config.objective, name) == value for name, value in objective.items())
    assert (config.training.learning_rate, config.training.adam_beta2) == (8e-5, 0.99)
    unet = build_unet(config.model, (3, SIZE, SIZE), None, self_conditioned=True)
    assert unet.config.block_out_channels == [64, 128]


def test_the_recipe_of_a_network_builds_the_same_network(tmp_path: Path) -> None:
    conversion = converted(OPENAI, num_heads=4, num_train_timesteps=100)
    path = tmp_path / "recipe.yaml"
    torch.save(OPENAI, tmp_path / "model.pt")
    flags = ["--recipe_only", "--image_size", "16", "--num_heads", "4", "--num_train_timesteps", "100"]
    assert main(["convert", str(tmp_path / "model.pt"), str(path), *flags]) == 0
    config = load_config(path, {"data.source": "images"})
    unet = build_unet(config.model, (3, SIZE, SIZE), None, learned_variance=True)
    ours, theirs = ({k: v for k, v in one.config.items() if not k.startswith("_")} for one in (unet, conversion.unet))
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in ours.items()} == {
        k: tuple(v) if isinstance(v, list) else v for k, v in theirs.items()
    }
    scheduler = GaussianDiffusionScheduler.create(**config.diffusion.scheduler_options())
    torch.testing.assert_close(scheduler.betas, conversion.scheduler.betas)
    with pytest.raises(ConfigError, match="which has no recipe here"):
        recipe(
            Checkpoint(Path("model.pt"), {f"model.enc.{i}x{i}_conv.weight": torch.zeros(1) for i in range(9)}),
            options(),
        )


# ------------------------------------------------------------------------------------------ rescaled timesteps, later


def test_a_network_with_rescaled_timesteps_is_fine_tuned_with_its_own_number_of_timesteps() -> None:
    make, settings, _, _ = NETWORKS["improved_diffusion rescaled timesteps"]
    conversion = converted(randomize(make()), **settings)
    pretrained = Pretrained("model.from_pretrained x", conversion.unet, conversion.scheduler, None, None)
    config = {name: value for name, value in conversion.unet.config.items() if not name.startswith("_")}
    model = ModelConfig(from_pretrained="x", preset=None)
    for num_timesteps in (4000, 1000):
        unet = build_unet(
            model, (3, SIZE, SIZE), None, config, learned_variance=True, num_train_timesteps=num_timesteps
        )
        if num_timesteps == 4000:
            take_weights(unet, pretrained, conversion.scheduler, None, False)
            assert torch.equal(unet.time_proj.weight, conversion.unet.time_proj.weight)
            continue
        with pytest.raises(ConfigError, match=r"for 4000 timesteps, but diffusion\.num_train_timesteps is 1000"):
            take_weights(unet, pretrained, conversion.scheduler, None, False)


def test_schedulers_between_the_timesteps_of_a_learned_embedding_are_refused() -> None:
    from diffusers import EulerDiscreteScheduler

    make, settings, _, _ = NETWORKS["improved_diffusion rescaled timesteps"]
    conversion = converted(randomize(make()), **settings)
    pipeline = GaussianDiffusionPipeline(conversion.unet, conversion.scheduler)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler samples at timesteps between those of training"):
        pipeline(num_inference_steps=7)


# ------------------------------------------------------------------------------------------ beside the code of peers

PEERS = os.environ.get("DDPM_HF_PEERS")


def peer_module(file: str) -> Any:
    """Import a module of a checkout without its package, whose __init__ may need more libraries."""
    path = Path(str(PEERS)) / file
    for folder in (path.parent, path.parent.parent):
        package = types.ModuleType(folder.name)
        package.__path__ = [str(folder)]
        sys.modules[folder.name] = package
    specification = importlib.util.spec_from_file_location(f"{path.parent.name}.{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def peer_networks() -> dict[str, Callable[[], nn.Module]]:
    """Return the networks of NETWORKS from the code of their repositories."""

    def openai(repository: str, **settings: Any) -> Callable[[], nn.Module]:
        name = "guided_diffusion" if "guided" in repository else "improved_diffusion"
        size = {"image_size": SIZE} if "guided" in repository else {}
        common = {"in_channels": 3, "model_channels": 32, "num_res_blocks": 1, "use_scale_shift_norm": True}
        return lambda: peer_module(f"{repository}/{name}/unet.py").UNetModel(**size, **common | settings)

    guided, improved = "guided-diffusion", "improved-diffusion"
    return {
        "pesser": lambda: peer_module("pytorch_diffusion/pytorch_diffusion/model.py").Model(
            ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=2, attn_resolutions=(8,), in_channels=3, resolution=SIZE
        ),
        "ddpm_torch": lambda: peer_module("ddpm-torch/ddpm_torch/models/unet.py").UNet(
            3, 32, 3, (1, 2, 2), 1, (True, True, False)
        ),
        "guided_diffusion legacy order, learned variance": openai(
            guided, out_channels=6, attention_resolutions=(1, 2), channel_mult=(1, 2), num_head_channels=16,
            resblock_updown=True,
        ),
        "guided_diffusion new order, classes": openai(
            guided, out_channels=3, attention_resolutions=(2,), channel_mult=(1, 2), num_heads=4, num_classes=5,
            resblock_updown=True, use_new_attention_order=True,
        ),
        "improved_diffusion rescaled timesteps": openai(
            improved, out_channels=6, attention_resolutions=(2,), channel_mult=(1, 2), num_heads=4
        ),
        "improved_diffusion one head": openai(
            improved, out_channels=3, attention_resolutions=(2,), channel_mult=(1, 1, 2), use_scale_shift_norm=False
        ),
        "pytorch_ddpm": lambda: peer_module("pytorch-ddpm/model.py").UNet(50, 32, (1, 2), (0,), 1, 0.1),
        "abarankab": lambda: peer_module("DDPM/ddpm/unet.py").UNet(
            3, 32, (1, 2), 1, 128, activation=nn.functional.silu, attention_resolutions=(1,)
        ),
    }  # fmt: skip


@pytest.mark.skipif(PEERS is None, reason="DDPM_HF_PEERS names no folder with checkouts")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_of_these_tests_are_those_of_the_code_of_peers(name: str) -> None:
    make, _, labels, scale = NETWORKS[name]
    ours, theirs = randomize(make()), peer_networks()[name]().eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([3, 40]) * scale
    rest = [] if labels is None else [torch.tensor(labels)]
    with torch.no_grad():
        expected = theirs(images, timesteps, *rest)
        torch.testing.assert_close(
            ours(images, timesteps, *rest), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )
