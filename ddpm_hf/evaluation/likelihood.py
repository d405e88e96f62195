"""Bits per dimension: the variational bound on the negative log-likelihood, term by term (Eq. 5, Ho et al. 2020).

The bound is that of the chain that ancestral sampling runs: the whole training chain, or any part of its timesteps,
with the variance that the scheduler has, and with x_0 clipped if it clips. It is an upper bound on the bits that a code
made of the model needs for each value of an 8-bit image.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_hf.data import ImageSet
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.evaluation.chain import Chain, batches_of, check_labels, load_images
from ddpm_hf.evaluation.ranks import ALONE, Ranks
from ddpm_hf.rng import normal_by_position, numpy_generator

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
