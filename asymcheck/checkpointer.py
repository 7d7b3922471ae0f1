"""The life cycle of a run: saving, restoring, what a restart takes over, errors, the end."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, TypeVar

from asymcheck.attempt import Attempt, PendingSave, failed_attempt, failure
from asymcheck.buffers import Allocate, page_aligned
from asymcheck.calibration import calibrate_writes, check_conditional_puts
from asymcheck.chains import BaseSchedule
from asymcheck.commit import (
    MAX_CHAIN,
    CommitRecord,
    committed_steps,
    read_commit,
    read_manifest,
    retire,
)
from asymcheck.copying import copying_nbytes
from asymcheck.cost import CostModel
from asymcheck.errors import (
    AsymCheckError,
    CheckpointNotFoundError,
    ClosedError,
    CommitError,
    CorruptionError,
    FormatError,
    StepExistsError,
    StoreError,
    StoreFullError,
    UnsupportedStateError,
)
from asymcheck.idle import IdleProfile
from asymcheck.increments import Increments
from asymcheck.lease import LEASE_S
from asymcheck.manifest import MAX_STEP
from asymcheck.mirror import Mirror
from asymcheck.partition import Phase, Window
from asymcheck.pipeline import Options, Pipeline, buffer_nbytes
from asymcheck.plan import Plan, make_plan, signature_of
from asymcheck.reader import Checkpoint, fill_target, open_step
from asymcheck.retention import (
    Committed,
    Retention,
    apply,
    collect_orphans,
    remove_later,
    survey,
)
from asymcheck.snapshot import Capture
from asymcheck.state import StateView, numpy_view
from asymcheck.stores import open_store
from asymcheck.stores.base import Store
from asymcheck.strategies import by_name
from asymcheck.strategy import Strategy
from asymcheck.tiers import Tiers
from asymcheck.trace import Trace
from asymcheck.traces import store_trace

T = TypeVar("T")
_log = logging.getLogger("asymcheck")

MIN_HOST_NBYTES = 1 << 20
_RUN_ID = re.compile(r"[0-9a-z]{1,32}")


class Checkpointer:
    """Saves and restores the steps of one run.

    Saving never blocks for the store: `save` returns when every byte is captured, and the rest
    happens in background threads. A step is there when its commit record is; everything else
    that a crash leaves is invisible and collected later. Use from one thread; close it, or use
    it as a context manager.

    Args:
        url: where the run is kept: a path or a URL (see `open_store`), or a `Store`.
        strategy: a `Strategy` or its name: "asymcheck", "asymcheck-s", "asymcheck-naive" or
            "synchronous".
        max_host_bytes: bound on host memory for buffers and the increments' reference.
        max_to_keep: keep the newest so many steps (and what they decode from); None keeps all.
        keep_every: also keep steps that are multiples of this.
        max_chain: an increment has at most so many steps below it, up to 256; 0 stores every
            step in full. None chooses by what writing and restoring cost (see
            `asymcheck.chains`), up to 64; writer 0 does for all writers, who begin a chain at the
            same step, or go on with theirs for a few steps if they learn of it too late.
        on_error: a failed save raises `SaveFailedError` at the next call ("raise"), or is logged
            while training goes on ("warn").
        writer, writers: this process's number and their count; all write the same run, and save
            the same steps in the same order. A step that one cannot save fails on all.
        run_id: a name that all writers share and that no start of this or another run has had
            before, 1 to 32 of [0-9a-z]; required for several writers.
        stall_timeout_s: how long training waits for host memory when the store does not keep
            up before it gives the save up.
        commit_timeout_s: how long writers wait for each other.
        lease_s: how long others leave this run's uncommitted objects alone if it vanishes.
        cost_model: a fitted one; by default the run's last, else measured at the first save.
        allocate: gives page-aligned host buffers (pinned, for a device).
        encode_threads: codecs running at once; by default half the cores, at most 8.
        mirror: a second store (a path, a URL or a `Store`) to which steps are copied in the
            background, and from which they are restored where `url` does not have them, or not
            whole; see docs/tiers.md. Of several writers, who must share `url`, number 0 copies.
        mirror_every: copy the steps that are multiples of this, and what they decode from.
        mirror_max_to_keep, mirror_keep_every: as `max_to_keep` and `keep_every`, for the mirror.
        keep_trace: at `close`, keep the last 20,000 events of `trace` in the run, for `asymcheck
            stats --trace`, in place of those of earlier starts.

    Raises:
        ValueError: arguments out of range.
        StoreError: a URL names no store, or the mirror is the run's own store.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | Store,
        *,
        strategy: str | Strategy = "asymcheck",
        max_host_bytes: int = 4 << 30,
        max_to_keep: int | None = None,
        keep_every: int | None = None,
        max_chain: int | None = None,
        on_error: Literal["raise", "warn"] = "raise",
        writer: int = 0,
        writers: int = 1,
        run_id: str | None = None,
        stall_timeout_s: float = 300.0,
        commit_timeout_s: float = 300.0,
        lease_s: float = LEASE_S,
        cost_model: CostModel | None = None,
        allocate: Allocate = page_aligned,
        encode_threads: int | None = None,
        mirror: str | os.PathLike[str] | Store | None = None,
        mirror_every: int = 1,
        mirror_max_to_keep: int | None = None,
        mirror_keep_every: int | None = None,
        keep_trace: bool = False,
    ) -> None:
        self.strategy = by_name(strategy)
        self._check(max_host_bytes, max_chain, on_error, writer, writers, run_id)
        self._store = _opened(url)
        self._retention = Retention(max_to_keep, keep_every)
        mirror_store = None if mirror is None else _opened(mirror)
        self._tiers = Tiers(self._store, mirror_store)
        self._mirror: Mirror | None = None
        if mirror_store is not None:
            self._mirror = Mirror(
                self._store,
                mirror_store,
                every=mirror_every,
                retention=Retention(mirror_max_to_keep, mirror_keep_every),
                lease_s=lease_s,
                failed=self._mirror_failed,
            )
            if writer == 0:
                max_host_bytes -= copying_nbytes(buffer_nbytes(max_host_bytes))
        self._max_host_nbytes = max_host_bytes
        self._on_error = on_error
        self._writer, self._writers = writer, writers
        self._run_id = run_id or secrets.token_hex(8)
        self._run_id_is_given = run_id is not None
        self.trace = Trace()
        self._keeps_trace = keep_trace
        self._cost = cost_model
        self._calibrated = cost_model is not None
        self._profile: IdleProfile | None = None
        self._attempts = 0
        self._plan: Plan | None = None
        self._planned_windows: list[Window] = []
        self._bases = BaseSchedule(max_chain, writers)
        self._increments = Increments(self.strategy.policy, self._bases)
        self._last: Attempt | None = None
        self._capture: Capture | None = None
        self._unreported: list[Attempt] = []  # begun, and not known to be committed or failed
        self._background_errors: list[BaseException] = []
        self._errors_lock = threading.Lock()
        self._known: dict[int, Committed] = {}
        self._passed_over: list[int] = []
        self._swept = False
        self._connected = False
        self._closed = False
        self._pipeline: Pipeline | None = None
        self._options = Options(
            max_host_bytes,
            self._run_id,
            writer,
            stall_timeout_s,
            commit_timeout_s,
            lease_s,
            encode_threads or max(1, min(8, (os.cpu_count() or 1) // 2)),
            allocate,
        )

    @staticmethod
    def _check(
        max_host_bytes: int,
        max_chain: int | None,
        on_error: str,
        writer: int,
        writers: int,
        run_id: str | None,
    ) -> None:
        if max_host_bytes < MIN_HOST_NBYTES:
            raise ValueError(f"max_host_bytes must be at least {MIN_HOST_NBYTES}")
        if max_chain is not None and not 0 <= max_chain <= MAX_CHAIN:
            raise ValueError(f"max_chain must be within 0 and {MAX_CHAIN}, not {max_chain}")
        if on_error not in ("raise", "warn"):
            raise ValueError(f"on_error must be 'raise' or 'warn', not {on_error!r}")
        if not 0 <= writer < writers:
            raise ValueError(f"writer {writer} is not one of {writers}")
        if writers > 1 and run_id is None:
            raise ValueError("several writers need a run_id that they share")
        if run_id is not None and _RUN_ID.fullmatch(run_id) is None:
            raise ValueError(f"run_id must be 1 to 32 of the characters [0-9a-z], not {run_id!r}")

    # -- saving ----------------------------------------------------------------------------

    def save(
        self, step: int, state: object, metadata: Mapping[str, Any] | None = None
    ) -> PendingSave:
        """Save a state of NumPy arrays; returns when every byte is captured.

        Args:
            step: its number; a committed step is never overwritten.
            state: nested dict, list, tuple of arrays, scalars, bytes, str and None.
            metadata: a JSON object, kept with the step.

        Raises:
            UnsupportedStateError: the state or the metadata cannot be represented.
            StepExistsError: the step is committed.
            SaveFailedError: an earlier save failed (with on_error="raise"), or this one did
                (with a blocking strategy).
            StoreError: the store fails at the first save, or ignores conditional puts (with
                on_error="raise").
            CommitError: the run_id was used before.
        """
        with self.viewing(step):
            view = numpy_view(state)
        capture = self.begin(step, view, metadata=metadata)
        capture.finish()
        if self.strategy.blocking:
            begun_s = time.monotonic()
            self.wait()
            capture.add_stall(time.monotonic() - begun_s)
        return capture.pending

    @contextmanager
    def viewing(self, step: int) -> Generator[None]:
        """Within, a state is viewed, for `begin`; if that fails, the step fails on all writers.

        For adapters. The others learn of it at once, instead of waiting for this one.
        """
        try:
            yield
        except BaseException as error:
            self._give_up(step, self._next_number(), error)
            raise

    def begin(
        self,
        step: int,
        view: StateView,
        *,
        windows: Sequence[Window] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Capture:
        """Begin to capture a state that stays as it is until `finish` of the result returned.

        For adapters. An unfinished capture before is finished first. If it raises on one of several
        writers, the step fails on all of them.

        Args:
            step, metadata: as for `save`.
            view: the state.
            windows: the windows that the coming cycle is expected to have; used until the
                profile has measured them.

        Raises:
            UnsupportedStateError, StepExistsError, SaveFailedError, StoreError, CommitError: as
                for `save`.
        """
        number = self._next_number()
        try:
            return self._begin(step, number, view, windows, metadata)
        except BaseException as error:
            self._give_up(step, number, error)
            raise

    def _begin(
        self,
        step: int,
        number: int,
        view: StateView,
        windows: Sequence[Window] | None,
        metadata: Mapping[str, Any] | None,
    ) -> Capture:
        if self._capture is not None:
            self._capture.finish()
        begun_s = time.monotonic()
        self.raise_errors()
        if not 0 <= step <= MAX_STEP:
            raise ValueError(f"step {step} is not within 0 and {MAX_STEP}")
        metadata = _plain_json(metadata or {}, step)
        pipeline = self._open_pipeline()
        problem = self._connect(pipeline)
        if step in self._known and step not in self._passed_over:
            raise StepExistsError(
                "the step is committed already",
                step=step,
                hint="Save a later step, or discard_after() an earlier one first",
            )
        plan = self._plan_for(view, windows, pipeline)
        attempt = self._new_attempt(step, number, view, plan, metadata, pipeline)
        capture = Capture(
            attempt,
            view.sources,
            pipeline.encoder,
            pack_per_partition=not self.strategy.batched,
            cost=pipeline.cost,
            trace=self.trace,
        )
        if problem is not None:
            attempt.fail(problem)
        pipeline.encoder.begin(attempt, self._increments.reference)
        pipeline.committer.submit(attempt)
        self._last, self._capture = attempt, capture
        self._unreported.append(attempt)
        capture.add_stall(time.monotonic() - begun_s)
        if self.strategy.windows:
            pipeline.snapshotter.start(capture)
        return capture

    def _next_number(self) -> int:
        """Of an attempt, whatever becomes of it: so the writers' numbers stay equal."""
        number, self._attempts = self._attempts, self._attempts + 1
        return number

    def _name(self, number: int) -> str:
        return f"{self._run_id}-{number:06d}"

    def _give_up(self, step: int, number: int, error: BaseException) -> None:
        """An attempt will not begin here: have the committer tell the other writers, in its turn.

        Not before the store is known to hold nothing else of a run of this name, which might take
        those words for its own.
        """
        self._increments.break_chain()  # its number may have been that of a base
        if self._writers == 1 or self._closed or not 0 <= step <= MAX_STEP:
            return
        pipeline = self._open_pipeline()
        try:
            problem = self._connect(pipeline)
        except AsymCheckError as raised:
            problem = raised
        if problem is not None:
            error.add_note(f"and the other writers could not be told: {problem}")
            return
        attempt = failed_attempt(step, self._name(number), self._writer, self._writers, error)
        if self._last is not None:
            attempt.encoded = self._last.encoded  # the reference is in use until then
        pipeline.committer.submit(attempt)
        self._last = attempt

    def _new_attempt(
        self,
        step: int,
        number: int,
        view: StateView,
        plan: Plan,
        metadata: dict[str, Any],
        pipeline: Pipeline,
    ) -> Attempt:
        base_step = self._increments.base_of(step, number, plan, pipeline)
        batching = pipeline.unbatched
        if self.strategy.batched:
            batching = pipeline.batching(plan, has_base=base_step is not None)
        pipeline.flush.allow(batching.puts_in_flight)
        attempt = Attempt(
            step=step,
            name=self._name(number),
            writer=self._writer,
            writers=self._writers,
            plan=plan,
            structure=view.structure,
            metadata=metadata if self._writer == 0 else {},
            updates=view.updates,
            base_step=base_step,
            predecessor_encoded=self._last.encoded if self._last is not None else None,
            pack_nbytes=batching.pack_nbytes,
        )
        self._increments.begun(attempt)
        return attempt

    def _plan_for(
        self, view: StateView, windows: Sequence[Window] | None, pipeline: Pipeline
    ) -> Plan:
        chosen = self._windows(windows)
        plan = self._plan
        if plan is None or chosen != self._planned_windows or plan.signature != signature_of(view):
            block_nbytes = pipeline.block_nbytes(view.owned_nbytes)
            plan = make_plan(view, chosen, pipeline.buffer_nbytes, block_nbytes)
            self._plan, self._planned_windows = plan, chosen
        return plan

    def _windows(self, expected: Sequence[Window] | None) -> list[Window]:
        if not self.strategy.windows:
            return [Window(Phase.FORWARD, 0, 0.0)]
        return self.profile.windows() or list(expected or [Window(Phase.FORWARD, 0, 0.0)])

    # -- restoring -------------------------------------------------------------------------

    def restore(self, step: int | None = None, target: object = None) -> Any:
        """The state of a step, with NumPy arrays.

        Args:
            step: which; None for the newest good one: damaged steps are passed over, loudly,
                and give way when training commits again.
            target: a state of arrays to fill in place (and return); it must have the same
                paths, shapes and dtypes, which is checked before anything is changed.

        Raises:
            CheckpointNotFoundError: no such step, or none that is whole.
            StateMismatchError: the target differs; all differences are listed.
            CorruptionError, FormatError: the step asked for by number is damaged.
            StoreError: the store failed.
        """
        if target is None:
            return self.restore_with(lambda checkpoint: checkpoint.state(), step)
        return self.restore_with(lambda checkpoint: fill_target(checkpoint, target), step)

    def restore_with(self, fill: Callable[[Checkpoint], T], step: int | None = None) -> T:
        """`fill(checkpoint)` for a step, as `restore` chooses it; for adapters.

        On `CorruptionError` or `FormatError` from `fill` the next older step is tried (unless a
        step was asked for), so `fill` may be called several times.
        """
        self.start_chain()  # the last step saved is perhaps damaged, or gone
        if step is not None:
            return self._tiers.read(step, lambda store: fill(open_step(store, step)))
        passed_over: dict[str, list[int]] = {store.url: [] for store in self._tiers.stores}
        result = self._tiers.read_newest(
            lambda store, s: fill(open_step(store, s)),
            lambda store, s, _: passed_over[store.url].append(s),
        )
        self._passed_over = passed_over.pop(self._store.url)
        if self._mirror is not None:
            (damaged_there,) = passed_over.values()
            self._mirror.pass_over(damaged_there)
        return result

    @property
    def url(self) -> str:
        """Where the run is kept."""
        return self._store.url

    def steps(self) -> list[int]:
        """All committed steps that can be restored, in the mirror, too, ascending.

        While a mirror cannot be listed, those of the run's own store; the log says so.

        Raises:
            StoreError: the run's own store failed, or it has no step and the mirror failed.
        """
        return self._tiers.steps()

    def latest_step(self) -> int | None:
        """The newest of `steps`; whether it is whole shows when it is restored."""
        return max(self.steps(), default=None)

    def commit_record(self, step: int) -> CommitRecord:
        """The commit record of a step, from the mirror if the run's own store has it not.

        Raises:
            CheckpointNotFoundError: there is no such step.
            CorruptionError, FormatError: it is damaged.
            StoreError: the store failed.
        """
        return self._tiers.commit_record(step)

    def discard_after(self, step: int) -> list[int]:
        """Delete all steps later than `step`, so that training can go on from it; their numbers.

        In the mirror first, after a copy that is under way: should it fail, the run's own steps
        are all there. The user's decision, hence by hand: nothing else deletes good steps but the
        retention.

        Raises:
            StoreError: a store failed; later steps may be left. Call it again.
        """
        self.wait()
        there = [] if self._mirror is None else self._mirror.discard_after(step)
        here = remove_later(self._store, step)
        for later in here:
            self._known.pop(later, None)
        self.start_chain()  # the last step is perhaps one of these
        return sorted({*here, *there})

    def start_chain(self) -> None:
        """The next step is stored in full: the one before may be gone when it is read."""
        self._increments.forget()

    # -- life cycle ------------------------------------------------------------------------

    @property
    def profile(self) -> IdleProfile:
        """The idle windows; adapters feed it (`observe`) one cycle at a time."""
        if self._profile is None:
            self._start_warm()
        assert self._profile is not None
        return self._profile

    @property
    def cost(self) -> CostModel:
        """The fitted costs of copying, encoding and writing."""
        if self._cost is None:
            self._start_warm()
        assert self._cost is not None
        return self._cost

    @property
    def may_build_increments(self) -> bool:
        """Whether the next step may need the last one's bytes to be read."""
        return self._increments.reference is not None

    @property
    def host_nbytes(self) -> int:
        """Host memory held now for buffers and the reference.

        With the payloads on their way into packs it is never above `max_host_bytes`.
        """
        pipeline = self._pipeline
        if pipeline is None:
            return 0
        held = pipeline.capture_pool.allocated_nbytes + pipeline.pack_pool.allocated_nbytes
        return held + self._increments.nbytes

    def raise_errors(self) -> None:
        """Raise what failed in the background since the last call, once (on_error="raise").

        Raises:
            SaveFailedError: a save failed.
            MirrorError: the mirror failed; the step is committed all the same.
            StoreError: cleaning up failed.
            ClosedError: the checkpointer is closed.
        """
        if self._closed:
            raise ClosedError("the checkpointer is closed")
        failed = self._failed_attempts()
        with self._errors_lock:
            other, self._background_errors = self._background_errors, []
        for attempt in failed:
            attempt.reported = True
            self._log_failure(attempt)
        if self._on_error == "warn":
            return
        if failed:
            raise failure(failed[0]) from failed[0].error
        if other:
            raise other[0]

    def _failed_attempts(self) -> list[Attempt]:
        """Those that failed since the last call, even if the store still holds on to them."""
        failed: list[Attempt] = []
        undecided: list[Attempt] = []
        for attempt in self._unreported:
            finished = attempt.finished.is_set()  # asked first: no error comes after that
            if attempt.error is not None:
                failed += [] if attempt.reported else [attempt]
            elif not finished:
                undecided.append(attempt)
        self._unreported = undecided
        return failed

    def _log_failure(self, attempt: Attempt) -> None:
        with self._errors_lock:
            logged, attempt.logged = attempt.logged, True
        if not logged:
            _log.error("%s", failure(attempt))

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when everything saved so far is committed; the barrier of the flush queue.

        Does not wait for the mirror: `close` does.

        Raises:
            SaveFailedError: a save failed (with on_error="raise").
            TimeoutError: it takes longer.
        """
        if self._capture is not None:
            self._capture.finish()
        if self._last is not None and not self._last.finished.wait(timeout_s):
            raise TimeoutError(
                f"step {self._last.step} is not durable after {timeout_s} s: the store hangs or "
                "is slow; earlier steps are as they were"
            )
        self.raise_errors()

    def close(self, timeout_s: float | None = None) -> None:
        """Finish what is under way, end all threads, then raise what `wait` would.

        The newest step that is due in the mirror is copied, too.

        Args:
            timeout_s: give up waiting for the stores after that, and raise `TimeoutError`. What is
                under way is then lost (its threads are abandoned); what the mirror does not have
                can be copied from the run's own store.
        """
        if self._closed:
            return
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            try:
                self.wait(timeout_s)
            finally:
                self._finish_mirror(deadline_s)
            self.raise_errors()
        finally:
            self._closed = True
            if self._pipeline is not None:
                self._pipeline.close(abandon=not self._all_finished())
                self._keep_trace()
            for store in self._tiers.stores:
                store.close()

    def _finish_mirror(self, deadline_s: float | None) -> None:
        left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        if self._mirror is not None and not self._mirror.close(left_s):
            self._mirror_failed(
                TimeoutError(
                    f"the mirror {self._tiers.stores[-1].url} was not finished in time: "
                    f"'asymcheck copy {self.url}' takes the rest there"
                )
            )

    def _keep_trace(self) -> None:
        """Store the trace, if that is wanted and the store is known to answer."""
        if not (self._keeps_trace and self._connected and self._all_finished()):
            return
        events = self.trace.events()
        try:
            store_trace(self._store, self._run_id, self._writer, self._writers, events)
        except StoreError as error:  # checkpoints do not depend on it
            _log.warning("the trace of this run is not kept: %s", error)

    def _all_finished(self) -> bool:
        return self._last is None or self._last.finished.is_set()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- behind the scenes -----------------------------------------------------------------

    def _start_warm(self) -> None:
        """Take over the cost model and the profile of the newest step that has them."""
        document: Mapping[str, Any] = {}
        profile: IdleProfile | None = None
        cost: CostModel | None = None
        try:
            document = self._newest_warm_start()
            profile = IdleProfile.from_json(document["profile"]) if "profile" in document else None
            cost = CostModel.from_json(document["cost"]) if "cost" in document else None
        except (StoreError, CheckpointNotFoundError, CorruptionError, FormatError) as error:
            _log.warning("no warm start: %s", error)
        self._profile = self._profile or profile or IdleProfile()
        self._calibrated |= cost is not None
        self._cost = self._cost or cost or CostModel()

    def _newest_warm_start(self) -> Mapping[str, Any]:
        steps = committed_steps(self._store)
        if not steps:
            return {}
        record, _ = read_commit(self._store, steps[-1])
        return read_manifest(self._store, record, 0)[0].warm_start

    def _open_pipeline(self) -> Pipeline:
        """The threads and pools; started by the first save, so that readers stay light."""
        if self._pipeline is None:
            self._pipeline = Pipeline(
                self._store,
                self._options,
                policy=self.strategy.policy,
                cost=self.cost,
                bases=self._bases,
                trace=self.trace,
                warm_start=self._warm_start,
                before_commit=self._before_commit,
                after_attempt=self._after_attempt,
            )
        return self._pipeline

    def _connect(self, pipeline: Pipeline) -> StoreError | None:
        """What the first save asks of the store; asked again at every save until it answers.

        Returns:
            Why it did not, with on_error="warn".
        """
        if self._connected:
            return None
        try:
            self._known = survey(self._store)
            self._check_run_id()
            self._hold_lease(pipeline)
            if self._writer == 0:  # who publishes records
                check_conditional_puts(self._store, self._run_id, self._writer)
            self._connected = True
        except StoreError as error:
            if self._on_error == "raise":
                raise
            return error
        self._calibrate(pipeline)
        return None

    def _hold_lease(self, pipeline: Pipeline) -> None:
        try:
            pipeline.lease.ensure()
        except StoreFullError:
            self._sweep()  # perhaps it is full of what torn runs left
            pipeline.lease.ensure()

    def _calibrate(self, pipeline: Pipeline) -> None:
        if self._calibrated:
            return
        try:
            calibrate_writes(self._store, self._run_id, self._writer, pipeline.cost)
        except StoreError as error:  # there may be room for a state, but not for the probes
            _log.warning("the store's speed could not be measured: %s", error)

    def _check_run_id(self) -> None:
        """Objects of an earlier run of that name would be taken for this one's."""
        if not self._run_id_is_given:
            return
        own = re.compile(rf"data/[0-9]{{16}}-{self._run_id}-[0-9]+/w{self._writer:05d}[-.].*")
        found = [key for key in self._store.list("data/") if own.fullmatch(key)]
        if found:
            raise CommitError(
                f"the run_id {self._run_id!r} was used before",
                object=found[0],
                hint="Give every start of a run a run_id of its own, the same on all its writers",
            )

    def _warm_start(self) -> dict[str, Any]:
        """What a restart wants to know, kept in every manifest."""
        return {"cost": self.cost.to_json(), "profile": self.profile.to_json()}

    def _before_commit(self, attempt: Attempt) -> None:
        """On writer 0, right before a record is published: damaged steps give way."""
        self._sweep()
        for step in self._passed_over:
            retire(self._store, step)
            self._known.pop(step, None)
        self._passed_over = []

    def _after_attempt(self, attempt: Attempt, record: CommitRecord | None) -> None:
        """When an attempt is committed or has failed; on the committer's thread."""
        if record is None:
            self._increments.break_chain()
            self._log_failure(attempt)
            self._sweep()  # perhaps there was no room
            return
        parent = record.parent.step if record.parent is not None else None  # any writer's
        self._known[attempt.step] = Committed(attempt.step, attempt.name, parent)
        if self._pipeline is not None:
            self._pipeline.note_stored(attempt)
        if self._writer != 0:
            return
        if self._mirror is not None:
            self._mirror.committed(attempt.step)
        if self._retention.max_to_keep is not None:
            self._tidy(lambda: self._apply_retention(attempt.step))

    def _sweep(self) -> None:
        """Once in a run, on writer 0: collect what torn runs left."""
        if self._writer == 0 and not self._swept:
            self._swept = True
            self._tidy(lambda: collect_orphans(self._store))

    def _apply_retention(self, newest: int) -> None:
        in_use = [newest, *(self._mirror.in_use if self._mirror is not None else [])]
        self._known = apply(self._store, self._retention, self._known, in_use)

    def _tidy(self, work: Callable[[], object]) -> None:
        """Do what no step depends on; a failure is reported at the next call."""
        try:
            work()
        except BaseException as error:
            _log.error("old objects could not be removed: %s", error)
            self._report(error)

    def _mirror_failed(self, error: BaseException) -> None:
        _log.error("%s", error)
        self._report(error)

    def _report(self, error: BaseException) -> None:
        """Raise it at the next call (on_error="raise")."""
        with self._errors_lock:
            self._background_errors.append(error)


def _opened(place: str | os.PathLike[str] | Store) -> Store:
    return open_store(place) if isinstance(place, str | os.PathLike) else place


def _plain_json(metadata: Mapping[str, Any], step: int) -> dict[str, Any]:
    """A copy of the metadata; `UnsupportedStateError` unless they are a JSON object."""
    try:
        copy = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UnsupportedStateError(
            f"the metadata are no JSON object: {error}", step=step
        ) from error
    if copy != dict(metadata):
        raise UnsupportedStateError(
            "the metadata would not come back as they are (JSON has no tuples and only string "
            "keys)",
            step=step,
        )
    return copy
