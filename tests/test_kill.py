"""Real processes, killed with SIGKILL at any moment."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from crash_oracle import Oracle, check_everything
from kill_writer import known_state, restored

from asymcheck import Checkpointer, open_checkpoint
from asymcheck.commit import committed_steps
from asymcheck.errors import CheckpointNotFoundError
from asymcheck.retention import collect_orphans
from asymcheck.stores import LocalStore, open_store

TESTS = Path(__file__).parent
LONGEST_LIFE_S = 0.3  # after the first step; a step takes some 10 ms
LONGEST_START_S = 1.0  # importing and restoring take about half of that


def start(url: Path | str, life: int, strategy: str, *more: object) -> subprocess.Popen[str]:
    command = [sys.executable, TESTS / "kill_writer.py", url, life, strategy, *more]
    return subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Victim:
    """What a killed process has said."""

    def __init__(self, lines: list[str]) -> None:
        words = [line.split() for line in lines if line.endswith("\n")]
        self.saved = [int(w[1]) for w in words if w[0] == "saved"]
        self.durable = [int(w[1]) for w in words if w[0] == "durable"]
        self.restored = [(int(w[1]), int(w[2])) for w in words if w[0] == "restored"]


def live_and_die(url: Path | str, life: int, strategy: str, chance: random.Random) -> Victim:
    """One process, killed as it starts, as it saves for the first time, or (mostly) later."""
    process = start(url, life, strategy)
    assert process.stdout is not None
    assert process.stderr is not None
    lines: list[str] = []
    until = chance.choice(["", "saved", "durable", "durable", "durable"])
    for line in process.stdout if until else ():
        lines.append(line)
        if line.startswith(until):
            break
    time.sleep(chance.uniform(0, LONGEST_START_S if not until else LONGEST_LIFE_S))
    process.kill()
    lines.extend(process.stdout)
    err = process.stderr.read()
    assert process.wait() == -signal.SIGKILL, f"it died by itself:\n{err}"
    assert "Error" not in err, err
    return Victim(lines)


def kill_again_and_again(url: Path | str, seed: int, kills: int, strategy: str) -> dict[int, int]:
    """The step numbers that were acknowledged, each with the life that saved it."""
    chance = random.Random(seed)
    acknowledged: dict[int, int] = {}
    for life in range(kills):
        victim = live_and_die(url, life, strategy, chance)
        for step, of in victim.restored:
            assert step >= max(acknowledged, default=0)
            assert of == acknowledged.get(step, of)
        acknowledged.update(dict.fromkeys(victim.durable, life))
        check_newest(url, acknowledged)
    return acknowledged


def check_newest(url: Path | str, acknowledged: dict[int, int]) -> None:
    with Checkpointer(url) as reader:
        try:
            step, life = restored(reader.restore())
        except CheckpointNotFoundError:
            assert not acknowledged
            return
    assert step >= max(acknowledged, default=0)
    assert life == acknowledged.get(step, life)


def finish(url: Path | str, acknowledged: dict[int, int], life: int, strategy: str) -> None:
    """One whole life; after it nothing of the torn ones is left."""
    process = start(url, life, strategy, 4)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    victim = Victim(out.splitlines(keepends=True))
    assert victim.durable == victim.saved
    oracle = Oracle()
    store = open_store(url)
    for step in committed_steps(store):
        for of in range(life + 1):
            oracle.submit(step, known_state(step, of))
    for step, of in {**acknowledged, **dict.fromkeys(victim.durable, life)}.items():
        oracle.acknowledge(step, known_state(step, of))
    check_everything(store, oracle)


@pytest.mark.parametrize("strategy", ["delta", "asymcheck", "naive"])
def test_killed_at_any_moment(tmp_path: Path, strategy: str):
    acknowledged = kill_again_and_again(tmp_path, seed=0, kills=3, strategy=strategy)
    finish(tmp_path, acknowledged, 3, strategy)
    assert list((tmp_path / ".tmp").iterdir()) == []


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", ["delta", "asymcheck", "naive"])
def test_killed_at_any_moment_for_long(tmp_path: Path, strategy: str):
    acknowledged = kill_again_and_again(tmp_path, seed=1, kills=40, strategy=strategy)
    assert len(acknowledged) > 100
    finish(tmp_path, acknowledged, 40, strategy)
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_readers_beside_a_writer(tmp_path: Path):
    """While one process saves and removes steps, others always find the newest one whole."""
    process = start(tmp_path, 0, "delta")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("durable"):
            break
    newest = 0
    with Checkpointer(tmp_path) as reader:
        for _ in range(30):
            step, _ = restored(reader.restore())
            assert step >= newest
            newest = step
            with open_checkpoint(tmp_path) as checkpoint:
                assert checkpoint.step >= newest
    process.kill()
    process.communicate()
    assert newest > 0


# Others' objects

SLOW_WRITER = """
    import sys
    sys.path.insert(0, TESTS)
    from kill_writer import *
    from asymcheck.stores import LocalStore, open_store

    class Slow(LocalStore):
        def put(self, key, data):
            if key.endswith(".manifest"):
                say("packs are there")
                sys.stdin.readline()
            super().put(key, data)

    with Checkpointer(Slow(sys.argv[1]), strategy="asymcheck", cost_model=CostModel()) as c:
        c.save(5, known_state(5, 0))
    say("done")
"""


@pytest.fixture
def slow_writer(tmp_path: Path) -> Any:
    """A process that has put its packs and waits with the manifest for a line."""
    body = textwrap.dedent(SLOW_WRITER.replace("TESTS", repr(str(TESTS))))
    process = subprocess.Popen(
        [sys.executable, "-c", body, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "packs are there\n"
    yield process
    process.kill()
    process.communicate()


def packs(directory: Path, step: int) -> list[Path]:
    return sorted(directory.glob(f"data/{step:016d}-*/*.pack"))


def test_a_slow_writer_is_left_alone(tmp_path: Path, slow_writer: Any):
    before = packs(tmp_path, 5)
    assert before
    assert collect_orphans(LocalStore(tmp_path)) == []
    with Checkpointer(tmp_path) as other:  # another run, beside it
        other.save(4, known_state(4, 1)).wait()
    assert packs(tmp_path, 5) == before
    out, _ = slow_writer.communicate("go on\n")
    assert out == "done\n"
    with Checkpointer(tmp_path) as reader:
        assert restored(reader.restore()) == (5, 0)
        assert reader.steps() == [4, 5]


def test_a_dead_writer_is_known_at_once(tmp_path: Path, slow_writer: Any):
    """Even while its corpse is not buried: nobody has waited for the process."""
    before = packs(tmp_path, 5)
    slow_writer.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{slow_writer.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
    with Checkpointer(tmp_path) as other:
        other.save(4, known_state(4, 1)).wait()
        assert before
        assert packs(tmp_path, 5) == []
        assert other.steps() == [4]
    assert [p for p in (tmp_path / "runs").rglob("*") if p.is_file()] == []


def test_a_stopped_writer_is_left_alone(tmp_path: Path, slow_writer: Any):
    """Suspended for however long, it is alive, and may go on."""
    slow_writer.send_signal(signal.SIGSTOP)
    before = packs(tmp_path, 5)
    assert collect_orphans(LocalStore(tmp_path)) == []
    assert packs(tmp_path, 5) == before
    slow_writer.send_signal(signal.SIGCONT)
    out, _ = slow_writer.communicate("go on\n")
    assert out == "done\n"
