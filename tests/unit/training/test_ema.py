"""Every average is its formula, and the network's own weights always come back."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from ddpm_hf.config import TrainingConfig
from ddpm_hf.training.ema import EMA, POSTHOC_SIGMA_RELS, decay_schedules, posthoc_name


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def average(model: nn.Module, **settings: object) -> EMA:
    """Returns the averages of a run with these settings of `training`."""
    return EMA(model, decay_schedules(TrainingConfig(**settings)))  # type: ignore[arg-type]


def decays(num: int, **settings: object) -> list[float]:
    """Returns the decays of the first updates."""
    law = decay_schedules(TrainingConfig(**settings))["ema"]  # type: ignore[arg-type]
    return [law(number) for number in range(num)]


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def copies(tensors: object) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]  # type: ignore[attr-defined]


def are_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_average_starts_at_the_weights_and_shares_no_storage_with_them() -> None:
    model = network()
    ema = average(model, posthoc_ema=True)
    before = copies(model.parameters())
    change(model)
    for name in ema.names:
        assert are_equal(ema.tensors(name), before)
    assert ema.num_updates == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"ema_decay": 0.9, "ema_warmup": "none"},
        {"ema_decay": 0.9999, "ema_warmup": "none"},
        {"ema_decay": 0.9999, "ema_warmup": "ramp"},
        {"ema_decay": 0.0, "ema_warmup": "ramp"},
        {"ema_decay": 0.999, "ema_warmup": "power", "ema_start_step": 7},
        {"ema_decay": 0.9, "ema_warmup": "none", "ema_every_steps": 5},
    ],
)
def test_the_average_is_its_formula(settings: dict[str, object]) -> None:
    """Against float64: 50 updates, each rounded to float32, stay within 1e-5 of values of order 10."""
    model = network()
    ema = average(model, **settings)
    expected = [parameter.detach().double() for parameter in model.parameters()]
    for decay in decays(50, **settings):
        change(model)
        ema.update()
        expected = [
            decay * mean + (1 - decay) * parameter.detach().double()
            for mean, parameter in zip(expected, model.parameters(), strict=True)
        ]
    assert ema.num_updates == 50
    for mean, exact in zip(ema.tensors(), expected, strict=True):
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_ramp_forgets_early_weights_and_ends_at_the_decay() -> None:
    law = decay_schedules(TrainingConfig(ema_decay=0.999, ema_warmup="ramp"))["ema"]
    assert [law(number) for number in (0, 1, 8)] == pytest.approx([1 / 10, 2 / 11, 0.5])
    assert law(8989) < 0.999 == law(8990) == law(10**9)
    assert decays(3, ema_decay=0.999, ema_warmup="none") == [0.999] * 3


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("warmup", ["ramp", "power"])
def test_the_laws_are_those_of_diffusers(warmup: str, start: int) -> None:
    """Its EMAModel copies the weights in the first update of either law; the ramp of TensorFlow keeps a tenth."""
    theirs = EMAModel(
        network().parameters(),
        decay=0.99,
        update_after_step=start,
        use_ema_warmup=warmup == "power",
        inv_gamma=2.0,
        power=0.75,
    )
    power = {"ema_inv_gamma": 2.0, "ema_power": 0.75} if warmup == "power" else {}
    ours = decays(1500, ema_decay=0.99, ema_warmup=warmup, ema_start_step=start, **power)
    expected = [theirs.get_decay(number + 1) for number in range(1500)]
    assert ours[start] == (0.1 if warmup == "ramp" else 0.0)
    assert ours[start + 1 :] == pytest.approx(expected[start + 1 :], rel=1e-12)
    assert ours[:start] == expected[:start] == [0.0] * start
    assert ours[-1] == 0.99


def test_the_power_law_reaches_the_decays_that_the_help_promises() -> None:
    for power, updates in ((3 / 4, 10_000), (2 / 3, 31_623)):
        law = decay_schedules(TrainingConfig(ema_decay=0.99999, ema_warmup="power", ema_power=power))["ema"]
        assert law(updates) == pytest.approx(0.999, abs=1e-6)


def test_until_its_start_the_average_is_a_copy() -> None:
    model = network()
    ema = average(model, ema_decay=0.9, ema_warmup="none", ema_start_step=3)
    for number in range(1, 5):
        change(model)
        ema.update()
        assert are_equal(ema.tensors(), copies(model.parameters())) == (number <= 3)


@pytest.mark.parametrize("warmup", ["none", "ramp", "power"])
def test_an_interval_changes_the_cost_and_not_the_length_of_the_average(warmup: str) -> None:
    """What is forgotten between two updates is the product of the single steps; in between nothing changes."""
    settings = {"ema_decay": 0.99, "ema_warmup": warmup, "ema_start_step": 6}
    single, by_four = decays(40, **settings), decays(40, **settings, ema_every_steps=4)
    assert [decay for number, decay in enumerate(by_four, start=1) if number % 4] == [1.0] * 30
    assert by_four[3::4] == pytest.approx([math.prod(single[start : start + 4]) for start in range(0, 40, 4)])


def test_between_two_updates_the_average_stays_as_it_is() -> None:
    model = network()
    ema = average(model, ema_decay=0.5, ema_warmup="none", ema_every_steps=3)
    seen = [copies(ema.tensors())]
    for _ in range(6):
        change(model)
        ema.update()
        seen.append(copies(ema.tensors()))
    assert [are_equal(*pair) for pair in pairwise(seen)] == [True, True, False, True, True, False]


def test_the_two_averages_for_later_are_the_power_functions() -> None:
    """Against the weighted mean in float64, in which update s counts s^(gamma + 1) - (s - 1)^(gamma + 1) parts."""
    gammas = {0.05: 16.97, 0.10: 6.94}  # Karras et al. 2024, section 3.1
    model = network()
    ema = average(model, posthoc_ema=True)
    assert ema.names == ["ema", "ema_sigma_0.050", "ema_sigma_0.100"]
    history = []
    for _ in range(30):
        change(model)
        ema.update()
        history.append([parameter.detach().double() for parameter in model.parameters()])
    for length in POSTHOC_SIGMA_RELS:
        parts = [s ** (gammas[length] + 1) - (s - 1) ** (gammas[length] + 1) for s in range(1, 31)]
        for index, found in enumerate(ema.tensors(posthoc_name(length))):
            exact = sum(part * weights[index] for part, weights in zip(parts, history, strict=True)) / sum(parts)
            # The exponents are published with two decimals: 5e-3 of weights of order 5 that differ by order 1.
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-3)


def test_an_update_does_not_touch_the_network() -> None:
    model = network()
    ema = average(model, ema_decay=0.5, posthoc_ema=True)
    change(model)
    before = copies(model.parameters())
    ema.update()
    assert are_equal(copies(model.parameters()), before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["ema", "ema_sigma_0.050"])
@pytest.mark.parametrize("fails", [False, True])
def test_swapped_in_gives_every_bit_back(fails: bool, name: str) -> None:
    """Copies, not sums and differences: w + (m - w) is not m in floating point."""
    model = network()
    ema = average(model, ema_decay=0.7, ema_warmup="none", posthoc_ema=True)
    for _ in range(3):
        change(model)
        ema.update()
    weights, averages, wanted = copies(model.parameters()), copies(ema.tensors()), copies(ema.tensors(name))
    storage = [parameter.data_ptr() for parameter in model.parameters()]

    def look() -> None:
        with ema.swapped_in(name):
            assert are_equal(copies(model.parameters()), wanted)
            if fails:
                raise RuntimeError("no preview today")

    if fails:
        with pytest.raises(RuntimeError, match="no preview today"):
            look()
    else:
        look()
    assert are_equal(copies(model.parameters()), weights)
    assert are_equal(ema.tensors(), averages)
    assert [parameter.data_ptr() for parameter in model.parameters()] == storage
    assert ema.num_updates == 3


def test_an_average_is_taken_up_from_a_network_that_holds_it() -> None:
    ema = average(network(0), posthoc_ema=True)
    others = copies(ema.tensors("ema", "ema_sigma_0.050"))
    saved = network(1)
    ema.load(saved, num_updates=17, name="ema_sigma_0.100")
    assert are_equal(ema.tensors("ema_sigma_0.100"), copies(saved.parameters()))
    assert are_equal(ema.tensors("ema", "ema_sigma_0.050"), others)
    assert ema.num_updates == 17
    change(saved)
    assert not are_equal(ema.tensors("ema_sigma_0.100"), copies(saved.parameters()))


def test_another_network_is_refused() -> None:
    ema = average(network())
    with pytest.raises(ValueError, match="argument"):
        ema.load(nn.Linear(3, 4), num_updates=0)
