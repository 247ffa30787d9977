"""Channels of the weights that stand out: a "wall" sets the scale of every output channel and ruins all other weights.

(arXiv 2408.15301, section 4: in LLaMA3-70B a few input channels of Q, K, V, Up and Gate in blocks 0, 1 and 3.)
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .fold import Factor
from .weights import ROWS, row_chunks

Float = NDArray[np.float32]

Blocks: TypeAlias = Callable[[], Iterable[Float]]
"""Reads a weight W [N, K], some rows at a time, as often as it is called."""

BITS = 2.0
"""How many bits of resolution walls take from the other weights of a row, on average. Two bits are 16 times the squared
rounding error. The weights' rounding is the smaller part of the error of a healthy W8A8 linear, and at 16 times it is
by far the larger one; below, moving the channel into activations that nobody has seen could cost more than it gains."""

AT_RISK = 1.0
"""Bits of resolution that walls take from the other weights of a linear which per-channel INT8 breaks. Steps twice as
wide make four times the squared error: the linear has the weights of a 7-bit one."""

MAX_SHARE = 1 / 32
"""Walls are few; if more channels than this stand out, the matrix is just uneven."""

SAMPLED_ROWS = 256
"""Rows of a single weight that bits are measured on: each row has a scale of its own, so any sample is unbiased."""


def find_walls(weights: Sequence[tuple[Blocks, NDArray[np.int32]]], free: NDArray[np.bool_]) -> Factor:
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


def channel_peaks(weights: Sequence[tuple[Blocks, NDArray[np.int32]]], size: int) -> NDArray[np.float64]:
    """The largest |W| of each channel, over all linears that read it: [C]; arguments as of :func:`find_walls`."""
    peaks = np.zeros(size)
    for blocks, labels in weights:
        used = labels >= 0
        for block in blocks():
            columns = np.maximum(block.max(axis=0), -block.min(axis=0)).astype(np.float64)
            with np.errstate(invalid="ignore"):  # a NaN is reported when the weight is quantized
                np.maximum.at(peaks, labels[used], columns[used])
    return peaks


def walls_of_rows(rows: Float, peaks: Float) -> tuple[NDArray[np.intp], float]:
    """The fewest leading channels without which no more than :data:`AT_RISK` is lost; largest first.

    Args:
        rows: Rows of W that stand for all, [R, K].
        peaks: max|W| of each channel over all rows, [K]: ranks the channels.

    Returns:
        Numbers of the walls, none for a healthy weight; and the bits that the leading channels, :data:`MAX_SHARE` of
        all, take from the resolution of the others, which :func:`lost_bits` defines.
    """
    candidates = np.argsort(-peaks, kind="stable")[: max(1, int(peaks.size * MAX_SHARE))]
    blocks = [rows[part] for part in row_chunks(rows.shape, ROWS)]
    bits = lost_bits([(lambda: blocks, np.arange(peaks.size, dtype=np.int32))], candidates)
    return candidates[: int(np.argmax(bits <= AT_RISK))], float(bits[0])


def lost_bits(weights: Sequence[tuple[Blocks, NDArray[np.int32]]], candidates: NDArray[np.intp]) -> NDArray[np.float64]:
    """Bits that a row loses on average to the candidates from the first, the second, … on; the last element is 0.

    Mean over rows of log₂(maxₖ|W[n,k]| / max of the row without them), for ``weights`` as of :func:`find_walls`.
    """
    total, rows = np.zeros(len(candidates) + 1), 0
    for blocks, labels in weights:
        order, first = _by_candidate(labels, candidates)
        for signed in blocks():
            block = np.abs(signed)
            largest = block[:, order].T
            block[:, order] = 0
            rest = block.max(axis=1, initial=0.0)
            seen = rest > 0
            largest = np.concatenate([largest, rest[None]])[:, seen]
            peaks = np.maximum.accumulate(largest[::-1])[::-1][first]
            total += np.log2(peaks / rest[seen], dtype=np.float64).sum(axis=1)
            rows += int(seen.sum())
    return total / max(rows, 1)


def _by_candidate(labels: NDArray[np.int32], candidates: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The columns that read candidates, those of the first one first; and where the columns of each begin, and end."""
    rank = np.full(int(max(labels.max(initial=0), candidates.max(initial=0))) + 2, -1)
    rank[candidates] = np.arange(candidates.size)
    ranks = rank[labels]  # of the label -1 too: the last one is no candidate
    columns = np.flatnonzero(ranks >= 0)
    columns = columns[np.argsort(ranks[columns], kind="stable")]
    return columns, np.searchsorted(ranks[columns], np.arange(candidates.size + 1))
