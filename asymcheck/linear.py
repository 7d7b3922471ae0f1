"""A straight line t(x) = alpha + beta * x, fitted online to what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

_REFERENCE_NBYTES = float(1 << 20)
_FORGETTING = 0.98
_ANCHOR_WEIGHT = 0.1  # of each pseudo-sample; a real one weighs at most 1
_DETERMINED_WEIGHT = 3 * _ANCHOR_WEIGHT
_OUTLIER_FACTOR = 4.0
_OUTLIERS_IN_A_ROW = 3


@dataclass(frozen=True, slots=True)
class Line:
    """t(x) = alpha_s + beta_s_per_byte * x, both coefficients >= 0."""

    alpha_s: float
    beta_s_per_byte: float

    def seconds(self, nbytes: float) -> float:
        """Time for `nbytes` bytes."""
        return self.alpha_s + self.beta_s_per_byte * nbytes


def check_sample(nbytes: float, seconds: float) -> None:
    """`ValueError` unless `nbytes` bytes can have taken `seconds`."""
    if nbytes < 0 or not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"not a measured cost: {nbytes} bytes in {seconds} s")


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

    def observe(self, nbytes: float, seconds: float) -> None:
        """Learn that `nbytes` bytes took `seconds`.

        Raises:
            ValueError: if one of them is negative, or `seconds` is not finite.
        """
        check_sample(nbytes, seconds)
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

    def _bounded(self, nbytes: float, seconds: float) -> float:
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

    def _add(self, nbytes: float, seconds: float) -> None:
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
