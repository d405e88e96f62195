"""Saved folders, loaded in three ways without a network.

Ways 1 and 2 run in a process that cannot import ddpm_hf, in another folder and with empty caches. Loading its libraries
takes seconds, so that one process loads everything these ways are about, all of it before the first image; way 3 does
the same in this process. The images of the very pipelines that were saved are what all of them are compared with.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ddpm_hf.diffusion.pipeline import PORTABLE_FILES
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

STOCK, DYNAMIC, INSTALLED = "diffusers", "diffusers_modules.local", "ddpm_hf.diffusion"
NATIVE_WAYS = pytest.mark.parametrize("way", [2, 3])


class Loaded(NamedTuple):
    """The folders, the images of the pipelines that were saved there, and by "way name" what came of loading."""

    folder: Path
    expected: dict[str, torch.Tensor]
    outcomes: dict[str, Outcome]

    def images(self, way: int, name: str) -> torch.Tensor:
        outcome = self.outcomes[f"{way} {name}"]
        assert outcome.images is not None, outcome.refusal
        return outcome.images


def save_folder_of_another_version(plain: Path, folder: Path, with_a_new_name: bool = False) -> None:
    """Changes the version only, or also lets pipeline.py import what its sibling of this version does not have."""
    shutil.copytree(plain, folder)
    for name in PORTABLE_FILES:
        text = (folder / name).read_text().replace('CORE_VERSION = "', 'CORE_VERSION = "9.')
        if with_a_new_name and name == "folder.py":
            text += "\nSINCE_VERSION_9 = True\n"
        if with_a_new_name and name == "pipeline.py":
            text = text.replace("\nfrom .", "\nfrom .folder import SINCE_VERSION_9\nfrom .", 1)
        (folder / name).write_text(text)


def save_folders(folder: Path) -> dict[str, torch.Tensor]:
    """Saves SAVED_FOLDERS, of which it returns the images, and folders that are special."""
    expected = {}
    for name in SAVED_FOLDERS:
        pipe = make_pipeline(name)
        pipe.save_pretrained(folder / name)
        expected[name] = sample(pipe, **CALLS.get(name, {}))
    both = make_pipeline("plain")
    both.save_pretrained(folder / "both")
    both.to(torch.float16).save_pretrained(folder / "both", variant="fp16")
    save_folder_of_another_version(folder / "plain", folder / "newer")
    save_folder_of_another_version(folder / "plain", folder / "much newer", with_a_new_name=True)
    make_pipeline("plain").to(torch.float16).save_pretrained(folder / "half", variant="fp16")
    save_early_folder(folder / "early")
    save_early_folder(folder / "pickled", pickled=True)
    return expected


def tasks_of(way: int) -> list[Task]:
    """What every way is asked to do: load and save again, load what way 2 saved, load either precision."""
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
    of_strangers = [
        *tasks_of(2),
        *tasks_of(1),
        Task("1 early", 1, "early"),
        Task("2 newer", 2, "newer"),
        Task("2 much newer", 2, "much newer"),
        Task("3 without ddpm_hf", 3, "plain"),
    ]
    of_owners = [
        *tasks_of(3),
        Task("3 early", 3, "early"),
        Task("3 newer", 3, "newer"),
        Task("3 much newer", 3, "much newer"),
        Task("3 half", 3, "half"),
        Task("3 pickled", 3, "pickled"),
        Task("3 pickled, trusted", 3, "pickled", {"use_safetensors": False}),
    ]
    outcomes = carry_out_elsewhere(of_strangers, folder, home)
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        outcomes |= carry_out(of_owners)
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
    """They differ in weights, schedule, prediction, variance, labels and their names; all are loaded, then sampled."""
    for name in SAVED_FOLDERS:
        assert torch.equal(loaded.images(way, name), loaded.expected[name]), name
    for name, images in loaded.expected.items():
        others = [other for other in SAVED_FOLDERS if other != name]
        assert all((images - loaded.expected[other]).abs().max() > 0.1 for other in others), name


@NATIVE_WAYS
@pytest.mark.parametrize("name", SAVED_FOLDERS)
def test_a_loaded_folder_saves_itself_again_byte_for_byte(loaded: Loaded, way: int, name: str) -> None:
    """Index, configurations, code and weights; so no path of where it was loaded from is in it.

    Way 2 knows no second moments: diffusers tells the code in a folder nothing of that folder.
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
def test_a_folder_that_stock_would_sample_wrongly_is_refused_without_consent_except_by_the_installed_class(
    loaded: Loaded, name: str
) -> None:
    """The sentence is that of diffusers."""
    sentence = loaded.outcomes[f"1 {name}"].refusal
    assert sentence.startswith("ValueError")
    assert "contains custom code in pipeline.py which must be executed" in sentence
    assert "Pass `trust_remote_code=True`" in sentence
    assert torch.equal(loaded.images(3, name), loaded.expected[name])


@pytest.mark.parametrize("name", ["newer", "much newer"])
def test_a_second_folder_in_one_process_is_refused_if_its_code_is_of_another_version(loaded: Loaded, name: str) -> None:
    """Diffusers executes only the second folder's pipeline.py, beside the first one's files.

    The installed class has its own files, so it loads both.
    """
    sentence = loaded.outcomes[f"2 {name}"].refusal
    assert sentence.startswith("ImportError: pipeline.py has version 9.")
    assert "Restart Python before loading this one, or install ddpm_hf" in sentence
    assert torch.equal(loaded.images(3, name), loaded.expected["plain"])


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
    """As google/ddpm-cifar10-32, which knows fewer options than diffusers today. 1e-3: float32 tables of stock."""
    assert loaded.outcomes["3 early"].scheduler_class.endswith("GaussianDiffusionScheduler")
    torch.testing.assert_close(loaded.images(3, "early"), loaded.images(1, "early"), rtol=0, atol=1e-3)


def test_a_folder_with_half_precision_alone_asks_for_its_variant(loaded: Loaded) -> None:
    assert "variant='fp16'" in loaded.outcomes["3 half"].refusal


def test_pickled_weights_in_the_root_of_a_folder_are_read_only_when_asked_for(loaded: Loaded) -> None:
    assert "pass use_safetensors=False to read its pickled .bin weights" in loaded.outcomes["3 pickled"].refusal
    assert torch.equal(loaded.images(3, "pickled, trusted"), loaded.images(3, "early"))
