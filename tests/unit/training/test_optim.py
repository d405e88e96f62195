"""The learning rate is a closed form of the step, and an update that is skipped changes nothing at all."""

import dataclasses

import pytest
import torch

from ddpm_hf.config import TrainingConfig
from ddpm_hf.training.optim import build_optimizer, learning_rate_at

CONFIG = TrainingConfig(learning_rate=2.0, learning_rate_warmup_steps=10, num_steps=110)


def rate(step: int, schedule: str) -> float:
    return learning_rate_at(step, dataclasses.replace(CONFIG, learning_rate_schedule=schedule))  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warm_up_climbs_linearly_to_the_peak(schedule: str) -> None:
    """The first update already moves the weights, the tenth has the full rate, and the next one goes on from there."""
    assert [rate(step, schedule) for step in range(10)] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rate(9, schedule) == rate(10, schedule) == 2.0


@pytest.mark.parametrize(
    ("schedule", "halfway", "last"),
    [("constant", 2.0, 2.0), ("cosine", 1.0, 0.000493), ("linear", 1.0, 0.02)],
)
def test_the_rate_falls_as_its_schedule_says(schedule: str, halfway: float, last: float) -> None:
    assert rate(60, schedule) == pytest.approx(halfway)
    assert rate(109, schedule) == pytest.approx(last, rel=1e-3)
    rates = [rate(step, schedule) for step in range(10, 110)]
    assert rates == sorted(rates, reverse=True)
    assert rate(110, schedule) == pytest.approx(2.0 if schedule == "constant" else 0.0, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 5, 200])
def test_the_rate_is_a_good_number_at_every_step(warmup: int) -> None:
    """A warm-up may be longer than the run, and a run as long as its warm-up."""
    for num_steps in (1, 5, 110):
        for schedule in ("constant", "cosine", "linear"):
            config = dataclasses.replace(
                CONFIG,
                learning_rate_warmup_steps=warmup,
                num_steps=num_steps,
                learning_rate_schedule=schedule,  # type: ignore[arg-type]
            )
            rates = [learning_rate_at(step, config) for step in range(num_steps)]
            assert all(0 < rate <= 2.0 for rate in rates), (num_steps, schedule)


def test_the_optimizer_is_the_papers_adam_unless_told_otherwise() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    settings = build_optimizer([parameter], TrainingConfig()).defaults
    assert {name: settings[name] for name in ("lr", "betas", "eps", "weight_decay", "fused")} == {
        "lr": 2e-4,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "fused": True,
    }
    changed = TrainingConfig(adam_beta1=0.8, adam_beta2=0.99, adam_epsilon=1e-6, weight_decay=0.1, learning_rate=1.0)
    settings = build_optimizer([parameter], changed).defaults
    assert [settings[name] for name in ("lr", "betas", "eps", "weight_decay")] == [1.0, (0.8, 0.99), 1e-6, 0.1]


def test_an_update_is_adams_formula() -> None:
    """One step in float64 by hand; the fused float32 kernel agrees to rounding."""
    torch.manual_seed(0)
    start, gradient = torch.randn(50), torch.randn(50)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = build_optimizer([parameter], TrainingConfig(learning_rate=0.1, weight_decay=0.01))
    parameter.grad = gradient.clone()
    optimizer.step()
    g = gradient.double()
    first, second = 0.1 * g / (1 - 0.9), 0.001 * g**2 / (1 - 0.999)
    expected = start.double() * (1 - 0.1 * 0.01) - 0.1 * first / (second.sqrt() + 1e-8)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_an_update_that_is_skipped_changes_nothing_at_all() -> None:
    """Weights, both moments and the step count are the same bits, whatever the gradient holds."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(3))]
    optimizer = build_optimizer(parameters, TrainingConfig(learning_rate=0.1, weight_decay=0.1))

    def step(gradient: float, found_inf: float) -> None:
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, gradient)
        vars(optimizer)["found_inf"] = torch.tensor(found_inf)
        optimizer.step()

    def everything() -> list[torch.Tensor]:
        moments = [value for parameter in parameters for value in optimizer.state[parameter].values()]
        assert len(moments) == 6
        return [tensor.detach().clone() for tensor in (*parameters, *moments)]

    step(0.5, found_inf=0.0)
    before = everything()
    for gradient in (float("nan"), float("inf"), 1.0):
        step(gradient, found_inf=1.0)
        assert all(torch.equal(one, other) for one, other in zip(before, everything(), strict=True))
    step(0.5, found_inf=0.0)
    assert not any(torch.equal(one, other) for one, other in zip(before, everything(), strict=True))
