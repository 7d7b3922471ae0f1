"""Stores in a real HDFS: hdfs:// by Hadoop's protocols, webhdfs:// over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import hdfs_native
import pytest
import requests
from servers.hdfs import HdfsCluster
from servers.hdfs_fixtures import BLOCK_NBYTES
from servers.proxy import HttpProxy

from asymcheck.errors import (
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreUnavailableError,
)
from asymcheck.reader import default_threads
from asymcheck.stores import Store, StoreOptions, open_store, process_identity
from asymcheck.stores.bounded_calls import BoundedCalls, CallTimedOutError
from asymcheck.stores.hadoop_errors import HadoopError, is_passing, store_error
from asymcheck.stores.hdfs_client import Deadline
from asymcheck.stores.hdfs_rpc import RpcClient, hadoop_error
from asymcheck.stores.temporaries import FOREIGN_MAX_AGE_S, temporary_name
from asymcheck.stores.urls import remote_place
from asymcheck.stores.webhdfs import PIECE_NBYTES, WAKING_NBYTES
from asymcheck.testing import StoreContract

SCHEMES = ["hdfs", "webhdfs"]


def url_of(cluster: HdfsCluster, scheme: str, path: str) -> str:
    return (cluster.rpc_url if scheme == "hdfs" else cluster.webhdfs_url) + path


def temporaries(cluster: HdfsCluster, path: str) -> list[str]:
    place = remote_place("hdfs", f"127.0.0.1:{cluster.rpc_port}{path}", StoreOptions())
    found = RpcClient(place).entries(f"{path}/.tmp", Deadline(30))
    return [name for name, _ in found]


class HdfsStoreContract(StoreContract):
    scheme: str

    @pytest.fixture
    def open_store(self, hdfs_cluster: HdfsCluster, hdfs_path: str) -> Callable[[], Store]:
        return lambda: open_store(url_of(hdfs_cluster, self.scheme, f"{hdfs_path}/runs/a"))

    @pytest.fixture(autouse=True)
    def leaves_nothing_behind(
        self, open_store: Callable[[], Store], hdfs_cluster: HdfsCluster, hdfs_path: str
    ) -> Iterator[None]:
        yield
        store = open_store()
        store.put("last", memoryview(b""))  # so that there is a folder of temporaries
        assert temporaries(hdfs_cluster, f"{hdfs_path}/runs/a") == []
        store.close()


class TestHdfsStore(HdfsStoreContract):
    scheme = "hdfs"


class TestWebHdfsStore(HdfsStoreContract):
    scheme = "webhdfs"


@pytest.fixture(params=SCHEMES)
def url(request: pytest.FixtureRequest, hdfs_cluster: HdfsCluster, hdfs_path: str) -> str:
    return url_of(hdfs_cluster, request.param, hdfs_path)


def test_reads_over_http_are_longer_and_fewer_at_a_time() -> None:
    rpc, http = (open_store(f"{scheme}://127.0.0.1:1/runs") for scheme in SCHEMES)
    assert http.guarantees.range_nbytes == 4 * rpc.guarantees.range_nbytes
    assert default_threads(http) == default_threads(rpc) // 4
    rpc.close()
    http.close()


class TestOpening:
    def test_nothing_is_asked_of_the_server(self) -> None:
        for scheme in SCHEMES:
            store = open_store(f"{scheme}://127.0.0.1:1/runs/a")
            assert store.url == f"{scheme}://127.0.0.1:1/runs/a"
            store.close()

    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize(
        "rest", ["", "/path", "user@host:1/a", "host:1/a?region=x", "host:1/a?endpoint=http://b"]
    )
    def test_refuses_what_names_no_place(self, scheme: str, rest: str) -> None:
        with pytest.raises(StoreError):
            open_store(f"{scheme}://{rest}")

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_unknown_credentials_are_not_shown(self, scheme: str) -> None:
        with pytest.raises(StoreError, match="credentials") as raised:
            open_store(f"{scheme}://127.0.0.1:1/a?credentials=sesame")
        assert "sesame" not in str(raised.value)

    def test_a_nameservice_needs_a_configuration(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HADOOP_CONF_DIR", raising=False)
        monkeypatch.delenv("HADOOP_HOME", raising=False)
        with pytest.raises(StoreError, match="HADOOP_CONF_DIR"):
            open_store("hdfs://nameservice/a")

    @pytest.mark.parametrize(
        ("scheme", "library"), [("hdfs", "hdfs_native"), ("webhdfs", "fsspec")]
    )
    def test_says_which_extra_is_missing(
        self, monkeypatch: pytest.MonkeyPatch, scheme: str, library: str
    ) -> None:
        for module in ("asymcheck.stores.hdfs_rpc", "asymcheck.stores.webhdfs"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        for module in [name for name in sys.modules if name.startswith(library)]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(StoreError, match=r"asymcheck\[hdfs\]"):
            open_store(f"{scheme}://127.0.0.1:1/a")

    def test_both_ways_lead_to_the_same_objects(
        self, hdfs_cluster: HdfsCluster, hdfs_path: str
    ) -> None:
        native, web = (open_store(url_of(hdfs_cluster, scheme, hdfs_path)) for scheme in SCHEMES)
        native.put("a/b", memoryview(b"native"))
        web.put("a/c", memoryview(b"web"))
        assert native.list("") == web.list("") == ["a/b", "a/c"]
        assert (web.get("a/b", 6), native.get("a/c", 3)) == (b"native", b"web")
        assert web.put_if_absent("a/b", memoryview(b"")) is False

    def test_a_nameservice_is_found_in_hadoops_configuration(
        self,
        hdfs_cluster: HdfsCluster,
        hdfs_path: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """One NameNode of the two is not there: the other one is asked."""
        settings = {
            "dfs.ha.namenodes.cluster": "gone,here",
            "dfs.namenode.rpc-address.cluster.gone": "127.0.0.1:1",
            "dfs.namenode.rpc-address.cluster.here": f"127.0.0.1:{hdfs_cluster.rpc_port}",
        }
        properties = "".join(
            f"<property><name>{name}</name><value>{value}</value></property>"
            for name, value in settings.items()
        )
        (tmp_path / "hdfs-site.xml").write_text(f"<configuration>{properties}</configuration>")
        monkeypatch.setenv("HADOOP_CONF_DIR", str(tmp_path))
        store = open_store(f"hdfs://cluster{hdfs_path}")
        store.put("a", memoryview(b"x"))
        assert store.list("") == ["a"]


def test_objects_and_directories_do_not_replace_each_other(url: str) -> None:
    store = open_store(url)
    store.put("a/b", memoryview(b"x"))
    for key in ("a", "a/b/c"):
        for put in (store.put, store.put_if_absent):
            with pytest.raises(StoreError, match="lies where") as raised:
                put(key, memoryview(b"y"))
            assert not isinstance(raised.value, StoreUnavailableError)
    assert store.list("") == ["a/b"]


def test_every_block_of_every_replica_is_synced(hdfs_cluster: HdfsCluster, url: str) -> None:
    store = open_store(url)
    before = hdfs_cluster.n_syncs()
    for nbytes in (1, BLOCK_NBYTES + 1):
        store.put(f"put/{nbytes}", memoryview(bytes(nbytes)))
        store.put_if_absent(f"put_if_absent/{nbytes}", memoryview(bytes(nbytes)))
    n_blocks, n_replicas = 2 * (1 + 2), 2
    assert hdfs_cluster.n_syncs() - before >= n_blocks * n_replicas


class TestUsers:
    @pytest.fixture
    def foreign_url(
        self, url: str, hdfs_cluster: HdfsCluster, monkeypatch: pytest.MonkeyPatch
    ) -> str:
        """Of a directory that another user has written to."""
        open_store(url).put("a", memoryview(b"x"))
        monkeypatch.setenv("HADOOP_USER_NAME", "stranger")
        return url

    def test_others_may_read_and_not_write(self, foreign_url: str) -> None:
        store = open_store(foreign_url)
        assert store.get("a", 1) == b"x"
        for attempt in (
            lambda: store.put("b", memoryview(b"x")),
            lambda: store.put_if_absent("a", memoryview(b"x")),
            lambda: store.delete("a"),
        ):
            with pytest.raises(StorePermissionError, match=r"stranger.*HADOOP_USER_NAME"):
                attempt()
        assert store.list("") == ["a"]

    def test_webhdfs_takes_a_user_as_an_option(
        self, hdfs_cluster: HdfsCluster, hdfs_path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = url_of(hdfs_cluster, "webhdfs", hdfs_path)
        open_store(url).put("a", memoryview(b"x"))
        store = open_store(f"{url}?credentials=user:someone")
        with pytest.raises(StorePermissionError, match="someone"):
            store.put("b", memoryview(b"x"))


class TestTemporaries:
    def leave(self, cluster: HdfsCluster, path: str, name: str, age_s: float = 0.0) -> None:
        client = hdfs_native.Client(cluster.rpc_url)
        with client.create(f"{path}/.tmp/{name}") as file:
            file.write(b"half of somethi")
        modified_ms = int((time.time() - age_s) * 1000)
        client.set_times(f"{path}/.tmp/{name}", modified_ms, modified_ms)

    def test_only_those_of_the_dead_are_cleared(
        self, hdfs_cluster: HdfsCluster, hdfs_path: str, url: str
    ) -> None:
        here, _, start = process_identity.token().rpartition("-")
        living = temporary_name(process_identity.token())
        dead = temporary_name(f"{here}-{int(start) + 1}")
        foreign_young = temporary_name("0123456789abcdef-1-1")
        foreign_old = temporary_name("0123456789abcdef-1-2")
        for name in (living, dead, foreign_young):
            self.leave(hdfs_cluster, hdfs_path, name, FOREIGN_MAX_AGE_S - 600)
        self.leave(hdfs_cluster, hdfs_path, foreign_old, FOREIGN_MAX_AGE_S + 600)
        store = open_store(url)
        assert store.clear_stale_temporaries() == 2
        assert sorted(temporaries(hdfs_cluster, hdfs_path)) == sorted([living, foreign_young])
        assert store.clear_stale_temporaries() == 0
        assert store.list("") == []

    def test_there_are_none_without_a_directory(self, url: str) -> None:
        assert open_store(url).clear_stale_temporaries() == 0


CLUSTER_OWNER = """
    import sys
    from pathlib import Path
    from servers.hdfs import HdfsCluster

    with HdfsCluster(Path(sys.argv[1])) as cluster:
        print(*cluster.process_ids, flush=True)
        sys.stdin.readline()
"""


def test_the_servers_end_with_the_process_that_started_them(
    hdfs_cluster: HdfsCluster, tmp_path: Path
) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CLUSTER_OWNER), str(tmp_path / "cluster")],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    servers = [Path(f"/proc/{pid}") for pid in owner.stdout.readline().split()]
    assert len(servers) == 2
    assert all(server.exists() for server in servers)
    owner.kill()
    owner.communicate()
    deadline = time.monotonic() + 60
    while any(server.exists() for server in servers):
        assert time.monotonic() < deadline


class TestErrors:
    @pytest.mark.parametrize(
        ("told", "kind"),
        [
            ('RPCError("org.apache.hadoop.hdfs.server.namenode.SafeModeException", "a")', "S"),
            ('FatalRPCError("org.apache.hadoop.security.AccessControlException", "no")', "P"),
            ('RPCError("org.apache.hadoop.hdfs.protocol.DSQuotaExceededException", "full")', "F"),
            ('RPCError("org.apache.hadoop.security.token.SecretManager$InvalidToken", "")', "P"),
            ('RPCError("java.io.IOException", "could only be written to 0 of the 1")', "S"),
            ('RPCError("java.io.IOException", "whatever")', "S"),
            ('DataTransferError("All nodes failed for write")', "S"),
            ('GSSAPIError(GSS_S_FAILURE, 0, "No credentials")', "P"),
            ("NoSASLMechanism", "P"),
            ('RPCError("java.lang.IllegalArgumentException", "whatever")', "E"),
            ("something else", "E"),
        ],
    )
    def test_the_text_of_the_client_is_understood(self, told: str, kind: str) -> None:
        errors = {
            "S": StoreUnavailableError,
            "P": StorePermissionError,
            "F": StoreFullError,
            "E": StoreError,
        }
        found = hadoop_error(RuntimeError(told))
        assert type(store_error("write", "hdfs://a/b", "key", found)) is errors[kind]
        assert is_passing(found) == (kind == "S")

    def test_messages_are_one_line(self) -> None:
        told = RuntimeError('RPCError("java.lang.Error", "a \\"b\\"\\n\\tat org.apache")')
        error = store_error("write", "hdfs://a/b", "key", hadoop_error(told))
        assert str(error) == 'cannot write in hdfs://a/b: Error: a "b" [object key]'

    def test_a_panic_of_the_client_is_an_error(self) -> None:
        class PanicException(BaseException):
            pass

        assert isinstance(hadoop_error(PanicException("unwrap")), HadoopError)


@pytest.fixture
def web_proxy(hdfs_cluster: HdfsCluster) -> Iterator[HttpProxy]:
    """Before the NameNode's WebHDFS."""
    with HttpProxy(("127.0.0.1", hdfs_cluster.http_port)) as proxy:
        yield proxy


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, StorePermissionError),
        (403, StorePermissionError),
        (418, StoreError),
        (200, StoreUnavailableError),  # of a captive portal, say: not what was asked for
        (502, StoreUnavailableError),
        (503, StoreUnavailableError),
    ],
)
def test_answers_that_are_not_hadoops(
    web_proxy: HttpProxy, hdfs_path: str, status: int, error: type[StoreError]
) -> None:
    store = open_store(f"webhdfs://127.0.0.1:{web_proxy.address[1]}{hdfs_path}?retries=0")
    web_proxy.answer(status, body=b"<html>")
    with pytest.raises(StoreError) as raised:
        store.list("")
    assert type(raised.value) is error
    store.close()


def test_a_busy_namenode_is_asked_again(web_proxy: HttpProxy, hdfs_path: str) -> None:
    store = open_store(f"webhdfs://127.0.0.1:{web_proxy.address[1]}{hdfs_path}")
    web_proxy.answer(503, times=2)
    store.put("a", memoryview(b"x"))
    assert store.list("") == ["a"]
    store.close()


def test_a_gateway_that_answers_for_the_datanodes_is_refused(
    web_proxy: HttpProxy, hdfs_path: str
) -> None:
    store = open_store(f"webhdfs://127.0.0.1:{web_proxy.address[1]}{hdfs_path}")
    web_proxy.answer(200, body=b"content")
    with pytest.raises(StoreError, match="gateway"):
        store.put("a", memoryview(b"x"))
    store.close()


class TestBoundedCalls:
    def test_returns_and_raises(self) -> None:
        calls = BoundedCalls()
        assert calls.call(10, divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            calls.call(10, divmod, 7, 0)

        def time_out() -> None:
            raise TimeoutError("its own")

        with pytest.raises(TimeoutError, match="its own"):
            calls.call(10, time_out)
        calls.close()

    def test_threads_are_used_again_unless_they_hang(self) -> None:
        calls = BoundedCalls()
        woken = threading.Event()
        first = calls.call(10, threading.get_ident)
        with pytest.raises(CallTimedOutError):
            calls.call(0.01, woken.wait)
        second = calls.call(10, threading.get_ident)
        assert second != first
        assert calls.call(10, threading.get_ident) == second
        woken.set()
        calls.close()

    def test_many_at_once(self) -> None:
        calls = BoundedCalls()
        barrier = threading.Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            found = list(
                pool.map(lambda n: calls.call(30, lambda: (barrier.wait(), n)[1]), range(8))
            )
        assert found == list(range(8))
        calls.close()


class StandIn(BaseHTTPRequestHandler):
    """Plays a server of WebHDFS that is not at hand."""

    protocol_version = "HTTP/1.1"

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def served_by(handler: type[StandIn], options: str = "") -> Iterator[Store]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = open_store(f"webhdfs://127.0.0.1:{server.server_port}/runs{options}")
        try:
            yield store
        finally:
            server.shutdown()
            store.close()


class Gateway(StandIn):
    """HttpFS, whose jars are not at hand: passes on all but the options of renames."""

    namenode: str

    def pass_on(self) -> None:
        parts = urlsplit(self.path)
        query = urlencode([(k, v) for k, v in parse_qsl(parts.query) if k != "renameoptions"])
        answer = requests.request(
            self.command, f"{self.namenode}{parts.path}?{query}", allow_redirects=False
        )
        passed = set(answer.headers) & {"Location", "Content-Type"}
        headers = {name: answer.headers[name] for name in passed}
        self.answer(answer.status_code, answer.content, **headers)

    do_GET = do_PUT = do_DELETE = pass_on


def test_a_gateway_that_drops_the_options_of_renames_is_refused(hdfs_cluster: HdfsCluster) -> None:
    Gateway.namenode = f"http://127.0.0.1:{hdfs_cluster.http_port}"
    with served_by(Gateway) as store:
        for put in (store.put, store.put_if_absent):
            with pytest.raises(StoreError, match="renameoptions"):
                put("a", memoryview(b"x"))


class KeepsConnections(StandIn):
    """A DataNode behind a proxy that leaves connections open: nothing follows the last byte."""

    content: bytes
    kept: bytes

    def do_GET(self) -> None:
        parameters = dict(parse_qsl(urlsplit(self.path).query))
        if parameters["op"] == "GETFILESTATUS":
            status = {"type": "FILE", "length": len(self.content), "modificationTime": 0}
            self.answer(200, json.dumps({"FileStatus": status}).encode())
        elif "datanode" in parameters:
            self.answer(200, self.kept)
        else:
            here = f"http://{self.headers['Host']}"
            self.answer(307, b"", Location=f"{here}{self.path}&datanode=1")


@pytest.mark.parametrize("pieces", [0, 1, 2])
@pytest.mark.parametrize("more", [-1, 0, 1, WAKING_NBYTES - 1, WAKING_NBYTES, WAKING_NBYTES + 1])
def test_no_read_waits_for_more_than_there_is(pieces: int, more: int) -> None:
    nbytes = max(0, pieces * PIECE_NBYTES + more)
    KeepsConnections.content = KeepsConnections.kept = os.urandom(nbytes)
    with served_by(KeepsConnections, "?retries=0&timeout_s=8") as store:
        found = bytearray(nbytes)
        store.get_range("a", 0, memoryview(found))
        assert found == KeepsConnections.content


@pytest.mark.parametrize("kept", [0, 1, PIECE_NBYTES])
def test_a_body_that_is_too_short_is_an_error(kept: int) -> None:
    KeepsConnections.content, KeepsConnections.kept = bytes(2 * PIECE_NBYTES), bytes(kept)
    with (
        served_by(KeepsConnections, "?retries=0&timeout_s=8") as store,
        pytest.raises(StoreUnavailableError, match=f"only {kept} of"),
    ):
        store.get_range("a", 0, memoryview(bytearray(2 * PIECE_NBYTES)))
