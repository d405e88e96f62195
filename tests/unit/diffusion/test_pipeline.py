"""The pipeline: outputs, randomness, guidance, schedulers of diffusers, precision, callbacks and errors."""

import copy
import functools
import inspect
import itertools
import math
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from oracles import GaussianData, OperationCounter, seeded, tiny_unet

from ddpm_hf.cli.flags import SamplingFlags
from ddpm_hf.config import ConfigError
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.diffusion.images import to_images
from ddpm_hf.diffusion.pipeline import ClassNumbers, check_generator, check_process, copy_scheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def pipeline(unet: UNet2DModel | None = None, scheduler: Any = None, **extras: Any) -> GaussianDiffusionPipeline:
    """A quiet pipeline of tiny parts."""
    pipe = GaussianDiffusionPipeline(unet or tiny_unet(), scheduler or GaussianDiffusionScheduler(), **extras)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def conditional(**changes: Any) -> GaussianDiffusionPipeline:
    """Three classes and a null label."""
    return pipeline(tiny_unet(num_class_embeds=4, **changes), has_null_label=True)


def record_calls(unet: UNet2DModel) -> list[dict[str, Any]]:
    """The inputs of every later call of the network."""
    calls: list[dict[str, Any]] = []

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.append({"sample": args[0].clone(), "t": args[1], **kwargs})

    unet.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


# Outputs


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_output_types_show_the_same_oblong_images(channels: int, mode: str) -> None:
    """uint8 and PIL are the float images rounded; exact."""
    pipe = pipeline(tiny_unet(in_channels=channels, out_channels=channels, sample_size=(8, 12)))
    images = {kind: pipe(2, 3, seeded(), output_type=kind).images for kind in ("pil", "np", "pt", "uint8")}
    assert images["pt"].shape == (2, channels, 8, 12)
    assert images["pt"].dtype == torch.float32
    assert 0 <= images["pt"].min() < images["pt"].max() <= 1
    assert np.array_equal(images["np"], images["pt"].permute(0, 2, 3, 1).numpy())
    assert images["uint8"].dtype == np.uint8
    assert np.array_equal(images["uint8"], (images["np"] * 255).round())
    assert [image.mode for image in images["pil"]] == [mode, mode]
    assert images["pil"][0].size == (12, 8)
    assert np.array_equal(np.stack([np.asarray(image) for image in images["pil"]]), images["uint8"].squeeze())


def test_the_number_of_images_defaults_to_that_of_labels_generators_or_start_samples() -> None:
    pipe = conditional()
    options: dict[str, Any] = {"num_inference_steps": 1, "output_type": "numpy"}
    noise = torch.zeros(2, 3, 8, 8)
    assert len(pipe(class_labels=1, **options).images) == 1
    assert len(pipe(class_labels=torch.tensor(1), **options).images) == 1
    assert len(pipe(class_labels=[0, 1, 2], **options).images) == 3
    assert len(pipe(class_labels=1, generator=[seeded(), seeded(1)], **options).images) == 2
    assert len(pipe(class_labels=1, sample=noise, **options).images) == 2
    assert len(pipe(3, class_labels=1, **options).images) == 3


def test_images_of_any_number_of_channels_are_returned_as_arrays() -> None:
    pipe = pipeline(tiny_unet(in_channels=5, out_channels=5))
    assert pipe(1, 2, output_type="np").images.shape == (1, 8, 8, 5)
    with pytest.raises(ValueError, match="pil cannot show images of 5 channels; use np"):
        pipe(1, 2)


def test_results_are_an_object_or_a_tuple_of_tensors_that_autograd_accepts() -> None:
    """Inference tensors would raise in autograd."""
    pipe = pipeline()
    images = pipe(1, 2, seeded(), output_type="pt").images
    assert torch.equal(pipe(1, 2, seeded(), output_type="pt", return_dict=False)[0], images)
    assert len(pipe(1, 2, output_type="pt", return_dict=False)) == 1
    assert len(pipe(1, 2, output_type="pt", return_dict=False, return_trajectory=True)) == 2
    assert not images.requires_grad
    assert not images.is_inference()


def test_the_trajectory_goes_from_the_start_noise_to_the_images() -> None:
    pipe = pipeline()
    start = torch.randn(2, 3, 8, 8, generator=seeded())
    result = pipe(2, 4, seeded(), sample=start, output_type="pt", return_trajectory=True)
    assert result.trajectory.shape == (5, 2, 3, 8, 8)
    assert torch.equal(result.trajectory[0], (start / 2 + 0.5).clamp(0, 1))
    assert torch.equal(result.trajectory[-1], result.images)
    assert pipe(2, 4, output_type="pt").trajectory is None


def test_the_number_of_steps_defaults_to_that_of_training() -> None:
    pipe = pipeline(scheduler=GaussianDiffusionScheduler(num_train_timesteps=7))
    calls = record_calls(pipe.unet)
    pipe(output_type="pt")
    assert [int(call["t"]) for call in calls] == [6, 5, 4, 3, 2, 1, 0]
    calls.clear()
    pipe(timesteps=[5, 2], output_type="pt")
    assert [int(call["t"]) for call in calls] == [5, 2]
    calls.clear()
    pipe(num_inference_steps=3, timestep_spacing="quadratic", output_type="pt")
    assert [int(call["t"]) for call in calls] == [6, 2, 0]


def test_optimized_timesteps_are_used_by_name(tmp_path: Path) -> None:
    """With any scheduler; UniPC and DEIS, whose own `set_timesteps` takes no list, run one as they run their number."""
    pipe = pipeline()
    lists = {"GaussianDiffusionScheduler(eta=0)": {"3": [999, 400, 70]}, "UniPCMultistepScheduler": {"2": [999, 300]}}
    pipe.register_to_config(optimized_timesteps=lists | {"DEISMultistepScheduler": {"1": [999], "2": [999, 100]}})
    start = torch.randn(2, 3, 8, 8, generator=seeded())

    def run(scheduler: Any = None, **options: Any) -> torch.Tensor:
        pipe.scheduler = pipe.scheduler if scheduler is None else scheduler.from_config(pipe.scheduler.config)
        images: torch.Tensor = pipe(sample=start, output_type="pt", **options).images
        return images

    expected = run(timesteps=[999, 400, 70], eta=0.0)
    assert torch.equal(run(timestep_spacing="optimized"), expected)
    assert torch.equal(run(timestep_spacing="optimized", num_inference_steps=3, eta=0.0), expected)
    pipe.save_pretrained(tmp_path)
    assert type(diffusers.DDPMPipeline.from_pretrained(tmp_path).scheduler) is diffusers.DDPMScheduler
    loaded = GaussianDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded(sample=start, output_type="pt", timestep_spacing="optimized").images, expected)
    for scheduler in (diffusers.UniPCMultistepScheduler, diffusers.DEISMultistepScheduler):
        by_number = run(scheduler, num_inference_steps=4)
        assert torch.equal(run(timesteps=pipe.scheduler.timesteps.tolist()), by_number)
    with pytest.raises(ValueError, match="for several numbers of steps; pass num_inference_steps, one of 1, 2"):
        run(timestep_spacing="optimized")
    for options, sentence in (
        ({"num_inference_steps": 4}, r"for UniPCMultistepScheduler in 4 steps \(only for GaussianDiffusionScheduler"),
        ({"timesteps": [999]}, "drop one of the two"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(diffusers.UniPCMultistepScheduler, timestep_spacing="optimized", **options)
    with pytest.raises(ValueError, match="use_karras_sigmas does not go with a list"):
        pipe.scheduler.register_to_config(use_karras_sigmas=True)
        run(timesteps=[999, 5])
    with pytest.raises(ValueError, match="optimized_timesteps cannot be used"):
        GaussianDiffusionPipeline(pipe.unet, pipe.scheduler, optimized_timesteps={"x": {"2": [5]}})


# Randomness


def test_an_image_depends_on_its_own_generator_whatever_its_batch() -> None:
    """1e-4: convolutions may add in another order in another batch."""
    pipe = pipeline()
    together = pipe(3, 10, [seeded(i) for i in range(3)], output_type="pt").images
    for order in ([2], [1, 2], [2, 0, 1]):
        images = pipe(len(order), 10, [seeded(i) for i in order], output_type="pt").images
        torch.testing.assert_close(images, together[order], rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().max().item() > 0.1


def test_the_global_generator_is_not_touched_when_one_is_given() -> None:
    before = torch.get_rng_state()
    pipeline()(2, 3, seeded(), output_type="pt")
    assert torch.equal(torch.get_rng_state(), before)


def test_eta_is_passed_on_and_left_to_the_scheduler_by_default() -> None:
    pipe = pipeline()
    start = torch.randn(1, 3, 8, 8, generator=seeded())

    def images(seed: int, **arguments: float) -> torch.Tensor:
        return pipe(1, 5, seeded(seed), sample=start, output_type="pt", **arguments).images

    assert torch.equal(images(1), images(1, eta=1.0))
    assert not torch.equal(images(1), images(2))
    assert torch.equal(images(1, eta=0.0), images(2, eta=0.0))


# Labels and guidance


def manual_guidance(pipe: GaussianDiffusionPipeline, labels: list[int], scale: float, rescale: float) -> torch.Tensor:
    """Two calls of the network a step, written out."""
    scheduler = GaussianDiffusionScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(4)
    generator = seeded()
    x = torch.randn(len(labels), 3, 8, 8, generator=generator)
    null = torch.full((len(labels),), pipe.num_classes)
    for t in scheduler.timesteps:
        with torch.no_grad():
            conditional_output = pipe.unet(x, t, torch.tensor(labels)).sample
            null_output = pipe.unet(x, t, null).sample
        conditional_eps, null_eps = conditional_output[:, :3], null_output[:, :3]
        eps = null_eps + scale * (conditional_eps - null_eps)
        ratio = torch.stack([c.std() / g.std() for c, g in zip(conditional_eps, eps, strict=True)])
        eps = rescale * eps * ratio[:, None, None, None] + (1 - rescale) * eps
        output = torch.cat([eps, conditional_output[:, 3:]], 1)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(("scale", "rescale"), [(0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (3.0, 0.7)])
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_guidance_is_null_plus_scale_times_difference(scale: float, rescale: float, variance_type: str) -> None:
    """1e-4: one call for both halves may add in another order than two. The variance is the conditional half's."""
    pipe = conditional(out_channels=6 if variance_type == "learned_range" else 3)
    pipe.scheduler = GaussianDiffusionScheduler(variance_type=variance_type)
    result = pipe(
        2, 4, seeded(), class_labels=[2, 0], guidance_scale=scale, guidance_rescale=rescale, output_type="pt"
    ).images
    torch.testing.assert_close(result, manual_guidance(pipe, [2, 0], scale, rescale), rtol=0, atol=1e-4)


def test_guidance_calls_the_network_once_a_step_with_twice_the_batch() -> None:
    pipe = conditional()
    calls = record_calls(pipe.unet)
    pipe(2, 3, class_labels=1, output_type="pt")
    assert [len(call["sample"]) for call in calls] == [2, 2, 2]
    calls.clear()
    pipe(2, 3, class_labels=1, guidance_scale=2.0, output_type="pt")
    assert [len(call["sample"]) for call in calls] == [4, 4, 4]
    assert calls[0]["class_labels"].tolist() == [1, 1, 3, 3]


def test_labels_may_be_numbers_names_or_tensors() -> None:
    pipe = pipeline(tiny_unet(num_class_embeds=2), class_names={"0": "cat", "1": "dog"})
    calls = record_calls(pipe.unet)
    for given in ([1, 1], 1, "dog", ["dog", 1], (1, 1), torch.tensor([1, 1]), torch.tensor(1), np.array([1, 1])):
        pipe(2, 1, class_labels=given, output_type="pt")
        assert calls[-1]["class_labels"].tolist() == [1, 1], given


NAMES_AND_LABELS = [
    # As version 0.1 sorted class folders, and from 1: a number is a name.
    (["0", "1", "10", "2"], {2: 3, "2": 3, 10: 2, "10": 2, 0: 0, 4: 4, "4": 4, 3: None, "11": None}),
    (["1", "2", "3"], {1: 0, "1": 0, 3: 2, "3": 2, "03": 2, 0: None, 4: None}),
    (["07", "7", "8"], {7: 1, "7": 1, "07": 0, "8": 2, 8: 2, 0: None}),
    # With other names, a number is one if it is no name.
    (["2", "cat", "dog"], {2: 0, "2": 0, 1: 1, "1": 1, "dog": 2, 3: 3, "3": 3, 4: None, "²": None}),
    ([], {0: 0, "0": 0, 2: 2, "2": 2, 3: 3, "3": 3, "4": None, "-1": None, "": None}),
]


@pytest.mark.parametrize(("names", "expected"), NAMES_AND_LABELS)
def test_a_label_is_a_name_before_it_is_a_number(names: list[str], expected: dict[int | str, int | None]) -> None:
    """The same in Python, as a number and as text, and on the command line."""
    unet = tiny_unet(num_class_embeds=(len(names) or 3) + 1)
    class_names = {str(number): name for number, name in enumerate(names)}
    pipe = pipeline(unet, class_names=class_names or None, has_null_label=True)
    calls = record_calls(pipe.unet)
    for label, number in expected.items():
        flags = SamplingFlags(labels=str(label))
        if number is None:
            with pytest.raises(ValueError, match="class_labels has"):
                pipe(1, 1, class_labels=[label])
            with pytest.raises(ConfigError):
                flags.label_list(pipe)
        else:
            for given in (label, [label], np.array([label])):
                pipe(1, 1, class_labels=given, output_type="pt")
                assert calls[-1]["class_labels"].tolist() == [number], label
            assert flags.label_list(pipe) == [number]
    pipe(class_labels=ClassNumbers([1]), num_inference_steps=1)
    assert calls[-1]["class_labels"].tolist() == [1]


def test_an_unknown_label_is_answered_with_the_names_in_the_order_of_their_numbers() -> None:
    names = {str(number): f"c{number}" for number in range(11)}
    with pytest.raises(ValueError, match="or a name: c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10"):
        pipeline(tiny_unet(num_class_embeds=11), class_names=dict(sorted(names.items())))(1, 1, class_labels="x")
    with pytest.raises(ValueError, match=r"has 0; a label is the name of a class: 1, 2\."):
        pipeline(tiny_unet(num_class_embeds=2), class_names={"0": "1", "1": "2"})(1, 1, class_labels=0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "class-conditional: pass class_labels, numbers from 0 to 2"),
        ({"class_labels": 4}, "has 4; a label is a whole number 0 to 2, 3 for no class"),
        ({"class_labels": [0, -1]}, "has -1; a label is"),
        ({"class_labels": [0.5, 1]}, "has 0.5; a label is"),
        ({"class_labels": True}, "has True; a label is"),
        ({"class_labels": "cat"}, "has 'cat'; a label is a whole number 0 to 2, 3 for no class."),
        ({"class_labels": [0, 1, 2]}, "3 entries for batch_size 2"),
    ],
)
def test_labels_that_do_not_fit_are_rejected(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        conditional()(2, 2, **arguments)


NOISE = torch.zeros(2, 3, 8, 8)
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"generator": 42}, r"generator is 42; pass torch.Generator\(\).manual_seed\(42\), or a list"),
    ({"generator": np.int64(42)}, r"pass torch.Generator\(\).manual_seed\(42\)"),
    ({"generator": (seeded(), seeded(1))}, r"generator is \(<torch.*; pass"),
    ({"generator": np.random.default_rng(0)}, r"generator is Generator\(PCG64\)"),
    ({"generator": [seeded(), 1]}, "generator has 1; pass"),
    ({"generator": [seeded()]}, "list of 1 for 2 images"),
    ({"generator": []}, "list of 0 for 2 images"),
    ({"class_labels": torch.zeros(2, 1, dtype=torch.long)}, r"has shape \(2, 1\).*flatten\(\) for a column"),
    ({"class_labels": np.eye(3, dtype=int)[:2]}, r"has shape \(2, 3\).*argmax\(1\) for one-hot"),
    ({"class_labels": [[0], [1]]}, r"has \[0\]; a label is a whole number"),
    ({"class_labels": [None, 1]}, "has None; a label is a whole number 0 to 2, 3 for no class"),
    ({"class_labels": 1.0}, "has 1.0; a label is"),
    ({"class_labels": [1.0, 0]}, "has 1.0; a label is"),
    ({"class_labels": torch.ones(2)}, "has 1.0; a label is"),
    ({"class_labels": [math.nan, 0]}, "has nan; a label is"),
    ({"class_labels": b"cat"}, "has b'cat'; a label is"),
    ({"class_labels": {"cat": 1}}, "has {'cat': 1}; a label is"),
    ({"class_labels": np.bool_(True)}, "has True; a label is"),
    ({"class_labels": torch.tensor([True, False])}, "has True; a label is"),
    ({"class_labels": []}, "0 entries for batch_size 2"),
    ({"class_labels": None}, "pass class_labels"),
    ({"guidance_scale": None}, "guidance_scale is None; it must be a finite number"),
    ({"guidance_scale": math.nan}, "guidance_scale is nan"),
    ({"guidance_scale": math.inf}, "guidance_scale is inf"),
    ({"guidance_scale": "3"}, "guidance_scale is '3'"),
    ({"guidance_scale": True}, "guidance_scale is True"),
    ({"guidance_scale": [1, 2]}, r"guidance_scale is \[1, 2\]"),
    ({"guidance_scale": 1j}, "guidance_scale is 1j"),
    ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5; it must be a number from 0 to 1"),
    ({"guidance_rescale": None}, "guidance_rescale is None"),
    ({"num_inference_steps": 0}, "num_inference_steps 0 is not between 1 and 1000"),
    ({"num_inference_steps": -3}, "num_inference_steps -3 is not between"),
    ({"num_inference_steps": 1001}, "num_inference_steps 1001 is not between"),
    ({"num_inference_steps": 1.5}, "num_inference_steps is 1.5; it must be a whole number"),
    ({"num_inference_steps": "50"}, "num_inference_steps is '50'"),
    ({"num_inference_steps": True}, "num_inference_steps is True"),
    ({"num_inference_steps": np.bool_(True)}, "num_inference_steps is"),
    ({"timesteps": []}, "timesteps is empty"),
    ({"timesteps": [1, 5]}, "timesteps must be strictly descending"),
    ({"timesteps": torch.tensor([5, 5])}, "timesteps must be strictly descending"),
    ({"timesteps": np.array([1000, 5])}, "timesteps run from 1000 to 5, outside 0 ... 999"),
    ({"timesteps": [5, -1]}, "timesteps run from 5 to -1"),
    ({"timesteps": [9.5, 1]}, "A timestep is 9.5; it must be a whole number"),
    ({"timesteps": 5}, "timesteps is 5; it must be a list"),
    ({"timesteps": "95"}, "A timestep is '9'"),
    ({"timesteps": [5, 2], "num_inference_steps": 2}, "not both"),
    ({"timestep_spacing": "even"}, "timestep_spacing 'even' is unknown"),
    ({"output_type": "jpg"}, "'jpg' is not one of pil, np, pt, uint8"),
    ({"output_type": None}, "None is not one of"),
    ({"return_dict": "no"}, "return_dict is 'no'; it must be True or False"),
    ({"return_trajectory": None}, "return_trajectory is None"),
    ({"callback_on_step_end": "print"}, "callback_on_step_end is 'print'; it must be a function"),
    ({"callback_on_step_end": lambda step, t, tensors: None}, r"a function of \(pipeline, step, timestep, tensors\)"),
    ({"callback_on_step_end_tensor_inputs": "sample"}, "inputs is 'sample'; choose from .*, in a list"),
    ({"callback_on_step_end_tensor_inputs": None}, "inputs is None; choose from"),
    ({"callback_on_step_end_tensor_inputs": ["latents"]}, r"inputs has \['latents'\]; choose from"),
    ({"steps": 5}, r"has no argument 'steps' \(did you mean 'num_inference_steps'\?\)"),
    ({"guidance": 5}, r"has no argument 'guidance' \(did you mean 'guidance_scale'\?\)"),
    ({"prompt": "a cat"}, r"has no argument 'prompt'\."),
]
MISTAKES_OF_THE_CALL: list[tuple[dict[str, Any], str]] = [
    ({"eta": math.nan}, "eta is nan; it must be a number from 0 to 1"),
    ({"eta": -0.1}, "eta is -0.1"),
    ({"eta": "0"}, "eta is '0'"),
    ({"batch_size": 0}, "batch_size is 0; it must be a whole number, at least 1"),
    ({"batch_size": -1}, "batch_size is -1"),
    ({"batch_size": 1.5}, "batch_size is 1.5; it must be a whole number"),
    ({"batch_size": True}, "batch_size is True"),
    ({"batch_size": "2"}, "batch_size is '2'"),
    ({"batch_size": seeded()}, "batch_size is <torch"),
    ({"sample": NOISE.numpy()}, "sample is a ndarray; it must be a tensor of floating-point numbers"),
    ({"sample": NOISE.tolist()}, "sample is a list; it must be"),
    ({"sample": NOISE.long()}, "sample is a tensor of torch.int64; it must be"),
    ({"sample": NOISE / 0}, "sample has values that are not finite"),
    ({"sample": NOISE[..., :7]}, "sample is 8 x 7 pixels, but the network needs multiples of 2"),
    ({"sample": NOISE[:, :1]}, r"sample has shape \(2, 1, 8, 8\); it must be \(2, 3, height"),
    ({"sample": NOISE[:1]}, r"it must be \(2, 3, height"),
    ({"sample": NOISE[0, 0, 0, 0]}, r"sample has shape \(\); it must be"),
    ({"latents": NOISE}, r"has no argument 'latents' \(did you mean 'sample'\?\)"),
    ({"seed": 0}, r"has no argument 'seed' \(did you mean 'generator'\?\)"),
]


@pytest.mark.parametrize("method", ["__call__", "denoise_from", "interpolate", "inpaint", "encode"])
def test_every_mistake_in_the_arguments_is_a_sentence_before_the_network_is_called(method: str) -> None:
    pipe, image = conditional(), torch.rand(2, 3, 8, 8)
    images = {"__call__": (), "interpolate": (image, image), "inpaint": (image, torch.ones(8, 8))}.get(method, (image,))
    mistakes = MISTAKES + (MISTAKES_OF_THE_CALL if method == "__call__" else [])
    calls = record_calls(pipe.unet)
    for arguments, sentence in mistakes:
        options = {"batch_size": 2} if method == "__call__" else {}
        with pytest.raises(ValueError, match=sentence):
            getattr(pipe, method)(*images, **options | {"class_labels": 0} | arguments)
    assert calls == []


class GeneratorOnGpu(torch.Generator):
    """A generator that says it is on a GPU."""

    device = torch.device("cuda", 0)


def test_generators_must_be_on_the_cpu_or_on_the_device_of_the_network() -> None:
    cpu, gpus = torch.device("cpu"), [torch.device("cuda", index) for index in (0, 1)]
    check_generator([seeded(), seeded()], 2, gpus[0])
    check_generator(GeneratorOnGpu(), 1, gpus[0])
    check_generator(GeneratorOnGpu(), 1, torch.device("cuda"))
    for generator, device, sentence in (
        ([seeded(), GeneratorOnGpu()], gpus[0], "a list on cpu and cuda:0; create all of them on one device"),
        (GeneratorOnGpu(), cpu, "on cuda:0, but the network on cpu; create it on the CPU or there"),
        ([GeneratorOnGpu()] * 2, gpus[1], "on cuda:0, but the network on cuda:1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check_generator(generator, 2, device)


def test_numbers_may_be_of_any_type() -> None:
    pipe = conditional()
    x, two = torch.rand(2, 3, 8, 8, generator=seeded()), np.int64(2)
    plain: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 2, "guidance_scale": 3.0, "eta": 0.5}
    typed: dict[str, Any] = {
        "class_labels": [np.int64(1), torch.tensor(2)],
        "num_inference_steps": torch.tensor(2),
        "guidance_scale": np.float32(3),
        "eta": np.float64(0.5),
    }
    results = [
        [
            pipe(two, **options).images,
            pipe.denoise_from(x, half, **options).images,
            pipe.interpolate(x, 1 - x, [half], half, **options).images,
            pipe.interpolate(x, 1 - x, half, half, **options).images,
            pipe.inpaint(x, torch.ones(8, 8), two, two, **options).images,
            pipe.encode(x, two, **{name: value for name, value in options.items() if name != "eta"}),
        ]
        for half, options in (
            (0.5, plain | {"output_type": "pt", "generator": [seeded(), seeded(1)]}),
            (np.float32(0.5), typed | {"output_type": "pt", "generator": [seeded(), seeded(1)]}),
        )
    ]
    assert all(map(torch.equal, *results))
    size = pipeline(tiny_unet(sample_size=np.int64(8)))
    listed = [
        size(1, None, seeded(), timesteps=given, output_type="pt").images
        for given in ([700, 2], (700, 2), np.array([700, 2]), torch.tensor([700, 2]), [700.0, 2.0])
    ]
    assert all(torch.equal(images, listed[0]) for images in listed)


def test_positional_arguments_may_have_the_order_of_ddpm_pipeline() -> None:
    pipe = pipeline()
    expected = pipe(batch_size=2, num_inference_steps=3, generator=seeded(), output_type="pt").images
    for arguments, options in (
        ((2, 3, seeded()), {"output_type": "pt"}),
        ((2, seeded(), 3, "pt"), {}),
        ((2, seeded()), {"num_inference_steps": 3, "output_type": "pt"}),
    ):
        assert torch.equal(pipe(*arguments, **options).images, expected)
    assert pipe(2, [seeded(), seeded(1)], 1, "np", False)[0].shape == (2, 8, 8, 3)
    calls = record_calls(pipe.unet)
    pipe(2, None, 3)
    assert len(calls) == 3
    with pytest.raises(ValueError, match="num_inference_steps is 'three'"):
        pipe(2, seeded(), "three")
    with pytest.raises(TypeError, match="6 positional arguments, but DDPMPipeline has 5"):
        pipe(2, seeded(), 3, "pt", True, 0)
    with pytest.raises(TypeError, match="multiple values"):
        pipe(2, seeded(), 3, generator=seeded())


@pytest.mark.parametrize("assigned", [False, True])
@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda unet: torch.compile(torch.nn.DataParallel(unet))])
def test_a_network_in_data_parallel_is_taken_out_of_it(
    wrap: Callable[[UNet2DModel], Any], assigned: bool, tmp_path: Path
) -> None:
    """A pipeline has one device. DistributedDataParallel is the same case, in a process group."""
    unet, scheduler = tiny_unet(), GaussianDiffusionScheduler()
    pipe = GaussianDiffusionPipeline(unet if assigned else wrap(unet), scheduler)
    if assigned:
        pipe.unet = wrap(unet)
    assert pipe.unet is unet
    pipe.save_pretrained(tmp_path)
    assert pipe.config.unet == ("diffusers", "UNet2DModel")


def test_anything_else_than_a_network_is_rejected() -> None:
    for other in (None, torch.nn.Conv2d(3, 3, 3), lambda x, t: x):
        with pytest.raises(ValueError, match=r"unet is a \w+; it must be a UNet2DModel"):
            GaussianDiffusionPipeline(other, GaussianDiffusionScheduler())


def test_unsupported_arguments_are_rejected_before_the_network_is_called() -> None:
    unconditional, unguided = pipeline(), pipeline(tiny_unet(num_class_embeds=3))
    no_size = pipeline(tiny_unet(sample_size=None))
    ddim, euler, pndm = pipeline(), pipeline(), pipeline(scheduler=diffusers.PNDMScheduler())
    ddim.scheduler = DDIMScheduler.from_config(ddim.scheduler.config)
    euler.scheduler = EulerDiscreteScheduler.from_config(euler.scheduler.config)
    rejected: list[tuple[GaussianDiffusionPipeline, dict[str, Any], str]] = [
        (unconditional, {"class_labels": 0}, "unconditional; leave them out"),
        (unconditional, {"guidance_scale": 2.0}, "no null label to guide against"),
        (unguided, {"class_labels": 0, "guidance_scale": 2.0}, "no null label to guide against"),
        (no_size, {}, "no sample_size; pass start noise as sample"),
        (euler, {"eta": 0.5}, "EulerDiscreteScheduler has no eta"),
        (pndm, {"num_inference_steps": 3}, r"PNDMScheduler cannot run num_inference_steps 3 \(.*\); change it"),
        (ddim, {"num_inference_steps": 0}, "num_inference_steps 0 is not between 1 and 1000"),
        (ddim, {"eta": 2.0}, "eta is 2.0; it must be a number from 0 to 1"),
        (ddim, {"timesteps": [5, 2]}, "DDIMScheduler takes no timesteps"),
        (ddim, {"timestep_spacing": "quadratic"}, "DDIMScheduler takes no timestep_spacing"),
    ]
    for pipe, arguments, sentence in rejected:
        calls = record_calls(pipe.unet)
        with pytest.raises(ValueError, match=sentence):
            pipe(**{"batch_size": 1} | arguments)
        assert calls == []


def test_parts_that_do_not_fit_each_other_are_rejected() -> None:
    rejected: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"out_channels": 4}, {}, "4 out_channels for images of 3 channels"),
        ({}, {"self_conditioned": True}, "even number of in_channels, not 3"),
        ({}, {"has_null_label": True}, "no num_class_embeds"),
        ({"num_class_embeds": 2}, {"class_names": {"0": "cat"}}, "each of the network's 2 classes"),
        ({"num_class_embeds": 2}, {"class_names": {0: "cat", 1: "dog"}}, "keys that are strings"),
        ({}, {"class_names": {"0": "cat"}}, "each of the network's 0 classes"),
    ]
    for unet, extras, sentence in rejected:
        with pytest.raises(ValueError, match=sentence):
            GaussianDiffusionPipeline(tiny_unet(**unet), GaussianDiffusionScheduler(), **extras)


# Networks and schedulers of other kinds


def test_a_self_conditioned_network_takes_the_last_prediction_of_x_0() -> None:
    pipe = pipeline(tiny_unet(in_channels=6), self_conditioned=True)
    calls = record_calls(pipe.unet)
    start = torch.randn(1, 3, 8, 8, generator=seeded())
    pipe(1, 3, seeded(), sample=start, output_type="pt")
    assert torch.equal(calls[0]["sample"], torch.cat([start, torch.zeros_like(start)], 1))
    with torch.no_grad():
        output = pipe.unet(calls[0]["sample"], 666).sample
    first = pipe.scheduler.step(output, 666, start, generator=seeded())
    torch.testing.assert_close(calls[1]["sample"][:, :3], first.prev_sample, rtol=0, atol=1e-5)
    torch.testing.assert_close(calls[1]["sample"][:, 3:], first.pred_original_sample, rtol=0, atol=1e-5)


def test_a_self_conditioned_network_needs_a_scheduler_that_returns_x_0() -> None:
    pipe = pipeline(tiny_unet(in_channels=6), self_conditioned=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert pipe(1, 3, output_type="pt").images.shape == (1, 3, 8, 8)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(
        ValueError,
        match="DPMSolverMultistepScheduler does not return pred_original_sample, which a self-conditioned unet needs",
    ):
        pipe(1, 3, output_type="pt")


def test_a_predicted_variance_is_dropped_for_a_scheduler_without_one() -> None:
    """The same network with its second half cut off gives the same images."""
    both = tiny_unet(out_channels=6)
    half = tiny_unet()
    weights = {name: value[:3] if name.startswith("conv_out") else value for name, value in both.state_dict().items()}
    half.load_state_dict(weights)
    for variance_type, scheduler in (("learned_range", DDIMScheduler), ("fixed_small", GaussianDiffusionScheduler)):
        config = GaussianDiffusionScheduler(variance_type=variance_type).config
        images = [
            pipeline(unet, scheduler.from_config(config))(1, 4, seeded(), output_type="pt").images
            for unet in (both, half)
        ]
        torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)


def test_exactly_the_stock_scheduler_is_replaced_by_the_native_one() -> None:
    class Derived(DDPMScheduler):
        pass

    config = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_large"}
    native = pipeline(scheduler=DDPMScheduler(**config)).scheduler
    assert type(native) is GaussianDiffusionScheduler
    assert {key: native.config[key] for key in config} == config
    for other in (Derived(), DDIMScheduler()):
        assert pipeline(scheduler=other).scheduler is other


class PerfectNetwork(UNet2DModel):
    """The best network for Gaussian data and the prediction type of its scheduler."""

    data = GaussianData()
    scheduler: GaussianDiffusionScheduler

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: Any = None, return_dict: bool = True):
        return (self.data.predict(self.scheduler, sample, round(float(timestep))),)


# One scheduler of each kind; the parity tests cover DDPM and DDIM.
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_schedulers_of_diffusers_sample_the_data_from_any_prediction(name: str, prediction_type: str) -> None:
    """50 steps of 192 * 16 values: a standard error of 0.01, and up to 0.06 of the schedulers' own error at 50 steps.

    In the stock pipeline Euler ends at a deviation of 10^-3 to 10^8.
    """
    native = GaussianDiffusionScheduler(prediction_type=prediction_type, clip_sample=False)
    unet = PerfectNetwork(**tiny_unet().config)
    unet.scheduler = native
    mean, deviation = moments(pipeline(unet, getattr(diffusers, name).from_config(native.config)), 50)
    assert mean == pytest.approx(0.3, abs=0.05)
    assert deviation == pytest.approx(0.5, abs=0.08)


def moments(pipe: GaussianDiffusionPipeline, steps: int) -> tuple[float, float]:
    """Mean and deviation of 16 * 192 sampled values."""
    states: list[torch.Tensor] = []
    pipe(
        16,
        steps,
        seeded(),
        output_type="pt",
        callback_on_step_end=lambda p, i, t, tensors: states.append(tensors["sample"]),
    )
    return states[-1].mean().item(), states[-1].std().item()


def test_a_scheduler_of_another_process_is_rejected_before_the_network_is_called() -> None:
    pipe = pipeline(scheduler=EDMEulerScheduler())
    calls = record_calls(pipe.unet)
    with pytest.raises(ValueError, match="EDMEulerScheduler does not run a denoising diffusion process"):
        pipe(1, 3)
    assert calls == []


RUN_THIS_PROCESS = {
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
}


SIGMAS = GaussianDiffusionScheduler().noise_schedule.snr.numpy() ** -0.5


class PerfectNoiseNetwork(UNet2DModel):
    """Predicts the noise in Gaussian data; between two timesteps sigma / alpha is linear, as for k-diffusion."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: Any = None, return_dict: bool = True):
        data, sigma = GaussianData(), np.interp(float(timestep), np.arange(1000), SIGMAS)
        alpha = 1 / math.sqrt(1 + sigma**2)
        gain = alpha * data.deviation**2 / (alpha**2 * data.deviation**2 + 1 - alpha**2)
        x_0 = data.mean + gain * (sample - alpha * data.mean)
        return ((sample - alpha * x_0) / math.sqrt(1 - alpha**2),)


def perfect_pipeline(scheduler: Any) -> GaussianDiffusionPipeline:
    return pipeline(PerfectNoiseNetwork(**tiny_unet().config), scheduler)


def every_scheduler() -> dict[str, Any]:
    """One of each scheduler of diffusers that accepts our configuration, most of them with a warning."""
    diffusers.logging.set_verbosity_error()
    config = GaussianDiffusionScheduler(clip_sample=False).config
    made: dict[str, Any] = {}
    for name in dir(diffusers):
        if not name.endswith("Scheduler") or name.startswith("Flax"):
            continue
        try:
            made[name] = getattr(diffusers, name).from_config(config)
        except (TypeError, ValueError, ImportError):  # it needs other arguments, or a library that is not installed
            continue
    diffusers.logging.set_verbosity_warning()
    return made


def accepted(scheduler: Any) -> bool:
    try:
        check_process(scheduler)
    except ValueError as error:
        assert str(error).startswith(f"{type(scheduler).__name__} ")
        assert str(error).endswith("trained with, or a pipeline made for this one.")
        return False
    return True


def test_schedulers_of_this_process_are_told_from_others() -> None:
    """Every scheduler of the installed diffusers that accepts our configuration; about half run another process."""
    schedulers = every_scheduler()
    assert {name for name, scheduler in schedulers.items() if accepted(scheduler)} - {
        "DPMSolverSDEScheduler"  # where torchsde is installed
    } == RUN_THIS_PROCESS
    assert len(schedulers) > 2 * len(RUN_THIS_PROCESS)
    assert accepted(GaussianDiffusionScheduler())


@pytest.mark.parametrize("name", sorted(RUN_THIS_PROCESS))
def test_schedulers_of_this_process_sample_the_data(name: str) -> None:
    """100 steps: a standard error of 0.01, and up to 0.03 of the schedulers' own error, most in the ancestral ones."""
    native = GaussianDiffusionScheduler(clip_sample=False)
    scheduler = getattr(diffusers, name).from_config(native.config)
    mean, deviation = moments(perfect_pipeline(scheduler), 100)
    assert mean == pytest.approx(0.3, abs=0.04)
    assert deviation == pytest.approx(0.5, abs=0.04)


def test_other_options_of_a_process_are_accepted_where_it_stays_the_same() -> None:
    config = GaussianDiffusionScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).config
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        check_process(getattr(diffusers, name).from_config(config))
    check_process(diffusers.DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True))
    used = diffusers.PNDMScheduler()
    used.set_timesteps(10)
    check_process(used)


def test_another_process_is_rejected_with_its_reason() -> None:
    for scheduler, reason in (
        (diffusers.EDMEulerScheduler(), "does not run a denoising diffusion process"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "does not run a denoising diffusion process"),
        (diffusers.LCMScheduler(), "does not run a denoising diffusion process"),
        (diffusers.DDIMInverseScheduler(), "does not run a denoising diffusion process"),
        (diffusers.DPMSolverMultistepInverseScheduler(), "goes from data to noise"),
        (diffusers.CogVideoXDDIMScheduler(), "changes the noise levels"),
        (
            diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            "has prediction_type 'flow_prediction'",
        ),
    ):
        with pytest.raises(ValueError, match=rf"{type(scheduler).__name__} {reason}"):
            check_process(scheduler)


@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing", "linspace"])
def test_heun_in_the_pipeline_is_the_method_of_heun(timestep_spacing: str) -> None:
    """Its deviation at 10 steps, 0.54 for 0.5, is its own error: the trapezoidal rule on the probability-flow ODE.

    Written out for Gaussian data, d x / d sigma = sigma x / (s^2 + sigma^2), whose slope averages two network calls a
    step and one in the last. Float32 noise of 3072 values: the mean of the squares is 1 only to 0.03.
    """
    native = GaussianDiffusionScheduler(clip_sample=False, timestep_spacing=timestep_spacing)
    heun = diffusers.HeunDiscreteScheduler.from_config(native.config)
    heun.set_timesteps(10)
    assert len(heun.timesteps) == 19
    levels = [sigma for i, sigma in enumerate(heun.sigmas.tolist()) if i == 0 or sigma != heun.sigmas[i - 1]]
    expected = float(heun.init_noise_sigma)
    for sigma, then in itertools.pairwise(levels):
        slope = sigma / (0.25 + sigma**2)
        at_the_end = then / (0.25 + then**2) * (1 + (then - sigma) * slope)
        expected *= 1 + (then - sigma) * (slope if then == 0 else (slope + at_the_end) / 2)
    _, deviation = moments(perfect_pipeline(heun), 10)
    assert deviation == pytest.approx(expected, rel=0.03)
    assert abs(deviation - 0.5) > 0.02
    exact = float(heun.init_noise_sigma) * 0.5 / math.hypot(0.5, levels[0])
    assert exact == pytest.approx(0.5, rel=1e-3)


# Several calls at once


def calls_of_every_kind(pipe: GaussianDiffusionPipeline) -> dict[str, Callable[[], torch.Tensor]]:
    """Calls that differ in timesteps, eta and guidance, each with a generator of its own."""
    x, mask = torch.rand(1, 3, 8, 8, generator=seeded(9)), torch.ones(8, 8)
    options: dict[str, Any] = {"class_labels": 1, "output_type": "pt"}
    return {
        "call": lambda: pipe(2, 4, seeded(1), **options).images,
        "guided": lambda: pipe(1, 3, seeded(2), guidance_scale=2.0, eta=0.0, **options).images,
        "spaced": lambda: pipe(1, 5, seeded(3), timestep_spacing="trailing", **options).images,
        "listed": lambda: pipe(1, None, seeded(4), timesteps=[900, 666, 1], **options).images,
        "denoise_from": lambda: pipe.denoise_from(x, num_inference_steps=6, generator=seeded(5), **options).images,
        "interpolate": lambda: pipe.interpolate(x, 1 - x, num_inference_steps=8, generator=seeded(6), **options).images,
        "inpaint": lambda: pipe.inpaint(x, mask, 2, 1, num_inference_steps=2, generator=seeded(7), **options).images,
        "encode": lambda: pipe.encode(x, 1, num_inference_steps=3, class_labels=1),
    }


def test_calls_inside_each_other_give_the_images_of_calls_alone() -> None:
    """Every call of the network in one call runs another call as a whole; exact."""
    pipe = conditional()
    calls = calls_of_every_kind(pipe)
    alone = {name: call() for name, call in calls.items()}
    inner = itertools.cycle(calls)
    is_nested = False

    def run_another(*_: Any) -> None:
        nonlocal is_nested
        if not is_nested:
            is_nested, name = True, next(inner)
            assert torch.equal(calls[name](), alone[name]), name
            is_nested = False

    pipe.unet.register_forward_pre_hook(run_another)
    for name, call in calls.items():
        assert torch.equal(call(), alone[name]), name


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_calls_inside_each_other_share_no_state_of_a_scheduler_of_diffusers(name: str) -> None:
    pipe = pipeline(scheduler=getattr(diffusers, name).from_config(GaussianDiffusionScheduler().config))
    alone = {steps: pipe(1, steps, seeded(), output_type="pt").images for steps in (4, 5)}

    def run_another(p: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        if step in (1, 2):
            assert torch.equal(pipe(1, 4, seeded(), output_type="pt").images, alone[4])

    assert torch.equal(pipe(1, 5, seeded(), output_type="pt", callback_on_step_end=run_another).images, alone[5])


def state(scheduler: Any) -> dict[str, Any]:
    """What the steps of a scheduler may change, without what is replaced as a whole."""
    return {
        name: state(value) if isinstance(value, SchedulerMixin) else copy.deepcopy(value)
        for name, value in vars(scheduler).items()
        if name not in ("_internal_dict", "tau_func")
    }


@pytest.mark.parametrize("name", sorted(RUN_THIS_PROCESS))
def test_the_steps_of_a_copied_scheduler_leave_the_scheduler_as_it_was(name: str) -> None:
    """Multistep schedulers change lists of former outputs in place; some of the lists outlive `set_timesteps`."""
    config = GaussianDiffusionScheduler().config
    scheduler = getattr(diffusers, name).from_config(config)
    if name == "UniPCMultistepScheduler":
        scheduler.solver_p = diffusers.DEISMultistepScheduler.from_config(config)
    scheduler.set_timesteps(5)
    before = str(state(scheduler))
    copied = copy_scheduler(scheduler)
    copied.set_timesteps(6)
    x = torch.ones(1, 3, 2, 2)
    for t in copied.timesteps[:4]:
        copied.step(x, t, x)
    assert str(state(scheduler)) == before
    assert str(state(copied)) != before


def test_calls_in_two_threads_give_the_images_of_calls_alone() -> None:
    """The threads wait for each other in every step, so that their steps alternate; exact."""
    pipe = pipeline()
    alone = {steps: pipe(1, steps, seeded(), output_type="pt").images for steps in (5, 10)}
    together = threading.Barrier(2)

    def wait(p: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        if step < 5:
            together.wait(600)

    with ThreadPoolExecutor(2) as pool:
        runs = {
            steps: pool.submit(pipe, 1, steps, seeded(), output_type="pt", callback_on_step_end=wait) for steps in alone
        }
    assert all(torch.equal(run.result().images, alone[steps]) for steps, run in runs.items())


def test_a_callback_stops_its_own_call_and_another_thread_every_call() -> None:
    """Both names of the property, that of diffusers and the public one."""
    pipe = pipeline()
    started, go_on = threading.Barrier(3), threading.Event()

    def wait(p: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        if step == 0:
            assert pipe(1, 5, callback_on_step_end=stop, return_trajectory=True).trajectory.shape[0] == 2
            assert not pipe.interrupt
            started.wait(600)
            go_on.wait(600)

    def stop(p: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        p._interrupt = True
        assert p.interrupt

    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(pipe, 1, 9, callback_on_step_end=wait, return_trajectory=True) for _ in range(2)]
        started.wait(600)
        pipe.interrupt = True
        go_on.set()
    assert [len(run.result().trajectory) for run in runs] == [2, 2]
    assert pipe.interrupt
    assert len(pipe(1, 3, return_trajectory=True).trajectory) == 4
    assert not pipe.interrupt


def test_the_scheduler_of_a_pipeline_shows_the_last_call() -> None:
    """A callback reads the timesteps of its call, and a subclass finds what its steps have stored."""

    class Counting(GaussianDiffusionScheduler):
        num_steps = 0

        def step(self, *args: Any, **kwargs: Any) -> Any:
            self.num_steps += 1
            self.seen.append(int(args[1]))
            return super().step(*args, **kwargs)

    scheduler = Counting()
    scheduler.seen = []
    pipe = pipeline(scheduler=scheduler)
    shown: list[list[int]] = []
    pipe(1, 3, callback_on_step_end=lambda p, i, t, tensors: shown.append(p.scheduler.timesteps.tolist()))
    assert shown == [[666, 333, 0]] * 3
    assert pipe.scheduler is scheduler
    assert scheduler.timesteps.tolist() == scheduler.seen == [666, 333, 0]
    assert scheduler.num_inference_steps == scheduler.num_steps == 3
    pipe(1, 2)
    assert (scheduler.timesteps.tolist(), scheduler.num_steps) == ([500, 0], 5)


def test_a_step_that_was_replaced_on_the_scheduler_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method bound to the scheduler steps the copy of each call; a function around the former method is called."""
    for scheduler in (GaussianDiffusionScheduler(), DPMSolverMultistepScheduler()):
        pipe = pipeline(scheduler=scheduler)
        expected = pipe(1, 3, seeded(), output_type="pt").images
        stepped: list[Any] = []
        step = scheduler.step

        @functools.wraps(step)
        def around(*args: Any, step: Any = step, stepped: list[Any] = stepped, **kwargs: Any) -> Any:
            stepped.append(None)
            return step(*args, **kwargs)

        def method(self: Any, *args: Any, stepped: list[Any] = stepped, **kwargs: Any) -> Any:
            stepped.append(self)
            return type(self).step(self, *args, **kwargs)

        method.__signature__ = inspect.signature(type(scheduler).step)
        for replaced in (around, types.MethodType(method, scheduler)):
            monkeypatch.setattr(scheduler, "step", replaced)
            assert torch.equal(pipe(1, 3, seeded(), output_type="pt").images, expected)
        assert len(stepped) == 6
        assert scheduler not in stepped


def test_an_offloaded_network_stays_on_its_device_while_another_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, released = pipeline(), []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: released.append(True))

    def run_another(p: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        pipe(1, 1)
        assert not released

    pipe(1, 2, callback_on_step_end=run_another)
    assert len(released) == 1

    def fail(*_: Any) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        pipe(1, 2, callback_on_step_end=fail)
    assert len(released) == 2


def test_a_call_costs_the_operations_of_its_network_and_of_its_steps() -> None:
    """The copy of the scheduler copies no tensor, and a step launches and looks up nothing of its own."""
    lookups = []

    class Watched(UNet2DModel):
        @property
        def dtype(self) -> torch.dtype:
            lookups.append(None)
            return torch.float32

    pipe, scheduler = pipeline(Watched(**tiny_unet().config)), GaussianDiffusionScheduler()
    scheduler.set_timesteps(3)
    x = torch.randn(1, 3, 8, 8, generator=seeded())
    lookups.clear()
    with torch.no_grad(), OperationCounter() as step:
        scheduler.step(pipe.unet(x, scheduler.timesteps[0], return_dict=False)[0], scheduler.timesteps[0], x)
    step_lookups, counts = len(lookups), {}  # the network looks its own dtype up
    for steps in (3, 5):
        lookups.clear()
        with OperationCounter() as call:
            pipe(1, steps, seeded(), output_type="pt")
        counts[steps] = call.launched
        assert len(lookups) == step_lookups * steps + 1
    assert counts[5] - counts[3] == 2 * step.launched


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_a_float32_state(dtype: torch.dtype) -> None:
    """20 steps move the image by less than 0.05 of its range: rounding of the network alone, not of the state."""
    expected = pipeline()(2, 20, seeded(), output_type="np").images
    pipe = pipeline(tiny_unet().to(dtype))
    dtypes: set[torch.dtype] = set()
    for output_type, num_steps in (("np", 20), ("pt", 2), ("uint8", 2), ("pil", 2)):
        images = pipe(
            2,
            num_steps,
            seeded(),
            output_type=output_type,
            callback_on_step_end=lambda p, i, t, tensors: dtypes.add(tensors["sample"].dtype),
        ).images
        if output_type == "np":
            assert np.abs(images - expected).max() < 0.05
    assert dtypes == {torch.float32}


def test_half_precision_weights_keep_a_float32_state_and_guidance_with_foreign_schedulers() -> None:
    """They return the dtype of the model output, which is converted to float32 before anything else."""
    pipe = conditional()
    pipe.unet.to(torch.bfloat16)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    tensors: list[dict[str, torch.Tensor]] = []
    pipe(
        1,
        3,
        seeded(),
        class_labels=0,
        guidance_scale=3.0,
        output_type="pt",
        callback_on_step_end=lambda p, i, t, shown: tensors.append(shown),
        callback_on_step_end_tensor_inputs=("sample", "model_output"),
    )
    for shown in tensors:
        assert shown["sample"].dtype == shown["model_output"].dtype == torch.float32
        assert not torch.equal(shown["model_output"], shown["model_output"].bfloat16().float())


def test_double_precision_weights_keep_a_float64_state() -> None:
    states: list[torch.Tensor] = []
    pipeline(tiny_unet().double())(
        1, 2, seeded(), callback_on_step_end=lambda p, i, t, tensors: states.append(tensors["sample"])
    )
    assert states[0].dtype == torch.float64


# Callbacks, progress


def test_a_callback_is_called_after_every_step_and_may_change_the_sample() -> None:
    pipe = pipeline()
    seen: list[tuple[int, int, set[str]]] = []

    def callback(p: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert p is pipe
        seen.append((step, int(t), set(tensors)))
        return {"sample": torch.zeros_like(tensors["sample"])} if step == 2 else {}

    images = pipe(
        1,
        3,
        output_type="pt",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["sample", "model_output"],
    ).images
    assert seen == [(i, t, {"sample", "model_output"}) for i, t in enumerate((666, 333, 0))]
    assert torch.equal(images, torch.full_like(images, 0.5))


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (lambda x: x["sample"], "returned a Tensor; return None or"),
        (lambda x: [x], "returned a list"),
        (lambda x: False, "returned a bool"),
        (
            lambda x: {"sample": x["sample"][..., :4]},
            r"sample of \(1, 3, 8, 4\), torch.float32, on cpu; it must be",
        ),
        (lambda x: {"sample": x["sample"].half()}, "torch.float16, on cpu; it must be"),
        (lambda x: {"sample": x["sample"].to("meta")}, "on meta; it must be"),
        (lambda x: {"sample": x["sample"].numpy()}, "a sample that is a ndarray; return a tensor"),
        (lambda x: {"sample": None}, "a sample that is a NoneType"),
        (lambda x: {"samples": x["sample"]}, r"returned 'samples' \(did you mean 'sample'\?\)"),
        (lambda x: {"latents": x["sample"]}, "returned 'latents'; only the sample can be replaced"),
        (lambda x: {"model_output": x["model_output"] + 1}, "returned 'model_output'; only the sample"),
    ],
)
def test_what_a_callback_must_not_return_is_a_sentence(returned: Any, sentence: str) -> None:
    """What it may return: None, {}, the tensors that it got, and another sample."""
    pipe = pipeline()
    options: dict[str, Any] = {"callback_on_step_end_tensor_inputs": ["sample", "model_output"]}
    for given in (lambda x: None, lambda x: {}, lambda x: x, lambda x: {"sample": x["sample"] + 1}):
        pipe(1, 1, callback_on_step_end=lambda p, i, t, x, given=given: given(x), **options)
    calls = record_calls(pipe.unet)
    with pytest.raises(ValueError, match=sentence):
        pipe(1, 2, callback_on_step_end=lambda p, i, t, x: returned(x), **options)
    assert len(calls) == 1


def test_a_callback_gets_the_x_0_of_every_step() -> None:
    """It is clipped; in the last step it is the image."""
    pipe = pipeline()
    shown: list[dict[str, torch.Tensor]] = []
    arguments: dict[str, Any] = {
        "callback_on_step_end": lambda p, i, t, tensors: shown.append(tensors),
        "callback_on_step_end_tensor_inputs": ["sample", "model_output", "pred_original_sample"],
    }
    start = torch.randn(1, 3, 8, 8, generator=seeded())
    pipe(1, 3, seeded(), sample=start, output_type="pt", **arguments)
    first = pipe.scheduler.step(shown[0]["model_output"], 666, start)
    assert torch.equal(shown[0]["pred_original_sample"], first.pred_original_sample)
    assert shown[0]["pred_original_sample"].abs().max() == 1
    assert torch.equal(shown[2]["pred_original_sample"], shown[2]["sample"])
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    calls = record_calls(pipe.unet)
    with pytest.raises(ValueError, match="does not return pred_original_sample, which the callback needs"):
        pipe(1, 3, output_type="pt", **arguments)
    assert calls == []


def test_the_progress_bar_is_that_of_diffusers(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = pipeline()
    pipe(1, 2, output_type="pt")
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(desc="denoising")
    pipe(1, 2, output_type="pt")
    assert "denoising" in capsys.readouterr().err


def test_check_inputs_rejects_what_a_call_rejects_and_returns_the_number_of_steps() -> None:
    pipe = conditional()
    calls = record_calls(pipe.unet)
    assert pipe.check_inputs(2, class_labels=1, num_inference_steps=7, guidance_scale=2.0) == 7
    with pytest.raises(ValueError, match="pass class_labels"):
        pipe.check_inputs()
    with pytest.raises(TypeError, match="check_inputs has no argument 'sample'"):
        pipe.check_inputs(class_labels=1, sample=torch.zeros(1, 3, 8, 8))
    assert calls == []


# --------------------------------------------------------------------------------------------------------- value range


@pytest.mark.parametrize("network", [torch.float32, torch.float64])
def test_values_are_those_of_the_range_and_pictures_scale_it(network: torch.dtype) -> None:
    plain, ranged = pipeline(tiny_unet().to(network)), pipeline(tiny_unet().to(network), value_range=(-1000, 400))
    assert ranged.config.value_range == [-1000, 400]
    options = {"num_inference_steps": 2, "return_trajectory": True}

    def images(pipe: GaussianDiffusionPipeline, output_type: str) -> Any:
        return pipe(generator=seeded(0), output_type=output_type, **options)

    unit, values = images(plain, "np"), images(ranged, "np")
    assert values.images.dtype == np.float32
    np.testing.assert_allclose(values.images, unit.images * 1400 - 1000, atol=1e-3)
    assert [values.images.min(), values.images.max()] == [-1000, 400], "states without training reach both ends"
    torch.testing.assert_close(values.trajectory, unit.trajectory * 1400 - 1000, atol=1e-3, rtol=0)
    assert np.array_equal(images(ranged, "pt").images.permute(0, 2, 3, 1).numpy(), values.images)
    assert np.array_equal(images(ranged, "uint8").images, images(plain, "uint8").images)
    assert np.array_equal(*(np.asarray(images(pipe, "pil").images[0]) for pipe in (ranged, plain)))


def test_editing_takes_values_of_the_range_and_pictures_of_it() -> None:
    pipe, plain = pipeline(value_range=[-1000, 400]), pipeline()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    values = (pixels / 255 * 1400 - 1000).astype(np.float32)
    expected = plain._to_pixels(pixels, "image")
    for given in (pixels, values, values.astype(np.float64), torch.from_numpy(values).permute(0, 3, 1, 2)):
        torch.testing.assert_close(pipe._to_pixels(given, "image").float(), expected, atol=1e-6, rtol=0)
    whole = np.full((1, 8, 8, 3), -300, np.int16)
    assert pipe._to_pixels(whole, "image").unique().tolist() == [0]
    edited = pipe.denoise_from(values, 0.5, num_inference_steps=2, output_type="np").images
    again = pipe.denoise_from(edited, 0.5, num_inference_steps=2, output_type="np").images
    assert np.isfinite(again).all(), "outputs are inputs"
    with pytest.raises(
        ValueError, match=r"has values from -1000 to 500; the model's images have values in \[-1000, 400\]"
    ):
        pipe.denoise_from(np.where(values > 399, 500, -1000).astype(np.float32))


def test_no_value_is_outside_of_the_range_by_rounding() -> None:
    """0.1 + (0.7 - 0.1) is above 0.7 in float32."""
    assert to_images(torch.ones(1, 1, 1, 1), "np", (0.1, 0.7)).item() == np.float32(0.7)


@pytest.mark.parametrize("value_range", [[1, 0], [0, 0], [0], [0, 1, 2], [0, math.inf], "auto", 5, [math.nan, 1]])
def test_a_value_range_is_two_increasing_numbers(value_range: Any) -> None:
    with pytest.raises(ValueError, match="must be two numbers, \\[low, high\\], with low < high"):
        pipeline(value_range=value_range)
