"""Growth with the number of blocks: lines through measurements, whether they hold, what they say of other models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .large_model import Shape

MAX_DEVIATION = 0.1
"""Time is linear if each measurement is at most this share off the line …"""

MIN_FIXED = -0.1
"""… and the line's value at no blocks is at least this share of the largest measurement: a line through faster growth
starts below zero."""

MAX_SPREAD = 0.1
"""Memory is flat if the largest peak is at most this share above the smallest."""

MAX_PEAK = 6e9
"""Bytes."""


@dataclass(frozen=True, eq=False)
class Line:
    """``fixed`` + ``per_block`` · blocks, by least squares.

    Attributes:
        covariance: of both, from the scatter about the line [2, 2].
        r2: share of the variance that the line explains.
        deviation: the largest distance of a measurement from the line, as a share of the measurement.
    """

    fixed: float
    per_block: float
    covariance: NDArray[np.float64]
    r2: float
    deviation: float

    def at(self, fixed: float, blocks: float) -> Estimate:
        """``fixed`` times the part outside the blocks, plus so many blocks."""
        weights = np.array([fixed, blocks])
        return Estimate(float(weights @ [self.fixed, self.per_block]), float(weights @ self.covariance @ weights))


@dataclass(frozen=True)
class Estimate:
    """A value with the variance that its line's scatter gives it."""

    value: float
    variance: float

    @property
    def error(self) -> float:
        """One standard error."""
        return self.variance**0.5


def fit(blocks: Sequence[int], values: Sequence[float]) -> Line:
    """The line through three or more measurements; values are positive.

    Raises:
        ValueError: there are fewer than three: any two lie on a line.
    """
    if len(blocks) < 3:
        raise ValueError(f"a line takes three measurements, got {len(blocks)}")
    (slope, fixed), covariance = np.polyfit(blocks, values, 1, cov=True)
    y = np.array(values)
    distances = y - (fixed + slope * np.array(blocks))
    total = float(np.sum((y - y.mean()) ** 2))
    r2 = 1 - float(np.sum(distances**2)) / total if total else 1.0
    deviation = float(np.max(np.abs(distances) / y))
    return Line(float(fixed), float(slope), covariance[::-1, ::-1], r2, deviation)


@dataclass(frozen=True)
class Growth:
    """How a step's time and peak memory grow with the number of blocks.

    Attributes:
        step: name.
        line: of the seconds; None with fewer than three sizes.
        peaks: bytes, smallest and largest.
        failures: what does not hold, a sentence each.
    """

    step: str
    line: Line | None
    peaks: tuple[int, int]
    failures: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        line = self.line
        return {
            "step": self.step,
            "fixed_seconds": line and line.fixed,
            "seconds_per_block": line and line.per_block,
            "standard_error": line and line.at(0, 1).error,
            "r2": line and line.r2,
            "largest_deviation": line and line.deviation,
            "least_peak_bytes": self.peaks[0],
            "peak_bytes": self.peaks[1],
            "holds": not self.failures,
        }


def judge(
    step: str,
    seconds: Mapping[int, float],
    peaks: Mapping[int, int],
    most_bytes: float = MAX_PEAK,
    *,
    flat: bool = True,
) -> Growth:
    """Hold a step against the limits; both map blocks → measurement. Less than three sizes judge no line.

    Args:
        step: name.
        seconds: wall time.
        peaks: bytes.
        most_bytes: that a peak may have.
        flat: whether memory must be flat.
    """
    line = fit(list(seconds), list(seconds.values())) if len(seconds) > 2 else None
    failures: list[str] = []
    if line and line.deviation > MAX_DEVIATION:
        failures.append(f"{step}: time is {line.deviation:.1%} off its line, at most {MAX_DEVIATION:.0%} is allowed.")
    if line and line.fixed < MIN_FIXED * max(seconds.values()):
        share = line.fixed / max(seconds.values())
        failures.append(
            f"{step}: time grows faster than the blocks: its line begins at {share:.1%} of the largest time, "
            f"at least {MIN_FIXED:.0%} is allowed."
        )
    least, most = min(peaks.values()), max(peaks.values())
    if flat and most > (1 + MAX_SPREAD) * least:
        failures.append(
            f"{step}: peak memory varies by {most / least - 1:.1%} ({least / 1e9:.2f} to {most / 1e9:.2f} GB), "
            f"at most {MAX_SPREAD:.0%} is allowed."
        )
    if most > most_bytes:
        failures.append(f"{step}: peak memory is {most / 1e9:.2f} GB, at most {most_bytes / 1e9:g} GB is allowed.")
    return Growth(step, line, (least, most), tuple(failures))


def forecast(line: Line, measured: Shape, target: Shape, *, by_channels: bool = False) -> Estimate:
    """What ``line``, of models with the blocks of ``measured``, says of ``target``.

    A block costs in proportion to its parameters, and so does all that is outside the blocks; with ``by_channels`` in
    proportion to the channels that linears read.
    """
    block, outer = target.block_parameters / measured.block_parameters, target.outer_parameters
    outer /= measured.outer_parameters
    if by_channels:
        block, outer = target.block_channels / measured.block_channels, target.hidden / measured.hidden
    return line.at(outer, target.blocks * block)


def between(few: Estimate, many: Estimate, share: float) -> Estimate:
    """``few`` + ``share`` · (``many`` − ``few``): 0 is at few, 1 at many, and more is beyond."""
    value = few.value + share * (many.value - few.value)
    return Estimate(value, (1 - share) ** 2 * few.variance + share**2 * many.variance)
