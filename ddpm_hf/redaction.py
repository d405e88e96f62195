"""Finds secrets in text: credentials in a URL, tokens by their shape, and what the environment keeps under such names.

Nothing here is a setting of a run. A configuration that holds a secret is refused, since it is written to many places;
what others say, in errors above all, is told without them.
"""

import os
import re

# The part of a URL before the host, in messages also where a path made one slash of two; signatures behind it.
_CREDENTIALS = re.compile(r"://[^\s/]+@")
_CREDENTIALS_IN_MESSAGES = re.compile(r"(:/{1,2})[^\s/]+@")
_SIGNATURE = re.compile(
    r"([?&](?:access_token|api_key|key|password|sig|signature|token|x-amz-signature)=)[^\s&]+", re.IGNORECASE
)
# Tokens of the Hugging Face Hub, W&B and GitHub.
_TOKEN = re.compile(r"\b(?:hf_|api_org_|wandb_v\d_|gh[oprsu]_|github_pat_)[A-Za-z0-9_]{30,}")
_SECRET_NAMES = ("_KEY", "_PASSWORD", "_SECRET", "_TOKEN")
# Those whose value is surely no setting.
_OUR_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_LONGEST_REASON = 200
_SHORTEST_SECRET = 8  # a shorter value would be found everywhere


def redact(text: str) -> str:
    """Returns a text without secrets; one of the environment is replaced by its name."""
    for name, value in os.environ.items():
        if name.upper().endswith(_SECRET_NAMES) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, f"${name}")
    text = _CREDENTIALS_IN_MESSAGES.sub(r"\1***@", text)
    text = _SIGNATURE.sub(r"\1***", text)
    return _TOKEN.sub("***", text)


def reason_of(error: BaseException) -> str:
    """Returns what an error says, without secrets, in one line that is not too long and has no full stop."""
    text = redact(" ".join(str(error).split()).rstrip(".")) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."


def find_secret(text: str) -> str | None:
    """Says which kind of secret a setting holds, or returns None."""
    if _CREDENTIALS.search(text) or _SIGNATURE.search(text):
        return "a URL with a user, password or signature"
    for name in _OUR_SECRETS:
        if len(value := os.environ.get(name, "")) >= _SHORTEST_SECRET and value in text:
            return f"the value of {name}"
    return "a token" if _TOKEN.search(text) else None
