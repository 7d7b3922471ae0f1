"""Collectives are seen as they begin and end, on real processes, and nothing else changes."""

from __future__ import annotations

from contextlib import closing

import pytest

torch = pytest.importorskip("torch")

import collective_runs  # noqa: E402
from torch_ddp import start  # noqa: E402
from torch_runs import differences  # noqa: E402

from asymcheck.inspection.timeline import summarise_traces  # noqa: E402
from asymcheck.stores import open_store  # noqa: E402
from asymcheck.traces import stored_traces  # noqa: E402
from asymcheck_torch.testing import slow_collectives  # noqa: E402

NBYTES = {  # of the whole tensor: six floats a rank go in
    "all_reduce": 24,
    "broadcast": 24,
    "reduce": 24,
    "all_gather": 48,
    "all_gather_into_tensor": 48,
    "reduce_scatter": 24,
    "reduce_scatter_tensor": 24,
    "all_to_all_single": 24,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found."""
    return start(collective_runs.all_of_gloo, tmp_path_factory.mktemp("gloo") / "ranks")


@pytest.mark.parametrize("name", collective_runs.CALLS)
def test_a_collective_is_seen_and_not_changed(ranks, name):
    for found in ranks:
        alone, observed, slowed, seen = found["calls"][name]
        assert differences(observed, alone) == []
        assert differences(slowed, alone) == []
        ((seen_name, nbytes),) = seen
        assert seen_name == name.split(",")[0]
        assert nbytes == NBYTES.get(seen_name, nbytes)


def test_kernels_are_in_force_again_afterwards(ranks):
    for found in ranks:
        before, within, after = found["kernels"]
        assert within != before
        assert after == before


def test_observers_come_and_go(ranks):
    assert [found["twice"] for found in ranks] == [(1, 2), (1, 2)]


def test_the_end_is_told_without_anybody_waiting(ranks):
    assert [found["unwaited"] for found in ranks] == [1, 1]


def test_many_collectives_at_once(ranks):
    assert [found["many"] for found in ranks] == [2000, 2000]


def test_in_a_group_of_one_nothing_moves(ranks):
    assert [found["alone"] for found in ranks] == [[], []]


def test_a_collective_that_is_refused(ranks):
    for found in ranks:
        message, begun = found["refused"]
        assert message
        assert begun <= 1  # and it has ended, or there would be nothing to look at


def test_a_lost_peer_is_an_error_as_ever(tmp_path):
    (message, ended), _ = start(collective_runs.lose_a_peer, tmp_path / "ranks")
    assert "gloo" in message
    assert ended == 1


def test_slow_collectives_take_at_least_what_their_link_takes(ranks):
    for found in (found["slow"] for found in ranks):
        assert found["sync"] >= 0.2
        assert found["async"] >= 0.2
        assert found["bytes"] >= 0.3
        assert found["observed"][0] >= 0.2
        assert found["is work"]
        assert found["waited"] == [True, True]
        assert (found["early"], found["late"]) == (False, True)


@pytest.mark.parametrize("link", [(-1.0, None), (0.0, 0.0), (0.1, -5.0)])
def test_impossible_links(link):
    with pytest.raises(ValueError, match="no such link"), slow_collectives(*link):
        pass


def test_ddp_and_fsdp2_are_seen_and_not_changed(ranks):
    for found in ranks:
        check(found["trained"]["ddp"], {"all_reduce"})
        check(found["trained"]["fsdp2"], {"all_gather_into_tensor", "reduce_scatter_tensor"})


def test_deepspeed_is_seen_and_not_changed(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    stages = ["zero1", "zero2", "zero3"]
    for found in start(collective_runs.train, tmp_path / "ranks", stages):
        check(found["zero1"], {"all_gather_into_tensor", "all_reduce"})
        check(found["zero2"], {"all_gather_into_tensor"})
        check(found["zero3"], {"all_gather_into_tensor", "reduce_scatter_tensor"})


def test_an_attached_run_keeps_when_collectives_and_windows_were(tmp_path):
    url = (tmp_path / "run").as_uri()
    start(collective_runs.attached, tmp_path / "ranks", url)
    with closing(open_store(url)) as store:
        traces = stored_traces(store)
    assert [(trace.writer, trace.writers) for trace in traces] == [(0, 2), (1, 2)]
    assert len({trace.clock for trace in traces}) == 1
    for trace in traces:
        tracks = {event.track for event in trace.events}
        assert tracks == {"window", "communication", "copy", "stall", "flush", "commit"}
        labels = {e.label for e in trace.events if e.track == "communication"}
        assert labels >= {"all_gather_into_tensor", "reduce_scatter_tensor"}
        windows, collectives = (
            [e for e in trace.events if e.track == track] for track in ("window", "communication")
        )
        assert len(windows) > 12 * 8  # interrupted ones are several
        assert not [(w, c) for w in windows for c in collectives if overlap(w, c)]
    summary = summarise_traces(traces)
    assert summary.captured_nbytes > 0
    assert summary.last_step == 12


def overlap(one, other):
    return one.begin_s < other.end_s and other.begin_s < one.end_s


def check(trained, expected):
    alone, observed, seen = trained
    assert observed == alone
    assert expected <= seen.keys()
