"""Saved folders, loaded in three ways without a network.

Ways 1 and 2 run in one process that cannot import ddpm_hf, in another folder and with empty caches; way 3 runs in this
process. Each process loads all folders before it samples from any. The images are compared with those of the pipelines
that were saved.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import DDPMPipeline

from tests import version_0_1
from tests.load_and_sample import Outcome, Task, carry_out, carry_out_elsewhere, draws_in_float32, sample
from tests.loopback_hub import files_of
from tests.saved_folders import (
    CALLS,
    FOR_STOCK,
    NOT_FOR_STOCK,
    SAVED_FOLDERS,
    SECOND_MOMENTS,
    make_pipeline,
    save_early_folder,
)

DYNAMIC, INSTALLED = "diffusers_modules.local", "ddpm_hf.diffusion"
NATIVE_WAYS = pytest.mark.parametrize("way", [2, 3])


class Loaded(NamedTuple):
    """The folders, the images of the saved pipelines by name, and the outcomes by "way name"."""

    folder: Path
    expected: dict[str, torch.Tensor]
    outcomes: dict[str, Outcome]

    def images(self, way: int, name: str) -> torch.Tensor:
        outcome = self.outcomes[f"{way} {name}"]
        assert outcome.images is not None, outcome.refusal
        return outcome.images


def save_folder_of_a_later_version(plain: Path, folder: Path) -> None:
    """Let pipeline.py import a name that its sibling of this version does not have."""
    shutil.copytree(plain, folder)
    name = folder / "saved_folder.py"
    name.write_text(name.read_text() + "\nADDED_LATER = True\n")
    name = folder / "pipeline.py"
    name.write_text(name.read_text().replace("\nfrom .", "\nfrom .saved_folder import ADDED_LATER\nfrom .", 1))


def save_folders(folder: Path) -> dict[str, torch.Tensor]:
    """Save SAVED_FOLDERS and some special folders; return the images of the former."""
    expected = {}
    for name in SAVED_FOLDERS:
        pipe = make_pipeline(name)
        pipe.save_pretrained(folder / name)
        expected[name] = sample(pipe, **CALLS.get(name, {}))
    both = make_pipeline("plain")
    both.save_pretrained(folder / "both")
    both.to(torch.float16).save_pretrained(folder / "both", variant="fp16")
    save_folder_of_a_later_version(folder / "plain", folder / "later")
    shutil.copytree(version_0_1.SAVED, folder / "0.1")
    make_pipeline("plain").to(torch.float16).save_pretrained(folder / "half", variant="fp16")
    plain = make_pipeline("plain")
    DDPMPipeline(plain.unet, plain.scheduler).save_pretrained(folder / "stock")
    save_early_folder(folder / "early")
    save_early_folder(folder / "pickled", pickled=True)
    return expected


def tasks_of(way: int) -> list[Task]:
    """The tasks of every way: load and save again, load what way 2 saved, load either precision."""
    tasks = []
    for name in SAVED_FOLDERS:
        call = CALLS.get(name, {}) if way > 1 else {}
        save = f"saved by way {way}/{name}" if way > 1 else None
        tasks.append(Task(f"{way} {name}", way, name, call=call, save=save))
        if way > 1 or name == "plain":
            tasks.append(Task(f"{way} {name} saved again", way, f"saved by way 2/{name}", call=call))
    tasks.append(Task(f"{way} both", way, "both"))
    tasks.append(Task(f"{way} both as fp16", way, "both", {"variant": "fp16", "dtype": "float16"}))
    return tasks


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder, home = tmp_path_factory.mktemp("folders"), tmp_path_factory.mktemp("home")
    expected = save_folders(folder)
    labels = {"class_labels": [3, 8]}
    without_ddpm_hf = [
        Task("2 0.1 first", 2, "0.1", call=labels, save="saved by way 2/0.1"),
        *tasks_of(2),
        Task("2 0.1", 2, "0.1", call=labels),
        Task("2 later", 2, "later"),
        *tasks_of(1),
        Task("1 early", 1, "early"),
        Task("1 0.1", 1, "0.1"),
        Task("1 stock", 1, "stock"),
        Task("3 without ddpm_hf", 3, "plain"),
    ]
    with_ddpm_hf = [
        *tasks_of(3),
        Task("3 0.1", 3, "0.1", call=labels, save="saved by way 3/0.1"),
        Task("2 0.1 beside ddpm_hf", 2, "0.1", call=labels),
        Task("2 plain beside ddpm_hf", 2, "plain"),
        Task("3 early", 3, "early"),
        Task("3 stock", 3, "stock"),
        Task("3 later", 3, "later"),
        Task("3 half", 3, "half"),
        Task("3 pickled", 3, "pickled"),
        Task("3 pickled, trusted", 3, "pickled", {"use_safetensors": False}),
    ]
    outcomes = carry_out_elsewhere(without_ddpm_hf, folder, home)
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        outcomes |= carry_out(with_ddpm_hf)
    return Loaded(folder, expected, outcomes)


@pytest.mark.parametrize(
    ("way", "pipeline_class", "scheduler_class"),
    [
        (
            1,
            "diffusers.pipelines.ddpm.pipeline_ddpm.DDPMPipeline",
            "diffusers.schedulers.scheduling_ddpm.DDPMScheduler",
        ),
        (2, f"{DYNAMIC}.pipeline.GaussianDiffusionPipeline", f"{DYNAMIC}.scheduler.GaussianDiffusionScheduler"),
        (3, f"{INSTALLED}.pipeline.GaussianDiffusionPipeline", f"{INSTALLED}.scheduler.GaussianDiffusionScheduler"),
    ],
)
def test_each_way_loads_its_own_classes(loaded: Loaded, way: int, pipeline_class: str, scheduler_class: str) -> None:
    outcome = loaded.outcomes[f"{way} plain"]
    assert (outcome.pipeline_class, outcome.scheduler_class) == (pipeline_class, scheduler_class)


def test_ways_1_and_2_run_where_ddpm_hf_cannot_be_imported(loaded: Loaded) -> None:
    assert loaded.outcomes["3 without ddpm_hf"].refusal.startswith("ModuleNotFoundError")


@pytest.mark.parametrize("name", FOR_STOCK)
def test_one_folder_gives_the_same_images_in_all_three_ways(loaded: Loaded, name: str) -> None:
    """Native ways agree exactly; stock differs by its float32 tables, 10 steps of 1e-5 with the network between."""
    expected = loaded.expected[name]
    assert torch.equal(loaded.images(2, name), expected)
    assert torch.equal(loaded.images(3, name), expected)
    torch.testing.assert_close(loaded.images(1, name), expected, rtol=0, atol=1e-3)
    assert (expected[0] - expected[1]).abs().max().item() > 0.1


@NATIVE_WAYS
def test_folders_loaded_in_one_process_do_not_disturb_each_other(loaded: Loaded, way: int) -> None:
    """They differ in weights, schedule, prediction, variance, labels and class names."""
    for name in SAVED_FOLDERS:
        assert torch.equal(loaded.images(way, name), loaded.expected[name]), name
    for name, images in loaded.expected.items():
        others = [other for other in SAVED_FOLDERS if other != name]
        assert all((images - loaded.expected[other]).abs().max() > 0.1 for other in others), name


@NATIVE_WAYS
@pytest.mark.parametrize("name", SAVED_FOLDERS)
def test_a_loaded_folder_saves_itself_again_byte_for_byte(loaded: Loaded, way: int, name: str) -> None:
    """Index, configurations, code and weights, without the path that it was loaded from.

    Way 2 loses the second moments: diffusers does not pass the folder to the code in it.
    """
    saved_again = files_of(loaded.folder / f"saved by way {way}" / name)
    assert {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json"} < set(saved_again)
    left_out = {SECOND_MOMENTS} if way == 2 else set()
    assert saved_again == {
        path: content for path, content in files_of(loaded.folder / name).items() if path not in left_out
    }


def test_a_folder_saved_without_ddpm_hf_loads_in_all_three_ways(loaded: Loaded) -> None:
    """The tolerance of stock is that of its float32 tables, as above."""
    for name in SAVED_FOLDERS:
        for way in (2, 3):
            assert torch.equal(loaded.images(way, f"{name} saved again"), loaded.expected[name]), (way, name)
    torch.testing.assert_close(loaded.images(1, "plain saved again"), loaded.expected["plain"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", CALLS)
def test_a_class_conditional_folder_loads_as_stock_whose_network_asks_for_labels(loaded: Loaded, name: str) -> None:
    outcome = loaded.outcomes[f"1 {name}"]
    assert outcome.pipeline_class.endswith("DDPMPipeline")
    assert "class_labels should be provided" in outcome.refusal


@pytest.mark.parametrize("name", NOT_FOR_STOCK)
def test_a_folder_that_stock_would_sample_wrongly_needs_consent_except_with_the_installed_class(
    loaded: Loaded, name: str
) -> None:
    """The sentence is that of diffusers."""
    sentence = loaded.outcomes[f"1 {name}"].refusal
    assert sentence.startswith("ValueError")
    assert "contains custom code in pipeline.py which must be executed" in sentence
    assert "Pass `trust_remote_code=True`" in sentence
    assert torch.equal(loaded.images(3, name), loaded.expected[name])


def test_a_folder_of_version_0_1_loads_in_all_three_ways_in_any_order(loaded: Loaded) -> None:
    """With its own code before and after folders of this version, with the installed class, and as stock."""
    expected = loaded.images(3, "0.1")
    for name in ("0.1 first", "0.1", "0.1 beside ddpm_hf"):
        assert torch.equal(loaded.images(2, name), expected), name
    assert loaded.outcomes["2 0.1"].scheduler_class.startswith(DYNAMIC)
    assert loaded.outcomes["3 0.1"].scheduler_class.startswith(INSTALLED)
    assert loaded.outcomes["1 0.1"].pipeline_class.endswith("DDPMPipeline")
    assert "class_labels should be provided" in loaded.outcomes["1 0.1"].refusal


def test_a_folder_of_version_0_1_is_saved_again_with_the_code_that_loaded_it(loaded: Loaded) -> None:
    before, plain = files_of(loaded.folder / "0.1"), files_of(loaded.folder / "plain")
    for way, code in ((2, before), (3, plain)):
        saved = files_of(loaded.folder / f"saved by way {way}" / "0.1")
        assert {name: content for name, content in saved.items() if name.endswith(".py")} == {
            name: content for name, content in code.items() if name.endswith(".py")
        }
        for name in ("unet/config.json", "scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors"):
            assert saved[name] == before[name]


def test_each_folder_uses_its_own_code(loaded: Loaded) -> None:
    """Also after folders of other versions, whose files lack a name that it imports; and beside the installed class."""
    for way, name in ((2, "later"), (3, "later"), (2, "plain beside ddpm_hf")):
        assert torch.equal(loaded.images(way, name), loaded.expected["plain"]), (way, name)


@pytest.mark.parametrize("way", [1, 2, 3])
def test_one_folder_holds_both_precisions(loaded: Loaded, way: int) -> None:
    """Rounding of weights and activations to 11 bits in each of 10 steps: 5e-4 each, 5e-3 together, never nothing."""
    assert len(list((loaded.folder / "both" / "unet").glob("*.safetensors"))) == 2
    full, half = loaded.images(way, "both"), loaded.images(way, "both as fp16")
    torch.testing.assert_close(full, loaded.expected["plain"], rtol=0, atol=1e-3)
    if draws_in_float32(way):
        torch.testing.assert_close(half, full, rtol=0, atol=5e-3)
    assert not torch.equal(half, full)


def test_a_folder_of_the_stock_pipeline_samples_the_same_as_stock(loaded: Loaded) -> None:
    """Like google/ddpm-cifar10-32, with fewer options than diffusers has today. 1e-3: float32 tables of stock."""
    assert loaded.outcomes["3 early"].scheduler_class.endswith("GaussianDiffusionScheduler")
    torch.testing.assert_close(loaded.images(3, "early"), loaded.images(1, "early"), rtol=0, atol=1e-3)


def test_a_folder_that_the_stock_pipeline_saved_with_our_scheduler_needs_no_ddpm_hf(loaded: Loaded) -> None:
    """As train_unconditional.py saves it. The second moments are there for ddpm_hf. 1e-3: float32 tables of stock."""
    assert loaded.outcomes["1 stock"].scheduler_class.startswith("diffusers.")
    torch.testing.assert_close(loaded.images(1, "stock"), loaded.expected["plain"], rtol=0, atol=1e-3)
    assert torch.equal(loaded.images(3, "stock"), loaded.expected["plain"])
    assert loaded.outcomes["3 stock"].second_moments == loaded.outcomes["3 plain"].second_moments is not None


def test_a_folder_with_half_precision_only_asks_for_its_variant(loaded: Loaded) -> None:
    assert "variant='fp16'" in loaded.outcomes["3 half"].refusal


def test_pickled_weights_at_the_top_of_a_folder_are_read_only_on_request(loaded: Loaded) -> None:
    assert "pass use_safetensors=False to read its pickled .bin weights" in loaded.outcomes["3 pickled"].refusal
    assert torch.equal(loaded.images(3, "pickled, trusted"), loaded.images(3, "early"))
