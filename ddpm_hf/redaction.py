"""Secrets in text: credentials in URLs, tokens by their format, and values of environment variables such as *_TOKEN.

A configuration with a secret is refused, since it is written to files, logs and trackers. Messages are printed without
secrets.
"""

import os
import re

# The part of a URL before the host; in messages also after a single slash, as pathlib shortens "//".
_CREDENTIALS = re.compile(r"://[^\s/]+@")
_CREDENTIALS_IN_MESSAGES = re.compile(r"(:/{1,2})[^\s/]+@")
_SIGNATURE = re.compile(
    r"([?&](?:access_token|api_key|key|password|sig|signature|token|x-amz-signature)=)[^\s&]+", re.IGNORECASE
)
# Tokens of the Hugging Face Hub, W&B and GitHub.
_TOKEN = re.compile(r"\b(?:hf_|api_org_|wandb_v\d_|gh[oprsu]_|github_pat_)[A-Za-z0-9_]{30,}")
_SECRET_SUFFIXES = ("_KEY", "_PASSWORD", "_SECRET", "_TOKEN")
# Variables whose value is certainly not a setting.
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_MIN_SECRET_LENGTH = 8  # a shorter value would match too much
_MAX_REASON_LENGTH = 200


def redact(text: str) -> str:
    """Return a text without secrets; the value of an environment variable is replaced by its name."""
    for name, value in os.environ.items():
        if name.upper().endswith(_SECRET_SUFFIXES) and len(value) >= _MIN_SECRET_LENGTH:
            text = text.replace(value, f"${name}")
    text = _CREDENTIALS_IN_MESSAGES.sub(r"\1***@", text)
    text = _SIGNATURE.sub(r"\1***", text)
    return _TOKEN.sub("***", text)


def reason_of(error: BaseException) -> str:
    """Return the message of an error in one shortened line, without secrets and without a full stop."""
    text = redact(" ".join(str(error).split()).rstrip(".")) or type(error).__name__
    return text if len(text) <= _MAX_REASON_LENGTH else f"{text[:_MAX_REASON_LENGTH]}..."


def find_secret(text: str) -> str | None:
    """Return the kind of secret in a setting, or None."""
    if _CREDENTIALS.search(text) or _SIGNATURE.search(text):
        return "a URL with a user, password or signature"
    for name in _SECRET_VARIABLES:
        if len(value := os.environ.get(name, "")) >= _MIN_SECRET_LENGTH and value in text:
            return f"the value of {name}"
    return "a token" if _TOKEN.search(text) else None
