"""The variational bound in bits per dimension, and the moments of the optimal reverse variance.

A trained network on a chain of timesteps, as a likelihood needs it: what it predicts, and each step's Gaussians.

Bits per dimension: the variational bound on the negative log-likelihood, term by term (Eq. 5, Ho et al. 2020).

The bound is that of the chain that ancestral sampling runs: the whole training chain, or any part of its timesteps,
with the variance that the scheduler has, and with x_0 clipped if it clips. It is an upper bound on the bits that a code
made of the model needs for each value of an 8-bit image.

The second moments of a network's prediction of the noise, which make its reverse variances optimal.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_hf.data import ImageSet, normalize
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler, gaussian
from ddpm_hf.diffusion.schedule import Transition
from ddpm_hf.distributed import ALONE, Ranks
from ddpm_hf.rng import normal_by_position, numpy_generator

SMALLEST_DECODER_VARIANCE = (0.1 / 255) ** 2
"""An analytic variance may be estimated as 0; a tenth of a gray level is as good, and finite."""


@dataclass(frozen=True)
class Prediction:
    """What a network says of x_t.

    Args:
        x_0: As the reverse process uses it, clipped if the scheduler clips.
        eps: The noise, of the prediction that is not clipped.
        variance: The half of the channels that tells the variance; None where it is fixed.
    """

    x_0: torch.Tensor
    eps: torch.Tensor
    variance: torch.Tensor | None


class Chain:
    """The reverse process of a pipeline on a list of timesteps, ancestral (eta = 1).

    A self-conditioned network is called twice for each prediction, the second time with its own first one: then each
    step depends on x_t alone, as a Markov chain must.

    Args:
        pipeline: The network, with a GaussianDiffusionScheduler.
        timesteps: Descending; None takes the whole training chain.

    Raises:
        ValueError: The scheduler is another one, the timesteps do not fit it, or noise is predicted where the first of
            them holds no signal.
    """

    def __init__(self, pipeline: GaussianDiffusionPipeline, timesteps: list[int] | None = None) -> None:
        scheduler = pipeline.scheduler
        if not isinstance(scheduler, GaussianDiffusionScheduler):
            raise ValueError(
                f"the likelihood needs the chain of a GaussianDiffusionScheduler, not {type(scheduler).__name__}."
            )
        chosen = list(range(len(scheduler)))[::-1] if timesteps is None else timesteps
        scheduler.set_timesteps(timesteps=chosen)
        self.scheduler = scheduler
        self.transitions: list[Transition] = scheduler.noise_schedule.transitions(chosen)
        scheduler.check_signal(self.transitions[0])
        self.device: torch.device = pipeline.unet.device
        self.dtype = torch.promote_types(torch.float32, pipeline.unet.dtype)
        self._unet = pipeline.unet
        self._is_self_conditioned = bool(pipeline.config.get("self_conditioned"))

    def __len__(self) -> int:
        return len(self.transitions)

    def noised(self, x_0: torch.Tensor, noise: torch.Tensor, step: Transition) -> torch.Tensor:
        """x_t of q(x_t | x_0)."""
        return gaussian.q_sample(x_0, noise, math.sqrt(step.alpha_bar), math.sqrt(1 - step.alpha_bar))

    def predict(self, x_t: torch.Tensor, step: Transition, class_labels: torch.Tensor | None) -> Prediction:
        """Calls the network on states (batch, channels, height, width) of one timestep."""
        x_0 = torch.zeros_like(x_t)
        if self._is_self_conditioned:
            x_0 = self._predict(torch.cat([x_t, x_0], dim=1), x_t, step, class_labels).x_0
            return self._predict(torch.cat([x_t, x_0], dim=1), x_t, step, class_labels)
        return self._predict(x_t, x_t, step, class_labels)

    def _predict(
        self, network_input: torch.Tensor, x_t: torch.Tensor, step: Transition, class_labels: torch.Tensor | None
    ) -> Prediction:
        timesteps = torch.full((len(x_t),), step.timestep, device=x_t.device)
        output: Any = self._unet(
            network_input.to(self._unet.dtype), timesteps, class_labels=class_labels, return_dict=False
        )[0]
        prediction, variance = self.scheduler.split_variance(output.to(x_t.dtype), x_t)
        kind, alpha, sigma = (
            self.scheduler.config.prediction_type,
            math.sqrt(step.alpha_bar),
            math.sqrt(1 - step.alpha_bar),
        )
        x_0 = self.scheduler.clip(gaussian.predict_x_0(kind, prediction, x_t, alpha, sigma))
        return Prediction(x_0, gaussian.predict_eps(kind, prediction, x_t, alpha, sigma), variance)

    def term(self, x_0: torch.Tensor, x_t: torch.Tensor, prediction: Prediction, row: int) -> torch.Tensor:
        """One term of the bound in nats, element by element: L_{t-1}, or L_0 in the last step.

        Eq. 5, 7 and 13, Ho et al. 2020, for any two timesteps. The prediction of x_0 is clipped as in sampling, whose
        chain this is the bound of; that of training (training/objective.py) is not.
        """
        step = self.transitions[row]
        log_variance = self._log_variance(row, prediction.variance, x_t)
        coefficients = gaussian.reverse_mean_coefficients(step, 1.0)
        mean = gaussian.posterior_mean(prediction.x_0, x_t, *coefficients)
        if step.previous_timestep < 0:
            return -gaussian.discretized_log_likelihood(x_0, mean, log_variance)
        true_mean = gaussian.posterior_mean(x_0, x_t, *coefficients)
        true_log_variance = torch.full_like(log_variance, math.log(step.posterior_variance))
        return gaussian.normal_kl(true_mean, true_log_variance, mean, log_variance)

    def prior(self, x_0: torch.Tensor) -> torch.Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) in nats, element by element: what no network changes."""
        alpha_bar = torch.tensor(self.transitions[0].alpha_bar, dtype=x_0.dtype, device=x_0.device)
        return gaussian.normal_kl(
            alpha_bar.sqrt() * x_0, torch.log1p(-alpha_bar), torch.zeros_like(x_0), torch.zeros_like(x_0)
        )

    def _log_variance(self, row: int, learned: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Log-variance of the reverse step; in the last one, whose posterior variance is 0, that of the step before.

        An analytic variance needs no such replacement.
        """
        step, kind = self.transitions[row], self.scheduler.variance_type
        is_last = step.previous_timestep < 0
        small = self.transitions[row - 1].posterior_variance if is_last and row > 0 else step.posterior_variance
        log_small, log_large = math.log(small or step.beta), math.log(step.beta)  # a chain of one step has none before
        if self.scheduler.analytic_variance:
            variance = self.scheduler.fixed_variance(step)
            return torch.full_like(like, math.log(max(variance, SMALLEST_DECODER_VARIANCE) if is_last else variance))
        if learned is None and is_last:
            return torch.full_like(like, log_small)
        log_variance = gaussian.reverse_log_variance(kind, learned, log_small, log_large)
        return log_variance if isinstance(log_variance, torch.Tensor) else torch.full_like(like, log_variance)


def check_labels(images: ImageSet, num_classes: int) -> None:
    """Refuses images without the labels that a class-conditional network needs.

    Raises:
        ValueError: With what to do.
    """
    if num_classes and (images.labels is None or images.labels[images.rows].max() >= num_classes):
        raise ValueError(
            f"the network has {num_classes} classes, so each image needs a label from 0 to {num_classes - 1}; name "
            "their column with data.label_column."
        )


def load_images(
    images: ImageSet, positions: Sequence[int] | NDArray[np.int64], chain: Chain, *, with_labels: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns images of a set in [-1, 1] and, where the network needs them, labels, on the device of the network."""
    pixels, labels = images.take(np.asarray(positions))
    x_0 = normalize(torch.from_numpy(pixels).to(chain.device)).to(chain.dtype)
    return x_0, torch.from_numpy(labels).to(chain.device) if with_labels and labels is not None else None


def batches_of(images: range, batch_size: int) -> Iterator[range]:
    """Yields the images in batches."""
    for start in range(images.start, images.stop, batch_size):
        yield range(start, min(start + batch_size, images.stop))


Array = NDArray[np.float64]


@dataclass(frozen=True)
class VariationalBound:
    """The bound of some images, in bits per dimension.

    Args:
        timesteps: The chain, descending; the arrays below have one entry for each of its steps.
        prior: KL(q(x_T | x_0) || p(x_T)), mean over the images.
        terms: Mean of L_t over the images for which it was computed; the last entry is the decoder's, L_0.
        x_0_mse: Mean square error of the predicted x_0, of values in [-1, 1].
        eps_mse: Mean square error of the predicted noise.
        counts: For how many images each term was computed.
        totals: The whole bound of each image, (images,).
    """

    timesteps: tuple[int, ...]
    prior: float
    terms: Array
    x_0_mse: Array
    eps_mse: Array
    counts: NDArray[np.int64]
    totals: Array

    @property
    def bits_per_dim(self) -> float:
        """The bound: the mean over the images."""
        return float(self.totals.mean())

    @property
    def standard_error(self) -> float:
        """Of `bits_per_dim`, from the spread over the images; NaN for a single one."""
        return float(self.totals.std(ddof=1) / math.sqrt(len(self.totals))) if len(self.totals) > 1 else math.nan

    @property
    def rate(self) -> Array:
        """Bits per dimension sent before each step's x_t is known, along the chain. Section 4.3, Ho et al. 2020.

        Terms that were computed for no image are those between their neighbours, and not 0.
        """
        steps, is_known = np.arange(len(self.terms)), self.counts > 0
        sent = np.concatenate([[0.0], np.cumsum(np.interp(steps, steps[is_known], self.terms[is_known])[:-1])])
        return np.asarray(self.prior + sent)

    @property
    def distortion(self) -> Array:
        """Root mean square error of x_0 as predicted from each step's x_t, on the scale of 0 to 255. Fig. 5, ibid."""
        return np.asarray(127.5 * np.sqrt(self.x_0_mse))


@torch.no_grad()
def variational_bound(
    pipeline: GaussianDiffusionPipeline,
    images: ImageSet,
    *,
    seed: int,
    timesteps: list[int] | None = None,
    num_terms: int | None = None,
    batch_size: int = 64,
    ranks: Ranks = ALONE,
) -> VariationalBound:
    """Collective: computes the bound of every image of a set, streaming over them.

    Args:
        pipeline: The network, in whatever mode and on whatever device it is, and the scheduler.
        images: uint8 images in their own sizes' order; cropped in the centre, never mirrored.
        seed: The noise of image i at timestep t is a function of (seed, t, i).
        timesteps: The chain, descending; None takes all that training had.
        num_terms: None computes every term for every image. A number computes so many for each image, the decoder's and
            others drawn evenly from the chain, and estimates the rest from them, without bias.
        batch_size: Images of one forward.
        ranks: The processes, which share the images.

    Raises:
        ValueError: The images have more than 8 bits, the classes do not fit, or `num_terms` is not in 2 ... chain.
    """
    chain = check_bound(pipeline, images, timesteps, num_terms)
    was_training = pipeline.unet.training
    pipeline.unet.eval()
    try:
        sums, totals, priors = _sums(
            chain, images, ranks.part(len(images)), num_terms, seed, batch_size, with_labels=pipeline.num_classes > 0
        )
    finally:
        pipeline.unet.train(was_training)
    sums, totals, priors = ranks.gather(sums[None]).sum(axis=0), ranks.gather(totals), ranks.gather(priors)
    counts = sums[3]
    means = sums[:3] / np.maximum(counts, 1)
    return VariationalBound(
        timesteps=tuple(step.timestep for step in chain.transitions),
        prior=float(priors.mean()),
        terms=means[0],
        x_0_mse=means[1],
        eps_mse=means[2],
        counts=counts.astype(np.int64),
        totals=totals,
    )


def _sums(
    chain: Chain,
    images: ImageSet,
    mine: range,
    num_terms: int | None,
    seed: int,
    batch_size: int,
    *,
    with_labels: bool,
) -> tuple[Array, Array, Array]:
    """Goes through some images: sums of bits, of both square errors and of their number (4, steps); totals; priors."""
    sums, totals, priors = np.zeros((4, len(chain))), np.zeros(len(mine)), np.zeros(len(mine))
    bar = tqdm(total=len(mine) * (num_terms or len(chain)), desc="Bits per dimension", disable=None, leave=False)
    with bar:
        for positions in batches_of(mine, batch_size):
            part = slice(positions.start - mine.start, positions.stop - mine.start)
            x_0, labels = load_images(images, positions, chain, with_labels=with_labels)
            priors[part] = _bits(chain.prior(x_0))
            totals[part] = priors[part]
            weights = _weights(len(chain), num_terms, seed, positions)
            for row in range(len(chain)):
                chosen = np.flatnonzero(weights[row])
                if len(chosen):
                    values = _terms(chain, row, x_0, labels, positions, chosen, seed)
                    totals[part][chosen] += weights[row, chosen] * values[0]
                    sums[:, row] += [*values.sum(axis=1), len(chosen)]
                    bar.update(len(chosen))
    return sums, totals, priors


def check_bound(
    pipeline: GaussianDiffusionPipeline, images: ImageSet, timesteps: list[int] | None, num_terms: int | None
) -> Chain:
    """Refuses what has no bits per dimension, before the network is called, and returns the chain.

    Args:
        pipeline: This and the following are those of `variational_bound`.
        images: Those whose bound is asked for.
        timesteps: The chain.
        num_terms: Terms for each image.

    Raises:
        ValueError: As `variational_bound`.
    """
    chain = Chain(pipeline, timesteps)
    if images.images.dtype != np.uint8:
        raise ValueError(f"the images have {images.images.dtype} values; bits per dimension are those of 8-bit images.")
    if len(images) == 0:
        raise ValueError("there are no images to compute bits per dimension of.")
    if images.image_shape[0] != pipeline.num_channels:
        raise ValueError(
            f"the images have {images.image_shape[0]} channels and the network {pipeline.num_channels}; set "
            "data.num_channels."
        )
    check_labels(images, pipeline.num_classes)
    if num_terms is not None and not 2 <= num_terms <= len(chain):
        raise ValueError(f"num_terms is {num_terms}; it must be between 2 and {len(chain)}, the steps of the chain.")
    return chain


def _weights(num_steps: int, num_terms: int | None, seed: int, positions: range) -> Array:
    """Returns how much each term (steps, images) counts in the estimate of an image's bound; 0 is not computed.

    Of the terms before the decoder's, which is always computed, each image has one in each of `num_terms` - 1 equal
    parts of the chain.
    """
    if num_terms is None or num_terms == num_steps:
        return np.ones((num_steps, len(positions)))
    weights = np.zeros((num_steps, len(positions)))
    weights[-1] = 1
    borders = np.linspace(0, num_steps - 1, num_terms).round().astype(int)
    for column, position in enumerate(positions):
        places = numpy_generator(seed, "bound_terms", position).random(num_terms - 1)
        width = np.diff(borders)
        weights[borders[:-1] + (places * width).astype(int), column] = width
    return weights


def _terms(
    chain: Chain,
    row: int,
    x_0: torch.Tensor,
    labels: torch.Tensor | None,
    positions: range,
    chosen: NDArray[np.int64],
    seed: int,
) -> Array:
    """Returns bits, square error of x_0 and square error of the noise, (3, images), of one step for some images."""
    step = chain.transitions[row]
    noise = normal_by_position(seed, "bound_noise", step.timestep, positions, x_0.shape[1:], chain.device)
    index = torch.from_numpy(chosen).to(chain.device)
    x_0, noise = x_0[index], noise.to(chain.dtype)[index]
    x_t = chain.noised(x_0, noise, step)
    prediction = chain.predict(x_t, step, None if labels is None else labels[index])
    errors = [(prediction.x_0 - x_0) ** 2, (prediction.eps - noise) ** 2]
    return np.stack([_bits(chain.term(x_0, x_t, prediction, row)), *map(_mean, errors)])


def _mean(values: torch.Tensor) -> Array:
    """Returns the mean of each image, float64."""
    return values.flatten(1).mean(dim=1, dtype=torch.float64).cpu().numpy()


def _bits(nats: torch.Tensor) -> Array:
    """Returns the mean of each image in bits."""
    return _mean(nats) / math.log(2)


@torch.no_grad()
def estimate_second_moments(
    pipeline: GaussianDiffusionPipeline,
    images: ImageSet,
    *,
    seed: int,
    num_images: int,
    batch_size: int = 64,
    ranks: Ranks = ALONE,
) -> torch.Tensor:
    """Collective: estimates Gamma_t = E |eps(x_t)|^2 / d at every timestep of training. Eq. 8, Bao et al. 2022.

    The images go round in an order that the seed draws, since many sets are sorted by class. Each timestep sees the
    next `num_images` of them, so a small number sees different ones at each.

    Args:
        pipeline: The network and the scheduler.
        images: Training images; held-out ones would tell of the data what the network was not trained on.
        seed: Of the noise, and of the order of the images.
        num_images: For each timestep.
        batch_size: Images of one forward.
        ranks: The processes, which share the timesteps: the bits are those of one process.

    Returns:
        float64 (T,), for `scheduler.eps_second_moments`.

    Raises:
        ValueError: As `check_second_moments`.
    """
    chain = check_second_moments(pipeline, images)
    rows = ranks.part(len(chain))
    mine = np.zeros(len(rows))
    order = numpy_generator(seed, "moments_images").permutation(len(images))
    was_training = pipeline.unet.training
    pipeline.unet.eval()
    try:
        for place, row in enumerate(tqdm(rows, "Second moments", disable=None, leave=False)):
            step, total = chain.transitions[row], 0.0
            for positions in batches_of(range(row * num_images, (row + 1) * num_images), batch_size):
                turn = order[np.asarray(positions) % len(images)]
                x_0, class_labels = load_images(images, turn, chain, with_labels=pipeline.num_classes > 0)
                noise = normal_by_position(seed, "moments", 0, positions, x_0.shape[1:], chain.device).to(chain.dtype)
                eps = chain.predict(chain.noised(x_0, noise, step), step, class_labels).eps
                total += float((eps.double() ** 2).sum()) / math.prod(eps.shape[1:])
            mine[place] = total / num_images
    finally:
        pipeline.unet.train(was_training)
    return torch.from_numpy(ranks.gather(mine)[::-1].copy())  # the chain descends, from T-1 to 0


def check_second_moments(pipeline: GaussianDiffusionPipeline, images: ImageSet) -> Chain:
    """Refuses a pipeline that has no use for second moments, before the network is called, and returns the chain.

    Raises:
        ValueError: The scheduler or its variance is another one, or the images lack the labels of the network.
    """
    chain = Chain(pipeline)
    check_labels(images, pipeline.num_classes)
    # The scheduler itself says whether it takes moments; to ask, any will do.
    type(chain.scheduler).from_config(chain.scheduler.config).eps_second_moments = torch.ones(len(chain))
    return chain
