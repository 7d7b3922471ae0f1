"""Increments that replay updates, from the state's view to the restored bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from replay_columns import NUMBERS, trained
from test_strategies import GivenCosts

import asymcheck
from asymcheck import encode
from asymcheck.codecs import ReplayCodec
from asymcheck.codecs.kernels import COMPILING
from asymcheck.cost import CostModel
from asymcheck.errors import CorruptionError
from asymcheck.index import load_index
from asymcheck.partition import Phase, Window
from asymcheck.plan import make_plan
from asymcheck.policy import Always, PolicyRequest, Selective
from asymcheck.state import StateView, Update, numpy_view, role_of
from asymcheck.stores import open_store
from asymcheck.strategies import AsymCheck

REPLAY = AsymCheck(policy=Always("replay"))
KINDS = {"weight": "params", "first": "exp_avg", "second": "exp_avg_sq"}
ROLES = tuple((kind, role) for role, kind in KINDS.items())
N = 40_000


def state_at(step: int, n: int = N) -> dict[str, Any]:
    """A parameter and its moments after `step` updates, the numbers beside it."""
    block = trained("adam", n, seed=1)
    columns = zip(block.codec.roles, block.columns, strict=True)
    arrays = {role: np.array(column.old).view(column.dtype) for role, column in columns}
    for number in range(1, step + 1):
        _update(arrays, number, n)
    state: dict[str, Any] = {kind: {"w": arrays[role]} for role, kind in KINDS.items()}
    return state | {"step": {"w": np.float32(step)}, "note": f"step {step}"}


def _update(arrays: dict[str, Any], number: int, n: int) -> None:
    f = np.float32
    low = np.random.default_rng(number).normal(0, 1e-3, n).astype(f)
    g = (low.view(np.uint32) & np.uint32(0xFFFF0000)).view(f) * f(0.3)
    m, v = arrays["first"], arrays["second"]
    arrays["first"] = f(0.9) * m + f(0.1) * g
    arrays["second"] = f(0.95) * v + f(0.05) * g * g
    u = arrays["first"] / (np.sqrt(arrays["second"]) + f(1e-8))
    arrays["weight"] = arrays["weight"] - f(1e-3) * (u + f(0.1) * arrays["weight"])


def update(step: int = 1, **numbers: float) -> Update:
    more = {"step": step, "corrects_bias": 0.0}
    return Update("adam", ROLES, NUMBERS["adam"] | more | numbers)


def view_of(step: int, n: int = N) -> StateView:
    return replace(numpy_view(state_at(step, n)), updates={"w": update(step)})


def save(url: Path, steps: range, strategy: Any = REPLAY, n: int = N, **more: Any) -> None:
    options = {"max_chain": 10} | more
    with asymcheck.Checkpointer(url, strategy=strategy, **options) as checkpointer:
        for step in steps:
            checkpointer.begin(step, view_of(step, n)).finish()
            checkpointer.wait()


def blocks_of(url: Path, step: int) -> Iterator[tuple[str, str, int]]:
    with closing(open_store(url)) as store:
        for stored in load_index(store, step).blocks():
            yield stored.box.leaf.path, stored.codec.id, stored.block.nbytes


def same(found: Any, expected: Any) -> bool:
    return all(
        found[kind]["w"].tobytes() == expected[kind]["w"].tobytes() for kind in KINDS.values()
    ) and (found["note"], found["step"]["w"]) == (expected["note"], expected["step"]["w"])


def test_a_chain_of_replayed_steps_restores(tmp_path):
    save(tmp_path, range(6))
    with asymcheck.Checkpointer(tmp_path) as checkpointer:
        for step in range(6):
            assert same(checkpointer.restore(step), state_at(step))
    assert {c for p, c, _ in blocks_of(tmp_path, 0)} <= {"plane", "raw"}
    for step in range(1, 6):
        coded = {p: (c, n) for p, c, n in blocks_of(tmp_path, step)}
        assert {coded[f"{kind}/w"][0] for kind in KINDS.values()} == {"replay"}
        assert sum(n for _, n in coded.values()) < 0.2 * 3 * 4 * N  # .63 as differences


def test_a_slice_of_one_leaf_reads_its_group(tmp_path):
    save(tmp_path, range(3), n=3_000_000)
    with asymcheck.open_checkpoint(tmp_path, 2) as checkpoint:
        expected = state_at(2, 3_000_000)
        assert (
            checkpoint["exp_avg_sq/w"][1_048_570:1_048_580]
            == expected["exp_avg_sq"]["w"][1_048_570:1_048_580]
        ).all()
        checkpoint.verify()


def test_a_step_that_was_not_the_last_update_is_exact_too(tmp_path):
    with asymcheck.Checkpointer(tmp_path, strategy=REPLAY) as checkpointer:
        for step in (0, 3, 7):
            checkpointer.begin(step, view_of(step)).finish()
        checkpointer.wait()
        assert same(checkpointer.restore(7), state_at(7))


def test_small_units_are_not_replayed(tmp_path):
    save(tmp_path, range(2), n=500)
    assert "replay" not in {codec for _, codec, _ in blocks_of(tmp_path, 1)}
    with asymcheck.Checkpointer(tmp_path) as checkpointer:
        assert same(checkpointer.restore(), state_at(1, 500))


def test_hyperparameters_are_in_the_manifest(tmp_path):
    save(tmp_path, range(2))
    with closing(open_store(tmp_path)) as store:
        [manifest] = load_index(store, 1).manifests
    [use] = [use for use in manifest.codecs if use.id == "replay"]
    assert use.params["rule"] == "adam"
    assert use.params["numbers"] == update(1).numbers
    assert sorted(use.params["roles"]) == sorted(KINDS)


def plan_of(view: StateView) -> Any:
    return make_plan(view, [Window(Phase.FORWARD, 0, 1.0)], 32 << 20)


def test_what_is_replayed_is_planned_apart():
    view = view_of(1)
    plan = plan_of(view)
    [place] = plan.partitions
    assert place.replayed_by_class == {(kind, "float32"): 4 * N for kind in KINDS.values()}
    assert place.nbytes_by_class == {("step", "float32"): 4}
    assert sum(unit.replays for unit in plan.units) == 1
    assert plan.signature != plan_of(replace(view, updates={})).signature
    [place] = plan_of(replace(view, updates={})).partitions
    assert place.replayed_by_class == {}


@pytest.mark.parametrize("missing", KINDS.values())
def test_a_parameter_that_lacks_a_role_is_not_replayed(missing):
    state = state_at(1)
    del state[missing]
    view = replace(numpy_view(state), updates={"w": update(1)})
    assert not any(unit.replays for unit in plan_of(view).units)


def test_a_parameter_of_another_dtype_is_not_replayed():
    state = state_at(1)
    state["exp_avg"]["w"] = state["exp_avg"]["w"].astype(np.float64)
    view = replace(numpy_view(state), updates={"w": update(1)})
    assert not any(unit.replays for unit in plan_of(view).units)


def test_roles_by_prefix():
    roles = Update("adam", (("opt/0/mu", "first"), ("params", "weight")), {})
    assert role_of(roles, "opt/0/mu/layers/kernel", "layers/kernel") == "first"
    assert role_of(roles, "params/layers/kernel", "layers/kernel") == "weight"
    assert role_of(roles, "opt/1/mu/layers/kernel", "layers/kernel") is None


# -- the policy --------------------------------------------------------------------------------


def requests(cost: CostModel, nbytes: int = 16 << 20) -> list[PolicyRequest]:
    return [PolicyRequest(nbytes, kind, "float32", True, cost) for kind in KINDS.values()]


class _Sink(CostModel):
    """Knows how fast the store is, whatever it measures."""

    def observe_write(self, *_: Any) -> None:
        pass


def sink(bytes_per_s: float) -> CostModel:
    line = {"alpha_s": 1e-3, "beta_s_per_byte": 1 / bytes_per_s}
    return _Sink.from_json({"costs": {"write": line}, "ratios": []})


def test_replay_where_the_sink_is_slow_and_raw_where_it_is_fast():
    policy = Selective(explore_every=0)
    slow, fast = sink(1e8), sink(5e9)
    decision = policy.decide_replay(requests(slow))
    assert decision is not None and decision.codec == "replay" and "apart" in decision.reason
    assert policy.decide_replay(requests(fast)) is None
    assert {policy.decide(r).codec for r in requests(fast)} == {"raw"}
    by_class = {(r.kind, r.dtype): r.nbytes for r in requests(slow)}
    assert policy.wants_base({}, by_class, slow)
    assert not policy.wants_base({}, by_class, fast)


def test_a_bad_ratio_is_noticed():
    cost = sink(1e8)
    policy = Selective(explore_every=0)
    for kind in KINDS.values():
        for _ in range(50):
            cost.observe_ratio("replay", kind, "float32", 16 << 20, 15 << 20)
    assert policy.decide_replay(requests(cost)) is None


def test_replay_is_explored_and_can_be_left_out():
    fast = sink(50e9)
    made = [Selective(explore_every=0).decide_replay(requests(fast)) for _ in range(5)]
    policy = Selective(explore_every=3)
    found = [policy.decide_replay(requests(fast)) for _ in range(9)]
    assert made == [None] * 5
    assert [decision is not None for decision in found] == [False, False, True] * 3
    assert Selective(("plane", "delta")).decide_replay(requests(sink(1e6))) is None
    assert Always("delta").decide_replay(requests(fast)) is None
    assert Always("replay").decide(requests(fast)[0]).codec == "delta"


def test_a_slow_store_gets_replayed_steps_by_default(tmp_path):
    save(tmp_path, range(4), AsymCheck(), cost_model=GivenCosts(1 / 2e7))
    assert "replay" in {codec for _, codec, _ in blocks_of(tmp_path, 3)}
    with asymcheck.Checkpointer(tmp_path) as checkpointer:
        assert same(checkpointer.restore(), state_at(3))


def test_compiling_is_no_cost_of_coding(tmp_path, monkeypatch):
    """It is paid for once, and would speak against the codec for long."""
    clock = SimpleNamespace(now_s=0.0, perf_counter=lambda: clock.now_s)
    monkeypatch.setattr(encode, "time", clock)
    original = ReplayCodec.encode

    def compiles(codec: ReplayCodec, columns: Any) -> Any:
        COMPILING.spent_s += 1000.0
        clock.now_s += 1000.5
        return original(codec, columns)

    monkeypatch.setattr(ReplayCodec, "encode", compiles)
    cost = CostModel()
    save(tmp_path, range(2), cost_model=cost)
    assert 0.1 < cost.seconds("encode:replay", 3 * 4 * N) < 5


# -- damage ------------------------------------------------------------------------------------


def test_a_damaged_group_is_found_and_passed_over(tmp_path):
    save(tmp_path, range(3))
    with closing(open_store(tmp_path)) as store:
        stored = next(b for b in load_index(store, 2).blocks() if b.codec.id == "replay")
    pack = tmp_path / stored.block.key
    data = bytearray(pack.read_bytes())
    data[stored.block.offset] ^= 0xFF
    pack.write_bytes(data)
    with asymcheck.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CorruptionError):
            checkpointer.restore(2)
        assert same(checkpointer.restore(), state_at(1))
