"""Guidance in a part of the steps, and autoguidance: what the networks are asked, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, HeunDiscreteScheduler, UNet2DModel
from oracles import OperationCounter, seeded, tiny_unet

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler


def pipeline(unet: UNet2DModel | None = None, scheduler: Any = None, **extras: Any) -> GaussianDiffusionPipeline:
    pipe = GaussianDiffusionPipeline(
        unet or tiny_unet(num_class_embeds=4), scheduler or GaussianDiffusionScheduler(), **extras
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def batch_sizes(unet: UNet2DModel) -> list[int]:
    """The batch sizes of all later calls of a network."""
    sizes: list[int] = []
    unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


# Guidance interval


@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.5), (0.3, 0.7), (0.25, 0.99), (0.0, 1.0)])
def test_the_interval_selects_the_steps_that_the_guiders_of_diffusers_select(start: float, stop: float) -> None:
    """Other steps evaluate the conditional network only."""
    pipe = pipeline(has_null_label=True)
    sizes = batch_sizes(pipe.unet)
    pipe(2, 10, class_labels=1, guidance_scale=2.0, guidance_interval=(start, stop), output_type="pt")
    assert sizes == [4 if int(start * 10) <= step < int(stop * 10) else 2 for step in range(10)]


def test_a_step_outside_the_interval_is_one_without_guidance() -> None:
    pipe = pipeline(has_null_label=True)
    states: list[torch.Tensor] = []
    options: dict[str, Any] = {
        "class_labels": [0, 2], "output_type": "pt", "eta": 0.0, "guidance_interval": (0, 0.5), "guidance_scale": 3.0,
        "callback_on_step_end": lambda pipe, step, t, tensors: states.append(tensors["sample"]),
    }  # fmt: skip
    pipe(2, 2, seeded(), **options)
    t = pipe.scheduler.timesteps[1]
    with torch.no_grad():
        output = pipe.unet(states[0], t, torch.tensor([0, 2])).sample
    torch.testing.assert_close(states[1], pipe.scheduler.step(output, t, states[0]).prev_sample)


def test_the_interval_of_an_edit_counts_all_steps_and_of_a_second_order_scheduler_each_timestep_once() -> None:
    pipe = pipeline(has_null_label=True)
    sizes = batch_sizes(pipe.unet)
    options: dict[str, Any] = {
        "num_inference_steps": 10, "class_labels": 1, "guidance_scale": 2.0, "guidance_interval": (0.0, 0.6),
        "output_type": "pt",
    }  # fmt: skip
    image = torch.rand(1, 3, 8, 8)
    pipe.denoise_from(image, strength=0.5, **options)
    assert sizes == [2, 1, 1, 1, 1]
    sizes.clear()
    pipe.encode(image, num_iterations=1, **options)
    assert sizes == [1] * 4 + [2] * 6
    sizes.clear()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe(1, **options | {"guidance_interval": (0.0, 0.45)})
    assert sizes == [2] * 7 + [1] * 12


def test_a_guided_step_reads_nothing_from_the_device() -> None:
    """The list of timesteps is read once a call if there is an interval."""
    pipe = pipeline(has_null_label=True)

    def reads(steps: int, **options: Any) -> int:
        with OperationCounter() as counter:
            pipe(1, steps, class_labels=1, eta=0.0, guidance_scale=2.0, output_type="pt", **options)
        return counter.counts["_local_scalar_dense"]

    assert reads(3) == reads(8) == reads(8, guidance_interval=(0.2, 0.8))


# Autoguidance


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_autoguidance_goes_away_from_the_guide(variance_type: str) -> None:
    """D_0 + w (D_1 - D_0) at every step, Eq. 3 of Karras et al. 2024; the variance is that of the model."""
    num_outputs = 6 if variance_type == "learned_range" else 3
    unet, other = (tiny_unet(num_class_embeds=4, out_channels=num_outputs, seed=seed) for seed in (0, 1))
    pipe = pipeline(unet, GaussianDiffusionScheduler(variance_type=variance_type))
    guide = pipeline(other, pipe.scheduler)
    result = pipe(2, 4, seeded(), class_labels=[2, 3], guidance_scale=2.5, guide=guide, output_type="pt").images
    scheduler = GaussianDiffusionScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(4)
    generator, labels = seeded(), torch.tensor([2, 3])
    x = torch.randn(2, 3, 8, 8, generator=generator)
    for t in scheduler.timesteps:
        with torch.no_grad():
            good, bad = unet(x, t, labels).sample, other(x, t, labels).sample
        eps = bad[:, :3] + 2.5 * (good[:, :3] - bad[:, :3])
        x = scheduler.step(torch.cat([eps, good[:, 3:]], 1), t, x, generator=generator).prev_sample
    torch.testing.assert_close(result, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_an_unconditional_model_takes_a_guide_in_an_interval_with_any_scheduler() -> None:
    pipe, guide = pipeline(tiny_unet()), pipeline(tiny_unet(seed=1))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    sizes, sizes_of_guide = batch_sizes(pipe.unet), batch_sizes(guide.unet)
    pipe(2, 10, guidance_scale=2.0, guide=guide, guidance_interval=(0.2, 0.5), output_type="pt")
    assert sizes == [2] * 10
    assert sizes_of_guide == [2] * 3


def test_a_guide_may_be_self_conditioned_and_the_model_not() -> None:
    self_conditioned = pipeline(tiny_unet(in_channels=6, seed=1), self_conditioned=True)
    plain = pipeline(tiny_unet())
    for model, guide in ((plain, self_conditioned), (self_conditioned, plain)):
        assert model(1, 2, guidance_scale=2.0, guide=guide, output_type="pt").images.isfinite().all()


def test_a_guide_is_a_pipeline_of_any_class_or_a_folder(tmp_path: Path) -> None:
    pipe, guide = pipeline(tiny_unet()), pipeline(tiny_unet(seed=1))
    guide.save_pretrained(tmp_path)
    stock = DDPMPipeline(guide.unet, guide.scheduler)
    options: dict[str, Any] = {"guidance_scale": 2.0, "output_type": "pt"}
    images = [pipe(1, 2, seeded(), guide=one, **options).images for one in (guide, stock, tmp_path, str(tmp_path))]
    assert all(torch.equal(images[0], other) for other in images[1:])
    assert not torch.equal(images[0], pipe(1, 2, seeded(), output_type="pt").images)


def test_a_guide_of_other_images_classes_or_noise_is_refused_before_the_network_is_called() -> None:
    names = {"0": "ant", "1": "bee", "2": "cat", "3": "dog"}
    pipe = pipeline(class_names=names)
    sizes = batch_sizes(pipe.unet)
    other = copy.deepcopy(names) | {"2": "cow"}
    v = GaussianDiffusionScheduler(prediction_type="v_prediction")
    for guide, sentence in [
        (
            pipeline(tiny_unet(in_channels=1, out_channels=1, num_class_embeds=4)),
            "images of 1x8x8, but the model of 3x8",
        ),
        (pipeline(tiny_unet(sample_size=16, num_class_embeds=4)), "images of 3x16x16, but the model of 3x8x8"),
        (pipeline(tiny_unet(num_class_embeds=3)), "guide has 3 classes, but the model 4"),
        (pipeline(class_names=other), "class 2 is 'cow' there and 'cat' in the model"),
        (pipeline(scheduler=v), "guide has prediction_type v_prediction, but the model epsilon"),
        (pipeline(scheduler=GaussianDiffusionScheduler(beta_end=0.01)), "other noise levels"),
        (tiny_unet(num_class_embeds=4), "guide is a UNet2DModel; pass a pipeline, or the folder of one"),
        (3, "guide is a int"),
        (Path("missing/of/course"), "guide missing/of/course cannot be loaded"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            pipe(1, 2, class_labels=1, guidance_scale=2.0, guide=guide)
    unconditional = pipeline(tiny_unet())
    with pytest.raises(ValueError, match="guide has 4 classes, but the model 0"):
        unconditional(1, 2, guidance_scale=2.0, guide=pipe)
    with pytest.raises(ValueError, match="class_labels has 3, no class, but the guide has no null label"):
        pipeline(has_null_label=True)(
            1, 2, class_labels=3, guidance_scale=2.0, guide=pipeline(tiny_unet(num_class_embeds=3))
        )
    assert sizes == []


def test_a_guide_that_was_trained_on_other_data_is_refused(tmp_path: Path) -> None:
    """The folders say so; without classes nothing else shows it."""
    for name in ("cats.zip", "dogs.zip"):
        pipeline(tiny_unet()).save_pretrained(tmp_path / name)
        (tmp_path / name / "training_config.yaml").write_text(f"data:\n  source: images/{name}\n")
    pipe = GaussianDiffusionPipeline.from_pretrained(tmp_path / "cats.zip")
    with pytest.raises(ValueError, match=r"guide was trained on dogs\.zip, but the model on cats\.zip"):
        pipe(1, 1, guidance_scale=2.0, guide=tmp_path / "dogs.zip")
    pipe(1, 1, guidance_scale=2.0, guide=tmp_path / "cats.zip")


@pytest.mark.parametrize(
    ("interval", "sentence"),
    [
        ((0.7, 0.2), r"guidance_interval is \(0.7, 0.2\); it must start before it stops"),
        ((0.5, 0.5), "it must start before it stops"),
        ((0.0, 1.5), r"it must be \(start, stop\), two fractions of the steps from 0 to 1"),
        ((200, 700), "two fractions"),
        ((0.1,), "two fractions"),
        (0.5, "two fractions"),
        ("0.1,0.9", "two fractions"),
        (None, "two fractions"),
    ],
)
def test_an_interval_out_of_order_or_range_is_refused(interval: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        pipeline(has_null_label=True)(1, 2, class_labels=0, guidance_scale=2.0, guidance_interval=interval)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"guidance_interval": (0, 0.5)}, "guidance_interval has no effect with guidance_scale 1"),
        ({"guide": "itself"}, "guide has no effect with guidance_scale 1"),
        ({"guidance_interval": (0.7, 0.9), "guidance_scale": 2.0}, "holds none of the 3 steps"),
    ],
)
def test_guidance_without_effect_is_a_warning(options: dict[str, Any], sentence: str) -> None:
    pipe = pipeline(has_null_label=True)
    given = options | ({"guide": pipe} if "guide" in options else {})
    with pytest.warns(UserWarning, match=sentence):
        pipe(1, 3, class_labels=0, output_type="pt", **given)
