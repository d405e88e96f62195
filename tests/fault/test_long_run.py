"""A long run needs no more memory, files or threads in its last quarter than in its second."""

import gc
import json
import os
import threading
from pathlib import Path

import pytest

from ddpm_hf.cli.main import train
from tests.conftest import run_arguments
from tests.runs import EVERYTHING_RANDOM, at_step

NUM_STEPS = 2000
CHANGES = EVERYTHING_RANDOM | {
    "data__validation_fraction": 0.02,
    "training__num_steps": NUM_STEPS,
    "training__checkpoint_every_steps": 25,
    "training__log_every_steps": 1,
    "training__validate_every_steps": 50,
    "training__posthoc_ema": True,
    "preview__every_steps": 50,
    "preview__num_images": 4,
}


def resident_mib() -> float:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_two_thousand_steps_with_everything_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 checkpoints, 40 previews, validations and EMA snapshots, and 2000 rows of metrics.

    After 500 steps everything has been done several times. From then on files and threads stay the same. 500 Python
    objects and 16 MiB are allowed for caches and the allocator (none and 4 MiB were seen): one object per step would be
    1500, and 60 checkpoints of 0.85 MB that stay in memory would be 50 MiB.
    """
    run = tmp_path / "run"
    held: list[tuple[float, int, int, int]] = []

    def measure() -> None:
        gc.collect()
        num_files = len(os.listdir("/proc/self/fd"))
        held.append((resident_mib(), len(gc.get_objects()), num_files, threading.active_count()))

    def read_metrics(step: int) -> None:
        last = (run / "metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["step"] == step, "the file can be read at any time"

    for step in range(100, NUM_STEPS, 100):
        at_step(step + 1, lambda step=step: read_metrics(step), monkeypatch)  # type: ignore[misc]
    for step in range(500, NUM_STEPS + 1, 500):
        at_step(step, measure, monkeypatch)
    assert train(run_arguments(run, **CHANGES)) == 0
    print(held)
    (memory, objects, files, threads), *later = held
    assert len(later) == 3
    assert {row[2:] for row in later} == {(files, threads)}
    assert max(row[1] for row in later) - objects < 500
    assert max(row[0] for row in later) - memory < 16
    assert len(list((run / "checkpoints").iterdir())) == 3
    assert len((run / "metrics.jsonl").read_text().splitlines()) == NUM_STEPS + NUM_STEPS // 50
