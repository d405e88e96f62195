"""Repositories of a Hub load by their ids in three ways, and afterwards offline from the cache.

1: stock classes, 2: the code of the repository, 3: the installed class. Ways 1 and 2 run in a process that is logged in
and cannot import ddpm_hf, and offline in another one. Way 3 runs in this process, without a login. Both caches are
empty at first.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http
from PIL import Image

from ddpm_hf.hub.push import Target, push
from tests.integration.conftest import logged_in
from tests.load_and_sample import Outcome, Task, carry_out, carry_out_elsewhere, draws_in_float32, sample
from tests.loopback_hub import LoopbackHub, files_of
from tests.saved_folders import CALLS, NOT_FOR_STOCK, SECOND_MOMENTS, make_pipeline, save_early_folder

pytestmark = pytest.mark.timeout(900)

NAMES = ("plain", "guided", *NOT_FOR_STOCK)
BRANCH, TAG = "experiments/first", "v1"
WAYS = pytest.mark.parametrize("way", [1, 2, 3])
NATIVE_WAYS = pytest.mark.parametrize("way", [2, 3])


class Loaded(NamedTuple):
    """Outcomes of loading, by "way name".

    Attributes:
        hub: The Hub.
        folder: Working directory; the caches are in `home 2`, of ways 1 and 2, and `home 3`.
        expected: Images of the pipelines that were saved.
        outcomes: With the Hub.
        offline: Afterwards, without the Hub.
        num_requests_offline: Requests during `offline`.
    """

    hub: LoopbackHub
    folder: Path
    expected: dict[str, torch.Tensor]
    outcomes: dict[str, Outcome]
    offline: dict[str, Outcome]
    num_requests_offline: int


def images_of(outcome: Outcome) -> torch.Tensor:
    assert outcome.images is not None, outcome.refusal
    return outcome.images


def assert_as_saved(outcome: Outcome, expected: torch.Tensor) -> None:
    """Native ways agree exactly; stock differs by its float32 tables, 10 steps of 1e-5 with the network between."""
    is_stock = outcome.pipeline_class.startswith("diffusers.")
    torch.testing.assert_close(images_of(outcome), expected, rtol=0, atol=1e-3 if is_stock else 0)


def fill(hub: LoopbackHub, folder: Path) -> dict[str, torch.Tensor]:
    """Create the repositories and return the images of the pipelines in them."""
    expected = {}
    for name in NAMES:
        pipe = make_pipeline(name)
        pipe.save_pretrained(folder / name)
        expected[name] = sample(pipe, **CALLS.get(name, {}))
        if name != "plain":
            hub.repository(f"user/{name}").commit(files_of(folder / name))
    Image.new("L", (8, 8)).save(folder / "plain" / "samples.png")
    push(folder / "plain", Target(repo_id="pushed"))
    (folder / "plain" / "samples.png").unlink()
    expected["pushed"] = expected["plain"]
    first = make_pipeline("plain", seed=10)
    first.save_pretrained(folder / "first")
    expected["first"] = sample(first)
    plain, card = files_of(folder / "plain"), {"README.md": b"# A model\n"}
    repository = hub.repository("user/plain")
    repository.tags[TAG] = repository.branches[BRANCH] = repository.commit(files_of(folder / "first") | card)
    repository.commit(plain | card)

    make_pipeline("plain").to(torch.float16).save_pretrained(folder / "plain", variant="fp16")
    hub.repository("user/half").commit(files_of(folder / "plain"))
    hub.repository("user/plain-1.5").commit(plain)
    hub.repository("user/private").commit(plain)
    hub.repository("user/private").private = True
    newer = {path: content.replace(b'CORE_VERSION = "', b'CORE_VERSION = "9.') for path, content in plain.items()}
    hub.repository("user/newer").commit(newer)
    for name in ("early", "pickled"):
        save_early_folder(folder / name, pickled=name == "pickled")
        hub.repository(f"user/{name}").commit(files_of(folder / name))
    return expected


def tasks_of(way: int, revisions: dict[str, str]) -> list[Task]:
    """Return the tasks of every way."""
    tasks = [Task(f"{way} {name}", way, f"user/{name}", call=CALLS.get(name, {}) if way > 1 else {}) for name in NAMES]
    for kind, revision in revisions.items():
        load = {"revision": revision} | ({"custom_revision": revision} if way == 2 else {})
        tasks.append(Task(f"{way} plain at {kind}", way, "user/plain", load))
    tasks.append(Task(f"{way} pushed", way, "user/pushed"))
    tasks.append(Task(f"{way} half", way, "user/half", {"variant": "fp16", "dtype": "float16"}))
    return tasks


def tasks_without_ddpm_hf(revisions: dict[str, str]) -> list[Task]:
    """Return the tasks of ways 1 and 2, logged in."""
    return [
        Task("1 private, logged out", 1, "user/private", {"token": False}),
        Task("1 private", 1, "user/private"),
        Task("2 private", 2, "user/private"),
        Task("1 early", 1, "user/early"),
        Task("2 weights at tag", 2, "user/plain", {"revision": TAG}),
        Task("2 file at tag", 2, "user/plain", {"revision": TAG, "custom_pipeline": "pipeline"}),
        Task("2 newer", 2, "user/newer"),
        Task("2 plain-1.5", 2, "user/plain-1.5"),
        Task("2 plain, saved", 2, "user/plain", save="saved by way 2"),
        Task("2 snapshot", 2, "user/pushed", snapshot=True),
        *tasks_of(1, revisions),
        *tasks_of(2, revisions),
    ]


def tasks_with_ddpm_hf(revisions: dict[str, str], token: str) -> list[Task]:
    """Return the tasks of way 3, and of way 2 with a token but without a login."""
    return [
        Task("3 private, logged out", 3, "user/private"),
        Task("3 private", 3, "user/private", {"token": token}),
        Task("2 private, logged out", 2, "user/private", {"token": token}),
        Task("3 early", 3, "user/early"),
        Task("3 pickled", 3, "user/pickled"),
        Task("3 pickled, trusted", 3, "user/pickled", {"use_safetensors": False}),
        Task("3 plain, saved", 3, "user/plain", save="saved by way 3"),
        *tasks_of(3, revisions),
    ]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("folder")
    with logged_in() as hub, pytest.MonkeyPatch.context() as patch:
        expected = fill(hub, folder)
        revisions = {"branch": BRANCH, "tag": TAG, "commit": hub.repository("user/plain").tags[TAG]}
        patch.chdir(folder)
        patch.delenv("HF_TOKEN")
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "home 3" / "hub"))
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token}
        tasks = tasks_without_ddpm_hf(revisions)
        outcomes = carry_out_elsewhere(tasks, folder, folder / "home 2", HF_HUB_OFFLINE="0", **settings)
        outcomes |= carry_out(tasks_with_ddpm_hf(revisions, hub.token))

        num_requests = len(hub.requests)
        tasks = [task for task in tasks if task.name.startswith(("1 plain", "1 pushed", "2 snapshot"))]
        tasks.append(Task("2 plain", 2, "user/plain"))
        offline = carry_out_elsewhere(tasks, folder, folder / "home 2", HF_HUB_OFFLINE="1", **settings)
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        _http.close_session()
        offline |= carry_out(tasks_of(3, revisions))
        return Loaded(hub, folder, expected, outcomes, offline, len(hub.requests) - num_requests)


@WAYS
@pytest.mark.parametrize("name", ["plain", "pushed"])
def test_a_repository_gives_the_same_images_in_all_three_ways(loaded: Loaded, way: int, name: str) -> None:
    """Committed as training saves it, or published by a push."""
    assert_as_saved(loaded.outcomes[f"{way} {name}"], loaded.expected[name])


def test_the_second_moments_of_a_repository_load_where_ddpm_hf_is_installed(loaded: Loaded) -> None:
    """The other ways ignore their file, which they could not if it were a safetensors file."""
    expected = make_pipeline("plain").scheduler.eps_second_moments.tolist()
    for outcomes in (loaded.outcomes, loaded.offline):
        assert outcomes["3 plain"].second_moments == expected
    for way in (1, 2):
        assert loaded.outcomes[f"{way} plain"].second_moments is None


@WAYS
@pytest.mark.parametrize("kind", ["branch", "tag", "commit"])
def test_a_revision_loads_the_weights_of_that_revision(loaded: Loaded, way: int, kind: str) -> None:
    outcome = loaded.outcomes[f"{way} plain at {kind}"]
    assert_as_saved(outcome, loaded.expected["first"])
    assert (loaded.expected["first"] - loaded.expected["plain"]).abs().max() > 0.1


def test_custom_revision_chooses_the_code(loaded: Loaded) -> None:
    """Without it the code of main runs, with the weights of the revision; diffusers names a module after its commit."""
    plain = loaded.hub.repositories["user/plain"]
    for kind in ("branch", "tag", "commit"):
        assert plain.tags[TAG] in loaded.outcomes[f"2 plain at {kind}"].pipeline_class
    assert plain.branches["main"] in loaded.outcomes["2 weights at tag"].pipeline_class
    assert_as_saved(loaded.outcomes["2 weights at tag"], loaded.expected["first"])


def test_a_custom_pipeline_by_its_file_name_follows_the_revision(loaded: Loaded) -> None:
    outcome = loaded.outcomes["2 file at tag"]
    assert outcome.pipeline_class == "diffusers_modules.local.pipeline.GaussianDiffusionPipeline"
    assert_as_saved(outcome, loaded.expected["first"])


@pytest.mark.parametrize("way", [1, 3])
def test_a_cached_repository_loads_without_a_network(loaded: Loaded, way: int) -> None:
    for name in ("plain", "pushed", "guided", *NOT_FOR_STOCK) if way == 3 else ("plain", "pushed"):
        assert_as_saved(loaded.offline[f"{way} {name}"], loaded.expected[name])
    for kind in ("branch", "tag", "commit"):
        assert_as_saved(loaded.offline[f"{way} plain at {kind}"], loaded.expected["first"])
    assert loaded.num_requests_offline == 0


def test_without_a_network_custom_code_needs_a_local_folder(loaded: Loaded) -> None:
    """Diffusers asks the Hub for the commit of the code; a folder of snapshot_download needs no request."""
    assert loaded.offline["2 plain"].refusal.startswith("OfflineModeIsEnabled")
    assert_as_saved(loaded.offline["2 snapshot"], loaded.expected["plain"])


@WAYS
def test_only_the_half_precision_weights_are_downloaded(loaded: Loaded, way: int) -> None:
    """Rounding of weights and activations to 11 bits in each of 10 steps: 5e-4 each, 5e-3 together."""
    images = images_of(loaded.outcomes[f"{way} half"])
    if draws_in_float32(way):
        torch.testing.assert_close(images, loaded.expected["plain"], rtol=0, atol=5e-3)
    assert not torch.equal(images, loaded.expected["plain"])
    cache = loaded.folder / ("home 3" if way == 3 else "home 2") / "hub" / "models--user--half"
    assert [path.name for path in cache.rglob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]


@WAYS
def test_a_private_repository_opens_to_its_token_only(loaded: Loaded, way: int) -> None:
    """In way 2 it must be that of the login: diffusers does not pass its `token` argument on when it downloads code."""
    assert_as_saved(loaded.outcomes[f"{way} private"], loaded.expected["plain"])
    refusal = loaded.outcomes[f"{way} private, logged out"].refusal
    assert ("Repository Not Found" if way == 2 else "Cannot load model user/private") in refusal


def test_class_conditional_repositories_load_in_stock_classes_but_need_labels(loaded: Loaded) -> None:
    assert "class_labels should be provided" in loaded.outcomes["1 guided"].refusal
    for way in (2, 3):
        assert_as_saved(loaded.outcomes[f"{way} guided"], loaded.expected["guided"])


@pytest.mark.parametrize("name", NOT_FOR_STOCK)
def test_a_repository_that_stock_would_sample_wrongly_asks_for_trust_remote_code(loaded: Loaded, name: str) -> None:
    sentence = loaded.outcomes[f"1 {name}"].refusal
    assert sentence.startswith(f"ValueError: The repository for user/{name} contains custom code in pipeline.py")
    for way in (2, 3):
        assert_as_saved(loaded.outcomes[f"{way} {name}"], loaded.expected[name])


@NATIVE_WAYS
def test_a_pipeline_of_the_hub_is_saved_as_it_was_committed(loaded: Loaded, way: int) -> None:
    """All but the card, byte for byte, so it holds no path of the cache. Way 2 does not load second moments."""
    left_out = {"README.md", SECOND_MOMENTS} if way == 2 else {"README.md"}
    repository = loaded.hub.repositories["user/plain"]
    committed = repository.commits[repository.branches["main"]]
    assert files_of(loaded.folder / f"saved by way {way}") == {
        path: content for path, content in committed.items() if path not in left_out
    }


def test_repositories_with_code_of_different_versions_load_side_by_side(loaded: Loaded) -> None:
    """From the Hub every commit has its own module, unlike from local folders."""
    assert_as_saved(loaded.outcomes["2 newer"], loaded.expected["plain"])


def test_the_name_of_a_repository_may_have_a_dot(loaded: Loaded) -> None:
    """Diffusers makes it the name of a package."""
    assert_as_saved(loaded.outcomes["2 plain-1.5"], loaded.expected["plain"])


def test_a_repository_of_early_diffusers_samples_the_same_as_stock(loaded: Loaded) -> None:
    """As google/ddpm-cifar10-32 is. 1e-3: float32 tables of stock."""
    native, stock = (images_of(loaded.outcomes[f"{way} early"]) for way in (3, 1))
    torch.testing.assert_close(native, stock, rtol=0, atol=1e-3)


def test_pickled_weights_are_downloaded_only_if_asked_for(loaded: Loaded) -> None:
    assert "pass use_safetensors=False to read its pickled .bin weights" in loaded.outcomes["3 pickled"].refusal
    trusted, early = (images_of(loaded.outcomes[f"3 {name}"]) for name in ("pickled, trusted", "early"))
    assert torch.equal(trusted, early)
