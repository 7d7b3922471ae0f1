"""The manifest: one writer's record of which bytes of which leaves lie where.

A manifest is hostile until `check` has passed: every index, range and length is verified there,
once, so that the reader may rely on them. docs/format.md is the normative description.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from asymcheck import tree
from asymcheck.errors import FormatError
from asymcheck.records import seal, unseal
from asymcheck.state import LeafSpec, dtype_of

MAX_MANIFEST_NBYTES = 1 << 28
MAX_BLOCK_NBYTES = 1 << 26
MAX_LEAF_NBYTES = 1 << 50
MAX_RANK = 32
MAX_TEXT = 4096
MAX_WRITERS = 1 << 17
MAX_STEP = (1 << 53) - 1
MAX_ATTEMPT = 10**12 - 1

_BULK = ("leaves", "shards", "packs", "blocks")
_ATTEMPT = re.compile(r"[0-9a-z]{1,32}-[0-9]{6,12}")
_DIGEST = re.compile(r"[0-9a-f]{32}")

Natural = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]


class Record(msgspec.Struct, forbid_unknown_fields=True):
    """Base of everything that is stored as JSON."""


class Leaf(Record, gc=False):
    """A leaf: its path, dtype name, global shape, and further paths of the same leaf."""

    path: Text
    dtype: Text
    shape: tuple[Natural, ...]
    aliases: tuple[Text, ...] = ()


class Shard(Record, gc=False):
    """A box of the leaf with that index in the manifest's `leaves`."""

    leaf: Natural
    offset: tuple[Natural, ...]
    shape: tuple[Natural, ...]


class CodecUse(Record):
    """A codec with the parameters that its decoder needs."""

    id: Annotated[str, Meta(max_length=64)]
    params: dict[str, Any] = {}


class Pack(Record, gc=False):
    """A stored object of exactly `nbytes` bytes; blocks tile it without gaps."""

    key: Annotated[str, Meta(max_length=512)]
    nbytes: Natural


class Blocks(Record):
    """All blocks of a manifest, by columns: element i of every list belongs to block i.

    Block i holds elements [start, start + count) of shard `shard`, encoded by codec `codec` into
    `nbytes` bytes at `offset` of pack `pack`. Consecutive blocks with the same `group` were
    encoded together, in this order. `digest` is the XXH3-128 of the stored bytes, `raw` that of
    the decoded ones (empty where the codec stores them as they are), both in hexadecimal.
    """

    shard: list[Natural] = []
    start: list[Natural] = []
    count: list[Natural] = []
    codec: list[Natural] = []
    group: list[Natural] = []
    pack: list[Natural] = []
    offset: list[Natural] = []
    nbytes: list[Natural] = []
    digest: list[str] = []
    raw: list[str] = []


class Manifest(Record):
    """What one writer stored of one step."""

    step: Annotated[int, Meta(ge=0, le=MAX_STEP)]
    attempt: str
    writer: Annotated[int, Meta(ge=0, lt=MAX_WRITERS)]
    writers: Annotated[int, Meta(ge=1, le=MAX_WRITERS)]
    base_step: Annotated[int, Meta(ge=0, le=MAX_STEP)] | None
    structure: Any
    leaves: list[Leaf]
    shards: list[Shard]
    codecs: list[CodecUse]
    packs: list[Pack]
    blocks: Blocks
    metadata: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    warm_start: dict[str, Any] = {}


class Block(msgspec.Struct, frozen=True, gc=False):
    """One row of `Blocks`, with its pack's key and its codec resolved."""

    shard: int
    start: int
    count: int
    codec: int
    group: int
    key: str
    offset: int
    nbytes: int
    digest: str
    raw: str

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.count


def data_prefix(step: int, attempt: str) -> str:
    """Where all objects of one attempt at a step lie."""
    return f"data/{step:016d}-{attempt}/"


def manifest_key(step: int, attempt: str, writer: int) -> str:
    """The key of a writer's manifest."""
    return f"{data_prefix(step, attempt)}w{writer:05d}.manifest"


def pack_key(step: int, attempt: str, writer: int, sequence: int) -> str:
    """The key of a writer's pack number `sequence`."""
    return f"{data_prefix(step, attempt)}w{writer:05d}-{sequence:06d}.pack"


def seal_manifest(manifest: Manifest) -> bytes:
    """The stored form."""
    return seal("manifest", manifest, _BULK)


def parse_manifest(data: bytes, *, object: str) -> Manifest:
    """Parse and check a stored manifest.

    Raises:
        CorruptionError, UnsupportedVersionError, FormatError: see `records.unseal` and `check`.
    """
    if len(data) > MAX_MANIFEST_NBYTES:
        raise FormatError("a manifest is too long", object=object, found=len(data))
    manifest = unseal(data, "manifest", Manifest, _BULK, object=object)
    try:
        check(manifest)
    except FormatError as error:
        error.object = object
        error.step = manifest.step
        raise
    return manifest


def check(manifest: Manifest) -> None:
    """Verify everything that a manifest can be wrong about by itself.

    Raises:
        FormatError: naming what is wrong. Memory stays within a small multiple of the manifest.
    """
    check_attempt(manifest.attempt)
    _require(manifest.writer < manifest.writers, "the writer's number is not below their count")
    _require(
        manifest.base_step is None or manifest.base_step < manifest.step,
        "the base is not an earlier step",
    )
    for leaf in manifest.leaves:
        _check_leaf(leaf)
    paths = [path for leaf in manifest.leaves for path in (leaf.path, *leaf.aliases)]
    _require(len(set(paths)) == len(paths), "a leaf path appears twice")
    tree.leaf_paths(manifest.structure)
    for shard in manifest.shards:
        _check_shard(shard, manifest)
    for sequence, pack in enumerate(manifest.packs):
        expected = pack_key(manifest.step, manifest.attempt, manifest.writer, sequence)
        _require(pack.key == expected, f"pack {sequence} does not lie in its place", pack.key)
    _check_blocks(manifest)


def check_attempt(attempt: str) -> None:
    """`FormatError` unless `attempt` is a plain name that can stand in a key."""
    _require(_ATTEMPT.fullmatch(attempt) is not None, "malformed attempt name", attempt)


def attempt_number(attempt: str) -> int:
    """The number of an attempt in its run, from its name."""
    return int(attempt.rpartition("-")[2])


def _require(condition: bool, message: str, found: object = None) -> None:
    if not condition:
        raise FormatError(message, found=None if found is None else repr(found)[:80])


def _check_leaf(leaf: Leaf) -> None:
    itemsize = dtype_of(leaf.dtype).itemsize
    _require(len(leaf.shape) <= MAX_RANK, f"leaf {leaf.path[:80]!r} has too many dimensions")
    nbytes = itemsize
    for length in leaf.shape:
        nbytes *= max(length, 1)
    _require(nbytes <= MAX_LEAF_NBYTES, f"leaf {leaf.path[:80]!r} is absurdly large", leaf.shape)


def _check_shard(shard: Shard, manifest: Manifest) -> None:
    _require(shard.leaf < len(manifest.leaves), "a shard names no leaf", shard.leaf)
    shape = manifest.leaves[shard.leaf].shape
    fits = len(shard.offset) == len(shard.shape) == len(shape) and all(
        o + n <= g for o, n, g in zip(shard.offset, shard.shape, shape, strict=True)
    )
    _require(fits, "a shard's box is not within its leaf", (shard.offset, shard.shape, shape))


def _check_blocks(manifest: Manifest) -> None:
    blocks = manifest.blocks
    count = len(blocks.shard)
    columns: list[list[Any]] = [getattr(blocks, name) for name in Blocks.__struct_fields__]
    _require(all(len(c) == count for c in columns), "the columns of the blocks differ in length")
    for digest in blocks.digest:
        _require(_DIGEST.fullmatch(digest) is not None, "malformed digest", digest)
    for digest in blocks.raw:
        _require(digest == "" or _DIGEST.fullmatch(digest) is not None, "malformed digest", digest)
    shard, start, length = (_integers(c) for c in (blocks.shard, blocks.start, blocks.count))
    codec, pack = _integers(blocks.codec), _integers(blocks.pack)
    _require(bool((shard < len(manifest.shards)).all()), "a block names no shard")
    _require(bool((codec < len(manifest.codecs)).all()), "a block names no codec")
    _require(bool((pack < len(manifest.packs)).all()), "a block names no pack")
    specs = leaf_specs(manifest)
    sizes = _integers([math.prod(s.shape) for s in manifest.shards])
    items = _integers([specs[s.leaf].itemsize for s in manifest.shards])
    if count:
        _require(bool((length > 0).all()), "a block holds no element")
        _require(bool((start + length <= sizes[shard]).all()), "a block leaves its shard")
        _require(
            bool((length * items[shard] <= MAX_BLOCK_NBYTES).all()), "a block is absurdly large"
        )
    _check_tiling(manifest, pack, _integers(blocks.offset), _integers(blocks.nbytes))


def _check_tiling(
    manifest: Manifest,
    pack: NDArray[np.int64],
    offset: NDArray[np.int64],
    nbytes: NDArray[np.int64],
) -> None:
    """Every byte of every pack belongs to exactly one block."""
    order = np.lexsort((nbytes, offset, pack))
    pack, offset, nbytes = pack[order], offset[order], nbytes[order]
    stop = offset + nbytes
    first = np.ones(len(pack), bool)
    first[1:] = pack[1:] != pack[:-1]
    expected = np.where(first, 0, np.concatenate([[0], stop[:-1]]) if len(stop) else stop)
    _require(bool((offset == expected).all()), "blocks overlap or leave a gap in a pack")
    ends = np.zeros(len(manifest.packs), np.int64)
    np.maximum.at(ends, pack, stop)
    lengths = _integers([p.nbytes for p in manifest.packs])
    _require(bool((ends == lengths).all()), "a pack is longer or shorter than its blocks")


def _integers(values: list[int]) -> NDArray[np.int64]:
    return np.asarray(values, np.int64)


def leaf_specs(manifest: Manifest) -> list[LeafSpec]:
    """The leaves of a manifest."""
    return [LeafSpec(leaf.path, leaf.dtype, leaf.shape) for leaf in manifest.leaves]


def iterate_blocks(manifest: Manifest) -> Iterator[Block]:
    """The blocks of a checked manifest, in order."""
    blocks = manifest.blocks
    keys: list[Any] = [pack.key for pack in manifest.packs]
    columns: list[list[Any]] = [getattr(blocks, name) for name in Blocks.__struct_fields__]
    for row in zip(*columns, strict=True):
        shard, start, count, codec, group, pack, offset, nbytes, digest, raw = row
        yield Block(shard, start, count, codec, group, keys[pack], offset, nbytes, digest, raw)
