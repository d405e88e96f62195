"""The average is its formula, and the network's own weights always come back."""

import pytest
import torch
from torch import nn

from ddpm_hf.training.ema import EMA


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


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
    ema = EMA(model, decay=0.9, warmup=False)
    before = copies(model.parameters())
    change(model)
    assert are_equal(ema.tensors(), before)
    assert ema.num_updates == 0


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, False), (0.9999, False), (0.9999, True), (0.0, True)])
def test_the_average_is_its_formula(decay: float, warmup: bool) -> None:
    """Against float64: 50 updates, each rounded to float32, stay within 1e-5 of values of order 10."""
    model = network()
    ema = EMA(model, decay, warmup)
    expected = [parameter.detach().double() for parameter in model.parameters()]
    for number in range(50):
        change(model)
        ema.update(model)
        weight = min(decay, (1 + number) / (10 + number)) if warmup else decay
        expected = [
            weight * average + (1 - weight) * parameter.detach().double()
            for average, parameter in zip(expected, model.parameters(), strict=True)
        ]
    assert ema.num_updates == 50
    for average, exact in zip(ema.tensors(), expected, strict=True):
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), exact, rtol=1e-5, atol=1e-5)


def test_warm_up_forgets_early_weights_and_ends_at_the_decay() -> None:
    ema = EMA(network(), decay=0.999, warmup=True)
    assert [ema.decay_at(number) for number in (0, 1, 8)] == pytest.approx([1 / 10, 2 / 11, 0.5])
    assert ema.decay_at(8989) < 0.999 == ema.decay_at(8990) == ema.decay_at(10**9)
    assert EMA(network(), decay=0.999, warmup=False).decay_at(0) == 0.999


def test_an_update_does_not_touch_the_network() -> None:
    model = network()
    ema = EMA(model, decay=0.5, warmup=False)
    change(model)
    before = copies(model.parameters())
    ema.update(model)
    assert are_equal(copies(model.parameters()), before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_swapped_in_gives_every_bit_back(fails: bool) -> None:
    """Copies, not sums and differences: w + (m - w) is not m in floating point."""
    model = network()
    ema = EMA(model, decay=0.7, warmup=False)
    for _ in range(3):
        change(model)
        ema.update(model)
    weights, averages = copies(model.parameters()), copies(ema.tensors())
    storage = [parameter.data_ptr() for parameter in model.parameters()]

    def look() -> None:
        with ema.swapped_in(model):
            assert are_equal(copies(model.parameters()), averages)
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
    ema = EMA(network(0), decay=0.9, warmup=True)
    saved = network(1)
    ema.load(saved, num_updates=17)
    assert are_equal(ema.tensors(), copies(saved.parameters()))
    assert ema.num_updates == 17
    change(saved)
    assert not are_equal(ema.tensors(), copies(saved.parameters()))


def test_another_network_is_refused() -> None:
    ema = EMA(network(), decay=0.9, warmup=True)
    with pytest.raises(ValueError, match="argument"):
        ema.load(nn.Linear(3, 4), num_updates=0)
