"""Exported files: what other programs find in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from sample_run import state_at, write_run

import asymcheck
from asymcheck.errors import CorruptionError, StoreError, UnsupportedStateError
from asymcheck.inspection.export import FORMATS, NOTES, export
from asymcheck.state import DTYPES
from asymcheck.tree import unflatten

safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    write_run(root)
    return root


@pytest.fixture
def checkpoint(run: Path) -> Iterator[asymcheck.Checkpoint]:
    with asymcheck.open_checkpoint(run, 30) as checkpoint:
        yield checkpoint


@pytest.fixture
def all_dtypes(tmp_path: Path) -> Iterator[asymcheck.Checkpoint]:
    """A leaf of every dtype, with every shape."""
    rng = np.random.default_rng(0)
    state = {
        f"{name}{len(shape)}": _random(rng, dtype, shape)
        for name, dtype in DTYPES.items()
        for shape in ((), (5,), (3, 0), (2, 3, 4))
    }
    with asymcheck.Checkpointer(tmp_path / "dtypes") as checkpointer:
        checkpointer.save(1, state)
    with asymcheck.open_checkpoint(tmp_path / "dtypes", 1) as checkpoint:
        yield checkpoint


def _random(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    """Random bits, so NaN with every payload; bool only has two values."""
    count = int(np.prod(shape))
    limit = 2 if dtype.kind == "b" else 256
    return rng.integers(0, limit, count * dtype.itemsize, np.uint8).view(dtype).reshape(shape)


def bits(array: Any) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def npz_of(checkpoint: asymcheck.Checkpoint, path: Path) -> tuple[dict[str, Any], Any]:
    """What plain NumPy reads: arrays and notes."""
    export(checkpoint, "npz", path, progress=False)
    with np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive)
    return arrays, json.loads(bytes(arrays.pop(NOTES)))


def test_npz_has_every_dtype_bit_for_bit(all_dtypes: asymcheck.Checkpoint, tmp_path: Path) -> None:
    arrays, notes = npz_of(all_dtypes, tmp_path / "x.npz")
    assert arrays.keys() == all_dtypes.keys()
    for path, lazy in all_dtypes.items():
        array = arrays[path]
        if path in notes["dtypes"]:
            assert array.dtype == f"uint{8 * lazy.dtype.itemsize}"
            array = array.view(getattr(ml_dtypes, notes["dtypes"][path]))
        assert (array.dtype, array.shape) == (lazy.dtype, lazy.shape)
        assert bits(array) == bits(lazy[...])
    assert set(notes["dtypes"].values()) == {n for n in DTYPES if n[:2] == "bf" or "float8" in n}


def test_safetensors_has_every_dtype_bit_for_bit(
    all_dtypes: asymcheck.Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    export(all_dtypes, "safetensors", path, progress=False)
    stored = dict(safetensors.deserialize(path.read_bytes()))
    with safetensors.safe_open(path, "np") as file:
        dtypes = json.loads(file.metadata()["asymcheck"])["dtypes"]
    assert stored.keys() == all_dtypes.keys()
    for leaf, lazy in all_dtypes.items():
        assert bytes(stored[leaf]["data"]) == bits(lazy[...])
        pair = [2] if lazy.dtype.kind == "c" else []
        assert stored[leaf]["shape"] == [*lazy.shape, *pair]
    assert stored["bfloat161"]["dtype"] == "BF16"
    assert stored["float8_e4m3fn1"]["dtype"] == "F8_E4M3"
    assert stored["float8_e5m21"]["dtype"] == "F8_E5M2"
    assert (stored["float8_e4m31"]["dtype"], dtypes["float8_e4m31"]) == ("U8", "float8_e4m3")
    assert (stored["complex1281"]["dtype"], dtypes["complex1281"]) == ("F64", "complex128")
    assert "bfloat161" not in dtypes


def test_safetensors_loads_in_torch(checkpoint: asymcheck.Checkpoint, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    path = tmp_path / "x.safetensors"
    export(checkpoint, "safetensors", path, progress=False)
    from safetensors.torch import load_file

    tensors = load_file(path)
    expected = state_at(30)
    bias = tensors["params/bias"]
    assert bias.dtype == torch.bfloat16
    assert bias.float().numpy().tolist() == expected["params"]["bias"].astype(float).tolist()
    assert tensors["optimizer/fp8"].dtype == torch.float8_e4m3fn
    assert tensors["optimizer/fp8"].float().tolist() == list(range(8))
    phase = torch.view_as_complex(tensors["optimizer/phase"])
    assert phase.item() == 30j


def test_notes_rebuild_the_state(checkpoint: asymcheck.Checkpoint, tmp_path: Path) -> None:
    arrays, notes = npz_of(checkpoint, tmp_path / "x.npz")
    assert "params/tied" not in arrays
    assert notes["aliases"] == {"params/tied": "params/weight"}
    assert (notes["step"], notes["metadata"]) == (30, {"epoch": 3})
    for path, dtype in notes["dtypes"].items():
        arrays[path] = arrays[path].view(getattr(ml_dtypes, dtype))
    state = unflatten(notes["structure"], arrays.__getitem__)
    expected = state_at(30)
    assert state["params"]["tied"] is state["params"]["weight"]
    assert bits(state["params"]["weight"]) == bits(expected["params"]["weight"])
    assert bits(state["params"]["bias"]) == bits(expected["params"]["bias"])
    assert state["optimizer"]["step"] == 30
    assert state["optimizer"]["rng"] == b"abc"
    assert state["nothing"] is None


def test_safetensors_notes_are_a_string(checkpoint: asymcheck.Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    export(checkpoint, "safetensors", path, progress=False)
    with safetensors.safe_open(path, "np") as file:
        notes = json.loads(file.metadata()["asymcheck"])
    assert notes == {
        "step": 30,
        "metadata": {"epoch": 3},
        "structure": checkpoint.structure,
        "aliases": {"params/tied": "params/weight"},
        "dtypes": {"optimizer/phase": "complex64"},
    }


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_step_gives_the_same_file(
    checkpoint: asymcheck.Checkpoint, tmp_path: Path, format: str
) -> None:
    for name in ("a", "b"):
        export(checkpoint, format, tmp_path / name, progress=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_appears_whole_or_not_at_all(run: Path, tmp_path: Path, format: str) -> None:
    target = tmp_path / "out" / "x"
    target.parent.mkdir()
    target.write_text("what was there")
    damaged = tmp_path / "run"
    write_run(damaged, (10,))
    pack = next(damaged.glob("data/*/*.pack"))
    with asymcheck.open_checkpoint(damaged, 10) as checkpoint:
        pack.write_bytes(bytes(pack.stat().st_size))
        with pytest.raises(CorruptionError):
            export(checkpoint, format, target, progress=False)
    assert target.read_text() == "what was there"
    assert list(target.parent.iterdir()) == [target]
    with asymcheck.open_checkpoint(run, 10) as checkpoint:
        exported = export(checkpoint, format, target, progress=False)
    assert exported.nbytes == target.stat().st_size
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk(checkpoint: asymcheck.Checkpoint, tmp_path: Path, format: str) -> None:
    resource = pytest.importorskip("resource", reason="no limits of the process here")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StoreError, match="cannot write"):
            export(checkpoint, format, tmp_path / "x", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_no_such_format(checkpoint: asymcheck.Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safetensors, npz"):
        export(checkpoint, "pickle", tmp_path / "x", progress=False)


def test_reserved_names_are_refused(tmp_path: Path) -> None:
    with asymcheck.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"__metadata__": np.ones(2)})
    with (
        asymcheck.open_checkpoint(tmp_path / "run", 1) as checkpoint,
        pytest.raises(UnsupportedStateError, match="reserves"),
    ):
        export(checkpoint, "safetensors", tmp_path / "x", progress=False)
