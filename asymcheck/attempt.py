"""One attempt at storing one step: what became of its blocks and packs, until it is committed."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asymcheck import tree
from asymcheck.codecs.base import Codec
from asymcheck.errors import AsymCheckError, SaveFailedError
from asymcheck.manifest import Blocks, CodecUse, Manifest, Pack, attempt_number, pack_key
from asymcheck.pack import OpenPack, Slot
from asymcheck.plan import NOTHING, Plan, Unit
from asymcheck.policy import Decision
from asymcheck.state import Update


@dataclass
class Attempt:
    """The state of one step's save; shared by the threads that work on it.

    `name` is unique for the run and equal on all its writers. `updates` are those that made the
    state, by group. `base_step` is the step whose bytes its increments need, None for a base.
    `predecessor_encoded` is set when the blocks of the attempt before are in the reference.
    """

    step: int
    name: str
    writer: int
    writers: int
    plan: Plan
    structure: tree.Node
    metadata: Mapping[str, Any]
    updates: Mapping[str, Update]
    base_step: int | None
    predecessor_encoded: threading.Event | None
    pack_nbytes: int
    begun_s: float = field(default_factory=time.monotonic)
    blocks: Blocks = field(default_factory=Blocks)
    block_packs: list[OpenPack] = field(default_factory=list[OpenPack])  # one for each block
    codecs: list[Codec] = field(default_factory=list[Codec])
    packs: list[Pack] = field(default_factory=list[Pack])
    decisions: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    stall_s: float = 0.0
    in_window_nbytes: int = 0
    used_base: bool = False
    published: bool = False  # the record may stand, whatever the store said: keep the objects

    def __post_init__(self) -> None:
        self.error: BaseException | None = None
        self.encoded = threading.Event()
        self.flushed = threading.Event()
        self.finished = threading.Event()
        self.reported = False  # to the user, as an error
        self.logged = False
        self._codec: Codec | None = None  # of the last block, and its index
        self._codec_index = -1
        self._lock = threading.Lock()
        self._outstanding = 1  # the end of the attempt itself, so that 0 is reached once

    @property
    def number(self) -> int:
        """How many attempts of the run came before."""
        return attempt_number(self.name)

    def fail(self, error: BaseException) -> None:
        """Give the attempt up; the first error stands. Its step will not exist."""
        with self._lock:
            if self.error is None:
                self.error = error

    def add_block(
        self, unit: Unit, source: int, codec: Codec, group: int, slot: Slot, digest: str, raw: str
    ) -> None:
        """Record a finished block: what it is and where it lies.

        By columns, since a thousand small objects at every step keep the garbage collector busy.
        """
        if codec is not self._codec:
            if codec not in self.codecs:
                self.codecs.append(codec)
            self._codec, self._codec_index = codec, self.codecs.index(codec)
            self.used_base |= codec.needs_base
        blocks = self.blocks
        blocks.shard.append(source)
        blocks.start.append(unit.start)
        blocks.count.append(unit.count)
        blocks.codec.append(self._codec_index)
        blocks.group.append(group)
        self.block_packs.append(slot.pack)
        blocks.offset.append(slot.offset)
        blocks.nbytes.append(slot.view.nbytes)
        blocks.digest.append(digest)
        blocks.raw.append(raw)

    def add_pack(self, nbytes: int) -> str:
        """Count a pack as under way to the store; its key."""
        with self._lock:
            self._outstanding += 1
        key = pack_key(self.step, self.name, self.writer, len(self.packs))
        self.packs.append(Pack(key, nbytes))
        return key

    def settle(self, error: BaseException | None) -> None:
        """One pack, or the end of the attempt, is done with."""
        if error is not None:
            self.fail(error)
        with self._lock:
            self._outstanding -= 1
            done = self._outstanding == 0
        if done:
            self.flushed.set()

    def decided(self, partition: int, kind: str, dtype: str, nbytes: int, made: Decision) -> None:
        """Record a decision of the policy."""
        place = self.plan.partitions[partition]
        self.decisions.append(
            {
                "partition": partition,
                "phase": str(place.phase),
                "window": place.window,
                "kind": kind,
                "dtype": dtype,
                "nbytes": nbytes,
                "codec": made.codec if isinstance(made.codec, str) else made.codec.id,
                "reason": made.reason,
            }
        )

    @property
    def stored_nbytes(self) -> int:
        """Bytes of all packs so far."""
        return sum(pack.nbytes for pack in self.packs)

    def manifest(self, warm_start: Mapping[str, Any]) -> Manifest:
        """The record of this attempt; call when it is flushed."""
        self.blocks.pack = [pack.sequence for pack in self.block_packs]
        return Manifest(
            step=self.step,
            attempt=self.name,
            writer=self.writer,
            writers=self.writers,
            base_step=self.base_step if self.used_base else None,
            structure=self.structure,
            leaves=self.plan.leaves,
            shards=self.plan.shards,
            codecs=[CodecUse(codec.id, dict(codec.params)) for codec in self.codecs],
            packs=self.packs,
            blocks=self.blocks,
            metadata=dict(self.metadata),
            stats=self.stats(),
            warm_start=dict(warm_start),
        )

    def stats(self) -> dict[str, Any]:
        """What `asymcheck stats` shows of this writer's part of the step."""
        return {
            "raw_nbytes": self.plan.nbytes,
            "stored_nbytes": self.stored_nbytes,
            "stall_s": round(self.stall_s, 6),
            "in_window_nbytes": self.in_window_nbytes,
            "durable_after_s": round(time.monotonic() - self.begun_s, 6),
            "decisions": self.decisions,
        }


class PendingSave:
    """A save on its way: done when the step is committed, or has failed."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    @property
    def step(self) -> int:
        """The step."""
        return self._attempt.step

    @property
    def stall_s(self) -> float:
        """Seconds for which training waited for this save."""
        return self._attempt.stall_s

    def done(self) -> bool:
        """Whether it is committed or has failed."""
        return self._attempt.finished.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the step is durable and committed.

        Raises:
            SaveFailedError: the step does not exist and will not; the cause is chained.
            TimeoutError: it is neither yet.
        """
        if not self._attempt.finished.wait(timeout_s):
            raise TimeoutError(f"step {self.step} is not durable after {timeout_s} s")
        if self._attempt.error is not None:
            self._attempt.reported = True
            raise failure(self._attempt) from self._attempt.error


def failed_attempt(
    step: int, name: str, writer: int, writers: int, error: BaseException
) -> Attempt:
    """One that did not begin, for a reason that the user knows: others have to be told."""
    attempt = Attempt(
        step=step,
        name=name,
        writer=writer,
        writers=writers,
        plan=NOTHING,
        structure=None,
        metadata={},
        updates={},
        base_step=None,
        predecessor_encoded=None,
        pack_nbytes=0,
    )
    attempt.reported = attempt.logged = True
    attempt.encoded.set()
    attempt.settle(error)
    return attempt


def failure(attempt: Attempt) -> SaveFailedError:
    """The error that tells of a failed attempt."""
    cause = attempt.error
    hint = cause.hint if isinstance(cause, AsymCheckError) else None
    return SaveFailedError(
        f"the checkpoint was not saved: {type(cause).__name__}: {cause}",
        step=attempt.step,
        hint=None if hint else "Earlier committed steps are untouched",
    )
