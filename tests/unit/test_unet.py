"""The networks are the paper's: their configuration, their size, and how they start."""

import math

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ddpm_hf.config import ConfigError, ModelConfig
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.training.objective import DenoisingLoss
from ddpm_hf.unet import build_unet
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
