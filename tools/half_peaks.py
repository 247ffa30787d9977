"""Largest magnitudes of values: of those that a graph computes, in the run itself, and of stored weights, in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..passes._gs import Tensor, read_pieces

PREFIX = "halfsim/"
"""Begins the names of what is added to a graph."""
PEAKS = f"{PREFIX}peaks"
_FLAT = f"{PREFIX}flat"
_REDUCTIONS = ("ReduceMax", "ReduceMin", "ReduceL1")


def add_peaks(model: onnx.ModelProto, values: Sequence[str]) -> None:
    """Give ``model`` the output :data:`PEAKS`, in place: three numbers for each of ``values``, float32.

    First the maxima of all, then the minima, then the sums of magnitudes, for NaN, which a maximum may skip.
    """
    if not values:
        return
    graph, wanted = model.graph, set(values)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        for value in wanted.intersection(node.output):
            nodes += _reductions(value)
    parts = [_part(value, op) for op in _REDUCTIONS for value in values]
    nodes.append(helper.make_node("Concat", parts, [PEAKS], PEAKS, axis=0))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), _FLAT))
    graph.value_info.extend(helper.make_tensor_value_info(part, TensorProto.FLOAT, [1]) for part in parts)
    graph.output.append(helper.make_tensor_value_info(PEAKS, TensorProto.FLOAT, [len(parts)]))


def _reductions(value: str) -> Iterator[onnx.NodeProto]:
    flat = f"{PREFIX}{value}.flat"
    yield helper.make_node("Reshape", [value, _FLAT], [flat], f"{PREFIX}{value}/flat")
    for op in _REDUCTIONS:
        yield helper.make_node(op, [flat], [_part(value, op)], f"{PREFIX}{value}/{op}", keepdims=1)


def _part(value: str, op: str) -> str:
    return f"{PREFIX}{value}.{op}"


def peaks_of(results: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """max|value| of the values that :func:`add_peaks` was given, of one run; NaN where one holds NaN, 0 of nothing."""
    if PEAKS not in results:
        return np.zeros(0)
    top, bottom, total = results[PEAKS].astype(np.float64).reshape(len(_REDUCTIONS), -1)
    return np.where(np.isnan(total), np.nan, np.maximum(np.maximum(top, -bottom), 0))


def peak_of_stored(weight: Tensor, dtype: np.dtype[Any]) -> float:
    """max|W| of a constant, rounded to ``dtype``; its file is read a few million elements at a time."""
    peak = np.float32(0)
    for piece in read_pieces(weight):
        values = piece.astype(np.float32)
        peak = np.maximum(peak, np.maximum(values.max(), -values.min()))  # keeps NaN
    with np.errstate(over="ignore"):
        return float(peak.astype(dtype))
