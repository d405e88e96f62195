"""The networks are those of the papers: their configuration, their size, and how they start."""

import json
import logging
import math
import typing
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ddpm_hf.config import ConfigError, ModelConfig
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.models import PRESETS, build_unet
from ddpm_hf.training.loss import DenoisingLoss
from tests.conftest import tiny_unet

# google/ddpm-cifar10-32, unet/config.json, as published.
CIFAR10_CONFIG = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


@pytest.fixture(scope="module")
def cifar10_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return build_unet(ModelConfig(preset="ddpm_32"), (3, 32, 32), None)


def output_layers(unet: UNet2DModel) -> dict[str, nn.Module]:
    """Returns the last layer of each residual block and attention, and of the network, found by their owners."""
    layers: dict[str, nn.Module] = {"conv_out": unet.conv_out}
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D):
            layers[f"{name}.conv2"] = module.conv2
        elif isinstance(module, Attention):
            layers[f"{name}.to_out.0"] = module.to_out[0]
    return layers


def test_the_cifar10_network_has_exactly_the_papers_parameters(cifar10_unet: UNet2DModel) -> None:
    assert sum(parameter.numel() for parameter in cifar10_unet.parameters()) == 35_746_307


def test_the_cifar10_network_is_configured_as_published(cifar10_unet: UNet2DModel) -> None:
    """Dropout is no part of the published file; the paper trains CIFAR-10 with 0.1."""
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in cifar10_unet.config.items()}
    assert {name: config[name] for name in CIFAR10_CONFIG} == CIFAR10_CONFIG
    assert config["dropout"] == 0.1
    assert cifar10_unet.training
    assert {parameter.dtype for parameter in cifar10_unet.parameters()} == {torch.float32}


def test_every_output_layer_starts_at_zero_and_every_other_is_glorot_uniform(cifar10_unet: UNet2DModel) -> None:
    """A uniform distribution on [-b, b] has standard deviation b / sqrt(3): within 5 % for layers of 10,000 weights."""
    small = output_layers(cifar10_unet)
    assert len(small) == 1 + 22 + 6, "22 residual blocks, 6 attentions and conv_out"
    for name, module in cifar10_unet.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        weight = module.weight.detach()
        receptive = math.prod(weight.shape[2:])
        bound = math.sqrt(6 / ((weight.shape[0] + weight.shape[1]) * receptive)) * (1e-5 if name in small else 1.0)
        assert weight.abs().max() <= bound, name
        if weight.numel() > 10_000:
            assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05), name
        assert module.bias is None or not module.bias.any(), name
    for name, module in cifar10_unet.named_modules():
        if isinstance(module, nn.GroupNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name


def test_a_fresh_cifar10_network_outputs_nothing(cifar10_unet: UNet2DModel) -> None:
    """The last layer has weights of 1e-5 over some 1,000 inputs of order 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = cifar10_unet(torch.randn(1, 3, 32, 32), torch.tensor([500]), return_dict=False)[0]
    assert 0 < output.abs().max() < 1e-3


# The images that each is made for, its parameters, where its attention works, and with how many heads. The counts of
# published networks are those of the papers' code: improved-diffusion's have 3,459 more with a learned variance
# (52,546,438; 121,063,942).
PUBLISHED = {
    "ddpm_32": ((3, 32, 32), 35_746_307, {16}, {1}),
    "ddpm_64": ((3, 64, 64), 78_700_803, {16}, {1}),
    "ddpm_256": ((3, 256, 256), 113_673_219, {16}, {1}),
    "improved_32": ((3, 32, 32), 52_546_438 - 3 * (128 * 9 + 1), {16, 8}, {4}),
    "improved_64": ((3, 64, 64), 121_063_942 - 3 * (128 * 9 + 1), {16, 8}, {6, 8}),
    "digits_8": ((1, 8, 8), 701_345, {4}, {1}),
    "mnist_28": ((1, 28, 28), 3_691_713, {14}, {1}),
    "flowers_64": ((3, 64, 64), 20_761_923, {16}, {1}),
}


def test_every_preset_can_be_chosen() -> None:
    literal, _ = typing.get_args(typing.get_type_hints(ModelConfig)["preset"])
    assert set(typing.get_args(literal)) == PRESETS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_exactly_the_published_parameters_and_attention(preset: str) -> None:
    """Shapes without numbers: the largest would need half a gigabyte."""
    shape, num_parameters, attention, heads = PUBLISHED[preset]
    sizes = {"down": set(), "up": set(), "mid": set()}  # type: dict[str, set[int]]
    with torch.device("meta"):
        unet = build_unet(ModelConfig(preset=preset), shape, None)  # type: ignore[arg-type]
        for name, module in unet.named_modules():
            if isinstance(module, Attention):
                part = name.split("_")[0]
                module.register_forward_pre_hook(lambda _, args, part=part: sizes[part].add(args[0].shape[-1]))
        output = unet(torch.empty(1, *shape), torch.zeros(1, dtype=torch.int64), return_dict=False)[0]
    assert output.shape == (1, *shape)
    assert sum(parameter.numel() for parameter in unet.parameters()) == num_parameters
    lowest = shape[-1] // 2 ** (len(unet.config["block_out_channels"]) - 1)
    assert sizes == {"down": attention, "up": attention, "mid": {lowest}}
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    assert {module.heads for module in attentions} == heads
    # UNet2DModel leaves out the norm of the middle one with scale_shift, which the published network has.
    assert all(isinstance(module.group_norm, nn.GroupNorm) for module in attentions)


def eighth(preset: str) -> UNet2DModel:
    """Returns a preset with an eighth of its channels, which has the same layers at the same places."""
    channels = [number // 8 for number in PRESETS[preset]["block_out_channels"]]  # type: ignore[operator, union-attr]
    overrides: dict[str, Any] = {"block_out_channels": channels, "norm_num_groups": 4}
    if preset.startswith("improved"):
        overrides |= {"attention_head_dim": 8, "attn_norm_num_groups": 4}
    torch.manual_seed(0)
    return build_unet(ModelConfig(preset=preset, overrides=overrides), PUBLISHED[preset][0], None)  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_starts_as_the_paper_does(preset: str) -> None:
    """The last layers are 1e-5 of the others, all biases are zero, and the network outputs nothing."""
    unet = eighth(preset)
    small = output_layers(unet)
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fans = (module.weight.shape[0] + module.weight.shape[1]) * math.prod(module.weight.shape[2:])
            bound = math.sqrt(6 / fans) * (1e-5 if name in small else 1.0)
            largest = float(module.weight.detach().abs().max())
            assert 0.5 * bound < largest <= bound, name
            assert module.bias is None or not module.bias.any(), name
    size = min(PUBLISHED[preset][0][-1], 64)
    with torch.no_grad():
        output = unet(torch.ones(1, PUBLISHED[preset][0][0], size, size), torch.tensor([500]), return_dict=False)[0]
    assert 0 < output.abs().max() < 1e-2


def test_the_timestep_scales_and_shifts_in_the_improved_networks_only() -> None:
    for preset in PRESETS:
        expected = "scale_shift" if preset.startswith("improved") else "default"
        assert PRESETS[preset].get("resnet_time_scale_shift", "default") == expected
    blocks = [module for module in eighth("improved_32").modules() if isinstance(module, ResnetBlock2D)]
    assert {block.time_embedding_norm for block in blocks} == {"scale_shift"}


@pytest.mark.parametrize("num_class_embeds", [None, 10])
def test_the_epsilon_loss_starts_at_one(num_class_embeds: int | None) -> None:
    """The loss of a network that outputs 0 is the mean of 16,384 squared normals: 1 with a deviation of 0.011."""
    generator = torch.Generator().manual_seed(0)
    unet = tiny_unet(num_class_embeds)
    noise = torch.randn(256, 1, 8, 8, generator=generator)
    x_0 = torch.rand(256, 1, 8, 8, generator=generator) * 2 - 1
    timesteps = torch.randint(0, 1000, (256,), generator=generator)
    labels = torch.arange(256) % 10 if num_class_embeds else None
    loss = DenoisingLoss(GaussianDiffusionScheduler.create())
    with torch.no_grad():
        losses = loss(unet, x_0, noise, timesteps, labels)
    assert float(losses.mean()) == pytest.approx(1.0, abs=4 * 0.011)
    assert float(losses.mean()) == pytest.approx(float(noise.square().mean()), abs=1e-3)


def test_torchs_own_initialisation_is_a_choice() -> None:
    torch.manual_seed(0)
    unet = build_unet(ModelConfig(preset="digits_8", initialization="torch"), (1, 8, 8), None)
    torch.manual_seed(0)
    reference = UNet2DModel.from_config(unet.config)  # and nothing else has drawn from the generator
    assert all(torch.equal(one, other) for one, other in zip(unet.parameters(), reference.parameters(), strict=True))
    assert unet.conv_out.weight.abs().max() > 1e-2


def test_a_network_is_a_function_of_the_seed() -> None:
    one, other = tiny_unet().state_dict(), tiny_unet().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("shape", "sample_size"), [((1, 8, 8), 8), ((3, 16, 16), 16), ((4, 8, 24), [8, 24]), ((1, 2, 2), 2)]
)
def test_the_network_fits_the_images(shape: tuple[int, int, int], sample_size: int | list[int]) -> None:
    unet = build_unet(ModelConfig(preset="digits_8"), shape, 11)
    assert unet.config["sample_size"] == sample_size
    assert unet.class_embedding is not None
    assert unet.class_embedding.num_embeddings == 11
    output = unet(torch.zeros(2, *shape), torch.tensor([0, 999]), torch.tensor([0, 10]), return_dict=False)[0]
    assert output.shape == (2, *shape)


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("self_conditioned", [False, True])
def test_feedback_doubles_what_goes_in_and_a_variance_what_comes_out(
    self_conditioned: bool, learned_variance: bool
) -> None:
    unet = build_unet(
        ModelConfig(preset="digits_8"),
        (3, 8, 8),
        None,
        self_conditioned=self_conditioned,
        learned_variance=learned_variance,
    )
    images = torch.zeros(2, 6 if self_conditioned else 3, 8, 8)
    assert unet(images, torch.tensor([0, 999]), return_dict=False)[0].shape == (2, 6 if learned_variance else 3, 8, 8)
    pipeline = GaussianDiffusionPipeline(unet, GaussianDiffusionScheduler.create(), self_conditioned=self_conditioned)
    assert pipeline.num_channels == 3


def test_overrides_replace_the_preset() -> None:
    unet = tiny_unet(dropout=0.3, act_fn="gelu")
    assert (unet.config["dropout"], unet.config["act_fn"]) == (0.3, "gelu")
    assert list(unet.config["block_out_channels"]) == [8, 16]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"dropuot": 0.1}, "model.overrides.dropuot is not a setting of UNet2DModel; it has act_fn"),
        ({"self": 1}, "model.overrides.self is not a setting"),
        ({"in_channels": 3}, "model.overrides.in_channels is decided by the data"),
        ({"num_class_embeds": 3}, "model.overrides.num_class_embeds is decided by the data"),
        ({"sample_size": 3}, "model.overrides.sample_size is decided by the data"),
        ({"block_out_channels": [8, 16, 32]}, "model.overrides do not make a UNet2DModel"),
        ({"block_out_channels": 8}, "model.overrides do not make a UNet2DModel"),
        ({"block_out_channels": []}, "model.overrides do not make a UNet2DModel"),
        ({"norm_num_groups": 0}, "model.overrides do not make a UNet2DModel"),
        ({"norm_num_groups": 5}, "model.overrides do not make a UNet2DModel"),
        ({"down_block_types": ["DownBlock2D", "NoBlock"]}, "model.overrides do not make a UNet2DModel"),
        ({"act_fn": "nonsense"}, "model.overrides do not make a UNet2DModel"),
        ({"dropout": 2.0}, "model.overrides do not make a UNet2DModel"),
        ({"attention_head_dim": 0}, "model.overrides do not make a UNet2DModel"),
        ({"attention_head_dim": 1000}, "model.overrides do not make a UNet2DModel"),
        ({"layers_per_block": 0}, "model.overrides do not make a UNet2DModel"),
        ({"norm_eps": "small"}, "model.overrides do not make a UNet2DModel"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_overrides_that_make_no_network_are_refused(overrides: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_unet(ModelConfig(preset="digits_8", overrides=overrides), (1, 8, 8), None)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("preset", "size", "factor"), [("ddpm_32", 28, 8), ("digits_8", 9, 2)])
def test_images_that_cannot_be_halved_are_refused(preset: str, size: int, factor: int) -> None:
    with pytest.raises(ConfigError, match=f"{size}x{size} is not a multiple of {factor}; set data.resolution"):
        build_unet(ModelConfig(preset=preset), (3, size, size), None)  # type: ignore[arg-type]


def file_config(**changes: object) -> dict[str, Any]:
    """Returns a config.json as diffusers writes it, of a network for other images."""
    config = tiny_unet(10).config
    return json.loads(json.dumps(dict(config))) | changes


def from_file(config: dict[str, Any], **settings: object) -> UNet2DModel:
    return build_unet(ModelConfig(config_file="other/config.json", **settings), (3, 16, 24), None, config)  # type: ignore[arg-type]


def test_a_file_decides_all_but_what_the_data_decide() -> None:
    unet = from_file(file_config(act_fn="gelu", dropout=0.3), overrides={"dropout": 0.2})
    expected = file_config(act_fn="gelu", dropout=0.2)
    expected |= {"in_channels": 3, "out_channels": 3, "sample_size": [16, 24], "num_class_embeds": None}
    found = json.loads(json.dumps(dict(unet.config)))
    assert found.pop("_use_default_values") != expected.pop("_use_default_values")
    assert found == expected


def test_what_a_file_leaves_out_has_the_default_of_diffusers() -> None:
    """Not that of a preset."""
    unet = from_file({"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4})
    for name in ("act_fn", "attention_head_dim", "flip_sin_to_cos", "freq_shift", "downsample_padding", "dropout"):
        assert unet.config[name] == UNet2DModel(block_out_channels=(8, 16, 16, 16), norm_num_groups=4).config[name]


def test_settings_of_a_newer_file_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        from_file(file_config(flux_capacitor=True, _comment="hidden"))
    assert "model.config_file other/config.json has settings that UNet2DModel does not know: flux_cap" in caplog.text
    assert "_comment" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"time_embedding_type": "fourier"}, "model.config_file other/config.json divides by the timestep"),
        ({"norm_num_groups": 3}, "model.config_file other/config.json and model.overrides do not make a UNet2DModel"),
        ({"block_out_channels": [4] * 5, "layers_per_block": 1}, "model.config_file other/config.json halves images 4"),
    ],
)
def test_a_file_that_makes_no_network_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_file(file_config(**changes))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4}])
def test_gradient_checkpointing_changes_no_gradient(changes: dict[str, Any]) -> None:
    """Bit for bit, dropout included: the backward pass draws the same masks again."""
    overrides = {"block_out_channels": [8, 16, 32], "norm_num_groups": 4, "dropout": 0.3, **changes}
    gradients, calls = {}, {False: 0, True: 0}
    for is_checkpointing in (False, True):
        config = ModelConfig(preset="mnist_28", overrides=overrides, gradient_checkpointing=is_checkpointing)
        torch.manual_seed(0)
        unet = build_unet(config, (1, 28, 28), None)

        def count(*_: object, key: bool = is_checkpointing) -> None:
            calls[key] += 1

        for module in unet.modules():
            if isinstance(module, ResnetBlock2D):
                module.register_forward_pre_hook(count)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        images = torch.randn(2, 1, 28, 28)
        unet(images, torch.tensor([3, 700]), return_dict=False)[0].square().sum().backward()
        gradients[is_checkpointing] = [parameter.grad for parameter in unet.parameters()]
    for one, other in zip(gradients[False], gradients[True], strict=True):
        assert one is not None
        assert one.any()
        assert torch.equal(one, other)
    assert calls[True] == 2 * calls[False] - 1, "all residual blocks but the first of the middle, which never is"


def test_blocks_that_cannot_checkpoint_are_named() -> None:
    overrides = {
        "block_out_channels": [32, 32],
        "down_block_types": ["SkipDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "SkipUpBlock2D"],
    }
    with pytest.raises(ConfigError, match="does nothing for SkipDownBlock2D and SkipUpBlock2D; choose other blocks"):
        build_unet(
            ModelConfig(preset="digits_8", overrides=overrides, gradient_checkpointing=True),  # type: ignore[arg-type]
            (3, 8, 8),
            None,
        )
