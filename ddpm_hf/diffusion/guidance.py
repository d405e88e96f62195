"""Guidance: the steps at which it is on, and a second network as the guide (autoguidance)."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .images import image_size
from .schedule import real_number

WHOLE_INTERVAL = (0.0, 1.0)


def check_interval(interval: object) -> tuple[float, float]:
    """Return (start, stop), the fractions of the denoising steps between which guidance is on.

    Raises:
        ValueError: If it is not two numbers from 0 to 1 in ascending order.
    """
    values = interval.tolist() if isinstance(interval, np.ndarray | torch.Tensor) else interval
    given = list(values) if isinstance(values, Iterable) and not isinstance(values, str | dict | set) else []
    try:
        start, stop = (real_number("guidance_interval", value, 0, 1) for value in given)
    except ValueError:
        raise ValueError(
            f"guidance_interval is {interval!r}; it must be (start, stop), two fractions of the steps from 0 to 1."
        ) from None
    if start >= stop:
        raise ValueError(f"guidance_interval is {interval!r}; it must start before it stops.")
    return start, stop


def guided_steps(interval: tuple[float, float], timesteps: torch.Tensor) -> list[bool]:
    """Return for each of a scheduler's timesteps whether it is guided.

    Step i of n is guided if int(start n) <= i < int(stop n), as by the guiders of diffusers. A scheduler that evaluates
    the network twice at a timestep counts it once.
    """
    if interval == WHOLE_INTERVAL:
        return [True] * len(timesteps)
    steps = timesteps.tolist()
    distinct = list(dict.fromkeys(steps))
    start, stop = (int(fraction * len(distinct)) for fraction in interval)
    if start == stop:
        warn(f"guidance_interval {interval} holds none of the {len(distinct)} steps, so guidance has no effect.")
    guided = set(distinct[start:stop])
    return [step in guided for step in steps]


def warn(message: str) -> None:
    """Warn of arguments without effect."""
    warnings.warn(message, UserWarning, stacklevel=2)


@dataclass(frozen=True)
class Guide:
    """A second network whose predictions are guided away from. Karras et al. 2024.

    Attributes:
        unet: The network.
        dtype: Dtype of its inputs.
        labels: int64 (batch,); None for an unconditional network.
        self_conditioned: Whether it takes the last predicted x_0 as further channels.
    """

    unet: Any
    dtype: torch.dtype
    labels: torch.Tensor | None
    self_conditioned: bool

    def predict(self, x: torch.Tensor, x_0: torch.Tensor | None, t: torch.Tensor) -> torch.Tensor:
        """Return its prediction at x, without variance channels, in the dtype of x."""
        network_input = with_self_conditioning(x, x_0) if self.self_conditioned else x
        output: torch.Tensor = self.unet(network_input.to(self.dtype), t, class_labels=self.labels, return_dict=False)[
            0
        ]
        return output[:, : x.shape[1]].to(x.dtype)


def with_self_conditioning(x: torch.Tensor, x_0: torch.Tensor | None) -> torch.Tensor:
    """Append the last predicted x_0, or zeros before the first step, to the channels."""
    return torch.cat([x, torch.zeros_like(x) if x_0 is None else x_0], dim=1)


def make_guide(pipeline: Any, guide: Any, labels: list[int] | None) -> Guide:
    """Return the guide of a call.

    Args:
        pipeline: The pipeline that is guided.
        guide: A pipeline of a network for the same images.
        labels: One for each image; None for an unconditional network.

    Raises:
        ValueError: If the guide is no pipeline, was trained for other images, classes or noise levels, or is on another
            device.
    """
    if not (hasattr(guide, "unet") and hasattr(guide, "scheduler")):
        raise ValueError(f"guide is a {type(guide).__name__}; pass a pipeline, or the folder of one.")
    config, remedy = guide.unet.config, "pass a worse version of the model itself, such as an earlier checkpoint."
    is_self_conditioned = bool(guide.config.get("self_conditioned"))
    kinds = [
        pipeline.sample_shape,
        (int(config.in_channels) // (1 + is_self_conditioned), *image_size(guide.unet)),
    ]
    if kinds[0] != kinds[1]:
        ours, theirs = ("x".join(map(str, kind)) for kind in kinds)
        raise ValueError(f"guide makes images of {theirs}, but the model of {ours}; {remedy}")
    if pipeline.vae is not None and getattr(guide, "vae", None) is not None:
        for ours, theirs in zip(pipeline.latent_statistics, guide.latent_statistics, strict=True):
            if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
                raise ValueError(f"guide was trained on latents of another scale than the model; {remedy}")
    num_labels = int(config.num_class_embeds or 0)
    num_classes = num_labels - bool(guide.config.get("has_null_label"))
    names = [each.config.get("class_names") for each in (pipeline, guide)]
    if num_classes and num_classes != pipeline.num_classes:
        raise ValueError(f"guide has {num_classes} classes, but the model {pipeline.num_classes}; {remedy}")
    if num_classes and all(names) and names[0] != names[1]:
        number = next(number for number in names[0] if names[0][number] != names[1].get(number))
        raise ValueError(
            f"guide was trained on other classes: class {number} is {names[1].get(number)!r} there and"
            f" {names[0][number]!r} in the model; {remedy}"
        )
    if num_classes and max(labels or [0]) >= num_labels:
        raise ValueError(f"class_labels has {max(labels or [0])}, no class, but the guide has no null label; {remedy}")
    schedulers = pipeline.scheduler, guide.scheduler
    types = [each.config.get("prediction_type") for each in schedulers]
    if types[0] != types[1]:
        raise ValueError(f"guide has prediction_type {types[1]}, but the model {types[0]}; {remedy}")
    alpha_bars = [torch.as_tensor(each.alphas_cumprod).double().cpu() for each in schedulers]
    if alpha_bars[0].shape != alpha_bars[1].shape or (alpha_bars[0] - alpha_bars[1]).abs().max() > 1e-3:
        raise ValueError(f"guide was trained on other noise levels than the model; {remedy}")
    devices = [each._execution_device for each in (pipeline, guide)]
    if devices[0] != devices[1]:
        raise ValueError(f"guide is on {devices[1]}, but the model on {devices[0]}; move it with guide.to(...).")
    return Guide(
        unet=guide.unet,
        dtype=guide.unet.dtype,
        labels=torch.tensor(labels, device=devices[0]) if num_classes else None,
        self_conditioned=is_self_conditioned,
    )
