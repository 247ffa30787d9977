"""How a float graph can be run in parts: its blocks, found by data flow, and the memory that a run of them takes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.budget import SPARE, base_memory
from ..engines.cuts import find_repeated
from ..engines.footprint import tensor_bytes
from ..engines.pieces import Piece, PieceMaker

LENGTH = 512
"""Tokens of the window that memory is told for."""


def find_structure(graph: Path) -> dict[str, Any] | None:
    """What ``bismooth inspect`` says of a float graph; None if nothing repeats in it.

    ``count`` blocks; bytes of the weights of the ``largest``, of what lies before them (``embedding``) and behind them
    (``head``), a tied weight in both; and bytes that are enough for ``bismooth calibrate`` on windows of 512 tokens.
    """
    from ..calibrators.run import observing
    from ..passes.graph import load
    from ..passes.linears import find_linears

    values = {linear.x: linear.k for linear in find_linears(load(graph))}
    if not values:
        return None
    streamed = observing(graph, values, np.zeros((1, LENGTH), np.int64))
    maker = streamed.maker
    repeated = find_repeated(maker.model.graph, maker.segments)
    if repeated is None:
        return None
    starts, end = repeated.starts, len(maker.segments)
    blocks = [Piece(first, stop) for first, stop in pairwise(starts)]
    return {
        "count": repeated.count,
        "largest_bytes": max(_weight_bytes(maker, block) for block in blocks),
        "embedding_bytes": _weight_bytes(maker, Piece(0, starts[0])),
        "head_bytes": _weight_bytes(maker, Piece(starts[-1], end)),
        "calibrate_bytes": base_memory() + streamed.least(0, streamed.stop) + 2 * SPARE,  # it begins with more
    }


def _weight_bytes(maker: PieceMaker, piece: Piece) -> int:
    """Bytes of what a piece of the graph reads."""
    if piece.first == piece.stop:
        return 0
    leaving = maker.segments[piece.stop - 1].exit or maker.model.graph.output[0].name
    return sum(tensor_bytes(tensor) for tensor in maker.make(piece, [leaving]).graph.initializer)
