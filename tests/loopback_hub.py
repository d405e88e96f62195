"""A Hugging Face Hub on the loopback device, kept in memory: the part that clients read models from and push them to.

    with LoopbackHub() as hub:
        commit = hub.repository("user/model").commit(files_of(folder))

A client finds it through `HF_ENDPOINT=hub.endpoint` in the environment that it starts with, and logs in with
`HF_TOKEN=hub.token`. As on the real Hub, small files are served in place and large ones by a redirect to another
origin, where they are also uploaded to; that origin must never be shown the token. A further route is one more method
of LoopbackHub and one more row in ROUTES.

There is no Xet storage. A client that has hf_xet and was not told HF_HUB_DISABLE_XET=1 asks nobody whether to use it
for large files, only which files are large: with `hub.takes_large_files = False` it is told that none is.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

import yaml

from tests.loopback_server import Refusal, Request, Response, Wire, as_file, as_json, serve

LARGE_FILES = (".safetensors", ".bin", ".png", ".gif", ".npz", ".pt")
LARGE_SIZE = 10 * 2**20
USER, ORGANIZATION = "user", "org"
REPOSITORY = r"(?P<repository>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"


def files_of(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file of a folder by its path, written with slashes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sha256(content: bytes) -> str:
    """The name of a large file in the storage."""
    return hashlib.sha256(content).hexdigest()


def git_blob_id(content: bytes) -> str:
    """The name that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def is_large(path: str, size: int) -> bool:
    """Whether a file belongs into the storage."""
    return path.endswith(LARGE_FILES) or size > LARGE_SIZE


@dataclass
class Repository:
    """The commits of a model, {commit id: {path: content}}, and the names that point to them.

    A pull request is a branch too, "refs/pr/N"; its title is pull_requests[N - 1].
    """

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: list[str] = field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Makes these files the whole content of a branch and returns the id of the commit, 40 digits as in git."""
        tree = [f"{git_blob_id(content)} {path}" for path, content in sorted(files.items())]
        parent = self.branches.get(branch, "")
        commit = hashlib.sha1("\n".join([parent, *tree]).encode(), usedforsecurity=False).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    def open_pull_request(self, title: str, commit: str) -> str:
        """Returns the name of its branch, which begins at a commit."""
        self.pull_requests.append(title)
        branch = f"refs/pr/{len(self.pull_requests)}"
        self.branches[branch] = commit
        return branch

    def find(self, revision: str) -> str | None:
        """Returns the commit that a branch, a tag or a commit id means."""
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        return commit if commit in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Returns the files of a branch, a tag or a commit."""
        return self.commits[self.branches.get(revision) or self.tags.get(revision) or revision]


@dataclass(frozen=True)
class Upload:
    """What a client committed.

    Attributes:
        repository: "user/name".
        revision: The branch, or refs/pr/N.
        commit: Its id.
        message: Its first line.
        files: The sizes of the files that the commit names, by path; a file that did not change is not among them.
        deleted: The paths that it removes.
    """

    repository: str
    revision: str
    commit: str
    message: str
    files: dict[str, int]
    deleted: list[str]


class LoopbackHub:
    """The Hub and the storage of its large files, each on a port of its own while the context lasts.

    Attributes:
        endpoint: The address for HF_ENDPOINT.
        token: That of `user`, who may write to the repositories of user and of org.
        reader_token: The same user's, but for reading only.
        repositories: By "user/name".
        takes_large_files: Whether large files go to the storage; otherwise they come in the commit like others.
        stored: The large files that the storage serves, by their sha256.
        received: The sha256 of each large file that was uploaded to the storage, in the order of arrival.
        uploaded: What was committed by clients.
    """

    def __init__(self) -> None:
        self.token, self.reader_token = "hf_loopback", "hf_loopback_reader"  # they open nothing but this object
        self.repositories: dict[str, Repository] = {}
        self.takes_large_files = True
        self.stored: dict[str, bytes] = {}
        self.received: list[str] = []
        self.uploaded: list[Upload] = []
        self._wire = Wire()
        self._announced: set[str] = set()
        self._lock = threading.RLock()
        self._hub, self._storage = serve(self.answer, self._wire), serve(self.answer_of_storage, self._wire)
        self.endpoint, self._storage_endpoint = (
            f"http://127.0.0.1:{server.server_port}" for server in (self._hub, self._storage)
        )

    def __enter__(self) -> "LoopbackHub":
        for server in (self._hub, self._storage):
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self._hub, self._storage):
            server.shutdown()
            server.server_close()

    @property
    def requests(self) -> list[str]:
        """What was asked so far of the Hub and of the storage, as "METHOD path"."""
        return self._wire.requests

    @property
    def seen(self) -> bytes:
        """Every byte received but the Authorization headers, also unquoted and decoded; no secret may be in it."""
        return b"\n".join(self._wire.heard)

    def fail(
        self, pattern: str, status: int | Literal["cut", "lost"] = 500, times: int = 1, after_bytes: int | None = None
    ) -> None:
        """Makes the next requests fail that a pattern is found in, as tests.loopback_server.Wire.fail says."""
        self._wire.fail(pattern, status, times, after_bytes)

    def repository(self, name: str) -> Repository:
        """Returns the repository of this name, a new one if there is none."""
        return self.repositories.setdefault(name, Repository())

    def answer(self, request: Request) -> Response:
        """Takes the route of a request."""
        for methods, pattern, route in ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found and request.method in methods:
                names = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
                with self._lock:
                    return route(self, request, **names)
        raise Refusal(404, "EntryNotFound", f"This Hub has no route for {request.method} {request.path}.")

    def answer_of_storage(self, request: Request) -> Response:
        """Serves and takes large files by their sha256; as signed addresses, these need no token, and take none."""
        if "Authorization" in request.headers:
            raise Refusal(400, "InvalidRequest", "The token was shown to the storage.")
        name = request.path.removeprefix("/")
        with self._lock:
            if request.method != "PUT":
                if name not in self.stored:
                    raise Refusal(404, "EntryNotFound", "The storage has no such file.")
                return as_file(request, self.stored[name], {})
            if name not in self._announced:
                raise Refusal(403, "", "Nobody asked the Hub for this address.")
            if name != sha256(request.body):
                raise Refusal(400, "", "The file is not the one that was announced.")
            self.stored[name] = request.body
            self.received.append(name)
        return Response(200)

    # ---------------------------------------------------------------------------------------------------- reading

    def info(self, request: Request, repository: str, revision: str = "main") -> Response:
        """The commit of a revision and its files."""
        found, commit = self._open(request, repository, revision)
        siblings = [{"rfilename": path} for path in sorted(found.commits[commit])]
        return as_json({"id": repository, "sha": commit, "private": found.private, "tags": [], "siblings": siblings})

    def tree(self, request: Request, repository: str, revision: str) -> Response:
        """Every file of a revision with its size and hashes, whether asked to recurse or not; no folders."""
        found, commit = self._open(request, repository, revision)
        entries = []
        for path, content in sorted(found.commits[commit].items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_blob_id(content)}
            if is_large(path, len(content)):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return as_json(entries, {"X-Repo-Commit": commit})

    def resolve(self, request: Request, repository: str, revision: str, path: str) -> Response:
        """A file of a revision: in place, or where it is stored."""
        found, commit = self._open(request, repository, revision)
        headers = {"X-Repo-Commit": commit}
        content = found.commits[commit].get(path)
        if content is None:
            raise Refusal(404, "EntryNotFound", f"{repository} has no file {path}.", headers)
        if not is_large(path, len(content)):
            return as_file(request, content, headers | {"ETag": f'"{git_blob_id(content)}"'})
        name = sha256(content)
        self.stored[name] = content
        headers |= {"Location": f"{self._storage_endpoint}/{name}", "ETag": f'"{git_blob_id(content)}"'}
        return Response(302, b"", headers | {"X-Linked-ETag": f'"{name}"', "X-Linked-Size": str(len(content))})

    def refs(self, request: Request, repository: str) -> Response:
        """The branches, tags and, asked for, pull requests."""
        found = self._find(request, repository)
        branches, pull_requests = [], []
        for name, commit in found.branches.items():
            if name.startswith("refs/pr/"):
                pull_requests.append({"name": name.removeprefix("refs/"), "ref": name, "targetCommit": commit})
            else:
                branches.append({"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit})
        tags = [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": to} for name, to in found.tags.items()]
        answer = {"branches": branches, "tags": tags, "converts": []}
        return as_json(answer | ({"pullRequests": pull_requests} if "include_prs" in request.query else {}))

    def who_am_i(self, request: Request) -> Response:
        """Whose token it is and what it is good for."""
        role = self._role(request)
        if role is None:
            raise Refusal(401, "", "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": role}}
        organizations = [{"type": "org", "name": ORGANIZATION}]
        return as_json({"type": "user", "name": USER, "fullname": USER, "orgs": organizations, "auth": token})

    def auth_check(self, request: Request, repository: str, right: str = "read") -> Response:
        """Nothing, unless it may not be done."""
        if right == "write":
            self._open_for_writing(request, repository)
        self._find(request, repository)
        return as_json({})

    # ---------------------------------------------------------------------------------------------------- writing

    def create(self, request: Request) -> Response:
        """Makes a repository, with the first commit that the Hub makes itself."""
        asked = json.loads(request.body)
        owner = asked.get("organization") or USER
        name = f"{owner}/{asked['name']}"
        role = self._role(request)
        if role is None:
            raise Refusal(401, "", "Invalid username or password.")
        if asked.get("type", "model") != "model":
            raise Refusal(400, "", f"This Hub has models only, no {asked['type']}.")
        if role != "write" or owner not in (USER, ORGANIZATION):
            message = f'You don\'t have the rights to create a model under the namespace "{owner}"'
            raise Refusal(403, "", message)
        answer = {"url": f"{self.endpoint}/{name}", "name": name, "id": name}
        if name in self.repositories:
            return as_json(answer | {"error": "You already created this model repo"}, status=409)
        repository = self.repository(name)
        repository.private = asked.get("visibility") == "private"
        repository.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return as_json(answer)

    def create_branch(self, request: Request, repository: str, revision: str) -> Response:
        """Gives a commit, main's by default, a further name."""
        found = self._open_for_writing(request, repository)
        if revision.startswith("refs/"):
            raise Refusal(400, "", f"Invalid reference name: {revision}")
        if revision in found.branches:
            raise Refusal(409, "", f"Reference already exists: {revision}")
        start = json.loads(request.body or b"{}").get("startingPoint", "main")
        found.branches[revision] = self._commit_of(found, start)
        return as_json({})

    def validate_yaml(self, request: Request) -> Response:
        """Whether the head of a model card is YAML with settings in it; the Hub itself knows more about them."""
        self._role(request)
        head = re.match(r"---\r?\n(.*?)^---\s*$", json.loads(request.body)["content"], re.DOTALL | re.MULTILINE)
        if head is None:
            return as_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            problem = "" if isinstance(yaml.safe_load(head[1]), dict) else "the metadata are no mapping"
        except yaml.YAMLError as error:
            problem = str(error)
        errors = [{"message": problem}] if problem else []
        return as_json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def preupload(self, request: Request, repository: str, revision: str) -> Response:
        """Which files go to the storage, and which name each has there or in git already."""
        found = self._open_for_writing(request, repository, may_be_foreign="create_pr" in request.query)
        present = found.commits[self._commit_of(found, revision)]
        answer = []
        for file in json.loads(request.body)["files"]:
            self._wire.heard.append(base64.b64decode(file["sample"]))
            path, large = file["path"], self.takes_large_files and is_large(file["path"], file["size"])
            name = (sha256 if large else git_blob_id)(present[path]) if path in present else None
            mode = "lfs" if large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": name})
        return as_json({"files": answer})

    def announce(self, request: Request, repository: str) -> Response:
        """Where to upload those large files that are not in the storage yet."""
        asked = json.loads(request.body)
        # A client names no revision if it is going to make a pull request.
        found = self._open_for_writing(request, repository, may_be_foreign="ref" not in asked)
        for files in found.commits.values():
            self.stored |= {sha256(content): content for path, content in files.items() if is_large(path, len(content))}
        objects = []
        for entry in asked["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.stored:
                self._announced.add(entry["oid"])
                upload = {"href": f"{self._storage_endpoint}/{entry['oid']}"}
                verify = {"href": f"{self.endpoint}/{repository}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return as_json({"transfer": "basic", "objects": objects})

    def verify(self, request: Request, repository: str) -> Response:
        """Whether an upload has arrived."""
        self._open_for_writing(request, repository, may_be_foreign=True)
        entry = json.loads(request.body)
        if len(self.stored.get(entry["oid"], b"")) != entry["size"]:
            raise Refusal(404, "", "The storage has no such file of this size.")
        return as_json({})

    def commit(self, request: Request, repository: str, revision: str) -> Response:
        """Changes a branch, or makes a pull request with the changes: all of them, or none if one cannot be made."""
        as_pull_request = "create_pr" in request.query
        found = self._open_for_writing(request, repository, may_be_foreign=as_pull_request)
        parent = found.branches.get(revision)
        if parent is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        if header["value"].get("parentCommit", parent) != parent:
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        files, sizes, deleted = dict(found.commits[parent]), {}, []
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            path = value["path"]
            if kind in ("file", "lfsFile"):
                files[path] = self._content(kind, value)
                sizes[path] = len(files[path])
                continue
            gone = [name for name in files if name == path or (kind == "deletedFolder" and name.startswith(path))]
            if not gone:
                raise Refusal(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
            deleted += gone
            files = {name: content for name, content in files.items() if name not in gone}
        message = header["value"]["summary"]
        if as_pull_request:
            revision = found.open_pull_request(message, parent)
        commit = found.commit(files, revision)
        self.uploaded.append(Upload(repository, revision, commit, message, sizes, deleted))
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.endpoint}/{repository}/commit/{commit}"}
        if as_pull_request:
            answer["pullRequestUrl"] = f"{self.endpoint}/{repository}/discussions/{len(found.pull_requests)}"
        return as_json(answer)

    def open_pull_request(self, request: Request, repository: str) -> Response:
        """An empty one, which a client with hf_xet makes before it commits to its branch."""
        found = self._open_for_writing(request, repository, may_be_foreign=True)
        found.open_pull_request(json.loads(request.body)["title"], found.branches["main"])
        return as_json({"num": len(found.pull_requests)})

    def pull_request(self, request: Request, repository: str, number: str) -> Response:
        """What a pull request is called and where it goes to."""
        found = self._find(request, repository)
        if not 0 < int(number) <= len(found.pull_requests):
            raise Refusal(404, "EntryNotFound", f"{repository} has no pull request {number}.")
        return as_json(
            {
                "num": int(number),
                "title": found.pull_requests[int(number) - 1],
                "isPullRequest": True,
                "status": "draft",
                "author": {"name": USER},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "repo": {"name": repository, "type": "model"},
                "changes": {"base": "main"},
                "filesWithConflicts": [],
                "events": [],
            }
        )

    # ----------------------------------------------------------------------------------------------------- rights

    def _role(self, request: Request) -> Literal["read", "write"] | None:
        """What the token of a request is good for, or None if it shows none."""
        authorization = request.headers.get("Authorization")
        if authorization is None:
            return None
        if authorization == f"Bearer {self.token}":
            return "write"
        if authorization == f"Bearer {self.reader_token}":
            return "read"
        raise Refusal(401, "", "Invalid credentials in Authorization header")

    def _find(self, request: Request, name: str) -> Repository:
        """Returns a repository that the request may read."""
        role, repository = self._role(request), self.repositories.get(name)
        may_see_private = role is not None and name.startswith((f"{USER}/", f"{ORGANIZATION}/"))
        if repository is None or (repository.private and not may_see_private):
            # Without a token the answer does not say whether there is such a repository.
            raise Refusal(401 if role is None else 404, "RepoNotFound", "Repository not found")
        return repository

    def _open(self, request: Request, name: str, revision: str) -> tuple[Repository, str]:
        """Returns a repository that the request may read, and the commit that it means."""
        repository = self._find(request, name)
        return repository, self._commit_of(repository, revision)

    def _open_for_writing(self, request: Request, name: str, *, may_be_foreign: bool = False) -> Repository:
        """Returns a repository that the request may write to, or at least make pull requests to."""
        role = self._role(request)
        if role is None:
            raise Refusal(401, "", "Invalid username or password.")
        repository = self._find(request, name)
        is_own = name.startswith((f"{USER}/", f"{ORGANIZATION}/"))
        if role != "write" or not (is_own or may_be_foreign):
            raise Refusal(403, "", "You have read access but not the required permissions for this operation")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.find(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _content(self, kind: str, value: Mapping[str, str]) -> bytes:
        """Returns what a commit puts into a file."""
        if kind == "file":
            content = base64.b64decode(value["content"])
            self._wire.heard.append(content)
            return content
        if value["oid"] not in self.stored:
            raise Refusal(400, "", f"{value['path']} was not uploaded to the storage.")
        return self.stored[value["oid"]]


ROUTES: tuple[tuple[tuple[str, ...], str, Callable[..., Response]], ...] = (
    (("GET",), rf"/api/models/{REPOSITORY}", LoopbackHub.info),
    (("GET",), rf"/api/models/{REPOSITORY}/revision/{REVISION}", LoopbackHub.info),
    (("GET",), rf"/api/models/{REPOSITORY}/tree/{REVISION}", LoopbackHub.tree),
    (("GET", "HEAD"), rf"/{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)", LoopbackHub.resolve),
    (("GET",), rf"/api/models/{REPOSITORY}/refs", LoopbackHub.refs),
    (("GET",), r"/api/whoami-v2", LoopbackHub.who_am_i),
    (("GET",), rf"/api/models/{REPOSITORY}/auth-check(?:/(?P<right>write))?", LoopbackHub.auth_check),
    (("POST",), r"/api/repos/create", LoopbackHub.create),
    (("POST",), rf"/api/models/{REPOSITORY}/branch/{REVISION}", LoopbackHub.create_branch),
    (("POST",), r"/api/validate-yaml", LoopbackHub.validate_yaml),
    (("POST",), rf"/api/models/{REPOSITORY}/preupload/{REVISION}", LoopbackHub.preupload),
    (("POST",), rf"/{REPOSITORY}\.git/info/lfs/objects/batch", LoopbackHub.announce),
    (("POST",), rf"/{REPOSITORY}\.git/info/lfs/objects/verify", LoopbackHub.verify),
    (("POST",), rf"/api/models/{REPOSITORY}/commit/{REVISION}", LoopbackHub.commit),
    (("POST",), rf"/api/models/{REPOSITORY}/discussions", LoopbackHub.open_pull_request),
    (("GET",), rf"/api/models/{REPOSITORY}/discussions/(?P<number>\d+)", LoopbackHub.pull_request),
)
