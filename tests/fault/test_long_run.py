"""A long run takes no more memory, files, threads or time in its last quarter than in its second."""

import gc
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ddpm_hf.cli.main import train
from ddpm_hf.training.trainer import Trainer
from tests.conftest import run_arguments
from tests.integration.test_training import EVERYTHING_RANDOM

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
    """Returns the memory that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells what a process holds")
def test_two_thousand_steps_with_everything_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 checkpoints, 40 previews, validations and stored averages, and 2000 lines of metrics.

    After 500 steps everything has been done several times. From then on files and threads stay the same. 500 Python
    objects and 16 MiB are left to caches and to the allocator (none and 4 MiB were seen): one object a step would be
    1500, and 60 checkpoints of 0.85 MB that stay in memory would be 50 MiB. Time is the median of the training steps on
    the processor, and may double, since other processes take part of its caches.
    """
    run = tmp_path / "run"
    seconds: list[float] = []
    held: list[tuple[float, int, int, int]] = []
    train_step, after_step = Trainer._train_step, Trainer._after_step

    def timed(self: Trainer, current: int) -> None:
        began = time.thread_time()
        train_step(self, current)
        seconds.append(time.thread_time() - began)

    def measured(self: Trainer) -> None:
        after_step(self)
        step = self.state.global_step
        if step % 100 == 0:
            lines = (run / "metrics.jsonl").read_text().splitlines()
            assert max(json.loads(line)["step"] for line in lines) == step, "the file can be read at any time"
            del lines
        if step % 500 == 0:
            gc.collect()
            num_files = len(os.listdir("/proc/self/fd"))
            held.append((resident_mib(), len(gc.get_objects()), num_files, threading.active_count()))

    monkeypatch.setattr(Trainer, "_train_step", timed)
    monkeypatch.setattr(Trainer, "_after_step", measured)
    assert train(run_arguments(run, **CHANGES)) == 0
    print(held)
    (memory, objects, files, threads), *later = held
    assert len(later) == 3
    assert {row[2:] for row in later} == {(files, threads)}
    assert max(row[1] for row in later) - objects < 500
    assert max(row[0] for row in later) - memory < 16
    assert np.median(seconds[1500:]) < 2 * np.median(seconds[500:1000])
    assert len(list((run / "checkpoints").iterdir())) == 3
    assert len((run / "metrics.jsonl").read_text().splitlines()) == NUM_STEPS + NUM_STEPS // 50
