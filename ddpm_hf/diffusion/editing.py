"""Editing given images: denoise from them, interpolate, inpaint, encode.

A list of n timesteps has n + 1 noise levels: level k is the state before step k, at the k-th timestep, and level n is
the finished image with alpha_bar = 1. The methods need GaussianDiffusionScheduler, whose steps may be called in any
order.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import torch

from . import gaussian
from .images import ImageInput, from_mask
from .latents import mask_of_latents
from .schedule import positive_number, real_number
from .scheduler import NATIVE_SCHEDULER

_NOT_IN_ENCODE = ("eta", "callback_on_step_end", "return_trajectory")


class EditingMixin:
    """The editing methods of GaussianDiffusionPipeline; `**options` are the arguments of its call.

    `image` may be a PIL image or a list of them, a numpy array (batch, height, width, channels) or a tensor (batch,
    channels, height, width), uint8 in 0 ... 255 or floats in [0, 1] or the value range of the model, as returned by
    the pipeline. `batch_size` and `sample` are not among the options.
    """

    scheduler: Any
    vae: Any
    config: Any
    progress_bar: Callable[..., Any]
    # The steps of `GaussianDiffusionPipeline.__call__`. `call` is its SamplingCall.
    _begin: Callable[..., AbstractContextManager[Any]]
    _draw_noise: Callable[..., torch.Tensor]
    _denoise: Callable[..., torch.Tensor]
    _step: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    _predict: Callable[..., torch.Tensor]
    _end_step: Callable[..., torch.Tensor]
    _record: Callable[..., None]
    _result: Callable[..., Any]
    _to_pixels: Callable[[ImageInput, str], torch.Tensor]
    encode_latents: Callable[[torch.Tensor], torch.Tensor]

    @torch.no_grad()
    def denoise_from(self, image: ImageInput, strength: float = 0.5, **options: Any) -> Any:
        """Noise images and denoise them: SDEdit (Meng et al. 2022), or a test of reconstruction.

        Args:
            image: Images to start from.
            strength: Fraction of the steps to run, in (0, 1]: 0.5 noises to the middle of the list of timesteps.
            **options: As in the call of the pipeline.

        Returns:
            As the call of the pipeline, one image for each given one.

        Raises:
            ValueError: If an argument does not fit, or the scheduler is not GaussianDiffusionScheduler.
        """
        pixels = self._read(image, "image", "denoise_from")
        with self._begin(len(pixels), options, "denoise_from") as call:
            level = start_level(strength, len(call.timesteps))
            x_0 = self.encode_latents(pixels)
            x_t = self._noise_to_level(call, x_0.to(call.device, call.dtype), level)
            return self._result(call, self._denoise(call, x_t, call.timesteps[level:]))

    @torch.no_grad()
    def interpolate(
        self,
        image: ImageInput,
        other: ImageInput,
        weights: float | Iterable[float] = 0.5,
        strength: float = 0.5,
        mixing: Literal["linear", "spherical"] = "linear",
        **options: Any,
    ) -> Any:
        """Noise two images to one level, mix them and denoise the mixtures. Section 4.3, Ho et al. 2020.

        Args:
            image: Left endpoint, or a batch of them.
            other: Right endpoint, or as many.
            weights: Weight of the right endpoint, 0 ... 1, or several of them.
            strength: As in `denoise_from`. Figure 8 of the paper has t = 500 of 1000, which is 0.5.
            mixing: `linear`, as in the paper, or `spherical`, which keeps the norm of the state (Song et al. 2021).
            **options: As in the call of the pipeline, for the images that are returned. A single generator draws the
                noise of an endpoint once for all weights; each of a list of generators draws its own.

        Returns:
            As the call of the pipeline: the images of all weights for the first pair, then for the second, and so on.

        Raises:
            ValueError: If an argument does not fit, or the scheduler is not GaussianDiffusionScheduler.
        """
        left, right = self._read(image, "image", "interpolate"), self._read(other, "other", "interpolate")
        if left.shape != right.shape:
            raise ValueError(f"image is {tuple(left.shape)} and other {tuple(right.shape)}; pass two of one shape.")
        if mixing not in ("linear", "spherical"):
            raise ValueError(f"mixing {mixing!r} is not one of linear, spherical.")
        weights = weights.tolist() if isinstance(weights, np.ndarray | torch.Tensor) else weights
        try:
            given = [real_number("weights", w, 0, 1) for w in (weights if isinstance(weights, Iterable) else [weights])]
        except ValueError:
            given = []
        if not given:
            raise ValueError(f"weights is {weights!r}; give one or more numbers from 0 (image) to 1 (other).")
        with self._begin(len(left) * len(given), options, "interpolate") as call:
            level = start_level(strength, len(call.timesteps))

            def endpoint(pixels: torch.Tensor) -> torch.Tensor:
                x_0 = self.encode_latents(pixels).to(call.device, call.dtype)
                if isinstance(call.generator, list):
                    return self._noise_to_level(call, x_0.repeat_interleave(len(given), dim=0), level)
                return self._noise_to_level(call, x_0, level).repeat_interleave(len(given), dim=0)

            x, y = endpoint(left), endpoint(right)
            weight = torch.tensor(given, device=call.device, dtype=call.dtype).repeat(len(left)).view(-1, 1, 1, 1)
            mixed = torch.lerp(x, y, weight) if mixing == "linear" else slerp(x, y, weight)
            return self._result(call, self._denoise(call, mixed, call.timesteps[level:]))

    @torch.no_grad()
    def inpaint(
        self,
        image: ImageInput,
        mask: ImageInput,
        num_resamples: int = 10,
        jump_length: int = 10,
        **options: Any,
    ) -> Any:
        """Fill a part of images so that it fits the rest. Algorithm 1 (RePaint), Lugmayr et al. 2022.

        Each section of `jump_length` steps is denoised `num_resamples` times, which takes about `num_inference_steps`
        times `num_resamples` evaluations of the network. The defaults are those of the paper, with 250 steps.

        Args:
            image: Images to complete; the values under the mask are ignored.
            mask: White (1, 255 or True) where the image is to be filled: one for all images or one for each.
            num_resamples: How often each section is denoised; 1 never goes back.
            jump_length: Number of steps in a section.
            **options: As in the call of the pipeline.

        Returns:
            As the call of the pipeline, one image for each given one, unchanged outside the mask. With a VAE, all
            latents that the mask touches are filled, and the image outside of it is put back after decoding.

        Raises:
            ValueError: If an argument does not fit, or the scheduler is not GaussianDiffusionScheduler.
        """
        pixels = self._read(image, "image", "inpaint")
        mask = from_mask(mask, pixels)
        num_resamples = positive_number("num_resamples", num_resamples)
        jump_length = positive_number("jump_length", jump_length)
        if options.get("num_inference_steps") is None and options.get("timesteps") is None:
            options["num_inference_steps"] = min(250, len(self.scheduler))
        with self._begin(len(pixels), options, "inpaint") as call:
            known = self.encode_latents(pixels).to(call.device, call.dtype)
            fill = (mask if self.vae is None else mask_of_latents(mask, self.vae)).to(call.device)
            sample = self._draw_noise(call, tuple(known.shape))
            self._record(call, sample)
            moves = list(resampling_moves(len(call.timesteps), jump_length, num_resamples))
            for level, target in self.progress_bar(moves):
                if call.interrupt:
                    break
                if target < level:
                    sample = self._add_noise_between(call, sample, level, target)
                    continue
                t = call.timesteps[level]
                sample, model_output = self._step(call, sample, t)
                # Eq. 8, Lugmayr et al. 2022
                sample = torch.where(fill, sample, self._noise_to_level(call, known, target))
                sample = self._end_step(call, sample, t, model_output)
            return self._result(call, sample, None if self.vae is None else (pixels, mask))

    @torch.no_grad()
    def encode(self, image: ImageInput, num_iterations: int = 3, **options: Any) -> torch.Tensor:
        """Return the start noise from which deterministic sampling (eta = 0) returns the images: DDIM inversion.

        Section 4.3, Song et al. 2021, runs the ODE backwards, evaluating the network at the wrong end of each step.
        Here, each step is solved for its input by fixed-point iteration, so that decoding with the same steps returns
        the image up to the residual of the iteration.

        Args:
            image: Images to encode.
            num_iterations: Evaluations of the network per step; 1 is plain DDIM inversion.
            **options: `num_inference_steps`, `timesteps`, `timestep_spacing`, `class_labels` and guidance, as they will
                be used to decode. `generator`, `output_type` and `return_dict` have no effect.

        Returns:
            The start noise, float32 (float64 for a float64 network), (batch, channels, height, width), to be passed as
            `sample` with `eta=0.0` and the same options.

        Raises:
            ValueError: If an argument does not fit, the scheduler is not GaussianDiffusionScheduler, or the network is
                self-conditioned: each of its steps depends on the step before, which is not known yet.
        """
        pixels = self._read(image, "image", "encode")
        num_iterations = positive_number("num_iterations", num_iterations)
        if self.config.get("self_conditioned"):
            raise ValueError(
                "encode cannot invert a self-conditioned network: each step takes the prediction before it."
            )
        with self._begin(len(pixels), options | {"eta": 0.0}, "encode") as call:
            if unused := [name for name in _NOT_IN_ENCODE if options.get(name)]:
                raise ValueError(f"encode has no {' and no '.join(unused)}; leave it out.")
            x = self.encode_latents(pixels).to(call.device, call.dtype)
            for level in self.progress_bar(range(len(call.timesteps))[::-1]):
                if call.interrupt:
                    break
                x = self._invert_step(call, x, level, num_iterations)
            return x

    def _read(self, image: ImageInput, name: str, method: str) -> torch.Tensor:
        """Convert images to pixels in [-1, 1], if the scheduler supports editing."""
        if type(self.scheduler).__name__ != NATIVE_SCHEDULER:
            raise ValueError(
                f"{method} needs {NATIVE_SCHEDULER}, not {type(self.scheduler).__name__}; set pipe.scheduler ="
                f" {NATIVE_SCHEDULER}.from_config(pipe.scheduler.config)."
            )
        return self._to_pixels(image, name)

    def _alpha_bar(self, call: Any, level: int) -> float:
        """Return alpha_bar of a noise level."""
        if level == len(call.timesteps):
            return 1.0
        return float(call.scheduler.noise_schedule.alphas_cumprod[int(call.timesteps[level])])

    def _noise_to_level(self, call: Any, x_0: torch.Tensor, level: int) -> torch.Tensor:
        """Draw x_t of a noise level from q(x_t | x_0)."""
        alpha_bar = self._alpha_bar(call, level)
        noise = self._draw_noise(call, tuple(x_0.shape))
        return gaussian.q_sample(x_0, noise, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))

    def _add_noise_between(self, call: Any, x: torch.Tensor, level: int, target: int) -> torch.Tensor:
        """Go back to a noisier level in one draw, the product of all forward steps between the two levels."""
        ratio = self._alpha_bar(call, target) / self._alpha_bar(call, level)
        noise = self._draw_noise(call, tuple(x.shape))
        return gaussian.q_sample(x, noise, math.sqrt(ratio), math.sqrt(1 - ratio))

    def _invert_step(self, call: Any, x_prev: torch.Tensor, level: int, num_iterations: int) -> torch.Tensor:
        """Return the state at a level from which the deterministic step leads to `x_prev`."""
        t = call.timesteps[level]
        alpha_bar, alpha_bar_prev = self._alpha_bar(call, level), self._alpha_bar(call, level + 1)
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        alpha_prev, sigma_prev = math.sqrt(alpha_bar_prev), math.sqrt(1 - alpha_bar_prev)
        x = x_prev
        for _ in range(num_iterations):
            x_0 = call.scheduler.step(self._predict(call, x, t), t, x).pred_original_sample
            eps = gaussian.eps_from_x_0(x, x_0, alpha, sigma)
            x = alpha / alpha_prev * (x_prev - sigma_prev * eps) + sigma * eps
        return x


def start_level(strength: float, num_steps: int) -> int:
    """Return the noise level to start from, so that the fraction `strength` of the steps is run.

    Raises:
        ValueError: If strength is not in (0, 1], or rounds to no step.
    """
    strength = real_number("strength", strength)
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it must be above 0 and at most 1.")
    num_run = round(strength * num_steps)
    if num_run == 0:
        raise ValueError(f"strength {strength} of {num_steps} steps is none; raise strength or num_inference_steps.")
    return num_steps - num_run


def slerp(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Interpolate spherically, image by image. Appendix D.5, Song et al. 2021."""
    dims = tuple(range(1, x.ndim))
    lengths = [torch.linalg.vector_norm(z, dim=dims, keepdim=True) for z in (x, y)]
    angle = ((x * y).sum(dims, keepdim=True) / (lengths[0] * lengths[1])).clamp(-1, 1).acos()
    mixed = (torch.sin((1 - weight) * angle) * x + torch.sin(weight * angle) * y) / torch.sin(angle)
    return torch.where(angle.sin() < 1e-6, torch.lerp(x, y, weight), mixed)  # no arc between parallel states


def resampling_moves(num_steps: int, jump_length: int, num_resamples: int) -> Iterator[tuple[int, int]]:
    """Yield (level, next level): denoise by one step, or jump back by `jump_length` to denoise a section again.

    As in the code of Lugmayr et al. 2022, jumps start where a multiple of `jump_length` steps is left.
    """
    jumps_left = dict.fromkeys(range(0, num_steps - jump_length, jump_length), num_resamples - 1)
    level = 0
    while level < num_steps:
        yield level, level + 1
        level += 1
        num_left = num_steps - 1 - level
        if jumps_left.get(num_left, 0) > 0:
            jumps_left[num_left] -= 1
            yield level, level - jump_length
            level -= jump_length
