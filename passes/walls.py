"""Channels of the weights that stand out: a "wall" sets the scale of every output channel and ruins all other weights.

Found by the error it causes, not by its size: leaving the channel out must raise the resolution of the whole matrix.
(arXiv 2408.15301, section 4: in LLaMA3-70B a few input channels of Q, K, V, Up and Gate in blocks 0, 1 and 3.)
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .fold import Factor

Float = NDArray[np.float32]

GAIN = 9.0
"""By how much the squared rounding error of the weights must fall when walls are removed: 9 is 1.6 bits of every weight."""

MAX_SHARE = 1 / 32
"""Channels that stand out are few; if many do, the matrix is just uneven."""


def find_walls(weights: Sequence[tuple[Float, NDArray[np.int32]]], free: NDArray[np.bool_]) -> Factor:
    """Factors that bring walls down to the other channels' level: float64 [C], 1 on all that do not stand out.

    The squared rounding error of W with one scale per output channel is K/12 · Σₙ (maxₖ|W[n,k]| / 127)². The channels are
    ranked by their largest weight; the smallest number of leading ones whose removal lowers that sum ``GAIN`` times, and
    after which the next channel would not lower it by a quarter as much again, are walls.

    Args:
        weights: Per linear behind the site, W [N, K] and which channel each input column reads (−1: none).
        free: bool [C], the channels that may be scaled.
    """
    size = free.size
    peaks = np.zeros(size)
    for weight, labels in weights:
        used = labels >= 0
        np.maximum.at(peaks, labels[used], _column_peaks(weight)[used])
    order = np.argsort(-np.where(free, peaks, 0.0), kind="stable")
    candidates = order[: max(1, int(size * MAX_SHARE))]
    sums = _error_sums(weights, candidates)
    walls = _leading(sums)
    factor = np.ones(size)
    if walls:
        level = float(np.median(peaks[free & (peaks > 0)]))
        factor[candidates[:walls]] = (level / peaks[candidates[:walls]]).astype(np.float32)
    return factor


def _column_peaks(weight: Float) -> NDArray[np.float64]:
    return np.maximum(weight.max(axis=0), -weight.min(axis=0)).astype(np.float64)


def _error_sums(
    weights: Sequence[tuple[Float, NDArray[np.int32]]], candidates: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Σₙ maxₖ|W[n,k]|² over all linears without the first 0, 1, … of the candidate channels: float64 [len + 1]."""
    sums = np.zeros(len(candidates) + 1)
    for weight, labels in weights:
        is_candidate = np.isin(labels, candidates)
        rest = np.abs(weight[:, ~is_candidate]).max(axis=1, initial=0.0)
        peaks = np.empty((len(candidates) + 1, weight.shape[0]))
        peaks[-1] = rest
        for place in range(len(candidates) - 1, -1, -1):
            columns = weight[:, labels == candidates[place]]
            peaks[place] = np.maximum(peaks[place + 1], np.abs(columns).max(axis=1, initial=0.0))
        sums += (peaks**2).sum(axis=1)
    return sums


def _leading(sums: NDArray[np.float64]) -> int:
    """How many leading candidates are walls, 0 if removing all of them gains too little."""
    if sums[0] <= GAIN * sums[-1]:
        return 0
    # The walls end where what is left is within a factor of 2 of what removing every candidate would leave.
    return int(np.argmax(sums <= 2.0 * sums[-1]))
