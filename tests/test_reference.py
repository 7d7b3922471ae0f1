"""The predecessor in memory: a place of its own for every byte that this writer owns."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from states import states
from test_plan import WINDOWS, groups_of_leaves, owned_by, planned

from asymcheck.partition import Window
from asymcheck.reference import Reference
from asymcheck.state import numpy_view


@given(states() | groups_of_leaves(), WINDOWS, WINDOWS, st.integers(1, 3), st.integers(64, 500))
def test_holds_every_element_once_whatever_the_units(
    state: Any, windows: list[Window], later: list[Window], writers: int, max_unit_nbytes: int
) -> None:
    view = owned_by(numpy_view(state), 0, writers)
    plan = planned(view, windows, max_unit_nbytes)
    reference = Reference(plan)
    assert reference.nbytes == plan.nbytes
    for unit in plan.units:
        for i in unit.sources:
            view.sources[i].read_into(unit.start, unit.count, reference.view(unit, i))
    for unit in planned(view, later, 96).units:  # cut elsewhere, the same elements
        for i in unit.sources:
            held = reference.view(unit, i)
            expected = np.empty(held.nbytes, np.uint8)
            view.sources[i].read_into(unit.start, unit.count, expected)
            assert bytes(held) == bytes(expected)


def test_knows_what_it_holds() -> None:
    plan = planned(numpy_view({"w": np.zeros(3)}))
    reference = Reference(plan)
    assert reference.holds is None
    assert reference.signature == plan.signature
