"""Each loss is its formula, and only the network sees half precision."""

from typing import Literal

import pytest
import torch
from torch import nn

from ddpm_hf.config import ObjectiveConfig, TrainingConfig
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.training import processes
from ddpm_hf.training.objective import DenoisingLoss
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
def test_only_the_network_runs_in_half_precision(mixed_precision: str, inside: torch.dtype) -> None:
    """The network is prepared as the trainer does it; noising, target, loss and gradients stay float32."""
    config = TrainingConfig(mixed_precision=mixed_precision, cpu=True)  # type: ignore[arg-type]
    accelerator = processes.start(config)
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
