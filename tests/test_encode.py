"""From captured bytes to packs: in order, checked, bounded, and with nothing sent too early."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import xxhash
from memory_store import MemoryStore
from states import drifted, training_state

from asymcheck.attempt import Attempt
from asymcheck.buffers import BufferPool
from asymcheck.codecs import PlaneCodec, TopKCodec, codec_by_name
from asymcheck.codecs.base import Codec, Column
from asymcheck.cost import CostModel
from asymcheck.encode import MIN_CAPTURE_BUFFERS, CapturedRun, Encoder
from asymcheck.errors import CaptureTimeoutError, CodecError
from asymcheck.flush import FlushQueue
from asymcheck.partition import Phase, Window
from asymcheck.plan import make_plan
from asymcheck.policy import Always, CompressionPolicy, Decision, Never, PolicyRequest
from asymcheck.reference import Reference
from asymcheck.state import DTYPES, dtype_of, numpy_view

BUFFER = 1 << 16
WINDOWS = [Window(Phase.FORWARD, 0, 1.0), Window(Phase.BACKWARD, 0, 2.0)]


@dataclass
class Bench:
    """An encoder with its pools and queue, and what a capture would do with it."""

    store: MemoryStore
    policy: CompressionPolicy = field(default_factory=Never)
    threads: int = 2
    capture_buffers: int = 8
    pack_buffers: int = 5
    max_coding_nbytes: int = 1 << 20
    pack_nbytes: int = BUFFER
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        self.capture_pool = BufferPool(BUFFER, self.capture_buffers * BUFFER, self.timeout_s)
        self.pack_pool = BufferPool(BUFFER, self.pack_buffers * BUFFER, self.timeout_s)
        self.flush = FlushQueue(self.store.put, 2, 1 << 30)
        self.cost = CostModel()
        self.encoder = Encoder(
            policy=self.policy,
            cost=self.cost,
            capture_pool=self.capture_pool,
            pack_pool=self.pack_pool,
            flush=self.flush,
            threads=self.threads,
            max_coding_nbytes=self.max_coding_nbytes,
        )
        self.steps = 0

    def begin(self, state: Any, reference: Reference | None = None, **more: Any) -> Attempt:
        view = numpy_view(state)
        attempt = Attempt(
            step=self.steps,
            name=f"run-{self.steps:06d}",
            writer=0,
            writers=1,
            plan=make_plan(view, WINDOWS, BUFFER),
            structure=view.structure,
            metadata={},
            updates=view.updates,
            base_step=more.get("base_step"),
            predecessor_encoded=more.get("predecessor_encoded"),
            pack_nbytes=self.pack_nbytes,
        )
        self.steps += 1
        self.encoder.begin(attempt, reference)
        return attempt

    def place_all(self, attempt: Attempt) -> Iterator[CapturedRun]:
        """One unit at a time."""
        for number in range(len(attempt.plan.units)):
            yield self.encoder.place(attempt, range(number, number + 1))

    def capture(self, captured: CapturedRun, state: Any) -> None:
        sources = numpy_view(state).sources
        for column in captured.columns:
            sources[column.source].read_into(column.unit.start, column.unit.count, column.view)
        captured.note_captured()

    def save(self, state: Any, reference: Reference | None = None, **more: Any) -> Attempt:
        attempt = self.begin(state, reference, **more)
        for run in attempt.plan.runs:
            self.capture(self.encoder.place(attempt, run), state)
        self.encoder.end(attempt)
        assert attempt.flushed.wait(30)
        return attempt

    def close(self) -> None:
        self.encoder.close()
        assert self.flush.close(30)


@pytest.fixture
def benches() -> Iterator[list[Bench]]:
    """Benches to be closed at the end."""
    made: list[Bench] = []
    yield made
    for bench in made:
        bench.close()


def bench(benches: list[Bench], store: MemoryStore, **options: Any) -> Bench:
    benches.append(Bench(store, **options))
    return benches[-1]


class Row(NamedTuple):
    source: int
    start: int
    count: int
    codec: Codec
    pack: int
    offset: int
    nbytes: int
    digest: str
    raw: str


def rows(attempt: Attempt) -> list[Row]:
    """The blocks of an attempt so far."""
    b = attempt.blocks
    codecs = [attempt.codecs[codec] for codec in b.codec]
    packs = [pack.sequence for pack in attempt.block_packs]
    columns = (b.shard, b.start, b.count, codecs, packs, b.offset, b.nbytes, b.digest, b.raw)
    return [Row(*row) for row in zip(*columns, strict=True)]


def decoded(store: MemoryStore, attempt: Attempt, olds: dict[int, np.ndarray] | None = None):
    """All sources of an attempt, from the store; every digest is checked."""
    plan = attempt.plan
    out = {i: np.zeros(spec.nbytes, np.uint8) for i, spec in enumerate(plan.specs)}
    keys = [pack.key for pack in attempt.packs]
    for row in rows(attempt):
        spec = plan.specs[row.source]
        stored = store.objects[keys[row.pack]][row.offset : row.offset + row.nbytes]
        assert xxhash.xxh3_128_hexdigest(stored) == row.digest
        begin, end = row.start * spec.itemsize, (row.start + row.count) * spec.itemsize
        old = olds[row.source][begin:end] if olds is not None else None
        column = Column(spec.kind, dtype_of(spec.dtype), out[row.source][begin:end], old)
        row.codec.decode([column], [memoryview(stored)])
        if row.codec.id != "raw":
            assert xxhash.xxh3_128_hexdigest(column.new.data) == row.raw
    return out


def bytes_of(state: Any) -> dict[int, bytes]:
    return {
        i: np.ascontiguousarray(s.array).tobytes() for i, s in enumerate(numpy_view(state).sources)
    }


def as_bytes(arrays: dict[int, np.ndarray]) -> dict[int, bytes]:
    return {i: array.tobytes() for i, array in arrays.items()}


@pytest.mark.parametrize("policy", [Never(), Always("plane"), Always("zstd")], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_everything_captured_is_stored(
    store: MemoryStore, benches: list[Bench], policy: CompressionPolicy, threads: int
) -> None:
    used = bench(benches, store, policy=policy, threads=threads, pack_nbytes=20_000)
    for seed in range(3):
        state = training_state(seed, 30_000)
        attempt = used.save(state)
        assert attempt.error is None
        assert as_bytes(decoded(store, attempt)) == bytes_of(state)
        assert not attempt.used_base
        assert attempt.stored_nbytes == sum(len(store.objects[p.key]) for p in attempt.packs)
    assert used.capture_pool.used_nbytes == used.pack_pool.used_nbytes == 0


def test_packs_have_the_size_asked_for(store: MemoryStore, benches: list[Bench]) -> None:
    attempt = bench(benches, store, pack_nbytes=30_000).save(training_state(0, 30_000))
    largest = max(row.nbytes for row in rows(attempt))
    assert all(30_000 - largest <= pack.nbytes <= 30_000 for pack in attempt.packs[:-1])


class Mixed:
    """Raw for the moments, coded for the rest."""

    def decide(self, request: PolicyRequest) -> Decision:
        raw = request.kind.startswith("exp") or request.dtype == "float64"
        return Decision("raw" if raw else "plane", "mixed")

    def decide_replay(self, requests: object) -> None:
        return None

    def wants_base(self, *_: Any) -> bool:
        return False


@pytest.mark.parametrize("capture_buffers", [MIN_CAPTURE_BUFFERS, 9])
@pytest.mark.parametrize("pack_nbytes", [4096, 20_000, 35_000, BUFFER])
def test_raw_and_coded_leaves_of_one_parameter(
    store: MemoryStore, benches: list[Bench], capture_buffers: int, pack_nbytes: int
) -> None:
    """With the fewest buffers that promise progress, too."""
    used = bench(
        benches,
        store,
        policy=Mixed(),
        capture_buffers=capture_buffers,
        pack_nbytes=pack_nbytes,
    )
    state = training_state(1, 100_000)
    attempt = used.save(state)
    assert as_bytes(decoded(store, attempt)) == bytes_of(state)
    codecs = {(attempt.plan.specs[r.source].kind, r.codec.id) for r in rows(attempt)}
    assert {("exp_avg", "raw"), ("exp_avg_sq", "raw"), ("half", "plane")} <= codecs
    assert used.capture_pool.used_nbytes == used.pack_pool.used_nbytes == 0


@pytest.mark.parametrize("pack_nbytes", [4096, 20_000, BUFFER])
def test_many_small_leaves_raw_and_coded(
    store: MemoryStore, benches: list[Bench], pack_nbytes: int
) -> None:
    """Many units are captured in one go, with the fewest buffers that promise progress."""
    used = bench(
        benches,
        store,
        policy=Mixed(),
        capture_buffers=MIN_CAPTURE_BUFFERS,
        pack_nbytes=pack_nbytes,
    )
    rng = np.random.default_rng(5)
    kinds = ("params", "exp_avg", "exp_avg_sq", "half")
    sizes = {f"w{i}": int(n) for i, n in enumerate(rng.integers(1, 700, 500))}
    state = {
        kind: {
            name: rng.standard_normal(n).astype(DTYPES["bfloat16" if kind == "half" else "float32"])
            for name, n in sizes.items()
        }
        for kind in kinds
    }
    attempt = used.save(state)
    assert len(attempt.plan.runs) < len(attempt.plan.units) / 5
    assert as_bytes(decoded(store, attempt)) == bytes_of(state)
    assert attempt.blocks.group == sorted(attempt.blocks.group)
    assert used.capture_pool.used_nbytes == used.pack_pool.used_nbytes == 0


def test_what_coding_costs_is_learned_once_for_a_run(
    store: MemoryStore, benches: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int]] = []
    saved: list[tuple[str, ...]] = []
    used = bench(benches, store, policy=Always("plane"))
    monkeypatch.setattr(used.cost, "observe", lambda key, nbytes, _: told.append((key, nbytes)))
    monkeypatch.setattr(used.cost, "observe_ratio", lambda *place: saved.append(place[:3]))
    state = {k: {f"w{i}": np.zeros(100, np.float32) for i in range(50)} for k in ("a", "b")}
    attempt = used.save(state)
    assert sum(nbytes for _, nbytes in told) == 40_000
    assert len(told) == len(attempt.plan.runs) and {key for key, _ in told} == {"encode:plane"}
    assert saved == [("plane", "a", "float32"), ("plane", "b", "float32")] * len(told)


def test_no_pack_is_sent_before_its_bytes_are_captured(
    store: MemoryStore, benches: list[Bench]
) -> None:
    used = bench(benches, store, pack_nbytes=10_000)
    state = training_state(2, 30_000)
    sent = threading.Event()
    store.hook = lambda operation, key: sent.set()
    attempt = used.begin(state)
    units = used.place_all(attempt)
    first = next(units)
    assert len({id(column.slot.pack) for column in first.columns if column.slot}) > 1
    assert not sent.wait(0.2)  # its first pack is full, but nothing was copied into it
    used.capture(first, state)
    for captured in units:
        used.capture(captured, state)
    used.encoder.end(attempt)
    assert attempt.flushed.wait(30)
    assert as_bytes(decoded(store, attempt)) == bytes_of(state)


def test_units_copied_out_of_order_are_packed_in_order(
    store: MemoryStore, benches: list[Bench]
) -> None:
    state = training_state(3, 50_000)
    packs: list[dict[str, bytes]] = []
    for reverse in (False, True):
        used = bench(benches, store, policy=Mixed(), threads=20, capture_buffers=40)
        attempt = used.begin(state)
        placed = list(used.place_all(attempt))
        for captured in reversed(placed) if reverse else placed:
            used.capture(captured, state)
        used.encoder.end(attempt)
        assert attempt.flushed.wait(30)
        packs.append(dict(store.objects))
        store.objects.clear()
    assert packs[0] == packs[1]


@pytest.mark.parametrize("codec", ["plane", "zstd", "delta", "topk"])
def test_what_does_not_get_smaller_is_stored_as_it_is(
    store: MemoryStore, benches: list[Bench], codec: str
) -> None:
    """A payload could be larger than a buffer."""
    used = bench(benches, store, policy=Always(codec))
    rng = np.random.default_rng(0)

    def noise() -> Any:
        return {
            "params": {"w": rng.integers(0, 256, 3 * BUFFER, np.uint8), "tiny": rng.random(1)},
            "zeros": {"z": np.zeros(5000)},
        }

    state = noise()
    reference, attempt = filled(used, state)
    olds = decoded(store, attempt)
    state = noise()
    attempt = used.save(state, reference, base_step=0, predecessor_encoded=attempt.encoded)
    assert attempt.error is None
    assert as_bytes(decoded(store, attempt, olds)) == bytes_of(state)
    assert attempt.stored_nbytes <= 3 * BUFFER + 8 + 500
    raw = {attempt.plan.specs[row.source].path for row in rows(attempt) if row.codec.id == "raw"}
    assert raw == {"params/w", "params/tiny"}
    assert attempt.used_base == (codec in ("delta", "topk"))


# -- increments --------------------------------------------------------------------------------


def filled(used: Bench, state: Any) -> tuple[Reference, Attempt]:
    view = numpy_view(state)
    reference = Reference(make_plan(view, WINDOWS, BUFFER))
    return reference, used.save(state, reference)


def test_increments_decode_from_the_predecessor(store: MemoryStore, benches: list[Bench]) -> None:
    used = bench(benches, store, policy=Always("delta"))
    state = training_state(4, 20_000)
    reference, attempt = filled(used, state)
    olds = decoded(store, attempt)
    for seed in range(4):
        state = drifted(state, seed)
        attempt = used.save(
            state, reference, base_step=attempt.step, predecessor_encoded=attempt.encoded
        )
        large = {row.codec.id for row in rows(attempt) if row.count > 7}
        assert attempt.used_base and large == {"delta"}
        olds = decoded(store, attempt, olds)
        assert as_bytes(olds) == bytes_of(state)


def test_an_increment_waits_until_the_predecessor_is_encoded(
    store: MemoryStore, benches: list[Bench]
) -> None:
    used = bench(benches, store, policy=Always("delta"), threads=4)
    state = training_state(5)
    reference, attempt = filled(used, state)
    encoded = threading.Event()
    later = used.begin(state, reference, base_step=0, predecessor_encoded=encoded)
    for captured in used.place_all(later):
        used.capture(captured, state)
    used.encoder.end(later)
    assert not later.flushed.wait(0.2)
    assert rows(later) == []
    encoded.set()
    assert later.flushed.wait(30)
    assert as_bytes(decoded(store, later, decoded(store, attempt))) == bytes_of(state)


def test_the_reference_holds_what_a_reader_will_have(
    store: MemoryStore, benches: list[Bench]
) -> None:
    """Of a lossy codec that is the reconstruction, not the true state."""
    used = bench(benches, store, policy=Always("topk"))
    state = training_state(6, 10_000)
    reference, attempt = filled(used, state)
    olds = decoded(store, attempt)
    for seed in range(3):
        state = drifted(state, seed)
        attempt = used.save(
            state, reference, base_step=attempt.step, predecessor_encoded=attempt.encoded
        )
        olds = decoded(store, attempt, olds)
        assert as_bytes(olds) != bytes_of(state)
        for unit in attempt.plan.units:
            for source in unit.sources:
                size = attempt.plan.specs[source].itemsize
                read = olds[source][unit.start * size : (unit.start + unit.count) * size]
                assert bytes(reference.view(unit, source)) == bytes(read)


# -- what goes wrong ---------------------------------------------------------------------------


class Broken:
    """A codec that fails at the n-th call, plane coding otherwise."""

    id, params, needs_base, lossy, joint = "plane", PlaneCodec().params, False, False, False

    def __init__(self, at: int, error: BaseException) -> None:
        self.calls = 0
        self._at, self._error = at, error
        self._lock = threading.Lock()

    def encode(self, columns: Any) -> Any:
        with self._lock:
            self.calls += 1
            fails = self.calls == self._at
        if fails:
            raise self._error
        return codec_by_name("plane").encode(columns)


@pytest.mark.parametrize("at", [1, 3])
def test_a_failing_codec_fails_the_attempt_and_frees_the_memory(
    store: MemoryStore, benches: list[Bench], at: int
) -> None:
    used = bench(benches, store, policy=Always("plane"))
    error = CodecError("no")
    used.encoder._codecs["plane"] = Broken(at, error)  # type: ignore[assignment]
    attempt = used.save(training_state(7, 30_000))
    assert attempt.error is error
    assert attempt.encoded.is_set()
    del used.encoder._codecs["plane"]
    state = training_state(8, 30_000)
    assert as_bytes(decoded(store, used.save(state))) == bytes_of(state)
    assert used.capture_pool.used_nbytes == used.pack_pool.used_nbytes == 0


def test_a_failing_store_fails_the_attempt_and_frees_the_memory(
    store: MemoryStore, benches: list[Bench]
) -> None:
    used = bench(benches, store, policy=Mixed(), pack_nbytes=10_000)
    error = OSError("disk")
    with store.failing("put", "-000001.pack", error):
        attempt = used.save(training_state(7, 30_000))
    assert attempt.error is error
    assert used.capture_pool.used_nbytes == used.pack_pool.used_nbytes == 0


@pytest.mark.parametrize(
    "policy", [Never(), Always("plane"), Mixed()], ids=["raw", "coded", "mixed"]
)
@pytest.mark.parametrize(("capture_buffers", "pack_nbytes"), [(3, BUFFER), (1, BUFFER * 6 // 10)])
def test_giving_up_for_want_of_memory_leaks_none(
    store: MemoryStore,
    benches: list[Bench],
    policy: CompressionPolicy,
    capture_buffers: int,
    pack_nbytes: int,
) -> None:
    """Not even of a unit that found room for some of its columns."""
    used = bench(
        benches,
        store,
        policy=policy,
        capture_buffers=capture_buffers,
        pack_nbytes=pack_nbytes,
        timeout_s=0.01,
    )
    state = training_state(8, 100_000)
    attempt = used.begin(state)
    placed: list[CapturedRun] = []
    with pytest.raises(CaptureTimeoutError) as raised:
        placed.extend(used.place_all(attempt))  # nothing is ready, so nothing comes back
        raise AssertionError("there was memory enough")
    attempt.fail(raised.value)
    for captured in placed:
        captured.note_captured()
    used.encoder.end(attempt)
    assert attempt.flushed.wait(30)
    assert used.capture_pool.used_nbytes == used.pack_pool.used_nbytes == 0


def test_a_failing_policy_leaks_nothing(store: MemoryStore, benches: list[Bench]) -> None:
    class Unknown(Never):
        def decide(self, request: PolicyRequest) -> Decision:
            return Decision("no such codec", "")

    used = bench(benches, store, policy=Unknown())
    attempt = used.begin(training_state(9))
    with pytest.raises(CodecError, match="no codec"):
        next(used.place_all(attempt))
    used.encoder.end(attempt)
    assert attempt.flushed.wait(30)
    assert used.capture_pool.used_nbytes == 0


def test_payloads_waiting_to_be_packed_are_bounded(
    store: MemoryStore, benches: list[Bench]
) -> None:
    """While the store holds everything up, coding stops before its output fills the memory."""
    used = bench(
        benches,
        store,
        policy=Always("plane"),
        threads=8,
        capture_buffers=60,
        pack_buffers=2,
        max_coding_nbytes=4 * BUFFER,
    )
    codec = Broken(-1, AssertionError())
    used.encoder._codecs["plane"] = codec  # type: ignore[assignment]
    state = {"params": {"w": np.random.default_rng(0).integers(0, 256, 40 * BUFFER, np.uint8)}}
    with store.hold("put", ".pack") as held:
        attempt = used.begin(state)
        placed = list(used.place_all(attempt))
        for captured in placed:
            used.capture(captured, state)
        used.encoder.end(attempt)
        held.await_calls(1)
        # One pack is being put, one is full, a third block waits for a buffer; 4 may be coded.
        assert not attempt.flushed.wait(0.2)
        assert 3 <= codec.calls <= 2 + 4 < len(placed)
    assert attempt.flushed.wait(30)
    assert codec.calls == len(placed)
    assert as_bytes(decoded(store, attempt)) == bytes_of(state)


def test_learns_costs_and_ratios(store: MemoryStore, benches: list[Bench]) -> None:
    used = bench(benches, store, policy=Always("plane"))
    state = {"params": {"zeros": np.zeros(100_000, np.float32)}}
    prior = used.cost.line("encode:plane")
    attempt = used.save(state)
    assert used.cost.ratio("plane", "params", "float32") < 0.2
    assert used.cost.line("encode:plane") != prior
    (decision, _) = attempt.decisions
    assert decision["codec"] == "plane" and decision["reason"] == "always plane"
    assert decision["nbytes"] + attempt.decisions[1]["nbytes"] == 400_000
    assert [d["phase"] for d in attempt.decisions] == ["forward", "backward"]


def test_top_k_needs_a_base_and_says_so(store: MemoryStore, benches: list[Bench]) -> None:
    class Wrong(Never):
        def decide(self, request: PolicyRequest) -> Decision:
            return Decision(TopKCodec.id, "wrong: there is no predecessor")

    attempt = bench(benches, store, policy=Wrong()).save(training_state(10))
    assert isinstance(attempt.error, CodecError) and "no predecessor" in str(attempt.error)
