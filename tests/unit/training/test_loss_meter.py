"""The metrics tell the mean loss and that of each quartile of the timesteps, however the batch was split."""

import pytest
import torch

from ddpm_hf.training.meter import LossMeter
from tests.unit.diffusion.oracles import OperationCounter

CPU = torch.device("cpu")
FINE, SKIPPED = torch.tensor(False), torch.tensor(True)
TIMESTEPS = torch.tensor([0, 249, 250, 499, 500, 749, 750, 999])
LOSSES = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 9.0, 11.0, 15.0])


def columns(meter: LossMeter) -> dict[str, float | None]:
    return LossMeter.columns(meter.sums.tolist())


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 8])
def test_means_are_over_all_samples_and_over_each_quartile(micro_batch_size: int) -> None:
    meter = LossMeter(1000, 8, CPU)
    for factor in (1.0, 3.0):
        parts = zip(TIMESTEPS.split(micro_batch_size), LOSSES.split(micro_batch_size), strict=True)
        for timesteps, losses in parts:
            meter.add(factor * losses, timesteps, None)
        meter.end_step(FINE)
    assert columns(meter) == pytest.approx(
        {"loss": 2 * 53 / 8, "loss_q0": 3.0, "loss_q1": 8.0, "loss_q2": 16.0, "loss_q3": 26.0}
    )


def test_a_quartile_that_was_not_drawn_has_no_loss() -> None:
    meter = LossMeter(1000, 2, CPU)
    assert set(columns(meter).values()) == {None}
    meter.add(LOSSES[:2], TIMESTEPS[:2], None)
    meter.end_step(FINE)
    assert columns(meter) == {"loss": 1.5, "loss_q0": 1.5, "loss_q1": None, "loss_q2": None, "loss_q3": None}


def test_importance_weighs_the_losses_and_normalises_the_quartiles() -> None:
    meter = LossMeter(1000, 4, CPU)
    meter.add(torch.tensor([2.0, 4.0, 6.0, 8.0]), torch.tensor([0, 1, 400, 900]), torch.tensor([0.5, 1.5, 1.0, 2.0]))
    meter.end_step(FINE)
    expected = {"loss": 29 / 4, "loss_q0": 3.5, "loss_q1": 6.0, "loss_q2": None, "loss_q3": 8.0}
    assert columns(meter) == pytest.approx(expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skipped_update_leaves_no_trace(value: float) -> None:
    meter = LossMeter(1000, 8, CPU)
    for losses, is_nonfinite in ((LOSSES, FINE), (LOSSES * value, SKIPPED), (LOSSES, FINE)):
        meter.add(losses, TIMESTEPS, None)
        meter.end_step(is_nonfinite)
    assert columns(meter) == {"loss": 53 / 8, "loss_q0": 1.5, "loss_q1": 4.0, "loss_q2": 8.0, "loss_q3": 13.0}


def test_the_host_reads_nothing_in_a_step() -> None:
    meter = LossMeter(1000, 8, CPU)
    with OperationCounter() as counter:
        meter.add(LOSSES, TIMESTEPS, torch.ones(8))
        meter.end_step(FINE)
    assert counter.host_reads == 0


def test_sums_go_on_after_a_checkpoint_with_as_many_ranks_or_others() -> None:
    sums = [[float(rank * 10 + column) for column in range(10)] for rank in range(2)]
    meter = LossMeter(1000, 8, CPU)
    meter.load(sums, rank=1, num_processes=2)
    assert meter.sums.tolist() == sums[1]
    meter.load(sums, rank=3, num_processes=4)
    means = [float(5 + column) for column in range(10)]
    assert meter.sums.tolist() == means[:2] + [mean / 2 for mean in means[2:]], "half the samples, all the updates"


def test_a_checkpoint_that_knew_no_quartiles_fills_none() -> None:
    meter = LossMeter(1000, 8, CPU)
    meter.load([[6.0, 2.0]], rank=0, num_processes=1)
    assert columns(meter) == {"loss": 3.0, "loss_q0": None, "loss_q1": None, "loss_q2": None, "loss_q3": None}
