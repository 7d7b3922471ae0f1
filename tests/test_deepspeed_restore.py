"""Restoring DeepSpeed engines where something is different, damaged, unfinished or refused."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch is built without gloo", allow_module_level=True)
os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip(
    "deepspeed",
    reason="DeepSpeed is missing: DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install deepspeed==0.19.8",
)

import deepspeed_restore_runs as runs_of  # noqa: E402
import fsdp_runs  # noqa: E402
from deepspeed_restore_runs import STEPS, Counting  # noqa: E402
from deepspeed_runs import Setting, of_all, start  # noqa: E402
from sharded_net import WIDTH, parameters_of, seed_and_build  # noqa: E402
from torch_runs import differences, raw  # noqa: E402

import asymcheck  # noqa: E402
import asymcheck_torch  # noqa: E402
from asymcheck.commit import committed_steps  # noqa: E402
from asymcheck.stores import LocalStore  # noqa: E402
from asymcheck_torch.optimizers import class_problem, classes_of  # noqa: E402

_GATHERED = {"stage3_param_persistence_threshold": 100_000}
_OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
_SUMS_IN_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
STAGES = {f"zero{stage}": Setting(stage) for stage in range(4)}
SETTINGS = STAGES | {
    "persistent": Setting(zero=_GATHERED),
    "schedule": Setting(2, scheduler=True),
    "sums": Setting(1, "bf16", more=_SUMS_IN_FP32),
    "offload-3": Setting(zero=_OFFLOADED),
    "offload-2": Setting(2, zero=_OFFLOADED),
    "bf16": Setting(0, "bf16"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with a run of two ranks for every setting, and one in the old form."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def saved(runs):
    """{setting: the state of each rank at the last step}."""
    each = {name: (runs_of.save, str(runs / name), setting) for name, setting in SETTINGS.items()}
    before = {
        f"{name}-before": (runs_of.save_as_before, str(runs / f"{name}-before"), SETTINGS[name])
        for name in ("zero3", "zero0")
    }
    return _by_name(start(of_all, runs / "save", each | before))


def _by_name(ranks):
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


# -- damage, and errors on one rank --------------------------------------------------------

DAMAGED = ("zero1", "zero2", "zero3", "persistent")


@pytest.fixture(scope="module")
def damaged(runs, saved):
    """Runs of which the bytes that rank 1 has written of the last step are not what they were.

    {(setting, step asked for): for each rank what came of restoring}.
    """
    each = {}
    for name in DAMAGED:
        shutil.copytree(runs / name, runs / f"{name}-damaged")
        assert _damage(runs / f"{name}-damaged", STEPS, writer=1)
        for step in (None, STEPS):
            url = str(runs / f"{name}-damaged")
            each[name, step] = (runs_of.restore, url, SETTINGS[name], step)
    return _by_name(start(of_all, runs / "damaged", each))


def _damage(run, step, writer):
    """Flip bits in a writer's packs of a step; how many there are."""
    packs = list(run.glob(f"data/{step:016}-*/w{writer:05}-*.pack"))
    for pack in packs:
        data = bytearray(pack.read_bytes())
        middle = slice(len(data) // 8, 7 * len(data) // 8)
        data[middle] = bytes(byte ^ 0x55 for byte in data[middle])
        pack.write_bytes(data)
    return len(packs)


@pytest.mark.parametrize("name", DAMAGED)
def test_all_ranks_fall_back_when_one_finds_damage(runs, damaged, name):
    expected = asymcheck_torch.load(str(runs / name), STEPS - 1)["params"]
    for step, state in damaged[name, None]:
        assert step == STEPS - 1
        names = [path.removeprefix("params/") for path in state if path.startswith("params/")]
        assert len(names) > 10
        for parameter in names:
            assert raw(state[f"params/{parameter}"]) == raw(expected[parameter])
            assert raw(state[f"model/{parameter}"]) == raw(expected[parameter]), (
                "what ranks compute with"
            )


@pytest.mark.parametrize("name", DAMAGED)
def test_all_ranks_raise_when_the_damaged_step_is_asked_for(damaged, name):
    for kind, message in damaged[name, STEPS]:
        assert kind == "CorruptionError", message


def test_a_rank_that_cannot_take_what_was_read_stops_all(runs, saved):
    worker, url = runs_of.fail_to_apply, str(runs / "schedule")
    each = {"schedule": (worker, url, SETTINGS["schedule"])}
    (well, ill) = _by_name(start(of_all, runs / "inapplicable", each))["schedule"]
    assert ill == ("LookupError", "what a schedule says")
    assert well[0] == "AsymCheckError"
    assert "another rank could not restore" in well[1]


# -- accumulation --------------------------------------------------------------------------

COUNTED = [
    (name, accumulate)
    for name in ("zero0", "zero2", "zero3", "zero3-before", "zero0-before")
    for accumulate in (1, 2, 3)
]


@pytest.mark.parametrize("world", [1, 2])
def test_the_first_update_after_restoring_has_all_of_its_micro_batches(runs, saved, world):
    each = {
        (name, accumulate): (
            runs_of.counts_of_updates,
            str(runs / name),
            replace(SETTINGS[name.removesuffix("-before")], accumulate=accumulate),
        )
        for name, accumulate in COUNTED
    }
    found = _by_name(start(of_all, runs / f"accumulate{world}", each, world=world))
    for (name, accumulate), ranks in found.items():
        updates = [STEPS + batch // accumulate for batch in range(1, 2 * accumulate + 1)]
        for counts in ranks:
            assert counts == [(count, count) for count in updates], (name, accumulate)


FORGETFUL = ["zero0", "zero1", "zero2", "zero3", "sums", "offload-3", "offload-2", "bf16"]


def test_gradients_from_before_restoring_do_not_count(runs, saved):
    each = {
        (name, accumulate): (
            runs_of.forget_gradients,
            str(runs / name),
            replace(SETTINGS[name], accumulate=accumulate),
        )
        for name in FORGETFUL
        for accumulate in (1, 2)
    }
    for name, ranks in _by_name(start(of_all, runs / "stale", each)).items():
        for found in ranks:
            assert len(found) == 2 + (name[1] > 1)
            assert not any(found.values()), (name, found)


def test_what_was_written_before_restores(runs, saved):
    each = {
        (name, now): (runs_of.restore, str(runs / f"{name}-before"), SETTINGS[now])
        for name in ("zero3", "zero0")
        for now in ("zero3", "zero0")
    }
    for (name, _), ranks in _by_name(start(of_all, runs / "old", each)).items():
        for rank, (step, state) in enumerate(ranks):
            assert step == STEPS
            expected = saved[f"{name}-before"][rank]
            assert differences(state["counters"], expected["counters"]) == []
            for path in (path for path in state if path.startswith(("params/", "exp_avg"))):
                assert raw(state[path]) == raw(expected[path]), path


# -- numbers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbers(runs):
    """{stage: what the optimizer of each rank keeps}."""
    each = {stage: (runs_of.save_numbers, str(runs / f"n{stage}"), stage) for stage in (0, 2, 3)}
    return _by_name(start(of_all, runs / "numbers", each))


def test_the_numbers_are_what_they_should_be(numbers):
    """Each of its kind; none is whole, or exact in a float32."""
    (kept,) = numbers[3][0]
    kinds = {key: type(value) for key, value in kept.items()}
    tensors = {"t": torch.Tensor, "d": torch.Tensor}
    assert kinds == {"scale": float, "seen": int, "warm": bool, "step": int} | tensors
    assert kept["scale"] == 0.1 * 1.1 * 1.1
    assert kept["seen"] == (1 << 40) + 1 + STEPS


def test_numbers_keep_their_values_and_their_kinds(runs, numbers):
    pairs = [(was, now) for was in (0, 2, 3) for now in (0, 2, 3)]
    each = {
        (was, now, warm): (runs_of.restore_numbers, str(runs / f"n{was}"), now, warm)
        for was, now in pairs
        for warm in (0, 1)
    }
    for name, ranks in _by_name(start(of_all, runs / "numbers-again", each)).items():
        for kept in ranks:
            assert differences(kept, numbers[name[0]][0]) == [], name


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_numbers_of_an_engine_into_a_plain_run(runs, numbers, stage):
    module = seed_and_build(WIDTH, 8)
    optimizer = Counting(parameters_of(module, False))
    url = str(runs / f"n{stage}")
    with asymcheck_torch.attach(module, optimizer, url=url, every_steps=1000) as ckpt:
        assert ckpt.restore() == STEPS
    assert differences(runs_of.numbers_of(optimizer), numbers[stage][0]) == []


# -- optimizers and modules ----------------------------------------------------------------


def test_adams_keep_the_same_and_others_do_not():
    class Own(torch.optim.AdamW):
        pass

    class FusedAdam(torch.optim.Optimizer):
        """Named as the one that DeepSpeed compiles."""

    p = [torch.ones(1, requires_grad=True)]
    alike = [torch.optim.Adam(p), torch.optim.AdamW(p), Own(p), FusedAdam(p, {"lr": 1.0})]
    others = [torch.optim.SGD(p), torch.optim.NAdam(p), torch.optim.RMSprop(p), Counting(p)]
    for saved in alike:
        record = {"class": classes_of(saved)}
        assert [class_problem(record, optimizer) for optimizer in alike] == [None] * len(alike)
        for optimizer in others:
            problem = class_problem(record, optimizer)
            assert problem is not None
            assert f"is {type(optimizer).__name__}, in it {type(saved).__name__}" in problem
    for optimizer in others:
        assert class_problem({"class": classes_of(optimizer)}, optimizer) is None
        assert class_problem({}, optimizer) is None, "it is not known"


def test_a_compiled_module_has_its_own_names(runs):
    each = {stage: (runs_of.train_compiled, str(runs / f"c{stage}"), stage) for stage in (0, 1, 2)}
    for stage, ranks in _by_name(start(of_all, runs / "compiled", each)).items():
        url = str(runs / f"c{stage}")
        with asymcheck.open_checkpoint(url) as checkpoint:
            assert checkpoint.step == STEPS
            assert not [path for path in checkpoint if "_orig_mod" in path]
        module, optimizer = fsdp_runs.build("plain", groups=False, seed=8)
        with asymcheck_torch.attach(module, optimizer, url=url, every_steps=1000) as ckpt:
            assert ckpt.restore() == STEPS
        for name, parameter in module.named_parameters():
            assert raw(parameter) == raw(ranks[0][name]), name


def test_a_parameter_that_the_module_lacks_is_refused(runs):
    each = {s: (runs_of.attach_with_a_stranger, str(runs / "never"), s) for s in (2, 3)}
    for ranks in _by_name(start(of_all, runs / "stranger", each)).values():
        for said in ranks:
            assert said.startswith("UnsupportedStateError: the engine's optimizer trains a para")
            assert "a parameter of shape [2, 5]" in said


# -- windows -------------------------------------------------------------------------------


def test_copies_move_in_the_windows_between_collectives(runs):
    """And partitions are sized by these windows. How long anything takes does not matter."""
    each = {"slow": (runs_of.move_in_windows, str(runs / "slow"))}
    for moved in _by_name(start(of_all, runs / "windows", each))["slow"]:
        assert min(moved.copied.values()) > 0
        assert moved.tracks["communication"] > 0
        assert moved.tracks["window"] > moved.tracks["stall"]
        nbytes, idle_s = (sum(each) for each in zip(*moved.planned.values(), strict=True))
        assert {phase for phase, _ in moved.planned} == {"forward", "backward"}
        assert nbytes > 10_000
        for partition_nbytes, window_s in moved.planned.values():
            assert partition_nbytes == pytest.approx(nbytes * window_s / idle_s, abs=100)


# -- a store that fails --------------------------------------------------------------------

BOTH_END_S = 90


@pytest.mark.timeout(200)
def test_all_ranks_end_when_the_store_of_one_fails(tmp_path):
    """Nobody kills the ranks: each leaves with its own error."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("deepspeed_store_fails.py")), tmp_path],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=(tmp_path / f"{rank}.txt").open("w"),
        )
        for rank in range(2)
    ]
    try:
        codes = [rank.wait(BOTH_END_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert 0 not in codes
    assert "No space left on device" in said[1].splitlines()[-1]
    assert "Error: " in said[0].splitlines()[-1]
    steps = committed_steps(LocalStore(tmp_path / "run"))
    for step in steps:
        with asymcheck.open_checkpoint(str(tmp_path / "run"), step=step) as checkpoint:
            checkpoint.verify()
    assert steps
