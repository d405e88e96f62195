"""Denoising from an image, interpolation, inpainting and encoding, against what the papers say they compute."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from oracles import GaussianData, seeded, tiny_unet
from PIL import Image

from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.diffusion.editing import resampling_moves, slerp, start_level

SIZE = 8


def pipeline(unet: UNet2DModel | None = None, **config: Any) -> GaussianDiffusionPipeline:
    """A quiet pipeline of a tiny network with random weights, or of the given one."""
    pipe = GaussianDiffusionPipeline(unet or tiny_unet(), GaussianDiffusionScheduler(**config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class PerfectNetwork(UNet2DModel):
    """The best network for independent Gaussian pixels, or for pixels that all have one Gaussian value."""

    data = GaussianData()
    is_constant = False
    scheduler = GaussianDiffusionScheduler(clip_sample=False)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: Any = None, return_dict: bool = True):
        t, data = int(timestep), self.data
        if not self.is_constant:
            return (data.predict(self.scheduler, sample, t),)
        alpha_bar = self.scheduler.noise_schedule.alphas_cumprod[t].item()
        num_pixels = sample[0].numel()
        precision = 1 / data.deviation**2 + num_pixels * alpha_bar / (1 - alpha_bar)
        seen = alpha_bar**0.5 / (1 - alpha_bar) * sample.sum((1, 2, 3), keepdim=True)
        x_0 = ((data.mean / data.deviation**2 + seen) / precision).expand_as(sample)
        return ((sample - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5,)


def perfect_pipeline(
    data: GaussianData = PerfectNetwork.data, *, is_constant: bool = False
) -> GaussianDiffusionPipeline:
    unet = PerfectNetwork(**tiny_unet().config)
    unet.data, unet.is_constant = data, is_constant
    return pipeline(unet, clip_sample=False)


def images(number: int = 2, seed: int = 0) -> torch.Tensor:
    """Random images in [0, 1], (number, 3, 8, 8)."""
    return torch.rand(number, 3, SIZE, SIZE, generator=seeded(seed))


def calls_of(pipe: GaussianDiffusionPipeline) -> list[tuple[int, torch.Tensor]]:
    """(timestep, input) of every later call of the network."""
    calls: list[tuple[int, torch.Tensor]] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append((int(args[1]), args[0].clone())))
    return calls


# Denoising from an image


@pytest.mark.parametrize(("strength", "num_calls"), [(0.06, 1), (0.3, 3), (0.58, 6), (1.0, 10)])
def test_denoising_starts_at_the_level_that_the_image_was_noised_to(strength: float, num_calls: int) -> None:
    pipe = pipeline()
    calls = calls_of(pipe)
    x_0, noise = images() * 2 - 1, torch.randn(2, 3, SIZE, SIZE, generator=seeded())
    pipe.denoise_from(images(), strength, num_inference_steps=10, generator=seeded(), output_type="pt")
    expected = pipe.scheduler.timesteps[-num_calls:].tolist()
    assert [t for t, _ in calls] == expected
    x_t = pipe.scheduler.add_noise(x_0, noise, torch.tensor([expected[0]] * 2))
    torch.testing.assert_close(calls[0][1], x_t, rtol=0, atol=1e-6)


def test_noising_and_denoising_data_gives_data_again() -> None:
    """Whatever the strength, samples of the data stay samples of it: 128 * 3 * 64 values, a standard error of 0.0016.

    0.007: four of them, and the discretization.
    """
    pipe = perfect_pipeline(GaussianData(mean=0.1, deviation=0.25))
    for strength in (0.2, 0.5):
        states: list[torch.Tensor] = []
        data = (0.1 + 0.25 * torch.randn(128, 3, SIZE, SIZE, generator=seeded())).clamp(-1, 1) / 2 + 0.5
        pipe.denoise_from(
            data,
            strength,
            num_inference_steps=1000,
            generator=seeded(1),
            output_type="pt",
            callback_on_step_end=lambda p, i, t, tensors, states=states: states.append(tensors["sample"]),
        )
        assert states[-1].mean().item() == pytest.approx(0.1, abs=0.007)
        assert states[-1].std().item() == pytest.approx(0.25, abs=0.007)


def test_an_edited_image_depends_on_its_own_generator_whatever_its_batch() -> None:
    """1e-4: convolutions may add in another order in another batch."""
    pipe = pipeline()
    half = np.zeros((SIZE, SIZE), bool)
    half[:4] = True
    edits = {
        "denoise_from": lambda x, g: pipe.denoise_from(x, generator=g, num_inference_steps=6, output_type="pt"),
        "inpaint": lambda x, g: pipe.inpaint(x, half, 2, 2, generator=g, num_inference_steps=6, output_type="pt"),
    }
    for name, edit in edits.items():
        together = edit(images(3), [seeded(i) for i in range(3)]).images
        alone = edit(images(3)[1:2], [seeded(1)]).images
        torch.testing.assert_close(alone, together[1:2], rtol=0, atol=1e-4, msg=name)


# Interpolation


def test_both_ends_are_noised_to_the_level_at_which_denoising_begins() -> None:
    """The network's first input is the mixture of the two noised ends, with one noise for all weights."""
    pipe = pipeline()
    calls = calls_of(pipe)
    left, right = images(2, 1), images(2, 2)
    generator, weights = seeded(), [0.0, 0.25, 1.0]
    pipe.interpolate(left, right, weights, 0.5, num_inference_steps=10, generator=generator, output_type="pt")
    t, first_input = calls[0]
    assert len(calls) == 5
    assert t == pipe.scheduler.timesteps[5].item()
    noise, at_t = seeded(), torch.tensor([t] * 2)
    x, y = (
        pipe.scheduler.add_noise(end * 2 - 1, torch.randn(2, 3, SIZE, SIZE, generator=noise), at_t)
        for end in (left, right)
    )
    expected = [torch.lerp(x[pair], y[pair], weight) for pair in (0, 1) for weight in weights]
    torch.testing.assert_close(first_input, torch.stack(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mixing", ["linear", "spherical"])
def test_the_ends_of_an_interpolation_are_what_denoising_from_them_gives(mixing: str) -> None:
    """1e-4: convolutions may add in another order in another batch."""
    pipe = pipeline()
    options: dict[str, Any] = {"num_inference_steps": 8, "eta": 0.0, "output_type": "pt"}
    left, right = images(1, 1), images(1, 2)
    between = pipe.interpolate(left, right, [0.0, 0.5, 1.0], 0.5, mixing, generator=seeded(), **options).images
    noise = seeded()
    for index, end in ((0, left), (2, right)):
        alone = pipe.denoise_from(end, 0.5, generator=noise, **options).images
        torch.testing.assert_close(between[index : index + 1], alone, rtol=0, atol=1e-4)
    assert (between[1] - between[0]).abs().max().item() > 0.01


def test_spherical_mixtures_keep_the_length_of_the_state() -> None:
    """Exact for two states of one length, here one state and its mirror image."""
    pipe = pipeline()
    calls = calls_of(pipe)
    left = images(1)
    pipe.interpolate(
        left,
        left,
        [0.0, 0.3, 0.5, 1.0],
        1.0,
        "spherical",
        num_inference_steps=2,
        generator=[seeded(0) for _ in range(4)],
        output_type="pt",
    )
    assert torch.equal(slerp(left, left, torch.tensor(0.5)), left)
    lengths = calls[0][1].flatten(1).norm(dim=1)
    assert lengths[1:3].min() > 0.9 * min(lengths[0], lengths[3])
    linear = torch.lerp(calls[0][1][0], calls[0][1][3], 0.5).norm()
    assert linear < 0.85 * lengths[2]


# Inpainting


def test_the_published_schedule_of_jumps_is_followed() -> None:
    """Six steps, stretches of two, each denoised twice; worked out by hand from the paper's code."""
    levels = [0, 1, 2, 3, 1, 2, 3, 4, 5, 3, 4, 5, 6]
    assert list(resampling_moves(6, 2, 2)) == list(itertools.pairwise(levels))
    assert list(resampling_moves(4, 10, 10)) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    moves = list(resampling_moves(250, 10, 10))
    assert sum(target > level for level, target in moves) == 250 + 24 * 9 * 10


def test_going_back_adds_the_noise_between_two_levels() -> None:
    """For data of one point, x_t of every call has the moments of q(x_t | x_0), also after a jump.

    12288 values: standard errors of 0.009 and 0.0064, four of them.
    """
    pipe = perfect_pipeline(GaussianData(mean=0.8, deviation=0.0))
    calls = calls_of(pipe)
    options: dict[str, Any] = {"num_inference_steps": 20, "generator": seeded(), "output_type": "pt"}
    pipe.inpaint(images(64), torch.ones(SIZE, SIZE), 2, 5, **options)
    timesteps = [t for t, _ in calls]
    assert any(after > before for before, after in itertools.pairwise(timesteps))
    for t, x_t in calls:
        alpha_bar = pipe.scheduler.noise_schedule.alphas_cumprod[t].item()
        assert x_t.mean().item() == pytest.approx(0.8 * alpha_bar**0.5, abs=0.036)
        assert x_t.std().item() == pytest.approx((1 - alpha_bar) ** 0.5, abs=0.026)


def test_inpainting_defaults_to_the_number_of_steps_of_the_paper() -> None:
    pipe = perfect_pipeline()
    calls = calls_of(pipe)
    pipe.inpaint(images(1), torch.ones(SIZE, SIZE), num_resamples=1)
    assert len(calls) == 250
    calls.clear()
    pipe.inpaint(images(1), torch.ones(SIZE, SIZE), num_resamples=1, timesteps=[900, 500, 10])
    assert len(calls) == 3


def test_inpainting_keeps_the_known_part_and_ignores_the_rest() -> None:
    """Known pixels are returned exactly; values under the mask have no effect."""
    pipe = pipeline()
    given, mask = images(), torch.zeros(2, 1, SIZE, SIZE, dtype=torch.bool)
    mask[0, :, 2:5, 3:] = True
    mask[1, :, :4] = True
    options: dict[str, Any] = {"num_resamples": 2, "jump_length": 2, "num_inference_steps": 6, "output_type": "pt"}
    filled = pipe.inpaint(given, mask, generator=seeded(), **options).images
    known = ~mask.expand_as(filled)
    torch.testing.assert_close(filled[known], given[known], rtol=0, atol=1e-6)
    assert (filled - given)[~known].abs().mean().item() > 0.05
    other = torch.where(mask, torch.zeros(()), given)
    assert torch.equal(pipe.inpaint(other, mask, generator=seeded(), **options).images, filled)


def test_resampling_makes_the_new_part_fit_the_old_one() -> None:
    """Data with one value for all pixels: one column determines the others, through resampling."""
    pipe = perfect_pipeline(is_constant=True)
    given = torch.linspace(0.3, 0.9, 16).view(-1, 1, 1, 1).expand(16, 3, SIZE, SIZE)
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[:, 1:] = True
    errors = {}
    for num_resamples in (1, 10):
        filled = pipe.inpaint(
            given, mask, num_resamples, 5, num_inference_steps=50, generator=seeded(), output_type="pt"
        ).images
        errors[num_resamples] = (filled - given)[..., 1:].abs().mean().item()
    assert errors[10] < 0.02
    assert errors[10] < errors[1] / 3


def test_a_mask_may_have_every_form_of_an_image() -> None:
    pipe = pipeline()
    array = np.zeros((SIZE, SIZE), bool)
    array[:, 4:] = True
    forms: list[Any] = [
        array,
        array.astype(np.float32),
        array[..., None],
        torch.from_numpy(array),
        torch.from_numpy(array)[None, None],
        Image.fromarray(array),
        Image.fromarray(array.astype(np.uint8) * 255),
        [Image.fromarray(array)] * 2,
        np.stack([array, array])[..., None],
    ]
    results = [
        pipe.inpaint(images(), mask, 1, num_inference_steps=2, generator=seeded(), output_type="pt").images
        for mask in forms
    ]
    assert all(torch.equal(result, results[0]) for result in results)


# Encoding


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_decoding_an_encoded_image_returns_it(prediction_type: str) -> None:
    """2e-3 of the range with three iterations a step; one iteration, plain inversion, has a larger error."""
    network = PerfectNetwork(**tiny_unet().config)
    network.scheduler = GaussianDiffusionScheduler(clip_sample=False, prediction_type=prediction_type)
    pipe = GaussianDiffusionPipeline(network, GaussianDiffusionScheduler.from_config(network.scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    errors = {}
    for num_iterations in (1, 3, 10):
        noise = pipe.encode(images(), num_iterations, num_inference_steps=50)
        decoded = pipe(sample=noise, eta=0.0, num_inference_steps=50, output_type="pt").images
        errors[num_iterations] = (decoded - images()).abs().max().item()
    assert errors[10] < 1e-5 < errors[3] < 2e-3 < errors[1]


def test_encoding_moves_every_value_to_its_own_quantile() -> None:
    """The flow of one-dimensional data keeps quantiles: N(0.3, 0.5^2) goes to N(0, 1) by (x - 0.3) / 0.5.

    0.02: the discretization of 1000 steps, and the mean that is left in x_T.
    """
    pipe = perfect_pipeline()
    x_0 = images() * 2 - 1
    noise = pipe.encode(images(), 1, num_inference_steps=1000)
    torch.testing.assert_close(noise, (x_0 - 0.3) / 0.5, rtol=0, atol=0.02)


# Interruption


def test_a_callback_can_interrupt_and_the_next_call_runs_through() -> None:
    pipe = pipeline()

    def stop_at_3(p: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        p.interrupt = step == 2
        return {}

    options: dict[str, Any] = {"generator": seeded(), "output_type": "pt", "return_trajectory": True}
    stopped = pipe(1, 6, callback_on_step_end=stop_at_3, **options)
    whole = pipe(1, 6, **options | {"generator": seeded()})
    assert len(stopped.trajectory) == 4
    assert torch.equal(stopped.trajectory, whole.trajectory[:4])
    assert torch.equal(stopped.images, whole.trajectory[3])
    mask = np.ones((SIZE, SIZE), bool)
    filled = pipe.inpaint(images(1), mask, 2, 2, num_inference_steps=6, callback_on_step_end=stop_at_3, **options)
    assert len(filled.trajectory) == 4


def test_the_start_level_runs_the_requested_part_of_the_steps() -> None:
    assert [start_level(strength, 10) for strength in (1.0, 0.58, 0.3, 0.06)] == [0, 4, 7, 9]


# Errors


def test_invalid_images_and_arguments_are_rejected() -> None:
    pipe, gray = pipeline(), Image.new("L", (SIZE, SIZE))
    x, mask = images(), torch.ones(SIZE, SIZE)
    rejected: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
        ("denoise_from", (x * 2 - 1,), {}, r"image has values from -.*pass image / 2 \+ 0.5"),
        ("denoise_from", ((x * 255).long(),), {}, "image has dtype torch.int64; pass uint8"),
        ("denoise_from", (x[:, :1],), {}, r"\(2, 1, 8, 8\), but the model's images have 3 channels"),
        ("denoise_from", (x[:0],), {}, r"read as .* = \(0, 3, 8, 8\)"),
        ("denoise_from", (x[..., :7],), {}, "image is 8 x 7 pixels, but the network needs multiples of 2"),
        ("denoise_from", (gray,), {}, r"mode L, but the model's images have 3 channels; pass image.convert\('RGB'\)"),
        ("denoise_from", ([gray.convert("RGB"), Image.new("RGB", (4, 4))],), {}, "all must be of one size"),
        ("denoise_from", ("cat.png",), {}, "must be PIL images, a numpy array or a tensor, not str"),
        ("denoise_from", ([],), {}, "not an empty list"),
        ("denoise_from", (x, 0.0), {}, "strength is 0.0; it must be above 0"),
        ("denoise_from", (x, 1.5), {}, "strength is 1.5"),
        ("denoise_from", (x, 0.01), {"num_inference_steps": 10}, "strength 0.01 of 10 steps is none"),
        ("denoise_from", (x,), {"generator": [seeded()]}, "list of 1 for 2 images"),
        ("interpolate", (x, x[:1]), {}, r"image is \(2, 3, 8, 8\) and other \(1, 3, 8, 8\)"),
        ("interpolate", (x, x, 1.5), {}, "weights is 1.5; give one or more numbers from 0"),
        ("interpolate", (x, x, []), {}, r"weights is \[\]"),
        ("interpolate", (x, x, 0.5, 0.5, "cubic"), {}, "mixing 'cubic' is not one of"),
        ("denoise_from", (None,), {}, "must be PIL images, a numpy array or a tensor, not NoneType"),
        ("denoise_from", ([x, x],), {}, "must be PIL images, a numpy array or a tensor, not Tensor"),
        ("denoise_from", (np.array([[["a"]]], object),), {}, "image has dtype object; pass uint8"),
        ("denoise_from", (x * float("nan"),), {}, "image has values from nan to nan"),
        ("denoise_from", (x, "0.5"), {}, "strength is '0.5'; it must be a finite number"),
        ("denoise_from", (x, float("nan")), {}, "strength is nan"),
        ("denoise_from", (x, True), {}, "strength is True"),
        ("denoise_from", (x,), {"batch_size": 2}, "denoise_from has no argument 'batch_size'"),
        ("denoise_from", (x,), {"strenght": 0.5}, r"has no argument 'strenght' \(did you mean 'strength'\?\)"),
        ("interpolate", (x, x, "0.5"), {}, "weights is '0.5'; give one or more numbers"),
        ("interpolate", (x, x, [0.5, float("nan")]), {}, r"weights is \[0.5, nan\]"),
        ("interpolate", (x, x, None), {}, "weights is None"),
        ("inpaint", (x, None), {}, "mask must be PIL images, a numpy array or a tensor, not NoneType"),
        ("inpaint", (x, [mask, mask]), {}, "mask must be PIL images, a numpy array or a tensor, not Tensor"),
        ("inpaint", (x, mask, True), {}, "num_resamples is True; it must be a whole number"),
        ("encode", (x,), {"eta": 0.5}, "encode has no eta; leave it out"),
        ("encode", (x,), {"callback_on_step_end": lambda *_: None}, "encode has no callback_on_step_end"),
        ("inpaint", (x, mask[:4]), {}, r"mask is read as .* = \(1, 1, 4, 8\); it must have the image's height 8"),
        ("inpaint", (x, mask.expand(3, 1, SIZE, SIZE)), {}, "one for all images or one for each of the 2"),
        ("inpaint", (x, mask * 2), {}, "mask has values from 2 to 2"),
        ("inpaint", (x, mask, 0), {}, "num_resamples is 0"),
        ("inpaint", (x, mask, 2, 0.5), {}, "jump_length is 0.5"),
        ("encode", (x, 0), {}, "num_iterations is 0"),
    ]
    for method, arguments, options, sentence in rejected:
        calls = calls_of(pipe)
        with pytest.raises(ValueError, match=sentence):
            getattr(pipe, method)(*arguments, **options)
        assert calls == []


def test_editing_needs_the_native_scheduler() -> None:
    pipe = pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    x, mask = images(), torch.ones(SIZE, SIZE)
    for method, arguments in (("denoise_from", ()), ("interpolate", (x,)), ("inpaint", (mask,)), ("encode", ())):
        with pytest.raises(ValueError, match=f"{method} needs GaussianDiffusionScheduler, not DDIMScheduler; set"):
            getattr(pipe, method)(x, *arguments)


def test_a_self_conditioned_network_supports_editing_but_not_encoding() -> None:
    pipe = GaussianDiffusionPipeline(tiny_unet(in_channels=6), GaussianDiffusionScheduler(), self_conditioned=True)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    assert pipe.denoise_from(images(), **options).images.shape == (2, 3, SIZE, SIZE)
    assert pipe.inpaint(images(), torch.ones(SIZE, SIZE), 2, 1, **options).images.shape == (2, 3, SIZE, SIZE)
    with pytest.raises(ValueError, match="cannot invert a self-conditioned network"):
        pipe.encode(images(), num_inference_steps=3)


def test_an_offloaded_network_is_released_at_the_end_of_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, released = pipeline(), []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: released.append(True))
    options: dict[str, Any] = {"num_inference_steps": 2}
    pipe(1, **options)
    pipe.inpaint(images(1), torch.ones(SIZE, SIZE), 1, **options)
    pipe.encode(images(1), 1, **options)
    assert len(released) == 3
