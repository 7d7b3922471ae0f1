"""Checkpoints of torch's own kinds: DCP directories and `torch.save` files. No pickle runs code.

DCP knows dictionaries, lists and values. Exported to it, keys of dictionaries become strings and
empty dictionaries go; tuples stay. All arrays become tensors.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from asymcheck import tree
from asymcheck.errors import SourceError, StoreError, UnsupportedStateError
from asymcheck.inspection.plugins import read_state
from asymcheck.reader import Checkpoint
from asymcheck.reshard import within
from asymcheck.state import ShardSpec, dtype_of
from asymcheck_torch.dcp_metadata import Entry, Piece, StoredTensor, read_metadata
from asymcheck_torch.stored import tensors_of
from asymcheck_torch.tensors import byte_view, check_storable, identity, torch_dtype


def to_dcp(checkpoint: Checkpoint, output: Path, done: Callable[[int], None]) -> None:
    """Write a step as `torch.distributed.checkpoint` does, without a process group.

    Raises:
        UnsupportedStateError: torch has no such dtype, the state is no dictionary, or two values
            have the same name there (DCP joins keys by dots).
        StoreError: the directory cannot be written.
    """
    for spec in checkpoint.leaves.values():
        torch_dtype(spec.dtype, spec.path)
    state = _without_scalars(read_state(checkpoint, done))
    if not isinstance(state, dict):
        raise UnsupportedStateError("DCP stores dictionaries", found=type(state).__name__)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        try:
            save_dcp(tensors_of(state), checkpoint_id=output)
        except CheckpointException as failed:
            cause = failed.failures[0][0]
            if isinstance(cause, ValueError):  # two values have the same name
                raise UnsupportedStateError("DCP cannot store the state", found=cause) from failed
            raise StoreError(f"cannot write {output}: {cause}") from failed


def _without_scalars(value: Any) -> Any:
    """A nested state with 0-d arrays for NumPy's scalars, which torch unpickles only with trust."""
    if isinstance(value, np.generic):
        return np.array(value)
    if isinstance(value, dict):
        return type(value)({key: _without_scalars(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_without_scalars(item) for item in value)
    return value


def from_torch_save(path: Path) -> Any:
    """The state in a `torch.save` file, its tensors as arrays; only `weights_only` files.

    Raises:
        SourceError: it is not such a file, or holds other objects than tensors and plain values.
        UnsupportedStateError: a tensor is sparse, sharded, quantized, or of an unknown dtype.
    """
    try:
        with path.open("rb") as file:
            state = _load(file, str(path))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    return arrays_of(state)


def _load(file: Any, what: str) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a malformed file can make torch raise anything
        reason = str(error).rpartition("WeightsUnpickler error: ")[2]  # behind a page of advice
        raise SourceError(
            f"{what} cannot be loaded as weights only",
            found=" ".join(reason.split())[:120] or type(error).__name__,
            hint="It is damaged or holds objects that would run code",
        ) from error


def arrays_of(state: Any) -> Any:
    """A nested state of tensors with arrays over the same memory where tensors are contiguous.

    Tied tensors become one array.

    Raises:
        UnsupportedStateError: a tensor cannot be stored; it names the path.
    """
    return _Arrays().convert(state, "")


@dataclass
class _Arrays:
    known: dict[Hashable, NDArray[Any]] = field(default_factory=dict)

    def convert(self, value: Any, path: str) -> Any:
        if path.count("/") > tree.MAX_DEPTH:
            raise UnsupportedStateError(f"nested deeper than {tree.MAX_DEPTH} levels", leaf=path)
        if isinstance(value, torch.Tensor):
            return self._array(value, path or tree.ROOT_PATH)
        if type(value) in (dict, OrderedDict, Counter):
            members = value.items()
            return type(value)({k: self.convert(v, tree.join_path(path, k)) for k, v in members})
        if type(value) in (list, tuple, torch.Size):
            kind = list if type(value) is list else tuple
            items = enumerate(value)
            return kind(self.convert(item, tree.join_path(path, i)) for i, item in items)
        return value

    def _array(self, tensor: torch.Tensor, path: str) -> NDArray[Any]:
        dtype = dtype_of(check_storable(tensor, path))
        key = identity(tensor)
        if key not in self.known:
            flat = byte_view(tensor.detach().contiguous())
            self.known[key] = flat.view(dtype).reshape(tensor.shape)
        return self.known[key]


def from_dcp(path: Path) -> Any:
    """The state in a directory of `torch.distributed.checkpoint`, of any number of ranks.

    Raises:
        SourceError: it is not one, is damaged, or holds other objects than tensors and plain
            values (in its metadata: other than DCP's own).
        UnsupportedStateError: a tensor has a dtype that the format does not have.
    """
    entries = read_metadata(path / ".metadata")
    return _nested([(entry.keys, _value(path, entry)) for entry in entries])


def _value(root: Path, entry: Entry) -> Any:
    if isinstance(entry.stored, StoredTensor):
        return _tensor(root, entry.name, entry.stored)
    return arrays_of(_load_piece(root, entry.name, entry.stored))


def _tensor(root: Path, name: str, stored: StoredTensor) -> NDArray[Any]:
    """A tensor put together from its boxes, which cover it exactly once."""
    whole = np.empty(stored.shape if len(stored.boxes) != 1 else 0, dtype_of(stored.dtype))
    for box, piece in stored.boxes.items():
        part = _load_piece(root, name, piece)
        if type(part) is not torch.Tensor or _kind(part) != (stored.dtype, box.shape):
            raise SourceError("the file holds another value", leaf=name, object=piece.file)
        array = _Arrays().convert(part, name)
        if len(stored.boxes) == 1:
            return array
        whole[within(box, ShardSpec.whole(stored.shape))] = array
    return whole


def _kind(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _load_piece(root: Path, name: str, piece: Piece) -> Any:
    file = (root / piece.file).resolve()
    if not file.is_relative_to(root.resolve()):
        raise SourceError("the metadata name a file outside of the directory", object=piece.file)
    try:
        with file.open("rb") as stream:
            stream.seek(piece.offset)
            data = stream.read(piece.nbytes)
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror}", object=piece.file) from error
    return _load(BytesIO(data), f"{name} in {piece.file}")


def _nested(members: list[tuple[tuple[str | int, ...], Any]]) -> Any:
    """A state from the keys of its values; integers are positions in lists."""
    top = _Members()
    for keys, value in members:
        node = top
        for key in keys[:-1]:
            node = node.setdefault(key, _Members())
            if not isinstance(node, _Members):
                raise SourceError("a value of the metadata lies within another", found=keys)
        if keys[-1] in node:
            raise SourceError("the metadata have a value twice", found=keys)
        node[keys[-1]] = value
    return _with_lists(top)


class _Members(dict[str | int, Any]):
    """A node under construction, which no value is."""


def _with_lists(node: Any) -> Any:
    if not isinstance(node, _Members):
        return node
    items = {key: _with_lists(child) for key, child in node.items()}
    if not any(isinstance(key, int) for key in items):
        return items
    if set(items) != set(range(len(items))):
        raise SourceError("a list of the metadata has gaps", found=sorted(map(str, items))[:8])
    return [items[index] for index in range(len(items))]
