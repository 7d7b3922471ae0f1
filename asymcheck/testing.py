"""What the author of a store tests it with. Needs pytest (`pip install asymcheck[testing]`)."""

# ruff: noqa: D102 - the name of a test says what it tests

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from asymcheck.errors import (
    ObjectNotFoundError,
    ObjectTooLongError,
    ShortReadError,
    StoreError,
)
from asymcheck.stores.base import MAX_KEY_LENGTH, Store

BAD_KEYS = [
    "",
    "/",
    "/absolute",
    "..",
    "../outside",
    "a/../b",
    "a/..",
    ".",
    "./a",
    ".hidden",
    "a/.hidden/b",
    "a//b",
    "a/",
    "a\x00b",
    "a\nb",
    "a b",
    "a\\b",
    "-a",
    "a/*",
    "é",
    "a" * (MAX_KEY_LENGTH + 1),
]


class StoreContract:
    """Every promise of the `Store` protocol as a test.

    Subclass it in a test module and override the fixture `open_store`. `large_nbytes` and
    `payload` may be overridden too.
    """

    large_nbytes = (64 << 20) + 1

    @pytest.fixture
    def open_store(self) -> Callable[[], Store]:
        """A function that opens the same, initially empty place at every call."""
        raise NotImplementedError("override the fixture open_store")

    @pytest.fixture
    def store(self, open_store: Callable[[], Store]) -> Iterator[Store]:
        """One open store."""
        store = open_store()
        yield store
        store.close()

    def payload(self, nbytes: int, seed: int = 0) -> memoryview:
        """Random bytes to store, in whatever memory the store shall be tested with."""
        return memoryview(bytearray(np.random.default_rng(seed).bytes(nbytes)))

    def test_is_a_store(self, store: Store) -> None:
        assert isinstance(store, Store)
        assert "://" in store.url
        assert store.guarantees.atomic_put
        assert store.guarantees.conditional_put
        assert store.guarantees.concurrency is None or store.guarantees.concurrency >= 1

    @pytest.mark.parametrize("nbytes", [0, 1, 511, 4096, 65536, 65537, 1 << 20, (1 << 20) + 4097])
    def test_returns_what_was_put(self, store: Store, nbytes: int) -> None:
        data = self.payload(nbytes)
        store.put("a/object", data)
        assert store.get("a/object", nbytes) == bytes(data)

    def test_returns_a_large_object(self, store: Store) -> None:
        data = self.payload(self.large_nbytes)
        store.put("large", data)
        assert store.has_length("large", self.large_nbytes)
        out = bytearray(self.large_nbytes)
        store.get_range("large", 0, memoryview(out))
        assert out == data

    def test_returns_ranges(self, store: Store) -> None:
        data = self.payload(200_003)
        store.put("a", data)
        for offset, nbytes in [(0, 1), (1, 4096), (199_000, 1003), (0, 200_003), (70_001, 0)]:
            out = bytearray(nbytes)
            store.get_range("a", offset, memoryview(out))
            assert out == data[offset : offset + nbytes], (offset, nbytes)

    @pytest.mark.parametrize(("offset", "nbytes"), [(0, 11), (5, 6), (10, 1), (99, 1), (-1, 2)])
    def test_refuses_ranges_past_the_end(self, store: Store, offset: int, nbytes: int) -> None:
        store.put("a", memoryview(b"0123456789"))
        with pytest.raises(ShortReadError):
            store.get_range("a", offset, memoryview(bytearray(nbytes)))

    def test_refuses_to_get_more_than_the_limit(self, store: Store) -> None:
        store.put("a", memoryview(b"0123456789"))
        assert store.get("a", 10) == b"0123456789"
        with pytest.raises(ObjectTooLongError, match="too long"):
            store.get("a", 9)

    @pytest.mark.parametrize("key", ["missing", "a/missing", "missing/x", "a"])
    def test_reports_what_is_missing(self, store: Store, key: str) -> None:
        store.put("a/b", memoryview(b"x"))
        with pytest.raises(ObjectNotFoundError) as raised:
            store.get(key, 10)
        assert raised.value.object == key
        with pytest.raises(ObjectNotFoundError):
            store.get_range(key, 0, memoryview(bytearray(1)))
        assert not store.has_length(key, 0)
        assert not store.has_length(key, 1)

    def test_an_empty_place_has_nothing(self, store: Store) -> None:
        assert store.list("") == []
        assert store.list("steps/") == []
        store.delete("nothing")
        with pytest.raises(ObjectNotFoundError):
            store.get("nothing", 1)

    @pytest.mark.parametrize("nbytes", [0, 1, 65537])
    def test_knows_lengths(self, store: Store, nbytes: int) -> None:
        store.put("a", self.payload(nbytes))
        for other in (0, 1, 65536, 65537, 65538):
            assert store.has_length("a", other) == (other == nbytes)

    def test_put_replaces(self, store: Store) -> None:
        store.put("a", memoryview(b"a longer first one"))
        store.put("a", memoryview(b"short"))
        assert store.get("a", 100) == b"short"

    def test_put_if_absent_never_replaces(self, store: Store) -> None:
        assert store.put_if_absent("a/b", memoryview(b"first")) is True
        assert store.put_if_absent("a/b", memoryview(b"second")) is False
        store.put("c", memoryview(b"put"))
        assert store.put_if_absent("c", memoryview(b"later")) is False
        assert (store.get("a/b", 9), store.get("c", 9)) == (b"first", b"put")
        store.delete("c")
        assert store.put_if_absent("c", memoryview(b"again")) is True

    def test_put_if_absent_has_one_winner(self, open_store: Callable[[], Store]) -> None:
        stores = [open_store() for _ in range(8)]
        for round in range(10):
            key = f"commits/{round}"
            barrier = threading.Barrier(len(stores))

            def race(writer: int, key: str = key, barrier: threading.Barrier = barrier) -> bool:
                barrier.wait()
                return stores[writer].put_if_absent(key, self.payload(100, writer))

            with ThreadPoolExecutor(len(stores)) as pool:
                won = list(pool.map(race, range(len(stores))))
            assert won.count(True) == 1
            assert stores[0].get(key, 100) == bytes(self.payload(100, won.index(True)))
        for store in stores:
            store.close()

    def test_lists_sorted_keys_under_a_prefix(self, store: Store) -> None:
        keys = ["a", "a-b/c", "a0", "steps/10/x", "steps/2/x", "steps/2/y.z", "steps2/x", "z/_1"]
        for key in reversed(keys):
            store.put(key, memoryview(b""))
        assert store.list("") == sorted(keys)
        assert store.list("steps/") == ["steps/10/x", "steps/2/x", "steps/2/y.z"]
        assert store.list("steps/2/") == ["steps/2/x", "steps/2/y.z"]
        assert store.list("step/") == store.list("steps/3/") == []

    def test_deletes(self, store: Store) -> None:
        for key in ("steps/1/a", "steps/1/b", "steps/2/a"):
            store.put(key, memoryview(b"x"))
        for key in ("steps/1/a", "steps/1/b", "steps/1/a", "steps/9/a", "steps/2", "steps/2/a/b"):
            store.delete(key)
        store.delete()
        assert store.list("") == ["steps/2/a"]
        assert not store.has_length("steps/1/a", 1)
        store.put("steps/1/a", memoryview(b"again"))
        assert store.get("steps/1/a", 5) == b"again"

    def test_deletes_many_at_once(self, store: Store) -> None:
        for key in ("a", "steps/1/a", "steps/1/b", "steps/2/a", "steps/2/b/c", "steps/3/a"):
            store.put(key, memoryview(b"x"))
        store.delete("steps/2/b/c", "a", "steps/1/b", "missing", "steps/9/a", "steps/2/a")
        assert store.list("") == ["steps/1/a", "steps/3/a"]

    def test_deletes_nothing_if_a_key_is_bad(self, store: Store) -> None:
        store.put("a", memoryview(b"x"))
        with pytest.raises(StoreError):
            store.delete("a", "../b")
        assert store.list("") == ["a"]

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_refuses_bad_keys(self, store: Store, key: str) -> None:
        out = bytearray(1)
        for attempt in (
            lambda: store.put(key, memoryview(b"x")),
            lambda: store.put_if_absent(key, memoryview(b"x")),
            lambda: store.get(key, 1),
            lambda: store.get_range(key, 0, memoryview(out)),
            lambda: store.has_length(key, 1),
            lambda: store.delete(key),
        ):
            with pytest.raises(StoreError):
                attempt()
        assert store.list("") == []

    @pytest.mark.parametrize("prefix", ["..", "../", "/", "a/../", ".tmp/", "a//", "a"])
    def test_refuses_bad_prefixes(self, store: Store, prefix: str) -> None:
        with pytest.raises(StoreError):
            store.list(prefix)

    @pytest.mark.parametrize("nbytes", [100, 300_000])
    def test_data_may_be_reused_after_put(self, store: Store, nbytes: int) -> None:
        data = self.payload(nbytes)
        before = bytes(data)
        store.put("a", data)
        store.put_if_absent("b", data)
        data[:] = bytes(nbytes)
        assert store.get("a", nbytes) == store.get("b", nbytes) == before

    def test_takes_read_only_data(self, store: Store) -> None:
        data = self.payload(100_000).toreadonly()
        store.put("a", data)
        assert store.get("a", 100_000) == bytes(data)

    def test_memory_of_other_items_is_its_bytes(self, store: Store) -> None:
        numbers = np.arange(50_000, dtype=np.float32).reshape(100, 500)
        store.put("a", numbers.data)
        assert store.get("a", numbers.nbytes) == numbers.tobytes()
        out = np.zeros_like(numbers)
        store.get_range("a", 0, out.data)
        assert np.array_equal(out, numbers)

    def test_many_threads_at_once(self, store: Store) -> None:
        def use(worker: int) -> None:
            for round in range(5):
                key = f"shared/{worker % 3}/{worker}-{round}"
                data = self.payload(1 + 30_011 * worker, worker + round)
                store.put(key, data)
                assert store.get(key, len(data)) == bytes(data)
                assert key in store.list(f"shared/{worker % 3}/")
                store.delete(key)
                assert not store.has_length(key, len(data))

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(use, worker) for worker in range(8)]:
                done.result()
        assert store.list("") == []

    def test_another_opening_sees_the_objects(self, open_store: Callable[[], Store]) -> None:
        first = open_store()
        first.put("a/b", memoryview(b"data"))
        first.close()
        second = open_store()
        assert second.list("") == ["a/b"]
        assert second.get("a/b", 4) == b"data"
        assert second.put_if_absent("a/b", memoryview(b"other")) is False
        second.close()
