"""Pictures of a run: the timeline of a few steps, and what each checkpoint cost.

Needs matplotlib (`pip install asymcheck[plot]`), which is imported at the first picture.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

from asymcheck.errors import StoreError
from asymcheck.inspection.costs import StepCosts
from asymcheck.inspection.optional import load_optional
from asymcheck.inspection.text import duration, size
from asymcheck.trace import Event, lanes

# Okabe & Ito (2008): told apart with any colour vision, and by lightness in grey.
_FORWARD, _BACKWARD, _COPY = "#56B4E9", "#0072B2", "#009E73"
_STALL, _FLUSH, _COMMIT = "#D55E00", "#E69F00", "#CC79A7"
_DARK = frozenset({_BACKWARD, _COPY, _STALL})
_NAMES = {
    _FORWARD: "forward window",
    _BACKWARD: "backward window",
    _COPY: "copy to host memory",
    _STALL: "training waits",
    _FLUSH: "pack on its way to the store",
    _COMMIT: "commit",
}
_CODECS = {
    "raw": "0.7",
    "zstd": "#F0E442",
    "plane": "#56B4E9",
    "delta": "#0072B2",
    "replay": "#009E73",
}
_LOSSY_CODECS = ("#D55E00", "#E69F00", "#CC79A7")
_CHARACTER_WIDTH = 0.0062  # of the picture's width
_MERGE_GAP_S = 0.0005


@dataclass(frozen=True)
class _Bar:
    """Something that takes time; `lane` keeps it apart from what goes on at once."""

    left_ms: float
    width_ms: float
    label: str
    color: str
    lane: int = 0


@dataclass(frozen=True)
class _Track:
    """A row of bars of the same height."""

    name: str
    bars: list[_Bar]

    @property
    def lanes(self) -> int:
        """How many bars there are at most at any time."""
        return max(bar.lane for bar in self.bars) + 1


def plot_timeline(
    events: Sequence[Event], path: str | os.PathLike[str], *, first_step: int, last_step: int
) -> None:
    """Draw windows, copies, stalls, flushes and commits of a few steps over time.

    Args:
        events: of `Checkpointer.trace.events()`; window events are labelled with phase and
            ordinal ("forward 3").
        path: the picture; the suffix chooses PNG, PDF or SVG.
        first_step, last_step: the steps to draw, both included.

    Raises:
        ValueError: there is no event of these steps.
        MissingLibraryError: matplotlib is not installed.
        StoreError: the picture cannot be written.
    """
    chosen = [event for event in events if first_step <= event.step <= last_step]
    if not chosen:
        raise ValueError(f"no event of steps {first_step} to {last_step} is remembered")
    begin_s = min(event.begin_s for event in chosen)
    length_ms = max((max(event.end_s for event in chosen) - begin_s) * 1e3, 1e-3)
    tracks = _tracks(chosen, begin_s)
    windows = _on(chosen, "window")
    heights = [2.5] * bool(windows) + [track.lanes * 0.8 for track in tracks]
    plt = _pyplot()
    figure, grid = plt.subplots(
        len(heights),
        1,
        sharex=True,
        squeeze=False,
        figsize=(14, 1.6 + 0.42 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
    )
    axes = list(grid[:, 0])
    if windows:
        _draw_windows(axes[0], windows, _on(chosen, "copy"), begin_s, length_ms)
    for axis, track in zip(axes[-len(tracks) :], tracks, strict=True):
        _draw_track(axis, track, length_ms)
    for axis in axes:
        _mark_steps(axis, windows, begin_s)
    _finish(axes, length_ms)
    _legend(figure, plt, first_step, last_step)
    _save(figure, plt, path)


def _on(events: Sequence[Event], track: str) -> list[Event]:
    return sorted((e for e in events if e.track == track), key=lambda e: e.begin_s)


def _tracks(events: Sequence[Event], begin_s: float) -> list[_Track]:
    windows, copies = _on(events, "window"), _on(events, "copy")
    at_barrier = [e for e in copies if _is_at_barrier(e)]
    in_windows = _merged([e for e in copies if not _is_at_barrier(e)], windows)
    rows = (
        ("windows", windows, [e.label.rpartition(" ")[2] for e in windows]),
        ("copies in\nwindows", in_windows, _sizes(in_windows)),
        ("copies at\nbarrier", at_barrier, _sizes(at_barrier)),
        ("stall", _on(events, "stall"), [duration(_length_s(e)) for e in _on(events, "stall")]),
        ("packs in\nflight", _on(events, "flush"), _sizes(_on(events, "flush"))),
        ("commit", _on(events, "commit"), [str(e.step) for e in _on(events, "commit")]),
    )
    return [_Track(name, _bars(found, labels, begin_s)) for name, found, labels in rows if found]


def _is_at_barrier(copy: Event) -> bool:
    return copy.label.endswith("(barrier)")


def _length_s(event: Event) -> float:
    return event.end_s - event.begin_s


def _sizes(events: Sequence[Event]) -> list[str]:
    return [size(event.nbytes) for event in events]


def _color(event: Event) -> str:
    if event.track == "window":
        return _FORWARD if event.label.startswith("forward") else _BACKWARD
    return {"copy": _COPY, "stall": _STALL, "flush": _FLUSH, "commit": _COMMIT}[event.track]


def _bars(events: Sequence[Event], labels: Sequence[str], begin_s: float) -> list[_Bar]:
    return [
        _Bar((e.begin_s - begin_s) * 1e3, _length_s(e) * 1e3, label, _color(e), lane)
        for e, label, lane in zip(events, labels, lanes(events), strict=True)
    ]


def _merged(copies: Sequence[Event], windows: Sequence[Event]) -> list[Event]:
    """Blocks of one partition that were copied back to back in one window as one copy."""
    merged: list[Event] = []
    for event in copies:
        last = merged[-1] if merged else None
        if (
            last is not None
            and (last.label, last.step) == (event.label, event.step)
            and event.begin_s - last.end_s < _MERGE_GAP_S
            and not any(last.end_s <= w.begin_s < event.begin_s for w in windows)
        ):
            merged[-1] = last._replace(end_s=event.end_s, nbytes=last.nbytes + event.nbytes)
        else:
            merged.append(event)
    return merged


def _draw_windows(
    axis: Any, windows: Sequence[Event], copies: Sequence[Event], begin_s: float, length_ms: float
) -> None:
    """What the windows moved: bars as wide as the window, as high as the bytes."""
    moved = [
        sum(c.nbytes for c in copies if w.begin_s <= c.begin_s < w.end_s and not _is_at_barrier(c))
        for w in windows
    ]
    mib = [nbytes / (1 << 20) for nbytes in moved]
    bars = _bars(windows, [f"{height:.1f}" for height in mib], begin_s)
    axis.bar(
        [bar.left_ms for bar in bars],
        mib,
        [bar.width_ms for bar in bars],
        align="edge",
        color=[bar.color for bar in bars],
        edgecolor="white",
        linewidth=0.3,
    )
    for bar, height in zip(bars, mib, strict=True):
        if bar.width_ms > _CHARACTER_WIDTH * len(bar.label) * length_ms:
            middle = bar.left_ms + bar.width_ms / 2
            axis.text(middle, height, bar.label, ha="center", va="bottom", fontsize=7)
    axis.set_ylim(0, 1.2 * max(mib, default=0) or 1)
    axis.set_ylabel("moved in\nwindow [MiB]", rotation=0, ha="right", va="center")


def _draw_track(axis: Any, track: _Track, length_ms: float) -> None:
    bars = track.bars
    axis.barh(
        [bar.lane for bar in bars],
        [bar.width_ms for bar in bars],
        0.8,
        [bar.left_ms for bar in bars],
        color=[bar.color for bar in bars],
        edgecolor=["white" if track.name == "windows" else bar.color for bar in bars],
        linewidth=0.5,
    )
    for i, bar in enumerate(bars):
        end_ms = next((b.left_ms for b in bars[i + 1 :] if b.lane == bar.lane), length_ms)
        _label(axis, bar, end_ms, _CHARACTER_WIDTH * len(bar.label) * length_ms)
    axis.set_ylim(track.lanes - 0.5, -0.5)
    axis.set_yticks([])
    axis.set_ylabel(track.name, rotation=0, ha="right", va="center")


def _label(axis: Any, bar: _Bar, end_ms: float, needed_ms: float) -> None:
    """In the bar, or behind it where nothing follows before `end_ms`, or nowhere."""
    if bar.width_ms > needed_ms:
        ink = "white" if bar.color in _DARK else "black"
        middle = bar.left_ms + bar.width_ms / 2
        axis.text(middle, bar.lane, bar.label, ha="center", va="center", fontsize=7, color=ink)
    elif end_ms - bar.left_ms - bar.width_ms > 1.3 * needed_ms:
        right = bar.left_ms + bar.width_ms + 0.2 * needed_ms
        axis.text(right, bar.lane, bar.label, ha="left", va="center", fontsize=7)


def _mark_steps(axis: Any, windows: Sequence[Event], begin_s: float) -> None:
    """A line where the windows of each step begin; its number above the uppermost row."""
    first: dict[int, float] = {}
    for window in windows:
        first.setdefault(window.step, (window.begin_s - begin_s) * 1e3)
    for step, left_ms in first.items():
        axis.axvline(left_ms, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
        if axis.get_subplotspec().is_first_row():
            above = axis.get_xaxis_transform()
            axis.text(left_ms, 1.02, f"step {step}", transform=above, fontsize=8, va="bottom")


def _finish(axes: Sequence[Any], length_ms: float) -> None:
    for axis in axes:
        for side in ("top", "right", "left", "bottom"):
            axis.spines[side].set_visible(axis is axes[-1] and side == "bottom")
        axis.tick_params(bottom=axis is axes[-1])
    axes[-1].set_xlim(0, length_ms)
    axes[-1].set_xlabel("time since the first event [ms]")


def _legend(figure: Any, plt: Any, first_step: int, last_step: int) -> None:
    steps = f"step {first_step}" if first_step == last_step else f"steps {first_step}-{last_step}"
    figure.suptitle(f"Checkpoints of {steps}", x=0.01, ha="left", weight="bold")
    patches = [plt.Rectangle((0, 0), 1, 1, color=color) for color in _NAMES]
    figure.legend(
        patches, _NAMES.values(), loc="outside lower center", ncols=len(_NAMES), frameon=False
    )


def plot_run(steps: Sequence[StepCosts], path: str | os.PathLike[str]) -> None:
    """Draw what each checkpoint cost: bytes by codec, stall, time until durable, bytes in windows.

    Args:
        steps: of `asymcheck.inspection.costs.run_costs`; those with a problem are left out.
        path: the picture; the suffix chooses PNG, PDF or SVG.

    Raises:
        MissingLibraryError: matplotlib is not installed.
        StoreError: the picture cannot be written.
    """
    plt = _pyplot()
    steps = [step for step in steps if step.problem is None]
    numbers = [step.step for step in steps]
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(10, 8), layout="constrained")
    _plot_bytes(axes[0], steps)
    durable_ms = [step.durable_after_s * 1e3 for step in steps]
    stall_ms = [step.stall_s * 1e3 for step in steps]
    axes[1].plot(numbers, durable_ms, "o-", color=_FLUSH, ms=4, label="until durable")
    axes[1].plot(numbers, stall_ms, "s-", color=_STALL, ms=4, label="training waits")
    axes[1].set_yscale("symlog", linthresh=0.1)
    axes[1].set_ylim(bottom=0)
    axes[1].set_ylabel("time [ms]")
    _legend_above(axes[1])
    axes[2].plot(
        numbers,
        [100 * s.in_window_nbytes / max(s.raw_nbytes, 1) for s in steps],
        "o-",
        color=_COPY,
        ms=4,
    )
    axes[2].set_ylim(-3, 103)
    axes[2].set_ylabel("copied in windows [%]")
    axes[2].set_xlabel("step")
    for axis in axes:
        axis.grid(axis="y", color="0.9")
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.suptitle("What each checkpoint cost", x=0.01, ha="left", weight="bold")
    _save(figure, plt, path)


def _plot_bytes(axis: Any, steps: Sequence[StepCosts]) -> None:
    """A bar for each step, stacked by codec; a mark on top of bases, a line at the raw size."""
    scale, unit = _unit(max((step.raw_nbytes for step in steps), default=0))
    numbers = [step.step for step in steps]
    width = _bar_width(numbers)
    axis.plot(
        numbers, [s.raw_nbytes / scale for s in steps], ".-", color="0.3", label="size of the state"
    )
    tops = [0.0] * len(steps)
    for codec, color in _codec_colors(steps):
        heights = [step.stored_nbytes_by_codec.get(codec, 0) / scale for step in steps]
        axis.bar(numbers, heights, width, tops, color=color, label=codec)
        tops = [top + height for top, height in zip(tops, heights, strict=True)]
    bases = [i for i, step in enumerate(steps) if step.kind == "base"]
    axis.plot([numbers[i] for i in bases], [tops[i] for i in bases], "kv", ms=5, label="base")
    axis.set_ylim(bottom=0)
    axis.set_ylabel(f"stored [{unit}]")
    _legend_above(axis)


def _bar_width(numbers: Sequence[int]) -> float:
    """That of bars which touch nowhere."""
    return 0.8 * min((b - a for a, b in pairwise(numbers)), default=1)


def _codec_colors(steps: Sequence[StepCosts]) -> list[tuple[str, str]]:
    """The codecs that are there, the same order and colours in every picture if lossless."""
    found = {codec for step in steps for codec in step.stored_nbytes_by_codec}
    lossy = zip(sorted(found - _CODECS.keys()), cycle(_LOSSY_CODECS))
    return [(codec, color) for codec, color in _CODECS.items() if codec in found] + [*lossy]


def _legend_above(axis: Any) -> None:
    handles, names = axis.get_legend_handles_labels()
    axis.legend(
        handles,
        names,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=len(names),
        frameon=False,
        borderaxespad=0,
    )


def _unit(nbytes: int) -> tuple[int, str]:
    return next(
        ((1 << bits, unit) for bits, unit in ((30, "GiB"), (20, "MiB")) if nbytes >= 1 << bits),
        (1 << 10, "KiB"),
    )


def _pyplot() -> Any:
    load_optional("matplotlib", "plot", "to draw pictures").use("agg")
    return load_optional("matplotlib.pyplot", "plot", "to draw pictures")


def _save(figure: Any, plt: Any, path: str | os.PathLike[str]) -> None:
    try:
        figure.savefig(Path(path), dpi=150)
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot write {os.fspath(path)}: {error}") from error
    finally:
        plt.close(figure)
