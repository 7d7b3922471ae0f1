"""Copies of a run's steps in a second store, made in the background.

The run commits to a store that is near and fast, and goes on. A thread copies some of its steps,
with all that they decode from, to one that is far and lasting. However slow that is, one step is
being copied and one waits, so what must be kept for it does not grow.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection

from asymcheck.commit import retire
from asymcheck.copying import StepCopier, check_distinct
from asymcheck.errors import MirrorError, StoreFullError
from asymcheck.lease import removing
from asymcheck.retention import Committed, Retention, apply, collect_orphans, remove_later
from asymcheck.stores.base import Store
from asymcheck.threads import run_at_low_priority

_log = logging.getLogger("asymcheck")


class Mirror:
    """Keeps a mirror of a run, in one thread of low priority.

    Args:
        source: the run's store.
        target: the mirror's.
        every: steps that are multiples of this are copied.
        retention: what to keep in the mirror.
        lease_s: see `StepCopier`.
        failed: called in the thread with what went wrong, a `MirrorError`; must not raise.

    Raises:
        ValueError: `every` is less than 1.
        StoreError: both are the same place.
    """

    def __init__(
        self,
        source: Store,
        target: Store,
        *,
        every: int,
        retention: Retention,
        lease_s: float,
        failed: Callable[[MirrorError], None],
    ) -> None:
        if every < 1:
            raise ValueError(f"mirror_every must be at least 1, not {every}")
        check_distinct(source, target)
        self._source = source
        self._target = target
        self._every = every
        self._retention = retention
        self._lease_s = lease_s
        self._failed = failed
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._next: int | None = None  # the step that waits
        self._copied: int | None = None  # the one being copied
        self._is_awake = False
        self._is_busy = False
        self._closed = False
        self._passed_over: list[int] = []
        self._to_retire: list[int] = []
        self._known: dict[int, Committed] = {}
        self._swept = False

    def committed(self, step: int) -> None:
        """The run has committed a step; if it is due, it is copied, in place of one that waits."""
        with self._condition:
            self._to_retire += self._passed_over
            self._passed_over = []
            if step % self._every == 0:
                self._replace_next(step)
            self._is_awake = self._next is not None or bool(self._to_retire)
            if self._is_awake and self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="asymcheck-mirror", daemon=True
                )
                self._thread.start()
            self._condition.notify_all()

    def _replace_next(self, step: int) -> None:
        if self._next is not None:
            _log.warning(
                "the mirror %s does not keep up: step %d will not be in it, but step %d",
                self._target.url,
                self._next,
                step,
            )
        self._next = step

    @property
    def in_use(self) -> list[int]:
        """Steps that must stay in the run's store: at most the one being copied and the next."""
        with self._condition:
            return [step for step in (self._copied, self._next) if step is not None]

    def pass_over(self, steps: Collection[int]) -> None:
        """Damaged steps of the mirror that a restore has passed over: they give way.

        As in the run's store, when it commits again.
        """
        with self._condition:
            self._passed_over = list(steps)

    def discard_after(self, step: int) -> list[int]:
        """Delete all later steps of the mirror; their numbers. A copy under way ends before.

        Raises:
            StoreError: the mirror failed; some may be gone.
        """
        with self._condition:
            if self._next is not None and self._next > step:
                self._next = None
            self._condition.wait_for(lambda: not self._is_busy)
        self._known = {}
        return remove_later(self._target, step)

    def close(self, timeout_s: float | None) -> bool:
        """Finish what is due and end the thread; False if the mirror did not let us in time.

        What is left then can be copied later, and is not sent twice.
        """
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        with self._condition:
            self._next = None
        return not self._thread.is_alive()

    # -- the thread ------------------------------------------------------------------------

    def _work(self) -> None:
        run_at_low_priority()
        while self._take():
            try:
                self._perform()
            except BaseException as error:  # later steps need the thread
                self._failed(self._failure(error))
            finally:
                with self._condition:
                    self._copied = None
                    self._is_busy = False
                    self._condition.notify_all()

    def _take(self) -> bool:
        """Wait for something to do; False at the end."""
        with self._condition:
            self._condition.wait_for(lambda: self._is_awake or self._closed)
            if not self._is_awake:
                return False
            self._is_awake = False
            self._is_busy = True
            self._copied, self._next = self._next, None
            return True

    def _perform(self) -> None:
        self._retire()
        step = self._copied
        if step is not None:
            self._copy(step)
            self._tidy(step)

    def _retire(self) -> None:
        for step in list(self._to_retire):  # one that fails is tried again
            retire(self._target, step)
            self._known.pop(step, None)
            with self._condition:
                self._to_retire.remove(step)

    def _copy(self, step: int) -> None:
        try:
            with StepCopier(self._source, self._target, lease_s=self._lease_s) as copier:
                copier.copy(step)
        except StoreFullError:
            self._sweep()  # perhaps it is full of what torn copies left
            raise
        _log.info("step %d is in the mirror %s", step, self._target.url)

    def _tidy(self, newest: int) -> None:
        """Collect, once, what torn copies left; then apply the retention."""
        if not self._swept:
            self._sweep()
        if self._retention.max_to_keep is not None:
            with removing(self._target):
                self._known = apply(self._target, self._retention, self._known, in_use=[newest])

    def _sweep(self) -> None:
        with removing(self._target) as lease:
            check_distinct(self._source, self._target, lease)  # what goes here must not go there
            collect_orphans(self._target)
        self._swept = True

    def _failure(self, error: BaseException) -> MirrorError:
        failure = MirrorError(
            f"the mirror {self._target.url} is not up to date: {type(error).__name__}: {error}",
            step=self._copied,
            hint=f"The step is committed in {self._source.url}; the mirror is tried again with the "
            "next one that is due",
        )
        failure.__cause__ = error
        return failure
