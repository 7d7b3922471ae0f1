"""Commit records: a step exists if and only if its record does.

The record is published last, once (put-if-absent), after every writer's packs and manifest are
durable, and names the manifests by digest. Nothing else says that a step exists.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Protocol, TypeVar

from msgspec import Meta, structs

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
    MAX_ATTEMPT,
    MAX_MANIFEST_NBYTES,
    MAX_STEP,
    MAX_WRITERS,
    Manifest,
    Record,
    attempt_number,
    check_attempt,
    manifest_key,
    parse_manifest,
)
from asymcheck.records import seal, sha256, unseal
from asymcheck.requests import each
from asymcheck.stores.base import Store

MAX_COMMIT_NBYTES = 1 << 26
MAX_CHAIN = 256
"""Steps below an increment: a chain is decoded recursively."""

_PREFIX = "commits/"
_KEY = re.compile(r"commits/([0-9]{16})\.json")
_DAMAGED_PREFIX = "damaged/"

T = TypeVar("T", bound="Linked")


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

    `depth` is the number of steps below it in the chain: 0 for a base. `base_at` is for the run's
    other writers: the number of the attempt that all are to store as a base.
    """

    step: Annotated[int, Meta(ge=0, le=MAX_STEP)]
    attempt: str
    manifests: Annotated[list[ManifestRef], Meta(min_length=1, max_length=MAX_WRITERS)]
    parent: ParentRef | None
    depth: Annotated[int, Meta(ge=0, le=MAX_CHAIN)]
    created_unix_s: Annotated[float, Meta(ge=0)]
    base_at: Annotated[int, Meta(ge=0, le=MAX_ATTEMPT)] | None = None


@dataclass(frozen=True, slots=True)
class SealedCommit:
    """A commit record, the bytes that it is stored as, and their SHA-256."""

    record: CommitRecord
    sealed: bytes
    sha256: str


class Linked(Protocol):
    """What knows its commit record, and so what it decodes from."""

    @property
    def record(self) -> CommitRecord:
        """The record."""
        ...

    @property
    def sha256(self) -> str:
        """The SHA-256 of the record's stored bytes."""
        ...


def commit_key(step: int) -> str:
    """The key of a step's commit record."""
    return f"{_PREFIX}{step:016d}.json"


def committed_steps(store: Store) -> list[int]:
    """All steps that have a commit record, ascending; whether they verify is another question."""
    matches = (_KEY.fullmatch(key) for key in store.list(_PREFIX))
    return sorted(int(match[1]) for match in matches if match is not None)


def seal_commit(record: CommitRecord) -> bytes:
    """The stored form."""
    members = structs.asdict(record)
    if record.base_at is None:
        del members["base_at"]
    return seal("commit", members)


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
    """A step's commit record and the SHA-256 of its stored bytes; see `read_sealed_commit`."""
    commit = read_sealed_commit(store, step)
    return commit.record, commit.sha256


def read_sealed_commit(store: Store, step: int) -> SealedCommit:
    """A step's commit record, checked.

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
    return SealedCommit(record, data, sha256(data))


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
    if record.base_at is not None and record.base_at <= attempt_number(record.attempt):
        raise FormatError("the base that is announced is not a later attempt")


def follow_chain(step: int, load: Callable[[int], T]) -> list[T]:
    """What `load` gives for a step, then for those that it decodes from, down to a base.

    Raises:
        CheckpointNotFoundError: `load` does so for the step itself.
        CorruptionError, FormatError: `load` does; or a step below is missing or replaced.
    """
    chain = [load(step)]
    while (parent := chain[-1].record.parent) is not None:
        chain.append(_load_parent(step, parent, load))
        if chain[-1].record.depth != chain[-2].record.depth - 1:
            raise FormatError("the depths of a chain do not count down", step=chain[-2].record.step)
    return chain


def _load_parent(step: int, parent: ParentRef, load: Callable[[int], T]) -> T:
    try:
        loaded = load(parent.step)
    except CheckpointNotFoundError as error:
        raise CorruptionError(
            "a step that this one decodes from is gone", step=step, expected=f"step {parent.step}"
        ) from error
    if loaded.sha256 != parent.sha256:
        raise CorruptionError(
            "a step that this one decodes from was replaced by another",
            step=step,
            expected=f"step {parent.step} with commit record {parent.sha256[:16]}...",
            found=f"{loaded.sha256[:16]}...",
        )
    return loaded


def read_manifests(store: Store, record: CommitRecord) -> list[Manifest]:
    """The manifests that a commit record names, checked against it.

    Raises:
        CorruptionError, FormatError: one is missing, damaged, malformed or not the one named.
    """
    read = each(store, partial(read_manifest, store, record), range(len(record.manifests)))
    return [manifest for manifest, _ in read]


def read_manifest(store: Store, record: CommitRecord, writer: int) -> tuple[Manifest, bytes]:
    """The manifest of one writer, and its stored bytes; see `read_manifests` for the errors."""
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
    return manifest, data


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


def was_retired(store: Store, step: int) -> bool:
    """Whether objects of a damaged step of that number may still lie in the store."""
    return any(
        key.startswith(f"{_DAMAGED_PREFIX}{step:016d}-") for key in store.list(_DAMAGED_PREFIX)
    )
