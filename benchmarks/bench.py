"""Compare the speed of ddpm_hf with its peers on a CPU: make bench, or python benchmarks/bench.py.

Everything is timed in one process, in interleaved rounds, with a control of ours against ours (pairs.py). The peers
(peers.py) have the same network, batch and precision. Results are written to benchmarks/results/bench_<CPU>.json after
each round, so a run that is cut off keeps what it has; `python docs/make_performance.py` makes docs/performance.md of
them. A run of some rows writes outputs/bench.json instead. denoising-diffusion-pytorch is measured if it is installed,
ddpm-torch if DDPM_HF_DDPM_TORCH names a checkout.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout is enough, it need not be installed

import peers
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from pairs import REPOSITORY, Row, Way, environment, gemm_gflops, result_path, rounds, summary, table, write

from ddpm_hf import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.config import DataConfig, ModelConfig, parse_command_line
from ddpm_hf.data import ImageLoader, ImageStream, SampleOrder, open_images, open_sets
from ddpm_hf.data.decode import EncodedImage, Geometry, OutputFormat, decode, normalize, num_threads
from ddpm_hf.distributed import keep_freed_memory
from ddpm_hf.evaluation.likelihood import ReverseProcess, variational_bound
from ddpm_hf.models import build_unet
from ddpm_hf.training.logging import Progress
from ddpm_hf.training.run_dir import device_name
from ddpm_hf.training.trainer import Trainer

CPU = torch.device("cpu")
OURS = "ddpm_hf"
CONTROL = "ddpm_hf, again (control)"
COMPILED_SECONDS = 60.0
"""Time for the rounds of a row with compile, outside of the time budget and after compiling."""


@dataclass(frozen=True)
class Network:
    """A UNet2DModel, and the networks of other libraries that are most like it.

    Args:
        title: What it is called.
        preset: model.preset.
        overrides: model.overrides.
        image_shape: (channels, height, width).
        batch: Images of a training step.
        lucidrains: Arguments of the Unet of denoising-diffusion-pytorch: the same widths, other blocks.
        ddpm_torch: Arguments of the UNet of ddpm-torch: the same function.
    """

    title: str
    preset: str
    overrides: dict[str, Any]
    image_shape: tuple[int, int, int]
    batch: int
    lucidrains: dict[str, Any]
    ddpm_torch: dict[str, Any]

    def build(self) -> UNet2DModel:
        """Return our network, in training mode."""
        torch.manual_seed(0)
        return build_unet(ModelConfig(preset=self.preset, overrides=self.overrides), self.image_shape, None)  # type: ignore[arg-type]

    def images(self, count: int) -> torch.Tensor:
        """Return random images in [-1, 1]."""
        return torch.rand(count, *self.image_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


SMALL = Network(
    "2.6 M parameters, 1x28x28",
    "mnist_28",
    {
        "block_out_channels": [32, 64, 96],
        "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 32,
        "dropout": 0.0,
    },
    (1, 28, 28),
    16,
    {"dim": 32, "dim_mults": (1, 2, 3), "channels": 1},
    {
        "in_channels": 1,
        "hid_channels": 32,
        "out_channels": 1,
        "ch_multipliers": (1, 2, 3),
        "num_res_blocks": 2,
        "apply_attn": (False, False, True),
    },
)
LARGE = Network(
    "35.7 M parameters, 3x32x32",
    "ddpm_32",
    {"dropout": 0.0},
    (3, 32, 32),
    16,
    {"dim": 128, "dim_mults": (1, 2, 2, 2), "channels": 3},
    {
        "in_channels": 3,
        "hid_channels": 128,
        "out_channels": 3,
        "ch_multipliers": (1, 2, 2, 2),
        "num_res_blocks": 2,
        "apply_attn": (False, True, False, False),
    },
)
TINY = Network(
    "a tiny network, 1x8x8",
    "digits_8",
    {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "dropout": 0.0},
    (1, 8, 8),
    4,
    {"dim": 8, "dim_mults": (1, 2), "channels": 1},
    {
        "in_channels": 1,
        "hid_channels": 32,
        "out_channels": 1,
        "ch_multipliers": (1, 2),
        "num_res_blocks": 1,
        "apply_attn": (False, False),
    },
)


class Ours:
    """A Trainer whose steps are called one by one, as its `fit` does.

    Args:
        network: The network.
        folder: A folder for the data and the run.
        **settings: Settings of the run, as `training__compile=True`.
    """

    def __init__(self, network: Network, folder: Path, **settings: object) -> None:
        folder.mkdir(parents=True)
        images = (network.images(64 * network.batch).permute(0, 2, 3, 1) * 127.5 + 127.5).to(torch.uint8)
        np.save(folder / "images.npy", images.numpy())
        values: dict[str, object] = {
            "data__source": folder / "images.npy",
            "model__preset": network.preset,
            "model__overrides": str(network.overrides).replace("'", '"'),
            "diffusion__variance_type": "fixed_small",
            "training__output_dir": folder / "run",
            "training__num_steps": 1_000_000,
            "training__train_batch_size": network.batch,
            "training__mixed_precision": "fp32",
            "training__checkpoint_every_steps": 1_000_000,
            "training__num_checkpoints_kept": 2,
            "training__cpu": "true",
            "preview__every_steps": 0,
            "evaluation__num_samples": 0,
        }
        flags = [(f"--{name.replace('__', '.')}", str(value)) for name, value in (values | settings).items()]
        config, _ = parse_command_line([part for flag in flags for part in flag])
        self.trainer = trainer = Trainer(config)
        trainer.checkpointer.resume()
        started = time.perf_counter()
        trainer._prepare()  # compiles
        self.prepare_seconds = time.perf_counter() - started
        trainer._progress = Progress(0, config.training.num_steps, is_main_process=False)
        trainer.meter.start(0)
        self._threads = contextlib.ExitStack()
        self._threads.enter_context(trainer._prefetcher)
        self.unet = trainer.unet
        self.parameters = trainer.parameters

    def step(self) -> None:
        """Make one update, and log in every 50th."""
        self.trainer._train_step(self.trainer.global_step)
        self.trainer.global_step += 1
        self.trainer._progress.update()
        self.trainer._after_step()

    def update(self) -> None:
        """Clip the gradient, update the weights and their EMA, and log in every 50th step."""
        self.trainer._update(self.trainer.global_step)
        self.trainer.global_step += 1
        self.trainer._after_step()

    def save(self) -> None:
        """Save a checkpoint; return as soon as training may continue."""
        self.trainer.global_step += 1
        self.trainer.checkpointer.save(must_succeed=False)

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        self.trainer.checkpointer.join()

    def close(self) -> None:
        """Release the run folder."""
        self.wait()
        self._threads.close()
        self.trainer.folder.release()


@dataclass
class Bench:
    """The rows of one run of this script.

    Args:
        folder: A temporary folder.
        num_threads: Threads of torch.
        is_quick: Whether to use tiny sizes and no peers that need other packages.
        missing: Peers that are not measured, with the reason.
    """

    folder: Path
    num_threads: int
    is_quick: bool
    missing: dict[str, str]
    _folders: Iterator[int] = field(default_factory=itertools.count)

    def new_folder(self) -> Path:
        """Return the path of a new folder."""
        return self.folder / str(next(self._folders))

    def rows(self, with_compile: bool) -> list[Row]:
        """Return all rows, the most important first; a quick run leaves out the slow ones and equal ones."""
        small, large = (TINY, TINY) if self.is_quick else (SMALL, LARGE)
        sampled = f"DDPM sampling of 8 images in {self.num_sampling_steps} steps, fp32; {small.title}."
        rows = [
            Row(
                "train",
                f"Training step, {small.title}",
                f"Forward, backward, clip, AdamW, EMA; batch {small.batch}, fp32. Ours also reads its images and logs.",
                partial(self.train, small),
                20,
                images=small.batch,
                counts_flops=True,
                call_seconds=1.0,
                num_warm_calls=1,
            ),
            Row(
                "scheduler",
                "Scheduler step, 1x1x28x28",
                "One step of ancestral sampling, with its noise.",
                partial(self.scheduler, (1, 1, 28, 28)),
                2,
                call_seconds=0.1,
            ),
            Row(
                "scheduler_batch",
                "Scheduler step, 8x3x32x32",
                "The same for a batch of color images; most of the time is spent drawing the noise.",
                partial(self.scheduler, (8, 3, 32, 32)),
                2,
                call_seconds=0.1,
            ),
            Row(
                "optimizer",
                f"Optimizer and EMA, {small.title}",
                "Clip, AdamW and EMA with given gradients.",
                partial(self.optimizer, small),
                5,
                num_warm_calls=1,
            ),
            Row(
                "sample",
                f"Sampling, {small.title}",
                sampled + " denoising-diffusion-pytorch samples with DDIM.",
                partial(self.sample, small),
                15,
                images=8,
                counts_flops=True,
                num_warm_calls=1,
            ),
            Row(
                "evaluate",
                f"Bits per dimension, some terms, {small.title}",
                f"{self.num_evaluated} images, 10 of 1000 terms each, fp32.",
                partial(self.evaluate, small),
                16,
                images=self.num_evaluated,
                call_seconds=0.0,
            ),
            Row(
                "evaluate_all",
                f"Bits per dimension, all terms, {small.title}",
                f"{self.num_evaluated} images, a process of 10 timesteps, all terms, fp32.",
                partial(self.evaluate_all, small),
                12,
                images=self.num_evaluated,
                call_seconds=0.0,
            ),
            Row(
                "checkpoint",
                f"Checkpoint, {small.title}",
                "Time for which training is blocked, after the previous checkpoint is written. Weights, EMA and "
                "optimizer; ours also computes checksums, syncs and removes old checkpoints, in the background.",
                partial(self.checkpoint, small),
                8,
                max_rounds=8,
                call_seconds=0.0,
            ),
            Row(
                "data",
                "Data loader, 32x32 PNG",
                "Flipped float32 batches of 128 images in [-1, 1].",
                partial(self.data, 32),
                15,
                images=self.data_batch(32),
                max_rounds=8,
                call_seconds=1.0,
            ),
            Row(
                "stream",
                "Streamed images, 32x32 PNG",
                f"{self.num_streamed(32)} images of a parquet file in flipped float32 batches of "
                f"{self.data_batch(32)}, decoded while they are read. As many threads decode the same images in "
                "memory.",
                partial(self.stream, 32),
                8,
                images=self.num_streamed(32),
                max_rounds=8,
                call_seconds=1.0,
                num_warm_calls=1,
            ),
            Row(
                "optimizer_large",
                f"Optimizer and EMA, {large.title}",
                "Clip, AdamW and EMA with given gradients.",
                partial(self.optimizer, large),
                8,
            ),
            Row(
                "help",
                "ddpm-hf --help",
                "A new process, files cached by the system.",
                self.help,
                8,
                max_rounds=6,
                call_seconds=0.0,
            ),
            Row(
                "first_step",
                "First step of make train",
                "From the command to the first line of metrics; the environment exists and the data are decoded. No "
                "peer has such a command.",
                self.first_step,
                10,
                max_rounds=4,
                call_seconds=0.0,
            ),
            Row(
                "train_large",
                f"Training step, {large.title}",
                f"As above; batch {large.batch}, fp32.",
                partial(self.train, large),
                30,
                images=large.batch,
                counts_flops=True,
                max_rounds=6,
                call_seconds=0.0,
            ),
            Row(
                "data_256",
                "Data loader, 256x256 JPEG",
                "Flipped float32 batches of 32 images in [-1, 1].",
                partial(self.data, 256),
                10,
                images=self.data_batch(256),
                max_rounds=8,
                call_seconds=1.0,
            ),
            Row(
                "stream_256",
                "Streamed images, 256x256 JPEG",
                f"{self.num_streamed(256)} images in batches of {self.data_batch(256)}, as above.",
                partial(self.stream, 256),
                8,
                images=self.num_streamed(256),
                max_rounds=8,
                call_seconds=1.0,
                num_warm_calls=1,
            ),
        ]
        if self.is_quick:
            slow = ("help", "first_step", "data_256", "stream_256", "optimizer_large", "train_large")
            return [row for row in rows if row.name not in slow]
        if with_compile:
            rows += [
                Row(
                    "train_compiled",
                    f"Training step with compile, {small.title}",
                    f"training.compile true; batch {small.batch}, fp32. The peers are not compiled.",
                    partial(self.train, small, is_compiled=True),
                    0,
                    images=small.batch,
                    call_seconds=1.0,
                    num_warm_calls=1,
                    is_compiled=True,
                ),
                Row(
                    "sample_compiled",
                    f"Sampling with compile, {small.title}",
                    "pipeline.compile(). " + sampled,
                    partial(self.sample, small, is_compiled=True),
                    0,
                    images=8,
                    num_warm_calls=1,
                    is_compiled=True,
                ),
            ]
        return rows

    def has(self, peer: str) -> bool:
        """Return whether a peer that needs another package is measured."""
        return not self.is_quick and peer not in self.missing

    # ------------------------------------------------------------------------------------------------------ training

    def train(self, network: Network, is_compiled: bool = False) -> list[Way]:
        """Training steps."""

        def ours(name: str, **settings: object) -> Way:
            run = Ours(network, self.new_folder(), **settings)
            self._unet = run.unet
            way = Way(name, run.step, close=run.close, enter=keep_freed_memory)
            way.first_seconds = run.prepare_seconds
            return way

        compiled = {"training__compile": "true"} if is_compiled else {}
        ways = [ours(OURS, **compiled)]
        batches = list(network.images(4 * network.batch).split(network.batch))
        stock = peers.stock_copy(self._unet).train()
        ways.append(Way(peers.TRAIN_UNCONDITIONAL, peers.TrainUnconditional(stock, batches).step, enter=stock_memory))
        if is_compiled:
            ways.append(ours("ddpm_hf, not compiled"))
        elif self.has(peers.LUCIDRAINS):
            lucidrains = peers.Lucidrains(network.lucidrains, network.image_shape[1], batches)
            ways.append(Way(f"{peers.LUCIDRAINS} (its own network)", lucidrains.step, enter=stock_memory))
        if not is_compiled and self.has(peers.DDPM_TORCH):
            ddpm_torch = peers.DdpmTorch(network.ddpm_torch, batches)
            ways.append(Way(peers.DDPM_TORCH, ddpm_torch.step, enter=stock_memory))
        return [*ways, ours(CONTROL, **compiled)]

    def optimizer(self, network: Network) -> list[Way]:
        """The part of a training step after the backward pass."""
        batches = [network.images(network.batch)]

        def with_gradients(name: str, trained: Any, parameters: list[torch.nn.Parameter]) -> Way:
            generator = torch.Generator().manual_seed(0)
            gradients = [torch.randn(one.shape, generator=generator) for one in parameters]

            def prepare() -> None:
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient

            is_ours = isinstance(trained, Ours)
            close, enter = (trained.close, keep_freed_memory) if is_ours else (lambda: None, stock_memory)
            return Way(name, trained.update, prepare, close, enter)

        first, again = (Ours(network, self.new_folder()) for _ in range(2))
        stock = peers.stock_copy(first.unet).train()
        hugging_face = peers.TrainUnconditional(stock, batches)
        ways = [
            with_gradients(OURS, first, first.parameters),
            with_gradients(peers.TRAIN_UNCONDITIONAL, hugging_face, list(stock.parameters())),
        ]
        if self.has(peers.LUCIDRAINS):
            lucidrains = peers.Lucidrains(network.lucidrains, network.image_shape[1], batches)
            name = f"{peers.LUCIDRAINS} (its own network, EMA in every tenth step)"
            ways.append(with_gradients(name, lucidrains, lucidrains.parameters))
        if self.has(peers.DDPM_TORCH):
            ddpm_torch = peers.DdpmTorch(network.ddpm_torch, batches)
            ways.append(with_gradients(peers.DDPM_TORCH, ddpm_torch, ddpm_torch.parameters))
        return [*ways, with_gradients(CONTROL, again, again.parameters)]

    def checkpoint(self, network: Network) -> list[Way]:
        """Checkpoints: how long training is blocked."""
        batches = [network.images(network.batch)]
        folder = self.new_folder()
        folder.mkdir()

        def ours(name: str, **settings: object) -> Way:
            run = Ours(network, self.new_folder(), **settings)
            run.step()
            self._ours = run
            return Way(name, run.save, run.wait, run.close, keep_freed_memory)

        ways = [ours(OURS), ours("ddpm_hf, training.async_checkpoint false", training__async_checkpoint="false")]
        stock = peers.stock_copy(self._ours.unet).train()
        trainer = self._ours.trainer

        def copy() -> None:
            moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
            for tensor in [*trainer.parameters, *trainer.ema.tensors(), *moments]:
                tensor.detach().clone()

        hugging_face = peers.TrainUnconditional(stock, batches)
        hugging_face.step()
        ways += [
            Way("a copy of the tensors", copy),
            Way(f"{peers.TRAIN_UNCONDITIONAL} (save_state)", lambda: hugging_face.save(folder / "checkpoint")),
        ]
        if self.has(peers.LUCIDRAINS):
            lucidrains = peers.Lucidrains(network.lucidrains, network.image_shape[1], batches)
            lucidrains.step()
            name = f"{peers.LUCIDRAINS} (torch.save, its own network)"
            ways.append(Way(name, lambda: lucidrains.save(folder / "lucidrains")))
        if self.has(peers.DDPM_TORCH):
            ddpm_torch = peers.DdpmTorch(network.ddpm_torch, batches)
            ddpm_torch.step()
            ways.append(Way(f"{peers.DDPM_TORCH} (torch.save)", lambda: ddpm_torch.save(folder / "ddpm_torch")))
        return [*ways, ours(CONTROL)]

    # ------------------------------------------------------------------------------------------------------ sampling

    @property
    def num_sampling_steps(self) -> int:
        """Steps of a trajectory."""
        return 2 if self.is_quick else 10

    def sample(self, network: Network, is_compiled: bool = False) -> list[Way]:
        """Sampling."""
        num_steps = self.num_sampling_steps
        unet = network.build().eval()

        def of(name: str, pipeline: Any, enter: Callable[[], None] = stock_memory, **options: Any) -> Way:
            pipeline.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(0)
            options |= {"batch_size": 8, "num_inference_steps": num_steps, "output_type": "np"}
            return Way(name, lambda: pipeline(generator=generator, **options), enter=enter)

        def ours(name: str, compiles: bool, enter: Callable[[], None] = stock_memory) -> Way:
            pipeline = GaussianDiffusionPipeline(
                network.build().eval(), GaussianDiffusionScheduler.create(variance_type="fixed_small")
            )
            if compiles:
                pipeline.compile()
            return of(name, pipeline, enter, eta=1.0)

        ways = [
            ours(OURS, is_compiled),
            of("DDPMPipeline", DDPMPipeline(peers.stock_copy(unet), DDPMScheduler())),
            ours("ddpm_hf, keeps freed memory as ddpm-hf sample does", is_compiled, keep_freed_memory),
        ]
        if is_compiled:
            ways.append(ours("ddpm_hf, not compiled", False))
        elif self.has(peers.LUCIDRAINS):
            batches = [network.images(1)]
            lucidrains = peers.Lucidrains(network.lucidrains, network.image_shape[1], batches, num_steps)
            lucidrains.diffusion.eval()

            def run() -> None:
                with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                    lucidrains.sample(8)

            ways.append(Way(f"{peers.LUCIDRAINS} (its own network)", run, enter=stock_memory))
        if not is_compiled and self.has(peers.DDPM_TORCH):
            ddpm_torch = peers.DdpmTorch(network.ddpm_torch, [network.images(1)], num_steps)
            ddpm_torch.unet.eval()
            ways.append(Way(peers.DDPM_TORCH, partial(ddpm_torch.sample, 8), enter=stock_memory))
        return [*ways, ours(CONTROL, is_compiled)]

    def scheduler(self, shape: tuple[int, ...]) -> list[Way]:
        """One step of a scheduler; the calls go through a trajectory of 50 steps again and again."""
        sample, model_output = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

        def of(name: str, scheduler: Any) -> Way:
            scheduler.set_timesteps(50)
            generator, timesteps = torch.Generator().manual_seed(0), itertools.cycle(scheduler.timesteps)
            return Way(
                name, lambda: scheduler.step(model_output, next(timesteps), sample, generator=generator).prev_sample
            )

        return [
            of(OURS, GaussianDiffusionScheduler.create(variance_type="fixed_small")),
            of("DDPMScheduler", DDPMScheduler()),
            of(CONTROL, GaussianDiffusionScheduler.create(variance_type="fixed_small")),
        ]

    # ---------------------------------------------------------------------------------------------------- evaluation

    @property
    def num_evaluated(self) -> int:
        """Images of an evaluation."""
        return 2 if self.is_quick else 64

    def image_file(self, network: Network) -> Path:
        """Write random images as a NumPy file."""
        path = self.new_folder().with_suffix(".npy")
        pixels = (network.images(self.num_evaluated).permute(0, 2, 3, 1) * 127.5 + 127.5).to(torch.uint8)
        np.save(path, pixels.numpy())
        return path

    def bound(self, name: str, network: Network, path: Path, num_timesteps: int, num_terms: int | None) -> Way:
        """Our bits per dimension."""
        scheduler = GaussianDiffusionScheduler.create(variance_type="fixed_small", num_train_timesteps=num_timesteps)
        process = ReverseProcess(GaussianDiffusionPipeline(network.build().eval(), scheduler))
        images = open_images(DataConfig(source=str(path)), with_labels=False)

        def run() -> None:
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                variational_bound(process, images, seed=0, num_terms=num_terms)

        return Way(name, run, enter=keep_freed_memory)

    def evaluate(self, network: Network) -> list[Way]:
        """Bits per dimension from some terms, and the network alone as 0.1 called it: one timestep at a time."""
        path, num_terms = self.image_file(network), 10
        unet, x_0 = peers.stock_copy(network.build()).eval(), network.images(self.num_evaluated)
        drawn = np.random.default_rng(0).integers(1, 1000, (self.num_evaluated, num_terms - 1))

        @torch.no_grad()
        def one_timestep_at_a_time() -> None:
            for timestep in range(1000):
                chosen = np.flatnonzero((drawn == timestep).any(axis=1) | (timestep == 0))
                if len(chosen):
                    unet(x_0[chosen], torch.full((len(chosen),), timestep))

        return [
            self.bound(OURS, network, path, 1000, num_terms),
            Way(
                "the network alone, one timestep per call (as ddpm_hf 0.1)",
                one_timestep_at_a_time,
                enter=stock_memory,
            ),
            self.bound(CONTROL, network, path, 1000, num_terms),
        ]

    def evaluate_all(self, network: Network) -> list[Way]:
        """Bits per dimension from all terms of a short process."""
        path, num_timesteps = self.image_file(network), 10
        ways = [self.bound(OURS, network, path, num_timesteps, None)]
        if self.has(peers.DDPM_TORCH):
            images = network.images(self.num_evaluated)
            ddpm_torch = peers.DdpmTorch(network.ddpm_torch, [images], num_timesteps)
            ddpm_torch.unet.eval()
            ways.append(Way(peers.DDPM_TORCH, partial(ddpm_torch.bits_per_dim, images), enter=stock_memory))
        return [*ways, self.bound(CONTROL, network, path, num_timesteps, None)]

    # ---------------------------------------------------------------------------------------------------------- data

    def data_batch(self, size: int) -> int:
        """Images of a batch."""
        return 4 if self.is_quick else {32: 128, 256: 32}[size]

    def num_streamed(self, size: int) -> int:
        """Images of a call of the row of streamed images."""
        return (4 if self.is_quick else 16) * self.data_batch(size)

    def data(self, size: int) -> list[Way]:
        """Data loaders."""
        batch = self.data_batch(size)
        count = 4 * batch if self.is_quick else {32: 8192, 256: 512}[size]
        folder = self.new_folder()
        folder.mkdir()
        source = make_images(folder / "images.parquet", size, count)
        config = DataConfig(
            source=str(source), cache_dir=str(folder), resolution=size, num_channels=3, random_flip=True
        )
        cropped = DataConfig(
            source=str(source),
            cache_dir=str(folder),
            resolution=size,
            num_channels=3,
            random_flip=True,
            resize_to=size * 9 // 8,
            crop="random",
        )

        def cached(name: str, config: DataConfig) -> Way:
            loader = ImageLoader(open_images(config, with_labels=False), config, 0, CPU)
            starts = itertools.count(0, batch)

            def run() -> None:
                start = next(starts)
                loader.samples(start, start + batch)

            return Way(name, run)

        def peer(num_workers: int) -> Way:
            batches = peer_batches(source, size, batch, num_workers)
            name = f"{peers.TRAIN_UNCONDITIONAL}, {num_workers} workers"
            return Way(name, partial(next, batches), close=batches.close, settle_seconds=num_workers and 0.5)

        images = open_images(config, with_labels=False)
        order, starts = SampleOrder(len(images), 0), itertools.count(0, batch)

        def stored() -> None:
            start = next(starts)
            images.take(order.positions(start, start + batch))

        ways = [cached(OURS, config), peer(0)]
        if not self.is_quick:
            ways.append(peer(2))
        ways += [
            cached("ddpm_hf, random crops of 9/8 the size", cropped),
            Way("ddpm_hf, as stored: what the host does for a GPU", stored),
        ]
        return [*ways, cached(CONTROL, config)]

    def stream(self, size: int) -> list[Way]:
        """Streamed images, and the same images in memory, decoded by as many threads."""
        import datasets

        batch = self.data_batch(size)
        count = self.num_streamed(size)
        folder = self.new_folder()
        folder.mkdir()
        source = make_images(folder / "images.parquet", size, 2 * count)
        config = DataConfig(
            source=str(source),
            resolution=size,
            num_channels=3,
            random_flip=True,
            streaming=True,
            shuffle_buffer_size=count // 2,
        )
        rows = datasets.load_dataset("parquet", data_files=str(source), split="train", cache_dir=str(folder))
        cells = rows.cast_column("image", datasets.Image(decode=False))["image"]
        encoded = [EncodedImage(f"image {row}", cell["bytes"]) for row, cell in enumerate(cells)][:count]
        output = OutputFormat(3, np.dtype(np.uint8), None, Geometry.of(config))
        pool = ThreadPoolExecutor(num_threads())
        in_task = {32: 32, 256: 1}[size]  # as many as a task of the stream

        def streamed(name: str, *, as_stored: bool = False) -> Way:
            stream, _ = open_sets(config, with_labels=False, seed=0, device=CPU)
            assert isinstance(stream, ImageStream)

            def run() -> None:
                for start in range(0, count, batch):
                    if as_stored:
                        stream.take(batch)
                    else:
                        stream.samples(start, start + batch)

            # A pause, because the threads are still decoding ahead after the last call.
            return Way(name, run, close=stream.close, settle_seconds=0.0 if self.is_quick else 0.5)

        def decode_part(images: list[EncodedImage]) -> list[Any]:
            return [decode(image, output) for image in images]

        def decoded() -> Iterator[Any]:
            parts = (encoded[start : start + in_task] for start in range(0, count, in_task))
            return itertools.chain.from_iterable(pool.map(decode_part, parts))

        def scaled() -> None:
            pixels = decoded()
            for _ in range(0, count, batch):
                normalize(torch.from_numpy(np.stack(list(itertools.islice(pixels, batch)))))

        ways = [
            streamed(OURS),
            Way("the images in memory, decoded by as many threads and scaled", scaled),
            streamed("ddpm_hf, as stored: what the host does for a GPU", as_stored=True),
            Way("the images in memory, decoded by as many threads", lambda: list(decoded()), close=pool.shutdown),
            streamed(CONTROL),
        ]
        for way in ways:
            way.enter = keep_freed_memory
        return ways

    # ------------------------------------------------------------------------------------------------------ start-up

    def help(self) -> list[Way]:
        """Time until a command line answers."""

        def python(name: str, *arguments: str) -> Way:
            command = [sys.executable, *arguments]
            return Way(name, lambda: subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True))

        imports = "import torch, accelerate, datasets, diffusers; from diffusers import DDPMPipeline, UNet2DModel"
        ways = [
            python(OURS, "-m", "ddpm_hf", "--help"),
            python(f"the imports of {peers.TRAIN_UNCONDITIONAL}", "-c", imports),
        ]
        if self.has(peers.LUCIDRAINS):
            ways.append(python(f"the import of {peers.LUCIDRAINS}", "-c", "import denoising_diffusion_pytorch"))
        return [*ways, python(CONTROL, "-m", "ddpm_hf", "--help")]

    def first_step(self) -> list[Way]:
        """Time until the first step of `make train`."""
        run, cache = self.new_folder(), self.new_folder()
        metrics, printed, children = run / "metrics.jsonl", self.new_folder(), []
        launch = f"--quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
            --num_cpu_threads_per_process {self.num_threads}"
        settings = ["--training.output_dir", str(run), "--training.log_every_steps", "1", "--training.cpu", "true"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split()]
        command += ["train_ddpm.py", "--config", "configs/digits_8.yaml", *settings]

        def stop() -> None:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            children.clear()
            shutil.rmtree(run, ignore_errors=True)

        def start() -> None:
            environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
            with printed.open("wb") as log:
                child = subprocess.Popen(
                    command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            children.append(child)
            while not (metrics.exists() and metrics.stat().st_size):
                if child.poll() is not None:
                    raise RuntimeError(f"training ended before its first step: {printed.read_text()}")
                time.sleep(0.01)

        return [Way(OURS, start, stop, stop), Way(CONTROL, start, stop, stop)]


def stock_memory() -> None:
    """Undo `keep_freed_memory`: the largest thresholds that glibc chooses by itself.

    Training and evaluation with ddpm_hf keep freed memory, which is a setting of the process and would help the peers.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if sys.platform == "linux" and mallopt is not None:
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD
        mallopt(-1, 64 * 2**20)  # M_TRIM_THRESHOLD


def make_images(path: Path, size: int, count: int) -> Path:
    """Write a parquet file of synthetic images: PNG at 32x32, JPEG above."""
    import datasets

    random = np.random.default_rng(0)
    cells = []
    for _ in range(count):
        coarse = random.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        noise = random.normal(0, 6, (size, size, 3))
        picture = Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG" if size == 32 else "JPEG", quality=90)
        cells.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(path)
    return path


def augmentation(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """Return the transforms of train_unconditional.py; without torchvision the same operations of Pillow and torch."""
    if importlib.util.find_spec("torchvision") is not None:
        from torchvision import transforms

        return transforms.Compose(
            [
                transforms.Resize(size, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(size),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def augment(image: Image.Image) -> torch.Tensor:
        if torch.rand(1) < 0.5:  # the images have the right size
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return values.sub(0.5).div(0.5)

    return augment


def peer_batches(source: Path, size: int, batch: int, num_workers: int) -> Any:
    """Yield batches as train_unconditional.py does."""
    import datasets

    augment = augmentation(size)

    def transform(examples: dict[str, list[Any]]) -> dict[str, list[torch.Tensor]]:
        return {"input": [augment(image.convert("RGB")) for image in examples["image"]]}

    images = datasets.load_dataset(
        "parquet", data_files=str(source), split="train", cache_dir=str(source.with_suffix(""))
    )
    images.set_transform(transform)
    loader = torch.utils.data.DataLoader(
        images,
        batch_size=batch,
        shuffle=True,
        num_workers=num_workers,
        drop_last=True,
        persistent_workers=num_workers > 0,
    )
    while True:
        for batch_of in loader:
            yield batch_of["input"]


def measure(arguments: argparse.Namespace, folder: Path, stop_at: float, path: Path, device: str) -> int:
    """Measure the chosen rows, and write the results after each round."""
    bench = Bench(folder, arguments.threads, arguments.quick, peers.missing())
    rows = bench.rows(arguments.compile)
    if unknown := set(arguments.only) - {row.name for row in rows}:
        print(f"error: there is no row {', '.join(sorted(unknown))}; choose from {', '.join(r.name for r in rows)}.")
        return 2
    rows = [row for row in rows if not arguments.only or row.name in arguments.only]
    content: dict[str, Any] = {
        "environment": environment(device),
        "missing": {} if arguments.quick else bench.missing,
        "is_quick": arguments.quick,
        "is_complete": False,
        "gemm_gflops": {},
        "rows": [],
    }
    started = time.monotonic()
    size, gemm_seconds = (256, 0.01) if arguments.quick else (2048, 2.0)
    content["gemm_gflops"]["fp32"] = gemm_gflops(torch.float32, size, gemm_seconds)
    while rows:
        row, remaining = rows.pop(0), stop_at - time.monotonic()
        if remaining <= 0 and not (arguments.quick or row.is_compiled):
            content["missing"][row.title] = f"not measured: no time was left of {arguments.budget_seconds:g} s"
            continue
        weights = row.weight + sum(other.weight for other in rows)
        until = time.monotonic() + (remaining * row.weight / weights if weights else COMPILED_SECONDS)
        row.max_rounds, row.call_seconds = (2, 0.0) if arguments.quick else (row.max_rounds, row.call_seconds)
        ways = row.build()
        try:
            content["rows"].append({})
            for _ in rounds(ways, row, COMPILED_SECONDS if row.is_compiled else until - time.monotonic()):
                content["rows"][-1] = summary(row, ways)
                content["seconds"] = round(time.monotonic() - started, 1)
                write(path, content)
        finally:
            for way in ways:
                way.close()
        print("\n".join(table(content["rows"][-1])), flush=True)
        del ways, way
    content["gemm_gflops"]["fp32"] = max(content["gemm_gflops"]["fp32"], gemm_gflops(torch.float32, size, gemm_seconds))
    content |= {"is_complete": True, "seconds": round(time.monotonic() - started, 1)}
    write(path, content)
    print(f"\nfp32 matrix product: {content['gemm_gflops']['fp32']:.0f} GFLOP/s; {content['seconds']:.0f} s in all")
    for name, reason in content["missing"].items():
        print(f"{name}: {reason}")
    print(f"written to {path}")
    return 0


def main() -> int:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="names of rows, such as train sample")
    parser.add_argument("--quick", action="store_true", help="two rounds of tiny networks: shows that it runs")
    parser.add_argument("--compile", action="store_true", help="also compiled; takes minutes more")
    parser.add_argument("--budget_seconds", type=float, default=780.0, help="time to spend; default 13 minutes")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--threads", type=int, default=cores, help="threads of torch; default one per core")
    parser.add_argument("--output", type=Path, help="file of results")
    arguments = parser.parse_args()
    stop_at = time.monotonic() + arguments.budget_seconds
    torch.set_num_threads(arguments.threads)
    device = device_name(CPU)
    is_whole = not (arguments.quick or arguments.only)
    path = arguments.output or (result_path(device) if is_whole else Path("outputs/bench.json"))
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # after ending the processes that it started
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"  # empty, so that compiling is not read from it
            return measure(arguments, Path(folder), stop_at, path, device)
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
