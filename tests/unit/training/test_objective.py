"""Each loss is its formula, and only the network sees half precision."""

import dataclasses
from typing import Any, Literal

import pytest
import torch
from torch import nn

from ddpm_hf import distributed
from ddpm_hf.config import ObjectiveConfig
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.training.loss import DenoisingLoss
from tests.conftest import tiny_unet

NUM_TIMESTEPS = 1000


class StubNetwork:
    """Answers with a fixed prediction and remembers what it was asked."""

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
    """Returns a prediction, images, noise and timesteps from both ends of the chain."""
    generator = torch.Generator().manual_seed(0)
    prediction, x_0, noise = (torch.randn(count, 2, 4, 4, generator=generator) for _ in range(3))
    timesteps = torch.randint(0, NUM_TIMESTEPS, (count,), generator=generator)
    timesteps[:2] = torch.tensor([0, NUM_TIMESTEPS - 1])
    return prediction, x_0, noise, timesteps


def alpha_bars(timesteps: torch.Tensor) -> torch.Tensor:
    """Returns the linear schedule of Ho et al. 2020 in float64, from its definition."""
    betas = torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0)[timesteps][:, None, None, None]


def test_an_output_with_channels_that_the_variance_type_does_not_have_is_refused() -> None:
    """Half of it would else be trained on, or a prediction be taken for a variance."""
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
    """The network is prepared as the trainer does it; noising, target, loss and gradients stay float32."""
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
def test_huber_turns_linear_at_its_delta(delta: float) -> None:
    """Against float64 as above."""
    prediction, x_0, noise, timesteps = batch_of()
    config = ObjectiveConfig(loss="huber", huber_delta=delta)
    losses = DenoisingLoss(GaussianDiffusionScheduler.create(), config)(StubNetwork(prediction), x_0, noise, timesteps)
    error = (prediction.double() - noise.double()).abs()
    pointwise = torch.where(error < delta, error**2 / 2, delta * (error - delta / 2))
    torch.testing.assert_close(losses.double(), pointwise.mean(dim=(1, 2, 3)), rtol=1e-5, atol=1e-6)


class FeedbackNetwork:
    """Answers with its weight times the first half of its input plus the second, and remembers all calls."""

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


def test_without_feedback_a_self_conditioned_network_sees_zeros() -> None:
    _, x_0, noise, timesteps = batch_of(4)
    network, scheduler = FeedbackNetwork(), GaussianDiffusionScheduler.create(prediction_type="sample")
    DenoisingLoss(scheduler, SELF_CONDITIONED)(network, x_0, noise, timesteps)
    ((sample, *_),) = network.calls
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    assert torch.equal(sample, torch.cat([x_t, torch.zeros_like(x_t)], dim=1))


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_with_feedback_it_sees_its_own_prediction_of_x_0_as_sampling_shows_it(
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
    network = FeedbackNetwork(2 if is_learned else 1)
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
def test_what_is_fed_back_is_what_the_pipeline_feeds_back(options: dict[str, Any]) -> None:
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
def test_feedback_leaves_every_parameter_its_gradient(mixed_precision: Any) -> None:
    """A forward without gradients must not leave its casts of the weights behind for the one with gradients."""
    accelerator = distributed.start(mixed_precision=mixed_precision, cpu=True)
    unet = tiny_unet(10, self_conditioned=True)
    model = accelerator.prepare(unet)
    _, x_0, noise, timesteps = batch_of(4)
    x_0, noise = (part[:, :1].repeat(1, 1, 2, 2) for part in (x_0, noise))
    loss = DenoisingLoss(GaussianDiffusionScheduler.create(), SELF_CONDITIONED)
    accelerator.backward(loss(model, x_0, noise, timesteps, torch.arange(4), None, True).mean())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in unet.parameters())
