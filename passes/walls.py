"""Channels of the weights that stand out: a "wall" sets the scale of every output channel and ruins all other weights.

(arXiv 2408.15301, section 4: in LLaMA3-70B a few input channels of Q, K, V, Up and Gate in blocks 0, 1 and 3.)
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .fold import Factor
from .weights import row_chunks

Float = NDArray[np.float32]

BITS = 2.0
"""How many bits of resolution walls take from the other weights of a row, on average. Two bits are 16 times the squared
rounding error. The weights' rounding is the smaller part of the error of a healthy W8A8 linear, and at 16 times it is
by far the larger one; below, moving the channel into activations that nobody has seen could cost more than it gains."""

MAX_SHARE = 1 / 32
"""Walls are few; if more channels than this stand out, the matrix is just uneven."""


def find_walls(weights: Sequence[tuple[Float, NDArray[np.int32]]], free: NDArray[np.bool_]) -> Factor:
    """Factors that bring walls down to the other channels' level: float64 [C], 1 on all that do not stand out.

    With one scale per output channel, row n of W is rounded in steps of maxₖ|W[n,k]| / 127. The channels are ranked by
    their largest weight. Walls are the fewest leading ones without which no more than :data:`BITS` are left to gain:
    mean over all rows of log₂(maxₖ|W[n,k]| / max of the row without the candidates). A mean of logarithms, since a
    wall sits in every row; a single large weight costs its own row only.

    Args:
        weights: Per linear behind the site, W [N, K] and which channel each input column reads (−1: none).
        free: bool [C], the channels that may be scaled.
    """
    peaks = channel_peaks(weights, free.size)
    ranked = np.argsort(-np.where(free, peaks, 0.0), kind="stable")
    candidates = ranked[: min(max(1, int(free.size * MAX_SHARE)), int(free.sum()))]
    bits = lost_bits(weights, candidates)
    walls = candidates[: int(np.argmax(bits <= BITS))]
    factor = np.ones(free.size)
    if walls.size:
        level = np.median(np.delete(peaks, walls)[np.delete(peaks, walls) > 0])
        factor[walls] = (level / peaks[walls]).astype(np.float32)
    return factor


def channel_peaks(weights: Sequence[tuple[Float, NDArray[np.int32]]], size: int) -> NDArray[np.float64]:
    """The largest |W| of each channel, over all linears that read it: [C]; arguments as of :func:`find_walls`."""
    peaks = np.zeros(size)
    for weight, labels in weights:
        used = labels >= 0
        columns = np.maximum(weight.max(axis=0), -weight.min(axis=0)).astype(np.float64)
        with np.errstate(invalid="ignore"):  # a NaN is reported when the weight is quantized
            np.maximum.at(peaks, labels[used], columns[used])
    return peaks


def lost_bits(weights: Sequence[tuple[Float, NDArray[np.int32]]], candidates: NDArray[np.intp]) -> NDArray[np.float64]:
    """Bits that a row loses on average to the candidates from the first, the second, … on; the last element is 0.

    Mean over rows of log₂(maxₖ|W[n,k]| / max of the row without them), for ``weights`` as of :func:`find_walls`.
    """
    total, rows = np.zeros(len(candidates) + 1), 0
    for weight, labels in weights:
        columns = [np.flatnonzero(labels == channel) for channel in candidates]
        others = np.isin(labels, candidates, invert=True)
        for part in row_chunks(weight.shape):
            block = np.abs(weight[part])
            rest = block.max(axis=1, where=others, initial=0.0)
            peaks = np.stack([*(block[:, own].max(axis=1, initial=0.0) for own in columns), rest])
            seen = rest > 0
            peaks = np.maximum.accumulate(peaks[::-1, seen])[::-1]
            total += np.log2(peaks / rest[seen], dtype=np.float64).sum(axis=1)
            rows += int(seen.sum())
    return total / max(rows, 1)
