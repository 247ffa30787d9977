"""How much memory quantization takes: that of its workers, each of which has one site or one weight at a time."""

from __future__ import annotations

from collections.abc import Sequence

from ..export.column_writer import MOST
from .linears import Linear
from .smoothing import SAMPLED_OUTPUTS
from .weight_reader import WIDE

_FLOAT_BYTES = 4
_ARRAYS = 8
"""Arrays of sampled tokens, or of sampled rows of W, that the search for one site's factors has at a time."""

_CHANNEL_BYTES, _LINEAR_BYTES = 32, 128 << 10
"""What stays to the end: factors, edits and records by channel that a linear reads, and nodes around each linear."""

_MARGIN = 96 << 20
"""Bytes for what was freed and lies about."""


def quantize_memory(linears: Sequence[Linear], tokens: int, workers: int) -> int:
    """Bytes that quantization takes beside what the process has already.

    Args:
        linears: all of the model.
        tokens: sampled rows of statistics for each value; 0 without.
        workers: how many work at a time.
    """
    widest = max((linear.k for linear in linears), default=0)
    search = _ARRAYS * (tokens + SAMPLED_OUTPUTS) * widest * _FLOAT_BYTES
    turned = max((min(linear.n * linear.k, WIDE) for linear in linears if linear.layout == "KN"), default=0)
    kept = sum(_CHANNEL_BYTES * linear.k + _LINEAR_BYTES for linear in linears)
    return _MARGIN + kept + workers * (search + MOST + 2 * turned * _FLOAT_BYTES)
