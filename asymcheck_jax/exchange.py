"""Checkpoints of Orbax's StandardCheckpointer and PyTreeCheckpointer.

Orbax brings dictionaries back with strings as keys, and tuples as lists. Exported to it, bytes
become uint8 arrays and Python's complex numbers 0-d arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from asymcheck.errors import SourceError, StoreError, UnsupportedStateError
from asymcheck.inspection.plugins import read_state
from asymcheck.reader import Checkpoint
from asymcheck_jax.restoring import with_keys
from asymcheck_jax.trees import plain

_UNKNOWN_TO_ORBAX = frozenset({"float8_e4m3"})
_ORBAX_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError)
_PYTHON_DTYPES = frozenset({"bool", "int64", "float64"})
_METADATA = "_METADATA"


def to_orbax(checkpoint: Checkpoint, output: Path, done: Callable[[int], None]) -> None:
    """Write a step as Orbax does; stored random keys become typed ones.

    Raises:
        UnsupportedStateError: a leaf is empty or of a dtype that Orbax does not write, or a
            number has more than 64 bits.
        StoreError: the directory cannot be written.
    """
    for spec in checkpoint.leaves.values():
        if spec.size == 0 or spec.dtype in _UNKNOWN_TO_ORBAX:
            raise UnsupportedStateError(
                "Orbax cannot store this leaf",
                leaf=spec.path,
                found=f"{spec.dtype}{list(spec.shape)}",
                hint="It takes no empty arrays, and no float8_e4m3",
            )
    state = with_keys(_plain_values(read_state(checkpoint, done)))
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(output.absolute(), state)
    except _ORBAX_ERRORS as error:
        raise StoreError(f"Orbax cannot write {output}: {error}") from error


def _plain_values(value: Any) -> Any:
    """A nested state in which every value is one that Orbax takes."""
    if isinstance(value, dict):
        return {str(key): _plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain_values(item) for item in value)
    if type(value) is bytes:
        return np.frombuffer(value, np.uint8)
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise UnsupportedStateError("Orbax cannot store this number", found=str(value)[:80])
    if isinstance(value, complex | np.generic):
        return np.asarray(value)
    return value


def from_orbax(path: Path) -> Any:
    """The state in a directory that Orbax wrote, or in the item `default` of a manager's step.

    Arrays come back as NumPy's, whatever devices and shardings they were saved from, and with
    their own dtype (JAX would narrow float64 and int64); typed random keys as stored ones.

    Raises:
        SourceError: it is not such a directory, or is damaged.
    """
    if not (path / _METADATA).exists() and (path / "default" / _METADATA).exists():
        path = path / "default"
    if not (path / _METADATA).exists():
        raise SourceError(
            f"{path} is no checkpoint of Orbax",
            hint="Name the directory of an item, which has a file _METADATA",
        )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            state = _restore(checkpointer, path.absolute())
    except _ORBAX_ERRORS as error:
        raise SourceError(f"Orbax cannot read {path}: {error}") from error
    return jax.tree.map(lambda a: np.asarray(a) if isinstance(a, jax.Array) else a, plain(state))


def _restore(checkpointer: Any, path: Path) -> Any:
    stored = checkpointer.metadata(path).item_metadata.tree
    arguments = jax.tree.map(_how, stored)
    return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))


def _how(stored: Any) -> ocp.RestoreArgs:
    """How a leaf is restored: through JAX only what may be random keys, which it does not narrow.

    Numbers come back as such, but those of NumPy with a dtype of their own as 0-d arrays.
    """
    name = np.dtype(stored.dtype).name if isinstance(stored, ocp.metadata.ArrayMetadata) else None
    if name is None or (isinstance(stored, ocp.metadata.ScalarMetadata) and name in _PYTHON_DTYPES):
        return ocp.RestoreArgs()
    if name == "uint32" and type(stored) is ocp.metadata.ArrayMetadata:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return ocp.ArrayRestoreArgs(sharding=device)
    return ocp.RestoreArgs(restore_type=np.ndarray)
