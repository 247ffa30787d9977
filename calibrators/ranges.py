"""The range of a tensor for static quantization, from the histogram of its magnitudes.

A range is a threshold T >= 0: q = clip(round(x / s), -127, 127) with the step s = T / 127, so T is the largest
magnitude that survives. It is 0 only for a tensor that was zero throughout.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError
from ..passes.spec import RangeMethod, StaticActivation
from .histogram import Histogram

LEVELS = 127
#: Thresholds tried by "entropy" and "mse": below the largest magnitude, in steps of 2^(1/16), over 12 octaves.
_CANDIDATES: NDArray[np.float64] = np.exp2(-np.arange(12 * 16) / 16)
_BINS_PER_LEVEL = 16
_SMOOTHING = 1e-4


def threshold(histogram: Histogram, activation: StaticActivation) -> float:
    """T by the method of ``activation``."""
    if activation.method is RangeMethod.PERCENTILE:
        return percentile(histogram, activation.percentile or 100.0)
    return {RangeMethod.MINMAX: minmax, RangeMethod.ENTROPY: entropy, RangeMethod.MSE: mse}[activation.method](
        histogram
    )


def minmax(histogram: Histogram) -> float:
    """T = max |x|: nothing is clipped."""
    return histogram.absmax


def percentile(histogram: Histogram, percent: float) -> float:
    """T = the magnitude that ``percent`` % of all |x| do not exceed.

    Raises:
        BismoothError: ``percent`` is not above 0 and up to 100.
    """
    if not 0 < percent <= 100:
        raise BismoothError(f"percentile: Expected a value above 0 and up to 100, got {percent}.")
    return histogram.quantile(percent / 100)


def mse(histogram: Histogram) -> float:
    """T = argmin E[(x - Q_T(x))²] (Nagel et al., A White Paper on Neural Network Quantization, arXiv 2106.08295, §3.1).

    The expectation is exact for values evenly spread within each bin: rounding and clipping errors are integrated over
    it.
    """
    if not histogram.absmax:
        return 0.0
    used = histogram.counts > 0
    low, high, counts = histogram.lower[used], histogram.upper[used], histogram.counts[used]
    density = counts / np.maximum(high - low, np.finfo(np.float64).tiny)
    points = high <= low  # bins without width: all values are equal to their edge
    thresholds = histogram.absmax * _CANDIDATES

    def cost(t: float) -> float:
        spread = (_integral(high, t) - _integral(low, t)) * density
        return float(np.where(points, counts * _error(high, t), spread).sum())

    return float(thresholds[np.argmin([cost(t) for t in thresholds])])


def _error(x: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    """(x - Q_t(x))² for x >= 0."""
    step = t / LEVELS
    return (x - step * np.minimum(np.rint(x / step), LEVELS)) ** 2


def _integral(x: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    """∫ (v - Q_t(v))² dv from 0 to x.

    That is s³ · (n/12 + (x/s - n)³/3) with n = round(x/s) for x up to t, and (x - t)³/3 more beyond.
    """
    step = t / LEVELS
    inside = np.minimum(x, t) / step
    n = np.rint(inside)
    return step**3 * (n / 12 + (inside - n) ** 3 / 3) + np.maximum(x - t, 0) ** 3 / 3


def entropy(histogram: Histogram) -> float:
    """T = argmin KL(P_T ‖ Q_T) (Migacz, 8-bit Inference with TensorRT, GTC 2017).

    P_T is the distribution of |x| on a fine grid over [0, T], what lies above added to its last bin; Q_T has every 16
    bins of the unclipped part merged into one level and spread evenly over those of them that are not empty. Migacz
    takes multiples of one fine bin as T; here the fine grid of 16 x 128 bins follows T, so an outlier does not coarsen
    it.
    """
    if not histogram.absmax:
        return 0.0
    thresholds = histogram.absmax * _CANDIDATES
    return float(thresholds[np.argmin([_divergence(histogram, t) for t in thresholds])])


def _divergence(histogram: Histogram, t: float) -> float:
    levels = LEVELS + 1
    grid = np.linspace(0, t, levels * _BINS_PER_LEVEL + 1)
    inside = np.diff(histogram.below(grid))
    p = inside.copy()
    p[-1] += histogram.total - inside.sum()
    blocks = inside.reshape(levels, _BINS_PER_LEVEL)
    filled = blocks > 0
    mean = blocks.sum(axis=1, keepdims=True) / np.maximum(filled.sum(axis=1, keepdims=True), 1)
    p, q = _smooth(p), _smooth((mean * filled).reshape(-1))
    return float((p * np.log(p / q)).sum())


def _smooth(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares that are nowhere zero, so that KL is finite."""
    shares = counts / max(counts.sum(), np.finfo(np.float64).tiny) + _SMOOTHING / len(counts)
    return shares / shares.sum()
