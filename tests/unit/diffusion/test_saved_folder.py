"""The saved folder: its index, its code, and what it must not contain."""

import ast
import copy
import inspect
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from oracles import seeded, tiny_unet

import ddpm_hf.diffusion
from ddpm_hf.diffusion import GaussianDiffusionPipeline, GaussianDiffusionScheduler
from ddpm_hf.diffusion.saved_folder import PORTABLE_FILES
from tests import version_0_1

CORE = Path(inspect.getfile(ddpm_hf.diffusion)).parent
LIST_FORM = ["pipeline", "GaussianDiffusionPipeline"]


def save(folder: Path, unet: UNet2DModel | None = None, scheduler: Any = None, **extras: Any) -> dict[str, Any]:
    """Save a pipeline of tiny parts and return its index."""
    pipe = GaussianDiffusionPipeline(unet or tiny_unet(), scheduler or GaussianDiffusionScheduler(), **extras)
    pipe.save_pretrained(folder)
    return json.loads((folder / "model_index.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def images(pipe: Any, **arguments: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(batch_size=2, num_inference_steps=5, generator=seeded(), output_type="pt", **arguments).images


def test_a_plain_model_names_only_classes_of_diffusers(tmp_path: Path) -> None:
    index = save(tmp_path)
    assert index == {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "DDPMScheduler"
    assert set(contents(tmp_path)) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        *PORTABLE_FILES,
    }


def test_the_code_in_the_folder_is_the_code_that_wrote_it(tmp_path: Path) -> None:
    save(tmp_path)
    for name in PORTABLE_FILES:
        assert (tmp_path / name).read_bytes() == (CORE / name).read_bytes()


def test_a_loaded_folder_saves_itself_again_byte_for_byte_and_without_its_path(tmp_path: Path) -> None:
    save(
        tmp_path / "first",
        tiny_unet(num_class_embeds=3),
        GaussianDiffusionScheduler.create(beta_schedule="sigmoid", prediction_type="v"),
        class_names={"0": "cat", "1": "dog"},
        has_null_label=True,
    )
    GaussianDiffusionPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert not any(str(tmp_path).encode() in content for content in contents(tmp_path / "second").values())


def test_options_that_stock_lacks_are_saved_only_if_set_and_read_back(tmp_path: Path) -> None:
    names = {"0": "cat", "1": "dog"}
    index = save(tmp_path, tiny_unet(num_class_embeds=3), class_names=names, has_null_label=True)
    assert index["class_names"] == names
    assert index["has_null_label"] is True
    assert "self_conditioned" not in index
    loaded = GaussianDiffusionPipeline.from_pretrained(tmp_path)
    expected = GaussianDiffusionPipeline(
        tiny_unet(num_class_embeds=3), GaussianDiffusionScheduler(), class_names=names, has_null_label=True
    )
    arguments = {"class_labels": ["dog", "cat"], "guidance_scale": 2.0}
    assert torch.equal(images(loaded, **arguments), images(expected, **arguments))


def test_the_value_range_is_read_back_and_ignored_by_stock(tmp_path: Path) -> None:
    assert save(tmp_path, tiny_unet(), value_range=[-1000.5, 400.0])["value_range"] == [-1000.5, 400.0]
    loaded = GaussianDiffusionPipeline.from_pretrained(tmp_path)
    expected = GaussianDiffusionPipeline(tiny_unet(), GaussianDiffusionScheduler(), value_range=[-1000.5, 400])
    assert torch.equal(images(loaded), images(expected))
    by_its_code = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True)
    assert by_its_code.config.value_range == [-1000.5, 400.0]
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is DDPMPipeline


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize(
    ("unet", "scheduler", "extras"),
    [
        ({"in_channels": 6}, ("GaussianDiffusionScheduler", {}), {"self_conditioned": True}),
        ({"out_channels": 6}, ("GaussianDiffusionScheduler", {"variance_type": "learned"}), {}),
        ({"out_channels": 6}, ("DDIMScheduler", {}), {}),
        ({"in_channels": 6, "out_channels": 6}, ("DDIMScheduler", {}), {"self_conditioned": True}),
        ({}, ("EulerDiscreteScheduler", {}), {}),
        ({}, ("UniPCMultistepScheduler", {}), {}),
    ],
)
def test_an_index_asks_for_the_code_where_the_stock_pipeline_would_sample_wrongly(
    tmp_path: Path, unet: dict, scheduler: tuple[str, dict], extras: dict
) -> None:
    """The list form: stock asks for consent, the installed class loads it without."""
    name, config = scheduler
    native = GaussianDiffusionScheduler(**config)
    used = native if name == "GaussianDiffusionScheduler" else getattr(diffusers, name).from_config(native.config)
    index = save(tmp_path, tiny_unet(**unet), used, **extras)
    assert index["_class_name"] == LIST_FORM
    for stock in (DiffusionPipeline, DDPMPipeline):
        with pytest.raises(ValueError, match="Pass `trust_remote_code=True`"):
            stock.from_pretrained(tmp_path)
    loaded = GaussianDiffusionPipeline.from_pretrained(tmp_path)
    expected = GaussianDiffusionPipeline(tiny_unet(**unet), used, **extras)
    assert torch.equal(images(loaded), images(expected))


@pytest.mark.parametrize(
    ("unet", "scheduler"),
    [
        ({"num_class_embeds": 3}, GaussianDiffusionScheduler()),
        ({"out_channels": 6}, GaussianDiffusionScheduler(variance_type="learned_range")),
        ({}, DDIMScheduler()),
    ],
)
def test_an_index_is_stock_where_the_stock_pipeline_samples_correctly_or_asks_for_labels(
    tmp_path: Path, unet: dict, scheduler: Any
) -> None:
    index = save(tmp_path, tiny_unet(**unet), scheduler)
    assert index["_class_name"] == "DDPMPipeline"
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is DDPMPipeline
    if "num_class_embeds" in unet:
        with pytest.raises(ValueError, match="class_labels should be provided"):
            images(stock)
    else:
        assert bool(images(stock).isfinite().all())


def test_another_scheduler_is_saved_as_itself(tmp_path: Path) -> None:
    index = save(tmp_path, scheduler=DDIMScheduler())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert type(GaussianDiffusionPipeline.from_pretrained(tmp_path).scheduler) is DDIMScheduler


class CommunityPipeline(DiffusionPipeline):
    """A pipeline of pipelines, such as those of Kandinsky and Stable Cascade."""

    def __init__(self, unet: UNet2DModel, scheduler: Any, prior: DDPMPipeline) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, prior=prior)


def pipeline_with(scheduler: Any, way: str) -> DiffusionPipeline:
    """A stock or community pipeline that holds a scheduler."""
    if way == "assigned":
        pipe = DDPMPipeline(tiny_unet(), DDIMScheduler())
        pipe.scheduler = scheduler
        return pipe
    if way == "from_pipe":
        return DDPMPipeline.from_pipe(GaussianDiffusionPipeline(tiny_unet(), scheduler))
    pipe = DDPMPipeline(tiny_unet(), scheduler)
    return CommunityPipeline(tiny_unet(), scheduler, pipe) if way == "nested" else pipe


@pytest.mark.parametrize("way", ["passed", "assigned", "from_pipe", "nested"])
def test_pipelines_of_diffusers_save_our_scheduler_as_the_stock_one(tmp_path: Path, way: str) -> None:
    """Byte for byte the folder that the stock scheduler gives; also after a copy and a pickle."""
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "variance_type": "learned_range"}
    pipeline_with(DDPMScheduler(**config), way).save_pretrained(tmp_path / "stock")
    ours = GaussianDiffusionScheduler(**config)
    for i, scheduler in enumerate((ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)))):  # noqa: S301
        pipeline_with(scheduler, way).save_pretrained(tmp_path / str(i))
        assert contents(tmp_path / str(i)) == contents(tmp_path / "stock")
    if way != "nested":
        loaded = GaussianDiffusionPipeline.from_pretrained(tmp_path / "0")
        assert type(loaded.scheduler) is GaussianDiffusionScheduler


def test_a_scheduler_that_stock_cannot_sample_with_is_saved_under_its_own_name(tmp_path: Path) -> None:
    """The stock scheduler takes the log-variance of `learned` for a variance. A subclass may do anything."""

    class Derived(GaussianDiffusionScheduler):
        pass

    for scheduler in (GaussianDiffusionScheduler(variance_type="learned"), Derived()):
        DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["scheduler"] == [type(scheduler).__module__, type(scheduler).__name__]


def test_the_class_that_diffusers_sees_creates_our_scheduler() -> None:
    """Code writes `scheduler.__class__.from_config(scheduler.config)`."""
    scheduler = GaussianDiffusionScheduler()
    again = scheduler.__class__.from_config(scheduler.config, timestep_spacing="trailing")
    assert type(again) is type(scheduler) is GaussianDiffusionScheduler
    assert again.config.timestep_spacing == "trailing"
    assert isinstance(again, scheduler.__class__)


class Adapted(torch.nn.Module):
    """Passes everything on to a network, as a PeftModel does."""

    def __init__(self, network: UNet2DModel) -> None:
        super().__init__()
        self.network = network

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.network, name)


def test_a_network_that_diffusers_leaves_out_of_a_folder_is_not_saved(tmp_path: Path) -> None:
    pipe = GaussianDiffusionPipeline(Adapted(tiny_unet()), GaussianDiffusionScheduler())
    with pytest.raises(ValueError, match=r"unet is a Adapted, which diffusers cannot save; .*merge_and_unload"):
        pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()
    pipe.unet = pipe.unet.network
    pipe.save_pretrained(tmp_path / "pipe")
    assert (tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_half_precision_weights_can_be_saved_beside_the_others(tmp_path: Path) -> None:
    save(tmp_path)
    half = GaussianDiffusionPipeline(tiny_unet().half(), GaussianDiffusionScheduler())
    half.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = GaussianDiffusionPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert loaded.unet.dtype == torch.float16
    assert torch.equal(images(loaded), images(half))


def test_pickled_weights_are_read_only_on_request(tmp_path: Path) -> None:
    GaussianDiffusionPipeline(tiny_unet(), GaussianDiffusionScheduler()).save_pretrained(
        tmp_path, safe_serialization=False
    )
    with pytest.raises(ValueError, match="use_safetensors=False"):
        GaussianDiffusionPipeline.from_pretrained(tmp_path)
    loaded = GaussianDiffusionPipeline.from_pretrained(tmp_path, use_safetensors=False)
    assert torch.equal(images(loaded), images(GaussianDiffusionPipeline(tiny_unet(), GaussianDiffusionScheduler())))


def test_other_load_errors_are_those_of_diffusers(tmp_path: Path) -> None:
    save(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|unable to load") as failure:
        GaussianDiffusionPipeline.from_pretrained(tmp_path)
    assert "use_safetensors" not in str(failure.value)


def test_a_pipeline_can_be_created_from_a_stock_one_and_saved(tmp_path: Path) -> None:
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "stock")
    stock = DDPMPipeline.from_pretrained(tmp_path / "stock")
    pipe = GaussianDiffusionPipeline.from_pipe(stock)
    assert type(pipe.scheduler) is GaussianDiffusionScheduler
    pipe.save_pretrained(tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index == json.loads((tmp_path / "stock" / "model_index.json").read_text())


# The code in the folder


def test_the_saved_files_are_those_of_the_core() -> None:
    assert set(PORTABLE_FILES) == {path.name for path in CORE.glob("*.py")} - {"__init__.py"}


def test_pipeline_names_every_other_file_of_the_core() -> None:
    """From a local folder, diffusers copies only the files that pipeline.py imports from."""
    tree = ast.parse((CORE / "pipeline.py").read_text())
    named = {f"{node.module}.py" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
    assert named == set(PORTABLE_FILES) - {"pipeline.py"}


def test_the_files_import_nothing_of_the_package_and_not_each_other_in_a_circle() -> None:
    """Diffusers finds imports by a regular expression, in docstrings too, and follows circles forever."""
    needs: dict[str, set[str]] = {}
    for name in PORTABLE_FILES:
        text = (CORE / name).read_text()
        modules = set(re.findall(r"^\s*(?:from|import)\s+(\S+)", text, re.MULTILINE))
        assert not any(module.split(".")[0] == "ddpm_hf" for module in modules)
        needs[name] = {f"{module[1:]}.py" for module in modules if re.fullmatch(r"\.\w+", module)}
        needs[name] |= {f"{module}.py" for module in re.findall(r"^from \. import (\w+)", text, re.MULTILINE)}
    while needs:
        leaves = {name for name, others in needs.items() if not others & set(needs)}
        assert leaves, needs
        needs = {name: others for name, others in needs.items() if name not in leaves}


def test_saving_removes_the_code_of_version_0_1_and_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(version_0_1.SAVED, tmp_path / "folder")
    (tmp_path / "folder" / "sampling.py").write_text("print('mine')\n")
    save(tmp_path / "folder")
    assert {path.name for path in (tmp_path / "folder").glob("*.py")} == {*PORTABLE_FILES, "sampling.py"}
