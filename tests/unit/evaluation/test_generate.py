"""Image i is a function of (seed, i), and a stopped evaluation continues."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.config.schema import SCHEDULERS
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.evaluation.generate import (
    Sampler,
    call_with_trajectory,
    default_sampling,
    fingerprint,
    sample_images,
    sample_to_folder,
    sample_trajectory,
    settings_of,
    split_into_batches,
)
from tests.conftest import tiny_unet
from tests.unit.diffusion.oracles import GaussianData
from tests.unit.evaluation.ranks import Ranks

SAMPLER = Sampler(num_inference_steps=2, eta=1.0)
CLASSES = {"0": "cat", "1": "dog", "2": "owl"}


def make_pipeline(sampler: Sampler = SAMPLER, **options: Any) -> GaussianDiffusionPipeline:
    """Return a class-conditional pipeline of 3 classes, prepared by a sampler."""
    scheduler = GaussianDiffusionScheduler.create(num_train_timesteps=20, **options)
    pipeline = GaussianDiffusionPipeline(tiny_unet(num_class_embeds=3), scheduler, class_names=CLASSES)
    return sampler.prepare(pipeline)


def sample(folder: Path, num_images: int = 11, **options: Any) -> np.ndarray:
    """Sample into a folder, 4 images per batch."""
    sampler = options.pop("sampler", SAMPLER)
    pipeline = options.pop("pipeline", None) or make_pipeline(sampler)
    batch_size = options.pop("batch_size", 4)
    settings = settings_of(pipeline, sampler, options.pop("seed", 0), batch_size)
    samples = sample_to_folder(
        pipeline, sampler, folder, settings, num_images=num_images, batch_size=batch_size, **options
    )
    return np.array(samples)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """11 images, sampled at once."""
    return sample(tmp_path_factory.mktemp("whole") / "samples")


def test_an_image_is_the_same_in_any_batch(tmp_path: Path, whole: np.ndarray) -> None:
    """To one gray level in float32: sums in a network depend on the size of the batch in their last digits."""
    assert whole.shape == (11, 8, 8, 1)
    assert len(np.unique(whole, axis=0)) == 11
    others = sample(tmp_path / "samples", batch_size=3)
    assert np.abs(others.astype(int) - whole).max() <= 1
    in_memory = sample_images(make_pipeline(), SAMPLER, seed=0, indices=range(11), batch_size=4)
    np.testing.assert_array_equal(in_memory, whole)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_the_bits_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch, num_processes: int
) -> None:
    """And each process samples only its part: 2 steps of 11 images in all."""
    sizes: list[int] = []
    # Built one after the other: the weights come from the global generator, which all threads share.
    pipelines = [make_pipeline() for _ in range(num_processes)]

    def work(rank: int) -> np.ndarray:
        pipeline = pipelines[rank]
        pipeline.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        return sample(tmp_path / "samples", pipeline=pipeline)

    for samples in Ranks(monkeypatch, num_processes).run(work):
        np.testing.assert_array_equal(samples, whole)
    assert sum(sizes) == 2 * 11
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["samples.npy", "settings.json"]


@pytest.mark.parametrize("batches_done", [0, 1, 2])
def test_a_killed_evaluation_continues_to_the_same_images(tmp_path: Path, whole: np.ndarray, batches_done: int) -> None:
    """What a kill leaves: whole batches, a temporary file, and a truncated one."""
    pipeline, num_calls = make_pipeline(), 0

    def kill(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 2 * batches_done:
            raise KeyboardInterrupt

    hook = pipeline.unet.register_forward_pre_hook(kill)
    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path / "samples", pipeline=pipeline)
    hook.remove()
    parts = tmp_path / "samples" / "parts"
    assert len(list(parts.iterdir())) == batches_done
    (parts / ".00000008-00000011.npy.writing").write_bytes(b"half")
    np.save(parts / "00000011-00000012.npy", whole[:1, :4])
    np.save(parts / "00000008-00000011.npy", whole[8:])
    cut = (parts / "00000008-00000011.npy").read_bytes()[:-5]
    (parts / "00000008-00000011.npy").write_bytes(cut)
    sizes: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    np.testing.assert_array_equal(sample(tmp_path / "samples", pipeline=pipeline), whole)
    assert sum(sizes) == 2 * (11 - 4 * batches_done), "nothing that was done is done again"
    assert not parts.exists()


def test_a_folder_is_extended_and_gives_its_first_images(tmp_path: Path, whole: np.ndarray) -> None:
    first = sample(tmp_path / "samples", 8)
    np.testing.assert_array_equal(first, whole[:8])
    pipeline = make_pipeline()
    sizes: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    np.testing.assert_array_equal(sample(tmp_path / "samples", 11, pipeline=pipeline), whole)
    assert sizes == [3, 3]
    np.testing.assert_array_equal(sample(tmp_path / "samples", 5, pipeline=pipeline), whole[:5])
    assert sizes == [3, 3]
    assert len(np.load(tmp_path / "samples" / "samples.npy")) == 11


def test_pictures_hold_the_same_pixels(tmp_path: Path, whole: np.ndarray) -> None:
    sample(tmp_path / "samples", as_png=True)
    paths = sorted((tmp_path / "samples" / "png").iterdir())
    assert [path.name for path in paths] == [f"{index:06d}.png" for index in range(11)]
    for path, image in zip(paths, whole, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), image[..., 0])


def another_network() -> GaussianDiffusionPipeline:
    pipeline = make_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] += 1e-7
    return pipeline


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seed": 1}, r"\(seed was 0, is 1\)"),
        ({"sampler": Sampler(num_inference_steps=3, eta=1.0)}, r"\(num_inference_steps was 2, is 3\)"),
        ({"sampler": Sampler(num_inference_steps=2, eta=0.0)}, r"\(eta was 1.0, is 0.0\)"),
        ({"sampler": Sampler(num_inference_steps=2, eta=1.0, labels=(2,))}, r"\(labels was \[0, 1, 2\], is \[2\]\)"),
        ({"pipeline": another_network}, r"\(pipeline was \w{19}…, is \w{19}…\)"),
    ],
)
def test_samples_of_other_settings_are_refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    sample(tmp_path / "samples", 2)
    before = (tmp_path / "samples" / "samples.npy").read_bytes()
    if "pipeline" in options:
        options = {"pipeline": another_network()}
    with pytest.raises(ValueError, match=sentence):
        sample(tmp_path / "samples", 2, **options)
    assert (tmp_path / "samples" / "samples.npy").read_bytes() == before


def test_a_folder_of_something_else_is_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not a folder of samples"):
        sample(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    sample(tmp_path / "samples", 2)
    (tmp_path / "samples" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json is not valid JSON .*; remove .* to sample again"):
        sample(tmp_path / "samples", 2)


def test_the_fingerprint_is_that_of_what_the_samples_depend_on(tmp_path: Path) -> None:
    """The same after saving and loading and in training mode; another one for a weight, a schedule or a variance."""
    pipeline = make_pipeline()
    known = fingerprint(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = GaussianDiffusionPipeline.from_pretrained(tmp_path)
    loaded.unet.train()
    assert fingerprint(loaded) == known
    moments = torch.full((20,), 0.9)
    loaded.scheduler.eps_second_moments = moments if loaded.scheduler.variance_type == "fixed_small" else None
    assert fingerprint(loaded) == known, "moments that are not in use change no sample"
    loaded.scheduler.analytic_variance = True
    others = [another_network(), make_pipeline(clip_sample=False), make_pipeline(beta_end=0.03), loaded]
    others.append(make_pipeline(Sampler(scheduler="DDIMScheduler")))
    assert len({known, *map(fingerprint, others)}) == 6


def test_the_analytic_variance_uses_the_second_moments_of_the_pipeline() -> None:
    pipeline = make_pipeline()
    pipeline.scheduler.eps_second_moments = torch.linspace(0.5, 0.9, 20)
    prepared = Sampler(analytic_variance=True).prepare(pipeline)
    assert torch.equal(prepared.scheduler.eps_second_moments, pipeline.scheduler.eps_second_moments)
    assert prepared.scheduler.analytic_variance
    assert not pipeline.scheduler.analytic_variance


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (Sampler(scheduler="DPMSolverMultistepScheduler", num_inference_steps=3), "DPMSolverMultistepScheduler"),
        (Sampler(scheduler="DDIMScheduler", num_inference_steps=3, eta=0.5), "DDIMScheduler"),
        (Sampler(scheduler="DDPMScheduler", num_inference_steps=3), "GaussianDiffusionScheduler"),
        (Sampler(timestep_spacing="quadratic", num_inference_steps=3), "GaussianDiffusionScheduler"),
    ],
)
def test_any_scheduler_samples_by_its_name(sampler: Sampler, name: str) -> None:
    pipeline = make_pipeline(sampler)
    assert type(pipeline.scheduler).__name__ == name
    assert sampler.to_dict(pipeline)["scheduler"] == name
    assert sample_images(pipeline, sampler, seed=0, indices=range(2), batch_size=2).std() > 0
    assert len(pipeline.scheduler.timesteps) == 3


@pytest.mark.parametrize(
    ("sampler", "sentence"),
    [
        (Sampler(scheduler="FancyScheduler"), "scheduler is FancyScheduler, which diffusers .* does not have; give"),
        (Sampler(scheduler="UNet2DModel"), "scheduler is UNet2DModel, which diffusers"),
        (Sampler(scheduler="DPMSolverMultistepScheduler", eta=1.0), "DPMSolverMultistepScheduler has no eta"),
        (Sampler(scheduler="DDIMScheduler", analytic_variance=True), "the scheduler is DDIMScheduler"),
        (Sampler(analytic_variance=True), "analytic_variance needs the second moments"),
        (Sampler(labels=(3,)), r"labels are \[3\], but the labels of the network are 0 to 2"),
        (Sampler(guidance_scale=2.0), "no null label to guide against"),
    ],
)
def test_what_cannot_be_sampled_is_refused(sampler: Sampler, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        sample_images(make_pipeline(sampler), sampler, seed=0, indices=range(1), batch_size=1)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
def test_every_short_name_samples(name: str) -> None:
    sampler = Sampler(scheduler=name, num_inference_steps=4)
    prepared = sampler.prepare(GaussianDiffusionPipeline(tiny_unet(), GaussianDiffusionScheduler()))
    assert sample_images(prepared, sampler, seed=0, indices=range(1), batch_size=1).std() > 0


@pytest.mark.parametrize(
    ("given", "scheduler", "num_steps", "eta"),
    [
        ({}, "UniPCMultistepScheduler", 20, None),
        ({"num_inference_steps": 7}, "UniPCMultistepScheduler", 7, None),
        ({"timestep_spacing": "linspace"}, "UniPCMultistepScheduler", 20, None),
        ({"timestep_spacing": "quadratic"}, None, 50, 0.0),
        ({"needs_native": True}, None, 50, 0.0),
        ({"eta": 0.0}, None, 50, 0.0),
        ({"eta": 1.0}, None, 1000, 1.0),
        ({"scheduler": "HeunDiscreteScheduler"}, "HeunDiscreteScheduler", 20, None),
        ({"scheduler": "DDIMScheduler"}, "DDIMScheduler", 50, None),
    ],
)
def test_sampling_has_defaults_for_a_ddpm(
    given: dict[str, Any], scheduler: str | None, num_steps: int, eta: float | None
) -> None:
    found = default_sampling(GaussianDiffusionPipeline(tiny_unet(), GaussianDiffusionScheduler()), **given)
    assert (found["scheduler"], found["num_inference_steps"], found["eta"]) == (scheduler, num_steps, eta)


def test_a_model_keeps_what_it_says_about_sampling() -> None:
    """A number of steps, another scheduler; a self-conditioned network needs DDIM, a short process fewer steps."""
    self_conditioned = diffusers.UNet2DModel(in_channels=2, out_channels=1, block_out_channels=(32, 32, 32, 32))
    student = GaussianDiffusionScheduler()
    student.register_to_config(default_num_inference_steps=4)
    ddim = diffusers.DDIMScheduler()
    short = GaussianDiffusionScheduler(num_train_timesteps=12)
    for pipeline, expected in [
        (GaussianDiffusionPipeline(tiny_unet(), student), (None, None, 0.0)),
        (GaussianDiffusionPipeline(tiny_unet(), ddim), (None, 50, None)),
        (GaussianDiffusionPipeline(tiny_unet(), short), ("UniPCMultistepScheduler", 12, None)),
        (GaussianDiffusionPipeline(self_conditioned, short, self_conditioned=True), (None, 12, 0.0)),
    ]:
        found = default_sampling(pipeline)
        assert (found["scheduler"], found["num_inference_steps"], found["eta"]) == expected


def test_samples_of_another_guide_or_interval_are_other_samples() -> None:
    """Without them the settings are those of earlier versions."""
    pipeline = make_pipeline()
    guides = [GaussianDiffusionPipeline(tiny_unet(3), pipeline.scheduler) for _ in range(2)]
    guides[1].unet.conv_out.bias.data += 1
    plain, *guided = (Sampler(guide=guide, guidance_scale=2.0).to_dict(pipeline) for guide in (None, *guides))
    assert {"guide", "guidance_interval"} & plain.keys() == set()
    assert len(guided[0]["guide"]) == 64
    assert guided[0]["guide"] != guided[1]["guide"]
    assert Sampler(guidance_interval=(0.2, 0.8)).to_dict(pipeline)["guidance_interval"] == [0.2, 0.8]


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize("name", ["unipc", "heun"])
def test_the_samples_of_a_cosine_schedule_have_the_moments_of_the_data(name: str) -> None:
    """The noise level falls by a factor of 3000 in the first step, at which Heun's method diverges by default."""
    options = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}
    data, scheduler = GaussianData(), GaussianDiffusionScheduler.create(**options)
    unet = tiny_unet()
    unet.forward = lambda x, t, **_: (data.predict(scheduler, x, int(t)),)  # type: ignore[method-assign]
    sampler = Sampler(scheduler=name, num_inference_steps=20)
    pipeline = sampler.prepare(GaussianDiffusionPipeline(unet, scheduler))
    images = sample_images(pipeline, sampler, seed=0, indices=range(64), batch_size=64) / 127.5 - 1
    assert images.mean() == pytest.approx(0.3, abs=0.05)
    assert images.std() == pytest.approx(0.48, abs=0.05)


def test_a_scheduler_without_a_step_for_the_prediction_type_is_refused() -> None:
    sampler = Sampler(scheduler="euler_a", num_inference_steps=2)
    scheduler = GaussianDiffusionScheduler(prediction_type="sample")
    prepared = sampler.prepare(GaussianDiffusionPipeline(tiny_unet(), scheduler))
    with pytest.raises(ValueError, match="EulerAncestralDiscreteScheduler cannot sample from a network that predicts"):
        sampler.check(prepared)


def test_classes_come_in_turn_and_the_network_is_left_as_it_was() -> None:
    pipeline = make_pipeline()
    pipeline.unet.train()
    seen: list[list[int]] = []
    modes: list[bool] = []

    def look(module: torch.nn.Module, _: Any, named: dict[str, Any]) -> None:
        seen.append(named["class_labels"].tolist())
        modes.append(module.training)

    pipeline.unet.register_forward_pre_hook(look, with_kwargs=True)
    state = torch.get_rng_state()
    sample_images(pipeline, SAMPLER, seed=0, indices=range(2, 7), batch_size=5)
    assert seen == [[2, 0, 1, 2, 0]] * 2, "one call per step, wherever the batch begins"
    assert not any(modes)
    assert pipeline.unet.training
    assert torch.equal(torch.get_rng_state(), state)
    sample_images(pipeline, Sampler(num_inference_steps=1, labels=(1,)), seed=0, indices=range(2), batch_size=2)
    assert seen[-1] == [1, 1]


def test_the_trajectory_goes_from_noise_to_the_samples(whole: np.ndarray) -> None:
    """Exactly, because the batches are those of the samples; two thirds of the noise lie within [-1, 1]."""
    pipeline = make_pipeline()
    sizes: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    states = sample_trajectory(pipeline, SAMPLER, seed=0, num_images=7, batch_size=4)
    assert sizes == [4, 4, 3, 3]
    assert states.shape == (3, 7, 8, 8, 1)
    np.testing.assert_array_equal(states[-1, :4], whole[:4])
    assert np.abs(states[-1].astype(int) - whole[:7]).max() <= 1
    assert 0.2 < np.isin(states[0], (0, 255)).mean() < 0.5


def test_a_trajectory_keeps_few_states_of_many_steps() -> None:
    """Of 60 steps, 40 states in 8 bits, so that those of large images fit into memory."""
    scheduler = GaussianDiffusionScheduler.create(num_train_timesteps=60)
    pipeline = GaussianDiffusionPipeline(tiny_unet(), scheduler)
    states = sample_trajectory(pipeline, Sampler(), seed=0, num_images=1, batch_size=1)
    assert (states.shape, states.dtype) == ((40, 1, 8, 8, 1), np.uint8)


class Fading:
    """In place of a pipeline: 100 steps from black to white."""

    def __init__(self) -> None:
        self.unet, self.sample_shape, self.device = tiny_unet(), (1, 8, 8), torch.device("cpu")
        self.decode_latents = torch.clone

    def check_inputs(self, batch_size: int, **_: Any) -> int:
        return 100

    def __call__(self, *, callback_on_step_end: Any, **_: Any) -> Any:
        for step in range(100):
            sample = torch.full((2, 1, 8, 8), (step + 1) / 50 - 1)
            callback_on_step_end(self, step, 99 - step, {"sample": sample})
        return SimpleNamespace(images=None)


def test_the_states_of_a_trajectory_are_evenly_spaced_and_end_with_the_last() -> None:
    """To half a gray level, the rounding; the first state is the noise."""
    pipeline: Any = Fading()
    _, states = call_with_trajectory(pipeline, generator=[torch.Generator().manual_seed(seed) for seed in range(2)])
    assert states.shape == (40, 2, 8, 8, 1)
    levels = [round(frame * 100 / 39) for frame in range(1, 40)]
    np.testing.assert_allclose(states[1:, 0, 0, 0, 0], [2.55 * level for level in levels], atol=0.51, rtol=0)


def test_batches_stay_on_one_grid_if_indices_are_missing() -> None:
    wanted = np.ones(10, bool)
    assert split_into_batches(wanted, 4) == [range(4), range(4, 8), range(8, 10)]
    wanted[:4] = False
    assert split_into_batches(wanted, 4) == [range(4, 8), range(8, 10)]
    wanted[5] = False
    assert split_into_batches(wanted, 4) == [range(4, 5), range(6, 8), range(8, 10)]
    assert split_into_batches(~np.ones(3, bool), 4) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_batch_size_is_one_of_the_settings(tmp_path: Path, dtype: torch.dtype) -> None:
    """Another one moves values by several gray levels there, so a folder with both would be no sample of either."""
    pipeline = make_pipeline()
    pipeline.unet.to(dtype)
    sample(tmp_path / "samples", 2, pipeline=pipeline, batch_size=2)
    with pytest.raises(ValueError, match=r"holds samples of other settings \(batch_size was 2, is 3\)"):
        sample(tmp_path / "samples", 3, pipeline=pipeline, batch_size=3)
    assert len(sample(tmp_path / "samples", 3, pipeline=pipeline, batch_size=2)) == 3


def test_the_settings_are_in_the_folder(tmp_path: Path) -> None:
    sample(tmp_path / "samples", 2)
    settings = json.loads((tmp_path / "samples" / "settings.json").read_text())
    assert settings | {"pipeline": ""} == {
        "schema_version": 1, "pipeline": "", "seed": 0, "scheduler": "GaussianDiffusionScheduler",
        "num_inference_steps": 2, "eta": 1.0, "timestep_spacing": "leading", "guidance_scale": 1.0,
        "guidance_rescale": 0.0,
        "analytic_variance": False, "labels": [0, 1, 2], "dtype": "float32", "device": "cpu",
    }  # fmt: skip
