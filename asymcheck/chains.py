"""When a chain of increments ends, and how all writers begin the next one at the same step.

A base costs bytes now, a long chain costs recovery time. After a base, step i of a chain costs the
time to write it, plus the time to restore from it times the chance that this is needed before the
next step is stored. Both grow with the chain, while the base is paid once for all. The mean cost
of a step is least where the next step would cost more than the mean so far; there the next base is
due (the rule of Young, "A first order approximation to the optimum checkpoint interval", CACM 1974,
for costs that are measured instead of constant).

Of several writers the slowest counts, since all write, and restore, at once: the one with the most
bytes, at the speed that writer 0 measures while the others write, too. So it does not matter
whether they share one link to the store or each has its own.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from asymcheck.commit import MAX_CHAIN
from asymcheck.cost import CostModel
from asymcheck.manifest import Manifest

RESTORES_PER_STEP = 1 / 100
"""Assumed: of so many steps stored, one is restored from. Restoring holds up all of training,
writing only uses what training leaves, so this errs towards short chains."""

MAX_LENGTH = 64
"""Increments on a base, whatever they cost."""

_DECODE_S_PER_BYTE = 1 / 1.5e9


@dataclass(slots=True)
class ChainCost:
    """What the steps of the chain at hand have cost, in seconds of a sink that is always busy."""

    _steps: int = 0
    _spent_s: float = 0.0
    _last_write_s: float = 0.0
    _last_restore_s: float = 0.0  # of the last step alone
    _restore_s: float = 0.0  # of the chain

    def add(self, raw_nbytes: int, stored_nbytes: int, is_base: bool, cost: CostModel) -> None:
        """A step is stored; one that is a base begins a chain.

        Args:
            raw_nbytes, stored_nbytes: of the slowest writer's part of the state.
            is_base: it decodes alone.
            cost: what writing costs; reading is taken to cost as much.
        """
        if is_base:
            self._steps, self._spent_s, self._restore_s = 0, 0.0, 0.0
        write_s = cost.line("write").beta_s_per_byte * stored_nbytes
        self._extend(write_s, write_s + _DECODE_S_PER_BYTE * raw_nbytes)

    def is_over_after(self, more: int) -> bool:
        """Whether a base is to follow `more` further increments that cost what the last step did.

        It is when another increment would cost more than the steps of the chain on average.
        """
        if self._steps < 2:
            return False  # what an increment costs is not known yet
        chain = copy.copy(self)
        for _ in range(more):
            chain._extend(self._last_write_s, self._last_restore_s)
        return chain._steps > MAX_LENGTH or chain._next_s > chain._mean_s

    @property
    def _mean_s(self) -> float:
        return self._spent_s / self._steps

    @property
    def _next_s(self) -> float:
        return self._last_write_s + RESTORES_PER_STEP * (self._restore_s + self._last_restore_s)

    def _extend(self, write_s: float, restore_s: float) -> None:
        self._steps += 1
        self._restore_s += restore_s
        self._spent_s += write_s + RESTORES_PER_STEP * self._restore_s
        self._last_write_s, self._last_restore_s = write_s, restore_s


class BaseSchedule:
    """Which attempts of a run are bases, by their numbers.

    Writers do not talk but through the store, so writer 0 decides, a few attempts ahead, and
    announces the number in the commit record that it is about to publish, which the others read
    anyway. It is advice: a writer that learns of it too late stores an increment, which its commit
    record says; the chain goes on, and writer 0 announces another base. Whatever is announced,
    bases at fixed numbers keep chains within what the format allows.

    Used on the training thread (`begin`) and on the committer's.

    Args:
        max_chain: bases are at fixed numbers, with so many increments between them; None: where
            they pay.
        writers: their count.
    """

    def __init__(self, max_chain: int | None, writers: int) -> None:
        self.max_chain = max_chain
        self._period = 1 + (MAX_CHAIN if max_chain is None else max_chain)
        self._writers = writers
        self._cost = ChainCost()
        self._begun = -1
        self._announced: int | None = None
        self._lock = threading.Lock()

    def begin(self, number: int) -> bool:
        """Attempt `number` begins: whether it is to be a base."""
        with self._lock:
            self._begun = number
            return number % self._period == 0 or number == self._announced

    def hear(self, base_at: int) -> None:
        """Attempt `base_at` is to be a base, says a commit record."""
        with self._lock:
            self._announced = base_at

    def announce(
        self, number: int, manifests: Sequence[Manifest], is_base: bool, cost: CostModel
    ) -> int | None:
        """On writer 0: the base that the commit record of attempt `number` is to announce, if any.

        It counts when that is heard, as for the others; a single writer heeds it at once.

        Args:
            number: of the attempt.
            manifests: of all writers.
            is_base: it decodes alone.
            cost: see `ChainCost.add`.
        """
        if self.max_chain is not None:
            return None
        raw_nbytes = max(int(manifest.stats.get("raw_nbytes", 0)) for manifest in manifests)
        stored_nbytes = max(sum(p.nbytes for p in manifest.packs) for manifest in manifests)
        with self._lock:
            self._cost.add(raw_nbytes, stored_nbytes, is_base, cost)
            if self._announced is not None and number < self._announced:
                return None  # wait for it
            base_at = self._begun + 1 + self._notice(number)
            if not self._cost.is_over_after(base_at - number - 1):
                return None
            if self._writers == 1:
                self._announced, base_at = base_at, None
            return base_at

    def _notice(self, number: int) -> int:
        """Attempts between the newest and the base that give all writers time to hear of it.

        They poll for the record at intervals that are short beside the time for which they have
        waited: attempts that began while `number` was stored tell how long that is in attempts.
        """
        return 0 if self._writers == 1 else 1 + self._begun - number
