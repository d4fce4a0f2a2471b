"""The loopback Hub, and a client that talks to it alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.utils
import pytest
from huggingface_hub import constants

from tests.helpers.hub import LoopbackHub

TOKEN, READER, OTHER = "hf_ann", "hf_ann_reads", "hf_bob"
USERS = {TOKEN: ("ann", True), READER: ("ann", False), OTHER: ("bob", True)}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub without repositories. The client has no token, an empty cache, and does not wait."""
    server = LoopbackHub()
    server.users.update(USERS)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + template,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        "HF_HUB_DISABLE_XET": True,  # files in LFS go through LFS
    }.items():
        monkeypatch.setattr(constants, name, value)
    # transformers keeps a client, which was made with the address of an earlier test's server.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    huggingface_hub.utils.close_session()  # the next one sees the environment above
    with server.running():
        yield server
    huggingface_hub.utils.close_session()
