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

from asymcheck.codecs import DeltaCodec, PlaneCodec, RawCodec, TopKCodec, ZstdCodec, _zstd
from asymcheck.codecs.base import Codec
from asymcheck.errors import CodecError

ALL = [RawCodec(), ZstdCodec(), PlaneCodec(), DeltaCodec(), TopKCodec(0.1)]
TYPES = [np.dtype(t) for t in ("bool", "f4", "i8", "c16", ml_dtypes.bfloat16)]
FLOAT32 = np.dtype("f4")
FRAME_MAGIC = bytes.fromhex("28b52ffd")

codecs = st.sampled_from(ALL)
dtypes = st.sampled_from(TYPES)
sizes = st.sampled_from([0, 1, 40, 700])
kinds = st.sampled_from(["zeros", "real", "runs"])


def valid(codec: Codec, dtype, kind: str, n: int) -> tuple[bytes, np.ndarray]:
    """A payload and the predecessor that it is to be decoded on."""
    new = content(kind, dtype, n)
    old = changed(new, dtype)
    [payload] = codec.encode([column(new, dtype, old)])
    return bytes(payload), old


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
@given(codec=codecs, dtype=dtypes, kind=kinds, n=sizes, data=st.data())
def test_truncated(codec: Codec, dtype, kind, n, data):
    payload, old = valid(codec, dtype, kind, n)
    if payload:
        short = payload[: data.draw(st.integers(0, len(payload) - 1))]
        with pytest.raises(CodecError):
            decoded(codec, short, dtype, old.size, old)


@settings(max_examples=200, deadline=None)
@given(codec=codecs, dtype=dtypes, kind=kinds, n=sizes, tail=st.binary(min_size=1, max_size=40))
def test_extended(codec: Codec, dtype, kind, n, tail):
    payload, old = valid(codec, dtype, kind, n)
    with pytest.raises(CodecError):
        decoded(codec, payload + tail, dtype, old.size, old)


@settings(max_examples=500, deadline=None)
@given(codec=codecs, dtype=dtypes, kind=kinds, n=sizes, data=st.data())
def test_flipped_bits(codec: Codec, dtype, kind, n, data):
    payload, old = valid(codec, dtype, kind, n)
    damaged = bytearray(payload)
    head = st.integers(0, min(60, 8 * len(payload) - 1))
    anywhere = st.integers(0, 8 * len(payload) - 1)
    if payload:
        for bit in data.draw(st.lists(head | anywhere, min_size=1, max_size=4)):
            damaged[bit // 8] ^= 1 << (bit % 8)
    decodes_or_refuses(codec, bytes(damaged), dtype, old)


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
    "plane: unknown mode": (PlaneCodec(), plane_payload(*[(3, 100)] * 4, body=bytes(400))),
    "plane: unknown width": (PlaneCodec(), plane_payload(*[(0, 100)] * 5, body=bytes(500))),
    "plane: empty": (PlaneCodec(), b""),
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
            assert _zstd.decompress(memoryview(frame), nbytes) == data[:nbytes].tobytes()
