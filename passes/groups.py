"""Input channels that share a scale per row: which they are, and what rounding with a scale per group gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .spec import Groups, PerGroup
from .weights import fake_quantize_rows

Float = NDArray[np.float32]
Channels = NDArray[np.intp]


def members(groups: Groups, k: int) -> list[Channels]:
    """The channels of each group: runs along K, the last of which may be short, or all but the walls and then those."""
    if isinstance(groups, PerGroup):
        return [np.arange(start, min(start + groups.size, k)) for start in range(0, k, groups.size)]
    walls = [np.array(channels, np.intp) for channels in groups.walls]
    return [np.delete(np.arange(k), np.concatenate(walls)), *walls]


def count(groups: Groups | None, k: int) -> int:
    """How many groups K channels have."""
    if groups is None:
        return 1
    return -(-k // groups.size) if isinstance(groups, PerGroup) else 1 + len(groups.walls)


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
    for channels in members(groups, rows.shape[1]):
        result[:, channels] = fake_quantize_rows(rows[:, channels])
    return result


def per_column(values: Sequence[float], groups: Groups | None, k: int) -> Float:
    """One value per group as one per channel: float32 [K]."""
    result = np.empty(k, np.float32)
    for value, channels in zip(values, [slice(None)] if groups is None else members(groups, k), strict=True):
        result[channels] = value
    return result
