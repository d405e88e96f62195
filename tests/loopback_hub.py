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
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import unquote

import yaml

from tests.loopback_reading import ORGANIZATION, USER, ReadableHub
from tests.loopback_repository import Upload, git_blob_id, is_large, sha256
from tests.loopback_server import Refusal, Request, Response, as_json

REPOSITORY = r"(?P<repository>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"


def files_of(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file of a folder by its path, written with slashes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class LoopbackHub(ReadableHub):
    """The Hub with all its routes; what a test sets and reads are the attributes of ReadableHub."""

    def answer(self, request: Request) -> Response:
        """Takes the route of a request."""
        for methods, pattern, route in ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found and request.method in methods:
                names = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
                with self._lock:
                    return route(self, request, **names)
        raise Refusal(404, "EntryNotFound", f"This Hub has no route for {request.method} {request.path}.")

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
                upload = {"href": self.stored_at(entry["oid"])}
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
