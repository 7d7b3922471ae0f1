"""What bf16, int8, rounded and excp lose, and that they say so."""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from codec_columns import DTYPES, KINDS, changed, column, content, decoded
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codecs import GOLDEN_PAYLOADS, digest_of, golden_pair, zstd_version

from asymcheck.codecs import (
    Bf16Codec,
    Column,
    ExcpCodec,
    Int8Codec,
    RoundedCodec,
    TopKCodec,
    _kmeans,
    excp,
    int8,
    rounded,
    topk,
)
from asymcheck.codecs.base import MAX_FIDELITY_NBYTES, Fidelity, LossyCodec
from asymcheck.codecs.excp import ROLES
from asymcheck.errors import CodecError

FLOAT32 = np.dtype("f4")
HALVES = [np.dtype("f2"), np.dtype(ml_dtypes.bfloat16)]
FLOATS = [*HALVES, FLOAT32, np.dtype("f8")]
COLUMNWISE = [Bf16Codec(), Int8Codec(), RoundedCodec(), RoundedCodec(0.3), RoundedCodec(1e-12)]
SPECIAL = [
    *(0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf),
    *(1.4e-45, -1e-40, 1.1754943e-38, 3.4e38, -3.4028235e38),
]


def floats(dtype: np.dtype, n: int) -> st.SearchStrategy[np.ndarray]:
    """Arrays of n elements: arbitrary bits (payloads of NaN, subnormals), or as in states."""
    bits = st.binary(min_size=n * dtype.itemsize, max_size=n * dtype.itemsize)
    real = st.builds(
        lambda kind, seed: content(kind, dtype, n, seed), st.sampled_from(KINDS), seeds
    )
    return st.one_of(bits.map(lambda b: np.frombuffer(b, np.uint8)), real).map(
        lambda data: data.view(dtype)
    )


seeds = st.integers(0, 1000)


def doubles(values: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaN
        return values.astype("f8")


def true_errors(new: np.ndarray, out: np.ndarray) -> tuple[float, float]:
    """The largest absolute and relative error, element by element and without NumPy's helpers."""
    absolute = relative = 0.0
    bits = f"u{new.itemsize}"
    for a, b, same in zip(
        doubles(new).tolist(),
        doubles(out).tolist(),
        (new.view(bits) == out.view(bits)).tolist(),
        strict=True,
    ):
        if same or a == b:
            continue
        error = abs(b - a)
        absolute = max(absolute, error)
        relative = max(relative, error / abs(a) if a else math.inf)
    return absolute, relative


def assert_states_its_true_errors(fidelity: Fidelity, new: np.ndarray, out: np.ndarray) -> None:
    bits = f"u{new.itemsize}"
    special = ~np.isfinite(doubles(new))
    assert (out.view(bits)[special] == new.view(bits)[special]).all()
    assert (fidelity.absolute, fidelity.relative) == true_errors(new, out)
    assert fidelity.absolute < math.inf


def coded(codec: LossyCodec, new: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Payload, and what it decodes to, in the dtype of `new`."""
    [payload] = codec.encode([column(new.view(np.uint8), new.dtype)])
    return bytes(payload), decoded(codec, payload, new.dtype, new.nbytes).view(new.dtype)


def triple(w: np.ndarray, m: np.ndarray, v: np.ndarray, old: np.ndarray) -> list[Column]:
    """A weight with its predecessor, and moments whose own predecessors do not matter."""
    olds = [old, np.zeros_like(m), np.zeros_like(v)]
    return [
        Column(kind, new.dtype, new.view(np.uint8), base.view(np.uint8))
        for kind, new, base in zip(ROLES, (w, m, v), olds, strict=True)
    ]


def coded_triple(codec: ExcpCodec, columns: list[Column]) -> tuple[list[bytes], list[np.ndarray]]:
    payloads = codec.encode(columns)
    outs = [Column(c.kind, c.dtype, np.full_like(c.new, 0xA5), c.old) for c in columns]
    codec.decode(outs, [memoryview(payload) for payload in payloads])
    return [bytes(payload) for payload in payloads], [out.new.view(out.dtype) for out in outs]


# -- every column by itself --------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    codec=st.sampled_from(COLUMNWISE),
    dtype=st.sampled_from(FLOATS),
    n=st.integers(0, 600),
    data=st.data(),
)
def test_the_stated_bound_is_the_true_error(codec: LossyCodec, dtype, n, data):
    new = data.draw(floats(dtype, n))
    payload, out = coded(codec, new)
    fidelity = codec.fidelity(payload[:MAX_FIDELITY_NBYTES])
    if dtype in codec.dtypes:
        assert not fidelity.exact
        assert_states_its_true_errors(fidelity, new, out)
    else:
        assert fidelity == Fidelity(True, 0.0, 0.0)
        assert out.tobytes() == new.tobytes()
    assert codec.error_bound(payload) == fidelity.absolute


@pytest.mark.parametrize("codec", COLUMNWISE, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_float_is_exact(codec: LossyCodec, dtype):
    new = content("random", dtype, 500).view(dtype)
    payload, out = coded(codec, new)
    lossy = dtype in (FLOATS if codec.id != "bf16" else [FLOAT32])
    assert codec.fidelity(payload).exact == (not lossy)
    if not lossy:
        assert out.tobytes() == new.tobytes()


@pytest.mark.parametrize("codec", [*COLUMNWISE], ids=repr)
def test_special_values(codec: LossyCodec):
    new = np.array(SPECIAL * 3, np.float32)
    new[::7] = np.nan
    payload, out = coded(codec, new)
    assert_states_its_true_errors(codec.fidelity(payload), new, out)


def test_bf16_is_what_ml_dtypes_rounds_to():
    new = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    payload, out = coded(Bf16Codec(), new)
    with np.errstate(all="ignore"):
        expected = new.astype(ml_dtypes.bfloat16).astype(np.float32)
    kept = ~np.isfinite(expected)
    assert np.array_equal(out[~kept], expected[~kept])
    assert out[kept].tobytes() == new[kept].tobytes()
    normal = np.isfinite(new) & (np.abs(new) >= np.finfo(np.float32).tiny)
    assert true_errors(new[normal], out[normal])[1] <= 2**-8
    assert len(payload) < new.nbytes


def test_bf16_is_half_and_less():
    new = content("real", FLOAT32, 1 << 18).view(FLOAT32)
    payload, _ = coded(Bf16Codec(), new)
    assert len(payload) < 0.35 * new.nbytes


def test_int8_errs_by_half_a_step_of_its_block():
    rng = np.random.default_rng(0)
    scale = np.repeat(10.0 ** rng.integers(-20, 20, 40), int8.BLOCK)
    new = (rng.normal(0, 1, scale.size) * scale).astype(np.float32)[:-100]
    payload, out = coded(Int8Codec(), new)
    for start in range(0, new.size, int8.BLOCK):
        block = slice(start, start + int8.BLOCK)
        largest = float(np.abs(new[block]).max())
        assert np.abs(out[block].astype("f8") - new[block]).max() <= 1.001 * largest / 254
    assert len(payload) < 0.27 * new.nbytes


def test_int8_has_no_subnormal_scale():
    new = np.full(300, 1e-37, np.float32)
    payload, out = coded(Int8Codec(), new)
    assert not out.any()
    assert Int8Codec().error_bound(payload) == new[0]


@pytest.mark.parametrize(
    ("bound", "bits"),
    [(0.49, 1), (0.25, 1), (0.2499, 2), (2**-9, 8), (2**-16, 15), (2**-24, 23), (1e-300, 996)],
)
def test_rounded_leaves_as_few_bits_as_the_bound_allows(bound: float, bits: int):
    assert rounded._bits_for(bound) == bits
    assert 2.0 ** -(bits + 1) <= bound < 2.0**-bits


@settings(max_examples=200, deadline=None)
@given(
    bound=st.floats(0, 0.5, exclude_min=True, exclude_max=True),
    dtype=st.sampled_from(FLOATS),
    data=st.data(),
)
def test_rounded_holds_its_bound_for_every_element(bound: float, dtype, data):
    new = data.draw(floats(dtype, 300))
    payload, out = coded(RoundedCodec(bound), new)
    assert true_errors(new, out)[1] <= bound
    assert RoundedCodec().fidelity(payload).relative <= bound
    zeros = doubles(new) == 0
    assert np.array_equal(np.signbit(out[zeros]), np.signbit(new[zeros]))


def test_rounded_planes_code_away():
    new = content("real", FLOAT32, 1 << 18).view(FLOAT32)
    sizes = [len(coded(RoundedCodec(bound), new)[0]) / new.nbytes for bound in (2**-16, 2**-8)]
    assert sizes[0] < 0.6
    assert sizes[1] < 0.35


# -- excp --------------------------------------------------------------------------------------


def adam_states(steps: int, n: int = 4096, dtype=np.float32):
    """Weight and moments of a made-up training, step by step."""
    rng = np.random.default_rng(0)
    w, m, v = rng.normal(0, 0.02, n), np.zeros(n), np.zeros(n)
    size = 10.0 ** rng.uniform(-5, -2, n)
    for step in range(1, steps + 1):
        gradient = size * rng.normal(0.3, 1, n)
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        update = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        w = w - 1e-4 * update
        yield tuple(x.astype(dtype) for x in (w, m, v))


@settings(max_examples=200, deadline=None)
@given(
    codec=st.builds(
        ExcpCodec,
        st.sampled_from([5e-5, 1e-12, 1e6]),
        st.sampled_from([2.0, 1e-9]),
        st.sampled_from([1, 2, 4, 8]),
    ),
    dtypes=st.tuples(*[st.sampled_from([*HALVES, FLOAT32])] * 3),
    n=st.integers(0, 300),
    data=st.data(),
)
def test_excp_states_its_true_errors(codec: ExcpCodec, dtypes, n, data):
    news = [data.draw(floats(dtype, n)) for dtype in dtypes]
    columns = triple(*news, data.draw(floats(dtypes[0], n)))
    payloads, outs = coded_triple(codec, columns)
    for payload, new, out in zip(payloads, news, outs, strict=True):
        fidelity = codec.fidelity(payload[:MAX_FIDELITY_NBYTES])
        assert fidelity.exact == (n == 0)
        assert_states_its_true_errors(fidelity, new, out)


def test_excp_keeps_what_the_thresholds_say():
    rng = np.random.default_rng(1)
    n = 5001
    old, m, v = (rng.normal(0, 1, n).astype(np.float32) for _ in range(3))
    w, v = (old + rng.normal(0, 0.01, n)).astype(np.float32), v**2 / 1e8
    _, (out_w, out_m, out_v) = coded_triple(ExcpCodec(bits=8), triple(w, m, v, old))
    d = np.abs(w - old)
    kept = d > min(2.5, 5e-5 / math.sqrt(v.mean())) * np.median(d)
    assert 0.1 < kept.mean() < 0.9
    assert np.array_equal(out_w != old, kept)
    assert np.abs(out_w - w)[kept].mean() < 0.0002
    both = kept & (np.abs(m) > 2 * np.abs(m).mean())
    assert np.array_equal(out_m != 0, both)
    assert np.array_equal(out_v != 0, both)
    assert len(np.unique(out_m)) <= 256


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        (["params"], FLOAT32),
        (["params", "exp_avg"], FLOAT32),
        (["params", "exp_avg", "momentum"], FLOAT32),
        (["params", "params", "exp_avg", "exp_avg_sq"], FLOAT32),
        (ROLES, np.dtype("f8")),
        (ROLES, np.dtype("i4")),
        (ROLES, np.dtype("c16")),
    ],
)
def test_a_group_without_all_three_is_exact(kinds, dtype):
    news = [content("real", dtype, 300, seed) for seed in range(len(kinds))]
    columns = [
        Column(k, dtype, new, changed(new, dtype)) for k, new in zip(kinds, news, strict=True)
    ]
    payloads, outs = coded_triple(ExcpCodec(), columns)
    assert all(ExcpCodec().fidelity(payload).exact for payload in payloads)
    assert [out.tobytes() for out in outs] == [new.tobytes() for new in news]


def test_other_columns_of_a_group_are_exact():
    w, m, v = next(adam_states(1))
    steps = np.arange(w.size)
    extra = Column("step", steps.dtype, steps.view(np.uint8), np.zeros(steps.nbytes, np.uint8))
    payloads, outs = coded_triple(ExcpCodec(), [extra, *triple(w, m, v, np.zeros_like(w))])
    assert [ExcpCodec().fidelity(p).exact for p in payloads] == [True, False, False, False]
    assert np.array_equal(outs[0], steps)


def test_columns_of_excp_decode_alone_and_over_their_predecessors():
    (old, *_), (w, m, v) = adam_states(2)
    columns = triple(w, m, v, old)
    payloads, outs = coded_triple(ExcpCodec(), columns)
    for col, payload, out in zip(columns, payloads, outs, strict=True):
        place = col.old.copy()
        ExcpCodec().decode([Column("any", col.dtype, place, place)], [memoryview(payload)])
        assert place.tobytes() == out.tobytes()


def test_excp_is_small():
    (old, *_), (w, m, v) = adam_states(2, 1 << 18)
    payloads, _ = coded_triple(ExcpCodec(), triple(w, m, v, old))
    assert sum(map(len, payloads)) < 0.08 * 3 * w.nbytes


@pytest.mark.parametrize("codec", [TopKCodec(0.1), ExcpCodec()], ids=lambda codec: codec.id)
def test_error_feedback_does_not_drift(codec):
    """Twenty steps in one direction: what is left out is caught up with, not added up."""
    reconstructed: np.ndarray | None = None
    errors: list[float] = []
    for w, m, v in adam_states(20):
        if reconstructed is None:
            reconstructed = first = w
            continue
        payloads, outs = coded_triple(codec, triple(w, m, v, reconstructed))
        reconstructed = outs[0]
        errors.append(true_errors(w, reconstructed)[0])
        assert codec.error_bound(payloads[0]) == errors[-1]
    assert max(errors[10:]) < 1.5 * max(errors[:10])
    assert errors[-1] < 0.5 * np.abs(w - first).max()


# -- k-means -----------------------------------------------------------------------------------


def test_kmeans_finds_separate_clusters():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(c, 0.01, 500) for c in (-3, 1, 7)]).astype(np.float32)
    found = _kmeans.centres(rng.permutation(values), 3)
    assert np.allclose(found, [-3, 1, 7], atol=0.01)
    assert np.array_equal(np.bincount(_kmeans.nearest(values, found)), [500] * 3)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=50), seeds)
def test_kmeans_depends_on_the_values_only(values, seed):
    array = np.array(values, np.float32)
    found = _kmeans.centres(array, 15)
    assert (np.diff(found) >= 0).all()
    assert np.isfinite(found).all()
    again = _kmeans.centres(np.random.default_rng(seed).permutation(array), 15)
    assert again.tobytes() == found.tobytes()
    distances = np.abs(array[:, None].astype("f8") - found.astype("f8"))
    chosen = _kmeans.nearest(array, found)
    assert np.array_equal(distances[np.arange(array.size), chosen], distances.min(1, initial=1e99))


# -- the check after encoding ------------------------------------------------------------------


class _Wrong(Int8Codec):
    """Decodes to something else than it said when it encoded."""

    def restore(self, body, n, dtype):
        words = super().restore(body, n, dtype)
        words[-1] += 1 << 20
        return words


def test_a_payload_that_does_not_hold_its_bound_is_not_given_out():
    new = content("real", FLOAT32, 300)
    with pytest.raises(CodecError, match="'int8' does not hold the bound"):
        _Wrong().encode([column(new, FLOAT32)])


def test_a_wrong_exact_payload_is_not_given_out(monkeypatch):
    new = content("real", FLOAT32, 300)
    monkeypatch.setattr(excp.plane_payload, "decode_difference", lambda payload, words: None)
    with pytest.raises(CodecError, match="'excp' does not hold"):
        ExcpCodec().encode([column(new, FLOAT32, np.zeros_like(new))])


def test_top_k_is_checked_too(monkeypatch):
    new = content("real", FLOAT32, 300)
    monkeypatch.setattr(topk, "replace_kept", lambda words, count, gaps, kept: None)
    with pytest.raises(CodecError, match="'topk' does not hold"):
        TopKCodec().encode([column(new, FLOAT32, np.zeros_like(new))])


def test_a_rounding_beyond_the_parameter_is_not_given_out(monkeypatch):
    new = content("real", FLOAT32, 300)
    monkeypatch.setattr(rounded, "_bits_for", lambda bound: 3)
    with pytest.raises(CodecError, match="relative bound"):
        RoundedCodec(1e-3).encode([column(new, FLOAT32)])


# -- golden payloads ---------------------------------------------------------------------------

GOLDEN_JOINT = {
    "encoded": "45dcdd107827c9a4",
    "params": "f3537b8b839b3e38",
    "exp_avg": "9c4895ae4312171f",
    "exp_avg_sq": "826ca1006678451d",
}


def golden_triple(n: int) -> list[Column]:
    """A weight with changes of few units in the last place, and two moments."""
    new, old = golden_pair(n)
    m = golden_pair(2 * n)[0].view(np.float32)[n:] * np.float32(2**-10)
    v = m * m
    return triple(new.view(np.float32), m, v, old.view(np.float32))


def golden_joint(role: str) -> Path:
    return GOLDEN_PAYLOADS / f"excp.{role}"


@pytest.mark.skipif(zstd_version() != "1.5.7", reason="this digest needs zstd 1.5.7")
def test_joint_encoding_has_not_changed():
    payloads, _ = coded_triple(ExcpCodec(), golden_triple(100_003))
    assert digest_of(b"".join(payloads)) == GOLDEN_JOINT["encoded"]


@pytest.mark.parametrize("role", ROLES)
def test_old_joint_payloads_still_decode(role: str):
    col = golden_triple(2003)[ROLES.index(role)]
    payload = golden_joint(role).read_bytes()
    out = decoded(ExcpCodec(), payload, FLOAT32, col.new.size, col.old)
    assert digest_of(out) == GOLDEN_JOINT[role]
    fidelity = ExcpCodec().fidelity(payload)
    assert not fidelity.exact
    assert_states_its_true_errors(fidelity, col.new.view(FLOAT32), out.view(FLOAT32))
