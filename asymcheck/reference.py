"""The predecessor's bytes in host memory, which increments are differences to."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from asymcheck.plan import Plan, Unit


class Reference:
    """One state's bytes, updated in place block by block as the next one is encoded.

    `holds` names the attempt whose bytes it has (or is being filled with); increments to that
    attempt may be encoded from it. Blocks are disjoint, so several threads may work at once.
    """

    def __init__(self, plan: Plan) -> None:
        self.signature = plan.signature
        self.holds: str | None = None
        self._first = [start for start, _ in plan.owned]
        self._itemsizes = plan.itemsizes
        sizes = [count * n for (_, count), n in zip(plan.owned, self._itemsizes, strict=True)]
        self._begins = [0, *accumulate(sizes)]
        self._bytes = np.empty(self._begins[-1], np.uint8)

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return self._bytes.nbytes

    def view(self, unit: Unit, source: int) -> NDArray[np.uint8]:
        """The bytes of a unit's source."""
        itemsize = self._itemsizes[source]
        begin = self._begins[source] + (unit.start - self._first[source]) * itemsize
        return self._bytes[begin : begin + unit.count * itemsize]
