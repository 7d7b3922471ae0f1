"""When a chain of increments should end: a base costs bytes now, a long chain costs recovery time.

After a base, step i of a chain costs the time to write it, plus the time to restore from it times
the chance that this is needed before the next step is stored. Both grow with the chain, while the
base is paid once for all. The mean cost of a step is least where the next step would cost more
than the mean so far; there the next base is due (the rule of Young, "A first order approximation to
the optimum checkpoint interval", CACM 1974, for costs that are measured instead of constant).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from asymcheck.cost import CostModel

RESTORES_PER_STEP = 1 / 100
"""Assumed: of so many steps stored, one is restored from. Restoring holds up all of training,
writing only uses what training leaves, so this errs towards short chains."""

MAX_LENGTH = 64
"""Increments on a base, whatever they cost."""

_DECODE_S_PER_BYTE = 1 / 1.5e9


@dataclass(slots=True)
class ChainCost:
    """What the steps of the chain at hand have cost, in seconds of a sink that is always busy."""

    _write_s: list[float] = field(default_factory=list[float])
    _restore_s: list[float] = field(default_factory=list[float])
    _is_ending: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, raw_nbytes: int, stored_nbytes: int, is_base: bool, cost: CostModel) -> None:
        """A step was stored; one that is a base begins a chain.

        Args:
            raw_nbytes, stored_nbytes: of this writer's part of the state.
            is_base: it decodes alone.
            cost: what writing costs; reading is taken to cost as much.
        """
        moved_s = cost.line("write").beta_s_per_byte * stored_nbytes
        restore_s = moved_s + _DECODE_S_PER_BYTE * raw_nbytes
        with self._lock:
            if is_base:
                self._write_s, self._restore_s = [], []
                self._is_ending = False
            before_s = self._restore_s[-1] if self._restore_s else 0.0
            self._write_s.append(moved_s)
            self._restore_s.append(before_s + restore_s)

    def end_if_due(self) -> bool:
        """Whether the next step is to be a base; said once for every chain.

        It is when an increment would cost more than the steps of this chain on average.
        """
        with self._lock:
            if self._is_ending or len(self._write_s) < 2:
                return False
            self._is_ending = len(self._write_s) > MAX_LENGTH or self._costs_more_than_before()
            return self._is_ending

    def _costs_more_than_before(self) -> bool:
        spent_s = sum(self._write_s) + RESTORES_PER_STEP * sum(self._restore_s)
        increment_s = self._restore_s[-1] - self._restore_s[-2]
        next_restore_s = self._restore_s[-1] + increment_s
        next_s = self._write_s[-1] + RESTORES_PER_STEP * next_restore_s
        return next_s > spent_s / len(self._write_s)
