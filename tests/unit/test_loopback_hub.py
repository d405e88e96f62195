"""The loopback Hub answers huggingface_hub as the real one does, where pushes depend on it."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from tests.loopback_hub import LARGE_SIZE, LoopbackHub, files_of, sha256

NAME = "user/model"
CARD = b"---\nlibrary_name: diffusers\n---\n# A model\n"
WEIGHTS = b"\x08\0weights" * 100
FILES = {"README.md": CARD, "unet/model.safetensors": WEIGHTS, "empty.txt": b""}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo(NAME)
    return api


def push(api: HfApi, files: dict[str, bytes] = FILES, deleted: tuple[str, ...] = (), **arguments: object) -> CommitInfo:
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    operations += [CommitOperationDelete(path) for path in deleted]
    return api.create_commit(NAME, operations, commit_message="Push", **arguments)  # type: ignore[arg-type]


def status_of(call: Callable[[], object]) -> int:
    """The status with which the Hub refuses a call."""
    with pytest.raises(HfHubHTTPError) as raised:
        call()
    return raised.value.response.status_code


def committed(hub: LoopbackHub, revision: str = "main") -> dict[str, bytes]:
    """The files of a revision but for that which the Hub makes itself."""
    files = dict(hub.repositories[NAME].files(revision))
    assert files.pop(".gitattributes")
    return files


def test_what_is_pushed_is_what_others_download(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    commit = push(api)
    assert committed(hub) == committed(hub, commit.oid) == FILES
    assert hub.received == [sha256(WEIGHTS)]
    folder = api.snapshot_download(NAME, local_dir=tmp_path / "model", cache_dir=tmp_path / "cache")
    downloaded = {path: content for path, content in files_of(Path(folder)).items() if not path.startswith(".")}
    assert downloaded == FILES


def test_a_second_push_sends_only_what_changed(hub: LoopbackHub, api: HfApi) -> None:
    push(api)
    changed = {path: content for path, content in FILES.items() if path != "empty.txt"} | {"README.md": CARD + b"More."}
    push(api, changed, deleted=("empty.txt",))
    first, second = hub.uploaded
    assert first.files == {path: len(content) for path, content in FILES.items()}
    assert (second.files, second.deleted) == ({"README.md": len(CARD) + 5}, ["empty.txt"])
    assert hub.received == [sha256(WEIGHTS)]
    assert committed(hub) == changed
