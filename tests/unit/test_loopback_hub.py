"""The loopback Hub answers huggingface_hub as the real one does, where pushes depend on it."""

import http.client
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from tests.loopback_hub import LoopbackHub, files_of
from tests.loopback_repository import LARGE_SIZE, sha256

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


def test_a_folder_is_made_the_content_of_a_repository(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    """As `delete_patterns` does it, which lists what there is first; the file that the Hub made stays."""
    push(api)
    (tmp_path / "new.txt").write_bytes(b"new")
    api.upload_folder(repo_id=NAME, folder_path=tmp_path, delete_patterns="*")
    assert committed(hub) == {"new.txt": b"new"}
    assert sorted(hub.uploaded[-1].deleted) == sorted(FILES)


def test_large_files_go_to_the_storage_by_their_size_too(hub: LoopbackHub, api: HfApi) -> None:
    large = bytes(LARGE_SIZE + 1)
    push(api, {"log.txt": large, "note.txt": bytes(10)})
    assert hub.received == [sha256(large)]


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_client_with_xet_pushes_if_it_is_told_that_no_file_is_large(
    hub: LoopbackHub, api: HfApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, create_pr: bool
) -> None:
    """Which is the only way: it never asks for LFS."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    hub.takes_large_files = False
    for path, content in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    commit = api.upload_folder(repo_id=NAME, folder_path=tmp_path, create_pr=create_pr)
    assert committed(hub, "refs/pr/1" if create_pr else "main") == FILES
    assert commit.pr_url == (f"{hub.endpoint}/{NAME}/discussions/1" if create_pr else None)
    assert not hub.received


def test_pull_requests_have_numbers_and_commits_of_their_own(hub: LoopbackHub, api: HfApi) -> None:
    main = push(api).oid
    for number in (1, 2):
        commit = push(api, {"README.md": CARD + b"%d" % number}, create_pr=True)
        assert (commit.pr_num, commit.pr_revision) == (number, f"refs/pr/{number}")
    push(api, {"further.txt": b"further"}, revision="refs/pr/1")
    assert committed(hub) == FILES
    assert committed(hub, "refs/pr/1") == FILES | {"README.md": CARD + b"1", "further.txt": b"further"}
    refs = api.list_repo_refs(NAME, include_pull_requests=True)
    assert [(branch.name, branch.target_commit) for branch in refs.branches] == [("main", main)]
    assert refs.pull_requests is not None
    assert [request.ref for request in refs.pull_requests] == ["refs/pr/1", "refs/pr/2"]
    assert "further.txt" in api.list_repo_files(NAME, revision="refs/pr/1")


def test_a_branch_grows_from_a_commit_and_leaves_main_alone(hub: LoopbackHub, api: HfApi) -> None:
    push(api)
    with pytest.raises(RevisionNotFoundError):
        push(api, revision="runs/first")
    api.create_branch(NAME, branch="runs/first")
    push(api, {"note.txt": b"note"}, revision="runs/first")
    assert committed(hub, "runs/first") == FILES | {"note.txt": b"note"}
    assert committed(hub) == FILES
    assert api.repo_info(NAME, revision="runs/first").sha == hub.uploaded[-1].commit
    assert status_of(lambda: api.create_branch(NAME, branch="runs/first")) == 409
    assert status_of(lambda: api.create_branch(NAME, branch="refs/pr/7")) == 400


def test_repositories_are_made_once_public_or_private(hub: LoopbackHub, api: HfApi) -> None:
    assert status_of(lambda: api.create_repo(NAME)) == 409
    assert api.create_repo("model", exist_ok=True).repo_id == NAME
    assert api.create_repo("org/model", private=True).repo_id == "org/model"
    assert [repository.private for repository in hub.repositories.values()] == [False, True]
    assert api.repo_info("org/model").private
    assert status_of(lambda: api.create_repo("else/model")) == 403
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.endpoint, token=False).repo_info("org/model")


def test_each_token_may_do_its_own_and_no_more(hub: LoopbackHub, api: HfApi) -> None:
    """Clients turn 401 of a repository into "not found"."""
    reader, nobody, stranger = (HfApi(endpoint=hub.endpoint, token=to) for to in (hub.reader_token, False, "hf_wrong"))
    hub.repository("else/model").commit({".gitattributes": b""})
    roles = [who.whoami()["auth"]["accessToken"]["role"] for who in (api, reader)]
    assert (api.whoami()["name"], roles) == ("user", ["write", "read"])
    for who in (api, reader, nobody):
        who.auth_check(NAME)
    api.auth_check(NAME, write=True)
    for call in (lambda: reader.auth_check(NAME, write=True), lambda: push(reader), lambda: reader.create_repo("new")):
        assert status_of(call) == 403
    for call in (
        lambda: stranger.whoami(),
        lambda: stranger.auth_check(NAME),
        lambda: nobody.auth_check(NAME, write=True),
        lambda: push(nobody),
        lambda: nobody.create_repo("new"),
    ):
        assert status_of(call) == 401
    assert status_of(lambda: api.auth_check("else/model", write=True)) == 403
    assert status_of(lambda: api.auth_check("user/missing", write=True)) == 404
    api.create_commit("else/model", [CommitOperationAdd("a", b"a")], commit_message="Offer", create_pr=True)
    assert [upload.revision for upload in hub.uploaded] == ["refs/pr/1"]


def test_a_commit_is_made_whole_or_not_at_all(hub: LoopbackHub, api: HfApi) -> None:
    first = push(api).oid
    second = push(api, {"note.txt": b"note"}, parent_commit=first).oid
    files = committed(hub)
    assert status_of(lambda: push(api, {"late.txt": b"late"}, parent_commit=first)) == 412
    assert status_of(lambda: push(api, {"late.txt": b"late"}, deleted=("missing.txt",))) == 404
    assert committed(hub) == files
    assert hub.repositories[NAME].branches["main"] == second


def test_a_card_whose_head_is_no_yaml_is_refused_before_anything_is_sent(hub: LoopbackHub, api: HfApi) -> None:
    with pytest.raises(ValueError, match="Invalid metadata"):
        push(api, {"README.md": b"---\nlicense: [\n---\n"})
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        push(api, {"README.md": b"# A model\n"})
    assert len(hub.uploaded) == 1


@pytest.mark.parametrize(
    ("pattern", "status", "is_committed"),
    [
        ("commit", 500, False),
        ("commit", 409, False),
        ("preupload", 403, False),
        ("commit", "cut", False),
        ("commit", "lost", True),
    ],
)
def test_a_push_fails_as_the_test_says(
    hub: LoopbackHub, api: HfApi, pattern: str, status: Any, is_committed: bool
) -> None:
    """And the next one does not."""
    hub.fail(pattern, status)
    if isinstance(status, int):
        assert status_of(lambda: push(api)) == status
    else:
        with pytest.raises(Exception, match="disconnected"):
            push(api)
    assert len(hub.uploaded) == is_committed
    push(api)
    assert committed(hub) == FILES


def test_an_upload_that_is_cut_in_the_middle_leaves_nothing_and_is_tried_again(hub: LoopbackHub, api: HfApi) -> None:
    """By huggingface_hub itself, after a second."""
    weights = bytes(range(256)) * 2000
    hub.fail("PUT", "cut", after_bytes=10_000)
    push(api, {"model.safetensors": weights})
    assert [request.split()[0] for request in hub.requests].count("PUT") == 2
    assert hub.received == [sha256(weights)]
    assert weights in hub.seen


def test_the_storage_is_shown_no_token_and_takes_only_what_was_announced(hub: LoopbackHub, api: HfApi) -> None:
    push(api)
    name = sha256(WEIGHTS)
    hub.repositories[NAME].private = True
    storage = http.client.HTTPConnection(hub.stored_at("").removeprefix("http://").rstrip("/"))
    for path, body, headers, status in (
        (name, None, {"Authorization": f"Bearer {hub.token}"}, 400),
        (name, b"other", {}, 400),
        (sha256(b"other"), b"other", {}, 403),
        (name, None, {}, 200),
    ):
        storage.request("PUT" if body else "GET", f"/{path}", body, headers)
        answer = storage.getresponse()
        assert (answer.status, answer.read() == WEIGHTS) == (status, status == 200)
    storage.close()
    assert hub.received == [name]


def test_all_that_is_received_is_remembered_but_for_the_token_in_its_place(hub: LoopbackHub, api: HfApi) -> None:
    """So a token that was put anywhere else is found: in a file, a path or a message."""
    planted = ("in a card", "in weights", "in/path%.txt", "after the sample of a file", "in a message")
    files = {"README.md": CARD + planted[0].encode(), "a.safetensors": planted[1].encode()}
    files[planted[2]] = bytes(1000) + planted[3].encode()
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    api.create_commit(NAME, operations, commit_message=planted[4])
    api.repo_info(NAME)
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(NAME, revision="in a revision")
    for text in (*planted, "in a revision", "user-agent"):
        assert text.encode() in hub.seen.replace(b"User-Agent", b"user-agent")
    assert hub.token.encode() not in hub.seen
