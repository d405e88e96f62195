"""What a step costs: the host never waits for the device, and a run costs the same at any number of steps.

On the meta device tensors have no values, so that any read raises: what runs there reads nothing, on every device.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from oracles import OperationCounter

from ddpm_hf.diffusion import GaussianDiffusionScheduler

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
CHANNELS = {"fixed_small": 1, "fixed_large": 1, "learned_range": 2, "learned": 2}
WAYS: dict[str, Callable[[torch.Tensor, int], int | torch.Tensor]] = {
    "int": lambda run, row: (900, 800, 700, 600, 500, 400, 300, 200, 100, 0)[row],
    "CPU tensor": lambda run, row: torch.tensor((900, 800, 700, 600, 500, 400, 300, 200, 100, 0)[row]),
    "element": lambda run, row: run[row],
    "iteration": lambda run, row: list(run)[row],
    "slice of one": lambda run, row: run[row : row + 1],
    "of a slice": lambda run, row: run[row:][0],
    "of a strided slice": lambda run, row: run[row % 2 :: 2][row // 2],
}


def scheduler_on(device: str, **config: object) -> GaussianDiffusionScheduler:
    """A run of 10 steps whose list lies on the device."""
    scheduler = GaussianDiffusionScheduler(**config)
    scheduler.set_timesteps(10, device=device)
    return scheduler


def every_step(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """For each way to name a timestep, and each kind of step, a name and a call."""
    for prediction_type, variance_type in itertools.product(PREDICTION_TYPES, CHANNELS):
        scheduler = scheduler_on(device, prediction_type=prediction_type, variance_type=variance_type)
        output = torch.zeros(2, CHANNELS[variance_type], 4, 4, device=device)
        sample = torch.zeros(2, 1, 4, 4, device=device)
        for (way, name_of), (row, eta) in itertools.product(WAYS.items(), ((4, 1.0), (9, 0.0))):
            timestep = name_of(scheduler.timesteps, row)

            def call(scheduler=scheduler, output=output, timestep=timestep, sample=sample, eta=eta) -> object:
                return scheduler.step(output, timestep, sample, eta=eta)

            yield f"{prediction_type}, {variance_type}, {way} {row}, eta {eta}", call


def every_batch(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The methods for training, with one timestep for each sample on the device."""
    scheduler = scheduler_on(device, prediction_type="v_prediction")
    x, timesteps = torch.zeros(4, 1, 2, 2, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    yield "add_noise", lambda: scheduler.add_noise(x, x, timesteps)
    yield "get_velocity", lambda: scheduler.get_velocity(x, x, timesteps)
    yield "predict_original_sample", lambda: scheduler.predict_original_sample(x, timesteps, x)
    yield "predict_noise", lambda: scheduler.predict_noise(x, timesteps, x)
    yield "posterior", lambda: scheduler.posterior(x, x, timesteps)
    yield "snr", lambda: scheduler.snr(timesteps)


def test_tensors_without_values_can_be_sampled() -> None:
    for name, call in every_step("meta"):
        assert call().prev_sample.device.type == "meta", name


def test_tensors_without_values_can_be_noised() -> None:
    for name, call in every_batch("meta"):
        assert call() is not None, name


def test_a_tensor_from_elsewhere_on_the_device_has_to_be_read() -> None:
    """So that the tests above would notice a read."""
    scheduler = scheduler_on("meta")
    sample = torch.zeros(2, 1, 4, 4, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        scheduler.step(sample, scheduler.timesteps[3].int(), sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_thresholding_reads_nothing(dtype: torch.dtype) -> None:
    scheduler = scheduler_on("meta", thresholding=True)
    sample = torch.zeros(2, 1, 4, 4, device="meta", dtype=dtype)
    assert scheduler.step(sample, scheduler.timesteps[3], sample).prev_sample.dtype == dtype


def test_starting_a_run_costs_the_same_at_any_number_of_steps() -> None:
    """One tensor is made, and the table is read once: counts of what reaches the dispatcher, exact on any machine."""
    scheduler = GaussianDiffusionScheduler()
    counts = []
    for spacing, number in itertools.product(("leading", "trailing", "linspace", "quadratic"), (1, 10, 1000)):
        with OperationCounter() as counter:
            scheduler.set_timesteps(number, timestep_spacing=spacing)
        counts.append(dict(counter.counts))
    assert all(count == counts[0] for count in counts)
    assert sum(counts[0].values()) <= 2, counts[0]


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("calls", [every_step, every_batch])
def test_the_host_never_waits_for_the_gpu(calls: Callable[[str], Iterator[tuple[str, Callable[[], object]]]]) -> None:
    """The first call of each may: it moves tables to the device and warms up its generator."""
    for name, call in calls("cuda"):
        call()
        with refusing_to_wait():
            assert call() is not None, name
