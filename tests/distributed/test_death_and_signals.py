"""Processes that die and launchers that are told to stop: nothing hangs, and the last checkpoint goes on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from ddpm_hf.cli.main import train
from ddpm_hf.training.checkpoint import find_latest
from tests.conftest import REPOSITORY, process_environment, run_arguments
from tests.distributed.test_two_processes import TORCHRUN
from tests.integration.test_training import metrics_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
# A process whose peer has died does not get beyond the step it is in; what takes so long here is to end Python.
BOUND_SECONDS = 240


def start(command: list[str], **variables: str) -> subprocess.Popen[str]:
    """Starts Python in the repository."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=process_environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], beginning: str) -> None:
    """Reads what a process prints until a line begins so."""
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith(beginning):
            return
    raise AssertionError(f"{beginning!r} did not come:\n{''.join(printed)}")


def goes_on(run: Path) -> None:
    """Checks that the newest checkpoint is whole and the run goes on from it, here on one process."""
    latest, skipped = find_latest(run / "checkpoints")
    assert latest is not None
    assert skipped == []
    assert train(run_arguments(run, training__num_steps=latest.step + 1)) == 0
    steps = [row["step"] for row in metrics_of(run)]
    assert steps == list(range(1, latest.step + 2))


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_other_and_the_last_checkpoint_goes_on(tmp_path: Path, killed: int) -> None:
    """Without a launcher that would end it: as on two machines, of which one has gone.

    They meet at a store of ours, as at torchrun's: its port is taken from the first moment, so nobody else can take it.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = ["train_ddpm.py", *run_arguments(tmp_path / "run", training__num_steps=100_000)]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    world["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    processes = [start(command, RANK=str(rank), LOCAL_RANK=str(rank), **world) for rank in (0, 1)]
    try:
        wait_for(processes[0], "step 4/")
        processes[killed].send_signal(signal.SIGKILL)
        started = time.monotonic()
        said, _ = processes[1 - killed].communicate(timeout=BOUND_SECONDS)
        assert time.monotonic() - started < BOUND_SECONDS
        assert processes[1 - killed].returncode == 1, said
        assert "RuntimeError" in said, "what it met is told"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    goes_on(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_launcher_that_is_told_to_stop_makes_both_ranks_save(tmp_path: Path, number: signal.Signals) -> None:
    """torchrun passes SIGTERM and SIGINT on. SIGUSR1 ends it, which its ranks take for SIGTERM."""
    run = tmp_path / "run"
    process = start(
        [*TORCHRUN, *run_arguments(run, training__num_steps=100_000, training__checkpoint_every_steps=50_000)]
    )
    try:
        wait_for(process, "step 3/")
        process.send_signal(number)
        said, _ = process.communicate(timeout=BOUND_SECONDS)  # until every rank has closed its output
    finally:
        process.kill()
    assert said.count("Stopped by a signal at step ") == 1, said
    stopped_at = int(said.split("Stopped by a signal at step ")[1].split(";")[0])
    assert max((run / "checkpoints").iterdir()).name == f"step_{stopped_at:08d}"
    goes_on(run)
