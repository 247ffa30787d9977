"""Which weights break per-channel INT8, and why: measured on the weights alone.

A few input channels that are far larger than the others ("walls", arXiv 2408.15301) set the scale of every output
channel. All other weights are then rounded in coarser steps; :func:`..walls.lost_bits` says by how much. Steps twice as
wide (one bit) make four times the squared error: the linear has the weights of a 7-bit one. :data:`AT_RISK` is that
bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .linears import Linear
from .refine import sample
from .walls import MAX_SHARE, lost_bits
from .weights import fake_quantize_rows, require_finite, row_chunks

Float = NDArray[np.float32]

AT_RISK = 1.0
"""Bits of resolution that walls take from the other weights of a linear that is flagged."""

GROUPS = (16, 32, 64, 128)
"""Sizes of the contiguous groups along K whose error is measured."""

SAMPLED_ROWS = 256
"""Rows that errors and bits are measured on: each row has a scale of its own, so any sample of them is unbiased."""

_CHUNK = 1 << 18


@dataclass(frozen=True)
class Diagnosis:
    """What is known of a linear's weight W [N, K].

    Attributes:
        name: The module's path.
        n: Output channels.
        k: Input channels.
        absmax: max|W|.
        ratio: Largest channel maximum over the median one.
        kurtosis: E[w⁴] / E[w²]², 3 for normal numbers.
        channels: The walls, by number.
        lost_bits: What the leading channels, ``MAX_SHARE`` of all, take from the resolution of the other weights: mean
            over rows of log₂(maxₖ|W[n,k]| / the same without them).
        errors: Relative error ‖W − Ŵ‖ / ‖W‖ by scheme: ``per_channel``, ``per_group_16`` …, ``bismoothed``.
        rest_errors: The same over the channels that are no walls: what is left of the other weights.
    """

    name: str
    n: int
    k: int
    absmax: float
    ratio: float
    kurtosis: float
    channels: tuple[int, ...]
    lost_bits: float
    errors: dict[str, float]
    rest_errors: dict[str, float]

    @property
    def flagged(self) -> bool:
        """Whether per-channel INT8 breaks this linear."""
        return bool(self.channels)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "flagged": self.flagged,
            "channels": list(self.channels),
            "lost_bits": self.lost_bits,
            "absmax": self.absmax,
            "ratio": self.ratio,
            "kurtosis": self.kurtosis,
            "errors": self.errors,
            "rest_errors": self.rest_errors,
            "shape": [self.n, self.k],
        }


def diagnose_weight(linear: Linear, weight: NDArray[Any]) -> Diagnosis:
    """Look at the weight of a linear.

    Args:
        linear: Says which axis is which.
        weight: As it is stored, of any float type.

    Raises:
        BismoothError: the weight holds NaN or infinity.
    """
    rows = weight if linear.layout == "NK" else weight.T
    peaks, kurtosis = _full_pass(rows, linear.weight)
    chosen = np.ascontiguousarray(rows[sample(len(rows), SAMPLED_ROWS)]).astype(np.float32)
    walls, lost = _walls(chosen, peaks)
    smoothed = _brought_down(peaks, walls)
    schemes = {"per_channel": fake_quantize_rows(chosen)}
    schemes |= {f"per_group_{size}": fake_quantize_rows(chosen, size) for size in GROUPS if size < linear.k}
    schemes["bismoothed"] = fake_quantize_rows(chosen * smoothed) / smoothed
    errors = {name: _error(chosen, got) for name, got in schemes.items()}
    rest = np.delete(np.arange(linear.k), walls)
    typical = _typical(peaks)
    return Diagnosis(
        name=linear.name,
        n=linear.n,
        k=linear.k,
        absmax=float(peaks.max(initial=0)),
        ratio=float(peaks.max(initial=0) / typical) if typical else 0.0,
        kurtosis=kurtosis,
        channels=tuple(np.sort(walls).tolist()),
        lost_bits=lost,
        errors=errors,
        rest_errors={name: _error(chosen[:, rest], got[:, rest]) for name, got in schemes.items()}
        if walls.size
        else errors,
    )


def scaled_error(linear: Linear, weight: NDArray[Any], walls: Sequence[int], columns: Float) -> float:
    """``rest_errors["per_channel"]`` of a weight, as stored, after its columns are scaled by s [K]."""
    rows = weight if linear.layout == "NK" else weight.T
    chosen = np.ascontiguousarray(rows[sample(len(rows), SAMPLED_ROWS)]).astype(np.float32)
    rest = np.delete(np.arange(linear.k), walls)
    got = fake_quantize_rows(chosen * columns) / columns
    return _error(chosen[:, rest], got[:, rest])


def _full_pass(rows: NDArray[Any], name: str) -> tuple[Float, float]:
    """max|W| of each input channel, [K], and the kurtosis; some rows at a time in float32."""
    peaks = np.zeros(rows.shape[1], np.float32)
    second = fourth = 0.0
    for part in row_chunks(rows.shape, _CHUNK):
        block = np.ascontiguousarray(rows[part]).astype(np.float32)
        largest = np.maximum(block.max(axis=0), -block.min(axis=0))
        unit = float(largest.max())
        if not np.isfinite(unit):
            require_finite(np.ascontiguousarray(rows).astype(np.float32), name)
        if unit:
            np.maximum(peaks, largest, out=peaks)
            block /= np.float32(unit)  # so that no power of it leaves float32
            squares = np.square(block, out=block).reshape(-1)
            second += float(squares.sum(dtype=np.float64)) * unit**2
            fourth += float(squares @ squares) * unit**4
    return peaks, fourth * rows.size / second**2 if second else 0.0


def _walls(rows: Float, peaks: Float) -> tuple[NDArray[np.intp], float]:
    """The fewest leading channels without which less than :data:`AT_RISK` is lost, and what they take."""
    count = max(1, int(peaks.size * MAX_SHARE))
    candidates = np.argsort(-peaks, kind="stable")[:count]
    bits = lost_bits([(rows, np.arange(peaks.size, dtype=np.int32))], candidates)
    return candidates[: int(np.argmax(bits <= AT_RISK))], float(bits[0])


def _brought_down(peaks: Float, walls: NDArray[np.intp]) -> Float:
    """s per channel, [K]: brings walls to the median of the others, 1 elsewhere."""
    factor = np.ones(peaks.size, np.float32)
    if walls.size:
        factor[walls] = _typical(np.delete(peaks, walls)) / peaks[walls]
    return factor


def _typical(peaks: Float) -> float:
    """The median of the channel maxima that are not 0."""
    return float(np.median(peaks[peaks > 0])) if peaks.any() else 0.0


def _error(exact: Float, got: Float) -> float:
    total = float(np.linalg.norm(exact))
    return float(np.linalg.norm(exact - got)) / total if total else 0.0
