"""`asymcheck verify`: reads and checks every byte, and names everything that is damaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from asymcheck.commit import read_commit
from asymcheck.errors import (
    AsymCheckError,
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    ObjectNotFoundError,
    ShortReadError,
)
from asymcheck.index import StepIndex, StoredBlock, load_chain, load_index
from asymcheck.inspection.fidelity import StepFidelity, step_fidelity
from asymcheck.inspection.progress import Progress
from asymcheck.inspection.text import size
from asymcheck.manifest import MAX_BLOCK_NBYTES
from asymcheck.reader import default_threads
from asymcheck.records import sha256
from asymcheck.requests import each
from asymcheck.restore import ChainReader, Want
from asymcheck.stores.base import Store

_BATCH_NBYTES = 2 * MAX_BLOCK_NBYTES


@dataclass(frozen=True)
class Damage:
    """Something that is wrong (or not understood), and where; `leaf` is one that it concerns."""

    step: int
    object: str | None
    offset: int | None
    leaf: str | None
    message: str

    def __str__(self) -> str:
        at = "" if self.offset is None else f" at {self.offset}"
        leaf = "" if self.leaf is None else f" (leaf {self.leaf})"
        return f"{self.object or f'step {self.step}'}{at}: {self.message}{leaf}"


@dataclass(frozen=True)
class StepVerdict:
    """Whether a step restores; else what is wrong with it and with the steps below it.

    `fidelity` is set for good steps with lossy blocks only.
    """

    step: int
    good: bool
    raw_nbytes: int
    damage: list[Damage]
    fidelity: StepFidelity | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True)
class Verification:
    """The verdicts on all steps that were verified, ascending."""

    url: str
    steps: list[StepVerdict]

    @property
    def good(self) -> bool:
        """Whether every step is."""
        return all(verdict.good for verdict in self.steps)

    def text(self) -> Iterator[str]:
        """A line for each step, and one for each thing wrong with it or leaf that is not exact."""
        for verdict in self.steps:
            state = f"good, {size(verdict.raw_nbytes)}" if verdict.good else "BAD"
            yield f"step {verdict.step}: {state}"
            yield from (f"  {damage}" for damage in verdict.damage)
            if isinstance(verdict.fidelity, StepFidelity):
                yield from (f"  {line}" for line in verdict.fidelity.text())


def verify(store: Store, steps: Sequence[int], progress: bool | None = None) -> Verification:
    """Decode every byte of these steps, along their chains, and check it.

    A leaf that was decoded as the base of a later step is not decoded again. Memory is bounded
    by 256 MiB and the records.

    Raises:
        CheckpointNotFoundError: there is no such step.
        StoreError: the store cannot be read; that says nothing about the steps.
    """
    verifier = _Verifier(store, progress)
    verdicts = [verifier.verdict(step) for step in sorted(steps, reverse=True)]
    return Verification(store.url, verdicts[::-1])


class _Verifier:
    def __init__(self, store: Store, progress: bool | None) -> None:
        self._store = store
        self._progress = progress
        self._checked: set[tuple[str, str]] = set()  # (commit digest, leaf) that decode
        self._damage: dict[int, list[Damage]] = {}
        self._buffer: NDArray[np.uint8] = np.empty(_BATCH_NBYTES, np.uint8)

    def verdict(self, step: int) -> StepVerdict:
        """Whether the step restores, and has nothing besides."""
        try:
            chain = load_chain(self._store, step)
            nbytes = self._decode(chain)
            fidelity = step_fidelity(self._store, chain[0])
        except (CorruptionError, FormatError) as error:
            return StepVerdict(step, False, 0, self._all_damage(step, error))
        damage = self._wrong_lengths(chain[0])
        if damage or fidelity is None:
            return StepVerdict(step, not damage, nbytes, damage)
        return StepVerdict(step, True, nbytes, damage, fidelity)

    def _decode(self, chain: list[StepIndex]) -> int:
        """Decode what is not known to decode; the bytes of the whole step."""
        reader = ChainReader(self._store, chain, default_threads(self._store))
        target = chain[0]
        nbytes = sum(leaf.spec.nbytes for leaf in target.leaves.values())
        todo = [path for path in target.leaves if (target.sha256, path) not in self._checked]
        with Progress(f"verifying step {target.step}", nbytes, self._progress) as done:
            for batch in self._batches(target, todo):
                reader.read(batch)
                done.add(sum(want.out.nbytes for want in batch))
        for path in todo:
            self._note(chain, path)
        return nbytes

    def _batches(self, index: StepIndex, paths: Sequence[str]) -> Iterator[list[Want]]:
        """All blocks of the leaves, to be decoded into the same memory batch after batch."""
        batch: list[Want] = []
        used = 0
        for stored in index.blocks_by_group(paths):
            nbytes = stored.block.count * stored.box.leaf.itemsize
            if used + nbytes > _BATCH_NBYTES:
                yield batch
                batch, used = [], 0
            batch.append(_want(stored, self._buffer[used : used + nbytes]))
            used += nbytes
        yield batch

    def _note(self, chain: list[StepIndex], path: str) -> None:
        """This leaf decodes, and so it does in the steps below as far as it is a difference."""
        for index in chain:
            self._checked.add((index.sha256, path))
            blocks = (s for box in index.leaves[path].boxes.values() for s in box.blocks)
            if not all(stored.codec.needs_base for stored in blocks):
                return

    def _all_damage(self, step: int, error: AsymCheckError) -> list[Damage]:
        """Everything that is wrong along the chain, `error` in any case."""
        damage: list[Damage] = []
        below: int | None = step
        while below is not None:
            damage += self._damage_of(below)
            below = self._parent_of(below)
        if error.object is None or error.object not in {d.object for d in damage}:
            damage.append(damage_of(error, step))
        return damage

    def _parent_of(self, step: int) -> int | None:
        try:
            record, _ = read_commit(self._store, step)
        except (CheckpointNotFoundError, CorruptionError, FormatError):
            return None
        return None if record.parent is None else record.parent.step

    def _damage_of(self, step: int) -> list[Damage]:
        """Every object of a step that is missing or not what it should be."""
        if step not in self._damage:
            self._damage[step] = self._inspect(step)
        return self._damage[step]

    def _inspect(self, step: int) -> list[Damage]:
        try:
            index = load_index(self._store, step)
        except CheckpointNotFoundError as error:
            return [damage_of(error, step)]
        except (CorruptionError, FormatError) as error:
            first = damage_of(error, step)
            return [first, *(d for d in self._wrong_manifests(step) if d.object != first.object)]
        damage = self._wrong_lengths(index)
        wrong = {d.object for d in damage}
        blocks = (b for b in index.blocks() if b.block.key not in wrong)
        return damage + [d for b in blocks if (d := self._wrong_block(step, b)) is not None]

    def _wrong_manifests(self, step: int) -> list[Damage]:
        try:
            record, _ = read_commit(self._store, step)
        except (CorruptionError, FormatError):
            return []
        damage: list[Damage] = []
        for ref in record.manifests:
            if not self._store.has_length(ref.key, ref.nbytes):
                message = f"the manifest is missing or not {ref.nbytes} bytes long"
            elif sha256(self._store.get(ref.key, ref.nbytes)) != ref.sha256:
                message = "the manifest is not the one that was committed"
            else:
                continue
            damage.append(Damage(step, ref.key, None, None, message))
        return damage

    def _wrong_lengths(self, index: StepIndex) -> list[Damage]:
        packs = [pack for manifest in index.manifests for pack in manifest.packs]
        whole = each(self._store, lambda p: self._store.has_length(p.key, p.nbytes), packs)
        return [
            Damage(index.step, p.key, None, None, f"missing, or not {p.nbytes} bytes long")
            for p, is_whole in zip(packs, whole, strict=True)
            if not is_whole
        ]

    def _wrong_block(self, step: int, stored: StoredBlock) -> Damage | None:
        block = stored.block
        place = (step, block.key, block.offset, stored.box.leaf.path)
        if block.nbytes > _BATCH_NBYTES:
            return Damage(*place, "the block is absurdly large")
        out = self._buffer[: block.nbytes]
        try:
            self._store.get_range(block.key, block.offset, out.data)
        except (ObjectNotFoundError, ShortReadError) as error:
            return Damage(*place, error.message)
        if xxhash.xxh3_128_hexdigest(out.data) == block.digest:
            return None
        return Damage(*place, "the stored bytes are not the ones that were written")


def _want(stored: StoredBlock, out: NDArray[np.uint8]) -> Want:
    block = stored.block
    return Want(stored.box.leaf.path, stored.box.shard, block.start, block.stop, out)


def damage_of(error: AsymCheckError, step: int) -> Damage:
    """What an error tells of damage; of `step`, if it names no other."""
    found = "" if error.expected is None else f"; expected {error.expected}"
    found += "" if error.found is None else f"; found {error.found}"
    return Damage(
        step if error.step is None else error.step,
        error.object,
        error.offset,
        error.leaf,
        error.message + found,
    )
