"""The index of a committed step: its writers' manifests as one map from leaves to blocks."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from asymcheck import tree
from asymcheck.codecs import codec_from_manifest
from asymcheck.codecs.base import Codec
from asymcheck.codecs.raw import RawCodec
from asymcheck.commit import (
    CommitRecord,
    follow_chain,
    read_manifest,
    read_sealed_commit,
)
from asymcheck.errors import CodecError, FormatError
from asymcheck.manifest import Block, CodecUse, Manifest, iterate_blocks, leaf_specs
from asymcheck.requests import each
from asymcheck.state import LeafSpec, ShardSpec
from asymcheck.stores.base import Store

MAX_CORNERS = 1 << 22
"""Bound on the boxes of a leaf, times 2 for every dimension that they cut."""


class StoredBlock(msgspec.Struct, frozen=True, eq=False):
    """A block, the box that it is part of, and its codec. Compared by identity."""

    box: BoxIndex
    block: Block
    codec: Codec
    group: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Decoded bytes."""
        return self.block.count * self.box.leaf.itemsize


@dataclass(slots=True, eq=False)
class BoxIndex:
    """A box of a leaf and the blocks that tile it, by ascending first element."""

    leaf: LeafSpec
    shard: ShardSpec
    blocks: list[StoredBlock] = field(default_factory=list[StoredBlock])

    def overlapping(self, start: int, stop: int) -> Iterator[StoredBlock]:
        """The blocks that hold any of the elements [start, stop) of the box."""
        first = bisect_right(self.blocks, start, key=lambda b: b.block.start) - 1
        for stored in itertools.islice(self.blocks, max(first, 0), None):
            if stored.block.start >= stop:
                return
            yield stored


@dataclass(slots=True, eq=False)
class LeafIndex:
    """A leaf, its further paths, and its boxes."""

    spec: LeafSpec
    aliases: tuple[str, ...]
    boxes: dict[ShardSpec, BoxIndex] = field(default_factory=dict[ShardSpec, BoxIndex])


@dataclass(slots=True, eq=False)
class StepIndex:
    """Where every byte of a committed step lies."""

    record: CommitRecord
    sha256: str
    manifests: list[Manifest]
    structure: tree.Node
    leaves: dict[str, LeafIndex]
    groups: dict[tuple[int, int], list[StoredBlock]]

    @property
    def step(self) -> int:
        """The step's number."""
        return self.record.step

    @property
    def metadata(self) -> dict[str, Any]:
        """What the user saved with the step (JSON)."""
        return self.manifests[0].metadata

    def blocks(self, paths: Iterable[str] | None = None) -> Iterator[StoredBlock]:
        """All blocks, or those of some leaves."""
        for leaf in self.leaves.values() if paths is None else map(self.leaves.__getitem__, paths):
            for box in leaf.boxes.values():
                yield from box.blocks

    def blocks_by_group(self, paths: Iterable[str] | None = None) -> list[StoredBlock]:
        """The same, those that decode together side by side: then each is decoded once."""
        return sorted(self.blocks(paths), key=lambda stored: stored.group)


def load_index(store: Store, step: int) -> StepIndex:
    """Read, check and merge what describes a step; no pack is touched.

    Raises:
        CheckpointNotFoundError: the step has no commit record.
        CorruptionError, FormatError: something is missing, damaged, malformed or incomplete.
    """
    commit = read_sealed_commit(store, step)
    [index] = _load(store, [(commit.record, commit.sha256)])
    return index


def _load(store: Store, commits: Sequence[tuple[CommitRecord, str]]) -> list[StepIndex]:
    """The indices of steps of which the commit records were read."""
    refs = [(record, w) for record, _ in commits for w in range(len(record.manifests))]
    manifests = iter(each(store, lambda ref: _manifest(store, *ref), refs))
    found: list[StepIndex] = []
    for record, digest in commits:
        of_step = list(itertools.islice(manifests, len(record.manifests)))
        with _of_step(record.step):
            found.append(merge(record, digest, of_step))
    return found


def _manifest(store: Store, record: CommitRecord, writer: int) -> Manifest:
    with _of_step(record.step):
        return read_manifest(store, record, writer)[0]


@contextmanager
def _of_step(step: int) -> Generator[None]:
    """Name the step in an error."""
    try:
        yield
    except FormatError as error:
        error.step = step
        raise


def merge(record: CommitRecord, sha256: str, manifests: list[Manifest]) -> StepIndex:
    """One index from all writers' manifests.

    Raises:
        FormatError: they contradict each other, or leave elements uncovered or covered twice.
    """
    structure: tree.Node = manifests[0].structure
    for manifest in manifests[1:]:
        structure = tree.merge(structure, manifest.structure)
    index = StepIndex(record, sha256, manifests, structure, {}, {})
    for manifest in manifests:
        _add(index, manifest)
    _check_aliases(index)
    for leaf in index.leaves.values():
        _check_cover(leaf)
    missing = tree.leaf_paths(structure) - index.leaves.keys()
    if missing:
        raise FormatError("the structure names leaves that no manifest holds", leaf=min(missing))
    _check_base(index)
    return index


def _check_aliases(index: StepIndex) -> None:
    """One path, one leaf: a writer's alias must not be another writer's leaf."""
    aliases = Counter(alias for leaf in index.leaves.values() for alias in leaf.aliases)
    for path, count in aliases.items():
        if count > 1 or path in index.leaves:
            raise FormatError("a path stands for two leaves", leaf=path)


def _check_base(index: StepIndex) -> None:
    parent = None if index.record.parent is None else index.record.parent.step
    bases = {m.base_step for m in index.manifests if m.base_step is not None}
    if bases - {parent}:
        raise FormatError(
            "a manifest names another base than the commit record",
            expected=f"step {parent}",
            found=f"steps {sorted(bases)}",
        )
    if parent is None and any(stored.codec.needs_base for stored in index.blocks()):
        raise FormatError("a block needs a base, but the commit record names no parent")


def _add(index: StepIndex, manifest: Manifest) -> None:
    specs = leaf_specs(manifest)
    for spec, leaf in zip(specs, manifest.leaves, strict=True):
        known = index.leaves.get(spec.path)
        if known is None:
            index.leaves[spec.path] = LeafIndex(spec, leaf.aliases)
        elif known.spec != spec or known.aliases != leaf.aliases:
            raise FormatError("two writers describe a leaf differently", leaf=spec.path)
    codecs = [_codec(use) for use in manifest.codecs]
    boxes = [_box(index, specs[s.leaf], s.offset, s.shape) for s in manifest.shards]
    for block in iterate_blocks(manifest):
        box, codec = boxes[block.shard], codecs[block.codec]
        group = (manifest.writer, block.group)
        stored = StoredBlock(box, block, codec, group)
        if (codec.id == RawCodec.id) != (block.raw == ""):
            raise FormatError(
                "a block has a second digest exactly if it is coded", leaf=box.leaf.path
            )
        box.blocks.append(stored)
        if codec.joint:
            together = index.groups.setdefault(group, [])
            together.append(stored)
            if stored.codec is not together[0].codec:
                raise FormatError(
                    "blocks that decode together have different codecs", leaf=stored.box.leaf.path
                )


def _codec(use: CodecUse) -> Codec:
    try:
        return codec_from_manifest(use.id, use.params)
    except CodecError as error:
        raise FormatError(f"impossible parameters of codec {use.id!r}: {error}") from error


def _box(
    index: StepIndex, spec: LeafSpec, offset: tuple[int, ...], shape: tuple[int, ...]
) -> BoxIndex:
    shard = ShardSpec(offset, shape)
    boxes = index.leaves[spec.path].boxes
    box = boxes.get(shard)
    if box is None:
        box = boxes[shard] = BoxIndex(spec, shard)
    return box


def _check_cover(leaf: LeafIndex) -> None:
    boxes = [box for box in leaf.boxes.values() if box.shard.size > 0]
    if not tile([box.shard for box in boxes], leaf.spec.shape):
        raise FormatError("the boxes of a leaf do not cover it exactly once", leaf=leaf.spec.path)
    for box in boxes:
        box.blocks.sort(key=lambda stored: (stored.block.start, stored.block.stop))
        position = 0
        for stored in box.blocks:
            if stored.block.start != position:
                raise FormatError(
                    "elements of a leaf are missing or stored twice",
                    leaf=leaf.spec.path,
                    expected=f"a block at element {position}",
                    found=f"one at {stored.block.start}",
                )
            position = stored.block.stop
        if position != box.shard.size:
            raise FormatError(
                "elements of a leaf are missing",
                leaf=leaf.spec.path,
                expected=f"{box.shard.size} elements",
                found=position,
            )


def tile(shards: Sequence[ShardSpec], shape: tuple[int, ...]) -> bool:
    """Whether boxes within a leaf of that shape cover it exactly once.

    They do if and only if the sum of their indicator functions is that of the leaf. Such a sum
    is determined by its mixed difference, which is +1 or -1 at each corner of each box: so the
    corners must cancel, n * 2^k of them for n boxes that cut k dimensions.
    """
    if 0 in shape or (len(shards) == 1 and shards[0].shape == shape):
        return True
    cut = [d for d, n in enumerate(shape) if any(shard.shape[d] != n for shard in shards)]
    if len(shards) << len(cut) > MAX_CORNERS:
        raise FormatError("a leaf is cut into too many boxes along too many dimensions")
    corners: Counter[tuple[int, ...]] = Counter()
    for shard in shards:
        _add_corners(corners, [(shard.offset[d], shard.shape[d]) for d in cut], 1)
    _add_corners(corners, [(0, shape[d]) for d in cut], -1)
    return not any(corners.values())


def _add_corners(
    corners: Counter[tuple[int, ...]], ranges: Sequence[tuple[int, int]], sign: int
) -> None:
    ends = [((start, 1), (start + length, -1)) for start, length in ranges]
    for corner in itertools.product(*ends):
        corners[tuple(at for at, _ in corner)] += sign * math.prod(s for _, s in corner)


def intersect(a: ShardSpec, b: ShardSpec) -> ShardSpec | None:
    """The box that two boxes of the same leaf share, or None if they share no element."""
    offset = tuple(max(i, j) for i, j in zip(a.offset, b.offset, strict=True))
    ends = (
        min(i + n, j + m) for i, n, j, m in zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    )
    shape = tuple(end - begin for end, begin in zip(ends, offset, strict=True))
    return ShardSpec(offset, shape) if all(n > 0 for n in shape) else None


def load_chain(store: Store, step: int) -> list[StepIndex]:
    """The step, then the steps that it decodes from, down to a base.

    Raises:
        CheckpointNotFoundError: the step itself has no commit record.
        CorruptionError, FormatError: it, or a step below it, is missing, replaced or damaged.
    """
    commits = follow_chain(step, lambda number: read_sealed_commit(store, number))
    return _load(store, [(commit.record, commit.sha256) for commit in commits])
