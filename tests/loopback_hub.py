"""A Hugging Face Hub on the loopback device, kept in memory: the part that clients read models from.

    with LoopbackHub() as hub:
        commit = hub.repository("user/model").commit(files_of(folder))

A client finds it through `HF_ENDPOINT=hub.endpoint` in the environment that it starts with. As on the real Hub, small
files are served in place and large ones by a redirect to another origin, which must never be shown the token. A further
route is one more method of LoopbackHub and one more row in ROUTES.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_FILES = (".safetensors", ".bin", ".png")
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


@dataclass
class Repository:
    """The commits of a model, {commit id: {path: content}}, and the names that point to them."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Makes these files the whole content of a branch and returns the id of the commit, 40 digits as in git."""
        tree = [f"{git_blob_id(content)} {path}" for path, content in sorted(files.items())]
        parent = self.branches.get(branch, "")
        commit = hashlib.sha1("\n".join([parent, *tree]).encode(), usedforsecurity=False).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> str | None:
        """Returns the commit that a branch, a tag or a commit id means."""
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        return commit if commit in self.commits else None


@dataclass(frozen=True)
class Request:
    """What a client asked; the path is still quoted, names of headers are in any case."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Response:
    """What it gets; a HEAD request gets no content, but its length."""

    status: int
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer that says why not: clients turn the code into their own exceptions."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        reason = {"X-Error-Code": code, "X-Error-Message": message}
        self.response = Response(status, json.dumps({"error": message}).encode(), reason | dict(headers or {}))


def as_json(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    """Answers with a value."""
    return Response(200, json.dumps(value).encode(), {"Content-Type": "application/json"} | dict(headers or {}))


def as_file(request: Request, content: bytes, headers: Mapping[str, str]) -> Response:
    """Answers with a file, or with the part of it that the request asks for to go on with a broken download."""
    headers = {"Accept-Ranges": "bytes"} | dict(headers)
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if asked is None:
        return Response(200, content, headers)
    first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    if first > last:
        return Response(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
    part = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
    return Response(206, content[first : last + 1], headers | part)


class LoopbackHub:
    """The Hub and the storage of its large files, each on a port of its own while the context lasts.

    Attributes:
        endpoint: The address for HF_ENDPOINT.
        token: The one that may read private repositories.
        repositories: By "user/name".
        stored: The large files that the storage serves, by their sha256.
        requests: What was asked so far, as "METHOD path".
    """

    def __init__(self) -> None:
        self.token = "hf_loopback"  # noqa: S105 - no secret: it opens nothing but this object
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self._hub, self._storage = _server(self.answer), _server(self.answer_of_storage)
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

    def repository(self, name: str) -> Repository:
        """Returns the repository of this name, a new one if there is none."""
        return self.repositories.setdefault(name, Repository())

    def answer(self, request: Request) -> Response:
        """Takes the route of a request."""
        self.requests.append(f"{request.method} {request.path}")
        for methods, pattern, route in ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found and request.method in methods:
                names = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
                return route(self, request, **names)
        raise Refusal(404, "EntryNotFound", f"This Hub has no route for {request.method} {request.path}.")

    def answer_of_storage(self, request: Request) -> Response:
        """Serves a large file by its sha256; as a signed address, it takes no token."""
        self.requests.append(f"{request.method} {request.path}")
        if "Authorization" in request.headers:
            raise Refusal(400, "InvalidRequest", "The token was shown to the storage.")
        content = self.stored.get(request.path.removeprefix("/"))
        if content is None:
            raise Refusal(404, "EntryNotFound", "The storage has no such file.")
        return as_file(request, content, {})

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
            if path.endswith(LARGE_FILES):
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
        if not path.endswith(LARGE_FILES):
            return as_file(request, content, headers | {"ETag": f'"{git_blob_id(content)}"'})
        name = sha256(content)
        self.stored[name] = content
        headers |= {"Location": f"{self._storage_endpoint}/{name}", "ETag": f'"{git_blob_id(content)}"'}
        return Response(302, b"", headers | {"X-Linked-ETag": f'"{name}"', "X-Linked-Size": str(len(content))})

    def _open(self, request: Request, name: str, revision: str) -> tuple[Repository, str]:
        """Returns a repository that the request may read, and the commit that it means."""
        authorization = request.headers.get("Authorization")
        repository = self.repositories.get(name)
        if repository is None or (repository.private and authorization != f"Bearer {self.token}"):
            # Without a token the answer does not say whether there is such a repository.
            raise Refusal(404 if authorization else 401, "RepoNotFound", "Repository not found")
        commit = repository.find(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit


ROUTES: tuple[tuple[tuple[str, ...], str, Callable[..., Response]], ...] = (
    (("GET",), rf"/api/models/{REPOSITORY}", LoopbackHub.info),
    (("GET",), rf"/api/models/{REPOSITORY}/revision/{REVISION}", LoopbackHub.info),
    (("GET",), rf"/api/models/{REPOSITORY}/tree/{REVISION}", LoopbackHub.tree),
    (("GET", "HEAD"), rf"/{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)", LoopbackHub.resolve),
)


def _server(answer: Callable[[Request], Response]) -> ThreadingHTTPServer:
    """Returns a server on a free port of the loopback device, with a thread for each connection."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_request(self) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                response = answer(Request(self.command, url.path, parse_qs(url.query), self.headers, body))
            except Refusal as refusal:
                response = refusal.response
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(response.content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(response.content)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815 - names of the base class

        def log_message(self, *_: object) -> None:
            """Prints nothing: what was asked is in LoopbackHub.requests."""

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)
