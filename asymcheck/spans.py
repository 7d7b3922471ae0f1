"""Which ranges of objects are read by one request, because they lie close together."""

from __future__ import annotations

from dataclasses import dataclass, field

from asymcheck.stores.base import Store


@dataclass(frozen=True, slots=True)
class Reach:
    """How far one request reaches.

    Attributes:
        gap_nbytes: so many bytes that nobody wants take no longer to read than one more request.
        alone_nbytes: from this length on a range has a request of its own, straight into place.
        span_nbytes: what one request reads at most, if it reads several ranges.
        stretch_nbytes: what one thread reads in a row at most, where that is faster.
    """

    gap_nbytes: int
    alone_nbytes: float
    span_nbytes: int
    stretch_nbytes: int


# A request costs some 20 us, in which a page cache gives 64 KiB; and copying is to be avoided.
_HERE = Reach(
    gap_nbytes=64 << 10, alone_nbytes=256 << 10, span_nbytes=1 << 20, stretch_nbytes=32 << 20
)
# It costs some 20 to 50 ms, in which a stream of 80 MB/s gives megabytes; but then many are under
# way at once and share a link, and some providers charge for what leaves them: so a tenth of that.
_GAP_FAR_NBYTES = 256 << 10


def reach_of(store: Store) -> Reach:
    """By what the store says about its requests."""
    if store.guarantees.concurrency is None:
        return _HERE
    return Reach(_GAP_FAR_NBYTES, float("inf"), store.guarantees.range_nbytes, stretch_nbytes=0)


Range = tuple[str, int, int]
"""Key, offset, length."""


@dataclass(slots=True, eq=False)
class Span:
    """Bytes [start, stop) of an object."""

    key: str
    start: int
    stop: int


@dataclass(slots=True)
class Spans:
    """Spans that hold ranges, taken in order: one that lies before the last is on its own.

    Attributes:
        nbytes: bytes of all spans.
        of_range: the span of every range (key, offset, length) that was added.
    """

    reach: Reach
    nbytes: int = 0
    of_range: dict[Range, Span] = field(default_factory=dict["Range", "Span"])
    _last: dict[str, Span] = field(default_factory=dict[str, Span])

    def add(self, key: str, offset: int, nbytes: int) -> None:
        """Have a range in a span."""
        if (key, offset, nbytes) in self.of_range:
            return
        stop = offset + nbytes
        span = self._last.get(key)
        if span is None or not self._reaches(span, offset, stop):
            span = self._last[key] = Span(key, offset, offset)
        self.nbytes += max(0, stop - span.stop)
        span.stop = max(span.stop, stop)
        self.of_range[key, offset, nbytes] = span

    def _reaches(self, span: Span, offset: int, stop: int) -> bool:
        near = span.start <= offset <= span.stop + self.reach.gap_nbytes
        return near and max(stop, span.stop) - span.start <= self.reach.span_nbytes

    def all(self) -> list[Span]:
        """Each once, in the order in which they were begun."""
        return list(dict.fromkeys(self.of_range.values()))
