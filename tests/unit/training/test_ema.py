"""Every EMA is its formula, and the weights of the network are always restored; power-function profiles."""

import itertools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from numpy.polynomial.legendre import leggauss
from numpy.typing import NDArray
from torch import nn

from ddpm_hf.config import TrainingConfig
from ddpm_hf.training.ema import (
    EMA,
    MAX_SIGMA_REL,
    POSTHOC_SIGMA_RELS,
    _lerp_,
    combine,
    decay_schedules,
    gamma_of,
    posthoc_name,
    power_decay_at,
    profile_product,
)
from tests.unit.diffusion.oracles import OperationCounter


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def make_ema(model: nn.Module, **settings: object) -> EMA:
    """Return the EMAs of a run with these settings of `training`."""
    return EMA(model, decay_schedules(TrainingConfig(**settings)))  # type: ignore[arg-type]


def decays(num: int, **settings: object) -> list[float]:
    """Return the decays of the first updates."""
    decay_of = decay_schedules(TrainingConfig(**settings))["ema"]  # type: ignore[arg-type]
    return [decay_of(number) for number in range(num)]


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def copies(tensors: object) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]  # type: ignore[attr-defined]


def are_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_ema_starts_as_a_copy_of_the_weights() -> None:
    model = network()
    ema = make_ema(model, posthoc_ema=True)
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
def test_an_ema_is_its_formula(settings: dict[str, object]) -> None:
    """Against float64: 50 updates, each rounded to float32, stay within 1e-5 of values of order 10."""
    model = network()
    ema = make_ema(model, **settings)
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


def test_the_ramp_ends_at_the_decay() -> None:
    decay_of = decay_schedules(TrainingConfig(ema_decay=0.999, ema_warmup="ramp"))["ema"]
    assert [decay_of(number) for number in (0, 1, 8)] == pytest.approx([1 / 10, 2 / 11, 0.5])
    assert decay_of(8989) < 0.999 == decay_of(8990) == decay_of(10**9)
    assert decays(3, ema_decay=0.999, ema_warmup="none") == [0.999] * 3


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("warmup", ["ramp", "power"])
def test_the_decay_schedules_are_those_of_diffusers(warmup: str, start: int) -> None:
    """EMAModel copies the weights in the first update of either schedule; the ramp of TensorFlow keeps a tenth."""
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


def test_the_power_warmup_reaches_the_decays_of_its_help_text() -> None:
    for power, updates in ((3 / 4, 10_000), (2 / 3, 31_623)):
        decay_of = decay_schedules(TrainingConfig(ema_decay=0.99999, ema_warmup="power", ema_power=power))["ema"]
        assert decay_of(updates) == pytest.approx(0.999, abs=1e-6)


def test_before_ema_start_step_the_ema_is_a_copy() -> None:
    model = network()
    ema = make_ema(model, ema_decay=0.9, ema_warmup="none", ema_start_step=3)
    for number in range(1, 5):
        change(model)
        ema.update()
        assert are_equal(ema.tensors(), copies(model.parameters())) == (number <= 3)


@pytest.mark.parametrize("warmup", ["none", "ramp", "power"])
def test_an_interval_does_not_change_the_length_of_the_ema(warmup: str) -> None:
    """The decay of an update is the product of single decays; the EMA is unchanged in between."""
    settings = {"ema_decay": 0.99, "ema_warmup": warmup, "ema_start_step": 6}
    single, by_four = decays(40, **settings), decays(40, **settings, ema_every_steps=4)
    assert [decay for number, decay in enumerate(by_four, start=1) if number % 4] == [1.0] * 30
    assert by_four[3::4] == pytest.approx([math.prod(single[start : start + 4]) for start in range(0, 40, 4)])


def test_between_two_updates_the_ema_is_unchanged() -> None:
    model = network()
    ema = make_ema(model, ema_decay=0.5, ema_warmup="none", ema_every_steps=3)
    seen = [copies(ema.tensors())]
    for _ in range(6):
        change(model)
        ema.update()
        seen.append(copies(ema.tensors()))
    assert [are_equal(*pair) for pair in pairwise(seen)] == [True, True, False, True, True, False]


@pytest.mark.parametrize(
    "settings",
    [
        {"ema_warmup": "ramp", "posthoc_ema": True},
        {"ema_warmup": "power", "ema_start_step": 4},
        {"ema_warmup": "none", "ema_decay": 0.9, "ema_every_steps": 3, "posthoc_ema": True},
    ],
)
@pytest.mark.parametrize("table_length", [1, 5, 1024])
def test_a_skipped_step_changes_no_ema_and_no_later_decay(
    settings: dict[str, object], table_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, against the formula with the decay as a Python number, which a skipped step never reaches."""
    monkeypatch.setattr("ddpm_hf.training.ema._TABLE_LENGTH", table_length)
    model = network()
    ema = make_ema(model, ema_inv_gamma=2.0, **settings)
    schedules = decay_schedules(TrainingConfig(ema_inv_gamma=2.0, **settings))  # type: ignore[arg-type]
    expected = {name: copies(model.parameters()) for name in schedules}
    num_updates = 0
    for step in range(24):
        change(model)
        is_skipped = step in (0, 3, 4, 5, 11, 13, 20)
        ema.update(torch.tensor(is_skipped))
        if not is_skipped:
            for name, decay_of in schedules.items():
                if (decay := decay_of(num_updates)) < 1:
                    torch._foreach_lerp_(expected[name], copies(model.parameters()), 1.0 - decay)
            num_updates += 1
        for name, averages in expected.items():
            assert are_equal(ema.tensors(name), averages), (step, name)
    assert ema.num_updates == num_updates == 17


@pytest.mark.parametrize("posthoc_ema", [False, True])
@pytest.mark.parametrize("num_layers", [1, 50])
def test_an_update_reads_nothing_and_launches_few_operations(num_layers: int, posthoc_ema: bool) -> None:
    """For any number of tensors. On the meta device, where reading a value is an error."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(num_layers))).to("meta")
    ema = make_ema(model, posthoc_ema=posthoc_ema)
    is_skipped = torch.zeros((), dtype=torch.bool, device="meta")
    ema.update(is_skipped)  # computes the table
    with OperationCounter() as counter:
        for _ in range(10):
            ema.update(is_skipped)
    assert counter.launched == 10 * (4 + 3 * len(ema.names)), counter.counts
    assert counter.host_reads == 0


def test_an_update_on_another_device_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-6: m + weight * (w - m) in three operations; with weight 0 every bit stays."""
    weights, weight = [torch.randn(5, 3), torch.randn(7)], torch.tensor(0.25)
    averages = [torch.randn_like(each) for each in weights]
    expected = [torch.lerp(*pair, 0.25) for pair in zip(averages, weights, strict=True)]
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    before = copies(averages)
    _lerp_(averages, weights, torch.tensor(0.0))
    assert are_equal(averages, before)
    _lerp_(averages, weights, weight)
    torch.testing.assert_close(averages, expected, rtol=1e-6, atol=1e-6)


def test_between_two_updates_nothing_is_launched_for_an_ema(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a skipped step, of which only the device knows."""
    updated: list[int] = []
    monkeypatch.setattr("ddpm_hf.training.ema._lerp_", lambda *_: updated.append(step))
    ema = make_ema(network(), ema_every_steps=4)
    for step in range(1, 18):
        ema.update(torch.tensor(step == 6))
    assert updated == [4, 8, 9, 13, 17], "the host finds out in step 8"


def test_the_posthoc_emas_have_power_function_profiles() -> None:
    """Against the weighted mean in float64, in which update s counts s^(gamma + 1) - (s - 1)^(gamma + 1) parts."""
    gammas = {0.05: 16.97, 0.10: 6.94}  # Karras et al. 2024, section 3.1
    model = network()
    ema = make_ema(model, posthoc_ema=True)
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


def test_an_update_does_not_change_the_network() -> None:
    model = network()
    ema = make_ema(model, ema_decay=0.5, posthoc_ema=True)
    change(model)
    before = copies(model.parameters())
    ema.update()
    assert are_equal(copies(model.parameters()), before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["ema", "ema_sigma_0.050"])
@pytest.mark.parametrize("fails", [False, True])
def test_swapped_in_restores_every_bit(fails: bool, name: str) -> None:
    """Copies, not sums and differences: w + (m - w) is not m in floating point."""
    model = network()
    ema = make_ema(model, ema_decay=0.7, ema_warmup="none", posthoc_ema=True)
    for _ in range(3):
        change(model)
        ema.update()
    weights, averages, wanted = copies(model.parameters()), copies(ema.tensors()), copies(ema.tensors(name))
    storage = [parameter.data_ptr() for parameter in model.parameters()]

    def look() -> None:
        with ema.swapped_in(name):
            assert are_equal(copies(model.parameters()), wanted)
            if fails:
                raise RuntimeError("an error inside")

    if fails:
        with pytest.raises(RuntimeError, match="an error inside"):
            look()
    else:
        look()
    assert are_equal(copies(model.parameters()), weights)
    assert are_equal(ema.tensors(), averages)
    assert [parameter.data_ptr() for parameter in model.parameters()] == storage
    assert ema.num_updates == 3


# ------------------------------------------------------------------------------------------ power-function profiles

NODES, WEIGHTS = leggauss(200)


def integral(values: object, end: float) -> float:
    """Integrate from 0 to `end` by Gauss-Legendre quadrature, exact for polynomials up to degree 399."""
    return float(end / 2 * (WEIGHTS * values(end / 2 * (NODES + 1))).sum())  # type: ignore[operator]


def profile(s: NDArray[np.float64], t: float, gamma: float) -> NDArray[np.float64]:
    """The averaging profile at time t, Karras et al. 2024, Eq. 3: normalized power function on [0, t]."""
    return np.where(s <= t, (gamma + 1) * s**gamma / t ** (gamma + 1), 0.0)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_the_published_ones(sigma_rel: float, gamma: float) -> None:
    """To the two decimals of Karras et al. 2024, section 3.1."""
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_sigma_rel_is_the_relative_standard_deviation_of_the_profile(sigma_rel: float) -> None:
    """By quadrature, to 1e-6 for exponents that are not integers."""
    gamma, t = gamma_of(sigma_rel), 3.0
    assert gamma > 0
    mean = integral(lambda s: s * profile(s, t, gamma), t)
    variance = integral(lambda s: (s - mean) ** 2 * profile(s, t, gamma), t)
    assert integral(lambda s: profile(s, t, gamma), t) == pytest.approx(1.0, rel=1e-6)
    assert variance**0.5 / t == pytest.approx(sigma_rel, rel=1e-6)


def test_the_longest_ema_is_the_plain_mean() -> None:
    assert gamma_of(MAX_SIGMA_REL * (1 - 1e-12)) == pytest.approx(0.0, abs=1e-6)
    assert [power_decay_at(number, 0.0) for number in range(4)] == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4])


@pytest.mark.parametrize("gamma", [0.0, 2.5, 6.94, 16.97])
def test_an_ema_is_the_integral_of_its_profile(gamma: float) -> None:
    """The weights of an update count the integral of the profile over its interval."""
    counts = np.zeros(0)
    for number in range(12):
        decay = power_decay_at(number, gamma)
        counts = np.append(counts * decay, 1 - decay)
    edges = np.arange(13) / 12
    expected = edges[1:] ** (gamma + 1) - edges[:-1] ** (gamma + 1)
    np.testing.assert_allclose(counts, expected, rtol=1e-9)


@pytest.mark.parametrize("one", [(1.0, 16.97), (3.0, 6.94), (3.0, 0.5), (2.0, 6.94)])
@pytest.mark.parametrize("other", [(1.0, 6.94), (3.0, 16.97), (3.0, 6.94), (2.5, 40.0)])
def test_inner_products_of_profiles_are_those_of_quadrature(
    one: tuple[float, float], other: tuple[float, float]
) -> None:
    """To 1e-6, the error of the quadrature for exponents that are not integers."""
    expected = integral(lambda s: profile(s, *one) * profile(s, *other), min(one[0], other[0]))
    found = profile_product(*(np.array(value) for value in (*one, *other)))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def stored(num: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return times and exponents of EMAs stored at equal intervals, as in a run."""
    t = np.repeat(np.arange(1, num + 1) * 1000.0, 2)
    return t, np.tile([gamma_of(0.05), gamma_of(0.10)], num)


@pytest.mark.parametrize("num", [1, 10, 40, 400])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.10])
def test_a_stored_ema_is_reconstructed_from_itself(num: int, sigma_rel: float) -> None:
    """With 400 intervals the condition number is 1e8, which leaves 1e-8 in float64."""
    t, gamma = stored(num)
    weights, error = combine(t, gamma, t[-1], gamma_of(sigma_rel))
    expected = np.zeros(2 * num)
    expected[-2 if sigma_rel == 0.05 else -1] = 1.0
    np.testing.assert_allclose(weights, expected, atol=1e-7)
    assert error < 1e-7


@pytest.mark.parametrize(
    ("num", "sigma_rel", "largest"), [(10, 0.08, 0.01), (40, 0.04, 0.002), (40, 0.08, 0.0006), (40, 0.15, 0.002)]
)
def test_the_reported_error_is_the_distance_of_the_profiles(num: int, sigma_rel: float, largest: float) -> None:
    """The error by quadrature over each interval between stored averages, where all profiles are smooth."""
    t, gamma = stored(num)
    target = gamma_of(sigma_rel)
    weights, error = combine(t, gamma, t[-1], target)
    assert error < largest
    distance = whole = 0.0
    for start, end in zip([0.0, *t[:-2:2]], t[::2], strict=True):
        s = (start + end) / 2 + (end - start) / 2 * NODES
        wanted = profile(s, t[-1], target)
        made = (weights[:, None] * profile(s[None], t[:, None], gamma[:, None])).sum(axis=0)
        distance += float((WEIGHTS * (made - wanted) ** 2).sum())
        whole += float((WEIGHTS * wanted**2).sum())
    assert (distance / whole) ** 0.5 == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(("num", "sigma_rel"), [(5, 0.15), (3, 0.07), (20, 0.25), (40, 0.25), (40, 0.1)])
def test_coefficients_sum_to_1(num: int, sigma_rel: float) -> None:
    """So parameters that never changed stay as they are; 1e-9 is rounding."""
    t, gamma = stored(num)
    weights, _ = combine(t, gamma, t[-1], gamma_of(sigma_rel))
    assert weights.sum() == pytest.approx(1.0, abs=1e-9)


def test_no_other_combination_is_nearer() -> None:
    """Least squares: a small step in any direction that keeps the sum of 1 makes the squared distance larger."""
    t, gamma = stored(10)
    target = gamma_of(0.07)
    weights, error = combine(t, gamma, t[-1], target)
    products = profile_product(t[:, None], gamma[:, None], t[None], gamma[None])
    wanted = profile_product(t, gamma, np.float64(t[-1]), np.float64(target))
    whole = float(profile_product(*(np.array(value) for value in (t[-1], target, t[-1], target))))

    def distance(counts: NDArray[np.float64]) -> float:
        return float(whole - 2 * wanted @ counts + counts @ products @ counts)

    assert distance(weights) == pytest.approx(error**2 * whole, rel=1e-6)
    identity = np.eye(len(t))
    for one, other in itertools.permutations(range(len(t)), 2):
        assert distance(weights + 1e-3 * (identity[one] - identity[other])) > distance(weights)
