"""What a line of metrics says: means since the line before, of all updates that were made, and how fast."""

import json
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from ddpm_hf import distributed
from ddpm_hf.training.meter import Meter, finite_or_none, peak_memory_mib
from tests.conftest import run_process

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
FINITE, NONFINITE = torch.tensor(False), torch.tensor(True)


@pytest.fixture
def accelerator() -> Accelerator:
    return distributed.start(cpu=True)


@pytest.fixture
def meter(accelerator: Accelerator) -> Meter:
    meter = Meter(accelerator, train_batch_size=8, num_timesteps=1000)
    meter.start(0)
    return meter


def add_update(meter: Meter, loss: float, is_nonfinite: torch.Tensor) -> None:
    """Counts an update whose eight losses are the same."""
    meter.losses.add(torch.full((8,), loss), torch.zeros(8, dtype=torch.int64), None)
    meter.losses.end_step(is_nonfinite)


def test_the_loss_is_the_mean_of_the_updates_that_were_made_since_the_line_before(meter: Meter) -> None:
    for loss, flag in ((1.0, FINITE), (float("nan"), NONFINITE), (2.0, FINITE), (6.0, FINITE)):
        add_update(meter, loss, flag)
    row = meter.take(4)
    assert (row["step"], row["num_images"], row["loss"]) == (4, 32, 3.0)
    add_update(meter, 5.0, FINITE)
    assert meter.take(5)["loss"] == 5.0


def test_an_interval_without_a_finite_update_has_no_loss(meter: Meter) -> None:
    add_update(meter, float("inf"), NONFINITE)
    row = meter.take(1)
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


def test_sums_that_a_checkpoint_kept_go_on(meter: Meter, accelerator: Accelerator) -> None:
    add_update(meter, 1.0, FINITE)
    again = Meter(accelerator, train_batch_size=8, num_timesteps=1000)
    again.restore(meter.gather())
    again.start(1)
    add_update(again, 4.0, FINITE)
    assert again.take(2)["loss"] == 2.5


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells what a process holds")
def test_the_peak_of_memory_is_what_was_held_then() -> None:
    """To 5 %: the two are read one after the other, and the kernel counts pages in batches."""

    def held_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    more = int(peak_memory_mib(torch.device("cpu")) - held_mib()) + 64
    held = np.ones(more * 2**20, np.uint8)
    at_the_peak = held_mib()
    del held
    assert peak_memory_mib(torch.device("cpu")) == pytest.approx(at_the_peak, rel=0.05)


@pytest.mark.slow
def test_the_peak_of_memory_is_not_that_of_the_launcher() -> None:
    """What starts a training may be a large notebook; a child of its own begins with nothing."""
    code = "import torch; from ddpm_hf.training.meter import peak_memory_mib as p; print(p(torch.device('cpu')))"
    held = np.ones(4 * 2**30, np.uint8)
    result = run_process(["-c", code])
    assert len(held) and float(result.stdout) < 2048, result.stderr


@pytest.mark.parametrize(("value", "expected"), [(1.5, 1.5), (float("nan"), None), (float("inf"), None)])
def test_a_number_that_json_cannot_hold_is_none(value: float, expected: float | None) -> None:
    assert finite_or_none(value) == expected
