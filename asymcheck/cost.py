"""What moving, encoding and writing bytes costs: t(x) = alpha + beta * x, learned while training.

Seconds and bytes throughout; x is always raw bytes going in.
"""

from __future__ import annotations

import math
import sys
import threading
from dataclasses import dataclass
from typing import Annotated

import msgspec

from asymcheck.errors import FormatError

_REFERENCE_NBYTES = float(1 << 20)
_FORGETTING = 0.98
_ANCHOR_WEIGHT = 0.1  # of each pseudo-sample; a real one weighs at most 1
_DETERMINED_WEIGHT = 3 * _ANCHOR_WEIGHT
_OUTLIER_FACTOR = 4.0
_OUTLIERS_IN_A_ROW = 3
_RATIO_FORGETTING = 0.95
_RATIO_PRIOR_NBYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Line:
    """t(x) = alpha_s + beta_s_per_byte * x, both coefficients >= 0."""

    alpha_s: float
    beta_s_per_byte: float

    def seconds(self, nbytes: float) -> float:
        """Time for `nbytes` bytes."""
        return self.alpha_s + self.beta_s_per_byte * nbytes


class LinearCost:
    """An online fit of a `Line` with alpha, beta >= 0 in constant memory.

    Non-negative least squares over weighted sums that forget exponentially (an effective window
    of 50 samples). A sample of x bytes weighs 1 / (1 + x / 1 MiB)^2, since timing noise grows with
    the size. What the samples leave open (one sample only, all of one size) is taken from the
    prior: two faint pseudo-samples hold the fit to the *shape* of the prior, the ratio of alpha to
    beta, at the level that the samples show. A fit to samples of different sizes becomes the
    prior, so that its shape outlives them when all later ones are of one size.

    A sample further than a factor of 4 from the prediction is clipped to that factor. Three in a
    row on the same side are no outliers but a change: then history is dropped, the last fit
    becomes the prior, and the third counts as it is.

    Not for use by several threads at once.
    """

    def __init__(self, prior: Line) -> None:
        self._start(prior)

    @property
    def line(self) -> Line:
        """The current fit; the prior before the first sample."""
        return self._line

    def observe(self, nbytes: int, seconds: float) -> None:
        """Learn that `nbytes` bytes took `seconds`.

        Raises:
            ValueError: if one of them is negative, or `seconds` is not finite.
        """
        if nbytes < 0 or not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"not a measured cost: {nbytes} bytes in {seconds} s")
        self._add(nbytes, self._bounded(nbytes, seconds))
        self._line = self._fit()
        if self._shape_is_determined:
            self._prior = self._line

    @property
    def _shape_is_determined(self) -> bool:
        # The smaller eigenvalue of the information matrix is about determinant / trace.
        determinant = self._s1 * self._sxx - self._sx**2
        return determinant > _DETERMINED_WEIGHT * (self._s1 + self._sxx)

    def _start(self, prior: Line) -> None:
        self._prior = self._line = prior
        self._samples = 0
        self._outliers = 0  # in a row: positive if too slow, negative if too fast
        # Weighted sums of 1, x, x^2, t and x*t with x in units of the reference size.
        self._s1 = self._sx = self._sxx = self._st = self._sxt = 0.0

    def _bounded(self, nbytes: int, seconds: float) -> float:
        predicted_s = self._line.seconds(nbytes)
        low_s, high_s = predicted_s / _OUTLIER_FACTOR, predicted_s * _OUTLIER_FACTOR
        if self._samples < _OUTLIERS_IN_A_ROW or low_s <= seconds <= high_s:
            self._outliers = 0
            return seconds
        side = 1 if seconds > high_s else -1
        self._outliers = self._outliers + side if self._outliers * side > 0 else side
        if abs(self._outliers) < _OUTLIERS_IN_A_ROW:
            return min(max(seconds, low_s), high_s)
        self._start(self._line)
        return seconds

    def _add(self, nbytes: int, seconds: float) -> None:
        x = nbytes / _REFERENCE_NBYTES
        weight = 1.0 / (1.0 + x) ** 2
        self._samples += 1
        self._s1 = _FORGETTING * self._s1 + weight
        self._sx = _FORGETTING * self._sx + weight * x
        self._sxx = _FORGETTING * self._sxx + weight * x * x
        self._st = _FORGETTING * self._st + weight * seconds
        self._sxt = _FORGETTING * self._sxt + weight * x * seconds

    def _fit(self) -> Line:
        """Least squares with anchors at x = 0 and x = infinity, on the boundary where it must be.

        The determinant is positive: without anchors it is >= 0 (Cauchy-Schwarz).
        """
        anchor_alpha_s, anchor_beta_s = self._anchors()
        a11, a12, a22 = self._s1 + _ANCHOR_WEIGHT, self._sx, self._sxx + _ANCHOR_WEIGHT
        b1 = self._st + _ANCHOR_WEIGHT * anchor_alpha_s
        b2 = self._sxt + _ANCHOR_WEIGHT * anchor_beta_s
        determinant = a11 * a22 - a12 * a12
        alpha_s = (b1 * a22 - b2 * a12) / determinant
        beta_s = (b2 * a11 - b1 * a12) / determinant
        if alpha_s < 0:
            alpha_s, beta_s = 0.0, b2 / a22
        elif beta_s < 0:
            alpha_s, beta_s = b1 / a11, 0.0
        return Line(alpha_s, beta_s / _REFERENCE_NBYTES)

    def _anchors(self) -> tuple[float, float]:
        """The prior, in seconds per put and per reference size, at the level of the samples."""
        alpha_s = self._prior.alpha_s
        beta_s = self._prior.beta_s_per_byte * _REFERENCE_NBYTES
        square = alpha_s**2 * self._s1 + 2 * alpha_s * beta_s * self._sx + beta_s**2 * self._sxx
        level = (alpha_s * self._st + beta_s * self._sxt) / square if square > 0 else 1.0
        return level * alpha_s, level * beta_s


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


# Before anything was measured: two cores of a small server, a local disk with synced writes.
_PRIOR_COSTS = {
    "copy": Line(10e-6, 1 / 8.0e9),
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


class CostModel:
    """All that the decisions are based on: costs by key and coding ratios by class of leaf.

    Keys:
        `copy`: capturing bytes into host memory.
        `encode:<codec id>`: encoding on one thread.
        `put`: one put of a store as its caller sees it, while others are in flight.
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
        self._costs: dict[str, LinearCost] = {}
        self._ratios: dict[tuple[str, str, str], _Ratio] = {}

    def observe(self, key: str, nbytes: int, seconds: float) -> None:
        """Learn a cost. A `write` is taken as the only put in flight.

        Raises:
            ValueError: for an unknown key, or a measurement that cannot be one.
        """
        if key == "write":
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
            self._cost("put").observe(nbytes, seconds)
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
            cost = self._costs.get(key)
            return _prior_cost(key) if cost is None else cost.line

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
            costs = {
                key: _LineRecord(cost.line.alpha_s, cost.line.beta_s_per_byte)
                for key, cost in sorted(self._costs.items())
            }
            ratios = [_RatioRecord(*key, r.value) for key, r in sorted(self._ratios.items())]
        return msgspec.to_builtins(_CostRecord(costs, ratios))

    @classmethod
    def from_json(cls, document: object) -> CostModel:
        """A model that begins with what another one had learned: its fits are this one's priors.

        Raises:
            FormatError: if `document` is not what `to_json` gives: unknown keys or members, a
                class twice, NaN, infinite or negative numbers.
        """
        model = cls()
        try:
            record = msgspec.convert(document, _CostRecord)
            for key, line in record.costs.items():
                _prior_cost(key)
                model._costs[key] = LinearCost(Line(line.alpha_s, line.beta_s_per_byte))
        except ValueError as error:
            raise FormatError(f"malformed cost model: {str(error)[:200]}") from error
        for ratio in record.ratios:
            model._ratios[ratio.codec, ratio.kind, ratio.dtype] = _Ratio(ratio.ratio)
        if len(model._ratios) != len(record.ratios):
            raise FormatError("malformed cost model: a class of leaves has two ratios")
        return model

    def _cost(self, key: str) -> LinearCost:
        if key not in self._costs:
            self._costs[key] = LinearCost(_prior_cost(key))
        return self._costs[key]


def _prior_cost(key: str) -> Line:
    if key in _PRIOR_COSTS:
        return _PRIOR_COSTS[key]
    if key.startswith("encode:"):
        return _PRIOR_ENCODE
    raise ValueError(f"no cost has the key {key[:80]!r}")


def _prior_ratio(codec: str, kind: str, dtype: str) -> float:
    of_dtype = _PRIOR_RATIOS_OF_DTYPE.get((codec, dtype), 1.0)
    return _PRIOR_RATIOS.get((codec, kind, dtype), of_dtype)
