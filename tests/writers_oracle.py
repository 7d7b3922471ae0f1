"""Several writers of one run over an object store: who dies, when, and what must hold then.

The store is in memory. A put is under way for a while before it takes effect; what is under way
when its writer dies takes effect later, in any order, once, twice or not at all. Writers are
threads, each with a checkpointer and a connection of its own; nothing else ties them together,
so they run ahead of each other as they like.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec
from crash_oracle import LEASE_S, STRATEGIES, Oracle, Violation, check_everything, make_state
from simulated_filesystem import SimulatedCrash

from asymcheck import Checkpointer, CostModel, StateView
from asymcheck.errors import (
    AsymCheckError,
    CheckpointNotFoundError,
    ObjectNotFoundError,
    ObjectTooLongError,
    SaveFailedError,
    ShortReadError,
    UnsupportedStateError,
)
from asymcheck.state import numpy_view
from asymcheck.stores.base import Guarantees

COMMIT_TIMEOUT_S = 0.06
PATIENCE_S = 30.0  # far beyond every timeout: only a deadlock takes so long


class Cloud:
    """The objects, and what is under way to them."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.under_way: list[tuple[Connection, str, bytes, bool]] = []
        self.lock = threading.Lock()

    def settle(self, chance: random.Random) -> None:
        """All writers are dead: what was under way arrives, or does not."""
        late = [*self.under_way, *chance.sample(self.under_way, len(self.under_way) // 2)]
        chance.shuffle(late)
        for _, key, data, only_if_absent in late:
            if chance.random() < 0.5 and not (only_if_absent and key in self.objects):
                self.objects[key] = data
        self.under_way.clear()


class Connection:
    """A `Store` as one process has it.

    Args:
        cloud: what it is connected to.
        chance: of delays.
        slow_s: the longest delay of a call.
    """

    guarantees = Guarantees("simulated", "simulated", True, True, False)
    url = "cloud://run"

    def __init__(self, cloud: Cloud, chance: random.Random, slow_s: float = 0.0) -> None:
        self._cloud = cloud
        self._dies_at: int | None = None
        self._chance = chance
        self._slow_s = slow_s
        self._calls = 0

    @property
    def dead(self) -> bool:
        return self._dies_at is not None and self._calls >= self._dies_at

    def die_at(self, n: int) -> None:
        """From the n-th call from now on (1: the next)."""
        self._dies_at = self._calls + n

    def _call(self) -> None:
        if self._slow_s and self._chance.random() < 0.1:
            time.sleep(self._chance.random() * self._slow_s)
        with self._cloud.lock:
            self._calls += 1
            self._live()

    def _live(self) -> None:
        if self.dead:
            raise SimulatedCrash(f"at call {self._calls}")

    def get(self, key: str, max_nbytes: int) -> bytes:
        self._call()
        data = self._object(key)
        if len(data) > max_nbytes:
            raise ObjectTooLongError("object is too long", object=key)
        return data

    def get_range(self, key: str, offset: int, out: memoryview) -> None:
        self._call()
        data = self._object(key)[offset : offset + out.nbytes]
        if len(data) != out.nbytes:
            raise ShortReadError("too short", object=key)
        out[:] = data

    def _object(self, key: str) -> bytes:
        with self._cloud.lock:
            if key not in self._cloud.objects:
                raise ObjectNotFoundError("no such object", object=key)
            return self._cloud.objects[key]

    def has_length(self, key: str, nbytes: int) -> bool:
        self._call()
        with self._cloud.lock:
            return len(self._cloud.objects.get(key, b"")) == nbytes and key in self._cloud.objects

    def put(self, key: str, data: memoryview) -> None:
        self._put(key, bytes(data), only_if_absent=False)

    def put_if_absent(self, key: str, data: memoryview) -> bool:
        return self._put(key, bytes(data), only_if_absent=True)

    def _put(self, key: str, data: bytes, *, only_if_absent: bool) -> bool:
        request = (self, key, data, only_if_absent)
        with self._cloud.lock:
            self._live()
            self._cloud.under_way.append(request)
        self._call()
        with self._cloud.lock:
            self._live()
            self._cloud.under_way.remove(request)
            if only_if_absent and key in self._cloud.objects:
                return False
            self._cloud.objects[key] = data
            return True

    def list(self, prefix: str) -> list[str]:
        self._call()
        with self._cloud.lock:
            return sorted(key for key in self._cloud.objects if key.startswith(prefix))

    def delete(self, *keys: str) -> None:
        for key in keys:
            self._call()
            with self._cloud.lock:
                self._cloud.objects.pop(key, None)

    def clear_stale_temporaries(self) -> int:
        return 0

    def close(self) -> None:
        pass


def share_of(state: Any, writer: int, writers: int) -> StateView:
    """The elements of every leaf that one of several writers stores."""
    view = numpy_view(state)

    def cut(size: int) -> tuple[int, int]:
        start, stop = size * writer // writers, size * (writer + 1) // writers
        return start, stop - start

    sources = tuple(
        msgspec.structs.replace(source, owned=cut(source.leaf.size)) for source in view.sources
    )
    return replace(view, sources=sources)


@dataclass
class Writer:
    """One rank of a run."""

    number: int
    writers: int
    connection: Connection
    checkpointer: Checkpointer
    oracle: Oracle
    seed: int
    incarnation: int
    steps: list[int]
    refused: int | None
    wait_each: bool
    error: BaseException | None = None

    def train(self) -> None:
        """Save every step until one fails; but one that it cannot show."""
        try:
            self._train()
        except (SaveFailedError, SimulatedCrash) as error:
            self.error = error
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._end()

    def _train(self) -> None:
        for step in self.steps:
            if step == self.refused:
                with suppress(UnsupportedStateError), self.checkpointer.viewing(step):
                    raise UnsupportedStateError("no view of this")
                continue
            state = make_state(self.seed, step, self.incarnation)
            capture = self.checkpointer.begin(step, share_of(state, self.number, self.writers))
            capture.finish()
            if self.wait_each or step == self.steps[-1]:
                self._wait(capture.pending)
                self.oracle.acknowledge(step, state)

    def _wait(self, pending: Any) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not pending.done():
            if self.connection.dead:
                raise SimulatedCrash("while waiting")
            if time.monotonic() > deadline:
                raise Violation(f"writer {self.number} waits for ever for step {pending.step}")
            with suppress(TimeoutError, SaveFailedError):
                pending.wait(0.01)
        pending.wait()

    def _end(self) -> None:
        if isinstance(self.error, SimulatedCrash):
            self.connection.die_at(0)
        with suppress(SimulatedCrash):
            if self.connection.dead:
                if self.checkpointer._pipeline is not None:
                    self.checkpointer._pipeline.close(abandon=False)
            else:
                with suppress(SaveFailedError):
                    self.checkpointer.close()


class WritersSchedule:
    """A run of several incarnations, each of 1 to 3 writers, drawn from `seed`."""

    def __init__(
        self, seed: int, connect: Callable[..., Connection] = Connection, slow_s: float = 0.0
    ) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.cloud = Cloud()
        self.oracle = Oracle()
        self.log: list[str] = []
        self._connect = connect
        self._slow_s = slow_s
        self._incarnation = 0

    def run(self) -> None:
        """Incarnations that die, then one that does not, and a look at everything there is.

        Raises:
            Violation: with the schedule as it went.
        """
        try:
            for _ in range(self.chance.choice([1, 1, 2])):
                self._incarnate(dying=True)
                self.cloud.settle(self.chance)
            self._incarnate(dying=False)
            check_everything(Connection(self.cloud, self.chance), self.oracle)
        except Exception as error:
            log = "\n  ".join(self.log)
            raise Violation(f"{type(error).__name__}: {error}\nseed {self.seed}:\n  {log}") from (
                error
            )

    def _incarnate(self, *, dying: bool) -> None:
        name = f"process{self._incarnation}"
        identity = SimpleNamespace(token=lambda: name, is_gone=lambda token: token != name)
        with mock.patch("asymcheck.lease.process_identity", identity):
            writers = self._writers(self.chance.choice([2, 2, 3] if dying else [1, 2]), dying)
            threads = [threading.Thread(target=w.train, daemon=True) for w in writers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE_S + 10)
                if thread.is_alive():
                    raise Violation("a survivor hangs")
        for w in writers:
            self.log.append(f"writer {w.number}: {w.error!r}")
            if not dying and w.error is not None:
                raise w.error
            if isinstance(w.error, Violation | AsymCheckError) and not isinstance(
                w.error, SaveFailedError
            ):
                raise w.error
        self._incarnation += 1

    def _writers(self, count: int, dying: bool) -> list[Writer]:
        chance = self.chance
        strategy = chance.choice(STRATEGIES)
        options: dict[str, Any] = {
            "max_to_keep": chance.choice([None, 1, 2]),
            "max_chain": chance.choice([0, 2, 3, None]),
            # Whoever waits for the dead gives up soon; the living are given time.
            "commit_timeout_s": COMMIT_TIMEOUT_S if dying else PATIENCE_S,
        }
        doomed = chance.sample(range(count), chance.choice([1, 1, count])) if dying else []
        deaths = {writer: chance.randint(1, 120) for writer in doomed}
        self.log.append(f"{count} writers, {strategy().name} {options}, deaths at call {deaths}")
        wait_each = chance.random() < 0.5
        checkpointers = []
        for number in range(count):
            connection = self._connect(
                self.cloud,
                random.Random(chance.random()),
                self._slow_s if dying else 0.0,
            )
            checkpointers.append(
                (
                    connection,
                    Checkpointer(
                        connection,
                        strategy=strategy(),
                        writer=number,
                        writers=count,
                        run_id=f"run{self._incarnation}",
                        max_host_bytes=1 << 20,
                        cost_model=CostModel(),
                        encode_threads=1,
                        lease_s=LEASE_S,
                        **options,
                    ),
                )
            )
        first = 1 + max(self._recover(c) for _, c in checkpointers)
        steps = list(range(first, first + chance.randint(2, 6)))
        for step in steps:
            self.oracle.submit(step, make_state(self.seed, step, self._incarnation))
        for number, (connection, _) in enumerate(checkpointers):
            if number in deaths:
                connection.die_at(deaths[number])
        refuses = chance.choice([*range(count), *[None] * count]) if dying else None
        refused = chance.choice(steps)
        if refuses is not None:
            self.log.append(f"writer {refuses} refuses step {refused}")
        return [
            Writer(
                number,
                count,
                connection,
                checkpointer,
                self.oracle,
                self.seed,
                self._incarnation,
                steps,
                refused if number == refuses else None,
                wait_each,
            )
            for number, (connection, checkpointer) in enumerate(checkpointers)
        ]

    def _recover(self, checkpointer: Checkpointer) -> int:
        try:
            state = checkpointer.restore()
        except CheckpointNotFoundError:
            self.oracle.check_nothing()
            return -1
        step = int(state["steps"][0])
        self.oracle.check_newest(step, state)
        return step
