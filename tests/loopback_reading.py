"""The part of tests/loopback_hub.py that clients read models from: its state, its rights and its storage."""

import threading
from typing import Literal

from typing_extensions import Self

from tests.loopback_repository import Repository, Upload, git_blob_id, is_large, sha256
from tests.loopback_server import Refusal, Request, Response, Wire, as_file, as_json, serve

USER, ORGANIZATION = "user", "org"
ORGANIZATION_TO_READ = "readers"  # the user is in it, but may write nothing there


class ReadableHub:
    """The Hub and the storage of its large files, each on a port of its own while the context lasts.

    Attributes:
        endpoint: The address for HF_ENDPOINT.
        token: That of `user`, who may write to the repositories of user and of org.
        reader_token: The same user's, but for reading only.
        fine_grained: The permissions of `token`, if it is a fine-grained one.
        repositories: By "user/name".
        takes_large_files: Whether large files go to the storage; otherwise they come in the commit like others.
        stored: The large files that the storage serves, by their sha256.
        received: The sha256 of each large file that was uploaded to the storage, in the order of arrival.
        uploaded: What was committed by clients.
    """

    def __init__(self) -> None:
        self.token, self.reader_token = "hf_loopback", "hf_loopback_reader"  # they open nothing but this object
        self.fine_grained: list[str] | None = None
        self.repositories: dict[str, Repository] = {}
        self.takes_large_files = True
        self.stored: dict[str, bytes] = {}
        self.received: list[str] = []
        self.uploaded: list[Upload] = []
        self._wire = Wire()
        self._announced: set[str] = set()
        self._lock = threading.RLock()
        self._hub, self._storage = serve(self.answer, self._wire), serve(self.answer_of_storage, self._wire)
        # Two hosts by their names, as clients compare these to know whom to tell the token.
        self.endpoint = f"http://127.0.0.1:{self._hub.server_port}"
        self._storage_endpoint = f"http://localhost:{self._storage.server_port}"

    def __enter__(self) -> Self:
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

    def mend(self) -> None:
        """Ends what `fail` began."""
        self._wire.mend()

    def repository(self, name: str) -> Repository:
        """Returns the repository of this name, a new one if there is none."""
        return self.repositories.setdefault(name, Repository())

    def answer(self, request: Request) -> Response:
        """Takes the route of a request."""
        raise NotImplementedError

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

    def stored_at(self, name: str) -> str:
        """Returns the address of a large file by its sha256."""
        return f"{self._storage_endpoint}/{name}"

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
        headers |= {"Location": self.stored_at(name), "ETag": f'"{git_blob_id(content)}"'}
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
        access = {"displayName": "loopback", "role": role}
        if self.fine_grained is not None:
            scoped = [{"entity": {"type": "user", "name": USER}, "permissions": self.fine_grained}]
            access |= {"role": "fineGrained", "fineGrained": {"scoped": scoped}}
        token = {"type": "access_token", "accessToken": access}
        organizations = [
            {"type": "org", "name": ORGANIZATION, "roleInOrg": "contributor"},
            {"type": "org", "name": ORGANIZATION_TO_READ, "roleInOrg": "read"},
        ]
        return as_json({"type": "user", "name": USER, "fullname": USER, "orgs": organizations, "auth": token})

    def auth_check(self, request: Request, repository: str, right: str = "read") -> Response:
        """Nothing, unless it may not be done."""
        if right == "write":
            self._open_for_writing(request, repository)
        self._find(request, repository)
        return as_json({})

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
