"""A student that predicts its targets samples what its teacher samples in twice as many steps."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from ddpm_hf.cli.distill import student_settings
from ddpm_hf.config import ConfigError, DataConfig, DistillationConfig, RunConfig, load_config
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.diffusion.schedule import spaced_timesteps
from ddpm_hf.models import Pretrained, as_student, sampling_scheduler
from ddpm_hf.training.batches import build_timestep_sampler
from ddpm_hf.training.distillation import DistillationLoss, Teacher, load_teacher, teacher_timesteps
from tests.conftest import tiny_unet

T, NUM_STEPS = 64, 4
STUDENT: dict[str, Any] = {
    "data.source": "x",
    "distillation.num_inference_steps": NUM_STEPS,
    "diffusion.num_train_timesteps": T,
    "diffusion.beta_schedule": "cosine",
    "diffusion.prediction_type": "v_prediction",
    "diffusion.clip_sample": False,
    "evaluation.num_samples": 0,
    "preview.every_steps": 0,
}


def random_unet(num_class_embeds: int | None = None, learned_variance: bool = False) -> UNet2DModel:
    """Return a float64 network with predictions of the size of images; that of the paper predicts almost 0."""
    unet = tiny_unet(num_class_embeds, learned_variance=learned_variance)
    with torch.no_grad():
        unet.conv_out.weight.mul_(1e6)
    return unet.double().eval()


def process(prediction_type: str, **options: Any) -> GaussianDiffusionScheduler:
    options = {"num_train_timesteps": T, "beta_schedule": "cosine", "timestep_spacing": "trailing"} | options
    scheduler: GaussianDiffusionScheduler = GaussianDiffusionScheduler.create(
        prediction_type=prediction_type, **options
    )
    return scheduler


def run_ddim(scheduler: DDIMScheduler, predict: Callable[..., torch.Tensor], noise: torch.Tensor, steps: int) -> Any:
    """Return all states of stock DDIM, computed with tables of float64."""
    exact = GaussianDiffusionScheduler.from_config(scheduler.config).noise_schedule.alphas_cumprod
    assert torch.allclose(scheduler.alphas_cumprod.double(), exact, atol=1e-6)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = exact, scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(steps)
    states = [noise]
    for t in scheduler.timesteps:
        output = predict(states[-1], t.expand(len(noise)))
        states.append(scheduler.step(output, t, states[-1], use_clipped_model_output=True).prev_sample)
    return torch.stack(states)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize(("taught", "learned"), [("v", "v"), ("x0", "x0"), ("eps", "v")])
def test_a_perfect_student_samples_what_its_teacher_samples(
    taught: str, learned: str, clip_sample: bool, zero_snr: bool
) -> None:
    """Both by stock DDIMScheduler. To the rounding of float64; epsilon near pure noise is divided by a small alpha."""
    if taught == "eps" and zero_snr:
        return
    unet, theirs = random_unet(), process(taught, clip_sample=clip_sample, rescale_betas_zero_snr=zero_snr)
    ours = process(learned, clip_sample=False, rescale_betas_zero_snr=zero_snr)
    loss = DistillationLoss(ours, teacher=Teacher(unet, theirs), num_inference_steps=NUM_STEPS)
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected = run_ddim(DDIMScheduler.from_config(theirs.config), lambda x, t: unet(x, t)[0], noise, 2 * NUM_STEPS)
        student = sampling_scheduler(ours, DistillationConfig(teacher="x", num_inference_steps=NUM_STEPS))
        found = run_ddim(student, lambda x, t: loss._target(x, x, x, t, None), noise, NUM_STEPS)
    assert expected[-1].abs().max() > 0.1
    torch.testing.assert_close(found, expected[::2], rtol=1e-9, atol=1e-9)


def test_the_guidance_of_the_teacher_is_part_of_the_target() -> None:
    """The teacher is sampled by its own pipeline with that guidance; its variance channels play no part."""
    theirs, ours = process("v_prediction", variance_type="learned_range"), process("v_prediction", clip_sample=False)
    unet = random_unet(4, learned_variance=True)
    teacher = Teacher(unet, theirs, null_label=3, guidance_scale=2.5)
    loss = DistillationLoss(ours, teacher=teacher, num_inference_steps=NUM_STEPS)
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states, labels = [noise], torch.tensor([0, 1, 2])
    pipeline = GaussianDiffusionPipeline(unet, theirs, has_null_label=True)
    pipeline.set_progress_bar_config(disable=True)

    def keep(pipeline: Any, step: int, t: Any, tensors: dict[str, torch.Tensor]) -> None:
        states.append(tensors["sample"])

    options: dict[str, Any] = {"num_inference_steps": 2 * NUM_STEPS, "eta": 0.0, "guidance_scale": 2.5}
    pipeline(sample=noise, class_labels=labels, callback_on_step_end=keep, **options)
    with torch.no_grad():
        student = DDIMScheduler.from_config(ours.config)
        found = run_ddim(student, lambda x, t: loss._target(x, x, x, t, labels), noise, NUM_STEPS)
    torch.testing.assert_close(found, torch.stack(states)[::2], rtol=1e-9, atol=1e-9)


def test_the_teacher_steps_between_the_timesteps_of_the_student() -> None:
    """Also where rounding gives the trailing timesteps of 2n others than those of n."""
    assert teacher_timesteps(4, 1000) == [999, 874, 749, 624, 499, 374, 249, 124]
    assert spaced_timesteps("trailing", 48, 500)[::2] != spaced_timesteps("trailing", 24, 500)
    for num_steps, total in ((24, 500), (1, 2), (500, 1000)):
        chosen = teacher_timesteps(num_steps, total)
        assert chosen[::2] == spaced_timesteps("trailing", num_steps, total)
        assert chosen == sorted(set(chosen), reverse=True)


@pytest.mark.parametrize("sampling", ["uniform", "antithetic", "loss_aware"])
def test_a_student_is_trained_at_its_own_timesteps(sampling: str) -> None:
    settings = STUDENT | {"distillation.teacher": "x", "objective.timestep_sampling": sampling}
    sampler = build_timestep_sampler(load_config(settings))
    own = set(spaced_timesteps("trailing", NUM_STEPS, T))
    assert set(np.concatenate([sampler.draw(step).timesteps for step in range(3)])) == own
    if sampling == "loss_aware":
        timesteps = torch.tensor(sorted(own)).repeat(10)
        sampler.record(timesteps, torch.where(timesteps == max(own), 9.0, 1.0))
        draws = np.concatenate([sampler.draw(step).timesteps for step in range(20)])
        assert 0.6 < (draws == max(own)).mean() < 0.9  # 9 of 12


def test_a_student_starts_from_the_outputs_and_labels_that_it_keeps() -> None:
    unet = random_unet(4, learned_variance=True).float()
    teacher = Pretrained("x", unet, process("epsilon", variance_type="learned_range"), None, has_null_label=True)
    student = as_student(teacher, "v_prediction", has_null_label=False)
    assert (student.unet.config.num_class_embeds, student.unet.config.out_channels) == (3, 1)
    assert student.scheduler is not None
    assert student.scheduler.config["prediction_type"] == "v_prediction"
    x, t, labels = torch.ones(3, 1, 8, 8), torch.tensor([5, 6, 7]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        assert torch.equal(student.unet.eval()(x, t, labels)[0], unet(x, t, labels)[0][:, :1])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "epsilon": ({"diffusion.prediction_type": "epsilon"}, "cannot be distilled"),
    "augmented": ({"data.augmentation": 0.1}, "data.augmentation is 0.1, but a student"),
    "clipped": ({"diffusion.clip_sample": True}, "diffusion.clip_sample is true, but a student"),
    "steps": ({"distillation.num_inference_steps": 33}, "needs 66 steps of the teacher"),
    "previews": ({"preview.every_steps": 5, "preview.eta": 0.0}, "preview.num_inference_steps is 20"),
    "variance": ({"diffusion.variance_type": "learned_range", "objective.loss": "hybrid"}, "trains a variance"),
    "guided": ({"distillation.guidance_scale": 2.0, "objective.class_dropout": 0.1, "model.class_conditional": True},
               "cannot be guided again"),
    "unlabeled": ({"distillation.guidance_scale": 2.0}, "needs labels"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_a_student_cannot_have_are_refused(changes: dict[str, Any], message: str) -> None:
    load_config(STUDENT | {"distillation.teacher": "x"})
    with pytest.raises(ConfigError, match=message):
        load_config(STUDENT | {"distillation.teacher": "x"} | changes)


def saved_teacher(folder: Path, scheduler: GaussianDiffusionScheduler, **options: Any) -> RunConfig:
    """Save a pipeline and return the configuration of its student."""
    has_null_label = options.pop("has_null_label", False)
    latents = {name: options.pop(name, None) for name in ("latents_mean", "latents_std")}
    unet = tiny_unet(options.pop("num_labels", None), **options)
    extras = latents | {"has_null_label": has_null_label, "self_conditioned": options.get("self_conditioned", False)}
    GaussianDiffusionPipeline(unet, scheduler, **extras).save_pretrained(folder)
    return load_config(STUDENT | {"distillation.teacher": str(folder)})


def load(config: RunConfig, num_classes: int = 0) -> Teacher:
    ours = process("v_prediction", clip_sample=False)
    return load_teacher(config, ours, 1, num_classes, torch.device("cpu"))


UNSUITABLE: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "epsilon at zero terminal SNR": (
        {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, {}, {}, "another noise schedule"),
    "schedule": ({"beta_schedule": "linear"}, {}, {}, "another noise schedule"),
    "self-conditioned": ({}, {"self_conditioned": True}, {}, "is self-conditioned"),
    "classes": ({}, {"num_labels": 3}, {}, "has 3 classes, but the student has none"),
    "guidance": ({}, {}, {"distillation.guidance_scale": 2.0}, "distillation.guidance_scale 2 needs a teacher"),
}  # fmt: skip


@pytest.mark.parametrize(("process_options", "network", "changes", "message"), UNSUITABLE.values(), ids=UNSUITABLE)
def test_a_teacher_that_a_student_cannot_learn_from_is_refused(
    process_options: dict[str, Any], network: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    scheduler = process(**{"prediction_type": "v_prediction"} | process_options)
    config = saved_teacher(tmp_path / "teacher", scheduler, **network)
    for name, value in changes.items():
        section, setting = name.split(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{setting: value})}
        )
    with pytest.raises(ConfigError, match=message):
        load(config)


def test_epsilon_without_signal_is_refused(tmp_path: Path) -> None:
    theirs = process("epsilon", rescale_betas_zero_snr=True)
    config = saved_teacher(tmp_path / "teacher", theirs)
    with pytest.raises(ConfigError, match="predicts epsilon, but its last timestep holds no signal"):
        load_teacher(config, process("v_prediction", rescale_betas_zero_snr=True), 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(("theirs", "ours"), [(None, [0.0]), ([0.0], None), ([0.0], [0.3])])
def test_a_teacher_of_latents_of_another_normalization_is_refused(
    theirs: list[float] | None, ours: list[float] | None, tmp_path: Path
) -> None:
    scheduler = process("v_prediction", clip_sample=False)
    config = saved_teacher(tmp_path / "teacher", scheduler, latents_mean=theirs, latents_std=theirs and [1.0])
    latents = {"latents_mean": ours, "latents_std": ours and [1.0]}
    with pytest.raises(ConfigError, match="latents of another mean"):
        load_teacher(config, scheduler, 1, 0, torch.device("cpu"), latents=latents)


def test_a_student_teaches_half_its_steps_with_the_guidance_that_it_has(tmp_path: Path) -> None:
    settings = DistillationConfig(teacher="x", num_inference_steps=8, guidance_scale=2.0)
    student = sampling_scheduler(process("v_prediction", clip_sample=False), settings)
    GaussianDiffusionPipeline(tiny_unet(3), student).save_pretrained(tmp_path / "steps_8")
    labels = {"distillation.teacher": str(tmp_path / "steps_8"), "model.class_conditional": True}
    teacher = load(load_config(STUDENT | labels | {"distillation.guidance_scale": 2.0}), 3)
    assert (teacher.guidance_scale, teacher.null_label) == (1.0, None)
    with pytest.raises(ConfigError, match=r"with guidance of scale 2, .* set it to 2"):
        load(load_config(STUDENT | labels), 3)
    with pytest.raises(ConfigError, match=r"samples in 8 steps, .* set it to 4"):
        load(
            load_config(STUDENT | labels | {"distillation.num_inference_steps": 2, "distillation.guidance_scale": 2}), 3
        )


def test_a_student_of_an_augmented_run_is_trained_on_images_as_they_are() -> None:
    settings = RunConfig(data=DataConfig(augmentation=0.12, augmentation_transforms=["hue"])).to_dict()
    assert student_settings(settings, 4)["data"] == RunConfig().to_dict()["data"]


def test_a_run_is_not_continued_with_another_teacher() -> None:
    ours = process("v_prediction", clip_sample=False)
    one, other = (Teacher(tiny_unet(), ours, sha256=digest) for digest in "ab")
    losses = [DistillationLoss(ours, teacher=teacher, num_inference_steps=NUM_STEPS) for teacher in (one, other)]
    losses[0].load_state_dict(json.loads(json.dumps(losses[0].state_dict())))
    with pytest.raises(ConfigError, match="other weights than when this run began"):
        losses[1].load_state_dict(losses[0].state_dict())


def test_diffusers_warns_of_other_keys_only() -> None:
    """A pipeline reads the keys of a student, which a stock scheduler would say that it ignores."""
    records: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("diffusers.configuration_utils")
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    config = dict(process("v", clip_sample=False).config)
    try:
        student = DDIMScheduler.from_config(
            config | {"default_num_inference_steps": 4, "distilled_guidance_scale": 2.0}
        )
        assert records == []
        DDIMScheduler.from_config(config | {"default_num_inference_steps": 4, "mistake": 4})
    finally:
        logger.removeHandler(handler)
    assert student.config["default_num_inference_steps"] == 4
    assert [record.levelname for record in records] == ["WARNING"]
