"""What several test modules share: a tiny run, and a way to start it as its user would."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from diffusers import UNet2DModel

# One thread: the tests share the cores, and exact comparisons need one order of additions.
torch.set_num_threads(1)
# The tests stay out of the user's caches, which go with the process. The libraries of the Hub read these variables when
# they are imported, and the conftest.py below imports one, so no hook of pytest would be early enough.
_CACHES = tempfile.TemporaryDirectory(prefix="ddpm_hf-tests-")
for _name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_ENDPOINT", "HF_TOKEN", "TRANSFORMERS_CACHE"):
    os.environ.pop(_name, None)
os.environ |= {
    "XDG_CACHE_HOME": f"{_CACHES.name}/cache",
    "HF_HOME": f"{_CACHES.name}/huggingface",
    "HF_HUB_OFFLINE": "1",
    # What the tests talk to is on this machine, also where the way to others leads through a proxy.
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}

REPOSITORY = Path(__file__).parents[1]
DIGITS = REPOSITORY / "data" / "digits.parquet"

# A run of a few seconds: 8x8 digits, a network of 45 thousand parameters, every feature at its default.
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


def process_environment() -> dict[str, str]:
    """Returns the environment of a process that trains: one thread, and gloo on the loopback device."""
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def run_process(command: Sequence[str], *, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Runs Python in the repository and returns what it printed."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps what it was first told in singletons: a test that tells it something is a process of its own."""
    from accelerate.state import AcceleratorState, GradientState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    reset()
    yield
    reset()
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def no_code_of_folders() -> Iterator[None]:
    """Diffusers executes the code of all local folders in modules of one name: that of a test ends with it."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("diffusers_modules.local"):
            del sys.modules[name]


def tiny_unet(
    num_class_embeds: int | None = None,
    self_conditioned: bool = False,
    learned_variance: bool = False,
    **overrides: object,
) -> "UNet2DModel":
    """Returns the network of the tiny run, freshly initialised from seed 0."""
    from ddpm_hf.config import ModelConfig
    from ddpm_hf.models import build_unet

    torch.manual_seed(0)
    settings = json.loads(TINY_RUN["model.overrides"]) | overrides
    return build_unet(
        ModelConfig(preset="digits_8", overrides=settings),
        (1, 8, 8),
        num_class_embeds,
        self_conditioned=self_conditioned,
        learned_variance=learned_variance,
    )
