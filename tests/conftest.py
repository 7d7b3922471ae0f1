"""What all tests share: a private store for each, and no deadline that a slow machine misses."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import settings
from memory_store import MemoryStore

# Eight devices to shard over; must be set before anything imports JAX.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

settings.register_profile("asymcheck", deadline=None)
settings.load_profile("asymcheck")

_names = itertools.count()


@pytest.fixture
def store() -> MemoryStore:
    """An empty store in memory that tests can watch, hold up and make fail."""
    return MemoryStore()


@pytest.fixture
def memory_url() -> str:
    """The URL of an empty store in memory."""
    return f"memory://test-{next(_names)}"
