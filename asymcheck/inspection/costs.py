"""`asymcheck stats`: what each checkpoint of a run cost, and what the policy decided."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from asymcheck.commit import committed_steps, read_commit, read_manifests
from asymcheck.errors import CheckpointNotFoundError, CorruptionError, FormatError
from asymcheck.inspection.listing import StepSummary, kind_of, summarise
from asymcheck.inspection.progress import Progress, steps
from asymcheck.inspection.text import duration, ratio, size, table
from asymcheck.inspection.timeline import TraceSummary, summarise_traces
from asymcheck.manifest import Manifest, leaf_specs
from asymcheck.state import kinds_of
from asymcheck.stores.base import Store
from asymcheck.traces import StoredTrace

_REASONS = 3

_Class = tuple[str, str, str]
"""Codec, kind, dtype."""


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
    the update. `stored_nbytes_by_codec` is what the codecs made of it, in all `stored_nbytes`.
    `problem` says why the figures are missing.
    """

    step: int
    kind: str
    raw_nbytes: int = 0
    stored_nbytes: int = 0
    stall_s: float = 0.0
    in_window_nbytes: int = 0
    durable_after_s: float = 0.0
    stored_nbytes_by_codec: dict[str, int] = field(default_factory=dict[str, int])
    problem: str | None = None


@dataclass(frozen=True)
class CodingSummary:
    """What a codec made of leaves of one kind and dtype, and why the policy chose it.

    `raw_nbytes` and `stored_nbytes` are of the blocks that the codec coded. The policy decided
    for it `decisions` times; `reasons` are the commonest ones. A block that a codec does not make
    smaller is stored raw, so that blocks may be without a decision and the other way round.
    """

    codec: str
    kind: str
    dtype: str
    raw_nbytes: int
    stored_nbytes: int
    decisions: int
    reasons: list[str]


@dataclass(frozen=True)
class RunCosts:
    """All steps asked for, ascending, the codings of all of them together, and the trace's sums.

    `trace` is None if the run has kept none.
    """

    url: str
    steps: list[StepCosts]
    codings: list[CodingSummary]
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
        if self.codings:
            yield ""
        heads = ("CODEC", "KIND", "DTYPE", "RAW", "STORED", "RATIO", "DECISIONS", "REASON")
        rows = [_coding_row(coding) for coding in self.codings]
        yield from table(heads, rows, "CODEC KIND DTYPE REASON")
        if self.trace is not None:
            yield ""
            yield from self.trace.text()


class _Tally:
    """Bytes, and reasons of decisions, by (codec, kind, dtype)."""

    def __init__(self) -> None:
        self._raw_nbytes: Counter[_Class] = Counter()
        self._stored_nbytes: Counter[_Class] = Counter()
        self._reasons: defaultdict[_Class, Counter[str]] = defaultdict(Counter)

    def add_blocks(self, manifest: Manifest) -> None:
        specs = leaf_specs(manifest)
        kinds = kinds_of(specs)
        of_shard = [(specs[shard.leaf], kinds[shard.leaf]) for shard in manifest.shards]
        blocks = manifest.blocks
        for shard, codec, count, nbytes in zip(
            blocks.shard, blocks.codec, blocks.count, blocks.nbytes, strict=True
        ):
            spec, kind = of_shard[shard]
            place = manifest.codecs[codec].id, kind, spec.dtype
            self._raw_nbytes[place] += count * spec.itemsize
            self._stored_nbytes[place] += nbytes

    def add_decisions(self, decisions: Iterable[_Decision]) -> None:
        for decision in decisions:
            self._reasons[decision.codec, decision.kind, decision.dtype][decision.reason] += 1

    def update(self, other: _Tally) -> None:
        self._raw_nbytes.update(other._raw_nbytes)
        self._stored_nbytes.update(other._stored_nbytes)
        for place, reasons in other._reasons.items():
            self._reasons[place].update(reasons)

    def stored_nbytes_by_codec(self) -> dict[str, int]:
        by_codec: Counter[str] = Counter()
        for (codec, _, _), nbytes in self._stored_nbytes.items():
            by_codec[codec] += nbytes
        return dict(sorted(by_codec.items()))

    def summaries(self) -> list[CodingSummary]:
        """Those with the most raw bytes first."""
        found = [self._summary(place) for place in self._raw_nbytes.keys() | self._reasons.keys()]
        return sorted(found, key=lambda s: (-s.raw_nbytes, s.codec, s.kind, s.dtype))

    def _summary(self, place: _Class) -> CodingSummary:
        reasons = self._reasons.get(place, Counter[str]())
        return CodingSummary(
            *place,
            raw_nbytes=self._raw_nbytes[place],
            stored_nbytes=self._stored_nbytes[place],
            decisions=reasons.total(),
            reasons=[reason for reason, _ in reasons.most_common(_REASONS)],
        )


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
    total = _Tally()
    wanted = committed_steps(store) if only_step is None else [only_step]
    with Progress("reading records", len(wanted), progress, steps) as done:
        for step in wanted:
            try:
                found, tally = _read(store, step)
            except CheckpointNotFoundError:
                if only_step is not None:
                    raise
                continue  # removed since the steps were listed
            costs.append(found)
            total.update(tally)
            done.add(1)
    trace = summarise_traces(traces, only_step)
    return RunCosts(store.url, costs, total.summaries(), trace)


def _read(store: Store, step: int) -> tuple[StepCosts, _Tally]:
    tally = _Tally()
    try:
        record, _ = read_commit(store, step)
        manifests = read_manifests(store, record)
        parts = [_stats(manifest) for manifest in manifests]
    except (CorruptionError, FormatError) as error:
        return StepCosts(step, "damaged", problem=str(error)), tally
    for manifest, part in zip(manifests, parts, strict=True):
        tally.add_blocks(manifest)
        tally.add_decisions(part.decisions)
    return _costs(summarise(record, manifests, 0), parts, tally), tally


def _stats(manifest: Manifest) -> _WriterStats:
    try:
        return msgspec.convert(manifest.stats, _WriterStats)
    except msgspec.ValidationError as error:
        raise FormatError(f"the statistics cannot be read: {error}", step=manifest.step) from error


def _costs(summary: StepSummary, parts: Sequence[_WriterStats], tally: _Tally) -> StepCosts:
    return StepCosts(
        summary.step,
        kind_of(summary),
        summary.raw_nbytes,
        summary.stored_nbytes,
        max(part.stall_s for part in parts),
        sum(part.in_window_nbytes for part in parts),
        max(part.durable_after_s for part in parts),
        tally.stored_nbytes_by_codec(),
    )


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


def _coding_row(coding: CodingSummary) -> tuple[str, ...]:
    return (
        coding.codec,
        coding.kind,
        coding.dtype,
        size(coding.raw_nbytes),
        size(coding.stored_nbytes),
        ratio(coding.stored_nbytes, coding.raw_nbytes),
        str(coding.decisions),
        _reason(coding),
    )


def _reason(coding: CodingSummary) -> str:
    if coding.reasons:
        return coding.reasons[0]
    return "not made smaller by a codec" if coding.codec == "raw" else "-"
