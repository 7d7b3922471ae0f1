"""`gs://` and `s3://` against servers that speak their protocols."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from object_urls import address, gs_url, s3_url
from servers.gcs import TOKEN, GcsServer
from servers.proxy import HttpProxy, Proxy
from servers.s3 import S3Server
from servers.seaweed import SeaweedServer

from asymcheck.errors import (
    ObjectNotFoundError,
    ShortReadError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreUnavailableError,
)
from asymcheck.stores import Store, http_answers, open_store
from asymcheck.testing import StoreContract

DATA = memoryview(bytes(range(256)) * 2000)  # half a megabyte
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.fixture
def proxy(request: pytest.FixtureRequest) -> Iterator[HttpProxy]:
    """In front of the server of the test, `s3_server` or `gcs_server`."""
    server = next(
        request.getfixturevalue(name)
        for name in ("s3_server", "gcs_server")
        if name in request.fixturenames
    )
    with HttpProxy(address(server.url)) as proxy:
        yield proxy


@pytest.fixture(params=["gs", "s3"])
def remote(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Callable[..., Store], HttpProxy]]:
    """A function that opens a store of each kind (its arguments are options), through a proxy."""
    gs = request.param == "gs"
    server = request.getfixturevalue("gcs_server" if gs else "s3_server")
    with HttpProxy(address(server.url)) as proxy:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", proxy.url)

        def opened(**options: object) -> Store:
            options = {"retries": 3} | options
            if gs:
                return open_store(gs_url(server, **options))
            return open_store(s3_url(server, endpoint=proxy.url, **options))

        yield opened, proxy


Remote = tuple[Callable[..., Store], HttpProxy]


class TestGcs(StoreContract):
    large_nbytes = (8 << 20) + 1

    @pytest.fixture
    def open_store(self, gcs_server: GcsServer) -> Callable[[], Store]:
        return lambda: open_store(gs_url(gcs_server))


class TestGcsBucketAlone(StoreContract):
    large_nbytes = (1 << 20) + 1

    @pytest.fixture
    def open_store(self, gcs_server: GcsServer) -> Callable[[], Store]:
        return lambda: open_store(f"gs://{gcs_server.bucket}")


class TestS3(StoreContract):
    large_nbytes = (8 << 20) + 1

    @pytest.fixture
    def open_store(self, s3_server: S3Server) -> Callable[[], Store]:
        return lambda: open_store(s3_url(s3_server))


class TestSeaweedFs(StoreContract):
    large_nbytes = (8 << 20) + 1

    @pytest.fixture
    def open_store(self, seaweed_server: SeaweedServer) -> Callable[[], Store]:
        return lambda: open_store(s3_url(seaweed_server))


class TestPrefixes:
    @pytest.mark.parametrize("prefix", ["a b", "lr=0.1/x", "a+b", "ü/é", "a%2520b", "x,y@z!'()*;:"])
    def test_any_name_goes(self, remote: Remote, prefix: str, request: pytest.FixtureRequest):
        kind = request.node.callspec.params["remote"]
        server = request.getfixturevalue("gcs_server" if kind == "gs" else "s3_server")
        url = {"gs": gs_url, "s3": s3_url}[kind](server, prefix)
        store = open_store(url)
        store.put("d/k", memoryview(prefix.encode()))
        assert open_store(store.url).get("d/k", 100) == prefix.encode()
        assert store.list("") == store.list("d/") == ["d/k"]
        bucket = open_store(url.replace(f"/{prefix}", ""))
        assert not bucket.has_length("d/k", len(prefix.encode()))

    def test_places_beside_each_other_do_not_meet(self, remote: Remote) -> None:
        opened, _ = remote
        store = opened()
        store.put("k", DATA)
        for url in (store.url.replace("runs/a", "runs/a2"), store.url.replace("runs/a", "runs")):
            assert not open_store(url).has_length("k", len(DATA))
        assert open_store(store.url.replace("runs/a", "runs")).list("") == ["a/k"]


def test_a_store_goes_where_the_environment_says_when_it_is_opened(
    gcs_server: GcsServer, proxy: HttpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not where another one of the same URL went, which is still open."""
    before = open_store(gs_url(gcs_server))
    before.put("k", DATA)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", proxy.url)
    assert open_store(gs_url(gcs_server)).list("") == before.list("") == ["k"]
    assert len(proxy.requests) == 1


class TestRequests:
    """Each request costs its latency and its price."""

    def test_as_few_as_possible(self, remote: Remote) -> None:
        opened, proxy = remote
        store = opened()
        expected = {
            (lambda: store.put("k", DATA[:9])): 1,
            (lambda: store.put_if_absent("c", DATA[:9])): 1,
            (lambda: store.get("k", 9)): 2,
            (lambda: store.get("k", 100)): 2,
            (lambda: store.get_range("k", 1, memoryview(bytearray(8)))): 1,
            (lambda: store.has_length("k", 9)): 2,
            (lambda: store.list("")): 1,
            (lambda: store.delete("k", "c", "never")): 3,
        }
        for operation, count in expected.items():
            before = len(proxy.requests)
            operation()
            assert len(proxy.requests) - before == count, proxy.requests[before:]

    def test_a_missing_object_is_one(self, remote: Remote) -> None:
        opened, proxy = remote
        store = opened()
        with pytest.raises(ObjectNotFoundError):
            store.get("k", 9)
        assert len(proxy.requests) == 1

    def test_conditions_travel_with_the_upload(self, gcs_server: GcsServer) -> None:
        store = open_store(gs_url(gcs_server))
        assert store.put_if_absent("k", DATA)
        assert not store.put_if_absent("k", DATA[:5])
        first, second = [r for r in gcs_server.requests if r.action == "insert"]
        assert first.query["ifGenerationMatch"] == second.query["ifGenerationMatch"] == "0"
        assert (first.status, second.status) == (200, 412)

    def test_no_look_before_a_conditional_upload(
        self, s3_server: S3Server, proxy: HttpProxy
    ) -> None:
        store = open_store(s3_url(s3_server, endpoint=proxy.url))
        assert store.put_if_absent("k", DATA)
        assert not store.put_if_absent("k", DATA[:5])
        put = f"PUT /{s3_server.bucket}/runs/a/k"
        assert proxy.requests[:2] == [put, put]

    def test_removals_go_side_by_side(
        self, gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = open_store(gs_url(gcs_server))
        keys = [f"d/{n}" for n in range(40)]
        for key in keys:
            store.put(key, DATA[:1])
        eight_at_once = threading.Barrier(8)
        with monkeypatch.context() as patch:
            patch.setattr(gcs_server, "wait_latency", lambda: eight_at_once.wait(30))
            store.delete(*keys)
        assert store.list("") == []


class TestRetries:
    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
    def test_passing_failures_pass(self, remote: Remote, status: int) -> None:
        opened, proxy = remote
        store = opened(retries=2)
        for operation in (
            lambda: store.put("k", DATA),
            lambda: store.put_if_absent("c", DATA),
            lambda: store.get("k", len(DATA)),
            lambda: store.list(""),
            lambda: store.delete("c"),
        ):
            proxy.answer(status, times=2)
            operation()
        assert store.get("k", len(DATA)) == bytes(DATA)
        assert store.list("") == ["k"]

    @pytest.mark.parametrize("status", [408, 429, 500, 503])
    def test_lasting_failures_are_told(self, remote: Remote, status: int) -> None:
        opened, proxy = remote
        store = opened(retries=2)
        proxy.answer(status, times=None)
        for operation in (
            lambda: store.put("k", DATA),
            lambda: store.put_if_absent("k", DATA),
            lambda: store.get("k", 9),
            lambda: store.has_length("k", 9),
            lambda: store.delete("k"),
        ):
            with pytest.raises(StoreUnavailableError, match=str(status)) as raised:
                operation()
            assert raised.value.object == "k"
            assert raised.value.hint
        before = len(proxy.requests)
        with pytest.raises(StoreUnavailableError, match="2 retry attempts"):
            store.list("")
        assert len(proxy.requests) - before == 3

    def test_no_retries_if_so_wished(self, remote: Remote) -> None:
        opened, proxy = remote
        proxy.answer(503, times=1)
        with pytest.raises(StoreUnavailableError):
            opened(retries=0).put("k", DATA)


class TestConnections:
    @pytest.mark.parametrize("after_nbytes", [0, 10, 2000, 300_000])
    def test_an_upload_that_is_cut_is_sent_again(self, remote: Remote, after_nbytes: int) -> None:
        opened, proxy = remote
        store = opened()
        proxy.cut("up", after_nbytes=after_nbytes, times=2)
        store.put("k", DATA)
        assert store.get("k", len(DATA)) == bytes(DATA)

    @pytest.mark.parametrize("after_nbytes", [1, 2000, 300_000])
    def test_a_download_that_is_cut_is_asked_again(self, remote: Remote, after_nbytes: int) -> None:
        opened, proxy = remote
        opened().put("k", DATA)
        proxy.drop()
        proxy.cut("down", after_nbytes=after_nbytes, times=2)
        out = bytearray(len(DATA))
        opened().get_range("k", 0, memoryview(out))
        assert out == DATA

    def test_no_part_of_an_upload_is_ever_an_object(self, remote: Remote) -> None:
        opened, proxy = remote
        store = opened(retries=1)
        for after_nbytes in (10, 2000, 300_000, len(DATA) - 1):
            for put in (store.put, store.put_if_absent):
                proxy.drop()
                proxy.cut("up", after_nbytes=after_nbytes, times=None)
                with pytest.raises(StoreUnavailableError, match="CURL error") as raised:
                    put("k", DATA)
                assert raised.value.object == "k"
                proxy.heal()
                assert store.list("") == []

    def test_no_part_of_a_download_is_ever_taken_for_whole(self, remote: Remote) -> None:
        opened, proxy = remote
        store = opened(retries=1)
        store.put("k", DATA)
        for after_nbytes in (1, 2000, 300_000):
            proxy.drop()
            proxy.cut("down", after_nbytes=after_nbytes, times=None)
            for read in (
                lambda: store.get("k", len(DATA)),
                lambda: store.get_range("k", 0, memoryview(bytearray(len(DATA)))),
            ):
                with pytest.raises(StoreUnavailableError):
                    read()
            proxy.heal()

    def test_a_lost_answer_to_a_conditional_put(self, remote: Remote) -> None:
        """The object is there, and the repeated request is told that it is: False."""
        opened, proxy = remote
        store = opened()
        proxy.cut("down", after_nbytes=1)
        assert store.put_if_absent("k", DATA) is False
        assert store.get("k", len(DATA)) == bytes(DATA)

    def test_a_lost_answer_to_a_removal(self, remote: Remote) -> None:
        opened, proxy = remote
        store = opened()
        store.put("k", DATA)
        proxy.drop()
        proxy.cut("down", after_nbytes=1)
        store.delete("k")
        assert store.list("") == []

    def test_a_store_that_never_answers(self, remote: Remote) -> None:
        opened, proxy = remote
        store = opened(timeout_s=0.3)
        proxy.swallow(times=None)
        for operation in (
            lambda: store.put("k", DATA),
            lambda: store.put_if_absent("k", DATA),
            lambda: store.get("k", 9),
            lambda: store.get_range("k", 0, memoryview(bytearray(9))),
            lambda: store.has_length("k", 9),
            lambda: store.delete("k"),
            lambda: store.list("k/"),
        ):
            with pytest.raises(StoreUnavailableError, match=r"timeout_s.*0\.3 s") as raised:
                operation()
            assert raised.value.object in ("k", "k/")
        proxy.heal()
        proxy.drop()
        opened().put("k", DATA)

    def test_retries_end_with_the_time(self, remote: Remote) -> None:
        opened, proxy = remote
        proxy.answer(503, times=None)
        with pytest.raises(StoreUnavailableError, match="timeout_s"):
            opened(retries=10_000, timeout_s=0.3).put("k", DATA)

    def test_a_server_that_is_away_for_a_while(self, remote: Remote) -> None:
        opened, proxy = remote
        store = opened(retries=1)
        proxy.refuse()
        with pytest.raises(StoreUnavailableError, match=r"connect.*Check the network"):
            store.put("k", DATA)
        proxy.heal()
        store.put("k", DATA)

    def test_a_host_that_nobody_knows(self) -> None:
        url = (
            "s3://bucket/a?endpoint=http://nowhere.invalid&region=r&credentials=anonymous&retries=1"
        )
        with pytest.raises(StoreUnavailableError, match="Could not resolve") as raised:
            open_store(url).get("k", 1)
        assert raised.value.object == "k"


class TestBuckets:
    def missing(self, store: Store) -> Store:
        return open_store(store.url.replace("bucket-of", "no-bucket-of"))

    def test_a_missing_bucket(self, remote: Remote) -> None:
        opened, _ = remote
        store = self.missing(opened())
        for operation in (
            lambda: store.list(""),
            lambda: store.put("k", DATA),
            lambda: store.put_if_absent("k", DATA),
        ):
            with pytest.raises(StoreError, match=r"bucket.*Create the bucket") as raised:
                operation()
            assert type(raised.value) is StoreError
        with pytest.raises(ObjectNotFoundError):
            store.get("k", 1)
        assert not store.has_length("k", 1)

    def test_a_missing_bucket_of_google_is_not_an_empty_one(self, gcs_server: GcsServer) -> None:
        """TensorStore lists nothing, without an error."""
        store = self.missing(open_store(gs_url(gcs_server)))
        with pytest.raises(StoreError, match=r"HTTP 404.*Create the bucket"):
            store.list("")

    def test_a_loser_that_comes_too_late_to_see_the_winner(self, remote: Remote) -> None:
        """False stays False when the object is removed right after."""
        opened, proxy = remote
        store = opened()
        proxy.answer(412)
        assert store.put_if_absent("k", DATA) is False


def s3_error(code: str, message: str = "no") -> bytes:
    return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


def gcs_error(code: int, reason: str, message: str = "no") -> bytes:
    error = {"code": code, "message": message, "errors": [{"reason": reason, "message": message}]}
    return json.dumps({"error": error}).encode()


S3_ERRORS = [
    (403, "AccessDenied", StorePermissionError, "may not do this"),
    (400, "ExpiredToken", StorePermissionError, "expired: renew them"),
    (403, "InvalidAccessKeyId", StorePermissionError, "wrong or expired"),
    (403, "SignatureDoesNotMatch", StorePermissionError, "wrong or expired"),
    (403, "QuotaExceeded", StoreFullError, "Free space"),
    (400, "XMinioAdminBucketQuotaExceeded", StoreFullError, "Free space"),
    (507, "XMinioStorageFull", StoreFullError, "Free space"),
    (429, "TooManyRequests", StoreUnavailableError, "later"),
    (503, "SlowDown", StoreUnavailableError, "later"),
    (503, "XMinioServerNotInitialized", StoreUnavailableError, "later"),
    (404, "NoSuchBucket", StoreError, "Create the bucket"),
    (301, "PermanentRedirect", StoreError, "option region"),
    (400, "AuthorizationHeaderMalformed", StoreError, "option region"),
    (501, "NotImplemented", StoreUnavailableError, "later"),
]
GCS_ERRORS = [
    ("authError", StorePermissionError, "expired: renew them"),
    ("forbidden", StorePermissionError, "may not do this"),
    ("quotaExceeded", StoreFullError, "Free space"),
    ("uploadBrokenConnection", StoreUnavailableError, "later"),
    ("rateLimitExceeded", StoreUnavailableError, "later"),
    ("internalError", StoreUnavailableError, "later"),
    ("backendError", StoreUnavailableError, "later"),
]


class TestRefusals:
    @pytest.mark.parametrize(("status", "code", "kind", "hint"), S3_ERRORS)
    def test_of_s3(
        self,
        s3_server: S3Server,
        proxy: HttpProxy,
        status: int,
        code: str,
        kind: type[StoreError],
        hint: str,
    ) -> None:
        store = open_store(s3_url(s3_server, endpoint=proxy.url, retries=1))
        proxy.answer(status, body=s3_error(code), times=None)
        with pytest.raises(StoreError, match=f"{code}.*HTTP {status}.*{hint}") as raised:
            store.put("k", DATA)
        assert type(raised.value) is kind
        assert raised.value.object == "k"
        assert store.url in str(raised.value)
        with pytest.raises(kind):
            store.list("")

    @pytest.mark.parametrize(("reason", "kind", "hint"), GCS_ERRORS)
    def test_of_gcs(
        self, gcs_server: GcsServer, reason: str, kind: type[StoreError], hint: str
    ) -> None:
        store = open_store(gs_url(gcs_server, retries=1))
        for attempt in (
            lambda: store.put("k", DATA),
            lambda: store.put_if_absent("k", DATA),
            lambda: store.get("k", 1),
            lambda: store.delete("k"),
        ):
            gcs_server.fail(reason, times=None)
            with pytest.raises(StoreError, match=hint) as raised:
                attempt()
            assert type(raised.value) is kind
            assert raised.value.object == "k"
            gcs_server.heal()
        gcs_server.fail(reason, times=None)
        with pytest.raises(StoreError):
            store.list("")

    def test_a_full_store_keeps_what_it_has(self, gcs_server: GcsServer) -> None:
        store = open_store(gs_url(gcs_server))
        store.put("good", DATA)
        gcs_server.fail("quotaExceeded", action="insert", times=None)
        with pytest.raises(StoreFullError):
            store.put("k", DATA)
        assert store.list("") == ["good"]
        assert store.get("good", len(DATA)) == bytes(DATA)

    def test_credentials_that_are_not_there(
        self, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in s3_server.environment:
            monkeypatch.delenv(name)
        for source in ("environment", "profile:nobody-of-this-name"):
            with pytest.raises(StorePermissionError, match="missing, wrong or expired"):
                open_store(s3_url(s3_server, credentials=source)).list("")

    def test_credentials_that_are_wrong(
        self, seaweed_server: SeaweedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The server checks signatures, as Amazon's does."""
        store = open_store(s3_url(seaweed_server))
        store.put("k", DATA)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        intruder = open_store(s3_url(seaweed_server))
        for attempt in (
            lambda: intruder.put("k", DATA[:1]),
            lambda: intruder.get("k", len(DATA)),
            lambda: intruder.list(""),
            lambda: intruder.delete("k"),
        ):
            with pytest.raises(StorePermissionError, match="wrong or expired") as raised:
                attempt()
            assert SECRET not in str(raised.value)
        assert store.get("k", len(DATA)) == DATA

    def test_a_bucket_that_is_not_there(self, seaweed_server: SeaweedServer) -> None:
        store = open_store(s3_url(seaweed_server).replace(seaweed_server.bucket, "no-such-bucket"))
        with pytest.raises(StoreError, match="NoSuchBucket"):
            store.list("")

    def test_a_failed_removal_does_not_keep_the_others(self, gcs_server: GcsServer) -> None:
        store = open_store(gs_url(gcs_server))
        for key in ("a", "b", "c"):
            store.put(key, DATA[:1])
        gcs_server.fail("forbidden", action="delete", name="b$")
        with pytest.raises(StorePermissionError) as raised:
            store.delete("a", "b", "c")
        assert raised.value.object == "b"
        assert store.list("") == ["b"]

    def test_a_range_that_the_server_does_not_give(
        self, s3_server: S3Server, proxy: HttpProxy
    ) -> None:
        store = open_store(s3_url(s3_server, endpoint=proxy.url))
        proxy.answer(200, headers={"ETag": '"x"'}, body=bytes(20))
        with pytest.raises(StoreError, match=r"ignored by server.*Content-Encoding"):
            store.get_range("k", 5, memoryview(bytearray(5)))
        short = {"ETag": '"x"', "Content-Range": "bytes 5-7/8"}
        proxy.answer(206, headers=short, body=bytes(3))
        with pytest.raises(ShortReadError) as raised:
            store.get_range("k", 5, memoryview(bytearray(5)))
        assert (raised.value.object, raised.value.offset) == ("k", 5)


class TestRefusedListings:
    """TensorStore's `gcs` driver takes a refused page of a listing for the last one."""

    @pytest.mark.parametrize("status", [301, 400, 401, 402, 403, 407, 410, 413])
    @pytest.mark.parametrize("page", [1, 2])
    def test_no_list_ends_early(
        self, gcs_server: GcsServer, proxy: HttpProxy, monkeypatch: pytest.MonkeyPatch,
        status: int, page: int,
    ) -> None:  # fmt: skip
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", proxy.url)
        store = open_store(gs_url(gcs_server))
        keys = sorted(f"k{n}" for n in range(gcs_server.page_size + 1))
        for key in keys:
            store.put(key, DATA[:1])
        server = _RefusingPages(proxy, page, status)
        with server, pytest.raises(StoreError, match="may lack objects") as raised:
            store.list("")
        assert isinstance(raised.value, StorePermissionError) == (status in (401, 403))
        if status not in (402, 407, 413):  # which TensorStore does not tell apart
            assert f"HTTP {status}" in str(raised.value)
        assert store.list("") == keys

    def test_a_refusal_that_passes_costs_another_listing(self, gcs_server: GcsServer) -> None:
        store = open_store(gs_url(gcs_server))
        store.put("k", DATA)
        gcs_server.fail("authError", action="list")
        assert store.list("") == ["k"]

    def test_nothing_is_believed_without_the_counts(
        self, gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As if TensorStore no longer had them: they are experimental."""
        monkeypatch.setattr(http_answers, "_COUNTS", "/tensorstore/none")
        with pytest.raises(StoreError, match="may lack objects"):
            open_store(gs_url(gcs_server)).list("")

    def test_what_other_threads_find_missing_is_no_refusal(self, gcs_server: GcsServer) -> None:
        store = open_store(gs_url(gcs_server))
        stop = threading.Event()

        def look() -> None:
            while not stop.is_set():
                assert not store.has_length("k", 1)
                assert not store.has_length("other", len(DATA) + 1)

        store.put("other", DATA)
        with ThreadPoolExecutor(2) as pool:
            looking = [pool.submit(look) for _ in range(2)]
            try:
                for _ in range(50):
                    assert store.list("none/") == []
                    assert store.list("") == ["other"]
            finally:
                stop.set()
            for thread in looking:
                thread.result()


class _RefusingPages:
    """While it lasts, that page of every listing of Google's kind is refused by the proxy."""

    def __init__(self, proxy: HttpProxy, page: int, status: int) -> None:
        self._proxy = proxy
        self._page = page
        self._status = status

    def __enter__(self) -> None:
        self._proxy.drop()
        for _ in range(3):  # listings
            for _ in range(self._page - 1):
                self._proxy.answer(200, body=_PAGE)
            self._proxy.answer(self._status, body=gcs_error(self._status, "invalid"))

    def __exit__(self, *exception: object) -> None:
        self._proxy.heal()


_PAGE = json.dumps({"items": [{"name": "runs/a/k0", "size": "1"}], "nextPageToken": "x"}).encode()


class TestSecrets:
    """Servers and proxies that quote what they were sent, secrets included."""

    QUOTES = (
        f"secret {SECRET}",
        f"Authorization: Bearer {TOKEN}",
        "Authorization: AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20260101/r/s3/aws4,"
        f" SignedHeaders=host, Signature={SECRET}",
        f"GET https://bucket/k?X-Amz-Signature={SECRET}&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE",
        f"http://key:{SECRET}@host/",
        f"x-amz-security-token: {SECRET}",
    )

    @pytest.mark.parametrize("quoted", QUOTES)
    @pytest.mark.parametrize("status", [400, 401, 403, 404, 500, 507])
    def test_never_show(
        self,
        remote: Remote,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
        quoted: str,
        status: int,
    ) -> None:
        caplog.set_level(logging.DEBUG)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET[::-1])
        opened, proxy = remote
        store = opened(retries=1)
        xml = s3_error("InvalidRequest", quoted.replace("&", "&amp;"))
        bodies = [xml, gcs_error(status, "invalid", quoted), quoted.encode()]
        for body in bodies:
            proxy.answer(status, body=body, headers={"x-amzn-requestid": quoted}, times=None)
            with pytest.raises(StoreError) as raised:
                store.put("k", DATA)
            shown = "".join(traceback.format_exception(raised.value)) + repr(vars(raised.value))
            shown += caplog.text + "".join(capfd.readouterr())
            for secret in (SECRET, SECRET[::-1], TOKEN, "AKIAIOSFODNN7EXAMPLE"):
                assert secret not in shown
            assert f"HTTP {status}" in shown
            proxy.heal()

    def test_what_helps_is_kept(self, s3_server: S3Server, proxy: HttpProxy) -> None:
        message = (
            "User: arn:aws:iam::123456789012:user/me is not authorized to perform: s3:PutObject"
        )
        proxy.answer(403, body=s3_error("AccessDenied", message))
        with pytest.raises(StorePermissionError, match=f"AccessDenied: {message}"):
            open_store(s3_url(s3_server, endpoint=proxy.url)).put("k", DATA)


def test_uploads_wait_for_each_other_beyond_the_concurrency(
    s3_server: S3Server, proxy: HttpProxy
) -> None:
    """One at a time, the answers' latencies add up."""
    store = open_store(s3_url(s3_server, endpoint=proxy.url, concurrency=1))
    proxy.latency_s = 0.05
    begun_s = time.monotonic()
    store.delete(*(f"k{n}" for n in range(8)))
    assert time.monotonic() - begun_s >= 8 * proxy.latency_s


def test_options_reach_tensorstore_only(s3_server: S3Server) -> None:
    """The region is asked of the server when it is not given, at the first use."""
    with Proxy(address(s3_server.url)) as proxy:
        store = open_store(f"s3://{s3_server.bucket}/a?endpoint={proxy.url}")
        store.put("k", DATA)
        assert store.get("k", len(DATA)) == bytes(DATA)
        with contextlib.suppress(StoreError):
            store.delete("k")
