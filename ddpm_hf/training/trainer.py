"""The loop: build, train_step, log, validate, preview, save, resume. It knows no mathematics; the objective does.

One step is one optimiser update on the global batch. Sample n of the run, its timestep, noise, flip and label drop are
functions of (seed, step, position in the global batch), so the loss curve is the same however the batch is split over
processes and micro batches, and nothing random has to be stored; of a stream of images, its place is.
"""

import logging
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ddpm_hf.config import ConfigError, RunConfig, refuse_secrets
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.rng import seed_global_generators
from ddpm_hf.training import data_state, posthoc_ema, processes
from ddpm_hf.training.batches import BatchSource
from ddpm_hf.training.due import due_after
from ddpm_hf.training.ema import EMA, decay_laws
from ddpm_hf.training.guard import NonFiniteGuard, StopWatcher, TrainingStopped
from ddpm_hf.training.metrics import Meter, finite_or_none
from ddpm_hf.training.micro_batch import largest_micro_batch_size, settle, step_on_gpu
from ddpm_hf.training.network import make_network
from ddpm_hf.training.objective import DenoisingLoss
from ddpm_hf.training.optim import build_optimizer, learning_rate_at, may_step
from ddpm_hf.training.preview import save_preview
from ddpm_hf.training.progress import Progress, say
from ddpm_hf.training.publishing import Publisher
from ddpm_hf.training.run_folder import RunFolder
from ddpm_hf.training.saving import Saver
from ddpm_hf.training.scoring import Scorer, best_of
from ddpm_hf.training.setup import build_feed, build_scheduler, class_names_of, open_splits
from ddpm_hf.training.snapshot import TrainerState
from ddpm_hf.training.timestep_sampling import build_timestep_sampler
from ddpm_hf.training.tracking import MetricsLog, Trackers
from ddpm_hf.training.validation import validation_loss

logger = logging.getLogger(__name__)


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
        self.accelerator = processes.start(config.training)
        self.device = self.accelerator.device
        self.micro_batch_size = largest_micro_batch_size(config.training, self.accelerator.num_processes)
        self.folder = RunFolder(Path(config.training.output_dir).expanduser())
        processes.on_rank_0(lambda: self.folder.check(config.training.resume))
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
        processes.on_rank_0(self.trackers.check)
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
        processes.wait()
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
            processes.on_rank_0(lambda: self.trackers.start(first_step, self.config.to_dict()))
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
                processes.on_rank_0(lambda: posthoc_ema.store(snapshots, step, self.ema, self._pipeline()))
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
        data_state.go_to(self.images, state, self.accelerator.process_index, self.accelerator.num_processes)

    def _finish(self) -> None:
        """Collective: writes the pipeline with the averaged weights."""
        self.saver.save_pipeline(self._pipeline(), self.state.global_step)

    def _pipeline(self) -> GaussianDiffusionPipeline:
        """Returns the pipeline around the network with the weights that it has."""
        return GaussianDiffusionPipeline(self.unet, self.scheduler, **self.pipeline_settings)
