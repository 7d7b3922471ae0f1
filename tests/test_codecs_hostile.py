"""Payloads that nobody wrote: a typed error, no other, and no memory to speak of."""

from __future__ import annotations

import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from codec_columns import changed, column, content, decoded
from hypothesis import given, settings
from hypothesis import strategies as st

from asymcheck.codecs import (
    Bf16Codec,
    Column,
    DeltaCodec,
    ExcpCodec,
    Int8Codec,
    PlaneCodec,
    RawCodec,
    RoundedCodec,
    TopKCodec,
    ZstdCodec,
    _zstd,
)
from asymcheck.codecs.base import Codec
from asymcheck.codecs.excp import ROLES
from asymcheck.errors import CodecError

LOSSY = [TopKCodec(0.1), Bf16Codec(), Int8Codec(), RoundedCodec(0.01), ExcpCodec()]
ALL = [RawCodec(), ZstdCodec(), PlaneCodec(), DeltaCodec(), *LOSSY]
TYPES = [np.dtype(t) for t in ("bool", "f4", "i8", "c16", ml_dtypes.bfloat16)]
FLOAT32 = np.dtype("f4")
FRAME_MAGIC = bytes.fromhex("28b52ffd")

codecs = st.sampled_from(ALL)
dtypes = st.sampled_from(TYPES)
sizes = st.sampled_from([0, 1, 40, 700])
kinds = st.sampled_from(["zeros", "real", "runs", "special"])
roles = st.sampled_from(ROLES)


def valid(codec: Codec, dtype, kind: str, n: int, role: str = "params") -> tuple[bytes, np.ndarray]:
    """A payload of a weight or of one of its moments, and the predecessor to decode it on."""
    new = content(kind, dtype, n)
    old = changed(new, dtype)
    payloads = codec.encode([Column(role, dtype, new, old) for role in ROLES])
    return bytes(payloads[ROLES.index(role)]), old


def decodes_or_refuses(codec: Codec, payload: bytes, dtype, old: np.ndarray) -> None:
    try:
        decoded(codec, payload, dtype, old.size, old)
    except CodecError as error:
        assert str(error)


@settings(max_examples=300, deadline=None)
@given(codec=codecs, dtype=dtypes, n=sizes, payload=st.binary(max_size=200))
def test_arbitrary_bytes(codec: Codec, dtype, n, payload):
    decodes_or_refuses(codec, payload, dtype, content("real", dtype, n))


@settings(max_examples=200, deadline=None)
@given(codec=codecs, dtype=dtypes, kind=kinds, n=sizes, role=roles, data=st.data())
def test_truncated(codec: Codec, dtype, kind, n, role, data):
    payload, old = valid(codec, dtype, kind, n, role)
    if payload:
        short = payload[: data.draw(st.integers(0, len(payload) - 1))]
        with pytest.raises(CodecError):
            decoded(codec, short, dtype, old.size, old)


@settings(max_examples=200, deadline=None)
@given(
    codec=codecs,
    dtype=dtypes,
    kind=kinds,
    n=sizes,
    role=roles,
    tail=st.binary(min_size=1, max_size=40),
)
def test_extended(codec: Codec, dtype, kind, n, role, tail):
    payload, old = valid(codec, dtype, kind, n, role)
    with pytest.raises(CodecError):
        decoded(codec, payload + tail, dtype, old.size, old)


@settings(max_examples=500, deadline=None)
@given(codec=codecs, dtype=dtypes, kind=kinds, n=sizes, role=roles, data=st.data())
def test_flipped_bits(codec: Codec, dtype, kind, n, role, data):
    payload, old = valid(codec, dtype, kind, n, role)
    damaged = bytearray(payload)
    head = st.integers(0, min(60, 8 * len(payload) - 1))
    anywhere = st.integers(0, 8 * len(payload) - 1)
    if payload:
        for bit in data.draw(st.lists(head | anywhere, min_size=1, max_size=4)):
            damaged[bit // 8] ^= 1 << (bit % 8)
    decodes_or_refuses(codec, bytes(damaged), dtype, old)


@settings(max_examples=300, deadline=None)
@given(codec=st.sampled_from(LOSSY), head=st.binary(max_size=64))
def test_what_arbitrary_bytes_state_is_a_bound_or_refused(codec, head):
    try:
        fidelity = codec.fidelity(head)
    except CodecError:
        return
    assert 0 <= fidelity.absolute < float("inf")
    assert fidelity.relative >= 0


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.id)
def test_good_payload_after_a_bad_one(codec: Codec):
    payload, old = valid(codec, FLOAT32, "real", 700)
    expected = decoded(codec, payload, FLOAT32, old.size, old)
    with pytest.raises(CodecError):
        decoded(codec, payload[:-1], FLOAT32, old.size, old)
    assert (decoded(codec, payload, FLOAT32, old.size, old) == expected).all()


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.id)
def test_as_many_payloads_as_columns(codec: Codec):
    payload, old = valid(codec, FLOAT32, "real", 10)
    with pytest.raises(CodecError, match="as many"):
        codec.decode([column(old, FLOAT32, old)], [memoryview(payload)] * 2)


# --- absurd sizes ----------------------------------------------------------------------------


def frame_of_claimed_size(nbytes: int) -> bytes:
    """A frame header that declares that content, then one empty last block."""
    single_segment_8_byte_size = 0b1110_0000
    return FRAME_MAGIC + struct.pack("<BQ", single_segment_8_byte_size, nbytes) + b"\1\0\0"


def frame_of_claimed_window(nbytes: int, window_descriptor: int) -> bytes:
    size_of_8_bytes = 0b1100_0000
    return FRAME_MAGIC + struct.pack("<BBQ", size_of_8_bytes, window_descriptor, nbytes)


def plane_payload(*entries: tuple[int, int], body: bytes = b"") -> bytes:
    return bytes([len(entries)]) + b"".join(struct.pack("<BQ", *entry) for entry in entries) + body


def top_k_payload(count: int, gaps: bytes, kept: bytes, *, bound: float = 0.0) -> bytes:
    return struct.pack("<BdQQ", 1, bound, count, len(gaps)) + gaps + kept


def lossy_payload(
    body: bytes,
    *,
    mode: int = 1,
    absolute: float = 0.0,
    relative: float = 0.0,
    count: int = 0,
    gaps: bytes = plane_payload(*[(0, 0)] * 4),
    kept: bytes = plane_payload(*[(0, 0)] * 4),
    gap_bytes: int | None = None,
) -> bytes:
    sizes = count, len(gaps) if gap_bytes is None else gap_bytes, len(kept)
    return struct.pack("<BddQQQ", mode, absolute, relative, *sizes) + gaps + kept + body


def planes_of(words: list[int], width: int) -> bytes:
    raw = np.array(words, f"<u{width}").view(np.uint8).reshape(-1, width).T.tobytes()
    return plane_payload(*[(0, len(words))] * width, body=raw)


HUGE_FRAME = frame_of_claimed_size(1 << 40)
FAR_TOO_WIDE_FRAME = frame_of_claimed_window(400, 0xFF)  # beyond what zstd allows by itself
TOO_WIDE_FRAME = frame_of_claimed_window(400, 0x60)  # 4 MiB
ONE_KEPT = (planes_of([0], 4), planes_of([1], 4))
HOSTILE = {
    "zstd: huge content": (ZstdCodec(), HUGE_FRAME),
    "zstd: content of 2^64 - 1": (ZstdCodec(), frame_of_claimed_size((1 << 64) - 1)),
    "zstd: content of 2^64 - 2": (ZstdCodec(), frame_of_claimed_size((1 << 64) - 2)),
    "zstd: huge window": (ZstdCodec(), FAR_TOO_WIDE_FRAME),
    "zstd: window of 4 MiB": (ZstdCodec(), TOO_WIDE_FRAME),
    "zstd: skippable frame": (
        ZstdCodec(),
        b"\x50\x2a\x4d\x18" + struct.pack("<I", 400) + bytes(400),
    ),
    "zstd: less content than declared": (ZstdCodec(), frame_of_claimed_size(400)),
    "plane: huge content": (
        PlaneCodec(),
        plane_payload((1, len(HUGE_FRAME)), *[(2, 1)] * 3, body=HUGE_FRAME + b"abc"),
    ),
    "plane: huge raw plane": (PlaneCodec(), plane_payload(*[(0, 1 << 60)] * 4)),
    "plane: huge zstd plane": (PlaneCodec(), plane_payload(*[(1, 1 << 60)] * 4)),
    "plane: long constant": (PlaneCodec(), plane_payload(*[(2, 100)] * 4, body=bytes(400))),
    "plane: unknown mode": (PlaneCodec(), plane_payload(*[(4, 100)] * 4, body=bytes(400))),
    "plane: long seven bits": (PlaneCodec(), plane_payload(*[(3, 89)] * 4, body=bytes(356))),
    "plane: short seven bits": (PlaneCodec(), plane_payload(*[(3, 87)] * 4, body=bytes(348))),
    "plane: seven bits for all": (PlaneCodec(), plane_payload(*[(3, 100)] * 4, body=bytes(400))),
    "plane: unknown width": (PlaneCodec(), plane_payload(*[(0, 100)] * 5, body=bytes(500))),
    "plane: empty": (PlaneCodec(), b""),
    "plane: floats of 8 bytes": (PlaneCodec(), b"\x88" + plane_payload(*[(0, 50)] * 8)[1:]),
    "plane: floats of another width": (PlaneCodec(), b"\x82" + plane_payload(*[(0, 100)] * 2)[1:]),
    "plane: huge raw plane of floats": (
        PlaneCodec(),
        b"\x84" + plane_payload(*[(0, 1 << 60)] * 4)[1:],
    ),
    "delta: huge raw plane": (DeltaCodec(), plane_payload(*[(0, 1 << 60)] * 4)),
    "topk: huge count": (TopKCodec(), top_k_payload(1 << 40, *ONE_KEPT)),
    "topk: wrong count": (TopKCodec(), top_k_payload(2, *ONE_KEPT)),
    "topk: exact for a float": (TopKCodec(), b"\0" + planes_of([1] * 100, 4)),
    "topk: unknown mode": (TopKCodec(), b"\2" + planes_of([1] * 100, 4)),
    "topk: bound is not a number": (TopKCodec(), top_k_payload(1, *ONE_KEPT, bound=float("nan"))),
    "topk: bound is infinite": (TopKCodec(), top_k_payload(1, *ONE_KEPT, bound=float("inf"))),
    "topk: bound is negative": (TopKCodec(), top_k_payload(1, *ONE_KEPT, bound=-1.0)),
    "topk: index out of range": (TopKCodec(), top_k_payload(1, planes_of([100], 4), ONE_KEPT[1])),
    "topk: sum out of range": (
        TopKCodec(),
        top_k_payload(2, planes_of([99, 1], 4), planes_of([1, 1], 4)),
    ),
    "topk: index twice": (
        TopKCodec(),
        top_k_payload(2, planes_of([5, 0], 4), planes_of([1, 1], 4)),
    ),
}
HALVES = planes_of([1] * 100, 2)
SCALE, INTEGERS = planes_of([0x3F800000], 4), planes_of([1] * 100, 1)
CENTRES, INDICES = struct.pack("<3f", -1, 1, 2), planes_of([0b01] * 25, 1)
NAN, INFINITE = float("nan"), float("inf")


def int8_body(scales: bytes, integers: bytes, nbytes: int | None = None) -> bytes:
    return struct.pack("<Q", len(scales) if nbytes is None else nbytes) + scales + integers


def excp_payload(bits: int, centres: bytes, indices: bytes, mode: int = 1) -> bytes:
    return lossy_payload(bytes([bits]) + centres + indices, mode=mode)


HOSTILE |= {
    f"bf16: {name}": (Bf16Codec(), lossy_payload(HALVES, **claims))
    for name, claims in {
        "mode of another codec": {"mode": 2},
        "exact for a float": {"mode": 0},
        "bound is not a number": {"absolute": NAN},
        "bound is infinite": {"absolute": INFINITE},
        "bound is negative": {"absolute": -1.0},
        "relative bound is not a number": {"relative": NAN},
        "relative bound is negative": {"relative": -1.0},
        "huge count": {"count": 1 << 60},
        "wrong count": {"count": 1},
        "huge gaps": {"gap_bytes": 1 << 63},
        "index out of range": {
            "count": 1,
            "gaps": planes_of([100], 4),
            "kept": planes_of([1], 4),
        },
        "index twice": {
            "count": 2,
            "gaps": planes_of([5, 0], 4),
            "kept": planes_of([1, 1], 4),
        },
    }.items()
}
HOSTILE |= {
    "rounded: words of another width": (RoundedCodec(), lossy_payload(HALVES)),
    "int8: no body": (Int8Codec(), lossy_payload(b"")),
    "int8: huge scales": (Int8Codec(), lossy_payload(int8_body(SCALE, INTEGERS, 1 << 63))),
    "int8: too few scales": (
        Int8Codec(),
        lossy_payload(int8_body(plane_payload(*[(0, 0)] * 4), INTEGERS)),
    ),
    "int8: too few integers": (
        Int8Codec(),
        lossy_payload(int8_body(SCALE, planes_of([1] * 99, 1))),
    ),
    "int8: scale is not a number": (
        Int8Codec(),
        lossy_payload(int8_body(planes_of([0x7FC00000], 4), INTEGERS)),
    ),
    "int8: scale is negative": (
        Int8Codec(),
        lossy_payload(int8_body(planes_of([0xBF800000], 4), INTEGERS)),
    ),
    "int8: -128": (
        Int8Codec(),
        lossy_payload(int8_body(SCALE, planes_of([0x80] * 100, 1))),
    ),
    "excp: no body": (ExcpCodec(), lossy_payload(b"")),
    "excp: unknown width": (ExcpCodec(), excp_payload(3, CENTRES, INDICES)),
    "excp: huge width": (ExcpCodec(), excp_payload(255, CENTRES, INDICES)),
    "excp: ends within centres": (ExcpCodec(), excp_payload(2, CENTRES[:5], b"")),
    "excp: centre is not a number": (
        ExcpCodec(),
        excp_payload(2, struct.pack("<3f", NAN, 1, 2), INDICES),
    ),
    "excp: too few indices": (ExcpCodec(), excp_payload(2, CENTRES, planes_of([1] * 24, 1))),
    "excp: unknown mode": (ExcpCodec(), excp_payload(2, CENTRES, INDICES, mode=3)),
}


def test_the_hostile_payloads_are_only_just_wrong():
    """Their parts, put together as they should be, decode."""
    new = np.zeros(400, np.uint8)
    for codec, payload in (
        (Bf16Codec(), lossy_payload(HALVES)),
        (RoundedCodec(), lossy_payload(planes_of([1] * 100, 4))),
        (Int8Codec(), lossy_payload(int8_body(SCALE, INTEGERS))),
        (ExcpCodec(), excp_payload(2, CENTRES, INDICES)),
        (ExcpCodec(), excp_payload(2, CENTRES, INDICES, mode=2)),
    ):
        codec.decode([column(new, FLOAT32, new)], [memoryview(payload)])


def test_unused_bits_of_excp_are_refused():
    new = np.zeros(12, np.uint8)
    for last, good in ((0b00_01_01_01, True), (0b01_01_01_01, False)):
        payload = memoryview(excp_payload(2, CENTRES, planes_of([last], 1)))
        if good:
            ExcpCodec().decode([column(new, FLOAT32, new)], [payload])
        else:
            with pytest.raises(CodecError, match="unused"):
                ExcpCodec().decode([column(new, FLOAT32, new)], [payload])


@pytest.mark.parametrize(("codec", "payload"), HOSTILE.values(), ids=HOSTILE)
def test_absurd_claims_are_refused_without_allocation(codec: Codec, payload: bytes):
    new = np.full(400, 7, np.uint8)
    col = column(new, FLOAT32, new)
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            codec.decode([col], [memoryview(payload)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert (new == 7).all()


def test_frame_with_a_dictionary_is_refused():
    header = FRAME_MAGIC + struct.pack("<BBQ", 0b1110_0001, 9, 400)
    with pytest.raises(CodecError):
        decoded(ZstdCodec(), header + b"\1\0\0", FLOAT32, 400)


def test_short_content_never_reaches_a_kernel(monkeypatch):
    class Shortening:
        def decompress(self, frame, max_output_size, *, allow_extra_data):
            return bytes(max_output_size - 1)

    payload, old = valid(ZstdCodec(), FLOAT32, "real", 700)
    monkeypatch.setattr(_zstd._contexts, "decompressor", Shortening())
    with pytest.raises(CodecError, match="wrong length"):
        decoded(ZstdCodec(), payload, FLOAT32, old.size)


def test_window_of_every_level_is_within_what_decoders_allow():
    data = content("real", FLOAT32, 300_000)
    for level in (1, 3, 9, 19, _zstd.MAX_LEVEL):
        for nbytes in (1, 255, 1024, 1025, data.size):
            frame = _zstd.compress(data[:nbytes].data, _zstd.at_level(level))
            assert _zstd.decompress(memoryview(frame), nbytes).tobytes() == data[:nbytes].tobytes()
