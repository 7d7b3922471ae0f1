"""States for tests: hypothesis strategies, random arrays, and an equality that forgives nothing."""

from __future__ import annotations

from collections import Counter, OrderedDict
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from asymcheck.state import DTYPES

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**200), max_value=2**200)
    | st.floats()
    | st.complex_numbers(allow_nan=True)
    | st.sampled_from([float("-inf"), -0.0, 5e-324, 1.7976931348623157e308])
)
_ODD = ["", "/", "~", "~0", "~2", "a/b", "a~1b", "é", "\x00", "\n", "😀", "\udc80", "\ud800x", "1"]
TEXT = (st.text(max_size=8) | st.sampled_from(_ODD)).filter(
    lambda s: not any("\ud800" <= a < "\udc00" <= b < "\ue000" for a, b in pairwise(s))
)
"""All strings but those of which JSON makes other ones (a surrogate pair as two characters)."""


def random_array(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random bits (of a bool: random truth values)."""
    count = int(np.prod(shape))
    if dtype == "bool":
        return rng.integers(0, 2, count).astype(bool).reshape(shape)
    raw = rng.integers(0, 256, count * DTYPES[dtype].itemsize, np.uint8)
    return raw.view(DTYPES[dtype]).reshape(shape)


@st.composite
def arrays(draw: st.DrawFn, max_side: int = 5, max_rank: int = 3) -> np.ndarray:
    """Arrays of all dtypes and memory layouts, 0-d and empty ones among them."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, max_side), max_size=max_rank)))
    array = random_array(np.random.default_rng(draw(st.integers(0, 2**32))), dtype, shape)
    layout = draw(st.sampled_from(["C", "F", "T", "strided", "reversed", "read-only"]))
    if layout == "F":
        return np.asfortranarray(array)
    if layout == "T":
        return array.T
    if layout == "strided" and array.ndim:
        return array[::2]
    if layout == "reversed" and array.ndim:
        return array[..., ::-1]
    if layout == "read-only":
        array.flags.writeable = False
    return array


def numpy_scalars() -> st.SearchStrategy[Any]:
    """NumPy scalars of all dtypes."""
    return st.builds(
        lambda dtype, seed: random_array(np.random.default_rng(seed), dtype, (1,))[0],
        st.sampled_from(sorted(DTYPES)),
        st.integers(0, 2**32),
    )


def _distinct(keys: list[Any]) -> list[Any]:
    return list({str(key): key for key in keys}.values())


def _dictionaries(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.lists(TEXT | st.integers(-(2**70), 2**70), max_size=4).map(_distinct)
    pairs = keys.flatmap(
        lambda ks: st.lists(children, min_size=len(ks), max_size=len(ks)).map(
            lambda vs: list(zip(ks, vs, strict=True))
        )
    )
    return pairs.flatmap(lambda p: st.sampled_from([dict, OrderedDict]).map(lambda kind: kind(p)))


def states(max_leaves: int = 12) -> st.SearchStrategy[Any]:
    """Nested states of everything that can be saved."""
    leaves = SCALARS | TEXT | st.binary(max_size=9) | arrays() | numpy_scalars()
    return st.recursive(
        leaves,
        lambda children: (
            st.lists(children, max_size=4)
            | st.lists(children, max_size=4).map(tuple)
            | _dictionaries(children)
            | st.dictionaries(TEXT, st.integers(), max_size=3).map(Counter)
        ),
        max_leaves=max_leaves,
    )


def bits(value: Any) -> bytes:
    """The bytes of an array, in row-major order."""
    return np.ascontiguousarray(value).tobytes()


def same(first: Any, second: Any) -> bool:
    """Whether two states are equal in types, order, shapes, dtypes and every bit."""
    if type(first) is not type(second) and not _both_arrays(first, second):
        return False
    if isinstance(first, dict):
        return (
            list(first) == list(second)
            and all(type(a) is type(b) for a, b in zip(first, second, strict=True))
            and all(same(first[key], second[key]) for key in first)
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, np.ndarray | np.generic):
        return (first.dtype, first.shape, bits(first)) == (second.dtype, second.shape, bits(second))
    if isinstance(first, float):
        return first.hex() == second.hex()
    if isinstance(first, complex):
        return same(first.real, second.real) and same(first.imag, second.imag)
    return first == second


def _both_arrays(first: Any, second: Any) -> bool:
    return isinstance(first, np.ndarray) and isinstance(second, np.ndarray)


def training_state(seed: int, elements: int = 3000, **more: Any) -> dict[str, Any]:
    """Weight, both moments, a half-precision copy and a few scalars, all random."""
    rng = np.random.default_rng(seed)

    def values(dtype: str = "float32") -> np.ndarray:
        return rng.standard_normal(elements).astype(DTYPES[dtype])

    return {
        "params": {"h.w": values().reshape(-1, 10), "h.b": rng.standard_normal(7)},
        "exp_avg": {"h.w": values().reshape(-1, 10)},
        "exp_avg_sq": {"h.w": values().reshape(-1, 10)},
        "half": {"h.w": values("bfloat16")},
        "step": seed,
        **more,
    }


def drifted(state: dict[str, Any], seed: int) -> dict[str, Any]:
    """The state some small update later: floats change by a little, scalars by one."""
    rng = np.random.default_rng(seed)

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        if isinstance(value, np.ndarray):
            change = 1 + 1e-3 * rng.standard_normal(value.shape)
            return (value.astype(np.float64) * change).astype(value.dtype)
        return value + 1

    return moved(state)
