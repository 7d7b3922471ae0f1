"""Other libraries' checkpoints: what their own loaders read of an export, and what comes in."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from sample_run import state_at, write_run

import asymcheck
from asymcheck.errors import SourceError, StoreError, UnsupportedStateError
from asymcheck.inspection import plugins
from asymcheck.inspection.export import export
from asymcheck.state import DTYPES

torch = pytest.importorskip("torch", reason="torch is not installed")
dcp = pytest.importorskip("torch.distributed.checkpoint", reason="torch has no DCP")
jax = pytest.importorskip("jax", reason="jax is not installed")
ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")

import asymcheck_jax  # noqa: E402
import asymcheck_torch  # noqa: E402
from asymcheck_torch.exchange import from_dcp, from_torch_save  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

Call = Callable[..., tuple[int, str, str]]

MODULE = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.LayerNorm(6)).bfloat16()
KEY = jax.random.key(7)
JAX_STATE = {
    "params": {"w": jax.numpy.arange(12.0).reshape(3, 4), "b": jax.numpy.ones(4, "bfloat16")},
    "fp8": jax.numpy.arange(8).astype("float8_e4m3fn"),
    "opt": (jax.numpy.zeros(3), {"count": jax.numpy.int32(4)}),
    "key": KEY,
    "epoch": 3,
}


@pytest.fixture(scope="module")
def torch_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `attach` saved after one step of AdamW."""
    url = tmp_path_factory.mktemp("torch") / "run"
    optimizer = torch.optim.AdamW(MODULE.parameters(), lr=1e-3)
    with asymcheck_torch.attach(MODULE, optimizer, url=str(url)) as checkpointer:
        MODULE(torch.randn(2, 8).bfloat16()).float().square().mean().backward()
        optimizer.step()
        checkpointer.wait()
    return url


@pytest.fixture(scope="module")
def jax_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The item that AsymCheckHandler saved through a CheckpointManager."""
    root = tmp_path_factory.mktemp("jax").absolute()
    with ocp.CheckpointManager(root, item_handlers=asymcheck_jax.AsymCheckHandler()) as manager:
        manager.save(5, args=asymcheck_jax.AsymCheckSave(JAX_STATE))
        manager.wait_until_finished()
    return root / "5" / "default"


def bits(value: Any) -> tuple[str, tuple[int, ...], bytes]:
    """Dtype name, shape and bytes of a tensor or array."""
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return name, tuple(value.shape), raw
    array = np.asarray(value)
    return array.dtype.name, array.shape, array.tobytes()


def leaves_of(state: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Leaves by keys; lists and tuples alike."""
    if isinstance(state, dict):
        items = [(str(key), child) for key, child in state.items()]
    elif isinstance(state, list | tuple):
        items = list(enumerate(state))
    else:
        return {path: state}
    return {k: v for key, child in items for k, v in leaves_of(child, (*path, key)).items()}


def assert_same(found: Any, expected: Any) -> None:
    """The same leaves, arrays bit for bit."""
    found, expected = leaves_of(found), leaves_of(expected)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        if isinstance(value, np.ndarray | np.generic | torch.Tensor | jax.Array):
            assert bits(found[path]) == bits(value), path
        else:
            assert type(found[path]) is type(value), path
            assert found[path] == value, path


def stored(url: Path, step: int) -> Any:
    with asymcheck.open_checkpoint(url, step) as checkpoint:
        return checkpoint.state()


def exported(call: Call, run: Path, format: str, output: Path) -> dict[str, Any]:
    code, out, err = call("export", run, f"--to={format}", f"--output={output}", "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def imported(call: Call, source: Path, format: str, url: Path, step: int = 0) -> Any:
    code, out, err = call("import", source, url, f"--from={format}", f"--step={step}", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["step"], report["format"], report["source"]) == (step, format, str(source))
    with asymcheck.open_checkpoint(url, step) as checkpoint:
        assert report["leaves"] == len(checkpoint)
        checkpoint.verify()
    return stored(url, step)


def dcp_load(path: Path, template: Any) -> Any:
    """What DCP's own loader puts into a state of that structure."""
    blank = {key: dcp_blank(value) for key, value in template.items()}
    dcp.load(blank, checkpoint_id=path)
    return blank


def dcp_blank(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: dcp_blank(item) for key, item in value.items()}
    if isinstance(value, list):
        return [dcp_blank(item) for item in value]
    return None


# -- export ------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["torch_run", "jax_run"])
def test_orbax_restores_an_export(
    call: Call, run: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = request.getfixturevalue(run)
    report = exported(call, url, "orbax", tmp_path / "out")
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "out")
    with asymcheck.open_checkpoint(url) as checkpoint:
        expected = checkpoint.state()
        assert report["leaves"] == len(checkpoint)
    if run == "jax_run":
        key = found.pop("key")
        assert key.dtype == KEY.dtype
        assert bits(jax.random.key_data(key)) == bits(jax.random.key_data(KEY))
        del expected["key"]
    assert_same(found, expected)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_orbax_restores_an_export_into_a_sharded_target(
    call: Call, jax_run: Path, tmp_path: Path
) -> None:
    exported(call, jax_run, "orbax", tmp_path / "out")
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "out", JAX_STATE)
    assert isinstance(found["opt"], tuple)
    assert found["params"]["b"].sharding == JAX_STATE["params"]["b"].sharding
    assert_same(found["params"], JAX_STATE["params"])


def test_dcp_loads_an_exported_training_run(call: Call, torch_run: Path, tmp_path: Path) -> None:
    exported(call, torch_run, "torch-dcp", tmp_path / "out")
    parameters = {"params": dict(MODULE.state_dict())}
    found = dcp_load(tmp_path / "out", parameters)
    assert_same(found, parameters)
    assert found["params"]["0.weight"].dtype == torch.bfloat16
    whole = asymcheck_torch.load(str(torch_run))
    moments = {key: whole[key] for key in ("exp_avg", "exp_avg_sq")}
    assert_same(dcp_load(tmp_path / "out", moments), moments)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_dcp_loads_an_exported_jax_run(call: Call, jax_run: Path, tmp_path: Path) -> None:
    exported(call, jax_run, "torch-dcp", tmp_path / "out")
    whole = asymcheck_torch.load(str(jax_run))
    part = {key: whole[key] for key in ("params", "fp8", "epoch")}
    found = dcp_load(tmp_path / "out", part)
    assert_same(found, part)
    assert found["fp8"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("run", ["torch_run", "jax_run"])
def test_safetensors_loads_an_export(
    call: Call, run: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    url = request.getfixturevalue(run)
    exported(call, url, "safetensors", tmp_path / "out")
    found = library.load_file(tmp_path / "out")
    with asymcheck.open_checkpoint(url) as checkpoint:
        expected = {path: leaf[...] for path, leaf in checkpoint.items()}
    assert_same(found, expected)


@pytest.mark.parametrize("format", ["orbax", "torch-dcp"])
def test_an_output_that_exists_stays(
    call: Call, jax_run: Path, tmp_path: Path, format: str
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("mine")
    code, out, err = call("export", jax_run, f"--to={format}", f"--output={target}")
    assert (code, out) == (3, "")
    assert "exists already" in err
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "file"]


@pytest.mark.parametrize("format", ["orbax", "torch-dcp"])
def test_a_failed_export_leaves_nothing(tmp_path: Path, format: str) -> None:
    write_run(tmp_path / "run", (10,))
    pack = next((tmp_path / "run").glob("data/*/*.pack"))
    (tmp_path / "out").mkdir()
    with asymcheck.open_checkpoint(tmp_path / "run", 10) as checkpoint:
        pack.write_bytes(bytes(pack.stat().st_size))
        with pytest.raises((asymcheck.errors.CorruptionError, UnsupportedStateError)):
            export(checkpoint, format, tmp_path / "out" / "x", progress=False)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("format", "state", "message"),
    [
        ("orbax", {"empty": np.zeros((0, 3))}, "leaf empty"),
        ("orbax", {"a": np.zeros(3, ml_dtypes.float8_e4m3)}, "float8_e4m3"),
        ("orbax", {"a": np.ones(2), "n": 2**70}, str(2**70)),
        ("torch-dcp", {"a": np.zeros(3, ml_dtypes.float8_e4m3)}, "leaf a"),
        ("torch-dcp", [np.ones(2)], "dictionaries"),
        ("torch-dcp", {"a.b": np.ones(2), "a": {"b": np.ones(2)}}, "a.b"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    call: Call, tmp_path: Path, format: str, state: Any, message: str
) -> None:
    with asymcheck.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, state)
    target = tmp_path / "out"
    code, out, err = call("export", tmp_path / "run", f"--to={format}", f"--output={target}")
    assert (code, out) == (3, "")
    assert message in err
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# -- import ------------------------------------------------------------------------------------


def array_state() -> dict[str, Any]:
    """Every dtype that Orbax takes, and every kind of value."""
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 2 if name == "bool" else 256, 6 * dtype.itemsize, np.uint8)
        .view(dtype)
        .reshape(2, 3)
        for name, dtype in DTYPES.items()
        if name != "float8_e4m3"
    }
    return {
        "arrays": arrays,
        "list": [np.ones(2), {"x": np.float64(2).reshape(())}],
        "count": 3,
        "rate": 0.5,
        "flag": True,
        "nothing": None,
    }


@pytest.mark.parametrize("layout", ["plain", "step"])
def test_import_from_orbax(call: Call, tmp_path: Path, layout: str) -> None:
    state = array_state()
    if layout == "plain":
        source = tmp_path / "source"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(source, state)
    else:
        source = tmp_path / "manager" / "4"
        with ocp.CheckpointManager(tmp_path / "manager") as manager:
            manager.save(4, args=ocp.args.StandardSave(state))
    assert_same(imported(call, source, "orbax", tmp_path / "run", step=4), state)


def test_import_from_orbax_narrows_nothing_and_keeps_keys(call: Call, tmp_path: Path) -> None:
    """Arrays of a JAX with 64 bits, sharded over devices that this process does not have."""
    code = (
        "import jax, numpy as np, orbax.checkpoint as ocp\n"
        "mesh = jax.make_mesh((4,), ('d',))\n"
        "over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('d'))\n"
        "with ocp.StandardCheckpointer() as checkpointer:\n"
        "    checkpointer.save(%r, {\n"
        "        'f': jax.device_put(np.arange(8) / 3, over), 'i': jax.numpy.int64(2**40),\n"
        "        'u': jax.device_put(np.arange(8, dtype=np.uint32), over),\n"
        "        'key': jax.random.key(7, impl='rbg')})\n"
    )
    subprocess.run(
        [sys.executable, "-c", code % str(tmp_path / "source")],
        env={**os.environ, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
        | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        check=True,
        timeout=120,
    )
    found = imported(call, tmp_path / "source", "orbax", tmp_path / "run")
    assert bits(found["f"]) == bits(np.arange(8) / 3)
    assert bits(found["i"]) == bits(np.int64(2**40))
    assert bits(found["u"]) == bits(np.arange(8, dtype=np.uint32))
    key = asymcheck_jax.load(tmp_path / "run")["key"]
    assert key.dtype == jax.random.key(7, impl="rbg").dtype
    assert (jax.random.key_data(key) == jax.random.key_data(jax.random.key(7, impl="rbg"))).all()


def tensor_state() -> dict[str, Any]:
    """Tensors of every dtype that torch and the format share, tied and strided ones."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        if hasattr(torch, name):
            high = 2 if name == "bool" else 256
            raw = torch.randint(0, high, (6 * dtype.itemsize,), generator=generator)
            tensors[name] = raw.to(torch.uint8).view(getattr(torch, name)).reshape(2, 3)
    weight = torch.randn(4, 5, generator=generator)
    return {
        "tensors": tensors,
        "parameter": torch.nn.Parameter(weight),
        "transposed": weight.T,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}, {"lr": torch.ones(1)}],
        "ordered": OrderedDict(b=1, a=torch.ones(2)),
        "note": "ü",
        "nothing": None,
        "flag": True,
    }


def test_import_from_torch_save(call: Call, tmp_path: Path) -> None:
    state = {**tensor_state(), 3: {"state": b"abc"}, "complex": 2j}
    state["tied"] = state["parameter"]
    torch.save(state, tmp_path / "source.pt")
    found = imported(call, tmp_path / "source.pt", "torch", tmp_path / "run", step=7)
    assert_same(found, state)
    assert found["tied"] is found["parameter"]
    assert list(found["ordered"]) == ["b", "a"]
    assert found["groups"][0]["betas"] == (0.9, 0.99)


def test_import_from_dcp(call: Call, tmp_path: Path) -> None:
    state = tensor_state()
    dcp.save(state, checkpoint_id=tmp_path / "source")
    assert_same(imported(call, tmp_path / "source", "torch-dcp", tmp_path / "run"), state)


def test_import_from_dcp_of_several_ranks(call: Call, tmp_path: Path) -> None:
    code = (
        "import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp\n"
        "from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh\n"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv[1], world_size=2,\n"
        "                        rank=int(sys.argv[3]))\n"
        "whole = torch.arange(21.0).reshape(7, 3).bfloat16()\n"
        "mesh = init_device_mesh('cpu', (2,))\n"
        "dcp.save({'rows': distribute_tensor(whole, mesh, [Shard(0)]), 'copy': whole,\n"
        "          'columns': distribute_tensor(whole, mesh, [Shard(1)])},\n"
        "         checkpoint_id=sys.argv[2])\n"
        "dist.barrier()\n"
        "os._exit(0)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "meet"), str(tmp_path / "source")]
    ranks = [subprocess.Popen([*arguments, str(rank)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    found = imported(call, tmp_path / "source", "torch-dcp", tmp_path / "run")
    whole = torch.arange(21.0).reshape(7, 3).bfloat16()
    assert_same(found, {"rows": whole, "copy": whole, "columns": whole})


@pytest.mark.parametrize("format", ["orbax", "torch-dcp"])
def test_there_and_back(call: Call, jax_run: Path, tmp_path: Path, format: str) -> None:
    exported(call, jax_run, format, tmp_path / "out")
    assert_same(imported(call, tmp_path / "out", format, tmp_path / "run"), stored(jax_run, 5))


# -- what is refused ---------------------------------------------------------------------------


class Evil:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_evil_metadata_are_refused_and_run_nothing(call: Call, tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(3)}, checkpoint_id=tmp_path / "source")
    metadata = dcp.FileSystemReader(tmp_path / "source").read_metadata()
    metadata.planner_data = Evil(tmp_path / "made")
    (tmp_path / "source" / ".metadata").write_bytes(pickle.dumps(metadata))
    code, out, err = call("import", tmp_path / "source", tmp_path / "run", "--from=torch-dcp")
    assert (code, out) == (1, "")
    assert "pathlib.Path.touch" in err or "getattr" in err
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "run").exists()
    dcp.FileSystemReader(tmp_path / "source").read_metadata()
    assert (tmp_path / "made").exists(), "the pickle was harmless"


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "os system",
        "torch load",
        "torch.serialization load",
        "copyreg _reconstructor",
    ],
)
def test_metadata_refer_to_nothing_else(tmp_path: Path, name: str) -> None:
    module, attribute = name.split()
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(SourceError, match=f"{module}.{attribute}"):
        from_dcp(tmp_path)


@pytest.mark.parametrize("name", ["__class__", "__init__"])
def test_metadata_reach_no_attributes(tmp_path: Path, name: str) -> None:
    metadata = f"cbuiltins\ngetattr\n(cbuiltins\ngetattr\nV{name}\ntR.".encode()
    (tmp_path / ".metadata").write_bytes(metadata)
    with pytest.raises(SourceError, match="getattr"):
        from_dcp(tmp_path)


def test_an_evil_value_in_dcp_is_refused(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(3), "b": Evil(tmp_path / "made")}, checkpoint_id=tmp_path / "s")
    with pytest.raises(SourceError, match="b in __0_0"):
        from_dcp(tmp_path / "s")
    assert not (tmp_path / "made").exists()


def test_an_evil_torch_save_file_is_refused(call: Call, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3), "b": Evil(tmp_path / "made")}, tmp_path / "source.pt")
    code, out, err = call("import", tmp_path / "source.pt", tmp_path / "run", "--from=torch")
    assert (code, out) == (1, "")
    assert "weights only" in err
    assert "pathlib.Path.touch" in err or "getattr" in err
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "run").exists()


def rewritten(source: Path, change: Callable[[Any], None]) -> None:
    """Change the metadata of a DCP checkpoint."""
    metadata = dcp.FileSystemReader(source).read_metadata()
    change(metadata)
    (source / ".metadata").write_bytes(pickle.dumps(metadata))


def _drop_box(metadata: Any) -> None:
    metadata.state_dict_metadata["a"].chunks.clear()


def _repeat_box(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata["a"].chunks
    chunks.append(type(chunks[0])(torch.Size([0]), torch.Size([2])))


def _box_outside(metadata: Any) -> None:
    metadata.state_dict_metadata["a"].chunks[0].sizes = torch.Size([9])


def _larger(metadata: Any) -> None:
    stored = metadata.state_dict_metadata["a"]
    stored.size = stored.chunks[0].sizes = torch.Size([2**45])


def _file_outside(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../secret"


def _absolute_file(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "/etc/hostname"


def _transformed(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.transform_descriptors = ("zstd",)


def _gap(metadata: Any) -> None:
    metadata.planner_data = {"a": ("x", 2**40)}


def _within(metadata: Any) -> None:
    metadata.planner_data = {"a": ("b", "c")}


def _unhashable(metadata: Any) -> None:
    metadata.planner_data = {"a": ("x", [])}


def _no_storage(metadata: Any) -> None:
    metadata.storage_data = None


@pytest.mark.parametrize(
    "change",
    [
        *(_drop_box, _repeat_box, _box_outside, _larger, _file_outside, _absolute_file),
        *(_transformed, _gap, _within, _unhashable, _no_storage),
    ],
)
def test_hostile_metadata(tmp_path: Path, change: Callable[[Any], None]) -> None:
    source = tmp_path / "source"
    dcp.save({"b": 1, "a": torch.ones(3)}, checkpoint_id=source)
    torch.save(torch.ones(3), tmp_path / "secret")
    rewritten(source, change)
    with pytest.raises(SourceError):
        from_dcp(source)


def test_damaged_sources(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(3)}, checkpoint_id=tmp_path / "dcp")
    metadata = tmp_path / "dcp" / ".metadata"
    whole = metadata.read_bytes()
    for length in range(0, len(whole), 7):
        metadata.write_bytes(whole[:length])
        with pytest.raises(SourceError):
            from_dcp(tmp_path / "dcp")
    generator = np.random.default_rng(0)
    for _ in range(300):  # whatever is changed: it is noticed, or changes nothing that is used
        changed = bytearray(whole)
        changed[generator.integers(len(whole))] = generator.integers(256)
        metadata.write_bytes(changed)
        with suppress(SourceError):
            assert (
                bits(next(iter(from_dcp(tmp_path / "dcp").values())))[2]
                == bits(np.ones(3, "f4"))[2]
            )
    metadata.write_bytes(whole)
    next((tmp_path / "dcp").glob("*.distcp")).write_bytes(b"")
    with pytest.raises(SourceError):
        from_dcp(tmp_path / "dcp")
    (tmp_path / "x.pt").write_bytes(b"nonsense")
    for path in (tmp_path / "x.pt", tmp_path):
        with pytest.raises(SourceError):
            from_torch_save(path)


def test_damaged_orbax(call: Call, tmp_path: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "source", {"a": np.arange(5000.0)})
    for file in (tmp_path / "source" / "d").iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    code, _, err = call("import", tmp_path / "source", tmp_path / "run", "--from=orbax")
    assert code == 1
    assert "Orbax cannot read" in err
    assert not (tmp_path / "run").exists()


def test_tensors_that_cannot_be_stored_are_named(call: Call, tmp_path: Path) -> None:
    torch.save({"x": [torch.eye(3).to_sparse()]}, tmp_path / "source.pt")
    code, _, err = call("import", tmp_path / "source.pt", tmp_path / "run", "--from=torch")
    assert code == 3
    assert "leaf x/0" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "SOURCE", "RUN"], "needs --from"),
        (["import", "SOURCE", "--from=torch"], "usage: asymcheck import SOURCE URL"),
        (["import", "SOURCE", "RUN", "--from=pickle"], "deepspeed|orbax|torch|torch-dcp"),
        (["import", "SOURCE", "RUN", "--from=torch", "--step=-1"], "step"),
        (["import", "SOURCE", "RUN", "--from=torch", "--step=10"], "has this step already"),
        (["import", "NOWHERE", "RUN", "--from=torch"], "there is nothing at"),
        (["export", "RUN", "--to=pickle", "--output=x"], "npz|deepspeed-universal|orbax|torch-dcp"),
    ],
)
def test_usage(call: Call, tmp_path: Path, arguments: list[str], message: str) -> None:
    write_run(tmp_path / "run", (10,))
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    places = {"SOURCE": tmp_path / "x.pt", "RUN": tmp_path / "run", "NOWHERE": tmp_path / "no"}
    code, out, err = call(*(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("kind", "name"), [("exporters", "orbax"), ("importers", "torch-dcp")])
def test_missing_library(monkeypatch: pytest.MonkeyPatch, kind: plugins.Kind, name: str) -> None:
    package = "asymcheck_jax" if name == "orbax" else "asymcheck_torch"
    monkeypatch.setitem(sys.modules, f"{package}.exchange", None)
    with pytest.raises(asymcheck.AsymCheckError, match=r"asymcheck\[(jax|torch)\]"):
        plugins.load(kind, name)


def test_the_libraries_log_nothing(tmp_path: Path) -> None:
    """As a process, where absl would show what Orbax and JAX say of themselves."""
    write_run(tmp_path / "run", (10,))
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    with asymcheck.Checkpointer(tmp_path / "small") as checkpointer:
        checkpointer.save(1, {"a": np.ones(2)})
    for arguments in (
        ["export", "small", "--to=orbax", "--output=orbax"],
        ["import", "orbax", "back", "--from=orbax"],
        ["export", "run", "--to=torch-dcp", "--output=dcp"],
        ["import", "dcp", "back", "--from=torch-dcp", "--step=1"],
        ["import", "x.pt", "back", "--from=torch", "--step=2"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "asymcheck", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, ""), arguments


def test_unknown_plugins() -> None:
    assert plugins.names("exporters") == ["deepspeed-universal", "orbax", "torch-dcp"]
    with pytest.raises(ValueError, match="deepspeed, orbax, torch, torch-dcp"):
        plugins.load("importers", "pickle")


@pytest.mark.parametrize("format", ["orbax", "torch-dcp"])
def test_a_full_disk(tmp_path: Path, format: str) -> None:
    resource = pytest.importorskip("resource", reason="no limits of the process here")
    with asymcheck.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"a": np.random.default_rng(0).standard_normal(100_000)})
    (tmp_path / "out").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with asymcheck.open_checkpoint(tmp_path / "run") as checkpoint:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(StoreError, match="cannot write"):
                export(checkpoint, format, tmp_path / "out" / "x", progress=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "out").iterdir()) == []


def test_sample_state_goes_through_dcp(call: Call, tmp_path: Path) -> None:
    """NumPy scalars, bytes, complex numbers, ties."""
    write_run(tmp_path / "run", (10,))
    exported(call, tmp_path / "run", "torch-dcp", tmp_path / "out")
    found = imported(call, tmp_path / "out", "torch-dcp", tmp_path / "back")
    assert_same(found, state_at(10))
