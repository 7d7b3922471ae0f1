"""Decodes whole and damaged frames that lie between pages which nobody may touch.

Prints how many frames were decoded. A load or store out of bounds ends the process.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import zstandard
from test_codecs_huffman import (
    OVERFULL,
    bytes_of_entropy,
    damaged,
    decode_into,
    framed,
    lopsided,
)

PROT_NONE = 0
PAGE = mmap.PAGESIZE


def guarded(nbytes: int) -> tuple[np.ndarray, int]:
    """Whole pages for that many bytes, with a protected one before and behind; their size."""
    inner = -(-nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, inner + 2 * PAGE)
    array = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    for at in (0, PAGE + inner):
        address = ctypes.c_void_p(array.ctypes.data + at)
        if libc.mprotect(address, ctypes.c_size_t(PAGE), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    return array[PAGE : PAGE + inner], inner


def decoded_frames(whole: np.ndarray, rng: np.random.Generator) -> int:
    """How often `whole`, most of the time damaged, is decoded next to either page."""
    nbytes, n_decoded = zstandard.frame_content_size(whole), 0
    source, source_nbytes = guarded(whole.size)
    target, target_nbytes = guarded(nbytes)
    for turn in range(100):
        frame = damaged(whole, rng) if turn % 3 else whole
        for before in (True, False):
            begin = 0 if before else source_nbytes - frame.size
            source[begin : begin + frame.size] = frame
            placed = source[begin : begin + frame.size]
            content = target[:nbytes] if before else target[target_nbytes - nbytes :]
            n_decoded += decode_into(content, placed)
    return n_decoded


def main() -> None:
    rng = np.random.default_rng(0)
    n_decoded = 0
    for n in (150, 900, 5000, 40_000, 140_000):
        for bits in (0.7, 1.3, 2.6, 4.5):
            n_decoded += decoded_frames(framed(bytes_of_entropy(bits, n, n)), rng)
        n_decoded += decoded_frames(framed(lopsided(9, n)), rng)
    for frame in OVERFULL:
        n_decoded += decoded_frames(frame, rng)
    print(n_decoded)


if __name__ == "__main__":
    main()
