"""Leaves, boxes and sources: what an array is to the core, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from states import arrays, bits

from asymcheck.errors import UnsupportedStateError, UnsupportedVersionError
from asymcheck.state import (
    DTYPES,
    ArraySource,
    LeafSpec,
    ShardSpec,
    dtype_name,
    dtype_of,
    memory_of,
    numpy_view,
)


def only_source(array: np.ndarray) -> ArraySource:
    (source,) = numpy_view({"params": {"w": array}}).sources
    assert isinstance(source, ArraySource)
    return source


@given(arrays(), st.data())
def test_reads_any_range_of_any_array(array: np.ndarray, data: st.DataObject) -> None:
    source = only_source(array)
    start = data.draw(st.integers(0, array.size))
    count = data.draw(st.integers(0, array.size - start))
    out = np.full(count * array.itemsize, 0xAA, np.uint8)
    source.read_into(start, count, out)
    flat = np.ascontiguousarray(array).reshape(-1)
    assert out.tobytes() == bits(flat[start : start + count])
    assert source.leaf == LeafSpec("params/w", array.dtype.name, array.shape)
    assert source.owned == (0, array.size)
    assert source.shard == ShardSpec((0,) * array.ndim, array.shape)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_dtype_names_are_the_formats(name: str) -> None:
    assert dtype_of(name) == DTYPES[name]
    assert dtype_name(DTYPES[name], "a") == name
    leaf = LeafSpec("a/b/c", name, (3, 2))
    assert (leaf.itemsize, leaf.size, leaf.nbytes) == (
        DTYPES[name].itemsize,
        6,
        6 * DTYPES[name].itemsize,
    )
    assert leaf.kind == "a"


def test_sizes_of_boxes() -> None:
    assert ShardSpec.whole([3, 4]) == ShardSpec((0, 0), (3, 4))
    assert ShardSpec.whole(()).size == LeafSpec("a", "int8", ()).size == 1
    assert ShardSpec((2,), (0,)).size == 0
    assert LeafSpec("a", "float32", (10**6, 10**7)).nbytes == 4 * 10**13


@pytest.mark.parametrize("name", ["float128", "object", "<f4", "", "str"])
def test_unknown_dtype_names_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedVersionError, match="unknown dtype"):
        dtype_of(name)


REFUSED: list[Any] = [
    np.zeros(2, ">f4"),
    np.zeros(2, ">i8"),
    np.array([None, 1], object),
    np.array(["a"]),
    np.array([b"a"]),
    np.array(["2020-01-01"], "datetime64[D]"),
    np.array([1], "timedelta64[s]"),
    np.zeros(2, [("a", "f4")]),
    np.zeros(2, "V3"),
    np.zeros(2, np.longdouble),
    np.datetime64("2020-01-01"),
    np.str_("a"),
    np.bytes_(b"a"),
]


@pytest.mark.parametrize("value", REFUSED, ids=lambda v: v.dtype.str)
def test_refuses_other_dtypes_by_path(value: Any) -> None:
    with pytest.raises(UnsupportedStateError, match="cannot be stored") as raised:
        numpy_view({"params": [value]})
    assert raised.value.leaf == "params/0"
    assert str(value.dtype) in str(raised.value) or value.dtype.name in str(raised.value)


def test_names_of_one_platform_are_those_of_all() -> None:
    for alias in ("intc", "longlong", "ulonglong", "uintc", "double", "half"):
        assert dtype_name(np.dtype(alias), "a") in DTYPES


def test_leaves_of_one_parameter_are_a_group() -> None:
    w = np.zeros((4, 5), np.float32)
    view = numpy_view({"params": {"h": {"w": w}}, "exp_avg": {"h": {"w": w + 1}}, "lr": np.ones(3)})
    assert [s.group for s in view.sources] == ["h/w", "h/w", "lr"]
    assert [s.leaf.path for s in view.sources] == ["params/h/w", "exp_avg/h/w", "lr"]


def test_tied_leaves_appear_once() -> None:
    w = np.zeros(3)
    view = numpy_view({"a": w, "b": w})
    assert [s.leaf.path for s in view.sources] == ["a"]
    assert view.aliases == {"a": ["b"]}


def test_bytes_are_arrays_of_bytes() -> None:
    view = numpy_view({"a": b"\x00\xff", "b": b""})
    assert [(s.leaf.dtype, s.leaf.shape) for s in view.sources] == [
        ("uint8", (2,)),
        ("uint8", (0,)),
    ]


@given(arrays())
def test_memory_tells_arrays_apart(array: np.ndarray) -> None:
    assert memory_of(array) == memory_of(array)
    assert memory_of(array) != memory_of(array.copy())
    if array.size:
        assert memory_of(array) == memory_of(array[...])
        assert math.prod(array.shape) == 1 or memory_of(array) != memory_of(array.reshape(-1)[:1])
