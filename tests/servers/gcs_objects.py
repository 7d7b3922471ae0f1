"""Buckets, objects, generations, listings and upload sessions, as Google documents them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import struct
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import crc32c

from servers.gcs_errors import Refusal, condition_not_met, malformed, not_found, not_modified

MAX_NAME_NBYTES = 1024
CHUNK_NBYTES = 256 << 10  # all chunks of a resumable upload but the last are multiples of this


@dataclass(frozen=True, slots=True)
class Object:
    """One generation of an object."""

    name: str
    content: bytes | bytearray
    content_type: str
    generation: int
    created: datetime
    md5: str
    crc32c: str
    metageneration: int = 1

    def resource(self, bucket: str) -> dict[str, object]:
        """Its metadata as JSON; numbers of 64 bits are strings."""
        created = self.created.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{self.name}/{self.generation}",
            "name": self.name,
            "bucket": bucket,
            "generation": str(self.generation),
            "metageneration": str(self.metageneration),
            "contentType": self.content_type,
            "storageClass": "STANDARD",
            "size": str(len(self.content)),
            "md5Hash": self.md5,
            "crc32c": self.crc32c,
            "etag": self.etag,
            "timeCreated": created,
            "updated": created,
        }

    @property
    def etag(self) -> str:
        """Changes with the generation and the metageneration."""
        return base64.b64encode(struct.pack("<QI", self.generation, self.metageneration)).decode()


@dataclass(frozen=True, slots=True)
class Conditions:
    """What must hold of the live generation; generation 0 stands for "there is none"."""

    generation_match: int | None = None
    generation_not_match: int | None = None
    metageneration_match: int | None = None
    metageneration_not_match: int | None = None

    @staticmethod
    def of(query: Mapping[str, str]) -> Conditions:
        """Those of a request's query."""
        return Conditions(
            *(
                number(query, name)
                for name in (
                    "ifGenerationMatch",
                    "ifGenerationNotMatch",
                    "ifMetagenerationMatch",
                    "ifMetagenerationNotMatch",
                )
            )
        )

    def check(self, live: Object | None) -> None:
        """`Refusal` 412, or 304 where a negative condition does not hold."""
        generation = live.generation if live else 0
        metageneration = live.metageneration if live else 0
        if self.generation_match not in (None, generation):
            raise condition_not_met()
        if self.metageneration_match not in (None, metageneration):
            raise condition_not_met()
        if self.generation_not_match == generation:
            raise not_modified()
        if live and self.metageneration_not_match == metageneration:
            raise not_modified()

    def check_insert(self, live: Object | None) -> None:
        """As `check`; no live object also fails every `ifGenerationNotMatch`."""
        self.check(live)
        if live is None and self.generation_not_match is not None:
            raise not_modified()


@dataclass(slots=True)
class Upload:
    """A resumable upload."""

    bucket: str
    name: str
    content_type: str
    conditions: Conditions
    declared_nbytes: int | None
    content: bytearray = field(default_factory=bytearray)
    done: Object | None = None
    cancelled: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Objects:
    """All buckets. Every change happens at one moment, and its conditions hold at that moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets: dict[str, dict[str, Object]] = {}
        self._uploads: dict[str, Upload] = {}
        self._generations = itertools.count(time.time_ns() // 1000)

    def create_bucket(self, bucket: str) -> None:
        """An empty bucket."""
        with self._lock:
            self._buckets[bucket] = {}

    def check_bucket(self, bucket: str) -> None:
        """`Refusal` 404 if there is no such bucket."""
        with self._lock:
            self._in(bucket)

    def contents(self, bucket: str) -> dict[str, bytes]:
        """Copies of all objects of a bucket, by name."""
        with self._lock:
            return {name: bytes(found.content) for name, found in self._in(bucket).items()}

    def insert(
        self,
        bucket: str,
        name: str,
        content: bytes | bytearray,
        content_type: str,
        conditions: Conditions,
    ) -> Object:
        """Make `content` the live generation of an object, if the conditions hold."""
        md5 = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
        crc = base64.b64encode(struct.pack(">I", crc32c.crc32c(content))).decode()
        with self._lock:
            objects = self._in(bucket)
            conditions.check_insert(objects.get(name))
            objects[name] = Object(
                name, content, content_type, next(self._generations), datetime.now(UTC), md5, crc
            )
            return objects[name]

    def get(self, bucket: str, name: str, generation: int | None, conditions: Conditions) -> Object:
        """The live generation."""
        with self._lock:
            live = self._in(bucket).get(name)
            conditions.check(live)
            return _existing(live, bucket, name, generation)

    def delete(
        self, bucket: str, name: str, generation: int | None, conditions: Conditions
    ) -> None:
        """Remove an object, if the conditions hold."""
        with self._lock:
            objects = self._in(bucket)
            conditions.check(objects.get(name))
            _existing(objects.get(name), bucket, name, generation)
            del objects[name]

    def page(
        self, bucket: str, query: Mapping[str, str], max_entries: int
    ) -> tuple[list[Object], list[str], str]:
        """One page of a listing: objects, prefixes, and the token of the next page (or empty)."""
        after = _decoded_token(query["pageToken"]) if "pageToken" in query else ""
        with self._lock:
            objects = dict(self._in(bucket))
        items: list[Object] = []
        prefixes: list[str] = []
        last = ""
        for entry, found in _entries(objects, query, after):
            if len(items) + len(prefixes) == max_entries:
                return items, prefixes, _encoded_token(last)
            last = entry
            if found:
                items.append(found)
            else:
                prefixes.append(entry)
        return items, prefixes, ""

    def start_upload(self, upload: Upload) -> str:
        """Begin a resumable upload; its id."""
        with self._lock:
            self._in(upload.bucket)
            upload_id = uuid.uuid4().hex
            self._uploads[upload_id] = upload
        return upload_id

    def upload(self, upload_id: str) -> Upload:
        """A resumable upload that was begun and not cancelled."""
        with self._lock:
            upload = self._uploads.get(upload_id)
        if upload is None:
            raise not_found("No such upload session")
        if upload.cancelled:
            raise Refusal(410, "gone", "The upload session is no longer available")
        return upload

    def finish_upload(self, upload: Upload) -> Object:
        """Make an object of what was uploaded."""
        upload.done = self.insert(
            upload.bucket, upload.name, upload.content, upload.content_type, upload.conditions
        )
        return upload.done

    def _in(self, bucket: str) -> dict[str, Object]:
        if bucket not in self._buckets:
            raise not_found("The specified bucket does not exist.")
        return self._buckets[bucket]


def check_name(name: str) -> str:
    """`name` if an object may have it."""
    if (
        not 1 <= len(name.encode(errors="surrogateescape")) <= MAX_NAME_NBYTES
        or name in (".", "..")
        or name.startswith(".well-known/acme-challenge/")
        or any(c in "\r\n" or "\ud800" <= c <= "\udfff" for c in name)
    ):
        raise malformed(f"Invalid object name {name[:80]!r}")
    return name


def _existing(live: Object | None, bucket: str, name: str, generation: int | None) -> Object:
    if live is None or generation not in (None, live.generation):
        raise not_found(f"No such object: {bucket}/{name}")
    return live


def _entries(
    objects: Mapping[str, Object], query: Mapping[str, str], after: str
) -> Iterator[tuple[str, Object | None]]:
    """Names with objects and prefixes (without one), in order, that come after `after`."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    start, end = query.get("startOffset", ""), query.get("endOffset", "")
    seen = ""
    for name in sorted(objects):
        if not name.startswith(prefix) or name < start or (end and name >= end):
            continue
        at = name.find(delimiter, len(prefix)) if delimiter else -1
        entry = name if at < 0 else name[: at + len(delimiter)]
        if entry > after and entry != seen:
            yield entry, objects[name] if at < 0 else None
            seen = entry


def _encoded_token(last: str) -> str:
    return base64.urlsafe_b64encode(last.encode()).decode()


def _decoded_token(token: str) -> str:
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise malformed(f"Invalid pageToken {token[:80]!r}", "invalidParameter") from None


def number(query: Mapping[str, str], name: str) -> int | None:
    """The number that a query gives for `name`; None if it does not."""
    if name not in query:
        return None
    if not (query[name].isascii() and query[name].isdigit()):
        raise malformed(f"Invalid value of {name}: {query[name][:80]!r}", "invalidParameter")
    return int(query[name])
