"""What a trained network does to a given image: denoise from it, interpolate, inpaint, encode.

A run of n steps passes through n + 1 levels of noise: level k is the state before step k, at the k-th timestep of the
scheduler's list, and level n is the finished image, alpha_bar = 1. Everything here needs GaussianDiffusionScheduler,
whose steps may be called in any order.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from typing_extensions import Unpack

from . import gaussian
from .denoising import Run, SamplingOptions
from .folder import NATIVE_SCHEDULER
from .images import ImageInput, from_mask

CORE_VERSION = "1.2.0"


class Editing:
    """The editing methods of the pipeline; each takes the keyword arguments of its call but `batch_size` and `sample`.

    `image` may be a PIL image or a list of them, a numpy array (batch, height, width, channels) or a tensor (batch,
    channels, height, width), uint8 in 0 ... 255 or floats in [0, 1]: what the pipeline returns.
    """

    _begin: Callable[..., Run]
    _to_states: Callable[[ImageInput, str], torch.Tensor]
    scheduler: Any

    @torch.no_grad()
    def denoise_from(self, image: ImageInput, strength: float = 0.5, **options: Unpack[SamplingOptions]) -> Any:
        """Noises images part of the way and denoises them: SDEdit (Meng et al. 2022), or a test of reconstruction.

        Args:
            image: Where to start from.
            strength: The part of the steps that is run, in (0, 1]: 0.5 noises to the middle of the list of timesteps.
            **options: As in the call of the pipeline.

        Returns:
            As the call of the pipeline, one image for each given one.

        Raises:
            ValueError: An argument does not fit, or the scheduler is not GaussianDiffusionScheduler.
        """
        x_0 = self._read(image, "image", "denoise_from")
        run = self._begin(len(x_0), **options)
        level = start_level(strength, len(run.timesteps))
        x_t = at_level(run, x_0.to(run.device, run.dtype), level, run.noise(tuple(x_0.shape)))
        return run.finish(run.denoise(x_t, run.timesteps[level:]))

    @torch.no_grad()
    def interpolate(
        self,
        image: ImageInput,
        other: ImageInput,
        weights: float | Sequence[float] = 0.5,
        strength: float = 0.5,
        mixing: Literal["linear", "spherical"] = "linear",
        **options: Unpack[SamplingOptions],
    ) -> Any:
        """Noises two images to one level, mixes the states and denoises the mixtures. Section 4.3, Ho et al. 2020.

        Args:
            image: Left endpoint, or a batch of them.
            other: Right endpoint, or as many.
            weights: Of the right endpoint, 0 ... 1: one, or several to go from one endpoint to the other.
            strength: As in `denoise_from`; the paper's figure 8 has t = 500 of 1000, that is 0.5.
            mixing: `linear`, as in the paper, or `spherical`, which keeps the length of the state (Song et al. 2021).
            **options: As in the call of the pipeline; labels and generators are for the images that come out. One
                generator draws the noise of an endpoint once for all its weights; of a list, each draws it anew.

        Returns:
            As the call of the pipeline: for each pair the images of all weights, one pair after the other.

        Raises:
            ValueError: An argument does not fit, or the scheduler is not GaussianDiffusionScheduler.
        """
        left, right = self._read(image, "image", "interpolate"), self._read(other, "other", "interpolate")
        if left.shape != right.shape:
            raise ValueError(f"image is {tuple(left.shape)} and other {tuple(right.shape)}; give two of one shape.")
        if mixing not in ("linear", "spherical"):
            raise ValueError(f"mixing {mixing!r} is not one of linear, spherical.")
        given = [weights] if isinstance(weights, int | float) else list(weights)
        if not given or not all(0 <= weight <= 1 for weight in given):
            raise ValueError(f"weights is {weights}; give one or more numbers from 0 (image) to 1 (other).")
        run = self._begin(len(left) * len(given), **options)
        level = start_level(strength, len(run.timesteps))
        x, y = (endpoint(run, x_0, level, len(given)) for x_0 in (left, right))
        weight = torch.tensor(given, device=run.device, dtype=run.dtype).repeat(len(left)).view(-1, 1, 1, 1)
        mixed = torch.lerp(x, y, weight) if mixing == "linear" else slerp(x, y, weight)
        return run.finish(run.denoise(mixed, run.timesteps[level:]))

    @torch.no_grad()
    def inpaint(
        self,
        image: ImageInput,
        mask: ImageInput,
        num_resamples: int = 10,
        jump_length: int = 10,
        **options: Unpack[SamplingOptions],
    ) -> Any:
        """Fills part of images with what fits the rest. RePaint, algorithm 1 (Lugmayr et al. 2022).

        Each stretch of `jump_length` steps is denoised `num_resamples` times, so that the new part sees what it has to
        fit: about `num_inference_steps` times `num_resamples` calls of the network. The defaults are the paper's: 250
        steps, unless `num_inference_steps` or `timesteps` says otherwise.

        Args:
            image: What to complete; what the mask covers is not looked at.
            mask: White (1, 255 or True) where the image is to be filled: one for all images or one for each.
            num_resamples: How often each stretch is denoised; 1 never goes back.
            jump_length: Steps of a stretch.
            **options: As in the call of the pipeline.

        Returns:
            As the call of the pipeline, one image for each given one; outside the mask they are the given ones.

        Raises:
            ValueError: An argument does not fit, or the scheduler is not GaussianDiffusionScheduler.
        """
        known = self._read(image, "image", "inpaint")
        fill = from_mask(mask, known)
        for name, count in (("num_resamples", num_resamples), ("jump_length", jump_length)):
            if type(count) is not int or count < 1:
                raise ValueError(f"{name} is {count!r}; it must be a whole number, at least 1.")
        if options.get("num_inference_steps") is None and options.get("timesteps") is None:
            options["num_inference_steps"] = min(250, len(self.scheduler))
        run = self._begin(len(known), **options)
        known, fill = known.to(run.device, run.dtype), fill.to(run.device)
        sample = run.noise(tuple(known.shape))
        run.keep(sample)
        moves = list(resampling_moves(len(run.timesteps), jump_length, num_resamples))
        for level, target in run.progress_bar(moves):
            if run.is_interrupted:
                break
            if target < level:
                sample = forward_to_level(run, sample, level, target)
                continue
            sample, t, output = run.step(sample, run.timesteps[level])
            seen = at_level(run, known, target, run.noise(tuple(known.shape)))  # without noise at the last level
            sample = run.end_step(torch.where(fill, sample, seen), t, output)
        return run.finish(sample)

    @torch.no_grad()
    def encode(self, image: ImageInput, num_iterations: int = 3, **options: Unpack[SamplingOptions]) -> torch.Tensor:
        """Finds the start noise from which deterministic sampling (eta = 0) returns the images. DDIM inversion.

        Section 4.3, Song et al. 2021, runs the ODE backwards and evaluates the network at the wrong end of each step;
        here each step is solved for the state that it would have come from, by fixed-point iteration, which the same
        number of steps undoes up to the residual of the iteration.

        Args:
            image: What to encode.
            num_iterations: Calls of the network a step; 1 is plain DDIM inversion.
            **options: `num_inference_steps`, `timesteps`, `timestep_spacing`, `class_labels` and guidance, as they will
                be used to decode.

        Returns:
            The start noise, float32 (float64 for a network in float64), (batch, channels, height, width), to be passed
            as `sample` with `eta=0.0` and the same options.

        Raises:
            ValueError: An argument does not fit, the scheduler is not GaussianDiffusionScheduler, or the network is
                self-conditioned: its steps depend on all the steps before, which are not known yet.
        """
        x = self._read(image, "image", "encode")
        if type(num_iterations) is not int or num_iterations < 1:
            raise ValueError(f"num_iterations is {num_iterations!r}; it must be a whole number, at least 1.")
        run = self._begin(len(x), **options)
        if run.is_self_conditioned:
            raise ValueError(
                "encode cannot invert a self-conditioned network: each step takes the prediction before it."
            )
        x = x.to(run.device, run.dtype)
        for level in run.progress_bar(range(len(run.timesteps))[::-1]):
            if run.is_interrupted:
                break
            x = invert_step(run, x, level, num_iterations)
        run.release()
        return x

    def _read(self, image: ImageInput, name: str, method: str) -> torch.Tensor:
        """Turns images into states, for a scheduler that can edit them."""
        if type(self.scheduler).__name__ != NATIVE_SCHEDULER:
            raise ValueError(
                f"{method} needs {NATIVE_SCHEDULER}, not {type(self.scheduler).__name__}; set pipe.scheduler ="
                f" {NATIVE_SCHEDULER}.from_config(pipe.scheduler.config)."
            )
        return self._to_states(image, name)


def start_level(strength: float, num_steps: int) -> int:
    """Returns the level from which that part of the steps, rounded, leads to the image."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it must be above 0 and at most 1.")
    num_run = round(strength * num_steps)
    if num_run == 0:
        raise ValueError(f"strength {strength} of {num_steps} steps is none; raise strength or num_inference_steps.")
    return num_steps - num_run


def alpha_bar_at(run: Run, level: int) -> float:
    """Returns alpha_bar of a level: 1 at the last, which is the image."""
    if level == len(run.timesteps):
        return 1.0
    return float(run.scheduler.noise_schedule.alphas_cumprod[int(run.timesteps[level])])


def at_level(run: Run, x_0: torch.Tensor, level: int, noise: torch.Tensor) -> torch.Tensor:
    """Returns x_0 noised to a level."""
    alpha_bar = alpha_bar_at(run, level)
    return gaussian.q_sample(x_0, noise, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))


def endpoint(run: Run, x_0: torch.Tensor, level: int, num_weights: int) -> torch.Tensor:
    """Noises one end of an interpolation and repeats it for every weight, unless each has its own generator."""
    x_0 = x_0.to(run.device, run.dtype)
    if isinstance(run.generator, list):
        x_0 = x_0.repeat_interleave(num_weights, dim=0)
        return at_level(run, x_0, level, run.noise(tuple(x_0.shape)))
    return at_level(run, x_0, level, run.noise(tuple(x_0.shape))).repeat_interleave(num_weights, dim=0)


def slerp(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation, image by image. Appendix D.5, Song et al. 2021."""
    dims = tuple(range(1, x.ndim))
    lengths = [torch.linalg.vector_norm(z, dim=dims, keepdim=True) for z in (x, y)]
    angle = ((x * y).sum(dims, keepdim=True) / (lengths[0] * lengths[1])).clamp(-1, 1).acos()
    mixed = (torch.sin((1 - weight) * angle) * x + torch.sin(weight * angle) * y) / torch.sin(angle)
    return torch.where(angle.sin() < 1e-6, torch.lerp(x, y, weight), mixed)  # parallel states have no arc between them


def resampling_moves(num_steps: int, jump_length: int, num_resamples: int) -> Iterator[tuple[int, int]]:
    """Yields (level, next level): one down to less noise at a time, and back up where a stretch is denoised anew.

    As in the paper's code, one goes back when a multiple of `jump_length` steps is left, if as much noise can be added.
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


def forward_to_level(run: Run, x: torch.Tensor, level: int, target: int) -> torch.Tensor:
    """Adds the noise between two levels in one draw: the product of all forward steps between them."""
    kept = alpha_bar_at(run, target) / alpha_bar_at(run, level)
    return gaussian.q_sample(x, run.noise(tuple(x.shape)), math.sqrt(kept), math.sqrt(1 - kept))


def invert_step(run: Run, x_prev: torch.Tensor, level: int, num_iterations: int) -> torch.Tensor:
    """Returns the state at a level from which the deterministic step leads to `x_prev`."""
    t = run.timesteps[level]
    alpha_bar, alpha_bar_prev = alpha_bar_at(run, level), alpha_bar_at(run, level + 1)
    alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    alpha_prev, sigma_prev = math.sqrt(alpha_bar_prev), math.sqrt(1 - alpha_bar_prev)
    x = x_prev
    for _ in range(num_iterations):
        x_0 = run.scheduler.step(run.predict(x, t), t, x, eta=0.0).pred_original_sample
        eps = gaussian.eps_from_x_0(x, x_0, alpha, sigma)
        x = alpha / alpha_prev * (x_prev - sigma_prev * eps) + sigma * eps
    return x
