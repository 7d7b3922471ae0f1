"""Pictures: what is in them, by matplotlib's own account."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asymcheck.errors import StoreError
from asymcheck.inspection.costs import StepCosts
from asymcheck.plot import plot_run, plot_timeline
from asymcheck.trace import Event

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")

MIB = 1 << 20


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were drawn, still open to questions."""
    figures: list[Any] = []
    monkeypatch.setattr("asymcheck.plot._save", lambda figure, *_: figures.append(figure))
    return figures


def step_events(step: int, begin_s: float) -> list[Event]:
    """A second: two windows, each with two blocks of a partition; two packs at once; a stall."""

    def event(track: str, label: str, first: float, last: float, nbytes: int = 0) -> Event:
        return Event(track, label, step, begin_s + first, begin_s + last, nbytes)

    return [
        event("copy", "partition 0", 0.10, 0.1500, 1 * MIB),
        event("copy", "partition 0", 0.1501, 0.2, 2 * MIB),
        event("window", "forward 0", 0.1, 0.4),
        event("copy", "partition 1", 0.45, 0.5, 4 * MIB),
        event("window", "backward 0", 0.4, 0.8),
        event("copy", "partition 2 (barrier)", 0.8, 0.81, 5 * MIB),
        event("stall", "barrier", 0.8, 0.82, 5 * MIB),
        event("flush", "w00000-000000.pack", 0.5, 0.9, 7 * MIB),
        event("flush", "w00000-000001.pack", 0.6, 0.95, 5 * MIB),
        event("commit", f"step {step}", 0.95, 1.0),
    ]


EVENTS = [*step_events(1, 100.0), *step_events(2, 101.0), *step_events(3, 102.0)]


def texts(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts]


def bars(axis: Any) -> list[tuple[float, float]]:
    """(left, width) of all bars, in milliseconds."""
    return [(round(p.get_x(), 6), round(p.get_width(), 6)) for p in axis.patches]


def test_timeline_has_a_row_for_everything(drawn: list[Any], tmp_path: Path) -> None:
    plot_timeline(EVENTS, tmp_path / "x.png", first_step=1, last_step=2)
    (figure,) = drawn
    rows = {axis.get_ylabel().replace("\n", " "): axis for axis in figure.axes}
    assert list(rows) == [
        "moved in window [MiB]",
        "windows",
        "copies in windows",
        "copies at barrier",
        "stall",
        "packs in flight",
        "commit",
    ]
    assert bars(rows["windows"]) == [(0, 300), (300, 400), (1000, 300), (1300, 400)]
    assert texts(rows["windows"]) == ["0", "0", "0", "0"]
    moved = rows["moved in window [MiB]"]
    assert [p.get_height() for p in moved.patches] == [3, 4, 3, 4]
    assert [t for t in texts(moved) if t.startswith("step")] == ["step 1", "step 2"]
    assert bars(rows["copies in windows"])[0] == (0, 100)  # both blocks as one bar
    assert texts(rows["copies in windows"])[:2] == ["3.0 MiB", "4.0 MiB"]
    assert texts(rows["copies at barrier"])[0] == "5.0 MiB"
    assert texts(rows["stall"])[0] == "20.0 ms"
    assert sorted({p.get_y() for p in rows["packs in flight"].patches}) == [-0.4, 0.6]
    assert bars(rows["commit"]) == [(850, 50), (1850, 50)]
    assert figure.axes[-1].get_xlim() == pytest.approx((0, 1900))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"forward window", "backward window", "commit"} <= set(legend)


def test_forward_and_backward_have_two_colors(drawn: list[Any], tmp_path: Path) -> None:
    plot_timeline(EVENTS, tmp_path / "x.png", first_step=1, last_step=1)
    windows = next(axis for axis in drawn[0].axes if axis.get_ylabel() == "windows")
    assert len({patch.get_facecolor() for patch in windows.patches}) == 2


@pytest.mark.parametrize("track", ["window", "copy", "flush", "commit", "stall"])
def test_timeline_of_one_track(tmp_path: Path, track: str) -> None:
    events = [event for event in EVENTS if event.track == track]
    plot_timeline(events, tmp_path / "x.png", first_step=3, last_step=3)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_timeline_without_events(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no event of steps 7 to 9"):
        plot_timeline(EVENTS, tmp_path / "x.png", first_step=7, last_step=9)


def test_timeline_of_no_duration(tmp_path: Path) -> None:
    event = Event("commit", "step 1", 1, 5.0, 5.0)
    plot_timeline([event], tmp_path / "x.svg", first_step=1, last_step=1)
    assert "<svg" in (tmp_path / "x.svg").read_text()


COSTS = [
    StepCosts(10, "base", 8 * MIB, 6 * MIB, 0.01, 4 * MIB, 0.5, {"plane": 5 * MIB, "raw": MIB}),
    StepCosts(12, "increment 1", 8 * MIB, 2 * MIB, 0.0, 8 * MIB, 0.2, {"delta": 2 * MIB}),
    StepCosts(13, "damaged", problem="gone"),
    StepCosts(15, "base", 8 * MIB, 4 * MIB, 0.0, 8 * MIB, 0.2, {"topk": MIB, "plane": 3 * MIB}),
]


def test_run(drawn: list[Any], tmp_path: Path) -> None:
    plot_run(COSTS, tmp_path / "x.png")
    amounts, times, moved = drawn[0].axes
    assert amounts.get_ylabel() == "stored [MiB]"
    raw, bases = (line.get_xydata().tolist() for line in amounts.get_lines())
    assert (raw, bases) == ([[10, 8], [12, 8], [15, 8]], [[10, 6], [15, 4]])
    durable, stall = (line.get_ydata().tolist() for line in times.get_lines())
    assert (durable, stall) == ([500, 200, 200], [10, 0, 0])
    assert moved.get_lines()[0].get_ydata().tolist() == [50, 100, 100]


def test_bytes_of_a_run_are_stacked_by_codec(drawn: list[Any], tmp_path: Path) -> None:
    plot_run(COSTS, tmp_path / "x.png")
    amounts = drawn[0].axes[0]
    stacks = {
        bars.get_label(): [(bar.get_y(), bar.get_height()) for bar in bars]
        for bars in amounts.containers
    }
    assert stacks == {
        "raw": [(0, 1), (0, 0), (0, 0)],
        "plane": [(1, 5), (0, 0), (0, 3)],
        "delta": [(6, 0), (0, 2), (3, 0)],
        "topk": [(6, 0), (2, 0), (3, 1)],
    }
    middles = [bar.get_x() + bar.get_width() / 2 for bar in amounts.containers[0]]
    assert middles == pytest.approx([10, 12, 15])
    assert all(bar.get_width() < 2 for bars in amounts.containers for bar in bars)
    assert len({bars[0].get_facecolor() for bars in amounts.containers}) == 4
    names = [text.get_text() for text in amounts.get_legend().get_texts()]
    assert names == ["size of the state", "base", *stacks]


def test_colours_of_lossless_codecs_are_the_same_in_every_picture(
    drawn: list[Any], tmp_path: Path
) -> None:
    for steps in (COSTS, COSTS[-1:]):
        plot_run(steps, tmp_path / "x.png")
    plane = [
        bars[0].get_facecolor()
        for figure in drawn
        for bars in figure.axes[0].containers
        if bars.get_label() == "plane"
    ]
    assert len(plane) == 2
    assert plane[0] == plane[1]


@pytest.mark.parametrize("steps", [COSTS, COSTS[:1], []])
def test_run_is_written(tmp_path: Path, steps: list[StepCosts]) -> None:
    plot_run(steps, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot write"):
        plot_run(COSTS, tmp_path / "no" / "x.png")
