"""What quantization asks of calibration statistics: channel maxima, token rows and static ranges."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..passes.spec import RangeMethod, StaticActivation
from .histogram import Histogram
from .ranges import threshold
from .statistics import Provenance, Statistics

Float = NDArray[np.float32]


class StatisticsCalibration:
    """Statistics in the form that the passes need."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics

    @property
    def provenance(self) -> Provenance:
        """What the statistics were taken from."""
        return self._statistics.provenance

    def absmax(self, value: str) -> Float:
        """max|x| per channel: [K]."""
        return self._statistics.absmax(value)

    def rows(self, value: str) -> Float:
        """The sampled token rows: [R, K]."""
        return self._statistics.rows(value)

    def outliers(self, value: str) -> Float:
        """The token rows with the largest |x|: [16, K], zeros where there are fewer."""
        return self._statistics.outliers(value)

    def limit(
        self, value: str, activation: StaticActivation, divisor: Float | None, channels: NDArray[np.intp] | None = None
    ) -> float:
        """The range ±limit of some channels of a value (None: all), all of which were divided by ``divisor`` [K].

        ``minmax`` is exact. The other methods look at the histogram of all calibration tokens, or, where a divisor
        or a choice of channels changed the distribution, at the histogram of the sampled rows.
        """
        seen = slice(None) if channels is None else channels
        by = np.float32(1) if divisor is None else divisor[seen]
        if activation.method is RangeMethod.MINMAX:
            return float((self._statistics.absmax(value)[seen] / by).max())
        if divisor is None and channels is None:
            return threshold(self._statistics.histogram(value), activation)
        return threshold(Histogram.of(self._statistics.rows(value)[:, seen] / by), activation)
