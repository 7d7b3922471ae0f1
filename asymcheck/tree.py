"""Nested states as a structure (JSON) and leaves under paths, and back.

The structure keeps what JSON alone would lose: tuples, integer keys, exact floats, ordered
dictionaries. docs/format.md gives the table of nodes. Nothing is pickled, and rebuilding a
structure constructs only the types listed here.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from asymcheck.errors import FormatError, UnsupportedStateError

Node = Any
"""A JSON value that follows the node grammar of docs/format.md."""

MAX_DEPTH = 64
_glimpse = reprlib.Repr()
_glimpse.maxstring = 80
ROOT_PATH = "~"

_MAPPINGS: dict[str, Callable[[list[tuple[Any, Any]]], dict[Any, Any]]] = {
    "dict": dict,
    "ordered": OrderedDict,
    "counter": lambda pairs: Counter(dict(pairs)),
}
_TAG_OF_MAPPING: dict[type, str] = {dict: "dict", OrderedDict: "ordered", Counter: "counter"}
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_ANYTHING = np.zeros(1, np.uint8)  # in the place of every leaf
_LEAF_TAGS = frozenset({"leaf", "bytes", "scalar"})


def join_path(parent: str, key: str | int) -> str:
    """The path of the child `key`: `~` and `/` in keys become `~0` and `~1`, the empty key `~2`."""
    name = str(key).replace("~", "~0").replace("/", "~1") or "~2"
    return name if parent == "" else f"{parent}/{name}"


@dataclass
class FlatState:
    """A state taken apart.

    Attributes:
        structure: the node from which `unflatten` rebuilds the state.
        leaves: path -> array or bytes, each distinct object once.
        aliases: path of a leaf -> the other paths under which the same object appeared.
    """

    structure: Node
    leaves: dict[str, object] = field(default_factory=dict[str, object])
    aliases: dict[str, list[str]] = field(default_factory=dict[str, list[str]])


def flatten(
    state: object,
    is_array: Callable[[object], bool],
    identity: Callable[[object], Hashable] = id,
) -> FlatState:
    """Take a state apart.

    Args:
        state: nested dict, list, tuple (also OrderedDict and Counter) of arrays, NumPy scalars,
            bool, int, float, complex, str, bytes and None.
        is_array: which objects are arrays (leaves).
        identity: two arrays with equal identity are one leaf under several paths (tied weights).

    Raises:
        UnsupportedStateError: for any other object (with its path and type), a key that is not
            a str or int, two keys with the same path, nesting deeper than `MAX_DEPTH`, an integer
            of more digits than Python converts, or a string that JSON would change.
    """
    return _Flattener(is_array, identity).run(state)


class _Flattener:
    def __init__(
        self, is_array: Callable[[object], bool], identity: Callable[[object], Hashable]
    ) -> None:
        self._is_array = is_array
        self._identity = identity
        self._flat = FlatState(structure=None)
        self._path_of: dict[Hashable, str] = {}
        self._paths: set[str] = set()

    def run(self, state: object) -> FlatState:
        self._flat.structure = self._node("", state, 0)
        return self._flat

    def _node(self, path: str, value: object, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise UnsupportedStateError(
                f"the state is nested deeper than {MAX_DEPTH} levels (or contains itself)",
                leaf=path,
            )
        if value is None or type(value) is bool:
            return value
        if type(value) is str:
            return _text(value, path)
        if self._is_array(value):
            return {"leaf": self._leaf(path, value, self._identity(value))}
        if type(value) is bytes:
            return {"bytes": self._leaf(path, value, ("bytes", path))}
        if isinstance(value, np.generic):
            array: object = np.asarray(cast("np.generic[Any]", value))
            return {"scalar": self._leaf(path, array, ("scalar", path))}
        if type(value) in _TAG_OF_MAPPING:
            return self._mapping(path, cast("dict[object, object]", value), depth)
        if type(value) in (list, tuple):
            items = cast("list[object] | tuple[object, ...]", value)
            nodes = [self._child(path, i, item, depth) for i, item in enumerate(items)]
            return {type(value).__name__: nodes}
        return self._number(path, value)

    def _mapping(self, path: str, value: dict[object, object], depth: int) -> Node:
        pairs: list[list[Node]] = []
        names: set[str] = set()
        for key, item in value.items():
            if type(key) is not str and type(key) is not int:
                raise UnsupportedStateError(
                    f"a dictionary key of type {type(key).__name__} cannot be stored",
                    leaf=path,
                    expected="str or int",
                    found=repr(key)[:80],
                )
            name = _text(key, path) if type(key) is str else _decimal(cast("int", key), path)
            if name in names:
                raise UnsupportedStateError(
                    "two keys of one dictionary have the same path", leaf=path, found=repr(key)
                )
            names.add(name)
            pairs.append([key, self._child(path, key, item, depth)])
        return {_TAG_OF_MAPPING[type(value)]: pairs}

    def _child(self, path: str, key: str | int, item: object, depth: int) -> Node:
        return self._node(join_path(path, key), item, depth + 1)

    def _leaf(self, path: str, value: object, identity: Hashable) -> str:
        path = path or ROOT_PATH
        first = self._path_of.setdefault(identity, path)
        if first == path:
            self._flat.leaves[path] = value
        else:
            self._flat.aliases.setdefault(first, []).append(path)
        return first

    def _number(self, path: str, value: object) -> Node:
        if type(value) is int:
            return {"int": _decimal(value, path)}
        if type(value) is float:
            return {"float": value.hex()}
        if type(value) is complex:
            return {"complex": [value.real.hex(), value.imag.hex()]}
        raise UnsupportedStateError(
            f"an object of type {type(value).__module__}.{type(value).__qualname__} "
            "cannot be stored",
            leaf=path or ROOT_PATH,
            expected="array, NumPy scalar, bool, int, float, complex, str, bytes, None, "
            "dict, list or tuple",
            hint="Convert it, or leave it out of the state; nothing was saved",
        )


def _text(text: str, path: str) -> str:
    if not text.isascii() and _SURROGATE_PAIR.search(text):
        raise UnsupportedStateError(
            "a string with a surrogate pair as two characters cannot be stored: JSON makes one of "
            "them",
            leaf=path or ROOT_PATH,
            found=repr(text)[:80],
        )
    return text


def _decimal(number: int, path: str) -> str:
    try:
        return str(number)
    except ValueError as error:
        raise UnsupportedStateError(
            f"an integer is too long: {error}", leaf=path or ROOT_PATH
        ) from error


def unflatten(structure: Node, leaf: Callable[[str], object]) -> Any:
    """Rebuild a state from its structure; `leaf(path)` gives each array (or `bytes` content).

    Raises:
        FormatError: if the structure does not follow the grammar or is nested too deep.
    """
    return _build(structure, leaf, 0)


def _build(node: Node, leaf: Callable[[str], object], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise FormatError(f"the structure is nested deeper than {MAX_DEPTH} levels")
    if node is None or isinstance(node, (bool, str)):
        return node
    tag, body = _open(node)
    if tag == "leaf" and type(body) is str:  # nearly all nodes of large states
        return leaf(body)
    if tag in _MAPPINGS:
        pairs = [(_key(k), _build(v, leaf, depth + 1)) for k, v in _pairs(tag, body)]
        if len({str(key) for key, _ in pairs}) != len(pairs):
            raise FormatError("a dictionary of the structure has the same key twice")
        return _MAPPINGS[tag](pairs)
    if tag in ("list", "tuple"):
        items = [_build(item, leaf, depth + 1) for item in _expect(tag, body, list)]
        return items if tag == "list" else tuple(items)
    if tag in _LEAF_TAGS:
        return _rebuild_leaf(tag, leaf(_expect(tag, body, str)))
    return _rebuild_number(tag, body)


def _open(node: Node) -> tuple[str, Node]:
    if not isinstance(node, dict) or len(cast("dict[str, Node]", node)) != 1:
        raise FormatError("a node of the structure is not an object of one member", found=_s(node))
    return next(iter(cast("dict[str, Node]", node).items()))


def _pairs(tag: str, body: Node) -> Iterator[tuple[Node, Node]]:
    for pair in _expect(tag, body, list):
        if not isinstance(pair, list) or len(cast("list[Node]", pair)) != 2:
            raise FormatError(f"a member of a {tag} node is not a pair", found=_s(pair))
        yield cast("tuple[Node, Node]", tuple(cast("list[Node]", pair)))


def _key(key: Node) -> str | int:
    if type(key) is str or type(key) is int:
        return key
    raise FormatError("a dictionary key of the structure is not a string or integer", found=_s(key))


def _expect(tag: str, body: Node, kind: type) -> Any:
    if not isinstance(body, kind):
        raise FormatError(
            f"the body of a {tag!r} node is wrong", expected=kind.__name__, found=_s(body)
        )
    return body


def _rebuild_leaf(tag: str, value: Any) -> object:
    if tag == "bytes":
        return bytes(value)
    if tag == "scalar":
        return np.asarray(value)[()]
    return value


def _rebuild_number(tag: str, body: Node) -> int | float | complex:
    try:
        if tag == "int":
            return int(_expect(tag, body, str))
        if tag == "float":
            return float.fromhex(_expect(tag, body, str))
        if tag == "complex":
            real, imag = _expect(tag, body, list)
            return complex(float.fromhex(real), float.fromhex(imag))
    except (ValueError, TypeError, OverflowError) as error:
        raise FormatError(f"the body of a {tag!r} node is no number", found=_s(body)) from error
    raise FormatError("the structure has a node of an unknown kind", found=tag[:40])


def leaf_paths(structure: Node) -> set[str]:
    """All leaf paths that a structure refers to; `FormatError` as in `unflatten`."""
    paths: set[str] = set()

    def note(path: str) -> object:
        paths.add(path)
        return _ANYTHING

    unflatten(structure, note)
    return paths


def merge(first: Node, second: Node, path: str = "") -> Node:
    """The structure that holds both: dictionaries are united, anything else must be equal.

    Raises:
        FormatError: where the two differ in something that is not a dictionary.
    """
    if first == second:
        return first
    if _is_dict(first) and _is_dict(second):
        merged = {_key(k): v for k, v in first["dict"]}
        for key, node in second["dict"]:
            name = _key(key)
            merged[name] = (
                merge(merged[name], node, join_path(path, name)) if name in merged else node
            )
        return {"dict": [[key, node] for key, node in merged.items()]}
    raise FormatError("two writers give different structures", leaf=path or ROOT_PATH)


def _is_dict(node: Node) -> bool:
    return isinstance(node, dict) and "dict" in node


def _s(node: Node) -> str:
    """A glimpse of a node, however large and deep it is."""
    return _glimpse.repr(node)[:80]
