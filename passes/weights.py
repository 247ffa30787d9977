"""INT8 values: rounding weights and activations with one scale per row, and what that costs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError
from .precision_policy import float_limits
from .room import Room

QMAX = 127
"""Weights use −127 … 127, so that −q is representable too."""

LOW = 2 * QMAX
"""Steps of a second INT8 digit in one step of the first: what rounding leaves is within half a step."""

SCALE_FLOOR = 2.0**-100
"""Scale of a row of zeros: any positive normal number serves."""

S0 = 2.0**-14
"""The scalar that an INT8 GEMM dequantizes its weight with: K · 127² · 2⁻¹⁴ < 65504 for all K ≤ 66 000, so the float16
result cannot overflow, and an accumulator of 1 is still a normal number. The rest of the scale follows in float32."""

_SUBNORMAL = 2.0**-2
"""How far below the normal numbers a stored scale may be. In float16, 8 of its 10 bits are left there, so rounding a
scale up costs less than 2⁻⁸ of it; rows with max|W| above 127 · 2⁻¹⁶ = 0.0019 keep all their levels."""

ROWS = 1 << 20
"""Elements to round at a time. Fewer would fit a core's own cache, but threads that work on less wait more for each
other, since only one at a time can begin an operation."""

_CHUNK = 1 << 22
Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Ŵ = ``values`` · ``scale``.

    Attributes:
        values: int8 [N, K], or [N, G, size] with a scale per group.
        scale: float32 [N] or [N, G].
        lost: ‖W − Ŵ‖².
        power: ‖W‖².
    """

    values: NDArray[np.int8]
    scale: Float
    lost: float
    power: float


def weight_scale(weight: Float) -> Float:
    """max|row| / 127: float32 [N] for W [N, K], at least :data:`SCALE_FLOOR`."""
    peak = np.maximum(weight.max(axis=1, initial=0.0), -weight.min(axis=1, initial=0.0))
    return np.maximum(peak / np.float32(QMAX), np.float32(SCALE_FLOOR))


def quantize_weight(
    weight: Float,
    name: str,
    *,
    storage: np.dtype[Any] | None = None,
    group: int | None = None,
    first: int = 0,
    room: Room | None = None,
) -> QuantizedWeight:
    """Round W [N, K] to INT8, symmetric, to nearest even, with a scale per output channel.

    Args:
        weight: float32 [N, K].
        name: For messages.
        storage: The type that the scale will be stored in, if narrower than float32: scales are rounded up to it, and W
            is rounded with the scale as stored, so nothing is clipped.
        group: Give each run of so many input channels a scale of its own; zeros fill up the last one.
        first: Number of the first row, for messages.
        room: Space to work in; the values are in it, too.

    Raises:
        BismoothError: W holds NaN or infinity, or is too large for the scale's type.
    """
    rows = weight if group is None else split_groups(weight, group).reshape(-1, group)
    scale = weight_scale(rows)
    if not np.isfinite(scale).all():
        require_finite(weight, name, first)
    if storage is not None:
        scale = _stored_scale(scale, storage, name)
    room = room or Room()
    values = room.bytes("values", rows.shape)
    lost = total = 0.0
    for part in row_chunks(rows.shape, ROWS):
        shape = (part.stop - part.start, rows.shape[1])
        ratio = np.divide(rows[part], scale[part, None], out=room.floats("ratio", shape))
        rounded = np.rint(ratio, out=room.floats("rounded", shape))
        values[part] = rounded
        squared = scale[part].astype(np.float64) ** 2
        total += float(squared @ _squares(ratio))
        ratio -= rounded
        lost += float(squared @ _squares(ratio))
    if group is not None:
        values, scale = values.reshape(len(weight), -1, group), scale.reshape(len(weight), -1)
    return QuantizedWeight(values, scale, lost, total)


def in_two_digits(part: Float, high: QuantizedWeight) -> tuple[QuantizedWeight, QuantizedWeight]:
    """W [N, K] in two INT8 digits, W = (w₁ + w₂ / 254) · scale, for a product with x = (x₁ + x₂ / 254) · t.

    Args:
        part: W.
        high: W in one digit, w₁.

    Returns:
        w₁ for the product with x₁; and w₁ beside w₂, int8 [N, 2K], for the product with x₂ beside x₁, whose scale is
        as much smaller. What is left out is x₂ w₂ / 254².
    """
    ratio = part / high.scale[:, None] - high.values
    low = np.rint(ratio * LOW)
    ratio -= low / LOW
    lost = float(high.scale.astype(np.float64) ** 2 @ _squares(ratio))
    both = np.concatenate([high.values, low.astype(np.int8)], axis=1)
    scale = high.scale / np.float32(LOW)
    return QuantizedWeight(high.values, high.scale, lost, high.power), QuantizedWeight(both, scale, 0.0, 0.0)


def weight_error(lost: float, power: float) -> float:
    """‖W − Ŵ‖ / ‖W‖ of their squares, 0 for a weight of zeros."""
    return float(np.sqrt(lost / power)) if power else 0.0


def require_finite(weight: Float, name: str, first: int = 0) -> None:
    """Check W [N, K], whose first row has the number ``first``.

    Raises:
        BismoothError: W holds NaN or infinity; the message names the row.
    """
    for part in row_chunks(weight.shape):
        finite = np.isfinite(weight[part]).all(axis=1)
        if not finite.all():
            row = first + part.start + int(np.argmin(finite))
            raise BismoothError(
                f"{name}: the weight holds NaN or infinity in row {row}. Expected finite values. Check the checkpoint."
            )


def _squares(rows: Float) -> Float:
    """‖row‖² of each row: [N], of values up to :data:`QMAX`. BLAS sums many lanes apart, so float32 is exact enough."""
    return (rows[:, None, :] @ rows[:, :, None])[:, 0, 0]


def _stored_scale(scale: Float, storage: np.dtype[Any], name: str) -> Float:
    """The least numbers of the type that are not below the scales, nor below :data:`_SUBNORMAL` of its normal ones."""
    limits = float_limits(storage)
    if (largest := float(scale.max())) > limits.largest:
        raise BismoothError(
            f"{name}: the scale of its largest row does not fit into {storage}. Expected weights within "
            f"±{QMAX * limits.largest:.5g}, got {QMAX * largest:.5g}. Compute in bfloat16 or float32 instead."
        )
    stored = np.maximum(scale, np.float32(limits.smallest_normal * _SUBNORMAL)).astype(storage)
    upward = np.nextafter(stored, np.array(np.inf, storage))
    return np.where(stored.astype(np.float32) < scale, upward, stored).astype(np.float32)


def split_groups(rows: Float, group: int) -> Float:
    """[R, K] as [R, G, group], the last group filled up with zeros."""
    count = -(-rows.shape[1] // group)
    padded = np.pad(rows, ((0, 0), (0, count * group - rows.shape[1]))) if rows.shape[1] % group else rows
    return padded.reshape(rows.shape[0], count, group)


def row_chunks(shape: tuple[int, ...], elements: int = _CHUNK) -> Iterator[slice]:
    """Slices over the rows of [N, K] that hold about ``elements`` elements each."""
    step = max(1, elements // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def fake_quantize_rows(rows: Float, group: int | None = None, out: Float | None = None) -> Float:
    """INT8 and back with one scale max|row| / 127 per row, or per row and group: float32 [R, K].

    For tokens this is per-token quantization (arXiv 2206.01861, token-wise), for W per output channel. ``out``, which
    may be ``rows``, takes the result.
    """
    if group is not None and group < rows.shape[1]:
        parts = fake_quantize_rows(split_groups(rows, group).reshape(-1, group))
        return np.positive(parts.reshape(len(rows), -1)[:, : rows.shape[1]], out=out)
    scale = weight_scale(rows)[:, None]
    result = np.divide(rows, scale, out=out)
    np.rint(result, out=result)
    result *= scale
    return result


def fake_quantize_with(x: Float, scale: Float, digits: int = 1) -> Float:
    """INT8 and back with constant scales that fit x, in one digit, or in two that follow each other."""
    ratio = x / scale
    rounded = np.clip(np.rint(ratio), -128, 127)
    if digits > 1:
        rounded += np.clip(np.rint((ratio - rounded) * LOW), -128, 127) / np.float32(LOW)
    return rounded * scale
