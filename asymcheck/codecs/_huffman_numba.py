"""Decoder of zstd frames that hold Huffman codes alone, several symbols a look-up.

The frames are those of `_zstd.HUFFMAN`: blocks of Huffman-coded literals without sequences, or raw,
or of one byte (RFC 8878, 3.1.1.2 to 4.2). A table of 2^11 entries has for the next 11 bits, the
longest code of a literal, all the symbols that they complete, at most eight, and four streams are
decoded side by side: for codes of 1 to 4 bits that is 2 to 1.2 times as fast as zstd, for longer
ones not. Whatever else is found, damage included, is left to zstd.

Streams are read and written by 8 bytes at once, without bounds checks of the compiler. That none
is out of bounds rests on three facts: a load ends at the last unread bit of a stream and begins at
most 8 bytes before the stream, where there are headers of more bytes; a round of look-ups begins
only if the output of its stream has room for all symbols that its entries could hold; and an index
of 11 bits is one of the table. Everything else indexes arrays, whose bounds are checked here.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

_numba: Any = importlib.import_module("numba")  # has no types
_extending: Any = importlib.import_module("numba.extending")
_ir: Any = importlib.import_module("llvmlite.ir")
_inline: Any = _extending.register_jitable

_u8, _u32, _u64, _i64 = np.uint8, np.uint32, np.uint64, np.int64

_CODE_BITS = 11
_ENTRIES = 1 << _CODE_BITS
_SYMBOLS = 8  # of an entry, at most
LOOKUPS = 5
"""Before bits are loaded again: 55 at most, and a load of 8 bytes has 57 that are unread."""
_ROUND_BITS = LOOKUPS * _CODE_BITS
_ROUND_SYMBOLS = LOOKUPS * _SYMBOLS

_INDEX = _u64(64 - _CODE_BITS)  # the shift that leaves the next bits of a word
_BYTE, _SIX_BITS, _SEVEN = _u64(0xFF), _u64(63), _i64(7)
_TO_FIRST, _TO_NUMBER = _u64(8), _u64(16)  # within a move
_POSITION = ~_u64(0xFFFF)
_NOT_FIRST = _u32(0xFFFF00FF)


@_extending.intrinsic
def _load8(_context: Any, address: Any) -> Any:  # pragma: no cover
    """The 8 bytes at an address of any alignment, little-endian."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _ir.IntType(64).as_pointer())
        return builder.load(pointer, align=1)

    return _numba.uint64(_numba.int64), generate


@_extending.intrinsic
def _store8(_context: Any, address: Any, value: Any) -> Any:  # pragma: no cover
    """Write 8 bytes to an address of any alignment."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _ir.IntType(64).as_pointer())
        builder.store(arguments[1], pointer, align=1)
        return context.get_dummy_value()

    return _numba.void(_numba.int64, _numba.uint64), generate


# -- the description of a code (RFC 8878, 4.2.1) -------------------------------------------------


@_inline
def _little_endian(data: Any, at: Any, n: Any) -> Any:  # pragma: no cover
    value = _i64(0)
    for k in range(n):
        value |= _i64(data[at + k]) << (8 * k)
    return value


@_inline
def _bits(data: Any, begin: Any, end: Any, bit: Any) -> Any:  # pragma: no cover
    """The 16 bits from `bit` on of data[begin:end]; zeros where there are none."""
    value = _i64(0)
    at = begin + (bit >> 3)
    for k in range(3):
        if begin <= at + k < end:
            value |= _i64(data[at + k]) << (8 * k)
    return (value >> (bit & 7)) & 0xFFFF


@_inline
def _bits_before_mark(data: Any, begin: Any, end: Any) -> Any:  # pragma: no cover
    """The length of a stream that is read backwards, from below its highest bit; −1 if none."""
    if end <= begin or data[end - 1] == 0:
        return _i64(-1)
    bits = _i64(8 * (end - begin) - 8)
    last = data[end - 1]
    while last > 1:
        last >>= 1
        bits += 1
    return bits


@_inline
def _read_frequencies(data: Any, begin: Any, end: Any, norm: Any) -> Any:  # pragma: no cover
    """Fill `norm`; where the states begin, and the logarithm of their number, 0 if damaged."""
    log = (_i64(data[begin]) & 15) + 5
    if log > 6:
        return begin, _i64(0)
    bit, symbol = _i64(4), _i64(0)
    remaining = (_i64(1) << log) + 1
    threshold, width = _i64(1) << log, log + 1
    while remaining > 1:
        if symbol >= norm.size:
            return begin, _i64(0)
        most = 2 * threshold - 1 - remaining
        value = _bits(data, begin, end, bit)
        count = value & (threshold - 1)
        bit += width - 1
        if count >= most:
            count = value & (2 * threshold - 1)
            bit += 1
            if count >= threshold:
                count -= most
        count -= 1
        norm[symbol] = count
        symbol += 1
        remaining -= abs(count)
        repeat = _i64(3) if count == 0 else _i64(0)
        while repeat == 3 and symbol < norm.size:
            repeat = _bits(data, begin, end, bit) & 3
            bit += 2
            symbol += repeat
        while remaining < threshold:
            width -= 1
            threshold >>= 1
    return begin + ((bit + 7) >> 3), log


@_inline
def _fill_states(  # pragma: no cover
    norm: Any, mask: Any, symbols: Any, widths: Any, bases: Any
) -> None:
    """What each state stands for, and how many bits lead from which base to the next one."""
    last = mask
    for symbol in range(norm.size):
        if norm[symbol] < 0:
            symbols[last] = symbol
            last -= 1
    step, at = ((mask + 1) >> 1) + ((mask + 1) >> 3) + 3, _i64(0)
    for symbol in range(norm.size):
        for _ in range(norm[symbol]):
            symbols[at] = symbol
            at = (at + step) & mask
            while at > last:
                at = (at + step) & mask
    for state in range(mask + 1):
        symbol = symbols[state]
        following = abs(norm[symbol])
        norm[symbol] = following + 1
        while (following << widths[state]) <= mask:
            widths[state] += 1
        bases[state] = (following << widths[state]) - mask - 1


@_inline
def _read_compressed(data: Any, begin: Any, end: Any, weights: Any) -> Any:  # pragma: no cover
    """Weights that are coded by a finite state entropy code; their number, 0 if damaged."""
    norm = np.zeros(16, _i64)
    stream, log = _read_frequencies(data, begin, end, norm)
    bit = _bits_before_mark(data, stream, end)
    if log == 0 or bit < 2 * log:
        return _i64(0)
    mask = (_i64(1) << log) - 1
    symbols, widths, bases = np.zeros(64, _u8), np.zeros(64, _i64), np.zeros(64, _i64)
    _fill_states(norm, mask, symbols, widths, bases)
    bit -= log
    now = _bits(data, stream, end, bit) & mask
    bit -= log
    other = _bits(data, stream, end, bit) & mask
    for n in range(254):
        weights[n] = symbols[now]
        bit -= widths[now]
        if bit < 0:
            weights[n + 1] = symbols[other]
            return n + 2
        value = _bits(data, stream, end, bit) & ((_i64(1) << widths[now]) - 1)
        now, other = other, bases[now] + value
    return _i64(0)


@_inline
def _read_direct(data: Any, begin: Any, n: Any, weights: Any) -> Any:  # pragma: no cover
    """Weights of 4 bits each."""
    for i in range(n):
        pair = data[begin + (i >> 1)]
        weights[i] = pair & 15 if i & 1 else pair >> 4
    return n


@_inline
def _read_weights(data: Any, at: Any, end: Any, weights: Any) -> Any:  # pragma: no cover
    """Fill `weights`; where their description ends and the longest code, 0 if damaged."""
    for symbol in range(weights.size):
        weights[symbol] = 0
    head = _i64(data[at])
    at += 1
    stop = at + (head if head < 128 else (head - 126) >> 1)
    if stop > end or head == 0:
        return stop, _i64(0)
    if head < 128:
        n = _read_compressed(data, at, stop, weights)
    else:
        n = _read_direct(data, at, head - 127, weights)
    total = _i64(0)
    for i in range(n):
        if weights[i] > _CODE_BITS:
            return stop, _i64(0)
        total += (_i64(1) << weights[i]) >> 1
    longest = _i64(0)
    while (_i64(1) << longest) <= total:
        longest += 1
    missing = (_i64(1) << longest) - total
    if total == 0 or longest > _CODE_BITS or missing & (missing - 1):
        return stop, _i64(0)
    while (_i64(1) << weights[n]) >> 1 < missing:
        weights[n] += 1
    return stop, longest


# -- the table -----------------------------------------------------------------------------------


@_inline
def _fill_table(weights: Any, longest: Any, symbols: Any, moves: Any) -> Any:  # pragma: no cover
    """Fill `symbols` and `moves` for each index; False if there is no such code.

    A move is the number of bits of all symbols, that of the first (bits 8 to 15) and how many they
    are (from bit 16 on). What follows a first symbol are the symbols that fewer bits complete;
    those of r bits are kept at 2^r, and found from those of fewer bits in turn. If a symbol has a
    code of a single bit, at most 7 bits after the first count, since more could complete too many.
    """
    begins = np.zeros(_CODE_BITS + 3, _i64)  # of each weight in `ordered`
    for weight in weights:
        if weight:
            begins[weight + 1] += 1
    if begins[2] < 2:
        return False
    for weight in range(1, begins.size):
        begins[weight] += begins[weight - 1]
    ordered = np.empty(256, _u64)
    places = begins.copy()
    for symbol in range(256):
        if weights[symbol]:
            ordered[places[weights[symbol]]] = symbol
            places[weights[symbol]] += 1

    code = (ordered, begins, longest)
    later_symbols, later_moves = np.empty(_ENTRIES, _u64), np.empty(_ENTRIES, _u32)
    later = (later_symbols, later_moves)
    later_symbols[1], later_moves[1] = 0, 0
    one_bit = begins[longest] < begins[longest + 1]
    for bits in range(1, _CODE_BITS - (0 if one_bit else 1)):
        if one_bit and bits > _SYMBOLS - 1:
            for index in range(_i64(1) << bits, _i64(2) << bits):
                later_symbols[index] = later_symbols[index >> 1]
                later_moves[index] = later_moves[index >> 1]
        else:
            _fill_entries(code, bits, later, later_symbols, later_moves, _i64(1) << bits)
    _fill_entries(code, _CODE_BITS, later, symbols, moves, _i64(0))
    return True


@_inline
def _fill_entries(  # pragma: no cover
    code: Any, bits: Any, later: Any, symbols: Any, moves: Any, at: Any
) -> None:
    """The entries of all indices of `bits` bits, to `at`; codes ascend with weight and symbol."""
    ordered, begins, longest = code
    later_symbols, later_moves = later
    first_weight = max(longest + 1 - bits, 1)
    incomplete = _i64(1) << bits
    for weight in range(first_weight, longest + 1):
        incomplete -= (begins[weight + 1] - begins[weight]) << (bits + weight - longest - 1)
    for index in range(at, at + incomplete):
        symbols[index], moves[index] = 0, 0
    at += incomplete
    for weight in range(first_weight, longest + 1):
        length = longest + 1 - weight
        span = _i64(1) << (bits - length)
        move = _u32(1 << 16 | length << 8 | length)
        for k in range(begins[weight], begins[weight + 1]):
            symbol = ordered[k]
            if span < 8:  # vectors would cost more than they save
                for index in range(span):
                    symbols[at + index] = later_symbols[span + index] << _u64(8) | symbol
                    moves[at + index] = (later_moves[span + index] & _NOT_FIRST) + move
            else:
                for index in range(span):
                    symbols[at + index] = later_symbols[span + index] << _u64(8) | symbol
                for index in range(span):
                    moves[at + index] = (later_moves[span + index] & _NOT_FIRST) + move
            at += span


# -- streams -------------------------------------------------------------------------------------


@_inline
def _next_bits(stream: Any, left: Any) -> Any:  # pragma: no cover
    """At least 57 bits, highest first, below the last of `left` unread ones.

    `stream` is the address 8 bytes before the stream.
    """
    return _load8(stream + ((left + _SEVEN) >> 3)) << _u64(-left & _SEVEN)


@_inline
def _next_word(stream: Any, left: Any) -> Any:  # pragma: no cover
    """The next 64 bits."""
    shift = _u64(-left & _SEVEN)
    before = _load8(stream - 8 + ((left + _SEVEN) >> 3)) >> _u64(1) >> (_u64(63) - shift)
    return _next_bits(stream, left) | before


@_inline
def _look_up(
    word: Any, position: Any, out: Any, symbols: Any, moves: Any
) -> Any:  # pragma: no cover
    """Write the next symbols; the word and the position after them.

    A position is at·2^16 + the bits that were used of the word, so that moves can be added to it.
    """
    index = word >> _INDEX
    move = _u64(moves[index])
    _store8(out + _i64(position >> _TO_NUMBER), symbols[index])
    return word << (move & _SIX_BITS), position + move


@_inline
def _refilled(word: Any, following: Any, position: Any, left: Any) -> Any:  # pragma: no cover
    """The word with the bits that follow it, the position with none used, and what is left."""
    word |= following >> (-position & _SIX_BITS)
    return word, position & _POSITION, left - _i64(position & _BYTE)


@_inline
def _decode_four(  # pragma: no cover
    data: Any,
    begins: Any,
    left: Any,
    content: Any,
    at: Any,
    ends: Any,
    symbols: Any,
    moves: Any,
    lookups: Any,
) -> Any:
    """Decode four streams until one is near its end: from `left` bits, to `at` and up to `ends`.

    Each stream has a word of 64 unread bits; the bits that follow are loaded before they are
    needed, and so do not make the next look-up wait. `lookups` is `LOOKUPS`; a constant would be
    unrolled, and lack registers.
    """
    out = _i64(content.ctypes.data)
    source = _i64(data.ctypes.data) - 8
    s0, s1, s2, s3 = source + begins[0], source + begins[1], source + begins[2], source + begins[3]
    l0, l1, l2, l3 = left[0], left[1], left[2], left[3]
    p0, p1 = _u64(at[0]) << _TO_NUMBER, _u64(at[1]) << _TO_NUMBER
    p2, p3 = _u64(at[2]) << _TO_NUMBER, _u64(at[3]) << _TO_NUMBER
    if min(min(l0, l1), min(l2, l3)) < 64:
        return
    w0, w1 = _next_word(s0, l0), _next_word(s1, l1)
    w2, w3 = _next_word(s2, l2), _next_word(s3, l3)
    while True:
        room = min(
            min(ends[0] - _i64(p0 >> _TO_NUMBER), ends[1] - _i64(p1 >> _TO_NUMBER)),
            min(ends[2] - _i64(p2 >> _TO_NUMBER), ends[3] - _i64(p3 >> _TO_NUMBER)),
        )
        bits = min(min(l0, l1), min(l2, l3)) - 64
        rounds = min(room // _ROUND_SYMBOLS, bits // _ROUND_BITS)
        if rounds < 1:
            break
        for _ in range(rounds):
            n0, n1 = _next_bits(s0 - 8, l0), _next_bits(s1 - 8, l1)
            n2, n3 = _next_bits(s2 - 8, l2), _next_bits(s3 - 8, l3)
            for _ in range(lookups):
                w0, p0 = _look_up(w0, p0, out, symbols, moves)
                w1, p1 = _look_up(w1, p1, out, symbols, moves)
                w2, p2 = _look_up(w2, p2, out, symbols, moves)
                w3, p3 = _look_up(w3, p3, out, symbols, moves)
            w0, p0, l0 = _refilled(w0, n0, p0, l0)
            w1, p1, l1 = _refilled(w1, n1, p1, l1)
            w2, p2, l2 = _refilled(w2, n2, p2, l2)
            w3, p3, l3 = _refilled(w3, n3, p3, l3)
    left[0], left[1], left[2], left[3] = l0, l1, l2, l3
    at[0], at[1] = _i64(p0 >> _TO_NUMBER), _i64(p1 >> _TO_NUMBER)
    at[2], at[3] = _i64(p2 >> _TO_NUMBER), _i64(p3 >> _TO_NUMBER)


@_inline
def _decode_one(  # pragma: no cover
    data: Any, begin: Any, left: Any, content: Any, at: Any, end: Any, symbols: Any, moves: Any
) -> Any:
    """Decode the rest of a stream; whether it ends where it should."""
    out = _i64(content.ctypes.data)
    stream = _i64(data.ctypes.data) + begin - 8
    while left >= _ROUND_BITS and at <= end - _ROUND_SYMBOLS:
        word, position = _next_bits(stream, left), _u64(at) << _TO_NUMBER
        for _ in range(LOOKUPS):
            word, position = _look_up(word, position, out, symbols, moves)
        left -= _i64(position & _BYTE)
        at = _i64(position >> _TO_NUMBER)
    while left > 0 and at < end:
        index = _next_bits(stream, left) >> _INDEX
        content[at] = symbols[index] & _BYTE
        left -= _i64((_u64(moves[index]) >> _TO_FIRST) & _BYTE)
        at += 1
    return left == 0 and at == end


@_inline
def _decode_streams(  # pragma: no cover
    data: Any,
    begin: Any,
    end: Any,
    content: Any,
    at: Any,
    n: Any,
    four: Any,
    symbols: Any,
    moves: Any,
    lookups: Any,
) -> Any:
    """Decode n literals; False if damaged (RFC 8878, 3.1.1.3.1.6)."""
    if not four:
        left = _bits_before_mark(data, begin, end)
        return _decode_one(data, begin, left, content, at, at + n, symbols, moves)
    quarter = (n + 3) >> 2
    if end - begin < 10 or 3 * quarter >= n:
        return False
    begins, lefts = np.empty(5, _i64), np.empty(4, _i64)
    ats, ends = np.empty(4, _i64), np.empty(4, _i64)
    begins[0] = begin + 6
    for k in range(3):
        begins[k + 1] = begins[k] + _little_endian(data, begin + 2 * k, 2)
    begins[4] = end
    if begins[3] >= end:
        return False
    for k in range(4):
        lefts[k] = _bits_before_mark(data, begins[k], begins[k + 1])
        ats[k] = at + k * quarter
        ends[k] = min(at + n, ats[k] + quarter)
    _decode_four(data, begins, lefts, content, ats, ends, symbols, moves, lookups)
    for k in range(4):
        if not _decode_one(data, begins[k], lefts[k], content, ats[k], ends[k], symbols, moves):
            return False
    return True


# -- blocks --------------------------------------------------------------------------------------


def decode(  # pragma: no cover
    data: Any, at: Any, max_block_bytes: Any, content: Any, lookups: Any
) -> Any:
    """Fill `content` from the blocks of a frame, which begin at `at`, after its header.

    To be compiled. False: they hold something else, or do not end with the frame, or fill more or
    less; `content` is then anything.
    """
    weights = np.empty(256, _u8)
    symbols, moves = np.empty(_ENTRIES, _u64), np.empty(_ENTRIES, _u32)
    longest = _i64(0)
    filled, last = _i64(0), _i64(0)
    while not last:
        if at + 3 > data.size:
            return False
        head = _little_endian(data, at, 3)
        last, kind, nbytes = head & 1, (head >> 1) & 3, head >> 3
        at += 3
        end = at + (1 if kind == 1 else nbytes)
        if nbytes > max_block_bytes or end > data.size:
            return False
        if kind < 2:
            if nbytes > content.size - filled:
                return False
            for k in range(nbytes):
                content[filled + k] = data[at if kind else at + k]
            filled += nbytes
            at = end
            continue
        # literals with a code of their own (kind 2) or the last one (3), and no sequences
        if kind > 2 or nbytes < 8 or data[end - 1] != 0:
            return False
        literals, form = data[at] & 3, _i64(data[at] >> 2) & 3
        header, width = (_i64(3), _i64(10)) if form < 2 else (form + 2, 4 * form + 6)
        value = _little_endian(data, at, header) >> 4
        n, coded = value & ((_i64(1) << width) - 1), value >> width
        at += header
        if at + coded != end - 1 or coded == 0 or n > min(max_block_bytes, content.size - filled):
            return False
        if literals == 2:
            at, longest = _read_weights(data, at, end - 1, weights)
            if longest == 0 or not _fill_table(weights, longest, symbols, moves):
                return False
        if literals < 2 or longest == 0:
            return False
        if not _decode_streams(
            data, at, end - 1, content, filled, n, form > 0, symbols, moves, lookups
        ):
            return False
        filled += n
        at = end
    return at == data.size and filled == content.size
