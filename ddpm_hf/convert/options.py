"""What the shapes of a checkpoint do not tell, as flags and as arguments. Needs no torch."""

import dataclasses
import math
from argparse import ArgumentTypeError
from dataclasses import dataclass
from typing import Any, Literal

from ddpm_hf.config import ConfigError


def _image_size(text: str) -> int | list[int]:
    """Parse one side, or height and width separated by a comma."""
    try:
        sides = [int(side) for side in text.strip("[]()").split(",")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise ArgumentTypeError(f"{text!r} is neither a number nor HEIGHT,WIDTH")
    return sides if len(sides) == 2 else sides[0]


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """What the shapes of a checkpoint do not tell.

    Args:
        family: System that wrote the checkpoint; by default recognized by the names of its parameters. The defaults of
            the following settings are those of the published network with the same layers, or of the system's training
            script.
        ema: EMA weights to take, by their place in the file, or none for the weights without EMA; by default the only
            EMA weights, or the only weights.
        image_size: Size of the images that the network was trained on, one side or height,width; no default for own
            networks.
        num_heads: Number of attention heads, as in the training command; no default for own networks.
        num_head_channels: Channels of an attention head, as in the training command; replaces num_heads.
        attention_order: Order of the rows of joint attention projections: new for networks that were trained with
            --use_new_attention_order True, else legacy.
        num_train_timesteps: Number of diffusion timesteps.
        schedule: Noise schedule, as diffusion.beta_schedule.
        beta_start: First beta of a linear schedule.
        beta_end: Last beta of a linear schedule.
        prediction_type: What the network predicts.
        variance_type: Variance of the reverse process; learned_range if the network predicts it.
        rescale_timesteps: Whether the network was given timesteps scaled to 0 ... 1000, as with --rescale_timesteps
            True.
        activation: Activation function of networks of abarankab; UNet2DModel can express silu only.
    """

    family: (
        Literal["pesser", "ddpm_torch", "improved_diffusion", "guided_diffusion", "abarankab", "pytorch_ddpm"] | None
    ) = None
    ema: str | None = None
    image_size: int | list[int] | None = dataclasses.field(
        default=None, metadata={"minimum": 1, "maximum": math.inf, "parse": _image_size, "metavar": "SIZE"}
    )
    num_heads: int | None = None
    num_head_channels: int | None = None
    attention_order: Literal["legacy", "new"] | None = None
    num_train_timesteps: int | None = None
    schedule: (
        Literal["linear", "cosine", "scaled_linear", "sigmoid_alpha_bar", "warmup10", "warmup50", "const", "jsd"] | None
    ) = None
    beta_start: float | None = None
    beta_end: float | None = None
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    variance_type: Literal["fixed_small", "fixed_large", "learned_range", "learned"] | None = None
    rescale_timesteps: Literal["true", "false"] | None = None
    activation: Literal["silu", "relu", "mish"] | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "num_heads", "num_head_channels", "num_train_timesteps"):
            value = getattr(self, name)
            if value is not None and min(value if isinstance(value, list) else [value]) < 1:
                raise ConfigError(f"--{name} is {value}, but must be at least 1.")

    def given(self) -> dict[str, Any]:
        """Return the settings of the network and its process that were given."""
        values = dataclasses.asdict(self)
        del values["family"], values["ema"]
        if self.rescale_timesteps is not None:
            values["rescale_timesteps"] = self.rescale_timesteps == "true"
        return {name: value for name, value in values.items() if value is not None}
