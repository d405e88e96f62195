"""The loop: build, train_step, log, preview, save, resume. It knows no mathematics; the objective does.

One step is one optimiser update on the global batch. Sample n of the run, its timestep, noise, flip and label drop are
functions of (seed, step, position in the global batch), so the loss curve is the same however the batch is split over
processes and micro batches, and nothing random has to be stored.
"""

import logging
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ddpm_hf.config import ConfigError, RunConfig
from ddpm_hf.data import describe_sets, open_sets
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.rng import seed_global_generators
from ddpm_hf.training import checkpoint, processes
from ddpm_hf.training.batches import BatchSource
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.guard import NonFiniteGuard, StopWatcher, TrainingStopped
from ddpm_hf.training.objective import DenoisingLoss
from ddpm_hf.training.optim import build_optimizer, learning_rate_at
from ddpm_hf.training.preview import save_preview
from ddpm_hf.training.resume import choose_checkpoint
from ddpm_hf.training.run_folder import RunFolder
from ddpm_hf.training.snapshot import TrainerState, load_optimizer, read_snapshot, write_snapshot
from ddpm_hf.training.tracking import MetricsLog, Progress, say
from ddpm_hf.unet import build_unet

logger = logging.getLogger(__name__)


class Trainer:
    """One training run on one process of possibly many. Collective: build and use it on every rank.

    Args:
        config: The checked configuration.

    Raises:
        ValueError: With a sentence, if the data, the network, the machine or the run folder do not fit the
            configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.accelerator = processes.start(config.training)
        self.device = self.accelerator.device
        self.micro_batch_size = processes.micro_batch_size(config.training, self.accelerator.num_processes)
        self.folder = RunFolder(Path(config.training.output_dir).expanduser())
        processes.on_rank_0(lambda: self.folder.check(config.training.resume))
        try:
            self._open_images()
            self._build()
        except BaseException:
            self.folder.release()
            raise
        self.state = TrainerState()
        self.guard = NonFiniteGuard(config.training.max_consecutive_nonfinite)
        self._batches = BatchSource(
            config,
            self.images,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            micro_batch_size=self.micro_batch_size,
            device=self.device,
        )
        self.metrics = MetricsLog(self.folder.path / "metrics.jsonl")
        self._loss_sum = torch.zeros(2, device=self.device)  # sum of this rank's mean losses, number of updates in it

    def _open_images(self) -> None:
        """Collective: opens the data; rank 0 decodes it, or says what is wrong with it, before the others look."""
        with_labels = self.config.model.class_conditional
        open_all = partial(
            open_sets,
            self.config.data,
            with_labels=with_labels,
            seed=self.config.training.seed,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            device=self.device,
        )
        processes.on_rank_0(open_all)
        self.images, self.held_out = processes.on_every_rank(open_all)
        names = self.images.class_names if with_labels else None
        self.class_names = {str(number): name for number, name in enumerate(names)} if names else None

    def _build(self) -> None:
        """Makes the scheduler, the network, its average, the optimiser and the objective."""
        config, diffusion = self.config, self.config.diffusion
        num_classes = len(self.class_names) if self.class_names else None
        self.has_null_label = config.objective.class_dropout > 0
        self.scheduler = GaussianDiffusionScheduler.create(
            num_train_timesteps=diffusion.num_train_timesteps,
            beta_schedule=diffusion.beta_schedule,
            beta_start=diffusion.beta_start,
            beta_end=diffusion.beta_end,
            prediction_type=diffusion.prediction_type,
            variance_type=diffusion.variance_type,
            clip_sample=diffusion.clip_sample,
            timestep_spacing=diffusion.timestep_spacing,
            rescale_betas_zero_snr=diffusion.rescale_betas_zero_snr,
        )
        if self.scheduler.config.prediction_type == "epsilon" and self.scheduler.noise_schedule.alphas_cumprod[-1] == 0:
            raise ConfigError(
                f"diffusion.beta_schedule {diffusion.beta_schedule} leaves no signal at the last timestep, where "
                "epsilon says nothing about x_0; set diffusion.prediction_type to v_prediction or sample."
            )
        seed_global_generators(config.training.seed, "initialization")
        num_embeds = num_classes + self.has_null_label if num_classes else None
        self.unet = build_unet(config.model, self.images.image_shape, num_embeds).to(self.device)
        self.ema = EMA(self.unet, config.training.ema_decay, config.training.ema_warmup)
        self.optimizer = build_optimizer(self.unet.parameters(), config.training)
        self.loss = DenoisingLoss(self.scheduler, config.objective.loss, num_classes if self.has_null_label else None)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and speaks."""
        return bool(self.accelerator.is_main_process)

    def describe(self) -> str:
        """Says in a line what is trained on what, where."""
        num_parameters = sum(parameter.numel() for parameter in self.unet.parameters())
        num_processes = self.accelerator.num_processes
        accumulation = self.config.training.train_batch_size // (self.micro_batch_size * num_processes)
        return (
            f"{num_parameters:,} parameters, {describe_sets(self.images, self.held_out)}, "
            f"{self.device.type} x {num_processes}, "
            f"{self.config.training.mixed_precision}, batch {self.config.training.train_batch_size} = {num_processes} "
            f"x {self.micro_batch_size} x {accumulation} accumulated"
        )

    def check_resume(self) -> None:
        """Collective: raises what `fit` would raise about the checkpoints in the run folder, and changes nothing."""
        processes.on_rank_0(lambda: choose_checkpoint(self.folder, self.config, is_dry_run=True))

    def leave_the_others(self) -> None:
        """Collective: waits for the other processes, rank 0's report included, and parts from them."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def fit(self) -> None:
        """Collective: trains until `num_steps`, continuing from the newest valid checkpoint.

        Raises:
            TrainingStopped: After a signal, when the checkpoint is saved.
            NonFiniteTraining: If too many updates in a row were not finite.
            ValueError: If the checkpoints in the run folder cannot be continued with this configuration.
        """
        self._resume()
        self._model, self._prepared_optimizer = self.accelerator.prepare(self.unet, self.optimizer)
        if self.state.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.state.scaler)
        self.unet.train()
        first_step, num_steps = self.state.global_step, self.config.training.num_steps
        self._progress = Progress(first_step, num_steps, is_main_process=self.is_main_process)
        with StopWatcher() as watcher, self._progress:
            started_at = self._logged_at = time.monotonic()
            self._logged_step = first_step
            while self.state.global_step < num_steps:
                self._train_step(self.state.global_step)
                self.state.global_step += 1
                self._progress.update()
                self._after_step()
                if exit_code := watcher.exit_code_if_stopped():
                    self._save(must_succeed=True)
                    self._progress.close()
                    if self.is_main_process:
                        say(f"Stopped by a signal at step {self.state.global_step}; the same command continues here.")
                    raise TrainingStopped(exit_code)
        self._finish()
        if self.is_main_process:
            minutes, seconds = divmod(round(time.monotonic() - started_at), 60)
            say(f"Trained from step {first_step} to {num_steps} in {minutes}:{seconds:02}.")

    def _train_step(self, step: int) -> None:
        """Collective: one optimiser update on the global batch, gradients accumulated over micro batches."""
        share_loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(self._batches.micro_batches(step)):
            # Only dropout draws from the global generators.
            seed_global_generators(self.config.training.seed, "dropout", step, self.accelerator.process_index, number)
            with nullcontext() if batch.is_last else self.accelerator.no_sync(self._model):
                losses = self.loss(
                    self._model, batch.x_0, batch.noise, batch.timesteps, batch.class_labels, batch.dropped
                )
                # DDP takes the mean over ranks, so the gradient is that of the mean over the global batch.
                loss = losses.sum() / len(self._batches)
                self.accelerator.backward(loss)
            share_loss += loss.detach()
        self._update(step, share_loss)

    def _update(self, step: int, share_loss: torch.Tensor) -> None:
        """Clips, updates the weights unless the gradient is not finite, and starts counting."""
        config = self.config.training
        max_norm = float("inf") if config.max_grad_norm is None else config.max_grad_norm
        self.grad_norm = self.accelerator.clip_grad_norm_(self.unet.parameters(), max_norm)
        is_nonfinite = ~torch.isfinite(self.grad_norm)
        self._settle_update()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        if self.accelerator.scaler is None:
            # The fused kernel skips the update itself, so the host need not know whether it will.
            vars(self.optimizer)["found_inf"] = is_nonfinite.to(torch.float32)
        self._prepared_optimizer.step()
        self._prepared_optimizer.zero_grad(set_to_none=True)
        self.guard.record(is_nonfinite)
        finite_loss = torch.where(is_nonfinite, 0.0, share_loss)
        self._loss_sum += torch.stack([finite_loss, (~is_nonfinite).to(torch.float32)])

    def _settle_update(self) -> None:
        """Lets the average follow the previous update, now that the host knows whether it was applied."""
        if self.guard.was_applied():
            self.ema.update(self.unet)

    def _after_step(self) -> None:
        """Collective: writes metrics, previews and checkpoints where they are due."""
        config, step = self.config, self.state.global_step
        is_last = step == config.training.num_steps
        if step % config.training.log_every_steps == 0 or is_last:
            self._log()
        interrupted_at = time.monotonic()
        if config.preview.every_steps and step % config.preview.every_steps == 0:
            self._preview()
        if step % config.training.checkpoint_every_steps == 0 or is_last:
            self._save(must_succeed=is_last)
        self._logged_at += time.monotonic() - interrupted_at  # images/s are those of training alone

    def _log(self) -> None:
        """Collective: writes one line of metrics: means since the line before."""
        loss_sum, num_losses = self.accelerator.reduce(self._loss_sum.clone(), reduction="sum").tolist()
        now, step, batch = time.monotonic(), self.state.global_step, self.config.training.train_batch_size
        images_per_second = (step - self._logged_step) * batch / max(now - self._logged_at, 1e-9)
        self._logged_at, self._logged_step = now, step
        self._loss_sum.zero_()
        self._settle_update()
        grad_norm = float(self.grad_norm)
        row = {
            "step": step,
            "num_images": step * batch,
            "loss": loss_sum / num_losses if num_losses else None,
            "grad_norm": grad_norm if np.isfinite(grad_norm) else None,
            "learning_rate": learning_rate_at(step - 1, self.config.training),
            "num_skipped_updates": self.guard.num_skipped,
            "images_per_second": round(images_per_second, 2),
        }
        if not self.accelerator.is_main_process:
            return
        try:
            self.metrics.append(row)
        except OSError as error:
            logger.warning("A line of metrics could not be written: %s", error)
        seconds_left = (self.config.training.num_steps - step) * batch / images_per_second
        self._progress.show(step, row["loss"], images_per_second, seconds_left)

    def _preview(self) -> None:
        """Collective: draws the preview grid with the averaged weights on rank 0."""
        self._settle_update()
        path = self.folder.path / "previews" / f"step_{self.state.global_step:08d}.png"

        def draw() -> None:
            seed, preview = self.config.training.seed, self.config.preview
            try:
                with self.ema.swapped_in(self.unet):
                    save_preview(path, self.unet, self.scheduler, preview, seed, self.class_names, self.has_null_label)
            except torch.OutOfMemoryError:
                logger.warning("No memory for the preview; training goes on. Lower preview.num_images.")
            except OSError as error:
                logger.warning("The preview could not be written (%s); training goes on.", error.strerror or error)

        processes.on_rank_0(draw)

    def _save(self, *, must_succeed: bool) -> None:
        """Collective: writes a checkpoint on rank 0; a full disk stops training only where nothing may be lost."""
        self._settle_update()
        self.state.loss_sums = self.accelerator.gather(self._loss_sum[None]).tolist()
        self.state.num_ema_updates = self.ema.num_updates
        self.state.num_skipped = self.guard.num_skipped
        self.state.num_consecutive_skipped = self.guard.num_consecutive
        self._batches.write_state(self.state)
        scaler = self.accelerator.scaler
        self.state.scaler = scaler.state_dict() if scaler is not None else None
        processes.on_rank_0(lambda: self._write_checkpoint(must_succeed))

    def _write_checkpoint(self, must_succeed: bool) -> None:
        """Writes and prunes checkpoints on rank 0."""

        def write(folder: Path) -> None:
            write_snapshot(folder, self.unet, self.ema, self.optimizer, self.state, self.config.to_yaml())

        try:
            checkpoint.write_checkpoint(self.folder.checkpoints, self.state.global_step, write)
        except OSError as error:
            message = (
                f"The checkpoint of step {self.state.global_step} could not be written ({error.strerror or error})"
            )
            if must_succeed:
                raise OSError(f"{message}; make room in {self.folder.path} and run the same command again.") from error
            logger.warning("%s; training goes on, the older checkpoints are intact.", message)
            return
        checkpoint.prune(self.folder.checkpoints, self.config.training.num_checkpoints_kept)

    def _resume(self) -> None:
        """Collective: takes up the newest valid checkpoint, read by rank 0 alone, and starts the run folder."""
        state = processes.on_rank_0(self._read_checkpoint)
        has_checkpoint = processes.share_json(state is not None)
        if has_checkpoint:
            counters, tensors = state if state is not None else (TrainerState(), None)
            self.state = TrainerState(**processes.share_json(vars(counters)))
            processes.share_tensors([*self.unet.parameters(), *self.ema.tensors()])
            load_optimizer(self.optimizer, self.unet, processes.share_named_tensors(tensors, self.device))
            if len(self.state.loss_sums) == self.accelerator.num_processes:
                self._loss_sum.copy_(torch.tensor(self.state.loss_sums[self.accelerator.process_index]))
            else:
                self._loss_sum.copy_(torch.tensor(self.state.loss_sums).mean(dim=0))
            self._batches.go_to(self.state)
        self.ema.num_updates = self.state.num_ema_updates
        self.guard.num_skipped = self.state.num_skipped
        self.guard.num_consecutive = self.state.num_consecutive_skipped
        processes.on_rank_0(self._start_folder)

    def _read_checkpoint(self) -> tuple[TrainerState, dict[str, torch.Tensor]] | None:
        """Reads the newest valid checkpoint on rank 0."""
        latest = choose_checkpoint(self.folder, self.config)
        if latest is None:
            return None
        say(f"Continuing from step {latest.step} of {self.config.training.num_steps} ({latest.path}).")
        state, tensors = read_snapshot(latest.path, self.unet, self.ema)
        self._batches.check_state(state, self.folder.path)
        return state, tensors

    def _start_folder(self) -> None:
        """Writes the configuration and cuts the metrics back to the checkpoint."""
        self.folder.write_config(self.config.to_yaml())
        self.metrics.cut_after(self.state.global_step)

    def _finish(self) -> None:
        """Collective: writes the pipeline with the averaged weights on rank 0."""

        def write(folder: Path) -> None:
            pipeline = GaussianDiffusionPipeline(
                self.unet, self.scheduler, class_names=self.class_names, has_null_label=self.has_null_label
            )
            with self.ema.swapped_in(self.unet):
                pipeline.save_pretrained(folder)
            (folder / "training_config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")

        processes.on_rank_0(lambda: checkpoint.replace_folder(self.folder.pipeline, write))
