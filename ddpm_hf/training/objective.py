"""The training loss as a callable object: noising, target and distance, in float32 outside autocast."""

from typing import Protocol

import torch
import torch.nn.functional as F

from ddpm_hf.diffusion import GaussianDiffusionScheduler


class Denoiser(Protocol):
    """A network (x_t, t, class_labels) -> (prediction,), as UNet2DModel is with return_dict=False."""

    def __call__(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None, *, return_dict: bool
    ) -> tuple[torch.Tensor, ...]:
        """Predicts epsilon, x_0 or v for each sample."""
        ...


_DISTANCES = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}


class DenoisingLoss:
    """L_simple and its relatives (Ho et al. 2020, Eq. 14; v: Salimans & Ho 2022, Appendix D).

    Args:
        scheduler: The forward process and the prediction type.
        loss: "mse", "l1" or "huber".
        null_label: The label that stands for "no label"; None for a network without one.
    """

    def __init__(self, scheduler: GaussianDiffusionScheduler, loss: str = "mse", null_label: int | None = None) -> None:
        self._scheduler = scheduler
        self._distance = _DISTANCES[loss]
        self._null_label = null_label

    def __call__(
        self,
        model: Denoiser,
        x_0: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        dropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the loss of each sample.

        Args:
            model: The network; it alone may run under autocast.
            x_0: float32 images in [-1, 1], (batch, channels, height, width).
            noise: float32 standard normal noise of the same shape.
            timesteps: int64 (batch,) in [0, T).
            class_labels: int64 (batch,), or None for an unconditional network.
            dropped: bool (batch,), samples whose label is replaced by the null label.

        Returns:
            float32 losses (batch,), each a mean over the pixels.
        """
        if dropped is not None and class_labels is not None:
            assert self._null_label is not None, "only a network with a null label has labels to drop"
            class_labels = class_labels.masked_fill(dropped, self._null_label)
        x_t = self._scheduler.add_noise(x_0, noise, timesteps)
        prediction = model(x_t, timesteps, class_labels, return_dict=False)[0].to(torch.float32)
        target = self._target(x_0, noise, timesteps)
        return self._distance(prediction, target, reduction="none").flatten(1).mean(dim=1)

    def _target(self, x_0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Returns what the network should have predicted."""
        match self._scheduler.config.prediction_type:
            case "epsilon":
                return noise
            case "sample":
                return x_0
            case _:
                return self._scheduler.get_velocity(x_0, noise, timesteps)
