"""All scenarios of two ranks, in one process group.

Each scenario leaves a run folder and a report per rank, SCENARIO_RANK.json. Faults are injected into the trainer from
outside; the data, weights, clock and signals are real.
"""

import errno
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import UNet2DModel

from ddpm_hf import distributed
from ddpm_hf.config import (
    ConfigError,
    EvaluationConfig,
    ModelConfig,
    PreviewConfig,
    RunConfig,
    TrainingConfig,
    parse_command_line,
)
from ddpm_hf.data import ImageSet
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler, latents
from ddpm_hf.distributed import ProcessesDiffer, TrainingStopped
from ddpm_hf.evaluation.likelihood import ReverseProcess, estimate_second_moments, variational_bound
from ddpm_hf.evaluation.report import SmallSampleScorer
from ddpm_hf.training import checkpoint
from ddpm_hf.training.batches import resolve_micro_batch_size
from ddpm_hf.training.callbacks import TrainerCallback
from ddpm_hf.training.trainer import Score, Trainer, build_network, save_preview
from tests.conftest import run_arguments, tiny_unet
from tests.runs import EVERYTHING_BUT_DROPOUT, EVERYTHING_RANDOM

CURVE: dict[str, object] = EVERYTHING_BUT_DROPOUT | {
    "data__validation_fraction": 0.02,
    "training__validate_every_steps": 3,
    "tracking__trackers": ["tensorboard"],
    "preview__every_steps": 3,
    "preview__num_images": 20,
}
# 24 images make an epoch of three steps; the stops fall between two rows of metrics.
COVERAGE: dict[str, object] = {"training__num_steps": 12, "training__log_every_steps": 5}
OTHER_OPTIMIZER: dict[str, object] = {
    "model__preset": None,
    "model__overrides": {},
    "training__optimizer": "torch.optim.SGD",
    "training__optimizer_kwargs": {"momentum": 0.9},
    "training__learning_rate_schedule": "cosine",
    "training__posthoc_ema": True,
    "training__posthoc_ema_every_steps": 3,
}
STUDENT: dict[str, object] = {
    "training__num_steps": 2,
    "distillation__num_inference_steps": 4,
    "diffusion__clip_sample": False,
}
LATENTS: dict[str, object] = {"training__num_steps": 2, "diffusion__clip_sample": False}
Fault = Callable[[Trainer], None]
Report = dict[str, Any]


def train(output_dir: Path, changes: dict[str, object], *faults: Fault) -> tuple[Trainer, int]:
    """Train one run with injected faults; return its trainer and exit code."""
    config, _ = parse_command_line(run_arguments(output_dir, **changes), "test")
    trainer = Trainer(config)
    for fault in faults:
        fault(trainer)
    try:
        trainer.fit()
        return trainer, 0
    except TrainingStopped as stopped:
        return trainer, stopped.exit_code
    finally:
        trainer.folder.release()


def before_step(step: int, action: Callable[[Trainer], None]) -> Fault:
    """Return a fault that does something before optimizer step `step`, counted from 0."""

    def inject(trainer: Trainer) -> None:
        train_step = trainer._train_step

        def train_step_with_fault(current: int) -> None:
            if current == step:
                action(trainer)
            train_step(current)

        trainer._train_step = train_step_with_fault  # type: ignore[method-assign]

    return inject


def signalled(number: signal.Signals, step: int, rank: int) -> Fault:
    """Return a fault that sends a signal to one rank in a step."""
    return before_step(step, lambda _: os.kill(os.getpid(), number) if rank == distributed.rank() else None)


def recording(seen: list[str]) -> Fault:
    """Return a hook that records every training image of this rank in order."""

    def inject(trainer: Trainer) -> None:
        samples = trainer.loader.samples

        def noted(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
            x_0, labels = samples(start, stop)
            seen.extend(digest(image) for image in x_0)
            return x_0, labels

        trainer.loader.samples = noted  # type: ignore[method-assign]

    return inject


def digest(*tensors: torch.Tensor) -> str:
    """Return a checksum of tensors."""
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def follow_weights(hashes: list[str]) -> Fault:
    """Return a hook that records a checksum of the weights after every step."""

    def inject(trainer: Trainer) -> None:
        train_step = trainer._train_step

        def noted(step: int) -> None:
            train_step(step)
            hashes.append(digest(*trainer.unet.parameters()))

        trainer._train_step = noted  # type: ignore[method-assign]

    return inject


# ------------------------------------------------------------------------------------------------------ scenarios


def curve(folder: Path) -> Report:
    """The run that is compared with one process."""
    trainer, _ = train(folder, CURVE)
    settings = {name: getattr(trainer._model, name, None) for name in ("gradient_as_bucket_view", "batched_grad_copy")}
    return {
        "weights": digest(*trainer.unet.parameters()),
        "averages": digest(*trainer.ema.tensors()),
        "settings": settings,
    }


def slow(folder: Path) -> Report:
    """The same run with one rank late at a time: with the data and before everything that the ranks do together."""

    def late(rank: int, seconds: float = 0.2) -> None:
        if rank == distributed.rank():
            time.sleep(seconds)

    def inject(trainer: Trainer) -> None:
        for number, name in enumerate(("_log", "_validate", "_preview", "_save")):
            whole = getattr(trainer, name)

            def delayed(*, whole: Callable[..., Any] = whole, number: int = number, **arguments: bool) -> Any:
                late((number + trainer.global_step) % 2)
                return whole(**arguments)

            setattr(trainer, name, delayed)

    written: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.symlink")
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (changes or writes) and str(folder) in repr(arguments):
            written.append(f"{event} {arguments[0]}")

    sys.addaudithook(note)
    train(folder, CURVE, inject, before_step(1, lambda _: late(1)), before_step(2, lambda _: late(0)))
    return {"written": list(written)}


def coverage(folder: Path) -> Report:
    """Continue the run that one process began, until rank 1 alone receives a signal."""
    source, seen = str(folder.parent / "few.parquet"), list[str]()
    changes = COVERAGE | {"data__source": source}
    _, exit_code = train(folder, changes, recording(seen), signalled(signal.SIGTERM, 6, rank=1))
    return {"seen": seen, "exit_code": exit_code}


def stopped(folder: Path) -> Report:
    """A run that signals to one rank stop, also in the last step, and one that never stops; everything is random."""
    codes = [train(folder, EVERYTHING_RANDOM, signalled(signal.SIGINT, 1, rank=0))[1]]
    saved = max((folder / "checkpoints").iterdir()).name
    codes += [train(folder, EVERYTHING_RANDOM, signalled(signal.SIGUSR1, 5, rank=1))[1]]
    codes += [train(folder.parent / "never_stopped", EVERYTHING_RANDOM)[1]]
    return {"exit_codes": codes, "saved": saved}


def not_a_number(folder: Path) -> Report:
    """Non-finite values on one rank: in its images in step 2, in a gradient in step 4."""
    hashes: list[str] = []

    def spoil_images(trainer: Trainer) -> None:
        samples = trainer.loader.samples

        def spoilt(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
            x_0, labels = samples(start, stop)
            if start // 8 == 2 and distributed.rank() == 1:
                x_0[0, 0, 0, 0] = float("nan")
            return x_0, labels

        trainer.loader.samples = spoilt  # type: ignore[method-assign]

    def spoil_gradient(trainer: Trainer) -> None:
        if distributed.rank() == 1:
            weight = trainer.unet.conv_out.weight
            hook = weight.register_hook(lambda gradient: (hook.remove(), gradient * float("inf"))[1])

    changes = {"objective__timestep_sampling": "loss_aware"}
    trainer, exit_code = train(folder, changes, spoil_images, before_step(4, spoil_gradient), follow_weights(hashes))
    return {
        "weights": hashes,
        "num_skipped": trainer.guard.num_skipped,
        "num_ema_updates": trainer.ema.num_updates,
        "averages": digest(*trainer.ema.tensors()),
        "history": digest(*trainer.timestep_sampler.state_dict().values()),
        "exit_code": exit_code,
    }


def differing(folder: Path) -> Report:
    """One bit of one weight of rank 1, then of one EMA weight, is flipped after the first checkpoint."""

    def flip(trainer: Trainer, tensors: Callable[[], list[torch.Tensor]]) -> Fault:
        save = trainer._save

        def save_flipped(**arguments: Any) -> None:
            if trainer.global_step == 4 and distributed.rank() == 1:
                tensors()[0].detach().view(torch.int32).flatten()[-1] ^= 1
            save(**arguments)

        trainer._save = save_flipped  # type: ignore[method-assign]

    messages = []
    for name in ("weight", "average"):
        try:
            train(
                folder / name,
                {},
                lambda t, name=name: flip(  # type: ignore[misc]
                    t, lambda: list(t.unet.parameters()) if name == "weight" else t.ema.tensors()
                ),
            )
        except ProcessesDiffer as error:
            messages.append(str(error))
    large = torch.zeros(1 << 20).repeat(2)
    large[-1] = float(distributed.rank())
    swapped = torch.tensor([0.0, 1.0] if distributed.rank() else [1.0, 0.0])
    for tensors in ({"same": torch.ones(3), "large": large}, {"swapped": swapped}, {"same": torch.ones(0)}):
        try:
            distributed.check_same(tensors)
            messages.append("the same")
        except ProcessesDiffer as error:
            messages.append(str(error).split(",")[0])
    return {"messages": messages}


def agreement(folder: Path) -> Report:
    """An error on one rank, the smallest memory, partly filled arrays, and a network that only rank 0 can read."""
    messages = []

    def fail_on_rank_1() -> None:
        if distributed.rank() == 1:
            raise ValueError("only rank 1 sees this")

    def attempt(size: int) -> None:
        if size > (24, 3)[distributed.rank()]:
            raise torch.OutOfMemoryError(f"no room for {size}")

    def network(path: str) -> str:
        source = path if distributed.rank() == 0 else "/a/disk/that/only/rank/0/has"
        config = RunConfig(model=ModelConfig(preset=None, from_pretrained=source))
        scheduler, device = GaussianDiffusionScheduler.create(), torch.device("cpu")
        return digest(*build_network(config, (1, 8, 8), None, scheduler, Path("/nowhere"), device).parameters())

    config = TrainingConfig(micro_batch_size="auto")
    for action in (
        lambda: distributed.on_every_rank(fail_on_rank_1),
        lambda: resolve_micro_batch_size(config, 24, None, attempt),
        lambda: resolve_micro_batch_size(config, 24, None, lambda size: attempt(size + 3)),
        lambda: distributed.gather_json([distributed.rank(), "ö"]),
        lambda: network(str(folder.parent / "unconditional")),
        lambda: network(str(folder.parent / "gone")),
        lambda: train(folder / "nine", {"training__train_batch_size": 9})[1],
    ):
        try:
            messages.append(action())
        except ConfigError as error:
            messages.append(str(error))
    part = torch.tensor([[200, 0], [0, 7]], dtype=torch.uint8)
    part[1 - distributed.rank()] = 0
    distributed.sum_arrays(part.numpy())
    groups = (dist.group.WORLD, distributed._cpu_group())
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    return {"messages": messages, "parts": part.tolist(), "timeouts": timeouts}


def draw(path: Path, network: UNet2DModel) -> bool:
    """Save a preview of 20 images."""
    config = PreviewConfig(num_images=20, num_inference_steps=2, eta=1.0)
    return save_preview(path, network, GaussianDiffusionScheduler(), config, 0)


def preview(folder: Path) -> Report:
    """A grid of which each rank samples a part, and one for which rank 1 has no memory."""
    network, sizes = tiny_unet(), list[int]()
    network.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    drawn = [draw(folder / "grid.png", network)]
    sampled = list(sizes)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    if distributed.rank() == 1:
        network.conv_out.register_forward_pre_hook(fail)
    drawn += [draw(folder / "none.png", network)]
    return {"sampled": sampled, "drawn": drawn}


def score(folder: Path) -> Report:
    """Bits per dimension and a distance in features, of an untrained network and 10 random images."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 1, 8, 8), dtype=np.uint8)
    images = ImageSet(pixels, None, None, np.arange(len(pixels)))
    network = tiny_unet()
    torch.nn.init.normal_(network.conv_out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    pipeline = GaussianDiffusionPipeline(network, GaussianDiffusionScheduler.create())
    process = ReverseProcess(pipeline)
    bound = variational_bound(process, images, seed=0, num_terms=5, batch_size=8)
    moments = estimate_second_moments(
        GaussianDiffusionPipeline(network, GaussianDiffusionScheduler.create(num_train_timesteps=10)),
        images, seed=0, num_images=3, batch_size=8,
    )  # fmt: skip
    evaluation = EvaluationConfig(
        score_every_steps=1, score_metric="frechet_distance", score_features="tests.feature_networks:Pooled",
        score_num_samples=9, num_inference_steps=2, batch_size=4,
    )  # fmt: skip
    distance = SmallSampleScorer(RunConfig(evaluation=evaluation))(pipeline, images, images)
    return {"bits": bound.totals.tolist(), "moments": moments.tolist(), "distance": distance.value}


def other_optimizer(folder: Path) -> Report:
    """A pretrained network, an optimizer without found_inf, and EMA snapshots."""
    train(folder, OTHER_OPTIMIZER | {"model__from_pretrained": folder.parent / "conditional"})
    return {}


def student(folder: Path) -> Report:
    """A student whose teacher only rank 0 can read."""
    teacher = folder.parent / "teacher" if distributed.rank() == 0 else "/a/disk/that/only/rank/0/has"
    train(folder, STUDENT | {"distillation__teacher": teacher})
    return {}


def encode(folder: Path, vae: Path | str) -> Report:
    """Train on latents of 1,797 digits, which are encoded in 29 batches; report those of this rank and all moments."""
    sizes: list[int] = []

    def counted(vae: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(images))
        return encode_moments(vae, images)

    encode_moments = latents.encode_moments
    latents.encode_moments = counted
    try:
        trainer, _ = train(
            folder, LATENTS | {"data__vae": vae, "data__cache_dir": folder.parent / f"{folder.name}_cache"}
        )
    finally:
        latents.encode_moments = encode_moments
    assert trainer.latents is not None
    return {"num_batches": len(sizes), "moments": digest(torch.from_numpy(np.array(trainer.latents.moments)))}


def encoding(folder: Path) -> Report:
    """A VAE that only rank 0 can read."""
    return encode(folder, folder.parent / "vae" if distributed.rank() == 0 else "/a/disk/that/only/rank/0/has")


def background(folder: Path) -> Report:
    """A thread of rank 0 writes the checkpoint of step 2 until step 4 begins; the disk is full from step 4 on.

    The scores of steps 2, 4 and 6 are 3, 1 and 2. The checkpoint of step 4 fails in the background, the last one not.
    """
    scores, seen, has_gone_on = iter((3.0, 1.0, 2.0)), list[list[int]](), threading.Event()
    write_checkpoint = checkpoint.write_checkpoint

    def write(root: Path, step: int, content: Callable[[Path], None]) -> checkpoint.Checkpoint:
        if step > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        assert has_gone_on.wait(600), "training waits for the checkpoint"
        return write_checkpoint(root, step, content)

    config, _ = parse_command_line(run_arguments(folder, evaluation__score_every_steps=2), "test")
    trainer = Trainer(config, scorer=lambda *_: Score(next(scores), "test", True, {}))
    # Rank 1 says by a collective operation that it is in step 4, too.
    before_step(3, lambda _: (seen.extend(distributed.gather_json([distributed.rank()])), has_gone_on.set()))(trainer)
    checkpoint.write_checkpoint = write
    message = ""
    try:
        trainer.fit()
    except distributed.SharedOSError as error:
        message = str(error)
    finally:
        checkpoint.write_checkpoint = write_checkpoint
        trainer.folder.release()
    return {"seen": seen, "message": message, "best": trainer.best}


class Requests(TrainerCallback):
    """Rank 1 alone asks for a checkpoint after step 1, for a validation after step 2, and for the end after step 4."""

    def __init__(self) -> None:
        self.saved: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask."""
        control.should_save |= state.global_step == 1
        control.should_evaluate |= state.global_step == 2
        control.should_training_stop |= state.global_step == 4

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the checkpoint."""
        self.saved.append(kwargs["checkpoint"].name)


def callbacks(folder: Path) -> Report:
    """Requests of one rank, which the other one has no callback for."""
    changes: dict[str, object] = {
        "training__num_steps": 9, "training__checkpoint_every_steps": 9, "training__log_every_steps": 2,
        "training__validate_every_steps": 9, "data__validation_fraction": 0.1,
    }  # fmt: skip
    config, _ = parse_command_line(run_arguments(folder, **changes), "test")
    requests = Requests()
    trainer = Trainer(config, callbacks=[requests] if distributed.rank() == 1 else [])
    try:
        output = trainer.fit()
        labels = torch.zeros(1, dtype=torch.int64)
        image = trainer.pipeline(batch_size=1, num_inference_steps=2, class_labels=labels, output_type="np").images
    finally:
        trainer.folder.release()
    return {"output": output, "saved": requests.saved, "image": image.tolist()}


SCENARIOS = (
    agreement,
    preview,
    curve,
    slow,
    coverage,
    stopped,
    not_a_number,
    differing,
    score,
    other_optimizer,
    student,
    encoding,
    background,
    callbacks,
)


def main(folder: Path) -> None:
    """Run all scenarios one after the other on this rank."""
    distributed.start(cpu=True)
    for scenario in SCENARIOS:
        report = scenario(folder / scenario.__name__)
        (folder / f"{scenario.__name__}_{distributed.rank()}.json").write_text(json.dumps(report), encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()
