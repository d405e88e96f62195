"""The bound is the bound: divergences and probabilities of pixels, integrated numerically in float64."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from ddpm_hf.config import ObjectiveConfig
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.diffusion.scheduler import CHOICES
from ddpm_hf.training.loss import DenoisingLoss
from tests.conftest import tiny_unet

VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")
NAMES = tuple(map(str, CHOICES["variance_type"]))
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEPS = [0, 1, 10, 500, 999]
T = 1000
PIXELS = np.array([-1.0, 2 * 100 / 255 - 1, 1.0])
VLB, HYBRID = ObjectiveConfig(loss="vlb"), ObjectiveConfig(loss="hybrid")

BETAS = np.linspace(1e-4, 0.02, T)
ALPHA_BARS = np.cumprod(1 - BETAS)


def fixed_answer(output: torch.Tensor) -> Any:
    """Returns a network that always gives this output."""
    return lambda *_, **__: (output,)


def batch_of(variance_type: str, scale: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns an output of the network, images of three pixels, noise and timesteps; float32."""
    generator = torch.Generator().manual_seed(0)
    count, channels = len(TIMESTEPS), 2 if variance_type.startswith("learned") else 1
    output, noise = (torch.randn(count, c, 1, 3, generator=generator) for c in (channels, 1))
    output[:, 1:] = torch.rand(count, channels - 1, 1, 3, generator=generator) * 2 - 1
    output[:, :1] *= scale
    x_0 = torch.tensor(PIXELS, dtype=torch.float32).expand(count, 1, 1, 3).contiguous()
    return output, x_0, noise, torch.tensor(TIMESTEPS)


def true_posterior(x_0: float, x_t: float, t: int) -> tuple[float, float]:
    """Mean and variance of q(x_{t-1} | x_t, x_0), Eq. 6 and 7 of Ho et al. 2020."""
    alpha_bar, before, beta = ALPHA_BARS[t], ALPHA_BARS[t - 1] if t else 1.0, BETAS[t]
    mean = (math.sqrt(before) * beta * x_0 + math.sqrt(1 - beta) * (1 - before) * x_t) / (1 - alpha_bar)
    return mean, (1 - before) / (1 - alpha_bar) * beta


def model_variance(variance_type: str, answer: float, t: int) -> float:
    """The reverse variance; where the posterior's is 0, that of t = 1 takes its place, as in the code of the papers."""
    small, large = true_posterior(0.0, 0.0, max(t, 1))[1], BETAS[t]
    match variance_type:
        case "fixed_small":
            return small
        case "fixed_large":
            return large if t else small
        case "learned":
            return math.exp(answer)
        case _:  # Eq. 15, Nichol & Dhariwal 2021, v = (answer + 1) / 2
            return math.exp((answer + 1) / 2 * math.log(large) + (1 - answer) / 2 * math.log(small))


def log_density(x: float, mean: float, variance: float) -> float:
    return -((x - mean) ** 2) / (2 * variance) - math.log(2 * math.pi * variance) / 2


def nats_by_integration(x_0: float, x_t: float, t: int, predicted_x_0: float, variance: float) -> float:
    """One term of Eq. 5, Ho et al. 2020, for one pixel, by quadrature."""
    true_mean, true_variance = true_posterior(x_0, x_t, t)
    mean, _ = true_posterior(predicted_x_0, x_t, t)
    if t == 0:
        low = -np.inf if x_0 == -1 else x_0 - 1 / 255
        high = np.inf if x_0 == 1 else x_0 + 1 / 255
        # Beyond 40 deviations there is nothing, and over all of a tail SciPy would miss where there is something.
        far = math.sqrt(variance) * 40
        edges = (max(low, min(mean, high) - far), min(high, max(mean, low) + far))
        probability = integrate.quad(lambda x: math.exp(log_density(x, mean, variance)), *edges, epsabs=0)[0]
        return -math.log(probability)

    def integrand(x: float) -> float:
        log_truth = log_density(x, true_mean, true_variance)
        return math.exp(log_truth) * (log_truth - log_density(x, mean, variance))

    far = math.sqrt(true_variance) * 9
    return float(integrate.quad(integrand, true_mean - far, true_mean + far, epsabs=1e-12)[0])


def predicted_x_0(prediction_type: str, answer: float, x_t: float, t: int) -> float:
    """x_0 according to the network, from the definitions."""
    alpha, sigma = math.sqrt(ALPHA_BARS[t]), math.sqrt(1 - ALPHA_BARS[t])
    return {
        "epsilon": (x_t - sigma * answer) / alpha,
        "sample": answer,
        "v_prediction": alpha * x_t - sigma * answer,
    }[prediction_type]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_a_term_is_the_integral_in_bits_per_dimension_times_the_length_of_the_chain(
    variance_type: str, prediction_type: str
) -> None:
    """To 1e-4: at t = 1 the deviation is 0.007, so float32 rounding of the means moves the divergence by some 1e-5."""
    output, x_0, noise, timesteps = batch_of(variance_type)
    if prediction_type == "epsilon":  # near the truth: elsewhere the first pixels would have a probability of 1e-200
        output[:, :1] = noise + 0.02 * output[:, :1]
    elif prediction_type == "sample":
        output[:, :1] = x_0 + 0.01 * output[:, :1]
    scheduler = GaussianDiffusionScheduler.create(prediction_type=prediction_type, variance_type=variance_type)
    losses = DenoisingLoss(scheduler, VLB)(fixed_answer(output), x_0, noise, timesteps)

    expected = []
    for row, t in enumerate(TIMESTEPS):
        nats = []
        for pixel, x in enumerate(PIXELS.tolist()):
            x_t = math.sqrt(ALPHA_BARS[t]) * x + math.sqrt(1 - ALPHA_BARS[t]) * noise[row, 0, 0, pixel].item()
            estimate = predicted_x_0(prediction_type, output[row, 0, 0, pixel].item(), x_t, t)
            answer = output[row, -1, 0, pixel].item()
            nats.append(nats_by_integration(x, x_t, t, estimate, model_variance(variance_type, answer, t)))
        expected.append(T * np.mean(nats) / math.log(2))
    np.testing.assert_allclose(losses.double().numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variance_type", NAMES)
def test_the_bound_of_every_variance_that_a_process_can_have_is_its_own(variance_type: str) -> None:
    """Those of fixed variances, also of the `_log` that mean the same, differ; exactly, by the same operations."""
    assert set(VARIANCE_TYPES) == {name.removesuffix("_log") for name in NAMES}
    meaning = variance_type.removesuffix("_log")
    output, x_0, noise, timesteps = batch_of(meaning)

    def bound(name: str) -> torch.Tensor:
        return DenoisingLoss(GaussianDiffusionScheduler(variance_type=name), VLB)(
            fixed_answer(output), x_0, noise, timesteps
        )

    assert torch.equal(bound(variance_type), bound(meaning))
    if meaning.startswith("fixed"):
        other = "fixed_small" if meaning == "fixed_large" else "fixed_large"
        assert not torch.equal(bound(variance_type), bound(other))


@pytest.mark.parametrize(
    ("t", "weight"), [(1, 0.27269), (10, 0.068224), (100, 0.0099962), (500, 0.0055097), (999, 0.0102045)]
)
def test_with_a_fixed_variance_the_bound_is_a_weighted_mean_square(t: int, weight: float) -> None:
    """Eq. 12, Ho et al. 2020: weight beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)), here with sigma_t^2 = beta_t.

    The digits are those given; 1e-3 is left of the difference of two losses in float32.
    """
    noise, x_0 = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    scheduler = GaussianDiffusionScheduler.create(variance_type="fixed_large")
    loss = functools.partial(DenoisingLoss(scheduler, VLB), x_0=x_0, noise=noise, timesteps=torch.tensor([t]))
    difference = loss(fixed_answer(noise + 1)) - loss(fixed_answer(noise))
    assert float(difference) * math.log(2) / T == pytest.approx(weight, rel=1e-3)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
@pytest.mark.parametrize(("answer", "variance"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_the_learned_range_ends_at_the_fixed_variances(t: int, answer: float, variance: str) -> None:
    """At t = 0 the posterior's variance is that of t = 1, and the upper end is beta_0; to float32 rounding."""
    noise, x_0 = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 1, 2, 2)
    prediction = torch.full_like(noise, 0.49)
    learned = GaussianDiffusionScheduler.create(variance_type="learned_range")
    ends = DenoisingLoss(learned, VLB)(
        fixed_answer(torch.cat([prediction, torch.full_like(noise, answer)], dim=1)), x_0, noise, torch.tensor([t])
    )
    if (t, variance) == (0, "fixed_large"):
        mean = (math.sqrt(1 - ALPHA_BARS[0]) * (0.5 - 0.49)) / math.sqrt(ALPHA_BARS[0])
        model = stats.norm(mean, math.sqrt(BETAS[0]))
        expected = -T * math.log2(model.cdf(1 / 255) - model.cdf(-1 / 255))
    else:
        fixed = GaussianDiffusionScheduler.create(variance_type=variance)
        expected = DenoisingLoss(fixed, VLB)(fixed_answer(prediction), x_0, noise, torch.tensor([t])).item()
    assert float(ends) == pytest.approx(expected, rel=1e-4)


def test_the_mean_over_all_timesteps_is_the_bound() -> None:
    """Data of one point and a perfect network with the true variance: only the pixel's probability is left to pay for.

    L_1 ... L_{T-1} are 0 up to rounding, 1e-10 a term in float32, and so the mean of T L_t is L_0.
    """
    x_0 = torch.full((T, 1, 2, 2), 2 * 100 / 255 - 1)
    noise = torch.randn(T, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    scheduler = GaussianDiffusionScheduler.create(variance_type="fixed_small", prediction_type="sample")
    losses = DenoisingLoss(scheduler, VLB)(fixed_answer(x_0), x_0, noise, torch.arange(T))
    deviation = math.sqrt(model_variance("fixed_small", 0.0, 0))
    expected = -math.log2(1 - 2 * stats.norm.sf(1 / 255 / deviation))
    assert float(losses.mean()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_hybrid_trains_the_mean_through_mse_alone_and_the_variance_through_the_bound_alone(
    prediction_type: str, variance_type: str
) -> None:
    """Exactly: the same float32 operations on both sides."""
    output, x_0, noise, timesteps = batch_of(variance_type)
    learned = GaussianDiffusionScheduler.create(prediction_type=prediction_type, variance_type=variance_type)
    fixed = GaussianDiffusionScheduler.create(prediction_type=prediction_type)

    def losses_and_slope(loss: DenoisingLoss, answer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        answer = answer.clone().requires_grad_(True)
        losses = loss(fixed_answer(answer), x_0, noise, timesteps)
        return losses.detach(), torch.autograd.grad(losses.sum(), answer)[0]

    config = ObjectiveConfig(loss="hybrid", vlb_weight=0.02)
    hybrid, hybrid_slope = losses_and_slope(DenoisingLoss(learned, config), output)
    bound, bound_slope = losses_and_slope(DenoisingLoss(learned, VLB), output)
    simple, simple_slope = losses_and_slope(DenoisingLoss(fixed), output[:, :1])
    torch.testing.assert_close(hybrid, simple + 0.02 * bound, rtol=1e-6, atol=0)
    assert torch.equal(hybrid_slope[:, :1], simple_slope)
    torch.testing.assert_close(hybrid_slope[:, 1:], 0.02 * bound_slope[:, 1:], rtol=1e-5, atol=1e-9)
    assert hybrid_slope[:, 1:].flatten(1).any(dim=1).all()
    assert bound_slope[:, :1].flatten(1).any(dim=1).all(), "the bound alone trains the mean too"


def test_a_weighting_acts_on_the_mean_of_hybrid_and_leaves_the_bound_alone() -> None:
    output, x_0, noise, timesteps = batch_of("learned_range")
    learned = GaussianDiffusionScheduler.create(variance_type="learned_range")
    weighted = DenoisingLoss(learned, ObjectiveConfig(loss="hybrid", weighting="p2"))
    losses = weighted(fixed_answer(output), x_0, noise, timesteps)
    simple = (output[:, :1] - noise).square().flatten(1).mean(dim=1) / (1 + learned.snr(timesteps))
    bound = DenoisingLoss(learned, VLB)(fixed_answer(output), x_0, noise, timesteps)
    torch.testing.assert_close(losses, simple + 0.001 * bound)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_the_bound_is_finite_without_any_signal(variance_type: str, prediction_type: str) -> None:
    """With zero-terminal-SNR betas the last beta is 1; slopes are finite too, also from a hopeless network."""
    scheduler = GaussianDiffusionScheduler.create(
        prediction_type=prediction_type, variance_type=variance_type, rescale_betas_zero_snr=True
    )
    for scale in (0.3, 1e3):
        output, x_0, noise, timesteps = batch_of(variance_type, scale)
        output.requires_grad_(True)
        losses = DenoisingLoss(scheduler, VLB)(fixed_answer(output), x_0, noise, timesteps)
        (slope,) = torch.autograd.grad(losses.sum(), output)
        assert torch.isfinite(losses).all()
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("config", [VLB, HYBRID], ids=["vlb", "hybrid"])
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_a_fresh_network_has_a_finite_loss_and_finite_gradients_at_every_timestep(
    variance_type: str, config: ObjectiveConfig, beta_schedule: str
) -> None:
    unet = tiny_unet(learned_variance=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 1, 8, 8, generator=generator)
    x_0 = torch.randint(0, 256, (40, 1, 8, 8), generator=generator) / 127.5 - 1
    timesteps = torch.cat([torch.arange(20), torch.arange(980, 1000)])
    scheduler = GaussianDiffusionScheduler.create(variance_type=variance_type, beta_schedule=beta_schedule)
    losses = DenoisingLoss(scheduler, config)(unet, x_0, noise, timesteps)
    losses.mean().backward()
    assert torch.isfinite(losses).all()
    assert all(torch.isfinite(p.grad).all() for p in unet.parameters() if p.grad is not None)
