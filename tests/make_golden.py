"""Writes the golden checkpoints of a format version, and what they hold in a notation of their own.

    python tests/make_golden.py tests/golden/v1

Every case is a directory with `run` (the checkpoints) and `expected.json`: the steps that are good
and their states, whose arrays are ranges of the bytes in `expected.npz`. Degraded cases refer to
the states of the case that they were copied from. Expectations are made from the states
themselves, with NumPy and nothing of the library. Once a version is released its golden
checkpoints are never written again: they stay, and keep loading.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import asymcheck
from asymcheck.policy import Decision, PolicyRequest
from asymcheck.state import ArraySource, LeafSpec, ShardSpec, StateView, numpy_view
from asymcheck.strategies import AsymCheck

NUMPY_DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
]
ML_DTYPES = [
    *("bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
]
DTYPES = {name: np.dtype(name) for name in NUMPY_DTYPES} | {
    name: np.dtype(getattr(ml_dtypes, name)) for name in ML_DTYPES
}
TOP_K_FRACTION = 0.01


# -- states ------------------------------------------------------------------------------------


def random_bits(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    """Any bit pattern, but only 0 and 1 for bool."""
    limit = 2 if dtype.kind == "b" else 256
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return rng.integers(0, limit, nbytes, np.uint8).view(dtype).reshape(shape)


def compressible(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    """Byte planes of every sort: few values, one value, and (not for bool) noise."""
    planes = rng.integers(0, 4, (*shape, dtype.itemsize), np.uint8)
    planes[..., 1::3] = 7
    planes[..., 2::3] = rng.integers(0, 256, planes[..., 2::3].shape)
    limit = 2 if dtype.kind == "b" else 256
    bits = (planes.astype(np.uint16) % limit).astype(np.uint8)
    return bits.reshape(-1).view(dtype).reshape(shape)


def state_of_all_dtypes() -> dict[str, Any]:
    """Leaves of every dtype, by the codec that stores them."""
    rng = np.random.default_rng(1)
    return {
        "raw": {name: random_bits(rng, dtype, (3, 2)) for name, dtype in DTYPES.items()},
        "zstd": {name: compressible(rng, dtype, (2, 48)) for name, dtype in DTYPES.items()},
        "plane": {name: compressible(rng, dtype, (8, 1, 12)) for name, dtype in DTYPES.items()},
        "empty": {name: np.empty((0, 3), DTYPES[name]) for name in ("float32", "bfloat16")},
        "0d": {name: random_bits(rng, dtype, ()) for name, dtype in DTYPES.items()},
    }


def nested_state() -> dict[str, Any]:
    """Every node of the structure, odd keys and values, and tied leaves."""
    rng = np.random.default_rng(2)
    tied = rng.standard_normal((3, 4)).astype(np.float32)
    return {
        "tied": {"a": tied, "b": tied, "again": [tied]},
        "ordered": OrderedDict([("z", 1), ("a", np.arange(3, dtype=np.int16))]),
        "counter": Counter({"x": 2, "y": -1}),
        "sequences": ([], (), [1, (2.5, [None])], {}),
        "numbers": [0, -1, 2**80, True, False, 0.1, -0.0, float("inf"), float("nan"), 3 - 4j],
        "text": ["", "größe 日本", "a/b~c\n\x00", "\ud800"],
        "bytes": [b"", b"\x00\xff" * 20],
        "scalars": [np.float32(1.5), np.int8(-3), np.bool_(True), ml_dtypes.bfloat16(2.0)],
        "keys": {0: "zero", -7: np.zeros(2), "a/b": np.ones(1), "~": np.ones(2), "": np.ones(3)},
        "nothing": None,
    }


def chain_state(step: int) -> dict[str, Any]:
    """A state that changes a little at every step; the kinds are named after codecs."""
    rng = np.random.default_rng(3)
    base = rng.standard_normal((7, 9))
    drift = np.random.default_rng(step).standard_normal((7, 9)) * 1e-3
    moving = base + drift
    return {
        "delta": {
            "f32": moving.astype(np.float32),
            "bf16": moving.astype(ml_dtypes.bfloat16),
            "c64": (moving + 1j * drift).astype(np.complex64),
            "i64": np.arange(40) + step,
            "scalar": np.float64(step),
        },
        "topk": {"f32": moving.astype(np.float32), "i32": np.arange(60, dtype=np.int32) * step},
        "plane": {"i32": np.arange(64, dtype=np.int32) + step},
        "zstd": {"text": np.frombuffer(b"abc" * 20 + bytes([step]), np.uint8)},
        "raw": {"mask": moving > 0},
        "step": step,
    }


def shared_state(step: int) -> dict[str, Any]:
    """What two writers store: replicas split between them, rows of one leaf, a leaf of each."""
    rng = np.random.default_rng(step)
    return {
        "replicated": np.arange(101, dtype=np.float32) + step,
        "sharded": rng.standard_normal((6, 5)).astype(np.float32),
        "first": {"only": np.full(3, step, np.int32)},
        "second": {"only": np.full(4, -step, np.int64)},
    }


# -- writing -----------------------------------------------------------------------------------


class ByKind:
    """The codec that the leaf's kind names; `plane` where it needs a predecessor and has none."""

    def decide(self, request: PolicyRequest) -> Decision:
        needs_base = request.kind in ("delta", "topk")
        known = needs_base or request.kind in ("plane", "zstd")
        codec = request.kind if known else "raw"
        return Decision("plane" if needs_base and not request.has_base else codec, "golden")

    def decide_replay(self, requests: object) -> None:
        return None

    def wants_base(self, nbytes_by_class: Mapping[tuple[str, str], int], *_: Any) -> bool:
        return any(kind in ("delta", "topk") for kind, _ in nbytes_by_class)


class AlwaysDelta(ByKind):
    """Bit differences for everything."""

    def decide(self, request: PolicyRequest) -> Decision:
        return Decision("delta" if request.has_base else "plane", "golden")

    def wants_base(self, nbytes_by_class: Mapping[tuple[str, str], int], *_: Any) -> bool:
        return True


def checkpointer(run: Path, **options: Any) -> asymcheck.Checkpointer:
    options = {"max_chain": 2, "max_host_bytes": 64 << 20, "run_id": "golden", **options}
    options.setdefault("strategy", AsymCheck(policy=ByKind()))
    return asymcheck.Checkpointer(run, **options)


def write(run: Path, states: Mapping[int, Any]) -> None:
    with checkpointer(run) as saver:
        for step, state in states.items():
            saver.save(step, state, metadata={"step": step, "note": "größe"}).wait()


@dataclass(frozen=True)
class RowsSource:
    """Some rows of a matrix."""

    leaf: LeafSpec
    whole: NDArray[Any]
    first: int
    rows: int

    @property
    def shard(self) -> ShardSpec:
        return ShardSpec((self.first, 0), (self.rows, self.whole.shape[1]))

    @property
    def group(self) -> str:
        return self.leaf.path

    @property
    def owned(self) -> tuple[int, int]:
        return 0, self.shard.size

    def read_into(self, start: int, count: int, out: NDArray[np.uint8]) -> None:
        mine = self.whole[self.first : self.first + self.rows].reshape(-1)
        np.copyto(out, mine[start : start + count].view(np.uint8))

    def check_unchanged(self) -> None:
        pass


def view_of_writer(writer: int, state: dict[str, Any]) -> StateView:
    """Writer 0 knows `first`, writer 1 `second`; both know the others."""
    known = {**state}
    del known[("second", "first")[writer]]
    view = numpy_view(known)
    sources: list[Any] = []
    for source in view.sources:
        if source.leaf.path == "sharded":
            sources.append(RowsSource(source.leaf, state["sharded"], *((0, 2), (2, 4))[writer]))
        elif source.leaf.path == "replicated":
            owned = ((0, 60), (60, 41))[writer]
            array = state["replicated"]
            sources.append(ArraySource(source.leaf, array, source.group, owned))
        else:
            sources.append(source)
    return StateView(view.structure, tuple(sources), view.aliases)


def write_by_two(run: Path, steps: Sequence[int]) -> None:
    def work(writer: int) -> None:
        options = {"writer": writer, "writers": 2, "strategy": AsymCheck(policy=AlwaysDelta())}
        with checkpointer(run, **options) as saver:
            for step in steps:
                metadata = {"step": step, "note": "größe"}
                capture = saver.begin(
                    step, view_of_writer(writer, shared_state(step)), metadata=metadata
                )
                capture.finish()
                capture.pending.wait()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, writer) for writer in range(2)]:
            done.result()


# -- expectations ------------------------------------------------------------------------------


class Expectation:
    """States in a notation of JSON, and the bytes of their arrays one behind the other."""

    def __init__(self) -> None:
        self.content = bytearray()
        self._offsets: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no id is used again

    def of(self, value: Any) -> Any:
        """A list that starts with the name of the type."""
        name = type(value).__name__
        if isinstance(value, dict):
            return [name, [[key, self.of(item)] for key, item in value.items()]]
        if isinstance(value, list | tuple):
            return [name, [self.of(item) for item in value]]
        if isinstance(value, np.ndarray):
            return ["ndarray", self._offset(value), value.dtype.name, list(value.shape)]
        if isinstance(value, np.generic):
            return ["scalar", value.dtype.name, np.asarray(value).tobytes().hex()]
        if isinstance(value, bytes):
            return [name, value.hex()]
        return [name, repr(value)]

    def _offset(self, array: NDArray[Any]) -> int:
        if id(array) not in self._offsets:
            self._offsets[id(array)] = len(self.content)
            self._alive.append(array)
            self.content += array.tobytes()
        return self._offsets[id(array)]


def with_top_k(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` as the lossy codec keeps it over `old`: the largest changes, the first of equals."""
    before, after = old["topk"]["f32"].reshape(-1), new["topk"]["f32"].reshape(-1)
    change = np.abs(after.astype(np.float64) - before.astype(np.float64))
    kept = np.argsort(-change, kind="stable")[: int(np.ceil(TOP_K_FRACTION * change.size))]
    decoded = before.copy()
    decoded[kept] = after[kept]
    return {**new, "topk": {**new["topk"], "f32": decoded.reshape(new["topk"]["f32"].shape)}}


def expect(case: Path, states: Mapping[int, Any]) -> None:
    """Write what every step holds; all are good."""
    expectation = Expectation()
    plain = {str(step): expectation.of(states[step]) for step in sorted(states)}
    (case / "expected.json").write_text(json.dumps({"good": sorted(states), "states": plain}))
    content = np.frombuffer(expectation.content, np.uint8)
    np.savez_compressed(case / "expected.npz", content=content)


# -- cases -------------------------------------------------------------------------------------


def golden(root: Path) -> None:
    """All cases."""
    chain = {step: chain_state(step) for step in (1, 2, 3, 4)}
    decoded = {1: chain[1], 4: chain[4]}
    decoded[2] = with_top_k(decoded[1], chain[2])
    decoded[3] = with_top_k(decoded[2], chain[3])
    for name, states in (
        ("dtypes", {0: state_of_all_dtypes()}),
        ("nested", {7: nested_state()}),
        ("root", {1: np.arange(5.0)}),
        ("chain", chain),
    ):
        write(root / name / "run", states)
        expect(root / name, decoded if name == "chain" else states)
    write_by_two(root / "writers" / "run", (1, 2))
    expect(root / "writers", {step: shared_state(step) for step in (1, 2)})
    degraded(root)


def degraded(root: Path) -> None:
    """Copies of a base and an increment by two writers, damaged or littered on purpose."""

    def copy(name: str, good: Sequence[int]) -> Path:
        shutil.copytree(root / "writers" / "run", root / name / "run")
        expected = {"good": good, "states_of": "writers"}
        (root / name / "expected.json").write_text(json.dumps(expected))
        return root / name / "run"

    next(copy("missing_pack", [1]).glob("data/*2-golden*/w00001-000000.pack")).unlink()
    next(copy("missing_manifest", [1]).glob("data/*2-golden*/w00001.manifest")).unlink()
    (copy("missing_base", []) / "commits" / f"{1:016d}.json").unlink()
    commit = copy("torn_commit", [1]) / "commits" / f"{2:016d}.json"
    commit.write_bytes(commit.read_bytes()[:-30])
    leave_behind(copy("left_behind", [1, 2]))


def leave_behind(run: Path) -> None:
    """What dead runs and other programs may leave in a run."""
    attempt = run / "data" / f"{3:016d}-dead-000000"
    finished = next(run.glob("data/*2-golden*"))
    shutil.copytree(finished, attempt)
    (attempt / "w00000.abort").write_bytes(b"asymcheck abort 1 ")
    for name, content in (
        (".tmp/.0123456789abcdef-1-1.0123456789abcdef", b"half"),
        (f"damaged/{9:016d}-0123456789abcdef.json", b"damaged"),
        ("runs/dead/w00000-00000001.json", b"not a lease"),
        (f"data/{0:016d}-dead-999999999/w00000-000000.probe", bytes(10)),
        ("notes.txt", b"of somebody"),
        ("commits/latest", b"3"),
    ):
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def main(root: Path) -> None:
    """Write everything, and the SHA-256 of every file."""
    if root.exists():
        raise SystemExit(f"{root} exists: golden checkpoints are not written twice")
    golden(root)
    sums = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(root).as_posix()}\n"
        for path in sorted(root.rglob("*"))
        if path.is_file()
    ]
    (root / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
