"""A server of faults, and the corpus that it serves over HTTP and as S3."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pretrain.data.remote import storage
from tests.support.faulty_server import FaultyServer


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        yield server


@pytest.fixture(params=["http", "s3"])
def location(request: pytest.FixtureRequest, server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of `/corpus/<name>` of the server, over each of the protocols."""
    if request.param == "http":
        return f"{server.url}/corpus"
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return "s3://corpus"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pauses between attempts a hundred times shorter."""
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)
