"""DeepSpeed engines: resumed bit for bit, and stored so that anything else can read them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch is built without gloo", allow_module_level=True)
os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip(
    "deepspeed",
    reason="DeepSpeed is missing: DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install deepspeed==0.19.8",
)

import deepspeed_runs  # noqa: E402
import fsdp_runs  # noqa: E402
import torch_ddp  # noqa: E402
from deepspeed_runs import STOP, Setting, of_all, start  # noqa: E402
from sharded_net import loss_of, random_tokens  # noqa: E402
from torch_runs import differences, raw  # noqa: E402

import asymcheck  # noqa: E402
import asymcheck_torch  # noqa: E402
from asymcheck.errors import StateMismatchError  # noqa: E402
from asymcheck.index import load_index  # noqa: E402
from asymcheck.stores import open_store  # noqa: E402

PLAIN = {
    f"zero{stage}-{dtype}": Setting(stage, dtype)
    for stage in (3, 2, 1, 0)
    for dtype in ("fp32", "bf16")
}
OPTIONS = {
    f"options-{stage}": Setting(stage, groups=True, accumulate=2, clip=0.5, scheduler=True)
    for stage in (3, 2, 1, 0)
}
_CHECKED = {"bf16": {"enabled": True, "check_grad_overflow": True}}
OVERFLOWS = {
    "overflow-3": Setting(overflow=True),
    "overflow-2": Setting(2, overflow=True, more=_CHECKED),
    "overflow-1": Setting(1, overflow=True, more=_CHECKED),
    "overflow-0": Setting(0, "bf16", overflow=True),
}
_ALWAYS_GATHERED = {
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 10**9,
}
_ON_CPU = {"device": "cpu"}
OTHER = {
    "sgd-3": Setting(optimizer="sgd"),
    "sgd-2": Setting(2, optimizer="sgd"),
    "adafactor": Setting(2, optimizer="adafactor"),
    "own": Setting(optimizer="own"),
    "configured": Setting(optimizer="configured"),
    "persistent": Setting(zero=_ALWAYS_GATHERED),
    "persistent-bf16": Setting(dtype="bf16", zero=_ALWAYS_GATHERED),
    "sub-groups": Setting(groups=True, zero={"sub_group_size": 500}),
    "groups-2": Setting(2, groups=True),
    "round-robin-2": Setting(2, groups=True, zero={"round_robin_gradients": True}),
    "round-robin-1": Setting(1, "bf16", groups=True, zero={"round_robin_gradients": True}),
    "zero-init": Setting(dtype="bf16", zero_init=True, zero=_ALWAYS_GATHERED),
    "offload-3": Setting(zero={"offload_optimizer": _ON_CPU}),
    "offload-2": Setting(2, groups=True, zero={"offload_optimizer": _ON_CPU}),
    "offload-all": Setting(
        dtype="bf16", zero={"offload_optimizer": _ON_CPU, "offload_param": _ON_CPU}
    ),
    "bf16-sums-in-fp32": Setting(
        1, "bf16", groups=True, accumulate=2, more={"data_types": {"grad_accum_dtype": "fp32"}}
    ),
}
REPLAYED = {
    f"replay-{stage}": Setting(stage, "bf16", groups=True, clip=0.5, width=200, replay=True)
    for stage in (1, 2, 3)
}
SETTINGS = PLAIN | OPTIONS | OVERFLOWS | OTHER | REPLAYED
WARM = 2  # updates of something else before restoring


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with a run of two ranks for every setting."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def saved(runs):
    """{setting: for each rank its state at STOP and at TOTAL, and its losses between}."""
    save = deepspeed_runs.save_and_go_on
    each = {name: (save, str(runs / name), setting) for name, setting in SETTINGS.items()}
    return _by_name(start(of_all, runs / "save", each))


@pytest.fixture(scope="module")
def resumed(runs, saved):
    """The same after restoring: {(setting, updates before restoring): ...}."""
    resume = deepspeed_runs.resume
    each = {
        (name, warm): (resume, str(runs / name), setting, warm)
        for name, setting in SETTINGS.items()
        for warm in (0, WARM)
    }
    return _by_name(start(of_all, runs / "resume", each))


def _by_name(ranks):
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


# -- the same number of ranks --------------------------------------------------------------


@pytest.mark.parametrize("warm", [0, WARM], ids=["fresh", "warm"])
@pytest.mark.parametrize("name", SETTINGS)
def test_resume_is_bit_identical(saved, resumed, name, warm):
    for expected, found in zip(saved[name], resumed[name, warm], strict=True):
        at_stop, at_end, losses = expected
        at_start, end, losses_again = found
        assert differences(at_start, at_stop) == []
        assert differences(end, at_end) == []
        assert losses_again == losses


@pytest.mark.parametrize("name", REPLAYED)
def test_increments_of_engines_replay_the_optimizer(runs, saved, name):
    with closing(open_store(runs / name)) as store:
        blocks = [b for b in load_index(store, STOP).blocks() if b.codec.id == "replay"]
    assert {block.box.leaf.kind for block in blocks} == {"params", "exp_avg", "exp_avg_sq"}
    raw = sum(block.nbytes for block in blocks)
    assert raw > 3 * 4 * 3 * 0.8 * 200 * 200  # of three layers nearly everything
    assert sum(block.block.nbytes for block in blocks) < 0.16 * raw


CAPTURED = {
    "captured-0": Setting(0),
    "captured-1": Setting(1, "bf16", groups=True, width=200),
    "captured-2": Setting(2, "bf16", groups=True, width=200, clip=0.05),
    "captured-3": Setting(3, "bf16", groups=True, width=200, clip=0.05),
    "captured-fp32": Setting(3),
    "captured-nesterov": Setting(2, optimizer="nesterov"),
    "captured-offload": Setting(3, zero={"offload_optimizer": _ON_CPU}),
    "captured-sums-in-fp32": Setting(
        1, "bf16", groups=True, more={"data_types": {"grad_accum_dtype": "fp32"}}
    ),
}


def test_gradients_are_captured_as_the_optimizer_is_given_them(runs):
    each = {
        name: (deepspeed_runs.save_gradients, str(runs / name), setting)
        for name, setting in CAPTURED.items()
    }
    for name, ranks in _by_name(start(of_all, runs / "gradients", each)).items():
        gradients, norm = ranks[0]
        clip = CAPTURED[name].clip
        assert len(gradients) > 5
        assert not clip or norm > 1.5 * clip
        with asymcheck.open_checkpoint(runs / name, STOP) as checkpoint:
            for path, before in gradients.items():
                found = checkpoint[f"gradients/{path}"][...]
                expected = before.numpy() * (clip / (norm + 1e-6) if clip else 1.0)
                tolerance = 1e-5 if clip else 0.0
                assert np.allclose(found, expected, rtol=tolerance, atol=0.0), (name, path)


@pytest.mark.parametrize("name", ["captured-1", "captured-2", "captured-3"])
def test_everything_follows_from_captured_gradients(runs, name):
    with closing(open_store(runs / name)) as store:
        blocks = [b for b in load_index(store, STOP).blocks() if b.codec.id == "replay"]
    assert "gradients" in {block.box.leaf.kind for block in blocks}
    raw = sum(block.nbytes for block in blocks)
    assert raw > 4 * 4 * 3 * 0.8 * 200 * 200
    assert sum(block.block.nbytes for block in blocks) < 0.12 * raw


@pytest.mark.parametrize("name", OVERFLOWS)
def test_a_skipped_update_is_no_step(saved, name):
    at_building = name == "overflow-0"  # DeepSpeed steps that optimizer once, without gradients
    for at_stop, _, _ in saved[name]:
        assert at_stop["counters"] == [STOP + 1, 1, STOP + 1]
        assert at_stop["updates"] == [STOP + at_building]


def test_the_runs_are_what_they_should_be(saved):
    """Else the tests above would compare less than they seem to."""
    state, end, losses = saved["options-3"][0]
    assert state["counters"] == [STOP, 0, 2 * STOP]
    assert [group["lr"] for group in state["options"]] == [0.005, 0.0015]
    assert [group["weight_decay"] for group in state["options"]] == [0.1, 0.0]
    assert state["schedule"]["last_epoch"] == STOP
    assert {"exp_avg/few", "exp_avg_sq/embed.weight", "params/frozen.weight"} <= state.keys()
    assert differences(end, state) != []
    assert losses != saved["options-3"][1][2], "ranks train on other data"
    assert "momentum_buffer/few" in saved["sgd-3"][0][0]
    assert saved["zero3-bf16"][0][0]["model/few"].dtype == torch.bfloat16
    assert saved["zero3-bf16"][0][0]["params/few"].dtype == torch.float32


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_stored_rounds_to_what_the_model_computes_with(runs, saved, name):
    """Says that masters stand under the right names, whatever DeepSpeed says of them."""
    stored = asymcheck_torch.load(str(runs / name), STOP)["params"]
    models = {path: value for path, value in saved[name][0][0].items() if path.startswith("model/")}
    assert len(models) == 12
    for path, model in models.items():
        assert raw(stored[path.removeprefix("model/")].to(model.dtype)) == raw(model), path


def test_moments_stand_under_the_right_names_in_another_order_too(runs, saved):
    assert differences(saved["round-robin-2"][0][2], saved["groups-2"][0][2]) == [], "same training"
    loaded = asymcheck_torch.load(str(runs / "round-robin-2"), STOP)
    for path, tensor in _universal(saved["groups-2"][0][0]).items():
        kind, _, parameter = path.partition("/")
        assert raw(loaded[kind][parameter]) == raw(tensor), path


MORE = ["zero3-fp32", "persistent", "options-2", "zero0-bf16"]


@pytest.fixture(scope="module")
def gone_on(runs, saved):
    """What else is done with copies of runs: {(what, setting): ...}."""
    each = {}
    for name in MORE:
        shutil.copytree(runs / name, runs / f"{name}-longer")
        longer, fresh = str(runs / f"{name}-longer"), str(runs / f"{name}-at-0")
        setting = SETTINGS[name]
        worker = deepspeed_runs
        each |= {
            ("unseen", name): (worker.resume_unseen, str(runs / name), setting, WARM),
            ("saving", name): (worker.restore_and_go_on_saving, longer, setting),
            ("again", name): (worker.restore, longer, setting, deepspeed_runs.TOTAL),
            ("first", name): (worker.save_before_the_first_update, fresh, setting),
        }
    return _by_name(start(of_all, runs / "more", each))


@pytest.mark.parametrize("name", MORE)
def test_resume_is_bit_identical_when_nobody_looks_between(saved, gone_on, name):
    """Looking at a parameter releases it, which would hide that it was gathered before."""
    for expected, found in zip(saved[name], gone_on["unseen", name], strict=True):
        assert differences(found, expected[1:]) == []


@pytest.mark.parametrize("name", MORE)
def test_a_resumed_run_is_checkpointed_as_well(saved, gone_on, name):
    for rank, (_, at_end, _) in enumerate(saved[name]):
        assert differences(gone_on["saving", name][rank], at_end) == []
        assert differences(gone_on["again", name][rank], at_end) == []


@pytest.mark.parametrize("name", MORE)
def test_a_checkpoint_before_the_first_update(gone_on, name):
    """Restoring it takes away the moments that there are by then."""
    for expected, found in gone_on["first", name]:
        assert differences(found, expected) == []


# -- other numbers of ranks, other stages, other frameworks --------------------------------

UNIVERSAL = [
    *(("options-3", f"options-{now}") for now in (3, 2, 1, 0)),
    *((f"options-{was}", "options-3") for was in (1, 0)),
    *(("zero3-bf16", f"zero{now}-bf16") for now in (2, 0)),
    ("groups-2", "round-robin-2"),
    ("round-robin-2", "sub-groups"),
]


@pytest.fixture(scope="module")
def moved(runs, saved):
    """{number of ranks: {(from, to): state for each rank}}."""
    each = {
        (was, now): (deepspeed_runs.restore, str(runs / was), SETTINGS[now])
        for was, now in UNIVERSAL
    }
    return {
        world: _by_name(start(of_all, runs / f"world{world}", each, world=world))
        for world in (1, 2, 3, 4)
    }


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("pair", UNIVERSAL, ids=" to ".join)
def test_restore_at_any_number_of_ranks_and_any_stage(saved, moved, pair, world):
    was, now = pair
    named = "groups-2" if "round-robin-2" in pair else was  # DeepSpeed cannot name it in others
    expected = saved[named][0][0]
    for found in moved[world][pair]:
        assert differences(found, {path: expected[path] for path in found}) == []
        assert found.keys() == saved[now][0][0].keys()


def _universal(state):
    kinds = ("params/", "exp_avg/", "exp_avg_sq/", "momentum_buffer/")
    return {name: value for name, value in state.items() if name.startswith(kinds)}


@pytest.mark.parametrize(
    "name", ["options-3", "zero-init", "bf16-sums-in-fp32", "sgd-3", "offload-2"]
)
def test_anyone_reads_it(runs, saved, name):
    expected = _universal(saved[name][0][0])
    loaded = asymcheck_torch.load(str(runs / name), STOP)
    with asymcheck.open_checkpoint(str(runs / name), step=STOP) as checkpoint:
        for path, tensor in expected.items():
            kind, _, parameter = path.partition("/")
            assert np.asarray(checkpoint[path][...]).tobytes() == raw(tensor), path
            assert checkpoint[path].shape == loaded[kind][parameter].shape == tensor.shape
            assert raw(loaded[kind][parameter]) == raw(tensor), path
        assert checkpoint["params/head.weight"].shape == (29, 24)


def test_jax_reads_it(runs, saved):
    pytest.importorskip("jax", reason="JAX is missing: pip install 'asymcheck[jax]'")
    import asymcheck_jax

    loaded = asymcheck_jax.load(str(runs / "options-3"), STOP)
    for path, tensor in _universal(saved["options-3"][0][0]).items():
        kind, _, parameter = path.partition("/")
        assert np.asarray(loaded[kind][parameter]).tobytes() == raw(tensor), path


@pytest.mark.parametrize("world", [2, 3])
def test_zero_into_fsdp2_and_ddp(runs, saved, world):
    each = {
        (was, kind): (str(runs / was), kind)
        for was in ("options-3", "options-1")
        for kind in ("fsdp", "columns", "ddp")
    }
    worker = fsdp_runs.restore
    found = torch_ddp.start(fsdp_runs.of_all, runs / f"fsdp{world}", worker, each, world=world)
    for (was, _), ranks in _by_name(found).items():
        for state in ranks:
            _assert_torch_has(state, saved[was][0][0])


def test_zero_into_a_plain_module(runs, saved):
    for was in ("options-3", "options-0"):
        run = fsdp_runs.build("plain", seed=8)
        with asymcheck_torch.attach(*run, url=str(runs / was), every_steps=1000) as ckpt:
            assert ckpt.restore() == STOP
        _assert_torch_has(fsdp_runs.snapshot(run), saved[was][0][0])


def test_zero_into_a_module_alone(runs, saved):
    module, _ = fsdp_runs.build("plain", seed=8)
    with asymcheck_torch.attach(module, url=str(runs / "options-3")) as ckpt:
        assert ckpt.restore() == STOP
    for name, parameter in module.named_parameters():
        assert raw(parameter) == raw(saved["options-3"][0][0][f"params/{name}"])


def _assert_torch_has(state, expected):
    """A torch optimizer keeps a step for each parameter, an engine one for all."""
    assert differences(_universal(state), _universal(expected)) == []
    assert differences(state["options"], expected["options"]) == []
    steps = {float(value) for name, value in state.items() if name.startswith("step/")}
    assert sorted(steps) == expected["updates"]


@pytest.fixture(scope="module")
def of_torch(runs):
    """Runs that torch trained: {kind: their state at STOP}."""
    states = {}
    for kind, world in (("plain", 1), ("fsdp", 2), ("ddp", 2)):
        url = str(runs / f"torch-{kind}")
        worker = fsdp_runs.save_and_go_on
        (state, _, _), *_ = torch_ddp.start(worker, runs / f"save-{kind}", url, kind, world=world)
        states[kind] = state
    return states


@pytest.mark.parametrize("world", [2, 3])
def test_torch_into_zero(runs, of_torch, world):
    each = {
        (kind, stage): (
            deepspeed_runs.restore,
            str(runs / f"torch-{kind}"),
            Setting(stage, groups=True),
            STOP,
            True,
        )
        for kind in of_torch
        for stage in (3, 2, 0)
    }
    found = _by_name(start(of_all, runs / f"from-torch{world}", each, world=world))
    for (kind, _), ranks in found.items():
        for state in ranks:
            _assert_torch_has(of_torch[kind], state)
            assert state["counters"] == [STOP, 0, STOP]
            assert state["samples"] == STOP * 4 * world


# -- what does not fit ---------------------------------------------------------------------

MISFITS = {
    "width": (
        "options-3",
        Setting(groups=True, width=20),
        ["'layers.1.weight' has shape [20, 20]"],
    ),
    "width-1": ("options-3", Setting(1, groups=True, width=20), ["'odd'", "shape"][1:]),
    "groups": ("options-3", Setting(), ["here are 1 parameter groups, in it 2"]),
    "groups-2": ("zero3-fp32", Setting(2, groups=True), ["here are 2 parameter groups, in it 1"]),
    "frozen in bf16": (
        "zero3-bf16",
        Setting(),
        ["parameter 'frozen.weight' is torch.float32, in it bfloat16", "'frozen.bias'"],
    ),
    "steps of its own": (
        "torch-uneven",
        Setting(),
        ["step of 'few' is 2.0 in it", "DeepSpeed keeps one for all"],
    ),
    "lists": ("torch-lbfgs", Setting(), ["old_dirs of 'odd' is a list in it"]),
    "no state": ("torch-unused", Setting(), ["exp_avg 'few' is missing in it"]),
}


@pytest.fixture(scope="module")
def misfits(runs, saved):
    """{why: for each rank the error's kind and text, and the state before and after}."""
    _train_but_few(str(runs / "torch-uneven"), first=1)
    _train_but_few(str(runs / "torch-unused"), first=STOP)
    _train_by_lbfgs(str(runs / "torch-lbfgs"))
    each = {
        name: (deepspeed_runs.restore_what_does_not_fit, str(runs / was), setting)
        for name, (was, setting, _) in MISFITS.items()
    }
    return _by_name(start(of_all, runs / "misfits", each))


def _train_but_few(url, first):
    """A plain run in which a parameter has no gradient in the first updates."""
    module, optimizer = fsdp_runs.build("plain", groups=False)
    with asymcheck_torch.attach(module, optimizer, url=url) as ckpt:
        for step in range(STOP):
            module.few.requires_grad_(step >= first)
            fsdp_runs.train((module, optimizer), 1)
        module.few.requires_grad_(True)
        ckpt.wait()


def _train_by_lbfgs(url):
    """An optimizer whose state cannot be cut."""
    module, _ = fsdp_runs.build("plain", groups=False)
    optimizer = torch.optim.LBFGS([p for p in module.parameters() if p.requires_grad], max_iter=2)
    with asymcheck_torch.attach(module, optimizer, url=url):
        optimizer.step(lambda: _backward(module, optimizer))


def _backward(module, optimizer):
    optimizer.zero_grad()
    loss = loss_of(module, random_tokens())
    loss.backward()
    return loss


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_changes_nothing_on_any_rank(misfits, name):
    for kind, message, before, after in misfits[name]:
        assert kind == StateMismatchError.__name__
        assert all(part in message for part in MISFITS[name][2]), message
        assert differences(after, before) == []


def test_an_optimizer_of_another_kind_does_not_fit(runs, saved):
    worker = deepspeed_runs.restore_what_does_not_fit
    each = {
        "sgd": (worker, str(runs / "zero3-fp32"), Setting(optimizer="sgd")),
        "adamw": (worker, str(runs / "sgd-3"), Setting()),
    }
    for ranks in _by_name(start(of_all, runs / "kinds", each)).values():
        for kind, message, before, after in ranks:
            assert kind == StateMismatchError.__name__
            assert "keeps other state" in message
            assert differences(after, before) == []


def test_a_schedule_that_only_one_has_is_said_to_be_left(runs, saved):
    worker = deepspeed_runs.warnings_of_restoring
    each = {
        "checkpoint": (worker, str(runs / "options-3"), Setting(groups=True)),
        "engine": (worker, str(runs / "zero3-fp32"), Setting(scheduler=True)),
        "neither": (worker, str(runs / "zero3-fp32"), Setting()),
    }
    for name, ranks in _by_name(start(of_all, runs / "schedules", each)).items():
        for said, schedule in ranks:
            found = [text for text in said if f"only the {name} has a learning rate sch" in text]
            assert len(found) == (name != "neither") == len(said)
            assert schedule is None or schedule["last_epoch"] == 0


# -- what is stored ------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_each_byte_is_stored_once_over_the_ranks(runs, saved, name):
    index = load_index(open_store(str(runs / name)), STOP)
    stored, by_writer = Counter(), Counter()
    for block in index.blocks():
        nbytes = block.block.count * block.box.leaf.itemsize
        stored[block.box.leaf.path] += nbytes
        by_writer[block.group[0]] += nbytes
    assert stored == {p: leaf.spec.nbytes for p, leaf in index.leaves.items() if leaf.spec.nbytes}
    assert min(by_writer.values()) > 0.3 * sum(by_writer.values())
    like = name.replace("round-robin-2", "groups-2").replace("round-robin-1", "groups-2")
    named = _universal(saved[like][0][0])
    assert _universal(stored).keys() == named.keys(), "frozen ones too, tied ones once, no copies"


# -- what is refused -----------------------------------------------------------------------

REFUSED = {
    "two optimizers": ["ValueError", "an engine has its own optimizer"],
    "version": ["UnsupportedStateError", "0.190.1", "0.19.x"],
    "curriculum_learning": ["UnsupportedStateError", "curriculum learning"],
    "random_ltd": ["UnsupportedStateError", "random-LTD"],
    "pipeline": ["UnsupportedStateError", "pipeline engine"],
    "experts": ["UnsupportedStateError", "mixture of experts"],
    "no optimizer": ["UnsupportedStateError", "DeepSpeedZeRoOffload"],
    "secondary partitions": ["UnsupportedStateError", "secondary partitions (hpZ)"],
    "autocast": ["UnsupportedStateError", "gradient scaler of torch's autocast"],
    "autocast-3": ["UnsupportedStateError", "gradient scaler of torch's autocast"],
}


@pytest.fixture(scope="module")
def refused(runs):
    url = str(runs / "never")
    return start(deepspeed_runs.attach_to_what_is_refused, runs / "refused", url)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_by_name(runs, refused, name):
    for said in refused:
        assert all(part in said[name] for part in REFUSED[name]), said[name]
    assert not (runs / "never").exists()


@pytest.mark.long
def test_muon_is_refused_by_name(runs):
    for said in start(deepspeed_runs.attach_to_muon, runs / "muon", str(runs / "never")):
        assert said.startswith("UnsupportedStateError: DeepSpeed's Muon")


# -- DeepSpeed's own CPU Adam --------------------------------------------------------------

_OFFLOADED = {"offload_optimizer": _ON_CPU}
_MASTERS_IN_BF16 = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
CPU_ADAM = {
    "cpu-adam-3": Setting(optimizer="cpu_adam", groups=True, zero=_OFFLOADED),
    "cpu-adam-2": Setting(2, "bf16", optimizer="cpu_adam", zero=_OFFLOADED),
    "cpu-adam-0": Setting(0, optimizer="cpu_adam", groups=True),
    "bf16-masters-3": Setting(optimizer="cpu_adam", zero=_OFFLOADED, more=_MASTERS_IN_BF16),
    "bf16-masters-2": Setting(2, optimizer="cpu_adam", zero=_OFFLOADED, more=_MASTERS_IN_BF16),
}


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_cpu_adam(runs, saved):
    """Compiling it takes minutes."""
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(runs / "built")}
    builds = (
        "from deepspeed.ops.adam import DeepSpeedCPUAdam as A; import torch; A([torch.ones(1)])"
    )
    done = subprocess.run([sys.executable, "-c", builds], env=environment, capture_output=True)
    if done.returncode:
        pytest.skip(f"CPU Adam does not build here: {done.stderr.decode()[-300:]}")
    save, resume, restore = (
        deepspeed_runs.save_and_go_on,
        deepspeed_runs.resume,
        deepspeed_runs.restore,
    )
    each = {name: (save, str(runs / name), setting) for name, setting in CPU_ADAM.items()}
    reference = _by_name(start(of_all, runs / "save-cpu-adam", each))
    each = {
        (name, warm): (resume, str(runs / name), setting, warm)
        for name, setting in CPU_ADAM.items()
        for warm in (0, WARM)
    }
    for (name, _), ranks in _by_name(start(of_all, runs / "resume-cpu-adam", each)).items():
        assert differences(ranks, reference[name]) == []
    torch_adam = replace(CPU_ADAM["cpu-adam-3"], optimizer="adamw")
    each = {
        "to torch's": (restore, str(runs / "cpu-adam-3"), torch_adam),
        "from stage 0": (restore, str(runs / "cpu-adam-0"), CPU_ADAM["cpu-adam-3"]),
        "from torch's": (restore, str(runs / "sub-groups"), CPU_ADAM["cpu-adam-3"]),
    }
    found = _by_name(start(of_all, runs / "move-cpu-adam", each, world=3))
    for name, was in (
        ("to torch's", reference["cpu-adam-3"]),
        ("from stage 0", reference["cpu-adam-0"]),
        ("from torch's", saved["sub-groups"]),
    ):
        for state in found[name]:
            assert differences(_universal(state), _universal(was[0][0])) == []
            assert state["updates"] == [STOP]
