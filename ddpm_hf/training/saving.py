"""Saving and resuming on all ranks: rank 0 alone reads and writes the run folder, the others get what it read.

Every public function here is collective: all ranks must call it, in the same order.
"""

import json
import logging
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DModel

from ddpm_hf.config import ConfigError, RunConfig
from ddpm_hf.data import ImageSet, ImageStream
from ddpm_hf.diffusion import GaussianDiffusionPipeline
from ddpm_hf.durable import replace_folder
from ddpm_hf.evaluation.verification import write_verification
from ddpm_hf.training import checkpoint, data_state, posthoc_ema, processes, record, snapshot
from ddpm_hf.training.checkpoint import CheckpointError
from ddpm_hf.training.earlier_pipeline import keep_additions
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.guard import check_finite
from ddpm_hf.training.progress import say
from ddpm_hf.training.publishing import Publisher, publish
from ddpm_hf.training.resume import choose_checkpoint
from ddpm_hf.training.run_folder import RunFolder
from ddpm_hf.training.snapshot import TrainerState, load_optimizer, read_snapshot, write_snapshot
from ddpm_hf.training.timestep_sampling import TimestepSampler
from ddpm_hf.training.tracking import MetricsLog

logger = logging.getLogger(__name__)

_BYTES_OF_A_NAME = 128
"""What a tensor takes in the header of a safetensors file."""


class Saver:
    """Keeps the run folder of one run: checkpoints, configuration, metrics and, in the end, the pipeline.

    Args:
        config: The configuration of the run.
        folder: The run folder, held by this process.
        metrics: The lines of metrics in it.
        images: Training images, whose order the run depends on.
        unet: The network.
        ema: Its average.
        optimizer: Its optimiser.
        timestep_sampler: What draws its timesteps, and may have learned from them.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        metrics: MetricsLog,
        *,
        images: ImageSet | ImageStream,
        unet: UNet2DModel,
        ema: EMA,
        optimizer: torch.optim.Optimizer,
        timestep_sampler: TimestepSampler,
    ) -> None:
        self._config = config
        self._folder = folder
        self._metrics = metrics
        self._images = images
        self._unet, self._ema, self._optimizer = unet, ema, optimizer
        self._timestep_sampler = timestep_sampler

    @property
    def checkpoint_bytes(self) -> int:
        """About how large a checkpoint is: the weights, their average, and two moments of each weight."""
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self._unet.parameters())
        averages = sum(average.numel() * average.element_size() for average in self._ema.tensors())
        names = 4 * _BYTES_OF_A_NAME * sum(1 for _ in self._unet.parameters())
        return int(3 * weights + averages + names)

    @property
    def stored_average_bytes(self) -> int:
        """About how large one of the things is that posthoc_ema stores: a pair of averages in float32."""
        return sum(2 * 4 * parameter.numel() + 2 * _BYTES_OF_A_NAME for parameter in self._unet.parameters())

    def num_averages_stored(self, step: int = 0) -> int:
        """Returns how many such pairs the run stores after a step."""
        training = self._config.training
        if not training.posthoc_ema:
            return 0
        return sum(posthoc_ema.is_due(number, training) for number in range(step + 1, training.num_steps + 1))

    def check(self) -> None:
        """Collective: raises what `resume` would raise about the run folder, and changes nothing."""

        def check() -> None:
            self._check_space(choose_checkpoint(self._folder, self._config, is_dry_run=True))

        processes.on_rank_0(check)

    def resume(self, take_up: Callable[[TrainerState], None]) -> None:
        """Collective: takes up the newest valid checkpoint, read by rank 0 alone, and starts the run folder.

        Args:
            take_up: Gives the counters of a run that is continued to those who count.

        Raises:
            ValueError: If the checkpoints in the folder cannot be continued with this configuration, or there is no
                room for further ones.
        """
        found = processes.on_rank_0(self._read_checkpoint)
        step = 0
        if processes.share_json(found is not None):
            path, counters, tensors, learned = found if found is not None else (Path(), TrainerState(), None, None)
            path = Path(processes.share_json(str(path)))
            state = TrainerState(**processes.share_json(vars(counters)))
            processes.share_tensors([*self._unet.parameters(), *self._ema.tensors()])
            tensors = processes.share_named_tensors(tensors, self._unet.device)
            learned = processes.share_named_tensors(learned, self._unet.device)
            with _going_on_from(path):
                load_optimizer(self._optimizer, self._unet, tensors, state.optimizer)
                self._timestep_sampler.load_state(learned)
                self._ema.num_updates = state.num_ema_updates
                take_up(state)
            step = state.global_step
        processes.on_rank_0(lambda: self._start_folder(step))

    def save(self, state: TrainerState, *, must_succeed: bool) -> bool:
        """Collective: writes a checkpoint on rank 0 and removes old ones.

        Args:
            state: The counters of the run.
            must_succeed: Whether a full disk ends the run, since work would be lost; otherwise it is a warning.

        Returns:
            Whether it was written.

        Raises:
            OSError: If a checkpoint that must succeed cannot be written.
            ValueError: If something else has taken the place of the run folder.
            NonFiniteTraining: If the weights are not worth saving.
            ProcessesDiffer: If the processes no longer have the same weights.
        """
        processes.check_same(self._weights())
        check_finite([*self._unet.parameters(), *self._ema.tensors()], state.global_step)
        state.num_ema_updates = self._ema.num_updates
        data_state.write_state(self._images, state)
        return bool(processes.share_json(processes.on_rank_0(lambda: self._write_checkpoint(state, must_succeed))))

    def save_pipeline(self, pipeline: GaussianDiffusionPipeline, step: int) -> None:
        """Collective: writes the finished pipeline with the averaged weights on rank 0, and keeps what lay in it."""

        def write(folder: Path) -> None:
            self._write_pipeline(folder, pipeline, step)
            write_verification(folder)
            keep_additions(self._folder.pipeline, folder, self._folder.evaluations)

        processes.on_rank_0(lambda: replace_folder(self._folder.pipeline, write))

    def publish(self, publisher: Publisher, pipeline: GaussianDiffusionPipeline, step: int) -> None:
        """Collective: lets rank 0 publish the averaged weights while training goes on."""

        def write(folder: Path) -> None:
            check_finite([*self._unet.parameters(), *self._ema.tensors()], step)
            self._write_pipeline(folder, pipeline, step)

        handed_over, previews = self._folder.hub / "run", self._folder.previews
        processes.on_rank_0(lambda: publish(publisher, handed_over, step, previews, write))

    def _write_pipeline(self, folder: Path, pipeline: GaussianDiffusionPipeline, step: int) -> None:
        """Writes the averaged weights and where they come from."""
        with self._ema.swapped_in(self._unet):
            pipeline.save_pretrained(folder)
        (folder / "training_config.yaml").write_text(self._config.to_yaml(), encoding="utf-8")
        summary = record.summarize(
            self._config,
            step,
            images=self._images,
            unet=self._unet,
            num_processes=processes.world_size(),
            metrics=self._metrics,
        )
        (folder / record.FILE_NAME).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

    def _weights(self) -> dict[str, torch.Tensor]:
        """Returns the weights and all their averages, by name."""
        weights: dict[str, torch.Tensor] = dict(self._unet.named_parameters())
        names = list(weights)
        for average in self._ema.names:
            tensors = zip(names, self._ema.tensors(average), strict=True)
            weights |= {f"{average} of {name}": tensor for name, tensor in tensors}
        return weights

    def _write_checkpoint(self, state: TrainerState, must_succeed: bool) -> bool:
        """Writes and prunes checkpoints on rank 0, and says whether it could."""

        def write(folder: Path) -> None:
            write_snapshot(folder, self._unet, self._ema, self._optimizer, state, self._config.to_yaml())
            snapshot.write_objective(folder, self._timestep_sampler.state())

        try:
            self._folder.hold()
            checkpoint.write_checkpoint(self._folder.checkpoints, state.global_step, write)
        except OSError as error:
            message = f"The checkpoint of step {state.global_step} could not be written ({error.strerror or error})"
            if must_succeed:
                raise OSError(f"{message}; make room in {self._folder.path} and run the same command again.") from error
            logger.warning("%s; training goes on, the older checkpoints are intact.", message)
            return False
        best_step = state.best["step"] if state.best else None
        checkpoint.prune(self._folder.checkpoints, self._config.training.num_checkpoints_kept, best_step)
        return True

    def _check_space(self, latest: checkpoint.Checkpoint | None) -> None:
        """Refuses a disk that has no room for two checkpoints, or for one more, and for what posthoc_ema will store.

        A finished run needs none.
        """
        num_steps = self._config.training.num_steps
        if latest is not None and latest.step == num_steps:
            return
        num_stored = self.num_averages_stored(0 if latest is None else latest.step)
        needed = self.checkpoint_bytes * (2 if latest is None else 1) + num_stored * self.stored_average_bytes
        free = shutil.disk_usage(self._folder.path).free
        if free < needed:
            what, advice = "two checkpoints" if latest is None else "one more checkpoint", ""
            if num_stored:
                what = f"{what} and {num_stored} pairs of averages (training.posthoc_ema)"
                advice = ", raise training.posthoc_ema_every_steps"
            raise ConfigError(
                f"training.output_dir {self._folder.path} has {free / 1e6:,.1f} MB free, but needs "
                f"{needed / 1e6:,.1f} MB for {what}; make room{advice}, or choose another folder."
            )

    def _read_checkpoint(self) -> tuple[Path, TrainerState, dict[str, torch.Tensor], dict[str, torch.Tensor]] | None:
        """Reads the newest valid checkpoint on rank 0."""
        latest = choose_checkpoint(self._folder, self._config)
        self._check_space(latest)
        if latest is None:
            return None
        say(f"Continuing from step {latest.step} of {self._config.training.num_steps} ({latest.path}).")
        with _going_on_from(latest.path):
            state, tensors = read_snapshot(latest.path, self._unet, self._ema)
            if state.global_step != latest.step:
                raise ValueError(f"its counters are those of step {state.global_step}")
            learned = snapshot.read_objective(latest.path)
        data_state.check_state(self._images, state, self._config.data.source, self._folder.path)
        return latest.path, state, tensors, learned

    def _start_folder(self, step: int) -> None:
        """Writes the configuration and cuts metrics and stored averages back to the checkpoint."""
        self._folder.write_config(self._config.to_yaml())
        checkpoint.remove_after(self._folder.ema_snapshots, step)
        self._metrics.cut_after(step)


@contextmanager
def _going_on_from(path: Path) -> Iterator[None]:
    """Refuses a checkpoint whose files are those of its manifest: whoever wrote it decided what is in them."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
        reason = textwrap.shorten(what or type(error).__name__, 200, placeholder=" ...")
        raise CheckpointError(
            f"{path} is whole, but this version cannot go on from it ({reason}); restore another one, use the version "
            "that wrote it, or choose another training.output_dir."
        ) from error
