"""A store in memory that a test can watch, hold up, and make fail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

from asymcheck.errors import ObjectNotFoundError, ObjectTooLongError, ShortReadError
from asymcheck.stores.base import Guarantees, check_key, check_prefix


class MemoryStore:
    """A dictionary as a `Store`.

    Attributes:
        objects: what is stored, for tests to look at and to damage.
        calls: (operation, key) of every call, in order.
        read_nbytes: bytes read by `get_range` so far.
        hook: called with (operation, key) before every operation; may wait or raise.
    """

    guarantees = Guarantees("one assignment", "a lock", True, True, False)

    def __init__(self, name: str = "test") -> None:
        self.url = f"memory://{name}"
        self.objects: dict[str, bytes] = {}
        self.calls: list[tuple[str, str]] = []
        self.read_nbytes = 0
        self.hook: Callable[[str, str], None] = lambda operation, key: None
        self._lock = threading.Lock()

    def _enter(self, operation: str, key: str) -> None:
        self.hook(operation, key)
        with self._lock:
            self.calls.append((operation, key))

    def get(self, key: str, max_nbytes: int) -> bytes:
        check_key(key)
        self._enter("get", key)
        found = self._find(key)
        if len(found) > max_nbytes:
            raise ObjectTooLongError("object is too long", object=key)
        return found

    def get_range(self, key: str, offset: int, out: memoryview) -> None:
        check_key(key)
        self._enter("get_range", key)
        found = self._find(key)
        if not 0 <= offset <= len(found) - out.nbytes:
            raise ShortReadError("object ends before", object=key, offset=offset)
        out.cast("B")[:] = found[offset : offset + out.nbytes]
        with self._lock:
            self.read_nbytes += out.nbytes

    def has_length(self, key: str, nbytes: int) -> bool:
        check_key(key)
        self._enter("has_length", key)
        return len(self.objects.get(key, b"")) == nbytes and key in self.objects

    def put(self, key: str, data: memoryview) -> None:
        check_key(key)
        self._enter("put", key)
        content = data.tobytes()
        with self._lock:
            self.objects[key] = content

    def put_if_absent(self, key: str, data: memoryview) -> bool:
        check_key(key)
        self._enter("put_if_absent", key)
        content = data.tobytes()
        with self._lock:
            return self.objects.setdefault(key, content) is content

    def list(self, prefix: str) -> list[str]:
        check_prefix(prefix)
        self._enter("list", prefix)
        with self._lock:
            return sorted(key for key in self.objects if key.startswith(prefix))

    def delete(self, *keys: str) -> None:
        for key in [check_key(key) for key in keys]:
            self._enter("delete", key)
            with self._lock:
                self.objects.pop(key, None)

    def clear_stale_temporaries(self) -> int:
        self._enter("clear_stale_temporaries", "")
        return 0

    def close(self) -> None:
        pass

    def _find(self, key: str) -> bytes:
        try:
            return self.objects[key]
        except KeyError:
            raise ObjectNotFoundError("no such object", object=key) from None

    def keys(self, part: str) -> list[str]:
        """Keys that contain `part`, sorted."""
        with self._lock:
            return sorted(key for key in self.objects if part in key)

    def called(self, operation: str, part: str = "") -> list[str]:
        """Keys of the calls of one operation so far whose keys contain `part`."""
        with self._lock:
            return [key for name, key in self.calls if name == operation and part in key]

    @contextmanager
    def failing(self, operation: str, part: str, error: BaseException):
        """Within, the operation raises `error` for keys that contain `part`."""

        def fail(name: str, key: str) -> None:
            before(name, key)
            if name == operation and part in key:
                raise error

        before, self.hook = self.hook, fail
        try:
            yield
        finally:
            self.hook = before

    def hold(self, operation: str, part: str) -> Held:
        """From now on the operation waits for keys that contain `part`; see `Held`."""
        return Held(self, operation, part)


class RemoteStore(MemoryStore):
    """In memory, but it says of itself that every request is a journey over a network."""

    def __init__(self, concurrency: int | None = 32) -> None:
        super().__init__()
        self.guarantees = replace(MemoryStore.guarantees, concurrency=concurrency)


class Held:
    """Calls that wait until `release`; a context manager that releases at its end."""

    def __init__(self, store: MemoryStore, operation: str, part: str) -> None:
        self._store = store
        self._match = (operation, part)
        self._before = store.hook
        self._open = threading.Event()
        self._arrived = threading.Condition()
        self._waiting = 0
        store.hook = self._hook

    def _hook(self, operation: str, key: str) -> None:
        self._before(operation, key)
        if operation == self._match[0] and self._match[1] in key and not self._open.is_set():
            with self._arrived:
                self._waiting += 1
                self._arrived.notify_all()
            assert self._open.wait(60), f"nobody released {operation} {key}"

    def await_calls(self, count: int = 1) -> None:
        """Return when so many calls have come to wait."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: self._waiting >= count, 30), self._waiting

    @property
    def waiting(self) -> int:
        """Calls that came to wait so far."""
        with self._arrived:
            return self._waiting

    def release(self) -> None:
        """Let all go on, and those to come."""
        self._open.set()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
