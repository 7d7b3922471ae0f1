"""FSDP2: resumed bit for bit, stored once, and restored whoever trains on how many ranks."""

from __future__ import annotations

import math
import shutil
import sys
from collections import Counter
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch is built without gloo", allow_module_level=True)

import fsdp_runs  # noqa: E402
import torch.distributed as dist  # noqa: E402
from fsdp_runs import STOP, of_all  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard  # noqa: E402
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: E402
from torch.distributed.tensor.placement_types import _StridedShard  # noqa: E402
from torch_ddp import start  # noqa: E402
from torch_runs import differences, raw  # noqa: E402

import asymcheck  # noqa: E402
import asymcheck_torch  # noqa: E402
from asymcheck.errors import CheckpointNotFoundError, UnsupportedStateError  # noqa: E402
from asymcheck.index import load_index  # noqa: E402
from asymcheck.reader import Checkpoint  # noqa: E402
from asymcheck.reshard import boxes_of_range  # noqa: E402
from asymcheck.stores import open_store  # noqa: E402
from asymcheck_torch.parts import part_of, share  # noqa: E402
from asymcheck_torch.sharding_types import is_dtensor, is_fsdp1, is_fsdp2  # noqa: E402
from asymcheck_torch.world import World  # noqa: E402

KINDS = ["fsdp", "low", "columns", "offload", "whole", "tensor", "ddp"]  # of two ranks
WARM = 2  # updates of something else before restoring


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs are: of two ranks, but for that over a 2-D mesh, of four."""
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def saved(folder):
    """{kind: for each rank its state at STOP and at TOTAL, and its losses between}."""
    two = {kind: (str(folder / kind), kind) for kind in KINDS}
    four = {"hsdp": (str(folder / "hsdp"), "hsdp")}
    save = fsdp_runs.save_and_go_on
    return _by_name(start(of_all, folder / "save", save, two)) | _by_name(
        start(of_all, folder / "save4", save, four, world=4)
    )


def _by_name(ranks):
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.fixture(scope="module")
def resumed(folder, saved):
    """What goes on as it was saved: {(kind, updates before restoring): as `saved`}."""

    def runs(kinds):
        return {(k, warm): (str(folder / k), k, warm) for k in kinds for warm in (0, WARM)}

    resume = fsdp_runs.resume
    return _by_name(start(of_all, folder / "resume", resume, runs(KINDS))) | _by_name(
        start(of_all, folder / "resume4", resume, runs(["hsdp"]), world=4)
    )


@pytest.mark.parametrize("warm", [0, WARM], ids=["fresh", "warm"])
@pytest.mark.parametrize("kind", [*KINDS, "hsdp"])
def test_resume_is_bit_identical(saved, resumed, kind, warm):
    for expected, found in zip(saved[kind], resumed[kind, warm], strict=True):
        at_stop, at_end, losses = expected
        at_start, end, losses_again = found
        assert differences(at_start, _with_buffers_of_rank_0(kind, at_stop, saved)) == []
        assert differences(end, at_end) == []
        assert losses_again == losses


def _with_buffers_of_rank_0(kind, state, saved):
    """DDP sends them to all before each forward pass."""
    of_rank_0 = saved[kind][0][0] if kind == "ddp" else state
    return state | {"buffers/seen": of_rank_0["buffers/seen"]}


RESHARDED = {
    1: [
        ("fsdp", "fsdp"),
        ("fsdp", "plain"),
        ("hsdp", "plain"),
        ("columns", "plain"),
        ("tensor", "plain"),
    ],
    2: [
        ("hsdp", "tensor"),
        ("ddp", "fsdp"),
        ("ddp", "columns"),
        ("fsdp", "ddp"),
        ("columns", "low"),
    ],
    3: [
        ("fsdp", "fsdp"),
        ("tensor", "fsdp"),
        ("columns", "fsdp"),
        ("ddp", "fsdp"),
        ("hsdp", "ddp"),
    ],
    4: [("fsdp", "fsdp"), ("fsdp", "hsdp"), ("columns", "hsdp"), ("hsdp", "columns")],
}


@pytest.mark.parametrize("world", RESHARDED)
def test_restore_at_another_number_of_ranks(folder, saved, world):
    runs = {(was, now): (str(folder / was), now) for was, now in RESHARDED[world]}
    found = start(of_all, folder / f"world{world}", fsdp_runs.restore, runs, world=world)
    for (was, now), ranks in _by_name(found).items():
        for rank, restored in enumerate(ranks):
            expected = saved[was][rank % len(saved[was])][0]
            owner = saved[was][0][0] if "ddp" in (was, now) else expected
            expected = expected | {"buffers/seen": owner["buffers/seen"]}
            assert differences(restored, expected) == [], f"{was} -> {now}, rank {rank}"


def test_anyone_reads_it(folder, saved):
    expected = _tensors(saved["columns"][0][0])
    with asymcheck.open_checkpoint(str(folder / "columns"), step=STOP) as checkpoint:
        for name, tensor in expected.items():
            assert checkpoint[name].shape == tuple(tensor.shape)
            assert np.asarray(checkpoint[name][...]).tobytes() == raw(tensor), name
    loaded = asymcheck_torch.load(str(folder / "columns"), STOP)
    for name, tensor in expected.items():
        kind, _, parameter = name.partition("/")
        assert raw(loaded[kind][parameter]) == raw(tensor), name


def test_jax_reads_it(folder, saved):
    pytest.importorskip("jax", reason="JAX is missing: pip install 'asymcheck[jax]'")
    import asymcheck_jax

    loaded = asymcheck_jax.load(str(folder / "fsdp"), STOP)
    for name, tensor in _tensors(saved["fsdp"][0][0]).items():
        kind, _, parameter = name.partition("/")
        assert np.asarray(loaded[kind][parameter]).tobytes() == raw(tensor), name


def _tensors(state):
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not name.startswith("buffers/")
    }


@pytest.mark.parametrize("kind", ["fsdp", "columns", "hsdp"])
def test_each_byte_is_stored_once_over_the_ranks(folder, saved, kind):
    index = load_index(open_store(str(folder / kind)), STOP)
    stored, by_writer = Counter(), Counter()
    for block in index.blocks():
        nbytes = block.block.count * block.box.leaf.itemsize
        stored[block.box.leaf.path] += nbytes
        by_writer[block.group[0]] += nbytes
    assert stored == {p: leaf.spec.nbytes for p, leaf in index.leaves.items() if leaf.spec.nbytes}
    assert len(by_writer) == len(saved[kind])
    assert min(by_writer.values()) > 0.5 * sum(by_writer.values()) / len(by_writer)
    assert {"params/frozen.weight", "params/few", "exp_avg/few"} <= set(stored)
    assert ("params/embed.weight" in stored) != ("params/head.weight" in stored)
    assert not {"exp_avg/head.weight", "exp_avg/frozen.weight"} & set(stored)


def test_tied_weights_are_read_once(folder, saved, monkeypatch):
    """Blocks are decoded in place and at the same time: twice into one place would be a race."""
    filled = Counter()
    read_into = Checkpoint.read_into

    def counted(checkpoint, destinations):
        wanted = list(destinations)
        filled.update(each.out.ctypes.data for each in wanted if each.out.nbytes)
        read_into(checkpoint, wanted)

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    run = fsdp_runs.build("plain", seed=8)
    with asymcheck_torch.attach(*run, url=str(folder / "fsdp"), every_steps=1000) as ckpt:
        assert ckpt.restore() == STOP
    assert run[0].embed.weight.data_ptr() in filled
    assert set(filled.values()) == {1}


MISFITS = {
    "width": ({"kind": "fsdp", "width": 20}, ["'layers.0.weight' has shape [20, 20], in it [24"]),
    "groups": ({"kind": "fsdp", "groups": False}, ["1 parameter groups, in it 2"]),
}


def test_what_does_not_fit_changes_nothing(folder, saved):
    runs = {name: (str(folder / "fsdp"), options) for name, (options, _) in MISFITS.items()}
    worker = fsdp_runs.restore_what_does_not_fit
    for name, ranks in _by_name(start(of_all, folder / "misfits", worker, runs)).items():
        for kind, message, changed in ranks:
            assert kind == "StateMismatchError"
            assert all(part in message for part in MISFITS[name][1]), message
            assert changed == []


def test_an_evaluation_between_update_and_forward_pass(folder):
    url = str(folder / "evaluated")
    saved = start(fsdp_runs.save_and_go_on, folder / "evaluated-save", url, "low", True)
    found = start(fsdp_runs.resume, folder / "evaluated-resume", url, "low", 0, True)
    assert differences(found, saved) == []


def test_restore_right_after_an_evaluation(folder, saved):
    url = str(folder / "fsdp")
    found = start(fsdp_runs.resume_after_evaluation, folder / "after-evaluation", url, "fsdp")
    for (_, at_end, losses), (end, losses_again) in zip(saved["fsdp"], found, strict=True):
        assert differences(end, at_end) == []
        assert losses_again == losses


STALE = [("fsdp", True), ("fsdp", False), ("low", False), ("whole", False), ("ddp", True)]


def test_gradients_from_before_restoring_do_not_count(folder, saved):
    runs = {(kind, reduced): (str(folder / kind), kind, reduced) for kind, reduced in STALE}
    found = start(of_all, folder / "stale", fsdp_runs.resume_amid_accumulation, runs)
    for (kind, reduced), ranks in _by_name(found).items():
        for (_, at_end, losses), (end, losses_again) in zip(saved[kind], ranks, strict=True):
            expected = _with_buffers_of_rank_0(kind, at_end, saved) if kind == "ddp" else at_end
            end = end | {"buffers/seen": expected["buffers/seen"]}
            assert differences(end, expected) == [], (kind, reduced)
            assert losses_again == losses


def test_gradients_are_captured_as_they_are_reduced(folder):
    runs = {kind: (str(folder / f"gradients-{kind}"), kind) for kind in KINDS}
    found = start(of_all, folder / "gradients", fsdp_runs.save_gradients, runs)
    for kind, ranks in _by_name(found).items():
        with asymcheck.open_checkpoint(runs[kind][0], STOP) as checkpoint:
            assert len(ranks[0]) > 5
            for name, expected in ranks[0].items():
                gradient = checkpoint[f"gradients/{name}"][...]
                assert np.array_equal(gradient, expected.numpy()), (kind, name)


def test_gradients_that_are_yet_to_be_summed_are_captured_as_sums(folder):
    url = str(folder / "partial")
    found = start(fsdp_runs.save_partial_gradients, folder / "partial-gradients", url)
    for expected, placements in found:
        assert "Partial" in placements
        with asymcheck.open_checkpoint(url, 1) as checkpoint:
            assert np.array_equal(checkpoint["gradients/0.weight"][...], expected.numpy())


def test_modules_that_another_thread_is_importing_have_no_types_yet(monkeypatch):
    for name in ("torch.distributed.tensor", "torch.distributed.fsdp"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for is_of_type in (is_dtensor, is_fsdp1, is_fsdp2):
        assert not is_of_type(torch.ones(1))


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_all_ranks_fall_back_when_one_finds_damage(folder, saved, kind):
    """Bytes of rank 1's packs of the last step are not what they were."""
    run = folder / f"{kind}-damaged"
    shutil.copytree(folder / kind, run)
    packs = list(run.glob(f"data/{STOP:016}-*/w00001-*.pack"))
    assert packs
    for pack in packs:
        pack.write_bytes(bytes(byte ^ 0x55 for byte in pack.read_bytes()))
    runs = {step: (str(run), kind, step) for step in (None, STOP)}
    found = start(of_all, folder / f"{kind}-fallen", fsdp_runs.restore_or_say, runs)
    expected = asymcheck_torch.load(str(folder / kind), STOP - 1)["params"]
    for ranks in found:
        step, state = ranks[None]
        assert step == STOP - 1
        for path in (path for path in state if path.startswith("params/")):
            assert raw(state[path]) == raw(expected[path.removeprefix("params/")])
        assert ranks[STOP][0] == "CorruptionError"


def test_parameters_that_only_the_optimizer_has_are_refused_on_all_ranks(folder):
    url = str(folder / "too-late")
    for said in start(fsdp_runs.train_what_was_sharded_too_late, folder / "late", url):
        assert "UnsupportedStateError: optimizer 0 trains a parameter that is none of the" in said
        assert "Shard the module before its optimizer is made" in said
    with pytest.raises(CheckpointNotFoundError):
        asymcheck.open_checkpoint(url)


REFUSED = {
    "fsdp1": ["UnsupportedStateError", "FullyShardedDataParallel (FSDP1)", "fully_shard"],
    "meshes": ["UnsupportedStateError", "sharded over several meshes"],
    "strides": ["UnsupportedStateError", "_StridedShard", "leaf params/layers.0.weight"],
    "twice": ["SaveFailedError", "elements of a leaf are missing or stored twice"],
}


def test_what_cannot_be_stored_once_is_refused_on_all_ranks(folder):
    url = str(folder / "never")
    for said in start(fsdp_runs.what_is_refused, folder / "refused", url, world=4):
        for name, parts in REFUSED.items():
            assert all(part in said[name] for part in parts), said[name]
    with pytest.raises(CheckpointNotFoundError):
        asymcheck.open_checkpoint(url)


# -- parts of DTensors ---------------------------------------------------------------------


@contextmanager
def world_of(size, rank):
    """A process group of which only this rank exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def distributed(shape, mesh, placements):
    """What this rank has of a tensor; and the box that torch says it is."""
    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    whole = torch.empty(shape)
    tensor = DTensor.from_local(
        torch.zeros(local),
        mesh,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return tensor, tuple(local), tuple(offset)


@st.composite
def layouts(draw):
    """A tensor's shape, a mesh's shape, and placements."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    placement = st.one_of(
        st.just(Replicate()), st.integers(0, len(shape) - 1).map(lambda dim: Shard(dim))
    )
    placements = [draw(placement) for _ in mesh]
    return shape, mesh, placements


@settings(max_examples=60)
@given(layouts())
def test_the_parts_of_all_ranks_are_the_tensor_once(layout):
    shape, mesh_shape, placements = layout
    times = np.zeros(shape, int)
    for rank in range(math.prod(mesh_shape)):
        with world_of(math.prod(mesh_shape), rank):
            mesh = init_device_mesh("cpu", mesh_shape)
            tensor, local, offset = distributed(shape, mesh, placements)
            part = part_of(tensor, "w")
        assert part.shape == shape
        assert part.shard.shape == local
        if math.prod(local):
            assert part.shard.offset == offset
        owned = part.owned(small=11)
        for box in boxes_of_range(part.shard, *owned) if owned else ():
            times[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] += 1
    assert (times == 1).all()


@given(st.integers(0, 200_000), st.integers(1, 9), st.integers(0, 50))
def test_holders_share_what_they_hold(count, replicas, small):
    shares = [share(count, replica, replicas, small) for replica in range(replicas)]
    taken = sorted(each for each in shares if each is not None)
    assert sum(n for _, n in taken) == count
    end = 0
    for first, n in taken:
        assert first == end
        end += n
    if count < 1000:
        assert len(taken) == 1, "few elements stay together"


@pytest.mark.parametrize(
    "placement", [Partial(), Partial("avg"), _StridedShard(0, split_factor=2)], ids=str
)
def test_other_placements_are_refused_by_path(placement):
    with world_of(2, 0):
        mesh = init_device_mesh("cpu", (2,))
        tensor = DTensor.from_local(torch.zeros(4, 3), mesh, [placement], run_check=False)
        with pytest.raises(UnsupportedStateError, match=r"placed .* cannot be stored") as caught:
            part_of(tensor, "exp_avg/w")
    assert "leaf exp_avg/w" in str(caught.value)


def test_uneven_parts_are_refused_by_path():
    with world_of(2, 0):
        mesh = init_device_mesh("cpu", (2,))
        tensor = DTensor.from_local(
            torch.zeros(1, 3), mesh, [Shard(0)], run_check=False, shape=(6, 3), stride=(3, 1)
        )
        with pytest.raises(UnsupportedStateError, match="not cut into even parts") as caught:
            part_of(tensor, "params/w")
    assert "leaf params/w" in str(caught.value)


def test_a_mesh_without_this_rank_is_refused_by_path():
    with world_of(4, 3):
        mesh = torch.distributed.DeviceMesh("cpu", [0, 1])
        tensor = DTensor.from_local(torch.zeros(2), mesh, [Shard(0)], run_check=False)
        with pytest.raises(UnsupportedStateError, match="on a mesh with this rank"):
            part_of(tensor, "params/w")


# -- the ranks that hold a module together -------------------------------------------------


def module_on(*meshes):
    module = nn.Module()
    for number, mesh in enumerate(meshes):
        placements = [Shard(0)] * mesh.ndim
        tensor = DTensor.from_local(torch.zeros(2), mesh, placements, run_check=False)
        module.register_parameter(f"p{number}", nn.Parameter(tensor))
    return module


def test_the_world_of_a_module():
    with world_of(4, 2):
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        line = init_device_mesh("cpu", (4,))
        assert World.of(module_on(square, line), None).size == 4
        assert World.of(nn.Linear(2, 2), None).group is None
        half = World.of(module_on(square["b"]), None)
        assert (half.size, half.rank) == (2, 0)
        for meshes in ([square["a"], square["b"]], [square["a"], line]):
            with pytest.raises(UnsupportedStateError, match="several meshes, or over a part"):
                World.of(module_on(*meshes), None)
