"""A Hugging Face Hub in memory, on the loopback interface, for tests that push models and load them.

    with LoopbackHub() as hub:
        hub.repository("user/model").commit(files_of(folder))

Clients find it by HF_ENDPOINT=hub.endpoint, HF_TOKEN=hub.token and HF_HUB_DISABLE_XET=1. Large files are uploaded to
/storage, which refuses requests with a token.
"""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from typing_extensions import Self

USER, ORGANIZATION, READ_ONLY_ORGANIZATION = "user", "org", "readers"
LARGE_FILES = (".safetensors", ".bin", ".png", ".gif", ".npz", ".pt")


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of a folder by its path, written with slashes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass
class Repository:
    """A model: its commits, {id: {path: content}}, and the names that refer to them. Pull request N is refs/pr/N."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Make these files the whole content of a branch and return the id of the commit, 40 digits as in git."""
        tree = [self.branches.get(branch, ""), *(f"{git_id(files[path])} {path}" for path in sorted(files))]
        commit = hashlib.sha1("\n".join(tree).encode(), usedforsecurity=False).hexdigest()
        self.commits[commit], self.branches[branch] = dict(files), commit
        return commit

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a branch, a tag or a commit."""
        return self.commits[self.branches.get(revision) or self.tags.get(revision) or revision]


@dataclass
class Fault:
    pattern: str
    status: int | str
    times: int


class Upload(NamedTuple):
    """A commit of a client: its message and the files that it names."""

    message: str
    files: set[str]


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes


class Response(NamedTuple):
    status: int = 200
    content: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})


class Refused(Exception):
    """An error status; clients choose their exception by the code."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message} | headers
        self.response = Response(status, json.dumps({"error": message}).encode(), headers)


def as_json(value: Any, status: int = 200) -> Response:
    return Response(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


class LoopbackHub:
    """A Hub that is served within its context.

    Attributes:
        endpoint: Value for HF_ENDPOINT.
        token: Token of `user` with write access to user/* and org/*.
        reader_token: Token of `user` with read access.
        fine_grained: Permissions of `token` if it is a fine-grained token.
        repositories: By "user/name".
        requests: "METHOD path" of all requests.
        uploaded: Commits of clients.
    """

    def __init__(self) -> None:
        self.token, self.reader_token = "hf_loopback", "hf_loopback_reader"
        self.fine_grained: list[str] | None = None
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.uploaded: list[Upload] = []
        self._stored: dict[str, bytes] = {}
        self._received: list[bytes] = []
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._server = serve(self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def seen(self) -> bytes:
        """Every byte received except Authorization headers, also unquoted and decoded."""
        return b"\n".join(self._received)

    def fail(self, pattern: str, status: int | Literal["cut", "lost"] = 500, times: int = 1) -> None:
        """Make the next requests fail whose "METHOD path" contains a regular expression.

        Args:
            pattern: The expression.
            status: Status of the answer; "cut" closes the connection within the request, "lost" after carrying it out.
            times: How many requests fail; clients retry some.
        """
        self._faults.append(Fault(pattern, status, times))

    def end_failures(self) -> None:
        """Undo `fail`."""
        self._faults.clear()

    def repository(self, name: str) -> Repository:
        """Return a repository, which is created if it does not exist."""
        return self.repositories.setdefault(name, Repository())

    # Requests

    def record(self, method: str, path: str, headers: Mapping[str, str]) -> int | str | None:
        """Record a request and return how it fails, or None."""
        asked = f"{method} {urlsplit(path).path}"
        shown = [f"{name}: {value}" for name, value in headers.items() if name.lower() != "authorization"]
        with self._lock:
            self.requests.append(asked)
            self._received += [text.encode() for text in (path, unquote(path), *shown)]
            fault = next((one for one in self._faults if one.times > 0 and re.search(one.pattern, asked)), None)
            if fault is None:
                return None
            fault.times -= 1
            return fault.status

    def answer(self, request: Request) -> Response:
        """Answer a request by its route."""
        self._received.append(request.body)
        for methods, pattern, route in ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found and request.method in methods.split():
                with self._lock:
                    return route(self, request, *(unquote(part) for part in found.groups() if part is not None))
        raise Refused(404, "EntryNotFound", f"no route for {request.method} {request.path}")

    # Reading

    def _role(self, request: Request) -> str | None:
        shown = request.headers.get("Authorization")
        roles = {f"Bearer {self.token}": "write", f"Bearer {self.reader_token}": "read", None: None}
        if shown not in roles:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return roles[shown]

    def _find(self, request: Request, name: str) -> Repository:
        role, repository = self._role(request), self.repositories.get(name)
        if repository is None or (repository.private and role is None):
            raise Refused(404 if role else 401, "RepoNotFound", "Repository not found")
        return repository

    def _open(self, request: Request, name: str, revision: str) -> tuple[Repository, str]:
        repository = self._find(request, name)
        commit = repository.branches.get(revision) or repository.tags.get(revision) or revision
        if commit not in repository.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def _whoami(self, request: Request) -> Response:
        role = self._role(request)
        if role is None:
            raise Refused(401, "", "Invalid username or password.")
        token: dict[str, Any] = {"displayName": "loopback", "role": role}
        if self.fine_grained is not None:
            token |= {"role": "fineGrained", "fineGrained": {"scoped": [{"permissions": self.fine_grained}]}}
        roles = {ORGANIZATION: "contributor", READ_ONLY_ORGANIZATION: "read"}
        organizations = [{"type": "org", "name": name, "roleInOrg": role} for name, role in roles.items()]
        auth = {"type": "access_token", "accessToken": token}
        return as_json({"type": "user", "name": USER, "fullname": USER, "orgs": organizations, "auth": auth})

    def _auth_check(self, request: Request, name: str, right: str = "read") -> Response:
        if right == "write":
            self._open_for_writing(request, name)
        self._find(request, name)
        return as_json({})

    def _info(self, request: Request, name: str, revision: str = "main") -> Response:
        repository, commit = self._open(request, name, revision)
        files = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        return as_json({"id": name, "sha": commit, "private": repository.private, "tags": [], "siblings": files})

    def _tree(self, request: Request, name: str, revision: str) -> Response:
        repository, commit = self._open(request, name, revision)
        files = repository.commits[commit].items()
        return as_json([{"type": "file", "path": path, "size": len(file), "oid": git_id(file)} for path, file in files])

    def _resolve(self, request: Request, name: str, revision: str, path: str) -> Response:
        repository, commit = self._open(request, name, revision)
        content = repository.commits[commit].get(path)
        if content is None:
            raise Refused(404, "EntryNotFound", f"{name} has no file {path}.", **{"X-Repo-Commit": commit})
        etag = f'"{(sha256 if path.endswith(LARGE_FILES) else git_id)(content)}"'
        return Response(200, content, {"X-Repo-Commit": commit, "ETag": etag})

    # Writing

    def _open_for_writing(self, request: Request, name: str, *, as_pull_request: bool = False) -> Repository:
        role = self._role(request)
        if role is None:
            raise Refused(401, "", "Invalid username or password.")
        repository = self._find(request, name)
        if role != "write" or not (as_pull_request or name.startswith((f"{USER}/", f"{ORGANIZATION}/"))):
            raise Refused(403, "", "You have read access but not the required permissions for this operation")
        return repository

    def _create(self, request: Request) -> Response:
        asked = json.loads(request.body)
        owner = asked.get("organization") or USER
        name = f"{owner}/{asked['name']}"
        if self._role(request) != "write" or owner not in (USER, ORGANIZATION):
            raise Refused(403, "", f"You don't have the rights to create a model under the namespace {owner}")
        if name in self.repositories:
            return as_json({"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"}, 409)
        self.repository(name).private = asked.get("visibility") == "private"
        self.repository(name).commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return as_json({"url": f"{self.endpoint}/{name}", "name": name, "id": name})

    def _create_branch(self, request: Request, name: str, branch: str) -> Response:
        repository = self._open_for_writing(request, name)
        if branch in repository.branches:
            raise Refused(409, "", f"Reference already exists: {branch}")
        start = json.loads(request.body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = self._open(request, name, start)[1]
        return as_json({})

    def _commits(self, request: Request, name: str, revision: str) -> Response:
        """Answer with the head only: no test looks for an older commit."""
        commit = {"id": self._open(request, name, revision)[1], "title": "", "message": "", "authors": []}
        return as_json([commit | {"date": "2026-01-01T00:00:00.000Z"}])

    def _squash(self, request: Request, name: str, branch: str) -> Response:
        repository = self._open_for_writing(request, name)
        files = repository.files(branch)
        repository.branches[branch] = ""
        repository.commit(files, branch)
        kept = {*repository.branches.values(), *repository.tags.values()}
        repository.commits = {commit: files for commit, files in repository.commits.items() if commit in kept}
        return as_json({})

    def _validate_yaml(self, request: Request) -> Response:
        return as_json({"errors": [], "warnings": []})

    def _preupload(self, request: Request, name: str, revision: str) -> Response:
        self._open_for_writing(request, name, as_pull_request="create_pr" in request.query)
        repository, commit = self._open(request, name, revision)
        existing, answer = repository.commits[commit], []
        for file in json.loads(request.body)["files"]:
            self._received.append(base64.b64decode(file["sample"]))
            path, is_large = file["path"], file["path"].endswith(LARGE_FILES)
            known = (sha256 if is_large else git_id)(existing[path]) if path in existing else None
            mode = "lfs" if is_large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return as_json({"files": answer})

    def _lfs_batch(self, request: Request, name: str) -> Response:
        self._open_for_writing(request, name, as_pull_request=True)
        objects = []
        for entry in json.loads(request.body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self._stored:
                answer["actions"] = {"upload": {"href": f"{self.endpoint}/storage/{entry['oid']}"}}
            objects.append(answer)
        return as_json({"transfer": "basic", "objects": objects})

    def _store(self, request: Request, name: str) -> Response:
        if "Authorization" in request.headers or sha256(request.body) != name:
            raise Refused(400, "InvalidRequest", "a request with a token, or with another content than announced")
        self._stored[name] = request.body
        return Response()

    def _commit(self, request: Request, name: str, revision: str) -> Response:
        as_pull_request = "create_pr" in request.query
        repository = self._open_for_writing(request, name, as_pull_request=as_pull_request)
        parent = self._open(request, name, revision)[1]
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        if header["value"].get("parentCommit", parent) != parent:
            raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
        files, named = dict(repository.commits[parent]), set()
        for operation in operations:
            path, value = operation["value"]["path"], operation["value"]
            if operation["key"] == "deletedFile":
                del files[path]
                continue
            is_inline = operation["key"] == "file"
            files[path] = base64.b64decode(value["content"]) if is_inline else self._stored[value["oid"]]
            named.add(path)
            self._received.append(files[path])
        number = sum(branch.startswith("refs/pr/") for branch in repository.branches) + 1
        commit = repository.commit(files, f"refs/pr/{number}" if as_pull_request else revision)
        self.uploaded.append(Upload(header["value"]["summary"], named))
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.endpoint}/{name}/commit/{commit}"}
        if as_pull_request:
            answer["pullRequestUrl"] = f"{self.endpoint}/{name}/discussions/{number}"
        return as_json(answer)


_NAME, _REVISION = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES: tuple[tuple[str, str, Callable[..., Response]], ...] = (
    ("GET", r"/api/whoami-v2", LoopbackHub._whoami),
    ("GET", rf"/api/(?:models|spaces)/{_NAME}/auth-check(?:/(write))?", LoopbackHub._auth_check),
    ("GET", rf"/api/(?:models|spaces)/{_NAME}(?:/revision/{_REVISION})?", LoopbackHub._info),
    ("GET", rf"/api/(?:models|spaces)/{_NAME}/tree/{_REVISION}", LoopbackHub._tree),
    ("GET HEAD", rf"/{_NAME}/resolve/{_REVISION}/(.+)", LoopbackHub._resolve),
    ("POST", r"/api/repos/create", LoopbackHub._create),
    ("POST", rf"/api/(?:models|spaces)/{_NAME}/branch/{_REVISION}", LoopbackHub._create_branch),
    ("GET", rf"/api/models/{_NAME}/commits/{_REVISION}", LoopbackHub._commits),
    ("POST", rf"/api/models/{_NAME}/super-squash/{_REVISION}", LoopbackHub._squash),
    ("POST", r"/api/validate-yaml", LoopbackHub._validate_yaml),
    ("POST", rf"/api/(?:models|spaces)/{_NAME}/preupload/{_REVISION}", LoopbackHub._preupload),
    ("POST", rf"/(?:spaces/)?{_NAME}\.git/info/lfs/objects/batch", LoopbackHub._lfs_batch),
    ("PUT", r"/storage/(\w+)", LoopbackHub._store),
    ("POST", rf"/api/(?:models|spaces)/{_NAME}/commit/{_REVISION}", LoopbackHub._commit),
)


def serve(hub: LoopbackHub) -> ThreadingHTTPServer:
    """Return a server on a free port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_request(self) -> None:
            failure = hub.record(self.command, self.path, self.headers)
            if failure == "cut":
                self.rfile.read(min(100, int(self.headers.get("Content-Length", 0))))
                return self.close()
            body, url = self.read_body(), urlsplit(self.path)
            try:
                if isinstance(failure, int):
                    raise Refused(failure, "", f"status {failure}")
                response = hub.answer(Request(self.command, url.path, parse_qs(url.query), self.headers, body))
            except Refused as refused:
                response = refused.response
            if failure == "lost":
                return self.close()
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(response.content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(response.content)
            return None

        def read_body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def close(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815 - names of the base class

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exc_info()[1], ConnectionError):  # clients may close the connection at any time
                super().handle_error(request, client_address)

    return Server(("127.0.0.1", 0), Handler)
