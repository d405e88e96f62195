"""The learning rate is a closed form of the step; optimizers resume exactly; a skipped update changes nothing."""

import dataclasses
from typing import Any

import pytest
import torch

from ddpm_hf.config import ConfigError, TrainingConfig
from ddpm_hf.training.optim import (
    NonFiniteGuard,
    NonFiniteTraining,
    arm_found_inf,
    build_optimizer,
    check_finite,
    clip_grad_norm_,
    learning_rate_at,
    load_optimizer_state,
    optimizer_state,
)

CONFIG = TrainingConfig(learning_rate=2.0, learning_rate_warmup_steps=10, num_steps=110)


def rate(step: int, schedule: str) -> float:
    return learning_rate_at(step, dataclasses.replace(CONFIG, learning_rate_schedule=schedule))  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warmup_increases_linearly_to_the_peak(schedule: str) -> None:
    """The first update already moves the weights, and the tenth has the full rate."""
    assert [rate(step, schedule) for step in range(10)] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rate(9, schedule) == rate(10, schedule) == 2.0


@pytest.mark.parametrize(
    ("schedule", "halfway", "last"),
    [("constant", 2.0, 2.0), ("cosine", 1.0, 0.000493), ("linear", 1.0, 0.02)],
)
def test_the_rate_decreases_as_its_schedule_says(schedule: str, halfway: float, last: float) -> None:
    assert rate(60, schedule) == pytest.approx(halfway)
    assert rate(109, schedule) == pytest.approx(last, rel=1e-3)
    rates = [rate(step, schedule) for step in range(10, 110)]
    assert rates == sorted(rates, reverse=True)
    assert rate(110, schedule) == pytest.approx(2.0 if schedule == "constant" else 0.0, abs=1e-12)


def test_the_inverse_square_root_does_not_depend_on_the_length_of_the_run() -> None:
    """As the code of Karras et al. 2024: the peak until the reference step, half of it at four times that step."""
    config = dataclasses.replace(CONFIG, learning_rate_schedule="inverse_sqrt", learning_rate_reference_steps=40)
    rates = [learning_rate_at(step, config) for step in (9, 10, 40, 90, 160, 4000)]
    assert rates == pytest.approx([2.0, 2.0, 2.0, 2.0 / 1.5, 1.0, 0.2])
    longer = dataclasses.replace(config, num_steps=10_000)
    assert [learning_rate_at(step, longer) for step in (9, 10, 40, 90, 160, 4000)] == rates
    after_warmup = dataclasses.replace(config, learning_rate_reference_steps=None)
    assert learning_rate_at(40, after_warmup) == pytest.approx(1.0)


@pytest.mark.parametrize("warmup", [0, 1, 5, 200])
def test_the_rate_is_positive_and_at_most_the_peak_at_every_step(warmup: int) -> None:
    """A warmup may be longer than the run or as long."""
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


def test_the_default_optimizer_is_the_papers_adam() -> None:
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


def test_adam_adds_its_weight_decay_to_the_gradient() -> None:
    """Also fused; by hand in float64."""
    parameter = torch.nn.Parameter(torch.full((3,), 2.0))
    optimizer = build_optimizer([parameter], TrainingConfig(optimizer="adam", learning_rate=0.1, weight_decay=0.5))
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["fused"] is True
    parameter.grad = torch.full((3,), -1.5)
    optimizer.step()
    g = -1.5 + 0.5 * 2.0
    assert parameter.detach().tolist() == pytest.approx([2.0 - 0.1 * g / (abs(g) + 1e-8)] * 3)


def test_further_arguments_reach_the_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    settings = build_optimizer([parameter], TrainingConfig(optimizer_kwargs={"amsgrad": True, "fused": False})).defaults
    assert (settings["amsgrad"], settings["fused"]) == (True, False)
    config = TrainingConfig(optimizer="torch.optim.SGD", optimizer_kwargs={"momentum": 0.9}, learning_rate=0.3)
    optimizer = build_optimizer([parameter], config)
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["momentum"], optimizer.defaults["lr"]) == (0.9, 0.3)


def test_a_device_without_a_fused_adam_gets_the_plain_one() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1, device="meta"))
    assert build_optimizer([parameter], TrainingConfig()).defaults["fused"] is None


MODULE = "tests.unit.training.optimizers"


@pytest.mark.parametrize(
    ("path", "arguments", "sentence"),
    [
        ("torch.optim.Lamb", {}, "training.optimizer torch.optim.Lamb cannot be imported"),
        ("no.such.Optimizer", {}, "training.optimizer no.such.Optimizer cannot be imported (No module named 'no')"),
        (f"{MODULE}.not_a_class", {}, "is not a torch.optim.Optimizer; give the path of one."),
        ("torch.nn.Linear", {}, "training.optimizer torch.nn.Linear is not a torch.optim.Optimizer"),
        ("torch.optim.SGD", {"momentun": 1}, "torch.optim.SGD cannot be built (TypeError: SGD.__init__() got an"),
        ("torch.optim.SGD", {"momentum": -1}, "cannot be built (ValueError: Invalid momentum value: -1)"),
        ("torch.optim.SGD", {"lr": 1.0}, "training.optimizer_kwargs has lr, which other settings of training decide;"),
        ("adamw", {"betas": [0.9, 0.9]}, "training.optimizer_kwargs has betas, which other settings"),
        ("torch.optim.LBFGS", {}, "torch.optim.LBFGS cannot take a step (TypeError: LBFGS.step() missing"),
        ("torch.optim.SparseAdam", {}, "torch.optim.SparseAdam cannot take a step (RuntimeError: SparseAdam"),
        (f"{MODULE}.KeepingLists", {}, "cannot be stored in a checkpoint (its state history is a list, not a"),
        (f"{MODULE}.Hiding", {}, "Hiding does not continue exactly from a checkpoint"),
        (f"{MODULE}.KeepingHalf", {}, "KeepingHalf does not continue exactly from a checkpoint"),
    ],
)
def test_an_optimizer_that_cannot_be_built_or_resumed_is_refused_before_training(
    path: str, arguments: dict[str, Any], sentence: str
) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ConfigError) as caught:
        build_optimizer([parameter], TrainingConfig(optimizer=path, optimizer_kwargs=arguments))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {}),
    ("adamw", {"amsgrad": True}),
    ("adam", {}),
    ("adam", {"fused": False}),
    ("torch.optim.SGD", {"momentum": 0.9}),
    ("torch.optim.SGD", {"momentum": 0.9, "fused": True}),
    ("torch.optim.NAdam", {}),
    ("torch.optim.Adagrad", {"fused": True}),
    ("torch.optim.Adafactor", {}),
    ("torch.optim.RMSprop", {"momentum": 0.9}),
    (f"{MODULE}.Counting", {"slowness": 0.25}),
]
every_optimizer = pytest.mark.parametrize(("path", "arguments"), OPTIMIZERS)
SHAPES = {"one.weight": (4, 4), "one.bias": (3,), "two.weight": (2, 3, 3, 3)}


def optimized(
    path: str, arguments: dict[str, Any], seed: int
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Return parameters and their optimizer."""
    torch.manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES.values()]
    config = TrainingConfig(optimizer=path, optimizer_kwargs=arguments, learning_rate=0.1)
    return parameters, build_optimizer(parameters, config)


def step(
    parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, seed: int, factor: float = 1.0
) -> bool:
    """Do what the trainer does with a gradient; return whether `step` was called."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * factor
    norms = torch.stack([parameter.grad.norm() for parameter in parameters if parameter.grad is not None])
    allowed = arm_found_inf(optimizer, ~torch.isfinite(norms.norm()))
    if allowed:
        optimizer.step()
    return allowed


def everything(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    tensors, scalars = optimizer_state(optimizer, list(SHAPES))
    weights = dict(zip(SHAPES, (parameter.detach() for parameter in parameters), strict=True))
    return {name: tensor.clone() for name, tensor in (tensors | weights).items()}, scalars


def assert_equal(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    assert one[0].keys() == other[0].keys()
    assert [name for name in one[0] if not torch.equal(one[0][name], other[0][name])] == []
    assert one[1] == other[1]


@every_optimizer
def test_every_optimizer_resumes_bit_identically(path: str, arguments: dict[str, Any]) -> None:
    """Bit for bit: weights, tensors of the state, and what is no tensor."""
    run = optimized(path, arguments, seed=0)
    for number in range(3):
        step(*run, seed=number)
    tensors, scalars = everything(*run)
    again = optimized(path, arguments, seed=1)
    for parameter, name in zip(again[0], SHAPES, strict=True):
        parameter.data.copy_(tensors.pop(name))
    load_optimizer_state(again[1], list(SHAPES), tensors, scalars)
    assert_equal(everything(*run), everything(*again))
    for number in range(3, 5):
        step(*run, seed=number)
        step(*again, seed=number)
    assert_equal(everything(*run), everything(*again))


@every_optimizer
@pytest.mark.parametrize("when", [0, 2])
def test_a_non_finite_gradient_changes_nothing(path: str, arguments: dict[str, Any], when: int) -> None:
    """Bit for bit, whether the optimizer skips the update on the device or the host does."""
    run, undisturbed = optimized(path, arguments, seed=0), optimized(path, arguments, seed=0)
    for number in range(4):
        if number == when:
            for factor in (float("nan"), float("inf")):
                is_called = path in ("adam", "adamw") and run[1].defaults["fused"]
                assert step(*run, seed=99, factor=factor) == is_called
        step(*run, seed=number)
        step(*undisturbed, seed=number)
    tensors, scalars = everything(*run)
    expected, expected_scalars = everything(*undisturbed)
    assert_equal((tensors, scalars), (expected, expected_scalars))


def test_only_changed_settings_of_the_group_are_stored() -> None:
    """The rest comes from the configuration, so that a run can be continued with another weight decay."""
    run = optimized(f"{MODULE}.Counting", {}, seed=0)
    for number in range(3):
        step(*run, seed=number)
    scalars = everything(*run)[1]
    assert scalars["group"] == {"num_steps": 3}
    assert set(scalars["state"]) == set(SHAPES)
    run = optimized("adamw", {}, seed=0)
    step(*run, seed=0)
    assert everything(*run)[1] == {}


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3, float("inf"), float("nan")])
@pytest.mark.parametrize("max_norm", [1.0, None])
def test_clipping_is_that_of_torch(factor: float, max_norm: float | None) -> None:
    """Bit by bit."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES.values()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * factor
    gradients = [parameter.grad.clone() for parameter in parameters]
    expected = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)
    norm = clip_grad_norm_(gradients, max_norm)
    assert torch.equal(norm, expected) or norm.isnan()
    if torch.isfinite(norm):
        assert all(torch.equal(parameter.grad, each) for parameter, each in zip(parameters, gradients, strict=True))


# ----------------------------------------------------------------------------------------------------- non-finite

FINITE, NONFINITE = torch.tensor(False), torch.tensor(True)


def read(guard: NonFiniteGuard) -> list[int]:
    """Read the guard; return the steps of which it warns."""
    steps: list[int] = []
    guard.read(steps.append)
    return steps


def test_updates_that_were_skipped_are_counted_when_they_are_read() -> None:
    guard = NonFiniteGuard(max_consecutive=3)
    for step, flag in enumerate((FINITE, NONFINITE, NONFINITE, FINITE, NONFINITE)):
        guard.record(step, flag)
    assert (guard.num_recorded, guard.num_skipped) == (5, 0)
    assert read(guard) == [1, 4], "the first of each series"
    assert (guard.num_recorded, guard.num_skipped, guard.num_consecutive) == (0, 3, 1)


def test_a_series_goes_on_from_one_reading_to_the_next() -> None:
    guard = NonFiniteGuard(max_consecutive=3)
    guard.record(0, NONFINITE)
    assert read(guard) == [0]
    assert read(guard) == []
    guard.record(1, NONFINITE)
    assert read(guard) == []
    assert (guard.num_skipped, guard.num_consecutive) == (2, 2)


@pytest.mark.parametrize("max_consecutive", [1, 3])
@pytest.mark.parametrize("num_read", [0, 1])
def test_too_many_in_a_row_stop_the_run(max_consecutive: int, num_read: int) -> None:
    """At the next reading, even if later updates were applied; the first step of the series is named before."""
    guard = NonFiniteGuard(max_consecutive)
    named: list[int] = []
    for step in range(max_consecutive):
        if step == num_read:
            guard.read(named.append)
        guard.record(step, NONFINITE)
    guard.record(max_consecutive, FINITE)
    with pytest.raises(NonFiniteTraining) as caught:
        guard.read(named.append)
    assert f"not finite in {max_consecutive} updates in a row (training.max_consecutive_nonfinite)" in str(caught.value)
    assert guard.num_skipped == max_consecutive
    assert named == [0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_an_error(value: float) -> None:
    weights = [torch.full((3, 2), 3e38), torch.zeros(5)]  # the sum overflows
    check_finite(weights, step=7)
    weights[1][4] = value
    with pytest.raises(NonFiniteTraining, match=r"not finite after step 7, so they are not saved; .* are intact"):
        check_finite(weights, step=7)


def test_counts_of_a_checkpoint_continue() -> None:
    guard = NonFiniteGuard(max_consecutive=3)
    guard.load_state_dict({"num_skipped": 7, "num_consecutive_skipped": 2, "num_scaler_skips": 5})
    guard.record(9, NONFINITE)
    with pytest.raises(NonFiniteTraining):
        read(guard)
    assert guard.state_dict() == {"num_skipped": 8, "num_consecutive_skipped": 3, "num_scaler_skips": 5}


def test_skips_of_the_gradient_scaler_are_counted_separately_and_never_stop_the_run() -> None:
    guard = NonFiniteGuard(max_consecutive=2)
    for step, scale in enumerate((2.0**16, 2.0**15, 2.0**14, 2.0)):
        guard.record(step, NONFINITE, torch.tensor(scale))
    guard.record(4, FINITE, torch.tensor(2.0))
    assert read(guard) == []
    assert (guard.num_scaler_skips, guard.num_skipped, guard.num_consecutive) == (4, 0, 0)


def test_at_a_scale_of_1_the_scaler_is_not_the_reason() -> None:
    guard = NonFiniteGuard(max_consecutive=2)
    for step, scale in enumerate((2.0, 1.0)):
        guard.record(step, NONFINITE, torch.tensor(scale))
    assert read(guard) == [1]
    assert (guard.num_scaler_skips, guard.num_skipped, guard.num_consecutive) == (1, 1, 1)
    guard.record(2, NONFINITE, torch.tensor(0.5))
    with pytest.raises(NonFiniteTraining):
        read(guard)


def test_the_scale_of_the_update_counts() -> None:
    """The scaler halves its scale in place after the update, before the host reads the flag."""
    guard = NonFiniteGuard(max_consecutive=2)
    scale = torch.tensor(2.0)
    guard.record(0, NONFINITE, scale)
    scale.mul_(0.5)
    read(guard)
    assert (guard.num_scaler_skips, guard.num_skipped) == (1, 0)
