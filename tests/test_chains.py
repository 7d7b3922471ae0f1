"""Where chains end: by their cost, and never far from the best length of a sweep."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import asymcheck
from asymcheck.chains import MAX_LENGTH, RESTORES_PER_STEP, ChainCost
from asymcheck.cost import CostModel
from asymcheck.policy import Always
from asymcheck.strategies import AsymCheck

RAW = 1 << 30


def writing_at(bytes_per_s: float) -> CostModel:
    line = {"alpha_s": 0.0, "beta_s_per_byte": 1 / bytes_per_s}
    return CostModel.from_json({"costs": {"write": line}, "ratios": []})


def length_of(base: float, increment: float, cost: CostModel) -> int:
    """Steps of a chain until a base is due; sizes are parts of the raw state."""
    chain = ChainCost()
    chain.add(RAW, int(base * RAW), is_base=True, cost=cost)
    length = 1
    while not chain.end_if_due():
        chain.add(RAW, int(increment * RAW), is_base=False, cost=cost)
        length += 1
        assert length <= MAX_LENGTH + 2
    assert not chain.end_if_due()  # said once
    return length


def mean_cost_s(length: int, base: float, increment: float, cost: CostModel) -> float:
    """Of a step, with chains of that many."""
    s_per_byte, decode_s = cost.line("write").beta_s_per_byte, RAW / 1.5e9
    spent_s = restore_s = 0.0
    for i in range(length):
        moved_s = s_per_byte * RAW * (increment if i else base)
        restore_s += moved_s + decode_s
        spent_s += moved_s + RESTORES_PER_STEP * restore_s
    return spent_s / length


@given(st.floats(0.4, 1.0), st.floats(0.01, 0.9), st.floats(1e7, 5e9))
def test_within_a_tenth_of_the_best_length(base: float, ratio: float, bytes_per_s: float) -> None:
    increment, cost = base * ratio, writing_at(bytes_per_s)
    lengths = range(2, MAX_LENGTH + 2)
    best_s = min(mean_cost_s(n, base, increment, cost) for n in lengths)
    chosen = length_of(base, increment, cost)
    assert mean_cost_s(chosen, base, increment, cost) <= 1.1 * best_s


def test_small_increments_make_long_chains_and_large_ones_short() -> None:
    cost = writing_at(1e8)
    lengths = [length_of(0.8, part, cost) for part in (0.02, 0.1, 0.3, 0.7)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 2 * lengths[-1]
    assert length_of(0.8, 0.0, writing_at(1e6)) == MAX_LENGTH + 1


def depths(url: Path, steps: int, **options: Any) -> list[int]:
    """The place in its chain of every step of a run."""
    strategy = AsymCheck(policy=Always("delta"))
    w = np.random.default_rng(0).normal(0, 1, 100_000).astype(np.float32)
    with asymcheck.Checkpointer(url, strategy=strategy, **options) as checkpointer:
        for step in range(steps):
            checkpointer.save(step, {"params": {"w": w.view(np.uint32) + np.uint32(step)}})
            checkpointer.wait()
    found = []
    for step in range(steps):
        with asymcheck.open_checkpoint(url, step) as checkpoint:
            found.append(len(checkpoint.chain) - 1)
    return found


def test_bases_come_by_cost_unless_a_length_is_given(tmp_path: Path) -> None:
    assert depths(tmp_path / "given", 7, max_chain=2) == [0, 1, 2, 0, 1, 2, 0]
    by_cost = depths(tmp_path / "cost", 60, cost_model=_Fixed.from_json(_SLOW))
    assert by_cost[0] == 0 and max(by_cost) >= 3
    assert by_cost.count(0) >= 2
    assert all(b == a + 1 or b == 0 for a, b in pairwise(by_cost))


class _Fixed(CostModel):
    """Knows what the store costs, whatever it measures."""

    def observe_write(self, *_: Any) -> None:
        pass


_SLOW = {"costs": {"write": {"alpha_s": 0.0, "beta_s_per_byte": 1e-9}}, "ratios": []}


@pytest.mark.parametrize("max_chain", [-1, 257])
def test_lengths_out_of_range_are_refused(max_chain: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_chain"):
        asymcheck.Checkpointer(tmp_path, max_chain=max_chain)
