"""The first measurement of a store, before there is anything else to learn from."""

from __future__ import annotations

import time

from asymcheck.buffers import page_aligned
from asymcheck.cost import CostModel
from asymcheck.manifest import data_prefix
from asymcheck.stores.base import Store

PROBE_NBYTES = (4 << 10, 1 << 20, 8 << 20)


def calibrate_writes(store: Store, run: str, writer: int, cost: CostModel) -> None:
    """Put and delete an object of each probe size, and tell the cost model what it took.

    The objects lie where orphans are collected, should the process die in between.
    """
    data = page_aligned(max(PROBE_NBYTES))
    data[:] = 0
    prefix = data_prefix(0, f"{run}-999999999")
    for sequence, nbytes in enumerate(PROBE_NBYTES):
        key = f"{prefix}w{writer:05d}-{sequence:06d}.probe"
        begun_s = time.monotonic()
        store.put(key, data.data[:nbytes])
        cost.observe_write(nbytes, time.monotonic() - begun_s, 1)
        store.delete(key)
