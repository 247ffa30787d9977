"""Which weights break per-channel INT8, and why: measured on the weights alone.

A few input channels that are far larger than the others ("walls", arXiv 2408.15301) set the scale of every output
channel. All other weights are then rounded in coarser steps; :mod:`.walls` says by how much, and which channels do it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .groups import fake_quantize
from .linears import Linear
from .refine import sample
from .smoothing import smoothing_factor
from .spec import Groups, PerGroup, PerMagnitude
from .walls import walls_of_rows
from .weight_scan import WeightScan
from .weights import row_chunks

Float = NDArray[np.float32]

GROUPS = (16, 32, 64, 128)
"""Sizes of the contiguous groups along K whose error is measured."""

_SHOWN_GROUP = 64
_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

_ROUNDED_ROWS = 64
"""Rows that rounding errors are measured on: thousands of weights each, whose errors hardly differ in the mean."""

_TOGETHER = 1 << 18
"""Elements that are rounded together: few beside the sampled rows of a wide weight, which are in memory too."""


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
        lost_bits: What the leading channels, 1/32 of all, take from the resolution of the other weights: mean over rows
            of log₂(maxₖ|W[n,k]| / the same without them).
        errors: Relative error ‖W − Ŵ‖ / ‖W‖ by scheme: ``per_channel``, ``per_group_16`` …,
            ``per_magnitude`` (walls and others apart), ``bismoothed``.
        rest_errors: The same over the channels that are no walls: what is left of the other weights.
        output_errors: What :func:`output_errors` gives, None without statistics.
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
    output_errors: dict[str, float] | None = None

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
            "output_errors": self.output_errors,
            "shape": [self.n, self.k],
        }


def diagnose_weight(linear: Linear, seen: WeightScan) -> Diagnosis:
    """What the scan of a linear's weight says of it."""
    peaks = seen.peaks
    walls, lost = walls_of_rows(seen.rows, peaks)
    rest = np.delete(np.arange(linear.k), walls)
    errors = _errors(seen.rows, walls, _brought_down(peaks, walls))
    typical = _typical(peaks)
    return Diagnosis(
        name=linear.name,
        n=linear.n,
        k=linear.k,
        absmax=float(peaks.max(initial=0)),
        ratio=float(peaks.max(initial=0) / typical) if typical else 0.0,
        kurtosis=seen.kurtosis,
        channels=tuple(np.sort(walls).tolist()),
        lost_bits=lost,
        errors={name: error.over() for name, error in errors.items()},
        rest_errors={name: error.over(rest) for name, error in errors.items()},
    )


def output_errors(seen: WeightScan, tokens: Float, absmax: Float) -> dict[str, float]:
    """‖Y − Ŷ‖ / ‖Y‖ of a linear by scheme, activations and weights in INT8, on sampled tokens and outputs.

    ``per_channel``: a scale per token and per output channel. ``per_group_64``: the same for each 64 inputs, of tokens
    too; ``per_magnitude``: for the walls, and for the others. ``bismoothed``: as ``per_channel`` after X / s and W · s
    with s = max|X|^α / max|W|^(1 − α) (arXiv 2408.15301), at the α that is best for this linear; other linears that
    share its factor may ask for another one.

    Args:
        seen: The scan of W [N, K].
        tokens: X, float32 [T, K].
        absmax: max|X| of each channel over all tokens, float32 [K].
    """
    rows, every = rounded_rows(seen.rows), np.ones(len(seen.peaks), np.bool_)
    exact = tokens @ rows.T
    norm = float(np.linalg.norm(exact))

    def error(s: Float | None = None, groups: Groups | None = None) -> float:
        x, w = (tokens, rows) if s is None else (tokens / s, rows * s)
        got = fake_quantize(x, groups) @ fake_quantize(w, groups).T
        got -= exact
        return float(np.linalg.norm(got)) / norm if norm else 0.0

    errors = {"per_channel": error()}
    if len(seen.peaks) > _SHOWN_GROUP:
        errors[f"per_group_{_SHOWN_GROUP}"] = error(groups=PerGroup(_SHOWN_GROUP))
    errors["per_magnitude"] = error(groups=_by_magnitude(walls_of_rows(seen.rows, seen.peaks)[0]))
    factors = (smoothing_factor(absmax.astype(float), seen.peaks.astype(float), alpha, every) for alpha in _ALPHAS)
    return errors | {"bismoothed": min(error(s.astype(np.float32)) for s in factors)}


def scaled_error(rows: Float, walls: Sequence[int], columns: Float) -> float:
    """``rest_errors["per_channel"]`` of sampled rows of W, [R, K], after its columns are scaled by s [K]."""
    rest = np.delete(np.arange(len(columns)), walls)
    return _Error.of(rounded_rows(rows), columns).over(rest)


def rounded_rows(rows: Float) -> Float:
    """The rows, of a scan, that rounding errors are measured on."""
    return rows[sample(len(rows), _ROUNDED_ROWS)]


@dataclass(frozen=True, eq=False)
class _Error:
    """‖W‖² and ‖W − Ŵ‖² of each input channel, [K]."""

    power: NDArray[np.float64]
    lost: NDArray[np.float64]

    @staticmethod
    def of(rows: Float, columns: Float | None = None, groups: Groups | None = None) -> "_Error":
        """INT8 with a scale per row of W diag(s), or per row and group, some rows at a time; ``columns`` is s."""
        power, lost = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
        for part in row_chunks(rows.shape, _TOGETHER):
            exact = rows[part]
            got = fake_quantize(exact if columns is None else exact * columns, groups)
            if columns is not None:
                got /= columns
            got -= exact
            power += _power(exact)
            lost += _power(got)
        return _Error(power, lost)

    def over(self, channels: NDArray[np.intp] | slice = slice(None)) -> float:
        """‖W − Ŵ‖ / ‖W‖ over some channels, 0 where they are zeros."""
        power = self.power[channels].sum()
        return float(np.sqrt(self.lost[channels].sum() / power)) if power else 0.0


def _power(rows: Float) -> Float:
    return np.einsum("nk,nk->k", rows, rows)


def _errors(rows: Float, walls: NDArray[np.intp], brought_down: Float) -> dict[str, _Error]:
    """By scheme; without walls, ``per_magnitude`` and ``bismoothed`` are ``per_channel``."""
    rows = rounded_rows(rows)
    per_channel = _Error.of(rows)
    grouped = {f"per_group_{size}": _Error.of(rows, groups=PerGroup(size)) for size in GROUPS if size < rows.shape[1]}
    parted = _Error.of(rows, groups=_by_magnitude(walls)) if walls.size else per_channel
    smoothed = _Error.of(rows, brought_down) if walls.size else per_channel
    return {"per_channel": per_channel, **grouped, "per_magnitude": parted, "bismoothed": smoothed}


def _by_magnitude(walls: NDArray[np.intp]) -> PerMagnitude | None:
    return PerMagnitude(walls=(tuple(walls.tolist()),)) if walls.size else None


def _brought_down(peaks: Float, walls: NDArray[np.intp]) -> Float:
    """s per channel, [K]: brings walls to the median of the others, 1 elsewhere."""
    factor = np.ones(peaks.size, np.float32)
    if walls.size:
        factor[walls] = _typical(np.delete(peaks, walls)) / peaks[walls]
    return factor


def _typical(peaks: Float) -> float:
    """The median of the channel maxima that are not 0."""
    return float(np.median(peaks[peaks > 0])) if peaks.any() else 0.0
