"""Commit records: a step exists if and only if its record does.

The record is published last, once (put-if-absent), after every writer's packs and manifest are
durable, and names the manifests by digest. Nothing else says that a step exists.
"""

from __future__ import annotations

import re
from typing import Annotated

from msgspec import Meta

from asymcheck.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    ObjectNotFoundError,
    ObjectTooLongError,
    ShortReadError,
    StepExistsError,
)
from asymcheck.manifest import (
    MAX_MANIFEST_NBYTES,
    MAX_STEP,
    MAX_WRITERS,
    Manifest,
    Record,
    check_attempt,
    manifest_key,
    parse_manifest,
)
from asymcheck.records import seal, sha256, unseal
from asymcheck.stores.base import Store

MAX_COMMIT_NBYTES = 1 << 26
MAX_CHAIN = 256
"""Steps below an increment: a chain is decoded recursively."""

_PREFIX = "commits/"
_KEY = re.compile(r"commits/([0-9]{16})\.json")
_DAMAGED_PREFIX = "damaged/"


class ManifestRef(Record):
    """A manifest by key, length and SHA-256 of all its bytes."""

    key: Annotated[str, Meta(max_length=512)]
    nbytes: Annotated[int, Meta(ge=0, le=MAX_MANIFEST_NBYTES)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class ParentRef(Record):
    """The step that an increment decodes from: its number and the digest of its commit record."""

    step: Annotated[int, Meta(ge=0, le=MAX_STEP)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class CommitRecord(Record):
    """What makes a step exist: its attempt, its manifests (one a writer), what it builds on.

    `depth` is the number of steps below it in the chain: 0 for a base.
    """

    step: Annotated[int, Meta(ge=0, le=MAX_STEP)]
    attempt: str
    manifests: Annotated[list[ManifestRef], Meta(min_length=1, max_length=MAX_WRITERS)]
    parent: ParentRef | None
    depth: Annotated[int, Meta(ge=0, le=MAX_CHAIN)]
    created_unix_s: Annotated[float, Meta(ge=0)]


def commit_key(step: int) -> str:
    """The key of a step's commit record."""
    return f"{_PREFIX}{step:016d}.json"


def committed_steps(store: Store) -> list[int]:
    """All steps that have a commit record, ascending; whether they verify is another question."""
    matches = (_KEY.fullmatch(key) for key in store.list(_PREFIX))
    return sorted(int(match[1]) for match in matches if match is not None)


def seal_commit(record: CommitRecord) -> bytes:
    """The stored form."""
    return seal("commit", record)


def publish(store: Store, step: int, sealed: bytes) -> None:
    """Make a step exist.

    A crash before the store has published the record leaves no step; after, the step.

    Raises:
        StepExistsError: the step is committed already, by this run or another.
        StoreError: the store failed; whether the record stands must be read from the store.
    """
    if store.put_if_absent(commit_key(step), memoryview(sealed)):
        return
    if store.get(commit_key(step), MAX_COMMIT_NBYTES) == sealed:
        return  # our own earlier attempt at publishing got through although it reported an error
    raise StepExistsError(
        "the step is committed already",
        step=step,
        object=commit_key(step),
        hint="Committed steps are never overwritten: save a later step, or discard_after() first",
    )


def read_commit(store: Store, step: int) -> tuple[CommitRecord, str]:
    """A step's commit record and the SHA-256 of its stored bytes.

    Raises:
        CheckpointNotFoundError: the step has no commit record.
        CorruptionError, FormatError: it is damaged, malformed or another step's.
    """
    key = commit_key(step)
    try:
        data = store.get(key, MAX_COMMIT_NBYTES)
    except ObjectNotFoundError:
        raise CheckpointNotFoundError("there is no such step", step=step, object=key) from None
    except (ObjectTooLongError, ShortReadError) as error:
        raise CorruptionError("the commit record cannot be whole", step=step, object=key) from error
    try:
        record = unseal(data, "commit", CommitRecord, object=key)
        _check(record, step)
    except (CorruptionError, FormatError) as error:
        error.step, error.object = step, key
        raise
    return record, sha256(data)


def _check(record: CommitRecord, step: int) -> None:
    if record.step != step:
        raise CorruptionError(
            "the commit record is another step's", expected=step, found=record.step
        )
    check_attempt(record.attempt)
    if (record.parent is None) != (record.depth == 0):
        raise FormatError("the commit record's depth contradicts its parent")
    if record.parent is not None and record.parent.step >= step:
        raise FormatError("the parent is not an earlier step")


def read_manifests(store: Store, record: CommitRecord) -> list[Manifest]:
    """The manifests that a commit record names, checked against it.

    Raises:
        CorruptionError, FormatError: one is missing, damaged, malformed or not the one named.
    """
    return [_read_manifest(store, record, writer) for writer in range(len(record.manifests))]


def _read_manifest(store: Store, record: CommitRecord, writer: int) -> Manifest:
    ref = record.manifests[writer]
    if ref.key != manifest_key(record.step, record.attempt, writer):
        raise FormatError(
            "the commit record names a manifest out of place", step=record.step, found=ref.key[:80]
        )
    try:
        data = store.get(ref.key, ref.nbytes)
    except (ObjectNotFoundError, ObjectTooLongError, ShortReadError) as error:
        raise CorruptionError(
            "a manifest is missing or has another length",
            step=record.step,
            object=ref.key,
            expected=f"{ref.nbytes} bytes",
        ) from error
    if len(data) != ref.nbytes or sha256(data) != ref.sha256:
        raise CorruptionError(
            "the manifest is not the one that was committed",
            step=record.step,
            object=ref.key,
            expected=f"{ref.nbytes} bytes, sha256 {ref.sha256[:16]}...",
            found=f"{len(data)} bytes, sha256 {sha256(data)[:16]}...",
        )
    manifest = parse_manifest(data, object=ref.key)
    place = (manifest.step, manifest.attempt, manifest.writer, manifest.writers)
    if place != (record.step, record.attempt, writer, len(record.manifests)):
        raise FormatError("the manifest belongs to another step or writer", object=ref.key)
    return manifest


def retire(store: Store, step: int) -> None:
    """Take a damaged step out of the way: its record moves to `damaged/`.

    Its data stay until orphans are collected, at the next start of the run or by `asymcheck gc`.
    The number can then be written again. A crash in between leaves the step as it was, or gone.
    Nothing to do if there is no such step any more.
    """
    key = commit_key(step)
    try:
        data = store.get(key, MAX_COMMIT_NBYTES)
    except ObjectNotFoundError:
        return
    except ObjectTooLongError:
        data = b""  # nothing that a record could be
    store.put_if_absent(f"{_DAMAGED_PREFIX}{step:016d}-{sha256(data)[:16]}.json", memoryview(data))
    store.delete(key)
