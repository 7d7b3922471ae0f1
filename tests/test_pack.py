"""Blocks laid into packs: contiguous, aligned, bounded, and nothing left behind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asymcheck.buffers import ALIGNMENT, BufferPool
from asymcheck.errors import CaptureTimeoutError
from asymcheck.pack import OpenPack, PackBuilder, Slot

BUFFER = 4 * ALIGNMENT


def pool_of(buffers: int) -> BufferPool:
    return BufferPool(BUFFER, buffers * BUFFER, 0.0, lambda n: np.zeros(n, np.uint8))


@given(
    st.lists(st.integers(1, BUFFER), max_size=40),
    st.integers(1, 2 * BUFFER),
    st.lists(st.integers(0, 40), max_size=4),
)
def test_lays_blocks_into_packs(sizes: list[int], target: int, seals: list[int]) -> None:
    pool = pool_of(200)
    builder = PackBuilder(pool, target)
    limit = min(target, BUFFER)
    slots: list[tuple[Slot, int]] = []
    packs: list[OpenPack] = []
    for i, nbytes in enumerate(sizes):
        if i in seals and (sealed := builder.seal()) is not None:
            packs.append(sealed)
        slot, sealed = builder.reserve(nbytes)
        if sealed is not None:
            packs.append(sealed)
        slot.view[:] = i % 251 + 1
        slots.append((slot, i % 251 + 1))
    if (last := builder.close()) is not None:
        packs.append(last)
    assert len({id(pack) for pack in packs}) == len(packs)
    assert {id(slot.pack) for slot, _ in slots} == {id(pack) for pack in packs}
    for pack in packs:
        inside = [(slot, stamp) for slot, stamp in slots if slot.pack is pack]
        assert pack.begin % ALIGNMENT == 0
        assert pack.used_nbytes <= limit or len(inside) == 1
        position = 0
        for slot, stamp in inside:
            assert slot.offset == position
            position += slot.view.nbytes
            assert bytes(pack.data[slot.offset : position]) == bytes([stamp]) * slot.view.nbytes
        assert position == pack.used_nbytes == len(pack.data)
    for pack in packs:
        pack.release()
    assert pool.used_nbytes == 0


@given(st.lists(st.integers(1, BUFFER), min_size=1, max_size=30), st.integers(1, BUFFER))
def test_packs_are_full_but_for_the_next_block(sizes: list[int], target: int) -> None:
    builder = PackBuilder(pool_of(100), target)
    for nbytes in sizes:
        _, sealed = builder.reserve(nbytes)
        if sealed is not None:
            assert sealed.used_nbytes + nbytes > min(target, BUFFER)


def test_small_packs_share_a_buffer() -> None:
    pool = pool_of(1)
    builder = PackBuilder(pool, ALIGNMENT)
    packs = [builder.reserve(ALIGNMENT)[0].pack for _ in range(4)]
    assert len({id(pack.buffer) for pack in packs}) == 1
    assert [pack.begin for pack in packs] == [0, 4096, 8192, 12288]


def test_a_buffer_is_free_when_all_its_packs_are() -> None:
    pool = pool_of(1)
    builder = PackBuilder(pool, ALIGNMENT)
    packs = [builder.reserve(ALIGNMENT)[0].pack for _ in range(4)]
    builder.close()
    for pack in packs:
        assert pool.used_nbytes == BUFFER
        pack.release()
    assert pool.used_nbytes == 0


def test_without_memory_nothing_changes() -> None:
    pool = pool_of(1)
    builder = PackBuilder(pool, BUFFER)
    first, _ = builder.reserve(BUFFER - 10)
    with pytest.raises(CaptureTimeoutError):
        builder.reserve(11)
    again, sealed = builder.reserve(10)
    assert again.pack is first.pack and again.offset == BUFFER - 10 and sealed is None


def test_there_is_nothing_to_seal_twice() -> None:
    builder = PackBuilder(pool_of(1), BUFFER)
    assert builder.seal() is None
    builder.reserve(1)
    assert builder.seal() is not None
    assert builder.seal() is None
    assert builder.close() is None
