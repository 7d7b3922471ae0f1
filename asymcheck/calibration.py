"""What a run tries out when it first writes to a store, before there is anything to learn from."""

from __future__ import annotations

import secrets
import time

from asymcheck.buffers import page_aligned
from asymcheck.cost import CostModel
from asymcheck.errors import StoreError
from asymcheck.manifest import data_prefix
from asymcheck.stores.base import Store

PROBE_NBYTES = (4 << 10, 1 << 20, 8 << 20)


def check_conditional_puts(store: Store, run: str, writer: int) -> None:
    """Put an object twice, if absent: the second time must change nothing, and say so.

    Four or five requests, once in a run, and only where servers are known to ignore the condition
    (`Guarantees.tried_first`): there a later save would overwrite a committed step.

    Raises:
        StoreError: the store ignores conditional puts, or failed.
    """
    if not store.guarantees.tried_first:
        return
    key = _probe_key(run, writer, secrets.token_hex(8))
    first, second = b"first", b"later"
    stands = bytearray(len(first))
    store.put_if_absent(key, memoryview(first))  # False if its answer was lost and it came twice
    overwritten = store.put_if_absent(key, memoryview(second))
    store.get_range(key, 0, memoryview(stands))
    store.delete(key)
    if overwritten or bytes(stands) != first:
        raise StoreError(
            f"the store ignores conditional puts: a committed step could be overwritten "
            f"in {store.url}",
            object=key,
            expected="the first of two puts, and False for the second",
            found=f"{bytes(stands)!r} and {overwritten}",
            hint="Update the server to one that has conditional writes: see docs/stores.md",
        )


def calibrate_writes(store: Store, run: str, writer: int, cost: CostModel) -> None:
    """Put and delete an object of each probe size, and tell the cost model what it took.

    One at a time: how puts share the store shows as soon as packs are put, several at a time.
    """
    data = page_aligned(max(PROBE_NBYTES))
    data[:] = 0
    keys = [_probe_key(run, writer, f"{i:06d}") for i in range(len(PROBE_NBYTES))]
    try:
        for key, nbytes in zip(keys, PROBE_NBYTES, strict=True):
            begun_s = time.monotonic()
            store.put(key, data.data[:nbytes])
            cost.observe_write(nbytes, time.monotonic() - begun_s, 1)
    finally:
        store.delete(*keys)


def _probe_key(run: str, writer: int, name: str) -> str:
    """A key where orphans are collected, should the process die before it is deleted."""
    return f"{data_prefix(0, f'{run}-999999999')}w{writer:05d}-{name}.probe"
