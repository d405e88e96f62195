"""Each loss, weighting and noise is its published formula, and only the network sees half precision.

The variational bound is checked against numerical integration in float64.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from ddpm_hf import distributed
from ddpm_hf.config import ObjectiveConfig
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler, NoiseSchedule, make_betas
from ddpm_hf.diffusion.schedule import rescale_to_zero_terminal_snr
from ddpm_hf.rng import normal_by_position
from ddpm_hf.training.loss import DenoisingLoss, assign_noise, draw_noise, draw_perturbation, loss_weight
from tests.conftest import tiny_unet

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")

NUM_TIMESTEPS = 1000


class StubNetwork:
    """Return a fixed prediction and record the arguments."""

    def __init__(self, prediction: torch.Tensor) -> None:
        self.prediction = prediction
        self.seen: list[torch.Tensor | None] = []

    def __call__(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None, *, return_dict: bool
    ) -> tuple[torch.Tensor]:
        assert return_dict is False
        self.seen = [sample, timestep, class_labels]
        return (self.prediction,)


def batch_of(count: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a prediction, images, noise and timesteps, the first and the last among them."""
    generator = torch.Generator().manual_seed(0)
    prediction, x_0, noise = (torch.randn(count, 2, 4, 4, generator=generator) for _ in range(3))
    timesteps = torch.randint(0, NUM_TIMESTEPS, (count,), generator=generator)
    timesteps[:2] = torch.tensor([0, NUM_TIMESTEPS - 1])
    return prediction, x_0, noise, timesteps


def alpha_bars(timesteps: torch.Tensor) -> torch.Tensor:
    """Return the linear schedule of Ho et al. 2020 in float64, from its definition."""
    betas = torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0)[timesteps][:, None, None, None]


def test_an_output_with_the_wrong_number_of_channels_is_an_error() -> None:
    """Otherwise half of it would be trained, or a prediction would be taken for a variance."""
    prediction, x_0, noise, timesteps = batch_of()
    loss = DenoisingLoss(GaussianDiffusionScheduler())
    with pytest.raises(ValueError, match=r"model_output has shape .* variance_type fixed_small needs"):
        loss(StubNetwork(prediction.repeat(1, 2, 1, 1)), x_0, noise, timesteps)


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
@pytest.mark.parametrize(
    ("prediction_type", "canonical"),
    [("epsilon", "eps"), ("eps", "eps"), ("sample", "x0"), ("x0", "x0"), ("v_prediction", "v"), ("v", "v")],
)
def test_a_loss_is_its_formula(prediction_type: str, canonical: str, loss: Literal["mse", "l1", "huber"]) -> None:
    """Against float64: float32 values below 20 and a mean over 32 of them leave 1e-5."""
    prediction, x_0, noise, timesteps = batch_of()
    scheduler = GaussianDiffusionScheduler.create(prediction_type=prediction_type)
    network = StubNetwork(prediction)
    losses = DenoisingLoss(scheduler, ObjectiveConfig(loss=loss))(network, x_0, noise, timesteps)

    alpha, sigma = alpha_bars(timesteps).sqrt(), (1 - alpha_bars(timesteps)).sqrt()
    x, eps = x_0.double(), noise.double()
    target = {"eps": eps, "x0": x, "v": alpha * eps - sigma * x}[canonical]
    error = (prediction.double() - target).abs()
    pointwise = {"mse": error**2, "l1": error, "huber": torch.where(error < 1, error**2 / 2, error - 0.5)}[loss]
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), pointwise.mean(dim=(1, 2, 3)), rtol=1e-5, atol=1e-6)
    x_t, seen_timesteps, labels = network.seen
    assert x_t is not None
    torch.testing.assert_close(x_t.double(), alpha * x + sigma * eps, rtol=1e-5, atol=1e-6)
    assert seen_timesteps is timesteps
    assert labels is None


def test_a_perfect_network_has_no_loss() -> None:
    """Exactly zero: prediction and target are the same numbers."""
    _, x_0, noise, timesteps = batch_of()
    for prediction_type, target in (("epsilon", noise), ("sample", x_0)):
        scheduler = GaussianDiffusionScheduler.create(prediction_type=prediction_type)
        assert not DenoisingLoss(scheduler)(StubNetwork(target), x_0, noise, timesteps).any()


def test_dropped_labels_become_the_null_label() -> None:
    prediction, x_0, noise, timesteps = batch_of(4)
    network, loss = StubNetwork(prediction), DenoisingLoss(GaussianDiffusionScheduler.create(), null_label=10)
    labels = torch.tensor([0, 1, 2, 3])
    loss(network, x_0, noise, timesteps, labels, torch.tensor([False, True, False, True]))
    assert network.seen[2] is not None
    assert network.seen[2].tolist() == [0, 10, 2, 10]
    assert labels.tolist() == [0, 1, 2, 3], "the caller's labels stay as they are"
    loss(network, x_0, noise, timesteps, labels)
    assert network.seen[2] is labels
    loss(network, x_0, noise, timesteps, None, None)
    assert network.seen[2] is None


def test_gradients_are_those_of_the_formula() -> None:
    """To float32 rounding."""
    _, x_0, noise, timesteps = batch_of()
    weight = nn.Parameter(torch.tensor(0.5))

    def network(
        sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None, *, return_dict: bool
    ) -> tuple[torch.Tensor]:
        return (weight * sample,)

    DenoisingLoss(GaussianDiffusionScheduler.create())(network, x_0, noise, timesteps).mean().backward()
    alpha, sigma = alpha_bars(timesteps).sqrt(), (1 - alpha_bars(timesteps)).sqrt()
    x_t = alpha * x_0 + sigma * noise
    assert weight.grad is not None
    assert float(weight.grad) == pytest.approx(float((2 * (0.5 * x_t - noise) * x_t).mean()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_prediction_is_compared_in_float32(dtype: torch.dtype) -> None:
    """A loss in half precision would differ in the third digit."""
    prediction, x_0, noise, timesteps = batch_of()
    half = prediction.to(dtype)
    losses = DenoisingLoss(GaussianDiffusionScheduler.create())(StubNetwork(half), x_0, noise, timesteps)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, (half.float() - noise).square().flatten(1).mean(dim=1))


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(("mixed_precision", "inside"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_only_the_network_runs_in_half_precision(mixed_precision: Any, inside: torch.dtype) -> None:
    """Prepared as in the trainer; noising, target, loss and gradients stay float32."""
    accelerator = distributed.start(mixed_precision=mixed_precision, cpu=True)
    unet = tiny_unet(10)
    model = accelerator.prepare(unet)
    seen: dict[str, torch.dtype] = {}

    def note(name: str) -> object:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: object) -> None:
            seen[f"{name} input"] = arguments[0].dtype
            if isinstance(output, torch.Tensor):
                seen[f"{name} output"] = output.dtype

        return hook

    for name in ("conv_in", "mid_block.resnets.0.conv1", "conv_out"):
        unet.get_submodule(name).register_forward_hook(note(name))  # type: ignore[arg-type]
    outer: list[torch.Tensor] = []

    def network(*arguments: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        output = model(*arguments, return_dict=return_dict)
        outer.extend([arguments[0], output[0]])
        return output  # type: ignore[no-any-return]

    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(4, 1, 8, 8, generator=generator) for _ in range(2))
    timesteps, labels = torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 3])
    scheduler = GaussianDiffusionScheduler.create(prediction_type="v_prediction")
    losses = DenoisingLoss(scheduler)(network, x_0, noise, timesteps, labels)
    accelerator.backward(losses.mean())

    assert seen["conv_in input"] == torch.float32
    assert seen["conv_in output"] == inside
    assert seen["mid_block.resnets.0.conv1 output"] == inside
    assert seen["conv_out output"] == inside
    x_t, prediction = outer
    assert torch.equal(x_t, scheduler.add_noise(x_0, noise, timesteps))
    assert (x_t.dtype, prediction.dtype, losses.dtype) == (torch.float32,) * 3
    target = scheduler.get_velocity(x_0, noise, timesteps)
    assert target.dtype == torch.float32
    assert torch.equal(losses, (prediction - target).square().flatten(1).mean(dim=1))
    assert {parameter.grad.dtype for parameter in unet.parameters() if parameter.grad is not None} == {torch.float32}


@pytest.mark.parametrize("delta", [0.1, 3.0])
def test_huber_is_linear_beyond_its_delta(delta: float) -> None:
    """Against float64 as above."""
    prediction, x_0, noise, timesteps = batch_of()
    config = ObjectiveConfig(loss="huber", huber_delta=delta)
    losses = DenoisingLoss(GaussianDiffusionScheduler.create(), config)(StubNetwork(prediction), x_0, noise, timesteps)
    error = (prediction.double() - noise.double()).abs()
    pointwise = torch.where(error < delta, error**2 / 2, delta * (error - delta / 2))
    torch.testing.assert_close(losses.double(), pointwise.mean(dim=(1, 2, 3)), rtol=1e-5, atol=1e-6)


class SelfConditionedNetwork:
    """Return weight times (first half + second half of the input), and record all calls."""

    def __init__(self, num_outputs: int = 1) -> None:
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.num_outputs = num_outputs
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, bool]] = []

    def __call__(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None, *, return_dict: bool
    ) -> tuple[torch.Tensor]:
        self.calls.append((sample, timestep, class_labels, torch.is_grad_enabled()))
        x_t, x_0 = sample.chunk(2, dim=1)
        return (torch.cat([self.weight * (x_t + x_0)] + [x_t] * (self.num_outputs - 1), dim=1),)


SELF_CONDITIONED = ObjectiveConfig(self_conditioning=0.5)


def test_without_use_self_cond_a_self_conditioned_network_sees_zeros() -> None:
    _, x_0, noise, timesteps = batch_of(4)
    network, scheduler = SelfConditionedNetwork(), GaussianDiffusionScheduler.create(prediction_type="sample")
    DenoisingLoss(scheduler, SELF_CONDITIONED)(network, x_0, noise, timesteps)
    ((sample, *_),) = network.calls
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    assert torch.equal(sample, torch.cat([x_t, torch.zeros_like(x_t)], dim=1))


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_with_use_self_cond_it_sees_its_own_prediction_of_x_0_clipped_as_in_sampling(
    prediction_type: str, variance_type: str, clip_sample: bool
) -> None:
    """Chen et al. 2022, Algorithm 1: no gradient through the first forward; clipped where the scheduler clips."""
    _, x_0, noise, timesteps = batch_of(4)
    labels, dropped = torch.tensor([0, 1, 2, 3]), torch.tensor([True, False, False, False])
    scheduler = GaussianDiffusionScheduler.create(
        prediction_type=prediction_type, variance_type=variance_type, clip_sample=clip_sample
    )
    is_learned = variance_type == "learned_range"
    config = dataclasses.replace(SELF_CONDITIONED, loss="hybrid" if is_learned else "mse")
    network = SelfConditionedNetwork(2 if is_learned else 1)
    losses = DenoisingLoss(scheduler, config, null_label=9)(network, x_0, noise, timesteps, labels, dropped, True)

    (first, _, _, first_grad), (second, seen_timesteps, seen_labels, second_grad) = network.calls
    assert (first_grad, second_grad) == (False, True)
    assert seen_timesteps is timesteps
    assert seen_labels is not None
    assert [call[2].tolist() for call in network.calls if call[2] is not None] == [[9, 1, 2, 3]] * 2
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    assert torch.equal(first, torch.cat([x_t, torch.zeros_like(x_t)], dim=1))
    output = 0.7 * x_t
    alpha, sigma = alpha_bars(timesteps).sqrt().float(), (1 - alpha_bars(timesteps)).sqrt().float()
    estimate = {
        "epsilon": (x_t - sigma * output) / alpha,
        "sample": output,
        "v_prediction": alpha * x_t - sigma * output,
    }[prediction_type]
    assert (estimate.abs() > 1).any()
    estimate = estimate.clamp(-1, 1) if clip_sample else estimate
    torch.testing.assert_close(second[:, 2:], estimate, rtol=1e-5, atol=1e-5)
    assert torch.equal(second[:, :2], x_t)
    assert not second.requires_grad
    assert losses.requires_grad


@pytest.mark.parametrize("options", [{}, {"thresholding": True, "sample_max_value": 3.0}], ids=["clip", "threshold"])
def test_self_conditioning_is_that_of_the_pipeline(options: dict[str, Any]) -> None:
    """One step of sampling, whose second forward sees the prediction of the first."""
    unet = tiny_unet(self_conditioned=True)
    nn.init.normal_(unet.conv_out.weight, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    unet.conv_in.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].detach()))
    scheduler = GaussianDiffusionScheduler.create(timestep_spacing="trailing", **options)
    pipeline = GaussianDiffusionPipeline(unet, scheduler, self_conditioned=True)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    pipeline(batch_size=2, num_inference_steps=2, sample=start, eta=0.0, output_type="pt")
    _, sampled = seen
    seen.clear()
    # x_t is the start noise where the image is 0 and the noise what the schedule makes of it.
    timesteps = torch.tensor([999, 999])
    noise = start / scheduler.gather("sqrt_one_minus_alphas_cumprod", timesteps, start)
    with torch.no_grad():
        loss = DenoisingLoss(scheduler, SELF_CONDITIONED)
        loss(unet, torch.zeros_like(start), noise, timesteps, None, None, True)
    torch.testing.assert_close(seen[1][:, 1:], sampled[:, 1:], rtol=1e-3, atol=1e-3)
    assert seen[1][:, 1:].any()


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("mixed_precision", ["bf16", "fp32"])
def test_with_use_self_cond_every_parameter_has_a_gradient(mixed_precision: Any) -> None:
    """The forward pass without gradients must not leave its cast weights in the autocast cache."""
    accelerator = distributed.start(mixed_precision=mixed_precision, cpu=True)
    unet = tiny_unet(10, self_conditioned=True)
    model = accelerator.prepare(unet)
    _, x_0, noise, timesteps = batch_of(4)
    x_0, noise = (part[:, :1].repeat(1, 1, 2, 2) for part in (x_0, noise))
    loss = DenoisingLoss(GaussianDiffusionScheduler.create(), SELF_CONDITIONED)
    accelerator.backward(loss(model, x_0, noise, timesteps, torch.arange(4), None, True).mean())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in unet.parameters())


# ---------------------------------------------------------------------------------------------------- variational bound

VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")
NAMES = (*VARIANCE_TYPES, "fixed_small_log", "fixed_large_log")
TIMESTEPS = [0, 1, 10, 500, 999]
T = 1000
PIXELS = np.array([-1.0, 2 * 100 / 255 - 1, 1.0])
VLB, HYBRID = ObjectiveConfig(loss="vlb"), ObjectiveConfig(loss="hybrid")

BETAS = np.linspace(1e-4, 0.02, T)
ALPHA_BARS = np.cumprod(1 - BETAS)


def fixed_output(output: torch.Tensor) -> Any:
    """Return a network with a fixed output."""
    return lambda *_, **__: (output,)


def bound_batch_of(
    variance_type: str, scale: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return an output of the network, images of three pixels, noise and timesteps; float32."""
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
    output, x_0, noise, timesteps = bound_batch_of(variance_type)
    if prediction_type == "epsilon":  # near the truth: elsewhere the first pixels would have a probability of 1e-200
        output[:, :1] = noise + 0.02 * output[:, :1]
    elif prediction_type == "sample":
        output[:, :1] = x_0 + 0.01 * output[:, :1]
    scheduler = GaussianDiffusionScheduler.create(prediction_type=prediction_type, variance_type=variance_type)
    losses = DenoisingLoss(scheduler, VLB)(fixed_output(output), x_0, noise, timesteps)

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
def test_every_variance_type_has_its_own_bound(variance_type: str) -> None:
    """Those of the two fixed variances differ; a name with `_log` means the same. Exact: the same operations."""
    meaning = variance_type.removesuffix("_log")
    output, x_0, noise, timesteps = bound_batch_of(meaning)

    def bound(name: str) -> torch.Tensor:
        return DenoisingLoss(GaussianDiffusionScheduler(variance_type=name), VLB)(
            fixed_output(output), x_0, noise, timesteps
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
    difference = loss(fixed_output(noise + 1)) - loss(fixed_output(noise))
    assert float(difference) * math.log(2) / T == pytest.approx(weight, rel=1e-3)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
@pytest.mark.parametrize(("answer", "variance"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_the_learned_range_ends_at_the_fixed_variances(t: int, answer: float, variance: str) -> None:
    """At t = 0 the posterior's variance is that of t = 1, and the upper end is beta_0; to float32 rounding."""
    noise, x_0 = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 1, 2, 2)
    prediction = torch.full_like(noise, 0.49)
    learned = GaussianDiffusionScheduler.create(variance_type="learned_range")
    ends = DenoisingLoss(learned, VLB)(
        fixed_output(torch.cat([prediction, torch.full_like(noise, answer)], dim=1)), x_0, noise, torch.tensor([t])
    )
    if (t, variance) == (0, "fixed_large"):
        mean = (math.sqrt(1 - ALPHA_BARS[0]) * (0.5 - 0.49)) / math.sqrt(ALPHA_BARS[0])
        model = stats.norm(mean, math.sqrt(BETAS[0]))
        expected = -T * math.log2(model.cdf(1 / 255) - model.cdf(-1 / 255))
    else:
        fixed = GaussianDiffusionScheduler.create(variance_type=variance)
        expected = DenoisingLoss(fixed, VLB)(fixed_output(prediction), x_0, noise, torch.tensor([t])).item()
    assert float(ends) == pytest.approx(expected, rel=1e-4)


def test_the_mean_over_all_timesteps_is_the_bound() -> None:
    """Data of one point and a perfect network with the true variance: only the probability of the pixel remains.

    L_1 ... L_{T-1} are 0 up to rounding, 1e-10 a term in float32, and so the mean of T L_t is L_0.
    """
    x_0 = torch.full((T, 1, 2, 2), 2 * 100 / 255 - 1)
    noise = torch.randn(T, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    scheduler = GaussianDiffusionScheduler.create(variance_type="fixed_small", prediction_type="sample")
    losses = DenoisingLoss(scheduler, VLB)(fixed_output(x_0), x_0, noise, torch.arange(T))
    deviation = math.sqrt(model_variance("fixed_small", 0.0, 0))
    expected = -math.log2(1 - 2 * stats.norm.sf(1 / 255 / deviation))
    assert float(losses.mean()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_hybrid_trains_the_mean_by_mse_only_and_the_variance_by_the_bound_only(
    prediction_type: str, variance_type: str
) -> None:
    """Exactly: the same float32 operations on both sides."""
    output, x_0, noise, timesteps = bound_batch_of(variance_type)
    learned = GaussianDiffusionScheduler.create(prediction_type=prediction_type, variance_type=variance_type)
    fixed = GaussianDiffusionScheduler.create(prediction_type=prediction_type)

    def losses_and_slope(loss: DenoisingLoss, answer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        answer = answer.clone().requires_grad_(True)
        losses = loss(fixed_output(answer), x_0, noise, timesteps)
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


def test_a_weighting_applies_to_the_mse_of_hybrid_and_not_to_the_bound() -> None:
    output, x_0, noise, timesteps = bound_batch_of("learned_range")
    learned = GaussianDiffusionScheduler.create(variance_type="learned_range")
    weighted = DenoisingLoss(learned, ObjectiveConfig(loss="hybrid", weighting="p2"))
    losses = weighted(fixed_output(output), x_0, noise, timesteps)
    simple = (output[:, :1] - noise).square().flatten(1).mean(dim=1) / (1 + learned.snr(timesteps))
    bound = DenoisingLoss(learned, VLB)(fixed_output(output), x_0, noise, timesteps)
    torch.testing.assert_close(losses, simple + 0.001 * bound)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_the_bound_is_finite_without_any_signal(variance_type: str, prediction_type: str) -> None:
    """With zero-terminal-SNR betas the last beta is 1; gradients are finite too, also from a bad network."""
    scheduler = GaussianDiffusionScheduler.create(
        prediction_type=prediction_type, variance_type=variance_type, rescale_betas_zero_snr=True
    )
    for scale in (0.3, 1e3):
        output, x_0, noise, timesteps = bound_batch_of(variance_type, scale)
        output.requires_grad_(True)
        losses = DenoisingLoss(scheduler, VLB)(fixed_output(output), x_0, noise, timesteps)
        (slope,) = torch.autograd.grad(losses.sum(), output)
        assert torch.isfinite(losses).all()
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize(("beta_schedule", "config"), [("linear", VLB), ("cosine", HYBRID)], ids=["vlb", "hybrid"])
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


# ------------------------------------------------------------------------------------------------------------ weighting

WEIGHT_TIMESTEPS = [0, 1, 57, 129, 130, 258, 259, 500, 900, 998, 999]
LINEAR, COSINE = make_betas("linear"), make_betas("cosine")
ZERO_SNR = rescale_to_zero_terminal_snr(LINEAR)

# {weighting: {prediction: weight at an SNR of s}}, as the papers and their code print them.
PUBLISHED: dict[str, dict[str, Any]] = {
    # Salimans & Ho 2022, section 4.
    "snr": {"epsilon": lambda s: 1.0, "sample": lambda s: s, "v_prediction": lambda s: s / (s + 1)},
    "truncated_snr": {
        "epsilon": lambda s: max(s, 1) / s,
        "sample": lambda s: max(s, 1),
        "v_prediction": lambda s: max(s, 1) / (s + 1),
    },
    # Hang et al. 2023, gamma = 5.
    "min_snr": {
        "epsilon": lambda s: min(s, 5) / s,
        "sample": lambda s: min(s, 5),
        "v_prediction": lambda s: min(s, 5) / (s + 1),
    },
    # Choi et al. 2022, k = 1, gamma = 1; their code uses it for any prediction.
    "p2": dict.fromkeys(PREDICTION_TYPES, lambda s: 1 / (1 + s)),
}


CASES = [(weighting, prediction_type) for weighting, kinds in PUBLISHED.items() for prediction_type in kinds]


def objective(weighting: str, **changes: float) -> ObjectiveConfig:
    return ObjectiveConfig(weighting=weighting, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("weighting", "prediction_type"), CASES)
@pytest.mark.parametrize("betas", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_a_weight_is_its_published_formula(betas: torch.Tensor, weighting: str, prediction_type: str) -> None:
    """In float64 to its rounding, from t = 0 (SNR 9999 or 24222) to the last, at both sides of the thresholds."""
    snr = NoiseSchedule.from_betas(betas).snr[WEIGHT_TIMESTEPS]
    found = loss_weight(objective(weighting), prediction_type, snr)
    expected = [PUBLISHED[weighting][prediction_type](s) for s in snr.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_a_weighting_uses_the_constants_of_the_configuration() -> None:
    snr = torch.tensor([0.5, 2.0, 30.0], dtype=torch.float64)
    p2 = loss_weight(objective("p2", p2_gamma=0.5, p2_k=2.0), "epsilon", snr)
    torch.testing.assert_close(p2, 1 / (2 + snr).sqrt(), rtol=1e-14, atol=0)
    min_snr = loss_weight(objective("min_snr", min_snr_gamma=1.0), "sample", snr)
    assert min_snr is not None
    assert min_snr.tolist() == [0.5, 1.0, 1.0]
    assert loss_weight(objective("none"), "sample", snr) is None
    no_p2 = loss_weight(objective("p2", p2_gamma=0.0), "epsilon", snr)
    assert no_p2 is not None
    assert no_p2.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("weighting", "prediction_type"), CASES)
def test_at_an_snr_of_0_the_weight_is_1(weighting: str, prediction_type: str) -> None:
    """At an SNR of exactly 0 every weight is 1, as in the code of Hang et al.; so is p2 with k = 1 by itself."""
    schedule = NoiseSchedule.from_betas(ZERO_SNR)
    assert schedule.snr[-1] == 0
    weights = loss_weight(objective(weighting), prediction_type, schedule.snr.float())
    assert weights is not None
    assert weights[-1] == 1
    assert torch.isfinite(weights).all()
    assert (weights > 0).all()


@pytest.mark.parametrize("weighting", ["snr", "truncated_snr", "min_snr"])
def test_equivalent_predictions_have_the_same_loss(weighting: str) -> None:
    """The losses of equivalent predictions of x_0, epsilon and v differ by float32 rounding only.

    It is amplified where x_0 is small against x_t: errors are of size 1, and 1e-4 is left of 6e-8 at an SNR of 1e-4.
    """
    generator = torch.Generator().manual_seed(0)
    x_0, noise, error = (torch.randn(8, 2, 4, 4, generator=generator) for _ in range(3))
    timesteps = torch.tensor([0, 1, 57, 129, 130, 258, 500, 700])
    losses = {}
    for prediction_type in PUBLISHED[weighting]:
        scheduler = GaussianDiffusionScheduler.create(prediction_type=prediction_type)
        alpha = scheduler.gather("sqrt_alphas_cumprod", timesteps, x_0)
        sigma = scheduler.gather("sqrt_one_minus_alphas_cumprod", timesteps, x_0)
        predicted_x_0 = x_0 + sigma * error
        predicted_noise = noise - alpha * error  # what is left of x_t
        output = {
            "epsilon": predicted_noise,
            "sample": predicted_x_0,
            "v_prediction": alpha * predicted_noise - sigma * predicted_x_0,
        }[prediction_type]
        loss = DenoisingLoss(scheduler, objective(weighting))
        losses[prediction_type] = loss(lambda *_, output=output, **__: (output,), x_0, noise, timesteps)
    for prediction_type in losses:
        torch.testing.assert_close(losses[prediction_type], losses["sample"], rtol=1e-4, atol=0)


def test_the_snr_weighting_of_x_0_is_the_simple_loss_of_epsilon() -> None:
    """Salimans & Ho 2022, section 4; float32 rounding as above."""
    generator = torch.Generator().manual_seed(0)
    x_0, noise, predicted_noise = (torch.randn(8, 2, 4, 4, generator=generator) for _ in range(3))
    timesteps = torch.tensor([0, 1, 57, 129, 130, 258, 500, 700])
    scheduler = GaussianDiffusionScheduler.create(prediction_type="epsilon")
    simple = DenoisingLoss(scheduler)(lambda *_, **__: (predicted_noise,), x_0, noise, timesteps)
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    predicted_x_0 = scheduler.predict_original_sample(predicted_noise, timesteps, x_t)
    weighted = DenoisingLoss(GaussianDiffusionScheduler.create(prediction_type="sample"), objective("snr"))
    losses = weighted(lambda *_, **__: (predicted_x_0,), x_0, noise, timesteps)
    torch.testing.assert_close(losses, simple, rtol=1e-4, atol=0)


@pytest.mark.parametrize("weighting", PUBLISHED)
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_losses_and_gradients_are_finite_at_both_ends_of_the_schedule(prediction_type: str, weighting: str) -> None:
    scheduler = GaussianDiffusionScheduler.create(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    generator = torch.Generator().manual_seed(0)
    x_0, noise, output = (torch.randn(2, 1, 4, 4, generator=generator) for _ in range(3))
    output.requires_grad_(True)
    loss = DenoisingLoss(scheduler, objective(weighting))
    losses = loss(lambda *_, **__: (output,), x_0, noise, torch.tensor([0, 999]))
    (slope,) = torch.autograd.grad(losses.sum(), output)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(slope).all()
    assert slope.flatten(1).any(dim=1).all()


# ---------------------------------------------------------------------------------------------------------------- noise

SHAPE, CPU = torch.Size([2, 4, 4]), torch.device("cpu")


def test_without_an_offset_noise_is_standard_normal_by_position() -> None:
    noise = draw_noise(ObjectiveConfig(), 3, 7, range(5, 40), SHAPE, CPU)
    assert torch.equal(noise, normal_by_position(3, "noise", 7, range(5, 40), SHAPE, CPU))


def test_an_offset_is_one_number_per_image_and_channel_of_the_configured_strength() -> None:
    """40,000 numbers: five standard deviations of their variance are 3.5 %, 0.025 of their mean."""
    plain = draw_noise(ObjectiveConfig(), 3, 7, range(20_000), SHAPE, CPU)
    shifted = draw_noise(ObjectiveConfig(offset_noise=0.3), 3, 7, range(20_000), SHAPE, CPU)
    offset = shifted - plain
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset), rtol=0, atol=1e-6)  # rounding
    numbers = offset[:, :, 0, 0]
    assert float(numbers.square().mean()) == pytest.approx(0.3**2, rel=0.035)
    assert abs(float(numbers.mean())) < 0.3 * 0.025
    assert abs(float((numbers[:, 0] * numbers[:, 1]).mean())) < 0.3**2 * 5 / 20_000**0.5, "channels are independent"
    assert abs(float((numbers * plain.mean(dim=(2, 3))).mean())) < 0.3 * 5 / (16 * 40_000) ** 0.5, "and of the noise"
    first = plain[:32].flatten()[:64]
    assert float((first - numbers[:32].flatten() / 0.3).abs().mean()) > 0.5, "which has a stream of its own"


def test_an_offset_belongs_to_its_position() -> None:
    config = ObjectiveConfig(offset_noise=0.3)
    whole = draw_noise(config, 3, 7, range(80), SHAPE, CPU)
    assert torch.equal(draw_noise(config, 3, 7, range(30, 50), SHAPE, CPU), whole[30:50])
    assert not torch.equal(draw_noise(config, 3, 8, range(80), SHAPE, CPU), whole)


def test_a_perturbation_is_noise_of_its_own_stream_and_strength() -> None:
    found = draw_perturbation(ObjectiveConfig(input_perturbation=0.1), 3, 7, range(5, 40), SHAPE, CPU)
    expected = 0.1 * normal_by_position(3, "input_perturbation", 7, range(5, 40), SHAPE, CPU)
    assert found is not None
    assert torch.equal(found, expected)
    assert draw_perturbation(ObjectiveConfig(), 3, 7, range(5, 40), SHAPE, CPU) is None


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perturbation_changes_the_input_and_not_the_target(prediction_type: str) -> None:
    """Algorithm 1, Ning et al. 2023: x_t = alpha x_0 + sigma (eps + gamma xi), and the target is that of eps."""
    x_0, noise, perturbation = (torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    timesteps = torch.tensor([100, 900])
    scheduler = GaussianDiffusionScheduler(prediction_type=prediction_type)
    seen = []

    def network(x_t: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, ...]:
        seen.append(x_t)
        return (torch.zeros_like(x_t),)

    loss = DenoisingLoss(scheduler, ObjectiveConfig(input_perturbation=0.1))
    plain, perturbed = (loss(network, x_0, noise, timesteps, perturbation=one) for one in (None, 0.1 * perturbation))
    assert torch.equal(plain, perturbed)
    sigma = (1 - alpha_bars(timesteps)).sqrt().view(-1, 1, 1, 1).float()
    torch.testing.assert_close(seen[1] - seen[0], sigma * 0.1 * perturbation)


def test_assigned_noise_has_the_least_sum_of_distances() -> None:
    """Against all 720 assignments of six images; distances as in Li et al. 2024, not squared."""
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(6, *SHAPE, generator=generator) for _ in range(2))
    distances = torch.stack([(image - noise).flatten(1).norm(dim=1) for image in x_0]).double()
    best = min(itertools.permutations(range(6)), key=lambda order: float(distances[range(6), order].sum()))
    assert best != tuple(range(6))
    assert torch.equal(assign_noise(x_0, noise), noise[list(best)])


def test_noise_is_permuted_within_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(80, *SHAPE, generator=generator) for _ in range(2))
    assigned = assign_noise(x_0, noise)
    assert not torch.equal(assigned, noise)
    for start, stop in ((0, 32), (32, 64), (64, 80)):
        before, after = (sorted(part[start:stop, 0, 0, 0].tolist()) for part in (noise, assigned))
        assert before == after
    assert torch.equal(assign_noise(x_0[32:64], noise[32:64]), assigned[32:64])
    apart, before = ((x_0 - part).flatten(1).norm(dim=1).sum() for part in (assigned, noise))
    assert apart < before
