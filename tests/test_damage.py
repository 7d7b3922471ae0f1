"""Every object of a checkpoint, damaged in every way: it is noticed, and costs what it must."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash_oracle import check_everything, same
from writers_oracle import Cloud, Connection, share_of

from asymcheck import Always, Checkpointer, CostModel, Strategy, open_checkpoint
from asymcheck.errors import (
    AsymCheckError,
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
)
from asymcheck.partition import Phase, Window
from asymcheck.reader import open_step

DAMAGE = (CorruptionError, FormatError, CheckpointNotFoundError)
WRITERS = 2
CHAINS = [(0, 1, 2), (3, 4, 5)]  # the first of each is a base
STEPS = [0, 1, 2, 3, 4, 5]
WINDOWS = [Window(Phase.FORWARD, i, 1e-3) for i in range(2)] + [Window(Phase.BACKWARD, 0, 2e-3)]
STRATEGY = Strategy("delta", Always("delta"), windows=True, batched=False, blocking=False)

Objects = dict[str, bytes]


def saved(step: int, life: int = 0) -> Any:
    """Unlike every other step's and life's, and so are the differences, which are compressible."""
    base = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    drift = np.float32(1 + 1e-5 * (step + 1) + 1e-2 * life)
    return {
        "params": {"w": (base * drift).reshape(2, -1), "b": base.astype(np.float64) * drift},
        "exp_avg": {"w": (base[::-1] * drift).reshape(2, -1)},
        "steps": np.array([step] + [97 * step**3] * 499, np.int64),
        "life": life,
    }


def checkpointer(cloud: Cloud, writer: int, writers: int, **options: Any) -> Checkpointer:
    return Checkpointer(
        Connection(cloud, random.Random(0)),
        strategy=STRATEGY,
        writer=writer,
        writers=writers,
        max_host_bytes=1 << 20,
        max_chain=2,
        cost_model=CostModel(),
        **options,
    )


@pytest.fixture(scope="module")
def whole() -> Objects:
    """A run of six steps by two writers, in two chains; every writer has several packs a step."""
    cloud = Cloud()
    writers = [checkpointer(cloud, w, WRITERS, run_id="first") for w in range(WRITERS)]
    for step in STEPS:
        for number, writer in enumerate(writers):
            view = share_of(saved(step), number, WRITERS)
            writer.begin(step, view, windows=WINDOWS).finish()
    for writer in reversed(writers):
        writer.close()
    for step, writer in itertools.product(STEPS, range(WRITERS)):
        packs = [key for key in objects_of(cloud.objects, step) if f"/w{writer:05d}-" in key]
        assert len(packs) == len(WINDOWS)
    for first, *increments in CHAINS:  # all of a chain needs every byte below it
        for step in increments:
            with open_step(store_of(cloud.objects), step) as checkpoint:
                assert {b.codec.id for b in checkpoint.chain[0].blocks()} == {"delta"}, first
    return cloud.objects


def store_of(objects: Objects) -> Connection:
    cloud = Cloud()
    cloud.objects = dict(objects)
    return Connection(cloud, random.Random(0))


def step_of(key: str) -> int:
    return int(key.split("/")[1][:16])


def objects_of(whole: Objects, step: int) -> list[str]:
    return sorted(
        key for key in whole if key.startswith(("commits/", "data/")) if step_of(key) == step
    )


def needing(step: int) -> list[int]:
    """The steps that decode from this one, itself included."""
    return [s for chain in CHAINS if step in chain for s in chain if s >= step]


def detect(objects: Objects, step: int, *, restorable: bool = False) -> None:
    """Whatever is damaged, it is reported; nothing wrong is ever returned.

    Args:
        objects: of which some are damaged.
        step: needs them.
        restorable: every byte of the state is still there, so only `verify` must complain.
    """
    store = store_of(objects)
    try:
        state = open_step(store, step, threads=1).state()
        assert restorable, f"step {step} was restored from damaged objects"
        assert same(state, saved(step))
    except DAMAGE as error:
        check_context(error)
    with pytest.raises(DAMAGE) as raised:
        open_step(store, step, threads=1).verify()
    check_context(raised.value)


def check_context(error: AsymCheckError) -> None:
    assert error.step is not None or error.object is not None, f"{error!r} names no place"


def fall_back(objects: Objects, damaged: int, *, restorable: bool = False) -> None:
    """Restoring gives the newest whole step; the lost numbers can be saved again."""
    lost = needing(damaged)
    good = [step for step in STEPS if step not in lost]
    cloud = Cloud()
    cloud.objects = dict(objects)
    again = checkpointer(cloud, 0, 1)
    state = again.restore()
    newest = int(state["steps"][0])
    assert same(state, saved(newest))
    assert newest == (STEPS[-1] if restorable else max(good))
    for step in good:
        assert same(again.restore(step), saved(step))
    for step in range(newest + 1, STEPS[-1] + 2):
        again.save(step, saved(step, life=1)).wait()
    again.close()
    for step in range(newest + 1, STEPS[-1] + 2):
        assert same(
            open_step(Connection(cloud, random.Random(0)), step).state(), saved(step, life=1)
        )
    for step in good:
        assert same(open_step(Connection(cloud, random.Random(0)), step).state(), saved(step))


def test_the_whole_run_is_whole(whole: Objects):
    store = store_of(whole)
    for step in STEPS:
        with open_step(store, step) as checkpoint:
            assert same(checkpoint.state(), saved(step))
            checkpoint.verify()
            assert len(checkpoint.chain) == 1 + step % 3


ROLES = ["commit", "w00000.manifest", "w00001.manifest", "w00000-000000.pack", "w00001-000002.pack"]


def key_of(whole: Objects, step: int, role: str) -> str:
    """The object of a step in a role."""
    keys = objects_of(whole, step)
    (key,) = [
        k for k in keys if k.endswith(role) or (role == "commit" and k.startswith("commits/"))
    ]
    return key


def damaged_by(whole: Objects, key: str, change: Callable[[bytes], bytes]) -> Objects:
    assert change(whole[key]) != whole[key]
    return {**whole, key: change(whole[key])}


def flipped(data: bytes, position: int, bit: int) -> bytes:
    out = bytearray(data)
    out[position] ^= 1 << bit
    return bytes(out)


@pytest.mark.parametrize(
    ("step", "role"), [(3, "commit"), (5, "commit"), (3, ROLES[1]), (5, ROLES[2])]
)
def test_every_byte_of_a_record_flipped(whole: Objects, step: int, role: str):
    chance = random.Random(step)
    key = key_of(whole, step, role)
    for position in range(len(whole[key])):
        detect({**whole, key: flipped(whole[key], position, chance.randrange(8))}, step)


@pytest.mark.parametrize("step", STEPS)
def test_bits_of_every_object_flipped(whole: Objects, step: int):
    chance = random.Random(step)
    for key in objects_of(whole, step):
        for position in {0, len(whole[key]) - 1, *chance.choices(range(len(whole[key])), k=12)}:
            objects = {**whole, key: flipped(whole[key], position, chance.randrange(8))}
            for needer in needing(step):
                detect(objects, needer)


@pytest.mark.parametrize("step", STEPS)
def test_every_object_removed(whole: Objects, step: int):
    for key in objects_of(whole, step):
        objects = {k: v for k, v in whole.items() if k != key}
        for needer in needing(step):
            detect(objects, needer)
        fall_back(objects, step)


@pytest.mark.parametrize("step", [2, 3, 5])
def test_every_object_truncated(whole: Objects, step: int):
    chance = random.Random(step)
    for key in objects_of(whole, step):
        nbytes = len(whole[key])
        for length in {0, 1, nbytes // 2, nbytes - 1, *chance.choices(range(nbytes), k=8)}:
            detect({**whole, key: whole[key][:length]}, step)
        fall_back({**whole, key: whole[key][: nbytes // 2]}, step)


@pytest.mark.parametrize("step", [2, 3, 5])
def test_every_object_extended(whole: Objects, step: int):
    for key in objects_of(whole, step):
        is_pack = key.endswith(".pack")
        for more in (b"\0", b"}", whole[key], b"\0" * 5000):
            detect({**whole, key: whole[key] + more}, step, restorable=is_pack)
        fall_back({**whole, key: whole[key] + b"\0" * 5000}, step, restorable=is_pack)


def test_a_record_that_grew_beyond_every_limit(whole: Objects, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("asymcheck.commit.MAX_COMMIT_NBYTES", 4096)
    for role in ROLES[:3]:
        key = key_of(whole, 5, role)
        objects = {**whole, key: whole[key] + b" " * 8192}
        detect(objects, 5)
        fall_back(objects, 5)


@pytest.mark.parametrize("step", [3, 4])
def test_any_two_objects_swapped(whole: Objects, step: int):
    for a, b in itertools.combinations(objects_of(whole, step), 2):
        detect({**whole, a: whole[b], b: whole[a]}, step)
        if a.startswith("commits/") or b.endswith("w00000.manifest"):
            fall_back({**whole, a: whole[b], b: whole[a]}, step)


@pytest.mark.parametrize("role", ROLES)
def test_an_object_of_another_step_in_its_place(whole: Objects, role: str):
    for step, other in itertools.permutations([0, 2, 3, 5], 2):
        key = key_of(whole, step, role)
        objects = {**whole, key: whole[key_of(whole, other, role)]}
        detect(objects, step)
        if step == 5:
            fall_back(objects, step)


def test_a_whole_step_under_the_number_of_another(whole: Objects):
    """All objects of step 3, copied to the keys of a step 4 of the same attempt name."""
    source, target = f"{3:016d}", f"{9:016d}"
    copies = {k.replace(source, target): v for k, v in whole.items() if source in k}
    detect({**whole, **copies}, 9)


@pytest.mark.parametrize("kind", ["flip", "remove", "truncate"])
def test_a_damaged_base_costs_only_the_steps_on_it(whole: Objects, kind: str):
    for role in ROLES:
        key = key_of(whole, 0, role)
        objects = dict(whole)
        if kind == "remove":
            del objects[key]
        else:
            objects[key] = (
                flipped(whole[key], 40, 3) if kind == "flip" else whole[key][: len(whole[key]) // 3]
            )
        store = store_of(objects)
        for step in (3, 4, 5):
            with open_step(store, step) as checkpoint:
                checkpoint.verify()
                assert same(checkpoint.state(), saved(step))
        for step in (0, 1, 2):
            detect(objects, step)


def test_a_damaged_pack_costs_only_the_leaves_in_it(whole: Objects):
    key = key_of(whole, 3, "w00001-000002.pack")
    store = store_of({**whole, key: flipped(whole[key], len(whole[key]) // 2, 0)})
    intact = open_step(store_of(whole), 5)
    wrong = []
    with open_step(store, 5) as checkpoint:
        for path, leaf in checkpoint.items():
            try:
                assert leaf[...].tobytes() == intact[path][...].tobytes()
            except CorruptionError as error:
                assert (error.leaf, error.object, error.step) == (path, key, 3)
                wrong.append(path)
    assert 0 < len(wrong) < len(intact)


def test_nothing_is_whole(whole: Objects):
    objects = {k: v[:10] if k.startswith("commits/") else v for k, v in whole.items()}
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint is whole"):
        checkpointer_over(objects).restore()


def test_two_writers_save_the_lost_steps_again(whole: Objects):
    """The damaged records give way although one of the writers only waits for the other."""
    key = key_of(whole, 4, "w00000-000000.pack")
    cloud = Cloud()
    cloud.objects = {**whole, key: b"damaged"}
    writers = [checkpointer(cloud, w, WRITERS, run_id="second") for w in range(WRITERS)]
    assert all(same(writer.restore(), saved(3)) for writer in writers)
    for step in (4, 5, 6):
        for number, writer in enumerate(writers):
            view = share_of(saved(step, life=1), number, WRITERS)
            writer.begin(step, view, windows=WINDOWS).finish()
    for writer in writers:
        writer.wait(30)
    for writer in writers:
        writer.close()
    for step in (4, 5, 6):
        state = open_step(Connection(cloud, random.Random(0)), step).state()
        assert same(state, saved(step, life=1))


def checkpointer_over(objects: Objects) -> Checkpointer:
    cloud = Cloud()
    cloud.objects = dict(objects)
    return checkpointer(cloud, 0, 1)


# The same on a disk, by the public functions


@pytest.fixture
def directory(whole: Objects, tmp_path: Path) -> Iterator[Path]:
    for key, data in whole.items():
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    yield tmp_path


def test_files_damaged_at_random(whole: Objects, directory: Path):
    chance = random.Random(0)
    for key in chance.sample([k for k in whole if step_of(k) > 2], 12):
        path = directory / key
        path.write_bytes(flipped(whole[key], chance.randrange(len(whole[key])), 5))
        with open_checkpoint(directory, step=2) as checkpoint:
            checkpoint.verify()
        lost = needing(step_of(key))
        with pytest.raises(DAMAGE), open_checkpoint(directory, step=lost[-1]) as checkpoint:
            checkpoint.verify()
        with Checkpointer(directory) as reader:
            newest = max(step for step in STEPS if step not in lost)
            assert same(reader.restore(), saved(newest))
        path.write_bytes(whole[key])


def test_the_oracle_of_damage_finds_a_reader_that_does_not_check(
    whole: Objects, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("asymcheck.restore.check_digest", lambda *_: None)
    key = key_of(whole, 3, "w00000-000000.pack")
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        for position in range(0, len(whole[key]), 7):
            detect({**whole, key: flipped(whole[key], position, 6)}, 3)


def test_check_everything_is_content(whole: Objects):
    """The run as it is satisfies the oracle of the other tests."""
    from crash_oracle import Oracle

    oracle = Oracle(acknowledged={step: saved(step) for step in STEPS})
    check_everything(store_of(whole), oracle)
