"""Log lines hold means since the previous line, over all updates that were made, and the speed of training alone."""

import json
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from ddpm_hf import distributed
from ddpm_hf.training.meter import LossMeter, Meter, finite_or_none, peak_memory_mib
from tests.conftest import run_process
from tests.unit.diffusion.oracles import OperationCounter

CPU = torch.device("cpu")
FINITE, NONFINITE = torch.tensor(False), torch.tensor(True)
TIMESTEPS = torch.tensor([0, 249, 250, 499, 500, 749, 750, 999])
LOSSES = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 9.0, 11.0, 15.0])

# ------------------------------------------------------------------------------------------------------ loss meter


def columns(meter: LossMeter) -> dict[str, float | None]:
    return LossMeter.columns(meter.sums.tolist())


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_means_are_over_all_samples_and_over_each_quartile(micro_batch_size: int) -> None:
    meter = LossMeter(1000, 8, CPU)
    for factor in (1.0, 3.0):
        parts = zip(TIMESTEPS.split(micro_batch_size), LOSSES.split(micro_batch_size), strict=True)
        for timesteps, losses in parts:
            meter.add(factor * losses, timesteps, None)
        meter.end_step(FINITE)
    assert columns(meter) == pytest.approx(
        {"loss": 2 * 53 / 8, "loss_q0": 3.0, "loss_q1": 8.0, "loss_q2": 16.0, "loss_q3": 26.0}
    )


def test_a_quartile_without_timesteps_has_no_loss() -> None:
    meter = LossMeter(1000, 2, CPU)
    assert set(columns(meter).values()) == {None}
    meter.add(LOSSES[:2], TIMESTEPS[:2], None)
    meter.end_step(FINITE)
    assert columns(meter) == {"loss": 1.5, "loss_q0": 1.5, "loss_q1": None, "loss_q2": None, "loss_q3": None}


def test_importance_weighs_the_losses_and_normalizes_the_quartiles() -> None:
    meter = LossMeter(1000, 4, CPU)
    meter.add(torch.tensor([2.0, 4.0, 6.0, 8.0]), torch.tensor([0, 1, 400, 900]), torch.tensor([0.5, 1.5, 1.0, 2.0]))
    meter.end_step(FINITE)
    expected = {"loss": 29 / 4, "loss_q0": 3.5, "loss_q1": 6.0, "loss_q2": None, "loss_q3": 8.0}
    assert columns(meter) == pytest.approx(expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skipped_update_is_not_counted(value: float) -> None:
    meter = LossMeter(1000, 8, CPU)
    for losses, is_nonfinite in ((LOSSES, FINITE), (LOSSES * value, NONFINITE), (LOSSES, FINITE)):
        meter.add(losses, TIMESTEPS, None)
        meter.end_step(is_nonfinite)
    assert columns(meter) == {"loss": 53 / 8, "loss_q0": 1.5, "loss_q1": 4.0, "loss_q2": 8.0, "loss_q3": 13.0}


def test_the_host_reads_nothing_in_a_step() -> None:
    meter = LossMeter(1000, 8, CPU)
    with OperationCounter() as counter:
        meter.add(LOSSES, TIMESTEPS, torch.ones(8))
        meter.end_step(FINITE)
    assert counter.host_reads == 0


def test_sums_continue_after_a_checkpoint_with_the_same_number_of_ranks_or_another() -> None:
    sums = [[float(rank * 10 + column) for column in range(10)] for rank in range(2)]
    meter = LossMeter(1000, 8, CPU)
    meter.load(sums, rank=1, num_processes=2)
    assert meter.sums.tolist() == sums[1]
    meter.load(sums, rank=3, num_processes=4)
    means = [float(5 + column) for column in range(10)]
    assert meter.sums.tolist() == means[:2] + [mean / 2 for mean in means[2:]], "half the samples, all the updates"
    meter.load([], rank=0, num_processes=1)
    assert not meter.sums.any()


def test_a_checkpoint_without_quartiles_fills_none() -> None:
    meter = LossMeter(1000, 8, CPU)
    meter.load([[6.0, 2.0]], rank=0, num_processes=1)
    assert columns(meter) == {"loss": 3.0, "loss_q0": None, "loss_q1": None, "loss_q2": None, "loss_q3": None}


# ----------------------------------------------------------------------------------------------------------- meter


@pytest.fixture
def accelerator(fresh_accelerate: None) -> Accelerator:
    return distributed.start(cpu=True)


@pytest.fixture
def meter(accelerator: Accelerator) -> Meter:
    meter = Meter(accelerator, train_batch_size=8, num_timesteps=1000)
    meter.start(0)
    return meter


def add_update(meter: Meter, loss: float, is_nonfinite: torch.Tensor) -> None:
    """Count an update whose eight losses are equal."""
    meter.losses.add(torch.full((8,), loss), torch.zeros(8, dtype=torch.int64), None)
    meter.losses.end_step(is_nonfinite)


def test_the_loss_is_the_mean_of_the_updates_since_the_previous_line(meter: Meter) -> None:
    for loss, flag in ((1.0, FINITE), (float("nan"), NONFINITE), (2.0, FINITE), (6.0, FINITE)):
        add_update(meter, loss, flag)
    row = meter.take(4)
    assert (row["step"], row["num_images"], row["loss"]) == (4, 32, 3.0)
    add_update(meter, 5.0, FINITE)
    assert meter.take(5)["loss"] == 5.0
    add_update(meter, float("inf"), NONFINITE)
    row = meter.take(6)
    assert row["loss"] is None
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_the_speed_is_that_of_training_alone(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 steps of 8 images in 2 s, and 30 s of something else between them."""
    clock = iter([100.0, 101.0, 131.0, 132.0, 140.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    meter.start(2, seconds=7.0)
    with meter.paused():
        pass
    assert meter.take(6).items() >= {"images_per_second": 16.0, "seconds": 9.0}.items()
    assert meter.take(7).items() >= {"images_per_second": 1.0, "seconds": 17.0}.items()


def test_sums_of_a_checkpoint_continue(meter: Meter, accelerator: Accelerator) -> None:
    add_update(meter, 1.0, FINITE)
    again = Meter(accelerator, train_batch_size=8, num_timesteps=1000)
    again.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    again.start(1)
    add_update(again, 4.0, FINITE)
    assert again.take(2)["loss"] == 2.5


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells what a process holds")
def test_the_peak_of_memory_is_what_was_held_then() -> None:
    """To 5 %: the two are read one after the other, and the kernel counts pages in batches."""

    def held_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    more = int(peak_memory_mib(CPU) - held_mib()) + 64
    held = np.ones(more * 2**20, np.uint8)
    at_the_peak = held_mib()
    del held
    assert peak_memory_mib(CPU) == pytest.approx(at_the_peak, rel=0.05)


@pytest.mark.slow
def test_the_peak_of_memory_is_not_that_of_the_launcher() -> None:
    """The parent of a training may be a large notebook."""
    code = "import torch; from ddpm_hf.training.meter import peak_memory_mib as p; print(p(torch.device('cpu')))"
    held = np.ones(4 * 2**30, np.uint8)
    result = run_process(["-c", code])
    assert len(held) and float(result.stdout) < 2048, result.stderr


@pytest.mark.parametrize(("value", "expected"), [(1.5, 1.5), (float("nan"), None), (float("inf"), None)])
def test_a_number_that_json_cannot_hold_is_none(value: float, expected: float | None) -> None:
    assert finite_or_none(value) == expected
