"""Checkpoints of one framework, opened in the other: same names, same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import asymcheck
import asymcheck_jax
import asymcheck_torch
from asymcheck.errors import CheckpointNotFoundError

PAIRS = {
    "float32": (torch.float32, jnp.float32),
    "float16": (torch.float16, jnp.float16),
    "bfloat16": (torch.bfloat16, jnp.bfloat16),
    "float8_e4m3fn": (torch.float8_e4m3fn, jnp.float8_e4m3fn),
    "float8_e5m2": (torch.float8_e5m2, jnp.float8_e5m2),
    "int32": (torch.int32, jnp.int32),
    "uint8": (torch.uint8, jnp.uint8),
    "bool": (torch.bool, jnp.bool_),
    "complex64": (torch.complex64, jnp.complex64),
}


def torch_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save_from_jax(state: Any, directory: Path) -> Path:
    with ocp.CheckpointManager(
        directory, item_handlers=asymcheck_jax.AsymCheckHandler()
    ) as manager:
        manager.save(5, args=asymcheck_jax.AsymCheckSave(state))
    return directory / "5" / "default"


@pytest.mark.parametrize("name", PAIRS)
def test_a_jax_checkpoint_in_torch_and_numpy(name: str, tmp_path: Path) -> None:
    values = jnp.arange(-3, 4).astype(PAIRS[name][1]).reshape(7, 1)
    item = save_from_jax({"params": {"w": values, "s": values[0, 0]}}, tmp_path)
    expected = np.asarray(values)
    found = asymcheck_torch.load(item)["params"]["w"]
    assert found.dtype == PAIRS[name][0] and tuple(found.shape) == (7, 1)
    assert torch_bytes(found) == expected.tobytes()
    with asymcheck.open_checkpoint(item) as checkpoint:
        assert checkpoint.step == 5
        assert list(checkpoint) == ["params/w", "params/s"]
        assert checkpoint["params/w"][...].tobytes() == expected.tobytes()
        assert checkpoint["params/w"].dtype == expected.dtype


@pytest.mark.parametrize("name", PAIRS)
def test_a_torch_checkpoint_in_jax(name: str, tmp_path: Path) -> None:
    module = torch.nn.Module()
    values = torch.arange(-3, 4).to(PAIRS[name][0]).reshape(7, 1)
    module.register_buffer("w", values)
    module.p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    with asymcheck_torch.attach(module, optimizer, url=tmp_path) as checkpointer:
        module.p.sum().backward()
        optimizer.step()
        checkpointer.wait()
    state = asymcheck_jax.load(tmp_path)
    found = state["buffers"]["w"]
    assert isinstance(found, jax.Array) and found.dtype == PAIRS[name][1]
    assert np.asarray(found).tobytes() == torch_bytes(values)
    assert set(state["params"]) == {"p"}


def test_wide_numbers_are_not_narrowed(tmp_path: Path) -> None:
    with asymcheck.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"big": np.array([2**40 + 1]), "fine": np.array([0.1])})
    found = asymcheck_jax.load(tmp_path)
    assert isinstance(found["big"], np.ndarray) and found["big"].tolist() == [2**40 + 1]
    assert found["fine"].dtype == np.float64 and found["fine"].tolist() == [0.1]


def test_loads_onto_devices(tmp_path: Path) -> None:
    w = np.arange(64, dtype=np.float32).reshape(8, 8)
    with asymcheck.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"w": w, "b": w[0], "n": 3, "half": w.astype(ml_dtypes.bfloat16)})
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    rows, copies = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    found = asymcheck_jax.load(tmp_path, shardings=copies)
    assert found["w"].sharding == copies and np.array_equal(found["w"], w) and found["n"] == 3
    found = asymcheck_jax.load(tmp_path, shardings={"w": rows})
    assert found["w"].sharding == rows and np.array_equal(found["w"], w)
    assert np.array_equal(found["b"], w[0])


def test_steps_by_number(tmp_path: Path) -> None:
    with asymcheck.Checkpointer(tmp_path) as checkpointer:
        for step in range(3):
            checkpointer.save(step, {"w": np.full(3, step, np.int32)})
    assert asymcheck_jax.load(tmp_path, 1)["w"].tolist() == [1, 1, 1]
    assert asymcheck_jax.load(tmp_path)["w"].tolist() == [2, 2, 2]
    with pytest.raises(CheckpointNotFoundError):
        asymcheck_jax.load(tmp_path, 9)
