"""numba and NumPy kernels give the same bytes and invert each other."""

from __future__ import annotations

import numpy as np
import pytest
from codec_columns import KINDS, content
from hypothesis import given, settings
from hypothesis import strategies as st

from asymcheck.codecs._kernels_numpy import NumpyKernels
from asymcheck.codecs.kernels import Kernels, Words

numba_kernels = pytest.importorskip(
    "asymcheck.codecs._kernels_numba", reason="numba is not installed", exc_type=ImportError
)
BOTH: list[Kernels] = [NumpyKernels(), numba_kernels.NumbaKernels()]
FLOATS = {1: np.dtype("uint8"), 2: np.dtype("float16"), 4: np.dtype("f4"), 8: np.dtype("f8")}

widths = st.sampled_from(sorted(FLOATS))
sizes = st.one_of(st.sampled_from([0, 1, 65535, 65536, 65537, 150_001]), st.integers(0, 200))
kinds = st.sampled_from(KINDS)


def words_of(kind: str, width: int, n: int, seed: int) -> Words:
    return content(kind, FLOATS[width], n, seed).view(f"<u{width}")


def both(call) -> np.ndarray:
    """What `call` gives for both implementations, which must agree."""
    first, second = (call(kernels) for kernels in BOTH)
    assert first.tobytes() == second.tobytes()
    return first


@settings(max_examples=60, deadline=None)
@given(kind=kinds, width=widths, n=sizes, seed=st.integers(0, 9))
def test_split_and_merge(kind, width, n, seed):
    words = words_of(kind, width, n, seed)

    def split(kernels: Kernels) -> np.ndarray:
        planes = np.empty(words.nbytes, np.uint8)
        kernels.split(words, planes)
        return planes

    def merge(kernels: Kernels) -> np.ndarray:
        merged = np.empty_like(words)
        kernels.merge(list(planes), merged)
        return merged

    planes = both(split).reshape(width, n)
    assert planes.tobytes() == words.view(np.uint8).reshape(n, width).T.tobytes()
    assert both(merge).tobytes() == words.tobytes()


@settings(max_examples=60, deadline=None)
@given(new_kind=kinds, old_kind=kinds, width=widths, n=sizes, seed=st.integers(0, 9))
def test_split_and_merge_difference(new_kind, old_kind, width, n, seed):
    new = words_of(new_kind, width, n, seed)
    old = words_of(old_kind, width, n, seed + 10)

    def split(kernels: Kernels) -> np.ndarray:
        planes = np.empty(new.nbytes, np.uint8)
        kernels.split_difference(new, old, planes)
        return planes

    def merge(kernels: Kernels) -> np.ndarray:
        words = old.copy()
        kernels.merge_difference(list(planes), words)
        return words

    planes = both(split).reshape(width, n)
    assert both(merge).tobytes() == new.tobytes()


@pytest.mark.parametrize("kernels", BOTH, ids=["numpy", "numba"])
@pytest.mark.parametrize("width", sorted(FLOATS))
def test_zigzag_of_known_differences(kernels: Kernels, width: int):
    half = 1 << (8 * width - 1)
    differences = {0: 0, -1: 1, 1: 2, -2: 3, half - 1: 2 * half - 2, -half: 2 * half - 1}
    old = np.full(len(differences), 5, f"<u{width}")
    new = np.array([(5 + d) % (2 * half) for d in differences], old.dtype)
    planes = np.empty(new.nbytes, np.uint8)
    kernels.split_difference(new, old, planes)
    found = planes.reshape(width, -1).T.copy().view(old.dtype).ravel()
    assert found.tolist() == list(differences.values())


def test_compiles_without_a_cache_where_none_can_be_written(monkeypatch):
    asked = []

    class Numba:
        @staticmethod
        def void(*types):
            return types

        @staticmethod
        def njit(signature, *, nogil, error_model, cache=False):
            asked.append(cache)
            if cache:
                raise RuntimeError("cannot cache function: no locator available")
            return lambda loop: loop

    monkeypatch.setattr(numba_kernels, "_numba", Numba)
    assert numba_kernels._compile(print) is print
    assert asked == [True, False]


@settings(max_examples=60, deadline=None)
@given(kind=kinds, width=st.sampled_from([2, 4]), n=sizes, seed=st.integers(0, 9))
def test_split_and_merge_floats(kind, width, n, seed):
    words = words_of(kind, width, n, seed)

    def split(kernels: Kernels) -> np.ndarray:
        planes = np.empty(words.nbytes, np.uint8)
        kernels.split_floats(words, planes)
        return planes

    def merge(kernels: Kernels) -> np.ndarray:
        merged = np.empty_like(words)
        kernels.merge_floats(list(planes), merged)
        return merged

    planes = both(split).reshape(width, n)
    bits = 8 * width
    exponent = (words >> words.dtype.type(bits - 9)).astype(np.uint8)
    sign = (words >> words.dtype.type(bits - 1)).astype(np.uint8)
    assert planes[-1].tobytes() == exponent.tobytes()
    assert (planes[-2] >> 7).tobytes() == sign.tobytes()
    assert both(merge).tobytes() == words.tobytes()
