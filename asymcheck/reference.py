"""The predecessor's bytes in host memory, which increments are differences to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from asymcheck.buffers import Allocate
from asymcheck.plan import Plan, Unit


class Reference:
    """One state's bytes, updated in place block by block as the next one is encoded.

    `holds` names the attempt whose bytes it has (or is being filled with); increments to that
    attempt may be encoded from it. Blocks are disjoint, so several threads may work at once.
    """

    def __init__(self, plan: Plan, allocate: Allocate) -> None:
        self.signature = plan.signature
        self.holds: str | None = None
        self._owned = plan.owned
        self._itemsizes = [spec.itemsize for spec in plan.specs]
        self._arrays = [
            allocate(count * itemsize) if count else np.empty(0, np.uint8)
            for (_, count), itemsize in zip(plan.owned, self._itemsizes, strict=True)
        ]

    def view(self, unit: Unit, source: int) -> NDArray[np.uint8]:
        """The bytes of a unit's source."""
        itemsize = self._itemsizes[source]
        begin = (unit.start - self._owned[source][0]) * itemsize
        return self._arrays[source][begin : begin + unit.count * itemsize]
