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
from asymcheck.chains import ChainCost
from asymcheck.cost import CostModel
from asymcheck.encode import MIN_CAPTURE_BUFFERS
from asymcheck.pipeline import Pipeline
from asymcheck.plan import Class, Plan
from asymcheck.policy import CompressionPolicy
from asymcheck.reference import Reference

_log = logging.getLogger("asymcheck")


class Increments:
    """Decides for each attempt, in order, whether it has a base; keeps the `Reference`.

    Used on the training thread, but for `break_chain` and `note_stored`.

    Args:
        policy: whether increments are wanted at all.
        max_chain: an increment has at most so many steps below it; None: as many as pay.
    """

    def __init__(self, policy: CompressionPolicy, max_chain: int | None) -> None:
        self.reference: Reference | None = None
        self._policy = policy
        self._max_chain = max_chain
        self._chain = ChainCost()
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

    def note_stored(self, attempt: Attempt, cost: CostModel) -> None:
        """An attempt is committed."""
        sizes = attempt.plan.nbytes, attempt.stored_nbytes
        self._chain.add(*sizes, is_base=not attempt.used_base, cost=cost)

    def forget(self) -> None:
        """Nothing builds on what the reference holds: that step may be gone."""
        if self.reference is not None:
            self.reference.holds = None

    def base_of(self, step: int, number: int, plan: Plan, pipeline: Pipeline) -> int | None:
        """The step that attempt `number`, at `step`, may be an increment to; None for a base.

        With a given `max_chain` bases stand at fixed numbers, so that several writers agree on
        them without talking.
        """
        base = self._predecessor(step, number, plan)
        self._keep_reference(plan, pipeline, needed=base is not None)
        return base.step if base is not None and self.reference is not None else None

    def begun(self, attempt: Attempt) -> None:
        """From now on the reference is filled with this attempt's bytes."""
        self._last = attempt
        if self.reference is not None:
            self.reference.holds = attempt.name

    def _predecessor(self, step: int, number: int, plan: Plan) -> Attempt | None:
        last, reference = self._last, self.reference
        if self._broken.is_set():
            self._broken.clear()  # what is set from here on is about attempts before this base
            return None
        if last is None or reference is None or self._chain_ends(number):
            return None
        whole = reference.holds == last.name and reference.signature == plan.signature
        return last if whole and last.error is None and last.step < step else None

    def _chain_ends(self, number: int) -> bool:
        if self._max_chain is None:
            return self._chain.end_if_due()
        return number % (self._max_chain + 1) == 0

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
        if self._max_chain == 0:
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
