"""Networks of others are read from every kind of folder, and refused with both sides named where they do not fit."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file

from ddpm_hf.config import ConfigError, ModelConfig
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.models import Pretrained, load_pretrained, read_config_file, take_weights
from tests.conftest import tiny_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASSES = {"0": "cat", "1": "dog"}


def network(num_class_embeds: int | None = None, seed: int = 0, **changes: Any) -> UNet2DModel:
    """Returns a network whose weights are all random, unlike those of a fresh one."""
    config: dict[str, Any] = dict(tiny_unet(num_class_embeds).config) | changes
    unet = UNet2DModel.from_config({name: value for name, value in config.items() if not name.startswith("_")})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return unet


def pretrained(source: Path | str, **settings: Any) -> Pretrained:
    return load_pretrained(ModelConfig(preset=None, from_pretrained=str(source), **settings))


def refusal(source: Path | str, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        pretrained(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_weights(one: UNet2DModel, other: UNet2DModel) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our pipeline, stock's, networks alone, and one like google/ddpm-cifar10-32.

    Its files lie side by side, and its attentions have the names of the first releases of diffusers.
    """
    root = tmp_path_factory.mktemp("folders")
    scheduler = GaussianDiffusionScheduler.create(beta_schedule="cosine", prediction_type="v")
    GaussianDiffusionPipeline(network(3), scheduler, class_names=CLASSES, has_null_label=True).save_pretrained(
        root / "ours"
    )
    DDPMPipeline(network(), DDPMScheduler(variance_type="fixed_large")).save_pretrained(root / "stock")
    (root / "flat").mkdir()
    for path in ("unet/config.json", f"unet/{WEIGHTS}", "scheduler/scheduler_config.json", "model_index.json"):
        shutil.copy(root / "stock" / path, root / "flat")
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = load_file(root / "flat" / WEIGHTS)
    for new_name, old_name in old_names.items():
        old = {name.replace(new_name, old_name): value for name, value in old.items()}
    save_file(old, root / "flat" / WEIGHTS)
    network().save_pretrained(root / "alone")
    network().save_pretrained(root / "half", safe_serialization=True)
    half = {name: value.half() for name, value in load_file(root / "half" / WEIGHTS).items()}
    save_file(half, root / "half" / WEIGHTS)
    DDPMPipeline(network(), DDIMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(root / "ddim")
    return root


@pytest.mark.parametrize(
    ("name", "schedule", "prediction", "class_names", "has_null_label"),
    [
        ("ours", "squaredcos_cap_v2", "v_prediction", CLASSES, True),
        ("stock", "linear", "epsilon", None, False),
        ("flat", "linear", "epsilon", None, False),
        ("ddim", "squaredcos_cap_v2", "epsilon", None, False),
    ],
)
def test_every_kind_of_pipeline_folder_is_read(
    folders: Path, name: str, schedule: str, prediction: str, class_names: object, has_null_label: bool
) -> None:
    found = pretrained(folders / name)
    assert_same_weights(found.unet, network(3 if name == "ours" else None))
    assert found.scheduler is not None
    assert found.scheduler.config["beta_schedule"] == schedule
    assert found.scheduler.config["prediction_type"] == prediction
    assert (found.class_names, found.has_null_label) == (class_names, has_null_label)


def test_a_network_alone_says_nothing_of_its_training(folders: Path) -> None:
    found = pretrained(folders / "alone")
    assert_same_weights(found.unet, network())
    assert (found.scheduler, found.class_names, found.has_null_label) == (None, None, None)


def test_weights_in_half_precision_are_taken_in_float32(folders: Path) -> None:
    unet = network(seed=1)
    take_weights(unet, pretrained(folders / "half"), GaussianDiffusionScheduler.create(), None, False)
    for found, expected in zip(unet.parameters(), network().parameters(), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected.half().float())


@pytest.mark.parametrize("name", ["alone", "alone/config.json", "ours", "flat"])
def test_a_configuration_is_read_from_a_file_or_any_folder(folders: Path, name: str) -> None:
    config = read_config_file(ModelConfig(preset=None, config_file=str(folders / name)))
    assert config["block_out_channels"] == [8, 16]
    assert config["num_class_embeds"] == (3 if name == "ours" else None)


# ----------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def cached_repository(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository that was downloaded before, as the Hub's cache keeps it: main has a pipeline, v1 a network alone."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    repository = tmp_path / "models--someone--ddpm-tiny"
    for revision, commit, folder in (("main", "a" * 40, "stock"), ("v1", "b" * 40, "alone")):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(folders / folder, repository / "snapshots" / commit)


@pytest.mark.usefixtures("cached_repository")
def test_a_repository_of_the_hub_is_read_at_the_revision_asked_for() -> None:
    assert_same_weights(pretrained("someone/ddpm-tiny").unet, network())
    assert pretrained("someone/ddpm-tiny").scheduler is not None
    assert pretrained("someone/ddpm-tiny", revision="v1").scheduler is None
    config = read_config_file(ModelConfig(preset=None, config_file="someone/ddpm-tiny", revision="v1"))
    assert config["block_out_channels"] == [8, 16]


@pytest.mark.usefixtures("cached_repository")
@pytest.mark.parametrize(
    ("source", "settings"),
    [("nobody/nothing", {}), ("nothing", {}), ("someone/ddpm-tiny", {"revision": "v9"}), ("not a name", {})],
)
def test_a_repository_that_cannot_be_had_is_one_sentence(source: str, settings: dict[str, Any]) -> None:
    said = refusal(source, **settings)
    assert said.startswith(f"model.from_pretrained {source} is no folder here and cannot be had from the Hub (")
    assert said.endswith("; check the name, the network and, for a private repository, that you are logged in.")
    with pytest.raises(ConfigError, match=f"model.config_file {source} is no folder here and cannot be had"):
        read_config_file(ModelConfig(preset=None, config_file=source, **settings))


# ------------------------------------------------------------------------------------------------- unreadable folders


def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    for source in (str(tmp_path / "gone"), "./gone", "~/gone/gone", "a/b/c"):
        assert refusal(source).startswith(f"model.from_pretrained {source} does not exist; check the path (here is ")
    with pytest.raises(ConfigError, match=r"model.config_file gone/config.json does not exist"):
        read_config_file(ModelConfig(preset=None, config_file="gone/config.json"))


def test_the_folder_of_a_run_names_the_pipeline_in_it(tmp_path: Path) -> None:
    assert "has neither unet/config.json nor config.json of a UNet2DModel." in refusal(tmp_path)
    (tmp_path / "pipeline").mkdir()
    assert f"UNet2DModel; did you mean {tmp_path / 'pipeline'}?" in refusal(tmp_path)


def test_a_revision_of_a_local_folder_is_refused(folders: Path) -> None:
    assert "model.revision main applies to the Hub, but" in refusal(folders / "ours", revision="main")


def test_what_is_no_network_is_refused(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "stock", tmp_path / "copy")
    config = tmp_path / "copy" / "unet" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"_class_name": UNet2DConditionModel.__name__}))
    assert refusal(tmp_path / "copy").endswith("is a UNet2DConditionModel; give a UNet2DModel.")
    config.write_text("{")
    assert "copy: config.json cannot be read (Expecting property name" in refusal(tmp_path / "copy")
    config.write_text("[]")
    assert "copy: config.json holds no settings." in refusal(tmp_path / "copy")
    assert "is a file; give the folder of a pipeline" in refusal(config)


def test_weights_must_be_whole_and_safetensors(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "stock", tmp_path / "copy")
    path = tmp_path / "copy" / "unet" / WEIGHTS
    content = load_file(path)
    first = next(iter(content))
    save_file({name: value for name, value in content.items() if name != first}, path)
    assert first in refusal(tmp_path / "copy")
    path.write_bytes(path.read_bytes()[:1000])
    assert "copy cannot be loaded (" in refusal(tmp_path / "copy")
    path.rename(path.with_suffix(".bin"))
    assert "has no weights in the safetensors format. If you trust it, load it once with" in refusal(tmp_path / "copy")


def test_a_scheduler_that_is_no_ddpms_is_refused(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "stock", tmp_path / "copy")
    path = tmp_path / "copy" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"beta_schedule": "exponential"}))
    assert "has a scheduler that is no DDPM's (beta_schedule 'exponential'" in refusal(tmp_path / "copy")


# ------------------------------------------------------------------------------------------- what fits, what does not


def taken(
    folders: Path,
    name: str,
    unet: UNet2DModel,
    class_names: dict[str, str] | None = None,
    has_null_label: bool = False,
    **schedule: Any,
) -> UNet2DModel:
    """Takes weights as a run does."""
    scheduler = GaussianDiffusionScheduler.create(**schedule)
    take_weights(unet, pretrained(folders / name), scheduler, class_names, has_null_label)
    return unet


COSINE_V = {"beta_schedule": "cosine", "prediction_type": "v"}


def test_what_fits_is_taken_bit_by_bit_and_in_silence(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert_same_weights(taken(folders, "stock", network(seed=1)), network())
        assert_same_weights(taken(folders, "flat", network(seed=1)), network())
        assert_same_weights(taken(folders, "ours", network(3, seed=1), CLASSES, True, **COSINE_V), network(3))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "unet", "arguments", "sentence"),
    [
        ("stock", {"in_channels": 3}, {}, "takes 1 channels, but this run needs 3; set data.num_channels"),
        ("stock", {"out_channels": 2}, {}, "returns 1 channels, but this run needs 2"),
        ("stock", {"num_class_embeds": 2}, {"class_names": CLASSES}, "is unconditional, but this run needs 2; set"),
        ("ours", {}, COSINE_V, "knows 3 labels, the last of them the null label, but this run needs none; set model."),
        (
            "ours",
            {"num_class_embeds": 2},
            {"class_names": CLASSES, **COSINE_V},
            "but this run needs 2; set objective.class_dropout above 0, for example to 0.1, or choose another",
        ),
        (
            "ours",
            {"num_class_embeds": 3},
            {"class_names": CLASSES | {"2": "cow"}, **COSINE_V},
            "the last of them the null label, but this run needs 3; set objective.class_dropout above 0",
        ),
        (
            "ours",
            {"num_class_embeds": 5},
            {"class_names": CLASSES | {"2": "cow", "3": "hen"}, "has_null_label": True, **COSINE_V},
            "this run needs 5 (the null label included); train on data with as many classes, or choose another",
        ),
        ("stock", {}, {"prediction_type": "v"}, "predicts epsilon, but diffusion.prediction_type is v_prediction; set"),
        ("stock", {"block_out_channels": (4, 16)}, {}, "has weights of another shape than model.overrides ask for ("),
    ],
)
def test_what_does_not_fit_is_refused_with_both_sides_and_the_fix(
    folders: Path, name: str, unet: dict[str, Any], arguments: dict[str, Any], sentence: str
) -> None:
    mine = network(seed=1, **unet)
    before = [parameter.detach().clone() for parameter in mine.parameters()]
    with pytest.raises(ConfigError) as caught:
        taken(folders, name, mine, **arguments)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(f"model.from_pretrained {folders / name} ")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(one, other) for one, other in zip(before, mine.parameters(), strict=True)) or (
        "another shape" in sentence
    )


@pytest.mark.parametrize(
    ("name", "unet", "arguments", "line"),
    [
        (
            "stock",
            {},
            {"beta_schedule": "cosine"},
            "another noise schedule (linear, alpha_bar_T 4.04e-05) than diffusion",
        ),
        (
            "stock",
            {},
            {"beta_end": 0.03},
            "(linear, alpha_bar_T 4.04e-05) than diffusion asks for (linear, alpha_bar_T",
        ),
        (
            "stock",
            {},
            {"num_train_timesteps": 500},
            "was trained with 1000 timesteps; diffusion.num_train_timesteps is 5",
        ),
        ("stock", {"sample_size": [8, 16]}, {}, "was made for images of 8x8; it is now trained on 8x16."),
        (
            "alone",
            {},
            {"prediction_type": "v"},
            "does not say what its network predicts; it is taken for v_prediction.",
        ),
        (
            "ours",
            {"num_class_embeds": 3},
            {"class_names": {"0": "cat", "1": "cow"}, "has_null_label": True, **COSINE_V},
            "was trained on classes of other names",
        ),
    ],
)
def test_what_a_run_may_change_on_purpose_is_named(
    folders: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    unet: dict[str, Any],
    arguments: dict[str, Any],
    line: str,
) -> None:
    with caplog.at_level(logging.WARNING):
        mine = taken(folders, name, network(seed=1, **unet), **arguments)
    assert len(caplog.messages) == 1
    assert line in caplog.messages[0]
    assert_same_weights(mine, network(unet.get("num_class_embeds")))
