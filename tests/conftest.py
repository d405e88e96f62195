"""Shared by all tests: the settings of a tiny run, the run itself and a saved pipeline, and ways to start processes.

Comparisons of runs and ways to disturb one are in runs.py, processes that start quickly in forked.py.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from diffusers import ModelMixin, UNet2DModel

# Until all tests are collected; see pytest_collection_finish.
gc.disable()
# One thread: the tests share the cores, and exact comparisons need one order of additions.
torch.set_num_threads(1)
# nohup ignores this signal, which tests send.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# The tests use caches of their own, which are deleted with the process. The libraries of the Hub read these variables
# when they are imported, and integration/conftest.py imports one, so that a hook of pytest would be too late.
_CACHES = tempfile.TemporaryDirectory(prefix="ddpm_hf-tests-")
for _name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_ENDPOINT", "HF_TOKEN", "TRANSFORMERS_CACHE"):
    os.environ.pop(_name, None)
os.environ |= {
    "XDG_CACHE_HOME": f"{_CACHES.name}/cache",
    "HF_HOME": f"{_CACHES.name}/huggingface",
    "HF_HUB_OFFLINE": "1",
    # The servers of the tests are on this machine, also where a proxy is configured.
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}

# Its logger keeps the stderr of the first import, which in a test may be one that is closed after it.
import datasets  # noqa: E402, F401

REPOSITORY = Path(__file__).parents[1]
DIGITS = REPOSITORY / "data" / "digits.parquet"


def pytest_collection_finish() -> None:
    """Exempt all modules and tests from garbage collection, which would walk over them in every full collection."""
    gc.freeze()
    gc.enable()


# A run of a second: 8x8 digits, a network of 45 thousand parameters, every feature at its default.
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
    """Return the command line of the tiny run.

    Args:
        output_dir: The run folder.
        **changes: Settings that differ; `training__seed=1` stands for `--training.seed 1`.
    """
    settings = TINY_RUN | {"training.output_dir": str(output_dir)}
    settings |= {name.replace("__", "."): _as_text(value) for name, value in changes.items()}
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


def _as_text(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) or value is None else str(value)


def process_environment() -> dict[str, str]:
    """Return the environment of a process that trains: one thread, and gloo on the loopback device."""
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def run_process(command: Sequence[str], *, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository and return what it printed.

    Its imports take five seconds or more. `tests.forked.run_command` runs a `ddpm-hf` command without them.
    """
    return subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# Of the finished run: training with validation, previews and stored EMA snapshots, then a report with recognition.
FINISHED_RUN: dict[str, object] = {
    "data__validation_fraction": 0.1,
    "training__validate_every_steps": 3,
    "training__posthoc_ema": True,
    "training__posthoc_ema_every_steps": 2,
    "preview__every_steps": 3,
    "preview__num_images": 20,
    "preview__num_inference_steps": 2,
    "evaluation__num_samples": 20,
    "evaluation__num_inference_steps": 3,
    "evaluation__recognition": True,
}


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished tiny run, made once per worker. READ ONLY: to change it, `shutil.copytree` it first.

    The command was `run_arguments(folder, **FINISHED_RUN)`: class-conditional digits with 10 % for validation; 6 steps
    with one row of metrics each and checkpoints of steps 2, 4 and 6; validation and a preview of 20 images in steps 3
    and 6; EMA snapshots of steps 2, 4 and 6; `pipeline/` with class names; the report of 20 samples with
    recognition.json. A copy that is started again with the same settings and another output_dir trains no step; with a
    larger num_steps it continues.
    """
    from ddpm_hf.cli.main import train

    run = tmp_path_factory.mktemp("shared") / "finished"
    assert train(run_arguments(run, **FINISHED_RUN)) == 0
    yield from _read_only(run)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a saved, untrained pipeline, made once per worker. READ ONLY: `shutil.copytree` it to change it.

    The network is `tiny_unet(10)`: 1x8x8 digits with the class names "0" to "9", without a null label; the scheduler
    has 1000 timesteps, the cosine schedule and v-prediction.
    """
    from ddpm_hf import GaussianDiffusionPipeline, GaussianDiffusionScheduler

    folder = tmp_path_factory.mktemp("shared") / "pipeline"
    scheduler = GaussianDiffusionScheduler.create(beta_schedule="cosine", prediction_type="v_prediction")
    class_names = {str(label): str(label) for label in range(10)}
    GaussianDiffusionPipeline(tiny_unet(10), scheduler, class_names=class_names).save_pretrained(folder)
    yield from _read_only(folder)


def _read_only(folder: Path) -> Iterator[Path]:
    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}

    before = state()
    yield folder
    assert state() == before, "a test changed a folder that all tests share; it must copy the folder first"


@pytest.fixture(scope="session", autouse=True)
def empty_working_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run all tests in an empty folder, so that no run or file in the checkout is found by a relative path.

    Nothing may be written there: a test that needs a working directory uses `monkeypatch.chdir`.
    """
    folder, before = tmp_path_factory.mktemp("working"), Path.cwd()
    os.chdir(folder)
    yield
    os.chdir(before)
    assert list(folder.iterdir()) == [], "a test wrote into the working directory"


@pytest.fixture
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start and end without Accelerate's singletons, which keep the settings of the first run in a process."""
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
    """Unload the code of saved folders after a test: diffusers runs that of all local folders under one name."""
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
    """Return the network of the tiny run, initialized from seed 0."""
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


def tiny_vae(kind: str = "AutoencoderKL", num_channels: int = 1, seed: int = 0) -> "ModelMixin":
    """Return an untrained VAE that divides images by 2, with latents of 2 channels (3 of a VQModel)."""
    from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

    torch.manual_seed(seed)
    settings: dict[str, Any] = {"in_channels": num_channels, "out_channels": num_channels}
    if kind == "AutoencoderTiny":
        for coder in ("encoder", "decoder"):
            settings |= {f"{coder}_block_out_channels": (8, 8), f"num_{coder}_blocks": (1, 1)}
        return AutoencoderTiny(**settings, latent_channels=2)
    settings |= {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    if kind == "VQModel":
        return VQModel(**settings, latent_channels=3, num_vq_embeddings=16)
    return AutoencoderKL(**settings, latent_channels=2)
