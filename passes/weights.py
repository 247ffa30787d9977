"""INT8 weights: rounding W [N, K] with one scale per output channel, and what that costs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError

QMAX = 127
"""Weights use −127 … 127, so that −q is representable too."""

SCALE_FLOOR = 2.0**-100
"""Scale of a row of zeros: any positive normal number serves."""

S0 = 2.0**-14
"""The scalar that an INT8 GEMM dequantizes its weight with: K · 127² · 2⁻¹⁴ < 65504 for all K ≤ 66 000, so the float16
result cannot overflow, and an accumulator of 1 is still a normal number. The rest of the scale follows in float32."""

_CHUNK = 1 << 22


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Ŵ = ``values`` · ``scale``.

    Attributes:
        values: int8 [N, K].
        scale: float32 [N].
        error: ‖W − Ŵ‖ / ‖W‖, 0 for a weight of zeros.
    """

    values: NDArray[np.int8]
    scale: NDArray[np.float32]
    error: float


def weight_scale(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """max|row| / 127 per output channel: float32 [N], at least :data:`SCALE_FLOOR`."""
    peak = np.maximum(weight.max(axis=1, initial=0.0), -weight.min(axis=1, initial=0.0))
    return np.maximum(peak / np.float32(QMAX), np.float32(SCALE_FLOOR))


def quantize_weight(weight: NDArray[np.float32], name: str, storage: np.dtype[Any] | None = None) -> QuantizedWeight:
    """Round W [N, K] to INT8, per output channel, symmetric, to nearest even.

    Args:
        weight: float32 [N, K].
        name: For messages.
        storage: The type that the scale will be stored in, if narrower than float32: W is then rounded with the scale
            as stored, so that storing it costs nothing.

    Raises:
        BismoothError: W holds NaN or infinity.
    """
    scale = weight_scale(weight)
    if not np.isfinite(scale).all():
        row = int(np.flatnonzero(~np.isfinite(scale))[0])
        raise BismoothError(
            f"{name}: the weight holds NaN or infinity in row {row}. Expected finite values. Check the checkpoint."
        )
    if storage is not None:
        smallest = np.float32(np.finfo(np.float16).tiny)
        scale = np.maximum(scale * np.float32(1 + 2**-8), smallest).astype(storage).astype(np.float32)
    values = np.empty(weight.shape, np.int8)
    lost = total = 0.0
    for rows in row_chunks(weight.shape):
        ratio = weight[rows] / scale[rows, None]
        rounded = np.rint(ratio)
        np.clip(rounded, -QMAX, QMAX, out=rounded)
        values[rows] = rounded
        squared = scale[rows].astype(np.float64) ** 2
        ratio -= rounded
        lost += float(squared @ np.einsum("nk,nk->n", ratio, ratio, dtype=np.float64))
        total += float(np.einsum("nk,nk->", weight[rows], weight[rows], dtype=np.float64))
    return QuantizedWeight(values, scale, float(np.sqrt(lost / total)) if total else 0.0)


def row_chunks(shape: tuple[int, ...], elements: int = _CHUNK) -> Iterator[slice]:
    """Slices over the rows of [N, K] that hold about ``elements`` elements each."""
    step = max(1, elements // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def fake_quantize_rows(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Per-token INT8 and back: float32 [T, K], one scale max|row| / 127 per row (arXiv 2206.01861, token-wise)."""
    peak = np.maximum(x.max(axis=1, keepdims=True), -x.min(axis=1, keepdims=True))
    scale = np.maximum(peak, np.float32(np.finfo(np.float32).tiny)) / np.float32(QMAX)
    return np.rint(x / scale) * scale


def fake_quantize_tensor(x: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """Per-tensor INT8 and back with a constant scale."""
    return np.clip(np.rint(x / np.float32(scale)), -128, 127) * np.float32(scale)
