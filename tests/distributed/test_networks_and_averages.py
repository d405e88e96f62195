"""Two processes: a network that only rank 0 can read, stored averages, and an optimiser that cannot skip by itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddpm_hf.cli import train
from ddpm_hf.config import TrainingConfig
from ddpm_hf.training.optim import learning_rate_at
from tests.conftest import run_arguments, run_process, tiny_unet
from tests.distributed.test_two_processes import TORCHRUN
from tests.integration.test_training import metrics_of, tensors_of

pytestmark = pytest.mark.distributed

SETTINGS: dict[str, object] = {
    "model__preset": None,
    "model__overrides": {},
    "training__optimizer": "torch.optim.SGD",
    "training__optimizer_kwargs": {"momentum": 0.9},
    "training__learning_rate_schedule": "cosine",
    "training__posthoc_ema": True,
    "training__posthoc_ema_every_steps": 3,
}


def test_one_run_from_one_process_and_from_two(tmp_path: Path) -> None:
    """To 1e-5: only the order of float32 additions differs. The learning rate is that of the step in both."""
    tiny_unet(10).save_pretrained(tmp_path / "source")
    runs = {name: tmp_path / name for name in ("one", "two")}
    settings = SETTINGS | {"model__from_pretrained": tmp_path / "source"}
    assert train(run_arguments(runs["one"], **settings)) == 0
    result = run_process([*TORCHRUN, *run_arguments(runs["two"], **settings)])
    assert result.returncode == 0, result.stderr
    config = TrainingConfig(
        learning_rate=1e-3, learning_rate_warmup_steps=2, learning_rate_schedule="cosine", num_steps=6
    )
    expected = [learning_rate_at(step, config) for step in range(6)]
    for run in runs.values():
        assert [row["learning_rate"] for row in metrics_of(run)] == pytest.approx(expected)
    losses = [[row["loss"] for row in metrics_of(run)] for run in runs.values()]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-5)
    one, two = (tensors_of(run / "checkpoints" / "step_00000006") for run in runs.values())
    assert one.keys() == two.keys()
    for step, name in ((3, "ema_sigma_0.050"), (6, "ema_sigma_0.100")):
        for tensors, run in ((one, runs["one"]), (two, runs["two"])):
            path = run / "ema_snapshots" / f"step_{step:08d}" / f"{name}.safetensors"
            tensors |= {f"{name} of {step}: {key}": value for key, value in load_file(path).items()}
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5)


MAKING_A_NETWORK = """
import os, sys
from pathlib import Path
from ddpm_hf.config import ModelConfig, RunConfig, TrainingConfig
from ddpm_hf.diffusion import GaussianDiffusionScheduler
from ddpm_hf.training import processes
from ddpm_hf.training.network import make_network
source = sys.argv[1] if os.environ["RANK"] == "0" else "/a/disk/that/only/rank/0/has"
accelerator = processes.start(TrainingConfig(cpu=True))
config = RunConfig(model=ModelConfig(preset=None, from_pretrained=source))
try:
    unet = make_network(
        config, (1, 8, 8), None, GaussianDiffusionScheduler.create(), Path("/nowhere"), accelerator.device
    )
    said = sum(float(parameter.double().square().sum()) for parameter in unet.parameters())
except ValueError as error:
    said = str(error)[:60]
os.write(1, f"rank {os.environ['RANK']}: {said}\\n".encode())  # one write: the ranks share the pipe
"""


def test_only_rank_0_reads_the_network_and_every_rank_has_it(tmp_path: Path) -> None:
    unet = tiny_unet(None)
    unet.save_pretrained(tmp_path / "source")
    script = tmp_path / "make.py"
    script.write_text(MAKING_A_NETWORK)
    result = run_process([*TORCHRUN[:-1], str(script), str(tmp_path / "source")])
    total = sum(float(parameter.detach().double().square().sum()) for parameter in unet.parameters())
    assert sorted(result.stdout.splitlines()) == [f"rank {rank}: {total}" for rank in (0, 1)], result.stderr


def test_a_network_that_rank_0_cannot_read_is_refused_on_every_rank(tmp_path: Path) -> None:
    script = tmp_path / "make.py"
    script.write_text(MAKING_A_NETWORK)
    result = run_process([*TORCHRUN[:-1], str(script), str(tmp_path / "gone")])
    said = sorted(result.stdout.splitlines())
    assert [
        line.startswith(f"rank {rank}: model.from_pretrained {tmp_path}"[:40]) for rank, line in enumerate(said)
    ] == [
        True,
        True,
    ], result.stderr
