"""What the stand-in for Google Cloud Storage does with one HTTP request."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from servers.gcs_errors import Refusal, malformed, not_found, on_demand
from servers.gcs_multipart import parts_of
from servers.gcs_objects import CHUNK_NBYTES, Conditions, Object, Upload, check_name, number

if TYPE_CHECKING:
    from servers.gcs import Fault, GcsServer

MAX_PAGE_SIZE = 1000
_PIECE_NBYTES = 1 << 20

_CONDITIONS = frozenset(
    {
        "ifGenerationMatch",
        "ifGenerationNotMatch",
        "ifMetagenerationMatch",
        "ifMetagenerationNotMatch",
    }
)
_COMMON = frozenset({"alt", "prettyPrint", "projection", "quotaUser", "userProject"})
# TensorStore adds a number to each read, against caches; Google ignores it.
_GET = _COMMON | _CONDITIONS | {"generation", "tensorstore"}
_DELETE = _COMMON | _CONDITIONS | {"generation"}
_LIST = _COMMON | {"prefix", "delimiter", "startOffset", "endOffset", "maxResults", "pageToken"}
_INSERT = _COMMON | _CONDITIONS | {"uploadType", "name"}
_RESUME = _COMMON | _CONDITIONS | {"uploadType", "name", "upload_id"}


class Reset(Exception):
    """The connection is to be reset now."""


@dataclass(slots=True)
class Request:
    """What came in, for tests to look at.

    Attributes:
        action: `get`, `list`, `insert`, `start`, `resume`, `cancel`, `delete` or `bucket`; empty
            if none.
        nbytes: how long the body was.
        status: what was answered; 0 while nothing was.
    """

    method: str
    target: str
    headers: dict[str, str]
    action: str = ""
    bucket: str = ""
    name: str = ""
    query: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0
    status: int = 0


@dataclass(slots=True)
class Answer:
    """What goes out."""

    status: int
    body: bytes | memoryview = b""
    headers: dict[str, str] = field(default_factory=dict)


class GcsHandler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "GcsStandIn"
    sys_version = ""
    disable_nagle_algorithm = True
    gcs: GcsServer  # set by the server, in a class of its own

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._serve
        raise AttributeError(name)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what `BaseHTTPRequestHandler` could not parse."""
        what = message or HTTPStatus(code).phrase
        self.gcs.record_violation(f"{what}: {getattr(self, 'requestline', '')[:200]}")
        self.close_connection = True
        self._send(_refused(malformed(what, status=code)))

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests look at `GcsServer.requests`."""

    def _serve(self) -> None:
        request = Request(
            self.command, self.path, {name.lower(): value for name, value in self.headers.items()}
        )
        self.gcs.record(request)
        try:
            answer = self._answer(request)
        except Reset:
            self.close_connection = True
            self.gcs.reset_connection(self.connection)
            return
        request.status = answer.status
        self._send(answer)

    def _answer(self, request: Request) -> Answer:
        try:
            act = _route(request)
        except Refusal as refusal:
            act = _answering(self._refuse(request, refusal))
        fault = self.gcs.next_fault(request)
        try:
            # Also of what is refused: who is cut off while sending may not hear why.
            body = self._read_body(request, fault)
            self.gcs.wait_latency()
            if fault and fault.reason:
                raise on_demand(fault.reason)
            self.gcs.authorize(request)
            answer = act(self.gcs, request, body)
        except Refusal as refusal:
            answer = self._refuse(request, refusal)
        return self._spoil(answer, fault)

    def _spoil(self, answer: Answer, fault: Fault | None) -> Answer:
        if fault and fault.retry_after_s is not None:
            answer.headers["Retry-After"] = str(fault.retry_after_s)
        if fault and fault.reset == "unanswered":
            raise Reset
        if fault and fault.reset == "response":
            self._send(answer, cut_after_nbytes=fault.after_nbytes)
            raise Reset
        return answer

    def _refuse(self, request: Request, refusal: Refusal) -> Answer:
        if refusal.violation:
            self.gcs.record_violation(
                f"{refusal.violation}: {request.method} {request.target[:200]}"
            )
        return _refused(refusal)

    def _read_body(self, request: Request, fault: Fault | None) -> bytearray:
        headers = request.headers
        if "transfer-encoding" in headers or "content-length" not in headers:
            if "transfer-encoding" in headers or request.method in ("POST", "PUT"):
                self.close_connection = True  # nobody knows where the body ends
                raise malformed("Content-Length is missing", "lengthRequired", 411)
            return bytearray()
        if not re.fullmatch("[0-9]+", headers["content-length"]):
            self.close_connection = True
            raise malformed("Content-Length is no number")
        request.nbytes = int(headers["content-length"])
        if fault and fault.reset == "request":
            self._read_exactly(min(fault.after_nbytes, request.nbytes))
            raise Reset
        return self._read_exactly(request.nbytes)

    def _read_exactly(self, nbytes: int) -> bytearray:
        body = bytearray(nbytes)
        with memoryview(body) as view:
            at = 0
            while at < nbytes:
                read = self.rfile.readinto(view[at : at + _PIECE_NBYTES])
                if not read:
                    raise ConnectionResetError("the client left in the middle of a body")
                at += read
        return body

    def _send(self, answer: Answer, cut_after_nbytes: int | None = None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(answer.body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:cut_after_nbytes])


def _refused(refusal: Refusal) -> Answer:
    headers = {"Content-Type": "application/json; charset=UTF-8"}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="https://accounts.google.com/"'
    return Answer(refusal.status, refusal.body(), headers)


_Action = Callable[["GcsServer", Request, bytearray], Answer]


def _answering(answer: Answer) -> _Action:
    return lambda gcs, request, body: answer


def _route(request: Request) -> _Action:
    """What to do, with bucket, name and query taken from the request."""
    parts = urlsplit(request.target)
    segments = parts.path.split("/")[1:]
    uploading, downloading = segments[:1] == ["upload"], segments[:1] == ["download"]
    match segments[1:] if uploading or downloading else segments:
        case ["storage", "v1", "b", bucket] if not (uploading or downloading):
            place = "bucket"
        case ["storage", "v1", "b", bucket, "o"] if not downloading:
            place = "upload" if uploading else "objects"
        case ["storage", "v1", "b", bucket, "o", name] if not uploading:
            place = "object"
            request.name = check_name(_decoded(name))
        case _:
            raise malformed("No such path", "notFound", 404)
    request.bucket = _decoded(bucket)
    request.query = _query(parts.query)
    chosen = _choose(request, place)
    if chosen is None:
        raise malformed(f"No such method for {place}", "methodNotAllowed", 405)
    request.action, allowed, act = chosen
    if unknown := request.query.keys() - allowed:
        raise malformed(f"Unknown parameter {sorted(unknown)}", "invalidParameter")
    if "name" in request.query:
        request.name = check_name(request.query["name"])
    return act


def _choose(request: Request, place: str) -> tuple[str, frozenset[str], _Action] | None:
    if place == "upload":
        return _choose_upload(request)
    return {
        ("bucket", "GET"): ("bucket", _COMMON, _bucket),
        ("objects", "GET"): ("list", _LIST, _list),
        ("object", "GET"): ("get", _GET, _get),
        ("object", "DELETE"): ("delete", _DELETE, _delete),
    }.get((place, request.method))


def _choose_upload(request: Request) -> tuple[str, frozenset[str], _Action] | None:
    kind = request.query.get("uploadType")
    if kind not in ("media", "multipart", "resumable"):
        raise malformed(f"uploadType {kind!r} is unknown", "invalidParameter")
    if kind != "resumable":
        insert = _insert if kind == "media" else _insert_parts
        return ("insert", _INSERT, insert) if request.method == "POST" else None
    if "upload_id" not in request.query:
        return ("start", _INSERT, _start) if request.method == "POST" else None
    resume = ("resume", _RESUME, _resume)
    return {
        "PUT": resume,
        "POST": resume,  # not documented; Google takes it, and gcsfs sends it
        "DELETE": ("cancel", _RESUME, _cancel),
    }.get(request.method)


def _decoded(text: str) -> str:
    return unquote(text, errors="surrogateescape")


def _query(text: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text), errors="strict")
    except ValueError:
        raise malformed("The query cannot be parsed", "invalidParameter") from None
    query = dict(pairs)
    if len(query) < len(pairs):
        raise malformed("A parameter is given twice", "invalidParameter")
    return query


def _alt(request: Request, *known: str) -> str:
    alt = request.query.get("alt", "json")
    if alt not in known:
        raise malformed(f"alt={alt!r} is unknown here", "invalidAltValue")
    return alt


def _json(document: dict[str, object]) -> Answer:
    return Answer(
        200, json.dumps(document).encode(), {"Content-Type": "application/json; charset=UTF-8"}
    )


def _get(gcs: GcsServer, request: Request, body: bytearray) -> Answer:
    _check_empty(body)
    alt = _alt(request, "json", "media")
    found = gcs.objects.get(
        request.bucket,
        request.name,
        number(request.query, "generation"),
        Conditions.of(request.query),
    )
    if alt == "json":
        answer = _json(found.resource(request.bucket))
        answer.headers["ETag"] = found.etag
        return answer
    return _media(found, request.headers.get("range"))


def _media(found: Object, wanted: str | None) -> Answer:
    nbytes = len(found.content)
    headers = {
        "Content-Type": found.content_type,
        "Last-Modified": formatdate(found.created.timestamp(), usegmt=True),
        "ETag": found.etag,
        "Accept-Ranges": "bytes",
        "X-Goog-Generation": str(found.generation),
        "X-Goog-Metageneration": str(found.metageneration),
        "X-Goog-Hash": f"crc32c={found.crc32c},md5={found.md5}",
        "X-Goog-Storage-Class": "STANDARD",
        "X-Goog-Stored-Content-Encoding": "identity",
        "X-Goog-Stored-Content-Length": str(nbytes),
    }
    if wanted is None:
        return Answer(200, memoryview(found.content), headers)
    span = _range(wanted, nbytes)
    if not span:
        refused = _refused(
            Refusal(416, "requestedRangeNotSatisfiable", "Request range not satisfiable")
        )
        refused.headers["Content-Range"] = f"bytes */{nbytes}"
        return refused
    headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{nbytes}"
    return Answer(206, memoryview(found.content)[span.start : span.stop], headers)


def _range(wanted: str, nbytes: int) -> range:
    """The bytes that `wanted` selects; empty if it cannot be satisfied."""
    parsed = re.fullmatch(r"bytes=([0-9]*)-([0-9]*)", wanted)
    if not parsed or parsed[0] == "bytes=-":
        raise malformed(f"Range {wanted[:80]!r} is not one range of bytes")
    first, last = parsed[1], parsed[2]
    if not first:
        return range(max(nbytes - int(last), 0), nbytes)
    if last and int(last) < int(first):
        raise malformed(f"Range {wanted[:80]!r} ends before it begins")
    return range(int(first), min(int(last) + 1, nbytes) if last else nbytes)


def _bucket(gcs: GcsServer, request: Request, body: bytearray) -> Answer:
    _check_empty(body)
    gcs.objects.check_bucket(request.bucket)
    return _json(
        {
            "kind": "storage#bucket",
            "id": request.bucket,
            "name": request.bucket,
            "storageClass": "STANDARD",
            "locationType": "region",
        }
    )


def _list(gcs: GcsServer, request: Request, body: bytearray) -> Answer:
    _check_empty(body)
    _alt(request, "json")
    asked = number(request.query, "maxResults")
    if asked == 0:
        raise malformed("maxResults is not positive", "invalidParameter")
    items, prefixes, token = gcs.objects.page(
        request.bucket, request.query, min(asked or gcs.page_size, gcs.page_size, MAX_PAGE_SIZE)
    )
    document: dict[str, object] = {"kind": "storage#objects"}
    if token:
        document["nextPageToken"] = token
    if prefixes:
        document["prefixes"] = prefixes
    if items:
        document["items"] = [item.resource(request.bucket) for item in items]
    return _json(document)


def _delete(gcs: GcsServer, request: Request, body: bytearray) -> Answer:
    _check_empty(body)
    gcs.objects.delete(
        request.bucket,
        request.name,
        number(request.query, "generation"),
        Conditions.of(request.query),
    )
    return Answer(204)


def _insert(gcs: GcsServer, request: Request, body: bytearray) -> Answer:
    _alt(request, "json")
    inserted = gcs.objects.insert(
        request.bucket,
        _required(request.name),
        body,
        request.headers.get("content-type", "application/octet-stream"),
        Conditions.of(request.query),
    )
    return _json(inserted.resource(request.bucket))


def _insert_parts(gcs: GcsServer, request: Request, body: bytearray) -> Answer:
    _alt(request, "json")
    metadata_part, type_of_part, content = parts_of(request.headers.get("content-type", ""), body)
    metadata = _metadata(request, metadata_part)
    request.name = check_name(_required(metadata.get("name", request.name)))
    inserted = gcs.objects.insert(
        request.bucket,
        request.name,
        content,
        metadata.get("contentType", type_of_part),
        Conditions.of(request.query),
    )
    return _json(inserted.resource(request.bucket))


def _start(gcs: GcsServer, request: Request, body: bytearray) -> Answer:
    _alt(request, "json")
    metadata = _metadata(request, body)
    upload = Upload(
        request.bucket,
        check_name(_required(metadata.get("name", request.name))),
        metadata.get("contentType")
        or request.headers.get("x-upload-content-type", "application/octet-stream"),
        Conditions.of(request.query),
        number(request.headers, "x-upload-content-length"),
    )
    upload_id = gcs.objects.start_upload(upload)
    location = (
        f"{gcs.url}/upload/storage/v1/b/{quote(request.bucket)}/o?uploadType=resumable"
        f"&name={quote(upload.name, safe='')}&upload_id={upload_id}"
    )
    return Answer(200, headers={"Location": location, "X-GUploader-UploadID": upload_id})


def _required(name: str) -> str:
    if not name:
        raise malformed("The parameter name is missing", "required")
    return name


def _metadata(request: Request, body: bytearray) -> dict[str, str]:
    if not body:
        return {}
    try:
        metadata = json.loads(body)
    except ValueError:
        raise malformed("The metadata is no JSON", "parseError") from None
    if not isinstance(metadata, dict) or metadata.keys() - {"name", "contentType"}:
        raise malformed("The stand-in knows only name and contentType as metadata", "invalid")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise malformed("Metadata is no string", "invalid")
    if request.name and metadata.get("name", request.name) != request.name:
        raise malformed("The parameter and the metadata disagree on the name", "invalidParameter")
    return metadata


def _resume(gcs: GcsServer, request: Request, body: bytearray) -> Answer:
    upload = _upload(gcs, request)
    first, total = _content_range(request, upload, len(body))
    with upload.lock:
        if upload.done:
            return _json(upload.done.resource(request.bucket))
        if upload.declared_nbytes not in (None, total) and total is not None:
            raise malformed("The upload has another length than was declared")
        if first is not None:
            _append(upload, body, first, total)
        if total is not None and len(upload.content) == total:
            return _json(gcs.objects.finish_upload(upload).resource(request.bucket))
        received = len(upload.content)
    return Answer(308, headers={"Range": f"bytes=0-{received - 1}"} if received else {})


def _append(upload: Upload, body: bytearray, first: int, total: int | None) -> None:
    if first != len(upload.content):
        raise malformed(f"The chunk starts at {first}, not at {len(upload.content)}")
    if first + len(body) != total and len(body) % CHUNK_NBYTES:
        raise malformed(f"A chunk that is not the last is no multiple of {CHUNK_NBYTES}")
    upload.content += body


def _content_range(request: Request, upload: Upload, nbytes: int) -> tuple[int | None, int | None]:
    """Where the chunk starts (None: there is none) and the length of the object, if known."""
    given = request.headers.get("content-range")
    if given is None:
        return 0, nbytes
    parsed = re.fullmatch(r"bytes (?:([0-9]+)-([0-9]+)|\*)/(?:([0-9]+)|\*)", given)
    if not parsed:
        raise malformed(f"Content-Range {given[:80]!r} cannot be parsed")
    total = int(parsed[3]) if parsed[3] else None
    if parsed[1] is None:
        if nbytes:
            raise malformed("A query of an upload's status has a body")
        return None, total
    first, last = int(parsed[1]), int(parsed[2])
    if last + 1 - first != nbytes or (total is not None and last >= total):
        raise malformed(f"Content-Range {given[:80]!r} does not fit the {nbytes} bytes sent")
    return first, total


def _cancel(gcs: GcsServer, request: Request, body: bytearray) -> Answer:
    _check_empty(body)
    _upload(gcs, request).cancelled = True
    return Answer(499)


def _upload(gcs: GcsServer, request: Request) -> Upload:
    upload = gcs.objects.upload(request.query["upload_id"])
    if (request.bucket, request.name or upload.name) != (upload.bucket, upload.name):
        raise not_found("No such upload session")
    return upload


def _check_empty(body: bytearray) -> None:
    if body:
        raise malformed("The request has a body")
