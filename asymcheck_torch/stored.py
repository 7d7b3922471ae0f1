"""A checkpoint as the adapter reads it: nested states with tensors, and large leaves by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asymcheck import tree
from asymcheck.errors import FormatError, StateMismatchError
from asymcheck.reader import Checkpoint, whole
from asymcheck.state import dtype_of
from asymcheck_torch.extras import map_arrays
from asymcheck_torch.optimizers import RESERVED
from asymcheck_torch.tensors import tensor_of


def tensors_of(state: Any, keep: Iterable[int] = ()) -> Any:
    """A nested state of arrays with tensors over the same memory.

    Arrays that occur twice (tied) become one tensor; those whose `id` is in `keep` stay arrays.
    """
    kept = set(keep)
    tensors: dict[int, torch.Tensor] = {}

    def convert(array: NDArray[Any]) -> Any:
        if id(array) in kept:
            return array
        return tensors.setdefault(id(array), tensor_of(array))

    return map_arrays(state, convert)


def read_arrays(checkpoint: Checkpoint, paths: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Whole leaves as fresh NumPy arrays, by path."""
    specs = {path: checkpoint.leaves[path] for path in paths}
    arrays = {p: np.empty(spec.shape, dtype_of(spec.dtype)) for p, spec in specs.items()}
    checkpoint.read_into(whole(path, array) for path, array in arrays.items())
    return arrays


def rebuild(checkpoint: Checkpoint, node: tree.Node, numpy_leaves: Iterable[str]) -> Any:
    """The part of a state that a node of the structure describes, with its tensors."""
    arrays = read_arrays(checkpoint, tree.leaf_paths(node))
    keep = [id(arrays[path]) for path in numpy_leaves if path in arrays]
    return tensors_of(tree.unflatten(node, arrays.__getitem__), keep)


def members(node: tree.Node) -> dict[Any, tree.Node]:
    """The members of a dictionary node; `StateMismatchError` for any other node."""
    if not isinstance(node, dict) or "dict" not in node:
        raise StateMismatchError(
            "the checkpoint is not one of asymcheck_torch.attach()",
            hint="Read it with asymcheck_torch.load() or asymcheck.open_checkpoint()",
        )
    return dict(node["dict"])


def dict_node(nodes: Mapping[Any, tree.Node]) -> tree.Node:
    """A dictionary node of these members."""
    return {"dict": [[key, node] for key, node in nodes.items()]}


def numpy_leaves_of(structure: tree.Node) -> list[str]:
    """The paths of all leaves that were NumPy's when `attach` saved them."""
    top = members(structure) if isinstance(structure, dict) and "dict" in structure else {}
    noted = tree.unflatten(top.get("__numpy_leaves__", {"dict": []}), _no_leaf)
    return [path for paths in noted.values() for path in paths]


def _no_leaf(path: str) -> object:
    raise FormatError("a leaf stands where only plain values may", leaf=path)


@dataclass
class Stored:
    """What a checkpoint holds for one rank: large leaves by name, the rest rebuilt.

    Attributes:
        kinds: {kind: {name: leaf path}} of `params`, `buffers` and the optimizers' tensors.
        optimizers, module_extra, own, engine: as `TrainingState` describes them; `engine` is None
            where there was none.
    """

    kinds: dict[str, dict[str, str]]
    optimizers: list[dict[str, Any]]
    module_extra: dict[str, Any]
    own: dict[str, Any]
    engine: dict[str, Any] | None = None

    @classmethod
    def open(cls, checkpoint: Checkpoint, rank: int) -> Stored:
        """Read everything but the large leaves; rank r of this run takes rank r mod N of N."""
        top = members(checkpoint.structure)
        needed = ("params", "optimizers", "module_extra", "ranks", "world_size")
        ranks = members(top["ranks"]) if all(name in top for name in needed) else members(None)
        saved_rank = str(rank % len(ranks))
        own = members(ranks[saved_rank])
        kinds = {
            kind: _paths_below(kind, node)
            for kind, node in top.items()
            if kind not in RESERVED - {"params", "buffers"}
        }
        if "buffers" in own:
            kinds["buffers"] = _paths_below(f"ranks/{saved_rank}/buffers", own.pop("buffers"))
        rest = {
            "optimizers": top["optimizers"],
            "module_extra": top["module_extra"],
            "own": dict_node(own),
        }
        rest |= {"engine": top["engine"]} if "engine" in top else {}
        numpy_leaves = numpy_leaves_of(checkpoint.structure)
        return cls(kinds, **rebuild(checkpoint, dict_node(rest), numpy_leaves))


def _paths_below(prefix: str, node: tree.Node) -> dict[str, str]:
    return {name: tree.join_path(prefix, name) for name in members(node)}
