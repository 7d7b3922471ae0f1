"""DDP in two processes: each byte stored once, restored at any world size, by all or by none."""

from __future__ import annotations

import shutil
import threading
from collections import Counter

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch is built without gloo", allow_module_level=True)

import torch_ddp  # noqa: E402
from hypothesis import example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch_ddp import CHAINED, STOP, build, start  # noqa: E402
from torch_runs import differences, everything, seed_all  # noqa: E402

import asymcheck  # noqa: E402
import asymcheck_torch  # noqa: E402
from asymcheck.agreement import restore_together  # noqa: E402
from asymcheck.errors import AsymCheckError, CheckpointNotFoundError, CorruptionError  # noqa: E402
from asymcheck.index import load_index  # noqa: E402
from asymcheck.stores import open_store  # noqa: E402


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of two ranks: its URL, and each rank's state at STOP and TOTAL."""
    folder = tmp_path_factory.mktemp("ddp")
    url = (folder / "run").as_uri()
    return url, start(torch_ddp.save_and_go_on, folder / "save", url)


def test_each_byte_is_stored_once_over_the_ranks(saved):
    index = load_index(open_store(saved[0]), STOP)
    stored = Counter()
    by_writer = Counter()
    for block in index.blocks():
        nbytes = block.block.count * block.box.leaf.itemsize
        stored[block.box.leaf.path] += nbytes
        by_writer[block.group[0]] += nbytes
    assert stored == {path: leaf.spec.nbytes for path, leaf in index.leaves.items() if stored[path]}
    assert min(by_writer.values()) > 0.4 * sum(by_writer.values())
    small = {"exp_avg/0.bias", "exp_avg/1.weight", "exp_avg/1.bias", "exp_avg/3.bias"}
    assert {b.group[0] for b in index.blocks() if b.box.leaf.path in small} == {0, 1}
    halves = {b.group[0] for b in index.blocks() if b.box.leaf.path == "exp_avg/0.weight"}
    assert halves == {0, 1}


def test_save_at_two_resume_at_two(saved, tmp_path):
    url, states = saved
    found = start(torch_ddp.resume, tmp_path / "resume", _copy_of(url, tmp_path))
    buffers = {n: t for n, t in states[0][0]["module"].items() if n.startswith("module.1.")}
    for (at_stop, at_end), (step, restored, end) in zip(states, found, strict=True):
        assert step == STOP
        at_stop = at_stop | {"module": at_stop["module"] | buffers}  # DDP takes those of rank 0
        assert differences(restored, at_stop) == []
        assert differences(end, at_end) == []


def test_save_at_two_resume_at_one_and_back(saved, tmp_path):
    url, states = saved
    url = _copy_of(url, tmp_path)
    run = build(distributed=False)
    seed_all(5)
    with run.attach(url, max_to_keep=None) as ckpt:
        assert ckpt.restore() == STOP
        expected = dict(states[0][0])
        expected["module"] = _bare(expected["module"])
        assert differences(everything(run), expected) == []
        run.train(STOP, STOP + 1)
        ckpt.wait()
        alone = everything(run)
    for step, restored, _ in start(torch_ddp.resume, tmp_path / "resume", url):
        assert step == STOP + 1
        restored["module"] = _bare(restored["module"])
        assert differences(restored, alone) == []


def test_buffers_of_each_rank_where_ddp_does_not_share_them(tmp_path):
    url = (tmp_path / "run").as_uri()
    states = start(torch_ddp.save_and_go_on, tmp_path / "save", url, False)
    found = start(torch_ddp.resume, tmp_path / "resume", url, False)
    means = [state[0]["module"]["module.1.running_mean"] for state in states]
    assert not torch.equal(*means), "the test wants ranks whose buffers differ"
    for (at_stop, at_end), (_, restored, end) in zip(states, found, strict=True):
        assert differences(restored, at_stop) == []
        assert differences(end, at_end) == []
    ranks = asymcheck_torch.load(url, STOP)["ranks"]
    assert set(ranks) == {"0", "1"}
    assert torch.equal(ranks["1"]["buffers"]["1.running_mean"], means[1])


def test_damage_that_one_rank_finds_makes_all_fall_back(saved, tmp_path):
    url = _copy_of(saved[0], tmp_path)
    found = start(torch_ddp.restore_with_damage_on_one_rank, tmp_path / "damage", url, False)
    assert [step for step, _, _ in found] == [STOP - 1, STOP - 1]
    assert differences(found[0][1], found[1][1]) == []


def test_after_falling_back_all_ranks_train_on(saved, tmp_path):
    url = _copy_of(saved[0], tmp_path)
    found = start(torch_ddp.restore_with_damage_on_one_rank, tmp_path / "damage", url, True)
    assert all(steps == [1, 2, 3, 4] for _, _, steps in found)


def test_a_store_that_one_rank_does_not_reach_ends_restoring_on_all(saved, tmp_path):
    url, _ = saved
    worker = torch_ddp.restore_where_one_rank_sees_no_store
    ranks = start(worker, tmp_path / "unreachable", url)
    assert ranks == [("SaveFailedError SaveFailedError ", []), ("StoreError StoreError ", [])]


def test_a_rank_that_fails_for_good_stops_all(saved, tmp_path):
    url = saved[0]
    found = start(torch_ddp.restore_into_another_model_on_one_rank, tmp_path / "fails", url)
    assert [name for name, *_ in found] == ["AsymCheckError", "StateMismatchError"]
    assert "'more' is missing" in found[1][1]
    assert differences(found[1][3], found[1][2]) == []


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_rank_that_cannot_store_a_step_costs_only_that_step(tmp_path, by_hand):
    url = (tmp_path / "run").as_uri()
    found = start(torch_ddp.fail_on_one_rank_for_a_step, tmp_path / "odd", url, by_hand)
    assert found == [[1, 3, 4], [1, 3, 4]]


def test_ranks_begin_their_chains_at_the_same_steps(tmp_path):
    url = (tmp_path / "run").as_uri()
    states, _ = start(torch_ddp.build_chains, tmp_path / "chains", url)
    store = open_store(url)
    found = {step: load_index(store, step) for step in range(1, CHAINED + 1)}
    for index in found.values():
        assert len({manifest.base_step for manifest in index.manifests}) == 1
    told = [index.record.base_at for index in found.values()]
    bases = [step for step, index in found.items() if index.record.parent is None]
    assert bases == [1, *(n + 1 for n in told if n is not None and n < CHAINED)]
    assert len(bases) > 2 and max(index.record.depth for index in found.values()) >= 2
    loaded = asymcheck_torch.load(url, bases[-1] - 1)["exp_avg"]["0.weight"]
    assert torch.equal(loaded, states[bases[-1] - 2][0]["state"][0]["exp_avg"])


def test_the_disk_is_lost_and_the_mirror_has_what_all_ranks_stored(tmp_path):
    url, mirror = ((tmp_path / name).as_uri() for name in ("run", "mirror"))
    states = start(torch_ddp.save_and_go_on, tmp_path / "save", url, True, mirror)
    shutil.rmtree(tmp_path / "run")
    found = start(torch_ddp.resume, tmp_path / "resume", url, True, mirror)
    for (_, at_end), (step, _, end) in zip(states, found, strict=True):
        assert step == STOP
        assert differences(end, at_end) == []
    for place in (url, mirror):
        with asymcheck.open_checkpoint(place, torch_ddp.TOTAL) as checkpoint:
            checkpoint.verify()
            assert len(checkpoint.chain[0].manifests) == 2


def test_ranks_without_ddp(tmp_path):
    url = (tmp_path / "run").as_uri()
    found = start(torch_ddp.train_in_a_plain_group, tmp_path / "group", url)
    for expected, restored in found:
        assert differences(restored["module"], expected["module"]) == []
        assert differences(restored["optimizers"], expected["optimizers"]) == []
    means = [expected["module"]["1.running_mean"] for expected, _ in found]
    assert not torch.equal(*means)


def _copy_of(url, tmp_path):
    """The run again, so that tests that train on do not disturb each other."""
    shutil.copytree(url.removeprefix("file://"), tmp_path / "copy")
    return (tmp_path / "copy").as_uri()


def _bare(module_state):
    return {name.removeprefix("module."): value for name, value in module_state.items()}


# -- agreement -----------------------------------------------------------------------------


class ThreadWorld:
    """A world of threads: the collective is a barrier."""

    def __init__(self, size):
        self.size = size
        self._barrier = threading.Barrier(size, timeout=30)
        self._numbers = []

    def extremes(self, number):
        if self._barrier.wait() == 0:
            self._numbers = []
        self._barrier.wait()
        self._numbers.append(number)
        self._barrier.wait()
        return min(self._numbers), max(self._numbers)


class Copy:
    """A step in one of the two stores of a run."""

    def __init__(self, step, url):
        self.step = step
        self.url = url


class FakeCheckpointer:
    """`restore_with` as the core's, over copies of steps of which some cannot be opened here."""

    url = "near"

    def __init__(self, health):
        self._health = health

    def restore_with(self, fill, step):
        for place in _in_order(self._health, step):
            try:
                if self._health[place] == "unopenable":
                    raise CorruptionError("cannot be opened", step=place[0])
                if self._health[place] == "unavailable":
                    raise AsymCheckError("the store went away", step=place[0])
                return fill(Copy(*place))
            except CorruptionError:
                continue
        raise CheckpointNotFoundError("no checkpoint is whole")


def _in_order(places, step):
    """The newest first, the nearer copy first; or the copies of one step."""
    newest_first = sorted(places, key=lambda place: (-place[0], place[1] != "near"))
    return [place for place in newest_first if step in (None, place[0])]


HEALTH = st.sampled_from(
    ["good"] * 4 + ["unopenable", "damaged", "unavailable", "misfit", "inapplicable"]
)
PLACES = st.sets(
    st.tuples(st.integers(1, 3), st.sampled_from(["near", "mirror"])), min_size=1, max_size=5
)


@settings(max_examples=300, deadline=None)
@given(
    ranks=PLACES.flatmap(
        lambda places: st.lists(
            st.fixed_dictionaries(dict.fromkeys(sorted(places), HEALTH)), min_size=1, max_size=3
        )
    ),
    explicit=st.booleans(),
)
@example(
    ranks=[
        {(1, "near"): "good", (1, "mirror"): "good"},
        {(1, "near"): "unopenable", (1, "mirror"): "good"},
    ],
    explicit=True,
)
def test_all_ranks_restore_the_same_copy_of_a_step_or_none_does(ranks, explicit):
    """Whatever is wrong on whichever rank, nobody hangs and nobody is alone."""
    world = ThreadWorld(len(ranks))
    step = max(step for step, _ in ranks[0]) if explicit else None
    results = [None] * len(ranks)
    applied = [None] * len(ranks)

    def work(rank):
        def read(checkpoint):
            place = (checkpoint.step, checkpoint.url)
            health = ranks[rank][place]
            if health == "damaged":
                raise CorruptionError("damaged", step=checkpoint.step)
            if health == "misfit":
                raise AsymCheckError("does not fit", step=checkpoint.step)

            def apply():
                _apply(health)
                applied[rank] = place

            return apply

        try:
            checkpointer = FakeCheckpointer(ranks[rank])
            results[rank] = restore_together(checkpointer, read, step, world)
        except AsymCheckError as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = _expected(ranks, step)
    assert None not in results
    if expected is None:
        assert all(_is_error(result) for result in results)
    else:
        assert results == [expected[0]] * len(ranks)
        assert applied == [expected] * len(ranks)


def _apply(health):
    if health == "inapplicable":
        raise CorruptionError("what a user's object says when its state is loaded")


def _is_error(result):
    return isinstance(result, Exception)


def _expected(ranks, step):
    """The newest copy that is good everywhere, unless a failure that is no damage comes first."""
    for place in _in_order(ranks[0], step):
        health = {rank[place] for rank in ranks}
        if health == {"good"}:
            return place
        if health == {"good", "inapplicable"} or health == {"inapplicable"}:
            return None
        if health & {"unavailable"} or ("misfit" in health and "unopenable" not in health):
            return None
    return None
