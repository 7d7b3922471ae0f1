"""`asymcheck show`: the leaves of a step, or one of them."""

from __future__ import annotations

import difflib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from asymcheck.errors import CheckpointNotFoundError
from asymcheck.index import LeafIndex
from asymcheck.inspection.listing import StepSummary, kind_of, summarise
from asymcheck.inspection.progress import Progress
from asymcheck.inspection.text import duration, ratio, shape, size, table
from asymcheck.inspection.values import Statistics, StatisticsBuilder, pieces
from asymcheck.reader import Checkpoint, LazyArray

_FIRST_VALUES = 8


@dataclass(frozen=True)
class LeafSummary:
    """One leaf; `codecs` gives for each codec the raw bytes that it coded."""

    path: str
    dtype: str
    shape: list[int]
    raw_nbytes: int
    stored_nbytes: int
    boxes: int
    codecs: dict[str, int]
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class StepDescription:
    """A step with all its leaves."""

    url: str
    summary: StepSummary
    chain: list[int]
    leaves: list[LeafSummary]

    def text(self) -> Iterator[str]:
        """Facts about the step, then a table of its leaves."""
        step = self.summary
        yield f"step {step.step} of {self.url}"
        yield f"{kind_of(step)}, written {duration(step.age_s)} ago by {step.writers} writer(s)"
        if len(self.chain) > 1:
            yield f"decodes from steps {', '.join(map(str, self.chain[1:]))}"
        yield (
            f"{len(self.leaves)} leaves, {size(step.raw_nbytes)} raw, "
            f"{size(step.stored_nbytes)} stored "
            f"({ratio(step.stored_nbytes, step.raw_nbytes)})"
        )
        if step.metadata:
            yield f"metadata {json.dumps(step.metadata)}"
        yield ""
        heads = ("LEAF", "DTYPE", "SHAPE", "RAW", "STORED", "CODECS", "TIED")
        yield from table(heads, [_row(leaf) for leaf in self.leaves], "LEAF DTYPE CODECS TIED")


@dataclass(frozen=True)
class LeafDescription:
    """One leaf and its values; `first` are its first elements in row-major order, as text."""

    url: str
    step: int
    leaf: LeafSummary
    statistics: Statistics
    first: list[str]

    def text(self) -> Iterator[str]:
        """One fact a line."""
        leaf, statistics = self.leaf, self.statistics
        yield f"{leaf.path} at step {self.step} of {self.url}"
        yield f"dtype      {leaf.dtype}"
        yield f"shape      {shape(leaf.shape)}"
        yield f"raw        {size(leaf.raw_nbytes)}"
        yield f"stored     {size(leaf.stored_nbytes)} ({_codec_mix(leaf)})"
        if leaf.aliases:
            yield f"tied       {', '.join(leaf.aliases)}"
        yield f"elements   {statistics.count}, of them {statistics.zeros} zero"
        yield f"NaN        {statistics.nans}"
        yield f"infinite   {statistics.infinities}"
        magnitude = "|x| " if leaf.dtype.startswith("complex") else ""
        for name, value in (
            ("minimum", statistics.minimum),
            ("maximum", statistics.maximum),
            ("mean", statistics.mean),
            ("deviation", statistics.standard_deviation),
        ):
            yield f"{name:10} {'-' if value is None else magnitude + _number(value)}"
        more = " ..." if statistics.count > len(self.first) else ""
        yield f"values     {' '.join(self.first)}{more}"


def describe_step(checkpoint: Checkpoint, url: str) -> StepDescription:
    """What the records say about an open step; no pack is read."""
    index = checkpoint.chain[0]
    return StepDescription(
        url,
        summarise(index.record, index.manifests, time.time()),
        [link.step for link in checkpoint.chain],
        [_summary(leaf) for leaf in index.leaves.values()],
    )


def describe_leaf(
    checkpoint: Checkpoint, url: str, path: str, progress: bool | None = None
) -> LeafDescription:
    """Read one leaf (or an alias of it) and describe its values.

    Raises:
        CheckpointNotFoundError: the step has no such leaf; similar paths are named.
        CorruptionError: stored bytes are missing or wrong.
        StoreError: the store cannot be read.
    """
    if path not in checkpoint.leaves and path not in checkpoint.aliases:
        raise _no_such_leaf(checkpoint, path)
    lazy = checkpoint[path]
    index = checkpoint.chain[0].leaves[checkpoint.aliases.get(path, path)]
    builder = StatisticsBuilder()
    with Progress(f"reading {path}", lazy.nbytes, progress) as done:
        for piece in pieces(lazy.shape):
            values = np.asarray(lazy[piece])
            builder.add(values)
            done.add(values.nbytes)
    return LeafDescription(
        url, checkpoint.step, _summary(index), builder.build(), _first_values(lazy)
    )


def _no_such_leaf(checkpoint: Checkpoint, path: str) -> CheckpointNotFoundError:
    known = [*checkpoint.leaves, *checkpoint.aliases]
    similar = difflib.get_close_matches(path, known, n=3, cutoff=0.3)
    return CheckpointNotFoundError(
        "the step has no such leaf",
        step=checkpoint.step,
        leaf=path,
        hint=f"Similar: {', '.join(similar)}" if similar else None,
    )


def _first_values(lazy: LazyArray) -> list[str]:
    if 0 in lazy.shape:
        return []
    rows = tuple(slice(0, 1) for _ in lazy.shape[:-1])
    index = (*rows, slice(0, _FIRST_VALUES)) if lazy.shape else ()
    return [str(value) for value in np.asarray(lazy[index]).reshape(-1)]


def _summary(leaf: LeafIndex) -> LeafSummary:
    codecs: Counter[str] = Counter()
    stored_nbytes = 0
    for box in leaf.boxes.values():
        for stored in box.blocks:
            codecs[stored.codec.id] += stored.block.count * leaf.spec.itemsize
            stored_nbytes += stored.block.nbytes
    return LeafSummary(
        leaf.spec.path,
        leaf.spec.dtype,
        list(leaf.spec.shape),
        leaf.spec.nbytes,
        stored_nbytes,
        len(leaf.boxes),
        dict(codecs.most_common()),
        leaf.aliases,
    )


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"


def _codec_mix(leaf: LeafSummary) -> str:
    return ", ".join(_share(codec, n, leaf.codecs) for codec, n in leaf.codecs.items()) or "-"


def _share(codec: str, nbytes: int, codecs: Mapping[str, int]) -> str:
    return codec if len(codecs) == 1 else f"{codec} {100 * nbytes / sum(codecs.values()):.0f} %"


def _row(leaf: LeafSummary) -> tuple[Any, ...]:
    return (
        leaf.path,
        leaf.dtype,
        shape(leaf.shape),
        size(leaf.raw_nbytes),
        size(leaf.stored_nbytes),
        _codec_mix(leaf),
        ", ".join(leaf.aliases),
    )
