"""One pass over a weight, some rows at a time: channel maxima, kurtosis, a sample of the rows, the outline of |W|."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import frexp

import numpy as np
from numpy.typing import NDArray

from ._gs import Array
from .linears import Linear
from .refine import sample
from .walls import SAMPLED_ROWS
from .weights import require_finite

Float = NDArray[np.float32]

CELLS = 96
"""How many cells the outline of |W| has along each axis, at most."""

_BLOCK = 1 << 17
"""Elements that are looked at together: 512 KB in float32, which stay in a core's cache."""


@dataclass(frozen=True, eq=False)
class WeightScan:
    """What one pass over a weight W [N, K] finds.

    Attributes:
        peaks: max|W| of each input channel, float32 [K].
        kurtosis: E[w⁴] / E[w²]², 0 for a weight of zeros.
        rows: Sampled rows of W, float32 [R, K].
        outline: max|W| over cells of equal size, the last ones smaller, along both axes: float32, at most
            [:data:`CELLS`, :data:`CELLS`].
        nbytes: Size of W as stored.
    """

    peaks: Float
    kurtosis: float
    rows: Float
    outline: Float
    nbytes: int


def scan(linear: Linear, read: Callable[[int], Iterable[Array]]) -> WeightScan:
    """Look at all elements of a weight, once.

    Args:
        linear: Says what shape the weight has.
        read: Gives the stored elements in row-major order, flat, so many at a time. Of any float type.

    Raises:
        BismoothError: the weight holds NaN or infinity.
    """
    outputs_first = linear.layout == "NK"
    height, width = (linear.n, linear.k) if outputs_first else (linear.k, linear.n)
    band, step = _bands(height, width)
    bands = np.zeros((-(-height // band), width), np.float32)
    chosen = sample(linear.n, SAMPLED_ROWS)
    rows, peaks = np.empty((len(chosen), linear.k), np.float32), np.zeros(linear.k, np.float32)
    room = np.empty((step, width), np.float32)  # new memory for each block costs more than what is done with it
    second = fourth = 0.0
    start = nbytes = 0
    for piece in read(step * width):
        nbytes += piece.nbytes
        block = piece.reshape(-1, width).astype(np.float32, copy=False)
        stop = start + len(block)
        if outputs_first:
            inside = slice(*np.searchsorted(chosen, (start, stop)))
            rows[inside] = block[chosen[inside] - start]
        else:
            rows[:, start:stop] = block[:, chosen].T
        magnitudes = np.abs(block, out=room[: len(block)])
        found = _maxima(magnitudes, band)
        if not np.isfinite(unit := float(found.max())):
            require_finite(block if outputs_first else block.T, linear.weight, start if outputs_first else 0)
        here = bands[start // band :][: len(found)]
        np.maximum(here, found, out=here)
        if not outputs_first:
            peaks[start:stop] = magnitudes.max(axis=1)
        if unit:
            scale = 2.0 ** -max(frexp(unit)[1], -126)
            magnitudes *= np.float32(scale)  # so that no power of it leaves float32
            flat = magnitudes.reshape(-1)
            second += float(flat @ flat) / scale**2
            np.square(flat, out=flat)
            fourth += float(flat @ flat) / scale**4
        start = stop
    cells = np.maximum.reduceat(bands, np.arange(0, width, -(-width // CELLS)), axis=1)
    return WeightScan(
        peaks=bands.max(axis=0) if outputs_first else peaks,
        kurtosis=fourth * linear.n * linear.k / second**2 if second else 0.0,
        rows=rows,
        outline=cells if outputs_first else np.ascontiguousarray(cells.T),
        nbytes=nbytes,
    )


def _bands(height: int, width: int) -> tuple[int, int]:
    """Rows that make a row of the outline, and rows to look at together; one is a multiple of the other."""
    band = -(-height // CELLS)
    parts = -(-band * width // _BLOCK)
    if parts == 1:
        return band, band * (_BLOCK // (band * width))
    step = -(-band // parts)
    return step * parts, step


def _maxima(values: Float, count: int) -> Float:
    """The largest of each ``count`` rows, and of those that are left."""
    whole = len(values) // count * count
    largest = values[:whole].reshape(-1, count, values.shape[1]).max(axis=1)
    if whole == len(values):
        return largest
    return np.concatenate([largest, values[whole:].max(axis=0, keepdims=True)])
