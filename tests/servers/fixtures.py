"""Fixtures of servers, for `conftest.py` to import."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from servers.gcs import TOKEN, GcsServer
from servers.s3 import MissingServerError, S3Server
from servers.seaweed import SeaweedServer

# TensorStore reads it once in the life of a process, so it must be there before the first use.
os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = TOKEN

_PAGE_SIZE = 10  # small, so that listings really have pages


@pytest.fixture
def gcs_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsServer]:
    """A stand-in for Google Cloud Storage that TensorStore goes to, and that had no complaints."""
    with GcsServer(page_size=_PAGE_SIZE) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server
        assert server.violations == []


@pytest.fixture(scope="session")
def s3_process() -> Iterator[S3Server]:
    """One process for all tests: it takes seconds to start."""
    try:
        with S3Server(page_size=_PAGE_SIZE) as server:
            yield server
    except MissingServerError as error:
        pytest.skip(str(error))


@pytest.fixture
def s3_server(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """moto's S3 server with an empty bucket, and credentials for it in the environment."""
    for name, value in s3_process.environment.items():
        monkeypatch.setenv(name, value)
    s3_process.bucket = s3_process.create_bucket()
    return s3_process


@pytest.fixture(scope="session")
def seaweed_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    """One process for all tests: it takes seconds to start."""
    try:
        with SeaweedServer(tmp_path_factory.mktemp("seaweed")) as server:
            yield server
    except MissingServerError as error:
        pytest.skip(str(error))


@pytest.fixture
def seaweed_server(
    seaweed_process: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> SeaweedServer:
    """SeaweedFS with an empty bucket, and credentials for it in the environment."""
    for name, value in seaweed_process.environment.items():
        monkeypatch.setenv(name, value)
    seaweed_process.bucket = seaweed_process.create_bucket()
    return seaweed_process
