"""Manifests of all writers as one index: covered exactly once, chained exactly, or refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_store import MemoryStore
from test_reshard import SHAPES, tilings

from asymcheck.commit import (
    CommitRecord,
    ManifestRef,
    ParentRef,
    commit_key,
    committed_steps,
    publish,
    read_commit,
    read_manifests,
    retire,
    seal_commit,
)
from asymcheck.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    StepExistsError,
    UnsupportedVersionError,
)
from asymcheck.index import intersect, load_chain, load_index, merge
from asymcheck.manifest import (
    Blocks,
    CodecUse,
    Leaf,
    Manifest,
    Pack,
    Shard,
    manifest_key,
    pack_key,
    seal_manifest,
)
from asymcheck.records import sha256
from asymcheck.state import ShardSpec

Part = tuple[ShardSpec, int, int]  # a box and the range of its elements that is stored


def manifest_of(
    parts: Sequence[Part],
    shape: tuple[int, ...],
    *,
    step: int = 5,
    writer: int = 0,
    writers: int = 1,
    codec: str = "raw",
    structure: object = None,
    aliases: Sequence[str] = (),
    leaf: str = "w",
    dtype: str = "uint8",
) -> Manifest:
    """One writer's manifest of one leaf, stored in those parts."""
    blocks = Blocks()
    for i, (_, start, count) in enumerate(parts):
        row = [i, start, count, 0, i, 0, sum(blocks.nbytes), count, "0" * 32]
        row.append("" if codec == "raw" else "0" * 32)
        for name, value in zip(Blocks.__struct_fields__, row, strict=True):
            getattr(blocks, name).append(value)
    nbytes = sum(blocks.nbytes)
    return Manifest(
        step=step,
        attempt="run-000000",
        writer=writer,
        writers=writers,
        base_step=None,
        structure={"leaf": "w"} if structure is None else structure,
        leaves=[Leaf(leaf, dtype, tuple(shape), tuple(aliases))],
        shards=[Shard(0, box.offset, box.shape) for box, _, _ in parts],
        codecs=[CodecUse(codec)],
        packs=[Pack(pack_key(step, "run-000000", writer, 0), nbytes)] if nbytes else [],
        blocks=blocks,
    )


def record_of(step: int = 5, parent: ParentRef | None = None, depth: int = 0) -> CommitRecord:
    return CommitRecord(step, "run-000000", [], parent, depth, 0.0)


def whole(box: ShardSpec) -> Part:
    return (box, 0, box.size)


@given(SHAPES.flatmap(lambda s: st.tuples(st.just(s), tilings(s))), st.randoms())
def test_any_tiling_by_any_writers_is_accepted(drawn, random) -> None:
    shape, boxes = drawn
    boxes = [box for box in boxes if box.size]
    writers = random.randint(1, 3)
    shares: list[list[Part]] = [[] for _ in range(writers)]
    for box in boxes:
        cut = random.randint(0, box.size)
        for start, count in ((0, cut), (cut, box.size - cut)):
            if count:
                random.choice(shares).append((box, start, count))
    manifests = [
        manifest_of(share, shape, writer=i, writers=writers) for i, share in enumerate(shares)
    ]
    index = merge(record_of(), "", manifests)
    stored = sorted((b.box.shard.offset, b.block.start, b.block.count) for b in index.blocks())
    assert stored == sorted((box.offset, s, n) for share in shares for box, s, n in share)


@given(SHAPES.flatmap(lambda s: st.tuples(st.just(s), tilings(s))), st.data())
def test_a_part_less_or_more_is_refused(drawn, data: st.DataObject) -> None:
    shape, boxes = drawn
    parts = [whole(box) for box in boxes if box.size]
    position = data.draw(st.integers(0, len(parts) - 1))
    box, start, count = parts[position]
    change = data.draw(st.sampled_from(["missing", "twice", "shorter", "later"]))
    if change == "missing":
        del parts[position]
    elif change == "twice":
        parts.insert(data.draw(st.integers(0, len(parts))), parts[position])
    elif count == 1:
        return
    elif change == "shorter":
        parts[position] = (box, start, count - 1)
    else:
        parts[position] = (box, start + 1, count - 1)
    with pytest.raises(FormatError, match=r"cover it exactly once|missing"):
        merge(record_of(), "", [manifest_of(parts, shape)])


def test_overlapping_boxes_of_the_right_total_are_refused() -> None:
    boxes = [ShardSpec((0, 0), (2, 2)), ShardSpec((1, 1), (2, 2)), ShardSpec((0, 2), (1, 1))]
    with pytest.raises(FormatError, match="exactly once"):
        merge(record_of(), "", [manifest_of([whole(b) for b in boxes], (3, 3))])


def test_a_leaf_of_many_columns_is_not_compared_pair_by_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[ShardSpec] = []
    monkeypatch.setattr(
        "asymcheck.index.intersect", lambda a, b: compared.append(a) or intersect(a, b)
    )
    columns = [whole(ShardSpec((0, i), (4, 1))) for i in range(1000)]
    index = merge(record_of(), "", [manifest_of(columns, (4, 1000))])
    assert len(index.leaves["w"].boxes) == 1000
    assert len(compared) <= 1000


def test_empty_leaves_need_no_block() -> None:
    index = merge(record_of(), "", [manifest_of([], (3, 0))])
    assert index.leaves["w"].spec.shape == (3, 0)
    assert list(index.blocks()) == []


@pytest.mark.parametrize(
    "other",
    [
        manifest_of([], (3,), writer=1, writers=2),
        manifest_of([], (2,), writer=1, writers=2, dtype="int8"),
        manifest_of([], (2,), writer=1, writers=2, aliases=["tied"]),
    ],
    ids=["shape", "dtype", "aliases"],
)
def test_writers_must_describe_a_leaf_alike(other: Manifest) -> None:
    first = manifest_of([whole(ShardSpec((0,), (2,)))], (2,), writers=2)
    with pytest.raises(FormatError, match="describe a leaf differently") as raised:
        merge(record_of(), "", [first, other])
    assert raised.value.leaf == "w"


def test_structures_of_writers_are_united() -> None:
    part = [whole(ShardSpec((0,), (2,)))]
    manifests = [
        manifest_of(part, (2,), writers=2, structure={"dict": [["w", {"leaf": "w"}]]}),
        manifest_of(
            part, (2,), writer=1, writers=2, leaf="v", structure={"dict": [["v", {"leaf": "v"}]]}
        ),
    ]
    index = merge(record_of(), "", manifests)
    assert index.structure == {"dict": [["w", {"leaf": "w"}], ["v", {"leaf": "v"}]]}
    with pytest.raises(FormatError, match="different structures"):
        merge(record_of(), "", [manifests[0], manifest_of(part, (2,), writer=1, writers=2)])


def test_the_structure_may_name_only_stored_leaves() -> None:
    manifest = manifest_of(
        [whole(ShardSpec((0,), (2,)))], (2,), structure={"list": [{"leaf": "w"}, {"leaf": "x"}]}
    )
    with pytest.raises(FormatError, match="names leaves that no manifest holds") as raised:
        merge(record_of(), "", [manifest])
    assert raised.value.leaf == "x"


def test_increments_need_a_parent() -> None:
    manifest = manifest_of([whole(ShardSpec((0,), (2,)))], (2,), codec="delta")
    with pytest.raises(FormatError, match="names no parent"):
        merge(record_of(), "", [manifest])
    merge(record_of(parent=ParentRef(4, "0" * 64), depth=1), "", [manifest])


def test_unknown_codecs_and_impossible_parameters_are_refused() -> None:
    manifest = manifest_of([whole(ShardSpec((0,), (2,)))], (2,), codec="lzma9")
    with pytest.raises(UnsupportedVersionError, match="lzma9"):
        merge(record_of(), "", [manifest])
    for params in ({"keep_fraction": 7}, {"keep_fraction": None}, {}):
        manifest.codecs = [CodecUse("topk", params)]
        with pytest.raises(FormatError, match="topk"):
            merge(record_of(), "", [manifest])


def test_overlapping_blocks_are_found_by_range() -> None:
    box = ShardSpec((0,), (100,))
    parts = [(box, start, 10) for start in range(0, 100, 10)]
    found = merge(record_of(), "", [manifest_of(parts, (100,))]).leaves["w"].boxes[box]
    for start in range(100):
        for stop in range(start, 101):
            blocks = [b.block.start for b in found.overlapping(start, stop)]
            if start < stop:
                assert blocks == [s for s in range(0, 100, 10) if s < stop and start < s + 10]
    assert [b.block.start for b in found.overlapping(0, 0)] == []


# -- in a store --------------------------------------------------------------------------------


def commit(store: MemoryStore, step: int, parent: int | None = None, depth: int = 0) -> None:
    """Store a step of one empty-handed writer."""
    manifest = manifest_of([], (0,), step=step)
    sealed = seal_manifest(manifest)
    key = manifest_key(step, "run-000000", 0)
    store.objects[key] = sealed
    refs = [ManifestRef(key, len(sealed), sha256(sealed))]
    digest = None if parent is None else sha256(store.objects[commit_key(parent)])
    record = CommitRecord(
        step,
        "run-000000",
        refs,
        None if parent is None or digest is None else ParentRef(parent, digest),
        depth,
        0.0,
    )
    publish(store, step, seal_commit(record))


def test_loads_a_chain_down_to_its_base(store: MemoryStore) -> None:
    commit(store, 1)
    commit(store, 3, parent=1, depth=1)
    commit(store, 4, parent=3, depth=2)
    assert [index.step for index in load_chain(store, 4)] == [4, 3, 1]
    assert [index.step for index in load_chain(store, 1)] == [1]
    assert committed_steps(store) == [1, 3, 4]


def test_a_chain_with_a_missing_step_is_refused(store: MemoryStore) -> None:
    commit(store, 1)
    commit(store, 2, parent=1, depth=1)
    commit(store, 3, parent=2, depth=2)
    del store.objects[commit_key(1)]
    with pytest.raises(CorruptionError, match="is gone") as raised:
        load_chain(store, 3)
    assert raised.value.step == 3


def test_a_replaced_base_is_refused(store: MemoryStore) -> None:
    commit(store, 1)
    commit(store, 2, parent=1, depth=1)
    record, _ = read_commit(store, 1)
    record.created_unix_s = 1.0
    store.objects[commit_key(1)] = seal_commit(record)
    with pytest.raises(CorruptionError, match="replaced by another"):
        load_chain(store, 2)


def test_depths_must_count_down(store: MemoryStore) -> None:
    commit(store, 1)
    commit(store, 2, parent=1, depth=2)
    with pytest.raises(FormatError, match="count down"):
        load_chain(store, 2)


def change_record(store: MemoryStore, of: int, **changes: object) -> None:
    record, _ = read_commit(store, of)
    for name, value in changes.items():
        setattr(record, name, value)
    store.objects[commit_key(of)] = seal_commit(record)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"step": 9}, CorruptionError, "another step's"),
        ({"attempt": "../x-000000"}, FormatError, "malformed attempt"),
        ({"depth": 1}, FormatError, "contradicts its parent"),
        ({"parent": ParentRef(1, "0" * 64)}, FormatError, "contradicts its parent"),
        ({"parent": ParentRef(2, "0" * 64), "depth": 1}, FormatError, "not an earlier step"),
        ({"manifests": []}, FormatError, "malformed record"),
        ({"depth": 257}, FormatError, "malformed record"),
        ({"created_unix_s": -1.0}, FormatError, "malformed record"),
        ({"base_at": 0}, FormatError, "announced is not a later attempt"),
        ({"base_at": 10**12}, FormatError, "malformed record"),
        ({"attempt": "run-000001"}, FormatError, "manifest out of place"),
        ({"manifests": [ManifestRef("data/x", 1, "0" * 64)]}, FormatError, "out of place"),
    ],
)
def test_malformed_commit_records_are_refused(
    store: MemoryStore, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    commit(store, 2)
    change_record(store, 2, **changes)
    with pytest.raises(error, match=message):
        load_index(store, 2)


def test_manifests_must_be_the_committed_ones(store: MemoryStore) -> None:
    commit(store, 2)
    key = manifest_key(2, "run-000000", 0)
    good = store.objects.pop(key)
    with pytest.raises(CorruptionError, match="missing or has another length") as raised:
        load_index(store, 2)
    assert raised.value.object == key
    for other in (good + b" ", good[:-1]):
        store.objects[key] = other
        with pytest.raises(CorruptionError, match="manifest"):
            load_index(store, 2)
    store.objects[key] = good[:-1] + b"]"
    with pytest.raises(CorruptionError, match="not the one that was committed"):
        load_index(store, 2)


def test_a_manifest_of_another_step_is_refused(store: MemoryStore) -> None:
    sealed = seal_manifest(manifest_of([], (0,), step=3))
    key = manifest_key(2, "run-000000", 0)
    store.objects[key] = sealed
    refs = [ManifestRef(key, len(sealed), sha256(sealed))]
    publish(store, 2, seal_commit(CommitRecord(2, "run-000000", refs, None, 0, 0.0)))
    record, _ = read_commit(store, 2)
    with pytest.raises(FormatError, match="another step or writer"):
        read_manifests(store, record)


def test_a_step_is_published_once(store: MemoryStore) -> None:
    commit(store, 2)
    first = store.objects[commit_key(2)]
    publish(store, 2, first)  # again by the same writer, who did not hear that it got through
    with pytest.raises(StepExistsError, match="committed already"):
        publish(store, 2, seal_commit(record_of(2)))
    assert store.objects[commit_key(2)] == first


def test_a_missing_step_is_not_found(store: MemoryStore) -> None:
    for read in (read_commit, load_index, load_chain):
        with pytest.raises(CheckpointNotFoundError) as raised:
            read(store, 8)
        assert raised.value.step == 8


def test_a_retired_step_gives_way_but_is_kept(store: MemoryStore) -> None:
    commit(store, 2)
    store.objects[commit_key(2)] = b"damaged"
    retire(store, 2)
    retire(store, 2)
    assert committed_steps(store) == []
    assert [store.objects[key] for key in store.keys("damaged/")] == [b"damaged"]
    commit(store, 2)
    assert committed_steps(store) == [2]


def test_a_record_that_grew_beyond_reading_gives_way(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(store, 2)
    monkeypatch.setattr("asymcheck.commit.MAX_COMMIT_NBYTES", 10)
    with pytest.raises(CorruptionError, match="cannot be whole"):
        read_commit(store, 2)
    retire(store, 2)
    assert committed_steps(store) == []


def test_only_names_of_steps_are_steps(store: MemoryStore) -> None:
    commit(store, 2)
    for name in ("latest", "2.json", "0000000000000003.json.tmp", "x/0000000000000003.json"):
        store.objects[f"commits/{name}"] = b""
    assert committed_steps(store) == [2]


def test_an_alias_must_not_be_another_writers_leaf() -> None:
    """A reader would take one leaf for the other."""
    box = ShardSpec.whole((4,))
    structure = {"dict": [["w", {"leaf": "w"}], ["v", {"leaf": "w"}]]}
    first = manifest_of([whole(box)], (4,), writers=2, structure=structure, aliases=["v"])
    second = manifest_of([whole(box)], (4,), writer=1, writers=2, structure=structure, leaf="v")
    with pytest.raises(FormatError, match="a path stands for two leaves"):
        merge(record_of(), "", [first, second])


def test_a_manifest_must_name_the_commit_records_base() -> None:
    box = ShardSpec.whole((4,))
    manifest = manifest_of([whole(box)], (4,), codec="delta")
    manifest.base_step = 3
    with pytest.raises(FormatError, match="another base"):
        merge(record_of(parent=ParentRef(4, "0" * 64), depth=1), "", [manifest])
    merge(record_of(parent=ParentRef(3, "0" * 64), depth=1), "", [manifest])


def test_a_raw_block_has_one_digest_and_a_coded_one_two() -> None:
    box = ShardSpec.whole((4,))
    for codec, raw in (("raw", "0" * 32), ("plane", "")):
        manifest = manifest_of([whole(box)], (4,), codec=codec)
        manifest.blocks.raw[0] = raw
        with pytest.raises(FormatError, match="second digest"):
            merge(record_of(), "", [manifest])
