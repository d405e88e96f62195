"""Networks are those of the papers; pretrained ones are read from every kind of folder and checked against the run."""

import json
import logging
import math
import os
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file, save_file
from torch import nn

from ddpm_hf.config import ConfigError, ModelConfig
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.models import (
    PRESETS,
    Pretrained,
    add_augmentation_embedding,
    build_unet,
    conditioned_on_augmentation,
    load_pretrained,
    read_config_file,
    take_weights,
)
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


def output_layers(unet: UNet2DModel) -> dict[str, nn.Module]:
    """Return the last layer of each residual block and attention, and of the network, found by their owners."""
    layers: dict[str, nn.Module] = {"conv_out": unet.conv_out}
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D):
            layers[f"{name}.conv2"] = module.conv2
        elif isinstance(module, Attention):
            layers[f"{name}.to_out.0"] = module.to_out[0]
    return layers


def test_the_cifar10_network_is_configured_as_published() -> None:
    """Dropout is not in the published file; the paper trains CIFAR-10 with 0.1."""
    with torch.device("meta"):
        unet = build_unet(ModelConfig(preset="ddpm_32"), (3, 32, 32), None)
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in unet.config.items()}
    assert {name: config[name] for name in CIFAR10_CONFIG} == CIFAR10_CONFIG
    assert config["dropout"] == 0.1
    assert unet.training
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    assert len(output_layers(unet)) == 1 + 22 + 6, "conv_out, 22 residual blocks and 6 attentions"


# Image shape, parameters, resolutions of attention, and number of heads. The counts of
# published networks are those of the papers' code: improved-diffusion's have 3,459 more with a learned variance
# (52,546,438; 121,063,942).
PUBLISHED = {
    "ddpm_32": ((3, 32, 32), 35_746_307, {16}, {1}),
    "ddpm_64": ((3, 64, 64), 78_700_803, {16}, {1}),
    "ddpm_128": ((3, 128, 128), 71_436_803, {16}, {1}),
    "ddpm_256": ((3, 256, 256), 113_673_219, {16}, {1}),
    "improved_32": ((3, 32, 32), 52_546_438 - 3 * (128 * 9 + 1), {16, 8}, {4}),
    "improved_64": ((3, 64, 64), 121_063_942 - 3 * (128 * 9 + 1), {16, 8}, {6, 8}),
    "digits_8": ((1, 8, 8), 701_345, {4}, {1}),
    "emoji_16": ((3, 16, 16), 1_745_539 - 10 * 128, {8}, {1}),
    "mnist_28": ((1, 28, 28), 3_691_713, {14}, {1}),
    "flowers_64": ((3, 64, 64), 20_761_923, {16}, {1}),
    "latent_64": ((4, 64, 64), 274_060_196, {32, 16, 8}, {14, 21, 28}),
    "latent_32": ((4, 32, 32), 89_537_924, {16, 8, 4}, {8, 12, 16}),
}


def test_every_preset_can_be_chosen() -> None:
    literal, _ = typing.get_args(typing.get_type_hints(ModelConfig)["preset"])
    assert set(typing.get_args(literal)) == PRESETS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_exactly_the_published_parameters_and_attention(preset: str) -> None:
    """On the meta device: the largest would need half a gigabyte."""
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
    # UNet2DModel omits the norm of the middle one with scale_shift, but the published network has it.
    assert all(isinstance(module.group_norm, nn.GroupNorm) for module in attentions)


def eighth(preset: str) -> UNet2DModel:
    """Return a preset with an eighth of its channels and the same layers."""
    channels = [number // 8 for number in PRESETS[preset]["block_out_channels"]]  # type: ignore[operator, union-attr]
    overrides: dict[str, Any] = {"block_out_channels": channels, "norm_num_groups": 4}
    if preset.startswith("improved"):
        overrides |= {"attention_head_dim": 8, "attn_norm_num_groups": 4}
    torch.manual_seed(0)
    return build_unet(ModelConfig(preset=preset, overrides=overrides), PUBLISHED[preset][0], None)  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_starts_as_the_paper_does(preset: str) -> None:
    """Weights are Glorot-uniform, output layers 1e-5 of that, biases zero, and the network outputs almost 0.

    A uniform distribution on [-b, b] has standard deviation b / sqrt(3): within 8 % for 5,000 weights.
    """
    unet = eighth(preset)
    small = output_layers(unet)
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fans = (module.weight.shape[0] + module.weight.shape[1]) * math.prod(module.weight.shape[2:])
            bound = math.sqrt(6 / fans) * (1e-5 if name in small else 1.0)
            largest = float(module.weight.detach().abs().max())
            assert 0.5 * bound < largest <= bound, name
            if module.weight.numel() > 5000:
                assert float(module.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.08), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.GroupNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
    size = min(PUBLISHED[preset][0][-1], 64)
    with torch.no_grad():
        output = unet(torch.ones(1, PUBLISHED[preset][0][0], size, size), torch.tensor([500]), return_dict=False)[0]
    assert 0 < output.abs().max() < 1e-2


def test_only_the_improved_networks_have_scale_shift() -> None:
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


def test_the_initialization_of_torch_is_an_option() -> None:
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
def test_self_conditioning_doubles_the_input_and_a_learned_variance_the_output(
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
        ({"norm_num_groups": 5}, "model.overrides do not make a UNet2DModel"),
        ({"down_block_types": ["DownBlock2D", "NoBlock"]}, "model.overrides do not make a UNet2DModel"),
        ({"act_fn": "nonsense"}, "model.overrides do not make a UNet2DModel"),
        ({"dropout": 2.0}, "model.overrides do not make a UNet2DModel"),
        ({"attention_head_dim": 1000}, "model.overrides do not make a UNet2DModel"),
    ],
)
def test_invalid_overrides_are_refused(overrides: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_unet(ModelConfig(preset="digits_8", overrides=overrides), (1, 8, 8), None)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("preset", "size", "factor"), [("ddpm_32", 28, 8), ("digits_8", 9, 2)])
def test_images_that_cannot_be_halved_are_refused(preset: str, size: int, factor: int) -> None:
    with pytest.raises(ConfigError, match=f"{size}x{size} is not a multiple of {factor}; change data.resolution"):
        build_unet(ModelConfig(preset=preset), (3, size, size), None)  # type: ignore[arg-type]


def file_config(**changes: object) -> dict[str, Any]:
    """Return a config.json of diffusers of a network for other images."""
    config = tiny_unet(10).config
    return json.loads(json.dumps(dict(config))) | changes


def from_file(config: dict[str, Any], **settings: object) -> UNet2DModel:
    return build_unet(ModelConfig(config_file="other/config.json", **settings), (3, 16, 24), None, config)  # type: ignore[arg-type]


def test_a_config_file_decides_everything_except_what_the_data_decide() -> None:
    unet = from_file(file_config(act_fn="gelu", dropout=0.3), overrides={"dropout": 0.2})
    expected = file_config(act_fn="gelu", dropout=0.2)
    expected |= {"in_channels": 3, "out_channels": 3, "sample_size": [16, 24], "num_class_embeds": None}
    found = json.loads(json.dumps(dict(unet.config)))
    assert found.pop("_use_default_values") != expected.pop("_use_default_values")
    assert found == expected


def test_missing_settings_of_a_config_file_have_the_defaults_of_diffusers() -> None:
    """Not that of a preset."""
    unet = from_file({"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4})
    for name in ("act_fn", "attention_head_dim", "flip_sin_to_cos", "freq_shift", "downsample_padding", "dropout"):
        assert unet.config[name] == UNet2DModel(block_out_channels=(8, 16, 16, 16), norm_num_groups=4).config[name]


def test_unknown_settings_of_a_config_file_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        from_file(file_config(flux_capacitor=True, _comment="hidden"))
    assert "model.config_file other/config.json has settings that UNet2DModel does not have: flux_cap" in caplog.text
    assert "_comment" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"time_embedding_type": "fourier"}, "model.config_file other/config.json has time_embedding_type fourier"),
        ({"norm_num_groups": 3}, "model.config_file other/config.json and model.overrides do not make a UNet2DModel"),
        (
            {"block_out_channels": [4] * 5, "layers_per_block": 1},
            "model.config_file other/config.json divides height and width by 16",
        ),
    ],
)
def test_an_invalid_config_file_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_file(file_config(**changes))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4}])
def test_gradient_checkpointing_does_not_change_gradients(changes: dict[str, Any]) -> None:
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
    assert calls[True] == 2 * calls[False] - 1, "all residual blocks except the first of the middle one, which never is"


def test_blocks_without_gradient_checkpointing_are_named() -> None:
    overrides = {
        "block_out_channels": [32, 32],
        "down_block_types": ["SkipDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "SkipUpBlock2D"],
    }
    with pytest.raises(ConfigError, match="not supported by SkipDownBlock2D and SkipUpBlock2D; set it to false"):
        build_unet(
            ModelConfig(preset="digits_8", overrides=overrides, gradient_checkpointing=True),  # type: ignore[arg-type]
            (3, 8, 8),
            None,
        )


# ------------------------------------------------------------------------------------------------------ pretrained

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASSES = {"0": "cat", "1": "dog"}


def network(num_class_embeds: int | None = None, seed: int = 0, **changes: Any) -> UNet2DModel:
    """Return a network whose weights are all random, unlike those of a fresh one."""
    config: dict[str, Any] = dict(tiny_unet(num_class_embeds).config) | changes
    unet = UNet2DModel.from_config({name: value for name, value in config.items() if not name.startswith("_")})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return unet


def pretrained(source: Path | str, **settings: Any) -> Pretrained:
    return load_pretrained(ModelConfig(preset=None, from_pretrained=str(source), **settings))


def refusal(source: Path | str, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        pretrained(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_weights(one: UNet2DModel, other: UNet2DModel) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our pipeline, a stock one, networks alone, and one like google/ddpm-cifar10-32.

    The files of the last one are side by side, and its attentions have the names of the first releases of diffusers.
    """
    root = tmp_path_factory.mktemp("folders")
    scheduler = GaussianDiffusionScheduler.create(beta_schedule="cosine", prediction_type="v")
    GaussianDiffusionPipeline(network(3), scheduler, class_names=CLASSES, has_null_label=True).save_pretrained(
        root / "ours"
    )
    DDPMPipeline(network(), DDPMScheduler(variance_type="fixed_large")).save_pretrained(root / "stock")
    (root / "flat").mkdir()
    for path in ("unet/config.json", f"unet/{WEIGHTS}", "scheduler/scheduler_config.json", "model_index.json"):
        shutil.copy(root / "stock" / path, root / "flat")
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = load_file(root / "flat" / WEIGHTS)
    for new_name, old_name in old_names.items():
        old = {name.replace(new_name, old_name): value for name, value in old.items()}
    save_file(old, root / "flat" / WEIGHTS)
    network().save_pretrained(root / "alone")
    network().save_pretrained(root / "half", safe_serialization=True)
    half = {name: value.half() for name, value in load_file(root / "half" / WEIGHTS).items()}
    save_file(half, root / "half" / WEIGHTS)
    DDPMPipeline(network(), DDIMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(root / "ddim")
    return root


@pytest.mark.parametrize(
    ("name", "schedule", "prediction", "class_names", "has_null_label"),
    [
        ("ours", "squaredcos_cap_v2", "v_prediction", CLASSES, True),
        ("stock", "linear", "epsilon", None, False),
        ("flat", "linear", "epsilon", None, False),
        ("ddim", "squaredcos_cap_v2", "epsilon", None, False),
    ],
)
def test_every_kind_of_pipeline_folder_is_read(
    folders: Path, name: str, schedule: str, prediction: str, class_names: object, has_null_label: bool
) -> None:
    found = pretrained(folders / name)
    assert_same_weights(found.unet, network(3 if name == "ours" else None))
    assert found.scheduler is not None
    assert found.scheduler.config["beta_schedule"] == schedule
    assert found.scheduler.config["prediction_type"] == prediction
    assert (found.class_names, found.has_null_label) == (class_names, has_null_label)


def test_a_network_alone_has_no_scheduler_or_classes(folders: Path) -> None:
    found = pretrained(folders / "alone")
    assert_same_weights(found.unet, network())
    assert (found.scheduler, found.class_names, found.has_null_label) == (None, None, None)


def test_half_precision_weights_become_float32(folders: Path) -> None:
    unet = network(seed=1)
    take_weights(unet, pretrained(folders / "half"), GaussianDiffusionScheduler.create(), None, False)
    for found, expected in zip(unet.parameters(), network().parameters(), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected.half().float())


@pytest.mark.parametrize("name", ["alone", "alone/config.json", "ours", "flat"])
def test_a_configuration_is_read_from_a_file_or_any_kind_of_folder(folders: Path, name: str) -> None:
    config = read_config_file(ModelConfig(preset=None, config_file=str(folders / name)))
    assert config["block_out_channels"] == [8, 16]
    assert config["num_class_embeds"] == (3 if name == "ours" else None)


# ----------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def cached_repository(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository in the cache of the Hub: main has a pipeline, v1 a network alone."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    repository = tmp_path / "models--someone--ddpm-tiny"
    for revision, commit, folder in (("main", "a" * 40, "stock"), ("v1", "b" * 40, "alone")):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(folders / folder, repository / "snapshots" / commit)


@pytest.mark.usefixtures("cached_repository")
def test_a_repository_of_the_hub_is_read_at_a_revision() -> None:
    assert_same_weights(pretrained("someone/ddpm-tiny").unet, network())
    assert pretrained("someone/ddpm-tiny").scheduler is not None
    assert pretrained("someone/ddpm-tiny", revision="v1").scheduler is None
    config = read_config_file(ModelConfig(preset=None, config_file="someone/ddpm-tiny", revision="v1"))
    assert config["block_out_channels"] == [8, 16]


@pytest.mark.usefixtures("cached_repository")
@pytest.mark.parametrize(
    ("source", "settings"),
    [("nobody/nothing", {}), ("nothing", {}), ("someone/ddpm-tiny", {"revision": "v9"}), ("not a name", {})],
)
def test_a_repository_that_cannot_be_downloaded_is_one_sentence(source: str, settings: dict[str, Any]) -> None:
    said = refusal(source, **settings)
    assert said.startswith(
        f"model.from_pretrained {source} is not a local folder and cannot be downloaded from the Hub ("
    )
    assert said.endswith("; check the name, the network and, for a private repository, your login.")
    with pytest.raises(ConfigError, match=f"model.config_file {source} is not a local folder and cannot be downloaded"):
        read_config_file(ModelConfig(preset=None, config_file=source, **settings))


# ------------------------------------------------------------------------------------------------- unreadable folders


def test_a_path_that_does_not_exist_is_not_downloaded(tmp_path: Path) -> None:
    for source in (str(tmp_path / "gone"), "./gone", "~/gone/gone", "a/b/c"):
        assert refusal(source).startswith(
            f"model.from_pretrained {source} does not exist; check the path (the working directory is "
        )
    with pytest.raises(ConfigError, match=r"model.config_file gone/config.json does not exist"):
        read_config_file(ModelConfig(preset=None, config_file="gone/config.json"))


def test_a_folder_without_a_network_is_refused(tmp_path: Path) -> None:
    assert f"model.from_pretrained {tmp_path} holds no pipeline" in refusal(tmp_path)


def test_a_revision_of_a_local_folder_is_refused(folders: Path) -> None:
    assert "model.revision main applies to the Hub, but" in refusal(folders / "ours", revision="main")


def test_another_kind_of_network_or_file_is_refused(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "stock", tmp_path / "copy")
    config = tmp_path / "copy" / "unet" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"_class_name": UNet2DConditionModel.__name__}))
    assert refusal(tmp_path / "copy").endswith("is a UNet2DConditionModel; give a UNet2DModel.")
    config.write_text("{")
    assert f"copy: {config} is not valid JSON (Expecting property name" in refusal(tmp_path / "copy")
    config.write_text("[]")
    assert f"copy: {config} must contain a JSON object" in refusal(tmp_path / "copy")
    assert "is a file; give the folder of a pipeline" in refusal(config)


def test_weights_must_be_complete_and_safetensors(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "stock", tmp_path / "copy")
    path = tmp_path / "copy" / "unet" / WEIGHTS
    content = load_file(path)
    first = next(iter(content))
    save_file({name: value for name, value in content.items() if name != first}, path)
    assert first in refusal(tmp_path / "copy")
    path.write_bytes(path.read_bytes()[:1000])
    assert "copy cannot be loaded (" in refusal(tmp_path / "copy")
    path.rename(path.with_suffix(".bin"))
    assert "has no weights in the safetensors format. If you trust it, load it once with" in refusal(tmp_path / "copy")


def test_a_scheduler_that_is_not_a_ddpms_is_refused(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "stock", tmp_path / "copy")
    path = tmp_path / "copy" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"beta_schedule": "exponential"}))
    assert "has a scheduler that is not a DDPM's (beta_schedule 'exponential'" in refusal(tmp_path / "copy")


# ------------------------------------------------------------------------------------------- matching and other weights


def taken(
    folders: Path,
    name: str,
    unet: UNet2DModel,
    class_names: dict[str, str] | None = None,
    has_null_label: bool = False,
    value_range: list[float] | None = None,
    **schedule: Any,
) -> UNet2DModel:
    """Take weights as a run does."""
    scheduler = GaussianDiffusionScheduler.create(**schedule)
    take_weights(unet, pretrained(folders / name), scheduler, class_names, has_null_label, value_range)
    return unet


COSINE_V = {"beta_schedule": "cosine", "prediction_type": "v"}


def test_matching_weights_are_copied_without_a_warning(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert_same_weights(taken(folders, "stock", network(seed=1)), network())
        assert_same_weights(taken(folders, "flat", network(seed=1)), network())
        assert_same_weights(taken(folders, "ours", network(3, seed=1), CLASSES, True, **COSINE_V), network(3))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "unet", "arguments", "sentence"),
    [
        ("stock", {"in_channels": 3}, {}, "takes 1 channels, but this run needs 3; set data.num_channels"),
        ("stock", {"out_channels": 2}, {}, "returns 1 channels, but this run needs 2"),
        ("stock", {"num_class_embeds": 2}, {"class_names": CLASSES}, "is unconditional, but this run needs 2; set"),
        ("ours", {}, COSINE_V, "has 3 labels, the last of them the null label, but this run needs none; set model."),
        (
            "ours",
            {"num_class_embeds": 2},
            {"class_names": CLASSES, **COSINE_V},
            "but this run needs 2; set objective.class_dropout above 0, for example to 0.1, or choose another",
        ),
        (
            "ours",
            {"num_class_embeds": 3},
            {"class_names": CLASSES | {"2": "cow"}, **COSINE_V},
            "the last of them the null label, but this run needs 3; set objective.class_dropout above 0",
        ),
        (
            "ours",
            {"num_class_embeds": 5},
            {"class_names": CLASSES | {"2": "cow", "3": "hen"}, "has_null_label": True, **COSINE_V},
            "this run needs 5 (the null label included); train on data with as many classes, or choose another",
        ),
        ("stock", {}, {"prediction_type": "v"}, "predicts epsilon, but diffusion.prediction_type is v_prediction; set"),
        ("stock", {"block_out_channels": (4, 16)}, {}, "has weights of other shapes than model.overrides ask for ("),
    ],
)
def test_a_mismatch_is_refused_with_both_values_and_the_fix(
    folders: Path, name: str, unet: dict[str, Any], arguments: dict[str, Any], sentence: str
) -> None:
    mine = network(seed=1, **unet)
    before = [parameter.detach().clone() for parameter in mine.parameters()]
    with pytest.raises(ConfigError) as caught:
        taken(folders, name, mine, **arguments)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(f"model.from_pretrained {folders / name} ")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(one, other) for one, other in zip(before, mine.parameters(), strict=True)) or (
        "other shapes" in sentence
    )


@pytest.mark.parametrize(
    ("name", "unet", "arguments", "line"),
    [
        (
            "stock",
            {},
            {"beta_schedule": "cosine"},
            "another noise schedule (linear, alpha_bar_T 4.04e-05) than that of",
        ),
        (
            "stock",
            {},
            {"beta_end": 0.03},
            "(linear, alpha_bar_T 4.04e-05) than that of diffusion (linear, alpha_bar_T",
        ),
        (
            "stock",
            {},
            {"num_train_timesteps": 500},
            "was trained with 1000 timesteps; diffusion.num_train_timesteps is 5",
        ),
        ("stock", {"sample_size": [8, 16]}, {}, "was made for images of 8x8; it is now trained on 8x16."),
        (
            "alone",
            {},
            {"prediction_type": "v"},
            "has no scheduler; its prediction type is assumed to be v_prediction.",
        ),
        (
            "ours",
            {"num_class_embeds": 3},
            {"class_names": {"0": "cat", "1": "cow"}, "has_null_label": True, **COSINE_V},
            "was trained on classes with other names",
        ),
        (
            "stock",
            {},
            {"value_range": [-1000.0, 400.0]},
            "was trained with data.value_range null, and -1 and 1 now stand for those of [-1000, 400].",
        ),
    ],
)
def test_a_difference_that_may_be_intended_is_a_warning(
    folders: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    unet: dict[str, Any],
    arguments: dict[str, Any],
    line: str,
) -> None:
    with caplog.at_level(logging.WARNING):
        mine = taken(folders, name, network(seed=1, **unet), **arguments)
    assert len(caplog.messages) == 1
    assert line in caplog.messages[0]
    assert_same_weights(mine, network(unet.get("num_class_embeds")))


# -------------------------------------------------------------------------------------------------------- augmentation


def conditioned_unet() -> UNet2DModel:
    unet = tiny_unet()
    add_augmentation_embedding(unet, 9)
    with torch.no_grad():
        unet.time_embedding.cond_proj.weight.normal_(generator=torch.Generator().manual_seed(0))
        unet.conv_out.weight.fill_(1)
    return unet


def test_parameters_of_an_augmentation_are_added_to_the_time_embedding_before_its_layers() -> None:
    """As map_augment in the code of Karras et al. 2022; parameters of 0, and none, are the network without it."""
    unet, plain = conditioned_unet(), tiny_unet()
    plain.load_state_dict(unet.state_dict())
    x, t, parameters = torch.ones(3, 1, 8, 8), torch.tensor([1, 2, 3]), torch.zeros(3, 9)
    parameters[2] = 1
    expected = plain(x, t).sample
    assert torch.equal(unet(x, t).sample, expected)
    with conditioned_on_augmentation(unet, parameters):
        found = unet(x, t).sample
    assert torch.equal(found[:2], expected[:2])
    shift = unet.time_embedding.cond_proj.weight.sum(dim=1)
    plain.time_embedding.register_forward_pre_hook(lambda _, inputs: (inputs[0] + shift,))
    shifted = plain(x, t).sample
    torch.testing.assert_close(found[2], shifted[2])
    assert not torch.equal(shifted[2], expected[2])
    assert torch.equal(unet(x, t).sample, expected)  # outside the context


def test_a_network_is_saved_without_the_embedding_of_an_augmentation(tmp_path: Path) -> None:
    unet = conditioned_unet()
    unet.save_pretrained(tmp_path)
    _, loading = UNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == tiny_unet().state_dict().keys()


def test_a_compiled_network_is_conditioned_without_compiling_it_for_every_batch() -> None:
    """Only the part that is conditioned, because compiling a whole network takes seconds."""
    unet, num_graphs = conditioned_unet(), 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    embed_time = torch.compile(lambda features: unet.time_embedding(features), fullgraph=True, backend=backend)
    features = torch.ones(2, unet.time_embedding.linear_1.in_features)
    for parameters in (torch.ones(2, 9), torch.zeros(2, 9), None, torch.full((2, 9), 3.0), None):
        with conditioned_on_augmentation(unet, parameters), torch.no_grad():
            torch.testing.assert_close(embed_time(features), unet.time_embedding(features))
    assert num_graphs == 2
