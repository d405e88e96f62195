"""The training loop: build, train, log, validate, preview, save, resume. Contains no diffusion math; see loss.py.

From the configuration to what is trained: the images of both splits, the samples, and the forward process.

The network of a run, the same on every rank: from a preset, a file, a pretrained folder or the run's checkpoint.

What is due after which step, beside the update itself.

The loss on held-out images, always at the same timesteps and noise, so that any two measurements can be compared.

Sample grids during training, always of the same seeds and labels, so that progress is seen and not luck.

The images are sampled in blocks, each on one process and always of the same images, so the picture is the same bit by
bit however many processes share them.

The score that decides which checkpoint is the best one; how it is measured is no matter of the trainer's.

The loop: build, train_step, log, validate, preview, save, resume. It knows no mathematics; the objective does.

One step is one optimiser update on the global batch. Sample n of the run, its timestep, noise, flip and label drop are
functions of (seed, step, position in the global batch), so the loss curve is the same however the batch is split over
processes and micro batches, and nothing random has to be stored; of a stream of images, its place is.

What a run is about to do, in a few lines for a person.
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from numpy.typing import NDArray

from ddpm_hf import distributed
from ddpm_hf.config import ConfigError, DiffusionConfig, ModelConfig, PreviewConfig, RunConfig, refuse_secrets
from ddpm_hf.data import ImageLoader, ImageSet, ImageStream, describe_sets, locations_of, normalize, open_sets
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.diffusion.images import image_size
from ddpm_hf.diffusion.schedule import BETA_RANGES, SMALLEST_ALPHA_BAR
from ddpm_hf.distributed import StopWatcher, TrainingStopped
from ddpm_hf.models import PRESETS, Pretrained, build_unet, load_pretrained, read_config_file, take_weights
from ddpm_hf.plots import image_grid
from ddpm_hf.rng import normal_by_position, numpy_generator, sampling_generators, seed_global_generators
from ddpm_hf.training import checkpoint, ema, posthoc_ema
from ddpm_hf.training.batches import BatchSource, build_timestep_sampler, largest_micro_batch_size, settle, step_on_gpu
from ddpm_hf.training.checkpoint import Publisher, Saver, TrainerState, find_latest
from ddpm_hf.training.ema import EMA, decay_laws
from ddpm_hf.training.logging import MetricsLog, Progress, Trackers, say
from ddpm_hf.training.loss import DenoisingLoss
from ddpm_hf.training.meter import Meter, finite_or_none
from ddpm_hf.training.optim import NonFiniteGuard, build_optimizer, learning_rate_at, may_step
from ddpm_hf.training.run_dir import RunFolder


def open_splits(config: RunConfig, accelerator: Accelerator) -> tuple[ImageSet | ImageStream, ImageSet]:
    """Collective: open the data. Rank 0 searches and decodes them; the other ranks map what it found.

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
        )

    opened = distributed.on_rank_0(open_both)
    locations = distributed.broadcast_json(opened and locations_of(*opened))
    return distributed.on_every_rank(lambda: opened or open_both(locations))


def build_feed(config: RunConfig, images: ImageSet | ImageStream, device: torch.device) -> ImageLoader | ImageStream:
    """Collective: makes what gives the samples of the run; images that stay on the device go there now.

    Raises:
        ValueError: If the images are to be kept on a device that has no room for them.
    """
    if isinstance(images, ImageStream):
        return images
    return distributed.on_every_rank(lambda: ImageLoader(images, config.data, config.training.seed, device))


def class_names_of(images: ImageSet | ImageStream, config: RunConfig) -> dict[str, str] | None:
    """Returns class number to name, as a pipeline stores them; None for an unconditional network."""
    if not config.model.class_conditional or not images.class_names:
        return None
    return {str(number): name for number, name in enumerate(images.class_names)}


def build_scheduler(diffusion: DiffusionConfig) -> GaussianDiffusionScheduler:
    """Builds the forward process of the run.

    Raises:
        ConfigError: If there is no such process, or the network would be asked what its last timestep cannot tell.
    """
    try:
        scheduler: GaussianDiffusionScheduler = GaussianDiffusionScheduler.create(**dataclasses.asdict(diffusion))
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


def make_network(
    config: RunConfig,
    image_shape: tuple[int, int, int],
    class_names: dict[str, str] | None,
    scheduler: GaussianDiffusionScheduler,
    checkpoints: Path,
    device: torch.device,
) -> UNet2DModel:
    """Collective: builds the network of a run; rank 0 alone reads files and the Hub.

    Where the run has a checkpoint, that decides the network: neither model.config_file nor model.from_pretrained is
    looked at again, and the weights are still to be taken from the checkpoint.

    Args:
        config: Where the network comes from, and whether one label more means "no class".
        image_shape: Channels, height and width of the images.
        class_names: The classes of a class-conditional network.
        scheduler: The forward process of the run.
        checkpoints: The folder of the run's checkpoints.
        device: Where the network is wanted.

    Returns:
        The network in training mode, float32.

    Raises:
        ValueError: If the network cannot be had or does not fit the run.
    """
    model, has_null_label = config.model, config.objective.class_dropout > 0
    num_class_embeds = len(class_names) + has_null_label if class_names else None
    build = partial(
        build_unet,
        model,
        image_shape,
        num_class_embeds,
        self_conditioned=config.objective.self_conditioning > 0,
        learned_variance=config.diffusion.learns_variance,
    )
    if model.config_file is None and model.from_pretrained is None:
        return build().to(device)
    found = distributed.on_rank_0(lambda: _read(model, checkpoints))
    file_config, pretrained = found if found is not None else (None, None)
    unet = build(distributed.broadcast_json(file_config))

    def take() -> None:
        if pretrained is not None:
            take_weights(unet, pretrained, scheduler, class_names, has_null_label)

    distributed.on_rank_0(take)
    unet.to(device)
    distributed.broadcast_tensors(unet.parameters())
    return unet


def _read(model: ModelConfig, checkpoints: Path) -> tuple[dict[str, Any], Pretrained | None]:
    """Returns the network's configuration and, for a run that begins with one, the network to go on from."""
    latest, _ = find_latest(checkpoints)
    if latest is not None:
        return json.loads((latest.path / "unet" / "config.json").read_text(encoding="utf-8")), None
    if model.config_file is not None:
        return read_config_file(model), None
    pretrained = load_pretrained(model)
    # Names with an underscore are notes of diffusers, among them the path.
    return {name: value for name, value in pretrained.unet.config.items() if not name.startswith("_")}, pretrained


def due_after(step: int, config: RunConfig) -> set[str]:
    """Returns what is due after `step` optimiser updates: any of log, validate, score, preview, store, save, publish.

    The last step is measured and saved whatever its number; the finished pipeline is not published from here.
    """
    training, is_last = config.training, step == config.training.num_steps
    with_the_last = {
        "log": training.log_every_steps,
        "validate": training.validate_every_steps,
        "score": config.evaluation.score_every_steps,
        "save": training.checkpoint_every_steps,
    }
    due = {name for name, every_steps in with_the_last.items() if every_steps and (step % every_steps == 0 or is_last)}
    if config.preview.every_steps and step % config.preview.every_steps == 0:
        due.add("preview")
    if ema.is_due(step, training):
        due.add("store")
    if config.hub.push_every_steps and step % config.hub.push_every_steps == 0 and not is_last:
        due.add("publish")
    return due


NUM_TIMESTEPS_PER_IMAGE = 4


def validation_timesteps(num_images: int, num_train_timesteps: int, seed: int) -> NDArray[np.int64]:
    """Spreads the timesteps of all images evenly over the chain, which a mean over few images needs.

    Each image has one timestep in each quarter of the chain, and within a quarter those of the images are an even grid.

    Returns:
        int64 (NUM_TIMESTEPS_PER_IMAGE, num_images) in [0, T); a function of the arguments alone.
    """
    place = (numpy_generator(seed, "validation_timesteps").permutation(num_images) + 0.5) / num_images
    quarter = np.arange(NUM_TIMESTEPS_PER_IMAGE)[:, None]
    return ((quarter + place) / NUM_TIMESTEPS_PER_IMAGE * num_train_timesteps).astype(np.int64)


@torch.no_grad()
def validation_loss(
    unet: UNet2DModel,
    loss: DenoisingLoss,
    images: ImageSet,
    config: RunConfig,
    *,
    rank: int,
    num_processes: int,
    batch_size: int,
) -> float:
    """Collective: returns the mean loss over the held-out images, each rank computing its part of them.

    The noise belongs to the image, so neither the number of processes nor the batch size enters, except for the order
    of float32 additions in the network; the mean is taken in float64. Images are cropped in the centre, never
    mirrored. The network's mode is put back, and nothing is drawn from torch's global generators.

    Args:
        unet: The network with the weights to judge.
        loss: The objective of the run.
        images: The held-out images.
        config: The configuration of the run. No label is dropped here.
        rank: Which process this is.
        num_processes: How many share the images.
        batch_size: Images of one forward.
    """
    seed, with_labels = config.training.seed, config.model.class_conditional
    timesteps = validation_timesteps(len(images), config.diffusion.num_train_timesteps, seed)
    first, stop = (len(images) * (rank + side) // num_processes for side in (0, 1))
    total = 0.0
    was_training = unet.training
    unet.eval()
    try:
        for start in range(first, stop, batch_size):
            positions = range(start, min(start + batch_size, stop))
            pixels, labels = images.take(np.asarray(positions))
            x_0 = normalize(torch.from_numpy(pixels).to(unet.device))
            class_labels = torch.from_numpy(labels).to(unet.device) if with_labels and labels is not None else None
            for draw, drawn in enumerate(torch.from_numpy(timesteps[:, positions.start : positions.stop])):
                noise = normal_by_position(seed, "validation_noise", draw, positions, x_0.shape[1:], unet.device)
                losses = loss(unet, x_0, noise, drawn.to(unet.device), class_labels)
                total += float(losses.cpu().to(torch.float64).sum())
    finally:
        unet.train(was_training)
    return distributed.reduce(total, "sum") / timesteps.size


logger = logging.getLogger(__name__)

# Two forwards of the same images agree to the bit only if they are of one size.
BLOCK_SIZE = 8


def save_preview(
    path: Path,
    unet: UNet2DModel,
    scheduler: GaussianDiffusionScheduler,
    config: PreviewConfig,
    seed: int,
    class_names: dict[str, str] | None,
    has_null_label: bool,
    self_conditioned: bool = False,
) -> bool:
    """Collective: samples one grid, each rank its part, and writes it as PNG on rank 0.

    Where memory or the disk is full, it is a warning and training goes on. The network's mode is put back, and torch's
    global generators stay untouched.

    Args:
        path: The PNG file; its folder is made.
        unet: The network with the weights to look at, the same on all ranks.
        scheduler: The scheduler of the run; its timesteps are left as they are.
        config: How many images and how to sample them.
        seed: Seed of the run; image i is drawn from (seed, i).
        class_names: Class number to name of a class-conditional network, in turn over the images; None without classes.
        has_null_label: Whether the network was trained with label dropout.
        self_conditioned: Whether the network takes its last prediction of x_0.

    Returns:
        Whether this rank has written the file.
    """
    sampler = GaussianDiffusionScheduler.from_config(scheduler.config)
    pipeline = GaussianDiffusionPipeline(
        unet, sampler, class_names=class_names, has_null_label=has_null_label, self_conditioned=self_conditioned
    )
    pipeline.set_progress_bar_config(disable=True)
    images = _sample(pipeline, config, seed, preview_labels(config.num_images, class_names))
    if distributed.rank() != 0:
        return False
    if images is None:
        logger.warning("No memory for the preview; training goes on. Lower preview.num_images.")
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        num_columns = len(class_names) if class_names and len(class_names) <= config.num_images else None
        image_grid(images, num_columns or round(config.num_images**0.5)).save(path)
        return True
    except OSError as error:
        logger.warning("The preview could not be written (%s); training goes on.", error.strerror or error)
    return False


def _sample(
    pipeline: GaussianDiffusionPipeline, config: PreviewConfig, seed: int, labels: torch.Tensor | None
) -> NDArray[np.uint8] | None:
    """Collective: returns the images of the grid, uint8 (number, height, width, channels); None without memory."""
    unet = pipeline.unet
    images = np.zeros((config.num_images, *image_size(unet), pipeline.num_channels), np.uint8)
    was_training = unet.training
    unet.eval()
    try:
        for block in blocks_of_rank(config.num_images, distributed.rank(), distributed.world_size()):
            images[block] = pipeline(
                batch_size=block.stop - block.start,
                num_inference_steps=config.num_inference_steps,
                eta=config.eta,
                guidance_scale=config.guidance_scale,
                class_labels=None if labels is None else labels[block],
                generator=sampling_generators(seed, "preview", range(block.start, block.stop), unet.device),
                output_type="uint8",
            ).images
        has_memory = True
    except torch.OutOfMemoryError:
        has_memory = False
    finally:
        unet.train(was_training)
    if not distributed.reduce(has_memory, "min"):
        return None
    distributed.sum_arrays(images)
    return images


def blocks_of_rank(num_images: int, rank: int, num_processes: int) -> list[slice]:
    """Returns the blocks of images that a rank samples; what is in a block does not depend on the number of ranks."""
    starts = range(0, num_images, BLOCK_SIZE)
    return [slice(start, min(start + BLOCK_SIZE, num_images)) for start in starts[rank::num_processes]]


def preview_labels(num_images: int, class_names: dict[str, str] | None) -> torch.Tensor | None:
    """Returns labels that go through the classes in turn, or None without classes."""
    return None if class_names is None else torch.arange(num_images) % len(class_names)


class Score(Protocol):
    """A number, the same on all ranks."""

    @property
    def kind(self) -> str:
        """What was measured and how; only scores of one kind can be compared."""

    @property
    def value(self) -> float:
        """The number."""

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower number is the better one."""

    def row(self) -> dict[str, Any]:
        """Returns what metrics.jsonl says of it."""


Scorer = Callable[[GaussianDiffusionPipeline, ImageSet | ImageStream, ImageSet], Score]
"""Collective: scores a pipeline by the training images or the held-out ones."""


def best_of(score: Score, step: int, best: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns what a checkpoint notes of a score that beats the best one so far; None for one that does not.

    A best one of another kind, as after a changed setting, is no rival.
    """
    if not math.isfinite(score.value):
        return None
    if best is not None and best["kind"] == score.kind:
        is_better = score.value < best["value"] if score.lower_is_better else score.value > best["value"]
        if not is_better:
            return None
    return {"step": step, "kind": score.kind, "value": score.value}


class Trainer:
    """One training run on one process of possibly many. Collective: build and use it on every rank.

    Args:
        config: The checked configuration.
        scorer: Measures evaluation.score_metric; needed with evaluation.score_every_steps.
        publisher: Publishes the averaged weights while training lasts; needed with hub.push_every_steps.

    Raises:
        ValueError: With a sentence, if the data, the network, the machine or the run folder do not fit the
            configuration.
    """

    def __init__(self, config: RunConfig, scorer: Scorer | None = None, publisher: Publisher | None = None) -> None:
        refuse_secrets(config)
        for name, every_steps, argument, given in (
            ("evaluation.score_every_steps", config.evaluation.score_every_steps, "scorer", scorer),
            ("hub.push_every_steps", config.hub.push_every_steps, "publisher", publisher),
        ):
            if every_steps and given is None:
                raise ConfigError(
                    f"{name} {every_steps} needs Trainer(config, {argument}=...) to be given what does it, as "
                    "`ddpm-hf train` does; set it to 0, or give one."
                )
        self._scorer, self._publisher = scorer, publisher
        self.config = config
        training = config.training
        self.accelerator = distributed.start(
            mixed_precision=training.mixed_precision,
            cpu=training.cpu,
            tf32=training.tf32,
            deterministic=training.deterministic,
        )
        self.device = self.accelerator.device
        self.micro_batch_size = largest_micro_batch_size(config.training, self.accelerator.num_processes)
        self.folder = RunFolder(Path(config.training.output_dir).expanduser())
        distributed.on_rank_0(lambda: self.folder.check(config.training.resume))
        try:
            self._build()
        except BaseException:
            self.folder.release()
            raise

    def _build(self) -> None:
        """Collective: makes everything that the loop works with."""
        config, training = self.config, self.config.training
        self.scheduler = build_scheduler(config.diffusion)  # before the data, which may take hours to decode
        self.trackers = Trackers(config.tracking, self.folder.path)
        distributed.on_rank_0(self.trackers.check)
        self.images, self.held_out = open_splits(config, self.accelerator)
        self.feed = build_feed(config, self.images, self.device)
        self.class_names = class_names_of(self.images, config)
        self.has_null_label = config.objective.class_dropout > 0
        num_classes = len(self.class_names) if self.class_names else None
        # Whatever in its weights is random comes from the seed of the run alone.
        seed_global_generators(training.seed, "initialization")
        self.unet = make_network(
            config, self.images.image_shape, self.class_names, self.scheduler, self.folder.checkpoints, self.device
        )
        self.pipeline_settings: dict[str, Any] = {
            "class_names": self.class_names,
            "has_null_label": self.has_null_label,
            "self_conditioned": config.objective.self_conditioning > 0,
        }
        self.ema = EMA(self.unet, decay_laws(training))
        self.optimizer = build_optimizer(self.unet.parameters(), training)
        self.loss = DenoisingLoss(self.scheduler, config.objective, num_classes if self.has_null_label else None)
        self.state = TrainerState()
        self.guard = NonFiniteGuard(training.max_consecutive_nonfinite)
        self.timestep_sampler = build_timestep_sampler(config)
        self.meter = Meter(self.accelerator, training.train_batch_size, config.diffusion.num_train_timesteps)
        self.metrics = MetricsLog(self.folder.path / "metrics.jsonl")
        self.saver = Saver(
            config,
            self.folder,
            self.metrics,
            images=self.images,
            unet=self.unet,
            ema=self.ema,
            optimizer=self.optimizer,
            timestep_sampler=self.timestep_sampler,
        )

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and speaks."""
        return bool(self.accelerator.is_main_process)

    def leave_the_others(self) -> None:
        """Collective: waits for the other processes, rank 0's report included, and parts from them."""
        distributed.barrier()
        self.accelerator.end_training()

    def fit(self) -> None:
        """Collective: trains until `num_steps`, continuing from the newest valid checkpoint.

        Raises:
            TrainingStopped: After a signal, when the checkpoint is saved.
            NonFiniteTraining: If too many updates in a row were not finite.
            ProcessesDiffer: If the processes no longer have the same weights.
            ValueError: If the checkpoints in the run folder cannot be continued with this configuration.
        """
        self.saver.resume(self._take_up)
        self._prepare()
        first_step, num_steps = self.state.global_step, self.config.training.num_steps
        self._progress = Progress(first_step, num_steps, is_main_process=self.is_main_process)
        if first_step < num_steps:
            distributed.on_rank_0(lambda: self.trackers.start(first_step, self.config.to_dict()))
        with StopWatcher() as watcher, self._progress, self.trackers:
            started_at = time.monotonic()
            timed = self.metrics.last("seconds") or {}
            self.meter.start(first_step, timed.get("seconds", 0.0))
            while self.state.global_step < num_steps:
                self._train_step(self.state.global_step)
                self.state.global_step += 1
                self._progress.update()
                self._after_step()
                self._stop_if(watcher.exit_code_if_stopped())
            self._stop_if(watcher.agreed())  # a signal in the last step, which no further step asks about
        self._finish()
        if self.is_main_process:
            minutes, seconds = divmod(round(time.monotonic() - started_at), 60)
            say(f"Trained from step {first_step} to {num_steps} in {minutes}:{seconds:02}.")

    def _train_step(self, step: int) -> None:
        """Collective: one optimiser update on the global batch, gradients accumulated over micro batches."""
        step_losses = []
        for number, batch in enumerate(self._batches.micro_batches(step)):
            # Only dropout draws from the global generators.
            seed_global_generators(self.config.training.seed, "dropout", step, self.accelerator.process_index, number)
            with nullcontext() if batch.is_last else self.accelerator.no_sync(self._model):
                losses = self.loss(self._model, *batch.loss_arguments)
                weighted = losses if batch.importance is None else batch.importance * losses
                # The share of this micro batch in the mean over this rank's images. DDP takes the mean over ranks, so
                # the gradients add up to that of the mean over the global batch.
                self.accelerator.backward(weighted.sum() / len(self._batches))
            self.meter.losses.add(losses.detach(), batch.timesteps, batch.importance)
            step_losses.append(torch.stack([batch.timesteps, losses.detach()], dim=1))
        if self.timestep_sampler.learns:
            self.timestep_sampler.record(self.accelerator.gather(torch.cat(step_losses)))
        self._update(step)

    def _update(self, step: int) -> None:
        """Clips, updates the weights unless the gradient is not finite, and starts counting."""
        config = self.config.training
        max_norm = float("inf") if config.max_grad_norm is None else config.max_grad_norm
        self.grad_norm = self.accelerator.clip_grad_norm_(self.unet.parameters(), max_norm)
        is_nonfinite = ~torch.isfinite(self.grad_norm)
        self._settle_update()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        scaler = self.accelerator.scaler
        # The public get_scale would make the host wait for the device; the optimiser's step changes the scale.
        self.guard.record(is_nonfinite, None if scaler is None else scaler._get_scale_async())
        # The fp16 scaler looks for itself.
        if scaler is not None or may_step(self.optimizer, is_nonfinite):
            self._prepared_optimizer.step()
        self._prepared_optimizer.zero_grad(set_to_none=True)
        self.meter.losses.end_step(is_nonfinite)

    def _settle_update(self) -> None:
        """Lets the average follow the previous update, now that the host knows whether it was applied."""
        num_skipped = self.guard.num_skipped
        if self.guard.was_applied():
            self.ema.update(self.unet)
        elif self.guard.num_skipped > num_skipped and self.guard.num_consecutive == 1 and self.is_main_process:
            step = self.state.global_step
            images = self._batches.images_of(step - 1)
            logger.warning("The gradient of step %d was not finite, so its update was skipped.%s", step, images)

    def _after_step(self) -> None:
        """Collective: logs, validates, scores, draws and saves where that is due."""
        step, new_best = self.state.global_step, None
        due = due_after(step, self.config)
        if not due:
            return
        self._settle_update()
        if "log" in due:
            self._log()
        with self.meter.paused():
            if "validate" in due:
                with self._progress.doing("Validating"):
                    self._validate()
            if "score" in due:
                with self._progress.doing("Measuring the score"):
                    new_best = self._score()
            # Pictures and averages come before the checkpoint: a run that goes on from it does not do this step again.
            if "preview" in due:
                with self._progress.doing("Drawing a preview"):
                    self._preview()
            if "store" in due:
                snapshots = self.folder.ema_snapshots
                distributed.on_rank_0(lambda: posthoc_ema.store(snapshots, step, self.ema, self._pipeline()))
            if "save" in due or new_best:
                with self._progress.doing("Saving"):
                    self._save(must_succeed=step == self.config.training.num_steps, new_best=new_best)
            if "publish" in due:
                assert self._publisher is not None
                self.saver.publish(self._publisher, self._pipeline(), step)

    def _stop_if(self, exit_code: int) -> None:
        """Collective: after a signal, saves and ends training."""
        if exit_code:
            self._settle_update()
            self._save(must_succeed=True)
            self._progress.close()
            if self.is_main_process:
                say(f"Stopped by a signal at step {self.state.global_step}; the same command continues here.")
            raise TrainingStopped(exit_code)

    def _prepare(self) -> None:
        """Collective: settles how the batch is split, and wraps the network for the device and the other processes."""
        self.unet.train()
        attempt = step_on_gpu(self.unet, self.loss, self.images.image_shape, self.accelerator.autocast)
        stored = self.state.micro_batch_size
        self.micro_batch_size = settle(self.config.training, self.micro_batch_size, stored, attempt)
        self.state.micro_batch_size = self.micro_batch_size
        self._batches = BatchSource(
            self.config,
            self.feed,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            micro_batch_size=self.micro_batch_size,
            device=self.device,
            timestep_sampler=self.timestep_sampler,
        )
        self._model, self._prepared_optimizer = self.accelerator.prepare(self.unet, self.optimizer)
        if self.state.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.state.scaler)

    def _log(self) -> None:
        """Collective: writes one line of metrics: means since the line before."""
        step = self.state.global_step
        row = self.meter.take(step)
        row |= {
            "grad_norm": finite_or_none(float(self.grad_norm)),
            "learning_rate": learning_rate_at(step - 1, self.config.training),
            "num_skipped_updates": self.guard.num_skipped,
        }
        if self.accelerator.scaler is not None:
            row["num_scaler_skips"] = self.guard.num_scaler_skips
        self._write(row)
        self._progress.show(row, self.config.training.train_batch_size)

    def _write(self, row: dict[str, Any]) -> None:
        """Writes a line of metrics on rank 0."""
        if self.is_main_process:
            self.metrics.append(row)
            self.trackers.log(row)

    def _validate(self) -> None:
        """Collective: writes the loss of the averaged weights on the held-out images, as a line of its own."""
        with self.ema.swapped_in(self.unet):
            loss = validation_loss(
                self.unet,
                self.loss,
                self.held_out,
                self.config,
                rank=self.accelerator.process_index,
                num_processes=self.accelerator.num_processes,
                batch_size=self.micro_batch_size,
            )
        num_images = self.state.global_step * self.config.training.train_batch_size
        self._write({"step": self.state.global_step, "num_images": num_images, "validation_loss": finite_or_none(loss)})

    def _score(self) -> dict[str, Any] | None:
        """Collective: writes the score of the averaged weights, and returns what is noted of it if it is the best."""
        assert self._scorer is not None
        with self.ema.swapped_in(self.unet):
            score = self._scorer(self._pipeline(), self.images, self.held_out)
        num_images = self.state.global_step * self.config.training.train_batch_size
        self._write({"step": self.state.global_step, "num_images": num_images, **score.row()})
        return best_of(score, self.state.global_step, self.state.best)

    def _preview(self) -> None:
        """Collective: draws the preview grid with the averaged weights."""
        path = self.folder.previews / f"step_{self.state.global_step:08d}.png"
        seed, preview = self.config.training.seed, self.config.preview
        with self.ema.swapped_in(self.unet):
            is_drawn = save_preview(path, self.unet, self.scheduler, preview, seed, **self.pipeline_settings)
        if is_drawn:
            self.trackers.log_preview(self.state.global_step, path)

    def _save(self, *, must_succeed: bool, new_best: dict[str, Any] | None = None) -> None:
        """Collective: writes a checkpoint, perhaps the best; a full disk stops training only where all may be lost."""
        scaler = self.accelerator.scaler
        self.state.loss_sums = self.meter.gather()
        self.state.num_skipped = self.guard.num_skipped
        self.state.num_consecutive_skipped = self.guard.num_consecutive
        self.state.num_scaler_skips = self.guard.num_scaler_skips
        self.state.scaler = scaler.state_dict() if scaler is not None else None
        best_before = self.state.best
        self.state.best = new_best or best_before
        if not self.saver.save(self.state, must_succeed=must_succeed):
            self.state.best = best_before

    def _take_up(self, state: TrainerState) -> None:
        """Goes on from the counters that `_save` wrote."""
        self.state = state
        self.meter.restore(state.loss_sums)
        self.guard.num_skipped = state.num_skipped
        self.guard.num_consecutive = state.num_consecutive_skipped
        self.guard.num_scaler_skips = state.num_scaler_skips
        checkpoint.go_to(self.images, state, self.accelerator.process_index, self.accelerator.num_processes)

    def _finish(self) -> None:
        """Collective: writes the pipeline with the averaged weights."""
        self.saver.save_pipeline(self._pipeline(), self.state.global_step)

    def _pipeline(self) -> GaussianDiffusionPipeline:
        """Returns the pipeline around the network with the weights that it has."""
        return GaussianDiffusionPipeline(self.unet, self.scheduler, **self.pipeline_settings)


def describe(trainer: Trainer) -> str:
    """Says what is trained on what, where, in which steps, what it leaves on the disk, and what may be a mistake."""
    training, num_processes = trainer.config.training, trainer.accelerator.num_processes
    batch = training.train_batch_size
    steps = f"{training.num_steps:,} steps of {batch:,} images"
    if not isinstance(trainer.images, ImageStream):  # whose end nobody knows
        steps += f", {training.num_steps * batch / len(trainer.images):,.1f} epochs"
    num_parameters = sum(parameter.numel() for parameter in trainer.unet.parameters())
    if training.micro_batch_size == "auto":
        micro = f"auto (at most {trainer.micro_batch_size})"
    else:
        micro = f"{trainer.micro_batch_size} x {batch // (trainer.micro_batch_size * num_processes)} accumulated"
    kept = f"{_megabytes(trainer.saver.checkpoint_bytes)} a checkpoint, {training.num_checkpoints_kept} are kept in "
    if num_stored := trainer.saver.num_averages_stored():
        total = _megabytes(num_stored * trainer.saver.stored_average_bytes)
        kept = f"{total} of averages in {num_stored} parts (posthoc_ema); {kept}"
    return "\n".join(
        [
            f"{num_parameters:,} parameters, {describe_sets(trainer.images, trainer.held_out)}",
            steps,
            f"{trainer.device.type} x {num_processes}, {training.mixed_precision}, batch {batch} = {num_processes} x "
            f"{micro}",
            f"{kept}{trainer.folder.path}",
            *(f"warning: {sentence}" for sentence in warnings(trainer.config, trainer.images.image_shape)),
        ]
    )


def warnings(config: RunConfig, image_shape: tuple[int, int, int]) -> Iterator[str]:
    """Yields a sentence for each setting that can be meant, but is more likely a default that nobody thought of."""
    training = config.training
    num_steps, num_warmup = training.num_steps, training.learning_rate_warmup_steps
    if num_warmup > num_steps:
        reached = learning_rate_at(num_steps - 1, training) / training.learning_rate
        yield (
            f"training.learning_rate_warmup_steps {num_warmup:,} is more than training.num_steps {num_steps:,}: the "
            f"run ends at {reached:.0%} of training.learning_rate; lower it unless the run is to be continued."
        )
    nearest = nearest_preset(config.model, image_shape)
    if nearest is not None:
        _, height, width = image_shape
        yield (
            f"model.preset {config.model.preset} is made for images of another size than {height}x{width}; "
            f"{nearest} is nearer."
        )


def nearest_preset(model: ModelConfig, image_shape: tuple[int, int, int]) -> str | None:
    """Returns a preset made for images of about this size, where that of the run is off by a factor of two or more.

    Of presets for one size, it is that of the same source. None where the network is not a preset's, or none is nearer.
    """
    if model.config_file or model.from_pretrained or model.preset is None or "block_out_channels" in model.overrides:
        return None
    preset, side = model.preset, max(image_shape[1:])

    def octaves(name: str) -> float:
        return abs(math.log2(int(name.rpartition("_")[2]) / side))

    nearest = min(PRESETS, key=lambda name: (octaves(name), name.partition("_")[0] != preset.partition("_")[0]))
    return nearest if octaves(preset) >= 1 and octaves(nearest) < octaves(preset) else None


def _megabytes(num_bytes: int) -> str:
    """Says a size in megabytes."""
    return f"{num_bytes / 1e6:,.1f} MB"
