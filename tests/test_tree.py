"""States taken apart and put together: everything comes back as it was, or is refused by name."""

from __future__ import annotations

import ast
import json
from collections import Counter, OrderedDict, UserDict, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from states import TEXT, same, states

import asymcheck
from asymcheck import tree
from asymcheck.errors import FormatError, UnsupportedStateError
from asymcheck.state import is_array, memory_of
from asymcheck.tree import MAX_DEPTH, flatten, join_path, leaf_paths, merge, unflatten


def taken_apart(state: Any) -> tree.FlatState:
    return flatten(state, is_array, memory_of)


def through_json(node: tree.Node) -> tree.Node:
    return json.loads(json.dumps(node, allow_nan=False))


@given(states())
def test_round_trip_through_json(state: Any) -> None:
    flat = taken_apart(state)
    back = unflatten(through_json(flat.structure), flat.leaves.__getitem__)
    assert same(back, state)


@given(states())
def test_leaf_paths_are_those_of_the_structure(state: Any) -> None:
    flat = taken_apart(state)
    assert leaf_paths(flat.structure) == set(flat.leaves)
    aliases = [path for paths in flat.aliases.values() for path in paths]
    assert len({*flat.leaves, *aliases}) == len(flat.leaves) + len(aliases)


@given(st.lists(st.lists(TEXT | st.integers(-9, 99), max_size=3), min_size=2, max_size=6))
def test_different_keys_have_different_paths(keys: list[list[str | int]]) -> None:
    def path(of: list[str | int]) -> str:
        joined = ""
        for key in of:
            joined = join_path(joined, key)
        return joined

    distinct = {tuple(map(str, of)) for of in keys}
    assert len({path(list(of)) for of in distinct}) == len(distinct)


@pytest.mark.parametrize(
    ("key", "name"),
    [("a/b", "a~1b"), ("~", "~0"), ("~1", "~01"), ("", "~2"), (-3, "-3"), ("~2", "~02")],
)
def test_paths_escape(key: str | int, name: str) -> None:
    assert join_path("", key) == name
    assert join_path("params", key) == f"params/{name}"


def test_a_state_that_is_one_leaf() -> None:
    array = np.arange(3)
    flat = taken_apart(array)
    assert flat.structure == {"leaf": "~"}
    assert flat.leaves == {"~": array}
    assert "~" not in taken_apart({"~": array}).leaves


def test_tied_arrays_are_one_leaf() -> None:
    w = np.arange(12.0).reshape(3, 4)
    state = {"a": w, "b": [w, w[:]], "c": w.T, "d": w[1:], "e": w.copy()}
    flat = taken_apart(state)
    assert list(flat.leaves) == ["a", "c", "d", "e"]
    assert flat.aliases == {"a": ["b/0", "b/1"]}
    back = unflatten(flat.structure, flat.leaves.__getitem__)
    assert back["a"] is back["b"][0] is back["b"][1] is w


def test_the_same_memory_as_other_numbers_is_another_leaf() -> None:
    a = np.arange(4, dtype=np.float32)
    assert list(taken_apart([a, a.view(np.int32), a.view(">f4")]).leaves) == ["0", "1", "2"]


def test_empty_arrays_are_tied_only_to_themselves() -> None:
    a, b = np.empty(0), np.empty(0)
    flat = taken_apart([a, b, a])
    assert list(flat.leaves) == ["0", "1"]
    assert flat.aliases == {"0": ["2"]}


def test_scalars_and_bytes_are_never_tied() -> None:
    one = np.float32(1)
    flat = taken_apart([one, one, b"x", b"x"])
    assert list(flat.leaves) == ["0", "1", "2", "3"]


class Point(NamedTuple):
    x: int


class Text(str):
    pass


class Dict(dict[str, int]):
    pass


REFUSED = [
    (object(), "builtins.object"),
    ({1, 2}, "builtins.set"),
    (frozenset(), "builtins.frozenset"),
    (bytearray(b"x"), "bytearray"),
    (range(3), "range"),
    (Point(1), "Point"),
    (Text("x"), "Text"),
    (Dict(), "Dict"),
    (defaultdict(int), "defaultdict"),
    (UserDict(), "UserDict"),
    (lambda: 0, "function"),
    (np.ma.masked_array([1], [True]), "MaskedArray"),
    (np.zeros((1, 1)).view(np.matrix), "matrix"),
    (np.rec.array([(1,)], dtype=[("a", "i4")]), "recarray"),
    (type, "builtins.type"),
]


@pytest.mark.parametrize(("value", "name"), REFUSED, ids=[name for _, name in REFUSED])
def test_refuses_by_path_and_type(value: object, name: str) -> None:
    with pytest.raises(UnsupportedStateError, match=name) as raised:
        taken_apart({"a": [0, {"b/c": value}]})
    assert raised.value.leaf == "a/1/b~1c"


@pytest.mark.parametrize("key", [1.5, True, None, (1,), b"k", np.int64(1), Text("k")])
def test_refuses_other_keys(key: object) -> None:
    with pytest.raises(UnsupportedStateError, match="key of type") as raised:
        taken_apart({"a": {key: 1}})
    assert raised.value.leaf == "a"


def test_refuses_keys_with_the_same_path() -> None:
    with pytest.raises(UnsupportedStateError, match="same path"):
        taken_apart({"a": {1: 0, "1": 0}})


def test_refuses_what_contains_itself() -> None:
    cycle: list[object] = []
    cycle.append({"a": cycle})
    with pytest.raises(UnsupportedStateError, match="nested deeper"):
        taken_apart({"b": cycle})


@pytest.mark.parametrize("text", ["\ud83d\ude00", "a\ud800\udc00b"])
def test_refuses_strings_that_json_would_change(text: str) -> None:
    assert json.loads(json.dumps(text)) != text
    for state in ({"a": text}, {"a": {text: 1}}):
        with pytest.raises(UnsupportedStateError, match="surrogate pair") as raised:
            taken_apart(state)
        assert raised.value.leaf == "a"


def test_refuses_integers_too_long_to_convert() -> None:
    for state in ({"a": 10**5000}, {"a": {10**5000: 1}}):
        with pytest.raises(UnsupportedStateError, match="integer is too long"):
            taken_apart(state)


def nested(depth: int) -> Any:
    state: Any = np.arange(2)
    for _ in range(depth):
        state = [state]
    return state


def test_nests_as_deep_as_it_says() -> None:
    flat = taken_apart(nested(MAX_DEPTH))
    assert same(unflatten(flat.structure, flat.leaves.__getitem__), nested(MAX_DEPTH))
    with pytest.raises(UnsupportedStateError, match="nested deeper"):
        taken_apart(nested(MAX_DEPTH + 1))
    deeper = {"list": [flat.structure]}
    with pytest.raises(FormatError, match="nested deeper"):
        unflatten(deeper, flat.leaves.__getitem__)


BAD_NODES: list[Any] = [
    1,
    1.5,
    [],
    {},
    {"dict": [], "list": []},
    {"set": []},
    {"object": "os.system"},
    {"list": {}},
    {"tuple": "ab"},
    {"dict": {}},
    {"dict": [["a"]]},
    {"dict": [["a", None, None]]},
    {"dict": ["ab"]},
    {"dict": [[1.5, None]]},
    {"dict": [[True, None]]},
    {"dict": [[None, None]]},
    {"dict": [["1", None], [1, None]]},
    {"ordered": [["a", None], ["a", None]]},
    {"leaf": 1},
    {"leaf": None},
    {"bytes": 3},
    {"scalar": []},
    {"int": 5},
    {"int": "5.5"},
    {"int": "x"},
    {"int": "9" * 5000},
    {"float": 1.5},
    {"float": "zz"},
    {"float": "0x1p+99999"},
    {"complex": ["0x0p+0"]},
    {"complex": "0x0p+0"},
    {"complex": ["0x0p+0", 1]},
    {"counter": 1},
]


@pytest.mark.parametrize("node", BAD_NODES, ids=[json.dumps(n)[:40] for n in BAD_NODES])
@pytest.mark.parametrize("wrap", [lambda n: n, lambda n: {"list": [None, n]}])
def test_refuses_malformed_structures(node: Any, wrap: Any) -> None:
    with pytest.raises(FormatError):
        unflatten(wrap(node), lambda path: np.zeros(1))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda c: (
        st.lists(c, max_size=3)
        | st.dictionaries(
            st.sampled_from(["dict", "list", "leaf", "int", "float", "tuple", "counter"]),
            c,
            max_size=2,
        )
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_json_is_rebuilt_or_refused(node: Any) -> None:
    try:
        unflatten(node, lambda path: np.zeros(1))
    except FormatError:
        return
    assert leaf_paths(node) is not None


def test_rebuilds_only_plain_types() -> None:
    state = OrderedDict([("z", Counter("aab")), (1, (b"x", np.bool_(True), [None]))])
    flat = taken_apart(state)
    back = unflatten(through_json(flat.structure), flat.leaves.__getitem__)
    assert type(back) is OrderedDict
    assert type(back["z"]) is Counter and back["z"]["b"] == 1 and back["z"]["missing"] == 0
    assert type(back[1][0]) is bytes and type(back[1][1]) is np.bool_


# -- several writers ---------------------------------------------------------------------------


def structure(state: Any) -> tree.Node:
    return taken_apart(state).structure


def test_merges_dictionaries() -> None:
    a, b = np.zeros(1), np.zeros(2)
    first = structure({"p": {"a": a}, "step": 3, "ranks": {0: 1}})
    second = structure({"p": {"b": b}, "step": 3, "ranks": {1: 2}})
    merged = merge(first, second)
    assert unflatten(merged, lambda path: path) == {
        "p": {"a": "p/a", "b": "p/b"},
        "step": 3,
        "ranks": {0: 1, 1: 2},
    }


@given(states(), states())
def test_merging_keeps_both_sides(first: Any, second: Any) -> None:
    mine, other = structure({"x": first, "y": 1}), structure({"y": 1, "z": second})
    merged = merge(mine, other)
    assert dict(merged["dict"]) == dict(mine["dict"]) | dict(other["dict"])
    assert merge(mine, mine) == mine


@pytest.mark.parametrize(
    ("first", "second", "path"),
    [
        ({"a": {"s": 1}}, {"a": {"s": 2}}, "a/s"),
        ({"a": [1]}, {"a": [1, 2]}, "a"),
        ({"a": (1,)}, {"a": [1]}, "a"),
        ({"a": 1}, {"a": True}, "a"),
        ({"a": 0.0}, {"a": -0.0}, "a"),
        ({"a": {}}, {"a": OrderedDict(b=1)}, "a"),
        (1, 2, "~"),
    ],
)
def test_refuses_to_merge_what_differs(first: Any, second: Any, path: str) -> None:
    with pytest.raises(FormatError, match="different structures") as raised:
        merge(structure(first), structure(second))
    assert raised.value.leaf == path


def test_a_merge_that_gives_a_path_twice_does_not_rebuild() -> None:
    merged = merge(structure({"a": {1: 5}}), structure({"a": {"1": 5}}))
    with pytest.raises(FormatError, match="same key twice"):
        leaf_paths(merged)


# -- nothing is pickled ------------------------------------------------------------------------

FORBIDDEN = {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def test_no_module_can_pickle() -> None:
    sources = sorted(Path(asymcheck.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = {node.func.id} & {"eval", "exec", "__import__"}
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                names = set() if ast.unparse(node.value) == "False" else {"allow_pickle"}
            else:
                continue
            assert not names & (FORBIDDEN | {"eval", "exec", "__import__", "allow_pickle"}), source
