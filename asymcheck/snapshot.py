"""Capturing a state between two updates: in the windows that training leaves, and at the barrier.

Invariant I3: every extent has the value that it had right after the update. The state does not
change between an update and the next one, so it may be copied at any time in between, by any
thread; `Capture.finish` is the barrier that the next update waits behind. Of a state that was
changed all the same nothing is committed, where its sources can tell.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from asymcheck.attempt import Attempt, PendingSave
from asymcheck.cost import CostModel
from asymcheck.encode import CapturedRun, Encoder
from asymcheck.state import LeafSource
from asymcheck.threads import run_at_low_priority
from asymcheck.trace import Trace


class Capture:
    """One step's snapshot in the making.

    Between windows and after the last unit nothing is copied in the background. Training calls
    `enter_window` and `leave_window` as the link becomes idle and busy, and `finish` right
    before the next update. All three are cheap, and correctness rests on `finish` alone.
    """

    def __init__(
        self,
        attempt: Attempt,
        sources: Sequence[LeafSource],
        encoder: Encoder,
        *,
        pack_per_partition: bool,
        cost: CostModel,
        trace: Trace,
    ) -> None:
        self.pending = PendingSave(attempt)
        self._attempt = attempt
        self._sources = sources
        self._encoder = encoder
        self._pack_per_partition = pack_per_partition
        self._cost = cost
        self._trace = trace
        self._taking = threading.Lock()  # guards the position and the order of placing
        self._position = 0  # in the plan's runs
        self._ended = False  # of the training thread only
        self._state = threading.Condition()  # guards what follows
        self._open_ordinal = -1
        self._idle = False
        self._finishing = False
        self._copying = 0
        self._copied_s = 0.0

    @property
    def step(self) -> int:
        """The step."""
        return self._attempt.step

    @property
    def base_step(self) -> int | None:
        """The step that this one may be an increment to; whether it is shows its commit record."""
        return self._attempt.base_step

    def enter_window(self, ordinal: int) -> None:
        """The link is idle: partitions up to the `ordinal`-th window's may move."""
        with self._state:
            self._open_ordinal = max(self._open_ordinal, ordinal)
            self._idle = True
            self._state.notify_all()

    def leave_window(self) -> None:
        """The link is busy: background copying pauses at the end of the blocks at hand."""
        with self._state:
            self._idle = False

    def fail(self, error: BaseException) -> None:
        """Give the step up."""
        self._attempt.fail(error)

    def await_captured(self, timeout_s: float) -> bool:
        """Wait until everything is captured; False if that takes too long."""
        with self._state:
            return self._state.wait_for(self._is_captured, timeout_s)

    def _is_captured(self) -> bool:
        over = self._position >= len(self._attempt.plan.runs) or self._attempt.error is not None
        return over and self._copying == 0

    def add_stall(self, seconds: float) -> None:
        """Count time for which the adapter held up training for this snapshot."""
        self._attempt.stall_s += seconds

    def finish(self) -> float:
        """Capture what remains and return when the state may change; the seconds it took.

        The calling thread helps. Idempotent. Never raises for a failure of the save: that
        surfaces at the next call of the checkpointer. Interrupted (Ctrl-C), it gives the step up,
        since nobody can tell whether the state changes before it is called again.
        """
        begun_s = time.monotonic()
        if self._ended:
            return 0.0
        with self._state:
            self._finishing = True
            self._state.notify_all()
        try:
            left_nbytes = self._drain()
            with self._state:
                self._state.wait_for(lambda: self._copying == 0)
            if self._attempt.error is None:
                self._check_unchanged()
        except BaseException as error:  # an interrupt: the state may change before all is captured
            self._attempt.fail(error)
            raise
        stall_s = time.monotonic() - begun_s
        self._attempt.stall_s += stall_s
        self._attempt.in_window_nbytes = self._attempt.plan.nbytes - left_nbytes
        if self._attempt.error is None:
            self._cost.observe("copy", self._attempt.plan.nbytes, self._copied_s)
        self._trace.add("stall", "barrier", self.step, begun_s, left_nbytes)
        self._encoder.end(self._attempt)
        self._sources = ()  # nobody reads the state any more: its memory may go
        self._ended = True
        return stall_s

    def _check_unchanged(self) -> None:
        try:
            for source in self._sources:
                source.check_unchanged()
        except Exception as error:
            self._attempt.fail(error)

    def run_in_background(self) -> None:
        """Copy in windows until the barrier takes over; called on the capture thread."""
        while self._await_window():
            try:
                self._copy_next(in_window=True)
            finally:
                with self._state:
                    self._copying -= 1
                    self._state.notify_all()

    def _await_window(self) -> bool:
        """Wait for leave to copy a run; False when there is nothing more to do here."""
        plan = self._attempt.plan
        with self._state:
            while not self._finishing and self._position < len(plan.runs):
                if self._attempt.error is not None:
                    return False
                unit = plan.units[plan.runs[self._position].start]
                partition = plan.partitions[unit.partition]
                if self._idle and partition.ordinal <= self._open_ordinal:
                    self._copying += 1
                    return True
                self._state.wait()
            return False

    def _drain(self) -> int:
        left_nbytes = 0
        while (nbytes := self._copy_next(in_window=False)) is not None:
            left_nbytes += nbytes
        return left_nbytes

    def _copy_next(self, *, in_window: bool) -> int | None:
        """Capture the next run; its bytes, or None if there is none left."""
        captured = self._take(in_window=in_window)
        if captured is None:
            return None
        begun_s = time.monotonic()
        try:
            for column in captured.columns:
                unit = column.unit
                self._sources[column.source].read_into(unit.start, unit.count, column.view)
        except BaseException as error:
            self._attempt.fail(error)
            if not isinstance(error, Exception):
                raise  # an interrupt of training, not a failure of the copy
        finally:
            captured.note_captured()
        with self._state:
            self._copied_s += time.monotonic() - begun_s
        nbytes = sum(column.view.nbytes for column in captured.columns)
        label = f"partition {captured.partition}" + ("" if in_window else " (barrier)")
        self._trace.add("copy", label, self.step, begun_s, nbytes)
        return nbytes

    def _take(self, *, in_window: bool) -> CapturedRun | None:
        attempt, units, runs = self._attempt, self._attempt.plan.units, self._attempt.plan.runs
        with self._taking:
            if attempt.error is not None or self._position >= len(runs):
                return None
            if in_window and self._finishing:
                return None
            run = runs[self._position]
            try:
                captured = self._encoder.place(attempt, run)
            except BaseException as error:  # room for a part of the run may be taken already
                attempt.fail(error)
                if not isinstance(error, Exception):
                    raise
                return None
            self._position += 1
            last = run.stop == len(units) or units[run.stop].partition != captured.partition
            if last and self._pack_per_partition:
                self._encoder.end_partition(attempt)
            return captured


class Snapshotter:
    """The capture thread: works on one `Capture` at a time, at low priority."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._capture: Capture | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="asymcheck-capture", daemon=True)
        self._thread.start()

    def start(self, capture: Capture) -> None:
        """Work on `capture` from now on; the one before was finished."""
        with self._condition:
            self._capture = capture
            self._condition.notify_all()

    def close(self) -> None:
        """End the thread; the last capture was finished."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._thread.join()

    def _work(self) -> None:
        run_at_low_priority()
        while (capture := self._next()) is not None:
            capture.run_in_background()

    def _next(self) -> Capture | None:
        with self._condition:
            self._condition.wait_for(lambda: self._capture is not None or self._closed)
            capture, self._capture = self._capture, None
            return capture
