"""A histogram of magnitudes on a fixed logarithmic grid, and what is read off it.

64 bins per octave from 2^-24 to 2^16: each bin is 1.1 % wide, whatever the range of the data, so one pass suffices and
histograms of several runs add up. Bin 0 holds what is smaller (zeros too), the last bin what is larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

BINS_PER_OCTAVE = 64
LOWEST, HIGHEST = -24, 16
BINS = (HIGHEST - LOWEST) * BINS_PER_OCTAVE + 2
#: Lower edges of bins 1 … BINS - 1.
EDGES: NDArray[np.float64] = np.exp2(LOWEST + np.arange(BINS - 1) / BINS_PER_OCTAVE)


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of |x|, int64 [BINS], and the exact largest |x|.

    Within a bin the values count as evenly spread, up to ``absmax`` at most.
    """

    counts: NDArray[np.int64]
    absmax: float

    @staticmethod
    def of(values: NDArray[np.floating]) -> Histogram:
        """The histogram of an array of any shape."""
        magnitudes = np.abs(values).ravel()
        bins = np.searchsorted(EDGES, magnitudes, side="right")
        return Histogram(np.bincount(bins, minlength=BINS).astype(np.int64), float(magnitudes.max(initial=0.0)))

    @cached_property
    def lower(self) -> NDArray[np.float64]:
        """Lower edges [BINS]."""
        return np.minimum(np.concatenate([[0.0], EDGES]), self.absmax)

    @cached_property
    def upper(self) -> NDArray[np.float64]:
        """Upper edges [BINS]; the last bin that holds anything ends at ``absmax``."""
        return np.minimum(np.concatenate([EDGES, [np.inf]]), self.absmax)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def below(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """How many |x| are at most each of ``values``: the cumulative count, linear within bins."""
        edges = np.concatenate([[0.0], self.upper])
        cumulative = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.float64)
        # Bins above absmax are empty and have no width: keep each edge once, with all that lies below it.
        edges, last = np.unique(edges[::-1], return_index=True)
        return np.asarray(np.interp(values, edges, cumulative[::-1][last]))

    def quantile(self, share: float) -> float:
        """The smallest magnitude that at least ``share`` (above 0, up to 1) of all |x| do not exceed."""
        cumulative = np.cumsum(self.counts)
        wanted = share * self.total
        index = int(np.searchsorted(cumulative, wanted))
        inside = 1 - (int(cumulative[index]) - wanted) / int(self.counts[index])
        return float(self.lower[index] + inside * (self.upper[index] - self.lower[index]))
