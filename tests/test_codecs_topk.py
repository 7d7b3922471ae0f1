"""What signed top-k keeps, what it loses, and that it says so."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from codec_columns import DTYPES, KINDS, changed, column, content, decoded
from hypothesis import given, settings
from hypothesis import strategies as st

from asymcheck.codecs import TopKCodec
from asymcheck.errors import CodecError

FLOAT32 = np.dtype("f4")
FLOATS = [
    dtype
    for dtype in DTYPES
    if dtype in (np.dtype("f2"), np.dtype("f4"), np.dtype("f8")) or "float8" in dtype.name
] + [np.dtype(ml_dtypes.bfloat16)]
EXACT = [
    *(dtype for dtype in DTYPES if dtype not in FLOATS),
    np.dtype(np.longdouble),
    np.dtype(ml_dtypes.int4),
    np.dtype("V3"),
]


def coded(codec: TopKCodec, new: np.ndarray, old: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Payload, and what it decodes to, in the dtype of `new`."""
    old_bytes = old.view(np.uint8)
    [payload] = codec.encode([column(new.view(np.uint8), new.dtype, old_bytes)])
    out = decoded(codec, payload, new.dtype, new.nbytes, old_bytes)
    return bytes(payload), out.view(new.dtype)


@settings(max_examples=200, deadline=None)
@given(
    dtype=st.sampled_from(FLOATS),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    n=st.integers(0, 500),
    fraction=st.sampled_from([0.001, 0.01, 0.3, 1, 1.0]),
)
def test_every_element_is_new_or_old_within_the_stated_bound(dtype, kinds, n, fraction):
    new = content(kinds[0], dtype, n, 1).view(dtype)
    old = content(kinds[1], dtype, n, 2).view(dtype)
    codec = TopKCodec(fraction)
    payload, out = coded(codec, new, old)
    bits = f"u{dtype.itemsize}"
    is_new, is_old = out.view(bits) == new.view(bits), out.view(bits) == old.view(bits)
    assert (is_new | is_old).all()
    with np.errstate(all="ignore"):
        error = np.abs(out.astype(np.float64) - new.astype(np.float64))[~is_new]
    assert error.max(initial=0) <= codec.error_bound(payload) < math.inf


def test_keeps_the_largest_changes_with_their_sign():
    old = np.arange(100, dtype=np.float32)
    new = old.copy()
    new[[3, 50, 98]] += np.array([-7, 5, 6], np.float32)
    new[[10, 20]] += np.array([2, -3], np.float32)
    payload, out = coded(TopKCodec(0.03), new, old)
    assert np.flatnonzero(out != old).tolist() == [3, 50, 98]
    assert out[[3, 50, 98]].tolist() == [-4, 55, 104]
    assert TopKCodec().error_bound(payload) == 3.0


def test_first_of_equal_changes_are_kept():
    old = np.zeros(10, np.float32)
    _, out = coded(TopKCodec(0.3), np.ones(10, np.float32), old)
    assert out.tolist() == [1] * 3 + [0] * 7


def test_what_is_not_finite_is_always_kept():
    old = np.zeros(100, np.float64)
    new = old.copy()
    new[10:60] = np.tile([np.nan, np.inf, -np.inf, 1e308, -1e308], 10)
    old[13:60:5] = -1e308  # differences beyond the largest float64
    payload, out = coded(TopKCodec(0.01), new, old)
    infinite = ~np.isfinite(new) | (new == 1e308)
    assert out[infinite].tobytes() == new[infinite].tobytes()
    assert TopKCodec().error_bound(payload) == 1e308


def test_unchanged_columns_cost_nothing():
    same = content("special", FLOAT32, 100_000).view(FLOAT32)
    payload, out = coded(TopKCodec(), same, same)
    assert out.tobytes() == same.tobytes()
    assert len(payload) < 150
    assert TopKCodec().error_bound(payload) == 0


def test_error_feedback_catches_up():
    new = content("real", FLOAT32, 1000).view(FLOAT32)
    reconstructed = np.zeros_like(new)
    bounds = []
    for _ in range(10):
        payload, reconstructed = coded(TopKCodec(0.1), new, reconstructed)
        bounds.append(TopKCodec().error_bound(payload))
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == 0
    assert reconstructed.tobytes() == new.tobytes()


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_columns_that_are_no_floats_are_exact(dtype):
    new = content("random", dtype, 500).view(dtype)
    old = changed(new.view(np.uint8), dtype).view(dtype)
    payload, out = coded(TopKCodec(), new, old)
    assert out.tobytes() == new.tobytes()
    assert TopKCodec().error_bound(payload) == 0


def test_stores_one_percent_in_about_one_percent():
    old = content("real", FLOAT32, 1 << 18, 1).view(FLOAT32)
    new = old + content("real", FLOAT32, 1 << 18, 2).view(FLOAT32)
    payload, _ = coded(TopKCodec(0.01), new, old)
    assert len(payload) < 0.013 * new.nbytes


@pytest.mark.parametrize("payload", [b"", b"\1", b"\2" + bytes(30)])
def test_bound_of_something_else_is_refused(payload):
    with pytest.raises(CodecError):
        TopKCodec().error_bound(payload)
