"""Input channels that share a scale per row: which they are, and what rounding with a scale per group gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .spec import Groups, PerGroup, PerMagnitude
from .weights import fake_quantize_rows, fake_quantize_with, weight_scale

Float = NDArray[np.float32]
Channels = NDArray[np.intp]


def members(groups: Groups, k: int) -> list[Channels]:
    """The channels of each group: runs along K, the last of which may be short, or all but the walls and then those."""
    if isinstance(groups, PerGroup):
        return [np.arange(start, min(start + groups.size, k)) for start in range(0, k, groups.size)]
    walls = [np.array(channels, np.intp) for channels in groups.walls]
    return [np.delete(np.arange(k), np.concatenate(walls)), *walls]


def without_walls(rows: Float, walls: Sequence[Sequence[int]]) -> list[Float]:
    """The rows with zeros in the place of the walls, float32 [R, K], and each group of walls, [R, k]."""
    rest = rows.copy()
    for channels in walls:
        rest[:, channels] = 0
    return [rest, *(rows[:, channels] for channels in walls)]


def fake_quantize(rows: Float, groups: Groups | None, out: Float | None = None) -> Float:
    """INT8 and back with one scale max|·| / 127 per row and group: float32 [R, K]; ``out`` may be ``rows``."""
    if groups is None or isinstance(groups, PerGroup):
        return fake_quantize_rows(rows, groups.size if groups else None, out=out)
    result = np.empty_like(rows) if out is None else out
    for channels, digits in zip(members(groups, rows.shape[1]), _digits(groups), strict=True):
        part = rows[:, channels]
        result[:, channels] = fake_quantize_with(part, weight_scale(part)[:, None], digits)
    return result


def fake_quantize_static(x: Float, scales: Sequence[float], groups: Groups | None) -> Float:
    """INT8 and back with a constant scale for each group of channels: float32 [T, K]."""
    result = np.empty_like(x)
    every = [slice(None)] if groups is None else members(groups, x.shape[1])
    for channels, scale, digits in zip(every, scales, _digits(groups) or [1] * len(every), strict=True):
        result[:, channels] = fake_quantize_with(x[:, channels], np.full(1, scale, np.float32), digits)
    return result


def _digits(groups: Groups | None) -> list[int]:
    """INT8 digits of each group by magnitude."""
    return [1, *[groups.wall_bits // 8] * len(groups.walls)] if isinstance(groups, PerMagnitude) else []
