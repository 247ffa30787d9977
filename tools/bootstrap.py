"""Confidence intervals by the bootstrap, with the window as the unit: tokens within a window depend on each other.

A resample is N windows drawn with replacement from the N there are; a figure's interval lies between percentiles of its
values on many resamples (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13). All that is compared is
looked at on the same resamples, so that what makes a window hard for all cancels out of differences (paired bootstrap:
Koehn, Statistical Significance Tests for Machine Translation Evaluation, 2004).

NOTE: of few windows, intervals come out too narrow: the variance of a mean by the factor (N - 1) / N, and more for
figures that depend on the worst tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 0
#: Values that are worked on at once, 8 MiB in float64.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Interval:
    """A confidence interval, bounds included."""

    low: float
    high: float

    def excludes(self, value: float) -> bool:
        return not self.low <= value <= self.high


class Resampling:
    """The resamples of N windows.

    Args:
        windows: N, at least 2.
        resamples: their number R.
        seed: of the draws.
    """

    def __init__(self, windows: int, resamples: int = RESAMPLES, seed: int = SEED) -> None:
        self.draws = np.random.default_rng(seed).integers(windows, size=(resamples, windows))
        """Windows of each resample [R, N]."""

    def mean(self, values: Rows) -> Rows:
        """The mean on each resample [R]; values [N] or [N, S], S of each window."""
        return values.reshape(len(values), -1).mean(axis=1)[self.draws].mean(axis=1)

    def quantile(self, values: Rows, q: float) -> Rows:
        """The ``q`` quantile on each resample [R]; values [N, S]."""
        step = max(1, _CHUNK // values.size)
        parts = (self.draws[start : start + step] for start in range(0, len(self.draws), step))
        return np.concatenate([np.quantile(values[part].reshape(len(part), -1), q, axis=1) for part in parts])


def interval(replicates: Rows) -> Interval:
    """The percentile interval of a figure, from its values on all resamples [R]."""
    ordered = np.sort(replicates)
    tail = int(len(ordered) * (1 - CONFIDENCE) / 2)
    return Interval(float(ordered[tail]), float(ordered[-1 - tail]))


def difference(values: Rows | float, others: Rows | float) -> Rows:
    """``values`` less ``others``; 0 for two infinities of one sign."""
    with np.errstate(invalid="ignore"):
        return np.where(values == others, 0.0, values - others)
