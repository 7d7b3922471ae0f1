"""Increments in Orbax's directories: any step may go, and none needs another's directory."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import asymcheck
import asymcheck_jax
from asymcheck.errors import CheckpointNotFoundError, CorruptionError, StoreError
from asymcheck.policy import Always, Decision, PolicyRequest
from asymcheck.stores import LocalStore
from asymcheck.strategies import AsymCheck

DELTA = AsymCheck(policy=Always("delta"))
STEPS = range(4)


class Changing:
    """Wants a base at hand, and then stores everything raw."""

    def decide(self, request: PolicyRequest) -> Decision:
        return Decision("raw", "after all")

    def decide_replay(self, requests: object) -> None:
        return None

    def wants_base(self, *_: Any) -> bool:
        return True


def state(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "params": {"w": jnp.asarray(rng.standard_normal(20_000), jnp.float32) * (1 + step / 1e6)}
    }


def handler(**options: Any) -> asymcheck_jax.AsymCheckHandler:
    return asymcheck_jax.AsymCheckHandler(**{"strategy": DELTA, "max_chain": 10, **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of four steps: a base and three increments on it."""
    directory = tmp_path_factory.mktemp("run")
    with ocp.CheckpointManager(directory, item_handlers=handler()) as manager:
        for step in STEPS:
            manager.save(step, args=asymcheck_jax.AsymCheckSave(state(step)))
        manager.wait_until_finished()
    yield directory


def depth(directory: Path, step: int) -> int:
    with asymcheck.open_checkpoint(directory / str(step) / "default") as checkpoint:
        assert checkpoint.step == step
        return len(checkpoint.chain) - 1


def test_steps_are_increments(run: Path) -> None:
    assert [depth(run, step) for step in STEPS] == [0, 1, 2, 3]
    own = [
        sum(f.stat().st_size for f in (run / str(s)).rglob("w*.pack") if f.stat().st_nlink == 1)
        for s in STEPS
    ]
    assert own[0] == own[1] == own[2] == 0  # linked by the steps that build on them
    assert 0 < own[3] < 80_000


@pytest.mark.parametrize("order", list(itertools.permutations(STEPS)), ids=str)
def test_steps_deleted_in_every_order(run: Path, order: tuple[int, ...], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, copy_function=_link)
    left = set(STEPS)
    with ocp.CheckpointManager(copy, item_handlers=handler()) as manager:
        for step in order:
            manager.delete(step)
            left.remove(step)
            for kept in left:
                found = manager.restore(kept, args=asymcheck_jax.AsymCheckRestore(state(0)))
                assert np.array_equal(found["params"]["w"], state(kept)["params"]["w"])


@pytest.mark.parametrize(
    "strategy", ["asymcheck-naive", AsymCheck(policy=Changing())], ids=["naive", "changing"]
)
def test_a_step_that_is_no_increment_keeps_nothing_of_another(
    strategy: Any, tmp_path: Path
) -> None:
    """Else the bytes of steps that were deleted long ago would stay."""
    used = asymcheck_jax.AsymCheckHandler(strategy=strategy)
    with ocp.CheckpointManager(tmp_path, item_handlers=used) as manager:
        for step in STEPS:
            manager.save(step, args=asymcheck_jax.AsymCheckSave(state(step)))
        manager.wait_until_finished()
    packs = list(tmp_path.rglob("*.pack"))
    assert packs and all(f.stat().st_nlink == 1 for f in packs)
    for file in [*packs, *tmp_path.rglob("commits/*.json")]:
        name = file.parent.name if file.suffix == ".pack" else file.name
        assert int(name[:16]) == int(file.relative_to(tmp_path).parts[0]), file
    assert [depth(tmp_path, step) for step in STEPS] == [0, 0, 0, 0]


@pytest.mark.parametrize("lost", ["commits/*3.json", "orbax/item.json", "data/*3-*/*.pack"])
def test_a_step_that_lost_something_is_never_taken_for_one_that_it_builds_on(
    run: Path, lost: str, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, copy_function=_link)
    for file in (copy / "3" / "default").glob(lost):
        file.unlink()
    with ocp.CheckpointManager(copy, item_handlers=handler()) as manager:
        with pytest.raises((CorruptionError, CheckpointNotFoundError)):
            manager.restore(3, args=asymcheck_jax.AsymCheckRestore(state(0)))
        found = manager.restore(2, args=asymcheck_jax.AsymCheckRestore(state(0)))
        assert np.array_equal(found["params"]["w"], state(2)["params"]["w"])


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


@pytest.mark.parametrize("kept", [1, 2])
def test_orbax_deletes_while_the_chain_grows(tmp_path: Path, kept: int) -> None:
    options = ocp.CheckpointManagerOptions(max_to_keep=kept)
    with ocp.CheckpointManager(tmp_path, item_handlers=handler(), options=options) as manager:
        for step in range(7):
            manager.save(step, args=asymcheck_jax.AsymCheckSave(state(step)))
        manager.wait_until_finished()
        assert manager.all_steps() == list(range(7))[-kept:]
        for step in manager.all_steps():
            found = manager.restore(step, args=asymcheck_jax.AsymCheckRestore(state(0)))
            assert np.array_equal(found["params"]["w"], state(step)["params"]["w"])
    assert depth(tmp_path, 6) == 6


def test_the_chain_goes_on_when_the_newest_step_is_deleted(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path, item_handlers=handler()) as manager:
        for step in (0, 1):
            manager.save(step, args=asymcheck_jax.AsymCheckSave(state(step)))
        manager.wait_until_finished()
        manager.delete(1)
        for step in (2, 3):
            manager.save(step, args=asymcheck_jax.AsymCheckSave(state(step)))
        manager.wait_until_finished()
        for step in (0, 2, 3):
            found = manager.restore(step, args=asymcheck_jax.AsymCheckRestore(state(0)))
            assert np.array_equal(found["params"]["w"], state(step)["params"]["w"])
        assert (tmp_path / ".asymcheck-held").exists()
    assert [depth(tmp_path, step) for step in (0, 2, 3)] == [0, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2", "3"]


def test_where_steps_cannot_be_linked_every_step_is_a_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that has run out of links (simulated: linking steps is refused)."""
    monkeypatch.setattr(LocalStore, "adopt", _refused)
    with ocp.CheckpointManager(tmp_path, item_handlers=handler()) as manager:
        for step in range(3):
            manager.save(step, args=asymcheck_jax.AsymCheckSave(state(step)))
        manager.wait_until_finished()
        found = manager.restore(2, args=asymcheck_jax.AsymCheckRestore(state(0)))
        assert np.array_equal(found["params"]["w"], state(2)["params"]["w"])
    assert [depth(tmp_path, step) for step in range(3)] == [0, 0, 0]


def _refused(*_: object) -> None:
    raise StoreError("too many links")


def test_a_step_copied_alone_is_whole(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "3", tmp_path / "elsewhere")
    with asymcheck.open_checkpoint(tmp_path / "elsewhere" / "default") as checkpoint:
        checkpoint.verify()
        assert np.array_equal(checkpoint["params/w"][...], state(3)["params"]["w"])
    found = asymcheck_jax.load(tmp_path / "elsewhere" / "default")
    assert np.array_equal(found["params"]["w"], state(3)["params"]["w"])
