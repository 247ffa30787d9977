"""Whether smoothing factors made a folded tensor too small for float16, whose numbers end at 2⁻²⁴."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError
from .fold import Edit

TOLERANCE = 2.0**-8
"""Relative error that a channel may have after rounding: that of bfloat16. Float16's normal numbers have 2⁻¹¹."""


def require_kept(
    blocks: Iterable[NDArray[Any]], shape: tuple[int, int], edit: Edit, dtype: np.dtype[Any], name: str
) -> None:
    """Check that a folded weight or bias is in float16 what it was before folding.

    The rounding error is measured in the units before folding: per row and per column of a weight, over all elements
    of a bias. What float16 could not hold before folding either is no concern: checkpoints have such numbers.

    Args:
        blocks: A folded weight [N, K], some rows at a time, or a bias as one row; finite in ``dtype``.
        shape: N and K.
        edit: What it was multiplied with.
        dtype: The type it is stored in; others than float16 have the range of float32.
        name: For messages.

    Raises:
        BismoothError: A row, column or bias lost more than :data:`TOLERANCE` by folding.
    """
    if dtype != np.float16:
        return
    is_bias = edit.values is not None
    columns = edit.values.reshape(-1) if edit.values is not None else edit.columns
    by_row, by_column = _squares(blocks, shape, edit.rows, columns)
    axes = {"rows": by_row} if is_bias else {"rows": by_row, "columns": by_column}
    worse = {axis: found for axis, sums in axes.items() if (found := _lost(sums)).size}
    if worse:
        axis = min(worse, key=lambda axis: worse[axis].size)
        count, size = worse[axis].size, axes[axis].shape[1]
        where = "as a whole" if is_bias else f"in {count} of {size} {axis}"
        raise BismoothError(
            f"{name}: the smoothing factors folded into it make it too small for {dtype}. Expected a relative error "
            f"of at most {TOLERANCE:.2g}, got {worse[axis].max():.2g} {where}. Compute in bfloat16 or float32, or "
            "leave the site out with a layer rule (smoothing: null)."
        )


def _lost(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The relative errors of the channels that lost too much by folding, of sums as ``_squares`` gives them."""
    after, before, total = sums
    lost = (after > TOLERANCE**2 * total) & (before <= TOLERANCE**2 * total)
    return np.sqrt(after[lost] / total[lost])


def _squares(
    blocks: Iterable[NDArray[Any]],
    shape: tuple[int, int],
    rows: NDArray[np.float64] | None,
    columns: NDArray[np.float64] | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of squares by row [3, N] and by column [3, K]: error after and before folding, and the values before it."""
    by_row, by_column, start = np.zeros((3, shape[0])), np.zeros((3, shape[1])), 0
    for values in blocks:
        part = slice(start, start + len(values))
        factor = (1.0 if rows is None else rows[part, None]) * (np.ones(1) if columns is None else columns)
        block = values.astype(np.float64)
        original = block / factor
        for place, error in enumerate((_rounding(block) / factor, _rounding(original), original)):
            error *= error
            by_row[place, part] = error.sum(axis=1)
            by_column[place] += error.sum(axis=0)
        start = part.stop
    return by_row, by_column


def _rounding(values: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float64) - values
