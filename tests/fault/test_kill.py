"""A run whose process is killed and started again loses nothing that a checkpoint held."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from ddpm_hf import GaussianDiffusionPipeline
from ddpm_hf.cli.main import train
from ddpm_hf.training.checkpoint import find_latest, verify_checkpoint
from tests.conftest import REPOSITORY, process_environment, run_arguments
from tests.fault import victim
from tests.runs import EVERYTHING_RANDOM, assert_same_run, files_of

LAUNCH = ["-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "train_ddpm.py"]


def test_train_kill_resume_sample_load(tmp_path: Path) -> None:
    """Everything a user does, through `accelerate launch`, with SIGKILL in the middle.

    The run is resumed here; loading where ddpm_hf is missing is in integration/test_loading.
    """
    run = tmp_path / "run"
    changes = EVERYTHING_RANDOM | {"training__log_every_steps": 1}
    process = subprocess.Popen(
        [sys.executable, *LAUNCH, *run_arguments(run, **changes, training__num_steps=4000)],
        cwd=REPOSITORY,
        env=process_environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            os.killpg(process.pid, signal.SIGKILL)  # all at once: the launcher must not be able to react
    process.wait()
    process.stdout.close()
    latest, _ = find_latest(run / "checkpoints")
    assert latest is not None
    num_steps = latest.step + 2
    for name in ("run", "whole"):
        assert train(run_arguments(tmp_path / name, **changes, training__num_steps=num_steps)) == 0
    assert_same_run(tmp_path / "whole", run, num_steps)
    pipeline = GaussianDiffusionPipeline.from_pretrained(run / "pipeline")
    images = pipeline(batch_size=2, class_labels=[1, 2], num_inference_steps=2, output_type="uint8").images
    assert images.shape == (2, 8, 8, 1)


# ------------------------------------------------------------------------------------------ at any moment (slow)

NUM_KILLS = int(os.environ.get("DDPM_HF_NUM_KILLS", "20"))
SEED = int(os.environ.get("DDPM_HF_KILL_SEED", time.time_ns() % 10**6))
# Short intervals, so that something is being written most of the time.
BUSY = EVERYTHING_RANDOM | {
    "training__checkpoint_every_steps": 2,
    "training__num_checkpoints_kept": 2,
    "training__posthoc_ema": True,
    "training__posthoc_ema_every_steps": 3,
    "training__log_every_steps": 1,
    "preview__every_steps": 4,
    "preview__num_images": 4,
}
# More steps than any of these runs computes, few enough that the disk has room for their EMA snapshots.
MANY = 30_000


def assert_nothing_torn(run: Path) -> int:
    """Check the files that a kill left behind, as another process may at any time; return the newest step."""
    for root in (run / "checkpoints", run / "ema_snapshots"):
        for folder in root.glob("step_*"):
            # A checkpoint that was being removed is the oldest of more than are kept.
            if len(list(root.glob("step_*"))) <= 2 or folder != min(root.glob("step_*")):
                verify_checkpoint(folder)
    lines = (run / "metrics.jsonl").read_text().split("\n") if (run / "metrics.jsonl").exists() else [""]
    steps = [json.loads(line)["step"] for line in lines[:-1]]
    assert steps == sorted(set(steps))
    latest, skipped = find_latest(run / "checkpoints")
    assert skipped == []
    return latest.step if latest is not None else 0


def assert_all_is_the_same(whole: Path, run: Path, step: int) -> None:
    """Compare two runs bit by bit, including previews and EMA snapshots."""
    assert_same_run(whole, run, step)
    for part in ("previews", "ema_snapshots", "pipeline/unet"):
        assert files_of(whole / part) == files_of(run / part)
    assert [path for path in run.rglob(".*") if path.name != ".lock"] == []


@pytest.mark.slow
@pytest.mark.timeout(900 + 60 * NUM_KILLS)
def test_a_run_that_is_killed_at_random_moments_loses_nothing(tmp_path: Path) -> None:
    """SIGKILL from outside at any time from the start of the process, DDPM_HF_NUM_KILLS times in one folder.

    `test_an_older_checkpoint_survives_whatever_stops_the_writing_of_the_next` kills one writing of a checkpoint, fast.
    """
    print(f"DDPM_HF_NUM_KILLS={NUM_KILLS} DDPM_HF_KILL_SEED={SEED}")
    random, run, log = Random(SEED), tmp_path / "run", tmp_path / "log"  # noqa: S311
    victim.start(run_arguments(tmp_path / "warm-up", **BUSY, training__num_steps=10), log).join()
    began = time.monotonic()
    victim.start(run_arguments(tmp_path / "other", **BUSY, training__num_steps=10), log).join()
    usual = time.monotonic() - began
    step = num_kills = 0
    while num_kills < NUM_KILLS or step <= NUM_KILLS:  # on a slow machine more kills come before the first checkpoint
        num_kills += 1
        process = victim.start(run_arguments(run, **BUSY, training__num_steps=MANY), log)
        time.sleep(random.uniform(0, 2 * usual))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        newest = assert_nothing_torn(run)
        assert newest >= step, "a checkpoint was lost"
        step = newest
    num_steps = step + 3
    for name in ("run", "whole"):
        process = victim.start(run_arguments(tmp_path / name, **BUSY, training__num_steps=num_steps), log)
        process.join()
        assert process.exitcode == 0, log.read_text()
    assert_all_is_the_same(tmp_path / "whole", run, num_steps)


@pytest.mark.slow
@pytest.mark.timeout(900 + 60 * NUM_KILLS)
def test_a_run_that_is_killed_at_any_change_to_the_disk_loses_nothing(tmp_path: Path) -> None:
    """Before DDPM_HF_NUM_KILLS of all openings, syncs, renames and removals of files, drawn with DDPM_HF_KILL_SEED."""
    print(f"DDPM_HF_NUM_KILLS={NUM_KILLS} DDPM_HF_KILL_SEED={SEED}")
    changes, log = BUSY | {"training__num_steps": 7}, tmp_path / "log"
    for name in ("warm-up", "whole"):
        victim.start(run_arguments(tmp_path / name, **changes), log).join()
    num_changes = int(log.read_text().split()[-1])
    assert num_changes > 200
    moments = list(range(1, num_changes + 1))
    for moment in Random(SEED).sample(moments, min(NUM_KILLS, num_changes)):  # noqa: S311
        run = tmp_path / f"run_{moment}"
        process = victim.start(run_arguments(run, **changes), log, kill_at=moment)
        process.join()
        assert process.exitcode == -signal.SIGKILL, (moment, log.read_text())
        assert_nothing_torn(run)
        process = victim.start(run_arguments(run, **changes), log)
        process.join()
        assert process.exitcode == 0, (moment, log.read_text())
        assert_all_is_the_same(tmp_path / "whole", run, 7)
        shutil.rmtree(run)


@pytest.mark.slow
def test_a_run_outlives_its_launcher_just_long_enough_to_save(tmp_path: Path) -> None:
    """accelerate launch dies of SIGTERM without telling its child, which would train on forever in a container.

    `test_a_launcher_that_went_away_while_the_data_were_decoded_stops_the_run` is fast and has no launcher.
    """
    run = tmp_path / "run"
    changes = BUSY | {"training__checkpoint_every_steps": MANY, "training__num_steps": MANY}
    with subprocess.Popen(
        [sys.executable, *LAUNCH, *run_arguments(run, **changes)],
        cwd=REPOSITORY,
        env=process_environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("step 5/"):
                    process.terminate()
                    break
            said = process.stdout.read()  # ends with the child
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    stopped_at = re.search(r"Stopped by a signal at step (\d+)", said)
    assert stopped_at is not None, said
    latest, _ = find_latest(run / "checkpoints")
    assert latest is not None
    assert latest.step == int(stopped_at[1])
