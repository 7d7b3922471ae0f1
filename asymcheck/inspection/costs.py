"""`asymcheck stats`: what each checkpoint of a run cost, and what the policy decided."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from asymcheck.commit import committed_steps, read_commit, read_manifests
from asymcheck.errors import CheckpointNotFoundError, CorruptionError, FormatError
from asymcheck.inspection.listing import StepSummary, kind_of, summarise
from asymcheck.inspection.progress import Progress, steps
from asymcheck.inspection.text import duration, ratio, size, table
from asymcheck.inspection.timeline import TraceSummary, summarise_traces
from asymcheck.manifest import Manifest
from asymcheck.stores.base import Store
from asymcheck.traces import StoredTrace

_REASONS = 3


class _Decision(msgspec.Struct):
    kind: str
    dtype: str
    nbytes: int
    codec: str
    reason: str


class _WriterStats(msgspec.Struct):
    """What `Attempt.stats` writes; a record that holds anything else is not understood."""

    stall_s: float = 0.0
    in_window_nbytes: int = 0
    durable_after_s: float = 0.0
    decisions: list[_Decision] = []


@dataclass(frozen=True)
class StepCosts:
    """What one step cost.

    Of several writers: the longest stall and time until durable, the sum of all bytes.
    `in_window_nbytes` were copied in windows of the passes, the others at the barrier before
    the update. `problem` says why the figures are missing.
    """

    step: int
    kind: str
    raw_nbytes: int = 0
    stored_nbytes: int = 0
    stall_s: float = 0.0
    in_window_nbytes: int = 0
    durable_after_s: float = 0.0
    problem: str | None = None


@dataclass(frozen=True)
class DecisionSummary:
    """The partitions whose leaves of one kind and dtype a codec got, and the commonest reasons."""

    codec: str
    kind: str
    dtype: str
    decisions: int
    raw_nbytes: int
    reasons: list[str]


@dataclass(frozen=True)
class RunCosts:
    """All steps asked for, ascending, the decisions of all of them together, and the trace's sums.

    `trace` is None if the run has kept none.
    """

    url: str
    steps: list[StepCosts]
    decisions: list[DecisionSummary]
    trace: TraceSummary | None

    @property
    def good(self) -> bool:
        """Whether all records are whole."""
        return all(step.problem is None for step in self.steps)

    def text(self) -> Iterator[str]:
        """Two tables, and a line on the trace."""
        heads = ("STEP", "KIND", "RAW", "STORED", "RATIO", "STALL", "IN WINDOWS", "DURABLE AFTER")
        yield from table(heads, [_row(s) for s in self.steps if s.problem is None], "KIND")
        for step in self.steps:
            if step.problem is not None:
                yield f"step {step.step}: {step.problem}"
        if self.decisions:
            yield ""
        heads = ("CODEC", "KIND", "DTYPE", "DECISIONS", "RAW", "REASON")
        rows = [_decision_row(decision) for decision in self.decisions]
        yield from table(heads, rows, "CODEC KIND DTYPE REASON")
        if self.trace is not None:
            yield ""
            yield from self.trace.text()


def run_costs(
    store: Store,
    only_step: int | None = None,
    progress: bool | None = None,
    traces: Sequence[StoredTrace] = (),
) -> RunCosts:
    """What the manifests of all steps (or of one) say about their cost, and the run's traces.

    Raises:
        CheckpointNotFoundError: the step asked for does not exist.
        StoreError: the store cannot be read.
    """
    costs: list[StepCosts] = []
    decisions: list[_Decision] = []
    wanted = committed_steps(store) if only_step is None else [only_step]
    with Progress("reading records", len(wanted), progress, steps) as done:
        for step in wanted:
            try:
                found, made = _read(store, step)
            except CheckpointNotFoundError:
                if only_step is not None:
                    raise
                continue  # removed since the steps were listed
            costs.append(found)
            decisions += made
            done.add(1)
    trace = summarise_traces(traces, only_step)
    return RunCosts(store.url, costs, _summaries(decisions), trace)


def _read(store: Store, step: int) -> tuple[StepCosts, list[_Decision]]:
    try:
        record, _ = read_commit(store, step)
        manifests = read_manifests(store, record)
        parts = [_stats(manifest) for manifest in manifests]
    except (CorruptionError, FormatError) as error:
        return StepCosts(step, "damaged", problem=str(error)), []
    costs = _costs(summarise(record, manifests, 0), parts)
    return costs, [decision for part in parts for decision in part.decisions]


def _stats(manifest: Manifest) -> _WriterStats:
    try:
        return msgspec.convert(manifest.stats, _WriterStats)
    except msgspec.ValidationError as error:
        raise FormatError(f"the statistics cannot be read: {error}", step=manifest.step) from error


def _costs(summary: StepSummary, parts: Sequence[_WriterStats]) -> StepCosts:
    return StepCosts(
        summary.step,
        kind_of(summary),
        summary.raw_nbytes,
        summary.stored_nbytes,
        max(part.stall_s for part in parts),
        sum(part.in_window_nbytes for part in parts),
        max(part.durable_after_s for part in parts),
    )


def _summaries(decisions: Iterable[_Decision]) -> list[DecisionSummary]:
    classes: dict[tuple[str, str, str], list[_Decision]] = defaultdict(list)
    for decision in decisions:
        classes[decision.codec, decision.kind, decision.dtype].append(decision)
    summaries = [
        DecisionSummary(
            *place,
            decisions=len(made),
            raw_nbytes=sum(decision.nbytes for decision in made),
            reasons=[r for r, _ in Counter(d.reason for d in made).most_common(_REASONS)],
        )
        for place, made in classes.items()
    ]
    return sorted(summaries, key=lambda s: (-s.raw_nbytes, s.codec, s.kind, s.dtype))


def _row(step: StepCosts) -> tuple[str, ...]:
    return (
        str(step.step),
        step.kind,
        size(step.raw_nbytes),
        size(step.stored_nbytes),
        ratio(step.stored_nbytes, step.raw_nbytes),
        duration(step.stall_s),
        ratio(step.in_window_nbytes, step.raw_nbytes),
        duration(step.durable_after_s),
    )


def _decision_row(decision: DecisionSummary) -> tuple[str, ...]:
    return (
        decision.codec,
        decision.kind,
        decision.dtype,
        str(decision.decisions),
        size(decision.raw_nbytes),
        decision.reasons[0],
    )
