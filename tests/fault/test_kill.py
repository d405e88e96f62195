"""A process that is killed without a word, started again, loses nothing that a checkpoint held."""

import signal
import subprocess
import sys
from pathlib import Path

from ddpm_hf.cli import train
from ddpm_hf.training.checkpoint import find_latest
from tests.conftest import REPOSITORY, process_environment, run_arguments, run_process
from tests.integration.test_training import EVERYTHING_RANDOM, assert_same_run

LOADING = """
import sys
sys.modules["ddpm_hf"] = None
from diffusers import DiffusionPipeline
folder = sys.argv[1]
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipeline(batch_size=2, class_labels=[1, 2], num_inference_steps=2, output_type="uint8").images
print(type(pipeline).__name__, images.shape)
"""


def test_train_kill_resume_sample_load(tmp_path: Path) -> None:
    """The whole way of a user, through `accelerate launch`, with SIGKILL in the middle."""
    run = tmp_path / "run"
    changes = EVERYTHING_RANDOM | {"training__log_every_steps": 1}
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "train_ddpm.py"]
    process = subprocess.Popen(
        [sys.executable, *launch, *run_arguments(run, **changes, training__num_steps=4000)],
        cwd=REPOSITORY,
        env=process_environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.send_signal(signal.SIGSTOP)  # the launcher must not be able to react
            subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=True)
            break
    process.wait(timeout=30)
    process.stdout.close()
    latest, _ = find_latest(run / "checkpoints")
    assert latest is not None
    num_steps = latest.step + 4
    result = run_process([*launch, *run_arguments(run, **changes, training__num_steps=num_steps)])
    assert result.returncode == 0, result.stderr
    assert f"Continuing from step {latest.step}" in result.stdout
    assert train(run_arguments(tmp_path / "whole", **changes, training__num_steps=num_steps)) == 0
    assert_same_run(tmp_path / "whole", run, num_steps)
    result = run_process(["-c", LOADING, str(run / "pipeline")])
    assert result.stdout.splitlines()[-1:] == ["GaussianDiffusionPipeline (2, 8, 8, 1)"], result.stderr
