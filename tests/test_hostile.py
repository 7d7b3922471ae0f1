"""Checkpoints made to harm: refused by name, at once, with little memory, reading nothing else."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from crash_oracle import same
from hostile_records import (
    BASE,
    TARGET,
    Json,
    Objects,
    add,
    assign,
    attempt_of,
    body_of,
    checkpointer_over,
    encoded,
    forge,
    honest_run,
    honest_state,
    key_of_manifest,
    remove,
    sealed,
    store_of,
)

from asymcheck import Always, Checkpointer, CostModel, Strategy, open_checkpoint
from asymcheck.commit import commit_key
from asymcheck.errors import (
    AsymCheckError,
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    StoreError,
    UnsupportedVersionError,
)
from asymcheck.lease import live_runs
from asymcheck.manifest import pack_key
from asymcheck.reader import open_step
from asymcheck.retention import collect_orphans
from asymcheck.stores import LocalStore

pytestmark = pytest.mark.timeout(20)  # a quadratic check of what follows takes far longer

MAX_PEAK_NBYTES = 16 << 20
HUGE = 1 << 60

Change = Callable[[Json], object]


@pytest.fixture(scope="module")
def honest() -> Objects:
    return honest_run()


@contextmanager
def little_memory(limit_nbytes: int = MAX_PEAK_NBYTES) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit_nbytes, f"{peak} bytes were allocated"


def refused(objects: Objects, step: int = TARGET) -> AsymCheckError:
    """The error with which a step is refused, before anything of its state is returned."""
    with little_memory():
        with pytest.raises(AsymCheckError) as raised:
            open_step(store_of(objects), step, threads=1).state()
        with pytest.raises(AsymCheckError):
            open_step(store_of(objects), step, threads=1).verify()
        checkpointer = checkpointer_over(objects)
        if isinstance(raised.value, UnsupportedVersionError):
            # Not damage: an older step must not take the place of one that a later version wrote.
            with pytest.raises(UnsupportedVersionError):
                checkpointer.restore()
        else:
            assert same(checkpointer.restore(), honest_state(BASE))
    assert raised.value.step is not None or raised.value.object is not None
    return raised.value


def all_of(*changes: Change) -> Change:
    def change(record: Json) -> None:
        for each in changes:
            each(record)

    return change


def append(*path: str | int, value: object) -> Change:
    def change(record: Any) -> None:
        for name in path:
            record = record[name]
        record.append(value)

    return change


def test_the_honest_run_is_taken(honest: Objects):
    store = store_of(forge(honest))
    open_step(store, TARGET).verify()
    assert same(open_step(store, TARGET).state(), honest_state(TARGET))
    assert same(open_step(store, BASE).state(), honest_state(BASE))


# Manifests that lie

DIGEST = "0" * 32
OUTSIDE = [
    "../../etc/passwd",
    "/etc/passwd",
    f"data/{TARGET:016d}-{attempt_of(TARGET)}/../../../secret",
    f"data/{TARGET:016d}-{attempt_of(TARGET)}/w00000-000001.pack",
    pack_key(BASE, attempt_of(BASE), 0, 0),
    "",
    "data\u0000",
    "commits/0000000000000001.json",
]
NUMBERS = [-1, HUGE, 10**400, 1.5, True, None, "1", [1], {}, 1 << 53]
NUMBER_PLACES: list[tuple[str | int, ...]] = [
    ("step",),
    ("writer",),
    ("writers",),
    ("base_step",),
    ("leaves", 0, "shape", 0),
    ("shards", 0, "leaf"),
    ("shards", 0, "offset", 1),
    ("shards", 0, "shape", 1),
    ("packs", 0, "nbytes"),
    *(
        ("blocks", column, 1)
        for column in ("shard", "start", "count", "codec", "pack", "offset", "nbytes")
    ),
]

LIES: dict[str, Change] = {
    **{f"pack-key-{i}": assign("packs", 0, "key", value=key) for i, key in enumerate(OUTSIDE)},
    "attempt-escapes": assign("attempt", value="../../x-000001"),
    "attempt-of-another": assign("attempt", value="other-000001"),
    "step-of-another": assign("step", value=BASE),
    "writer-of-another": all_of(assign("writer", value=1), assign("writers", value=2)),
    "writers-more": assign("writers", value=2),
    "base-forward": assign("base_step", value=TARGET + 1),
    "base-itself": assign("base_step", value=TARGET),
    "unknown-member": assign("extra", value=1),
    "member-missing": remove("blocks"),
    "record-is-a-list": assign("leaves", value={}),
    "dtype-unknown": assign("leaves", 0, "dtype", value="float31"),
    "dtype-object": assign("leaves", 0, "dtype", value="object"),
    "dtype-other-size": assign("leaves", 0, "dtype", value="float64"),
    "dtype-same-size": assign("leaves", 0, "dtype", value="complex128"),
    "path-twice": assign("leaves", 1, "path", value="params/w"),
    "path-is-an-alias": assign("leaves", 1, "aliases", value=["params/w"]),
    "path-endless": assign("leaves", 0, "path", value="x" * 5000),
    "path-of-nobody": assign("leaves", 0, "path", value="params/other"),
    "shape-huge": assign("leaves", 0, "shape", value=[HUGE, HUGE]),
    "shape-overflows": assign("leaves", 0, "shape", value=[1 << 33, 1 << 33]),
    "shape-empty-but-huge": assign("leaves", 0, "shape", value=[0, 1 << 52]),
    "shape-larger-than-shards": assign("leaves", 0, "shape", value=[3, 60]),
    "shape-terabyte": all_of(
        assign("leaves", 0, "shape", value=[2, 1 << 38]),
        assign("shards", 0, "shape", value=[2, 1 << 38]),
    ),
    "rank-of-a-thousand": all_of(
        assign("leaves", 0, "shape", value=[1] * 1000 + [2, 60]),
        assign("shards", 0, "shape", value=[1] * 1000 + [2, 60]),
        assign("shards", 0, "offset", value=[0] * 1002),
    ),
    "rank-differs": assign("shards", 0, "offset", value=[0]),
    "shard-leaves-its-leaf": assign("shards", 0, "offset", value=[1, 0]),
    "shard-missing": all_of(assign("shards", 0, "leaf", value=1)),
    "shards-overlap": append("shards", value={"leaf": 0, "offset": [0, 0], "shape": [1, 60]}),
    "block-missing": all_of(*(remove("blocks", c, 1) for c in ("start", "count"))),
    "block-rows-missing": lambda m: [column.pop(1) for column in m["blocks"].values()],
    "block-twice": lambda m: [column.append(column[0]) for column in m["blocks"].values()],
    "block-empty": assign("blocks", "count", 0, value=0),
    "blocks-gap": add("blocks", "offset", 1, number=1),
    "blocks-overlap": add("blocks", "offset", 1, number=-1),
    "pack-longer": add("packs", 0, "nbytes", number=1),
    "pack-without-blocks": append(
        "packs", value={"key": pack_key(TARGET, attempt_of(TARGET), 0, 1), "nbytes": HUGE // 1024}
    ),
    "block-absurd": all_of(
        assign("leaves", 0, "shape", value=[2, 1 << 30]),
        assign("shards", 0, "shape", value=[2, 1 << 30]),
        assign("blocks", "count", 0, value=1 << 31),
    ),
    "block-longer-than-it-can-be": all_of(
        add("blocks", "nbytes", 3, number=1 << 40),
        add("packs", 0, "nbytes", number=1 << 40),
    ),
    "digest-short": assign("blocks", "digest", 0, value="0"),
    "digest-capitals": assign("blocks", "digest", 0, value="A" * 32),
    "digest-other": assign("blocks", "digest", 0, value=DIGEST),
    "raw-digest-other": assign("blocks", "raw", 0, value=DIGEST),
    "raw-digest-none": assign("blocks", "raw", 0, value=""),
    "codec-unknown": assign("codecs", 0, "id", value="pickle"),
    "codec-path": assign("codecs", 0, "id", value="../evil"),
    "codec-params-more": assign("codecs", 0, "params", value={"level": 3}),
    "codec-params-missing": assign("codecs", 0, value={"id": "zstd", "params": {}}),
    **{
        f"codec-params-{i}": assign("codecs", 0, value={"id": "zstd", "params": {"level": level}})
        for i, level in enumerate(["3", True, 1.0, None, [], {}, -5, 1 << 70, "x" * 1000])
    },
    "codec-params-fraction": assign(
        "codecs", 0, value={"id": "topk", "params": {"keep_fraction": 7}}
    ),
    "codec-other": assign("codecs", 0, "id", value="raw"),
    "codec-without-base": assign("codecs", 0, "id", value="plane"),
    "structure-no-object": assign("structure", value=7),
    "structure-two-members": assign("structure", value={"list": [], "tuple": []}),
    "structure-unknown-node": assign("structure", value={"object": "os.system"}),
    "structure-names-nobody": assign("structure", value={"leaf": "params/none"}),
    "structure-key-list": assign("structure", value={"dict": [[["x"], None]]}),
    "structure-key-twice": assign("structure", value={"dict": [["x", None], ["x", None]]}),
    "structure-key-same-path": assign("structure", value={"dict": [["1", None], [1, None]]}),
    "structure-pair-of-three": assign("structure", value={"dict": [["x", None, None]]}),
    "structure-int": assign("structure", value={"int": "0x10"}),
    "structure-int-endless": assign("structure", value={"int": "9" * 100_000}),
    "structure-float": assign("structure", value={"float": "1e" + "9" * 1000}),
    "structure-float-huge": assign("structure", value={"float": "0x1p99999999999"}),
    "structure-complex": assign("structure", value={"complex": ["0x0p0"]}),
    "leaves-none": assign("leaves", value=[]),
    **{
        f"{'-'.join(map(str, place))}={str(number)[:12]}": assign(*place, value=number)
        for place in NUMBER_PLACES
        for number in NUMBERS
        if not (place == ("base_step",) and number is None)  # which says nothing
    },
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies(honest: Objects, lie: str):
    error = refused(forge(honest, LIES[lie]))
    assert isinstance(error, FormatError | CorruptionError), repr(error)


def nested(levels: int, opening: bytes, closing: bytes) -> bytes:
    return opening * levels + b"null" + closing * levels


NESTS = {
    "lists": (b"[", b"]"),
    "objects": (b'{"x":', b"}"),
    "list-nodes": (b'{"list":[', b"]}"),
    "dict-nodes": (b'{"dict":[["k",', b"]]}"),
}


@pytest.mark.parametrize("levels", [60, 200, 900, 940, 960, 970, 975, 980, 985, 990, 995, 100_000])
@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("member", ["structure", "metadata", "params", "warm_start"])
def test_nested_without_end(honest: Objects, nest: str, levels: int, member: str):
    """Refused, or (what nobody walks through) returned as it is; never a `RecursionError`."""
    places = {
        "structure": (b'"structure":', b'"structure":%s,"metadata":{"was":'),
        "metadata": (b'"metadata":{', b'"metadata":{"deep":%s'),
        "params": (b'"params":{', b'"params":{"deep":%s'),
        "warm_start": (b'"warm_start":{', b'"warm_start":{"deep":%s,'),
    }
    deep = nested(levels, *NESTS[nest])
    old, new = places[member]

    def nest_it(body: bytes) -> bytes:
        if member == "structure":
            document = json.loads(body)
            document["structure"] = "HERE"
            return encoded(document).replace(b'"HERE"', deep)
        return body.replace(old, new % deep, 1)

    objects = forge(honest, body=nest_it)
    with little_memory():
        try:
            open_step(store_of(objects), TARGET, threads=1).state()
        except AsymCheckError:
            return
        assert member != "params"
        assert levels < 1000


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"writer":0', b'"writer":0,"writer":0'),
        (b'"leaf":0', b'"leaf":0,"leaf":0'),
        (b'"metadata":{}', b'"metadata":{"a":NaN}'),
        (b'"metadata":{}', b'"metadata":{"a":Infinity}'),
        (b'"metadata":{}', b'"metadata":{"a":-Infinity}'),
        (b'"metadata":{}', b'"metadata":{"a":1e999}'),
        (b'"metadata":{}', b'"metadata":{"a":1,"a":1}'),
        (b'"writer":0', b'"writer":' + b"1" * 5000),
        (b'"writer":0', b'"writer":00'),
        (b'"writer":0', b'"writer":0,'),
        (b'"writer":0', b'"writer":"\xff"'),
        (b'"writer":0', b'"writer":0 /* */'),
        (b'{"step"', b'\xef\xbb\xbf{"step"'),
        (b'{"step"', b' [{"step"'),
        (b'"metadata":{}', b'"metadata":null'),
        (b'"metadata":{}', b'"metadata":[]'),
    ],
)
def test_json_that_is_none(honest: Objects, old: bytes, new: bytes):
    assert old in body_of(honest[key_of_manifest()])
    error = refused(forge(honest, body=lambda text: text.replace(old, new, 1)))
    assert isinstance(error, FormatError)


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"null", b"1", b'"x"', b"{", b"\0" * 100])
def test_bodies_that_are_no_record(honest: Objects, body: bytes):
    assert isinstance(refused(forge(honest, body=lambda _: body)), FormatError)
    assert isinstance(refused(forge(honest, commit_body=lambda _: body)), FormatError)


@pytest.mark.parametrize("version", [0, 2, 999_999])
def test_other_versions_are_refused_by_name(honest: Objects, version: int):
    error = refused(forge(honest, version=version))
    assert isinstance(error, UnsupportedVersionError)
    assert (error.expected, error.found) == (1, version)
    record = sealed("commit", body_of(honest[commit_key(TARGET)]), version)
    assert isinstance(refused({**honest, commit_key(TARGET): record}), UnsupportedVersionError)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\n",
        b"asymcheck\n",
        b"asymcheck commit 1\n",
        b"asymcheck commit -1 " + b"0" * 64 + b" 10\n",
        b"asymcheck commit 1 " + b"0" * 64 + b" 99999999999999999999\n",
        b"asymcheck commit 1 " + b"0" * 64 + b" 10" + b" " * 1000 + b"\n",
        b"asymcheck lease 1 " + b"0" * 64 + b" 10\n",
        b"x" * 100_000,
        "asymcheck commit \u0661 ".encode() + b"0" * 64 + b" 10\n",
    ],
)
def test_headers_that_are_none(honest: Objects, header: bytes):
    key = commit_key(TARGET)
    assert isinstance(refused({**honest, key: header + body_of(honest[key])}), CorruptionError)


# Commit records that lie

COMMIT_LIES: dict[str, Change] = {
    "step-of-another": assign("step", value=BASE),
    "step-huge": assign("step", value=HUGE),
    "attempt-escapes": assign("attempt", value="../../x-000001"),
    "attempt-of-another": assign("attempt", value=attempt_of(BASE)),
    "no-manifests": assign("manifests", value=[]),
    "manifest-elsewhere": assign("manifests", 0, "key", value="../../../etc/passwd"),
    "manifest-of-another": assign("manifests", 0, "key", value=key_of_manifest(BASE)),
    "manifest-huge": assign("manifests", 0, "nbytes", value=HUGE),
    "manifest-negative": assign("manifests", 0, "nbytes", value=-1),
    "manifest-longer": assign("manifests", 0, "nbytes", value=1 << 28),
    "manifest-digest": assign("manifests", 0, "sha256", value="0" * 64),
    "manifest-digest-short": assign("manifests", 0, "sha256", value="0"),
    "two-writers": lambda c: c["manifests"].append(c["manifests"][0]),
    "parent-itself": assign("parent", "step", value=TARGET),
    "parent-forward": assign("parent", "step", value=TARGET + 5),
    "parent-missing": assign("parent", "step", value=0),
    "parent-digest": assign("parent", "sha256", value="0" * 64),
    "parent-none": assign("parent", value=None),
    "parent-none-but-deep": all_of(assign("parent", value=None), assign("depth", value=0)),
    "depth-zero": assign("depth", value=0),
    "depth-two": assign("depth", value=2),
    "depth-huge": assign("depth", value=HUGE),
    "created-never": assign("created_unix_s", value=-1),
    "created-text": assign("created_unix_s", value="now"),
    "base-at-itself": assign("base_at", value=TARGET - 1),
    "base-at-before": assign("base_at", value=0),
    "base-at-negative": assign("base_at", value=-1),
    "base-at-huge": assign("base_at", value=10**12),
    "base-at-text": assign("base_at", value="5"),
    "base-at-fraction": assign("base_at", value=5.5),
    "base-at-true": assign("base_at", value=True),
    "unknown-member": assign("latest", value=True),
}


@pytest.mark.parametrize("lie", COMMIT_LIES)
def test_a_commit_record_that_lies(honest: Objects, lie: str):
    error = refused(forge(honest, of_commit=COMMIT_LIES[lie]))
    assert isinstance(error, FormatError | CorruptionError | CheckpointNotFoundError), repr(error)


@pytest.mark.parametrize("base_at", [TARGET, 10**12 - 1, None])
def test_an_announced_base_says_nothing_to_readers(honest: Objects, base_at: int | None):
    step = open_step(store_of(forge(honest, of_commit=assign("base_at", value=base_at))), TARGET)
    assert same(step.state(), honest_state(TARGET))


def test_a_chain_that_loops(honest: Objects):
    """Step 1 claims to build on step 2, which builds on step 1."""
    parent = {"step": TARGET, "sha256": "0" * 64}
    looped = forge(
        honest,
        of_commit=all_of(assign("parent", value=parent), assign("depth", value=1)),
        step=BASE,
    )
    with pytest.raises(FormatError, match="not an earlier step"):
        open_step(store_of(looped), BASE)
    with pytest.raises(AsymCheckError):
        open_step(store_of(looped), TARGET)


def test_a_chain_that_is_too_long(honest: Objects):
    with pytest.raises(FormatError):
        open_step(store_of(forge(honest, of_commit=assign("depth", value=1 << 17))), TARGET)


# Much of it


def with_leaves(count: int) -> Change:
    def change(manifest: Json) -> None:
        manifest["leaves"] += [
            {"path": f"x/{i}", "dtype": "uint8", "shape": [1 << 40], "aliases": []}
            for i in range(count)
        ]

    return change


def test_very_many_manifests(honest: Objects):
    objects = forge(honest, of_commit=lambda c: c["manifests"].extend(c["manifests"] * 200_000))
    nbytes = len(objects[commit_key(TARGET)])
    with little_memory(40 * nbytes), pytest.raises(FormatError):
        open_step(store_of(objects), TARGET)


def test_very_many_leaves(honest: Objects):
    objects = forge(honest, with_leaves(100_000))
    nbytes = len(objects[key_of_manifest()])
    with little_memory(40 * nbytes), pytest.raises(FormatError):
        open_step(store_of(objects), TARGET)


def cut_into(boxes: list[tuple[list[int], list[int]]], shape: list[int]) -> Change:
    """Leaf 0 in many boxes, stored in blocks that are as good as any."""

    def change(manifest: Json) -> None:
        manifest["leaves"][0]["shape"] = shape
        manifest["shards"][0] = {"leaf": 1, "offset": [0, 0], "shape": [0, 60]}
        manifest["shards"] += [{"leaf": 0, "offset": o, "shape": s} for o, s in boxes]

    return change


SIDE = 20_000


@pytest.mark.parametrize(
    "boxes",
    [
        [([0, i], [SIDE, 1]) for i in range(SIDE)],
        [([i, 0], [1, SIDE]) for i in range(SIDE)],
        [b for i in range(SIDE) for b in (([0, i], [i, 1]), ([i, i], [SIDE - i, 1]))],
        [([i, j], [1, 1]) for i in range(200) for j in range(200)],
        [([0, 0], [SIDE, SIDE]), *(([i, i], [1, 1]) for i in range(SIDE))],
    ],
    ids=["columns", "rows", "staircase", "grid", "overlapping"],
)
def test_very_many_boxes(honest: Objects, boxes: list[tuple[list[int], list[int]]]):
    side = 200 if boxes[-1] == ([199, 199], [1, 1]) and len(boxes) == 40_000 else SIDE
    objects = forge(honest, cut_into(boxes, [side, side]))
    nbytes = len(objects[key_of_manifest()])
    with little_memory(60 * nbytes), pytest.raises(FormatError):
        open_step(store_of(objects), TARGET)


def test_very_many_blocks(honest: Objects):
    """A quarter of a million empty-handed blocks."""

    def change(manifest: Json) -> None:
        for name, column in manifest["blocks"].items():
            column.extend([column[0]] * 250_000 if name != "offset" else [0] * 250_000)

    objects = forge(honest, change)
    nbytes = len(objects[key_of_manifest()])
    with little_memory(40 * nbytes), pytest.raises(FormatError):
        open_step(store_of(objects), TARGET)


def test_verify_needs_no_memory_for_the_whole_state(tmp_path: Path):
    """A state of which a few bytes on disk claim to be very much is verified in pieces."""
    state = {"params": {"w": np.zeros(192 << 20, np.uint8)}}
    strategy = Strategy("plane", Always("plane"), windows=False, batched=True, blocking=False)
    with Checkpointer(tmp_path, strategy=strategy, cost_model=CostModel()) as checkpointer:
        checkpointer.save(1, state)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.pack")) < 1 << 20
    with open_checkpoint(tmp_path) as checkpoint, little_memory(128 << 20):
        checkpoint.verify()


# Frames and payloads that lie


def with_payload(honest: Objects, payload: bytes, codec: str) -> Objects:
    """Leaf "n" (8 bytes) of the base as this payload, with digests that fit."""
    key = pack_key(BASE, attempt_of(BASE), 0, 0)
    manifest = json.loads(body_of(honest[key_of_manifest(BASE)]))
    blocks = manifest["blocks"]
    row = blocks["shard"].index(2)
    begin, end = blocks["offset"][row], blocks["offset"][row] + blocks["nbytes"][row]
    pack = honest[key][:begin] + payload + honest[key][end:]

    def change(record: Json) -> None:
        rows = record["blocks"]
        rows["nbytes"][row] = len(payload)
        rows["digest"][row] = xxhash.xxh3_128_hexdigest(payload)
        rows["offset"] = [
            o + len(payload) - (end - begin) if o > begin else o for o in rows["offset"]
        ]
        record["packs"][0]["nbytes"] = len(pack)
        record["codecs"].append({"id": codec, "params": {"level": 1} if codec == "zstd" else {}})
        rows["codec"][row] = len(record["codecs"]) - 1

    return {**forge(honest, change, step=BASE), key: pack}


def frame_of(content_nbytes: int) -> bytes:
    """A zstd frame header that declares so many bytes of content, and one raw block."""
    return bytes.fromhex("28b52ffd") + b"\xe0" + struct.pack("<Q", content_nbytes) + b"\x01\x00\x00"


@pytest.mark.parametrize(
    ("codec", "payload"),
    [
        ("zstd", frame_of(1 << 40)),
        ("zstd", frame_of(8)),
        ("zstd", b""),
        ("zstd", b"\0" * 64),
        ("plane", b""),
        ("plane", b"\x08" + struct.pack("<BQ", 1, 1 << 60) * 8),
        (
            "plane",
            b"\x08" + struct.pack("<BQ", 1, len(frame_of(1 << 40))) * 8 + frame_of(1 << 40) * 8,
        ),
        ("plane", b"\xff" * 200),
        ("raw", b"\0" * 7),
        ("raw", b"\0" * 9),
        ("topk", b"\x00"),
        ("delta", b"\x08" + struct.pack("<BQ", 2, 1) * 8 + b"\0" * 8),
    ],
)
def test_a_payload_that_lies(honest: Objects, codec: str, payload: bytes):
    objects = with_payload(honest, payload, codec)
    with little_memory():
        for step in (BASE, TARGET):
            with pytest.raises(AsymCheckError) as raised:
                open_step(store_of(objects), step, threads=1).state()
        assert raised.value.step is not None
        with pytest.raises(CheckpointNotFoundError):
            checkpointer_over(objects).restore()


# What a run that goes on must not believe


@pytest.mark.parametrize(
    "warm_start",
    [
        {"cost": None},
        {"cost": {"costs": {"put": {"alpha_s": -1, "beta_s_per_byte": 1}}, "ratios": []}},
        {"cost": []},
        {"cost": {"costs": {"encode:" + "x" * 1000: {}}, "ratios": []}},
        {"profile": None},
        {"profile": 7},
        {"profile": {"windows": [{"phase": "sideways"}]}},
        {"profile": {"windows": [["forward", 0, -1.0]]}},
        {"cost": {"costs": {}, "ratios": [{}]}, "profile": {"windows": {}}},
    ],
)
def test_a_warm_start_that_lies_does_not_stop_a_run(honest: Objects, warm_start: Json):
    objects = forge(honest, assign("warm_start", value=warm_start))
    with Checkpointer(
        store_of(objects), strategy="asymcheck", max_host_bytes=1 << 20
    ) as checkpointer:
        assert same(checkpointer.restore(), honest_state(TARGET))
        checkpointer.save(TARGET + 1, honest_state(TARGET + 1))
    assert same(open_step(store_of(objects), TARGET + 1).state(), honest_state(TARGET + 1))


LEASES = {
    "empty": b"",
    "garbage": b"\xff" * 1000,
    "long": b"x" * 100_000,
    "nan": sealed("lease", b'{"run":"evil","process":"p","expires_unix_s":NaN}'),
    "future": sealed("lease", b'{"run":"evil","process":"p","expires_unix_s":1e300}'),
    "endless": sealed("lease", b'{"run":"evil","process":"p","expires_unix_s":1e999}'),
    "text": sealed("lease", b'{"run":"evil","process":"p","expires_unix_s":"x"}'),
    "process": sealed(
        "lease", encoded({"run": "e", "process": "a-1-2/../..", "expires_unix_s": 0})
    ),
    "later-version": sealed("lease", b"{}", version=9),
}


@pytest.mark.parametrize("lease", LEASES)
def test_a_lease_that_lies_stops_nobody(honest: Objects, lease: str):
    objects = {
        **honest,
        "runs/evil/w00000-00000001.json": LEASES[lease],
        "runs/evil/../../x": b"",
        "runs/x": b"",
        "runs/evil/w00000-1.json": b"",
    }
    with little_memory():
        live_runs(store_of(objects))
        collect_orphans(store_of(objects))
        with checkpointer_over(objects) as checkpointer:
            checkpointer.save(TARGET + 1, honest_state(TARGET + 1)).wait()
    assert same(open_step(store_of(objects), BASE).state(), honest_state(BASE))


def test_objects_of_strange_names_are_left_alone(honest: Objects):
    strange = [
        "data/x",
        "data/0000000000000009-run-000001",
        "data/0000000000000009-RUN-000001/w00000-000000.pack",
        "data/9-run-000001/x",
        "commits/latest",
        "commits/0000000000000009.json.bak",
        "commits/00000000000000099.json",
        "commits/x/0000000000000009.json",
        "other/file",
    ]
    objects = {**honest, **dict.fromkeys(strange, b"")}
    collect_orphans(store_of(objects))
    assert set(strange) <= objects.keys()
    assert same(checkpointer_over(objects).restore(), honest_state(TARGET))


# Links and other things that are no files


@pytest.fixture
def directory(honest: Objects, tmp_path: Path) -> Path:
    root = tmp_path / "run"
    for key, data in honest.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    return root


def link_out(path: Path) -> None:
    """Replace a file or directory by a symbolic link to a copy of it outside of the root."""
    target = path.parents[len(path.parts) - 1 - path.parts.index("run")] / "outside" / path.name
    path.rename(target)
    path.symlink_to(target)


LINKED = {
    "commit": commit_key(TARGET),
    "manifest": key_of_manifest(),
    "pack": pack_key(TARGET, attempt_of(TARGET), 0, 0),
    "attempt": key_of_manifest().rpartition("/")[0],
    "commits": "commits",
    "data": "data",
}


@pytest.mark.parametrize("place", LINKED)
def test_symbolic_links_are_not_followed(directory: Path, place: str):
    link_out(directory / LINKED[place])
    with pytest.raises(AsymCheckError):
        open_checkpoint(directory, step=TARGET).state()
    with pytest.raises(AsymCheckError):
        open_checkpoint(directory, step=TARGET).verify()


@pytest.mark.parametrize("place", ["commits", "data", "runs", ".tmp"])
def test_nothing_is_written_or_removed_through_links(directory: Path, tmp_path: Path, place: str):
    if (directory / place).exists():
        link_out(directory / place)
    else:
        (directory / place).symlink_to(tmp_path / "outside")
    before = sorted(p for p in (tmp_path / "outside").rglob("*"))
    with pytest.raises(AsymCheckError), Checkpointer(directory, max_host_bytes=1 << 20) as c:
        c.save(7, honest_state(7)).wait()
    with pytest.raises(AsymCheckError):
        collect_orphans(LocalStore(directory))
    assert sorted(p for p in (tmp_path / "outside").rglob("*")) == before


@pytest.mark.parametrize("place", ["commit", "manifest", "pack"])
def test_a_pipe_in_the_place_of_an_object_does_not_hang(directory: Path, place: str):
    path = directory / LINKED[place]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(AsymCheckError):
        open_checkpoint(directory, step=TARGET).state()


@pytest.mark.parametrize("place", ["commit", "manifest", "pack"])
def test_a_directory_in_the_place_of_an_object(directory: Path, place: str):
    path = directory / LINKED[place]
    path.unlink()
    path.mkdir()
    with pytest.raises(AsymCheckError):
        open_checkpoint(directory, step=TARGET).state()
    with Checkpointer(directory) as reader:
        assert same(reader.restore(), honest_state(BASE))


def test_a_device_as_the_root():
    with pytest.raises(StoreError):
        open_checkpoint("/dev/null")


# At random

VALUES: list[Any] = [
    None, True, 0, 1, 2, 3, -1, 255, 1 << 20, 1 << 26, 1 << 31, 1 << 40, 1 << 53, 1 << 62, 1 << 64,
    0.0, 0.5, -1.5, 1e300, "", "x", "params/w", "n", "..", "/", "float64", "delta", "raw", "zstd",
    "plane", "topk", DIGEST, [], {}, [0], [[]], {"leaf": "n"}, {"list": []},
    {"dict": [["a", None]]}, {"bytes": "params/w"}, {"scalar": "params/w"}, {"tuple": [None]},
    {"int": "1"},
]  # fmt: skip


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    members = document.items() if isinstance(document, dict) else enumerate(document)
    for name, value in members:
        if isinstance(value, dict | list):
            yield from places(value, (*path, name))
        else:
            yield (*path, name)


def mutate(document: Any, chance: random.Random) -> None:
    """One change of a JSON document, in place."""
    path = chance.choice([p for p in places(document) if p])
    parent = document
    for name in path[:-1]:
        parent = parent[name]
    name, draw = path[-1], chance.random()
    if draw < 0.45:
        parent[name] = copy.deepcopy(chance.choice(VALUES))
    elif draw < 0.6:
        del parent[name]
    elif draw < 0.7 and isinstance(parent, list):
        parent.insert(name, parent[chance.randrange(len(parent))])
    elif draw < 0.8 and type(parent[name]) is int:
        parent[name] += chance.choice([-1, 1, -parent[name], 1 << 32])
    elif draw < 0.9 and isinstance(parent, list):
        chance.shuffle(parent)
    else:
        other = chance.choice([p for p in places(document) if p])
        value = document
        for step in other:
            value = value[step]
        parent[name] = json.loads(json.dumps(value))


def mangle(text: bytes, chance: random.Random) -> bytes:
    """One change of the bytes."""
    begin = chance.randrange(len(text))
    end = min(len(text), begin + chance.choice([0, 1, 1, 2, 8, 100]))
    tokens = [
        b"",
        b"0",
        b"-",
        b"1e9",
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b'"',
        b"\\u0000",
        b"\xff",
        b"null",
    ]
    return text[:begin] + chance.choice([*tokens, text[begin:end] * 2]) + text[end:]


def only_typed_errors(objects: Objects, step: int) -> None:
    for use in (lambda c: c.state(), lambda c: c.verify()):
        try:
            use(open_step(store_of(objects), step, threads=1))
        except AsymCheckError as error:
            assert str(error)
    with suppress(CheckpointNotFoundError, UnsupportedVersionError):
        checkpointer_over(objects).restore()


def fuzzed(honest: Objects, seed: int) -> tuple[Objects, int]:
    chance = random.Random(seed)
    step = chance.choice([BASE, TARGET])
    changes = chance.choice([1, 1, 1, 2, 4])

    def some(record: Json) -> None:
        for _ in range(changes):
            mutate(record, chance)

    def bytes_of(text: bytes) -> bytes:
        for _ in range(changes):
            text = mangle(text, chance)
        return text

    kinds: list[dict[str, Any]] = [
        {"change": some},
        {"change": some},
        {"of_commit": some},
        {"body": bytes_of},
        {"commit_body": bytes_of},
    ]
    return forge(honest, step=step, **chance.choice(kinds)), step


@pytest.mark.timeout(120)
@pytest.mark.parametrize("batch", range(4))
def test_records_changed_at_random(honest: Objects, batch: int):
    for seed in range(batch * 400, (batch + 1) * 400):
        with little_memory(256 << 20):
            only_typed_errors(*fuzzed(honest, seed))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_records_changed_at_random_for_long(honest: Objects):
    for seed in range(100_000, 150_000):
        only_typed_errors(*fuzzed(honest, seed))


def test_bytes_changed_at_random(honest: Objects):
    chance = random.Random(0)
    for _ in range(600):
        key = chance.choice(sorted(honest))
        objects = {**honest, key: mangle(honest[key], chance)}
        only_typed_errors(objects, chance.choice([BASE, TARGET]))
