"""What moving, encoding and writing bytes costs: t(x) = alpha + beta * x, learned while training.

Seconds and bytes throughout; x is always raw bytes going in.
"""

from __future__ import annotations

import math
import sys
import threading
from collections import deque
from typing import Annotated

import msgspec

from asymcheck.errors import FormatError
from asymcheck.linear import Line, LinearCost, check_sample
from asymcheck.puts import STREAMS, PutCost

_SAMPLES_REMEMBERED = 8
_RATIO_FORGETTING = 0.95
_RATIO_PRIOR_NBYTES = 64 << 10


class _Ratio:
    """Stored bytes per raw byte: a ratio of sums that forget, begun with the prior."""

    def __init__(self, prior: float) -> None:
        self._raw_nbytes = float(_RATIO_PRIOR_NBYTES)
        self._stored_nbytes = prior * _RATIO_PRIOR_NBYTES

    @property
    def value(self) -> float:
        return self._stored_nbytes / self._raw_nbytes

    def observe(self, raw_nbytes: int, stored_nbytes: int) -> None:
        self._raw_nbytes = _RATIO_FORGETTING * self._raw_nbytes + raw_nbytes
        self._stored_nbytes = _RATIO_FORGETTING * self._stored_nbytes + stored_nbytes


class _FastestCost:
    """Seconds per byte of the fastest of the last few samples, to begin with the prior's.

    For what is as fast as memory, but for those times when memory is touched for the first time
    or somebody else has the processor.
    """

    def __init__(self, prior: Line) -> None:
        self._s_per_byte = deque([prior.beta_s_per_byte], _SAMPLES_REMEMBERED)

    @property
    def line(self) -> Line:
        """The current estimate."""
        return Line(0.0, min(self._s_per_byte))

    def observe(self, nbytes: int, seconds: float) -> None:
        """Learn that `nbytes` bytes took `seconds`; nothing from 0 bytes."""
        check_sample(nbytes, seconds)
        if nbytes:
            self._s_per_byte.append(seconds / nbytes)


# Before anything was measured: two cores of a small server, a local disk with synced writes.
_PRIOR_COSTS = {
    "copy": Line(0.0, 1 / 8.0e9),
    "put": Line(1e-3, 1 / 0.95e9),
    "write": Line(1e-3, 1 / 0.95e9),
    "encode:plane": Line(35e-6, 1 / 2.3e9),
    "encode:delta": Line(35e-6, 1 / 1.45e9),
    "encode:zstd": Line(35e-6, 1 / 0.65e9),
    "encode:replay": Line(500e-6, 1 / 1.0e9),
}
_PRIOR_ENCODE = Line(35e-6, 1 / 0.5e9)

# Of a small GPT trained with AdamW at a learning rate of 3e-4, one step between the snapshots.
_PRIOR_RATIOS = {
    ("plane", "params", "bfloat16"): 0.665,
    ("plane", "params", "float32"): 0.832,
    ("plane", "exp_avg", "float32"): 0.842,
    ("plane", "exp_avg_sq", "float32"): 0.811,
    ("delta", "params", "bfloat16"): 0.214,
    ("delta", "params", "float32"): 0.605,
    ("delta", "exp_avg", "float32"): 0.821,
    ("delta", "exp_avg_sq", "float32"): 0.677,
    ("zstd", "params", "float32"): 0.927,
    ("replay", "params", "float32"): 0.03,
    ("replay", "exp_avg", "float32"): 0.5,  # .34 if gradients are of low precision, .82 if not
    ("replay", "exp_avg_sq", "float32"): 0.03,
    ("replay", "momentum_buffer", "float32"): 0.5,
}
# Other kinds of leaves of these dtypes: as the parameters in a full snapshot, whatever the codec.
_PRIOR_RATIOS_OF_DTYPE = {
    ("plane", "bfloat16"): 0.665,
    ("plane", "float32"): 0.832,
    ("delta", "bfloat16"): 0.665,
    ("delta", "float32"): 0.832,
}

_NonNegative = Annotated[float, msgspec.Meta(ge=0, le=sys.float_info.max)]
_Name = Annotated[str, msgspec.Meta(max_length=512)]


class _LineRecord(msgspec.Struct, forbid_unknown_fields=True):
    alpha_s: _NonNegative
    beta_s_per_byte: _NonNegative


class _RatioRecord(msgspec.Struct, forbid_unknown_fields=True):
    codec: _Name
    kind: _Name
    dtype: _Name
    ratio: _NonNegative


class _CostRecord(msgspec.Struct, forbid_unknown_fields=True):
    costs: dict[_Name, _LineRecord]
    ratios: list[_RatioRecord]
    streams: int = STREAMS[-1]


class CostModel:
    """All that the decisions are based on: costs by key and coding ratios by class of leaf.

    Keys:
        `copy`: capturing a snapshot into host memory, waiting not included.
        `encode:<codec id>`: encoding on one thread.
        `put`: one put of a store while no other is in flight; see `PutCost` for those that are.
        `write`: the share of the sink's time that a put takes, which is what t_w means in the
            selective rule. If a put of b bytes took T seconds while w puts were in flight, then
            in those T seconds the sink served w of them, so this one cost it T / w. With one put
            at a time `write` and `put` are the same. Where the puts share one link T grows with w
            and T / w stays; where each stream has its own limit T stays and T / w shrinks: the
            effective throughput of the sink, 1 / beta of `write`, is right in both cases.

    Everything has a prior, so that decisions are sane before the first sample; a class of leaves
    of which nothing is known has the ratio 1. May be used by several threads at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._costs: dict[str, LinearCost | _FastestCost] = {}
        self._put: PutCost | None = None
        self._ratios: dict[tuple[str, str, str], _Ratio] = {}

    def observe(self, key: str, nbytes: int, seconds: float) -> None:
        """Learn a cost. A `put` or `write` is taken as the only put in flight.

        Raises:
            ValueError: for an unknown key, or a measurement that cannot be one.
        """
        if key in ("put", "write"):
            self.observe_write(nbytes, seconds, 1)
        else:
            with self._lock:
                self._cost(key).observe(nbytes, seconds)

    def observe_write(self, nbytes: int, seconds: float, in_flight: float) -> None:
        """Learn from a put: what it took, and what it cost the sink (see `put` and `write`).

        Args:
            nbytes, seconds: of this put.
            in_flight: puts in flight meanwhile on average, this one included.

        Raises:
            ValueError: for a measurement that cannot be one.
        """
        if not (math.isfinite(in_flight) and in_flight >= 1):
            raise ValueError(f"{in_flight} puts in flight, this one included")
        with self._lock:
            if self._put is None:
                self._put = PutCost(_prior_cost("put"))
            self._put.observe(nbytes, seconds, in_flight)
            self._cost("write").observe(nbytes, seconds / in_flight)

    def observe_ratio(
        self, codec: str, kind: str, dtype: str, raw_nbytes: int, stored_nbytes: int
    ) -> None:
        """Learn how small a codec makes leaves of this kind and dtype. Empty ones say nothing.

        Raises:
            ValueError: if a length is negative.
        """
        if raw_nbytes < 0 or stored_nbytes < 0:
            raise ValueError(f"not a coding ratio: {raw_nbytes} bytes stored as {stored_nbytes}")
        if raw_nbytes:
            key = (codec, kind, dtype)
            with self._lock:
                ratio = self._ratios.setdefault(key, _Ratio(_prior_ratio(*key)))
                ratio.observe(raw_nbytes, stored_nbytes)

    def line(self, key: str) -> Line:
        """The current fit of a cost; `ValueError` for an unknown key."""
        with self._lock:
            cost = self._put if key == "put" else self._costs.get(key)
            return _prior_cost(key) if cost is None else cost.line

    @property
    def streams(self) -> int:
        """Puts that can be in flight before they slow each other down; see `PutCost`."""
        with self._lock:
            return STREAMS[-1] if self._put is None else self._put.streams

    def seconds(self, key: str, nbytes: float) -> float:
        """Predicted time for `nbytes` raw bytes; `ValueError` for an unknown key."""
        return self.line(key).seconds(nbytes)

    def ratio(self, codec: str, kind: str, dtype: str) -> float:
        """Stored bytes per raw byte that a codec is expected to give; 1 for `raw`."""
        with self._lock:
            ratio = self._ratios.get((codec, kind, dtype))
            return _prior_ratio(codec, kind, dtype) if ratio is None else ratio.value

    def to_json(self) -> dict[str, object]:
        """What was learned, as a JSON object: every fit and ratio of which there were samples."""
        with self._lock:
            lines = {key: cost.line for key, cost in self._costs.items()}
            streams = STREAMS[-1]
            if self._put is not None:
                lines["put"], streams = self._put.line, self._put.streams
            ratios = [_RatioRecord(*key, r.value) for key, r in sorted(self._ratios.items())]
        costs = {k: _LineRecord(x.alpha_s, x.beta_s_per_byte) for k, x in sorted(lines.items())}
        return msgspec.to_builtins(_CostRecord(costs, ratios, streams))

    @classmethod
    def from_json(cls, document: object) -> CostModel:
        """A model that begins with what another one had learned: its fits are this one's priors.

        Raises:
            FormatError: if `document` is not what `to_json` gives: unknown keys or members, a
                class twice, NaN, infinite or negative numbers, streams that are none of `STREAMS`.
        """
        model = cls()
        try:
            record = msgspec.convert(document, _CostRecord)
            if record.streams not in STREAMS:
                raise ValueError(f"{record.streams} streams")
            for key, line in record.costs.items():
                model._begin(key, Line(line.alpha_s, line.beta_s_per_byte), record.streams)
        except ValueError as error:
            raise FormatError(f"malformed cost model: {str(error)[:200]}") from error
        for ratio in record.ratios:
            model._ratios[ratio.codec, ratio.kind, ratio.dtype] = _Ratio(ratio.ratio)
        if len(model._ratios) != len(record.ratios):
            raise FormatError("malformed cost model: a class of leaves has two ratios")
        return model

    def _begin(self, key: str, prior: Line, streams: int) -> None:
        """Begin with what another model had learned."""
        _prior_cost(key)  # refuses unknown keys
        if key == "put":
            self._put = PutCost(prior, streams)
        else:
            self._costs[key] = _new_cost(key, prior)

    def _cost(self, key: str) -> LinearCost | _FastestCost:
        if key not in self._costs:
            self._costs[key] = _new_cost(key, _prior_cost(key))
        return self._costs[key]


def _new_cost(key: str, prior: Line) -> LinearCost | _FastestCost:
    return _FastestCost(prior) if key == "copy" else LinearCost(prior)


def _prior_cost(key: str) -> Line:
    if key in _PRIOR_COSTS:
        return _PRIOR_COSTS[key]
    if key.startswith("encode:"):
        return _PRIOR_ENCODE
    raise ValueError(f"no cost has the key {key[:80]!r}")


def _prior_ratio(codec: str, kind: str, dtype: str) -> float:
    of_dtype = _PRIOR_RATIOS_OF_DTYPE.get((codec, dtype), 1.0)
    return _PRIOR_RATIOS.get((codec, kind, dtype), of_dtype)
