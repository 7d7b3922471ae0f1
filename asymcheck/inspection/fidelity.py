"""How far the leaves of a step are from what was saved, as their blocks state it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal
from functools import partial
from typing import cast

from asymcheck.codecs.base import MAX_FIDELITY_NBYTES, Fidelity, LossyCodec
from asymcheck.errors import CodecError, CorruptionError, ObjectNotFoundError, ShortReadError
from asymcheck.index import StepIndex, StoredBlock
from asymcheck.reader import default_threads
from asymcheck.stores.base import Store

_UPWARDS = Context(prec=3, rounding=ROUND_CEILING)


@dataclass(frozen=True)
class LeafFidelity:
    """A leaf that is not exact.

    Attributes:
        leaf: its path.
        codec: the lossy codec of the block with the largest absolute bound.
        absolute: the largest bound on |decoded - true| of its blocks.
        relative: the same for |decoded - true| / |true|; infinite if a block states none.
    """

    leaf: str
    codec: str
    absolute: float
    relative: float

    def __str__(self) -> str:
        stated = f"{self.leaf}: {self.codec}, error at most {_rounded_up(self.absolute)}"
        if math.isinf(self.relative):
            return stated
        return f"{stated}, relative at most {_rounded_up(self.relative)}"


@dataclass(frozen=True)
class StepFidelity:
    """The leaves of a step that has lossy blocks."""

    exact_leaves: int
    lossy: list[LeafFidelity]

    def text(self) -> Iterator[str]:
        """A line for each lossy leaf, and one for all others."""
        yield from map(str, self.lossy)
        yield f"exact: {self.exact_leaves} {'leaf' if self.exact_leaves == 1 else 'leaves'}"


def step_fidelity(store: Store, index: StepIndex) -> StepFidelity | None:
    """What the lossy blocks of a step state, read from their first bytes; None without such.

    Raises:
        CorruptionError: a block does not say, or is not there.
    """
    blocks = [stored for stored in index.blocks() if stored.codec.lossy]
    if not blocks:
        return None
    with ThreadPoolExecutor(default_threads(store), "asymcheck-fidelity") as pool:
        stated = list(pool.map(partial(_stated, store, index.step), blocks))
    by_leaf: dict[str, list[tuple[StoredBlock, Fidelity]]] = {}
    for stored, fidelity in zip(blocks, stated, strict=True):
        if not fidelity.exact:
            by_leaf.setdefault(stored.box.leaf.path, []).append((stored, fidelity))
    lossy = [_of_leaf(path, by_leaf[path]) for path in index.leaves if path in by_leaf]
    return StepFidelity(len(index.leaves) - len(lossy), lossy)


def _stated(store: Store, step: int, stored: StoredBlock) -> Fidelity:
    block = stored.block
    head = bytearray(min(block.nbytes, MAX_FIDELITY_NBYTES))
    try:
        store.get_range(block.key, block.offset, memoryview(head))
        return cast(LossyCodec, stored.codec).fidelity(bytes(head))
    except (ObjectNotFoundError, ShortReadError, CodecError) as error:
        raise CorruptionError(
            f"a block does not state its bound: {error.message}",
            step=step,
            leaf=stored.box.leaf.path,
            object=block.key,
            offset=block.offset,
        ) from error


def _of_leaf(path: str, stated: list[tuple[StoredBlock, Fidelity]]) -> LeafFidelity:
    worst, fidelity = max(stated, key=lambda pair: pair[1].absolute)
    relative = max(fidelity.relative for _, fidelity in stated)
    return LeafFidelity(path, worst.codec.id, fidelity.absolute, relative)


def _rounded_up(bound: float) -> str:
    """Three digits, not below `bound`."""
    return f"{float(_UPWARDS.create_decimal(Decimal(bound))):.3g}"
