"""What a checkpoint that is opened where it lies reads of its packs, on any store."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np

from asymcheck import AsymCheck, Checkpointer, open_checkpoint, open_store
from asymcheck.policy import Never

BLOCK_NBYTES = 4 << 20


def check_that_only_what_is_asked_for_is_read(url: str) -> None:
    """Opening reads no pack; a row of a leaf costs a block; all of it costs the leaf."""
    rng = np.random.default_rng(0)
    state = {name: rng.random((1000, 4000), np.float32) for name in ("v", "w")}
    with Checkpointer(url, strategy=AsymCheck(policy=Never())) as checkpointer:
        checkpointer.save(0, state).wait()
    store = open_store(url)
    kind: Any = type(store)
    store.close()
    whole, part = kind.get, kind.get_range
    read: list[int] = []

    def get(self: Any, key: str, max_nbytes: int) -> bytes:
        assert not key.endswith(".pack")
        return whole(self, key, max_nbytes)

    def get_range(self: Any, key: str, offset: int, out: memoryview) -> None:
        if key.endswith(".pack"):
            read.append(out.nbytes)
        part(self, key, offset, out)

    with patch.multiple(kind, get=get, get_range=get_range), open_checkpoint(url) as checkpoint:
        assert read == []
        assert np.array_equal(checkpoint["w"][500, 3:9], state["w"][500, 3:9])
        assert 0 < sum(read) <= BLOCK_NBYTES < state["w"].nbytes / 2
        read.clear()
        assert np.array_equal(checkpoint["w"][...], state["w"])
        assert sum(read) == state["w"].nbytes
