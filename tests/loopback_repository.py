"""What tests/loopback_hub.py keeps: repositories with their commits, and how files are named in them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

LARGE_FILES = (".safetensors", ".bin", ".png", ".gif", ".npz", ".pt")
LARGE_SIZE = 10 * 2**20


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
