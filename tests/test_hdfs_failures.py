"""HDFS whose servers die, hang, fill up and forbid: no part of an object is ever taken for it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import hdfs_native
import numpy as np
import pytest
from servers.hdfs import HdfsCluster
from servers.proxy import Proxy
from test_hdfs import SCHEMES, temporaries, url_of

from asymcheck.errors import (
    ObjectNotFoundError,
    StoreFullError,
    StoreUnavailableError,
)
from asymcheck.stores import Store, open_store

LARGE_NBYTES = 24 << 20  # more than what sockets and the client's queue of packets hold
IMPATIENT = "?retries=0&timeout_s=30"


def large() -> memoryview:
    return memoryview(bytearray(np.random.default_rng(0).bytes(LARGE_NBYTES)))


@pytest.fixture(params=SCHEMES)
def url(request: pytest.FixtureRequest, hdfs_cluster: HdfsCluster, hdfs_path: str) -> str:
    return url_of(hdfs_cluster, request.param, hdfs_path)


@pytest.fixture
def hdfs_url(hdfs_cluster: HdfsCluster, hdfs_path: str) -> str:
    return url_of(hdfs_cluster, "hdfs", hdfs_path)


class Hook:
    """Does something in the middle: before the `call`-th call of a method of hdfs-native."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        owner: type,
        method: str,
        action: Callable[[], object],
        call: int = 1,
    ) -> None:
        self.calls = 0
        original = getattr(owner, method)

        def hooked(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == call:
                action()
            return original(*arguments)

        monkeypatch.setattr(owner, method, hooked)


def begun(store: Store, key: str, data: memoryview) -> tuple[threading.Thread, Future[None]]:
    """A put in another thread that does not keep the process alive."""
    outcome: Future[None] = Future()

    def put() -> None:
        try:
            outcome.set_result(store.put(key, data))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=put, daemon=True)
    thread.start()
    return thread, outcome


def assert_hangs(outcome: Future[None]) -> None:
    with pytest.raises(TimeoutError):
        outcome.result(1.0)


class TestDataNodes:
    def test_one_dies_while_an_object_is_written(
        self, frail_cluster: HdfsCluster, url: str
    ) -> None:
        """Suspended first, since no write ends without it: so it dies in the middle."""
        store = open_store(url)
        store.put("before", memoryview(b"x"))
        frail_cluster.suspend_datanode(0)
        _, outcome = begun(store, "large", large())
        assert_hangs(outcome)
        assert store.list("") == ["before"]
        frail_cluster.kill_datanode(0)
        outcome.result(120)
        assert store.get("large", LARGE_NBYTES) == large()
        assert store.list("") == ["before", "large"]

    def test_all_die_while_an_object_is_written(
        self, frail_cluster: HdfsCluster, hdfs_path: str, url: str
    ) -> None:
        store = open_store(url + IMPATIENT)
        store.put("before", memoryview(b"x"))
        for index in (0, 1):
            frail_cluster.suspend_datanode(index)
        _, outcome = begun(store, "large", large())
        assert_hangs(outcome)
        for index in (0, 1):
            frail_cluster.kill_datanode(index)
        with pytest.raises(StoreUnavailableError, match="object large"):
            outcome.result(60)
        assert store.list("") == ["before"]
        assert not store.has_length("large", LARGE_NBYTES)
        with pytest.raises(StoreUnavailableError):  # it is known, and nobody has its block
            store.get("before", 1)
        frail_cluster.heal()
        assert store.get("before", 1) == b"x"
        store.put("large", large())
        assert store.get("large", LARGE_NBYTES) == large()
        assert temporaries(frail_cluster, hdfs_path) == []

    def test_one_dies_between_two_pieces(
        self, frail_cluster: HdfsCluster, hdfs_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hook = Hook(
            monkeypatch,
            hdfs_native.FileWriter,
            "write",
            lambda: frail_cluster.kill_datanode(1),
            call=10,
        )
        store = open_store(hdfs_url)
        store.put("large", large())
        assert hook.calls >= 10
        assert store.get("large", LARGE_NBYTES) == large()

    def test_one_dies_while_an_object_is_read(self, frail_cluster: HdfsCluster, url: str) -> None:
        store = open_store(url)
        store.put("large", large())
        frail_cluster.suspend_datanode(0)
        with ThreadPoolExecutor(8) as pool:  # half of them, more or less, go to the suspended one
            gets = [pool.submit(store.get, "large", LARGE_NBYTES) for _ in range(8)]
            time.sleep(0.5)
            frail_cluster.kill_datanode(0)
            assert all(get.result(120) == large() for get in gets)

    def test_one_hangs_while_an_object_is_read(
        self, frail_cluster: HdfsCluster, hdfs_url: str
    ) -> None:
        store = open_store(f"{hdfs_url}?timeout_s=20")  # and silence for a quarter of it
        store.put("a", memoryview(b"x"))
        frail_cluster.suspend_datanode(0)
        with ThreadPoolExecutor(8) as pool:  # some of them ask the suspended one first
            assert list(pool.map(lambda _: store.get("a", 1), range(8))) == [b"x"] * 8


class TestNameNode:
    def test_restarts_while_an_object_is_written(
        self, frail_cluster: HdfsCluster, hdfs_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hook = Hook(
            monkeypatch, hdfs_native.FileWriter, "write", frail_cluster.restart_namenode, call=10
        )
        store = open_store(hdfs_url)
        store.put("large", large())
        assert hook.calls >= 10
        assert store.get("large", LARGE_NBYTES) == large()
        assert store.list("") == ["large"]

    def test_is_away_for_a_while(self, frail_cluster: HdfsCluster, hdfs_url: str) -> None:
        store = open_store(hdfs_url)
        store.put("before", memoryview(b"x"))
        frail_cluster.kill_namenode()
        _, outcome = begun(store, "after", memoryview(b"y"))
        assert_hangs(outcome)
        frail_cluster.start_namenode()
        outcome.result(120)
        assert store.list("") == ["after", "before"]
        assert (store.get("before", 1), store.get("after", 1)) == (b"x", b"y")

    def test_is_away_for_good(self, frail_cluster: HdfsCluster, url: str) -> None:
        store = open_store(url + IMPATIENT)
        store.put("before", memoryview(b"x"))
        frail_cluster.kill_namenode()
        for attempt in (
            lambda: store.put("after", memoryview(b"y")),
            lambda: store.put_if_absent("after", memoryview(b"y")),
            lambda: store.get("before", 1),
            lambda: store.list(""),
            lambda: store.delete("before"),
        ):
            with pytest.raises(StoreUnavailableError, match="servers run"):
                attempt()
        frail_cluster.start_namenode()
        assert open_store(url).get("before", 1) == b"x"

    def test_hangs(self, frail_cluster: HdfsCluster, url: str) -> None:
        store, patient = open_store(f"{url}?timeout_s=1.5"), open_store(url)
        patient.put("before", memoryview(b"x"))
        frail_cluster.suspend_namenode()
        for attempt in (
            lambda: store.put("after", memoryview(b"y")),
            lambda: store.get("before", 1),
        ):
            begin_s = time.monotonic()
            with pytest.raises(StoreUnavailableError):
                attempt()
            assert time.monotonic() - begin_s < 30  # and not until somebody wakes it
        frail_cluster.resume_namenode()
        assert patient.get("before", 1) == b"x"
        assert "before" in store.list("")

    def test_a_hanging_one_is_left_for_another_connection(
        self, hdfs_cluster: HdfsCluster, hdfs_path: str
    ) -> None:
        """A machine that vanishes answers nothing, not even that it is gone."""
        with Proxy(("127.0.0.1", hdfs_cluster.rpc_port)) as proxy:
            proxy.swallow()
            store = open_store(f"hdfs://127.0.0.1:{proxy.address[1]}{hdfs_path}?timeout_s=1.5")
            with pytest.raises(StoreUnavailableError):
                store.list("")
            assert store.list("") == []

    def test_resets_its_connections(
        self, hdfs_cluster: HdfsCluster, hdfs_path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Proxy(("127.0.0.1", hdfs_cluster.rpc_port)) as proxy:
            Hook(monkeypatch, hdfs_native.FileWriter, "write", proxy.drop, call=10)
            Hook(monkeypatch, hdfs_native.FileWriter, "close", proxy.drop)
            Hook(monkeypatch, hdfs_native.Client, "rename", proxy.drop, call=2)
            store = open_store(f"hdfs://127.0.0.1:{proxy.address[1]}{hdfs_path}")
            store.put("large", large())
            assert store.put_if_absent("other", memoryview(b"x")) is True
            assert store.get("large", LARGE_NBYTES) == large()
            assert store.list("") == ["large", "other"]

    def test_in_safe_mode(self, frail_cluster: HdfsCluster, url: str) -> None:
        store = open_store(f"{url}?retries=0")
        store.put("before", memoryview(b"x"))
        frail_cluster.admin("-safemode", "enter")
        try:
            for attempt in (
                lambda: store.put("after", memoryview(b"y")),
                lambda: store.delete("before"),
            ):
                with pytest.raises(StoreUnavailableError, match="safemode leave"):
                    attempt()
            assert store.get("before", 1) == b"x"
            _, outcome = begun(open_store(url), "after", memoryview(b"y"))
            assert_hangs(outcome)
        finally:
            frail_cluster.admin("-safemode", "leave")
        outcome.result(120)
        assert store.list("") == ["after", "before"]


class TestLostAnswers:
    """The request is done, and the connection breaks before the answer: put in by hand here."""

    @pytest.fixture
    def lose_answers(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bool], None]:
        """Lose the answer to the next call of a method; with False the request too."""

        def lose(method: str, done: bool = True) -> None:
            original = getattr(hdfs_native.Client, method)
            lost: list[object] = []

            def losing(*arguments: Any) -> Any:
                if lost:
                    return original(*arguments)
                if done:
                    original(*arguments)  # may raise: then no answer was lost
                lost.append(arguments)
                raise OSError("connection reset")

            monkeypatch.setattr(hdfs_native.Client, method, losing)

        return lose

    @pytest.mark.parametrize("method", ["create", "rename", "mkdirs"])
    @pytest.mark.parametrize("done", [True, False])
    def test_an_object_is_published_once(
        self, hdfs_url: str, lose_answers: Any, method: str, done: bool
    ) -> None:
        store = open_store(hdfs_url)
        lose_answers(method, done)
        assert store.put_if_absent("a/b", memoryview(b"mine")) is True
        assert store.put_if_absent("a/b", memoryview(b"mine")) is False
        lose_answers(method, done)
        store.put("c/d", memoryview(b"mine too"))
        assert (store.get("a/b", 4), store.get("c/d", 8)) == (b"mine", b"mine too")

    def test_anothers_object_is_not_taken_for_ones_own(
        self, hdfs_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, other = open_store(hdfs_url), open_store(hdfs_url)
        original = hdfs_native.Client.rename
        calls: list[object] = []

        def losing(client: Any, *arguments: Any) -> None:
            calls.append(arguments)
            if len(calls) > 1:
                return original(client, *arguments)
            assert other.put_if_absent("a", memoryview(b"same bytes")) is True
            raise OSError("connection reset")

        monkeypatch.setattr(hdfs_native.Client, "rename", losing)
        assert store.put_if_absent("a", memoryview(b"same bytes")) is False

    def test_a_cleared_temporary_is_written_again(
        self, hdfs_url: str, hdfs_path: str, hdfs_cluster: HdfsCluster, monkeypatch: Any
    ) -> None:
        client = hdfs_native.Client(hdfs_cluster.rpc_url)
        Hook(
            monkeypatch,
            hdfs_native.FileWriter,
            "close",
            lambda: client.delete(f"{hdfs_path}/.tmp", True),
        )
        Hook(
            monkeypatch,
            hdfs_native.Client,
            "rename",
            lambda: client.delete(f"{hdfs_path}/.tmp", True),
        )
        store = open_store(hdfs_url)
        store.put("a", memoryview(b"x"))
        assert store.get("a", 1) == b"x"


class TestQuotas:
    def test_of_space(self, hdfs_cluster: HdfsCluster, hdfs_path: str, url: str) -> None:
        store = open_store(url)
        store.put("before", memoryview(b"x"))
        hdfs_cluster.admin("-setSpaceQuota", "1m", hdfs_path)
        for put in (store.put, store.put_if_absent):
            with pytest.raises(StoreFullError, match="Raise the quota"):
                put("after", memoryview(bytes(2 << 20)))
        assert store.list("") == ["before"]
        assert temporaries(hdfs_cluster, hdfs_path) == []
        hdfs_cluster.admin("-clrSpaceQuota", hdfs_path)
        store.put("after", memoryview(bytes(2 << 20)))

    def test_of_names(self, hdfs_cluster: HdfsCluster, hdfs_path: str, url: str) -> None:
        store = open_store(url)
        store.put("before", memoryview(b"x"))  # four names: the root, .tmp, before
        hdfs_cluster.admin("-setQuota", "3", hdfs_path)
        with pytest.raises(StoreFullError):
            store.put("after", memoryview(b"x"))
        store.delete("before")
        store.put("after", memoryview(b"x"))
        assert store.list("") == ["after"]


WRITER = """
    import sys
    import hdfs_native
    from asymcheck.stores import open_store

    def say(*_):
        print("in the middle", flush=True)
        sys.stdin.readline()

    url, method = sys.argv[1:]
    for owner in (hdfs_native.Client, hdfs_native.FileWriter):
        if hasattr(owner, method):
            setattr(owner, method, say)
    data = memoryview(bytearray(24 << 20))
    print("begin", flush=True)
    open_store(url).put("large", data)
    print("done", flush=True)
"""


class TestKilledWriter:
    def start(self, url: str, method: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), url, method],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @pytest.mark.parametrize("method", ["write", "close", "rename"])
    def test_leaves_only_what_is_cleared_later(
        self, hdfs_cluster: HdfsCluster, hdfs_path: str, hdfs_url: str, method: str
    ) -> None:
        writer = self.start(hdfs_url, method)
        assert writer.stdout is not None
        assert [writer.stdout.readline() for _ in range(2)] == ["begin\n", "in the middle\n"]
        store = open_store(hdfs_url)
        assert store.list("") == []
        assert store.clear_stale_temporaries() == 0  # it lives
        writer.kill()
        writer.communicate()
        assert store.list("") == []
        with pytest.raises(ObjectNotFoundError):
            store.get("large", LARGE_NBYTES)
        assert len(temporaries(hdfs_cluster, hdfs_path)) == 1
        assert store.clear_stale_temporaries() == 1
        assert temporaries(hdfs_cluster, hdfs_path) == []

    def test_over_http(self, frail_cluster: HdfsCluster, hdfs_path: str) -> None:
        url = url_of(frail_cluster, "webhdfs", hdfs_path)
        store = open_store(url)
        store.put("before", memoryview(b"x"))
        for index in (0, 1):
            frail_cluster.suspend_datanode(index)
        writer = self.start(url, "nothing")
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begin\n"
        time.sleep(1.0)  # it sends what the sockets take
        writer.kill()
        assert writer.communicate()[0] == ""
        frail_cluster.heal()
        assert store.list("") == ["before"]
        deadline = time.monotonic() + 60
        while temporaries(frail_cluster, hdfs_path):  # a DataNode may create it even now
            store.clear_stale_temporaries()
            assert time.monotonic() < deadline
        assert store.list("") == ["before"]
