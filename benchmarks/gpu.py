"""Everything that a GPU has to show, in one command of at most ten minutes: python benchmarks/gpu.py.

First the proofs of gpu_check.py, then measurements of the 35.7 M network of Ho et al. 2020: training and sampling of
ddpm_hf with each switch of the engine, beside train_unconditional.py's loop, denoising-diffusion-pytorch and
DDPMPipeline (peers.py). Each cell is a process of its own, forked from a server that has imported the libraries and
has not touched the GPU: a failure or a full memory ends one cell only. Results are written after each cell to
benchmarks/results/gpu_<device>.json, so a run that is cut off keeps what it has. While the proofs run, other processes
compile the networks into the cache of torch.compile, so the first step of a compiled cell is one with a warm cache; the
compile time is reported apart.

    python benchmarks/gpu.py --budget_seconds 240
    python benchmarks/gpu.py --rehearse     the same with a tiny network on the CPU, in a few minutes
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Initializing CUDA in the server would make it unusable in the processes forked from it; asking NVML does not.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
REPOSITORY = Path(__file__).resolve().parents[1]
for place in (REPOSITORY, REPOSITORY / "benchmarks"):  # the checkout is enough, it need not be installed
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

import diffusers
import gpu_check
import torch
import torch._dynamo
from peers import LUCIDRAINS, TRAIN_UNCONDITIONAL, Lucidrains, TrainUnconditional, missing
from torch.utils.flop_counter import FlopCounterMode

diffusers.DDPMPipeline, diffusers.UNet2DModel  # noqa: B018 - imported by their first use

RESULTS = REPOSITORY / "benchmarks" / "results"
PROCESSES = multiprocessing.get_context("forkserver")
BF16_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}
"""Dense bf16 FLOP/s of data sheets."""
TINY_NETWORK = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4, "dropout": 0.0}
WARM_UP_STEPS = 8
NUM_BLOCKS = 5
NUM_PROFILED_STEPS = 6


@dataclass(frozen=True)
class Setup:
    """What all cells share.

    Args:
        device: cuda or cpu.
        data: Images to train on.
        work_dir: Folder for runs and logs.
        seconds: Seconds of measurement in a cell.
        is_rehearsal: Whether to use a tiny network and tiny batches.
    """

    device: str
    data: str
    work_dir: str
    seconds: float
    is_rehearsal: bool

    @property
    def train_batches(self) -> tuple[int, ...]:
        """Batch sizes of training, the most telling first."""
        return (4,) if self.is_rehearsal else (128, 16, 512)

    @property
    def sample_batches(self) -> tuple[int, ...]:
        """Batch sizes of sampling."""
        return (2,) if self.is_rehearsal else (16, 256)

    @property
    def num_inference_steps(self) -> int:
        """Sampling steps."""
        return 3 if self.is_rehearsal else 50


@dataclass(frozen=True)
class Cell:
    """One measurement, in a process of its own.

    Args:
        table: Table of the result.
        batch: Images of a call.
        system: What is measured.
        measure: Returns the columns of the result.
        options: Further arguments of `measure`.
    """

    table: str
    batch: int
    system: str
    measure: Callable[..., dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------ timing


class Stopwatch:
    """Time steps until enough was measured: warm-up, blocks of steps, and on a GPU a few profiled steps.

    Args:
        setup: Device and seconds.
        images: Images of a step.
        warm_up: Steps before the measurement.
        profiles: Whether to profile.
    """

    def __init__(self, setup: Setup, images: int, warm_up: int = WARM_UP_STEPS, profiles: bool = True) -> None:
        self._is_cuda = setup.device == "cuda"
        self._images, self._seconds = images, setup.seconds
        self._profiles = profiles and self._is_cuda
        self._warm_up = 2 if setup.is_rehearsal else warm_up
        self._blocks: list[float] = []
        self._count, self._block_steps = 0, 1
        self._profiler: Any = None
        self.columns: dict[str, Any] = {}
        self._synchronize()
        self._started = time.perf_counter()

    def tick(self) -> bool:
        """Call after each step; return whether enough was measured."""
        self._count += 1
        if self._profiler is not None:
            if self._count == NUM_PROFILED_STEPS:
                self._synchronize()
                self._profiler.stop()
                self.columns["idle"] = idle_share(self._profiler)
                return True
            return False
        if not self.columns:
            self._synchronize()
            self.columns["first_step_seconds"] = time.perf_counter() - self._started
            self._restart()
        elif self._warm_up and self._count == self._warm_up:
            seconds = self._take()
            self._block_steps = max(2, math.ceil(self._seconds / NUM_BLOCKS / seconds))
            self._warm_up = 0
            self._restart()
        elif not self._warm_up and self._count == self._block_steps:
            self._blocks.append(self._take())
            self._restart()
            if len(self._blocks) == NUM_BLOCKS:
                return self._end()
        return False

    def _synchronize(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()

    def _take(self) -> float:
        self._synchronize()
        return (time.perf_counter() - self._started) / self._count

    def _restart(self) -> None:
        self._count, self._started = 0, time.perf_counter()

    def _end(self) -> bool:
        seconds = statistics.median(self._blocks)
        self.columns |= {
            "seconds": seconds,
            "images_per_second": self._images / seconds,
            "spread": [self._images / max(self._blocks), self._images / min(self._blocks)],
        }
        if self._is_cuda:
            self.columns["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self._profiles:
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()
        return not self._profiles


def idle_share(profiler: Any) -> float:
    """Return the share of the time between the first and the last kernel in which no kernel ran."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / max(1e-9, reached - spans[0][0])


def training_flops(network: torch.nn.Module, call: Callable[[torch.nn.Module], torch.Tensor]) -> float:
    """Return the floating point operations of a forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        call(network).float().sum().backward()
    return float(counter.get_total_flops())


# ---------------------------------------------------------------------------------------------- how it is measured


class Measured(Exception):
    """Ends a training run when enough was measured."""


def run_config(setup: Setup, batch: int, settings: dict[str, object]) -> Any:
    """Return the configuration of a run of the 35.7 M network."""
    from ddpm_hf.config import parse_command_line

    folder = tempfile.mkdtemp(dir=setup.work_dir)
    values: dict[str, object] = {
        "config": REPOSITORY / "configs" / "cifar10_32.yaml",
        "data.source": setup.data,
        "model.overrides": json.dumps(TINY_NETWORK if setup.is_rehearsal else {"dropout": 0.0}),
        "training.output_dir": Path(folder) / "run",
        "training.num_steps": 1_000_000,
        "training.train_batch_size": batch,
        "training.checkpoint_every_steps": 1_000_000,
        "training.cpu": str(setup.device == "cpu").lower(),
        "preview.every_steps": 0,
        "evaluation.num_samples": 0,
    }
    flags = [part for name, value in (values | settings).items() for part in (f"--{name}", str(value))]
    return parse_command_line(flags)[0]


def train_ours(setup: Setup, batch: int, **settings: object) -> dict[str, Any]:
    """Train with `Trainer.fit` and time its steps."""
    from ddpm_hf.training.trainer import Trainer

    trainer = Trainer(run_config(setup, batch, settings))
    stopwatch, train_step = Stopwatch(setup, batch), trainer._train_step

    def timed(step: int) -> None:
        train_step(step)
        if stopwatch.tick():
            raise Measured

    trainer._train_step = timed  # type: ignore[method-assign]
    with contextlib.suppress(Measured):
        trainer.fit()
    trainer.folder.release()
    return stopwatch.columns


def batches_for(setup: Setup, batch: int) -> list[torch.Tensor]:
    """Return float32 images in [-1, 1] on the device."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, 32, 32)
    return [(torch.rand(shape, generator=generator) * 2 - 1).to(setup.device) for _ in range(4)]


def paper_unet(setup: Setup) -> Any:
    """Return the 35.7 M network, or a tiny one in a rehearsal."""
    from ddpm_hf.config import ModelConfig
    from ddpm_hf.models import build_unet

    overrides = TINY_NETWORK if setup.is_rehearsal else {"dropout": 0.0}
    return build_unet(ModelConfig(preset="ddpm_32", overrides=overrides), (3, 32, 32), None)


def train_stock(setup: Setup, batch: int, mixed_precision: str) -> dict[str, Any]:
    """Time the loop of train_unconditional.py, whose batches are ready on the device."""
    peer = TrainUnconditional(paper_unet(setup).to(setup.device), batches_for(setup, batch), mixed_precision)
    return time_calls(setup, batch, peer.step)


def train_lucidrains(setup: Setup, batch: int, mixed_precision: str) -> dict[str, Any]:
    """Time the loop of denoising-diffusion-pytorch with the network of its README, of 35.7 M parameters."""
    network = {"dim": 8, "dim_mults": (1, 2)} if setup.is_rehearsal else {"dim": 64, "dim_mults": (1, 2, 4, 8)}
    peer = Lucidrains(network, 32, batches_for(setup, batch), mixed_precision=mixed_precision)
    return time_calls(setup, batch, peer.step)


def time_calls(setup: Setup, images: int, call: Callable[[], object], **options: Any) -> dict[str, Any]:
    """Time a function until enough was measured; options are those of `Stopwatch`."""
    stopwatch = Stopwatch(setup, images, **options)
    while True:
        call()
        if stopwatch.tick():
            return stopwatch.columns


def sample_ours(setup: Setup, batch: int, dtype: str, **compile_options: Any) -> dict[str, Any]:
    """Time our pipeline; with options, compiled."""
    from ddpm_hf import GaussianDiffusionPipeline, GaussianDiffusionScheduler

    pipeline = GaussianDiffusionPipeline(paper_unet(setup).eval(), GaussianDiffusionScheduler())
    pipeline.to(setup.device, getattr(torch, dtype))
    if compile_options:
        pipeline.compile(**compile_options)
    return time_pipeline(setup, batch, pipeline)


def sample_stock(setup: Setup, batch: int, dtype: str) -> dict[str, Any]:
    """Time DDPMPipeline, which fails in bfloat16: NumPy has no such type."""
    pipeline = diffusers.DDPMPipeline(paper_unet(setup).eval(), diffusers.DDPMScheduler())
    pipeline.to(setup.device, getattr(torch, dtype))
    return time_pipeline(setup, batch, pipeline)


def time_pipeline(setup: Setup, batch: int, pipeline: Any) -> dict[str, Any]:
    """Time calls of a pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator(setup.device).manual_seed(0)

    def call() -> None:
        pipeline(batch_size=batch, num_inference_steps=setup.num_inference_steps, generator=generator, output_type="np")

    return time_calls(setup, batch, call, warm_up=2, profiles=False)  # a call is 50 steps


def gemm_peak(setup: Setup, batch: int) -> dict[str, Any]:
    """Measure the FLOP/s of a bf16 matrix product of batch x batch matrices."""
    factors = [torch.randn(batch, batch, device=setup.device, dtype=torch.bfloat16) for _ in range(2)]
    columns = time_calls(setup, 0, lambda: torch.mm(*factors))
    return {"tflops_per_second": 2 * batch**3 / columns["seconds"] / 1e12}


def count_flops(setup: Setup, batch: int) -> dict[str, Any]:
    """Count the operations of a training step for one image: ours, and the network of denoising-diffusion-pytorch."""
    x, t = batches_for(setup, 1)[0], torch.zeros(1, dtype=torch.int64, device=setup.device)
    counts = {"ours": training_flops(paper_unet(setup).to(setup.device), lambda unet: unet(x, t).sample)}
    if LUCIDRAINS not in missing():
        from denoising_diffusion_pytorch import Unet

        network = Unet(dim=64, dim_mults=(1, 2, 4, 8)).to(setup.device)
        counts[LUCIDRAINS] = training_flops(network, lambda unet: unet(x, t))
    return counts


def prove(setup: Setup, batch: int, check: str) -> dict[str, Any]:
    """Run one check of gpu_check.py."""
    context = gpu_check.Context(Path(tempfile.mkdtemp(dir=setup.work_dir)), Path(setup.data), num_steps=150)
    return {"detail": gpu_check.CHECKS[check](context), **context.details}


# --------------------------------------------------------------------------------------------------- what is measured

ENGINES: dict[str, dict[str, object]] = {
    "ddpm_hf": {},
    "ddpm_hf, CUDA graphs": {"training.compile": "true", "training.compile_mode": "reduce-overhead"},
    "ddpm_hf, not compiled": {"training.compile": "false", "training.channels_last": "false"},
    "ddpm_hf, not compiled, channels_last": {"training.compile": "false", "training.channels_last": "true"},
    "ddpm_hf, compiled, not channels_last": {"training.compile": "true", "training.channels_last": "false"},
    "ddpm_hf, without prefetching": {"training.prefetch_factor": 0},
}
"""Training settings by name; the first are the defaults, which compile on a GPU."""
REHEARSED = {"training.compile": "true", "training.compile_backend": "aot_eager", "training.prefetch_factor": 2}
"""Settings of a rehearsal in place of the defaults; inductor takes minutes on a CPU."""


def proofs(setup: Setup, *, of_memory: bool) -> list[Cell]:
    """Return the checks of gpu_check.py. Those of memory fill the GPU, so they run alone."""
    if setup.device != "cuda":
        return []
    memory = ("out of memory", "automatic micro batch")
    return [
        Cell("proofs", 0, name, prove, {"check": name}) for name in gpu_check.CHECKS if (name in memory) == of_memory
    ]


def engines(setup: Setup) -> dict[str, dict[str, object]]:
    """Return the settings to measure."""
    if not setup.is_rehearsal:
        return ENGINES
    return {name: REHEARSED | options for name, options in ENGINES.items() if "CUDA graphs" not in name}


def compilations(setup: Setup) -> list[Cell]:
    """Return cells that fill the cache of torch.compile, the largest gain first."""
    return [
        Cell("compile", batch, name, train_ours, {"training.mixed_precision": "bf16", **options})
        for batch in setup.train_batches
        for name, options in list(engines(setup).items())[: 1 if setup.is_rehearsal else 2]
    ]


def measurements(setup: Setup) -> list[Cell]:
    """Return the measurements, the most telling first."""
    bf16 = {"training.mixed_precision": "bf16"}
    gemm_size = 256 if setup.is_rehearsal else 8192
    cells = [Cell("limits", gemm_size, "bf16 matrix product", gemm_peak), Cell("limits", 1, "FLOP", count_flops)]
    for batch in setup.train_batches:
        for name, options in list(engines(setup).items())[:3]:
            cells.append(Cell("training", batch, name, train_ours, bf16 | options))
        cells.append(Cell("training", batch, f"{TRAIN_UNCONDITIONAL}, bf16", train_stock, {"mixed_precision": "bf16"}))
        if LUCIDRAINS not in missing():
            cells.append(Cell("training", batch, f"{LUCIDRAINS}, bf16", train_lucidrains, {"mixed_precision": "bf16"}))
    batch = 4 if setup.is_rehearsal else 16
    cells.append(
        Cell("training", batch, f"{TRAIN_UNCONDITIONAL}, its defaults", train_stock, {"mixed_precision": "no"})
    )
    for batch in setup.sample_batches:
        for dtype in ("float16", "float32"):
            cells.append(Cell("sampling", batch, f"DDPMPipeline, {dtype}", sample_stock, {"dtype": dtype}))
            cells.append(Cell("sampling", batch, f"ddpm_hf, {dtype}", sample_ours, {"dtype": dtype}))
        compiled = {"compiled": {"mode": "default"}, "CUDA graphs": {"mode": "reduce-overhead"}}
        if setup.is_rehearsal:
            compiled = {"compiled": {"backend": "aot_eager"}}
        for name, options in compiled.items():
            options = {"dtype": "float16", **options}
            cells.append(Cell("sampling", batch, f"ddpm_hf, float16, {name}", sample_ours, options))
    for batch in setup.train_batches:
        for name, options in list(engines(setup).items())[3:]:
            cells.append(Cell("training", batch, name, train_ours, bf16 | options))
    return cells


# ------------------------------------------------------------------------------------------------------------- cells


def live(setup: Setup, cell: Cell, path: str) -> None:
    """Measure a cell in this process and write its columns to a file; what it prints goes to a log beside it."""
    os.setsid()  # so that whatever it starts is killed with it
    log = os.open(f"{path}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    if setup.is_rehearsal:
        torch.set_num_threads(1)
    Path(path).write_text(json.dumps(cell.measure(setup, cell.batch, **cell.options)), encoding="utf-8")


class Runner:
    """Run cells and keep their results.

    Args:
        setup: What all cells share.
        result: The result, written to a file after each cell.
        path: The file.
        stop_at: Time (monotonic) after which nothing is started, and whatever runs is killed.
    """

    def __init__(self, setup: Setup, result: dict[str, Any], path: Path, stop_at: float) -> None:
        self._setup, self._result, self._path, self._stop_at = setup, result, path, stop_at
        self._number = 0

    def start(self, cell: Cell) -> tuple[BaseProcess, Path]:
        """Start a cell."""
        self._number += 1
        path = Path(self._setup.work_dir) / f"{self._number}.json"
        process = PROCESSES.Process(target=live, args=(self._setup, cell, str(path)))
        process.start()
        return process, path

    def finish(self, cell: Cell, process: BaseProcess, path: Path) -> None:
        """Wait for a cell, and keep its result."""
        process.join(max(0.0, self._stop_at - time.monotonic()))
        row: dict[str, Any] = {"table": cell.table, "batch": cell.batch, "system": cell.system}
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has not yet a group of its own
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
            row["error"] = "the time was up"
        elif process.exitcode == 0:
            row |= json.loads(path.read_text(encoding="utf-8"))
        else:
            lines = Path(f"{path}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            row["error"] = lines[-1][:300] if lines else f"exit code {process.exitcode}"
            row["log"] = lines[-30:]
        self._result["cells"].append(row)
        self._path.write_text(json.dumps(self._result, indent=2) + "\n", encoding="utf-8")
        print(f"{cell.table:9} {cell.batch:5}  {cell.system:45} {brief(row)}", flush=True)

    def run(self, cells: Sequence[Cell]) -> None:
        """Run cells one after the other, as long as there is time."""
        for cell in cells:
            if time.monotonic() < self._stop_at:
                self.finish(cell, *self.start(cell))


def brief(row: dict[str, Any]) -> str:
    """Return the result of a cell in a few words."""
    if "error" in row:
        return f"FAIL  {row['error']}"
    if "images_per_second" in row:
        parts = [f"{row['images_per_second']:,.1f} images/s"]
        parts += [f"first step {row['first_step_seconds']:.1f} s"]
        parts += [f"{row['peak_memory_gib']:.1f} GiB"] if "peak_memory_gib" in row else []
        parts += [f"idle {row['idle']:.0%}"] if "idle" in row else []
        return ", ".join(parts)
    if "detail" in row:
        return f"PASS  {row['detail']}"
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float))


# ------------------------------------------------------------------------------------------------------------- table


def tables(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the tables: images/s, and its ratio to the peer of the same batch."""
    cells = [cell for cell in result["cells"] if "error" not in cell]
    limits = {cell["system"]: cell for cell in cells if cell["table"] == "limits"}
    gemm = limits.get("bf16 matrix product", {}).get("tflops_per_second")
    flops = limits.get("FLOP", {}).get("ours")
    for table, peer in (("training", f"{TRAIN_UNCONDITIONAL}, bf16"), ("sampling", "DDPMPipeline, float16")):
        rows = [cell for cell in cells if cell["table"] == table]
        for batch in sorted({row["batch"] for row in rows}):
            yield f"\n{table}, batch {batch}"
            base = next((row for row in rows if row["batch"] == batch and row["system"] == peer), None)
            for row in (row for row in rows if row["batch"] == batch):
                line = f"  {row['system']:45}{row['images_per_second']:>12,.1f} images/s"
                if base is not None:
                    line += f"{row['images_per_second'] / base['images_per_second']:>7.2f} x"
                if (
                    table == "training"
                    and gemm
                    and flops
                    and row["system"].startswith(("ddpm_hf", TRAIN_UNCONDITIONAL))
                ):
                    line += f"{row['images_per_second'] * flops / gemm / 1e12:>6.0%} of the measured peak"
                yield line + (f", idle {row['idle']:.0%}" if "idle" in row else "")


def describe_device(setup: Setup) -> str:
    """Return the name of the device, found out in a process of its own."""
    with PROCESSES.Pool(1) as pool:
        return str(pool.apply(device_name, (setup.device,)))


def device_name(device: str) -> str:
    """Return the name of a device."""
    from ddpm_hf.training.run_dir import device_name as name_of

    return name_of(torch.device(device))


def main() -> int:
    """Run everything; return 0, 1 if a cell failed, or 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget_seconds", type=float, default=600, help="time after which everything ends")
    parser.add_argument("--data", help="CIFAR-10 as parquet or .npy; by default random squares")
    parser.add_argument("--seconds", type=float, default=3, help="measured time of a cell")
    parser.add_argument("--rehearse", action="store_true", help="tiny network and batches on the CPU")
    parser.add_argument("--only", choices=("proofs", "training", "sampling", "limits"), help="one part")
    parser.add_argument("--output", type=Path, help="the result file")
    arguments = parser.parse_args()
    stop_at = time.monotonic() + arguments.budget_seconds
    if not arguments.rehearse and not torch.cuda.is_available():
        print("error: gpu.py needs a CUDA GPU, and torch sees none; --rehearse runs on the CPU.", file=sys.stderr)
        return 2
    # The server searches this module on its own path, and is silent if it does not find it.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    PROCESSES.set_forkserver_preload(["gpu"])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work_dir:
        data, description = gpu_check.prepare_data(arguments.data, Path(work_dir))
        device = "cpu" if arguments.rehearse else "cuda"
        setup = Setup(device, str(data), work_dir, arguments.seconds, arguments.rehearse)
        name = describe_device(setup)
        result: dict[str, Any] = {
            "device": name,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
            "data": description,
            "command": "python " + " ".join(["benchmarks/gpu.py", *sys.argv[1:]]),
            "cells": [],
        }
        default = "rehearsal.json" if setup.is_rehearsal else f"gpu_{re.sub('[^a-z0-9]+', '_', name.lower())}.json"
        path = arguments.output or RESULTS / default
        path.parent.mkdir(exist_ok=True)
        runner = Runner(setup, result, path, stop_at)
        only = arguments.only
        side_by_side = compilations(setup) if only in (None, "training") else []
        side_by_side += proofs(setup, of_memory=False) if only in (None, "proofs") else []
        for cell, started in [(cell, runner.start(cell)) for cell in side_by_side]:
            runner.finish(cell, *started)
        runner.run([cell for cell in measurements(setup) if only in (None, cell.table)])
        if only in (None, "proofs"):
            runner.run(proofs(setup, of_memory=True))
    print("\n".join(tables(result)))
    print(f"\nWritten to {path}")
    return int(any("error" in cell for cell in result["cells"]))


if __name__ == "__main__":
    sys.exit(main())
