"""Checks that need a GPU, in one command: python benchmarks/gpu_check.py.

Each check prints PASS or FAIL and what it saw; the results go to benchmarks/results/gpu_check_<device>.json with the
device named. The images are those of --data or of the environment variable DDPM_HF_CIFAR10 (a CIFAR-10 parquet or .npy
file); without either, pictures of random squares stand in, and the result says so.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # the checkout is enough, it need not be installed
RESULTS = Path(__file__).resolve().parent / "results"
SMALL_NET = {"block_out_channels": [32, 64, 64, 64], "layers_per_block": 1, "norm_num_groups": 8, "dropout": 0.1}


@dataclass
class Context:
    """What the checks share.

    Args:
        work_dir: Folder for run folders.
        data: Images to train on.
        num_steps: Steps of the long training check.
        details: Measurements for the result file.
    """

    work_dir: Path
    data: Path
    num_steps: int
    details: dict[str, Any] = field(default_factory=dict)


def train(context: Context, name: str, *flags: str, expected_code: int = 0) -> tuple[Path, str]:
    """Train in a process of its own and return the run folder and what was printed."""
    output_dir = context.work_dir / name
    command = [sys.executable, "train_ddpm.py", "--config", "configs/cifar10_32.yaml"]
    command += ["--data.source", str(context.data), "--training.output_dir", str(output_dir)]
    command += ["--preview.every_steps", "0", "--evaluation.num_samples", "0", *flags]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1800)
    output = result.stdout + result.stderr
    if result.returncode != expected_code:
        raise AssertionError(f"exit code {result.returncode} instead of {expected_code}:\n{output[-3000:]}")
    return output_dir, output


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def small_run(precision: str, *flags: str) -> list[str]:
    """Return the flags of a run of a few seconds."""
    settings = {
        "model.overrides": json.dumps(SMALL_NET),
        "training.mixed_precision": precision,
        "training.num_steps": "40",
        "training.learning_rate_warmup_steps": "5",
        "training.checkpoint_every_steps": "20",
        "training.log_every_steps": "10",
        "training.deterministic": "true",
    }
    return [part for key, value in settings.items() for part in (f"--{key}", value)] + list(flags)


def check_precision(context: Context, precision: str) -> str:
    """Training in half precision stays finite and learns."""
    output_dir, _ = train(context, precision, *small_run(precision))
    losses = [row["loss"] for row in metrics(output_dir)]
    assert all(loss is not None for loss in losses), losses
    assert losses[-1] < losses[0], losses
    return f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"


def check_resume(context: Context, precision: str) -> str:
    """A stopped and resumed run is bit-identical to one that was not, including the gradient scaler."""
    from safetensors.torch import load_file

    whole, _ = train(context, f"whole_{precision}", *small_run(precision))
    schedule = ["--training.num_steps", "20"]
    stopped, _ = train(context, f"stopped_{precision}", *small_run(precision), *schedule)
    train(context, f"stopped_{precision}", *small_run(precision))
    files = (
        "unet/diffusion_pytorch_model.safetensors",
        "ema/diffusion_pytorch_model.safetensors",
        "optimizer.safetensors",
    )
    for name in files:
        one, other = (load_file(run / "checkpoints" / "step_00000040" / name) for run in (whole, stopped))
        different = [key for key in one if not torch.equal(one[key], other[key])]
        assert not different, f"{name}: {len(different)} of {len(one)} tensors differ, first {different[0]}"
    states = [
        json.loads((run / "checkpoints" / "step_00000040" / "trainer_state.json").read_text())
        for run in (whole, stopped)
    ]
    assert states[0]["scaler"] == states[1]["scaler"], states
    return f"bit-identical; scaler {states[0]['scaler']}"


def check_scheduler_synchronization(context: Context) -> str:
    """A scheduler step reads nothing from the device."""
    from ddpm_hf import GaussianDiffusionScheduler

    checked = 0
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        for eta in (0.0, 1.0):
            scheduler = GaussianDiffusionScheduler(prediction_type=prediction_type)
            scheduler.set_timesteps(10, device="cuda")
            generator = torch.Generator("cuda").manual_seed(0)
            sample = torch.randn(2, 3, 8, 8, device="cuda", generator=generator)
            timesteps = torch.tensor([3, 7], device="cuda")
            scheduler.add_noise(sample, sample, timesteps)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for timestep in scheduler.timesteps:
                    sample = scheduler.step(sample, timestep, sample, generator=generator, eta=eta).prev_sample
                scheduler.add_noise(sample, sample, timesteps)
                scheduler.get_velocity(sample, sample, timesteps)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            checked += 1
    return f"{checked} combinations of prediction type and eta"


def check_sampling_synchronization(context: Context) -> str:
    """The sampling loop reads nothing from the device between the first and the last step."""
    from diffusers import UNet2DModel

    from ddpm_hf import GaussianDiffusionPipeline, GaussianDiffusionScheduler

    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipeline = GaussianDiffusionPipeline(unet, GaussianDiffusionScheduler()).to("cuda")
    pipeline.set_progress_bar_config(disable=True)

    def switch_on(pipeline: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        torch.cuda.set_sync_debug_mode("error" if step < 18 else "default")
        return tensors

    generator = torch.Generator("cuda").manual_seed(0)
    try:
        for _ in range(2):  # the first call also loads kernels
            pipeline(batch_size=2, num_inference_steps=20, generator=generator, callback_on_step_end=switch_on)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "18 of 20 steps watched"


def check_training_synchronization(context: Context) -> str:
    """Between two log lines, a training step reads nothing from the device."""
    from ddpm_hf.config import parse_command_line
    from ddpm_hf.training.trainer import Trainer

    settings = small_run("bf16", "--training.log_every_steps", "40", "--training.deterministic", "false")
    output_dir = context.work_dir / "synchronization"
    config, _ = parse_command_line(
        [
            *("--config", str(REPOSITORY / "configs" / "cifar10_32.yaml"), "--data.source", str(context.data)),
            *("--training.output_dir", str(output_dir), "--training.compile", "false"),
            *("--preview.every_steps", "0", "--evaluation.num_samples", "0", *settings),
        ]
    )
    trainer = Trainer(config)
    train_step = trainer._train_step

    def watched(step: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if 5 <= step < 15 else "default")
        try:
            train_step(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer._train_step = watched  # type: ignore[method-assign]
    trainer.fit()
    trainer.folder.release()
    return "10 steps watched"


def check_out_of_memory(context: Context) -> str:
    """Running out of memory ends in a sentence that names the setting to change."""
    _, output = train(
        context, "oom", "--training.train_batch_size", "8192", "--training.num_steps", "2", expected_code=1
    )
    sentence = next(line for line in output.splitlines() if line.startswith("error:"))
    assert "training.micro_batch_size" in sentence, sentence
    return sentence


def check_automatic_micro_batch(context: Context) -> str:
    """With micro_batch_size auto the same batch is split until it fits, and trains."""
    flags = ["--training.train_batch_size", "16384", "--training.micro_batch_size", "auto", "--training.num_steps", "2"]
    output_dir, output = train(context, "auto", *flags)
    sentence = next(line for line in output.splitlines() if line.startswith("training.micro_batch_size auto:"))
    peak = max(row["peak_memory_mib"] for row in metrics(output_dir))
    return f"{sentence} Peak {peak:.0f} MiB of {torch.cuda.get_device_properties(0).total_memory / 2**20:.0f}."


def check_paper_network(context: Context, precision: str) -> str:
    """The 35.7 M network trains on 32x32 images at the paper's batch size."""
    output_dir, output = train(
        context,
        f"paper_{precision}",
        *("--training.num_steps", str(context.num_steps), "--training.mixed_precision", precision),
        *("--training.log_every_steps", "50", "--training.learning_rate_warmup_steps", "100"),
    )
    rows = metrics(output_dir)
    speed = float(np.median([row["images_per_second"] for row in rows[2:] or rows]))
    assert rows[-1]["loss"] < 0.15, rows[-1]
    assert re.search("35,746,307 parameters", output)
    context.details[f"images_per_second_{precision}"] = speed
    return f"{speed:.0f} images/s, loss {rows[-1]['loss']:.4f} after {context.num_steps} steps"


CHECKS: dict[str, Callable[[Context], str]] = {
    "train fp16": lambda context: check_precision(context, "fp16"),
    "train bf16": lambda context: check_precision(context, "bf16"),
    "resume fp16 with its scaler": lambda context: check_resume(context, "fp16"),
    "resume bf16": lambda context: check_resume(context, "bf16"),
    "no synchronization in scheduler.step": check_scheduler_synchronization,
    "no synchronization in the sampling loop": check_sampling_synchronization,
    "no synchronization in a training step": check_training_synchronization,
    "out of memory": check_out_of_memory,
    "automatic micro batch": check_automatic_micro_batch,
    "35.7 M network, fp32": lambda context: check_paper_network(context, "fp32"),
    "35.7 M network, bf16": lambda context: check_paper_network(context, "bf16"),
}


def prepare_data(argument: str | None, work_dir: Path) -> tuple[Path, str]:
    """Return the images to train on and what they are."""
    given = argument or os.environ.get("DDPM_HF_CIFAR10")
    if given:
        return Path(given).resolve(), Path(given).name
    path = work_dir / "random.npy"
    squares = np.random.default_rng(0).integers(0, 256, (2000, 4, 4, 3), dtype=np.uint8)
    np.save(path, squares.repeat(8, axis=1).repeat(8, axis=2))
    return path, "random squares"


def main() -> int:
    """Run all checks and write the result file; return 0 if all passed, 1 if one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="CIFAR-10 as parquet or .npy")
    parser.add_argument("--num_steps", type=int, default=500, help="steps of the 35.7 M network")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: gpu_check.py needs a CUDA GPU, and torch sees none.", file=sys.stderr)
        return 2
    device, rows = torch.cuda.get_device_name(), []
    with tempfile.TemporaryDirectory() as work_dir:
        data, description = prepare_data(arguments.data, Path(work_dir))
        context = Context(Path(work_dir), data, arguments.num_steps)
        for name, check in CHECKS.items():
            start = time.monotonic()
            try:
                passed, detail = True, check(context)
            except Exception as error:
                passed, detail = False, f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - start
            rows.append({"check": name, "passed": passed, "detail": detail, "seconds": round(seconds, 1)})
            print(f"{'PASS' if passed else 'FAIL'}  {name}  ({seconds:.0f} s)  {detail}", flush=True)
    result = {
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "data": description,
        "command": "python " + " ".join(["benchmarks/gpu_check.py", *sys.argv[1:]]),
        "checks": rows,
        **context.details,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"gpu_check_{re.sub('[^a-z0-9]+', '_', device.lower())}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"Written to {path.relative_to(REPOSITORY)}")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
