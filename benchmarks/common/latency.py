"""Stores that take as long as one behind a network would: they sleep."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from asymcheck.errors import ObjectNotFoundError, ObjectTooLongError, ShortReadError
from asymcheck.stores.base import Guarantees, check_key, check_prefix
from asymcheck.stores.local import LocalStore


@dataclass(frozen=True)
class Network:
    """Every request takes `latency_s`, and its bytes as long as stream and link let them."""

    latency_s: float
    stream_bytes_per_s: float = math.inf
    link_bytes_per_s: float = math.inf


class Link:
    """Is taken by one request after the other."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_s = 0.0

    def arrival_s(self, nbytes: int, begun_s: float) -> float:
        """When bytes that set out at `begun_s` will be there, on `time.monotonic`'s clock."""
        with self._lock:
            self._free_s = max(begun_s, self._free_s) + nbytes / self._bytes_per_s
            return self._free_s


@contextmanager
def slow_writes(bytes_per_s: float) -> Iterator[None]:
    """Every `LocalStore` of this process writes as over one link of so many bytes a second."""
    link = Link(bytes_per_s)

    def slow(put: Callable[..., Any]) -> Callable[..., Any]:
        def slowly(store: LocalStore, key: str, data: memoryview) -> Any:
            arrival_s = link.arrival_s(data.nbytes, time.monotonic())
            result = put(store, key, data)
            time.sleep(max(0.0, arrival_s - time.monotonic()))
            return result

        return slowly

    names = ("put", "put_if_absent")
    slowed = {name: slow(getattr(LocalStore, name)) for name in names}
    with patch.multiple(LocalStore, **slowed):
        yield


class LatencyStore:
    """A dictionary as a `Store`."""

    url = "latency://"

    def __init__(self, network: Network, concurrency: int | None = 32) -> None:
        self.guarantees = Guarantees(
            "memory", "a lock", False, True, False, concurrency=concurrency
        )
        self.requests = self.nbytes = 0
        self._network = network
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._link = Link(network.link_bytes_per_s)

    def get(self, key: str, max_nbytes: int) -> bytes:
        found = self._find(key)
        if len(found) > max_nbytes:
            raise ObjectTooLongError("object is too long", object=key)
        self._travel(len(found))
        return found

    def get_range(self, key: str, offset: int, out: memoryview) -> None:
        found = self._find(key)
        if not 0 <= offset <= len(found) - out.nbytes:
            raise ShortReadError("object ends before", object=key, offset=offset)
        self._travel(out.nbytes)
        out.cast("B")[:] = memoryview(found)[offset : offset + out.nbytes]

    def has_length(self, key: str, nbytes: int) -> bool:
        self._travel(0)
        return key in self._objects and len(self._objects[key]) == nbytes

    def put(self, key: str, data: memoryview) -> None:
        self.put_if_absent(key, data)

    def put_if_absent(self, key: str, data: memoryview) -> bool:
        content = bytes(data)
        self._travel(len(content))
        with self._lock:
            return self._objects.setdefault(check_key(key), content) is content

    def list(self, prefix: str) -> list[str]:
        self._travel(0)
        check_prefix(prefix)
        with self._lock:
            return sorted(key for key in self._objects if key.startswith(prefix))

    def delete(self, *keys: str) -> None:
        self._travel(0)
        with self._lock:
            for key in keys:
                self._objects.pop(key, None)

    def clear_stale_temporaries(self) -> int:
        return 0

    def close(self) -> None:
        pass

    def _find(self, key: str) -> bytes:
        found = self._objects.get(check_key(key))
        if found is None:
            self._travel(0)
            raise ObjectNotFoundError("no such object", object=key)
        return found

    def _travel(self, nbytes: int) -> None:
        begun_s, network = time.monotonic(), self._network
        with self._lock:
            self.requests += 1
            self.nbytes += nbytes
        there_s = begun_s + network.latency_s
        shared_s = self._link.arrival_s(nbytes, there_s)
        own_s = there_s + nbytes / network.stream_bytes_per_s
        time.sleep(max(0.0, shared_s - begun_s, own_s - begun_s))
