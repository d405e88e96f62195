"""Bits per dimension, and the second moments behind the optimal reverse variance.

Bits per dimension are the variational bound on the negative log-likelihood, term by term (Eq. 5, Ho et al. 2020). The
bound is that of the reverse process which ancestral sampling runs: all training timesteps or any subset of them, the
variance of the scheduler, and x_0 clipped if the scheduler clips it. It is an upper bound on the bits per value that a
code built from the model needs for 8-bit images.

Of a network on the latents of a VAE, the bound is on the negative log-density of these, in bits per latent value: it
may be negative, and only models on the latents of one VAE can be compared by it. Latents are drawn from those of each
image, and do not depend on how they are normalized.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_hf import distributed
from ddpm_hf.data import ImageSet, normalize
from ddpm_hf.data.loader import to_device
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler, gaussian, latents
from ddpm_hf.diffusion.schedule import Transition
from ddpm_hf.evaluation.features import FloatArray
from ddpm_hf.evaluation.generate import eval_mode
from ddpm_hf.evaluation.metrics import BITS_PER_DIM, Metric
from ddpm_hf.rng import normal_by_pair, normal_by_position, numpy_generator

_IMAGES_PER_TABLE = 1024
"""Images whose term weights are in memory at a time."""
_BATCHES_PER_READ = 64
"""Batches between two copies from the device to the host, which waits for them."""
MIN_DECODER_VARIANCE = (0.1 / 255) ** 2
"""An analytic variance may be estimated as 0; a deviation of a twentieth of a gray level is as good, and finite."""


@dataclass(frozen=True)
class VariationalBound:
    """The variational bound of a set of images, in bits per dimension.

    Args:
        timesteps: Timesteps of the reverse process, descending; the arrays below have one entry per step.
        prior: KL(q(x_T | x_0) || p(x_T)), mean over the images.
        terms: Mean of L_t over the images it was computed for; the last entry is the decoder term L_0.
        x_0_mse: Mean squared error of the predicted x_0, of values in [-1, 1].
        eps_mse: Mean squared error of the predicted noise.
        counts: Number of images that each term was computed for.
        totals: The bound of each image, (images,).
        is_of_latents: Whether it is of latents, not of 8-bit images.
    """

    timesteps: tuple[int, ...]
    prior: float
    terms: FloatArray
    x_0_mse: FloatArray
    eps_mse: FloatArray
    counts: NDArray[np.int64]
    totals: FloatArray
    is_of_latents: bool = False

    @property
    def bits_per_dim(self) -> float:
        """The bound: the mean over the images."""
        return float(self.totals.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of `bits_per_dim` over the images; NaN for a single image."""
        return float(self.totals.std(ddof=1) / math.sqrt(len(self.totals))) if len(self.totals) > 1 else math.nan

    @property
    def metric(self) -> Metric:
        """The bound as a metric of evaluation.json."""
        return Metric(
            name=BITS_PER_DIM,
            value=self.bits_per_dim,
            standard_error=None if math.isnan(self.standard_error) else self.standard_error,
            features=None,
            num_samples=len(self.totals),
            num_reference=0,
        )

    @property
    def rate(self) -> FloatArray:
        """Bits per dimension sent before the x_t of each step is known. Section 4.3, Ho et al. 2020.

        Terms that were computed for no image are interpolated, without the decoder term of latents, a density.
        """
        steps, is_known = np.arange(len(self.terms)), self.counts > 0
        if self.is_of_latents and is_known[:-1].any():
            is_known[-1] = False
        sent = np.concatenate([[0.0], np.cumsum(np.interp(steps, steps[is_known], self.terms[is_known])[:-1])])
        return np.asarray(self.prior + sent)

    @property
    def distortion(self) -> FloatArray:
        """Root mean squared error of the x_0 predicted at each step. Fig. 5, Ho et al. 2020.

        On the scale 0 to 255, or of normalized latents.
        """
        return np.asarray((1.0 if self.is_of_latents else 127.5) * np.sqrt(self.x_0_mse))

    def to_dict(self) -> dict[str, Any]:
        """Return what evaluation.json holds of the bound: everything except the totals of single images."""
        arrays = ("terms", "x_0_mse", "eps_mse", "counts", "rate", "distortion")
        of = {"of": "latents"} if self.is_of_latents else {}
        return (
            {"timesteps": list(self.timesteps), "prior": self.prior}
            | of
            | {name: getattr(self, name).tolist() for name in arrays}
        )


class Prediction(NamedTuple):
    """Output of a network at x_t.

    Attributes:
        x_0: The predicted x_0, clipped if the scheduler clips.
        eps: The predicted noise, from the prediction before clipping.
        variance: The variance channels; None if the variance is fixed.
    """

    x_0: torch.Tensor
    eps: torch.Tensor
    variance: torch.Tensor | None


class Steps(NamedTuple):
    """One reverse step for each sample of a batch; float64 of shape (batch, 1, 1, 1), except for the timesteps.

    Attributes:
        timestep: int64 (batch,).
        alpha: Factor of x_0 in x_t.
        sigma: Factor of the noise in x_t.
        coef_x_0: Factor of x_0 in the posterior mean. Eq. 7, Ho et al. 2020.
        coef_x_t: Factor of x_t in the posterior mean.
        log_small: Logarithm of the posterior variance.
        log_large: Logarithm of beta.
        log_fixed: Log-variance of the reverse step, unless the network predicts it.
    """

    timestep: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor
    coef_x_0: torch.Tensor
    coef_x_t: torch.Tensor
    log_small: torch.Tensor
    log_large: torch.Tensor
    log_fixed: torch.Tensor


class ReverseProcess:
    """The ancestral (eta = 1) reverse process of a pipeline on a list of timesteps.

    A self-conditioned network is called twice per prediction, the second time with its own first prediction: then each
    step depends on x_t alone, as a Markov chain must. Everything except the network is computed in float64.

    Args:
        pipeline: The network with a GaussianDiffusionScheduler.
        timesteps: Descending timesteps; None takes all training timesteps.

    Raises:
        ValueError: The scheduler is a different one, the timesteps are invalid, or the network predicts noise and the
            first timestep has no signal.
    """

    def __init__(self, pipeline: GaussianDiffusionPipeline, timesteps: list[int] | None = None) -> None:
        scheduler = pipeline.scheduler
        if not isinstance(scheduler, GaussianDiffusionScheduler):
            raise ValueError(
                f"the likelihood needs the reverse process of a GaussianDiffusionScheduler, not of "
                f"{type(scheduler).__name__}."
            )
        chosen = list(range(len(scheduler)))[::-1] if timesteps is None else timesteps
        scheduler.set_timesteps(timesteps=chosen)
        self.pipeline = pipeline
        self.scheduler = scheduler
        self.transitions: list[Transition] = scheduler.noise_schedule.transitions(chosen)
        scheduler.check_signal(self.transitions[0])
        self.timesteps = np.array(chosen, np.int64)
        self.device: torch.device = pipeline.unet.device
        self._latents: dict[tuple[int, int], torch.Tensor] = {}  # by seed and position
        self._images: ImageSet | None = None  # of these

    def __len__(self) -> int:
        return len(self.transitions)

    def table(self) -> FloatArray:
        """Return the coefficients of all steps, (steps, 7): the fields of `Steps` after the timestep.

        Call it once the scheduler is configured: an analytic variance is part of it.
        """
        return np.array([self._coefficients(row) for row in range(len(self))])

    def _coefficients(self, row: int) -> list[float]:
        """Return one row of the table.

        The posterior variance of the last step is 0; the one of the step before replaces it. An analytic variance needs
        no replacement.
        """
        step, scheduler = self.transitions[row], self.scheduler
        is_last = step.previous_timestep < 0
        small = self.transitions[row - 1].posterior_variance if is_last and row > 0 else step.posterior_variance
        log_small, log_large = math.log(small or step.beta), math.log(step.beta)  # small is 0 if there is one step only
        if scheduler.analytic_variance:
            variance = scheduler.fixed_variance(step)
            log_fixed = math.log(max(variance, MIN_DECODER_VARIANCE) if is_last else variance)
        else:
            log_fixed = log_large if scheduler.variance_type.startswith("fixed_large") and not is_last else log_small
        coefficients = gaussian.reverse_mean_coefficients(step, 1.0)
        alpha, sigma = math.sqrt(step.alpha_bar), math.sqrt(1 - step.alpha_bar)
        return [alpha, sigma, *coefficients, log_small, log_large, log_fixed]

    def steps(self, table: FloatArray, rows: NDArray[np.int64]) -> Steps:
        """Return the steps of a batch.

        Args:
            table: Returned by `table`.
            rows: Index of each step, int64 (batch,).
        """
        columns = to_device(table[rows].T, self.device).view(table.shape[1], -1, 1, 1, 1)
        return Steps(to_device(self.timesteps[rows], self.device), *columns)

    def predict(self, x_t: torch.Tensor, steps: Steps, class_labels: torch.Tensor | None) -> Prediction:
        """Evaluate the network on states (batch, channels, height, width)."""
        if not self.pipeline.config.get("self_conditioned"):
            return self._predict(x_t, x_t, steps, class_labels)
        x_0 = torch.zeros_like(x_t)
        x_0 = self._predict(torch.cat([x_t, x_0], dim=1), x_t, steps, class_labels).x_0
        return self._predict(torch.cat([x_t, x_0], dim=1), x_t, steps, class_labels)

    def _predict(
        self, network_input: torch.Tensor, x_t: torch.Tensor, steps: Steps, class_labels: torch.Tensor | None
    ) -> Prediction:
        unet: Any = self.pipeline.unet
        network_input = network_input.to(unet.dtype)
        output = unet(network_input, steps.timestep, class_labels=class_labels, return_dict=False)[0]
        prediction, variance = self.scheduler.split_variance(output.to(x_t.dtype), x_t)
        prediction_type = self.scheduler.config.prediction_type
        x_0 = gaussian.predict_x_0(prediction_type, prediction, x_t, steps.alpha, steps.sigma)
        eps = gaussian.predict_eps(prediction_type, prediction, x_t, steps.alpha, steps.sigma)
        return Prediction(self.scheduler.clip(x_0), eps, variance)

    def term(
        self, x_0: torch.Tensor, x_t: torch.Tensor, prediction: Prediction, steps: Steps, last: NDArray[np.int64]
    ) -> torch.Tensor:
        """Return the terms of the bound in nats per value: L_{t-1}, or L_0 in the last step.

        Eq. 5, 7 and 13, Ho et al. 2020, for any two timesteps. x_0 is clipped as in sampling; the training loss
        (training/loss.py) does not clip it.

        Args:
            x_0: Images (batch, channels, height, width).
            x_t: Their states.
            prediction: Returned by `predict`.
            steps: The steps.
            last: Positions in the batch whose step is the last one.
        """
        true_mean = gaussian.posterior_mean(x_0, x_t, steps.coef_x_0, steps.coef_x_t)
        mean = gaussian.posterior_mean(prediction.x_0, x_t, steps.coef_x_0, steps.coef_x_t)
        log_variance = self._log_variance(prediction, steps)
        nats = gaussian.normal_kl(true_mean, steps.log_small, mean, log_variance)
        if len(last):
            index = to_device(last, self.device)
            if self.pipeline.vae is None:
                nats[index] = -gaussian.discretized_log_likelihood(x_0[index], mean[index], log_variance[index])
            else:  # the density of z = mean + std x_0
                std = self.pipeline.latent_statistics[1].to(nats)
                nats[index] = std.log() - gaussian.normal_log_density(x_0[index], mean[index], log_variance[index])
        return nats

    def _log_variance(self, prediction: Prediction, steps: Steps) -> torch.Tensor:
        if prediction.variance is None:
            return steps.log_fixed
        return gaussian.reverse_log_variance(
            self.scheduler.variance_type, prediction.variance, steps.log_small, steps.log_large
        )

    def prior(self, x_0: torch.Tensor) -> torch.Tensor:
        """Return KL(q(x_T | x_0) || N(0, 1)) in nats per value; it does not depend on the network."""
        alpha_bar = torch.tensor(self.transitions[0].alpha_bar, dtype=x_0.dtype, device=x_0.device)
        return gaussian.normal_kl(
            alpha_bar.sqrt() * x_0, torch.log1p(-alpha_bar), torch.zeros_like(x_0), torch.zeros_like(x_0)
        )

    def load(
        self, images: ImageSet, positions: NDArray[np.int64], seed: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return x_0 in float64, and the labels of a class-conditional network, on its device.

        Args:
            images: Images, which are scaled to [-1, 1], or encoded if the network is one of latents.
            positions: Positions of the images, int64 (batch,).
            seed: The latents of image i are a function of (seed, i).
        """
        pixels, labels = images.take(positions)
        if self.pipeline.vae is None:
            x_0 = normalize(to_device(pixels, self.device), value_range=images.value_range).double()
        else:
            x_0 = self._encode(images, positions, seed).to(self.device).double()
        if not self.pipeline.num_classes or labels is None:
            return x_0, None
        return x_0, to_device(labels, self.device)

    def _encode(self, images: ImageSet, positions: NDArray[np.int64], seed: int) -> torch.Tensor:
        """Return normalized latents of images on the CPU; each image is encoded once."""
        if images is not self._images:
            self._latents.clear()
            self._images = images
        missing = np.array([one for one in np.unique(positions) if (seed, one) not in self._latents], np.int64)
        if len(missing):
            pixels = normalize(to_device(images.take(missing)[0], self.device), value_range=images.value_range)
            mean, std = latents.encode_moments(self.pipeline.vae, pixels)
            noise = normal_by_pair(seed, "latents", np.zeros_like(missing), missing, mean.shape[1:], self.device)
            states = latents.normalize(mean + std * noise, self.pipeline.latent_statistics).cpu()
            self._latents |= {(seed, int(one)): state for one, state in zip(missing, states, strict=True)}
        return torch.stack([self._latents[seed, int(one)] for one in positions])


def check_bound(process: ReverseProcess, images: ImageSet, num_terms: int | None) -> None:
    """Raise ValueError if `variational_bound` cannot be computed; does not call the network."""
    num_channels = process.pipeline.num_channels
    has_8_bits = images.images.dtype == np.uint8 and images.value_range in (None, (0, 255))
    if process.pipeline.vae is None and not has_8_bits:
        values = "a value range" if images.images.dtype == np.uint8 else f"{images.images.dtype} values"
        raise ValueError(f"the images have {values}; bits per dimension need 8-bit images, so leave the metric out.")
    if len(images) == 0:
        raise ValueError("there are no images to compute bits per dimension of.")
    if images.image_shape[0] != num_channels:
        raise ValueError(
            f"the images have {images.image_shape[0]} channels and the network {num_channels}; set data.num_channels."
        )
    _check_labels(process, images)
    if num_terms is not None and not 2 <= num_terms <= len(process):
        raise ValueError(
            f"num_terms is {num_terms}; it must be between 2 and {len(process)}, the number of reverse steps."
        )


def _check_labels(process: ReverseProcess, images: ImageSet) -> None:
    num_classes = process.pipeline.num_classes
    if num_classes and (images.labels is None or images.labels[images.rows].max() >= num_classes):
        raise ValueError(
            f"the network has {num_classes} classes, so each image needs a label from 0 to {num_classes - 1}; set "
            "data.label_column."
        )


@torch.no_grad()
def variational_bound(
    process: ReverseProcess, images: ImageSet, *, seed: int, num_terms: int | None = None, batch_size: int = 64
) -> VariationalBound:
    """Collective: compute the variational bound of each image; the processes share the images.

    Args:
        process: The reverse process.
        images: 8-bit images; cropped from the center, never mirrored.
        seed: The noise of image i at timestep t is a function of (seed, t, i).
        num_terms: Terms to compute per image: the decoder term, and others drawn evenly from the reverse steps, which
            estimate the bound without bias. None computes all terms.
        batch_size: Pairs of an image and a timestep per forward pass.

    Raises:
        ValueError: The images do not have 8 bits or their labels and channels do not fit the network, or `num_terms` is
            not between 2 and the number of steps.
    """
    check_bound(process, images, num_terms)
    num_steps, mine = len(process), distributed.rank_range(len(images))
    sums = np.zeros((4, num_steps))  # nats, squared error of x_0, squared error of eps, number of images
    totals, priors = np.zeros(len(mine)), np.zeros(len(mine))
    for positions in _batches(mine, batch_size):
        x_0, _ = process.load(images, np.asarray(positions), seed)
        priors[positions.start - mine.start : positions.stop - mine.start] = _means(process.prior(x_0)).cpu().numpy()
    table, batches = process.table(), _pairs_of_bound(num_steps, num_terms, seed, mine, batch_size)
    bar = tqdm(total=len(mine) * (num_terms or num_steps), desc="Bits per dimension", disable=None, leave=False)
    with eval_mode(process.pipeline.unet), bar:
        while some := list(islice(batches, _BATCHES_PER_READ)):
            measured = []
            for pairs in some:
                measured.append(_term_and_errors(process, table, images, pairs, seed))
                bar.update(len(pairs))
            pairs, values = _join(some), torch.cat(measured, dim=1).cpu().numpy()
            np.add.at(totals, pairs.images - mine.start, pairs.weights * values[0])
            np.add.at(sums.T, pairs.rows, np.stack([*values, np.ones(len(pairs))], axis=1))
    totals, priors = (totals + priors) / math.log(2), priors / math.log(2)
    sums[0] /= math.log(2)
    sums = distributed.gather_rows(sums[None]).sum(axis=0)
    totals, priors = distributed.gather_rows(totals), distributed.gather_rows(priors)
    counts = sums[3]
    terms, x_0_mse, eps_mse = sums[:3] / np.maximum(counts, 1)
    return VariationalBound(
        timesteps=tuple(step.timestep for step in process.transitions),
        prior=float(priors.mean()),
        terms=terms,
        x_0_mse=x_0_mse,
        eps_mse=eps_mse,
        counts=counts.astype(np.int64),
        totals=totals,
        is_of_latents=process.pipeline.vae is not None,
    )


def term_weights(num_steps: int, num_terms: int | None, seed: int, positions: range) -> FloatArray:
    """Return the weight of each term in the bound of each image, (steps, images); terms of weight 0 are not computed.

    The decoder term is always computed. Of the other terms, each image draws one from each of `num_terms` - 1 equal
    parts of the reverse process, with the size of the part as its weight.
    """
    if num_terms is None or num_terms == num_steps:
        return np.ones((num_steps, len(positions)))
    weights = np.zeros((num_steps, len(positions)))
    weights[-1] = 1
    borders = np.linspace(0, num_steps - 1, num_terms).round().astype(int)
    sizes = np.diff(borders)
    for column, position in enumerate(positions):
        offsets = numpy_generator(seed, "bound_terms", position).random(num_terms - 1)
        weights[borders[:-1] + (offsets * sizes).astype(int), column] = sizes
    return weights


@dataclass(frozen=True)
class _Pairs:
    """Some (step, image) pairs, whose terms of the bound are computed; all arrays have shape (pairs,).

    Args:
        rows: Index of the reverse step, int64.
        images: Position of the image, int64.
        weights: Weight of the term in the bound of its image.
    """

    rows: NDArray[np.int64]
    images: NDArray[np.int64]
    weights: FloatArray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice) -> "_Pairs":
        """Return some of the pairs."""
        return _Pairs(self.rows[index], self.images[index], self.weights[index])


def _join(parts: Sequence[_Pairs]) -> _Pairs:
    names = ("rows", "images", "weights")
    return _Pairs(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _pairs_of_bound(
    num_steps: int, num_terms: int | None, seed: int, images: range, batch_size: int
) -> Iterator[_Pairs]:
    """Yield the pairs of the bound of some images in batches; only the last one may be smaller than `batch_size`.

    Pairs of one step are neighbors, so that they share draws of noise.
    """
    rest = _Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    for positions in _batches(images, _IMAGES_PER_TABLE):
        weights = term_weights(num_steps, num_terms, seed, positions)
        rows, columns = np.nonzero(weights)
        rest = _join([rest, _Pairs(rows, columns + positions.start, weights[rows, columns])])
        num_ready = len(rest) if positions.stop == images.stop else len(rest) // batch_size * batch_size
        for batch in _batches(range(num_ready), batch_size):
            yield rest[batch.start : batch.stop]
        rest = rest[num_ready:]


def _term_and_errors(
    process: ReverseProcess, table: FloatArray, images: ImageSet, pairs: _Pairs, seed: int
) -> torch.Tensor:
    """Return the terms in nats and the squared errors of x_0 and eps, float64 (3, pairs), on the device."""
    x_0, labels = process.load(images, pairs.images, seed)
    steps, timesteps = process.steps(table, pairs.rows), process.timesteps[pairs.rows]
    noise = normal_by_pair(seed, "bound_noise", timesteps, pairs.images, x_0.shape[1:], process.device).double()
    x_t = gaussian.q_sample(x_0, noise, steps.alpha, steps.sigma)
    prediction = process.predict(x_t, steps, labels)
    term = process.term(x_0, x_t, prediction, steps, np.flatnonzero(pairs.rows == len(process) - 1))
    errors = [(prediction.x_0 - x_0) ** 2, (prediction.eps - noise) ** 2]
    return torch.stack([_means(values) for values in (term, *errors)])


def _means(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of each image."""
    return values.flatten(1).mean(dim=1)


def check_second_moments(pipeline: GaussianDiffusionPipeline, images: ImageSet) -> ReverseProcess:
    """Check that a pipeline can use second moments, without calling the network, and return its reverse process.

    Raises:
        ValueError: The scheduler or its variance does not support them, or the images lack the labels of the network.
    """
    process = ReverseProcess(pipeline)
    _check_labels(process, images)
    # The scheduler checks its variance type when moments are set.
    type(process.scheduler).from_config(process.scheduler.config).eps_second_moments = torch.ones(len(process))
    return process


@torch.no_grad()
def estimate_second_moments(
    pipeline: GaussianDiffusionPipeline, images: ImageSet, *, seed: int, num_images: int, batch_size: int = 64
) -> torch.Tensor:
    """Collective: estimate Gamma_t = E |eps(x_t)|^2 / d at every training timestep. Eq. 8, Bao et al. 2022.

    The processes share the timesteps; their number and the batch size change the rounding of the network only. Images
    are used in a random order, because many data sets are sorted by class; each timestep uses the next `num_images`.

    Args:
        pipeline: The network and the scheduler.
        images: Training images: the network predicts the noise of validation images less well.
        seed: Seed of the noise and of the order of the images.
        num_images: Images per timestep.
        batch_size: Pairs of an image and a timestep per forward pass.

    Returns:
        float64 (T,), for `scheduler.eps_second_moments`.

    Raises:
        ValueError: See `check_second_moments`.
    """
    process = check_second_moments(pipeline, images)
    rows, table = distributed.rank_range(len(process)), process.table()
    order = numpy_generator(seed, "moments_images").permutation(len(images))
    squares = []
    with eval_mode(pipeline.unet), tqdm(total=len(rows), desc="Second moments", disable=None, leave=False) as bar:
        for batch in _batches(range(rows.start * num_images, rows.stop * num_images), batch_size):
            positions = np.asarray(batch)
            x_0, labels = process.load(images, order[positions % len(images)], seed)
            steps = process.steps(table, positions // num_images)
            noise = normal_by_position(seed, "moments", 0, batch, x_0.shape[1:], process.device).double()
            eps = process.predict(gaussian.q_sample(x_0, noise, steps.alpha, steps.sigma), steps, labels).eps
            squares.append(_means(eps**2))
            bar.update(batch.stop // num_images - batch.start // num_images)
    values = torch.cat(squares).cpu().numpy() if squares else np.zeros(0)
    moments = values.reshape(len(rows), num_images).mean(axis=1)
    return torch.from_numpy(distributed.gather_rows(moments)[::-1].copy())  # transitions descend from T-1 to 0


def _batches(items: range, batch_size: int) -> Iterator[range]:
    for start in range(items.start, items.stop, batch_size):
        yield range(start, min(start + batch_size, items.stop))
