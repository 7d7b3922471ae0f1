"""Forged runs: records that lie, sealed as if they were true."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from writers_oracle import Cloud, Connection

from asymcheck import Always, Checkpointer, CostModel, Strategy
from asymcheck.commit import commit_key
from asymcheck.manifest import manifest_key
from asymcheck.records import header, sha256

Objects = dict[str, bytes]
Json = dict[str, Any]

BASE, TARGET = 1, 2  # a full step and an increment on it
RUN = "honest"
STRATEGY = Strategy("delta", Always("delta"), windows=False, batched=True, blocking=True)


def honest_state(step: int) -> Any:
    weight = np.arange(120, dtype=np.float32).reshape(2, 60) + np.float32(step / 8)
    return {
        "params": {"w": weight},
        "exp_avg": {"w": weight * 2},
        "n": np.int64(step),
        "b": b"bytes",
    }


def store_of(objects: Objects) -> Connection:
    cloud = Cloud()
    cloud.objects = objects
    return Connection(cloud, random.Random(0))


def checkpointer_over(objects: Objects, **options: Any) -> Checkpointer:
    return Checkpointer(
        store_of(objects),
        strategy=STRATEGY,
        max_host_bytes=1 << 20,
        cost_model=CostModel(),
        encode_threads=1,
        **{"max_chain": 10, **options},
    )


def honest_run() -> Objects:
    """Steps 1 (a base) and 2 (an increment) of one writer."""
    objects: Objects = {}
    with checkpointer_over(objects, run_id=RUN) as checkpointer:
        for step in (BASE, TARGET):
            checkpointer.save(step, honest_state(step))
    assert json.loads(body_of(objects[commit_key(TARGET)]))["depth"] == 1
    return objects


def attempt_of(step: int) -> str:
    return f"{RUN}-{step - 1:06d}"


def body_of(sealed: bytes) -> bytes:
    return sealed.partition(b"\n")[2]


def sealed(kind: str, body: bytes, version: int = 1) -> bytes:
    return header(kind, version, body) + body


def encoded(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def key_of_manifest(step: int = TARGET) -> str:
    return manifest_key(step, attempt_of(step), 0)


def forge(
    objects: Objects,
    change: Callable[[Json], object] = lambda manifest: None,
    *,
    of_commit: Callable[[Json], object] = lambda commit: None,
    body: Callable[[bytes], bytes] = lambda text: text,
    commit_body: Callable[[bytes], bytes] = lambda text: text,
    version: int = 1,
    step: int = TARGET,
) -> Objects:
    """The run with another manifest and commit record of a step, digests and lengths made to fit.

    Args:
        objects: the honest run.
        change, of_commit: change the parsed record in place.
        body, commit_body: change its text.
        version: of the manifest's format.
    """
    forged = dict(objects)
    manifest = json.loads(body_of(objects[key_of_manifest(step)]))
    change(manifest)
    data = sealed("manifest", body(encoded(manifest)), version)
    forged[key_of_manifest(step)] = data
    commit = json.loads(body_of(objects[commit_key(step)]))
    commit["manifests"][0].update(sha256=sha256(data), nbytes=len(data))
    of_commit(commit)
    forged[commit_key(step)] = sealed("commit", commit_body(encoded(commit)))
    return forged


def assign(*path: str | int, value: object) -> Callable[[Json], None]:
    """Sets the member at a path of a record."""

    def change(record: Any) -> None:
        for name in path[:-1]:
            record = record[name]
        record[path[-1]] = value

    return change


def add(*path: str | int, number: int) -> Callable[[Json], None]:
    """Adds to the number at a path of a record."""

    def change(record: Any) -> None:
        for name in path[:-1]:
            record = record[name]
        record[path[-1]] += number

    return change


def remove(*path: str | int) -> Callable[[Json], None]:
    """Removes the member at a path of a record."""

    def change(record: Any) -> None:
        for name in path[:-1]:
            record = record[name]
        del record[path[-1]]

    return change
