"""JAX pytrees as nested dictionaries, lists and tuples, which the format holds, and back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import (
    DictKey,
    FlattenedIndexKey,
    GetAttrKey,
    SequenceKey,
    tree_flatten_with_path,
)

from asymcheck import tree
from asymcheck.errors import UnsupportedStateError

PRNG_KEY = "__prng_key__"
"""A typed random key is stored as `{PRNG_KEY: {"impl": its name, "data": uint32 array}}`."""


def plain(node: Any) -> Any:
    """A pytree as nested dict, list and tuple of leaves: what comes back without a target.

    Named tuples, dataclasses and other registered nodes become dictionaries of their fields;
    nodes whose children have only numbers become lists; nodes without children `{}`.

    Raises:
        UnsupportedStateError: a node's children have keys of an unknown kind.
    """
    if node is None:
        return None
    if type(node) in (dict, OrderedDict):
        return type(node)((key, plain(child)) for key, child in node.items())
    if type(node) in (list, tuple):
        return type(node)(plain(child) for child in node)
    if is_prng_key(node):
        return {PRNG_KEY: {"impl": prng_impl(node.dtype), "data": jax.random.key_data(node)}}
    children = tree_flatten_with_path(node, is_leaf=lambda child: child is not node)[0]
    if len(children) == 1 and not children[0][0]:
        return node  # a leaf
    keys = [path[0] for path, _ in children]
    if keys and all(isinstance(key, SequenceKey | FlattenedIndexKey) for key in keys):
        return [plain(child) for _, child in children]
    return {_name(key): plain(child) for key, (_, child) in zip(keys, children, strict=True)}


def leaves_by_path(target: Any) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], Any]]:
    """A pytree's leaves under the paths that `plain` gives them, and how to put it together again.

    Raises:
        UnsupportedStateError: two leaves have the same path, or keys are of an unknown kind.
    """
    flat, treedef = tree_flatten_with_path(target)
    paths = [path_of(keys) for keys, _ in flat]
    leaves = {path: leaf for path, (_, leaf) in zip(paths, flat, strict=True)}
    if len(leaves) != len(flat):
        repeated = next(path for path in paths if paths.count(path) > 1)
        raise UnsupportedStateError("two leaves have the same path", leaf=repeated)
    return leaves, lambda values: jax.tree_util.tree_unflatten(
        treedef, [values[path] for path in paths]
    )


def path_of(keys: tuple[Any, ...]) -> str:
    """The path of a leaf in the format, from JAX's key path."""
    path = ""
    for key in keys:
        path = tree.join_path(path, _name(key))
    return path or tree.ROOT_PATH


def _name(key: Any) -> str | int:
    if isinstance(key, GetAttrKey):
        return key.name
    if isinstance(key, SequenceKey):
        return key.idx
    if isinstance(key, DictKey | FlattenedIndexKey):
        return key.key
    raise UnsupportedStateError(
        f"a pytree key of type {type(key).__name__} cannot be stored", found=repr(key)[:80]
    )


def is_prng_key(value: object) -> bool:
    """Whether `value` is an array (or the shape of one) of typed random keys."""
    return isinstance(value, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(
        value.dtype, jax.dtypes.prng_key
    )


def prng_impl(dtype: Any) -> str:
    """The name of the generator of a key dtype."""
    return str(dtype._impl.name)


def values_by_path(structure: tree.Node, leaf: Callable[[str], Any]) -> dict[str, Any]:
    """What a stored structure has at the path of every leaf; `leaf(path)` gives the arrays.

    A random key is found under its own path, as the dictionary `{"impl": ..., "data": array}`.

    Raises:
        FormatError: the structure does not follow the format's grammar.
    """
    found: dict[str, Any] = {}
    _collect(tree.unflatten(structure, leaf), "", found)
    return found


def _collect(node: Any, path: str, found: dict[str, Any]) -> None:
    if isinstance(node, dict) and set(node) == {PRNG_KEY}:
        found[path or tree.ROOT_PATH] = node[PRNG_KEY]
    elif isinstance(node, dict):
        for key, child in cast("dict[str | int, Any]", node).items():
            _collect(child, tree.join_path(path, key), found)
    elif isinstance(node, list | tuple):
        for index, child in enumerate(cast("list[Any]", node)):
            _collect(child, tree.join_path(path, index), found)
    elif node is not None:
        found[path or tree.ROOT_PATH] = node


def is_array(value: object) -> bool:
    """Whether a leaf's bytes are stored as an array (NumPy scalars are the core's)."""
    return isinstance(value, jax.Array) or type(value) in (np.ndarray, np.memmap)
