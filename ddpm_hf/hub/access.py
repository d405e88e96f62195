"""Repositories on the Hub: where to write, whether the user may, and errors in one sentence. Needs no torch."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ddpm_hf.redaction import reason_of

# Plain characters only, and no name that git refuses.
_BRANCH = re.compile(r"(?!HEAD\Z)(?!.*\.\.)(?!.*\.(?:lock)?(?:/|\Z))\w[\w.-]*(?:/\w[\w.-]*)*")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# Raised when there is no answer: of httpx in huggingface_hub 1, of httpx2 in 2.
_HTTPError: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


class HubRefused(ValueError):
    """The Hub does not allow a request; the message says what to change."""


class HubFailed(OSError):
    """The Hub could not be reached or had an error of its own."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a pipeline is pushed to.

    Args:
        repo_id: "user/name", or "name" for the user who is logged in.
        private: Create the repository as private; an existing public one is refused.
        branch: Branch instead of main, created if it does not exist.
        as_pull_request: Open a pull request instead of committing.
        license: License identifier for the card, such as "mit"; None keeps the one in the card.

    Raises:
        ValueError: A value is malformed, or a branch is combined with a pull request.
    """

    repo_id: str
    private: bool = False
    branch: str | None = None
    as_pull_request: bool = False
    license: str | None = None

    def __post_init__(self) -> None:
        validate_repo_id(self.repo_id)
        if self.branch is not None and self.as_pull_request:
            raise HubRefused("a pull request has its own branch; remove the branch or the pull request.")
        if self.branch is not None and not _BRANCH.fullmatch(self.branch):
            raise HubRefused(
                f"{self.branch!r} is not a valid branch name; use letters, digits, -, _, . and /, without .., HEAD, or "
                "a part that ends in . or .lock."
            )
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise HubRefused(
                f"license is {self.license!r}; use an identifier of the Hub such as mit, apache-2.0 or cc-by-4.0 "
                "(https://huggingface.co/docs/hub/repositories-licenses)."
            )

    @property
    def revision(self) -> str:
        """The branch."""
        return self.branch or constants.DEFAULT_REVISION


def check_access(target: Target) -> str:
    """Ask the Hub whether the user may push, without changing anything.

    Returns:
        The full id of the repository, `user/name`.

    Raises:
        HubRefused: The user is not logged in or may not push.
        HubFailed: The Hub cannot be reached.
    """
    api = HfApi()
    with hub_errors(target.repo_id):
        token = get_token()
        if token is None:
            raise HubRefused("you are not logged in to the Hub; run hf auth login or set HF_TOKEN.")
        if not token.isascii() or not token.isprintable():  # the client would print it in its error
            raise HubRefused("the token contains an invalid character; run hf auth login or set HF_TOKEN again.")
        user = api.whoami()
        name = target.repo_id if "/" in target.repo_id else f"{user['name']}/{target.repo_id}"
    with hub_errors(name):
        try:
            try:
                if not target.as_pull_request:  # anybody who can read a repository may open a pull request
                    api.auth_check(name, write=True)
            except RemoteEntryNotFoundError:  # mirrors and older enterprise Hubs do not have this route
                pass
            is_private = api.repo_info(name).private
        except RepositoryNotFoundError:
            _check_can_create(name, user, target)
            return name
    if target.private and not is_private:
        raise HubRefused(f"{name} exists and is public; remove private, or make it private in its settings first.")
    return name


def _check_can_create(name: str, user: Mapping[str, Any], target: Target) -> None:
    """Refuse a repository that does not exist and that the user cannot create."""
    if target.as_pull_request:
        raise HubRefused(
            f"{name} does not exist, so a pull request is not possible; use an existing repository, or remove the pull "
            "request."
        )
    owners = {user["name"], *(one["name"] for one in user.get("orgs", []) if one.get("roleInOrg") != "read")}
    if name.split("/")[0] not in owners:
        raise HubRefused(
            f"{name} does not exist, and {user['name']} cannot create it there; use a name under "
            f"{' or '.join(sorted(owners))}."
        )
    token = user.get("auth", {}).get("accessToken", {})  # empty for an OAuth login
    scopes = (token.get("fineGrained") or {}).get("scoped") or []
    cannot_write = scopes and not any("repo.write" in scope.get("permissions", []) for scope in scopes)
    if token.get("role") == "read" or cannot_write:
        raise HubRefused(f"{name} does not exist, and your token cannot create it; use a token with write access.")


@contextmanager
def hub_errors(name: str, outcome: str = "nothing was published") -> Iterator[None]:
    """Turn the exceptions of the client into HubRefused and HubFailed with one sentence."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise HubFailed("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it.") from None
    except (_HTTPError, OSError, RuntimeError) as error:
        answer = error if isinstance(error, HfHubHTTPError) else error.__cause__  # the client wraps errors of uploads
        if not isinstance(answer, HfHubHTTPError):
            raise HubFailed(
                f"the Hub could not be reached ({reason_of(answer or error)}); {outcome}. Check the network and "
                f"{constants.ENDPOINT}, and push again."
            ) from error
        said = answer.server_message or str(answer).strip().partition("\n")[0]
        status = answer.response.status_code
        reason = f"{status} {reason_of(ValueError(said))}"
        if status >= 500 or status == 429:
            raise HubFailed(f"the Hub had an error ({reason}); {outcome}. Push again later.") from error
        if status == 401:
            sentence = f"the Hub does not accept your token ({reason}); run hf auth login or set HF_TOKEN again."
        elif status == 403:
            sentence = (
                f"you may not write to {name} ({reason}); use a token with write access, ask the owner, or open a "
                "pull request."
            )
        elif status in (409, 412):
            sentence = f"{name} has changed in the meantime ({reason}); push again."
        else:
            sentence = f"the Hub refused the push to {name} ({reason})."
        raise HubRefused(sentence) from error
