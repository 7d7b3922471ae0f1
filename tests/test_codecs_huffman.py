"""Our decoder of Huffman-coded frames against zstd's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from asymcheck.codecs import _zstd
from asymcheck.codecs.kernels import Bytes
from asymcheck.errors import CodecError

numba_kernels = pytest.importorskip(
    "asymcheck.codecs._kernels_numba", reason="numba is not installed", exc_type=ImportError
)
KERNELS = numba_kernels.NumbaKernels()
MAX_BLOCK_BYTES = 1 << 17


def bytes_of_entropy(bits: float, n: int, seed: int = 0) -> Bytes:
    """Like exponents: around 120, with about that many bits of entropy each."""
    rng = np.random.default_rng(seed)
    spread = 2.0**bits / 4.13  # of a normal distribution, log2(4.13 spread) bits
    return np.clip(np.rint(rng.normal(120, spread, n)), 0, 255).astype(np.uint8)


def framed(data: Bytes) -> Bytes:
    return np.frombuffer(_zstd.compress(data.data, _zstd.HUFFMAN), np.uint8)


def decode_into(content: Bytes, frame: Bytes) -> bool:
    max_block_bytes = min(content.size, MAX_BLOCK_BYTES)
    begin = zstandard.frame_header_size(frame)
    return KERNELS.decode_literals(frame, begin, max_block_bytes, content)


def ours(frame: Bytes, n: int) -> Bytes | None:
    content = np.empty(n, np.uint8)
    return content if decode_into(content, frame) else None


def zstds(frame: Bytes, n: int) -> Bytes | None:
    try:
        content = zstandard.ZstdDecompressor().decompress(frame, n, allow_extra_data=False)
    except zstandard.ZstdError:
        return None
    return np.frombuffer(content, np.uint8) if len(content) == n else None


def blocks_of(frame: Bytes) -> Iterator[tuple[int, int]]:
    """Where each block begins, after its header, and its kind."""
    at, last = zstandard.frame_header_size(frame), 0
    while not last:
        head = int.from_bytes(frame[at : at + 3].tobytes(), "little")
        last, kind, nbytes = head & 1, (head >> 1) & 3, head >> 3
        yield at + 3, kind
        at += 3 + (1 if kind == 1 else nbytes)


def literals_of(frame: Bytes) -> list[tuple[int, int]]:
    """The kind of literals (2: a new code, 3: the last one) and their form, block by block."""
    return [(int(frame[at]) & 3, int(frame[at]) >> 2 & 3) for at, kind in blocks_of(frame) if kind]


@pytest.mark.parametrize("bits", [0.2, 0.7, 1.0, 1.3, 2.0, 2.6, 3.3, 4.5, 6.0, 7.2])
@pytest.mark.parametrize("n", [300, 1000, 5000, 131_072, 131_073 + 400, 600_007])
def test_planes_are_decoded_by_us(bits: float, n: int):
    data = bytes_of_entropy(bits, n)
    frame = framed(data)
    found = ours(frame, n)
    assert found is not None
    assert found.tobytes() == data.tobytes()


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(0, 3000), min_size=1, max_size=256),
    repeat=st.integers(1, 60),
    seed=st.integers(0, 3),
)
def test_any_frequencies(counts: list[int], repeat: int, seed: int):
    data = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)
    data = np.tile(np.random.default_rng(seed).permutation(data), repeat)
    if data.size:
        found = ours(framed(data), data.size)
        assert found is None or found.tobytes() == data.tobytes()


def lopsided(n_symbols: int, n: int) -> Bytes:
    """Each symbol half as often as the one before, the rarest at least twice: codes of all lengths
    up to the longest that there are."""
    counts = [max(2, n >> (k + 1)) for k in range(n_symbols)]
    data = np.repeat(np.arange(n_symbols, dtype=np.uint8), counts)
    return np.random.default_rng(0).permutation(data)


@pytest.mark.parametrize("n_symbols", [2, 3, 9, 12, 13, 40])
def test_codes_of_one_to_eleven_bits(n_symbols: int):
    data = lopsided(n_symbols, 100_000)
    found = ours(framed(data), data.size)
    assert found is not None
    assert found.tobytes() == data.tobytes()


def test_every_kind_of_block_and_literals_was_seen():
    few = np.random.default_rng(0).integers(0, 3, 400_000).astype(np.uint8)  # weights as they are
    noise = np.random.default_rng(1).integers(0, 256, 131_072).astype(np.uint8)
    same = bytes_of_entropy(2.6, 131_072)
    cases = {
        "few": few,
        "one stream": bytes_of_entropy(2.0, 200),
        "code again": np.concatenate([same, same]),
        "raw and one byte": np.concatenate([same, noise, np.full(131_072, 7, np.uint8), same]),
    }
    frames = {name: framed(data) for name, data in cases.items()}
    for name, data in cases.items():
        assert ours(frames[name], data.size).tobytes() == data.tobytes(), name
    at, _ = next(blocks_of(frames["few"]))
    assert frames["few"][at + 5] >= 128  # the description: weights of 4 bits each
    assert literals_of(frames["one stream"]) == [(2, 0)]
    assert literals_of(frames["code again"]) == [(2, 3), (3, 3)]
    assert [kind for _, kind in blocks_of(frames["raw and one byte"])] == [2, 0, 1, 2]


def test_sequences_and_checksums_are_left_to_zstd():
    text = np.frombuffer(b"the quick brown fox " * 500, np.uint8)
    frame = np.frombuffer(_zstd.compress(text.data, _zstd.at_level(3)), np.uint8)
    assert ours(frame, text.size) is None
    assert _zstd.decompress(frame.data, text.size).tobytes() == text.tobytes()
    data = bytes_of_entropy(2.6, 100_000)
    checked = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(data))
    assert _zstd.decompress(memoryview(checked), data.size).tobytes() == data.tobytes()
    checked[-1] ^= 1
    with pytest.raises(CodecError):
        _zstd.decompress(memoryview(checked), data.size)


@pytest.mark.parametrize(("bits", "n", "by_us"), [(2.6, 100_000, True), (2.6, 1000, False),
                                                  (6.0, 100_000, False)])  # fmt: skip
def test_zstd_is_taken_where_it_is_as_good(monkeypatch, bits: float, n: int, by_us: bool):
    class Library:
        calls = 0

        def decompress(self, *arguments, **options):
            self.calls += 1
            return zstandard.ZstdDecompressor().decompress(*arguments, **options)

    monkeypatch.setattr(_zstd._contexts, "decompressor", library := Library())
    monkeypatch.setattr(_zstd, "kernels", lambda: KERNELS)
    data = bytes_of_entropy(bits, n)
    assert _zstd.decompress(framed(data).data, n).tobytes() == data.tobytes()
    assert (library.calls == 0) == by_us


def test_literals_without_a_code_are_left_to_zstd():
    same = bytes_of_entropy(2.6, 131_072)
    frame, n = framed(np.concatenate([same, same])), 2 * same.size
    (first, _), (second, _) = blocks_of(frame)
    for at, kind in ((first, 3), (second, 1), (second, 0)):
        changed = frame.copy()
        changed[at] = (changed[at] & 0xFC) | kind
        assert ours(changed, n) is None
        assert zstds(changed, n) is None


def frame_of_blocks(n: int, *blocks: tuple[int, int]) -> Bytes:
    """That declares n bytes of content; blocks of a kind and a size, raw (0) or one byte (1)."""
    parts = [b"\x28\xb5\x2f\xfd\xa0" + n.to_bytes(4, "little")]
    for k, (kind, nbytes) in enumerate(blocks):
        head = int(k == len(blocks) - 1) | kind << 1 | nbytes << 3
        parts.append(head.to_bytes(3, "little") + b"x" * (1 if kind else nbytes))
    return np.frombuffer(b"".join(parts), np.uint8)


OVERFULL = [frame_of_blocks(n, (first, n), (second, n)) for n in (5000, 8192)
            for first in (0, 1) for second in (0, 1)]  # fmt: skip


def test_more_blocks_than_content_is_declared():
    assert ours(frame_of_blocks(5000, (0, 2000), (1, 3000)), 5000).tobytes() == b"x" * 5000
    for frame in OVERFULL:
        declared = zstandard.frame_content_size(frame)
        assert ours(frame, declared) is None
        assert zstds(frame, declared) is None


def damaged(frame: Bytes, rng: np.random.Generator) -> Bytes:
    """With some bytes of the first block changed, near its beginning more often, or cut."""
    frame, begin = frame.copy(), zstandard.frame_header_size(frame)
    for _ in range(rng.integers(1, 4)):
        reach = int(rng.choice([8, 40, 120, frame.size - begin]))
        at = begin + int(rng.integers(0, min(reach, frame.size - begin)))
        frame[at] ^= np.uint8(1 << rng.integers(0, 8)) if rng.random() < 0.7 else rng.integers(256)
    return frame[: rng.integers(begin, frame.size + 1)] if rng.random() < 0.1 else frame


@pytest.mark.parametrize("bits", [0.7, 1.3, 2.6, 4.5, 7.2])
@pytest.mark.parametrize("n", [200, 3000, 40_000, 140_000])
def test_damage_is_never_decoded_to_anything_else_than_zstd_gives(bits: float, n: int):
    rng = np.random.default_rng(int(10 * bits) + n)
    datas = [bytes_of_entropy(bits, n), lopsided(int(2 * bits) + 2, n)]
    frames = [framed(data) for data in datas]
    taken = 0
    for turn in range(600 if n < 100_000 else 100):
        frame, nbytes = damaged(frames[turn % 2], rng), datas[turn % 2].size
        found = ours(frame, nbytes)
        if found is not None:
            taken += 1
            expected = zstds(frame, nbytes)
            assert expected is not None
            assert found.tobytes() == expected.tobytes()
    assert taken  # some damage only changes what is decoded


GUARDED = Path(__file__).parent / "huffman_guarded.py"


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected with Linux's mprotect")
def test_nothing_is_read_or_written_beyond_the_arrays():
    run = subprocess.run([sys.executable, GUARDED], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 1000
