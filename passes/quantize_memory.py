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

_MARGIN = 128 << 20
"""Bytes for the graphs, and for what was freed and lies about."""


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
    return _MARGIN + workers * (search + MOST + 2 * turned * _FLOAT_BYTES)
