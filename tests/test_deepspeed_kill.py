"""One rank of a ZeRO-3 run is killed at any point of a save: nothing torn is ever restored."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("deepspeed", reason="DS_BUILD_OPS=0 pip install deepspeed==0.19.8")

import asymcheck
from asymcheck.commit import committed_steps, read_commit, read_manifests
from asymcheck.stores import LocalStore

WORKER = Path(__file__).with_name("deepspeed_killed.py")
NOBODY = -1
STEPS = 3
KILLS = 30
NARROW, WIDE = 24, 96  # each rank stores one pack at every step, or several
LEAST_PACKS = 3
SURVIVOR_ENDS_S = 120


def live(
    directory: Path, width: int, victim: int, point: str, number: int
) -> tuple[list[int], list[str]]:
    """Two ranks, one of which may die; their exit codes, and the whole lines of rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, WORKER, directory, STEPS, width, victim, point, number]
    processes = [
        subprocess.Popen(
            [str(word) for word in command],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if rank else None,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=SURVIVOR_ENDS_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    whole = said[0][: said[0].rfind("\n") + 1]  # it may have been killed amid a line
    return [process.returncode for process in processes], whole.splitlines()


def live_and_check(
    directory: Path, digests: dict[int, str], width: int, victim: int, point: str, number: int
) -> bool:
    """One life; whether the victim died. Every step that was ever seen must be as it was."""
    root = directory / "run"
    before = committed_steps(LocalStore(root)) if root.exists() else []
    codes, lines = live(directory, width, victim, point, number)
    for line in lines:
        words = line.split()
        if words[:1] in (["restored"], ["step"]):
            step, digest = int(words[1]), words[2]
            assert digests.setdefault(step, digest) == digest, f"{line}: another state"
            if words[0] == "restored":
                assert step == max(before, default=0), line
    died = victim != NOBODY and codes[victim] == -signal.SIGKILL
    if died:
        assert codes[1 - victim] not in (0, None), "the survivor did not notice"
    else:
        assert codes == [0, 0], lines
    for step in committed_steps(LocalStore(root)):
        with asymcheck.open_checkpoint(root, step=step) as checkpoint:
            checkpoint.verify()
    return died


def packs_of(root: Path, step: int) -> dict[int, int]:
    """How many packs a committed step has, by writer."""
    store = LocalStore(root)
    record, _ = read_commit(store, step)
    return {manifest.writer: len(manifest.packs) for manifest in read_manifests(store, record)}


@pytest.mark.timeout(600)
def test_a_rank_is_killed_at_points_of_the_protocol(tmp_path: Path) -> None:
    digests: dict[int, str] = {}
    kills = [(1, "before pack", 2), (0, "after manifest", 2), (1, "after manifest", 1)]
    kills += [(0, "before commit", 2), (0, "after commit", 1)]
    for victim, point, number in kills:
        assert live_and_check(tmp_path, digests, NARROW, victim, point, number), (victim, point)
    assert not live_and_check(tmp_path, digests, NARROW, NOBODY, "before pack", 1)
    assert max(committed_steps(LocalStore(tmp_path / "run"))) >= STEPS


@pytest.mark.timeout(600)
def test_a_rank_is_killed_between_packs(tmp_path: Path) -> None:
    digests: dict[int, str] = {}
    root = tmp_path / "run"
    assert not live_and_check(tmp_path, digests, WIDE, NOBODY, "before pack", 1)
    newest = max(committed_steps(LocalStore(root)))
    packs = packs_of(root, 1)
    assert len(packs) == 2 and min(packs.values()) >= LEAST_PACKS
    for victim in (0, 1):  # in the first step, which is stored in full again
        assert live_and_check(tmp_path, digests, WIDE, victim, "after pack", 2)
        assert max(committed_steps(LocalStore(root))) == newest


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("width", [NARROW, WIDE], ids=["one pack", "several packs"])
def test_many_random_kills(tmp_path: Path, width: int) -> None:
    chance = random.Random(20261124 + width)
    digests: dict[int, str] = {}
    died = 0
    for _ in range(3 * KILLS):  # the point may not come in a life
        victim = chance.randrange(2)
        kind = chance.choice(("pack", "manifest", "commit")[: 3 - victim])
        times = STEPS * (LEAST_PACKS if kind == "pack" and width == WIDE else 1)
        point, number = f"{chance.choice(('before', 'after'))} {kind}", chance.randint(1, times)
        died += live_and_check(tmp_path, digests, width, victim, point, number)
        if died == KILLS:
            break
    assert died == KILLS
    assert not live_and_check(tmp_path, digests, width, NOBODY, "before pack", 1)
