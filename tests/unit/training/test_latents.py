"""Training on latents: what is encoded, what the network sees, and what a run keeps of its VAE."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddpm_hf.cli.main import main, train
from ddpm_hf.config import ConfigError, DataConfig, DiffusionConfig, RunConfig, TrainingConfig, load_config
from ddpm_hf.data import DataError, ImageSet, SampleOrder, normalize, open_sets
from ddpm_hf.diffusion import GaussianDiffusionPipeline, latents
from ddpm_hf.models import load_vae
from ddpm_hf.plots import image_grid
from ddpm_hf.rng import normal_by_position
from ddpm_hf.training.latents import LatentLoader, LatentSet, encode_images, open_autoencoder
from ddpm_hf.training.run_dir import RunFolder
from ddpm_hf.training.trainer import Trainer
from tests.conftest import run_arguments, tiny_vae
from tests.runs import assert_same_run

CPU = torch.device("cpu")
NUM_IMAGES = 20


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Random gray images and the latents of a tiny VAE, flipped and measured."""
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    tiny_vae().save_pretrained(tmp_path / "vae")
    return DataConfig(
        source=str(tmp_path / "images.npy"),
        vae=str(tmp_path / "vae"),
        cache_dir=str(tmp_path / "cache"),
        random_flip=True,
        validation_fraction=0.2,
        latent_normalization="measured",
    )


def encode(data: DataConfig) -> tuple[LatentSet, LatentSet]:
    """Return the latents of the training and the validation set."""
    autoencoder = open_autoencoder(RunConfig(data=data), RunFolder(Path("no run")), CPU)
    assert autoencoder is not None
    training, validation = open_sets(data, with_labels=False, seed=0, device=CPU)
    assert isinstance(training, ImageSet)
    encoded = encode_images(training, autoencoder, data, CPU, is_local_main_process=True)
    return encoded, encode_images(validation, autoencoder, data, CPU, is_local_main_process=True, training=encoded)


def test_samples_are_drawn_from_the_moments_of_their_images_in_every_epoch(data: DataConfig) -> None:
    encoded, _ = encode(data)
    loader, order, vae = LatentLoader(encoded, data, 5, CPU), SampleOrder(len(encoded), 5), tiny_vae().eval()
    stop = 3 * len(encoded)
    samples, labels = loader.samples(0, stop)
    pixels = torch.from_numpy(encoded.images.take(order.positions(0, stop))[0])
    mirrored = torch.from_numpy(order.is_mirrored(0, stop))
    assert 0 < mirrored.sum() < stop
    mean, std = latents.encode_moments(vae, normalize(pixels, mirrored))
    z = mean + std * normal_by_position(5, "latents", 0, range(stop), mean.shape[1:], CPU)
    assert encoded.normalization is not None
    expected = latents.normalize(z, latents.statistics(vae, *encoded.normalization))
    torch.testing.assert_close(samples, expected, rtol=1e-4, atol=1e-5)  # encoded in other batches
    assert labels is None
    torch.testing.assert_close(loader.samples(7, 19)[0], samples[7:19], rtol=0, atol=0)
    resident = LatentLoader(encoded, replace(data, device_resident=True), 5, CPU)
    torch.testing.assert_close(resident.samples(0, stop)[0], samples, rtol=0, atol=0)


def test_measured_latents_have_mean_0_and_deviation_1_in_every_channel(data: DataConfig) -> None:
    """Those of the training split; the validation set has its normalization."""
    encoded, validation = encode(data)
    mean, std = (torch.from_numpy(encoded.moments[:, :, kind].astype(np.float64)) for kind in (0, 1))
    assert encoded.normalization is not None
    zero, one = (torch.tensor(values)[:, None, None] for values in encoded.normalization)
    first = (mean - zero) / one
    second = first**2 + (std / one) ** 2
    torch.testing.assert_close(first.mean((0, 1, 3, 4)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(second.mean((0, 1, 3, 4)), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-5)
    assert validation.normalization == encoded.normalization


@pytest.mark.parametrize("kind", ["AutoencoderTiny", "VQModel"])
def test_latents_without_a_deviation_are_the_same_in_every_epoch(data: DataConfig, kind: str, tmp_path: Path) -> None:
    tiny_vae(kind).save_pretrained(tmp_path / kind)
    data = replace(data, vae=str(tmp_path / kind), random_flip=False)
    encoded, validation = encode(data)
    assert encoded.moments.shape[1:3] == (1, 1)
    loader, positions = LatentLoader(encoded, data, 0, CPU), SampleOrder(len(encoded), 0).positions(0, 2 * len(encoded))
    by_image = loader.samples(0, 2 * len(encoded))[0][np.argsort(positions, kind="stable")]
    torch.testing.assert_close(by_image[0::2], by_image[1::2], rtol=0, atol=0)
    assert validation.validation_samples(validation.images.positions, 0, CPU)[0].shape == (4, *encoded.shape)


def test_images_are_encoded_once_for_each_autoencoder(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with the same weights is the same VAE."""
    num_encoded = 0

    def counted(vae: Any, images: torch.Tensor) -> Any:
        nonlocal num_encoded
        num_encoded += len(images)
        return encode_moments(vae, images)

    encode_moments = latents.encode_moments
    monkeypatch.setattr(latents, "encode_moments", counted)
    shutil.copytree(tmp_path / "vae", tmp_path / "copy")
    tiny_vae(seed=1).save_pretrained(tmp_path / "other")
    expected = 0
    for change, factor in (({}, 2), ({}, 0), ({"vae": "copy"}, 0), ({"vae": "other"}, 2), ({"random_flip": False}, 1)):
        expected += factor * NUM_IMAGES
        changes = {name: str(tmp_path / value) if name == "vae" else value for name, value in change.items()}
        encode(replace(data, **changes))
        assert num_encoded == expected, change
    assert not list((tmp_path / "cache").glob("*.building-*"))


def test_a_scale_that_nobody_measured_is_a_warning(data: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        encode(replace(data, latent_normalization="scaling_factor"))
    assert "set data.latent_normalization to measured" in caplog.text


CONTRADICTIONS: list[dict[str, Any]] = [
    {"diffusion": {"clip_sample": True}},
    {"data": {"crop": "random", "resolution": 8}},
    {"data": {"augmentation": 0.1}},
    {"data": {"streaming": True, "resolution": 8, "num_channels": 1}},
    {"model": {"vae": "folder"}},
    {"data": {"vae": ""}},
    {"data": {"vae": None}, "model": {"vae": "folder"}},
    {"data": {"vae": None, "value_range": "auto", "random_flip": True}, "model": {"vae": "folder"}},
    {
        "data": {"vae": None, "value_range": "auto"},
        "model": {"vae": "folder"},
        "evaluation": {"score_every_steps": 2},
    },
]


@pytest.mark.parametrize("change", CONTRADICTIONS, ids=str)
def test_settings_that_contradict_latents_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    def with_change(change: dict[str, Any]) -> RunConfig:
        settings = {"data": {"source": "images", "vae": "folder"}, "diffusion": {"clip_sample": False}}
        return load_config({name: settings.get(name, {}) | change.get(name, {}) for name in {**settings, **change}})

    from ddpm_hf.config import validate

    validate(with_change({}))
    with pytest.raises(ConfigError, match=r"vae.*; set|vae is empty"):
        validate(with_change(change))


def _without_weights(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def _another_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_without_weights, "no weights in the safetensors format"),
        (_another_model, "is a UNet2DModel; give an AutoencoderKL, AutoencoderTiny or VQModel"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json, vae/config.json or vqvae/config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_a_folder_without_an_autoencoder_is_refused(tmp_path: Path, spoil: Callable[[Path], object], says: str) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    spoil(tmp_path / "vae")
    with pytest.raises(ConfigError, match=says):
        load_vae("data.vae", str(tmp_path / "vae"), None)


@pytest.mark.parametrize("place", ["vae", "vqvae"])
def test_an_autoencoder_is_found_in_a_pipeline(tmp_path: Path, place: str) -> None:
    tiny_vae().save_pretrained(tmp_path / place)
    found = load_vae("data.vae", str(tmp_path), None)
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert not any(module.training for module in found.modules())


# ------------------------------------------------------------------------------------------------------------ runs


LATENTS: dict[str, object] = {
    "data__latent_normalization": "measured",
    "data__random_flip": True,
    "data__validation_fraction": 0.02,
    "training__validate_every_steps": 3,
    "training__posthoc_ema": True,
    "training__posthoc_ema_every_steps": 3,
    "preview__every_steps": 3,
    "preview__num_images": 4,
    "preview__num_inference_steps": 2,
    "diffusion__clip_sample": False,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on latents, whose VAE was moved away after its first start."""
    folder = tmp_path_factory.mktemp("latents")
    tiny_vae().save_pretrained(folder / "vae")
    assert train(run_arguments(folder / "run", data__vae=folder / "vae", **LATENTS)) == 0
    return folder / "run"


def test_a_run_keeps_the_autoencoder_as_it_was_given(run: Path) -> None:
    """In its folder and in the pipeline."""
    given = load_file(run.parent / "vae" / "diffusion_pytorch_model.safetensors")
    for folder in (run / "vae", run / "pipeline" / "vae"):
        kept = load_file(folder / "diffusion_pytorch_model.safetensors")
        assert kept.keys() == given.keys()
        assert all(torch.equal(kept[name], given[name]) for name in given)


def test_previews_are_decoded_images(run: Path) -> None:
    with Image.open(run / "previews" / "step_00000003.png") as grid:
        assert grid.size == image_grid(np.zeros((4, 8, 8, 1), np.uint8), 2).size


def test_a_run_is_continued_exactly_without_the_folder_of_its_autoencoder(run: Path, tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    arguments = run_arguments(tmp_path / "run", data__vae=tmp_path / "vae", **LATENTS)
    assert train([*arguments, "--training.num_steps", "3"]) == 0
    shutil.rmtree(tmp_path / "vae")
    assert train(arguments) == 0
    assert_same_run(run, tmp_path / "run", step=6)


def test_another_autoencoder_in_the_run_folder_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    tiny_vae(seed=1).save_pretrained(tmp_path / "run" / "vae")
    arguments = run_arguments(tmp_path / "run", data__vae=run.parent / "vae", **LATENTS)
    assert main(["train", *arguments, "--training.num_steps", "8"]) == 2


def test_a_checkpoint_decodes_with_the_autoencoder_of_its_run(run: Path, tmp_path: Path) -> None:
    pipelines = [
        GaussianDiffusionPipeline.from_pretrained(folder)
        for folder in (run / "checkpoints" / "step_00000006", run / "pipeline")
    ]
    images = [
        pipeline(
            batch_size=2, class_labels=3, num_inference_steps=2, generator=torch.manual_seed(0), output_type="np"
        ).images
        for pipeline in pipelines
    ]
    assert images[0].shape == (2, 8, 8, 1)
    assert main(["ema", str(run), "--length", "0.1", "--output", str(tmp_path / "ema")]) == 0
    assert (tmp_path / "ema" / "vae").is_dir()
    np.testing.assert_array_equal(*images)
    shutil.copytree(run / "checkpoints" / "step_00000006", tmp_path / "step_00000006")
    with pytest.raises(ValueError, match="VAE that decodes them is not beside it"):
        GaussianDiffusionPipeline.from_pretrained(tmp_path / "step_00000006")


def test_another_normalization_than_that_of_a_pretrained_network_is_a_warning(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = LATENTS | {"preview__every_steps": 0, "training__posthoc_ema": False, "training__num_steps": 1}
    settings |= {"model__from_pretrained": run, "model__preset": None, "model__overrides": {}}
    for normalization, is_other in (("measured", False), ("scaling_factor", True)):
        caplog.clear()
        changes = settings | {"data__vae": run / "vae", "data__latent_normalization": normalization}
        arguments = run_arguments(tmp_path / normalization, **changes)
        assert train([*arguments, "--dry_run"]) == 0
        assert ("another mean and standard deviation" in caplog.text) == is_other


def test_latents_given_as_arrays_are_decoded_by_the_autoencoder_of_the_model(tmp_path: Path) -> None:
    """-1 and 1 stand for the limits of data.value_range."""
    z = np.random.default_rng(0).uniform(-3, 5, (16, 2, 4, 4)).astype(np.float32)
    np.save(tmp_path / "z.npy", z)
    tiny_vae().save_pretrained(tmp_path / "vae")
    changes: dict[str, object] = {"model__vae": tmp_path / "vae", "data__source": tmp_path / "z.npy"}
    changes |= {"data__value_range": [-3, 5], "data__num_channels": 2, "model__class_conditional": False}
    assert train(run_arguments(tmp_path / "run", **changes)) == 0
    pipeline = GaussianDiffusionPipeline.from_pretrained(tmp_path / "run")
    assert (pipeline.config.latents_mean, pipeline.config.latents_std) == ([1.0, 1.0], [4.0, 4.0])
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_channels": 3}, "data.vae encodes images of 1 channels, but those of this run have 3"),
        ({"resolution": 7}, "data.vae divides images by 2, but 7x7 is not a multiple of 2"),
    ],
)
def test_images_that_do_not_fit_the_autoencoder_are_refused(
    data: DataConfig, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    config = RunConfig(
        data=replace(data, **change),
        diffusion=DiffusionConfig(clip_sample=False),
        training=TrainingConfig(output_dir=str(tmp_path / "run")),
    )
    with pytest.raises(ValueError, match=says):
        Trainer(config)
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_whose_latents_are_constant_is_refused(data: DataConfig, tmp_path: Path) -> None:
    vae = tiny_vae("AutoencoderTiny")
    for parameter in vae.encoder.parameters():
        parameter.data.zero_()
    vae.save_pretrained(tmp_path / "constant")
    with pytest.raises(DataError, match="constant in channel 0"):
        encode(replace(data, vae=str(tmp_path / "constant")))
