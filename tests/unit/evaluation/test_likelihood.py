"""Bits per dimension and second moments equal integrals, sums and constants computed without the code under test."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf.config import ObjectiveConfig
from ddpm_hf.data import ImageSet
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.diffusion.gaussian import q_sample
from ddpm_hf.evaluation import likelihood
from ddpm_hf.evaluation.likelihood import (
    Prediction,
    ReverseProcess,
    VariationalBound,
    estimate_second_moments,
    term_weights,
    variational_bound,
)
from ddpm_hf.rng import normal_by_position
from ddpm_hf.training.loss import DenoisingLoss
from tests.conftest import tiny_unet
from tests.unit.evaluation.gaussian_pipeline import (
    DEVIATION,
    GaussianUnet,
    best_x_0,
    gaussian_images,
    gaussian_pipeline,
)
from tests.unit.evaluation.ranks import Ranks

SEED = 3
ALPHA_BARS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
SHORT = [999, 700, 300, 40, 3, 0]


def reverse_variance(kind: str, step: int, timesteps: list[int]) -> float:
    """Section 3.2 of DDPM and Eq. 15 of improved DDPM; a posterior variance of 0 is replaced by the one before."""
    bars = [*(ALPHA_BARS[t] for t in timesteps), 1.0]
    beta = 1 - bars[step] / bars[step + 1]
    is_last = step == len(timesteps) - 1
    row = step - 1 if is_last else step
    small = (1 - bars[row + 1]) / (1 - bars[row]) * (1 - bars[row] / bars[row + 1])
    if kind == "learned":
        return math.exp(GaussianUnet.V)
    if kind == "learned_range":
        return math.exp((GaussianUnet.V + 1) / 2 * math.log(beta) + (1 - GaussianUnet.V) / 2 * math.log(small))
    return beta if kind == "fixed_large" and not is_last else small


def bits_by_integration(
    x_0: float, noise: dict[int, float], kind: str, timesteps: list[int]
) -> tuple[float, list[float]]:
    """Eq. 5 of DDPM for one pixel, every divergence and probability by quadrature."""
    final = ALPHA_BARS[timesteps[0]]
    prior = divergence(math.sqrt(final) * x_0, 1 - final, 0.0, 1.0)
    terms = []
    for step, t in enumerate(timesteps):
        now, then = ALPHA_BARS[t], ALPHA_BARS[timesteps[step + 1]] if step + 1 < len(timesteps) else 1.0
        x_t = math.sqrt(now) * x_0 + math.sqrt(1 - now) * noise[t]
        guess = float(best_x_0(x_t, now)) + GaussianUnet.OFFSET
        beta = 1 - now / then
        variance = reverse_variance(kind, step, timesteps)

        def mean(x: float, x_t: float = x_t, now: float = now, then: float = then, beta: float = beta) -> float:
            return (math.sqrt(then) * beta * x + math.sqrt(1 - beta) * (1 - then) * x_t) / (1 - now)

        if step + 1 < len(timesteps):
            terms.append(divergence(mean(x_0), (1 - then) / (1 - now) * beta, mean(guess), variance))
        else:
            low, high = (-math.inf if x_0 == -1 else x_0 - 1 / 255), (math.inf if x_0 == 1 else x_0 + 1 / 255)
            model = stats.norm(mean(guess), math.sqrt(variance))
            probability = model.sf(low) - model.sf(high) if low > mean(guess) else model.cdf(high) - model.cdf(low)
            terms.append(-math.log(probability))
    return prior / math.log(2), [nats / math.log(2) for nats in terms]


def divergence(mean: float, variance: float, other_mean: float, other_variance: float) -> float:
    """KL of two Gaussians, integrated."""

    def log_density(x: float, mean: float, variance: float) -> float:
        return -((x - mean) ** 2) / (2 * variance) - math.log(2 * math.pi * variance) / 2

    def integrand(x: float) -> float:
        truth = log_density(x, mean, variance)
        return math.exp(truth) * (truth - log_density(x, other_mean, other_variance))

    reach = 10 * math.sqrt(variance)
    return float(integrate.quad(integrand, mean - reach, mean + reach, epsabs=1e-13)[0])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", VARIANCES)
def test_the_bound_of_a_gaussian_is_the_integral(kind: str, prediction_type: str) -> None:
    """To 1e-6 of each term, in float64: the precision of the quadrature and the tables."""
    images = gaussian_images(4)
    pipeline = gaussian_pipeline(variance_type=kind, prediction_type=prediction_type)
    bound = variational_bound(ReverseProcess(pipeline, SHORT), images, seed=SEED, batch_size=3)
    priors, terms = [], []
    for image in range(4):
        for pixel in range(2):
            x_0 = float(images.images[image, 0, 0, pixel]) / 127.5 - 1
            here = range(image, image + 1)
            drawn = {
                t: float(normal_by_position(SEED, "bound_noise", t, here, (1, 1, 2), "cpu")[0, 0, 0, pixel])
                for t in SHORT
            }
            prior, bits = bits_by_integration(x_0, drawn, kind, SHORT)
            priors.append(prior)
            terms.append(bits)
    np.testing.assert_allclose(bound.terms, np.mean(terms, axis=0), rtol=1e-6)
    assert bound.prior == pytest.approx(np.mean(priors), rel=1e-6)
    assert bound.bits_per_dim == pytest.approx(np.mean(priors) + np.sum(np.mean(terms, axis=0)), rel=1e-6)
    each = np.reshape(np.sum(terms, axis=1) + priors, (4, 2)).mean(axis=1)
    assert bound.standard_error == pytest.approx(each.std(ddof=1) / 2, rel=1e-6)


@pytest.mark.parametrize("kind", VARIANCES)
def test_training_and_evaluation_agree_on_a_process_of_one_step(kind: str) -> None:
    """There is no t = 1 whose variance could replace the one at t = 0; training has the precision of float32."""
    pipeline = gaussian_pipeline(num_train_timesteps=1, trained_betas=[0.3], variance_type=kind)
    process = ReverseProcess(pipeline)
    steps = process.steps(process.table(), np.zeros(1, np.int64))
    x_0 = torch.tensor([-1.0, 2 * 100 / 255 - 1, 1.0]).view(1, 1, 1, 3)
    noise = torch.tensor([0.5, -1.0, 0.1]).view(1, 1, 1, 3)
    x_t = q_sample(x_0.double(), noise.double(), steps.alpha, steps.sigma)
    term = process.term(x_0.double(), x_t, process.predict(x_t, steps, None), steps, np.array([0]))
    evaluated = term.mean() / math.log(2)
    trained = DenoisingLoss(pipeline.scheduler, ObjectiveConfig(loss="vlb"))(
        lambda sample, timestep, labels, *, return_dict: pipeline.unet(sample.double(), timestep),
        x_0, noise, torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    assert trained.item() == pytest.approx(evaluated.item(), rel=1e-5)


def test_the_prior_costs_what_the_paper_says() -> None:
    """Section 4.1 of DDPM: about 1e-5 bits per dimension; 1.16e-5 where the mean of x_0^2 is 0.4."""
    process = ReverseProcess(gaussian_pipeline())
    bits = process.prior(torch.tensor([[[[0.4**0.5]]]], dtype=torch.float64)).item() / math.log(2)
    assert bits == pytest.approx(1.16e-5, rel=5e-3)


def test_rate_and_distortion_are_those_of_a_progressive_code() -> None:
    """The rate before x_t is the prior and the terms above it; the distortion is on the scale of gray levels."""
    bound = variational_bound(ReverseProcess(gaussian_pipeline(), SHORT), gaussian_images(6), seed=0)
    assert bound.rate[0] == bound.prior
    assert bound.rate[-1] + bound.terms[-1] == pytest.approx(bound.bits_per_dim, rel=1e-12)
    np.testing.assert_allclose(bound.distortion**2 / 127.5**2, bound.x_0_mse)
    assert bound.distortion[0] > bound.distortion[-1] > 0


def test_the_errors_of_a_perfect_network_are_the_posterior_variances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Var(x_0 | x_t) of Gaussian data; four standard errors, sqrt(2 / n), of a mean of n squares."""
    monkeypatch.setattr(GaussianUnet, "OFFSET", 0.0)
    images = gaussian_images(300, (4, 4))
    bound = variational_bound(ReverseProcess(gaussian_pipeline((4, 4)), SHORT), images, seed=0)
    bars, scale = ALPHA_BARS[SHORT], (images.images / 127.5 - 1).std() ** 2
    left = scale * (1 - bars) / (bars * scale + 1 - bars)
    np.testing.assert_allclose(bound.x_0_mse, left, rtol=4 * math.sqrt(2 / 4800) + 0.05)
    np.testing.assert_allclose(bound.eps_mse, left * bars / (1 - bars), rtol=4 * math.sqrt(2 / 4800) + 0.05)


def test_the_bound_depends_on_neither_batches_nor_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-12: the order of additions."""
    images = gaussian_images(7)
    whole = variational_bound(ReverseProcess(gaussian_pipeline(), SHORT), images, seed=SEED, batch_size=7)
    processes = [ReverseProcess(gaussian_pipeline(), SHORT) for _ in range(2)]
    joined, other = Ranks(monkeypatch, 2).run(
        lambda rank: variational_bound(processes[rank], images, seed=SEED, batch_size=2)
    )
    np.testing.assert_array_equal(joined.totals, other.totals)
    np.testing.assert_allclose(joined.totals, whole.totals, rtol=1e-12)
    np.testing.assert_allclose(joined.terms, whole.terms, rtol=1e-12)
    np.testing.assert_array_equal(joined.counts, [7] * len(SHORT))


def sizes_of_batches(pipeline: GaussianDiffusionPipeline) -> list[int]:
    """Return a list to which each call of the network adds its batch size."""
    sizes: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    return sizes


@pytest.mark.parametrize(("num_terms", "num_pairs"), [(4, 36), (None, 540)])
def test_the_network_is_called_with_full_batches(
    monkeypatch: pytest.MonkeyPatch, num_terms: int | None, num_pairs: int
) -> None:
    """Of 60 steps and 9 images, which do not fit the batches, and also with a table of a few images at a time."""
    bounds = []
    for images_per_table in (1024, 5):
        monkeypatch.setattr(likelihood, "_IMAGES_PER_TABLE", images_per_table)
        pipeline = gaussian_pipeline(num_train_timesteps=60)
        sizes = sizes_of_batches(pipeline)
        images = gaussian_images(9)
        bounds.append(variational_bound(ReverseProcess(pipeline), images, seed=0, num_terms=num_terms, batch_size=16))
        assert sizes == [16] * (num_pairs // 16) + [num_pairs % 16]
        assert bounds[-1].counts.sum() == num_pairs
    np.testing.assert_allclose(bounds[0].totals, bounds[1].totals, rtol=1e-12)


def test_the_moments_call_the_network_with_full_batches() -> None:
    pipeline = gaussian_pipeline(num_train_timesteps=7)
    sizes = sizes_of_batches(pipeline)
    estimate_second_moments(pipeline, gaussian_images(9), seed=0, num_images=5, batch_size=16)
    assert sizes == [16, 16, 3]


def test_the_host_reads_the_device_once_in_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 600 pairs in 150 batches: every 64 batches, and the priors of each batch of images."""
    reads: list[str] = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: reads.append("cpu") or cpu(tensor))

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                reads.append(str(func))
            return func(*args, **(kwargs or {}))

    process = ReverseProcess(gaussian_pipeline(num_train_timesteps=60))
    with Reads():
        variational_bound(process, gaussian_images(10), seed=0, batch_size=4)
    assert reads == ["cpu"] * (3 + 3)


@pytest.mark.parametrize(("num_steps", "num_terms"), [(1000, 10), (50, 7), (6, 2), (6, 6)])
def test_an_estimate_of_a_few_terms_counts_each_term_once_on_average(num_steps: int, num_terms: int) -> None:
    """The mean weight of a term is 1: four standard errors of the mean of 5,000 draws of a weight w with odds 1 / w."""
    weights = term_weights(num_steps, num_terms, 0, range(5_000))
    assert ((weights > 0).sum(axis=0) == num_terms).all()
    assert (weights.sum(axis=0) == num_steps).all()
    assert (weights[-1] == 1).all()
    width = weights.max()
    np.testing.assert_allclose(weights.mean(axis=1), 1, atol=4 * math.sqrt((width - 1) / 5_000) + 1e-12)


def test_an_estimate_of_a_few_terms_evaluates_only_these() -> None:
    bound = variational_bound(ReverseProcess(gaussian_pipeline()), gaussian_images(9), seed=0, num_terms=4)
    assert bound.counts.sum() == 9 * 4
    assert bound.counts[-1] == 9
    assert len(bound.terms) == 1000


def test_the_bound_clips_what_sampling_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prediction above 1 for a white pixel costs nothing once it is clipped to 1, but for the decoder."""
    monkeypatch.setattr(GaussianUnet, "OFFSET", 5.0)
    white = ImageSet(np.full((1, 1, 1, 2), 255, np.uint8), None, None, np.arange(1))
    costs = [
        variational_bound(ReverseProcess(gaussian_pipeline(clip_sample=clip), SHORT), white, seed=0).terms[:-1]
        for clip in (True, False)
    ]
    assert (costs[0] < 1e-12).all()
    assert (costs[1] > 1e-3).all()


def test_a_self_conditioned_network_is_called_with_its_prediction() -> None:
    pipeline = GaussianDiffusionPipeline(
        tiny_unet(self_conditioned=True), GaussianDiffusionScheduler(), self_conditioned=True
    )
    seen: list[torch.Tensor] = []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    process = ReverseProcess(pipeline, [500])
    with torch.no_grad():
        process.predict(x_t, process.steps(process.table(), np.zeros(2, np.int64)), None)
    first, second = seen
    assert (first[:, 1:] == 0).all()
    assert 0 < second[:, 1:].abs().max() <= 1
    torch.testing.assert_close(first[:, :1], second[:, :1])


def test_the_mode_of_the_network_is_restored_and_no_global_noise_is_drawn() -> None:
    pipeline = gaussian_pipeline()
    pipeline.unet.train()
    state = torch.get_rng_state()
    variational_bound(ReverseProcess(pipeline, [5, 0]), gaussian_images(3), seed=0)
    assert pipeline.unet.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("images", "options", "sentence"),
    [
        (np.zeros((2, 1, 1, 2), np.uint16), {}, "the images have uint16 values; bits per dimension need 8-bit"),
        (np.zeros((0, 1, 1, 2), np.uint8), {}, "there are no images"),
        (np.zeros((2, 3, 1, 2), np.uint8), {}, "the images have 3 channels and the network 1"),
        (np.zeros((2, 1, 1, 2), np.uint8), {"num_terms": 1}, "num_terms is 1; it must be between 2 and 1000"),
        (np.zeros((2, 1, 1, 2), np.uint8), {"timesteps": [0, 5]}, "timesteps must be strictly descending"),
    ],
)
def test_images_without_bits_per_dimension_are_refused(
    images: np.ndarray, options: dict[str, Any], sentence: str
) -> None:
    image_set = ImageSet(images, None, None, np.arange(len(images)))
    timesteps, num_terms = options.get("timesteps"), options.get("num_terms")
    with pytest.raises(ValueError, match=sentence):
        variational_bound(ReverseProcess(gaussian_pipeline(), timesteps), image_set, seed=0, num_terms=num_terms)


def test_noise_prediction_without_signal_is_refused() -> None:
    """By the bound and the estimate of the moments, with the message of sampling; a later start is fine."""
    scheduler = GaussianDiffusionScheduler(prediction_type="epsilon", rescale_betas_zero_snr=True)
    pipeline = GaussianDiffusionPipeline(tiny_unet(), scheduler)
    with pytest.raises(ValueError, match="x_999 holds no signal") as refusal:
        scheduler.step(torch.zeros(1, 1, 8, 8), 999, torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"x_999 holds no signal, .* use prediction_type v_prediction or") as refused:
        ReverseProcess(pipeline)
    assert str(refused.value) == str(refusal.value)
    with pytest.raises(ValueError, match="x_999 holds no signal"):
        estimate_second_moments(pipeline, gaussian_images(2, (8, 8)), seed=0, num_images=1)
    assert len(ReverseProcess(pipeline, [998, 0])) == 2


def test_a_network_with_classes_needs_labels() -> None:
    pipeline = GaussianDiffusionPipeline(tiny_unet(num_class_embeds=3), GaussianDiffusionScheduler())
    images = np.zeros((2, 1, 8, 8), np.uint8)
    for labels in (None, np.array([0, 3])):
        with pytest.raises(ValueError, match="each image needs a label from 0 to 2"):
            variational_bound(ReverseProcess(pipeline, [0]), ImageSet(images, labels, None, np.arange(2)), seed=0)
    labeled = ImageSet(images, np.array([0, 2]), None, np.arange(2))
    bound = variational_bound(ReverseProcess(pipeline, [0]), labeled, seed=0)
    assert len(bound.totals) == 2


def a_bound(num_steps: int) -> VariationalBound:
    counts = np.arange(num_steps) % 3
    terms = np.linspace(1, 2, num_steps) * (counts > 0)
    return VariationalBound(tuple(range(num_steps))[::-1], 0.5, terms, terms, terms, counts, np.ones(4))


def test_the_rate_interpolates_terms_that_were_not_computed() -> None:
    """The rate interpolates it: for terms that rise evenly, it is the rate of all terms."""
    bound = a_bound(7)
    everything = np.linspace(1, 2, 7)
    everything[0] = everything[1]  # before the first known term, the first one is used
    everything[6] = everything[5]
    np.testing.assert_allclose(bound.rate, 0.5 + np.concatenate([[0], np.cumsum(everything[:-1])]))


def test_moments_are_estimated() -> None:
    """Four standard errors of a mean of n squares of normal values, and the rounding to 8 bits at t = 0."""
    pipeline = gaussian_pipeline((4, 4), num_train_timesteps=40, beta_end=0.4)
    object.__setattr__(pipeline.unet, "OFFSET", 0.0)
    images = gaussian_images(64, (4, 4))
    moments = estimate_second_moments(pipeline, images, seed=0, num_images=64, batch_size=10)
    bars = pipeline.scheduler.noise_schedule.alphas_cumprod
    spread = float((images.images / 127.5 - 1).var())
    # The network takes DEVIATION^2 for the variance, the images have another: x_t has the one, its gain the other.
    gain = bars * DEVIATION**2 / (bars * DEVIATION**2 + 1 - bars)
    expected = (bars * spread + 1 - bars) * (1 - gain) ** 2 / (1 - bars)
    torch.testing.assert_close(moments, expected, rtol=4 * math.sqrt(2 / 1024) + 0.02, atol=0)


def test_each_timestep_uses_images_of_all_classes_of_a_sorted_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network returns x_t, nearly x_0 here: 0 for the gray class, 1 for the white class, 1/2 on average.

    20 of 40 images, drawn without replacement, hold 10 white ones with a standard deviation of 1.6: four are allowed.
    """
    pipeline = gaussian_pipeline((4, 4), num_train_timesteps=8, beta_start=1e-6, beta_end=1e-6)
    monkeypatch.setattr(GaussianUnet, "forward", lambda _, sample, *__, **___: (sample,))
    pixels = np.repeat([128, 255], 20).astype(np.uint8)[:, None, None, None] * np.ones((1, 1, 4, 4), np.uint8)
    images = ImageSet(pixels, None, None, np.arange(40))
    moments = estimate_second_moments(pipeline, images, seed=0, num_images=20)
    torch.testing.assert_close(moments, torch.full_like(moments, 0.5), rtol=0, atol=4 * 1.6 / 20)


def test_processes_share_the_timesteps_and_the_moments_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    images = gaussian_images(9, (4, 4))
    seen: dict[int, int] = {}

    def estimate(rank: int) -> torch.Tensor:
        pipeline = gaussian_pipeline((4, 4), num_train_timesteps=7)
        pipeline.unet.register_forward_pre_hook(
            lambda _, inputs: seen.update({rank: seen.get(rank, 0) + len(inputs[0])})
        )
        return estimate_second_moments(pipeline, images, seed=0, num_images=5, batch_size=2)

    alone = estimate(-1)
    for moments in Ranks(monkeypatch, 3).run(estimate):
        assert torch.equal(moments, alone)
    assert seen == {-1: 35, 0: 10, 1: 10, 2: 15}


def test_an_analytic_decoder_variance_of_zero_is_a_twentieth_of_a_gray_level() -> None:
    """A second moment of 1 means that x_0 is known exactly; the decoder term is then that of an exact prediction."""
    pipeline = gaussian_pipeline(variance_type="fixed_small")
    pipeline.scheduler.eps_second_moments = torch.ones(1000)
    pipeline.scheduler.analytic_variance = True
    process = ReverseProcess(pipeline, SHORT)
    steps = process.steps(process.table(), np.array([len(process) - 1]))
    assert pipeline.scheduler.fixed_variance(process.transitions[-1]) == 0
    x_0 = torch.full((1, 1, 1, 2), 2 * 100 / 255 - 1, dtype=torch.float64)
    exact, at_the_edge, outside = (
        process.term(x_0, x_0, Prediction(x_0 + offset / 127.5, x_0, None), steps, np.array([0])).mean().item()
        for offset in (0, 0.5, 0.7)
    )
    assert exact == pytest.approx(0, abs=1e-5)
    assert at_the_edge == pytest.approx(math.log(2), rel=1e-3)
    assert outside == pytest.approx(-stats.norm.logsf(0.2 / 0.05), rel=1e-3)


def test_the_analytic_variance_lowers_the_bound_of_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the moments of the best prediction for N(m, DEVIATION^2): 1 - Var(eps | x_t)."""
    moments = (1 - ALPHA_BARS) / (ALPHA_BARS * DEVIATION**2 + 1 - ALPHA_BARS)
    monkeypatch.setattr(GaussianUnet, "OFFSET", 0.0)
    images, timesteps = gaussian_images(50), list(range(0, 1000, 50))[::-1]
    bits = {}
    for kind in ("fixed_small", "fixed_large", "analytic"):
        pipeline = gaussian_pipeline(variance_type="fixed_small" if kind == "analytic" else kind)
        if kind == "analytic":
            pipeline.scheduler.eps_second_moments = torch.from_numpy(moments)
            pipeline.scheduler.analytic_variance = True
        bits[kind] = variational_bound(ReverseProcess(pipeline, timesteps), images, seed=0).bits_per_dim
    assert bits["analytic"] < min(bits["fixed_small"], bits["fixed_large"]) - 0.01


class ScalingVae:
    """Latents that are four times the image, plus 1."""

    config: ClassVar[dict[str, Any]] = {"latent_channels": 1, "out_channels": 1, "block_out_channels": [1]}
    dtype = torch.float32

    def __init__(self) -> None:
        self.num_encoded = 0

    def encode(self, images: torch.Tensor) -> Any:
        self.num_encoded += len(images)
        return SimpleNamespace(latents=4 * images + 1)

    def decode(self, z: torch.Tensor, return_dict: bool = True) -> Any:
        raise NotImplementedError


def test_the_bound_of_latents_is_that_of_their_density_and_encodes_each_image_once() -> None:
    """Its terms are those of the normalized latents, here the images, and the last one is a density of z = 4 x + 1."""
    images, pixels, vae = gaussian_images(4), gaussian_pipeline(), ScalingVae()
    expected = variational_bound(ReverseProcess(pixels, SHORT), images, seed=SEED)
    pipeline = GaussianDiffusionPipeline(pixels.unet, pixels.scheduler, vae=vae, latents_mean=[1.0], latents_std=[4.0])
    bound = variational_bound(ReverseProcess(pipeline, SHORT), images, seed=SEED)
    np.testing.assert_allclose(bound.terms[:-1], expected.terms[:-1], rtol=1e-4)
    assert bound.prior == pytest.approx(expected.prior, rel=1e-4)
    x_0 = images.images / 127.5 - 1
    noise = normal_by_position(SEED, "bound_noise", 0, range(4), (1, 1, 2), "cpu").numpy()
    x_t = ALPHA_BARS[0] ** 0.5 * x_0 + (1 - ALPHA_BARS[0]) ** 0.5 * noise
    deviation = reverse_variance("fixed_small", len(SHORT) - 1, SHORT) ** 0.5
    mean = best_x_0(x_t, ALPHA_BARS[0]) + GaussianUnet.OFFSET
    density = stats.norm.logpdf(4 * x_0 + 1, 4 * mean + 1, 4 * deviation)
    assert bound.terms[-1] == pytest.approx(-density.mean() / math.log(2), rel=1e-4)
    assert vae.num_encoded == len(images)
    assert bound.to_dict()["of"] == "latents"
    np.testing.assert_allclose(bound.distortion**2, bound.x_0_mse)
    few = replace(bound, counts=np.array([4, 4, 0, 0, 0, 4]), terms=np.array([1.0, 1, 0, 0, 0, -30]))
    assert (np.diff(few.rate) > 0).all()
