"""Which step may be an increment to which, and the predecessor's bytes that this takes.

Holding the predecessor costs host memory of the size of the state, so it is done only while the
policy would use it and `max_host_bytes` allows it; otherwise every step is stored in full.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping

from asymcheck.attempt import Attempt
from asymcheck.chains import BaseSchedule
from asymcheck.encode import MIN_CAPTURE_BUFFERS
from asymcheck.pipeline import Pipeline
from asymcheck.plan import Class, Plan
from asymcheck.policy import CompressionPolicy
from asymcheck.reference import Reference

_log = logging.getLogger("asymcheck")


class Increments:
    """Decides for each attempt, in order, whether it has a base; keeps the `Reference`.

    Used on the training thread, but for `break_chain`.

    Args:
        policy: whether increments are wanted at all.
        bases: where chains end.
    """

    def __init__(self, policy: CompressionPolicy, bases: BaseSchedule) -> None:
        self.reference: Reference | None = None
        self._policy = policy
        self._bases = bases
        self._last: Attempt | None = None
        self._broken = threading.Event()
        self._dropped_in_use: threading.Event | None = None  # set when a dropped one is not read
        self._warned_about: tuple[object, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return self.reference.nbytes if self.reference is not None else 0

    def break_chain(self) -> None:
        """The next attempt is a base: one failed, and those in flight on it will, too."""
        self._broken.set()

    def forget(self) -> None:
        """Nothing builds on what the reference holds: that step may be gone."""
        if self.reference is not None:
            self.reference.holds = None

    def base_of(self, step: int, number: int, plan: Plan, pipeline: Pipeline) -> int | None:
        """The step that attempt `number`, at `step`, may be an increment to; None for a base."""
        is_base = self._bases.begin(number)
        base = self._predecessor(step, plan, is_base=is_base)
        self._keep_reference(plan, pipeline, needed=base is not None)
        return base.step if base is not None and self.reference is not None else None

    def begun(self, attempt: Attempt) -> None:
        """From now on the reference is filled with this attempt's bytes."""
        self._last = attempt
        if self.reference is not None:
            self.reference.holds = attempt.name

    def _predecessor(self, step: int, plan: Plan, *, is_base: bool) -> Attempt | None:
        last, reference = self._last, self.reference
        if is_base or self._broken.is_set():
            self._broken.clear()  # what is set from here on is about attempts before this base
            return None
        if last is None or reference is None:
            return None
        whole = reference.holds == last.name and reference.signature == plan.signature
        return last if whole and last.error is None and last.step < step else None

    def _keep_reference(self, plan: Plan, pipeline: Pipeline, *, needed: bool) -> None:
        """Have a reference, or none, as the policy wants it; unless `needed` it may be dropped."""
        if self.reference is not None and not needed and not self._is_wanted(plan, pipeline):
            self.reference = None
            self._dropped_in_use = self._last.encoded if self._last is not None else None
        dropped = self._dropped_in_use
        if self.reference is not None or (dropped is not None and not dropped.is_set()):
            return  # its memory is taken
        if not self._is_wanted(plan, pipeline):
            pipeline.capture_pool.limit(pipeline.capture_nbytes)
            return
        left = pipeline.capture_nbytes - plan.nbytes
        if left < MIN_CAPTURE_BUFFERS * pipeline.buffer_nbytes:
            self._warn(plan, pipeline)
            return
        pipeline.capture_pool.limit(left)
        if pipeline.capture_pool.allocated_nbytes <= left:
            self.reference = Reference(plan)  # else at a later step, when the memory is free

    def _is_wanted(self, plan: Plan, pipeline: Pipeline) -> bool:
        """Whether a reference would be used, and the one there is, if any, is of this plan."""
        if self.reference is not None and self.reference.signature != plan.signature:
            return False
        if self._bases.max_chain == 0:
            return False
        others = _summed(partition.nbytes_by_class for partition in plan.partitions)
        replayed = _summed(partition.replayed_by_class for partition in plan.partitions)
        return self._policy.wants_base(others, replayed, pipeline.cost)

    def _warn(self, plan: Plan, pipeline: Pipeline) -> None:
        if self._warned_about != plan.signature:
            self._warned_about = plan.signature
            _log.warning(
                "increments would pay, but the reference of %d bytes does not fit into "
                "max_host_bytes beside %d bytes for capture: every step is stored in full",
                plan.nbytes,
                MIN_CAPTURE_BUFFERS * pipeline.buffer_nbytes,
            )


def _summed(parts: Iterable[Mapping[Class, int]]) -> Mapping[Class, int]:
    totals: Counter[Class] = Counter()
    for part in parts:
        totals.update(part)
    return totals
