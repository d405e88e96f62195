"""The training loop: build, train, log, validate, preview, save, resume. Contains no diffusion math; see loss.py.

One step is one optimizer update on the global batch. The images, timesteps, noise, flips and label drops of a step are
functions of (seed, step, position in the global batch), so the loss curve does not depend on how the batch is split
over processes and micro batches, and no random state is stored except the position in a stream of images.
"""

import dataclasses
import json
import linecache
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from torch import nn

from ddpm_hf import distributed
from ddpm_hf.config import (
    ConfigError,
    DiffusionConfig,
    PreviewConfig,
    RunConfig,
    load_config,
    scheduler_and_eta,
    take_launcher,
    use_datasets,
    validate,
)
from ddpm_hf.config.launcher import DEFAULT, LAUNCHER, Launcher
from ddpm_hf.data import (
    Augmentation,
    ClassOrder,
    ImageLoader,
    ImageSet,
    ImageStream,
    describe_sets,
    locations_of,
    normalize,
    open_sets,
)
from ddpm_hf.data.loader import to_device
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.diffusion.compiled import full_batches, uncompile
from ddpm_hf.diffusion.schedule import BETA_RANGES, SMALLEST_ALPHA_BAR
from ddpm_hf.distributed import StopWatcher, TrainingStopped
from ddpm_hf.evaluation.generate import Sampler, default_sampling
from ddpm_hf.evaluation.verify import write_verification
from ddpm_hf.files import (
    CHECKPOINTS_DIR,
    SAMPLES_PICTURE,
    TRAINING_CONFIG,
    TRAINING_SUMMARY,
    UNET_CONFIG,
    format_bytes,
    replace_folder,
    write_json,
    write_text,
)
from ddpm_hf.model_folder import find_latest, name_or_id
from ddpm_hf.models import (
    PRESETS,
    LatentStatistics,
    Pretrained,
    add_augmentation_embedding,
    as_student,
    build_unet,
    conditioned_on_augmentation,
    load_pretrained,
    read_config_file,
    sampling_scheduler,
    saved_parameters,
    take_weights,
)
from ddpm_hf.plots import as_drawn, image_grid
from ddpm_hf.rng import normal_by_pair, numpy_generator, sampling_generators, seed_global_generators
from ddpm_hf.signals import STOP_SIGNALS, raise_on_signals
from ddpm_hf.training import posthoc_ema, run_dir
from ddpm_hf.training.batches import (
    BatchSource,
    Prefetcher,
    build_timestep_sampler,
    largest_micro_batch_size,
    make_memory_probe,
    resolve_micro_batch_size,
    resolve_prefetch_factor,
    trained_timesteps,
)
from ddpm_hf.training.callbacks import Callback, Callbacks, TrainerArguments
from ddpm_hf.training.checkpoint import Checkpointer, DataState, stored_class_order, stored_precision
from ddpm_hf.training.distillation import DistillationLoss, load_teacher
from ddpm_hf.training.ema import EMA, EMA_NAME, decay_schedules, is_snapshot_due
from ddpm_hf.training.engine import compile_for_training, start_engine, use_channels_last
from ddpm_hf.training.latents import (
    Autoencoder,
    LatentLoader,
    LatentSet,
    encode_images,
    keep_autoencoder,
    open_autoencoder,
)
from ddpm_hf.training.logging import MetricsLog, Progress, Trackers, say
from ddpm_hf.training.loss import DenoisingLoss
from ddpm_hf.training.meter import Meter, finite_or_none
from ddpm_hf.training.optim import (
    NonFiniteGuard,
    NonFiniteTraining,
    arm_found_inf,
    build_optimizer,
    check_finite,
    clip_grad_norm_,
    learning_rate_at,
)
from ddpm_hf.training.run_dir import RunFolder, carry_over_additions

if TYPE_CHECKING:
    from ddpm_hf.hub.background import BackgroundPush, CheckpointPush

logger = logging.getLogger(__name__)

# SIGINT raises KeyboardInterrupt already.
_TERMINATING_SIGNALS = [number for number in STOP_SIGNALS if number != signal.SIGINT]
LARGEST_TERMINAL_AMPLITUDE = 0.1
"""Of an image at the last timestep, sqrt(alpha_bar): 0.006 for linear betas, 0.07 for those of Stable Diffusion."""
LARGEST_UNSHIFTED_RESOLUTION = 256
"""Ho et al. 2020 trained on 256x256 with linear betas."""
_MAX_RECORDED = 1000
"""Updates after which the host reads which ones were skipped, if nothing else is due."""


@dataclasses.dataclass(frozen=True)
class Score:
    """A score of the EMA weights, the same on all ranks.

    Args:
        value: The number.
        kind: What was measured and how; only scores of the same kind are compared.
        lower_is_better: Whether a lower number is better.
        row: Columns of its line in metrics.jsonl.
    """

    value: float
    kind: str
    lower_is_better: bool
    row: dict[str, Any]


Scorer: TypeAlias = Callable[[GaussianDiffusionPipeline, ImageSet | ImageStream, ImageSet], Score]
"""Collective: score a pipeline, given the training set and the validation set."""


class TrainOutput(NamedTuple):
    """What `Trainer.fit` returns, the same on all ranks.

    Args:
        global_step: Optimizer updates; fewer than training.num_steps if a callback stopped the run.
        training_loss: The newest loss in metrics.jsonl, a mean over a log interval; None if there is none.
        metrics: The newest "loss", "validation_loss" and "score", as far as they were measured.
    """

    global_step: int
    training_loss: float | None
    metrics: dict[str, float]


Publisher: TypeAlias = Callable[[int, Callable[[Path], None]], None]
"""Publish the pipeline of a step in the background; the callable it is given writes into an empty folder."""


class Trainer:
    """One training run on one of its processes. Collective: build and use it on every rank.

    Args:
        config: The configuration, or what `load_config` makes one of. It is checked and copied: later changes of its
            lists and dictionaries have no effect.
        train_dataset: Training images in memory, which replace data.source; see docs/python.md for the types.
        eval_dataset: Validation images in memory, which replace data.validation_split and data.validation_fraction.
        callbacks: Callbacks, derived from `TrainerCallback` or that of transformers, or their classes.
        scorer: Measures the score of evaluation.score_every_steps instead of evaluation.score_metric.
        publisher: Publishes the EMA weights every hub.push_every_steps. None pushes them, and at the end of `fit` the
            finished run, if hub.push_to_hub is set.
        restore: Whether training.resume_from_hub downloads a later checkpoint; False only checks that it could.

    Attributes:
        config: The configuration, with the values of settings that were left to the launcher.
        origins: Setting -> where such a value came from.
        is_behind_on_hub: Whether `fit` could not push the last checkpoint, with training.resume_from_hub.

    Raises:
        ValueError: The data, the network, the machine or the run folder do not fit the configuration.
    """

    # ------------------------------------------------------------------------------------------------------- build

    def __init__(
        self,
        config: RunConfig | str | PathLike[str] | Mapping[str, Any],
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        callbacks: Iterable[Callback] | None = None,
        scorer: Scorer | None = None,
        publisher: Publisher | None = None,
        restore: bool = True,
    ) -> None:
        in_memory = {"has_train_dataset": train_dataset is not None, "has_eval_dataset": eval_dataset is not None}
        config = use_datasets(load_config(config), **in_memory)
        validate(config, **in_memory)
        self.callbacks = Callbacks(callbacks)
        self._scorer, self._publisher = scorer, publisher
        self._push: BackgroundPush | None = None  # of this trainer, which then also pushes the finished run
        self._checkpoint_push: CheckpointPush | None = None
        self.folder = RunFolder(Path(config.training.output_dir).expanduser(), _calling_line())
        self.process_settings = distributed.ProcessSettings()
        self._process, self._parent = os.getpid(), os.getppid()
        self._is_entered = self._has_trained = self._is_closed = False
        self.is_behind_on_hub = False
        self._watcher: StopWatcher | None = None  # during training
        self._training_thread = threading.get_ident()
        self._has_ended = threading.Event()
        with self.process_settings:
            diffusers_logging.disable_progress_bar()  # diffusers shows one for each part of a pipeline
            launcher = distributed.join(cpu=config.training.cpu)
            try:
                if config.training.resume_from_hub:
                    self._prepare_hub(config, restore)
                self._start(config, launcher, train_dataset, eval_dataset)
            except BaseException:
                self.folder.release()
                raise

    def _prepare_hub(self, config: RunConfig, restore: bool) -> None:
        """Collective: check that checkpoints can be pushed, and download a later one, before anything reads the run."""
        from ddpm_hf.hub.background import CheckpointPush

        push = CheckpointPush(config, self.folder.path, self.folder.hub / CHECKPOINTS_DIR)

        def prepare() -> None:
            self.folder.acquire(config.training.resume)
            remote = push.check()
            if remote is not None and restore:
                push.restore(remote)
            elif remote is not None:
                say(f"{remote} holds step {remote.step}, from which training would continue.")

        distributed.on_rank_0(prepare)
        self._checkpoint_push = push

    def _start(self, config: RunConfig, launcher: Launcher, train_dataset: Any, eval_dataset: Any) -> None:
        """Collective: start Accelerate, lock the run folder and build everything."""
        self.config, self.origins = resolve(config, self.folder, launcher)
        training = self.config.training
        assert training.mixed_precision is not None
        self.accelerator = distributed.start(
            mixed_precision=training.mixed_precision,
            is_from_launcher=self.origins.get("training.mixed_precision") == LAUNCHER,
            cpu=training.cpu,
            tf32=training.tf32,
            deterministic=training.deterministic,
        )
        self.device = self.accelerator.device
        self.engine = start_engine(training, self.device)
        self.micro_batch_size = largest_micro_batch_size(training, self.accelerator.num_processes)
        distributed.on_rank_0(lambda: self.folder.acquire(training.resume))
        self._build(train_dataset, eval_dataset)
        self._start_callbacks()
        self.callbacks.call("on_init_end")

    def _build(self, train_dataset: Any, eval_dataset: Any) -> None:
        """Collective: build everything that the loop needs."""
        config, training = self.config, self.config.training
        self.scheduler = build_scheduler(config.diffusion)  # before the data, which may take hours to decode
        self.trackers = Trackers(config.tracking, self.folder.path)
        distributed.on_rank_0(self.trackers.check)
        self.autoencoder = open_autoencoder(config, self.folder, self.device)

        found = distributed.on_rank_0(lambda: stored_class_order(self.folder.checkpoints))
        class_order: ClassOrder = distributed.broadcast_json(found)
        self.images, self.validation_images = open_splits(
            config, self.accelerator, class_order, train_dataset=train_dataset, eval_dataset=eval_dataset
        )
        # Of what the network is trained on: images, or their latents.
        self.sample_shape = self.images.image_shape
        if self.autoencoder is not None:
            self.sample_shape = self.autoencoder.shape_of_samples(self.images.image_shape)
        self.latents, self.validation_latents = encode_splits(
            config, self.images, self.validation_images, self.autoencoder, self.accelerator
        )
        self.augmentation: Augmentation | None = None
        if config.data.augmentation > 0:
            self.augmentation = Augmentation(config.data, self.sample_shape, training.seed)
        self.class_names = class_names_of(self.images, config)
        has_null_label = config.objective.class_dropout > 0
        null_label = len(self.class_names) if self.class_names and has_null_label else None

        value_range = None if self.images.value_range is None else list(self.images.value_range)
        statistics: LatentStatistics | None = None
        if self.latents is not None:
            statistics = self.latents.normalization
        elif self.autoencoder is not None and value_range is not None:  # that of the latents, which are the data
            low, high = value_range
            num_channels, value_range = self.sample_shape[0], None
            statistics = [(low + high) / 2] * num_channels, [(high - low) / 2] * num_channels
        self.pipeline_settings: dict[str, Any] = {
            "class_names": self.class_names,
            "has_null_label": has_null_label,
            "self_conditioned": config.objective.self_conditioning > 0,
            "value_range": value_range,
        }
        if self.autoencoder is not None:
            mean, std = statistics or (None, None)
            self.pipeline_settings |= {"vae": self.autoencoder.vae, "latents_mean": mean, "latents_std": std}

        seed_global_generators(training.seed, "initialization")
        self.unet = build_network(
            config,
            self.sample_shape,
            self.class_names,
            self.scheduler,
            self.folder.checkpoints,
            self.device,
            value_range,
            statistics,
        )
        if self.augmentation is not None:
            add_augmentation_embedding(self.unet, self.augmentation.num_parameters)
        self.parameters = list(self.unet.parameters())
        self.has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.unet.modules())
        self.loader = build_loader(config, self.latents or self.images, self.device)
        self.ema = EMA(self.unet, decay_schedules(training))
        self.optimizer = build_optimizer(self.parameters, training)
        if config.preview.every_steps:
            preview_sampler(self._pipeline(), config.preview)  # raises its errors before the first step
        self.loss = build_loss(
            config, self.scheduler, null_label, self.sample_shape, self.class_names, self.accelerator,
            self.pipeline_settings,
        )  # fmt: skip
        self.timestep_sampler = build_timestep_sampler(config)

        self.global_step = 0
        self._saved_step = -1
        self._is_resumed = False
        self._copied: tuple[int | None, GaussianDiffusionPipeline] | None = None
        self.best: dict[str, Any] | None = None  # step, kind and value of the best score
        self._previous_best: dict[str, Any] | None = None  # before the last save
        self.guard = NonFiniteGuard(training.max_consecutive_nonfinite)
        self.meter = Meter(self.accelerator, training.train_batch_size, config.diffusion.num_train_timesteps)
        self.metrics = MetricsLog(self.folder.metrics)
        self.checkpointer = Checkpointer(
            config,
            self.folder,
            self.metrics,
            unet=self.unet,
            ema=self.ema,
            optimizer=self.optimizer,
            timestep_sampler=self.timestep_sampler,
            parts=[
                self,
                self.guard,
                self.meter,
                DataState(self.images, config.data.source, self.folder.path, class_order),
                *([self.loss] if isinstance(self.loss, DistillationLoss) else []),
            ],
            on_written=None if self._checkpoint_push is None else self._checkpoint_push.start,
        )
        # The micro-batch size of a resumed run with "auto"; None in a new one.
        self._stored_micro_batch_size: int | None = None
        if self._scorer is None and config.evaluation.score_every_steps:
            self._scorer = build_scorer(config, self.images, self.device)
        if self._publisher is None and config.hub.push_to_hub:
            from ddpm_hf.hub.background import BackgroundPush

            self._push = BackgroundPush(config.hub, self.folder.hub)
            self._publisher = self._push.publish
            distributed.on_rank_0(self._push.check)

    def _start_callbacks(self) -> None:
        """Set what the callbacks are called with."""
        config, accelerator = self.config, self.accelerator
        metric = None
        if config.evaluation.score_every_steps:
            metric = "score"
        elif config.training.validate_every_steps:
            metric = "loss"
        self.callbacks.args = TrainerArguments(
            config, metric, process_index=accelerator.process_index, world_size=accelerator.num_processes
        )
        self.callbacks.context = {"trainer": self, "model": self.unet, "optimizer": self.optimizer}
        state = self.callbacks.state
        state.max_steps = config.training.num_steps
        state.is_world_process_zero = bool(accelerator.is_main_process)
        state.is_local_process_zero = bool(accelerator.is_local_main_process)
        self.callbacks.check()

    @property
    def pipeline(self) -> GaussianDiffusionPipeline:
        """A pipeline with a copy of the EMA weights of this step, which has no effect on the training.

        Until `fit` is called, the weights are those of the newest checkpoint in the run folder, if there is one.
        Between two steps it is always the same object. On any rank and in any thread: not collective.
        """
        key = self.global_step if self._is_resumed else None
        if self._copied is None or self._copied[0] != key:
            latest = None if self._is_resumed else find_latest(self.folder.checkpoints)[0]
            if latest is None:
                unet = copy_network(self.unet, self.ema.copy())
            else:
                unet = UNet2DModel.from_pretrained(latest.path / EMA_NAME, use_safetensors=True).to(self.device)
            self._copied = key, self._pipeline(unet)
        return self._copied[1]

    def add_callback(self, callback: Callback) -> None:
        """Add a callback, or create one of a class. With several processes, call it on every rank and before `fit`."""
        self.callbacks.add(callback)
        self.callbacks.check()

    def remove_callback(self, callback: Callback) -> Callback | None:
        """Remove and return the first callback that is this one, or of this class; return None if there is none."""
        return self.callbacks.remove(callback)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and prints."""
        return distributed.rank() == 0

    def __enter__(self) -> "Trainer":
        self._is_entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the run folder back. `fit` does so at its end, unless the trainer is used as a context manager.

        While another thread is in `fit`, stop it there after its step, and wait until it has saved. In a callback, stop
        training after this step. Closing again does nothing. The trained weights stay usable.
        """
        if (watcher := self._watcher) is not None:
            watcher.request()
            if self._training_thread == threading.get_ident():
                return
            self._has_ended.wait()
        self._is_closed = True
        if isinstance(self.images, ImageStream):
            self.images.close()
        self.folder.release()

    def shutdown(self) -> None:
        """Collective: close, wait for all ranks, including the report of rank 0, and destroy the process group."""
        self.close()
        distributed.barrier()
        with self.process_settings:
            self.accelerator.end_training()

    def leave_the_others(self) -> None:
        """Call `shutdown`; the name in version 0.1."""
        warnings.warn("Trainer.leave_the_others is now Trainer.shutdown", DeprecationWarning, stacklevel=2)
        self.shutdown()

    # -------------------------------------------------------------------------------------------------------- loop

    def fit(self) -> TrainOutput:
        """Collective: train until `num_steps`, continuing from the newest valid checkpoint, and save the pipeline.

        A callback that stops the run ends it in the same way, with a checkpoint of the step that was reached. Another
        trainer with the same configuration continues from there. At the end, also that by an exception, the run folder
        is given back, see `close`. In the main thread a signal saves a checkpoint and raises TrainingStopped, which is
        KeyboardInterrupt for SIGINT and SystemExit for others.

        Returns:
            What was reached.

        Raises:
            TrainingStopped: After a signal and a checkpoint.
            NonFiniteTraining: Too many consecutive updates were not finite.
            ProcessesDiffer: The processes no longer hold the same weights.
            ValueError: The trainer is closed or has trained, or the checkpoints in the run folder cannot be continued
                with this configuration.
        """
        if self._process != os.getpid():
            raise ConfigError(
                f"this Trainer was built in process {self._process} and cannot train in process {os.getpid()}, which "
                "was forked from it; build it in the process that trains."
            )
        if self._is_closed or self._has_trained:
            raise ConfigError(
                f"this Trainer {'has trained' if self._has_trained else 'is closed'}; build another one, which "
                f"continues the run in {self.folder.path}."
            )
        try:
            with self.process_settings, raise_on_signals(_TERMINATING_SIGNALS):
                # Also while it prepares; the launcher may have exited since the trainer was built.
                self._has_trained = True
                self._watcher, self._training_thread = StopWatcher(self._parent), threading.get_ident()
                with self._push or nullcontext(), self._checkpoint_push or nullcontext():
                    return self._fit(self._watcher)
        finally:
            if self._has_trained:  # and is not refused because another trainer is at work
                self._watcher = None
                self._has_ended.set()
                self._restore_network()
                if not self._is_entered:
                    self.close()

    def _fit(self, watcher: StopWatcher) -> TrainOutput:
        """Collective: resume, train and save the pipeline."""
        self.checkpointer.resume()
        if self.autoencoder is not None:
            distributed.on_rank_0(partial(keep_autoencoder, self.autoencoder, self.folder))
        self._is_resumed, self._copied = True, None
        self._prepare()
        first_step, num_steps = self.global_step, self.config.training.num_steps
        self._begin_callbacks()
        self._call_back("on_train_begin")
        self._progress = Progress(first_step, num_steps, is_main_process=self.is_main_process)
        with watcher, self._progress, self.trackers, self.checkpointer, self._prefetcher:
            if first_step < num_steps:
                distributed.on_rank_0(lambda: self.trackers.start(first_step, self.config.to_dict()))
            started_at = time.monotonic()
            timed = self.metrics.last("seconds") or {}
            self.meter.start(first_step, timed.get("seconds", 0.0))
            must_stop = False
            while self.global_step < num_steps and not must_stop:
                self._begin_step()
                self._train_step(self.global_step)
                self.global_step += 1
                self._progress.update()
                self._after_step()
                self._stop_if_requested(watcher.exit_code_if_stopped())
                must_stop = self.callbacks.agree()
            self._stop_if_requested(watcher.agreed())  # a signal in the last step
            self.callbacks.finish()
            if self.global_step < num_steps:
                self._read_guard()
                if self._saved_step != self.global_step or not self._confirm_best():
                    self._save(must_succeed=True)
        self._save_pipeline()
        self._push_checkpoint()
        if self.is_main_process:
            minutes, seconds = divmod(round(time.monotonic() - started_at), 60)
            stopped = "" if self.global_step == num_steps else f" of {num_steps}, where a callback stopped it,"
            say(f"Trained from step {first_step} to {self.global_step}{stopped} in {minutes}:{seconds:02}.")
        self._call_back("on_train_end")
        if self._push is not None and self.is_main_process and not self._push.finish(self.folder.path):
            logger.warning(
                "The trained pipeline is not on the Hub; it is in %s, and the same run tries again.",
                self.folder.pipeline,
            )
        return self._output()

    def _restore_network(self) -> None:
        """Undo what `_prepare` did to the network, which stays usable for sampling."""
        uncompile(self.unet)
        for name in ("forward", "_original_forward"):  # Accelerate has put autocast into them
            self.unet.__dict__.pop(name, None)
        self.optimizer.zero_grad(set_to_none=True)

    def _prepare(self) -> None:
        """Collective: resolve the micro-batch size, wrap the network with Accelerate, and compile it."""
        self.unet.train()
        if self.engine.channels_last:  # after the weights, their EMAs and the moments were read from a checkpoint
            use_channels_last(self.unet, self.ema, self.optimizer)
            for network in self.loss.frozen:
                network.to(memory_format=torch.channels_last)
        num_steps_ahead = resolve_prefetch_factor(self.config, self.device)
        probe = None
        if self.device.type == "cuda":  # elsewhere, running out of memory is not an exception
            per_process = self.config.training.train_batch_size // self.accelerator.num_processes
            num_prefetched = (num_steps_ahead + 1) * per_process if num_steps_ahead else 0
            probe = make_memory_probe(
                self.unet, self.loss, self.sample_shape, self.accelerator.autocast, num_prefetched
            )
        self.micro_batch_size = resolve_micro_batch_size(
            self.config.training, self.micro_batch_size, self._stored_micro_batch_size, probe
        )
        self._batches = BatchSource(
            self.config,
            self.loader,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            micro_batch_size=self.micro_batch_size,
            device=self.device,
            timestep_sampler=self.timestep_sampler,
            augmentation=self.augmentation,
        )
        self._prefetcher = Prefetcher(self._batches, num_steps_ahead, self.config.training.num_steps)
        self._model = self.accelerator.prepare(self.unet)
        # Last: Accelerate has put autocast into the network's forward, and DDP decides where graphs are split.
        self.engine = compile_for_training(
            self.unet, self.engine, self.config.training, self._train_on_zeros, self.loss.frozen
        )
        if self.engine.uses_cuda_graphs:
            # Gradients that a graph returns are overwritten by its next replay: add them to tensors outside of it.
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)

    def _train_on_zeros(self) -> None:
        """Run the forward and backward pass of a micro batch on zeros, without leaving gradients."""
        size, objective = self.micro_batch_size, self.config.objective
        x_0 = torch.zeros(size, *self.sample_shape, device=self.device)
        zeros = torch.zeros(size, dtype=torch.int64, device=self.device)
        labels = zeros if self.config.model.class_conditional else None
        parameters = None
        if self.augmentation is not None:
            parameters = torch.zeros(size, self.augmentation.num_parameters, device=self.device)
        is_wrapped = isinstance(self._model, nn.parallel.DistributedDataParallel)
        # Inside DDP the compiler splits the graph at DDP's buckets, so that they are reduced while others are computed.
        inside_ddp = self._model._inside_ddp_forward() if is_wrapped else nullcontext()
        with inside_ddp, conditioned_on_augmentation(self.unet, parameters):
            losses = self.loss(self.unet, x_0, x_0, zeros, labels, None, objective.self_conditioning > 0)
        torch.autograd.grad(losses.sum(), self.parameters, allow_unused=True)

    def _train_step(self, step: int) -> None:
        """Collective: one optimizer update on the global batch, with gradients accumulated over micro batches."""
        recorded: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index, batch in enumerate(self._prefetcher.micro_batches(step)):
            if self.has_dropout:  # nothing else draws from the global generators
                seed_global_generators(
                    self.config.training.seed, "dropout", step, self.accelerator.process_index, index
                )
            with nullcontext() if batch.is_last else self.accelerator.no_sync(self._model):
                with conditioned_on_augmentation(self.unet, batch.augmentation):
                    losses = self.loss(
                        self._model,
                        batch.x_0,
                        batch.noise,
                        batch.timesteps,
                        batch.class_labels,
                        batch.dropped,
                        batch.use_self_cond,
                        batch.perturbation,
                    )
                weighted = losses if batch.importance is None else batch.importance * losses
                # The part of this micro batch in the mean over the images of this rank. DDP averages over ranks, so the
                # gradients add up to that of the mean over the global batch.
                self.accelerator.backward(weighted.sum() / len(self._batches))
            losses = losses.detach()
            self.meter.losses.add(losses, batch.timesteps, batch.importance)
            if self.timestep_sampler.learns:
                recorded.append((batch.timesteps, losses))
        if recorded:
            timesteps, step_losses = (
                self.accelerator.gather(torch.cat(column)) for column in zip(*recorded, strict=True)
            )
            self.timestep_sampler.record(timesteps, step_losses)
        self._update(step)

    def _update(self, step: int) -> None:
        """Clip the gradient, and update the weights and their EMA unless it is not finite.

        The host reads nothing from the device, unless the optimizer cannot skip an update there.
        """
        config, scaler = self.config.training, self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.grad_norm = clip_grad_norm_(gradients, config.max_grad_norm)
        is_nonfinite = ~(self.grad_norm < math.inf)  # NaN too
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        # The public get_scale would make the host wait for the device.
        self.guard.record(step, is_nonfinite, None if scaler is None else scaler._get_scale_async())
        if arm_found_inf(self.optimizer, is_nonfinite):
            self.optimizer.step()
        if scaler is not None:
            scaler.update()
        self.ema.update(is_nonfinite)
        # With gradients of None, backward writes them once. It would add to zeros, and DDP would scale the sum.
        self.optimizer.zero_grad(set_to_none=not self.engine.uses_cuda_graphs)
        self.meter.losses.end_step(is_nonfinite)

    def _read_guard(self) -> None:
        """Collective: learn which updates were skipped, warn, and raise NonFiniteTraining after too many in a row."""

        def warn(step: int) -> None:
            if self.is_main_process:
                logger.warning(
                    "The gradient of step %d was not finite, so its update was skipped.%s",
                    step + 1,
                    self._batches.describe_images(step),
                )

        self.guard.read(warn)

    def _after_step(self) -> None:
        """Collective: log, validate, score, preview, save and publish if due, or if a callback asks for it.

        The last step is logged, validated, scored and saved whatever its number.
        """
        config, step, new_best = self.config, self.global_step, None
        is_last = step == config.training.num_steps

        def is_due(every_steps: int, *, also_last: bool = True) -> bool:
            return every_steps > 0 and (step % every_steps == 0 or (is_last and also_last))

        must_log = is_due(config.training.log_every_steps)
        must_validate = is_due(config.training.validate_every_steps)
        must_score = is_due(config.evaluation.score_every_steps)
        must_preview = is_due(config.preview.every_steps, also_last=False)
        must_store_ema = is_snapshot_due(step, config.training)
        must_save = is_due(config.training.checkpoint_every_steps)
        # The finished pipeline is published by the command, after the report.
        must_publish = config.hub.push_to_hub and is_due(config.hub.push_every_steps, also_last=False) and not is_last
        must_read = self.guard.num_recorded >= _MAX_RECORDED
        if self.callbacks.is_used:
            self._update_state()
            self.callbacks.end_step(
                should_log=must_log, should_evaluate=must_validate or must_score, should_save=must_save
            )
        requested = self.callbacks.requested
        must_log |= requested.should_log
        is_asked = requested.should_evaluate or requested.should_save
        if not is_asked and not any(
            (must_read, must_log, must_validate, must_score, must_preview, must_store_ema, must_save, must_publish)
        ):
            return

        self._read_guard()
        if must_log:
            self._log()
        must_evaluate = self.callbacks.requested.should_evaluate  # a callback may ask for it after the log line
        must_validate |= must_evaluate and len(self.validation_images) > 0
        must_score |= must_evaluate and self._scorer is not None
        with self.meter.paused():
            measured: dict[str, Any] = {}
            if must_validate:
                with self._progress.doing("Validating"):
                    measured |= self._validate()
            if must_score:
                with self._progress.doing("Measuring the score"):
                    row, new_best = self._score()
                    measured |= row
            if measured:
                self._call_back("on_evaluate", metrics=measured)
                self._update_best_metric(measured)
            # Before the checkpoint: a run that is resumed from it does not repeat this step.
            if must_preview:
                with self._progress.doing("Drawing a preview"):
                    self._preview()
            if must_store_ema:
                snapshots = self.folder.ema_snapshots
                distributed.on_rank_0(lambda: posthoc_ema.store(snapshots, step, self.ema, self._pipeline()))
            if must_save or new_best or self.callbacks.requested.should_save:
                with self._progress.doing("Saving"):
                    self._save(must_succeed=is_last, new_best=new_best)
            if must_publish:
                self._publish()

    def _stop_if_requested(self, exit_code: int) -> None:
        """Collective: save and raise TrainingStopped if the exit code is not 0."""
        if exit_code:
            self._read_guard()
            self._save(must_succeed=True)
            self._progress.close()
            self._push_checkpoint()
            if self.is_main_process:
                say(f"Stopped by a signal at step {self.global_step}; the same command continues here.")
            raise TrainingStopped.of(exit_code)

    # ----------------------------------------------------------------------------------------------------- measure

    def _log(self) -> None:
        """Collective: write a line of metrics, with means since the previous one."""
        row = self.meter.take(self.global_step)
        row |= {
            "grad_norm": finite_or_none(float(self.grad_norm)),
            "learning_rate": learning_rate_at(self.global_step - 1, self.config.training),
            "num_skipped_updates": self.guard.num_skipped,
        }
        if self.accelerator.scaler is not None:
            row["num_scaler_skips"] = self.guard.num_scaler_skips
        self._write(row)
        self._progress.show(row, self.config.training.train_batch_size)

    def _validate(self) -> dict[str, Any]:
        """Collective: write and return the validation loss of the EMA weights."""
        with self.ema.swapped_in(), full_batches(self.unet, self.micro_batch_size):
            loss = validation_loss(
                self.unet,
                self.loss,
                self.validation_latents or self.validation_images,
                self.config,
                rank=self.accelerator.process_index,
                num_processes=self.accelerator.num_processes,
                batch_size=self.micro_batch_size,
            )
        row = {**self._clock(), "validation_loss": finite_or_none(loss)}
        self._write(row)
        return row | {"eval_loss": row["validation_loss"]}

    def _score(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Collective: write and return the score of the EMA weights; also return the new `best` if it is better."""
        assert self._scorer is not None
        with self.ema.swapped_in(), full_batches(self.unet, self.config.evaluation.batch_size):
            score = self._scorer(self._pipeline(), self.images, self.validation_images)
        row = {**self._clock(), **score.row}
        self._write(row)
        self._confirm_best()
        self.callbacks.args.greater_is_better = not score.lower_is_better
        return row | {"eval_score": finite_or_none(score.value)}, best_of(score, self.global_step, self.best)

    def _preview(self) -> None:
        """Collective: sample a preview grid from the EMA weights."""
        path = self.folder.previews / f"step_{self.global_step:08d}.png"
        seed, preview = self.config.training.seed, self.config.preview
        with self.ema.swapped_in(), full_batches(self.unet, BLOCK_SIZE):
            is_written = save_preview(path, self.unet, self.scheduler, preview, seed, **self.pipeline_settings)
        if is_written:
            self.trackers.log_preview(self.global_step, path)

    def _clock(self) -> dict[str, Any]:
        num_images = self.global_step * self.config.training.train_batch_size
        return {"step": self.global_step, "num_images": num_images}

    def _write(self, row: dict[str, Any]) -> None:
        if self.is_main_process:
            self.metrics.append(row)
            self.trackers.log(row)
        if self.callbacks:
            self.callbacks.state.log_history.append(dict(row))
            self._call_back("on_log", logs=dict(row))

    # --------------------------------------------------------------------------------------------------- callbacks

    def _begin_callbacks(self) -> None:
        """Collective: prepare the callbacks for a training, with the best validation loss or score so far."""
        self.callbacks.start()
        if not self.callbacks.is_used:
            return

        def best_metric() -> float | None:
            if self.callbacks.args.metric_for_best_model == "score":
                return None if self.best is None else self.best["value"]
            losses = [row["validation_loss"] for row in self.metrics.rows() if row.get("validation_loss") is not None]
            return min(losses, default=None)

        self.callbacks.state.best_metric = distributed.broadcast_json(distributed.on_rank_0(best_metric))

    def _call_back(self, event: str, **values: Any) -> None:
        """Call a method of the callbacks of this rank."""
        if self.callbacks:
            self._update_state()
            self.callbacks.call(event, **values)

    def _begin_step(self) -> None:
        """Call the callbacks before a step, and restore the mode of the network, which any of them may have changed."""
        if self.callbacks.is_used:
            self._update_state()
            self.callbacks.begin_step()
            self.unet.train()

    def _update_state(self) -> None:
        state, num_images = self.callbacks.state, self.global_step * self.config.training.train_batch_size
        state.global_step = self.global_step
        state.epoch = None if isinstance(self.images, ImageStream) else num_images / len(self.images)

    def _update_best_metric(self, measured: Mapping[str, Any]) -> None:
        args, state = self.callbacks.args, self.callbacks.state
        value = measured.get(f"eval_{args.metric_for_best_model}")
        if value is not None:
            best = max if args.greater_is_better else min
            state.best_metric = value if state.best_metric is None else best(value, state.best_metric)

    def _output(self) -> TrainOutput:
        """Collective: return the newest loss, validation loss and score of the run."""

        def newest() -> dict[str, float]:
            rows = {name: self.metrics.last(name) for name in ("loss", "validation_loss", "score")}
            return {name: row[name] for name, row in rows.items() if row is not None}

        metrics = distributed.broadcast_json(distributed.on_rank_0(newest))
        return TrainOutput(self.global_step, metrics.get("loss"), metrics)

    # -------------------------------------------------------------------------------------------------------- save

    def _save(self, *, must_succeed: bool, new_best: dict[str, Any] | None = None) -> None:
        """Collective: write a checkpoint, which may be the best one so far."""
        self._confirm_best()
        self._previous_best = self.best
        self.best = new_best or self.best
        self.checkpointer.save(must_succeed=must_succeed)
        self._saved_step = self.global_step
        if self.callbacks.must_wait_for_saves and self._confirm_best():
            self._call_back("on_save", checkpoint=self.folder.checkpoints / f"step_{self.global_step:08d}")

    def _confirm_best(self) -> bool:
        """Collective: wait for the last checkpoint; return False if it was not written, and so is not the best."""
        is_written = self.checkpointer.wait()
        if not is_written:
            self.best = self._previous_best
        return is_written

    def state_dict(self) -> dict[str, Any]:
        """Return the trainer's own values of trainer_state.json."""
        scaler = self.accelerator.scaler
        return {
            "global_step": self.global_step,
            "micro_batch_size": self.micro_batch_size,
            "scaler": None if scaler is None else scaler.state_dict(),
            "best": self.best,
            "class_names": self.class_names,
            "value_range": self.pipeline_settings["value_range"],
            "latents": self._latents_state(),
        }

    def _latents_state(self) -> dict[str, Any] | None:
        """Return which VAE gives the latents, and their normalization; None for pixels."""
        if self.autoencoder is None:
            return None
        names = ("latents_mean", "latents_std")
        return {"vae_sha256": self.autoencoder.sha256} | {name: self.pipeline_settings[name] for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        micro_batch_size, best = state["micro_batch_size"], state["best"]
        if micro_batch_size is not None and not isinstance(micro_batch_size, int):
            raise ValueError(f"micro_batch_size is {micro_batch_size!r}; it must be an integer")
        if best is not None:
            types: dict[str, Any] = {"step": int, "kind": str, "value": int | float}
            if best.keys() != types.keys() or not all(isinstance(best[name], types[name]) for name in types):
                raise ValueError(f"best is {best!r}; it must hold the step, the kind and the value of a score")
        if self.autoencoder is not None and state["latents"]["vae_sha256"] != self.autoencoder.sha256:
            raise ConfigError(
                f"{self.autoencoder.setting} holds other weights than those that the run in {self.folder.path} was "
                "trained with; restore them, or choose another training.output_dir."
            )
        self.global_step = state["global_step"]
        self._stored_micro_batch_size = micro_batch_size
        self.best = best
        if state["scaler"] and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _save_pipeline(self) -> None:
        """Collective: write the finished pipeline on rank 0."""

        def write(folder: Path) -> None:
            self._write_pipeline(folder)
            write_verification(folder)
            carry_over_additions(self.folder.pipeline, folder, self.folder.evaluations)

        distributed.on_rank_0(lambda: replace_folder(self.folder.pipeline, write))

    def _publish(self) -> None:
        """Collective: let rank 0 publish the EMA weights; failures are warnings."""

        def write(folder: Path) -> None:
            check_finite([*self.parameters, *self.ema.tensors()], self.global_step)
            self._write_pipeline(folder / "pipeline")
            for preview in sorted(self.folder.previews.glob("step_*.png"))[-1:]:
                shutil.copyfile(preview, folder / SAMPLES_PICTURE)

        def publish() -> None:
            assert self._publisher is not None
            try:
                self._publisher(self.global_step, write)
            except (OSError, NonFiniteTraining) as error:
                logger.warning("Step %d is not pushed to the Hub (%s); training continues.", self.global_step, error)

        distributed.on_rank_0(publish)

    def _push_checkpoint(self) -> None:
        """Collective: wait until the checkpoint of this step is on the Hub; a failure is a warning."""
        if (push := self._checkpoint_push) is None:
            return

        def finish() -> bool:
            names = self.checkpointer.names_of(self.global_step, self.best["step"] if self.best else None)
            is_pushed = push.finish(self.global_step, names)
            if not is_pushed:
                logger.warning(
                    "The checkpoint of step %d is not on the Hub; it is in %s, and the same run tries again.",
                    self.global_step,
                    self.folder.checkpoints,
                )
            return is_pushed

        self.is_behind_on_hub = not distributed.broadcast_json(distributed.on_rank_0(finish))

    def _write_pipeline(self, folder: Path) -> None:
        """Write a pipeline with the EMA weights, its configuration and its training summary."""
        with self.ema.swapped_in():
            self._pipeline().save_pretrained(folder)
        write_text(folder / TRAINING_CONFIG, self.config.to_yaml())
        summary = run_dir.summarize(
            self.config,
            self.global_step,
            images=self.images,
            unet=self.unet,
            num_processes=distributed.world_size(),
            metrics=self.metrics,
            engine=str(self.engine),
            latents=self.latents_summary(),
        )
        write_json(folder / TRAINING_SUMMARY, summary)

    def latents_summary(self) -> dict[str, Any] | None:
        """Return the VAE, the shape and the normalization of the latents; None for pixels."""
        if self.autoencoder is None:
            return None
        data, model = self.config.data, self.config.model
        return {
            "vae": name_or_id(data.vae or model.vae or ""),
            "vae_class": type(self.autoencoder.vae).__name__,
            "vae_sha256": self.autoencoder.sha256,
            "shape": list(self.sample_shape),
            "normalization": "value_range" if data.vae is None else data.latent_normalization,
        }

    def _pipeline(self, unet: UNet2DModel | None = None) -> GaussianDiffusionPipeline:
        """Return a pipeline around the network with its current weights, or around another one."""
        scheduler = GaussianDiffusionScheduler.from_config(self.scheduler.config)
        return GaussianDiffusionPipeline(
            unet or self.unet, sampling_scheduler(scheduler, self.config.distillation), **self.pipeline_settings
        )


# ----------------------------------------------------------------------------------------------- parts of the build


def _calling_line() -> str:
    """Return the line that builds the trainer, also of a notebook cell."""
    frame = sys._getframe(2)
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f"`{line}`" if line else f"the Trainer of {frame.f_code.co_filename}:{frame.f_lineno}"


def resolve(config: RunConfig, folder: RunFolder, launcher: Launcher) -> tuple[RunConfig, dict[str, str]]:
    """Collective: fill the settings that the configuration leaves to the launcher.

    Returns:
        As `take_launcher`.

    Raises:
        ConfigError: The launcher contradicts the configuration or the run in the folder, or is not supported.
    """
    stored = distributed.broadcast_json(distributed.on_rank_0(lambda: stored_precision(folder.checkpoints)))
    return take_launcher(config, launcher, num_processes=distributed.world_size(), stored_precision=stored)


def open_splits(
    config: RunConfig, accelerator: Accelerator, class_order: ClassOrder = "numbers", **options: Any
) -> tuple[ImageSet | ImageStream, ImageSet]:
    """Collective: open the data. Rank 0 searches and decodes them; the other ranks map what it found.

    Args:
        config: The data, and the seed that chooses the validation set.
        accelerator: The processes.
        class_order: How class folders named by numbers are sorted.
        **options: `known`, `train_dataset` and `eval_dataset` of `open_sets`.

    Returns:
        The training set, or this process's stream of it, and the validation set.

    Raises:
        ValueError: The data cannot be used for training.
    """

    def open_both(locations: Sequence[dict[str, Any] | None] = (None, None)) -> tuple[ImageSet | ImageStream, ImageSet]:
        return open_sets(
            config.data,
            with_labels=config.model.class_conditional,
            seed=config.training.seed,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            device=accelerator.device,
            locations=locations,
            class_order=class_order,
            **options,
        )

    opened = distributed.on_rank_0(open_both)
    locations = distributed.broadcast_json(opened and locations_of(*opened))
    return distributed.on_every_rank(lambda: opened or open_both(locations))


def encode_splits(
    config: RunConfig,
    images: ImageSet | ImageStream,
    validation_images: ImageSet,
    autoencoder: Autoencoder | None,
    accelerator: Accelerator,
) -> tuple[LatentSet | None, LatentSet | None]:
    """Collective: return the latents of the training and the validation set, if the network is trained on latents.

    Raises:
        ValueError: The images cannot be encoded.
    """
    if autoencoder is None or config.data.vae is None:
        return None, None
    assert isinstance(images, ImageSet)  # config/rules.py refuses streams
    encode = partial(
        encode_images,
        autoencoder=autoencoder,
        config=config.data,
        device=accelerator.device,
        is_local_main_process=bool(accelerator.is_local_main_process),
    )
    training = encode(images)
    return training, encode(validation_images, training=training) if len(validation_images) else None


def build_loader(
    config: RunConfig, images: ImageSet | LatentSet | ImageStream, device: torch.device
) -> ImageLoader | LatentLoader | ImageStream:
    """Collective: build the data loader; with data.device_resident the images are moved to the device.

    Raises:
        ValueError: The images are to be kept on a device that has no memory for them.
    """
    if isinstance(images, ImageStream):
        return images
    if isinstance(images, LatentSet):
        return distributed.on_every_rank(lambda: LatentLoader(images, config.data, config.training.seed, device))
    return distributed.on_every_rank(lambda: ImageLoader(images, config.data, config.training.seed, device))


def build_scorer(config: RunConfig, images: ImageSet | ImageStream, device: torch.device) -> Scorer:
    """Collective: build the scorer of evaluation.score_metric, and open its feature network.

    Raises:
        ValueError: The score cannot be measured.
    """
    from ddpm_hf.evaluation.metrics import SAMPLE_METRICS
    from ddpm_hf.evaluation.report import SmallSampleScorer

    measure = SmallSampleScorer(config)
    if config.evaluation.score_metric in SAMPLE_METRICS:
        measure.open_network(images.image_shape, 0 if isinstance(images, ImageStream) else len(images), device)

    def score(pipeline: GaussianDiffusionPipeline, training: ImageSet | ImageStream, validation: ImageSet) -> Score:
        found = measure(pipeline, training, validation)
        return Score(found.value, found.kind, found.lower_is_better, found.row())

    return score


def class_names_of(images: ImageSet | ImageStream, config: RunConfig) -> dict[str, str] | None:
    """Return class index -> name, as a pipeline stores them; None for an unconditional network."""
    if not config.model.class_conditional or not images.class_names:
        return None
    return {str(number): name for number, name in enumerate(images.class_names)}


def build_scheduler(diffusion: DiffusionConfig) -> GaussianDiffusionScheduler:
    """Build the forward process of the run.

    Raises:
        ConfigError: The settings are invalid, or x_0 cannot be recovered at the last timestep.
    """
    try:
        scheduler: GaussianDiffusionScheduler = GaussianDiffusionScheduler.create(**diffusion.scheduler_options())
    except ValueError as error:
        raise ConfigError(f"diffusion: {error}") from error
    has_no_signal = scheduler.noise_schedule.alphas_cumprod[-1] < SMALLEST_ALPHA_BAR
    if scheduler.config.prediction_type == "epsilon" and has_no_signal:
        cause, other_fix = f"diffusion.beta_schedule {diffusion.beta_schedule}", ""
        if diffusion.rescale_betas_zero_snr:
            cause = "diffusion.rescale_betas_zero_snr"
        elif diffusion.beta_schedule in BETA_RANGES:
            other_fix = ", diffusion.scale_betas_to_timesteps to true for a long chain, or diffusion.beta_end lower"
        raise ConfigError(
            f"{cause} leaves no signal at the last of {diffusion.num_train_timesteps} timesteps, where x_0 cannot be "
            "recovered from diffusion.prediction_type epsilon; set diffusion.prediction_type to v_prediction or sample"
            f"{other_fix}."
        )
    return scheduler


def build_loss(
    config: RunConfig,
    scheduler: GaussianDiffusionScheduler,
    null_label: int | None,
    image_shape: tuple[int, int, int],
    class_names: dict[str, str] | None,
    accelerator: Accelerator,
    pipeline_settings: Mapping[str, Any],
) -> DenoisingLoss:
    """Collective: build the objective, for a student with its teacher.

    Raises:
        ValueError: The teacher cannot be loaded or does not fit the run.
    """
    if config.distillation.teacher is None:
        return DenoisingLoss(scheduler, config.objective, null_label)
    teacher = load_teacher(
        config, scheduler, image_shape[0], len(class_names or ()), accelerator.device, accelerator.autocast,
        pipeline_settings,
    )  # fmt: skip
    num_steps = config.distillation.num_inference_steps
    return DistillationLoss(scheduler, config.objective, null_label, teacher=teacher, num_inference_steps=num_steps)


def build_network(
    config: RunConfig,
    image_shape: tuple[int, int, int],
    class_names: dict[str, str] | None,
    scheduler: GaussianDiffusionScheduler,
    checkpoints: Path,
    device: torch.device,
    value_range: list[float] | None = None,
    latents: LatentStatistics | None = None,
) -> UNet2DModel:
    """Collective: build the network of a run; rank 0 alone reads files and the Hub.

    If the run has a checkpoint, its configuration is used: model.config_file and model.from_pretrained are not read
    again. The weights of the checkpoint are loaded later.

    Args:
        config: Origin of the network, and whether there is a null label.
        image_shape: (channels, height, width).
        class_names: The classes of a class-conditional network.
        scheduler: The forward process of the run.
        checkpoints: The folder of the run's checkpoints.
        device: Device of the network.
        value_range: The values of the data that become -1 and 1; None for pictures.
        latents: The normalization of the latents of the run; None for that of the VAE, or for images.

    Returns:
        The network in training mode, float32.

    Raises:
        ValueError: The network cannot be loaded or does not fit the run.
    """
    model, has_null_label = config.model, config.objective.class_dropout > 0
    build = partial(
        build_unet,
        model,
        image_shape,
        len(class_names) + has_null_label if class_names else None,
        self_conditioned=config.objective.self_conditioning > 0,
        learned_variance=config.diffusion.learns_variance,
        num_train_timesteps=len(scheduler),
    )
    if model.config_file is None and model.from_pretrained is None:
        return build().to(device)

    def read() -> tuple[dict[str, Any], Pretrained | None]:
        latest, _ = find_latest(checkpoints)
        if latest is not None:
            return json.loads((latest.path / UNET_CONFIG).read_text(encoding="utf-8")), None
        if model.config_file is not None:
            return read_config_file(model), None
        pretrained = load_pretrained(model)
        if config.distillation.teacher is not None:
            pretrained = as_student(pretrained, scheduler.config["prediction_type"], has_null_label)
        # Names with an underscore are notes of diffusers, among them the path.
        return {name: value for name, value in pretrained.unet.config.items() if not name.startswith("_")}, pretrained

    found = distributed.on_rank_0(read)
    file_config, pretrained = found if found is not None else (None, None)
    unet = build(distributed.broadcast_json(file_config))

    def copy_weights() -> None:
        if pretrained is not None:
            take_weights(unet, pretrained, scheduler, class_names, has_null_label, value_range, latents)

    distributed.on_rank_0(copy_weights)
    unet.to(device)
    distributed.broadcast_tensors(unet.parameters())
    return unet


def copy_network(unet: UNet2DModel, weights: Sequence[torch.Tensor]) -> UNet2DModel:
    """Return a network for sampling with other weights, without what training has put around it.

    Args:
        unet: The network.
        weights: Tensors in the order of its parameters, which become those of the copy.
    """
    with torch.device("meta"):  # draws nothing from the global generators
        copied = UNet2DModel.from_config(unet.config)
    named = dict(zip(dict(unet.named_parameters()), weights, strict=True))
    buffers = {name: buffer.clone() for name, buffer in unet.named_buffers()}
    copied.load_state_dict(buffers | {name: named[name] for name in saved_parameters(unet)}, assign=True)
    return copied.eval()


# ------------------------------------------------------------------------------------------------------ validation

NUM_TIMESTEPS_PER_IMAGE = 4


def validation_timesteps(num_images: int, num_train_timesteps: int, seed: int) -> NDArray[np.int64]:
    """Return an even grid of timesteps over all images, which reduces the variance of the mean.

    Each image has one timestep in each quarter of [0, T), and within a quarter the timesteps of the images are evenly
    spaced.

    Returns:
        int64 (NUM_TIMESTEPS_PER_IMAGE, num_images) in [0, T); a function of the arguments only.
    """
    offset = (numpy_generator(seed, "validation_timesteps").permutation(num_images) + 0.5) / num_images
    quarter = np.arange(NUM_TIMESTEPS_PER_IMAGE)[:, None]
    return ((quarter + offset) / NUM_TIMESTEPS_PER_IMAGE * num_train_timesteps).astype(np.int64)


@torch.no_grad()
def validation_loss(
    unet: UNet2DModel,
    loss: DenoisingLoss,
    images: ImageSet | LatentSet,
    config: RunConfig,
    *,
    rank: int,
    num_processes: int,
    batch_size: int,
) -> float:
    """Collective: return the mean loss over the validation set, of which each rank computes a part.

    The noise is a function of the image, so the result depends on the number of processes and the batch size only
    through the order of float32 additions in the network; the mean is taken in float64. Images are center-cropped and
    not flipped, and no label is dropped. The mode of the network is restored, and torch's global generators are not
    used.

    Args:
        unet: The network with the weights to validate.
        loss: The objective of the run.
        images: The validation set, or its latents, which are drawn by fixed noise.
        config: The configuration of the run.
        rank: Index of this process.
        num_processes: Number of processes.
        batch_size: Pairs of an image and a timestep of one forward pass.
    """
    seed, with_labels = config.training.seed, config.model.class_conditional
    trained = np.array(trained_timesteps(config))
    timesteps = trained[validation_timesteps(len(images), len(trained), seed)]
    first, stop = (len(images) * (rank + side) // num_processes for side in (0, 1))
    num_pairs = (stop - first) * NUM_TIMESTEPS_PER_IMAGE
    losses: list[torch.Tensor] = []
    was_training = unet.training
    unet.eval()
    try:
        for start in range(0, num_pairs, batch_size):
            draws, positions = np.divmod(np.arange(start, min(start + batch_size, num_pairs)), stop - first)
            positions += first
            if isinstance(images, LatentSet):
                x_0, labels = images.validation_samples(positions, seed, unet.device)
            else:
                pixels, labels = images.take(positions)
                x_0 = normalize(to_device(pixels, unet.device), value_range=images.value_range)
            class_labels = to_device(labels, unet.device) if with_labels and labels is not None else None
            noise = normal_by_pair(seed, "validation_noise", draws, positions, x_0.shape[1:], unet.device)
            losses.append(loss(unet, x_0, noise, to_device(timesteps[draws, positions], unet.device), class_labels))
    finally:
        unet.train(was_training)
    total = float(torch.cat(losses).cpu().double().sum()) if losses else 0.0
    return distributed.reduce(total, "sum") / timesteps.size


def best_of(score: Score, step: int, best: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return step, kind and value of a score that is better than the best so far, otherwise None.

    A best score of another kind, as after a changed setting, is not compared.
    """
    if not math.isfinite(score.value):
        return None
    if best is not None and best["kind"] == score.kind:
        is_better = score.value < best["value"] if score.lower_is_better else score.value > best["value"]
        if not is_better:
            return None
    return {"step": step, "kind": score.kind, "value": score.value}


# -------------------------------------------------------------------------------------------------------- previews

# The same images in the same batch give the same bits on any number of processes.
BLOCK_SIZE = 8


def save_preview(
    path: Path,
    unet: UNet2DModel,
    scheduler: GaussianDiffusionScheduler,
    config: PreviewConfig,
    seed: int,
    **settings: Any,
) -> bool:
    """Collective: sample one grid of images, a part on each rank, and write it as PNG on rank 0.

    Seeds and labels are always the same, so that differences show progress. If memory or disk are full, a warning is
    printed and training continues. The mode of the network is restored, and torch's global generators are not used.

    Args:
        path: The PNG file; its folder is created.
        unet: The network, with the same weights on all ranks.
        scheduler: The scheduler of the run; its timesteps are not changed.
        config: Number of images and sampling settings.
        seed: Seed of the run; image i is sampled from (seed, i).
        **settings: Settings of `GaussianDiffusionPipeline`; the images cycle through its classes.

    Returns:
        Whether this rank has written the file.
    """
    sampler = GaussianDiffusionScheduler.from_config(scheduler.config)
    pipeline = GaussianDiffusionPipeline(unet, sampler, **settings)
    images = _sample_preview(pipeline, config, seed)
    if distributed.rank() != 0:
        return False
    if images is None:
        logger.warning("No memory for the preview; training continues. Lower preview.num_images.")
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        num_classes = len(settings.get("class_names") or ())
        num_columns = num_classes if num_classes <= config.num_images else 0
        images = as_drawn(images, settings.get("value_range"))
        image_grid(images, num_columns or round(config.num_images**0.5)).save(path)
        return True
    except OSError as error:
        logger.warning("The preview could not be written (%s); training continues.", error.strerror or error)
    return False


def preview_sampler(pipeline: GaussianDiffusionPipeline, config: PreviewConfig) -> Sampler:
    """Return the sampler of the previews of a run.

    Raises:
        ConfigError: preview.scheduler is unknown, or cannot sample from this network.
    """
    scheduler, eta = config.scheduler, config.eta
    if scheduler is not None:
        scheduler, eta = scheduler_and_eta("preview.scheduler", scheduler, eta)
    num_steps = config.num_inference_steps
    settings = default_sampling(pipeline, scheduler=scheduler, num_inference_steps=num_steps, eta=eta)
    interval = tuple(config.guidance_interval)
    sampler = Sampler(**settings, guidance_scale=config.guidance_scale, guidance_interval=interval)
    try:
        sampler.check(sampler.prepare(pipeline))
    except ValueError as error:
        raise ConfigError(f"the preview cannot be sampled: {error}") from None
    return sampler


def _sample_preview(pipeline: GaussianDiffusionPipeline, config: PreviewConfig, seed: int) -> NDArray[np.uint8] | None:
    """Collective: return uint8 images (number, height, width, channels), or None if memory is full on a rank."""
    sampler = preview_sampler(pipeline, config)
    pipeline = sampler.prepare(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    unet = pipeline.unet
    channels, height, width = pipeline.image_shape
    images = np.zeros((config.num_images, height, width, channels), np.uint8)
    was_training = unet.training
    unet.eval()
    try:
        for block in preview_blocks(config.num_images, distributed.rank(), distributed.world_size()):
            indices = range(block.start, block.stop)
            generators = sampling_generators(seed, "preview", indices, unet.device)
            call = sampler.call(pipeline, seed, indices) | {"generator": generators}
            images[block] = pipeline(batch_size=len(indices), **call).images
        has_memory = True
    except torch.OutOfMemoryError:
        has_memory = False
    finally:
        unet.train(was_training)
    if not distributed.reduce(has_memory, "min"):
        return None
    distributed.sum_arrays(images)
    return images


def preview_blocks(num_images: int, rank: int, num_processes: int) -> list[slice]:
    """Return the blocks of images that a rank samples; a block is the same on any number of ranks."""
    starts = range(0, num_images, BLOCK_SIZE)
    return [slice(start, min(start + BLOCK_SIZE, num_images)) for start in starts[rank::num_processes]]


# --------------------------------------------------------------------------------------------------------- summary


def describe(trainer: Trainer) -> str:
    """Return a few lines about what is trained, how, what it writes, and settings that may be mistakes."""
    config, training, num_processes = trainer.config, trainer.config.training, trainer.accelerator.num_processes
    batch = training.train_batch_size
    steps = f"{training.num_steps:,} steps of {batch:,} images"
    if not isinstance(trainer.images, ImageStream):
        steps += f", {training.num_steps * batch / len(trainer.images):,.1f} epochs"
    num_parameters = sum(parameter.numel() for parameter in saved_parameters(trainer.unet).values())
    if training.micro_batch_size == "auto":
        micro = f"auto (at most {trainer.micro_batch_size})"
    else:
        micro = f"{trainer.micro_batch_size} x {batch // (trainer.micro_batch_size * num_processes)} accumulated"
        micro += _origin(trainer, "training.micro_batch_size")
    engine = "" if str(trainer.engine) == "eager" else f", {trainer.engine}{_origin(trainer, 'training.compile')}"
    precision = f"{training.mixed_precision}{_origin(trainer, 'training.mixed_precision')}"
    is_fp32_by_default = trainer.origins.get("training.mixed_precision") == DEFAULT
    supports_bf16 = trainer.device.type == "cuda" and torch.cuda.is_bf16_supported()
    checkpointer = trainer.checkpointer
    written = (
        f"{format_bytes(checkpointer.checkpoint_bytes)} a checkpoint, {training.num_checkpoints_kept} are kept in "
    )
    if num_snapshots := checkpointer.num_ema_snapshots():
        total = format_bytes(num_snapshots * checkpointer.ema_snapshot_bytes)
        written = f"{total} of EMA snapshots in {num_snapshots} parts (posthoc_ema); {written}"
    return "\n".join(
        [
            f"{num_parameters:,} parameters, {describe_sets(trainer.images, trainer.validation_images)}",
            *([] if trainer.autoencoder is None else [_describe_latents(trainer)]),
            steps,
            f"{trainer.device.type} x {num_processes}, {precision}{engine}, batch {batch} = {num_processes} x {micro}",
            f"{written}{trainer.folder.path}",
            *(f"warning: {sentence}" for sentence in overlooked_settings(config, trainer.sample_shape)),
            *(["warning: " + _BF16_ADVICE] if is_fp32_by_default and supports_bf16 else []),
        ]
    )


def _describe_latents(trainer: Trainer) -> str:
    facts = trainer.latents_summary()
    assert facts is not None
    return f"latents of {'x'.join(map(str, facts['shape']))}, {facts['vae_class']} {facts['vae']}"


_BF16_ADVICE = (
    "training.mixed_precision is left open, so the network runs in fp32; consider bf16, which this GPU supports."
)


def _origin(trainer: Trainer, name: str) -> str:
    """Return where the value of a setting came from, in parentheses, unless it is the configuration or the default."""
    origin = trainer.origins.get(name, DEFAULT)
    return "" if origin == DEFAULT else f" ({origin})"


def overlooked_settings(config: RunConfig, image_shape: tuple[int, int, int]) -> Iterator[str]:
    """Yield a sentence for each setting that works, but is more likely a default that was overlooked."""
    training, model = config.training, config.model
    num_steps, num_warmup = training.num_steps, training.learning_rate_warmup_steps
    if num_warmup > num_steps:
        reached = learning_rate_at(num_steps - 1, training) / training.learning_rate
        yield (
            f"training.learning_rate_warmup_steps {num_warmup:,} is more than training.num_steps {num_steps:,}: the "
            f"run ends at {reached:.0%} of training.learning_rate; lower it unless the run is to be continued."
        )
    diffusion, (height, width) = config.diffusion, image_shape[1:]
    amplitude = build_scheduler(diffusion).noise_schedule.sqrt_alphas_cumprod[-1].item()
    if diffusion.beta_schedule in BETA_RANGES and amplitude > LARGEST_TERMINAL_AMPLITUDE:
        is_scalable = diffusion.num_train_timesteps < 1000 and not diffusion.scale_betas_to_timesteps
        yield (
            f"diffusion.beta_schedule {diffusion.beta_schedule} leaves {amplitude:.0%} of the amplitude of an image at "
            f"the last of {diffusion.num_train_timesteps} timesteps, but sampling begins with noise alone; "
            f"{'set diffusion.scale_betas_to_timesteps to true' if is_scalable else 'raise diffusion.beta_end'}."
        )
    if min(height, width) > LARGEST_UNSHIFTED_RESOLUTION and diffusion.schedule_shift == 1:
        yield (
            f"diffusion.schedule_shift is 1, which leaves the coarse structure of images of {height}x{width} visible "
            f"in the noise; consider resolution / 64, {min(height, width) / 64:g}."
        )
    is_preset = not (model.config_file or model.from_pretrained or "block_out_channels" in model.overrides)
    if is_preset and model.preset is not None:
        sizes = {name: int(name.rpartition("_")[2]) for name in PRESETS}
        octaves = {name: abs(math.log2(size / max(height, width))) for name, size in sizes.items()}
        family = model.preset.partition("_")[0]
        nearest = min(PRESETS, key=lambda name: (octaves[name], not name.startswith(family)))
        if octaves[model.preset] >= 1 and octaves[nearest] < octaves[model.preset]:
            yield (
                f"model.preset {model.preset} is made for images of another size than {height}x{width}; consider "
                f"{nearest}."
            )
