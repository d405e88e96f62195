"""Two processes on the CPU, started by torchrun as a user would."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_hf.cli import train
from tests.conftest import REPOSITORY, process_environment, run_arguments, run_process
from tests.integration.test_training import (
    EVERYTHING_BUT_DROPOUT,
    assert_same_run,
    loss_columns,
    metrics_of,
    tensors_of,
)

pytestmark = pytest.mark.distributed
WITH_VALIDATION = {
    "data__validation_fraction": 0.1,
    "training__validate_every_steps": 3,
    "tracking__trackers": ["tensorboard"],
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_ddpm.py")


def test_one_loss_curve_from_one_process_and_from_two(tmp_path: Path) -> None:
    """To 1e-5: only the order of float32 additions differs. The history of the losses is that of both ranks."""
    one, two = tmp_path / "one", tmp_path / "two"
    everything = EVERYTHING_BUT_DROPOUT | WITH_VALIDATION
    assert train(run_arguments(one, **everything)) == 0
    result = run_process([*TORCHRUN, *run_arguments(two, **everything)])
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(loss_columns(one), loss_columns(two), rtol=0, atol=1e-5)
    validation = [[row["validation_loss"] for row in metrics_of(run) if "validation_loss" in row] for run in (one, two)]
    assert len(validation[0]) == 2
    np.testing.assert_allclose(validation[0], validation[1], rtol=0, atol=1e-5)
    expected, found = (tensors_of(run / "checkpoints" / "step_00000006") for run in (one, two))
    assert expected.keys() == found.keys()
    for key in expected:
        torch.testing.assert_close(expected[key], found[key], rtol=0, atol=1e-5)
    assert len(list((two / "tensorboard").glob("events.*"))) == 1, "only one process writes to trackers"


def test_two_processes_stopped_through_one_of_them_continue_bit_identically(tmp_path: Path) -> None:
    """The launcher passes SIGTERM on; both ranks save the same step and exit; the same command goes on exactly.

    The objective learns from the losses of both ranks, and feeds its prediction back to the network.
    """
    command = [sys.executable, *TORCHRUN, *run_arguments(tmp_path / "run", **EVERYTHING_BUT_DROPOUT)]
    command += ["--training.num_steps", "4000"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=process_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    output, _ = process.communicate(timeout=120)
    stopped_at = int(output.split("Stopped by a signal at step ")[1].split(";")[0])
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert newest.name == f"step_{stopped_at:08d}"
    changes = EVERYTHING_BUT_DROPOUT | {"training__num_steps": stopped_at + 2}
    result = run_process([*TORCHRUN, *run_arguments(tmp_path / "run", **changes)])
    assert result.returncode == 0, result.stderr
    result = run_process([*TORCHRUN, *run_arguments(tmp_path / "whole", **changes)])
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "run", stopped_at + 2)


def test_a_users_mistake_is_told_once_and_no_rank_hangs(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    result = run_process([*TORCHRUN, *run_arguments(tmp_path / "run")])
    assert result.returncode != 0
    assert result.stderr.count("error: training.output_dir") == 1
    assert (tmp_path / "run" / "thesis.tex").read_text() == "precious"


def test_a_batch_that_two_processes_cannot_share_is_refused_with_numbers_that_work(tmp_path: Path) -> None:
    result = run_process([*TORCHRUN, *run_arguments(tmp_path / "run", training__train_batch_size=9)])
    assert "train_batch_size 9 is not a multiple of 2 processes; use 8 or 10." in result.stderr


FAILING_ON_RANK_1 = """
import os
from ddpm_hf.config import TrainingConfig
from ddpm_hf.training import processes
processes.start(TrainingConfig(cpu=True))
def fail_on_rank_1():
    if os.environ["RANK"] == "1":
        raise ValueError("only rank 1 sees this")
try:
    processes.on_every_rank(fail_on_rank_1)
except ValueError as error:
    os.write(1, f"rank {os.environ['RANK']} raised: {error}\\n".encode())  # one write: the ranks share the pipe

import torch
from ddpm_hf.training.micro_batch import settle
def attempt(size):
    if size > (24, 3)[int(os.environ["RANK"])]:
        raise torch.OutOfMemoryError(f"no room for {size}")
size = settle(TrainingConfig(micro_batch_size="auto"), 24, None, attempt)
os.write(1, f"rank {os.environ['RANK']} takes {size}\\n".encode())
try:
    settle(TrainingConfig(micro_batch_size="auto"), 24, None, lambda size: attempt(size + 3))
except ValueError as error:
    os.write(1, f"rank {os.environ['RANK']} gives up\\n".encode())
"""


def test_what_fails_on_one_rank_is_raised_on_every_rank_and_the_smallest_memory_decides(tmp_path: Path) -> None:
    """24 images fit on rank 0, 3 on rank 1: both take 3, a divisor of 24. Then none fits on rank 1: both give up."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING_ON_RANK_1)
    result = run_process([*TORCHRUN[:-1], str(script)])
    assert sorted(result.stdout.split("\n")) == [
        "",
        "rank 0 gives up",
        "rank 0 raised: only rank 1 sees this",
        "rank 0 takes 3",
        "rank 1 gives up",
        "rank 1 raised: only rank 1 sees this",
        "rank 1 takes 3",
        "training.micro_batch_size auto: 3 images, of 24: that fits.",
    ], result.stderr
