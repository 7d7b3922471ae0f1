"""Random lives of a run, each ended by death or power cut, and what must hold after each.

One schedule is one run from its first save to its end: several processes one after the other,
each of which opens the directory, restores, saves, waits, collects and dies at a random call on
the file system. The next one finds one of the disks that the crash may have left. `Oracle` knows
what was saved and what was acknowledged, and says what every later process may see.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from simulated_filesystem import SimulatedCrash, SimulatedFilesystem

from asymcheck import (
    Always,
    AsymCheck,
    AsymCheckNaive,
    AsymCheckS,
    Checkpointer,
    CostModel,
    Strategy,
    Synchronous,
)
from asymcheck.attempt import PendingSave
from asymcheck.commit import committed_steps, read_commit, read_manifests
from asymcheck.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    SaveFailedError,
    StoreFullError,
    StoreUnavailableError,
)
from asymcheck.manifest import data_prefix
from asymcheck.partition import Phase, Window
from asymcheck.reader import open_step
from asymcheck.retention import collect_orphans
from asymcheck.state import numpy_view
from asymcheck.stores import LocalStore, Store

ROOT = Path("/runs/a")
LEASE_S = 1e6  # no schedule ends because the machine is busy
State = dict[str, Any]

STRATEGIES: list[Callable[[], Strategy]] = [
    lambda: Strategy("delta", Always("delta"), windows=False, batched=True, blocking=False),
    lambda: Strategy("delta-windows", Always("delta"), windows=True, batched=False, blocking=False),
    lambda: Strategy("delta-zstd", Always("delta", "zstd"), True, True, False),
    lambda: Strategy("plane", Always("plane"), windows=False, batched=False, blocking=False),
    AsymCheck,
    AsymCheckS,
    AsymCheckNaive,
    Synchronous,
]


class Violation(AssertionError):
    """A promise was broken."""


def make_state(seed: int, step: int, life: int, size: int | None = None) -> State:
    """Unlike every other step's and life's, and of the same structure in one schedule."""
    sizes = [0, 40, 700, 700, 5_000, 20_000]
    n = random.Random(seed).choice(sizes) if size is None else size
    base = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    noise = np.random.default_rng([seed, step, life]).standard_normal(n).astype(np.float32)
    weight = base + np.float32(1e-3) * noise
    return {
        "params": {"w": weight.reshape(2, n // 2), "b": weight[: n // 8].astype(np.float64)},
        "exp_avg": {"w": noise.reshape(2, n // 2)},
        "steps": [np.int64(step), np.array([life, step], np.int32)],
        "rng": step.to_bytes(8, "little") + b"state",
        "life": life,
    }


def same(a: Any, b: Any) -> bool:
    """Bit for bit the same state."""
    if isinstance(a, dict):
        return type(b) is type(a) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return type(b) is list and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray | np.generic):
        return (
            type(b) is type(a)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and a.tobytes() == b.tobytes()
        )
    return type(b) is type(a) and a == b


@dataclass
class Oracle:
    """What was saved under which number, and what was acknowledged."""

    submitted: dict[int, list[State]] = field(default_factory=dict)
    acknowledged: dict[int, State] = field(default_factory=dict)

    def submit(self, step: int, state: State) -> None:
        self.submitted.setdefault(step, []).append(state)

    def acknowledge(self, step: int, state: State) -> None:
        self.acknowledged[step] = state

    @property
    def newest(self) -> int:
        return max(self.acknowledged, default=-1)

    def check_newest(self, step: int, state: State) -> None:
        """A restore that was free to choose."""
        if step < self.newest:
            raise Violation(f"restored step {step}, but {self.newest} was acknowledged")
        self.check(step, state)

    def check(self, step: int, state: State) -> None:
        """Any step that is there."""
        if step in self.acknowledged:
            if not same(state, self.acknowledged[step]):
                raise Violation(f"step {step} is not what was acknowledged")
        elif not any(same(state, saved) for saved in self.submitted.get(step, [])):
            raise Violation(f"step {step} is not what was saved")

    def check_nothing(self) -> None:
        if self.acknowledged:
            raise Violation(f"nothing to restore, but step {self.newest} was acknowledged")


class FlakyStore:
    """A store whose puts fail now and then, before or after the object was stored."""

    def __init__(self, store: Store, chance: random.Random, rate: float) -> None:
        self._store = store
        self._chance = chance
        self._lock = threading.Lock()
        self.rate = rate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put(self, key: str, data: memoryview) -> None:
        self._maybe(lambda: self._store.put(key, data), key)

    def put_if_absent(self, key: str, data: memoryview) -> bool:
        return self._maybe(lambda: self._store.put_if_absent(key, data), key)

    def _maybe(self, put: Callable[[], Any], key: str) -> Any:
        with self._lock:
            fails, stored = self._chance.random() < self.rate, self._chance.random() < 0.5
        if not fails:
            return put()
        if not stored:
            raise StoreFullError("no room (on purpose)", object=key)
        put()
        raise StoreUnavailableError("no answer (on purpose)", object=key)


@contextmanager
def simulated_process(filesystem: SimulatedFilesystem) -> Generator[None]:
    """Leases, like temporary files, name the process that lives on `filesystem`."""
    identity = SimpleNamespace(token=filesystem.process_token, is_gone=filesystem.is_gone)
    with mock.patch("asymcheck.lease.process_identity", identity):
        yield


def is_dead(filesystem: SimulatedFilesystem) -> bool:
    """Whether the process was made to die (asked without a call that would count)."""
    return filesystem._dead


class Schedule:
    """One run, drawn from `seed`.

    Args:
        seed: of everything that is drawn. Threads make two runs of a seed differ in detail.
        make_filesystem, wrap: to break the parts beneath on purpose.
    """

    def __init__(
        self,
        seed: int,
        make_filesystem: Callable[..., SimulatedFilesystem] = SimulatedFilesystem,
        wrap: Callable[[Store], Store] = lambda store: store,
    ) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.oracle = Oracle()
        self.log: list[str] = []
        self._wrap = wrap
        self._filesystem = make_filesystem(direct=self.chance.random() < 0.8)
        self._lives = 0

    def run(self) -> None:
        """Live, die, be checked; and at the end one whole life.

        Raises:
            Violation: with the schedule as it went.
        """
        try:
            for _ in range(self.chance.choice([1, 1, 2, 3])):
                self._live_and_die()
            self._live_to_the_end()
        except Exception as error:
            log = "\n  ".join(self.log)
            raise Violation(f"{type(error).__name__}: {error}\nseed {self.seed}:\n  {log}") from (
                error
            )

    def _live_and_die(self) -> None:
        filesystem = self._filesystem
        operations = self.chance.choice([40, 400, 1600])
        operations = self.chance.randint(1, operations)
        filesystem.die_at(operations)
        self._note(f"life {self._lives} dies at operation {operations}")
        with simulated_process(filesystem):
            self._live(filesystem, self.chance.choice([0, 0, 0.05, 0.2]))
        if self.chance.random() < 0.75:
            crash = self.chance.randrange(1 << 30)
            self._note(f"power cut {crash}")
            self._filesystem = filesystem.crash(crash)
        else:
            self._note("restart")
            self._filesystem = filesystem.restart()
        self._lives += 1

    def _live(self, filesystem: SimulatedFilesystem, failing: float) -> None:
        life = None
        try:
            store = FlakyStore(
                self._wrap(LocalStore(ROOT, filesystem)), random.Random(self.seed), failing
            )
            life = Life(self, filesystem, store)
            life.recover()
            for _ in range(self.chance.randint(2, 16)):
                life.act()
            if self.chance.random() < 0.7:
                life.checkpointer.close()
                self._note("closed")
        except SimulatedCrash:
            self._note("died")
        except SaveFailedError as error:
            self._note(f"stopped: {error}")
        finally:
            filesystem.die_at(1)
            if life is not None:
                life.tear_down()

    def _live_to_the_end(self) -> None:
        """Recover, go on with the numbers that were lost, and look at everything there is."""
        filesystem = self._filesystem
        with simulated_process(filesystem):
            store = self._wrap(LocalStore(ROOT, filesystem))
            life = Life(self, filesystem, store)
            life.recover()
            for _ in range(3):
                life.save(life.step + 1)
            life.wait()
            life.checkpointer.close()
            check_everything(LocalStore(ROOT, filesystem), self.oracle)

    def _note(self, text: str) -> None:
        self.log.append(text)

    @property
    def lives(self) -> int:
        return self._lives


class Life:
    """One process of a schedule."""

    def __init__(self, schedule: Schedule, filesystem: SimulatedFilesystem, store: Any) -> None:
        chance = schedule.chance
        self._schedule = schedule
        self._chance = chance
        self._oracle = schedule.oracle
        self._filesystem = filesystem
        self._store = store
        strategy = chance.choice(STRATEGIES)()
        options: dict[str, Any] = {
            "max_to_keep": chance.choice([None, 1, 2, 3]),
            "keep_every": chance.choice([None, None, 2, 3]),
            "max_chain": chance.choice([0, 1, 2, 3, 3]),
            "encode_threads": chance.choice([1, 2]),
        }
        self._note(f"{strategy.name} {options}")
        self.checkpointer = Checkpointer(
            store,
            strategy=strategy,
            max_host_bytes=1 << 20,
            cost_model=CostModel(),
            lease_s=LEASE_S,
            **options,
        )
        self._pending: list[tuple[PendingSave, State]] = []
        self.step = -1

    def recover(self) -> None:
        """What a training run does first."""
        try:
            state = self.checkpointer.restore()
        except CheckpointNotFoundError:
            self._oracle.check_nothing()
            self._note("nothing to restore")
            return
        self.step = int(state["steps"][0])
        self._note(f"restored step {self.step}")
        self._oracle.check_newest(self.step, state)

    def act(self) -> None:
        """Something at random."""
        draw = self._chance.random()
        if draw < 0.6:
            self.save(self.step + self._chance.choice([1, 1, 1, 2]))
        elif draw < 0.75:
            self.wait()
        elif draw < 0.85:
            self._restore_one()
        elif draw < 0.92:
            self._note("collect")
            collect_orphans(self._store)
        else:
            self._save_in_windows()

    def save(self, step: int) -> None:
        """Save the next step; failed saves are left behind, as training would."""
        state = self._next(step)
        try:
            self._pending.append((self.checkpointer.save(step, state), state))
        except (SaveFailedError, StoreFullError, StoreUnavailableError) as error:
            self._note(f"  {error}")

    def _save_in_windows(self) -> None:
        state = self._next(self.step + 1)
        windows = [Window(Phase.FORWARD, 0, 1e-3), Window(Phase.BACKWARD, 0, 2e-3)]
        try:
            capture = self.checkpointer.begin(self.step, numpy_view(state), windows=windows)
        except (SaveFailedError, StoreFullError, StoreUnavailableError) as error:
            self._note(f"  {error}")
            return
        capture.enter_window(0)
        capture.leave_window()
        capture.enter_window(1)
        capture.finish()
        self._pending.append((capture.pending, state))

    def _next(self, step: int) -> State:
        self._note(f"save {step}")
        self.step = step
        state = make_state(self._schedule.seed, step, self._schedule.lives)
        self._oracle.submit(step, state)
        return state

    def wait(self) -> None:
        """Wait for everything; what is done without an error is acknowledged."""
        for pending, state in self._pending:
            self._await(pending)
            with suppress(SaveFailedError):
                pending.wait()
                self._oracle.acknowledge(pending.step, state)
                self._note(f"acknowledged {pending.step}")
        self._pending.clear()

    def _await(self, pending: PendingSave) -> None:
        while not pending.done():
            if is_dead(self._filesystem):
                raise SimulatedCrash("while waiting")
            with suppress(TimeoutError, SaveFailedError):
                pending.wait(0.01)

    def _restore_one(self) -> None:
        steps = self.checkpointer.steps()
        if not steps:
            return
        step = self._chance.choice(steps)
        self._note(f"restore {step}")
        try:
            self._oracle.check(step, self.checkpointer.restore(step))
        except (CheckpointNotFoundError, CorruptionError):
            if step in self.checkpointer.steps():
                raise  # else retention removed it meanwhile

    def tear_down(self) -> None:
        """End the threads of a dead process."""
        pipeline = self.checkpointer._pipeline
        if pipeline is not None:
            with suppress(SimulatedCrash):
                pipeline.close(abandon=False)

    def _note(self, text: str) -> None:
        self._schedule.log.append(text)


def check_everything(store: Store, oracle: Oracle) -> None:
    """Every step there is restores to what was saved, and nothing else is there."""
    steps = committed_steps(store)
    if not steps or steps[-1] < oracle.newest:
        raise Violation(f"steps {steps}, but {oracle.newest} was acknowledged")
    named: set[str] = set()
    kept: set[str] = set()
    for step in steps:
        with open_step(store, step, threads=1) as checkpoint:
            oracle.check(step, checkpoint.state())
            checkpoint.verify()
        record, _ = read_commit(store, step)
        named.update(ref.key for ref in record.manifests)
        kept.add(data_prefix(step, record.attempt))
        for manifest in read_manifests(store, record):
            named.update(pack.key for pack in manifest.packs)
    left = [key for key in store.list("") if key not in named and not _may_stay(key, kept)]
    if left:
        raise Violation(f"left over: {left}")


def _may_stay(key: str, kept: set[str]) -> bool:
    """A commit record; or the word of a writer that despaired of a step that came to be."""
    return key.startswith("commits/") or (
        key.endswith(".abort") and f"{key.rpartition('/')[0]}/" in kept
    )
