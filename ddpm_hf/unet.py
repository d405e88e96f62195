"""UNet2DModel presets and the paper's initialisation; no layers of our own."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn

from ddpm_hf.config import ConfigError, ModelConfig, UNetOverride

# What every network of Ho et al. 2020 shares. One attention head of full width, sine before cosine, TF's "SAME"
# padding: none of it changes the parameter count, all of it changes the function.
_PAPER: dict[str, UNetOverride] = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
}

PRESETS: dict[str, dict[str, UNetOverride]] = {
    # Ho et al. 2020, appendix B, CIFAR-10: 35,746,307 parameters, attention at 16x16.
    "ddpm_32": {
        **_PAPER,
        "block_out_channels": [128, 256, 256, 256],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "dropout": 0.1,
    },
    # The same design for 8x8 digits on a laptop: 0.7 M parameters, attention at 4x4.
    "digits_8": {
        **_PAPER,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 8,
        "dropout": 0.0,
    },
}

# Decided by the data, the diffusion process and model.class_conditional.
_DERIVED = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "class_embed_type", "num_train_timesteps")


def build_unet(
    config: ModelConfig,
    image_shape: tuple[int, int, int],
    num_class_embeds: int | None,
    *,
    self_conditioned: bool = False,
    learned_variance: bool = False,
) -> UNet2DModel:
    """Builds and initialises the network from torch's global generator.

    Args:
        config: The preset and what replaces parts of it.
        image_shape: Channels, height and width of the images.
        num_class_embeds: Number of labels the network knows, the null label included; None for an unconditional one.
        self_conditioned: Whether a prediction of x_0 comes in beside x_t, which doubles in_channels.
        learned_variance: Whether a variance goes out beside the prediction, which doubles out_channels.

    Returns:
        The network in training mode, float32, on the CPU.

    Raises:
        ConfigError: If an override is unknown or the network cannot be built for these images.
    """
    channels, height, width = image_shape
    _check_overrides(config.overrides)
    settings: dict[str, Any] = PRESETS[config.preset] | config.overrides
    blocks = settings["block_out_channels"]
    factor = 2 ** (len(blocks) - 1) if isinstance(blocks, list) else 1
    if height % factor or width % factor:
        raise ConfigError(
            f"model.preset {config.preset} halves images {factor.bit_length() - 1} times, but {height}x{width} is not "
            f"a multiple of {factor}; set data.resolution to one, or choose fewer block_out_channels in "
            "model.overrides."
        )
    settings |= {
        "sample_size": height if height == width else [height, width],
        "in_channels": channels * (1 + self_conditioned),
        "out_channels": channels * (1 + learned_variance),
        "num_class_embeds": num_class_embeds,
    }
    try:
        _rehearse(settings, image_shape)
        unet = UNet2DModel(**settings)
    except Exception as error:  # diffusers raises many types for settings that do not fit together
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.overrides do not make a UNet2DModel ({type(error).__name__}: {reason}).") from error
    if config.initialization == "paper":
        initialize_as_paper(unet)
    return unet


def _rehearse(settings: dict[str, Any], image_shape: tuple[int, int, int]) -> None:
    """Sends shapes without numbers through the network: some settings fail only there."""
    with torch.device("meta"):
        images = torch.empty(1, settings["in_channels"], *image_shape[1:])
        zeros = torch.zeros(1, dtype=torch.int64)
        labels = None if settings["num_class_embeds"] is None else zeros
        output = UNet2DModel(**settings)(images, zeros, labels, return_dict=False)[0]
    if output.shape[2:] != images.shape[2:]:
        raise ValueError(f"images of {tuple(images.shape[2:])} come out as {tuple(output.shape[2:])}")


def _check_overrides(overrides: Mapping[str, UNetOverride]) -> None:
    """Refuses names that UNet2DModel does not know or that are decided elsewhere."""
    known = set(inspect.signature(UNet2DModel.__init__).parameters) - {"self", *_DERIVED}
    for name in overrides:
        if name in _DERIVED:
            raise ConfigError(f"model.overrides.{name} is decided by the data and model.class_conditional; remove it.")
        if name not in known:
            raise ConfigError(
                f"model.overrides.{name} is not a setting of UNet2DModel; it has {', '.join(sorted(known))}."
            )


@torch.no_grad()
def initialize_as_paper(unet: UNet2DModel) -> None:
    """Initialises as the paper's code does (Ho et al. 2020).

    Glorot-uniform weights and zero biases everywhere, except that the last layer of each residual block, each
    attention's output and the network's output start at scale 1e-10: a fresh network outputs 0, and the epsilon loss
    starts at 1.000.
    """
    for name, module in unet.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            is_output = name.endswith(("conv2", "to_out.0", "conv_out"))
            # The paper's code scales the variance, so the standard deviation by the square root.
            nn.init.xavier_uniform_(module.weight, gain=1e-10**0.5 if is_output else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
