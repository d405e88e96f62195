"""A Hub on the loopback interface that the process of the tests is logged in to."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http

from tests.loopback_hub import LoopbackHub

SECRET = "hf_" + "planted" * 6


@contextmanager
def logged_in() -> Iterator[LoopbackHub]:
    """Serve a Hub, with SECRET as its token, and log this process and those that it starts in to it."""
    with LoopbackHub() as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            patch.setattr(constants, name, value)
        patch.setattr(hf_api.api, "endpoint", hub.endpoint)
        _http.close_session()  # an earlier session is offline
        hub.token = SECRET
        for name, value in {
            "HF_TOKEN": SECRET, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        # The client does not wait before it retries.
        patch.setattr(_http, "time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))
        yield hub
    _http.close_session()


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A Hub that this process is logged in to."""
    with logged_in() as hub:
        yield hub
