"""Validation, previews, scores and publishing beside training; what is due when; what a run prints before it starts."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf.cli.main import train as train_command
from ddpm_hf.config import (
    ConfigError,
    DataConfig,
    DiffusionConfig,
    HubConfig,
    ModelConfig,
    PreviewConfig,
    RunConfig,
    TrainingConfig,
    parse_command_line,
)
from ddpm_hf.data import ImageSet
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.hub.background import BackgroundPush
from ddpm_hf.training.checkpoint import CheckpointError, write_manifest
from ddpm_hf.training.ema import EMA, decay_schedules
from ddpm_hf.training.loss import DenoisingLoss
from ddpm_hf.training.meter import LossMeter
from ddpm_hf.training.trainer import (
    NUM_TIMESTEPS_PER_IMAGE,
    Publisher,
    Score,
    Scorer,
    Trainer,
    best_of,
    overlooked_settings,
    preview_blocks,
    preview_sampler,
    save_preview,
    validation_loss,
    validation_timesteps,
)
from tests.conftest import run_arguments, tiny_unet
from tests.runs import EVERYTHING_RANDOM, use_gradient_scaler
from tests.unit.diffusion.oracles import OperationCounter

# ------------------------------------------------------------------------------------------------------ validation

NUM_IMAGES = 9


@pytest.fixture
def images() -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8), dtype=np.uint8)
    return ImageSet(pixels, np.arange(30) % 10, None, np.arange(4, 4 + NUM_IMAGES))


def run(*, seed: int = 0, class_conditional: bool = True) -> RunConfig:
    return RunConfig(training=TrainingConfig(seed=seed), model=ModelConfig(class_conditional=class_conditional))


def measure(images: ImageSet, *, seed: int = 0, num_processes: int = 1, batch_size: int = NUM_IMAGES) -> float:
    """Sum what each of the processes computes; tests/distributed runs them together.

    The network has dropout, which must be off, and an output layer that shows it.
    """
    unet = tiny_unet(10, dropout=0.5).train()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    loss = DenoisingLoss(GaussianDiffusionScheduler())
    before = torch.get_rng_state()
    shared: dict[str, Any] = {"num_processes": num_processes, "batch_size": batch_size}
    parts = [validation_loss(unet, loss, images, run(seed=seed), rank=rank, **shared) for rank in range(num_processes)]
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn from the global generator"
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert unet.training, "the mode is restored"
    return sum(parts)


@pytest.mark.parametrize(("num_images", "num_train_timesteps"), [(250, 1000), (1, 1000), (7, 1000), (500, 10), (3, 2)])
def test_the_timesteps_are_an_even_grid(num_images: int, num_train_timesteps: int) -> None:
    timesteps = validation_timesteps(num_images, num_train_timesteps, seed=0)
    assert timesteps.shape == (NUM_TIMESTEPS_PER_IMAGE, num_images)
    for quarter, row in enumerate(timesteps):
        assert row.min() >= quarter * num_train_timesteps // NUM_TIMESTEPS_PER_IMAGE
        assert row.max() <= (quarter + 1) * num_train_timesteps / NUM_TIMESTEPS_PER_IMAGE
    counts = np.bincount(timesteps.ravel(), minlength=num_train_timesteps)
    assert len(counts) == num_train_timesteps
    assert counts.max() - counts.min() <= (2 if timesteps.size % num_train_timesteps else 0)


def test_the_timesteps_depend_on_the_seed_and_not_on_the_order_of_the_images() -> None:
    first, again, other = (validation_timesteps(50, 1000, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], np.sort(first[0]))


@pytest.mark.parametrize(("num_processes", "batch_size"), [(1, 1), (2, 4), (12, 2)])
def test_the_validation_loss_does_not_depend_on_processes_or_batch_size(
    images: ImageSet, num_processes: int, batch_size: int
) -> None:
    """To 1e-6: only the order of float32 additions in the network differs; the mean is taken in float64."""
    found = measure(images, num_processes=num_processes, batch_size=batch_size)
    assert found == pytest.approx(measure(images), abs=1e-6)


def test_validation_calls_the_network_with_full_batches(images: ImageSet) -> None:
    """36 pairs of an image and a timestep, which neither 9 images nor 4 timesteps divide into batches of 8."""
    unet = tiny_unet(10)
    sizes: list[int] = []
    unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    loss = DenoisingLoss(GaussianDiffusionScheduler())
    validation_loss(unet, loss, images, run(), rank=0, num_processes=1, batch_size=8)
    assert sizes == [8, 8, 8, 8, 4]


def test_larger_16_bit_images_are_center_cropped(images: ImageSet) -> None:
    """To 1e-6: 16 bits that were stretched from 8 are the same images to the rounding of float32."""
    deep = np.random.default_rng(1).integers(0, 1 << 16, (30, 1, 12, 10), dtype=np.uint16)
    deep[:, :, 2:10, 1:9] = images.images.astype(np.uint16) * 257
    larger = dataclasses.replace(images, images=deep, crop_size=(8, 8))
    assert measure(larger, num_processes=2, batch_size=4) == pytest.approx(measure(images), abs=1e-6)


def test_the_validation_loss_is_repeatable_and_depends_on_the_seed(images: ImageSet) -> None:
    assert measure(images) == measure(images)
    assert abs(measure(images, seed=1) - measure(images)) > 1e-4


def test_the_validation_loss_is_the_mean_over_images_and_timesteps(images: ImageSet) -> None:
    """The loss of a network that predicts 0 is the mean square of the noise: 1 up to sampling error.

    36 draws of 64 pixels have a standard error of sqrt(2 / 2304) = 0.029, and the noise is always the same.
    """

    class Silent(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, sample: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
            return (torch.zeros_like(sample),)

    loss = DenoisingLoss(GaussianDiffusionScheduler())
    config = run(class_conditional=False)
    found = validation_loss(Silent(), loss, images, config, rank=0, num_processes=1, batch_size=5)  # type: ignore[arg-type]
    assert found == pytest.approx(1.0, abs=0.06)


# ------------------------------------------------------------------------------------------------------------ step


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_host_reads_nothing_and_an_update_launches_few_operations_between_two_log_lines(
    precision: str, tmp_path: Path
) -> None:
    """With everything that is random except loss-aware timesteps, which learn on the host."""
    changes = EVERYTHING_RANDOM | {"objective__timestep_sampling": "uniform"}
    config, _ = parse_command_line(run_arguments(tmp_path / "run", **changes))
    trainer = Trainer(config)
    trainer.folder.release()
    if precision == "fp16":
        use_gradient_scaler(trainer, 1024.0)
    with trainer.process_settings:
        trainer._prepare()
        update, launched, host_reads = trainer._update, [], []

        def counted_update(step: int) -> None:
            with OperationCounter() as counter:
                update(step)
            launched.append(counter.launched)

        trainer._update = counted_update  # type: ignore[method-assign]
        for step in range(3):
            with OperationCounter() as counter:
                trainer._train_step(step)
            host_reads.append(counter.host_reads)
    assert host_reads == [0] * 3
    # The first update also creates the state of the optimizer, tensor by tensor.
    assert max(launched[1:]) <= {"fp32": 28, "fp16": 38}[precision], launched


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_loss_gets_the_perturbation_of_the_batch(tmp_path: Path) -> None:
    config, _ = parse_command_line(run_arguments(tmp_path / "run", objective__input_perturbation=0.1))
    trainer = Trainer(config)
    trainer.folder.release()
    loss, given = trainer.loss, []

    def recording(*arguments: Any) -> torch.Tensor:
        given.append(arguments[-1])
        return loss(*arguments)

    with trainer.process_settings:
        trainer._prepare()
        trainer.loss = recording  # type: ignore[assignment]
        trainer._train_step(1)
        (batch,) = trainer._batches.micro_batches(1)
    assert torch.equal(given[0], batch.perturbation)


class CopyCounter(TorchDispatchMode):
    """Count copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("_to_copy", "copy_"):
            source = args[1] if func.overloadpacket.__name__ == "copy_" else args[0]
            if source.device != result.device:
                self.copies.append(f"{func}: {source.device} -> {result.device}")
        return result


@pytest.mark.usefixtures("fresh_accelerate")
def test_nothing_is_copied_between_host_and_device_in_a_step(tmp_path: Path) -> None:
    """After the batch. On the meta device, whose values the host cannot read; a fused optimizer does not run there."""
    changes = EVERYTHING_RANDOM | {"objective__timestep_sampling": "uniform", "training__posthoc_ema": True}
    config, _ = parse_command_line(run_arguments(tmp_path / "run", **changes))
    trainer = Trainer(config)
    trainer.folder.release()
    trainer._prepare()
    batches = [
        dataclasses.replace(
            batch,
            use_self_cond=True,
            **{name: value.to("meta") for name, value in vars(batch).items() if isinstance(value, torch.Tensor)},
        )
        for batch in trainer._batches.micro_batches(0)
    ]
    assert len(batches) == 2
    trainer._prefetcher = SimpleNamespace(micro_batches=lambda _: batches)  # type: ignore[assignment]
    trainer._model = trainer.unet.to("meta")  # type: ignore[arg-type]
    trainer.parameters = list(trainer.unet.parameters())
    trainer.ema = EMA(trainer.unet, decay_schedules(config.training))
    trainer.meter.losses = LossMeter(2, 8, torch.device("meta"))
    trainer.optimizer = torch.optim.SGD(trainer.parameters)
    vars(trainer.optimizer).update(_step_supports_amp_scaling=True, step=lambda: None)
    trainer._train_step(0)  # the scheduler and the EMA copy their tables
    with CopyCounter() as counter:
        trainer._train_step(1)
    assert counter.copies == []


# --------------------------------------------------------------------------------------------------------- preview

NAMES = {str(number): f"class {number}" for number in range(3)}


def preview_unet(sample_size: int | tuple[int, int] = 8) -> UNet2DModel:
    unet = tiny_unet(3).train()
    unet.register_to_config(sample_size=sample_size)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    return unet


def preview(path: Path, unet: UNet2DModel, *, seed: int = 0) -> Path:
    config = PreviewConfig(num_images=6, num_inference_steps=2)
    is_written = save_preview(path, unet, GaussianDiffusionScheduler(), config, seed, class_names=NAMES)
    assert is_written == path.exists()
    return path


def test_a_preview_is_a_function_of_weights_and_seed_and_does_not_change_training(tmp_path: Path) -> None:
    unet, before = preview_unet(), torch.get_rng_state()
    first, again, other = (
        preview(tmp_path / name / "grid.png", unet, seed=seed).read_bytes()
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again
    assert first != other
    assert unet.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_a_preview_has_one_column_per_class_in_the_shape_of_the_images(tmp_path: Path) -> None:
    with Image.open(preview(tmp_path / "grid.png", preview_unet((8, 16)))) as grid:
        width, height = grid.size
    assert width / 3 > height / 2 * 1.8


def test_a_preview_of_an_unconditional_network_is_about_square(tmp_path: Path) -> None:
    config = PreviewConfig(num_images=9, num_inference_steps=1)
    assert save_preview(tmp_path / "grid.png", tiny_unet(), GaussianDiffusionScheduler(), config, 0)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size[0] == grid.size[1]


def test_previews_are_sampled_by_unipc_unless_told_otherwise() -> None:
    pipeline = GaussianDiffusionPipeline(tiny_unet(3), GaussianDiffusionScheduler())
    samplers = [
        preview_sampler(pipeline, PreviewConfig(**given))
        for given in ({}, {"eta": 0.0}, {"scheduler": "ddim"}, {"scheduler": "dpm++", "num_inference_steps": 9})
    ]
    assert [(one.scheduler, one.num_inference_steps, one.eta) for one in samplers] == [
        ("UniPCMultistepScheduler", 20, None),
        (None, 20, 0.0),
        ("GaussianDiffusionScheduler", 20, 0.0),
        ("DPMSolverMultistepScheduler", 9, None),
    ]


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_preview_that_cannot_be_sampled_is_refused_when_the_trainer_is_built(tmp_path: Path) -> None:
    changes = {"preview__every_steps": 2, "preview__scheduler": "EDMEulerScheduler"}
    config, _ = parse_command_line(run_arguments(tmp_path / "run", **changes))
    with pytest.raises(ConfigError, match="the preview cannot be sampled: scheduler is EDMEulerScheduler, which does"):
        Trainer(config)


def test_a_preview_without_memory_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unet = preview_unet()

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    unet.conv_out.register_forward_pre_hook(fail)
    assert not preview(tmp_path / "grid.png", unet).exists()
    assert "No memory for the preview" in caplog.text
    assert unet.training, "the mode is restored after an error too"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_preview_on_a_full_disk_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "grid.png").symlink_to("/dev/full")
    config = PreviewConfig(num_images=2, num_inference_steps=1)
    assert not save_preview(
        tmp_path / "grid.png", preview_unet(), GaussianDiffusionScheduler(), config, 0, class_names=NAMES
    )
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize(("num_images", "num_processes"), [(64, 1), (64, 2), (20, 5), (3, 2), (1, 1), (65, 8)])
def test_every_image_is_sampled_once_in_the_same_block(num_images: int, num_processes: int) -> None:
    blocks = [block for rank in range(num_processes) for block in preview_blocks(num_images, rank, num_processes)]
    assert sorted((block.start, block.stop) for block in blocks) == [
        (block.start, block.stop) for block in preview_blocks(num_images, 0, 1)
    ]
    assert sorted(number for block in blocks for number in range(num_images)[block]) == list(range(num_images))


# ------------------------------------------------------------------------------------------------------- the trainer


def fit(
    folder: Path, *, scorer: Scorer | None = None, publisher: Publisher | None = None, **changes: object
) -> Trainer:
    """Train a tiny run to its end and return its trainer."""
    config, _ = parse_command_line(run_arguments(folder, **changes))
    trainer = Trainer(config, scorer=scorer, publisher=publisher)
    try:
        trainer.fit()
    finally:
        trainer.folder.release()
    return trainer


def score(value: float, kind: str = "test", lower_is_better: bool = True) -> Score:
    return Score(value, kind, lower_is_better, {"score": value, "score_metric": kind})


def scorer_of(*values: float) -> Scorer:
    scores = iter(values)
    return lambda pipeline, training, validation: score(next(scores))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_best_score_is_the_lowest_or_the_highest() -> None:
    first = best_of(score(2.0), 10, None)
    assert first == {"step": 10, "kind": "test", "value": 2.0}
    assert best_of(score(1.0), 20, first) == {"step": 20, "kind": "test", "value": 1.0}
    assert best_of(score(2.0), 20, first) is None, "the first of equal ones"
    assert best_of(score(1.0, lower_is_better=False), 20, first) is None
    assert best_of(score(3.0, lower_is_better=False), 20, first) is not None
    assert best_of(score(math.nan), 20, None) is None
    assert best_of(score(9.0, kind="other"), 20, first) == {"step": 20, "kind": "other", "value": 9.0}


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_best_checkpoint_is_saved_when_it_is_found_and_kept_over_a_resume(tmp_path: Path) -> None:
    """Scores of the steps 1 to 4, then 5 and 6 after a resume; a checkpoint is due at the end only."""
    folder, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    changes = {"training__checkpoint_every_steps": 100, "training__num_checkpoints_kept": 2}
    changes |= {"evaluation__score_every_steps": 1}
    fit(folder, scorer=scorer_of(3.0, 1.0, 2.0, 5.0), training__num_steps=4, **changes)
    assert names_in(checkpoints) == ["step_00000002", "step_00000004"]
    fit(folder, scorer=scorer_of(4.0, 6.0), training__num_steps=6, **changes)
    assert names_in(checkpoints) == ["step_00000002", "step_00000004", "step_00000006"]
    state = json.loads((checkpoints / "step_00000006" / "trainer_state.json").read_text())
    assert state["best"] == {"step": 2, "kind": "test", "value": 1.0}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows if "score" in row] == [3.0, 1.0, 2.0, 5.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (RunConfig(), "data.source is not set; set it, or pass the images as train_dataset."),
        (RunConfig(data=DataConfig(source="x"), training=TrainingConfig(ema_decay=1.5)), "training.ema_decay is 1.5"),
        (RunConfig(training=TrainingConfig(num_steps="4")), "training.num_steps is '4', but must be a whole number"),  # type: ignore[arg-type]
        (RunConfig(data={"sourze": "x"}), "there is no setting data.sourze; did you mean data.source?"),  # type: ignore[arg-type]
        (RunConfig(data=None), "data is null, but must be a section of settings"),  # type: ignore[arg-type]
        ({"training.num_stepz": 1}, "there is no setting training.num_stepz"),
        ("nowhere.yaml", "there is no configuration file nowhere.yaml"),
    ],
)
def test_a_trainer_checks_its_configuration_however_it_was_made(
    config: Any, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "image.png")  # once the data of a configuration without a source
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        Trainer(config)
    assert str(caught.value).startswith(sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_trainer_copies_its_configuration(tmp_path: Path) -> None:
    """And takes what numpy computed."""
    config, _ = parse_command_line(run_arguments(tmp_path / "run"))
    changed = dataclasses.replace(config.training, num_steps=np.int64(3), output_dir=tmp_path / "run")  # type: ignore[arg-type]
    trainer = Trainer(dataclasses.replace(config, training=changed))
    trainer.folder.release()
    config.model.overrides["dropout"] = 0.5
    assert repr(trainer.config.training.num_steps) == "3"
    assert "dropout" not in trainer.config.model.overrides


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_trainer_measures_the_score_itself(tmp_path: Path) -> None:
    """The command does, too; a metric that cannot be measured is an error before the first step."""
    changes: dict[str, Any] = {
        "training__num_steps": 2, "evaluation__score_every_steps": 2, "evaluation__score_metric": "frechet_distance",
        "evaluation__score_features": "tests.feature_networks:Pooled", "evaluation__score_num_samples": 9,
        "evaluation__num_inference_steps": 2,
    }  # fmt: skip
    trainer = fit(tmp_path / "run", **changes)
    assert trainer.best is not None and trainer.best["step"] == 2
    changes["evaluation__score_features"] = "nowhere:Network"
    with pytest.raises(ValueError, match="nowhere"):
        fit(tmp_path / "other", **changes)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("metric", "minimum"), [("fid", 2049), ("inception_score", 1000), ("kid", 1)])
def test_too_few_samples_for_a_score_are_refused_before_training(tmp_path: Path, metric: str, minimum: int) -> None:
    """FID needs more samples than its 2048 features, the Inception Score 100 in each of ten splits."""
    changes = {"evaluation__score_every_steps": 1, "evaluation__score_metric": metric}
    parse_command_line(run_arguments(tmp_path, **changes, evaluation__score_num_samples=minimum))
    with pytest.raises(ConfigError, match=r"evaluation\.score_num_samples"):
        parse_command_line(run_arguments(tmp_path, **changes, evaluation__score_num_samples=minimum - 1))


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best", {"kind": "fid"}),
        ("best", {"step": 1, "kind": "fid", "value": []}),
        ("micro_batch_size", []),
        ("loss_sums", ["x"]),
        ("num_skipped", "x"),
        ("global_step", 1),
    ],
)
def test_a_checkpoint_with_invalid_values_is_an_error(two_steps: Path, tmp_path: Path, name: str, value: Any) -> None:
    """With a valid manifest, as after a change by hand."""
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    path = folder / "checkpoints" / "step_00000002"
    state = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps(state | {name: value}))
    (path / "manifest.json").unlink()
    write_manifest(path, 2)
    with pytest.raises(CheckpointError, match=str(path)):
        fit(folder, training__num_steps=4)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "two_steps"
    fit(folder, training__num_steps=2)
    return folder


# ------------------------------------------------------------------------------------------------------- publishing

PUSH: dict[str, Any] = {"hub__push_to_hub": True, "hub__repo_id": "user/name", "hub__push_every_steps": 2}
PREVIEW: dict[str, Any] = {"preview__every_steps": 3, "preview__num_images": 1, "preview__num_inference_steps": 1}


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_ema_weights_are_published_with_the_newest_preview(tmp_path: Path) -> None:
    """Steps 2 and 4 of 6; the finished pipeline is published by the command."""
    published: dict[int, list[str]] = {}

    def publish(step: int, write: Callable[[Path], None]) -> None:
        folder = tmp_path / str(step)
        folder.mkdir()
        write(folder)
        published[step] = names_in(folder)

    trainer = fit(tmp_path / "run", publisher=publish, **PUSH, **PREVIEW)
    assert published == {2: ["pipeline"], 4: ["pipeline", "samples.png"]}
    preview_of_step_3 = tmp_path / "run" / "previews" / "step_00000003.png"
    assert (tmp_path / "4" / "samples.png").read_bytes() == preview_of_step_3.read_bytes()
    pipeline = GaussianDiffusionPipeline.from_pretrained(tmp_path / "4" / "pipeline")
    ema = UNet2DModel.from_pretrained(tmp_path / "run" / "checkpoints" / "step_00000004" / "ema")
    for one, other in zip(pipeline.unet.parameters(), ema.parameters(), strict=True):
        assert torch.equal(one, other)
    assert json.loads((tmp_path / "4" / "pipeline" / "training_summary.json").read_text())["step"] == 4
    assert trainer.global_step == 6


@pytest.mark.usefixtures("fresh_accelerate")
def test_what_cannot_be_written_is_told_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk in step 2; in step 4 a weight that is not finite, which is restored afterwards."""

    def publish(step: int, write: Callable[[Path], None]) -> None:
        if step == 2:
            raise OSError(28, "No space left on device")
        weight = trainer.unet.conv_in.weight.detach().view(-1)
        value = float(weight[0])
        weight[0] = math.nan
        try:
            write(tmp_path / "published")
        finally:
            weight[0] = value

    config, _ = parse_command_line(run_arguments(tmp_path / "run", **PUSH))
    trainer = Trainer(config, publisher=publish)
    trainer.fit()
    trainer.folder.release()
    assert "Step 2 is not pushed to the Hub ([Errno 28] No space left on device); training continues." in caplog.text
    assert "Step 4 is not pushed to the Hub (the weights or their EMA are not finite" in caplog.text
    assert not (tmp_path / "published").exists()
    assert (tmp_path / "run" / "pipeline").exists()


class Push(BackgroundPush):
    """A push that is free or busy."""

    def __init__(self, folder: Path) -> None:
        super().__init__(HubConfig(push_to_hub=True, repo_id="user/name"), folder)
        self.free = True
        self.started: list[tuple[int, list[str]]] = []

    def is_free(self) -> bool:
        return self.free

    def start(self, folder: Path, step: int) -> None:
        self.started.append((step, names_in(folder)))


def test_while_a_push_is_running_its_folder_is_not_touched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    push = Push(tmp_path / "hub")
    publish = push.publish
    publish(1, lambda folder: (folder / "one").mkdir())
    publish(2, lambda folder: (folder / "two").mkdir())
    push.free = False
    publish(3, lambda folder: pytest.fail("it was written to"))
    assert push.started == [(1, ["one"]), (2, ["two"])]
    assert "Step 3 is not pushed to the Hub: the previous push is still running." in caplog.text


# ---------------------------------------------------------------------------------------------------------- summary


def warnings_of(shape: tuple[int, int, int] = (3, 32, 32), *, warmup: int = 0, **model: Any) -> str:
    training = TrainingConfig(num_steps=300, learning_rate_warmup_steps=warmup)
    return " ".join(overlooked_settings(RunConfig(model=ModelConfig(**model), training=training), shape))


def test_a_warmup_longer_than_the_run_is_a_warning() -> None:
    assert "training.learning_rate_warmup_steps 5,000 is more than training.num_steps 300" in warnings_of(warmup=5000)
    assert "the run ends at 6% of training.learning_rate" in warnings_of(warmup=5000)
    assert warnings_of(warmup=300) == ""


@pytest.mark.parametrize(
    ("preset", "size", "nearest"),
    [
        ("ddpm_32", (256, 256), "ddpm_256"),
        ("improved_32", (64, 64), "improved_64"),
        ("ddpm_256", (32, 32), "ddpm_32"),
        ("ddpm_32", (8, 8), "digits_8"),
        ("ddpm_32", (48, 192), "ddpm_256"),
        ("ddpm_32", (28, 28), None),
        ("ddpm_32", (48, 48), None),
        ("ddpm_32", (128, 128), "ddpm_128"),
        ("ddpm_256", (512, 256), None),
    ],
)
def test_a_preset_for_another_size_is_a_warning(preset: str, size: tuple[int, int], nearest: str | None) -> None:
    found = warnings_of((3, *size), preset=preset)
    assert f"consider {nearest}." in found if nearest else found == ""


@pytest.mark.parametrize(
    ("diffusion", "size", "sentence"),
    [
        ({"num_train_timesteps": 100}, 32, "leaves 60% of the amplitude of an image at the last of 100 timesteps"),
        ({"num_train_timesteps": 100}, 32, "set diffusion.scale_betas_to_timesteps to true."),
        ({"beta_end": 0.005}, 32, "raise diffusion.beta_end."),
        ({"beta_schedule": "cosine"}, 512, "consider resolution / 64, 8."),
        ({"num_train_timesteps": 100, "scale_betas_to_timesteps": True}, 32, ""),
        ({"beta_schedule": "laplace"}, 256, ""),
        ({"beta_schedule": "cosine", "schedule_shift": 8.0}, 512, ""),
    ],
)
def test_a_schedule_that_leaves_signal_is_a_warning(diffusion: dict[str, Any], size: int, sentence: str) -> None:
    config = RunConfig(
        model=ModelConfig(config_file="x"), diffusion=DiffusionConfig(**diffusion), training=TrainingConfig()
    )
    found = " ".join(overlooked_settings(config, (3, size, size)))
    assert sentence in found if sentence else found == ""


@pytest.mark.parametrize("changes", [{"config_file": "x"}, {"overrides": {"block_out_channels": [8, 16]}}])
def test_a_network_that_is_not_a_preset_is_no_warning(changes: dict[str, object]) -> None:
    assert warnings_of((3, 256, 256), **changes) == ""


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_warnings_are_printed_before_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"training__num_steps": 300, "training__learning_rate_warmup_steps": 5000}
    assert train_command([*run_arguments(tmp_path / "run", **changes), "--dry_run"]) == 0
    assert "warning: training.learning_rate_warmup_steps 5,000" in capsys.readouterr().out
