"""Loading an untrusted saved folder without consent runs no code and writes nothing, in any way of loading."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file

from ddpm_hf.config import ConfigError, ModelConfig
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.models import load_pretrained, read_config_file
from tests.conftest import tiny_unet
from tests.security.conftest import Watch
from tests.security.hostile import module_that_runs, pickle_that_runs, torch_file_that_runs

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
Attack = Callable[[Path, Path], object]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest") / "pipeline"
    GaussianDiffusionPipeline(tiny_unet(), GaussianDiffusionScheduler()).save_pretrained(folder)
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def index(**changes: object) -> Attack:
    return lambda folder, canary: edit(folder / "model_index.json", **changes)


def code_beside(*names: str, **changes: object) -> Attack:
    """Put code into files of the folder and name them in the index."""

    def attack(folder: Path, canary: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(module_that_runs(canary))
        edit(folder / "model_index.json", **changes)

    return attack


def pickled_weights(name: str) -> Attack:
    def attack(folder: Path, canary: Path) -> None:
        (folder / "unet" / WEIGHTS).unlink()
        torch_file_that_runs(canary, folder / "unet" / name)

    return attack


def pickle_called_safetensors(folder: Path, canary: Path) -> None:
    (folder / "unet" / WEIGHTS).write_bytes(pickle_that_runs(canary))


def shards(name: str) -> Attack:
    """Replace the weights by one shard that is a pickle, under any path."""

    def attack(folder: Path, canary: Path) -> None:
        keys = tiny_unet().state_dict()
        (folder / "unet" / WEIGHTS).unlink()
        shard = name.replace("OUTSIDE", str(canary.parent / "outside"))
        place = folder / "unet" / shard
        place.parent.mkdir(exist_ok=True)
        torch_file_that_runs(canary, place)
        content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, shard)}
        (folder / "unet" / INDEX).write_text(json.dumps(content))

    return attack


# Never loaded, in any way.
REFUSED: dict[str, Attack] = {
    "a function as scheduler": index(scheduler=["os", "system"]),
    "a process as unet": index(unet=["subprocess", "Popen"]),
    "a module that is not imported": index(scheduler=["antigravity", "fly"]),
    "a private function as unet": index(unet=["builtins", "exec"]),
    "code of a component beside it": code_beside("unet/hostile.py", unet=["hostile", "Hostile"]),
    "code of a scheduler beside it": code_beside("scheduler/hostile.py", scheduler=["hostile", "Hostile"]),
    "code beside it as pipeline": code_beside("hostile.py", _class_name=["hostile", "Hostile"]),
    "a pickle": pickled_weights("diffusion_pytorch_model.bin"),
    "a pickle of PyTorch": pickled_weights("pytorch_model.bin"),
    "a pickle called safetensors": pickle_called_safetensors,
    "a zip of PyTorch called safetensors": pickled_weights(WEIGHTS),
    "a shard that is a pickle": shards("shard.bin"),
    "a shard that is a pickle called GGUF": shards("shard.gguf"),
    "a shard that is a pickle called safetensors": shards("shard.safetensors"),
    "a shard at an absolute path": shards("OUTSIDE/shard.safetensors"),
    "a shard above the folder": shards("../shard.safetensors"),
}
# Not needed for loading, and therefore ignored.
WITHOUT_EFFECT: dict[str, Attack] = {
    "code in the place of ours": code_beside("pipeline.py", "scheduler.py", "unet/unet.py", "__init__.py"),
    "code in the place of ours, asked for": code_beside(
        "pipeline.py", _class_name=["pipeline", "GaussianDiffusionPipeline"]
    ),
    "a scheduler of another class": lambda folder, canary: edit(
        folder / "scheduler" / "scheduler_config.json", _class_name="os.system", command="touch x", _module="os"
    ),
    "modules named in a config": lambda folder, canary: edit(
        folder / "unet" / "config.json", auto_map={"AutoModel": "hostile.Hostile"}, _module="os"
    ),
}


def hostile_copy(honest: Path, attack: Attack, watch: Watch) -> Path:
    folder = watch.folder / "hostile"
    watch.is_on = False
    shutil.copytree(honest, folder)
    attack(folder, watch.canary)
    assert not watch.canary.exists()
    watch.is_on = True
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_needs_code_or_pickles_is_refused(honest: Path, watch: Watch, name: str) -> None:
    folder = hostile_copy(honest, REFUSED[name], watch)
    with pytest.raises((ValueError, OSError, AttributeError, ImportError)):
        GaussianDiffusionPipeline.from_pretrained(folder)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_code_in_a_folder_is_not_run_without_consent(honest: Path, watch: Watch, name: str) -> None:
    folder = hostile_copy(honest, WITHOUT_EFFECT[name], watch)
    pipeline = GaussianDiffusionPipeline.from_pretrained(folder)
    assert type(pipeline) is GaussianDiffusionPipeline
    assert type(pipeline.scheduler) is GaussianDiffusionScheduler


@pytest.mark.parametrize("name", ["code in the place of ours", "code in the place of ours, asked for"])
def test_diffusers_without_ddpm_hf_runs_no_code_either(honest: Path, watch: Watch, name: str) -> None:
    """Without ddpm_hf: a folder whose index asks for code is refused, one that only contains code loads without it."""
    folder = hostile_copy(honest, WITHOUT_EFFECT[name], watch)
    if "asked for" in name:
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(folder)
    else:
        DiffusionPipeline.from_pretrained(folder)


def test_the_hostile_code_runs_with_consent(honest: Path, watch: Watch) -> None:
    """The attack is one: with trust_remote_code the same folder does run its code."""
    folder = hostile_copy(honest, WITHOUT_EFFECT["code in the place of ours"], watch)
    watch.is_on = False
    with pytest.raises(Exception):  # noqa: B017 - any error, after the code has run
        DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)(1)
    assert watch.canary.exists()
    watch.canary.unlink()


WEIGHTS_OF_OTHERS = [name for name in REFUSED if "pickle" in name or "shard" in name or "zip" in name]


@pytest.mark.parametrize("name", WEIGHTS_OF_OTHERS)
def test_pretrained_weights_are_never_a_pickle(honest: Path, watch: Watch, name: str) -> None:
    folder = hostile_copy(honest, REFUSED[name], watch)
    with pytest.raises(ConfigError, match=r"^model\.from_pretrained .*(has no weights|cannot be loaded)"):
        load_pretrained(ModelConfig(preset=None, from_pretrained=str(folder)))


@pytest.mark.parametrize("name", [*WITHOUT_EFFECT, "a function as scheduler", "a module that is not imported"])
def test_a_pretrained_network_is_read_without_the_classes_of_its_index(honest: Path, watch: Watch, name: str) -> None:
    """Its parts are loaded as the expected classes, never as the classes that an index names."""
    folder = hostile_copy(honest, {**WITHOUT_EFFECT, **REFUSED}[name], watch)
    found = load_pretrained(ModelConfig(preset=None, from_pretrained=str(folder)))
    assert type(found.unet) is UNet2DModel
    assert type(found.scheduler) is GaussianDiffusionScheduler
    assert read_config_file(ModelConfig(preset=None, config_file=str(folder)))["block_out_channels"] == [8, 16]


def test_a_scheduler_with_too_many_timesteps_is_refused(honest: Path, watch: Watch) -> None:
    folder = hostile_copy(honest, lambda folder, canary: None, watch)
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=10**15)
    with pytest.raises(ConfigError, match=r"^model\.from_pretrained .*scheduler"):
        load_pretrained(ModelConfig(preset=None, from_pretrained=str(folder)))


# ------------------------------------------------------------------------------------------------------ honest pickles


def split_into_pickles(folder: Path, canary: Path) -> None:
    """Replace the weights by one shard that is a harmless pickle, which diffusers would read."""
    weights = load_file(folder / "unet" / WEIGHTS)
    shards("shard.bin")(folder, canary)
    torch.save(weights, folder / "unet" / "shard.bin")


SHARD = r"names 'shard\.bin', which is not a safetensors file"


def test_shards_are_never_pickles(honest: Path, watch: Watch) -> None:
    folder = hostile_copy(honest, split_into_pickles, watch)
    for consent in ({}, {"use_safetensors": True}):
        with pytest.raises(ValueError, match=SHARD):
            GaussianDiffusionPipeline.from_pretrained(folder, **consent)
    with pytest.raises(ConfigError, match=SHARD):
        load_pretrained(ModelConfig(preset=None, from_pretrained=str(folder / "unet")))


def test_shards_of_a_cached_repository_are_never_pickles(honest: Path, watch: Watch) -> None:
    """In the cache of the Hub."""
    folder = hostile_copy(honest, split_into_pickles, watch)
    repository = watch.folder / "models--someone--sharded"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    with pytest.raises(ValueError, match=SHARD):
        GaussianDiffusionPipeline.from_pretrained("someone/sharded", cache_dir=watch.folder, local_files_only=True)


def test_shards_of_safetensors_are_read(honest: Path, watch: Watch) -> None:
    folder = hostile_copy(honest, lambda folder, canary: None, watch)
    unet = UNet2DModel.from_pretrained(honest / "unet", use_safetensors=True)
    (folder / "unet" / WEIGHTS).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="10KB")
    assert (folder / "unet" / INDEX).is_file()
    loaded = GaussianDiffusionPipeline.from_pretrained(folder).unet.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in unet.state_dict().items())
