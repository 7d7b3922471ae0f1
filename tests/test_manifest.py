"""Manifests: what `check` guarantees to a reader, rule by rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asymcheck.errors import CorruptionError, FormatError, UnsupportedVersionError
from asymcheck.manifest import (
    MAX_BLOCK_NBYTES,
    MAX_LEAF_NBYTES,
    MAX_RANK,
    MAX_TEXT,
    Blocks,
    CodecUse,
    Leaf,
    Manifest,
    Pack,
    Shard,
    check,
    data_prefix,
    iterate_blocks,
    leaf_specs,
    manifest_key,
    pack_key,
    parse_manifest,
    seal_manifest,
)
from asymcheck.records import seal
from asymcheck.state import LeafSpec
from asymcheck.stores.base import is_key

DIGEST = "0123456789abcdef" * 2


def example() -> Manifest:
    """Two leaves; a/w in two blocks of two packs, b a scalar in the first pack."""
    return Manifest(
        step=7,
        attempt="run-000001",
        writer=0,
        writers=1,
        base_step=None,
        structure={"dict": [["a", {"dict": [["w", {"leaf": "a/w"}]]}], ["b", {"scalar": "b"}]]},
        leaves=[Leaf("a/w", "float32", (4, 5), ("tied",)), Leaf("b", "int8", ())],
        shards=[Shard(0, (0, 0), (4, 5)), Shard(1, (), ())],
        codecs=[CodecUse("raw"), CodecUse("plane")],
        packs=[
            Pack(pack_key(7, "run-000001", 0, 0), 49),
            Pack(pack_key(7, "run-000001", 0, 1), 9),
        ],
        blocks=Blocks(
            shard=[0, 1, 0],
            start=[0, 0, 12],
            count=[12, 1, 8],
            codec=[0, 0, 1],
            group=[0, 1, 2],
            pack=[0, 0, 1],
            offset=[0, 48, 0],
            nbytes=[48, 1, 9],
            digest=[DIGEST] * 3,
            raw=["", "", DIGEST],
        ),
        metadata={"epoch": 3},
    )


def test_round_trip() -> None:
    manifest = example()
    back = parse_manifest(seal_manifest(manifest), object="k")
    assert back == manifest
    assert leaf_specs(back) == [LeafSpec("a/w", "float32", (4, 5)), LeafSpec("b", "int8", ())]
    first, second, third = iterate_blocks(back)
    assert (first.shard, first.start, first.stop, first.offset, first.nbytes) == (0, 0, 12, 0, 48)
    assert second.key == first.key == pack_key(7, "run-000001", 0, 0)
    assert (third.key, third.codec, third.raw) == (pack_key(7, "run-000001", 0, 1), 1, DIGEST)


def test_an_empty_manifest_is_one() -> None:
    manifest = Manifest(0, "r-000000", 0, 1, None, {"dict": []}, [], [], [], [], Blocks())
    assert parse_manifest(seal_manifest(manifest), object="k") == manifest


def put(path: str, value: Any) -> Callable[[Manifest], None]:
    """Set `leaves.0.shape` and the like."""

    def change(manifest: Manifest) -> None:
        *way, last = path.split(".")
        target: Any = manifest
        for name in way:
            target = target[int(name)] if name.isdigit() else getattr(target, name)
        if last.isdigit():
            target[int(last)] = value
        else:
            setattr(target, last, value)

    return change


BROKEN = {
    "attempt with a slash": (put("attempt", "run/../x-000001"), "malformed attempt"),
    "attempt without a number": (put("attempt", "run"), "malformed attempt"),
    "writer beyond writers": (put("writer", 1), "not below their count"),
    "base not earlier": (put("base_step", 7), "not an earlier step"),
    "rank": (put("leaves.0.shape", [1] * (MAX_RANK + 1)), "too many dimensions"),
    "absurd leaf": (put("leaves.0.shape", [MAX_LEAF_NBYTES // 4, 2]), "absurdly large"),
    "absurd empty leaf": (put("leaves.0.shape", [0, 2**52, 2**52]), "absurdly large"),
    "path twice": (put("leaves.1.path", "a/w"), "appears twice"),
    "alias twice": (put("leaves.0.aliases", ["b"]), "appears twice"),
    "structure": (put("structure", {"os": "system"}), "unknown kind"),
    "shard without leaf": (put("shards.0.leaf", 2), "names no leaf"),
    "shard of other rank": (put("shards.0.shape", [20]), "not within its leaf"),
    "shard offset of other rank": (put("shards.0.offset", [0]), "not within its leaf"),
    "shard outside": (put("shards.0.offset", [0, 1]), "not within its leaf"),
    "pack elsewhere": (put("packs.0.key", "data/x.pack"), "not lie in its place"),
    "pack of another writer": (put("packs.0.key", pack_key(7, "run-000001", 1, 0)), "its place"),
    "pack out of the root": (put("packs.0.key", "../../etc/passwd"), "not lie in its place"),
    "pack longer": (put("packs.0.nbytes", 50), "longer or shorter"),
    "pack shorter": (put("packs.1.nbytes", 8), "longer or shorter"),
    "pack without blocks": (
        lambda m: m.packs.append(Pack(pack_key(7, "run-000001", 0, 2), 5)),
        "longer or shorter",
    ),
    "columns of other lengths": (lambda m: m.blocks.raw.pop(), "differ in length"),
    "digest": (put("blocks.digest.1", "xyz"), "malformed digest"),
    "digest in capitals": (put("blocks.digest.1", DIGEST.upper()), "malformed digest"),
    "raw digest": (put("blocks.raw.1", "0"), "malformed digest"),
    "block without shard": (put("blocks.shard.1", 2), "names no shard"),
    "block without codec": (put("blocks.codec.1", 2), "names no codec"),
    "block without pack": (put("blocks.pack.1", 2), "names no pack"),
    "empty block": (put("blocks.count.1", 0), "holds no element"),
    "block beyond its shard": (put("blocks.count.2", 9), "leaves its shard"),
    "overlapping blocks": (put("blocks.offset.1", 47), "overlap or leave a gap"),
    "gap between blocks": (put("blocks.offset.1", 49), "overlap or leave a gap"),
    "gap at the start": (put("blocks.offset.0", 1), "overlap or leave a gap"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_refuses(name: str) -> None:
    change, message = BROKEN[name]
    manifest = example()
    change(manifest)
    with pytest.raises(FormatError, match=message):
        check(manifest)
    with pytest.raises(FormatError, match=message) as raised:
        parse_manifest(seal_manifest(manifest), object="some/key")
    assert (raised.value.object, raised.value.step) == ("some/key", 7)


def test_refuses_an_absurd_block() -> None:
    manifest = example()
    count = MAX_BLOCK_NBYTES + 1
    manifest.leaves[1].shape = [count]
    manifest.shards[1] = Shard(1, [0], [count])
    manifest.blocks.count[1] = count
    with pytest.raises(FormatError, match="block is absurdly large"):
        check(manifest)


def test_refuses_an_unknown_dtype_by_name() -> None:
    manifest = example()
    manifest.leaves[0].dtype = "float7"
    with pytest.raises(UnsupportedVersionError, match="float7"):
        parse_manifest(seal_manifest(manifest), object="k")


OUT_OF_TYPE = {
    "negative step": put("step", -1),
    "huge step": put("step", 2**53),
    "float step": put("step", 1.0),
    "negative offset": put("blocks.offset.0", -1),
    "huge offset": put("blocks.offset.0", 2**53),
    "text as count": put("blocks.count.0", "12"),
    "bool as count": put("blocks.count.0", True),
    "long path": put("leaves.0.path", "x" * (MAX_TEXT + 1)),
    "no writers": put("writers", 0),
    "metadata of another kind": put("metadata", [1]),
}


@pytest.mark.parametrize("name", OUT_OF_TYPE)
def test_refuses_values_of_other_types(name: str) -> None:
    manifest = example()
    OUT_OF_TYPE[name](manifest)
    with pytest.raises(FormatError, match="malformed record"):
        parse_manifest(seal_manifest(manifest), object="k")


def test_refuses_another_record() -> None:
    with pytest.raises(CorruptionError):
        parse_manifest(seal("commit", example()), object="k")


@given(st.integers(0, 2**53 - 1), st.integers(0, 10**6), st.integers(0, 10**7))
def test_keys_are_keys_and_sort_by_step(step: int, writer: int, sequence: int) -> None:
    attempt = "a" * 32 + "-000000"
    keys = [manifest_key(step, attempt, writer), pack_key(step, attempt, writer, sequence)]
    assert all(is_key(key) and key.startswith(data_prefix(step, attempt)) for key in keys)
    assert data_prefix(step, attempt) < data_prefix(step + 1, attempt)


@given(st.data())
def test_blocks_always_tile_their_packs(data: st.DataObject) -> None:
    """A checked manifest maps every byte of every pack to one block, whatever was drawn."""
    manifest = example()
    blocks = manifest.blocks
    for column in (blocks.pack, blocks.offset, blocks.nbytes):
        position = data.draw(st.integers(0, 2))
        column[position] = data.draw(st.integers(0, 60))
    try:
        check(manifest)
    except FormatError:
        return
    owners = {(p, i): 0 for p, pack in enumerate(manifest.packs) for i in range(pack.nbytes)}
    for pack, offset, nbytes in zip(blocks.pack, blocks.offset, blocks.nbytes, strict=True):
        for i in range(offset, offset + nbytes):
            owners[pack, i] += 1
    assert set(owners.values()) == {1}
