"""Uploads a folder to the Hub in one commit, as whoever `hf auth login` or HF_TOKEN says.

Large files go first and can be seen by nobody until the commit names them, so a push that breaks off publishes nothing.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from ddpm_hf.redaction import reason_of

CARD = "README.md"
_BRANCH = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*")
# Of httpx in huggingface_hub 1, of httpx2 in 2: what is raised when there is no answer.
_HTTPError: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
# What an earlier push may have left that a new one no longer has: weights in another number of parts or precision,
# records, pictures. Whatever else is in the repository stays.
_OURS = (
    "unet/diffusion_pytorch_model*", "scheduler/reverse_variance.json", "training_config.yaml", "training_summary.json",
    "evaluation.json", "samples/samples.png", "samples/denoising.*", "samples/loss.png", "samples/evaluation.png",
)  # fmt: skip


class HubRefused(ValueError):
    """The Hub says no to what was asked; the message says what to do."""


class HubFailed(OSError):
    """The Hub cannot be reached, or could not do it; nothing was half published."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a folder goes.

    Args:
        repo_id: "user/name", or "name" for the user who is logged in.
        private: Whether a repository that is made is private; one that exists must be.
        branch: Instead of main; made if it does not exist.
        as_pull_request: Propose the change to whoever owns the repository.

    Raises:
        HubRefused: The id is malformed, or a branch and a pull request are asked for.
    """

    repo_id: str
    private: bool = False
    branch: str | None = None
    as_pull_request: bool = False

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError:
            raise HubRefused(
                f'{self.repo_id!r} is no name of a repository; give "user/name" of letters, digits, "-", "_" and ".", '
                "at most 96 in all."
            ) from None
        if self.branch is not None and self.as_pull_request:
            raise HubRefused("a pull request has a branch of its own; leave out the branch or the pull request.")
        if self.branch is not None and not _is_branch(self.branch):
            raise HubRefused(
                f"{self.branch!r} is no name of a branch; use letters, digits, -, _, . and /, but neither .. nor HEAD, "
                "and no . or .lock at an end."
            )

    @property
    def revision(self) -> str:
        """The branch."""
        return self.branch or constants.DEFAULT_REVISION


def _is_branch(name: str) -> bool:
    """Tells whether git takes a name for a branch; of those that it takes, none with unusual signs."""
    is_plain = _BRANCH.fullmatch(name) is not None and ".." not in name and name != "HEAD"
    return is_plain and not any(part.endswith((".", ".lock")) for part in name.split("/"))


@dataclass(frozen=True)
class Pushed:
    """What there is after a push.

    Args:
        url: Where to look at it.
        is_new: Whether anything was uploaded; False if all of it was there already.
    """

    url: str
    is_new: bool


@dataclass(frozen=True)
class Remote:
    """A repository before a push.

    Args:
        repo_id: With the name of its owner.
        commit: The one that the push is made on top of; None for a repository that does not exist.
        card: The text of its README.md, if there is one.
        has_branch: Whether the branch exists; one that does not begins at `commit`.
    """

    repo_id: str
    commit: str | None
    card: str | None
    has_branch: bool = True


def check_license(license: str | None) -> None:
    """Refuses what is no identifier of a licence; None is that of nobody knows which.

    Raises:
        HubRefused: It is a name or a sentence.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise HubRefused(
            f"license is {license!r}; give an identifier that the Hub knows, such as mit, apache-2.0 or cc-by-4.0 "
            "(https://huggingface.co/docs/hub/repositories-licenses)."
        )


def check_access(target: Target) -> str:
    """Asks the Hub whether this user may write there, and changes nothing.

    Returns:
        The full name of the repository.

    Raises:
        HubRefused: Nobody is logged in, or this user may not.
        HubFailed: The Hub cannot be asked.
    """
    api = HfApi()
    with _in_words(target.repo_id):
        token = get_token()
        if token is None:
            raise HubRefused("nobody is logged in to the Hub; run hf auth login, or set HF_TOKEN.")
        if not token.isascii() or not token.isprintable():  # the client would repeat it in its complaint
            raise HubRefused("the token holds a character that no token has; run hf auth login, or set HF_TOKEN anew.")
        user = api.whoami()
        name = target.repo_id if "/" in target.repo_id else f"{user['name']}/{target.repo_id}"
    with _in_words(name):
        try:
            try:
                if not target.as_pull_request:  # anybody who can read a repository may propose a change
                    api.auth_check(name, write=True)
            except RemoteEntryNotFoundError:  # a Hub of an enterprise or a mirror that does not know the question
                pass
            is_private = api.repo_info(name).private
        except RepositoryNotFoundError:
            _check_may_make(name, user, target)
            return name
    if target.private and not is_private:
        raise HubRefused(f"{name} exists and is public; leave private out, or make it private in its settings first.")
    return name


def _check_may_make(name: str, user: Mapping[str, Any], target: Target) -> None:
    """Refuses a repository that does not exist, and that this user cannot make."""
    if target.as_pull_request:
        raise HubRefused(
            f"{name} does not exist, so there is nothing to propose a change to; give the name of a repository that "
            "does, or leave the pull request out."
        )
    organisations = user.get("orgs", [])
    owners = {user["name"], *(one["name"] for one in organisations if one.get("roleInOrg") != "read")}
    if name.split("/")[0] not in owners:
        raise HubRefused(
            f"{name} does not exist, and {user['name']} cannot make it there; choose a name under "
            f"{' or '.join(sorted(owners))}."
        )
    token = user.get("auth", {}).get("accessToken", {})  # none of an OAuth login
    rights = (token.get("fineGrained") or {}).get("scoped") or []
    cannot_write = rights and not any("repo.write" in right.get("permissions", []) for right in rights)
    if token.get("role") == "read" or cannot_write:
        raise HubRefused(f"{name} does not exist, and your token cannot make it; use a token with write access.")


def look_up(target: Target, repo_id: str) -> Remote:
    """Reads the card of a repository, and changes nothing.

    Args:
        target: Where a push goes.
        repo_id: What `check_access` returned for it.

    Raises:
        HubRefused: This user may not.
        HubFailed: The Hub cannot be asked.
    """
    api, has_branch = HfApi(), True
    is_default = target.revision == constants.DEFAULT_REVISION  # which comes with the repository
    with _in_words(repo_id):
        try:
            commit = api.repo_info(repo_id, revision=target.revision).sha
        except RepositoryNotFoundError:
            return Remote(repo_id, None, None, has_branch=is_default)
        except RevisionNotFoundError:
            if is_default:
                raise
            commit, has_branch = api.repo_info(repo_id).sha, False
        try:
            card = Path(api.hf_hub_download(repo_id, CARD, revision=commit)).read_bytes().decode("utf-8", "replace")
        except EntryNotFoundError:
            card = None
    return Remote(repo_id, commit, card, has_branch)


def push(folder: Path, target: Target, remote: Remote, message: str) -> Pushed:
    """Makes the folder the content of the repository, in one commit on top of what was looked up.

    A repository or branch that did not exist is made before it; one that somebody made since is not touched.

    Args:
        folder: All that is published.
        target: Where.
        remote: What `look_up` returned; if somebody has changed it since, nothing is published.
        message: First line of the commit.

    Raises:
        HubRefused: This user may not, or somebody else was faster.
        HubFailed: The connection broke, or the Hub could not do it.
    """
    # An answer may be lost after the commit was made.
    with _in_words(remote.repo_id, "all of it was published or nothing"):
        api, start = HfApi(), remote.commit
        if start is None:
            api.create_repo(remote.repo_id, private=target.private or None)
            start = api.repo_info(remote.repo_id).sha
        if not remote.has_branch:
            api.create_branch(remote.repo_id, branch=target.revision, revision=start)
        there = api.list_repo_files(remote.repo_id, revision=start)
        # Not upload_folder, which may make several commits of it, and keep some of them when another one fails.
        commit = api.create_commit(
            remote.repo_id,
            _changes(folder, there),
            commit_message=message,
            revision=target.revision,
            create_pr=target.as_pull_request,
            parent_commit=None if target.as_pull_request else start,
        )
    if commit.pr_url:
        return Pushed(commit.pr_url, is_new=True)
    home = f"{constants.ENDPOINT}/{remote.repo_id}"
    return Pushed(f"{home}/tree/{target.branch}" if target.branch else home, commit.oid != start)


def _changes(folder: Path, there: Iterable[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Returns what makes the folder the content of a repository; the client leaves out what is there already."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    old = [name for name in there if name not in files and any(fnmatchcase(name, pattern) for pattern in _OURS)]
    return [
        *(CommitOperationAdd(name, path) for name, path in files.items()),
        *(CommitOperationDelete(name) for name in old),
    ]


def hide_progress() -> None:
    """Shows no bars, as is right for a file or a pipe."""
    disable_progress_bars()


@contextmanager
def _in_words(name: str, outcome: str = "nothing was published") -> Iterator[None]:
    """Turns what the client raises into one sentence."""
    try:
        yield
    except (HubRefused, HubFailed):
        raise
    except OfflineModeIsEnabled:
        raise HubFailed("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it.") from None
    except RevisionNotFoundError as error:
        raise HubRefused(f"{name} has no such branch ({_reason(error)}).") from error
    except HfHubHTTPError as error:
        raise _refusal(error, name, outcome) from error
    except (_HTTPError, OSError, RuntimeError) as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # of an upload, which the client wraps
            raise _refusal(error.__cause__, name, outcome) from error
        raise HubFailed(
            f"the Hub could not be reached ({_reason(error.__cause__ or error)}); {outcome}. Check the "
            f"network and {constants.ENDPOINT}, and push again."
        ) from error


def _refusal(error: HfHubHTTPError, name: str, outcome: str) -> HubRefused | HubFailed:
    """Says what an answer of the Hub means for whoever wanted to push."""
    status = error.response.status_code
    said = _reason(error)
    if status == 401:
        return HubRefused(f"the Hub does not accept your login ({said}); run hf auth login, or set HF_TOKEN anew.")
    if status in (403, 404):
        return HubRefused(
            f"you may not write to {name} ({said}); use a token with write access, ask its owner, or push a pull "
            "request."
        )
    if status in (409, 412):
        return HubRefused(f"{name} was changed by somebody else in the same moment ({said}); push again.")
    if status < 500 and status != 429:
        return HubRefused(f"the Hub refused the push to {name} ({said}).")
    return HubFailed(f"the Hub could not do it ({said}); {outcome}. Push again later.")


def _reason(error: BaseException) -> str:
    """Returns what an error says; of an answer of the Hub its number and what the Hub itself says."""
    if not isinstance(error, HfHubHTTPError):
        return reason_of(error)
    first_line = str(error).strip().partition("\n")[0]
    return f"{error.response.status_code} {reason_of(ValueError(error.server_message or first_line))}"
