import json
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asymcheck.errors import FormatError
from asymcheck.idle import IdleProfile, WindowTimer
from asymcheck.partition import Phase, Window

F, B = Phase.FORWARD, Phase.BACKWARD


class Timeline:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def at(self, now_s: float, event: Callable[[], object]) -> None:
        self.now_s = now_s
        event()


class Rig:
    """A timer on a synthetic timeline."""

    def __init__(self) -> None:
        self.clock = Timeline()
        self.timer = WindowTimer(self.clock)

    def open(self, now_s: float, phase: Phase, index: int) -> None:
        self.clock.at(now_s, lambda: self.timer.open(phase, index))

    def close(self, now_s: float) -> None:
        self.clock.at(now_s, self.timer.close)

    def communicate(self, begin_s: float, end_s: float) -> None:
        self.begin(begin_s)
        self.end(end_s)

    def begin(self, now_s: float) -> None:
        self.clock.at(now_s, self.timer.communication_begin)

    def end(self, now_s: float) -> None:
        self.clock.at(now_s, self.timer.communication_end)

    def finish(self, now_s: float) -> dict[tuple[Phase, int], float]:
        self.clock.now_s = now_s
        windows = self.timer.finish_cycle()
        names = [(w.phase, w.index) for w in windows]
        assert len(set(names)) == len(names)
        return {name: pytest.approx(w.idle_s) for name, w in zip(names, windows, strict=True)}


def test_idle_is_from_the_feeding_communication_to_the_next() -> None:
    rig = Rig()
    rig.communicate(0.0, 1.0)
    rig.open(1.1, F, 0)
    rig.close(2.9)
    rig.communicate(3.0, 4.0)  # gap 1.0 .. 3.0
    rig.open(4.5, F, 1)
    rig.close(5.0)
    rig.communicate(5.0, 7.0)  # gap 4.0 .. 5.0
    rig.open(7.0, B, 1)
    rig.close(11.0)
    rig.communicate(11.5, 12.0)  # gap 7.0 .. 11.5
    rig.open(12.0, B, 0)
    rig.close(15.0)  # gap 12.0 .. 15.0
    assert rig.finish(20.0) == {(F, 0): 2.0, (F, 1): 1.0, (B, 1): 4.5, (B, 0): 3.0}


def test_windows_without_any_communication_last_until_the_next_or_their_close() -> None:
    rig = Rig()
    rig.open(1.0, F, 0)
    rig.close(2.0)
    rig.open(2.5, B, 0)
    rig.close(6.0)
    assert rig.finish(9.0) == {(F, 0): 1.5, (B, 0): 3.5}


def test_a_missing_close_ends_with_the_next_window_or_the_cycle() -> None:
    rig = Rig()
    rig.open(0.0, F, 0)
    rig.open(2.0, B, 0)
    assert rig.finish(5.0) == {(F, 0): 2.0, (B, 0): 3.0}


def test_a_close_too_many_changes_nothing() -> None:
    rig = Rig()
    rig.close(0.5)
    rig.open(1.0, F, 0)
    rig.close(2.0)
    rig.close(3.0)
    assert rig.finish(4.0) == {(F, 0): 1.0}


def test_a_prefetch_inside_a_window_is_not_idle_time() -> None:
    rig = Rig()
    rig.communicate(0.0, 1.0)
    rig.open(1.0, F, 0)
    rig.communicate(2.0, 4.0)
    rig.close(7.0)
    rig.begin(7.0)  # gaps 1.0 .. 2.0 and 4.0 .. 7.0
    rig.end(8.0)
    rig.open(8.0, F, 1)
    rig.close(9.0)
    assert rig.finish(9.0) == {(F, 0): 4.0, (F, 1): 1.0}


def test_a_prefetch_that_outlives_its_window_delays_the_next_one() -> None:
    rig = Rig()
    rig.open(0.0, F, 0)
    rig.begin(1.0)
    rig.close(2.0)
    rig.open(3.0, F, 1)
    rig.end(4.0)
    rig.close(6.0)
    assert rig.finish(6.0) == {(F, 0): 1.0, (F, 1): 2.0}


def test_a_window_that_is_covered_by_communication_has_no_idle_time() -> None:
    rig = Rig()
    rig.begin(0.0)
    rig.open(1.0, B, 0)
    rig.close(2.0)
    rig.end(3.0)
    assert rig.finish(4.0) == {(B, 0): 0.0}


def test_nested_and_overlapping_communications_are_one() -> None:
    rig = Rig()
    rig.open(0.0, B, 0)
    rig.begin(1.0)
    rig.begin(2.0)
    rig.end(3.0)
    rig.begin(4.0)
    rig.end(5.0)
    rig.end(6.0)
    rig.close(8.0)
    assert rig.finish(8.0) == {(B, 0): 3.0}  # 0 .. 1 and 6 .. 8


def test_only_the_last_communication_before_a_window_feeds_it() -> None:
    rig = Rig()
    rig.communicate(0.0, 1.0)
    rig.communicate(3.0, 4.0)
    rig.open(5.0, F, 0)
    rig.close(6.0)
    assert rig.finish(6.0) == {(F, 0): 2.0}


def test_the_update_between_cycles_is_in_no_window() -> None:
    rig = Rig()
    rig.open(0.0, B, 0)
    rig.communicate(1.0, 2.0)
    rig.close(3.0)
    assert rig.finish(3.5) == {(B, 0): 2.0}
    rig.open(100.0, F, 0)
    rig.close(101.0)
    assert rig.finish(101.0) == {(F, 0): 1.0}


def test_a_communication_of_the_cycle_before_feeds_no_window() -> None:
    rig = Rig()
    rig.open(0.0, B, 0)
    rig.close(1.0)
    rig.communicate(1.0, 2.0)
    assert rig.finish(3.0) == {(B, 0): 1.0}
    rig.open(10.0, F, 0)
    rig.close(11.0)
    assert rig.finish(11.0) == {(F, 0): 1.0}


def test_a_communication_across_the_update_is_still_under_way() -> None:
    rig = Rig()
    rig.open(0.0, B, 0)
    rig.begin(1.0)
    assert rig.finish(2.0) == {(B, 0): 1.0}
    rig.open(3.0, F, 0)
    rig.end(5.0)
    rig.close(6.0)
    assert rig.finish(6.0) == {(F, 0): 1.0}


def test_a_communication_that_began_before_the_timer_is_ignored() -> None:
    rig = Rig()
    rig.end(0.5)
    rig.open(1.0, F, 0)
    rig.close(2.0)
    assert rig.finish(2.0) == {(F, 0): 1.0}


def test_a_cycle_without_events_has_no_windows() -> None:
    assert Rig().finish(1.0) == {}


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 10))))
def test_idle_times_are_never_negative_and_never_exceed_the_free_time(
    events: list[tuple[int, float]],
) -> None:
    clock = Timeline()
    timer = WindowTimer(clock)
    opened = active = 0
    free_s = 0.0
    for event, pause_s in events:
        clock.now_s += pause_s
        free_s += 0.0 if active else pause_s
        if event == 0:
            timer.open(Phase.FORWARD, opened)
            opened += 1
        elif event == 1:
            timer.close()
        elif event == 2:
            timer.communication_begin()
            active += 1
        else:
            timer.communication_end()
            active = max(0, active - 1)
    windows = timer.finish_cycle()
    assert [w.index for w in windows] == list(range(opened))
    assert all(w.idle_s >= 0 for w in windows)
    assert sum(w.idle_s for w in windows) <= free_s + 1e-6


def test_the_default_clock_is_monotonic_time() -> None:
    timer = WindowTimer()
    timer.open(F, 0)
    timer.close()
    assert [w.idle_s >= 0 for w in timer.finish_cycle()] == [True]


# -- the profile ------------------------------------------------------------------------------


def cycle_of(*idle_s: float) -> list[Window]:
    half = len(idle_s) // 2
    return [Window(F if i < half else B, i % max(half, 1), s) for i, s in enumerate(idle_s)]


def idle_of(profile: IdleProfile) -> list[float]:
    windows = profile.windows()
    assert windows is not None
    return [w.idle_s for w in windows]


def warm(*idle_s: float) -> IdleProfile:
    profile = IdleProfile()
    while not profile.ready:
        profile.observe(cycle_of(*idle_s))
    return profile


def test_there_is_a_plan_after_ten_cycles() -> None:
    profile = IdleProfile()
    changes = [profile.observe(cycle_of(1.0, 2.0)) for _ in range(9)]
    assert not any(changes)
    assert not profile.ready
    assert profile.windows() is None
    assert profile.observe(cycle_of(1.0, 2.0))
    assert profile.ready
    assert profile.windows() == cycle_of(1.0, 2.0)


def test_the_first_cycle_and_outliers_do_not_enter_the_plan() -> None:
    profile = IdleProfile()
    profile.observe(cycle_of(500.0, 500.0))
    for i in range(9):
        profile.observe(cycle_of(90.0, 0.0) if i in (2, 5) else cycle_of(1.0, 2.0))
    assert idle_of(profile) == [1.0, 2.0]


def test_cycles_without_windows_do_not_count() -> None:
    profile = IdleProfile()
    for _ in range(9):
        profile.observe(cycle_of(1.0, 2.0))
        profile.observe([])
    assert not profile.ready
    assert profile.observe(cycle_of(1.0, 2.0))


def test_cycles_of_another_shape_do_not_enter_the_plan() -> None:
    profile = IdleProfile()
    for i in range(12):
        profile.observe(cycle_of(7.0, 7.0, 7.0, 7.0) if i % 4 == 3 else cycle_of(1.0, 2.0))
    assert idle_of(profile) == [1.0, 2.0]


def test_the_plan_follows_a_lasting_change_of_shape() -> None:
    profile = warm(1.0, 2.0)
    changes = [profile.observe(cycle_of(1.0, 1.0, 3.0, 3.0)) for _ in range(20)]
    assert changes.count(True) == 1
    assert idle_of(profile) == [1.0, 1.0, 3.0, 3.0]


def test_alternating_shapes_do_not_make_the_plan_flap() -> None:
    profile = warm(1.0, 2.0)
    changes = [
        profile.observe(cycle_of(1.0, 2.0) if i % 2 else cycle_of(1.0, 1.0, 3.0, 3.0))
        for i in range(100)
    ]
    assert not any(changes)


def test_the_plan_follows_a_lasting_drift_once() -> None:
    profile = warm(1.0, 2.0)
    changes = [profile.observe(cycle_of(2.0, 1.0)) for _ in range(50)]
    assert changes.count(True) == 1
    assert changes.index(True) < 10
    assert idle_of(profile) == [2.0, 1.0]


def test_a_few_odd_cycles_are_no_drift() -> None:
    profile = warm(1.0, 2.0)
    for _ in range(20):
        assert not any(profile.observe(cycle_of(9.0, 9.0)) for _ in range(4))
        assert not any(profile.observe(cycle_of(1.0, 2.0)) for _ in range(6))
    assert idle_of(profile) == [1.0, 2.0]


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_replan(seed: int) -> None:
    rng = random.Random(seed)
    profile = IdleProfile()
    truth_s = [0.01] * 12 + [0.03] * 12
    changes = [
        profile.observe(cycle_of(*(s * rng.uniform(0.7, 1.3) for s in truth_s))) for _ in range(500)
    ]
    assert changes.count(True) == 1  # the end of the warm-up
    assert idle_of(profile) == pytest.approx(truth_s, rel=0.3)


def test_windows_without_idle_time_do_not_drift() -> None:
    profile = warm(0.0, 0.0)
    assert not any(profile.observe(cycle_of(0.0, 0.0)) for _ in range(20))


@given(
    st.lists(
        st.lists(st.floats(0, 1e3), max_size=6).map(lambda idle_s: cycle_of(*idle_s)), max_size=60
    )
)
def test_observe_says_true_exactly_when_the_plan_may_have_changed(
    cycles: list[list[Window]],
) -> None:
    profile = IdleProfile(warmup_cycles=5, drift_cycles=2)
    for cycle in cycles:
        before = profile.windows()
        if not profile.observe(cycle):
            assert profile.windows() == before
        assert profile.ready == (profile.windows() is not None)


def test_a_saved_profile_is_warm_and_still_follows_drift() -> None:
    saved = json.loads(json.dumps(warm(1.0, 2.0).to_json()))
    profile = IdleProfile.from_json(saved)
    assert profile.windows() == cycle_of(1.0, 2.0)
    profile.observe(cycle_of(500.0, 500.0))
    assert not any(profile.observe(cycle_of(1.0, 2.0)) for _ in range(3))
    assert not profile.observe(cycle_of(1.0, 1.0, 3.0, 3.0))
    assert [profile.observe(cycle_of(5.0, 2.0)) for _ in range(20)].count(True) == 1
    assert idle_of(profile) == [5.0, 2.0]


def test_a_cold_profile_is_saved_as_cold() -> None:
    assert not IdleProfile.from_json(IdleProfile().to_json()).ready


WINDOW: dict[str, object] = {"phase": "forward", "index": 0, "idle_s": 1.0}


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"windows": {}},
        {"windows": [], "more": 1},
        {"windows": [WINDOW | {"idle_s": math.nan}]},
        {"windows": [WINDOW | {"idle_s": math.inf}]},
        {"windows": [WINDOW | {"idle_s": -1.0}]},
        {"windows": [WINDOW | {"idle_s": "1"}]},
        {"windows": [WINDOW | {"idle_s": True}]},
        {"windows": [WINDOW | {"idle_s": 10**400}]},
        {"windows": [WINDOW | {"index": -1}]},
        {"windows": [WINDOW | {"phase": "sideways"}]},
        {"windows": [WINDOW | {"extra": 1}]},
        {"windows": [{"phase": "forward", "index": 0}]},
    ],
)
def test_malformed_profiles_are_refused(document: object) -> None:
    with pytest.raises(FormatError, match="idle profile"):
        IdleProfile.from_json(document)


@pytest.mark.parametrize(
    ("warmup_cycles", "drift_ratio", "drift_cycles"),
    [(1, 0.1, 1), (5, -0.1, 2), (5, math.nan, 2), (5, 0.1, 0)],
)
def test_impossible_settings_are_refused(
    warmup_cycles: int, drift_ratio: float, drift_cycles: int
) -> None:
    with pytest.raises(ValueError, match="impossible profile"):
        IdleProfile(warmup_cycles, drift_ratio, drift_cycles)
