"""Ranks that die and launchers that receive a signal: nothing hangs, and the run continues from the last checkpoint."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_hf.cli.main import train
from ddpm_hf.training.checkpoint import find_latest
from tests.conftest import REPOSITORY, process_environment, run_arguments
from tests.distributed.ranks import two_ranks
from tests.forked import wait_for_line
from tests.runs import metrics_of

pytestmark = pytest.mark.distributed
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_ddpm.py")


def assert_run_continues(run: Path) -> None:
    """Check that the newest checkpoint is whole and that one process continues the run from it."""
    latest, skipped = find_latest(run / "checkpoints")
    assert latest is not None
    assert skipped == []
    assert train(run_arguments(run, training__num_steps=latest.step + 1)) == 0
    assert [row["step"] for row in metrics_of(run)] == list(range(1, latest.step + 2))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies_ends_the_other_and_the_run_can_be_continued(tmp_path: Path, killed: int) -> None:
    """Without a launcher that would end the other rank."""
    with two_ranks(tmp_path, train, run_arguments(tmp_path / "run", training__num_steps=100_000)) as ranks:
        wait_for_line(ranks[0], tmp_path / "log_0", "step 4/")
        ranks[killed].kill()
        ranks[1 - killed].join()
        assert ranks[1 - killed].exitcode == 1
        assert "RuntimeError" in (tmp_path / f"log_{1 - killed}.err").read_text(), "the error is printed"
    assert_run_continues(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_launcher_makes_both_ranks_save(tmp_path: Path, number: signal.Signals) -> None:
    """torchrun passes SIGTERM and SIGINT on. SIGUSR1 ends it, which its ranks treat as SIGTERM.

    `test_a_signal_to_one_rank_stops_both_and_the_run_resumes_bit_identically` is fast and has no launcher.
    """
    run = tmp_path / "run"
    arguments = run_arguments(run, training__num_steps=100_000, training__checkpoint_every_steps=50_000)
    process = subprocess.Popen(
        [sys.executable, *TORCHRUN, *arguments],
        cwd=REPOSITORY,
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        printed = ""
        for line in process.stdout:
            printed += line
            if line.startswith("step 3/"):
                process.send_signal(number)
                break
        printed += process.stdout.read()  # until every rank has closed its output
    finally:
        process.kill()
        process.wait()
    assert printed.count("Stopped by a signal at step ") == 1, printed
    stopped_at = int(printed.split("Stopped by a signal at step ")[1].split(";")[0])
    assert max((run / "checkpoints").iterdir()).name == f"step_{stopped_at:08d}"
    assert_run_continues(run)
