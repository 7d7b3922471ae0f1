"""What all tests share: a private store for each, and no deadline that a slow machine misses."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest
from hypothesis import settings
from memory_store import MemoryStore
from servers.fixtures import gcs_server, s3_process, s3_server, seaweed_process, seaweed_server
from servers.hdfs_fixtures import frail_cluster, hdfs_cluster, hdfs_path

from asymcheck.cli import main
from asymcheck.stores import drivers

__all__ = [
    "frail_cluster",
    "gcs_server",
    "hdfs_cluster",
    "hdfs_path",
    "s3_process",
    "s3_server",
    "seaweed_process",
    "seaweed_server",
]

# Eight devices to shard over; must be set before anything imports JAX.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

settings.register_profile("asymcheck", deadline=None)
settings.load_profile("asymcheck")

_names = itertools.count()


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Object stores try again at once."""
    monkeypatch.setattr(drivers, "FIRST_RETRY_DELAY_S", 0.01)
    monkeypatch.setattr(drivers, "LONGEST_RETRY_DELAY_S", 0.02)


@pytest.fixture
def store() -> MemoryStore:
    """An empty store in memory that tests can watch, hold up and make fail."""
    return MemoryStore()


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call the command; exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["asymcheck", *map(str, arguments)])
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def memory_url() -> str:
    """The URL of an empty store in memory."""
    return f"memory://test-{next(_names)}"
