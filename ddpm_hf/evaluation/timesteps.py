"""Timesteps chosen for a network: of all lists of a length, the one whose steps make the smallest error.

A deterministic sampler follows a trajectory of the network, and each of its steps makes an error. The network is run
once in many steps. Each step that a sampler could make between two of these states is a sum of states and predictions
that are then known (DDIM: Eq. 12, Song et al. 2021; DPM-Solver++ (2M): algorithm 2, Lu et al. 2022), so its squared
error is read from one matrix of scalar products and costs no call of the network. Dynamic programming over the lists
(Watson et al. 2021, who apply it to the variational bound) finds the smallest sum of errors. Several ways of adding up
errors give several lists; the one that is used is measured on other noise.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.diffusion.schedule import spaced_timesteps
from ddpm_hf.evaluation.features import FloatArray
from ddpm_hf.evaluation.generate import Sampler, eval_mode
from ddpm_hf.rng import numpy_generator, sampling_generators

NUM_CANDIDATES = 101
"""Timesteps that a list may consist of, evenly spaced with both ends: every tenth of 1000."""
MAX_VALUES = 4096
"""Most values of an image that an error is the mean of; of larger images it is estimated from as many of them."""
EVEN = "evenly spaced"
SMALL_VARIANCE = 0.04
"""Variance of data in [-1, 1] along directions with little variance, such as edges and texture."""


@dataclass(frozen=True)
class Trajectories:
    """Scalar products of the states and predictions of a network along its trajectories.

    Args:
        timesteps: The N candidates, descending from T-1 to 0, int64 (N,).
        alphas: Factor of x_0 in the state of each candidate, and 1 of the image, (N + 1,).
        sigmas: Factor of the noise in it, and 0 of the image, (N + 1,).
        products: Mean product of any two of the N states and the N predicted x_0, (2 N, 2 N). The last prediction is
            the image that the trajectory ends in.
    """

    timesteps: NDArray[np.int64]
    alphas: FloatArray
    sigmas: FloatArray
    products: FloatArray

    def __len__(self) -> int:
        return len(self.timesteps)

    def errors(self, start: Any, end: Any, before: Any = None) -> FloatArray:
        """Return the mean squared error of steps between candidates, given by their positions; position N is the image.

        Args:
            start: Where the steps start.
            end: Where they end.
            before: Where the steps before them started, for DPM-Solver++ (2M); None for DDIM, as which 2M begins and
                ends.
        """
        start, end = np.broadcast_arrays(np.asarray(start), np.asarray(end))
        count, alphas, sigmas = len(self), self.alphas, self.sigmas
        # Eq. 12, Song et al. 2021, as a sum of x_t and the predicted x_0
        coef_x_t = sigmas[end] / sigmas[start]
        coef_x_0 = alphas[end] - coef_x_t * alphas[start]
        terms = [(coef_x_t, start), (coef_x_0, count + start), (-1.0, np.where(end == count, 2 * count - 1, end))]
        with np.errstate(divide="ignore", invalid="ignore"):  # of steps that do not go on from the step before
            if before is not None:
                # Algorithm 2, Lu et al. 2022: the prediction is extrapolated in the logarithm of alpha / sigma
                log_snr = np.log(alphas) - np.log(sigmas)
                extra = (log_snr[end] - log_snr[start]) / (log_snr[start] - log_snr[before]) / 2
                extra = np.where(end == count, 0.0, extra) * coef_x_0
                terms += [(extra, count + start), (-extra, count + np.asarray(before))]
            squares: FloatArray = sum(a * b * self.products[i, j] for a, i in terms for b, j in terms)
        return np.maximum(squares, 0.0)

    def shortest(self, num_steps: int, order: int, weights: FloatArray) -> list[int]:
        """Return the list of `num_steps` timesteps, the first of which is T-1, with the smallest sum of errors.

        Args:
            num_steps: Length of the list.
            order: 1 for the steps of DDIM, 2 for those of DPM-Solver++ (2M), which depend on the step before.
            weights: Weight of an error by where its step ends, (N + 1,).
        """
        count = len(self)
        start, end = np.ogrid[:count, : count + 1]
        if order == 1:
            costs = np.where(start < end, weights * self.errors(start, end), np.inf)[None]
        else:
            before = np.arange(count)[:, None, None]
            costs = weights * self.errors(start, end, before)
            costs = np.where((before < start) & (start < end), costs, np.inf)
        # Of all lists whose last step is that from `start` to `end`: the smallest sum, and the start of the step before
        total = np.full((count, count + 1), np.inf)
        total[0, 1:] = (weights * self.errors(0, np.arange(count + 1)))[1:]
        origins = []
        for _ in range(num_steps - 1):
            sums = total[:, :count, None] + costs
            origins.append(sums.argmin(axis=0))
            total = sums.min(axis=0)
        positions = [count, int(total[:, count].argmin())]
        for origin in reversed(origins):
            positions.append(int(origin[positions[-1], positions[-2]]))
        return [int(self.timesteps[position]) for position in positions[:0:-1]]


@torch.no_grad()
def follow_trajectories(
    pipeline: GaussianDiffusionPipeline, call: dict[str, Any], *, num_images: int, batch_size: int, seed: int
) -> Trajectories:
    """Run a network in `NUM_CANDIDATES` steps of DDIM, and return the products of its states and predictions.

    Args:
        pipeline: The network with a GaussianDiffusionScheduler.
        call: Arguments of the pipeline, such as `guidance_scale`.
        num_images: Number of trajectories; with classes, of each in turn.
        batch_size: Images per network call.
        seed: Seed of the noise.
    """
    scheduler = pipeline.scheduler
    total = len(scheduler)
    chosen = np.linspace(total - 1, 0, min(NUM_CANDIDATES, total)).round().astype(np.int64)
    alphas_cumprod = np.append(scheduler.noise_schedule.alphas_cumprod.numpy()[chosen], 1.0)
    products = np.zeros((2 * len(chosen), 2 * len(chosen)))
    sampler, values = Sampler(), None

    def keep(_pipeline: Any, _step: int, _t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        states.append(tensors["sample"])
        predictions.append(tensors["pred_original_sample"])
        return {}

    with eval_mode(pipeline.unet), tqdm(total=num_images, desc="Trajectories", disable=None, leave=False) as bar:
        for first in range(0, num_images, batch_size):
            batch = range(first, min(first + batch_size, num_images))
            states, predictions = [start_noise(pipeline, seed, batch)], list[torch.Tensor]()
            pipeline(
                **call,
                sample=states[0],
                class_labels=sampler.labels_of(pipeline, batch),
                timesteps=chosen.tolist(),
                eta=0.0,
                output_type="latent",
                callback_on_step_end=keep,
                callback_on_step_end_tensor_inputs=["sample", "pred_original_sample"],
            )
            rows = torch.stack([*states[:-1], *predictions]).flatten(2)
            if values is None:
                size = rows.shape[2]
                order = numpy_generator(seed, "timesteps_values").permutation(size)[:MAX_VALUES]
                values = torch.from_numpy(np.sort(order)).to(rows.device)
            rows = rows[:, :, values].flatten(1).double().cpu()
            products += (rows @ rows.T).numpy() / (num_images * len(values))
            bar.update(len(batch))
    return Trajectories(chosen, np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod), products)


def start_noise(pipeline: GaussianDiffusionPipeline, seed: int, indices: range) -> torch.Tensor:
    """Return the noise that the images of some indices start from, the same for every list."""
    dtype = torch.promote_types(torch.float32, pipeline.unet.dtype)
    generators = sampling_generators(seed, "timesteps", indices, pipeline.device)
    shape = (len(indices), *pipeline.sample_shape)
    noise: torch.Tensor = randn_tensor(shape, generator=generators, device=pipeline.device, dtype=dtype)
    return noise


def candidate_lists(trajectories: Trajectories, num_steps: int) -> dict[str, list[int]]:
    """Return lists of `num_steps` timesteps by name: the best ones in four senses, and the evenly spaced one.

    The error of a state counts as the error that it causes in the image. For data that vary as much as noise, both are
    equally large. Where data vary little, the image has a smaller one, by the derivative of the trajectory of normal
    data.
    """
    total = int(trajectories.timesteps[0]) + 1
    lists = {EVEN: spaced_timesteps("trailing", num_steps, total)}
    if num_steps == 1 or num_steps > len(trajectories) // 2:
        return lists
    a, s = trajectories.alphas, trajectories.sigmas
    all_weights = {"": np.ones(len(a)), ", small variance": SMALL_VARIANCE / (a**2 * SMALL_VARIANCE + s**2)}
    for order, solver in ((1, "DDIM"), (2, "2M")):
        for name, weights in all_weights.items():
            lists[f"error of {solver}{name}"] = trajectories.shortest(num_steps, order, weights)
    return lists


@dataclass(frozen=True)
class Choice:
    """Timesteps chosen for a sampler.

    Args:
        timesteps: Descending.
        name: Which of the candidates they are; see `candidate_lists`.
        errors: Root mean square difference of the images of each candidate to those of `NUM_CANDIDATES` steps of DDIM
            from the same noise, relative to the value range.
    """

    timesteps: list[int]
    name: str
    errors: dict[str, float]


@torch.no_grad()
def choose_timesteps(
    pipeline: GaussianDiffusionPipeline,
    scheduler: Any,
    trajectories: Trajectories,
    num_steps: int,
    call: dict[str, Any],
    *,
    indices: range,
    batch_size: int,
    seed: int,
) -> Choice:
    """Sample with each candidate, and return the one whose images are nearest to those of many steps.

    Args:
        pipeline: The network with a GaussianDiffusionScheduler.
        scheduler: The scheduler that is to use the timesteps; GaussianDiffusionScheduler with eta = 0.
        trajectories: Those of the same network and call.
        num_steps: Length of the list.
        call: Arguments of the pipeline that both share, such as `guidance_scale`.
        indices: Indices of the images, others than those of the trajectories.
        batch_size: Images per network call.
        seed: Seed of the noise.

    Raises:
        ValueError: The scheduler takes no list of timesteps.
    """
    lists = candidate_lists(trajectories, num_steps)
    run = partial(_final_images, pipeline, call=call, indices=indices, batch_size=batch_size, seed=seed)
    expected = run(pipeline.scheduler, trajectories.timesteps.tolist())
    low, high = pipeline.config.get("value_range") or (0.0, 1.0)
    errors: dict[str, float] = {}
    measured: dict[tuple[int, ...], float] = {}
    for name, timesteps in lists.items():
        if (key := tuple(timesteps)) not in measured:
            difference = (run(scheduler, timesteps) - expected).double() / (high - low)
            measured[key] = float(difference.square().mean().sqrt())
        errors[name] = measured[key]
    best = min(errors, key=errors.__getitem__)
    return Choice(lists[best], best, errors)


def _final_images(
    pipeline: GaussianDiffusionPipeline,
    scheduler: Any,
    timesteps: list[int],
    *,
    call: dict[str, Any],
    indices: range,
    batch_size: int,
    seed: int,
) -> torch.Tensor:
    """Return the images of a scheduler, (number, channels, height, width) on the CPU."""
    is_native = type(scheduler) is GaussianDiffusionScheduler
    own, sampler, parts = pipeline.scheduler, Sampler(), []
    pipeline.scheduler = scheduler
    try:
        with eval_mode(pipeline.unet):
            for first in range(indices.start, indices.stop, batch_size):
                batch = range(first, min(first + batch_size, indices.stop))
                result = pipeline(
                    **call | ({"eta": 0.0} if is_native else {}),
                    sample=start_noise(pipeline, seed, batch),
                    class_labels=sampler.labels_of(pipeline, batch),
                    timesteps=timesteps,
                    output_type="pt",
                )
                parts.append(result.images.cpu())
    finally:
        pipeline.scheduler = own
    return torch.cat(parts)
