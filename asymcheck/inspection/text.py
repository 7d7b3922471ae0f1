"""Numbers, names and tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(nbytes: float) -> str:
    """Bytes in the largest unit of 1024 that leaves at least 1."""
    unit = 0
    while abs(nbytes) >= 1024 and unit < len(_UNITS) - 1:
        nbytes /= 1024
        unit += 1
    return f"{nbytes:.0f} B" if unit == 0 else f"{nbytes:.1f} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """Seconds in a unit that fits: 3.2 ms, 41 s, 5 min, 7 h, 12 d."""
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.1f} ms"
    for limit, divisor, unit in ((100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h")):
        if abs(seconds) < limit:
            return f"{seconds / divisor:.1f} {unit}"
    return f"{seconds / 86400:.1f} d"


def ratio(stored_nbytes: int, raw_nbytes: int) -> str:
    """Stored to raw, in percent."""
    return f"{100 * stored_nbytes / raw_nbytes:.1f} %" if raw_nbytes else "-"


def shape(dims: Sequence[int]) -> str:
    """`[2, 3]`; `[]` for a 0-d leaf."""
    return f"[{', '.join(map(str, dims))}]"


def printable(text: str) -> str:
    """`text` with everything that could move a terminal's cursor, or hide, escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, length: int) -> str:
    """At most `length` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: str = "") -> Iterator[str]:
    """Aligned columns; those named in `left` (space-separated heads) to the left, others right."""
    if not rows:
        return
    to_left = {i for i, head in enumerate(heads) if head in left.split()}
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        cells = (
            cell.ljust(width) if i in to_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
