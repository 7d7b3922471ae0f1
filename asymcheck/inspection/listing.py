"""`asymcheck ls`: the committed steps of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from asymcheck.commit import CommitRecord, committed_steps, read_commit, read_manifests
from asymcheck.errors import CheckpointNotFoundError, CorruptionError, FormatError
from asymcheck.inspection.progress import Progress, steps
from asymcheck.inspection.text import duration, ratio, shortened, size, table
from asymcheck.manifest import Manifest, leaf_specs
from asymcheck.stores.base import Store


@dataclass(frozen=True)
class StepSummary:
    """One committed step, as far as its records tell; `problem` says why they do not.

    `raw_nbytes` are the bytes of all leaves, `stored_nbytes` those of the step's own packs,
    `record_nbytes` those of its manifests.
    """

    step: int
    kind: str = "damaged"
    depth: int = 0
    parent: int | None = None
    raw_nbytes: int = 0
    stored_nbytes: int = 0
    record_nbytes: int = 0
    created_unix_s: float = 0.0
    age_s: float = 0.0
    writers: int = 0
    leaves: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    problem: str | None = None


@dataclass(frozen=True)
class Listing:
    """All committed steps of a run, ascending."""

    url: str
    steps: list[StepSummary]

    @property
    def good(self) -> bool:
        """Whether all records are whole."""
        return all(step.problem is None for step in self.steps)

    def text(self) -> Iterator[str]:
        """A table, and what is wrong."""
        heads = ("STEP", "KIND", "RAW", "STORED", "RATIO", "AGE", "WRITERS", "METADATA")
        yield from table(heads, [_row(step) for step in self.steps], left="KIND METADATA")
        for step in self.steps:
            if step.problem is not None:
                yield f"step {step.step}: {step.problem}"


def list_steps(store: Store, progress: bool | None = None) -> Listing:
    """Describe every committed step from its records; no pack is read.

    Raises:
        StoreError: the store cannot be read.
    """
    now_s = time.time()
    found = committed_steps(store)
    summaries: list[StepSummary] = []
    with Progress("reading records", len(found), progress, steps) as done:
        for step in found:
            summary = _summary(store, step, now_s)
            summaries += [] if summary is None else [summary]
            done.add(1)
    return Listing(store.url, summaries)


def _summary(store: Store, step: int, now_s: float) -> StepSummary | None:
    try:
        record, _ = read_commit(store, step)
        manifests = read_manifests(store, record)
    except CheckpointNotFoundError:
        return None  # removed since the steps were listed
    except (CorruptionError, FormatError) as error:
        return StepSummary(step, problem=str(error))
    return summarise(record, manifests, now_s)


def summarise(record: CommitRecord, manifests: list[Manifest], now_s: float) -> StepSummary:
    """What a step's records say about it, at UNIX time `now_s`."""
    specs = {spec.path: spec for manifest in manifests for spec in leaf_specs(manifest)}
    return StepSummary(
        step=record.step,
        kind="base" if record.parent is None else "increment",
        depth=record.depth,
        parent=None if record.parent is None else record.parent.step,
        raw_nbytes=sum(spec.nbytes for spec in specs.values()),
        stored_nbytes=sum(pack.nbytes for manifest in manifests for pack in manifest.packs),
        record_nbytes=sum(ref.nbytes for ref in record.manifests),
        created_unix_s=record.created_unix_s,
        age_s=now_s - record.created_unix_s,
        writers=len(manifests),
        leaves=len(specs),
        metadata=manifests[0].metadata,
    )


def kind_of(step: StepSummary) -> str:
    """`base`, or `increment` with its depth in the chain."""
    return step.kind if step.parent is None else f"{step.kind} {step.depth}"


def _row(step: StepSummary) -> tuple[str, ...]:
    if step.problem is not None:
        return (str(step.step), "damaged", *("-",) * 5, "")
    return (
        str(step.step),
        kind_of(step),
        size(step.raw_nbytes),
        size(step.stored_nbytes),
        ratio(step.stored_nbytes, step.raw_nbytes),
        duration(step.age_s),
        str(step.writers),
        shortened(json.dumps(step.metadata), 60) if step.metadata else "",
    )
