"""What several test modules share: a tiny run, and a way to start it as its user would."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
DIGITS = REPOSITORY / "data" / "digits.parquet"

# A run of a few seconds: 8x8 digits, a network of 20 thousand parameters, every feature at its default.
TINY_RUN = {
    "data.source": str(DIGITS),
    "model.preset": "digits_8",
    "model.overrides": '{"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}',
    "model.class_conditional": "true",
    "diffusion.beta_schedule": "cosine",
    "diffusion.prediction_type": "v_prediction",
    "training.num_steps": "6",
    "training.train_batch_size": "8",
    "training.learning_rate": "1e-3",
    "training.learning_rate_warmup_steps": "2",
    "training.checkpoint_every_steps": "2",
    "training.log_every_steps": "1",
    "preview.every_steps": "0",
    "evaluation.num_samples": "0",
}


def pytest_configure() -> None:
    """One thread: the tests share the cores, and exact comparisons need one order of additions."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the user's caches out of the tests, and the tests out of the user's caches."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("huggingface"))
    os.environ["HF_HUB_OFFLINE"] = "1"


def run_arguments(output_dir: Path, **changes: object) -> list[str]:
    """Returns the command line of the tiny run.

    Args:
        output_dir: Its run folder.
        **changes: Settings that differ; `training__seed=1` stands for `--training.seed 1`.
    """
    settings = TINY_RUN | {"training.output_dir": str(output_dir)}
    settings |= {name.replace("__", "."): _as_text(value) for name, value in changes.items()}
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


def _as_text(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) or value is None else str(value)


def run_process(
    command: Sequence[str], *, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in the repository with one thread and returns what it printed."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
